"""References to hold a merge against, which need every owner's model and rows in one place: in simulation only.

own          each owner's own model on every owner's test rows, averaged: what sharing nothing gives
ensemble     the mean of the own models' probabilities: N models to run instead of one
multi_task   the base fine-tuned on all owners' pooled rows: what pooling the data would give
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from client import evaluate, finetune
from client.owner import Owner
from client.private_data import Rows
from common.metrics import Score


def reference_scores(owners: Sequence[Owner]) -> dict[str, dict[str, Score]]:
    """Scores by model and owner. `multi_task` only where all owners make their models from one recipe."""
    tests = {owner.name: owner.data.test() for owner in owners}
    labels = {owner.name: owner.data.label_set() for owner in owners}
    own: dict[str, list[Score]] = {name: [] for name in tests}
    probabilities = {
        name: np.zeros((len(rows), len(owners[0].agreement.task.labels)), np.float32) for name, rows in tests.items()
    }
    for owner in owners:
        model = owner.own_model()
        for name, rows in tests.items():
            logits = evaluate.predict_logits(model, rows, owner.settings.batch_size)
            own[name].append(evaluate.score_logits(logits, rows.labels, labels[name]))
            probabilities[name] += torch.from_numpy(logits).softmax(-1).numpy()
    scores = {
        "own": {name: _mean(own[name]) for name in tests},
        "ensemble": {
            name: evaluate.score_logits(probabilities[name], rows.labels, labels[name]) for name, rows in tests.items()
        },
    }
    recipes = {owner.settings.training for owner in owners}
    if len(recipes) == 1 and None not in recipes:
        scores["multi_task"] = _multi_task(owners)
    return scores


def mean_figures(scores: Mapping[str, Score]) -> dict[str, float]:
    """Means over owners, in the form that report.json has for every model."""
    rows = sum(score.rows for score in scores.values())
    return {
        "accuracy": float(np.mean([score.correct / score.rows for score in scores.values()])),
        "macro_f1": float(np.mean([score.macro_f1 for score in scores.values()])),
        "pooled_accuracy": sum(score.correct for score in scores.values()) / rows,
        "rows": rows,
    }


def _mean(scores: Sequence[Score]) -> Score:
    """Several models on the same rows: all of them together, as one score of that many times the rows."""
    return Score(
        correct=sum(score.correct for score in scores),
        rows=sum(score.rows for score in scores),
        macro_f1=float(np.mean([score.macro_f1 for score in scores])),
    )


def _multi_task(owners: Sequence[Owner]) -> dict[str, Score]:
    first = owners[0]
    training = first.settings.training
    assert training is not None  # the caller looked
    model = first.load_base()
    pooled = _pool([owner.data.train() for owner in owners])
    finetune.fine_tune(model, pooled, training, first.agreement.seed, "reference: multi-task training")
    return {owner.name: owner.score(model, "test") for owner in owners}


def _pool(parts: Sequence[Rows]) -> Rows:
    labels = np.concatenate([rows.labels for rows in parts])
    if isinstance(parts[0].features, np.ndarray):
        return Rows(features=np.concatenate([rows.features for rows in parts]), labels=labels)
    features = tuple(row for rows in parts for row in rows.features)
    return Rows(features=features, labels=labels, tokenizer=parts[0].tokenizer)
