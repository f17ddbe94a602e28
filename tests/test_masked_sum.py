"""The masked sum: the same integers as the plain one over the survivors, every dropout, and how an upload looks."""

import json
from contextlib import suppress
from itertools import combinations, pairwise, product
from secrets import token_bytes

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import saved_state
from common.errors import LocalProtocolError, NumericalError, TooFewOwners
from common.messages import Acknowledgements, Finish, KeyBook, KeyShares, MaskedPart, OpenSum, SurvivorList
from common.summation import SUMMATIONS
from common.summation.masked.coordinator import MaskedCoordinator
from common.summation.masked.owner import MaskedOwner
from common.summation.protocol import Opening, SavedOpening, SumTerms, drive
from common.tensor_layout import TensorEntry, TensorLayout
from tests.support.malicious import MaliciousCoordinator
from tests.support.sums import identities_of, layout_of, repeating_bytes, run, sum_of, terms_of, vectors_of

# The requests in a sum of one part; an owner that drops out leaves one of them, and all later ones, unanswered.
STEPS = ("OpenSum", "KeyBook", "KeyShares", "SurvivorList", "Acknowledgements")
IN_THE_SUM_FROM = STEPS.index("SurvivorList")


@st.composite
def sums(draw: st.DrawFn) -> tuple[TensorLayout, int, int]:
    """A layout of several tensors, bounds and packings, in either ring; owners; bytes a part."""
    entries = []
    ring_bits = draw(st.sampled_from((64, 32)))
    for index in range(draw(st.integers(1, 4))):
        bound = draw(st.sampled_from([1e-9, 0.5, 1.0, 1000.0, *([2.0**40] if ring_bits == 64 else [])]))
        if draw(st.booleans()):
            side = draw(st.integers(1, 5))
            entries.append(TensorEntry(name=f"t{index}", shape=(side, side), bound=bound, packing="symmetric"))
        else:
            entries.append(TensorEntry(name=f"t{index}", shape=(draw(st.integers(1, 20)),), bound=bound))
    return (
        TensorLayout(tuple(entries), ring_bits),
        draw(st.integers(3, 6)),
        draw(st.sampled_from([8, 24, 40, 64, 1000])),
    )


@given(sums(), st.data(), st.integers(0, 1000))
def test_masked_and_plain_totals_are_the_same_integers(
    case: tuple[TensorLayout, int, int], data: st.DataObject, seed: int
) -> None:
    layout, count, part_bytes = case
    identities = identities_of(count)
    terms = terms_of(identities, layout, needed=max(3, count - 1) if count > 3 else 3)
    vectors = vectors_of(identities, layout, seed)
    drops = {}
    if count > 3 and data.draw(st.booleans()):
        drops[data.draw(st.sampled_from(sorted(identities)))] = data.draw(st.integers(0, 6))
    cut = TensorLayout.part_slices
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            TensorLayout, "part_slices", lambda self, bytes_per_number: cut(self, bytes_per_number, part_bytes)
        )
        masked = run("masked", identities, terms, vectors, drops, seed)
        survivors = {name: vectors[name] for name in masked.owners}
        plain_terms = SumTerms(request=terms.request, layout=layout, roster=terms.roster, needed_owners=len(survivors))
        plain = run("plain", identities, plain_terms, vectors, dict.fromkeys(set(vectors) - set(survivors), 0))
    assert masked.owners == plain.owners
    assert masked.vector.tobytes() == plain.vector.tobytes()
    np.testing.assert_array_equal(masked.vector, sum_of(terms, vectors, masked.owners))


@pytest.mark.parametrize("count", [3, 4, pytest.param(5, marks=pytest.mark.slow)])
def test_every_group_of_owners_may_drop_at_every_step(count: int) -> None:
    """All subsets at all steps: the sum completes over the survivors, or stops and says where each was heard last."""
    identities, layout = identities_of(count), layout_of(5)
    vectors = vectors_of(identities, layout)
    for needed, colluders in [(3, 0)] + [(4, 1)] * (count > 4):
        terms = terms_of(identities, layout, needed=needed, colluders=colluders)
        least = max(needed, terms.quorum)
        for size in range(count + 1):
            for dropped, step in product(combinations(identities, size), range(len(STEPS))):
                drops = dict.fromkeys(dropped, step)
                if count - size < least:
                    with pytest.raises(TooFewOwners) as caught:
                        run("masked", identities, terms, vectors, drops)
                    assert caught.value.exit_code == 4
                    heard = ["never", "AdvertiseKeys", "ShareKeys", "MaskedInput, part 0", "ConsistencyCheck"][step]
                    assert all(f"{name} (last heard: {heard})" in str(caught.value) for name in dropped)
                    continue
                total = run("masked", identities, terms, vectors, drops)
                summed = [name for name in identities if name not in dropped or step >= IN_THE_SUM_FROM]
                assert list(total.owners) == summed
                np.testing.assert_array_equal(total.vector, sum_of(terms, vectors, summed))


@settings(max_examples=15)
@given(st.dictionaries(st.integers(0, 19), st.integers(0, 6), max_size=9), st.integers(0, 1000))
def test_twenty_owners_with_random_drops(drops: dict[int, int], seed: int) -> None:
    identities, layout = identities_of(20), layout_of(4, 3)
    terms = terms_of(identities, layout, needed=14, colluders=3)
    vectors = vectors_of(identities, layout, seed)
    drops_at = {f"o{index}": step for index, step in drops.items()}
    try:
        total = run("masked", identities, terms, vectors, drops_at, seed)
    except TooFewOwners:
        assert len([step for step in drops.values() if step < len(STEPS)]) > 6
    else:
        np.testing.assert_array_equal(total.vector, sum_of(terms, vectors, total.owners))


def test_a_sparse_graph_of_owners_gives_the_same_sum() -> None:
    identities, layout = identities_of(152), layout_of(6)
    terms = terms_of(identities, layout, needed=150, colluders=8)
    assert terms.neighbourhood.degree < 151
    vectors = vectors_of(identities, layout)
    total = run("masked", identities, terms, vectors, {"o7": 2, "o99": 3})
    assert len(total.owners) == 151
    np.testing.assert_array_equal(total.vector, sum_of(terms, vectors, total.owners))


def uploads(vectors: dict[str, np.ndarray], terms: SumTerms, seed: int = 0) -> dict[str, np.ndarray]:
    """Part 0 of every owner, as the coordinator receives it."""
    seen: dict[str, np.ndarray] = {}
    receive = MaskedCoordinator.receive
    with pytest.MonkeyPatch.context() as patch:

        def watch(self: MaskedCoordinator, owner: str, reply: object) -> None:
            if isinstance(reply, MaskedPart):
                seen[owner] = reply.payload.copy()
            receive(self, owner, reply)  # type: ignore[arg-type]

        patch.setattr(MaskedCoordinator, "receive", watch)
        run("masked", IDENTITIES, terms, vectors, seed=seed)
    return seen


IDENTITIES = identities_of(3)


def test_an_all_zero_vector_s_upload_looks_uniform() -> None:
    layout = layout_of(40_000)
    seen = uploads({name: np.zeros(40_000) for name in IDENTITIES}, terms_of(IDENTITIES, layout))
    for payload in seen.values():
        counts = np.bincount(payload.view("u1"), minlength=256)
        expected = payload.nbytes / 256
        chi_squared = float(((counts - expected) ** 2 / expected).sum())  # 255 degrees of freedom, deviation 22.6
        assert abs(chi_squared - 255) < 6 * 22.6
    differences = [(seen[a] - seen[b]).view("u1") for a, b in combinations(seen, 2)]
    assert all(len(np.unique(difference)) == 256 for difference in differences)


def test_no_mask_is_used_for_two_numbers_two_owners_or_two_rounds() -> None:
    layout = layout_of(500, 500)
    zeros = {name: np.zeros(1000) for name in IDENTITIES}
    one = uploads(zeros, terms_of(IDENTITIES, layout), seed=1)
    later_round = uploads(zeros, terms_of(IDENTITIES, layout, change=lambda r: next_round(r)), seed=2)
    everything = np.concatenate([*one.values(), *later_round.values()])
    assert len(np.unique(everything)) == len(everything)


def next_round(request: OpenSum) -> OpenSum:
    return OpenSum(**{**vars(request), "round": 2})


def test_the_same_keys_are_never_drawn_for_two_sessions() -> None:
    """Even a broken random generator that repeats itself gives other keys in another session."""
    layout = layout_of(3)
    first, _ = MaskedOwner.open(terms_of(IDENTITIES, layout), IDENTITIES["o0"], repeating_bytes())
    second, _ = MaskedOwner.open(terms_of(IDENTITIES, layout, change=next_round), IDENTITIES["o0"], repeating_bytes())
    assert first.mask_seed == second.mask_seed
    assert first._own_entry().mask_key != second._own_entry().mask_key


def test_secrets_do_not_show() -> None:
    owner, _ = MaskedOwner.open(terms_of(IDENTITIES, layout_of(3)), IDENTITIES["o0"], repeating_bytes())
    for secret in (owner.channel_seed, owner.mask_seed, owner.self_seed, IDENTITIES["o0"].seed):
        assert secret.hex() not in repr(owner)
        assert repr(secret) not in repr(owner)


def test_an_owner_continues_from_what_it_wrote_down() -> None:
    """A new process for every message: the state goes through JSON between any two."""
    layout = layout_of(50)
    terms, vectors = terms_of(IDENTITIES, layout), vectors_of(IDENTITIES, layout)
    answer = MaskedOwner.answer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            MaskedOwner,
            "answer",
            lambda self, *inbound: answer(MaskedOwner.from_json(self.to_json(), terms, self.identity), *inbound),
        )
        total = run("masked", IDENTITIES, terms, vectors)
    np.testing.assert_array_equal(total.vector, sum_of(terms, vectors, list(IDENTITIES)))


def test_an_owner_knows_what_has_left_and_what_it_still_needs() -> None:
    """Step by step: whether it offered, whether it is done with its vector, whether it revealed and is complete."""
    evil = MaliciousCoordinator()
    seen = {}
    for kind, then in pairwise((KeyBook, KeyShares, SurvivorList, Acknowledgements, Finish)):
        with suppress(StopIteration):  # after the last step the total is there
            evil.honest_until(then)
        owner = evil.owners["o0"]
        seen[kind.__name__] = (owner.offers, owner.is_done, owner.reveals, owner.is_complete)
    assert seen == {
        "KeyBook": (False, False, False, False),
        "KeyShares": (True, False, False, False),
        "SurvivorList": (True, True, False, False),
        "Acknowledgements": (True, True, True, True),
    }


def test_a_coordinator_opens_a_sum_again_from_what_it_saved() -> None:
    evil = MaliciousCoordinator()
    requests = evil.honest_until(Acknowledgements, dropped=["o4"])
    opening = evil.side.opening()
    assert opening is not None
    saved = json.loads(json.dumps(saved_state.to_json(SavedOpening, opening.state)))
    words = opening.words.copy()
    side = MaskedCoordinator.reopen(evil.terms, Opening(saved_state.from_json(SavedOpening, saved), words))
    assert side.requests() == requests
    for name, request in requests.items():
        side.receive(name, evil.send(name, request))
    side.end_step()
    owners = ["o0", "o1", "o2", "o3"]
    np.testing.assert_array_equal(side.total().vector, sum_of(evil.terms, evil.vectors, owners))


def test_a_vector_that_changed_after_it_was_sent_is_not_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = TensorLayout.part_slices
    monkeypatch.setattr(TensorLayout, "part_slices", lambda self, bytes_per_number: cut(self, bytes_per_number, 16))
    identities, layout = identities_of(4), layout_of(6)
    terms = terms_of(identities, layout, needed=3)
    answer = MaskedOwner.answer

    def tampered(self: MaskedOwner, request: object, encoded: np.ndarray, random_bytes: object) -> object:
        if len(self.part_digests) == 2:
            encoded[0] += np.uint64(1)
        return answer(self, request, encoded, random_bytes)  # type: ignore[arg-type]

    monkeypatch.setattr(MaskedOwner, "answer", tampered)
    with pytest.raises(LocalProtocolError, match="the vector has changed since part 0 was sent"):
        run("masked", identities, terms, vectors_of(identities, layout), {"o3": 3})


def test_a_total_beyond_what_honest_owners_can_reach_is_not_published() -> None:
    layout = layout_of(3)
    terms = terms_of(IDENTITIES, layout)
    side = MaskedCoordinator(terms, terms.names)
    owners = {}

    def exchange(requests):  # type: ignore[no-untyped-def]
        for name, request in requests.items():
            if isinstance(request, OpenSum):
                owners[name], reply = MaskedOwner.open(terms, IDENTITIES[name], token_bytes)
            else:
                wild = np.full(3, 2**63 - 1 if name == "o0" else 0, "<u8")
                owners[name], reply = owners[name].answer(request, wild, token_bytes)
            yield name, reply

    with pytest.raises(NumericalError, match="t0 exceeds 3 owners times the bound 8"):
        drive(side, exchange, lambda owner, violation: pytest.fail(str(violation)))


def test_masked_is_the_first_of_the_kinds() -> None:
    assert list(SUMMATIONS) == ["masked", "plain"]
