"""What an agreement's rules say: the message and the hint."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from pydantic import ValidationError

from common.errors import RuleError


@contextmanager
def refused(message: str, *, hint: str) -> Iterator[None]:
    """Expect an agreement to be refused by a rule with this message (a part of it) and this hint (a part of it)."""
    with pytest.raises(ValidationError, match=re.escape(message)) as caught:
        yield
    (problem,) = caught.value.errors()
    rule = problem["ctx"]["error"]
    assert isinstance(rule, RuleError)
    assert hint in rule.hint
