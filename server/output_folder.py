"""The coordinator's output folder, for the commands that watch a merge from outside too: nothing here imports torch."""

import json
import shutil
from pathlib import Path

from common.errors import SettingsError

CHECKPOINT = "checkpoint"  # what a run resumes from; gone once everything is published
PROGRESS = "progress.jsonl"  # how far the current run is, or how far the last one came
LEFT_BY_RUNS = frozenset(  # everything in the folder that a run writes, a simulation or the demo, also if it failed
    {
        ".amalgram",
        CHECKPOINT,
        PROGRESS,
        "consortium",
        "evidence",
        "failure.json",
        "failure.json.partial",
        "merge.lock",
        "model",
        "model.partial",
        "parties",
        "report.html",
        "report.json",
        "report.json.partial",
        "run.lock",
    }
)
MAX_TAIL_BYTES = 1_000_000  # of the progress file; a line names each owner


def claim_output(output: Path) -> None:
    """Make `output` one of our folders. Raises SettingsError rather than touch a folder that holds something else."""
    marker = output / ".amalgram"
    if output.exists() and not marker.is_file() and (not output.is_dir() or any(output.iterdir())):
        raise SettingsError(
            f"{output}: already exists and is not an output folder of amalgram", hint="name a new folder"
        )
    output.mkdir(parents=True, exist_ok=True)
    marker.touch()


def remove_result(output: Path) -> None:
    """Remove a published model and its report; the report first, since where it stands, its model is whole."""
    for name in ("report.json", "report.html"):
        (output / name).unlink(missing_ok=True)
    shutil.rmtree(output / "model", ignore_errors=True)


def last_step(output: Path) -> str | None:
    """The last step that a run in `output` began, `round: contributions`; None if no run began one."""
    path = output / PROGRESS
    if not path.is_file():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - MAX_TAIL_BYTES))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue  # cut off by a crash, or the beginning of the tail
        if isinstance(entry, dict) and isinstance(entry.get("step"), str):
            return str(entry["step"])
    return None
