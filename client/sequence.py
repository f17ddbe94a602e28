"""What an owner measures in one step of a method that goes block by block (common/merge_methods/sequence.py).

Two models run over the same rows: the *merged* one, whose blocks before this step are merged and whose others are the
owner's own, and, for calibration, the owner's *own* one, whose outputs are the target.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from client.block_stream import BlockStream
from client.gram import BatchTokens, GramCollector, LayerInput, layer_inputs, layer_outputs, with_constant
from client.rows import IGNORED, Batch
from common.merge_methods.calibration import classifier
from common.merge_methods.sequence import Step, plan_of, solved_names, steps
from common.merge_methods.terms import Gram, HeadTerms
from common.models import MergePlan, copy_parameters


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The sums of one step, over all rows."""

    grams: Mapping[str, Gram]
    crosses: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Models:
    """An owner's three models at one step."""

    base: PreTrainedModel
    own: PreTrainedModel
    merged: PreTrainedModel


def put_merged_prefix(own: PreTrainedModel, merged: PreTrainedModel, plan: MergePlan, step: Step) -> None:
    """Turn `own`, in place, into the merged stream's model at `step`: what lies before the step is taken from `merged`.

    Of the blocks and layers from this step on, everything stays the owner's, their biases and norms too.
    """
    all_steps = steps(plan)
    layers_ahead = (
        layer for later in all_steps[step.number - 1 :] for shared in later.inputs for layer in shared.layers
    )
    ahead_modules = {layer.weight.rpartition(".")[0] for layer in layers_ahead}
    if step.block is not None:
        ahead_modules |= set(plan.blocks[step.block :])
    names = [
        name
        for name in (*plan.averaged, *(name for k in range(1, step.number) for name in solved_names(plan, k)))
        if not any(name.startswith(f"{module}.") for module in ahead_modules)
    ]
    copy_parameters(names, merged, own)


@torch.inference_mode()
def measure_step(
    models: Models, plan: MergePlan, step: Step, inputs: list[Batch], folder: Path, *, with_targets: bool
) -> Measurement:
    """Grams of the step's inputs on the merged stream; with targets also, per layer, X^T (Y - X W_0^T)."""
    part = plan_of(plan, step)
    grams, crosses = GramCollector(part), _CrossCollector(part, models)
    with ExitStack() as open_until_done:
        run_merged = open_until_done.enter_context(
            BlockStream(folder / "merged", plan.blocks).advancing(models.merged, inputs, step.block)
        )
        open_until_done.enter_context(layer_inputs(models.merged, grams.observe, crosses.weights))
        if with_targets:
            run_own = open_until_done.enter_context(
                BlockStream(folder / "own", plan.blocks).advancing(models.own, inputs, step.block)
            )
            open_until_done.enter_context(layer_inputs(models.merged, crosses.observe_input, crosses.weights))
            open_until_done.enter_context(layer_outputs(models.own, crosses.observe_output, crosses.weights))
        for number, batch in enumerate(inputs):
            grams.start_batch(batch)
            run_merged(number)
            if with_targets:
                run_own(number)
                crosses.fold(BatchTokens(batch))
    return Measurement(grams=grams.grams(), crosses=crosses.sums)


class _CrossCollector:
    """Adds up X^T (Y - X W_0^T) by layer: float32 in a batch, float64 across batches."""

    def __init__(self, plan: MergePlan, models: Models) -> None:
        self._layers = {layer.weight: layer for layer in plan.layers()}
        self._start, self._own = (dict(model.named_parameters()) for model in (models.base, models.own))
        self._inputs: dict[str, list[LayerInput]] = {}
        self._outputs: dict[str, list[Tensor]] = {}
        self.weights = tuple(self._layers)
        self.sums = {
            layer.weight: torch.zeros(shared.gram_size, layer.d_out, dtype=torch.float64)
            for shared in plan.inputs
            for layer in shared.layers
        }

    def observe_input(self, weight: str, fed: LayerInput) -> None:
        self._inputs.setdefault(weight, []).append(fed)

    def observe_output(self, weight: str, output: Tensor) -> None:
        self._outputs.setdefault(weight, []).append(output)

    def fold(self, tokens: BatchTokens) -> None:
        """Both models are through with a batch."""
        for weight, layer in self._layers.items():
            start = layer.take(self._start)  # (gram_size, d_out)
            bias = self._own.get(f"{weight.removesuffix('.weight')}.bias") if layer.bias is None else None
            for fed, output in zip(self._inputs[weight], self._outputs[weight], strict=True):
                rows = tokens.rows(fed)
                if layer.bias is not None:
                    rows = with_constant(rows)  # (rows, gram_size)
                wanted = tokens.rows(LayerInput(rows=output))  # (rows, d_out)
                if bias is not None:
                    wanted = wanted - bias
                self.sums[weight] += tokens.times(fed) * (rows.T @ (wanted - rows @ start))
        self._inputs, self._outputs = {}, {}


@torch.inference_mode()
def measure_head(models: Models, plan: MergePlan, batches: list[tuple[Batch, Tensor]], folder: Path) -> HeadTerms:
    """What the classifier is fitted to: its inputs on the merged stream, the labels, the own model's scores."""
    layer = classifier(plan)
    features: list[Tensor] = []
    labels: list[Tensor] = []
    scores: list[Tensor] = []
    inputs = [batch for batch, _ in batches]
    with (
        BlockStream(folder / "merged", plan.blocks).advancing(models.merged, inputs, None) as run_merged,
        layer_inputs(models.merged, lambda _, fed: features.append(fed.rows), {layer.weight}),
    ):
        for number, (batch, targets) in enumerate(batches):
            run_merged(number)
            judged = targets != IGNORED
            features[-1] = features[-1][judged]
            labels.append(targets[judged])
            scores.append(models.own(**batch).logits[judged])
    rows = torch.cat(features).double()
    if layer.bias is not None:
        rows = with_constant(rows)
    start = layer.take(dict(models.base.named_parameters())).detach().double()
    return HeadTerms(features=rows, targets=torch.cat(labels), scores=torch.cat(scores).double(), start=start)
