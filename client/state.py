"""What an owner keeps between two messages: typed files in its own state folder, readable by nobody else.

    version             which version of this format the folder has
    identity            whose folder it is: a public key
    run/                the run in progress; a new run, or the end of this one, deletes it
        run.json        RunState: which run, how far it is, what arrived
        round.json      OpenRound: the secure sum in progress, with its secrets
        *.layout.json   the layouts of arrays that outlive a message, so that most messages need no model
        *.bin           arrays: the vector of the open round, what is arriving, what has arrived
    consent.json, receipts/, fine_tuned/, error.txt       what outlives a run
    evidence/           what is known of a model that was sent and is not the merge

The ledger (ledger.py) is elsewhere, because it outlives this folder.

Nothing is kept in Flower's own context, which outlives a run and which other processes of the machine can read.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from client.records import Record
from common import private_file
from common.certificates import Delivered
from common.errors import DataError, LocalProtocolError, RemoteProtocolError, SettingsError
from common.messages import Envelope, OpenSum, Result, decode
from common.metrics import Score, Sums
from common.private_file import make_private_folder, write_whole
from common.publication import PublishedFolder, PublishedReceipts
from common.settings_file import Digest, Hex
from common.tensor_layout import TensorLayout
from common.text import shown, shown_lines

STATE_VERSION = 5
EVIDENCE = "evidence"  # the folder of what is not the merge; a file for each agreement
# The array in which a round's vector is made. A process that is killed meanwhile leaves no "vector" for later messages.
MEASURED = "measured"  # check: half-a-vector-is-none
FINE_TUNED = "fine_tuned"  # the folder of a model that was made here
RoundKind = Literal["scales", "contribution", "step", "check", "metrics"]  # schedule.RoundKind needs more imports
Position = Annotated[int, Field(ge=0, lt=2**63)]  # of an event in the schedule


class ReceivedRecord(Record):
    """A delivery that has arrived whole (certificates.Delivered), and the coordinator's signature under it."""

    position: Position
    model: str
    digest: Digest
    signature: Hex

    @property
    def delivered(self) -> Delivered:
        return Delivered(position=self.position, model=self.model, digest=self.digest)


class ScoreRecord(Record):
    """How the candidate that was delivered at `position` did here; `model_digest` is of the model it makes."""

    position: int
    model: str
    model_digest: str
    correct: int | None
    rows: int
    metric: float
    pearson_r: float | None = None
    sums: Sums = ()
    cut: tuple[int, int] | None = None
    groups: Sums = ()


class TestedRecord(Record):
    """How a model of the test round did here, as this owner contributed it."""

    model: str
    correct: int | None
    rows: int
    metric: float
    pearson_r: float | None = None
    sums: Sums = ()
    cut: tuple[int, int] | None = None
    groups: Sums = ()


class ArrivingRecord(Record):
    """A delivery of which parts are still to come."""

    position: int
    model: str
    next_part: int


class SummedRecord(Record):
    """The owners whose vectors are in the round at `position`, as this owner signed."""

    position: int
    owners: tuple[str, ...]


class DrawnRecord(Record):
    """The nonce that was drawn here for the corrections due at `position`; `delivered`: the digest of what was sent
    before; `nonces`: those of all owners, once the corrections have arrived; `blind` never leaves: it decides by what
    this owner multiplies its scales, and is the same for all checks of the run. All in hexadecimal.
    """

    position: int
    delivered: Hex
    nonce: Hex
    blind: Hex
    nonces: Hex = ""


class CheckRecord(Record):
    """The key that was drawn here for the check at `position`; `delivered`: the digest of what was sent before. `seed`
    never leaves. Once this owner has given its shares: `keys`, everybody's; `session`, the sum's; `upload`, the digest
    of what it gave. All in hexadecimal.
    """

    position: int
    delivered: Hex
    seed: Hex
    keys: Hex = ""
    session: Hex = ""
    upload: Hex = ""


class TotalRecord(Record):
    """The metrics of all owners, as this owner added them up; `metrics`: a SignedMean, in JSON."""

    split: Literal["validation", "test"]  # check: kept-splits-are-two
    model: str
    metrics: str


class ResultRecord(Record):
    """The coordinator's signed result."""

    model: str
    model_digest: Digest
    deliveries_digest: Digest
    publication: str
    signature: Hex

    @classmethod
    def of(cls, message: Result) -> "ResultRecord":
        return cls(
            model=message.model,
            model_digest=message.model_digest,
            deliveries_digest=message.deliveries_digest,
            publication=message.publication.decode(),
            signature=message.signature.hex(),
        )

    def in_run(self, run: str) -> Result:
        """The message that this is kept of."""
        return Result(
            run=run,
            model=self.model,
            model_digest=self.model_digest,
            deliveries_digest=self.deliveries_digest,
            publication=self.publication.encode(),
            signature=bytes.fromhex(self.signature),
        )


class RunState(Record):
    """How far a run is. `begun`: the position in the schedule of the last event; `is_complete`: whether it is over.
    `opened`: the sessions that this owner added up by itself.

    `tested`: what this owner contributed to the test round; `published`: the folder that it would publish itself. Where
    merges are verified: `summed`, `drawn`, `check` until it is made, and `verified`, the positions of the deliveries
    that are; `totals`.
    """

    run: str
    agreement_digest: str
    begun: int | None = None
    opened: tuple[str, ...] = ()
    is_complete: bool = True
    received: tuple[ReceivedRecord, ...] = ()
    scores: tuple[ScoreRecord, ...] = ()
    tested: tuple[TestedRecord, ...] = ()
    published: PublishedFolder | None = None
    summed: tuple[SummedRecord, ...] = ()
    drawn: DrawnRecord | None = None
    check: CheckRecord | None = None
    verified: tuple[int, ...] = ()
    totals: tuple[TotalRecord, ...] = ()
    arriving: ArrivingRecord | None = None
    result: ResultRecord | None = None

    @property
    def delivered(self) -> list[Delivered]:
        """Everything that this owner was sent in this run, in order."""
        return [each.delivered for each in self.received]

    def score_at(self, position: int) -> ScoreRecord | None:
        """How the candidate of that position did; None if it has not arrived."""
        return next((each for each in self.scores if each.position == position), None)

    def signed_result(self) -> Result | None:
        """The result that the coordinator sent; None if it has not arrived."""
        return None if self.result is None else self.result.in_run(self.run)


class Consent(Record):
    """`again`: the digests of earlier agreements whose rows or weight changes may be contributed once more."""

    when: str
    again: tuple[str, ...] = ()


class Consents(Record):
    """Everything that this owner consented to, by agreement digest."""

    agreements: dict[str, Consent]


class OpenRound(Record):
    """The secure sum in progress: the kind of round, the message that opened it, this owner's side with its secrets."""

    kind: RoundKind
    request: dict[str, str | int]
    side: dict[str, Any]

    @property
    def open_sum(self) -> OpenSum:
        """Raises RemoteProtocolError unless the kept fields make exactly one."""
        message = decode(Envelope(kind=OpenSum.__name__, fields=dict(self.request), payload=None))
        assert isinstance(message, OpenSum)
        return message


R = TypeVar("R", bound=Record)


def merged_step_array(method: str, step: int) -> str:
    """The name of the array that holds what a step merged."""
    return f"merged-{method}-{step}"


def own_array(position: int) -> str:
    """The name of the array that holds what this owner contributed to a round, until it is verified what came of it."""
    return f"own-{position}"


def delivered_array(position: int) -> str:
    """The name of the array that holds a candidate or a correction."""
    return f"delivered-{position}"


def score_record(position: int, model: str, model_digest: str, score: Score) -> ScoreRecord:
    return ScoreRecord(position=position, model=model, model_digest=model_digest, **asdict(score))


class OwnerState:
    """The state folder of one identity. Raises SettingsError for a folder of another version, or another identity."""

    def __init__(self, folder: Path, public_key: bytes) -> None:
        self.folder = folder
        self._parsed: dict[str, tuple[bytes, Record]] = {}  # what a file of the run said last
        make_private_folder(folder)
        self._check_version()
        self._check_identity(public_key.hex())

    def _check_version(self) -> None:
        path = self.folder / "version"
        if path.is_file():
            found = shown(path.read_text(errors="replace").strip()[:20])
        else:
            found = "1" if any((self.folder / name).exists() for name in ("ledger.json", "consent.json", "run")) else ""
        if found not in ("", str(STATE_VERSION)):  # check: state-is-of-this-version
            raise SettingsError(
                f"{self.folder}: state of version {found}, this program writes version {STATE_VERSION}",
                hint="finish its run with the version that wrote it; name a new state folder for a new agreement",
            )
        if not found:
            write_whole(path, f"{STATE_VERSION}\n".encode())

    def _check_identity(self, mine: str) -> None:
        """What one owner consented to, or was sent, is nothing to another one that names the same folder."""
        path = self.folder / "identity"
        with suppress(FileExistsError), private_file.create(path) as file:
            file.write(f"{mine}\n".encode())
        found = shown(path.read_text(errors="replace").strip())
        if found != mine:  # check: state-is-of-this-identity
            raise SettingsError(
                f"{self.folder}: state of another identity ({found[:16]}..., this one is {mine[:16]}...)",
                hint="every owner needs a folder of its own: name one as state in its settings file",
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One message at a time: two processes that both read the same step could each take another next one."""
        with private_file.locked(self.folder / "lock"):
            yield

    # --- the run in progress ---

    def start_run(self, run: str, agreement_digest: str) -> None:
        """Begin this run under this agreement, or resume it; any other run is forgotten."""
        (self.folder / "error.txt").unlink(missing_ok=True)
        kept = self._read("run", RunState)
        if kept is not None and (kept.run, kept.agreement_digest) == (run, agreement_digest):
            return
        self.end_run()
        make_private_folder(self._run_folder)
        self._write("run", RunState(run=run, agreement_digest=agreement_digest))

    def check_run(self, run: str, agreement_digest: str) -> None:
        """Raise RemoteProtocolError unless `run` is the one in progress, and under this agreement."""
        kept = self._read("run", RunState)
        if kept is None or (kept.run, kept.agreement_digest) != (
            run,
            agreement_digest,
        ):  # check: run-keeps-its-agreement
            raise RemoteProtocolError("the coordinator's message belongs to another run or agreement")

    @property
    def run(self) -> RunState:
        """The run in progress. Raises RemoteProtocolError if there is none."""
        kept = self._read("run", RunState)
        if kept is None:
            raise RemoteProtocolError("the coordinator's message belongs to no run that was started here")
        return kept

    def update_run(self, **changes: object) -> None:
        """Write the run's state with some fields replaced."""
        self._write("run", self.run.model_copy(update=changes))

    def end_run(self) -> None:
        """Forget the run, whole or not at all: from half a run, another could be begun that resumes from the rest."""
        self._parsed.clear()  # check: forgotten-runs-leave-memory
        forgotten = self.folder / "run.forgotten"
        shutil.rmtree(forgotten, ignore_errors=True)
        if self._run_folder.exists():
            self._run_folder.rename(forgotten)  # check: run-is-forgotten-whole
            shutil.rmtree(forgotten, ignore_errors=True)

    @property
    def open_round(self) -> OpenRound | None:
        return self._read("round", OpenRound)

    def write_open_round(self, kind: RoundKind, request: OpenSum, side: dict[str, Any]) -> None:
        self._write("round", OpenRound(kind=kind, request=asdict(request), side=side))

    def forget_round(self) -> None:
        """Wipe the secrets and the vector of the round in progress."""
        self._parsed.pop("round", None)  # check: forgotten-rounds-leave-memory
        (self._run_folder / "round.json").unlink(missing_ok=True)
        for name in ("vector", MEASURED):
            self.delete_array(name)

    def write_layout(self, name: str, layout: TensorLayout) -> None:
        write_whole(self._run_folder / f"{name}.layout.json", json.dumps(layout.to_json()).encode())

    def read_layout(self, name: str) -> TensorLayout:
        """Raises RemoteProtocolError if nothing of this name was made in this run, SettingsError if it is damaged."""
        path = self._run_folder / f"{name}.layout.json"
        if not path.is_file():
            raise RemoteProtocolError(f"the coordinator asked for the {name} before it was made")
        try:
            return TensorLayout.from_json(json.loads(path.read_bytes()))
        except (ValueError, TypeError, RecursionError, LocalProtocolError):
            raise _damaged(path) from None

    def _write(self, name: str, record: Record) -> None:
        """Write a record, whole or not at all; it is on the disk before this returns."""
        self._parsed.pop(name, None)  # check: replaced-records-leave-memory
        write_whole(self._run_folder / f"{name}.json", record.model_dump_json().encode())

    def _read(self, name: str, kind: type[R]) -> R | None:
        path = self._run_folder / f"{name}.json"
        if not path.is_file():
            return None
        content = path.read_bytes()
        if name in self._parsed and self._parsed[name][0] == content:  # with a thousand owners, parsing takes longer
            known = self._parsed[name][1]
            assert isinstance(known, kind)
            return known
        try:
            found = kind.model_validate_json(content)
        except ValidationError:
            raise _damaged(path) from None
        self._parsed[name] = (content, found)
        return found

    # --- arrays ---

    def create_array(self, name: str, size: int, dtype: str) -> NDArray:
        """A new array (size,) of zeros on disk. Raises DataError if the disk has no room."""
        path = self._run_folder / f"{name}.bin"
        path.unlink(missing_ok=True)
        if size == 0:
            return np.empty(0, dtype)
        num_bytes = size * np.dtype(dtype).itemsize
        with private_file.create(path) as file:
            try:
                private_file.take_room(file, num_bytes)
            except OSError as error:
                path.unlink()
                raise DataError(
                    f"{path}: cannot write {num_bytes / 1e6:.0f} MB here ({error.strerror}); nothing has left",
                    hint="make room, or move the whole state folder to where there is some",
                ) from None
        return np.memmap(path, dtype=dtype, mode="r+", shape=(size,))

    def open_array(self, name: str, size: int, dtype: str, *, writable: bool = False) -> NDArray:
        path = self._run_folder / f"{name}.bin"
        if not path.is_file():
            raise RemoteProtocolError(f"the coordinator asked for the {name} before it was made, or twice")
        return np.memmap(path, dtype=dtype, mode="r+" if writable else "r", shape=(size,))

    def keep_array(self, name: str, under: str) -> None:
        """Give a whole array the name under which later messages look for it, once it is on the disk. An empty one has
        no file.
        """
        if self.has_array(name):
            private_file.rename_whole(self._run_folder / f"{name}.bin", self._run_folder / f"{under}.bin")

    def has_array(self, name: str) -> bool:
        return (self._run_folder / f"{name}.bin").is_file()

    def delete_array(self, name: str) -> None:
        (self._run_folder / f"{name}.bin").unlink(missing_ok=True)

    @contextmanager
    def scratch_folder(self) -> Iterator[Path]:
        """A private folder for one answer alone.

        It is removed with the answer, also after an error; after a crash, with the run or when the next answer begins.
        """
        folder = self._run_folder / "scratch"
        shutil.rmtree(folder, ignore_errors=True)
        make_private_folder(self._run_folder)
        make_private_folder(folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def activations_folder(self) -> Path:
        return self._run_folder / "activations"

    # --- beyond a run ---

    def consents(self) -> dict[str, Consent]:
        """Agreement digest -> this owner's consent to it."""
        path = self.folder / "consent.json"
        if not path.is_file():
            return {}
        try:
            return Consents.model_validate_json(path.read_bytes()).agreements
        except ValidationError:
            raise SettingsError(
                f"{path}: damaged, so what was consented to is unknown",
                hint="move it away, and consent again: amalgram agree OWNER.toml",
            ) from None

    def may_repeat(self, agreement_digest: str) -> frozenset[str]:
        """The earlier agreements whose rows this owner consented to contribute again under this one."""
        consent = self.consents().get(agreement_digest)
        return frozenset(consent.again if consent else ())

    def write_consent(self, agreement_digest: str, consent: Consent) -> None:
        consents = Consents(agreements=self.consents() | {agreement_digest: consent})
        write_whole(self.folder / "consent.json", consents.model_dump_json(indent=1).encode())

    def write_receipts(self, agreement_digest: str, receipts: PublishedReceipts) -> None:
        """Keep what the coordinator published under an agreement, with everybody's signatures. It may send them again,
        with fewer of them: those that are kept stay.
        """
        make_private_folder(self.folder / "receipts")
        path = self.folder / "receipts" / f"{agreement_digest}.json"
        before: dict[str, str] = {}
        with suppress(OSError, ValidationError):
            kept = PublishedReceipts.model_validate_json(path.read_bytes())
            before = kept.owners if kept.model_copy(update={"owners": receipts.owners}) == receipts else {}
        owners = before | receipts.owners  # check: receipts-keep-their-signatures
        write_whole(path, receipts.model_copy(update={"owners": owners}).content())

    def write_evidence(self, agreement_digest: str, evidence: Record) -> Path:
        """Keep, for good, what is known of a model that is not the merge."""
        make_private_folder(self.folder / EVIDENCE)
        path = self.evidence_path(agreement_digest)
        write_whole(path, evidence.model_dump_json(indent=1).encode() + b"\n")
        return path

    def evidence(self, agreement_digest: str) -> Path | None:
        """Where the record of a wrong model sent under this agreement is; None if there is none."""
        path = self.evidence_path(agreement_digest)
        return path if path.is_file() else None

    def evidence_path(self, agreement_digest: str) -> Path:
        """Where the record of a wrong model would be."""
        return self.folder / EVIDENCE / f"{agreement_digest}.json"

    @property
    def fine_tuned_folder(self) -> Path:
        return self.folder / FINE_TUNED

    @staticmethod
    def seal(folder: Path) -> None:
        """Make what a library wrote to `folder` readable by its owner only."""
        folder.chmod(0o700)
        for path in folder.iterdir():
            path.chmod(0o600)

    def write_error(self, text: str) -> None:
        """Keep, for the owner alone, what went wrong; the coordinator gets a code."""
        write_whole(self.folder / "error.txt", shown_lines(text).encode() + b"\n")  # check: kept-errors-are-escaped

    @property
    def _run_folder(self) -> Path:
        return self.folder / "run"


def _damaged(path: Path) -> SettingsError:
    return SettingsError(f"{path}: damaged", hint="the run cannot be resumed; a new run needs a new agreement")
