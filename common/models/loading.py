"""Load a base model or an owner's fine-tuned model, and refuse anything that is not the agreed model.

Weights are read from safetensors only, because loading a pickle runs whatever code it holds.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from math import sqrt
from pathlib import Path
from statistics import median
from types import EllipsisType
from typing import TYPE_CHECKING, Any, TypeVar

from common.agreement import Agreement, Task, TaskKind
from common.errors import ModelError, first_line
from common.lazy import lazy_module
from common.models.adapter import is_adapter, with_adapter
from common.models.bounds import SPARE_NUMBERS, building_at_most
from common.models.files import (
    DOWNLOAD_AGAIN,
    digest_of_file,
    file_state,
    read_json,
    read_tensor,
    read_tensors,
    refused_as,
    tensor_names,
    weight_files,
    without_code,
)
from common.models.folders import (
    ANOTHER_BASE,
    MORE_TOKENS,
    check_base_labels,
    check_made_for,
    load_tokenizer,
    read_config,
)
from common.models.low_rank import adapter_plan
from common.models.parameters import is_finite, parameter_shapes
from common.models.plan import MergePlan, merge_plan

if TYPE_CHECKING:
    import torch
    import transformers
    from torch import Tensor, nn
    from transformers import PreTrainedModel
else:
    torch = lazy_module("torch")
    transformers = lazy_module("transformers")

# The median over weight matrices of |W_i - W_0| / |W_0|. Unrelated weights are at 1 or above, however they are scaled.
# MiniLM fine-tuned on five domains is at 0.03 or below, tiny models trained at a rate of 1e-3 are below 0.4.
MOST_MEDIAN_CHANGE = 0.8
FLOAT_TYPES = ("float64", "float32", "float16", "bfloat16")
PIECE_NUMBERS = 1 << 22  # of a parameter, that are compared at once
LAYERS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_decoder_layers",
    "num_encoder_layers", "num_blocks",
)  # fmt: skip
SPARE_LAYERS = 100  # of a model whose layers share their weights
MOST_COUNTED = 1 << 22  # labels, or what one list of a configuration adds up to, such as the depths of stages
MOST_COPIES = 4  # of one parameter, before they are tied: of what encoder and decoder read, and of the output layer
SPARE_BYTES = 1 << 28  # of masks and tables that a model makes by itself
BELONG_TOGETHER = "check that config.json and the weights belong together"
SMALL_BYTES = 32_000_000  # the weights of a model that is worth keeping in memory
SMALL_TENSOR_BYTES = 1 << 20  # not worth the time to open its file again
LOADABLE_TYPES = (*FLOAT_TYPES, "int64", "bool")  # counts and masks are buffers of some models
AUTO_CLASSES: dict[TaskKind, str] = {
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "causal-lm": "AutoModelForCausalLM",
    "sequence-to-sequence": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
}

Stored = TypeVar("Stored")


def load_base(folder: Path, task: Task, seed: int) -> PreTrainedModel:
    """The base model in float32, ready for evaluation.

    A head that the folder lacks is initialised from `seed`, so every party makes the same one. Raises ModelError if
    anything else is missing, or if the labels are in another order than the agreement's.
    """
    check_base_labels(folder, task)
    model, missing = _load(folder, task, seed)
    body = f"{model.base_model_prefix}."
    for name in missing:
        if name.startswith(body) and "pooler" not in name:
            raise ModelError(
                f"model {folder}: its weights lack {name}",
                hint=BELONG_TOGETHER,
            )
    _choose_padding(model, folder, task)
    return model


def load_outline(folder: Path, task: Task) -> PreTrainedModel:
    """The base model without weights: its configuration, its modules and their shapes. Nobody may change it.

    Its weights are not looked at; `check_base` looks at them whenever they are loaded.
    """
    model = _outline(folder, json.dumps(read_json(folder, "config.json")), task)
    _choose_padding(model, folder, task)
    return model


@lru_cache(maxsize=16)  # it holds no weights, so a simulation of many owners keeps one
def _outline(folder: Path, config_json: str, task: Task) -> PreTrainedModel:
    """Without padding, for which the folder would need a tokenizer. `config_json`: what is in the folder now, so that
    another content is not taken from the cache.
    """
    config = read_config(folder, **_head(folder, task))
    try:
        with torch.device("meta"):
            model: PreTrainedModel = _model_class(config, task)(config)
    except Exception as error:  # odd values can make the library raise anything
        raise _cannot_be_loaded(folder, task, first_line(error), DOWNLOAD_AGAIN) from None
    return model


def _choose_padding(model: PreTrainedModel, folder: Path, task: Task) -> None:
    if task.is_text and getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = load_tokenizer(folder).pad_token_id


def weights_made_here(folder: Path, task: Task) -> tuple[str, ...]:
    """The parameters that the base's folder lacks and `load_base` makes; none if heads are private."""
    return () if task.head == "private" else _load(folder, task, seed=0)[1]


def agreed_plan(base: PreTrainedModel, folder: Path, agreement: Agreement) -> MergePlan:
    """The agreement's merge plan of a base model, or of its outline, that `folder` holds. Raises ModelError."""
    plan, rank = merge_plan(base, agreement.tensors), agreement.publish.adapter_rank
    if rank is None:
        return plan
    return replace(plan, adapter=adapter_plan(base, weights_made_here(folder, agreement.task), rank))


def load_fine_tuned(folder: Path, task: Task, base: PreTrainedModel) -> PreTrainedModel:
    """An owner's model in float32: its own weights, or the base's weights with its adapter.

    The weights of `base` are read for an adapter only. Raises ModelError unless the model has exactly the base's
    parameters and labels.
    """
    if is_adapter(folder):
        model = with_adapter(base, folder)
        _check_finite(model, folder)
        return model
    model = _load_whole(folder, task)
    if task.is_text:
        model.config.pad_token_id = base.config.pad_token_id
        _cut_unread_rows(model, base)
    expected, found = parameter_shapes(base), parameter_shapes(model)
    output = model.get_output_embeddings() if not task.has_labels else None
    if output is not None and f"{_name_of(model, output)}.weight" in found.keys() - expected.keys():
        raise ModelError(
            f"model {folder}: its output layer has weights of its own, in the base they are the embedding's",
            hint="save the base with tie_word_embeddings = false and a copy of the embedding as its output layer",
        )
    for name in sorted(set(expected) | set(found)):
        if expected.get(name) != found.get(name):
            raise ModelError(
                f"model {folder}: parameter {name} has shape {found.get(name, 'none')}, "
                f"in the base it has {expected.get(name, 'none')}; it was not fine-tuned from this base",
                hint=MORE_TOKENS if _has_fewer_rows(found.get(name), expected.get(name)) else ANOTHER_BASE,
            )
    return model


def load_any(folder: Path, task: Task) -> PreTrainedModel:
    """A whole fine-tuned model in float32, whatever it was made from. Raises ModelError.

    `task`: with the labels that the model itself has.
    """
    model = _load_whole(folder, task)
    _choose_padding(model, folder, task)
    return model


def _load_whole(folder: Path, task: Task) -> PreTrainedModel:
    check_made_for(folder, task)
    model, missing = _load(folder, task, seed=0)
    if missing:
        raise ModelError(
            f"model {folder}: its weights lack {missing[0]} ({len(missing)} in all)",
            hint=BELONG_TOGETHER,
        )
    return model


def is_unrelated(fine_tuned: PreTrainedModel, base: PreTrainedModel) -> bool:
    """Whether weights of the same shapes are as far apart as those of models that were trained one by one."""
    start = dict(base.named_parameters())
    return _median_change(dict(fine_tuned.named_parameters()), start, start) > MOST_MEDIAN_CHANGE


def _cut_unread_rows(model: PreTrainedModel, base: PreTrainedModel) -> None:
    """Drop embeddings of tokens that the base has not. The base's tokenizer reads all rows, and gives none of them.

    People pad a vocabulary so that its size is a multiple of 64.
    """
    rows = base.get_input_embeddings().num_embeddings
    if model.get_input_embeddings().num_embeddings > rows:
        model.resize_token_embeddings(rows, mean_resizing=False)


def _has_fewer_rows(found: tuple[int, ...] | None, expected: tuple[int, ...] | None) -> bool:
    return found is not None and expected is not None and found[1:] == expected[1:] and found < expected


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    found: str = next(name for name, module in model.named_modules() if module is wanted)
    return found


def private_head(model: PreTrainedModel, task: Task) -> tuple[str, ...]:
    """The parameters that stay with each owner: everything outside the body if heads are private, otherwise nothing."""
    if task.head == "shared":
        return ()
    body = f"{model.base_model_prefix}."
    head = tuple(name for name in parameter_shapes(model) if not name.startswith(body))
    if not head or len(head) == len(parameter_shapes(model)):
        raise ModelError(
            f"{type(model).__name__}: does not separate its head from its body, so the head cannot be private",
            hint='agree on task.head = "shared"',
        )
    return head


# --- is it the agreed model ---


def digest_of(model: PreTrainedModel, task: Task) -> str:
    """The model digest: SHA-256 over every parameter and buffer as loaded, except a private head.

    It covers names, shapes, types and bytes. File formats do not matter.
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
    if digest != agreement.base_digest:  # check: base-is-the-agreed-one
        raise ModelError(
            f"model {folder}: this is another base model; its digest is {digest[:16]}..., the agreement's is "
            f"{agreement.base_digest[:16]}...",
            hint="get the base model that the agreement names, in the agreed version",
        )


def check_change(
    fine_tuned: Mapping[str, Tensor], base: Mapping[str, Tensor], names: Iterable[str], folder: Path
) -> None:
    """Raise ModelError if the model is as far from the base as an unrelated one would be, by the parameters `names`.

    Only models whose start we have not seen need this check. A model that was trained here, or an adapter on the base,
    cannot have started elsewhere.
    """
    if is_adapter(folder):
        return
    change = _median_change(fine_tuned, base, names)
    if change > MOST_MEDIAN_CHANGE:
        raise ModelError(
            f"model {folder}: half of its weight matrices are {change:.2f} or more of their norm away from the base's, "
            f"the bound is {MOST_MEDIAN_CHANGE}; it was fine-tuned from another base, or its training diverged",
            hint=ANOTHER_BASE,
        )


def _median_change(fine_tuned: Mapping[str, Tensor], base: Mapping[str, Tensor], names: Iterable[str]) -> float:
    with torch.no_grad():
        changes = [_relative_change(fine_tuned[name], base[name]) for name in names]
    return median([change for change in changes if change is not None] or [0.0])


def _relative_change(parameter: Tensor, start: Tensor) -> float | None:
    """|W_i - W_0| / |W_0|. None if the parameter is not a matrix, or if the base's is zero."""
    moved, whole = 0.0, 0.0
    if parameter.ndim > 1:
        for one, other in zip(*(each.reshape(-1).split(PIECE_NUMBERS) for each in (parameter, start)), strict=True):
            moved, whole = moved + float((one - other).norm()) ** 2, whole + float(other.norm()) ** 2
    return sqrt(moved / whole) if whole else None


# --- loading and its checks ---


def _load(folder: Path, task: Task, seed: int) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The model, checked, and the names of the parameters that its files lack.

    transformers takes longer to build a small model than to run it on a batch, and every candidate starts from the
    base. So small models are kept, and copied.
    """
    files = weight_files(folder)
    if sum(path.stat().st_size for path in files) > SMALL_BYTES:
        return _built(folder, task, seed)
    files += [path for path in (folder / "config.json", folder / "generation_config.json") if path.is_file()]
    copies, missing = _small_model(folder, tuple(digest_of_file(path) for path in files), task, seed)
    return copies.another(), missing


@lru_cache(maxsize=8)
def _small_model(folder: Path, contents: tuple[str, ...], task: Task, seed: int) -> tuple[_Copies, tuple[str, ...]]:
    """`contents`: the digests of the files as they are now, so that other ones are not taken from the cache."""
    model, missing = _built(folder, task, seed)
    return _Copies(model), missing


class _Copies:
    """Makes copies of a model that was built here, in a fifth of the time that copy.deepcopy takes.

    Its modules are kept as a pickle that was written here and is never stored.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        written = io.BytesIO()
        pickler = _Pickler(written, pickle.HIGHEST_PROTOCOL)
        pickler.dump(model)
        self._modules, self._tensors = written.getvalue(), pickler.tensors

    def another(self) -> PreTrainedModel:
        unpickler = _Unpickler(io.BytesIO(self._modules))
        unpickler.tensors = [copy.deepcopy(tensor) for tensor in self._tensors]
        model: PreTrainedModel = unpickler.load()
        return model


class _Pickler(pickle.Pickler):
    """Leaves tensors out, so that they are not copied twice. A tensor that has two names is still one."""

    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.tensors: list[Tensor] = []
        self._places: dict[int, int] = {}  # by a tensor's identity

    def persistent_id(self, each: object) -> int | None:
        if not isinstance(each, torch.Tensor):
            return None
        place = self._places.setdefault(id(each), len(self.tensors))
        if place == len(self.tensors):
            self.tensors.append(each)
        return place


class _Unpickler(pickle.Unpickler):
    tensors: list[Tensor]

    def persistent_load(self, index: int) -> Tensor:
        return self.tensors[index]


def _built(folder: Path, task: Task, seed: int) -> tuple[PreTrainedModel, tuple[str, ...]]:
    _check_fits_its_files(folder, task)  # before a configuration decides how much memory is taken
    tensors = _unwrapped({name: tensor for path in weight_files(folder) for name, tensor in _stored_tensors(path)})
    model, missing, mismatched = _from_tensors(folder, tensors, task, seed)
    for name in sorted(mismatched - set(private_head(model, task))):
        raise ModelError(
            f"model {folder}: parameter {name} does not have the shape that config.json gives it",
            hint=BELONG_TOGETHER,
        )
    _check_types(model, tensors, folder)
    _check_finite(model, folder)
    for module in model.modules():  # chunks change no output, but inside a chunk the shape does not reveal padding
        if hasattr(module, "chunk_size_feed_forward"):
            module.chunk_size_feed_forward = 0
    model.eval()
    return model, tuple(sorted(missing))


def _check_fits_its_files(folder: Path, task: Task) -> None:
    """Raise ModelError if the configuration describes more numbers or layers than the weights can hold."""
    files = weight_files(folder)
    tensors = sum(len(tensor_names(path)) for path in files)
    values = read_json(folder, "config.json")
    with refused_as(f"model {folder}: its config.json cannot be used", DOWNLOAD_AGAIN):
        counts = list(_counts(values))
    for key, count in counts:
        if key in LAYERS and count > tensors + SPARE_LAYERS:  # check: no-more-layers-than-tensors
            raise ModelError(
                f"model {folder}: its config.json has {key} = {count}, and its files hold {tensors} tensors",
                hint=BELONG_TOGETHER,
            )
        if count > MOST_COUNTED:  # check: lists-of-sizes-are-bounded
            raise ModelError(
                f"model {folder}: its config.json counts {count} by {key!r:.60}, at most {MOST_COUNTED} make sense",
                hint=BELONG_TOGETHER,
            )
    stored = sum(path.stat().st_size for path in files)
    most = stored + SPARE_NUMBERS
    with building_at_most("its config.json", tensors, MOST_COPIES * most):
        outline = _outline(folder, json.dumps(values), task)
    described = sum(parameter.numel() for parameter in outline.parameters())
    if described > most:  # check: no-more-numbers-than-bytes
        raise ModelError(
            f"model {folder}: its config.json describes {described:,} numbers, and its files hold {stored:,} bytes",
            hint=f"{BELONG_TOGETHER}; quantised weights must be saved without quantisation",
        )
    beside = sum(buffer.nbytes for buffer in outline.buffers())
    if beside > stored + SPARE_BYTES:  # check: buffers-are-bounded
        raise ModelError(
            f"model {folder}: its config.json describes masks and tables of {beside:,} bytes, and its files hold "
            f"{stored:,}",
            hint=BELONG_TOGETHER,
        )


def _counts(values: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """How many layers and labels a configuration describes, and what each of its lists of numbers adds up to, by key,
    in all of its parts. Tokens are numbered, not counted.
    """
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _counts(value)
        elif isinstance(value, list) and "token" not in key and not key.endswith("ids"):
            yield key, _added_up(value)
        elif key in (*LAYERS, "num_labels") and isinstance(value, int):
            yield key, value


def _added_up(value: Any) -> int:
    if isinstance(value, dict):
        return _added_up(list(value.values()))
    if isinstance(value, list):
        return sum(map(_added_up, value))
    return abs(value) if isinstance(value, int) else 0


class _Unread:
    """Stands in for a tensor that is not stored as float32. Transformers reads it with `[...]`, which maps it from its
    file only until it is converted.

    If all were mapped at once, a model would be held twice while it is loaded: as stored, and converted.
    """

    def __init__(self, path: Path, name: str, dtype: torch.dtype, state: tuple[int, ...]) -> None:
        self.dtype, self._path, self._name, self._state = dtype, path, name, state

    def __getitem__(self, whole: EllipsisType) -> Tensor:
        tensor = read_tensor(self._path, self._name, self.dtype)
        if file_state(self._path) != self._state:  # check: a-model-is-loaded-from-one-version
            raise ModelError(
                f"model {self._path}: was changed while it was loaded",
                hint="start again once nothing writes to this folder",
            )
        return tensor


def _stored_tensors(path: Path) -> Iterator[tuple[str, Tensor | _Unread]]:
    """The tensors of one file, by name. None of them is read yet."""
    state = file_state(path)
    for name, tensor in read_tensors(path):
        is_converted = tensor.dtype != torch.float32 and tensor.nbytes > SMALL_TENSOR_BYTES
        yield name, _Unread(path, name, tensor.dtype, state) if is_converted else tensor


def _unwrapped(tensors: Mapping[str, Stored]) -> Mapping[str, Stored]:
    """The tensors by their names in the model, without what torch.compile and DataParallel put before every name."""
    for prefix in ("_orig_mod.", "module."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _from_tensors(
    folder: Path, tensors: Mapping[str, Tensor | _Unread], task: Task, seed: int
) -> tuple[PreTrainedModel, set[str], set[str]]:
    """The model that transformers makes of its configuration and tensors, then the parameters that are missing and
    those of another shape.
    """
    config = read_config(folder, **_head(folder, task))
    generation = read_json(folder, "generation_config.json") if (folder / "generation_config.json").is_file() else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model, found = _model_class(config, task).from_pretrained(
                None,
                config=config,
                # Without quantised weights, at which the loader would stumble before _check_types can name them.
                state_dict={name: tensor for name, tensor in tensors.items() if _type_of(tensor) in LOADABLE_TYPES},
                generation_config=generation and transformers.GenerationConfig.from_dict(without_code(generation)),
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=task.head == "private",  # an owner's head may have more labels than the base's
            )
        except ModelError:
            raise
        except Exception as error:  # a broken folder can make the loader raise anything
            reason, hint = first_line(error), DOWNLOAD_AGAIN
            if "ignore_mismatched_sizes" in reason:
                reason, hint = (
                    "its head, or another weight, has another shape",
                    ("check that task.labels fit this model; for a new head, save it without one (AutoModel)"),
                )
            raise _cannot_be_loaded(folder, task, reason, hint) from None
    return model, set(found["missing_keys"]), {key for key, *_ in found["mismatched_keys"]}


def _cannot_be_loaded(folder: Path, task: Task, reason: str, hint: str) -> ModelError:
    with_labels = f" with {len(task.labels)} labels" if task.has_labels else ""
    return ModelError(f"model {folder}: cannot be loaded for {task.kind}{with_labels}: {reason}", hint=hint)


def _head(folder: Path, task: Task) -> dict[str, Any]:
    """What a configuration says of the task's labels, and of what the head is for, which decides the loss.

    A configuration may say nothing of a head for one label, and one without a head may say what a former one was for.
    """
    named = read_json(folder, "config.json").get("problem_type")
    has_one = task.problem_type == "single_label_classification"
    problem_type = task.problem_type if named == task.problem_type or not has_one else None
    labels = dict(enumerate(task.labels))
    names = {"id2label": labels, "label2id": {name: index for index, name in labels.items()}} if task.has_labels else {}
    return {"problem_type": problem_type, **names}


def _model_class(config: Any, task: Task) -> Any:
    """The class of transformers for this configuration and task. Raises an error if there is none."""
    from transformers.models.auto.auto_factory import _get_model_class

    return _get_model_class(config, getattr(transformers, AUTO_CLASSES[task.kind])._model_mapping)


def _check_types(model: PreTrainedModel, tensors: Mapping[str, Tensor | _Unread], folder: Path) -> None:
    """Raise ModelError if a parameter is stored as integers: quantised weights mean nothing without their scales."""
    body = f"{model.base_model_prefix}."
    parameters = {name.removeprefix(body) for name in parameter_shapes(model)}
    for name, tensor in tensors.items():
        kind = _type_of(tensor)
        if name.removeprefix(body) in parameters and kind not in FLOAT_TYPES:
            raise ModelError(
                f"model {folder}: {name} is stored as {kind}; weights must be floating-point numbers "
                f"({', '.join(FLOAT_TYPES)})",
                hint="save the model without quantisation",
            )


def _type_of(tensor: Tensor | _Unread) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _check_finite(model: nn.Module, folder: Path) -> None:
    for name, parameter in model.named_parameters():
        if not is_finite(parameter):
            raise ModelError(
                f"model {folder}: parameter {name} holds a number that is not finite",
                hint="its training diverged; train it anew, or download it again",
            )
