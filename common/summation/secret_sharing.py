"""Shamir's secret sharing (Communications of the ACM, 1979) of 32-byte seeds over a prime field.

Any `threshold` shares give the seed back; fewer reveal nothing about it. The field's prime is the smallest above 2^256,
so every 32-byte seed is one element. The dealer's randomness is an argument, so known-answer tests need no mock. The
coefficients at zero depend on who answered, not on the secret, so one set serves every secret of a group.
"""

from collections.abc import Callable, Mapping, Sequence

from common.errors import LocalProtocolError, RemoteProtocolError
from common.summation.error_correction import correct, evaluate

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33

RandomBytes = Callable[[int], bytes]


def split(secret: bytes, threshold: int, points: Sequence[int], random_bytes: RandomBytes) -> dict[int, bytes]:
    """The share of `secret` at each of `points` (distinct, from 1): a polynomial of degree threshold - 1."""
    if len(secret) != SECRET_BYTES:
        raise LocalProtocolError(f"secret sharing: the secret has {len(secret)} bytes, not {SECRET_BYTES}")
    if not 1 <= threshold <= len(points) or len(set(points)) != len(points) or min(points) < 1:
        raise LocalProtocolError(f"secret sharing: threshold {threshold} does not fit {len(points)} points from 1")
    # 16 bytes more than an element has, so the remainder is uniform to within 2^-128.
    coefficients = [int.from_bytes(random_bytes(SECRET_BYTES + 16)) % PRIME for _ in range(threshold - 1)]
    return {
        point: evaluate([int.from_bytes(secret), *coefficients], point, PRIME).to_bytes(SHARE_BYTES) for point in points
    }


def coefficients_at_zero(points: Sequence[int], prime: int = PRIME) -> dict[int, int]:
    """Lagrange's coefficients: f(0) = sum of coefficient * f(point) over the points, for deg f < len(points)."""
    result = {}
    for point in points:
        numerator = denominator = 1
        for other in points:
            if other != point:
                numerator = numerator * other % prime
                denominator = denominator * (other - point) % prime
        result[point] = numerator * pow(denominator, -1, prime) % prime
    return result


def reconstruct(shares: Mapping[int, bytes], coefficients: Mapping[int, int]) -> bytes:
    """The secret, rebuilt from the shares at exactly the points of `coefficients`.

    Wrong shares give a wrong secret, or RemoteProtocolError. The caller must check the secret against a commitment.
    """
    return _secret(sum(coefficients[point] * read_share(shares[point]) for point in coefficients) % PRIME)


def reconstruct_corrected(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret, rebuilt although up to (len(shares) - threshold) // 2 shares are wrong.

    Raises RemoteProtocolError if more are. The caller must check the secret against a commitment.
    """
    corrected = correct({point: read_share(share) for point, share in shares.items()}, threshold, PRIME)
    return _secret(evaluate(corrected.coefficients, 0, PRIME))


def _secret(value: int) -> bytes:
    if value >= 2 ** (8 * SECRET_BYTES):
        raise RemoteProtocolError("the shares of a secret do not fit together")
    return value.to_bytes(SECRET_BYTES)


def read_share(share: bytes) -> int:
    """A share as a field element. Raises RemoteProtocolError unless it is exactly one."""
    value = int.from_bytes(share)
    if len(share) != SHARE_BYTES or value >= PRIME:
        raise RemoteProtocolError("a share is not an element of the field")
    return value
