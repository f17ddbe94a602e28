"""The Flower bundle: the app's own code and nothing else, the same bytes from any clone."""

import hashlib
import shutil
import subprocess
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

ROOT = Path(__file__).resolve().parent.parent


def clone_to(folder: Path) -> Path:
    """A copy of what git knows or would add, as a clone has it; with litter that a work tree gathers."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / "private.jsonl").write_text("a private row\n")
    (folder / "client" / "__pycache__").mkdir(exist_ok=True)
    (folder / "client" / "__pycache__" / "litter.pyc").write_bytes(folder.name.encode())
    return folder


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    return [build_fab_from_disk(clone_to(tmp_path_factory.mktemp(name))) for name in ("one", "other")]


def test_two_clones_give_the_same_bundle(bundles: list[bytes]) -> None:
    assert len({hashlib.sha256(bundle).hexdigest() for bundle in bundles}) == 1


def test_the_bundle_holds_the_app_s_code_and_nothing_else(bundles: list[bytes]) -> None:
    names = zipfile.ZipFile(BytesIO(bundles[0])).namelist()
    code = [name for name in names if not name.startswith(".info") and name not in ("pyproject.toml", "LICENSE")]
    card = "server/report/model_card.jinja.md"  # the server's app fills it in
    python = [name for name in code if name != card]
    assert all(name.split("/")[0] in ("common", "client", "server") and name.endswith(".py") for name in python), names
    for needed in ("client/app.py", "server/app.py", "common/summation/plain.py", card):
        assert needed in code
