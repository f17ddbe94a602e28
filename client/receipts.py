"""An owner's part in the end of a run: compare the result with what was sent, sign it, keep everybody's signatures.

An owner signs files that it could have written itself, from its own copy of the base and the model that it tested.
Of the metrics it can check its own and, where merges are verified, the totals; everybody signs the same ones.
"""

from typing import NoReturn

from client import mixtures
from client.context import OwnerContext
from client.state import ResultRecord, TestedRecord
from client.verification import check_was_shown, condemn, contributors
from common.certificates import body_of, check_receipts, check_result, deliveries_digest
from common.domain_separation import Domain
from common.errors import ConsentError, RemoteProtocolError
from common.merge_methods import METHODS
from common.messages import Message, Receipts, ReceiptsKept, Result, ResultReceived
from common.metrics import BASE, OWN_AT_HOME, Score, thousandths
from common.publication import (
    CARD,
    Publication,
    PublishedFolder,
    PublishedReceipts,
    SignedMean,
    SignedScore,
    read_publication,
)

METRIC_TOLERANCE = 1e-6


def sign_result(owner: OwnerContext, message: Result) -> Message:
    """Sign the result, once under an agreement, if it is the model that this owner judged."""
    check_result(owner.agreement, message)  # check: coordinator-signed-the-result
    publication = read_publication(message.publication)
    # If the run has ended, the ledger knows its result. Files in the state folder may be of another agreement.
    if not owner.ledger.has_ended(message.run):  # check: result-was-tested-unless-ended
        _check_was_tested(owner, message, publication)
    body = body_of(owner.agreement, message)
    owner.ledger.sign_result(body.hex())
    owner.state.update_run(result=ResultRecord.of(message))
    signature = owner.identity.sign(Domain.SIGN_RECEIPT, bytes.fromhex(message.run), body)
    return ResultReceived(run=message.run, owner=owner.name, signature=signature)


def _check_was_tested(owner: OwnerContext, message: Result, publication: Publication) -> None:
    """The result is of the agreed method, and it and its files are the model that this owner tested."""
    check_was_shown(owner)
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
        says = "the coordinator published another model than the one that this owner tested"
        if tested is not None and owner.agreement.is_verified:
            _condemn(owner, message, [says, f"tested was {tested.model}, SHA-256 {tested.model_digest}"])
        raise RemoteProtocolError(says)
    assert run.published is not None  # written when the tested model had arrived
    _check_totals(owner, message, publication)  # first, because it keeps a record
    _check_files(run.published, publication)
    _check_metrics(owner, publication)
    _check_mixtures(owner, publication)
    _check_is_good_enough(owner)


def _check_files(own: PublishedFolder, publication: Publication) -> None:
    """The published files are those that this owner would have written, to the byte, and its configuration is, too.

    Except for the card, which an owner cannot compute.
    """
    for key in sorted(own.configuration.keys() | publication.configuration.keys()):
        expected, found = own.configuration.get(key), publication.configuration.get(key)
        if found != expected:  # check: configuration-is-the-agreed-one
            raise ConsentError(
                f"the published configuration has {key} = {_shortened(found)}, the agreed one has "
                f"{_shortened(expected)}",
                hint="nothing was signed; ask the coordinator what was changed, and why",
            )
    expected_files = {**own.files, CARD: ""}
    for name in sorted(expected_files.keys() | publication.files.keys()):
        if name not in publication.files or name not in expected_files:  # check: published-files-are-the-agreed-ones
            lacks = "lacks" if name in expected_files else "has an additional file"
            raise ConsentError(f"the published folder {lacks} {name}", hint="nothing was signed; ask the coordinator")
        if name != CARD and publication.files[name] != own.files[name]:  # check: published-files-are-mine
            raise ConsentError(
                f"the published {name} is not the file that this owner would have written",
                hint="nothing was signed; compare the versions of transformers and safetensors with the coordinator's, "
                "and the two copies of the base",
            )


def _check_metrics(owner: OwnerContext, publication: Publication) -> None:
    """The metrics are of the agreed models, and those that are shown for this owner are what it measured."""
    agreement = owner.agreement
    models = {BASE, OWN_AT_HOME, *agreement.methods}
    if publication.test.keys() != models:  # check: metrics-are-of-the-agreed-models
        raise RemoteProtocolError("the coordinator published metrics of other models than those that were agreed")
    for tested in owner.state.run.tested if owner.name in agreement.shown_owners else ():
        shown = publication.test[tested.model].by_owner.get(owner.name)
        if shown is None and not _is_in_last_total(owner):
            continue
        if not _are_equal(tested, shown):  # check: own-metrics-are-published-as-measured
            raise ConsentError(
                f"the coordinator published other metrics of {tested.model} for {owner.name} than were measured here",
                hint="nothing was signed; the owner's own metrics are in its state folder, run/run.json",
            )


def _check_totals(owner: OwnerContext, message: Result, publication: Publication) -> None:
    """Where merges are verified: the owners are those that verified it, and the metrics are the totals that this owner
    added up by itself. If it did not, it cannot know that anybody did. Raises WrongModel for other metrics.
    """
    if not owner.agreement.is_verified:
        return
    run = owner.state.run
    if publication.owners != contributors(owner):  # check: published-owners-verified
        raise RemoteProtocolError("the coordinator published other owners than those whose contributions are merged")
    for split, published in (("validation", publication.validation), ("test", publication.test)):
        own = {each.model: SignedMean.model_validate_json(each.metrics) for each in run.totals if each.split == split}
        rounds = [each for each in owner.schedule.rounds if (each.kind, each.split) == ("metrics", split)]
        has_all = own.keys() == {model for each in rounds for model in each.models}
        if not has_all:  # check: totals-that-were-missed-are-not-signed
            raise ConsentError(
                f"{owner.name} has not added up the {split} metrics, so it does not sign what is said of them",
                hint="nothing was signed; the totals are in its state folder, run/run.json",
            )
        if published != own:  # check: published-totals-are-mine
            says = f"the coordinator published other {split} metrics than the totals that this owner added up"
            _condemn(owner, message, [says])


def _condemn(owner: OwnerContext, message: Result, wrong: list[str]) -> NoReturn:
    """Keep the result, which the coordinator signed, and answer nothing more."""
    run = owner.state.run
    condemn(owner, run, wrong, result=ResultRecord.of(message), totals=run.totals)


def _check_mixtures(owner: OwnerContext, publication: Publication) -> None:
    """The mixtures that are published as tried are those that this owner was asked to judge."""
    own = mixtures.received(owner) if owner.agreement.searches else {}
    if publication.mixtures != own:  # check: published-mixtures-are-those-tried
        raise ConsentError(
            "the coordinator published other mixtures than this owner was asked to judge",
            hint="nothing was signed; what was asked is in the owner's state folder, run/",
        )


def _is_in_last_total(owner: OwnerContext) -> bool:
    """Whether this owner completed the round of test metrics, and so did not drop out of it."""
    run = owner.state.run
    return run.is_complete and run.begun == owner.schedule.events[-1].position


def _check_is_good_enough(owner: OwnerContext) -> None:
    """If the agreement says so, the model is as good as it demands on this owner's rows, and as good as the base."""
    agreement, measured = owner.agreement, {each.model: each for each in owner.state.run.tested}
    least, metric = agreement.evaluation.sign_above, agreement.judge_by
    if least is None:
        return
    if not measured:
        raise ConsentError(
            f"{owner.name} took no part in the last round, so it has not compared the model with its base"
        )
    values = {
        model: Score(**each.model_dump(exclude={"model"})).main if metric == agreement.task.metrics[0] else each.metric
        for model, each in measured.items()
    }
    merged, base = values[agreement.method], values[BASE]
    if merged < max(least, base):  # check: signed-model-is-good-enough
        raise ConsentError(
            f"the merged model's {metric.replace('_', ' ')} on the test rows of {owner.name} is {merged:.3f}; it signs "
            f"{least:.3f} or more (evaluation.sign_above), and no less than its base's {base:.3f}",
            hint="nothing was signed; a contribution may be dishonest, or its training may have failed",
        )


def _are_equal(tested: TestedRecord, shown: SignedScore | None) -> bool:
    """Whether a total shows what was contributed; the last bits of a metric are lost in fixed point.

    A regression's metrics are made of the sums that travel, in any unit; others travel in thousandths.
    """
    is_regression = tested.correct is None
    metric = tested.metric if is_regression else thousandths(tested.metric)
    room = METRIC_TOLERANCE * (max(1.0, metric) if is_regression else 1.0)
    return (
        shown is not None
        and (shown.correct, shown.predictions) == (tested.correct, tested.rows)
        and abs(shown.metric - metric) < room
        and abs((shown.pearson_r or 0.0) - (tested.pearson_r or 0.0)) < METRIC_TOLERANCE
    )


def _shortened(value: object) -> str:
    return "nothing" if value is None else ascii(value)[:100]


def keep_receipts(owner: OwnerContext, message: Receipts) -> Message:
    """Keep the result with everybody's signatures, and end the run."""
    result = owner.state.run.signed_result()
    if result is None:
        raise RemoteProtocolError("the coordinator sent receipts before a result")
    check_receipts(owner.agreement, result, message.signatures)
    kept = PublishedReceipts.of(owner.agreement, result, message.signatures)
    owner.state.write_receipts(owner.agreement.digest(), kept)
    owner.ledger.end(message.run)
    owner.state.end_run()
    return ReceiptsKept(run=message.run, owner=owner.name)
