"""What the shares of a check that was kept show to somebody who has no model (deploy/commands/explain.py).

The owners signed their masked shares and all that was delivered before (summation/pairwise.py), so anybody can add them
up. Which numbers of the sum are shares of one equation, and how large its tolerance is, follow from the model. Without
it, only this is known (common/verification.py): the sum is a list of groups, each of seven shares, or of one if it is
about a factor, and then their scale. The shares of a merge are zero up to a tolerance that is relative to the scale,
and no tolerance is above the bounds below. So if the numbers fit these bounds in no division into groups, the sum is
not zero, whoever says so.

    2^-32    t, where the coordinator leaves out up to g = 2^-34 (equations.FisherEquation) and
             d(n) + d(m) < 2^17, as for matrices of up to 4 million rows and columns
    2^-12    the tolerance of a factor, for up to 2^15 inputs

What this does not show: an error between an equation's own tolerance and these bounds; who caused a sum that is not
zero. Each owner, also the one whose record it is, can sign another share than its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from common.errors import RemoteProtocolError
from common.summation import wide
from common.summation.pairwise import PairwiseSum
from common.tensor_layout import TensorEntry, TensorLayout
from common.verification import COLUMNS, LEAST_TOLERANCE, from_words

LARGEST_TOLERANCE = 2.0**-32
LARGEST_FACTOR_TOLERANCE = 2.0**-12
GROUPS = ((COLUMNS + 1, LARGEST_TOLERANCE), (2, LARGEST_FACTOR_TOLERANCE))  # how many numbers, and their tolerance


@dataclass(frozen=True, kw_only=True)
class KeptCheck:
    """A check as somebody kept it. `delivered`: the digest of what was delivered before it; `keys`: `records.Nonce` of
    those who took part; `uploads`: their masked shares, one after the other; `signatures`: `records.Signed`.
    """

    run: str
    position: int
    delivered: str
    roster: Mapping[str, bytes]  # owner -> Ed25519 public key
    needed_owners: int
    keys: bytes
    uploads: bytes
    signatures: bytes

    def added_up(self) -> tuple[tuple[str, ...], list[float]]:
        """The owners that signed, and the numbers of the sum. Raises RemoteProtocolError unless all of it is signed."""
        words, joint = self._words(), self._joint(1)
        owners = tuple(joint.entries)
        if len(owners) < self.needed_owners:  # check: kept-checks-are-of-enough-owners
            raise RemoteProtocolError(
                f"the shares are those of {len(owners)} owners; no check is made by fewer than {self.needed_owners}"
            )
        size, rest = divmod(len(words), len(owners))
        if rest or not size or size % (2 * wide.WORDS):  # check: kept-checks-are-whole
            raise RemoteProtocolError("the shares are not whole numbers of every owner")
        joint = self._joint(size)
        joint.check(owners)  # check: kept-keys-are-signed
        total = joint.total(words, self.signatures).vector.view("<u8")
        return owners, [from_words(number) for number in total.reshape(-1, wide.WORDS)]

    def _words(self) -> np.ndarray:
        if len(self.uploads) % 8:
            raise RemoteProtocolError("the shares are not whole numbers")
        return np.frombuffer(self.uploads, dtype="<u8")

    def _joint(self, size: int) -> PairwiseSum:
        # The sum's digest does not depend on how its numbers are divided, so one tensor of them all will do.
        layout = TensorLayout((TensorEntry(name="check", shape=(size,), bound=inf),))
        return PairwiseSum(
            run=self.run,
            position=self.position,
            delivered=self.delivered,
            layout=layout,
            roster=self.roster,
            keys=self.keys,
        )


def times_tolerance(numbers: Sequence[float]) -> float:
    """How many times larger than any tolerance some share is, at least: above 1, the sum is not zero. `numbers`: the
    sum's, in order.
    """
    least = [0.0, *[inf] * len(numbers)]  # of the numbers up to here, by the division into groups that makes it least
    for end in range(2, len(numbers) + 1, 2):
        for length, tolerance in GROUPS:
            if length <= end:
                *shares, scale = numbers[end - length : end]
                times = max(map(abs, shares)) / (tolerance * max(scale, 0.0) + LEAST_TOLERANCE)
                least[end] = min(least[end], max(least[end - length], times))
    return least[-1]
