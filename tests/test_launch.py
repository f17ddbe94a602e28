"""The guard in front of the SuperLink, and the gate in front of the SuperNode, each by itself."""

import asyncio
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import flwr
import httpx
import psutil
import pytest
from flwr.app import Message, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.common.constant import ErrorCode
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity

from common.errors import EngineError
from common.messages import Refusal
from deploy.launch import check_flower, internals
from deploy.launch.flower import APP_FOLDER, bundle_digest, flower_environment
from deploy.launch.guarded_superlink import Guard
from deploy.launch.internals import TOLD, check_internals
from deploy.launch.pinned_supernode import NAMES, Gate, pinned, why_not
from deploy.launch.processes import FollowedFile, NewFiles
from server.app import _read
from tests.support.network import wait_until

# --- the guard ---


def answer_of_guard(client: tuple[str, int] | None, path: str, kind: str = "http") -> Any:
    """What a peer gets: a status, "passed", or how a web socket ended."""
    events: list[Mapping[str, Any]] = []

    async def behind(scope: Any, receive: Any, send: Any) -> None:
        events.append({"status": "passed"})

    async def send(event: Any) -> None:
        events.append(event)

    async def receive() -> Any:
        return {"type": "http.request"}

    scope = {"type": kind, "path": path, "client": client, "method": "POST", "headers": [(b"host", b"127.0.0.1")]}
    asyncio.run(Guard(behind)(scope, receive, send))
    return events[0].get("status", events[0].get("type"))


ELSEWHERE = [("192.0.2.7", 1), ("::ffff:192.0.2.7", 1), ("fd00::2", 1), ("128.0.0.1", 1), ("testclient", 1), None]


@pytest.mark.parametrize("client", ELSEWHERE, ids=str)
def test_the_guard_shows_other_machines_the_fleet_interface_and_health_alone(client: tuple[str, int] | None) -> None:
    assert answer_of_guard(client, "/health") == "passed"
    for path in ("/v1/fleet/pull-messages", "/v1/fleet/get-fab"):
        assert answer_of_guard(client, path) == 412  # not closed: a node that proves its key passes
    for path in (
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/docs",
        "/openapi.json",
        "/",
        "",
        "/v1/fleet/",
        "/v1/fleet/../control/start-run",
        "/health/x",
        "/health\n",
        "//v1/fleet/get-fab",
        "/V1/FLEET/get-fab",
    ):
        assert answer_of_guard(client, path) == 403, path
    assert answer_of_guard(client, "/v1/control/start-run", "websocket") == "websocket.close"


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1"])
def test_the_guard_shows_this_machine_everything(address: str) -> None:
    assert answer_of_guard((address, 1), "/v1/control/start-run") == "passed"


def test_nothing_of_the_surroundings_opens_flower_or_says_who_a_peer_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("FORWARDED_ALLOW_IPS", "FLWR_INTERNAL_GRPC_CONTROL_API", "FLWR_DATABASE"):
        monkeypatch.setenv(name, "*")
    environment = flower_environment(tmp_path)
    assert {name for name in environment if name.startswith(("FLWR_", "FORWARDED"))} == {
        "FLWR_HOME",
        "FLWR_TELEMETRY_ENABLED",
        "FLWR_DISABLE_UPDATE_CHECK",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL",
    }


def test_the_threads_of_the_settings_are_those_that_flower_s_processes_compute_with(tmp_path: Path) -> None:
    assert flower_environment(tmp_path, 3)["OMP_NUM_THREADS"] == "3"


# --- the gate ---


@pytest.fixture(scope="module")
def bundle() -> bytes:
    return build_fab_from_disk(APP_FOLDER)  # as Flower itself makes it


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The same app, with one line more."""
    folder = tmp_path_factory.mktemp("evil")
    shutil.copy(APP_FOLDER / "pyproject.toml", folder)
    for package in ("client", "server", "common"):
        shutil.copytree(APP_FOLDER / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "client" / "app.py").write_text((folder / "client" / "app.py").read_text() + "# evil\n")
    return build_fab_from_disk(folder)


def run_of(bundle: bytes, **other: Any) -> Run:
    run = Run.create_empty(7)
    run.fab_id, run.fab_version, run.fab_hash = "amalgram/amalgram", "0.1.0", hashlib.sha256(bundle).hexdigest()
    run.primary_task_type = TaskType.SERVER_APP
    for name, value in other.items():
        setattr(run, name, value)
    return run


def fab_of(bundle: bytes) -> Fab:
    return Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})


@dataclass
class Link:
    """A coordinator that sends one message of run 7 again and again, and keeps what it is answered."""

    run: Run
    fab: Fab
    answers: list[Message] = field(default_factory=list)
    fetched: int = 0
    wanted: set[str] = field(default_factory=set)  # of each answer's objects

    def connection(self) -> dict[str, Any]:
        push: Any = lambda *arguments: None  # noqa: E731
        callbacks: list[Any] = [1, self.receive, self.send, lambda run_id: self.run, self.get_fab, None, push, None]
        return dict(zip(NAMES, callbacks, strict=True))

    def receive(self) -> Any:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1
        message = Message(RecordDict(), dst_node_id=2, message_type="train.step")
        message.metadata.__dict__["_message_id"] = "m"
        return message, None

    def get_fab(self, fab_hash: str, run_id: int) -> Fab:
        self.fetched += 1
        return self.fab

    def send(self, message: Message, tree: Any, seconds: float) -> tuple[set[str], str]:
        self.answers.append(message)
        return self.wanted, ""


def status_error(status: int) -> httpx.HTTPStatusError:
    return httpx.HTTPStatusError("", request=httpx.Request("POST", "https://x"), response=httpx.Response(status))


def test_the_gate_lets_the_agreed_bundle_through_and_gives_flower_the_bytes_it_looked_at(
    bundle: bytes, evil: bytes, tmp_path: Path
) -> None:
    assert hashlib.sha256(bundle).hexdigest() == bundle_digest()
    link = Link(run_of(bundle), fab_of(bundle))
    gate = Gate(bundle_digest(), link.connection(), tmp_path)
    received, _ = gate.receive()
    gate.send(Message(RecordDict(), reply_to=received), None, 0.0)
    link.answers.clear()
    link.run, link.fab = run_of(evil), fab_of(evil)  # the coordinator thinks better of it
    assert gate.receive() is not None
    assert gate.get_fab(link.run.fab_hash, 7).content == bundle
    assert gate.get_run(7).fab_hash == bundle_digest()
    assert (link.answers, link.fetched) == ([], 1)


def test_the_gate_asks_the_sooner_for_a_message_the_more_recent_the_last_one_was(
    bundle: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, asked = 0.0, []

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(time, "sleep", sleep)
    link = Link(run_of(bundle), fab_of(bundle))
    gate = Gate(bundle_digest(), link.connection() | {"receive": lambda: asked.append(now)}, tmp_path)
    assert gate.receive() is None
    pauses = [later - earlier for earlier, later in pairwise(asked)]
    assert pauses[:8] == [0.5] * 8
    assert all(pause == pytest.approx(max(0.5, when / 10)) for pause, when in zip(pauses, asked, strict=False))
    assert 30 < now < 34  # from here on Flower's own pace, 3 seconds, will do
    assert gate.receive() is None
    assert len(asked) == len(pauses) + 2


def test_the_gate_answers_for_another_bundle_and_flower_never_hears_of_it(
    bundle: bytes, evil: bytes, tmp_path: Path
) -> None:
    link = Link(run_of(evil), fab_of(evil))
    gate = Gate(bundle_digest(), link.connection(), tmp_path)
    assert gate.receive() is None
    link.run, link.fab = run_of(bundle), fab_of(bundle)  # too late: a run has one bundle
    assert gate.receive() is None
    assert [answer.error.code for answer in link.answers] == [ErrorCode.INVALID_FAB] * 2
    with pytest.raises(KeyError):
        gate.get_fab("", 7)
    assert (tmp_path / TOLD).read_text().count("REFUSED run 7") == 1


@pytest.mark.parametrize(
    ("run", "says"),
    [
        ({"fab_hash": "0" * 64}, "it declares the SHA-256 0000"),
        ({"fab_id": "amalgram/other"}, "it declares the bundle as 'amalgram/other'"),
        ({"fab_version": "../../escaped"}, "version '../../escaped'"),
        ({"primary_task_type": TaskType.AGENT_APP}, "not a ServerApp"),
    ],
)
def test_a_run_that_declares_something_else_about_the_agreed_bundle_is_refused(
    bundle: bytes, run: dict[str, Any], says: str
) -> None:
    assert why_not(bundle_digest(), run_of(bundle), fab_of(bundle)) is None
    assert says in (why_not(bundle_digest(), run_of(bundle, **run), fab_of(bundle)) or "")


def test_another_bundle_that_declares_the_agreed_sha256_is_refused(bundle: bytes, evil: bytes) -> None:
    fab = Fab(bundle_digest(), evil, {})
    assert "its bundle has the SHA-256" in (why_not(bundle_digest(), run_of(bundle), fab) or "")


def test_whoever_was_killed_at_work_says_so_when_it_is_back_and_once(bundle: bytes, tmp_path: Path) -> None:
    link = Link(run_of(bundle), fab_of(bundle))
    Gate(bundle_digest(), link.connection(), tmp_path).receive()
    again = Gate(bundle_digest(), link.connection(), tmp_path)  # a new process
    received, _ = again.receive()
    assert [answer.error.code for answer in link.answers] == [ErrorCode.CLIENT_APP_CRASHED]
    assert [answer.metadata.reply_to_message_id for answer in link.answers] == ["m"]
    assert _read(link.answers[0]) is None
    again.send(Message(RecordDict(), reply_to=received), None, 0.0)
    again.receive()
    assert [answer.has_error() for answer in link.answers] == [True, False]
    assert (tmp_path / TOLD).read_text().count("interrupted while at work on a message") == 1


def test_an_answer_that_broke_off_half_way_is_followed_by_an_error(bundle: bytes, tmp_path: Path) -> None:
    link = Link(run_of(bundle), fab_of(bundle), wanted={"a", "b"})
    gate = Gate(bundle_digest(), link.connection(), tmp_path)
    received, _ = gate.receive()
    gate.send(Message(RecordDict(), reply_to=received), None, 0.0)
    gate.push_object(7, "", "a", b"")
    link.wanted = set()
    gate.receive()  # Flower gives the rest up and goes on
    assert [answer.has_error() for answer in link.answers] == [False, True]
    received, _ = gate.receive()
    link.answers.clear()
    link.wanted = {"a", "b"}
    gate.send(Message(RecordDict(), reply_to=received), None, 0.0)
    gate.push_object(7, "", "a", b"")
    gate.push_object(7, "", "b", b"")
    gate.receive()
    assert [answer.has_error() for answer in link.answers] == [False]


@pytest.mark.parametrize("over", [RunNotRunningException(), status_error(404)])
def test_an_interrupted_message_of_a_run_that_is_over_is_forgotten(
    bundle: bytes, tmp_path: Path, over: BaseException
) -> None:
    link = Link(run_of(bundle), fab_of(bundle))
    Gate(bundle_digest(), link.connection(), tmp_path).receive()

    def gone(*arguments: Any) -> Any:
        raise over

    gate = Gate(bundle_digest(), link.connection() | {"send": gone}, tmp_path)
    assert gate.receive() is not None


def test_a_connection_of_another_shape_is_not_used(tmp_path: Path) -> None:
    @contextmanager
    def connect() -> Any:
        yield (1, 2, 3)

    with pytest.raises(ValueError, match="zip"), pinned(connect, "digest", tmp_path)():
        pass


def test_a_coordinator_takes_error_7_for_a_refusal_and_others_for_a_loss(tmp_path: Path) -> None:
    refused = Link(run_of(b""), fab_of(b""))
    Gate("digest", refused.connection(), tmp_path).receive()
    assert _read(refused.answers[0]) == (Refusal(code="consent"),)
    crashed = Message(flwr.app.Error(ErrorCode.CLIENT_APP_CRASHED), reply_to=refused.receive()[0])
    assert _read(crashed) is None


# --- another Flower ---


def test_another_version_of_flower_is_refused() -> None:
    check_internals()
    with pytest.raises(EngineError, match=r"flwr 1\.42\.0 is installed; guard and pin were made for 1\.43\.0"):
        check_internals(version="1.43.0")


@pytest.mark.parametrize("name", internals.TRIED)
def test_a_changed_or_missing_file_of_flower_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for each in internals.TRIED:
        (tmp_path / each).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(flwr.__file__).parent / each, tmp_path / each)
    monkeypatch.setattr(flwr.__spec__, "origin", str(tmp_path / "__init__.py"))
    check_internals()
    (tmp_path / name).write_text((tmp_path / name).read_text() + "\n")
    with pytest.raises(EngineError, match="is not the file that flwr"):
        check_internals()
    (tmp_path / name).unlink()
    with pytest.raises(EngineError, match="is not the file that flwr"):
        check_internals()


def test_a_followed_file_gives_whole_lines_once(tmp_path: Path) -> None:
    path = tmp_path / "log"
    followed = FollowedFile(path)
    assert followed.new_lines() == []
    with path.open("w") as file:
        file.write("one\ntwo\nthr")
        file.flush()
        assert followed.new_lines() == ["one", "two"]
        file.write("ee\n")
        file.flush()
        assert followed.new_lines() == ["three"]
        assert followed.new_lines() == []


def test_what_is_bound_to_a_process_that_is_killed_ends_with_all_its_children(tmp_path: Path) -> None:
    worked_for = subprocess.Popen(["sleep", "100"])
    code = "import subprocess, sys; from deploy.launch.bound_superexec import end_group_with as end\n"
    code += "child = subprocess.Popen(['sleep', '100']); print(child.pid, flush=True); end(int(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(worked_for.pid)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as bound:
        assert bound.stdout is not None
        child = psutil.Process(int(bound.stdout.readline()))
        time.sleep(0.5)
        assert (bound.poll(), child.is_running()) == (None, True)
        worked_for.kill()
        worked_for.wait()
        assert bound.wait(10) == -signal.SIGKILL
    assert psutil.wait_procs([child], 10)[1] == []


# --- comparing with another version ---

OLD_CODE = """import one

def connect(address):
    return dial(address)

class Loop:
    @staticmethod
    def step():
        return 1

    def rest(self):
        return 2
"""


def test_check_flower_shows_which_functions_differ_and_how(tmp_path: Path) -> None:
    changed = OLD_CODE.replace("dial(address)", "dial(address, tls=False)").replace("return 2", "return 3")
    for folder, code in (("old", OLD_CODE), ("new", changed)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "node.py").write_text(code)
        (tmp_path / folder / "same.py").write_text(OLD_CODE)
    (tmp_path / "old" / "gone.py").write_text(OLD_CODE)
    parts = ("connect", "Loop.step")
    relied_on = {"node.py": parts, "same.py": ("connect", "Loop.rest"), "gone.py": ("Loop.step",)}
    found = check_flower.compare(tmp_path / "old", tmp_path / "new", relied_on)
    assert {name: list(each) for name, each in found.items()} == {
        "node.py": ["connect", check_flower.REST],
        "same.py": [],
        "gone.py": ["Loop.step", check_flower.REST],
    }
    assert found["node.py"]["connect"].splitlines()[-2:] == [
        "-    return dial(address)",
        "+    return dial(address, tls=False)",
    ]
    assert "+        return 3" in found["node.py"][check_flower.REST]
    assert "-    @staticmethod" in found["gone.py"]["Loop.step"]
    shown = check_flower.as_text(found)
    assert "node.py  connect, the rest of the file differs" in shown
    assert "same.py  unchanged" in shown
    assert "+    return dial(address, tls=False)" in shown


def test_every_file_that_is_pinned_is_compared_by_functions_that_it_has() -> None:
    assert internals.RELIED_ON.keys() == internals.TRIED.keys()
    folder = Path(flwr.__file__).parent
    for name, parts in internals.RELIED_ON.items():
        found = check_flower._parts_of((folder / name).read_text(), parts)
        assert all(found.values()), name


# --- the fork server ---

FORKS = r"""
import os, sys, threading, time
from deploy.launch.fork_server import ForkServer

def program():
    import colorsys
    answer = sys.argv[1], os.getppid(), "library" in sys.modules, len(os.listdir("/proc/self/task"))
    os.write(1, (" ".join(map(str, answer)) + "\n").encode())  # in one write: two programs answer at once
    print(open("/proc/self/comm").read(), file=sys.stderr, flush=True)

if __name__ == "__main__":
    forks = ForkServer({"program": program}, sys.argv[1].split(","))
    threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
    for line in sys.stdin:
        forks.start(line.split())
"""


@contextmanager
def fork_server(libraries: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that forks `program` for every line that it is written."""
    (folder / "forks.py").write_text(FORKS)
    (folder / "library.py").write_text("")
    (folder / "client.py").write_text("")
    (folder / "echo").symlink_to("/bin/echo")
    environment = os.environ | {"PYTHONPATH": f"{APP_FOLDER}:{folder}", "PATH": f"{folder}:{os.environ['PATH']}"}
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, str(folder / "forks.py"), libraries]
    with subprocess.Popen(command, env=environment, bufsize=1, **pipes) as process:
        yield process
        process.stdin.close()


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="apps are forked on Linux only")


@linux_only
def test_apps_are_forks_of_one_process_that_has_imported_already(tmp_path: Path) -> None:
    with fork_server("library", tmp_path) as process:
        process.stdin.write("program first\n")
        first = process.stdout.readline().split()
        process.stdin.write("program one\nprogram other\n")
        answers = sorted(process.stdout.readline().split() for _ in range(2))
        process.stdin.write("echo cold\n")  # not one of the programs: a process as ever
        assert process.stdout.readline() == "cold\n"
        parent = psutil.Process(int(first[1]))
        assert parent.name() == "fork-server"
        process.stdin.close()
        assert process.stderr.readline() == "program\n"
    assert [answer[0] for answer in answers] == ["one", "other"]
    assert {answer[1] for answer in answers} == {first[1]} != {str(process.pid)}
    assert {answer[2] for answer in (first, *answers)} == {"True"}
    assert {answer[3] for answer in (first, *answers)} == {"1"}  # the thread of whoever asks is not among them
    assert psutil.wait_procs([parent], 10)[1] == []


@linux_only
def test_no_app_is_forked_once_a_module_of_the_bundle_is_imported(tmp_path: Path) -> None:
    with fork_server("client", tmp_path) as process:
        process.stdin.write("program one\n")
        process.stdin.close()
        assert "client was imported from the installed program" in process.stderr.read()
        assert process.stdout.read() == ""


@linux_only
def test_when_the_fork_server_is_gone_apps_are_processes_again(tmp_path: Path) -> None:
    with fork_server("library", tmp_path) as process:
        process.stdin.write("program one\n")
        server = psutil.Process(int(process.stdout.readline().split()[1]))
        server.kill()
        wait_until(lambda: server.status() == psutil.STATUS_ZOMBIE, "the fork server to end")
        (tmp_path / "program").symlink_to("/bin/echo")  # what the command is to a shell
        process.stdin.write("program cold\n")
        assert process.stdout.readline() == "cold\n"


def test_new_files_are_told_once_and_old_ones_never(tmp_path: Path) -> None:
    folder = tmp_path / "receipts"
    assert NewFiles(folder).since_last_time() == []
    folder.mkdir()
    (folder / "1.json").touch()
    files = NewFiles(folder)
    (folder / "2.json").touch()
    (folder / "3.json.partial").touch()
    assert files.since_last_time() == [folder / "2.json"]
    assert files.since_last_time() == []
