"""Every message on the wire, in order of flow. This file does not depend on Flower, sockets or files.

    step                coordinator -> owner     owner -> coordinator
    roll call           RollCall                 Present
    after a crash       BurnSession              SessionBurned       an earlier session will never be unmasked
                        BurnCertificate          CertificateKept
    AdvertiseKeys       OpenSum                  KeysAdvertised      masked; nothing of the owner's vector leaves yet
    ShareKeys           KeyBook                  SharesSealed
    MaskedInput         KeyShares                MaskedPart          part 0
                        KeyShares                SharesDisputed      instead, if a neighbour sealed wrong shares
                        OpenShares               SharesOpened        only after that; then KeyShares again
                        PartRequest              MaskedPart          parts 1, 2, ...
    ConsistencyCheck    SurvivorList             SurvivorsSigned
    Unmasking           Acknowledgements         SharesRevealed
    plain sum           OpenSum                  SumOpened
                        PartRequest              VectorPart
    between rounds      CandidatePart            PartReceived        a merged model to be judged, in parts
                        MergedStepPart           PartReceived        what a step merged, to measure the next step with
                        ScalesPart               PartReceived        the scales that contributions are summed on
    verification        Draw                     Drawn               a signed nonce, once the owner has the models
                        CorrectionPart           PartReceived        what rounding to float32 took from them
                        Draw                     Drawn               a signed key, once the owner has these
                        CheckKeys                CheckShares         its part of the check, masked and signed
                        UploadsOpened            OpeningChecked      everybody adds up by itself; metrics too
    the end             Result                   ResultReceived      what is published, signed by the coordinator
                        Receipts                 ReceiptsKept        everybody's signature under the same result
                        Finish                   Finished            ends a run without a result
    any                 (any)                    Refusal             a code, never an exception's text

Messages travel in packets, because a node starts a process for each packet. Parts, the result and what verification
needs after its first Draw wait for no answer: they travel ahead of the next message, as many as fit. An owner answers
the messages of a packet one after the other, as if each had come alone, and stops at the first that it refuses.

A message is frozen and checked when it is built, so every message that exists is well formed. Building a malformed one
raises LocalProtocolError; `decode` raises RemoteProtocolError for unknown kinds, missing or additional fields, wrong
types and ranges.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from common.domain_separation import Domain
from common.errors import EXIT_CODES, LocalProtocolError, RemoteProtocolError
from common.names import NAME_PATTERN
from common.tensor_layout import PART_BYTES
from common.text import MAX_LINE, flaw, shown

PROTOCOL_VERSION = 13
HEX_64 = re.compile(r"[0-9a-f]{64}")
OWNER_NAME = re.compile(NAME_PATTERN)
MAX_PARTS = 1_000_000
MAX_ROUND = 2**62
MAX_LIST_BYTES = 16_000_000

Field = str | int | bytes


@dataclass(frozen=True, kw_only=True)
class Message:
    """Base of all messages. `payload` is the one large array a message may carry. Raises LocalProtocolError."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            check = _CHECKS[field.name]
            if not check(value):
                raise LocalProtocolError(f"{type(self).__name__}: {field.name} is malformed")


@dataclass(frozen=True, kw_only=True)
class RollCall(Message):
    version: int
    run: str
    agreement_digest: str


@dataclass(frozen=True, kw_only=True)
class Present(Message):
    """`next_round`: the lowest number that this owner opens a sum under.

    `pending`: an earlier session that this owner offered its vector to and that may be open; empty if none is.
    """

    run: str
    owner: str
    next_round: int
    pending: str
    signature: bytes


@dataclass(frozen=True, kw_only=True)
class BurnSession(Message):
    run: str
    session: str


@dataclass(frozen=True, kw_only=True)
class SessionBurned(Message):
    session: str
    owner: str
    signature: bytes


@dataclass(frozen=True, kw_only=True)
class BurnCertificate(Message):
    """`signatures`: `records.Signed` by the owners that will never reveal anything of `session`."""

    run: str
    session: str
    signatures: bytes


@dataclass(frozen=True, kw_only=True)
class CertificateKept(Message):
    session: str
    owner: str


@dataclass(frozen=True, kw_only=True)
class OpenSum(Message):
    """Opens the round at `position` of the schedule (common/schedule.py). AdvertiseKeys.

    `deliveries_digest` covers everything that was sent before it. The session is the hash of the whole message, so
    owners that are told different things are in different sessions.
    """

    run: str
    agreement_digest: str
    round: int  # ascending at an owner, across runs
    nonce: str
    position: int
    deliveries_digest: str
    layout_digest: str

    @property
    def session(self) -> str:
        """64 hexadecimal digits: SHA-256(domain | everything in this message)."""
        values = [getattr(self, field.name) for field in fields(self)]  # check: session-covers-the-request
        canonical = json.dumps(values, separators=(",", ":"), ensure_ascii=True).encode()
        return hashlib.sha256(Domain.SESSION.value + canonical).hexdigest()


@dataclass(frozen=True, kw_only=True)
class KeysAdvertised(Message):
    session: str
    owner: str
    channel_key: bytes
    mask_key: bytes
    signature: bytes


@dataclass(frozen=True, kw_only=True)
class KeyBook(Message):
    """`entries`: `records.KeyEntry` of everybody who advertised keys."""

    session: str
    entries: bytes


@dataclass(frozen=True, kw_only=True)
class SharesSealed(Message):
    """`shares`: a `records.SealedShare` for each neighbour."""

    session: str
    owner: str
    commitment: bytes
    shares: bytes
    signature: bytes


@dataclass(frozen=True, kw_only=True)
class KeyShares(Message):
    """`deliveries`: a `records.ShareDelivery` from each neighbour; `manifests`: what each signed, hashed.

    `opened`: a `records.OpenedShare` from each neighbour whose shares this owner disputed.
    """

    session: str
    deliveries: bytes
    manifests: bytes
    opened: bytes


@dataclass(frozen=True, kw_only=True)
class SharesDisputed(Message):
    """`disputes`: a `records.Signed` for each neighbour that sealed other shares than it committed to."""

    session: str
    owner: str
    disputes: bytes


@dataclass(frozen=True, kw_only=True)
class OpenShares(Message):
    """`disputes`: a `records.Signed` by each neighbour that disputes the shares that this owner dealt it."""

    session: str
    disputes: bytes


@dataclass(frozen=True, kw_only=True)
class SharesOpened(Message):
    """`shares`: a `records.OpenedShare` for each neighbour that disputed them."""

    session: str
    owner: str
    shares: bytes
    signature: bytes


@dataclass(frozen=True, kw_only=True)
class PartRequest(Message):
    session: str
    part: int


@dataclass(frozen=True, kw_only=True)
class MaskedPart(Message):
    session: str
    owner: str
    part: int
    payload: NDArray  # (part size,) of the layout's ring
    signature: bytes


@dataclass(frozen=True, kw_only=True)
class SurvivorList(Message):
    """`survivors`: a `records.Survivor` for everybody whose whole vector arrived."""

    session: str
    survivors: bytes


@dataclass(frozen=True, kw_only=True)
class SurvivorsSigned(Message):
    session: str
    owner: str
    signature: bytes


@dataclass(frozen=True, kw_only=True)
class Acknowledgements(Message):
    """`signatures`: `records.Signed` over the survivor list."""

    session: str
    signatures: bytes


@dataclass(frozen=True, kw_only=True)
class SharesRevealed(Message):
    """`shares`: a `records.RevealedShare` for each neighbour, of one kind each."""

    session: str
    owner: str
    shares: bytes
    signature: bytes


@dataclass(frozen=True, kw_only=True)
class SumOpened(Message):
    session: str
    owner: str


@dataclass(frozen=True, kw_only=True)
class VectorPart(Message):
    session: str
    owner: str
    part: int
    payload: NDArray  # (part size,) of the layout's ring


@dataclass(frozen=True, kw_only=True)
class DeliveryPart(Message):
    """Part `part` of `parts` of what the coordinator sends at `position` of the schedule.

    `signature`: the coordinator's, over the whole (certificates.delivery_body), so that an owner can show what it was
    sent.
    """

    run: str
    agreement_digest: str
    position: int
    part: int
    parts: int
    payload: NDArray  # (part size,) float32
    signature: bytes


@dataclass(frozen=True, kw_only=True)
class CandidatePart(DeliveryPart):
    """Of the merged candidate `model`, to be judged on the examples that the schedule says."""

    model: str


@dataclass(frozen=True, kw_only=True)
class MixturePart(DeliveryPart):
    """Of the mixture `model` of merged deltas that this owner has, to be judged like a candidate."""

    model: str


@dataclass(frozen=True, kw_only=True)
class MergedStepPart(DeliveryPart):
    """Of what a step of a multi-round method merged, for the next step to be measured with."""


@dataclass(frozen=True, kw_only=True)
class ScalesPart(DeliveryPart):
    """Of the scales on which contributions are summed (scaling.py)."""


@dataclass(frozen=True, kw_only=True)
class CorrectionPart(DeliveryPart):
    """Of the corrections of the check that follows (common/verification.py), with a payload as packed.py makes it.

    `nonces`: a `records.Nonce` of each owner whose contribution is merged.
    """

    nonces: bytes


@dataclass(frozen=True, kw_only=True)
class Draw(Message):
    """Asks for what the check needs that is due at `position`: a nonce for its corrections, or a key for itself."""

    run: str
    agreement_digest: str
    position: int


@dataclass(frozen=True, kw_only=True)
class Drawn(Message):
    """`nonce`: fresh; for the check itself, a public key (summation/pairwise.py).

    `signature`: over it and what the owner has been sent (certificates.nonce_body).
    """

    run: str
    owner: str
    position: int
    nonce: str
    signature: bytes


@dataclass(frozen=True, kw_only=True)
class CheckKeys(Message):
    """Asks for an owner's part of the check at `position`. `nonces`: a `records.Nonce` of each contributor: its key."""

    run: str
    agreement_digest: str
    position: int
    nonces: bytes


@dataclass(frozen=True, kw_only=True)
class CheckShares(Message):
    run: str
    owner: str
    position: int
    payload: NDArray  # (layout size,) of the layout's ring
    signature: bytes


@dataclass(frozen=True, kw_only=True)
class UploadsOpened(Message):
    """What everybody needs to add up a sum that is open to all owners.

    `payload`: the owners' masked vectors, one after the other in the order of the survivor list, or of a check's keys.
    `proofs`: a `records.OpenedSeed` of everybody who shared keys; for a check, a `records.Signed` of each vector.
    """

    session: str
    proofs: bytes
    payload: NDArray  # (owners * layout size,) of the layout's ring


@dataclass(frozen=True, kw_only=True)
class OpeningChecked(Message):
    session: str
    owner: str


@dataclass(frozen=True, kw_only=True)
class PartReceived(Message):
    run: str
    owner: str
    position: int
    part: int


@dataclass(frozen=True, kw_only=True)
class Result(Message):
    """What is published: the candidate's name, the model's digest, the digest of everything that was sent.

    `publication`: every file and metric of it (publication.py).
    """

    run: str
    model: str
    model_digest: str
    deliveries_digest: str
    publication: bytes
    signature: bytes


@dataclass(frozen=True, kw_only=True)
class ResultReceived(Message):
    run: str
    owner: str
    signature: bytes


@dataclass(frozen=True, kw_only=True)
class Receipts(Message):
    """`signatures`: `records.Signed` over the result."""

    run: str
    signatures: bytes


@dataclass(frozen=True, kw_only=True)
class ReceiptsKept(Message):
    run: str
    owner: str


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


Packet = tuple[Message, ...]  # at least one; all their payloads together are at most PART_BYTES

KINDS: dict[str, type[Message]] = {
    kind.__name__: kind
    for kind in (
        RollCall,
        Present,
        BurnSession,
        SessionBurned,
        BurnCertificate,
        CertificateKept,
        OpenSum,
        KeysAdvertised,
        KeyBook,
        SharesSealed,
        KeyShares,
        SharesDisputed,
        OpenShares,
        SharesOpened,
        PartRequest,
        MaskedPart,
        SurvivorList,
        SurvivorsSigned,
        Acknowledgements,
        SharesRevealed,
        SumOpened,
        VectorPart,
        CandidatePart,
        MixturePart,
        MergedStepPart,
        ScalesPart,
        CorrectionPart,
        PartReceived,
        Draw,
        Drawn,
        CheckKeys,
        CheckShares,
        UploadsOpened,
        OpeningChecked,
        Result,
        ResultReceived,
        Receipts,
        ReceiptsKept,
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
    """Build the message that `envelope` holds. Raises RemoteProtocolError for anything that is not exactly one."""
    kind = KINDS.get(envelope.kind)
    if kind is None:
        raise RemoteProtocolError(f"unknown message kind {envelope.kind[:40]!r}")
    values: dict[str, object] = dict(envelope.fields)
    if "payload" in values:
        raise RemoteProtocolError(f"{envelope.kind}: payload is not a small field")
    if envelope.payload is not None:
        values["payload"] = envelope.payload
    expected = {field.name for field in fields(kind)}
    if set(values) != expected:  # check: fields-are-exact
        differing = ", ".join(sorted(str(name)[:40] for name in set(values) ^ expected))
        shown_names = shown(differing)  # check: field-names-are-one-line
        raise RemoteProtocolError(f"{envelope.kind}: missing or unexpected fields: {shown_names}")
    try:
        return kind(**values)
    except LocalProtocolError as malformed:
        raise RemoteProtocolError(malformed.message) from None


def check_packet(packet: Packet) -> None:
    """Raise RemoteProtocolError for an empty packet, or one that carries more bytes than one message may."""
    if not packet:  # check: packets-hold-a-message
        raise RemoteProtocolError("a packet holds no message")
    size = sum(map(payload_bytes, packet))
    if size > PART_BYTES:  # check: packets-are-bounded
        raise RemoteProtocolError(f"a packet carries {size} bytes, at most {PART_BYTES} are allowed")


def payload_bytes(message: Message) -> int:
    """The size of a message's array, a part of a vector."""
    payload = encode(message).payload
    return 0 if payload is None else payload.nbytes


def _is_hex_64(value: object) -> bool:
    return isinstance(value, str) and HEX_64.fullmatch(value) is not None


def _is_owner(value: object) -> bool:
    return isinstance(value, str) and OWNER_NAME.fullmatch(value) is not None


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not flaw(value, MAX_LINE)  # check: model-names-are-one-line


def _is_index(value: object) -> bool:
    return type(value) is int and 0 <= value < MAX_PARTS


def _is_round(value: object) -> bool:
    return type(value) is int and 0 <= value < MAX_ROUND


def _is_payload(value: object) -> bool:
    return (
        isinstance(value, np.ndarray)
        and value.ndim == 1
        and value.dtype in (np.dtype("<u8"), np.dtype("<u4"), np.dtype("<f4"))
        and value.nbytes <= PART_BYTES
    )


def _is_bytes(length: int) -> Callable[[object], bool]:
    return lambda value: isinstance(value, bytes) and len(value) == length


def _is_list(value: object) -> bool:
    return isinstance(value, bytes) and len(value) <= MAX_LIST_BYTES  # check: lists-are-bounded


_CHECKS: dict[str, Callable[[object], bool]] = {
    "version": lambda value: type(value) is int and 0 <= value < 2**31,
    "run": _is_hex_64,
    "session": _is_hex_64,
    "pending": lambda value: value == "" or _is_hex_64(value),
    "round": _is_round,
    "next_round": _is_round,
    "nonce": _is_hex_64,
    "model_digest": _is_hex_64,
    "deliveries_digest": _is_hex_64,
    "channel_key": _is_bytes(32),
    "mask_key": _is_bytes(32),
    "commitment": _is_bytes(32),
    "signature": _is_bytes(64),
    "entries": _is_list,
    "shares": _is_list,
    "deliveries": _is_list,
    "manifests": _is_list,
    "opened": _is_list,
    "disputes": _is_list,
    "survivors": _is_list,
    "signatures": _is_list,
    "publication": _is_list,
    "nonces": _is_list,
    "proofs": _is_list,
    "agreement_digest": _is_hex_64,
    "layout_digest": _is_hex_64,
    "owner": _is_owner,
    "position": _is_index,
    "model": _is_text,
    "part": _is_index,
    "parts": _is_index,
    "payload": _is_payload,
    "code": lambda value: isinstance(value, str) and value in EXIT_CODES,
}
