"""The plain sum: equal to adding up, through every message; owners that drop; peers that break the rules."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import LocalProtocolError, RemoteProtocolError, TooFewOwners
from common.messages import CandidateReceived, Finish, Message, OpenSum, PartRequest, SumOpened, VectorPart
from common.summation import SUMMATIONS, plain, protocol
from common.summation.protocol import SessionBroken, SumTerms, Total, run_in_memory
from common.tensor_layout import TensorEntry, TensorLayout

SESSION, OTHER = "ab" * 32, "cd" * 32
OWNERS = ("ada", "bea", "cyd")


def terms_for(layout: TensorLayout, owners: tuple[str, ...] = OWNERS, needed: int = 2) -> SumTerms:
    request = OpenSum(
        run=OTHER,
        agreement_digest=OTHER,
        session=SESSION,
        statistic="contribution",
        models="",
        layout_digest=layout.digest(),
    )
    return SumTerms(request=request, layout=layout, participants=owners, needed_owners=needed)


def layout_of(size: int) -> TensorLayout:
    return TensorLayout((TensorEntry(name="t", shape=(size,)),))


@pytest.fixture
def tiny_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of three numbers, so that a small vector has several."""
    cut = TensorLayout.part_slices
    monkeypatch.setattr(TensorLayout, "part_slices", lambda self, bytes_per_number: cut(self, bytes_per_number, 24))


@given(size=st.integers(1, 40), count=st.integers(2, 6), seed=st.integers(0, 2**32 - 1))
def test_total_equals_adding_the_vectors(size: int, count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    vectors = {f"o{index}": random.standard_normal(size) for index in range(count)}
    layout = layout_of(size)
    total = run_in_memory(SUMMATIONS["plain"], terms_for(layout, tuple(vectors)), vectors)
    np.testing.assert_array_equal(total.vector, sum(vectors.values(), np.zeros(size)))
    np.testing.assert_array_equal(total["t"], total.vector)
    assert total.num_owners == count


@pytest.mark.usefixtures("tiny_parts")
def test_total_over_several_parts_equals_adding_the_vectors() -> None:
    vectors = {owner: np.arange(10.0) * (index + 1) for index, owner in enumerate(OWNERS)}
    total = run_in_memory(SUMMATIONS["plain"], terms_for(layout_of(10)), vectors)
    np.testing.assert_array_equal(total.vector, np.arange(10.0) * 6)


def test_an_owner_lost_before_its_upload_is_left_out() -> None:
    vectors = {owner: np.ones(4) for owner in OWNERS}
    total = run_in_memory(SUMMATIONS["plain"], terms_for(layout_of(4)), vectors, lost_at={"bea": 0})
    assert total.owners == ("ada", "cyd")
    np.testing.assert_array_equal(total.vector, np.full(4, 2.0))


@pytest.mark.usefixtures("tiny_parts")
@pytest.mark.parametrize("step", [1, 2, 3])
def test_an_owner_lost_in_its_upload_breaks_the_session(step: int) -> None:
    vectors = {owner: np.ones(9) for owner in OWNERS}
    with pytest.raises(SessionBroken, match="bea"):
        run_in_memory(SUMMATIONS["plain"], terms_for(layout_of(9)), vectors, lost_at={"bea": step})


def test_too_few_owners_stop_the_sum() -> None:
    vectors = {owner: np.ones(4) for owner in OWNERS}
    with pytest.raises(TooFewOwners, match=r"2 owners are left at step open 0 \(ada, cyd\); the agreement needs 3"):
        run_in_memory(SUMMATIONS["plain"], terms_for(layout_of(4), needed=3), vectors, lost_at={"bea": 0})
    with pytest.raises(TooFewOwners):
        plain.PlainCoordinator(terms_for(layout_of(4), owners=("ada",)))


def uploading() -> plain.PlainCoordinator:
    """A coordinator that waits for part 0 of every owner."""
    side = plain.PlainCoordinator(terms_for(layout_of(4)))
    for owner in side.requests():
        side.receive(owner, SumOpened(session=SESSION, owner=owner))
    side.end_step()
    side.requests()
    return side


GOOD_PART = VectorPart(session=SESSION, owner="ada", part=0, payload=np.ones(4))


@pytest.mark.parametrize(
    ("sender", "reply"),
    [
        ("ada", SumOpened(session=SESSION, owner="ada")),
        ("ada", Finish(run=SESSION)),
        ("ada", CandidateReceived(run=SESSION, owner="ada", model="average", part=0)),
        ("bea", GOOD_PART),
        ("dan", replace(GOOD_PART, owner="dan")),
        ("ada", replace(GOOD_PART, session=OTHER)),
        ("ada", replace(GOOD_PART, part=1)),
        ("ada", replace(GOOD_PART, payload=np.ones(3))),
        ("ada", replace(GOOD_PART, payload=np.ones(5))),
        ("ada", replace(GOOD_PART, payload=np.ones(4, dtype=np.float32))),
        ("ada", replace(GOOD_PART, payload=np.array([1, np.nan, 1, 1]))),
        ("ada", replace(GOOD_PART, payload=np.array([1, np.inf, 1, 1]))),
    ],
)
def test_a_reply_that_was_not_asked_for_is_refused_and_changes_nothing(sender: str, reply: Message) -> None:
    side = uploading()
    with pytest.raises(RemoteProtocolError):
        side.receive(sender, reply)
    for owner in OWNERS:
        side.receive(owner, replace(GOOD_PART, owner=owner))
    side.end_step()
    np.testing.assert_array_equal(side.total().vector, np.full(4, 3.0))


def test_a_second_upload_of_one_part_is_refused() -> None:
    side = uploading()
    side.receive("ada", GOOD_PART)
    with pytest.raises(RemoteProtocolError, match="answered twice"):
        side.receive("ada", GOOD_PART)


def test_the_total_cannot_be_asked_for_early_nor_a_step_ended_early() -> None:
    side = uploading()
    with pytest.raises(LocalProtocolError, match="total was asked for in phase uploading"):
        side.total()
    with pytest.raises(LocalProtocolError, match="while waiting for ada, bea, cyd"):
        side.end_step()


@pytest.mark.usefixtures("tiny_parts")
@pytest.mark.parametrize(
    "request_", [PartRequest(session=SESSION, part=1), PartRequest(session=OTHER, part=0), Finish(run=SESSION)]
)
def test_an_owner_gives_only_the_next_part_of_its_session(request_: Message) -> None:
    owner, _ = plain.PlainOwner.open(terms_for(layout_of(9)).request, "ada", layout_of(9))
    with pytest.raises(RemoteProtocolError):
        owner.answer(request_, np.ones(9))


@pytest.mark.usefixtures("tiny_parts")
def test_an_owner_gives_every_part_once_and_then_no_more() -> None:
    vector = np.arange(7.0)
    owner, _ = plain.PlainOwner.open(terms_for(layout_of(7)).request, "ada", layout_of(7))
    sent = []
    for part in range(3):
        assert not owner.is_done
        owner = plain.PlainOwner.from_json(owner.to_json(), layout_of(7))  # a new process for every message
        owner, reply = owner.answer(PartRequest(session=SESSION, part=part), vector)
        sent.append(reply.payload)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(np.concatenate(sent), vector)
    assert owner.is_done
    with pytest.raises(RemoteProtocolError):
        owner.answer(PartRequest(session=SESSION, part=0), vector)


def test_terms_refuse_a_request_for_another_layout() -> None:
    with pytest.raises(LocalProtocolError):
        SumTerms(request=terms_for(layout_of(4)).request, layout=layout_of(5), participants=OWNERS, needed_owners=2)


def test_both_sides_of_every_kind_of_sum_have_all_the_steps() -> None:
    for kind in SUMMATIONS.values():
        for side, steps in ((kind.owner, protocol.OwnerSide), (kind.coordinator, protocol.CoordinatorSide)):
            names = {name for name in vars(steps) if not name.startswith("_")}
            assert names <= set(dir(side))


def test_a_total_reads_its_tensors_by_name() -> None:
    layout = TensorLayout((TensorEntry(name="a", shape=(2,)), TensorEntry(name="g", shape=(2, 2), packing="symmetric")))
    total = Total(layout=layout, vector=np.array([1.0, 2, 3, 4, 5]), owners=OWNERS)
    np.testing.assert_array_equal(total["g"], [[3, 4], [4, 5]])
