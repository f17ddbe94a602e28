"""How much memory a merge takes: the coordinator's peak against the number of owners, and an owner's.

python -m benchmarks.memory [--json] [--hidden 384] [--owners 3 6 12]

The merge of benchmarks/network.py (RegMean of a BERT with 12 blocks, masked) without the network: the coordinator is a
process of its own, and every message is answered in a fresh process, one after the other. Peaks are the kernel's VmHWM;
they count what is mapped from files too, among it PyTorch's libraries, so a process that has only imported them and
loaded the base model stands beside. What must not count in every process is imported where it is used. Writes
benchmarks/results/memory.{json,md}.
"""

import argparse
import json
import logging
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=384, help="a multiple of 64; 768 is BERT-base")
    parser.add_argument("--owners", type=int, nargs="+", default=[3, 6, 12])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--coordinator", type=Path, help=argparse.SUPPRESS)  # this is the process that is measured
    arguments = parser.parse_args()
    if arguments.coordinator is not None:
        coordinate(arguments.coordinator)
        return
    results = {"hidden": arguments.hidden, "cores": os.cpu_count(), **measure(arguments.hidden, arguments.owners)}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory.json").write_text(json.dumps(results, indent=2) + "\n")
    (RESULTS / "memory.md").write_text(as_markdown(results))
    print(json.dumps(results, indent=2) if arguments.json else as_markdown(results))


def measure(hidden: int, counts: list[int]) -> dict[str, Any]:
    """The peaks of one merge for each number of owners, MB."""
    from benchmarks.network import make_network
    from common.merge_methods import contribution_layout
    from common.models import load_base, merge_plan
    from common.tensor_layout import PART_BYTES

    coordinator: dict[str, float] = {}
    owner: dict[str, float] = {}
    for count in counts:
        with tempfile.TemporaryDirectory(prefix="amalgram-") as name:
            network = make_network(Path(name), hidden, [f"owner{number}" for number in range(1, count + 1)])
            base = load_base(network.folder / "base", network.agreement.task, network.agreement.seed)
            plan = merge_plan(base, network.agreement.tensors)
            command = [sys.executable, "-m", "benchmarks.memory", "--coordinator", name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        peaks = json.loads(done.stdout.splitlines()[-1])
        coordinator[str(count)] = peaks["coordinator"]
        owner = {kind: max(owner.get(kind, 0.0), peak) for kind, peak in peaks["owner"].items()}
        print(f"{count} owners: {peaks['coordinator']:.0f} MB", file=sys.stderr)
    numbers = contribution_layout(network.agreement, plan).size
    return {
        "coordinator_peak_mb": coordinator,
        "owner_peak_mb": owner,
        "imports_and_base_mb": peaks["imports_and_base"],
        "sum_mb": numbers * 8 / 1e6,
        "model_mb": sum(parameter.numel() for parameter in base.parameters()) * 4 / 1e6,
        "largest_gram_mb": max(shared.gram_size for shared in plan.inputs) ** 2 * 8 / 1e6,
        "part_mb": PART_BYTES / 1e6,
    }


# --- the processes that are measured ---


def peak_megabytes() -> float:
    """The most memory that this process has had, in MB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def coordinate(folder: Path) -> None:
    """Run the merge; the last line on stdout is the peaks."""
    from deploy.in_process_grid import run_in_process
    from server.app import app

    logging.getLogger("amalgram").setLevel(logging.ERROR)
    owner_peaks: dict[str, float] = {}

    def ask_a_process(message: Message, context: Context) -> Message:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            content, kind, peak = process.submit(answer, message.content, dict(context.node_config)).result()
        owner_peaks[kind] = max(owner_peaks.get(kind, 0.0), peak)
        return Message(content, reply_to=message)

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        imports_and_base = process.submit(load_only, folder).result()
    configs = [{"settings": str(path)} for path in sorted(folder.glob("owner*.toml"))]
    (folder / "output").mkdir()
    run_in_process(app, ask_a_process, configs, {"coordinator": str(folder / "coordinator.toml")})  # type: ignore[arg-type]
    print(json.dumps({"coordinator": peak_megabytes(), "owner": owner_peaks, "imports_and_base": imports_and_base}))


def answer(content: RecordDict, node_config: dict[str, Any]) -> tuple[RecordDict, str, float]:
    """One owner's answer to one message, the message's kind, and what it took."""
    from client.app import app

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 2  # which Flower tells its processes
    message = Message(content, dst_node_id=2, message_type="train.step")
    context = Context(run_id=1, node_id=2, node_config=node_config, state=RecordDict(), run_config={})
    reply = app(message, context)
    return reply.content, str(content["header"]["kind"]), peak_megabytes()


def load_only(folder: Path) -> float:
    """What the libraries and the base model take."""
    from common.agreement import Agreement
    from common.models import load_base
    from common.settings_file import load_settings

    agreement = load_settings(folder / "agreement.toml", Agreement)
    load_base(folder / "base", agreement.task, agreement.seed)
    return peak_megabytes()


# --- the page ---


def as_markdown(results: Mapping[str, Any]) -> str:
    coordinator, owner = results["coordinator_peak_mb"], results["owner_peak_mb"]
    lines = [
        "# What memory a merge takes",
        "",
        f"RegMean, masked, a BERT of 12 blocks and {results['hidden']} dimensions (BERT-base has 768). The model has "
        f"{results['model_mb']:,.0f} MB, a sum {results['sum_mb']:,.0f} MB, the largest Gram "
        f"{results['largest_gram_mb']:,.0f} MB, a part of a message {results['part_mb']:,.0f} MB. A process that has "
        f"only imported the libraries and loaded the base takes {results['imports_and_base_mb']:,.0f} MB.",
        "",
        "| owners | " + " | ".join(coordinator) + " |",
        "|---|" + "---:|" * len(coordinator),
        "| coordinator's peak, MB | " + " | ".join(f"{peak:,.0f}" for peak in coordinator.values()) + " |",
        "",
        "| an owner that answers | peak, MB |",
        "|---|---:|",
        *(f"| {kind} | {peak:,.0f} |" for kind, peak in sorted(owner.items(), key=lambda each: -each[1])),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
