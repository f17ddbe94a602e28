"""Who masks with whom: up to 150 owners, all pairs; above, a sparse random graph.

The sparse graph is that of Bell et al. (CCS 2020, ePrint 2020/704), a Harary graph: the owners form a ring, and each is
linked to the k nearest. A permutation seeded by the hash of the signed key book orders the ring. `common/thresholds.py`
chooses k.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence

from common.domain_separation import Domain


class NeighbourGraph(Mapping[int, tuple[int, ...]]):
    """Owner index -> its neighbours' indices in ascending order, computed once when it is asked for."""

    def __init__(self, book_digest: bytes, owners: Sequence[int], degree: int) -> None:
        self._is_complete = degree >= len(owners) - 1
        self._reach = degree // 2
        self._ring = sorted(owners) if self._is_complete else sorted(owners, key=lambda each: _rank(book_digest, each))
        self._position = {owner: position for position, owner in enumerate(self._ring)}
        self._found: dict[int, tuple[int, ...]] = {}

    def __getitem__(self, owner: int) -> tuple[int, ...]:
        if owner not in self._found:
            self._found[owner] = self._neighbours_of(owner)
        return self._found[owner]

    def _neighbours_of(self, owner: int) -> tuple[int, ...]:
        position, size = self._position[owner], len(self._ring)
        if self._is_complete:
            return (*self._ring[:position], *self._ring[position + 1 :])
        steps = (step for step in range(-self._reach, self._reach + 1) if step)
        return tuple(sorted(self._ring[(position + step) % size] for step in steps))

    def __iter__(self) -> Iterator[int]:
        return iter(self._ring)

    def __len__(self) -> int:
        return len(self._ring)


def _rank(book_digest: bytes, owner: int) -> bytes:
    return hashlib.sha256(Domain.NEIGHBOURS.value + book_digest + owner.to_bytes(4)).digest()
