"""Which benchmark runs replace published results."""

import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import published


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(published, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def size(results: Mapping[str, Any]) -> dict[str, float]:
    return {"owners": results["owners"], "rows": results["rows"]}


def results_of(owners: int, rows: int) -> dict[str, int]:
    return {"owners": owners, "rows": rows}


def test_the_first_run_is_published_whatever_its_size(folder: Path) -> None:
    assert published.publish("sum", results_of(1, 1), "page", size)
    assert (folder / "sum.md").read_text() == "page"
    assert published.published("sum") == results_of(1, 1)


@pytest.mark.parametrize(("owners", "rows"), [(3, 100), (4, 200)])
def test_a_run_that_is_as_large_or_larger_replaces_the_published_one(folder: Path, owners: int, rows: int) -> None:
    published.publish("sum", results_of(3, 100), "old", size)
    assert published.publish("sum", results_of(owners, rows), "new", size)
    assert (folder / "sum.md").read_text() == "new"
    assert published.published("sum") == results_of(owners, rows)


@pytest.mark.parametrize(("owners", "rows"), [(2, 100), (3, 99), (30, 1)])
def test_a_run_that_is_smaller_in_anything_replaces_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], owners: int, rows: int
) -> None:
    published.publish("sum", results_of(3, 100), "old", size)
    assert not published.publish("sum", results_of(owners, rows), "new", size)
    assert (folder / "sum.md").read_text() == "old"
    assert json.loads((folder / "sum.json").read_text()) == results_of(3, 100)
    assert "results/sum.md is kept: this run measured" in capsys.readouterr().err


def test_a_run_without_a_part_of_the_published_one_replaces_nothing(folder: Path) -> None:
    def parts(results: Mapping[str, Any]) -> Mapping[str, float]:
        return dict.fromkeys(results, 1.0)

    published.publish("sum", {"masks": 1, "demo": 2}, "old", parts)
    assert not published.publish("sum", {"masks": 3}, "new", parts)


def test_no_benchmark_writes_results_by_itself() -> None:
    scripts = [path for path in Path(published.__file__).parent.glob("*.py") if path.name != "published.py"]
    assert len(scripts) > 20
    writers = [path.name for path in scripts if re.search(r"(RESULTS|results\b).*\.(write|open)", path.read_text())]
    assert writers == []


def test_the_quick_benchmarks_exist_and_fit_into_ten_minutes() -> None:
    for command in benchmarks.SECONDS:
        assert (Path(published.__file__).parent / f"{command.split()[0]}.py").is_file()
    assert sum(benchmarks.SECONDS.values()) < benchmarks.LIMIT_SECONDS


def test_what_does_not_fit_is_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run: list[str] = []
    monkeypatch.setattr(benchmarks, "reference_seconds", lambda: 2 * benchmarks.REFERENCE_SECONDS)
    monkeypatch.setattr(benchmarks, "SECONDS", {"payload": 250, "gram --quick": 400, "solve": 1})

    def ran(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        run.append(command[2])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", ran)
    benchmarks.main()
    assert run == ["benchmarks.payload", "benchmarks.solve"]
    shown = capsys.readouterr().out
    assert shown.startswith("3 benchmarks, about 22 minutes on this machine\n")
    assert shown.endswith("not within ten minutes: python -m benchmarks.gram --quick\n")
