"""Who masks with whom: everybody with everybody up to 150 owners, a sparse random graph above.

The sparse graph is Bell et al.'s (CCS 2020, ePrint 2020/704): a Harary graph, every owner linked to the k nearest on a
ring, after a permutation that is seeded by the hash of the signed key book. `common/thresholds.py` chooses k.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence

from common.domain_separation import Domain


class NeighbourGraph(Mapping[int, tuple[int, ...]]):
    """Each owner's neighbours, in ascending order, computed when asked for; `owners` are places on the roster."""

    def __init__(self, book_digest: bytes, owners: Sequence[int], degree: int) -> None:
        self._is_complete = degree >= len(owners) - 1
        self._reach = degree // 2
        self._ring = sorted(owners) if self._is_complete else sorted(owners, key=lambda each: _rank(book_digest, each))
        self._place = {owner: place for place, owner in enumerate(self._ring)}

    def __getitem__(self, owner: int) -> tuple[int, ...]:
        place, size = self._place[owner], len(self._ring)
        if self._is_complete:
            return (*self._ring[:place], *self._ring[place + 1 :])
        steps = (step for step in range(-self._reach, self._reach + 1) if step)
        return tuple(sorted(self._ring[(place + step) % size] for step in steps))

    def __iter__(self) -> Iterator[int]:
        return iter(self._ring)

    def __len__(self) -> int:
        return len(self._ring)


def _rank(book_digest: bytes, owner: int) -> bytes:
    return hashlib.sha256(Domain.NEIGHBOURS.value + book_digest + owner.to_bytes(4)).digest()
