"""What verifying a merge costs, compared with the same merge without verification.

python -m benchmarks.verification [--json] [--merges reviews demo emotion bert-base] [--repeats 3]
                                  [--data DATA --models MODELS]     for `emotion`, see benchmarks/emotion.py

Whole masked merges on one thread, in turns: unverified, verified. Each has its own process. `bert-base` is carried by
the network engine: a server and a client for each owner, over TLS, which start a process for every message. The others
are in the in-process engine. Messages are those to one owner; bytes are everything that grows with the model, to and
from all owners. Seconds are of the processor, all parties together, since others may use the machine. Models are
fine-tuned beforehand, except for the demo's, which are trained within the merge.

    reviews     three owners, a tiny BERT, RegMean with a sweep of five alphas
    sum         the same owners, the plain average: the least that a merge can be
    demo        `amalgram simulate --demo`: five owners of digits, six methods, a tiny model
    emotion     five MiniLM (22.7 million weights) fine-tuned on five domains, RegMean with one alpha; owners bring
                only the rows that they measure, since under each agreement they would draw others
    fisher      the same five, Fisher averaging: the method whose check is largest
    methods     the same five, every method on the same rows: whether verification, for which sums have floors, moves
                any metric; with --repeats 1, since nothing is drawn
    bert-base   three owners, a BERT of the base's width and vocabulary, but with 2 of its 12 layers (39 million random
                weights), RegMean with one alpha; `--layers 12` is the whole one, which takes a gigabyte and a half an
                owner to send

Writes benchmarks/results/verification.{json,md}.
"""

import argparse
import json
import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from statistics import median
from typing import Any

from benchmarks.emotion import write_consortium as write_emotion
from benchmarks.large import change_a_little
from benchmarks.machine import quiet_on_one_thread, this_machine
from benchmarks.memory import peak_megabytes
from benchmarks.published import publish, published
from common.agreement import AgreementDraft
from common.settings_file import load_settings
from deploy.simulation.engine import Engine

OFF = "\n[verification]\nrequired = false\n"
BERT_BASE = """
title = "BERT-base"
base = "base"
method = "regmean"
[task]
max_tokens = 32
[regmean]
alphas = [0.9]
[privacy]
min_rows_per_dimension = 0.0
"""
LAYERS = 2  # of bert-base
ALL_LAYERS = 12
MEASURED = {"emotion": 500, "fisher": 48, "methods": 500}  # rows of each owner
METHODS = {  # of the merges of five MiniLM
    "emotion": ("regmean",),
    "fisher": ("fisher",),
    "methods": (
        "average",
        "task_arithmetic",
        "fisher",
        "data_free",
        "regmean",
        "anchored",
        "logit_adjusted",
        "regmean_plus_plus",
        "refit",
    ),
}
MERGES = ("reviews", "sum", "demo", "emotion", "fisher", "methods", "bert-base")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--merges", nargs="+", choices=MERGES, default=list(MERGES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=LAYERS, help="of bert-base")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results = published("verification") or {"runs": {}}
    results["machine"] = this_machine()
    for merge in arguments.merges:
        runs: list[dict[str, Any]] = []
        for _ in range(arguments.repeats):
            for verified in (False, True):
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                    run = process.submit(measure, merge, arguments, verified=verified).result()
                runs.append(run)
                print(merge, run, file=sys.stderr)
        results["runs"][merge] = runs
        if merge == "bert-base":
            results["layers"] = arguments.layers
        publish("verification", results, as_markdown(results), size)
    print(json.dumps(results, indent=2) if arguments.json else as_markdown(results))


def size(results: Mapping[str, Any]) -> dict[str, float]:
    return {f"runs of {merge}": len(runs) for merge, runs in results["runs"].items()}


def measure(merge: str, arguments: argparse.Namespace, *, verified: bool) -> dict[str, Any]:
    """The costs of one merge."""
    from deploy.simulation.simulate import simulate

    quiet_on_one_thread()
    with tempfile.TemporaryDirectory(prefix="amalgram-") as name:
        folder = Path(name) / "consortium"
        write(merge, folder, arguments)
        agreement = folder / "agreement.toml"
        if not verified:
            agreement.write_text(_with_table(agreement.read_text(), OFF))
        engine: Engine = "network" if merge == "bert-base" else "in-process"
        started, used = time.perf_counter(), _processor_seconds()
        report = simulate(folder, Path(name) / "output", engine=engine, with_references=False)
        seconds, processor = time.perf_counter() - started, _processor_seconds() - used
    if report.verified != verified:
        sys.exit(f"{merge}: asked for verified = {verified}, but the report says {report.verified}")
    first = report.owners[0]
    phases: dict[str, int] = {}
    for step in report.steps:
        messages = step.by_owner[first].messages if first in step.by_owner else 0
        phases[step.title] = phases.get(step.title, 0) + messages
    tested = report.evaluation.mean[report.method]
    return {
        "verified": verified,
        "by_method": {name: [each.accuracy, each.metric] for name, each in report.evaluation.mean.items()},
        "accuracy": tested.accuracy,
        "macro_f1": tested.metric,
        "engine": engine,
        "owners": len(report.owners),
        "messages": sum(step.by_owner[first].messages for step in report.steps if first in step.by_owner),
        "by_step": phases,
        "bytes": sum(step.bytes_sent + step.bytes_received for step in report.steps),
        "check_bytes": sum(
            step.bytes_sent + step.bytes_received for step in report.steps if step.phase == "verification"
        ),
        "seconds": processor,
        "wall_seconds": seconds,
        "peak_megabytes": peak_megabytes(),
    }


def _processor_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    return sum(each.ru_utime + each.ru_stime for each in map(getrusage, (RUSAGE_SELF, RUSAGE_CHILDREN)))


def write(merge: str, folder: Path, arguments: argparse.Namespace) -> None:
    """A consortium for `simulate`."""
    from deploy.demo import digits
    from deploy.example import reviews

    if merge == "demo":
        digits.write_consortium(folder, seed=0)
    elif merge in ("reviews", "sum"):
        reviews.write_consortium(folder)
        path = folder / "agreement.toml"
        text = path.read_text().replace('["average", "task_arithmetic", "regmean"]', "[]")
        method = "average" if merge == "sum" else "regmean"
        path.write_text(text.replace('method = "data_free"', f'method = "{method}"'))
    elif merge == "bert-base":
        _write_bert_base(folder, arguments.layers)
    else:
        if arguments.data is None or arguments.models is None:
            sys.exit(f"{merge}: needs --data and --models")
        write_emotion(folder, arguments.data, arguments.models, methods=METHODS[merge], alphas=(0.9,))
        path = folder / "agreement.toml"
        path.write_text(_with_table(path.read_text(), f"\n[fisher]\nmeasured_examples = {MEASURED[merge]}\n"))
        for owner in load_settings(path, AgreementDraft).owner_names:
            own = folder / f"{owner}.toml"
            own.write_text(f"{own.read_text()}max_train_rows = {MEASURED[merge]}\n")


def _write_bert_base(folder: Path, layers: int) -> None:
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    from deploy.example import reviews

    reviews.write_consortium(folder / "example")
    config = BertConfig(num_hidden_layers=layers, num_labels=2, id2label={0: "negative", 1: "positive"})
    model = BertForSequenceClassification(config)
    tokenizer = AutoTokenizer.from_pretrained(folder / "example" / "base")
    for name in ("base", *reviews.OWNERS):
        if name != "base":
            change_a_little(model)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    roster = "".join(f'[[owners]]\nname = "{name}"\n' for name in reviews.OWNERS)
    (folder / "agreement.toml").write_text(BERT_BASE + roster)
    for name, (suffix, *_) in reviews.OWNERS.items():
        (folder / f"{name}.toml").write_text(
            f'name = "{name}"\nfine_tuned = "{name}"\n[data]\ntrain = "example/data/{name}/train.{suffix}"\n'
            f'test = "example/data/{name}/test.{suffix}"\nmax_train_rows = 100\nmax_test_rows = 100\n'
        )


def _with_table(text: str, table: str) -> str:
    """The agreement with one more table, before the first of the owners."""
    if "[[owners]]" not in text:
        return text + table
    return re.sub(r"(?m)^\[\[owners\]\]", table.lstrip("\n") + "\n[[owners]]", text, count=1)


# --- the page ---


def as_markdown(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    where = "Each is in one process."
    if "bert-base" in results["runs"]:
        layers = results.get("layers", LAYERS)
        shape = "shape" if layers == ALL_LAYERS else f"width and vocabulary, but {layers} of its {ALL_LAYERS} layers"
        where = (
            "`bert-base` is a server and a client for each owner over TLS, where every message starts a process. "
            f"It has that model's {shape}. The others are in one process."
        )
    lines = [
        "# What verification costs",
        "",
        f"Whole masked merges on one thread, in turns without and with verification. {where} Messages are those to one "
        "owner, bytes to and from all; seconds are of the processor, of all parties together, medians. Wall times are "
        "of a machine that others may have used meanwhile. Accuracy and macro F1 are the published model's: where "
        "merges are verified, sums have floors. "
        f"{machine['cores']} cores ({machine['processor']}), Python {machine['python']}, torch {machine['torch']}.",
        "",
        "| merge | owners | messages | more | MB | more | seconds | more | wall, s | more | peak, MB "
        "| accuracy | macro F1 | runs |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for merge, runs in results["runs"].items():
        off, on = ([run for run in runs if run["verified"] == verified] for verified in (False, True))
        before, after = ({key: median(run[key] for run in each) for key in COSTS} for each in (off, on))
        more = {key: after[key] / before[key] - 1 for key in COSTS}
        cells = [
            merge,
            on[0]["owners"],
            f"{before['messages']} -> {after['messages']}",
            after["messages"] - before["messages"],
            f"{before['bytes'] / 1e6:.1f} -> {after['bytes'] / 1e6:.1f}",
            f"{more['bytes']:.1%}",
            f"{before['seconds']:.1f} -> {after['seconds']:.1f}",
            f"{more['seconds']:.0%}",
            f"{before['wall_seconds']:.0f} -> {after['wall_seconds']:.0f}",
            f"{more['wall_seconds']:.0%}",
            f"{before['peak_megabytes']:.0f} -> {after['peak_megabytes']:.0f}",
            *("" if merge in RANDOM else f"{off[0][key]:.4f} -> {on[0][key]:.4f}" for key in METRICS),
            len(on),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if "methods" in results["runs"]:
        lines += _methods_as_markdown(*({each["verified"]: each for each in results["runs"]["methods"]}.values()))
    return "\n".join(lines) + "\n"


def _methods_as_markdown(off: Mapping[str, Any], on: Mapping[str, Any]) -> list[str]:
    """Every method's metrics without and with verification."""
    lines = [
        "",
        f"The five MiniLM models by every method, on the same {MEASURED['methods']} rows of each owner, without and "
        "with verification:",
        "",
        "| method | accuracy | moved | macro F1 | moved |",
        "|---|---:|---:|---:|---:|",
    ]
    for method in METHODS["methods"]:
        cells = [
            f"{before:.4f} -> {after:.4f} | {after - before:+.4f}"
            for before, after in zip(off["by_method"][method], on["by_method"][method], strict=True)
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


METRICS = ("accuracy", "macro_f1")  # the same in every run
RANDOM = ("bert-base",)  # whose weights know nothing
COSTS = ("messages", "bytes", "seconds", "wall_seconds", "peak_megabytes")


if __name__ == "__main__":
    main()
