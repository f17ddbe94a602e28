"""How well a model does on an owner's held-out examples."""

import hashlib
import math

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from client.data.rows import IGNORED, Rows
from client.measurement.passes import ON_CPU, Passes
from common.agreement import Task
from common.metrics import MAX_NATS, Score

Entity = tuple[int, int, int, str]  # row, first word, word after the last, type


def evaluate(
    model: PreTrainedModel,
    rows: Rows,
    batch_size: int,
    task: Task,
    allowed: NDArray[np.int64],
    passes: Passes = ON_CPU,
) -> Score:
    """The score of one model on one split, by the task's metric."""
    if not task.has_labels:
        with passes.running(model):
            return _score_next_tokens(model, rows, batch_size, passes)
    return score_logits(predict_logits(model, rows, batch_size, passes), rows, task, allowed)


@torch.inference_mode()
def predict_logits(model: PreTrainedModel, rows: Rows, batch_size: int, passes: Passes = ON_CPU) -> NDArray[np.float32]:
    """(predictions, labels) float32, in the order of the examples and of the judged positions within each."""
    model.eval()
    found: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(rows)
    with passes.running(model):
        for indices, batch, targets in rows.batches(batch_size):
            predicted = model(**passes.inputs(batch)).logits.float().cpu()
            for index, logits, wanted in zip(indices, predicted, targets, strict=True):
                found[index] = logits[wanted != IGNORED].numpy() if wanted.ndim else logits[None].numpy()
    return np.concatenate(found)


def score_logits(logits: NDArray[np.float32], rows: Rows, task: Task, allowed: NDArray[np.int64]) -> Score:
    """Judge predictions among the `allowed` labels. Macro F1 is the mean over the labels that occur in the examples."""
    predicted = allowed[logits[:, allowed].argmax(axis=1)]
    targets = np.concatenate([np.atleast_1d(target) for target in rows.targets])
    targets = targets[targets != IGNORED]
    if task.kind == "token-classification":
        words = [int((target != IGNORED).sum()) for target in rows.targets]
        metric = _entity_f1(_entities(targets, words, task.labels), _entities(predicted, words, task.labels))
    else:
        metric = _macro_f1(targets, predicted)
    return Score(correct=int((predicted == targets).sum()), rows=len(targets), metric=metric)


@torch.inference_mode()
def _score_next_tokens(model: PreTrainedModel, rows: Rows, batch_size: int, passes: Passes) -> Score:
    """Judge one batch at a time, because the logits of all examples over a whole vocabulary would fill any memory.

    Each token's nats are clipped, and their sum is rounded to a whole multiple of the clip. So whatever a crafted
    candidate gives one token, the sum is one of two neighbours: at most one bit about it. The sum is rounded up or down
    at random, so that its expectation stays; whoever does not know all rows cannot know how.
    """
    model.eval()
    known_here = hashlib.sha256(b"".join(np.asarray(each).tobytes() for each in rows.targets)).digest()
    chance = torch.Generator().manual_seed(int.from_bytes(known_here[:7]))
    correct, count, nats = 0, 0, 0.0
    for _, batch, targets in rows.batches(batch_size):
        targets = passes.moved(targets)
        judged = targets != IGNORED
        logits, wanted = model(**passes.inputs(batch)).logits[judged].float(), targets[judged]
        correct += int((logits.argmax(-1) == wanted).sum())  # of (predictions, vocabulary)
        count += len(wanted)
        each = torch.nn.functional.cross_entropy(logits, wanted, reduction="none").nan_to_num(nan=MAX_NATS)
        each = each.clamp(max=MAX_NATS)  # check: likelihoods-are-clipped
        nats += float(each.cpu().double().sum())
    up_or_down = float(torch.rand(1, generator=chance))
    nats = MAX_NATS * math.floor(nats / MAX_NATS + up_or_down)  # check: likelihoods-are-rounded
    return Score(correct=correct, rows=max(count, 1), metric=-nats / max(count, 1))


def _macro_f1(targets: NDArray[np.int64], predicted: NDArray[np.int64]) -> float:
    """The mean over the labels in `targets` of 2 TP / (2 TP + FP + FN): what is right, over half of what is either."""
    num_labels = int(max(targets.max(initial=-1), predicted.max(initial=-1))) + 1
    right, wanted, found = (
        np.bincount(each, minlength=num_labels) for each in (targets[targets == predicted], targets, predicted)
    )
    occurs = wanted > 0
    return float(np.mean(2 * right[occurs] / (wanted + found)[occurs]))


def _entity_f1(wanted: set[Entity], found: set[Entity]) -> float:
    """F1 over whole entities (Tjong Kim Sang and De Meulder, CoNLL 2003): the same words and the same type."""
    return 2 * len(wanted & found) / (len(wanted) + len(found)) if wanted or found else 1.0


def _entities(tags: NDArray[np.int64], words: list[int], labels: tuple[str, ...]) -> set[Entity]:
    """Runs of B-X, I-X, ... As in CoNLL's own script, a new type begins an entity, and so does an I-X after O."""
    entities: set[Entity] = set()
    position = 0
    for row, count in enumerate(words):
        start, kind = 0, ""
        for word in range(count + 1):
            tag = labels[tags[position + word]] if word < count else "O"
            prefix, _, of_type = tag.partition("-")
            of_type = "" if tag == "O" else of_type or prefix
            if kind and (of_type != kind or prefix == "B"):
                entities.add((row, start, word, kind))
                kind = ""
            if of_type and not kind:
                start, kind = word, of_type
        position += count
    return entities
