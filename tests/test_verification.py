"""Verified merges: an honest merge of every method passes, a wrong one does not, and what is in between is derived."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import reduce
from math import log2
from typing import Literal, Self, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from common.agreement.rules import LEAST_RIDGE
from common.errors import NumericalError, RemoteProtocolError
from common.merge_methods import METHODS, contribution, contribution_layout
from common.merge_methods.data_free import DataFreeTable
from common.merge_methods.equations import (
    MOST_STACKED,
    ROWS_AT_ONCE,
    Equation,
    FisherEquation,
    MeanEquation,
    StackedMeans,
    depth,
    product,
    stacked,
)
from common.merge_methods.method import MultiRoundMethod, SingleRoundMethod
from common.merge_methods.normal_equations import System, SystemEquation
from common.merge_methods.refit import LEAST_FIT, REFIT, ClassifierEquation, RefitTable, classifier
from common.merge_methods.regmean import RegMeanTable
from common.merge_methods.task_arithmetic import TaskArithmeticTable
from common.merge_methods.terms import ClassifierTerms, Gram, MergeSettings, OwnerTerms, ProblemType, rounded
from common.models.layers import Layer
from common.models.low_rank import Factors, factorise, is_closest
from common.models.plan import MergePlan, _in_blocks
from common.summation import fixed_point, wide
from common.summation.own_part import OwnPart
from common.tensor_layout import TensorEntry, TensorLayout
from common.verification import (
    COLUMNS,
    LARGEST_NUMBER,
    UNIT,
    Challenge,
    Claim,
    NotTheMerge,
    check_correction,
    correction_layout,
    factor_tolerance,
    from_words,
    largest_correction,
    projection,
    relative_tolerance,
    rho_of,
    rounding,
    shift_of,
    steps_of,
    to_words,
    tolerance,
    wrong_claims,
)
from tests.support.merging import merge_settings, owner_for, plan_for
from tests.support.sums import identities_of
from tests.support.verifying import Check, Contributions, check_total, verified

KNOWN = [4827.0, 29887.0, 21690.0]
SEVERAL, ONE = (0.0, 0.5, 0.9, 1.0), (0.9,)
CASES = [
    "average",
    "task_arithmetic",
    "isotropic",
    "fisher",
    "data_free",
    "regmean",
    "anchored",
    "logit_adjusted",
    "model_stock",
    "lorm",
]
WITHOUT_CONSTANT = ("data_free", "logit_adjusted")
IN_BLOCKS = ("regmean", "anchored")
STEPS = ["refit", "regmean_plus_plus"]
ERRORS = [1e-2, 1e-4, 2.0**-20]  # of one entry, in norms of its tensor


def owners_for(
    settings_: MergeSettings, count: int, seed: int, condition: float, *, reaches_half: bool
) -> dict[str, OwnerTerms]:
    """Owners whose rows have features of very different sizes; owner 0's rows reach only half of them."""
    plan, random = settings_.plan, torch.Generator().manual_seed(seed)
    size = sum(shared.gram_size for shared in plan.inputs)
    sizes = torch.logspace(0, -float(np.log10(condition)) / 2, size, dtype=torch.float64)
    owners = {}
    for number, name in enumerate(identities_of(count)):
        rows = sizes * torch.randn(3 + 2 * size, size, generator=random, dtype=torch.float64)
        if number == 0 and reaches_half:
            rows[:, size // 2 :] = 0
        owner = owner_for(plan, rows, seed + number)
        grams = {}
        for shared in plan.inputs:  # one, or the blocks of one
            some = rows[:, slice(*shared.layers[0].features)] if shared.layers[0].features else rows
            grams[shared.name] = Gram(matrix=some.T @ some, rows=len(rows))
        owners[name] = replace(owner, grams=grams)
    return owners


def classifier_terms(settings_: MergeSettings, seed: int, condition: float) -> ClassifierTerms:
    layer, random = classifier(settings_.plan), torch.Generator().manual_seed(seed)
    size = layer.d_in + (layer.bias is not None)
    sizes = torch.logspace(0, -float(np.log10(condition)) / 2, size, dtype=torch.float64)
    features = sizes * torch.randn(2 * size + 3, size, generator=random, dtype=torch.float64)
    scores = features @ torch.randn(size, layer.d_out, generator=random, dtype=torch.float64)
    match settings_.problem_type:
        case "single_label_classification":
            targets = torch.randint(0, layer.d_out, (len(scores),), generator=random)
        case "multi_label_classification":
            targets = torch.randint(0, 2, scores.shape, generator=random).float()
        case "regression":
            targets = settings_.largest_target * (2 * torch.rand(scores.shape, generator=random) - 1)
    start = torch.full((size, layer.d_out), 0.1, dtype=torch.float64)
    return ClassifierTerms(features=features, targets=targets, scores=scores, start=start)


def step_check(
    method_name: str, settings_: MergeSettings, count: int, seed: int, condition: float, *, reaches_half: bool
) -> Check:
    """An honest check of the last step of a multi-round method."""
    method = METHODS[method_name]
    assert isinstance(method, MultiRoundMethod)
    owners = owners_for(settings_, count, seed, condition, reaches_half=reaches_half)
    step = method.steps(settings_)[-1]
    layout, value = method.step_layout(settings_, step), method.swept(settings_.tables)[-1]
    vectors = {}
    for number, (name, owner) in enumerate(owners.items()):
        terms = classifier_terms(settings_, seed + number, condition) if method is REFIT else None
        vectors[name] = np.zeros(layout.size)
        layout.flatten(method.step_contribution(settings_, step, replace(owner, classifier=terms)), vectors[name])
    contributions = Contributions.of(layout, vectors)
    merged = method.solve_step(settings_, step, contributions.total, value)
    assert all(note.status == "solved" for note in merged.layers)
    equations = method.step_equations(settings_, step, value)
    return Check(equations=equations, contributions=contributions, merged=merged, seed=seed)


def contributions_of(methods: Sequence[str], settings_: MergeSettings, owners: dict[str, OwnerTerms]) -> Contributions:
    layout = contribution_layout(methods, settings_)
    vectors = {name: np.zeros(layout.size) for name in owners}
    for name, owner in owners.items():
        layout.flatten(contribution(methods, settings_, owner), vectors[name])
    return (Contributions.in_32_bits if settings_.ring_bits == 32 else Contributions.of)(layout, vectors)


def check_of(method_name: str, settings_: MergeSettings, contributions: Contributions, seed: int = 0) -> Check:
    method = METHODS[method_name]
    assert isinstance(method, SingleRoundMethod)
    value = method.swept(settings_.tables)[-1]
    merged = method.solve(settings_, contributions.total, value, with_spectra=False)
    assert all(note.status == "solved" for note in merged.layers)
    return Check(equations=method.equations(settings_, value), contributions=contributions, merged=merged, seed=seed)


def with_layer_apart(plan: MergePlan) -> MergePlan:
    """With a layer that is merged from its changes alone, and a head that every owner keeps to itself."""
    layer = Layer(weight="apart.weight", d_in=4, d_out=3, stored_input_first=False)
    shapes = {**plan.shapes, "apart.weight": (3, 4), "head.weight": (2, 5)}
    linear_layers = (*plan.linear_layers, layer)
    return replace(plan, data_free=(layer,), linear_layers=linear_layers, left_alone=("head.weight",), shapes=shapes)


@st.composite
def checks(draw: st.DrawFn) -> Check:
    """An honest check of any method, over any shapes, rings, owners and conditions."""
    method = draw(st.sampled_from([*CASES, *STEPS]))
    in_32_bits = METHODS[method].fits_32_bits and draw(st.booleans())
    count, seed = draw(st.integers(2, 6)), draw(st.integers(0, 2**20))
    plan = plan_for(
        draw(st.integers(1, 7)),
        draw(st.lists(st.integers(1, 6), min_size=1, max_size=1 if method in ("logit_adjusted", "refit") else 3)),
        stored_input_first=draw(st.booleans()),
        has_constant=method not in WITHOUT_CONSTANT and draw(st.booleans()),
        has_bias=method == "logit_adjusted",
    )
    if method in IN_BLOCKS and not plan.inputs[0].has_constant and draw(st.booleans()):
        plan = replace(plan, inputs=tuple(_in_blocks(plan.inputs[0], draw(st.integers(1, 4)))))
    if method == "regmean" and draw(st.booleans()):
        plan = with_layer_apart(plan)
    alphas = draw(st.sampled_from([SEVERAL, ONE]))
    tables = {
        "regmean": RegMeanTable(alphas=alphas),
        "data_free": DataFreeTable(alphas=alphas, pull=draw(st.sampled_from([None, 0.5, 1.0]))),
        "task_arithmetic": TaskArithmeticTable(scales=(0.3, draw(st.sampled_from([0.5, 1.0])))),
        "refit": RefitTable(targets=draw(st.sampled_from(["labels", "scores"]))),
    }
    # 32 bits are for values that are alike
    condition = 10 ** draw(st.floats(0, 2 if in_32_bits else 12))
    weighting = "owners" if method == "model_stock" else draw(st.sampled_from(["rows", "owners"]))
    settings_ = verified(merge_settings(plan, weighting, **tables), count, in_32_bits=in_32_bits)
    if method == "refit":
        problem = draw(st.sampled_from(get_args(ProblemType)))
        settings_ = replace(settings_, problem_type=problem, largest_target=draw(st.sampled_from([1.0, 5.0, 1000.0])))
    if method in STEPS:
        return step_check(method, settings_, count, seed, condition, reaches_half=True)
    owners = owners_for(settings_, count, seed, condition, reaches_half=not in_32_bits)
    try:
        contributions = contributions_of([method], settings_, owners)
    except NumericalError:  # an owner refuses 32 bits where owners differ too much: nothing to verify
        reject()
    return check_of(method, settings_, contributions, seed)


def wrong_entry(check: Check, size: float, seed: int) -> None:
    """Change one entry of one tensor by `size` times the tensor's norm."""
    random = np.random.default_rng(seed)
    names = sorted(name for name, tensor in check.delta.items() if tensor.abs().sum() > 0)
    tensor = check.delta[names[random.integers(len(names))]]
    flat = tensor.reshape(-1)
    flat[random.integers(len(flat))] += size * float(tensor.norm())


def is_found(check: Check) -> bool:
    """Whether owners find the model wrong: by the sum of their shares, or by a correction that is too large for it."""
    try:
        return check.wrong() != []
    except NotTheMerge:
        return True


def other_cut(check: Check, rank: int, seed: int) -> tuple[Tensor, Factors]:
    """One of the merge's matrices, and the factors of another one."""
    random = torch.Generator().manual_seed(seed)
    matrices = [tensor for tensor in check.delta.values() if tensor.ndim == 2 and tensor.abs().sum() > 0]
    matrix = matrices[seed % len(matrices)]
    noise = torch.randn(matrix.shape, generator=random)
    return matrix, factorise(matrix + 0.1 * matrix.norm() * noise / noise.norm(), rank)


@given(check=checks(), rank=st.integers(1, 8))
@settings(max_examples=150)
def test_an_honest_merge_of_every_method_passes(check: Check, rank: int) -> None:
    assert check.wrong() == []
    for tensor in check.delta.values():
        assert tensor.ndim != 2 or is_closest(tensor, factorise(tensor, rank))


@given(check=checks(), size=st.sampled_from(ERRORS), seed=st.integers(0, 1000))
@settings(max_examples=100)
def test_one_wrong_entry_of_one_tensor_is_found(check: Check, size: float, seed: int) -> None:
    wrong_entry(check, size, seed)
    assert is_found(check)


@pytest.mark.slow
@given(check=checks(), rank=st.integers(1, 8))
@settings(max_examples=10_000)
def test_ten_thousand_honest_merges_raise_no_false_alarm(check: Check, rank: int) -> None:
    """Nor do the adapters to which they are cut."""
    assert check.wrong() == []
    for tensor in check.delta.values():
        assert tensor.ndim != 2 or is_closest(tensor, factorise(tensor, rank))


@pytest.mark.slow
@given(
    check=checks(),
    size=st.sampled_from(ERRORS),
    seed=st.integers(0, 1000),
    rank=st.sampled_from([None, None, 1, 3]),
)
@settings(max_examples=10_000)
def test_none_of_ten_thousand_wrong_merges_passes(check: Check, size: float, seed: int, rank: int | None) -> None:
    """With a rank, the merge is right, but the adapter is cut from another one."""
    if rank is not None and any(tensor.ndim == 2 and tensor.any() for tensor in check.delta.values()):
        assert not is_closest(*other_cut(check, rank, seed))
        return
    wrong_entry(check, size, seed)
    assert is_found(check)


def test_methods_that_share_a_mean_have_the_same_bits_of_it() -> None:
    """An owner takes the mean that is proved of one model for that of the others (verification.Shortener)."""
    plan = plan_for(5, [4], has_bias=True)
    settings_ = verified(merge_settings(plan, "owners", task_arithmetic=TaskArithmeticTable(scales=(1.0,))), 3)
    owners = owners_for(settings_, 3, 0, 1e3, reaches_half=False)
    found: dict[Equation, Tensor] = {}
    shared = 0
    for method in (name for name in CASES if name not in ("anchored", "lorm")):
        check = check_of(method, settings_, contributions_of([method], settings_, owners))
        for equation in check.equations:
            if type(equation) is MeanEquation:
                bits = equation.part_of(check.delta)
                shared += equation in found
                assert torch.equal(found.setdefault(equation, bits), bits)
    assert shared >= 8


@pytest.mark.parametrize("method", ["average", "fisher"])
def test_a_parameter_that_is_one_number_is_verified(method: str) -> None:
    plan = plan_for(5, [4])
    plan = replace(plan, averaged=(*plan.averaged, "scale"), shapes={**plan.shapes, "scale": ()})
    settings_ = verified(merge_settings(plan), 3)
    owners = owners_for(settings_, 3, 0, 1.0, reaches_half=False)
    check = check_of(method, settings_, contributions_of([method], settings_, owners))
    assert check.wrong() == []
    check.delta["scale"] *= 1 + 2.0**-20
    assert check.wrong() == [f"0/{'mean' if method == 'average' else method}/scale"]


def test_means_with_rows_of_one_length_are_verified_together_and_each_of_them() -> None:
    plan = plan_for(5, [4, 4, 5], has_constant=True)
    settings_ = verified(merge_settings(plan), 3)
    owners = owners_for(settings_, 3, 0, 1.0, reaches_half=False)
    check = check_of("average", settings_, contributions_of(["average"], settings_, owners))
    groups = [each for each in check.claim.equations if isinstance(each, StackedMeans)]
    assert sorted(len(group.means) for group in groups) == [2, 4]  # two vectors; three matrices and a vector
    for group in groups:
        for mean in group.means:
            assert check.wrong() == []
            right = check.delta[mean.parameter].clone()
            check.delta[mean.parameter].reshape(-1)[1] *= 1 + 2.0**-18
            assert check.wrong() == [f"0/{group.name}"]
            check.delta[mean.parameter] = right


def test_stacks_of_means_hold_so_many_numbers_and_no_more() -> None:
    half, more = (MOST_STACKED // 128, 64), (MOST_STACKED // 128 + 1, 64)
    shapes = [half, more, half, (64,), (MOST_STACKED, 64), (1,), (3, 1), (65,)]
    means = [MeanEquation.of(f"p{number}", shape) for number, shape in enumerate(shapes)]
    *alone, stack, other = stacked(means)
    assert alone == [*means[4:7], *means[:2]]
    assert isinstance(stack, StackedMeans)
    assert (stack.means, other) == ((means[2], means[3]), means[7])


def means_check(sizes: Sequence[float | NDArray[np.float64]], shape: tuple[int, ...] = (64,)) -> Check:
    """The means of parameters of one shape, each entry of which, or each row, is about as large as `sizes` say."""
    random, plan = np.random.default_rng(0), plan_for(1, [1])
    names = [f"v{number}.bias" for number in range(len(sizes))]
    plan = replace(plan, shapes=dict.fromkeys(names, shape))
    entries = (TensorEntry(name=f"weighted_delta/{name}", shape=shape, bound=100.0) for name in names)
    layout = TensorLayout((TensorEntry(name="weight", shape=(1,), bound=100.0), *entries))
    vectors = {}
    for owner in identities_of(3):
        changes = [(size * random.uniform(0.5, 1, shape)).reshape(-1) for size in sizes]
        vectors[owner] = np.concatenate([[1.0], *changes])
    contributions = Contributions.of(layout, vectors)
    means = {
        name: torch.from_numpy(contributions.total[f"weighted_delta/{name}"] / contributions.total["weight"])
        for name in names
    }
    equations = [MeanEquation.of(name, shape) for name in names]
    merged = rounded(verified(merge_settings(plan), 3), means)
    return Check(equations=equations, contributions=contributions, merged=merged)


@pytest.mark.parametrize("shape", [(64,), (9, 64)])
@pytest.mark.parametrize("size", [1.0, 2.0**-10, 2.0**-20, 2.0**-30])
def test_122_a_mean_beside_a_far_larger_one_is_off_by_a_little_more_than_its_rounding(
    size: float, shape: tuple[int, ...]
) -> None:
    check = means_check([1.0, size, 1.0], shape)
    assert [type(each) for each in check.claim.equations] == [StackedMeans]
    assert check.wrong() == []
    check.delta["v1.bias"].reshape(-1)[3] *= 1 + 2.0**-21
    assert check.wrong() == ["0/means/v0.bias and others"]


@pytest.mark.parametrize("size", [2.0**-5, 2.0**-15, 2.0**-30])
def test_122_a_row_below_a_far_larger_one_of_its_matrix_is_off_by_a_little_more_than_its_rounding(size: float) -> None:
    spiked = np.full((9, 1), size)
    spiked[0] = 1.0
    check = means_check([1.0, spiked], (9, 64))
    assert check.wrong() == []
    check.delta["v1.bias"][3, 5] *= 1 + 2.0**-21
    assert check.wrong() == ["0/means/v0.bias and others"]


@pytest.mark.parametrize("sizes", [(1.0, 0.0), (0.0, 0.0), (1e-35, 0.0, 1e-3), (90.0, 1e-12, 0.0)])
def test_vectors_of_very_different_sizes_raise_no_false_alarm(sizes: tuple[float, ...]) -> None:
    check = means_check(sizes)
    assert check.wrong() == []
    if any(sizes):
        check.delta[f"v{sizes.index(0.0)}.bias"][0] = 1e-15
        assert check.wrong() == ["0/means/v0.bias and others"]


def test_122_a_small_vector_is_left_out_of_a_model() -> None:
    check = means_check([1.0, 2.0**-40])
    check.delta["v1.bias"].zero_()
    check.sent.reshape(-1)[COLUMNS:] = 0
    assert check.wrong() == ["0/means/v0.bias and others"]


LONG_ROWS = [(4, 64, 128), (1, 197, 192), (50_000,), (3, 10_007)]  # fused experts, positions, a bias, odd inputs


@pytest.mark.parametrize("shape", LONG_ROWS)
def test_122_one_weight_of_a_long_row_is_off_by_a_millionth(shape: tuple[int, ...]) -> None:
    check = means_check([1.0], shape)
    assert check.wrong() == []
    flat = check.delta["v0.bias"].reshape(-1)
    flat[-1] += 2.0**-20 * float(flat.abs().mean())
    assert check.wrong() == ["0/mean/v0.bias"]


def test_129_a_bent_correction_hides_no_more_in_a_fused_expert_than_in_a_row() -> None:
    """Half of all the expert's rounding, put into one of its weights."""
    check = means_check([1.0], (2, 64, 128))
    (equation,) = check.claim.equations
    delta, rho = check.delta["v0.bias"], rho_of(check.rho_seed, "0/mean/v0.bias", equation)
    right = float(delta[0, 0, 7])
    delta[0, 0, 7] += 0.5 * 2.0**-24 * float(delta[0].abs().sum())
    correction = correction_layout([check.claim]).read(check.sent, "0/mean/v0.bias")[0]  # a view
    correction -= ((float(delta[0, 0, 7]) - right) * rho[7]).float().numpy()
    with pytest.raises(NotTheMerge, match="beyond the rounding of float32"):
        check.wrong()


# --- what nobody's rows reach, and what a coordinator would like to hide ----------------------------------------------


def system_check(gram: Tensor, seed: int = 0, d_out: int = 3) -> Check:
    """Three owners that share a Gram, each with a third of it; the merge solves their sum."""
    size, random = len(gram), torch.Generator().manual_seed(seed)
    layer = Layer(weight="l.weight", d_in=size, d_out=d_out, stored_input_first=True)
    system = System(name="l", kind="", gram_size=size, layers=(layer,), alphas=(1.0,))
    settings_ = verified(merge_settings(plan_for(size, [d_out])), 3)
    layout = TensorLayout(tuple(system.entries(1.0, 1.0)))
    vectors = {}
    for name in identities_of(3):
        delta = {"l.weight": torch.randn(size, d_out, generator=random, dtype=torch.float64) * 1e-3}
        vectors[name] = np.zeros(layout.size)
        layout.flatten(system.tensors(gram / 3, delta), vectors[name])
    contributions = Contributions.of(layout, vectors)
    solved, note = system.solve(contributions.total, 1.0, None)
    assert note.status == "solved"
    return Check(
        equations=[SystemEquation.of(system, 1.0)],
        contributions=contributions,
        merged=rounded(settings_, dict(solved)),
        seed=seed,
    )


def gram_of(size: int, condition: float, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=random, dtype=torch.float64))
    values = torch.logspace(0, -float(np.log10(condition)), size, dtype=torch.float64)
    gram = basis * values @ basis.T
    return (gram + gram.T) / 2


def test_an_expert_that_nobody_s_rows_reach_takes_the_owners_mean_change() -> None:
    plan, owners = plan_for(6, [4]), {}
    settings_ = verified(merge_settings(plan), 3)
    for number, name in enumerate(identities_of(3)):
        owner = owner_for(plan, torch.zeros(0, 6, dtype=torch.float64), number)
        owners[name] = owner
    check = check_of("regmean", settings_, contributions_of(["regmean"], settings_, owners))
    assert check.wrong() == []
    mean = sum(owner.delta["l0.weight"] for owner in owners.values()) / 3
    torch.testing.assert_close(check.delta["l0.weight"].double(), mean, atol=1e-3, rtol=1e-3)
    check.delta["l0.weight"][0, 0] += 1e-2  # a free direction would be a place for a detector
    assert check.wrong() != []


def test_an_unreached_expert_in_32_bits_is_verified_too() -> None:
    plan, owners = plan_for(6, [4]), {}
    settings_ = verified(merge_settings(plan), 3, in_32_bits=True)
    for number, name in enumerate(identities_of(3)):
        rows = torch.zeros(0, 6, dtype=torch.float64) if number else torch.eye(6, dtype=torch.float64)
        owners[name] = owner_for(plan, rows, number)
    assert check_of("regmean", settings_, contributions_of(["regmean"], settings_, owners)).wrong() == []


@pytest.mark.parametrize("condition", [1.0, 1e4, 1e8, 1e12])
@pytest.mark.parametrize("size", [1, 40, 384])
def test_no_condition_of_a_gram_raises_a_false_alarm(size: int, condition: float) -> None:
    for seed in range(3):
        assert system_check(gram_of(size, condition, seed), seed).wrong() == []


@pytest.mark.slow
def test_no_false_alarm_with_4096_inputs_and_a_condition_of_1e12() -> None:
    assert system_check(gram_of(4096, 1e12), d_out=8).wrong() == []


def test_an_error_in_the_weakest_direction_is_found() -> None:
    """A hundred thousandth of the merge's norm, in a direction whose eigenvalue is 7e-5 of the largest."""
    gram = gram_of(384, 1 / 7e-5)
    check = system_check(gram)
    weakest = torch.linalg.eigh(gram).eigenvectors[:, 0]
    delta = check.delta["l.weight"]
    delta[:, 0] += (1e-5 * float(delta.norm()) * weakest).float()
    assert check.wrong() == ["0/gram/l"]


def test_a_lie_of_one_part_in_a_million_about_one_entry_is_found() -> None:
    check = system_check(gram_of(40, 10.0))
    check.delta["l.weight"][3, 1] *= 1 + 2.0**-18
    assert check.wrong() == ["0/gram/l"]


def test_124_a_correction_is_accepted_up_to_the_rounding_of_float32_and_no_further() -> None:
    part, rho = torch.tensor([[1.0, -2.0], [0.0, 3.0]], dtype=torch.float64), projection(bytes(32), "", 2, 8)
    reach = part.abs() @ rho.abs()
    bound = largest_correction(reach, rho)
    check_correction("l", reach, rho, bound)
    check_correction("l", reach, rho, -bound)
    for row, column in ((0, 0), (1, 7)):
        sent = bound.clone()
        sent[row, column] *= 1 + 2.0**-50
        with pytest.raises(RemoteProtocolError, match="correction of l beyond the rounding of float32"):
            check_correction("l", reach, rho, sent)
    nothing = torch.full_like(bound, float("nan"))
    with pytest.raises(RemoteProtocolError, match="beyond the rounding"):
        check_correction("l", reach, rho, nothing)


@given(
    values=st.lists(st.floats(width=64, min_value=-4, max_value=4), min_size=1, max_size=20),
    exponent=st.integers(-140, 20),
    seed=st.integers(0, 100),
)
def test_what_rounding_takes_is_always_within_the_bound(values: list[float], exponent: int, seed: int) -> None:
    exact = torch.tensor([values], dtype=torch.float64) * 2.0**exponent
    part, rho = exact.float().double(), projection(bytes([seed]), "", len(values), COLUMNS)
    rest = (exact - part).float()
    reach, correction = part.abs() @ rho.abs(), rest.double() @ rho
    check_correction("l", reach, rho, correction.float().double())
    equation = MeanEquation.of("l", (1, len(values)))
    steps = steps_of(equation, reach)
    coarse = (correction / steps).round() * steps
    check_correction("l", reach, rho, coarse.float().double())
    assert ((coarse - correction).abs() <= equation.left_out * reach.clamp(min=2.0**-149)).all()


@given(values=st.lists(st.floats(width=32, min_value=-4, max_value=4), min_size=1, max_size=20))
def test_steps_by_entry_are_powers_of_two_that_leave_out_what_they_may(values: list[float]) -> None:
    """Of zeros and of the smallest numbers, too."""
    reach = torch.tensor(values, dtype=torch.float64).abs()[:, None]
    equation = FisherEquation.of("p", reach.shape)
    steps, largest = steps_of(equation, reach), 2.0**-34 * reach.clamp(min=2.0**-149)
    assert (torch.frexp(steps).mantissa == 0.5).all()
    assert ((largest < steps) & (steps <= 2 * largest)).all()


@pytest.mark.parametrize("rows", [1, 64**2, 64**2 + 1, 64**3, 64**5])
def test_multiples_by_entry_have_one_exponent_however_they_are_rounded(rows: int) -> None:
    equation = FisherEquation.of("p", (rows,))
    shift, most = shift_of(equation), 2.0**-24 / equation.left_out
    assert {np.frexp(np.float32(number))[1] for number in (shift - most, shift, shift + most - 1)} == {
        np.frexp(shift)[1]
    }
    # A typical entry among as many as share a tolerance, at the edge of its threshold.
    assert 2 * equation.left_out * 10 * equation.group_rows**0.5 <= 2.0**-21.5


@pytest.mark.parametrize(("share", "found"), [(0.25, False), (4.0, True)])
def test_129_a_bent_correction_hides_the_rounding_of_a_row_in_one_weight_and_no_more(share: float, found: bool) -> None:
    """The coordinator says of the error that rounding made it. A documented break, as small as that."""
    check = system_check(gram_of(40, 10.0), d_out=256)
    (equation,) = check.equations
    delta, rho = check.delta["l.weight"], rho_of(check.rho_seed, "0/gram/l", equation)
    right = float(delta[3, 7])
    delta[3, 7] += share * 2.0**-24 * float(delta[3].abs().sum())
    honest = correction_layout([check.claim]).read(check.sent, "0/gram/l")[3]  # a view
    honest -= ((float(delta[3, 7]) - right) * rho[7]).float().numpy()
    assert is_found(check) == found


@pytest.mark.parametrize("parameter", ["l0.weight", "l1.bias"])
@pytest.mark.parametrize("change", [2.0**-20, -(2.0**-20)])
def test_122_one_weight_of_many_is_off_by_a_millionth(parameter: str, change: float) -> None:
    """Of an embedding that only others' rows train, or of one of many biases that are verified together."""
    plan, owners = plan_for(64, [100, 100], has_constant=True), {}
    settings_ = verified(merge_settings(plan), 3)
    for number, name in enumerate(identities_of(3)):
        owners[name] = owner_for(plan, torch.ones(1, 64, dtype=torch.float64), number)
        owners[name].delta["l0.weight"][5] = 0.0  # a token that no owner has
    check = check_of("average", settings_, contributions_of(["average"], settings_, owners))
    assert check.wrong() == []
    tensor = check.delta[parameter]
    tensor.reshape(-1)[-1] *= 1 + change
    assert is_found(check)
    tensor.reshape(-1)[-1] /= 1 + change
    check.delta["l0.weight"][5, 3] = change * float(tensor.abs().mean())
    assert is_found(check)


@pytest.mark.parametrize("method", [*CASES, *STEPS])
def test_122_no_weight_of_any_tensor_is_off_by_a_millionth_in_any_method(method: str) -> None:
    """Of biases, of what is averaged, of what a function is applied to, and of what half the owners' rows reach."""
    plan = plan_for(7, [5], has_bias=method == "logit_adjusted")
    settings_ = verified(merge_settings(plan, "owners" if method == "model_stock" else "rows"), 3)
    if method in STEPS:
        check = step_check(method, settings_, 3, 0, 1e3, reaches_half=True)
    else:
        owners = owners_for(settings_, 3, 0, 1e3, reaches_half=True)
        check = check_of(method, settings_, contributions_of([method], settings_, owners))
    assert_no_weight_is_off(check)


@pytest.mark.parametrize("targets", ["labels", "scores"])
@pytest.mark.parametrize("problem", get_args(ProblemType))
def test_122_no_weight_of_a_refit_to_labels_or_numbers_is_off_by_a_millionth(
    problem: ProblemType, targets: Literal["labels", "scores"]
) -> None:
    settings_ = verified(merge_settings(plan_for(7, [5], has_constant=True), refit=RefitTable(targets=targets)), 3)
    settings_ = replace(settings_, problem_type=problem, largest_target=5.0)
    check = step_check("refit", settings_, 3, 0, 1e3, reaches_half=False)
    assert check.equations[0].is_scaled == (targets == "labels" and problem != "regression")
    assert_no_weight_is_off(check)


def assert_no_weight_is_off(check: Check) -> None:
    """Neither the first nor the last of any tensor, by a millionth."""
    assert check.wrong() == []
    for name, tensor in check.delta.items():
        for number in {0, tensor.numel() - 1}:
            flat, right = tensor.reshape(-1), float(tensor.reshape(-1)[number])
            flat[number] = right * (1 + 2.0**-20) if right else 2.0**-20
            assert is_found(check), (name, number)
            flat[number] = right


def test_125_one_colluding_owner_makes_a_wrong_model_pass() -> None:
    """A documented break: it knows with the coordinator what the others' shares add up to."""
    check = system_check(gram_of(20, 10.0))
    check.delta["l.weight"] += 1.0
    assert check.wrong() != []
    others = ["o1", "o2"]
    honest = {owner: check.shares(owner) for owner in others}
    (hidden,) = check_total(check.claim, honest)["check/0/gram/l"].view("<u8")
    lie = np.array([*(to_words(-from_words(each)) for each in hidden[:COLUMNS]), to_words(0.0)], dtype="<u8")
    assert wrong_claims([check.claim], check_total(check.claim, {"o0": lie.reshape(-1), **honest})) == []


def found_wrong(equation: Equation, residual: float, scale: float, group: int) -> list[str]:
    """What owners find if all they add up is zero, but for one share of one group of rows, and that group's scale."""
    claim = Claim(delivery=0, source=0, equations=(equation,))
    numbers = np.array([[0.0] * (COLUMNS + 1)] * equation.groups)
    numbers[group, -2:] = residual, scale
    words = np.array([to_words(each) for each in numbers.reshape(-1)], dtype="<u8").reshape(-1)
    return wrong_claims([claim], check_total(claim, {"o0": words, "o1": np.zeros_like(words)}))


def a_system(gram_size: int, d_out: int) -> SystemEquation:
    layer = Layer(weight="l.weight", d_in=gram_size, d_out=d_out, stored_input_first=True)
    return SystemEquation.of(System(name="l", kind="", gram_size=gram_size, layers=(layer,), alphas=(1.0,)), 1.0)


@pytest.mark.parametrize("inputs", [60, 64, 65, 1000, 1024, 5000])
@pytest.mark.parametrize("columns", [1, 7, 8, 9])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_product_is_rounded_no_more_often_than_its_depth(inputs: int, columns: int, is_transposed: bool) -> None:
    generator = torch.Generator().manual_seed(inputs)
    rows = 70  # 5,000 inputs are then more than SMALL numbers
    left = 0.1 + torch.rand(rows, inputs, generator=generator, dtype=torch.float64) / 1000  # errors add up
    left = left.T.contiguous().T if is_transposed else left
    right = 2.0 ** torch.randint(-3, 3, (inputs, columns), generator=generator)  # so that each term is exact
    exact = [[math.fsum((row * column).tolist()) for column in right.double().T] for row in left]
    off = (product(left, right.double()) - torch.tensor(exact, dtype=torch.float64)).abs()
    assert (off <= depth(inputs) * UNIT * (left @ right.double())).all()


# How many groups of rows an equation has, how often a number is rounded (twice the depth of a row of A, and twice that
# of rho), and what may be left out of a correction.
EDGES: dict[str, tuple[Equation, int, int, float]] = {
    "system": (a_system(5, 3), 1, 2 * (5 + 2) + 2 * (3 + 2), 2.0**-46),
    "system-of-blocks": (a_system(300, 3), 1, 2 * (64 + 1 + 5) + 2 * (3 + 2), 2.0**-46),
    "mean": (MeanEquation.of("p", (5, 70)), 1, 2 * (1 + 2) + 2 * (64 + 1 + 2), 2.0**-42),
    "number": (MeanEquation.of("p", ()), 1, 2 * (1 + 2) + 2 * (1 + 2), 2.0**-42),
    "groups": (MeanEquation.of("p", (64**2 + 1, 3)), 2, 2 * (1 + 2) + 2 * (3 + 2), 2.0**-42),
    "larger-groups": (MeanEquation.of("p", (64**3 + 1, 3)), 33, 2 * (1 + 2) + 2 * (3 + 2), 2.0**-42),
    "stack": (
        StackedMeans.of((MeanEquation.of("p", (60, 7)), MeanEquation.of("q", (5, 7)))),
        1,
        2 * (1 + 2) + 2 * (7 + 2),
        2.0**-42,
    ),
    "entries": (FisherEquation.of("p", (10, 7)), 1, 2 * (1 + 2) + 2 * (1 + 2), 2.0**-34),
    "groups-of-entries": (FisherEquation.of("p", (64**3 + 1,)), 2, 2 * (1 + 2) + 2 * (1 + 2), 2.0**-35),
}


@pytest.mark.parametrize("kind", EDGES)
@pytest.mark.parametrize("scale", [1024.0, 0.0])
def test_the_tolerance_is_met_on_both_sides_of_its_edge(kind: str, scale: float) -> None:
    """In the first group of rows and the last, which is smaller and has the tolerance of a whole one."""
    equation, groups, times_rounded, left_out = EDGES[kind]
    edge, relative = tolerance(equation, scale), 2 * (2.0**-47 + left_out + (times_rounded + 18) * UNIT)
    assert edge == pytest.approx(relative * scale + 2.0**-92, rel=1e-12, abs=0)
    assert equation.groups == groups
    beyond = edge + max(edge * 2.0**-40, 2.0**-103)  # shares travel in multiples of 2^-103
    for group in {0, groups - 1}:
        for sign in (1, -1):
            assert found_wrong(equation, sign * edge, scale, group) == []
            assert found_wrong(equation, sign * beyond, scale, group) == [f"0/{equation.name}"]


# --- exact numbers ----------------------------------------------------------------------------------------------------


@given(numbers=st.lists(st.floats(min_value=-(2.0**144), max_value=2.0**144, exclude_min=True, exclude_max=True)))
def test_numbers_in_words_add_up_exactly(numbers: list[float]) -> None:
    words = np.array([to_words(number) for number in (0.0, *numbers)], dtype="<u8")
    added = reduce(wide.add, words[:, None])
    cut = [Fraction(int(Fraction(number) * 2**103), 2**103) for number in numbers]
    assert from_words(added[0]) == float(sum(cut))


def test_a_sum_of_150_owners_does_not_wrap_around() -> None:
    for number in (2.0**144 * (1 - 2.0**-53), -(2.0**144) * (1 - 2.0**-53)):
        words = np.array([to_words(number)], dtype="<u8")
        assert from_words(reduce(wide.add, [words] * 150)[0]) == 150 * number


@pytest.mark.parametrize("number", [2.0**144, -(2.0**144), float("inf"), float("nan")])
def test_a_number_that_words_cannot_hold_does_not_leave(number: float) -> None:
    with pytest.raises(NumericalError, match="too large to be summed; nothing has left"):
        to_words(number)


def test_128_no_owner_refuses_a_model_because_of_its_own_numbers() -> None:
    """Whoever refuses a crafted one alone would tell that its rows reach an input. An owner takes none beyond the bound
    (client/received_models.py).
    """
    plan, random, owners = plan_for(6, [4]), torch.Generator().manual_seed(0), {}
    for number, name in enumerate(identities_of(3)):
        rows = torch.randn(30, 6, generator=random, dtype=torch.float64)
        rows[:, 2] *= number == 1
        owners[name] = owner_for(plan, rows, number)
    settings_ = verified(merge_settings(plan), 3)
    check = check_of("regmean", settings_, contributions_of(["regmean"], settings_, owners))
    check.sent[:] = 0

    def refusing(size: float) -> list[str]:
        check.delta["l0.weight"] = torch.zeros(4, 6)
        check.delta["l0.weight"][:, 2] = size
        found = []
        for owner in owners:
            try:
                check.shares(owner)
            except NumericalError:
                found.append(owner)
        return found

    assert refusing(2.0**110) == ["o1"]
    assert refusing(LARGEST_NUMBER) == []


def test_projections_are_the_same_everywhere_and_uniform() -> None:
    numbers = projection(bytes(32), "gram/l", 3, 8)
    assert numbers[0, :3].tolist() == KNOWN
    many = projection(bytes(32), "gram/l", 4000, 8)
    torch.testing.assert_close(many[:3], numbers)
    assert (many == many.round()).all()
    assert (many.abs() <= 2**15).all()
    assert abs(float(many.mean())) < 400
    assert len(many.unique()) > 20_000
    assert not torch.equal(projection(bytes(32), "gram/m", 3, 8), numbers)
    for columns in (1, 8):
        whole = projection(bytes(32), "gram/l", 40, columns)
        torch.testing.assert_close(projection(bytes(32), "gram/l", 12, columns, first=28), whole[28:])


def test_an_equation_by_entry_has_shares_for_each_group_of_rows() -> None:
    """Against the formula."""
    size = ROWS_AT_ONCE + 5001
    plan, random = plan_for(1, [size]), np.random.default_rng(0)
    entries = (TensorEntry(name=f"{kind}/l0.weight", shape=(size,), bound=8.0) for kind in ("fisher", "fisher_delta"))
    layout = TensorLayout(tuple(entries))
    encoded = fixed_point.encode(layout, random.uniform(0, 1, layout.size), 3)
    own = OwnPart(layout=layout, encoded=encoded, owners=("o0", "o1", "o2"), roster_size=3)
    equation = FisherEquation.of("l0.weight", plan.shapes["l0.weight"])
    claim = Claim(delivery=0, source=0, equations=(equation,))
    delta = torch.from_numpy(random.uniform(0.25, 1, size)).float()
    sent = np.full(size, shift_of(equation) + 500, dtype=np.float32)
    challenge = Challenge(claims=(claim,), rho_seed=bytes(32), combination_seed=bytes(32), blind=bytes(32), sent=sent)
    ((_, groups),) = challenge.shares(claim, {"l0.weight": delta.reshape(plan.shapes["l0.weight"])}, own)
    fisher, products = (torch.from_numpy(own[entry.name]) for entry in layout.entries)
    steps = 2.0 ** torch.floor(torch.log2(2.0**-34 * delta.double()))
    residual = fisher * (delta.double() + 500 * steps) - products
    test = projection(bytes(32), "0/fisher/l0.weight", size, COLUMNS)
    right_weight = 2 * rounding(equation) / relative_tolerance(equation)
    terms = fisher * (delta.double().abs() + 2.0**-149) + right_weight * products
    rounded = 2 * 3 * 64 * UNIT / relative_tolerance(equation)
    assert len(groups) == 2
    for number, words in enumerate(groups):
        some = slice(number * ROWS_AT_ONCE, (number + 1) * ROWS_AT_ONCE)
        shares = torch.tensor([from_words(each) for each in words[:COLUMNS]], dtype=torch.float64)
        torch.testing.assert_close(shares, residual[some] @ test[some], rtol=1e-10, atol=0)
        scale = 2.0**15 * (10 * terms[some].norm() + rounded * residual[some].norm(p=1))
        assert from_words(words[COLUMNS]) == pytest.approx(challenge.blinded(float(scale)))
    sent[ROWS_AT_ONCE + 4] = shift_of(equation) + 4097  # in the second block
    with pytest.raises(NotTheMerge, match="beyond the rounding of float32"):
        list(challenge.shares(claim, {"l0.weight": delta.reshape(plan.shapes["l0.weight"])}, own))


def test_the_mean_of_a_large_embedding_has_shares_for_each_group_of_rows() -> None:
    """Against the formula."""
    size, rows, random = 64**2, 2 * 64**2 + 100, np.random.default_rng(0)
    name, shape = "l0.weight", (rows, 3)
    entries = (
        TensorEntry(name="weight", shape=(1,), bound=8.0),
        TensorEntry(name=f"weighted_delta/{name}", shape=shape, bound=8.0),
    )
    layout = TensorLayout(entries)
    encoded = fixed_point.encode(layout, random.uniform(0, 1, layout.size), 3)
    own = OwnPart(layout=layout, encoded=encoded, owners=("o0", "o1", "o2"), roster_size=3)
    delta = torch.from_numpy(random.uniform(0.25, 1, shape)).float()
    sent = np.full(COLUMNS * rows, 2.0**-40, dtype=np.float32)
    claim = Claim(delivery=0, source=0, equations=(MeanEquation.of(name, shape, scale=0.5),))
    challenge = Challenge(claims=(claim,), rho_seed=bytes(32), combination_seed=bytes(32), blind=bytes(32), sent=sent)
    ((_, groups),) = challenge.shares(claim, {name: delta}, own)
    ((known, equation),) = claim.named()
    rho, test = rho_of(bytes(32), known, equation), projection(bytes(32), known, rows, COLUMNS)
    weight, right = float(own["weight"][0]), 0.5 * torch.from_numpy(own[f"weighted_delta/{name}"])
    residual = weight * (delta.double() @ rho + 2.0**-40) - right @ rho  # (rows, COLUMNS)
    right_weight = 2 * rounding(equation) / relative_tolerance(equation)
    terms = (abs(weight) * delta.double().abs() + right_weight * right.abs()) @ rho.abs()
    rounded = 2 * 2 * 64 * UNIT / relative_tolerance(equation)
    assert len(groups) == 3
    for number, words in enumerate(groups):
        some = slice(number * size, (number + 1) * size)
        shares = torch.tensor([from_words(each) for each in words[:COLUMNS]], dtype=torch.float64)
        torch.testing.assert_close(shares, (residual[some] * test[some]).sum(dim=0), rtol=1e-10, atol=0)
        scale = 2.0**15 * (10 * terms[some].norm(dim=0) + rounded * residual[some].norm(p=1, dim=0)).max()
        assert from_words(words[COLUMNS]) == pytest.approx(challenge.blinded(float(scale)))


# --- a classifier whose scale the coordinator names -------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RefitRun:
    """Three owners' parts of a refit to labels, or to scores, on made-up rows."""

    settings: MergeSettings
    contributions: Contributions

    @classmethod
    def of(cls, *, classes: int = 10, change: float = 1.0, targets: Literal["labels", "scores"] = "labels") -> Self:
        random, size = torch.Generator().manual_seed(0), 8
        settings_ = verified(merge_settings(plan_for(size, [classes]), refit=RefitTable(targets=targets)), 3)
        (step,) = REFIT.steps(settings_)
        layout, vectors = REFIT.step_layout(settings_, step), dict[str, NDArray[np.float64]]()
        start = 0.05 * torch.randn(size, classes, generator=random, dtype=torch.float64)
        for name in identities_of(3):
            features = torch.randn(200, size, generator=random, dtype=torch.float64)
            own = start + 0.05 * change * torch.randn(size, classes, generator=random, dtype=torch.float64)
            labels = torch.randint(0, classes, (200,), generator=random)
            terms = ClassifierTerms(features=features, targets=labels, scores=features @ own, start=start)
            owner = OwnerTerms(examples=200, delta={}, classifier=terms)
            vectors[name] = np.zeros(layout.size)
            layout.flatten(REFIT.step_contribution(settings_, step, owner), vectors[name])
        return cls(settings=settings_, contributions=Contributions.of(layout, vectors))

    def check(self, *, seed: int = 0, factor: float | None = None) -> Check:
        """What is sent, honestly solved, except that the coordinator may choose the `factor`."""
        (step,), (value, *_) = REFIT.steps(self.settings), REFIT.swept(self.settings.tables)
        with pytest.MonkeyPatch.context() as patch:
            if factor is not None:
                patch.setattr(ClassifierEquation, "factor_of", lambda *about: factor)
            merged = REFIT.solve_step(self.settings, step, self.contributions.total, value)
        equations = REFIT.step_equations(self.settings, step, value)
        return Check(equations=equations, contributions=self.contributions, merged=merged, seed=seed)


def test_245_a_classifier_whose_scores_the_coordinator_makes_larger_or_smaller() -> None:
    """All else is solved for its factor, and is sent as an honest coordinator would."""
    run = RefitRun.of()
    honest = run.check()
    assert honest.wrong() == []
    for other in (2.0**-8, 1.001, 0.999, 2.0):
        name = honest.claim.equations[0].name
        check = run.check(factor=float(np.float32(honest.merged.factor * other)) if other > 2.0**-8 else other)
        assert check.wrong() == [f"0/{name}/factor"]
    honest.sent[-1] *= np.float32(1.5)  # another one than it solved for
    assert len(honest.wrong()) == 2


def test_a_factor_is_found_one_part_in_a_million_off_and_passes_as_float32_rounds_it() -> None:
    """Both sides of the edge: q enters twice, and what it has to make zero is twice as large as the scores' size."""
    run = RefitRun.of()
    for seed in range(8):
        factor = np.float32(run.check(seed=seed).merged.factor)
        for other in (np.nextafter(factor, np.float32(0)), np.nextafter(factor, np.float32(np.inf))):
            assert run.check(seed=seed, factor=float(other)).wrong() == []
        for change in (1 - 2.0**-20, 1 + 2.0**-20):
            assert run.check(seed=seed, factor=float(np.float32(factor * change))).wrong() != []


def test_the_tolerance_of_a_factor_is_the_formula_on_both_sides_of_its_edge() -> None:
    check = RefitRun.of().check()
    (equation,) = check.claim.equations
    edge = factor_tolerance(equation, 1024.0)
    assert edge == pytest.approx((2.0**-22 + 606 * 8**2 * UNIT) * 1024, rel=1e-12)
    for sign in (-1, 1):
        total = check_total(check.claim, {name: check.shares(name) for name in check.contributions.own})
        for number, is_found in ((edge, False), (edge * (1 + 2.0**-40), True)):
            words = np.array([to_words(sign * number), to_words(1024.0)], dtype="<u8")
            total[f"check/0/{equation.name}/factor"].view("<u8")[:] = words
            assert wrong_claims([check.claim], total) == ([f"0/{equation.name}/factor"] if is_found else [])


def test_a_factor_makes_fitted_scores_as_large_as_the_owners_own() -> None:
    """Against the formula, and to within what `LEAST_FIT` adds."""
    run = RefitRun.of(classes=2)
    check, total = run.check(), run.contributions.total
    (equation,) = check.claim.equations
    assert isinstance(equation, ClassifierEquation)
    gram, targets, start = (torch.from_numpy(total[f"head_{each}@0.5"]) for each in ("gram", "targets", "start"))
    published = torch.linalg.solve(gram, start) + equation.part_of(check.delta).double()
    size = float((published * targets).sum()) / check.merged.factor  # of V
    energy = 600 * (1 - 1 / 2)
    assert check.merged.factor**2 * (size + LEAST_FIT * energy) == pytest.approx(total["head_scores@0.5"][0], rel=1e-5)


@pytest.mark.parametrize("factor", [0.0, -1.0, 2.0**-9, 2.0**17, float("inf"), float("nan")])
def test_127_a_scale_beyond_its_bounds_is_refused(factor: float) -> None:
    """Otherwise an owner's terms could be too large to be summed, and its refusal would tell how large its sums are."""
    check = RefitRun.of().check()
    check.sent[-1] = factor
    with pytest.raises(NotTheMerge, match="sent a factor of"):
        check.wrong()


@pytest.mark.parametrize("targets", ["labels", "scores"])
@pytest.mark.parametrize("change", [1.0, 1e-3, 1e-5, 1e-8, 0.0])
def test_an_honest_refit_passes_however_little_the_classifier_changes(
    change: float, targets: Literal["labels", "scores"]
) -> None:
    run = RefitRun.of(change=change, targets=targets)
    for seed in range(4):
        check = run.check(seed=seed)
        assert check.wrong() == []
    check.delta[run.settings.plan.inputs[0].layers[0].weight][0, 0] += 1e-6
    assert check.wrong() != []


def test_128_the_scales_that_travel_are_known_to_a_factor_of_two() -> None:
    """Powers of two would give single owners' sizes: their sum has a bit for each owner."""
    check = RefitRun.of().check()
    for owner in check.contributions.own:
        scales = []
        for secret in range(30):
            check.blind = bytes([secret]) * 32
            scales.append(from_words(check.shares(owner).reshape(-1, wide.WORDS)[-1]))
        assert scales[-1] == from_words(check.shares(owner).reshape(-1, wide.WORDS)[-1])  # asked again
        assert len(set(scales)) == 30
        assert 1.5 < max(scales) / min(scales) <= 2
        assert not any(log2(scale).is_integer() for scale in scales)


def blinding_with(secret: bytes) -> Challenge:
    return Challenge(claims=(), rho_seed=b"", combination_seed=b"", blind=secret, sent=np.zeros(0, dtype=np.float32))


def test_128_many_scales_that_are_alike_do_not_tell_single_owners_shares() -> None:
    """With another factor for each layer and candidate, the mean and the variance of what is opened did."""
    owners = [(blinding_with(b"a"), 0.9), (blinding_with(b"b"), 0.1)]
    layers = np.random.default_rng(0).uniform(1, 100, 200)
    opened = [sum(owner.blinded(size * layer) for owner, size in owners) / layer for layer in layers]
    np.testing.assert_allclose(opened, opened[0], rtol=1e-12)


@given(size=st.floats(min_value=1e-30, max_value=1e30))
def test_128_a_scale_is_not_rounded_so_sums_of_scales_are_no_sums_of_small_whole_numbers(size: float) -> None:
    """From sums of such numbers, each times an owner's factor, a lattice reduction gave every owner's."""
    factor = blinding_with(b"a").blinded(1.0)
    assert 1 <= factor < 2
    assert blinding_with(b"a").blinded(size) == size * factor


@pytest.mark.parametrize(("size", "found"), [(1e-5, []), (0.1, ["0/gram/l"])])
def test_129_where_no_row_reaches_only_a_small_part_of_the_mean_weight_change_passes(
    size: float, found: list[str]
) -> None:
    """The tolerance is relative to the whole equation, so it is largest where there is nothing but the least ridge."""
    gram = gram_of(256, 10.0)
    gram[:, 0] = gram[0, :] = 0.0  # an input that is never seen
    gram[0, 0] = LEAST_RIDGE * float(gram.diagonal().mean())
    check = system_check(gram, d_out=64)
    delta = check.delta["l.weight"]
    delta[0, 0] += size * float(delta.abs().mean())
    assert check.wrong() == found


def test_129_nobody_can_give_another_embedding_to_a_token_that_no_owner_has() -> None:
    """Where a tensor's Fisher information is all elsewhere, an entry must still be heavy enough to be verified."""
    plan, owners = plan_for(200, [64]), {}
    settings_ = verified(merge_settings(plan), 3)
    for number, name in enumerate(identities_of(3)):
        owner = owner_for(plan, torch.ones(1, 200, dtype=torch.float64), number)
        owner.fisher["l0.weight"].mul_(60)[7] = 0.0
        owners[name] = replace(owner, examples=10_000)
    check = check_of("fisher", settings_, contributions_of(["fisher"], settings_, owners))
    assert check.wrong() == []
    check.delta["l0.weight"][7] *= 1.02
    assert check.wrong() == ["0/fisher/l0.weight"]
