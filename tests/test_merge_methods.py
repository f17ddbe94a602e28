"""Merge methods against slow, obvious oracles: the sums go through the real layout and the real plain sum."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.agreement import SEQUENTIAL, Agreement, Bounds, DataFree, RegMean, TaskArithmetic
from common.contents import CONTRIBUTIONS, contribution_kind
from common.errors import NumericalError
from common.identity import Identity
from common.merge_methods import (
    METHODS,
    candidates,
    contribution,
    contribution_layout,
    measurements,
    normal_equations,
    solve,
    start,
)
from common.merge_methods.terms import Gram, OwnerTerms, Solution, owner_weight
from common.models.layers import Layer
from common.models.plan import MergePlan, SharedInput
from common.summation.protocol import Total
from tests.support.sums import run, terms_of


def plan_for(
    d_in: int, d_outs: Sequence[int], *, stored_input_first: bool = False, has_constant: bool = False
) -> MergePlan:
    """Layers that share one input, with their biases or without, and one bias that is averaged."""
    layers = tuple(
        Layer(
            weight=f"l{index}.weight",
            d_in=d_in,
            d_out=d_out,
            stored_input_first=stored_input_first,
            bias=f"l{index}.bias" if has_constant else None,
        )
        for index, d_out in enumerate(d_outs)
    )
    shapes = {
        layer.weight: (layer.d_in, layer.d_out) if stored_input_first else (layer.d_out, layer.d_in) for layer in layers
    }
    return MergePlan(
        inputs=(SharedInput(name="l0", d_in=d_in, layers=layers),),
        data_free=(),
        linear_layers=layers,
        averaged=("bias",),
        left_alone=(),
        shapes={**shapes, **{layer.bias: (layer.d_out,) for layer in layers if layer.bias}, "bias": (3,)},
    )


def owner_for(plan: MergePlan, rows: Tensor, seed: int) -> OwnerTerms:
    """An owner that saw `rows` (n, gram_size), with a random delta."""
    random = torch.Generator().manual_seed(seed)
    delta = {name: torch.randn(shape, generator=random, dtype=torch.float64) for name, shape in plan.shapes.items()}
    fisher = {name: torch.rand(shape, generator=random, dtype=torch.float64) for name, shape in plan.shapes.items()}
    return OwnerTerms(
        examples=max(len(rows), 1),
        delta=delta,
        grams={"l0": Gram(matrix=rows.T @ rows, rows=len(rows))},
        gram_examples=max(len(rows), 1),
        fisher=fisher,
        fisher_examples=1,
    )


def bounded(agreement: Agreement, plan: MergePlan) -> Agreement:
    """The agreement with bounds for another plan than its own."""
    bounds = Bounds(examples=10_000, delta=64.0, grams=(4096.0,) * len(plan.inputs), fisher=(64.0,) * len(plan.changed))
    return agreement.model_copy(update={"bounds": bounds})


def total_of(agreement: Agreement, plan: MergePlan, owners: Mapping[str, OwnerTerms]) -> Total:
    agreement = bounded(agreement, plan)
    layout = contribution_layout(agreement, plan)
    vectors = {name: np.zeros(layout.size) for name in owners}
    for name, owner in owners.items():
        layout.flatten(contribution(agreement, plan, owner), vectors[name])
    identities = {name: Identity(name=name, seed=name.encode().ljust(32)) for name in owners}
    return run("plain", identities, terms_of(identities, layout), vectors)


def merged(agreement: Agreement, plan: MergePlan, owners: Mapping[str, OwnerTerms], alpha: float) -> dict[str, Tensor]:
    """RegMean's solution in float64: the product rounds the delta to float32 at the very end."""
    total = total_of(agreement, plan, owners)
    return dict(solve(agreement, plan, "regmean", total, alpha).delta)


def exact(agreement: Agreement, **knobs: object) -> Agreement:
    """RegMean without ridge, so that equations hold to the letter."""
    return agreement.model_copy(update={"regmean": RegMean(ridge=0.0, **knobs)})  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _keep_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let solutions stay float64, so that oracles can be compared to 1e-9."""
    monkeypatch.setattr(Tensor, "float", lambda self: self)


@given(
    d_in=st.integers(1, 8),
    d_outs=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    num_owners=st.integers(2, 4),
    seed=st.integers(0, 2**32 - 1),
    input_first=st.booleans(),
    has_constant=st.booleans(),
)
def test_regmean_with_alpha_1_equals_pooled_least_squares(
    agreement: Agreement,
    d_in: int,
    d_outs: list[int],
    num_owners: int,
    seed: int,
    input_first: bool,
    has_constant: bool,
) -> None:
    plan = plan_for(d_in, d_outs, stored_input_first=input_first, has_constant=has_constant)
    random = torch.Generator().manual_seed(seed)
    all_rows = [torch.randn(4 * d_in + 5, d_in, generator=random, dtype=torch.float64) for _ in range(num_owners)]
    if has_constant:
        all_rows = [torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1) for rows in all_rows]
    owners = {f"o{index}": owner_for(plan, rows, seed + index) for index, rows in enumerate(all_rows)}
    delta = merged(exact(agreement), plan, owners, alpha=1.0)
    stacked = torch.cat(all_rows)  # (all rows, gram_size)
    for layer in plan.layers():
        targets = torch.cat(
            [rows @ layer.take(owner.delta) for rows, owner in zip(all_rows, owners.values(), strict=True)]
        )
        pooled = torch.linalg.lstsq(stacked, targets, driver="gelsd").solution  # (gram_size, d_out)
        error = (layer.take(delta) - pooled).norm() / pooled.norm()
        assert error < 1e-9


@given(seed=st.integers(0, 2**32 - 1), alpha=st.floats(0.0, 1.0))
def test_deltas_give_what_the_published_closed_form_gives_on_weights(
    agreement: Agreement, seed: int, alpha: float
) -> None:
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
    delta = merged(exact(agreement), plan, owners, alpha)["l0.weight"]
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
    solution, status, _ = normal_equations.solve_symmetric(left, right)
    torch.testing.assert_close(solution[:, 0], torch.tensor([-0.5, 1.25], dtype=torch.float64))
    assert status == "solved"


def test_a_2x2_case_with_off_diagonals_solved_by_hand(agreement: Agreement) -> None:
    # G_1 = [[2,1],[1,2]], delta_1 = (1,0); G_2 = [[1,0],[0,1]], delta_2 = (0,1); alpha = 1:
    # [[3,1],[1,3]] d = (2,1) + (0,1) = (2,2)  ->  d = (1/2, 1/2)
    # alpha = 1/2: [[3,.5],[.5,3]] d = (2,.5) + (0,1) = (2,1.5)  ->  d = (5.25, 3.5) / 8.75 = (0.6, 0.4)
    plan, owners = two_owners([[2, 1], [1, 2]], [1, 0], [[1, 0], [0, 1]], [0, 1])
    for alpha, expected in ((1.0, [[0.5, 0.5]]), (0.5, [[0.6, 0.4]])):
        delta = merged(exact(agreement), plan, owners, alpha)["l0.weight"]
        torch.testing.assert_close(delta, torch.tensor(expected, dtype=torch.float64))


def test_a_fixed_alpha_sends_fewer_tensors_and_gives_the_same_model(agreement: Agreement) -> None:
    plan = plan_for(6, [4, 2])
    owners = {f"o{i}": owner_for(plan, torch.randn(40, 6, dtype=torch.float64), i) for i in range(3)}
    sweep, fixed = exact(agreement, alphas=(0.3, 0.9)), exact(agreement, alphas=(0.9,))
    assert contribution_layout(bounded(fixed, plan), plan).size < contribution_layout(bounded(sweep, plan), plan).size
    for name, tensor in merged(fixed, plan, owners, 0.9).items():
        torch.testing.assert_close(tensor, merged(sweep, plan, owners, 0.9)[name], rtol=1e-10, atol=1e-10)


def test_equal_grams_make_regmean_the_mean(agreement: Agreement) -> None:
    plan = plan_for(6, [4])
    rows = torch.randn(40, 6, dtype=torch.float64)
    owners = {f"o{i}": owner_for(plan, rows, i) for i in range(3)}
    mean = torch.stack([owner.delta["l0.weight"] for owner in owners.values()]).mean(0)
    torch.testing.assert_close(merged(agreement, plan, owners, 0.7)["l0.weight"], mean)


def test_ridge_pulls_toward_the_mean_delta_and_never_toward_zero(agreement: Agreement) -> None:
    plan = plan_for(6, [4])
    rows = torch.randn(40, 6, dtype=torch.float64)
    rows /= (rows**2).mean().sqrt()
    owners = {f"o{i}": owner_for(plan, rows @ torch.linalg.qr(torch.randn(6, 6).double())[0], i) for i in range(3)}
    mean = torch.stack([owner.delta["l0.weight"] for owner in owners.values()]).mean(0)

    def distance(ridge: float) -> float:
        with_ridge = agreement.model_copy(update={"regmean": RegMean.model_construct(alphas=(1.0,), ridge=ridge)})
        return float((merged(with_ridge, plan, owners, 1.0)["l0.weight"] - mean).norm())

    assert distance(0.0) > distance(1.0) > distance(1e4)
    assert distance(1e4) < 1e-3


def test_weighting_by_owners_ignores_how_many_rows_an_owner_has(agreement: Agreement) -> None:
    plan = plan_for(3, [2])
    rows = torch.randn(20, 3, dtype=torch.float64), torch.randn(25, 3, dtype=torch.float64)
    once = {"ada": owner_for(plan, rows[0], 0), "bea": owner_for(plan, rows[1], 1)}
    often = {**once, "bea": owner_for(plan, rows[1].repeat(7, 1), 1)}
    by_rows = exact(agreement)
    by_owners = by_rows.model_copy(update={"weighting": "owners"})
    one, other = (merged(by_owners, plan, owners, 0.9)["l0.weight"] for owners in (once, often))
    torch.testing.assert_close(one, other)
    one, other = (merged(by_rows, plan, owners, 0.9)["l0.weight"] for owners in (once, often))
    assert (one - other).norm() > 1e-3


def test_a_gram_of_sampled_rows_counts_for_all_the_owner_s_examples(agreement: Agreement) -> None:
    plan = plan_for(3, [2])
    rows = torch.randn(20, 3, dtype=torch.float64)
    full = owner_for(plan, rows.repeat(4, 1), 0)
    sampled = replace(owner_for(plan, rows, 0), examples=80, gram_examples=20)
    other = owner_for(plan, torch.randn(25, 3, dtype=torch.float64), 1)
    one, two = (merged(exact(agreement), plan, {"ada": ada, "bea": other}, 0.9)["l0.weight"] for ada in (full, sampled))
    torch.testing.assert_close(one, two)


# --- sums that cannot be solved ---------------------------------------------------------------------------------------


def solve_reported(agreement: Agreement, plan: MergePlan, owners: Mapping[str, OwnerTerms]) -> Solution:
    solution = solve(agreement, plan, "regmean", total_of(agreement, plan, owners), 1.0)
    assert all(torch.isfinite(tensor).all() for tensor in solution.delta.values())
    return solution


@given(seed=st.integers(0, 2**32))
@settings(max_examples=200)
def test_a_singular_sum_keeps_the_base_in_unseen_directions_and_says_so(agreement: Agreement, seed: int) -> None:
    plan = plan_for(6, [4])
    random = partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = [random(30, 2) @ random(2, 6) for _ in range(2)]
    owners = {f"o{index}": owner_for(plan, owned, index) for index, owned in enumerate(rows)}
    solution = solve_reported(exact(agreement), plan, owners)
    (layer,) = solution.layers
    assert (layer.status, layer.unseen_directions) == ("singular", 2)
    assert layer.condition is None or layer.condition > 1e12
    assert "singular; 2 of 6 directions keep the base's behaviour" in solution.notes[0]
    stacked, delta = torch.cat(rows), solution.delta["l0.weight"].double()
    targets = torch.cat(
        [owned @ owner.delta["l0.weight"].T for owned, owner in zip(rows, owners.values(), strict=True)]
    )
    pooled = torch.linalg.lstsq(stacked, targets, driver="gelsd").solution.T  # minimum norm, too
    torch.testing.assert_close(delta, pooled, rtol=1e-6, atol=1e-6)


def test_an_empty_sum_keeps_the_base_s_weights_and_says_so(agreement: Agreement) -> None:
    plan = plan_for(6, [4])
    owners = {f"o{index}": owner_for(plan, torch.zeros(0, 6, dtype=torch.float64), index) for index in range(2)}
    solution = solve_reported(agreement, plan, owners)
    assert solution.layers[0].status == "empty"
    assert solution.layers[0].rows == 0
    assert not solution.delta["l0.weight"].any()
    assert "empty" in solution.notes[0]


def test_an_indefinite_sum_is_reported_and_gives_finite_weights(agreement: Agreement) -> None:
    plan = plan_for(6, [4])
    owners = {f"o{index}": owner_for(plan, torch.randn(30, 6, dtype=torch.float64), index) for index in range(2)}
    liar = Gram(matrix=-10 * owners["o1"].grams["l0"].matrix, rows=30)
    owners["o1"] = replace(owners["o1"], grams={"l0": liar})
    solution = solve_reported(exact(agreement), plan, owners)
    assert solution.layers[0].status == "indefinite"
    assert "indefinite" in solution.notes[0]


def test_a_solution_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(NumericalError, match="the solution for w is not finite"):
        Solution(delta={"w": torch.tensor([1.0, float("nan")])})


def test_conditioning_and_rank_are_those_of_the_spectrum() -> None:
    condition, rank = normal_equations.spectrum(torch.diag(torch.tensor([8.0, 4, 2, 1], dtype=torch.float64)))
    assert condition == pytest.approx(8)
    shares = np.array([8, 4, 2, 1]) / 15
    assert rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert normal_equations.spectrum(torch.eye(5, dtype=torch.float64))[1] == pytest.approx(5)


@pytest.mark.parametrize(("method", "knob"), [("regmean", 0.9), ("data_free", 1.0)])
def test_a_sweep_gives_the_same_models_and_spares_the_spectra(agreement: Agreement, method: str, knob: float) -> None:
    plan = plan_for(3, [2])
    alone = agreement.model_copy(update={"method": method, "compare_with": ()})
    total = total_of(alone, plan, three_owners(plan))
    published, tried = (solve(alone, plan, method, total, knob, with_spectra) for with_spectra in (True, False))
    assert all(torch.equal(published.delta[name], tried.delta[name]) for name in plan.shapes)
    assert all(note.condition and note.effective_rank for note in published.layers)
    assert tried.layers
    assert all(note.condition is None and note.effective_rank is None for note in tried.layers)


# --- the other methods ------------------------------------------------------------------------------------------------


def three_owners(plan: MergePlan) -> dict[str, OwnerTerms]:
    return {f"o{i}": owner_for(plan, torch.randn(10 * (i + 1), 3, dtype=torch.float64), i) for i in range(3)}


def solved(agreement: Agreement, method: str, knob: float | None = None) -> tuple[dict[str, OwnerTerms], Solution]:
    plan = plan_for(3, [2])
    owners = three_owners(plan)
    return owners, solve(agreement, plan, method, total_of(agreement, plan, owners), knob)


def test_average_is_the_mean_weighted_by_examples(agreement: Agreement) -> None:
    owners, solution = solved(agreement, "average")
    for name, tensor in solution.delta.items():
        expected = sum(owner.examples * owner.delta[name] for owner in owners.values()) / 60
        torch.testing.assert_close(tensor, expected)


def test_average_by_owners_is_the_plain_mean(agreement: Agreement) -> None:
    owners, solution = solved(agreement.model_copy(update={"weighting": "owners"}), "average")
    for name, tensor in solution.delta.items():
        torch.testing.assert_close(tensor, torch.stack([owner.delta[name] for owner in owners.values()]).mean(0))


def test_task_arithmetic_by_owners_is_the_scaled_sum(agreement: Agreement) -> None:
    owners, solution = solved(agreement.model_copy(update={"weighting": "owners"}), "task_arithmetic", 0.3)
    for name, tensor in solution.delta.items():
        torch.testing.assert_close(tensor, 0.3 * sum(owner.delta[name] for owner in owners.values()))


def test_task_arithmetic_by_rows_is_the_scaled_average_times_the_owners(agreement: Agreement) -> None:
    owners, solution = solved(agreement, "task_arithmetic", 0.3)
    for name, tensor in solution.delta.items():
        weighted = sum(owner.examples * owner.delta[name] for owner in owners.values()) / 60
        torch.testing.assert_close(tensor, 0.3 * 3 * weighted)


def test_fisher_weights_every_entry_by_its_information(agreement: Agreement) -> None:
    owners, solution = solved(agreement, "fisher")
    for name, tensor in solution.delta.items():
        weights = [owner.examples * owner.fisher[name] for owner in owners.values()]
        products = [weight * owner.delta[name] for weight, owner in zip(weights, owners.values(), strict=True)]
        torch.testing.assert_close(tensor, sum(products) / sum(weights))


def test_fisher_takes_the_mean_where_there_is_no_information_and_reports_it(agreement: Agreement) -> None:
    plan = plan_for(3, [2])
    owners = three_owners(plan)
    for owner in owners.values():
        owner.fisher["l0.weight"][0, 0] = 0
        owner.fisher["bias"].zero_()
    solution = solve(agreement, plan, "fisher", total_of(agreement, plan, owners), None)
    mean = sum(owner.examples * owner.delta["bias"] for owner in owners.values()) / 60
    torch.testing.assert_close(solution.delta["bias"], mean)
    assert solution.notes[0].startswith("4 of 9 parameters")


# --- the data-free Gram -----------------------------------------------------------------------------------------------


def without_ridge(agreement: Agreement, **changes: object) -> Agreement:
    return exact(agreement).model_copy(update={"data_free": DataFree(ridge=0.0), **changes})


@pytest.mark.parametrize("weighting", ["rows", "owners"])
@pytest.mark.parametrize("stored_input_first", [False, True])
def test_data_free_is_pooled_least_squares_on_the_weight_changes_themselves(
    agreement: Agreement, weighting: str, stored_input_first: bool
) -> None:
    plan = plan_for(4, [6, 3], stored_input_first=stored_input_first)
    owners = {f"o{i}": owner_for(plan, torch.randn(10 * (i + 1), 4, dtype=torch.float64), i) for i in range(3)}
    alone = without_ridge(agreement, method="data_free", compare_with=(), weighting=weighting)
    solution = solve(alone, plan, "data_free", total_of(alone, plan, owners), 1.0)
    for layer in plan.layers():
        rows, targets = [], []
        for owner in owners.values():
            delta = layer.take(owner.delta)  # (d_in, d_out); its rows as a linear layer's inputs are its columns
            weight = owner.examples**0.5 if weighting == "rows" else 1.0
            rows.append(weight * delta.T / delta.norm())
            targets.append(rows[-1] @ delta)
        pooled = torch.linalg.lstsq(torch.cat(rows), torch.cat(targets), driver="gelsd").solution
        torch.testing.assert_close(layer.take(solution.delta), pooled, rtol=1e-7, atol=1e-7)
    mean = sum(owner_weight(alone, owner) * owner.delta["bias"] for owner in owners.values())
    total_weight = sum(owner_weight(alone, owner) for owner in owners.values())
    torch.testing.assert_close(solution.delta["bias"], mean / total_weight)
    assert [note.rows for note in solution.layers] == [None, None]


def test_a_layer_that_nobody_changed_stays_as_it_is(agreement: Agreement) -> None:
    plan = plan_for(3, [2])
    owners = three_owners(plan)
    for owner in owners.values():
        owner.delta["l0.weight"].zero_()
    alone = agreement.model_copy(update={"method": "data_free", "compare_with": ()})
    solution = solve(alone, plan, "data_free", total_of(alone, plan, owners), 1.0)
    assert solution.layers[0].status == "empty"
    assert not solution.delta["l0.weight"].any()


def test_single_layers_of_regmean_can_be_data_free_and_are_sent_once(agreement: Agreement) -> None:
    plan = plan_for(4, [6, 3])
    first, second = plan.layers()
    (shared,) = plan.inputs
    mixed = replace(plan, inputs=(replace(shared, layers=(first,)),), data_free=(second,))
    owners = {f"o{i}": owner_for(plan, torch.randn(30, 4, dtype=torch.float64), i) for i in range(3)}
    both = without_ridge(agreement, compare_with=("data_free",))
    total = total_of(both, mixed, owners)
    by_inputs = merged(exact(agreement), plan, owners, alpha=0.9)
    by_changes = solve(both, mixed, "data_free", total, 1.0).delta
    solution = solve(both, mixed, "regmean", total, 0.9)
    torch.testing.assert_close(solution.delta[first.weight], by_inputs[first.weight], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(solution.delta[second.weight], by_changes[second.weight], rtol=1e-9, atol=1e-9)
    assert [(note.name, note.rows) for note in solution.layers] == [("l0", 90), ("l1", None)]


@pytest.mark.parametrize("value", [64.0, 1e-6])
def test_the_largest_changes_that_an_agreement_allows_fit_a_data_free_sum(agreement: Agreement, value: float) -> None:
    plan = plan_for(5, [4])
    rows = torch.randn(10_000, 5, dtype=torch.float64)
    owners = {f"o{i}": owner_for(plan, rows, i) for i in range(3)}
    for owner in owners.values():
        owner.delta["l0.weight"].fill_(value)
    alone = agreement.model_copy(
        update={"method": "data_free", "compare_with": (), "data_free": DataFree(alphas=(0.0, 1.0), ridge=1.0)}
    )
    for alpha in (0.0, 1.0):
        solution = solve(alone, plan, "data_free", total_of(alone, plan, owners), alpha)
        torch.testing.assert_close(solution.delta["l0.weight"], owners["o0"].delta["l0.weight"])


# --- all methods ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(set(METHODS) - SEQUENTIAL))
def test_every_method_sees_only_sums_and_changes_every_parameter(agreement: Agreement, method: str) -> None:
    alone = agreement.model_copy(update={"method": method, "compare_with": ()})
    plan = plan_for(3, [2])
    owners = three_owners(plan)
    total = total_of(alone, plan, owners)
    for name, knob in candidates(alone, method).items():
        assert name.startswith(method)
        assert set(solve(alone, plan, method, total, knob).delta) == set(plan.shapes)
    assert measurements(alone) == {"regmean": {"grams"}, "fisher": {"fisher"}}.get(method, set())


@pytest.mark.parametrize(("body", "alpha"), [("average", None), ("data_free", 1.0), ("regmean", 0.99)])
def test_refit_begins_with_the_body_that_was_agreed_at_the_largest_alpha(
    agreement: Agreement, body: str, alpha: float | None
) -> None:
    refit = agreement.refit.model_copy(update={"body": body})
    alone = agreement.model_copy(update={"method": "refit", "compare_with": (), "refit": refit})
    of_body = alone.model_copy(update={"method": body})
    plan = plan_for(3, [2])
    owners = three_owners(plan)
    assert measurements(alone) == measurements(of_body)
    started = start(alone, plan, "refit", total_of(alone, plan, owners))
    expected = solve(of_body, plan, body, total_of(of_body, plan, owners), alpha)
    assert started.delta.keys() == expected.delta.keys()
    assert all(torch.equal(started.delta[name], expected.delta[name]) for name in expected.delta)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("alphas", [(0.5,), (0.5, 1.0)])
def test_an_owner_is_told_the_meaning_of_all_that_leaves(
    agreement: Agreement, method: str, alphas: tuple[float, ...]
) -> None:
    knobs = {"regmean": RegMean(alphas=alphas), "data_free": DataFree(alphas=alphas)}
    alone = agreement.model_copy(update={"method": method, "compare_with": (), **knobs})
    plan = plan_for(3, [2])
    for entry in contribution_layout(bounded(alone, plan), plan).entries:
        assert contribution_kind(entry.name) in CONTRIBUTIONS


def test_a_tensor_that_several_methods_need_is_sent_once(agreement: Agreement) -> None:
    plan = plan_for(3, [2])
    names = [entry.name for entry in contribution_layout(bounded(agreement, plan), plan).entries]
    assert len(names) == len(set(names))
    assert "weighted_delta/l0.weight" in names


def test_a_sweep_names_its_candidates_and_a_single_value_needs_no_name(agreement: Agreement) -> None:
    assert list(candidates(agreement, "task_arithmetic")) == [f"task_arithmetic@{s}" for s in ("0.3", "0.5", "1.0")]
    single = agreement.model_copy(update={"task_arithmetic": TaskArithmetic(scales=(0.4,))})
    assert candidates(single, "task_arithmetic") == {"task_arithmetic": 0.4}
