"""An owner that names a wrong model is refused before anything leaves, with an error that names the file."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from client.owner import Owner
from client.settings import OwnerSettings
from common.errors import ModelError
from common.models.loading import load_base
from common.settings_file import load_settings, write_settings
from tests.support.adapters import write_adapter
from tests.support.errors import in_two_lines
from tests.support.parties import Parties

QUERY = "bert.encoder.layer.0.attention.self.query.weight"


@pytest.fixture
def model(parties: Parties, tmp_path: Path) -> Path:
    """The model folder that the owner `hotel` names: the base itself, until a test damages it."""
    folder = Path(shutil.copytree(parties.base, tmp_path / "fine-tuned"))
    path = parties.files["hotel"]
    settings = load_settings(path, OwnerSettings).model_copy(update={"fine_tuned": str(folder), "training": None})
    write_settings(path, settings)
    return folder


def refusal(parties: Parties) -> str:
    with pytest.raises(ModelError) as caught:
        Owner(parties.files["hotel"]).check()
    assert caught.value.exit_code == 2
    return in_two_lines(caught.value)


def shard(folder: Path) -> None:
    fine_tuned = AutoModelForSequenceClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    fine_tuned.save_pretrained(folder, max_shard_size="50KB")


def test_the_base_itself_is_accepted(parties: Parties, model: Path) -> None:
    Owner(parties.files["hotel"]).check()
    shard(model)
    Owner(parties.files["hotel"]).check()


@pytest.mark.parametrize("setting", ["num_hidden_layers", "intermediate_size"])
def test_a_configuration_that_describes_more_than_its_files_hold_takes_no_memory(
    parties: Parties, model: Path, setting: str
) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: 10**7}))
    assert "its files hold" in refusal(parties)
    with pytest.raises(ModelError, match="its files hold"):
        load_base(model, parties.agreement.task, seed=0)


def test_a_model_of_another_base_with_the_same_shapes_is_refused(parties: Parties, model: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        config = AutoModelForSequenceClassification.from_pretrained(model).config
        AutoModelForSequenceClassification.from_config(config).save_pretrained(model)
    says = refusal(parties)
    assert str(model) in says
    assert "the bound is 0.8; it was fine-tuned from another base, or its training diverged\nhint: name a" in says


def test_a_model_that_moved_far_from_the_base_but_came_from_it_is_accepted(parties: Parties, model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    random = torch.Generator().manual_seed(0)
    for tensor in weights.values():
        tensor += 0.5 * tensor.norm() / tensor.numel() ** 0.5 * torch.randn(tensor.shape, generator=random)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    Owner(parties.files["hotel"]).check()


def test_another_tokenizer_is_refused_with_the_first_token_that_differs(parties: Parties, model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    count = len(tokenizer)
    tokenizer.add_tokens([AddedToken("frobnicate")])
    tokenizer.save_pretrained(model)
    says = refusal(parties)
    assert f"its tokenizer has {count + 1} tokens, the base's {count}; the first that differs is 'frobnicate'" in says
    assert f"number {count} here and none in the base" in says
    assert "if all owners added the same tokens, agree on a base that has them" in says


def test_tokens_in_another_order_are_refused(parties: Parties, model: Path) -> None:
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["bad"], vocabulary["good"] = vocabulary["good"], vocabulary["bad"]
    path.write_text(json.dumps(tokenizer))
    assert "the first that differs is 'bad', number" in refusal(parties)


def test_a_model_without_a_tokenizer_is_accepted(parties: Parties, model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()
    Owner(parties.files["hotel"]).check()


def truncate(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def claim_a_huge_header(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(b"\xff" * 8 + content[8:])


def garble_the_header(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:8] + b"!" * 40 + content[48:])


def quantise(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[QUERY] = weights[QUERY].sign().to(torch.int8)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def lose_a_shard(folder: Path) -> None:
    shard(folder)
    min(folder.glob("model-00001-of-*.safetensors")).unlink()


def break_the_index(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text("{")


def pickle_it(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncate, "model.safetensors: cannot be read: Error while deserializing header: incomplete metadata"),
        (empty, "model.safetensors: cannot be read: Error while deserializing header: header too small"),
        (claim_a_huge_header, "model.safetensors: cannot be read: Error while deserializing header: header too large"),
        (garble_the_header, "model.safetensors: cannot be read: Error while deserializing header: invalid JSON"),
        (quantise, f"{QUERY} is stored as int8; weights must be floating-point numbers"),
        (lose_a_shard, "has no file model-00001-of-"),
        (break_the_index, "its model.safetensors.index.json cannot be used: Expecting property name"),
        (pickle_it, "holds pickled weights only, and loading a pickle runs its code"),
    ],
)
def test_a_damaged_file_is_named(damage, says: str, parties: Parties, model: Path) -> None:
    damage(model)
    refused = refusal(parties)
    assert says in refused
    assert str(model) in refused


POISON = {
    "config.json": {"AutoConfig": "poison.Config", "AutoModelForSequenceClassification": "poison.Model"},
    "tokenizer_config.json": {"AutoTokenizer": ["poison.Tokenizer", None]},
}


def poison(folder: Path, **changes: object) -> Path:
    """Have every configuration name code in the folder. Returns the file that this code would write."""
    marker = folder / "ran"
    (folder / "poison.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Config: ...\n")
    for name, mapping in POISON.items():
        config = json.loads((folder / name).read_text())
        config |= {"auto_map": mapping, "trust_remote_code": True}
        (folder / name).write_text(json.dumps(config | (changes if name == "config.json" else {})))
    return marker


def test_code_in_a_model_folder_never_runs(parties: Parties, model: Path) -> None:
    marker = poison(model)
    Owner(parties.files["hotel"]).check()  # a known architecture runs the code of transformers
    assert not marker.exists()


def test_a_model_that_needs_code_of_its_folder_is_refused(parties: Parties, model: Path) -> None:
    marker = poison(model, model_type="poisonous")
    assert "its model_type 'poisonous' is none of transformers' own" in refusal(parties)
    assert not marker.exists()


def test_a_tokenizer_with_the_same_tokens_that_splits_texts_otherwise_is_told(parties: Parties, model: Path) -> None:
    assert not [each for each in Owner(parties.files["hotel"]).workbench.oddities() if "its tokenizer splits" in each]
    path = model / "tokenizer.json"
    described = json.loads(path.read_text())
    described["normalizer"] = {"type": "Replace", "pattern": {"String": "was"}, "content": "were"}
    path.write_text(json.dumps(described))
    Owner(parties.files["hotel"]).check()
    (told,) = [each for each in Owner(parties.files["hotel"]).workbench.oddities() if "its tokenizer splits" in each]
    assert "its tokenizer splits 200 of 200 training texts otherwise than the base's" in told


def test_an_adapter_that_names_another_base_is_told(parties: Parties, tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(parties.base)
    folder = write_adapter(base, tmp_path / "adapter", target_modules=["query"])
    path = parties.files["hotel"]
    settings = load_settings(path, OwnerSettings).model_copy(update={"fine_tuned": str(folder), "training": None})
    write_settings(path, settings)
    config = json.loads((folder / "adapter_config.json").read_text())
    found = []
    for named in (str(parties.base), "us/other"):
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": named}))
        told = Owner(path).workbench.oddities()
        found.append([each for each in told if "says that it was trained on 'us/other'" in each])
    assert list(map(len, found)) == [0, 1]
