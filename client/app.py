"""The owner's Flower ClientApp: decode a packet, answer its messages, encode, nothing else.

Which owner this is comes from the node's own configuration, never from the coordinator: `settings` in the node config,
or, where Flower's simulation engine plays all owners on one machine, the list of settings files in the environment.
An error leaves as a code; its text stays in the owner's state folder.
"""

import json
import logging
import os
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from flwr.app import Context
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp

from client.owner import Owner
from common.errors import AmalgramError, SettingsError
from common.messages import Message, Refusal
from common.wire import from_record, to_record

SIMULATED_OWNERS = "AMALGRAM_SIMULATED_OWNERS"
log = logging.getLogger("amalgram.owner")
app = ClientApp()


@app.train("step")
def step(message: FlowerMessage, context: Context) -> FlowerMessage:
    """Answer one packet."""
    return FlowerMessage(to_record(tuple(_answers(message, context))), reply_to=message)


def _answers(message: FlowerMessage, context: Context) -> Iterator[Message]:
    """An answer to each message, up to the first that is refused."""
    owner = None
    try:
        owner = Owner(_settings_path(context))
        for request in from_record(message.content):
            yield owner.answer(request)
    except AmalgramError as error:
        _keep(owner, str(error))
        yield Refusal(code=error.code)
    except Exception as error:  # an exception's text may quote a row; it must not reach the coordinator
        _keep(owner, traceback.format_exc())
        yield Refusal(code=AmalgramError.code if not isinstance(error, OSError) else SettingsError.code)


def _keep(owner: Owner | None, text: str) -> None:
    """Leave the text where only the owner reads it. Logs get none of it: an engine may keep them for all to read."""
    # A full disk, or another owner's state folder, must not turn into an exception that Flower would pass on.
    with suppress(OSError, AmalgramError):
        if owner is not None:
            owner.state.write_error(text)
            log.error("owner %s refused; its error.txt says why", owner.name)
            return
    log.error("refused: this node's settings cannot be used")


def _settings_path(context: Context) -> Path:
    settings = context.node_config.get("settings")
    if isinstance(settings, str):
        return Path(settings)
    simulated = os.environ.get(SIMULATED_OWNERS)
    if simulated is None:
        raise SettingsError(
            "this node does not know its owner: start it with --node-config 'settings=\"/abs/owner.toml\"'"
        )
    return Path(json.loads(simulated)[int(context.node_config["partition-id"])])
