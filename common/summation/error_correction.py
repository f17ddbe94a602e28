"""Finds a polynomial from its values at many points, a few of which are wrong, and says which ones are.

Values of a polynomial of degree below k at n points are a Reed-Solomon code word. At most one polynomial agrees with
all but (n - k) // 2 of them, the decoding radius. Source: Gao, "A new algorithm for decoding Reed-Solomon codes",
2003. It finds what Berlekamp's and Welch's linear equations find, in O(n^2) steps rather than O(n^3).

Beyond the radius nothing is found, or a polynomial that is not the dealt one: whoever acts on the answer must know by
other means who could have been wrong (masked/coordinator.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.errors import RemoteProtocolError

Polynomial = list[int]  # coefficients, constant first, without zeros at the end; [] is zero


@dataclass(frozen=True, kw_only=True)
class Corrected:
    """The polynomial that nearly all values lie on, and the points whose values do not."""

    coefficients: Polynomial
    wrong: frozenset[int]


def radius(num_values: int, num_coefficients: int) -> int:
    """How many wrong values can be corrected."""
    return max(0, num_values - num_coefficients) // 2


def correct(values: Mapping[int, int], num_coefficients: int, prime: int) -> Corrected:
    """The polynomial of this many coefficients that agrees with all but `radius` of the values (point -> value).

    There must be at least `num_coefficients` values. Raises RemoteProtocolError if no polynomial agrees with enough.
    """
    vanishing = _product([[-point % prime, 1] for point in values], prime)
    before, now = vanishing, _interpolate(values, vanishing, prime)
    factor_before, factor = [], [1]
    while 2 * len(now) > len(values) + num_coefficients + 1:  # that is, 2 deg(now) >= n + k
        quotient, rest = _divide(before, now, prime)
        before, now = now, rest
        factor_before, factor = factor, _minus(factor_before, _times(quotient, factor, prime), prime)
    found, rest = _divide(now, factor, prime)
    wrong = frozenset(point for point, value in values.items() if evaluate(found, point, prime) != value)
    if rest or len(found) > num_coefficients or len(wrong) > radius(len(values), num_coefficients):
        raise RemoteProtocolError(
            f"{len(values)} shares lie on no polynomial with {num_coefficients} coefficients: more than "
            f"{radius(len(values), num_coefficients)} of them are wrong"
        )
    return Corrected(coefficients=found, wrong=wrong)


def evaluate(coefficients: Sequence[int], point: int, prime: int) -> int:
    """The polynomial with these coefficients (constant first) at `point`, modulo `prime` (Horner's rule)."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * point + coefficient) % prime
    return value


def _interpolate(values: Mapping[int, int], vanishing: Polynomial, prime: int) -> Polynomial:
    """The polynomial of degree below n through all n values; `vanishing` is zero at their points."""
    total = [0] * len(values)
    for point, value in values.items():
        basis = _without_root(vanishing, point, prime)
        scale = value * pow(evaluate(basis, point, prime), -1, prime)
        total = [(have + scale * more) % prime for have, more in zip(total, basis, strict=True)]
    return _trimmed(total)


def _without_root(polynomial: Polynomial, root: int, prime: int) -> Polynomial:
    """Divided by x - root, which divides it (synthetic division)."""
    quotient, carried = [], 0
    for coefficient in reversed(polynomial[1:]):
        carried = (carried * root + coefficient) % prime
        quotient.append(carried)
    return quotient[::-1]


def _divide(dividend: Polynomial, divisor: Polynomial, prime: int) -> tuple[Polynomial, Polynomial]:
    """Quotient and remainder."""
    rest, inverse = list(dividend), pow(divisor[-1], -1, prime)
    quotient = [0] * max(0, len(dividend) - len(divisor) + 1)
    for shift in reversed(range(len(quotient))):
        quotient[shift] = rest[shift + len(divisor) - 1] * inverse % prime
        for position, coefficient in enumerate(divisor, shift):
            rest[position] = (rest[position] - quotient[shift] * coefficient) % prime
    return _trimmed(quotient), _trimmed(rest)


def _times(left: Polynomial, right: Polynomial, prime: int) -> Polynomial:
    result = [0] * (len(left) + len(right))
    for shift, coefficient in enumerate(left):
        for position, other in enumerate(right, shift):
            result[position] = (result[position] + coefficient * other) % prime
    return _trimmed(result)


def _product(factors: Sequence[Polynomial], prime: int) -> Polynomial:
    result = [1]
    for factor in factors:
        result = _times(factor, result, prime)
    return result


def _minus(left: Polynomial, right: Polynomial, prime: int) -> Polynomial:
    size = max(len(left), len(right))
    padded = ([*each, *[0] * (size - len(each))] for each in (left, right))
    return _trimmed([(one - other) % prime for one, other in zip(*padded, strict=True)])


def _trimmed(coefficients: Polynomial) -> Polynomial:
    while coefficients and coefficients[-1] == 0:
        coefficients.pop()
    return coefficients
