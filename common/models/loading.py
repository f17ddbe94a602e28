"""Load a base model or an owner's fine-tuned one, and refuse what is not the agreed model.

Weights are read from safetensors only: loading a pickle runs whatever code it holds.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from common.agreement import Agreement, Task
from common.errors import ModelError, first_line
from common.models.adapter import is_adapter, with_adapter
from common.models.folders import load_tokenizer, named_labels, read_config
from common.models.parameters import parameter_shapes

# The median over weight matrices of |W_i - W_0| / |W_0|. Unrelated weights are at 1 or above, however they are scaled;
# MiniLM fine-tuned on five domains is at 0.03 or below, tiny models trained at a rate of 1e-3 below 0.4.
MOST_MEDIAN_CHANGE = 0.8


FLOAT_TYPES = ("F64", "F32", "F16", "BF16")  # as safetensors writes them


AUTO_CLASSES = {
    "text-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "causal-lm": AutoModelForCausalLM,
    "sequence-to-sequence": AutoModelForSeq2SeqLM,
    "image-classification": AutoModelForImageClassification,
}


def load_base(folder: Path, task: Task, seed: int) -> PreTrainedModel:
    """The base model in float32, ready for evaluation.

    A head that the folder does not hold is initialised from `seed`, hence alike at every party; anything else that is
    missing, or another order of labels, is a ModelError.
    """
    if task.head == "shared":
        _check_labels(folder, task)
    model, missing = _load(folder, task, seed)
    body = f"{model.base_model_prefix}."
    for name in missing:
        if name.startswith(body) and "pooler" not in name:
            raise ModelError(f"model {folder}: its weights lack {name}; are they of the model that config.json names?")
    if task.is_text and getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = load_tokenizer(folder).pad_token_id
    return model


def weights_made_here(folder: Path, task: Task) -> tuple[str, ...]:
    """The parameters that the base's folder lacks and `load_base` makes: none of a whole model, or of private heads."""
    return () if task.head == "private" else tuple(_load(folder, task, seed=0)[1])


def load_fine_tuned(folder: Path, task: Task, base: PreTrainedModel) -> PreTrainedModel:
    """An owner's model in float32: its own weights, or the base's with its adapter. Only for an adapter are the weights
    of `base` looked at.

    Raises ModelError unless it has exactly the base's parameters and labels.
    """
    if is_adapter(folder):
        model = with_adapter(base, folder)
        _check_finite(model, folder)
        return model
    _check_labels(folder, task)
    model, missing = _load(folder, task, seed=0)
    if missing:
        raise ModelError(f"model {folder}: its weights lack {missing[0]} ({len(missing)} in all); it is no such model")
    if task.is_text:
        model.config.pad_token_id = base.config.pad_token_id
    expected, found = parameter_shapes(base), parameter_shapes(model)
    for name in sorted(set(expected) | set(found)):
        if expected.get(name) != found.get(name):
            raise ModelError(
                f"model {folder}: parameter {name} has shape {found.get(name, 'none')}, "
                f"in the base it has {expected.get(name, 'none')}; it was not fine-tuned from this base"
            )
    return model


@torch.no_grad()
def check_change(
    fine_tuned: Mapping[str, Tensor], base: Mapping[str, Tensor], names: Iterable[str], folder: Path
) -> None:
    """Raise ModelError for a model that is no nearer to the base than any other would be, by its parameters `names`.

    For models whose start we have not seen: one that was trained here, or an adapter on the base, cannot have another.
    """
    if is_adapter(folder):
        return
    changes = [_relative_change(fine_tuned[name], base[name]) for name in names]
    change = median([change for change in changes if change is not None] or [0.0])
    if change > MOST_MEDIAN_CHANGE:
        raise ModelError(
            f"model {folder}: half of its weight matrices are {change:.2f} or more of their norm away from the base's, "
            f"the bound is {MOST_MEDIAN_CHANGE}; it was fine-tuned from another base, or its training diverged. Name a "
            "model that was fine-tuned from the agreed base"
        )


def _relative_change(parameter: Tensor, start: Tensor) -> float | None:
    """|W_i - W_0| / |W_0|; None of what is no matrix, or of a base's zeros."""
    return float((parameter - start).norm() / start.norm()) if parameter.ndim > 1 and start.any() else None


def _check_labels(folder: Path, task: Task) -> None:
    """A model's own labels, where its configuration names any, must be the agreement's, in the same order."""
    labels = named_labels(folder)
    if task.has_labels and labels not in ((), task.labels):
        raise ModelError(
            f"model {folder}: its labels are {list(labels)}, the agreement's are {list(task.labels)}; "
            "for a new head, save the model without one (AutoModel) and name that as the base"
        )


def _load(folder: Path, task: Task, seed: int) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the names of the parameters that its files lack."""
    read_config(folder)
    stored = _stored_types(folder)
    labels = dict(enumerate(task.labels))
    head = {"num_labels": len(labels), "id2label": labels, "label2id": {name: index for index, name in labels.items()}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model, found = AUTO_CLASSES[task.kind].from_pretrained(
                folder,
                **(head if task.has_labels else {}),
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=task.head == "private",  # an owner's head may have more labels than the base's
            )
        except Exception as error:  # whatever a broken folder makes of the loader, a person gets one line
            reason = first_line(error)
            if "ignore_mismatched_sizes" in reason:
                reason = "its head, or another weight, has another shape; do task.labels fit this model?"
            raise ModelError(
                f"model {folder}: cannot be loaded for {task.kind}"
                f"{f' with {len(labels)} labels' if task.has_labels else ''}: {reason}"
            ) from None
    for name in sorted({key for key, *_ in found["mismatched_keys"]} - set(private_head(model, task))):
        raise ModelError(f"model {folder}: parameter {name} has another shape than config.json makes it")
    _check_types(model, stored, folder)
    _check_finite(model, folder)
    for module in model.modules():  # chunks change no output, but in a chunk padding cannot be told by shape
        if hasattr(module, "chunk_size_feed_forward"):
            module.chunk_size_feed_forward = 0
    model.eval()
    return model, sorted(found["missing_keys"])


def _stored_types(folder: Path) -> dict[str, str]:
    """The type of every tensor in the folder's files, from their headers."""
    types = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                types.update({name: file.get_slice(name).get_dtype() for name in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ModelError(f"model {path}: cannot be read: {first_line(error)}") from None
    return types


def _check_types(model: PreTrainedModel, stored: Mapping[str, str], folder: Path) -> None:
    """Raise ModelError for a parameter stored as integers: quantised weights mean nothing without their scales."""
    body = f"{model.base_model_prefix}."
    parameters = {name.removeprefix(body) for name in parameter_shapes(model)}
    for name, kind in stored.items():
        if name.removeprefix(body) in parameters and kind not in FLOAT_TYPES:
            raise ModelError(
                f"model {folder}: {name} is stored as {kind}; weights must be floating-point numbers "
                f"({', '.join(FLOAT_TYPES)}): save the model without quantisation"
            )


def _check_finite(model: nn.Module, folder: Path) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(f"model {folder}: parameter {name} holds a number that is not finite")


def private_head(model: PreTrainedModel, task: Task) -> tuple[str, ...]:
    """The parameters that stay with each owner: all outside the model's body where heads are private, else none."""
    if task.head == "shared":
        return ()
    body = f"{model.base_model_prefix}."
    head = tuple(name for name in parameter_shapes(model) if not name.startswith(body))
    if not head or len(head) == len(parameter_shapes(model)):
        raise ModelError(
            f'{type(model).__name__}: its head cannot be told from its body; agree on task.head = "shared"'
        )
    return head


def digest_of(model: PreTrainedModel, task: Task) -> str:
    """SHA-256 over every parameter and buffer as loaded, without a private head: names, shapes, types and bytes; file
    formats do not matter.
    """
    digest = hashlib.sha256(b"amalgram model v1\n")
    left_out = set(private_head(model, task))
    for name, tensor in sorted(model.state_dict().items()):
        if name in left_out:
            continue
        digest.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_base(model: PreTrainedModel, agreement: Agreement, folder: Path) -> None:
    """Raise ModelError unless `model` is the agreed base model."""
    digest = digest_of(model, agreement.task)
    if digest != agreement.base_digest:
        raise ModelError(
            f"model {folder}: its digest is {digest[:16]}..., the agreement's base is {agreement.base_digest[:16]}...; "
            "this is another base model"
        )
