"""What every answer of an owner rests on: its own settings, agreement, identity, state, models and rows.

Nothing in here comes from a message.
"""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from client.ledger import Ledger
from client.settings import OwnerSettings
from client.state import OwnerState
from common.agreement import Agreement
from common.identity import Identity, read_identity
from common.settings_file import load_settings
from common.summation import SUMMATIONS
from common.summation.protocol import OwnerSide

if TYPE_CHECKING:
    from client.workbench import Workbench
    from common.schedule import Schedule


class OwnerContext:
    """One owner's side, read from its settings file when it is needed."""

    def __init__(self, settings_path: Path) -> None:
        self.home = settings_path.resolve().parent
        self.settings = load_settings(settings_path, OwnerSettings)
        self.name = self.settings.name
        self.state = OwnerState(self.home / self.settings.state)

    @cached_property
    def agreement(self) -> Agreement:
        return load_settings(self.home / self.settings.agreement, Agreement)

    @cached_property
    def workbench(self) -> "Workbench":
        """The models and the rows."""
        from client.workbench import Workbench  # torch takes seconds to import, and most messages do not need it

        return Workbench(self.settings, self.home, self.agreement, self.state)

    @property
    def schedule(self) -> "Schedule":
        """The rounds of this owner's own agreement."""
        return self.workbench.schedule

    @property
    def identity_path(self) -> Path:
        return self.home / (self.settings.identity or f"{self.name}.key")

    @cached_property
    def identity(self) -> Identity:
        return read_identity(self.identity_path)

    @property
    def ledger(self) -> Ledger:
        return self.state.ledger(self.agreement.digest())

    @property
    def summation(self) -> type[OwnerSide]:
        """This owner's side of the agreed kind of sum."""
        return SUMMATIONS[self.agreement.summation.kind].owner
