"""Hugging Face model folders: where a model is, its configuration, its labels, and what prepares rows for it.

Weights are not loaded.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import fields
from functools import cache, lru_cache
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from common.agreement import Agreement, Task, TaskKind
from common.agreement.tables import LANGUAGE_MODELLING
from common.errors import ModelError
from common.models.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_adapter
from common.models.files import DOWNLOAD_AGAIN, digest_of_file, read_json, refused_as, without_code
from common.models.manifest import READ, check_manifest, files_read, only_files_read
from common.text import alike, as_line

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase

HUB_PATTERNS = [*READ, "*.json", "*.safetensors", "README.md"]  # the model card names the licence
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "*.model")
# Keys that a configuration class reads although it does not declare them.
LEGACY_KEYS = ("num_labels", "original_max_position_embeddings", "partial_rotary_factor", "rope_scaling", "rope_theta")
# How a library runs a model: what it keeps for training, and what it wraps outputs in.
NOT_ABOUT_THE_MODEL = ("gradient_checkpointing", "return_dict")
NEW_HEAD = "for a new head, save the model without one (AutoModel), and its tokenizer, and name that as the base"
ANOTHER_TASK = (
    "it was fine-tuned for another task: name a model with the agreed labels, or agree on its own (task.labels); if "
    "the base has a head for others, save the base without it (AutoModel), and its tokenizer"
)
ANOTHER_BASE = "name a model that was fine-tuned from the agreed base"
MORE_TOKENS = (
    f"{ANOTHER_BASE}; if all owners added the same tokens, agree on a base that has them (tokenizer.add_tokens, "
    "model.resize_token_embeddings, save both)"
)
SAVE_THE_TOKENIZER = "save it into this folder: AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained(FOLDER)"
PREDICTS: dict[str, str] = {  # what a head is for, by problem_type
    "single_label_classification": "one label for each row",
    "multi_label_classification": "several labels a row",
    "regression": "regression",
}
SIZES = ("hidden_size", "num_hidden_layers", "d_model", "num_layers", "n_embd", "n_layer", "vocab_size")  # of a body
KINDS: dict[str, TaskKind] = {  # by the end of the name of a model class of transformers
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForConditionalGeneration": "sequence-to-sequence",
}
CHECKPOINT = re.compile(r"^checkpoint-([0-9]{1,12})$")
MOST_SIDE, LEAST_CROP = 8192, 0.1  # pixels; the part of an image that is cut out once it is enlarged
WRAPPERS = ("timm_wrapper",)  # model types whose code is another library's, chosen by a name in the configuration

BaseOrigin = Literal["hub", "own folder", "folder of the drafter"]

# --- where a model is ---


def model_folder(location: str, relative_to: Path, revision: str | None = None) -> Path:
    """The folder of a model that is given as a path or a hub name. Paths are relative to a settings file's folder.

    `revision`: the commit that is fetched from the hub.
    """
    folder = _find_folder(location, relative_to, revision)
    # transformers would load the adapter too, or another base that the adapter names.
    if is_adapter(folder):
        raise ModelError(
            f"model {folder}: holds an adapter ({ADAPTER_CONFIG}); a base is a whole model",
            hint="name the model that the adapter was trained on",
        )
    _check_files(folder, "config.json", "*.safetensors")
    return folder


def fine_tuned_folder(location: str, relative_to: Path) -> Path:
    """Like `model_folder`, for an owner's fine-tuned model, which may also be a LoRA adapter of the base."""
    folder = _find_folder(location, relative_to)
    if not is_adapter(folder):
        return model_folder(location, relative_to)
    if any(folder.glob("model*.safetensors")):
        raise ModelError(
            f"model {folder}: holds a whole model and an adapter ({ADAPTER_CONFIG})",
            hint="keep one of them in this folder and move the other",
        )
    _check_files(folder, ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    return folder


def base_model_folder(own_copy: str | None, home: Path, agreement: Agreement, agreement_path: Path) -> Path:
    """A party's own copy of the base model (relative to its settings in `home`), or the base that is agreed.

    Raises ModelError unless every file that decides how rows are read is the agreed one.
    """
    location = agreement.base if own_copy is None else own_copy
    revision = agreement.base_revision if location == agreement.base else None
    folder = model_folder(location, agreement_path.parent if own_copy is None else home, revision)
    check_manifest(folder, agreement.base_files)  # check: base-files-are-checked
    return folder


def base_origin(own_copy: str | None, home: Path, agreement: Agreement, agreement_path: Path) -> BaseOrigin:
    """Where `base_model_folder` finds this party's copy."""
    if own_copy is not None and _local(own_copy, home).exists():
        return "own folder"
    if own_copy is None and _local(agreement.base, agreement_path.parent).exists():
        return "folder of the drafter"
    return "hub"


def hub_revision(folder: Path) -> str | None:
    """The commit of a model that was fetched from the hub, into its cache; None for any other folder."""
    *_, repository, snapshots, commit = ("", "", *folder.parts)
    is_fetched = repository.startswith("models--") and snapshots == "snapshots" and len(commit) == 40
    return commit if is_fetched else None


def _local(location: str, relative_to: Path) -> Path:
    return Path(location) if Path(location).is_absolute() else relative_to / location


def _find_folder(location: str, relative_to: Path, revision: str | None = None) -> Path:
    folder = _local(location, relative_to)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"model {location}: {folder} is not a folder", hint="name a Hugging Face model folder")
    return _fetch_from_hub(location, folder, revision)


def _fetch_from_hub(name: str, missing_folder: Path, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_PATTERNS))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError):
        raise ModelError(
            f"model {name}: there is no folder {missing_folder}, and no model of this name"
            f"{f' (commit {revision})' if revision else ''} could be fetched from the hub",
            hint="check the spelling, or download the model and name its folder",
        ) from None


def _check_files(folder: Path, config: str, weights: str) -> None:
    if not (folder / config).is_file():
        raise ModelError(f"model {folder}: has no {config}", hint=_which_folder(folder))
    if any(folder.glob(weights)):
        return
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise ModelError(
            f"model {folder}: holds pickled weights only, and loading a pickle runs its code",
            hint="save it again with a current transformers (save_pretrained), which writes model.safetensors",
        )
    raise ModelError(f"model {folder}: holds no weights ({weights})", hint=DOWNLOAD_AGAIN)


def _which_folder(folder: Path) -> str:
    """What to name instead of a folder without a model: one of its checkpoints, if a Trainer wrote it."""
    checkpoints = {
        int(found[1]): path for path in folder.glob("checkpoint-*") if (found := CHECKPOINT.search(path.name))
    }
    if not checkpoints:
        return "name a Hugging Face model folder"
    last = checkpoints[max(checkpoints)]
    with suppress(ModelError):
        best = read_json(last, "trainer_state.json").get("best_model_checkpoint")
        named = [path for path in checkpoints.values() if isinstance(best, str) and path.name == Path(best).name]
        if named:
            return f"a Trainer wrote this folder; name its best checkpoint: {named[0]}"
    return f"a Trainer wrote this folder; name a checkpoint, for example the last: {last}"


# --- configuration and labels ---


def read_config(folder: Path, **changes: Any) -> Any:
    """The configuration in a model folder, with `changes`. Only keys that describe a model of its type are used."""
    from transformers import CONFIG_MAPPING

    values = read_json(folder, "config.json")
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING or kind in WRAPPERS:  # check: code-is-of-transformers
        raise ModelError(
            f"model {folder}: its model_type {kind!r:.60} is none of transformers' own",
            hint="only models whose code is part of transformers are loaded",
        )
    with refused_as(f"model {folder}: its config.json cannot be used", DOWNLOAD_AGAIN):
        config_class = CONFIG_MAPPING[kind]
        return config_class(**_describing(without_code(values), config_class) | changes)


def _describing(values: dict[str, Any], config_class: type) -> dict[str, Any]:
    """The keys of a configuration that its class declares, or that the models of this type read; and numbers."""
    known = _known_keys(config_class)
    return {
        key: value
        for key, value in values.items()
        if key not in ("model_type", *NOT_ABOUT_THE_MODEL)
        and (key in known or isinstance(value, int | float))  # check: configurations-describe-models
    }


@cache
def _known_keys(config_class: Any) -> frozenset[str]:
    declared = {field.name for field in fields(config_class)} | set(config_class.attribute_map)
    models = find_spec(config_class.__module__.replace(".configuration_", ".modeling_"))
    read = re.findall(r"\w+", Path(models.origin).read_text()) if models and models.origin else []
    return frozenset({*declared, *signature(config_class.__init__).parameters, *read, *LEGACY_KEYS})


def base_labels(folder: Path) -> tuple[str, ...]:
    """The labels that a model's configuration names, in order; two numbered ones if it names none."""
    named = read_json(folder, "config.json").get("id2label", {0: "LABEL_0", 1: "LABEL_1"})
    try:
        by_number = {int(number): label for number, label in named.items()}
    except (AttributeError, TypeError, ValueError):
        raise ModelError(
            f"model {folder}: its config.json cannot be used: id2label is not a table of numbered labels",
            hint=DOWNLOAD_AGAIN,
        ) from None
    return tuple(as_line(str(by_number[number])) for number in sorted(by_number))


def named_labels(folder: Path) -> tuple[str, ...]:
    """`base_labels`, or () if the model has no labels of its own.

    It has none if it is an adapter, or if its configuration only numbers them. A body that was saved without its head
    (AutoModel) has none either, although its configuration still lists those of the head.
    """
    if is_adapter(folder):
        return ()
    if _is_headless(folder):
        return ()
    labels = base_labels(folder)
    return () if all(label.startswith("LABEL_") for label in labels) else labels


def _is_headless(folder: Path) -> bool:
    """Whether a model was saved without its head (AutoModel)."""
    named = _architectures(folder)
    return bool(named) and not any("For" in architecture for architecture in named)


def check_base_labels(folder: Path, task: Task) -> None:
    """Raise ModelError unless the labels that the base names, if any, are the agreed ones, or heads are private."""
    if task.head == "shared":
        _check_labels(folder, task, if_others=NEW_HEAD)


def _check_problem_type(folder: Path, task: Task) -> None:
    """Raise ModelError for a head that predicts something else than is agreed. Many configurations do not say what."""
    named = read_json(folder, "config.json").get("problem_type")
    if named in PREDICTS and named != task.problem_type and not _is_headless(folder):
        raise ModelError(
            f"model {folder}: has a head for {PREDICTS[named]}; what is judged here is {PREDICTS[task.problem_type]}",
            hint=f"agree on a base with a head for {'numbers' if task.is_regression else 'labels'}, or on one without "
            f'a head (AutoModel); or agree on task.problem_type = "{named}"',
        )


def _check_labels(folder: Path, task: Task, if_others: str) -> None:
    """Raise ModelError unless the labels that a model names, if any, are the agreed ones in the agreed order.

    `if_others`: the hint for labels that are not the agreed ones in any order.
    """
    if task.has_labels and not is_adapter(folder):
        _check_problem_type(folder, task)
    labels = named_labels(folder)
    if not task.has_labels or labels == task.labels:
        return
    if not labels:
        # The head of a model that only numbers its labels has one output for each.
        count = len(base_labels(folder)) if not is_adapter(folder) and kind_of(folder) == task.kind else None
        if count not in (None, len(task.labels)):
            raise ModelError(
                f"model {folder}: has {count} labels, the agreement {len(task.labels)}: {list(task.labels)}",
                hint=if_others,
            )
        return
    raise ModelError(
        f"model {folder}: its labels are {list(labels)}, the agreement's are {list(task.labels)}",
        hint=how_to_match(labels, task.labels) or if_others,
    )


def how_to_match(labels: tuple[str, ...], agreed: tuple[str, ...]) -> str:
    """What to do about a model whose labels are the agreed ones in another order or spelling; empty for others."""
    if sorted(labels) == sorted(agreed):
        return (
            "these are the same labels in another order: put the rows of its classifier and the id2label of its "
            "config.json in the agreed order, or train it again with that order"
        )
    if [alike(label) for label in labels] == [alike(label) for label in agreed]:
        return "these are the same labels, spelt differently: write them in its config.json (id2label) as agreed"
    return ""


def check_has_head(folder: Path, task: Task) -> None:
    """Raise ModelError if the configuration of a model names a class that is not made for any of our tasks."""
    if _architectures(folder) and kind_of(folder) is None:
        raise ModelError(
            f"model {folder}: has no head for {task.kind}: its config.json names {_architectures(folder)[0]:.60}",
            hint=f"name a model that was fine-tuned for {task.kind}",
        )


def has_tokenizer(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES)


def check_made_for(folder: Path, task: Task) -> None:
    """Raise ModelError if the configuration of an owner's model names a class for another task, or other labels."""
    if is_adapter(folder):
        return
    kind = kind_of(folder)
    # Some models that read images and write text are loaded as plain language models.
    if kind in (None, task.kind) or (kind in LANGUAGE_MODELLING and not task.has_labels):
        _check_labels(folder, task, if_others=ANOTHER_TASK)
        return
    raise ModelError(
        f"model {folder}: its config.json names {_architectures(folder)[0]:.60}, a model for {kind}; the task is "
        f"{task.kind}",
        hint=f"name a model that was fine-tuned for {task.kind}",
    )


def kind_of(folder: Path) -> TaskKind | None:
    """What a model was made for, by the class that its configuration names; None for another task than ours."""
    (named, *_) = (*_architectures(folder), "")
    return next((kind for ending, kind in KINDS.items() if named.endswith(ending)), None)


def check_same_architecture(folder: Path, base_folder: Path) -> None:
    """Raise ModelError if an owner's whole model is of another type or size than the base, by their configurations."""
    if is_adapter(folder):
        return
    configs = [read_json(each, "config.json") for each in (folder, base_folder)]
    for key in ("model_type", *SIZES):
        own, agreed = (config.get(key) for config in configs)
        if None not in (own, agreed) and own != agreed:
            raise ModelError(
                f"model {folder}: its {key} is {own!r:.60}, that of the base {base_folder} is {agreed!r:.60}",
                hint=MORE_TOKENS if key == "vocab_size" else ANOTHER_BASE,
            )


def _architectures(folder: Path) -> list[str]:
    """The classes that a model's configuration names."""
    named = read_json(folder, "config.json").get("architectures")
    return [str(each) for each in named] if isinstance(named, list) else []


def image_shape(config: Any) -> tuple[int, int, int]:
    """(channels, height, width) of the images that a model takes. CLIP's configuration keeps them in vision_config."""
    vision = getattr(config, "vision_config", config)
    if not hasattr(vision, "image_size") or not hasattr(vision, "num_channels"):
        raise ModelError(
            f"model of type {config.model_type}: its config.json names no image_size or no num_channels",
            hint="use a base model whose configuration gives the size of its images",
        )
    size = vision.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return vision.num_channels, height, width


# --- what prepares rows ---


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model folder, made from the files that a manifest lists and from no others.

    One without a padding token pads with its end-of-text token. Nobody may change it. Raises ModelError if the folder
    has none, or one that knows no words.
    """
    with refused_as(f"model {folder}: its tokenizer cannot be loaded", DOWNLOAD_AGAIN):
        tokenizer = _tokenizer(folder, tuple((path, digest_of_file(path)) for path in files_read(folder)))
    # Without files, transformers makes one of the model's type that reads every word as unknown, or as nothing.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ModelError(f"model {folder}: its tokenizer has no vocabulary", hint=SAVE_THE_TOKENIZER)
    return tokenizer


@lru_cache(maxsize=4)
def _tokenizer(folder: Path, contents: tuple[tuple[Path, str], ...]) -> PreTrainedTokenizerBase:
    """`contents`: the files and their digests as they are now, so that no others are taken from the cache."""
    from transformers import AutoTokenizer

    with only_files_read(folder) as files:
        tokenizer = AutoTokenizer.from_pretrained(files, local_files_only=True, trust_remote_code=False)
    tokenizer.name_or_path = str(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_image_processor(folder: Path) -> BaseImageProcessor | None:
    """What prepares images for the model in a folder, made from the files that a manifest lists and from no others.

    None if the folder has no preprocessor_config.json.
    """
    from transformers import AutoImageProcessor

    if not (folder / "preprocessor_config.json").is_file():
        return None
    _check_sides(folder)
    refused = refused_as(f"model {folder}: its image processor cannot be loaded", DOWNLOAD_AGAIN)
    with refused, only_files_read(folder) as files:
        processor: BaseImageProcessor = AutoImageProcessor.from_pretrained(
            files, backend="pil", local_files_only=True, trust_remote_code=False
        )
    return processor


def _check_sides(folder: Path) -> None:
    """Raise ModelError if images would be enlarged beyond what any model takes: that happens in memory."""
    values = read_json(folder, "preprocessor_config.json")
    for key in ("size", "crop_size", "pad_size"):
        named = values.get(key)
        sides = named.values() if isinstance(named, dict) else named if isinstance(named, list) else [named]
        if any(isinstance(side, int | float) and side > MOST_SIDE for side in sides):  # check: image-sides-are-bounded
            raise ModelError(
                f"model {folder}: its preprocessor_config.json has {key} = {named!r:.60}, at most {MOST_SIDE} pixels a "
                "side make sense",
                hint=DOWNLOAD_AGAIN,
            )
    part = values.get("crop_pct")
    if isinstance(part, int | float) and part < LEAST_CROP:  # check: image-crops-are-bounded
        raise ModelError(
            f"model {folder}: its preprocessor_config.json has crop_pct = {part!r:.60}, at least {LEAST_CROP:g} makes "
            "sense",
            hint=DOWNLOAD_AGAIN,
        )


def check_tokenizer(folder: Path, base_folder: Path) -> None:
    """Raise ModelError if `folder` has a tokenizer whose vocabulary differs from the base's. The base's is used."""
    if not has_tokenizer(folder):
        return
    own, agreed = load_tokenizer(folder).get_vocab(), load_tokenizer(base_folder).get_vocab()
    differing = sorted(own.items() ^ agreed.items(), key=lambda item: (item[1], item[0]))
    if differing:
        token = differing[0][0]
        raise ModelError(
            f"model {folder}: its tokenizer has {len(own)} tokens, the base's {len(agreed)}; the first that differs is "
            f"{token[:40]!r}, number {own.get(token, 'none')} here and {agreed.get(token, 'none')} in the base",
            hint=MORE_TOKENS
            if own.items() > agreed.items()
            else "fine-tune with the base's tokenizer, which is the one that reads the rows",
        )
