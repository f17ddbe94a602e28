"""The table at the end of a run."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# Models in the order of the columns, as (name in report.json, heading).
COLUMNS = (
    ("base", "base"),
    ("own_at_home", "own at home"),
    ("own", "own"),
    ("average", "average"),
    ("task_arithmetic", "task arithmetic"),
    ("fisher", "Fisher"),
    ("regmean", "RegMean"),
    ("ensemble", "ensemble *"),
    ("multi_task", "multi-task *"),
)


def print_report(console: Console, report: dict[str, Any], out: Path) -> None:
    """Accuracy by owner and model, the means, what was chosen, and where everything is."""
    evaluation = report["evaluation"]
    columns = [(model, heading) for model, heading in COLUMNS if model in evaluation["mean"]]
    table = Table(title=f"{report['title']}: accuracy on test rows", title_style="bold", title_justify="left")
    table.add_column("owner's rows")
    for model, heading in columns:
        table.add_column(heading, justify="right", style="bold" if model == report["method"] else "")
    for owner, figures in evaluation["by_owner"].items():
        table.add_row(owner, *(f"{figures[model]['accuracy']:.3f}" for model, _ in columns))
    table.add_section()
    for figure, heading in (("accuracy", "mean"), ("macro_f1", "mean macro F1")):
        table.add_row(heading, *(f"{evaluation['mean'][model][figure]:.3f}" for model, _ in columns))
    console.print(table)
    notes = ["own at home: each owner's own model on its own rows"]
    if "own" in evaluation["mean"]:
        notes.append("own: the owners' own models on everybody's rows")
        notes.append("* a reference: needs every model, or all data, in one place")
    console.print("; ".join(notes), style="dim")
    for method, chosen in report["chosen"].items():
        if chosen["knob"] is not None and method in evaluation["sweep"]:
            console.print(f"{chosen['candidate']} was chosen on validation rows", style="dim")
    for owner, step in report["lost"].items():
        console.print(f"owner {owner} was lost at: {step}", style="yellow")
    if report["summation"] == "plain":
        console.print("plain sum: the coordinator saw each owner's vector", style="yellow")
    console.print(f"merged model  {out / 'model'}\nreport        {out / 'report.html'}", highlight=False)
