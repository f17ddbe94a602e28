"""LoRA adapters as the `peft` library writes them, merged into a copy of the base model so that there is a delta.

    W = W_0 + scale B A,    scale = lora_alpha / r    (Hu et al., arXiv 2106.09685, section 4.1)

Somebody else wrote the adapter's configuration. We use only the keys that say how A and B become weights. Keys that
name other models, modules or code to fetch, import or run are never followed. Unknown keys are refused.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import ModelError
from common.lazy import lazy_module
from common.models.bounds import SPARE_NUMBERS, building_at_most
from common.models.files import inside, read_json, read_tensors, refused_as, tensor_names, weight_files
from common.text import shown

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel
else:
    torch = lazy_module("torch")

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_NAME = "amalgram"  # peft puts it into parameter names
PARAMETER_PREFIX = "base_model.model."  # peft puts it before every name in an adapter's file
# How A and B become weights.
USED = (
    "alpha_pattern", "bias", "exclude_modules", "fan_in_fan_out", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_bias", "modules_to_save", "r", "rank_pattern", "target_modules", "use_dora", "use_rslora",
)  # fmt: skip
# For training, for finding files, or without effect unless a key that we refuse is set.
NOT_FOLLOWED = (
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode",
    "init_lora_weights", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
)  # fmt: skip
# Other initialisations (PiSSA, OLoRA, ...) also change the base's weights, so the delta is not scale B A.
INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal")
SAVE_AGAIN = "save the adapter again with peft's save_pretrained; the file may be damaged or incomplete"
ANOTHER_BASE = "check that the adapter was trained on the agreed base model"


def is_adapter(folder: Path) -> bool:
    """Whether a model folder holds an adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


def changed_parameters(folder: Path) -> tuple[str, ...]:
    """The names of the base's parameters that the adapter in `folder` changes. Raises ModelError."""
    found = []
    for name in tensor_names(inside(folder, ADAPTER_WEIGHTS)):
        name = _plain(name).removeprefix(PARAMETER_PREFIX).replace(".base_layer.", ".")
        module, factor, rest = name.partition(".lora_")
        found.append(f"{module}.{'bias' if rest.endswith('.bias') else 'weight'}" if factor else module)
    return tuple(dict.fromkeys(found))


def names_another_base(folder: Path, base_folder: Path, names: Sequence[str]) -> str:
    """A warning, if the adapter in `folder` says that it was trained on another model than that in `base_folder`, which
    has these `names`; otherwise empty. Paths are compared by their last part, because people move folders.

    Nothing else tells an adapter of another base from one of this, if the layers have the same shapes.
    """
    named = read_json(folder, ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        return ""
    if _last_part(named) in map(_last_part, (*names, str(base_folder.resolve()))):
        return ""
    return (
        f"its {ADAPTER_CONFIG} says that it was trained on {shown(repr(named[:100]))}, and the base here is "
        f"{names[0]!r} ({base_folder.resolve()}); an adapter of another model spoils the merge. If one was only "
        f"renamed, `sha256sum {weight_files(base_folder)[0].name}` prints the same in both folders"
    )


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1].casefold()


def with_adapter(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A copy of `base` with the LoRA adapter in `folder` merged into its weights, and its `modules_to_save` in place.

    Raises ModelError, which names the folder, unless the adapter is LoRA, finite, and fits the base exactly.
    """
    with _refused(folder):
        model: PreTrainedModel = _adapted(base, folder).merge_and_unload()
    model.requires_grad_(True)  # peft froze the base, and Fisher information needs gradients
    return model.eval()


def check_adapter(outline: PreTrainedModel, folder: Path) -> None:
    """Raise the ModelError of `with_adapter` for an adapter that does not fit a base.

    `outline`: the base without weights. What the merged weights would be, and whether they are finite, is not looked
    at.
    """
    with _refused(folder):
        _adapted(outline, folder)


@contextmanager
def _refused(folder: Path) -> Iterator[None]:
    """Within, whatever peft raises is a ModelError, and what it warns about is not shown: fan_in_fan_out, which it sets
    right for each layer, and the weights that an outline lacks.
    """
    refused = refused_as(f"model {folder}: its adapter does not fit the base", ANOTHER_BASE)
    with refused, warnings.catch_warnings(action="ignore"):
        yield


def _adapted(base: PreTrainedModel, folder: Path) -> PeftModel:
    """A copy of `base` with the adapter in `folder` beside its weights."""
    # Takes seconds to import, and few owners need it.
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    settings, tensors = _settings(folder), _tensors(folder)
    copied, held = copy.deepcopy(base), sum(tensor.numel() for tensor in tensors.values())
    with building_at_most(f"model {folder}: its {ADAPTER_CONFIG}", len(tensors), held + SPARE_NUMBERS):
        adapted = PeftModel(copied, LoraConfig(**settings), adapter_name=ADAPTER_NAME)
    needed = get_peft_model_state_dict(adapted, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
    tensors, needed = _each_once(tensors), _each_once(needed)
    _check_fit(tensors, needed, folder)
    found = set_peft_model_state_dict(adapted, tensors, adapter_name=ADAPTER_NAME)
    if found.unexpected_keys:
        raise ModelError(
            f"model {folder}: its adapter holds {found.unexpected_keys[0]} ({len(found.unexpected_keys)} such in all), "
            "which the base does not have",
            hint=ANOTHER_BASE,
        )
    return adapted


def _settings(folder: Path) -> dict[str, Any]:
    """The keys of adapter_config.json that are used."""
    config = read_json(folder, ADAPTER_CONFIG)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ModelError(
            f"model {folder}: its adapter is of type {kind}; only LORA can be merged into weights here",
            hint="train a LoRA adapter, or bring a whole fine-tuned model",
        )
    if config.get("init_lora_weights", True) not in INITIALISATIONS:
        raise ModelError(
            f"model {folder}: its adapter was initialised by {config['init_lora_weights']}, which changes the base",
            hint="convert it to a plain LoRA (peft: save_pretrained with path_initial_model_for_weight_conversion)",
        )
    for key, value in config.items():
        if key not in (*USED, *NOT_FOLLOWED) and value:
            raise ModelError(
                f"model {folder}: its {ADAPTER_CONFIG} sets {key}, which cannot be merged here",
                hint="merge the adapter into the base with peft's merge_and_unload, and bring the whole model",
            )
    return {key: config[key] for key in USED if key in config}


def _tensors(folder: Path) -> dict[str, Tensor]:
    tensors = dict(read_tensors(inside(folder, ADAPTER_WEIGHTS)))
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ModelError(
                f"model {folder}: {name} has type {tensor.dtype}, but weights must be floating-point numbers",
                hint="save the adapter without quantisation",
            )
        if not torch.isfinite(tensor).all():
            raise ModelError(
                f"model {folder}: {name} holds a number that is not finite", hint="its training diverged; train it anew"
            )
    return tensors


def _each_once(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the second and third copies of a saved module's bias, which peft writes if all biases are trained."""
    return {name: tensor for name, tensor in tensors.items() if _plain(name) == name or _plain(name) not in tensors}


def _plain(name: str) -> str:
    return re.sub(r"\.(modules_to_save|original_module)\.", ".", name)


def _check_fit(tensors: dict[str, Tensor], needed: dict[str, Tensor], folder: Path) -> None:
    for name, expected in needed.items():
        if name not in tensors:
            raise ModelError(
                f"model {folder}: its adapter lacks {name}, which its {ADAPTER_CONFIG} calls for", hint=SAVE_AGAIN
            )
        if tensors[name].shape != expected.shape:
            raise ModelError(
                f"model {folder}: {name} has shape {tuple(tensors[name].shape)}, on this base it must have "
                f"{tuple(expected.shape)}",
                hint=ANOTHER_BASE,
            )
