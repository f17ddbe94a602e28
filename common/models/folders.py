"""Hugging Face folders: where a model is, its configuration, its labels, its tokenizer."""

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from common.agreement import Agreement
from common.errors import ModelError, first_line
from common.models.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_adapter

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "*.model")


HUB_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "README.md"]  # the card names the licence


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
    config = read_config(folder)
    return tuple(str(config.id2label[index]) for index in sorted(config.id2label))


def named_labels(folder: Path) -> tuple[str, ...]:
    """`base_labels`, or none where the configuration only numbers them, of an adapter, which has none, and of a body
    saved without its head (AutoModel), whose configuration still tells the labels that it had.
    """
    if is_adapter(folder):
        return ()
    architectures = read_config(folder).architectures
    if architectures and not any("For" in architecture for architecture in architectures):
        return ()
    labels = base_labels(folder)
    return () if all(label.startswith("LABEL_") for label in labels) else labels


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


def read_config(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model {folder}: its config.json cannot be used: {first_line(error)}") from None


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
