"""`amalgram personal` as an owner runs it: nothing is sent, and nothing but the new model is left on the disk."""

import json
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from client import personal
from client.holdings import Holdings
from common.errors import DataError, ModelError, SettingsError
from deploy.cli import cli
from deploy.commands.personal import make_and_show
from tests.support.full_disk import file_size_limited
from tests.support.parties import Parties
from tests.support.watch import changed_paths, watched


def test_a_personal_model_is_made_here_alone_and_says_that_it_must_stay(
    parties: Parties,
    trained_folder: Path,
    tmp_path: Path,
    temporary: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    new = tmp_path / "new"
    before = {path: path.stat().st_mtime_ns for path in parties.folder.rglob("*")}
    published = trained_folder / "models" / "cinema"
    with watched() as seen:
        cli(["personal", str(parties.files["hotel"]), str(published), str(new / "hotel")], standalone_mode=False)
    said = capsys.readouterr().out
    assert [event for event, _ in seen if event.startswith("socket.")] == []
    elsewhere = {path for path in changed_paths(seen) if not path.is_relative_to(new)}
    assert all(path.is_relative_to(temporary) for path in elsewhere)
    assert list(temporary.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in parties.folder.rglob("*")} == before
    assert [path.name for path in new.iterdir()] == ["hotel"]
    assert "must not leave the building" in said
    assert "must not leave the building" in (new / "hotel" / "README.md").read_text()
    model = AutoModelForSequenceClassification.from_pretrained(new / "hotel")
    texts = AutoTokenizer.from_pretrained(new / "hotel")(["the room was clean"], return_tensors="pt")
    assert model(**texts).logits.shape == (1, len(parties.agreement.task.labels))
    assert model.config.id2label == dict(enumerate(parties.agreement.task.labels))
    assert {path.stat().st_mode & 0o077 for path in (new / "hotel", *(new / "hotel").iterdir())} == {0}


def test_a_folder_that_is_there_is_refused_before_anything_is_computed(
    parties: Parties, trained_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(personal, "personalise", lambda *_: pytest.fail("something was computed"))
    (tmp_path / "there").symlink_to(tmp_path / "nowhere")
    published = trained_folder / "models" / "cinema"
    with pytest.raises(SettingsError, match="there: already exists"):
        cli(["personal", str(parties.files["hotel"]), str(published), str(tmp_path / "there")], standalone_mode=False)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_one_leaves_nothing(
    error: type[BaseException],
    parties: Parties,
    trained_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_whole = Holdings.write_whole

    def write_some(self: Holdings, *arguments: object) -> None:
        write_whole(self, *arguments)  # type: ignore[arg-type]
        raise error

    monkeypatch.setattr(Holdings, "write_whole", write_some)
    published = trained_folder / "models" / "cinema"
    out = tmp_path / "new" / "hotel"
    with pytest.raises(error):
        make_and_show(parties.files["hotel"], published, out)
    assert list(out.parent.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on files stands for a full disk")
def test_a_full_disk_is_one_line(parties: Parties, trained_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "hotel"
    with file_size_limited(100_000), pytest.raises(DataError, match=r"new: the model cannot be written here"):
        make_and_show(parties.files["hotel"], trained_folder / "models" / "cinema", out)
    assert list(out.parent.iterdir()) == []


def test_signed_receipts_say_how_the_merge_does_elsewhere_and_those_of_another_agreement_say_nothing(
    example_run: Path, parties: Parties, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def known(owner: Path, out: str) -> set[str]:
        cli(["personal", str(owner), str(example_run), str(tmp_path / out), "--json"], standalone_mode=False)
        return set(json.loads(capsys.readouterr().out)["merged_elsewhere"])

    assert known(example_run / "parties" / "hotel.toml", "one") == {"cinema", "phones"}
    with pytest.raises(ModelError):  # a base of two blocks
        known(parties.files["hotel"], "other")
