"""`amalgram check`: what is looked at, what would happen, and everything that is wrong at once."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from client.ledger import Ledger
from client.owner import Owner
from common import device as devices
from common.agreement import Task
from common.errors import ModelError
from common.identity import fingerprint
from common.models.adapter import PARAMETER_PREFIX
from common.models.loading import load_fine_tuned
from deploy.cli import cli
from deploy.commands import check
from deploy.commands.agree import give_consent
from deploy.commands.check import check_and_show
from deploy.commands.draft import draft_agreement
from deploy.simulation.simulate import simulate
from tests.support.adapters import write_adapter
from tests.support.lessons import tokenizer_of_letters
from tests.support.listeners import GUARD, listening, over_tls


@pytest.fixture
def home(reviews_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = Path(shutil.copytree(reviews_folder, tmp_path / "home", ignore=shutil.ignore_patterns("output")))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def network(home: Path) -> Iterator[Path]:
    """The example with keys, a drafted agreement, settings for a network, and what an owner asks of its server."""
    for name in ("hotel", "cinema", "phones", "coordinator"):
        cli(["keys", "new", name], standalone_mode=False)
    cli(["keys", "certificate", "localhost"], standalone_mode=False)
    public = [f"{name}.pub" for name in ("hotel", "cinema", "phones", "coordinator")]
    cli(["draft", "agreement.toml", *public, "--out", "agreed.toml"], standalone_mode=False)
    (home / "coordinator.toml").write_text(
        'agreement = "agreed.toml"\noutput = "output"\n[network]\nlisten = "127.0.0.1:1"\n'
    )
    with listening(over_tls(home, GUARD)) as port:
        for name in ("hotel", "cinema", "phones"):
            own = home / f"{name}.toml"
            text = f'agreement = "agreed.toml"\nstate = "state-{name}"\n{own.read_text()}'
            own.write_text(f'{text}\n[network]\naddress = "localhost:{port}"\n')
        yield home


def lines(capsys: pytest.CaptureFixture[str], path: str) -> tuple[int, dict[str, str], str]:
    """The exit code, what was found by what was looked at, and standard error."""
    capsys.readouterr()
    code = check_and_show(Path(path))
    shown = capsys.readouterr()
    return code, {line[:14].rstrip(): line[15:] for line in shown.out.splitlines()}, shown.err


@pytest.mark.usefixtures("home")
def test_a_folder_that_is_ready_says_what_a_merge_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    code, found, errors = lines(capsys, ".")
    assert code == 0
    looked_at = ["agreement", "base", "hotel", "cinema", "phones", "rounds", "device", "reading", "lengths", "disk"]
    assert list(found) == [*looked_at, "time", "memory", "Gram rows"]
    assert found["agreement"].startswith(
        "Reviews of three shops: regmean, compared with average, task_arithmetic, fish"
    )
    assert found["base"].endswith("text-classification, labels negative, positive")
    assert found["cinema"] == "trains its model from the base; rows: 200 train, 60 validation, 120 test"
    assert "contributions 3.1 MB" in found["rounds"]  # as the consent text says: 384,305 numbers of 8 bytes
    assert found["reading"].startswith("1,140 rows read as in a run")
    assert found["lengths"] == "all texts looked at fit into max_tokens = 32"
    assert re.fullmatch(r"at least [\d.]+ per dimension", found["Gram rows"])
    assert "a run keeps at least" in found["disk"]
    assert found["time"] == "a minute or two, on an idle machine"
    assert re.fullmatch(r"about \d{2,3}0? MB at the most", found["memory"])
    assert found["device"].startswith("cpu")
    assert errors == "ready; next: amalgram simulate .\n"


def test_an_owner_whose_rows_are_too_few_for_a_gram_is_not_ready(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for owner in ("hotel", "cinema"):
        (train,) = (home / "data" / owner).glob("train.*")
        train.write_text("".join(f"{line}\n" for line in train.read_text().splitlines()[:5]))
    code, found, errors = lines(capsys, ".")
    assert code == 1
    for owner in ("hotel", "cinema"):
        assert re.search(rf"error: {owner}: the Gram of \S+ would have about \d+ rows for 64 dimensions, the ", errors)
    assert "Gram rows" not in found
    assert 'data_free_layers = ["' in errors
    assert errors.endswith("not ready: 2 to correct\n")


def test_an_owner_whose_rows_are_too_few_for_a_refit_is_not_ready(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = home / "agreement.toml"
    path.write_text(re.sub(r"\nmethod = .*\ncompare_with = .*", '\nmethod = "refit"', path.read_text()))
    assert lines(capsys, ".")[0] == 0
    train = home / "data" / "hotel" / "train.jsonl"
    train.write_text("".join(f"{line}\n" for line in train.read_text().splitlines()[:64]))
    code, _, errors = lines(capsys, ".")
    assert code == 1
    assert "error: hotel: the Gram of the classifier's input would have about 64 rows for 65 dimensions" in errors
    assert "or agree on methods that leave the classifier as it was merged, unlike refit\n" in errors


def test_an_owner_whose_texts_the_base_cannot_read_is_not_ready(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = home / "data" / "hotel" / "train.jsonl"
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    train.write_text("".join(json.dumps(row | {"text": "\u6f22 " * 9}) + "\n" for row in rows))
    code, _, errors = lines(capsys, ".")
    assert code == 1
    assert "rows, reading left 0 empty or nearly so" in errors
    assert "mostly unknown or of one repeated token (100.0%, at most 5.0%); nothing has left\nhint: ask who" in errors


def test_a_device_that_is_not_there_is_said(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "accelerators", tuple)
    hotel = home / "hotel.toml"
    hotel.write_text(f'device = "cuda:1"\n{hotel.read_text()}')
    code, found, errors = lines(capsys, ".")
    assert code == 1
    assert "device" not in found
    assert 'error: hotel: device = "cuda:1" is not there; there is: cpu\nhint: ' in errors


def test_a_device_is_named_with_its_memory_and_the_cpu_with_what_is_there_too(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(check, "accelerators", lambda: (gpu,))
    monkeypatch.setattr(check, "memory_of", lambda device: (60_000_000_000, 80_000_000_000) if device == gpu else None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    assert check._device_in_words(gpu) == "cuda:0 (NVIDIA H100), 60.0 GB of 80.0 GB free"
    cpu = check._device_in_words(torch.device("cpu"))
    assert cpu == 'cpu; cuda:0 (NVIDIA H100) is there too: device = "auto"'


def test_everything_that_is_wrong_with_the_owners_is_said_at_once(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "data" / "hotel" / "test.jsonl").rename(home / "data" / "hotel" / "tests.jsonl")
    phones = home / "phones.toml"
    text = re.sub(r"\[training\]\n(.+\n)+", "", phones.read_text())
    phones.write_text(text.replace('name = "phones"', 'name = "phones"\nfine_tuned = "nowhere"'))
    cinema = home / "cinema.toml"
    cinema.write_text(cinema.read_text().replace('label = "label"', 'label = "stars"'))
    code, found, errors = lines(capsys, ".")
    assert code == 1
    assert list(found) == ["agreement", "base"]
    assert "hotel/test.jsonl: no such file\nhint: did you mean tests.jsonl?\nerror: " in errors
    assert "model nowhere: there is no folder" in errors
    assert "has no column 'stars'; its columns are text, label\nhint: " in errors
    assert errors.endswith("not ready: 3 to correct\n")


def test_what_may_well_be_a_mistake_is_said(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((home / "base" / "config.json").read_text())
    shutil.copytree(home / "base", home / "model")
    config |= {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
    (home / "model" / "config.json").write_text(json.dumps(config))
    hotel = home / "hotel.toml"
    text = hotel.read_text().replace("hotel/test.jsonl", "hotel/train.jsonl")
    training = text[text.index("\n[training]") : text.index("\n[data]")]
    hotel.write_text(text.replace(training, '\nfine_tuned = "model"\n'))
    code, found, _ = lines(capsys, ".")
    assert code == 0
    assert found["hotel"].endswith(
        "; its model does not name its labels, so its outputs are read in the agreed order: 0 as negative, 1 as "
        "positive; 200 of 200 test rows are training rows, too, so metrics on them say little about others"
    )


def test_texts_that_would_be_cut_are_counted(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    agreement = home / "agreement.toml"
    text = agreement.read_text().replace("max_tokens = 32 ", "max_tokens = 6 ")
    agreement.write_text(text)
    assert "equal to a row with another text (" in lines(capsys, ".")[2]
    agreement.write_text(re.sub(r"max_equal = [\d.]+", "max_equal = 1.0", text))
    code, found, errors = lines(capsys, ".")
    assert code == 0, errors
    # "the room was clean" has six tokens with [CLS] and [SEP]; "honestly the ..." and "i think the ..." have more.
    for owner in ("hotel", "cinema", "phones"):  # 200, 60 and 120 rows in three files each
        assert re.search(rf"{owner}: [0-9]+ of 380 texts are longer than max_tokens = 6 ", found["lengths"])
    assert "the longest has 8 tokens; 99% have at most 8" in found["lengths"]


@pytest.fixture
def own_base(home: Path) -> Path:
    """The base of hotel alone, which gives predictions: the agreed one with a tokenizer of letters."""
    agreement, hotel = home / "agreement.toml", home / "hotel.toml"
    text = re.sub(r"\nmethod = .*\ncompare_with = .*", '\nmethod = "distill"', agreement.read_text())
    text = text.replace("# [verification]\n# required", "[verification]\nrequired")
    text = text.replace('name = "hotel"', 'name = "hotel"\ngives = "predictions"')
    agreement.write_text(f'{text}\n[distill]\npool = "pool.jsonl"\nstart = "base"\n')
    (home / "pool.jsonl").write_text('{"text": "the room was clean"}\n{"text": "a dull film"}\n')
    shutil.copytree(home / "base", home / "other")
    tokenizer_of_letters().save_pretrained(home / "other")
    hotel.write_text(hotel.read_text().replace('name = "hotel"', 'name = "hotel"\nown_base = "other"', 1))
    return home / "other"


def test_texts_of_an_owner_with_a_base_of_its_own_are_cut_by_its_own_tokenizer(
    own_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found, errors = lines(capsys, ".")
    assert code == 0, errors
    assert found["hotel"].startswith(f"trains its model from {own_base}; rows: ")
    assert "hotel: " in found["lengths"]  # by letter, its texts do not fit; the others' still do
    assert "cinema" not in found["lengths"]


def test_a_base_that_cannot_read_its_owner_s_rows_is_one_of_the_things_that_are_wrong(
    own_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (own_base / "tokenizer.json").write_text("{}")
    code, found, errors = lines(capsys, ".")
    assert code == 1
    assert "reading" not in found
    assert errors.startswith(f"error: model {own_base}: its tokenizer cannot be loaded")
    assert errors.splitlines()[1].startswith("hint: save the model again")
    assert errors.splitlines()[2:] == ["not ready: 1 to correct"]  # though its texts' lengths need the tokenizer, too


def test_a_model_with_another_tokenizer_is_found(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hotel = home / "hotel.toml"
    text = hotel.read_text()
    training = text[text.index("\n[training]") : text.index("\n[data]")]
    hotel.write_text(text.replace(training, '\nfine_tuned = "model"\n'))
    shutil.copytree(home / "base", home / "model")
    code, found, _ = lines(capsys, ".")
    assert (code, found["tokenizers"]) == (0, "the same vocabulary as the base's")
    path = home / "model" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["bad"], vocabulary["good"] = vocabulary["good"], vocabulary["bad"]
    path.write_text(json.dumps(tokenizer))
    code, found, errors = lines(capsys, ".")
    assert (code, "tokenizers" in found) == (1, False)
    assert "the first that differs is 'bad'" in errors


@pytest.fixture
def adapter(home: Path) -> Path:
    """An adapter of the example's base, which its owner hotel brings."""
    base = AutoModelForSequenceClassification.from_pretrained(home / "base")
    folder = write_adapter(base, home / "adapter", target_modules=["query"])
    hotel = home / "hotel.toml"
    text = hotel.read_text()
    training = text[text.index("\n[training]") : text.index("\n[data]")]
    hotel.write_text(text.replace(training, '\nfine_tuned = "adapter"\n'))
    return folder


def test_an_adapter_that_fits_is_ready_and_what_is_left_to_a_simulation_is_said(
    adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "us/other"}))
    code, found, errors = lines(capsys, ".")
    assert code == 0, errors
    fits, _, odd = found["adapter"].partition("; ")
    assert fits == f"{adapter} fits its base, of which it changes 2 tensors"
    assert odd.startswith("its adapter_config.json says that it was trained on 'us/other', and the base here is ")
    assert found["not looked at"] == (
        "weights; `amalgram simulate` loads them, and finds a whole model of another base, or with outputs in another "
        "order than the labels"
    )


@pytest.mark.parametrize(
    ("layer", "shape", "says"),
    [
        (0, (4, 48), "has shape (4, 48), on this base it must have (4, 64)"),
        (7, (4, 64), "layer.7.attention.self.query.lora_A.weight (1 such in all), which the base does not have"),
    ],
)
def test_an_adapter_of_a_base_with_other_shapes_or_layers_is_not_ready(
    layer: int, shape: tuple[int, ...], says: str, adapter: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    weights[f"{PARAMETER_PREFIX}bert.encoder.layer.{layer}.attention.self.query.lora_A.weight"] = torch.zeros(shape)
    save_file(weights, adapter / "adapter_model.safetensors")
    code, found, errors = lines(capsys, ".")
    assert (code, "adapter" in found) == (1, False)
    assert says in errors
    base = AutoModelForSequenceClassification.from_pretrained(home / "base")
    with pytest.raises(ModelError) as met_in_a_run:
        load_fine_tuned(adapter, Task(labels=("negative", "positive")), base)
    assert errors == (
        f"error: {met_in_a_run.value.message}\nhint: {met_in_a_run.value.hint}\nnot ready: 1 to correct\n"
    )


def test_layers_that_only_an_adapter_has_are_refused_by_its_owner_s_name(adapter: Path, home: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    other = f"{PARAMETER_PREFIX}bert.encoder.layer.7.attention.self.query.lora_A.weight"
    save_file(weights | {other: torch.zeros(4, 64)}, adapter / "adapter_model.safetensors")
    agreement = home / "agreement.toml"
    agreement.write_text(f'{agreement.read_text()}\n[merge]\nlayers = ["adapter"]\n')
    says = re.escape(
        f"adapter {adapter} changes bert.encoder.layer.7.attention.self.query.weight (1 such in all), which the base "
        f"{home / 'base'} does not have"
    )
    with pytest.raises(ModelError, match=f"^hotel: {says}") as caught:
        simulate(home, home / "merged")
    assert caught.value.hint == "check that the adapter was trained on the agreed base model"
    for name in ("hotel", "cinema", "phones", "coordinator"):
        cli(["keys", "new", name], standalone_mode=False)
    public = [home / f"{name}.pub" for name in ("hotel", "cinema", "phones", "coordinator")]
    with pytest.raises(ModelError, match=f"^--adapter: {says}"):
        draft_agreement(agreement, public, home / "agreed.toml", None, [adapter])


@pytest.mark.usefixtures("home")
def test_a_draft_is_told_from_an_agreement(capsys: pytest.CaptureFixture[str]) -> None:
    code, found, errors = lines(capsys, "agreement.toml")
    assert (code, list(found)) == (0, ["draft", "base"])
    assert errors == "ready; next: amalgram draft agreement.toml *.pub\n"
    code, found, errors = lines(capsys, "hotel.toml")
    assert (code, found) == (1, {"settings": "owner hotel"})
    assert "agreement.toml: base_digest is missing: this is a draft\nhint: complete it: amalgram draft" in errors


def test_every_party_of_a_network_can_check_its_own_part(network: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found, errors = lines(capsys, "agreed.toml")
    assert (code, list(found)) == (0, ["agreement", "base", "rounds"])
    assert errors == "ready; next: amalgram agree OWNER.toml\n"
    code, found, errors = lines(capsys, "hotel.toml")
    assert code == 0, errors
    assert list(found) == [
        "settings",
        "agreement",
        "base",
        "model, files",
        "network",
        "rounds",
        "device",
        "reading",
        "lengths",
        "disk",
        "time",
        "memory",
        "Gram rows",
    ]
    assert re.search(r"The network takes \d+ s at 100 Mbit/s, \d+ s at 1 Gbit/s$", found["time"])
    assert re.fullmatch("localhost:[0-9]+ answers, with hotel.node and ca.pem", found["network"])
    assert errors == "ready; next: amalgram agree hotel.toml\n"
    assert not (network / "state-hotel").exists()  # a look leaves nothing behind
    code, found, errors = lines(capsys, "coordinator.toml")
    assert code == 0, errors
    looked_at = ["settings", "identity", "certificates", "base", "port", "rounds", "device", "disk"]
    assert list(found) == [*looked_at, "time", "memory"]
    assert errors == "ready; next: amalgram server coordinator.toml\n"


def test_keys_that_others_may_read_and_keys_of_others_are_found(
    network: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (network / "hotel.node").chmod(0o644)
    (network / "cinema.key").replace(network / "phones.key")
    (network / "phones.key").replace(network / "coordinator.key")
    code, found, errors = lines(capsys, "hotel.toml")
    assert (code, "network" in found) == (1, False)
    assert "hotel.node: other users may read this secret\nhint: chmod 600" in errors
    code, found, errors = lines(capsys, "coordinator.toml")
    assert (code, "identity" in found) == (1, False)
    assert "coordinator.key: is not the identity that the agreement names for the coordinator" in errors


def test_each_party_s_disk_has_room_for_it_alone_and_what_an_earlier_start_left_counts_as_room(
    network: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(network)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    needed: list[float] = []
    left_by = {"hotel.toml": network / "state-hotel", "coordinator.toml": network / "output" / "checkpoint"}
    for settings, folder in left_by.items():
        code, _, errors = lines(capsys, settings)
        assert code == 1
        (kept,) = re.findall(r"1\.0 MB free, a run keeps at least ([\d.]+) MB", errors)
        needed.append(float(kept))
        folder.mkdir(parents=True)
        (folder / "sum").write_bytes(bytes(20_000_000))
        assert lines(capsys, settings)[1]["disk"].startswith("21.0 MB free in")
    of_owner, of_coordinator = needed
    assert of_owner < of_coordinator < 3 * of_owner  # the coordinator's is not that of all owners together


def test_a_server_that_cannot_be_reached_is_found(network: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = network / "hotel.toml"
    own.write_text(re.sub("localhost:[0-9]+", "localhost:1", own.read_text()))
    code, found, errors = lines(capsys, "hotel.toml")
    assert (code, "network" in found) == (1, False)
    assert "nothing listens at localhost:1\nhint: ask the coordinator" in errors


def test_after_consent_the_next_step_is_the_client(network: Path, capsys: pytest.CaptureFixture[str]) -> None:
    give_consent(Owner(network / "hotel.toml"))
    assert lines(capsys, "hotel.toml")[2] == "ready; next: amalgram client hotel.toml\n"


def test_rows_that_were_contributed_before_are_said_and_the_ledger_stays(
    network: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    owner = Owner(network / "hotel.toml")
    earlier = owner.agreement.model_copy(update={"title": "Earlier"})
    ledger = Ledger(owner.ledger_path, owner.identity.public_key, earlier, must_exist=False)
    ledger.begin(0, 64 * "a", 0, "contributions", owner.contributed(may_train=False), set())
    ledger.offer(0, 64 * "a", 64 * "b", set())
    shutil.rmtree(network / "state-hotel")
    before = {path: path.read_bytes() for path in network.iterdir() if path.is_file()}
    code, found, errors = lines(capsys, "hotel.toml")
    assert code == 0, errors
    start = " ".join(fingerprint(bytes.fromhex(earlier.digest())).split()[:2])
    told = f"the same rows were contributed under 'Earlier' (fingerprint {start} ...)"
    assert found["ledger"] == (
        f"{told}; `amalgram agree` says what the totals show together, and takes --again as consent to that"
    )
    assert {path: path.read_bytes() for path in network.iterdir() if path.is_file()} == before
    assert not (network / "state-hotel").exists()
    (repeat,) = Owner(network / "hotel.toml").ledger.repeats(owner.contributed(may_train=False))
    assert check._repeats_in_words([repeat], [repeat.agreement_digest]).startswith(f"{told}, and there is consent")
    assert check._repeats_in_words([], []) == "fewer than 10% of these rows were contributed under another agreement"


def test_with_json_a_check_is_one_object(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answer() -> tuple[int, dict[str, Any]]:
        code = cli(["check", "agreement.toml", "--json"], standalone_mode=False)
        shown = capsys.readouterr()
        assert shown.err == ""
        return code, json.loads(shown.out)

    code, found = answer()
    assert (code, found["ready"]) == (0, True)
    assert [each["what"] for each in found["looked_at"]] == ["draft", "base"]
    (home / "base" / "model.safetensors").unlink()
    code, found = answer()
    assert (code, found["ready"]) == (1, False)
    assert "holds no weights" in found["looked_at"][1]["error"]
