"""The published model as a LoRA adapter of the base, as `PeftModel.from_pretrained(base, folder)` reads it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from common.agreement import Agreement
from common.models.adapter import ADAPTER_WEIGHTS, PARAMETER_PREFIX
from common.models.low_rank import LowRank
from common.models.published_folder import write_adapter_configuration

if TYPE_CHECKING:
    from torch import nn


def write_adapter(merged: nn.Module, low_rank: LowRank, base_folder: Path, agreement: Agreement, folder: Path) -> None:
    """Write the factors of the cut layers, and the parameters of `merged` (base + delta) that travel whole.

    The product of the factors, rounded once, is the signed delta. Whoever loads the adapter multiplies the factors in
    float32, and so has the signed model up to that rounding.
    """
    from safetensors.torch import save_file

    plan = low_rank.plan
    write_adapter_configuration(agreement, plan, base_folder, folder)
    tensors = {}
    for name, factors in low_rank.factors.items():
        module = name.removesuffix(".weight")
        tensors[f"{PARAMETER_PREFIX}{module}.lora_A.weight"] = factors.down
        tensors[f"{PARAMETER_PREFIX}{module}.lora_B.weight"] = factors.up
    parameters = dict(merged.named_parameters())
    tensors |= {f"{PARAMETER_PREFIX}{name}": parameters[name].detach().contiguous() for name in plan.whole}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
