"""Owners that lie about shares, signed: what they seal, deal, reveal and dispute, and a sum driven with them."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Literal

import pytest

from common.domain_separation import Domain
from common.errors import RemoteProtocolError
from common.identity import Identity
from common.messages import (
    KeyBook,
    KeyShares,
    MaskedPart,
    Message,
    SharesDisputed,
    SharesOpened,
    SharesRevealed,
    SharesSealed,
)
from common.summation import key_agreement, secret_sharing
from common.summation.masked.book import MASK, SELF
from common.summation.masked.evidence import Evidence, ProvenLie
from common.summation.masked.phases import Phase
from common.summation.protocol import Total, drive
from common.summation.records import OpenedShare, RevealedShare, SealedShare, Signed
from tests.support.malicious import MaliciousCoordinator

Shares = dict[int, bytes]  # point -> share
Answer = Callable[[Message], Message]
Reveal = Callable[[RevealedShare], RevealedShare]
Deal = Callable[[Shares], Shares]


def colluder_seals(
    plain: Callable[[bytes], bytes], direction: tuple[int, int] = (1, 0), *, commits: bool = False
) -> MaliciousCoordinator:
    """The colluder o1 seals something else for o0, and signs it properly; what o0 then makes of it is the test's.

    `commits`: it also commits to what it seals.
    """
    evil = MaliciousCoordinator()
    evil.honest_until(KeyShares)
    book, seed = evil.side._book, evil.owners["o1"].channel_seed
    honest = next(m for m in evil.received["o1"] if isinstance(m, SharesSealed))
    shares = {share.owner: share for share in SealedShare.unpack_all(honest.shares)}
    key = book.seal_key(book.channel_private_key(seed), 1, 0, 1)
    opened = key_agreement.open_sealed(key, shares[0].sealed, book.associated_data(1, 0))
    sealed = key_agreement.seal(key, plain(opened), book.associated_data(*direction))
    shares[0] = replace(shares[0], sealed=sealed)
    if commits:
        self_share, mask_share = plain(opened)[2:35], plain(opened)[35:]
        shares[0] = replace(
            shares[0],
            self_commitment=book.share_commitment(1, 0, SELF, self_share),
            mask_commitment=book.share_commitment(1, 0, MASK, mask_share),
        )
    manifest = b"".join(shares[owner].digest for owner in sorted(shares))
    body = book.digest + honest.commitment + manifest
    packed = SealedShare.pack_all(shares.values())
    signature = evil.identities["o1"].sign(Domain.SIGN_SHARES, evil.terms.session, body)
    evil.side._take_shares(1, replace(honest, shares=packed, signature=signature))
    return evil


def play(
    evil: MaliciousCoordinator,
    named: dict[str, str],
    *,
    reveal: Mapping[str, Reveal] | None = None,
    deal: Mapping[str, Deal] | None = None,
    answer: Mapping[str, Answer] | None = None,
    proofs: list[Evidence] | None = None,
) -> Total:
    """Drive a sum in which some owners reveal or deal other shares, signed. `named`: who is excluded for what.

    `answer`: what some owners answer instead of the honest reply. `proofs`: what shows who lied.
    """

    def exchange(requests: Mapping[str, Message]) -> Iterator[tuple[str, Message]]:
        for owner, request in requests.items():
            with pytest.MonkeyPatch.context() as patch:
                if owner in (deal or {}) and isinstance(request, KeyBook):
                    patch.setattr(secret_sharing, "split", lambda *what: deal[owner](split(*what)))  # noqa: B023
                reply = evil.send(owner, request)
            if owner in (reveal or {}) and isinstance(reply, SharesRevealed):
                records = map(reveal[owner], RevealedShare.unpack_all(reply.shares))
                reply = signed_reveal(evil, owner, reply, RevealedShare.pack_all(records))
            yield owner, (answer or {}).get(owner, unchanged)(reply)

    def exclude(owner: str, violation: RemoteProtocolError) -> None:
        named[owner] = violation.message
        if isinstance(violation, ProvenLie) and proofs is not None:
            proofs.append(violation.evidence)

    split = secret_sharing.split
    try:
        return drive(evil.side, exchange, exclude)
    finally:
        for owner, violation in evil.side.violations.items():
            exclude(owner, violation)


def unchanged(reply: Message) -> Message:
    return reply


def signed_reveal(evil: MaliciousCoordinator, owner: str, reply: SharesRevealed, shares: bytes) -> SharesRevealed:
    body = hashlib.sha256(shares).digest()
    signature = evil.identities[owner].sign(Domain.SIGN_REVEAL, evil.terms.session, body)
    return replace(reply, shares=shares, signature=signature)


def other_share(share: bytes) -> bytes:
    return ((2 * int.from_bytes(share) + 1) % secret_sharing.PRIME).to_bytes(33)


def other(record: RevealedShare) -> RevealedShare:
    return replace(record, share=other_share(record.share))


def at(*points: int) -> Callable[[Shares], Shares]:
    """Deals wrong shares at these points."""
    return lambda shares: {point: other_share(share) if point in points else share for point, share in shares.items()}


def disputes(evil: MaliciousCoordinator, owner: str, dealer: int) -> Answer:
    """This owner disputes good shares, once, instead of giving its first part."""
    before = []

    def answer(reply: Message) -> Message:
        if isinstance(reply, SharesSealed):
            before.append(evil.owners[owner])
        if not isinstance(reply, MaskedPart) or not before:
            return reply
        evil.owners[owner] = replace(before.pop(), phase=Phase.DISPUTED_SHARES)
        return SharesDisputed(
            session=reply.session, owner=owner, disputes=Signed.pack_all([dispute(evil, owner, dealer, dealer)])
        )

    return answer


def dispute(evil: MaliciousCoordinator, owner: str, dealer: int, record_owner: int) -> Signed:
    """An owner's signature under a dispute with a dealer."""
    body = evil.side._book.dispute_body(dealer, evil.terms.indices[owner])
    return Signed(record_owner, evil.identities[owner].sign(Domain.SIGN_DISPUTE, evil.terms.session, body))


OTHER: Callable[[bytes], bytes] = lambda plain: plain[:2] + other_share(plain[2:35]) + plain[35:]  # noqa: E731


def opens_another_share(dealer: Identity, changed: Literal["self_share", "mask_share"]) -> Answer:
    """What a dealer answers when it is to open a disputed share: another one, properly signed."""

    def answer(reply: Message) -> Message:
        if not isinstance(reply, SharesOpened):
            return reply
        (shares,) = OpenedShare.unpack_all(reply.shares)
        packed = OpenedShare.pack_all([replace(shares, **{changed: other_share(getattr(shares, changed))})])
        body = hashlib.sha256(packed).digest()
        signature = dealer.sign(Domain.SIGN_OPENED, bytes.fromhex(reply.session), body)
        return replace(reply, shares=packed, signature=signature)

    return answer
