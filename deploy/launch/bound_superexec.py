"""A SuperExec that goes down with the process it works for, and takes the apps that it has started along.

Left to itself an app outlives a server that was killed: it asks for that server again and again. Run as a process of
its own, at the head of its process group: `python -m deploy.launch.bound_superexec PID` and flower-superexec's
arguments.
"""

import os
import signal
import sys
import threading
import time

import psutil
from flwr.supercore.cli import flower_superexec

POLL_SECONDS = 0.2


def end_group_with(pid: int) -> None:
    """Kill this process group, this process among it, once there is no process `pid`."""
    while psutil.pid_exists(pid):
        time.sleep(POLL_SECONDS)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Run flower-superexec, bound."""
    threading.Thread(target=end_group_with, args=(int(sys.argv.pop(1)),), daemon=True).start()
    sys.argv[0] = "flower-superexec"
    flower_superexec()


if __name__ == "__main__":
    main()
