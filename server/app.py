"""The coordinator's Flower ServerApp: it runs the merge over a channel through Flower's grid."""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from flwr.app import Context, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp

from common.agreement import load_agreement
from common.errors import (
    AmalgramError,
    ConsentError,
    EngineError,
    OwnerRefused,
    RemoteProtocolError,
    first_line,
)
from common.logs import JsonLines
from common.messages import Packet, Refusal
from common.private_file import create, locked, write_whole
from common.settings_file import load_settings
from common.wire import from_record, to_record
from server.exchange import RESUME_HINT
from server.merge import run_merge
from server.output_folder import PROGRESS, claim_output
from server.settings import CoordinatorSettings

POLL_SECONDS, EARLIER_RUN_SECONDS = 0.3, 60.0
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the merge that the coordinator's settings file (absolute path in the run config) describes."""
    settings_path = Path(str(context.run_config["coordinator"]))
    try:
        output = _output_folder(settings_path)
        claim_output(output)
        with _only_one_in(output), _progress_in(output):
            run_merge(settings_path, FlowerChannel(grid))
    except AmalgramError as error:
        _save_failure(settings_path, error)
        raise
    except Exception as error:  # a full disk, most likely
        reason = f"{type(error).__name__}: {first_line(error)}"
        _save_failure(settings_path, EngineError(f"the coordinator's program failed ({reason})", hint=RESUME_HINT))
        raise


class FlowerChannel:
    """Packets over a Flower grid. It pulls one answer at a time, so it holds at most one part per node."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def wait_for_nodes(self, count: int, timeout_seconds: float) -> list[int]:
        deadline = time.monotonic() + timeout_seconds
        while len(nodes := sorted(self._grid.get_node_ids())) < count and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return nodes

    def exchange(self, requests: Mapping[int, Packet], timeout_seconds: float) -> Iterator[tuple[int, Packet | None]]:
        node_of = self._push(requests, timeout_seconds)
        for node in requests.keys() - node_of.values():
            yield node, None
        deadline = time.monotonic() + timeout_seconds
        while node_of and time.monotonic() < deadline:  # check: silence-has-an-end
            arrived = False
            for message_id in list(node_of):
                for reply in self._grid.pull_messages([message_id]):
                    arrived = True
                    yield node_of.pop(message_id), _read(reply)
            if node_of and not arrived:
                time.sleep(POLL_SECONDS)
        for node in node_of.values():
            yield node, None

    def _push(self, requests: Mapping[int, Packet], timeout_seconds: float) -> dict[str, int]:
        """Message id -> node, for the nodes that Flower still knows. What all nodes are sent is one record."""
        node_of = {}
        record, recorded = RecordDict(), None
        for node, request in requests.items():
            if request is not recorded:
                record, recorded = to_record(request), request
            message = FlowerMessage(record, dst_node_id=node, message_type="train.step", ttl=timeout_seconds)
            (message_id,) = self._grid.push_messages([message])
            if message_id is not None:
                node_of[message_id] = node
        return node_of


def _read(reply: FlowerMessage) -> Packet | None:
    """The answer in a Flower reply; None if Flower reports that the node has gone or failed."""
    if reply.has_error():
        # Only a node that does not run our bundle at all answers this: its owner did not consent to the bundle.
        return (Refusal(code=ConsentError.code),) if reply.error.code == ErrorCode.INVALID_FAB else None
    try:
        return from_record(reply.content)
    except RemoteProtocolError:
        return None  # an owner that does not speak the protocol drops out, and cannot stop the others


@contextmanager
def _only_one_in(output: Path) -> Iterator[None]:
    """Wait until the app of an earlier run, which Flower has stopped, has ended: two must not write to one folder."""
    busy = EngineError(
        f"{output}: the program of an earlier run is still running here",
        hint="wait until it ends, or stop it, and run the same command again",
    )
    with locked(output / "run.lock", wait_seconds=EARLIER_RUN_SECONDS, busy=busy):
        yield


@contextmanager
def _progress_in(output: Path) -> Iterator[None]:
    """Write a line per step and per answer to where the command that started this app reads it."""
    (output / PROGRESS).unlink(missing_ok=True)
    create(output / PROGRESS).close()  # 0600: it says how long each owner took
    handler = logging.FileHandler(output / PROGRESS, mode="a", encoding="utf-8")
    handler.setFormatter(JsonLines())
    log = logging.getLogger("amalgram")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeHandler(handler)
        handler.close()


def _output_folder(settings_path: Path) -> Path:
    return settings_path.parent / load_settings(settings_path, CoordinatorSettings).output


def _agreement_digest(settings_path: Path) -> str:
    """Empty if there is no agreement that can be read: that may be what failed."""
    with suppress(AmalgramError):
        settings = load_settings(settings_path, CoordinatorSettings)
        return load_agreement(settings_path.parent / settings.agreement).digest()
    return ""


def _save_failure(settings_path: Path, error: AmalgramError) -> None:
    """Write the error to where the command that started this app reads it, because Flower does not pass it on."""
    output = _output_folder(settings_path)
    output.mkdir(parents=True, exist_ok=True)
    failure = {
        "agreement_digest": _agreement_digest(settings_path),
        "code": error.code,
        "exit_code": error.exit_code,
        "message": error.message,
        "hint": error.hint,
        "owner": error.owner if isinstance(error, OwnerRefused) else None,
    }
    write_whole(output / "failure.json", json.dumps(failure).encode())
