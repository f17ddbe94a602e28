"""Who masks with whom: everybody with everybody up to 150 owners, a sparse random graph above.

The sparse graph is Bell et al.'s (CCS 2020, ePrint 2020/704): a Harary graph, every owner linked to the k nearest on a
ring, after a random permutation. The permutation is seeded by the hash of the signed key book, in which every owner
has fresh keys, so the coordinator does not choose who is next to whom.

A neighbourhood is an owner and its k neighbours; each holds one share of the owner's secrets and `threshold` of them
open one. What k and the threshold must do, with N owners of whom c collude and d may drop:
    not reach   colluders and half of the honest cannot open both secrets of an owner: threshold > (k + 1 + colluders)/2
    not fail    enough neighbours of everybody stay
Both hold for all N neighbourhoods together but for a chance below 2^-40 and 2^-30 (hypergeometric tails).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import comb

from common.errors import SettingsError
from common.labels import Label

MAX_COMPLETE = 150
SECURITY_BITS, CORRECTNESS_BITS = 40, 30


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
    """The complete graph with its quorum, or the smallest sparse one that keeps both promises."""
    if num_owners <= MAX_COMPLETE:
        return Neighbourhood(degree=num_owners - 1, threshold=quorum(num_owners, colluders))
    for degree in range(2, num_owners - 1, 2):
        inside = _tail(num_owners - 1, colluders, degree, SECURITY_BITS, num_owners)
        gone = _tail(num_owners - 1, dropouts, degree, CORRECTNESS_BITS, num_owners)
        threshold = quorum(degree + 1, inside)
        if threshold <= degree + 1 - gone:
            return Neighbourhood(degree=degree, threshold=threshold)
    raise SettingsError(
        f"{num_owners} owners of whom {colluders} may collude and {dropouts} may drop out: no graph keeps both "
        "promises; let fewer collude or raise min_owners"
    )


def neighbours(book_digest: bytes, owners: Sequence[int], degree: int) -> Mapping[int, tuple[int, ...]]:
    """Each owner's neighbours, in ascending order; `owners` are roster indices."""
    ordered = sorted(owners)
    if degree >= len(ordered) - 1:
        return {owner: tuple(other for other in ordered if other != owner) for owner in ordered}
    ring = sorted(ordered, key=lambda owner: _rank(book_digest, owner))
    size, reach = len(ring), degree // 2
    return {
        owner: tuple(sorted(ring[(place + step) % size] for step in range(-reach, reach + 1) if step))
        for place, owner in enumerate(ring)
    }


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
