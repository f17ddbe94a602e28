"""A model run block by block over an owner's examples. What enters the next block is kept on disk.

So between two steps of a method, only the blocks in between are run, not the model from its beginning. The model's own
forward pass does the work. Earlier blocks are skipped, the first block that runs is fed what was kept, and the pass
stops as soon as it has gone far enough. So masks, positions and everything else that a model passes to its blocks are
its own.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from client.data.rows import Batch
from client.measurement.gram import FarEnough
from client.measurement.passes import ON_CPU, Passes
from common import private_file
from common.errors import DataError, ModelError

USE_REGMEAN = 'use method = "regmean", which runs any model'


@dataclass(frozen=True)
class BlockStream:
    """One model's activations on one set of batches. They are in a subfolder of `folder` named after their block."""

    folder: Path
    blocks: tuple[str, ...]

    @property
    def reached(self) -> int | None:
        """The block whose inputs are kept, or None."""
        return next((int(path.name) for path in sorted(self.folder.glob("[0-9]*")) if path.name.isdecimal()), None)

    @contextmanager
    def advancing(
        self,
        model: PreTrainedModel,
        batches: Sequence[Batch],
        block: int | None,
        *,
        keep: int | None,
        passes: Passes = ON_CPU,
    ) -> Iterator[Callable[[int], None]]:
        """Yield a function that runs the batch of a given number through `block`, or to the end if that is None.

        On leaving without an error, the inputs of block `keep` stay on disk, unless it is None. For a model that
        changes between two steps, `keep` is `block`; for a model that does not, it is the block after. Raises DataError
        if the disk has no room.
        """
        start = self.reached
        if start is not None and block is not None and start > block:
            start = None  # the block is before the kept one, so run from the beginning
        partial = self.folder / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        private_file.make_private_folder(self.folder)
        private_file.make_private_folder(partial)
        shape = BlockShape.of(model, self.blocks, passes.inputs(batches[0]))

        def run(number: int) -> None:
            kept = None if start is None else _loaded(self.folder / str(start) / f"{number}.npy")
            kept = None if kept is None else passes.moved(kept)
            batch = passes.inputs(batches[number])
            entered = run_blocks(model, shape, batch, start, kept, through=block, keep=keep)
            if entered is None:
                return
            if number == 0:
                self._check_room(self._bytes_kept(start) or int(entered.nbytes * _times_the_first(batches)))
            _save(partial / f"{number}.npy", entered.cpu())

        yield run
        if keep is None:
            shutil.rmtree(partial)
            return
        old = self.reached
        if old is not None:
            shutil.rmtree(self.folder / str(old))
        partial.rename(self.folder / str(keep))

    def _bytes_kept(self, block: int | None) -> int:
        return 0 if block is None else sum(path.stat().st_size for path in (self.folder / str(block)).iterdir())

    def _check_room(self, needed_bytes: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < needed_bytes:
            raise DataError(
                f"{self.folder}: {free / 1e6:.0f} MB are free, the activations between two steps need "
                f"{needed_bytes / 1e6:.0f} MB; nothing has left",
                hint="make room, move the state folder, or agree on fewer regmean.measured_examples",
            )


def check_blocks(model: PreTrainedModel, blocks: tuple[str, ...], batch: Batch) -> None:
    """Raise ModelError unless the model is one chain of blocks, each of which runs once per pass."""
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False) or len(blocks) < 2:
        raise ModelError(f"{name}: is not one chain of transformer blocks, which the method needs", hint=USE_REGMEAN)
    calls: list[str] = []
    modules = dict(model.named_modules())
    with ExitStack() as hooks, torch.inference_mode():
        for block in blocks:
            handle = modules[block].register_forward_pre_hook(lambda _, __, block=block: calls.append(block))
            hooks.callback(handle.remove)
        model(**batch)
    if calls != list(blocks):
        raise ModelError(
            f"{name}: its blocks do not run once each and in order, which the method needs", hint=USE_REGMEAN
        )


@dataclass(frozen=True)
class BlockShape:
    """The blocks of a model. `extra`: how many values each returns beside the hidden states, None for a bare tensor."""

    names: tuple[str, ...]
    extra: int | None

    @classmethod
    def of(cls, model: PreTrainedModel, names: tuple[str, ...], batch: Batch) -> "BlockShape":
        """Found by running one example through the first block."""
        returned: list[Any] = []

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            returned.append(output)
            raise FarEnough

        hook = model.get_submodule(names[0]).register_forward_hook(leave)
        with torch.inference_mode(), suppress(FarEnough):
            model(**first_example(batch))
        hook.remove()
        return cls(names, len(returned[0]) - 1 if isinstance(returned[0], tuple) else None)


@torch.inference_mode()
def run_blocks(
    model: PreTrainedModel,
    shape: BlockShape,
    batch: Batch,
    start: int | None,
    kept: Tensor | None,
    *,
    through: int | None,
    keep: int | None,
) -> Tensor | None:
    """One pass from the beginning, or from block `start` on its input `kept`, through block `through` or to the end.

    Returns what entered block `keep`, (examples, tokens, d), or None if nothing is to be kept.
    """
    modules = [model.get_submodule(name) for name in shape.names]
    entered: list[Tensor] = []
    with ExitStack() as hooks:

        def at(index: int, hook: Any) -> None:
            hooks.callback(modules[index].register_forward_pre_hook(hook, with_kwargs=True).remove)

        if start is not None:
            for module in modules[:start]:
                hooks.enter_context(_skipped(module, shape))
            assert kept is not None  # what enters block `start`
            at(start, lambda _, args, kwargs: _with_hidden(args, kwargs, kept))
        if keep is not None:
            at(keep, lambda _, args, kwargs: entered.append(hidden_states(args, kwargs).detach().clone()))
        if through is not None and through + 1 < len(modules):

            def leave(*_: Any) -> None:
                raise FarEnough

            at(through + 1, leave)
        with suppress(FarEnough):
            model(**batch)
    return entered[0] if entered else None


@contextmanager
def _skipped(block: nn.Module, shape: BlockShape) -> Iterator[None]:
    """While open, the block returns its input."""
    before = vars(block).get("forward")

    def give_back(*args: Any, **kwargs: Any) -> Any:
        hidden = hidden_states(args, kwargs)
        return hidden if shape.extra is None else (hidden, *[None] * shape.extra)

    block.forward = give_back
    try:
        yield
    finally:
        if before is None:  # a block that holds a method of its own stays, with its weights on the disk, until gc runs
            del block.forward
        else:
            block.forward = before


def hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among a block's arguments."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (hidden, *args[1:]), kwargs
    return args, kwargs | {"hidden_states": hidden}


def first_example(batch: Batch) -> Batch:
    return {name: tensor[:1] for name, tensor in batch.items()}


def _times_the_first(batches: Sequence[Batch]) -> float:
    """The size of all batches together, in units of the first."""
    return sum(map(_tokens, batches)) / _tokens(batches[0])


def _tokens(batch: Batch) -> int:
    """The number of positions in a batch, including padding; for images, the number of images."""
    return batch["input_ids"].numel() if "input_ids" in batch else len(next(iter(batch.values())))


def _loaded(path: Path) -> Tensor:
    array = np.load(path)
    return torch.from_numpy(array).view(torch.bfloat16) if array.dtype == np.int16 else torch.from_numpy(array)


def _save(path: Path, tensor: Tensor) -> None:
    # numpy has no bfloat16
    array = tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
    try:
        with private_file.create(path) as file:  # check: activations-are-private
            np.save(file, array)
    except OSError as error:
        raise DataError(f"{path}: the activations cannot be written ({error.strerror}); nothing has left") from None
