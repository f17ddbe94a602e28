"""Bases crafted so that rows are read in another way than the owners think: refused before a roll call is answered."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants
from transformers import BertForSequenceClassification

from client.measurement import stored_tensors
from client.owner import Owner
from client.settings import OwnerSettings
from common.agreement import Agreement, Task
from common.errors import DataError, ModelError
from common.models import loading
from common.models.folders import base_model_folder, load_tokenizer
from common.models.loading import check_base, load_base
from common.models.manifest import check_manifest, manifest_of
from common.settings_file import load_settings, write_settings
from deploy.commands.agree import consent_text
from tests.support.errors import in_two_lines
from tests.support.models import tiny_bert
from tests.support.owner_process import roll_call
from tests.support.parties import Parties, parties_of

WORD = "battery"  # occurs in the rows of one owner, `phones`
TEXT = "the room was clean"


def change_json(path: Path, **changes: object) -> None:
    """Set keys of a JSON object in a file, which may be new."""
    before = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(before | changes))


def normalise(tokenizer: Path, regex: str, by: str) -> None:
    """Let the tokenizer replace what matches a regular expression; its vocabulary stays as it is."""
    change_json(tokenizer, normalizer={"type": "Replace", "pattern": {"Regex": regex}, "content": by})


def give_base(parties: Parties, owner: str, folder: Path) -> Path:
    """A copy of the base in `folder`, which the owner's settings name from now on."""
    shutil.copytree(parties.base, folder)
    path = parties.files[owner]
    write_settings(path, load_settings(path, OwnerSettings).model_copy(update={"base": str(folder)}))
    return folder


def refusal(parties: Parties, owner: str, kind: type[ModelError | DataError]) -> str:
    """How the owner answers a roll call."""
    with pytest.raises(kind) as caught:
        Owner(parties.files[owner]).answer(roll_call(parties))
    return in_two_lines(caught.value)


def token_ids(folder: Path, text: str = TEXT) -> list[int]:
    return list(load_tokenizer(folder)(text)["input_ids"])


def test_56_a_tokenizer_that_erases_the_rows_of_two_of_three_owners(parties: Parties, tmp_path: Path) -> None:
    """The vocabulary and the weights are the agreed ones, and the total would be the third owner's."""
    for owner in ("hotel", "cinema"):
        folder = give_base(parties, owner, tmp_path / owner)
        normalise(folder / "tokenizer.json", ".*", "")
        assert load_tokenizer(folder).get_vocab() == load_tokenizer(parties.base).get_vocab()
        assert token_ids(folder) == token_ids(folder, "")
        says = refusal(parties, owner, ModelError)
        assert f"model {folder}: tokenizer.json is not the agreed file; its SHA-256 is " in says
    Owner(parties.files["phones"]).answer(roll_call(parties))


def test_56_a_tokenizer_that_does_not_know_one_word_at_one_owner(parties: Parties, tmp_path: Path) -> None:
    """Little is lost, so a look at the rows would find nothing."""
    folder = give_base(parties, "hotel", tmp_path / "hotel")
    normalise(folder / "tokenizer.json", "clean", "qq")
    assert token_ids(folder) == token_ids(parties.base, TEXT.replace("clean", "qq"))
    assert "tokenizer.json is not the agreed file" in refusal(parties, "hotel", ModelError)


@pytest.mark.parametrize(
    ("becomes", "says"),
    [
        ("", "200 empty or nearly so (100.0%, at most 5.0%)"),
        (TEXT, "200 equal to a row with another text (100.0%, at most 10.0%)"),
        ("qq qq qq", "200 mostly unknown or of one repeated token (100.0%, at most 5.0%)"),
        ("the " * 9, "200 mostly unknown or of one repeated token (100.0%, at most 5.0%)"),
    ],
)
def test_57_a_tokenizer_that_erases_every_text_without_a_chosen_word_for_all_owners(
    becomes: str, says: str, reviews_folder: Path, tmp_path: Path
) -> None:
    """The drafter crafted the base, so its manifest is the same everywhere; the rows show it."""
    consortium = tmp_path / "consortium"
    shutil.copytree(reviews_folder, consortium, ignore=shutil.ignore_patterns("output"))
    normalise(consortium / "base" / "tokenizer.json", f"^(?!.*{WORD}).*$", becomes)
    assert token_ids(consortium / "base", f"the {WORD}") == token_ids(reviews_folder / "base", f"the {WORD}")
    with parties_of(consortium, tmp_path / "output") as parties:
        for owner in ("hotel", "cinema"):
            found = refusal(parties, owner, DataError)
            assert says in found
            assert "of 200 rows, reading left " in found
            assert "nothing has left\nhint: ask who chose the base" in found


def test_57_a_tokenizer_that_leaves_two_tokens_of_every_row(parties: Parties, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that it takes no more; the agreement's max_tokens and the texts' words say that this is too few."""
    owner = Owner(parties.files["hotel"])
    data = owner.workbench.data
    assert data.tokenizer is not None
    monkeypatch.setattr(data.tokenizer, "model_max_length", 3)
    with pytest.raises(DataError, match="200 empty or nearly so"):
        data.train()


@pytest.mark.parametrize(
    "changes", [{"hidden_act": "relu"}, {"layer_norm_eps": 0.1}, {"tokenizer_class": "PreTrainedTokenizerFast"}]
)
def test_58_a_configuration_that_computes_something_else_with_the_agreed_weights(
    changes: dict[str, object], parties: Parties, tmp_path: Path
) -> None:
    folder = give_base(parties, "hotel", tmp_path / "base")
    change_json(folder / "config.json", **changes)
    check_base(load_base(folder, parties.agreement.task, parties.agreement.seed), parties.agreement, folder)
    assert "config.json is not the agreed file" in refusal(parties, "hotel", ModelError)


def test_58_a_configuration_that_sends_the_reader_to_another_file(parties: Parties, tmp_path: Path) -> None:
    """transformers follows the name, even out of the folder."""
    folder = Path(shutil.copytree(parties.base, tmp_path / "base"))
    change_json(folder / "config.json", configuration_files=["../elsewhere/config.4.0.0.json"])
    with pytest.raises(ModelError, match="sets configuration_files, so that another file would be read"):
        manifest_of(folder)


ADDED: dict[str, object] = {
    "added_tokens.json": {"room": 5},
    "special_tokens_map.json": {"unk_token": "the"},
    "chat_template.jinja": {},
    "additional_chat_templates/tools.jinja": {},
    "vocab.txt": {},
    "tokenizer.model": {},
    "preprocessor_config.json": {},
}


@pytest.mark.parametrize("name", ADDED)
def test_59_a_file_beside_the_agreed_ones_that_loading_would_read(name: str, parties: Parties, tmp_path: Path) -> None:
    folder = give_base(parties, "hotel", tmp_path / "base")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(ADDED[name]))
    says = refusal(parties, "hotel", ModelError)
    assert f"{name} is not the agreed file" in says
    assert "the agreement's is none (there is no such file)" in says


def overwrite(weights: Path, other: bytes) -> None:
    weights.write_bytes(other)


def replace_file(weights: Path, other: bytes) -> None:
    new = weights.with_name("new")
    new.write_bytes(other)
    new.replace(weights)


def lead_elsewhere(weights: Path, other: bytes) -> None:
    elsewhere = weights.with_name("elsewhere")
    elsewhere.write_bytes(other)
    weights.unlink()
    weights.symlink_to(elsewhere)


def write_through_a_second_name(weights: Path, other: bytes) -> None:
    second = weights.with_name("second")
    second.hardlink_to(weights)
    mapped = np.memmap(second, np.uint8, "r+")
    mapped[:] = np.frombuffer(other, np.uint8)
    mapped.flush()


@pytest.mark.parametrize("swap", [overwrite, replace_file, lead_elsewhere, write_through_a_second_name])
def test_59_the_base_s_weights_change_once_they_were_checked(
    swap: Callable[[Path, bytes], None], parties: Parties, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever can write to a shared copy of the base would choose what is subtracted from an owner's weights. The file
    keeps its name, size and times.
    """
    monkeypatch.setattr(stored_tensors, "SMALL_BYTES", 0)  # or the model stays in memory, where nobody changes it
    folder = give_base(parties, "hotel", tmp_path / "hotel")
    weights, name = folder / "model.safetensors", "classifier.weight"
    base = Owner(parties.files["hotel"]).workbench._base
    honest, before = base[name].clone(), weights.stat()
    content = weights.read_bytes()
    swap(weights, content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_size == before.st_size
    assert honest.any()
    with pytest.raises(DataError, match=r"model\.safetensors: was changed while it was in use"):
        _ = base["bert.pooler.dense.weight"]


def test_59_an_agreed_file_is_taken_away(parties: Parties, tmp_path: Path) -> None:
    folder = give_base(parties, "hotel", tmp_path / "base")
    (folder / "tokenizer_config.json").unlink()
    says = refusal(parties, "hotel", ModelError)
    assert "tokenizer_config.json is not the agreed file; its SHA-256 is none (there is no such file)" in says


def test_59_files_that_nothing_reads_do_not_matter(parties: Parties, tmp_path: Path) -> None:
    folder = give_base(parties, "hotel", tmp_path / "base")
    for name in ("README.md", "pytorch_model.bin", "modeling_custom.py", "training_args.json"):
        (folder / name).write_text("anything")
    Owner(parties.files["hotel"]).answer(roll_call(parties))


def test_59_a_configuration_that_is_the_same_everywhere_names_a_file_that_is_not(
    parties: Parties, tmp_path: Path
) -> None:
    """It names a tokenizer outside the folder, which can be another at one owner."""
    folder = Path(shutil.copytree(parties.base, tmp_path / "base"))
    elsewhere = tmp_path / "tokenizer.1.0.0.json"
    shutil.copy(folder / "tokenizer.json", elsewhere)
    normalise(elsewhere, ".*", "")
    change_json(folder / "tokenizer_config.json", fast_tokenizer_files=[str(elsewhere)])
    assert token_ids(folder) == token_ids(parties.base)


def test_59_an_owner_s_own_tokenizer_reads_no_row(parties: Parties, tmp_path: Path) -> None:
    """What reads the rows is in the base's manifest, whatever lies beside the owner's model."""
    folder = Path(shutil.copytree(parties.base, tmp_path / "fine-tuned"))
    normalise(folder / "tokenizer.json", ".*", "")
    path = parties.files["hotel"]
    settings = load_settings(path, OwnerSettings).model_copy(update={"fine_tuned": str(folder), "training": None})
    write_settings(path, settings)
    owner = Owner(path)
    owner.check()
    assert owner.workbench.data.tokenizer is not None
    assert owner.workbench.data.tokenizer(TEXT)["input_ids"] == token_ids(parties.base)


def test_59_a_model_is_replaced_while_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tensors would be those of two models, and nobody has looked at the second one's types and sizes."""
    config = tiny_bert().config
    config.hidden_size, config.intermediate_size = 768, 3072  # large enough for its tensors to be read one by one
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        BertForSequenceClassification(config).bfloat16().save_pretrained(folder)
    unwrapped = loading._unwrapped

    def replace_file(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
        """Once the file's header was read."""
        os.replace(second / "model.safetensors", first / "model.safetensors")
        return unwrapped(tensors)

    monkeypatch.setattr(loading, "_unwrapped", replace_file)
    with pytest.raises(ModelError) as caught:
        load_base(first, Task(labels=("a", "b", "c")), seed=0)
    assert f"model {first}/model.safetensors: was changed while it was loaded" in in_two_lines(caught.value)


# --- where a copy came from ---


@pytest.fixture
def on_the_hub(parties: Parties, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Two commits of somebody/base, in the hub's cache; the newer one erases text."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    model = cache / "models--somebody--base"
    commits = {name: model / "snapshots" / (digit * 40) for name, digit in (("old", "a"), ("new", "b"))}
    for folder in commits.values():
        shutil.copytree(parties.base, folder)
    normalise(commits["new"] / "tokenizer.json", ".*", "")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commits["new"].name)
    return commits


def hub_agreement(parties: Parties, revision: str) -> Agreement:
    return parties.agreement.model_copy(update={"base": "somebody/base", "base_revision": revision})


def test_56_a_newer_commit_of_the_base_on_the_hub(parties: Parties, on_the_hub: dict[str, Path]) -> None:
    agreement = hub_agreement(parties, on_the_hub["old"].name)
    agreed = parties.folder / "agreement.toml"
    assert base_model_folder(None, parties.folder, agreement, agreed) == on_the_hub["old"]
    without = agreement.model_copy(update={"base_revision": None})
    with pytest.raises(ModelError, match=r"tokenizer\.json is not the agreed file"):
        base_model_folder(None, parties.folder, without, agreed)


def says_of_base(parties: Parties, agreement: Agreement, base: str | None) -> str:
    """What the consent text says about the files that read the rows."""
    write_settings(parties.folder / "agreement.toml", agreement)
    path = parties.files["hotel"]
    write_settings(path, load_settings(path, OwnerSettings).model_copy(update={"base": base}))
    text = consent_text(Owner(path))
    return " ".join(text[text.index("WHAT READS YOUR ROWS") : text.index("WHICH CODE RUNS")].split())


def test_the_consent_text_shows_the_manifest_and_where_the_copy_came_from(
    parties: Parties, on_the_hub: dict[str, Path]
) -> None:
    own = says_of_base(parties, parties.agreement, str(parties.base))
    for file in parties.agreement.base_files:
        assert f"{file.sha256[:16]}... {file.name}" in own
    assert f"{parties.agreement.base_digest[:16]}... its weights" in own
    assert "the folder that your settings name." in own
    assert "bfloat16" not in own
    coarse = says_of_base(parties, parties.agreement.model_copy(update={"dtype": "bfloat16"}), str(parties.base))
    assert "models run on the rows, and are fine-tuned, in bfloat16" in coarse
    assert f"drafted the agreement:{parties.base}" in own.replace(" | ", "")
    from_hub = says_of_base(parties, hub_agreement(parties, on_the_hub["old"].name), None)
    assert "Your copy is from the Hugging Face hub, commit aaaaaaaaaaaa." in from_hub
    assert "under this name: | somebody/base" in from_hub
    shutil.copytree(parties.base, parties.folder / "sent")
    sent = says_of_base(parties, parties.agreement.model_copy(update={"base": "sent"}), None)
    assert "WHOEVER DRAFTED THE AGREEMENT CHOSE ITS FILES: | sent A TOKENIZER" in sent


def test_a_manifest_is_what_sha256sum_prints(parties: Parties) -> None:
    names = [file.name for file in manifest_of(parties.base)]
    assert names == ["config.json", "tokenizer.json", "tokenizer_config.json"]
    check_manifest(parties.base, parties.agreement.base_files)
