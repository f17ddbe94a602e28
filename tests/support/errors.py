"""What errors say: the message and the hint."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from pydantic import ValidationError

from common.errors import AmalgramError, RuleError


@contextmanager
def refused(message: str, *, hint: str) -> Iterator[None]:
    """Expect an agreement to be refused by a rule with this message (a part of it) and this hint (a part of it)."""
    with pytest.raises(ValidationError, match=re.escape(message)) as caught:
        yield
    (problem,) = caught.value.errors()
    rule = problem["ctx"]["error"]
    assert isinstance(rule, RuleError)
    assert hint in rule.hint


def in_two_lines(error: AmalgramError) -> str:
    """What a person reads: the message in one line, and the hint, if there is one, in another."""
    assert "\n" not in error.message
    assert "\n" not in error.hint
    return str(error)
