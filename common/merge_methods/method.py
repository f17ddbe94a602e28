"""What is known of a merge method: one descriptor a method, in one file of this folder, registered by that file.

Everything else in the product asks the descriptor: the agreement for its table and rules, the owner for what to
measure and what leaves, the coordinator for the merge, the consent text and the report for words.

A single-round method needs one secure sum. A multi-round method makes one more for each of its steps, measured on what
the steps before have merged. All its rounds must be over the same owners: the same rows, measured twice and summed over
two groups, would expose the difference.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from math import inf
from typing import TYPE_CHECKING, ClassVar, Generic, Literal, TypeVar

from numpy.typing import NDArray

from common.merge_methods.equations import Equation
from common.merge_methods.terms import (
    WEIGHT_KINDS,
    Hyperparameters,
    MergedDelta,
    MergeSettings,
    OwnerTerms,
    ProblemType,
    Weighting,
)
from common.models.plan import SharedInput
from common.summation.totals import SummedTensors
from common.tensor_layout import TensorEntry, TensorLayout

if TYPE_CHECKING:
    from torch import Tensor

H = TypeVar("H", bound=Hyperparameters)
NoisedSum = Literal["refit", "grams"]


class Measurement(StrEnum):
    """What an owner measures on its rows."""

    GRAMS = "grams"
    FISHER = "fisher"
    CLASSIFIER = "classifier"
    CLASS_SHARES = "class_shares"
    PREDICTIONS = "predictions"  # on the agreed pool, not on its rows


class Method(ABC, Generic[H]):
    """Base of all descriptors; see SingleRoundMethod and MultiRoundMethod."""

    name: ClassVar[str]  # in agreements: method = "regmean"
    title: ClassVar[str]  # in tables, as it reads in mid-sentence: RegMean
    phrase: ClassVar[str]  # what a sentence compares with: the plain average
    summary: ClassVar[str]  # how it merges, in one sentence without a full stop
    paper: ClassVar[str | None]
    swept_name: ClassVar[str | None] = None  # what its sweep varies: alpha
    swept_summary: ClassVar[str | None] = None  # what the values do, in one sentence
    order: ClassVar[int]  # in tables, simpler methods first
    table: type[H]  # its hyperparameters, [regmean] in the agreement
    tensor_kinds: ClassVar[Mapping[str, str]] = WEIGHT_KINDS  # kind of tensor -> what it holds, in words

    trust: ClassVar[Literal["nobody", "coordinator"]] = "coordinator"  # nobody: its equations let owners verify a merge
    fits_32_bits: ClassVar[bool] = False  # whether its numbers can be scaled so that 32 bits are enough (scaling.py)
    can_be_refitted: ClassVar[bool] = False  # whether its merged delta may be the body of `refit`
    needs_blocks: ClassVar[bool] = False  # whether the model must run block by block
    measures_grams_again: ClassVar[bool] = False  # whether its steps sum every Gram, beside the round all methods share
    needs_classifier: ClassVar[bool] = False  # whether the model must end in a classifier that is merged as a whole
    fits_classifier: ClassVar[bool] = False  # whether it measures the Gram of that classifier's input for itself

    def hyperparameters(self, settings: MergeSettings) -> H:
        """This method's own table."""
        return self.of(settings.tables)

    def of(self, tables: Mapping[str, Hyperparameters]) -> H:
        """This method's own table among those of all methods."""
        table = tables[self.name]
        assert isinstance(table, self.table)
        return table

    def swept(self, tables: Mapping[str, Hyperparameters]) -> tuple[float | None, ...]:
        """The values of its hyperparameter to be tried; (None,) for a method without one."""
        return (None,)

    def candidates(self, tables: Mapping[str, Hyperparameters]) -> dict[str, float | None]:
        """Its merged models by name, with the hyperparameter of each: `regmean@0.9`, or just `average`."""
        values = self.swept(tables)
        names = {f"{self.name}@{value!r}": value for value in values}
        return names if len(values) > 1 else {self.name: values[0]}

    def check(self, tables: Mapping[str, Hyperparameters]) -> None:
        """Raise ValueError for hyperparameters that do not go together."""

    def weightings_of_the_same_rows(self, tables: Mapping[str, Hyperparameters]) -> tuple[str, ...]:
        """The kinds of weights with which the totals hold sums of the same rows; () for a method with only one."""
        return ()

    def reads_rows(self, tables: Mapping[str, Hyperparameters]) -> bool:
        """Whether what an owner adds depends on its rows in another way than through its model."""
        return bool(self.measurements(tables))

    def gives_weights(self, tables: Mapping[str, Hyperparameters]) -> bool:
        """Whether the owners' weight changes are summed."""
        return True

    def noised_sums(self, tables: Mapping[str, Hyperparameters]) -> frozenset[NoisedSum]:
        """The kinds of sums of rows that it makes and that have noise with privacy.epsilon; if it reads rows and has
        none, there is no noise that would hide one.
        """
        return frozenset()

    def least_kept(self, tables: Mapping[str, Hyperparameters], dimension: int) -> float:
        """The smallest eigenvalue that it keeps of any Gram of this dimension, relative to its trace, at the value of
        its sweep that keeps most.
        """
        return inf

    def check_noised(
        self, tables: Mapping[str, Hyperparameters], weighting: Weighting, problem: ProblemType | None
    ) -> None:
        """Raise ValueError if these terms do not bound by how much one example moves the sums that this method makes.

        `problem`: None if an example has many predictions.
        """

    def noised_disclosures(self, tables: Mapping[str, Hyperparameters]) -> tuple[str, ...]:
        """The same if the totals have noise."""
        return ()

    def disclosures(self, tables: Mapping[str, Hyperparameters]) -> tuple[str, ...]:
        """What must be understood before consent: what its totals show. {their}: `your`, or `the owners'`."""
        return ()

    @abstractmethod
    def measurements(self, tables: Mapping[str, Hyperparameters]) -> Mapping[Measurement, int]:
        """What an owner measures for the first round, each on at most so many examples."""

    @abstractmethod
    def layout(self, settings: MergeSettings) -> TensorLayout:
        """The tensors of the first round."""

    @abstractmethod
    def contribution(self, settings: MergeSettings, owner: OwnerTerms) -> Iterator[tuple[str, NDArray]]:
        """One owner's tensors, in the order of `layout`. Deltas and Grams are computed when they are asked for."""


class SingleRoundMethod(Method[H]):
    """A method that merges from one sum."""

    @abstractmethod
    def solve(
        self, settings: MergeSettings, total: SummedTensors, hyperparameter: float | None, *, with_spectra: bool
    ) -> MergedDelta:
        """The merged delta. `with_spectra`: note condition and rank of each Gram, which costs more than the solve."""

    def equations(self, settings: MergeSettings, hyperparameter: float | None) -> tuple[Equation, ...]:
        """What defines the merged delta: equations about every parameter that a merge may change, each in one. Without
        them, the merge rests on the coordinator (`trust`).
        """
        return ()

    # A merge that is not linear in the total can still be verified if it is a fixed function of one that is. Solved
    # tensors travel and are verified by equations; then every owner applies the function to them itself.

    def beside(self, settings: MergeSettings) -> tuple[TensorEntry, ...]:
        """What is solved beside the merged delta, and verified with it. No name is that of a parameter."""
        return ()

    def applied(self, settings: MergeSettings) -> tuple[str, ...]:
        """The parameters that are published as a fixed function of what is solved."""
        return ()

    def apply(
        self, settings: MergeSettings, solved: Mapping[str, Tensor], hyperparameter: float | None
    ) -> Iterator[tuple[str, Tensor]]:
        """That function, float64, for each parameter of `applied`. It must be so smooth that two machines, given the
        same float32 tensors, differ by less than float32's rounding (delta.is_rounded).
        """
        return iter(())

    def applied_to(self, settings: MergeSettings, merged: MergedDelta, hyperparameter: float | None) -> MergedDelta:
        """A solved delta, rounded as it travels, with what the function makes of it."""
        solved = {**merged.delta, **merged.beside}
        applied = {name: tensor.float() for name, tensor in self.apply(settings, solved, hyperparameter)}
        return replace(merged, applied=applied)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a multi-round method. `number` counts from 1; `block` from 0, and is None after the last block."""

    number: int
    block: int | None
    inputs: tuple[SharedInput, ...]
    measurement: Measurement
    max_examples: int


class MultiRoundMethod(Method[H]):
    """A method that makes one more sum for each step, after the round that all methods share.

    Between two rounds the coordinator sends what it merged. A malicious coordinator could choose what it sends, so the
    owners verify it (common/verification.py). Where an agreement turns that off, these methods rest on a trusted
    coordinator (SECURITY.md, b4), and the consent text says so.
    """

    def reads_rows(self, tables: Mapping[str, Hyperparameters]) -> bool:
        return True

    @abstractmethod
    def start(self, settings: MergeSettings, total: SummedTensors) -> MergedDelta:
        """What is merged before the first step."""

    @abstractmethod
    def steps(self, settings: MergeSettings) -> tuple[Step, ...]: ...

    @abstractmethod
    def merged_names(self, settings: MergeSettings, number: int) -> tuple[str, ...]:
        """The parameters that step `number` merges; number 0 is `start`."""

    @abstractmethod
    def step_layout(self, settings: MergeSettings, step: Step) -> TensorLayout:
        """The tensors of the step's round."""

    @abstractmethod
    def step_contribution(
        self, settings: MergeSettings, step: Step, owner: OwnerTerms
    ) -> Iterator[tuple[str, NDArray]]:
        """One owner's tensors, in the order of `step_layout`."""

    @abstractmethod
    def solve_step(
        self, settings: MergeSettings, step: Step, total: SummedTensors, hyperparameter: float | None
    ) -> MergedDelta:
        """The merged delta of the step's parameters; the hyperparameter matters in the last step."""

    @abstractmethod
    def start_equations(self, settings: MergeSettings) -> tuple[Equation, ...]:
        """What defines the merged delta of `start`: equations about the parameters of `merged_names` 0."""

    @abstractmethod
    def step_equations(self, settings: MergeSettings, step: Step, hyperparameter: float | None) -> tuple[Equation, ...]:
        """What defines the merged delta of a step."""

    def step_names(self, settings: MergeSettings, step: Step) -> tuple[str, ...]:
        """The parameters that a step merges."""
        return self.merged_names(settings, step.number)


METHODS: dict[str, Method[Hyperparameters]] = {}  # by name; filled by importing this folder

M = TypeVar("M", bound=Method)


def register(method: M) -> M:
    """Make a method known to the whole product."""
    METHODS[method.name] = method
    return method
