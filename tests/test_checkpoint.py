"""What the coordinator saves of a run: it reads back exactly, or is refused with one error that says what to do."""

import errno
import json
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import psutil
import pytest

import server.checkpoint
from common.errors import SettingsError
from common.mapped import PIECE_NUMBERS
from common.messages import OpenSum
from common.summation.protocol import Opening, SavedOpening, Total
from common.tensor_layout import TensorEntry, TensorLayout
from server.checkpoint import Checkpoint, OwnerCost, SavedDelivery, Step, is_checkpoint_of
from tests.support.scripted_owners import LAYOUT, ROUND, TEST_ROUND

DIGEST, HEX = "ab" * 32, "cd" * 32
REQUEST = OpenSum(
    run=HEX, agreement_digest=DIGEST, round=7, nonce=HEX, position=0, deliveries_digest=HEX, layout_digest=HEX
)
OPENING = SavedOpening(
    remaining=("ada",),
    book=b"book",
    commitments={0: b"c"},
    dealt={0: {2: b"d"}, 2: {}},
    sealed={0: b"e"},
    sealed_signatures={0: b"f"},
    survivors=b"survivors",
    signatures={0: b"s", 2: b"t"},
)


def total(value: float) -> Total:
    return Total(layout=LAYOUT, vector=np.full(7, value), owners=("ada", "cyd"), roster_size=3)


def layout_of(size: int) -> TensorLayout:
    return TensorLayout((TensorEntry(name="t", shape=(size,), bound=1.0),))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """A run with one of everything."""
    made = Checkpoint.open(tmp_path / "checkpoint", DIGEST)
    made.steps.append(Step("roll call", "roll call", 1.5, {"ada": OwnerCost(0.5, 2, 300, 4000)}))
    made.save_total(ROUND, HEX, total(3.0))
    made.save_delivery(SavedDelivery(position=1, model="average", digest=HEX, bytes=28, owners=("ada", "cyd")))
    made.save_opening(REQUEST, Opening(OPENING, np.arange(7, dtype="<u8")))
    return made


def change(checkpoint: Checkpoint, edit: Callable[[dict[str, Any]], object]) -> None:
    path = checkpoint.folder / "run.json"
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def test_a_checkpoint_reads_back_as_it_was_saved(checkpoint: Checkpoint) -> None:
    again = Checkpoint.open(checkpoint.folder, DIGEST)
    assert (again.run, again.steps, again.deliveries, again.sums) == (
        checkpoint.run,
        checkpoint.steps,
        checkpoint.deliveries,
        checkpoint.sums,
    )
    assert again.opened_sessions == {HEX}
    opening = again.saved_opening()
    assert opening is not None
    assert opening[0] == REQUEST
    assert again.opening_session == REQUEST.session
    assert opening[1].state == OPENING
    np.testing.assert_array_equal(opening[1].words, np.arange(7))
    kept = again.next_total(ROUND)
    assert kept is not None
    assert kept.owners == ("ada", "cyd")
    np.testing.assert_array_equal(kept.vector, np.full(7, 3.0))
    assert again.next_total(TEST_ROUND) is None
    assert again.seconds >= checkpoint.seconds_before


def test_only_the_coordinator_can_read_a_checkpoint(checkpoint: Checkpoint) -> None:
    modes = {stat.S_IMODE(path.stat().st_mode) for path in checkpoint.folder.iterdir()}
    assert (stat.S_IMODE(checkpoint.folder.stat().st_mode), modes) == (0o700, {0o600})


def test_a_saved_opening_ends_with_its_total(checkpoint: Checkpoint) -> None:
    checkpoint.save_total(TEST_ROUND, DIGEST, total(4.0))
    again = Checkpoint.open(checkpoint.folder, DIGEST)
    assert again.saved_opening() is None
    assert again.opening_session == ""
    assert not (checkpoint.folder / "opening.bin").exists()


def test_a_large_total_is_saved_without_a_copy_and_cannot_be_read_once_it_is_destroyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 3 * PIECE_NUMBERS + 1  # more than what is kept in memory of a mapped file
    round = replace(ROUND, layout=layout_of(size))
    monkeypatch.setattr(server.checkpoint, "MAX_BYTES_IN_MEMORY", 1_000_000)
    checkpoint = Checkpoint(folder=tmp_path, agreement_digest=DIGEST)
    words = checkpoint.growing(size)
    words.view("<f8")[:] = 3.0
    number = (tmp_path / "growing.bin").stat().st_ino
    summed = replace(total(0.0), layout=round.layout, vector=words.view("<f8"))
    checkpoint.save_total(round, HEX, summed)
    assert (tmp_path / "sum-0.bin").stat().st_ino == number
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "sum-0.bin"]
    read_again = Checkpoint.open(tmp_path, DIGEST).next_total(round)
    assert read_again is not None
    for each in (summed, read_again):
        np.testing.assert_array_equal(each["t"], np.full(size, 3.0))
        each.destroy()
        assert np.isnan(each["t"]).all()
    resumed = Checkpoint.open(tmp_path, DIGEST).next_total(round)
    assert resumed is not None
    np.testing.assert_array_equal(resumed["t"], np.full(size, 3.0))


def test_a_total_may_be_larger_than_the_memory_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A private mapping of that size is refused: Linux counts it as memory that may be needed."""
    size = 2 * (psutil.virtual_memory().total + psutil.swap_memory().total) // 8
    round = replace(ROUND, layout=layout_of(size))
    monkeypatch.setattr(server.checkpoint, "take_room", lambda file, num_bytes: file.truncate(num_bytes))  # but no disk
    checkpoint = Checkpoint(folder=tmp_path, agreement_digest=DIGEST)
    summed = replace(total(0.0), layout=round.layout, vector=checkpoint.growing(size).view("<f8"))
    checkpoint.save_total(round, HEX, summed)
    resumed = Checkpoint.open(tmp_path, DIGEST).next_total(round)
    assert resumed is not None
    assert resumed.some_of("t", slice(size - 3, size)).tolist() == [0.0, 0.0, 0.0]
    resumed.destroy()


def test_a_sum_that_was_named_when_the_coordinator_was_killed_makes_room_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.checkpoint, "MAX_BYTES_IN_MEMORY", 50)
    (tmp_path / "sum-0.bin").write_bytes(b"\1" * 80)  # of which run.json does not know
    Checkpoint(folder=tmp_path, agreement_digest=DIGEST).growing(7)
    assert [path.name for path in tmp_path.iterdir()] == ["growing.bin"]


def test_a_sum_that_grew_when_the_coordinator_was_killed_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.checkpoint, "MAX_BYTES_IN_MEMORY", 50)
    (tmp_path / "growing.bin").write_bytes(b"\1" * 80)
    grown = Checkpoint(folder=tmp_path, agreement_digest=DIGEST).growing(7)
    assert not grown.any()
    assert stat.S_IMODE((tmp_path / "growing.bin").stat().st_mode) == 0o600


def test_a_sum_for_which_the_disk_has_no_room_takes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(file: BinaryIO, num_bytes: int) -> NoReturn:
        file.write(b"as much as there is room for")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(server.checkpoint, "MAX_BYTES_IN_MEMORY", 50)
    monkeypatch.setattr(server.checkpoint, "take_room", fill)
    with pytest.raises(OSError, match="No space left"):
        Checkpoint(folder=tmp_path, agreement_digest=DIGEST).growing(7)
    assert list(tmp_path.iterdir()) == []


def test_an_incomplete_opening_is_refused_before_it_takes_room(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.checkpoint, "MAX_BYTES_IN_MEMORY", 50)
    path = checkpoint.folder / "opening.bin"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(SettingsError, match=r"opening\.bin: holds 6 of 7 numbers"):
        Checkpoint.open(checkpoint.folder, DIGEST).saved_opening()
    assert not (checkpoint.folder / "growing.bin").exists()


@pytest.mark.parametrize("version", [None, 1, 3, 4, 5, 6, 8, "7"])
def test_a_checkpoint_of_another_version_is_refused_and_stays(checkpoint: Checkpoint, version: int | None) -> None:
    """Version 1 did not say so."""

    def edit(values: dict[str, Any]) -> None:
        values.pop("version") if version is None else values.update(version=version)

    change(checkpoint, edit)
    for read in (Checkpoint.open, is_checkpoint_of):
        with pytest.raises(SettingsError, match=r"run\.json: another version of Amalgram wrote it") as caught:
            read(checkpoint.folder, DIGEST)
        assert "\n" not in caught.value.message
        assert caught.value.hint.startswith("resume with that version, or remove ")
    assert (checkpoint.folder / "sum-0.bin").is_file()


@pytest.mark.parametrize(
    "edit",
    [
        lambda values: values.update(more=1),
        lambda values: values.pop("sums"),
        lambda values: values.update(run="ab"),
        lambda values: values.update(seconds="1"),
        lambda values: values.update(seconds=-1.0),
        lambda values: values["steps"][0].update(more=1),
        lambda values: values["steps"][0]["by_owner"]["ada"].update(messages=-1),
        lambda values: values["steps"][0]["by_owner"]["ada"].update(bytes_sent=1.5),
        lambda values: values["deliveries"][0].update(position=-1),
        lambda values: values["deliveries"][0].update(digest="AB" * 32),
        lambda values: values["sums"][0].update(owners="ada"),
        lambda values: values["sums"][0].pop("session"),
        lambda values: values["opening"]["request"].update(nonce="ab"),
        lambda values: values["opening"]["request"].pop("position"),
        lambda values: values["opening"].update(more=1),
        lambda values: values["opening"]["state"].update(more=1),
        lambda values: values["opening"]["state"].update(book="xy"),
    ],
)
def test_a_checkpoint_that_this_version_would_not_have_written_is_refused(
    checkpoint: Checkpoint, edit: Callable[[dict[str, Any]], object]
) -> None:
    change(checkpoint, edit)
    with pytest.raises(SettingsError, match=r"run\.json: is damaged\nhint: remove .* with a new agreement"):
        Checkpoint.open(checkpoint.folder, DIGEST)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"version": 7}'])
def test_a_checkpoint_that_is_not_one_is_refused(checkpoint: Checkpoint, content: str) -> None:
    (checkpoint.folder / "run.json").write_text(content)
    with pytest.raises(SettingsError, match=r"run\.json: is damaged"):
        is_checkpoint_of(checkpoint.folder, DIGEST)


def test_a_total_of_another_round_is_refused(checkpoint: Checkpoint) -> None:
    again = Checkpoint.open(checkpoint.folder, DIGEST)
    with pytest.raises(SettingsError, match="a different total in place of the sum of test metrics"):
        again.next_total(TEST_ROUND)


def test_a_checkpoint_of_another_agreement_is_removed(checkpoint: Checkpoint) -> None:
    assert not is_checkpoint_of(checkpoint.folder, HEX)
    assert Checkpoint.open(checkpoint.folder, HEX).run != checkpoint.run
    assert [path.name for path in checkpoint.folder.iterdir()] == ["run.json"]


def test_a_large_sum_lies_on_the_disk_in_a_file_that_disappears_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.checkpoint, "MAX_BYTES_IN_MEMORY", 1000)
    checkpoint = Checkpoint(folder=tmp_path, agreement_digest=DIGEST)
    assert not isinstance(checkpoint.zeros(125), np.memmap)
    one, other = checkpoint.zeros(3_000_000), checkpoint.zeros(126)
    assert isinstance(one, np.memmap)
    one[:] = 2**64 - 1
    assert not other.any()
    assert list(tmp_path.iterdir()) == []
