"""The part of a delta that an adapter holds, against the singular value decomposition, and how much is lost."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import T5Config, T5ForConditionalGeneration

from common.models.low_rank import adapter_plan, cut, factorise, multiply
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
    assert set(low_rank.delta) == set(delta)
    head = {name for name in delta if name.startswith(("classifier.", "score."))}
    assert set(plan.whole) == head
    errors = {layer.name: layer.relative_error for layer in low_rank.layers}
    lost = total = 0.0
    for name, tensor in low_rank.delta.items():
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
