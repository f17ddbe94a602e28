"""Messages are exact over the wire and through Flower's records; anything else is refused with a typed error."""

from contextlib import suppress
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.errors import LocalProtocolError, RemoteProtocolError
from common.messages import (
    _CHECKS,
    KINDS,
    Acknowledgements,
    BurnCertificate,
    BurnSession,
    CandidatePart,
    CertificateKept,
    CheckKeys,
    CheckShares,
    CorrectionPart,
    Draw,
    Drawn,
    Envelope,
    Finish,
    Finished,
    KeyBook,
    KeysAdvertised,
    KeyShares,
    MaskedPart,
    MergedStepPart,
    Message,
    MixturePart,
    OpeningChecked,
    OpenShares,
    OpenSum,
    PartReceived,
    PartRequest,
    Present,
    Receipts,
    ReceiptsKept,
    Refusal,
    Result,
    ResultReceived,
    RollCall,
    ScalesPart,
    SessionBurned,
    SharesDisputed,
    SharesOpened,
    SharesRevealed,
    SharesSealed,
    SumOpened,
    SurvivorList,
    SurvivorsSigned,
    UploadsOpened,
    VectorPart,
    decode,
    encode,
)
from common.wire import from_record, to_record
from deploy.simulation.in_process_grid import through_serialisation

HEX, KEY, SIGNATURE = "ab" * 32, b"k" * 32, b"s" * 64
DELIVERY: dict[str, Any] = {
    "run": HEX,
    "agreement_digest": HEX,
    "position": 4,
    "part": 0,
    "parts": 1,
    "payload": np.array([1.0], dtype=np.float32),
    "signature": SIGNATURE,
}
EXAMPLES: list[Message] = [
    RollCall(version=1, run=HEX, agreement_digest=HEX),
    Present(run=HEX, owner="ada", next_round=0, pending="", signature=SIGNATURE),
    BurnSession(run=HEX, session=HEX),
    SessionBurned(session=HEX, owner="ada", signature=SIGNATURE),
    BurnCertificate(run=HEX, session=HEX, signatures=b"12"),
    CertificateKept(session=HEX, owner="ada"),
    OpenSum(
        run=HEX,
        agreement_digest=HEX,
        round=7,
        nonce=HEX,
        position=3,
        deliveries_digest=HEX,
        layout_digest=HEX,
    ),
    KeysAdvertised(session=HEX, owner="ada", channel_key=KEY, mask_key=KEY, signature=SIGNATURE),
    KeyBook(session=HEX, entries=b"12"),
    SharesSealed(session=HEX, owner="ada", commitment=KEY, shares=b"12", signature=SIGNATURE),
    KeyShares(session=HEX, deliveries=b"12", manifests=b"", opened=b""),
    SharesDisputed(session=HEX, owner="hotel", disputes=b"12"),
    OpenShares(session=HEX, disputes=b""),
    SharesOpened(session=HEX, owner="hotel", shares=b"12", signature=bytes(64)),
    MaskedPart(session=HEX, owner="ada", part=0, payload=np.array([1, 2**64 - 1], "<u8"), signature=SIGNATURE),
    SurvivorList(session=HEX, survivors=b"12"),
    SurvivorsSigned(session=HEX, owner="ada", signature=SIGNATURE),
    Acknowledgements(session=HEX, signatures=b"12"),
    SharesRevealed(session=HEX, owner="ada", shares=b"12", signature=SIGNATURE),
    SumOpened(session=HEX, owner="ada"),
    PartRequest(session=HEX, part=3),
    VectorPart(session=HEX, owner="ada", part=3, payload=np.array([1, 2, 2**63], "<u8")),
    CandidatePart(**DELIVERY, model="regmean@0.9"),
    MixturePart(**DELIVERY, model="search@7"),
    MergedStepPart(**DELIVERY),
    ScalesPart(**DELIVERY),
    CorrectionPart(**DELIVERY, nonces=b"34"),
    Draw(run=HEX, agreement_digest=HEX, position=4),
    Drawn(run=HEX, owner="ada", position=4, nonce=HEX, signature=SIGNATURE),
    CheckKeys(run=HEX, agreement_digest=HEX, position=4, nonces=b"34"),
    CheckShares(run=HEX, owner="ada", position=4, payload=np.array([1, 2**63], "<u8"), signature=SIGNATURE),
    UploadsOpened(session=HEX, proofs=b"35", payload=np.array([1, 2, 2**63], "<u8")),
    OpeningChecked(session=HEX, owner="ada"),
    PartReceived(run=HEX, owner="ada", position=4, part=0),
    Result(run=HEX, model="average", model_digest=HEX, deliveries_digest=HEX, publication=b"{}", signature=SIGNATURE),
    ResultReceived(run=HEX, owner="ada", signature=SIGNATURE),
    Receipts(run=HEX, signatures=b"12"),
    ReceiptsKept(run=HEX, owner="ada"),
    Finish(run=HEX),
    Finished(run=HEX, owner="ada"),
    Refusal(code="data"),
]


def test_there_is_an_example_of_every_message() -> None:
    assert {type(message).__name__ for message in EXAMPLES} == set(KINDS)


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_survives_flower_s_own_serialisation(message: Message) -> None:
    (arrived,) = from_record(through_serialisation(to_record((message,))))
    assert type(arrived) is type(message)
    one, other = encode(arrived), encode(message)
    assert one.fields == other.fields
    if other.payload is None:
        assert one.payload is None
    else:
        np.testing.assert_array_equal(one.payload, other.payload)
        assert one.payload.dtype == other.payload.dtype


@pytest.mark.parametrize("payload", [np.arange(5, dtype="<u8"), np.empty(0, "<f4"), np.arange(8, dtype="<u4")[::2]])
def test_an_array_travels_as_flower_writes_it(payload: NDArray) -> None:
    (arrays,) = to_record((MergedStepPart(**DELIVERY | {"payload": payload}),)).array_records.values()
    assert arrays["payload"] == Array(payload)


@pytest.mark.parametrize(
    "envelope",
    [
        Envelope(kind="Sesame", fields={}, payload=None),
        Envelope(kind="Finish", fields={}, payload=None),
        Envelope(kind="Finish", fields={"run": HEX, "more": 1}, payload=None),
        Envelope(kind="Finish", fields={"run": HEX}, payload=np.zeros(1)),
        Envelope(kind="Finish", fields={"run": HEX.upper()}, payload=None),
        Envelope(kind="Finish", fields={"run": 7}, payload=None),
        Envelope(kind="Present", fields={"run": HEX, "owner": "../ada"}, payload=None),
        Envelope(kind="PartRequest", fields={"session": HEX, "part": -1}, payload=None),
        Envelope(kind="PartRequest", fields={"session": HEX, "part": True}, payload=None),
        Envelope(kind="PartRequest", fields={"session": HEX, "part": 10**9}, payload=None),
        Envelope(kind="Refusal", fields={"code": "row 3 says: Mrs Smith"}, payload=None),
        Envelope(kind="KeyBook", fields={"session": HEX, "entries": "12"}, payload=None),
        Envelope(kind="KeyBook", fields={"session": HEX, "entries": bytes(16_000_001)}, payload=None),
        Envelope(kind="SurvivorsSigned", fields={"session": HEX, "owner": "a", "signature": b"x" * 63}, payload=None),
        Envelope(kind="Refusal", fields={"code": ["data"]}, payload=None),  # type: ignore[dict-item]
        Envelope(kind="VectorPart", fields={"session": HEX, "owner": "ada", "part": 0}, payload=None),
        Envelope(
            kind="VectorPart", fields={"session": HEX, "owner": "ada", "part": 0}, payload=np.zeros((2, 2), "<u8")
        ),
        Envelope(kind="VectorPart", fields={"session": HEX, "owner": "ada", "part": 0}, payload=np.zeros(2, np.int64)),
        Envelope(kind="VectorPart", fields={"session": HEX, "owner": "ada", "part": 0}, payload=np.zeros(2, ">u8")),
        Envelope(
            kind="VectorPart", fields={"session": HEX, "owner": "ada", "part": 0}, payload=np.zeros(8_000_001, "<u8")
        ),
        Envelope(kind="VectorPart", fields={"session": HEX, "owner": "ada", "part": 0, "payload": 1}, payload=None),
    ],
    ids=lambda envelope: f"{envelope.kind}-{len(envelope.fields)}",
)
def test_bad_messages_are_refused(envelope: Envelope) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(envelope)


@pytest.mark.parametrize(
    "change", [{"position": -1}, {"position": "4"}, {"parts": True}, {"payload": None}, {"run": ""}]
)
def test_building_a_malformed_message_is_our_own_mistake_and_receiving_one_the_peer_s(change: dict[str, Any]) -> None:
    fields = {**DELIVERY, **change}
    with pytest.raises(LocalProtocolError, match=f"ScalesPart: {next(iter(change))} is malformed"):
        ScalesPart(**fields)
    payload = fields.pop("payload")
    with pytest.raises(
        RemoteProtocolError, match=r"ScalesPart: .*(is malformed|missing or unexpected fields: payload)"
    ):
        decode(Envelope(kind="ScalesPart", fields=fields, payload=payload))


@pytest.mark.parametrize(("kind", "has_model"), [("CandidatePart", False), ("MergedStepPart", True)])
def test_a_candidate_alone_names_a_model(kind: str, has_model: bool) -> None:
    fields = {name: value for name, value in DELIVERY.items() if name != "payload"}
    fields |= {"model": "average"} if has_model else {}
    with pytest.raises(RemoteProtocolError, match="missing or unexpected fields: model"):
        decode(Envelope(kind=kind, fields=fields, payload=DELIVERY["payload"]))


@given(
    st.sampled_from([*KINDS, "x"]),
    st.dictionaries(
        st.sampled_from([*sorted(_CHECKS), "z"]),
        st.one_of(st.text(max_size=70), st.integers(), st.just(HEX), st.binary(max_size=70)),
    ),
    st.one_of(st.none(), st.integers(0, 3).map(np.zeros)),
)
def test_garbage_gives_a_message_or_a_typed_error(kind: str, fields: dict, payload: np.ndarray | None) -> None:
    with suppress(RemoteProtocolError):
        decode(Envelope(kind=kind, fields=fields, payload=payload))


def claiming(length: int) -> bytes:
    """A NumPy file whose header promises `length` numbers, but which holds two."""
    content = BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(content, header)  # type: ignore[arg-type]
    return content.getvalue() + bytes(16)


@pytest.mark.parametrize(
    "record",
    [
        RecordDict(),
        RecordDict({"header 0": ConfigRecord({"run": HEX})}),
        RecordDict({"header 0": ConfigRecord({"kind": 3})}),
        RecordDict({"header 0": ConfigRecord({"kind": "Finish", "run": HEX}), "more": ConfigRecord({})}),
        RecordDict({"header 0": ConfigRecord({"kind": "Finish", "run": HEX}), "payload 0": ConfigRecord({})}),
        RecordDict({"header 0": ArrayRecord()}),
        RecordDict(
            {
                "header 0": ConfigRecord({"kind": "VectorPart", "session": HEX, "owner": "ada", "part": 0}),
                "payload 0": ArrayRecord({"payload": Array("float64", (9,), "numpy.ndarray", b"no array")}),
            }
        ),
        RecordDict(
            {
                "header 0": ConfigRecord({"kind": "VectorPart", "session": HEX, "owner": "ada", "part": 0}),
                "payload 0": ArrayRecord({"payload": Array("float64", (9,), "numpy.ndarray", claiming(10**14))}),
            }
        ),
    ],
)
def test_records_that_are_not_exactly_one_message_are_refused(record: RecordDict) -> None:
    with pytest.raises(RemoteProtocolError):
        from_record(record)
