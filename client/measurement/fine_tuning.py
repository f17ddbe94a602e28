"""Fine-tune the base model on an owner's own rows, for an owner that brings no model."""

import numpy as np
import torch
from rich import get_console
from rich.progress import track
from transformers import PreTrainedModel

from client.data.rows import IGNORED, Rows
from client.settings import Training
from common.errors import NumericalError


def fine_tune(model: PreTrainedModel, rows: Rows, training: Training, seed: int, description: str) -> None:
    """Train `model` in place with AdamW at a constant rate. A seed gives the same weights each time on one machine."""
    random = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, fused=True
    )
    batches_per_epoch = -(-len(rows) // training.batch_size)
    console = get_console()  # commands have it write to standard error; a script that asks for no bar has not
    progress = track(
        range(training.epochs * batches_per_epoch),
        description=description,
        console=console,
        disable=not (console.stderr and console.is_terminal),
        transient=True,
    )
    model.train()
    order = np.empty(0, dtype=np.int64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # dropout
        for _ in progress:
            if len(order) == 0:
                order = random.permutation(len(rows))
            indices, order = order[: training.batch_size], order[training.batch_size :]
            batch, targets = rows.batch(indices)
            judged = targets != IGNORED
            loss = torch.nn.functional.cross_entropy(model(**batch).logits[judged], targets[judged])
            if not torch.isfinite(loss):
                raise NumericalError(f"fine-tuning: the loss became {loss.item()}", hint="lower training.learning_rate")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
