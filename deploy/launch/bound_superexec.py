"""A SuperExec that ends with the process it works for, and takes the apps that it started along.

Left to itself, an app outlives a server that was killed and keeps asking for it. Apps are forked from one process that
has imported their libraries (fork_server.py).

Run as a process of its own, at the head of its process group: `python -m deploy.launch.bound_superexec PID` and
flower-superexec's arguments.
"""

import subprocess
import sys
import threading
from types import SimpleNamespace

from flwr.supercore.cli import flower_superexec
from flwr.supercore.superexec.executor import subprocess_executor
from flwr.superlink.cli import flwr_serverapp
from flwr.supernode.cli import flwr_clientapp

from deploy.launch.fork_server import ForkServer
from deploy.launch.processes import end_group_with

APPS = {"flwr-clientapp": flwr_clientapp, "flwr-serverapp": flwr_serverapp}
# What apps import, in the order in which they need it. Not pyarrow: it starts a thread.
LIBRARIES = (
    "torch",
    "safetensors.torch",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
)


def main() -> None:
    """Run flower-superexec, bound, with apps that are forks."""
    worked_for = int(sys.argv.pop(1))
    forks = ForkServer(APPS, LIBRARIES)  # before any thread
    from deploy.launch.internals import check_internals  # imports modules that the bundle has too: not in a fork

    check_internals()
    threading.Thread(target=end_group_with, args=(worked_for,), daemon=True).start()
    # Flower's executor starts an app with subprocess.Popen and keeps nothing of what that returns.
    vars(subprocess_executor)["subprocess"] = SimpleNamespace(Popen=forks.start, DEVNULL=subprocess.DEVNULL)
    sys.argv[0] = "flower-superexec"
    flower_superexec()


if __name__ == "__main__":
    main()
