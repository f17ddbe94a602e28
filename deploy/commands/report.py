"""`amalgram report`: shows a run's table again and renders its report.html anew."""

from pathlib import Path

from rich.console import Console

from deploy.commands.table import print_report
from deploy.terminal import answer, shows_json
from server.report.report import Report, read_report


def report_again(out: Path) -> None:
    """Render the report in `out`, or in its folder `output`, and show it. Raises SettingsError if neither has one."""
    if not (out / "report.json").exists() and (out / "output" / "report.json").is_file():
        out = out / "output"  # the reader named the consortium's folder
    report = read_report(out)
    from server.report.page import render_report  # matplotlib: `amalgram merge` shows a report without it

    render_report(out)
    show_report(report, out)


def show_report(report: Report, out: Path) -> None:
    """Print a run's table, or with --json the whole report."""
    if shows_json():
        answer(report.model_dump(mode="json"))
    else:
        print_report(Console(), report, out)
