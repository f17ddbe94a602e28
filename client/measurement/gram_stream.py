"""An owner's Grams, one transformer block at a time, because all of them together are larger than most models.

Methods ask for Grams in the order of the model. So the model is run block by block. What leaves a block is kept on the
disk for the next one (blocks.py), and each block's Grams make room for those of the next block.

A model is run this way only if a trial on one example shows that it is one chain of blocks, and that blocks that run
alone feed every layer bit-identical numbers. Any other model is measured in one piece: in several passes if its Grams
together are larger than the model, each of which measures as many as fit. The log warns of it.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from client.data.rows import Batch, Rows
from client.measurement.block_steps import measure_inputs
from client.measurement.blocks import BlockShape, check_blocks, first_example, run_blocks
from client.measurement.disk_model import DiskModel
from client.measurement.gram import UNBOUNDED, LayerInput, layer_inputs, measure_grams
from client.measurement.passes import ON_CPU, Halving, Passes
from common.errors import ModelError, first_line
from common.merge_methods.terms import Gram
from common.models.plan import MergePlan, SharedInput

log = logging.getLogger("amalgram.owner")

ROOM = 1.0  # for the Grams of a model that is measured in one piece, in sizes of the model
Fed = dict[str, list[str]]  # by a layer's weight: a digest of what each of its calls was fed
# What a model's own code raises if it does not bear being run in pieces.
TRIAL_ERRORS = (ModelError, RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)


@dataclass(frozen=True, kw_only=True)
class BlockInputs:
    """Inputs of the plan that are fed in one block. `block` is None for the last block and what follows it, and for a
    model that is measured in one piece.
    """

    block: int | None
    inputs: tuple[SharedInput, ...]
    in_one_piece: bool = False


class Batches(Sequence[Batch]):
    """The batches of `rows`, each made when it is asked for; smaller ones once they have been halved."""

    def __init__(self, rows: Rows, halving: Halving) -> None:
        self._rows, self._halving = rows, halving
        self._by_size: dict[int, list[NDArray[np.int64]]] = {}

    @property
    def _indices(self) -> list[NDArray[np.int64]]:
        size = self._halving.size
        if size not in self._by_size:
            self._by_size[size] = list(self._rows.batch_indices(size))
        return self._by_size[size]

    def __getitem__(self, number: int) -> Batch:  # type: ignore[override]
        return self._rows.batch(self._indices[number])[0]

    def __len__(self) -> int:
        return len(self._indices)


class GramStream(Mapping[str, Gram]):
    """Every Gram of the plan by name, measured when the first Gram of its block is asked for.

    If each is asked for once, in the order of the blocks, then each block is run once and the Grams of only one block
    are in memory. `folder` keeps the activations, which are private; the caller removes it. `check` sees the Grams of a
    block before anybody else does, and raises if they must not leave. `norms`: see GramCollector.
    """

    def __init__(
        self,
        own: DiskModel,
        plan: MergePlan,
        batches: Sequence[Batch],
        folder: Path,
        check: Callable[[Mapping[str, Gram]], object],
        passes: Passes = ON_CPU,
        norms: Mapping[str, float] = UNBOUNDED,
    ) -> None:
        self._norms = norms
        self._own, self._plan, self._batches, self._folder, self._check = own, plan, batches, folder, check
        self._passes = passes
        with passes.running(own.model):
            self._steps = _steps(own.model, plan, batches, passes)
        self._step_of = {shared.name: step for step in self._steps for shared in step.inputs}
        self._grams: dict[str, Gram] = {}

    def __getitem__(self, name: str) -> Gram:
        if name not in self._grams:
            self._grams.clear()  # before the next ones take memory
            self._grams = self._measure(self._step_of[name])
        return self._grams.pop(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._step_of)

    def __len__(self) -> int:
        return len(self._step_of)

    def _measure(self, step: BlockInputs) -> dict[str, Gram]:
        grams = self._passes.halving.run(partial(self._run, step))
        self._own.release()
        self._check(grams)
        return grams

    def _run(self, step: BlockInputs) -> dict[str, Gram]:
        if step.in_one_piece:
            plan = replace(self._plan, inputs=step.inputs)
            return measure_grams(self._own.model, plan, self._batches, self._passes, self._norms)
        keep = None if step.block is None else step.block + 1
        folder = self._passes.halving.folder_in(self._folder)
        return measure_inputs(
            self._own.model,
            self._plan,
            step.inputs,
            step.block,
            self._batches,
            folder,
            keep=keep,
            passes=self._passes,
            norms=self._norms,
        )


def _steps(
    model: PreTrainedModel, plan: MergePlan, batches: Sequence[Batch], passes: Passes
) -> tuple[BlockInputs, ...]:
    """The plan's inputs by the block that feeds them, or in groups that fit into memory if that is impossible."""
    whole = tuple(BlockInputs(block=None, inputs=group, in_one_piece=True) for group in _groups(model, plan.inputs))
    if not len(batches):
        return whole
    try:
        example = passes.inputs(first_example(batches[-1]))  # the longest examples come last
        return _steps_by_block(model, plan, example)
    except TRIAL_ERRORS as error:
        log.warning(
            "  the model is measured in one piece and needs more memory, %.0f MB for its Gram matrices alone, "
            "and passes: %d (%s)",
            max(map(_gram_bytes, (step.inputs for step in whole)), default=0) / 1e6,
            len(whole),
            first_line(error),
        )
        return whole


def _groups(model: PreTrainedModel, inputs: tuple[SharedInput, ...]) -> Iterator[tuple[SharedInput, ...]]:
    """The inputs in order, as many at a time as have Grams no larger than the model together, but at least one."""
    room = ROOM * sum(parameter.nbytes for parameter in model.parameters())
    group: tuple[SharedInput, ...] = ()
    for shared in inputs:
        if group and _gram_bytes((*group, shared)) > room:
            yield group
            group = ()
        group = (*group, shared)
    if group:
        yield group


def _gram_bytes(inputs: Sequence[SharedInput]) -> int:
    return sum(shared.gram_size**2 for shared in inputs) * 8


def _steps_by_block(model: PreTrainedModel, plan: MergePlan, example: Batch) -> tuple[BlockInputs, ...]:
    """Raises ModelError if one of the inputs is fed in several blocks, or if the trial shows other numbers."""
    blocks_of = _blocks_by_layer(model, plan, example)
    by_block: dict[int, list[SharedInput]] = {}
    for shared in plan.inputs:
        found = set().union(*(blocks_of.get(layer.whole, set()) for layer in shared.layers))
        if len(found) != 1:
            raise ModelError(f"{type(model).__name__}: {shared.name} is fed in {len(found)} blocks")
        by_block.setdefault(found.pop(), []).append(shared)
    last = len(plan.blocks) - 1
    return tuple(
        BlockInputs(block=block if block < last else None, inputs=tuple(by_block[block])) for block in sorted(by_block)
    )


@torch.inference_mode()
def _blocks_by_layer(model: PreTrainedModel, plan: MergePlan, example: Batch) -> dict[str, set[int]]:
    """The blocks in which each layer is fed something, by the name of its weight.

    What comes before the first block belongs to the first, what follows the last block to the last. Raises ModelError
    if blocks that are run alone feed a layer anything else than the whole model does.
    """
    at_once = _fed(model, plan, lambda: check_blocks(model, plan.blocks, example))
    block_by_block = list(_fed_by_blocks(model, plan, example))
    blocks_of: dict[str, set[int]] = {}
    for weight, fed in at_once.items():
        if fed != [each for in_block in block_by_block for each in in_block.get(weight, [])]:
            raise ModelError(f"{type(model).__name__}: {weight} is fed other numbers if blocks run alone")
        blocks_of[weight] = {block for block, in_block in enumerate(block_by_block) if weight in in_block}
    return blocks_of


def _fed_by_blocks(model: PreTrainedModel, plan: MergePlan, example: Batch) -> Iterator[Fed]:
    """What the layers of each block are fed if blocks run one by one, as they do for the Grams."""
    shape = BlockShape.of(model, plan.blocks, example)
    kept: list[Tensor | None] = [None]

    def run(start: int | None, through: int | None) -> None:
        keep = None if through is None else through + 1
        kept.append(run_blocks(model, shape, example, start, kept[-1], through=through, keep=keep))

    last = len(plan.blocks) - 1
    for block in range(last + 1):
        start, through = (block if block > 0 else None), (block if block < last else None)
        yield _fed(model, plan, partial(run, start, through))


def _fed(model: PreTrainedModel, plan: MergePlan, run: Callable[[], object]) -> Fed:
    fed: Fed = {}

    def observe(weight: str, given: LayerInput) -> None:
        fed.setdefault(weight, []).append(hashlib.sha256(_bytes_of(given.rows)).hexdigest())

    with layer_inputs(model, observe, {layer.whole for layer in plan.layers()}):
        run()
    return fed


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
