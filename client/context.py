"""What every answer of an owner rests on: its own settings, agreement, identity, state, models and rows.

Nothing in here comes from a message.
"""

from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from client import ledger
from client.ledger import Ledger
from client.repeats import Contributed
from client.settings import OwnerSettings
from client.state import OwnerState
from common.agreement import Agreement, load_agreement
from common.domain_separation import Domain
from common.identity import Identity, read_identity
from common.settings_file import load_settings
from common.summation import SUMMATIONS, key_agreement
from common.summation.protocol import OwnerSide

if TYPE_CHECKING:
    from client.workbench import Workbench
    from common.schedule import Schedule


class OwnerContext:
    """One owner's side, read from its settings file when it is needed."""

    def __init__(self, settings_path: Path) -> None:
        self.settings_path = settings_path.resolve()
        self.home = self.settings_path.parent
        self.settings = load_settings(settings_path, OwnerSettings)
        self.name = self.settings.name

    @cached_property
    def agreement(self) -> Agreement:
        return load_agreement(self.home / self.settings.agreement)

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

    @cached_property
    def state(self) -> OwnerState:
        """The state folder, which belongs to this identity alone."""
        return OwnerState(self.home / self.settings.state, self.identity.public_key)

    @property
    def ledger_path(self) -> Path:
        return self.home / (self.settings.ledger or self.identity_path.with_suffix(".ledger"))

    def ledger_locked(self) -> AbstractContextManager[None]:
        """Hold this while the ledger is read, or changed according to what was read."""
        return ledger.locked(self.ledger_path)

    @property
    def ledger(self) -> Ledger:
        """This identity's ledger as it is now. Consent creates it, so from then on it must be there."""
        has_consented = bool(self.state.consents())
        return Ledger(self.ledger_path, self.identity.public_key, self.agreement, must_exist=has_consented)

    @property
    def ledger_key(self) -> bytes:
        """The key of the sketches of what this identity has contributed."""
        return key_agreement.derive(self.identity.seed, Domain.LEDGER_KEY, salt=b"")

    def contributed(self, *, may_train: bool = True) -> Contributed:
        """Sketches of the rows and weight changes that this owner has now (Workbench.contributed)."""
        return self.workbench.contributed(self.ledger_key, may_train=may_train)

    @property
    def summation(self) -> type[OwnerSide]:
        """This owner's side of the agreed kind of sum."""
        return SUMMATIONS[self.agreement.summation.kind].owner
