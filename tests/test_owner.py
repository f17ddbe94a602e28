"""One owner, message by message: it answers what was agreed, refuses the rest, and keeps its files to itself."""

import hashlib
import json
import shutil
import stat
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.supercore.task_identity import TaskIdentity

from client.app import app
from client.owner import Owner
from client.workbench import Workbench
from common.certificates import Delivered
from common.errors import AmalgramError, ConsentError, DataError, RemoteProtocolError, SettingsError
from common.identity import Identity, write_identity
from common.messages import (
    CandidatePart,
    Finish,
    Finished,
    Message,
    PartReceived,
    PartRequest,
    Refusal,
)
from common.models.adapter import is_adapter
from common.models.delta import VectorDelta
from common.schedule import Delivery, Round, schedule_of
from common.settings_file import write_settings
from common.tensor_layout import TensorLayout
from common.wire import from_record, to_record
from deploy.commands.agree import consent_text, give_consent
from tests.support.full_disk import file_size_limited
from tests.support.owner_process import (
    OTHER,
    RUN,
    Process,
    delivered_by,
    fast_forward,
    opening_of,
    part_of,
    roll_call,
    signed_delivery,
)
from tests.support.parties import Parties, parties_of

SESSION = OTHER  # of a request that belongs to no sum


@pytest.fixture
def party(parties: Parties) -> Path:
    """The settings file of an owner that has answered the roll call."""
    Owner(parties.files["hotel"]).answer(roll_call(parties))
    return parties.files["hotel"]


def candidate(parties: Parties) -> CandidatePart:
    """The test candidate of `average`, without any change."""
    part = part_of(parties, slot_of(parties))
    assert isinstance(part, CandidatePart)
    return part


def slot_of(parties: Parties, method: str = "average") -> Delivery:
    return schedule_of(parties.agreement, parties.plan).deliveries("candidate", method=method, split="test")[0]


def contribution_round(parties: Parties) -> Round:
    return schedule_of(parties.agreement, parties.plan).find("contribution")


@pytest.fixture
def ready(parties: Parties, party: Path) -> Path:
    """The owner, to which the test candidate of `average` is due."""
    fast_forward(Owner(party), slot_of(parties).position)
    return party


def answer(parties: Parties, owner: str, message: Message) -> Message:
    return Owner(parties.files[owner]).answer(message)  # built anew: nothing may live in memory


def test_owners_answer_a_whole_run_one_process_per_message(parties: Parties) -> None:
    process = Process(parties)
    total = process.sum(process.open_sum(1))
    assert total["examples"][0] == 3 * 200
    swept = process.deliver_candidates("validation")
    validation = process.schedule.find("metrics", split="validation")
    process.sum(process.open_sum(2, validation, swept))
    sent = [*swept, *process.deliver_candidates("test")]
    metrics = process.sum(process.open_sum(3, process.schedule.find("metrics", split="test"), sent))
    # a candidate of zero change is the base
    assert (metrics["base/mean"] == metrics["average/mean"]).all()
    assert answer(parties, "hotel", Finish(run=RUN)) == Finished(run=RUN, owner="hotel")
    assert not (parties.folder / "state" / "hotel" / "run").exists()


def test_an_owner_answers_only_the_next_event_of_its_schedule(parties: Parties, party: Path) -> None:
    """After the contributions, whatever else the agreement has: refused before anything is computed."""
    schedule = schedule_of(parties.agreement, parties.plan)
    for event in schedule.events[1:]:
        is_round = isinstance(event, Round)
        message = opening_of(parties, event) if is_round else part_of(parties, event)  # type: ignore[arg-type]
        with pytest.raises(RemoteProtocolError, match="but sum of contributions is due"):
            Owner(party).answer(message)
    Owner(party).answer(opening_of(parties, contribution_round(parties)))
    with pytest.raises(RemoteProtocolError, match="but sum of contributions is due"):  # it is not over
        Owner(party).answer(part_of(parties, schedule.events[1]))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["round", "delivery", "beyond the end"])
def test_an_event_is_of_the_kind_that_the_schedule_has_there(kind: str, parties: Parties, party: Path) -> None:
    opening, part = opening_of(parties, contribution_round(parties)), candidate(parties)
    bad: dict[str, Message] = {
        "round": replace(part, position=0),
        "delivery": replace(opening, position=part.position),
        "beyond the end": replace(opening, position=10_000),
    }
    with pytest.raises(RemoteProtocolError, match=r"position 0, which is for|where it sends|of a schedule of"):
        Owner(party).answer(bad[kind])


def test_a_state_folder_of_the_version_before_is_refused(parties: Parties, party: Path) -> None:
    version = parties.folder / "state" / "hotel" / "version"
    for found in ("1", "4", None):
        version.unlink() if found is None else version.write_text(f"{found}\n")
        with pytest.raises(SettingsError, match=f"state of version {found or 1}, this program writes version 5"):
            assert Owner(party).state


def test_state_is_readable_by_the_owner_alone(parties: Parties, party: Path) -> None:
    Owner(party).answer(opening_of(parties, contribution_round(parties)))
    state = parties.folder / "state" / "hotel"
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    files = [path for path in (state / "run").iterdir() if path.is_file()]
    assert {path.name for path in files} >= {"vector.bin", "round.json", "run.json"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_vector_and_secrets_are_gone_once_the_sum_is_open(parties: Parties) -> None:
    process = Process(parties)
    process.sum(process.open_sum(1))
    state = parties.folder / "state" / "hotel" / "run"
    assert not (state / "vector.bin").exists()
    side = json.loads((state / "round.json").read_text())["side"]
    assert not any(side[secret] for secret in ("channel_seed", "mask_seed", "self_seed", "own_shares", "masks", "held"))


@pytest.mark.skipif(sys.platform != "linux", reason="room is taken in advance on Linux alone")
def test_a_full_disk_is_one_line_and_not_the_end_of_the_process(parties: Parties, party: Path) -> None:
    """What is mapped from a file whose blocks are not there yet is written to, and the process killed, much later."""
    answer(parties, "hotel", roll_call(parties))
    state = Owner(party).state
    state.create_array("vector", 1_000_000, "<f8")
    vector = state.folder / "run" / "vector.bin"
    assert vector.stat().st_blocks * 512 >= 8_000_000
    refused = pytest.raises(DataError, match=r"vector.bin: cannot write 8 MB here \(File too large\)")
    with file_size_limited(1_000_000), refused:
        state.create_array("vector", 1_000_000, "<f8")
    assert not vector.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on files stands for a full disk")
def test_a_full_disk_is_one_line_where_a_model_is_written(parties: Parties, party: Path) -> None:
    answer(parties, "hotel", roll_call(parties))
    workbench, unchanged = Owner(party).workbench, VectorDelta(parties.plan)
    with file_size_limited(100_000), pytest.raises(DataError, match="what would be published cannot be written here"):
        workbench.judge_candidate("test", unchanged, may_be_published=True)
    assert not list((workbench.state.folder / "run").glob("scratch"))
    _, _, published = workbench.judge_candidate("test", unchanged, may_be_published=True)
    assert published is not None
    assert set(published.files) >= {"config.json", "model.safetensors"}


def test_what_was_in_order_is_checked_again_once_a_file_has_changed(
    parties: Parties, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks: list[str] = []
    monkeypatch.setattr(Workbench, "check", lambda bench: checks.append(bench.name))
    monkeypatch.setattr("client.owner._in_order", {})
    owner = Owner(parties.files["hotel"])
    rows = owner.home / owner.settings.data.train
    for changed, count in ((None, 1), (None, 1), (rows, 2), (owner.settings_path, 3), (None, 3)):
        if changed is not None:
            changed.touch()
        Owner(parties.files["hotel"]).check()
        assert len(checks) == count


def test_an_owner_without_consent_refuses_before_it_reads_a_row(
    parties: Parties, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Owner, "check", lambda *_: pytest.fail("looked at the rows"))
    (parties.folder / "state" / "hotel" / "consent.json").unlink()
    with pytest.raises(ConsentError, match=r"(?s)nobody has consented to agreement .* amalgram agree"):
        answer(parties, "hotel", roll_call(parties))


def test_an_owner_with_another_identity_refuses(parties: Parties) -> None:
    key = parties.folder / "hotel.key"
    key.unlink()
    (parties.folder / "hotel.pub").unlink()
    write_identity(key, Identity(name="hotel", seed=b"7" * 32))
    (parties.folder / "hotel.ledger").unlink()
    shutil.rmtree(parties.folder / "state" / "hotel")
    give_consent(Owner(parties.files["hotel"]))
    with pytest.raises(ConsentError, match="is not the identity that the agreement names for hotel"):
        answer(parties, "hotel", roll_call(parties))


def test_an_owner_with_too_few_rows_for_a_gram_takes_no_part(parties: Parties, party: Path) -> None:
    """Had it held back that Gram alone, the sum of those who did not would be of fewer owners than agreed."""
    assert list(Owner(party).workbench.contribution())
    privacy = parties.agreement.privacy.model_copy(update={"min_rows_per_dimension": 100.0})
    write_settings(parties.folder / "agreement.toml", parties.agreement.model_copy(update={"privacy": privacy}))
    with pytest.raises(
        DataError, match=r"rows for .* dimensions, the agreement demands 100 per dimension; nothing has"
    ):
        list(Owner(party).workbench.contribution())


def test_a_gram_with_too_few_rows_comes_with_a_way_around_it_that_works(parties: Parties) -> None:
    """What a hint says to write is a parameter, not a part of one; and what refit fits cannot go without a Gram."""
    workbench, fitted = Owner(parties.files["hotel"]).workbench, parties.plan.inputs[-1].name
    refitted = parties.agreement.model_copy(update={"method": "refit"})
    for agreement, gram, way in (
        (parties.agreement, "encoder.wide[0:64]", 'data_free_layers = ["encoder.wide"]'),
        (refitted, "encoder.wide", 'data_free_layers = ["encoder.wide"]'),
        (refitted, fitted, "methods that leave the classifier as it was merged, unlike refit"),
        (refitted, "the classifier's input", "methods that leave the classifier as it was merged, unlike refit"),
    ):
        workbench.__dict__["agreement"] = agreement
        with pytest.raises(DataError) as caught:
            workbench._check_rows(gram, rows=3, dimensions=64)
        assert caught.value.hint.endswith(way)


def test_an_owner_of_fewer_examples_than_a_pooler_has_inputs_takes_part(trained_folder: Path, tmp_path: Path) -> None:
    """Of 40 examples, each of many tokens: the pooler and the classifier, of 64 inputs, see 40 rows."""
    consortium = tmp_path / "consortium"
    shutil.copytree(trained_folder, consortium)
    path = consortium / "agreement.toml"
    path.write_text(path.read_text().replace("measured_examples = 1000 ", "measured_examples = 40 "))
    with parties_of(consortium, tmp_path / "output") as parties:
        owner = Owner(parties.files["hotel"])
        assert parties.agreement.tensors.data_free == ("bert.pooler.dense.weight", "classifier.weight")
        sent = dict(owner.workbench.contribution())
        text = " ".join(consent_text(owner).split())
    assert {"data_free_gram/bert.pooler.dense", "data_free_gram/classifier"} <= sent.keys()
    assert min(float(sent[name][0]) for name in sent if name.startswith("rows/")) >= 64
    assert "These layers have no Gram matrix" in text
    assert "so agreed: bert.pooler.dense, classifier." in text


@pytest.mark.parametrize(
    "what",
    ["digest", "run", "layout", "test metrics", "other deliveries", "model name", "finish", "unopened"],
)
def test_what_was_not_agreed_is_refused_before_anything_is_computed(
    what: str, parties: Parties, party: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for work in ("measure", "score"):
        monkeypatch.setattr(Workbench, work, lambda *_: pytest.fail("computed something"))
    good = opening_of(parties, contribution_round(parties))
    bad: dict[str, Message] = {
        "digest": replace(good, agreement_digest=OTHER),
        "run": replace(good, run=OTHER),
        "layout": replace(good, layout_digest=OTHER),
        "test metrics": replace(good, position=slot_of(parties).position + 10),
        "other deliveries": replace(good, deliveries_digest=OTHER),
        "model name": replace(candidate(parties), model="regmean@0.123"),
        "finish": Finish(run=OTHER),
        "unopened": PartRequest(session=SESSION, part=0),
    }
    with pytest.raises((ConsentError, RemoteProtocolError)):
        Owner(party).answer(bad[what])


@pytest.mark.parametrize("field", ["version", "agreement_digest"])
def test_a_roll_call_of_another_version_or_agreement_is_refused(field: str, parties: Parties) -> None:
    changed = replace(roll_call(parties), **{field: 99 if field == "version" else OTHER})
    with pytest.raises((ConsentError, RemoteProtocolError)):
        Owner(parties.files["hotel"]).answer(changed)


@pytest.mark.parametrize(
    "change", [{"part": 1}, {"parts": 2}, {"payload": np.zeros(3, np.float32)}, {"payload": np.zeros(3, "<u8")}]
)
def test_a_candidate_out_of_order_or_shape_is_refused(change: dict, parties: Parties, ready: Path) -> None:
    with pytest.raises(RemoteProtocolError, match="out of order or with another shape"):
        Owner(ready).answer(replace(candidate(parties), **change))


@pytest.fixture
def three_parts(parties: Parties, monkeypatch: pytest.MonkeyPatch) -> list[CandidatePart]:
    """A candidate that is too large for one message, or for two."""
    whole = candidate(parties)
    part_bytes = 4 * -(-whole.payload.size // 3)
    cut = TensorLayout.part_slices
    monkeypatch.setattr(
        TensorLayout, "part_slices", lambda self, bytes_per_number: cut(self, bytes_per_number, part_bytes)
    )
    pieces = slot_of(parties).layout.part_slices(4)
    assert len(pieces) == 3
    payload = np.random.default_rng(0).normal(scale=1e-3, size=whole.payload.size).astype(np.float32)
    whole = part_of(parties, slot_of(parties), payload)  # type: ignore[assignment]
    return [replace(whole, part=number, parts=3, payload=payload[piece]) for number, piece in enumerate(pieces)]


def test_a_candidate_in_parts_is_taken_whole(three_parts: list[CandidatePart], ready: Path) -> None:
    for message in three_parts:
        assert not Owner(ready).state.run.received
        Owner(ready).answer(message)
    sent = np.concatenate([message.payload for message in three_parts])
    digest = hashlib.sha256(sent.data).hexdigest()
    (received,) = Owner(ready).state.run.delivered
    assert received == Delivered(position=three_parts[0].position, model="average", digest=digest)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "regmean@0.9"},  # agreed on, but for another position
        {"model": "regmean@0.123"},
        {"model": "refit 0"},
        {"position": 0},
        {"position": 3},
        {"position": 10_000},
        {"part": 2},
        {"parts": 2},
        {"run": OTHER},
        {"agreement_digest": OTHER},
        {"payload": np.zeros(3, np.float32)},
    ],
    ids=str,
)
def test_a_candidate_that_changes_between_two_parts_is_refused(
    change: dict, three_parts: list[CandidatePart], ready: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workbench, "score", lambda *_: pytest.fail("computed something"))
    Owner(ready).answer(three_parts[0])
    with pytest.raises((ConsentError, RemoteProtocolError)):
        Owner(ready).answer(replace(three_parts[1], **change))
    Owner(ready).answer(three_parts[1])  # what was refused changed nothing
    with pytest.raises((ConsentError, RemoteProtocolError)):
        Owner(ready).answer(replace(three_parts[2], **{"part": 1} if change == {"part": 2} else change))
    assert not Owner(ready).state.run.received


def test_a_part_continues_the_candidate_that_was_begun_last_and_no_other(
    three_parts: list[CandidatePart], parties: Parties, ready: Path
) -> None:
    """Of the candidates that may be published for a method, one is sent; while it arrives, another may replace it."""
    position = slot_of(parties, "regmean").position
    fast_forward(Owner(ready), position)
    first, second, third = (replace(part, position=position, model="regmean@0.5") for part in three_parts)
    Owner(ready).answer(first)
    Owner(ready).answer(replace(first, model="regmean@0.9"))
    with pytest.raises(RemoteProtocolError, match="out of order"):
        Owner(ready).answer(second)
    Owner(ready).answer(replace(second, model="regmean@0.9"))
    Owner(ready).answer(roll_call(parties, OTHER))  # a new run knows nothing of an earlier one's parts
    fast_forward(Owner(ready), position)
    with pytest.raises(RemoteProtocolError, match="out of order"):
        Owner(ready).answer(replace(third, model="regmean@0.9", run=OTHER))


@pytest.mark.parametrize("number", [np.nan, -np.inf, 2.0**41])
def test_a_candidate_that_is_not_finite_is_refused(parties: Parties, ready: Path, number: float) -> None:
    broken = candidate(parties)
    broken.payload[5] = number
    with pytest.raises(RemoteProtocolError, match="not finite"):
        Owner(ready).answer(broken)


def test_246_what_the_coordinator_did_not_sign_is_not_taken(
    parties: Parties, ready: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise an owner could not show what it was sent. A signature is for one delivery of one run and agreement."""
    monkeypatch.setattr(Workbench, "score", lambda *_: pytest.fail("computed something"))
    part = candidate(parties)
    sent, other = delivered_by(part), parties.agreement.model_copy(update={"title": "Another"})
    for signature in (
        bytes(64),
        signed_delivery(parties, replace(sent, digest="ab" * 32)),
        signed_delivery(parties, replace(sent, position=sent.position + 1)),
        signed_delivery(parties, replace(sent, model="regmean@0.9")),
        signed_delivery(parties, sent, OTHER),
        signed_delivery(replace(parties, agreement=other), sent),
        signed_delivery(replace(parties, identities={"coordinator": parties.identities["cinema"]}), sent),
    ):
        with pytest.raises(RemoteProtocolError, match="the signature of coordinator is not valid"):
            Owner(ready).answer(replace(part, signature=signature))
    assert not Owner(ready).state.run.received


def test_a_delivery_is_repeated_bit_for_bit_or_refused(parties: Parties, ready: Path) -> None:
    """A coordinator that was started again repeats what it sent last, also when the next event has begun."""
    part = candidate(parties)
    Owner(ready).answer(part)
    Owner(ready).answer(part_of(parties, slot_of(parties, "task_arithmetic")))
    before = Owner(ready).state.run
    assert isinstance(Owner(ready).answer(part), PartReceived)
    assert Owner(ready).state.run == before
    with pytest.raises(ConsentError, match="a second version of average"):
        Owner(ready).answer(replace(part, payload=part.payload + 1))
    assert Owner(ready).state.run.received == before.received


def test_metrics_of_a_candidate_that_was_never_sent_are_refused(parties: Parties, ready: Path) -> None:
    schedule = schedule_of(parties.agreement, parties.plan)
    with pytest.raises(RemoteProtocolError, match="average candidate for test is due"):
        Owner(ready).answer(opening_of(parties, schedule.find("metrics", split="test")))


def test_an_owner_with_another_base_model_refuses(parties: Parties, tmp_path: Path) -> None:
    other = Owner(parties.files["hotel"]).workbench.load_base()
    next(other.parameters()).data[0] += 1
    other.save_pretrained(tmp_path / "other")
    for path in parties.base.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "other")
    settings = parties.files["hotel"].read_text().replace(str(parties.base), str(tmp_path / "other"))
    parties.files["hotel"].write_text(settings)
    with pytest.raises(AmalgramError, match="this is another base model"):
        Owner(parties.files["hotel"]).answer(roll_call(parties))


def test_a_model_made_here_is_kept_and_remade_only_when_its_recipe_changes(parties_that_train: Parties) -> None:
    party = parties_that_train.files["hotel"]
    owner = Owner(party)
    one = owner.workbench.own_model()
    made = (owner.state.fine_tuned_folder / "model.safetensors").stat().st_mtime_ns
    Owner(party).workbench.own_model()
    assert (owner.state.fine_tuned_folder / "model.safetensors").stat().st_mtime_ns == made
    party.write_text(party.read_text().replace("epochs = 6", "epochs = 1"))
    other = Owner(party).workbench.own_model()
    assert any((a != b).any() for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_model_made_here_by_lora_is_kept_as_a_whole_model(parties_that_train: Parties) -> None:
    party = parties_that_train.files["hotel"]
    party.write_text(party.read_text().replace("epochs = 6", "epochs = 1\nlora_rank = 2\npatience = 1"))
    owner = Owner(party)
    own, base = owner.workbench.own_model().state_dict(), owner.workbench.load_base().state_dict()
    assert not is_adapter(owner.state.fine_tuned_folder)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert 1 <= torch.linalg.matrix_rank(own[name] - base[name], rtol=1e-3) <= 2


# --- through the Flower app -------------------------------------------------------------------------------------------


def through_app(settings: Path, message: Message) -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    context = Context(run_id=1, node_id=2, node_config={"settings": str(settings)}, state=RecordDict(), run_config={})
    reply = app(FlowerMessage(to_record((message,)), dst_node_id=2, message_type="train.step"), context)
    assert not context.state  # nothing is kept where Flower, and whoever reads it, could see it
    (answer,) = from_record(reply.content)
    return answer


def test_an_error_leaves_as_a_code_and_stays_as_a_text(parties: Parties, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise DataError("row 7 says Mrs Smith")

    monkeypatch.setattr(Owner, "check", fail)
    assert through_app(parties.files["hotel"], roll_call(parties)) == Refusal(code="data")
    error = parties.folder / "state" / "hotel" / "error.txt"
    assert error.read_text() == "row 7 says Mrs Smith\n"
    assert stat.S_IMODE(error.stat().st_mode) == 0o600


def test_an_unexpected_exception_leaves_as_a_code_too(parties: Parties, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("Mrs Smith")

    monkeypatch.setattr(Owner, "check", fail)
    assert through_app(parties.files["hotel"], roll_call(parties)) == Refusal(code="unexpected")
    assert "Mrs Smith" in (parties.folder / "state" / "hotel" / "error.txt").read_text()


def test_a_refusal_leaves_nothing_in_another_owner_s_folder(parties: Parties) -> None:
    """Its text could quote a row, and the other owner would read it."""
    cinema = parties.files["cinema"]
    cinema.write_text(cinema.read_text().replace("state/cinema", "state/hotel"))
    assert through_app(cinema, roll_call(parties)) == Refusal(code="settings")
    assert not (parties.folder / "state" / "hotel" / "error.txt").exists()


def test_a_node_without_an_owner_refuses(parties: Parties, tmp_path: Path) -> None:
    assert through_app(tmp_path / "nothing.toml", roll_call(parties)) == Refusal(code="settings")


def test_a_message_that_is_none_is_refused(parties: Parties) -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    settings = str(parties.files["hotel"])
    context = Context(run_id=1, node_id=2, node_config={"settings": settings}, state=RecordDict(), run_config={})
    reply = app(FlowerMessage(RecordDict(), dst_node_id=2, message_type="train.step"), context)
    assert from_record(reply.content) == (Refusal(code="protocol"),)
