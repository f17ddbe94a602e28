"""What one identity has contributed, once and for all. Kept for good, beyond runs, restarts and aborted sessions.

The same vector, unmasked with two different groups of owners, exposes a difference: somebody's vector. So what a round
is about is offered to one session only. From the first masked part on, the others may be able to unmask that session
without this owner, so it counts as given until enough of them have signed that they never will (`release`).

The same rows or weight changes under two agreements expose a difference too. So the ledger knows what was contributed,
by sketches under a key that only this identity has, and under which terms. It belongs to the identity, not to a state
folder, and is in a file of its own beside the key. repeats.py decides what may be contributed again.
"""

import os
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from client.records import Record
from client.repeats import Contributed, Repeat, Terms, check_repeats, terms_of
from common import private_file
from common.agreement import Agreement
from common.errors import ConsentError, SettingsError
from common.privacy.noise import fresh_secret
from common.private_file import write_whole
from common.settings_file import Digest


class Offer(Record):
    """What left for the round at `position`, to one session; `deliveries_digest` is what it was measured with."""

    position: int
    session: str
    deliveries_digest: str


class Page(Record):
    """Everything under one agreement. `round`: the number of the last sum that was opened; `result`: the one signed.

    `ended`: the run that ended with this result, once everybody's signatures are kept.
    `contributed`: what its sums were about, noted before anything leaves; `terms`: what the agreement does with it.
    `given`: of each round that was measured for a plain sum, the SHA-256 of the vector, empty without privacy.epsilon;
    of a masked one, where it holds Grams with noise, or a refit's, once a part of it was about to leave.
    `noise`: the secret from which this owner's noise follows (common/privacy/noise.py), until the result is signed.
    """

    round: int | None = None
    offers: tuple[Offer, ...] = ()
    revealed: tuple[str, ...] = ()
    burned: tuple[str, ...] = ()
    result: str | None = None
    ended: str | None = None
    contributed: tuple[Contributed, ...] = ()
    terms: Terms | None = None
    given: dict[int, str] = Field(default_factory=dict)
    noise: Digest | None = Field(default=None, repr=False)


class Book(Record):
    """The whole file: whose it is, and a page for each agreement, by its digest."""

    version: Literal[2]
    identity: Digest  # the public key, in hexadecimal
    pages: dict[Digest, Page]


class Ledger:
    """One identity's ledger, open at the page of one agreement. Changes are on the disk before a method returns.

    Hold `locked` from opening the ledger to the last change.
    """

    def __init__(self, path: Path, public_key: bytes, agreement: Agreement, *, must_exist: bool) -> None:
        """`must_exist`: whether something was consented to before. Raises SettingsError if the ledger is not usable."""
        self._path = path
        self._agreement = agreement
        self._agreement_digest = agreement.digest()
        self._book = _read(path, public_key.hex(), must_exist=must_exist)

    def create(self) -> None:
        """Write an empty ledger if there is none yet, so that it is missed if it is gone later."""
        if not self._path.exists():
            self._write()

    def repeats(self, contributed: Contributed) -> tuple[Repeat, ...]:
        """The other agreements under which most of the same rows or weight changes were offered."""
        found = []
        for digest, page in self._book.pages.items():
            if digest == self._agreement_digest or page.terms is None:
                continue
            is_bounded = page.terms.epsilon is not None or self._agreement.privacy.epsilon is not None
            if not page.offers and not (is_bounded and page.given):  # check: plain-sums-spend-budgets-too
                continue
            shares = [contributed.shares_with(earlier, is_bounded=is_bounded) for earlier in page.contributed]
            rows = max((share for share, _ in shares), default=0.0)
            changes = max((share for _, share in shares), default=0.0)
            repeat = Repeat(agreement_digest=digest, terms=page.terms, rows=rows, weight_changes=changes)
            if repeat.is_one:
                found.append(repeat)
        return tuple(found)

    @property
    def pending(self) -> str:
        """The last session that something was offered to and that this owner never helped to unmask; empty if none is.

        An earlier one that was unmasked without this owner stays, and must not hide it.
        """
        pending = [offer.session for offer in self._page.offers if offer.session not in self._page.revealed]
        return pending[-1] if pending else ""  # check: the-last-session-is-pending

    def has_revealed(self, position: int) -> bool:
        """Whether this owner helped to unmask the round at `position`."""
        return any(offer.position == position and offer.session in self._page.revealed for offer in self._page.offers)

    @property
    def offered_deliveries(self) -> set[str]:
        """The `deliveries_digest` of every round that something was offered to."""
        return {offer.deliveries_digest for offer in self._page.offers}  # check: offers-count-from-the-first-part

    @property
    def has_given(self) -> bool:
        """Whether anything may have left under this agreement."""
        return bool(self._page.offers or self._page.given)

    @property
    def has_signed(self) -> bool:
        """Whether this owner has signed the result of this agreement."""
        return self._page.result is not None

    def has_ended(self, run: str) -> bool:
        """Whether `run` ended under this agreement, so that the result is known."""
        return self.has_signed and self._page.ended == run

    @property
    def next_round(self) -> int:
        """The lowest number that a sum may be opened under."""
        return 0 if self._page.round is None else self._page.round + 1

    def begin(
        self, number: int, session: str, position: int, title: str, contributed: Contributed | None, again: Set[str]
    ) -> None:
        """The round at `position` is opened, as sum `number`. Raises ConsentError unless nothing was offered to it.

        All metrics on one split are one round: two rounds would have the row counts in common. `contributed`: what the
        round is about, None for metrics; `again`: the agreements that this owner consented to repeat.
        """
        if number < self.next_round:  # check: rounds-only-go-up
            raise ConsentError(f"the coordinator opened round {number}, but the last one here was {self._page.round}")
        self._check_not_burned(session)  # check: burned-is-not-opened
        if any(offer.position == position for offer in self._page.offers):  # check: contributed-once
            raise ConsentError(
                f"{title}: already contributed under this agreement; contributing it again with different owners would "
                "expose one owner's share",
                hint="a new run needs a new agreement",
            )
        if contributed is None:
            self._write(round=number)
            return
        terms, before = terms_of(self._agreement), self._page.contributed
        check_repeats(terms, self.repeats(contributed), again)  # check: rows-are-contributed-once
        distinct = before if contributed in before else (*before, contributed)
        self._write(round=number, contributed=distinct, terms=terms)

    def offer(self, position: int, session: str, deliveries_digest: str, again: Set[str]) -> None:
        """Something of the round at `position` is about to leave. Raises ConsentError if the session was burned, or if
        the same was offered under another agreement since the round was opened.
        """
        self._check_not_burned(session)  # check: burned-gives-no-part
        for contributed in self._page.contributed:
            check_repeats(terms_of(self._agreement), self.repeats(contributed), again)  # check: offered-elsewhere-since
        offer = Offer(position=position, session=session, deliveries_digest=deliveries_digest)
        if offer not in self._page.offers:
            others = tuple(each for each in self._page.offers if each.position != position)
            self._write(offers=(*others, offer))

    def answer(self, position: int, session: str, vector_digest: Callable[[], str]) -> None:
        """Something of the round at `position` is about to leave for a masked sum, and holds statistics of rows with
        noise. Raises ConsentError if another vector of it left before, even for a session that was burned: whoever
        colludes with enough owners can have opened that one.
        """
        if all((offer.position, offer.session) != (position, session) for offer in self._page.offers):
            self.give(position, vector_digest())  # check: masked-sums-with-noise-stay-the-same

    def give(self, position: int, vector_digest: str) -> None:
        """The round at `position` was measured for a sum that may be asked for again. Raises ConsentError if it was
        measured before as another vector, about other models or rows: with noise, every answer costs the budget.
        """
        if self._page.given.get(position, vector_digest) != vector_digest:  # check: plain-sums-with-noise-stay-the-same
            raise ConsentError(
                "the coordinator asked again for a sum with noise, and it is another one now: a model that was "
                "sent has changed, or a file",
                hint="put the files back as they were; if they have not changed, a new run needs a new agreement",
            )
        self._write(given={**self._page.given, position: vector_digest})

    def reveal(self, session: str) -> None:
        """This owner is about to help unmask `session`. Raises ConsentError if it has burned it."""
        self._check_not_burned(session)
        self._write(revealed=tuple(sorted({*self._page.revealed, session})))

    def burn(self, session: str) -> None:
        """This owner will never help to unmask `session`. Raises ConsentError if it has."""
        if session in self._page.revealed:  # check: revealed-is-not-burned
            raise ConsentError("the coordinator asked to burn a session that this owner has helped to unmask")
        self._write(burned=tuple(sorted({*self._page.burned, session})))

    def give_up(self, session: str) -> None:
        """The rules of `session` were broken. It is never continued, even if its files come back from a backup."""
        if session not in self._page.revealed:
            self.burn(session)

    def release(self, session: str) -> None:
        """Nobody can unmask `session` any more, so what was offered to it may be offered again."""
        self._write(offers=tuple(offer for offer in self._page.offers if offer.session != session))

    def sign_result(self, body: str) -> None:
        """This owner is about to sign a result. Raises ConsentError if it has signed another under this agreement."""
        if self._page.result not in (None, body):  # check: one-result-is-signed
            raise ConsentError("the coordinator published another result under this agreement than the one signed here")
        self._write(result=body, noise=None)

    def end(self, run: str) -> None:
        """Everybody's signatures under the result are kept. Raises ConsentError for another run than the first one."""
        if self._page.ended not in (None, run):  # check: an-agreement-ends-once
            raise ConsentError("the coordinator ended a second run under this agreement")
        self._write(ended=run)

    def noise_secret(self) -> bytes:
        """The secret of this owner's noise under this agreement: drawn once, so that whoever asks for the same numbers
        again, in whichever session, gets the same noise. With the result it is forgotten: then raises ConsentError.
        """
        if self.has_signed:  # check: forgotten-noise-is-not-drawn-anew
            raise ConsentError("the coordinator asked for sums with noise after the result")
        if self._page.noise is None:  # check: noise-is-drawn-once
            self._write(noise=fresh_secret().hex())
        assert self._page.noise is not None
        return bytes.fromhex(self._page.noise)

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
        try:
            write_whole(self._path.resolve(), self._book.model_dump_json().encode())
        except OSError as error:
            raise _not_writable(self._path, error.strerror) from None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time uses the ledger `path`, whichever state folder it has."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(0, "the folder is read-only")
    except OSError as error:
        raise _not_writable(path, error.strerror) from None
    with private_file.locked(path.with_name(f"{path.name}.lock")):
        yield


def _not_writable(path: Path, reason: str | None) -> SettingsError:
    return SettingsError(
        f"{path}: the ledger cannot be written here ({reason}); nothing has left",
        hint="if keys are read-only, name a file elsewhere as ledger in the settings file, and keep it for good",
    )


def _read(path: Path, identity: str, *, must_exist: bool) -> Book:
    try:
        book = Book.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        if must_exist or path.is_symlink():  # check: missing-ledger-is-not-empty
            raise SettingsError(
                f"{path}: the ledger is missing, so what was given before is unknown",
                hint="put it back, or make new keys and a new agreement; contribute none of the rows given before",
            ) from None
        return Book(version=2, identity=identity, pages={})
    except ValidationError:
        raise SettingsError(
            f"{path}: damaged, so what was given before is unknown",
            hint="make new keys and a new agreement; contribute none of the rows given before",
        ) from None
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror}), so what was given is unknown") from None
    if book.identity != identity:  # check: ledger-is-of-this-identity
        raise SettingsError(
            f"{path}: the ledger of another identity ({book.identity[:16]}..., this one is {identity[:16]}...)",
            hint="name this identity's own file as ledger",
        )
    return book
