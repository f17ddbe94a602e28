"""Merge methods against slow, obvious oracles: the sums go through the real layout and the real plain sum."""

import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from unittest.mock import patch
from weakref import ref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import Tensor

from common import merge_methods
from common.agreement import Agreement
from common.errors import NumericalError
from common.identity import Identity
from common.merge_methods import METHODS, ORDERED, contribution_layout, kind_of, measurements, tensor_kinds
from common.merge_methods.data_free import DataFreeTable
from common.merge_methods.method import Measurement, Method, MultiRoundMethod, SingleRoundMethod
from common.merge_methods.normal_equations import solve_symmetric, spectrum
from common.merge_methods.refit import CLASSIFIER_RIDGE, REFIT, RefitTable
from common.merge_methods.regmean import RegMeanTable
from common.merge_methods.task_arithmetic import TASK_ARITHMETIC, TaskArithmeticTable
from common.merge_methods.terms import (
    ClassifierTerms,
    Gram,
    Hyperparameters,
    MergedDelta,
    MergeSettings,
    OwnerTerms,
    ProblemType,
    Weighting,
    owner_weight,
)
from common.models.plan import MergePlan
from common.settings_file import Name
from tests.support.merging import (
    exact,
    merge_settings,
    merged_in_float64,
    owner_for,
    plan_for,
    total_of,
    without_rounding,
)
from tests.support.sums import run, terms_of

TOGETHER = ("regmean", "average", "task_arithmetic", "fisher")  # in one sum
SINGLE_ROUND = sorted(name for name, method in METHODS.items() if isinstance(method, SingleRoundMethod))


def merged(settings: MergeSettings, owners: Mapping[str, OwnerTerms], alpha: float) -> Mapping[str, Tensor]:
    """RegMean's merged delta, float64."""
    return merged_in_float64("regmean", settings, total_of(TOGETHER, settings, owners), alpha).delta


@given(
    d_in=st.integers(1, 8),
    d_outs=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    num_owners=st.integers(2, 4),
    seed=st.integers(0, 2**32 - 1),
    input_first=st.booleans(),
    has_constant=st.booleans(),
)
def test_regmean_with_alpha_1_equals_pooled_least_squares(
    d_in: int, d_outs: list[int], num_owners: int, seed: int, input_first: bool, has_constant: bool
) -> None:
    plan = plan_for(d_in, d_outs, stored_input_first=input_first, has_constant=has_constant)
    random = torch.Generator().manual_seed(seed)
    all_rows = [torch.randn(4 * d_in + 5, d_in, generator=random, dtype=torch.float64) for _ in range(num_owners)]
    if has_constant:
        all_rows = [torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1) for rows in all_rows]
    owners = {f"o{index}": owner_for(plan, rows, seed + index) for index, rows in enumerate(all_rows)}
    delta = merged(exact(plan), owners, alpha=1.0)
    stacked = torch.cat(all_rows)  # (all rows, gram_size)
    for layer in plan.layers():
        targets = torch.cat(
            [rows @ layer.take(owner.delta) for rows, owner in zip(all_rows, owners.values(), strict=True)]
        )
        pooled = torch.linalg.lstsq(stacked, targets, driver="gelsd").solution  # (gram_size, d_out)
        error = (layer.take(delta) - pooled).norm() / pooled.norm()
        assert error < 1e-9


@given(seed=st.integers(0, 2**32 - 1), alpha=st.floats(0.0, 1.0))
def test_deltas_give_what_the_published_closed_form_gives_on_weights(seed: int, alpha: float) -> None:
    plan = plan_for(5, [4])
    random = torch.Generator().manual_seed(seed)
    base = torch.randn(4, 5, generator=random, dtype=torch.float64)
    owners = {
        f"o{index}": owner_for(plan, torch.randn(30, 5, generator=random, dtype=torch.float64), seed + index)
        for index in range(3)
    }
    left, right = torch.zeros(5, 5, dtype=torch.float64), torch.zeros(5, 4, dtype=torch.float64)
    for owner in owners.values():  # equation 2 of the paper, with the scaled Gram of its section 3.2
        gram = owner.grams["l0"].matrix
        scaled = alpha * gram + (1 - alpha) * torch.diag(gram.diagonal())
        left += scaled
        right += scaled @ (base + owner.delta["l0.weight"]).T
    published = torch.linalg.solve(left, right).T
    delta = merged(exact(plan), owners, alpha)["l0.weight"]
    torch.testing.assert_close(base + delta, published, rtol=1e-9, atol=1e-9)


def two_owners(gram_1: list, delta_1: list, gram_2: list, delta_2: list) -> tuple[MergePlan, dict[str, OwnerTerms]]:
    plan = plan_for(2, [1])
    owners = {}
    for name, gram, delta in (("ada", gram_1, delta_1), ("bea", gram_2, delta_2)):
        owner = owner_for(plan, torch.zeros(1, 2, dtype=torch.float64), seed=0)
        matrix = torch.tensor(gram, dtype=torch.float64)
        weights = {**owner.delta, "l0.weight": torch.tensor([delta], dtype=torch.float64)}
        owners[name] = replace(owner, delta=weights, grams={"l0": Gram(matrix=matrix, rows=1)})
    return plan, owners


def test_a_2x2_case_solved_by_hand() -> None:
    # (diag(1,3) + diag(3,1)) d = diag(1,3) (1,1) + diag(3,1) (-1,2)  ->  4 d = (-2, 5)
    _, owners = two_owners([[1, 0], [0, 3]], [1, 1], [[3, 0], [0, 1]], [-1, 2])
    left = sum(owner.grams["l0"].matrix for owner in owners.values())
    right = sum(owner.grams["l0"].matrix @ owner.delta["l0.weight"].T for owner in owners.values())
    solved, status, _ = solve_symmetric(left, right)
    torch.testing.assert_close(solved[:, 0], torch.tensor([-0.5, 1.25], dtype=torch.float64))
    assert status == "solved"


def test_a_2x2_case_with_off_diagonals_solved_by_hand() -> None:
    # G_1 = [[2,1],[1,2]], delta_1 = (1,0); G_2 = [[1,0],[0,1]], delta_2 = (0,1); alpha = 1:
    # [[3,1],[1,3]] d = (2,1) + (0,1) = (2,2)  ->  d = (1/2, 1/2)
    # alpha = 1/2: [[3,.5],[.5,3]] d = (2,.5) + (0,1) = (2,1.5)  ->  d = (5.25, 3.5) / 8.75 = (0.6, 0.4)
    plan, owners = two_owners([[2, 1], [1, 2]], [1, 0], [[1, 0], [0, 1]], [0, 1])
    for alpha, expected in ((1.0, [[0.5, 0.5]]), (0.5, [[0.6, 0.4]])):
        delta = merged(exact(plan), owners, alpha)["l0.weight"]
        torch.testing.assert_close(delta, torch.tensor(expected, dtype=torch.float64))


def test_a_fixed_alpha_sends_fewer_tensors_and_gives_the_same_model() -> None:
    plan = plan_for(6, [4, 2])
    owners = {f"o{i}": owner_for(plan, torch.randn(40, 6, dtype=torch.float64), i) for i in range(3)}
    sweep, fixed = exact(plan, alphas=(0.3, 0.9)), exact(plan, alphas=(0.9,))
    assert contribution_layout(TOGETHER, fixed).size < contribution_layout(TOGETHER, sweep).size
    for name, tensor in merged(fixed, owners, 0.9).items():
        torch.testing.assert_close(tensor, merged(sweep, owners, 0.9)[name], rtol=1e-10, atol=1e-10)


def test_equal_grams_make_regmean_the_mean() -> None:
    plan = plan_for(6, [4])
    rows = torch.randn(40, 6, dtype=torch.float64)
    owners = {f"o{i}": owner_for(plan, rows, i) for i in range(3)}
    mean = torch.stack([owner.delta["l0.weight"] for owner in owners.values()]).mean(0)
    torch.testing.assert_close(merged(merge_settings(plan), owners, 0.7)["l0.weight"], mean)


def test_ridge_pulls_toward_the_mean_delta_and_never_toward_zero() -> None:
    plan = plan_for(6, [4])
    rows = torch.randn(40, 6, dtype=torch.float64)
    rows /= (rows**2).mean().sqrt()
    owners = {f"o{i}": owner_for(plan, rows @ torch.linalg.qr(torch.randn(6, 6).double())[0], i) for i in range(3)}
    mean = torch.stack([owner.delta["l0.weight"] for owner in owners.values()]).mean(0)

    def distance(ridge: float) -> float:
        with_ridge = merge_settings(plan, regmean=RegMeanTable.model_construct(alphas=(1.0,), ridge=ridge))
        return float((merged(with_ridge, owners, 1.0)["l0.weight"] - mean).norm())

    assert distance(0.0) > distance(1.0) > distance(1e4)
    assert distance(1e4) < 1e-3


def test_weighting_by_owners_ignores_how_many_rows_an_owner_has() -> None:
    plan = plan_for(3, [2])
    rows = torch.randn(20, 3, dtype=torch.float64), torch.randn(25, 3, dtype=torch.float64)
    once = {"ada": owner_for(plan, rows[0], 0), "bea": owner_for(plan, rows[1], 1)}
    often = {**once, "bea": owner_for(plan, rows[1].repeat(7, 1), 1)}
    one, other = (merged(exact(plan, "owners"), owners, 0.9)["l0.weight"] for owners in (once, often))
    torch.testing.assert_close(one, other)
    one, other = (merged(exact(plan, "rows"), owners, 0.9)["l0.weight"] for owners in (once, often))
    assert (one - other).norm() > 1e-3


def test_a_gram_of_sampled_rows_counts_for_all_of_the_owner_s_examples() -> None:
    plan = plan_for(3, [2])
    rows = torch.randn(20, 3, dtype=torch.float64)
    full = owner_for(plan, rows.repeat(4, 1), 0)
    sampled = replace(owner_for(plan, rows, 0), examples=80, gram_examples=20)
    other = owner_for(plan, torch.randn(25, 3, dtype=torch.float64), 1)
    one, two = (merged(exact(plan), {"ada": ada, "bea": other}, 0.9)["l0.weight"] for ada in (full, sampled))
    torch.testing.assert_close(one, two)


# --- sums that cannot be solved ---------------------------------------------------------------------------------------


def solve_reported(settings: MergeSettings, owners: Mapping[str, OwnerTerms]) -> MergedDelta:
    result = merged_in_float64("regmean", settings, total_of(TOGETHER, settings, owners), 1.0)
    assert all(torch.isfinite(tensor).all() for tensor in result.delta.values())
    return result


@given(seed=st.integers(0, 2**32))
@settings(max_examples=200)
def test_a_singular_sum_keeps_the_base_in_unseen_directions_and_says_so(seed: int) -> None:
    plan = plan_for(6, [4])
    random = partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = [random(30, 2) @ random(2, 6) for _ in range(2)]
    owners = {f"o{index}": owner_for(plan, owned, index) for index, owned in enumerate(rows)}
    result = solve_reported(exact(plan), owners)
    (layer,) = result.layers
    assert (layer.status, layer.unseen_directions) == ("singular", 2)
    assert layer.condition is None or layer.condition > 1e12
    assert "singular; 2 of 6 directions keep the base's behaviour" in result.notes[0]
    stacked, delta = torch.cat(rows), result.delta["l0.weight"].double()
    targets = torch.cat(
        [owned @ owner.delta["l0.weight"].T for owned, owner in zip(rows, owners.values(), strict=True)]
    )
    pooled = torch.linalg.lstsq(stacked, targets, driver="gelsd").solution.T  # minimum norm, too
    torch.testing.assert_close(delta, pooled, rtol=1e-6, atol=1e-6)


def test_an_empty_sum_keeps_the_base_s_weights_and_says_so() -> None:
    plan = plan_for(6, [4])
    owners = {f"o{index}": owner_for(plan, torch.zeros(0, 6, dtype=torch.float64), index) for index in range(2)}
    result = solve_reported(merge_settings(plan), owners)
    assert result.layers[0].status == "empty"
    assert result.layers[0].rows == 0
    assert not result.delta["l0.weight"].any()
    assert "empty" in result.notes[0]


def test_an_indefinite_sum_is_reported_and_gives_finite_weights() -> None:
    plan = plan_for(6, [4])
    owners = {f"o{index}": owner_for(plan, torch.randn(30, 6, dtype=torch.float64), index) for index in range(2)}
    liar = Gram(matrix=-10 * owners["o1"].grams["l0"].matrix, rows=30)
    owners["o1"] = replace(owners["o1"], grams={"l0": liar})
    result = solve_reported(exact(plan), owners)
    assert result.layers[0].status == "indefinite"
    assert "indefinite" in result.notes[0]


def test_a_merged_delta_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(NumericalError, match="the merged delta of w is not finite"):
        MergedDelta(delta={"w": torch.tensor([1.0, float("nan")])})


def test_a_merged_delta_that_is_read_when_asked_for_is_never_whole_in_memory() -> None:
    made: list[ref[Tensor]] = []

    class Read(Mapping[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            tensor = torch.ones(3)
            made.append(ref(tensor))
            assert sum(each() is not None for each in made) <= 2  # the last one may still have a name
            return tensor

        def __iter__(self) -> Iterator[str]:
            return iter("abcdefgh")

        def __len__(self) -> int:
            return 8

    MergedDelta(delta=Read())
    assert len(made) == 8


def test_conditioning_and_rank_are_those_of_the_spectrum() -> None:
    condition, rank = spectrum(torch.diag(torch.tensor([8.0, 4, 2, 1], dtype=torch.float64)))
    assert condition == pytest.approx(8)
    shares = np.array([8, 4, 2, 1]) / 15
    assert rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert spectrum(torch.eye(5, dtype=torch.float64))[1] == pytest.approx(5)


@pytest.mark.parametrize(("method", "hyperparameter"), [("regmean", 0.9), ("data_free", 1.0)])
def test_a_sweep_gives_the_same_models_and_spares_the_spectra(method: str, hyperparameter: float) -> None:
    plan = plan_for(3, [2])
    settings = merge_settings(plan)
    total = total_of([method], settings, three_owners(plan))
    published, tried = (
        merged_in_float64(method, settings, total, hyperparameter, with_spectra=with_spectra)
        for with_spectra in (True, False)
    )
    assert all(torch.equal(published.delta[name], tried.delta[name]) for name in plan.shapes)
    assert all(note.condition and note.effective_rank for note in published.layers)
    assert tried.layers
    assert all(note.condition is None and note.effective_rank is None for note in tried.layers)


# --- the other methods ------------------------------------------------------------------------------------------------


def three_owners(plan: MergePlan) -> dict[str, OwnerTerms]:
    return {f"o{i}": owner_for(plan, torch.randn(10 * (i + 1), 3, dtype=torch.float64), i) for i in range(3)}


def solved(
    method: str, hyperparameter: float | None = None, settings: MergeSettings | None = None
) -> tuple[dict[str, OwnerTerms], MergedDelta]:
    settings = settings or merge_settings(plan_for(3, [2]))
    owners = three_owners(settings.plan)
    return owners, merged_in_float64(method, settings, total_of(TOGETHER, settings, owners), hyperparameter)


def by_owners() -> MergeSettings:
    """Every owner counts alike."""
    return merge_settings(plan_for(3, [2]), "owners")


def test_average_is_the_mean_weighted_by_examples() -> None:
    owners, result = solved("average")
    for name, tensor in result.delta.items():
        expected = sum(owner.examples * owner.delta[name] for owner in owners.values()) / 60
        torch.testing.assert_close(tensor, expected)


def test_average_by_owners_is_the_plain_mean() -> None:
    owners, result = solved("average", settings=by_owners())
    for name, tensor in result.delta.items():
        torch.testing.assert_close(tensor, torch.stack([owner.delta[name] for owner in owners.values()]).mean(0))


def test_task_arithmetic_by_owners_is_the_scaled_sum() -> None:
    owners, result = solved("task_arithmetic", 0.3, by_owners())
    for name, tensor in result.delta.items():
        torch.testing.assert_close(tensor, 0.3 * sum(owner.delta[name] for owner in owners.values()))


def test_task_arithmetic_by_rows_is_the_scaled_average_times_the_owners() -> None:
    owners, result = solved("task_arithmetic", 0.3)
    for name, tensor in result.delta.items():
        weighted = sum(owner.examples * owner.delta[name] for owner in owners.values()) / 60
        torch.testing.assert_close(tensor, 0.3 * 3 * weighted)


def test_fisher_weights_every_entry_by_its_information() -> None:
    owners, result = solved("fisher")
    for name, tensor in result.delta.items():
        weights = [owner.examples * owner.fisher[name] for owner in owners.values()]
        products = [weight * owner.delta[name] for weight, owner in zip(weights, owners.values(), strict=True)]
        torch.testing.assert_close(tensor, sum(products) / sum(weights))


def test_fisher_takes_the_mean_where_there_is_no_information_and_reports_it() -> None:
    plan = plan_for(3, [2])
    owners = three_owners(plan)
    for owner in owners.values():
        owner.fisher["l0.weight"][0, 0] = 0
        owner.fisher["bias"].zero_()
    settings = merge_settings(plan)
    result = merged_in_float64("fisher", settings, total_of(TOGETHER, settings, owners))
    mean = sum(owner.examples * owner.delta["bias"] for owner in owners.values()) / 60
    torch.testing.assert_close(result.delta["bias"], mean)
    assert result.notes[0].startswith("4 of 9 parameters")


# --- the data-free Gram -----------------------------------------------------------------------------------------------


NO_RIDGE = DataFreeTable(ridge=0.0)


@pytest.mark.parametrize("weighting", ["rows", "owners"])
@pytest.mark.parametrize("stored_input_first", [False, True])
def test_data_free_is_pooled_least_squares_on_the_weight_changes_themselves(
    weighting: Weighting, stored_input_first: bool
) -> None:
    plan = plan_for(4, [6, 3], stored_input_first=stored_input_first)
    owners = {f"o{i}": owner_for(plan, torch.randn(10 * (i + 1), 4, dtype=torch.float64), i) for i in range(3)}
    settings = merge_settings(plan, weighting, data_free=NO_RIDGE)
    result = merged_in_float64("data_free", settings, total_of(["data_free"], settings, owners), 1.0)
    for layer in plan.layers():
        rows, targets = [], []
        for owner in owners.values():
            delta = layer.take(owner.delta)  # (d_in, d_out); its rows as a linear layer's inputs are its columns
            weight = owner.examples**0.5 if weighting == "rows" else 1.0
            rows.append(weight * delta.T / delta.norm())
            targets.append(rows[-1] @ delta)
        pooled = torch.linalg.lstsq(torch.cat(rows), torch.cat(targets), driver="gelsd").solution
        torch.testing.assert_close(layer.take(result.delta), pooled, rtol=1e-7, atol=1e-7)
    mean = sum(owner_weight(settings, owner) * owner.delta["bias"] for owner in owners.values())
    total_weight = sum(owner_weight(settings, owner) for owner in owners.values())
    torch.testing.assert_close(result.delta["bias"], mean / total_weight)
    assert [note.rows for note in result.layers] == [None, None]


def test_a_layer_that_nobody_changed_stays_as_it_is() -> None:
    plan = plan_for(3, [2])
    owners = three_owners(plan)
    for owner in owners.values():
        owner.delta["l0.weight"].zero_()
    settings = merge_settings(plan)
    result = merged_in_float64("data_free", settings, total_of(["data_free"], settings, owners), 1.0)
    assert result.layers[0].status == "empty"
    assert not result.delta["l0.weight"].any()


def test_single_layers_of_regmean_can_be_data_free_and_are_sent_once() -> None:
    plan = plan_for(4, [6, 3])
    first, second = plan.layers()
    (shared,) = plan.inputs
    mixed = replace(plan, inputs=(replace(shared, layers=(first,)),), data_free=(second,))
    owners = {f"o{i}": owner_for(plan, torch.randn(30, 4, dtype=torch.float64), i) for i in range(3)}
    settings = merge_settings(mixed, regmean=RegMeanTable(ridge=0.0), data_free=NO_RIDGE)
    total = total_of(["regmean", "data_free"], settings, owners)
    by_inputs = merged(exact(plan), owners, alpha=0.9)
    by_changes = merged_in_float64("data_free", settings, total, 1.0).delta
    result = merged_in_float64("regmean", settings, total, 0.9)
    torch.testing.assert_close(result.delta[first.weight], by_inputs[first.weight], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.delta[second.weight], by_changes[second.weight], rtol=1e-9, atol=1e-9)
    assert [(note.name, note.rows) for note in result.layers] == [("l0", 90), ("l1", None)]


@pytest.mark.parametrize("value", [64.0, 1e-6])
def test_the_largest_changes_that_an_agreement_allows_fit_a_data_free_sum(value: float) -> None:
    plan = plan_for(5, [4])
    rows = torch.randn(10_000, 5, dtype=torch.float64)
    owners = {f"o{i}": owner_for(plan, rows, i) for i in range(3)}
    for owner in owners.values():
        owner.delta["l0.weight"].fill_(value)
    settings = merge_settings(plan, data_free=DataFreeTable(alphas=(0.0, 1.0), ridge=1.0))
    for alpha in (0.0, 1.0):
        result = merged_in_float64("data_free", settings, total_of(["data_free"], settings, owners), alpha)
        torch.testing.assert_close(result.delta["l0.weight"], owners["o0"].delta["l0.weight"])


# --- all methods ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SINGLE_ROUND)
def test_every_method_sees_only_sums_and_changes_every_parameter(method: str) -> None:
    plan = plan_for(3, [2], has_bias=True)
    settings = merge_settings(plan, "owners" if method == "model_stock" else "rows")
    total = total_of([method], settings, three_owners(plan))
    for name, hyperparameter in METHODS[method].candidates(settings.tables).items():
        assert name.startswith(method)
        assert set(merged_in_float64(method, settings, total, hyperparameter).published) == set(plan.shapes)
    measured = {
        "regmean": {Measurement.GRAMS},
        "anchored": {Measurement.GRAMS},
        "lorm": {Measurement.GRAMS},
        "fisher": {Measurement.FISHER},
        "logit_adjusted": {Measurement.CLASS_SHARES},
    }
    assert set(measurements([method], settings.tables)) == measured.get(method, set())


@pytest.mark.parametrize(("body", "alpha"), [("average", None), ("data_free", 1.0), ("regmean", 0.99)])
def test_refit_begins_with_the_body_that_was_agreed_at_the_largest_alpha(body: str, alpha: float | None) -> None:
    plan = plan_for(3, [2])
    settings = merge_settings(plan, refit=RefitTable(body=body))
    owners = three_owners(plan)
    assert measurements(["refit"], settings.tables) == measurements([body], settings.tables)
    with without_rounding():
        started = REFIT.start(settings, total_of(["refit"], settings, owners))
    expected = merged_in_float64(body, settings, total_of([body], settings, owners), alpha)
    assert started.delta.keys() == expected.delta.keys()
    assert all(torch.equal(started.delta[name], expected.delta[name]) for name in expected.delta)


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_refit_to_several_labels_or_to_numbers_is_least_squares_over_all_rows(problem_type: ProblemType) -> None:
    """Pooled and solved at once: to 1/2 and -1/2 up to a positive factor, or to the numbers themselves."""
    random, is_regression = torch.Generator().manual_seed(0), problem_type == "regression"
    plan = plan_for(6, [3], has_constant=True)
    settings = replace(
        merge_settings(plan, refit=RefitTable(balances=(0.0,))), problem_type=problem_type, largest_target=50.0
    )
    step = REFIT.steps(settings)[0]
    layout = REFIT.step_layout(settings, step)
    start = torch.randn(7, 3, generator=random).double()
    grams, right, vectors = torch.zeros(7, 7).double(), torch.zeros(7, 3).double(), {}
    for name, rows in (("ada", 40), ("bea", 90), ("cyd", 70)):
        features = torch.cat([torch.randn(rows, 6, generator=random), torch.ones(rows, 1)], dim=1).double()
        targets = features.float() @ torch.randn(7, 3, generator=random)
        targets = 10 * targets.clamp(-5, 5) if is_regression else (targets > 0.5).float()
        scores = torch.randn(rows, 3, generator=random).double()
        terms = ClassifierTerms(features=features, targets=targets, scores=scores, start=start)
        vectors[name] = np.zeros(layout.size)
        owner = OwnerTerms(examples=rows, delta={}, classifier=terms)
        layout.flatten(REFIT.step_contribution(settings, step, owner), vectors[name])
        gram = features.T @ features
        ridge = CLASSIFIER_RIDGE * gram.diagonal().mean() * torch.eye(7).double()
        grams += gram + ridge
        right += features.T @ (targets.double() if is_regression else targets.double() - 0.5)
        right += ridge @ start if is_regression else 0
    identities = {name: Identity(name=name, seed=name.encode().ljust(32)) for name in vectors}
    merged = REFIT.solve_step(settings, step, run("plain", identities, terms_of(identities, layout), vectors), 0.0)
    found = start + plan.inputs[-1].layers[0].take(merged.delta).double()
    expected = torch.linalg.solve(grams, right)
    assert (merged.factor == 1.0) == is_regression
    torch.testing.assert_close(found, merged.factor * expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("alphas", [(0.5,), (0.5, 1.0)])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "search"])  # nothing leaves for it
def test_every_kind_of_tensor_that_leaves_has_a_meaning(
    agreement: Agreement, plan: MergePlan, method: str, alphas: tuple[float, ...]
) -> None:
    """On a whole model: of the round that all methods share, and of every step."""
    changes = {"regmean": RegMeanTable(alphas=alphas), "data_free": DataFreeTable(alphas=alphas)}
    settings = agreement.model_copy(update=changes).merge_settings(plan)
    if method == "model_stock":
        settings = replace(settings, weighting="owners")
    descriptor = METHODS[method]
    layouts = [descriptor.layout(settings)]
    if isinstance(descriptor, MultiRoundMethod):
        layouts += [descriptor.step_layout(settings, step) for step in descriptor.steps(settings)]
    kinds = {kind_of(entry.name) for layout in layouts for entry in layout.entries}
    assert kinds
    assert kinds <= set(tensor_kinds())
    assert all(tensor_kinds()[kind].format(their="your") for kind in kinds)


def test_a_tensor_that_several_methods_need_is_sent_once() -> None:
    names = [entry.name for entry in contribution_layout(TOGETHER, merge_settings(plan_for(3, [2]))).entries]
    assert len(names) == len(set(names))
    assert "weighted_delta/l0.weight" in names


def test_a_sweep_names_its_candidates_and_a_single_value_needs_no_name() -> None:
    plan = plan_for(3, [2])
    swept = TASK_ARITHMETIC.candidates(merge_settings(plan).tables)
    assert list(swept) == [f"task_arithmetic@{scale}" for scale in ("0.3", "0.5", "1.0")]
    single = merge_settings(plan, task_arithmetic=TaskArithmeticTable(scales=(0.4,)))
    assert TASK_ARITHMETIC.candidates(single.tables) == {"task_arithmetic": 0.4}


# --- the descriptors --------------------------------------------------------------------------------------------------


def test_every_file_of_the_folder_that_registers_a_method_is_named_after_it() -> None:
    (folder,) = merge_methods.__path__
    registering = {path.stem for path in Path(folder).glob("*.py") if "= register(" in path.read_text()}
    assert registering == set(METHODS)
    for name, method in METHODS.items():
        assert method.name == name
        assert type(method).__module__ == f"common.merge_methods.{name}"


def test_a_file_that_is_dropped_into_the_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried on a package with the folder's own __init__.py and one new file."""
    package = tmp_path / "more_methods"
    package.mkdir()
    shutil.copy(merge_methods.__file__, package)
    (package / "dropped.py").write_text(
        "from common.merge_methods.average import Average\n"
        "from common.merge_methods.method import register\n"
        "class Dropped(Average):\n    name = 'dropped'\n    order = 99\n"
        "register(Dropped())\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with patch.dict(METHODS), patch.dict(sys.modules):
        found = import_module("more_methods")
        assert [method.name for method in found.ORDERED] == [*(method.name for method in ORDERED), "dropped"]
    assert "dropped" not in METHODS


def test_methods_are_listed_in_one_order() -> None:
    orders = [method.order for method in METHODS.values()]
    assert len(set(orders)) == len(orders)
    assert [method.order for method in ORDERED] == sorted(orders)


@pytest.mark.parametrize("method", ORDERED, ids=lambda method: method.name)
def test_a_method_is_described_for_people(method: Method[Hyperparameters]) -> None:
    TypeAdapter(Name).validate_python(method.name)
    for words in (method.title, method.phrase, method.summary, *filter(None, [method.paper])):
        assert words.strip() == words
        assert words
    assert not method.summary.endswith(".")
    swept = method.swept(merge_settings(plan_for(3, [2])).tables)
    assert (method.swept_name is not None) == (swept != (None,))
    assert (method.swept_summary is not None) == (method.swept_name is not None)


def test_titles_and_phrases_tell_methods_apart() -> None:
    for words in ([method.title for method in ORDERED], [method.phrase for method in ORDERED]):
        assert len(set(words)) == len(words)


@pytest.mark.parametrize("method", ORDERED, ids=lambda method: method.name)
def test_what_must_be_explained_can_be_said_to_anybody(method: Method[Hyperparameters]) -> None:
    for words in (*method.disclosures(merge_settings(plan_for(3, [2])).tables), *method.tensor_kinds.values()):
        assert "{" not in words.format(their="your")
