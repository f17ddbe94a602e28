"""Files of a model folder, which somebody else wrote: nothing outside the folder is read, and nothing but data is.

Weights come from safetensors only, because loading a pickle runs whatever code it holds. Of configurations, only keys
that describe a model are used. Keys that name code, files, or an implementation to fetch never reach a library.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError, safe_open

from common.errors import ModelError, first_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHTS_NAME = re.compile(r"[\w.-]+\.safetensors")
MAX_JSON_BYTES = 16_000_000
DOWNLOAD_AGAIN = "save the model again, or download it again; the file may be damaged or incomplete"
# Keys that name code, another model, a file or an implementation, at any depth of a configuration.
NAMES_CODE = frozenset({
    "attn_implementation", "auto_map", "backbone", "backbone_kwargs", "code_revision", "custom_generate",
    "custom_pipelines", "distributed_config", "dtype", "experts_implementation", "extra_config_files", "extra_files",
    "fusion_config", "kernel_config", "quantization_config", "torch_dtype", "transformers_weights",
    "trust_remote_code", "use_kernels", "use_pretrained_backbone", "use_timm_backbone",
})  # fmt: skip


def inside(folder: Path, name: str) -> Path:
    """The file `name` of a model folder. Raises ModelError if it is missing, or a link that leads out of the folder."""
    path = folder / name
    root = folder.resolve()
    if root.parent.name == "snapshots":  # the hub's cache, whose snapshots link to ../../blobs
        root = root.parent.parent
    if not path.is_file():
        raise ModelError(f"model {folder}: has no file {name}", hint=DOWNLOAD_AGAIN)
    if not path.resolve().is_relative_to(root):  # check: model-files-are-inside
        raise ModelError(
            f"model {folder}: {name} leads to {path.resolve()}, outside the folder",
            hint="copy the file into the folder",
        )
    return path


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of a model folder. Raises ModelError if it is missing, too large, too deep or something else."""
    path = inside(folder, name)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
        if len(content) > MAX_JSON_BYTES:  # check: configurations-are-bounded
            raise ValueError(f"more than {MAX_JSON_BYTES} bytes")
        values = json.loads(content)
        if not isinstance(values, dict):
            raise ValueError(f"{type(values).__name__}, not a JSON object")
    except RecursionError:
        raise ModelError(f"model {folder}: its {name} cannot be used: nested too deeply", hint=DOWNLOAD_AGAIN) from None
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model {folder}: its {name} cannot be used: {first_line(error)}", hint=DOWNLOAD_AGAIN
        ) from None
    return values


@contextmanager
def refused_as(what: str, hint: str) -> Iterator[None]:
    """Within, whatever a library raises at somebody else's file becomes a ModelError: "`what`: first line"."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # what is wrong with the file decides what is raised
        raise ModelError(f"{what}: {first_line(error)}", hint=hint) from None


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def without_code(values: Any) -> Any:
    """A configuration without the keys that name code, at any depth."""
    if isinstance(values, dict):
        return {
            key: without_code(value)
            for key, value in values.items()
            if key.lstrip("_").removesuffix("_internal") not in NAMES_CODE  # check: configurations-name-no-code
        }
    return [without_code(value) for value in values] if isinstance(values, list) else values


# --- weights ---


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights: one, or those that an index names. Raises ModelError."""
    if not (folder / INDEX).is_file() or (folder / WEIGHTS).is_file():
        return [inside(folder, WEIGHTS)]
    files = read_json(folder, INDEX).get("weight_map")
    names = set(map(str, files.values())) if isinstance(files, dict) else set()
    for name in names or {""}:
        if WEIGHTS_NAME.fullmatch(name) is None:  # check: an-index-names-safetensors
            raise ModelError(
                f"model {folder}: its {INDEX} names the file {name!r}; weights are files of the folder that end with "
                ".safetensors",
                hint="save it again with a current transformers (save_pretrained), which writes safetensors",
            )
    return [inside(folder, name) for name in sorted(names)]


def weight_bytes(*folders: Path) -> int:
    """How large the weights in a folder are; of several folders, the largest. Raises ModelError."""
    return max(sum(path.stat().st_size for path in weight_files(folder)) for folder in folders)


def check_readable(folder: Path) -> None:
    """Raise ModelError unless the headers of a whole model's weights fit their files. No weight is read."""
    for path in weight_files(folder):
        with _opened(path, "numpy"):
            pass


def tensor_names(path: Path) -> list[str]:
    """The names of the tensors in one safetensors file; none of them is read. Raises ModelError."""
    with _opened(path, "numpy") as file:
        return list(file.keys())


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of one safetensors file, mapped from it. Raises ModelError."""
    with _opened(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            yield name, file.get_tensor(name)


def read_tensor(path: Path, name: str, dtype: torch.dtype) -> Tensor:
    """One tensor of a safetensors file, mapped from it unless it has another type there. Raises ModelError."""
    with _opened(path, "pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor.to(dtype)


def file_state(path: Path) -> tuple[int, ...]:
    """What tells whether a file, or what a link leads to, is still the same, as far as it takes no reading. Anybody can
    set its times except the last one, which the system notes with every change.
    """
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns  # check: changes-show


@contextmanager
def _opened(path: Path, framework: Literal["numpy", "pt"]) -> Iterator[Any]:
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except (OSError, SafetensorError, MemoryError) as error:
        raise ModelError(f"model {path}: cannot be read: {first_line(error)}", hint=DOWNLOAD_AGAIN) from None
