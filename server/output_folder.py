"""The coordinator's output folder, for the commands that watch a merge from outside too: nothing here imports torch."""

from pathlib import Path

from common.errors import SettingsError

PROGRESS = "progress.jsonl"  # how far the current run is, or how far the last one came


def claim_output(output: Path) -> None:
    """Make `output` one of our folders. Raises SettingsError rather than touch a folder that holds something else."""
    marker = output / ".amalgram"
    if output.exists() and not marker.is_file() and (not output.is_dir() or any(output.iterdir())):
        raise SettingsError(
            f"{output}: already exists and is not an output folder of amalgram", hint="name a new folder"
        )
    output.mkdir(parents=True, exist_ok=True)
    marker.touch()
