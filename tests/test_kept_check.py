"""What the numbers of a kept check show without the model: see common/kept_check.py."""

from collections.abc import Iterator
from dataclasses import replace
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.kept_check import GROUPS, LARGEST_FACTOR_TOLERANCE, LARGEST_TOLERANCE, times_tolerance
from common.merge_methods.equations import FisherEquation, MeanEquation
from common.verification import LEAST_TOLERANCE, factor_tolerance, tolerance

SCALES = st.floats(1.0, 2.0**60)


@st.composite
def merged(draw: st.DrawFn) -> list[float]:
    """The sum's numbers of a merge: groups whose shares are zero up to their tolerance."""
    numbers = list[float]()
    for length, relative in draw(st.lists(st.sampled_from(GROUPS), min_size=1, max_size=6)):
        scale = draw(SCALES)
        numbers += [draw(st.floats(-1, 1)) * relative * scale for _ in range(length - 1)]
        numbers.append(scale)
    return numbers


@given(merged())
def test_a_merge_s_shares_are_within_the_bounds_of_some_division(numbers: list[float]) -> None:
    assert times_tolerance(numbers) <= 1


@given(merged(), SCALES, st.floats(2.0**-20, 1.0))
def test_shares_of_an_equation_that_does_not_hold_are_beyond_them(
    numbers: list[float], scale: float, size: float
) -> None:
    """All seven columns see an error, with numbers of about the same size."""
    false = [size * scale * each for each in (1.0, -0.7, 0.4, 0.9, -0.3, 0.6, 0.8)]
    assert times_tolerance([*numbers, *false, scale]) > 1
    assert times_tolerance([*false, scale, *numbers]) > 1


def divisions(count: int) -> Iterator[tuple[tuple[int, float], ...]]:
    if count == 0:
        yield ()
    for group in GROUPS:
        if group[0] <= count:
            yield from ((*rest, group) for rest in divisions(count - group[0]))


@given(st.lists(st.floats(-4, 4).map(lambda power: 2.0 ** (10 * power)), max_size=12))
def test_the_division_is_the_one_that_fits_best(numbers: list[float]) -> None:
    """The slow way: all divisions."""

    def times(division: tuple[tuple[int, float], ...]) -> float:
        largest, start = 0.0, 0
        for length, relative in division:
            *shares, scale = numbers[start : start + length]
            largest = max(largest, max(map(abs, shares)) / (relative * scale + LEAST_TOLERANCE))
            start += length
        return largest

    slowly = min(map(times, divisions(len(numbers))), default=inf)
    assert times_tolerance(numbers) == (slowly if len(numbers) % 2 == 0 else inf)


def test_a_scale_below_zero_excuses_nothing() -> None:
    assert times_tolerance([0.0, -1.0]) == 0
    assert times_tolerance([1.0, -1e30]) > 1


@pytest.mark.parametrize("rows", [1, 4096, 2**22])
def test_no_equation_s_tolerance_is_above_the_bounds(rows: int) -> None:
    mean = MeanEquation.of("w", (rows, 4096))
    dense = replace(mean, shape=(rows, rows), is_diagonal=False)
    for equation in (FisherEquation.of("w", (rows, 1)), mean, dense):
        assert tolerance(equation, 1.0) <= LARGEST_TOLERANCE + LEAST_TOLERANCE


def test_no_factor_s_tolerance_is_above_its_bound() -> None:
    for inputs in (1, 4096, 2**15):
        equation = replace(MeanEquation.of("w", (inputs, 2)), is_scaled=True)
        assert factor_tolerance(equation, 1.0) <= LARGEST_FACTOR_TOLERANCE
