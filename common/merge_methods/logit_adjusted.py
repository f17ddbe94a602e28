"""A body merged by another method, and a classifier that does not prefer frequent labels (Menon et al., ICLR 2021).

Owners whose labels are skewed train classifiers that rather predict what is frequent, and a merge adds these habits up.
Logit adjustment (arXiv 2007.07314, section 4.1, equation 9) subtracts tau * log(the label's share) from each score:

    b = b_body - tau * (l - its mean over the K labels),        l = sum w_i l_i / sum w_i
    l_i = log((p_i + SMOOTHING / K) / (1 + SMOOTHING))          shares of labels at owner i, none of them zero

The paper has one model, and estimates p by counting labels. Here p_i are the mean probabilities that the owner's own
model gives the labels of its rows; no label is read. Only the classifier's bias changes.

A merged classifier is about the mean of the owners' classifiers, so it prefers what they prefer in the mean: l is a
mean of logarithms, not the logarithm of mean shares, which a label has that one owner sees often and no other at all.
(benchmarks/README.md: better by 0.004 to 0.010 macro F1 at tau = 0.5, and more accurate.)

l is linear in what the owners sum. So it travels with the merged delta, is verified with it, and every owner then
computes the bias itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import log
from typing import TYPE_CHECKING, Annotated

from numpy.typing import NDArray
from pydantic import Field

from common.errors import SettingsError
from common.lazy import lazy_module
from common.merge_methods.equations import Equation, MeanEquation
from common.merge_methods.method import METHODS, Measurement, SingleRoundMethod, register
from common.merge_methods.refit import classifier
from common.merge_methods.terms import (
    WEIGHT_KINDS,
    Hyperparameters,
    MergedDelta,
    MergeSettings,
    OwnerTerms,
    owner_weight,
    rounded,
    to_array,
)
from common.models.plan import MergePlan
from common.settings_file import Line, Probability
from common.summation.totals import SummedTensors
from common.tensor_layout import TensorEntry, TensorLayout

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

SHARES = "log_class_share"  # what is solved beside the body
SMOOTHING = 1e-2  # how much of a label's fair share a label has that nobody predicts


class LogitAdjustedTable(Hyperparameters):
    """`body` merges everything but the classifier's bias, at its largest alpha. Several `strengths` are a sweep."""

    body: Line = "data_free"
    strengths: Annotated[tuple[Probability, ...], Field(min_length=1, max_length=20)] = (0.5,)
    measured_examples: Annotated[int, Field(ge=1)] = 1000


class LogitAdjusted(SingleRoundMethod[LogitAdjustedTable]):
    """A merged body whose classifier does without the owners' preference for frequent labels."""

    name = "logit_adjusted"
    title = "logit adjustment"
    phrase = "a merged body with adjusted logits"
    summary = "a body merged in one round, whose classifier prefers frequent labels less"
    paper = "Menon et al., ICLR 2021, arXiv 2007.07314"
    swept_name = "strength"
    swept_summary = "The strength is how much of the preference for frequent labels is taken away: 0 leaves it."
    order = 9
    table = LogitAdjustedTable
    trust = "nobody"
    tensor_kinds = WEIGHT_KINDS | {
        SHARES: "logarithms of how often {their} own model predicts each label on {their} rows"
    }
    fits_32_bits = True
    needs_classifier = True

    def swept(self, tables: Mapping[str, Hyperparameters]) -> tuple[float, ...]:
        return self.of(tables).strengths

    def check(self, tables: Mapping[str, Hyperparameters]) -> None:
        self._body(tables)

    def disclosures(self, tables: Mapping[str, Hyperparameters]) -> tuple[str, ...]:
        return (
            "The total shows the mean logarithm of how often the owners' models predict each label on their own rows: "
            "roughly, how frequent each label is. If only one owner has a label, it shows how frequent it is there.",
            *self._body(tables).disclosures(tables),
        )

    def measurements(self, tables: Mapping[str, Hyperparameters]) -> Mapping[Measurement, int]:
        measured = self._body(tables).measurements(tables)
        return {**measured, Measurement.CLASS_SHARES: self.of(tables).measured_examples}

    def layout(self, settings: MergeSettings) -> TensorLayout:
        classes = _classes(settings.plan)
        shares = TensorEntry(name=SHARES, shape=(classes,), bound=-settings.weight_bound * least_log_share(classes))
        return TensorLayout((*self._body(settings.tables).layout(settings).entries, shares))

    def contribution(self, settings: MergeSettings, owner: OwnerTerms) -> Iterator[tuple[str, NDArray]]:
        yield from self._body(settings.tables).contribution(settings, owner)
        assert owner.class_shares is not None  # measured, as this method asked for
        shares = (owner.class_shares + SMOOTHING / len(owner.class_shares)) / (1 + SMOOTHING)  # (classes,) float64
        yield SHARES, to_array(owner_weight(settings, owner) * shares.log())

    def solve(
        self, settings: MergeSettings, total: SummedTensors, hyperparameter: float | None, *, with_spectra: bool
    ) -> MergedDelta:
        body = self._body(settings.tables)
        merged = body.solve(settings, total, self._body_alpha(settings), with_spectra=with_spectra)
        shares = rounded(settings, {SHARES: torch.from_numpy(total[SHARES] / total["weight"][0])})
        merged = replace(merged, beside=shares.beside, rest={**merged.rest, **shares.rest})
        return self.applied_to(settings, merged, hyperparameter)

    def equations(self, settings: MergeSettings, hyperparameter: float | None) -> tuple[Equation, ...]:
        body = self._body(settings.tables).equations(settings, self._body_alpha(settings))
        return (*body, MeanEquation.of(SHARES, (_classes(settings.plan),), weighted=SHARES))

    def beside(self, settings: MergeSettings) -> tuple[TensorEntry, ...]:
        return (TensorEntry(name=SHARES, shape=(_classes(settings.plan),), bound=float("inf")),)

    def applied(self, settings: MergeSettings) -> tuple[str, ...]:
        return (_bias(settings.plan),)

    def apply(
        self, settings: MergeSettings, solved: Mapping[str, Tensor], hyperparameter: float | None
    ) -> Iterator[tuple[str, Tensor]]:
        assert hyperparameter is not None
        (bias,) = self.applied(settings)
        logs = solved[SHARES].double()  # (classes,)
        yield bias, solved[bias].double() - hyperparameter * (logs - logs.mean())

    def _body_alpha(self, settings: MergeSettings) -> float | None:
        swept = self._body(settings.tables).swept(settings.tables)
        return max((each for each in swept if each is not None), default=None)

    def _body(self, tables: Mapping[str, Hyperparameters]) -> SingleRoundMethod[Hyperparameters]:
        """The method that merges the body. Raises ValueError for one that has a function of its own."""
        body = METHODS.get(self.of(tables).body)
        if not isinstance(body, SingleRoundMethod) or not body.can_be_refitted:
            allowed = sorted(each.name for each in METHODS.values() if each.can_be_refitted)
            raise ValueError(f"logit_adjusted.body = {self.of(tables).body!r}: must be one of {', '.join(allowed)}")
        return body


def least_log_share(classes: int) -> float:
    """The logarithm of the share of a label that an owner's model never predicts."""
    return log(SMOOTHING / classes / (1 + SMOOTHING))


def _classes(plan: MergePlan) -> int:
    return classifier(plan).d_out


def _bias(plan: MergePlan) -> str:
    bias = classifier(plan).bias
    if bias is None:
        raise SettingsError(
            "logit_adjusted: the model's classifier has no bias, which is what this method changes",
            hint='use method = "data_free", or "refit"',
        )
    return bias


LOGIT_ADJUSTED = register(LogitAdjusted())
