"""The pool as models read it: files of every type, words as units, images, and some tokens of each text."""

import gzip
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import ipc
from transformers import LlamaConfig, LlamaForCausalLM

from common.agreement import Task, TaskKind
from common.data.images import ImageFile
from common.errors import DataError, ModelError
from common.merge_methods.distill import DistillTable
from common.pool import ImagePool, Pool, pin_pool, read_pool
from common.pool_rows import PoolReader, PoolRows, _spread, check_counts, vocabulary_of
from deploy.example.reviews import make_tokenizer
from tests.support.lessons import SIZES, png, tokenizer_of_letters

WORDS, LETTERS = make_tokenizer(), tokenizer_of_letters()
TAGGED = Task(kind="token-classification", labels=("a", "b"))
PICTURES = Task(kind="image-classification", labels=("a", "b"))
NEXT = Task(kind="causal-lm")


def reader(task: Task, tokenizer: Any = WORDS, max_tokens: int = 16, **table: Any) -> PoolReader:
    return PoolReader(
        task=task,
        table=DistillTable(pool="pool", **table),
        tokenizer=tokenizer,
        max_tokens=max_tokens,
        embeddings=1000,
        shape=(3, 8, 8),
    )


# --- files ---


def as_arrow(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    with ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def as_parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue()


def as_lines(table: pa.Table) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode()


FORMS: Mapping[str, Callable[[pa.Table], bytes]] = {
    "pool.jsonl": as_lines,
    "pool.jsonl.gz": lambda table: gzip.compress(as_lines(table)),
    "pool.json": lambda table: json.dumps(table.to_pylist()).encode(),
    "pool.parquet": as_parquet,
    "pool.arrow": as_arrow,
}


@pytest.mark.parametrize("name", FORMS)
def test_a_pool_is_a_file_of_any_type_that_an_owner_s_rows_may_have(name: str, tmp_path: Path) -> None:
    table = pa.table({"text": ["good", "bad\nroom"], "tokens": [["a", "b"], ["c"]], "label": [1, 2]})
    (tmp_path / name).write_bytes(FORMS[name](table))
    for kind, texts in (
        ("text-classification", (("good",), ("bad\nroom",))),
        ("token-classification", (("a", "b"), ("c",))),
    ):
        pinned = pin_pool(tmp_path / name, DistillTable(pool=name), kind)  # type: ignore[arg-type]
        pool = read_pool(tmp_path / name, pinned, kind)  # type: ignore[arg-type]
        assert isinstance(pool, Pool)
        assert pool.texts == texts
        assert (pinned.rows, pinned.asked) == (2, 3 if pool.has_words else 2)


def test_a_pool_of_texts_may_be_csv_and_one_of_words_conll(tmp_path: Path) -> None:
    (tmp_path / "pool.csv").write_text("text;label\ngood;1\n'bad, very';2\n")
    pinned = pin_pool(tmp_path / "pool.csv", DistillTable(pool="pool.csv"), "text-classification")
    assert pinned.rows == 2
    (tmp_path / "pool.conll").write_text("the X O\nroom Y B\n\nbad Z O\n")
    pinned = pin_pool(tmp_path / "pool.conll", DistillTable(pool="pool.conll"), "token-classification")
    assert (pinned.rows, pinned.asked) == (2, 3)


def test_a_copy_under_another_name_is_read_as_the_agreed_file(tmp_path: Path) -> None:
    """The same bytes would otherwise be other rows at one owner."""
    (tmp_path / "pool.jsonl").write_text('{"tokens": ["a", "b"]}\n')
    pinned = pin_pool(tmp_path / "pool.jsonl", DistillTable(pool="pool.jsonl"), "token-classification")
    (tmp_path / "pool.jsonl").rename(tmp_path / "copy.conll")
    pool = read_pool(tmp_path / "copy.conll", pinned, "token-classification")
    assert isinstance(pool, Pool)
    assert pool.texts == (("a", "b"),)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([["a"], "b"], "row 2: 'tokens' must be a list of words"),
        ([[]], "row 1: 'tokens' must be a list of words"),
        ([["a", " "]], "row 1: 'tokens' must be a list of words"),
        ([["a", 3]], "row 1: 'tokens' must be a list of words"),
        ([["a" * 60_000, "b" * 60_000]], "row 1: 'tokens' must be a list of words"),
        ([["a", "\ud800"]], "row 1: 'tokens' must be a list of words"),
    ],
)
def test_malformed_rows_of_words_are_named(tmp_path: Path, rows: list[Any], says: str) -> None:
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps({"tokens": row}) + "\n" for row in rows))
    with pytest.raises(DataError, match=says):
        pin_pool(tmp_path / "pool.jsonl", DistillTable(pool="pool.jsonl"), "token-classification")


def test_a_folder_is_no_pool_and_a_file_of_another_type_is_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    with pytest.raises(DataError, match=r"is a folder, and a pool is one file\nhint: save a data set"):
        pin_pool(tmp_path / "pool", DistillTable(pool="pool"), "text-classification")
    (tmp_path / "pool.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match="unknown file type"):
        pin_pool(tmp_path / "pool.xlsx", DistillTable(pool="pool.xlsx"), "text-classification")


# --- words ---


def test_a_word_is_predicted_once_whatever_tokens_it_has() -> None:
    pool = Pool((("the", "room", "was", "clean"), ("a", "film")), has_words=True)
    for tokenizer in (WORDS, LETTERS):
        rows = reader(TAGGED, tokenizer, max_tokens=32).read(pool)
        assert rows.counts.tolist() == [4, 2]
        (batch, places) = rows.batch(np.array([1, 0]))
        assert places is not None
        first = batch["input_ids"][places].tolist()
        spelt = [word if tokenizer is WORDS else word[0] for word in ("a", "film", "the", "room", "was", "clean")]
        assert first == tokenizer.convert_tokens_to_ids(
            [each if each in tokenizer.get_vocab() else tokenizer.unk_token for each in spelt]
        )
        assert rows.predictions_of(np.array([1, 0])).tolist() == [4, 5, 0, 1, 2, 3]


@settings(max_examples=15)
@given(
    st.lists(
        st.lists(st.sampled_from(["room", "bed", "unheard", "x"]), min_size=1, max_size=30), min_size=1, max_size=4
    )
)
def test_every_word_has_a_prediction_however_short_a_model_reads(rows: list[list[str]]) -> None:
    pool = Pool(tuple(map(tuple, rows)), has_words=True)
    for tokenizer in (WORDS, LETTERS):
        found = reader(TAGGED, tokenizer, max_tokens=9).read(pool)
        assert int(found.counts.sum()) == sum(map(len, rows))
        assert max(len(part["input_ids"]) for part in found.features) <= 9
        words = [word for row in rows for word in row]
        assert tokenizer is LETTERS or _predicted(found) == WORDS.convert_tokens_to_ids(
            [word if word in WORDS.get_vocab() else "[UNK]" for word in words]
        )


def _predicted(rows: PoolRows) -> list[int]:
    assert rows.marks is not None
    parts = zip(rows.features, rows.marks, strict=True)
    return [token for row, marks in parts for token, mark in zip(row["input_ids"], marks, strict=True) if mark]


def test_a_model_without_a_fast_tokenizer_reads_no_words() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="has no fast tokenizer"):
        reader(TAGGED, Slow()).read(Pool((("a",),), has_words=True))


def test_tokens_beyond_a_model_are_named() -> None:
    few = PoolReader(task=TAGGED, table=DistillTable(pool="pool"), tokenizer=WORDS, max_tokens=16, embeddings=5)
    with pytest.raises(DataError, match="row 1 gives a token beyond the model's 5"):
        few.read(Pool((("the", "room"),), has_words=True))


# --- next tokens ---


@given(st.integers(1, 60), st.integers(1, 20))
def test_a_text_is_asked_about_evenly_where_it_goes_on(length: int, most: int) -> None:
    places = np.flatnonzero(_spread(length, most))
    assert len(places) == min(most, max(1, length - 1))
    assert places[-1] <= max(0, length - 2)
    assert len(places) < 2 or np.ptp(np.diff(places)) <= 1


def test_the_agreed_number_of_tokens_is_asked_about() -> None:
    pool = Pool((("the room was clean",), ("the film",)))
    rows = reader(NEXT, positions=2).read(pool)
    check_counts(rows, DistillTable(pool="pool", rows=2, predictions=4))
    with pytest.raises(DataError, match="has 4 predictions as this model reads it, the agreement says 5"):
        check_counts(rows, DistillTable(pool="pool", rows=2, predictions=5))


def test_a_vocabulary_is_the_tokenizer_s_even_if_outputs_are_padded(tmp_path: Path) -> None:
    WORDS.save_pretrained(tmp_path)
    for padding in (3, -3):
        config = LlamaConfig(**SIZES, vocab_size=len(WORDS) + padding, num_key_value_heads=1)
        if padding > 0:
            assert vocabulary_of(tmp_path, LlamaForCausalLM(config)) == len(WORDS)
        else:
            with pytest.raises(ModelError, match=r"predicts .* tokens, and its tokenizer has"):
                vocabulary_of(tmp_path, LlamaForCausalLM(config))


# --- images ---


def test_images_are_read_in_a_model_s_own_size_from_files_or_arrays(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    files = ImagePool(tuple(ImageFile("row", png(Image.fromarray(each))) for each in pixels))
    found = reader(PICTURES).read(files)
    np.testing.assert_array_equal(found.features, pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    assert (found.marks, found.counts.tolist()) == (None, [1, 1])
    np.savez(tmp_path / "pool.npz", image=pixels.transpose(0, 3, 1, 2))
    pinned = pin_pool(tmp_path / "pool.npz", DistillTable(pool="pool.npz"), "image-classification")
    arrays = read_pool(tmp_path / "pool.npz", pinned, "image-classification")
    np.testing.assert_array_equal(reader(PICTURES).read(arrays).features, found.features)
    assert isinstance(arrays, ImagePool)
    np.testing.assert_allclose(arrays.thumbnails, files.thumbnails, atol=1e-5)
    larger = PoolReader(task=PICTURES, table=DistillTable(pool="pool"), shape=(3, 12, 12))
    assert larger.read(files).features.shape == (2, 3, 12, 12)  # type: ignore[union-attr]
    with pytest.raises(DataError, match=r"its arrays are \(3, 8, 8\), and this model takes \(3, 12, 12\)"):
        larger.read(arrays)


@pytest.mark.parametrize("array", [np.zeros(3), np.full((2, 8, 8), np.nan), np.array([["a"]])])
def test_arrays_that_are_no_images_are_refused(array: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "pool.npz", image=array)
    kind: TaskKind = "image-classification"
    with pytest.raises(DataError, match="must be an array of images"):
        pin_pool(tmp_path / "pool.npz", DistillTable(pool="pool.npz"), kind)


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    whole = png(Image.new("RGB", (8, 8)))
    pyarrow.parquet.write_table(pa.table({"image": [whole, whole[:40]]}), tmp_path / "pool.parquet")
    with pytest.raises(DataError, match=r"row 2: cannot be read as an image"):
        pin_pool(tmp_path / "pool.parquet", DistillTable(pool="pool.parquet"), "image-classification")
