"""Flower's SecAgg+ workflow and our masked sum, end to end on the same vectors; and what a sum costs without masks.

python -m benchmarks.secagg [--json] [--numbers 10000000] [--owners 5] [--nvflare PYTHON] [--openfl PYTHON]

Each way runs in a process of its own, all parties one after the other: from the owners' float64 vectors to their sum.
flwr's part is its `SecAggPlusWorkflow` and its `secaggplus_mod` as published, with all owners as neighbours and its own
precision; ours is `MaskedOwner` and `MaskedCoordinator`. Every message of both is really serialised. They take turns,
and the median turn is reported. NVFlare and OpenFL, which mask nothing here, are measured too if PYTHON is that of an
environment with them (plain_sums.py).

    seconds     processor seconds of one thread, all parties together
    bytes       of the messages of one owner, both ways
    peak        of the process, MB (VmHWM): all owners' vectors lie in it, in both
    error       the largest difference of a number of the sum from the sum of the vectors

They do not promise the same: ours withstands a malicious coordinator (SECURITY.md) and signs every message. Writes
benchmarks/results/secagg.{json,md}.
"""

import argparse
import json
import logging
import multiprocessing
import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from secrets import token_bytes
from statistics import median
from time import process_time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import this_machine
from benchmarks.published import publish, say

TURNS = 3
PROMISES = """\
The four do not promise the same. SecAgg+ hides single vectors from a coordinator that follows the protocol, and is not
signed. Amalgram also withstands one that does not, and tells its owners apart by their signatures (SECURITY.md). The
NVFlare and OpenFL rows are plain means: their server reads every vector, and a mean goes back to each owner, which the
two masked sums do not send. What they offer instead was not measured: NVFlare's homomorphic encryption needs TenSEAL
and hides vectors from the server, but not from owners, who share one key; both can run in trusted hardware; and
OpenFL 1.9's secure aggregation adds the same random number to all entries of an owner's tensor
(`utilities/secagg/crypto.py`), so the differences between entries stay readable. OpenFL sends float32."""
COSTS = ("seconds", "bytes", "peak", "error")
PLAIN = {"nvflare": "NVFlare", "openfl": "OpenFL"}  # peers that need an environment of their own
LARGEST = 4.0  # of a vector's numbers; flwr clips at 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", type=int, default=10_000_000)
    parser.add_argument("--owners", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    for peer in PLAIN:
        parser.add_argument(f"--{peer}", type=Path, metavar="PYTHON")
    arguments = parser.parse_args()
    pythons = {peer: vars(arguments)[peer] for peer in PLAIN if vars(arguments)[peer] is not None}
    for results in after_each_turn(arguments.numbers, arguments.owners, pythons):
        publish("secagg", results, as_markdown(results), size)
    print(json.dumps(results, indent=2) if arguments.json else as_markdown(results))


def size(results: Mapping[str, Any]) -> dict[str, float]:
    peers = sum(peer in results for peer in PLAIN)
    return {
        "numbers": results["numbers"],
        "owners": results["owners"],
        "turns": len(results["turns"]["flwr"]),
        "other peers": peers,
    }


def after_each_turn(numbers: int, owners: int, pythons: Mapping[str, Path]) -> Iterator[dict[str, Any]]:
    """The results of all turns so far: one takes minutes."""
    turns: dict[str, list[dict[str, Any]]] = {way: [] for way in ("flwr", "amalgram", *pythons)}
    for number in range(TURNS):
        for way, run in (("flwr", by_flwr), ("amalgram", by_amalgram)):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                turns[way].append(process.submit(run, numbers, owners).result())
            say(f"{way}, turn {number + 1}: {turns[way][-1]}")
        for way, python in pythons.items():
            turns[way].append(without_masks(way, python, numbers, owners))
            say(f"{way}, turn {number + 1}: {turns[way][-1]}")
        yield results_of(numbers, owners, turns)


def results_of(numbers: int, owners: int, turns: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    versions = {way: each[0]["version"] for way, each in turns.items() if way in PLAIN}
    return {
        "machine": this_machine() | {"flwr": version("flwr")} | versions,
        "numbers": numbers,
        "owners": owners,
        **{way: {cost: median(turn[cost] for turn in each) for cost in COSTS} for way, each in turns.items()},
        "speedup": median(a["seconds"] / b["seconds"] for a, b in zip(turns["flwr"], turns["amalgram"], strict=True)),
        "turns": turns,
    }


def without_masks(way: str, python: Path, numbers: int, owners: int) -> dict[str, Any]:
    """The costs of one sum by NVFlare or OpenFL, in a process of its own environment and on one thread."""
    script = Path(__file__).with_name("plain_sums.py")
    command = [str(python), str(script), way, str(numbers), str(owners)]
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | threads, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def vectors_of(numbers: int, owners: int) -> list[NDArray[np.float64]]:
    random = np.random.default_rng(0)
    return [random.uniform(-LARGEST, LARGEST, numbers) for _ in range(owners)]


def in_messages(item: Any) -> int:
    """The bytes of everything in a message."""
    return len(item.deflate()) + sum(in_messages(child) for child in (item.children or {}).values())


def by_flwr(numbers: int, owners: int) -> dict[str, float]:
    from flwr.app import ConfigRecord, Context, Message, RecordDict
    from flwr.client.mod.secure_aggregation import secaggplus_mod
    from flwr.clientapp import ClientApp
    from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
    from flwr.compat.common import recorddict_compat as compat
    from flwr.server.client_manager import SimpleClientManager
    from flwr.server.client_proxy import ClientProxy
    from flwr.server.compat.legacy_context import LegacyContext
    from flwr.server.strategy import FedAvg
    from flwr.server.workflow import SecAggPlusWorkflow
    from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key

    from benchmarks.memory import peak_megabytes
    from deploy.simulation.in_process_grid import RUN_ID, SERVER_NODE_ID, InProcessGrid

    logging.getLogger("flwr").setLevel(logging.ERROR)
    vectors = vectors_of(numbers, owners)
    app = ClientApp(mods=[secaggplus_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        parameters = ndarrays_to_parameters([vectors[int(context.node_config["owner"])]])
        result = FitRes(Status(Code.OK, ""), parameters, num_examples=1, metrics={})
        return Message(compat.fitres_to_recorddict(result, keep_input=False), reply_to=message)

    class Counted(InProcessGrid):
        num_bytes = 0

        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            sent = list(messages)
            self.num_bytes += sum(map(in_messages, sent))
            return super().push_messages(sent)

        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            replies = super().pull_messages(message_ids)
            self.num_bytes += sum(map(in_messages, replies))
            return replies

    class Proxy(ClientProxy):  # who is there; messages go through the grid
        def __init__(self, node_id: int) -> None:
            super().__init__(str(node_id))
            self.node_id = node_id

        def get_properties(self, *_: Any) -> Any: ...
        def get_parameters(self, *_: Any) -> Any: ...
        def fit(self, *_: Any) -> Any: ...
        def evaluate(self, *_: Any) -> Any: ...
        def reconnect(self, *_: Any) -> Any: ...

    grid = Counted(app, [{"owner": number} for number in range(owners)])
    manager = SimpleClientManager()
    for node_id in grid.get_node_ids():
        manager.register(Proxy(node_id))
    state = RecordDict()
    state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: 1})
    state.array_records[MAIN_PARAMS_RECORD] = compat.parameters_to_arrayrecord(
        ndarrays_to_parameters([np.zeros(1)]), keep_input=False
    )
    strategy = FedAvg(fraction_fit=1.0, min_fit_clients=owners, min_available_clients=owners)
    plain = Context(run_id=RUN_ID, node_id=SERVER_NODE_ID, node_config={}, state=state, run_config={})
    context = LegacyContext(plain, strategy=strategy, client_manager=manager)
    started = process_time()
    SecAggPlusWorkflow(num_shares=1.0, reconstruction_threshold=0.6, max_weight=1.0)(grid, context)
    seconds = process_time() - started
    peak = peak_megabytes()
    found = compat.arrayrecord_to_parameters(context.state.array_records[MAIN_PARAMS_RECORD], keep_input=True)
    (mean,) = parameters_to_ndarrays(found)
    return {
        "seconds": seconds,
        "bytes": grid.num_bytes / owners,
        "peak": peak,
        "error": float(np.abs(mean * owners - sum(vectors)).max()),
    }


def by_amalgram(numbers: int, owners: int) -> dict[str, float]:
    from benchmarks.masking import Parties
    from benchmarks.memory import peak_megabytes
    from common.messages import Message, OpenSum
    from common.summation import fixed_point
    from common.summation.masked.owner import MaskedOwner
    from common.wire import from_record, to_record
    from deploy.simulation.in_process_grid import through_serialisation

    vectors = vectors_of(numbers, owners)
    encoded: dict[str, NDArray] = {}
    num_bytes = 0

    def sent(message: Message) -> Message:
        nonlocal num_bytes
        record = to_record((message,))
        num_bytes += in_messages(record)
        (arrived,) = from_record(through_serialisation(record))
        return arrived

    class Serialised(Parties):
        def answer(self, owner: str, request: Message) -> Message:
            request, number = sent(request), int(owner.removeprefix("o"))
            if isinstance(request, OpenSum):
                self.owners[owner], reply = MaskedOwner.open(self.terms, self.identities[owner], token_bytes)
                encoded[owner] = fixed_point.encode(self.terms.layout, vectors[number].copy(), owners)
            else:
                self.owners[owner], reply = self.owners[owner].answer(request, encoded[owner], token_bytes)
            return sent(reply)

    parties = Serialised(owners, numbers, needed=owners, colluders=0, bound=LARGEST)
    started = process_time()
    parties.until(None)
    total = parties.side.total()
    seconds = process_time() - started
    peak = peak_megabytes()
    return {
        "seconds": seconds,
        "bytes": num_bytes / owners,
        "peak": peak,
        "error": float(np.abs(total.vector - sum(vectors)).max()),
    }


# --- the page ---


def as_markdown(results: Mapping[str, Any]) -> str:
    return "\n".join(_lines(results)) + "\n"


def _lines(results: Mapping[str, Any]) -> Iterator[str]:
    machine = results["machine"]
    peers = {peer: name for peer, name in PLAIN.items() if peer in results}
    turns = len(results["turns"]["flwr"])
    versions = ", ".join(f"{peer} {machine[peer]}" for peer in ("flwr", *peers))
    yield "# A masked sum by Flower's SecAgg+ and by Amalgram"
    yield ""
    yield (
        f"{machine['cores']} cores ({machine['processor']}), Python {machine['python']}, {versions}; processor seconds "
        f"of one thread, all parties in one process, {f'medians of {turns} turns' if turns > 1 else 'one turn'}. "
        f"{results['owners']} owners, "
        f"{results['numbers']:,} numbers each, every message serialised."
    )
    yield ""
    yield "| | masked | seconds | MB per owner, both ways | peak of the process, MB | largest error of the sum |"
    yield "|---|---|---:|---:|---:|---:|"
    for way, name in {"flwr": "flwr's SecAgg+", "amalgram": "Amalgram", **peers}.items():
        each = results[way]
        yield (
            f"| {name} | {'no' if way in PLAIN else 'yes'} | {each['seconds']:.1f} | {each['bytes'] / 1e6:.1f} | "
            f"{each['peak']:,.0f} | {each['error']:.0e} |"
        )
    yield ""
    yield f"Amalgram is {results['speedup']:.1f} times as fast as SecAgg+."
    if peers:
        yield ""
        yield PROMISES


if __name__ == "__main__":
    main()
