"""What the masked sum costs, compared with the least possible and with Flower's own.

python -m benchmarks.masking [--json] [--quick] [--numbers 100000000] [--most-owners 1000]

    mask_fraction_of_openssl      masks made and added, as a share of `openssl speed -evp aes-128-ctr`, one core
    owner_step_seconds            an owner's whole upload, by number of peers: encode, mask, hash and sign all parts
    speedup_over_flwr_generator   speed of one mask made and added here / speed of flwr's SecAgg+ generator
    unmasking_seconds             the coordinator's last step with 20 owners, by share of owners that dropped out
    demo_seconds                  the whole demo without references, plain and masked: the better of two runs each
    by_owners                     whole sums of a small vector, all owners in one process: seconds and bytes per owner

The first and the third are in processor seconds, which `openssl speed` counts too: clocks on the wall would compare how
busy the machine is. --quick has a fifth of the numbers, at most 100 owners, and no demo. Writes
benchmarks/results/masking.{json,md}.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from secrets import token_bytes
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
import transformers
from flwr.common.secure_aggregation import secaggplus_utils as flwr_masks

from benchmarks.machine import this_machine
from benchmarks.published import publish, say
from common.certificates import deliveries_digest
from common.identity import Identity
from common.messages import Acknowledgements, KeyShares, Message, OpenSum, PartRequest
from common.summation import fixed_point, mask_stream
from common.summation.masked.coordinator import MaskedCoordinator
from common.summation.masked.owner import MaskedOwner
from common.summation.protocol import SumTerms
from common.tensor_layout import TensorEntry, TensorLayout
from common.thresholds import neighbourhood
from deploy.demo.digits import write_consortium
from deploy.simulation.simulate import simulate
from server.exchange import packet_bytes

PEERS = (2, 10, 20)
OWNERS = (3, 10, 30, 100, 300, 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", type=int, default=100_000_000)
    parser.add_argument("--most-owners", type=int, default=1000)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if arguments.quick:
        results = measure(arguments.numbers // 5, min(arguments.most_owners, 100), with_demo=False)
    else:
        results = measure(arguments.numbers, arguments.most_owners, with_demo=True)
    publish("masking", results, as_markdown(results), size)
    print(json.dumps(results, indent=2) if arguments.json else as_markdown(results))


def size(results: Mapping[str, Any]) -> dict[str, float]:
    return {
        "numbers": results["numbers"],
        "owners": max(row["owners"] for row in results["by_owners"]),
        "demos": len(results["demo_seconds"]),
    }


def measure(numbers: int, most_owners: int, *, with_demo: bool) -> dict[str, Any]:
    openssl, ours = openssl_bytes_a_second(), mask_bytes_a_second(numbers)
    results: dict[str, Any] = {
        "machine": this_machine(),
        "numbers": numbers,
    }
    measurements: dict[str, Callable[[], Any]] = {
        "openssl_bytes_a_second": lambda: openssl,
        "mask_bytes_a_second": lambda: ours,
        "mask_fraction_of_openssl": lambda: ours / openssl if openssl else None,
        "owner_step_seconds": lambda: {str(peers): owner_step_seconds(peers, numbers) for peers in PEERS},
        "speedup_over_flwr_generator": lambda: speedup_over_flwr_generator(numbers // 10),
        "unmasking_seconds": lambda: {share: unmasking_seconds(share, numbers // 10) for share in ("0 %", "10 %")},
        "by_owners": lambda: [whole_sum(count) for count in OWNERS if count <= most_owners],
        "demo_seconds": demo_seconds if with_demo else dict,
    }
    for name, measurement in measurements.items():
        results[name] = measurement()
        say(f"{name}: {results[name]}")
    return results


# --- masks ---


def openssl_bytes_a_second() -> float | None:
    """What one core makes with this machine's OpenSSL program; None if it has none."""
    program = shutil.which("openssl")
    if program is None:
        return None
    command = [program, "speed", "-evp", "aes-128-ctr", "-bytes", "262144", "-seconds", "3"]
    printed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.search(r"([\d.]+)k\s*$", printed.strip())
    return float(found[1]) * 1000 if found else None


def mask_bytes_a_second(numbers: int) -> float:
    """Keystream and addition of ten masks, as with ten peers, on one core; the best of three."""
    values = np.zeros(numbers // 10, dtype="<u8")
    masks: list[mask_stream.Mask] = [(bytes([peer] * 16), 1) for peer in range(10)]
    seconds = min(timed(lambda: mask_stream.add_masks(values, masks, 0, threads=1), process_time) for _ in range(3))
    return len(masks) * values.nbytes / seconds


def speedup_over_flwr_generator(numbers: int) -> float:
    """Seconds of flwr's pairwise mask, made and added, over those of ours; one core each, the best of three."""
    ours, theirs = np.zeros(numbers, dtype="<u8"), np.zeros(numbers, dtype=np.int64)

    def flwr_path() -> None:
        (mask,) = flwr_masks.pseudo_rand_gen(b"k" * 32, 1 << 32, [(numbers,)])
        np.add(theirs, mask, out=theirs)

    slow = min(timed(flwr_path, process_time) for _ in range(3))
    mask: mask_stream.Mask = (b"k" * 16, 1)
    fast = min(timed(lambda: mask_stream.add_masks(ours, [mask], 0, threads=1), process_time) for _ in range(3))
    return slow / fast


def timed(work: Callable[[], object], clock: Callable[[], float] = perf_counter) -> float:
    started = clock()
    work()
    return clock() - started


# --- whole steps, through the real owner and coordinator ---


class Parties:
    """Owners and a coordinator in this process, which talk until a step is to be timed."""

    def __init__(self, count: int, numbers: int, needed: int, colluders: int, bound: float = 1.0) -> None:
        self.identities = {f"o{i}": Identity(name=f"o{i}", seed=token_bytes(32)) for i in range(count)}
        layout = TensorLayout((TensorEntry(name="t", shape=(numbers,), bound=bound),))
        request = OpenSum(
            run="00" * 32,
            agreement_digest="00" * 32,
            round=0,
            nonce=token_bytes(32).hex(),
            position=0,
            deliveries_digest=deliveries_digest([]),
            layout_digest=layout.digest(),
        )
        roster = {name: identity.public_key for name, identity in self.identities.items()}
        self.terms = SumTerms(request=request, layout=layout, roster=roster, needed_owners=needed, colluders=colluders)
        self.side = MaskedCoordinator(self.terms, self.terms.names)
        self.owners: dict[str, MaskedOwner] = {}
        self.encoded = np.zeros(numbers, dtype="<u8")
        self.bytes_of_an_owner = 0.0

    def answer(self, owner: str, request: Message) -> Message:
        if isinstance(request, OpenSum):
            self.owners[owner], reply = MaskedOwner.open(self.terms, self.identities[owner], token_bytes)
        else:
            self.owners[owner], reply = self.owners[owner].answer(request, self.encoded, token_bytes)
        self.bytes_of_an_owner += (packet_bytes((request,)) + packet_bytes((reply,))) / len(self.identities)
        return reply

    def until(self, kind: type[Message] | None, dropped: frozenset[str] = frozenset()) -> Mapping[str, Message]:
        """Play the protocol up to the step whose requests are `kind`; owners in `dropped` send no vector."""
        while requests := self.side.requests():
            now = type(next(iter(requests.values())))
            if kind is not None and now is kind:
                break
            for owner, request in requests.items():
                if owner in dropped and now is KeyShares:
                    self.side.drop(owner)
                else:
                    self.side.receive(owner, self.answer(owner, request))
            if now is not Acknowledgements or kind is None:
                self.side.end_step()
        return requests


def owner_step_seconds(peers: int, numbers: int) -> float:
    """One owner's upload with `peers` peers, from its float64 vector to the last signed part."""
    parties = Parties(peers + 1, numbers, needed=peers + 1, colluders=0)
    request = parties.until(KeyShares)["o0"]
    vector = np.random.default_rng(0).uniform(-1, 1, numbers)
    parts = len(parties.terms.layout.part_slices(parties.terms.layout.dtype.itemsize))

    def step() -> None:
        parties.encoded = fixed_point.encode(parties.terms.layout, vector, peers + 1)
        parties.answer("o0", request)
        for part in range(1, parts):
            parties.answer("o0", PartRequest(session=parties.terms.request.session, part=part))

    return timed(step)


def unmasking_seconds(share: str, numbers: int) -> float:
    """The coordinator's last step with 20 owners: rebuild seeds, take masks off."""
    dropped = frozenset(["o3", "o7"] if share == "10 %" else [])
    parties = Parties(20, numbers, needed=15, colluders=5)
    requests = parties.until(Acknowledgements, dropped)
    for owner, request in requests.items():
        parties.side.receive(owner, parties.answer(owner, request))
    return timed(parties.side.end_step)


def whole_sum(count: int) -> dict[str, Any]:
    """A whole sum of 1000 numbers over `count` owners; a tenth may collude, and a tenth may drop out."""
    tenth = count // 10
    parties = Parties(count, 1000, needed=max(3, count - tenth), colluders=tenth if count > 3 else 0)
    seconds = timed(lambda: parties.until(None))
    graph = neighbourhood(count, parties.terms.colluders, count - parties.terms.needed_owners)
    return {
        "owners": count,
        "neighbours": graph.degree,
        "seconds_an_owner": seconds / count,
        "bytes_an_owner": round(parties.bytes_of_an_owner),
    }


def demo_seconds() -> dict[str, float]:
    """The demo's five owners, including fine-tuning, by kind of sum. They take turns, so both meet the same machine."""
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {"plain": [], "masked": []}
    with tempfile.TemporaryDirectory() as folder:
        consortium = Path(folder) / "consortium"
        write_consortium(consortium, seed=0)
        agreement = (consortium / "agreement.toml").read_text()
        for turn in range(2):
            for kind, times in seconds.items():
                (consortium / "agreement.toml").write_text(f'{agreement}\n[summation]\nkind = "{kind}"\n')
                output = Path(folder) / f"{kind}-{turn}"
                times.append(timed(lambda output=output: simulate(consortium, output, with_references=False)))  # type: ignore[misc]
    torch.set_num_threads(os.cpu_count() or 1)
    return {kind: min(times) for kind, times in seconds.items()}


# --- the page ---


def as_markdown(results: Mapping[str, Any]) -> str:
    return "\n".join(_lines(results)) + "\n"


def _lines(results: Mapping[str, Any]) -> Iterator[str]:
    machine = results["machine"]
    yield "# What masking costs"
    yield ""
    yield f"{machine['cores']} cores ({machine['processor']}), Python {machine['python']}. Each ratio is from one run."
    yield ""
    fraction = results["mask_fraction_of_openssl"]
    yield "| | |"
    yield "|---|---|"
    yield f"| masks made and added, one core | {results['mask_bytes_a_second'] / 1e9:.1f} GB/s |"
    if fraction is not None:
        floor = results["openssl_bytes_a_second"] / 1e9
        yield f"| as a share of `openssl speed -evp aes-128-ctr`, {floor:.1f} GB/s | {fraction:.0%} |"
    yield f"| faster than flwr's SecAgg+ generator, one core | {results['speedup_over_flwr_generator']:.1f} times |"
    for peers, seconds in results["owner_step_seconds"].items():
        yield f"| an owner's whole upload, {results['numbers']:,} numbers, {peers} peers | {seconds:.2f} s |"
    for share, seconds in results["unmasking_seconds"].items():
        yield f"| unmasking {results['numbers'] // 10:,} numbers of 20 owners, {share} dropped out | {seconds:.2f} s |"
    demo = results["demo_seconds"]
    if demo:
        yield f"| the demo, masked and plain | {demo['masked']:.1f} s and {demo['plain']:.1f} s |"
    yield ""
    yield "Whole sums of 1,000 numbers. A tenth of the owners may collude, and a tenth may drop out:"
    yield ""
    yield "| owners | neighbours | seconds per owner | bytes per owner, both ways |"
    yield "|---:|---:|---:|---:|"
    for row in results["by_owners"]:
        yield (f"| {row['owners']} | {row['neighbours']} | {row['seconds_an_owner']:.3f} | {row['bytes_an_owner']:,} |")


if __name__ == "__main__":
    main()
