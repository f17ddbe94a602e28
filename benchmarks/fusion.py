"""Can owners whose models share nothing but labels teach one model together, and is it any good?

python -m benchmarks.fusion --data DATA --models MODELS [--seeds 0,1,2] [--starts base,data_free] [--json]

DATA and MODELS are as in benchmarks/emotion.py. Three owners bring the MiniLM models of their emotion domains, and give
weights and predictions. Two train a small BERT of their own from nothing, with a vocabulary of their own words, and
give predictions alone. The pool is unlabelled texts of five domains that no owner has. Everything runs through the
product, masked. All models are judged on all five owners' test rows, each owner's own model too. Adds what it measured
to benchmarks/results/fusion.{json,md} after each run.

A seed decides the small models, the order of the pool and the draw of rows. References come with the start from the
base.
"""

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import tomli_w
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from benchmarks.emotion import OUT_OF_DOMAIN, parser_of
from benchmarks.machine import quiet_on_one_thread, this_machine
from benchmarks.published import everything, publish, published
from common.agreement import Task
from common.metrics import Score
from common.models.folders import base_labels
from common.pool import in_one_form
from deploy.simulation import references
from deploy.simulation.simulate import simulate

WITH_WEIGHTS, WITHOUT = ("isear", "crowdflower", "emoevent"), ("dailydialog", "goemotions")
OWNERS = (*WITH_WEIGHTS, *WITHOUT)
STARTS = {"base": "the base", "average": "the average", "data_free": "data-free"}
COMPARED = ("average", "data_free")  # over those who give weights; no seed changes them
EPOCHS, RATES = (
    [1, 3],
    {"base": 5e-4, "average": 1e-4, "data_free": 1e-4},
)  # what a new head needs is too fast for a merge
POOL_ROWS_PER_DOMAIN, TRAIN_ROWS, VALIDATION_ROWS, TEST_ROWS = 200, 4000, 100, 200
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
    folder: Path, data: Path, models_folder: Path, start: str, compared: Sequence[str], seed: int
) -> None:
    base = (models_folder / "base").resolve()
    labels = base_labels(base)
    agreement = {
        "title": "Five emotion domains, two architectures",
        "base": str(base),
        "method": "distill",
        "compare_with": list(compared),
        "seed": seed,
        "owners": [{"name": name} for name in WITH_WEIGHTS]
        + [{"name": name, "gives": "predictions"} for name in WITHOUT],
        "task": {"kind": "text-classification", "labels": list(labels), "max_tokens": MAX_TOKENS},
        "distill": {"pool": "pool.jsonl", "start": start, "epochs": EPOCHS, "learning_rate": RATES[start]},
        "summation": {"colluders": 0},
        "evaluation": {"choose_by": "macro_f1"},
        "verification": {"required": False},
        "reading": {"max_unknown": 0.2, "max_equal": 0.3},
    }
    (folder / "agreement.toml").write_text(tomli_w.dumps(agreement))
    write_pool(folder / "pool.jsonl", data)
    for name in OWNERS:
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


@contextmanager
def own_models_kept() -> Iterator[list[list[Score]]]:
    """Of each owner's test rows, in the order of the owners, how each owner's own model does on them."""
    kept: list[list[Score]] = []
    mean = references._mean

    def keep(scores: Sequence[Score], task: Task) -> Score:
        kept.append(list(scores))
        return mean(scores, task)

    with patch.object(references, "_mean", keep):
        yield kept


def run(data: Path, models_folder: Path, start: str, seed: int, compared: Sequence[str]) -> dict[str, Any]:
    began = time.process_time()
    with tempfile.TemporaryDirectory() as room, own_models_kept() as own:
        folder = Path(room) / "consortium"
        folder.mkdir()
        write_consortium(folder, data, models_folder, start, compared, seed)
        report = simulate(folder, Path(room) / "output", with_references=start == "base")
    found: dict[str, Any] = {
        "chosen": report.chosen["distill"].hyperparameter,
        "mean": {model: [each.accuracy, each.metric] for model, each in report.evaluation.mean.items()},
        "by_owner": {
            owner: {model: [each.accuracy, each.metric] for model, each in by_model.items()}
            for owner, by_model in report.evaluation.by_owner.items()
        },
        "processor_seconds": round(time.process_time() - began),
    }
    if own:
        found["own_models"] = {
            owner: [float(np.mean([getattr(rows[number], key) for rows in own])) for key in ("main", "metric")]
            for number, owner in enumerate(OWNERS)
        }
    return found


# --- the page ---


def over_seeds(runs: Mapping[str, Any], key: str, of: Callable[[Any], list[float] | None]) -> str:
    """Accuracy and macro F1 in the mean over seeds, and in the worst and the best of several."""
    found = [of(each) for name, each in runs.items() if name.startswith(key)]
    values = np.array([each for each in found if each is not None])
    if not len(values):
        return "not run | not run | 0"
    cells = [
        f"{column.mean():.3f}" + (f" ({column.min():.3f} to {column.max():.3f})" if len(column) > 1 else "")
        for column in values.T
    ]
    return " | ".join([*cells, str(len(values))])


def as_markdown(results: dict[str, Any]) -> str:
    runs = results["runs"]
    lines = [
        "# Five owners, two architectures",
        "",
        f"Accuracy and macro F1 on {TEST_ROWS} test rows of each of five owners, in the mean over the owners.",
        f"{', '.join(WITH_WEIGHTS)} bring MiniLM models; {' and '.join(WITHOUT)} trained a small BERT from nothing, on",
        f"a vocabulary of their own. The pool is up to {POOL_ROWS_PER_DOMAIN} unlabelled texts of each of",
        f"{', '.join(OUT_OF_DOMAIN)}. Students see it up to {EPOCHS[-1]} times, with learning",
        f"rates {', '.join(f'{rate:g} from {STARTS[start]}' for start, rate in RATES.items())}.",
        "Where there are several seeds: the mean, and in brackets the lowest and the highest. `*` needs all models in",
        "one place. Made by",
        "",
        "    python -m benchmarks.fusion --data DATA --models MODELS",
        "",
        "| model | accuracy | macro F1 | seeds |",
        "|---|---|---|---|",
    ]
    for start, name in STARTS.items():
        title = f"**student, from {name}**"
        lines.append(f"| {title} | {over_seeds(runs, f'{start}, ', lambda each: each['mean']['distill'])} |")
    for owner in OWNERS:
        cells = over_seeds(runs, "", lambda each: each.get("own_models", {}).get(owner))  # noqa: B023
        lines.append(f"| {owner}'s own model * | {cells} |")
    for model, title in {
        "own": "an own model, in the mean *",
        "ensemble": "ensemble *",
        "close_ensemble": "ensemble, each weighted by closeness (SMC) *",
        "average": "average of the three MiniLM models",
        "data_free": "data-free merge of the three",
        "base": "base",
    }.items():
        key = "base, " if model == "base" else ""
        lines.append(f"| {title} | {over_seeds(runs, key, lambda each: each['mean'].get(model))} |")  # noqa: B023
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--starts", default="base,data_free,average")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    quiet_on_one_thread()
    starts = arguments.starts.split(",")
    for seed in map(int, arguments.seeds.split(",")):
        for start in starts:
            compared = COMPARED if (start, seed) == ("base", 0) else ()
            found = run(arguments.data, arguments.models, start, seed, compared)
            results = published("fusion")  # another process may have added to it
            if results.get("rates") != RATES:
                results = {"machine": this_machine(), "rates": RATES, "runs": {}}
            results["runs"][f"{start}, seed {seed}"] = found
            publish("fusion", results, as_markdown(results), everything)
    print(json.dumps(results, indent=1) if arguments.json else as_markdown(results))


if __name__ == "__main__":
    main()
