"""What does a merge take from small language models that owners train as a whole: embeddings, norms, blocks?

python -m benchmarks.tiny_language --data DATA [--seeds 0] [--rows 1000] [--texts 200] [--json]

DATA is as in benchmarks/language.py, with the folders of GENERAL beside. For each seed, a Llama of BLOCKS blocks learns
from scratch on general texts, in a vocabulary made from them. Three owners then fine-tune all of it, each on its own
kind of text. Its output layer is tied to its embeddings, so all methods average both as one table; what other merges of
that table would gain is tried here by formulas alone. Writes benchmarks/results/tiny_language.{json,md}.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.emotion import write_first_rows
from benchmarks.formulas import data_free_deltas, inputs_of, shrunk
from benchmarks.language import (
    KINDS,
    NOBODY,
    TASK,
    Clock,
    Delta,
    Mould,
    Owned,
    Sure,
    ahead,
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
    told,
)
from benchmarks.machine import quiet_on_one_thread
from benchmarks.published import publish, say
from client.data.rows import Rows
from client.measurement.fine_tuning import fine_tune
from client.settings import Training
from common.models.loading import load_base

GENERAL = ("emotion/meld", "emotion/xed", "emotion/empathetic", "emotion/crowdflower", "sentiment/sst2", "topics/trec")
GENERAL_ROWS = 1000  # of each
TEXTS_APART = 100  # of each kind, for what is judged dozens of times
WORDS, WIDTH, BLOCKS, HEADS = 2048, 128, 6, 4
FROM_SCRATCH = Training(epochs=2, learning_rate=3e-3, batch_size=32, schedule="linear", warmup=0.05)
FINE_TUNING = Training(epochs=2, learning_rate=1e-3, batch_size=32, schedule="linear")
RIDGES = (1.0, 10.0)  # of data_free, by the formulas alone; the run has 0.1
TABLE = "model.embed_tokens.weight"
TAKEN_APART = ("average", "regmean", "data_free")  # merges
MENDED = ("average", "regmean")  # merges that other tables are tried in
METHODS = (
    "regmean",
    "average",
    "task_arithmetic",
    "regmean_plus_plus",
    "data_free",
    "anchored",
    "isotropic",
    "model_stock",
)
TABLES: dict[str, Any] = {
    "regmean": {"alphas": [0.9], "measured_examples": 300},
    "task_arithmetic": {"scales": [0.5, 1.0]},
}


def make_base(folder: Path, texts: Path, seed: int) -> None:
    """A model of the texts in a JSON Lines file, with its tokenizer."""
    tokenizer = tokenizer_of([json.loads(line)["text"] for line in texts.read_text().splitlines()])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    fine_tune(model, rows_of(texts.parent, model, tokenizer).train(), FROM_SCRATCH, seed, "base")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte pairs of the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|pad|>", "<|end|>"]
    trainer = trainers.BpeTrainer(vocab_size=WORDS, special_tokens=special, initial_alphabet=letters)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], bos_token=special[1], eos_token=special[1]
    )


def parts_of(model: PreTrainedModel) -> dict[str, frozenset[str]]:
    names = [name for name, _ in model.named_parameters()]
    marks = {
        "embeddings and output layer": "embed_tokens",
        "norms": "norm",
        "attention": "self_attn",
        "MLPs": ".mlp.",
    }
    parts = {part: frozenset(name for name in names if mark in name) for part, mark in marks.items()}
    return parts | thirds_of(names, BLOCKS) | {"all": frozenset(names)}


def tables_of(owners: Mapping[str, PreTrainedModel], own: Mapping[str, Delta], train: Mapping[str, Rows]) -> Delta:
    """Changes of the table of embeddings, which is the output layer too, by how the owners' are merged."""
    changes = torch.stack([each[TABLE] for each in own.values()]).double()  # (owners, words, width)
    squares = changes.square().sum(2, keepdim=True)
    grams = torch.stack([shrunk(output_gram(owners[name], train[name]), 0.9) for name in owners])
    ridge = 1e-4 * grams.sum(0).diagonal().mean() * torch.eye(grams.shape[1], dtype=torch.float64)
    products = (changes @ grams).sum(0) + changes.mean(0) @ ridge
    return {
        "the mean": changes.mean(0),
        "1.5 times the mean": 1.5 * changes.mean(0),
        "twice the mean": 2 * changes.mean(0),
        "the sum": changes.sum(0),
        "each word's mean, weighted by the squared size of its changes": (squares * changes).sum(0)
        / squares.sum(0).clamp(min=1e-20),
        "RegMean, on the inputs of the output layer": torch.linalg.solve(grams.sum(0) + ridge, products.T).T,
    }


@torch.inference_mode()
def output_gram(model: PreTrainedModel, rows: Rows) -> torch.Tensor:
    """(width, width) float64 of what enters the output layer."""
    gram = torch.zeros(2 * [model.config.hidden_size], dtype=torch.float64)

    def see(_: str, inputs: torch.Tensor) -> None:
        tokens = inputs.flatten(0, 1).double()
        gram.add_(tokens.T @ tokens)

    with inputs_of({"output layer": model.get_output_embeddings()}, see):
        for text in range(min(len(rows), TEXTS_APART)):  # alone, so that there is no padding
            model(**rows.batch(np.array([text]))[0])
    return gram / min(len(rows), TEXTS_APART)


def mended(
    mould: Mould, tables: Mapping[str, torch.Tensor], merges: Mapping[str, Delta], tests: Mapping[str, Rows]
) -> dict[str, dict[str, list[Sure]]]:
    """By table and merge: what the merge gains on owners' and nobody's texts if it takes this table for the mean."""
    before = {merge: scores_of([mould.at(merges[merge])], tests)[0] for merge in MENDED}
    found: dict[str, dict[str, list[Sure]]] = {}
    for name, table in tables.items():
        after = {merge: scores_of([mould.at(merges[merge] | {TABLE: table})], tests)[0] for merge in MENDED}
        found[name] = {
            merge: [ahead(after[merge], before[merge], kinds) for kinds in (KINDS, NOBODY)] for merge in MENDED
        }
    return found


def run_of(data: Path, room: Path, seed: int, rows: int, texts: int, clock: Clock) -> dict[str, Any]:
    """Results of all models of one seed."""
    few = {"train": rows, "dev": 2, "test": 2}  # what the product judges on: all models are judged again here
    for name, counts in {"data": few | {"test": texts}, "few": few}.items():
        write_first_rows(room / name, data, (KINDS | NOBODY).values(), counts)
    write_first_rows(room / "general", data, GENERAL, {"train": GENERAL_ROWS})
    general = room / "general" / "train.jsonl"
    general.write_text("".join((room / "general" / kind / "train.jsonl").read_text() for kind in GENERAL))
    say(f"seed {seed}: training")
    with clock.of("training"):
        make_base(room / "base", general, seed)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(room / "base")
        base = load_base(room / "base", TASK, seed=0)
        read = {name: rows_of(room / "data" / kind, base, tokenizer) for name, kind in (KINDS | NOBODY).items()}
        folders = {name: room / name for name in KINDS}
        for number, (name, folder) in enumerate(folders.items()):
            model = load_base(room / "base", TASK, seed=0)
            fine_tune(model, read[name].train(), FINE_TUNING, 3 * seed + number, name)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    tests: Mapping[str, Rows] = {name: each.test() for name, each in read.items()}
    train = {name: read[name].train() for name in KINDS}
    some = {name: first(each, TEXTS_APART) for name, each in tests.items()}
    mould = Mould(load_base(room / "base", TASK, seed=0))
    owners = {name: load_base(folder, TASK, seed=0) for name, folder in folders.items()}
    own = {name: mould.delta_of(model) for name, model in owners.items()}
    say(f"seed {seed}: merging")
    with clock.of("merging"):
        merges = merged_by_the_product(room / "consortium", room / "base", folders, room / "few", METHODS, TABLES)
        shares = dict.fromkeys(owners, 1 / len(owners))
        for ridge in RIDGES:
            merges[f"data_free, ridge {ridge:g}"] = data_free_deltas(owners, shares, mould.at({}), ridge)
    apart = {name: merges[name] for name in TAKEN_APART}
    say(f"seed {seed}: judging")
    with clock.of("judging"):
        *scores, ensemble = scores_of(list(owners.values()), tests)
        owned = Owned(dict(zip(owners, scores, strict=True)))
        judged = {"base": scores_of([mould.at({})], tests)[0], "ensemble": ensemble}
        judged |= {name: scores_of([mould.at(delta)], tests)[0] for name, delta in merges.items()}
        return {
            "own": owned.alone(),
            "models": {name: owned.compared(each, judged["average"]) for name, each in judged.items()},
            "kept": {name: kept(delta, own) for name, delta in merges.items()},
            "scaled": scaled(mould, apart, some),
            "swapped": swapped(mould, own, apart, parts_of(base), some),
            "mended": mended(mould, tables_of(owners, own, train), merges, tests),
            **interference(mould, own, {name: first(rows, 30) for name, rows in tests.items()}),
        }


def run(data: Path, seeds: list[int], rows: int, texts: int) -> dict[str, Any]:
    """Publishes what it has after each seed."""
    results: dict[str, Any] = {"rows": rows, "texts": texts, "seeds": {}}
    clock = Clock()
    for seed in seeds:
        with tempfile.TemporaryDirectory() as room:
            results["seeds"][str(seed)] = run_of(data, Path(room), seed, rows, texts, clock)
        results["processor_seconds"] = dict(clock.seconds)
        publish("tiny_language", results, as_markdown(results), size)
    return results


def size(results: Mapping[str, Any]) -> dict[str, float]:
    return {"rows": results["rows"], "texts": results["texts"], "seeds": len(results["seeds"])}


def as_markdown(results: dict[str, Any]) -> str:
    seconds, seeds = results["processor_seconds"], " ".join(results["seeds"])
    lines = [
        "# Three small language models merged, each fine-tuned as a whole on its own kind of text",
        "",
        f"A Llama of {BLOCKS} blocks, {WIDTH} wide, {WORDS} words, tied output layer, made from scratch on "
        f"{GENERAL_ROWS} texts each of {', '.join(kind.split('/')[1] for kind in GENERAL)}; then {results['rows']} "
        f"texts an owner ({', '.join(KINDS)}). Log-likelihood per token (nats, higher is better) of {results['texts']} "
        f"test texts of each kind, at most {TASK.max_tokens} tokens of each; nobody's texts are {', '.join(NOBODY)}. "
        "Columns are explained in [generative.md](generative.md). Another seed means another base and other owners, on "
        "the same texts.",
        "",
        "Made by",
        "",
        f"    python -m benchmarks.tiny_language --data DATA --seeds {seeds}",
        "",
        f"in {sum(seconds.values()) / 60:.0f} processor minutes on one thread.",
    ]
    for seed, found in results["seeds"].items():
        lines += ["", f"## Seed {seed}", "", *comparison_table(found), "", *mixing(found), *_apart(found)]
    return "\n".join(lines) + "\n"


def _apart(found: Mapping[str, Any]) -> list[str]:
    parts = found["swapped"]
    costliest = min((part for part in parts if part != "all"), key=lambda part: float(parts[part]["average"][0]))
    return [
        "",
        f"The merged change times a scale, owners' / nobody's texts, {TEXTS_APART} of each kind:",
        "",
        *scale_table(found["scaled"]),
        "",
        "Each owner's own model on its own kind of text, with one part taken from the merge; the gain in the mean over "
        f"owners, {TEXTS_APART} texts each. Averaged, the {costliest} cost most.",
        "",
        *part_table(parts),
        "",
        "Other merges of the table of embeddings, within a merge whose other parameters stay; the gain over its mean, "
        "owners' / nobody's texts:",
        "",
        f"| table | {' | '.join(MENDED)} |",
        "|" + "---|" * (len(MENDED) + 1),
        *(
            f"| {name} | {' | '.join(' / '.join(told(*each) for each in by_merge[merge]) for merge in MENDED)} |"
            for name, by_merge in found["mended"].items()
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", type=int, default=1000, help="training texts of each owner")
    parser.add_argument("--texts", type=int, default=200, help="test texts of each kind")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    quiet_on_one_thread()
    results = run(arguments.data, arguments.seeds, arguments.rows, arguments.texts)
    print(json.dumps(results, indent=1) if arguments.json else as_markdown(results))


if __name__ == "__main__":
    main()
