"""Models as people have them: each loads to the right value, or is refused in words that say what to do."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from common.agreement import Task
from common.errors import ModelError
from common.models.loading import load_base, load_fine_tuned
from deploy.example.reviews import make_tokenizer
from tests.support.errors import in_two_lines
from tests.support.models import tiny_bert

CLASSES = Task(labels=("a", "b", "c"))
LANGUAGE = Task(kind="causal-lm")
WORDS = len(make_tokenizer())


def saved(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    make_tokenizer().save_pretrained(folder)
    return folder


def llama(words: int = WORDS, *, is_tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=words, num_attention_heads=1, tie_word_embeddings=is_tied, **sizes)
    ).eval()


@pytest.fixture
def bert(tmp_path: Path) -> PreTrainedModel:
    return load_base(saved(tiny_bert(), tmp_path / "base"), CLASSES, seed=0)


def refusal(folder: Path, task: Task, base: PreTrainedModel) -> str:
    with pytest.raises(ModelError) as caught:
        load_fine_tuned(folder, task, base)
    return in_two_lines(caught.value)


@pytest.mark.parametrize("is_tied", [True, False])
def test_embeddings_of_a_padded_vocabulary_are_cut_to_the_base_s(is_tied: bool, tmp_path: Path) -> None:
    base = load_base(saved(llama(is_tied=is_tied), tmp_path / "base"), LANGUAGE, seed=0)
    padded = llama(is_tied=is_tied)
    padded.resize_token_embeddings(WORDS + 4)
    own = load_fine_tuned(saved(padded, tmp_path / "own"), LANGUAGE, base)
    tokens = torch.arange(4, 14)[None]
    with torch.no_grad():
        torch.testing.assert_close(own(tokens).logits, padded(tokens).logits[..., :WORDS])
    assert own.config.vocab_size == WORDS


def test_a_vocabulary_that_is_smaller_than_the_base_s_gets_a_hint(tmp_path: Path) -> None:
    base = load_base(saved(llama(WORDS + 1), tmp_path / "base"), LANGUAGE, seed=0)
    assert "if all owners added the same tokens" in refusal(saved(llama(), tmp_path / "own"), LANGUAGE, base)


def test_an_output_layer_that_is_not_the_embedding_is_named(tmp_path: Path) -> None:
    base = load_base(saved(llama(), tmp_path / "base"), LANGUAGE, seed=0)
    says = refusal(saved(llama(is_tied=False), tmp_path / "own"), LANGUAGE, base)
    assert "its output layer has weights of its own, in the base they are the embedding's" in says


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_configuration_that_asks_for_an_attention_package_loads_without_it(key: str, tmp_path: Path) -> None:
    base = load_base(saved(llama(), tmp_path / "base"), LANGUAGE, seed=0)
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: "flash_attention_2"}))
    own = load_fine_tuned(tmp_path / "base", LANGUAGE, base)
    assert torch.equal(own(torch.tensor([[5, 6]])).logits, base(torch.tensor([[5, 6]])).logits)


def test_a_missing_shard_or_index_is_named(bert: PreTrainedModel, tmp_path: Path) -> None:
    whole = saved(tiny_bert(), tmp_path / "whole", max_shard_size="20KB")
    load_fine_tuned(whole, CLASSES, bert)
    for missing in ("model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        folder = Path(shutil.copytree(whole, tmp_path / missing))
        (folder / missing).unlink()
        named = missing.removesuffix(".index.json")  # without an index, one file is looked for
        assert f"has no file {named}" in refusal(folder, CLASSES, bert)


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_an_adapter_with_biases_and_a_saved_head_is_what_peft_makes_of_it(
    bias: Any, bert: PreTrainedModel, tmp_path: Path
) -> None:
    settings = LoraConfig(r=2, bias=bias, target_modules=["query"], task_type="SEQ_CLS")
    adapted = get_peft_model(tiny_bert(), settings)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    adapted.save_pretrained(tmp_path / "adapter")
    own = dict(load_fine_tuned(tmp_path / "adapter", CLASSES, bert).named_parameters())
    for name, parameter in adapted.merge_and_unload().named_parameters():
        torch.testing.assert_close(own[name], parameter, msg=name)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"trainable_token_indices": [1, 2]}, "sets trainable_token_indices, which cannot be merged here"),
        ({"init_lora_weights": "pissa"}, "was initialised by pissa, which changes the base"),
    ],
)
def test_an_adapter_that_is_more_than_two_factors_says_what_to_bring(
    settings: dict[str, Any], says: str, bert: PreTrainedModel, tmp_path: Path
) -> None:
    adapted = get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["query"], **settings))
    adapted.save_pretrained(tmp_path / "adapter")
    found = refusal(tmp_path / "adapter", CLASSES, bert)
    assert says in found
    assert "hint: " in found


@pytest.mark.parametrize(
    ("kind", "labels", "says"),
    [
        ("regression", 1, "has a head for regression; what is judged here is one label"),
        ("multi_label_classification", 3, "has a head for several labels a row; what is judged here is one label"),
    ],
)
def test_a_head_for_something_else_is_named_as_such(kind: Any, labels: int, says: str, tmp_path: Path) -> None:
    config = tiny_bert().config
    config.num_labels, config.problem_type = labels, kind
    folder = saved(BertForSequenceClassification(config), tmp_path / "base")
    with pytest.raises(ModelError, match=says) as caught:
        load_base(folder, CLASSES, seed=0)
    assert "agree on a base with a head for labels" in in_two_lines(caught.value)
