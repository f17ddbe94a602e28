"""The coordinator's settings file: where the agreement and the base model are, and where results go."""

from pathlib import Path

from common.settings_file import Settings


class CoordinatorSettings(Settings):
    """`coordinator.toml`. Paths are relative to the file."""

    agreement: Path
    output: Path
    identity: Path = Path("coordinator.key")
    # The coordinator's copy of the base model, where it is not what the agreement names.
    base: str | None = None
