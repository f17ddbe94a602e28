"""How much memory a merge takes: the coordinator's peak against the number of owners, and an owner's.

python -m benchmarks.memory [--json] [--hidden 384] [--owners 3 6 12] [--owner-hidden 768]

The merge of benchmarks/network.py (RegMean of a BERT with 12 blocks, masked) without the network: the coordinator is a
process of its own, and another one answers for all owners. Then one owner alone, on a BERT of BERT-base's shape, each
answer in a fresh process as with Flower: the roll call, its measurement, a candidate to score. Peaks are the kernel's
VmHWM; they count what is mapped from files too, among it PyTorch's libraries.

    fixed         what is resident in a process that has imported the libraries, loaded the base and let it go
    bound         of an owner: fixed + its model + 1.3 x the largest Gram + one part of a message;
                  of the coordinator: fixed + the sum + one part an owner + the largest layer's Gram and products

What must not count in every process is imported where it is used. Writes benchmarks/results/memory.{json,md}.
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
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

if TYPE_CHECKING:
    from common.messages import Message as OurMessage
    from tests.support.network import Network

RESULTS = Path(__file__).parent / "results"
GRAMS = 1.3  # of the largest: what one block's Grams are together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=384, help="of the merge; a multiple of 64")
    parser.add_argument("--owners", type=int, nargs="+", default=[3, 6, 12])
    parser.add_argument("--owner-hidden", type=int, default=768, help="of the owner alone; 768 is BERT-base")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--coordinator", type=Path, help=argparse.SUPPRESS)  # this is the process that is measured
    arguments = parser.parse_args()
    if arguments.coordinator is not None:
        coordinate(arguments.coordinator)
        return
    results = {
        "cores": os.cpu_count(),
        "owner": measure_owner(arguments.owner_hidden),
        **measure_merges(arguments.hidden, arguments.owners),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory.json").write_text(json.dumps(results, indent=2) + "\n")
    (RESULTS / "memory.md").write_text(as_markdown(results))
    print(json.dumps(results, indent=2) if arguments.json else as_markdown(results))


def measure_merges(hidden: int, counts: list[int]) -> dict[str, Any]:
    """The peaks of one merge for each number of owners, MB."""
    results: dict[str, Any] = {"coordinator_peak_mb": {}, "coordinator_bound_mb": {}}
    for count in counts:
        with made_network(hidden, count) as (network, sizes):
            command = [sys.executable, "-m", "benchmarks.memory", "--coordinator", str(network.folder)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            peaks = json.loads(done.stdout.splitlines()[-1])
        parts = {"fixed": peaks["fixed"], "sum": sizes["sum"], "parts": count * sizes["part"], "layer": sizes["layer"]}
        results["coordinator_peak_mb"][str(count)] = peaks["coordinator"]
        results["coordinator_bound_mb"][str(count)] = {**parts, "total": sum(parts.values())}
        results["merge"] = {"hidden": hidden, **sizes}
        print(f"{count} owners: {peaks['coordinator']:.0f} MB", file=sys.stderr)
    return results


def measure_owner(hidden: int) -> dict[str, Any]:
    """The peaks of one owner's heavy answers, MB, each in a process of its own."""
    from common.messages import Refusal
    from common.wire import from_record, to_record

    with made_network(hidden, 3) as (network, sizes):
        fixed = in_a_process(load_only, network.folder)
        node_config = {"settings": str(network.owner("owner1"))}
        peaks: dict[str, float] = {}
        for message in heavy_messages(network):
            reply, peak = in_a_process(answer, to_record((message,)), node_config)
            kind = type(message).__name__
            if any(isinstance(each, Refusal) for each in from_record(reply)):
                sys.exit(
                    f"the owner refused {kind}: {[path.read_text() for path in network.folder.rglob('error.txt')]}"
                )
            peaks[kind] = max(peaks.get(kind, 0.0), peak)
    parts = {"fixed": fixed, "model": sizes["model"], "grams": GRAMS * sizes["largest_gram"], "part": sizes["part"]}
    return {"hidden": hidden, **sizes, "peak_mb": peaks, "bound_mb": {**parts, "total": sum(parts.values())}}


def heavy_messages(network: "Network") -> "list[OurMessage]":
    """The roll call, the first sum, and a candidate that changes nothing."""
    import numpy as np

    from common.certificates import candidates_digest
    from common.merge_methods import contribution_layout
    from common.messages import PROTOCOL_VERSION, CandidatePart, OpenSum, RollCall
    from common.models.delta import delta_layout
    from common.models.loading import load_base
    from common.models.plan import merge_plan

    agreement, run = network.agreement, "1" * 64
    base = load_base(network.folder / "base", agreement.task, agreement.seed)
    plan = merge_plan(base, agreement.tensors)
    digest, layout = agreement.digest(), delta_layout(plan)
    slices = layout.part_slices(bytes_per_number=4)
    return [
        RollCall(version=PROTOCOL_VERSION, run=run, agreement_digest=digest),
        OpenSum(
            run=run,
            agreement_digest=digest,
            round=1,
            nonce="2" * 64,
            statistic="contribution",
            models="",
            candidates_digest=candidates_digest([]),
            layout_digest=contribution_layout(agreement, plan).digest(),
        ),
        *(
            CandidatePart(
                run=run,
                agreement_digest=digest,
                model=agreement.method,
                split="test",
                part=part,
                parts=len(slices),
                payload=np.zeros(position.stop - position.start, "<f4"),
            )
            for part, position in enumerate(slices)
        ),
    ]


@contextmanager
def made_network(hidden: int, count: int) -> "Iterator[tuple[Network, dict[str, float]]]":
    """The parties' files, and how large is what they handle, MB."""
    from benchmarks.network import make_network
    from common.merge_methods import contribution_layout
    from common.models.loading import load_base
    from common.models.plan import merge_plan
    from common.tensor_layout import PART_BYTES

    with tempfile.TemporaryDirectory(prefix="amalgram-") as name:
        network = make_network(Path(name), hidden, [f"owner{number}" for number in range(1, count + 1)])
        base = load_base(network.folder / "base", network.agreement.task, network.agreement.seed)
        plan = merge_plan(base, network.agreement.tensors)
        systems = [
            each.gram_size * (each.gram_size + sum(layer.d_out for layer in each.layers)) for each in plan.inputs
        ]
        numbers = {
            "model": sum(parameter.numel() for parameter in base.parameters()) * 4,
            "largest_gram": max(shared.gram_size for shared in plan.inputs) ** 2 * 8,
            "layer": max(systems) * 8,
            "sum": contribution_layout(network.agreement, plan).size * 8,
            "part": PART_BYTES,
        }
        yield network, {name: size / 1e6 for name, size in numbers.items()}


# --- the processes that are measured ---


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def peak_megabytes() -> float:
    """The most memory that this process has had."""
    return megabytes("VmHWM")


def megabytes(which: str) -> float:
    """VmHWM: the most memory that this process has had; VmRSS: what it has now. MB."""
    found = re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def coordinate(folder: Path) -> None:
    """Run the merge; the last line on stdout is this process's peak, and what of it is fixed."""
    from deploy.simulation.in_process_grid import run_in_process
    from server.app import app

    logging.getLogger("amalgram").setLevel(logging.ERROR)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as owners:

        def ask_owners(message: Message, context: Context) -> Message:
            content, _ = owners.submit(answer, message.content, dict(context.node_config)).result()
            return Message(content, reply_to=message)

        fixed = in_a_process(load_only, folder)
        configs = [{"settings": str(path)} for path in sorted(folder.glob("owner*.toml"))]
        (folder / "output").mkdir()
        run_in_process(app, ask_owners, configs, {"coordinator": str(folder / "coordinator.toml")})  # type: ignore[arg-type]
    print(json.dumps({"coordinator": peak_megabytes(), "fixed": fixed}))


def answer(content: RecordDict, node_config: dict[str, Any]) -> tuple[RecordDict, float]:
    """One owner's answer to one packet, and what it took."""
    from client.app import app

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 2  # which Flower tells its processes
    message = Message(content, dst_node_id=2, message_type="train.step")
    context = Context(run_id=1, node_id=2, node_config=node_config, state=RecordDict(), run_config={})
    reply = app(message, context)
    return reply.content, peak_megabytes()


def load_only(folder: Path) -> float:
    """What the libraries take, the model's code among them; the base's weights were here and are gone."""
    import server.app  # noqa: F401
    from common.agreement import Agreement
    from common.models.loading import load_base
    from common.settings_file import load_settings

    agreement = load_settings(folder / "agreement.toml", Agreement)
    load_base(folder / "base", agreement.task, agreement.seed)
    return megabytes("VmRSS")


# --- the page ---


def as_markdown(results: Mapping[str, Any]) -> str:
    coordinator, owner, merge = results["coordinator_peak_mb"], results["owner"], results["merge"]
    bounds, owner_bound = results["coordinator_bound_mb"], owner["bound_mb"]
    lines = [
        "# What memory a merge takes",
        "",
        "RegMean, masked, a BERT of 12 blocks. All figures in MB; peaks are VmHWM.",
        "",
        f"## An owner alone, {owner['hidden']} dimensions",
        "",
        f"Bound: fixed {owner_bound['fixed']:,.0f} + model {owner_bound['model']:,.0f} + {GRAMS} x the largest Gram "
        f"{owner_bound['grams']:,.0f} + a part {owner_bound['part']:,.0f} = **{owner_bound['total']:,.0f}**. The "
        f"vector that it measures has {owner['sum']:,.0f} and lies on the disk.",
        "",
        "| an owner that answers | peak |",
        "|---|---:|",
        *_rows(owner["peak_mb"]),
        "",
        f"## The coordinator, {merge['hidden']} dimensions",
        "",
        f"The model has {merge['model']:,.0f}, a sum {merge['sum']:,.0f}, the largest layer's Gram and products "
        f"{merge['layer']:,.0f}, a part of a message {merge['part']:,.0f}; the libraries take "
        f"{next(iter(bounds.values()))['fixed']:,.0f}. The bound is all of these, with one part an owner.",
        "",
        "| owners | " + " | ".join(coordinator) + " |",
        "|---|" + "---:|" * len(coordinator),
        "| coordinator's peak | " + " | ".join(f"{peak:,.0f}" for peak in coordinator.values()) + " |",
        "| bound | " + " | ".join(f"{bound['total']:,.0f}" for bound in bounds.values()) + " |",
    ]
    return "\n".join(lines) + "\n"


def _rows(peaks: Mapping[str, float]) -> list[str]:
    return [f"| {kind} | {peak:,.0f} |" for kind, peak in sorted(peaks.items(), key=lambda each: -each[1])]


if __name__ == "__main__":
    main()
