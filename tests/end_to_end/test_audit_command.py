"""`amalgram audit` as an owner runs it: nothing is sent, and nothing but the named output is left on the disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from client.audit.result import Audit
from common.errors import SettingsError
from deploy.cli import cli
from deploy.commands.audit import audit_and_show
from tests.support.parties import Parties
from tests.support.watch import changed_paths, watched

ROOT = Path(__file__).resolve().parents[2]


def test_the_watch_sees_files_and_sockets(tmp_path: Path) -> None:
    import socket

    with watched() as seen:
        (tmp_path / "file").write_text("")
        socket.socket().close()
    assert [event for event, _ in seen] == ["open", "socket.__new__"]


def test_an_audit_sends_nothing_and_leaves_only_its_output(
    parties: Parties,
    trained_folder: Path,
    tmp_path: Path,
    temporary: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "audit"
    before = {path: path.stat().st_mtime_ns for path in parties.folder.rglob("*")}
    arguments = ["audit", str(parties.files["hotel"]), str(trained_folder / "models" / "cinema"), "--out", str(out)]
    with watched() as seen:
        cli(arguments, standalone_mode=False)
    said = capsys.readouterr().out
    assert [event for event, _ in seen if event.startswith("socket.")] == []
    elsewhere = {path for path in changed_paths(seen) if not path.is_relative_to(out)}
    assert all(path.is_relative_to(temporary) for path in elsewhere)
    copied = {path.name for path in elsewhere if path.suffix}
    assert copied == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    assert list(temporary.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in parties.folder.rglob("*")} == before
    assert sorted(path.name for path in out.iterdir()) == ["audit.html", "audit.json"]
    audit = Audit.model_validate_json((out / "audit.json").read_text())
    assert audit.owner == "hotel"
    assert "Shown one of your training rows and a stranger" in said
    assert len(said.splitlines()) < 40
    page = (out / "audit.html").read_text()
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org/", "")  # names of SVG, which nothing fetches


def test_an_owner_without_a_model_has_it_made_for_the_audit_and_kept_by_nobody(
    parties_that_train: Parties, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parties, out = parties_that_train, tmp_path / "audit"
    owner = parties.files["phones"]
    owner.write_text(owner.read_text().replace("canaries = 0", "canaries = 10"))
    cli(["audit", str(owner), "--out", str(out), "--rows", "50", "--json"], standalone_mode=False)
    audit = Audit.model_validate(json.loads(capsys.readouterr().out), strict=False)
    assert [model.name for model in audit.models] == ["base", "own"]
    assert all(model.canaries is not None and model.canaries.planted == 10 for model in audit.models)
    assert audit.rows.made_here
    assert not list(parties.folder.rglob("made_from.json"))


@pytest.mark.parametrize(
    "call",
    [
        "audit import audit_and_show as f; f(Path('none.toml'), None, None, None, Path('out'), 10)",
        "personal import make_and_show as f; f(Path('none.toml'), Path('model'), Path('out'))",
    ],
    ids=["audit", "personal"],
)
def test_what_an_owner_does_alone_keeps_the_hub_s_client_off_the_network(call: str, tmp_path: Path) -> None:
    """It reads the environment when it is imported, so a process of its own is needed."""
    program = (
        "from pathlib import Path; from contextlib import suppress\n"
        "from common.errors import AmalgramError\n"
        f"with suppress(AmalgramError): from deploy.commands.{call}\n"
        "from huggingface_hub import constants; print(constants.HF_HUB_OFFLINE)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "True"


def test_a_base_for_no_model_is_refused() -> None:
    with pytest.raises(SettingsError, match="--base: names a base for no model"):
        audit_and_show(Path("none.toml"), None, Path("base"), None, Path("out"), 10)
