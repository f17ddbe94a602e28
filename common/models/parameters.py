"""A model's parameters by name: their shapes, the body, copies, and the longest text that they can read."""

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


def longest_text(model: PreTrainedModel, max_tokens: int) -> int:
    """The longest text that the agreed `max_tokens` and the model's positions allow, which may be relative."""
    positions = getattr(model.config, "max_position_embeddings", None) or 0
    for name, module in model.named_modules():
        embeds = name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding)
        if embeds and module.padding_idx is not None:
            positions = module.num_embeddings - module.padding_idx - 1  # RoBERTa counts from after its padding
    return min(max_tokens, positions) if positions > 0 else max_tokens
