"""Attacks 13, 20, 21, 70 to 72 and 110 to 113: shares that are swapped, forged, too few, wrong or disputed, and who is
named for it.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from common import saved_state
from common.domain_separation import Domain
from common.errors import RemoteProtocolError, TooFewOwners
from common.identity import verify
from common.messages import (
    Acknowledgements,
    KeyShares,
    MaskedPart,
    Message,
    OpenShares,
    SharesDisputed,
    SharesOpened,
    SharesRevealed,
    SharesSealed,
    SurvivorList,
)
from common.summation import secret_sharing
from common.summation.masked.coordinator import MaskedCoordinator
from common.summation.protocol import SavedOpening, SumAbandoned, Total
from common.summation.records import OpenedShare, RevealedShare, ShareDelivery, Signed
from tests.support.lying_owners import (
    OTHER,
    at,
    colluder_seals,
    dispute,
    disputes,
    opens_another_share,
    other,
    other_share,
    play,
    signed_reveal,
)
from tests.support.malicious import MaliciousCoordinator, flip
from tests.support.sums import repeating_bytes

Change = Callable[[dict[int, ShareDelivery]], None]


def send_shares(change: Change, why: str, *, manifests: Callable[[bytes], bytes] = lambda data: data) -> None:
    """Send o0 its shares, some of them changed; it must refuse."""
    evil = MaliciousCoordinator()
    request = evil.honest_until(KeyShares)["o0"]
    assert isinstance(request, KeyShares)
    deliveries = {delivery.owner: delivery for delivery in ShareDelivery.unpack_all(request.deliveries)}
    change(deliveries)
    changed = replace(
        request, deliveries=ShareDelivery.pack_all(deliveries.values()), manifests=manifests(request.manifests)
    )
    with evil.refused("o0", why):
        evil.send("o0", changed)


def test_20_a_forged_share() -> None:
    def forge(deliveries: dict[int, ShareDelivery]) -> None:
        deliveries[1] = replace(deliveries[1], sealed=flip(deliveries[1].sealed))

    send_shares(forge, "a share is not the one that was sent")


def test_20_a_forged_share_with_a_manifest_that_fits() -> None:
    """Without the signature over all sealed shares, the manifest could be adapted."""
    forged = b""

    def forge(deliveries: dict[int, ShareDelivery]) -> None:
        nonlocal forged
        deliveries[1] = replace(deliveries[1], sealed=flip(deliveries[1].sealed))
        forged = deliveries[1].digest

    def adapt(manifests: bytes) -> bytes:
        return forged + manifests[32:]

    send_shares(forge, "the signature of o1 is not valid", manifests=adapt)


def test_20_two_senders_shares_swapped() -> None:
    def swap(deliveries: dict[int, ShareDelivery]) -> None:
        one, two = deliveries[1], deliveries[2]
        deliveries[1] = replace(one, sealed=two.sealed)
        deliveries[2] = replace(two, sealed=one.sealed)

    send_shares(swap, "a share is not the one that was sent")


def test_20_another_recipient_s_share() -> None:
    evil = MaliciousCoordinator()
    requests = evil.honest_until(KeyShares)
    for_two = requests["o2"]
    with evil.refused("o0", "a share is not the one that was sent|is not my neighbour"):
        evil.send("o0", for_two)


def test_20_another_commitment() -> None:
    def change(deliveries: dict[int, ShareDelivery]) -> None:
        deliveries[3] = replace(deliveries[3], commitment=bytes(32))

    send_shares(change, "the signature of o3 is not valid")


@pytest.mark.parametrize("cut", [1, 30, 246])
def test_20_truncated_shares(cut: int) -> None:
    evil = MaliciousCoordinator()
    request = evil.honest_until(KeyShares)["o0"]
    assert isinstance(request, KeyShares)
    with evil.refused("o0", "not a whole number|the agreement needs 4"):
        evil.send("o0", replace(request, deliveries=request.deliveries[:-cut] if cut < 246 else b""))


def test_20_more_manifests_than_senders() -> None:
    send_shares(lambda deliveries: None, "more manifests than senders", manifests=lambda data: data + bytes(32))


def disputed_by(evil: MaliciousCoordinator, owner: str) -> list[int]:
    """Whose shares this owner disputes, under its signature, before it gives anything of its vector."""
    reply = evil.send(owner, evil.side._key_shares(evil.terms.indices[owner]))
    assert isinstance(reply, SharesDisputed)
    assert not evil.owners[owner].offers
    signed = Signed.unpack_all(reply.disputes)
    for each in signed:
        body = evil.side._book.dispute_body(each.owner, evil.terms.indices[owner])
        verify(evil.terms.roster[owner], Domain.SIGN_DISPUTE, evil.terms.session, owner, body, each.signature)
    return [each.owner for each in signed]


def test_20_a_share_at_another_owner_s_point() -> None:
    evil = colluder_seals(lambda plain: (3).to_bytes(2) + plain[2:])
    assert disputed_by(evil, "o0") == [1]


def test_20_a_share_sealed_for_another_direction() -> None:
    evil = colluder_seals(lambda plain: plain, direction=(0, 1))
    assert disputed_by(evil, "o0") == [1]


def test_20_a_share_that_is_not_an_element_of_the_field() -> None:
    evil = colluder_seals(lambda plain: plain[:2] + b"\xff" * 33 + plain[35:], commits=True)
    assert disputed_by(evil, "o0") == [1]


@pytest.mark.parametrize("missing", [(1, 2), (1, 2, 3), (1, 2, 3, 4)])
def test_13_too_few_senders_of_shares(missing: tuple[int, ...]) -> None:
    evil = MaliciousCoordinator()
    request = evil.honest_until(KeyShares)["o0"]
    assert isinstance(request, KeyShares)
    kept = [each for each in ShareDelivery.unpack_all(request.deliveries) if each.owner not in missing]
    manifests = b"".join(evil.side._sealed[each.owner].manifest for each in kept)
    with evil.refused("o0", "MaskedInput: . owners, the agreement needs 4"):
        evil.send("o0", replace(request, deliveries=ShareDelivery.pack_all(kept), manifests=manifests))


def is_everybody_s_sum(evil: MaliciousCoordinator, total: Total) -> bool:
    return bool(abs(total.vector - sum(evil.vectors.values())).max() < 1e-12)


@pytest.mark.parametrize("count", [5, 15, 24])
def test_70_all_lying_shares_that_the_sum_can_spare_are_named_and_it_survives(count: int) -> None:
    """From 15 owners on, one used to be enough to end it: too many groups of shares contain a wrong one."""
    named: dict[str, str] = {}
    evil = MaliciousCoordinator(count, needed=count * 4 // 5, colluders=1)
    liars = [f"o{index}" for index in range(count - count * 4 // 5)]
    total = play(evil, named, reveal=dict.fromkeys(liars, other))
    assert is_everybody_s_sum(evil, total)
    assert list(named) == liars
    assert all("is not the one that it was dealt: it lied" in why for why in named.values())


def test_70_after_a_restart_too_a_lying_share_is_named() -> None:
    named: dict[str, str] = {}
    evil = MaliciousCoordinator()
    evil.honest_until(Acknowledgements)
    opening = evil.side.opening()
    assert opening is not None
    state = saved_state.from_json(SavedOpening, saved_state.to_json(SavedOpening, opening.state))
    evil.side = MaskedCoordinator.reopen(evil.terms, replace(opening, state=state))
    assert is_everybody_s_sum(evil, play(evil, named, reveal={"o2": other}))
    assert list(named) == ["o2"]


def test_70_more_liars_than_the_sum_can_spare_stop_it_and_each_is_named() -> None:
    named: dict[str, str] = {}
    with pytest.raises(TooFewOwners, match=r"o2 .*o3 "):
        play(MaliciousCoordinator(), named, reveal={"o2": other, "o3": other})
    assert list(named) == ["o2", "o3"]


def test_71_a_dealer_cannot_make_its_honest_neighbour_look_like_the_liar() -> None:
    """It seals another share for o0 than it commits to. o0 says so before it has sent anything, and gets the shares in
    the clear. Both stay in the sum, and nobody is named: the lie did no harm.
    """
    named: dict[str, str] = {}
    evil = colluder_seals(OTHER)
    assert is_everybody_s_sum(evil, play(evil, named))
    assert named == {}
    assert [type(reply) for reply in evil.received["o0"]][2:4] == [SharesDisputed, MaskedPart]


def test_71_a_dealer_that_does_not_open_what_it_committed_to_is_named_and_the_sum_is_given_up() -> None:
    """Before anybody opens it, so that another one can be opened without this dealer."""

    named: dict[str, str] = {}
    evil = colluder_seals(OTHER)
    with pytest.raises(SumAbandoned, match="o1 did not open shares that others could not use"):
        play(evil, named, answer={"o1": opens_another_share(evil.identities["o1"], "mask_share")})
    assert named == {"o1": "owner o1 lied: it opened other shares for o0 than it committed to"}
    assert not any(isinstance(reply, SharesRevealed) for received in evil.received.values() for reply in received)


def test_71_a_dealer_whose_shares_more_owners_dispute_than_may_lie_is_named_at_once() -> None:
    named: dict[str, str] = {}
    evil = MaliciousCoordinator()
    with pytest.raises(SumAbandoned, match="o1 did not open"):
        play(evil, named, answer={"o2": disputes(evil, "o2", 1), "o3": disputes(evil, "o3", 1)})
    assert evil.side.violations["o1"].message == (
        "owner o1 lied: 2 owners dispute the shares that it dealt them, and at most 1 of them can be lying"
    )


def test_110_a_false_dispute_costs_an_honest_dealer_nothing() -> None:
    """It opens two shares that the disputing owner held anyway, and nobody is named."""
    named: dict[str, str] = {}
    evil = MaliciousCoordinator()
    held: dict[int, bytes] = {}
    false = disputes(evil, "o4", 0)

    def answer(reply: Message) -> Message:
        if isinstance(reply, MaskedPart):
            held.update(evil.owners["o4"].held)
        return false(reply)

    assert is_everybody_s_sum(evil, play(evil, named, answer={"o4": answer}))
    assert named == {}
    (opened,) = [reply for reply in evil.received["o0"] if isinstance(reply, SharesOpened)]
    (shares,) = OpenedShare.unpack_all(opened.shares)
    assert shares.owner == 4
    assert shares.self_share + shares.mask_share == held[0]


def ask_to_open(evil: MaliciousCoordinator, *disputes: Signed) -> Message:
    """Ask o0 to open the shares that it dealt to others."""
    return OpenShares(session=evil.terms.request.session, disputes=Signed.pack_all(disputes))


def test_111_a_dispute_that_the_coordinator_invents_or_takes_from_elsewhere() -> None:
    """With four of them it could open both secrets of an honest owner."""
    for invented in (
        lambda evil: replace(dispute(evil, "o4", 0, 4), owner=2),  # a colluder's, passed off as o2's
        lambda evil: replace(dispute(evil, "o2", 0, 2), signature=bytes(64)),
        lambda evil: dispute(evil, "o2", 1, 2),  # with another dealer
    ):
        evil = MaliciousCoordinator()
        evil.honest_until(SurvivorList)
        with evil.refused("o0", "the signature of o2 is not valid"):
            evil.send("o0", ask_to_open(evil, invented(evil)))
    evil = MaliciousCoordinator()
    evil.honest_until(SurvivorList)
    with evil.refused("o0", "I dealt no shares to an owner that disputes"):
        evil.send("o0", ask_to_open(evil, dispute(evil, "o0", 0, 0)))


def test_112_more_disputes_than_owners_may_lie() -> None:
    evil = MaliciousCoordinator()
    evil.honest_until(SurvivorList)
    with evil.refused("o0", "2 owners dispute my shares, at most 1 may"):
        evil.send("o0", ask_to_open(evil, dispute(evil, "o3", 0, 3), dispute(evil, "o4", 0, 4)))


def test_112_one_dispute_after_the_other_and_after_the_survivors_are_signed() -> None:
    evil = MaliciousCoordinator()
    requests = evil.honest_until(SurvivorList)
    first = ask_to_open(evil, dispute(evil, "o4", 0, 4))
    assert evil.send("o0", first) == evil.send("o0", first)
    with evil.refused("o0", "other shares were opened before"):
        evil.send("o0", ask_to_open(evil, dispute(evil, "o3", 0, 3)))
    evil.send("o1", requests["o1"])
    with pytest.raises(RemoteProtocolError, match="OpenShares in phase ConsistencyCheck"):
        evil.send("o1", ask_to_open(evil, dispute(evil, "o4", 1, 4)))
    assert not evil.owners["o1"].dealt


def test_113_shares_that_the_dealer_did_not_commit_to_are_not_taken_as_opened_ones() -> None:
    """Nor does an owner dispute the same shares again, or give its vector without them."""
    for opened in (b"", OpenedShare.pack_all([OpenedShare(1, other_share(bytes(33)), other_share(bytes(33)))])):
        evil = colluder_seals(OTHER)
        assert disputed_by(evil, "o0") == [1]
        with evil.refused("o0", "the shares of o1 are not opened, or are not those that it committed to"):
            evil.send("o0", replace(evil.side._key_shares(0), opened=opened))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda evil, reply: replace(reply, disputes=b""), "disputes shares that nobody dealt it"),
        (
            lambda evil, reply: replace(reply, disputes=Signed.pack_all([dispute(evil, "o4", 4, 4)])),
            "disputes shares that nobody dealt it",
        ),
        (
            lambda evil, reply: replace(reply, disputes=Signed.pack_all([dispute(evil, "o3", 0, 0)])),
            "the signature of o4 is not valid",
        ),
    ],
)
def test_110_a_dispute_about_nothing_excludes_only_its_owner(
    change: Callable[[MaliciousCoordinator, SharesDisputed], SharesDisputed], why: str
) -> None:
    named: dict[str, str] = {}
    evil = MaliciousCoordinator()
    false = disputes(evil, "o4", 0)

    def answer(reply: Message) -> Message:
        wrong = false(reply)
        return change(evil, wrong) if isinstance(wrong, SharesDisputed) else wrong

    total = play(evil, named, answer={"o4": answer})
    assert total.owners == ("o0", "o1", "o2", "o3")
    assert list(named) == ["o4"]
    assert why in named["o4"]


def test_110_an_owner_disputes_once_and_before_it_gives_anything() -> None:
    named: dict[str, str] = {}
    evil = MaliciousCoordinator()
    false, twice = disputes(evil, "o4", 0), disputes(evil, "o4", 1)

    def answer(reply: Message) -> Message:
        if isinstance(reply, SharesSealed):
            twice(reply)
        first = false(reply)
        return first if isinstance(first, SharesDisputed) else twice(first)

    play(evil, named, answer={"o4": answer})
    assert named == {"o4": "MaskedInput: it disputes shares after it was to give its vector"}


def test_71_liars_above_the_decoding_radius_cannot_make_an_honest_owner_look_like_one() -> None:
    """They add to o0's polynomial another one that is zero at zero and at two honest points: the secret stays, and all
    but one share agree with the false polynomial. Decoding alone would name o2, who is honest.
    """
    named: dict[str, str] = {}
    evil = MaliciousCoordinator(7, needed=4, colluders=0)
    liars = [f"o{index}" for index in range(3, 7)]
    assert evil.terms.neighbourhood.threshold == 4

    def bend(record: RevealedShare, point: int) -> RevealedShare:
        if record.owner != 0:
            return record
        value = int.from_bytes(record.share) + point * (point - 1) * (point - 2)
        return replace(record, share=(value % secret_sharing.PRIME).to_bytes(33))

    with pytest.raises(TooFewOwners):
        play(evil, named, reveal={name: partial(bend, point=evil.terms.indices[name] + 1) for name in liars})
    assert list(named) == liars


LIED = "Unmasking: owner o3 lied: the shares of its secret do not fit what it committed to"


@pytest.mark.parametrize(("points", "is_needed"), [((1,), True), ((2, 5, 9), True), ((13, 14, 15), False)])
def test_72_shares_that_were_dealt_wrong_are_corrected_and_their_dealer_is_named(
    points: tuple[int, ...], is_needed: bool
) -> None:
    """It committed to them, so its neighbours reveal what they were dealt. None of them is named."""
    named: dict[str, str] = {}
    evil = MaliciousCoordinator(15, needed=12, colluders=1)
    total = play(evil, named, deal={"o3": at(*points)})
    assert is_everybody_s_sum(evil, total)
    assert named == ({"o3": LIED} if is_needed else {})


def test_72_beyond_the_decoding_radius_the_sum_fails_and_the_dealer_alone_is_named() -> None:
    named: dict[str, str] = {}
    evil = MaliciousCoordinator(15, needed=12, colluders=1)
    with pytest.raises(RemoteProtocolError, match=f"{LIED}. No total was computed"):
        play(evil, named, deal={"o3": at(1, 2, 3, 4)})
    assert not named


def test_72_shares_of_another_secret_than_the_one_committed_to_name_their_dealer() -> None:
    """They fit together, so only the commitment shows it. The sum would be wrong, and nobody would know."""
    another = secret_sharing.split(b"another".ljust(32), 4, range(1, 6), repeating_bytes())
    with pytest.raises(RemoteProtocolError, match=f"{LIED}. No total was computed"):
        play(MaliciousCoordinator(), {}, deal={"o3": lambda shares: another})


def test_21_a_share_of_the_wrong_kind_or_owner_or_signature_is_refused() -> None:
    evil = MaliciousCoordinator()
    request = evil.honest_until(Acknowledgements)["o0"]
    reply = evil.send("o0", request)
    assert isinstance(reply, SharesRevealed)
    records = RevealedShare.unpack_all(reply.shares)
    bad = {
        "a share of the wrong kind": [replace(records[0], kind=b"m"), *records[1:]],
        "not one share for each neighbour": records[1:],
    }
    for why, changed in bad.items():
        with pytest.raises(RemoteProtocolError, match=why):
            evil.side.receive("o0", signed_reveal(evil, "o0", reply, RevealedShare.pack_all(changed)))
    with pytest.raises(RemoteProtocolError, match="the signature of o0 is not valid"):
        evil.side.receive("o0", replace(reply, shares=RevealedShare.pack_all([replace(records[0], kind=b"m")])))
    evil.side.receive("o0", reply)


def test_too_few_shares_open_nothing() -> None:
    evil = MaliciousCoordinator()
    for owner, request in evil.honest_until(Acknowledgements).items():
        evil.side.receive(owner, evil.send(owner, request))
    for shares in evil.side._revealed.values():
        for point in (4, 5):
            del shares[point]
    with pytest.raises(TooFewOwners, match="3 of o0's neighbours revealed a share, 4 are needed"):
        evil.side.end_step()
