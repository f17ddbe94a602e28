"""What one owner has: its task, its base, its model and its rows. Nothing here writes a file.

The workbench (workbench.py) measures on it for a merge, and the audit (audit/) for the owner alone.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from client.data.canaries import canaries_of
from client.data.groups import group_sums, reported_groups
from client.data.private_data import PrivateData, prepared_by
from client.data.rows import Rows, pool
from client.look import own_base, own_labels, own_task
from client.measurement import fine_tuning as finetune
from client.measurement.evaluation import bounded_sums, evaluate, predict_logits, right_rows, score_logits
from client.measurement.passes import Halving, Passes
from client.measurement.private_training import fine_tune_privately
from client.settings import OwnerSettings, Training
from client.state import FINE_TUNED
from common.agreement import Agreement, Task
from common.device import find_device
from common.errors import DataError, ModelError, SettingsError
from common.metrics import Score, Split, noised_score
from common.models.adapter import is_adapter
from common.models.files import digest_of_file, weight_files
from common.models.folders import (
    ANOTHER_BASE,
    BaseOrigin,
    base_model_folder,
    base_origin,
    fine_tuned_folder,
)
from common.models.loading import agreed_plan, check_base, load_base, load_fine_tuned, load_outline, private_head
from common.models.parameters import copy_parameters, parameter_shapes
from common.models.plan import MergePlan
from common.models.published_folder import write_model
from common.privacy.legs import spent_beside_training
from common.room import needing_room

MADE_FROM = "made_from.json"  # beside the weights of a model that was made here: its recipe
T = TypeVar("T")
log = logging.getLogger("amalgram.owner")


class Holdings:
    """What one owner has. `home`: the folder that paths in the settings are relative to."""

    def __init__(self, settings: OwnerSettings, home: Path, agreement: Agreement) -> None:
        self.settings, self.agreement = settings, agreement
        self.name = settings.name
        self._home = home

    @cached_property
    def task(self) -> Task:
        """The agreed task; if heads are private, over this owner's own labels."""
        return own_task(self.settings, self._home, self.agreement.task)

    @cached_property
    def base_folder(self) -> Path:
        agreement_path = self._home / self.settings.agreement
        return base_model_folder(self.settings.base, self._home, self.agreement, agreement_path)

    @property
    def base_origin(self) -> BaseOrigin:
        """Where this owner's copy of the base came from."""
        return base_origin(self.settings.base, self._home, self.agreement, self._home / self.settings.agreement)

    # An owner may have a base of its own; then it gives predictions alone. Otherwise, all that is `own` is the agreed.

    @cached_property
    def own_task(self) -> Task:
        """What this owner's model does: the task, over the labels that the model names."""
        return self.task.model_copy(update={"labels": own_labels(self.settings, self._home, self.task)})

    @cached_property
    def own_base_folder(self) -> Path:
        """What this owner's model was made from."""
        return own_base(self.settings, self._home, self.base_folder)

    @cached_property
    def own_outline(self) -> PreTrainedModel:
        """How this owner's model is made, without weights."""
        return self._outline if self.settings.own_base is None else load_outline(self.own_base_folder, self.own_task)

    def load_own_base(self) -> PreTrainedModel:
        """A fresh copy of what this owner's model was made from."""
        if self.settings.own_base is None:
            return self.load_base()
        return load_base(self.own_base_folder, self.own_task, self.agreement.seed)

    def check_shares_base(self, command: str) -> None:
        """Raise SettingsError, for a command that compares weights, if this owner has a base of its own."""
        if self.settings.own_base is not None:
            raise SettingsError(
                f"{command}: {self.name}'s model has a base of its own (own_base), so no weights compare",
                hint="it takes models of the agreed base",
            )

    def read_by(self, other: "Holdings") -> PrivateData:
        """This owner's files, as the model of `other` reads them. Only a simulation has both in one place."""
        return replace(
            self.data, model=other.own_outline, tokenizer=other.data.tokenizer, processor=other.data.processor
        )

    @cached_property
    def merged_data(self) -> PrivateData:
        """This owner's files, as a merged model reads them."""
        if self.settings.own_base is None:
            return self.data
        return self.read_for(self._outline, self.base_folder, self.task)

    def own_logits(self, model: PreTrainedModel, rows: Rows) -> NDArray[np.float32]:
        """What this owner's model says of rows: (predictions, agreed labels), -inf for labels that it lacks."""
        said = self.in_batches(partial(predict_logits, model, rows, passes=self.passes))
        if self.own_task.labels == self.task.labels:
            return said
        logits = np.full((len(said), len(self.task.labels)), -np.inf, np.float32)
        logits[:, [self.task.labels.index(label) for label in self.own_task.labels]] = said
        return logits

    def load_base(self) -> PreTrainedModel:
        """A fresh copy of the agreed base model."""
        base = load_base(self.base_folder, self.task, self.agreement.seed)
        check_base(base, self.agreement, self.base_folder)
        return base

    @cached_property
    def _outline(self) -> PreTrainedModel:
        return load_outline(self.base_folder, self.task)

    @cached_property
    def plan(self) -> MergePlan:
        if self.agreement.publish.adapter_rank is not None:  # depends on which weights the folder lacks, too
            return agreed_plan(self._outline, self.base_folder, self.agreement)
        return _plan(self._terms, self._outline, self.base_folder)

    @property
    def _terms(self) -> "Terms":
        return Terms(self.agreement.digest(), self.agreement)

    @cached_property
    def data(self) -> PrivateData:
        return PrivateData(
            data=self.settings.data,
            task=self.task,
            model=self.own_outline,
            **prepared_by(self.own_base_folder, self.task),
            folder=self._home,
            seed=self.agreement.seed,
            reading=self.agreement.reading,
        )

    def read_for(self, model: PreTrainedModel, folder: Path, task: Task) -> PrivateData:
        """This owner's files, as any other model reads them with the tokenizer or image processor in `folder`."""
        return replace(self.data, task=task, model=model, **prepared_by(folder, self.task))

    @cached_property
    def passes(self) -> Passes:
        """How passes run: on this owner's device, in the agreed type."""
        device = find_device(self.settings.device, self.name)
        return Passes(device, getattr(torch, self.agreement.dtype), Halving(self.settings.batch_size))

    def in_batches(self, run: Callable[[int], T]) -> T:
        """What `run` returns for a batch size that the device has memory for."""
        halving = self.passes.halving
        return halving.run(lambda: run(halving.size))

    def own_model(self) -> PreTrainedModel:
        """The owner's fine-tuned model: the one it brings, or one made from its training rows: that of an earlier run
        while its recipe is the same, or else one that is made now, and kept by nobody.
        """
        if self.settings.fine_tuned is not None:
            return self._load_fine_tuned(fine_tuned_folder(self.settings.fine_tuned, self._home))
        return self._load_fine_tuned(self._kept_folder) if self.is_kept() else self._train()

    def _load_fine_tuned(self, folder: Path) -> PreTrainedModel:
        return load_fine_tuned(folder, self.own_task, self.load_own_base() if is_adapter(folder) else self.own_outline)

    def model_of_base(self, folder: Path) -> PreTrainedModel:
        """Any model of the agreed base, whole or an adapter. If heads are private, it needs none. Raises ModelError."""
        found = fine_tuned_folder(str(folder.absolute()), self._home)
        if self.task.head == "shared" or is_adapter(found):
            return load_fine_tuned(found, self.task, self.load_base() if is_adapter(found) else self._outline)
        model = load_base(found, self.task, self.agreement.seed)
        if parameter_shapes(model) != parameter_shapes(self._outline):
            raise ModelError(f"model {folder}: is not made like the agreed base", hint=ANOTHER_BASE)
        return model

    def score(self, model: PreTrainedModel, split: Split) -> Score:
        """How `model`, which is made like the base, does on this owner's examples of a split."""
        rows = self.merged_data.validation() if split == "validation" else self.merged_data.test()
        if self.agreement.privacy.epsilon is not None:
            return self._bounded_score(model, self.one_of_each_unit(rows, split))
        labels = self.merged_data.label_set()
        if not self.agreement.evaluation.groups:
            return self.in_batches(lambda size: evaluate(model, rows, size, self.task, labels, self.passes))
        logits = self.in_batches(partial(predict_logits, model, rows, passes=self.passes))
        return self.score_said(logits, rows, split)

    def score_said(self, logits: NDArray[np.float32], rows: Rows, split: Split) -> Score:
        """The score of what a model says of all rows of a split, (predictions, labels), by agreed group too."""
        labels, agreed = self.merged_data.label_set(), self.agreement.evaluation.groups
        score = score_logits(logits, rows, self.task, labels)
        if not agreed:
            return score
        sums = group_sums(right_rows(logits, rows, self.task, labels), self.groups(split), len(agreed))
        return replace(score, groups=tuple(tuple(map(float, each)) for each in sums))

    def groups(self, split: Split) -> NDArray[np.int64]:
        """For each row of a split, the agreed group that it counts in, as far as it is reported (groups.py)."""
        if split not in self._groups:
            evaluation, said = self.agreement.evaluation, self.merged_data.groups(split)
            self._groups[split] = reported_groups(said, evaluation.groups, evaluation.least_group_rows)
        return self._groups[split]

    @cached_property
    def _groups(self) -> dict[Split, NDArray[np.int64]]:
        return {}

    def _bounded_score(self, model: PreTrainedModel, rows: Rows) -> Score:
        """Sums over examples that none moves far. The noise is added when they leave (rounds.py)."""
        sums = self.in_batches(lambda size: bounded_sums(model, rows, size, self.task, self.passes))
        exact = noised_score(self.task, sums, len(rows), noise=0.0)
        return Score(
            correct=None if exact.accuracy is None else round(exact.accuracy * len(rows)),
            rows=len(rows),
            metric=exact.metric,
            pearson_r=exact.pearson_r,
            sums=(tuple(map(float, sums)),),
        )

    def write_whole(self, model: PreTrainedModel, folder: Path) -> None:
        """Write a new Hugging Face folder of a model for this owner alone: a private head stays on its body."""
        task = self.task.model_copy(update={"head": "shared"})
        with needing_room("the model", folder.parent, "make room on this disk, or name a folder on another one"):
            write_model(model, self.base_folder, self.agreement.model_copy(update={"task": task}), folder)

    @property
    def _kept_folder(self) -> Path:
        """Where a run keeps the model that it made."""
        return self._home / self.settings.state / FINE_TUNED

    def is_kept(self) -> bool:
        """Whether the model that was made here is there, of these files and settings."""
        made_from = self._kept_folder / MADE_FROM
        return made_from.is_file() and made_from.read_text() == self._recipe()

    def _train(self) -> PreTrainedModel:
        training = self.settings.training
        assert training is not None  # the settings have one or the other
        log.info("  %s: fine-tuning", self.name)
        model = self.load_own_base()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in self._fixed)
        self._fine_tune(model, training)
        return model

    def _fine_tune(self, model: PreTrainedModel, training: Training) -> None:
        told = f"{self.name}: fine-tuning"
        epsilon, delta = self.agreement.privacy.epsilon, self.agreement.privacy.delta
        if epsilon is not None:  # check: bounded-models-are-trained-with-noise
            self.check_private_training()
            units, rows = self._units, self._trained_on()
            planted = int(units.max(initial=-1)) + 1 + np.arange(len(rows) - len(units))  # each canary is its own
            units = np.concatenate([units, planted])
            beside = spent_beside_training(self.agreement)
            fine_tune_privately(model, rows, units, training, epsilon, delta, self.agreement.seed, told, beside)
            return
        judged_by = None if training.patience is None else self.data.validation()
        self.fine_tune(model, self._trained_on(), training, told, judged_by)

    def fine_tune(
        self, model: PreTrainedModel, rows: Rows, training: Training, description: str, validation: Rows | None
    ) -> None:
        """Train `model` in place, on this owner's device."""
        seed, passes = self.agreement.seed, self.passes
        Halving(1).run(lambda: finetune.fine_tune(model, rows, training, seed, description, validation, passes))

    @cached_property
    def _units(self) -> NDArray[np.int64]:
        """For each training row, the number of what is protected as a whole."""
        return np.arange(len(self.data.train())) if self.agreement.privacy.unit == "row" else self.data.units()

    def one_of_each_unit(self, rows: Rows, split: Literal["train", "validation", "test"]) -> Rows:
        """A split's rows as noise hides them: each in a batch of its own, and of each person only the first, if all
        rows of one are protected together. Without noise, as they are.
        """
        if self.agreement.privacy.epsilon is None:
            return rows
        rows = replace(rows, are_apart=True)  # check: rows-to-judge-are-alone
        if self.agreement.privacy.unit == "row":
            return rows
        units = self._units if split == "train" else self.data.units(split)
        first = np.sort(np.unique(units, return_index=True)[1])
        return rows.take(first)  # check: persons-count-once

    @property
    def _declares(self) -> bool:
        """Whether the agreement says with which privacy this owner trained the model that it brings."""
        return any(each.name == self.name and each.declared is not None for each in self.agreement.owners)

    def check_private_training(self) -> None:
        """Raise SettingsError or DataError unless this owner's model can be trained as `privacy.epsilon` asks."""
        if self.agreement.privacy.unit == "column" and self.settings.data.validation is None:
            raise SettingsError(
                f"{self.name}: no data.validation, so single rows would be set aside, and a person be in both parts",
                hint="name a validation file with the rows of other people",
            )
        if self.settings.own_base is not None:  # check: own-bases-are-not-bounded
            raise SettingsError(
                f"{self.name}: its model has a base of its own (own_base), which is not trained with noise "
                "(privacy.epsilon)",
                hint="leave own_base out, or agree without privacy.epsilon",
            )
        if self.settings.training is None and self._declares:
            return
        if self.settings.training is None:  # check: bounded-models-are-made-here
            raise SettingsError(
                f"{self.name}: brings the model {self.settings.fine_tuned}, and the agreement asks for one that is "
                "trained with noise (privacy.epsilon)",
                hint="give [training] instead of fine_tuned; or, if it was trained with noise, agree on what you "
                "declare of it (owners.declared)",
            )
        if self.settings.training.patience is not None:
            raise SettingsError(
                f"{self.name}: training.patience = {self.settings.training.patience}: with privacy.epsilon, the number "
                "of epochs is fixed before training",
                hint="leave patience out",
            )
        if find_spec("opacus") is None:
            raise SettingsError(
                f"{self.name}: the agreement asks for training with noise, and Opacus is not installed",
                hint="pip install 'amalgram[dp]'",
            )
        units, delta = int(self._units.max(initial=0)) + 1, self.agreement.privacy.delta
        if delta * units >= 1:
            raise DataError(
                f"{self.name}: privacy.delta = {delta:g} is no less than 1 in {units}, the number of its units, so one "
                "of them could be shown whole",
                hint="agree on a smaller privacy.delta",
            )

    def _trained_on(self) -> Rows:
        rows, planted = self.data.train(), self.canaries()
        return rows if planted is None else pool([rows, planted])

    def canaries(self) -> Rows | None:
        """The random rows that are planted in this owner's training; None without a line that says so."""
        training = self.settings.training
        if training is None or training.canaries == 0:
            return None
        return canaries_of(self.name, self.agreement.seed, training.canaries, self.data.train(), self.task)

    def _recipe(self) -> str:
        """Everything a fine-tuned model depends on: while it is the same, the model need not be made again."""
        parts: dict[str, object] = {
            "agreement": self.agreement.digest(),
            "labels": self.task.labels,
            "training": self.settings.training and self.settings.training.model_dump(),
            "data": self.settings.data.model_dump(mode="json"),
            "files": self.data.digest(),
        }
        if self.settings.own_base is not None:
            parts["own_base"] = [digest_of_file(path) for path in weight_files(self.own_base_folder)]
        if self.agreement.privacy.unit == "column" and self.agreement.privacy.epsilon is not None:
            parts["units"] = hashlib.sha256(self._units.tobytes()).hexdigest()  # of a table of images, too
        return json.dumps(parts, sort_keys=True)

    @cached_property
    def _fixed(self) -> tuple[str, ...]:
        """The parameters that the agreement leaves as in the base. A private head is the owner's own."""
        if self.settings.own_base is not None:
            return ()
        head = private_head(self._outline, self.task)
        return tuple(name for name in self.plan.left_alone if name not in head)


def give_head(own: PreTrainedModel, model: PreTrainedModel, task: Task) -> None:
    """If heads are private, the owner's own head stands on every body."""
    names = private_head(own, task)
    copy_parameters(names, {name: own.get_parameter(name).detach() for name in names}, model)


# --- what an agreement makes of a base: kept, since many owners of a simulation ask, for every message anew ---


@dataclass(frozen=True)
class Terms:
    """An agreement, known by its digest."""

    digest: str
    agreement: Agreement = field(compare=False)


@lru_cache(maxsize=16)
def _plan(terms: Terms, outline: PreTrainedModel, folder: Path) -> MergePlan:
    return agreed_plan(outline, folder, terms.agreement)
