"""A model's parameters by name: shapes, the body, a private head."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)

from common.agreement import Task
from common.errors import ModelError


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Every parameter by name; one that is tied to another stands once."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def body_parameters(model: PreTrainedModel) -> tuple[str, ...]:
    """The parameters outside the head; all of them where the model does not tell the two apart."""
    names = tuple(parameter_shapes(model))
    body = tuple(name for name in names if name.startswith(f"{model.base_model_prefix}."))
    return body or names


def private_head(model: PreTrainedModel, task: Task) -> tuple[str, ...]:
    """The parameters that stay with each owner: all outside the model's body where heads are private, else none."""
    if task.head == "shared":
        return ()
    body = f"{model.base_model_prefix}."
    head = tuple(name for name in parameter_shapes(model) if not name.startswith(body))
    if not head or len(head) == len(parameter_shapes(model)):
        raise ModelError(
            f'{type(model).__name__}: its head cannot be told from its body; agree on task.head = "shared"'
        )
    return head


@torch.no_grad()
def copy_parameters(names: Iterable[str], source: Mapping[str, Tensor], target: nn.Module) -> None:
    """Give `target` the named parameters, of those that `source` has by name."""
    to = dict(target.named_parameters())
    for name in names:
        to[name].copy_(source[name])
