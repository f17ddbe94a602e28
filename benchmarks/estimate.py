"""How close the estimate of `amalgram check` comes to a whole merge: both side by side, in processor seconds.

python -m benchmarks.estimate [--json] [--merges reviews texts emotion] [--data DATA --models MODELS]

Each merge has its own process, on one thread. It is estimated first, as `amalgram check FOLDER` does, and then run as
`amalgram simulate FOLDER` does, with references. Seconds are of the processor, all parties together, without importing
the libraries. `emotion` needs --data and --models (benchmarks/emotion.py).

    reviews     12 owners, a tiny BERT that each fine-tunes, RegMean with a sweep of five alphas, and three more methods
    texts       three owners, a causal language model of 11 million weights, RegMean with one alpha
    emotion     five MiniLM (22.7 million weights) fine-tuned on five domains, RegMean with one alpha

Writes benchmarks/results/estimate.{json,md}. A run of some merges keeps the others that are published.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.emotion import write_consortium as write_emotion
from benchmarks.machine import quiet_on_one_thread, this_machine
from benchmarks.published import everything, publish, published

MERGES = ("reviews", "texts", "emotion")
OWNERS, TEXT_OWNERS = 12, ("ada", "bea", "cyd")
TEXTS = {"train": 600, "validation": 60, "test": 120}
AGREEMENT = """
title = "Texts"
base = "base"
method = "regmean"
[task]
kind = "causal-lm"
max_tokens = 64
[regmean]
alphas = [0.9]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--merges", nargs="+", choices=MERGES, default=list(MERGES))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if "emotion" in arguments.merges and None in (arguments.data, arguments.models):
        sys.exit("emotion: needs --data and --models")
    merges = dict(published("estimate").get("merges", {}))
    for merge in arguments.merges:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            merges[merge] = process.submit(compare, merge, arguments.data, arguments.models).result()
        print(f"{merge}: {merges[merge]}", file=sys.stderr, flush=True)
    results = {"machine": this_machine(), "merges": {name: merges[name] for name in MERGES if name in merges}}
    publish("estimate", results, as_markdown(results), everything)
    print(json.dumps(results, indent=2) if arguments.json else as_markdown(results))


def compare(merge: str, data: Path | None, models: Path | None) -> dict[str, Any]:
    """What is estimated, by part, and what the run then takes."""
    from deploy.simulation.simulate import simulate

    quiet_on_one_thread()
    with tempfile.TemporaryDirectory(prefix="amalgram-") as name:
        folder = Path(name) / "consortium"
        write(merge, folder, data, models)
        started = time.process_time()
        parts = estimated(folder)
        estimating, started = time.process_time() - started, time.process_time()
        report = simulate(folder)
        seconds = time.process_time() - started
    return {"owners": len(report.owners), "estimating": estimating, "parts": parts, "seconds": seconds}


def estimated(folder: Path) -> dict[str, float]:
    """The seconds that `amalgram check FOLDER` adds up."""
    from deploy.commands import check
    from deploy.consortium import read_consortium

    consortium = read_consortium(folder)
    agreement = check._simulated_agreement(consortium)
    assert agreement is not None  # no base here is large
    schedule = check._schedule(agreement, consortium.base_folder)
    rows = [
        check._owner_rows(
            agreement.task,
            consortium.base_folder,
            check.Seen(consortium.settings[name], consortium.look_at(name), path.parent),
        )
        for name, path in consortium.owner_files.items()
    ]
    return check.estimated_seconds(
        agreement, consortium.base_folder, schedule, rows, consortium.pool, coordinates=True
    )[1]


def write(merge: str, folder: Path, data: Path | None, models: Path | None) -> None:
    """A consortium for `simulate`."""
    if merge == "reviews":
        _write_reviews(folder)
    elif merge == "texts":
        _write_texts(folder)
    else:
        assert data is not None
        assert models is not None
        write_emotion(folder, data, models, methods=("regmean",), alphas=(0.9,))


def _write_reviews(folder: Path) -> None:
    """The example's owners, each several times under other names."""
    from deploy.example import reviews

    reviews.write_consortium(folder)
    path = folder / "agreement.toml"
    head = path.read_text().partition("[[owners]]\n")[0]
    files = sorted(each for each in folder.glob("*.toml") if each != path)
    names = []
    for number in range(OWNERS):
        file = files[number % len(files)]
        names.append(f"{file.stem}{number}")
        text = file.read_text().replace(f'name = "{file.stem}"', f'name = "{names[-1]}"')
        (folder / f"{names[-1]}.toml").write_text(text)
    for file in files:
        file.unlink()
    path.write_text(head + "".join(f'[[owners]]\nname = "{name}"\n' for name in names))


def _write_texts(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.large import OWNER, change_a_little
    from deploy.example import reviews

    reviews.write_consortium(folder / "example")
    tokenizer = reviews.make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    for name in ("base", *TEXT_OWNERS):
        if name != "base":
            change_a_little(model)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [json.loads(line) for line in (folder / "example/data/hotel/train.jsonl").open()]
    for split, count in TEXTS.items():
        with (folder / f"{split}.jsonl").open("w") as file:
            for number in range(count):
                group = (rows[(8 * number + each) % len(rows)]["text"] for each in range(8))
                file.write(json.dumps({"text": " ".join(group)}) + "\n")
    owners = "".join(f'[[owners]]\nname = "{name}"\n' for name in TEXT_OWNERS)
    (folder / "agreement.toml").write_text(AGREEMENT + owners)
    for name in TEXT_OWNERS:
        (folder / f"{name}.toml").write_text(OWNER.format(name=name) + 'validation = "validation.jsonl"\n')


def as_markdown(results: Mapping[str, Any]) -> str:
    return "\n".join(_lines(results)) + "\n"


def _lines(results: Mapping[str, Any]) -> Iterator[str]:
    machine = results["machine"]
    yield "# How close the estimate of `amalgram check` is"
    yield ""
    yield (
        f"Processor seconds of all parties together on one thread, {machine['processor']}, Python {machine['python']}, "
        f"torch {machine['torch']}. The estimate is made first, in the same process."
    )
    yield ""
    yield "| merge | owners | estimated, s | taken, s | estimated / taken | estimating took, s |"
    yield "|---|---:|---:|---:|---:|---:|"
    for name, each in results["merges"].items():
        total = sum(each["parts"].values())
        yield (
            f"| {name} | {each['owners']} | {total:.0f} | {each['seconds']:.0f} | {total / each['seconds']:.2f} | "
            f"{each['estimating']:.0f} |"
        )
    yield ""
    yield "What is estimated, in seconds:"
    yield ""
    names = list(dict.fromkeys(name for each in results["merges"].values() for name in each["parts"]))
    yield "| | " + " | ".join(results["merges"]) + " |"
    yield "|---|" + "---:|" * len(results["merges"])
    for name in names:
        cells = (f"{each['parts'].get(name, 0.0):.1f}" for each in results["merges"].values())
        yield f"| {name} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
