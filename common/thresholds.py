"""How many owners must act together, and how many neighbours an owner shares masks with.

The first are the owners that must sign a survivor list, open a secret, or declare a session over. As for the second, up
to 150 owners all pairs share a mask. Above, the graph is the sparse random one of Bell et al. (CCS 2020, ePrint
2020/704; `summation/masked/neighbours.py`). Every owner has k neighbours, each member of its neighbourhood holds one
share of each of its secrets, and `threshold` shares open one. With N owners, of whom c collude and d may drop out, and
m the most colluders among any k positions of the ring:

    threshold > (k + 1 + m) / 2     Colluders and half of the honest neighbours cannot open both secrets of an owner.
                                    Nor can the ring be cut in two so that each piece's sum opens: both gaps, of k / 2
                                    positions each, would need more than m / 2 colluders to leave their edges openable.
    threshold <= k + 1 - dropped    Enough neighbours of every owner remain.

The first holds for all pairs of gaps except with probability 2^-128 over the permutation; the second for all owners
except with probability 2^-30. The first has so many bits because a malicious coordinator and colluders can draw new
keys until the permutation suits them: 2^60 tries leave 2^-68. If no sparse graph keeps both, the graph is complete.
"""

from dataclasses import dataclass
from functools import cache
from math import comb

MAX_COMPLETE = 150  # the most owners for whom the graph is always complete
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
    """How many owners must have burned a session: at most the quorum t, so owners that can sum can also recover."""
    return num_owners - quorum(num_owners, colluders) + colluders + 1


@cache
def neighbourhood(num_owners: int, colluders: int, dropouts: int) -> Neighbourhood:
    """The smallest graph that keeps both promises; the complete one if no sparse one does."""
    degrees = range(2, num_owners - dropouts - 1, 2) if num_owners > MAX_COMPLETE else ()
    for degree in degrees:
        # A malicious coordinator may leave out honest owners, down to the fewest: colluders then lie closest together.
        inside = _tail(num_owners - dropouts - 1, colluders, degree, SECURITY_BITS, num_owners**2)
        dropped = _tail(num_owners - 1, dropouts, degree, CORRECTNESS_BITS, num_owners)
        threshold = (degree + inside + 2) // 2 + 1
        if threshold <= degree + 1 - dropped:
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
