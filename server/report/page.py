"""`report.html`, made from report.json alone: one file, no script, nothing fetched."""

from collections import defaultdict
from math import log10, sqrt
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from server.report import plots
from server.report.report import FIGURE_SUMS, read_report
from server.report.words import EXPLAINED, FIGURES, METHODS, MODELS, TASKS, listed, models_in, percent, size

TWO_SIDED_95 = 1.96
MAX_PARTS = 7  # owners that a stacked bar tells apart; the others are one part
COORDINATOR = "coordinator"
NONE = "\u2013"  # stands where there is no number
LAYER_COLUMNS = (
    # key, heading, how it is printed, whether the colour goes by the order of magnitude
    ("rows", "Rows", "{:,.0f}", False),
    ("condition", "Condition", "{:.2g}", True),
    ("effective_rank", "Effective rank", "{:.1f}", False),
    ("unseen_directions", "Unseen directions", "{:.0f}", False),
    ("change", "Change from base", "{:.1%}", False),
    ("from_average", "Distance from average", "{:.1%}", False),
)


def render_report(output: Path) -> Path:
    """Make OUT/report.html from OUT/report.json."""
    page = output / "report.html"
    page.write_text(page_of(read_report(output)))
    return page


def page_of(report: dict[str, Any]) -> str:
    """The whole page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"percent": percent, "size": size, "listed": listed}
    return environment.get_template("report.html.jinja").render(
        report=report,
        models=models_in(report),
        names=MODELS,
        explained=EXPLAINED,
        methods=METHODS,
        figures=FIGURES,
        tasks=TASKS,
        figure_sums=FIGURE_SUMS,
        verdict=verdict(report),
        by_figure=by_figure(report),
        difference=difference,
        models_plot=_models_plot(report),
        sweep_plots=_sweep_plots(report),
        cost_plots=_cost_plots(report),
        layers=_layers(report),
        received=_received(report),
        sums_of={
            owner: [each["statistic"] for each in report["sums"] if owner in each["owners"]] for owner in report["lost"]
        },
    )


# --- the verdict ---


def verdict(report: dict[str, Any]) -> str:
    """One sentence on the merged model's accuracy beside every other model's, and how sure the difference is."""
    mean, method = report["evaluation"]["mean"], report["method"]
    merged = mean[method]["accuracy"]
    groups: dict[str, list[str]] = {"better than": [], "not clearly different from": [], "worse than": []}
    others = sorted(models_in(report)[1:], key=lambda model: -float(mean[model]["accuracy"]))
    for model in others:
        gain = merged - mean[model]["accuracy"]
        if abs(gain) <= chance(report, model):
            relation = "not clearly different from"
        else:
            relation = "better than" if gain > 0 else "worse than"
        groups[relation].append(f"{IN_A_SENTENCE[model]} ({percent(mean[model]['accuracy'])})")
    said = "; ".join(f"{relation} {listed(models)}" for relation, models in groups.items() if models)
    kind = report["agreement"]["task"]["kind"]
    return (
        f"The merged model ({METHODS[method]}) is right on {percent(merged)} of the owners' test {UNITS[kind]}: {said}."
    )


UNITS = {
    "text-classification": "rows",
    "image-classification": "rows",
    "token-classification": "words",
    "causal-lm": "tokens",
    "sequence-to-sequence": "tokens",
}


IN_A_SENTENCE = {
    "base": "the base model",
    "own_at_home": "each owner's own model at home",
    "own": "an owner's own model on everybody's rows",
    "average": "the plain average",
    "task_arithmetic": "task arithmetic",
    "fisher": "Fisher averaging",
    "data_free": "data-free merging",
    "regmean": "RegMean",
    "refit": "a refitted classifier on a merged body",
    "regmean_plus_plus": "RegMean++",
    "ensemble": "the ensemble of all own models",
    "multi_task": "training on everybody's data",
}


def by_figure(report: dict[str, Any]) -> str:
    """How the merged model stands by the task's figure, which may tell another story than accuracy."""
    figure, mean = report["evaluation"]["figure"], report["evaluation"]["mean"]
    merged = mean[report["method"]][figure]
    ahead = [model for model in models_in(report)[1:] if mean[model][figure] > merged]
    ahead.sort(key=lambda model: -float(mean[model][figure]))
    if not ahead:
        return f"By {FIGURES[figure]}, {merged:.3f}, no model here is ahead of it."
    before = listed([f"{IN_A_SENTENCE[model]} ({mean[model][figure]:.3f})" for model in ahead])
    return f"By {FIGURES[figure]}, {merged:.3f}, ahead of it: {before}."


def chance(report: dict[str, Any], model: str) -> float:
    """The difference in mean accuracy to `model` that chance alone makes in one of twenty repetitions, were the rows
    independent and other ones for each model: 1.96 sqrt(var + var), var = sum of p (1 - p) / rows / owners^2.
    """
    variance = 0.0
    owners = len(report["owners"])
    for each in (report["method"], model):
        mean = report["evaluation"]["mean"][each]
        shown = [scores[each] for scores in report["evaluation"]["by_owner"].values() if each in scores]
        if len(shown) == owners:
            variance += sum(one["accuracy"] * (1 - one["accuracy"]) / one["rows"] for one in shown) / owners**2
        else:
            variance += mean["accuracy"] * (1 - mean["accuracy"]) / mean["rows"]
    return TWO_SIDED_95 * sqrt(variance)


def difference(merged: float, other: float, points: bool) -> str:
    """How much better (or worse) the merged model is than another, as a sign that needs no colour."""
    gain = (merged - other) * (100 if points else 1)
    shown = f"{abs(gain):.1f}" if points else f"{abs(gain):.3f}"
    if not float(shown):
        return "= same"
    return f"▲ {shown}" if gain > 0 else f"▼ {shown}"


# --- plots ---


def _models_plot(report: dict[str, Any]) -> Markup:
    evaluation = report["evaluation"]
    models = sorted(models_in(report), key=lambda model: -float(evaluation["mean"][model]["accuracy"]))
    owners = [
        [scores[model]["accuracy"] for scores in evaluation["by_owner"].values() if model in scores] for model in models
    ]
    means = [evaluation["mean"][model]["accuracy"] for model in models]
    names = [f"{MODELS[model]} (merged)" if model == report["method"] else MODELS[model] for model in models]
    return Markup(plots.models_plot(names, means, owners, models.index(report["method"]), "accuracy on test rows"))


def _sweep_plots(report: dict[str, Any]) -> dict[str, Markup]:
    figure = report["evaluation"]["figure"]
    made = {}
    for method, sweep in report["evaluation"]["sweep"].items():
        tried = sorted(sweep, key=lambda row: float(row["knob"]))
        chosen = [row["candidate"] for row in tried].index(report["chosen"][method]["candidate"])
        curves = {FIGURES[each]: [row[each] for row in tried] for each in ("accuracy", figure)}
        made[method] = Markup(plots.sweep_plot(method, [row["knob"] for row in tried], curves, chosen))
    return made


def _cost_plots(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Time, bytes from and bytes to owners; per phase, cut into owners. With the same numbers as rows."""
    phases = _phases(report)
    owners = list(dict.fromkeys(owner for costs in phases.values() for owner in costs if owner != COORDINATOR))
    columns = owners if len(owners) <= MAX_PARTS else [*owners[: MAX_PARTS - 1], "the others"]
    charts = []
    for key, title, unit in (
        ("waited_seconds", "Time", 1.0),
        ("bytes_received", "From the owners", 1e6),
        ("bytes_sent", "To the owners", 1e6),
    ):
        parts: dict[str, list[float]] = {column: [0.0] * len(phases) for column in columns}
        if key == "waited_seconds":
            parts[COORDINATOR] = [0.0] * len(phases)
        for row, costs in enumerate(phases.values()):
            for party, cost in costs.items():
                if party in parts or party != COORDINATOR:
                    parts[party if party in parts else "the others"][row] += cost[key] / unit
        name = "seconds" if unit == 1.0 else "MB"
        svg = Markup(plots.stacked_plot(key.replace("_", "-"), list(phases), parts, name, COORDINATOR))
        charts.append({"title": title, "unit": name, "svg": svg, "rows": list(phases), "parts": parts})
    return charts


def _phases(report: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Steps of one kind put together: costs by owner, and the coordinator's own time."""
    phases: dict[str, dict[str, dict[str, float]]] = {}
    for step in report["steps"]:
        costs = phases.setdefault(_phase(step["name"], report), defaultdict(lambda: defaultdict(float)))
        for owner, cost in step["by_owner"].items():
            for key, value in cost.items():
                costs[owner][key] += value
        waited = sum(cost["waited_seconds"] for cost in step["by_owner"].values())
        costs[COORDINATOR]["waited_seconds"] += max(0.0, step["seconds"] - waited)
    between = report["seconds"] - sum(step["seconds"] for step in report["steps"])
    phases["between steps"] = {COORDINATOR: defaultdict(float, {"waited_seconds": max(0.0, between)})}
    return phases


def _phase(step: str, report: dict[str, Any]) -> str:
    for method, name in METHODS.items():
        if step.startswith(f"sum of {method} "):
            return f"sums of {name}"
    for split, name in (
        ("scales", "scales"),
        ("prefix", "merged layers"),
        ("validation", "candidates to validate"),
        ("test", "candidates to test"),
    ):
        if step.startswith("candidate ") and step.endswith(f" on {split}"):
            return name
    return step


# --- layers ---


def _layers(report: dict[str, Any]) -> dict[str, Any]:
    """The heat map: columns that have a number, and per row its cells with colour, ink and text."""
    notes = {note["name"]: note for note in report["layers"]}
    rows = [{"status": NONE, **change, **notes.get(change["name"], {})} for change in report["changes"]]
    columns = [column for column in LAYER_COLUMNS if any(row.get(column[0]) is not None for row in rows)]
    for key, _, form, logarithmic in columns:
        shares = _shares([row.get(key) for row in rows], logarithmic)
        for row, share in zip(rows, shares, strict=True):
            cells = row.setdefault("cells", [])
            colour, ink = ("transparent", "inherit") if share is None else plots.heat(share)
            text = NONE if row.get(key) is None else form.format(row[key])
            cells.append({"text": text, "colour": colour, "ink": ink})
    return {"columns": [heading for _, heading, _, _ in columns], "rows": rows}


def _shares(values: list[float | None], logarithmic: bool) -> list[float | None]:
    """Each number between the smallest (0) and the largest (1) of its column; None where all are the same."""
    scaled = [log10(value) if logarithmic and value else value for value in values]
    known = [value for value in scaled if value is not None]
    low, high = min(known), max(known)
    return [None if value is None or low == high else (value - low) / (high - low) for value in scaled]


# --- what owners received ---


def _received(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Candidates by what they were for, with all owners that got all of them."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for candidate in report["sent"]:
        groups[candidate["split"]].append(candidate)
    return [{"split": split, "candidates": candidates} for split, candidates in groups.items()]
