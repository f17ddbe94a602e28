"""Private examples: what is read, and how unusable rows are refused without quoting them."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client.data.lengths import cut_in_words
from client.data.private_data import PrivateData
from client.data.readers import features
from client.settings import Data
from common.agreement import Reading, Task
from common.data.files import Draw, read_arrays, read_columns
from common.errors import DataError
from common.models.folders import load_tokenizer
from common.models.loading import load_base
from common.models.padding import padded
from deploy.demo.digits import train_base
from deploy.example.reviews import LABELS, make_tokenizer

TASK = Task(labels=LABELS, max_tokens=8)
ANYTHING = Reading(max_empty=1, max_equal=1, max_unknown=1)  # few rows, of few words
ROWS = [
    {"text": f"the room was {word}", "label": label} for word, label in (("clean", "positive"), ("rude", "negative"))
] * 10


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def data_of(folder: Path, reviews_folder: Path, train: str, *, task: Task = TASK, **settings: object) -> PrivateData:
    data = Data(**{"train": Path(train), "test": Path(train), "validation": Path(train), **settings})  # type: ignore[arg-type]
    base = load_base(reviews_folder / "base", TASK, seed=0)
    tokenizer = load_tokenizer(reviews_folder / "base")
    return PrivateData(data=data, task=task, model=base, tokenizer=tokenizer, folder=folder, seed=0, reading=ANYTHING)


def separated(by: str, end: str = "\n") -> str:
    return end.join(["text" + by + "label", *(f'"{row["text"]}"{by}{row["label"]}' for row in ROWS), ""])


def write_saved(folder: Path, *, whole: bool = True) -> None:
    """As `datasets.Dataset.save_to_disk` writes a data set: Arrow streams, and a list of them."""
    folder.mkdir(parents=True)
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, rows in zip(names, (ROWS[:7], ROWS[7:]), strict=True):
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))


def write_parts(folder: Path) -> None:
    for part, rows in enumerate((ROWS[:4], ROWS[4:])):
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / f"train-{part}-of-2.parquet")


def write_arrow_file(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(path, table.schema) as file:
        file.write_table(table)


JSON_LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
FORMS = {
    "rows.jsonl": lambda path: path.write_text(JSON_LINES),
    "rows.ndjson": lambda path: path.write_text(JSON_LINES),
    "ROWS.JSONL": lambda path: path.write_text(JSON_LINES),
    "bom.jsonl": lambda path: path.write_text("\ufeff" + JSON_LINES),
    "windows.jsonl": lambda path: path.write_text(JSON_LINES.replace("\n", "\r\n"), newline=""),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(JSON_LINES.encode())),
    "lines.json": lambda path: path.write_text(JSON_LINES),
    "list.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "list.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "rows.csv": lambda path: pyarrow.csv.write_csv(pa.Table.from_pylist(ROWS), path),
    "excel.csv": lambda path: path.write_text("\ufeff" + separated(";", "\r\n"), newline=""),
    "Rows.Csv.GZ": lambda path: path.write_bytes(gzip.compress(separated(",").encode())),
    "bars.csv": lambda path: path.write_text(separated("|")),
    "rows.tsv": lambda path: path.write_text(separated("\t")),
    "commas.tsv": lambda path: path.write_text(separated(",")),
    "rows.parquet": lambda path: pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path),
    "rows.arrow": write_arrow_file,
    "saved": write_saved,
    "train-*.parquet": lambda path: write_parts(path.parent),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_file_gives_the_same_examples(name: str, tmp_path: Path, reviews_folder: Path) -> None:
    FORMS[name](tmp_path / name)
    rows = data_of(tmp_path, reviews_folder, name).train()
    assert rows.targets.tolist() == [1, 0] * 10
    assert len(rows.features[0]["input_ids"]) == 6  # [CLS] the room was clean [SEP]


@pytest.mark.parametrize("name", ["rows.jsonl", "list.json", "rows.parquet", "rows.arrow"])
def test_a_dotted_name_is_a_field_of_a_nested_column(name: str, tmp_path: Path, reviews_folder: Path) -> None:
    nested = [{"review": {"said": {"text": row["text"]}}, "a.b": row["label"]} for row in ROWS]
    path = tmp_path / name
    if path.suffix == ".jsonl":
        write_jsonl(path, nested)
    elif path.suffix == ".json":
        path.write_text(json.dumps(nested))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(nested), path)
    else:
        table = pa.Table.from_pylist(nested)
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    columns = {"text": "review.said.text", "label": "a.b"}  # a name may have a dot of its own
    assert data_of(tmp_path, reviews_folder, name, **columns).train().targets.tolist() == [1, 0] * 10
    for missing in ("review.text", "review.said.text.more", "a.c", "b.text"):
        with pytest.raises(DataError, match=r"has no (column|field)"):
            data_of(tmp_path, reviews_folder, name, text=missing, label="a.b").train()


def test_what_separates_a_csv_s_values_is_said_once(
    tmp_path: Path, reviews_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "excel.csv").write_text(separated(";"))
    data = data_of(tmp_path, reviews_folder, "excel.csv")
    with caplog.at_level("INFO", logger="amalgram"):
        data.train()
        data.test()
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'excel.csv'}: its values are separated by semicolons"
    ]


def test_a_file_that_excel_saved_as_unicode_text_is_told_from_utf_8(tmp_path: Path, reviews_folder: Path) -> None:
    (tmp_path / "rows.tsv").write_bytes(separated("\t").encode("utf-16"))
    with pytest.raises(DataError, match="is UTF-16, not UTF-8"):
        data_of(tmp_path, reviews_folder, "rows.tsv").train()


def test_a_folder_of_several_splits_asks_for_one(tmp_path: Path, reviews_folder: Path) -> None:
    write_saved(tmp_path / "saved" / "test")
    (tmp_path / "saved" / "dataset_dict.json").write_text("{}")
    with pytest.raises(DataError, match="holds several splits: test") as caught:
        data_of(tmp_path, reviews_folder, "saved").train()
    assert str(tmp_path / "saved" / "test") in caught.value.hint
    assert len(data_of(tmp_path, reviews_folder, "saved/test").train()) == 20


@pytest.mark.parametrize("state", ['{"_data_files": [{"filename": "../x.arrow"}]}', "[]", "{", '{"_data_files": []}'])
def test_a_saved_folder_names_files_of_its_own_alone(state: str, tmp_path: Path, reviews_folder: Path) -> None:
    write_saved(tmp_path / "x")
    (tmp_path / "x" / "data-00000-of-00002.arrow").replace(tmp_path / "x.arrow")
    (tmp_path / "x" / "state.json").write_text(state)
    with pytest.raises(DataError, match=r"is a folder, but not one|names no files of this folder"):
        data_of(tmp_path, reviews_folder, "x").train()


def test_rows_are_drawn_from_the_whole_file_and_the_same_ones_whatever_is_asked_for(tmp_path: Path) -> None:
    rows = [{"a": number, "b": -number} for number in range(5000)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    drawn = read_columns(tmp_path / "rows.jsonl", ["a"], 500)["a"]
    assert drawn == sorted(drawn)
    assert len(set(drawn)) == 500
    assert 2300 < np.mean(drawn) < 2700  # 2499.5, with a standard error of 61
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert read_columns(tmp_path / "rows.parquet", ["b", "a"], 500)["a"] == drawn
    assert read_columns(tmp_path / "rows.jsonl", ["a"], 5000)["a"] == list(range(5000))
    np.savez(tmp_path / "rows.npz", a=np.arange(5000), b=-np.arange(5000))
    first, second = read_arrays(tmp_path / "rows.npz", ["a", "b"], 500)
    assert (first == -second).all()
    assert len(set(first.tolist())) == 500
    assert 2300 < first.mean() < 2700


@given(total=st.integers(1, 60), count=st.integers(1, 60), batch=st.integers(1, 20))
def test_a_draw_keeps_as_many_rows_as_it_may_in_their_order(total: int, count: int, batch: int) -> None:
    draw = Draw(count)
    for start in range(0, total, batch):
        numbers = list(range(start, min(start + batch, total)))
        draw.add({"a": numbers}, len(numbers))
    kept = draw.columns(["a"])["a"]
    assert len(kept) == min(total, count)
    assert kept == sorted(set(kept))


def test_columns_may_have_other_names_labels_may_be_numbers_and_texts_may_be_pairs(
    tmp_path: Path, reviews_folder: Path
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"q": "the room", "a": "was clean", "stars": 1}] * 3)
    rows = data_of(tmp_path, reviews_folder, "rows.jsonl", text="q", text_pair="a", label="stars").train()
    assert rows.targets.tolist() == [1, 1, 1]
    assert len(rows.features[0]["input_ids"]) == 7


def test_a_csv_file_in_another_encoding_is_refused(tmp_path: Path, reviews_folder: Path) -> None:
    (tmp_path / "rows.csv").write_bytes("text,label\ncaf\xe9,1\n".encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8"):
        data_of(tmp_path, reviews_folder, "rows.csv").train()


def test_csv_values_are_text_whatever_they_look_like(tmp_path: Path, reviews_folder: Path) -> None:
    (tmp_path / "rows.csv").write_text('text,label\n2026-01-01,1\n12,0\n"a, ""quoted""\nroom",positive\n')
    assert data_of(tmp_path, reviews_folder, "rows.csv").train().targets.tolist() == [1, 0, 1]


def test_a_numbered_label_may_have_blanks_and_a_fraction_of_zero(tmp_path: Path, reviews_folder: Path) -> None:
    pyarrow.parquet.write_table(pa.table({"text": ["room", "bed"], "label": ["1.0 ", "0"]}), tmp_path / "rows.parquet")
    assert data_of(tmp_path, reviews_folder, "rows.parquet").train().targets.tolist() == [1, 0]


def test_numbers_are_not_labels_if_a_label_s_name_is_a_number(tmp_path: Path, reviews_folder: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "room", "label": 1}, {"text": "bed", "label": 0}])
    stars = Task(labels=("1", "2"))
    with pytest.raises(DataError, match=r"row 2: its label is none of 1, 2: '0'\n"):
        data_of(tmp_path, reviews_folder, "rows.jsonl", task=stars).train()


def test_a_hint_says_where_other_labels_are_written(tmp_path: Path, reviews_folder: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "room", "label": "SECRET"}])
    shared, private = (Task(labels=("no", "yes"), head=head) for head in ("shared", "private"))
    with pytest.raises(DataError) as caught:
        data_of(tmp_path, reviews_folder, "rows.jsonl", task=shared).train()
    assert "save the base without it (AutoModel), with its tokenizer, name that as the base" in caught.value.hint
    with pytest.raises(DataError) as caught:
        data_of(tmp_path, reviews_folder, "rows.jsonl", task=private).train()
    assert "labels of this owner's head in its settings, above the first [table]: labels = [" in caught.value.hint


def test_true_false_and_null_are_read_as_json_writes_them(tmp_path: Path, reviews_folder: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "room", "label": True}, {"text": "bed", "label": None}])
    write_jsonl(tmp_path / "first.jsonl", [{"text": "room", "label": True}])
    labels = Task(labels=("true", "None"))
    assert data_of(tmp_path, reviews_folder, "first.jsonl", task=labels).train().targets.tolist() == [0]
    with pytest.raises(DataError, match="row 2: its label is none of"):
        data_of(tmp_path, reviews_folder, "rows.jsonl", task=labels).test()


def test_one_file_for_two_splits_keeps_both_limits(tmp_path: Path, reviews_folder: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "a", "label": 0}] * 5 + [{"text": "b", "label": 1}])
    assert data_of(tmp_path, reviews_folder, "rows.jsonl", max_test_rows=2).label_set().tolist() == [0, 1]


def test_long_texts_are_cut_and_rows_are_limited(tmp_path: Path, reviews_folder: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "room " * 500, "label": "positive"}] * 5)
    rows = data_of(tmp_path, reviews_folder, "rows.jsonl", max_train_rows=2).train()
    assert len(rows) == 2
    assert len(rows.features[0]["input_ids"]) == 8


def test_what_is_odd_about_the_files_is_told_to_their_owner_alone(
    tmp_path: Path, reviews_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = ["room"] * 8 + ["room " * 500, "bed " * 1000]
    write_jsonl(tmp_path / "rows.jsonl", [{"text": text, "label": "positive"} for text in texts])
    data = data_of(tmp_path, reviews_folder, "rows.jsonl")
    assert list(data.oddities()) == [
        "rows.jsonl: 10 of 10 test rows are training rows, too, so metrics on them say little about others",
        "rows.jsonl: 2 of 10 texts are longer than max_tokens = 8 and are cut; the longest has 1,002 tokens; 99% have "
        "at most 1,002",
    ]
    with caplog.at_level("DEBUG", logger="amalgram"):
        data.train()
    assert caplog.records == []  # logs of a run hold no number of rows


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ([1, 8], ""),
        ([1, 9], "1 of 2 texts is longer than max_tokens = 8 and is cut; the longest has 9 tokens; 99% have at most 9"),
        ([3] * 999 + [20], "1 of 1,000 texts is longer than max_tokens = 8 and is cut; the longest has 20 tokens"),
    ],
)
def test_cut_texts_are_told_in_words(lengths: list[int], words: str) -> None:
    assert cut_in_words(lengths, 8) == words


def test_without_a_validation_file_a_tenth_is_set_aside(tmp_path: Path, reviews_folder: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "room " * (index + 1), "label": "positive"} for index in range(20)])
    data = data_of(tmp_path, reviews_folder, "rows.jsonl", validation=None, task=Task(labels=LABELS, max_tokens=60))
    lengths = [sorted(len(row["input_ids"]) for row in rows.features) for rows in (data.train(), data.validation())]
    assert [len(kept) for kept in lengths] == [18, 2]
    assert sorted(lengths[0] + lengths[1]) == list(range(3, 23))


def test_an_owner_is_judged_among_the_labels_that_occur_or_among_all(tmp_path: Path, reviews_folder: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS[:1] * 3)
    assert data_of(tmp_path, reviews_folder, "rows.jsonl").label_set().tolist() == [1]
    every = Task(labels=LABELS, label_set="all")
    assert data_of(tmp_path, reviews_folder, "rows.jsonl", task=every).label_set().tolist() == [0, 1]


def test_batches_pad_little_and_cover_every_row_once(tmp_path: Path, reviews_folder: Path) -> None:
    write_jsonl(
        tmp_path / "rows.jsonl", [{"text": "room " * (1 + index % 5), "label": "positive"} for index in range(11)]
    )
    batches = list(data_of(tmp_path, reviews_folder, "rows.jsonl").train().batches(4))
    assert sorted(np.concatenate([indices for indices, _, _ in batches]).tolist()) == list(range(11))
    assert [batch["input_ids"].shape[1] for _, batch, _ in batches] == [4, 6, 7]


def test_shorter_examples_fill_the_padded_size_of_the_longest(tmp_path: Path, reviews_folder: Path) -> None:
    words = [1] * 9 + [3] * 2 + [6]  # and two special tokens each
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "room " * count, "label": "positive"} for count in words])
    batches = list(data_of(tmp_path, reviews_folder, "rows.jsonl").train().batches(2))
    assert [tuple(batch["input_ids"].shape) for _, batch, _ in batches] == [(5, 3), (4, 3), (2, 5), (1, 8)]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("rows.jsonl", '{"text": "SECRET", "stars": 1}\n', "line 1 has no column 'label'; its columns are text, stars"),
        ("rows.jsonl", '{"txt": "SECRET", "label": 1}\n', "has no column 'text'"),
        (
            "rows.jsonl",
            '{"text": "SECRET", "label": "mixed"}\n',
            "row 1: its label is none of negative, positive, nor a number from 0 to 1: 'mixed'\nhint: write the labels",
        ),
        ("rows.jsonl", '{"text": "SECRET", "label": 2}\n', "row 1: its label is none of"),
        ("rows.jsonl", '{"text": "SECRET", "label": true}\n', "row 1: its label is none of"),
        ("rows.jsonl", '{"text": "a", "label": 1}\n{"text": null, "label": 1}\n', "row 2: column 'text' is NoneType"),
        ("rows.jsonl", '{"text": "SECRET"', "line 1 is not one JSON object"),
        ("rows.jsonl", "", "holds no rows"),
        ("rows.jsonl", '{"text": "a", "label": 1}\n[1]\n', "line 2 is list, not a JSON object"),
        ("rows.csv", "", "holds no rows"),
        ("rows.csv", "text,label\n ,1\n ,1\n", "column 'text' is empty in every row"),
        (
            "rows.csv",
            "this is SECRET,positive\nb,negative\n",
            "its columns are positive\nhint: check that the header line is there",
        ),
        ("rows.csv", "text/label\na/1\n", "has no column 'text'"),
        (
            "rows.csv",
            "text;stars\na, b and c;1\n",
            "has no column 'label'; its columns are text, stars\nhint: give the names that the file uses",
        ),
        ("rows.csv", "text,label\n", "holds no rows"),
        ("rows.csv", "text,label,label\na,1,0\n", "has two columns 'label'"),
        ("rows.csv", 'text,label\n"SECRET,1\n', "cannot be read as CSV"),
        ("rows.csv", "text,label\na,1,SECRET\n", "cannot be read as CSV"),
        ("rows.parquet", "SECRET", "cannot be read as Parquet"),
        (
            "rows.xlsx",
            "SECRET",
            "unknown file type\nhint: export the sheet as CSV in UTF-8",
        ),
        ("rows.doc", "SECRET", "unknown file type\nhint: use .jsonl, "),
        ("rows.json", '{"text": "SECRET"', "is not one list of JSON objects"),
        ("rows.json", '["SECRET"]', "is not one list of JSON objects"),
        ("rows.json", '[{"text": "SECRET"}]', "row 1 has no column 'label'"),
        ("rows.jsonl.gz", "SECRET", "cannot be unpacked"),
        ("rows.gz", "SECRET", "unknown file type"),
        ("rows.arrow", "SECRET", "cannot be read as Arrow"),
        ("rows.csv", "\ufefftext,label\nSECRET\n", "cannot be read as CSV"),
    ],
)
def test_unusable_rows_are_refused_without_quoting_them(
    name: str, content: str, says: str, tmp_path: Path, reviews_folder: Path
) -> None:
    (tmp_path / name).write_text(content)
    data = data_of(tmp_path, reviews_folder, name)
    with pytest.raises(DataError) as caught:
        data.train()
    assert str(caught.value).startswith(str(tmp_path / name))
    assert says in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_a_missing_file_is_refused_by_name(tmp_path: Path, reviews_folder: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.jsonl: no such file"):
        data_of(tmp_path, reviews_folder, "nothing.jsonl").train()


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"image": np.zeros((4, 16, 16)), "label": np.arange(4)}, None),
        ({"image": np.full((4, 16, 16), 255, np.uint8), "label": np.arange(4)}, None),
        ({"image": np.zeros((4, 8, 8)), "label": np.arange(4)}, "the model needs .n, 1, 16, 16."),
        ({"image": np.zeros((4, 16, 16)), "label": np.arange(3)}, "its arrays have 4 and 3 rows"),
        ({"picture": np.zeros((4, 16, 16)), "label": np.arange(4)}, "has no column 'image'; its columns are picture"),
        ({"image": np.full((4, 16, 16), np.nan), "label": np.arange(4)}, "not finite"),
        ({"image": np.zeros((4, 16, 16)), "label": np.arange(8, 12)}, "row 3: its label is none of"),
        ({"image": np.zeros((0, 16, 16)), "label": np.arange(0)}, "holds no rows"),
        ({"image": np.array([{}], dtype=object), "label": np.arange(1)}, "cannot be read as a NumPy"),
    ],
)
def test_image_arrays_are_checked(arrays: dict[str, np.ndarray], says: str | None, tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", **arrays)  # type: ignore[arg-type]
    model = train_base(np.zeros((1, 16, 16), np.float32), np.zeros(1, np.int64), seed=0)
    task = Task(kind="image-classification", labels=tuple(map(str, range(10))))
    path = Path("rows.npz")
    data = PrivateData(
        data=Data(train=path, test=path),
        task=task,
        model=model,
        tokenizer=None,
        folder=tmp_path,
        seed=0,
        reading=ANYTHING,
    )
    if says is None:
        assert data.test().features.max() <= 1  # type: ignore[union-attr]
        assert data.test().features.shape == (4, 1, 16, 16)  # type: ignore[union-attr]
    else:
        with pytest.raises(DataError, match=says):
            data.test()


def test_half_a_surrogate_pair_in_a_row_is_one_line_for_its_owner(tmp_path: Path, reviews_folder: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [*ROWS, {"text": "clean \ud83d room", "label": "positive"}])
    with pytest.raises(DataError, match="row 21: column 'text' holds half of a surrogate pair"):
        data_of(tmp_path, reviews_folder, "rows.jsonl").train()


def test_a_label_s_decomposed_characters_and_wider_spaces_are_the_same_label(
    tmp_path: Path, reviews_folder: Path
) -> None:
    task = Task(labels=("très bien", "mal"), max_tokens=8)
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "the room", "label": "tre\u0300s\u00a0 bien "}] * 3)
    assert data_of(tmp_path, reviews_folder, "rows.jsonl", task=task).train().targets.tolist() == [0, 0, 0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_padded_as_the_tokenizer_pads_them(side: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.padding_side = side
    rows = features(tokenizer(["a fine room", "no", "the film was long and the end was not good"]))
    for names in (set(rows[0]), {"input_ids", "attention_mask"}, {"input_ids"}):
        given = [{name: values for name, values in row.items() if name in names} for row in rows]
        expected = tokenizer.pad(given, return_tensors="pt")
        found = padded(given, tokenizer)
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], expected[name]) for name in found)
