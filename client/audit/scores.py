"""What an attacker scores each row by: its loss, and how well its gradient points to where the model went.

    loss                 -l_j(W*)                 Yeom et al., arXiv 1709.01604
    calibrated loss      l_j(W_0) - l_j(W*)       Watson et al., arXiv 2111.08440, with the base as the reference
    gradient             <g_j, W_0 - W*>          Morris et al. (SELECT), arXiv 2506.15553
    classifier gradient  the same over the classifier alone

l_j is the cross entropy of row j, the mean over its predictions, and g_j its gradient at the base. W* is the model, W_0
the base, D = W* - W_0. A higher score says "member".

The gradient's score is a directional derivative, so the gradients themselves are never computed:

    <g_j, W_0 - W*> = -d/dt l_j(W_0 + t D) at t = 0  ~  (l_j(W_0) - l_j(W_0 + s D)) / s

takes one forward pass of any architecture beside the base's, over all layers and without a projection. A classifier's
gradient is g_j = e_j f_j^T with e_j = softmax - onehot and f_j the classifier's input, which the base's pass gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from client.audit.statistics import Scores
from client.data.rows import Batch, Rows, judged
from client.measurement.gram import layer_inputs
from client.progress import with_bar
from common.agreement import Task
from common.models.layers import Layer, merge_layers

PREDICTIONS_AT_ONCE = 256  # in float64: a vocabulary may be large
HIGHEST_LOSS = 1e6  # in place of one that is infinite or not a number
# s: the error of the difference is s / 2 times a second derivative, that of rounding about 1e-7 / s. On MiniLM that was
# fine-tuned for three epochs, a row's score is off by less than a twentieth of the scores' standard deviation.
STEP = 1 / 512


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What one model does with each row: `losses` (rows,), and the share of right predictions, `hits` (rows,)."""

    losses: Scores
    hits: Scores


@dataclass(frozen=True, kw_only=True)
class ClassifierGradients:
    """Row j's gradient of the classifier `layer` is the outer product of `errors[j]` (labels,) and `inputs[j]` (d_in,).

    If the layer has a bias, `inputs` end with a constant 1. `said`: what the base does with the rows.
    """

    layer: Layer
    errors: Tensor
    inputs: Tensor
    said: Predictions

    def scores(self, delta: Mapping[str, Tensor]) -> Scores:
        """(rows,): <g_j, W_0 - W*> over the classifier."""
        change = self.layer.take(delta)  # (d_in, labels), the bias last
        found: Scores = -((self.inputs @ change) * self.errors).sum(dim=1).double().numpy()
        return found


def _batches(rows: Rows, batch_size: int, description: str) -> Iterator[tuple[NDArray[np.int64], Batch, Tensor]]:
    """Every batch of the rows, with a bar."""
    return with_bar(rows.batches(batch_size), description, sum(1 for _ in rows.batch_indices(batch_size)))


@torch.inference_mode()
def predict(model: PreTrainedModel, rows: Rows, batch_size: int, description: str) -> Predictions:
    """The losses of `model`, and how often it is right. Each logit is looked at in its batch, and then forgotten."""
    model.eval()
    losses, hits = np.empty(len(rows)), np.empty(len(rows))
    for indices, batch, targets in _batches(rows, batch_size, description):
        logits = model(**batch).logits.float()
        is_judged = judged(targets)
        row_of = torch.arange(len(targets)).reshape(-1, *[1] * (targets.ndim - 1)).expand_as(targets)[is_judged]
        each = _cross_entropy(logits[is_judged], targets[is_judged])
        right = (logits[is_judged].argmax(-1) == targets[is_judged]).double()
        count = torch.bincount(row_of, minlength=len(targets))
        for found, kept in ((each, losses), (right, hits)):
            kept[indices] = (
                torch.zeros(len(targets), dtype=torch.float64).index_add_(0, row_of, found) / count
            ).numpy()
    return Predictions(losses=losses, hits=hits)


@torch.inference_mode()
def losses_by_label(model: PreTrainedModel, rows: Rows, batch_size: int, description: str) -> Scores:
    """(rows, labels): the loss that each row would have with each label, for one prediction a row."""
    model.eval()
    found: list[Scores] = [np.empty(0)] * len(rows)
    for indices, batch, _ in _batches(rows, batch_size, description):
        losses = -model(**batch).logits.double().log_softmax(-1).numpy()
        for index, each in zip(indices, losses, strict=True):
            found[index] = each
    return np.array(found)


def gradient_scores(
    base: PreTrainedModel,
    delta: Mapping[str, Tensor],
    rows: Rows,
    batch_size: int,
    description: str,
    base_losses: Scores | None = None,
) -> Scores:
    """(rows,): <g_j, W_0 - W*> over all parameters; `base` is as before afterwards. `delta`: W* - W_0 by name.

    `base_losses`: the base's losses, if they are known.
    """
    if base_losses is None:
        base_losses = predict(base, rows, batch_size, description).losses
    start = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    _move(base, {name: start[name] + STEP * delta[name] for name in start})
    moved = predict(base, rows, batch_size, description).losses
    _move(base, start)
    return (base_losses - moved) / STEP


@torch.no_grad()
def _move(model: PreTrainedModel, to: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(to[name])


@torch.inference_mode()
def classifier_gradients(
    base: PreTrainedModel, rows: Rows, targets: NDArray[np.int64], task: Task, batch_size: int, description: str
) -> ClassifierGradients | None:
    """The gradients at the base, for the labels `targets`. None unless the model ends in one classifier that is fed one
    row per prediction.
    """
    layer = _classifier(base, task)
    if layer is None:
        return None
    errors = torch.empty(len(rows), len(task.labels))
    inputs = torch.empty(len(rows), layer.d_in)
    losses, hits = np.empty(len(rows)), np.empty(len(rows))
    seen: list[Tensor] = []
    with layer_inputs(base, lambda _, fed: seen.append(fed.rows), {layer.weight}):
        for indices, batch, _ in _batches(rows, batch_size, description):
            seen.clear()
            logits = base(**batch).logits.float()
            if [each.shape for each in seen] != [(len(indices), layer.d_in)]:
                return None
            wanted = torch.from_numpy(targets[indices])
            one_hot = torch.nn.functional.one_hot(wanted, len(task.labels))
            errors[indices], inputs[indices] = logits.softmax(-1) - one_hot, seen[0]
            losses[indices] = _cross_entropy(logits, wanted).numpy()
            hits[indices] = (logits.argmax(-1) == wanted).double().numpy()
    if layer.bias is not None:
        inputs = torch.cat([inputs, torch.ones(len(rows), 1)], dim=1)
    said = Predictions(losses=losses, hits=hits)
    return ClassifierGradients(layer=layer, errors=errors, inputs=inputs, said=said)


def _classifier(base: PreTrainedModel, task: Task) -> Layer | None:
    if not task.has_labels or task.judges_tokens:
        return None
    body = f"{base.base_model_prefix}."
    found = [
        layer
        for name, layer in merge_layers(base).items()
        if not name.startswith(body) and layer.d_out == len(task.labels)
    ]
    if len(found) != 1:
        return None
    (layer,) = found
    bias = f"{layer.weight.removesuffix('.weight')}.bias"
    has_bias = bias in dict(base.named_parameters())
    return Layer(
        weight=layer.weight,
        d_in=layer.d_in,
        d_out=layer.d_out,
        stored_input_first=layer.stored_input_first,
        bias=bias if has_bias else None,
    )


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """(predictions,) float64 nats; in float32, the small losses of rows that are known well would be ties."""
    parts = zip(logits.split(PREDICTIONS_AT_ONCE), targets.split(PREDICTIONS_AT_ONCE), strict=True)
    each = [torch.nn.functional.cross_entropy(part.double(), wanted, reduction="none") for part, wanted in parts]
    return torch.cat(each).nan_to_num(nan=HIGHEST_LOSS, posinf=HIGHEST_LOSS)
