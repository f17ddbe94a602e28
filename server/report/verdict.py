"""The verdict in sentences: who gains and who loses against its own model at home, then how other models compare.

Whether a difference is more than chance is decided in chance.py, for each owner by itself.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from common.metrics import LOWER_IS_BETTER
from common.page.words import capitalised, listed
from server.report.chance import Estimate, are_apart, estimate_of
from server.report.report import MeanMetrics, OwnerMetrics, Report
from server.report.words import (
    METRICS,
    as_main,
    is_over_all_rows,
    is_regression,
    judges_of,
    models_in,
    noise_on_metrics,
    phrase_of,
    scored_in_words,
)

OWN = "own_at_home"
RELATIONS = BETTER, WORSE, UNCLEAR = ("better", "worse", "not clearly different")
MINUS = "\u2212"
MOST_NAMES = 6  # of a sentence; the table has all of them


@dataclass(frozen=True, kw_only=True)
class OwnerGain:
    """What one owner gains or loses on its own test rows if it takes the merged model instead of its own."""

    owner: str
    own: OwnerMetrics
    merged: OwnerMetrics
    relation: str

    @property
    def gain(self) -> float:
        return self.merged.main - self.own.main


def owner_gains(report: Report) -> list[OwnerGain]:
    """The owners whose metrics are shown, in the order of the roster."""
    shown = report.evaluation.by_owner
    return [
        OwnerGain(
            owner=owner,
            own=scores[OWN],
            merged=scores[report.method],
            relation=_relation([scores[report.method]], [scores[OWN]]),
        )
        for owner, scores in shown.items()
    ]


@dataclass(frozen=True, kw_only=True)
class OwnerGroup:
    """Owners that gain, or lose, or do neither: the first few by name and gain, largest first, and how many more."""

    heading: str
    named: tuple[str, ...]
    num_more: int

    @property
    def parts(self) -> tuple[str, ...]:
        return (*self.named, f"{self.num_more} more") if self.num_more else self.named

    def __str__(self) -> str:
        return f"{self.heading}: {listed(self.parts)}."


def verdict(report: Report) -> list[str]:
    """The whole verdict: the first sentence answers what an owner asks first."""
    return [*against_own_models(report), *against_other_models(report)]


def against_own_models(report: Report) -> list[str]:
    """How many owners gain and lose, which and by how much, then the mean over all owners."""
    return [headline(report), *map(str, owner_groups(report)), *more_about_owners(report), *_of_entities(report)]


def headline(report: Report) -> str:
    """How many owners gain, lose, or do neither; of a single owner, by how much; if nobody is shown, the mean."""
    gains = owner_gains(report)
    if not gains:
        return _on_average(report)
    if len(gains) == 1:
        (only,) = gains
        than = "not clearly different from" if only.relation == UNCLEAR else f"{only.relation} than"
        return f"For {only.owner}, the merged model is {than} its own model at home ({_points(report, only.gain)})."
    counts = Counter(each.relation for each in gains)
    owners = f"{len(gains)} owners{'' if len(gains) == len(judges_of(report)) else ' that show metrics'}"
    if len(counts) == 1:
        every = owners.replace("2 owners", "both owners") if len(gains) == 2 else f"all {owners}"
        parts = [f"{relation} for {every}" for relation in counts]
    else:
        parts = [f"{relation} for {counts[relation]}" for relation in RELATIONS if relation in counts]
        parts[0] += f" of {owners}"
    return f"Compared with each owner's own model at home, the merged model is {listed(parts)}."


def owner_groups(report: Report) -> list[OwnerGroup]:
    """`Worse, in percentage points: bottom-left (-7.0) and top-right (-6.7).`; none if fewer than two are shown."""
    gains = owner_gains(report)
    groups = []
    for relation in RELATIONS if len(gains) > 1 else ():
        group = sorted((each for each in gains if each.relation == relation), key=lambda each: -abs(each.gain))
        if group:
            groups.append(
                OwnerGroup(
                    heading=f"{capitalised(relation)}, in {'Pearson' if is_regression(report) else 'percentage points'}"
                    + ("'s r" if is_regression(report) else ""),
                    named=tuple(f"{each.owner} ({_signed(report, each.gain)})" for each in group[:MOST_NAMES]),
                    num_more=max(0, len(group) - MOST_NAMES),
                )
            )
    return groups


def more_about_owners(report: Report) -> list[str]:
    """Whose gain nobody else knows, and the mean unless it is the headline."""
    hidden = [owner for owner in judges_of(report) if owner not in report.evaluation.by_owner]
    names = listed(hidden) if len(hidden) <= MOST_NAMES else f"{len(hidden)} owners"
    sentences = []
    if len(hidden) == 1:
        sentences = [f"{names} shows its metrics only in the mean, so nobody else knows what it gains or loses."]
    elif hidden:
        sentences = [f"{names} show their metrics only in the mean, so nobody else knows what each gains or loses."]
    return [*sentences, _on_average(report)] if report.evaluation.by_owner else sentences


def _on_average(report: Report) -> str:
    """How the merged model does over all owners, and their own models at home."""
    mean = report.evaluation.mean
    merged, own = mean[report.method].main, mean[OWN].main
    relation = _relation(_scores(report, report.method), _scores(report, OWN), noise_on_metrics(report))
    scored, compared = scored_in_words(report)
    over = "On the test rows of" if is_over_all_rows(report) else "On average over"
    return (
        f"{over} {len(judges_of(report))} owners, the merged model ({report.methods[report.method].title}) "
        f"{scored.format(as_main(report, merged))}, and each owner's own model at home "
        f"{compared.format(as_main(report, own))}: {relation} ({_points(report, merged - own)})."
    )


def _of_entities(report: Report) -> list[str]:
    """A model that finds no entity is still right on most words, so their F1 belongs beside the accuracy."""
    if report.agreement.task.kind != "token-classification":
        return []
    merged, own = (report.evaluation.mean[model].metric for model in (report.method, OWN))
    return [
        f"Most words belong to no entity, so look at entity F1 too: {merged:.3f} for the merged model, {own:.3f} for "
        "each owner's own at home."
    ]


def against_other_models(report: Report) -> list[str]:
    """How the merged model compares with every other, over all owners."""
    mean = report.evaluation.mean
    groups: dict[str, list[str]] = {BETTER: [], UNCLEAR: [], WORSE: []}
    others = [model for model in models_in(report)[1:] if model != OWN]
    for model in sorted(others, key=lambda model: -mean[model].main):
        relation = _relation(_scores(report, report.method), _scores(report, model), noise_on_metrics(report))
        groups[relation].append(f"{phrase_of(report, model)} ({as_main(report, mean[model].main)})")
    linked = {BETTER: "better than", UNCLEAR: "not clearly different from", WORSE: "worse than"}
    sentences = [f"it is {linked[relation]} {listed(models)}." for relation, models in groups.items() if models]
    over = "On the test rows of all owners" if is_over_all_rows(report) else "On average over the owners"
    return [f"{over}, {sentences[0]}", *map(capitalised, sentences[1:])] if sentences else []


def by_metric(report: Report) -> str:
    """Which models are ahead by the task's own metric, which may tell another story than accuracy."""
    name, mean = report.evaluation.metric, report.evaluation.mean
    sign = -1 if name in LOWER_IS_BETTER else 1
    merged = mean[report.method].metric
    ahead = [model for model in models_in(report)[1:] if sign * mean[model].metric > sign * merged]
    ahead.sort(key=lambda model: -sign * mean[model].metric)
    scored, better = f"Its {METRICS[name]} is {merged:.3f}", "lower" if sign < 0 else "higher"
    if not ahead:
        return f"{scored}, and no other model scores {better}."
    others = listed([f"{phrase_of(report, model)} ({mean[model].metric:.3f})" for model in ahead])
    return f"{scored}. {capitalised(better)}: {others}."


def difference(merged: float, other: float, in_points: bool, lower_is_better: bool = False) -> str:
    """How much better (▲) or worse (▼) the merged model is than another: a sign that needs no colour."""
    gain = (merged - other) * (100 if in_points else 1) * (-1 if lower_is_better else 1)
    shown = f"{abs(gain):.1f}" if in_points else f"{abs(gain):.3f}"
    if not float(shown):
        return "= same"
    return f"▲ {shown}" if gain > 0 else f"▼ {shown}"


# --- numbers ---


def _points(report: Report, gain: float) -> str:
    points = _signed(report, gain)
    if is_regression(report):
        return points
    return f"{points} percentage point{'' if points[1:] == '1.0' else 's'}"


def _signed(report: Report, gain: float) -> str:
    """Percentage points: `+3.1`, `-3.1` or `0.0`; thousandths of a correlation."""
    points = f"{abs(gain):.3f}" if is_regression(report) else f"{abs(100 * gain):.1f}"
    return points if not float(points) else f"{'+' if gain > 0 else MINUS}{points}"


# --- chance ---


Scores = MeanMetrics | OwnerMetrics


def _relation(merged: Sequence[Scores], other: Sequence[Scores], noise: float = 0.0) -> str:
    if not are_apart([_estimate(each, noise) for each in merged], [_estimate(each, noise) for each in other]):
        return UNCLEAR
    return BETTER if _mean(merged) > _mean(other) else WORSE


def _mean(scores: Sequence[Scores]) -> float:
    return sum(each.main for each in scores) / len(scores)


def _scores(report: Report, model: str) -> Sequence[Scores]:
    """Those of each owner; where any owner's are hidden, and of a regression, all predictions together."""
    shown = [scores[model] for scores in report.evaluation.by_owner.values() if model in scores]
    if len(shown) == len(judges_of(report)) and not is_regression(report):
        return shown
    return [report.evaluation.mean[model]]


def _estimate(scores: Scores, noise: float) -> Estimate:
    return estimate_of(scores.accuracy, scores.pearson_r, scores.predictions, noise)
