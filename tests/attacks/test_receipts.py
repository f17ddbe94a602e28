"""Attacks 80 to 84 and 248: what owners sign at the end, and what anybody can check of a published folder."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from client.owner import Owner
from client.state import TestedRecord
from common.agreement import Task
from common.certificates import deliveries_digest
from common.errors import ConsentError, RemoteProtocolError, SettingsError
from common.messages import Message, Receipts, Result, ResultReceived
from common.models.loading import digest_of
from common.models.published_folder import model_configuration, published_folder, write_model
from common.publication import CARD, RECEIPTS, Publication, PublishedReceipts, SignedScore
from common.summation.records import Signed
from deploy.cli import cli
from deploy.commands.verify import check_folder
from tests.support.models import tiny_bert
from tests.support.owner_process import OTHER, RUN, Process, delivered_by, part_of
from tests.support.parties import parties_of
from tests.support.results import MEAN, publication_of, sign_result, signed_anew

TestedRecord.__test__ = False  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def published(trained_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, Result, Path]]:
    """Owners who tested a model, the honest result about it, and the folder that a coordinator publishes."""
    folder = tmp_path_factory.mktemp("published")
    with parties_of(trained_folder, folder / "output") as parties:
        process = Process(parties)
        slot = process.candidate_slot("regmean")
        part = part_of(parties, slot)
        process.fast_forward(slot.position)
        process.send_all(part)
        workbench = Owner(parties.files["hotel"]).workbench
        model = workbench.load_base()
        write_model(model, parties.base, parties.agreement, folder / "model")
        (folder / "model" / CARD).write_text("A card.")
        publication = publication_of(process, published_folder(folder / "model"))
        publication = publication.model_copy(update={"files": published_folder(folder / "model").files})
        result = sign_result(
            process,
            part.model,  # type: ignore[attr-defined]
            digest_of(model, workbench.task),
            deliveries_digest([delivered_by(part)]),
            publication.canonical_bytes(),
        )
        with state_kept(process, folder / "state"):
            replies = [process.send(owner, result) for owner in parties.files]
            process.send_all(Receipts(run=RUN, signatures=packed(replies)))
            shutil.copy(
                parties.folder / "state" / "hotel" / "receipts" / f"{parties.agreement.digest()}.json",
                folder / "model" / RECEIPTS,
            )
        yield process, result, folder / "model"


@contextmanager
def state_kept(process: Process, copy: Path) -> Iterator[None]:
    """Afterwards the owners' state and ledgers are what they were."""
    state = process.parties.folder / "state"
    ledgers = {path: path.read_bytes() for path in (Owner(file).ledger_path for file in process.parties.files.values())}
    shutil.copytree(state, copy)
    yield
    shutil.rmtree(state)
    shutil.copytree(copy, state)
    for path, content in ledgers.items():
        path.write_bytes(content)


def packed(replies: list[Message]) -> bytes:
    """The signatures of all owners, in the order of the roster."""
    return Signed.pack_all(
        Signed(place, reply.signature) for place, reply in enumerate(replies) if isinstance(reply, ResultReceived)
    )


@pytest.fixture
def process(published: tuple[Process, Result, Path], tmp_path: Path) -> Iterator[Process]:
    with state_kept(published[0], tmp_path / "state"):
        yield published[0]


@pytest.fixture
def result(published: tuple[Process, Result, Path]) -> Result:
    return published[1]


def changed(process: Process, result: Result, **changes: object) -> Result:
    """The result with another publication, signed by the coordinator."""
    publication = Publication.model_validate_json(result.publication).model_copy(update=changes)
    return signed_anew(process, result, publication=publication.canonical_bytes())


def of(result: Result) -> Publication:
    return Publication.model_validate_json(result.publication)


def test_an_owner_signs_the_files_that_it_would_have_written(process: Process, result: Result) -> None:
    assert isinstance(process.send("hotel", result), ResultReceived)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "relu"),
        ("id2label", {"0": "positive", "1": "negative"}),
        ("auto_map", {"AutoModel": "modeling.Evil"}),
        ("num_attention_heads", 1),
        ("dtype", "float16"),
        ("custom_pipelines", {"text-classification": {"impl": "evil.Pipeline"}}),
    ],
)
def test_80_a_configuration_that_makes_another_model_of_the_same_weights(
    process: Process, result: Result, key: str, value: object
) -> None:
    evil = changed(process, result, configuration={**of(result).configuration, key: value})
    with pytest.raises(ConsentError, match=f"the published configuration has {key} = "):
        process.send("hotel", evil)


def test_80_a_configuration_file_that_is_not_the_configuration_that_was_shown(process: Process, result: Result) -> None:
    evil = changed(process, result, files={**of(result).files, "config.json": OTHER})
    with pytest.raises(ConsentError, match=r"config\.json is not the file that this owner would have written"):
        process.send("hotel", evil)


@pytest.mark.parametrize("name", ["modeling.py", "pytorch_model.bin"])
def test_81_an_additional_file_such_as_code(process: Process, result: Result, name: str) -> None:
    evil = changed(process, result, files={**of(result).files, name: OTHER})
    with pytest.raises(ConsentError, match=f"has an additional file {name}"):
        process.send("hotel", evil)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_81_weights_or_a_tokenizer_of_the_coordinator_s_own(process: Process, result: Result, name: str) -> None:
    evil = changed(process, result, files={**of(result).files, name: OTHER})
    with pytest.raises(ConsentError, match=f"{name} is not the file that this owner would have written"):
        process.send("hotel", evil)
    without = {other: digest for other, digest in of(result).files.items() if other != name}
    with pytest.raises(ConsentError, match=f"lacks {name}"):
        process.send("hotel", changed(process, result, files=without))


def test_81_code_that_the_base_names_is_not_published() -> None:
    base = {"model_type": "bert", "auto_map": {"AutoModel": "x.Y"}, "text_config": {"auto_map": {}, "hidden_size": 4}}
    config = model_configuration(base, tiny_bert(), Task(labels=("a", "b", "c")))
    assert "auto_map" not in json.dumps(config)
    assert config["text_config"] == {"hidden_size": 4}
    assert config["id2label"] == {"0": "a", "1": "b", "2": "c"}


def with_tested(process: Process, **shown: object) -> dict[str, Any]:
    """Metrics that hotel contributed, and what is published of them."""
    agreement = process.parties.agreement
    owner = Owner(process.parties.files["hotel"])
    models = list(of_models(process))
    owner.state.update_run(
        tested=tuple(TestedRecord(model=model, correct=20, rows=30, metric=0.625) for model in models),
        begun=owner.schedule.events[-1].position,
        is_complete=True,
    )
    honest = {"correct": 20, "predictions": 30, "metric": 0.625}
    assert "hotel" in agreement.shown_owners
    score = SignedScore(**{**honest, **shown})  # type: ignore[arg-type]
    return {model: MEAN.model_copy(update={"by_owner": {"hotel": score}}) for model in models}


def of_models(process: Process) -> Mapping[str, object]:
    return dict.fromkeys(("base", "own_at_home", *process.parties.agreement.methods))


def test_an_owner_signs_metrics_that_show_its_own_as_it_measured_them(process: Process, result: Result) -> None:
    test = with_tested(process, metric=0.625 + 1e-12)
    assert isinstance(process.send("hotel", changed(process, result, test=test)), ResultReceived)


@pytest.mark.parametrize("shown", [{"correct": 29}, {"metric": 0.99}])
def test_82_metrics_that_show_an_owner_better_than_it_is(
    process: Process, result: Result, shown: dict[str, object]
) -> None:
    test = with_tested(process, **shown)
    with pytest.raises(ConsentError, match="published other metrics of base for hotel than were measured here"):
        process.send("hotel", changed(process, result, test=test))


def test_82_metrics_that_omit_an_owner_or_a_model(process: Process, result: Result) -> None:
    test = with_tested(process)
    omitted = {model: mean.model_copy(update={"by_owner": {}}) for model, mean in test.items()}
    with pytest.raises(ConsentError, match="published other metrics of base for hotel than were measured here"):
        process.send("hotel", changed(process, result, test=omitted))
    del test["base"]
    with pytest.raises(RemoteProtocolError, match="metrics of other models than those that were agreed"):
        process.send("hotel", changed(process, result, test=test))


def test_82_what_was_signed_is_not_what_the_receipts_are_under(process: Process, result: Result) -> None:
    """A coordinator that swaps the publication after it has the owners' signatures."""
    better = changed(process, result, examples=10**6)
    signatures = packed([process.send(owner, result) for owner in process.parties.files])
    with pytest.raises(RemoteProtocolError, match="the signature of hotel is not valid"):
        PublishedReceipts.of(process.parties.agreement, better, signatures).check(process.parties.agreement)


@pytest.mark.parametrize("content", [b"{}", b"\xff", b"[" * 5000, b"null"])
def test_82_a_publication_that_is_none(process: Process, result: Result, content: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="does not say in the agreed form what is published"):
        process.send("hotel", signed_anew(process, result, publication=content))


def test_82_a_publication_with_words_that_two_readers_read_differently(process: Process, result: Result) -> None:
    content = result.publication.replace(b'"examples":600', b'"examples":1,"examples":600')
    assert content != result.publication
    with pytest.raises(RemoteProtocolError, match="does not say in the agreed form what is published"):
        process.send("hotel", signed_anew(process, result, publication=content))


# --- what anybody can check ---


@pytest.fixture
def folder(published: tuple[Process, Result, Path], tmp_path: Path) -> Path:
    """A published model with everybody's receipts."""
    return Path(shutil.copytree(published[2], tmp_path / "model"))


def wrong(folder: Path) -> dict[str, str]:
    return {each.what: each.found for each in check_folder(folder).findings if not each.is_signed}


def test_a_published_folder_is_what_everybody_signed(folder: Path) -> None:
    verification = check_folder(folder)
    assert verification.is_signed
    assert verification.signed_by == ["hotel", "cinema", "phones"]
    assert {"config.json", "model.safetensors", "README.md"} <= {each.what for each in verification.findings}


def test_receipts_of_another_agreement_are_named_before_all_that_differs(folder: Path, tmp_path: Path) -> None:
    receipts = PublishedReceipts.model_validate_json((folder / RECEIPTS).read_bytes())
    own = tmp_path / "receipts.json"
    own.write_bytes(receipts.content())
    assert check_folder(folder, own).is_signed
    other = receipts.model_copy(update={"agreement": {**receipts.agreement, "title": "Another"}})
    (folder / RECEIPTS).write_bytes(other.content())
    first, *_ = (each for each in check_folder(folder, own).findings if not each.is_signed)
    assert (first.what, first.found[:50]) == ("agreement", "the owner's receipts are of another agreement than")


def test_83_a_published_configuration_is_changed_later(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_act": "relu", "auto_map": {"AutoModel": "evil.Model"}, "id2label": {"0": "good", "1": "bad"}}
    (folder / "config.json").write_text(json.dumps(config))
    found = wrong(folder)
    assert found["config.json"] == "changed since it was signed"
    assert found["config.json: hidden_act"] == "relu; signed was gelu"
    assert found["config.json: auto_map"].endswith("signed was missing")
    assert "config.json: id2label" in found


def test_83_weights_and_cards_are_changed_or_taken_away_later(folder: Path) -> None:
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    (folder / CARD).write_text("Accuracy: 100 %")
    (folder / "tokenizer.json").unlink()
    assert wrong(folder) == {
        "model.safetensors": "changed since it was signed",
        CARD: "changed since it was signed",
        "tokenizer.json": "missing",
    }


def test_83_code_is_added_later(folder: Path) -> None:
    (folder / "modeling.py").write_text("import os")
    (folder / "deep").mkdir()
    (folder / "deep" / "weights.pkl").write_bytes(b"")
    (folder / "\x1b[2Jx").symlink_to("/etc")
    assert wrong(folder) == {
        "modeling.py": "not signed: code, never load it",
        "deep/weights.pkl": "not signed: code, never load it",
        r"\x1b[2Jx": "not signed: an additional file",
    }


def test_248_another_model_beside_the_one_that_was_signed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A download in which whoever names it loads what lies at the top: `from_pretrained("download")`."""
    download = tmp_path / "download"
    shutil.copytree(folder, download)
    (download / "model.safetensors").write_bytes(b"another model")
    (download / "modeling.py").write_text("import os")
    (download / "\x1b[2Jx").mkdir()
    for name in (".amalgram", "progress.jsonl", "report.html", "run.lock", ".gitattributes"):
        (download / name).touch()  # what runs and the hub leave
    shutil.copytree(folder, download / "model")
    beside = {path.name for path in folder.iterdir()} | {"modeling.py"}
    found = wrong(download)
    assert found.keys() == beside | {r"\x1b[2Jx"}
    assert found["modeling.py"] == "not signed: code, never load it"
    assert found["model.safetensors"] == found[RECEIPTS] == "not signed: an additional file"
    capsys.readouterr()
    assert cli(["verify", str(download)], standalone_mode=False) == 1
    said = capsys.readouterr().out
    assert f"compared     {download}/model\n{download} IS NOT WHAT WAS SIGNED.\n" in said
    for name in beside:
        (download / name).unlink()
    (download / "\x1b[2Jx").rmdir()
    assert cli(["verify", str(download)], standalone_mode=False) == 0
    said = capsys.readouterr().out
    assert f"{download}/model is what they signed.\n{download}/report.html is not signed" in said


def test_84_receipts_with_a_signature_of_somebody_else_or_too_few(folder: Path) -> None:
    receipts = json.loads((folder / RECEIPTS).read_text())
    receipts["owners"]["hotel"] = receipts["owners"]["cinema"]
    (folder / RECEIPTS).write_text(json.dumps(receipts))
    assert wrong(folder) == {"signatures": "the signature of hotel is not valid (29 sign receipt of a result)"}
    del receipts["owners"]["hotel"]
    (folder / RECEIPTS).write_text(json.dumps(receipts))
    assert "2 owners signed" in wrong(folder)["signatures"]
    assert check_folder(folder).signed_by == []


def test_84_receipts_of_a_result_that_the_coordinator_did_not_sign(folder: Path) -> None:
    receipts = json.loads((folder / RECEIPTS).read_text())
    receipts["coordinator"] = "00" * 64
    (folder / RECEIPTS).write_text(json.dumps(receipts))
    assert "the signature of coordinator is not valid" in wrong(folder)["signatures"]


def test_84_receipts_whose_publication_was_rewritten_to_fit_the_folder(folder: Path) -> None:
    (folder / "modeling.py").write_text("import os")
    receipts = json.loads((folder / RECEIPTS).read_text())
    receipts["publication"]["files"] = published_folder(folder).files
    (folder / RECEIPTS).write_text(json.dumps(receipts))
    assert list(wrong(folder)) == ["signatures"]


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100_000, b"\xff", b'{"agreement": {}}'])
def test_84_receipts_that_are_none(folder: Path, content: bytes) -> None:
    (folder / RECEIPTS).write_bytes(content)
    with pytest.raises(SettingsError, match="this release cannot read these receipts"):
        check_folder(folder)
