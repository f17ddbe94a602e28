"""No configuration of somebody else decides how much memory is taken: a model fits the files that describe it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from common.errors import ModelError
from common.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch = lazy_module("torch")

PARTS_A_TENSOR, SPARE_PARTS = 20, 10_000  # modules and parameters of a model; BERT has two for each tensor
SPARE_NUMBERS = 1 << 24  # of a head that a small model in half precision is to get


@contextmanager
def building_at_most(what: str, tensors: int, numbers: int) -> Iterator[None]:
    """While open, whoever builds a model that has far more modules and parameters than files with so many `tensors`
    can fill, or parameters of more numbers, gets a ModelError: `what` describes too much.

    Each parameter is counted before anything is written to it.
    """
    most = PARTS_A_TENSOR * tensors + SPARE_PARTS
    found = [0, 0]

    def note(_: nn.Module, name: str, part: object) -> None:
        found[0] += 1
        found[1] += part.numel() if isinstance(part, torch.nn.Parameter) else 0
        if found[0] > most or found[1] > numbers:  # check: models-fit-their-files
            raise ModelError(f"{what} describes far more than its files hold")

    module = torch.nn.modules.module
    hooks = [
        register(note)
        for register in (
            module.register_module_parameter_registration_hook,
            module.register_module_module_registration_hook,
        )
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
