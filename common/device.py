"""Where numbers are computed: on the CPU, or on an accelerator that a party names in its own settings.

No other party sees a device, and no result depends on it by more than rounding. What is verified, and the masked sum,
stay on the CPU: there every party computes in float64, or in whole numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from common.errors import SettingsError
from common.lazy import lazy_module
from common.settings_file import matching

if TYPE_CHECKING:
    import torch
else:
    torch = lazy_module("torch")

DeviceName = Annotated[str, matching(r"auto|cpu|mps|cuda(:[0-9]{1,2})?", "auto, cpu, cuda, cuda:1 or mps")]


def find_device(wanted: str, where: str) -> torch.device:
    """The device that a setting names; "auto" is the first accelerator, or the CPU if there is none.

    `where`: whose setting it is, for messages. Raises SettingsError if the device is not there.
    """
    if wanted == "cpu":
        return torch.device("cpu")  # without a look for others, which starts their drivers
    found = accelerators()
    if wanted == "auto":
        return found[0] if found else torch.device("cpu")
    device = torch.device(wanted, 0) if wanted == "cuda" else torch.device(wanted)
    if device not in found:
        there = ", ".join(["cpu", *map(str, found)])
        has_build = device.type == "mps" or torch.version.cuda is not None
        raise SettingsError(
            f'{where}: device = "{wanted}" is not there; there is: {there}',
            hint='device = "auto" takes what is there'
            if has_build
            else f"torch {torch.__version__} is built without CUDA; install a build that has it, or leave device out",
        )
    return device


def find_solver(wanted: str, where: str) -> torch.device:
    """The device on which a coordinator solves. Raises SettingsError if it is not there, or has no float64."""
    device = find_device(wanted, where)
    if has_float64(device):
        return device
    if wanted == "auto":
        return torch.device("cpu")
    raise SettingsError(
        f'{where}: device = "{wanted}" has no float64, in which a coordinator solves',
        hint="leave device out: the coordinator then solves on the CPU",
    )


def accelerators() -> tuple[torch.device, ...]:
    """Every accelerator of this machine that torch can use, in the order in which "auto" takes them."""
    cuda = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    mps = [torch.device("mps")] if torch.backends.mps.is_available() else []
    return (*(torch.device("cuda", index) for index in cuda), *mps)


def has_float64(device: torch.device) -> bool:
    return device.type != "mps"


def title_of(device: torch.device) -> str:
    """A device as people know it: `cuda:0 (NVIDIA H200)`."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def memory_of(device: torch.device) -> tuple[int, int] | None:
    """(free, total) bytes of an accelerator's own memory; None for the CPU."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached, total
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return total - torch.mps.current_allocated_memory(), total
    return None
