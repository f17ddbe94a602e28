"""A model's parameters by name: their shapes, the body, copies from one model to another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from common.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel
else:
    torch = lazy_module("torch")


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by name. Tied parameters appear once."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def body_parameters(model: PreTrainedModel) -> tuple[str, ...]:
    """The parameters outside the head, or all parameters if the model does not separate head and body."""
    names = tuple(parameter_shapes(model))
    body = tuple(name for name in names if name.startswith(f"{model.base_model_prefix}."))
    return body or names


def is_finite(tensor: Tensor) -> bool:
    """Whether no number is infinite or NaN. An eighth of the time that torch.isfinite takes, and no memory."""
    return tensor.numel() == 0 or all(math.isfinite(extreme) for extreme in tensor.detach().aminmax())


def copy_parameters(names: Iterable[str], source: Mapping[str, Tensor], target: nn.Module) -> None:
    """Overwrite the named parameters of `target` with those of `source`."""
    to = dict(target.named_parameters())
    with torch.no_grad():
        for name in names:
            to[name].copy_(source[name])
