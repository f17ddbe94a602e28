"""State that outlives a process: frozen dataclasses to JSON values and back, exactly.

A class that derives from `SavedState` declares its fields with types, and a `version` that changes with them. Bytes are
written in hexadecimal. Reading refuses whatever this version would not have written: unknown or missing keys, another
version, wrong types.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import ConfigDict, PlainSerializer, PlainValidator, TypeAdapter, ValidationError

from common.errors import LocalProtocolError


def _from_hex(digits: Any) -> bytes:
    if not isinstance(digits, str):
        raise ValueError("not a string")
    return bytes.fromhex(digits)


# For what grows with the owners: pydantic writes and reads the same digits, but takes several times as long.
LongBytes = Annotated[bytes, PlainValidator(_from_hex), PlainSerializer(bytes.hex, return_type=str, when_used="json")]


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """Base of every state that is saved."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid", strict=True, ser_json_bytes="hex", val_json_bytes="hex")


S = TypeVar("S", bound=SavedState)
_ADAPTERS: dict[type[SavedState], TypeAdapter[Any]] = {}  # each made once: that takes a while


def to_json(kind: type[SavedState], state: SavedState) -> dict[str, Any]:
    """The fields of `kind`, as JSON values; `state` may belong to a subclass with more fields, which are left out."""
    values: dict[str, Any] = _adapter(kind).dump_python(state, mode="json")
    return values


def from_json(kind: type[S], values: Mapping[str, Any]) -> S:
    """The state that was saved. Raises LocalProtocolError unless `to_json` would write exactly these values."""
    try:
        state: S = _adapter(kind).validate_json(json.dumps(values))
        is_exact = to_json(kind, state) == values
    except ValidationError:
        is_exact = False
    if not is_exact:
        raise LocalProtocolError(
            f"this version cannot read the saved state ({kind.__name__})",
            hint="another version wrote it, or it is damaged; start a new run",
        )
    return state


def _adapter(kind: type[SavedState]) -> TypeAdapter[Any]:
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]
