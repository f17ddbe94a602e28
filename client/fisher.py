"""The diagonal of the Fisher information, from per-example gradients (Matena and Raffel, arXiv 2111.09832, equation 3).

    F = sum over examples of (d log p(y | x) / d W)^2,    y drawn from the model's own p(y | x)

The square stands inside the sum: gradients of a whole batch, squared, would be another quantity. Labels are not used.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from client.private_data import Rows


def measure_fisher(model: PreTrainedModel, rows: Rows, seed: int) -> dict[str, Tensor]:
    """F by parameter name, float32, summed over `rows`, one example at a time."""
    parameters = dict(model.named_parameters())
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    generator = torch.Generator().manual_seed(seed)
    for _, batch in rows.batches(batch_size=1):
        logits = model(**batch).logits  # (1, labels)
        label = torch.multinomial(logits.detach().softmax(-1)[0], 1, generator=generator)
        loss = torch.nn.functional.cross_entropy(logits, label)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                sums[name].addcmul_(gradient, gradient)
    return sums
