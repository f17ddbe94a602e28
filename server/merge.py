"""Runs an agreement's methods over its rounds, and writes the merged model and the report.

`MergeRun` walks through the schedule (common/schedule.py): before each delivery it merges what is sent, and after each
round it takes in the total. When the last is over it writes what is published, and the owners sign exactly that.
"""

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from common import metrics, scaling
from common.agreement import WORST_GROUP, Agreement, load_agreement
from common.certificates import deliveries_digest
from common.device import find_solver
from common.errors import FalseTotal, LocalProtocolError, NumericalError, SettingsError
from common.mapped import releasing
from common.merge_methods import METHODS, contribution_layout
from common.merge_methods.distill import DISTILL, Distill
from common.merge_methods.method import MultiRoundMethod, SingleRoundMethod, Step
from common.merge_methods.search import SEARCH, Mixture, groups_of, next_mixtures
from common.merge_methods.terms import Hyperparameters, MergedDelta, MergeSettings
from common.metrics import MeanScore, Split
from common.models.delta import APPLIED, MixedDelta, VectorDelta, add_delta, published_delta
from common.models.folders import base_model_folder
from common.models.loading import agreed_plan, check_base, load_base
from common.models.low_rank import AdapterDelta, cut
from common.models.plan import MergePlan
from common.models.published_folder import published_folder, write_adapter, write_model
from common.pool import pool_path, read_pool
from common.publication import CARD, RECEIPTS, Publication, SignedMean
from common.scaling import RescaledTotal, Scales
from common.schedule import Delivery, Round, Schedule, schedule_of
from common.settings_file import load_settings
from common.summation.protocol import Total
from common.summation.totals import SummedTensors
from common.tensor_layout import TensorLayout
from common.verification import Sent, corrections, projection_seed
from server.bounds import check_classifier, check_contributions
from server.checkpoint import Checkpoint
from server.coordinator import Coordinator
from server.exchange import Channel
from server.output_folder import CHECKPOINT, claim_output, remove_result
from server.report.card import write_model_card
from server.report.outcome import MethodChoice, Outcome, Tried, at_the_end, make_report
from server.report.report import Report, holds_result_of, save_report
from server.run_record import opened_rounds, sent_deliveries, step_costs
from server.settings import CoordinatorSettings, read_coordinator_identity
from server.student import STUDENT, Student

log = logging.getLogger("amalgram.coordinator")


def run_merge(settings_path: Path, channel: Channel) -> None:
    """Run one agreement from the roll call to the published model. If it raises, no result was written."""
    prepare(settings_path, channel).run()


def prepare(settings_path: Path, channel: Channel) -> "MergeRun":
    """Everything that a run needs before its first message. Raises an AmalgramError."""
    home = settings_path.resolve().parent
    settings = load_settings(settings_path, CoordinatorSettings)
    output = home / settings.output
    agreement = load_agreement(home / settings.agreement)
    identity = read_coordinator_identity(home / settings.identity, agreement)
    device = find_solver(settings.device, str(settings_path))
    base_folder = base_model_folder(settings.base, home, agreement, home / settings.agreement)
    plan = agreed_plan(_agreed_base(base_folder, agreement), base_folder, agreement)
    pool = None
    if DISTILL.name in agreement.methods:
        table = DISTILL.of(agreement.tables)
        pool = pool_path(settings.pool, home, table, home / settings.agreement)
        read_pool(pool, table, agreement.task.kind)  # raises, before an owner is asked anything
    claim_output(output)
    _check_results(output, agreement)
    schedule = schedule_of(agreement, plan)
    coordinator = Coordinator(
        channel=channel,
        agreement=agreement,
        identity=identity,
        checkpoint=Checkpoint.open(output / CHECKPOINT, agreement.digest()),
        schedule=schedule,
    )
    return MergeRun(
        agreement=agreement,
        plan=plan,
        schedule=schedule,
        coordinator=coordinator,
        base_folder=base_folder,
        output=output,
        pool=pool,
        device=str(device),
    )


@dataclass(kw_only=True)
class MergeRun:
    """One run of an agreement at the coordinator."""

    agreement: Agreement
    plan: MergePlan
    schedule: Schedule
    coordinator: Coordinator
    base_folder: Path
    output: Path
    pool: Path | None = None  # on which a student is trained
    device: str = "cpu"  # on which it solves, and trains
    _settings: MergeSettings = field(init=False)
    _measured: Total = field(init=False)  # what the scales of a 32-bit sum are chosen from
    _scales: Scales = field(init=False)
    _contributions: SummedTensors = field(init=False)
    _owners: tuple[str, ...] = ()  # those in `_contributions`
    _examples: int | None = None
    _sent: dict[int, Sent] = field(default_factory=dict)  # by position of a delivery, until it is verified
    _so_far: dict[str, MergedDelta] = field(default_factory=dict)  # what the steps of a multi-round method have merged
    # After the last step, by hyperparameter:
    _final: dict[str, dict[float | None, MergedDelta]] = field(default_factory=dict)
    _validated: dict[str, MeanScore] = field(default_factory=dict)  # by candidate
    _mixtures: dict[str, Mixture] = field(default_factory=dict)  # that a search tried, by candidate
    _choices: dict[str, MethodChoice] = field(default_factory=dict)
    _merged: dict[str, MergedDelta] = field(default_factory=dict)  # by method, as the owners test it
    _scores: Mapping[str, MeanScore] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._settings = replace(
            self.agreement.merge_settings(self.plan), device=self.device, scratch=self.coordinator.checkpoint.folder
        )

    def run(self) -> None:
        """Roll call, the whole schedule, result. Raises an AmalgramError, and then publishes nothing."""
        try:
            self.coordinator.roll_call()
            for event in self.schedule.events:
                self._handle(event)
            self._publish()
        except FalseTotal:  # check: false-total-keeps-the-checkpoint
            raise  # its masked sum is saved: if this machine computed it wrongly, the same command computes it again
        except NumericalError:  # the same totals would fail again; after any other error the same command resumes
            self.coordinator.checkpoint.remove()
            self.coordinator.finish()
            raise
        self.coordinator.checkpoint.remove()

    def _handle(self, event: Round | Delivery) -> None:
        match event:
            case Round(kind="scales"):
                self._measured = self.coordinator.sum(event)
            case Delivery(kind="scales"):
                self._send_scales(event)
            case Round(kind="contribution"):
                self._sum_contributions(event)
            case Delivery(kind="merged_step", method=str(method)):
                self._send_merged_step(event, method)
            case Round(kind="step", method=str(method), step=Step() as step):
                self._sum_step(event, method, step)
            case Delivery(kind="candidate", split="validation", method=str(method)):
                self._send_candidate(event, method)
            case Delivery(kind="correction"):
                self._send_corrections(event)
            case Round(kind="check"):
                self.coordinator.check(event)
            case Round(kind="metrics", split="validation"):
                self._choose(event)
            case Delivery(kind="candidate", split="test", method=str(method)):
                self._send_chosen(event, method)
            case Delivery(kind="mixture", split="validation"):
                self._send_mixture(event)
            case Delivery(kind="mixture", split="test"):
                self._send_best_mixture(event)
            case Round(kind="metrics", split="test"):
                self._destroy_contributions()
                self._scores = self._sum_metrics(event, "test")
            case _:
                raise LocalProtocolError(f"merge: the schedule has an unknown event, {event.name}")

    # --- contributions ---

    def _send_scales(self, delivery: Delivery) -> None:
        layout = contribution_layout(self.agreement.methods, self._settings)
        self._scales = Scales(layout, scaling.choose(layout, self._measured))
        self.coordinator.deliver(delivery, self._scales.exponents)

    def _sum_contributions(self, round: Round) -> None:
        total = self.coordinator.sum(round)
        self._contributions = total
        if self.agreement.summation.has_scales:
            self._contributions = RescaledTotal(scaled=total, measured=self._measured, scales=self._scales)
        self._owners = total.owners
        self._examples = _examples_in(self._contributions, self.agreement)
        check_contributions(self._contributions, round.layout, self._settings)
        if self.agreement.is_verified:
            reason = "its contribution is not in the sum, so it can verify no merge"
            self.coordinator.leave_out_absent(total.owners, reason)

    def _destroy_contributions(self) -> None:
        for each in self.schedule.rounds:
            if each.kind in ("scales", "contribution"):
                self.coordinator.destroy(each, self._contributions)
        del self._contributions
        self._so_far.clear()
        self._final.clear()

    # --- verification ---

    def _keep_sent(self, delivery: Delivery, vector: NDArray[np.float32], merged: MergedDelta) -> None:
        """Keep a model as it is sent, and what rounding took from it, until it is verified."""
        if not self.agreement.is_verified:
            return
        unsolved = [note for note in merged.layers if note.status != "solved"]
        if unsolved:
            raise NumericalError(
                f"merge: the sums for {unsolved[0].name} do not define its weights ({unsolved[0].status}), so no owner "
                "could verify them. Nothing was published",
                hint="agree on a larger ridge",
            )
        if not self.schedule.is_checked(delivery):
            return
        delta = VectorDelta(self.plan, (delivery.layout, vector))
        self._sent[delivery.position] = Sent(delta=delta, rest=merged.rest, factor=merged.factor)

    def _send_corrections(self, delivery: Delivery) -> None:
        nonces = self.coordinator.draw(delivery)
        seed = projection_seed(deliveries_digest(self.coordinator.delivered), nonces)
        vector = np.empty(delivery.layout.size, dtype=np.float32)
        delivery.layout.flatten(
            (each for claim in delivery.claims for each in corrections(claim, seed, self._sent.pop(claim.delivery))),
            vector,
        )
        self.coordinator.deliver(delivery, vector, nonces=nonces)

    # --- multi-round methods ---

    def _send_merged_step(self, delivery: Delivery, name: str) -> None:
        if delivery.step == 0:
            start = _multi_round(name).start
            self._so_far[name] = self._solved(lambda settings: start(settings, self._contributions))
        vector = self._vector_of(delivery.layout, self._so_far[name].delta)
        self._keep_sent(delivery, vector, self._so_far[name])
        self.coordinator.deliver(delivery, vector)

    def _sum_step(self, round: Round, name: str, step: Step) -> None:
        method, so_far, total = _multi_round(name), self._so_far[name], self.coordinator.sum(round)
        check_contributions(total, round.layout, self._settings)

        def solve(value: float | None) -> MergedDelta:
            return so_far.followed_by(self._solved(lambda settings: method.solve_step(settings, step, total, value)))

        if "head_rows" in total:
            check_classifier(total, round.layout, float(self._contributions["weight"][0]), self.plan)
        if round == self.schedule.steps(name)[-1]:
            self._final[name] = {value: solve(value) for value in self.agreement.agreed(method).values()}
        else:
            self._so_far[name] = solve(None)
        self.coordinator.destroy(round, total)

    # --- choosing on validation examples ---

    def _send_candidate(self, delivery: Delivery, name: str) -> None:
        (candidate,) = delivery.names
        self._send(delivery, candidate, self._solve(name, self._candidates(name)[candidate]))

    def _choose(self, round: Round) -> None:
        """Per method whose candidates all have a metric, choose the one with the best; the first of equals."""
        self._validated.update(self._sum_metrics(round, "validation"))
        for name in self.agreement.methods:
            sweep = {
                candidate: Tried(hyperparameter=value, score=self._validated[candidate])
                for candidate, value in self._candidates(name).items()
                if candidate in self._validated and value is not None
            }
            if sweep and len(sweep) == len(self._candidates(name)):
                self._check_groups_are_judged(sweep[min(sweep)].score)
                best = max(sweep, key=self._validation_metric)
                chosen = sweep[best].hyperparameter
                self._choices[name] = MethodChoice(candidate=best, hyperparameter=chosen, sweep=sweep)

    def _check_groups_are_judged(self, score: MeanScore) -> None:
        if self.agreement.choose_by == WORST_GROUP and not any(rows for _, rows, _ in score.groups):
            least = self.agreement.evaluation.least_group_rows
            raise NumericalError(
                f"evaluation.choose_by = 'worst_group': no owner has {least} validation rows of any agreed group",
                hint="owners name their column (data.group); agree on the values that it has, or choose by accuracy",
            )

    def _validation_metric(self, candidate: str) -> float:
        """The number that decides, as all parties sign it; more is better."""
        return SignedMean.of(self._validated[candidate]).chosen_by(self.agreement.choose_by)

    # --- a search ---

    def _send_mixture(self, delivery: Delivery) -> None:
        (name,) = delivery.names
        if name not in self._mixtures:
            scored = [(mixture, self._validation_metric(each)) for each, mixture in self._mixtures.items()]
            names = list(self._candidates(SEARCH.name))[len(scored) :]
            table, seed = SEARCH.hyperparameters(self._settings), self.agreement.seed
            generation = next_mixtures(scored, len(groups_of(self.plan, table)), table, seed)
            self._mixtures |= dict(zip(names, generation, strict=False))
        self._deliver_mixture(delivery, name)

    def _send_best_mixture(self, delivery: Delivery) -> None:
        best, table = self._choice_of(SEARCH.name).candidate, SEARCH.hyperparameters(self._settings)
        self._deliver_mixture(delivery, best)
        basis = [self._merged[name] for name in table.basis]
        mixed = MixedDelta.of([each.delta for each in basis], groups_of(self.plan, table), self._mixtures[best])
        self._merged[SEARCH.name] = MergedDelta(delta=mixed, layers=basis[0].layers)

    def _deliver_mixture(self, delivery: Delivery, name: str) -> None:
        self.coordinator.deliver(delivery, np.array(self._mixtures[name], dtype="<f4"), name)

    def _choice_of(self, name: str) -> MethodChoice:
        if name not in self._choices:
            ((candidate, hyperparameter),) = self._candidates(name).items()
            self._choices[name] = MethodChoice(candidate=candidate, hyperparameter=hyperparameter, sweep={})
        return self._choices[name]

    # --- testing ---

    def _send_chosen(self, delivery: Delivery, name: str) -> None:
        choice, is_published = self._choice_of(name), name == self.agreement.method
        self._merged[name] = self._send(
            delivery, choice.candidate, self._solve(name, choice.hyperparameter, with_spectra=is_published)
        )

    # --- publishing ---

    def _publish(self) -> None:
        """Write the model, let the owners sign it, and only then give it its name: whole or not at all."""
        unfinished, method = self.output / "model.partial", self.agreement.method
        report = self._write_model(unfinished)
        publication = self._publication(unfinished).canonical_bytes()
        candidate, digest = self._choice_of(method).candidate, report.digests.model
        receipts = self.coordinator.confirm_result(candidate, digest, publication)
        (unfinished / RECEIPTS).write_bytes(receipts.content())
        remove_result(self.output)  # another agreement's, which stands until there is this one
        unfinished.replace(self.output / "model")
        save_report(at_the_end(report, self._outcome()), self.output)

    def _write_model(self, folder: Path) -> Report:
        """Write a Hugging Face folder of the merged model, or of its adapter, with its card."""
        shutil.rmtree(folder, ignore_errors=True)
        model = _agreed_base(self.base_folder, self.agreement)
        delta = self._merged[self.agreement.method].delta
        add_delta(model, delta)
        if isinstance(delta, AdapterDelta):
            write_adapter(model, delta, self.base_folder, self.agreement, folder)
        else:
            write_model(model, self.base_folder, self.agreement, folder)
        report = make_report(self._outcome(), model)
        write_model_card(report, self.base_folder, folder)
        for weights in folder.glob("*.safetensors"):
            weights.chmod((folder / CARD).stat().st_mode)  # published, so as readable as the rest
        return report

    def _publication(self, folder: Path) -> Publication:
        """What the owners sign: the files, and the metrics of the report."""
        published = published_folder(folder)
        sweeps = [choice.sweep for choice in self._choices.values()]
        return Publication(
            files=published.files,
            configuration=published.configuration,
            owners=self._owners,
            examples=self._examples,
            test={model: SignedMean.of(score) for model, score in self._scores.items()},
            validation={name: SignedMean.of(tried.score) for sweep in sweeps for name, tried in sweep.items()},
            mixtures=self._mixtures,
        )

    def _outcome(self) -> Outcome:
        coordinator = self.coordinator
        return Outcome(
            agreement=self.agreement,
            plan=self.plan,
            choices={name: self._choice_of(name) for name in self.agreement.methods},
            merged=self._merged,
            owners=self._owners,
            examples=self._examples,
            mixtures=self._mixtures,
            test=self._scores,
            rounds=opened_rounds(coordinator),
            sent=sent_deliveries(self.schedule, coordinator.checkpoint.deliveries),
            steps=step_costs(coordinator.steps),
            dropped_out=coordinator.dropped_out,
            excluded=coordinator.excluded,
            receipts=coordinator.receipts,
            seconds=coordinator.checkpoint.seconds,
        )

    # --- what the parts share ---

    def _candidates(self, name: str) -> dict[str, float | None]:
        return self.agreement.agreed(METHODS[name])

    def _solve(self, name: str, hyperparameter: float | None, *, with_spectra: bool = False) -> MergedDelta:
        """A method's merged delta, with the adapter to which it is cut if one is published."""
        method, adapter = METHODS[name], self.plan.adapter

        def solve(settings: MergeSettings) -> MergedDelta:
            if isinstance(method, Distill):
                merged = self._student.after(hyperparameter, settings, self._contributions)
            elif isinstance(method, SingleRoundMethod):
                merged = method.solve(settings, self._contributions, hyperparameter, with_spectra=with_spectra)
            else:
                merged = self._final[name][hyperparameter]
            if adapter is None:
                return merged
            return replace(merged, low_rank=cut(merged.published, adapter, settings.device))

        return self._solved(solve)

    @property
    def _student(self) -> Student:
        return Student(
            agreement=self.agreement,
            base_folder=self.base_folder,
            pool=self.pool,
            folder=self.coordinator.checkpoint.folder / STUDENT,
        )

    def _solved(self, solve: Callable[[MergeSettings], MergedDelta]) -> MergedDelta:
        """What `solve` returns on the coordinator's device; on the CPU, from now on, if that has no memory for it."""
        try:
            return solve(self._settings)
        except torch.OutOfMemoryError:
            log.warning("%s is out of memory: what remains is solved on the CPU", self._settings.device)
        self._settings = replace(self._settings, device="cpu")
        return solve(self._settings)

    def _send(self, delivery: Delivery, candidate: str, merged: MergedDelta) -> MergedDelta:
        """Send a candidate; return it as it would be published, with the vector that is sent as its only copy, already
        while it is sent: nobody else may hold `merged`.
        """
        factors = {} if merged.low_rank is None else merged.low_rank.tensors()
        applied = {APPLIED + name: tensor for name, tensor in merged.applied.items()}
        vector = self._vector_of(delivery.layout, {**merged.delta, **merged.beside, **applied, **factors})
        del applied
        self._keep_sent(delivery, vector, merged)
        delta = published_delta(self.plan, delivery.layout, vector)
        merged = replace(merged, delta=delta, beside={}, applied={}, rest={})
        self.coordinator.deliver(delivery, vector, candidate)
        return merged

    def _vector_of(self, layout: TensorLayout, delta: Mapping[str, Tensor]) -> NDArray[np.float32]:
        """A merged delta as it travels, (layout.size,); a large one lies on the disk."""
        words = self.coordinator.checkpoint.zeros((layout.size + 1) // 2)
        vector = words.view("<f4")[: layout.size]
        tensors = ((entry.name, delta[entry.name].numpy()) for entry in layout.entries)
        layout.flatten(releasing(tensors, vector), vector)
        return vector

    def _sum_metrics(self, round: Round, split: Split) -> dict[str, MeanScore]:
        total = self.coordinator.sum(round)
        return metrics.read_total(self.agreement, split, round.models, total.vector)


def _multi_round(name: str) -> MultiRoundMethod[Hyperparameters]:
    method = METHODS[name]
    assert isinstance(method, MultiRoundMethod)  # the schedule has steps only for these
    return method


def _examples_in(total: SummedTensors, agreement: Agreement) -> int | None:
    """All owners' training examples, if a method has them summed, and over all owners."""
    return round(total["examples"][0]) if "examples" in total and not agreement.without_weights else None


# --- files ---


def _check_results(output: Path, agreement: Agreement) -> None:
    """Raise SettingsError if this agreement's results are there. Another's stay until this one's replace them."""
    if holds_result_of(output, agreement.digest()):
        raise SettingsError(
            f"{output}: already holds the result of this agreement, and owners contribute to an agreement only once",
            hint="a new run needs a new agreement",
        )
    if (output / "report.json").exists():
        log.info("%s holds the result of another agreement, which stays until there is a new one", output)
    (output / "failure.json").unlink(missing_ok=True)


def _agreed_base(folder: Path, agreement: Agreement) -> PreTrainedModel:
    base = load_base(folder, agreement.task, agreement.seed)
    check_base(base, agreement, folder)
    return base
