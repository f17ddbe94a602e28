"""Flower's own simulation engine: every owner a virtual node of a SuperLink that is our own child."""

import json
import logging
import os
import signal
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from client.app import SIMULATED_OWNERS
from common.agreement import load_agreement
from common.settings_file import load_settings
from deploy.launch.flower import (
    FAILURE,
    check_bundle,
    flower_environment,
    raise_failure,
    submit,
    wait_for_run,
    write_connection,
)
from deploy.launch.processes import free_port, started, wait_for_port
from server.settings import CoordinatorSettings

log = logging.getLogger("amalgram.launch")


def run_with_ray(coordinator_file: Path, party_files: list[Path]) -> None:
    """Run the merge on Flower's simulation engine. Raises the error that the run met."""
    import torch  # takes seconds: not before settings are checked

    settings = load_settings(coordinator_file, CoordinatorSettings)
    check_bundle(load_agreement(coordinator_file.parent / settings.agreement))
    output = coordinator_file.parent / settings.output
    (output / FAILURE).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="amalgram-flower-") as home:
        environment = flower_environment(Path(home)) | {
            "OMP_NUM_THREADS": str(torch.get_num_threads()),  # as many as in-process, so that the last bits agree
            SIMULATED_OWNERS: json.dumps([str(path) for path in party_files]),
        }
        with _superlink(Path(home), environment):
            log.info("Flower's simulation engine is up, submitting the run")
            cores = os.cpu_count() or 1  # one owner at a time, with all the cores
            federation = f"num-supernodes={len(party_files)} client-resources-num-cpus={cores}"
            run_id = submit(environment, coordinator_file, "--federation-config", federation)
            status = wait_for_run(environment, run_id, lambda: None)
    raise_failure(output, status)


@contextmanager
def _superlink(home: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """A SuperLink on a free port of this machine only, ended with all its children."""
    port = free_port()
    write_connection(home, port, None)
    command = ["flower-superlink", "--insecure", "--simulation", "--disable-runtime-dependency-installation"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    try:
        with started(command, environment, home, home / "superlink.log") as process:
            wait_for_port(port, process, home / "superlink.log")
            yield
    finally:
        _stop_strays(home)


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
