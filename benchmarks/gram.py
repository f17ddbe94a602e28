"""An owner's Gram pass, compared with a bare forward pass and with the common way.

python -m benchmarks.gram [--json] [--quick] [--threads 1] [--data FOLDER]

    forwards_per_gram_pass   seconds of the pass / seconds of a forward pass on the same batches that measures nothing
    speedup_over_naive       token rows per second of the pass / those of the common way
    rows_per_second          token rows without padding, for each way

The common way is that of the method's authors and of FusionBench. A hook on every linear layer computes a Gram of its
own: the full product of all rows of a batch, including padding, with batches in the order of the file.

Models have real shapes and random weights. Text lengths come from the `text` of all train.jsonl under FOLDER, where a
word or a punctuation mark counts as one token; without FOLDER they are drawn from BUILT_IN_LENGTHS. A few batches,
spread evenly over their sizes, are measured. The ways take turns, and the median turn is reported. With one thread,
seconds are processor seconds, so other users of the machine do not count. --quick measures fewer layers, once.
Writes benchmarks/results/gram.{json,md}.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from benchmarks.machine import this_machine
from benchmarks.published import publish, say
from client.data.rows import Batch, Rows
from client.measurement.gram import find_shared_inputs, layer_inputs, measure_grams
from common.models.layers import merge_layers
from common.models.parameters import parameter_shapes
from common.models.plan import MergePlan, PlannedTensors, merge_plan

BATCH_SIZE = 32
EXAMPLES = 4096
LONGEST = 512
BUILT_IN_LENGTHS = {"median": 17.0, "sigma": 0.62}  # log-normal, like short messages: 95 % have fewer than 48 tokens
MEASURED_BATCHES = 12  # out of EXAMPLES / BATCH_SIZE; a quarter of them if --quick; a third for the common way
TURNS = 3  # one if --quick


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's shape, and how many of its layers are measured to stand for all of them."""

    name: str
    config: PretrainedConfig
    measured_layers: int
    quick_layers: int

    def model(self, layers: int) -> PreTrainedModel:
        config = type(self.config)(**self.config.to_dict() | {"num_hidden_layers": layers})
        model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config).eval()
        return model


SHAPES = (
    Shape(name="BERT-base", config=BertConfig(), measured_layers=12, quick_layers=2),
    Shape(
        name="MiniLM-L12-H384",
        config=BertConfig(hidden_size=384, intermediate_size=1536),
        measured_layers=12,
        quick_layers=2,
    ),
    # With a classifier in place of the head over the vocabulary. Only the Gram pass may leave that head out, which
    # would make it look better than it is on the body.
    Shape(
        name="Llama-3.2-1B",
        config=LlamaConfig(
            vocab_size=1000,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            pad_token_id=0,
        ),
        measured_layers=1,
        quick_layers=1,
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    results = measure(arguments.data, arguments.threads, arguments.quick)
    publish("gram", results, as_markdown(results), size)
    print(json.dumps(results, indent=2) if arguments.json else as_markdown(results))


def size(results: Mapping[str, Any]) -> dict[str, float]:
    return {
        "turns": min(len(shape["turns"]) for shape in results["shapes"]),
        **{f"layers of {shape['shape']}": shape["measured_layers"] for shape in results["shapes"]},
    }


def measure(data: Path | None, threads: int, quick: bool) -> dict[str, Any]:
    lengths = drawn_lengths() if data is None else lengths_of(data)
    return {
        "machine": this_machine(),
        "threads": threads,
        "batch_size": BATCH_SIZE,
        "lengths": {
            "from": "built in" if data is None else data.name,
            "mean": round(float(lengths.mean()), 1),
            "median": float(np.median(lengths)),
            "95 %": float(np.quantile(lengths, 0.95)),
        },
        "shapes": [measure_shape(shape, lengths, threads, quick) for shape in SHAPES],
    }


# --- rows ---


def drawn_lengths() -> NDArray[np.int64]:
    """(EXAMPLES,) tokens."""
    random = np.random.default_rng(0)
    drawn = random.lognormal(np.log(BUILT_IN_LENGTHS["median"]), BUILT_IN_LENGTHS["sigma"], EXAMPLES)
    return np.clip(drawn.round(), 3, LONGEST).astype(np.int64)


def lengths_of(data: Path) -> NDArray[np.int64]:
    """(EXAMPLES,) tokens of texts drawn from all files, each with two special tokens."""
    texts = [json.loads(line)["text"] for path in sorted(data.rglob("train.jsonl")) for line in path.open()]
    drawn = np.random.default_rng(0).permutation(len(texts))[:EXAMPLES]
    return np.array([min(2 + len(re.findall(r"\w+|[^\w\s]", texts[index])), LONGEST) for index in drawn])


def rows_of(lengths: NDArray[np.int64], vocabulary: int) -> Rows:
    random = np.random.default_rng(0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"[PAD]": 0})), pad_token="[PAD]")
    features = tuple(
        {"input_ids": random.integers(1, vocabulary, length).tolist(), "attention_mask": [1] * int(length)}
        for length in lengths
    )
    return Rows(features=features, targets=np.zeros(len(lengths), np.int64), tokenizer=tokenizer)


def in_order_of_the_file(rows: Rows) -> list[Batch]:
    return [rows.batch(indices)[0] for indices in np.split(np.arange(len(rows)), len(rows) // BATCH_SIZE)]


def spread(batches: list[Batch], count: int) -> list[Batch]:
    """`count` of the batches, spread evenly over their sizes."""
    by_size = sorted(batches, key=lambda batch: batch["input_ids"].numel())
    return [by_size[int((number + 0.5) * len(by_size) / count)] for number in range(count)]


def tokens(batches: list[Batch]) -> int:
    return sum(int(batch["attention_mask"].sum()) for batch in batches)


def padding(batches: list[Batch]) -> float:
    """The share of positions that are padding."""
    return 1 - tokens(batches) / sum(batch["input_ids"].numel() for batch in batches)


# --- the three ways ---


def measure_shape(shape: Shape, lengths: NDArray[np.int64], threads: int, quick: bool) -> dict[str, Any]:
    whole = shape.config.num_hidden_layers
    layers = shape.quick_layers if quick else shape.measured_layers
    model = shape.model(layers)
    rows = rows_of(lengths, shape.config.vocab_size)
    count = MEASURED_BATCHES // 4 if quick else MEASURED_BATCHES
    ours = spread([batch for _, batch, _ in rows.batches(BATCH_SIZE)], count)
    theirs = spread(in_order_of_the_file(rows), count // 3)
    plan = plan_of(model, ours[0])
    seconds = in_turn(
        {
            "forward": lambda: forward_pass(model, ours),
            "grams": lambda: measure_grams(model, plan, ours),
            "naive": lambda: naive_pass(model, theirs),
        },
        turns=1 if quick else TURNS,
        clock=process_time if threads == 1 else perf_counter,
    )
    counted = {"forward": tokens(ours), "grams": tokens(ours), "naive": tokens(theirs)}
    rates = [{way: counted[way] / turn[way] for way in turn} for turn in seconds]
    forwards = median(rate["forward"] / rate["grams"] for rate in rates)
    say(f"{shape.name}: a Gram pass takes {forwards:.2f} forward passes")
    return {
        "shape": shape.name,
        "measured_layers": layers,
        "layers": whole,
        "grams": len(plan.inputs),
        "naive_grams": len(merge_layers(model)),
        "padding": {"grams": padding(ours), "naive": padding(theirs)},
        "rows_per_second": {way: median(rate[way] for rate in rates) * layers / whole for way in counted},
        "forwards_per_gram_pass": forwards,
        "speedup_over_naive": median(rate["grams"] / rate["naive"] for rate in rates),
        "turns": seconds,
    }


def plan_of(model: PreTrainedModel, batch: Batch) -> MergePlan:
    """A Gram for every distinct input, so that everything is measured that the common way measures."""
    merged = find_shared_inputs(model, batch)
    names = {name for group in merged for name in group}
    averaged = tuple(name for name in parameter_shapes(model) if name not in names)
    return merge_plan(model, PlannedTensors(merged=merged, averaged=averaged, left_alone=()))


@torch.inference_mode()
def forward_pass(model: PreTrainedModel, batches: list[Batch]) -> None:
    for batch in batches:
        model(**batch)


@torch.inference_mode()
def naive_pass(model: PreTrainedModel, batches: list[Batch]) -> dict[str, Tensor]:
    """The common way."""
    grams: dict[str, Tensor] = {}

    def observe(weight: str, rows: Tensor) -> None:
        rows = rows.reshape(-1, rows.shape[-1])
        product = rows.T @ rows
        grams[weight] = grams[weight] + product if weight in grams else product

    with layer_inputs(model, lambda weight, fed: observe(weight, fed.rows), merge_layers(model)):
        forward_pass(model, batches)
    return grams


def in_turn(ways: Mapping[str, Callable[[], object]], turns: int, clock: Callable[[], float]) -> list[dict[str, float]]:
    """Seconds of each way, turn by turn, so that all meet the same machine."""
    return [{way: timed(work, clock) for way, work in ways.items()} for _ in range(turns)]


def timed(work: Callable[[], object], clock: Callable[[], float]) -> float:
    started = clock()
    work()
    return clock() - started


# --- the page ---


def as_markdown(results: Mapping[str, Any]) -> str:
    return "\n".join(_lines(results)) + "\n"


def _lines(results: Mapping[str, Any]) -> Iterator[str]:
    machine, lengths = results["machine"], results["lengths"]
    clock = "processor seconds of one thread" if results["threads"] == 1 else f"{results['threads']} threads"
    yield "# What an owner's Gram pass costs"
    yield ""
    yield (
        f"{machine['cores']} cores ({machine['processor']}), Python {machine['python']}, torch {machine['torch']}; "
        f"{clock}, medians of {len(results['shapes'][0]['turns'])} turns in one run. float32. A batch has "
        f"{results['batch_size']} of the longest texts, or as many shorter ones as fill the same padded size. Lengths "
        f"({lengths['from']}): mean {lengths['mean']} tokens, median {lengths['median']:.0f}, "
        f"95 % below {lengths['95 %']:.0f}."
    )
    yield ""
    yield "| | Grams | Grams, common way | forward passes per Gram pass | token rows per second / common way |"
    yield "|---|---:|---:|---:|---:|"
    for row in results["shapes"]:
        yield (
            f"| {row['shape']} | {row['grams']} | {row['naive_grams']} | {row['forwards_per_gram_pass']:.2f} | "
            f"{row['speedup_over_naive']:.1f} |"
        )
    yield ""
    yield "| | bare forward | Gram pass | common way | padding | padding, common way | layers measured |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for row in results["shapes"]:
        rates, padded = row["rows_per_second"], row["padding"]
        yield (
            f"| {row['shape']} | {rates['forward']:,.0f} | {rates['grams']:,.0f} | {rates['naive']:,.0f} | "
            f"{padded['grams']:.0%} | {padded['naive']:.0%} | {row['measured_layers']} of {row['layers']} |"
        )
    yield ""
    yield (
        "Token rows per second, without padding. If not all layers were measured, rates are scaled to all of them. The "
        "common way: a hook on every linear layer, a full product for each, including padding, and batches of "
        f"{results['batch_size']} texts in the order of the file. All models have a classifier on top, Llama too: its "
        "head over the vocabulary, which the Gram pass need not compute, is left out."
    )


if __name__ == "__main__":
    main()
