"""The legs of a privacy budget: each kind of sum that holds statistics of rows, how far one unit can move it, and the
noise that hides this.

    training   DP-SGD at each owner (client/measurement/private_training.py). Models and their totals need no more
    metrics    what one judged example adds to the sums of every model that is judged on it (common/metrics.py)
    refit      what one example adds to the classifier's Gram and products (common/merge_methods/refit.py)
    grams      what one example adds to the Grams of layers' inputs, each in units of its agreed norm
               (common/merge_methods/terms.GramNoise)

A unit is a row, or a person with several, of which only the first row is judged and fitted to: so it moves no sum by
more than one row does. All legs are added up, as if the same unit were in every file.

Owners add the noise together: each a share, so that those of `noise_shares` owners are enough. That of Grams each adds
whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from common.merge_methods import METHODS
from common.merge_methods.method import Measurement
from common.merge_methods.terms import ROUNDING, RefitNoise
from common.privacy.gaussian import epsilon_of, mu_of

if TYPE_CHECKING:
    from common.agreement.tables import DraftTables, Task

SumName = Literal["metrics", "refit", "grams"]
LegName = Literal["training"] | SumName
OF_TRAINING: LegName = "training"


@dataclass(frozen=True, kw_only=True)
class Leg:
    """One leg. `sensitivity`: by how much, in 2-norm, one unit moves what is summed; `sigma`: the standard deviation of
    the noise in the total that hides it; both None for training, where each owner's own steps decide.

    `share`: of the budget, in squares of sensitivity / sigma. `epsilon`: of this leg alone, at the agreed delta.
    """

    name: LegName
    share: float
    epsilon: float | None = None
    sensitivity: float | None = None
    sigma: float | None = None


def legs_of(agreement: DraftTables) -> tuple[Leg, ...]:
    """The legs of a complete agreement; none without privacy.epsilon."""
    if agreement.privacy.epsilon is None:
        return ()
    shares = agreement.budget_shares
    sums = (_leg(agreement, name, shares[name]) for name in _SENSITIVITIES if name in shares)
    return (Leg(name=OF_TRAINING, share=shares[OF_TRAINING]), *sums)


def _leg(agreement: DraftTables, name: SumName, share: float) -> Leg:
    epsilon, delta = agreement.privacy.epsilon, agreement.privacy.delta
    assert epsilon is not None
    mu = share**0.5 * mu_of(epsilon, delta)
    sensitivity = _SENSITIVITIES[name](agreement)
    return Leg(
        name=name,
        share=share,
        epsilon=epsilon_of(delta, mu),
        sensitivity=sensitivity,
        sigma=sensitivity / mu,
    )


def own_noise(agreement: DraftTables, name: LegName) -> float:
    """The standard deviation of what each owner adds: its share, or of Grams all; 0 without privacy.epsilon."""
    for leg in legs_of(agreement):
        if leg.name == name and leg.sigma is not None:
            return float(leg.sigma / shares_of(agreement, name) ** 0.5)  # check: shares-add-up
    return 0.0


def shares_of(agreement: DraftTables, name: LegName) -> int:
    """The noise of how many owners must be enough. A Gram can be told from the others' by its products."""
    return 1 if name == "grams" else agreement.noise_shares  # check: each-owner-hides-its-own-gram


def spent_beside_training(agreement: DraftTables) -> float:
    """The mu of all other legs together: what training has to leave of the budget."""
    epsilon, delta = agreement.privacy.epsilon, agreement.privacy.delta
    assert epsilon is not None
    return float((1 - agreement.budget_shares[OF_TRAINING]) ** 0.5 * mu_of(epsilon, delta))  # check: legs-add-up


def refit_noise(agreement: DraftTables) -> RefitNoise | None:
    """What a refit must keep to; None without noise."""
    features = agreement.bounds.features
    if agreement.privacy.epsilon is None or features is None or "refit" not in agreement.budget_shares:
        return None
    target = target_norm(agreement.task)
    return RefitNoise(features=features, target=target, own=own_noise(agreement, "refit"))


# --- sensitivities ---


def judged_models(agreement: DraftTables) -> int:
    """How many models are judged on validation and test examples, both together."""
    candidates = [len(agreement.agreed(METHODS[name])) for name in agreement.methods]
    return 2 + len(candidates) + sum(count for count in candidates if count > 1)  # the base's and the owner's own, too


def example_norm(task: Task) -> float:
    """The largest 2-norm of what one example adds to the sums of one model (common/metrics.py).

    With one label: right, and right, wanted and found at one label. With several, the last three at each label. Of a
    text whose tokens are labelled, a share that is right, and entities in shares of its own. Of a language model, two
    numbers of at most 1. Of a regression, for each target, p, t, p^2, t^2 and (p - t)^2, together at most 2.
    """
    if task.is_regression:
        squares = 4 * len(task.labels)
    elif task.has_several_labels:
        squares = 1 + 3 * len(task.labels)
    else:
        squares = 4 if task.has_labels else 2
    return float(squares**0.5)  # check: examples-move-metrics-by-so-much


def target_norm(task: Task) -> float:
    """The largest 2-norm of what a row is fitted to: onehot - 1/K; of several labels, 1/2 or -1/2 for each."""
    count = len(task.labels)
    return float(count**0.5 / 2 if task.has_several_labels else (1 - 1 / count) ** 0.5)


def _of_metrics(agreement: DraftTables) -> float:
    return float(example_norm(agreement.task) * judged_models(agreement) ** 0.5)  # check: every-judged-model-counts


def _of_refit(agreement: DraftTables) -> float:
    assert agreement.bounds.features is not None  # a completed draft has it
    noise = RefitNoise(features=agreement.bounds.features, target=target_norm(agreement.task), own=0.0)
    return noise.sensitivity


def _of_grams(agreement: DraftTables) -> float:
    """All Grams as one vector, each number in units of its Gram's agreed norm: an example moves every one by up to 1,
    as often as it is summed, and what rounding to fixed point adds to that.
    """
    grams = len(agreement.bounds.gram_norms) * times_measured(agreement)
    return float((1 + ROUNDING) * grams**0.5)  # check: examples-move-every-gram


def times_measured(agreement: DraftTables) -> int:
    """How often each Gram is summed: in the round that all methods share, and in the steps of a method."""
    methods = [METHODS[name] for name in agreement.methods]
    at_first = any(Measurement.GRAMS in each.measurements(agreement.tables) for each in methods)
    return at_first + sum(each.measures_grams_again for each in methods)  # check: every-sum-of-grams-counts


_SENSITIVITIES: Mapping[SumName, Callable[[DraftTables], float]] = {
    "metrics": _of_metrics,
    "refit": _of_refit,
    "grams": _of_grams,
}
SENSITIVE: Mapping[str, str] = {
    "training": "the gradients of your training rows, at every step",
    "metrics": "how models do on your validation and test rows",
    "refit": "what the classifier is fitted to, on your training rows",
    "grams": "inputs of layers on your training rows, in agreed lengths",
}
