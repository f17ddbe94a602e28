"""Flower's grid in one process: real messages, really serialised, handled by the real ClientApp.

For simulations and tests. A message is answered when its answer is pulled, so that at most one is in hand; with
helpers, a few are answered ahead. Nothing of one node reaches another: every node has its own context, and what a
message holds is serialised, or cannot be changed. What a node keeps in its context stays in the process that answered;
our clients keep nothing there.
"""

import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.task_identity import TaskIdentity

from deploy.simulation.crew import Crew

SERVER_NODE_ID = 1
RUN_ID = 1
Client = Callable[[Message, Context], Message]  # a ClientApp, or a function that calls one


class InProcessGrid(Grid):
    """A grid of nodes 2, 3, ..., each with the node config given for it."""

    def __init__(self, client: Client, node_configs: Iterable[Mapping[str, Any]], crew: Crew | None = None) -> None:
        _identify()
        self._client, self._crew = client, crew or Crew()
        self._contexts = {
            node_id: _context(node_id, node_config)
            for node_id, node_config in enumerate(node_configs, SERVER_NODE_ID + 1)
        }
        self._pending: dict[str, int] = {}  # messages whose answers nobody has pulled, and the nodes they go to

    def get_node_ids(self) -> list[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        message_ids = []
        for message in messages:
            message_id = secrets.token_hex(16)
            _name(message, message_id)
            node = message.metadata.dst_node_id
            self._pending[message_id] = node
            self._crew.add(message_id, answered, self._client, message, self._contexts[node])
            message_ids.append(message_id)
        return message_ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [
            self._crew.result(message_id)
            for message_id in message_ids
            if self._pending.pop(message_id, None) is not None
        ]

    def set_run(self, run: Any) -> None:
        raise NotImplementedError("the in-process grid has one run")

    @property
    def run(self) -> Any:
        raise NotImplementedError("the in-process grid has one run")

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError("build a Message instead")

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))


def answered(client: Client, message: Message, context: Context) -> Message:
    """What comes back from a node for a message that is sent to it."""
    _identify()
    delivered = _delivered(message)
    _name(delivered, message.metadata.message_id)
    return _delivered(client(delivered, context))


def _delivered(message: Message) -> Message:
    """What arrives at the other end. Arrays are bytes already, which nobody can change: they need not be copied."""
    if not message.has_content():
        return cast(Message, through_serialisation(message))
    sent = message.content
    arrays = {name: record for name, record in sent.items() if isinstance(record, ArrayRecord)}
    message.content = RecordDict({name: record for name, record in sent.items() if name not in arrays})
    arrived = cast(Message, through_serialisation(message))
    message.content = sent  # which is sent to other nodes, too
    for name, record in arrays.items():
        arrived.content[name] = record
    return arrived


def through_serialisation(item: Any) -> Any:
    """What arrives at the other end of the wire: every object deflated to bytes, and inflated again."""
    children = {object_id: through_serialisation(child) for object_id, child in (item.children or {}).items()}
    return type(item).inflate(item.deflate(), children)


def run_in_process(
    server_app: ServerApp,
    client: Client,
    node_configs: Iterable[Mapping[str, Any]],
    run_config: dict[str, Any],
    crew: Crew | None = None,
) -> None:
    """Run a server app against clients until it returns. Its exceptions pass through.

    `client` must be a function of a module if the crew has helpers.
    """
    grid = InProcessGrid(client, node_configs, crew)
    server_app(grid, _context(SERVER_NODE_ID, {}, run_config))


def _context(node_id: int, node_config: Mapping[str, Any], run_config: dict[str, Any] | None = None) -> Context:
    return Context(
        run_id=RUN_ID, node_id=node_id, node_config=dict(node_config), state=RecordDict(), run_config=run_config or {}
    )


def _identify() -> None:
    """Say who this process is, as Flower's processes learn from their environment."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, SERVER_NODE_ID


def _name(message: Message, message_id: str) -> None:
    # The SuperLink's part: a message gets its id when it is sent, and the public metadata is read-only.
    message.metadata.__dict__["_message_id"] = message_id
