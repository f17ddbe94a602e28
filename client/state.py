"""What an owner keeps between two messages: files in its own state folder, readable by nobody else.

`run/` is bound to one run; a new run, or the end of this one, deletes it. Nothing is kept in the framework's own
context, which outlives a run and which other processes of the machine can read.
"""

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.ledger import Ledger
from common import private_file
from common.errors import DataError, RemoteProtocolError
from common.private_file import make_private_folder, write_whole


class OwnerState:
    """The state folder: `run/`, and what outlives a run: ledger, consent, receipts, a model made here, `error.txt`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_private_folder(folder)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One message at a time: two processes that both read the same step could each take another next one."""
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    # --- the run in progress ---

    def start_run(self, run: str, agreement_digest: str) -> None:
        """Begin this run, under this agreement and no other, or go on with it; any other run is forgotten."""
        (self.folder / "error.txt").unlink(missing_ok=True)
        started = {"run": run, "agreement_digest": agreement_digest}
        if self.read_json("run") == started:
            return
        self.end_run()
        make_private_folder(self._run_folder)
        self.write_json("run", started)

    def check_run(self, run: str, agreement_digest: str) -> None:
        """Raise RemoteProtocolError unless `run` is the one in progress, and under this agreement."""
        if self.read_json("run") != {"run": run, "agreement_digest": agreement_digest}:
            raise RemoteProtocolError("the coordinator speaks of another run or agreement than those that were opened")

    def end_run(self) -> None:
        """Forget the run, whole or not at all: half forgotten it could be begun anew and go on with what was left."""
        forgotten = self.folder / "run.forgotten"
        shutil.rmtree(forgotten, ignore_errors=True)
        if self._run_folder.exists():
            self._run_folder.rename(forgotten)
            shutil.rmtree(forgotten, ignore_errors=True)

    def write_json(self, name: str, value: Any) -> None:
        """Write a small value, whole or not at all; on the disk before this returns."""
        write_whole(self._run_folder / f"{name}.json", json.dumps(value).encode())

    def read_json(self, name: str) -> Any:
        """A value written before, or None."""
        path = self._run_folder / f"{name}.json"
        return json.loads(path.read_bytes()) if path.is_file() else None

    def forget_sum(self) -> None:
        """Wipe the secrets and the vector of the sum in progress."""
        (self._run_folder / "sum.json").unlink(missing_ok=True)
        self.delete_array("vector")

    def create_array(self, name: str, size: int, dtype: str) -> NDArray:
        """A new array (size,) on disk, of zeros. Raises DataError where the disk has no room."""
        path = self._run_folder / f"{name}.bin"
        path.unlink(missing_ok=True)
        if size == 0:
            return np.empty(0, dtype)
        num_bytes = size * np.dtype(dtype).itemsize
        with private_file.create(path) as file:
            if sys.platform == "linux":  # else writing to a mapped file ends the process where the disk is full
                try:
                    os.posix_fallocate(file.fileno(), 0, num_bytes)
                except OSError as error:
                    path.unlink()
                    raise DataError(
                        f"{path}: {num_bytes / 1e6:.0f} MB cannot be written here ({error.strerror}); nothing has "
                        "left. Make room, or move the whole state folder, with its ledger, to where there is some"
                    ) from None
        return np.memmap(path, dtype=dtype, mode="r+", shape=(size,))

    def open_array(self, name: str, size: int, dtype: str, *, writable: bool = False) -> NDArray:
        path = self._run_folder / f"{name}.bin"
        if not path.is_file():
            raise RemoteProtocolError(f"the coordinator asked for the {name} before it was made, or twice")
        return np.memmap(path, dtype=dtype, mode="r+" if writable else "r", shape=(size,))

    def keep_array(self, name: str, under: str) -> None:
        """Give a whole array the name under which later messages look for it."""
        (self._run_folder / f"{name}.bin").rename(self._run_folder / f"{under}.bin")

    @contextmanager
    def scratch_folder(self) -> Iterator[Path]:
        """A folder for what is private and of use to one answer alone: removed with it, also after an error; after a
        crash, with the run or when the next answer begins.
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

    def delete_array(self, name: str) -> None:
        (self._run_folder / f"{name}.bin").unlink(missing_ok=True)

    # --- beyond a run ---

    def ledger(self, agreement_digest: str) -> Ledger:
        """What this owner has given away under this agreement."""
        return Ledger(self.folder / "ledger.json", agreement_digest)

    def consents(self) -> dict[str, str]:
        """Agreement digest -> when this owner consented to it."""
        path = self.folder / "consent.json"
        consents: dict[str, str] = json.loads(path.read_bytes()) if path.is_file() else {}
        return consents

    def write_consent(self, agreement_digest: str, when: str) -> None:
        consents = self.consents() | {agreement_digest: when}
        write_whole(self.folder / "consent.json", json.dumps(consents, indent=1).encode())

    def write_receipt(self, run: str, receipt: dict[str, Any]) -> None:
        """Keep what the coordinator published in a run, with everybody's signatures."""
        make_private_folder(self.folder / "receipts")
        write_whole(self.folder / "receipts" / f"{run}.json", json.dumps(receipt, indent=1).encode())

    def has_receipt(self, run: str) -> bool:
        """Whether the run has ended here with a result."""
        return (self.folder / "receipts" / f"{run}.json").is_file()

    @property
    def fine_tuned_folder(self) -> Path:
        return self.folder / "fine_tuned"

    @staticmethod
    def seal(folder: Path) -> None:
        """Let nobody else read what a library wrote to `folder`."""
        folder.chmod(0o700)
        for path in folder.iterdir():
            path.chmod(0o600)

    def write_error(self, text: str) -> None:
        """Keep, for the owner alone, what went wrong; the coordinator gets a code."""
        write_whole(self.folder / "error.txt", text.encode() + b"\n")

    @property
    def _run_folder(self) -> Path:
        return self.folder / "run"
