"""How well a score tells members from strangers, and how exposed a canary is. A higher score says "member".

Every function takes scores alone, so nothing here knows of rows or models.
"""

from collections.abc import Callable
from math import log2

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, rankdata
from sklearn.metrics import roc_curve

from client.audit.result import FEWEST_STRANGERS, Attack, AttackName, Interval

Scores = NDArray[np.float64]

CURVE = np.linspace(0, 1, 101)  # false-positive rates
RESAMPLES = 1000
CONFIDENCE = 0.95
STRICT_CONFIDENCE = 0.99  # for what is called better than guessing: several attacks are tried, and the best is named


def area_under_the_curve(members: Scores, strangers: Scores, axis: int = -1) -> Scores:
    """How often a member's score is above a stranger's; a tie counts half (Mann and Whitney's U, by midranks)."""
    num_members, num_strangers = members.shape[axis], strangers.shape[axis]
    ranks = rankdata(np.concatenate([members, strangers], axis=axis), axis=axis)
    of_members = np.take(ranks, np.arange(num_members), axis=axis).sum(axis=axis)
    area: Scores = (of_members - num_members * (num_members + 1) / 2) / (num_members * num_strangers)
    return area


def true_positive_rate(members: Scores, strangers: Scores, axis: int = -1) -> Scores:
    """The share of members above a threshold that at most 1 % of the strangers are above.

    The threshold is a stranger's score, so that tied members do not count.
    """
    allowed = strangers.shape[axis] // 100
    threshold = np.take(np.sort(strangers, axis=axis), [-allowed - 1], axis=axis)
    rate: Scores = (members > threshold).mean(axis=axis)
    return rate


def curve(members: Scores, strangers: Scores) -> Scores:
    """(101,): the share of members found at false-positive rates of at most 0, 0.01, ... 1."""
    false, found, _ = roc_curve(np.repeat([1, 0], [len(members), len(strangers)]), np.concatenate([members, strangers]))
    at: Scores = found[np.searchsorted(false, CURVE + 1e-12, side="right") - 1]
    return at


def attack(name: AttackName, members: Scores, strangers: Scores, seed: int) -> Attack:
    """How well the score tells them apart, with intervals from resampling members and strangers (Efron, 1979).

    A crafted model can make scores that are not numbers. These count as zero.
    """
    members, strangers = np.nan_to_num(members), np.nan_to_num(strangers)
    resampled = _resampled(area_under_the_curve, members, strangers, seed)
    least = float(np.quantile(resampled, (1 - STRICT_CONFIDENCE) / 2))
    rate = None
    if len(strangers) >= FEWEST_STRANGERS:
        found = _resampled(true_positive_rate, members, strangers, seed)
        rate = _interval(float(true_positive_rate(members, strangers)), found)
    return Attack(
        name=name,
        area=_interval(float(area_under_the_curve(members, strangers)), resampled),
        true_positives=rate,
        beats_guessing=least > 0.5,
        curve=tuple(curve(members, strangers).tolist()),
    )


def _resampled(statistic: Callable[..., Scores], members: Scores, strangers: Scores, seed: int) -> Scores:
    found = bootstrap(
        (members, strangers),
        statistic,
        n_resamples=RESAMPLES,
        batch=100,  # of resamples in memory at once
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    distribution: Scores = found.bootstrap_distribution
    return distribution


def _interval(value: float, resampled: Scores) -> Interval:
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(value=value, low=float(low), high=float(high))


# --- canaries ---


def exposures(losses: Scores, references: Scores) -> Scores:
    """(canaries,): the exposure of each canary among its own references (canaries, references), in bits.

    Carlini et al., The Secret Sharer (arXiv 1802.08232), definition 2, by sampling: with R rows drawn alike, a canary
    whose loss is the r-th lowest of all R + 1 has the exposure log2(R + 1) - log2(r). Tied references count half.
    """
    below = (references < losses[:, None]).sum(axis=1) + 0.5 * (references == losses[:, None]).sum(axis=1)
    exposed: Scores = log2(references.shape[1] + 1) - np.log2(1 + below)
    return exposed


def mean_exposure_by_chance(references: int) -> float:
    """What a canary that was never trained on has in the mean: its rank is any of 1 to R + 1."""
    return float(log2(references + 1) - np.log2(np.arange(1, references + 2)).mean())
