"""Flower's SecAgg+ workflow and our masked sum, end to end on the same vectors.

python -m benchmarks.secagg [--json] [--numbers 10000000] [--owners 5]

Each way runs in a process of its own, all parties one after the other: from the owners' float64 vectors to their sum.
flwr's part is its `SecAggPlusWorkflow` and its `secaggplus_mod` as published, with all owners as neighbours and its own
precision; ours is `MaskedOwner` and `MaskedCoordinator`. Every message of both is really serialised. They take turns,
and the median turn is reported.

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
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from secrets import token_bytes
from statistics import median
from time import process_time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import this_machine
from benchmarks.published import publish, say

TURNS = 3
LARGEST = 4.0  # of a vector's numbers; flwr clips at 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", type=int, default=10_000_000)
    parser.add_argument("--owners", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results = measure(arguments.numbers, arguments.owners)
    publish("secagg", results, as_markdown(results), size)
    print(json.dumps(results, indent=2) if arguments.json else as_markdown(results))


def size(results: Mapping[str, Any]) -> dict[str, float]:
    return {"numbers": results["numbers"], "owners": results["owners"]}


def measure(numbers: int, owners: int) -> dict[str, Any]:
    turns: dict[str, list[dict[str, float]]] = {"flwr": [], "amalgram": []}
    for number in range(TURNS):
        for way, run in (("flwr", by_flwr), ("amalgram", by_amalgram)):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                turns[way].append(process.submit(run, numbers, owners).result())
            say(f"{way}, turn {number + 1}: {turns[way][-1]}")
    return {
        "machine": this_machine() | {"flwr": version("flwr")},
        "numbers": numbers,
        "owners": owners,
        **{way: {key: median(turn[key] for turn in each) for key in each[0]} for way, each in turns.items()},
        "speedup": median(a["seconds"] / b["seconds"] for a, b in zip(turns["flwr"], turns["amalgram"], strict=True)),
    }


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
    from flwr.supercore.task_identity import TaskIdentity

    from benchmarks.memory import peak_megabytes
    from deploy.simulation.in_process_grid import RUN_ID, SERVER_NODE_ID, InProcessGrid

    logging.getLogger("flwr").setLevel(logging.ERROR)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, SERVER_NODE_ID
    vectors = vectors_of(numbers, owners)
    app = ClientApp(mods=[secaggplus_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        parameters = ndarrays_to_parameters([vectors[int(context.node_config["owner"])]])
        result = FitRes(Status(Code.OK, ""), parameters, num_examples=1, metrics={})
        return Message(compat.fitres_to_recorddict(result, keep_input=False), reply_to=message)

    class Counted(InProcessGrid):
        num_bytes = 0

        def _handle(self, message: Message) -> Message:
            self.num_bytes += in_messages(message)
            reply = super()._handle(message)
            self.num_bytes += in_messages(reply)
            return reply

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
    yield "# A masked sum by Flower's SecAgg+ and by Amalgram"
    yield ""
    yield (
        f"{machine['cores']} cores ({machine['processor']}), Python {machine['python']}, flwr {machine['flwr']}; "
        f"processor seconds of one thread, all parties in one process, medians of {TURNS} turns. {results['owners']} "
        f"owners, {results['numbers']:,} numbers each, every message serialised."
    )
    yield ""
    yield "| | seconds | MB per owner, both ways | peak of the process, MB | largest error of the sum |"
    yield "|---|---:|---:|---:|---:|"
    for way, name in (("flwr", "flwr's SecAgg+"), ("amalgram", "Amalgram")):
        each = results[way]
        yield (
            f"| {name} | {each['seconds']:.1f} | {each['bytes'] / 1e6:.1f} | {each['peak']:,.0f} | "
            f"{each['error']:.0e} |"
        )
    yield ""
    yield f"Amalgram is {results['speedup']:.1f} times as fast."


if __name__ == "__main__":
    main()
