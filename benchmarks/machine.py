"""On what a benchmark ran, as its results say it."""

import os
import platform
from typing import Any

import torch


def this_machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
