"""Settings and data that are not what they say: one error, no traceback, and no memory for what they claim to hold."""

import gzip
import io
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from pydantic import ValidationError

from client.ledger import Ledger
from client.sketch import Sketch
from client.state import OwnerState
from common.agreement import Agreement, AgreementDraft
from common.data import files, sources
from common.data.files import read_arrays, read_columns
from common.errors import AmalgramError, DataError, RemoteProtocolError, SettingsError
from common.identity import Identity, read_identity, write_identity
from common.messages import Envelope, decode
from common.settings_file import load_settings, read_toml
from server.checkpoint import Checkpoint

DEEP = 100_000


def test_98_settings_nested_too_deeply(tmp_path: Path) -> None:
    path = tmp_path / "owner.toml"
    for content in ("a = " + "[" * DEEP + "]" * DEEP, "a = " + "{b = " * DEEP + "1" + "}" * DEEP, "a = 1" + "0" * 5000):
        path.write_text(content)
        with pytest.raises(SettingsError, match="not valid TOML"):
            read_toml(path)


def test_98_settings_without_an_end() -> None:
    with pytest.raises(SettingsError, match="at most 16000000 bytes"):
        read_toml(Path("/dev/zero"))


@pytest.mark.parametrize("line", ["[" * DEEP + "]" * DEEP, '{"text": ' + "[" * DEEP, "1" * 5000])
def test_98_rows_of_json_that_are_none(line: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(DataError, match="line 1 is not one JSON object"):
        read_columns(path, ["text"], None)


def lying_npy() -> bytes:
    """An array of three numbers that says it has 10^15."""
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue().replace(b"(3,), }" + b" " * 13, b"(1000000000000000,), }"[:20].ljust(20))


def test_98_arrays_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "rows.npz"
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    np.savez(tmp_path / "number.npz", image=np.float32(1))
    with zipfile.ZipFile(tmp_path / "lying.npz", "w") as archive:
        archive.writestr("image.npy", lying_npy())
    for content in (
        buffer.getvalue(),  # .npz that is .npy
        b"",
        b"PK",
        (tmp_path / "number.npz").read_bytes(),
        (tmp_path / "lying.npz").read_bytes(),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"cannot be read as a NumPy \.npz file"):
            read_arrays(path, ["image"], None)


def test_98_a_small_file_that_unpacks_to_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_UNPACKED_BYTES", 1_000_000)
    np.savez_compressed(tmp_path / "rows.npz", image=np.zeros(1_000_000))
    with pytest.raises(DataError, match=r"would take 8000\d\d\d bytes unpacked, at most 1000000 are allowed"):
        read_arrays(tmp_path / "rows.npz", ["image"], None)
    table = pa.table({"text": pa.array([f"{number:030}" for number in range(100_000)])})
    parquet.write_table(table, tmp_path / "rows.parquet", compression="zstd", use_dictionary=False)
    with pytest.raises(DataError, match="bytes unpacked, at most 1000000 are allowed"):
        read_columns(tmp_path / "rows.parquet", ["text"], max_rows=1)


def test_98_a_parquet_file_that_says_it_is_small_unpacks_to_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each value stands in the file once."""
    monkeypatch.setattr(files, "MAX_UNPACKED_BYTES", 1_000_000)
    parquet.write_table(pa.table({"text": ["x" * 1000] * 100_000}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"would take \d{7} bytes unpacked, at most 1000000 are allowed"):
        read_columns(tmp_path / "rows.parquet", ["text"], None)
    assert len(read_columns(tmp_path / "rows.parquet", ["text"], 5)["text"]) == 5


def test_98_columns_and_rows_of_a_parquet_file_that_nobody_asked_for_are_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_UNPACKED_BYTES", 100_000)
    table = pa.table({"text": [f"row {number}" for number in range(3000)], "scan": [bytes(1000)] * 3000})
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=1000, use_dictionary=False)
    for max_rows in (1, 999, 1000, None):
        found = read_columns(tmp_path / "rows.parquet", ["text"], max_rows)
        assert set(found["text"]) <= set(table["text"].to_pylist())
        assert len(found["text"]) == (max_rows or 3000)
    with pytest.raises(DataError, match="bytes unpacked, at most 100000 are allowed"):
        read_columns(tmp_path / "rows.parquet", ["text", "scan"], None)


def test_98_compressed_text_that_unpacks_to_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 10_000)
    monkeypatch.setattr(sources, "MAX_TEXT_BYTES", 100_000)
    long, many = '{"a": "' + "x" * 20_000 + '"}', '{"a": "x"}\n' * 20_000
    for ending in ("jsonl", "json", "csv"):
        for text in (long, many):
            path = tmp_path / f"rows.{ending}.gz"
            path.write_bytes(gzip.compress(("a\n" * (ending == "csv") + text).encode()))
            with pytest.raises(DataError, match=r"has a line of over 10000 bytes, or over 100000 bytes in all"):
                read_columns(path, ["a"], 5)


def test_98_a_csv_whose_header_is_not_text(tmp_path: Path) -> None:
    """Found by fuzzing."""
    (tmp_path / "rows.csv").write_bytes(b"\xf6\xf6;\n)")
    with pytest.raises(DataError, match="is not UTF-8"):
        read_columns(tmp_path / "rows.csv", ["a"], None)


def test_98_a_public_file_given_as_a_secret_one_says_so(tmp_path: Path) -> None:
    write_identity(tmp_path / "ada.key", Identity(name="ada", seed=bytes(32)))
    with pytest.raises(SettingsError, match="is the public file of an identity") as refused:
        read_identity(tmp_path / "ada.pub")
    assert "ada.key" in refused.value.hint


def test_98_a_key_in_an_agreement_that_breaks_the_line(tmp_path: Path) -> None:
    """Found by fuzzing, as are the next three."""
    (tmp_path / "a.toml").write_text('"a\\u0085b" = 1\n')
    with pytest.raises(SettingsError) as refused:
        load_settings(tmp_path / "a.toml", AgreementDraft)
    assert "unknown key a\\x85b" in refused.value.message


def test_98_a_field_of_a_message_that_breaks_the_line() -> None:
    with pytest.raises(RemoteProtocolError) as refused:
        decode(Envelope(kind="Finish", fields={"run\u2028": "x"}, payload=None))
    assert "\\u2028" in refused.value.message
    assert len(refused.value.message.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("own.layout", '[64, ["a", 3, 1.0, "full", ""]]'),
        ("own.layout", '{"a": 1}'),
        ("own.layout", "[" * DEEP),
        ("round", '{"kind": "step", "request": {"run": "x"}, "side": {}}'),
    ],
)
def test_98_an_owner_s_own_files_that_are_damaged(name: str, content: str, tmp_path: Path) -> None:
    state = OwnerState(tmp_path / "state", bytes(32))
    state.start_run("ab" * 32, "cd" * 32)
    (tmp_path / "state" / "run" / f"{name}.json").write_text(content)
    with pytest.raises(AmalgramError, match=r"damaged|missing or unexpected fields"):
        _ = state.read_layout("own") if name == "own.layout" else state.open_round.open_sum  # type: ignore[union-attr]


def test_98_a_checkpoint_whose_nonces_are_not_hexadecimal(tmp_path: Path) -> None:
    Checkpoint.open(tmp_path / "checkpoint", "ab" * 32)
    path = tmp_path / "checkpoint" / "run.json"
    path.write_text(path.read_text().replace('"nonces":{}', '"nonces":{"3":"xy"}'))
    with pytest.raises(SettingsError, match="is damaged"):
        Checkpoint.open(tmp_path / "checkpoint", "ab" * 32)


def test_98_a_ledger_of_an_identity_that_breaks_the_line(tmp_path: Path, agreement: Agreement) -> None:
    (tmp_path / "a.ledger").write_text('{"version":2,"identity":"a\\u0085b","pages":{}}')
    with pytest.raises(SettingsError, match="damaged"):
        Ledger(tmp_path / "a.ledger", bytes(32), agreement, must_exist=True)


@pytest.mark.parametrize("digests", ["a", "%%%%", "AAAA"])
def test_98_a_ledger_whose_sketches_hold_no_digests(digests: str) -> None:
    with pytest.raises(ValidationError):
        Sketch(size=1, digests=digests)


def test_98_a_csv_whose_header_has_a_bare_carriage_return(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b"\x00\ra\n1")
    with pytest.raises(DataError, match="cannot be read as CSV"):
        read_columns(tmp_path / "rows.csv", ["a"], None)


def test_98_a_checkpoint_of_a_version_that_breaks_the_line(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"version":"a\\u0085b"}')
    with pytest.raises(SettingsError) as refused:
        Checkpoint.open(tmp_path, "ab" * 32)
    assert len(refused.value.message.splitlines()) == 1
