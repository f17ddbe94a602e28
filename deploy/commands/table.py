"""The table at the end of a run."""

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

# Models in the order of the rows, as (name in report.json, heading).
ROWS = (
    ("base", "base"),
    ("own", "own"),
    ("own_at_home", "own at home"),
    ("average", "average"),
    ("task_arithmetic", "task arithmetic"),
    ("fisher", "Fisher"),
    ("data_free", "data-free"),
    ("regmean", "RegMean"),
    ("refit", "refit"),
    ("regmean_plus_plus", "RegMean++"),
    ("ensemble", "ensemble *"),
    ("multi_task", "multi-task *"),
)
MAX_OWNER_COLUMNS = 6  # of more, the report has the figures


def print_report(console: Console, report: dict[str, Any], out: Path) -> None:
    """Accuracy by model and owner, the means, what was chosen, and where everything is."""
    evaluation = report["evaluation"]
    owners = list(evaluation["by_owner"]) if len(evaluation["by_owner"]) <= MAX_OWNER_COLUMNS else []
    title = f"{escape(report['title'])}: accuracy on test rows"
    table = Table(title=title, title_style="bold", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", no_wrap=True)
    figure = evaluation["figure"].replace("_", " ").replace("f1", "F1")
    for heading in ("mean", figure, *owners):
        table.add_column(heading.replace("-", "-\n"), justify="right", overflow="fold")
    for model, heading in ROWS:
        if model in evaluation["mean"]:
            mean = evaluation["mean"][model]
            figures = [mean["accuracy"], mean[evaluation["figure"]]]
            figures += [evaluation["by_owner"][owner][model]["accuracy"] for owner in owners]
            style = "bold" if model == report["method"] else ""
            table.add_row(heading, *(f"{figure:.3f}" for figure in figures), style=style)
    console.print(table)
    for line in _notes(report):
        console.print(line, style="dim", highlight=False, markup=False)
    if report["low_rank"]:
        console.print(_adapter_note(report["low_rank"]), style="dim", highlight=False, markup=False, soft_wrap=True)
    for line in report["advice"]:
        console.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)
    for owner, step in report["lost"].items():
        console.print(f"owner {owner} was lost at: {step}", style="yellow")
    if report["summation"] == "plain":
        console.print("plain sum: the coordinator saw each owner's vector", style="yellow")
    else:
        console.print("masked sum: the coordinator saw totals over the owners, and nothing else", style="dim")
    console.print(
        f"merged model  {out / 'model'}\nreport        {out / 'report.html'}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _adapter_note(low_rank: dict[str, Any]) -> str:
    return (
        f"published as an adapter of rank {low_rank['rank']}: {low_rank['relative_error']:.1%} of the layers' change "
        f"is cut off, {low_rank['dropped']:.1%} of all change is outside what an adapter holds"
    )


def _notes(report: dict[str, Any]) -> list[str]:
    notes = []
    if "own" in report["evaluation"]["mean"]:
        notes.append("own: the owners' own models on everybody's rows; own at home: on its own")
        notes.append("* needs every model, or all data, in one place: a reference, in simulations only")
    else:
        notes.append("own at home: each owner's own model on its own rows")
    chosen = [report["chosen"][method]["candidate"] for method in report["evaluation"]["sweep"]]
    if chosen:
        notes.append(f"chosen on validation rows: {', '.join(chosen)}")
    if report["evaluation"]["label_set"] == "own":
        notes.append("judged among the labels that occur at each owner (task.label_set)")
    return notes
