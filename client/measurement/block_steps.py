"""What an owner measures in one step of a multi-round method that merges block by block."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from client.data.rows import Batch
from client.measurement.blocks import BlockStream
from client.measurement.gram import UNBOUNDED, collecting
from client.measurement.passes import ON_CPU, Passes
from common.merge_methods.method import Step
from common.merge_methods.terms import Gram
from common.models.parameters import copy_parameters
from common.models.plan import MergePlan, SharedInput


def load_merged_so_far(
    own: PreTrainedModel, merged: Mapping[str, Tensor], names: Iterable[str], modules_ahead: Iterable[str]
) -> None:
    """Turn `own`, in place, into the model that the next step is measured on.

    The parameters `names`, merged so far, come from `merged`. Those of `modules_ahead`, the blocks and layers from this
    step on, stay the owner's, including their biases and norms.
    """
    ahead = tuple(f"{module}." for module in modules_ahead)
    copy_parameters([name for name in names if not name.startswith(ahead)], merged, own)


def modules_from(plan: MergePlan, steps: Sequence[Step], first: Step) -> set[str]:
    """The blocks and layers that are merged in step `first` or later."""
    later = steps[first.number - 1 :]
    layers = {layer.weight.rpartition(".")[0] for each in later for shared in each.inputs for layer in shared.layers}
    return layers if first.block is None else layers | set(plan.blocks[first.block :])


@torch.inference_mode()
def measure_inputs(
    model: PreTrainedModel,
    plan: MergePlan,
    inputs: tuple[SharedInput, ...],
    block: int | None,
    batches: Sequence[Batch],
    folder: Path,
    *,
    keep: int | None,
    passes: Passes = ON_CPU,
    norms: Mapping[str, float] = UNBOUNDED,
) -> dict[str, Gram]:
    """The Grams of `inputs`, which are fed in `block` (None: after the last block).

    The run starts from the activations that `folder` keeps. What enters block `keep` is kept there for the next call.
    `norms`: see GramCollector.
    """
    plan = replace(plan, inputs=inputs, data_free=(), averaged=(), left_alone=())
    with (
        passes.running(model),
        BlockStream(folder, plan.blocks).advancing(model, batches, block, keep=keep, passes=passes) as run,
        collecting(model, plan, passes.device, norms) as collector,
    ):
        for number, batch in enumerate(batches):
            collector.start_batch(passes.inputs(batch))
            run(number)
    return collector.grams()
