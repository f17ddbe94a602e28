"""Sums in half the bytes: every tensor on a scale of its own, so that integers of 32 bits are enough.

Where an agreement says so, two sums are made in place of one. A Gram G_i is positive semidefinite, so by Cauchy and
Schwarz, with D_j = sum_i G_i[j, j] over the owners,

    |G_i[j, k]| <= sqrt(G_i[j, j] G_i[k, k]) <= sqrt(D_j D_k)

and for a product P_i of G_i and a delta, with R_k = sum_i max_j P_i[j, k]^2 / G_i[j, j],

    |P_i[j, k]| <= sqrt(D_j R_k)

What is neither lies within M = sum_i max |T_i|. So D, R and M are summed first (`measures`), in 64 bits, with the
single numbers, which need no scale. The coordinator sends the owners the powers of two above sqrt(D), sqrt(R)
and M (`choose`), and the tensors are summed divided by them, each number within [-1, 1] at every owner, in 32 bits.

Only powers of two are sent, since all owners see them: they tell sizes within a factor of two, and scaling by them is
exact. What a coordinator could do with other scales than these: send each owner its own, so that one owner's numbers
stay and the others' round to zero. So owners contribute only into a session that has the scales they were sent in its
hash, and take one set of scales under an agreement. With scales of its own making, the same for all, it can make all
numbers coarser; an owner of whose own fewer than LEAST_BITS would be left refuses (`check`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf

import numpy as np
from numpy.typing import NDArray

from common.contents import contribution_kind
from common.errors import NumericalError, RemoteProtocolError
from common.mapped import releasing
from common.summation.fixed_point import fraction_bits
from common.summation.protocol import Total
from common.tensor_layout import TensorEntry, TensorLayout

SCALES = "scales"  # the name of the first sum, and of what the coordinator sends after it
# What the owners' and the coordinator's rounding may add to a number that is 1 at most.
BOUND = 1 + 2.0**-10
LEAST_BITS = 10  # so many of an owner's own numbers are left, beside the largest that the others can have
MAX_EXPONENT = 200  # far beyond what bounds allow
PRODUCTS = ("gram_delta", "diagonal_delta", "data_free_gram_delta", "data_free_diagonal_delta")
DIAGONAL, COLUMNS, LARGEST = "diagonal", "columns", "largest"  # what is measured: D, R, M


def measures_layout(layout: TensorLayout) -> TensorLayout:
    """The first sum's tensors, where `layout` is the contribution's."""
    return TensorLayout(tuple(_measure(entry) if _has_scale(entry) else entry for entry in layout.entries))


def exponents_layout(layout: TensorLayout) -> TensorLayout:
    """How the scales travel to the owners: as exponents of two, float32."""
    measures = (_measure(entry) for entry in layout.entries if _has_scale(entry))
    return TensorLayout(tuple(replace(measure, bound=inf) for measure in measures))


def scaled_layout(layout: TensorLayout) -> TensorLayout:
    """The second sum's tensors."""
    entries = tuple(replace(entry, bound=BOUND) for entry in layout.entries if _has_scale(entry))
    return TensorLayout(entries, ring_bits=32)


def measures(layout: TensorLayout, vector: NDArray[np.float64]) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """One owner's tensors of the first sum, in the order of its layout; `vector` (layout.size,) is its contribution."""
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
            seen = np.broadcast_to(diagonal[:, None] > 0, tensor.shape)  # what is not adds nothing to a product
            measured = np.divide(tensor**2, diagonal[:, None], out=np.zeros(tensor.shape), where=seen).max(axis=0)
        else:
            measured = np.abs(tensor).max(keepdims=True).reshape(1)
        yield _measure(entry).name, measured


def choose(layout: TensorLayout, measured: Total) -> NDArray[np.float32]:
    """The exponents of the scales, in the order of `exponents_layout`. By the coordinator, from the first sum."""
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

    `layout` is the contribution's; `exponents` as `choose` gives them. Raises RemoteProtocolError unless they are
    exponents of two.
    """

    layout: TensorLayout
    exponents: NDArray[np.float32]

    def __post_init__(self) -> None:
        exponents = self.exponents
        if not (np.abs(exponents) <= MAX_EXPONENT).all() or (exponents != np.rint(exponents)).any():
            raise RemoteProtocolError("the coordinator sent scales that are no powers of two")

    def __getitem__(self, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(rows, columns), to be multiplied with the tensor `name` as they are."""
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
        """The tensor whose scaled numbers these are: a new one."""
        rows, columns = self[name]
        tensor: NDArray[np.float64] = scaled * rows
        tensor *= columns
        return tensor

    def check(self, vector: NDArray[np.float64], num_owners: int) -> None:
        """Raise RemoteProtocolError unless this owner's contribution lies within the scales, and NumericalError where
        so little of it would be left, by its size or of most of its numbers, that others might be alone in the sum.
        """
        most = 2.0 ** (fraction_bits(BOUND, num_owners, ring_bits=32) - LEAST_BITS)
        own = dict(releasing(measures(self.layout, vector), vector))
        for entry in self.layout.entries:
            if not _has_scale(entry):
                continue
            mine, powers = own[_measure(entry).name], self._powers[_measure(entry).name]
            sent = powers if _kind(entry) == LARGEST else powers**2
            if not (mine <= sent).all():
                raise RemoteProtocolError(
                    f"the coordinator sent a scale of {entry.name} below this owner's own numbers"
                )
            worth, seen = most * mine, mine > 0
            if sent.sum() > worth.sum() > 0 or 2 * (sent > worth)[seen].sum() > seen.sum():
                raise NumericalError(
                    f"{entry.name}: beside the scale that the coordinator sent, which all owners' numbers should make, "
                    f"fewer than {LEAST_BITS} bits of most of this owner's would be left; nothing more has left. Where "
                    "owners are that unlike, agree on summation.ring_bits = 64"
                )

    @cached_property
    def _powers(self) -> dict[str, NDArray[np.float64]]:
        exponents = exponents_layout(self.layout).unflatten(self.exponents)
        return {name: np.ldexp(1.0, each.astype(np.int32)) for name, each in exponents}

    @cached_property
    def _entries(self) -> dict[str, tuple[TensorEntry, TensorEntry]]:
        """Every tensor that is scaled, and the Gram it belongs to: its products stand behind it (System.entries)."""
        entries, gram = {}, self.layout.entries[0]
        for entry in self.layout.entries:
            gram = entry if entry.packing == "symmetric" else gram
            entries[entry.name] = entry, gram
        return entries


def scaled(scales: Scales, vector: NDArray[np.float64]) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """One owner's tensors of the second sum, in the order of its layout; `vector` is its contribution."""
    for entry in scales.layout.entries:
        if _has_scale(entry):
            yield entry.name, scales.down(entry.name, scales.layout.read(vector, entry.name))


@dataclass(frozen=True, kw_only=True)
class RescaledTotal(Total):
    """The total of the contributions, out of both sums; `vector` stays scaled, a tensor is rescaled as it is read."""

    measured: Total
    scales: Scales

    @classmethod
    def of(cls, scaled: Total, measured: Total, scales: Scales) -> "RescaledTotal":
        """Of the second sum, the first, and what lies between them."""
        return cls(
            layout=scaled.layout,
            vector=scaled.vector,
            owners=scaled.owners,
            roster_size=scaled.roster_size,
            measured=measured,
            scales=scales,
        )

    def __contains__(self, name: object) -> bool:
        return name in self.scales.layout

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        return self.scales.up(name, super().__getitem__(name)) if name in self.layout else self.measured[name]

    def rounding_error(self, name: str) -> float:
        rows, columns = self.scales[name]
        return super().rounding_error(name) * float(rows.max() * columns.max())

    def diagonal_error(self, name: str) -> NDArray[np.float64]:
        rows, columns = self.scales[name]
        error: NDArray[np.float64] = super().rounding_error(name) * rows[:, 0] * columns
        return error

    def destroy(self) -> None:
        super().destroy()
        self.measured.destroy()


def _has_scale(entry: TensorEntry) -> bool:
    """All but the single numbers, such as counts."""
    return entry.size > 1 or _kind(entry) != LARGEST


def _kind(entry: TensorEntry) -> str:
    if entry.packing == "symmetric":
        return DIAGONAL
    return COLUMNS if contribution_kind(entry.name) in PRODUCTS else LARGEST


def _measure(entry: TensorEntry) -> TensorEntry:
    """What of a tensor is summed first. R_k is at most the sum of squares of what a delta changes in output k, of which
    the bound of its product speaks already.
    """
    kind = _kind(entry)
    length = 1 if kind == LARGEST else entry.shape[-1]
    return TensorEntry(name=f"{kind}/{entry.name}", shape=(length,), bound=entry.bound)
