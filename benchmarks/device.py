"""What an accelerator saves, and that its numbers are the CPU's.

python -m benchmarks.device [--device auto] [--quick] [--json]

    equality     a merge of three models, measured and solved on the device and on the CPU: the difference of the
                 merged deltas relative to their norm, in float32 (more than 1e-4 is an error) and in bfloat16
    grams        an owner's Gram pass over models with random weights: token rows per second, and the arithmetic of
                 forward pass and Grams (upper triangles) as a share of the float32 matrix-product peak measured here
    solve        the coordinator's solve in float64, copies included, on the device and on the CPU
    masks        from numbers on the device to masked bytes: copied, in fixed point, masked for 20 peers

Takes under eight minutes. --quick takes small shapes and writes nothing; without an accelerator, only that runs.
Otherwise, writes benchmarks/results/device.{json,md}.
"""

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from secrets import token_bytes
from time import perf_counter
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from benchmarks.gram import plan_of
from benchmarks.machine import this_machine
from benchmarks.published import publish
from client.data.rows import Batch
from client.measurement.gram import measure_grams
from client.measurement.passes import ON_CPU, Passes
from common.device import accelerators, find_device, find_solver, title_of
from common.merge_methods import METHODS, contribution, contribution_layout
from common.merge_methods.method import SingleRoundMethod
from common.merge_methods.normal_equations import solve_symmetric
from common.merge_methods.regmean import RegMeanTable
from common.merge_methods.terms import MergeBounds, MergeSettings, OwnerTerms
from common.models.delta import Delta
from common.summation import fixed_point, mask_stream
from common.summation.protocol import Total
from common.tensor_layout import TensorEntry, TensorLayout

MOST_DIFFERENCE = 1e-4
PEERS = 20
TYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's shape, and how many batches it is measured on."""

    name: str
    config: PretrainedConfig
    batches: int
    examples: int = 32
    tokens: int = 128

    def model(self) -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForSequenceClassification.from_config(self.config).eval()
        return model

    def drawn(self) -> list[Batch]:
        """Batches of random tokens, without padding."""
        random = torch.Generator().manual_seed(0)
        size = (self.examples, self.tokens)
        ids = [torch.randint(1, self.config.vocab_size, size, generator=random) for _ in range(self.batches)]
        return [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in ids]


def llama(hidden: int, inner: int, layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=1000,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        pad_token_id=0,
    )


def bert(hidden: int, layers: int) -> BertConfig:
    return BertConfig(
        vocab_size=1000,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
    )


SHAPES = (
    Shape(name="BERT-base", config=bert(768, 12), batches=64),
    Shape(name="Llama-3.2-1B, two of its blocks", config=llama(2048, 8192, 2), batches=32),
    Shape(name="a block of a model of 7 billion", config=llama(4096, 11008, 1), batches=16),
)
QUICK_SHAPES = (
    Shape(name="a small BERT", config=bert(64, 2), batches=2, examples=4, tokens=16),
    Shape(name="a small Llama", config=llama(64, 128, 2), batches=2, examples=4, tokens=16),
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    if not accelerators():
        print("no accelerator is there", file=sys.stderr)
        if not chosen.quick:
            sys.exit("--quick runs small shapes on the CPU")
    results = measure(find_device(chosen.device, "--device"), quick=chosen.quick)
    if not chosen.quick:  # which may run on the CPU
        publish("device", results, as_markdown(results), size)
    print(json.dumps(results, indent=2) if chosen.json else as_markdown(results))
    difference = results["equality"]["float32"]
    if difference > MOST_DIFFERENCE:
        sys.exit(f"error: merged deltas differ by {difference:.1e} of their norm, the bound is {MOST_DIFFERENCE:g}")


def size(results: Mapping[str, Any]) -> dict[str, float]:
    return {"Gram passes": len(results["grams"]), "inputs": max(each["inputs"] for each in results["solve"])}


def measure(device: torch.device, *, quick: bool) -> dict[str, Any]:
    solver = device if device.type != "mps" else find_solver("auto", "--device")
    peak = matrix_peak(device, 512 if quick else 8192)
    return {
        "machine": this_machine(),
        "device": title_of(device),
        "peak": peak,
        "equality": {dtype: difference(device, solver, dtype, quick=quick) for dtype in TYPES},
        "grams": [
            gram_pass(shape, Passes(device, getattr(torch, dtype)), peak)
            for shape in (QUICK_SHAPES if quick else SHAPES)
            for dtype in TYPES
        ],
        "solve": [solve(size, 64 if quick else 4096, solver) for size in ((64, 128) if quick else (4096, 11008))],
        "masks": masks(device, 1 << (18 if quick else 27)),
    }


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Of the second time, when the libraries' kernels are loaded."""
    for _ in range(2):
        started = perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
    return perf_counter() - started


def matrix_peak(device: torch.device, size: int) -> float:
    """Operations per second of a float32 matrix product, without TF32."""
    one, other = (torch.randn(size, size, device=device) for _ in range(2))
    with Passes(device).computing():
        return 2 * size**3 / seconds_of(lambda: one @ other, device)


# --- equality ---


def difference(device: torch.device, solver: torch.device, dtype: str, *, quick: bool) -> float:
    """|merged there - merged on the CPU in float32| / |merged on the CPU|, over all tensors of RegMean's merge."""
    shape = Shape(name="", config=bert(64 if quick else 256, 2), batches=3, examples=8 if quick else 64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = shape.model()
        owners = [changed_a_little(base) for _ in range(3)]
    batches = shape.drawn()
    here = merged(base, owners, batches, ON_CPU, "cpu")
    there = merged(base, owners, batches, Passes(device, getattr(torch, dtype)), str(solver))
    off = sum(float((there[name] - tensor).double().square().sum()) for name, tensor in here.items())
    return float((off / sum(float(tensor.double().square().sum()) for tensor in here.values())) ** 0.5)


@torch.no_grad()
def changed_a_little(base: PreTrainedModel) -> PreTrainedModel:
    model = copy.deepcopy(base)
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def merged(
    base: PreTrainedModel, owners: Sequence[PreTrainedModel], batches: Sequence[Batch], passes: Passes, solver: str
) -> Mapping[str, Tensor]:
    """What RegMean merges of owners with one batch each."""
    plan, examples = plan_of(base, batches[0]), len(batches[0]["input_ids"])
    tables = {name: method.table() for name, method in METHODS.items()} | {"regmean": RegMeanTable(alphas=(0.9,))}
    bounds = MergeBounds(examples=1000, delta=64.0, grams={shared.name: 2.0**20 for shared in plan.inputs}, fisher={})
    settings = MergeSettings(
        plan=plan, weighting="rows", bounds=bounds, tables=tables, has_floors=True, num_owners=3, device=solver
    )
    layout = contribution_layout(["regmean"], settings)
    total, own = np.zeros(layout.size), np.empty(layout.size)
    before = dict(base.named_parameters())
    for model, batch in zip(owners, batches, strict=True):
        terms = OwnerTerms(
            examples=examples,
            delta=Delta(dict(model.named_parameters()), before),
            grams=measure_grams(model, plan, [batch], passes),
            gram_examples=examples,
        )
        layout.flatten(contribution(["regmean"], settings, terms), own)
        total += own
    regmean = METHODS["regmean"]
    assert isinstance(regmean, SingleRoundMethod)
    names = tuple(f"o{number}" for number in range(len(owners)))
    summed = Total(layout=layout, vector=total, owners=names, roster_size=len(owners))
    return regmean.solve(settings, summed, 0.9, with_spectra=False).delta


# --- Grams, solve, masks ---


def gram_pass(shape: Shape, passes: Passes, peak: float) -> dict[str, Any]:
    model, batches = shape.model(), shape.drawn()
    plan = plan_of(model, batches[0])
    seconds = seconds_of(lambda: measure_grams(model, plan, batches, passes), passes.device)
    rows = shape.batches * shape.examples * shape.tokens
    products = sum(2 * layer.d_in * layer.d_out for shared in plan.inputs for layer in shared.layers)
    triangles = sum(shared.gram_size * (shared.gram_size + 1) for shared in plan.inputs)
    return {
        "shape": shape.name,
        "dtype": str(passes.dtype).removeprefix("torch."),
        "rows_per_second": rows / seconds,
        "share_of_peak": rows * (products + triangles) / seconds / peak,
    }


def solve(size: int, outputs: int, device: torch.device) -> dict[str, Any]:
    """A Gram of `size` inputs, and the products of one planted change."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(2 * size, size, generator=random, dtype=torch.float64)
    planted = torch.randn(size, outputs, generator=random, dtype=torch.float64)
    gram = rows.T @ rows
    right = gram @ planted
    on_device, _, _ = solve_symmetric(gram, right, device=str(device))
    return {
        "inputs": size,
        "outputs": outputs,
        "seconds": seconds_of(lambda: solve_symmetric(gram, right, device=str(device)), device),
        "seconds_on_the_cpu": timed(lambda: solve_symmetric(gram, right)),
        "relative_error": float((on_device - planted).norm() / planted.norm()),
    }


def masks(device: torch.device, numbers: int) -> dict[str, Any]:
    layout = TensorLayout((TensorEntry(name="numbers", shape=(numbers,), bound=64.0),))
    there = torch.randn(numbers, device=device)
    keys = [(token_bytes(mask_stream.KEY_BYTES), 1) for _ in range(PEERS)]
    steps: dict[str, float] = {}
    vector = np.empty(numbers)
    steps["copy"] = timed(lambda: np.copyto(vector, there.cpu().numpy()))
    steps["fixed point"] = timed(lambda: fixed_point.encode(layout, vector, 3))
    words = vector.view("<u8")
    steps["masks"] = timed(lambda: mask_stream.add_masks(words, keys, 0))  # type: ignore[arg-type]
    return {"numbers": numbers, "peers": PEERS, "seconds": steps}


def timed(work: Callable[[], object]) -> float:
    started = perf_counter()
    work()
    return perf_counter() - started


# --- the page ---


def as_markdown(results: Mapping[str, Any]) -> str:
    return "\n".join(_lines(results)) + "\n"


def _lines(results: Mapping[str, Any]) -> Iterator[str]:
    machine, masked = results["machine"], results["masks"]
    yield "# What an accelerator saves"
    yield ""
    yield (
        f"{results['device']}, beside {machine['cores']} cores ({machine['processor']}); Python {machine['python']}, "
        f"torch {machine['torch']}. Its float32 matrix products reach {results['peak'] / 1e12:.2f} TFLOP/s."
    )
    yield ""
    yield "Merged deltas, measured and solved there, differ from the CPU's in float32 by these parts of their norm:"
    yield ", ".join(f"{dtype} {off:.1e}" for dtype, off in results["equality"].items()) + "."
    yield ""
    yield "| Gram pass | type | token rows per second | share of the float32 peak |"
    yield "|---|---|---:|---:|"
    for each in results["grams"]:
        rate, share = each["rows_per_second"], each["share_of_peak"]
        yield f"| {each['shape']} | {each['dtype']} | {rate:,.0f} | {share:.2f} |"
    yield ""
    yield "| solve: inputs | outputs | seconds | on the CPU | relative error |"
    yield "|---:|---:|---:|---:|---:|"
    for each in results["solve"]:
        times = f"{each['seconds']:.2f} | {each['seconds_on_the_cpu']:.2f}"
        yield f"| {each['inputs']} | {each['outputs']} | {times} | {each['relative_error']:.0e} |"
    yield ""
    steps = ", ".join(f"{step} {seconds:.2f}" for step, seconds in masked["seconds"].items())
    yield f"{masked['numbers']:,} numbers masked for {masked['peers']} peers, seconds by step: {steps}."


if __name__ == "__main__":
    main()
