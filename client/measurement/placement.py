"""A model's parameters on an accelerator while passes run there: one transformer block at a time if it is large.

The model stays where it is, in memory or on the disk (disk_model.py). Its modules hold copies on the device instead of
their own parameters: those outside the blocks from the start, those of a block from when the block first runs. A block
that is passed over (blocks.py) is never copied.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.device import memory_of
from common.models.layers import block_names

Where = Callable[[Tensor], Tensor]
ROOM = 0.5  # the share of a device's free memory that parameters may fill; the rest is for what passes compute


@contextmanager
def placed(model: nn.Module, device: torch.device, *, whole: bool = False, trains: bool = False) -> Iterator[Where]:
    """While open, `model` computes on `device`; on the CPU, it is left as it is. Yields a function that tells where a
    tensor of the model is at the moment: its copy on the device, or itself.

    `whole`: the whole model is copied at once and stays, for passes with gradients. `trains`: what the parameters
    become is written back in the end.
    """
    if device.type == "cpu":
        yield lambda tensor: tensor
        return
    memory = memory_of(device)
    placement = Placement(
        model, device, whole=whole or trains, room_bytes=None if memory is None else int(ROOM * memory[0])
    )
    with placement.hooked():
        yield placement.where
        if trains:
            placement.write_back()


@dataclass(frozen=True)
class Slot:
    """Where a module keeps a parameter or buffer: `tensors` is its `_parameters` or `_buffers`."""

    tensors: dict[str, Any]
    name: str
    home: Tensor  # the one that belongs to the model


class Placement:
    """The copies of one model's parameters and buffers on `device`.

    If all of them together are more than `room_bytes`, a block's make room for those of the next one.
    """

    def __init__(self, model: nn.Module, device: torch.device, *, whole: bool, room_bytes: int | None) -> None:
        self._device = device
        self._blocks = [] if whole else [model.get_submodule(name) for name in block_names(model)]
        self._inside = [tuple(_slots(block.modules())) for block in self._blocks]
        of_blocks = {id(module) for block in self._blocks for module in block.modules()}
        self._outside = tuple(_slots(module for module in model.modules() if id(module) not in of_blocks))
        self._copies: dict[int, Tensor] = {}  # by a home's identity: a tied parameter is copied once
        self._present: set[int] = set()  # blocks that are on the device
        homes = {id(slot.home): slot.home for part in (self._outside, *self._inside) for slot in part}
        self._all_fit = room_bytes is None or sum(home.nbytes for home in homes.values()) <= room_bytes

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """While open, every block is brought to the device before anything in it runs."""
        with ExitStack() as stack:
            stack.callback(self._send_all_back)
            self._bring(self._outside)
            for number, block in enumerate(self._blocks):
                for module in block.modules():
                    # A block that is passed over is called too, but nothing in it.
                    if module is not block or any(True for _ in _slots([block])):
                        hook = module.register_forward_pre_hook(lambda *_, number=number: self._need(number))
                        stack.callback(hook.remove)
            yield

    def where(self, tensor: Tensor) -> Tensor:
        """The copy of a tensor of the model, or the tensor itself if it has none now."""
        return self._copies.get(id(tensor), tensor)

    def write_back(self) -> None:
        """Give the model the values of its parameters on the device."""
        with torch.no_grad():
            for slot in self._outside:
                if isinstance(slot.home, nn.Parameter):
                    slot.home.copy_(slot.tensors[slot.name])

    def _need(self, number: int) -> None:
        if number in self._present:
            return
        if not self._all_fit:
            for other in self._present:
                self._send_back(self._inside[other])
            self._present.clear()
        self._bring(self._inside[number])
        self._present.add(number)

    def _bring(self, slots: Iterable[Slot]) -> None:
        for slot in slots:
            if id(slot.home) not in self._copies:
                copy = slot.home.detach().to(self._device)
                if isinstance(slot.home, nn.Parameter):
                    copy = nn.Parameter(copy, requires_grad=slot.home.requires_grad)
                self._copies[id(slot.home)] = copy
            slot.tensors[slot.name] = self._copies[id(slot.home)]

    def _send_back(self, slots: Iterable[Slot]) -> None:
        for slot in slots:
            slot.tensors[slot.name] = slot.home
            self._copies.pop(id(slot.home), None)

    def _send_all_back(self) -> None:
        for part in (self._outside, *self._inside):
            self._send_back(part)


def _slots(modules: Iterable[nn.Module]) -> Iterator[Slot]:
    for module in modules:
        for tensors in (module._parameters, module._buffers):
            for name, home in tensors.items():
                if home is not None:
                    yield Slot(tensors, name, home)
