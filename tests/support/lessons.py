"""Small consortia that agreed to distil, one for each kind of task: models made from nothing, and a few rows."""

import io
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch
from PIL import Image
from tokenizers import models, normalizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

from client.data.readers import features
from client.data.rows import IGNORED, Rows
from client.measurement import fine_tuning
from client.settings import Training
from deploy.example.reviews import make_tokenizer
from tests.support.tokenizers import framing

THINGS = {"ada": ("room", "bed", "staff"), "bea": ("film", "plot", "actor"), "cyd": ("phone", "screen", "case")}
WORDS = {"negative": ("dull", "slow", "rude"), "positive": ("clean", "witty", "fast")}
TAGS = ("O", "B-THING", "I-THING")
ROWS = {"train": 60, "validation": 10, "test": 20}
POOL_ROWS = 60
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
WIDE: dict[str, Any] = {**SIZES, "initializer_range": 0.2}  # from smaller numbers, they learn nothing in a few steps
FEWER: dict[str, Any] = {"id2label": {0: "B-THING", 1: "O"}, "label2id": {"B-THING": 0, "O": 1}}
Row = dict[str, Any]
AGREEMENT = """\
title = "A test"
base = "base"
method = "distill"
compare_with = [{compared}]
[task]
max_tokens = 32
{task}
[distill]
pool = "{pool}"
start = "{start}"
epochs = {taught}
learning_rate = {rate}
{table}
[privacy]
min_rows_per_dimension = 0.1
[bounds]
headroom = 1e7
[summation]
colluders = 0
[verification]
required = false
"""
OWNER = """\
name = "{name}"
{more}
[training]
epochs = {epochs}
learning_rate = 1e-2
batch_size = 16
[data]
train = "{name}-train.{suffix}"
validation = "{name}-validation.{suffix}"
test = "{name}-test.{suffix}"
"""


def write_consortium(
    folder: Path,
    task: str,
    pool: str,
    owners: Mapping[str, str],
    *,
    table: str = "",
    start: str = "base",
    rate: float = 1e-2,
    compared: str = "",
    more: Mapping[str, str] = {},
    epochs: int = 8,
    taught: Sequence[int] = (15,),
) -> None:
    """The settings. `owners`: what a roster's entry says beside the name; `more`: the same of an owner's settings."""
    folder.mkdir(exist_ok=True)
    text = AGREEMENT.format(
        task=task, pool=pool, start=start, rate=rate, table=table, compared=compared, taught=list(taught)
    )
    entries = [f'[[owners]]\nname = "{name}"\n{entry}\n' for name, entry in owners.items()]
    (folder / "agreement.toml").write_text(text + "".join(entries))
    suffix = "parquet" if "image" in task else "jsonl"
    for name in owners:
        (folder / f"{name}.toml").write_text(
            OWNER.format(name=name, suffix=suffix, more=more.get(name, ""), epochs=epochs)
        )


def save(folder: Path, model: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerFast | None = None) -> None:
    """A model of random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model().save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def write_lines(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tokenizer_of_letters() -> PreTrainedTokenizerFast:
    """A tokenizer that reads every letter as a token: other units than those of `make_tokenizer`."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    special = ("<pad>", "<unk>", "<s>", "</s>")
    vocabulary = {token: index for index, token in enumerate([*special, *letters])}
    vocabulary |= {f"##{letter}": len(vocabulary) + index for index, letter in enumerate(letters)}
    model = models.WordPiece(vocabulary, unk_token="<unk>")
    return framing(model, normalizers.BertNormalizer(lowercase=True), special, max_tokens=32)


# --- what rows say ---


def said(chance: random.Random, owner: str) -> tuple[str, str, str]:
    """A thing of the owner's, a label, and a word of that label."""
    label = chance.choice(sorted(WORDS))
    return chance.choice(THINGS[owner]), label, chance.choice(WORDS[label])


def tagged(chance: random.Random, owner: str) -> Row:
    thing, _, word = said(chance, owner)
    before = chance.sample(["the", "this", "our"], chance.randrange(1, 3))
    return {"tokens": [*before, thing, "was", word], "tags": [*["O"] * len(before), "B-THING", "O", "O"]}


def plain(chance: random.Random, owner: str) -> Row:
    """Every owner says of its things what nobody else says of its own."""
    thing = chance.choice(THINGS[owner])
    return {"text": f"the {thing} was {WORDS['positive'][sorted(THINGS).index(owner)]}"}


def graded(chance: random.Random, owner: str) -> Row:
    """A thing, with numbers and labels that depend on it."""
    thing, _, word = said(chance, owner)
    place = THINGS[owner].index(thing)
    return {"text": f"the {thing} was {word}", "score": float(place), "label": ["a", "b", "c"][: place + 1]}


# --- consortia ---


def of_words(folder: Path) -> Path:
    """Words of three owners that share the base, and of a fourth, whose model reads letters and lacks a label."""
    more = {"dan": 'own_base = "letters"\nfine_tuned = "dan"'}
    owners = {**dict.fromkeys(THINGS, ""), "dan": 'gives = "predictions"\nlabels = ["O", "B-THING"]'}
    task = f'kind = "token-classification"\nlabels = {json.dumps(TAGS)}'
    write_consortium(folder, task, "pool.parquet", owners, start="average", more=more, taught=(2, 8))
    settings = folder / "dan.toml"
    settings.write_text(re.sub(r"\[training\]\n(.+\n){3}", "", settings.read_text()))
    words, letters = make_tokenizer(), tokenizer_of_letters()
    save(
        folder / "base",
        lambda: BertForTokenClassification(BertConfig(vocab_size=len(words), num_labels=3, **SIZES)),
        words,
    )
    save(
        folder / "letters",
        lambda: BertForTokenClassification(BertConfig(vocab_size=len(letters), **FEWER, **SIZES)),
        letters,
    )
    chance = random.Random(1)
    for name in owners:
        of = "bea" if name == "dan" else name
        for split, count in ROWS.items():
            write_lines(folder / f"{name}-{split}.jsonl", [tagged(chance, of) for _ in range(count)])
    train_with_letters(folder, letters)
    rows = {tuple(tagged(chance, chance.choice(sorted(THINGS)))["tokens"]): None for _ in range(3 * POOL_ROWS)}
    pool = [{"tokens": list(row)} for row in list(rows)[:POOL_ROWS]]
    pool.append({"tokens": ["the", "room", "was", "clean"] * 9})  # longer than any of the models reads
    pyarrow.parquet.write_table(pa.Table.from_pylist(pool), folder / "pool.parquet")
    return folder


def train_with_letters(folder: Path, letters: PreTrainedTokenizerFast) -> None:
    """Dan's own model, of its training rows, whose labels are in another order."""
    model = BertForTokenClassification.from_pretrained(folder / "letters")
    rows = [json.loads(line) for line in (folder / "dan-train.jsonl").read_text().splitlines()]
    encoded = letters([row["tokens"] for row in rows], is_split_into_words=True)
    targets = []
    for index, row in enumerate(rows):
        words = encoded.word_ids(index)
        numbers = [FEWER["label2id"][tag] for tag in row["tags"]]
        firsts = zip([None, *words], words, strict=False)
        targets.append(
            np.array([IGNORED if word is None or word == last else numbers[word] for last, word in firsts], np.int64)
        )
    taught = Rows(features=features(encoded), targets=tuple(targets), tokenizer=letters)
    fine_tuning.fine_tune(model, taught, Training(epochs=8, learning_rate=1e-2, batch_size=16), 0, "dan: training")
    model.save_pretrained(folder / "dan")
    letters.save_pretrained(folder / "dan")


def of_next_tokens(folder: Path) -> Path:
    write_consortium(folder, 'kind = "causal-lm"', "pool.csv", dict.fromkeys(THINGS, ""), table="most_likely = 5")
    words = make_tokenizer()
    sizes = {**WIDE, "num_key_value_heads": 1, "vocab_size": len(words) + 3}  # padded, as many models are
    save(folder / "base", lambda: LlamaForCausalLM(LlamaConfig(**sizes)), words)
    chance = random.Random(1)
    for name in THINGS:
        for split, count in ROWS.items():
            write_lines(folder / f"{name}-{split}.jsonl", [plain(chance, name) for _ in range(count)])
    texts = [f"the {thing} was {word}" for each in THINGS.values() for thing in each for word in WORDS["positive"]]
    pyarrow.csv.write_csv(pa.table({"text": texts}), folder / "pool.csv")
    return folder


def of_texts(folder: Path, task: str, labels: str, table: str = "") -> Path:
    """Texts with several labels, or with numbers; `labels`: the column."""
    write_consortium(folder, task, "pool.json", dict.fromkeys(THINGS, ""), table=table, taught=(40,))
    for name in THINGS:
        path = folder / f"{name}.toml"
        path.write_text(f'{path.read_text()}label = "{labels}"\n')
    words = make_tokenizer()
    count = 3 if labels == "label" else 1
    save(
        folder / "base",
        lambda: BertForSequenceClassification(BertConfig(vocab_size=len(words), num_labels=count, **WIDE)),
        words,
    )
    chance = random.Random(1)
    for name in THINGS:
        for split, number in ROWS.items():
            write_lines(folder / f"{name}-{split}.jsonl", [graded(chance, name) for _ in range(number)])
    said_once = {graded(chance, chance.choice(sorted(THINGS)))["text"]: None for _ in range(4 * POOL_ROWS)}
    (folder / "pool.json").write_text(json.dumps([{"text": text} for text in said_once]))
    return folder


def picture(chance: np.random.Generator, owner: str, label: str) -> Image.Image:
    """Noise, of which the left or the right half is brighter, in the owner's colour alone."""
    pixels = chance.integers(0, 120, (8, 8, 3))
    half = slice(0, 4) if label == "left" else slice(4, 8)
    pixels[:, half, sorted(THINGS).index(owner)] += 110
    return Image.fromarray(pixels.astype(np.uint8))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_images(path: Path, rows: list[tuple[Image.Image, str]]) -> None:
    """As `datasets` saves images: their bytes within the table."""
    table = [{"image": {"bytes": png(image), "path": f"{label}.png"}, "label": label} for image, label in rows]
    pyarrow.parquet.write_table(pa.Table.from_pylist(table), path)


def of_images(folder: Path) -> Path:
    """Three owners, of whom one has a model for larger images, with a base of its own."""
    owners = {**dict.fromkeys(THINGS, ""), "cyd": 'gives = "predictions"'}
    task = 'kind = "image-classification"\nlabels = ["left", "right"]'
    write_consortium(
        folder,
        task,
        "pool.parquet",
        owners,
        table='weights = "density"',
        rate=3e-3,
        more={"cyd": 'own_base = "larger"'},
        epochs=20,
        taught=(40,),
    )
    labels = {"id2label": {0: "left", 1: "right"}, "label2id": {"left": 0, "right": 1}}
    for name, side in (("base", 8), ("larger", 12)):
        sizes = {**WIDE, "image_size": side, "patch_size": 4}
        del sizes["max_position_embeddings"]
        save(folder / name, lambda sizes=sizes: ViTForImageClassification(ViTConfig(**sizes, **labels)))
    chance = np.random.default_rng(1)
    for name in THINGS:
        for split, count in ROWS.items():
            rows = [(picture(chance, name, label), label) for label in ("left", "right") * (3 * count // 4)]
            write_images(folder / f"{name}-{split}.parquet", rows)
    pool = [picture(chance, name, label) for name in THINGS for label in ("left", "right") * (POOL_ROWS // 4)]
    write_images(folder / "pool.parquet", [(image, "nobody knows") for image in pool])
    return folder
