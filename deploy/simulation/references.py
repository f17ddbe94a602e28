"""References to hold a merge against, which need every owner's model and rows in one place: in simulation only.

own          each owner's own model on every owner's test rows, averaged: what sharing nothing gives
ensemble     the mean of the own models' probabilities, or numbers: N models to run instead of one
close_ensemble  the same for models that are distilled, each weighted by how close a row is to its owner's own rows
             (Synthetic Model Combination, arXiv 2210.05320)
multi_task   the base fine-tuned on all owners' pooled rows: what pooling the data would give
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

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
from deploy.simulation.crew import Crew


def reference_scores(party_files: tuple[Path, ...], crew: Crew) -> dict[str, MeanScore]:
    """Scores by model, of the owners with these settings. `ensemble` only of models with labels, whose probabilities
    fit in memory; `multi_task` only where all owners make their models from one recipe; none of them where heads are
    private.
    """
    try:
        scores = _scores(party_files, crew)
        task = _owners(party_files)[0].agreement.task
    finally:
        _owners.cache_clear()  # the next simulation may have other files of the same names
    return {model: _over_owners(by_owner, task) for model, by_owner in scores.items()}


def _scores(party_files: tuple[Path, ...], crew: Crew) -> dict[str, dict[str, Score]]:
    """By model and owner."""
    owners = _owners(party_files)
    if owners[0].agreement.task.head == "private":
        return {}  # no model has a head for another owner's rows
    recipes = {owner.settings.training for owner in owners}
    if any(owner.settings.own_base is not None for owner in owners):
        recipes.add(None)  # a recipe for another model
    has_one_recipe = len(recipes) == 1 and None not in recipes
    if has_one_recipe:
        crew.add("multi_task", _multi_task, party_files)  # first, because it takes longest
    scores = _own_and_ensemble(party_files, crew)
    return scores | ({"multi_task": crew.result("multi_task")} if has_one_recipe else {})


@lru_cache(maxsize=1)
def _owners(party_files: tuple[Path, ...]) -> tuple[Owner, ...]:
    """The owners, kept while their models are judged: so a process reads everybody's rows once."""
    return tuple(Owner(path) for path in party_files)


@dataclass(frozen=True)
class _Judged:
    """What an owner's model makes of somebody's test rows. `vote`: of a model with labels, (predictions, labels)."""

    score: Score
    vote: NDArray[np.float32] | None = None


def _judge_all(party_files: tuple[Path, ...], number: int) -> dict[str, _Judged]:
    """What the model of one owner makes of every owner's test rows."""
    owners = _owners(party_files)
    task, bench = owners[number].agreement.task, owners[number].workbench
    model = bench.own_model()
    one_tokenizer = all(owner.settings.own_base is None for owner in owners)
    judged = {}
    for other in owners:
        data, allowed = other.workbench.data, other.workbench.data.label_set()
        rows = data.test() if one_tokenizer else other.workbench.read_by(bench).test()
        if task.has_labels:
            logits = bench.own_logits(model, rows)
            score = score_logits(logits, rows, task, allowed)
            judged[other.name] = _Judged(score, _vote(logits, task, len(owners)))
        else:
            judge = partial(evaluate, model, rows, task=task, allowed=allowed, passes=bench.passes)
            judged[other.name] = _Judged(bench.in_batches(judge))
    return judged


def _own_and_ensemble(party_files: tuple[Path, ...], crew: Crew) -> dict[str, dict[str, Score]]:
    owners = _owners(party_files)
    task, names = owners[0].agreement.task, [owner.name for owner in owners]
    own: dict[str, list[Score]] = {name: [] for name in names}
    votes: dict[str, NDArray[np.float32]] = {}
    close: dict[str, NDArray[np.float32]] = {}
    uneven = set[str]()  # owners on whose rows models make different numbers of predictions
    one_vote = not task.judges_tokens and not task.is_regression  # an example, whose weights need not add up to 1
    how_close = _closeness(owners) if DISTILL.name in owners[0].agreement.methods and one_vote else {}
    judged = crew.in_order(_judge_all, [(party_files, number) for number in range(len(owners))])
    for owner, of_everybody in zip(names, judged, strict=True):
        for name, each in of_everybody.items():
            own[name].append(each.score)
            if each.vote is None:
                continue
            if len(each.vote) != len(votes.get(name, each.vote)):
                uneven.add(name)  # another tokenizer cut other words off
                continue
            votes[name] = votes.get(name, 0) + each.vote
            if owner in how_close:
                close[name] = close.get(name, 0) + how_close[owner][name] * each.vote
    scores = {"own": {name: _mean(own[name], task) for name in names}}
    if votes and not uneven:
        scores["ensemble"] = _scored(votes, owners)
    if close:
        scores["close_ensemble"] = _scored(close, owners)
    return scores


def _scored(votes: Mapping[str, NDArray[np.float32]], owners: Sequence[Owner]) -> dict[str, Score]:
    """What votes on every owner's test rows are worth, as `own` models read these rows."""
    data = {owner.name: owner.workbench.data for owner in owners}
    task = owners[0].agreement.task
    return {name: score_logits(said, data[name].test(), task, data[name].label_set()) for name, said in votes.items()}


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


def _vote(logits: NDArray[np.float32], task: Task, models: int) -> NDArray[np.float32]:
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


def _multi_task(party_files: tuple[Path, ...]) -> dict[str, Score]:
    owners = _owners(party_files)
    first = owners[0]
    training = first.settings.training
    assert training is not None  # the caller looked
    model = first.workbench.load_base()
    pooled = pool([owner.workbench.data.train() for owner in owners])
    judged_by = None if training.patience is None else pool([owner.workbench.data.validation() for owner in owners])
    first.workbench.fine_tune(model, pooled, training, "reference: multi-task training", judged_by)
    return {owner.name: owner.workbench.score(model, "test") for owner in owners}
