"""What shows anybody that an owner lied about a share: signed words of one session, kept by the coordinator.

`accused` follows everything from the signatures, the roster and the request of the sum alone. It raises
RemoteProtocolError for words that prove nothing. There are four lies:

    revealed   its signature is under another share than the one that the dealer's signature commits to
    opened     it opened a disputed share that does not fit its own commitment
    disputed   more owners than may lie signed that they cannot use the shares that it dealt them
    dealt      shares that all fit its commitments are not of the secret that it committed to, or of no secret at all

The first rests on a coordinator that does not collude with the dealer: together, they could show other commitments than
those that the accused owner was given, signed as well. An owner that says nothing is left out, too, but proves nothing.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from common.domain_separation import Domain
from common.errors import RemoteProtocolError
from common.saved_state import SavedState
from common.summation import key_agreement, secret_sharing
from common.summation.masked.book import MASK, SELF, Book, require, shares_body, verify_owner
from common.summation.protocol import SumTerms
from common.summation.records import OpenedShare, RevealedShare, SealedShare

Lie = Literal["revealed", "opened", "disputed", "dealt"]


@dataclass(frozen=True, kw_only=True)
class Evidence(SavedState):
    """`sealed`: the shares that the dealer sealed (SealedShare.pack_all), with `commitment`, under its `signature`.

    `words`: by owner, what it revealed (RevealedShare) or opened (OpenedShare); in `dealt`, the one share that it was
    dealt (RevealedShare). `spoken`: by owner, its signature under these words, or under its dispute.
    """

    version: Literal[1] = 1
    lie: Lie
    owner: int
    dealer: int
    book: bytes
    commitment: bytes
    sealed: bytes
    signature: bytes
    words: Mapping[int, bytes]
    spoken: Mapping[int, bytes]


class ProvenLie(RemoteProtocolError):  # noqa: N818 - the name is the sentence
    """An owner lied, and `evidence` shows it to anybody."""

    def __init__(self, message: str, evidence: Evidence, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.evidence = evidence


def accused(terms: SumTerms, evidence: Evidence) -> str:
    """The name of the owner that lied. Raises RemoteProtocolError unless `evidence` proves it."""
    book = Book(terms, evidence.book)
    book.check()
    require(evidence.dealer in book.entries, "evidence: the dealer is not in the key book")
    sealed = SealedShare.unpack_all(evidence.sealed)
    manifest = b"".join(share.digest for share in sealed)
    body = shares_body(book, evidence.commitment, manifest)
    verify_owner(
        terms, evidence.dealer, Domain.SIGN_SHARES, body, evidence.signature
    )  # check: evidence-is-the-dealer-s
    dealt = {share.owner: share for share in sealed}
    prove = {"revealed": _revealed, "opened": _opened, "disputed": _disputed, "dealt": _dealt}[evidence.lie]
    require(prove(terms, book, evidence, dealt), f"evidence: it does not show that anybody lied ({evidence.lie})")
    require(
        evidence.owner == (next(iter(evidence.words)) if evidence.lie == "revealed" else evidence.dealer),
        "evidence: it shows that another owner lied",
    )  # check: evidence-is-about-the-accused
    return terms.name_of(evidence.owner)


Dealt = Mapping[int, SealedShare]  # by recipient


def _revealed(terms: SumTerms, book: Book, evidence: Evidence, dealt: Dealt) -> bool:
    ((speaker, words),) = evidence.words.items()
    digest = hashlib.sha256(words).digest()
    verify_owner(
        terms, speaker, Domain.SIGN_REVEAL, digest, evidence.spoken[speaker]
    )  # check: evidence-is-the-revealer-s
    shares = [each for each in RevealedShare.unpack_all(words) if each.owner == evidence.dealer]
    return speaker in dealt and any(
        book.share_commitment(evidence.dealer, speaker, each.kind, each.share)
        != (dealt[speaker].self_commitment if each.kind == SELF else dealt[speaker].mask_commitment)
        for each in shares
    )


def _opened(terms: SumTerms, book: Book, evidence: Evidence, dealt: Dealt) -> bool:
    ((speaker, words),) = evidence.words.items()
    digest = hashlib.sha256(words).digest()
    verify_owner(
        terms, evidence.dealer, Domain.SIGN_OPENED, digest, evidence.spoken[speaker]
    )  # check: evidence-is-the-opener-s
    return any(
        each.owner in dealt and not _fits(book, evidence.dealer, dealt[each.owner], each)
        for each in OpenedShare.unpack_all(words)
    )


def _disputed(terms: SumTerms, book: Book, evidence: Evidence, dealt: Dealt) -> bool:
    for recipient, signature in evidence.spoken.items():
        body = book.dispute_body(evidence.dealer, recipient)
        verify_owner(terms, recipient, Domain.SIGN_DISPUTE, body, signature)  # check: evidence-is-the-disputants
    return len(set(evidence.spoken) & set(dealt)) > terms.most_liars


def _dealt(terms: SumTerms, book: Book, evidence: Evidence, dealt: Dealt) -> bool:
    """One kind of share at a time; the share of the dealer itself is left out, as it commits to none."""
    threshold = terms.neighbourhood.threshold
    for kind in (SELF, MASK):
        shares = {}
        for recipient, words in evidence.words.items():
            (each,) = RevealedShare.unpack_all(words)
            share = dealt[recipient]
            commitment = share.self_commitment if kind == SELF else share.mask_commitment
            if each.kind == kind and book.share_commitment(evidence.dealer, recipient, kind, each.share) == commitment:
                shares[recipient + 1] = each.share
        if len(shares) >= threshold and not _is_the_secret(book, evidence, kind, shares, threshold):
            return True
    return False


def _is_the_secret(book: Book, evidence: Evidence, kind: bytes, shares: Mapping[int, bytes], threshold: int) -> bool:
    """Whether every `threshold` of the shares in a row give the secret that the dealer committed to."""
    points = sorted(shares)
    for start in range(len(points) - threshold + 1):
        some = tuple(points[start : start + threshold])
        try:
            seed = secret_sharing.reconstruct(shares, secret_sharing.coefficients_at_zero(some))
        except RemoteProtocolError:
            return False
        if kind == SELF and book.commitment(evidence.dealer, seed) != evidence.commitment:
            return False
        if kind == MASK:
            key = key_agreement.public_key(seed, Domain.MASK_KEY, book.terms.session)
            if key != book.entries[evidence.dealer].mask_key:
                return False
    return True


def _fits(book: Book, dealer: int, dealt: SealedShare, opened: OpenedShare) -> bool:
    commitments = (dealt.self_commitment, dealt.mask_commitment)
    return book.are_committed(dealer, dealt.owner, (opened.self_share, opened.mask_share), commitments)
