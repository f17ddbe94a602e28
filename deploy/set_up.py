"""Make `.venv`, or bring it up to date: what the product needs and, with `--development`, the tools of the tests.

The Makefile runs this file with the reader's own Python, before anything is installed, so it imports the standard
library alone. Two runs at a time wait for each other. Packages are added to `.venv`, which is never deleted, so a
command that already runs from it is not disturbed.
"""

import fcntl
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECT, CONSTRAINTS = ROOT / "pyproject.toml", ROOT / "constraints.txt"
VENV = ROOT / ".venv"
PRODUCT, DEVELOPMENT = VENV / "product", VENV / "development"  # each is touched once all of its packages are there
EXTRAS = ("dp", "ray", "dev")  # what the tests need beyond the product


def main() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 - the reader's Python may be older than the one we ask for
        version = sys.version.split()[0]
        sys.exit(f"error: amalgram needs Python 3.11 or newer, this is {version}\nhint: make PYTHON=python3.12")
    VENV.mkdir(exist_ok=True)
    with (VENV / "set-up.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_fresh(PRODUCT):
            print("installing what the product needs in .venv; this takes a few minutes", flush=True)
            subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
            _install("torch")  # alone and first, so that its constraint chooses the build
            _install("--editable", str(ROOT))
            PRODUCT.touch()
        if "--development" in sys.argv[1:] and not _is_fresh(DEVELOPMENT):
            print("adding the development tools", flush=True)
            _install(*_requirements_of(EXTRAS))
            DEVELOPMENT.touch()


def _is_fresh(stamp: Path) -> bool:
    return stamp.exists() and all(stamp.stat().st_mtime >= each.stat().st_mtime for each in (PROJECT, CONSTRAINTS))


def _requirements_of(extras: tuple[str, ...]) -> list[str]:
    """What the extras list. To install `.[ray,dev]` instead would replace the product under whoever runs it."""
    import tomllib

    listed = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]
    return [requirement for extra in extras for requirement in listed[extra]]


def _install(*what: str) -> None:
    command = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, "--constraint", str(CONSTRAINTS), *what], check=True)


if __name__ == "__main__":
    main()
