"""A small consortium of three owners with text, to copy from. Its data is made up, so it runs anywhere.

A hotel, a cinema and a phone shop each classify their own reviews as positive or negative. Each uses its own words and
its own file format. The base model, a tiny BERT, knows only a few words that all three share.
"""

import json
import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from client.data.rows import Rows
from client.measurement.fine_tuning import fine_tune
from client.settings import Training
from common.errors import SettingsError

SEED = 0
LABELS = ("negative", "positive")
ROWS = {"train": 200, "validation": 60, "test": 120}
OPENINGS = ("the", "this", "our", "honestly the", "i think the", "we found the")
Vocabulary = tuple[tuple[str, ...], Mapping[str, tuple[str, ...]]]  # things, words per label
SHARED: Vocabulary = (("film", "room", "phone", "place"), {"negative": ("bad", "poor"), "positive": ("good", "nice")})
OWNERS = {  # name: (file format, things it talks about, words per label)
    "hotel": (
        "jsonl",
        ("room", "bed", "breakfast", "staff", "view", "lobby"),
        {"negative": ("dirty", "noisy", "rude", "cold"), "positive": ("clean", "quiet", "friendly", "cosy")},
    ),
    "cinema": (
        "csv",
        ("film", "plot", "actor", "ending", "score", "scene"),
        {
            "negative": ("dull", "predictable", "wooden", "endless"),
            "positive": ("gripping", "moving", "witty", "fresh"),
        },
    ),
    "phones": (
        "parquet",
        ("phone", "battery", "screen", "camera", "case", "speaker"),
        {"negative": ("slow", "dim", "fragile", "blurry"), "positive": ("fast", "bright", "sturdy", "sharp")},
    ),
}

AGREEMENT = """\
# What all parties agree on. Everybody holds an identical copy of this file.
title = "Reviews of three shops"

# The model that everybody fine-tuned: a Hugging Face folder (relative to this file) or a hub name.
base = "base"
# base_revision = "..."       # the commit of a hub name; if left out, the newest one when the draft is completed

# The published model is merged with `method`. The others are only evaluated, for comparison.
# Single-round methods: average, task_arithmetic, fisher, regmean, data_free, anchored, isotropic, model_stock, lorm,
# and logit_adjusted, which reveals roughly how frequent each label is. docs/which-method.md helps to choose.
# Multi-round methods, for which every owner must stay to the end: regmean_plus_plus, and refit, which fits the
# classifier again and reveals how many rows have each label.
# search tries mixtures of the methods that [search] names (from compare_with) on the owners' validation rows.
# distill is for owners whose models differ: they predict a public pool of rows (docs/distillation.md).
method = "data_free"
compare_with = ["average", "task_arithmetic", "regmean"]

# "rows": owners are weighted by their number of training examples. "owners": all owners have the same weight.
weighting = "rows"

# dtype = "bfloat16"          # models run on the owners' rows in bfloat16: faster on a GPU, and coarser

# The run stops if fewer owners than this remain. If left out, all must stay. A masked sum needs at least 3.
# min_owners = 3

[task]
kind = "text-classification"  # or token-, image-classification, causal-lm, sequence-to-sequence
max_tokens = 32               # longer texts are cut
# problem_type = "multi_label_classification"   # several labels a row; or "regression": numbers
# labels = ["negative", "positive"]   # if left out, those that the base names, or else the owners' models
# label_set = "all"           # or "own", the default: test an owner's rows among the labels that occur in its files

[regmean]
# How much of a Gram matrix's off-diagonal counts. Several values are tried on the owners' validation rows.
alphas = [0.1, 0.5, 0.9, 0.95, 0.99]
measured_examples = 1000      # an owner measures at most this many of its training rows

[task_arithmetic]
scales = [0.3, 0.5, 1.0]

[summation]
kind = "masked"               # the coordinator learns totals only; with "plain" it sees every owner's vector
# ring_bits = 32              # half the bytes, but one more round shows all owners the scales (SECURITY.md, b6)
# colluders = 0               # how many owners may collude with the coordinator; if left out, as min_owners allows

[privacy]
min_rows_per_dimension = 1.0  # an owner with fewer token rows per dimension of a Gram matrix does not take part
# epsilon = 8.0               # noise in training (DP-SGD), metrics, a refit and Grams; needs label_set = "all"
# legs = { metrics = 0.1, refit = 0.4, grams = 0.3 }   # each sum's share of the budget; training has the rest

# [bounds]
# change = 0.5                # no tensor may change by more than this share of the base's; more is scaled down

[reading]                     # an owner does not take part if reading leaves more than these shares of a file's rows
max_empty = 0.05              # empty, or with far too few tokens for their words
max_equal = 0.1               # with the same tokens as a row with another text
max_unknown = 0.05            # with mostly unknown tokens, or one repeated token

[evaluation]
choose_by = "accuracy"        # or "macro_f1"; for a regression, "mean_squared_error" or "pearson_r"
# groups = ["north", "south"] # report each group of rows (owners: data.group); allows choose_by = "worst_group"
# sign_above = 0.7            # no owner signs a model that is worse than this, or than the base, on its test rows

# [verification]
# required = false            # measure on models that nobody has verified

# [merge]
# layers = ["*.query", "*.value"]   # merge only these; or ["adapter"]: what the owners' LoRA adapters change

# [publish]
# adapter_rank = 8            # publish a LoRA adapter of the base, cut to this rank, instead of a whole model

# metrics = "summed" hides an owner's own test metrics in the report (with three owners: all or none).
[[owners]]
name = "hotel"

[[owners]]
name = "cinema"

[[owners]]
name = "phones"
"""

OWNER = """\
# One owner's settings. Nothing in this file leaves its machine. Paths are relative to this file.
name = "{name}"
# device = "auto"                               # run models on a GPU if there is one; if left out, on the CPU

# An owner that has a fine-tuned model gives its folder or hub name (a LoRA adapter will do) and drops [training]:
# fine_tuned = "models/{name}"
# An owner without a model makes one here, from the base and its training rows:
[training]
epochs = 6
learning_rate = 1e-3
batch_size = 32

[data]
train = "data/{name}/train.{suffix}"            # measured, and trained on; .jsonl, .csv, .parquet, ...
validation = "data/{name}/validation.{suffix}"  # decides a sweep; if left out, a tenth of the training rows does
test = "data/{name}/test.{suffix}"              # gives the metrics
text = "text"                                   # column names
label = "label"                                 # a label's name, or its number
# text_pair = "answer"                          # the second text, if the model takes pairs
# max_train_rows = 5000                         # draw at most this many of the file's rows; also max_test_rows
"""


def write_consortium(folder: Path) -> None:
    """Write the example. Raises SettingsError if the folder already holds anything."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingsError(f"{folder}: already exists and is not empty", hint="name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "agreement.toml").write_text(AGREEMENT)
    random_source = random.Random(SEED)
    for name, (suffix, things, words) in OWNERS.items():
        (folder / f"{name}.toml").write_text(OWNER.format(name=name, suffix=suffix))
        (folder / "data" / name).mkdir(parents=True)
        for split, count in ROWS.items():
            rows = [_review(random_source, things, words) for _ in range(count)]
            _write_rows(folder / "data" / name / f"{split}.{suffix}", rows)
    _write_base(folder / "base", random_source)


def _review(
    random_source: random.Random, things: tuple[str, ...], words: Mapping[str, tuple[str, ...]]
) -> dict[str, str]:
    label = random_source.choice(LABELS)
    opening, thing, word = (random_source.choice(choices) for choices in (OPENINGS, things, words[label]))
    return {"text": f"{opening} {thing} was {word}", "label": label}


def _write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        pyarrow.csv.write_csv(pa.Table.from_pylist(rows), path)
    else:
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)


def _write_base(folder: Path, random_source: random.Random) -> None:
    tokenizer = make_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = BertForSequenceClassification(config)
    reviews = [_review(random_source, *SHARED) for _ in range(200)]
    rows = Rows(
        features=tuple(dict(tokenizer(review["text"])) for review in reviews),
        targets=np.array([LABELS.index(review["label"]) for review in reviews]),
        tokenizer=tokenizer,
    )
    fine_tune(model, rows, Training(epochs=5, learning_rate=1e-3), SEED, "base model: training")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words: exactly those that can occur in the example's reviews."""
    groups: list[Vocabulary] = [SHARED, *((things, by_label) for _, things, by_label in OWNERS.values())]
    words = {word for opening in OPENINGS for word in opening.split()} | {"was"}
    for things, by_label in groups:
        words |= {word for choices in (things, *by_label.values()) for word in choices}
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: index for index, word in enumerate([*special, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    )
