"""Every kind of task, taught by predictions: files, tiny models, masked sums, a student that learned."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForTokenClassification

from deploy.simulation.simulate import simulate
from server.report.report import MeanMetrics, Report
from tests.support import lessons


def taught(folder: Path, tmp_path: Path) -> tuple[Report, dict[str, MeanMetrics]]:
    report = simulate(folder, tmp_path / "output")
    return report, report.evaluation.mean


def test_words_are_taught_by_models_that_read_words_and_by_one_that_reads_letters(tmp_path: Path) -> None:
    """The fourth owner's model has another vocabulary, one label less, and room for less than the longest row."""
    report, mean = taught(lessons.of_words(tmp_path / "words"), tmp_path)
    assert mean["distill"].metric > mean["own"].metric + 0.02
    assert mean["distill"].metric > mean["base"].metric + 0.3
    assert "distill: ada, bea, cyd gave weights and predictions" in report.notes
    assert "distill: dan gave predictions alone" in report.notes
    assert [each.candidate for each in report.evaluation.sweep["distill"]] == ["distill@2", "distill@8"]
    AutoModelForTokenClassification.from_pretrained(tmp_path / "output" / "model")


@pytest.mark.slow
def test_images_are_taught_by_models_that_read_them_in_other_sizes(tmp_path: Path) -> None:
    """How close an image is to each owner's decides whose model is asked."""
    _, mean = taught(lessons.of_images(tmp_path / "images"), tmp_path)
    assert mean["distill"].accuracy > mean["own"].accuracy + 0.2
    assert mean["distill"].accuracy > mean["ensemble"].accuracy
    AutoModelForImageClassification.from_pretrained(tmp_path / "output" / "model")


def test_next_tokens_are_taught_by_language_models_of_one_vocabulary(tmp_path: Path) -> None:
    _, mean = taught(lessons.of_next_tokens(tmp_path / "tokens"), tmp_path)
    assert mean["distill"].metric > mean["own"].metric + 0.3
    assert mean["distill"].metric > mean["base"].metric + 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "output" / "model")


@pytest.mark.slow
def test_several_labels_are_taught(tmp_path: Path) -> None:
    task = 'problem_type = "multi_label_classification"\nlabels = ["a", "b", "c"]'
    _, mean = taught(lessons.of_texts(tmp_path / "labels", task, "label"), tmp_path)
    assert mean["distill"].metric > mean["own"].metric + 0.1
    assert mean["distill"].metric > mean["base"].metric + 0.3


@pytest.mark.slow
def test_numbers_are_taught(tmp_path: Path) -> None:
    task = 'problem_type = "regression"\nlabels = ["score"]\ntarget_range = [0, 4]'
    _, mean = taught(lessons.of_texts(tmp_path / "numbers", task, "score"), tmp_path)
    assert mean["distill"].metric < mean["own"].metric - 0.1  # a mean squared error
    assert mean["distill"].metric < mean["base"].metric / 3
