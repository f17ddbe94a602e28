"""Who is a member and who a stranger: rows that the owner's model was trained on, and rows of the same source that it
was not.

A membership test measures nothing else than membership only if the two groups are alike otherwise, so whatever differs
visibly is said. A row that both groups hold is in neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2_contingency, mannwhitneyu

from client.data.rows import IGNORED, Rows, pool
from client.holdings import Holdings
from common.errors import DataError

FEWEST = 10  # members, and strangers
UNLIKELY = 0.01  # a difference that chance makes more seldom is said


@dataclass(frozen=True, kw_only=True)
class ComparedRows:
    """The rows of an audit, and how they came about. `members` and `strangers` are drawn from all of their kind.

    `in_both`: how many training rows were left out because a stranger reads the same. `unknown`: rows that are set
    aside for validation here, which a model that was trained elsewhere may have been trained on. `not_judged`: rows on
    which nothing is predicted. `has_validation`: whether validation rows are among the strangers.
    """

    members: Rows
    strangers: Rows
    all_members: Rows
    all_strangers: Rows
    in_both: int
    unknown: int
    not_judged: int
    has_validation: bool

    @property
    def both(self) -> Rows:
        """The members, then the strangers."""
        return pool([self.members, self.strangers])


def compared_rows(holdings: Holdings, most: int) -> ComparedRows:
    """At most `most` members and as many strangers, drawn from all. Raises DataError if too few are left."""
    data, settings = holdings.data, holdings.settings
    train, others, unknown = data.train(), [data.test()], 0
    # Rows that are set aside are strangers only to a model that is made here: nobody knows what another one has seen.
    if settings.data.validation is not None or settings.training is not None:
        others.append(data.validation())
    else:
        unknown = len(data.validation())
    judged, pooled = _judged(train), _judged(pool(others))
    not_judged = len(train) + sum(map(len, others)) - len(judged) - len(pooled)
    one, other = keys_of(judged), keys_of(pooled)
    shared = set(one) & set(other)
    members = [index for index, key in enumerate(one) if key not in shared]  # check: members-are-no-strangers
    strangers = [index for index, key in enumerate(other) if key not in shared]
    for rows, name in ((members, "training"), (strangers, "test and validation")):
        if len(rows) < FEWEST:
            raise DataError(
                f"{holdings.name}: {len(rows)} {name} rows are left that the other files do not hold, an audit needs "
                f"at least {FEWEST}",
                hint="name a test file whose rows were not trained on",
            )
    random = np.random.default_rng(holdings.agreement.seed)
    return ComparedRows(
        members=judged.take(_drawn(random, members, most)),
        strangers=pooled.take(_drawn(random, strangers, most)),
        all_members=judged,
        all_strangers=pooled,
        in_both=len(one) - len(members),
        unknown=unknown,
        not_judged=not_judged,
        has_validation=len(others) > 1,
    )


def keys_of(rows: Rows) -> list[bytes]:
    """What a model reads of each row. Rows with the same key are the same to it, whatever their labels."""
    if isinstance(rows.features, np.ndarray):
        return [image.tobytes() for image in rows.features]
    return [
        b"|".join(np.asarray(row[name]).tobytes() for name in ("input_ids", "decoder_input_ids") if name in row)
        for row in rows.features
    ]


def differences(rows: ComparedRows) -> Iterator[str]:
    """What differs visibly between members and strangers, in sentences with shares: nothing of a single row."""
    members, strangers = rows.members, rows.strangers
    if not isinstance(members.features, np.ndarray):
        one, other = (_lengths(each) for each in (members, strangers))
        if mannwhitneyu(one, other).pvalue < UNLIKELY:
            yield (
                f"Your training rows have {one.mean():.1f} tokens in the mean and the strangers {other.mean():.1f}: an "
                "attack may tell lengths apart, and not membership."
            )
    if isinstance(members.targets, np.ndarray) and isinstance(strangers.targets, np.ndarray):
        labels = max(members.targets.max(), strangers.targets.max()) + 1
        counts = np.array([np.bincount(each.targets, minlength=labels) for each in (members, strangers)])
        counts = counts[:, counts.any(axis=0)]
        if counts.shape[1] > 1 and chi2_contingency(counts).pvalue < UNLIKELY:
            shares = counts / counts.sum(axis=1, keepdims=True)
            apart = np.abs(shares[0] - shares[1]).sum() / 2
            yield (
                f"The labels of your training rows and of the strangers are distributed differently ({apart:.0%} of "
                "either would need another label): an attack may tell labels apart, and not membership."
            )


def _judged(rows: Rows) -> Rows:
    """The rows on which something is predicted: a text of one token has no next one."""
    kept = [index for index, target in enumerate(rows.targets) if (np.asarray(target) != IGNORED).any()]
    return rows.take(np.array(kept, np.int64))


def _drawn(random: np.random.Generator, indices: list[int], most: int) -> NDArray[np.int64]:
    return np.sort(random.permutation(np.array(indices, np.int64))[:most])


def _lengths(rows: Rows) -> NDArray[np.float64]:
    assert not isinstance(rows.features, np.ndarray)
    return np.array([len(row["input_ids"]) for row in rows.features], np.float64)


def tokens_of(rows: Rows) -> NDArray[np.int64]:
    """The different tokens of texts."""
    assert not isinstance(rows.features, np.ndarray)
    return np.unique(np.concatenate([np.asarray(row["input_ids"], np.int64) for row in rows.features]))
