"""What owners were sent and what was published, signed by all, so that no owner can be told another story.

Each owner compares the result with the candidates that it was sent, signs it, and then sees everybody's signatures
under the very same result. Two groups that were given different results would each lack the other's signatures.
"""

import hashlib
import json
from collections.abc import Sequence

from common.agreement import COORDINATOR, Agreement
from common.errors import RemoteProtocolError
from common.identity import verify
from common.labels import Label
from common.messages import Result
from common.signed_list import check_signed

Candidate = tuple[str, str, str]  # (model, split, SHA-256 of its delta), in the order in which they were sent


def candidates_digest(candidates: Sequence[Candidate]) -> str:
    """64 hexadecimal digits for everything that was sent to the owners."""
    canonical = json.dumps([list(candidate) for candidate in candidates], separators=(",", ":")).encode()
    return hashlib.sha256(Label.CANDIDATES.value + canonical).hexdigest()


def result_body(agreement: Agreement, model: str, model_digest: str, digest: str) -> bytes:
    """What is signed about a result."""
    canonical = json.dumps([agreement.digest(), model, model_digest, digest], separators=(",", ":")).encode()
    return hashlib.sha256(Label.RESULT.value + canonical).digest()


def body_of(agreement: Agreement, result: Result) -> bytes:
    return result_body(agreement, result.model, result.model_digest, result.candidates_digest)


def check_result(agreement: Agreement, result: Result) -> None:
    """Raise RemoteProtocolError unless the coordinator of the agreement signed it."""
    public_key = bytes.fromhex(agreement.coordinator.public_key)
    body = body_of(agreement, result)
    verify(public_key, Label.SIGN_RESULT, bytes.fromhex(result.run), COORDINATOR, body, result.signature)


def check_receipts(agreement: Agreement, result: Result, signatures: bytes) -> list[str]:
    """The owners that signed the same result. Raises RemoteProtocolError if they are fewer than the agreement needs."""
    run, body = bytes.fromhex(result.run), body_of(agreement, result)
    signers = check_signed(agreement.roster, Label.SIGN_RECEIPT, run, body, signatures)
    if len(signers) < agreement.needed_owners:
        raise RemoteProtocolError(
            f"receipts: {len(signers)} owners signed the result that was given here, {agreement.needed_owners} must "
            "have; others may have been given another one"
        )
    return signers
