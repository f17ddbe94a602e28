"""Flower's environment, its command line, and the bundle that goes to the owners.

Flower's command line exits with 0 even when a run failed, and does not pass an app's error on. So a run's true status
is asked for, and the reason comes from the file that our ServerApp leaves.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tomli_w

from common.agreement import Agreement
from common.errors import AmalgramError, ConsentError, EngineError, OwnerRefused, WrongModel

APP_FOLDER = Path(__file__).resolve().parent.parent.parent
APP_FOLDERS, APP_FILES = ("common", "client", "server"), ("pyproject.toml", ".gitignore", "LICENSE")  # of the bundle
CONNECTION = "amalgram"
FAILURE = "failure.json"
ANSWER_SECONDS, POLL_SECONDS = 120.0, 0.5
PAUSE = 3  # for so many times as long as Flower took to answer, it is not asked again
FINISHED = "finished:completed"


def flower_environment(home: Path, threads: int | None = None) -> dict[str, str]:
    """The environment of every Flower process: nothing of Flower's own in it but what stands here.

    `threads`: how many of torch's threads compute; left out, as many as there are cores.
    """
    # FLWR_... opens other interfaces; FORWARDED_ALLOW_IPS would let anybody say which address it comes from.
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("FLWR_") and name != "FORWARDED_ALLOW_IPS"  # check: peers-do-not-say-who-they-are
    }
    # An app is a new process for every message, which must not compile the whole bundle each time.
    inherited.pop("PYTHONDONTWRITEBYTECODE", None)
    if threads is not None:
        inherited["OMP_NUM_THREADS"] = str(threads)
    return inherited | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",  # seconds; of this machine's own processes, Flower's is 1
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }


def write_connection(home: Path, port: int, root_certificate: Path | None) -> None:
    """Tell Flower's command line where the SuperLink of this machine is; without a certificate, it is not encrypted."""
    connection: dict[str, Any] = {"address": f"127.0.0.1:{port}"}
    connection |= {"insecure": True} if root_certificate is None else {"root-certificates": str(root_certificate)}
    (home / "config.toml").write_text(tomli_w.dumps({"superlink": {"default": CONNECTION, CONNECTION: connection}}))


def flwr(environment: Mapping[str, str], *arguments: str) -> dict[str, Any]:
    """What Flower's command line answers, as JSON. Raises EngineError if it gives no answer."""
    command = ["flwr", *arguments, "--format", "json"]
    try:
        done = subprocess.run(
            command, env=dict(environment), capture_output=True, text=True, check=False, timeout=ANSWER_SECONDS
        )
        answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    except subprocess.TimeoutExpired:
        raise EngineError(f"flwr {arguments[0]} gave no answer in {ANSWER_SECONDS:.0f} seconds") from None
    except ValueError:
        reason = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise EngineError(f"flwr {arguments[0]} failed: {' '.join(reason) or f'exit code {done.returncode}'}") from None
    return answer


# --- the bundle ---


def app_files() -> dict[str, Path]:
    """Relative name -> path of every file that can be in the bundle, or that decides what is.

    Left to itself Flower looks at every file below APP_FOLDER. In a clone those are mostly the virtual environment's
    tens of thousands, which takes seconds each time.
    """
    folders = [path for name in APP_FOLDERS for path in (APP_FOLDER / name).rglob("*")]
    paths = [*(APP_FOLDER / name for name in APP_FILES), *folders]
    return {path.relative_to(APP_FOLDER).as_posix(): path for path in paths if path.is_file() and not path.is_symlink()}


def build_bundle() -> bytes:
    """The bundle that this copy of the program makes: the same bytes from every copy of the same version."""
    from flwr.cli.build import build_fab_from_files  # takes half a second to import, and most commands have no bundle

    return build_fab_from_files(app_files())[0]


def bundle_digest() -> str:
    """SHA-256 of the bundle that this copy of the program makes."""
    return hashlib.sha256(build_bundle()).hexdigest()


def check_bundle(agreement: Agreement) -> None:
    """Raise ConsentError unless this copy of the program makes the agreed bundle."""
    ours = bundle_digest()
    if ours != agreement.bundle_digest:
        raise ConsentError(
            f"the program here makes the bundle {ours[:16]}..., the agreement is about {agreement.bundle_digest[:16]}"
            "...: owners would refuse it",
            hint="install the version of Amalgram, and of Python, that the agreement was drafted with",
        )


# --- runs ---


def submit(environment: Mapping[str, str], coordinator_file: Path, *federation: str) -> str:
    """Start a run and return its id. Raises EngineError if Flower refuses it."""
    coordinator = f"coordinator='{coordinator_file}'"
    with tempfile.TemporaryDirectory(prefix="amalgram-app-") as folder:
        for name, path in app_files().items():
            (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, Path(folder) / name)
        answer = flwr(environment, "run", folder, CONNECTION, "--run-config", coordinator, *federation)
    if not answer.get("run-id"):
        raise EngineError(f"Flower refused the run: {answer.get('error-message', answer)}")
    return str(answer["run-id"])


def wait_for_run(environment: Mapping[str, str], run_id: str, watch: Callable[[], None]) -> str:
    """The run's status once it has ended; meanwhile `watch` is called again and again.

    To ask Flower is to start a program, so most of the time is spent without asking.
    """
    while True:
        asked = time.monotonic()
        answer = flwr(environment, "list", CONNECTION, "--run-id", run_id)
        ask_again = time.monotonic() + PAUSE * (time.monotonic() - asked)
        if not answer.get("runs"):
            raise EngineError(f"Flower no longer knows the run: {answer.get('error-message', answer)}")
        status = str(answer["runs"][0]["status"])
        watch()
        if status.startswith("finished"):
            return status
        while time.monotonic() < ask_again:
            time.sleep(POLL_SECONDS)
            watch()


def check_not_over(output: Path, agreement_digest: str) -> None:
    """Raise WrongModel if an owner found a model wrong in an earlier run of this agreement. Owners answer nothing more
    under it, and their clients have ended, so a new run would only wait for them.
    """
    path = output / FAILURE
    failure = json.loads(path.read_text()) if path.is_file() else {}
    if (failure.get("code"), failure.get("agreement_digest")) == (WrongModel.code, agreement_digest):
        raise WrongModel(
            f"this agreement is over: owner {failure['owner']} found that what it was sent is not the merge",
            hint="read what the owners kept (amalgram verify OWNER.toml), find out why, then make a new agreement",
        )


def raise_failure(output: Path, status: str) -> None:
    """Raise the error that the run met: what our ServerApp left in `output`, or what Flower says about it."""
    path = output / FAILURE
    if not path.is_file():
        if status != FINISHED:
            raise EngineError(
                f"the coordinator's program exited without an error message; it was probably killed (Flower: {status})",
                hint="run the same command again to resume",
            )
        return
    failure = json.loads(path.read_text())
    if failure["owner"] is not None:
        raise OwnerRefused(failure["owner"], failure["code"])
    error = AmalgramError(failure["message"], hint=failure["hint"])
    error.code, error.exit_code = failure["code"], failure["exit_code"]
    raise error
