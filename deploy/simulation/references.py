"""References to hold a merge against, which need every owner's model and rows in one place: in simulation only.

own          each owner's own model on every owner's test rows, averaged: what sharing nothing gives
ensemble     the mean of the own models' probabilities: N models to run instead of one
multi_task   the base fine-tuned on all owners' pooled rows: what pooling the data would give
"""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from client.data.rows import pool
from client.measurement.evaluation import evaluate, predict_logits, score_logits
from client.owner import Owner
from common.metrics import MeanScore, Score


def reference_scores(owners: Sequence[Owner]) -> dict[str, MeanScore]:
    """Scores by model. `ensemble` only of models with labels, whose probabilities fit in memory; `multi_task`
    only where all owners make their models from one recipe; none of them where heads are private.
    """
    if owners[0].agreement.task.head == "private":
        return {}  # no model has a head for another owner's rows
    scores = _own_and_ensemble(owners)
    recipes = {owner.settings.training for owner in owners}
    if len(recipes) == 1 and None not in recipes:
        scores["multi_task"] = _multi_task(owners)
    return {model: _over_owners(by_owner) for model, by_owner in scores.items()}


def _own_and_ensemble(owners: Sequence[Owner]) -> dict[str, dict[str, Score]]:
    task = owners[0].agreement.task
    tests = {owner.name: owner.workbench.data.test() for owner in owners}
    labels = {owner.name: owner.workbench.data.label_set() for owner in owners}
    own: dict[str, list[Score]] = {name: [] for name in tests}
    probabilities: dict[str, NDArray[np.float32]] = {}
    for owner in owners:
        bench = owner.workbench
        model = bench.own_model()
        for name, rows in tests.items():
            if task.has_labels:
                logits = bench.in_batches(partial(predict_logits, model, rows, passes=bench.passes))
                own[name].append(score_logits(logits, rows, task, labels[name]))
                probabilities[name] = probabilities.get(name, 0) + torch.from_numpy(logits).softmax(-1).numpy()
            else:
                judge = partial(evaluate, model, rows, task=task, allowed=labels[name], passes=bench.passes)
                own[name].append(bench.in_batches(judge))
    scores = {"own": {name: _mean(own[name]) for name in tests}}
    if probabilities:
        scores["ensemble"] = {
            name: score_logits(probabilities[name], rows, task, labels[name]) for name, rows in tests.items()
        }
    return scores


def _over_owners(scores: Mapping[str, Score]) -> MeanScore:
    """Means in which every owner counts alike."""
    rows = sum(score.rows for score in scores.values())
    return MeanScore(
        accuracy=float(np.mean([score.correct / score.rows for score in scores.values()])),
        metric=float(np.mean([score.metric for score in scores.values()])),
        pooled_accuracy=sum(score.correct for score in scores.values()) / rows,
        rows=rows,
        by_owner=scores,
    )


def _mean(scores: Sequence[Score]) -> Score:
    """Several models on the same rows: all of them together, as one score of that many times the rows."""
    return Score(
        correct=sum(score.correct for score in scores),
        rows=sum(score.rows for score in scores),
        metric=float(np.mean([score.metric for score in scores])),
    )


def _multi_task(owners: Sequence[Owner]) -> dict[str, Score]:
    first = owners[0]
    training = first.settings.training
    assert training is not None  # the caller looked
    model = first.workbench.load_base()
    pooled = pool([owner.workbench.data.train() for owner in owners])
    judged_by = None if training.patience is None else pool([owner.workbench.data.validation() for owner in owners])
    first.workbench.fine_tune(model, pooled, training, "reference: multi-task training", judged_by)
    return {owner.name: owner.workbench.score(model, "test") for owner in owners}
