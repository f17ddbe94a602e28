"""The manifest of a base model: the SHA-256 of every file that decides how rows are read, as `sha256sum` prints it.

Weights are not among these files; the base digest covers them as loaded (loading.py). The configuration is taken as it
is, to the byte: transformers chooses the tokenizer by `_name_or_path` and `transformers_version` too.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common.errors import ModelError
from common.models.files import digest_of_file, inside, read_json, without_code
from common.settings_file import Digest, FileName, Settings

# Every file that some tokenizer of transformers reads, what people read to prepare images, and how a model generates,
# which is published as it is.
READ = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*.jinja", "*processor_config.json", "vocab*", "*vocab.json", "merges.txt", "*.model",
    "*.spm", "*.tokenizer", "*.tiktoken", "tekken.json", "bpe.codes", "dict.txt", "normalizer.json", "emoji.json",
    "byte_maps.json", "word_*.json",
)  # fmt: skip
CONFIGURATIONS = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")


class BaseFile(Settings):
    """One file of the manifest."""

    name: FileName
    sha256: Digest


Manifest = tuple[BaseFile, ...]


def manifest_of(folder: Path) -> Manifest:
    """The manifest of the base in a folder, in the order of the names.

    Raises ModelError if its configuration sends the reader to other files, which no manifest covers.
    """
    if "configuration_files" in read_json(folder, "config.json"):  # check: configuration-is-the-listed-file
        raise ModelError(
            f"model {folder}: its config.json sets configuration_files, so that another file would be read",
            hint="delete this key from config.json",
        )
    return tuple(
        BaseFile(name=path.relative_to(folder).as_posix(), sha256=digest_of_file(path)) for path in files_read(folder)
    )


def check_manifest(folder: Path, agreed: Manifest) -> None:
    """Raise ModelError, which names the first file that differs, unless the folder's manifest is the agreed one."""
    own = {file.name: file.sha256 for file in manifest_of(folder)}
    wanted = {file.name: file.sha256 for file in agreed}
    for name in sorted(own.keys() | wanted.keys()):
        if own.get(name) != wanted.get(name):  # check: base-files-are-the-agreed-ones
            raise ModelError(
                f"model {folder}: {name} is not the agreed file; its SHA-256 is {_beginning(own.get(name))}, the "
                f"agreement's is {_beginning(wanted.get(name))}",
                hint="get the base model that the agreement names, in the agreed version, and add no file to it",
            )


@contextmanager
def only_files_read(folder: Path) -> Iterator[Path]:
    """A temporary folder with copies of the files that a manifest lists, for loading a tokenizer or image processor.

    It cannot read any other file: there is none beside these, and names of further files are left out of the
    configurations. So the manifest is complete, whatever transformers looks for.
    """
    with TemporaryDirectory(prefix="amalgram-") as room:
        for path in files_read(folder):
            copy = Path(room) / path.relative_to(folder)
            copy.parent.mkdir(exist_ok=True)
            if path.name in CONFIGURATIONS:
                copy.write_text(json.dumps(_without_file_names(without_code(read_json(folder, path.name)))))
            else:
                shutil.copyfile(path, copy)
        yield Path(room)


def files_read(folder: Path) -> list[Path]:
    """The files in a model folder that decide how rows are read, in the order of their names."""
    found = {path for pattern in READ for path in folder.glob(pattern) if path.is_file()}
    return [inside(folder, path.relative_to(folder).as_posix()) for path in sorted(found)]


def _without_file_names(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_file_names(each)
            for key, each in value.items()
            if not key.endswith(("_file", "_files"))  # check: configurations-name-no-files
        }
    return [_without_file_names(each) for each in value] if isinstance(value, list) else value


def _beginning(digest: str | None) -> str:
    return "none (there is no such file)" if digest is None else f"{digest[:16]}..."
