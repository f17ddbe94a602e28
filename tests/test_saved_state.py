"""Saved state: what was saved comes back exactly, and nothing else is read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from common import saved_state
from common.errors import LocalProtocolError
from common.saved_state import SavedState


@dataclass(frozen=True, kw_only=True)
class Saved(SavedState):
    version: Literal[2] = 2
    phase: Literal["first", "second"] = "first"
    secret: bytes = field(default=b"", repr=False)
    shares: Mapping[int, bytes] = field(default_factory=dict)
    signs: tuple[tuple[bytes, Literal[1, -1]], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Running(Saved):
    """The state with what is not saved."""

    terms: object


STATE = Running(phase="second", secret=b"\xff\x00", shares={3: b"x"}, signs=((b"k", -1),), terms=object())
WRITTEN: dict[str, Any] = {
    "version": 2,
    "phase": "second",
    "secret": "ff00",
    "shares": {"3": "78"},
    "signs": [["6b", -1]],
}


def test_state_comes_back_exactly_without_what_is_not_saved() -> None:
    written = saved_state.to_json(Saved, STATE)
    assert written == WRITTEN
    again = saved_state.from_json(Saved, json.loads(json.dumps(written)))
    assert vars(again) == {name: value for name, value in vars(STATE).items() if name != "terms"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"version": 1},
        {"version": "2"},
        {"phase": "third"},
        {"secret": "FF00"},
        {"secret": "zz"},
        {"secret": 3},
        {"shares": {"03": "78"}},
        {"shares": {"x": "78"}},
        {"signs": [["6b", 2]]},
        {"signs": [["6b"]]},
        {"unknown": 1},
    ],
)
def test_state_that_this_version_would_not_write_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(LocalProtocolError, match=r"cannot read the saved state \(Saved\)"):
        saved_state.from_json(Saved, WRITTEN | wrong)


@pytest.mark.parametrize("missing", WRITTEN)
def test_state_without_one_of_its_keys_is_refused_even_where_the_key_has_a_default(missing: str) -> None:
    with pytest.raises(LocalProtocolError):
        saved_state.from_json(Saved, {name: value for name, value in WRITTEN.items() if name != missing})
