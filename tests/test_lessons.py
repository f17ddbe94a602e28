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


def total_of(numbers: NDArray[np.float64], **table: object) -> tuple[MergeSettings, Total]:
    """What three owners' totals are if each says `numbers`, (predictions, outputs)."""
    agreed = DistillTable.model_validate({"pool": "pool", "rows": len(numbers), "start": "base", **table})
    terms = replace(merge_settings(plan_for(3, [2]), distill=agreed), num_labels=numbers.shape[1])
    layout = DISTILL.layout(terms)
    vector = np.concatenate([len(OWNERS) * numbers.reshape(-1), np.full(numbers.shape[1], float(len(OWNERS)))])
    return terms, Total(layout=layout, vector=vector, owners=OWNERS, roster_size=len(OWNERS))


def some(seed: int, outputs: int, *, add_up: bool = True) -> tuple[NDArray[np.float64], torch.Tensor]:
    """Probabilities of a teacher, some of them 0, and two rows of a student's logits."""
    random = np.random.default_rng(seed)
    taught, said = random.uniform(0, 1, (ROWS, outputs)) ** 3, torch.from_numpy(random.normal(0, 3, (2, outputs)))
    taught[random.uniform(size=taught.shape) < 0.2] = 0.0
    taught[:, 0] += 1e-3
    return np.clip(taught / taught.sum(axis=1, keepdims=True) if add_up else taught, 0, 1), said.float()


def kl(one: list[float], other: list[float]) -> float:
    return sum(p * (log(p) - log(q)) for p, q in zip(one, other, strict=True) if p > 0)


def softmax(numbers: NDArray[np.float64]) -> list[float]:
    powers = [exp(each) for each in numbers]
    return [each / sum(powers) for each in powers]


SEEDS = st.integers(0, 2**32 - 1)
TAUGHT = torch.tensor([3, 1])


@settings(max_examples=20)
@given(SEEDS, st.booleans())
def test_one_label_is_taught_by_the_divergence_from_the_teacher(seed: int, add_up: bool) -> None:
    """Means over owners with different labels do not add up to 1: what counts is their ratio."""
    taught, said = some(seed, 3, add_up=add_up)
    lessons = lessons_of(ONE, *total_of(taught), CPU)
    shares = taught / taught.sum(axis=1, keepdims=True)
    expected = np.mean([kl(list(shares[row]), softmax(said[at].double().numpy())) for at, row in ((0, 3), (1, 1))])
    assert lessons.divergence(said, TAUGHT).item() == pytest.approx(expected, rel=1e-3, abs=1e-4)


@settings(max_examples=20)
@given(SEEDS)
def test_several_labels_are_taught_by_the_divergence_of_each_sigmoid(seed: int) -> None:
    taught, said = some(seed, 3, add_up=False)
    lessons = lessons_of(SEVERAL, *total_of(taught), CPU)
    expected = 0.0
    for at, row in ((0, 3), (1, 1)):
        for p, found in zip(taught[row], said[at].double().numpy(), strict=True):
            q = 1 / (1 + exp(-found))
            expected += kl([p, 1 - p], [q, 1 - q]) / 2
    assert lessons.divergence(said, TAUGHT).item() == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_numbers_are_taught_on_the_agreed_range() -> None:
    """What an owner says as 1 is the highest number of the range; 0 is the lowest."""
    lessons = lessons_of(NUMBERS, *total_of(np.array([[1.0, 0.0, 0.5]])), CPU)
    said = torch.tensor([[3.0, -1.0, 3.0]])
    assert lessons.divergence(said, torch.tensor([0])).item() == pytest.approx(((3 - 1) / 4) ** 2)


@settings(max_examples=20)
@given(SEEDS, st.integers(2, 12), st.integers(1, 12))
def test_next_tokens_are_taught_by_name_where_they_are_likely_and_as_one_otherwise(
    seed: int, vocabulary: int, most_likely: int
) -> None:
    taught, said = some(seed, vocabulary)
    agreed, total = total_of(taught, vocabulary=vocabulary, predictions=ROWS, most_likely=most_likely)
    lessons = lessons_of(Task(kind="causal-lm"), agreed, total, CPU)
    kept, divergences = min(most_likely, vocabulary - 1), []
    for at, row in ((0, 3), (1, 1)):
        p, q = list(taught[row]), softmax(said[at].double().numpy())
        likely = sorted(range(vocabulary), key=lambda token, p=p: -p[token])  # type: ignore[misc]
        merged = [
            [each[token] for token in likely[:kept]] + [sum(each[token] for token in likely[kept:])] for each in (p, q)
        ]
        divergences.append(kl(*merged))
        assert divergences[-1] <= kl(p, q) + 1e-9
    padded = torch.cat([said, torch.full((2, 2), 50.0)], dim=1)  # outputs beyond the vocabulary say nothing
    assert lessons.divergence(padded, TAUGHT).item() == pytest.approx(np.mean(divergences), rel=1e-3, abs=1e-4)


def test_a_vocabulary_is_looked_at_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    taught, _ = some(0, 7)
    agreed, total = total_of(taught, vocabulary=7, predictions=ROWS, most_likely=3)
    whole = lessons_of(Task(kind="causal-lm"), agreed, total, CPU)
    monkeypatch.setattr("server.lessons.BLOCK", 15)
    blocks = lessons_of(Task(kind="causal-lm"), agreed, total, CPU)
    assert isinstance(whole, OfNextTokens)
    assert isinstance(blocks, OfNextTokens)
    assert torch.equal(whole.tokens, blocks.tokens)
    torch.testing.assert_close(whole.shares, blocks.shares)


def test_gradients_are_numbers_even_if_the_student_is_sure_of_something_else() -> None:
    agreed, total = total_of(np.full((1, 4), 0.25), vocabulary=4, predictions=1, most_likely=10)
    lessons = lessons_of(Task(kind="causal-lm"), agreed, total, CPU)
    said = torch.tensor([[200.0, 0.0, 0.0, -200.0]], requires_grad=True)
    lessons.divergence(said, torch.tensor([0])).backward()
    assert said.grad is not None
    assert torch.isfinite(said.grad).all()
