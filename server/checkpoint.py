"""What a run has reached, on the coordinator's disk, so that the same command resumes it after a crash.

OUT/checkpoint/
    run.json     SavedRun: which run of which agreement, the rounds that are summed, what was delivered, step costs,
                 and which owners broke the rules
    sum-N.bin    the total of the N-th round, float64
    open-N.bin   the masked vectors of the N-th round, if every owner opens it, until they have them
    opening.bin  the masked sum of a session that the owners were asked to open
    growing.bin  the sum that is being collected or unmasked, if it is large; it becomes sum-N.bin

A run is a fixed sequence of deliveries and rounds (common/schedule.py). A coordinator that restarts goes through it
from the beginning with the saved totals, without a message, until it reaches the first round that is not saved. So a
checkpoint holds totals: only the coordinator can read it, and it is removed with the run.
"""

import json
import logging
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any, ClassVar, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from common import saved_state
from common.certificates import Delivered
from common.errors import ProtocolError, SettingsError
from common.mapped import pieces
from common.messages import Envelope, OpenSum, UploadsOpened, decode, encode
from common.private_file import create, make_private_folder, rename_whole, take_room, write_pieces_whole, write_whole
from common.schedule import Round
from common.settings_file import Count, Digest, Hex
from common.summation.accumulator import zeros_in_memory
from common.summation.protocol import Opening, SavedOpening, Total
from common.text import shown

VERSION: Final = 7  # of run.json
RUN, OPENING, GROWING = "run.json", "opening.bin", "growing.bin"
MAX_BYTES_IN_MEMORY = 256_000_000  # a larger vector lies on the disk
WORD_BYTES = 8
EXACT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
log = logging.getLogger("amalgram.coordinator")

Seconds = Annotated[float, Field(ge=0)]


# --- what is saved ---


@dataclass
class OwnerCost:
    """One owner's share in what a step cost.

    `waited_seconds`: how long the coordinator waited for this owner and nobody else. When owners work at the same time,
    the first to answer has most of it.
    """

    __pydantic_config__: ClassVar[ConfigDict] = EXACT
    waited_seconds: Seconds = 0.0
    messages: Count = 0  # to the owner, whose node starts a process for each
    bytes_sent: Count = 0  # to the owner
    bytes_received: Count = 0  # from the owner


@dataclass
class Step:
    """What one step of a run cost, from its first message to the last answer; `phase` groups steps for people."""

    __pydantic_config__: ClassVar[ConfigDict] = EXACT
    name: str
    phase: str
    seconds: Seconds = 0.0
    by_owner: dict[str, OwnerCost] = field(default_factory=dict)

    @property
    def bytes_sent(self) -> int:
        return sum(cost.bytes_sent for cost in self.by_owner.values())

    @property
    def bytes_received(self) -> int:
        return sum(cost.bytes_received for cost in self.by_owner.values())


class Saved(BaseModel):
    """Base of everything in run.json: frozen, strict, no unknown keys."""

    model_config = EXACT | ConfigDict(frozen=True)


class SavedDelivery(Saved):
    """What was sent to the owners at `position` of the schedule (certificates.Delivered), and who has all of it."""

    position: Count
    model: str
    digest: Digest
    bytes: Count
    owners: tuple[str, ...]

    @property
    def delivered(self) -> Delivered:
        return Delivered(position=self.position, model=self.model, digest=self.digest)


class SavedUploads(Saved):
    """An UploadsOpened without its vectors: `proofs` in hexadecimal, the vectors' size and ring."""

    proofs: Hex
    size: Count
    ring_bits: Literal[32, 64]


class SavedSum(Saved):
    """A round whose total is saved; `layout` is the digest of its layout.

    `opened`: what the owners need to open it themselves, too, beside the masked vectors; None once all of them have it.
    `relayed_to`: those that do.
    """

    position: Count
    session: Digest
    layout: Digest
    owners: tuple[str, ...]
    roster_size: Count
    opened: SavedUploads | None = None
    relayed_to: tuple[str, ...] = ()


class OpenedSession(Saved):
    """A session that the owners were asked to open: its OpenSum, the state of the sum, the size of opening.bin."""

    request: dict[str, str | int]
    state: dict[str, JsonValue]
    size: Count


class SavedRun(Saved):
    """The content of run.json."""

    version: Literal[7] = VERSION
    agreement_digest: Digest
    run: Digest
    seconds: Seconds
    steps: tuple[Step, ...]
    deliveries: tuple[SavedDelivery, ...]
    sums: tuple[SavedSum, ...]
    opening: OpenedSession | None
    excluded: dict[str, str]
    nonces: dict[str, Hex]  # position of a correction or a check -> records.Nonce of every owner, in hexadecimal


# --- reading and writing it ---


@dataclass(kw_only=True)
class Checkpoint:
    """One run's progress. Every change is on the disk before the method returns."""

    folder: Path
    agreement_digest: str
    run: str = field(default_factory=lambda: secrets.token_hex(32))
    steps: list[Step] = field(default_factory=list)
    deliveries: list[SavedDelivery] = field(default_factory=list)  # those that every owner had that then took part
    sums: list[SavedSum] = field(default_factory=list)
    excluded: dict[str, str] = field(default_factory=dict)  # owner that broke the rules of a sum -> what it did
    nonces: dict[str, str] = field(default_factory=dict)
    seconds_before: float = 0.0  # of the earlier starts of this run
    _opening: OpenedSession | None = None
    _replayed: int = 0
    _started: float = field(default_factory=time.monotonic)

    @classmethod
    def open(cls, folder: Path, agreement_digest: str) -> "Checkpoint":
        """The run to resume from `folder`, or else a new one. A checkpoint of another agreement is removed.

        Raises SettingsError for a checkpoint that is damaged or that another version wrote.
        """
        saved = _read(folder)
        if saved is not None and saved.agreement_digest == agreement_digest:
            log.info("resuming the interrupted run in %s", folder)
            return cls(
                folder=folder,
                agreement_digest=agreement_digest,
                run=saved.run,
                steps=list(saved.steps),
                deliveries=list(saved.deliveries),
                sums=list(saved.sums),
                excluded=dict(saved.excluded),
                nonces=dict(saved.nonces),
                seconds_before=saved.seconds,
                _opening=saved.opening,
            )
        shutil.rmtree(folder, ignore_errors=True)
        checkpoint = cls(folder=folder, agreement_digest=agreement_digest)
        checkpoint.save()
        return checkpoint

    @property
    def seconds(self) -> float:
        """How long the run has taken, over all its starts."""
        return self.seconds_before + time.monotonic() - self._started

    def next_total(self, round: Round) -> Total | None:
        """The saved total of the round that the run has come to, or None if it is still to be summed."""
        if self._replayed == len(self.sums):
            return None
        saved = self.sums[self._replayed]
        if (saved.position, saved.layout) != (round.position, round.layout.digest()):
            raise SettingsError(
                f"{self.folder}: another version wrote it, with a different total in place of the {round.name}",
                hint="resume with that version, or start anew with a new agreement",
            )
        vector = self._saved_total(self._replayed, round.layout.size)
        self._replayed += 1
        return Total(layout=round.layout, vector=vector, owners=saved.owners, roster_size=saved.roster_size)

    def save_total(self, round: Round, session: str, total: Total, uploads: UploadsOpened | None = None) -> None:
        """Save the total of a round; the session that gave it is open, and needs no help any more. A large total stays
        where it grew, and so is on the disk once: nobody may write to it any more.

        `uploads`: what all owners must still be given to open it themselves.
        """
        if uploads is not None:
            _write_array(self._uploads_file(len(self.sums)), uploads.payload)
        if isinstance(total.vector, np.memmap):  # of what `growing` gave
            rename_whole(self._growing_file, self._total_file(len(self.sums)))
        else:
            _write_array(self._total_file(len(self.sums)), total.vector)
        self.sums.append(
            SavedSum(
                position=round.position,
                session=session,
                layout=total.layout.digest(),
                owners=total.owners,
                roster_size=total.roster_size,
                opened=_saved_uploads(uploads),
            )
        )
        self._replayed = len(self.sums)
        self._opening = None
        self.save()
        (self.folder / OPENING).unlink(missing_ok=True)

    def uploads_to_relay(self) -> UploadsOpened | None:
        """What the owners must still be given to open the round that was come to last."""
        number = self._replayed - 1
        saved = self.sums[number]
        if saved.opened is None:
            return None
        dtype = np.dtype(f"<u{saved.opened.ring_bits // 8}")
        content = self._uploads_file(number).read_bytes()
        if len(content) != saved.opened.size * dtype.itemsize:
            raise SettingsError(f"{self._uploads_file(number)}: is incomplete", hint=_start_anew(self.folder))
        return UploadsOpened(
            session=saved.session, proofs=bytes.fromhex(saved.opened.proofs), payload=np.frombuffer(content, dtype)
        )

    @property
    def relayed_to(self) -> tuple[str, ...]:
        """The owners that have opened the round that was come to last."""
        return self.sums[self._replayed - 1].relayed_to

    def uploads_relayed(self, owners: Sequence[str]) -> None:
        """Some owners have opened the round that was come to last. What the others need stays until they have."""
        number = self._replayed - 1
        saved = self.sums[number]
        relayed_to = tuple(owner for owner in saved.owners if owner in (*saved.relayed_to, *owners))
        opened = None if relayed_to == saved.owners else saved.opened
        self.sums[number] = saved.model_copy(update={"opened": opened, "relayed_to": relayed_to})
        self.save()
        if opened is None:
            self._uploads_file(number).unlink(missing_ok=True)

    def save_nonces(self, position: int, nonces: bytes) -> None:
        self.nonces[str(position)] = nonces.hex()
        self.save()

    def saved_nonces(self, position: int) -> bytes | None:
        """What the owners drew for the corrections or the check at `position`; None if they have not."""
        found = self.nonces.get(str(position))
        return None if found is None else bytes.fromhex(found)

    @property
    def opened_sessions(self) -> set[str]:
        """The sessions whose totals are saved."""
        return {saved.session for saved in self.sums}

    def save_delivery(self, delivery: SavedDelivery) -> None:
        self.deliveries.append(delivery)
        self.save()

    def delivered_to(self, delivery: SavedDelivery, owners: Sequence[str]) -> None:
        """More owners have one of `deliveries`."""
        everybody = delivery.model_copy(update={"owners": (*delivery.owners, *owners)})
        self.deliveries[self.deliveries.index(delivery)] = everybody
        self.save()

    def save_excluded(self, owner: str, reason: str) -> None:
        """`owner` is left out from now on, and after a restart."""
        self.excluded.setdefault(owner, reason)
        self.save()

    def save_opening(self, request: OpenSum, opening: Opening) -> None:
        """Save a session before the owners open it. They do so only once, so the result must not be lost."""
        _write_array(self.folder / OPENING, opening.words)
        state = saved_state.to_json(SavedOpening, opening.state)
        self._opening = OpenedSession(request=_fields(request), state=state, size=len(opening.words))
        self.save()

    @property
    def opening_session(self) -> str:
        """The session of `saved_opening`, whose sum is not read; empty if there is none."""
        return "" if self._opening is None else _open_sum(self._opening.request).session

    def saved_opening(self) -> tuple[OpenSum, Opening] | None:
        """The session that the owners were asked to open when an earlier start of this run ended."""
        if self._opening is None:
            return None
        self._check_size(self.folder / OPENING, self._opening.size)  # before the disk must have room for it again
        words = self.growing(self._opening.size)
        _read_into(words, self.folder / OPENING)
        return _open_sum(self._opening.request), Opening(
            saved_state.from_json(SavedOpening, self._opening.state), words
        )

    def save(self) -> None:
        """Write run.json."""
        make_private_folder(self.folder)
        saved = SavedRun(
            agreement_digest=self.agreement_digest,
            run=self.run,
            seconds=self.seconds,
            steps=tuple(self.steps),
            deliveries=tuple(self.deliveries),
            sums=tuple(self.sums),
            opening=self._opening,
            excluded=self.excluded,
            nonces=self.nonces,
        )
        write_whole(self.folder / RUN, saved.model_dump_json().encode())

    def remove(self) -> None:
        """Delete all totals."""
        shutil.rmtree(self.folder)

    def zeros(self, size: int) -> NDArray[np.uint64]:
        """A new vector of zeros, (size,).

        A large one is mapped from a file without a name, which disappears with the vector. The system can then reclaim
        its memory when it is short.
        """
        if size * WORD_BYTES <= MAX_BYTES_IN_MEMORY:
            return zeros_in_memory(size)
        with TemporaryFile(dir=self.folder) as file:
            take_room(file, size * WORD_BYTES)
            return np.memmap(file, dtype="<u8", shape=(size,))

    def growing(self, size: int) -> NDArray[np.uint64]:
        """The same for a sum that will be saved. There is one at a time, in a file that gets its name once it is saved
        (`save_total`).
        """
        if size * WORD_BYTES <= MAX_BYTES_IN_MEMORY:
            return zeros_in_memory(size)
        for left_over in (self._growing_file, self._total_file(len(self.sums))):  # by a start that was killed
            left_over.unlink(missing_ok=True)
        with create(self._growing_file) as file:
            try:
                take_room(file, size * WORD_BYTES)
            except OSError:  # a full disk gets back what there was of it
                self._growing_file.unlink()
                raise
        return np.memmap(self._growing_file, dtype="<u8", mode="r+", shape=(size,))

    @property
    def _growing_file(self) -> Path:
        return self.folder / GROWING

    def _total_file(self, number: int) -> Path:
        return self.folder / f"sum-{number}.bin"

    def _uploads_file(self, number: int) -> Path:
        return self.folder / f"open-{number}.bin"

    def _saved_total(self, number: int, size: int) -> NDArray[np.float64]:
        """The vector of a saved total, (size,). Nobody may write to a large one, from whose file the run may have to
        resume. Raises SettingsError if it is incomplete.
        """
        path = self._total_file(number)
        self._check_size(path, size)
        if size * WORD_BYTES > MAX_BYTES_IN_MEMORY:
            # Shared with the file: a private mapping may not be larger than the machine's memory, written to or not.
            return np.memmap(path, dtype="<f8", mode="r+", shape=(size,))
        vector = zeros_in_memory(size)
        _read_into(vector, path)
        return vector.view("<f8")

    def _check_size(self, path: Path, size: int) -> None:
        """Raise SettingsError if a saved vector is incomplete."""
        found = path.stat().st_size // WORD_BYTES if path.is_file() else 0
        if found != size:
            raise SettingsError(f"{path}: holds {found} of {size} numbers", hint=_start_anew(self.folder))


def _read_into(vector: NDArray[np.uint64], path: Path) -> None:
    with path.open("rb") as file:
        for piece in pieces(vector):
            file.readinto(piece.data.cast("B"))


def _write_array(path: Path, array: NDArray) -> None:
    """Write a flat array, whole or not at all, and never more than a piece of one that is mapped from a file."""
    write_pieces_whole(path, (piece.data.cast("B") for piece in pieces(np.ascontiguousarray(array))))


def is_checkpoint_of(folder: Path, agreement_digest: str) -> bool:
    """Whether `folder` holds an unfinished run of this agreement.

    Raises SettingsError for a checkpoint that is damaged or that another version wrote.
    """
    saved = _read(folder)
    return saved is not None and saved.agreement_digest == agreement_digest


def _read(folder: Path) -> SavedRun | None:
    path = folder / RUN
    if not path.is_file():
        return None
    content = path.read_bytes()
    try:
        values: Any = json.loads(content)
        version = values.get("version", 1) if isinstance(values, dict) else VERSION
        if version != VERSION:
            raise SettingsError(
                f"{path}: another version of Amalgram wrote it (format {shown(str(version)[:20])}, this one reads "
                f"format {VERSION})",
                hint=f"resume with that version, or {_start_anew(folder)}",
            )
        saved = SavedRun.model_validate_json(content)
        if saved.opening is not None:
            _open_sum(saved.opening.request)
            saved_state.from_json(SavedOpening, saved.opening.state)
    except (ValueError, ValidationError, ProtocolError):
        raise SettingsError(f"{path}: is damaged", hint=_start_anew(folder)) from None
    return saved


def _saved_uploads(uploads: UploadsOpened | None) -> SavedUploads | None:
    if uploads is None:
        return None
    ring_bits: Literal[32, 64] = 32 if uploads.payload.itemsize == 4 else 64
    return SavedUploads(proofs=uploads.proofs.hex(), size=uploads.payload.size, ring_bits=ring_bits)


def _fields(request: OpenSum) -> dict[str, str | int]:
    return {name: value for name, value in encode(request).fields.items() if not isinstance(value, bytes)}


def _open_sum(fields: Mapping[str, str | int]) -> OpenSum:
    """Raises RemoteProtocolError unless `fields` make exactly one."""
    message = decode(Envelope(kind=OpenSum.__name__, fields=dict(fields), payload=None))
    assert isinstance(message, OpenSum)
    return message


def _start_anew(folder: Path) -> str:
    return f"remove {folder} and start anew, with a new agreement"
