"""What the commands show: at a terminal, in a file, as JSON; help, first steps, completion."""

import inspect
import io
import json
import logging
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
from rich.console import Console
from typer.core import TyperArgument

import amalgram as amalgram_module
from common.errors import SettingsError
from deploy import terminal
from deploy.cli import FIRST_STEPS, cli, parser
from tests.support.command_line import parse, parsers
from tests.support.commands import amalgram, started
from tests.support.documents import ROOT
from tests.support.listeners import GUARD, listening, over_tls
from tests.support.once import TRAINED

PARSERS = [pytest.param(*each, id=each[0]) for each in sorted(parsers(), key=lambda each: each[0])]
COMMANDS = [each for each in PARSERS if not isinstance(each.values[1], click.Group)]


@pytest.fixture
def small_consortium(trained_folder: Path, tmp_path: Path) -> Path:
    """The example with one method."""
    folder = Path(shutil.copytree(trained_folder, tmp_path / "reviews"))
    merge_only_the_average(folder)
    return folder


@pytest.fixture
def small_consortium_that_trains(little_folder: Path, tmp_path: Path) -> Path:
    """The same, but owners make their models, in one epoch."""
    folder = Path(shutil.copytree(little_folder, tmp_path / "reviews"))
    merge_only_the_average(folder)
    for name in ("hotel", "cinema", "phones"):
        own = folder / f"{name}.toml"
        own.write_text(own.read_text().replace("epochs = 6", "epochs = 1"))
    return folder


def merge_only_the_average(consortium: Path) -> None:
    draft = consortium / "agreement.toml"
    text = draft.read_text().replace('method = "regmean"', 'method = "average"')
    draft.write_text(text.replace('["average", "task_arithmetic", "fisher"]', "[]"))


# --- packages of ours whose names others use, too ---


@pytest.mark.parametrize("name", ["common", "client", "server", "deploy"])
def test_another_package_of_the_same_name_is_named_in_two_lines(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", "import amalgram; amalgram.main()", "--version"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: the package {name!r} is {tmp_path / name}, not Amalgram's",
        "hint: give Amalgram a virtual environment of its own, without PYTHONPATH",
    ]


def test_torch_is_told_to_wait_asleep_and_to_take_memory_in_large_pages() -> None:
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"  # set by `import amalgram`, as the command does
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"


# --- progress ---


def test_a_terminal_shows_steps_owners_and_bars_and_its_output_keeps_the_table(
    small_consortium_that_trains: Path,
) -> None:
    reading, writing = pty.openpty()
    command = "simulate", small_consortium_that_trains, "--no-references"
    anew = {TRAINED: "", "TERM": "xterm", "COLUMNS": "120"}  # fine-tuning shows a bar
    with started(*command, cwd=small_consortium_that_trains, terminal=writing, **anew) as run:
        os.close(writing)
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(iter(lambda: _read(reading), b"")).decode())
        table = run.stdout.read()
        assert run.exit_code() == 0
    for words in ("step 2 of 5: sum of contributions", "step 5 of 5: result", "hotel: fine-tuning ━"):
        assert words in shown
    sizes = re.findall(r"([\d.]+)/([\d.]+) kB", shown)
    assert sizes
    assert all(float(moved) <= float(expected) for moved, expected in sizes)
    for state in ("at work", "answered"):
        assert re.search(rf"  cinema .*{state}", shown)
    assert "Reviews of three shops" in table
    assert "\x1b" not in table


def _read(terminal_side: int) -> bytes:
    try:
        return os.read(terminal_side, 65536)
    except OSError:  # Linux says so when the other side is closed
        return b""


def test_a_file_gets_one_plain_line_a_step_and_with_json_nothing_but_the_report(
    small_consortium: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli(["simulate", str(small_consortium), "--no-references"], standalone_mode=False)
    lines = capsys.readouterr().err.splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d (  )?\S", line) for line in lines)
    assert [line[9:] for line in lines if " owners" in line] == [
        "sum of contributions, 3 owners",
        "random numbers for the check, 3 owners",
        "sum of test metrics, 3 owners",
        "result, 3 owners",
    ]
    cli(["report", str(small_consortium / "output"), "--json"], standalone_mode=False)
    report = json.loads(capsys.readouterr().out)
    cli(["report", str(small_consortium), "--json"], standalone_mode=False)  # the consortium's folder does as well
    assert json.loads(capsys.readouterr().out) == report
    with pytest.raises(SettingsError, match=r"agreement\.toml: is a file; name the folder that it is in: .*/reviews$"):
        cli(["simulate", str(small_consortium / "agreement.toml")], standalone_mode=False)
    capsys.readouterr()
    cli(["simulate", str(small_consortium), "--no-references", "--json"], standalone_mode=False)
    again = capsys.readouterr()
    assert json.loads(again.out)["digests"]["model"] == report["digests"]["model"]
    assert all(json.loads(line)["level"] for line in again.err.splitlines())


def rows_shown(*told: dict[str, Any], monkeypatch: pytest.MonkeyPatch, pause_seconds: float = 0.0) -> str:
    """The last picture of the rows after these records."""
    screen = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(terminal, "messages", lambda: screen)
    with terminal.progress_below_log():
        for about in told:
            terminal.log.warning("told", extra={"about": about})
            time.sleep(pause_seconds)
        (rows,) = [each for each in terminal.log.handlers if isinstance(each, terminal._Rows)]
        picture = Console(file=io.StringIO(), width=120)
        picture.print(rows._progress.get_renderable())
    assert not any(isinstance(each, terminal._Rows) for each in terminal.log.handlers)
    return picture.file.getvalue()  # type: ignore[attr-defined]


def step_begun(*owners: str, payload_bytes: int) -> dict[str, Any]:
    about = {"step": "sum of contribution", "number": 2, "num_steps": 8, "owners": owners}
    return about | {"payload_bytes_each": payload_bytes}


def answers(done: list[str], waiting: list[str], arrived: dict[str, int]) -> dict[str, Any]:
    return {"step": "sum of contribution", "done": done, "waiting_for": waiting, "payload_bytes": arrived}


def test_a_row_tells_what_has_arrived_and_who_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = rows_shown(
        step_begun("ada", "bea", "cyd", payload_bytes=128_000_000),
        answers(["ada"], ["bea"], {"ada": 64_000_000, "bea": 0, "cyd": 64_000_000}),
        monkeypatch=monkeypatch,
    )
    run, ada, bea, cyd = shown.splitlines()
    assert run.startswith("step 2 of 8: sum of contribution")
    assert "64.0/128.0 MB" in ada
    assert "answered" in ada
    assert "at work" in bea
    assert "MB" not in bea  # nothing of its vector has come, so nothing is said of it
    assert "dropped out" in cyd


def test_rate_and_remaining_time_are_shown_from_the_second_part_to_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    told = [step_begun("ada", "bea", "cyd", payload_bytes=192_000_000)]
    for arrived in (64_000_000, 128_000_000, 192_000_000):
        told.append(answers(["ada"], ["bea", "cyd"], {"ada": arrived}))
        _, ada, bea, _ = rows_shown(*told, monkeypatch=monkeypatch, pause_seconds=0.05).splitlines()
        assert f"{arrived / 1e6:.1f}/192.0 MB" in ada
        assert bool(re.search(r"B/s +\d+:\d\d +answered", ada)) == (arrived == 128_000_000)
        assert "?" not in ada
        assert "B/s" not in bea


def test_many_owners_share_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    owners = [f"o{number}" for number in range(40)]
    arrived = dict.fromkeys(owners, 0) | dict.fromkeys(owners[:10], 5_000_000)
    shown = rows_shown(
        step_begun(*owners, payload_bytes=10_000_000),
        answers(owners[:10], owners[10:], arrived),
        monkeypatch=monkeypatch,
    )
    _, together = shown.splitlines()
    assert "40 owners" in together
    assert "50.0/400.0 MB" in together
    assert "10 of 40 answered" in together


def test_the_rows_are_gone_when_the_run_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = step_begun("ada", "bea", "cyd", payload_bytes=0)
    assert rows_shown(begun, {"step": "finish"}, monkeypatch=monkeypatch).strip() == ""


def test_nothing_is_drawn_where_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "messages", lambda: Console(file=io.StringIO()))
    before = list(terminal.log.handlers)
    with terminal.progress_below_log():
        assert terminal.log.handlers == before


# --- from Python ---


def test_a_script_that_merges_shows_nothing_or_one_bar(
    little_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    terminal.log.handlers = [logging.NullHandler()]
    terminal.log.setLevel(logging.NOTSET)
    draft = 'title = "Two"\nbase = "base"\nmethod = "average"\n[summation]\nkind = "plain"\n'
    (tmp_path / "agreement.toml").write_text(draft + '[[owners]]\nname = "hotel"\n[[owners]]\nname = "cinema"\n')
    for name, suffix in (("hotel", "jsonl"), ("cinema", "csv")):
        data = f'[data]\ntrain = "data/{name}/train.{suffix}"\ntest = "data/{name}/test.{suffix}"\n'
        (tmp_path / f"{name}.toml").write_text(f'name = "{name}"\nfine_tuned = "base"\n{data}')
    for name in ("base", "data"):
        shutil.copytree(little_folder / name, tmp_path / name)
    for progress in (False, True):
        merged = amalgram_module.simulate(tmp_path, progress=progress, with_references=False)
        shown = capfd.readouterr()
        assert shown.out == ""
        assert shown.err == "" if not progress else re.fullmatch(r"━+ merged 0:00:\d\d\n", shown.err)
    assert (merged.model / "config.json").is_file()
    assert merged.page.is_file()
    assert amalgram_module.report(tmp_path / "output") == merged
    assert terminal.log.level == logging.NOTSET


# --- help, first steps, completion ---


def test_amalgram_alone_says_what_to_do_first(tmp_path: Path) -> None:
    done = amalgram(cwd=tmp_path)
    assert (done.stdout.rstrip("\n"), done.stderr) == (FIRST_STEPS, "")
    for line in FIRST_STEPS.splitlines():
        arguments = shlex.split(re.split(r" {2,}", line)[0])
        assert arguments[0] == "amalgram"
        parse(arguments[1:])


@pytest.mark.parametrize(("words", "command"), PARSERS)
def test_every_help_has_an_example_that_parses(words: str, command: click.Command) -> None:
    (example,) = re.findall(r"^Example: (.*)$", inspect.cleandoc(command.help or ""), re.MULTILINE)
    assert words in example
    for line in example.split(" && "):
        called, *arguments = shlex.split(line)
        assert called == "amalgram"
        parse(arguments)


@pytest.mark.parametrize(("words", "command"), PARSERS)
def test_h_and_help_show_the_same_help(words: str, command: click.Command, capsys: pytest.CaptureFixture[str]) -> None:
    asked = words.split()[1:]
    shown = []
    for option in ("-h", "--help"):
        parser()([*asked, option], standalone_mode=False)
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert inspect.cleandoc(command.help or "").splitlines()[0] in " ".join(shown[0].split())


@pytest.mark.parametrize(("words", "command"), PARSERS)
def test_a_help_says_what_each_argument_is(
    words: str, command: click.Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    parser()([*words.split()[1:], "--help"], standalone_mode=False)
    shown = " ".join(capsys.readouterr().out.split())
    for argument in command.params:
        if isinstance(argument, TyperArgument):
            assert argument.help
            assert argument.help in shown


def test_the_version_is_the_package_s(tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert amalgram("--version", cwd=tmp_path).stdout == f"amalgram {project['version']}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_the_commands(shell: str, tmp_path: Path) -> None:
    script = amalgram(cwd=tmp_path, _AMALGRAM_COMPLETE=f"source_{shell}").stdout
    assert "_AMALGRAM_COMPLETE=complete_" in script
    asked = {"_AMALGRAM_COMPLETE": f"complete_{shell}", "COMP_WORDS": "amalgram ", "COMP_CWORD": "1"}
    asked |= {"_TYPER_COMPLETE_ARGS": "amalgram ", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    offered = amalgram(cwd=tmp_path, **asked).stdout
    for words, _ in (each.values for each in PARSERS):
        if words.count(" ") == 1:
            assert words.split()[1] in offered


# --- JSON ---


@pytest.mark.parametrize(("words", "command"), COMMANDS)
def test_every_command_can_answer_in_json(words: str, command: click.Command) -> None:
    assert any("--json" in parameter.opts for parameter in command.params), words


def test_with_json_standard_output_is_one_object_and_nothing_else(
    reviews_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = Path(shutil.copytree(reviews_folder, tmp_path / "home"))
    monkeypatch.chdir(home)

    def answer(*arguments: str) -> dict[str, Any]:
        cli([*arguments, "--json"], standalone_mode=False)
        found = json.loads(capsys.readouterr().out)
        assert isinstance(found, dict)
        return found

    for name in ("hotel", "cinema", "phones", "coordinator"):
        made = answer("keys", "new", name)
        assert made["public"] == f"{name}.pub"
        assert all(Path(path).stat().st_mode & 0o077 == 0 for path in made["secret"])
        shown = answer("keys", "show", f"{name}.pub")
        assert shown == {key: made[key] for key in ("name", "public_key", "fingerprint")}
    assert answer("keys", "certificate", "127.0.0.1")["written"] == ["ca.key", "ca.pem", "server.key", "server.pem"]
    assert answer("keys", "show", "ca.pem")["certificate"] == "CN=Amalgram coordinator CA"
    drafted = answer("draft", "agreement.toml", *(f"{path.stem}.pub" for path in home.glob("*.pub")), "--out", "a.toml")
    own = home / "hotel.toml"
    own.write_text('agreement = "a.toml"\n' + own.read_text() + '[network]\naddress = "127.0.0.1:1"\n')
    agreed = answer("agree", "hotel.toml", "--yes", drafted["fingerprint"])
    assert agreed["digest"] == drafted["digest"]
    assert drafted["fingerprint"] in agreed["read"]
    assert answer("simulate", "--init", "another")["folder"] == "another"
    with listening(over_tls(home, GUARD)) as port:
        own.write_text(own.read_text().replace("127.0.0.1:1", f"127.0.0.1:{port}"))
        assert first_object("client", "hotel.toml", cwd=home)["address"] == f"127.0.0.1:{port}"
    (home / "coordinator.toml").write_text(
        'agreement = "a.toml"\noutput = "output"\n[network]\nlisten = "127.0.0.1:1"\n'
    )
    assert first_object("server", "coordinator.toml", cwd=home)["owners"] == ["hotel", "cinema", "phones"]


def first_object(*arguments: str, cwd: Path) -> dict[str, Any]:
    """What a command that runs until it is stopped says at once, and that it says nothing more when it is."""
    with started(*arguments, "--json", cwd=cwd) as run:
        lines: list[str] = []
        while not lines or lines[-1] != "}\n":
            lines.append(run.stdout.readline())
            assert lines[-1], run.stderr.read()
        run.send_signal(signal.SIGTERM)
        rest, told = run.stdout.read(), run.stderr.read()
        run.exit_code(60)
    assert rest == ""
    for line in told.splitlines():
        json.loads(line)
    found: dict[str, Any] = json.loads("".join(lines))
    return found
