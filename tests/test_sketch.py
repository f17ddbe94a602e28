"""Sketches against the sets that they stand for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.sketch import KEPT, Sketch, share_in_common, sketch_of

KEY, OTHER_KEY = b"k" * 32, b"o" * 32


def numbers(start: int, stop: int) -> list[bytes]:
    return [b"%d" % number for number in range(start, stop)]


@given(st.sets(st.binary(max_size=3), min_size=1), st.sets(st.binary(max_size=3), min_size=1))
def test_small_sets_are_compared_exactly(one: set[bytes], other: set[bytes]) -> None:
    share = share_in_common(sketch_of(KEY, one), sketch_of(KEY, other))
    assert share == len(one & other) / min(len(one), len(other))


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [
        (numbers(0, 20_000), numbers(0, 20_000), 1.0),
        (numbers(0, 20_000), numbers(200, 20_200), 0.99),
        (numbers(0, 20_000), numbers(10_000, 30_000), 0.5),
        (numbers(0, 20_000), numbers(18_000, 38_000), 0.1),
        (numbers(0, 20_000), numbers(20_000, 40_000), 0.0),
        (numbers(0, 20_000), numbers(500, 1_500), 1.0),
        (numbers(0, 20_000), numbers(19_000, 21_000), 0.5),
    ],
)
def test_shares_of_large_sets_are_estimated(one: list[bytes], other: list[bytes], share: float) -> None:
    first, second = sketch_of(KEY, one), sketch_of(KEY, other)
    sample = KEPT * len(other) / len(one) if len(other) < len(one) else KEPT
    four_sigma = 4 * (share * (1 - share) / sample) ** 0.5
    assert share_in_common(first, second) == share_in_common(second, first)
    assert share_in_common(first, second) == pytest.approx(share, abs=four_sigma + 1e-12)


def test_an_element_counts_once_and_an_empty_set_shares_nothing() -> None:
    assert sketch_of(KEY, [b"a", b"a", b"b"]) == sketch_of(KEY, [b"b", b"a"])
    assert share_in_common(Sketch(), sketch_of(KEY, [b"a"])) == share_in_common(Sketch(), Sketch()) == 0


def test_another_key_gives_another_sketch() -> None:
    """Whoever lacks the key cannot try which elements a sketch is of."""
    assert share_in_common(sketch_of(KEY, numbers(0, 1000)), sketch_of(OTHER_KEY, numbers(0, 1000))) == 0
