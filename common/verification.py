"""Verified merges: owners prove together that a model they were sent is the merge of what they contributed.

Who runs it: owners and coordinator. A merge D solves (sum A_i) D = sum B_i (merge_methods/equations.py). The owners sum
their shares A_i D - B_i in one more masked sum that everybody opens. It is zero if D is the merge, so it
reveals nothing then; what does is S below, about as large as the terms are.

What it shows: errors of D above a tolerance that is relative to a whole equation, and above the rounding of float32,
for which a bent correction can take them: in one number of a row of m, up to m roundings of the row's mean. In rows of
A that are small beside the others, larger errors pass. Ridges and floors keep the rows from being too small
(SECURITY.md, attack 129).

A mean that several models of one check share is proved of the first alone: the others must have the same bits of it
(`Shortener`). Small means whose rows are equally long are one equation (`StackedMeans`).

The shares are compressed on both sides (Freivalds 1977, under a secure sum). With random integers rho (m, 7) and
s (n, 7), owner i sends for each equation, for every column k,

    e_i = s_k^T (A_i (D rho_k + c_k) - B_i rho_k)

The order matters. First the owners have D. Then each draws a nonce, from which rho follows, and signs it with the
digest of what it was sent, so that nobody else can invent one that suits a D chosen before. Then the coordinator names
the correction c. Then each owner draws the key of its masks in the check (summation/pairwise.py) and signs it with the
digest of what it was sent, c included; s follows from all keys. Whoever knew s when choosing c could hide an error in
directions where A is weak, and whoever knew rho when choosing D could hide it at once. The coordinator knows s an
exchange before the owners give their shares. But an owner draws one nonce and one key for a check, and gives its shares
once, so there is no other draw to wait for.

The correction. D travels in float32, and the coordinator knows it to 48 bits, D + R. It sends c = R rho. Rounding to
nearest leaves |R| <= 2^-24 |D| + 2^-150, so an owner accepts only

    |c| <= (1 + 2^-20) (2^-24 |D| |rho| + 2^-149 sum |rho|)                                       in every row

where 1 + 2^-20 covers that R, c and this bound are computed in floating point, and 2^-149 what R loses when it becomes
float32.

The tolerance. With u = 2^-53 and |.|_1, |.|_2 the norms of a column, each owner measures, for each equation, or for
each group of its rows if it is large (`group_rows`),

    v_i = |A_i| |D| |rho| + b |B_i| |rho|                    (n, 7), the size of the terms; if B_i is a difference,
                                                             of both its terms
    S_i = 2^15 max_k (a |v_ik|_2 + h |A_i (D rho + c)_k - B_i rho_k|_1),   a = min(sqrt(n), 10)

and adds S_i to the sum, times a secret factor from 1 to 2 that is the same for all it adds in a run
(`Challenge.blinded`). Honest parties are off by

    2^-48 v twice                       R and c are rounded to float32, 24 bits below D
    g v                                 what the coordinator leaves out of c, so that it takes fewer bytes (`steps_of`,
                                        Equation.left_out)
    (d(n) + 2) u v                      the solve (normal_equations.solve_symmetric)
    (d(n) + 2 d(m) + 16) u v            the products at owners and coordinator, and what decoding and alpha round

in every row, where v is the sum of all v_i, with b = 1 in the last two lines, and b = 0 in the others, which are about
D alone; the constants leave room for terms of higher order. All this is fixed before s, and s is uniform. So a column w
of it adds up to at most 10 * 2^15 |w|_2 with probability 1 - 2 e^-50 (Hoeffding 1963), and to 2^15 sqrt(n) |w|_2 in any
case. Summing over the rows rounds by another l(n) u times 2^15 |.|_1 of each owner's column.
So the sum of shares is at most t / 2 * sum S_i, with

    t = 2 (2^-47 + g + r),   r = (2 d(n) + 2 d(m) + 18) u,   b = 2 r / t,   h = 2 l(n) u / t

and `tolerance` is t * sum S_i, and at least 2^-92, because shares travel in multiples of 2^-103. Products are summed in
blocks, so that a number is rounded d(n) times, not n times, and the sum over rows l(n) times (equations.depth,
column_depth). Where A is diagonal, d(n) is that of one term.

A factor. B of some equations is q C - A W_0, so D + W_0 is q V, and the coordinator names q. What q must be is not
linear in the sums, but it makes zero a number that is (`Equation.factor_share`), so owners add up that, too. Of the
size of its terms, honest parties are off by

    2^-24 + 2^-23                                           D and q are rounded to float32, and q counts twice
    606 n^2 u                                               the solves for q and for D

A is R^T R (Cholesky), and a solve of n unknowns leaves a residual of at most 3 n u |R^T| |R| |V| (Higham 2002, theorem
10.4), which moves <V, C> by |V|^T |R^T| |R| |V| times that. No entry of |R^T| |R| is above the root of the product of
two diagonal entries of A, so this is at most trace(A) |V|^2, and at most 101 n <V, C>, because A has a ridge of a
hundredth of its mean diagonal. (With noise, the ridge is what the noise needs. That is less only if there are 300 times
the rows that RefitNoise.rows_needed demands.) q^2 <V, C> is among the terms. There are two solves, and 2^-22 leaves
room for the sums.

What this does not protect against: an owner that colludes with the coordinator can contribute a share that makes any
sum zero. SECURITY.md says what that means.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from common.domain_separation import Domain
from common.errors import NumericalError, RemoteProtocolError
from common.lazy import lazy_module
from common.merge_methods.equations import (
    LARGEST_FACTOR,
    LEAST_FACTOR,
    Equation,
    MeanEquation,
    column_depth,
    column_sums,
    depth,
    product,
    stacked,
    times,
)
from common.summation import mask_stream, wide
from common.summation.totals import SummedTensors
from common.tensor_layout import TensorEntry, TensorLayout

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from common.summation.protocol import Total
else:
    torch = lazy_module("torch")

CACHED_NUMBERS = 1 << 20  # of a matrix in float64, which the processor's cache holds
COLUMNS = 7  # an error is exactly zero in all of them with probability below 2^-100: at most 2^-15 in each
LOWEST_BIT, HIGHEST_BIT = -103, 144  # shares travel in multiples of 2^-103, up to 2^144: wide.py holds a sum of 150
LARGEST_NUMBER = 2.0**24  # of a model that is sent: then no owner's own terms reach 2^144, and none refuses by its size
LEAST_TOLERANCE = 2.0**-92  # more than the rest that is cut off adds up to
SUBNORMAL = 2.0**-149  # the smallest positive float32
UNIT = 2.0**-53  # the relative rounding of float64
LARGEST_TEST = 2.0**15  # the largest number of rho and s
SPREAD = 10.0  # standard deviations, at most, of a sum with random signs
CHECK_KINDS = {"check": "whether the models that were sent solve the merge's equations, with {their} part of each"}


class NotTheMerge(RemoteProtocolError):  # noqa: N818 - the name says it
    """What the coordinator sent cannot belong to a merge."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a check proves of one delivery: that its model solves `equations` over the total of round `source`.

    `known`: the parameters that have the same numbers, bit for bit, as in another delivery, whose position is beside
    each. An earlier check has proved that one, or this check does.
    """

    delivery: int
    source: int
    equations: tuple[Equation, ...]
    known: tuple[tuple[str, int], ...] = ()

    def named(self) -> Iterator[tuple[str, Equation]]:
        """Each equation with a name that no other claim of a check has."""
        for equation in self.equations:
            yield f"{self.delivery}/{equation.name}", equation


class Shortener:
    """Makes claims shorter, so that a mean which several models share is proved once, and small means together.

    A mean is one division, which gives every party the same bits. What needs a solver is proved of each model.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, Equation], int] = {}  # source and equation -> delivery, which owners keep

    def keep(self, claim: Claim) -> None:
        """Note that owners keep what this claim is about until the end, so later claims can refer to it."""
        self._kept |= self._means(claim)

    def shorten(self, claims: Sequence[Claim]) -> tuple[Claim, ...]:
        """The claims of one check. One of them keeps its equations even if all are proved elsewhere."""
        proved, shorter = dict(self._kept), list[Claim]()
        for claim in claims:
            known = {key: proved[key] for key in self._means(claim) if key in proved}
            rest = tuple(each for each in claim.equations if (claim.source, each) not in known)
            same = tuple((each.parameter, at) for (_, each), at in known.items() if isinstance(each, MeanEquation))
            shorter.append(replace(claim, equations=stacked(rest), known=(*claim.known, *same)))
            proved = self._means(claim) | proved
        if any(claim.equations for claim in shorter):
            return tuple(shorter)
        return (replace(claims[0], equations=stacked(claims[0].equations)), *shorter[1:])

    def _means(self, claim: Claim) -> dict[tuple[int, Equation], int]:
        return {(claim.source, each): claim.delivery for each in claim.equations if type(each) is MeanEquation}


def columns_of(equation: Equation) -> int:
    """How many columns the correction has: one where rho has nothing to combine."""
    return 1 if equation.by_entry else COLUMNS


def correction_layout(claims: Sequence[Claim]) -> TensorLayout:
    """How the corrections travel to the owners, float32: c of each equation, and its factor if it has one."""
    entries = []
    for name, equation in (each for claim in claims for each in claim.named()):
        shape = (equation.shape[0], columns_of(equation))
        entries.append(TensorEntry(name=name, shape=shape, bound=np.inf))
        if equation.is_scaled:
            entries.append(TensorEntry(name=f"{name}/factor", shape=(1,), bound=np.inf))
    return TensorLayout(tuple(entries))


def check_layout(claims: Sequence[Claim]) -> TensorLayout:
    """What an owner adds to a check: for each group of an equation's rows, the shares and their scale, and the same for
    its factor if it has one, each in the words of one integer (summation/wide.py).
    """
    entries = list[TensorEntry]()
    for name, equation in (each for claim in claims for each in claim.named()):
        shape = (equation.groups, COLUMNS + 1, wide.WORDS)
        entries.append(TensorEntry(name=f"check/{name}", shape=shape, bound=np.inf))
        if equation.is_scaled:
            entries.append(TensorEntry(name=f"check/{name}/factor", shape=(2, wide.WORDS), bound=np.inf))
    return TensorLayout(tuple(entries))


def projection_seed(delivered: str, nonces: bytes) -> bytes:
    """What rho follows from: the digest of everything that was delivered, and a nonce of every owner."""
    return hashlib.sha256(Domain.PROJECTION.value + bytes.fromhex(delivered) + nonces).digest()


def combination_seed(keys_digest: bytes) -> bytes:
    """What s follows from: the keys of all owners, drawn for this check, and all that was delivered, c included."""
    return hashlib.sha256(Domain.COMBINATION.value + keys_digest).digest()


def projection(seed: bytes, name: str, rows: int, columns: int, first: int = 0) -> Tensor:
    """Uniform whole numbers from -2^15 to 2^15 - 1, (rows, columns) float64, the same at every party. `first`: the row
    with which they begin, a multiple of 4.
    """
    key = hashlib.sha256(seed + name.encode()).digest()[: mask_stream.KEY_BYTES]
    words = np.zeros(-(-rows * columns // 4), dtype="<u8")
    mask_stream.add_masks(words, [(key, 1)], first * columns // 4, threads=1)
    numbers = words.view("<i2")[: rows * columns].astype(np.float64)
    return torch.from_numpy(numbers.reshape(rows, columns))


def rho_of(seed: bytes, name: str, equation: Equation) -> Tensor:
    """rho, (m, columns)."""
    if equation.by_entry:
        return torch.ones(1, 1, dtype=torch.float64)
    return projection(seed, name, equation.shape[1], COLUMNS)


# --- the coordinator ---


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What the coordinator keeps of a model that it sent, until it is verified: see MergedDelta."""

    delta: Mapping[str, Tensor]
    rest: Mapping[str, Tensor]
    factor: float


def corrections(claim: Claim, seed: bytes, sent: Sent) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """What the coordinator sends for one claim, in the order of `correction_layout`."""
    for name, equation in claim.named():
        rho = rho_of(seed, name, equation)
        correction, _ = _projected(equation.part_of(sent.rest), rho)
        _, reach = _projected(equation.part_of(sent.delta), rho)
        steps = steps_of(equation, reach)
        multiples = (correction / steps).round()
        yield name, (multiples + shift_of(equation) if equation.by_entry else multiples * steps).float().numpy()
        if equation.is_scaled:
            yield f"{name}/factor", np.array([sent.factor], dtype=np.float32)


def steps_of(equation: Equation, reach: Tensor) -> Tensor:
    """The powers of two of which c has multiples, (n, columns): rounding to one leaves out at most what the tolerance
    has room for, so that the rest takes fewer bytes (packed.py). `reach`: |D| |rho|.

    By entry, all parties find the same steps, and only the multiples travel. In others, they would differ if sums were
    rounded in another order. There an owner knows no steps, and accepts what it would accept anyway. Steps that suit
    the columns of A would leave out more, but would show every owner something of the total.
    """
    _, exponents = torch.frexp(2 * equation.left_out * reach.clamp(min=SUBNORMAL))
    return torch.ldexp(torch.ones_like(reach), exponents - 1)


def shift_of(equation: Equation) -> float:
    """What is added to multiples by entry: none is larger than 2^-24 / left_out, so that all have one exponent and no
    sign, and take fewer bytes.
    """
    return 3 * 2.0**-24 / equation.left_out


# --- an owner ---


@dataclass(frozen=True, kw_only=True)
class Challenge:
    """What an owner needs to add to a check: both seeds, the corrections that the coordinator sent, and `blind`, its
    own secret of the run, from which follows by what it multiplies its scales. The same challenge gives the same
    shares.
    """

    claims: tuple[Claim, ...]
    rho_seed: bytes
    combination_seed: bytes
    blind: bytes
    sent: NDArray[np.float32]  # (correction_layout.size,)

    @cached_property
    def _layout(self) -> TensorLayout:
        return correction_layout(self.claims)

    def shares(
        self, claim: Claim, delta: Mapping[str, Tensor], own: SummedTensors
    ) -> Iterator[tuple[str, NDArray[np.uint64]]]:
        """This owner's part of one claim, in the order of `check_layout`. `own`: what it contributed, as decoded from
        its own vector; `delta`: what it was sent. Raises NotTheMerge for a correction beyond its bound.
        """
        for name, plain in claim.named():
            equation = plain.given(delta)
            sent = torch.from_numpy(self._layout.read(self.sent, name))  # (n, columns) float32
            factor = float(self._layout.read(self.sent, f"{name}/factor")[0]) if equation.is_scaled else 1.0
            if not LEAST_FACTOR <= factor <= LARGEST_FACTOR:  # check: factors-are-bounded
                raise NotTheMerge(f"the coordinator sent a factor of {factor} for {name}")
            part = equation.part_of(delta)  # (n, m) float32
            rho = rho_of(self.rho_seed, name, equation)  # (m, columns)
            words = list[list[list[int]]]()  # (groups, COLUMNS + 1, WORDS)
            for group in range(equation.groups):
                sums = []
                for rows in _blocks(equation, group):
                    moved, reach = _projected(part[rows], rho)
                    correction = sent[rows].double()
                    if equation.by_entry:
                        correction = (correction - shift_of(equation)) * steps_of(equation, reach)
                    check_correction(name, reach, rho, correction)
                    test = projection(self.combination_seed, name, len(moved), COLUMNS, first=rows.start)
                    sums.append(_sums_of(equation, moved + correction, reach, rho, test, own, factor, rows))
                words.append(self._in_words(_shares(equation, sums).tolist()))
            yield f"check/{name}", np.array(words, dtype="<u8")
            if equation.is_scaled:
                numbers = equation.factor_share(part, own, factor)
                yield f"check/{name}/factor", np.array(self._in_words(numbers), dtype="<u8")

    def _in_words(self, numbers: Sequence[float]) -> list[list[int]]:
        """Shares and their scale as they travel, (n, WORDS)."""
        *shares, scale = numbers
        return [to_words(number) for number in (*shares, self.blinded(scale))]

    def blinded(self, scale: float) -> float:
        """What travels of a scale. All parties see these summed, and often many of sizes that are alike: of all layers,
        of a sweep's candidates. With another factor for each, their mean and variance would tell single owners' sizes.
        Nor are they rounded: sums of few-digit numbers, each with an unknown factor, can be taken apart (LLL).
        """
        return scale * self._factor  # check: scales-are-blinded

    @cached_property
    def _factor(self) -> float:
        digest = hashlib.sha256(Domain.SCALE.value + self.blind).digest()
        return float(2.0 ** (int.from_bytes(digest[:4]) / 2**32))


def check_correction(name: str, reach: Tensor, rho: Tensor, sent: Tensor) -> None:
    """Raise NotTheMerge unless every number of a correction is within the rounding of float32. `reach`: |D| |rho|."""
    if not (sent.abs() <= largest_correction(reach, rho)).all():  # check: corrections-are-bounded
        raise NotTheMerge(f"the coordinator sent a correction of {name} beyond the rounding of float32")


def largest_correction(reach: Tensor, rho: Tensor) -> Tensor:
    """The bound at the top of this file, (n, columns) float64."""
    return (1 + 2.0**-20) * (2.0**-24 * reach + SUBNORMAL * rho.abs().sum(dim=0))


def _projected(matrix: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
    """M rho and |M| |rho|, (n, columns) float64 each, a few rows at a time: copies of all would be made in memory."""
    size, step = rho.abs(), max(1, CACHED_NUMBERS // matrix.shape[1])
    found = [(product(some, rho), product(some.abs(), size)) for some in map(torch.Tensor.double, matrix.split(step))]
    moved, reach = zip(*found, strict=True)
    return torch.cat(moved), torch.cat(reach)


def _blocks(equation: Equation, group: int) -> Iterator[slice]:
    """The rows of a group that are looked at together. Sums over blocks are then those of `column_sums`."""
    start, size = group * equation.group_rows, equation.rows_at_once or equation.group_rows
    stop = min(start + equation.group_rows, equation.shape[0])
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def _sums_of(
    equation: Equation,
    corrected: Tensor,
    reach: Tensor,
    rho: Tensor,
    test: Tensor,
    own: SummedTensors,
    factor: float,
    rows: slice,
) -> tuple[Tensor, Tensor, Tensor]:
    """Over some rows: s^T of the residual for every column, (COLUMNS,); |v|_2 and the residual's |.|_1, (columns,).

    `corrected`: D rho + c. `reach`: |D| |rho|.
    """
    if equation.rows_at_once is not None:
        left, right = equation.some_of_sides(own, rows)
    else:
        left, right = equation.sides(own, factor)
    moved, right_reach = _projected(right, rho)
    if (size := equation.right_size(right, own, factor)) is not None:
        right_reach = size @ rho.abs()
    right_weight = 2 * rounding(equation) / relative_tolerance(equation)
    residual = times(left, corrected) - moved  # (n, columns)
    sizes = times(left.abs(), reach + SUBNORMAL * rho.abs().sum(dim=0)) + right_weight * right_reach  # v_i
    return column_sums(test * residual), sizes.norm(dim=0), residual.norm(p=1, dim=0)


def _shares(equation: Equation, sums: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """e_i for every column, then S_i: (COLUMNS + 1,) float64. `sums`: see `_sums_of`, of all rows."""
    shares, sizes, residuals = (torch.stack(each) for each in zip(*sums, strict=True))
    spread = min(equation.group_rows**0.5, SPREAD)
    rounded = 2 * column_depth(equation.group_rows) * UNIT / relative_tolerance(equation)
    scale = LARGEST_TEST * (spread * sizes.norm(dim=0) + rounded * residuals.sum(dim=0)).max()
    return torch.cat([column_sums(shares), scale[None]])


def relative_tolerance(equation: Equation) -> float:
    """t, as at the top of this file."""
    return 2 * (2.0**-47 + equation.left_out + rounding(equation))


def rounding(equation: Equation) -> float:
    """r: how far floating point is off, relative to the size of an equation's terms."""
    return (2 * depth(equation.terms_in_a_row) + 2 * depth(equation.shape[1]) + 18) * UNIT


def tolerance(equation: Equation, scale: float) -> float:
    """The most by which an honest sum of shares of one group is off, if its scales add up to S."""
    return relative_tolerance(equation) * scale + LEAST_TOLERANCE


def factor_tolerance(equation: Equation, scale: float) -> float:
    """The same of the number that a factor has to make zero."""
    return (2.0**-22 + 606 * equation.shape[0] ** 2 * UNIT) * scale + LEAST_TOLERANCE


def wrong_claims(claims: Sequence[Claim], total: Total) -> list[str]:
    """The equations that do not hold, by name. `total`: the check's, as every owner adds it up by itself."""
    found = []
    for name, equation in (each for claim in claims for each in claim.named()):
        for group in total[f"check/{name}"].view("<u8"):  # (COLUMNS + 1, WORDS), see pairwise.py
            *shares, scale = map(from_words, group)
            largest = max(abs(share) for share in shares)
            if not largest <= tolerance(equation, scale):  # check: sums-of-shares-are-zero
                found.append(name)
        if equation.is_scaled:
            share, scale = map(from_words, total[f"check/{name}/factor"].view("<u8"))
            if not abs(share) <= factor_tolerance(equation, scale):  # check: factors-are-the-methods
                found.append(f"{name}/factor")
    return list(dict.fromkeys(found))


# --- exact numbers ---


def to_words(number: float) -> list[int]:
    """A float64 in multiples of 2^-103; the rest is cut off. Raises NumericalError for a number of 2^144 or more."""
    if not abs(number) < 2.0**HIGHEST_BIT:
        raise NumericalError(
            f"verification: {number:g} is too large to be summed; nothing has left",
            hint="the model that was sent, or what was contributed, has numbers that no merge has",
        )
    numerator, denominator = abs(number).as_integer_ratio()
    whole = (numerator << -LOWEST_BIT) // denominator
    return wide.to_words(-whole if number < 0 else whole)


def from_words(words: NDArray[np.uint64]) -> float:
    """A sum of such numbers, rounded once."""
    return wide.from_words(words) / (1 << -LOWEST_BIT)
