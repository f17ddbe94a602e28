"""Who masks with whom: everybody with everybody up to 150 owners, a sparse random graph above.

The sparse graph is Bell et al.'s (CCS 2020, ePrint 2020/704): a Harary graph, every owner linked to the k nearest on a
ring, after a permutation that is seeded by the hash of the signed key book. A neighbourhood is an owner and its k
neighbours; each holds one share of the owner's secrets and `threshold` of them open one. With N owners, of whom c
collude and d may drop, and m the most colluders among any k places of the ring:

    threshold > (k + 1 + m) / 2     colluders and half of the honest neighbours cannot open both secrets of an owner;
                                    nor can the ring be cut in two, so that each piece's sum opens: both gaps, of k / 2
                                    places each, would need more than m / 2 colluders to leave their edges openable
    threshold <= k + 1 - dropped    enough neighbours of everybody stay

The first holds for all pairs of gaps but for a chance of 2^-128 over the permutation, the second for all owners but for
2^-30. So many bits, because the coordinator and colluders can re-draw their keys until the permutation suits them: 2^60
tries leave 2^-68. Where no sparse graph keeps both, the graph is complete.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import comb

from common.labels import Label

MAX_COMPLETE = 150
SECURITY_BITS, CORRECTNESS_BITS = 128, 30


@dataclass(frozen=True, kw_only=True)
class Neighbourhood:
    """How many neighbours an owner has, and how many shares of its neighbourhood open one of its secrets."""

    degree: int
    threshold: int


def quorum(num_owners: int, colluders: int) -> int:
    """t = floor((N + c) / 2) + 1: any two groups of t have an honest owner in common."""
    return (num_owners + colluders) // 2 + 1


@cache
def neighbourhood(num_owners: int, colluders: int, dropouts: int) -> Neighbourhood:
    """The smallest graph that keeps both promises; the complete one where no sparse one does."""
    degrees = range(2, num_owners - dropouts - 1, 2) if num_owners > MAX_COMPLETE else ()
    for degree in degrees:
        # The coordinator may leave honest owners out of the book, down to the fewest: then colluders stand closest.
        inside = _tail(num_owners - dropouts - 1, colluders, degree, SECURITY_BITS, num_owners**2)
        gone = _tail(num_owners - 1, dropouts, degree, CORRECTNESS_BITS, num_owners)
        threshold = (degree + inside + 2) // 2 + 1
        if threshold <= degree + 1 - gone:
            return Neighbourhood(degree=degree, threshold=threshold)
    return Neighbourhood(degree=num_owners - 1, threshold=quorum(num_owners, colluders))


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
    return hashlib.sha256(Label.NEIGHBOURS.value + book_digest + owner.to_bytes(4)).digest()


def _tail(population: int, marked: int, drawn: int, bits: int, times: int) -> int:
    """The most of `marked` in `population` that `drawn` hold, but for a chance of 2^-bits over `times` draws."""
    ways = [comb(marked, found) * comb(population - marked, drawn - found) for found in range(min(marked, drawn) + 1)]
    allowed = comb(population, drawn) >> bits
    beyond = 0
    for found in reversed(range(len(ways))):
        beyond += ways[found]
        if beyond * times > allowed:
            return found
    return 0
