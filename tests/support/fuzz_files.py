"""Coverage-guided fuzzing of what is read from files: `python -m tests.support.fuzz_files -max_total_time=60`.

Whatever a file holds: reading it gives a value, or one of our errors, whose message is one line.
"""

import io
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris
import numpy as np
from PIL import Image

with atheris.instrument_imports(
    include=[
        "client.data.chat",
        "common.data.files",
        "common.data.images",
        "common.models.files",
        "common.settings_file",
    ]
):
    from client.data.chat import write_out
    from common.data.files import read_arrays, read_columns
    from common.data.images import ImageFile, processed
    from common.models.files import read_json, read_tensors, weight_files, without_code
    from common.settings_file import parse_settings, read_toml

from client.settings import OwnerSettings
from common.agreement import AgreementDraft
from common.errors import AmalgramError
from common.identity import read_identity, read_public_identity
from common.models.folders import load_image_processor, read_config
from deploy.example.reviews import make_tokenizer

FOLDER = Path(tempfile.mkdtemp(prefix="amalgram-fuzz-"))
TOKENIZER = make_tokenizer()
TOKENIZER.chat_template = "{% for turn in messages %}{{ turn.role }} {{ turn.content }} {% endfor %}"
PROCESSOR = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}


def image_file(form: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(file, form)
    return file.getvalue()


IMAGES = [image_file(form) for form in ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF")]


def written(name: str, content: bytes) -> Path:
    path = FOLDER / name
    path.write_bytes(content)
    path.chmod(0o600)
    return path


def read_settings(data: bytes) -> None:
    tables = read_toml(written("a.toml", data))
    for kind in (AgreementDraft, OwnerSettings):
        parse_settings(tables, kind, "a.toml")


def read_model_config(data: bytes) -> None:
    """The data as a configuration, or as what one key of a whole configuration is changed to."""
    written("config.json", data)
    without_code(read_json(FOLDER, "config.json"))
    read_config(FOLDER)


def read_changed_config(data: bytes) -> None:
    provider = atheris.FuzzedDataProvider(data)
    key = provider.PickValueInList(["hidden_size", "id2label", "hidden_act", "layer_types", "dtype", "rope_scaling"])
    value = provider.PickValueInList([None, -1, 1e400, {}, [], "x", {"a": 1}, [[]], True, provider.ConsumeUnicode(20)])
    kind = provider.PickValueInList(["bert", "llama", "t5", "clip", "vit", "gpt2"])
    read_model_config(json.dumps({"model_type": kind, key: value}).encode())


def read_weights(data: bytes) -> None:
    list(read_tensors(written("model.safetensors", data)))


def read_index(data: bytes) -> None:
    (FOLDER / "model.safetensors").unlink(missing_ok=True)
    written("model.safetensors.index.json", data)
    weight_files(FOLDER)


def read_spoiled_image(data: bytes) -> None:
    """A whole image, of which the data replaces a part."""
    provider = atheris.FuzzedDataProvider(data)
    whole = provider.PickValueInList(IMAGES)
    start = provider.ConsumeIntInRange(0, len(whole) - 1)
    part = provider.ConsumeBytes(100)
    ImageFile("a", whole[:start] + part + whole[start + len(part) :]).pixels()


def prepare_image(data: bytes) -> None:
    """With an image processor of which one key is changed."""
    provider = atheris.FuzzedDataProvider(data)
    keys = [
        "size",
        "resample",
        "image_mean",
        "image_std",
        "rescale_factor",
        "image_processor_type",
        "do_pad",
        "crop_size",
    ]
    values = [None, -1, 1e400, 0, {}, [], "x", {"height": -1, "width": 1 << 40}, [0, 0, 0], provider.ConsumeUnicode(20)]
    changed = {provider.PickValueInList(keys): provider.PickValueInList(values)}
    written("config.json", b'{"model_type": "vit"}')
    written("preprocessor_config.json", json.dumps(PROCESSOR | changed).encode())
    processor = load_image_processor(FOLDER)
    assert processor is not None
    processed(processor, ImageFile("a", IMAGES[0]).pixels(), (3, 8, 8))


def read_conversation(data: bytes) -> None:
    (values,) = read_columns(written("a.jsonl", data), ["messages"], 5).values()
    write_out(Path("a"), [values], TOKENIZER)


READERS: tuple[Callable[[bytes], object], ...] = (
    read_settings,
    read_model_config,
    read_changed_config,
    read_weights,
    read_index,
    *(
        lambda data, end=end: read_columns(written(f"a{end}", data), ["a"], 5)
        for end in (".jsonl", ".json", ".csv", ".tsv.gz", ".parquet", ".arrow")
    ),
    lambda data: read_columns(written("a.txt", data), ["words", "tags"], 5),
    lambda data: read_arrays(written("a.npz", data), ["a"], 5),
    lambda data: ImageFile("a", data).pixels(),
    read_spoiled_image,
    prepare_image,
    read_conversation,
    lambda data: read_identity(written("a.key", data)),
    lambda data: read_public_identity(written("a.pub", data)),
)


def read_anything(data: bytes) -> None:
    if data:
        try:
            READERS[data[0] % len(READERS)](data[1:])
        except AmalgramError as error:
            if len(error.message.splitlines()) != 1:
                raise AssertionError(error.message) from error


if __name__ == "__main__":
    atheris.Setup(sys.argv, read_anything)
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)
