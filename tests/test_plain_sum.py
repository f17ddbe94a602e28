"""The plain sum: equal to adding up, through every message; owners that drop; peers that break the rules."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import LocalProtocolError, RemoteProtocolError, TooFewOwners
from common.messages import Finish, Message, PartReceived, PartRequest, SumOpened, VectorPart
from common.summation import SUMMATIONS, fixed_point, plain, protocol
from common.summation.protocol import SumTerms, Total
from common.tensor_layout import TensorEntry, TensorLayout
from tests.support.sums import identities_of, layout_of, repeating_bytes, run, sum_of, terms_of, vectors_of

THREE = identities_of(3)
OWNERS = tuple(THREE)
OTHER = "cd" * 32


@pytest.fixture
def tiny_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of three numbers, so that a small vector has several."""
    cut = TensorLayout.part_slices
    monkeypatch.setattr(TensorLayout, "part_slices", lambda self, bytes_per_number: cut(self, bytes_per_number, 24))


@given(size=st.integers(1, 40), count=st.integers(2, 6), seed=st.integers(0, 2**32 - 1))
def test_total_equals_adding_the_vectors(size: int, count: int, seed: int) -> None:
    identities, layout = identities_of(count), layout_of(size)
    terms, vectors = terms_of(identities, layout), vectors_of(identities, layout, seed)
    total = run("plain", identities, terms, vectors)
    np.testing.assert_array_equal(total.vector, sum_of(terms, vectors, list(identities)))
    np.testing.assert_allclose(total.vector, sum(vectors.values()), atol=1e-15)
    np.testing.assert_array_equal(total["t0"], total.vector)
    assert total.num_owners == count


@pytest.mark.usefixtures("tiny_parts")
def test_total_over_several_parts_equals_adding_the_vectors() -> None:
    vectors = {owner: np.arange(10.0) / 4 * index for index, owner in enumerate(OWNERS)}
    total = run("plain", THREE, terms_of(THREE, layout_of(10)), vectors)
    np.testing.assert_array_equal(total.vector, np.arange(10.0) / 4 * 3)


@pytest.mark.usefixtures("tiny_parts")
@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_an_owner_lost_at_any_step_is_in_no_part_of_the_total(step: int) -> None:
    vectors = {owner: np.ones(9) for owner in OWNERS}
    total = run("plain", THREE, terms_of(THREE, layout_of(9), needed=2), vectors, {"o1": step})
    assert total.owners == ("o0", "o2")
    np.testing.assert_array_equal(total.vector, np.full(9, 2.0))


def test_too_few_owners_stop_the_sum() -> None:
    vectors = {owner: np.ones(4) for owner in OWNERS}
    with pytest.raises(TooFewOwners, match=r"2 owners are left at step open, the agreement needs 3; dropped out: o1"):
        run("plain", THREE, terms_of(THREE, layout_of(4)), vectors, {"o1": 0})
    with pytest.raises(TooFewOwners):
        plain.PlainCoordinator(terms_of(THREE, layout_of(4)), ("o0",))


TERMS = terms_of(THREE, layout_of(4))
SESSION = TERMS.request.session


def uploading() -> plain.PlainCoordinator:
    """A coordinator that waits for part 0 of every owner."""
    side = plain.PlainCoordinator(TERMS, OWNERS)
    for owner in side.requests():
        side.receive(owner, SumOpened(session=SESSION, owner=owner))
    side.end_step()
    side.requests()
    return side


def encoded(value: float) -> np.ndarray:
    return fixed_point.encode(TERMS.layout, np.full(4, value), len(THREE))


GOOD_PART = VectorPart(session=SESSION, owner="o0", part=0, payload=encoded(1.0))


@pytest.mark.parametrize(
    ("sender", "reply"),
    [
        ("o0", SumOpened(session=SESSION, owner="o0")),
        ("o0", Finish(run=SESSION)),
        ("o0", PartReceived(run=SESSION, owner="o0", position=0, part=0)),
        ("o1", GOOD_PART),
        ("eve", replace(GOOD_PART, owner="eve")),
        ("o0", replace(GOOD_PART, session=OTHER)),
        ("o0", replace(GOOD_PART, part=1)),
        ("o0", replace(GOOD_PART, payload=GOOD_PART.payload[:3])),
        ("o0", replace(GOOD_PART, payload=np.zeros(5, "<u8"))),
        ("o0", replace(GOOD_PART, payload=np.ones(4, dtype=np.float32))),
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
    side.receive("o0", GOOD_PART)
    with pytest.raises(RemoteProtocolError, match="answered twice"):
        side.receive("o0", GOOD_PART)


def test_the_total_cannot_be_asked_for_early_nor_a_step_ended_early() -> None:
    side = uploading()
    with pytest.raises(LocalProtocolError, match="total was requested in phase upload"):
        side.total()
    with pytest.raises(LocalProtocolError, match="while waiting for o0, o1, o2"):
        side.end_step()


@pytest.mark.parametrize(
    "request_", [PartRequest(session=SESSION, part=1), PartRequest(session=OTHER, part=0), Finish(run=SESSION)]
)
def test_an_owner_gives_only_parts_of_its_session(request_: Message) -> None:
    owner, _ = plain.PlainOwner.open(TERMS, THREE["o0"], repeating_bytes())
    with pytest.raises(RemoteProtocolError):
        owner.answer(request_, encoded(1.0), repeating_bytes())


@pytest.mark.usefixtures("tiny_parts")
def test_an_owner_gives_every_part_one_process_per_message() -> None:
    terms = terms_of(THREE, layout_of(7))
    vector = np.arange(7, dtype="<u8")
    owner, _ = plain.PlainOwner.open(terms, THREE["o0"], repeating_bytes())
    sent = []
    for part in range(3):
        owner = plain.PlainOwner.from_json(owner.to_json(), terms, THREE["o0"])
        owner, reply = owner.answer(PartRequest(session=SESSION_OF[7], part=part), vector, repeating_bytes())
        sent.append(reply.payload)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(np.concatenate(sent), vector)


SESSION_OF = {7: terms_of(THREE, layout_of(7)).request.session}


def test_terms_refuse_a_request_for_another_layout() -> None:
    with pytest.raises(LocalProtocolError):
        SumTerms(request=TERMS.request, layout=layout_of(5), roster=TERMS.roster, needed_owners=2)


def test_both_sides_of_every_kind_of_sum_have_all_the_steps() -> None:
    for kind in SUMMATIONS.values():
        for side, steps in ((kind.owner, protocol.OwnerSide), (kind.coordinator, protocol.CoordinatorSide)):
            names = {name for name in vars(steps) if not name.startswith("_")}
            assert names <= set(dir(side))


def test_a_total_reads_its_tensors_by_name_until_it_is_destroyed() -> None:
    layout = TensorLayout(
        (
            TensorEntry(name="a", shape=(2,), bound=1),
            TensorEntry(name="g", shape=(2, 2), bound=1, packing="symmetric"),
        )
    )
    total = Total(layout=layout, vector=np.array([1.0, 2, 3, 4, 5]), owners=OWNERS, roster_size=3)
    np.testing.assert_array_equal(total["g"], [[3, 4], [4, 5]])
    total.destroy()
    assert np.isnan(total["a"]).all()
