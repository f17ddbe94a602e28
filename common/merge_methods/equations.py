"""The linear equations that define a merged delta, so that owners can verify one together (common/verification.py).

Every method's merged delta D solves equations that are linear in the summed contribution:

    (sum A_i) D = sum B_i

A_i and B_i are read from owner i's own contribution as the coordinator reads the sums from the total. So each owner can
compute its share A_i D - B_i for a D that it was sent, and the shares add up to zero, except for rounding, if D is the
merge.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from common.lazy import lazy_module
from common.merge_methods.terms import MergeSettings
from common.summation.totals import SummedTensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")


LEAST_FACTOR, LARGEST_FACTOR = 2.0**-8, 2.0**16  # what a coordinator may name: then terms are far below what travels
LANES = 8  # numbers in float64 that the widest vector units take
SMALL = 2**16  # numbers of a matrix for which one call more costs more than it saves
BLOCK = 64  # how many terms are added up at once; in blocks, sums of thousands of terms are rounded far less
ROWS_AT_ONCE = BLOCK**3  # of an equation by entry; then sums of blocks are those of `column_sums`
LEFT_OUT = 2.0**-46  # of a correction: with more, larger errors would pass in directions where A is weak
LEFT_OUT_OF_MEANS = 2.0**-42  # every row of A is alike, so what passes is far below the rounding of float32
MOST_GROUPS = 64  # of such rows; each has shares of its own
MOST_COLUMNS = 4096  # of a mean: rounding that a false correction claims for a row can all be in one of its numbers
MOST_ENLARGED = 2.0**32  # how many times; then shares are still far below what travels
MOST_STACKED = 2**18  # numbers, verified as one equation: their sides are in memory as float64
LEAST_ENLARGED = 2.0**-64  # smaller numbers are rounded as subnormal ones, which enlarging would show


@dataclass(frozen=True, kw_only=True)
class Equation(ABC):
    """One equation: about a part of D with `shape` (n, m).

    `is_diagonal`: A is, so `sides` gives it as a column.
    `by_entry`: what is more, the equation holds for each entry of D alone, which is then one column, (n, 1).
    `is_scaled`: B has a factor that the coordinator names, and which `factor_share` shows to be what the method says.
    """

    name: str
    shape: tuple[int, int]
    is_diagonal: bool = False
    by_entry: bool = False
    is_scaled: bool = False

    @property
    def left_out(self) -> float:
        """What the coordinator may leave out of a correction, relative to what the correction is about."""
        return LEFT_OUT

    @property
    def group_rows(self) -> int:
        """How many rows share a sum of shares, and so a tolerance: all, or those that are looked at together, or a
        multiple of them, so that there are at most MOST_GROUPS groups.
        """
        rows, at_once = self.shape[0], self.rows_at_once
        return rows if at_once is None else min(rows, at_once * -(-rows // (at_once * MOST_GROUPS)))

    @property
    def groups(self) -> int:
        return -(-self.shape[0] // self.group_rows)

    @property
    def terms_in_a_row(self) -> int:
        """How many numbers a row of A has that may not be zero."""
        return 1 if self.is_diagonal else self.shape[0]

    @abstractmethod
    def part_of(self, delta: Mapping[str, Tensor]) -> Tensor:
        """What the equation is about, (n, m), from whole parameters by name."""

    @abstractmethod
    def sides(self, summed: SummedTensors, factor: float) -> tuple[Tensor, Tensor]:
        """A and B, float64, of a total or of one owner's own part: (n, n), or (n, 1) if A is diagonal, and (n, m)."""

    def factor_share(self, part: Tensor, summed: SummedTensors, factor: float) -> tuple[float, float]:
        """One owner's part of a number that is zero for the right factor, and the size of its terms. `part`: `part_of`
        what was sent. Only for what `is_scaled`.
        """
        raise NotImplementedError

    def given(self, delta: Mapping[str, Tensor]) -> Equation:
        """This equation, where `sides` need what was sent beside its own part of `delta`."""
        return self

    @property
    def rows_at_once(self) -> int | None:
        """How many rows are looked at together where A is diagonal, a power of BLOCK: an embedding in float64 is too
        large for most memories. None for all.
        """
        return None

    def some_of_sides(self, summed: SummedTensors, rows: slice) -> tuple[Tensor, Tensor]:
        """Some rows of A and B, if there are `rows_at_once`."""
        left, right = self.sides(summed, 1.0)
        return left[rows], right[rows]

    def right_size(self, right: Tensor, summed: SummedTensors, factor: float) -> Tensor | None:
        """How large the terms of B, `right`, are, (n, m); None for |B|. A difference can be far smaller."""
        return None


def times(left: Tensor, right: Tensor) -> Tensor:
    """A X, (n, k), where a column stands for a diagonal matrix."""
    return left * right if left.shape[1] == 1 else product(left, right)


def product(left: Tensor, right: Tensor) -> Tensor:
    """A matrix product, (n, k), summed in blocks of BLOCK terms."""
    if left.shape[1] <= BLOCK:
        return left @ right
    if right.shape[1] <= LANES and left.numel() > SMALL:
        return _narrow_product(left, right)
    summed = torch.zeros(len(left), right.shape[1], dtype=left.dtype, device=left.device)
    for start in range(0, left.shape[1], BLOCK):
        summed.addmm_(left[:, start : start + BLOCK], right[start : start + BLOCK])
    return summed


def _narrow_product(left: Tensor, right: Tensor) -> Tensor:
    """The same for few columns, all blocks at once, as a library multiplies small matrices fastest."""
    whole = left.shape[1] // BLOCK * BLOCK
    blocks = left[:, :whole].unflatten(1, (-1, BLOCK)).permute(1, 2, 0)  # (blocks, BLOCK, n)
    padded = torch.nn.functional.pad(right, (0, LANES - right.shape[1]))
    factors = padded[:whole].unflatten(0, (-1, BLOCK)).transpose(1, 2)  # (blocks, LANES, BLOCK)
    summed = torch.bmm(factors, blocks).sum(dim=0)[: right.shape[1]].T
    return summed if whole == left.shape[1] else summed + left[:, whole:] @ right[whole:]


def depth(terms: int) -> int:
    """How often a number of a `product` is rounded at most, where it is the sum of so many terms."""
    return 1 + min(terms, BLOCK) + -(-terms // BLOCK)


def column_sums(numbers: Tensor) -> Tensor:
    """The sum of each column, (k,), of (n, k): blocks of BLOCK rows, then blocks of these sums, and so on."""
    while len(numbers) > 1:
        padding = -len(numbers) % BLOCK
        padded = torch.nn.functional.pad(numbers, (0, 0, 0, padding))
        numbers = padded.view(-1, BLOCK, numbers.shape[1]).sum(dim=1)
    return numbers.sum(dim=0)  # of one row, or of none


def column_depth(rows: int) -> int:
    """How often a number of `column_sums` is rounded at most."""
    levels = 0
    while rows > 1:
        rows, levels = -(-rows // BLOCK), levels + 1
    return levels * BLOCK


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """The rows and columns as which a tensor's mean is verified: the first dimension, and all others. A vector is one
    row, because the correction has one number for each row. Rows longer than MOST_COLUMNS, of fused experts for
    example, are divided: all numbers in their order, so many in a row, and zeros after the last.
    """
    numbers, length = prod(shape), prod(shape[1:] if len(shape) > 1 else shape)
    columns = min(length, MOST_COLUMNS)
    return -(-numbers // columns), columns


@dataclass(frozen=True, kw_only=True)
class MeanEquation(Equation):
    """w D = scale * (sum of w_i delta_i) of one parameter. `per_owner`: the scale is times the number of owners.

    `weighted`: the summed tensor that holds w_i delta_i.
    """

    parameter: str
    weighted: str
    scale: float = 1.0
    per_owner: bool = False

    @classmethod
    def of(
        cls,
        parameter: str,
        shape: tuple[int, ...],
        *,
        weighted: str | None = None,
        scale: float = 1.0,
        per_owner: bool = False,
    ) -> MeanEquation:
        return cls(
            name=f"mean/{parameter}",
            shape=as_matrix(shape),
            is_diagonal=True,
            parameter=parameter,
            weighted=weighted or f"weighted_delta/{parameter}",
            scale=scale,
            per_owner=per_owner,
        )

    @property
    def left_out(self) -> float:
        return LEFT_OUT_OF_MEANS

    @property
    def rows_at_once(self) -> int | None:
        return BLOCK**2 if self.weighted else None

    def part_of(self, delta: Mapping[str, Tensor]) -> Tensor:
        return self._in_rows(delta[self.parameter])

    def sides(self, summed: SummedTensors, factor: float) -> tuple[Tensor, Tensor]:
        return self._sides(summed, self._in_rows(torch.from_numpy(summed[self.weighted])))

    def some_of_sides(self, summed: SummedTensors, rows: slice) -> tuple[Tensor, Tensor]:
        columns = self.shape[1]
        numbers = summed.some_of(self.weighted, slice(rows.start * columns, rows.stop * columns))
        return self._sides(summed, self._in_rows(torch.from_numpy(numbers)))

    def _in_rows(self, numbers: Tensor) -> Tensor:
        """(rows, columns), the last row filled up with zeros."""
        flat, columns = numbers.reshape(-1), self.shape[1]
        missing = -len(flat) % columns
        return (torch.nn.functional.pad(flat, (0, missing)) if missing else flat).view(-1, columns)

    def _sides(self, summed: SummedTensors, right: Tensor) -> tuple[Tensor, Tensor]:
        weight = torch.from_numpy(summed["weight"]).expand(len(right))[:, None]
        scale = self.scale * (summed.num_owners if self.per_owner else 1)
        return weight, right if scale == 1 else scale * right


@dataclass(frozen=True, kw_only=True)
class StackedMeans(Equation):
    """The same of several parameters whose rows are equally long, one below the other: fewer shares to send than one
    equation each. A vector is one row.

    The tolerance is relative to all of them together. So each row is enlarged, by the power of two that makes its
    largest number about as large as that of all: otherwise an error far above its own rounding would pass. Powers of
    two add no rounding, and all owners find the same ones in what they were sent. If MOST_STACKED numbers are alike,
    2^-24 of a row's largest number passes in one number of rows of up to 3,072, and 2^-20 in rows of 2^17. More passes
    in all of them if the owners' changes of one row cancel, so that the row is enlarged, and its terms with it.
    """

    means: tuple[MeanEquation, ...]
    exponents: tuple[int, ...] = ()  # of these powers, by row; known once a model was sent

    @classmethod
    def of(cls, means: tuple[MeanEquation, ...]) -> StackedMeans:
        shape = (sum(each.shape[0] for each in means), means[0].shape[1])
        return cls(name=f"means/{means[0].parameter} and others", shape=shape, is_diagonal=True, means=means)

    @property
    def left_out(self) -> float:
        return LEFT_OUT_OF_MEANS

    def part_of(self, delta: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([each.part_of(delta) for each in self.means])

    def given(self, delta: Mapping[str, Tensor]) -> StackedMeans:
        sizes = self.part_of(delta).abs().amax(dim=1)  # (n,)
        sizes = sizes.clamp(min=max(float(sizes.max()) / MOST_ENLARGED, LEAST_ENLARGED))
        exponents = torch.frexp(sizes).exponent
        return replace(self, exponents=tuple((exponents.max() - exponents).tolist()))  # check: rows-are-as-large

    def sides(self, summed: SummedTensors, factor: float) -> tuple[Tensor, Tensor]:
        left, right = zip(*(each.sides(summed, factor) for each in self.means), strict=True)
        powers = torch.from_numpy(np.ldexp(1.0, self.exponents or (0,)))[:, None]  # (n, 1), or (1, 1)
        return powers * torch.cat(left), powers * torch.cat(right)


def stacked(equations: Iterable[Equation]) -> tuple[Equation, ...]:
    """The same equations, with small means whose rows are equally long as one, after all others."""
    others, stacks = list[Equation](), dict[int, list[list[MeanEquation]]]()
    for each in equations:
        if type(each) is not MeanEquation or each.shape[1] == 1 or prod(each.shape) > MOST_STACKED:
            others.append(each)
            continue
        of_length = stacks.setdefault(each.shape[1], [[]])
        if sum(prod(other.shape) for other in of_length[-1]) + prod(each.shape) > MOST_STACKED:
            of_length.append([])
        of_length[-1].append(each)
    full = (tuple(stack) for of_length in stacks.values() for stack in of_length)
    return (*others, *(stack[0] if len(stack) == 1 else StackedMeans.of(stack) for stack in full))


@dataclass(frozen=True, kw_only=True)
class FisherEquation(Equation):
    """F D = (F delta), entry by entry, of one parameter.

    A correction has as many numbers as the parameter, so more is left out of each, all the less the more share a
    tolerance. Where the F of a group are alike, an entry is off by at most about 2^-21 of the mean change; one that has
    fisher.LEAST_SHARE of the others' F, by 2^-13.
    """

    parameter: str

    @property
    def left_out(self) -> float:
        return 2.0 ** -max(34, 26 + ((self.group_rows - 1).bit_length() + 1) // 2)  # 2^-26 / sqrt(rows)

    @property
    def rows_at_once(self) -> int | None:
        return ROWS_AT_ONCE

    @classmethod
    def of(cls, parameter: str, shape: tuple[int, ...]) -> FisherEquation:
        return cls(
            name=f"fisher/{parameter}", shape=(prod(shape), 1), is_diagonal=True, by_entry=True, parameter=parameter
        )

    def part_of(self, delta: Mapping[str, Tensor]) -> Tensor:
        return delta[self.parameter].reshape(self.shape)

    def sides(self, summed: SummedTensors, factor: float) -> tuple[Tensor, Tensor]:
        fisher = torch.from_numpy(summed[f"fisher/{self.parameter}"]).reshape(self.shape)
        return fisher, torch.from_numpy(summed[f"fisher_delta/{self.parameter}"]).reshape(self.shape)

    def some_of_sides(self, summed: SummedTensors, rows: slice) -> tuple[Tensor, Tensor]:
        fisher, products = (summed.some_of(f"{kind}/{self.parameter}", rows) for kind in ("fisher", "fisher_delta"))
        return torch.from_numpy(fisher)[:, None], torch.from_numpy(products)[:, None]


def mean_equations(settings: MergeSettings, names: Iterable[str]) -> tuple[Equation, ...]:
    """What defines the weighted mean of each parameter."""
    return tuple(MeanEquation.of(name, settings.plan.shapes[name]) for name in names)
