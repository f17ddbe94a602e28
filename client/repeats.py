"""Contributing the same rows or weight changes under a second agreement: what is the same, and what two totals show.

Every total covers enough owners. The difference of two totals may cover a single one, or a single row of one. So a
second contribution of the same is refused, unless the owner has read what the difference would show and consents again.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import TYPE_CHECKING

from client.records import Record
from client.sketch import Sketch, share_in_common, sketch_of
from common import merge_methods
from common.agreement import Agreement
from common.errors import ConsentError
from common.identity import fingerprint
from common.merge_methods import METHODS, Hyperparameters
from common.merge_methods.method import MultiRoundMethod

if TYPE_CHECKING:
    from client.data.private_data import PrivateData

# From this share of the smaller set on, it is a repetition. Texts that anybody writes, such as "thank you", stay below.
LEAST_SHARE = 0.1
SHOWN_GROUPS = 2  # of a fingerprint's eight groups of five digits
GRAMS = "grams"
MEASURED = {GRAMS: "Gram matrices", "fisher": "Fisher information", "class_shares": "shares of the labels"}


class Contributed(Record):
    """Keyed sketches of an owner's training rows, of its changed tensors, and of the rows that models are judged on
    (Workbench.contributed). The last count if either agreement has privacy.epsilon: metrics are part of the budget.
    """

    rows: Sketch
    weight_changes: Sketch
    judged: Sketch = Sketch()

    @classmethod
    def of(cls, key: bytes, data: "PrivateData", weight_changes: Sketch) -> "Contributed":
        """Rows count before any are set aside or drawn, and without labels, which no Gram has."""
        rows, judged = sketch_of(key, data.training_contents()), sketch_of(key, data.judged_contents())
        return cls(rows=rows, weight_changes=weight_changes, judged=judged)

    def shares_with(self, other: "Contributed", *, is_bounded: bool) -> tuple[float, float]:
        """Which share of the rows, and of the changed tensors, `other` has too. A row that is judged by one and trained
        on by the other spends both budgets if the agreements, or one of them, are `is_bounded`.
        """
        mine, theirs = [self.rows], [other.rows]
        if is_bounded:  # check: judged-rows-are-counted-too
            mine, theirs = [self.rows, self.judged], [other.rows, other.judged]
        rows = max(share_in_common(one, another) for one in mine for another in theirs)
        return rows, share_in_common(self.weight_changes, other.weight_changes)


class Terms(Record):
    """What of an agreement decides what a difference of totals shows.

    `owners`: public key -> name. `measured`: how many examples, by what is measured. `weightings`: by method, the kinds
    of weights of its sums. `hyperparameters`: every method's table, in JSON. `epsilon`, `delta`, `unit`: its bound.
    """

    title: str
    owners: dict[str, str]
    needed_owners: int
    honest_owners: int
    methods: tuple[str, ...]
    weighting: str
    measured: dict[str, int]
    weightings: dict[str, tuple[str, ...]]
    hyperparameters: str
    epsilon: float | None = None
    delta: float = 0.0
    unit: str = "row"


class Repeat(Record):
    """An agreement under which the same was offered; `rows` and `weight_changes`: the shares that are the same."""

    agreement_digest: str
    terms: Terms
    rows: float
    weight_changes: float

    @property
    def is_one(self) -> bool:
        return max(self.rows, self.weight_changes) >= LEAST_SHARE

    @property
    def fingerprint_start(self) -> str:
        """How the number begins that people compared by phone: `12345 67890 ...`."""
        groups = fingerprint(bytes.fromhex(self.agreement_digest)).split()
        return f"{' '.join(groups[:SHOWN_GROUPS])} ..."

    @property
    def named(self) -> str:
        """The other agreement in a sentence."""
        return f"{self.terms.title!r} (fingerprint {self.fingerprint_start})"

    @property
    def what(self) -> str:
        """`the same rows and 30 % of the same weight changes`."""
        shares = {"rows": self.rows, "weight changes": self.weight_changes}
        return " and ".join(
            f"the same {name}" if share == 1 else f"about {max(1, min(99, round(100 * share)))} % of the same {name}"
            for name, share in shares.items()
            if share >= LEAST_SHARE
        )


def terms_of(agreement: Agreement) -> Terms:
    """What the ledger keeps of an agreement."""
    tables = agreement.tables
    measured = {str(kind): count for kind, count in merge_methods.measurements(agreement.methods, tables).items()}
    for method in agreement.multi_round_methods:
        if (count := getattr(method.of(tables), "measured_examples", None)) is not None:
            measured[method.title] = count
    weightings = {
        name: tuple(f"{agreement.weighting} {kind}" for kind in METHODS[name].weightings_of_the_same_rows(tables))
        for name in agreement.methods
    }
    return Terms(
        title=agreement.title,
        owners={key.hex(): name for name, key in agreement.roster.items()},
        needed_owners=agreement.needed_owners,
        honest_owners=agreement.needed_owners - agreement.colluders,
        methods=agreement.methods,
        weighting=agreement.weighting,
        measured=measured,
        weightings=weightings,
        hyperparameters=_in_json(tables),
        epsilon=agreement.privacy.epsilon,
        delta=agreement.privacy.delta if agreement.privacy.epsilon is not None else 0.0,
        unit=agreement.privacy.unit,
    )


def check_repeats(terms: Terms, repeats: Iterable[Repeat], again: Set[str]) -> None:
    """Raise ConsentError for a repetition that this owner has not consented to, or that no consent allows.

    `again`: the digests of the agreements that it consented to repeat.
    """
    found = tuple(repeats)
    check_weightings(terms, found)
    for repeat in found:
        if repeat.agreement_digest not in again:  # check: repeats-have-consent
            raise ConsentError(
                f"{repeat.what} were contributed under another agreement, {repeat.named}; the difference of the two "
                "totals can show what one owner gave",
                hint="amalgram agree says what it would show; to contribute all the same: amalgram agree --again",
            )


def check_weightings(terms: Terms, repeats: Iterable[Repeat]) -> None:
    """Raise ConsentError if all agreements together sum the same rows with more kinds of weights than one may.

    The bound is that of rules.the_same_rows_are_weighted_in_few_ways, which nobody can consent away either.
    """
    others = [repeat.terms for repeat in repeats if repeat.rows >= LEAST_SHARE]
    for method, kinds in terms.weightings.items():
        together = {*kinds, *(kind for each in others for kind in each.weightings.get(method, ()))}
        honest = min(each.honest_owners for each in (terms, *others))
        if len(together) > max(1, honest - 2):  # check: weightings-add-up
            raise ConsentError(
                f"{method}: with earlier agreements, the same rows would be summed with {len(together)} kinds of "
                f"weights ({', '.join(sorted(together))}), at most {max(1, honest - 2)} are safe with {honest} honest "
                "owners",
                hint="agree on weights that were used before, or contribute other rows",
            )


def what_the_difference_shows(before: Terms, now: Terms, repeat: Repeat) -> Iterator[str]:
    """What somebody who has both totals learns, a sentence or two for each way in which the agreements differ."""
    both_sum_grams = _sums_grams(before) and _sums_grams(now)
    totals = "weight changes and Gram matrices" if both_sum_grams else "weight changes"
    if differing := set(before.owners.items()) ^ set(now.owners.items()):
        names = ", ".join(sorted({name for _, name in differing}))
        yield (
            f"The owners differ ({names}). Subtract the totals, and what is left belongs to the owners that differ: "
            f"if that is one owner, its {totals}, exactly."
        )
    if any(each.needed_owners < len(each.owners) for each in (before, now)):
        yield (
            f"An owner may drop out ({now.needed_owners} of {len(now.owners)} are enough now, {before.needed_owners} "
            f"of {len(before.owners)} were before). If one owner is in only one of the totals, the difference is its "
            f"{totals}, exactly. A malicious coordinator can arrange that."
        )
    if before.weighting != now.weighting:
        yield (
            f"Owners are weighted by {before.weighting!r} in one and by {now.weighting!r} in the other. With three "
            "owners, one of them can solve the two averages for your weight changes."
        )
    if other_counts := list(_other_counts(before, now)):
        yield (
            f"Other numbers of examples are measured: {', '.join(other_counts)}. The difference is that of the "
            "examples that only one of the totals covers, down to a single example."
        )
    if before.methods != now.methods or (before.hyperparameters != now.hyperparameters and not other_counts):
        yield (
            "Other methods or hyperparameters are used. Each further total of the same rows is one more equation about "
            "them."
        )
    if now.epsilon is None and before.epsilon is not None:
        yield (
            f"That agreement promised epsilon = {before.epsilon:g} for these rows. This one adds no noise, so nothing "
            "of that promise is left."
        )
    if LEAST_SHARE <= repeat.rows < 1:
        yield (
            "The rows are not all the same. The difference covers only the rows that were added or taken away, down to "
            "a single one."
        )
    yield (
        "Metrics of the same examples are summed once more, for other models, which the coordinator sends "
        "(SECURITY.md, b2 and g)."
    )


def _sums_grams(terms: Terms) -> bool:
    return GRAMS in terms.measured or any(isinstance(METHODS.get(name), MultiRoundMethod) for name in terms.methods)


def _other_counts(before: Terms, now: Terms) -> Iterator[str]:
    """What both agreements sum, but of other numbers of examples, in words."""
    for kind, count in before.measured.items():
        if now.measured.get(kind, count) != count:
            yield f"for {MEASURED.get(kind, kind)}, {count:,} before and {now.measured[kind]:,} now"


def _in_json(tables: Mapping[str, Hyperparameters]) -> str:
    return json.dumps({name: table.model_dump(mode="json") for name, table in tables.items()}, sort_keys=True)
