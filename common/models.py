"""Hugging Face folders in and out: the base model and its digest, an owner's delta, the plan of what is merged.

Weights are read from safetensors only; a pickle is refused, because loading one runs whatever code it holds.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from common.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_adapter, with_adapter
from common.agreement import Agreement, Task, TensorRoles
from common.errors import ModelError, first_line
from common.mapped import copy_of
from common.tensor_layout import TensorEntry, TensorLayout

# The median over weight matrices of |W_i - W_0| / |W_0|. Unrelated weights are at 1 or above, however they are scaled;
# MiniLM fine-tuned on five domains is at 0.03 or below, tiny models trained at a rate of 1e-3 below 0.4.
MOST_MEDIAN_CHANGE = 0.8
FLOAT_TYPES = ("F64", "F32", "F16", "BF16")  # as safetensors writes them
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "*.model")
HUB_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "README.md"]  # the card names the licence
AUTO_CLASSES = {
    "text-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "causal-lm": AutoModelForCausalLM,
    "sequence-to-sequence": AutoModelForSeq2SeqLM,
    "image-classification": AutoModelForImageClassification,
}


def model_folder(location: str, relative_to: Path) -> Path:
    """The folder of a model named by a path (absolute, or relative to a settings file's folder) or by a hub name."""
    folder = _find_folder(location, relative_to)
    # transformers would load the adapter too, or another base that it names.
    if is_adapter(folder):
        raise ModelError(f"model {folder}: holds an adapter ({ADAPTER_CONFIG}); a base is a whole model")
    _check_files(folder, "config.json", "*.safetensors")
    return folder


def fine_tuned_folder(location: str, relative_to: Path) -> Path:
    """As `model_folder`, for an owner's fine-tuned model, which may also be a LoRA adapter of the base."""
    folder = _find_folder(location, relative_to)
    if not is_adapter(folder):
        return model_folder(location, relative_to)
    if any(folder.glob("model*.safetensors")):
        raise ModelError(f"model {folder}: holds a whole model and an adapter ({ADAPTER_CONFIG}); keep one of them")
    _check_files(folder, ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    return folder


def _find_folder(location: str, relative_to: Path) -> Path:
    folder = Path(location) if Path(location).is_absolute() else relative_to / location
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"model {location}: {folder} is no folder; a Hugging Face model folder is needed")
    try:
        return Path(snapshot_download(location, allow_patterns=HUB_PATTERNS))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError):
        raise ModelError(
            f"model {location}: no folder {folder}, and no model of this name could be fetched from the hub"
        ) from None


def base_model_folder(own_copy: str | None, home: Path, agreement: Agreement, agreement_path: Path) -> Path:
    """A party's copy of the base model (relative to its own settings in `home`), or what the agreement names."""
    if own_copy is not None:
        return model_folder(own_copy, home)
    return model_folder(agreement.base, agreement_path.parent)


def _check_files(folder: Path, config: str, weights: str) -> None:
    if not (folder / config).is_file():
        raise ModelError(f"model {folder}: has no {config}; a Hugging Face model folder is needed")
    if any(folder.glob(weights)):
        return
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise ModelError(
            f"model {folder}: holds pickled weights only, and loading a pickle runs its code; "
            "save it again with safe_serialization (model.safetensors)"
        )
    raise ModelError(f"model {folder}: holds no weights ({weights})")


def base_labels(folder: Path) -> tuple[str, ...]:
    """The labels that the base model's configuration names, in order."""
    config = _config(folder)
    return tuple(str(config.id2label[index]) for index in sorted(config.id2label))


def named_labels(folder: Path) -> tuple[str, ...]:
    """`base_labels`, or none where the configuration only numbers them, of an adapter, which has none, and of a body
    saved without its head (AutoModel), whose configuration still tells the labels that it had.
    """
    if is_adapter(folder):
        return ()
    architectures = _config(folder).architectures
    if architectures and not any("For" in architecture for architecture in architectures):
        return ()
    labels = base_labels(folder)
    return () if all(label.startswith("LABEL_") for label in labels) else labels


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


def check_tokenizer(folder: Path, base_folder: Path) -> None:
    """Raise ModelError if `folder` has a tokenizer of another vocabulary than the base's, which is used."""
    if not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        return
    own, agreed = load_tokenizer(folder).get_vocab(), load_tokenizer(base_folder).get_vocab()
    differing = sorted(own.items() ^ agreed.items(), key=lambda item: (item[1], item[0]))
    if differing:
        token = differing[0][0]
        raise ModelError(
            f"model {folder}: its tokenizer has {len(own)} tokens, the base's {len(agreed)}; the first that differs is "
            f"{token!r}, number {own.get(token, 'none')} here and {agreed.get(token, 'none')} in the base; "
            "fine-tune with the base's tokenizer, which is what reads the rows"
        )


def _check_labels(folder: Path, task: Task) -> None:
    """A model's own labels, where its configuration names any, must be the agreement's, in the same order."""
    labels = named_labels(folder)
    if task.has_labels and labels not in ((), task.labels):
        raise ModelError(
            f"model {folder}: its labels are {list(labels)}, the agreement's are {list(task.labels)}; "
            "for a new head, save the model without one (AutoModel) and name that as the base"
        )


def _config(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model {folder}: its config.json cannot be used: {first_line(error)}") from None


def _load(folder: Path, task: Task, seed: int) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the names of the parameters that its files lack."""
    _config(folder)
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


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"model {folder}: its tokenizer cannot be loaded: {first_line(error)}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def image_shape(config: Any) -> tuple[int, int, int]:
    """(channels, height, width) of the images that a model takes; CLIP's configuration has them one level down."""
    vision = getattr(config, "vision_config", config)
    if not hasattr(vision, "image_size") or not hasattr(vision, "num_channels"):
        raise ModelError(f"model of type {config.model_type}: its config.json names no image_size or no num_channels")
    size = vision.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return vision.num_channels, height, width


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Every parameter by name; one that is tied to another stands once."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def body_parameters(model: PreTrainedModel) -> tuple[str, ...]:
    """The parameters outside the head; all of them where the model does not tell the two apart."""
    names = tuple(parameter_shapes(model))
    body = tuple(name for name in names if name.startswith(f"{model.base_model_prefix}."))
    return body or names


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


@torch.no_grad()
def copy_parameters(names: Iterable[str], source: Mapping[str, Tensor], target: nn.Module) -> None:
    """Give `target` the named parameters, of those that `source` has by name."""
    to = dict(target.named_parameters())
    for name in names:
        to[name].copy_(source[name])


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


class Delta(Mapping[str, Tensor]):
    """What fine-tuning changed: W_i - W_0 by parameter name, float32, computed when it is asked for."""

    def __init__(self, fine_tuned: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
        self._fine_tuned, self._base = fine_tuned, base
        self._experts: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name in self._experts:
            return self._experts[name]
        change = (self._fine_tuned[name] - self._base[name]).detach()
        if change.ndim > 2:  # of fused experts, slices of two parameters are asked for in turn
            self._experts = dict(list(self._experts.items())[-1:]) | {name: change}
        return change

    def __iter__(self) -> Iterator[str]:
        return iter(self._fine_tuned)

    def __len__(self) -> int:
        return len(self._fine_tuned)


@torch.no_grad()
def add_delta(base: nn.Module, delta: Mapping[str, Tensor]) -> None:
    """Turn `base` into W_0 + delta, in place."""
    for name, parameter in base.named_parameters():
        parameter.add_(delta[name].to(parameter.dtype))


# --- what is merged ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The weight of a linear layer y = W x. Conv1D (GPT-2) stores it as (inputs, outputs), Linear the other way.

    Experts are often fused into one parameter (experts, ., .); then each slice is a layer, named `parameter[expert]`.
    `features`, of a layer that is merged in blocks of its inputs: the first one of this block, and the first one after
    it; d_in is the block's, the name is `weight[0:1024]`.
    `bias`: the bias that is solved with the weight, as the weight of a constant input; otherwise it is averaged.
    """

    weight: str
    d_in: int
    d_out: int
    stored_input_first: bool
    expert: int | None = None
    features: tuple[int, int] | None = None
    bias: str | None = None

    @property
    def whole(self) -> str:
        """The name of the layer that this is a block of; its own where it is none."""
        return self.weight if self.features is None else self.weight.rpartition("[")[0]

    @property
    def index(self) -> tuple[int | slice, ...]:
        """Where in its parameter the weight stands."""
        expert = () if self.expert is None else (self.expert,)
        if self.features is None:
            return expert
        inputs = slice(*self.features)
        return (*expert, inputs) if self.stored_input_first else (*expert, slice(None), inputs)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The parameter that holds the weight, and the bias if it is solved with it."""
        return (parameter_of(self.weight), *([] if self.bias is None else [self.bias]))

    def take(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """This layer's part of `tensors`, which has whole parameters by name: (gram_size, d_out), a bias last."""
        weight = self.to_input_first(tensors[parameter_of(self.weight)][self.index])
        return weight if self.bias is None else torch.cat([weight, tensors[self.bias][None]])

    def give(self, solution: Tensor) -> dict[str, Tensor]:
        """(gram_size, d_out) -> the weight and the bias, if there is one, as they are stored."""
        parts = {self.weight: self.from_input_first(solution[: self.d_in]).contiguous()}
        return parts if self.bias is None else parts | {self.bias: solution[self.d_in]}

    def to_input_first(self, tensor: Tensor) -> Tensor:
        """(stored) -> (d_in, d_out): the orientation of `delta^T` in the papers."""
        return tensor if self.stored_input_first else tensor.T

    def from_input_first(self, tensor: Tensor) -> Tensor:
        """(d_in, d_out) -> (stored)."""
        return tensor if self.stored_input_first else tensor.T


@dataclass(frozen=True, kw_only=True)
class SharedInput:
    """One distinct input tensor, or a block of its features, hence one Gram matrix, and the layers it feeds. Named
    after the first of them.
    """

    name: str
    d_in: int
    layers: tuple[Layer, ...]

    @property
    def has_constant(self) -> bool:
        """Whether a constant 1 stands after the d_in features, whose weights are the layers' biases."""
        return self.layers[0].bias is not None

    @property
    def gram_size(self) -> int:
        """Rows and columns of the Gram: the features, and the constant if there is one."""
        return self.d_in + self.has_constant

    @property
    def features(self) -> slice:
        """Those of the layers' inputs that the Gram is of."""
        features = self.layers[0].features
        return slice(None) if features is None else slice(*features)

    @property
    def is_routed(self) -> bool:
        """Whether only the tokens that a router chose get here: their number depends on the data and may be zero."""
        return any(layer.expert is not None for layer in self.layers)


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """What happens to each parameter, with shapes: the agreement's tensor roles on the base model.

    `data_free`: the layers that RegMean merges by their changes alone. `linear_layers`: all that a merge may change.
    """

    inputs: tuple[SharedInput, ...]
    data_free: tuple[Layer, ...]
    linear_layers: tuple[Layer, ...]
    averaged: tuple[str, ...]
    left_alone: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    blocks: tuple[str, ...] = ()  # the names of the transformer blocks, in order

    @property
    def changed(self) -> tuple[str, ...]:
        """Every parameter that a merge may change, in the model's own order."""
        fixed = set(self.left_alone)
        return tuple(name for name in self.shapes if name not in fixed)

    def layers(self) -> Iterator[Layer]:
        for shared_input in self.inputs:
            yield from shared_input.layers

    def dimensions(self) -> dict[str, int]:
        """Of each Gram by name, its rows and columns; of a block, those of all blocks of its layer, which are of the
        same rows of data.
        """
        of_layer: Counter[str] = Counter()
        for shared_input in self.inputs:
            of_layer[shared_input.layers[0].whole] += shared_input.gram_size
        return {each.name: of_layer[each.layers[0].whole] for each in self.inputs}


def delta_layout(plan: MergePlan, names: Iterable[str] | None = None) -> TensorLayout:
    """How a merged delta, or those of its tensors that are named, travels back to the owners, as float32."""
    wanted = plan.changed if names is None else names
    return TensorLayout(tuple(TensorEntry(name=name, shape=plan.shapes[name], bound=inf) for name in wanted))


class VectorDelta(Mapping[str, Tensor]):
    """A merged delta in the flat vectors as which it travels, float32, each tensor read when it is asked for: from the
    last vector that has it; zeros, which take no memory, where none has.
    """

    def __init__(self, plan: MergePlan, *parts: tuple[TensorLayout, NDArray[np.float32]]) -> None:
        self._shapes = plan.shapes
        self._parts = {entry.name: (layout, vector) for layout, vector in parts for entry in layout.entries}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._parts:
            return torch.zeros(()).expand(self._shapes[name])
        layout, vector = self._parts[name]
        return torch.from_numpy(copy_of(layout.read(vector, name)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer of the model whose weight is its own, by module name; a tied head's is an embedding's."""
    uses = _uses(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and uses[id(module.weight)] == 1
    }


def layer_biases(model: nn.Module) -> dict[str, str]:
    """The biases of linear layers that are the layer's own, by the name of its weight."""
    uses = _uses(model)
    return {
        f"{name}.weight": f"{name}.bias"
        for name, module in linear_layers(model).items()
        if module.bias is not None and uses[id(module.bias)] == 1
    }


def _uses(model: nn.Module) -> Counter[int]:
    """In how many modules each parameter stands, by its identity."""
    return Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that keep all experts' weights in two parameters of three dimensions, by module name.

    Only those that say how: `transformers.integrations.use_experts_implementation` notes orientation, bias and gate on
    the module, and its own batched kernels rest on these notes. Other layouts are averaged.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if all(hasattr(module, note) for note in ("is_transposed", "has_bias", "has_gate", "_apply_gate"))
    }


def expert_parameters(experts: nn.Module) -> tuple[str, str]:
    """The names of the parameters of the experts' first and second layer."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def merge_layers(model: nn.Module) -> dict[str, Layer]:
    """All that could be merged in closed form, by name: linear layers, and the slices of fused experts."""
    layers = {
        f"{name}.weight": _layer(f"{name}.weight", module.weight, input_first=isinstance(module, Conv1D))
        for name, module in linear_layers(model).items()
    }
    for name, experts in fused_experts(model).items():
        for parameter in expert_parameters(experts):
            for expert, weight in enumerate(getattr(experts, parameter)):
                slice_name = f"{name}.{parameter}[{expert}]"
                layer = _layer(slice_name, weight, input_first=bool(experts.is_transposed))
                layers[slice_name] = replace(layer, expert=expert)
    return layers


def _layer(name: str, weight: Any, *, input_first: bool) -> Layer:
    rows, columns = weight.shape
    d_in, d_out = (rows, columns) if input_first else (columns, rows)
    return Layer(weight=name, d_in=d_in, d_out=d_out, stored_input_first=input_first)


def parameter_of(weight: str) -> str:
    """The parameter that holds a layer's weight: of a slice, the whole one."""
    return weight.partition("[")[0]


def join_slices(
    tensors: Mapping[str, Tensor], layers: Iterable[Layer], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Tensors by the name of their layer -> by the name of their parameter: experts and blocks are put together."""
    index_of = {layer.weight: layer.index for layer in layers}
    joined: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parameter = parameter_of(name)
        if name == parameter:
            joined[name] = tensor
        else:
            joined.setdefault(parameter, tensor.new_zeros(shapes[parameter]))[index_of[name]] = tensor
    return joined


def merge_plan(model: nn.Module, roles: TensorRoles) -> MergePlan:
    """The roles with this model's shapes. Raises ModelError unless they name exactly the model's parameters."""
    shapes = parameter_shapes(model)
    layers = merge_layers(model)
    merged = [*(name for group in roles.merged for name in group), *roles.data_free]
    named = [*merged, *roles.averaged, *roles.left_alone]
    for name in sorted(set(named) ^ _names_as_in(named, shapes, layers)):
        missing_in = "the base model" if name in named else "the agreement's tensors"
        raise ModelError(f"parameter {name} is missing in {missing_in}")
    for name in roles.data_free:
        if name not in layers:
            raise ModelError(f"parameter {name} is to be merged, but it is no linear layer's weight")
    return MergePlan(
        inputs=tuple(
            block
            for group in roles.merged
            for block in _in_blocks(_shared_input(group, layers, layer_biases(model)), roles.largest_gram)
        ),
        data_free=tuple(layers[name] for name in roles.data_free),
        linear_layers=tuple(layer for name, layer in layers.items() if parameter_of(name) not in roles.left_alone),
        averaged=roles.averaged,
        left_alone=roles.left_alone,
        shapes=shapes,
        blocks=block_names(model),
    )


def block_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the model's transformer blocks: the children, all of one class, of its largest list of modules."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1
    ]
    if not lists:
        return ()
    largest, blocks = max(lists, key=lambda each: sum(parameter.numel() for parameter in each[1].parameters()))
    return tuple(f"{largest}.{index}" for index in range(len(blocks)))


def _names_as_in(named: list[str], shapes: Mapping[str, Any], layers: Mapping[str, Layer]) -> set[str]:
    """The model's parameters; one of which `named` has a slice, as all of its slices."""
    sliced = {parameter_of(name) for name in named} - set(named)
    slices = {name for name in layers if parameter_of(name) in sliced}
    return (set(shapes) - sliced) | slices


def _shared_input(group: tuple[str, ...], layers: Mapping[str, Layer], biases: Mapping[str, str]) -> SharedInput:
    weights = [name for name in group if name in layers]
    others = [name for name in group if name not in layers]
    own_biases = [biases.get(weight) for weight in weights]
    for name in others:
        if name not in own_biases:
            raise ModelError(f"parameter {name} is to be merged, but it is no linear layer's weight")
    if others not in ([], own_biases):
        raise ModelError(f"parameters {', '.join(group)} cannot share an input: either all layers have a bias or none")
    fed = tuple(replace(layers[weight], bias=biases[weight] if others else None) for weight in weights)
    if len({layer.d_in for layer in fed}) != 1:
        raise ModelError(f"parameters {', '.join(group)} cannot share an input: their input sizes differ")
    return SharedInput(name=group[0].removesuffix(".weight"), d_in=fed[0].d_in, layers=fed)


def _in_blocks(shared: SharedInput, largest: int | None) -> Iterator[SharedInput]:
    """The input, or where it has more than `largest` features, blocks of them that differ by one in size at most."""
    if largest is None or shared.d_in <= largest:
        yield shared
        return
    if shared.has_constant:
        raise ModelError(f"{shared.name}: is merged in blocks of its inputs, so its bias cannot be merged with it")
    count = -(-shared.d_in // largest)
    for start, stop in pairwise(number * shared.d_in // count for number in range(count + 1)):
        d_in, features, name = stop - start, (start, stop), f"[{start}:{stop}]"
        layers = tuple(
            replace(layer, weight=layer.weight + name, d_in=d_in, features=features) for layer in shared.layers
        )
        yield SharedInput(name=shared.name + name, d_in=d_in, layers=layers)
