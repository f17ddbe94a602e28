"""What a merge between separate processes costs: wall time, bytes, and every process's peak memory.

python -m benchmarks.network [--json] [--hidden 768] [--owners 3 6]

RegMean of a BERT with 12 blocks and `--hidden` dimensions, masked, over TLS on the loopback. BERT-base has 768
dimensions, about 180 million numbers per owner. Weights are random, all owners have the same small change, and their
rows are short and made up, so measuring costs little and transport dominates. Peaks are VmHWM, sampled every 0.2 s.
They also count mapped files, such as PyTorch's libraries (about 300 MB in an app) and an owner's vector on the disk.
Writes benchmarks/results/network-HIDDEN.{json,md}.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil
import torch
import transformers
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.machine import this_machine
from benchmarks.published import publish
from common.models.loading import load_base
from common.models.plan import merge_plan
from common.schedule import schedule_of
from deploy.example import reviews
from server.report.report import read_report
from tests.support.network import Command, Network, running, set_up

SAMPLE_SECONDS = 0.2
PROGRAMS = {  # a part of the command line -> what runs there
    "guarded_superlink": "coordinator: SuperLink",
    "flwr-serverapp": "coordinator: ServerApp",
    "pinned_supernode": "owner: SuperNode",
    "flwr-clientapp": "owner: ClientApp",
    "bound_superexec": "either: SuperExec",
}
SHORT = """
title = "What a merge costs"
base = "base"
method = "regmean"
[task]
max_tokens = 32
[regmean]
alphas = [0.9]
[privacy]
min_rows_per_dimension = 0.0
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768, help="a multiple of 64")
    parser.add_argument("--owners", type=int, nargs="+", default=[3, 6])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    runs = []
    for count in arguments.owners:
        with tempfile.TemporaryDirectory(prefix="amalgram-") as folder:
            runs.append(measure(Path(folder), arguments.hidden, count))
        results = {
            "machine": this_machine(),
            "load_at_end": os.getloadavg()[0],
            "hidden": arguments.hidden,
            "runs": runs,
        }
    publish(f"network-{arguments.hidden}", results, as_markdown(results), size)
    print(json.dumps(results, indent=2) if arguments.json else as_markdown(results))


def size(results: Mapping[str, Any]) -> dict[str, float]:
    return {"owners": max(run["owners"] for run in results["runs"])}


def measure(folder: Path, hidden: int, count: int) -> dict[str, Any]:
    """One merge of `count` owners."""
    network = make_network(folder, hidden, [f"owner{number}" for number in range(1, count + 1)])
    agreement = network.agreement
    base = load_base(folder / "base", agreement.task, agreement.seed)
    schedule = schedule_of(agreement, merge_plan(base, agreement.tensors))
    numbers = schedule.find("contribution").layout.size
    print(f"{count} owners, {numbers:,} numbers", file=sys.stderr)
    with ExitStack() as stack:
        server = stack.enter_context(running("server", network.coordinator))
        server.wait_for("listening on")
        clients = [stack.enter_context(running("client", network.owner(name))) for name in agreement.owner_names]
        for client in clients:
            client.wait_for("connected to the coordinator", 300)
        peaks = stack.enter_context(Peaks([server, *clients]))
        started = perf_counter()
        merge = stack.enter_context(running("merge", network.coordinator))
        if merge.exit_code(3600 * 6) != 0:
            sys.exit(merge.said)
        seconds = perf_counter() - started
    report = read_report(folder / "output")
    return {
        "owners": count,
        "numbers": numbers,
        "seconds": seconds,
        "bytes_to_owners": sum(step.bytes_sent for step in report.steps),
        "bytes_from_owners": sum(step.bytes_received for step in report.steps),
        "peak_bytes": peaks.bytes,
        "steps": {step.title: step.seconds for step in report.steps},
    }


class Peaks:
    """The largest VmHWM of any process that ran each program inside the `with` block."""

    def __init__(self, commands: Iterable[Command]) -> None:
        self.bytes: dict[str, int] = {}
        self._commands = list(commands)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Peaks":
        self._thread.start()
        return self

    def __exit__(self, *arguments: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            for command in self._commands:
                for process in command.family():
                    self._look_at(process)

    def _look_at(self, process: psutil.Process) -> None:
        try:
            line = " ".join((process.name(), *process.cmdline()))  # apps are forks that take their name
            found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        except (psutil.Error, OSError):
            return  # it has ended
        program = next((name for part, name in PROGRAMS.items() if part in line), None)
        if program is not None and found is not None:
            self.bytes[program] = max(self.bytes.get(program, 0), int(found[1]) * 1024)


# --- parties ---


def make_network(folder: Path, hidden: int, owners: list[str]) -> Network:
    """Write the example's rows for everybody, and a BERT with `hidden` dimensions."""
    reviews.write_consortium(folder / "example")
    shutil.copytree(folder / "example" / "data" / "hotel", folder / "data")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30_522,
        hidden_size=hidden,
        num_hidden_layers=12,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
        id2label=dict(enumerate(reviews.LABELS)),
        label2id={label: index for index, label in enumerate(reviews.LABELS)},
    )
    model = BertForSequenceClassification(config)
    save(model, folder / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1e-3 * torch.randn_like(parameter)
    save(model, folder / "fine_tuned")
    for name in owners:
        (folder / f"{name}.toml").write_text(
            f'name = "{name}"\nfine_tuned = "fine_tuned"\n[data]\ntrain = "data/train.jsonl"\n'
            'validation = "data/validation.jsonl"\ntest = "data/test.jsonl"\n'
        )
    return set_up(folder, SHORT + "".join(f'[[owners]]\nname = "{name}"\n' for name in owners), owners)


def save(model: BertForSequenceClassification, folder: Path) -> None:
    model.save_pretrained(folder)
    reviews.make_tokenizer().save_pretrained(folder)


# --- the page ---


def as_markdown(results: Mapping[str, Any]) -> str:
    runs, machine = results["runs"], results["machine"]
    rows: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "numbers per owner": lambda run: f"{run['numbers']:,}",
        "wall time, s": lambda run: f"{run['seconds']:.0f}",
        "to the owners, MB": lambda run: f"{run['bytes_to_owners'] / 1e6:,.0f}",
        "from the owners, MB": lambda run: f"{run['bytes_from_owners'] / 1e6:,.0f}",
    }
    for program in PROGRAMS.values():
        rows[f"peak of {program}, MB"] = lambda run, program=program: f"{run['peak_bytes'][program] / 1e6:,.0f}"  # type: ignore[misc]
    lines = [
        "# What a merge over the network costs",
        "",
        f"All parties on one machine: {machine['cores']} cores ({machine['processor']}), Python {machine['python']}; "
        f"load average at the end {results['load_at_end']:.1f}. RegMean, masked, a BERT with 12 blocks and "
        f"{results['hidden']} dimensions (BERT-base has 768).",
        "",
        "| owners | " + " | ".join(str(run["owners"]) for run in runs) + " |",
        "|---|" + "---:|" * len(runs),
        *(f"| {name} | " + " | ".join(show(run) for run in runs) + " |" for name, show in rows.items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
