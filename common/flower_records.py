"""Amalgram's messages in Flower's records, and back: the only place in common that imports flwr."""

from io import BytesIO
from typing import cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from common.errors import RemoteProtocolError
from common.messages import Envelope, Field, Message, decode, encode

HEADER, PAYLOAD, KIND = "header", "payload", "kind"


def to_record(message: Message) -> RecordDict:
    """One message as a RecordDict: a header of small fields and, where there is one, a payload array."""
    envelope = encode(message)
    header = ConfigRecord({KIND: envelope.kind, **envelope.fields})
    if envelope.payload is None:
        return RecordDict({HEADER: header})
    return RecordDict({HEADER: header, PAYLOAD: ArrayRecord({PAYLOAD: Array(envelope.payload)})})


def from_record(record: RecordDict) -> Message:
    """The message in a RecordDict. Raises RemoteProtocolError on anything that is not exactly one."""
    header, payload = record.get(HEADER), record.get(PAYLOAD)
    if not isinstance(header, ConfigRecord) or not set(record) <= {HEADER, PAYLOAD}:
        raise RemoteProtocolError("a message has no header, or records that do not belong")
    values = dict(header)
    kind = values.pop(KIND, None)
    if not isinstance(kind, str):
        raise RemoteProtocolError("a message does not say its kind")
    array = None
    if payload is not None:
        if not isinstance(payload, ArrayRecord) or set(payload) != {PAYLOAD}:
            raise RemoteProtocolError(f"{kind[:40]}: the payload is not exactly one array")
        array = _read_array(payload[PAYLOAD].data, kind)
    fields = cast(dict[str, Field], values)  # decode looks at every type
    return decode(Envelope(kind=kind, fields=fields, payload=array))


def _read_array(data: bytes, kind: str) -> NDArray:
    """The array in NumPy's file format, its size checked against the bytes before anything is allocated."""
    content = BytesIO(data)
    try:
        if np.lib.format.read_magic(content) != (1, 0):
            raise ValueError
        shape, _, dtype = np.lib.format.read_array_header_1_0(content)
        if len(shape) != 1 or dtype.hasobject or shape[0] * dtype.itemsize != len(data) - content.tell():
            raise ValueError
        return np.frombuffer(data, dtype, offset=content.tell())
    except (ValueError, TypeError, EOFError):
        raise RemoteProtocolError(f"{kind[:40]}: the payload cannot be read") from None
