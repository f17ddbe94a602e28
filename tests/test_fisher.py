"""The diagonal Fisher against what can be computed in other ways."""

import numpy as np
import pytest
import torch

from client.data.rows import Rows
from client.measurement.fisher import measure_fisher
from deploy.example.reviews import make_tokenizer
from tests.support.models import tiny_bert


def rows_of(count: int) -> Rows:
    random = np.random.default_rng(0)
    features = tuple({"input_ids": random.integers(1, 50, 6).tolist(), "attention_mask": [1] * 6} for _ in range(count))
    return Rows(features=features, targets=np.zeros(count, np.int64), tokenizer=make_tokenizer())


def test_the_head_s_fisher_is_the_squared_error_times_the_squared_features() -> None:
    # d loss / d bias = p - onehot(y), with y drawn from p: its square can be recomputed from the logits alone.
    model, rows = tiny_bert(), rows_of(12)
    fisher = measure_fisher(model, rows, seed=3)
    random, expected = torch.Generator().manual_seed(3), torch.zeros(3)
    with torch.no_grad():
        for index in range(12):
            p = model(**rows.batch(np.array([index]))[0]).logits.softmax(-1)[0]
            drawn = torch.multinomial(p, 1, generator=random)
            expected += (p - torch.nn.functional.one_hot(drawn[0], 3)) ** 2
    torch.testing.assert_close(fisher["classifier.bias"], expected)


def test_squares_are_taken_per_example_before_they_are_added() -> None:
    model, rows = tiny_bert(), rows_of(5)
    together = measure_fisher(model, rows, seed=0)
    weights = dict(model.named_parameters())
    random = torch.Generator().manual_seed(0)
    expected = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for index in range(5):
        logits = model(**rows.batch(np.array([index]))[0]).logits
        drawn = torch.multinomial(logits.detach().softmax(-1)[0], 1, generator=random)
        model.zero_grad()
        logits.log_softmax(-1)[0, drawn[0]].backward()
        for name, weight in weights.items():
            assert weight.grad is not None
            expected[name] += weight.grad**2
    for name, value in together.items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_several_outputs_have_the_sum_of_each_one_s_own_fisher(problem_type: str) -> None:
    """Over many draws, the mean is what two passes a label or target give: p (1 - p), or 1, times the squared gradient
    of the output. Outputs are drawn independently, so products of two of them have the mean 0.
    """
    model, rows = tiny_bert(), rows_of(2)
    model.config.problem_type = problem_type  # type: ignore[assignment]
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([-1.0, 0.0, 2.0]))
    draws = 60
    found = [measure_fisher(model, rows, seed)["classifier.weight"] for seed in range(draws)]
    expected = torch.zeros_like(found[0])
    for index in range(2):
        batch, _ = rows.batch(np.array([index]))
        for output in range(3):
            value = model(**batch).logits[0, output]
            (gradient,) = torch.autograd.grad(value, [model.classifier.weight])
            p = value.detach().sigmoid()
            expected += gradient**2 * (p * (1 - p) if problem_type != "regression" else 1)
    mean, spread = torch.stack(found).mean(0), torch.stack(found).std(0) / draws**0.5
    assert ((mean - expected).abs() <= 5 * spread + 1e-7).all()
    assert (expected > 0).any()


def test_the_same_seed_gives_the_same_fisher() -> None:
    one, other = (measure_fisher(tiny_bert(), rows_of(4), seed=1) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["bert.encoder.layer.0.attention.self.query.weight", "classifier.weight"])
def test_fisher_is_never_negative(name: str) -> None:
    assert (measure_fisher(tiny_bert(), rows_of(4), seed=0)[name] >= 0).all()


def test_of_named_parameters_alone_it_is_the_same_to_the_bit() -> None:
    model, rows, names = (
        tiny_bert(),
        rows_of(3),
        ("classifier.weight", "bert.encoder.layer.1.attention.self.query.weight"),
    )
    whole, some = measure_fisher(model, rows, seed=2), measure_fisher(model, rows, seed=2, names=names)
    assert set(some) == set(names)
    assert all(torch.equal(some[name], whole[name]) for name in names)
