"""Several labels a row, and numbers, as files hold them; whatever else they hold is refused by row.

Of rows, an error quotes at most the beginning of a label, for their owner alone.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.data.columns import look_at, rows_without_labels
from client.data.labels import label_numbers, label_vectors, target_values, targets_of
from client.settings import Data
from common.agreement import Task
from common.errors import DataError
from tests.support.errors import in_two_lines

FILE = Path("rows.jsonl")
MOODS = Task(problem_type="multi_label_classification", labels=("joy", "anger", "fear, or worry"))
SCORES = Task(problem_type="regression", labels=("valence", "arousal"), target_range=(-1.0, 5.0))
SCORE = SCORES.model_copy(update={"labels": ("valence",)})
SECRET = "patient"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([["joy", "anger"], [], ["anger"]], [[1, 1, 0], [0, 0, 0], [0, 1, 0]]),
        ([[0, 2], [1]], [[1, 0, 1], [0, 1, 0]]),
        ([[0.0, 1.0, 0.0], [1.0, 1.0, 1.0]], [[0, 1, 0], [1, 1, 1]]),  # as transformers' loss wants them
        ([[0, 0, 1], [True, False, False]], [[0, 0, 1], [1, 0, 0]]),
        ([[0, 1, 0], ["joy", "anger"]], None),  # not every row is a vector, so the first names a label twice
        (["joy|anger", "", " anger "], [[1, 1, 0], [0, 0, 0], [0, 1, 0]]),
        (["joy; anger", "fear, or worry", "fear, or worry;joy"], [[1, 1, 0], [0, 0, 1], [1, 0, 1]]),
        (['["joy", "anger"]', "[]", "[2]"], [[1, 1, 0], [0, 0, 0], [0, 0, 1]]),
        (["joy", 1, ["joy"]], [[1, 0, 0], [0, 1, 0], [1, 0, 0]]),
        (["0,1", "2"], [[1, 1, 0], [0, 0, 1]]),
    ],
)
def test_labels_of_a_row_are_read_as_people_write_them(values: list[Any], expected: list | None) -> None:
    if expected is None:
        with pytest.raises(DataError, match="row 1: duplicate label"):
            label_vectors(FILE, values, MOODS)
    else:
        assert label_vectors(FILE, values, MOODS).tolist() == expected


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (["joy", "calm"], "row 2: its label is none of joy, anger, fear, or worry, nor a number from 0 to 2: 'calm'"),
        ([("." * 40) + SECRET], f"row 2: its label is none of .*: '{'.' * 40}...'$"),
        (["joy", "joy"], "row 2: duplicate label"),
        ([3], "row 2: its label is none of"),
        ([-1], "row 2: its label is none of"),
        ([None], "row 2: its label is none of"),
        ([["joy"]], "row 2: its label is none of"),
        ([float("nan")], "row 2: its label is none of"),
        ([0.5, 0, 0], "row 2: its label is none of"),
        (["joy"] * 100_000, "row 2: duplicate label"),
        (None, "row 2: its labels are missing"),
        ({"joy": 1}, "row 2: its labels are a table, not a list"),
        (f"joy|{SECRET * 40}", f"row 2: its label is none of .*: '{(SECRET * 40)[:40]}...'"),
        ("[calm", r"row 2: its label is none of .*: '\[calm'"),
    ],
)
def test_labels_that_cannot_be_read_are_refused_by_row(value: Any, says: str) -> None:
    with pytest.raises(DataError) as caught:
        label_vectors(FILE, [["joy"], value], MOODS)
    assert re.search(says, caught.value.message)
    assert SECRET * 8 not in in_two_lines(caught.value)


@pytest.mark.parametrize(
    ("label", "hint"),
    [
        ("circel", "did you mean circle? Write it as the agreement does"),
        ("SQUARE", "did you mean square? Write it as the agreement does"),
        ("star", "correct this row or leave it out; or agree on this label, too (task.labels)"),
        ("", "this row's label is empty: fill it in, or leave the row out"),
        (" " + "circle" * 1000, "correct this row or leave it out; or agree on this label, too (task.labels)"),
    ],
)
def test_a_label_in_one_row_that_is_not_agreed_says_what_to_correct(label: str, hint: str) -> None:
    shapes = Task(labels=("circle", "cross", "square"))
    with pytest.raises(DataError) as caught:
        label_numbers(FILE, ["cross", label, label], shapes)
    assert caught.value.hint == hint
    assert ("2 such in all" in caught.value.message) == bool(label)


def test_a_label_that_is_not_agreed_is_quoted_so_that_it_shows() -> None:
    with pytest.raises(DataError, match="its label is none of joy, anger") as caught:
        label_numbers(FILE, ["calm\n\x1b[2J\u202e\u115f"], MOODS.model_copy(update={"labels": ("joy", "anger")}))
    assert caught.value.message.endswith(r": 'calm\n\x1b[2J\u202e\u115f'")


def test_a_file_in_which_no_row_has_a_label_is_refused() -> None:
    with pytest.raises(DataError, match="no row has a label"):
        label_vectors(FILE, ["", ""], MOODS)


def test_a_column_for_each_label_holds_0_and_1() -> None:
    rows = [["0", "1", "0"], [1, 0.0, True], ["True", "false", "1.0"]]
    columns = ["a", "b", "c"]
    assert targets_of(FILE, rows, MOODS, columns).tolist() == [[0, 1, 0], [1, 0, 1], [1, 0, 1]]
    with pytest.raises(DataError, match="row 1: its value for anger is neither 0 nor 1") as caught:
        targets_of(FILE, [["0", SECRET, "1"]], MOODS, columns)
    assert SECRET not in in_two_lines(caught.value)
    with pytest.raises(DataError, match="label names 2 columns; the agreement has 3"):
        targets_of(FILE, [[0, 1]], MOODS, ["a", "b"])
    with pytest.raises(DataError, match="label names 2 columns"):
        targets_of(FILE, [[0, 1]], Task(labels=("a", "b")), ["a", "b"])


def test_columns_that_are_the_labels_in_another_order_are_refused() -> None:
    moods = MOODS.model_copy(update={"labels": ("joy", "anger")})
    assert targets_of(FILE, [[1, 0]], moods, ["joy", "anger"]).tolist() == [[1, 0]]
    with pytest.raises(DataError, match="another order than the agreed one: joy, anger"):
        targets_of(FILE, [[1, 0]], moods, ["anger", "joy"])


def test_what_separates_labels_is_said_and_so_is_how_many_rows_have_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\na,joy;anger\nb,\nc,anger\n")
    with caplog.at_level(logging.INFO, logger="amalgram.owner"):
        look = look_at(Data(train=path, test=path), MOODS, path, None)
    assert "the labels of a row are separated by semicolons" in caplog.text
    assert (look.rows, look.labels.tolist()) == (3, [0, 1])
    assert list(rows_without_labels([look])) == ["rows.csv: 1 of 3 rows have no label, and count as such"]


@pytest.mark.parametrize("value", [2, 2.0, "2", " 2.000 ", "2e0", "+2", [2], "[2]", -1, 5])
def test_a_number_is_read_as_people_write_it(value: Any) -> None:
    expected = float(value) if value in (-1, 5) else 2.0
    assert target_values(FILE, [value], SCORE).tolist() == [[expected]]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        *((value, "row 1: its target valence is not a finite number") for value in ("", "patient", None, True, {})),
        *((value, "row 1: its target valence is not a finite number") for value in ("nan", "inf", "1_0", "٢", "0x1")),
        *((value, "row 1: its target valence is not a finite number") for value in (np.nan, np.inf, 10**400)),
        *(
            (value, "row 1: its target valence is outside the agreed range, from -1 to 5")
            for value in (5.001, -2, 1e300)
        ),
        *((value, "row 1: has [02] targets, and 1 are agreed: valence") for value in ([], [1, 2], "[1, 2]")),
    ],
)
def test_targets_that_cannot_be_used_are_refused_by_row(value: Any, says: str) -> None:
    with pytest.raises(DataError, match=says) as caught:
        target_values(FILE, [value], SCORE)
    assert SECRET not in in_two_lines(caught.value)


def test_several_targets_come_from_a_list_or_from_columns() -> None:
    assert target_values(FILE, [[1, 2.5], "[0, 5]"], SCORES).tolist() == [[1, 2.5], [0, 5]]
    assert targets_of(FILE, [["1", "2.5"]], SCORES, ["x", "y"]).tolist() == [[1, 2.5]]
    with pytest.raises(DataError, match="row 2: its target arousal is not a finite number"):
        targets_of(FILE, [[1, 2], [1, None]], SCORES, ["x", "y"])


@given(st.lists(st.sets(st.integers(0, 2)), min_size=1, max_size=8).filter(any))
def test_lists_cells_and_vectors_of_the_same_labels_read_alike(rows: list[set[int]]) -> None:
    task = MOODS.model_copy(update={"labels": ("a", "b", "c")})
    expected = [[float(number in row) for number in range(3)] for row in rows]
    names = [["abc"[number] for number in row] for row in rows]
    for values in (names, ["|".join(row) for row in names], [json.dumps(row) for row in names], expected):
        assert label_vectors(FILE, values, task).tolist() == expected
