"""How the benchmarks of language models judge: text by text, with the error of a difference."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.language import KINDS, Mould, Owned, ahead, kept, per_token, scores_of, swapped, thirds_of
from benchmarks.tiny_language import TABLE, tables_of, tokenizer_of
from client.data.rows import IGNORED, Rows

TEXTS = ["a short text", "another text, which is longer than the first one", "a third", "the last of the texts here"]
TOKENIZER = tokenizer_of(TEXTS)


def model_of(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), **sizes, tie_word_embeddings=True)).eval()


def rows_of(texts: list[str]) -> Rows:
    features = tuple(dict(TOKENIZER(text)) for text in texts)
    targets = tuple(np.array([*row["input_ids"][1:], IGNORED]) for row in features)
    return Rows(features=features, targets=targets, tokenizer=TOKENIZER)


def alone(models: list[PreTrainedModel], text: str) -> float:
    """The log-likelihood of one text under the mean of the models' predictions."""
    tokens = TOKENIZER(text)["input_ids"]
    with torch.inference_mode():
        each = torch.stack([model(input_ids=torch.tensor([tokens])).logits[0].softmax(-1) for model in models])
    return sum(float(each.mean(0)[place, token].log()) for place, token in enumerate(tokens[1:]))


def test_each_text_is_judged_as_if_it_were_alone() -> None:
    models = [model_of(seed) for seed in range(3)]
    *own, ensemble = scores_of(models, {"news": rows_of(TEXTS)})
    for model, scores in zip(models, own, strict=True):
        assert scores["news"][:, 0] == pytest.approx([alone([model], text) for text in TEXTS], rel=1e-4)
    assert ensemble["news"][:, 0] == pytest.approx([alone(models, text) for text in TEXTS], rel=1e-4)
    assert ensemble["news"][:, 1].tolist() == [len(TOKENIZER(text)["input_ids"]) - 1 for text in TEXTS]


def test_a_lead_is_a_ratio_of_sums_with_its_error() -> None:
    theirs = {"news": np.array([[-8.0, 4], [-6.0, 2], [-9.0, 3]])}
    ours = {"news": theirs["news"] + [[2, 0], [0, 0], [1, 0]]}
    lead, error = ahead(ours, theirs, ["news"])
    assert lead == pytest.approx(3 / 9)
    assert error == pytest.approx(np.sqrt(3 / 2 * ((2 - 4 / 3) ** 2 + (2 / 3) ** 2 + 0)) / 9)
    assert ahead(ours, theirs, ["news", "news"]) == pytest.approx([lead, error / np.sqrt(2)])


def test_the_error_is_what_new_draws_of_texts_make_of_it() -> None:
    random = np.random.default_rng(0)

    def draw() -> list[float]:
        tokens = random.integers(5, 40, 60).astype(float)
        lead = tokens * random.normal(0.1, 0.3, 60)
        return ahead({"news": np.stack([lead, tokens], 1)}, {"news": np.stack([0 * lead, tokens], 1)}, ["news"])

    leads, errors = np.transpose([draw() for _ in range(500)])
    assert np.mean(errors) == pytest.approx(np.std(leads), rel=0.1)


def test_a_merge_is_compared_with_each_owners_own_model_at_home_and_elsewhere() -> None:
    def scores(by_kind: dict[str, float]) -> dict[str, np.ndarray]:
        return {kind: np.array([[nats, 1.0]] * 5) for kind, nats in by_kind.items()}

    own = {name: scores({kind: -3.0 if kind == name else -5.0 for kind in KINDS} | {"tweets": -6.0}) for name in KINDS}
    merge, average = scores(dict.fromkeys([*KINDS, "tweets"], -4.0)), scores(dict.fromkeys([*KINDS, "tweets"], -4.5))
    found = Owned(own).compared(merge, average)
    assert {where: lead for where, (lead, _) in found["over_own"].items()} == pytest.approx(
        {"at_home": -1.0, "elsewhere": 1.0, "nobody": 2.0}
    )
    assert {where: lead for where, (lead, _) in found["over_average"].items()} == pytest.approx(
        {"owners": 0.5, "nobody": 0.5}
    )


def test_swapping_every_part_makes_the_merge_of_an_own_model() -> None:
    base, owners = model_of(0), {name: model_of(seed) for seed, name in enumerate(KINDS, 1)}
    mould = Mould(base)
    own = {name: mould.delta_of(model) for name, model in owners.items()}
    merge = {name: sum(each[name] for each in own.values()) / 3 for name in own["news"]}
    tests = {name: rows_of(TEXTS) for name in KINDS}
    parts = {"none": frozenset[str](), "all": frozenset(merge)}
    found = swapped(mould, own, {"average": merge}, parts, tests)
    merged = scores_of([mould.at(merge)], tests)[0]
    lead = np.mean([per_token(merged[name]) - per_token(scores_of([owners[name]], tests)[0][name]) for name in KINDS])
    assert found["none"]["average"] == [0, 0]
    assert found["all"]["average"][0] == pytest.approx(lead, abs=1e-4)


def test_a_merged_table_keeps_what_owners_agree_on_and_weighs_what_one_of_them_changed() -> None:
    base = model_of(0)
    owners = {name: model_of(0) for name in KINDS}
    with torch.no_grad():
        for number, model in enumerate(owners.values()):
            model.get_parameter(TABLE)[2] += 1.0  # a word that all change alike
            model.get_parameter(TABLE)[3 + number] += 2.0  # a word of its own
    own = {name: Mould(base).delta_of(model) for name, model in owners.items()}
    tables = tables_of(owners, own, {name: rows_of(TEXTS) for name in KINDS})
    weighted = tables.pop("each word's mean, weighted by the squared size of its changes")
    assert weighted[3:6].numpy() == pytest.approx(np.full((3, 16), 2.0), rel=1e-3)
    assert tables["RegMean, on the inputs of the output layer"][2].numpy() == pytest.approx(np.ones(16), rel=1e-3)
    assert tables["the sum"][:6].mean(1).tolist() == pytest.approx([0, 0, 3, 2, 2, 2])


def test_a_third_of_a_model_is_a_third_of_its_blocks() -> None:
    names = [name for name, _ in model_of(0).named_parameters()]
    thirds = list(thirds_of(names, 3).values())
    for number, third in enumerate(thirds):
        assert third == {name for name in names if f".{number}." in name}


def test_a_sum_keeps_changes_that_do_not_overlap_and_a_mean_keeps_a_part() -> None:
    own = {name: {"weight": torch.eye(3)[[number]]} for number, name in enumerate(KINDS)}
    assert kept({"weight": torch.ones(1, 3)}, own) == pytest.approx(1)
    assert kept({"weight": torch.ones(1, 3) / 3}, own) == pytest.approx(1 / 3)
