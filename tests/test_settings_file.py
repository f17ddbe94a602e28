"""Settings files: whatever is wrong is said in plain words, with the key, the value and what is allowed."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from common.errors import SettingsError
from common.settings_file import Name, Positive, Settings, matching, parse_settings, parse_toml, read_toml


class Table(Settings):
    depth: int = 1


class Everything(Settings):
    """A key for each kind of rule that a settings class of ours has."""

    name: Name = "ada"
    positive: Positive = 1.0
    share: Annotated[float, Field(ge=0, le=1)] = 0.5
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    count: Annotated[int, Field(ge=1)] | None = None
    kind: Literal["masked", "plain"] = "masked"
    text: Annotated[str, Field(min_length=1, max_length=5)] = "x"
    path: Path = Path("x")
    switch: bool = False
    values: Annotated[tuple[float, ...], Field(min_length=1, max_length=2)] = (1.0,)
    address: Annotated[str, matching("[a-z]+:[0-9]+", "HOST:PORT")] = "a:1"
    table: Table = Table()
    tables: tuple[Table, ...] = ()


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("name", "Ada", "name = 'Ada': must be 1 to 32 lower-case letters, digits, - and _, the first of them"),
        ("name", "Ada & Co.", 'a letter or digit\nhint: for example "ada-co"'),
        ("name", "a\n", "must be 1 to 32"),
        ("address", "a", "address = 'a': must be HOST:PORT"),
        ("positive", 0, "positive = 0: must be greater than 0"),
        ("positive", float("nan"), "must be finite"),
        ("positive", float("inf"), "must be finite"),
        ("positive", "1", "positive = '1': must be a number\nhint: write positive = 1, without quotes"),
        ("share", -1, "share = -1: must be at least 0"),
        ("share", 1.5, "share = 1.5: must be at most 1"),
        ("seed", 2**32, "seed = 4294967296: must be less than 4294967296"),
        ("count", 0, "count = 0: must be at least 1"),
        ("count", 1.5, "count = 1.5: must be a whole number"),
        ("count", "1", "count = '1': must be a whole number\nhint: write count = 1, without quotes"),
        ("count", "one", "count = 'one': must be a whole number"),
        ("kind", "open", "kind = 'open': must be 'masked' or 'plain'"),
        ("kind", "maskd", "must be 'masked' or 'plain'\nhint: did you mean masked?"),
        ("text", 3, 'text = 3: must be text in quotes\nhint: write text = "3"'),
        ("text", "", "text = '': is too short, the minimum length is 1"),
        ("text", "abcdef", "text = 'abcdef': is too long, the maximum length is 5"),
        ("path", 3, "path = 3: must be text in quotes"),
        ("switch", 1, "switch = 1: must be true or false"),
        ("switch", "true", "switch = 'true': must be true or false\nhint: write switch = true, without quotes"),
        ("values", 1.0, "values = 1.0: must be a list\nhint: write values = [1.0]"),
        ("values", "a", "values = 'a': must be a list\nhint: write values = [\"a\"]"),
        ("values", [], "values = []: has too few entries, the minimum is 1"),
        ("values", [1.0, 2.0, 3.0], "values = [1.0, 2.0, 3.0]: has too many entries, the maximum is 2"),
        ("values", [1.0, "x"], "values[1] = 'x': must be a number"),
        ("table", 3, "table = 3: must be a table\nhint: write [table], with its keys below it"),
        ("tables", ["a"], "tables[0] = 'a': must be a table\nhint: write one [[tables]] table for each, with its keys"),
        ("table", {"dept": 3}, "unknown key table.dept\nhint: did you mean depth?"),
        ("table", {"width": 3}, "unknown key table.width\nhint: allowed here: depth"),
        ("table", {"share": 0.5}, "unknown key table.share\nhint: share belongs at the top of the file, before the"),
        ("tabel", {}, "unknown key tabel\nhint: did you mean table?"),
        ("depth", 2, "unknown key depth\nhint: depth belongs below [table]"),
        ("wholly_other", 2, "unknown key wholly_other\nhint: allowed here: address, count"),
    ],
)
def test_a_problem_is_said_in_plain_words(key: str, value: object, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_settings({key: value}, Everything, "x.toml")
    assert str(caught.value).startswith("x.toml: ")
    assert says in str(caught.value)
    assert "Input" not in str(caught.value)


def test_a_missing_table_is_named_as_it_is_written() -> None:
    class Needs(Settings):
        data: Table

    class NeedsSeveral(Settings):
        owners: tuple[Table, ...]

    with pytest.raises(SettingsError, match=r"^x: data is missing\nhint: write \[data\], with its keys below it$"):
        parse_settings({}, Needs, "x")
    with pytest.raises(SettingsError, match=r"^x: owners is missing\nhint: write \[\[owners\]\] for each$"):
        parse_settings({}, NeedsSeveral, "x")


def test_a_missing_key_and_the_number_of_further_problems_are_said() -> None:
    class Needs(Settings):
        one: int
        two: int

    with pytest.raises(
        SettingsError, match=r"^x: one is missing \(and 1 more\)\nhint: write one = \.\.\. at the top of the file$"
    ):
        parse_settings({}, Needs, "x")


@pytest.mark.parametrize("path", [r"C:\data\x.csv", r"C:\Users\x.csv"])
def test_a_path_of_windows_gets_a_hint_of_its_own(path: str) -> None:
    with pytest.raises(SettingsError, match="not valid TOML") as caught:
        parse_toml(f'train = "{path}"'.encode(), "owner.toml")
    assert caught.value.hint == r"a Windows path stands in single quotes, 'C:\data\train.csv', or has forward slashes"
    assert parse_toml(f"train = '{path}'".encode(), "owner.toml") == {"train": path}


def test_settings_may_begin_with_a_mark_of_windows_but_not_be_utf_16() -> None:
    assert parse_toml('\ufefftitle = "x"\r\n'.encode(), "owner.toml") == {"title": "x"}
    with pytest.raises(SettingsError) as caught:
        parse_toml('title = "x"'.encode("utf-16"), "owner.toml")
    assert caught.value.hint == "save the file as UTF-8; it is UTF-16"


def test_settings_in_another_encoding_are_to_be_saved_as_utf_8() -> None:
    with pytest.raises(SettingsError) as caught:
        parse_toml('title = "Köln"'.encode("latin-1"), "owner.toml")
    assert caught.value.hint == "save the file as UTF-8"


def test_a_file_that_is_missing_too_large_or_malformed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    with pytest.raises(SettingsError, match="cannot be read"):
        read_toml(path)
    path.write_text("= 1")
    with pytest.raises(SettingsError, match=r"not valid TOML: .*line 1.*\nhint: text stands in quotes"):
        read_toml(path)
    path.write_bytes(b"#" * 16_000_001)
    with pytest.raises(SettingsError, match="a settings file has at most 16000000 bytes"):
        read_toml(path)
