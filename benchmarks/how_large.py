"""What a merge of seven billion parameters takes of every party, computed from rates that this machine has.

python -m benchmarks.how_large [--json]

Llama-2-7B and Mistral-7B, merged whole, and merged from LoRA adapters on queries and values. Three owners, 1,000
examples of 200 tokens each for the Grams, 200 to test on. The models have no weights. A forward pass, a Gram pass, a
solve, masks and the disk are measured as `amalgram check` measures them (deploy/estimate.py): on two blocks in place of
all, and on smaller systems. `direct` compares a solve with 4096 inputs, measured, with what is extrapolated for it.
Writes docs/how-large.md's tables to benchmarks/results/how_large.{json,md}.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from benchmarks.machine import quiet_on_one_thread, this_machine
from benchmarks.published import publish, say
from client.measurement.gram import find_shared_inputs
from common.models.layers import merge_layers
from common.models.parameters import parameter_shapes
from common.models.plan import MergePlan, PlannedTensors, merge_plan
from common.tensor_layout import TensorEntry, TensorLayout
from deploy import estimate
from deploy.estimate import OwnerRows, Rates, System, Work

OWNERS, EXAMPLES, TEST_EXAMPLES, TOKENS = 3, 1000, 200, 200
DISK_BYTES = 1 << 29
DIRECT_INPUTS = 4096
MODELS = {
    "Llama-2-7B": lambda: LlamaForCausalLM(LlamaConfig(intermediate_size=11008, vocab_size=32000, pad_token_id=0)),
    "Mistral-7B": lambda: MistralForCausalLM(MistralConfig(vocab_size=32000, pad_token_id=0)),
}
KINDS = {"whole": None, "LoRA on q and v": ("q_proj", "v_proj")}  # which layers are merged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    quiet_on_one_thread()
    results = measure()
    publish("how_large", results, as_markdown(results), size)
    print(json.dumps(results, indent=2) if arguments.json else as_markdown(results))


def size(results: Mapping[str, Any]) -> dict[str, float]:
    return {"merges": len(results["merges"]), "inputs": results["direct"]["inputs"]}


def measure() -> dict[str, Any]:
    writing, reading = disk_bytes_a_second()
    say(f"disk: {writing / 1e9:.2f} GB/s written, {reading / 1e9:.2f} GB/s read")
    merges = []
    for name, make in MODELS.items():
        with torch.device("meta"):
            model = make().eval()
        for kind, layers in KINDS.items():
            plan = plan_of(model, layers)
            work = work_of(plan)
            rates = estimate.measure_rates(model, plan, TOKENS, work)
            merges.append({"model": name, "kind": kind} | parties(work, rates, writing, reading))
            say(f"{name}, {kind}: an owner {estimate.in_words(merges[-1]['owner_seconds'])}")
    return {"machine": this_machine(), "disk": [writing, reading], "merges": merges, "direct": direct(rates)}


def plan_of(model: PreTrainedModel, layers: tuple[str, ...] | None) -> MergePlan:
    """Every linear layer has a Gram, or those of these names, and nothing else is merged."""
    tokens = torch.zeros(1, 8, dtype=torch.long, device="meta")
    groups = find_shared_inputs(model, {"input_ids": tokens})
    if layers is not None:
        of_groups = (tuple(name for name in group if name.split(".")[-2] in layers) for group in groups)
        groups = tuple(group for group in of_groups if group)
    else:
        body = {name for name in merge_layers(model) if not name.startswith("lm_head")}
        groups = tuple(group for group in groups if set(group) <= body)
    names = {name for group in groups for name in group}
    others = tuple(name for name in parameter_shapes(model) if name not in names)
    averaged, left_alone = (others, ()) if layers is None else ((), others)
    return merge_plan(model, PlannedTensors(merged=groups, averaged=averaged, left_alone=left_alone))


def work_of(plan: MergePlan) -> Work:
    """RegMean with one alpha, masked, tested on the base, the owner's model and the merge."""
    entries = []
    for shared in plan.inputs:
        square, gram = (shared.gram_size, shared.gram_size), f"gram/{shared.name}"
        entries.append(TensorEntry(name=gram, shape=square, bound=1.0, packing="symmetric"))
        for layer in shared.layers:
            name, shape = f"gram_delta/{layer.weight}", (shared.gram_size, layer.d_out)
            entries.append(TensorEntry(name=name, shape=shape, bound=1.0, product_of=gram))
    entries += [TensorEntry(name=name, shape=plan.shapes[name], bound=1.0) for name in plan.averaged]
    layout = TensorLayout(tuple(entries))
    changed = sum(torch.Size(plan.shapes[name]).numel() for name in plan.changed)
    return Work(
        gram_examples=EXAMPLES,
        fisher_examples=0,
        forward_examples=0,
        pool_tokens=0,
        predicted_numbers=0,
        student_epochs=0,
        validated_models=0,
        tested_models=3,
        sent_numbers=layout.size,
        sent_bytes=layout.num_bytes,
        received_bytes=4 * changed,
        masks=OWNERS,
        owners=OWNERS,
        systems=tuple(estimate.systems_of(layout)),
        solves=1,
        parameters=sum(torch.Size(shape).numel() for shape in plan.shapes.values()),
        largest_sum=layout.size,
        largest_gram=max(shared.gram_size for shared in plan.inputs),
    )


def parties(work: Work, rates: Rates, writing: float, reading: float) -> dict[str, Any]:
    """What an owner and the coordinator compute, send, keep on disk and hold in memory."""
    rows = OwnerRows(train=EXAMPLES, validation=0, test=TEST_EXAMPLES, tokens=TOKENS)
    model = 4 * work.parameters
    sizes = 8 * work.sent_numbers, [work.received_bytes], model, model
    written = work.sent_bytes + work.received_bytes + 2 * model  # the owner's model, and what would be published
    vector = work.sent_bytes * (1 / writing + 1 / reading)
    owner = estimate.owner_seconds(work, rows, rates) | {"disk": written / writing + written / reading}
    coordinator = estimate.coordinator_seconds(work, rates) | {"disk": work.owners * vector}
    return {
        "rates": asdict(rates),
        "numbers": work.sent_numbers,
        "owner_seconds": owner,
        "coordinator_seconds": coordinator,
        "owner_sends_bytes": work.sent_bytes,
        "owner_receives_bytes": work.received_bytes,
        "owner_disk_bytes": estimate.disk_bytes(*sizes, owners=1),
        "coordinator_disk_bytes": estimate.disk_bytes(*sizes, coordinates=True),
        "owner_memory_bytes": estimate.owner_bytes(work),
        "coordinator_memory_bytes": estimate.coordinator_bytes(work),
    }


def disk_bytes_a_second() -> tuple[float, float]:
    """Written and synchronised, and read again, which may come from memory."""
    content = bytes(1 << 24)
    with tempfile.NamedTemporaryFile(prefix="amalgram-") as file:
        started = time.perf_counter()
        for _ in range(DISK_BYTES // len(content)):
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter()
        Path(file.name).read_bytes()
        return DISK_BYTES / (written - started), DISK_BYTES / (time.perf_counter() - written)


def direct(rates: Rates) -> dict[str, float]:
    """A solve that is measured, beside what the smaller one says of it."""
    system = System(inputs=DIRECT_INPUTS, outputs=DIRECT_INPUTS)
    solve, eigenvalues = estimate.solve_seconds(DIRECT_INPUTS)
    return {
        "inputs": DIRECT_INPUTS,
        "solve_seconds": solve,
        "extrapolated_solve_seconds": system.solve_flops * rates.solve_of_flop,
        "spectrum_seconds": eigenvalues,
        "extrapolated_spectrum_seconds": system.spectrum_flops * rates.spectrum_of_flop,
    }


# --- the page ---


def as_markdown(results: Mapping[str, Any]) -> str:
    return "\n".join(_lines(results)) + "\n"


def _lines(results: Mapping[str, Any]) -> Iterator[str]:
    machine, direct = results["machine"], results["direct"]
    yield "# What a merge of seven billion parameters takes"
    yield ""
    yield (
        f"Computed, not run, from rates in processor seconds of one thread: {machine['cores']} cores "
        f"({machine['processor']}), Python {machine['python']}, torch {machine['torch']}. RegMean with one alpha, "
        f"masked, {OWNERS} owners. Each measures {EXAMPLES:,} examples of {TOKENS} tokens and tests on {TEST_EXAMPLES}."
    )
    yield ""
    for party in ("owner", "coordinator"):
        yield f"| {party} | computes | of which | sends | disk | memory |"
        yield "|---|---:|---|---:|---:|---:|"
        for each in results["merges"]:
            seconds = each[f"{party}_seconds"]
            total, _, parts = estimate.in_words(seconds).removeprefix("about ").partition(": ")
            sent = each["owner_sends_bytes"] if party == "owner" else each["owner_receives_bytes"] * OWNERS
            yield (
                f"| {each['model']}, {each['kind']} | {total} | {parts} | {sent / 1e9:,.1f} GB | "
                f"{each[f'{party}_disk_bytes'] / 1e9:,.0f} GB | {each[f'{party}_memory_bytes'] / 1e9:,.0f} GB |"
            )
        yield ""
    yield "| an owner's network, both ways | " + " | ".join(estimate.NETWORKS) + " |"
    yield "|---|" + "---:|" * len(estimate.NETWORKS)
    for each in results["merges"]:
        both = each["owner_sends_bytes"] + each["owner_receives_bytes"]
        times = [estimate.duration(both / rate) for rate in estimate.NETWORKS.values()]
        yield f"| {each['model']}, {each['kind']} | {' | '.join(times)} |"
    yield ""
    yield (
        f"Measured beside what is extrapolated, with {direct['inputs']} inputs: a solve {direct['solve_seconds']:.0f} "
        f"s, extrapolated {direct['extrapolated_solve_seconds']:.0f} s; eigenvalues {direct['spectrum_seconds']:.0f} "
        f"s, extrapolated {direct['extrapolated_spectrum_seconds']:.0f} s."
    )


if __name__ == "__main__":
    main()
