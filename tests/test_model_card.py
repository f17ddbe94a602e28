"""The model card: what the hub reads, and words that stay words."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from server.report.card import CARD, write_model_card
from server.report.page import page_of
from tests.support.reports import as_report, hand_written


def card_of(report: dict[str, Any], folder: Path, base_card: str | None = None, hub: bool = False) -> ModelCard:
    """The card, read back as the hub would; `hub`: the base came from there."""
    base = folder / ("models--somebody--model" if hub else "base") / "snapshot"
    base.mkdir(parents=True)
    if base_card is not None:
        (base / CARD).write_text(base_card)
    write_model_card(as_report(report), base, folder)
    return ModelCard.load(folder / CARD)


def merged_whole() -> dict[str, Any]:
    return hand_written() | {"low_rank": None}


def test_the_licence_is_the_base_s(tmp_path: Path) -> None:
    told = "---\nlicense: other\nlicense_name: gift\nlicense_link: https://example.org/gift\n---\nA base.\n"
    card = card_of(merged_whole(), tmp_path, told)
    assert (card.data.license, card.data.license_name) == ("other", "gift")
    assert card.data.license_link == "https://example.org/gift"
    assert "The one above is the base's." in card.text


@pytest.mark.parametrize("base_card", [None, "A base without metadata.\n", "---\ntags: [x]\n---\nA base.\n"])
def test_an_unknown_licence_is_left_out_and_said_to_be_unknown(base_card: str | None, tmp_path: Path) -> None:
    card = card_of(merged_whole(), tmp_path, base_card)
    assert card.data.license is None
    assert "Ask the people who made it before you share the model" in card.text


def test_a_base_from_the_hub_is_named_and_a_folder_is_not(tmp_path: Path) -> None:
    card = card_of(merged_whole(), tmp_path / "hub", hub=True)
    assert card.data.base_model == "somebody/model"
    assert card_of(merged_whole(), tmp_path / "folder").data.base_model is None


def test_the_tags_say_merge_and_the_kind_of_task(tmp_path: Path) -> None:
    card = card_of(merged_whole(), tmp_path)
    assert {"merge", "amalgram", "regmean"} <= set(card.data.tags)
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.metrics == ["accuracy", "f1"]


def test_the_metrics_are_the_report_s_and_references_stay_out(tmp_path: Path) -> None:
    text = card_of(merged_whole(), tmp_path).text
    assert "| **RegMean, this model** | 0.750 | 0.500 |" in text
    assert "| Fisher | 0.812 | 0.562 |" in text
    assert "| ada | 0.812 | 0.938 | 400 |" in text
    assert "> fisher did better" in text
    assert "Dropped out, and not in the model: cyd" in text


def test_the_card_says_whether_the_owners_verified_the_merge(tmp_path: Path) -> None:
    verified = (
        "Verification: before anything was measured on this model, the owners in it verified together, up to a "
        "tolerance, that it is the merge of what they contributed. A coordinator that colludes with an owner could "
        "evade this."
    )
    text = card_of(merged_whole() | {"verified": True, "summation": "masked"}, tmp_path / "verified").text
    assert verified in text
    assert "the coordinator's word" not in text
    text = card_of(merged_whole(), tmp_path / "not").text
    assert "Verification: none. That the model is the merge of what the owners contributed" in text
    assert verified not in text


def test_words_from_settings_are_neither_markup_nor_lines_of_their_own(tmp_path: Path) -> None:
    report = merged_whole()
    report["title"] = "A --- # B <script>x</script> [link](http://example.org) `code`"
    text = card_of(report, tmp_path).text
    assert text.lstrip().splitlines()[0] == (
        r"# A --- \# B &lt;script&gt;x&lt;/script&gt; \[link\](http://example.org) \`code\`"
    )
    assert "&lt;i&gt;good&lt;/i&gt;, bad" in text


@pytest.mark.parametrize("has_processor", [True, False])
def test_the_card_of_an_image_model_names_a_pipeline_if_the_folder_has_an_image_processor(
    has_processor: bool, tmp_path: Path
) -> None:
    report = merged_whole()
    report["agreement"]["task"]["kind"] = "image-classification"
    if has_processor:
        (tmp_path / "preprocessor_config.json").write_text("{}")
    text = card_of(report, tmp_path).text
    assert ('pipeline("image-classification", model="this-folder")' in text) == has_processor
    assert ("without an image processor" in text) != has_processor


def test_with_noise_no_card_and_page_says_that_there_is_none_and_what_is_declared_is_called_so(tmp_path: Path) -> None:
    report = merged_whole()
    without, before = page_of(as_report(report)), card_of(report, tmp_path / "without").text
    agreement = report["agreement"]
    owners = [owner | {"declared": [2.0, 1e-6] if owner["name"] == "bea" else None} for owner in agreement["owners"]]
    privacy = agreement["privacy"] | {"epsilon": 4.0, "delta": 1e-5}
    report["agreement"] = agreement | {"owners": owners, "privacy": privacy}
    page, text = page_of(as_report(report)), card_of(report, tmp_path / "with").text
    assert "No noise was added" in without
    assert "No noise was added" in before
    assert "No noise was added" not in page + text
    assert "each owner except bea trained with DP-SGD, epsilon = 4" in text
    assert "Nobody checked how bea trained the model brought" in text
    assert "what is declared below is true" in page
