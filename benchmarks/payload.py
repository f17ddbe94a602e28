"""How many bytes an owner sends, compared with the naive way: every layer's full Gram and all weights, float32.

python -m benchmarks.payload [--json]

The bytes are counted, not measured. Models without weights run once, to find the layers that are fed the same tensor.
Every linear layer is merged, with one alpha. Writes benchmarks/results/payload.{json,md}.
"""

import argparse
import json
from collections.abc import Mapping
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from benchmarks.published import everything, publish
from client.measurement.gram import find_shared_inputs
from common.models.layers import merge_layers
from common.models.parameters import parameter_shapes
from common.models.plan import PlannedTensors, merge_plan

FLOAT32_BYTES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with torch.device("meta"):
        results = {
            "BERT-base": count(BertForSequenceClassification(BertConfig())),
            "Llama-2-7B": count(LlamaForCausalLM(LlamaConfig(intermediate_size=11008, vocab_size=32000))),
        }
    publish("payload", results, as_markdown(results), everything)
    print(json.dumps(results, indent=2) if arguments.json else as_markdown(results))


def count(model: PreTrainedModel) -> dict[str, float]:
    """How many Grams there are, and how many bytes an owner sends."""
    layers = merge_layers(model)
    tokens = torch.zeros(1, 8, dtype=torch.long, device="meta")
    groups = find_shared_inputs(model.eval(), {"input_ids": tokens})
    weights = sum(parameter.numel() for parameter in model.parameters())
    distinct = [layers[group[0]].d_in for group in groups]
    naive = sum(layer.d_in**2 for group in groups for layer in (layers[name] for name in group))
    packed, in_blocks = (packed_grams(model, groups, largest) for largest in (None, model.config.hidden_size))
    # Each Gram's diagonal, and one number per column of each product. The largest changes, a few hundred, are left out.
    scales = sum(distinct) + sum(layers[name].d_out for group in groups for name in group)
    # A product G delta is as large as its weight, so products and other weights together are as large as the model.
    return {
        "naive_grams": sum(map(len, groups)),
        "distinct_grams": len(groups),
        "naive_gram_bytes": naive * FLOAT32_BYTES,
        "packed_gram_numbers": packed,
        "naive_bytes": (naive + weights) * FLOAT32_BYTES,
        "numbers": packed + weights,
        "bytes": (packed + weights) * 8,
        "bytes_in_32_bits": (packed + weights) * 4 + (scales * 8 + scales * FLOAT32_BYTES),
        "bytes_in_32_bits_and_blocks": (in_blocks + weights) * 4 + (scales * 8 + scales * FLOAT32_BYTES),
    }


def packed_grams(model: PreTrainedModel, groups: tuple[tuple[str, ...], ...], largest_gram: int | None) -> int:
    """How many numbers the Grams of Amalgram's own merge plan have."""
    merged = {name for group in groups for name in group}
    averaged = tuple(name for name in parameter_shapes(model) if name not in merged)
    tensors = PlannedTensors(merged=groups, largest_gram=largest_gram, averaged=averaged, left_alone=())
    return sum(each.gram_size * (each.gram_size + 1) // 2 for each in merge_plan(model, tensors).inputs)


def as_markdown(results: Mapping[str, Any]) -> str:
    lines = [
        "# What an owner sends",
        "",
        "Naive: every layer's full Gram and all weights, float32, readable by whoever receives them. Ours: one packed "
        "Gram per distinct input, products and the rest, as masked integers of 64 bits. The column `32 bits` has "
        "integers of 32 bits, and includes the round and the message that their scales need. In the column `and "
        "blocks`, Grams are also in blocks of as many inputs as the model is wide (`regmean.largest_gram`).",
        "",
        "| model | Grams naive | ours | numbers naive | ours | ratio | bytes naive | ours | ratio | 32 bits | ratio | "
        "and blocks | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, each in results.items():
        naive = each["naive_bytes"] / FLOAT32_BYTES
        lines.append(
            f"| {name} | {each['naive_grams']} | {each['distinct_grams']} | {naive / 1e6:,.0f} M | "
            f"{each['numbers'] / 1e6:,.0f} M | {each['numbers'] / naive:.2f} | {each['naive_bytes'] / 1e9:.2f} GB | "
            f"{each['bytes'] / 1e9:.2f} GB | {each['bytes'] / each['naive_bytes']:.2f} | "
            f"{each['bytes_in_32_bits'] / 1e9:.2f} GB | {each['bytes_in_32_bits'] / each['naive_bytes']:.2f} | "
            f"{each['bytes_in_32_bits_and_blocks'] / 1e9:.2f} GB | "
            f"{each['bytes_in_32_bits_and_blocks'] / each['naive_bytes']:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
