"""A body merged by another method, then one more round: the classifier is refitted on it.

Most of what a merge loses, it loses in the classifier: heads of owners with other labels, and other shares of them, do
not average. For the classifier alone, though, the whole problem is a least squares whose terms are sums over rows. With
f the classifier's input on the merged body, and 1 after it for the bias, each owner adds

    G_i = sum w f f^T      C_i = sum w f t^T

and the coordinator solves (sum G_i) W^T = sum C_i. The targets t are

    labels    onehot - 1/K. A row's weight w is (the share of its class at the owner)^-balance, scaled so that an
              owner's weights add up to its rows; several balances are a sweep. The scores are then multiplied by q,
              which makes them about as large, in the mean, as those of the owners' own models: the decisions stay the
              same, and the probabilities mean something
    scores    what the owner's own model puts out on the row; w = 1. No label is used

Of several labels a row, t is 1/2 for those that it has and -1/2 for the others, so that a fitted score of 0, where a
sigmoid decides, is as near to one as to the other. Of numbers, t is the row's targets, and nothing is scaled. All rows
of both weigh the same: a class whose share could decide has rows with one label.

The factor. With V = (sum G_i)^-1 sum C_i, S the sum of w |z|^2 over rows, z their own models' scores without the mean,
and E the sum of w |t|^2 over rows,

    q^2 (<V, sum C_i> + LEAST_FIT E) = S                  of an owner, S is at least LEAST_FIT E

<V, sum C_i> is the fitted scores' squared size, except for the ridge. It is at most E, and LEAST_FIT keeps q small if
the rows' features say nothing. The coordinator names q, so owners verify it (`ClassifierEquation.factor_share`).

Ridge: every owner adds CLASSIFIER_RIDGE * mean(diag G_i) to its diagonal. For labels it pulls toward zero, for scores
and numbers toward the base's classifier. The terms of the base's classifier, G_i W_0^T, travel too, because merged
models are sent as deltas.

With privacy.epsilon, G and C have noise, as one vector, and every row counts alike, or less if its input is long
(terms.RefitNoise). G_i W_0^T is made of the noised G_i, so it shows nothing more. The ridge is then agreed: what the
noise needs. And as the size of the scores would be one more statistic of rows, S is that of models that give their
label a probability of 0.9.

The body (`body`) is any single-round method that can be refitted, at one value of its alpha.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from common.errors import NumericalError, RuleError
from common.lazy import lazy_module
from common.merge_methods.equations import LARGEST_FACTOR, LEAST_FACTOR, Equation
from common.merge_methods.method import (
    METHODS,
    Measurement,
    MultiRoundMethod,
    NoisedSum,
    SingleRoundMethod,
    Step,
    register,
)
from common.merge_methods.normal_equations import add_ridge, solve_symmetric, spectrum
from common.merge_methods.regmean import MAX_ROWS_PER_EXAMPLE
from common.merge_methods.terms import (
    ClassifierTerms,
    Hyperparameters,
    LayerNote,
    MergedDelta,
    MergeSettings,
    OwnerTerms,
    ProblemType,
    RefitNoise,
    Weighting,
    rounded,
    to_array,
)
from common.models.layers import Layer
from common.models.plan import MergePlan
from common.privacy.noise import bound_with_noise
from common.settings_file import Line, Probability
from common.summation.totals import SummedTensors
from common.tensor_layout import TensorEntry, TensorLayout

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

CLASSIFIER_RIDGE = 1e-2
LEAST_COUNT = 3  # a class with fewer rows weighs as if it had this many
LARGEST_SCORE = 1000.0
LEAST_FIT = 2.0**-10  # of the targets' squared size


class RefitTable(Hyperparameters):
    """`body` merges everything but the classifier. `alpha` is one of the body's alphas: left out, the largest.

    `targets`: the classifier is fitted to the owners' labels, or, without looking at a label, to their models' scores.
    Several `balances` (0: every row weighs the same, 1: every class of an owner weighs the same) are a sweep; in a
    masked sum they need two more honest owners than there are balances.
    """

    body: Line = "data_free"
    alpha: Probability | None = None
    targets: Literal["labels", "scores"] = "labels"
    balances: Annotated[tuple[Probability, ...], Field(min_length=1, max_length=20)] = (0.5,)
    measured_examples: Annotated[int, Field(ge=1)] = 2000


class Refit(MultiRoundMethod[RefitTable]):
    """A merged body with a classifier fitted to it."""

    name = "refit"
    title = "refit"
    phrase = "a refitted classifier on a merged body"
    summary = "a body merged in one round, then the classifier fitted again on it"
    paper = None
    swept_name = "balance of classes"
    swept_summary = "The balance is how much rare classes count: 0 counts rows alike, 1 classes alike."
    order = 10
    table = RefitTable
    trust = "nobody"
    tensor_kinds = MappingProxyType(
        {
            "head_gram": "products of the classifier's inputs on the merged model, summed over {their} rows",
            "head_start": "those products times the base's classifier",
            "head_targets": "the classifier's inputs times what it is fitted to, summed over {their} rows",
            "head_scores": "the size of {their} own model's scores",
            "head_base": "how well the base's classifier meets what the classifier is fitted to",
            "head_rows": "the number of rows that the classifier is fitted to",
        }
    )
    needs_classifier = fits_classifier = True

    def swept(self, tables: Mapping[str, Hyperparameters]) -> tuple[float | None, ...]:
        table = self.of(tables)
        return table.balances if table.targets == "labels" else (None,)

    def check(self, tables: Mapping[str, Hyperparameters]) -> None:
        table, alphas = self.of(tables), self._body(tables).swept(tables)
        if table.alpha is not None and table.alpha not in alphas:
            allowed = [alpha for alpha in alphas if alpha is not None]
            raise ValueError(f"refit.alpha = {table.alpha}: must be one of {table.body}.alphas = {allowed}")

    def noised_sums(self, tables: Mapping[str, Hyperparameters]) -> frozenset[NoisedSum]:
        own: frozenset[NoisedSum] = frozenset({"refit"})
        return own | self._body(tables).noised_sums(tables)

    def least_kept(self, tables: Mapping[str, Hyperparameters], dimension: int) -> float:
        return self._body(tables).least_kept(tables, dimension)

    def check_noised(
        self, tables: Mapping[str, Hyperparameters], weighting: Weighting, problem: ProblemType | None
    ) -> None:
        table = self.of(tables)
        why, hint = "", ""
        body = self._body(tables)
        body.check_noised(tables, weighting, problem)
        if body.reads_rows(tables) and not body.noised_sums(tables):
            why, hint = f'refit.body = "{table.body}" sums statistics of rows, to which no noise is added', ""
        elif table.targets != "labels" or problem == "regression":
            why, hint = "what it is fitted to has no bound", 'agree on refit.targets = "labels", for labels'
        elif problem is None:  # check: noised-examples-are-one-row
            why, hint = "an example has many rows of the classifier's inputs, and the noise hides one", ""
        elif table.balances != (0.0,):  # check: noised-rows-weigh-alike
            why = (
                "refit sums statistics of rows, to which no noise is added unless all rows weigh the same: "
                f"refit.balances = {list(table.balances)}"
            )
            hint = "agree on refit.balances = [0.0]"
        elif weighting != "rows":  # check: noised-owners-weigh-by-rows
            why = f'weighting = "{weighting}": how far one row moves a refit would depend on how many the owner has'
            hint = 'agree on weighting = "rows"'
        if why:
            raise RuleError(f"privacy.epsilon: {why}", hint=hint or "merge by a method that reads no rows")

    def weightings_of_the_same_rows(self, tables: Mapping[str, Hyperparameters]) -> tuple[str, ...]:
        return tuple(f"balance {balance or 0.0!r}" for balance in self.swept(tables))

    def disclosures(self, tables: Mapping[str, Hyperparameters]) -> tuple[str, ...]:
        if self.of(tables).targets == "scores":
            return ()
        return (
            "The classifier is fitted to {their} labels. The total shows how many rows of each label there are, and "
            "the sum of the classifier's inputs on them, summed over the owners. If only one owner has a label, both "
            "are that owner's alone. If the model predicts numbers, it shows the sum of the inputs times them.",
        )

    def noised_disclosures(self, tables: Mapping[str, Hyperparameters]) -> tuple[str, ...]:
        return (
            *self._body(tables).noised_disclosures(tables),
            "The classifier is fitted to {their} labels. The totals have noise, which hides any one row. If many rows "
            "have a label, the totals show roughly how many, and the sum of the classifier's inputs on them.",
        )

    def measurements(self, tables: Mapping[str, Hyperparameters]) -> Mapping[Measurement, int]:
        return self._body(tables).measurements(tables)

    def layout(self, settings: MergeSettings) -> TensorLayout:
        return self._body(settings.tables).layout(settings)

    def contribution(self, settings: MergeSettings, owner: OwnerTerms) -> Iterator[tuple[str, NDArray]]:
        return self._body(settings.tables).contribution(settings, owner)

    def start(self, settings: MergeSettings, total: SummedTensors) -> MergedDelta:
        body = self._body(settings.tables)
        return body.solve(settings, total, self._body_alpha(settings), with_spectra=True)

    def steps(self, settings: MergeSettings) -> tuple[Step, ...]:
        step = Step(
            number=1,
            block=None,
            inputs=settings.plan.inputs[-1:],
            measurement=Measurement.CLASSIFIER,
            max_examples=self.hyperparameters(settings).measured_examples,
        )
        return (step,)

    def merged_names(self, settings: MergeSettings, number: int) -> tuple[str, ...]:
        return settings.plan.changed

    def step_layout(self, settings: MergeSettings, step: Step) -> TensorLayout:
        layer = classifier(settings.plan)
        features = layer.d_in + (layer.bias is not None)
        weight, largest = settings.weight_bound, max(1.0, settings.largest_target)
        bound = weight * max(1.0, settings.bounds.grams[settings.plan.inputs[-1].name])
        of_scores = weight * LARGEST_SCORE**2
        entries = [TensorEntry(name="head_rows", shape=(1,), bound=weight * MAX_ROWS_PER_EXAMPLE)]
        if settings.refit_noise is not None:
            return TensorLayout((*entries, *_noised_entries(settings, settings.refit_noise, features, layer.d_out)))
        for balance in self._balances(settings):
            square, rectangle = (features, features), (features, layer.d_out)
            entries += [
                TensorEntry(name=f"head_gram@{balance!r}", shape=square, bound=bound, packing="symmetric"),
                TensorEntry(name=f"head_start@{balance!r}", shape=rectangle, bound=bound),
                TensorEntry(name=f"head_targets@{balance!r}", shape=rectangle, bound=bound * largest),
            ]
            if self._is_scaled(settings):
                sizes = (f"head_scores@{balance!r}", f"head_base@{balance!r}")
                entries += [TensorEntry(name=name, shape=(1,), bound=of_scores) for name in sizes]
        return TensorLayout(tuple(entries))

    def step_contribution(
        self, settings: MergeSettings, step: Step, owner: OwnerTerms
    ) -> Iterator[tuple[str, NDArray]]:
        terms = owner.classifier
        assert terms is not None  # measured in this step
        rows = len(terms.scores)
        scale = owner.examples / rows if settings.weighting == "rows" else 1 / rows
        if settings.refit_noise is not None:
            yield from self._noised_contribution(settings, settings.refit_noise, owner)
            return
        yield "head_rows", to_array(torch.tensor([scale * rows]))
        sizes = terms.scores  # (rows, classes)
        has_classes = settings.problem_type == "single_label_classification"
        if has_classes:
            sizes = sizes - sizes.mean(dim=1, keepdim=True)  # decisions ignore the mean
        for balance in self._balances(settings):
            weights = torch.full((rows,), scale, dtype=torch.float64)
            if has_classes:
                weights = scale * class_weights(terms.targets, balance)
            weighted = weights[:, None] * terms.features
            gram = add_ridge(weighted.T @ terms.features, CLASSIFIER_RIDGE)  # (features, features) float64
            yield f"head_gram@{balance!r}", to_array(gram)
            yield f"head_start@{balance!r}", to_array(gram @ terms.start)
            targets = self._towards(settings, terms, weighted, gram)
            yield f"head_targets@{balance!r}", to_array(targets)
            if not self._is_scaled(settings):
                continue
            least = LEAST_FIT * _target_size(settings, terms.scores.shape[1]) * scale * rows
            yield f"head_scores@{balance!r}", to_array((weights * (sizes**2).sum(dim=1)).sum()[None].clamp(min=least))
            yield f"head_base@{balance!r}", to_array((targets * terms.start).sum()[None])

    def _noised_contribution(
        self, settings: MergeSettings, bounded: RefitNoise, owner: OwnerTerms
    ) -> Iterator[tuple[str, NDArray]]:
        """Every row counts as one, however many the owner has that were not measured."""
        terms, noise = owner.classifier, owner.noise
        assert terms is not None
        assert noise is not None  # there is one in every round with noise
        gram_name, start_name, targets_name, base_name = _noised_names()
        # A crafted body can make chosen rows overflow. A refusal would reveal that the owner has one.
        is_finite = terms.features.isfinite().all(dim=1, keepdim=True)  # (rows, 1)
        features = torch.where(is_finite, terms.features, 0.0)  # check: rows-without-numbers-add-nothing
        weighted = bounded.weights(features)[:, None] * features  # (rows, features) float64
        gram = torch.from_numpy(noise.added(gram_name, to_array(weighted.T @ features)))
        gram.diagonal().add_(bounded.ridge(settings.num_owners, len(gram)) / settings.num_owners)
        yield "head_rows", to_array(torch.tensor([float(len(features))]))
        yield gram_name, to_array(gram)
        yield start_name, to_array(gram @ terms.start)  # check: no-product-of-exact-grams-leaves
        targets = noise.added(targets_name, to_array(self._towards(settings, terms, weighted, gram)))
        yield targets_name, targets
        yield base_name, (targets * to_array(terms.start)).sum()[None]  # check: no-product-of-exact-targets-leaves

    def _towards(self, settings: MergeSettings, terms: ClassifierTerms, weighted: Tensor, gram: Tensor) -> Tensor:
        """The right-hand side, (features, classes) float64, including the ridge's part."""
        towards = terms.scores
        if self.hyperparameters(settings).targets == "labels":
            match settings.problem_type:
                case "single_label_classification":
                    classes = terms.scores.shape[1]
                    onehot = torch.nn.functional.one_hot(terms.targets, classes).double() - 1 / classes
                    return weighted.T @ onehot
                case "multi_label_classification":
                    return weighted.T @ (terms.targets.double() - 1 / 2)
                case "regression":
                    towards = terms.targets.double()
        without_ridge = weighted.T @ terms.features
        return weighted.T @ towards + (gram - without_ridge) @ terms.start

    def _balances(self, settings: MergeSettings) -> tuple[float, ...]:
        return tuple(0.0 if balance is None else balance for balance in self.swept(settings.tables))

    def solve_step(
        self, settings: MergeSettings, step: Step, total: SummedTensors, hyperparameter: float | None
    ) -> MergedDelta:
        layer, balance = classifier(settings.plan), 0.0 if hyperparameter is None else hyperparameter
        gram = torch.from_numpy(total[f"head_gram@{balance!r}"])
        targets = torch.from_numpy(total[f"head_targets@{balance!r}"])
        error = torch.from_numpy(total.diagonal_error(f"head_gram@{balance!r}"))
        equation, factor = self._equation(settings, balance), 1.0
        if equation.is_scaled:
            fitted, _, _ = solve_symmetric(gram, targets, error, settings.device)  # (features, classes)
            factor = equation.factor_of(fitted, total)
        # Solved for the change at once: the difference of two solutions could be smaller than their rounding.
        _, right = equation.sides(total, factor)
        change, status, unseen = solve_symmetric(gram, right, error, settings.device)
        condition, effective_rank = spectrum(gram, settings.device)
        note = LayerNote(
            name=step.inputs[0].name,
            status=status,
            d_in=layer.d_in,
            gram_size=len(gram),
            rows=round(float(total["head_rows"][0])),
            condition=condition,
            effective_rank=effective_rank,
            unseen_directions=unseen,
        )
        merged = rounded(settings, layer.give(change), layers=(note,))
        return replace(merged, factor=factor)

    def _is_scaled(self, settings: MergeSettings) -> bool:
        """Whether what is fitted has no scale of its own, as 0 and 1 have none."""
        return self.hyperparameters(settings).targets == "labels" and settings.problem_type != "regression"

    def _equation(self, settings: MergeSettings, balance: float) -> ClassifierEquation:
        layer = classifier(settings.plan)
        return ClassifierEquation(
            name=f"head@{balance!r}",
            shape=(layer.d_in + (layer.bias is not None), layer.d_out),
            is_scaled=self._is_scaled(settings),
            layer=layer,
            balance=balance,
            target_size=_target_size(settings, layer.d_out),
            score_size=None if settings.refit_noise is None else _size_if_sure(layer.d_out),
        )

    def start_equations(self, settings: MergeSettings) -> tuple[Equation, ...]:
        return self._body(settings.tables).equations(settings, self._body_alpha(settings))

    def step_equations(self, settings: MergeSettings, step: Step, hyperparameter: float | None) -> tuple[Equation, ...]:
        return (self._equation(settings, 0.0 if hyperparameter is None else hyperparameter),)

    def step_names(self, settings: MergeSettings, step: Step) -> tuple[str, ...]:
        return classifier(settings.plan).parameters

    def _body_alpha(self, settings: MergeSettings) -> float | None:
        alpha = self.hyperparameters(settings).alpha
        if alpha is not None:
            return alpha
        swept = self._body(settings.tables).swept(settings.tables)
        return max((each for each in swept if each is not None), default=None)

    def _body(self, tables: Mapping[str, Hyperparameters]) -> SingleRoundMethod[Hyperparameters]:
        """The method that merges the body. Raises ValueError for one that cannot be refitted."""
        name = self.of(tables).body
        body = METHODS.get(name)
        if not isinstance(body, SingleRoundMethod) or not body.can_be_refitted:
            allowed = sorted(each.name for each in METHODS.values() if each.can_be_refitted)
            raise ValueError(f"refit.body = {name!r}: must be one of {', '.join(allowed)}")
        return body


@dataclass(frozen=True, kw_only=True)
class ClassifierEquation(Equation):
    """(sum G_i) D = q sum C_i - sum G_i W_0^T.

    `target_size`: |t|^2 of a row's targets. `score_size`: the mean of |z|^2, if it is agreed and not summed.
    """

    layer: Layer
    balance: float
    target_size: float
    score_size: float | None

    def part_of(self, delta: Mapping[str, Tensor]) -> Tensor:
        return self.layer.take(delta)

    def sides(self, summed: SummedTensors, factor: float) -> tuple[Tensor, Tensor]:
        targets, start = self._terms(summed)
        return torch.from_numpy(summed[f"head_gram@{self.balance!r}"]), factor * targets - start

    def right_size(self, right: Tensor, summed: SummedTensors, factor: float) -> Tensor:
        targets, start = self._terms(summed)
        return factor * targets.abs() + start.abs()

    def factor_of(self, fitted: Tensor, total: SummedTensors) -> float:
        """q, as at the top of this file, rounded to float32. `fitted`: V, (features, classes)."""
        targets, _ = self._terms(total)
        wanted, least = self._sizes(total)
        size = float((fitted * targets).sum()) + least
        square = wanted / size if size > 0 else 0.0
        if not LEAST_FACTOR**2 <= square <= LARGEST_FACTOR**2:
            raise NumericalError(
                f"refit: own scores of squared size {wanted:g} cannot be matched by fitted ones of {size:g}",
                hint="check that every owner's own model is one that was trained",
            )
        return float(np.float32(square**0.5))

    def factor_share(self, part: Tensor, summed: SummedTensors, factor: float) -> tuple[float, float]:
        """q <W_0 + D, C_i> + q^2 LEAST_FIT E_i - S_i, where W_0 + D is q V except for rounding."""
        targets, _ = self._terms(summed)
        base = float(summed[f"head_base@{self.balance!r}"][0])
        wanted, least = self._sizes(summed)
        change = part.double()
        share = factor * (float((change * targets).sum()) + base) + factor**2 * least - wanted
        size = factor * (float((change.abs() * targets.abs()).sum()) + abs(base)) + factor**2 * least + abs(wanted)
        return share, size

    def _sizes(self, summed: SummedTensors) -> tuple[float, float]:
        """S and LEAST_FIT E."""
        rows = float(summed["head_rows"][0])
        wanted = (
            float(summed[f"head_scores@{self.balance!r}"][0]) if self.score_size is None else rows * self.score_size
        )
        return wanted, LEAST_FIT * self.target_size * rows

    def _terms(self, summed: SummedTensors) -> tuple[Tensor, Tensor]:
        targets, start = (summed[f"{kind}@{self.balance!r}"] for kind in ("head_targets", "head_start"))
        return torch.from_numpy(targets), torch.from_numpy(start)


def classifier(plan: MergePlan) -> Layer:
    """The model's last layer, measured or not. Its bias, if it has one, is fitted with it, whether it is a feature or
    not.
    """
    order = {layer.weight: number for number, layer in enumerate(plan.linear_layers)}
    measured = plan.inputs[-1].layers if plan.inputs else ()
    layer = max((*measured, *plan.data_free[-1:]), key=lambda each: order[each.whole])
    bias = f"{layer.weight.removesuffix('.weight')}.bias"
    return replace(layer, bias=bias if bias in plan.shapes else None)


def class_weights(targets: Tensor, balance: float) -> Tensor:
    """(rows,) float64: (share of the row's class)^-balance, scaled to add up to the number of rows."""
    counts = torch.bincount(targets).clamp(min=LEAST_COUNT).double()
    weights = (counts[targets] / len(targets)) ** -balance
    return weights * len(targets) / weights.sum()


def _noised_names() -> tuple[str, str, str, str]:
    return f"head_gram@{0.0!r}", f"head_start@{0.0!r}", f"head_targets@{0.0!r}", f"head_base@{0.0!r}"


def _noised_entries(settings: MergeSettings, bounded: RefitNoise, features: int, outputs: int) -> Iterator[TensorEntry]:
    """A row adds at most `sensitivity` to any number. The ridge of one owner is part of its Gram."""
    rows = settings.weight_bound * MAX_ROWS_PER_EXAMPLE * bounded.sensitivity + settings.num_owners * bounded.own
    bound = bound_with_noise(rows + bounded.ridge(settings.num_owners, features), bounded.own)
    gram, start, targets, base = _noised_names()
    square, rectangle, own = (features, features), (features, outputs), bounded.own
    yield TensorEntry(name=gram, shape=square, bound=bound, packing="symmetric", noise=own)  # check: grams-have-noise
    yield TensorEntry(name=start, shape=rectangle, bound=bound)
    yield TensorEntry(name=targets, shape=rectangle, bound=bound, noise=own)  # check: products-have-noise
    yield TensorEntry(name=base, shape=(1,), bound=features * outputs * bound)


def _size_if_sure(classes: int) -> float:
    """The squared 2-norm of centred scores that give one of so many labels a probability of 0.9."""
    gap = np.log(9 * (classes - 1)) if classes > 1 else 0.0
    return float(gap**2 * (1 - 1 / classes))


def _target_size(settings: MergeSettings, classes: int) -> float:
    """The squared 2-norm of one row's targets, if they are labels."""
    return classes / 4 if settings.problem_type == "multi_label_classification" else max(classes - 1, 1) / classes


REFIT = register(Refit())
