"""The example's three owners and a kiosk, whose model shares nothing with theirs but the labels."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from tokenizers import models, normalizers
from transformers import DistilBertConfig, DistilBertForSequenceClassification, PreTrainedTokenizerFast

from client.data.rows import Rows
from client.measurement import fine_tuning
from client.settings import Training
from deploy.example import reviews
from tests.support.tokenizers import framing

POOL_ROWS = 240
LABELS = ("positive", "negative")  # of the kiosk's model, which has them in another order
DISTILL = """
[distill]
pool = "pool.jsonl"
start = "data_free"
epochs = [2, 6]
learning_rate = 1e-3

[task_arithmetic]"""
KIOSK = """
[[owners]]
name = "kiosk"
gives = "predictions"
"""


def write_teaching(trained_folder: Path, folder: Path) -> None:
    """A consortium that agreed to distil, from the example's trained one."""
    shutil.copytree(trained_folder, folder, ignore=shutil.ignore_patterns("output"))
    path = folder / "agreement.toml"
    text = path.read_text().replace('method = "regmean"', 'method = "distill"')
    text = text.replace('["average", "task_arithmetic", "fisher"]', '["data_free"]')
    text = text.replace("# colluders = 0 ", "colluders = 0 ").replace("\n[task_arithmetic]", DISTILL)
    path.write_text(text.replace("# [verification]\n# required", "[verification]\nrequired") + KIOSK)
    chance = random.Random(3)
    settings = (folder / "hotel.toml").read_text().replace("hotel", "kiosk")
    (folder / "kiosk.toml").write_text(settings.replace('name = "kiosk"\n', 'name = "kiosk"\nown_base = "other"\n', 1))
    (folder / "data" / "kiosk").mkdir()
    for split, count in reviews.ROWS.items():
        (folder / "data" / "kiosk" / f"{split}.jsonl").write_text(
            _lines([reviews._review(chance, *reviews.OWNERS["cinema"][1:]) for _ in range(count)])
        )
    said = {_review(chance)["text"]: None for _ in range(3 * POOL_ROWS)}
    (folder / "pool.jsonl").write_text(_lines([{"text": text} for text in list(said)[:POOL_ROWS]]))
    _write_models(folder)


def _review(chance: random.Random) -> dict[str, str]:
    things = tuple(thing for _, each, _ in reviews.OWNERS.values() for thing in each)
    words = {label: tuple(w for *_, each in reviews.OWNERS.values() for w in each[label]) for label in reviews.LABELS}
    return reviews._review(chance, things, words)


def _lines(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _write_models(folder: Path) -> None:
    """The kiosk's base, `other`, and its model: another architecture, another vocabulary, labels in another order."""
    tokenizer = other_tokenizer()
    config = DistilBertConfig(
        vocab_size=len(tokenizer),
        dim=32,
        n_layers=1,
        n_heads=2,
        hidden_dim=64,
        max_position_embeddings=64,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DistilBertForSequenceClassification(config)
    model.save_pretrained(folder / "other")
    rows = [json.loads(line) for line in (folder / "data" / "kiosk" / "train.jsonl").read_text().splitlines()]
    encoded = Rows(
        features=tuple(dict(tokenizer(row["text"])) for row in rows),
        targets=np.array([LABELS.index(row["label"]) for row in rows]),
        tokenizer=tokenizer,
    )
    fine_tuning.fine_tune(model, encoded, Training(epochs=6, learning_rate=3e-3), 0, "kiosk: training")
    model.save_pretrained(folder / "models" / "kiosk")
    for each in (folder / "other", folder / "models" / "kiosk"):
        tokenizer.save_pretrained(each)


def other_tokenizer() -> PreTrainedTokenizerFast:
    """The example's words, numbered from the end, behind other special tokens."""
    words = sorted(set(reviews.make_tokenizer().get_vocab()) - {"[PAD]", "[UNK]", "[CLS]", "[SEP]"}, reverse=True)
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<pad>", "<end>", "<begin>", *words])}
    special = ("<pad>", "<unk>", "<begin>", "<end>")
    return framing(models.WordLevel(vocabulary, unk_token="<unk>"), normalizers.Lowercase(), special, max_tokens=64)
