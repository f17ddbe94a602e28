"""Fine-tune the base model so that what it reveals of any one unit, a row or all rows of one person, is bounded: DP-SGD
(Abadi et al., CCS 2016, arXiv 1607.00133, algorithm 1).

    every step:  draw each unit with probability q, with secret randomness
                 g_u = the gradient of the unit's loss, cut to a 2-norm of at most C
                 g   = (sum of g_u + Gaussian noise with standard deviation sigma C) / (q * units)

sigma follows from epsilon, delta, q and the number of steps, by Opacus' accountant (Renyi differential privacy of the
sampled Gaussian mechanism: Mironov, Talwar and Zhang 2019, arXiv 1908.10530). Opacus also gives each row's gradient.
Drawing, cutting and noise are here, since the claim rests on them: noise and draws come from the operating system's
randomness, never from a seed (common/privacy/noise.py), and noise is added in float64 before the sum is rounded.

A unit's gradient is hidden, and how many units there are is not: the claim compares a unit with one that has no
gradient. Embeddings are not trained: their noise would fall on every word of the vocabulary, each of which few rows
hold.

The noise of a step is about sigma C sqrt(parameters) long, and the sum that it hides at most C * q * units. So with few
rows, few parameters should be trained. Where the agreement merges the classifier alone, its inputs never change: each
row passes through the body once, alone, and what is trained is a linear layer.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from client.data.rows import IGNORED, Rows
from client.measurement.fine_tuning import low_rank, rates_of
from client.measurement.forgetting import FoundModel
from client.measurement.gram import layer_inputs
from client.measurement.losses import loss_of
from client.progress import with_bar
from client.settings import Training
from common.errors import ModelError, NumericalError, SettingsError, first_line
from common.models.layers import linear_layers
from common.privacy import noise

if TYPE_CHECKING:
    from opacus.grad_sample import GradSampleHooks

log = logging.getLogger("amalgram.owner")
LARGEST_SIGMA = 2.0**20
MAX_NORM = 1.0  # C, if the owner's settings name none
MUCH_NOISE = 2.0  # times the longest sum of gradients: with more, little is learned
CLOSE = 1e-3  # how near Opacus' gradient of a row must be to the row's own, relative to its norm


@lru_cache(maxsize=16)  # the accountant takes seconds for some of its searches
def noise_multiplier(epsilon: float, delta: float, sample_rate: float, steps: int, beside: float = 0.0) -> float:
    """sigma: the noise's standard deviation in units of C, to within a thousandth; large enough for what is released
    `beside` the model, too: Gaussian sums with this mu together. Raises SettingsError if no noise is enough.
    """
    low, high = 0.0, 1.0
    while epsilon_of_training(high, delta, sample_rate, steps, beside) > epsilon:
        low, high = high, 2 * high
        if high > LARGEST_SIGMA:
            raise SettingsError(
                f"training: epsilon = {epsilon:g} cannot be kept over {steps} steps, with "
                f"{epsilon_of_training(high, delta, sample_rate, steps, beside):.3g} of it for sums with noise",
                hint="train fewer epochs, lower a share in [privacy.legs], or agree on a larger privacy.epsilon",
            )
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        within = middle > 0 and epsilon_of_training(middle, delta, sample_rate, steps, beside) <= epsilon
        low, high = (low, middle) if within else (middle, high)
    return high


def epsilon_of_training(sigma: float, delta: float, sample_rate: float, steps: int, beside: float) -> float:
    """By Opacus' accountant. A Gaussian sum is one step over all units with a noise multiplier of 1 / mu."""
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(sigma, sample_rate, steps)]
    if beside:
        accountant.history.append((1 / beside, 1.0, 1))  # check: training-leaves-room-for-the-legs
    with warnings.catch_warnings(action="ignore"):  # that other orders could give less noise
        return float(accountant.get_epsilon(delta))


def fine_tune_privately(
    model: PreTrainedModel,
    rows: Rows,
    units: NDArray[np.int64],
    training: Training,
    epsilon: float,
    delta: float,
    seed: int,
    description: str,
    beside: float = 0.0,
) -> float:
    """Train `model` in place; return sigma. `units`: (rows,) the number of each row's unit, from 0, none left out.
    `beside`: see `noise_multiplier`.

    `seed` decides LoRA's first factors, and neither draws nor noise: no two runs give the same weights. Dropout is off.
    Raises ModelError for a model whose gradients Opacus cannot tell apart by rows.
    """
    members = _members(units)
    steps = training.epochs * -(-len(members) // training.batch_size)
    sample_rate = min(1.0, training.batch_size / len(members))
    sigma = noise_multiplier(epsilon, delta, sample_rate, steps, beside)
    trainable = _trainable(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in trainable)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        alone = _classifier_alone(model, rows, description)
        if alone is not None:
            _train(*alone, members, training, steps, sample_rate, sigma, description)
        else:
            with low_rank(model, training):
                _train(model, rows, members, training, steps, sample_rate, sigma, description)
    model.eval()
    return sigma


def _members(units: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The rows of each unit."""
    order = np.argsort(units, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(units[order])) + 1)


def _trainable(model: nn.Module) -> set[str]:
    """The parameters of linear layers and normalisations, unless an embedding shares them."""
    embedded = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) or type(module).__name__.endswith("Norm")
        for name, parameter in module.named_parameters(recurse=False)
        if id(parameter) not in embedded
    }


class Classifier(nn.Module):
    """A model's last layer as a model of its own. `pixel_values`: the layer's inputs, as `Rows` of arrays call them."""

    def __init__(self, layer: nn.Linear, model: PreTrainedModel) -> None:
        super().__init__()
        self.layer, self.config = layer, model.config

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.layer(pixel_values))


@torch.no_grad()
def _classifier_alone(model: PreTrainedModel, rows: Rows, description: str) -> tuple[Classifier, Rows] | None:
    """The classifier and its inputs, if it is all that is trained and gives one prediction a row; else None."""
    trained = {id(each) for each in model.parameters() if each.requires_grad}
    layers = {
        name: each
        for name, each in linear_layers(model).items()
        if isinstance(each, nn.Linear) and id(each.weight) in trained
    }
    if len(layers) != 1 or not len(rows):
        return None
    ((name, layer),) = layers.items()
    if trained != {id(each) for each in layer.parameters()}:
        return None
    seen: list[Tensor] = []
    inputs = []
    model.eval()
    inputs_of_layer = layer_inputs(model, lambda _, fed: seen.append(fed.rows), {f"{name}.weight"})
    with inputs_of_layer, FoundModel(model).at_every_pass():  # check: cached-rows-leave-nothing-behind
        for _, batch, _ in with_bar(replace(rows, are_apart=True).batches(1), description, len(rows)):
            logits = model(**batch).logits
            if len(seen) != 1 or seen[0].shape != (1, layer.weight.shape[1]):
                return None  # it is called otherwise
            fed = seen.pop()
            given = nn.functional.linear(fed, layer.weight, layer.bias)
            is_last = torch.equal(given.nan_to_num(), logits.nan_to_num())  # check: no-row-decides-what-is-trained
            if not is_last:
                return None
            inputs.append(fed.float().numpy())
    return Classifier(layer, model), Rows(features=np.concatenate(inputs), targets=rows.targets)


def _train(
    model: PreTrainedModel | Classifier,
    rows: Rows,
    members: Sequence[NDArray[np.int64]],
    training: Training,
    steps: int,
    sample_rate: float,
    sigma: float,
    description: str,
) -> None:
    bound = training.max_gradient_norm or MAX_NORM
    at_once = max(1, training.batch_size // training.accumulation)  # rows
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=training.weight_decay, fused=True)
    rates = rates_of(optimizer, training, steps)
    _warn_of_much_noise(sum(each.numel() for each in trained), sigma, sample_rate * len(members))
    with gradients_by_row(model, rows):
        for _ in with_bar(range(steps), description, steps):
            total = noised_sum(model, rows, drawn_units(members, sample_rate), trained, bound, sigma, at_once)
            for parameter, whole in zip(trained, total, strict=True):
                parameter.grad = (whole / (sample_rate * len(members))).to(parameter.dtype)
            optimizer.step()
            rates.step()
    if not all(torch.isfinite(parameter).all() for parameter in trained):
        raise NumericalError("fine-tuning: the weights are not finite", hint="lower training.learning_rate")


def _warn_of_much_noise(parameters: int, sigma: float, drawn: float) -> None:
    """`drawn`: units in a step, in the mean. Their number has no place in a log."""
    if sigma * parameters**0.5 > MUCH_NOISE * drawn:
        log.warning(
            "  in each step, the noise is more than %g times as long as all gradients in it together can be: train on "
            "more rows, in larger batches, or agree on fewer merge.layers, such as the classifier alone",
            MUCH_NOISE,
        )


def drawn_units(members: Sequence[NDArray[np.int64]], sample_rate: float) -> list[NDArray[np.int64]]:
    """The rows of each unit that is drawn: every unit by itself, with this probability, which nobody can foresee."""
    drawn = noise.uniform(len(members)) < sample_rate  # check: units-are-drawn-at-their-rate
    return [unit for unit, is_drawn in zip(members, drawn, strict=True) if is_drawn]


def noised_sum(
    model: PreTrainedModel | Classifier,
    rows: Rows,
    units: Sequence[NDArray[np.int64]],
    trained: Sequence[nn.Parameter],
    bound: float,
    sigma: float,
    at_once: int,
) -> list[Tensor]:
    """The sum of the units' gradients and of the noise, by parameter, float64. `at_once`: rows in a pass."""
    total = [torch.zeros(parameter.shape, dtype=torch.float64) for parameter in trained]
    for part in _parts(units, at_once):
        for whole, gradient in zip(total, clipped_sum(model, rows, part, trained, bound), strict=True):
            whole += gradient
    for whole in total:
        drawn = torch.from_numpy(noise.gaussian(whole.numel(), sigma * bound))
        whole += drawn.reshape(whole.shape)  # check: noise-has-its-size
    return total


def _parts(units: Sequence[NDArray[np.int64]], at_once: int) -> Iterator[list[NDArray[np.int64]]]:
    """Some units after the other, each whole: as many as have at most `at_once` rows, but at least one."""
    part: list[NDArray[np.int64]] = []
    rows = 0
    for unit in units:
        if part and rows + len(unit) > at_once:
            yield part
            part, rows = [], 0
        part.append(unit)
        rows += len(unit)
    if part:
        yield part


def clipped_sum(
    model: PreTrainedModel | Classifier,
    rows: Rows,
    units: Sequence[NDArray[np.int64]],
    trained: Sequence[nn.Parameter],
    bound: float,
) -> list[Tensor]:
    """The sum of the units' gradients, each cut to a 2-norm of at most `bound`, by parameter, float64.

    A unit whose gradient is not finite counts as none.
    """
    if isinstance(model, Classifier) and all(len(unit) == 1 for unit in units):
        return _clipped_sum_of_classifier(model, rows, np.concatenate(list(units)), bound)
    by_row = row_gradients(model, rows, np.concatenate(list(units)), trained)
    unit_of_row = torch.from_numpy(np.repeat(np.arange(len(units)), [len(unit) for unit in units]))
    by_unit = [  # (units, *shape)
        torch.zeros(len(units), *each.shape[1:]).index_add_(0, unit_of_row, each) for each in by_row
    ]
    norms = torch.stack([each.double().flatten(1).norm(dim=1) for each in by_unit]).norm(dim=0)  # (units,)
    factors = torch.where(norms.isfinite(), (bound / norms).clamp(max=1.0), 0.0)  # check: gradients-are-bounded
    return [torch.einsum("u,u...->...", factors, each.double().nan_to_num(0, 0, 0)) for each in by_unit]


def _clipped_sum_of_classifier(model: Classifier, rows: Rows, indices: NDArray[np.int64], bound: float) -> list[Tensor]:
    """The same for units of one row. A row's gradient is e x^T, and e of the bias, with e that of its outputs and x its
    input. So its norm is |e| sqrt(|x|^2 + 1), and no gradient need be computed by itself (Goodfellow, 2015, arXiv
    1510.01799).
    """
    batch, targets = rows.batch(indices)
    inputs, layer = batch["pixel_values"], model.layer
    with torch.no_grad():  # row by row: a product of several rounds otherwise, which crafted inputs make much of
        products = [nn.functional.linear(row[None], layer.weight, layer.bias) for row in inputs]
        logits = torch.cat(products)  # check: rows-are-multiplied-alone
    logits.requires_grad_()
    (errors,) = torch.autograd.grad(loss_of(model, logits, targets, reduction="sum"), logits)  # (rows, outputs)
    inputs, errors = inputs.double(), errors.double()
    norms = errors.norm(dim=1) * (inputs.square().sum(dim=1) + float(layer.bias is not None)).sqrt()
    factors = torch.where(norms.isfinite(), (bound / norms).clamp(max=1.0), 0.0)  # check: inputs-and-errors-are-bounded
    cut = factors[:, None] * errors.nan_to_num(0, 0, 0)
    weight = cut.T @ inputs.nan_to_num(0, 0, 0)
    return [weight] if layer.bias is None else [weight, cut.sum(dim=0)]


# --- the gradient of each row ---


@contextmanager
def gradients_by_row(model: PreTrainedModel | Classifier, rows: Rows) -> Iterator[None]:
    """Within, `row_gradients` works on a model.

    Raises ModelError if Opacus cannot tell rows apart, or finds another gradient than that of a row alone, as where
    layers mix the rows of a batch or share parameters.
    """
    from opacus.grad_sample import GradSampleHooks

    _without_dropout(model)
    try:
        hooks = GradSampleHooks(model, loss_reduction="sum")
    except NotImplementedError as error:
        raise _not_apart(first_line(error)) from None
    try:
        with FoundModel(model).at_every_pass():  # check: training-passes-leave-nothing-behind
            _check_rows_apart(model, rows, hooks)
            yield
    finally:
        hooks.cleanup()


def _without_dropout(model: nn.Module) -> None:
    """Put into training mode only what is trained, since Opacus looks at nothing else, and batch normalisation, which
    mixes rows in this mode alone.

    Dropout draws on, so one row more would change what every later row meets, by far more than the bound.
    """
    model.eval()
    for module in model.modules():
        is_trained = any(each.requires_grad for each in module.parameters(recurse=False))
        module.training = is_trained or isinstance(module, _BatchNorm)  # check: no-row-draws-for-another


def _shortest_and_longest(rows: Rows) -> NDArray[np.int64]:
    lengths = (
        np.ones(len(rows)) if isinstance(rows.features, np.ndarray) else [len(r["input_ids"]) for r in rows.features]
    )
    order = np.argsort(lengths, kind="stable")
    return np.unique(order[[0, -1]])


def _check_rows_apart(model: PreTrainedModel | Classifier, rows: Rows, hooks: GradSampleHooks) -> None:
    """Compare the gradients of a short and a long row, which is padding for the other, with those of each alone."""
    two = _shortest_and_longest(rows)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        found = row_gradients(model, rows, two, trained)
        hooks.disable_hooks()
        for place, row in enumerate(two):
            _add_gradients(model, rows, np.array([row]))
            alone = [torch.zeros_like(each) if each.grad is None else each.grad for each in trained]
            size = torch.stack([each.norm() for each in alone]).norm()
            error = torch.stack([(a[place] - b).norm() for a, b in zip(found, alone, strict=True)]).norm()
            if not error <= CLOSE * size:  # check: rows-are-told-apart
                raise _not_apart("its layers mix the rows of a batch, or share their weights")
            model.zero_grad()
    except (RuntimeError, ValueError, AttributeError, IndexError) as error:  # of Opacus, at layers it does not know
        raise _not_apart(first_line(error)) from None
    finally:
        hooks.enable_hooks()


def _not_apart(reason: str) -> ModelError:
    return ModelError(
        f"training: the gradients of single rows cannot be computed for this model: {reason}",
        hint="train with lora_rank, or agree on a base of linear layers and layer normalisations",
    )


def row_gradients(
    model: PreTrainedModel | Classifier, rows: Rows, indices: NDArray[np.int64], trained: Sequence[nn.Parameter]
) -> list[Tensor]:
    """The gradient of each of these rows' loss, by parameter: (rows, *shape) float32."""
    _add_gradients(model, rows, indices)
    found = []
    for parameter in trained:
        gradient = getattr(parameter, "grad_sample", None)
        found.append(torch.zeros(len(indices), *parameter.shape) if gradient is None else gradient.detach())
        parameter.grad_sample, parameter.grad = None, None  # type: ignore[attr-defined]
    return found


def _add_gradients(model: PreTrainedModel | Classifier, rows: Rows, indices: NDArray[np.int64]) -> None:
    """The gradients of the sum over rows of a row's mean loss of a prediction."""
    batch, targets = rows.batch(indices)
    logits = model(**batch).logits
    if targets.ndim == 1 or targets.is_floating_point():
        loss = loss_of(model, logits, targets, reduction="sum")
    else:  # (rows, positions)
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED
        )
        loss = (losses.sum(dim=1) / (targets != IGNORED).sum(dim=1).clamp(min=1)).sum()
    with warnings.catch_warnings(action="ignore"):  # torch's, that a layer's input needs no gradient
        loss.backward()
