"""Every kind of task, taught by predictions: files, tiny models, masked sums, a student that learned."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForTokenClassification

from client.owner import Owner
from common.merge_methods.distill import DISTILL
from deploy.commands.agree import consent_text
from deploy.commands.check import Checklist, _check_pool
from deploy.simulation.simulate import simulate
from server.report.report import MeanMetrics, Report
from tests.support import lessons
from tests.support.parties import parties_of


def taught(folder: Path, tmp_path: Path) -> tuple[Report, dict[str, MeanMetrics]]:
    report = simulate(folder, tmp_path / "output")
    return report, report.evaluation.mean


@contextmanager
def owner_of(folder: Path, tmp_path: Path, name: str) -> Iterator[Owner]:
    """An owner that is asked for its consent."""
    with parties_of(folder, tmp_path / "asked") as parties:
        yield Owner(parties.files[name])


def test_words_are_taught_by_models_that_read_words_and_by_one_that_reads_letters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fourth owner's model has another vocabulary, one label less, and room for less than the longest row."""
    report, mean = taught(lessons.of_words(tmp_path / "words"), tmp_path)
    assert mean["distill"].metric > mean["own"].metric + 0.02
    assert mean["distill"].metric > mean["base"].metric + 0.3
    assert "distill: ada, bea, cyd gave weights and predictions" in report.notes
    assert "distill: dan gave predictions alone" in report.notes
    assert [each.candidate for each in report.evaluation.sweep["distill"]] == ["distill@2", "distill@8"]
    AutoModelForTokenClassification.from_pretrained(tmp_path / "output" / "model")
    with owner_of(tmp_path / "words", tmp_path, "dan") as dan:
        asked = DISTILL.of(dan.agreement.tables).asked
        consent = consent_text(dan)
        _check_pool(Checklist(), dan.agreement, tmp_path / "words" / "pool.parquet")
    assert f"predicts the {asked} words of 61 public rows with 3 labels: {3 * asked:,} numbers" in consent
    assert "  3 owners' models know the label I-THING" in consent
    assert f"61 rows, as agreed: {asked} predictions of 3 numbers" in capsys.readouterr().out


@pytest.mark.slow
def test_images_are_taught_by_models_that_read_them_in_other_sizes(tmp_path: Path) -> None:
    """How close an image is to each owner's decides whose model is asked."""
    _, mean = taught(lessons.of_images(tmp_path / "images"), tmp_path)
    assert mean["distill"].accuracy > mean["own"].accuracy + 0.1
    assert mean["distill"].accuracy > mean["ensemble"].accuracy
    AutoModelForImageClassification.from_pretrained(tmp_path / "output" / "model")
    with owner_of(tmp_path / "images", tmp_path, "cyd") as cyd:
        consent, sheet = consent_text(cyd), cyd.state.folder / "pool.png"
        assert sheet.is_file()
    assert "predicts 90 public images with 2 labels: 360 numbers" in consent  # as many again for how close they are
    assert f"These images are in {sheet}" in consent


@pytest.mark.slow
def test_next_tokens_are_taught_by_language_models_of_one_vocabulary(tmp_path: Path) -> None:
    _, mean = taught(lessons.of_next_tokens(tmp_path / "tokens"), tmp_path)
    assert mean["distill"].metric > mean["own"].metric + 0.3
    assert mean["distill"].metric > mean["base"].metric + 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "output" / "model")
    with owner_of(tmp_path / "tokens", tmp_path, "ada") as ada:
        consent = consent_text(ada)
    assert "predicts 135 next tokens in 27 public rows with" in consent
    assert "can bring out how that text continues" in " ".join(consent.split())


@pytest.mark.slow
def test_several_labels_are_taught(tmp_path: Path) -> None:
    """By whoever knows the words: a mean over all would be no better than the owners' own models."""
    task = 'problem_type = "multi_label_classification"\nlabels = ["a", "b", "c"]'
    _, mean = taught(lessons.of_texts(tmp_path / "labels", task, "label", 'weights = "density"'), tmp_path)
    assert mean["distill"].metric > mean["own"].metric + 0.1
    assert mean["distill"].metric > mean["base"].metric + 0.3


@pytest.mark.slow
def test_numbers_are_taught(tmp_path: Path) -> None:
    task = 'problem_type = "regression"\nlabels = ["score"]\ntarget_range = [0, 4]'
    _, mean = taught(lessons.of_texts(tmp_path / "numbers", task, "score"), tmp_path)
    assert mean["distill"].metric < mean["own"].metric - 0.1  # a mean squared error
    assert mean["distill"].metric < mean["base"].metric / 3
