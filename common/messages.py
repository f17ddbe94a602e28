"""Every message on the wire, in order of flow. This file knows nothing of Flower, sockets or files.

    coordinator -> owner    owner -> coordinator
    RollCall                Present
    OpenSum                 SumOpened            the owner computes its vector and keeps it; nothing of it leaves yet
    PartRequest             VectorPart           plain sum: one part of the vector
    CandidatePart           CandidateReceived    a merged candidate, in parts; after the last it is evaluated
    Finish                  Finished             the owner deletes what it kept for this run
    (any)                   Refusal              a code, never an exception's text

A message is frozen and checked when it is built, so one that exists is well formed. `encode` and `decode` are exact:
unknown kinds, missing or additional fields, wrong types or ranges are refused.
"""

import re
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from common.errors import EXIT_CODES, RemoteProtocolError
from common.tensor_layout import PART_BYTES

PROTOCOL_VERSION = 1
HEX_64 = re.compile(r"[0-9a-f]{64}")
OWNER_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
STATISTICS = ("contribution", "validation", "test")
MAX_TEXT = 200
MAX_PARTS = 1_000_000

Split = Literal["validation", "test"]
Field = str | int


@dataclass(frozen=True, kw_only=True)
class Message:
    """Base of all messages. `payload` is the one large array a message may carry."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            check = _CHECKS[field.name]
            if not check(value):
                raise RemoteProtocolError(f"{type(self).__name__}: {field.name} is malformed")


@dataclass(frozen=True, kw_only=True)
class RollCall(Message):
    version: int
    run: str
    agreement_digest: str


@dataclass(frozen=True, kw_only=True)
class Present(Message):
    run: str
    owner: str


@dataclass(frozen=True, kw_only=True)
class OpenSum(Message):
    """`session` is fresh for every attempt; `models` names, comma-separated, the models a metrics sum is about."""

    run: str
    agreement_digest: str
    session: str
    statistic: str
    models: str
    layout_digest: str


@dataclass(frozen=True, kw_only=True)
class SumOpened(Message):
    session: str
    owner: str


@dataclass(frozen=True, kw_only=True)
class PartRequest(Message):
    session: str
    part: int


@dataclass(frozen=True, kw_only=True)
class VectorPart(Message):
    session: str
    owner: str
    part: int
    payload: NDArray  # (part size,) float64


@dataclass(frozen=True, kw_only=True)
class CandidatePart(Message):
    """Part `part` of `parts` of the merged candidate `model`, to be evaluated on the rows of `split`."""

    run: str
    agreement_digest: str
    model: str
    split: str
    part: int
    parts: int
    payload: NDArray  # (part size,) float32


@dataclass(frozen=True, kw_only=True)
class CandidateReceived(Message):
    run: str
    owner: str
    model: str
    part: int


@dataclass(frozen=True, kw_only=True)
class Finish(Message):
    run: str


@dataclass(frozen=True, kw_only=True)
class Finished(Message):
    run: str
    owner: str


@dataclass(frozen=True, kw_only=True)
class Refusal(Message):
    code: str


KINDS: dict[str, type[Message]] = {
    kind.__name__: kind
    for kind in (
        RollCall,
        Present,
        OpenSum,
        SumOpened,
        PartRequest,
        VectorPart,
        CandidatePart,
        CandidateReceived,
        Finish,
        Finished,
        Refusal,
    )
}


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """What crosses the wire: the message's kind, its small fields, and at most one array."""

    kind: str
    fields: dict[str, Field]
    payload: NDArray | None


def encode(message: Message) -> Envelope:
    """Take a message apart."""
    values = {field.name: getattr(message, field.name) for field in fields(message)}
    payload = values.pop("payload", None)
    return Envelope(kind=type(message).__name__, fields=values, payload=payload)


def decode(envelope: Envelope) -> Message:
    """Build the message that `envelope` holds. Raises RemoteProtocolError on anything that is not exactly one."""
    kind = KINDS.get(envelope.kind)
    if kind is None:
        raise RemoteProtocolError(f"unknown message kind {envelope.kind[:40]!r}")
    values: dict[str, object] = dict(envelope.fields)
    if "payload" in values:
        raise RemoteProtocolError(f"{envelope.kind}: payload is no small field")
    if envelope.payload is not None:
        values["payload"] = envelope.payload
    expected = {field.name for field in fields(kind)}
    if set(values) != expected:
        differing = ", ".join(sorted(str(name)[:40] for name in set(values) ^ expected))
        raise RemoteProtocolError(f"{envelope.kind}: missing or unexpected fields: {differing}")
    return kind(**values)


def _is_hex_64(value: object) -> bool:
    return isinstance(value, str) and HEX_64.fullmatch(value) is not None


def _is_owner(value: object) -> bool:
    return isinstance(value, str) and OWNER_NAME.fullmatch(value) is not None


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_TEXT and value.isprintable()


def _is_model_list(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 100 * MAX_TEXT and (value == "" or value.isprintable())


def _is_index(value: object) -> bool:
    return type(value) is int and 0 <= value < MAX_PARTS


def _is_payload(value: object) -> bool:
    return (
        isinstance(value, np.ndarray)
        and value.ndim == 1
        and value.dtype in (np.dtype("<f8"), np.dtype("<f4"))
        and value.nbytes <= PART_BYTES
    )


_CHECKS = {
    "version": lambda value: type(value) is int and 0 <= value < 2**31,
    "run": _is_hex_64,
    "session": _is_hex_64,
    "agreement_digest": _is_hex_64,
    "layout_digest": _is_hex_64,
    "owner": _is_owner,
    "statistic": lambda value: isinstance(value, str) and value in STATISTICS,
    "split": lambda value: isinstance(value, str) and value in ("validation", "test"),
    "model": _is_text,
    "models": _is_model_list,
    "part": _is_index,
    "parts": _is_index,
    "payload": _is_payload,
    "code": lambda value: isinstance(value, str) and value in EXIT_CODES,
}
