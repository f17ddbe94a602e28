"""A SuperNode that runs one bundle and no other: the one whose SHA-256 its owner consented to.

Left to itself a SuperNode installs and runs whatever code the coordinator submits, with the owner's rights. Here every
message passes a gate between the connection and Flower's own loop. At the first message of a run its bundle is fetched
and looked at. Unless everything about it is as agreed, the loop never sees the message, nothing is installed, nothing
is started, and the coordinator is answered with Flower's error 7. Otherwise Flower gets the bytes that were looked at.

The gate also keeps an answer for the worst case on the disk: whoever is killed while at work on a message, or loses the
line in the middle of its answer, says so when it is back, and the coordinator need not wait until the time is up.

Run as a process of its own: `python -m deploy.launch.pinned_supernode DIGEST` and flower-supernode's arguments.
"""

import hashlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from flwr.app import Error, Message
from flwr.cli.config_utils import get_fab_metadata
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore.app_utils import start_parent_process_monitor
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import push_object_contents_from_iterable
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supernode import start_client_internal
from flwr.supernode.cli import flower_supernode

from common.errors import EngineError
from common.private_file import write_whole
from deploy.launch.internals import check_internals, tell

REFUSED = Error(ErrorCode.INVALID_FAB, "not the bundle that this owner consented to")
BROKE_OFF = Error(ErrorCode.CLIENT_APP_CRASHED, "this node was interrupted while it was at work on the message")
UNANSWERED = "unanswered"  # in the node's folder, while a message has no whole answer: the one that it gets otherwise
FLOWER_PAUSE_SECONDS, LEAST_PAUSE_SECONDS = 3.0, 0.5
PAUSE_SHARE = 0.1  # of the time that a message has been waited for: so little may be lost by asking too late
NAMES = ("node_id", "receive", "send", "get_run", "get_fab", "pull_object", "push_object", "confirm_message_received")


class Gate:
    """Between a connection's callbacks (by name) and Flower's loop: lets the messages of agreed bundles through."""

    def __init__(self, digest: str, connection: dict[str, Any], folder: Path) -> None:
        self._digest = digest
        self._connection = connection
        self._folder = folder
        self._unanswered = folder / UNANSWERED
        self._agreed: dict[int, tuple[Run, Fab]] = {}
        self._refused: set[int] = set()
        self._to_push: set[str] = set()  # objects of the answer that is being sent
        self._answered = time.monotonic()  # when the last message was

    def receive(self) -> Any:
        """The next message of an agreed bundle; None if there is none. Others are answered here."""
        self._admit_interruption()
        received = self._wait_for_message()
        if received is None:
            return None
        message = received[0]
        run_id = message.metadata.run_id
        if run_id not in self._agreed and run_id not in self._refused:
            self._look_at(run_id)
        if run_id in self._agreed:
            otherwise = message_to_proto(Message(BROKE_OFF, reply_to=message))
            write_whole(self._unanswered, otherwise.SerializeToString())  # check: interruption-is-noted
            return received
        self._answer(Message(REFUSED, reply_to=message))
        return None

    def _wait_for_message(self) -> Any:
        """Flower asks every 3 seconds, which would be most of a step in which nobody computes. So the gate asks sooner,
        and the later, the longer it has waited, until Flower's pace will do.
        """
        while (received := self._connection["receive"]()) is None:
            pause = (time.monotonic() - self._answered) * PAUSE_SHARE
            if pause > FLOWER_PAUSE_SECONDS:
                break
            time.sleep(max(pause, LEAST_PAUSE_SECONDS))
        return received

    def send(self, reply: Message, *arguments: Any) -> tuple[set[str], str]:
        wanted, session = self._connection["send"](reply, *arguments)
        self._to_push = set(wanted)
        self._answered = time.monotonic()
        self._note_if_whole()
        return wanted, session

    def push_object(self, run_id: int, session: str, object_id: str, content: bytes) -> None:
        self._connection["push_object"](run_id, session, object_id, content)
        self._to_push.discard(object_id)
        self._note_if_whole()

    def get_run(self, run_id: int) -> Run:
        return self._agreed[run_id][0]

    def get_fab(self, fab_hash: str, run_id: int) -> Fab:
        return self._agreed[run_id][1]  # check: gate-gives-what-it-saw

    def _look_at(self, run_id: int) -> None:
        run = self._connection["get_run"](run_id)
        fab = self._connection["get_fab"](run.fab_hash, run_id)
        reason = why_not(self._digest, run, fab)
        if reason is None:  # check: other-bundles-are-refused
            self._agreed[run_id] = (run, fab)
        else:
            self._refused.add(run_id)
            told = f"REFUSED run {run_id} of the coordinator, nothing of it was installed or started: {reason}"
            tell(self._folder, told)

    def _note_if_whole(self) -> None:
        if not self._to_push:  # check: answer-is-whole
            self._unanswered.unlink(missing_ok=True)

    def _admit_interruption(self) -> None:
        """Flower asks for the next message when it is done with the last: one without a whole answer gets none."""
        if not self._unanswered.is_file():
            return
        reply = message_from_proto(ProtoMessage.FromString(self._unanswered.read_bytes()))
        try:
            self._answer(reply)
            tell(self._folder, "interrupted while at work on a message; told the coordinator to wait no longer")
        except (RunNotRunningException, httpx.HTTPStatusError):
            tell(self._folder, "interrupted while at work on a message of a run that is over")
        self._unanswered.unlink()

    def _answer(self, reply: Message) -> None:
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            objects = get_all_nested_objects(reply)
            wanted, session = self._connection["send"](reply, get_object_tree(reply), 0.0)
            contents = ((object_id, objects[object_id].deflate()) for object_id in wanted)
            push = partial(self._connection["push_object"], reply.metadata.run_id, session)
            push_object_contents_from_iterable(contents, push)


def why_not(digest: str, run: Run, fab: Fab) -> str | None:
    """What is not as agreed about a run's bundle; None if all is."""
    found = hashlib.sha256(fab.content).hexdigest()
    if found != digest:  # check: bundle-is-agreed
        return f"its bundle has the SHA-256 {found}, the agreement's is {digest}"
    if not run.fab_hash == fab.hash_str == digest:  # check: bundle-declares-its-digest
        return f"it declares the SHA-256 {run.fab_hash} and {fab.hash_str} for the bundle {digest}"
    if (run.fab_id, run.fab_version) != get_fab_metadata(fab.content):  # check: bundle-declares-its-name
        return f"it declares the bundle as {run.fab_id!r}, version {run.fab_version!r}"
    if run.primary_task_type != TaskType.SERVER_APP:  # check: run-is-a-server-app
        return f"it is a {run.primary_task_type!r}, not a ServerApp"
    return None


def pinned(connect: Callable[..., Any], digest: str, folder: Path) -> Callable[..., Any]:
    """Flower's connection to the SuperLink, with the gate in it; `folder` is the node's own."""

    @contextmanager
    def connect_through_gate(*arguments: Any, **named: Any) -> Iterator[tuple[Any, ...]]:
        with connect(*arguments, **named) as callbacks:
            connection = dict(zip(NAMES, callbacks, strict=True))
            gate = Gate(digest, connection, folder)
            tell(folder, "connected to the coordinator")
            names = ("receive", "send", "get_run", "get_fab", "push_object")
            yield tuple((connection | {name: getattr(gate, name) for name in names}).values())

    return connect_through_gate


def _names_in(context_manager: Any) -> tuple[str, ...]:
    """The global names that the function behind a context manager looks up."""
    names: tuple[str, ...] = context_manager.__wrapped__.__code__.co_names
    return names


def main() -> None:
    """Run flower-supernode with the gate in its connection."""
    check_internals()
    if "http_request_response" not in _names_in(start_client_internal._init_connection):
        raise EngineError("flower-supernode no longer connects where the gate is; nothing was started")
    start_parent_process_monitor(os.getppid())
    digest = sys.argv.pop(1)
    connect: Any = vars(start_client_internal)["http_request_response"]
    vars(start_client_internal)["http_request_response"] = pinned(connect, digest, Path.cwd())
    sys.argv[0] = "flower-supernode"
    try:
        flower_supernode()
    except Exception:
        traceback.print_exc()
    # Its loop gave up, as on a line that somebody tampers with. The thread of its runtime interface would keep the
    # process, deaf and dumb; `amalgram client` starts another when this one has ended.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    main()
