"""What a run hands over, and the report that is made of it.

`Outcome` says what a report needs, in the words of `common/` and of report.py alone: this module knows neither the
coordinator nor how a merge is driven. They import it.
"""

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from common import schedule
from common.agreement import Agreement, OwnerEntry
from common.identity import fingerprint
from common.merge_methods import METHODS, ORDERED
from common.merge_methods.method import Method
from common.merge_methods.search import SEARCH, Mixture
from common.merge_methods.terms import LayerNote, MergedDelta
from common.metrics import LOWER_IS_BETTER, OWN_AT_HOME, MeanScore, Score, worst_accuracy
from common.models import low_rank
from common.models.layers import Layer as LinearLayer
from common.models.loading import digest_of
from common.models.plan import MergePlan
from common.privacy.legs import Leg, legs_of, own_noise, shares_of
from server.report.chance import are_apart, estimate_of
from server.report.report import (
    AdapterLayer,
    Agreed,
    AgreedLeg,
    AgreedOwner,
    AgreedPrivacy,
    AgreedTask,
    Change,
    Choice,
    Content,
    Digests,
    Evaluation,
    Layer,
    LowRank,
    MeanMetrics,
    MethodDescription,
    OwnerMetrics,
    Report,
    Round,
    Sent,
    Step,
    Tensors,
    Trial,
    group_metrics,
)
from server.report.words import METRICS

MIN_SWEEP = 3  # candidates; of two, each is at an end
LIBRARIES = ("amalgram", "flwr", "torch", "transformers", "numpy")


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One candidate of a sweep: its hyperparameter, and how it did on validation rows."""

    hyperparameter: float
    score: MeanScore


@dataclass(frozen=True, kw_only=True)
class MethodChoice:
    """The candidate of one method that was evaluated on test rows; `sweep` has all candidates if there were several."""

    candidate: str
    hyperparameter: float | None
    sweep: Mapping[str, Tried]


@dataclass(frozen=True, kw_only=True)
class OpenedRound:
    """A round whose total the coordinator learned, over `owners`; whether its program overwrote the total since."""

    round: schedule.Round
    owners: tuple[str, ...]
    destroyed: bool


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Everything that a report is made of.

    choices     by method, in the agreed order
    merged      by method, the merged delta that was evaluated on test rows
    owners      those whose numbers are in the merged model, of `examples` training rows if these were summed
    mixtures    every one that a search tried, by candidate
    test        by model: `base`, `own_at_home` and every method
    rounds      everything that was learned from the owners, in order
    sent        everything that was sent to them, in order
    steps       what each step cost, in order
    dropped_out by owner, the step at which it dropped out
    excluded    by owner that broke the rules of a sum, what it did
    receipts    the owners that signed the result
    """

    agreement: Agreement
    plan: MergePlan
    choices: Mapping[str, MethodChoice]
    merged: Mapping[str, MergedDelta]
    owners: tuple[str, ...]
    examples: int | None
    mixtures: Mapping[str, Mixture]
    test: Mapping[str, MeanScore]
    rounds: tuple[OpenedRound, ...]
    sent: tuple[Sent, ...]
    steps: tuple[Step, ...]
    dropped_out: Mapping[str, str]
    excluded: Mapping[str, str]
    receipts: tuple[str, ...]
    seconds: float


def make_report(outcome: Outcome, model: PreTrainedModel) -> Report:
    """The report of a run that published `model`, the base plus the merged delta of the agreed method."""
    agreement = outcome.agreement
    published = outcome.merged[agreement.method]
    return Report(
        title=agreement.title,
        method=agreement.method,
        methods={method.name: _described(method) for method in ORDERED if method.name in agreement.methods},
        summation=agreement.summation.kind,
        verified=agreement.is_verified,
        simulated=False,
        seconds=round(outcome.seconds, 3),
        owners=outcome.owners,
        dropped_out=dict(outcome.dropped_out),
        receipts=outcome.receipts,
        agreement=_agreed(agreement),
        base_parameters=sum(parameter.numel() for parameter in model.parameters()),
        chosen={
            method: Choice(candidate=choice.candidate, hyperparameter=choice.hyperparameter)
            for method, choice in outcome.choices.items()
        },
        evaluation=_evaluation(outcome),
        layers=tuple(map(_layer, published.layers)),
        changes=tuple(_changes(outcome, model)),
        low_rank=_low_rank(published.low_rank),
        tensors=Tensors(
            merged=agreement.tensors.merged,
            data_free=agreement.tensors.data_free,
            averaged=agreement.tensors.averaged,
            left_alone=agreement.tensors.left_alone,
        ),
        notes=tuple(f"{method}: {note}" for method, merged in outcome.merged.items() for note in merged.notes),
        advice=tuple(_advice(outcome)),
        disclosures=tuple(_disclosures(outcome)),
        rounds=tuple(map(_round, outcome.rounds)),
        sent=outcome.sent,
        steps=outcome.steps,
        examples=outcome.examples,
        digests=Digests(
            agreement=agreement.digest(),
            base=agreement.base_digest,
            bundle=agreement.bundle_digest,
            model=digest_of(model, agreement.task),
        ),
        versions={"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
    )


def at_the_end(report: Report, outcome: Outcome) -> Report:
    """A copy that also says who signed, who dropped out while signing, and what that cost."""
    return report.model_copy(
        update={
            "receipts": outcome.receipts,
            "dropped_out": dict(outcome.dropped_out),
            "steps": outcome.steps,
            "seconds": round(outcome.seconds, 3),
        }
    )


def add_references(report: Report, references: Mapping[str, MeanScore]) -> Report:
    """A copy that also has the scores of models that only a simulation can judge."""
    mean = report.evaluation.mean | {model: _mean_metrics(score) for model, score in references.items()}
    by_owner = {
        owner: models
        | {
            model: _owner_metrics(score.by_owner[owner])
            for model, score in references.items()
            if owner in score.by_owner
        }
        for owner, models in report.evaluation.by_owner.items()
    }
    evaluation = report.evaluation.model_copy(update={"mean": mean, "by_owner": by_owner})
    return report.model_copy(update={"evaluation": evaluation})


# --- what was agreed ---


def _agreed(agreement: Agreement) -> Agreed:
    fields = agreement.model_dump(mode="json")
    return Agreed(
        fingerprint=fingerprint(bytes.fromhex(agreement.digest())),
        base=agreement.base,
        owners=tuple(
            AgreedOwner(
                name=owner.name,
                public_key=owner.public_key or "",
                metrics=_shown(agreement, owner.name),
                declared=_declared(owner),
            )
            for owner in agreement.owners
        ),
        min_owners=agreement.needed_owners,
        colluders=agreement.colluders,
        quorum=agreement.quorum,
        ring_bits=agreement.summation.ring_bits,
        compare_with=agreement.compare_with,
        weighting=agreement.weighting,
        dtype=agreement.dtype,
        seed=agreement.seed,
        task=AgreedTask(
            kind=agreement.task.kind,
            problem_type=agreement.task.problem_type,
            labels=agreement.task.labels,
            target_range=agreement.task.target_range,
            head=agreement.task.head,
        ),
        privacy=AgreedPrivacy(
            min_rows_per_dimension=agreement.privacy.min_rows_per_dimension,
            merge_token_inputs=agreement.privacy.merge_token_inputs,
            merge_routed_inputs=agreement.privacy.merge_routed_inputs,
            epsilon=agreement.privacy.epsilon,
            delta=agreement.privacy.delta if agreement.privacy.epsilon is not None else 0.0,
            unit=agreement.privacy.unit,
            legs=_legs(agreement),
        ),
        hyperparameters={method: fields[method] for method in METHODS if method in fields},
    )


def _declared(owner: OwnerEntry) -> tuple[float, float] | None:
    return None if owner.declared is None else (owner.declared.epsilon, owner.declared.delta)


def _shown(agreement: Agreement, owner: str) -> Literal["shown", "summed"]:
    return "shown" if owner in agreement.shown_owners else "summed"


def _legs(agreement: Agreement) -> tuple[AgreedLeg, ...]:
    def added(leg: Leg) -> float | None:
        of_all = (len(agreement.owners) / shares_of(agreement, leg.name)) ** 0.5
        return None if leg.sigma is None else of_all * leg.sigma

    return tuple(
        AgreedLeg(
            name=leg.name,
            share=leg.share,
            epsilon=leg.epsilon,
            sensitivity=leg.sensitivity,
            sigma=leg.sigma,
            added=added(leg),
        )
        for leg in legs_of(agreement)
    )


# --- how good the models are ---


def _described(method: Method) -> MethodDescription:
    return MethodDescription(
        title=method.title,
        phrase=method.phrase,
        summary=method.summary,
        paper=method.paper,
        hyperparameter=method.swept_name,
        hyperparameter_summary=method.swept_summary,
    )


def _evaluation(outcome: Outcome) -> Evaluation:
    agreement = outcome.agreement
    return Evaluation(
        choose_by=agreement.choose_by,
        metric=agreement.task.metrics[1],
        label_set=agreement.task.label_set,
        cut=outcome.test[OWN_AT_HOME].cut,
        mean={model: _mean_metrics(score, agreement.evaluation.groups) for model, score in outcome.test.items()},
        by_owner={
            owner: {model: _owner_metrics(score.by_owner[owner]) for model, score in outcome.test.items()}
            for owner in agreement.shown_owners
            if all(owner in score.by_owner for score in outcome.test.values())
        },
        sweep={
            method: tuple(
                Trial(
                    candidate=candidate,
                    hyperparameter=tried.hyperparameter,
                    accuracy=tried.score.accuracy,
                    metric=tried.score.metric,
                    pearson_r=tried.score.pearson_r,
                    worst_group=worst_accuracy(tried.score.groups) if agreement.evaluation.groups else None,
                    scales=outcome.mixtures.get(candidate),
                )
                for candidate, tried in choice.sweep.items()
            )
            for method, choice in outcome.choices.items()
            if choice.sweep
        },
    )


def _mean_metrics(score: MeanScore, groups: Sequence[str] = ()) -> MeanMetrics:
    return MeanMetrics(
        accuracy=score.accuracy,
        metric=score.metric,
        pooled_accuracy=score.pooled_accuracy,
        predictions=score.rows,
        pearson_r=score.pearson_r,
        sums=score.sums,
        groups=group_metrics(groups, score.groups),
    )


def _owner_metrics(score: Score) -> OwnerMetrics:
    return OwnerMetrics(
        accuracy=None if score.correct is None else score.correct / score.rows,
        metric=score.metric,
        predictions=score.rows,
        pearson_r=score.pearson_r,
    )


def _advice(outcome: Outcome) -> Iterator[str]:
    """What a reader could do differently next time."""
    agreement = outcome.agreement
    noise = own_noise(agreement, "metrics") * len(agreement.owners) ** 0.5
    of_methods = {method: outcome.test[method] for method in agreement.methods}
    yield from what_did_better(agreement.method, of_methods, agreement.choose_by, noise)
    for owner, reason in outcome.excluded.items():
        yield f"The coordinator left {owner} out because it broke the rules of a sum: {reason}."
    for name, choice in outcome.choices.items():
        is_ordered = name != SEARCH.name  # mixtures are numbered as they were tried
        if is_ordered and not _is_clearly_worse(outcome.test[name], outcome.test[agreement.method], noise):
            yield from beyond_the_sweep(METHODS[name], choice, noise)


def what_did_better(published: str, scores: Mapping[str, MeanScore], metric: str, noise: float = 0.0) -> Iterator[str]:
    """Which method has the best metric on the test rows, if not the published one, and whether chance explains it.

    The chance is known for the number that models are compared by alone (chance.py).
    """
    best = max(scores, key=lambda method: scores[method].chosen_by(metric))
    ahead, behind = (scores[method].chosen_by(metric) for method in (best, published))
    if ahead <= behind:
        return
    sign = -1 if metric in LOWER_IS_BETTER else 1
    numbers = f"{METRICS[metric]} {sign * ahead:.3f} against {sign * behind:.3f}"
    is_main = ahead == scores[best].main
    if is_main and not _is_clearly_worse(scores[published], scores[best], noise):
        yield f"{best} is ahead of {published} on the test rows, {numbers}, which may be chance."
    else:
        yield f'{best} did better than {published} on the test rows: {numbers}. To publish it, set method = "{best}".'


def beyond_the_sweep(method: Method, choice: MethodChoice, noise: float = 0.0) -> Iterator[str]:
    """What to try next if the best candidate is the first or last of its sweep, and more than chance made it so."""
    tried = sorted(choice.sweep.values(), key=lambda each: each.hyperparameter)
    values = [each.hyperparameter for each in tried]
    if len(tried) < MIN_SWEEP or choice.hyperparameter not in (values[0], values[-1]):
        return
    ends = tried[:2] if choice.hyperparameter == values[0] else tried[:-3:-1]  # the best, then the one beside it
    further = further_values(ends[0].hyperparameter, ends[1].hyperparameter)
    if further and _is_clearly_worse(ends[1].score, ends[0].score, noise):
        yield (
            f"{choice.candidate} is at the end of its sweep, and better than the value beside it. Next time, also try "
            f"{method.swept_name} {further[0]:.4g} and {further[1]:.4g}."
        )


def further_values(end: float, beside: float) -> tuple[float, float] | None:
    """Two values beyond the end of a sweep, each half as far from 0, or from 1, as the one before; none beyond these.

    Above 1 there is no bound, so the sweep goes on in its last step.
    """
    if end < beside:
        return (end / 2, end / 4) if end > 0 else None
    if end > 1:
        return 2 * end - beside, 3 * end - 2 * beside
    return ((1 + end) / 2, (3 + end) / 4) if end < 1 else None


def _is_clearly_worse(one: MeanScore, other: MeanScore, noise: float) -> bool:
    """Whether the number that it is compared by is lower by more than chance and noise explain, all predictions
    together.
    """
    first, second = (estimate_of(score.accuracy, score.pearson_r, score.rows, noise) for score in (one, other))
    return one.main < other.main and are_apart([first], [second])


# --- what happened to the layers ---


def _layer(note: LayerNote) -> Layer:
    return Layer(
        name=note.name,
        status=note.status,
        d_in=note.d_in,
        gram_size=note.gram_size,
        token_rows=note.rows,
        condition=note.condition,
        effective_rank=note.effective_rank,
        unseen_directions=note.unseen_directions,
    )


def _low_rank(cut: low_rank.LowRank | None) -> LowRank | None:
    if cut is None:
        return None
    layers = tuple(AdapterLayer(name=layer.name, relative_error=layer.relative_error) for layer in cut.layers)
    return LowRank(rank=cut.plan.rank, relative_error=cut.relative_error, dropped=cut.dropped, layers=layers)


def _changes(outcome: Outcome, model: PreTrainedModel) -> Iterator[Change]:
    """How far the published model is from the two models that are known here: the base and the owners' average."""
    delta = outcome.merged[outcome.agreement.method].delta
    average = outcome.merged["average"].delta if "average" in outcome.merged else None
    weights = dict(model.named_parameters())
    for name, layers in _groups(outcome.plan, outcome.merged[outcome.agreement.method].layers).items():
        change = _stacked(layers, delta)
        base = _stacked(layers, weights) - change
        from_average = None
        if average is not None:
            mean = _stacked(layers, average)
            from_average = _ratio(change - mean, mean)
        yield Change(name=name, change=_ratio(change, base), from_average=from_average)


def _groups(plan: MergePlan, layers: tuple[LayerNote, ...]) -> dict[str, tuple[LinearLayer, ...]]:
    """The layers behind each entry of `layers`; single linear layers if it shares no Gram matrix of the plan."""
    shared = {each.name: each.layers for each in plan.inputs}
    known = shared | {layer.weight.removesuffix(".weight"): (layer,) for layer in plan.data_free}
    if shared and {note.name for note in layers} <= known.keys():
        return known
    return {layer.weight.removesuffix(".weight"): (layer,) for layer in plan.linear_layers}


def _stacked(layers: tuple[LinearLayer, ...], tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([layer.take(tensors).detach().double().flatten() for layer in layers])  # (numbers,) float64


def _ratio(part: Tensor, whole: Tensor) -> float | None:
    norm = float(whole.norm())
    return float(part.norm()) / norm if norm > 0 else None


# --- what was revealed ---


def _round(opened: OpenedRound) -> Round:
    summed = opened.round
    return Round(
        kind=summed.kind,
        method=summed.method,
        step=None if summed.step is None else summed.step.number,
        split=summed.split,
        title=summed.title,
        owners=opened.owners,
        numbers=summed.layout.size,
        contents=tuple(
            Content(kind=each.kind, meaning=each.meaning, numbers=each.numbers, tensors=each.tensors)
            for each in summed.contents("the owner's")
        ),
        destroyed=opened.destroyed,
    )


def _disclosures(outcome: Outcome) -> Iterator[str]:
    """What this run reveals in spite of masks, one paragraph each (SECURITY.md, b3 to b6)."""
    agreement = outcome.agreement
    if agreement.privacy.merge_token_inputs:
        yield (
            "Some layers see only the token and its position. Their totals show how often each token occurs, summed "
            "over the owners."
        )
    if agreement.privacy.merge_routed_inputs:
        yield "The totals include Gram matrices of single experts, however few token rows reached them."
    if agreement.task.is_text:
        yield (
            "Weight changes of token embeddings, and of a language model's output layer, show which tokens occur at "
            "any owner, in the totals and in the published model. Owners that freeze both avoid this."
        )
    yield from dict.fromkeys(text.format(their="the owners'") for text in agreement.disclosures())
    if any(opened.round.kind == "scales" for opened in outcome.rounds):
        yield (
            "Every owner received the scales of the 32-bit round. They give the size of the totals within a factor of "
            "two. A malicious coordinator could send coarse scales, so that only one owner's numbers survive rounding."
        )
    if any(opened.round.kind == "step" for opened in outcome.rounds) and not agreement.is_verified:
        yield (
            "Between rounds the coordinator sent merged layers. A malicious coordinator could craft layers so that the "
            "next total is a single owner's. The owners had to trust it to send what it solved."
        )
