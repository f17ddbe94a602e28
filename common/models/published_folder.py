"""The files of a published model, as every party writes them from its own copy of the base: the same bytes.

The coordinator publishes them. Each owner writes them too, and signs only what it would have published. So nothing here
may depend on anything but the agreement, the base and the merged delta: configurations are the base's own files with
the agreed keys changed, and no library is asked what it would add. Code is never copied, nor the keys that name some.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.agreement import Agreement, AgreementDraft, Task
from common.agreement.tables import CLASSIFYING
from common.errors import ModelError
from common.models.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PARAMETER_PREFIX, is_adapter
from common.models.files import DOWNLOAD_AGAIN, digest_of_file, read_json, without_code
from common.models.folders import load_tokenizer
from common.models.loading import private_head
from common.models.low_rank import AdapterDelta, AdapterPlan
from common.publication import RECEIPTS, PublishedFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG = "config.json", "generation_config.json", "tokenizer_config.json"
IMAGE_PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # older and newer releases of transformers
HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9._-]+)?")
# Of the base's agreed files, those that a tokenizer is made of are published, if they are data.
DATA = (".json", ".txt", ".model", ".jinja", ".spm", ".tiktoken", ".tokenizer", ".codes")


def write_model(model: PreTrainedModel, base_folder: Path, agreement: Agreement, folder: Path) -> None:
    """Write a new folder of the published `model`: its body if heads are private. There is no card yet."""
    published = model.base_model if private_head(model, agreement.task) else model
    published.save_pretrained(folder)
    (folder / GENERATION_CONFIG).unlink(missing_ok=True)
    _write_json(folder / CONFIG, model_configuration(read_finite(base_folder / CONFIG), published, agreement.task))
    _copy_configurations((GENERATION_CONFIG,), base_folder, agreement, folder)
    write_preparation(base_folder, agreement, folder)


def model_configuration(base: Mapping[str, Any], published: PreTrainedModel, task: Task) -> dict[str, Any]:
    """The published config.json: the base's, except for the keys that the agreement decides."""
    config: dict[str, Any] = without_code(base) | {"architectures": [type(published).__name__], "dtype": "float32"}
    config.pop("torch_dtype", None)
    if config.get("pad_token_id") is None and getattr(published.config, "pad_token_id", None) is not None:
        config["pad_token_id"] = published.config.pad_token_id  # the tokenizer's (loading.load_base)
    if task.has_labels:
        named = [config.pop(key, None) for key in ("problem_type", "id2label", "label2id", "num_labels", "_num_labels")]
        if task.head == "shared":
            if task.kind in CLASSIFYING and (named[0] or task.problem_type != "single_label_classification"):
                config["problem_type"] = task.problem_type  # what a pipeline makes of the outputs
            config["id2label"] = {str(index): label for index, label in enumerate(task.labels)}
            config["label2id"] = {label: index for index, label in enumerate(task.labels)}
    return config


def adapter_configuration(agreement: Agreement, plan: AdapterPlan, layers: Collection[str]) -> dict[str, Any]:
    """The published adapter_config.json: what makes weights of the factors of `layers`, at scale 1. peft's defaults do
    the rest.
    """
    return {
        "base_model_name_or_path": base_name(agreement),
        "bias": "none",
        "fan_in_fan_out": any(plan.layers[name] for name in layers),
        "inference_mode": True,
        "lora_alpha": plan.rank,
        "modules_to_save": list(plan.whole_modules),
        "peft_type": "LORA",
        "r": plan.rank,
        "target_modules": sorted(name.removesuffix(".weight") for name in layers),
    }


def base_name(agreement: Agreement) -> str:
    """The name of the agreed base on the hub. If the drafter had it in a folder, it is one that nobody can have there:
    transformers takes a folder that is missing for a name, and would fetch somebody else's model.
    """
    is_of_the_hub = agreement.base_revision is not None and HUB_NAME.fullmatch(agreement.base)
    return agreement.base if is_of_the_hub else f"base model with digest {agreement.base_digest}"


def base_names(draft: AgreementDraft, own_base: str | None) -> list[str]:
    """What an adapter may call its base: the name of an owner's own one, if it has one, or else that in the agreement,
    and that in a published adapter.
    """
    if own_base is not None:
        return [own_base]
    return [draft.base, base_name(draft)] if isinstance(draft, Agreement) else [draft.base]


def changed_layers(delta: AdapterDelta) -> tuple[str, ...]:
    """The cut layers that the adapter changes; all if it changes none, because peft wants at least one.

    peft matches modules by the end of their names, so those are with them whose names end with that of another one.
    """
    modules = [
        name.removesuffix(".weight")
        for name, factors in delta.factors.items()
        if factors.up.any() and factors.down.any()
    ]
    matched = tuple(name for name in delta.factors if f".{name}".endswith(tuple(f".{each}.weight" for each in modules)))
    return matched or tuple(delta.factors)


def write_adapter(
    model: PreTrainedModel, delta: AdapterDelta, base_folder: Path, agreement: Agreement, folder: Path
) -> None:
    """Write a new folder of an adapter, as `PeftModel.from_pretrained(base, folder)` reads it: the factors of the
    layers that changed, and those parameters of `model` (base + delta) that travel whole. There is no card yet.

    The product of the factors, rounded once, is the signed delta. Whoever loads the adapter multiplies the factors in
    float32, and so has the signed model up to that rounding.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    layers = changed_layers(delta)
    _write_json(folder / ADAPTER_CONFIG, adapter_configuration(agreement, delta.plan, layers))
    write_preparation(base_folder, agreement, folder)
    tensors = {}
    for name in layers:
        module, factors = name.removesuffix(".weight"), delta.factors[name]
        tensors[f"{PARAMETER_PREFIX}{module}.lora_A.weight"] = factors.down
        tensors[f"{PARAMETER_PREFIX}{module}.lora_B.weight"] = factors.up
    parameters = dict(model.named_parameters())
    tensors |= {f"{PARAMETER_PREFIX}{name}": parameters[name].detach().contiguous() for name in delta.plan.whole}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def write_preparation(base_folder: Path, agreement: Agreement, folder: Path) -> None:
    """Copy what prepares rows for the model, as far as it was agreed: the tokenizer, or the image processor."""
    if agreement.task.is_text:
        _write_tokenizer(base_folder, agreement, folder)
    else:
        _copy_configurations(IMAGE_PROCESSORS, base_folder, agreement, folder)


def _copy_configurations(names: Collection[str], base_folder: Path, agreement: Agreement, folder: Path) -> None:
    """Copy those of the base's agreed configurations, without keys that name code."""
    for file in agreement.base_files:
        if file.name in names:
            _write_json(folder / file.name, without_code(read_finite(base_folder / file.name)))


def _write_tokenizer(base_folder: Path, agreement: Agreement, folder: Path) -> None:
    """Copy the base's tokenizer. One without a padding token is told to pad with its end-of-text token."""
    for name in _tokenizer_files(agreement):
        copy = folder / name
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(base_folder / name, copy)
    path = base_folder / TOKENIZER_CONFIG
    config = read_finite(path) if path.is_file() else {}
    changed = without_code(config)
    special = base_folder / "special_tokens_map.json"
    if not (config.get("pad_token") or (special.is_file() and read_finite(special).get("pad_token"))):
        tokenizer = load_tokenizer(base_folder)
        if tokenizer.pad_token == tokenizer.eos_token:
            changed["pad_token"] = tokenizer.eos_token
    if changed != config:
        _write_json(folder / TOKENIZER_CONFIG, changed)


def published_folder(folder: Path) -> PublishedFolder:
    """What a folder publishes, receipts excepted."""
    files = {
        path.relative_to(folder).as_posix(): digest_of_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != RECEIPTS
    }
    return PublishedFolder(
        files=files, configuration=read_finite(folder / (ADAPTER_CONFIG if is_adapter(folder) else CONFIG))
    )


def _tokenizer_files(agreement: Agreement) -> Iterator[str]:
    for file in agreement.base_files:
        is_read_elsewhere = file.name in (CONFIG, GENERATION_CONFIG) or file.name.endswith("processor_config.json")
        if Path(file.name).suffix in DATA and not is_read_elsewhere:
            yield file.name


def read_finite(path: Path) -> dict[str, Any]:
    """One JSON object of finite numbers, as published configurations are. Raises ModelError."""
    values = read_json(path.parent, path.name)
    try:
        json.dumps(values, allow_nan=False)
    except ValueError:
        raise ModelError(f"model {path}: holds a number that is not finite", hint=DOWNLOAD_AGAIN) from None
    return values


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
