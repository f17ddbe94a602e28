"""What this owner has given into a sum, once and for all. Kept for good, beyond runs, restarts and aborted sessions.

The same vector, opened with two different groups of owners, gives away a difference: somebody's vector. So a statistic
is offered to one session only. From the first masked part on, the others may be able to open that session without this
owner, so it counts as given until enough of them have signed that they never will (`release`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import ConsentError, SettingsError
from common.private_file import write_whole


class Ledger:
    """`ledger.json` of an owner's state folder. Every change is on the disk before the method returns."""

    def __init__(self, path: Path, agreement_digest: str) -> None:
        self._path = path
        try:
            self._everything: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
            page = self._everything.get(agreement_digest, {})
            self._round: int = page.get("round", -1)
            self._offered: dict[str, str] = dict(page.get("offered", {}))  # statistic -> session
            self._models: dict[str, str] = dict(page.get("models", {}))  # session -> digest of the models it is about
            self._revealed: set[str] = set(page.get("revealed", ()))
            self._burned: set[str] = set(page.get("burned", ()))
            self._result: str = page.get("result", "")  # the one result that this owner signed
        except (ValueError, AttributeError, TypeError):
            raise SettingsError(
                f"{path}: is damaged, so what was given before is not known; make a new agreement and state folder"
            ) from None
        self._agreement_digest = agreement_digest

    @property
    def earlier_contributions(self) -> int:
        """Under how many other agreements this owner has offered something."""
        return sum(bool(page.get("offered")) for key, page in self._everything.items() if key != self._agreement_digest)

    @property
    def pending(self) -> str:
        """A session that something was offered to and that this owner never helped to open; empty if there is none."""
        return next((session for session in self._offered.values() if session not in self._revealed), "")

    def has_revealed(self, statistic: str) -> bool:
        """Whether this owner has helped to open the one session that the statistic was offered to."""
        return self._offered.get(statistic) in self._revealed

    @property
    def models(self) -> set[str]:
        """`candidates_digest` of every sum that something was offered to."""
        return {self._models[session] for session in self._offered.values() if session in self._models}

    @property
    def has_signed(self) -> bool:
        """Whether this owner has signed the result of this agreement."""
        return self._result != ""

    def begin(self, round_number: int, session: str, statistic: str) -> None:
        """A sum is asked for. Raises ConsentError unless it is a new one, about what was never offered.

        All figures on one split are one statistic, for one sum: two sums would have the row counts in common.
        """
        if round_number <= self._round:
            raise ConsentError(f"the coordinator opened round {round_number}, the last one here was {self._round}")
        self._check_not_burned(session)
        if statistic in self._offered:
            raise ConsentError(
                f"{statistic} was given into a sum under this agreement before; the same again, summed with others, "
                "would show somebody's part. A new run needs a new agreement"
            )
        self._round = round_number
        self._write()

    def offer(self, statistic: str, session: str, models: str) -> None:
        """Something of this statistic is about to leave, in `session`, which is about `models`, a `candidates_digest`.
        Raises ConsentError if it was declared over.
        """
        self._check_not_burned(session)
        if self._offered.get(statistic) != session:
            self._offered[statistic] = session
            self._models[session] = models
            self._write()

    def reveal(self, session: str) -> None:
        """This owner is about to help open `session`. Raises ConsentError if it has declared it over."""
        self._check_not_burned(session)
        self._revealed.add(session)
        self._write()

    def burn(self, session: str) -> None:
        """This owner will never help to open `session`. Raises ConsentError if it has."""
        if session in self._revealed:
            raise ConsentError("the coordinator asked to declare a session over that this owner has helped to open")
        self._burned.add(session)
        self._write()

    def release(self, session: str) -> None:
        """Nobody can open `session` any more: what was offered to it may be offered again."""
        self._offered = {statistic: where for statistic, where in self._offered.items() if where != session}
        self._write()

    def sign_result(self, body: str) -> None:
        """This owner is about to sign a result. Raises ConsentError if it has signed another under this agreement."""
        if self._result not in ("", body):
            raise ConsentError("the coordinator published another result under this agreement than the one signed here")
        self._result = body
        self._write()

    def _check_not_burned(self, session: str) -> None:
        """Here, not only by forgetting the session: a file that was deleted can be back after a loss of power."""
        if session in self._burned:
            raise ConsentError("the coordinator goes on with a session that this owner has declared over")

    def _write(self) -> None:
        page: Mapping[str, Any] = {
            "round": self._round,
            "offered": self._offered,
            "models": self._models,
            "revealed": sorted(self._revealed),
            "burned": sorted(self._burned),
            "result": self._result,
        }
        self._everything[self._agreement_digest] = page
        write_whole(self._path, json.dumps(self._everything).encode())
