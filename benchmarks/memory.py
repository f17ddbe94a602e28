"""How much memory a merge takes: the coordinator's peak by number of owners, and one owner's.

python -m benchmarks.memory [--json] [--hidden 384] [--owners 3 6 12] [--owner-hidden 768]

First, the merge of benchmarks/network.py without the network: RegMean of a BERT with 12 blocks, masked. The coordinator
has its own process, and another one answers for all owners. Then one owner alone, on a BERT with BERT-base's shape. It
answers each message in a fresh process, as with Flower: the roll call, its measurement, a candidate, which it then
scores. Peaks are the kernel's VmHWM, which also counts what is mapped from files, such as PyTorch's libraries.

    fixed         what is resident in a process that has imported the libraries, loaded the base and released it
    bound         for an owner: fixed + its model + 1.3 x the largest Gram + one part of a message;
                  for the coordinator: fixed + the sum + one part per owner + the largest layer's Gram and products

Imports are local to the functions that need them, so that they do not count in every process. Writes
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
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from benchmarks.published import publish

if TYPE_CHECKING:
    from common.messages import Message as OurMessage
    from tests.support.network import Network

GRAMS = 1.3  # all Grams of one block together, over the largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=384, help="the merged model's width; a multiple of 64")
    parser.add_argument("--owners", type=int, nargs="+", default=[3, 6, 12])
    parser.add_argument(
        "--owner-hidden", type=int, default=768, help="the width of the single owner's model; BERT-base has 768"
    )
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
    publish("memory", results, as_markdown(results), size)
    print(json.dumps(results, indent=2) if arguments.json else as_markdown(results))


def size(results: Mapping[str, Any]) -> dict[str, float]:
    return {
        "owners": max(map(int, results["coordinator_peak_mb"])),
        "dimensions of the merged model": results["merge"]["hidden"],
        "dimensions of the owner's model": results["owner"]["hidden"],
    }


def measure_merges(hidden: int, counts: list[int]) -> dict[str, Any]:
    """The coordinator's peak in one merge for each number of owners, MB."""
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
    """The peaks of one owner's heavy answers, MB, each in its own process."""
    from common.messages import CandidatePart, Refusal
    from common.wire import from_record, to_record

    with made_network(hidden, 3) as (network, sizes):
        fixed = in_a_process(load_only, network.folder)
        node_config = {"settings": str(network.owner("owner1"))}
        peaks: dict[str, float] = {}
        for message in heavy_messages(network):
            if isinstance(message, CandidatePart) and message.part == 0:
                in_a_process(skip_to, network.owner("owner1"), message.position)
            reply, peak = in_a_process(answer, to_record((message,)), node_config)
            kind = type(message).__name__
            if any(isinstance(each, Refusal) for each in from_record(reply)):
                sys.exit(
                    f"the owner refused {kind}: {[path.read_text() for path in network.folder.rglob('error.txt')]}"
                )
            peaks[kind] = max(peaks.get(kind, 0.0), peak)
        peaks["judging a candidate"] = in_a_process(judge, network.owner("owner1"))
    parts = {"fixed": fixed, "model": sizes["model"], "grams": GRAMS * sizes["largest_gram"], "part": sizes["part"]}
    return {"hidden": hidden, **sizes, "peak_mb": peaks, "bound_mb": {**parts, "total": sum(parts.values())}}


def heavy_messages(network: "Network") -> "list[OurMessage]":
    """The roll call, the contribution round, and a candidate that changes nothing."""
    import numpy as np

    from common.certificates import Delivered, deliveries_digest, delivery_body
    from common.domain_separation import Domain
    from common.identity import read_identity
    from common.mapped import sha256_of
    from common.messages import PROTOCOL_VERSION, CandidatePart, OpenSum, RollCall
    from common.models.loading import load_base
    from common.models.plan import merge_plan
    from common.schedule import schedule_of

    agreement, run = network.agreement, "1" * 64
    base = load_base(network.folder / "base", agreement.task, agreement.seed)
    schedule = schedule_of(agreement, merge_plan(base, agreement.tensors))
    contribution = schedule.find("contribution")
    candidate = schedule.delivery_of(agreement.method, "test")
    digest, slices = agreement.digest(), candidate.layout.part_slices(bytes_per_number=4)
    vector_digest = sha256_of(np.zeros(candidate.layout.size, "<f4"))
    delivered = Delivered(position=candidate.position, model=agreement.method, digest=vector_digest)
    coordinator = read_identity(network.folder / "coordinator.key")
    signature = coordinator.sign(Domain.SIGN_DELIVERY, bytes.fromhex(run), delivery_body(digest, delivered))
    return [
        RollCall(version=PROTOCOL_VERSION, run=run, agreement_digest=digest),
        OpenSum(
            run=run,
            agreement_digest=digest,
            round=1,
            nonce="2" * 64,
            position=contribution.position,
            deliveries_digest=deliveries_digest([]),
            layout_digest=contribution.layout.digest(),
        ),
        *(
            CandidatePart(
                run=run,
                agreement_digest=digest,
                position=candidate.position,
                model=agreement.method,
                part=part,
                parts=len(slices),
                payload=np.zeros(position.stop - position.start, "<f4"),
                signature=signature,
            )
            for part, position in enumerate(slices)
        ),
    ]


@contextmanager
def made_network(hidden: int, count: int) -> "Iterator[tuple[Network, dict[str, float]]]":
    """The parties' files, and the sizes of what they handle, MB."""
    from benchmarks.network import make_network
    from common.models.loading import load_base
    from common.models.plan import merge_plan
    from common.schedule import schedule_of
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
            "sum": schedule_of(network.agreement, plan).find("contribution").layout.size * 8,
            "part": PART_BYTES,
        }
        yield network, {name: size / 1e6 for name, size in numbers.items()}


# --- the processes that are measured ---


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call the function in a fresh process."""
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
    """Run the merge. The last line on stdout has this process's peak, and how much of it is fixed."""
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
        run_in_process(app, ask_owners, configs, {"coordinator": str(folder / "coordinator.toml")})
    print(json.dumps({"coordinator": peak_megabytes(), "fixed": fixed}))


def answer(content: RecordDict, node_config: dict[str, Any]) -> tuple[RecordDict, float]:
    """One owner's answer to one packet, and the peak memory it took, MB."""
    from client.app import app

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 2  # as Flower sets them in its processes
    message = Message(content, dst_node_id=2, message_type="train.step")
    context = Context(run_id=1, node_id=2, node_config=node_config, state=RecordDict(), run_config={})
    reply = app(message, context)
    return reply.content, peak_megabytes()


def judge(settings: Path) -> float:
    """The peak memory of scoring a candidate that changes nothing, and of what would be published of it, MB."""
    from client.owner import Owner
    from common.models.delta import VectorDelta

    workbench = Owner(settings).workbench
    workbench.judge_candidate("test", VectorDelta(workbench.plan), may_be_published=True)
    return peak_megabytes()


def skip_to(settings: Path, position: int) -> None:
    """Let the owner think that everything before `position` of its schedule is over."""
    from client.owner import Owner
    from tests.support.owner_process import fast_forward

    fast_forward(Owner(settings), position)


def load_only(folder: Path) -> float:
    """What the libraries take, including the model's code, after the base's weights were loaded and released."""
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
        "RegMean, masked, a BERT with 12 blocks. All sizes are in MB; peaks are VmHWM.",
        "",
        f"## An owner alone, {owner['hidden']} dimensions",
        "",
        f"Bound: fixed {owner_bound['fixed']:,.0f} + model {owner_bound['model']:,.0f} + Grams "
        f"{owner_bound['grams']:,.0f} ({GRAMS} x the largest) + a part {owner_bound['part']:,.0f} = "
        f"**{owner_bound['total']:,.0f}**. The "
        f"vector that it measures has {owner['sum']:,.0f} and stays on the disk.",
        "",
        "| the owner's answer to | peak |",
        "|---|---:|",
        *_rows(owner["peak_mb"]),
        "",
        f"## The coordinator, {merge['hidden']} dimensions",
        "",
        f"The model has {merge['model']:,.0f}, a sum {merge['sum']:,.0f}, the largest layer's Gram and products "
        f"{merge['layer']:,.0f}, a part of a message {merge['part']:,.0f}; the libraries take "
        f"{next(iter(bounds.values()))['fixed']:,.0f}. The bound is that of libraries, sum, "
        "largest layer and a part per owner.",
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
