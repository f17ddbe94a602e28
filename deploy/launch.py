"""Starts Flower's own processes, and stops what it started.

Flower's command line exits with 0 even when a run failed, leaves a daemon behind, and does not pass an app's error on.
So the SuperLink here is our own child on a port of its own, the run's true status is asked for, the reason comes from
the file that our ServerApp leaves, and every process is ended by its process group.
"""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import tomli_w
import torch

from client.app import SIMULATED_OWNERS
from common.errors import AmalgramError, EngineError, OwnerRefused
from common.settings_file import load_settings
from server.settings import CoordinatorSettings

APP_FOLDER = Path(__file__).resolve().parent.parent  # holds pyproject.toml, server/, client/, common/
CONNECTION, FAILURE = "simulation", "failure.json"
START_SECONDS, STOP_SECONDS, ANSWER_SECONDS, POLL_SECONDS = 60.0, 20.0, 120.0, 0.5
log = logging.getLogger("amalgram.launch")


def run_with_ray(coordinator_file: Path, party_files: list[Path]) -> None:
    """Run the merge on Flower's simulation engine, every owner a virtual node. Raises the error that the run met."""
    output = coordinator_file.parent / load_settings(coordinator_file, CoordinatorSettings).output
    (output / FAILURE).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="amalgram-flower-") as home:
        environment = _environment(Path(home), party_files)
        with _superlink(Path(home), environment):
            log.info("Flower's simulation engine is up, submitting the run")
            run_id = _submit(environment, coordinator_file, len(party_files))
            status = _wait(environment, run_id)
    _raise_failure(output)
    if status != "finished:completed":
        raise EngineError(f"Flower reports the run as {status}, and the coordinator left no reason")


def _environment(home: Path, party_files: list[Path]) -> dict[str, str]:
    return os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # as many as in-process, so that the last bits agree
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        SIMULATED_OWNERS: json.dumps([str(path) for path in party_files]),
    }


@contextmanager
def _superlink(home: Path, environment: dict[str, str]) -> Iterator[None]:
    """A SuperLink on a free port of this machine only, ended with all its children."""
    port = _free_port()
    connection = {"superlink": {"default": CONNECTION, CONNECTION: {"address": f"127.0.0.1:{port}", "insecure": True}}}
    (home / "config.toml").write_text(tomli_w.dumps(connection))
    command = ["flower-superlink", "--insecure", "--simulation", "--disable-runtime-dependency-installation"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with (home / "superlink.log").open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, cwd=home, stdout=output, stderr=output, start_new_session=True
        )
        try:
            _wait_for_port(port, process, home / "superlink.log")
            yield
        finally:
            _stop_group(process)
            _stop_strays(home)


def _wait_for_port(port: int, process: subprocess.Popen[bytes], log_file: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(POLL_SECONDS)
    tail = log_file.read_text(errors="replace").strip().splitlines()[-1:]
    raise EngineError(f"Flower's SuperLink did not start on port {port}: {' '.join(tail) or 'it said nothing'}")


def _submit(environment: dict[str, str], coordinator_file: Path, nodes: int) -> int:
    cores = os.cpu_count() or 1
    answer = _flwr(
        environment,
        "run",
        str(APP_FOLDER),
        CONNECTION,
        "--run-config",
        f"coordinator='{coordinator_file}'",
        "--federation-config",
        f"num-supernodes={nodes} client-resources-num-cpus={cores}",  # one owner at a time, with all the cores
    )
    if "run-id" not in answer:
        raise EngineError(f"Flower refused the run: {answer.get('error-message', answer)}")
    return int(answer["run-id"])


def _wait(environment: dict[str, str], run_id: int) -> str:
    """The run's status once it has ended."""
    while True:
        answer = _flwr(environment, "list", CONNECTION, "--run-id", str(run_id))
        if not answer.get("runs"):
            raise EngineError(f"Flower no longer knows the run: {answer.get('error-message', answer)}")
        status = str(answer["runs"][0]["status"])
        if status.startswith("finished"):
            return status
        time.sleep(POLL_SECONDS)


def _flwr(environment: dict[str, str], *arguments: str) -> dict[str, Any]:
    command = ["flwr", *arguments, "--format", "json"]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=ANSWER_SECONDS
        )
        answer: dict[str, Any] = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise EngineError(f"flwr {arguments[0]} gave no answer in {ANSWER_SECONDS:.0f} seconds") from None
    except json.JSONDecodeError:
        reason = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise EngineError(f"flwr {arguments[0]} failed: {' '.join(reason) or f'exit code {done.returncode}'}") from None
    return answer


def _raise_failure(output: Path) -> None:
    path = output / FAILURE
    if not path.is_file():
        return
    failure = json.loads(path.read_text())
    if failure["owner"] is not None:
        raise OwnerRefused(failure["owner"], failure["code"])
    error = AmalgramError(failure["message"])
    error.code, error.exit_code = failure["code"], failure["exit_code"]
    raise error


def _stop_group(process: subprocess.Popen[bytes]) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(STOP_SECONDS)
        except (ProcessLookupError, PermissionError):
            return
        except subprocess.TimeoutExpired:
            continue


def _stop_strays(home: Path) -> None:
    """End what left the process group (Ray's helpers do): whatever was started with our private Flower home.

    Linux only; elsewhere they end by themselves once the engine is gone.
    """
    marker = f"FLWR_HOME={home}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        # A process that is gone by now, or is somebody else's, is none of ours.
        with suppress(OSError):
            if marker in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
