"""The diagonal of the Fisher information, from per-example gradients (Matena and Raffel, arXiv 2111.09832, equation 3).

    F = sum over examples of (d log p(y | x) / d W)^2,    y drawn from the model's own p(y | x)

If a model makes several predictions on an example (a tag for each word, the next token at each token), log p(y | x) is
the sum over them, and so it is over several labels or targets (losses.py). The square is inside the sum over examples:
squared gradients of a whole batch would be another quantity. Labels are not used.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from client.data.rows import Rows, judged
from client.measurement.losses import surprise_at_a_draw
from client.measurement.passes import ON_CPU, Passes
from client.measurement.placement import placed


def measure_fisher(
    model: PreTrainedModel, rows: Rows, seed: int, passes: Passes = ON_CPU, names: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """F by parameter name, float32, summed over the examples of `rows`. All of the model must fit on the device.

    `names`: only of these parameters, such as the few that adapters change.
    """
    with placed(model, passes.device, whole=True):
        return {name: summed.cpu() for name, summed in _measure(model, rows, seed, passes, names).items()}


def _measure(
    model: PreTrainedModel, rows: Rows, seed: int, passes: Passes, names: Sequence[str] | None
) -> dict[str, Tensor]:
    wanted = None if names is None else set(names)
    parameters = {name: each for name, each in model.named_parameters() if wanted is None or name in wanted}
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    generator = torch.Generator().manual_seed(seed)  # of the CPU, so that every device draws the same labels
    for index in range(len(rows)):
        batch, targets = rows.batch(np.array([index]))
        with passes.computing():
            logits = model(**passes.inputs(batch)).logits.float()[passes.moved(judged(targets))]
        if not len(logits):  # (predictions, labels)
            continue
        loss = surprise_at_a_draw(model, logits, generator)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                sums[name].addcmul_(gradient, gradient)
    return sums
