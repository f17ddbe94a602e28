"""Can owners whose models share nothing but labels teach one model together, and is it any good?

python -m benchmarks.fusion --data DATA --models MODELS [--seed SEED] [--json]

DATA and MODELS are as in benchmarks/emotion.py. Three owners bring the MiniLM models of their emotion domains, and give
weights and predictions. Two train a small BERT of their own from nothing, with a vocabulary of their own words, and
give predictions alone. The pool is unlabelled texts of five domains that no owner has. Everything runs through the
product, masked. All models are judged on all five owners' test rows. Writes benchmarks/results/fusion.{json,md}.
"""

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import tomli_w
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from benchmarks.emotion import OUT_OF_DOMAIN
from benchmarks.machine import quiet_on_one_thread, this_machine
from benchmarks.published import everything, publish, published
from common.models.folders import base_labels
from common.pool import in_one_form
from deploy.simulation.simulate import simulate

WITH_WEIGHTS, WITHOUT = ("isear", "crowdflower", "emoevent"), ("dailydialog", "goemotions")
RUNS = {  # name: what the agreement says of the student, and what it is compared with
    "from the base": ({"start": "base"}, ["average", "data_free"]),
    "from data-free": ({"start": "data_free"}, []),
    "from the base, by density": ({"start": "base", "weights": "density"}, []),
}
POOL_ROWS_PER_DOMAIN, TRAIN_ROWS, VALIDATION_ROWS, TEST_ROWS = 400, 4000, 100, 200
WORDS, MAX_TOKENS = 8000, 64
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def texts_of(data: Path, domain: str, split: str, most: int) -> list[str]:
    lines = (data / domain / f"{split}.jsonl").read_text().splitlines()[:most]
    return [json.loads(line)["text"] for line in lines]


def write_pool(path: Path, data: Path) -> int:
    """Texts of the domains that no owner has, each once; how many."""
    rows: dict[str, str] = {}
    for domain in OUT_OF_DOMAIN:
        for text in texts_of(data, domain, "train", POOL_ROWS_PER_DOMAIN):
            if text.strip():
                rows.setdefault(in_one_form([text]), text)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows.values()))
    return len(rows)


def write_other_base(folder: Path, texts: list[str], labels: tuple[str, ...], seed: int) -> None:
    """A BERT of two small blocks with random weights, and a tokenizer of the most frequent words of `texts`."""
    normalizer, splitter = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    counts = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    words = [*SPECIAL, *(word for word, _ in counts.most_common(WORDS) if word not in SPECIAL)]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=MAX_TOKENS,
    )
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=MAX_TOKENS,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    torch.manual_seed(seed)
    BertForSequenceClassification(config).save_pretrained(folder)
    fast.save_pretrained(folder)


def write_consortium(
    folder: Path, data: Path, models_folder: Path, student: dict[str, str], compared: list[str], seed: int
) -> None:
    base = (models_folder / "base").resolve()
    labels = base_labels(base)
    agreement = {
        "title": "Five emotion domains, two architectures",
        "base": str(base),
        "method": "distill",
        "compare_with": compared,
        "seed": seed,
        "owners": [{"name": name} for name in WITH_WEIGHTS]
        + [{"name": name, "gives": "predictions"} for name in WITHOUT],
        "task": {"kind": "text-classification", "labels": list(labels), "max_tokens": MAX_TOKENS},
        "distill": {"pool": "pool.jsonl", "epochs": [1, 3], **student},
        "summation": {"colluders": 0},
        "evaluation": {"choose_by": "macro_f1"},
        "verification": {"required": False},
        "reading": {"max_unknown": 0.2, "max_equal": 0.3},
    }
    (folder / "agreement.toml").write_text(tomli_w.dumps(agreement))
    write_pool(folder / "pool.jsonl", data)
    for name in (*WITH_WEIGHTS, *WITHOUT):
        rows = (data / name).resolve()
        files = {split: str(rows / f"{file}.jsonl") for split, file in (("train", "train"), ("validation", "dev"))}
        settings: dict[str, Any] = {"name": name}
        if name in WITHOUT:
            write_other_base(folder / f"{name}-base", texts_of(data, name, "train", TRAIN_ROWS), labels, seed)
            training = {"epochs": 4, "learning_rate": 1e-3, "batch_size": 32, "schedule": "linear"}
            settings |= {"own_base": f"{name}-base", "training": training}
        else:
            settings["fine_tuned"] = str((models_folder / name).resolve())
        settings["data"] = files | {
            "test": str(rows / "test.jsonl"),
            "max_train_rows": TRAIN_ROWS,
            "max_validation_rows": VALIDATION_ROWS,
            "max_test_rows": TEST_ROWS,
        }
        (folder / f"{name}.toml").write_text(tomli_w.dumps(settings))


def run(data: Path, models_folder: Path, name: str, seed: int) -> dict[str, Any]:
    student, compared = RUNS[name]
    with tempfile.TemporaryDirectory() as room:
        folder = Path(room) / "consortium"
        folder.mkdir()
        write_consortium(folder, data, models_folder, student, compared, seed)
        report = simulate(folder, Path(room) / "output", with_references=bool(compared))
    return {
        "mean": {model: scores.model_dump() for model, scores in report.evaluation.mean.items()},
        "by_owner": {
            owner: {model: scores.metric for model, scores in found.items()}
            for owner, found in report.evaluation.by_owner.items()
        },
        "chosen": {method: choice.hyperparameter for method, choice in report.chosen.items()},
        "seconds": report.seconds,
    }


def as_markdown(results: dict[str, Any]) -> str:
    owners = (*WITH_WEIGHTS, *WITHOUT)
    lines = [
        "# Five owners, two architectures",
        "",
        f"Macro F1 on {TEST_ROWS} test rows of each owner. {', '.join(WITH_WEIGHTS)} bring MiniLM models;",
        f"{' and '.join(WITHOUT)} trained a small BERT from nothing, on a vocabulary of their own. The pool is up to",
        f"{POOL_ROWS_PER_DOMAIN} unlabelled texts of each of {', '.join(OUT_OF_DOMAIN)}. `*` needs all models in one",
        "place. Made by",
        "",
        "    python -m benchmarks.fusion --data DATA --models MODELS",
        "",
        "| model | seed | accuracy | macro F1 | " + " | ".join(owners) + " |",
        "|---" * (4 + len(owners)) + "|",
    ]
    for key, result in results["runs"].items():
        name, seed = key.rsplit(", seed ", 1)
        for model, scores in result["mean"].items():
            if name != next(iter(RUNS)) and model != "distill":
                continue
            title = f"student {name}" if model == "distill" else model.replace("_", " ")
            title += " *" if "ensemble" in model else ""
            by_owner = " | ".join(f"{result['by_owner'][owner][model]:.3f}" for owner in owners)
            lines.append(f"| {title} | {seed} | {scores['accuracy']:.3f} | {scores['metric']:.3f} | {by_owner} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    quiet_on_one_thread()
    results = published("fusion") or {"machine": this_machine(), "runs": {}}
    for name in RUNS:
        results["runs"][f"{name}, seed {arguments.seed}"] = run(arguments.data, arguments.models, name, arguments.seed)
        publish("fusion", results, as_markdown(results), everything)
    print(json.dumps(results, indent=1) if arguments.json else as_markdown(results))


if __name__ == "__main__":
    main()
