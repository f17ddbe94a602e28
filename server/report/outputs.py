"""How the published model does on each label or target, from the sums over owners: for several labels, or numbers."""

from collections.abc import Iterator
from dataclasses import dataclass

from common.metrics import f1_of, micro_f1, pearson_r
from server.report.report import MeanMetrics, Report
from server.report.words import has_several_labels, is_regression, models_in, title_of


@dataclass(frozen=True, kw_only=True)
class ByOutput:
    """A table of the published model: what the columns are, then a row for each label or target. `whole`: a sentence
    on all of them together; empty for numbers.
    """

    columns: tuple[str, ...]
    rows: dict[str, tuple[str, ...]]
    whole: str


def by_output(report: Report) -> ByOutput | None:
    """None for a task without sums by label or target, or with private heads."""
    published = report.evaluation.mean[report.method]
    names = report.agreement.task.labels
    if not published.sums:
        return None
    if is_regression(report):
        rows = dict(zip(names, _by_target(report, published), strict=True))
        return ByOutput(columns=("Pearson's r", "Mean squared error"), rows=rows, whole="")
    if not has_several_labels(report):
        return None
    return ByOutput(
        columns=("F1", "Rows that have it", "Rows given it", "Both"),
        rows=dict(zip(names, _by_label(published), strict=True)),
        whole=_whole(report),
    )


def _by_label(scores: MeanMetrics) -> Iterator[tuple[str, ...]]:
    for right, wanted, found in scores.sums:
        yield (_three(f1_of((right, wanted, found))), f"{wanted:.0f}", f"{found:.0f}", f"{right:.0f}")


def _by_target(report: Report, scores: MeanMetrics) -> Iterator[tuple[str, ...]]:
    low, high = report.agreement.task.target_range or (0.0, 1.0)
    owners = len(report.owners)
    for each in scores.sums:
        error = max(each[-1], 0.0) / scores.predictions * (high - low) ** 2
        yield (f"{pearson_r(each, scores.predictions, owners):.3f}", f"{error:.3g}")


def _whole(report: Report) -> str:
    """Micro F1 of every model."""
    scores = {model: micro_f1(report.evaluation.mean[model].sums) for model in models_in(report)}
    listed = ", ".join(f"{title_of(report, model)} {_three(score)}" for model, score in scores.items())
    return f"Micro F1, over all labels and rows together: {listed}."


def _three(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
