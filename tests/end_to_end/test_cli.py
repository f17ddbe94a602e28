"""The command as a person runs it: what it prints, and what it exits with."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from common.agreement import Agreement
from common.identity import fingerprint
from common.settings_file import load_settings
from tests.support.commands import amalgram, started


def test_the_installed_command_runs(tmp_path: Path) -> None:
    command = [Path(sys.executable).parent / "amalgram", "keys", "new", "Hotel Ltd"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: 'Hotel Ltd' is not a name")


def test_example_is_written_runs_and_is_reported(tmp_path: Path) -> None:
    written = amalgram("simulate", "--init", "reviews", cwd=tmp_path)
    assert written.returncode == 0, written.stderr
    assert "wrote an example of three owners to reviews" in written.stderr
    agreement = tmp_path / "reviews" / "agreement.toml"  # docs/merge-in-ten-minutes.md runs it as it is
    agreement.write_text(agreement.read_text().replace('["average", "task_arithmetic", "regmean"]', "[]"))
    ran = amalgram("simulate", "reviews", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    for shown in (
        "Reviews of three shops",
        "data-free",
        "multi-task *",
        "masked sum: the coordinator saw totals",
        "reviews/output/model",
    ):
        assert shown in ran.stdout
    assert "sum of contributions" in ran.stderr
    (tmp_path / "reviews" / "output" / "report.html").unlink()
    shown = amalgram("report", "reviews/output", "--json", cwd=tmp_path)
    assert json.loads(shown.stdout)["owners"] == ["hotel", "cinema", "phones"]
    assert (tmp_path / "reviews" / "output" / "report.html").is_file()


def test_a_consortium_is_set_up_without_anybody_holding_another_s_key(reviews_folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "consortium"
    shutil.copytree(reviews_folder, home, ignore=shutil.ignore_patterns("output"))
    parties = ("hotel", "cinema", "phones", "coordinator")
    for name in parties:
        made = amalgram("keys", "new", name, cwd=home)
        assert made.returncode == 0, made.stderr
        shown = amalgram("keys", "show", f"{name}.pub", cwd=home)
        assert shown.stdout == made.stdout
        assert "fingerprint" in shown.stdout
        assert (home / f"{name}.node").exists() == (name != "coordinator")
    amalgram("keys", "certificate", "merge.example.org", cwd=home)
    shown = amalgram("keys", "show", "ca.pem", cwd=home)
    root = x509.load_pem_x509_certificate((home / "ca.pem").read_bytes())
    assert "CN=Amalgram coordinator CA\n" in shown.stdout
    assert fingerprint(root.public_bytes(Encoding.DER)) in shown.stdout
    public = [f"{name}.pub" for name in parties]
    drafted = amalgram("draft", "agreement.toml", *public, "--out", "agreed.toml", cwd=home)
    assert drafted.returncode == 0, drafted.stderr
    owner = home / "hotel.toml"
    owner.write_text('agreement = "agreed.toml"\n' + owner.read_text())
    digits = drafted.stdout.split("fingerprint")[1].strip()
    agreed = amalgram("agree", "hotel.toml", "--yes", digits, cwd=home)
    assert agreed.returncode == 0, agreed.stderr
    for says in (
        f"Fingerprint:  {digits}",
        "One vector of 384,305 numbers, 3.1 MB",
        "Nobody. Your vector leaves masked",
        "At least 3 of 3 owners, in every round.",
        "This is the code that is installed here.",
        "Never publish your own fine-tuned model",
    ):
        assert says in agreed.stdout
    assert list(json.loads((home / "state" / "consent.json").read_text())["agreements"]) == [
        load_settings(home / "agreed.toml", Agreement).digest()
    ]
    assert all(owner.node_key for owner in load_settings(home / "agreed.toml", Agreement).owners)
    plain = home / "agreed.toml"
    changed = plain.read_text().replace('kind = "masked"', 'kind = "plain"')
    plain.write_text(re.sub('bundle_digest = "[0-9a-f]{64}"', f'bundle_digest = "{"0" * 64}"', changed))
    shown = amalgram("agree", "hotel.toml", "--yes", digits, cwd=home)
    assert (shown.returncode, "--yes names another fingerprint" in shown.stderr) == (3, True)
    assert "THE COORDINATOR SEES YOUR VECTOR, NUMBER BY NUMBER." in shown.stdout
    assert "Nobody. Your vector leaves masked" not in shown.stdout
    assert "THIS IS NOT THE CODE THAT IS INSTALLED HERE." in shown.stdout
    # what goes wrong says so in one line
    cinema = home / "cinema.toml"
    cinema.write_text('state = "state-cinema"\n' + cinema.read_text())
    for arguments, code, says in (
        (["keys", "new", "hotel"], 2, "hotel.key: already exists, and a key is never overwritten"),
        (["keys", "new", "Hotel Ltd"], 2, "'Hotel Ltd' is not a name"),
        (
            ["draft", "agreement.toml", *public],
            2,
            "agreement.toml: exists already\nhint: move it away, or name another file with --out",
        ),
        (
            ["draft", "agreement.toml", *public[1:], "--out", "x.toml"],
            2,
            "no public key of hotel\nhint: ask for its .pub",
        ),
        (["agree", "cinema.toml", "--yes", digits], 2, "is missing"),
        (["agree", "hotel.toml"], 2, "consent is asked for at a terminal"),
    ):
        done = amalgram(*arguments, cwd=home)
        assert (done.returncode, says in done.stderr) == (code, True), done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "exit_code", "says"),
    [
        (["simulate", "nowhere"], 2, "error: {cwd}/nowhere: has no agreement.toml\nhint: `amalgram simulate --init"),
        (["simulate", "--init"], 2, "error: --init needs a FOLDER"),
        (["simulate", "--init", "."], 2, "error: .: already exists and is not empty\nhint: name a new folder"),
        (["report", "nowhere"], 2, "error: nowhere/report.json: no such file"),
        (["simulate", "--out", ".."], 2, "already exists and is not an output folder of amalgram"),
        (["simulate", "--engine", "warp"], 2, "Invalid value for '--engine'"),
        (["mrege"], 2, "No such command 'mrege'"),
        (["merge", "nothing.toml"], 2, "nothing.toml: cannot be read (No such file or directory)"),
        (
            ["server", "something.toml"],
            2,
            'has no [network] table\nhint: it needs at least listen = "0.0.0',
        ),
        (
            ["client", "owner.toml"],
            2,
            'has no [network] table\nhint: it needs at least address = "HOST',
        ),
        (
            ["keys", "certificate", "a b"],
            2,
            "'a b': is not a host name or address\nhint: use ASCII letters, and leave",
        ),
    ],
)
def test_errors_are_one_line_with_an_honest_exit_code(
    arguments: list[str], exit_code: int, says: str, tmp_path: Path
) -> None:
    (tmp_path / "something").touch()
    (tmp_path / "something.toml").write_text('agreement = "a.toml"\noutput = "o"\n')
    (tmp_path / "owner.toml").write_text('name = "ada"\nfine_tuned = "m"\n[data]\ntrain = "a"\ntest = "b"\n')
    done = amalgram(*arguments, cwd=tmp_path)
    assert done.returncode == exit_code
    assert says.format(cwd=tmp_path) in done.stderr
    assert "Traceback" not in done.stderr


def test_an_interrupted_run_says_so_publishes_nothing_and_goes_on(little_folder: Path, tmp_path: Path) -> None:
    consortium = Path(shutil.copytree(little_folder, tmp_path / "consortium"))
    agreement = consortium / "agreement.toml"
    agreement.write_text(agreement.read_text().replace('["average", "task_arithmetic", "fisher"]', "[]"))
    command = "simulate", consortium, "--out", "output"
    with started(*command, cwd=tmp_path) as run:
        for line in run.stderr:
            if "sum of validation" in line:
                break
        run.send_signal(signal.SIGINT)
        errors = run.stderr.read()
        assert run.exit_code() == 130
    assert "interrupted; nothing was published" in errors
    assert not (tmp_path / "output" / "report.json").exists()
    done = amalgram(*command, cwd=tmp_path)
    assert done.returncode == 0
    assert "resuming the interrupted run" in done.stderr
    assert "sum of contribution" not in done.stderr
    assert (tmp_path / "output" / "report.json").exists()
    assert not (tmp_path / "output" / "parties" / "state").exists()
    assert not [*(tmp_path / "output").rglob("*.key"), *(tmp_path / "output").rglob("sum-*.bin")]


@pytest.mark.slow
def test_a_terminated_run_on_flower_s_engine_leaves_no_process_behind(reviews_folder: Path, tmp_path: Path) -> None:
    with started("simulate", reviews_folder, "--out", "output", "--engine", "ray", cwd=tmp_path) as run:
        for line in run.stderr:
            if "submitting the run" in line:
                break
        time.sleep(15)  # the engine is at work
        run.send_signal(signal.SIGTERM)
        run.stderr.read()
        assert run.exit_code() == 143
    marker = f'AMALGRAM_SIMULATED_OWNERS=["{tmp_path}'
    deadline = time.monotonic() + 20
    while (left := processes_with(marker)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert left == []


def processes_with(marker: str) -> list[int]:
    """The ids of running processes whose environment holds `marker`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (folder / "environ").read_bytes() and int(folder.name) != os.getpid():
                found.append(int(folder.name))
        except OSError:
            continue
    return found
