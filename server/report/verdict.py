"""The verdict: how the merged model compares with every other, in sentences, and how sure the difference is."""

from math import sqrt

from server.report.report import Report
from server.report.words import METRICS, listed, models_in, percent, phrase_of

TWO_SIDED_95 = 1.96
UNITS = {
    "text-classification": "rows",
    "image-classification": "rows",
    "token-classification": "words",
    "causal-lm": "tokens",
    "sequence-to-sequence": "tokens",
}


def verdict(report: Report) -> list[str]:
    """Sentences: the merged model's accuracy, then how it compares with every other model's (`chance`)."""
    mean = report.evaluation.mean
    merged = mean[report.method].accuracy
    groups: dict[str, list[str]] = {"better than": [], "not clearly different from": [], "worse than": []}
    others = sorted(models_in(report)[1:], key=lambda model: -mean[model].accuracy)
    for model in others:
        gain = merged - mean[model].accuracy
        if abs(gain) <= chance(report, model):
            relation = "not clearly different from"
        else:
            relation = "better than" if gain > 0 else "worse than"
        groups[relation].append(f"{phrase_of(report, model)} ({percent(mean[model].accuracy)})")
    return [
        f"The merged model ({report.methods[report.method].title}) is right on {percent(merged)} of the owners' test "
        f"{UNITS[report.agreement.task.kind]}.",
        *(f"It is {relation} {listed(models)}." for relation, models in groups.items() if models),
    ]


def by_metric(report: Report) -> str:
    """Which models are ahead by the task's own metric, which may tell another story than accuracy."""
    name, mean = report.evaluation.metric, report.evaluation.mean
    merged = mean[report.method].metric
    ahead = [model for model in models_in(report)[1:] if mean[model].metric > merged]
    ahead.sort(key=lambda model: -mean[model].metric)
    scored = f"Its {METRICS[name]} is {merged:.3f}"
    if not ahead:
        return f"{scored}, and no other model scores higher."
    return f"{scored}. Higher: {listed([f'{phrase_of(report, model)} ({mean[model].metric:.3f})' for model in ahead])}."


def chance(report: Report, model: str) -> float:
    """The difference in mean accuracy to `model` that chance alone makes in one of twenty repetitions.

    As if rows were independent, and other rows were drawn for each model: 1.96 sqrt(var + var), where
    var = sum of p (1 - p) / predictions / owners^2 over the owners. Where an owner's accuracy is hidden, p is the mean.
    """
    variance = 0.0
    owners = len(report.owners)
    for each in (report.method, model):
        mean = report.evaluation.mean[each]
        shown = [scores[each] for scores in report.evaluation.by_owner.values() if each in scores]
        if len(shown) == owners:
            variance += sum(one.accuracy * (1 - one.accuracy) / one.predictions for one in shown) / owners**2
        else:
            variance += mean.accuracy * (1 - mean.accuracy) / mean.predictions
    return TWO_SIDED_95 * sqrt(variance)


def difference(merged: float, other: float, in_points: bool) -> str:
    """How much better (▲) or worse (▼) the merged model is than another: a sign that needs no colour."""
    gain = (merged - other) * (100 if in_points else 1)
    shown = f"{abs(gain):.1f}" if in_points else f"{abs(gain):.3f}"
    if not float(shown):
        return "= same"
    return f"▲ {shown}" if gain > 0 else f"▼ {shown}"
