"""The loss of each kind of head, and draws from what it predicts. A model's configuration says which kind it is.

One label a row: the softmax of the outputs and cross entropy, as for every word and token. Several labels a row: the
sigmoid of each output and binary cross entropy, so that each label is a draw of its own. Numbers: squared error, which
is -2 log p up to a constant, for a normal distribution of variance 1 around each output. These are transformers' own.
"""

from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel


class Configured(Protocol):
    """What says how its outputs are to be read."""

    @property
    def config(self) -> PreTrainedConfig: ...


def loss_of(model: Configured, logits: Tensor, targets: Tensor, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """The loss of `logits` (predictions, outputs), as a scalar: a sum over predictions, or their mean.

    `targets`: (predictions,) int64 for one label, otherwise (predictions, outputs) float32. As in transformers, a
    prediction's loss of several labels or targets is the mean over these.
    """
    match model.config.problem_type:
        case "multi_label_classification":
            loss = functional.binary_cross_entropy_with_logits(logits, targets, reduction=reduction)
        case "regression":
            loss = functional.mse_loss(logits, targets, reduction=reduction)
        case _:
            return functional.cross_entropy(logits, targets, reduction=reduction)
    return loss if reduction == "mean" else loss / logits.shape[-1]


def surprise_at_a_draw(model: PreTrainedModel, logits: Tensor, generator: torch.Generator) -> Tensor:
    """-log p(y | x), summed over predictions, for y drawn from the model's own p(y | x): a scalar with a gradient.

    Draws are the CPU's on every device.
    """
    outputs = logits.detach().cpu()
    match model.config.problem_type:
        case "multi_label_classification":
            drawn = torch.bernoulli(outputs.sigmoid(), generator=generator).to(logits.device)
            return functional.binary_cross_entropy_with_logits(logits, drawn, reduction="sum")
        case "regression":
            drawn = (outputs + torch.randn(outputs.shape, generator=generator)).to(logits.device)
            return functional.mse_loss(logits, drawn, reduction="sum") / 2
        case _:
            drawn = torch.multinomial(outputs.softmax(-1), 1, generator=generator)[:, 0].to(logits.device)
            return functional.cross_entropy(logits, drawn, reduction="sum")
