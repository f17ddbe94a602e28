"""On what a benchmark ran, as its results say it, and how a merge is timed on it."""

import logging
import os
import platform
from typing import Any

import torch
import transformers


def this_machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def quiet_on_one_thread() -> None:
    """Of a merge in this process, nothing but errors is told, and torch keeps to one thread."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("amalgram").setLevel(logging.ERROR)
    torch.set_num_threads(1)
