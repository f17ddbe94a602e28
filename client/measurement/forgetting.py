"""A model that forgets, before each pass, what earlier ones left in its modules.

Some of transformers' models change as they run. BigBird drops its sparse attention for good once it has read a short
text, and some rotary embeddings keep the scale of the longest text so far. So one row would decide what is said of all
rows after it, by far more than it may move any sum (SECURITY.md, attack 188).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

NOT_OF_A_PASS = frozenset({"forward", "training"})  # set between passes, as where blocks are passed over (blocks.py)


class FoundModel:
    """What the modules of a model held when this was made: attributes, submodules and buffers, with their values."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._attributes = [
            (vars(each), {name: value for name, value in vars(each).items() if name not in NOT_OF_A_PASS})
            for each in list(model.modules())
        ]
        self._submodules = [(each._modules, dict(each._modules)) for each in model.modules() if each._modules]
        self._buffers = [(each._buffers, dict(each._buffers)) for each in model.modules() if each._buffers]
        self._values = {id(each): each.detach().clone() for each in model.buffers()}

    @contextmanager
    def at_every_pass(self, where: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Iterator[None]:
        """While open, every pass begins with the model as it was found, and in the end it is so again.

        `where`: the tensor that stands in for a buffer at the moment, such as its copy on a device.
        """
        hook = self._model.register_forward_pre_hook(lambda *_: self._restore(where))
        try:
            yield
        finally:
            hook.remove()
            self._restore(where)

    def _restore(self, where: Callable[[Tensor], Tensor]) -> None:
        for held, found in self._attributes:
            held.update(found)
            if len(held) > len(found) + 1:  # besides `training`
                for name in held.keys() - found.keys() - NOT_OF_A_PASS:
                    del held[name]
        for held, found in self._submodules:
            if list(held.items()) != list(found.items()):
                held.clear()
                held.update(found)
        for held, found in self._buffers:
            as_found = {name: each if each is None else self._as_found(each, where) for name, each in found.items()}
            held.clear()
            held.update(as_found)

    def _as_found(self, buffer: Tensor, where: Callable[[Tensor], Tensor]) -> Tensor:
        now = where(buffer)
        with torch.inference_mode():  # in which copies on a device may have been made, and can be written to
            if now.is_inference() or now._version:  # it was written to, perhaps before it was found
                now.copy_(self._values[id(buffer)])
        return now
