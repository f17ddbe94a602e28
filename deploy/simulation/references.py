"""References to hold a merge against, which need every owner's model and rows in one place: in simulation only.

own          each owner's own model on every owner's test rows, averaged: what sharing nothing gives
ensemble     the mean of the own models' probabilities, or numbers: N models to run instead of one
close_ensemble  the same for models that are distilled, each weighted by how close a row is to its owner's own rows
             (Synthetic Model Combination, arXiv 2210.05320)
multi_task   the base fine-tuned on all owners' pooled rows: what pooling the data would give
"""

from collections.abc import Collection, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from client.data.rows import pool, unlabelled
from client.measurement.closeness import closeness
from client.measurement.evaluation import evaluate, score_logits
from client.owner import Owner
from common.agreement import Task
from common.merge_methods.distill import DISTILL, LEAST_CLOSENESS
from common.metrics import MeanScore, Score, Sums, regression_score


def reference_scores(owners: Sequence[Owner]) -> dict[str, MeanScore]:
    """Scores by model. `ensemble` only of models with labels, whose probabilities fit in memory; `multi_task`
    only where all owners make their models from one recipe; none of them where heads are private.
    """
    if owners[0].agreement.task.head == "private":
        return {}  # no model has a head for another owner's rows
    scores = _own_and_ensemble(owners)
    recipes = {owner.settings.training for owner in owners}
    if any(owner.settings.own_base is not None for owner in owners):
        recipes.add(None)  # a recipe for another model
    if len(recipes) == 1 and None not in recipes:
        scores["multi_task"] = _multi_task(owners)
    task = owners[0].agreement.task
    return {model: _over_owners(by_owner, task) for model, by_owner in scores.items()}


def _own_and_ensemble(owners: Sequence[Owner]) -> dict[str, dict[str, Score]]:
    task = owners[0].agreement.task
    tests = {owner.name: owner.workbench.data.test() for owner in owners}
    labels = {owner.name: owner.workbench.data.label_set() for owner in owners}
    own: dict[str, list[Score]] = {name: [] for name in tests}
    votes: dict[str, NDArray[np.float32]] = {}
    close: dict[str, NDArray[np.float32]] = {}
    uneven = set[str]()  # owners on whose rows models make different numbers of predictions
    one_vote = not task.judges_tokens and not task.is_regression  # an example, whose weights need not add up to 1
    how_close = _closeness(owners) if DISTILL.name in owners[0].agreement.methods and one_vote else {}
    one_tokenizer = all(owner.settings.own_base is None for owner in owners)
    for owner in owners:
        bench = owner.workbench
        model = bench.own_model()
        for other in owners:
            name = other.name
            rows = tests[name] if one_tokenizer else other.workbench.read_by(bench).test()
            if task.has_labels:
                logits = bench.own_logits(model, rows)
                own[name].append(score_logits(logits, rows, task, labels[name]))
                vote = _votes(logits, task, len(owners))
                if len(vote) != len(votes.get(name, vote)):
                    uneven.add(name)  # another tokenizer cut other words off
                    continue
                votes[name] = votes.get(name, 0) + vote
                if owner.name in how_close:
                    close[name] = close.get(name, 0) + how_close[owner.name][name] * vote
            else:
                judge = partial(evaluate, model, rows, task=task, allowed=labels[name], passes=bench.passes)
                own[name].append(bench.in_batches(judge))
    scores = {"own": {name: _mean(own[name], task) for name in tests}}
    if votes and not uneven:
        scores["ensemble"] = {name: score_logits(votes[name], rows, task, labels[name]) for name, rows in tests.items()}
    if close:
        scores["close_ensemble"] = {
            name: score_logits(close[name], rows, task, labels[name]) for name, rows in tests.items()
        }
    return scores


def _closeness(owners: Sequence[Owner]) -> dict[str, dict[str, NDArray[np.float32]]]:
    """By owner, and by the owner of the test rows: how close these are to the first one's own, (rows, 1)."""
    first = owners[0].workbench
    pool = first.states_of(unlabelled(first.merged_data.pool_rows(first.pool, DISTILL.of(first.agreement.tables))))
    tests = {owner.name: owner.workbench.states_of(owner.workbench.merged_data.test()) for owner in owners}
    found = {}
    for owner in owners:
        own = owner.workbench.own_states()
        weights = {name: closeness(rows, own, pool) for name, rows in tests.items()}
        found[owner.name] = {
            name: np.maximum(each, LEAST_CLOSENESS).astype(np.float32)[:, None] for name, each in weights.items()
        }
    return found


def _votes(logits: NDArray[np.float32], task: Task, models: int) -> NDArray[np.float32]:
    """What an ensemble adds up: probabilities, of several labels each less a half, so that 0 decides; or numbers."""
    if task.is_regression:
        return logits / np.float32(models)
    if task.has_several_labels:
        return torch.from_numpy(logits).sigmoid().numpy() - np.float32(0.5)
    return torch.from_numpy(logits).softmax(-1).numpy()


def _over_owners(scores: Mapping[str, Score], task: Task) -> MeanScore:
    """Means in which every owner counts alike; of a regression, over all rows together."""
    rows = sum(score.rows for score in scores.values())
    sums = _added(scores.values())
    if task.is_regression:
        whole = regression_score(np.array(sums), rows, task, len(scores))
        return MeanScore(
            accuracy=None,
            metric=whole.metric,
            pooled_accuracy=None,
            rows=rows,
            by_owner=scores,
            pearson_r=whole.pearson_r,
            sums=sums,
        )
    return MeanScore(
        accuracy=float(np.mean([score.main for score in scores.values()])),
        metric=float(np.mean([score.metric for score in scores.values()])),
        pooled_accuracy=sum(score.correct or 0 for score in scores.values()) / rows,
        rows=rows,
        by_owner=scores,
        sums=sums,
    )


def _mean(scores: Sequence[Score], task: Task) -> Score:
    """Several models on the same rows: all of them together, as one score of that many times the rows."""
    rows, sums = sum(score.rows for score in scores), _added(scores)
    if task.is_regression:
        return regression_score(np.array(sums), rows, task, len(scores))
    return Score(
        correct=sum(score.correct or 0 for score in scores),
        rows=rows,
        metric=float(np.mean([score.metric for score in scores])),
        sums=sums,
    )


def _added(scores: Collection[Score]) -> Sums:
    """The sums over labels or targets of all scores together."""
    total = sum(np.array(score.sums) for score in scores)
    return tuple(tuple(map(float, row)) for row in np.atleast_2d(total)) if next(iter(scores)).sums else ()


def _multi_task(owners: Sequence[Owner]) -> dict[str, Score]:
    first = owners[0]
    training = first.settings.training
    assert training is not None  # the caller looked
    model = first.workbench.load_base()
    pooled = pool([owner.workbench.data.train() for owner in owners])
    judged_by = None if training.patience is None else pool([owner.workbench.data.validation() for owner in owners])
    first.workbench.fine_tune(model, pooled, training, "reference: multi-task training", judged_by)
    return {owner.name: owner.workbench.score(model, "test") for owner in owners}
