"""Attacks 13 to 16, 18, 19, 22, 36 and 75: false survivor lists, false signatures under them, what is then revealed."""

from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
import pytest

from common.domain_separation import Domain
from common.errors import RemoteProtocolError
from common.identity import Identity
from common.messages import Acknowledgements, SharesRevealed, SurvivorList, SurvivorsSigned
from common.summation.masked.book import MASK, SELF, Book, survivors_body
from common.summation.protocol import SessionOver
from common.summation.records import KeyEntry, RevealedShare, Signed, Survivor
from tests.support.malicious import MaliciousCoordinator, flip, held_by


def survivors_for(evil: MaliciousCoordinator, names: Sequence[str]) -> SurvivorList:
    return SurvivorList(session=evil.terms.request.session, survivors=evil.survivor_list(names))


@pytest.mark.parametrize("names", [["o0"], ["o0", "o4"], ["o0", "o1", "o2"]])
def test_14_survivors_are_one_victim_alone_or_with_colluders(names: list[str]) -> None:
    evil = MaliciousCoordinator()
    evil.honest_until(SurvivorList)
    with evil.refused("o0", "the agreement needs 4"):
        evil.send("o0", survivors_for(evil, names))


def test_13_a_list_of_the_right_length_with_somebody_who_shared_nothing() -> None:
    """o4 never shared keys, so it has no part in anybody's masks: a made-up survivor to reach the number."""
    evil = MaliciousCoordinator()
    evil.honest_until(SurvivorList, dropped=["o4"])
    padded = [*Survivor.unpack_all(evil.survivor_list(["o0", "o1", "o2"])), Survivor(4, bytes(32))]
    with evil.refused("o0", "a listed owner shared no keys"):
        evil.send("o0", SurvivorList(session=evil.terms.request.session, survivors=Survivor.pack_all(padded)))


def test_14_i_am_not_among_the_survivors() -> None:
    evil = MaliciousCoordinator()
    evil.honest_until(SurvivorList)
    with evil.refused("o0", "my upload is missing or altered"):
        evil.send("o0", survivors_for(evil, ["o1", "o2", "o3", "o4"]))


def test_14_my_upload_is_altered() -> None:
    evil = MaliciousCoordinator()
    evil.honest_until(SurvivorList)
    records = Survivor.unpack_all(evil.survivor_list(list(evil.identities)))
    records[0] = replace(records[0], upload=flip(records[0].upload))
    with evil.refused("o0", "my upload is missing or altered"):
        evil.send("o0", SurvivorList(session=evil.terms.request.session, survivors=Survivor.pack_all(records)))


def revealed_by(evil: MaliciousCoordinator, owner: str) -> list[RevealedShare]:
    return [
        record
        for message in evil.received[owner]
        if isinstance(message, SharesRevealed)
        for record in RevealedShare.unpack_all(message.shares)
    ]


def test_15_no_request_can_name_both_secrets_and_no_answer_has_both() -> None:
    evil = MaliciousCoordinator()
    requests = evil.honest_until(Acknowledgements, dropped=[])
    assert {field.name for field in fields(requests["o0"])} == {"session", "signatures"}
    evil.send("o0", requests["o0"])
    revealed = revealed_by(evil, "o0")
    assert [record.owner for record in revealed] == [0, 1, 2, 3, 4]
    assert {record.kind for record in revealed} == {SELF}


def test_16_both_secrets_in_two_requests() -> None:
    """First o4 survived, then it did not. Asked again about the same list, the owner gives the bytes that it gave."""
    evil = MaliciousCoordinator()
    requests = evil.honest_until(Acknowledgements)
    first = evil.send("o0", requests["o0"])
    without = survivors_for(evil, ["o0", "o1", "o2", "o3"])
    with pytest.raises(RemoteProtocolError, match="in phase Unmasking"):
        evil.send("o0", without)
    assert evil.send("o0", requests["o0"]) == first
    assert not evil.owners["o0"].held
    signed = Signed.pack_all(evil.sign_as(name, without.survivors) for name in evil.identities)
    with evil.refused("o0", "the signature of o0 is not valid"):
        evil.send("o0", Acknowledgements(session=without.session, signatures=signed))
    assert {record.kind for record in revealed_by(evil, "o0")} == {SELF}


def test_16_a_second_survivor_list_before_the_reveal() -> None:
    evil = MaliciousCoordinator()
    evil.honest_until(Acknowledgements)
    with pytest.raises(RemoteProtocolError, match="sent SurvivorList in phase ConsistencyCheck"):
        evil.send("o0", survivors_for(evil, ["o0", "o1", "o2", "o3"]))
    assert sum(isinstance(message, SurvivorsSigned) for message in evil.received["o0"]) == 1


def acknowledgements(evil: MaliciousCoordinator, signed: Sequence[Signed]) -> Acknowledgements:
    return Acknowledgements(session=evil.terms.request.session, signatures=Signed.pack_all(signed))


def true_signatures(evil: MaliciousCoordinator) -> list[Signed]:
    return [evil.sign_as(name, evil.survivor_list(list(evil.identities))) for name in evil.identities]


def test_11_19_fewer_signatures_than_the_quorum() -> None:
    """The agreement fixes the threshold; no message can lower it."""
    for count in range(4):
        evil = MaliciousCoordinator()
        evil.honest_until(Acknowledgements)
        with evil.refused("o0", f"{count} owners signed the survivor list, the quorum is 4"):
            evil.send("o0", acknowledgements(evil, true_signatures(evil)[:count]))


def test_19_one_signer_twice() -> None:
    evil = MaliciousCoordinator()
    evil.honest_until(Acknowledgements)
    three = true_signatures(evil)[:3]
    twice = b"".join(Signed.FORMAT.pack(each.owner, each.signature) for each in [*three, three[-1]])
    with evil.refused("o0", "not in strictly ascending order"):
        evil.send("o0", Acknowledgements(session=evil.terms.request.session, signatures=twice))


def test_19_a_signature_passed_off_as_another_owner_s() -> None:
    evil = MaliciousCoordinator()
    evil.honest_until(Acknowledgements)
    signed = true_signatures(evil)[:3]
    with evil.refused("o0", "the signature of o3 is not valid"):
        evil.send("o0", acknowledgements(evil, [*signed, replace(signed[0], owner=3)]))


def test_19_signatures_under_another_list() -> None:
    evil = MaliciousCoordinator()
    evil.honest_until(Acknowledgements)
    other = evil.survivor_list(["o0", "o1", "o2", "o3"])
    signed = [*true_signatures(evil)[:3], evil.sign_as("o3", other)]
    with evil.refused("o0", "the signature of o3 is not valid"):
        evil.send("o0", acknowledgements(evil, signed))


def test_75_a_signature_by_an_owner_that_was_shown_another_key_book() -> None:
    """In a sparse graph, groups with books of their own would otherwise make up one quorum together."""
    evil = MaliciousCoordinator()
    evil.honest_until(Acknowledgements)
    entries = KeyEntry.unpack_all(evil.side._book.data)
    other_book = Book(evil.terms, KeyEntry.pack_all(entries[:-1]))
    *signed, last = true_signatures(evil)[:4]
    body = survivors_body(other_book, evil.survivor_list(list(evil.identities)))
    elsewhere = evil.identities["o3"].sign(Domain.SIGN_SURVIVORS, evil.terms.session, body)
    with evil.refused("o0", "the signature of o3 is not valid"):
        evil.send("o0", acknowledgements(evil, [*signed, replace(last, signature=elsewhere)]))


def test_19_a_signer_who_is_not_on_the_roster_or_no_survivor() -> None:
    for index in (4, 5):
        evil = MaliciousCoordinator()
        evil.honest_until(SurvivorList)
        requests = survivors_for(evil, ["o0", "o1", "o2", "o3"])
        evil.send("o0", requests)
        stranger = Identity(name="o5", seed=b"x" * 32)
        body = survivors_body(evil.side._book, requests.survivors)
        signature = stranger.sign(Domain.SIGN_SURVIVORS, evil.terms.session, body)
        signed = [evil.sign_as(name, requests.survivors) for name in ("o0", "o1", "o2")]
        with evil.refused("o0", "a signer is not a survivor"):
            evil.send("o0", acknowledgements(evil, [*signed, Signed(index, signature)]))


def test_22_a_victim_declared_dropped_after_its_upload_arrived() -> None:
    """The protocol removes its pair masks. Its vector remains under its self mask, which nobody reveals."""
    evil = MaliciousCoordinator()
    evil.honest_until(SurvivorList)
    others = ["o1", "o2", "o3", "o4"]
    without = survivors_for(evil, others)
    for owner in others:
        evil.send(owner, without)
    signed = acknowledgements(evil, [evil.sign_as(name, without.survivors) for name in others])
    shares = []
    for owner in others:
        evil.send(owner, signed)
        shares += [(owner, record) for record in revealed_by(evil, owner)]
    about_victim = {record.kind for _, record in shares if record.owner == 0}
    assert about_victim == {MASK}
    assert evil.open_victim("o0", shares) is None
    seed = evil_seed(evil, shares)
    left = evil.unmasked("o0", evil.side._book.pair_masks(seed, 0, [1, 2, 3, 4]))
    assert not evil.is_open("o0", left)
    assert np.abs(left).max() > 8  # noise of the whole ring, where the vector lies within 8


def evil_seed(evil: MaliciousCoordinator, shares: Sequence[tuple[str, RevealedShare]]) -> bytes:
    """The victim's mask-key seed, which the neighbours rightly gave away."""
    for holder, record in shares:
        if record.owner == 0:
            evil.side._revealed.setdefault((0, MASK), {})[evil.terms.indices[holder] + 1] = record.share
    return evil.side._rebuild_mask_seed(0)


def split_view(count: int, colluders: Sequence[str], colluders_agreed: int) -> tuple[MaliciousCoordinator, bool]:
    """Two groups are shown two survivor lists, with the victim o0 and without; colluders sign both, give both shares.

    Returns whether the victim's vector was opened.
    """
    evil = MaliciousCoordinator(count, needed=count - 2, colluders=colluders_agreed)
    evil.honest_until(SurvivorList)
    honest = [name for name in evil.identities if name not in colluders]
    half = (len(honest) + 1) // 2
    groups = [honest[:half], honest[half:]]
    shares = [share for name in colluders for share in held_by(evil.owners[name], name)]
    for group, absent in ((groups[0], []), (groups[1], ["o0"])):
        listed = [name for name in evil.identities if name not in absent]
        request = survivors_for(evil, listed)
        for name in group:
            evil.send(name, request)
        signed = [evil.sign_as(name, request.survivors) for name in (*group, *colluders)]
        for name in group:
            try:
                evil.send(name, acknowledgements(evil, signed))
            except SessionOver as refusal:
                assert "the quorum is" in str(refusal)  # noqa: PT017 - refusing is what the caller looks at
            shares += [(name, record) for record in revealed_by(evil, name)]
    return evil, evil.is_open("o0", evil.open_victim("o0", shares))


def test_18_split_view_of_the_survivor_list() -> None:
    _, is_open = split_view(6, colluders=[], colluders_agreed=1)
    assert not is_open


def test_36_exactly_c_colluders_learn_nothing() -> None:
    _, is_open = split_view(6, colluders=["o5"], colluders_agreed=1)
    assert not is_open


def test_36_documented_break_one_colluder_more_than_agreed_opens_a_vector() -> None:
    """By nature: with c + 1 colluders two quorums need have no honest owner in common."""
    _, is_open = split_view(6, colluders=["o4", "o5"], colluders_agreed=1)
    assert is_open
