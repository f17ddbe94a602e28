"""Fine-tune the base model on an owner's own rows, for an owner that brings no model.

A loop of our own rather than `transformers.Trainer`, whose import takes longer than most of what is trained here, and
which writes folders and reads the environment. Optimiser, schedule and LoRA come from the libraries.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from client.data.rows import Rows, judged
from client.measurement.losses import loss_of
from client.measurement.passes import ON_CPU, Halving, Passes
from client.measurement.placement import placed
from client.progress import with_bar
from client.settings import Training
from common.errors import NumericalError, SettingsError
from common.models.layers import linear_layers

LORA_SCALE = 2.0  # alpha / rank, as most people set it


def fine_tune(
    model: PreTrainedModel,
    rows: Rows,
    training: Training,
    seed: int,
    description: str,
    validation: Rows | None = None,
    passes: Passes = ON_CPU,
) -> None:
    """Train `model` in place with AdamW. A seed gives the same weights each time on one machine.

    In bfloat16, passes round; weights and the optimiser's state stay float32. All of the model must fit on the device.

    `validation`: what `training.patience` judges epochs by; without it, all epochs are trained.
    """
    # An accelerator's generator need not be put back, since nothing else draws from it.
    with torch.random.fork_rng(devices=[]), placed(model, passes.device, trains=True):
        torch.manual_seed(seed)  # dropout, and LoRA's first factors
        with low_rank(model, training):
            _train(model, rows, training, seed, description, validation, passes)
    model.eval()


def _train(
    model: PreTrainedModel,
    rows: Rows,
    training: Training,
    seed: int,
    description: str,
    validation: Rows | None,
    passes: Passes,
) -> None:
    random = np.random.default_rng(seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=training.weight_decay, fused=True)
    steps_per_epoch = -(-len(rows) // training.batch_size)
    steps = training.epochs * steps_per_epoch
    rates = rates_of(optimizer, training, steps)
    halving, judging = Halving(training.batch_size, parts=training.accumulation), Halving(training.batch_size)
    best: tuple[float, list[Tensor]] | None = None
    epochs_without_gain = 0
    model.train()
    order = np.empty(0, dtype=np.int64)
    for step in with_bar(range(steps), description, steps):
        if len(order) == 0:
            order = random.permutation(len(rows))
        indices, order = order[: training.batch_size], order[training.batch_size :]

        def add_gradients(indices: NDArray[np.int64] = indices) -> None:
            optimizer.zero_grad()
            _add_gradients(model, rows, indices, halving.parts, passes)

        halving.run(add_gradients)
        if training.max_gradient_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, training.max_gradient_norm)
        optimizer.step()
        rates.step()
        if training.patience is None or validation is None or (step + 1) % steps_per_epoch:
            continue
        loss = judging.run(lambda: _mean_loss(model, validation, judging.size, passes))
        if best is None or loss < best[0]:
            best, epochs_without_gain = (loss, [each.detach().clone() for each in trained]), 0
        else:
            epochs_without_gain += 1
        if epochs_without_gain == training.patience:
            break
    if best is not None:
        with torch.no_grad():
            for parameter, kept in zip(trained, best[1], strict=True):
                parameter.copy_(kept)


def rates_of(optimizer: torch.optim.Optimizer, training: Training, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate of each step."""
    from transformers import get_scheduler  # imports peft: not in a process that trains nothing

    kind = "linear" if training.schedule == "linear" else "constant_with_warmup"
    warm_up = round(training.warmup * steps)
    rates: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
        kind, optimizer, num_warmup_steps=warm_up, num_training_steps=steps
    )
    return rates


def _add_gradients(model: PreTrainedModel, rows: Rows, indices: NDArray[np.int64], parts: int, passes: Passes) -> None:
    """The gradient of the mean loss over the predictions of these rows, a part of them at a time."""
    batches = [rows.batch(part) for part in np.array_split(indices, min(parts, len(indices)))]
    predictions = sum(int(judged(targets).sum()) for _, targets in batches)
    for batch, targets in batches:
        wanted = judged(targets)
        if not wanted.any():
            continue
        with passes.computing():
            logits = model(**passes.inputs(batch)).logits.float()[passes.moved(wanted)]
        loss = loss_of(model, logits, passes.moved(targets[wanted]))
        loss = loss * (int(wanted.sum()) / predictions)
        if not torch.isfinite(loss):
            raise NumericalError(f"fine-tuning: the loss became {loss.item()}", hint="lower training.learning_rate")
        loss.backward()


@torch.no_grad()
def _mean_loss(model: PreTrainedModel, rows: Rows, batch_size: int, passes: Passes) -> float:
    """The mean loss of a prediction."""
    model.eval()
    loss, predictions = 0.0, 0
    for _, batch, targets in rows.batches(batch_size):
        kept = judged(targets)
        with passes.computing():
            logits = model(**passes.inputs(batch)).logits.float()[passes.moved(kept)]
        loss += float(loss_of(model, logits, passes.moved(targets[kept]), reduction="sum"))
        predictions += int(kept.sum())
    model.train()
    return loss / max(predictions, 1)


@contextmanager
def low_rank(model: PreTrainedModel, training: Training) -> Iterator[None]:
    """Within, what is trained is LoRA factors of the body's linear layers, and the head; afterwards, they are weights.
    Without a rank, nothing is changed.

    Only parameters that required a gradient before can change.
    """
    rank, names = training.lora_rank, training.lora_layers
    if rank is None:
        yield
        return
    from peft import LoraConfig, LoraModel

    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    body = f"{model.base_model_prefix}."
    layers = [
        name
        for name in linear_layers(model)
        if name.startswith(body) and required[f"{name}.weight"] and (not names or name.rpartition(".")[2] in names)
    ]
    if not layers:
        raise SettingsError(
            f"training: no linear layer that the agreement merges is named {' or '.join(names) or 'anything'}",
            hint="correct training.lora_layers",
        )
    with warnings.catch_warnings(action="ignore"):  # about fan_in_fan_out, which peft sets right for each layer
        settings = LoraConfig(r=rank, lora_alpha=LORA_SCALE * rank, target_modules=layers)
        factors = LoraModel(model, settings, "own")
    if training.lora_shared:
        for name, factor in model.named_parameters():
            if ".lora_A." in name:
                factor.requires_grad_(False)
    for name, needed in required.items():
        if needed and not name.startswith(body):
            model.get_parameter(name).requires_grad_(True)
    yield
    factors.merge_and_unload()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(required[name])
