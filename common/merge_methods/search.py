"""A search for how much of each merged delta each group of blocks takes, by metrics on the owners' validation rows.

The basis are the merged deltas D_b of one to three other methods of the agreement, which every owner has and has
verified. A *mixture* is a vector of scales s_bg, one for each of them and each group g of blocks, and stands for

    delta = sum_b s_bg D_b        in the parameters of group g

which an owner builds by itself. So a candidate is a few hundred bytes and needs no proof. After Evolver (Du et al., ACL
2024 Findings, arXiv 2406.12208), which evolves weights of the owners' own deltas; here these stay at home.

What is asked is decided by nobody. The first generation are fixed mixtures, beginning with the first merged delta as it
is; every later one steps from the best mixtures so far, in directions that follow from the agreement's seed: an
evolution strategy with weighted recombination and mirrored steps (Hansen, arXiv 1604.00772; Brockhoff et al., PPSN
2010). Owners that add up the metrics by themselves make the same mixtures, and refuse others (client/mixtures.py). So
all of this is exact in float64: whole multiples of 1 / 64, sums, and one division.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Annotated

from numpy.typing import NDArray
from pydantic import Field

from common.domain_separation import Domain
from common.merge_methods.method import Measurement, Method, register
from common.merge_methods.terms import Hyperparameters, MergeSettings, OwnerTerms
from common.models.depth import by_depth
from common.models.plan import MergePlan
from common.settings_file import Line
from common.tensor_layout import TensorEntry, TensorLayout

TOGETHER = 6  # mixtures that one round scores
GRAIN = 64  # scales are multiples of 1 / 64
PARENTS = (3, 2, 1)  # how much the best mixtures count in the one that the next generation steps from
STEP = 0.5  # the largest step of the second generation; of the third, a half of it, then a third
ATTEMPTS = 20  # at steps that lead to new mixtures, before they become longer

Mixture = tuple[float, ...]  # scale of each group for the first merged delta, then for the second ...


class SearchTable(Hyperparameters):
    """`basis`: the methods whose merged deltas are mixed; they are in compare_with. `candidates`: how many mixtures are
    tried, each of them a question about the owners' validation rows. `groups`: into how many the blocks are divided;
    what follows the blocks, such as a classifier, is one more. Scales are from 0 to `largest`.
    """

    basis: Annotated[tuple[Line, ...], Field(min_length=1, max_length=3)] = ("data_free",)
    candidates: Annotated[int, Field(ge=2, le=64)] = 24
    groups: Annotated[int, Field(ge=1, le=7)] = 3
    largest: Annotated[float, Field(ge=1, le=4)] = 2.0


class Search(Method[SearchTable]):
    """The best of some mixtures of other methods' merged deltas."""

    name = "search"
    title = "search"
    phrase = "the best mixture of other merges"
    summary = "the mixture of other methods' merges, group of blocks by group, that was best on validation rows"
    paper = "after Du et al., ACL 2024 Findings, arXiv 2406.12208"
    swept_name = "number"
    swept_summary = "Mixtures are numbered in the order in which they were tried; number 1 is the first merge as it is."
    order = 14
    table = SearchTable
    trust = "nobody"
    fits_32_bits = True

    def swept(self, tables: Mapping[str, Hyperparameters]) -> tuple[float, ...]:
        return tuple(float(number) for number in range(1, self.of(tables).candidates + 1))

    def candidates(self, tables: Mapping[str, Hyperparameters]) -> dict[str, float | None]:
        return {f"{self.name}@{number:.0f}": number for number in self.swept(tables)}

    # It needs nothing of its own from the owners: its basis are methods of the same agreement.

    def measurements(self, tables: Mapping[str, Hyperparameters]) -> Mapping[Measurement, int]:
        return {}

    def layout(self, settings: MergeSettings) -> TensorLayout:
        return TensorLayout(())

    def contribution(self, settings: MergeSettings, owner: OwnerTerms) -> Iterator[tuple[str, NDArray]]:
        return iter(())


SEARCH = register(Search())


# --- mixtures ---


def groups_of(plan: MergePlan, table: SearchTable) -> tuple[tuple[str, ...], ...]:
    """The parameters that share scales."""
    return by_depth(plan.changed, plan.blocks, table.groups)


def mixture_layout(plan: MergePlan, table: SearchTable) -> TensorLayout:
    """How a mixture travels: (merged deltas, groups) float32."""
    shape = (len(table.basis), len(groups_of(plan, table)))
    return TensorLayout((TensorEntry(name="mixture", shape=shape, bound=table.largest),))


def is_mixture(scales: Mixture, table: SearchTable) -> bool:
    """Whether all scales are multiples of 1 / 64 within their bounds."""
    return all(0 <= scale <= table.largest and float(scale * GRAIN).is_integer() for scale in scales)


# --- what is tried ---


def generations(table: SearchTable) -> tuple[range, ...]:
    """The numbers, from 0, of the mixtures that are scored together."""
    total = table.candidates
    return tuple(range(start, min(start + TOGETHER, total)) for start in range(0, total, TOGETHER))


def next_mixtures(
    scored: Sequence[tuple[Mixture, float]], num_groups: int, table: SearchTable, seed: int
) -> tuple[Mixture, ...]:
    """The generation after those that are `scored`, each with its metric, of which more is better."""
    generation = len(scored) // TOGETHER
    known = [mixture for mixture, _ in scored]
    made: list[Mixture] = []
    found = _steps(scored, num_groups, table, seed) if scored else _starts(num_groups, table)
    while len(made) < len(generations(table)[generation]):
        mixture = next(found)
        if mixture not in known and mixture not in made:
            made.append(mixture)
    return tuple(made)


def _starts(num_groups: int, table: SearchTable) -> Iterator[Mixture]:
    """Each merged delta alone, all in equal parts, then the first one longer and shorter."""
    bases = len(table.basis)

    def alone(index: int, scale: float) -> Mixture:
        return tuple(scale if base == index else 0.0 for base in range(bases) for _ in range(num_groups))

    yield from (alone(base, 1.0) for base in range(bases))
    if bases > 1:
        yield (_rounded(1 / bases, table),) * (bases * num_groups)
    for distance in range(1, GRAIN):
        for scale in (1 + distance / 4, 1 - distance / 4):
            if 0 < scale <= table.largest:
                yield alone(0, scale)
    for number in range(1, GRAIN + 1):
        yield alone(0, number / GRAIN)


def _steps(
    scored: Sequence[tuple[Mixture, float]], num_groups: int, table: SearchTable, seed: int
) -> Iterator[Mixture]:
    """Steps from the weighted mean of the best, each and its opposite, without end. Sooner or later they reach every
    mixture, of which there are at least 65.
    """
    generation = len(scored) // TOGETHER
    ranked = sorted(scored, key=lambda each: -each[1])[: len(PARENTS)]  # the first of equals first
    weights = PARENTS[: len(ranked)]
    size = len(table.basis) * num_groups
    centre = [
        sum(weight * mixture[index] for weight, (mixture, _) in zip(weights, ranked, strict=True)) / sum(weights)
        for index in range(size)
    ]
    for attempt in count():
        direction, wider = _direction(seed, generation, attempt, size), 1 + attempt // ATTEMPTS
        for sign in (1, -1):
            steps = (sign * wider * STEP * each / generation for each in direction)
            yield tuple(_rounded(middle + step, table) for middle, step in zip(centre, steps, strict=True))


def _direction(seed: int, generation: int, attempt: int, size: int) -> list[float]:
    """Numbers from -1 to 1, the same at every party."""
    written = Domain.SEARCH.value + f"{seed} {generation} {attempt}".encode()
    drawn = hashlib.shake_256(written).digest(4 * size)
    return [(int.from_bytes(drawn[start : start + 4]) - 2**31) / 2**31 for start in range(0, 4 * size, 4)]


def _rounded(scale: float, table: SearchTable) -> float:
    return min(max(round(scale * GRAIN), 0), int(table.largest * GRAIN)) / GRAIN
