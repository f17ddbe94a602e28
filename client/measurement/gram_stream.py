"""An owner's Grams, those of one transformer block at a time: all of them together are larger than most models.

Grams are asked for in the order of the model. So the model is run block by block, what leaves a block being kept on the
disk for the next (block_stream.py), and each block's Grams make room for the next one's. A model is run so only if it
was seen, on an example, to be one chain of blocks that feed every layer, run alone, the very same numbers as in one go.
Any other is measured whole, in one pass.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from client.data.rows import Batch, Rows
from client.measurement.blocks import BlockShape, check_blocks, first_example, run_blocks
from client.measurement.disk_model import DiskModel
from client.measurement.gram import LayerInput, layer_inputs, measure_grams
from client.measurement.merged_prefix import measure_inputs
from common.merge_methods.terms import Gram
from common.models.plan import MergePlan, SharedInput

Fed = dict[str, list[str]]  # by a layer's weight: a digest of what each of its calls was fed


@dataclass(frozen=True, kw_only=True)
class BlockInputs:
    """Inputs of the plan that are fed in one block; `block` is None for all that follows the last."""

    block: int | None
    inputs: tuple[SharedInput, ...]


class Batches(Sequence[Batch]):
    """The batches of `rows`, each made when it is asked for."""

    def __init__(self, rows: Rows, batch_size: int) -> None:
        self._rows = rows
        self._indices = list(rows.batch_indices(batch_size))

    def __getitem__(self, number: int) -> Batch:  # type: ignore[override]
        return self._rows.batch(self._indices[number])[0]

    def __len__(self) -> int:
        return len(self._indices)


class GramStream(Mapping[str, Gram]):
    """Every Gram of the plan by name, measured when the first of its block is asked for, and handed over:
    asked for once each, in the order of the blocks, each block is run once, and those of one block are in memory.

    `folder` keeps the activations, which are private: the caller removes it. `check` raises for Grams that must not
    leave; it sees those of a block before anybody else does.
    """

    def __init__(
        self,
        own: DiskModel,
        plan: MergePlan,
        batches: Sequence[Batch],
        folder: Path,
        check: Callable[[Mapping[str, Gram]], object],
    ) -> None:
        self._own, self._plan, self._batches, self._folder, self._check = own, plan, batches, folder, check
        self._steps = _steps(own.model, plan, batches)
        self._step_of = {shared.name: step for step in self._steps for shared in step.inputs}
        self._grams: dict[str, Gram] = {}

    def __getitem__(self, name: str) -> Gram:
        if name not in self._grams:
            self._grams.clear()  # before the next ones are there
            self._grams = self._measure(self._step_of[name])
        return self._grams.pop(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._step_of)

    def __len__(self) -> int:
        return len(self._step_of)

    def _measure(self, step: BlockInputs) -> dict[str, Gram]:
        if len(self._steps) == 1:
            grams = measure_grams(self._own.model, self._plan, self._batches)
        else:
            keep = None if step.block is None else step.block + 1
            grams = measure_inputs(
                self._own.model, self._plan, step.inputs, step.block, self._batches, self._folder, keep=keep
            )
        self._own.release()
        self._check(grams)
        return grams


def _steps(model: PreTrainedModel, plan: MergePlan, batches: Sequence[Batch]) -> tuple[BlockInputs, ...]:
    """The plan's inputs by the block in which they are fed; one step with all of them where that cannot be."""
    whole = (BlockInputs(block=None, inputs=plan.inputs),)
    places = _places(model, plan, first_example(batches[-1])) if len(batches) else None  # the longest rows come last
    if places is None:
        return whole
    by_block: dict[int, list[SharedInput]] = {}
    for shared in plan.inputs:
        found = set().union(*(places.get(layer.whole, set()) for layer in shared.layers))
        if len(found) != 1:
            return whole
        by_block.setdefault(found.pop(), []).append(shared)
    last = len(plan.blocks) - 1
    return tuple(
        BlockInputs(block=block if block < last else None, inputs=tuple(by_block[block])) for block in sorted(by_block)
    )


@torch.inference_mode()
def _places(model: PreTrainedModel, plan: MergePlan, example: Batch) -> dict[str, set[int]] | None:
    """The blocks in which each layer is fed something, by the name of its weight: what comes before the first block
    counts to that, what follows the last to that one. None where blocks that are run alone feed them anything else.
    """
    try:
        at_once = _fed(model, plan, lambda: check_blocks(model, plan.blocks, example))
        block_by_block = list(_fed_by_blocks(model, plan, example))
    except Exception:  # whatever a model makes of running in pieces, in one piece it may run
        return None
    places: dict[str, set[int]] = {}
    for weight, fed in at_once.items():
        if fed != [each for of_block in block_by_block for each in of_block.get(weight, [])]:
            return None
        places[weight] = {block for block, of_block in enumerate(block_by_block) if weight in of_block}
    return places


def _fed_by_blocks(model: PreTrainedModel, plan: MergePlan, example: Batch) -> Iterator[Fed]:
    """What each block's layers are fed, the blocks run one by one as for the Grams."""
    shape = BlockShape.of(model, plan.blocks, example)
    kept: list[Tensor | None] = [None]

    def run(start: int | None, through: int | None) -> None:
        before = None if kept[-1] is None else kept[-1].numpy()
        keep = None if through is None else through + 1
        kept.append(run_blocks(model, shape, example, start, before, through=through, keep=keep))

    last = len(plan.blocks) - 1
    for block in range(last + 1):
        start, through = (block if block > 0 else None), (block if block < last else None)
        yield _fed(model, plan, partial(run, start, through))


def _fed(model: PreTrainedModel, plan: MergePlan, run: Callable[[], object]) -> Fed:
    fed: Fed = {}

    def observe(weight: str, given: LayerInput) -> None:
        fed.setdefault(weight, []).append(hashlib.sha256(given.rows.numpy().tobytes()).hexdigest())

    with layer_inputs(model, observe, {layer.whole for layer in plan.layers()}):
        run()
    return fed
