"""The scripts in examples/, run for real on tiny models. (docs/merge-in-ten-minutes.md runs them, too.)"""

import runpy
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from common.agreement import Task
from common.models import digest_of
from examples.merge_folders import merge_folders
from tests.documents import ROOT


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
    assert report["summation"] == "masked"
    assert "PLAIN" not in capsys.readouterr().err
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged" / "model")
    assert digest_of(merged, Task()) == report["digests"]["model"]  # type: ignore[index]
    before = AutoModelForSequenceClassification.from_pretrained(base)
    moved = (merged.classifier.bias - before.classifier.bias).tolist()
    assert moved == pytest.approx([0.1, 0.1], abs=1e-5)  # all three have 200 rows


def test_two_folders_are_summed_plainly_and_that_is_said_loudly(
    reviews_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = reviews_folder / "base"
    owners = [owner("hotel", base, "jsonl", reviews_folder), owner("cinema", base, "csv", reviews_folder)]
    report = merge_folders(str(base), owners, tmp_path / "merged", method="average")
    assert report["summation"] == "plain"
    assert capsys.readouterr().err.startswith("TWO OWNERS: THE SUM IS PLAIN, NOT MASKED.")


@pytest.mark.usefixtures("own_log")
def test_what_is_wrong_is_said_in_one_line(
    reviews_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--base", str(reviews_folder / "base")]
    for name in ("hotel", "cinema", "phones"):
        arguments += ["--owner", name, str(reviews_folder / "base"), "no.jsonl", "no.jsonl"]
    monkeypatch.setattr(sys, "argv", ["merge_folders.py", *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "examples" / "merge_folders.py"), run_name="__main__")
    assert str(end.value) == f"error: {tmp_path}/no.jsonl: no such file"
