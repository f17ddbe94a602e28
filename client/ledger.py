"""What this owner has given into a round, once and for all. Kept for good, beyond runs, restarts and aborted sessions.

The same vector, unmasked with two different groups of owners, exposes a difference: somebody's vector. So what a round
is about is offered to one session only. From the first masked part on, the others may be able to unmask that session
without this owner, so it counts as given until enough of them have signed that they never will (`release`).
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import ConsentError, SettingsError
from common.private_file import write_whole


class Offer(BaseModel):
    """What left for the round at `position`, to one session; `deliveries_digest` is what it was measured with."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    position: int
    session: str
    deliveries_digest: str


class Page(BaseModel):
    """Everything under one agreement. `round`: the number of the last sum that was opened; `result`: the one signed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    round: int | None = None
    offers: tuple[Offer, ...] = ()
    revealed: tuple[str, ...] = ()
    burned: tuple[str, ...] = ()
    result: str | None = None


class Book(BaseModel):
    """The whole file: a page for each agreement, by its digest."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: Literal[2]
    pages: dict[str, Page]


class Ledger:
    """`ledger.json` of an owner's state folder. Every change is on the disk before the method returns."""

    def __init__(self, path: Path, agreement_digest: str) -> None:
        self._path = path
        self._agreement_digest = agreement_digest
        self._book = _read(path)

    @property
    def earlier_contributions(self) -> int:
        """Under how many other agreements this owner has offered something."""
        return sum(bool(page.offers) for digest, page in self._book.pages.items() if digest != self._agreement_digest)

    @property
    def pending(self) -> str:
        """A session that something was offered to and that this owner never helped to unmask; empty if none is."""
        return next((offer.session for offer in self._page.offers if offer.session not in self._page.revealed), "")

    @property
    def offered_deliveries(self) -> set[str]:
        """The `deliveries_digest` of every round that something was offered to."""
        return {offer.deliveries_digest for offer in self._page.offers}  # check: offers-count-from-the-first-part

    @property
    def has_signed(self) -> bool:
        """Whether this owner has signed the result of this agreement."""
        return self._page.result is not None

    def begin(self, number: int, session: str, position: int, title: str) -> None:
        """The round at `position` is opened, as sum `number`. Raises ConsentError unless nothing was offered to it.

        All metrics on one split are one round: two rounds would have the row counts in common.
        """
        last = self._page.round
        if last is not None and number <= last:  # check: rounds-only-go-up
            raise ConsentError(f"the coordinator opened round {number}, but the last one here was {last}")
        self._check_not_burned(session)  # check: burned-is-not-opened
        if any(offer.position == position for offer in self._page.offers):  # check: contributed-once
            raise ConsentError(
                f"{title}: already contributed under this agreement; contributing it again with different owners would "
                "expose one owner's share",
                hint="a new run needs a new agreement",
            )
        self._write(round=number)

    def offer(self, position: int, session: str, deliveries_digest: str) -> None:
        """Something of the round at `position` is about to leave. Raises ConsentError if the session was burned."""
        self._check_not_burned(session)  # check: burned-gives-no-part
        offer = Offer(position=position, session=session, deliveries_digest=deliveries_digest)
        if offer not in self._page.offers:
            others = tuple(each for each in self._page.offers if each.position != position)
            self._write(offers=(*others, offer))

    def reveal(self, session: str) -> None:
        """This owner is about to help unmask `session`. Raises ConsentError if it has burned it."""
        self._check_not_burned(session)
        self._write(revealed=tuple(sorted({*self._page.revealed, session})))

    def burn(self, session: str) -> None:
        """This owner will never help to unmask `session`. Raises ConsentError if it has."""
        if session in self._page.revealed:  # check: revealed-is-not-burned
            raise ConsentError("the coordinator asked to burn a session that this owner has helped to unmask")
        self._write(burned=tuple(sorted({*self._page.burned, session})))

    def release(self, session: str) -> None:
        """Nobody can unmask `session` any more, so what was offered to it may be offered again."""
        self._write(offers=tuple(offer for offer in self._page.offers if offer.session != session))

    def sign_result(self, body: str) -> None:
        """This owner is about to sign a result. Raises ConsentError if it has signed another under this agreement."""
        if self._page.result not in (None, body):  # check: one-result-is-signed
            raise ConsentError("the coordinator published another result under this agreement than the one signed here")
        self._write(result=body)

    def _check_not_burned(self, session: str) -> None:
        """Checked here, not only by forgetting the session: a deleted file can be back after a loss of power."""
        if session in self._page.burned:  # check: burned-stays-burned
            raise ConsentError("the coordinator continued a session that this owner has burned")

    @property
    def _page(self) -> Page:
        return self._book.pages.get(self._agreement_digest, Page())

    def _write(self, **changes: object) -> None:
        page = self._page.model_copy(update=changes)
        self._book = self._book.model_copy(update={"pages": {**self._book.pages, self._agreement_digest: page}})
        write_whole(self._path, self._book.model_dump_json().encode())


def _read(path: Path) -> Book:
    if not path.exists():
        return Book(version=2, pages={})
    try:
        return Book.model_validate_json(path.read_bytes())
    except ValidationError:
        raise SettingsError(
            f"{path}: damaged, so what was given before is unknown", hint="make a new agreement and a new state folder"
        ) from None
