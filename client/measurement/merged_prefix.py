"""What an owner measures in one step of a method that goes block by block (common/merge_methods/sequence.py)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from client.data.rows import Batch
from client.measurement.blocks import BlockStream
from client.measurement.gram import collecting
from common.merge_methods.regmean_plus_plus import merged_names, steps
from common.merge_methods.sequence import Step, plan_of
from common.merge_methods.terms import Gram
from common.models.parameters import copy_parameters
from common.models.plan import MergePlan


def put_merged_prefix(own: PreTrainedModel, merged: Mapping[str, Tensor], plan: MergePlan, step: Step) -> None:
    """Turn `own`, in place, into the merged stream's model at `step`: what lies before the step is taken from `merged`,
    which has parameters by name.

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
        for number in range(step.number)
        for name in merged_names(plan, number)
        if not any(name.startswith(f"{module}.") for module in ahead_modules)
    ]
    copy_parameters(names, merged, own)


@torch.inference_mode()
def measure_step(
    model: PreTrainedModel, plan: MergePlan, step: Step, batches: Sequence[Batch], folder: Path, *, keep: int | None
) -> dict[str, Gram]:
    """The Grams of the step's inputs, on the stream of which `folder` keeps the activations; what enters block `keep`
    is kept for the step that follows.
    """
    with (
        BlockStream(folder, plan.blocks).advancing(model, batches, step.block, keep=keep) as run,
        collecting(model, plan_of(plan, step)) as collector,
    ):
        for number, batch in enumerate(batches):
            collector.start_batch(batch)
            run(number)
    return collector.grams()
