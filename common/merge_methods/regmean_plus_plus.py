"""RegMean++ (Nguyen et al., 2025, arXiv 2508.03121, section 3): RegMean, block after block.

The Grams of block l are those of the rows that the merged blocks before it produce, run through the owner's own block
l. So each layer is solved for the inputs that it will really get. Otherwise each step is a RegMean of its own
(`regmean.py`), at one alpha. What comes before the first block belongs to the first step. After the last block (pooler,
classifier), each distinct input is a step of its own. What is averaged is merged before the first step.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from numpy.typing import NDArray

from common.merge_methods.data_free import DATA_FREE_KINDS
from common.merge_methods.equations import Equation
from common.merge_methods.method import Measurement, MultiRoundMethod, NoisedSum, Step, register
from common.merge_methods.regmean import GRAM_KINDS, REGMEAN, GramPart, check_weighting
from common.merge_methods.terms import (
    WEIGHT_KINDS,
    Hyperparameters,
    MergedDelta,
    MergeSettings,
    OwnerTerms,
    ProblemType,
    Weighting,
    with_unchanged,
)
from common.models.layers import parameter_of
from common.models.plan import SharedInput
from common.settings_file import Probability
from common.summation.totals import SummedTensors
from common.tensor_layout import TensorLayout


class RegMeanPlusPlusTable(Hyperparameters):
    """`ridge` and `measured_examples` are those of [regmean]."""

    alpha: Probability = 0.9


class RegMeanPlusPlus(MultiRoundMethod[RegMeanPlusPlusTable]):
    """RegMean on the inputs that the merged model makes."""

    name = "regmean_plus_plus"
    title = "RegMean++"
    phrase = "RegMean++"
    summary = "RegMean, block after block, each on the inputs that the merged blocks before it produce"
    paper = "Nguyen et al., 2025, arXiv 2508.03121"
    order = 11
    table = RegMeanPlusPlusTable
    trust = "nobody"
    tensor_kinds = WEIGHT_KINDS | DATA_FREE_KINDS | GRAM_KINDS
    needs_blocks = True
    measures_grams_again = True

    def noised_sums(self, tables: Mapping[str, Hyperparameters]) -> frozenset[NoisedSum]:
        return REGMEAN.noised_sums(tables)

    def least_kept(self, tables: Mapping[str, Hyperparameters], dimension: int) -> float:
        return (1 - self.of(tables).alpha) / dimension

    def check_noised(
        self, tables: Mapping[str, Hyperparameters], weighting: Weighting, problem: ProblemType | None
    ) -> None:
        check_weighting(weighting)

    def noised_disclosures(self, tables: Mapping[str, Hyperparameters]) -> tuple[str, ...]:
        return REGMEAN.noised_disclosures(tables)

    def disclosures(self, tables: Mapping[str, Hyperparameters]) -> tuple[str, ...]:
        return REGMEAN.disclosures(tables)

    def measurements(self, tables: Mapping[str, Hyperparameters]) -> Mapping[Measurement, int]:
        return {}

    def layout(self, settings: MergeSettings) -> TensorLayout:
        return self._start_part(settings).layout(settings)

    def contribution(self, settings: MergeSettings, owner: OwnerTerms) -> Iterator[tuple[str, NDArray]]:
        return self._start_part(settings).contribution(settings, owner)

    def start(self, settings: MergeSettings, total: SummedTensors) -> MergedDelta:
        alpha = self.hyperparameters(settings).alpha
        merged = self._start_part(settings).solve(settings, total, alpha, with_spectra=True)
        return with_unchanged(settings, merged)

    def steps(self, settings: MergeSettings) -> tuple[Step, ...]:
        """Every input of the plan, in the order of first use, in exactly one step."""
        plan, max_examples = settings.plan, REGMEAN.hyperparameters(settings).measured_examples
        by_block: dict[int, list[SharedInput]] = {}
        after: list[SharedInput] = []
        for shared in plan.inputs:
            block = next((index for index, name in enumerate(plan.blocks) if shared.name.startswith(f"{name}.")), None)
            if block is not None:
                by_block.setdefault(block, []).append(shared)
            elif by_block:
                after.append(shared)
            else:
                by_block[0] = [shared]
        parts: list[tuple[int | None, list[SharedInput]]] = [(block, by_block[block]) for block in sorted(by_block)]
        parts += [(None, [shared]) for shared in after]
        return tuple(
            Step(
                number=number,
                block=block,
                inputs=tuple(inputs),
                measurement=Measurement.GRAMS,
                max_examples=max_examples,
            )
            for number, (block, inputs) in enumerate(parts, 1)
        )

    def merged_names(self, settings: MergeSettings, number: int) -> tuple[str, ...]:
        if number == 0:
            plan = settings.plan
            return tuple(dict.fromkeys([*plan.averaged, *(parameter_of(layer.weight) for layer in plan.data_free)]))
        layers = [layer for shared in self.steps(settings)[number - 1].inputs for layer in shared.layers]
        biases = [layer.bias for layer in layers if layer.bias is not None]
        return tuple(dict.fromkeys([*(parameter_of(layer.weight) for layer in layers), *biases]))

    def step_layout(self, settings: MergeSettings, step: Step) -> TensorLayout:
        return self._step_part(settings, step).layout(settings)

    def step_contribution(
        self, settings: MergeSettings, step: Step, owner: OwnerTerms
    ) -> Iterator[tuple[str, NDArray]]:
        return self._step_part(settings, step).contribution(settings, owner)

    def solve_step(
        self, settings: MergeSettings, step: Step, total: SummedTensors, hyperparameter: float | None
    ) -> MergedDelta:
        alpha = self.hyperparameters(settings).alpha
        return self._step_part(settings, step).solve(settings, total, alpha, with_spectra=True)

    def start_equations(self, settings: MergeSettings) -> tuple[Equation, ...]:
        return self._start_part(settings).equations(settings, self.hyperparameters(settings).alpha)

    def step_equations(self, settings: MergeSettings, step: Step, hyperparameter: float | None) -> tuple[Equation, ...]:
        return self._step_part(settings, step).equations(settings, self.hyperparameters(settings).alpha)

    def _start_part(self, settings: MergeSettings) -> GramPart:
        """What needs no measured Gram."""
        plan = settings.plan
        part = self._part(settings, inputs=())
        return replace(part, data_free=plan.data_free, averaged=plan.averaged)

    def _step_part(self, settings: MergeSettings, step: Step) -> GramPart:
        return self._part(settings, step.inputs)

    def _part(self, settings: MergeSettings, inputs: tuple[SharedInput, ...]) -> GramPart:
        alpha, ridge = self.hyperparameters(settings).alpha, REGMEAN.hyperparameters(settings).ridge
        return GramPart(inputs=inputs, alphas=(alpha,), ridge=ridge)


REGMEAN_PLUS_PLUS = register(RegMeanPlusPlus())
