"""The part of a delta that an adapter holds, against the singular value decomposition, and how much is lost."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import T5Config, T5ForConditionalGeneration

from common.errors import RemoteProtocolError
from common.models.low_rank import (
    UNIT,
    AdapterDelta,
    Factors,
    adapter_plan,
    check_cut,
    cut,
    factorise,
    is_closest,
    multiply,
)
from common.models.parameters import parameter_shapes
from tests.support.models import tiny_bert, tiny_gpt2


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 15), st.integers(0, 2**32 - 1))
def test_the_product_is_the_truncated_singular_value_decomposition(d_out: int, d_in: int, rank: int, seed: int) -> None:
    delta = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed))
    left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
    values[rank:] = 0
    factors = factorise(delta, rank)
    assert factors.up.shape == (d_out, rank)
    assert factors.down.shape == (rank, d_in)
    product = multiply(factors).double()
    best = (delta - left * values @ right).norm()
    assert (delta - product).norm() <= best + 1e-6 * delta.norm()
    assert torch.linalg.matrix_rank(product, rtol=1e-5) <= rank


@given(
    st.integers(1, 12), st.integers(1, 12), st.integers(1, 15), st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 3])
)
def test_130_the_cut_is_accepted_whatever_the_spectrum(
    d_out: int, d_in: int, rank: int, seed: int, same_values: int
) -> None:
    """With a spectrum of any width, also where values are equal or zero, and so the cut is not the only one."""
    random = torch.Generator().manual_seed(seed)
    left, _, right = torch.linalg.svd(torch.randn(d_out, d_in, generator=random).double(), full_matrices=False)
    values = torch.logspace(0, -8, left.shape[1], dtype=torch.float64)
    values[:same_values] = values[min(same_values, len(values)) - 1]
    values[len(values) - same_values // 2 :] = 0
    delta = (left * values @ right).float()
    assert is_closest(delta, factorise(delta, rank))
    turned = torch.linalg.qr(torch.randn(rank, rank, generator=random).double()).Q
    if rank <= min(d_out, d_in):  # the same matrix from other factors
        factors = factorise(delta, rank)
        short_is_up = d_out <= d_in
        directions = ((factors.up if short_is_up else factors.down.T).double() @ turned).float()
        other = (directions.double().T @ (delta if short_is_up else delta.T).double()).float()
        up, down = (directions, other) if short_is_up else (other.T, directions.T)
        assert is_closest(delta, Factors(up=up, down=down))


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (9, 9)])
@pytest.mark.parametrize("seed", range(5))
def test_130_factors_of_another_matrix_are_found_however_well_they_fit_each_other(
    shape: tuple[int, int], seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    delta = torch.randn(shape, generator=random)
    left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
    factors = factorise(delta, 3)

    def of(columns: torch.Tensor) -> Factors:
        """The factors that follow from the one on the shorter side, (d, rank)."""
        columns = columns.float()
        if shape[0] <= shape[1]:
            return Factors(up=columns, down=(columns.double().T @ delta.double()).float())
        return Factors(up=(delta.double() @ columns.double()).float(), down=columns.T)

    short = left if shape[0] <= shape[1] else right.T
    assert is_closest(delta, of(short[:, :3]))
    assert is_closest(delta, of(short[:, [2, 0, 1]]))
    assert not is_closest(delta, of(short[:, [0, 1, 3]]))
    assert not is_closest(delta, of(2 * short[:, :3]))  # not orthonormal
    assert not is_closest(delta, of(short[:, [0, 1, 1]]))
    gap = float((values[2] ** 2 - values[3] ** 2) / (values**2).sum())
    for angle, found in ((1e-8, False), (1e-4 / gap**0.5, True)):
        turned = short[:, :3].clone()
        turned[:, 2] = torch.cos(torch.tensor(angle)) * short[:, 2] + torch.sin(torch.tensor(angle)) * short[:, 3]
        assert is_closest(delta, of(turned)) is not found
    wrong = factors.down.clone()
    wrong[0, 0] += 1e-4 * wrong.abs().max()
    assert not is_closest(delta, Factors(up=factors.up, down=wrong))
    padded = factorise(delta, 15)
    padded.up[0, 14] = 1e-6
    assert not is_closest(delta, padded)
    padded.up[0, 14] = float("nan")
    assert not is_closest(delta, padded)


def one_direction(turned: float = 0.0, longer: float = 1.0) -> Factors:
    """The cut of diag(1, 0) to rank 1, with its direction turned, and with another length."""
    up = torch.tensor([[longer], [turned]])
    return Factors(up=up, down=torch.tensor([[longer, 0.0]]))


def test_130_each_tolerance_of_a_cut_is_met_on_both_sides_of_its_edge() -> None:
    matrix, least = torch.diag(torch.tensor([1.0, 0.0])), 2.0**-47 + 4 * (2 + 2 * 2) * UNIT
    assert is_closest(matrix, one_direction(turned=0.8 * least**0.5))
    assert not is_closest(matrix, one_direction(turned=1.2 * least**0.5))  # rounding is a quarter of it
    assert is_closest(matrix, one_direction(longer=1 - 2.0**-23))  # its square is 2^-22 - 2^-46 too short
    assert not is_closest(matrix, one_direction(longer=1 + 2.0**-23))
    honest = one_direction()
    assert is_closest(matrix, replace(honest, down=honest.down * (1 + 2.0**-23)))
    assert not is_closest(matrix, replace(honest, down=honest.down * (1 + 2.0**-22)))


@given(st.integers(1, 9), st.integers(1, 130), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_a_product_of_factors_is_the_same_in_whatever_order_a_machine_would_add(
    rank: int, d_out: int, d_in: int, seed: int
) -> None:
    """Against the slow way: one number after the other."""
    random = torch.Generator().manual_seed(seed)
    factors = Factors(up=torch.randn(d_out, rank, generator=random), down=torch.randn(rank, d_in, generator=random))
    product = multiply(factors)
    for row, column in ((0, 0), (d_out - 1, d_in - 1)):
        number = 0.0
        for k in range(rank):
            number += float(factors.up[row, k]) * float(factors.down[k, column])
        assert float(product[row, column]) == float(torch.tensor(number, dtype=torch.float64).float())


def test_130_every_layer_of_a_model_must_be_cut() -> None:
    plan, random = adapter_plan(tiny_gpt2(), made_here=(), rank=2), torch.Generator().manual_seed(0)
    delta = {name: torch.randn(shape, generator=random) for name, shape in parameter_shapes(tiny_gpt2()).items()}
    low_rank = cut(delta, plan)
    check_cut(delta, plan, low_rank.factors)
    name = list(plan.layers)[-1]
    factors = {**low_rank.factors, name: factorise(torch.ones_like(multiply(low_rank.factors[name])), 2)}
    with pytest.raises(RemoteProtocolError, match=f"factors of {name} that are not the closest of their rank"):
        check_cut(delta, plan, factors)


def test_a_delta_of_that_rank_loses_nothing() -> None:
    random = torch.Generator().manual_seed(0)
    delta = torch.randn(16, 3, generator=random) @ torch.randn(3, 24, generator=random)
    torch.testing.assert_close(multiply(factorise(delta, 3)), delta, rtol=1e-6, atol=1e-6)
    assert (multiply(factorise(torch.zeros(16, 24), 3)) == 0).all()


@pytest.mark.parametrize("make", [tiny_bert, tiny_gpt2])
def test_layers_are_cut_the_head_is_whole_the_rest_is_dropped(make) -> None:
    model = make()
    plan = adapter_plan(model, made_here=(), rank=2)
    random = torch.Generator().manual_seed(0)
    delta = {name: torch.randn(shape, generator=random) for name, shape in parameter_shapes(model).items()}
    low_rank = cut(delta, plan)
    held = AdapterDelta(delta, plan, low_rank.factors)
    assert set(held) == set(delta)
    head = {name for name in delta if name.startswith(("classifier.", "score."))}
    assert set(plan.whole) == head
    errors = {layer.name: layer.relative_error for layer in low_rank.layers}
    lost = total = 0.0
    for name, tensor in held.items():
        if name in head:
            assert torch.equal(tensor, delta[name])
        elif name in plan.layers:
            assert torch.linalg.matrix_rank(tensor.double(), rtol=1e-5) == 2
            assert errors[name] == pytest.approx(float((tensor - delta[name]).norm() / delta[name].norm()), rel=1e-5)
            lost, total = lost + float((tensor - delta[name]).square().sum()), total + float(delta[name].square().sum())
        else:
            assert (tensor == 0).all()
    assert low_rank.relative_error == pytest.approx((lost / total) ** 0.5, rel=1e-5)
    dropped = [tensor for name, tensor in delta.items() if name not in head and name not in plan.layers]
    norm = (
        torch.cat([tensor.flatten() for tensor in dropped]).norm()
        / torch.cat([tensor.flatten() for tensor in delta.values()]).norm()
    )
    assert low_rank.dropped == pytest.approx(float(norm), rel=1e-5)


def test_what_the_base_s_files_lack_stays_whole() -> None:
    plan = adapter_plan(tiny_bert(), made_here=("bert.pooler.dense.weight", "bert.pooler.dense.bias"), rank=2)
    assert plan.whole_modules == ("bert.pooler.dense", "classifier")
    assert "bert.pooler.dense.weight" not in plan.layers


def test_a_model_that_does_not_separate_its_head_from_its_body_is_cut_throughout() -> None:
    config = T5Config(vocab_size=80, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, tie_word_embeddings=False)
    plan = adapter_plan(T5ForConditionalGeneration(config), made_here=(), rank=2)
    assert plan.whole == ()
    assert "encoder.block.0.layer.0.SelfAttention.q.weight" in plan.layers
