"""What the coordinator's app and the commands tell: a JSON object a line, steps and counts, nothing of an owner's."""

import json
import logging
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest

from client.app import app as client_app
from client.owner import Owner
from common.errors import AmalgramError, EngineError
from common.logs import JsonLines
from deploy.commands.merge import Progress
from deploy.launch.flower import raise_failure
from deploy.launch.processes import FollowedFile
from deploy.simulation.in_process_grid import run_in_process
from deploy.simulation.simulate import simulate
from server import app as server_app
from server.output_folder import PROGRESS
from tests.support.commands import amalgram
from tests.support.parties import Parties

NAMES = ("owners", "done", "waiting_for", "payload_bytes")
COUNTS = ("number", "num_steps", "payload_bytes", "payload_bytes_each")


def test_a_line_is_one_json_object_whatever_the_message() -> None:
    record = logging.LogRecord("amalgram.x", logging.WARNING, "", 0, 'a "quoted"\nline of %s', ("hôtel",), None)
    record.about = {"step": "result"}
    line = JsonLines().format(record)
    assert "\n" not in line
    told = json.loads(line)
    assert told.pop("time").endswith("+00:00")
    assert told == {
        "level": "warning",
        "logger": "amalgram.x",
        "message": 'a "quoted"\nline of hôtel',
        "step": "result",
    }


def test_a_line_holds_nothing_of_an_exception() -> None:
    try:
        raise ValueError("a private row")
    except ValueError:
        record = logging.LogRecord("amalgram.x", logging.ERROR, "", 0, "it failed", (), sys.exc_info())
    assert "private" not in JsonLines().format(record)


def test_a_whole_run_tells_its_steps_and_no_row_no_seed_and_no_owner_s_number(parties: Parties) -> None:
    (parties.output / ".amalgram").touch()
    configs = [{"settings": str(path)} for path in parties.files.values()]
    run_in_process(server_app.app, client_app, configs, {"coordinator": str(parties.coordinator)})
    assert (parties.output / PROGRESS).stat().st_mode & 0o777 == 0o600
    text = (parties.output / PROGRESS).read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    steps = [line["message"] for line in lines if "owners" in line]
    assert steps[:2] == ["roll call", "sum of contributions, 3 owners"]
    assert len(steps) == len(set(steps))  # one line per step
    names = set(parties.files)
    for line in lines:  # whatever else a line may hold is looked at here before it is allowed
        assert set(line) <= {
            "time",
            "level",
            "logger",
            "message",
            "step",
            "owners",
            "done",
            "waiting_for",
            "sent",
            *COUNTS,
        }
        assert {name for key in NAMES for name in line.get(key, ())} <= names
    begun = [line for line in lines if "number" in line]
    assert [line["number"] for line in begun] == list(range(1, begun[0]["num_steps"] + 1))
    # How many bytes an owner sends follows from the agreement alone: the same for all of them.
    arrived = {line["step"]: line["payload_bytes"] for line in lines if "payload_bytes" in line}
    for line in begun[1:]:
        assert arrived[line["step"]] == dict.fromkeys(names, line["payload_bytes_each"])
    waited = [line for line in lines if line.get("waiting_for")]
    assert {len(line["done"]) + len(line["waiting_for"]) for line in waited} == {3}
    rows = [row for path in parties.files.values() for row in texts(Owner(path))]
    assert len(rows) > 100
    assert not any(row in text for row in rows)
    assert not any(each.seed.hex() in text for each in parties.identities.values())
    for path in parties.files.values():
        assert str(len(Owner(path).workbench.data.train())) not in " ".join(line["message"] for line in lines)


@pytest.mark.parametrize(
    "methods", [("refit", "average"), pytest.param(("regmean_plus_plus",), marks=pytest.mark.slow)]
)
def test_the_steps_that_are_announced_are_the_steps_that_are_done(
    methods: tuple[str, ...], request: pytest.FixtureRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = "two_blocks_folder" if "regmean_plus_plus" in methods else "trained_folder"  # a step for each block
    consortium = Path(shutil.copytree(request.getfixturevalue(folder), tmp_path / "consortium"))
    draft = consortium / "agreement.toml"
    text = draft.read_text().replace('method = "regmean"', f'method = "{methods[0]}"')
    draft.write_text(text.replace('["average", "task_arithmetic", "fisher"]', json.dumps(methods[1:])))
    caplog.set_level(logging.INFO, "amalgram")
    simulate(consortium, tmp_path / "output", with_references=False)
    told = [about for record in caplog.records if "number" in (about := getattr(record, "about", {}))]
    assert [about["number"] for about in told] == list(range(1, told[0]["num_steps"] + 1))


def texts(owner: Owner) -> list[str]:
    tokenizer = owner.workbench.data.train().tokenizer
    assert tokenizer is not None
    return [
        tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in owner.workbench.data.train().features
    ]


def test_the_command_says_who_keeps_the_others_waiting_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG, "amalgram")
    monkeypatch.setattr("deploy.commands.merge.PATIENCE_SECONDS", 0.05)
    path = tmp_path / PROGRESS
    progress = Progress(FollowedFile(path))
    progress.show()
    told = {"time": "", "level": "debug", "logger": "x", "message": "result: 1 of 2 owners are done", "step": "result"}
    path.write_text(json.dumps(told | {"done": ["hotel"], "waiting_for": ["phones"]}) + "\n")
    progress.show()
    assert [record.levelname for record in caplog.records] == ["DEBUG"]
    time.sleep(0.1)
    progress.show()
    progress.show()
    assert caplog.messages[1:] == ["result: waiting for phones"]
    with path.open("a") as file:
        file.write(json.dumps(told | {"done": ["hotel", "phones"], "waiting_for": []}) + "\n")
    progress.show()
    time.sleep(0.1)
    progress.show()
    assert len(caplog.messages) == 3


def test_with_json_the_error_is_a_json_line_too(tmp_path: Path) -> None:
    done = amalgram("merge", "--json", tmp_path / "no.toml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    told = json.loads(line)
    assert (told["level"], told["exit_code"]) == ("error", 2)
    assert "no.toml" in told["message"]


def test_a_second_run_waits_for_the_program_of_the_first_and_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    with server_app._only_one_in(tmp_path):

        def second() -> None:
            with server_app._only_one_in(tmp_path):
                order.append("second")

        waiting = threading.Thread(target=second)
        waiting.start()
        time.sleep(0.5)
        order.append("first")
    waiting.join(10)
    assert order == ["first", "second"]
    monkeypatch.setattr(server_app, "EARLIER_RUN_SECONDS", 0.0)
    with (
        server_app._only_one_in(tmp_path),
        pytest.raises(EngineError, match="the program of an earlier run is still running here"),
        server_app._only_one_in(tmp_path),
    ):
        pass


def test_a_coordinator_s_program_that_fails_unexpectedly_leaves_a_reason_and_what_to_do(
    parties: Parties,
) -> None:
    (parties.output / ".amalgram").touch()
    (parties.output / "checkpoint").touch()  # a file where a folder must be made
    node_configs = [{"settings": str(path)} for path in parties.files.values()]
    with pytest.raises(OSError, match="checkpoint"):
        run_in_process(server_app.app, client_app, node_configs, {"coordinator": str(parties.coordinator)})
    with pytest.raises(AmalgramError, match=r"FileExistsError: .*checkpoint.*\nhint: run the same command again"):
        raise_failure(parties.output, "finished:failed")
