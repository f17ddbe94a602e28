"""How well a model does on an owner's held-out examples."""

import hashlib
import math

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from client.data.rows import IGNORED, Rows, judged
from client.measurement.passes import ON_CPU, Passes
from common.agreement import Task
from common.metrics import MAX_NATS, STEP, Score, regression_score

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


def bounded_sums(
    model: PreTrainedModel, rows: Rows, batch_size: int, task: Task, passes: Passes = ON_CPU
) -> NDArray[np.float64]:
    """Sums over examples, to which noise will be added: (metrics.noised_size,), in the order that metrics.py gives.

    No example adds more than legs.example_norm, in 2-norm, whatever the model says about it. All labels are allowed.
    """
    if not task.has_labels:
        with passes.running(model):
            return _bounded_likelihoods(model, rows, batch_size, passes)
    logits = predict_logits(model, rows, batch_size, passes)
    if task.is_regression:
        moments: NDArray[np.float64] = _moments(logits, np.asarray(rows.targets), task).sum(axis=0)
        return moments.reshape(-1)
    if task.has_several_labels:
        found, wanted = logits > 0, np.asarray(rows.targets, np.float64) > 0  # (rows, labels)
        right = (found == wanted).all(axis=1).sum()
    elif task.kind == "token-classification":
        return _bounded_tags(logits, rows, task.labels)
    else:
        one_hot = np.eye(len(task.labels), dtype=bool)
        found, wanted = one_hot[logits.argmax(axis=1)], one_hot[np.asarray(rows.targets)]
        right = (found & wanted).sum()
    counts = np.stack([(found & wanted).sum(axis=0), wanted.sum(axis=0), found.sum(axis=0)], axis=1)  # (labels, 3)
    return np.concatenate([[right], counts.reshape(-1)]).astype(np.float64)


def _bounded_tags(logits: NDArray[np.float32], rows: Rows, labels: tuple[str, ...]) -> NDArray[np.float64]:
    """Example by example: its share of right tags, and its entities over the most that it has or is given."""
    sums, start, predicted = np.zeros(4), 0, logits.argmax(axis=1)
    for target in rows.targets:
        kept = np.asarray(target)[np.asarray(target) != IGNORED]
        given = predicted[start : start + len(kept)]
        start += len(kept)
        wanted, found = (_entities(each, [len(kept)], labels) for each in (kept, given))
        most = max(len(wanted), len(found), 1)
        entities = np.array([len(wanted & found), len(wanted), len(found)]) / most
        sums += [(kept == given).mean() if len(kept) else 0.0, *entities]
    return sums


@torch.inference_mode()
def _bounded_likelihoods(model: PreTrainedModel, rows: Rows, batch_size: int, passes: Passes) -> NDArray[np.float64]:
    """Example by example: its share of right tokens, and its mean nats, clipped, as a share of MAX_NATS."""
    model.eval()
    sums = np.zeros(2)
    for _, batch, targets in rows.batches(batch_size):
        targets = passes.moved(targets)
        for logits, wanted in zip(model(**passes.inputs(batch)).logits.float(), targets, strict=True):
            is_judged = judged(wanted)
            if is_judged.any():
                each = torch.nn.functional.cross_entropy(logits[is_judged], wanted[is_judged], reduction="none")
                nats = each.nan_to_num(nan=MAX_NATS).clamp(0, MAX_NATS)
                right = logits[is_judged].argmax(-1) == wanted[is_judged]
                sums += [float(right.double().mean()), float(nats.double().mean()) / MAX_NATS]
    return sums


@torch.inference_mode()
def predict_logits(model: PreTrainedModel, rows: Rows, batch_size: int, passes: Passes = ON_CPU) -> NDArray[np.float32]:
    """(predictions, labels) float32, in the order of the examples and of the judged positions within each."""
    model.eval()
    found: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(rows)
    with passes.running(model):
        for indices, batch, targets in rows.batches(batch_size):
            predicted, wanted = model(**passes.inputs(batch)).logits.float().cpu(), judged(targets)
            for index, logits, kept in zip(indices, predicted, wanted, strict=True):
                found[index] = logits[kept].numpy() if kept.ndim else logits[None].numpy()
    return np.concatenate(found)


def score_logits(logits: NDArray[np.float32], rows: Rows, task: Task, allowed: NDArray[np.int64]) -> Score:
    """Judge predictions among the `allowed` labels. Macro F1 is the mean over the labels that occur in the examples."""
    if task.is_regression:
        return _score_numbers(logits, np.asarray(rows.targets), task)
    if task.has_several_labels:
        return _score_label_sets(logits, np.asarray(rows.targets), task, allowed)
    predicted = allowed[logits[:, allowed].argmax(axis=1)]
    targets = np.concatenate([np.atleast_1d(target) for target in rows.targets])
    targets = targets[targets != IGNORED]
    if task.kind == "token-classification":
        words = [int((target != IGNORED).sum()) for target in rows.targets]
        metric = _entity_f1(_entities(targets, words, task.labels), _entities(predicted, words, task.labels))
    else:
        metric = _macro_f1(targets, predicted)
    return Score(correct=int((predicted == targets).sum()), rows=len(targets), metric=metric)


def right_rows(logits: NDArray[np.float32], rows: Rows, task: Task, allowed: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which rows a classifier of whole rows gets right, (rows,): those that `score_logits` counts as correct."""
    if task.has_several_labels:
        wanted = np.asarray(rows.targets, np.float32) > 0
        return np.asarray((_given(logits, allowed) == wanted).all(axis=1))
    return np.asarray(allowed[logits[:, allowed].argmax(axis=1)] == np.asarray(rows.targets))


def _given(logits: NDArray[np.float32], allowed: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Several labels a row: those whose output is above 0, where a sigmoid is a half; (rows, labels)."""
    return np.asarray((logits > 0) & np.isin(np.arange(logits.shape[1]), allowed))


def _score_label_sets(
    logits: NDArray[np.float32], targets: NDArray[np.float32], task: Task, allowed: NDArray[np.int64]
) -> Score:
    """Several labels a row. Both arrays: (rows, labels)."""
    found, wanted = _given(logits, allowed), targets > 0
    counts = np.stack([(found & wanted).sum(axis=0), wanted.sum(axis=0), found.sum(axis=0)], axis=1)  # (labels, 3)
    occurs = counts[counts[:, 1] > 0]
    return Score(
        correct=int((found == wanted).all(axis=1).sum()),
        rows=len(targets),
        metric=float(np.mean(2 * occurs[:, 0] / (occurs[:, 1] + occurs[:, 2]))) if len(occurs) else 1.0,
        sums=tuple(tuple(map(float, each)) for each in counts) if task.sums_per_output else (),
    )


def _score_numbers(logits: NDArray[np.float32], targets: NDArray[np.float32], task: Task) -> Score:
    """Numbers, on a scale from 0 to 1 over the agreed range. Both arrays: (rows, targets).

    Each sum over rows is rounded to a multiple of STEP, up or down at random, so that its expectation stays. Whatever
    numbers a crafted candidate gives one row, each sum is one of 1 / STEP + 1: at most about six bits about that row.
    """
    terms = _moments(logits, targets, task)
    known_here = hashlib.sha256(targets.tobytes()).digest()
    up_or_down = np.random.default_rng(int.from_bytes(known_here)).random(terms.shape[1:])
    sums = STEP * np.floor(terms.sum(axis=0) / STEP + up_or_down)  # check: moments-are-rounded
    return regression_score(sums, len(targets), task)


def _moments(logits: NDArray[np.float32], targets: NDArray[np.float32], task: Task) -> NDArray[np.float64]:
    """Prediction, target, their squares and squared difference, from 0 to 1: (rows, targets, 5)."""
    lowest, span = task.lowest_and_span
    middle = lowest + span / 2  # for whatever is not a number
    wanted = (targets.astype(np.float64) - lowest) / span
    found = (np.nan_to_num(logits.astype(np.float64), nan=middle) - lowest) / span
    found, wanted = (np.clip(each, 0.0, 1.0) for each in (found, wanted))  # check: predictions-are-clipped
    return np.stack([found, wanted, found**2, wanted**2, (found - wanted) ** 2], axis=2)


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
        is_judged = judged(targets)
        logits, wanted = model(**passes.inputs(batch)).logits[is_judged].float(), targets[is_judged]
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
