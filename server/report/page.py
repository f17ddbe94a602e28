"""`report.html`, made from report.json alone: one file that runs no script and fetches nothing.

The page is a frame (report.html.jinja, common/page/) and eight sections. Each section is one function here, which
gathers what it shows, and one template of the same name in sections/.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from common.agreement import WORST_GROUP
from common.page.templates import page_environment
from common.page.words import capitalised
from server.report import plots
from server.report.heat_map import heat_map
from server.report.outputs import by_output
from server.report.report import OwnerCost, Report, Sent, read_report
from server.report.verdict import (
    against_other_models,
    by_metric,
    difference,
    headline,
    more_about_owners,
    owner_gains,
    owner_groups,
)
from server.report.words import (
    METRICS,
    TOKEN_TASKS,
    cut_in_words,
    groups_in_words,
    is_over_all_rows,
    is_regression,
    judges_of,
    main_heading,
    main_metric,
    models_in,
    noise_in_words,
    summary_of,
    task_in_words,
    title_of,
)

FOLDER = Path(__file__).parent
MANY = 12  # owners; of more, lists are folded and tables scroll
MAX_PARTS = 7  # owners that a stacked bar shows one by one; beyond that, some are put together
SHORTEST_BAR = 0.005  # of the longest; shorter ones cannot be seen, and only the table has them
COORDINATOR = "coordinator"
OTHERS = "the others"
ALL_OWNERS = "owners"
BETWEEN_STEPS = "between steps"


def render_report(output: Path) -> Path:
    """Make OUT/report.html from OUT/report.json."""
    page = output / "report.html"
    page.write_text(page_of(read_report(output)))
    return page


def page_of(report: Report) -> str:
    """The whole page."""
    environment = _environment()
    shared = {
        "report": report,
        "is_masked": report.summation == "masked",
        "is_regression": is_regression(report),
        "is_over_all_rows": is_over_all_rows(report),
        "noise": noise_in_words(report),
        "main_metric": main_metric(report),
        "task_in_words": task_in_words(report),
        "hidden": [owner.name for owner in report.agreement.owners if owner.metrics == "summed"],
    }
    sections = [
        Markup(environment.get_template(f"sections/{name}.html.jinja").render(shared | gather(report)))
        for name, gather in SECTIONS.items()
    ]
    return environment.get_template("report.html.jinja").render(shared, sections=sections)


@cache
def _environment() -> Environment:
    """The templates, compiled once."""
    environment = page_environment(FOLDER)
    environment.globals |= {"many": MANY, "metric_names": METRICS, "title_of": title_of}
    return environment


# --- the sections ---


def verdict_section(report: Report) -> dict[str, Any]:
    return {
        "headline": headline(report),
        "groups": owner_groups(report),
        "more_about_owners": more_about_owners(report),
        "others": against_other_models(report),
        "by_metric": by_metric(report),
        "num_compared": len(report.evaluation.by_owner),
        "judges_tokens": report.agreement.task.kind in TOKEN_TASKS,
    }


def metrics_section(report: Report) -> dict[str, Any]:
    return {
        "models": models_in(report),
        "gains": owner_gains(report),
        "num_judges": len(judges_of(report)),
        "main_heading": main_heading(report),
        "cut": cut_in_words(report),
        "by_output": by_output(report),
        "groups": groups_in_words(report),
        "difference": difference,
        "summary_of": summary_of,
        "plot": _models_plot(report),
    }


def choice_section(report: Report) -> dict[str, Any]:
    swept = {report.methods[method].hyperparameter_summary for method in report.evaluation.sweep}
    return {"plots": _sweep_plots(report), "explained": sorted(swept - {None})}


def revealed_section(report: Report) -> dict[str, Any]:
    measured = [each for each in report.rounds if each.kind not in ("check", "metrics")]
    return {
        "has_later_rounds": len(measured) > 1 and not report.verified,
        "all_destroyed": all(each.destroyed for each in measured),
        "models_sent": [each for each in report.sent if each.kind not in ("scales", "correction")],
        "deliveries": _deliveries(report),
        "rounds_with": {
            owner: [each.title for each in report.rounds if owner in each.owners] for owner in report.dropped_out
        },
    }


def layers_section(report: Report) -> dict[str, Any]:
    return {"heat_map": heat_map(report), "num_merged": sum(map(len, report.tensors.merged))}


def cost_section(report: Report) -> dict[str, Any]:
    return {
        "charts": _cost_charts(report),
        "bytes_sent": sum(step.bytes_sent for step in report.steps),
        "bytes_received": sum(step.bytes_received for step in report.steps),
    }


def agreement_section(report: Report) -> dict[str, Any]:
    return {"compared": [report.methods[method].title for method in report.agreement.compare_with]}


def digests_section(report: Report) -> dict[str, Any]:
    return {"digests": report.digests.model_dump()}


SECTIONS: dict[str, Callable[[Report], dict[str, Any]]] = {  # by the section's id, in the order of the page
    "verdict": verdict_section,
    "metrics": metrics_section,
    "choice": choice_section,
    "revealed": revealed_section,
    "layers": layers_section,
    "cost": cost_section,
    "agreement": agreement_section,
    "digests": digests_section,
}


# --- metrics and sweeps ---


def _models_plot(report: Report) -> Markup:
    evaluation = report.evaluation
    models = sorted(models_in(report), key=lambda model: -evaluation.mean[model].main)
    owners = [[scores[model].main for scores in evaluation.by_owner.values() if model in scores] for model in models]
    means = [evaluation.mean[model].main for model in models]
    names = [capitalised(title_of(report, model)) for model in models]
    merged = models.index(report.method)
    names[merged] += " (published)"
    return Markup(plots.models_plot(names, means, owners, merged, main_heading(report)))


def _sweep_plots(report: Report) -> dict[str, Markup]:
    made = {}
    for number, (method, sweep) in enumerate(report.evaluation.sweep.items()):
        tried = sorted(sweep, key=lambda trial: trial.hyperparameter)
        chosen = [trial.candidate for trial in tried].index(report.chosen[method].candidate)
        metrics = [trial.metric for trial in tried]
        curves = {main_metric(report): [trial.main for trial in tried], METRICS[report.evaluation.metric]: metrics}
        if report.evaluation.metric in ("log_likelihood", "mean_squared_error"):  # of another scale: what decided
            curves = {name: curves[name] for name in curves if name == METRICS[report.evaluation.choose_by]}
        if report.evaluation.choose_by == WORST_GROUP:
            curves[METRICS[WORST_GROUP]] = [trial.worst_group or 0.0 for trial in tried]
        values = [trial.hyperparameter for trial in tried]
        made[method] = Markup(plots.sweep_plot(str(number), values, curves, chosen))
    return made


# --- what owners received ---


@dataclass(frozen=True, kw_only=True)
class DeliveryGroup:
    """Deliveries of one purpose, with every owner that received any of them."""

    purpose: str
    titles: tuple[str, ...]
    owners: tuple[str, ...]
    largest_bytes: int


def _deliveries(report: Report) -> list[DeliveryGroup]:
    groups: dict[str, list[Sent]] = defaultdict(list)
    for sent in report.sent:
        groups[_purpose(sent)].append(sent)
    return [
        DeliveryGroup(
            purpose=purpose,
            titles=tuple(sent.title for sent in group),
            owners=tuple(_in_order(report, (owner for sent in group for owner in sent.owners))),
            largest_bytes=max(sent.bytes for sent in group),
        )
        for purpose, group in groups.items()
    ]


def _in_order(report: Report, owners: Iterable[str]) -> list[str]:
    """Each of the owners once, in the order of the roster."""
    roster = {owner.name: index for index, owner in enumerate(report.agreement.owners)}
    return sorted(dict.fromkeys(owners), key=lambda owner: roster.get(owner, len(roster)))


def _purpose(sent: Sent) -> str:
    if sent.kind == "scales":
        return "scaling the numbers of a 32-bit round"
    if sent.kind == "correction":
        return "verifying the models"
    if sent.kind == "merged_step":
        return "measuring the next round"
    return "choosing, on validation rows" if sent.split == "validation" else "the metrics, on test rows"


# --- time and bytes ---


@dataclass(frozen=True, kw_only=True)
class CostChart:
    """Numbers by part (an owner, or owners together, or the coordinator) and phase, and their plot.

    Where one phase has nearly all of a cost, a plot would be one bar: there is none, and `main_phase` is that phase.
    """

    title: str
    unit: str
    svg: Markup | None
    phases: tuple[str, ...]
    parts: dict[str, list[float]]
    main_phase: str | None

    @property
    def total(self) -> float:
        return sum(map(sum, self.parts.values()))

    @property
    def of_main_phase(self) -> float:
        index = self.phases.index(self.main_phase) if self.main_phase else 0
        return sum(values[index] for values in self.parts.values())


def _cost_charts(report: Report) -> list[CostChart]:
    """Time, bytes from owners and bytes to owners. Each bar is a phase, cut into owners."""
    waited = _seconds_by_phase(report)
    received = _by_phase(report, lambda cost: cost.bytes_received / 1e6)
    sent = _by_phase(report, lambda cost: cost.bytes_sent / 1e6)
    charts = [("Time", "seconds", waited), ("From the owners", "MB", received), ("To the owners", "MB", sent)]
    return [_cost_chart(report, title, unit, costs) for title, unit, costs in charts if any(costs.values())]


def _cost_chart(report: Report, title: str, unit: str, costs: dict[str, dict[str, float]]) -> CostChart:
    parties = (party for by_party in costs.values() for party in by_party if party != COORDINATOR)
    owners = _in_order(report, parties)
    columns = owners if len(owners) <= MAX_PARTS else [*owners[: MAX_PARTS - 1], OTHERS]
    if any(COORDINATOR in by_party for by_party in costs.values()):
        columns.append(COORDINATOR)
    parts = {column: [0.0] * len(costs) for column in columns}
    for row, by_party in enumerate(costs.values()):
        for party, cost in by_party.items():
            parts[party if party in parts else OTHERS][row] += cost
    totals = {phase: sum(by_party.values()) for phase, by_party in costs.items()}
    bars = [row for row, total in enumerate(totals.values()) if total > SHORTEST_BAR * max(totals.values())]
    phases, svg = tuple(costs), None
    if len(bars) > 1:
        drawn = {part: [values[row] for row in bars] for part, values in parts.items()}
        name, rows = title.lower().replace(" ", "-"), [phases[row] for row in bars]
        svg = Markup(plots.stacked_plot(name, rows, drawn, unit, COORDINATOR))
    main_phase = phases[bars[0]] if len(bars) == 1 else None
    return CostChart(title=title, unit=unit, svg=svg, phases=phases, parts=parts, main_phase=main_phase)


def _by_phase(report: Report, of: Callable[[OwnerCost], float]) -> dict[str, dict[str, float]]:
    """One kind of cost by phase and owner."""
    costs: dict[str, dict[str, float]] = {}
    for step in report.steps:
        phase = costs.setdefault(step.phase, {})
        for owner, cost in step.by_owner.items():
            phase[owner] = phase.get(owner, 0.0) + of(cost)
    return costs


def _seconds_by_phase(report: Report) -> dict[str, dict[str, float]]:
    """By phase, the time in which the coordinator waited for owners, and the time in which it waited for nobody."""
    seconds: dict[str, dict[str, float]] = {}
    for step in report.steps:
        phase = seconds.setdefault(step.phase, {ALL_OWNERS: 0.0, COORDINATOR: 0.0})
        phase[ALL_OWNERS] += step.waited_seconds
        phase[COORDINATOR] += max(0.0, step.seconds - step.waited_seconds)
    seconds[BETWEEN_STEPS] = {COORDINATOR: max(0.0, report.seconds - sum(step.seconds for step in report.steps))}
    return seconds
