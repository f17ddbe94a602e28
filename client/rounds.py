"""An owner's part in secure sums: open the round that is next, measure its vector, give it away as the sum demands."""

import secrets
from collections.abc import Iterator
from dataclasses import asdict, fields, replace

import numpy as np
from numpy.typing import NDArray

from client import received_models, verification
from client.context import OwnerContext
from client.state import MEASURED, RoundKind, TestedRecord
from common import scaling
from common.certificates import deliveries_digest
from common.errors import ConsentError, DataError, LocalProtocolError, RemoteProtocolError
from common.mapped import releasing, sha256_of
from common.messages import KeyShares, Message, OpeningChecked, OpenSum, UploadsOpened
from common.metrics import BASE, OWN_AT_HOME, Score, counts_cut
from common.metrics import contribution as metric_contribution
from common.privacy.noise import Noise
from common.scaling import Scales
from common.schedule import Round
from common.summation import fixed_point
from common.summation.masked.owner import MaskedOwner
from common.summation.protocol import SessionOver, SumTerms
from common.tensor_layout import TensorLayout

SCORED = {each.name for each in fields(Score)}
CONTRIBUTION = "contribution"  # the array that is measured once, in the scales round, and contributed in the next one


def open_round(owner: OwnerContext, message: OpenSum) -> Message:
    """Measure what the round is about and begin the sum. Nothing of the vector leaves yet.

    What is measured on a model waits for KeyShares, since the model is verified while the sum is set up.
    """
    schedule, run = owner.schedule, owner.state.run
    round_ = schedule.round_at(message.position)
    schedule.check_follows(message.position, run.begun, is_complete=run.is_complete)  # check: round-is-the-next-event
    if message.deliveries_digest != deliveries_digest(run.delivered):  # check: models-are-those-sent-here
        raise RemoteProtocolError(
            f"the coordinator opened the {round_.name} after sending other models than those sent to this owner"
        )
    verification.check_was_shown(owner)
    terms = _terms(owner, message, round_.layout, round_.kind)
    # To look at what is contributed, a model that is missing would be trained.
    _check_trained_once(owner)  # check: missing-models-are-noticed-first
    contributed = None if round_.kind == "metrics" else owner.contributed()
    again = owner.state.may_repeat(message.agreement_digest)
    owner.ledger.begin(message.round, message.session, message.position, round_.title, contributed, again)
    owner.state.forget_round()
    owner.state.update_run(begun=message.position, is_complete=False)
    if not verification.comes_first(owner, round_.kind):
        _measure(owner, terms, round_)
    side, reply = owner.summation.open(terms, owner.identity, secrets.token_bytes)
    owner.state.write_layout("vector", terms.layout)  # so that the next messages need no model
    owner.state.write_open_round(round_.kind, message, side.to_json())
    return reply


def _measure(owner: OwnerContext, terms: SumTerms, round_: Round) -> None:
    _check_trained_once(owner)
    try:
        noise = _noise(owner, round_)
        digest = _make_vector(owner, terms, _tensors(owner, round_, noise), noise)
        if owner.agreement.summation.kind == "plain":  # check: plain-sums-are-noted
            owner.ledger.give(round_.position, digest)
    except BaseException:
        if round_.kind == "scales":  # check: nothing-measured-stays
            owner.state.delete_array(CONTRIBUTION)
        raise


def _check_trained_once(owner: OwnerContext) -> None:
    """Raise DataError if a bounded model would be trained again: two of them reveal twice as much as was agreed."""
    if owner.agreement.privacy.epsilon is None or not owner.ledger.has_given:
        return
    if owner.settings.fine_tuned is not None:  # what it declares of a model that it brings is its own word
        return
    if not owner.workbench.is_kept():  # check: bounded-models-are-trained-once
        raise DataError(
            f"{owner.name}: the model that was contributed is gone, or its files or settings have changed since; with "
            "privacy.epsilon, no second one is trained under the same agreement",
            hint="put the state folder and the files back as they were, or make a new agreement",
        )


def _noise(owner: OwnerContext, round_: Round) -> Noise:
    """This owner's noise in a round. Its secret is drawn once under an agreement."""
    key = owner.ledger.noise_secret() if any(each.noise for each in round_.layout.entries) else b""
    return Noise(key=key, position=round_.position, layout=round_.layout, num_owners=len(owner.agreement.owners))


def _make_vector(owner: OwnerContext, terms: SumTerms, tensors: Iterator[tuple[str, NDArray]], noise: Noise) -> str:
    """Write this owner's vector to the disk, in fixed point. Of one that cannot be made, nothing stays there.

    Returns its SHA-256 with privacy.epsilon, which makes it the same whenever it is made of the same; else nothing.
    """
    vector = owner.state.create_array(MEASURED, terms.layout.size, "<f8")
    try:
        encoded = fixed_point.flatten_encoded(terms.layout, tensors, vector, len(terms.roster))
        noise.check_complete()
        digest = "" if owner.agreement.privacy.epsilon is None else sha256_of(encoded)
    except BaseException:
        owner.state.delete_array(MEASURED)
        raise
    owner.state.keep_array(MEASURED, under="vector")
    return digest


def opened(owner: OwnerContext, message: Message) -> OpenSum:
    """What opened the round that `message` continues. Raises RemoteProtocolError if none is open."""
    kept = owner.state.open_round
    if kept is None:  # check: round-is-open
        raise RemoteProtocolError(f"the coordinator sent {type(message).__name__} before it opened a sum")
    return kept.open_sum


def continue_round(owner: OwnerContext, message: Message) -> Message:
    """One more step of the open round, or of the check that is made meanwhile."""
    if isinstance(message, UploadsOpened) and verification.knows_session(owner, message.session):
        if message.session not in owner.state.run.opened:  # else the coordinator was killed before it knew
            verification.open_check(owner, message)
        return OpeningChecked(session=message.session, owner=owner.name)
    kept = owner.state.open_round
    assert kept is not None  # `opened` was asked before
    request = kept.open_sum
    terms = _terms(owner, request, owner.state.read_layout("vector"), kept.kind)
    side = owner.summation.from_json(kept.side, terms, owner.identity)
    if isinstance(message, UploadsOpened):
        return verification.open_metrics(owner, side, message)
    is_awaited = verification.comes_first(owner, kept.kind) and not side.is_done
    if isinstance(message, KeyShares) and is_awaited and not owner.state.has_array("vector"):
        round_ = owner.schedule.round_at(request.position)
        verification.check_all_verified(owner, round_)
        _measure(owner, terms, round_)
    # Once the survivors are signed for, no part is given any more, and the vector is deleted.
    has_vector = owner.state.has_array("vector") and not side.is_done
    words = owner.state.open_array("vector", terms.layout.size, "<u8") if has_vector else np.empty(0, "<u8")
    try:
        side, reply = side.answer(message, fixed_point.numbers(terms.layout, words), secrets.token_bytes)
    except SessionOver:
        owner.ledger.give_up(request.session)  # check: broken-session-is-burned
        owner.state.forget_round()  # check: broken-session-is-forgotten
        raise
    # All of this is on the disk before the reply leaves, so a process that is started again finds the same latch.
    if side.offers:  # check: offered-from-the-first-part
        if has_vector and kept.kind != "metrics" and any(entry.noise for entry in terms.layout.entries):
            owner.ledger.answer(request.position, request.session, lambda: sha256_of(words))
        again = owner.state.may_repeat(request.agreement_digest)
        owner.ledger.offer(request.position, request.session, request.deliveries_digest, again)
    if side.reveals:
        owner.ledger.reveal(request.session)
    owner.state.write_open_round(kept.kind, request, side.to_json())  # check: latch-is-written-first
    if side.is_done and owner.state.has_array("vector"):
        if owner.agreement.is_verified and kept.kind in verification.SOURCES:
            assert isinstance(side, MaskedOwner)
            verification.keep_own(owner, request.position, side)
        owner.state.delete_array("vector")  # check: vector-is-deleted-once-signed
    # Before that, the session can still be burned.
    if side.reveals and kept.kind == "contribution":  # check: contribution-outlives-a-burn
        owner.state.delete_array(CONTRIBUTION)
    # All that the coordinator needs has left, so the next event may come, unless it came without this owner already.
    # An open round is complete once this owner has added it up.
    must_open = owner.agreement.is_verified and kept.kind == "metrics"
    is_complete = side.is_complete and not must_open  # check: open-rounds-are-opened
    if is_complete and request.position == owner.state.run.begun:  # check: round-is-complete-once-revealed
        owner.state.update_run(is_complete=True)
    return reply


def _terms(owner: OwnerContext, request: OpenSum, layout: TensorLayout, kind: RoundKind) -> SumTerms:
    """What the sum is about, from the owner's own agreement; `request` is checked, not believed."""
    if layout.digest() != request.layout_digest:  # check: layout-is-the-agreed-one
        raise ConsentError("the coordinator's layout for this round is not the one that was agreed")
    return SumTerms(
        request=request,
        layout=layout,
        roster=owner.agreement.roster,
        needed_owners=owner.agreement.needed_owners,
        colluders=owner.agreement.colluders,
        is_open=owner.agreement.is_verified and kind == "metrics",
    )


def _tensors(owner: OwnerContext, round_: Round, noise: Noise) -> Iterator[tuple[str, NDArray]]:
    """What this owner adds to a round, in the order of its layout, with its noise."""
    if round_.kind == "scales":
        return _measure_for_scales(owner)
    if round_.kind == "contribution":
        return _scaled(owner) if owner.agreement.summation.has_scales else owner.workbench.contribution(noise)
    if round_.kind == "step":
        assert round_.method is not None
        assert round_.step is not None
        return owner.workbench.step_contribution(round_.method, round_.step, noise)
    assert round_.split is not None
    added = None if owner.agreement.privacy.epsilon is None else noise  # check: metrics-have-noise
    return metric_contribution(owner.agreement, owner.name, round_.split, _scores(owner, round_), added)


def _measure_for_scales(owner: OwnerContext) -> Iterator[tuple[str, NDArray]]:
    """What the scales are made of. The contribution is measured now, once, and kept for the next round."""
    layout = owner.workbench.contribution_layout()
    contribution = owner.state.create_array(CONTRIBUTION, layout.size, "<f8")
    layout.flatten(releasing(owner.workbench.contribution(), contribution), contribution)
    owner.state.write_layout(CONTRIBUTION, layout)
    return releasing(scaling.measures(layout, contribution), contribution)


def _scaled(owner: OwnerContext) -> Iterator[tuple[str, NDArray]]:
    """The contribution on the scales that all owners were sent."""
    layout = owner.state.read_layout(CONTRIBUTION)
    contribution = owner.state.open_array(CONTRIBUTION, layout.size, "<f8")
    exponents = owner.state.open_array("scales", scaling.exponents_layout(layout).size, "<f4")
    scales = Scales(layout, np.array(exponents))
    scales.check(contribution, len(owner.agreement.owners))
    return releasing(scaling.scaled(scales, contribution), contribution)


def _scores(owner: OwnerContext, round_: Round) -> dict[str, Score]:
    """How each model of a metrics round did. Candidates are judged when they arrive, or once they are verified."""
    split = round_.split
    assert split is not None
    scores = {}
    for model in round_.models:
        if model == BASE:
            scores[model] = owner.workbench.score_base(split)
        elif model == OWN_AT_HOME:
            score = owner.workbench.score_own(split)
            counts = counts_cut(owner.agreement, split, model)
            scores[model] = replace(score, cut=owner.workbench.cut_texts()) if counts else score
        else:
            delivery = owner.schedule.delivery_of(model, split)
            if owner.agreement.is_verified:
                received_models.judge(owner, delivery)
            kept = owner.state.run.score_at(delivery.position)
            if kept is None:  # the schedule lets no metrics round begin before its candidates are complete
                raise LocalProtocolError(f"no score was kept for {model} on {split} examples")
            scores[model] = Score(**kept.model_dump(include=SCORED))
    if split == "test":
        tested = tuple(TestedRecord(model=model, **asdict(score)) for model, score in scores.items())
        owner.state.update_run(tested=tested)
    return scores
