"""An owner's part in the end of a run: compare the result with what was sent, sign it, keep everybody's signatures."""

from client.context import OwnerContext
from client.state import ResultRecord
from common.certificates import body_of, check_receipts, check_result, deliveries_digest
from common.domain_separation import Domain
from common.errors import ConsentError, RemoteProtocolError
from common.merge_methods import METHODS
from common.messages import Message, Receipts, ReceiptsKept, Result, ResultReceived


def sign_result(owner: OwnerContext, message: Result) -> Message:
    """Sign the result, once under an agreement, if it is the model that this owner judged."""
    check_result(owner.agreement, message)  # check: coordinator-signed-the-result
    # If the run has ended, the ledger knows its result.
    if not owner.state.has_receipt(message.run):  # check: result-was-tested-unless-ended
        _check_was_tested(owner, message)
    body = body_of(owner.agreement, message)
    owner.ledger.sign_result(body.hex())
    record = ResultRecord(
        model=message.model,
        model_digest=message.model_digest,
        deliveries_digest=message.deliveries_digest,
        signature=message.signature.hex(),
    )
    owner.state.update_run(result=record)
    signature = owner.identity.sign(Domain.SIGN_RECEIPT, bytes.fromhex(message.run), body)
    return ResultReceived(run=message.run, owner=owner.name, signature=signature)


def _check_was_tested(owner: OwnerContext, message: Result) -> None:
    """The result is of the agreed method, and is the very model that this owner was sent to test."""
    run = owner.state.run
    delivered = run.delivered
    if message.deliveries_digest != deliveries_digest(delivered):  # check: result-names-all-models
        raise RemoteProtocolError("the result was reached with other models than those sent to this owner")
    prefixes = {deliveries_digest(delivered[:count]) for count in range(len(delivered) + 1)}
    if not owner.ledger.offered_deliveries <= prefixes:  # check: no-round-is-forgotten
        raise RemoteProtocolError(
            "the result omits models that were sent to this owner: rounds were measured with others, before the "
            "coordinator had this run forgotten"
        )
    method = owner.agreement.method
    if message.model not in owner.agreement.agreed(METHODS[method]):  # check: result-is-of-the-method
        raise ConsentError(f"the coordinator published {message.model!r}, which does not belong to the agreed method")
    tested = run.score_at(owner.schedule.delivery_of(method, "test").position)
    if tested is None or (tested.model, tested.model_digest) != (
        message.model,
        message.model_digest,
    ):  # check: published-is-the-tested-model
        raise RemoteProtocolError("the coordinator published another model than the one that this owner tested")


def keep_receipts(owner: OwnerContext, message: Receipts) -> Message:
    """Keep the result with everybody's signatures, and end the run."""
    result = owner.state.run.signed_result()
    if result is None:
        raise RemoteProtocolError("the coordinator sent receipts before a result")
    owners = check_receipts(owner.agreement, result, message.signatures)
    owner.state.write_receipt(
        message.run,
        {
            "agreement_digest": owner.agreement.digest(),
            "run": result.run,
            "model": result.model,
            "model_digest": result.model_digest,
            "deliveries_digest": result.deliveries_digest,
            "signature": result.signature.hex(),
            "owners": owners,
            "receipts": message.signatures.hex(),
        },
    )
    owner.state.end_run()
    return ReceiptsKept(run=message.run, owner=owner.name)
