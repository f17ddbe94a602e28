"""A second device that computes on the CPU, so that a tensor left on the wrong device fails on any machine.

While `pretended()` is open, the device "cuda:0" holds tensors whose numbers are the CPU's. An operation on tensors of
both devices raises, as a GPU's would, and so does reading one with numpy. An index on the CPU, which a GPU would copy
first, is refused too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from common import device as devices

PRETENDED = torch.device("cuda", 0)
CPU = torch.device("cpu")
MOVES = {"to", "_to_copy", "copy_"}


class Elsewhere(Tensor):
    """A tensor on the pretended device. `here` has its numbers."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> "Elsewhere":
        made: Elsewhere = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device="meta",  # what C++ sees, which has no driver for the pretended one
            requires_grad=here.requires_grad,
        )
        made.here = here
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return PRETENDED

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"Elsewhere({self.here})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


class Pretending(TorchDispatchMode):
    """Sends what is created on the pretended device there."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


def run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU what was asked of tensors of one device."""
    flat, _ = tree_flatten((args, kwargs))
    away = [each for each in flat if isinstance(each, Elsewhere)]
    wanted = [each for each in flat if isinstance(each, torch.device)]
    name = function.overloadpacket.__name__
    stray = [each for each in flat if isinstance(each, Tensor) and not isinstance(each, Elsewhere) and each.ndim > 0]
    if away and stray and name not in MOVES:
        raise RuntimeError(f"{function}: expected all tensors on one device, {tuple(stray[0].shape)} is on the CPU")
    goes_there = wanted[0].type in (PRETENDED.type, "meta") if wanted else bool(away)
    if name == "copy_":
        goes_there = isinstance(args[0], Elsewhere)
    here, options = tree_map(_on_cpu, args), tree_map(_on_cpu, kwargs)
    if name == "histc":  # which only a GPU has for whole numbers
        here = (here[0].double(), *here[1:])
    result = function(*here, **options)
    known = {id(each.here): each for each in away}  # what an operation in place returns is the tensor itself

    def placed(each: Any) -> Any:
        if not isinstance(each, Tensor) or not goes_there:
            return each
        return known[id(each)] if id(each) in known else Elsewhere(each)

    return tree_map(placed, result)


def _on_cpu(each: Any) -> Any:
    if isinstance(each, Elsewhere):
        return each.here
    return CPU if isinstance(each, torch.device) else each


@contextmanager
def pretended(free_bytes: int = 1 << 40) -> Iterator[torch.device]:
    """While open, the pretended device is there, with so much free memory."""
    with (
        patch.object(devices, "memory_of", lambda device: (free_bytes, free_bytes)),
        patch("client.measurement.placement.memory_of", lambda device: (free_bytes, free_bytes)),
        patch.object(torch.cuda, "_lazy_init", lambda: None),  # asks for a driver, before any mode is asked
        patch.object(torch.cuda, "get_device_capability", lambda device: (7, 0)),
        patch.object(torch.inference_mode, "__enter__", _enter_no_grad),  # whose tensors no subclass can be made of
        patch.object(torch.inference_mode, "__exit__", _leave_no_grad),
        patch.object(Tensor, "pin_memory", lambda self: self),
        Pretending(),
    ):
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) makes one on the CPU, then moves it
        try:
            yield PRETENDED
        finally:
            torch._C._set_only_lift_cpu_tensors(False)


def _enter_no_grad(mode: Any) -> None:
    mode.before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)


def _leave_no_grad(mode: Any, *_: object) -> None:
    torch.set_grad_enabled(mode.before)
