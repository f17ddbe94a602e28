"""Sums for tests: owners with keys that are the same in every run, terms, and randomness that repeats."""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from common.certificates import deliveries_digest
from common.identity import Identity
from common.messages import OpenSum
from common.summation import SUMMATIONS, fixed_point
from common.summation.protocol import SumTerms, Total, run_in_memory
from common.summation.secret_sharing import RandomBytes
from common.tensor_layout import RingBits, TensorEntry, TensorLayout

RUN, AGREEMENT, NONCE = "0a" * 32, "0b" * 32, "0c" * 32


def repeating_bytes(seed: int = 0) -> RandomBytes:
    """Bytes that are the same in every run: SHA-256 of a counter. For tests only."""
    counter = 0

    def random_bytes(length: int) -> bytes:
        nonlocal counter
        counter += 1
        blocks = (hashlib.sha256(f"{seed}/{counter}/{block}".encode()).digest() for block in range(-(-length // 32)))
        return b"".join(blocks)[:length]

    return random_bytes


def identities_of(count: int) -> dict[str, Identity]:
    """Owners o0, o1, ..."""
    names = [f"o{index}" for index in range(count)]
    return {name: Identity(name=name, seed=hashlib.sha256(name.encode()).digest()) for name in names}


def layout_of(*sizes: int, bound: float = 8.0, ring_bits: RingBits = 64) -> TensorLayout:
    return TensorLayout(
        tuple(TensorEntry(name=f"t{index}", shape=(size,), bound=bound) for index, size in enumerate(sizes)), ring_bits
    )


def terms_of(
    identities: dict[str, Identity],
    layout: TensorLayout,
    *,
    needed: int | None = None,
    colluders: int = 0,
    change: Callable[[OpenSum], OpenSum] = lambda request: request,
) -> SumTerms:
    request = OpenSum(
        run=RUN,
        agreement_digest=AGREEMENT,
        round=1,
        nonce=NONCE,
        position=0,
        deliveries_digest=deliveries_digest([]),
        layout_digest=layout.digest(),
    )
    return SumTerms(
        request=change(request),
        layout=layout,
        roster={name: identity.public_key for name, identity in identities.items()},
        needed_owners=len(identities) if needed is None else needed,
        colluders=colluders,
    )


def vectors_of(identities: dict[str, Identity], layout: TensorLayout, seed: int = 0) -> dict[str, NDArray[np.float64]]:
    """A vector inside the bounds for every owner."""
    random = np.random.default_rng(seed)
    bounds = np.concatenate([np.full(entry.size, entry.bound) for entry in layout.entries])
    return {name: random.uniform(-1, 1, layout.size) * bounds for name in identities}


def run(
    kind: str,
    identities: dict[str, Identity],
    terms: SumTerms,
    vectors: dict[str, NDArray[np.float64]],
    drops_at: dict[str, int] | None = None,
    seed: int = 0,
) -> Total:
    return run_in_memory(SUMMATIONS[kind], terms, identities, vectors, repeating_bytes(seed), drops_at)


def sum_of(terms: SumTerms, vectors: dict[str, NDArray[np.float64]], owners: Sequence[str]) -> NDArray[np.float64]:
    """The oracle: encode, add Python integers, decode."""
    total = [0] * terms.layout.size
    for owner in owners:
        encoded = fixed_point.encode(terms.layout, vectors[owner].copy(), len(terms.roster))
        encoded = encoded.view(f"<i{terms.layout.ring_bits // 8}")
        total = [have + int(more) for have, more in zip(total, encoded, strict=True)]
    bits = [
        fixed_point.fraction_bits(entry.bound, len(terms.roster), terms.layout.ring_bits)
        for entry in terms.layout.entries
        for _ in range(entry.size)
    ]
    return np.array([value / 2**bit for value, bit in zip(total, bits, strict=True)])
