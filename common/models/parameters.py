"""A model's parameters by name: shapes, the body, a private head."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Every parameter by name; one that is tied to another stands once."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def body_parameters(model: PreTrainedModel) -> tuple[str, ...]:
    """The parameters outside the head; all of them where the model does not tell the two apart."""
    names = tuple(parameter_shapes(model))
    body = tuple(name for name in names if name.startswith(f"{model.base_model_prefix}."))
    return body or names


@torch.no_grad()
def copy_parameters(names: Iterable[str], source: Mapping[str, Tensor], target: nn.Module) -> None:
    """Give `target` the named parameters, of those that `source` has by name."""
    to = dict(target.named_parameters())
    for name in names:
        to[name].copy_(source[name])
