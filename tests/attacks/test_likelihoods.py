"""Candidates that are crafted so that a metric spells out one row: a mean log likelihood, or sums of predicted numbers.

The coordinator knows a token before the secret one. After it, the model gives the token y a multiple of y nats; after
any other token, all tokens are equally likely. So the mean is a known number plus what the secret token was given.
"""

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from client.data.rows import IGNORED, Rows
from client.measurement.evaluation import evaluate, score_logits
from common.agreement import Task
from common.metrics import MAX_NATS, STEP
from deploy.example.reviews import make_tokenizer

TASK = Task(kind="causal-lm")
VOCABULARY, MARK, ROWS, LENGTH = 1000, 7, 4, 20
SECRETS = (123, 456, 789, 999)
COUNT = ROWS * (LENGTH - 1)


@torch.no_grad()
def speller(nats: np.ndarray) -> LlamaForCausalLM:
    """A language model that gives the token y about `nats[y]` after MARK, and ln(VOCABULARY) after any other token."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0) if "norm" in name else parameter.zero_()
    model.model.embed_tokens.weight[:, 0] = 1.0
    model.model.embed_tokens.weight[MARK] = torch.eye(8)[1]
    model.lm_head.weight[:, 1] = torch.from_numpy(-nats / math.sqrt(8)).float()  # RMSNorm makes the one sqrt(8)
    return model.eval()


def rows_with(secret: int) -> Rows:
    generator = np.random.default_rng(0)
    texts = generator.integers(10, VOCABULARY, (ROWS, LENGTH))
    texts[3, 5:7] = MARK, secret
    return Rows(
        features=tuple({"input_ids": text.tolist(), "attention_mask": [1] * LENGTH} for text in texts),
        targets=tuple(np.array([*text[1:], IGNORED], np.int64) for text in texts),
        tokenizer=make_tokenizer(),
    )


def learned_nats(nats: np.ndarray, rows: Rows) -> float:
    """What the secret token was given, from the mean as it is published."""
    metric = round(evaluate(speller(nats), rows, 8, TASK, np.empty(0, np.int64)).metric, 3)
    before = math.log(np.exp(-nats).sum())  # the model's own normalisation after MARK
    return -metric * COUNT - (COUNT - 1) * math.log(VOCABULARY) - before


def test_96_a_candidate_without_bounds_spells_out_a_token() -> None:
    """Many nats for a token, so that rounding to thousandths of the mean hides nothing."""
    scale = 4.0
    recovered = 0
    for secret in SECRETS:
        found = learned_nats(np.arange(VOCABULARY) * scale, rows_with(secret)) / scale
        recovered += round(found) == secret
    assert recovered == 0


def test_96_two_candidates_within_the_bounds_do_not_spell_out_a_token_either() -> None:
    """One for each digit of the token's number, as large as the clip lets them be."""
    digit = math.isqrt(VOCABULARY) + 1
    recovered = 0
    for secret in SECRETS:
        rows, found = rows_with(secret), []
        for digits in (np.arange(VOCABULARY) // digit, np.arange(VOCABULARY) % digit):
            scale = MAX_NATS / 2 / digit
            found.append(round(learned_nats(digits * scale, rows) / scale))
        recovered += found[0] * digit + found[1] == secret
    assert recovered <= 1


def test_96_whatever_a_candidate_gives_one_token_its_mean_is_one_of_two() -> None:
    """Or of three, over all draws of how the sum is rounded. Without rounding there would be as many means as tokens.

    Rounding each token would not do: all others can be given whole multiples of a step, so that nothing of them is
    rounded.
    """
    nats, tokens = np.linspace(0.0, MAX_NATS, VOCABULARY), range(10, VOCABULARY, 20)
    rows = map(rows_with, tokens)
    steps = {-evaluate(speller(nats), each, 8, TASK, np.empty(0, np.int64)).metric * COUNT / MAX_NATS for each in rows}
    assert all(step == pytest.approx(round(step)) for step in steps)
    assert max(steps) - min(steps) < 2.5
    assert len({round(step) for step in steps}) > 1


@pytest.mark.parametrize("size", [0.05, 0.3])
def test_96_honest_likelihoods_keep_their_mean(size: float) -> None:
    """The published mean has thousandths; for a thousand tokens it is uncertain by a tenth anyway."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(size * 50)
    generator = np.random.default_rng(0)
    texts = generator.integers(0, 50, (400, 100))
    rows = Rows(
        features=tuple({"input_ids": text.tolist(), "attention_mask": [1] * 100} for text in texts),
        targets=tuple(np.array([*text[1:], IGNORED], np.int64) for text in texts),
        tokenizer=make_tokenizer(),
    )
    exact = 0.0
    with torch.inference_mode():
        for _, batch, targets in rows.batches(50):
            judged = targets != IGNORED
            logits = model(**batch).logits[judged]
            exact += float(torch.nn.functional.cross_entropy(logits, targets[judged], reduction="sum"))
    metric = evaluate(model, rows, 50, TASK, np.empty(0, np.int64)).metric
    assert metric == pytest.approx(-exact / (400 * 99), abs=0.001)


def test_96_a_candidate_of_1e38_has_a_metric() -> None:
    model = speller(np.zeros(VOCABULARY))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.where(torch.rand(parameter.shape) < 0.5, -1e38, 1e38))
    assert -MAX_NATS <= evaluate(model, rows_with(5), 8, TASK, np.empty(0, np.int64)).metric < 0


def test_135_whatever_number_a_candidate_gives_one_row_each_sum_is_one_of_sixty_six() -> None:
    """Without rounding there would be as many sums as numbers. Again, all other rows can be given whole steps."""
    task = Task(problem_type="regression", labels=("x",), target_range=(0.0, 1.0))
    targets = np.random.default_rng(0).random((40, 1)).astype(np.float32)
    rows = Rows(features=np.zeros((40, 1, 1, 1), np.float32), targets=targets)
    found: list[tuple[float, ...]] = []
    for number in np.linspace(0.0, 1.0, 2000, dtype=np.float32):
        predictions = np.full_like(targets, 0.5)
        predictions[7] = number
        found += score_logits(predictions, rows, task, np.arange(1)).sums
    by_sum = [set(sums) for sums in zip(*found, strict=True)]
    assert max(map(len, by_sum)) <= 1 / STEP + 2
    assert len(by_sum[0]) > 1 / STEP - 2
    assert all(value / STEP == round(value / STEP) for values in by_sum for value in values)
