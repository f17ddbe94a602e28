"""Shows which parts of Flower that the launchers rely on differ in another version, and how.

    $ python -m deploy.launch.check_flower 1.42.0
    supercore/app_utils.py              unchanged
    superlink/main.py                   create_app differs
    ...

Every named function that differs is followed by its unified diff, and so is the rest of its file. Downloads that
version with pip into a temporary folder; nothing is installed or run. Exits with 1 if anything differs.
"""

import argparse
import ast
import difflib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import flwr

from common.errors import EngineError
from deploy.launch.internals import RELIED_ON, VERSION

REST = "the rest of the file"


def compare(before: Path, after: Path, relied_on: Mapping[str, Sequence[str]]) -> dict[str, dict[str, str]]:
    """File -> part -> unified diff, for the parts of `relied_on` that differ between two folders of Flower's code."""
    return {name: dict(_differences(before / name, after / name, parts)) for name, parts in relied_on.items()}


def _differences(before: Path, after: Path, parts: Sequence[str]) -> Iterator[tuple[str, str]]:
    old, new = (_parts_of(path.read_text() if path.is_file() else "", parts) for path in (before, after))
    for part in (*parts, REST):
        if old[part] != new[part]:
            names = (f"before: {part}", f"after: {part}")
            yield part, "\n".join(difflib.unified_diff(old[part], new[part], *names, lineterm=""))


def _parts_of(source: str, parts: Sequence[str]) -> dict[str, list[str]]:
    """The lines of each named function, and of the rest. A part that is missing has none."""
    lines = source.splitlines()
    ranges = {name: place for name, place in _functions(ast.parse(source)) if name in parts}
    found = {name: lines[ranges[name]] if name in ranges else [] for name in parts}
    taken = {number for place in ranges.values() for number in range(place.start, place.stop)}
    return found | {REST: [line for number, line in enumerate(lines) if number not in taken]}


def _functions(tree: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, slice]]:
    """Functions and classes with their lines: `name`, or `Class.name`."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield f"{prefix}{node.name}", slice(first - 1, node.end_lineno)
        if isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{prefix}{node.name}.")


def download(version: str, folder: Path) -> Path:
    """The code of a released version of Flower, unpacked in `folder`. Raises EngineError if pip does not get it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    done = subprocess.run(
        [*command, "--dest", str(folder), f"flwr=={version}"], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("flwr-*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise EngineError(
            f"pip did not download flwr {version}: {done.stderr.strip()}", hint="is there such a version?"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(folder)
    return folder / "flwr"


def as_text(differences: Mapping[str, Mapping[str, str]]) -> str:
    """A line per file, then the diffs."""
    width = max(map(len, differences))
    lines = [
        f"{name:{width}}  {', '.join(parts) + ' differs' if parts else 'unchanged'}"
        for name, parts in differences.items()
    ]
    for name, parts in differences.items():
        for diff in parts.values():
            lines += ["", f"=== {name}", diff]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", help=f"the version to compare with the installed one, which should be {VERSION}")
    version = parser.parse_args().version
    with tempfile.TemporaryDirectory() as folder:
        other = download(version, Path(folder))
        differences = compare(Path(flwr.__file__).parent, other, RELIED_ON)
    print(as_text(differences))
    return int(any(differences.values()))


if __name__ == "__main__":
    sys.exit(main())
