"""Arrow and Parquet files that another party wrote: what is checked before anything of them is unpacked.

Arrow trusts a file of its own format: an offset may point anywhere in memory, and a compressed batch is unpacked at
once. In both formats a value that is said once can stand in a million rows.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import DataError
from common.lazy import lazy_module

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import ipc
else:
    pa, pc, ipc = (lazy_module(name) for name in ("pyarrow", "pyarrow.compute", "pyarrow.ipc"))

WRITE_IT_PLAIN = "write it with Dataset.to_parquet, or as JSON Lines"
VALUE_BYTES = 8  # that a value takes at least, also one that the file does not store
MAGIC_BYTES = 8  # before the stream in Arrow's file format
# Where Arrow's format/Message.fbs has a table's fields
HEADER_TYPE, HEADER = 1, 2  # of a message
DATA = 1  # of a dictionary: the batch with its values
COMPRESSION = 3  # of a batch
DICTIONARY_BATCH, RECORD_BATCH = 2, 3


def check_types(path: Path, fields: Iterable[pa.Field]) -> None:
    """Raise DataError for a column that is not text, bytes or numbers, or lists or structs of these."""
    for field in fields:
        if not _is_plain(field.type):  # check: foreign-columns-are-plain
            raise DataError(f"{path}: column {field.name!r:.60} is not text, bytes or lists", hint=WRITE_IT_PLAIN)


def _is_plain(kind: pa.DataType) -> bool:
    types = pa.types
    if types.is_dictionary(kind):
        return _is_bytes(kind.value_type)
    if types.is_list(kind) or types.is_large_list(kind):
        return _is_plain(kind.value_type)
    if types.is_struct(kind):
        return all(_is_plain(kind.field(index).type) for index in range(kind.num_fields))
    return bool(_is_bytes(kind) or types.is_null(kind) or types.is_primitive(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    types = pa.types
    tests = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    return any(is_one(kind) for is_one in tests)


def unpacked_bytes(array: pa.Array) -> int:
    """What the values of a column take when each is written out. Raises pyarrow.ArrowInvalid if it is broken."""
    array.validate(full=True)  # check: foreign-offsets-stay-inside
    return _unpacked(array)


def _unpacked(array: pa.Array) -> int:
    own = VALUE_BYTES * len(array)
    if pa.types.is_dictionary(array.type):
        lengths = pc.binary_length(array.dictionary).cast(pa.int64())
        return own + (pc.sum(lengths.take(array.indices)).as_py() or 0)  # check: what-is-said-once-is-counted-each-time
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        return own + _unpacked(array.flatten())
    if pa.types.is_struct(array.type):
        return own + sum(map(_unpacked, array.flatten()))
    return int(array.nbytes) + own


def plain_stream(content: bytes) -> pa.Buffer:
    """The stream of an Arrow file's bytes, in either format. Raises ArrowInvalid if a batch of it is compressed."""
    whole = pa.py_buffer(content)
    stream = whole.slice(MAGIC_BYTES) if content.startswith(b"ARROW1") else whole
    try:
        packed = any(_is_compressed(each.metadata.to_pybytes()) for each in ipc.MessageReader.open_stream(stream))
    except (struct.error, IndexError):
        raise pa.ArrowInvalid("is broken") from None
    if packed:  # check: foreign-batches-are-not-compressed
        raise pa.ArrowInvalid("is compressed")
    return stream


def _is_compressed(metadata: bytes) -> bool:
    """Whether a message's batch names a compression; `metadata` is its FlatBuffer, which Arrow has verified."""
    message = _pointed(metadata, 0)
    kind = _field(metadata, message, HEADER_TYPE)
    header = _field(metadata, message, HEADER)
    if not kind or not header or metadata[kind] not in (DICTIONARY_BATCH, RECORD_BATCH):
        return False
    batch = _pointed(metadata, header)
    if metadata[kind] == DICTIONARY_BATCH:
        data = _field(metadata, batch, DATA)
        if not data:
            return False
        batch = _pointed(metadata, data)
    return _field(metadata, batch, COMPRESSION) != 0


def _pointed(metadata: bytes, place: int) -> int:
    return place + int(struct.unpack_from("<I", metadata, place)[0])


def _field(metadata: bytes, table: int, number: int) -> int:
    """Where a field of a FlatBuffer's table lies; 0 if it is left out."""
    layout = table - int(struct.unpack_from("<i", metadata, table)[0])
    if 4 + 2 * number >= struct.unpack_from("<H", metadata, layout)[0]:
        return 0
    offset = int(struct.unpack_from("<H", metadata, layout + 4 + 2 * number)[0])
    return table + offset if offset else 0
