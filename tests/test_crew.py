"""Simulations share out calls among processes (deploy/simulation/crew.py)."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from flwr.app import Context, Message, RecordDict

import client.app
from client.owner import Owner
from common.errors import AmalgramError, DataError, HelperEnded, ModelError, OwnerRefused
from common.messages import Message as OurMessage
from common.messages import OpenSum
from deploy.simulation import crew as crews
from deploy.simulation.crew import Crew, shares, sharing_cores
from deploy.simulation.in_process_grid import InProcessGrid
from deploy.simulation.simulate import simulate
from server.report.report import read_report

START_SECONDS = 120.0
told: list[str] = []


def process_id(seconds: float = 0.0) -> int:
    time.sleep(seconds)
    return os.getpid()


def fail(error: Exception) -> None:
    raise error


def remember(word: str) -> None:
    told.append(word)


def remembered() -> tuple[int, list[str]]:
    time.sleep(0.05)
    return os.getpid(), told


def log_and_end() -> None:
    logging.getLogger("amalgram.owner").warning("said %s", "elsewhere", extra={"about": {"process": os.getpid()}})


def end_at_once() -> None:
    os._exit(3)


def threads_of_torch() -> int:
    return torch.get_num_threads()


def reply(message: Message, _: Context) -> Message:
    time.sleep(0.05)
    return Message(RecordDict(), reply_to=message)


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    made = Crew(helpers=1, threads=1)
    yield until_ready(made)
    made.end()


def until_ready(crew: Crew) -> Crew:
    deadline = time.monotonic() + START_SECONDS
    while not all(helper.is_ready for helper in crew._helpers):
        assert time.monotonic() < deadline
        for helper in crew._helpers:
            helper.take()
        time.sleep(0.1)
    return crew


class Ready(Crew):
    """A crew whose helpers are ready from the beginning."""

    def __init__(self, helpers: int = 0, threads: int = 1) -> None:
        super().__init__(helpers, threads)
        until_ready(self)


def in_helper(crew: Crew, function: object, *arguments: object) -> object:
    """The result of a call that a ready helper makes: it is given one before this process makes any."""
    crew.add("there", function, *arguments)  # type: ignore[arg-type]
    return crew.result("there")


def test_without_helpers_a_call_is_made_here_when_its_result_is_asked_for() -> None:
    crew, told[:] = Crew(), []
    crew.add("first", remember, "first")
    crew.add("second", remember, "second")
    assert told == []
    crew.result("second")
    assert told == ["second"]
    assert list(crew.in_order(process_id, [(), ()])) == [os.getpid()] * 2


def test_helpers_and_this_process_share_out_calls_whose_results_keep_their_order(crew: Crew) -> None:
    made = list(crew.in_order(process_id, [(0.05,)] * 12))
    assert set(made) == {os.getpid(), crew._helpers[0]._process.pid}
    assert list(crew.in_order(divmod, [(each, 3) for each in range(20)])) == [divmod(each, 3) for each in range(20)]


def test_results_that_nobody_asked_for_yet_are_few(crew: Crew) -> None:
    for number in range(20):
        crew.add(str(number), process_id, 0.02)
    for number in range(20):
        crew.result(str(number))
        assert len(crew._made) <= 2


def test_helpers_do_not_run_far_ahead_of_a_slow_one() -> None:
    with Ready(helpers=2) as crew:
        crew.add("slow", process_id, 2.0)
        for number in range(20):
            crew.add(str(number), process_id)
        crew.result("slow")
        assert len(crew._made) <= 4


def test_an_error_in_a_helper_is_raised_where_the_result_is_asked_for(crew: Crew) -> None:
    with pytest.raises(ModelError, match="no weights") as caught:
        in_helper(crew, fail, ModelError("no weights", hint="download it"))
    assert caught.value.hint == "download it"
    with pytest.raises(RuntimeError, match="OwnerRefused: owner ada"):  # which cannot be pickled
        in_helper(crew, refuse)
    assert in_helper(crew, process_id) == crew._helpers[0]._process.pid  # it goes on


def refuse() -> None:
    raise OwnerRefused("ada", "data")


def test_what_is_told_is_known_in_every_process_before_its_next_call(crew: Crew) -> None:
    told[:] = []
    crew.tell(remember, "now")
    assert dict(crew.in_order(remembered, [()] * 8)) == {
        os.getpid(): ["now"],
        crew._helpers[0]._process.pid: ["now"],
    }


def test_what_a_helper_logs_is_logged_here(crew: Crew, caplog: pytest.LogCaptureFixture) -> None:
    in_helper(crew, log_and_end)
    (record,) = caplog.records
    assert (record.name, record.getMessage()) == ("amalgram.owner", "said elsewhere")
    assert vars(record)["about"] == {"process": crew._helpers[0]._process.pid}
    assert in_helper(crew, threads_of_torch) == 1


def test_messages_of_a_grid_are_answered_by_helpers_too(crew: Crew) -> None:
    grid = InProcessGrid(reply, [{}] * 6, crew)
    messages = [Message(RecordDict(), dst_node_id=node, message_type="train.step") for node in grid.get_node_ids()]
    names = grid.push_messages(messages)
    replies = [reply for name in names for reply in grid.pull_messages([name])]
    assert [each.metadata.reply_to_message_id for each in replies] == names
    assert [each.metadata.src_node_id for each in replies] == grid.get_node_ids()
    assert grid.pull_messages(names) == []


def test_a_helper_that_dies_ends_the_run_with_advice() -> None:
    crew = until_ready(Crew(helpers=1))
    with pytest.raises(HelperEnded, match=r"has ended \(status 3\)") as caught:
        in_helper(crew, end_at_once)
    assert "resume" in caught.value.hint
    with pytest.raises(HelperEnded):
        crew._helpers[0].give("another", process_id, [])
    crew.end()


@pytest.mark.parametrize("python", [shutil.which("false"), "/nowhere/python"])
def test_a_helper_that_cannot_start_is_not_missed(python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", python)
    crew = Crew(helpers=2)
    assert list(crew.in_order(process_id, [(0.1,)] * 4)) == [os.getpid()] * 4
    assert crew._helpers == []


def test_helpers_end_with_the_process_that_started_them_even_if_it_is_killed() -> None:
    script = """
import time
from functools import partial
from deploy.simulation.crew import Crew
helper = Crew(helpers=1)._helpers[0]
while not helper.is_ready:
    helper.take()
    time.sleep(0.1)
helper.give("long", partial(time.sleep, 100), [])
print(helper._process.pid, flush=True)
time.sleep(100)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        helper = psutil.Process(int(process.stdout.readline()))
        process.send_signal(signal.SIGKILL)
    helper.wait(20)  # less than what it was doing takes


def test_processes_are_as_many_as_cores_owners_and_memory_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def has(free_bytes: int) -> None:
        monkeypatch.setattr(crews.psutil, "virtual_memory", lambda: SimpleNamespace(available=free_bytes))

    has(100_000_000_000)
    monkeypatch.setattr(crews, "MEMORY_LIMIT", tmp_path / "memory.max")
    monkeypatch.setattr(crews.torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(crews.torch.accelerator, "is_available", lambda: False)
    assert shares(owners=3, weight_bytes=1_000_000) == (3, 2)
    assert shares(owners=100, weight_bytes=1_000_000) == (8, 1)
    assert shares(owners=3, weight_bytes=crews.LARGE_BYTES + 1) == (1, 8)
    (tmp_path / "memory.max").write_text("2500000000\n")  # of a container
    assert shares(owners=3, weight_bytes=1_000_000) == (2, 2)  # fewer, but with as many threads: the bits are the same
    (tmp_path / "memory.max").write_text("max\n")
    assert shares(owners=3, weight_bytes=1_000_000) == (3, 2)
    has(500_000_000)
    assert shares(owners=3, weight_bytes=1_000_000) == (1, 2)
    monkeypatch.setattr(crews.torch.accelerator, "is_available", lambda: True)
    assert shares(owners=3, weight_bytes=1_000_000) == (1, 8)


def test_a_call_that_nobody_added_has_no_result(crew: Crew) -> None:
    for each in (crew, Crew()):
        with pytest.raises(KeyError, match="nothing"):
            each.result("nothing")


def test_an_owner_that_is_still_at_work_leaves_nothing_behind_when_another_refuses(
    trained_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crews, "Crew", Ready)
    monkeypatch.setattr(crews, "shares", lambda *_: (2, 1))

    class Refuses(Owner):
        def answer(self, message: OurMessage) -> OurMessage:
            if isinstance(message, OpenSum) and os.getpid() == here:
                raise DataError("no more rows")
            return super().answer(message)

    here, parties = os.getpid(), tmp_path / "output" / "parties"
    started: list[subprocess.Popen[bytes]] = []
    had_ended: list[bool] = []
    start, remove = crews._Helper.__init__, shutil.rmtree

    def start_one(self: crews._Helper, threads: int) -> None:
        start(self, threads)
        started.append(self._process)

    def remove_all(path: Path, **options: Any) -> None:
        if path == parties and started:
            had_ended.append(started[0].poll() is not None)
        remove(path, **options)

    monkeypatch.setattr(crews._Helper, "__init__", start_one)
    monkeypatch.setattr(shutil, "rmtree", remove_all)
    monkeypatch.setattr(client.app, "Owner", Refuses)
    with pytest.raises(AmalgramError, match="no more rows"):
        simulate(trained_folder, tmp_path / "output")
    assert had_ended[-1]
    assert not (tmp_path / "output" / "parties").exists()
    time.sleep(1)
    assert not (tmp_path / "output" / "parties").exists()


def test_a_simulation_resumes_after_a_helper_was_killed_at_work(
    trained_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(crews, "Crew", Ready)
    monkeypatch.setattr(crews, "shares", lambda *_: (2, 1))
    given: list[str] = []
    give = crews._Helper.give

    def give_and_kill(self: crews._Helper, name: str, *rest: Any) -> None:
        given.append(name)
        give(self, name, *rest)
        if len(given) == 6:  # the checks and the roll call are over
            self._process.kill()

    with monkeypatch.context() as patched:
        patched.setattr(crews._Helper, "give", give_and_kill)
        with pytest.raises(HelperEnded):
            simulate(trained_folder, tmp_path / "output", with_references=False)
    monkeypatch.setattr(crews, "shares", lambda *_: (1, 1))
    report = simulate(trained_folder, tmp_path / "output", with_references=False)
    assert "resuming the interrupted run" in caplog.text
    assert len(report.owners) == 3


def test_a_simulation_makes_the_same_model_however_many_processes_share_it(
    crew: Crew, reviews_folder: Path, example_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = read_report(example_run)
    ended: list[Crew] = []
    monkeypatch.setattr(crews, "Crew", lambda *_: crew)
    monkeypatch.setattr(crew, "end", lambda: ended.append(crew))
    monkeypatch.setattr(crews, "shares", lambda *_: (2, 1))
    given: list[str] = []
    give = crews._Helper.give
    monkeypatch.setattr(crews._Helper, "give", lambda self, name, *rest: (given.append(name), give(self, name, *rest)))
    shared = simulate(reviews_folder, tmp_path / "shared")
    assert shared.digests.model == alone.digests.model
    assert shared.evaluation == alone.evaluation  # references, too
    assert len(given) > 10
    assert ended
    monkeypatch.undo()
    monkeypatch.setattr(crews, "shares", lambda *_: (2, 1))
    with sharing_cores(3, 0) as another:  # it ends, whatever happens
        helper = another._helpers[0]._process
    assert helper.poll() is not None
