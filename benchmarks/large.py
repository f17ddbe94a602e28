"""Three models of 1.2 billion parameters merged by RegMean, masked, on one machine and from its disk.

python -m benchmarks.large [--json] [--layers 16] [--folder FOLDER]

The base has the shape of Llama-3.2-1B, random weights and a classifier on top. Each owner's model differs from it a
little. Layers with more than 2048 inputs are merged in blocks of that many (`regmean.largest_gram`), each seen with
one or two token rows per input. All parties run in one process, one after the other, so the peak (VmHWM) is that of the
largest. Beside it stands what the merge cannot do without: its matrix products, and what must be on the disk, at the
speed of one large product and one large file, measured afterwards. The merge needs about 81 GB of disk, in FOLDER if
it is given. Writes benchmarks/results/large.{json,md}.
"""

import argparse
import json
import logging
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForSequenceClassification

from benchmarks.machine import this_machine
from benchmarks.memory import peak_megabytes
from benchmarks.published import publish
from deploy.estimate import System
from deploy.example import reviews
from deploy.simulation.simulate import simulate

OWNERS = "ada", "bea", "cyd"
HIDDEN, WIDE, KEYS, VOCABULARY = 2048, 8192, 512, 128_256
# The linear systems of one block: attention's inputs and outputs, then the wide layers'.
SYSTEMS = (
    System(inputs=HIDDEN, outputs=HIDDEN + 2 * KEYS),
    System(inputs=HIDDEN, outputs=HIDDEN),
    System(inputs=HIDDEN, outputs=2 * WIDE),
    *[System(inputs=HIDDEN, outputs=HIDDEN)] * (WIDE // HIDDEN),
)
SCORED = 3  # models: the base, the owner's own, the merge
REVIEWS_A_ROW, ROWS = 8, {"train": 100, "test": 20}
LABELS = "negative", "positive"
AGREEMENT = """
title = "A large model"
base = "base"
method = "regmean"
[task]
labels = ["negative", "positive"]
max_tokens = 64
[regmean]
alphas = [0.9]
largest_gram = 2048
[privacy]
min_rows_per_dimension = 0.25
[[owners]]
name = "ada"
[[owners]]
name = "bea"
[[owners]]
name = "cyd"
"""
OWNER = """
name = "{name}"
fine_tuned = "{name}"
[data]
train = "train.jsonl"
test = "test.jsonl"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="amalgram-", dir=arguments.folder) as folder,
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process,
    ):
        parameters = process.submit(write_consortium, Path(folder), arguments.layers).result()
        print(f"{parameters:,} parameters", file=sys.stderr)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            results = {
                "machine": this_machine(),
                "layers": arguments.layers,
                "parameters": parameters,
                **fresh.submit(merge, Path(folder)).result(),
                "floor_seconds": fresh.submit(floor_seconds, Path(folder), arguments.layers, parameters).result(),
            }
    publish("large", results, as_markdown(results), size)
    print(json.dumps(results, indent=2) if arguments.json else as_markdown(results))


def size(results: Mapping[str, Any]) -> dict[str, float]:
    return {"layers": results["layers"]}


def write_consortium(folder: Path, layers: int) -> int:
    """Write the base, three models and rows for all. Returns how many parameters a model has."""
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    tokenizer = reviews.make_tokenizer()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=KEYS // 64,
        pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
        dtype="bfloat16",
    )
    model = LlamaForSequenceClassification(config).bfloat16()
    for name in ("base", *OWNERS):
        if name != "base":
            change_a_little(model)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    reviews.write_consortium(folder / "example")
    for split, count in ROWS.items():
        rows = [json.loads(line) for line in (folder / "example/data/hotel" / f"{split}.jsonl").open()]
        with (folder / f"{split}.jsonl").open("w") as file:
            for number in range(count):
                group = [rows[(number * REVIEWS_A_ROW + each) % len(rows)] for each in range(REVIEWS_A_ROW)]
                row = {"text": " ".join(each["text"] for each in group), "label": LABELS[number % 2]}
                file.write(json.dumps(row) + "\n")
    (folder / "agreement.toml").write_text(AGREEMENT)
    for name in OWNERS:
        (folder / f"{name}.toml").write_text(OWNER.format(name=name))
    shutil.rmtree(folder / "example")
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def change_a_little(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.add_(0.05 * parameter.std() * torch.randn_like(parameter))


def merge(folder: Path) -> dict[str, Any]:
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("amalgram").setLevel(logging.ERROR)
    started = time.perf_counter()
    report = simulate(folder, with_references=False)
    return {
        "seconds": time.perf_counter() - started,
        "steps": {step.title: step.seconds for step in report.steps},
        "numbers": report.rounds[0].numbers,
        "gigabytes_an_owner": max(
            sum(step.by_owner[name].bytes_received for step in report.steps if name in step.by_owner) for name in OWNERS
        )
        / 1e9,
        "peak_gigabytes": peak_megabytes() / 1e3,
    }


def floor_seconds(folder: Path, layers: int, parameters: int) -> dict[str, float]:
    """What the products of all parties together, and the bytes that they write, take at this machine's speed."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    tokens = {split: _tokens(folder / f"{split}.jsonl", tokenizer) for split in ROWS}
    single, double = (_flops_a_second(dtype) for dtype in (torch.float32, torch.float64))
    forward = 2 * layers * sum(each.inputs * each.outputs for each in SYSTEMS)  # of a token
    grams = layers * sum(each.inputs**2 for each in SYSTEMS)  # of a token, half of each
    products = layers * sum(each.product_flops for each in SYSTEMS)
    solves = layers * sum(each.solve_flops for each in SYSTEMS)
    vector = 8 * (parameters + layers * sum(each.inputs**2 / 2 for each in SYSTEMS))
    model = 4 * parameters
    # An owner: its model, its vector, what it is sent and what it would publish. The coordinator: the sum, as it
    # is collected and unmasked, and before that; the merge, what rounding took from it, and what it publishes.
    written = len(OWNERS) * (vector + 3 * model) + 2 * vector + 3 * model
    return {
        "Gram passes": len(OWNERS) * tokens["train"] * (forward + grams) / single,
        "scoring": len(OWNERS) * SCORED * tokens["test"] * forward / single,
        "Grams times changes": len(OWNERS) * products / double,
        "solving": solves / double,
        "writing to the disk": written / _bytes_written_a_second(folder),
    }


def _tokens(path: Path, tokenizer: Any) -> int:
    texts = [json.loads(line)["text"] for line in path.open()]
    return sum(map(len, tokenizer(texts, truncation=True, max_length=64)["input_ids"]))


def _flops_a_second(dtype: torch.dtype) -> float:
    """Of the better of two products of 2048 by 2048 with 2048 by 8192 numbers, on all cores."""
    left, right = torch.ones(HIDDEN, HIDDEN, dtype=dtype), torch.ones(HIDDEN, WIDE, dtype=dtype)
    return max(2 * HIDDEN * HIDDEN * WIDE / _seconds(lambda: left @ right) for _ in range(2))


def _bytes_written_a_second(folder: Path) -> float:
    piece, count = bytes(1 << 24), 128

    def write() -> None:
        with tempfile.TemporaryFile(dir=folder) as file:
            for _ in range(count):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())

    return len(piece) * count / _seconds(write)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def as_markdown(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    lines = [
        "# Three models of a billion parameters, merged on one machine",
        "",
        f"{machine['cores']} cores ({machine['processor']}), Python {machine['python']}, torch {machine['torch']}. All "
        f"parties run in one process, one after the other. The model has the shape of Llama-3.2-1B with "
        f"{results['layers']} layers and {results['parameters'] / 1e6:,.0f} M parameters. The sum has "
        f"{results['numbers'] / 1e6:,.0f} M numbers.",
        "",
        "| minutes | GB an owner sends | peak of the process, GB |",
        "|---:|---:|---:|",
        f"| {results['seconds'] / 60:.0f} | {results['gigabytes_an_owner']:.1f} | {results['peak_gigabytes']:.1f} |",
        "",
        "| step | minutes |",
        "|---|---:|",
        *(f"| {name} | {seconds / 60:.1f} |" for name, seconds in results["steps"].items()),
    ]
    if "floor_seconds" in results:
        lines += [
            "",
            "What all parties together cannot do without: their matrix products at the speed of one large product on "
            "all cores, float32 for passes and float64 for the rest; and what they write, at the speed of one large "
            "file. Writing goes on beside computing, except where a party must wait for it.",
            "",
            "| | minutes |",
            "|---|---:|",
            *(f"| {name} | {seconds / 60:.1f} |" for name, seconds in results["floor_seconds"].items()),
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
