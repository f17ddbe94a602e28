"""An owner's models and rows, and what is measured on them: everything of an owner that needs torch.

`context.py` imports this only for the messages that need it. Flower answers each packet in a new process, where
importing torch and transformers takes longer than most answers.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from math import ceil, isfinite
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from client.data.rows import Rows, unlabelled
from client.holdings import MADE_FROM, Holdings, Terms
from client.measurement.block_steps import load_merged_so_far, measure_inputs, modules_from
from client.measurement.classifier_inputs import measure_class_shares, measure_classifier
from client.measurement.closeness import closeness, mean_states
from client.measurement.disk_model import DiskModel
from client.measurement.evaluation import predict_logits
from client.measurement.fisher import measure_fisher
from client.measurement.gram import UNBOUNDED
from client.measurement.gram_rows import OF_CLASSIFIER, check_gram_rows
from client.measurement.gram_stream import Batches, GramStream
from client.measurement.label_order import label_order, output_order
from client.measurement.passes import Halving
from client.measurement.predictions import as_summed
from client.measurement.stored_tensors import StoredTensors
from client.pool_look import PoolLook, look_at_images, look_at_pool, write_sheet
from client.repeats import Contributed
from client.settings import OwnerSettings
from client.sketch import Sketch, sketch_of
from client.state import OwnerState, merged_step_array
from common import merge_methods
from common.agreement import Agreement
from common.domain_separation import Domain
from common.errors import DataError, ModelError, SettingsError
from common.merge_methods import METHODS
from common.merge_methods.distill import DISTILL, DistillTable, predictions_alone
from common.merge_methods.method import Measurement, MultiRoundMethod, SingleRoundMethod, Step
from common.merge_methods.refit import REFIT, classifier
from common.merge_methods.regmean import REGMEAN
from common.merge_methods.terms import Gram, Hyperparameters, MergeSettings, OwnerTerms, Predictions
from common.metrics import Score, Split
from common.models.adapter import is_adapter, names_another_base
from common.models.delta import ClippedDelta, Delta, Function, VectorDelta, add_delta
from common.models.files import weight_files
from common.models.folders import check_tokenizer, fine_tuned_folder, load_tokenizer
from common.models.loading import check_change, digest_of, private_head
from common.models.low_rank import AdapterDelta
from common.models.parameters import body_parameters, copy_parameters, longest_text
from common.models.plan import MergePlan
from common.models.published_folder import base_names, published_folder, write_adapter, write_model
from common.pool import ImagePool, Pool, pool_path, read_pool, thumbnail
from common.pool_rows import PoolRows, check_counts
from common.privacy.noise import Noise
from common.publication import PublishedFolder
from common.room import needing_room
from common.schedule import Schedule, schedule_of
from common.summation.fixed_point import check_layout
from common.tensor_layout import TensorLayout

ROWS_OF_DENSITY = 2000  # that a Gaussian is made of, at most
POOL_SHEET = "pool.png"  # in the state folder: the images of a pool that the consent text names
MOVE_STATE = "make room on this disk, or move the state folder"
LABELS_TO_LOOK_AT = 200  # rows on which the order of a model's labels is judged
log = logging.getLogger("amalgram.owner")


class Workbench(Holdings):
    """What one owner has, and how it is measured."""

    def __init__(self, settings: OwnerSettings, home: Path, agreement: Agreement, state: OwnerState) -> None:
        super().__init__(settings, home, agreement)
        self.state = state

    def check(self) -> None:
        """Look at the model and the rows. Raises the error that a run would meet; nothing is computed."""
        _ = self.passes  # raises for a device that is not there
        check_layout(self.contribution_layout(), len(self.agreement.owners))
        if self.agreement.privacy.epsilon is not None:
            self.check_private_training()
        self._check_what_it_gives()
        base = self._own_base
        if self.settings.fine_tuned is not None:
            folder = fine_tuned_folder(self.settings.fine_tuned, self._home)
            own = dict(self.own_model().named_parameters())
            if self.settings.own_base is None:
                check_change(own, base, body_parameters(self._outline), folder)
                self._check_fixed(own, base)
            if self.task.is_text:
                check_tokenizer(folder, self.own_base_folder)
        for data in (self.data,) if self.settings.own_base is None else (self.data, self.merged_data):
            data.train()
            self.one_of_each_unit(data.validation(), "validation")
            self.one_of_each_unit(data.test(), "test")
        _ = self.reported_rows()  # raises for a column that is not there
        self._check_noise_leaves_something()

    def reported_rows(self) -> dict[str, tuple[int, int]]:
        """By agreed group, how many validation and test rows this owner reports; 0 if it reports none."""
        agreed, found = self.agreement.evaluation.groups, {}
        if agreed:
            validation, test = self.groups("validation"), self.groups("test")
            for number, group in enumerate(agreed):
                found[group] = (int((validation == number).sum()), int((test == number).sum()))
        return found

    def _check_noise_leaves_something(self) -> None:
        """Raise DataError if this owner has so few rows that noise would hide what all of them say."""
        self._check_noise_leaves_grams()
        noise = self.merge_settings.refit_noise
        if noise is None:
            return
        layer, owners = classifier(self.plan), len(self.agreement.owners)
        needed = noise.rows_needed(owners, layer.d_in + (layer.bias is not None))
        least, most = -(-needed // owners), REFIT.of(self.agreement.tables).measured_examples
        rows = min(len(self.one_of_each_unit(self.data.train(), "train")), most)
        if rows < least:  # check: noise-leaves-something
            raise DataError(
                f"{self.name}: brings {rows} rows to the refit, and with its noise (privacy.epsilon = "
                f"{self.agreement.privacy.epsilon:g}) it takes {needed} of all owners, {least} of each",
                hint=f"agree on refit.measured_examples = {least} or more"
                if most < least
                else "bring more rows, agree on a larger privacy.epsilon or privacy.legs.refit, or leave refit out",
            )

    def _check_noise_leaves_grams(self) -> None:
        """The same for Gram matrices: the noise must not exceed the smallest eigenvalue that a method keeps of one."""
        noise, agreement = self.merge_settings.gram_noise, self.agreement
        if noise is None:
            return
        owners, most = len(agreement.owners), REGMEAN.of(agreement.tables).measured_examples
        rows = min(len(self.one_of_each_unit(self.data.train(), "train")), most)
        needed = {
            (name, shared.name): noise.examples_needed(
                owners, shared.gram_size, METHODS[name].least_kept(agreement.tables, shared.gram_size)
            )
            for name in agreement.methods
            for shared in self.plan.inputs
        }
        (name, layer), largest = max(needed.items(), key=lambda each: each[1], default=(("", ""), 0.0))
        if rows < largest / owners:  # check: noise-leaves-grams
            takes = (
                f"it takes {ceil(largest):,} of all owners, {ceil(largest / owners):,} of each"
                if isfinite(largest)
                else "no number of them is enough at this alpha"
            )
            raise DataError(
                f"{self.name}: brings {rows} examples to the Gram matrices, and with their noise (privacy.epsilon = "
                f"{agreement.privacy.epsilon:g}, {len(noise.norms)} Gram matrices) {takes}: for {name}, at {layer}",
                hint=f"agree on regmean.measured_examples = {ceil(largest / owners)} or more"
                if rows == most and isfinite(largest)
                else "bring more examples, agree on a larger privacy.epsilon or privacy.legs.grams, on a smaller "
                'regmean.largest_gram, on fewer merge.layers, or on method = "anchored", which leans on weight changes',
            )

    def _check_what_it_gives(self) -> None:
        """Raise unless the roster says what this owner can give, and its copy of the pool is the agreed one."""
        gives_weights = self.name not in self.agreement.without_weights
        if self.settings.own_base is not None and gives_weights:  # check: other-bases-give-no-weights
            raise SettingsError(
                f"{self.name}: its model has a base of its own (own_base), and the agreement has it give weights",
                hint='agree that it gives predictions alone: in its [[owners]] entry, gives = "predictions"',
            )
        if DISTILL.name not in self.agreement.methods:
            return
        agreed = [label for number, label in enumerate(self.task.labels) if number in self._known_labels]
        if not set(agreed) <= set(self.own_task.labels):  # check: labels-are-those-of-the-roster
            raise ModelError(
                f"{self.name}: its model knows the labels {list(self.own_task.labels)}, the agreement says {agreed}",
                hint="correct labels in its [[owners]] entry, and agree anew",
            )
        if not self.task.has_labels:
            self._check_vocabulary()
        _ = self._pool_rows()

    def _check_vocabulary(self) -> None:
        """Raise ModelError unless this owner's language model knows the tokens that are agreed on."""
        if self.settings.own_base is not None:
            check_tokenizer(self.own_base_folder, self.base_folder)
        layers = (self.own_outline.get_input_embeddings(), self.own_outline.get_output_embeddings())
        outputs, agreed = min(len(layer.weight) for layer in layers), self._pool_table.vocabulary or 0
        if outputs < agreed:
            raise ModelError(
                f"{self.name}: its model knows {outputs} tokens, and {agreed} are agreed on",
                hint="language models are distilled on one vocabulary: use a model with the agreed base's tokenizer",
            )

    @property
    def _known_labels(self) -> frozenset[int]:
        """The numbers of the agreed labels that this owner's model knows, as the roster says."""
        unknown = self.agreement.unknown_labels.get(self.name, frozenset())
        return frozenset(range(len(self.task.labels))) - unknown

    @property
    def _pool_table(self) -> DistillTable:
        return DISTILL.of(self.agreement.tables)

    @cached_property
    def pool(self) -> Pool | ImagePool:
        """The agreed pool. Raises DataError for another one."""
        path = pool_path(self.settings.pool, self._home, self._pool_table, self._home / self.settings.agreement)
        return read_pool(path, self._pool_table, self.task.kind)

    def _pool_rows(self) -> PoolRows:
        """The pool as this owner's model reads it: of a language model, in the agreed base's tokens.

        Raises DataError or ModelError unless it can predict everything that is asked.
        """
        data = self.data if self.task.has_labels else self.merged_data
        rows = data.pool_rows(self.pool, self._pool_table)
        check_counts(rows, self._pool_table)
        if not self.task.has_labels and data is not self.data:
            longest = max(len(row["input_ids"]) for row in rows.features)
            most = longest_text(self.own_outline, longest)
            if most < longest:
                raise ModelError(
                    f"{self.name}: its model reads at most {most} tokens, and a text of the pool has {longest}",
                    hint=f"agree on task.max_tokens = {most}, or on a pool of shorter texts",
                )
        return rows

    def oddities(self) -> Iterator[str]:
        """What is odd about this owner's model and files, but no error. Never for the log of a run.

        Raises ModelError if the model's outputs are in another order than the agreed labels.
        """
        if self.settings.fine_tuned is not None:
            own = self.own_model()
            if self._is_unchanged(own):
                yield f"{self.settings.fine_tuned}: is the base model, unchanged, and brings nothing to the merge"
            elif self.own_task.labels != self.task.labels:
                pass  # its labels have names, and are not in the agreed order
            elif self.task.has_labels and not self.task.judges_tokens and self.task.head == "shared":
                rows = self._labels_to_look_at()
                outputs = self._outputs(own, rows)
                del own  # one model is in memory
                yield from self._look_at_labels(rows, outputs, self._outputs(self.load_own_base(), rows))
            folder = fine_tuned_folder(self.settings.fine_tuned, self._home)
            if told := self.data.read_otherwise(folder):
                yield told
            names = base_names(self.agreement, self.settings.own_base)
            if is_adapter(folder) and (named := names_another_base(folder, self.own_base_folder, names)):
                yield f"{self.settings.fine_tuned}: {named}"
        yield from self.data.oddities()

    def _is_unchanged(self, own: PreTrainedModel) -> bool:
        base = self._own_base
        return all(torch.equal(parameter, base[name]) for name, parameter in own.named_parameters())

    def _labels_to_look_at(self) -> Rows:
        rows = self.data.validation()
        return rows.take(np.random.default_rng(0).permutation(len(rows))[:LABELS_TO_LOOK_AT])

    def _outputs(self, model: PreTrainedModel, rows: Rows) -> NDArray[np.float32]:
        return self.in_batches(partial(predict_logits, model, rows, passes=self.passes))

    def _look_at_labels(self, rows: Rows, outputs: NDArray[np.float32], of_base: NDArray[np.float32]) -> Iterator[str]:
        labels = self.task.labels
        if self.task.problem_type != "single_label_classification":
            targets = np.asarray(rows.targets, np.float32)
            found, does = output_order(outputs, of_base, targets, labels), "correlates with them at {:.2f}"
            again = "{:.2f}"
        else:
            numbers = np.asarray(rows.targets, np.int64)
            found, does = label_order(outputs.argmax(1), of_base.argmax(1), numbers, labels), "is right on {:.1%}"
            again = "on {:.1%}"
        if found.is_another:
            raise ModelError(
                f"{self.name}: on {len(rows)} of its own rows, its model {does.format(found.own)}, and "
                f"{again.format(found.best)} if its labels are in the order {list(found.order)}; the agreed order is "
                f"{list(labels)}",
                hint="save the model with its outputs in the agreed order, or agree on this one (task.labels)",
            )
        if found.own < found.base:
            where = f"{self.settings.fine_tuned}: on {len(rows)} of this owner's own rows"
            yield f"{where}, it {does.format(found.own)}, and the base model {again.format(found.base)}"

    # --- what the agreement makes of this base model ---

    @cached_property
    def schedule(self) -> Schedule:
        """The rounds of the agreement."""
        return _schedule(self._terms, self.plan)

    @cached_property
    def merge_settings(self) -> MergeSettings:
        """What the agreement says to the merge methods."""
        return self.agreement.merge_settings(self.plan)

    def contribution_layout(self) -> TensorLayout:
        """The tensors that all methods need first, on their true scale."""
        return merge_methods.contribution_layout(self.agreement.methods, self.merge_settings)

    # --- models ---

    def own_model(self) -> PreTrainedModel:
        """The owner's fine-tuned model: the one it brings, or one that is made from its training rows, and kept."""
        if self.settings.fine_tuned is None and not self.is_kept():
            self._make_own_model()
        return super().own_model()

    @cached_property
    def _own(self) -> DiskModel:
        return self._on_disk(self.own_model())

    @cached_property
    def _base(self) -> StoredTensors:
        return StoredTensors(self.load_base(), weight_files(self.base_folder), self.state.folder)

    @cached_property
    def _own_base(self) -> StoredTensors:
        """What this owner's model was made from."""
        if self.settings.own_base is None:
            return self._base
        return StoredTensors(self.load_own_base(), weight_files(self.own_base_folder), self.state.folder)

    def _on_disk(self, model: PreTrainedModel) -> DiskModel:
        return DiskModel(model, self.state.folder)

    def _make_own_model(self) -> None:
        model, folder = self._train(), self._kept_folder
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        with needing_room("the fine-tuned model", self.state.folder, MOVE_STATE):
            model.save_pretrained(partial)
            if self.task.is_text:
                load_tokenizer(self.own_base_folder).save_pretrained(partial)
        (partial / MADE_FROM).write_text(self._recipe())
        self.state.seal(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)

    # --- measuring ---

    def contributed(self, key: bytes, *, may_train: bool = True) -> Contributed:
        """Sketches of this owner's rows and of the tensors that its model changes. A model that is yet to be made from
        the rows is made, if it `may_train`, or left out.
        """
        has_model = may_train or self.settings.fine_tuned is not None
        return Contributed.of(key, self.data, sketch_of(key, self._changed_tensors()) if has_model else Sketch())

    def _changed_tensors(self) -> Iterator[memoryview]:
        """The bytes of every tensor of this owner's model that differs from the base's, except a private head."""
        own = self._own
        base = self._own_base
        for name in sorted(set(own) - set(private_head(self._outline, self.task))):
            tensor = own[name]
            if not torch.equal(tensor, base[name]):
                yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data

    def _check_fixed(self, own: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
        """Raise ModelError if this owner's model changed a parameter that is left alone: it would lose that change."""
        for name in self._fixed:
            if not torch.equal(own[name], base[name]):
                raise ModelError(
                    f"{self.name}: its model has another {name} than the base, which the agreement leaves as it is",
                    hint="bring a model that changed nothing else than merge.layers, or agree on more of them",
                )

    def contribution(self, noise: Noise | None = None) -> Iterator[tuple[str, NDArray]]:
        """This owner's tensors of the contribution round, in the order of `contribution_layout`, with its noise."""
        if self.name in self.agreement.without_weights:
            yield from predictions_alone(self.contribution_layout(), self.merge_settings, self._predictions())
            return
        with self.state.scratch_folder() as activations:
            terms = replace(self.measure(activations), noise=noise)
            yield from merge_methods.contribution(self.agreement.methods, self.merge_settings, terms)
        del self._own  # its copy on the disk is no longer needed

    def step_contribution(self, method_name: str, step: Step, noise: Noise) -> Iterator[tuple[str, NDArray]]:
        """This owner's tensors of one step's round, in the order of its layout."""
        method = _multi_round(method_name)
        return method.step_contribution(
            self.merge_settings, step, replace(self._measure_step(method, step), noise=noise)
        )

    def measure(self, activations: Path) -> OwnerTerms:
        """Everything the contribution round needs of this owner, most of it measured or computed when it is asked for.

        Reading a Gram raises DataError if it covers too few rows. `activations`: a private folder to work in.
        """
        wanted = merge_methods.measurements(self.agreement.methods, self.agreement.tables)
        train = self.data.train()
        own, base = self._own, self._base
        self._check_fixed(own, base)
        log.info("  %s: measuring", self.name)  # check: logs-hold-no-number-of-rows
        terms = OwnerTerms(examples=len(train), delta=self._delta(own, base))
        if Measurement.GRAMS in wanted:
            rows = self.drawn(self.one_of_each_unit(train, "train"), wanted[Measurement.GRAMS])
            batches = Batches(rows, self.passes.halving)
            grams = GramStream(own, self.plan, batches, activations, self._checked, self.passes, self._norms)
            terms = replace(terms, grams=grams, gram_examples=len(rows))
        if Measurement.FISHER in wanted:
            rows = self.drawn(train, wanted[Measurement.FISHER])
            seed, names = self.agreement.seed, self.plan.changed
            fisher = Halving(1).run(lambda: measure_fisher(own.model, rows, seed, self.passes, names))
            terms = replace(terms, fisher=fisher, fisher_examples=len(rows))
        if Measurement.CLASS_SHARES in wanted:
            rows = self.drawn(train, wanted[Measurement.CLASS_SHARES])
            terms = replace(terms, class_shares=measure_class_shares(own.model, rows, self.settings.batch_size))
        if Measurement.PREDICTIONS in wanted:
            terms = replace(terms, predictions=self._predictions())
        return terms

    def _predictions(self) -> Predictions:
        """What this owner's model says of the pool."""
        log.info("  %s: predicting the pool", self.name)
        table, task = self._pool_table, self.task
        rows = unlabelled(self._pool_rows())
        logits = self.own_logits(self.own_model(), rows)
        if task.has_labels:
            known = np.array([number in self._known_labels for number in range(len(task.labels))])
        else:
            known = np.ones(table.vocabulary or 0, bool)
            logits = logits[:, : len(known)]
        close = self._closeness() if table.weights == "density" else None
        return Predictions(numbers=as_summed(logits, known, task), known=known, closeness=close)

    def _closeness(self) -> NDArray[np.float64]:
        """How close each row of the pool is to this owner's, as the agreed base reads both: (predictions,)."""
        rows = self.merged_data.pool_rows(self.pool, self._pool_table)
        pool = self.states_of(unlabelled(rows))
        return np.repeat(closeness(pool, self.own_states(), pool), rows.counts)

    def own_states(self) -> NDArray[np.float64]:
        """The base's states of this owner's training rows, of which closeness is measured, (rows, hidden size)."""
        return self.states_of(self.drawn(self.merged_data.train(), ROWS_OF_DENSITY))

    def states_of(self, rows: Rows) -> NDArray[np.float64]:
        """What the agreed base makes of rows, (rows, hidden size)."""
        return self.in_batches(partial(mean_states, self.load_base(), rows, passes=self.passes))

    @cached_property
    def pool_look(self) -> PoolLook:
        """The pool, for whoever consents."""
        if isinstance(self.pool, ImagePool):
            return look_at_images(self.pool, [thumbnail(image) for image in self.data.images()])
        return look_at_pool(self.pool, [content.decode(errors="replace") for content in self.data.contents()])

    def write_pool_sheet(self) -> Path | None:
        """Write the images that `pool_look` names into one file in the state folder, if the pool has images."""
        if not isinstance(self.pool, ImagePool):
            return None
        path = self.state.folder / POOL_SHEET
        with needing_room("the sheet of images", self.state.folder, MOVE_STATE):
            write_sheet(self.pool, [*self.pool_look.drawn_rows, *self.pool_look.nearest_rows], path)
        return path

    def drawn(self, rows: Rows, limit: int) -> Rows:
        """At most `limit` examples, drawn without replacement: the same ones whenever this agreement's run resumes.

        Each agreement draws anew. If all drew alike, 101 examples under one and 100 under another would differ in one.
        Keys and code alone change no draw, so a simulation, whose keys are new every time, can be repeated.
        """
        if len(rows) <= limit:
            return rows
        terms = self.agreement.model_dump(mode="json", exclude={"bundle_digest", "coordinator", "owners"})
        written = json.dumps([terms, self.agreement.owner_names], sort_keys=True)
        seed = hashlib.sha256(Domain.MEASURED_ROWS.value + written.encode()).digest()
        order = np.random.default_rng(int.from_bytes(seed)).permutation(len(rows))  # check: each-agreement-draws-anew
        return rows.take(order[:limit])

    def _delta(self, own: DiskModel, base: StoredTensors) -> Mapping[str, Tensor]:
        """What fine-tuning changed, scaled down where it is more than the agreement allows."""
        return ClippedDelta(Delta(own, base), self.merge_settings.bounds.changes)  # check: owners-clip-their-changes

    def _measure_step(self, method: MultiRoundMethod[Hyperparameters], step: Step) -> OwnerTerms:
        log.info("  %s: measuring %s step %d", self.name, method.title, step.number)
        train = self.data.train()
        own, base = self._own, self._base
        merged = self._merged_so_far(method, step)
        rows = self.drawn(self.one_of_each_unit(train, "train"), step.max_examples)
        if step.measurement is Measurement.CLASSIFIER:
            layer = classifier(self.plan)
            terms = self.in_batches(lambda size: measure_classifier(base, own, merged, layer, rows, size, self.passes))
            self._check_rows(OF_CLASSIFIER, len(terms.features), terms.features.shape[1])
            return OwnerTerms(examples=len(train), delta={}, classifier=terms)
        delta = self._delta(own, base)
        names = [name for shared in step.inputs for layer in shared.layers for name in layer.parameters]
        of_step = {name: delta[name] for name in names}  # before the owner's model becomes the one to measure on
        merged_names = [
            name for number in range(step.number) for name in method.merged_names(self.merge_settings, number)
        ]
        ahead = modules_from(self.plan, method.steps(self.merge_settings), step)
        del self._own  # it is about to hold merged layers
        load_merged_so_far(own.model, merged, merged_names, ahead)
        grams = self.passes.halving.run(lambda: self._measure_inputs(own.model, step, rows))
        return OwnerTerms(examples=len(train), delta=of_step, grams=self._checked(grams), gram_examples=len(rows))

    def _measure_inputs(self, model: PreTrainedModel, step: Step, rows: Rows) -> dict[str, Gram]:
        passes, inputs, block = self.passes, step.inputs, step.block
        batches, folder = Batches(rows, passes.halving), passes.halving.folder_in(self.state.activations_folder)
        return measure_inputs(
            model, self.plan, inputs, block, batches, folder, keep=block, passes=passes, norms=self._norms
        )

    @property
    def _norms(self) -> Mapping[str, float]:
        """How far one example may move each Gram; empty if Grams have no noise."""
        if not self.agreement.has_noised_grams:
            return UNBOUNDED
        noise = self.merge_settings.gram_noise
        assert noise is not None  # the agreement has it
        return noise.norms

    def _merged_so_far(self, method: MultiRoundMethod[Hyperparameters], step: Step) -> DiskModel:
        """The base model with everything that the steps before this one merged."""
        merged = self.load_base()
        parts = [
            (each.layout, self.state.open_array(merged_step_array(method.name, number), each.layout.size, "<f4"))
            for number, each in enumerate(self.schedule.deliveries("merged_step", method=method.name)[: step.number])
            if each.layout.size
        ]
        add_delta(merged, VectorDelta(self.plan, *parts))
        return self._on_disk(merged)

    def _checked(self, grams: Mapping[str, Gram]) -> Mapping[str, Gram]:
        """Raise DataError for a Gram that covers so few rows that it would identify them.

        The owner stays out rather than hold one Gram back: if the others did so too, the sum would be the last one's.
        How many rows reach an expert is not in the owner's hands; whether experts have Grams is
        privacy.merge_routed_inputs. Noise hides rows however few they are, and a refusal would tell their number.
        """
        if self._norms:  # check: noised-grams-refuse-nothing
            return grams
        routed = {shared.name for shared in self.plan.inputs if shared.is_routed}
        dimensions = self.plan.dimensions()
        for name, gram in grams.items():
            if name not in routed:
                self._check_rows(name, gram.rows, dimensions.get(name, len(gram.matrix)))
        return grams

    def _check_rows(self, name: str, rows: int, dimensions: int) -> None:
        check_gram_rows(self.agreement, self.plan, self.name, name, rows, dimensions)

    # --- scoring ---

    def judge_candidate(
        self, split: Split, delta: Mapping[str, Tensor], *, may_be_published: bool
    ) -> tuple[str, Score, PublishedFolder | None]:
        """The digest of the merged model with this delta, how it does on the examples of a split, and what this owner
        would publish of it, if it may be the result.
        """
        head, model = self._own_head(), self.load_base()
        add_delta(model, delta)
        digest = digest_of(model, self.task)
        published = self._published(model, delta) if may_be_published else None  # before it has a private head
        copy_parameters(head, head, model)
        return digest, self.score(model, split), published

    def function(self, method_name: str | None, candidate: str) -> Function:
        """What makes a candidate's applied parameters of its solved ones (Method.apply); of most methods' nothing."""
        method = METHODS[method_name or ""]
        if not isinstance(method, SingleRoundMethod):
            return lambda solved: ()
        hyperparameter = self.agreement.agreed(method)[candidate]
        return lambda solved: method.apply(self.merge_settings, solved, hyperparameter)

    def _published(self, model: PreTrainedModel, delta: Mapping[str, Tensor]) -> PublishedFolder:
        """What this owner would publish, were `model`, the base with this delta, the result.

        It is written to a private folder for a moment.
        """
        with self.state.scratch_folder() as scratch:
            folder = scratch / "published"
            with needing_room("what would be published", self.state.folder, MOVE_STATE):
                if isinstance(delta, AdapterDelta):
                    write_adapter(model, delta, self.base_folder, self.agreement, folder)
                else:
                    write_model(model, self.base_folder, self.agreement, folder)
            return published_folder(folder)

    def score_base(self, split: Split) -> Score:
        """How the base model does, with this owner's head if heads are private."""
        head, base = self._own_head(), self.load_base()
        copy_parameters(head, head, base)
        return self.score(base, split)

    def _own_head(self) -> dict[str, Tensor]:
        """Copies of this owner's head if heads are private, so that the model that has it can be dropped."""
        names = private_head(self._outline, self.task)
        own = dict(self.own_model().named_parameters()) if names else {}
        return {name: own[name].detach().clone() for name in names}

    def cut_texts(self) -> tuple[int, int]:
        """How many of this owner's test texts are cut to max_tokens, of how many that were looked at."""
        return self.merged_data.cut_test_texts()

    def score_own(self, split: Split) -> Score:
        """How this owner's model does at home, read as it reads."""
        if self.settings.own_base is None:
            return self.score(self.own_model(), split)
        rows = self.data.validation() if split == "validation" else self.data.test()
        return self.score_said(self.own_logits(self.own_model(), rows), rows, split)


@lru_cache(maxsize=16)
def _schedule(terms: Terms, plan: MergePlan) -> Schedule:
    return schedule_of(terms.agreement, plan)


def _multi_round(name: str) -> MultiRoundMethod[Hyperparameters]:
    method = METHODS[name]
    assert isinstance(method, MultiRoundMethod)  # the schedule has steps for these alone
    return method
