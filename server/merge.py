"""Runs the agreed methods over sums and writes the merged model.

sum of contributions -> for methods of several steps, a sum and a solve for each -> solve every candidate ->
owners evaluate the candidates of a sweep -> sum of validation figures -> choose -> owners evaluate the chosen and sign
the result -> sum of test figures -> model folder and report
"""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from common import metrics, scaling
from common.agreement import COORDINATOR, SEQUENTIAL, Agreement
from common.errors import NumericalError, SettingsError
from common.identity import Identity, read_identity
from common.mapped import releasing
from common.merge_methods import (
    candidates,
    contribution_layout,
    merged_layout,
    solve,
    solve_step,
    start,
    step_layout,
    step_statistic,
    steps,
)
from common.merge_methods.terms import Solution
from common.metrics import MeanScore
from common.models.delta import VectorDelta, add_delta, delta_layout
from common.models.folders import base_model_folder, load_tokenizer
from common.models.loading import check_base, digest_of, load_base, weights_made_here
from common.models.low_rank import AdapterPlan, LowRank, adapter_plan, cut
from common.models.loading import private_head
from common.models.plan import MergePlan, merge_plan
from common.scaling import SCALES, RescaledTotal, Scales
from common.settings_file import load_settings
from common.summation.protocol import Total
from common.tensor_layout import TensorLayout
from server import checkpoint as kept
from server.adapter_folder import write_adapter
from server.checkpoint import Checkpoint
from server.coordinator import Channel, Coordinator, OpenedSum
from server.report.card import write_model_card
from server.report.outcome import MethodChoice, OpenedRound, Outcome, Tried, make_report
from server.report.report import (
    OwnerCost,
    Report,
    Sent,
    SentCandidate,
    SentMergedStep,
    SentScales,
    Step,
    agreement_of_report,
    save_report,
)
from server.report.words import described
from server.settings import CoordinatorSettings

ALWAYS_EVALUATED = ("base", "own_at_home")
CHECKPOINT = "checkpoint"


class SolutionOf(Protocol):
    """A method's merged delta for a value of its knob; the spectra of its Grams are for the report."""

    def __call__(self, knob: float | None, with_spectra: bool) -> Solution: ...


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What the rounds gave: by method the choice and its merged delta, over `owners`; `test` by candidate."""

    choices: dict[str, MethodChoice]
    solutions: dict[str, Solution]
    owners: tuple[str, ...]
    examples: int | None
    test: dict[str, MeanScore]


def run_merge(settings_path: Path, channel: Channel) -> None:
    """The whole run of one agreement. Raises an AmalgramError; then no result was written."""
    home = settings_path.resolve().parent
    settings = load_settings(settings_path, CoordinatorSettings)
    output = home / settings.output
    agreement = load_settings(home / settings.agreement, Agreement)
    identity = _read_identity(home / settings.identity, agreement)
    base_folder = base_model_folder(settings.base, home, agreement, home / settings.agreement)
    plan, adapter = _plans(base_folder, agreement)
    claim_output(output)
    _clear_results(output, agreement)

    checkpoint = Checkpoint.open(output / CHECKPOINT, agreement.digest())
    coordinator = Coordinator(
        channel=channel,
        agreement=agreement,
        identity=identity,
        checkpoint=checkpoint,
        num_steps=count_steps(agreement, plan),
    )
    try:
        coordinator.roll_call()
        merged = _merge(coordinator, base_folder, plan, adapter)
        coordinator.confirm_result()
        published = merged.solutions[agreement.method]
        model = _published(base_folder, agreement, published)
        report = make_report(outcome_of(coordinator, plan, merged), model)
        _write_model(model, published.low_rank, base_folder, agreement, report, output / "model")
        save_report(report, output)
    except NumericalError:  # the same totals would end alike; after any other error the same command goes on
        checkpoint.remove()
        coordinator.finish()
        raise
    checkpoint.remove()


def count_steps(agreement: Agreement, plan: MergePlan) -> int:
    """How many steps a run has: the roll call, every sum, the result."""
    swept = any(len(candidates(agreement, method)) > 1 for method in agreement.methods)
    merged = sum(len(steps(plan, method)) for method in agreement.methods if method in SEQUENTIAL)
    sums = agreement.summation.has_scales + 2 + merged + swept  # 2: of contributions and of test figures
    return 1 + sums + 1


def _agreed_base(folder: Path, agreement: Agreement) -> PreTrainedModel:
    base = load_base(folder, agreement.task, agreement.seed)
    check_base(base, agreement, folder)
    return base


def _published(base_folder: Path, agreement: Agreement, solution: Solution) -> PreTrainedModel:
    """The merged model. Made anew for its digest and for its files: while owners test it, nobody holds it."""
    model = _agreed_base(base_folder, agreement)
    add_delta(model, solution.delta)
    return model


def _plans(base_folder: Path, agreement: Agreement) -> tuple[MergePlan, AdapterPlan | None]:
    """What is merged, and what the published adapter can hold; None where a whole model is published. The base itself
    is of no use until there is something to add to it.
    """
    base = _agreed_base(base_folder, agreement)
    plan, rank = merge_plan(base, agreement.tensors), agreement.publish.adapter_rank
    if rank is None:
        return plan, None
    return plan, adapter_plan(base, weights_made_here(base_folder, agreement.task), rank)


def _merge(coordinator: Coordinator, base_folder: Path, plan: MergePlan, adapter: AdapterPlan | None) -> Merged:
    """All sums, and the result, which goes to the owners with the last of them."""
    agreement = coordinator.agreement
    total = _sum_contributions(coordinator, contribution_layout(agreement, plan))
    solutions_of: dict[str, SolutionOf] = {
        method: _solve_step_by_step(coordinator, plan, method, total)
        if method in SEQUENTIAL
        else partial(solve, agreement, plan, method, total)
        for method in agreement.methods
    }
    if adapter is not None:
        solutions_of = {method: _cut_to(adapter, solution_of) for method, solution_of in solutions_of.items()}
    choices = _choose(coordinator, plan, solutions_of)
    solutions = {}
    for method, choice in choices.items():
        with_spectra = method == agreement.method
        solutions[method] = _send(
            coordinator, plan, choice.candidate, "test", solutions_of[method](choice.hyperparameter, with_spectra)
        )
    digest = digest_of(_published(base_folder, agreement, solutions[agreement.method]), agreement.task)
    coordinator.send_result(choices[agreement.method].candidate, digest)
    owners, examples = total.owners, _examples(total)
    for statistic in (SCALES, "contribution"):
        coordinator.destroy(statistic, total)
    models = (*ALWAYS_EVALUATED, *(choice.candidate for choice in choices.values()))
    return Merged(
        choices=choices,
        solutions=solutions,
        owners=owners,
        examples=examples,
        test=_figures(coordinator, "test", models),
    )


def _sum_contributions(coordinator: Coordinator, layout: TensorLayout) -> Total:
    """In one sum, or in two where numbers are to travel in 32 bits: the second on scales that the first one gives."""
    if not coordinator.agreement.summation.has_scales:
        return coordinator.sum("contribution", layout)
    measured = coordinator.sum(SCALES, scaling.measures_layout(layout))
    scales = Scales(layout, scaling.choose(layout, measured))
    coordinator.send_candidate(SCALES, SCALES, scaling.exponents_layout(layout), scales.exponents)
    scaled = coordinator.sum("contribution", scaling.scaled_layout(layout))
    return RescaledTotal.of(scaled, measured, scales)


def _solve_step_by_step(coordinator: Coordinator, plan: MergePlan, method: str, total: Total) -> SolutionOf:
    """Step after step, each a sum of its own; what one gives goes to the owners, who measure the next one with it."""
    agreement = coordinator.agreement
    merged = start(agreement, plan, method, total)
    *before, last = steps(plan, method)
    _send_merged(coordinator, plan, method, 0, merged)
    for step in before:
        step_total = coordinator.sum(step_statistic(method, step), step_layout(agreement, plan, method, step))
        merged = merged.followed_by(solve_step(agreement, plan, method, step, step_total, None))
        coordinator.destroy(step_statistic(method, step), step_total)
        _send_merged(coordinator, plan, method, step.number, merged)
    last_total = coordinator.sum(step_statistic(method, last), step_layout(agreement, plan, method, last))
    solutions = {
        knob: merged.followed_by(solve_step(agreement, plan, method, last, last_total, knob))
        for knob in candidates(agreement, method).values()
    }
    coordinator.destroy(step_statistic(method, last), last_total)
    return lambda knob, with_spectra: solutions[knob]


def _send_merged(coordinator: Coordinator, plan: MergePlan, method: str, number: int, merged: Solution) -> None:
    layout = merged_layout(plan, method, number)
    coordinator.send_candidate(f"{method} {number}", "prefix", layout, _vector(coordinator, layout, merged))


def _examples(total: Total) -> int | None:
    """All owners' training rows, where a method has them summed."""
    return round(total["examples"][0]) if "examples" in total else None


def _read_identity(path: Path, agreement: Agreement) -> Identity:
    identity = read_identity(path)
    if identity.name != COORDINATOR or identity.public_key.hex() != agreement.coordinator.public_key:
        raise SettingsError(f"{path}: is not the identity that the agreement names for the coordinator")
    return identity


def claim_output(output: Path) -> None:
    """Make `output` a folder of ours. Raises SettingsError rather than touch a folder that holds something else."""
    marker = output / ".amalgram"
    if output.exists() and not marker.is_file() and (not output.is_dir() or any(output.iterdir())):
        raise SettingsError(f"{output}: is there already and is no output of amalgram; name a new folder")
    output.mkdir(parents=True, exist_ok=True)
    marker.touch()


def _clear_results(output: Path, agreement: Agreement) -> None:
    """Remove another agreement's results, so that what is there afterwards is this one's. Raises SettingsError if this
    one's are there.
    """
    if agreement_of_report(output) == agreement.digest() and not (output / CHECKPOINT).exists():
        raise SettingsError(
            f"{output}: holds the result of this agreement already, and what owners gave for it they give once; "
            "a new run needs a new agreement"
        )
    shutil.rmtree(output / "model", ignore_errors=True)
    for name in ("report.json", "report.html", "failure.json"):
        (output / name).unlink(missing_ok=True)


def _cut_to(adapter: AdapterPlan, solution_of: SolutionOf) -> SolutionOf:
    """Solutions as they would be published: cut to the adapter's rank before any owner tests them."""

    def cut_solution_of(knob: float | None, with_spectra: bool) -> Solution:
        solution = solution_of(knob, with_spectra)
        low_rank = cut(solution.delta, adapter)
        return replace(solution, delta=low_rank.delta, low_rank=low_rank)

    return cut_solution_of


def _choose(
    coordinator: Coordinator, plan: MergePlan, solutions_of: Mapping[str, SolutionOf]
) -> dict[str, MethodChoice]:
    """Per method, the candidate with the best summed metric on validation rows; the first of equals."""
    agreement = coordinator.agreement
    tried = {method: candidates(agreement, method) for method in agreement.methods}
    swept = [name for names in tried.values() if len(names) > 1 for name in names]
    for method, names in tried.items():
        if len(names) > 1:
            for name, knob in names.items():
                _send(coordinator, plan, name, "validation", solutions_of[method](knob, with_spectra=False))
    figures = _figures(coordinator, "validation", tuple(swept)) if swept else {}
    choices: dict[str, MethodChoice] = {}
    for method, names in tried.items():
        sweep = {
            name: Tried(hyperparameter=knob, score=figures[name])
            for name, knob in names.items()
            if name in figures and knob is not None
        }
        chosen = max(sweep, key=lambda name: figures[name].chosen_by(agreement.evaluation.choose_by), default=None)
        name = chosen or next(iter(names))
        choices[method] = MethodChoice(candidate=name, hyperparameter=names[name], sweep=sweep)
    return choices


def _send(coordinator: Coordinator, plan: MergePlan, model: str, split: str, solution: Solution) -> Solution:
    """Send a solution; it is returned with the vector that was sent as its only copy."""
    layout = delta_layout(plan)
    vector = _vector(coordinator, layout, solution)
    sent = VectorDelta(plan, (layout, vector))
    low_rank = solution.low_rank and replace(solution.low_rank, delta=sent)
    solution = replace(solution, delta=sent, low_rank=low_rank)
    coordinator.send_candidate(model, split, layout, vector)
    return solution


def _vector(coordinator: Coordinator, layout: TensorLayout, solution: Solution) -> NDArray[np.float32]:
    """(layout.size,): a solution as it travels, on the disk where it is large."""
    words = coordinator.checkpoint.zeros((layout.size + 1) // 2)
    vector = words.view("<f4")[: layout.size]
    tensors = ((entry.name, solution.delta[entry.name].numpy()) for entry in layout.entries)
    layout.flatten(releasing(tensors, vector), vector)
    return vector


def _figures(coordinator: Coordinator, split: str, models: tuple[str, ...]) -> dict[str, MeanScore]:
    layout = metrics.metrics_layout(coordinator.agreement, split, models)
    total = coordinator.sum(split, layout, models)
    return metrics.read_total(coordinator.agreement, split, models, total.vector)


def _write_model(
    model: PreTrainedModel,
    low_rank: LowRank | None,
    base_folder: Path,
    agreement: Agreement,
    report: Report,
    folder: Path,
) -> None:
    """A Hugging Face folder of the model, or of its adapter, with its card: whole or not at all."""
    unfinished = folder.with_name("model.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    if low_rank is not None:
        write_adapter(model, low_rank, agreement, unfinished)
    elif private_head(model, agreement.task):
        model.base_model.save_pretrained(unfinished)
    else:
        model.save_pretrained(unfinished)
    if agreement.task.is_text:
        load_tokenizer(base_folder).save_pretrained(unfinished)
    write_model_card(report, base_folder, unfinished)
    for weights in unfinished.glob("*.safetensors"):
        weights.chmod(next(unfinished.glob("*config.json")).stat().st_mode)  # it is there to be read
    unfinished.replace(folder)


# --- what the report needs, from the coordinator's own records ---

ROUND_TITLES = {
    SCALES: "scales",
    "contribution": "contributions",
    "validation": "validation metrics",
    "test": "test metrics",
}
PHASES = {"validation": "candidates to validate", "test": "candidates to test", "prefix": "merged layers"}


def outcome_of(coordinator: Coordinator, plan: MergePlan, merged: Merged) -> Outcome:
    """Everything that the report is made of."""
    method_of = {choice.candidate: method for method, choice in merged.choices.items()}
    tried = {
        name: method for method in coordinator.agreement.methods for name in candidates(coordinator.agreement, method)
    }
    return Outcome(
        agreement=coordinator.agreement,
        plan=plan,
        choices=merged.choices,
        merged=merged.solutions,
        owners=merged.owners,
        examples=merged.examples,
        test={method_of.get(name, name): score for name, score in merged.test.items()},
        rounds=tuple(map(_opened_round, coordinator.sums)),
        sent=tuple(_sent(each, tried) for each in coordinator.checkpoint.candidates),
        steps=tuple(map(_step, coordinator.steps)),
        dropped_out=coordinator.lost,
        receipts=coordinator.receipts,
        seconds=coordinator.checkpoint.seconds,
    )


def _opened_round(opened: OpenedSum) -> OpenedRound:
    opened_as = partial(
        OpenedRound,
        title=_title(opened.statistic),
        layout=opened.layout,
        owners=opened.owners,
        destroyed=opened.destroyed,
    )
    match opened.statistic.split():
        case ["scales" | "contribution" as kind]:
            return opened_as(kind=kind)
        case ["validation" | "test" as split]:
            return opened_as(kind="metrics", split=split)
        case method, number:
            return opened_as(kind="step", method=method, step=int(number))
        case _:
            raise AssertionError(opened.statistic)


def _title(statistic: str) -> str:
    method, _, number = statistic.partition(" ")
    return f"{described(method).title}, step {number}" if number else ROUND_TITLES[statistic]


def _sent(sent: kept.SentCandidate, tried: Mapping[str, str]) -> Sent:
    common: dict[str, Any] = {"digest": sent.digest, "bytes": sent.bytes, "owners": sent.owners}
    if sent.split == SCALES:
        return SentScales(title="scales", **common)
    if sent.split == "prefix":
        method, _, number = sent.model.partition(" ")
        return SentMergedStep(title=_title(sent.model), method=method, step=int(number), **common)
    split: Any = sent.split
    return SentCandidate(title=sent.model, method=tried[sent.model], candidate=sent.model, split=split, **common)


def _step(step: kept.Step) -> Step:
    by_owner = {
        owner: OwnerCost(**asdict(cost) | {"waited_seconds": round(cost.waited_seconds, 3)})
        for owner, cost in step.by_owner.items()
    }
    return Step(
        title=step.name,
        phase=_phase(step.name),
        seconds=round(step.seconds, 3),
        bytes_sent=step.bytes_sent,
        bytes_received=step.bytes_received,
        by_owner=by_owner,
    )


def _phase(name: str) -> str:
    """Steps of one kind are one bar of the cost plots."""
    statistic = name.removeprefix("sum of ")
    if statistic != name:
        method, _, number = statistic.partition(" ")
        return f"rounds of {described(method).title}" if number else ROUND_TITLES[statistic]
    split = name.rpartition(" on ")[2] if name.startswith("candidate ") else name
    return PHASES.get(split, split)
