"""After a crash: certify that a session can never be opened, so that what was offered to it may be offered again.

An owner that burns a session signs that it never revealed, and never will reveal, a share in it. Of b signatures up to
c may be lies; with b > N - t + c, fewer than t owners are left who could reveal, and t shares are needed.
"""

from collections.abc import Sequence

from common.agreement import Agreement
from common.errors import ConsentError, RemoteProtocolError
from common.identity import Identity
from common.labels import Label
from common.signed_list import check_signed
from common.summation.neighbours import MAX_COMPLETE, quorum
from common.summation.records import Signed


def burn_quorum(num_owners: int, colluders: int) -> int:
    """How many owners must have burned a session. At most the quorum t, so those who can sum can also recover."""
    return num_owners - quorum(num_owners, colluders) + colluders + 1


def sign_burned(identity: Identity, agreement_digest: str, session: str) -> bytes:
    return identity.sign(Label.SIGN_BURNED, bytes.fromhex(session), bytes.fromhex(agreement_digest))


def check_burned_by(agreement: Agreement, session: str, signed: Sequence[Signed]) -> list[str]:
    """The owners that burned `session`. Raises RemoteProtocolError if one of the signatures does not hold."""
    body = bytes.fromhex(agreement.digest())
    packed = Signed.pack_all(signed)
    return check_signed(agreement.roster, Label.SIGN_BURNED, bytes.fromhex(session), body, packed)


def check_burned(agreement: Agreement, session: str, signatures: bytes) -> None:
    """Raise RemoteProtocolError unless `signatures` prove that nobody can open `session`."""
    count = len(agreement.owners)
    if count > MAX_COMPLETE:
        raise ConsentError(
            f"above {MAX_COMPLETE} owners a session cannot be certified as over; a new run needs a new agreement"
        )
    signers = check_burned_by(agreement, session, Signed.unpack_all(signatures))
    needed = burn_quorum(count, agreement.colluders)
    if len(signers) < needed:
        raise RemoteProtocolError(f"certificate: {len(signers)} owners burned the session, {needed} must have")
