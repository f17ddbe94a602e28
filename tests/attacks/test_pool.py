"""Attacks 151 to 163: what a sum of predictions can be made to show, and who takes part in it."""

import gzip
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from threading import Timer
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image
from tokenizers import normalizers
from tokenizers.normalizers import BertNormalizer

import common.pool
from client.measurement.predictions import as_summed
from client.owner import Owner
from client.pool_look import look_at_images, look_at_pool, overlap, write_sheet
from common.agreement import AgreementDraft, Task, TaskKind
from common.data.images import ImageFile
from common.errors import DataError, ModelError, NumericalError, SettingsError
from common.merge_methods.distill import DISTILL, LEAST_CLOSENESS, DistillTable
from common.merge_methods.terms import Predictions
from common.pool import ImagePool, Pool, in_one_form, pin_pool, thumbnail
from common.pool_rows import PoolReader
from common.settings_file import parse_settings, parse_toml
from common.summation.protocol import Total
from deploy.commands.agree import QUOTE, consent_text
from deploy.example.reviews import make_tokenizer
from server.bounds import check_contributions
from server.merge import prepare
from tests.support import lessons
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
        with pytest.raises(DataError, match="row 2 says the same as row 1"):
            pin_pool(path, table, "text-classification")


def images_of(path: Path, *images: object) -> Path:
    """A pool of images, as `datasets` saves them, or whatever else its cells hold."""
    pyarrow.parquet.write_table(pa.table({"image": list(images)}), path)
    return path


def test_152_an_image_is_not_asked_twice_in_another_file(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8))
    twice = [saved(noise, "PNG"), saved(noise, "BMP")]
    path = images_of(tmp_path / "pool.parquet", *({"bytes": each, "path": "a.png"} for each in twice))
    with pytest.raises(DataError, match="row 2 says the same as row 1"):
        pin_pool(path, DistillTable(pool="pool.parquet"), "image-classification")


def test_152_a_row_of_words_is_not_asked_twice_as_other_words(tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    rows = [["New", "York", "is", "far"], ["new york", "is", "f\u00adar"]]
    path.write_text("".join(json.dumps({"tokens": row}) + "\n" for row in rows))
    with pytest.raises(DataError, match="row 2 says the same as row 1"):
        pin_pool(path, DistillTable(pool="pool.jsonl"), "token-classification")


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


@pytest.mark.parametrize(
    "task",
    [
        'kind = "token-classification"',
        'kind = "image-classification"',
        'problem_type = "multi_label_classification"',
        'problem_type = "regression"\ntarget_range = [0, 1]',
    ],
)
def test_153_nobody_is_alone_with_a_label_whatever_is_predicted(tmp_path: Path, task: str) -> None:
    few = 'gives = "predictions"\nlabels = ["a", "b"]'
    owners = {"ada": few, "bea": few, "cyd": 'gives = "predictions"'}
    lessons.write_consortium(tmp_path, f'{task}\nlabels = ["a", "b", "c"]', "pool.parquet", owners)
    with pytest.raises(SettingsError, match="the models of 1 know the label 'c', and at least 3 must"):
        draft_of(tmp_path)


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
    """Every label is known by three or more. But probabilities add up to 1 over an owner's labels, so the sum over a
    and b, less 1 for each owner of these alone, is the last owner's; and so is the closeness for a less that for c.
    """
    random, total = np.random.default_rng(0), {"predictions": np.zeros((5, 4)), "closeness": np.zeros((5, 4))}
    for known in label_sets:
        knows = np.array([each in known for each in FOUR_LABELS])
        said = as_summed(random.standard_normal((5, 4)).astype(np.float32), knows, Task(labels=FOUR_LABELS))
        close = random.uniform(0.1, 1.0, (5, 1))
        total["predictions"] += said if weights == "alike" else close * said
        total["closeness"] += close * knows
    if weights == "alike":
        np.testing.assert_allclose(total["predictions"][:, :2].sum(1) - 3, said[:, :2].sum(1), atol=1e-5)
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
        (
            [('name = "cinema"', 'name = "cinema"\ngives = "predictions"')],
            r'2 give weights, which distill sums.*\nhint: .* start = "base" and a higher learning_rate, such as 5e-4$',
        ),
        (
            [
                ('name = "cinema"', 'name = "cinema"\ngives = "predictions"'),
                ('start = "data_free"', 'start = "base"'),
            ],
            r"2 give weights, which data_free sums.*\nhint: leave data_free out$",
        ),
        (
            [("colluders = 0", "colluders = 1")],
            r"3 give weights, which distill sums, and at least 4 must.*\nhint: .* or agree on fewer",
        ),
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


@pytest.mark.parametrize(
    ("task", "table", "says"),
    [
        ('kind = "sequence-to-sequence"', "", "what a model writes depends on what it wrote before"),
        ('kind = "causal-lm"', 'weights = "density"', "how close a text is says nothing about its single tokens"),
        ('kind = "causal-lm"', 'keep = "more confident"', "need one label per row"),
        ('kind = "causal-lm"', 'text_pair = "other"', "reads no pairs of texts"),
        ('kind = "image-classification"', 'text_pair = "other"', "reads no pairs of texts"),
        ('problem_type = "multi_label_classification"', 'keep = "more confident"', "need one label per row"),
    ],
)
def test_154_what_cannot_be_distilled_is_refused_when_it_is_drafted(
    tmp_path: Path, task: str, table: str, says: str
) -> None:
    lessons.write_consortium(tmp_path, task, "pool.jsonl", dict.fromkeys(lessons.THINGS, ""), table=table)
    with pytest.raises(SettingsError, match=says):
        draft_of(tmp_path)


def test_163_a_sum_that_no_owner_s_memory_holds_is_refused(tmp_path: Path) -> None:
    """Ten thousand texts at eight tokens each, of a vocabulary of fifty thousand."""
    table = "rows = 10_000\npredictions = 80_000\nvocabulary = 50_000"
    lessons.write_consortium(tmp_path, 'kind = "causal-lm"', "pool.csv", dict.fromkeys(lessons.THINGS, ""), table=table)
    with pytest.raises(SettingsError, match=r"80,000 predictions of 50,000 numbers each are more than 100,000,000"):
        draft_of(tmp_path)


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
    assert "240 public rows with 2 labels: 480 numbers from 0 to 1" in text
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


@pytest.mark.parametrize("joint", ["\u200b", "\u00ad", "\u0301", "\u0007", "\u000b", "\u001c", "\u0085", "\ufffd"])
def test_156_an_own_row_with_characters_that_a_tokenizer_drops_is_one_s_own(joint: str) -> None:
    """With one in every word, it has no word in common with the row, and asks the model the same."""
    asked = "the lobby was rude".replace("e", f"e{joint}").replace("a", f"a{joint}").replace("y", f"y{joint}")
    assert BertNormalizer(lowercase=True).normalize_str(asked) == "the lobby was rude"
    look = look_at_pool(Pool((("something else",), (asked,))), ["the lobby was rude"])
    assert look.own_rows == 1
    assert look.nearest[0] == (asked, 1.0)


def test_156_an_own_row_with_blanks_that_do_not_show_is_one_s_own() -> None:
    """SentencePiece makes a zero-width space a blank, where BERT drops it."""
    asked = "the\u200blobby\u200bwas\u200brude"
    assert normalizers.Replace("\u200b", " ").normalize_str(asked) == "the lobby was rude"
    assert look_at_pool(Pool((("something else",), (asked,))), ["the lobby was rude"]).own_rows == 1


@pytest.mark.parametrize(
    ("own", "asked"),
    [
        ("the lobby was rude to us", "The lobby, was (rude) -- to us!"),
        ("the lobby\nwas rude to us", "the lobby was rude to us"),
    ],
)
def test_156_an_own_row_in_other_punctuation_or_lines_is_one_s_own(own: str, asked: str) -> None:
    look = look_at_pool(Pool((("something else",), (asked,))), [own])
    assert (look.own_rows, look.nearest[0]) == (1, (asked, 1.0))


def test_156_rows_that_ask_around_an_own_row_are_counted_where_no_blanks_are_written() -> None:
    own = "\u5927\u5802\u7684\u670d\u52a1\u5f88\u7c97\u9c81"
    changed = [own.replace("\u5f88", "\u975e"), own + "\u4e86", "\u623f\u95f4\u5e72\u51c0"]
    look = look_at_pool(Pool(tuple((text,) for text in changed)), [own])
    assert (look.own_rows, look.near_own_rows) == (0, 2)


def test_156_long_rows_push_nothing_off_the_screen(teaching: Parties) -> None:
    owner = Owner(teaching.files["hotel"])
    owner.workbench.__dict__["pool_look"] = look_at_pool(Pool((("word " * 20_000,),)), ["word"])
    text = consent_text(owner)
    assert "... (99,000 more characters)" in " ".join(text.replace(QUOTE, " ").split())
    assert len(text) < 20_000


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


def test_156_rows_that_ask_around_an_own_row_are_counted() -> None:
    """One word changed, added or left out: what a model says of these beside its own row shows whether it knows it."""
    own = "the lobby was rude to us"
    changed = [f"the lobby was {word} to us" for word in ("kind", "nice", "loud")]
    around = [*changed, "the lobby was very rude to us", "the lobby was rude to", "nothing like it"]
    look = look_at_pool(Pool(tuple((text,) for text in around)), [own, "a b c d e f"])
    assert (look.own_rows, look.near_own_rows, look.variants) == (0, 5, 3)
    assert look.varied in changed
    words = Pool(tuple(tuple(text.split()) for text in around), has_words=True)
    assert look_at_pool(words, [own]).near_own_rows == 5
    assert look_at_pool(words, [around[-1]]).nearest[0] == (around[-1], 1.0)


def test_156_who_consents_reads_how_many_rows_ask_around_its_own(teaching: Parties) -> None:
    owner = Owner(teaching.files["hotel"])
    own = [content.decode() for content in owner.workbench.data.contents()]
    asked = tuple((f"{text} today",) for text in dict.fromkeys(own))
    owner.workbench.__dict__["pool_look"] = look_at_pool(Pool(asked), own)
    warnings = consent_text(owner).partition("BEFORE YOU SAY YES")[2]
    assert f"{len(asked):,} ROWS OF THE POOL DIFFER FROM ROWS OF YOURS IN ONE WORD AT MOST" in warnings


def test_156_an_own_image_that_was_changed_a_little_is_one_s_own(tmp_path: Path) -> None:
    """Saved anew, in another size, with one pixel changed, or pale; another image is not."""
    chance = np.random.default_rng(0)
    fields = [chance.integers(0, 256, (6, 6, 3)) for _ in range(2)]
    own, other = (Image.fromarray(np.kron(each, np.ones((8, 8, 1))).astype(np.uint8)) for each in fields)
    dotted = own.copy()
    dotted.putpixel((3, 3), (255, 255, 255))
    dimmed = own.point(lambda shade: 60 + shade // 4)
    asked = [saved(own, "JPEG"), saved(own.resize((91, 91)), "PNG"), saved(dotted, "PNG"), saved(dimmed, "PNG")]
    asked.append(saved(other, "PNG"))
    pool = ImagePool(tuple(ImageFile(f"row {number}", each) for number, each in enumerate(asked)))
    look = look_at_images(pool, [thumbnail(ImageFile("own", saved(own, "PNG")))])
    assert (look.own_rows, look.variants) == (4, 4)
    assert set(look.nearest_rows[:4]) == {1, 2, 3, 4}
    write_sheet(pool, look.nearest_rows, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_mode & 0o077 == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (800, 172)


# --- 157: an owner that shouts ---


@pytest.mark.parametrize(
    "task",
    [
        Task(labels=("a", "b", "c")),
        Task(problem_type="multi_label_classification", labels=("a", "b", "c")),
        Task(problem_type="regression", labels=("a", "b", "c"), target_range=(-1.0, 1.0)),
    ],
)
def test_157_no_model_of_an_honest_owner_decides_alone_by_large_outputs(task: Task) -> None:
    outputs = np.array([[1e6, -np.inf, -1e6], [-1e6, 0.5, 1e6]], np.float32)
    loud = as_summed(outputs, np.array([True, False, True]), task)
    np.testing.assert_array_equal(loud, [[1, 0, 0], [0, 0, 1]])


@pytest.mark.parametrize("weights", ["alike", "density"])
def test_157_nor_a_dishonest_one_that_gives_every_label_a_probability_of_1(weights: str) -> None:
    """No single number of the total is too large for the three of them."""
    table = DistillTable.model_validate({"pool": "pool.jsonl", "rows": 5, "start": "base", "weights": weights})
    settings = merge_settings(plan_for(3, [2]), distill=table)
    layout, known = DISTILL.layout(settings), np.array([True] * 2)
    honest = Predictions(numbers=np.full((5, 2), 0.5, np.float32), known=known, closeness=np.ones(5))
    loud = replace(honest, numbers=np.ones((5, 2), np.float32))
    for last in (honest, loud):
        vector, part = np.zeros(layout.size), np.zeros(layout.size)
        for each in (honest, honest, last):
            layout.flatten(DISTILL.predicted(settings, each), part)
            vector += part
        total = Total(layout=layout, vector=vector, owners=("ada", "bea", "cyd"), roster_size=3)
        with pytest.raises(NumericalError, match="add up to what no models") if last is loud else nullcontext():
            check_contributions(total, layout, settings)


# --- 158: a row that is near one owner alone ---


def test_158_by_closeness_a_row_near_one_owner_alone_is_answered_by_that_owner() -> None:
    """A documented break: the sum over all owners is nearly what it says. Whose they are, it does not tell."""
    random, table = np.random.default_rng(0), DistillTable(pool="pool.jsonl", rows=5, weights="density")
    settings = merge_settings(plan_for(3, [2]), distill=table)
    known, total = np.array([True] * 2), np.zeros((5, 2))
    first, *others = (
        Predictions(
            numbers=as_summed(random.standard_normal((5, 2)).astype(np.float32), known, Task(labels=("a", "b"))),
            known=known,
            closeness=np.full(5, closeness),
        )
        for closeness in (1.0, 0.0, 0.0)
    )
    for each in (first, *others):
        total += dict(DISTILL.predicted(settings, each))["predictions"]
    assert np.abs(total - first.numbers).max() < len(others) * LEAST_CLOSENESS
    assert any(
        "the total shows what that owner's model alone says" in line for line in DISTILL.disclosures(settings.tables)
    )


# --- 159 to 162: words and images that are no honest question ---


def test_159_a_word_that_others_do_not_read_is_asked_of_nobody(tmp_path: Path) -> None:
    """If two of three tokenizers drop a word, what is summed of it is the third owner's alone."""
    words = make_tokenizer()
    words.backend_tokenizer.normalizer = normalizers.Replace("\u25cb", "")
    reader = PoolReader(
        task=Task(kind="token-classification", labels=("a", "b")),
        table=DistillTable(pool="pool.jsonl"),
        tokenizer=words,
        max_tokens=16,
        embeddings=1000,
    )
    with pytest.raises(
        DataError,
        match=r"row 2: this model's tokenizer drops .* entirely; the sum for this word would",
    ):
        reader.read(Pool((("the", "room"), ("the", "\u25cb", "room")), has_words=True))
    path = tmp_path / "pool.jsonl"
    path.write_text(json.dumps({"tokens": ["the", "\u200b", "room"]}) + "\n")
    with pytest.raises(DataError, match="row 1: word 2 has no visible characters"):
        pin_pool(path, DistillTable(pool="pool.jsonl"), "token-classification")


def test_160_a_pool_reads_no_other_file(tmp_path: Path) -> None:
    """An owner's own image beside the pool, or anywhere, is not shown to its model because a row names it."""
    (tmp_path / "own.png").write_bytes(saved(Image.new("RGB", (8, 8)), "PNG"))
    table = DistillTable(pool="pool.parquet")
    for cells in (["own.png"], [{"bytes": None, "path": "own.png"}], [{"path": str(tmp_path / "own.png")}]):
        with pytest.raises(DataError, match="row 1: must hold the bytes of its image; a path is not followed"):
            pin_pool(images_of(tmp_path / "pool.parquet", *cells), table, "image-classification")
    (tmp_path / "pool.csv").write_text("image\nown.png\n")
    with pytest.raises(DataError, match="a path is not followed"):
        pin_pool(tmp_path / "pool.csv", DistillTable(pool="pool.csv"), "image-classification")


def test_161_images_that_unpack_to_much_are_refused_before_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = saved(Image.new("L", (8, 8)), "PNG")
    header = small[12:16] + (12_000).to_bytes(4) * 2 + small[24:29]
    huge = small[:12] + header + crc32(header).to_bytes(4) + small[33:]
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("was unpacked"))
    table = DistillTable(pool="pool.parquet")
    with pytest.raises(DataError, match="has more than 100,000,000 pixels"):
        pin_pool(images_of(tmp_path / "pool.parquet", huge), table, "image-classification")
    monkeypatch.setattr(common.pool, "MAX_PIXELS", 100)
    with pytest.raises(DataError, match="its images have more than 100 pixels"):
        pin_pool(images_of(tmp_path / "pool.parquet", small, small), table, "image-classification")


def test_161_images_that_a_model_reads_large_are_refused_before_there_is_room_for_them() -> None:
    reader = PoolReader(
        task=Task(kind="image-classification", labels=("a", "b")),
        table=DistillTable(pool="pool.npz"),
        shape=(3, 10_000, 10_000),
    )
    with pytest.raises(DataError, match="its 20 images take 24000000000 bytes as this model reads them"):
        reader.read(ImagePool(tuple(ImageFile("row", b"") for _ in range(20))))


def test_162_a_small_pool_that_unpacks_to_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common.pool, "MAX_BYTES", 10_000)
    rows = "".join(json.dumps({"text": f"row {number} " + "x" * 90}) + "\n" for number in range(1000))
    (tmp_path / "pool.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    np.savez_compressed(tmp_path / "pool.npz", image=np.zeros((1000, 8, 8), np.uint8))
    repeated = pa.table({"text": ["x" * 90_000] * 10})
    pyarrow.parquet.write_table(repeated, tmp_path / "pool.parquet", use_dictionary=False, compression="zstd")
    kinds: dict[str, TaskKind] = {
        "pool.jsonl.gz": "text-classification",
        "pool.npz": "image-classification",
        "pool.parquet": "text-classification",
    }
    for name, kind in kinds.items():
        assert (tmp_path / name).stat().st_size < 10_000
        with pytest.raises(DataError, match=r"over 10000 bytes in all|bytes unpacked, at most 10000 are allowed"):
            pin_pool(tmp_path / name, DistillTable(pool=name), kind)


def written_as(path: Path, table: pa.Table, compression: str | None = None) -> Path:
    with pa.ipc.new_stream(path, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as file:
        file.write_table(table)
    return path


@pytest.mark.parametrize("end", [200, -9])
def test_162_an_arrow_file_does_not_read_the_memory_beside_it(tmp_path: Path, end: int) -> None:
    """Arrow trusts the offsets in its files: a row is what lies behind the file, or, far from it, the process dies."""
    path = written_as(tmp_path / "pool.arrow", pa.table({"text": ["hello", "world-12345"]}))
    honest, forged = (np.array(offsets, np.int32).tobytes() for offsets in ([0, 5, 16], [0, 5, end]))
    assert path.read_bytes().count(honest) == 1
    path.write_bytes(path.read_bytes().replace(honest, forged))
    with pytest.raises(DataError, match="cannot be read as Arrow"):
        pin_pool(path, DistillTable(pool="pool.arrow"), "text-classification")


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_162_a_compressed_arrow_file_is_refused_before_it_is_unpacked(tmp_path: Path, compression: str) -> None:
    """Arrow unpacks a whole batch, also of columns that nobody asks for, before it can be measured."""
    rows = pa.table({"text": [f"row {number}" for number in range(5)], "other": ["x" * 100_000] * 5})
    path = written_as(tmp_path / "pool.arrow", rows, compression)
    with pytest.raises(DataError, match="cannot be read as Arrow\nhint: check that it is complete and not compressed"):
        pin_pool(path, DistillTable(pool="pool.arrow"), "text-classification")
    assert pin_pool(written_as(path, rows), DistillTable(pool="pool.arrow"), "text-classification").rows == 5


def test_162_what_a_table_says_once_counts_in_each_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common.pool, "MAX_BYTES", 500_000)
    once = pa.DictionaryArray.from_arrays(pa.array([0] * 100, pa.int32()), pa.array(["x" * 90_000]))
    written_as(tmp_path / "pool.arrow", pa.table({"text": once}))
    with pytest.raises(DataError, match="would take 9000800 bytes unpacked, at most 500000 are allowed"):
        pin_pool(tmp_path / "pool.arrow", DistillTable(pool="pool.arrow"), "text-classification")
    pyarrow.parquet.write_table(pa.table({"text": ["x" * 90_000] * 1000}), tmp_path / "pool.parquet")
    with pytest.raises(DataError, match=r"would take (\d+) bytes unpacked, at most 500000 are allowed") as refused:
        pin_pool(tmp_path / "pool.parquet", DistillTable(pool="pool.parquet"), "text-classification")
    assert int(str(refused.value).partition("would take ")[2].split()[0]) < 5 * 500_000


@pytest.mark.parametrize(
    "values",
    [
        pa.array([[None] * 50], pa.list_(pa.null(), 50)),
        pa.array([["a", "b"]], pa.list_view(pa.string())),
        pa.RunEndEncodedArray.from_arrays(pa.array([50], pa.int32()), pa.array(["a"])),
    ],
    ids=["fixed lists", "views", "runs"],
)
def test_162_columns_of_which_little_is_stored_are_refused(tmp_path: Path, values: pa.Array) -> None:
    path = written_as(tmp_path / "pool.arrow", pa.table({"tokens": values}))
    with pytest.raises(DataError, match="column 'tokens' is not text, bytes or lists"):
        pin_pool(path, DistillTable(pool="pool.arrow"), "token-classification")


@pytest.mark.parametrize("images", [np.full((1, 2, 2), 1e300), np.zeros((1, 0, 8)), np.full((2, 2), 1.0)])
def test_162_arrays_that_are_no_images_for_a_model_are_refused(tmp_path: Path, images: np.ndarray) -> None:
    np.savez(tmp_path / "pool.npz", image=images)
    with pytest.raises(DataError, match="of numbers that are finite in 32 bits"):
        pin_pool(tmp_path / "pool.npz", DistillTable(pool="pool.npz"), "image-classification")


def test_162_an_array_has_no_more_rows_than_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common.pool, "MAX_ROWS", 99)
    np.savez(tmp_path / "pool.npz", image=np.arange(100).reshape(100, 1, 1))
    with pytest.raises(DataError, match="a pool has at most 99 rows"):
        pin_pool(tmp_path / "pool.npz", DistillTable(pool="pool.npz"), "image-classification")


def test_162_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pool.jsonl")
    writer = os.open(tmp_path / "pool.jsonl", os.O_RDWR)
    end_of_file = Timer(2, os.close, [writer])  # so that this test ends, too, where the check is gone
    end_of_file.start()
    with pytest.raises(DataError, match="is a pipe or a device"):
        pin_pool(tmp_path / "pool.jsonl", DistillTable(pool="pool.jsonl"), "text-classification")
    end_of_file.cancel()


def saved(image: Image.Image, form: str) -> bytes:
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()
