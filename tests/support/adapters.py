"""LoRA adapters as an owner would bring them."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel


def write_adapter(base: PreTrainedModel, folder: Path, seed: int = 1, **settings: object) -> Path:
    """An adapter of `base` with random weights, as peft writes it."""
    adapted = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 6, **settings}))  # type: ignore[arg-type]
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=random)
    adapted.save_pretrained(folder)
    return folder
