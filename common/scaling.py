"""Sums in half the bytes: every tensor on a scale of its own, so that integers of 32 bits are enough.

Where an agreement says so, one round becomes two. A Gram G_i is positive semidefinite, so by Cauchy and Schwarz, with
D_j = sum_i G_i[j, j] over the owners,

    |G_i[j, k]| <= sqrt(G_i[j, j] G_i[k, k]) <= sqrt(D_j D_k)

and for a product P_i of G_i and a delta, with R_k = sum_i max_j P_i[j, k]^2 / G_i[j, j],

    |P_i[j, k]| <= sqrt(D_j R_k)

Every other tensor lies within M = sum_i max |T_i|. So D, R and M are summed first (`measures`), in 64 bits, together
with the single numbers, which need no scale. The coordinator sends the owners the powers of two above sqrt(D), sqrt(R)
and M (`choose`). Then the tensors, divided by them, are summed in 32 bits: every number is within [-1, 1].

Only powers of two are sent, because all owners see them: they show sizes within a factor of two, and scaling by them is
exact. A malicious coordinator could send each owner its own scales, so that one owner's numbers stay and the others'
round to zero. So owners contribute only into a session whose hash covers the scales they were sent, and accept one set
of scales under an agreement. A coordinator that makes up scales, the same for all, can make all numbers coarser; an
owner that would keep fewer than LEAST_BITS of its own refuses (`check`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf

import numpy as np
from numpy.typing import NDArray

from common.errors import NumericalError, RemoteProtocolError
from common.mapped import releasing
from common.summation.fixed_point import fraction_bits
from common.summation.protocol import Total
from common.summation.totals import SummedTensors
from common.tensor_layout import TensorEntry, TensorLayout

# What the owners' and the coordinator's rounding may add to a number of at most 1.
BOUND = 1 + 2.0**-10
LEAST_BITS = 10  # an owner's own numbers keep at least this many, next to the largest that the others can have
MAX_EXPONENT = 200  # far beyond what bounds allow
DIAGONAL, COLUMNS, LARGEST = "diagonal", "columns", "largest"  # what is measured: D, R, M
SCALE_KINDS = {
    "diagonal": "the diagonals of Gram matrices, alone and first, for the scales on which the rest is summed",
    "columns": "the size of each column of Gram matrices times {their} weight changes, for the scales",
    "largest": "the largest of {their} weight changes in each tensor, times {their} weight in the mean, for the scales",
}


def measures_layout(layout: TensorLayout) -> TensorLayout:
    """The tensors of the first round; `layout` is the contribution's."""
    return TensorLayout(tuple(_measure(entry) if _has_scale(entry) else entry for entry in layout.entries))


def exponents_layout(layout: TensorLayout) -> TensorLayout:
    """How the scales travel to the owners: as exponents of two, float32."""
    measures = (_measure(entry) for entry in layout.entries if _has_scale(entry))
    return TensorLayout(tuple(replace(measure, bound=inf) for measure in measures))


def scaled_layout(layout: TensorLayout) -> TensorLayout:
    """The tensors of the second round."""
    entries = tuple(replace(entry, bound=BOUND) for entry in layout.entries if _has_scale(entry))
    return TensorLayout(entries, ring_bits=32)


def measures(layout: TensorLayout, vector: NDArray[np.float64]) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """One owner's tensors of the first round, in order; `vector` (layout.size,) is its contribution."""
    diagonal = np.empty(0)
    for entry in layout.entries:
        tensor = layout.read(vector, entry.name)
        if not _has_scale(entry):
            yield entry.name, tensor
            continue
        kind = _kind(entry)
        if kind == DIAGONAL:
            diagonal = tensor.diagonal().copy()  # (d,)
            measured = diagonal
        elif kind == COLUMNS:
            seen = np.broadcast_to(
                diagonal[:, None] > 0, tensor.shape
            )  # an input that is never seen adds nothing to a product
            measured = np.divide(tensor**2, diagonal[:, None], out=np.zeros(tensor.shape), where=seen).max(axis=0)
        else:
            measured = np.abs(tensor).max(keepdims=True).reshape(1)
        yield _measure(entry).name, measured


def choose(layout: TensorLayout, measured: Total) -> NDArray[np.float32]:
    """The exponents of the scales, in the order of `exponents_layout`; the coordinator chooses them after round one."""
    exponents = []
    for entry in layout.entries:
        if _has_scale(entry):
            name = _measure(entry).name
            at_most = np.maximum(measured[name], 0) + measured.rounding_error(name)
            exponents.append(np.frexp(at_most if _kind(entry) == LARGEST else np.sqrt(at_most))[1])
    return np.concatenate(exponents).astype(np.float32)


@dataclass(frozen=True)
class Scales:
    """What the tensors of a contribution are divided by: number [j, k] of each by rows[j] * columns[k].

    `layout` is the contribution's; `exponents` are as `choose` gives them. Raises RemoteProtocolError unless they are
    whole numbers within MAX_EXPONENT.
    """

    layout: TensorLayout
    exponents: NDArray[np.float32]

    def __post_init__(self) -> None:
        exponents = self.exponents
        if (
            not (np.abs(exponents) <= MAX_EXPONENT).all() or (exponents != np.rint(exponents)).any()
        ):  # check: scales-are-powers-of-two
            raise RemoteProtocolError("the coordinator sent scales that are not powers of two")

    def __getitem__(self, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(rows, columns), ready to be multiplied with the tensor `name`."""
        entry, gram = self._entries[name]
        columns = self._powers[_measure(entry).name]
        return (np.ones(1) if _kind(entry) == LARGEST else self._powers[_measure(gram).name][:, None]), columns

    def down(self, name: str, tensor: NDArray[np.float64]) -> NDArray[np.float64]:
        """The tensor on its scale: a new one."""
        rows, columns = self[name]
        scaled: NDArray[np.float64] = tensor * (1 / rows)
        scaled *= 1 / columns
        return scaled

    def up(self, name: str, scaled: NDArray[np.float64]) -> NDArray[np.float64]:
        """The tensor back on its true scale: a new one."""
        rows, columns = self[name]
        tensor: NDArray[np.float64] = scaled * rows
        tensor *= columns
        return tensor

    def check(self, vector: NDArray[np.float64], num_owners: int) -> None:
        """Raise RemoteProtocolError unless this owner's contribution lies within the scales.

        Raise NumericalError if it would keep so few bits, in its size or in most of its numbers, that others might be
        alone in the sum.
        """
        most = 2.0 ** (fraction_bits(BOUND, num_owners, ring_bits=32) - LEAST_BITS)
        own = dict(releasing(measures(self.layout, vector), vector))
        empty: set[str] = set()
        for entry in self.layout.entries:
            if not _has_scale(entry):
                continue
            if _kind(entry) == DIAGONAL and _is_floor(self.layout.read(vector, entry.name)):
                empty.add(entry.name)
            mine, powers = own[_measure(entry).name], self._powers[_measure(entry).name]
            sent = powers if _kind(entry) == LARGEST else powers**2
            if not (mine <= sent).all():  # check: scales-cover-my-numbers
                raise RemoteProtocolError(
                    f"the coordinator sent a scale for {entry.name} below this owner's own numbers"
                )
            if entry.name in empty or entry.product_of in empty:
                continue  # no row of mine is in it, so no bits of mine can be lost
            worth, seen = most * mine, mine > 0
            if sent.sum() > worth.sum() > 0 or 2 * (sent > worth)[seen].sum() > seen.sum():  # check: my-bits-are-kept
                raise NumericalError(
                    f"{entry.name}: on the scale that the coordinator sent, most of this owner's values would keep "
                    f"fewer than {LEAST_BITS} bits; nothing more has left",
                    hint="where owners differ that much, agree on summation.ring_bits = 64",
                )

    @cached_property
    def _powers(self) -> dict[str, NDArray[np.float64]]:
        exponents = exponents_layout(self.layout).unflatten(self.exponents)
        return {name: np.ldexp(1.0, each.astype(np.int32)) for name, each in exponents}

    @cached_property
    def _entries(self) -> dict[str, tuple[TensorEntry, TensorEntry]]:
        """Every tensor, and the Gram it belongs to: itself, unless it is a product."""
        by_name = {entry.name: entry for entry in self.layout.entries}
        return {name: (entry, by_name[entry.product_of or name]) for name, entry in by_name.items()}


def scaled(scales: Scales, vector: NDArray[np.float64]) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """One owner's tensors of the second round, in the order of its layout; `vector` is its contribution."""
    for entry in scales.layout.entries:
        if _has_scale(entry):
            yield entry.name, scales.down(entry.name, scales.layout.read(vector, entry.name))


@dataclass(frozen=True, kw_only=True)
class RescaledTotal:
    """The total of the contributions (summation.totals.SummedTensors), from both rounds, or one owner's part of it.

    `scaled` stays as it was summed; each tensor is put back on its true scale as it is read.
    """

    scaled: SummedTensors
    measured: SummedTensors
    scales: Scales

    @property
    def owners(self) -> tuple[str, ...]:
        return self.scaled.owners

    @property
    def num_owners(self) -> int:
        return self.scaled.num_owners

    def __contains__(self, name: object) -> bool:
        return name in self.scales.layout

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        return self.scales.up(name, self.scaled[name]) if name in self.scaled else self.measured[name]

    def some_of(self, name: str, numbers: slice) -> NDArray[np.float64]:
        if name not in self.scaled:
            return self.measured[name].reshape(-1)[numbers]
        rows, columns = self.scales[name]
        if rows.size == columns.size == 1:  # one scale for the whole tensor, which need not be read
            return self.scales.up(name, self.scaled.some_of(name, numbers).reshape(1, -1)).reshape(-1)
        return self[name].reshape(-1)[numbers]

    def rounding_error(self, name: str) -> float:
        rows, columns = self.scales[name]
        return self.scaled.rounding_error(name) * float(rows.max() * columns.max())

    def diagonal_error(self, name: str) -> NDArray[np.float64]:
        rows, columns = self.scales[name]
        error: NDArray[np.float64] = self.scaled.rounding_error(name) * rows[:, 0] * columns
        return error

    def destroy(self) -> None:
        self.scaled.destroy()
        self.measured.destroy()


def _is_floor(gram: NDArray[np.float64]) -> bool:
    """Whether a Gram holds nothing but the floor of a verified merge (normal_equations.add_floor)."""
    return len(gram) > 1 and bool((gram == gram[0, 0] * np.eye(len(gram))).all())


def _has_scale(entry: TensorEntry) -> bool:
    """Everything except single numbers, such as counts."""
    return entry.size > 1 or _kind(entry) != LARGEST


def _kind(entry: TensorEntry) -> str:
    if entry.packing == "symmetric":
        return DIAGONAL
    return COLUMNS if entry.product_of else LARGEST


def _measure(entry: TensorEntry) -> TensorEntry:
    """What is summed of a tensor in the first round.

    R_k is at most the sum of squares of what a delta changes in output k, which the product's bound covers already.
    """
    kind = _kind(entry)
    length = 1 if kind == LARGEST else entry.shape[-1]
    return TensorEntry(name=f"{kind}/{entry.name}", shape=(length,), bound=entry.bound)
