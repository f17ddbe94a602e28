"""How many messages a merge sends each owner, and how long nobody works.

python -m benchmarks.steps [--json] [--other FOLDER] [--repeats 3]

Three owners merge a tiny BERT over TLS on the loopback. Every party has its own processes, as `amalgram server`,
`amalgram client` and `amalgram merge` start them. The merges are RegMean with one alpha, with its default sweep of
five, and in comparison with another method. Idle time is counted from the coordinator's first message to its app's end.
It is the time in which no owner's app runs and the coordinator's app uses less than half a processor: polling, waiting,
and starting what is not an app. Samples are taken every 0.1 s. `--other` measures another checkout of Amalgram in turn
with this one. Writes benchmarks/results/steps.{json,md}.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from statistics import median
from time import perf_counter, time
from typing import Any

from benchmarks.machine import this_machine
from benchmarks.published import publish
from deploy.example import reviews
from server.output_folder import PROGRESS
from tests.support.network import OWNERS, running, set_up_example

SAMPLE_SECONDS = 0.1
APPS = {"flwr-clientapp": "owner", "flwr-serverapp": "coordinator"}  # a part of the command line -> whose app it is
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
SHORT = """
title = "Reviews of three shops"
base = "base"
method = "regmean"
compare_with = {compare_with}
[task]
max_tokens = 32
[summation]
reply_timeout_seconds = 600
[regmean]
alphas = {alphas}
""" + "".join(f'[[owners]]\nname = "{name}"\n' for name in OWNERS)
MEASURED = {  # key in a run's results -> name
    "messages": "messages",
    "seconds": "wall",
    "idle_seconds": "idle",
    "owner_processor_seconds": "an owner's processor",
}
DEFAULT_ALPHAS = "[0.1, 0.5, 0.9, 0.95, 0.99]"
MERGES = {
    "one alpha": SHORT.format(compare_with="[]", alphas="[0.9]"),
    "five alphas": SHORT.format(compare_with="[]", alphas=DEFAULT_ALPHAS),
    "two methods": SHORT.format(compare_with='["average"]', alphas="[0.9]"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--other", type=Path, help="the root of another checkout, measured in turn with this one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", choices=MERGES, help=argparse.SUPPRESS)  # this process measures one merge
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure(MERGES[arguments.measure])))
        return
    roots = {"this version": Path(__file__).resolve().parents[1]}
    if arguments.other is not None:
        roots = {"another version": arguments.other.resolve()} | roots
    runs: dict[str, dict[str, list[Any]]] = {name: {merge: [] for merge in MERGES} for name in roots}
    for number in range(arguments.repeats):
        for merge in MERGES:
            for name, root in roots.items():
                print(f"{merge}, {name}, {number + 1} of {arguments.repeats}", file=sys.stderr)
                runs[name][merge].append(in_checkout(root, merge))
    results = {"machine": this_machine(), "load_at_end": os.getloadavg()[0], "repeats": arguments.repeats, "runs": runs}
    publish("steps", results, as_markdown(results), size)
    print(json.dumps(results, indent=2) if arguments.json else as_markdown(results))


def size(results: Mapping[str, Any]) -> dict[str, float]:
    return {"repeats": results["repeats"], "versions": len(results["runs"])}


def in_checkout(root: Path, merge: str) -> dict[str, Any]:
    """Measure one merge with the code in `root`, by this file."""
    command = [sys.executable, __file__, "--measure", merge]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def measure(short: str) -> dict[str, Any]:
    """One merge."""
    with tempfile.TemporaryDirectory(prefix="amalgram-") as name, ExitStack() as stack:
        folder = Path(name)
        reviews.write_consortium(folder / "example")
        network = set_up_example(folder / "example", folder / "parties", short)
        server = stack.enter_context(running("server", network.coordinator))
        server.wait_for("listening on")
        for owner in OWNERS:
            stack.enter_context(running("client", network.owner(owner))).wait_for("connected to the coordinator", 120)
        apps = stack.enter_context(Apps(network.folder))
        started = perf_counter()
        merge = stack.enter_context(running("merge", network.coordinator))
        if merge.exit_code(1800) != 0:
            sys.exit(merge.said)
        seconds = perf_counter() - started
        lines = [json.loads(line) for line in (network.folder / "output" / PROGRESS).read_text().splitlines()]
    sent = [(datetime.fromisoformat(line["time"]).timestamp(), line["sent"]) for line in lines if "sent" in line]
    begun, ended = sent[0][0], apps.last_seen
    started_apps = [count for count in apps.messages.values() if count]
    if started_apps != [len(sent)] * len(OWNERS):
        sys.exit(f"{len(sent)} messages to each owner, but the owners started {started_apps} apps")
    return {
        "messages": len(sent),
        "kinds": Counter(_together(kinds) for _, kinds in sent),
        "command_seconds": seconds,
        "seconds": ended - begun,
        "idle_seconds": apps.idle_seconds(begun, ended),
        "owner_processor_seconds": apps.processor_seconds / len(OWNERS),
    }


def _together(kinds: list[str]) -> str:
    """The contents of one packet: `5 CandidatePart + OpenSum`."""
    return " + ".join(kind if count == 1 else f"{count} {kind}" for kind, count in Counter(kinds).items())


class Apps:
    """Watches the apps that Flower starts for the parties in `folder`, inside the `with` block."""

    def __init__(self, folder: Path) -> None:
        self.messages: Counter[str] = Counter()  # node's home -> how many owner apps it started
        self.last_seen = 0.0  # when the coordinator's app last ran, seconds since the epoch
        self._folder = str(folder)
        self._programs: dict[int, str | None] = {}  # process -> program; None if it is not an app of these parties
        self._processor: dict[int, float] = {}  # process -> seconds
        self._idle: list[tuple[float, float]] = []  # spans without work
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Apps":
        self._thread.start()
        return self

    def __exit__(self, *arguments: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def processor_seconds(self) -> float:
        """Processor seconds of all owners' apps together, as far as sampled."""
        return sum(seconds for process, seconds in self._processor.items() if self._programs[process] == "owner")

    def idle_seconds(self, begun: float, ended: float) -> float:
        return sum(max(0.0, min(end, ended) - max(start, begun)) for start, end in self._idle)

    def _watch(self) -> None:
        before = time()
        while not self._over.wait(SAMPLE_SECONDS):
            now = time()
            working = False
            for process in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
                program = self._program(process)
                used = self._use(process) if program is not None else None
                if used is None:
                    continue
                working |= program == "owner" or used > (now - before) / 2
                if program == "coordinator":
                    self.last_seen = now
            if not working:
                self._idle.append((before, now))
            before = now

    def _program(self, process: int) -> str | None:
        if process not in self._programs:
            try:
                name = Path(f"/proc/{process}/comm").read_text()  # apps are forks that take their name
                command = name if name.startswith("flwr-") else Path(f"/proc/{process}/cmdline").read_bytes().decode()
                environment = Path(f"/proc/{process}/environ").read_bytes().decode(errors="replace")
                parent = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                return None
            home = environment.partition(f"FLWR_HOME={self._folder}")[2].partition("\0")[0]
            if home and ("superexec" in command or self._programs.get(parent) is not None):
                return None  # the SuperExec, a child of it that is about to become an app, or a child of an app
            program = next((name for part, name in APPS.items() if home and part in command), None)
            self._programs[process] = program
            self.messages[home] += program == "owner"
        return self._programs[process]

    def _use(self, process: int) -> float | None:
        """Processor seconds since the last call; None if the process has ended."""
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        if fields[0] == "Z":
            return None
        seconds = (int(fields[11]) + int(fields[12])) / CLOCK_TICKS
        used = seconds - self._processor.get(process, 0.0)
        self._processor[process] = seconds
        return used


# --- the page ---


def as_markdown(results: Mapping[str, Any]) -> str:
    runs, machine = results["runs"], results["machine"]
    rows = [
        "| merge | version | messages | wall, s | idle, s | idle share | an owner's processor, s |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    merges = list(next(iter(runs.values())))
    for merge in merges:
        for version, measured in runs.items():
            each = {key: median(run[key] for run in measured[merge]) for key in MEASURED}
            rows.append(
                f"| {merge} | {version} | {each['messages']} | {each['seconds']:.0f} | {each['idle_seconds']:.0f} | "
                f"{each['idle_seconds'] / each['seconds']:.0%} | {each['owner_processor_seconds']:.0f} |"
            )
    if len(runs) == 2:
        rows += ["", *_ratios(*runs.values())]
    kinds = [
        f"- {merge}, {version}: " + ", ".join(f"{count} {kind}" for kind, count in measured[merge][0]["kinds"].items())
        for merge in merges
        for version, measured in runs.items()
    ]
    lines = [
        "# How many steps a merge takes, and how long nobody works",
        "",
        f"Three owners, a tiny BERT, all parties on one machine over TLS: {machine['cores']} cores "
        f"({machine['processor']}), Python {machine['python']}; load average at the end {results['load_at_end']:.1f}. "
        f"Medians; runs of each merge: {results['repeats']}. Messages are those to one owner.",
        "",
        *rows,
        "",
        "Messages to one owner, by their contents:",
        "",
        *kinds,
    ]
    return "\n".join(lines) + "\n"


def _ratios(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The second version's numbers over the first one's, run by run."""
    lines = [
        "| this version / the other one | " + " | ".join(MEASURED.values()) + " |",
        "|---|" + "---:|" * len(MEASURED),
    ]
    for merge in one:
        pairs = list(zip(one[merge], other[merge], strict=True))
        ratios = (median(after[key] / before[key] for before, after in pairs) for key in MEASURED)
        lines.append(f"| {merge} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    return lines


if __name__ == "__main__":
    main()
