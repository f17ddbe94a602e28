"""The walls of the house: who may import whom."""

import ast
import os
import re
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"common", "client", "server", "deploy"}
ALLOWED = {"common": {"common"}, "client": {"client", "common"}, "server": {"server", "common"}, "deploy": OURS}
READ_PUBLIC_ROWS = {"common/pool.py", "common/pool_rows.py"}
IMPORT_FLOWER = {"common/wire.py", "client/app.py", "server/app.py"}
SOURCES = [path.relative_to(ROOT) for package in sorted(OURS) for path in sorted((ROOT / package).rglob("*.py"))]


@cache
def imported_packages(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_flow_from_deploy_to_server_and_client_to_common(path: Path) -> None:
    forbidden = (imported_packages(path) & OURS) - ALLOWED[path.parts[0]]
    assert not forbidden, f"{path} imports {forbidden}"


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imported_modules(path: Path, known: set[str]) -> set[str]:
    """The modules of ours that a module imports when it is imported itself, or for its types."""
    found = set()
    waiting: list[ast.AST] = [ast.parse((ROOT / path).read_text())]
    while waiting:
        for node in ast.iter_child_nodes(waiting.pop()):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found.update(name if name in known else node.module for name in names)
            elif isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                waiting.append(node)
    return found & known - {module_name(path)}


@pytest.mark.parametrize("room", sorted(OURS))
def test_imports_inside_a_top_level_folder_have_no_circle(room: str) -> None:
    known = {module_name(path) for path in SOURCES if path.parts[0] == room}
    imports = {module_name(path): imported_modules(path, known) for path in SOURCES if path.parts[0] == room}
    TopologicalSorter(imports).prepare()  # raises CycleError, which names the circle


def test_a_circle_would_be_found() -> None:
    with pytest.raises(CycleError, match="cycle"):
        TopologicalSorter({"common.one": {"common.other"}, "common.other": {"common.one"}}).prepare()


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_only_the_apps_the_records_and_deploy_import_flower(path: Path) -> None:
    if path.parts[0] != "deploy" and str(path) not in IMPORT_FLOWER:
        assert "flwr" not in imported_packages(path)


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_only_the_client_and_simulations_open_private_rows(path: Path) -> None:
    """What reads files of rows is in common/data/. The coordinator has no other rows than those of a public pool."""
    known = {module_name(each) for each in SOURCES}
    reads = {each for each in imported_modules(path, known) if each.startswith("common.data.")}
    reads |= {"pyarrow"} & imported_packages(path)
    is_allowed = path.parts[0] == "client" or path.parts[:2] in (("common", "data"), ("deploy", "example"))
    assert not reads or is_allowed or path.as_posix() in READ_PUBLIC_ROWS, reads


def test_forward_hooks_are_in_four_places() -> None:
    users = [str(path) for path in SOURCES if "register_forward" in (ROOT / path).read_text()]
    assert users == [f"client/measurement/{name}.py" for name in ("blocks", "forgetting", "gram", "placement")]


def test_no_test_module_imports_another() -> None:
    pattern = re.compile(r"^(from|import) tests\.(\w+\.)*test_", re.MULTILINE)
    importing = [
        str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py") if pattern.search(path.read_text())
    ]
    assert not importing


def test_common_and_an_owner_s_app_start_without_the_libraries_that_few_processes_need() -> None:
    """Flower answers each packet in a new process, and importing torch and transformers takes seconds."""
    paths = [path for path in SOURCES if path.parts[0] == "common"] + [Path("client/app.py")]
    modules = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths]
    slow = ("torch", "transformers", "huggingface_hub", "peft", "sklearn", "pyarrow")
    program = f"import sys, {', '.join(modules)}; print([name for name in {slow} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


HEAVY = frozenset(
    {
        *("torch", "transformers", "peft", "huggingface_hub", "sklearn", "scipy", "pyarrow", "matplotlib"),
        *("flwr", "grpc", "ray", "httpx", "numpy", "pydantic", "cryptography"),
    }
)
NOT_THERE = "none.toml"


@pytest.mark.parametrize(
    ("command", "may_import", "says"),
    [
        ("--help", set(), "Usage"),
        (f"client {NOT_THERE}", set(), "cannot be read"),  # refused by whoever reads the arguments
        ("keys show not-there.pub", {"cryptography", "pydantic"}, "cannot be read"),
        ("health coordinator.toml", {"cryptography", "pydantic"}, "has no [network] table"),
        ("client owner.toml", {"cryptography", "pydantic", "numpy"}, "has no [network] table"),
        ("merge coordinator.toml", {"cryptography", "pydantic", "numpy"}, "has no [network] table"),
    ],
)
def test_a_command_imports_only_what_it_needs(command: str, may_import: set[str], says: str, tmp_path: Path) -> None:
    """How long a command takes to start is how much it imports; seconds would depend on the machine."""
    (tmp_path / "coordinator.toml").write_text(f'agreement = "{NOT_THERE}"\noutput = "output"\nbase = "base"\n')
    (tmp_path / "owner.toml").write_text(
        f'name = "owner"\nagreement = "{NOT_THERE}"\nfine_tuned = "model"\n[data]\ntrain = "a"\ntest = "b"\n'
    )
    program = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print('imported:', *sorted({set(HEAVY)} & sys.modules.keys())))\n"
        "import amalgram; amalgram.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *command.split()],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert says in done.stdout + done.stderr
    imported = set(done.stdout.splitlines()[-1].removeprefix("imported:").split())
    assert imported <= may_import
