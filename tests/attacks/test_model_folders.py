"""A model folder that somebody else wrote names pickles, other files or code: none of it is read, fetched or run."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from common.agreement import Task
from common.errors import ModelError
from common.models.adapter import with_adapter
from common.models.files import INDEX, MAX_JSON_BYTES, WEIGHTS
from common.models.folders import load_tokenizer, read_config
from common.models.loading import digest_of, load_base
from deploy.example import reviews
from tests.support.adapters import write_adapter
from tests.support.models import tiny_bert

TASK = Task(labels=("a", "b", "c"))


@pytest.fixture
def folder(bert_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bert_folder, tmp_path / "model"))


class Poison:
    """A pickle that leaves a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def change(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def name_in_index(folder: Path, name: str) -> None:
    """Put the weights where an index says that they are."""
    (folder / WEIGHTS).rename(folder / name)
    tensors = load_file(folder / name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}))


@pytest.mark.parametrize("name", ["../stolen.safetensors", "{parent}/stolen.safetensors", "sub/../../x.safetensors"])
def test_92_an_index_names_files_outside_the_folder(name: str, folder: Path) -> None:
    (folder / "sub").mkdir()
    name_in_index(folder, name.format(parent=folder.parent))
    (folder / "part.safetensors").write_bytes(b"")  # a folder without any has no weights at all
    with pytest.raises(ModelError, match="weights are files of the folder"):
        load_base(folder, TASK, seed=0)


def test_92_an_index_names_a_pickle(folder: Path) -> None:
    marker = folder.parent / "ran"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Poison(marker)))
    name_in_index(folder, "part.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"a": "pytorch_model.bin"}}))
    with pytest.raises(ModelError, match=r"names the file 'pytorch_model\.bin'"):
        load_base(folder, TASK, seed=0)
    assert not marker.exists()


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json", "part.safetensors"])
def test_92_a_file_of_the_folder_is_a_link_that_leads_out(name: str, folder: Path) -> None:
    if name == "part.safetensors":
        name_in_index(folder, name)
    (folder / name).rename(folder.parent / "private")
    (folder / name).symlink_to("../private")
    with pytest.raises(ModelError, match="outside the folder"):
        load_base(folder, TASK, seed=0), load_tokenizer(folder)


def test_92_links_of_the_hub_s_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--tiny" / "snapshots" / "0123"
    shutil.copytree(folder, snapshot)
    (tmp_path / "models--tiny" / "blobs").mkdir()
    (snapshot / WEIGHTS).rename(tmp_path / "models--tiny" / "blobs" / "ab")
    (snapshot / WEIGHTS).symlink_to("../../blobs/ab")
    assert digest_of(load_base(snapshot, TASK, 0), TASK) == digest_of(load_base(folder, TASK, 0), TASK)


NAMED = "stranger/code"
CODE: dict[str, object] = {
    "attn_implementation": NAMED,
    "_attn_implementation": NAMED,
    "_attn_implementation_internal": NAMED,
    "experts_implementation": NAMED,
    "auto_map": {"AutoConfig": f"{NAMED}--configuration.Config", "AutoModel": f"{NAMED}--modeling.Model"},
    "transformers_weights": "../stranger/code.safetensors",
    "quantization_config": {"quant_method": NAMED},
    "fusion_config": {NAMED: True},
    "name_or_path": NAMED,
    "something_new": NAMED,
}


@pytest.mark.parametrize("key", CODE)
def test_93_a_configuration_names_code(key: str, folder: Path) -> None:
    """Also deep inside: a configuration may hold those of parts."""
    honest = digest_of(load_base(folder, TASK, seed=0), TASK)
    change(folder / "config.json", **{key: CODE[key]}, id2label={"0": "a", "1": "b", "2": "c"}, label2id={key: 0})
    model = load_base(folder, TASK, seed=0)
    assert "stranger" not in repr(vars(model.config))
    assert digest_of(model, TASK) == honest
    assert model.config._attn_implementation in ("eager", "sdpa")


def test_93_a_part_s_configuration_names_code(tmp_path: Path) -> None:
    parts = {
        name: {"image_size": 64, "attn_implementation": NAMED, "fusion_config": {NAMED: True}}
        for name in ("vision_config",)
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", **parts}))
    config = read_config(tmp_path)
    assert config.vision_config.image_size == 64
    assert "stranger" not in repr(vars(config.vision_config))


@pytest.mark.parametrize("kind", ["poisonous", "timm_wrapper", 5, None, ["bert"]])
def test_93_a_configuration_needs_code_that_is_not_of_transformers(kind: object, folder: Path) -> None:
    change(folder / "config.json", model_type=kind, auto_map={"AutoConfig": "poison.Config"})
    with pytest.raises(ModelError, match="none of transformers' own"):
        load_base(folder, TASK, seed=0)


def test_94_a_tokenizer_s_configuration_names_another_file(folder: Path) -> None:
    private = folder.parent / "private.json"
    (folder / "tokenizer.json").rename(private)
    change(folder / "tokenizer_config.json", tokenizer_file=str(private), vocab_file=str(private))
    with pytest.raises(ModelError, match="tokenizer cannot be loaded") as refused:
        print(load_tokenizer(folder).get_vocab())
    assert str(private) not in str(refused.value)


def test_94_a_tokenizer_s_configuration_names_code(folder: Path) -> None:
    marker = folder.parent / "ran"
    (folder / "poison.py").write_text(f"open({str(marker)!r}, 'w').close()")
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["poison.T", "poison.T"]}, tokenizer_class="T")
    change(folder / "config.json", auto_map={"AutoTokenizer": "poison.T"}, tokenizer_class="T")
    assert load_tokenizer(folder).get_vocab() == reviews.make_tokenizer().get_vocab()
    assert not marker.exists()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_92_an_adapter_s_file_is_a_link_that_leads_out(name: str, tmp_path: Path) -> None:
    folder = write_adapter(tiny_bert(), tmp_path / "adapter")
    (folder / name).rename(tmp_path / "private")
    (folder / name).symlink_to("../private")
    with pytest.raises(ModelError, match="outside the folder"):
        with_adapter(tiny_bert(), folder)


DEEP = "[" * 100_000 + "]" * 100_000
ODD = {
    "deep": '{"model_type": ' + DEEP + "}",
    "a list": "[]",
    "a long number": '{"model_type": 1' + "0" * 5000 + "}",
    "large": '{"x": "' + "a" * MAX_JSON_BYTES + '"}',
    "not text": "\udcff",
    "odd labels": '{"model_type": "bert", "id2label": {"a": 1}}',
    "odd sizes": '{"model_type": "bert", "hidden_size": "many"}',
    "huge sizes": '{"model_type": "bert", "hidden_size": 1' + "0" * 30 + "}",
    "no attention": '{"model_type": "bert", "num_attention_heads": 0}',
}


@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
def test_95_odd_configurations_end_in_one_line(content: str, name: str, folder: Path) -> None:
    if name == INDEX:
        name_in_index(folder, "part.safetensors")
    (folder / name).write_bytes(content.encode(errors="surrogateescape"))
    refused = refusal(folder)
    if refused is None:  # these describe no model
        assert name in ("tokenizer_config.json", "generation_config.json")
    else:
        assert len(refused.message.splitlines()) == 1
        assert str(folder) in refused.message


def refusal(folder: Path) -> ModelError | None:
    try:
        load_base(folder, TASK, seed=0), load_tokenizer(folder)
    except ModelError as error:
        return error
    return None


def test_95_a_configuration_has_a_limit(folder: Path) -> None:
    change(folder / "config.json", x="a" * MAX_JSON_BYTES)
    with pytest.raises(ModelError, match="more than 16000000 bytes"):
        read_config(folder)


def test_95_weights_that_are_not_safetensors_end_in_one_line(folder: Path) -> None:
    save_file({"a": load_file(folder / WEIGHTS)["classifier.bias"]}, folder / WEIGHTS)
    with pytest.raises(ModelError, match="its weights lack"):
        load_base(folder, TASK, seed=0)
