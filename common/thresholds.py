"""How many owners: to sign a survivor list, to open a secret, to declare a session over; and how many neighbours mask.

Up to 150 owners everybody masks with everybody. Above, the graph is the sparse random one of Bell et al. (CCS 2020,
ePrint 2020/704; `summation/masked/neighbours.py`): every owner has k neighbours, each of its neighbourhood holds one
share of the owner's secrets, and `threshold` shares open one. With N owners, of whom c collude and d may drop out, and
m the most colluders among any k positions of the ring:

    threshold > (k + 1 + m) / 2     colluders and half of the honest neighbours cannot open both secrets of an owner;
                                    nor can the ring be cut in two, so that each piece's sum opens: both gaps, of k / 2
                                    positions each, would need more than m / 2 colluders to leave their edges openable
    threshold <= k + 1 - dropped    enough neighbours of everybody stay

The first holds for all pairs of gaps except with probability 2^-128 over the permutation, the second for all owners
except with 2^-30. So many bits, because the coordinator and colluders can re-draw their keys until the permutation
suits them: 2^60 tries leave 2^-68. Where no sparse graph keeps both, the graph is complete.
"""

from dataclasses import dataclass
from functools import cache
from math import comb

MAX_COMPLETE = 150


SECURITY_BITS, CORRECTNESS_BITS = 128, 30


@dataclass(frozen=True, kw_only=True)
class Neighbourhood:
    """How many neighbours an owner has, and how many shares of its neighbourhood open one of its secrets."""

    degree: int
    threshold: int


def quorum(num_owners: int, colluders: int) -> int:
    """t = floor((N + c) / 2) + 1: any two groups of t have an honest owner in common."""
    return (num_owners + colluders) // 2 + 1  # check: quorums-share-an-honest-owner


def burn_quorum(num_owners: int, colluders: int) -> int:
    """How many owners must have burned a session. At most the quorum t, so those who can sum can also recover."""
    return num_owners - quorum(num_owners, colluders) + colluders + 1


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


def _tail(population: int, marked: int, drawn: int, bits: int, times: int) -> int:
    """The most of `marked` in `population` that `drawn` hold, except with probability 2^-bits over `times` draws."""
    ways = [comb(marked, found) * comb(population - marked, drawn - found) for found in range(min(marked, drawn) + 1)]
    allowed = comb(population, drawn) >> bits
    beyond = 0
    for found in reversed(range(len(ways))):
        beyond += ways[found]
        if beyond * times > allowed:
            return found
    return 0
