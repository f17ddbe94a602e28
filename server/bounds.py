"""What totals show of contributions that no honest owner's program makes: checks before anything is merged.

A total hides whose numbers are in it, so none of these names anybody. What they leave to a dishonest owner is in
SECURITY.md (c): at most, what honest owners would need all of their bounds for.
"""

from math import ceil, hypot, isclose

import numpy as np
from numpy.typing import NDArray

from common.errors import NumericalError
from common.merge_methods.data_free import DATA_FREE
from common.merge_methods.distill import CLOSENESS, COVERAGE, DISTILL, LEAST_CLOSENESS, PREDICTIONS
from common.merge_methods.logit_adjusted import SHARES, least_log_share
from common.merge_methods.normal_equations import gram_room
from common.merge_methods.refit import CLASSIFIER_RIDGE, classifier
from common.merge_methods.regmean import REGMEAN
from common.merge_methods.terms import MergeSettings
from common.models.plan import MergePlan
from common.summation.totals import SummedTensors
from common.tensor_layout import TensorLayout

TOLERANCE = 1e-3  # on the scales of a 32-bit sum, a weight loses its last bits
HINT = "an owner contributed numbers that no honest program does; the sum hides who. A new run needs a new agreement"


def check_contributions(total: SummedTensors, layout: TensorLayout, settings: MergeSettings) -> None:
    """Raise NumericalError for a total that honest owners cannot reach; `layout`: that of its round."""
    if PREDICTIONS in total:
        _check_predictions(total, settings)
    if "weight" in total:
        _check_weights(total, settings)
        _check_grams(total, layout, settings)
        _check_changes(total, layout, settings)
        _check_class_shares(total)


def _check_weights(total: SummedTensors, settings: MergeSettings) -> None:
    """The owners' weights and examples must add up, as far as totals show it."""
    weight, examples = float(total["weight"][0]), float(total["examples"][0])
    count = len(set(total.owners) - settings.without_weights)
    expected = examples if settings.weighting == "rows" else float(count)
    most = count * settings.bounds.examples
    if not isclose(weight, expected, rel_tol=TOLERANCE) or examples > most:  # check: weights-add-up
        raise NumericalError(
            f"merge: the owners' weights add up to {weight:.0f} and their examples to {examples:.0f}; the weights "
            f"should be {expected:.0f}, the examples at most {most}",
            hint=HINT,
        )


def _check_grams(total: SummedTensors, layout: TensorLayout, settings: MergeSettings) -> None:
    """No Gram may be larger than the owners' weights allow.

    On the diagonal, inputs have at most the agreed bound for each unit of weight. Weight changes are divided by their
    norm, so the trace of their Gram is the weight.
    """
    weight = gram_room(settings) * float(total["weight"][0])
    for entry in layout.entries:
        kind, _, name = entry.name.partition("/")
        if kind == "gram":
            size, most = float(total[entry.name].diagonal().max()), weight * settings.bounds.grams[name]
            if settings.gram_noise is not None:  # check: noised-grams-fit-the-examples
                most = _largest_noised(total, entry.name, settings)
        elif kind == "data_free_gram":
            size, most = float(np.trace(total[entry.name])), weight
        elif kind == "lorm_gram":
            size, most = float(total[entry.name].diagonal().max()), weight * entry.bound / settings.weight_bound
        else:
            continue
        if size > most:  # check: grams-fit-the-weights
            raise NumericalError(
                f"merge: {entry.name} adds up to {size:.3g}; honest owners of the same weight reach at most {most:.3g}",
                hint=HINT,
            )


def _largest_noised(total: SummedTensors, name: str, settings: MergeSettings) -> float:
    """Of as many examples as the owners have, of which each was measured once or not at all."""
    assert settings.gram_noise is not None
    examples, dimension, name = float(total["examples"][0]), len(total[name]), name.removeprefix("gram/")
    largest = settings.gram_noise.bound(name, dimension, ceil(examples), len(total.owners))
    ridge = REGMEAN.hyperparameters(settings).ridge * settings.gram_noise.norms[name] * examples
    return (1 + TOLERANCE) * (largest + ridge)


def _check_changes(total: SummedTensors, layout: TensorLayout, settings: MergeSettings) -> None:
    """If changes are clipped: |sum n_i delta_i| <= n b, and |sum G_i delta_i| <= trace(sum G_i) b.

    b: the largest norm of one delta; n: all weights. The second holds for positive semidefinite G_i, whose largest
    eigenvalues their traces bound, and for diag(G_i) as well. A ridge that pulls to p times the mean may add p / d of
    its part of the trace.
    """
    largest, plan = settings.bounds.changes, settings.plan
    layers = {layer.weight: layer for layer in (*plan.linear_layers, *plan.data_free, *plan.layers())}
    for entry in layout.entries if largest else ():
        kind, _, name = entry.name.partition("/")
        if kind == "weighted_delta":
            most = float(total["weight"][0]) * largest[name]
        elif entry.product_of:
            trace = float(np.trace(total[entry.product_of]))
            if kind.startswith("data_free_"):
                trace *= max(1.0, DATA_FREE.pull_of(settings) / layers[name].d_in)
            most = trace * hypot(*(largest[parameter] for parameter in layers[name].parameters))
        else:
            continue
        norm = float(np.linalg.norm(total[entry.name]))
        if norm > (1 + TOLERANCE) * most:  # check: changes-are-small-enough
            raise NumericalError(
                f"merge: {entry.name} adds up to a norm of {norm:.3g}; owners that keep to bounds.change reach at most "
                f"{most:.3g}",
                hint=HINT,
            )


def _check_class_shares(total: SummedTensors) -> None:
    """The shares of labels that one owner's model predicts add up to 1. Their geometric means over the owners add up to
    no more (Hoelder), and none is less than the least share that one owner can have.
    """
    if SHARES not in total:
        return
    logs = total[SHARES] / total["weight"][0]  # (classes,)
    add_up, least = float(np.exp(logs).sum()), least_log_share(len(logs))
    if not add_up <= 1 + TOLERANCE or logs.min() < least - TOLERANCE:  # check: class-shares-add-up
        raise NumericalError(
            f"merge: the shares of labels add up to {add_up:.3g}, the logarithm of the least is {logs.min():.3g}; "
            f"those of honest owners add up to at most 1, and it is at least {least:.3g}",
            hint=HINT,
        )


def _check_predictions(total: SummedTensors, settings: MergeSettings) -> None:
    """Each label is known by as many owners as agreed, nobody's number is outside 0 to 1, nobody is closer than 1, and
    of one label among several, each owner's probabilities add up to 1.

    TOLERANCE: of what all owners together can reach, for what fixed point rounds.
    """
    owners = total.owners
    unknown = [settings.unknown_labels.get(owner, frozenset()) for owner in owners]
    labels = range(DISTILL.outputs(settings))
    expected = np.array([float(sum(label not in each for each in unknown)) for label in labels])
    room, known, said = TOLERANCE * len(owners), total[COVERAGE], total[PREDICTIONS]  # (labels,), (predictions, labels)
    is_dense = CLOSENESS in total
    weight = total[CLOSENESS] if is_dense else expected  # (predictions, labels), or (labels,)
    fits = [
        np.abs(known - expected) <= room,
        weight <= expected + room,
        weight >= LEAST_CLOSENESS * expected - room * LEAST_CLOSENESS,
        said.min(axis=0) >= -room,
        (said if is_dense else said.max(axis=0)) <= weight + room,  # no copy of what a vocabulary takes
    ]
    if settings.problem_type == "single_label_classification":  # check: probabilities-add-up-to-one
        rows, room = said.sum(axis=1), room + len(labels) * total.rounding_error(PREDICTIONS)  # (predictions,)
        fewest = len(labels) - max(map(len, unknown))  # labels that a model knows
        fits += (
            [rows >= weight.max(axis=1) - room, rows <= weight.sum(axis=1) / fewest + room]
            if is_dense
            else [np.abs(rows - len(owners)) <= room]
        )
    if not all(each.all() for each in fits):  # check: predictions-fit-the-owners
        raise NumericalError(
            f"merge: the predictions of {len(owners)} owners add up to what no models with the agreed labels can say",
            hint=HINT,
        )


def check_classifier(total: SummedTensors, layout: TensorLayout, weight: float, plan: MergePlan) -> None:
    """Raise NumericalError if a refit's sums are not of the rows that the owners' weights say.

    `weight`: all owners' in the contributions. The rows of a refit add up to it. With a bias, a constant 1 is among the
    classifier's inputs, so the last number on the Gram's diagonal is the number of rows once more. With noise, only the
    rows that were measured are in the sums, each as one, and the diagonal says nothing exact.
    """
    counts = {"head_rows": float(total["head_rows"][0])}
    if any(entry.noise for entry in layout.entries):
        if not 0 <= counts["head_rows"] <= (1 + TOLERANCE) * weight:  # check: noised-rows-are-rows
            raise NumericalError(
                f"merge: head_rows covers {counts['head_rows']:.0f} rows, but the owners have {weight:.0f}", hint=HINT
            )
        return
    if classifier(plan).bias is not None:
        grams = (entry.name for entry in layout.entries if entry.name.startswith("head_gram@"))
        counts |= {name: _constant_part(total[name]) for name in grams}
    for name, count in counts.items():
        if not isclose(count, weight, rel_tol=TOLERANCE):  # check: classifier-rows-add-up
            raise NumericalError(
                f"merge: {name} covers {count:.0f} rows, but the owners' weights add up to {weight:.0f}", hint=HINT
            )


def _constant_part(gram: NDArray[np.float64]) -> float:
    """The last number on the diagonal, before every owner added its ridge."""
    ridge = CLASSIFIER_RIDGE / (1 + CLASSIFIER_RIDGE) * float(np.trace(gram)) / len(gram)
    return float(gram[-1, -1]) - ridge
