"""What a run has reached, on the coordinator's disk, so that the same command goes on after a crash.

OUT/checkpoint/
    run.json     which run of which agreement, what each step cost, the sums that are in, the candidates that are out
    sum-N.bin    the N-th total, float64
    opening.bin  the masked sum of a session whose opening was asked for

A run is a fixed sequence of sums and candidates. A coordinator that is started again goes through it from the beginning
with the kept totals, without a message, until it comes to the first that is not kept. So a checkpoint holds totals:
it is readable by the coordinator alone, and removed with the run.
"""

import json
import logging
import secrets
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.certificates import Candidate
from common.errors import SettingsError
from common.messages import OpenSum
from common.private_file import make_private_folder, write_whole
from common.summation.accumulator import zeros_in_memory
from common.summation.protocol import Opening, Total
from common.tensor_layout import TensorLayout

RUN, OPENING = "run.json", "opening.bin"
MOST_BYTES_IN_MEMORY = 256_000_000  # a vector that is larger lies on the disk
PIECE_WORDS = 1 << 20
WORD_BYTES = 8
log = logging.getLogger("amalgram.coordinator")


@dataclass
class OwnerCost:
    """One owner's part in what a step cost. `waited_seconds`: how long its answers were waited for, and nobody else's;
    of owners that work at the same time, the first to answer has most of it.
    """

    waited_seconds: float = 0.0
    messages: int = 0  # to the owner; its node starts a process for each
    bytes_sent: int = 0  # to the owner
    bytes_received: int = 0  # from the owner


@dataclass
class Step:
    """What one step of a run cost; `seconds` from the first message to the last answer taken in."""

    name: str
    seconds: float = 0.0
    by_owner: dict[str, OwnerCost] = field(default_factory=dict)

    @property
    def bytes_sent(self) -> int:
        return sum(cost.bytes_sent for cost in self.by_owner.values())

    @property
    def bytes_received(self) -> int:
        return sum(cost.bytes_received for cost in self.by_owner.values())


@dataclass(frozen=True)
class SentCandidate:
    """A merged candidate, and the owners that have all of it."""

    model: str
    split: str
    digest: str
    bytes: int
    owners: tuple[str, ...] = ()

    @property
    def candidate(self) -> Candidate:
        return self.model, self.split, self.digest


@dataclass(kw_only=True)
class Checkpoint:
    """One run's progress. Every change is on the disk before the method returns."""

    folder: Path
    agreement_digest: str
    run: str = field(default_factory=lambda: secrets.token_hex(32))
    steps: list[Step] = field(default_factory=list)
    candidates: list[SentCandidate] = field(default_factory=list)  # those that every owner has
    sums: list[dict[str, Any]] = field(default_factory=list)
    seconds_before: float = 0.0  # of the earlier starts of this run
    opening_of: dict[str, Any] | None = None  # the OpenSum, and the state of its session
    _replayed: int = 0
    _started: float = field(default_factory=time.monotonic)

    @classmethod
    def open(cls, folder: Path, agreement_digest: str) -> "Checkpoint":
        """The run to go on with: the one in `folder`, or a new one. One of another agreement is removed."""
        if is_checkpoint_of(folder, agreement_digest):
            kept = json.loads((folder / RUN).read_bytes())
            log.info("going on with the run that was interrupted; %s holds what it had reached", folder)
            return cls(
                folder=folder,
                agreement_digest=agreement_digest,
                run=kept["run"],
                steps=[_step(step) for step in kept["steps"]],
                candidates=[_sent_candidate(candidate) for candidate in kept["candidates"]],
                sums=kept["sums"],
                seconds_before=kept["seconds"],
                opening_of=kept["opening_of"],
            )
        shutil.rmtree(folder, ignore_errors=True)
        checkpoint = cls(folder=folder, agreement_digest=agreement_digest)
        checkpoint.save()
        return checkpoint

    @property
    def seconds(self) -> float:
        """How long the run has taken, over all its starts."""
        return self.seconds_before + time.monotonic() - self._started

    def next_total(self, statistic: str, models: Sequence[str], layout: TensorLayout) -> Total | None:
        """The kept total of the sum that the run has come to, or None if this one is still to be done."""
        if self._replayed == len(self.sums):
            return None
        kept = self.sums[self._replayed]
        if [kept["statistic"], kept["models"], kept["layout"]] != [statistic, list(models), layout.digest()]:
            raise SettingsError(
                f"{self.folder}: the interrupted run summed {kept['statistic']} where this one sums {statistic}; "
                "another version of the software wrote it. Go on with that one, or begin a new agreement"
            )
        vector = self._read_array(self._total_file(self._replayed), layout.size).view("<f8")
        self._replayed += 1
        return Total(layout=layout, vector=vector, owners=tuple(kept["owners"]), roster_size=kept["roster_size"])

    def keep_total(self, statistic: str, models: Sequence[str], session: str, total: Total) -> None:
        write_whole(self._total_file(len(self.sums)), np.ascontiguousarray(total.vector).data.cast("B"))
        self.sums.append(
            {
                "statistic": statistic,
                "models": list(models),
                "session": session,
                "layout": total.layout.digest(),
                "owners": list(total.owners),
                "roster_size": total.roster_size,
            }
        )
        self._replayed = len(self.sums)
        self.opening_of = None
        self.save()
        (self.folder / OPENING).unlink(missing_ok=True)

    @property
    def opened_sessions(self) -> set[str]:
        """The sessions whose totals are kept."""
        return {kept["session"] for kept in self.sums}

    def keep_candidate(self, candidate: SentCandidate) -> None:
        self.candidates.append(candidate)
        self.save()

    def keep_opening(self, request: OpenSum, opening: Opening) -> None:
        """The owners are about to open a session: they do so once, so what opens with their help must not be lost."""
        write_whole(self.folder / OPENING, np.ascontiguousarray(opening.words).data.cast("B"))
        self.opening_of = {"request": asdict(request), "state": dict(opening.state), "size": len(opening.words)}
        self.save()

    def kept_opening(self) -> tuple[OpenSum, Opening] | None:
        if self.opening_of is None:
            return None
        vector = self._read_array(self.folder / OPENING, self.opening_of["size"])
        return OpenSum(**self.opening_of["request"]), Opening(self.opening_of["state"], vector)

    def save(self) -> None:
        make_private_folder(self.folder)
        content = {
            "run": self.run,
            "agreement_digest": self.agreement_digest,
            "seconds": self.seconds,
            "steps": [asdict(step) for step in self.steps],
            "candidates": [asdict(candidate) for candidate in self.candidates],
            "sums": self.sums,
            "opening_of": self.opening_of,
        }
        write_whole(self.folder / RUN, json.dumps(content).encode())

    def remove(self) -> None:
        """Delete all totals."""
        shutil.rmtree(self.folder)

    def zeros(self, size: int) -> NDArray[np.uint64]:
        """A new vector to gather a sum in. A large one is mapped from a file without a name, which goes with the
        vector, so that the system may take its memory when it is short of it.
        """
        if size * WORD_BYTES <= MOST_BYTES_IN_MEMORY:
            return zeros_in_memory(size)
        with TemporaryFile(dir=self.folder) as file:
            for start in range(0, size, PIECE_WORDS):  # written, so that a full disk is an error here or never
                file.write(bytes(WORD_BYTES * min(PIECE_WORDS, size - start)))
            return np.memmap(file, dtype="<u8", shape=(size,))

    def _total_file(self, number: int) -> Path:
        return self.folder / f"sum-{number}.bin"

    def _read_array(self, path: Path, size: int) -> NDArray[np.uint64]:
        """A kept vector (size,). Raises SettingsError if it is not whole."""
        found = path.stat().st_size // WORD_BYTES if path.is_file() else 0
        if found != size:
            raise SettingsError(
                f"{path}: holds {found} of {size} numbers; remove {path.parent} and begin anew, with a new agreement"
            )
        vector = self.zeros(size)
        with path.open("rb") as file:
            file.readinto(vector.data.cast("B"))
        return vector


def _sent_candidate(kept: dict[str, Any]) -> SentCandidate:
    return SentCandidate(**{**kept, "owners": tuple(kept["owners"])})


def _step(kept: dict[str, Any]) -> Step:
    by_owner = {owner: OwnerCost(**cost) for owner, cost in kept["by_owner"].items()}
    return Step(kept["name"], kept["seconds"], by_owner)


def is_checkpoint_of(folder: Path, agreement_digest: str) -> bool:
    """Whether `folder` holds a run of this agreement that has not ended. Raises SettingsError if it is damaged."""
    path = folder / RUN
    try:
        return path.is_file() and json.loads(path.read_bytes())["agreement_digest"] == agreement_digest
    except (ValueError, KeyError):
        raise SettingsError(f"{path}: is damaged; remove {folder} and begin anew, with a new agreement") from None
