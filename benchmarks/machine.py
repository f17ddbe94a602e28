"""The machine that a benchmark ran on, as its results describe it, and the settings under which a merge is timed."""

import logging
import os
import platform
from typing import Any

import torch
import transformers


def this_machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def quiet_on_one_thread() -> None:
    """Let a merge in this process log errors only, and torch use one thread."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("amalgram").setLevel(logging.ERROR)
    torch.set_num_threads(1)
