"""Methods that merge further than one linear system: against slow, obvious oracles, and what an owner checks itself."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from math import log

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.errors import RemoteProtocolError, SettingsError
from common.merge_methods.anchored import ANCHORED, AnchoredTable
from common.merge_methods.data_free import DATA_FREE, DataFreeTable
from common.merge_methods.isotropic import FADE, IsotropicTable, flattened
from common.merge_methods.logit_adjusted import LOGIT_ADJUSTED, SMOOTHING, LogitAdjustedTable
from common.merge_methods.method import SingleRoundMethod
from common.merge_methods.regmean import RegMeanTable
from common.merge_methods.terms import Hyperparameters, MergedDelta, MergeSettings, OwnerTerms, owner_weight
from common.models.delta import APPLIED, candidate_layout, check_candidate, is_rounded, published_delta
from tests.support.merging import merge_settings, merged_in_float64, owner_for, plan_for, single_round, total_of

WEIGHT = "l0.weight"


def three_owners(agreed: MergeSettings, seed: int = 0) -> dict[str, OwnerTerms]:
    plan = agreed.plan
    size, random = plan.inputs[0].gram_size, torch.Generator().manual_seed(seed)
    rows = (torch.randn(10 * (i + 2), size, generator=random, dtype=torch.float64) for i in range(3))
    return {f"o{i}": owner_for(plan, each, seed + i) for i, each in enumerate(rows)}


def merged(method: str, agreed: MergeSettings, owners: Mapping[str, OwnerTerms], value: float | None) -> MergedDelta:
    return merged_in_float64(method, agreed, total_of([method], agreed, owners), value)


def of_three(d_in: int = 4, d_out: int = 3, *, weighting: str = "rows", **tables: Hyperparameters) -> MergeSettings:
    plan = plan_for(d_in, [d_out], has_bias=True)
    return replace(merge_settings(plan, weighting, **tables), num_owners=3)  # type: ignore[arg-type]


# --- data-free: what the ridge pulls to -------------------------------------------------------------------------------


@given(seed=st.integers(0, 1000), ridge=st.floats(0.01, 1), pull=st.floats(0.1, 1))
@settings(max_examples=30)
def test_data_free_solves_its_equation_with_the_ridge_at_the_sum(seed: int, ridge: float, pull: float) -> None:
    agreed = of_three(data_free=DataFreeTable(ridge=ridge, pull=pull))
    owners = three_owners(agreed, seed)
    left, right = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64)
    weights = [owner_weight(agreed, owner) for owner in owners.values()]
    deltas = [owner.delta[WEIGHT] for owner in owners.values()]  # (3, 4)
    times_mean = 3 * pull * sum(w * delta for w, delta in zip(weights, deltas, strict=True)) / sum(weights)
    for weight, delta in zip(weights, deltas, strict=True):
        gram = weight * delta.T @ delta / delta.square().sum()
        level = ridge * weight / 4  # the ridge of a Gram whose trace is the weight
        left += gram + level * torch.eye(4, dtype=torch.float64)
        right += gram @ delta.T + level * times_mean.T
    expected = torch.linalg.solve(left, right).T
    torch.testing.assert_close(merged("data_free", agreed, owners, 1.0).delta[WEIGHT], expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("ridge", [0.1, 1.0])
@pytest.mark.parametrize("alphas", [(1.0,), (0.5, 1.0)])
def test_a_pull_of_one_nth_is_the_mean(ridge: float, alphas: tuple[float, ...]) -> None:
    results = []
    for pull in (None, 1 / 3):
        agreed = of_three(data_free=DataFreeTable(alphas=alphas, ridge=ridge, pull=pull))
        results.append(merged("data_free", agreed, three_owners(agreed), alphas[0]).delta[WEIGHT])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_a_pull_sends_nothing_more() -> None:
    near, far = (of_three(data_free=DataFreeTable(pull=pull)) for pull in (None, 1.0))
    sizes = [[(each.name, each.shape) for each in DATA_FREE.layout(agreed).entries] for agreed in (near, far)]
    assert sizes[0] == sizes[1]


# --- isotropic --------------------------------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 1000), scale=st.sampled_from([0.5, 1.0, 2.0])
)
@settings(max_examples=30)
def test_an_isotropic_merge_has_one_singular_value(rows: int, columns: int, seed: int, scale: float) -> None:
    agreed = of_three(columns, rows, weighting="owners", isotropic=IsotropicTable(scales=(scale,)))
    owners = three_owners(agreed, seed)
    result = merged("isotropic", agreed, owners, scale)
    summed = scale * sum(owner.delta[WEIGHT] for owner in owners.values())  # (rows, columns)
    left, values, right = np.linalg.svd(summed.numpy(), full_matrices=False)
    expected = values.mean() * left @ right  # the paper's algorithm
    assume(values.min() > 0.1 * np.sqrt((values**2).mean()))  # no direction fades out
    torch.testing.assert_close(result.published[WEIGHT].numpy(), expected, rtol=3e-3, atol=3e-3 * values.mean())
    spectrum = torch.linalg.svdvals(result.published[WEIGHT])
    assert float(spectrum.max() / spectrum.min()) < 1 + FADE**2 / 0.1**2
    mean = sum(owner.delta["bias"] for owner in owners.values()) / 3
    torch.testing.assert_close(result.published["bias"], mean)


@given(rank=st.integers(1, 3), seed=st.integers(0, 1000))
@settings(max_examples=30)
def test_directions_that_no_owner_changed_stay_as_they_are(rank: int, seed: int) -> None:
    """Changes of low rank, in float32: what rounding leaves in the other directions is not blown up."""
    random = torch.Generator().manual_seed(seed)
    factors = (torch.randn(24, rank, generator=random), torch.randn(rank, 16, generator=random))
    change = (factors[0] @ factors[1]).double()
    values = torch.linalg.svdvals(flattened(change))
    assert float(values[rank:].max()) < 1e-3 * float(values[0])
    kept = torch.linalg.svdvals(change)[:rank]
    if float(kept.min()) > 0.1 * float(kept.max()):
        torch.testing.assert_close(values[:rank], kept.mean().expand(rank), rtol=1e-2, atol=0)


def test_a_layer_that_nobody_changed_stays_as_it_is() -> None:
    assert not flattened(torch.zeros(3, 5, dtype=torch.float64)).any()


# --- anchored ---------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 1000), anchor=st.floats(0.01, 2), alpha=st.sampled_from([0.5, 0.9, 1.0]))
@settings(max_examples=30)
def test_anchored_solves_regmean_with_its_ridge_at_the_data_free_merge(seed: int, anchor: float, alpha: float) -> None:
    agreed = of_three(
        regmean=RegMeanTable(alphas=(alpha,), ridge=0.0),
        data_free=DataFreeTable(pull=1.0),
        anchored=AnchoredTable(anchors=(anchor,)),
    )
    owners = three_owners(agreed, seed)
    data_free = merged("data_free", agreed, owners, 1.0).delta
    left, right = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64)
    for owner in owners.values():
        gram = owner.grams["l0"].matrix
        gram = alpha * gram + (1 - alpha) * torch.diag(gram.diagonal())
        level = anchor * gram.trace()
        left += gram + level * torch.eye(4, dtype=torch.float64)
        right += gram @ owner.delta[WEIGHT].T + level * data_free[WEIGHT].T
    result = merged("anchored", agreed, owners, anchor)
    torch.testing.assert_close(result.delta[WEIGHT], torch.linalg.solve(left, right).T, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(result.delta["bias"], data_free["bias"])


@pytest.mark.parametrize(("anchor", "method", "value"), [(1e-9, "regmean", 1.0), (1e9, "data_free", 1.0)])
def test_anchors_lead_from_regmean_to_data_free(anchor: float, method: str, value: float) -> None:
    agreed = of_three(regmean=RegMeanTable(alphas=(1.0,), ridge=0.0), anchored=AnchoredTable(anchors=(anchor,)))
    owners = three_owners(agreed)
    expected = merged(method, agreed, owners, value).delta[WEIGHT]
    torch.testing.assert_close(merged("anchored", agreed, owners, anchor).delta[WEIGHT], expected, rtol=1e-6, atol=1e-6)


def test_who_compares_anchored_with_both_of_its_parts_sends_nothing_more() -> None:
    agreed = of_three()
    parts = {entry.name for name in ("regmean", "data_free") for entry in single_round(name).layout(agreed).entries}
    assert {entry.name for entry in ANCHORED.layout(agreed).entries} == parts


def test_an_anchor_s_alpha_is_one_of_regmean_s() -> None:
    agreed = of_three(anchored=AnchoredTable(alpha=0.3))
    with pytest.raises(ValueError, match=r"anchored\.alpha = 0\.3: must be one of"):
        ANCHORED.check(agreed.tables)


# --- Model Stock ------------------------------------------------------------------------------------------------------


def model_stock_of(deltas: list[Tensor]) -> Tensor:
    """The merged delta of one tensor, from all pairs of owners."""
    products = [float((one * other).sum()) for one, other in combinations(deltas, 2)]
    squared_lengths = [float((delta * delta).sum()) for delta in deltas]
    cosine = max(sum(products) / len(products) / (sum(squared_lengths) / len(squared_lengths)), 0.0)
    scale = len(deltas) * cosine / (1 + (len(deltas) - 1) * cosine)
    return scale * sum(deltas) / len(deltas)


@given(seed=st.integers(0, 1000), common=st.floats(0, 3))
@settings(max_examples=30)
def test_model_stock_takes_the_mean_as_far_as_pairs_of_owners_agree(seed: int, common: float) -> None:
    agreed = of_three(weighting="owners")
    shared = {name: torch.ones(shape, dtype=torch.float64) for name, shape in agreed.plan.shapes.items()}
    owners = {
        name: replace(owner, delta={key: each + common * shared[key] for key, each in owner.delta.items()})
        for name, owner in three_owners(agreed, seed).items()
    }
    result = merged("model_stock", agreed, owners, None)
    for name in agreed.plan.changed:
        expected = model_stock_of([owner.delta[name] for owner in owners.values()])
        torch.testing.assert_close(result.published[name], expected, rtol=1e-4, atol=1e-4)


def test_a_tensor_that_only_one_owner_changed_stays_the_base_s() -> None:
    """Its change is orthogonal to the others', and what rounding leaves of t is not taken for agreement."""
    agreed = of_three(weighting="owners")
    owners = three_owners(agreed)
    for name in ("o1", "o2"):
        owners[name].delta[WEIGHT].zero_()
    assert not merged("model_stock", agreed, owners, None).published[WEIGHT].any()
    assert (
        not single_round("model_stock")
        .solve(agreed, total_of(["model_stock"], agreed, owners), None, with_spectra=False)
        .published[WEIGHT]
        .any()
    )


def test_model_stock_counts_owners_alike() -> None:
    with pytest.raises(SettingsError, match="every owner must count alike"):
        single_round("model_stock").layout(of_three())


# --- logit adjustment -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", ["average", "data_free", "regmean"])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_logit_adjustment_subtracts_the_log_shares_from_the_bias_alone(body: str, strength: float) -> None:
    agreed = of_three(logit_adjusted=LogitAdjustedTable(body=body, strengths=(strength,)))
    owners = three_owners(agreed)
    result = merged("logit_adjusted", agreed, owners, strength)
    alpha = max((each for each in single_round(body).swept(agreed.tables) if each is not None), default=None)
    expected = dict(merged(body, agreed, owners, alpha).delta)
    weights = [owner.examples for owner in owners.values()]
    logs = [
        sum(
            weight * log((float(owner.class_shares[label]) + SMOOTHING / 3) / (1 + SMOOTHING))  # type: ignore[index]
            for weight, owner in zip(weights, owners.values(), strict=True)
        )
        / sum(weights)
        for label in range(3)
    ]
    expected["l0.bias"] = (
        expected["l0.bias"] - strength * torch.tensor([each - sum(logs) / 3 for each in logs]).double()
    )
    assert result.published.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(result.published[name], tensor, rtol=1e-6, atol=1e-7)


def test_a_label_that_nobody_predicts_gets_a_bounded_bias() -> None:
    agreed = of_three()
    only_one = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    owners = {name: replace(owner, class_shares=only_one) for name, owner in three_owners(agreed).items()}
    bias, plain = (merged("logit_adjusted", agreed, owners, strength).published["l0.bias"] for strength in (1.0, 0.0))
    moved = bias - plain
    assert float(moved.max() - moved.min()) == pytest.approx(log((1 + SMOOTHING / 3) / (SMOOTHING / 3)))


def test_a_classifier_without_a_bias_cannot_be_adjusted() -> None:
    agreed = merge_settings(plan_for(4, [3]))
    with pytest.raises(SettingsError, match="has no bias"):
        LOGIT_ADJUSTED.applied(agreed)


def test_only_a_body_that_solves_linear_equations_can_be_adjusted() -> None:
    agreed = of_three(logit_adjusted=LogitAdjustedTable(body="isotropic"))
    with pytest.raises(ValueError, match=r"logit_adjusted\.body = 'isotropic': must be one of"):
        LOGIT_ADJUSTED.check(agreed.tables)


# --- what an owner checks by itself -----------------------------------------------------------------------------------


def candidate(name: str, agreed: MergeSettings) -> tuple[SingleRoundMethod[Hyperparameters], float | None, dict]:
    method = single_round(name)
    value, *_ = method.swept(agreed.tables)
    owners = three_owners(agreed)
    result = method.solve(agreed, total_of([name], agreed, owners), value, with_spectra=False)
    applied = {APPLIED + each: tensor for each, tensor in result.applied.items()}
    return method, value, {**result.delta, **result.beside, **applied}


WITH_FUNCTION = ["isotropic", "logit_adjusted", "model_stock", "lorm"]


@pytest.mark.parametrize("name", WITH_FUNCTION)
def test_147_what_a_method_s_function_made_is_checked(name: str) -> None:
    agreed = of_three(8, 6, weighting="owners")
    plan = agreed.plan
    method, value, tensors = candidate(name, agreed)
    layout = candidate_layout(plan, method.beside(agreed), method.applied(agreed))
    vector = np.zeros(layout.size, dtype=np.float32)
    layout.flatten(((entry.name, tensors[entry.name].numpy()) for entry in layout.entries), vector)

    def check() -> None:
        check_candidate(plan, layout, vector, lambda solved: method.apply(agreed, solved, value))

    check()  # the coordinator's own
    made = method.applied(agreed)[0]
    assert torch.equal(published_delta(plan, layout, vector)[made], tensors[APPLIED + made])
    numbers = layout.read(vector, APPLIED + made).reshape(-1)
    numbers[3] += 1e-6 * np.abs(numbers).max()
    with pytest.raises(RemoteProtocolError, match=f"sent another {made} than"):
        check()


@given(seed=st.integers(0, 1000), size=st.floats(-20, 20))
@settings(max_examples=50)
def test_rounding_passes_and_ten_times_as_much_does_not(seed: int, size: float) -> None:
    random = torch.Generator().manual_seed(seed)
    expected = 10**size * torch.randn(5, 7, generator=random, dtype=torch.float64)
    assert is_rounded(expected.float(), expected)
    wrong = expected.clone()
    wrong.view(-1)[int(expected.abs().argmax())] *= 1 + 10 * 2.0**-22
    assert not is_rounded(wrong.float(), expected)


def test_147_what_passes_as_rounded_is_met_on_both_sides_of_its_edge() -> None:
    expected = torch.tensor([0.0, 1.0], dtype=torch.float64)
    edge = np.float32(2.0**-22 * 0.5**0.5)  # of the root mean square
    below, beyond = (float(np.nextafter(edge, np.float32(to))) for to in (0, 1))
    for sign in (1, -1):
        assert is_rounded(torch.tensor([sign * below, 1.0]), expected)
        assert not is_rounded(torch.tensor([sign * beyond, 1.0]), expected)


def test_the_function_of_rounded_tensors_is_the_same_in_another_order_of_arithmetic() -> None:
    """Another machine adds up in another order; here rows and columns are swapped, which does as much."""
    random = torch.Generator().manual_seed(0)
    matrix = torch.randn(48, 96, generator=random).double() * torch.logspace(0, -4, 96)
    here, there = flattened(matrix), flattened(matrix.T).T
    assert is_rounded(here.float(), there)


def test_not_finite_numbers_are_never_rounded() -> None:
    ones: Tensor = torch.ones(2, dtype=torch.float64)
    assert not is_rounded(torch.tensor([1.0, float("nan")]), ones)
