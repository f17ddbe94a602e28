"""The table at the end of a run."""

from collections.abc import Iterator
from math import isnan, nan
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.text import shown, shown_lines
from server.report.report import LowRank, Report
from server.report.verdict import against_own_models
from server.report.words import (
    LABELLED,
    METRICS,
    cut_in_words,
    groups_in_words,
    is_over_all_rows,
    is_regression,
    main_heading,
    noise_in_words,
    title_of,
)

MAX_OWNER_COLUMNS = 6  # with more owners, only the page shows each one's metrics
FIRST, LAST = ("base", "own", "own_at_home"), ("ensemble", "close_ensemble", "multi_task")
REFERENCE_MARK = " *"
PUBLISHED_MARK = " ←"


def print_report(console: Console, report: Report, out: Path) -> None:
    """Who gains and loses, accuracy by model and owner, the means, what was chosen, and where everything is."""
    for sentence in against_own_models(report):
        console.print(shown(sentence), highlight=False, markup=False)
    console.print()
    console.print(_table(report))
    for line in _notes(report):
        console.print(shown(line), style="dim", highlight=False, markup=False)
    if report.low_rank:
        console.print(_adapter_note(report.low_rank), style="dim", highlight=False, markup=False, soft_wrap=True)
    for line in report.advice:
        console.print(shown(line), style="yellow", highlight=False, markup=False, soft_wrap=True)
    for owner, step in report.dropped_out.items():
        console.print(shown(f"owner {owner} dropped out at: {step}"), style="yellow", highlight=False, markup=False)
    if report.summation == "plain":
        console.print("plain sum: the coordinator saw each owner's vector", style="yellow")
    else:
        console.print("masked sum: the coordinator saw totals over the owners, and nothing else", style="dim")
    console.print(
        shown_lines(f"merged model  {out / 'model'}\nreport        {out / 'report.html'}"),
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _table(report: Report) -> Table:
    evaluation = report.evaluation
    by_owner = evaluation.by_owner if len(evaluation.by_owner) <= MAX_OWNER_COLUMNS else {}
    title = f"{escape(shown(report.title))}: {main_heading(report)}"
    table = Table(title=title, title_style="bold", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", no_wrap=True)
    for heading in ("all rows" if is_over_all_rows(report) else "mean", METRICS[evaluation.metric], *by_owner):
        table.add_column(escape(shown(heading).replace("-", "-\n")), justify="right", overflow="fold")
    for model in _rows(report):
        mean, name = evaluation.mean[model], title_of(report, model)
        values = [mean.main, mean.metric]
        values += [by_model[model].main if model in by_model else nan for by_model in by_owner.values()]
        name += REFERENCE_MARK if model in LAST else PUBLISHED_MARK if model == report.method else ""
        style = "bold" if model == report.method else ""
        table.add_row(escape(shown(name)), *("-" if isnan(value) else f"{value:.3f}" for value in values), style=style)
    return table


def _rows(report: Report) -> list[str]:
    """The models from top to bottom."""
    return [model for model in (*FIRST, *report.methods, *LAST) if model in report.evaluation.mean]


def _adapter_note(low_rank: LowRank) -> str:
    return (
        f"published as an adapter of rank {low_rank.rank}: {low_rank.relative_error:.1%} of the layers' change is cut "
        f"off, {low_rank.dropped:.1%} of all change is outside what an adapter holds"
    )


def _notes(report: Report) -> Iterator[str]:
    evaluation = report.evaluation
    yield f"{PUBLISHED_MARK.strip()} the published model"
    if "own" in evaluation.mean:
        yield "own: each owner's model on everybody's rows; own at home: on its own rows"
        yield "* needs every model, or all data, in one place: a reference for simulations only"
    else:
        yield "own at home: each owner's model on its own rows"
    if evaluation.sweep:
        yield f"chosen on validation rows: {', '.join(report.chosen[method].candidate for method in evaluation.sweep)}"
    if groups := groups_in_words(report):
        yield groups.replace("It is", f"{PUBLISHED_MARK.strip()} is", 1)
    if cut := cut_in_words(report):
        yield cut
    if noise := noise_in_words(report):
        yield noise
    if is_regression(report):
        low, high = report.agreement.task.target_range or (0.0, 1.0)
        yield f"a prediction beyond the agreed range, {low:g} to {high:g}, counts as its nearest end"
    elif evaluation.label_set == "own" and report.agreement.task.kind in LABELLED:
        yield "judged among the labels that occur at each owner (task.label_set)"
