"""LoRA adapters as the `peft` library writes them: onto a copy of the base model, so that there is a delta to merge.

    W = W_0 + scale B A,    scale = lora_alpha / r    (Hu et al., arXiv 2106.09685, section 4.1)

An adapter's configuration is somebody else's text. Only what says how A and B become weights is used; what names other
models, modules or code to fetch, import or run is never followed, and what we do not know is refused.
"""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from common.errors import ModelError, first_line

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_NAME = "amalgram"  # peft puts it into parameter names
# How A and B become weights.
USED = (
    "alpha_pattern", "bias", "exclude_modules", "fan_in_fan_out", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_bias", "modules_to_save", "r", "rank_pattern", "target_modules", "use_dora", "use_rslora",
)  # fmt: skip
# For training, for finding things, or of no effect unless a key that we refuse is set.
NOT_FOLLOWED = (
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode",
    "init_lora_weights", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
)  # fmt: skip
# Other ways of initialising (PiSSA, OLoRA, ...) change the base's weights too: the delta is not scale B A.
INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal")


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()


def with_adapter(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A copy of `base` with the LoRA adapter in `folder` merged into its weights, and its `modules_to_save` in place.

    Raises ModelError, one line that names the folder, unless the adapter is LoRA, finite, and fits the base exactly.
    """
    # Takes seconds to import, and few owners need it.
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    settings, tensors = _settings(folder), _tensors(folder)
    try:
        with warnings.catch_warnings(action="ignore"):  # of fan_in_fan_out, which peft sets right layer by layer
            adapted = PeftModel(copy.deepcopy(base), LoraConfig(**settings), adapter_name=ADAPTER_NAME)
            needed = get_peft_model_state_dict(adapted, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
            _check_fit(tensors, needed, folder)
            found = set_peft_model_state_dict(adapted, tensors, adapter_name=ADAPTER_NAME)
            model: PreTrainedModel = adapted.merge_and_unload()
    except ModelError:
        raise
    except Exception as error:  # whatever a broken adapter makes of the library, a person gets one line
        raise ModelError(f"model {folder}: its adapter does not fit the base: {first_line(error)}") from None
    if found.unexpected_keys:
        raise ModelError(
            f"model {folder}: its adapter holds {found.unexpected_keys[0]} ({len(found.unexpected_keys)} such in all), "
            "for which the base has no place"
        )
    model.requires_grad_(True)  # peft froze the base; Fisher information needs its gradients
    return model.eval()


def _settings(folder: Path) -> dict[str, Any]:
    """What of adapter_config.json is used."""
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text())
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"model {folder}: its {ADAPTER_CONFIG} cannot be used: {first_line(error)}") from None
    if kind != "LORA":
        raise ModelError(f"model {folder}: its adapter is of type {kind}; only LORA can be merged into weights here")
    if config.get("init_lora_weights", True) not in INITIALISATIONS:
        raise ModelError(
            f"model {folder}: its adapter was initialised by {config['init_lora_weights']}, which changes the base; "
            "convert it to a plain LoRA (path_initial_model_for_weight_conversion of peft's save_pretrained)"
        )
    for key, value in config.items():
        if key not in (*USED, *NOT_FOLLOWED) and value:
            raise ModelError(f"model {folder}: its {ADAPTER_CONFIG} sets {key}, which cannot be merged here")
    return {key: config[key] for key in USED if key in config}


def _tensors(folder: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"model {folder}: its {ADAPTER_WEIGHTS} cannot be read: {first_line(error)}") from None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ModelError(f"model {folder}: {name} has type {tensor.dtype}; weights are floating-point numbers")
        if not torch.isfinite(tensor).all():
            raise ModelError(f"model {folder}: {name} holds a number that is not finite")
    return tensors


def _check_fit(tensors: dict[str, Tensor], needed: dict[str, Tensor], folder: Path) -> None:
    for name, expected in needed.items():
        if name not in tensors:
            raise ModelError(f"model {folder}: its adapter lacks {name}, which its {ADAPTER_CONFIG} speaks of")
        if tensors[name].shape != expected.shape:
            raise ModelError(
                f"model {folder}: {name} has shape {tuple(tensors[name].shape)}, on this base it must have "
                f"{tuple(expected.shape)}; it was not fine-tuned from this base"
            )
