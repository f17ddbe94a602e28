"""Packets: how many messages a merge sends an owner, and that each message is answered as if it had come alone."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.supercore.task_identity import TaskIdentity

import server.exchange
from client.app import app
from client.owner import Owner
from common.agreement import Agreement
from common.errors import RemoteProtocolError
from common.messages import (
    Acknowledgements,
    CandidatePart,
    CheckKeys,
    CorrectionPart,
    Draw,
    Finish,
    KeyBook,
    KeyShares,
    MergedStepPart,
    Message,
    OpenSum,
    Packet,
    PartReceived,
    Receipts,
    Refusal,
    Result,
    RollCall,
    SurvivorList,
    UploadsOpened,
    VectorPart,
    check_packet,
)
from common.schedule import schedule_of
from common.tensor_layout import TensorLayout
from common.wire import from_record, to_record
from deploy.simulation.in_process_grid import through_serialisation
from server.merge import run_merge
from tests.support.owner_process import fast_forward, part_of, roll_call
from tests.support.parties import OwnersChannel, Parties, parties_of
from tests.support.scripted_owners import DELIVERY, ROUND, TEST_ROUND, ScriptedChannel, coordinator_of, honest

Kinds = tuple[type[Message], ...]
RUN, HEX = "ab" * 32, "cd" * 32
SUM: list[Kinds] = [(KeyBook,), (KeyShares,), (SurvivorList,), (Acknowledgements,)]  # what follows its OpenSum
PART = CandidatePart(
    run=RUN,
    agreement_digest=HEX,
    position=1,
    model="m",
    part=0,
    parts=1,
    payload=np.zeros(3, np.float32),
    signature=bytes(64),
)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the coordinator saves its checkpoint."""
    monkeypatch.chdir(tmp_path)


# --- how many ---


@pytest.fixture
def merge(trained_folder: Path, tmp_path: Path) -> Callable[..., list[Kinds]]:
    """Merges the example with changes to its agreement; what each message to an owner held."""

    def run(*changes: tuple[str, str], verified: bool = False) -> list[Kinds]:
        consortium = Path(
            shutil.copytree(trained_folder, tmp_path / "consortium", ignore=shutil.ignore_patterns("output"))
        )
        draft = consortium / "agreement.toml"
        for one, other in changes:
            assert one in draft.read_text()
            draft.write_text(draft.read_text().replace(one, other))
        output = tmp_path / "output"
        output.mkdir()
        (output / ".amalgram").touch()
        with parties_of(consortium, output, verified=verified) as made:
            channel = OwnersChannel(made.files)
            run_merge(made.coordinator, channel)
            assert not any((made.folder / "state" / name / "run").exists() for name in made.files)
        return channel.kinds

    return run


ALONE = ('["average", "task_arithmetic", "fisher"]', "[]")


def test_regmean_with_one_alpha_sends_an_owner_13_messages(merge: Callable[..., list[Kinds]]) -> None:
    kinds = merge(ALONE, ("alphas = [0.1, 0.5, 0.9, 0.95, 0.99]", "alphas = [0.9]"))
    assert kinds == [(RollCall,), (OpenSum,), *SUM, (CandidatePart, OpenSum), *SUM, (Result,), (Receipts,)]
    assert len(kinds) == 13


def test_regmean_with_five_alphas_sends_an_owner_18_messages(merge: Callable[..., list[Kinds]]) -> None:
    kinds = merge(ALONE)
    validation, test = (*[CandidatePart] * 5, OpenSum), (CandidatePart, OpenSum)
    assert kinds == [(RollCall,), (OpenSum,), *SUM, validation, *SUM, test, *SUM, (Result,), (Receipts,)]
    assert len(kinds) == 18


def test_verifying_a_merge_sends_an_owner_1_message_more(merge: Callable[..., list[Kinds]]) -> None:
    alone = ("alphas = [0.1, 0.5, 0.9, 0.95, 0.99]", "alphas = [0.9]")
    kinds = merge(ALONE, alone, verified=True)
    (book,), (shares,), *rest = SUM
    check = [(CandidatePart, Draw), (CorrectionPart, Draw, OpenSum), (CheckKeys, book), (UploadsOpened, shares)]
    assert kinds == [(RollCall,), (OpenSum,), *SUM, *check, *rest, (UploadsOpened, Result), (Receipts,)]
    assert len(kinds) == 13 + 1


def test_comparing_another_method_costs_no_message(merge: Callable[..., list[Kinds]]) -> None:
    kinds = merge((ALONE[0], '["average"]'), ("alphas = [0.1, 0.5, 0.9, 0.95, 0.99]", "alphas = [0.9]"))
    assert (CandidatePart, CandidatePart, OpenSum) in kinds
    assert len(kinds) == 13


def test_a_verified_sweep_costs_5_messages_also_beside_methods_without_one(merge: Callable[..., list[Kinds]]) -> None:
    kinds = merge((ALONE[0], '["average"]'), ("[0.1, 0.5, 0.9, 0.95, 0.99]", "[0.5, 0.9]"), verified=True)
    assert (CandidatePart, CandidatePart, CandidatePart, Draw) in kinds
    assert kinds.count((CorrectionPart, Draw, OpenSum)) == 1
    assert len(kinds) == 13 + 1 + 5


def test_a_step_of_a_multi_round_method_costs_5_messages(merge: Callable[..., list[Kinds]]) -> None:
    kinds = merge(ALONE, ('method = "regmean"', 'method = "refit"'))
    assert kinds[:11] == [(RollCall,), (OpenSum,), *SUM, (MergedStepPart, OpenSum), *SUM]


def test_candidates_share_packets_as_they_fit(agreement: Agreement, monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates of 28 bytes, in parts of 12 + 12 + 4, when a message may carry 16."""
    cut = TensorLayout.part_slices
    monkeypatch.setattr(TensorLayout, "part_slices", lambda self, bytes_per_number: cut(self, bytes_per_number, 12))
    monkeypatch.setattr(server.exchange, "PART_BYTES", 16)
    coordinator = coordinator_of(agreement, honest, needed=3, kind="plain")
    coordinator.roll_call()
    for name in ("a", "b"):
        coordinator.deliver(DELIVERY, np.arange(7, dtype=np.float32), name)
        assert [each.model for each in coordinator.checkpoint.deliveries] == {"a": [], "b": ["a"]}[name]
    channel = coordinator.channel
    assert isinstance(channel, ScriptedChannel)
    assert channel.sent[1:] == [(CandidatePart,), (CandidatePart, CandidatePart), (CandidatePart,)]
    coordinator.sum(ROUND)
    assert channel.sent[4] == (CandidatePart, CandidatePart, OpenSum)
    assert [(each.model, each.bytes, len(each.owners)) for each in coordinator.checkpoint.deliveries] == [
        ("a", 28, 3),
        ("b", 28, 3),
    ]
    steps = [(step.name, step.phase) for step in coordinator.steps]
    assert steps[1:3] == [("average candidate for test", "candidates to test")] * 2


# --- on the wire ---


def test_a_packet_survives_flower_s_own_serialisation_in_its_order() -> None:
    packet = (PART, Finish(run=RUN), replace(PART, payload=np.ones(3, np.float32)))
    arrived = from_record(through_serialisation(to_record(packet)))
    assert [type(message) for message in arrived] == [CandidatePart, Finish, CandidatePart]
    one, _, other = arrived
    assert isinstance(one, CandidatePart)
    assert isinstance(other, CandidatePart)
    assert (one.payload.tolist(), other.payload.tolist()) == ([0.0] * 3, [1.0] * 3)


def header(run: str = RUN) -> ConfigRecord:
    return ConfigRecord({"kind": "Finish", "run": run})


@pytest.mark.parametrize(
    "record",
    [
        RecordDict({"header 1": header()}),
        RecordDict({"header 0": header(), "header 2": header()}),
        RecordDict({"header 0": header(), "header 00": header()}),
        RecordDict({"header 0": header(), "payload 1": ArrayRecord()}),
        RecordDict({"header 0": header(), "header": header()}),
        RecordDict({"header 0": header(), "header 1": ArrayRecord()}),
    ],
    ids=lambda record: "+".join(record),
)
def test_49_a_packet_with_a_gap_or_with_leftovers_is_refused(record: RecordDict) -> None:
    with pytest.raises(RemoteProtocolError):
        from_record(record)


def test_49_a_packet_of_nothing_or_of_too_much_is_refused() -> None:
    half = VectorPart(session=RUN, owner="ada", part=0, payload=np.zeros(4_000_000, "<u8"))
    check_packet((half, half))
    more = replace(half, payload=np.zeros(4_000_001, "<u8"))
    for packet, says in (
        ((), "holds no message"),
        ((half, more), "carries 64000008 bytes, at most 64000000 are allowed"),
    ):
        with pytest.raises(RemoteProtocolError, match=says):
            check_packet(packet)
        with pytest.raises(RemoteProtocolError, match=says):
            from_record(to_record(packet))


# --- at the owner ---


def through_app(settings: Path, packet: Packet) -> Packet:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    context = Context(run_id=1, node_id=2, node_config={"settings": str(settings)}, state=RecordDict(), run_config={})
    return from_record(app(FlowerMessage(to_record(packet), dst_node_id=2, message_type="train.step"), context).content)


def roll_call_and_candidate(parties: Parties) -> tuple[RollCall, CandidatePart]:
    """What a run begins with, and an agreed candidate without any change, to be tested: the next that hotel expects."""
    (slot,) = schedule_of(parties.agreement, parties.plan).deliveries("candidate", method="average", split="test")
    opening = roll_call(parties)
    through_app(parties.files["hotel"], (opening,))
    fast_forward(Owner(parties.files["hotel"]), slot.position)
    part = part_of(parties, slot)
    assert isinstance(part, CandidatePart)
    return opening, part


def test_49_a_packet_is_answered_up_to_the_first_message_that_is_refused(parties: Parties) -> None:
    settings = parties.files["hotel"]
    opening, good = roll_call_and_candidate(parties)
    (following,) = schedule_of(parties.agreement, parties.plan).deliveries(
        "candidate", method="task_arithmetic", split="test"
    )
    smuggled = replace(good, position=following.position, model="task_arithmetic@0.123")
    answers = through_app(settings, (opening, good, smuggled, replace(smuggled, model=following.names[0])))
    assert [type(answer).__name__ for answer in answers] == ["Present", "PartReceived", "Refusal"]
    assert answers[-1] == Refusal(code="consent")
    received = Owner(settings).state.run.received
    assert [(each.position, each.model) for each in received] == [(good.position, "average")]


def test_49_a_second_model_under_one_name_is_refused_in_one_packet_too(parties: Parties) -> None:
    settings = parties.files["hotel"]
    opening, good = roll_call_and_candidate(parties)
    answers = through_app(settings, (opening, good, replace(good, payload=good.payload + np.float32(1e-3))))
    assert answers[-1] == Refusal(code="consent")
    assert through_app(settings, (good,)) == (PartReceived(run=RUN, owner="hotel", position=good.position, part=0),)


# --- at the coordinator ---


@pytest.mark.parametrize("wrong", ["too few answers", "too many answers", "another owner's", "another part"])
def test_49_an_owner_whose_answers_do_not_fit_its_packet_is_excluded(
    agreement: Agreement, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = ScriptedChannel.answers

    def spoil(self: ScriptedChannel, owner: str, packet: Packet) -> Packet | None:
        honest_answers = answers(self, owner, packet)
        if owner != "bea" or len(packet) == 1 or honest_answers is None:
            return honest_answers
        first, *others = honest_answers
        assert isinstance(first, PartReceived)
        changed: dict[str, Packet] = {
            "too few answers": (first,),
            "too many answers": (*honest_answers, honest_answers[-1]),
            "another owner's": (replace(first, owner="ada"), *others),
            "another part": (replace(first, part=1), *others),
        }
        return changed[wrong]

    monkeypatch.setattr(ScriptedChannel, "answers", spoil)
    coordinator = coordinator_of(agreement, honest, needed=2)
    coordinator.roll_call()
    coordinator.deliver(DELIVERY, np.zeros(7, dtype=np.float32), "average")
    np.testing.assert_array_equal(coordinator.sum(TEST_ROUND).vector, np.full(7, 6.0))
    assert coordinator.dropped_out == {"bea": "sum of test metrics"}
    (sent,) = coordinator.checkpoint.deliveries
    assert sent.owners == ("ada", "cyd")
