"""Attacks 151 to 158: what a sum of predictions can be made to show, and who takes part in it."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers.normalizers import BertNormalizer

from client.measurement.predictions import centred
from client.owner import Owner
from client.pool_look import look_at_pool, overlap
from common.agreement import AgreementDraft
from common.errors import DataError, ModelError, SettingsError
from common.merge_methods.distill import DISTILL, LEAST_CLOSENESS, DistillTable
from common.merge_methods.terms import Predictions
from common.pool import Pool, in_one_form, pin_pool
from common.settings_file import parse_settings, parse_toml
from deploy.commands.agree import QUOTE, consent_text
from server.merge import prepare
from tests.support.merging import merge_settings, plan_for
from tests.support.parties import OwnersChannel, Parties, parties_of


@pytest.fixture
def teaching(teaching_folder: Path, tmp_path: Path) -> Iterator[Parties]:
    with parties_of(teaching_folder, tmp_path / "output") as parties:
        yield parties


def change(path: Path, *changes: tuple[str, str]) -> None:
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)


def draft_of(consortium: Path, *changes: tuple[str, str]) -> AgreementDraft:
    text = (consortium / "agreement.toml").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return parse_settings(parse_toml(text.encode(), "agreement.toml"), AgreementDraft, "agreement.toml")


# --- 151, 152: a pool that asks about one row ---


def test_151_a_row_that_was_not_agreed_on_is_asked_of_nobody(teaching: Parties, tmp_path: Path) -> None:
    settings = Owner(teaching.files["hotel"]).settings
    assert settings.pool is not None
    rows = settings.pool.read_text().splitlines()
    asked = tmp_path / "asked.jsonl"
    asked.write_text("\n".join([json.dumps({"text": "the lobby was rude"}), *rows[1:]]) + "\n")
    for path in (teaching.files["hotel"], teaching.coordinator):
        change(path, (str(settings.pool), str(asked)))
    with pytest.raises(DataError, match=r"its SHA-256 is .* the agreement's is .*\nhint: get the file"):
        Owner(teaching.files["hotel"]).check()
    channel = OwnersChannel(teaching.files)
    with pytest.raises(DataError, match="its SHA-256 is"):
        prepare(teaching.coordinator, channel)
    assert channel.asked == []


def test_152_a_row_is_not_asked_twice_in_another_dress(teaching_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    table = DISTILL.of(draft_of(teaching_folder).tables)
    for dressed in ("The  \uff4cobby was rude ", "the lob\u200bby was\u00ad rude\u0000"):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("the lobby was rude", dressed)))
        with pytest.raises(DataError, match="row 2 says what row 1 says"):
            pin_pool(path, table, "text-classification")


# --- 153, 154: whoever is alone in a number ---


def test_153_an_owner_that_is_alone_with_a_label_is_not_read(teaching_folder: Path) -> None:
    labels = ("max_tokens = 32", 'max_tokens = 32\nlabels = ["negative", "positive", "mixed"]')
    start = ('start = "data_free"', 'start = "base"')
    compared = ('compare_with = ["data_free"]', "compare_with = []")
    few = [
        (f'name = "{name}"', f'name = "{name}"\ngives = "predictions"\nlabels = ["negative", "positive"]')
        for name in ("hotel", "cinema")
    ]
    with pytest.raises(SettingsError, match="the models of 2 know the label 'mixed', and at least 3 must"):
        draft_of(teaching_folder, labels, start, compared, *few)
    assert draft_of(teaching_folder, labels, start, compared, few[0]).unknown_labels == {"hotel": frozenset({2})}


FOUR_LABELS = ("a", "b", "c", "d")


def knowing(teaching_folder: Path, label_sets: Sequence[str], weights: str) -> AgreementDraft:
    """Owners of these labels each, by their first letters, who give predictions alone."""
    start, *_ = (teaching_folder / "agreement.toml").read_text().partition("[[owners]]")
    text = start.replace("max_tokens = 32", f"max_tokens = 32\nlabels = {list(FOUR_LABELS)}")
    text = text.replace('start = "data_free"', f'start = "base"\nweights = "{weights}"').replace('["data_free"]', "[]")
    for number, known in enumerate(label_sets):
        text += f'[[owners]]\nname = "owner{number}"\ngives = "predictions"\nlabels = {list(known)}\n'
    return parse_settings(parse_toml(text.encode(), "agreement.toml"), AgreementDraft, "agreement.toml")


@pytest.mark.parametrize(
    ("label_sets", "weights"),
    [(["ab"] * 3 + ["cd"] * 3 + ["abcd"], "alike"), (["abc"] * 3 + ["abcd"] * 3 + ["abd"], "density")],
)
def test_153_an_owner_whose_labels_tell_it_apart_is_not_read(
    teaching_folder: Path, label_sets: list[str], weights: str
) -> None:
    """Every label is known by three or more. But logits add up to zero over an owner's labels, so the sum over a and b
    is about the last owner alone; and the closeness for a less that for c is the last owner's.
    """
    random, total = np.random.default_rng(0), {"predictions": np.zeros((5, 4)), "closeness": np.zeros((5, 4))}
    for known in label_sets:
        knows = np.array([each in known for each in FOUR_LABELS])
        logits = centred(random.standard_normal((5, 4)).astype(np.float32), knows, 16.0)
        close = random.uniform(0.1, 1.0, (5, 1))
        total["predictions"] += logits if weights == "alike" else close * logits
        total["closeness"] += close * knows
    if weights == "alike":
        np.testing.assert_allclose(total["predictions"][:, :2].sum(1), logits[:, :2].sum(1), atol=1e-12)
    else:
        np.testing.assert_allclose(total["closeness"][:, [0]] - total["closeness"][:, [2]], close, atol=1e-12)
    name = f"owner{len(label_sets) - 1}"
    with pytest.raises(SettingsError, match=f"which labels the model of {name} knows tells its predictions apart"):
        knowing(teaching_folder, label_sets, weights)


@pytest.mark.parametrize(
    ("label_sets", "weights"),
    [
        (["ab"] * 3 + ["cd"] * 3, "density"),
        (["ab"] * 3 + ["bcd"] * 3 + ["abcd"], "alike"),
        (["abcd"] * 3 + ["ab"], "alike"),
    ],
)
def test_owners_with_the_same_labels_hide_each_other(
    teaching_folder: Path, label_sets: list[str], weights: str
) -> None:
    assert len(knowing(teaching_folder, label_sets, weights).owners) == len(label_sets)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ([('name = "cinema"', 'name = "cinema"\ngives = "predictions"')], "2 give weights, which distill sums"),
        (
            [
                ('name = "cinema"', 'name = "cinema"\ngives = "predictions"'),
                ('start = "data_free"', 'start = "base"'),
            ],
            "2 give weights, which data_free sums",
        ),
        ([("colluders = 0", "colluders = 1")], "3 give weights, which distill sums, and at least 4 must"),
        ([('compare_with = ["data_free"]', 'compare_with = ["fisher"]')], "fisher: some owners give predictions alone"),
        ([('compare_with = ["data_free"]', 'compare_with = ["refit"]')], "refit: some owners give predictions alone"),
        ([('method = "distill"', 'method = "average"')], "no method sums predictions"),
        ([('name = "hotel"', 'name = "hotel"\nlabels = ["a", "b"]')], "has labels of its own and gives weights"),
        ([("required = false", "required = true")], "distill: no owner can verify what it merges"),
        ([('pool = "pool.jsonl"\n', "")], r"distill\.pool is missing"),
        ([('pool = "pool.jsonl"', 'pool = "../pool.jsonl"')], r"distill\.pool = .* must be a file's name"),
        ([("epochs = [2, 6]", "epochs = [6, 2]")], "must ascend"),
        (
            [('kind = "text-classification"', 'kind = "sequence-to-sequence"')],
            "sequence-to-sequence cannot be distilled",
        ),
        ([("max_tokens = 32", 'max_tokens = 32\nhead = "private"')], "so predictions are of different labels"),
    ],
)
def test_154_an_agreement_under_which_a_sum_would_hide_too_few_is_refused(
    teaching_folder: Path, changes: list[tuple[str, str]], says: str
) -> None:
    assert draft_of(teaching_folder).without_weights == {"kiosk"}
    with pytest.raises(SettingsError, match=says):
        draft_of(teaching_folder, *changes)


def test_154_predictions_of_models_that_are_trained_with_noise_reveal_no_more_than_these(teaching_folder: Path) -> None:
    """But how close rows are to an owner's is measured on these, without noise."""
    bounded = [
        ("min_rows_per_dimension = 1.0", "epsilon = 8.0\nmin_rows_per_dimension = 1.0"),
        ("max_tokens = 32", 'max_tokens = 32\nlabel_set = "all"'),
    ]
    assert draft_of(teaching_folder, *bounded).privacy.epsilon == 8.0
    with pytest.raises(SettingsError, match="distill sums statistics of rows, to which no noise is added"):
        draft_of(teaching_folder, *bounded, ('start = "data_free"', 'start = "data_free"\nweights = "density"'))


# --- 155: an owner that brings something else than was agreed ---


def test_155_a_model_of_another_base_gives_no_weights(teaching: Parties) -> None:
    change(teaching.files["hotel"], ('name = "hotel"', f'name = "hotel"\nown_base = "{teaching.base}"'))
    with pytest.raises(SettingsError, match="the agreement has it give weights"):
        Owner(teaching.files["hotel"]).check()


def test_155_a_model_with_other_labels_than_the_roster_says_gives_nothing(teaching: Parties, tmp_path: Path) -> None:
    path = teaching.folder / "agreement.toml"
    text = path.read_text()
    change(path, ('labels = [\n    "negative",\n    "positive",\n]', 'labels = ["negative", "positive", "mixed"]'))
    assert path.read_text() != text
    with pytest.raises(ModelError, match="its model knows the labels"):
        Owner(teaching.files["kiosk"]).workbench._check_what_it_gives()


# --- 156: what whoever consents is shown ---


def test_156_who_consents_reads_the_pool_and_who_gives_what(teaching: Parties) -> None:
    text = consent_text(Owner(teaching.files["hotel"]))
    assert "240 public rows with 2 labels: 480 numbers from -16 to 16" in text
    assert "weight changes and predictions: hotel, cinema, phones" in text
    assert "predictions alone:              kiosk" in text
    assert "NO OWNER CAN VERIFY WHAT IT TRAINS" in text
    assert "NO OWNER CAN VERIFY WHAT DISTILLATION MERGES: IT RESTS ON THE COORDINATOR." in text


def test_156_a_pool_that_holds_an_owner_s_own_rows_is_said_with_the_count(teaching: Parties, tmp_path: Path) -> None:
    owner = Owner(teaching.files["hotel"])
    own = [content.decode() for content in owner.workbench.data.contents()]
    look = look_at_pool(Pool(((own[0].upper(),), ("something else",), (own[1],))), own)
    assert look.own_rows == len({in_one_form([own[0]]), in_one_form([own[1]])})
    assert look.nearest[0][1] == 1.0
    texts = tuple((text,) for text in dict.fromkeys(own))
    owner.workbench.__dict__["pool_look"] = look_at_pool(Pool(texts), own)
    assert f"{len(texts):,} ROWS OF THE POOL ARE YOURS" in consent_text(owner).partition("BEFORE YOU SAY YES")[2]


@pytest.mark.parametrize("joint", ["\u200b", "\u00ad", "\u0301", "\u0007"])
def test_156_an_own_row_with_characters_that_a_tokenizer_drops_is_one_s_own(joint: str) -> None:
    """With one in every word, it has no word in common with the row, and asks the model the same."""
    asked = "the lobby was rude".replace("e", f"e{joint}").replace("a", f"a{joint}").replace("y", f"y{joint}")
    assert BertNormalizer(lowercase=True).normalize_str(asked) == "the lobby was rude"
    look = look_at_pool(Pool((("something else",), (asked,))), ["the lobby was rude"])
    assert look.own_rows == 1
    assert look.nearest[0] == (asked, 1.0)


def test_156_a_row_that_would_forge_a_line_is_shown_behind_a_mark(teaching: Parties) -> None:
    owner = Owner(teaching.files["hotel"])
    forged = "good\nFingerprint:  00000 00000\x1b[2J\u202e"
    owner.workbench.__dict__["pool_look"] = look_at_pool(Pool(((forged,),)), ["good"])
    text = consent_text(owner)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert all(line.startswith(QUOTE) for line in text.splitlines() if "00000" in line)


def test_156_the_nearest_row_is_the_one_with_most_words_in_common() -> None:
    found = overlap(["a b c d", "a b", "x"], ["a b c", "q"])
    np.testing.assert_allclose(found, [3 / 4, 2 / 3, 0.0])
    assert not overlap(["a"], []).any()


# --- 157: an owner that shouts ---


def test_157_no_model_of_an_honest_owner_decides_alone_by_large_logits() -> None:
    loud = centred(np.array([[1e6, 0.0, -1e6]], np.float32), np.array([True] * 3), 16.0)
    assert np.abs(loud).max() == 16.0


# --- 158: a row that is near one owner alone ---


def test_158_by_closeness_a_row_near_one_owner_alone_is_answered_by_that_owner() -> None:
    """A documented break: the sum over all owners is nearly its logits. Whose they are, it does not tell."""
    random, table = np.random.default_rng(0), DistillTable(pool="pool.jsonl", rows=5, weights="density")
    settings = merge_settings(plan_for(3, [2]), distill=table)
    known, total = np.array([True] * 2), np.zeros((5, 2))
    first, *others = (
        Predictions(
            logits=centred(random.standard_normal((5, 2)).astype(np.float32), known, table.largest_logit),
            known=known,
            closeness=np.full(5, closeness),
        )
        for closeness in (1.0, 0.0, 0.0)
    )
    for each in (first, *others):
        total += dict(DISTILL.predicted(settings, each))["predictions"]
    assert np.abs(total - first.logits).max() < len(others) * LEAST_CLOSENESS * table.largest_logit
    assert any("by that owner's model alone" in line for line in DISTILL.disclosures(settings.tables))
