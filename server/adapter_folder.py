"""The published model as a LoRA adapter of the base, as `PeftModel.from_pretrained(base, folder)` reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from common.agreement import Agreement
from common.models.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PARAMETER_PREFIX
from common.models.low_rank import LowRank

if TYPE_CHECKING:
    from torch import nn


def write_adapter(merged: nn.Module, low_rank: LowRank, agreement: Agreement, folder: Path) -> None:
    """Write the factors of the cut layers, and the parameters of `merged` (base + delta) that travel whole.

    The product of the factors, rounded once, is the signed delta. Whoever loads the adapter multiplies the factors in
    float32, and so has the signed model up to that rounding.
    """
    from peft import LoraConfig  # takes seconds to import, and few runs need it
    from safetensors.torch import save_file

    plan = low_rank.plan
    folder.mkdir(parents=True)
    tensors = {}
    for name, factors in low_rank.factors.items():
        module = name.removesuffix(".weight")
        tensors[f"{PARAMETER_PREFIX}{module}.lora_A.weight"] = factors.down
        tensors[f"{PARAMETER_PREFIX}{module}.lora_B.weight"] = factors.up
    parameters = dict(merged.named_parameters())
    tensors |= {f"{PARAMETER_PREFIX}{name}": parameters[name].detach().contiguous() for name in plan.whole}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = LoraConfig(
        base_model_name_or_path=agreement.base,
        inference_mode=True,
        r=plan.rank,
        lora_alpha=plan.rank,  # scale 1
        target_modules=[name.removesuffix(".weight") for name in plan.layers],
        modules_to_save=list(plan.whole_modules),
        fan_in_fan_out=any(plan.layers.values()),
    ).to_dict()
    in_order = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(in_order, indent=2, sort_keys=True) + "\n")
