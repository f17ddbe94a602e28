"""What owners certify together: receipts for the published model, and sessions that will never be opened.

Both are lists of signatures over the same bytes, which the coordinator relays.

Receipts. Each owner compares the published model with those that it was sent, and its files with those that it would
have written itself. It signs all of it, and then sees everybody's signatures over the same result. Two groups that were
given different models would each lack the other's signatures.

Burned sessions. After a crash, an owner that burns a session signs that it has not revealed, and never will reveal, a
share in it. Up to c of b signatures may be false. With b > N - t + c, fewer than t owners remain who could reveal, and
t shares are needed. So a vector that was offered to that session may be offered again.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

from common.agreement import COORDINATOR, Agreement
from common.domain_separation import Domain
from common.errors import ConsentError, RemoteProtocolError
from common.identity import Identity, verify
from common.messages import Result
from common.summation.records import Signed, name_at
from common.thresholds import MAX_COMPLETE, burn_quorum


@dataclass(frozen=True, kw_only=True)
class Delivered:
    """What the coordinator sent every owner at `position` of the schedule.

    `model` is a candidate's name, or the digest of the nonces that a correction follows from, and empty for anything
    else; `digest` is the SHA-256 of the vector as it travelled.
    """

    position: int
    model: str
    digest: str


def deliveries_digest(delivered: Sequence[Delivered], before: float = inf) -> str:
    """64 hexadecimal digits for everything that was sent to the owners, in order; `before` some position."""
    fields = [[each.position, each.model, each.digest] for each in delivered if each.position < before]
    canonical = json.dumps(fields, separators=(",", ":"))
    return hashlib.sha256(Domain.DELIVERIES.value + canonical.encode()).hexdigest()


def delivery_body(agreement_digest: str, delivered: Delivered) -> bytes:
    """What the coordinator signs with everything that it sends."""
    return bytes.fromhex(agreement_digest) + bytes.fromhex(deliveries_digest([delivered]))


def check_delivery(agreement: Agreement, run: str, delivered: Delivered, signature: bytes) -> None:
    """Raise RemoteProtocolError unless the coordinator of the agreement signed that it sent this in this run."""
    public_key, session = bytes.fromhex(agreement.coordinator.public_key), bytes.fromhex(run)
    body = delivery_body(agreement.digest(), delivered)
    verify(public_key, Domain.SIGN_DELIVERY, session, COORDINATOR, body, signature)


def nonces_digest(nonces: bytes) -> str:
    """64 hexadecimal digits for the nonces that a correction follows from; they stand for its name in Delivered."""
    return hashlib.sha256(nonces).hexdigest()


def nonce_body(position: int, delivered: str, nonce: bytes) -> bytes:
    """What an owner signs with its nonce: for which corrections it drew it, and the digest of the deliveries before."""
    return position.to_bytes(8) + bytes.fromhex(delivered) + nonce  # check: nonces-are-of-this-check


def presence_body(agreement_digest: str, next_round: int, pending: str) -> bytes:
    """What an owner signs at the roll call."""
    return bytes.fromhex(agreement_digest) + next_round.to_bytes(8) + pending.encode()


def result_body(agreement: Agreement, model: str, model_digest: str, digest: str, publication: bytes) -> bytes:
    """What the coordinator and owners sign; `digest` is of the deliveries."""
    published = hashlib.sha256(publication).hexdigest()
    values = [agreement.digest(), model, model_digest, digest, published]  # check: receipts-cover-the-publication
    canonical = json.dumps(values, separators=(",", ":")).encode()
    return hashlib.sha256(Domain.RESULT.value + canonical).digest()


def body_of(agreement: Agreement, result: Result) -> bytes:
    return result_body(agreement, result.model, result.model_digest, result.deliveries_digest, result.publication)


def check_result(agreement: Agreement, result: Result) -> None:
    """Raise RemoteProtocolError unless the coordinator of the agreement signed it."""
    public_key = bytes.fromhex(agreement.coordinator.public_key)
    body = body_of(agreement, result)
    verify(public_key, Domain.SIGN_RESULT, bytes.fromhex(result.run), COORDINATOR, body, result.signature)


def check_receipts(agreement: Agreement, result: Result, signatures: bytes) -> list[str]:
    """The owners that signed the same result. Raises RemoteProtocolError if the agreement needs more of them."""
    run, body = bytes.fromhex(result.run), body_of(agreement, result)
    signers = check_signed(agreement.roster, Domain.SIGN_RECEIPT, run, body, signatures)
    if len(signers) < agreement.needed_owners:  # check: receipts-of-enough-owners
        raise RemoteProtocolError(
            f"receipts: {len(signers)} owners signed the result that this owner was given, {agreement.needed_owners} "
            "must: others may have been given a different one"
        )
    return signers


def check_signed(
    roster: Mapping[str, bytes], domain: Domain, session: bytes, body: bytes, signatures: bytes
) -> list[str]:
    """The owners that signed `body`, each once. Raises RemoteProtocolError if a signature is not valid."""
    names = tuple(roster)
    signers = []
    for signed in Signed.unpack_all(signatures):
        name = name_at(names, signed.owner)
        verify(roster[name], domain, session, name, body, signed.signature)  # check: lists-are-signed-by-name
        signers.append(name)
    return signers


def sign_burned(identity: Identity, agreement_digest: str, session: str) -> bytes:
    return identity.sign(Domain.SIGN_BURNED, bytes.fromhex(session), bytes.fromhex(agreement_digest))


def check_burned_by(agreement: Agreement, session: str, signed: Sequence[Signed]) -> list[str]:
    """The owners that burned `session`. Raises RemoteProtocolError if a signature is not valid."""
    body = bytes.fromhex(agreement.digest())
    packed = Signed.pack_all(signed)
    return check_signed(agreement.roster, Domain.SIGN_BURNED, bytes.fromhex(session), body, packed)


def check_burned(agreement: Agreement, session: str, signatures: bytes) -> None:
    """Raise RemoteProtocolError unless `signatures` prove that nobody can open `session`."""
    count = len(agreement.owners)
    if count > MAX_COMPLETE:
        raise ConsentError(
            f"with more than {MAX_COMPLETE} owners, a session cannot be certified as burned",
            hint="a new run needs a new agreement",
        )
    signers = check_burned_by(agreement, session, Signed.unpack_all(signatures))
    needed = burn_quorum(count, agreement.colluders)
    if len(signers) < needed:  # check: burned-by-enough-owners
        raise RemoteProtocolError(f"certificate: {len(signers)} owners burned the session, {needed} are needed")
