"""Amalgram's messages as Flower's records, and back. Nothing else in common imports flwr."""

from io import BytesIO
from typing import cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from common.errors import RemoteProtocolError
from common.messages import Envelope, Field, Message, Packet, check_packet, decode, encode

HEADER, PAYLOAD, KIND = "header", "payload", "kind"


def to_record(packet: Packet) -> RecordDict:
    """One packet as a RecordDict. Message k has a header of small fields, `header k`; its array is `payload k`."""
    record = RecordDict()
    for number, message in enumerate(packet):
        envelope = encode(message)
        record[f"{HEADER} {number}"] = ConfigRecord({KIND: envelope.kind, **envelope.fields})
        if envelope.payload is not None:
            record[f"{PAYLOAD} {number}"] = ArrayRecord({PAYLOAD: _to_array(envelope.payload)})
    return record


def _to_array(payload: NDArray) -> Array:
    """`Array(payload)`, but the numbers are copied once, not three times."""
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(payload))
    data = b"".join((header.getvalue(), np.ascontiguousarray(payload).data))
    return Array(dtype=str(payload.dtype), shape=payload.shape, stype="numpy.ndarray", data=data)


def from_record(record: RecordDict) -> Packet:
    """The packet in a RecordDict. Raises RemoteProtocolError if it is not exactly one packet."""
    count = sum(name.startswith(HEADER) for name in record)
    if not set(record) <= {
        f"{name} {number}" for name in (HEADER, PAYLOAD) for number in range(count)
    }:  # check: packets-have-no-gap
        raise RemoteProtocolError("a packet has a message without a header, or unknown records")
    packet = tuple(
        _read_message(record[f"{HEADER} {number}"], record.get(f"{PAYLOAD} {number}")) for number in range(count)
    )
    check_packet(packet)
    return packet


def _read_message(header: object, payload: object) -> Message:
    values = dict(header) if isinstance(header, ConfigRecord) else {}
    kind = values.pop(KIND, None)
    if not isinstance(kind, str):
        raise RemoteProtocolError("a message does not name its kind")
    array = None
    if payload is not None:
        if not isinstance(payload, ArrayRecord) or set(payload) != {PAYLOAD}:
            raise RemoteProtocolError(f"{kind[:40]}: the payload is not exactly one array")
        array = _read_array(payload[PAYLOAD].data, kind)
    fields = cast(dict[str, Field], values)  # decode checks every type
    return decode(Envelope(kind=kind, fields=fields, payload=array))


def _read_array(data: bytes, kind: str) -> NDArray:
    """Read an array in NumPy's file format, checking its size against the bytes before anything is allocated."""
    content = BytesIO(data)
    try:
        if np.lib.format.read_magic(content) != (1, 0):
            raise ValueError
        shape, _, dtype = np.lib.format.read_array_header_1_0(content)
        if len(shape) != 1 or dtype.hasobject or shape[0] * dtype.itemsize != len(data) - content.tell():
            raise ValueError
        return np.frombuffer(data, dtype, offset=content.tell())
    except Exception:  # check: broken-arrays-are-refused
        # for a malformed header, NumPy raises whatever Python's tokenizer and parser do.
        raise RemoteProtocolError(f"{kind[:40]}: the payload cannot be read") from None
