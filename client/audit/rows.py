"""Who is a member and who a stranger: rows that the owner's model was trained on, and rows of the same source that it
was not.

A membership test measures nothing else than membership only if the two groups are alike otherwise, so whatever differs
visibly is said. A row that both groups hold is in neither. All models are attacked on the same rows, each as it reads
them (`View`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2_contingency, mannwhitneyu

from client.data.private_data import PrivateData
from client.data.rows import IGNORED, Rows, pool
from client.holdings import Holdings
from common.errors import DataError

FEWEST = 10  # members, and strangers
UNLIKELY = 0.01  # a difference that chance makes more seldom is said


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """How a model reads the owner's files: `data`, with that model's tokenizer or image processor.

    `numbers`: the model's number for each agreed label, IGNORED for one that it lacks; None if they are as agreed.
    """

    data: PrivateData
    numbers: NDArray[np.int64] | None = None

    def train(self) -> Rows:
        return self._numbered(self.data.train())

    def validation(self) -> Rows:
        return self._numbered(self.data.validation())

    def test(self) -> Rows:
        return self._numbered(self.data.test())

    def _numbered(self, rows: Rows) -> Rows:
        """The rows with the model's numbers for their labels. What it has no label for, it does not predict."""
        if self.numbers is None:
            return rows
        if isinstance(rows.targets, np.ndarray):
            return replace(rows, targets=self.numbers[rows.targets.astype(np.int64)])
        return replace(rows, targets=tuple(_renumbered(each, self.numbers) for each in rows.targets))


def _renumbered(targets: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.where(targets == IGNORED, IGNORED, numbers[np.maximum(targets, 0)])


@dataclass(frozen=True, kw_only=True)
class ComparedRows:
    """The rows of an audit as one model reads them, and how they came about.

    `members` and `strangers` are drawn from all of their kind. `in_both`: how many training rows were left out because
    a stranger reads the same. `unknown`: rows that are set aside for validation here, which a model that was trained
    elsewhere may have been trained on. `not_judged`: rows on which some model predicts nothing. `has_validation`:
    whether validation rows are among the strangers.
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


def compared_rows(holdings: Holdings, views: Sequence[View], most: int) -> list[ComparedRows]:
    """At most `most` members and as many strangers, drawn from all; the same rows for each view.

    A row takes part if every view predicts something on it, and if none of them reads it like a row of the other group.
    Raises DataError if too few are left.
    """
    settings = holdings.settings
    # Rows that are set aside are strangers only to models that are made here: nobody knows what another one has seen.
    is_made_here = settings.training is not None and len(views) == 1
    with_validation = settings.data.validation is not None or is_made_here
    sides = [(view.train(), _strangers_to(view, with_validation)) for view in views]
    train, others = (_read_alike(each) for each in zip(*sides, strict=True))
    judged, pooled = (np.flatnonzero(np.all([_is_judged(rows) for rows in each], axis=0)) for each in (train, others))
    in_both = np.zeros(len(judged), bool)
    held = np.zeros(len(pooled), bool)
    for rows, strangers in zip(train, others, strict=True):
        one, other = keys_of(rows.take(judged)), keys_of(strangers.take(pooled))
        shared = set(one) & set(other)
        in_both |= [key in shared for key in one]
        held |= [key in shared for key in other]
    members, free = judged[~in_both], pooled[~held]  # check: members-are-no-strangers
    for found, name in ((members, "training"), (free, "test and validation")):
        if len(found) < FEWEST:
            raise DataError(
                f"{holdings.name}: {len(found)} {name} rows are left that the other files do not hold, an audit needs "
                f"at least {FEWEST}",
                hint="name a test file whose rows were not trained on",
            )
    random = np.random.default_rng(holdings.agreement.seed)
    members, free = (_drawn(random, each, most) for each in (members, free))
    return [
        ComparedRows(
            members=rows.take(members),
            strangers=strangers.take(free),
            all_members=rows.take(judged),
            all_strangers=strangers.take(pooled),
            in_both=int(in_both.sum()),
            unknown=0 if with_validation else len(views[0].validation()),
            not_judged=len(rows) + len(strangers) - len(judged) - len(pooled),
            has_validation=with_validation,
        )
        for rows, strangers in zip(train, others, strict=True)
    ]


def _strangers_to(view: View, with_validation: bool) -> Rows:
    return pool([view.test(), view.validation()]) if with_validation else view.test()


def _read_alike(views: Sequence[Rows]) -> Sequence[Rows]:
    """Raise DataError if one model's tokenizer leaves out rows that another's does not: no row would be known again."""
    if len({len(rows) for rows in views}) > 1:
        raise DataError(
            f"the models read {' and '.join(f'{len(rows):,}' for rows in views)} rows of a file: a tokenizer cuts some "
            "before the model says anything",
            hint="leave these rows out, or agree on a larger task.max_tokens",
        )
    return views


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


def _is_judged(rows: Rows) -> NDArray[np.bool_]:
    """(rows,): whether something is predicted on a row. A text of one token has no next one."""
    return np.array([bool((np.asarray(target) != IGNORED).any()) for target in rows.targets], bool)


def _drawn(random: np.random.Generator, indices: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    return np.sort(random.permutation(indices)[:most])


def _lengths(rows: Rows) -> NDArray[np.float64]:
    assert not isinstance(rows.features, np.ndarray)
    return np.array([len(row["input_ids"]) for row in rows.features], np.float64)


def tokens_of(rows: Rows) -> NDArray[np.int64]:
    """The different tokens of texts."""
    assert not isinstance(rows.features, np.ndarray)
    return np.unique(np.concatenate([np.asarray(row["input_ids"], np.int64) for row in rows.features]))
