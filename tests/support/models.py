"""Tiny models made here, so that nothing is fetched, and what a merge changes in them."""

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from client.measurement.gram import find_shared_inputs
from common.models.delta import Delta
from common.models.parameters import parameter_shapes
from common.models.plan import MergePlan, PlannedTensors, merge_plan


def delta_of(fine_tuned: nn.Module, base: nn.Module) -> dict[str, Tensor]:
    """What fine-tuning changed, all of it at once."""
    return dict(Delta(dict(fine_tuned.named_parameters()), dict(base.named_parameters())))


def tiny_bert() -> BertForSequenceClassification:
    """A BERT of two blocks with random weights."""
    config = BertConfig(
        vocab_size=80,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=3,
        id2label={0: "a", 1: "b", 2: "c"},
        label2id={"a": 0, "b": 1, "c": 2},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertForSequenceClassification(config).eval()


def tiny_gpt2() -> GPT2ForSequenceClassification:
    """A GPT-2 of one block with random weights, whose linear layers are Conv1D."""
    config = GPT2Config(vocab_size=80, n_embd=16, n_layer=1, n_head=2, n_positions=32, num_labels=3, pad_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2ForSequenceClassification(config).eval()


def plan_for(model: nn.Module, batch: dict[str, torch.Tensor], within: str = "") -> MergePlan:
    """Every distinct input of layers with `within` in their names has a Gram."""
    merged = tuple(group for group in find_shared_inputs(model, batch) if within in group[0])
    names = {name for group in merged for name in group}
    averaged = tuple(name for name in parameter_shapes(model) if name not in names)
    return merge_plan(model, PlannedTensors(merged=merged, averaged=averaged, left_alone=()))
