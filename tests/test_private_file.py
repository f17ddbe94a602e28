"""Private files: modes, whole replacement, keys that are never overwritten, secrets, locks."""

import os
import stat
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from common.errors import EngineError, SettingsError
from common.private_file import create, locked, make_private_folder, read_secret, unsynced, write_key, write_whole


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_private_folder_is_closed_to_others_even_if_it_existed(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir(mode=0o755)
    for folder in (tmp_path / "old", tmp_path / "new" / "inner"):
        make_private_folder(folder)
        assert mode_of(folder) == 0o700


def test_a_file_is_replaced_whole_and_private(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("a longer text than the next one")
    (tmp_path / "file.partial").write_text("left by a crash")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert mode_of(path) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_and_its_name_are_on_the_disk_before_the_call_returns_except_in_a_simulation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    write_whole(tmp_path / "file", b"new")
    assert synced == [each.stat().st_ino for each in (tmp_path / "file", tmp_path)]
    with suppress(KeyError), unsynced():
        write_whole(tmp_path / "file", b"newer")
        raise KeyError
    assert (tmp_path / "file").read_bytes() == b"newer"
    assert len(synced) == 2
    write_whole(tmp_path / "file", b"newest")
    assert len(synced) == 4


def test_a_new_file_neither_overwrites_nor_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        create(tmp_path / "link")
    with pytest.raises(SettingsError, match="already exists, and a key is never overwritten"):
        write_key(tmp_path / "link", b"key")
    with pytest.raises(SettingsError, match="cannot be written"):
        write_key(tmp_path / "nowhere" / "key", b"key")
    assert not (tmp_path / "elsewhere").exists()


def test_a_secret_is_read_only_if_its_owner_alone_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    write_key(path, b"key")
    assert (mode_of(path), read_secret(path)) == (0o600, b"key")
    for mode in (0o640, 0o604, 0o620, 0o601):
        path.chmod(mode)
        with pytest.raises(SettingsError, match=f"other users may read this secret\nhint: chmod 600 {path}"):
            read_secret(path)
    with pytest.raises(SettingsError, match="cannot be read"):
        read_secret(tmp_path / "missing")


def test_a_lock_is_held_by_one_and_free_again_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with pytest.raises(KeyError), locked(path):
        raise KeyError
    with locked(path):
        with pytest.raises(BlockingIOError), locked(path, wait_seconds=0):
            pass
        with pytest.raises(EngineError, match="busy"), locked(path, wait_seconds=0, busy=EngineError("busy")):
            pass
    with locked(path, wait_seconds=0):
        assert mode_of(path) == 0o600


@pytest.mark.parametrize("wait", [{}, {"wait_seconds": 10}])
def test_whoever_waits_gets_the_lock_next(tmp_path: Path, wait: dict[str, float]) -> None:
    order = []

    def second() -> None:
        with locked(tmp_path / "lock", **wait):
            order.append("second")

    with locked(tmp_path / "lock"):
        waiting = threading.Thread(target=second)
        waiting.start()
        time.sleep(0.2)
        order.append("first")
    waiting.join(10)
    assert order == ["first", "second"]
