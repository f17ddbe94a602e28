"""The scripts in examples/, run for real on tiny models. (docs/merge-in-ten-minutes.md runs them, too.)"""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    ViTConfig,
)

from common.agreement import Task
from common.errors import DataError, SettingsError
from common.models.loading import digest_of
from examples.merge_folders import merge_folders, task_of
from tests.support.documents import ROOT


def owner(name: str, base: Path, suffix: str, consortium: Path) -> tuple[str, str, str, str]:
    data = consortium / "data" / name
    return name, str(base), str(data / f"train.{suffix}"), str(data / f"test.{suffix}")


def test_three_folders_are_merged_masked_into_one_that_loads(
    reviews_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = reviews_folder / "base"
    changed = AutoModelForSequenceClassification.from_pretrained(base)
    changed.classifier.bias.data += 0.3
    changed.save_pretrained(tmp_path / "changed")
    owners = [
        owner("hotel", tmp_path / "changed", "jsonl", reviews_folder),
        owner("cinema", base, "csv", reviews_folder),
        owner("phones", base, "parquet", reviews_folder),
    ]
    report = merge_folders(str(base), owners, tmp_path / "merged", method="average")
    assert report.summation == "masked"
    assert "PLAIN" not in capsys.readouterr().err
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged" / "model")
    assert digest_of(merged, Task()) == report.digests.model
    before = AutoModelForSequenceClassification.from_pretrained(base)
    moved = (merged.classifier.bias - before.classifier.bias).tolist()
    assert moved == pytest.approx([0.1, 0.1], abs=1e-5)  # all three have 200 rows


def test_two_folders_are_summed_plainly_and_that_is_said_loudly(
    reviews_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = reviews_folder / "base"
    owners = [owner("hotel", base, "jsonl", reviews_folder), owner("cinema", base, "csv", reviews_folder)]
    report = merge_folders(str(base), owners, tmp_path / "merged", method="average")
    assert report.summation == "plain"
    assert capsys.readouterr().err.startswith("TWO OWNERS: THE SUM IS PLAIN, NOT MASKED.")


def test_what_is_wrong_is_said_with_what_to_do(
    reviews_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--base", str(reviews_folder / "base")]
    for name in ("hotel", "cinema", "phones"):
        arguments += ["--owner", name, str(reviews_folder / "base"), "no.jsonl", "no.jsonl"]
    monkeypatch.setattr(sys, "argv", ["merge_folders.py", *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "examples" / "merge_folders.py"), run_name="__main__")
    hint = "check the path; one in a settings file is relative to that file"
    assert str(end.value) == f"error: {tmp_path}/no.jsonl: no such file\nhint: {hint}"


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [(BertConfig, "text-classification"), (ViTConfig, "image-classification"), (GPT2Config, "causal-lm")],
)
def test_the_task_is_what_the_base_was_made_for(architecture: type, kind: str, tmp_path: Path) -> None:
    classes = {
        "text-classification": AutoModelForSequenceClassification,
        "image-classification": AutoModelForImageClassification,
        "causal-lm": AutoModelForCausalLM,
    }
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    small = {"n_embd": 8, "n_layer": 1, "n_head": 1} if architecture is GPT2Config else sizes
    classes[kind].from_config(architecture(**small)).save_pretrained(tmp_path)
    assert task_of(str(tmp_path)) == kind
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"architectures"', '"built_by"'))
    with pytest.raises(SettingsError, match="tells no task; name one: --task"):
        task_of(str(tmp_path))


@pytest.mark.slow
def test_columns_may_have_other_names(reviews_folder: Path, tmp_path: Path) -> None:
    base = str(reviews_folder / "base")
    owners = []
    for name in ("hotel", "cinema"):
        path = tmp_path / f"{name}.csv"
        rows = (reviews_folder / "data" / "cinema" / "train.csv").read_text().splitlines()
        path.write_text("\n".join(["message,queue", *rows[1:]]))
        owners.append((name, base, str(path), str(path)))
    columns = {"text": "message", "label": "queue"}
    report = merge_folders(base, owners, tmp_path / "merged", method="average", columns=columns)
    assert report.examples == 360  # a tenth of each owner's 200 rows is set aside for validation


def test_a_base_without_a_head_takes_task_and_labels_from_the_models_or_the_command(
    reviews_folder: Path, tmp_path: Path
) -> None:
    base, numbered = tmp_path / "base", tmp_path / "numbered"
    for folder in (base, numbered):
        shutil.copytree(reviews_folder / "base", folder)
    AutoModel.from_pretrained(base).save_pretrained(base)
    config = json.loads((numbered / "config.json").read_text())
    (numbered / "config.json").write_text(json.dumps({key: config[key] for key in config if "label" not in key}))
    named = str(reviews_folder / "base")
    path = tmp_path / "hotel.csv"
    rows = (reviews_folder / "data" / "cinema" / "train.csv").read_text().splitlines()
    path.write_text("\n".join(["message,queue", *rows[1:]]))
    owners = [("hotel", named, str(path), str(path)), owner("cinema", Path(named), "csv", reviews_folder)]
    columns_of = {"hotel": {"text": "message", "label": "queue"}}
    merge_folders(str(base), owners, tmp_path / "one", method="average", columns_of=columns_of)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "one" / "model")
    assert merged.config.id2label == {0: "negative", 1: "positive"}
    owners = [(name, str(numbered), *files) for name, _, *files in owners]
    with pytest.raises(SettingsError, match=r"task\.labels is missing.*\nhint: write them under \[task\]"):
        merge_folders(str(base), owners, tmp_path / "two", method="average", columns_of=columns_of)
    labels = ("bad", "good")
    with pytest.raises(DataError, match="row 1: its label is none of bad, good"):
        merge_folders(str(base), owners, tmp_path / "two", method="average", labels=labels, columns_of=columns_of)
