"""Attacks 13, 20 and 21: shares that are swapped, forged, cut, too few, or wrong."""

import hashlib
from collections.abc import Callable
from dataclasses import replace

import pytest

from common.domain_separation import Domain
from common.errors import RemoteProtocolError, TooFewOwners
from common.messages import Acknowledgements, KeyShares, SharesRevealed, SharesSealed
from common.summation import key_agreement, secret_sharing
from common.summation.records import RevealedShare, SealedShare, ShareDelivery
from tests.support.malicious import MaliciousCoordinator, delivered, flip

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
        forged = flip(deliveries[1].sealed)
        deliveries[1] = replace(deliveries[1], sealed=forged)

    def adapt(manifests: bytes) -> bytes:
        return hashlib.sha256(forged).digest() + manifests[32:]

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


def colluder_seals(plain: Callable[[bytes], bytes], direction: tuple[int, int] = (1, 0)) -> MaliciousCoordinator:
    """The colluder o1 seals something else for o0, and signs it properly; what o0 then makes of it is the test's."""
    evil = MaliciousCoordinator()
    evil.honest_until(KeyShares)
    book, seed = evil.side._book, evil.owners["o1"].channel_seed
    honest = next(m for m in evil.received["o1"] if isinstance(m, SharesSealed))
    shares = {share.owner: share.sealed for share in SealedShare.unpack_all(honest.shares)}
    key = book.seal_key(seed, 1, 0, 1)
    opened = key_agreement.open_sealed(key, shares[0], book.associated_data(1, 0))
    shares[0] = key_agreement.seal(key, plain(opened), book.associated_data(*direction))
    manifest = b"".join(hashlib.sha256(shares[owner]).digest() for owner in sorted(shares))
    body = book.digest + honest.commitment + manifest
    packed = SealedShare.pack_all(SealedShare(owner, sealed) for owner, sealed in shares.items())
    signature = evil.identities["o1"].sign(Domain.SIGN_SHARES, evil.terms.session, body)
    evil.side._take_shares(1, replace(honest, shares=packed, signature=signature))
    return evil


def test_20_a_share_at_another_owner_s_point() -> None:
    evil = colluder_seals(lambda plain: (3).to_bytes(2) + plain[2:])
    with evil.refused("o0", "a share is at another owner's point"):
        evil.send("o0", evil.side._key_shares(0))


def test_20_a_share_sealed_for_another_direction() -> None:
    evil = colluder_seals(lambda plain: plain, direction=(0, 1))
    with evil.refused("o0", "a sealed share cannot be opened"):
        evil.send("o0", evil.side._key_shares(0))


def test_20_a_share_that_is_not_an_element_of_the_field() -> None:
    evil = colluder_seals(lambda plain: plain[:2] + b"\xff" * 33 + plain[35:])
    with evil.refused("o0", "a share is not an element of the field"):
        evil.send("o0", evil.side._key_shares(0))


@pytest.mark.parametrize("missing", [(1, 2), (1, 2, 3), (1, 2, 3, 4)])
def test_13_too_few_senders_of_shares(missing: tuple[int, ...]) -> None:
    evil = MaliciousCoordinator()
    request = evil.honest_until(KeyShares)["o0"]
    assert isinstance(request, KeyShares)
    kept = [each for each in ShareDelivery.unpack_all(request.deliveries) if each.owner not in missing]
    manifests = b"".join(evil.side._sealed[each.owner].manifest for each in kept)
    with evil.refused("o0", "MaskedInput: . owners, the agreement needs 4"):
        evil.send("o0", replace(request, deliveries=ShareDelivery.pack_all(kept), manifests=manifests))


def revealing(wrong: set[str], *, lie: Callable[[bytes], bytes]) -> MaliciousCoordinator:
    """All but the last step, honest; then the owners in `wrong` reveal something else, signed."""
    evil = MaliciousCoordinator()
    for owner, request in evil.honest_until(Acknowledgements).items():
        reply = evil.send(owner, request)
        assert isinstance(reply, SharesRevealed)
        if owner in wrong:
            records = [replace(each, share=lie(each.share)) for each in RevealedShare.unpack_all(reply.shares)]
            reply = signed_reveal(evil, owner, reply, RevealedShare.pack_all(records))
        evil.side.receive(owner, delivered(reply))
    return evil


def signed_reveal(evil: MaliciousCoordinator, owner: str, reply: SharesRevealed, shares: bytes) -> SharesRevealed:
    body = hashlib.sha256(shares).digest()
    signature = evil.identities[owner].sign(Domain.SIGN_REVEAL, evil.terms.session, body)
    return replace(reply, shares=shares, signature=signature)


def other_share(share: bytes) -> bytes:
    return ((2 * int.from_bytes(share) + 1) % secret_sharing.PRIME).to_bytes(33)


def test_21_one_wrong_share_at_reveal_is_passed_over() -> None:
    evil = revealing({"o2"}, lie=other_share)
    evil.side.end_step()
    total = evil.side.total()
    assert abs(total.vector - sum(evil.vectors.values())).max() < 1e-12


def test_21_wrong_shares_that_leave_no_honest_group_stop_the_sum() -> None:
    evil = revealing({"o2", "o3"}, lie=other_share)
    with pytest.raises(RemoteProtocolError, match="do not fit its commitment"):
        evil.side.end_step()


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
