"""A SuperNode that runs one bundle and no other: the one whose SHA-256 its owner consented to.

Left to itself a SuperNode installs and runs whatever code the coordinator submits, with the owner's rights. Here every
message passes a gate between the connection and Flower's own loop. At the first message of a run its bundle is fetched
and looked at. Unless everything about it is as agreed, the loop never sees the message, nothing is installed, nothing
is started, and the coordinator is answered with Flower's error 7. Otherwise Flower gets the bytes that were looked at.

Run as a process of its own: `python -m deploy.launch.pinned_supernode DIGEST` and flower-supernode's arguments.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from flwr.app import Error, Message
from flwr.cli.config_utils import get_fab_metadata
from flwr.common.constant import ErrorCode
from flwr.supercore.app_utils import start_parent_process_monitor
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import push_object_contents_from_iterable
from flwr.supercore.run import Run
from flwr.supernode import start_client_internal
from flwr.supernode.cli import flower_supernode

from common.errors import EngineError
from deploy.launch.internals import check_internals, tell

REFUSED = Error(ErrorCode.INVALID_FAB, "not the bundle that this owner consented to")
NAMES = ("node_id", "receive", "send", "get_run", "get_fab", "pull_object", "push_object", "confirm_message_received")


class Gate:
    """Between a connection's callbacks (by name) and Flower's loop: lets the messages of agreed bundles through."""

    def __init__(self, digest: str, connection: dict[str, Any]) -> None:
        self._digest = digest
        self._connection = connection
        self._agreed: dict[int, tuple[Run, Fab]] = {}
        self._refused: set[int] = set()

    def receive(self) -> Any:
        """The next message of an agreed bundle; None if there is none. Others are answered here."""
        received = self._connection["receive"]()
        if received is None:
            return None
        message = received[0]
        run_id = message.metadata.run_id
        if run_id not in self._agreed and run_id not in self._refused:
            self._look_at(run_id)
        if run_id in self._agreed:
            return received
        self._refuse(message)
        return None

    def get_run(self, run_id: int) -> Run:
        return self._agreed[run_id][0]

    def get_fab(self, fab_hash: str, run_id: int) -> Fab:
        return self._agreed[run_id][1]

    def _look_at(self, run_id: int) -> None:
        run = self._connection["get_run"](run_id)
        fab = self._connection["get_fab"](run.fab_hash, run_id)
        reason = why_not(self._digest, run, fab)
        if reason is None:
            self._agreed[run_id] = (run, fab)
        else:
            self._refused.add(run_id)
            tell(f"REFUSED run {run_id} of the coordinator, nothing of it was installed or started: {reason}")

    def _refuse(self, message: Message) -> None:
        reply = Message(REFUSED, reply_to=message)
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            objects = get_all_nested_objects(reply)
            wanted, session = self._connection["send"](reply, get_object_tree(reply), 0.0)
            contents = ((object_id, objects[object_id].deflate()) for object_id in wanted)
            push = partial(self._connection["push_object"], message.metadata.run_id, session)
            push_object_contents_from_iterable(contents, push)


def why_not(digest: str, run: Run, fab: Fab) -> str | None:
    """What is not as agreed about a run's bundle; None if all is."""
    found = hashlib.sha256(fab.content).hexdigest()
    if found != digest:
        return f"its bundle has the SHA-256 {found}, the agreement's is {digest}"
    if not run.fab_hash == fab.hash_str == digest:
        return f"it declares the SHA-256 {run.fab_hash} and {fab.hash_str} for the bundle {digest}"
    if (run.fab_id, run.fab_version) != get_fab_metadata(fab.content):
        return f"it declares the bundle as {run.fab_id!r}, version {run.fab_version!r}"
    if run.primary_task_type != TaskType.SERVER_APP:
        return f"it is a {run.primary_task_type!r}, not a ServerApp"
    return None


def pinned(connect: Callable[..., Any], digest: str) -> Callable[..., Any]:
    """Flower's connection to the SuperLink, with the gate in it."""

    @contextmanager
    def connect_through_gate(*arguments: Any, **named: Any) -> Iterator[tuple[Any, ...]]:
        with connect(*arguments, **named) as callbacks:
            connection = dict(zip(NAMES, callbacks, strict=True))
            gate = Gate(digest, connection)
            tell("connected to the coordinator")
            through_gate = {"receive": gate.receive, "get_run": gate.get_run, "get_fab": gate.get_fab}
            yield tuple((connection | through_gate).values())

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
    vars(start_client_internal)["http_request_response"] = pinned(connect, digest)
    sys.argv[0] = "flower-supernode"
    flower_supernode()


if __name__ == "__main__":
    main()
