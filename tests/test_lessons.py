"""What a student is taught, against the slow, obvious version of each divergence."""

from dataclasses import replace
from math import exp, log

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.agreement import Task
from common.merge_methods.distill import DISTILL, DistillTable
from common.merge_methods.terms import MergeSettings
from common.summation.protocol import Total
from server.lessons import OfNextTokens, lessons_of
from tests.support.merging import merge_settings, plan_for

CPU = torch.device("cpu")
OWNERS = ("ada", "bea", "cyd")
ROWS = 5
SEVERAL = Task(problem_type="multi_label_classification", labels=("a", "b", "c"))
NUMBERS = Task(problem_type="regression", labels=("a", "b", "c"), target_range=(-1.0, 3.0))
ONE = Task(labels=("a", "b", "c"))


def total_of(logits: NDArray[np.float64], **table: object) -> tuple[MergeSettings, Total]:
    """What three owners' totals are if each says `logits`, (predictions, outputs)."""
    agreed = DistillTable.model_validate({"pool": "pool", "rows": len(logits), **table})
    terms = replace(merge_settings(plan_for(3, [2]), distill=agreed), num_labels=logits.shape[1])
    layout = DISTILL.layout(terms)
    vector = np.concatenate([len(OWNERS) * logits.reshape(-1), np.full(logits.shape[1], float(len(OWNERS)))])
    return terms, Total(layout=layout, vector=vector, owners=OWNERS, roster_size=len(OWNERS))


def some(seed: int, outputs: int) -> tuple[NDArray[np.float64], torch.Tensor]:
    random = np.random.default_rng(seed)
    return random.normal(0, 3, (ROWS, outputs)), torch.from_numpy(random.normal(0, 3, (2, outputs))).float()


def kl(one: list[float], other: list[float]) -> float:
    return sum(p * (log(p) - log(q)) for p, q in zip(one, other, strict=True) if p > 0)


def softmax(numbers: NDArray[np.float64]) -> list[float]:
    powers = [exp(each) for each in numbers]
    return [each / sum(powers) for each in powers]


SEEDS = st.integers(0, 2**32 - 1)
TAUGHT = torch.tensor([3, 1])


@settings(max_examples=20)
@given(SEEDS, st.floats(0.5, 4))
def test_one_label_is_taught_by_the_divergence_of_two_softmaxes(seed: int, temperature: float) -> None:
    logits, said = some(seed, 3)
    lessons = lessons_of(ONE, *total_of(logits, temperature=temperature), CPU)
    expected = np.mean(
        [
            kl(softmax(logits[row] / temperature), softmax(said[at].double().numpy() / temperature))
            for at, row in ((0, 3), (1, 1))
        ]
    )
    assert lessons.divergence(said, TAUGHT).item() == pytest.approx(expected * temperature**2, rel=1e-3, abs=1e-4)


@settings(max_examples=20)
@given(SEEDS, st.floats(0.5, 4))
def test_several_labels_are_taught_by_the_divergence_of_each_sigmoid(seed: int, temperature: float) -> None:
    logits, said = some(seed, 3)
    lessons = lessons_of(SEVERAL, *total_of(logits, temperature=temperature), CPU)
    expected = 0.0
    for at, row in ((0, 3), (1, 1)):
        for given_, found in zip(logits[row], said[at].double().numpy(), strict=True):
            p, q = (1 / (1 + exp(-each / temperature)) for each in (given_, found))
            expected += kl([p, 1 - p], [q, 1 - q]) / 2
    assert lessons.divergence(said, TAUGHT).item() == pytest.approx(expected * temperature**2, rel=1e-3, abs=1e-4)


def test_numbers_are_taught_on_the_agreed_range() -> None:
    """What an owner says as L is the highest number of the range; -L is the lowest."""
    logits = np.array([[16.0, -16.0, 0.0]])
    lessons = lessons_of(NUMBERS, *total_of(logits), CPU)
    said = torch.tensor([[3.0, -1.0, 3.0]])
    assert lessons.divergence(said, torch.tensor([0])).item() == pytest.approx(((3 - 1) / 4) ** 2)


@settings(max_examples=20)
@given(SEEDS, st.integers(2, 12), st.integers(1, 12))
def test_next_tokens_are_taught_by_name_where_they_are_likely_and_as_one_otherwise(
    seed: int, vocabulary: int, most_likely: int
) -> None:
    logits, said = some(seed, vocabulary)
    agreed, total = total_of(logits, vocabulary=vocabulary, predictions=ROWS, most_likely=most_likely)
    lessons = lessons_of(Task(kind="causal-lm"), agreed, total, CPU)
    kept, divergences = min(most_likely, vocabulary - 1), []
    for at, row in ((0, 3), (1, 1)):
        p, q = softmax(logits[row]), softmax(said[at].double().numpy())
        likely = sorted(range(vocabulary), key=lambda token, p=p: -p[token])  # type: ignore[misc]
        merged = [
            [each[token] for token in likely[:kept]] + [sum(each[token] for token in likely[kept:])] for each in (p, q)
        ]
        divergences.append(kl(*merged))
        assert divergences[-1] <= kl(p, q) + 1e-9
    padded = torch.cat([said, torch.full((2, 2), 50.0)], dim=1)  # outputs beyond the vocabulary say nothing
    assert lessons.divergence(padded, TAUGHT).item() == pytest.approx(np.mean(divergences), rel=1e-3, abs=1e-4)


def test_a_vocabulary_is_looked_at_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, _ = some(0, 7)
    agreed, total = total_of(logits, vocabulary=7, predictions=ROWS, most_likely=3)
    whole = lessons_of(Task(kind="causal-lm"), agreed, total, CPU)
    monkeypatch.setattr("server.lessons.BLOCK", 15)
    blocks = lessons_of(Task(kind="causal-lm"), agreed, total, CPU)
    assert isinstance(whole, OfNextTokens)
    assert isinstance(blocks, OfNextTokens)
    assert torch.equal(whole.tokens, blocks.tokens)
    torch.testing.assert_close(whole.log_shares, blocks.log_shares)


def test_gradients_are_numbers_even_if_the_student_is_sure_of_something_else() -> None:
    logits = np.zeros((1, 4))
    agreed, total = total_of(logits, vocabulary=4, predictions=1, most_likely=10)
    lessons = lessons_of(Task(kind="causal-lm"), agreed, total, CPU)
    said = torch.tensor([[200.0, 0.0, 0.0, -200.0]], requires_grad=True)
    lessons.divergence(said, torch.tensor([0])).backward()
    assert said.grad is not None
    assert torch.isfinite(said.grad).all()
