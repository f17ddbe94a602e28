"""Messages: exact over the wire and through Flower's records; anything else is refused with a typed error."""

from contextlib import suppress
from io import BytesIO

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from common.errors import RemoteProtocolError
from common.flower_records import from_record, to_record
from common.messages import (
    KINDS,
    CandidatePart,
    Envelope,
    Finish,
    Message,
    OpenSum,
    PartRequest,
    Present,
    Refusal,
    RollCall,
    SumOpened,
    VectorPart,
    decode,
    encode,
)
from deploy.in_process_grid import through_serialisation

HEX = "ab" * 32
EXAMPLES: list[Message] = [
    RollCall(version=1, run=HEX, agreement_digest=HEX),
    Present(run=HEX, owner="ada"),
    OpenSum(run=HEX, agreement_digest=HEX, session=HEX, statistic="test", models="base,regmean@0.9", layout_digest=HEX),
    SumOpened(session=HEX, owner="ada"),
    PartRequest(session=HEX, part=3),
    VectorPart(session=HEX, owner="ada", part=3, payload=np.array([1.5, -2.0, 5e-324])),
    CandidatePart(
        run=HEX,
        agreement_digest=HEX,
        model="regmean@0.9",
        split="test",
        part=0,
        parts=1,
        payload=np.array([1.0], dtype=np.float32),
    ),
    Finish(run=HEX),
    Refusal(code="data"),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_survives_flower_s_own_serialisation(message: Message) -> None:
    arrived = from_record(through_serialisation(to_record(message)))
    assert type(arrived) is type(message)
    one, other = encode(arrived), encode(message)
    assert one.fields == other.fields
    if other.payload is None:
        assert one.payload is None
    else:
        np.testing.assert_array_equal(one.payload, other.payload)
        assert one.payload.dtype == other.payload.dtype


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
        Envelope(kind="Refusal", fields={"code": ["data"]}, payload=None),  # type: ignore[dict-item]
        Envelope(kind="VectorPart", fields={"session": HEX, "owner": "ada", "part": 0}, payload=None),
        Envelope(kind="VectorPart", fields={"session": HEX, "owner": "ada", "part": 0}, payload=np.zeros((2, 2))),
        Envelope(kind="VectorPart", fields={"session": HEX, "owner": "ada", "part": 0}, payload=np.zeros(2, np.int64)),
        Envelope(kind="VectorPart", fields={"session": HEX, "owner": "ada", "part": 0}, payload=np.zeros(2, ">f8")),
        Envelope(kind="VectorPart", fields={"session": HEX, "owner": "ada", "part": 0}, payload=np.zeros(8_000_001)),
        Envelope(kind="VectorPart", fields={"session": HEX, "owner": "ada", "part": 0, "payload": 1}, payload=None),
    ],
    ids=lambda envelope: f"{envelope.kind}-{len(envelope.fields)}",
)
def test_bad_messages_are_refused(envelope: Envelope) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(envelope)


@given(
    st.sampled_from([*KINDS, "x"]),
    st.dictionaries(
        st.sampled_from(
            ["run", "session", "owner", "part", "parts", "code", "model", "models", "version", "payload", "z"]
        ),
        st.one_of(st.text(max_size=70), st.integers(), st.just(HEX)),
    ),
    st.one_of(st.none(), st.integers(0, 3).map(np.zeros)),
)
def test_garbage_gives_a_message_or_a_typed_error(kind: str, fields: dict, payload: np.ndarray | None) -> None:
    with suppress(RemoteProtocolError):
        decode(Envelope(kind=kind, fields=fields, payload=payload))


def claiming(length: int) -> bytes:
    """A NumPy file whose header promises `length` numbers and that holds two."""
    content = BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(content, header)  # type: ignore[arg-type]
    return content.getvalue() + bytes(16)


@pytest.mark.parametrize(
    "record",
    [
        RecordDict(),
        RecordDict({"header": ConfigRecord({"run": HEX})}),
        RecordDict({"header": ConfigRecord({"kind": 3})}),
        RecordDict({"header": ConfigRecord({"kind": "Finish", "run": HEX}), "more": ConfigRecord({})}),
        RecordDict({"header": ConfigRecord({"kind": "Finish", "run": HEX}), "payload": ConfigRecord({})}),
        RecordDict({"header": ArrayRecord()}),
        RecordDict(
            {
                "header": ConfigRecord({"kind": "VectorPart", "session": HEX, "owner": "ada", "part": 0}),
                "payload": ArrayRecord({"payload": Array("float64", (9,), "numpy.ndarray", b"no array")}),
            }
        ),
        RecordDict(
            {
                "header": ConfigRecord({"kind": "VectorPart", "session": HEX, "owner": "ada", "part": 0}),
                "payload": ArrayRecord({"payload": Array("float64", (9,), "numpy.ndarray", claiming(10**14))}),
            }
        ),
    ],
)
def test_records_that_are_not_exactly_one_message_are_refused(record: RecordDict) -> None:
    with pytest.raises(RemoteProtocolError):
        from_record(record)
