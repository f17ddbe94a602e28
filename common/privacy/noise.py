"""Random numbers that nobody can foresee: from AES-128-CTR, under keys that come from the operating system.

What noise hides is gone for whoever can draw the same noise, so no seed of an agreement has a part in it.

Noise on a masked sum (`Noise`) is added by the owners together, each a share, in the integers that are summed. A sum of
Gaussians that are each rounded hides exactly as much as a Gaussian. The chance of the whole number k is the density, at
k, of a Gaussian plus a uniform number from -1/2 to 1/2 for each owner. For a given uniform part u, moments of the
likelihood ratio are sums over all k of a Gaussian density on the grid k - u. These differ from the integral by a
factor of at most 1 + 3 e^(-2 (pi sigma)^2), which is 1 for any sigma of ten units or more, and mixing over u only
lowers them. So the Renyi divergence of every order is that of the continuous noise. Owners have at least 2^20 units.
"""

import hmac
import secrets
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from common.domain_separation import Domain
from common.errors import LocalProtocolError, SettingsError
from common.summation import mask_stream
from common.summation.fixed_point import fraction_bits
from common.tensor_layout import TensorEntry, TensorLayout

KEY_BYTES = 32
LARGEST = 12.0  # standard deviations; noise is larger once in 10^32
LARGEST_NUMBER = 2.0**29  # of one owner, in standard deviations of its share: what sets the fixed-point unit
LEAST_UNITS = 2.0**20  # in a standard deviation


def uniform(size: int) -> NDArray[np.float64]:
    """(size,) numbers between 0 and 1, neither of them among these, in steps of 2^-52."""
    return ((_words(size, _fresh_key()) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def gaussian(size: int, scale: float) -> NDArray[np.float64]:
    """(size,) numbers with mean 0 and standard deviation `scale`."""
    return scale * _standard_normal(size, _fresh_key())


def whole_gaussian(size: int, scale: NDArray[np.float64] | float, key: bytes) -> NDArray[np.int64]:
    """(size,) rounded Gaussians with standard deviation `scale`, which follow from `key`: mask_stream.KEY_BYTES."""
    drawn = np.clip(_standard_normal(size, key), -LARGEST, LARGEST)
    return np.rint(scale * drawn).astype(np.int64)  # check: shares-have-their-size


def bound_with_noise(bound: float, noise: float) -> float:
    """The bound of a tensor whose numbers are at most `bound` before each owner adds its share.

    It leaves room for the noise, and sets the fixed-point unit: fine enough for the noise, and no finer, because the
    noise comes from few enough bits that a much finer grid would show which of them it can be.
    """
    return max(bound + LARGEST * noise, LARGEST_NUMBER * noise)


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What one owner adds to its vector of one round.

    `key` is this owner's secret under the agreement. Each tensor's noise follows from it, the round's position, the
    tensor's name and its exact numbers. So whoever asks again gets the same noised numbers, bit for bit, and their
    noise does not average away. Other numbers, or another round, get noise that is independent of it: no difference
    of two sums is without noise.
    """

    key: bytes = field(repr=False)
    position: int
    layout: TensorLayout
    num_owners: int
    _noised: set[str] = field(default_factory=set, init=False, repr=False)

    def added(self, name: str, tensor: NDArray[np.float64]) -> NDArray[np.float64]:
        """The tensor, rounded as it travels, with this owner's noise; unchanged if none was agreed on for it.

        Of a symmetric one (d, d), only the upper triangle is read. Raises SettingsError if the unit is too coarse.
        """
        entry = self.layout.entry(name)
        if entry.noise == 0:
            return tensor
        bits = fraction_bits(entry.bound, self.num_owners, self.layout.ring_bits)
        if entry.noise * 2.0**bits < LEAST_UNITS:  # check: noise-is-fine-enough
            raise SettingsError(
                f"{name}: noise of {entry.noise:g} would be {entry.noise * 2.0**bits:g} units in fixed point, at least "
                f"{LEAST_UNITS:g} are needed",
                hint="agree on smaller [bounds]",
            )
        one = TensorLayout((entry,))
        packed = np.empty(one.size)
        one.flatten([(name, tensor)], packed)
        exact = np.rint(np.ldexp(packed, bits)).astype("<i8")
        drawn = whole_gaussian(one.size, np.ldexp(_scales(entry), bits), self._key_of(name, exact))
        self._noised.add(name)
        return one.read(np.ldexp((exact + drawn).astype(np.float64), -bits), name)  # check: owners-add-their-share

    def check_complete(self) -> None:
        """Raise LocalProtocolError if a tensor would leave without the noise that was agreed on for it."""
        for entry in self.layout.entries:
            if entry.noise and entry.name not in self._noised:  # check: no-share-is-left-out
                raise LocalProtocolError(f"noise: {entry.name} has none yet; nothing has left")

    def _key_of(self, name: str, exact: NDArray[np.int64]) -> bytes:
        about = b"%d %s\n" % (self.position, name.encode())
        about += exact.tobytes()  # check: other-numbers-have-other-noise
        return hmac.digest(self.key, Domain.NOISE.value + about, "sha256")[: mask_stream.KEY_BYTES]


def fresh_secret() -> bytes:
    """A secret for `Noise`."""
    return secrets.token_bytes(KEY_BYTES)  # check: secrets-of-noise-are-drawn


def _scales(entry: TensorEntry) -> NDArray[np.float64] | float:
    """The standard deviation of each number as it travels: less off a symmetric matrix's diagonal by the root of two,
    since each of these numbers stands for two.
    """
    if entry.packing == "full":
        return entry.noise
    dimension = entry.shape[0]
    scales = np.full(entry.size, entry.noise / 2**0.5)
    scales[np.cumsum([0, *range(dimension, 1, -1)])] = entry.noise
    return scales


def _standard_normal(size: int, key: bytes) -> NDArray[np.float64]:
    """By Box and Muller, 1958, with 128 random bits for each radius and 53 for each angle."""
    pairs = (size + 1) // 2
    high, low, turns = _words(3 * pairs, key).astype(np.float64).reshape(3, pairs)
    radii = np.sqrt(-2 * np.log(high * 2.0**-64 + (low + 0.5) * 2.0**-128))
    angles = 2 * np.pi * 2.0**-64 * turns
    return np.concatenate([radii * np.cos(angles), radii * np.sin(angles)])[:size]


def _words(size: int, key: bytes) -> NDArray[np.uint64]:
    words = np.zeros(size, dtype="<u8")
    mask_stream.add_masks(words, [(key, 1)], 0)
    return words


def _fresh_key() -> bytes:
    return secrets.token_bytes(mask_stream.KEY_BYTES)  # check: noise-is-never-foreseen
