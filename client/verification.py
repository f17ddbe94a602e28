"""An owner's part in verifying what it is sent: nothing is measured on a model before it is known to be the merge.

The mathematics and the order of what is drawn are in common/verification.py; the sum that everybody makes and adds up
is in common/summation/pairwise.py. Its messages travel with those that set up the next round. An owner that finds a
model wrong keeps a record of it, forgets the run and answers nothing more under the agreement.
"""

import hashlib
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from client.context import OwnerContext
from client.records import Record
from client.state import (
    CheckRecord,
    DrawnRecord,
    Position,
    ReceivedRecord,
    ResultRecord,
    RoundKind,
    RunState,
    SummedRecord,
    TotalRecord,
    delivered_array,
    merged_step_array,
    own_array,
)
from common import scaling
from common.certificates import deliveries_digest, nonce_body
from common.domain_separation import Domain
from common.errors import ConsentError, LocalProtocolError, RemoteProtocolError, WrongModel
from common.mapped import release
from common.messages import (
    CheckKeys,
    CheckShares,
    CorrectionPart,
    Draw,
    Drawn,
    Message,
    OpeningChecked,
    UploadsOpened,
)
from common.metrics import read_total
from common.models.delta import VectorDelta, check_candidate
from common.publication import MAX_RECEIPTS_BYTES, SignedMean
from common.schedule import Delivery, Round
from common.settings_file import Digest, Hex
from common.summation import fixed_point
from common.summation.masked.opening import opened_total
from common.summation.masked.owner import MaskedOwner
from common.summation.own_part import OwnPart
from common.summation.pairwise import PairwiseSum, public_key, verify_nonce
from common.summation.protocol import OwnerSide
from common.summation.records import Nonce, Survivor, name_at
from common.summation.totals import SummedTensors
from common.tensor_layout import PART_BYTES, TensorLayout
from common.verification import Challenge, Claim, NotTheMerge, combination_seed, projection_seed, wrong_claims

if TYPE_CHECKING:
    from torch import Tensor

SOURCES: Final = ("scales", "contribution", "step")  # the rounds from whose totals models are merged
# In hexadecimal, the shares of all owners, which came in one message; beside them little more than a publication.
MAX_EVIDENCE_BYTES: Final = 2 * PART_BYTES + MAX_RECEIPTS_BYTES


class Evidence(Record):
    """What an owner keeps of something that the coordinator sent, and that is not the merge or not its metrics.

    The coordinator signed each delivery. `false` are the positions of those that are wrong; `expected` is the digest
    that the last of them should have, where this owner knows it. The owners signed the `uploads`, which do not add up
    to zero, under the digest of the `keys` of their check, which is at `position`. If it is the `result` that is wrong,
    the coordinator signed that; `totals` are the metrics that this owner added up. It proves nothing to others: the
    models are not in it. All bytes are in hexadecimal. deploy/commands/explain.py reads it.
    """

    agreement_digest: Digest
    run: Digest  # check: kept-runs-are-digests
    wrong: tuple[str, ...]
    delivered: tuple[ReceivedRecord, ...]
    false: tuple[Position, ...] = ()
    expected: Digest | Literal[""] = ""
    result: ResultRecord | None = None
    totals: tuple[TotalRecord, ...] = ()
    position: Position | None = None
    keys: Hex = ""
    uploads: Hex = ""
    signatures: Hex = ""


# --- before the check ---


def draw(owner: OwnerContext, message: Draw) -> Message:
    """Draw this owner's nonce, once it has the models, or its key, once it has the corrections too."""
    is_key = owner.schedule.check_at(message.position) is not None
    delivered, drawn = (_drawn_key if is_key else _drawn_nonce)(owner, message)
    body = nonce_body(message.position, delivered, drawn)
    signature = owner.identity.sign(Domain.SIGN_NONCE, bytes.fromhex(message.run), body)
    return Drawn(run=message.run, owner=owner.name, position=message.position, nonce=drawn.hex(), signature=signature)


def _drawn_nonce(owner: OwnerContext, message: Draw) -> tuple[str, bytes]:
    """The digest of what was delivered, and the nonce: one, whoever asks again."""
    run, schedule = owner.state.run, owner.schedule
    schedule.delivery_at(message.position, "correction")
    schedule.check_follows(
        message.position, run.begun, is_complete=run.is_complete
    )  # check: nonce-is-drawn-after-the-models
    drawn = run.drawn
    if drawn is None or drawn.position != message.position:  # check: nonce-is-drawn-once
        _check_none_is_pending(owner, message.position)
        drawn = DrawnRecord(
            position=message.position,
            delivered=deliveries_digest(run.delivered),
            nonce=secrets.token_hex(32),
            blind=secrets.token_hex(32) if drawn is None else drawn.blind,  # check: scales-have-one-factor-a-run
        )
        owner.state.update_run(drawn=drawn)
    return drawn.delivered, bytes.fromhex(drawn.nonce)


def _drawn_key(owner: OwnerContext, message: Draw) -> tuple[str, bytes]:
    """The digest of what was delivered, and the public key: one, whoever asks again."""
    run = owner.state.run
    has_corrections = any(each.position == message.position - 1 for each in run.received)
    if not has_corrections:  # check: key-is-drawn-after-the-corrections
        raise RemoteProtocolError("the coordinator asked for the key of a check that its corrections do not precede")
    correction = owner.schedule.delivery_at(message.position - 1, "correction")
    if {claim.delivery for claim in correction.claims} <= set(run.verified):  # check: no-check-is-made-again
        raise RemoteProtocolError("the coordinator asked for the key of a check that this owner has added up")
    check = run.check
    if check is None or check.position != message.position:  # check: check-key-is-drawn-once
        _check_none_is_pending(owner, message.position)
        delivered = deliveries_digest(run.delivered, message.position)
        check = CheckRecord(position=message.position, delivered=delivered, seed=secrets.token_hex(32))
        owner.state.update_run(check=check)
    return check.delivered, public_key(bytes.fromhex(check.seed), run.run)


def _check_none_is_pending(owner: OwnerContext, position: int) -> None:
    """Raise RemoteProtocolError unless this owner has added up every check before `position`.

    It keeps one nonce and one key. If it drew those of the next check meanwhile, the pending one could be skipped, or
    drawn for again.
    """
    verified = set(owner.state.run.verified)
    for each in owner.schedule.rounds:
        is_pending = not {claim.delivery for claim in each.claims} <= verified
        if each.position < position and is_pending:  # check: no-check-is-pending
            raise RemoteProtocolError(
                f"the coordinator asked for a draw at position {position}, but this owner has not added up the check "
                f"at {each.position}"
            )


def check_nonces(owner: OwnerContext, message: CorrectionPart) -> None:
    """Raise RemoteProtocolError unless the correction follows from a nonce of every contributor, each drawn for it.

    A coordinator that could invent a nonce would choose it last, so that rho hides its false model.
    """
    drawn, roster = owner.state.run.drawn, owner.agreement.roster
    nonces = {name_at(owner.agreement.owner_names, each.owner): each for each in Nonce.unpack_all(message.nonces)}
    mine = nonces[owner.name].nonce.hex() if owner.name in nonces else ""
    if drawn is None or (drawn.position, drawn.nonce) != (message.position, mine):  # check: my-nonce-is-in-it
        raise RemoteProtocolError("the coordinator sent corrections that do not follow from this owner's nonce")
    if tuple(nonces) != contributors(owner):  # check: nonces-of-all-contributors
        raise RemoteProtocolError(
            "the coordinator sent corrections that do not follow from the nonces of all owners whose contributions are "
            "merged"
        )
    for name, each in nonces.items():
        verify_nonce(
            roster[name], name, message.run, message.position, drawn.delivered, each
        )  # check: nonces-are-signed


def take_correction(owner: OwnerContext, message: CorrectionPart) -> None:
    """Keep from which nonces a whole correction follows."""
    drawn = owner.state.run.drawn
    assert drawn is not None  # `check_nonces` was asked before
    owner.state.update_run(drawn=drawn.model_copy(update={"nonces": message.nonces.hex()}))


def note_candidate(owner: OwnerContext, delivery: Delivery, taken: RunState) -> None:
    """A candidate that no check will prove must be one that was proved before, bit for bit, and its sweep's best.

    `taken`: the run as it is once the candidate, its last delivery, is taken.
    """
    if owner.schedule.is_checked(delivery):
        return
    received = taken.received[-1]
    proved = {each.model: each.digest for each in taken.received if each.position in taken.verified}
    expected = proved.get(received.model, "")
    if received.digest != expected:  # check: tested-is-the-validated-candidate
        wrong = f"{received.model}, which is not the candidate that was validated"
        condemn(owner, taken, [wrong], false=(received.position,), expected=expected)
    check_is_best(owner, taken, delivery.names)
    owner.state.update_run(verified=(*taken.verified, delivery.position))


def check_is_best(owner: OwnerContext, taken: RunState, candidates: Iterable[str]) -> None:
    """Raise WrongModel if a candidate other than the last delivery was better on validation rows, or as good and before
    it, by the totals that this owner added up; ConsentError if it was not in these.
    """
    metrics, chosen = validation_metrics(owner), taken.received[-1]
    best = max((each for each in candidates if each in metrics), key=metrics.__getitem__, default=chosen.model)
    if chosen.model == best:
        return
    says = f"the coordinator chose {chosen.model}; {best} was better on validation rows"
    if chosen.model not in metrics:  # check: only-lies-are-condemned
        raise ConsentError(f"{says}, as far as {owner.name} has added them up")
    condemn(
        owner, taken, [says], false=(chosen.position,), expected=digest_before(taken, best)
    )  # check: tested-candidate-is-the-best


def digest_before(taken: RunState, name: str) -> str:
    """The digest of what was sent under this name before the last delivery; empty if nothing was."""
    return next((each.digest for each in taken.received[:-1] if each.model == name), "")


def validation_metrics(owner: OwnerContext) -> dict[str, float]:
    """By candidate, the metric that decides, from the totals that this owner added up."""
    return {
        each.model: SignedMean.model_validate_json(each.metrics).chosen_by(owner.agreement.choose_by)
        for each in owner.state.run.totals
        if each.split == "validation"
    }


def check_what_follows(
    owner: OwnerContext, taken: RunState, delivery: Delivery, name: str, array: NDArray[np.float32]
) -> None:
    """Raise WrongModel unless what a candidate's method made of its solved tensors is what this owner makes of them,
    and the adapter to which it is cut is the closest of its rank. `taken`: the run with this candidate.
    """
    try:
        check_candidate(owner.workbench.plan, delivery.layout, array, owner.workbench.function(delivery.method, name))
    except RemoteProtocolError as violation:
        condemn(owner, taken, [violation.message], false=(delivery.position,))


def check_was_shown(owner: OwnerContext) -> None:
    """Raise RemoteProtocolError if this owner helped to open a sum that is open to all, and was not shown it.

    The ledger knows it, because the coordinator can make an owner forget a session.
    """
    run = owner.state.run
    if not owner.agreement.is_verified or run.begun is None or run.is_complete:
        return
    event = owner.schedule.events[run.begun]
    is_open = isinstance(event, Round) and event.is_open
    if is_open and owner.ledger.has_revealed(run.begun):  # check: opened-sums-are-shown-to-all
        raise RemoteProtocolError("the coordinator goes on without showing this owner the sum that it helped to open")


def comes_first(owner: OwnerContext, kind: RoundKind) -> bool:
    """Whether something is verified before a round of this kind is measured."""
    return owner.agreement.is_verified and kind in ("step", "metrics")


def check_all_verified(owner: OwnerContext, round_: Round) -> None:
    """Raise RemoteProtocolError if something that was sent before a round is yet to be verified."""
    run, schedule = owner.state.run, owner.schedule
    received = {each.position for each in run.received}
    for delivery in schedule.of_kind("merged_step", "candidate"):
        position = delivery.position
        if (
            position in received and delivery.layout.size and position not in run.verified
        ):  # check: nothing-is-measured-unverified
            raise RemoteProtocolError(
                f"the coordinator asked for the {round_.name}, but {delivery.name} is not verified"
            )


# --- the check ---


def contributors(owner: OwnerContext) -> tuple[str, ...]:
    """The owners whose contributions are merged, as this owner signed. Raises RemoteProtocolError if it did not."""
    summed = owner.state.run.summed
    if not summed:  # check: checked-by-contributors-only
        raise RemoteProtocolError("the coordinator asked for a check of a merge that holds nothing of this owner")
    return summed[-1].owners


def keep_own(owner: OwnerContext, position: int, side: MaskedOwner) -> None:
    """Keep what this owner contributed, and with whom, until what is merged from it is verified."""
    names = tuple(side.terms.name_of(each.owner) for each in Survivor.unpack_all(side.survivors))
    others = tuple(each for each in owner.state.run.summed if each.position != position)
    owner.state.keep_array("vector", under=own_array(position))
    owner.state.update_run(summed=(*others, SummedRecord(position=position, owners=names)))


def add_shares(owner: OwnerContext, message: CheckKeys) -> Message:
    """Give this owner's part of a check: once, and the same again to a coordinator that was restarted."""
    check, round_ = owner.state.run.check, owner.schedule.check_at(message.position)
    if round_ is None or check is None or check.position != message.position:  # check: key-comes-before-the-shares
        raise RemoteProtocolError("the coordinator asked for check shares before this owner's key")
    if check.keys not in ("", message.nonces.hex()):  # check: check-is-made-once
        raise RemoteProtocolError("the coordinator asked for the same check with other keys")
    joint, seed = _sum_of(owner, round_, check, message.nonces), bytes.fromhex(check.seed)
    mine = joint.entries.get(owner.name)
    if mine is None or mine.nonce != public_key(seed, message.run):  # check: my-check-key-is-in-it
        raise RemoteProtocolError("the coordinator made a check without this owner's key")
    joint.check(contributors(owner))
    vector = np.zeros(round_.layout.size, dtype="<u8")
    round_.layout.flatten(shares(owner, round_, joint.digest), vector)
    payload = joint.masked(seed, owner.name, vector)
    upload = hashlib.sha256(payload.data).hexdigest()
    if check.upload not in ("", upload):  # check: check-shares-never-change
        raise LocalProtocolError("the check shares have changed since they were sent, so they do not leave again")
    changes = {"keys": message.nonces.hex(), "session": joint.session, "upload": upload}
    owner.state.update_run(check=check.model_copy(update=changes))  # on the disk before they leave
    return CheckShares(
        run=message.run,
        owner=owner.name,
        position=message.position,
        payload=payload,
        signature=joint.sign(owner.identity, payload),
    )


def shares(owner: OwnerContext, round_: Round, keys_digest: bytes) -> Iterator[tuple[str, NDArray[np.uint64]]]:
    """What this owner adds to a check, in the order of its layout."""
    drawn = owner.state.run.drawn
    assert drawn is not None  # the key was drawn after the corrections, and these after the nonces
    correction = owner.schedule.delivery_at(round_.position - 1, "correction")
    challenge = Challenge(
        claims=round_.claims,
        rho_seed=projection_seed(drawn.delivered, bytes.fromhex(drawn.nonces)),
        combination_seed=combination_seed(keys_digest),
        blind=bytes.fromhex(drawn.blind),
        sent=np.array(owner.state.open_array(delivered_array(correction.position), correction.layout.size, "<f4")),
    )
    for claim in round_.claims:
        with _condemning(owner, claim.delivery):
            _check_known(owner, claim)
        with _condemning(owner, correction.position):
            yield from challenge.shares(claim, _delta(owner, claim.delivery), _own(owner, claim.source))


@contextmanager
def _condemning(owner: OwnerContext, position: int) -> Iterator[None]:
    """Condemn the delivery at this position for what is found inside the `with` block."""
    try:
        yield
    except NotTheMerge as violation:
        condemn(owner, owner.state.run, [violation.message], false=(position,))


def knows_session(owner: OwnerContext, session: str) -> bool:
    """Whether it is a sum that this owner has added up, or the check that it is to add up now."""
    run = owner.state.run
    return session in run.opened or (run.check is not None and session == run.check.session)


def open_check(owner: OwnerContext, message: UploadsOpened) -> None:
    """Add up a check. Raises WrongModel if it shows that something that was sent is not the merge."""
    run = owner.state.run
    check = run.check
    assert check is not None  # `knows_session` was asked before
    round_ = owner.schedule.check_at(check.position)
    assert round_ is not None
    total = _sum_of(owner, round_, check, bytes.fromhex(check.keys)).total(message.payload, message.proofs)
    wrong = wrong_claims(round_.claims, total)
    if wrong:
        condemn(
            owner,
            run,
            wrong,
            false=tuple(each.delivery for each in round_.claims if wrong_claims([each], total)),
            position=check.position,
            keys=check.keys,
            uploads=message.payload.tobytes().hex(),
            signatures=message.proofs.hex(),
        )
    verified = (*run.verified, *(claim.delivery for claim in round_.claims))
    owner.state.update_run(verified=verified, opened=(*run.opened, message.session), check=None)
    _delete_proved(owner, round_)


def _sum_of(owner: OwnerContext, round_: Round, check: CheckRecord, keys: bytes) -> PairwiseSum:
    return PairwiseSum(
        run=owner.state.run.run,
        position=round_.position,
        delivered=check.delivered,
        layout=round_.layout,
        roster=owner.agreement.roster,
        keys=keys,
    )


def open_metrics(owner: OwnerContext, side: OwnerSide, message: UploadsOpened) -> Message:
    """Add up the metrics of all owners."""
    if not isinstance(side, MaskedOwner) or not side.terms.is_open:  # check: opened-sum-is-for-all
        raise RemoteProtocolError("the coordinator opened a sum that is not open to all owners")
    run, request = owner.state.run, side.terms.request
    reply = OpeningChecked(session=message.session, owner=owner.name)
    if message.session != request.session:  # check: opened-sum-is-the-last
        raise RemoteProtocolError("the coordinator opened another sum than the last one")
    if request.position != run.begun or run.is_complete:
        return reply  # asked again
    total, round_ = opened_total(side, message), owner.schedule.round_at(request.position)
    assert round_.split is not None
    scores = read_total(owner.agreement, round_.split, round_.models, total.vector)
    totals = tuple(
        TotalRecord(split=round_.split, model=model, metrics=SignedMean.of(score).model_dump_json())
        for model, score in scores.items()
    )
    opened = (*run.opened, message.session)
    owner.state.update_run(totals=(*run.totals, *totals), opened=opened, is_complete=True)
    return reply


def _delete_proved(owner: OwnerContext, round_: Round) -> None:
    """Delete what this owner contributed, as far as no later check needs it, and the corrections."""
    owner.state.delete_array(delivered_array(round_.position - 1))
    for each in owner.state.run.summed:
        last = owner.schedule.last_check_of(each.position)
        if last is None or last <= round_.position:  # check: contributions-are-deleted-once-verified
            owner.state.delete_array(own_array(each.position))


# --- a model that is wrong ---


def check_no_evidence(owner: OwnerContext) -> None:
    """Raise WrongModel if a model that was sent under this agreement was not the merge. What a process that was killed
    meanwhile left of the run goes, too.
    """
    digest = owner.agreement.digest()
    path = owner.state.evidence(digest)
    if path is not None:  # check: nothing-after-a-wrong-model
        with suppress(RemoteProtocolError):  # no run is left
            if owner.state.run.agreement_digest == digest:
                owner.state.end_run()
        raise wrong_model(path)


def condemn(owner: OwnerContext, taken: RunState, wrong: list[str], **about: object) -> NoReturn:
    """Keep a record, forget the run, and raise WrongModel. `taken`: the run with what is wrong; `about`: what else
    Evidence says.
    """
    evidence = Evidence(
        agreement_digest=taken.agreement_digest,
        run=taken.run,
        wrong=tuple(wrong),
        delivered=taken.received,  # check: evidence-holds-the-lie
        **about,  # type: ignore[arg-type]
    )
    path = owner.state.write_evidence(taken.agreement_digest, evidence)
    owner.state.end_run()
    raise wrong_model(path, evidence)


def wrong_model(path: Path, evidence: Evidence | None = None) -> WrongModel:
    """What an owner says of a model, or a result, that is not the merge; `path` is its record. `evidence`: what it
    holds, if it was just written.
    """
    about = "" if evidence is None else f" ({evidence.wrong[0]})"
    is_result = _is_about_a_result(path) if evidence is None else evidence.result is not None
    if is_result:
        says = f"the result that the coordinator signed is not what the owners verified{about}; nothing was signed here"
    else:
        sent = f"the model that the coordinator sent is not the merge of what was contributed{about}"
        says = f"{sent}; nothing was measured on it"
    return WrongModel(
        says,
        hint=f"show {path} to the other owners (amalgram verify OWNER.toml explains it); under this agreement, nothing "
        "more is answered",
    )


def _is_about_a_result(path: Path) -> bool:
    with suppress(OSError, ValidationError):
        return Evidence.model_validate_json(path.read_bytes()).result is not None
    return False


# --- what the parts share ---


def _delta(owner: OwnerContext, position: int) -> VectorDelta:
    """What was delivered at a position of the schedule."""
    delivery = owner.schedule.events[position]
    assert isinstance(delivery, Delivery)
    return VectorDelta(owner.workbench.plan, _array(owner, delivery))


def _array(owner: OwnerContext, delivery: Delivery) -> tuple[TensorLayout, NDArray[np.float32]]:
    name = delivered_array(delivery.position)
    if delivery.kind == "merged_step":
        assert delivery.method is not None
        assert delivery.step is not None
        name = merged_step_array(delivery.method, delivery.step)
    # Many tensors are read of it, and a memmap takes long to slice.
    return delivery.layout, np.asarray(owner.state.open_array(name, delivery.layout.size, "<f4"))


def _check_known(owner: OwnerContext, claim: Claim) -> None:
    """Raise NotTheMerge unless a model has every number that is proved of another one, bit for bit."""
    model = _delta(owner, claim.delivery)
    proved = {position: _delta(owner, position) for position in {position for _, position in claim.known}}
    for name, position in claim.known:
        if not _are_same_bits(model[name], proved[position][name]):  # check: known-parts-are-the-same
            sent = owner.schedule.events[position].name
            raise NotTheMerge(f"the coordinator sent a model whose {name} is not that of the {sent}")


def _are_same_bits(first: "Tensor", second: "Tensor") -> bool:
    return first.numpy().tobytes() == second.numpy().tobytes()


def _own(owner: OwnerContext, source: int) -> SummedTensors:
    """What this owner contributed to a round, as it decodes from its own vector."""
    layout = owner.schedule.events[source].layout
    names = contributors(owner)
    words = np.asarray(owner.state.open_array(own_array(source), layout.size, "<u8"))  # see `_array`
    release(words)
    roster_size = len(owner.agreement.owners)
    part = OwnPart(layout=layout, encoded=fixed_point.numbers(layout, words), owners=names, roster_size=roster_size)
    if layout.ring_bits == 64:
        return part
    whole = owner.workbench.contribution_layout()
    scales_layout = scaling.exponents_layout(whole)
    exponents = np.array(owner.state.open_array("scales", scales_layout.size, "<f4"))
    measured = _own(owner, owner.schedule.find("scales").position)
    return scaling.RescaledTotal(scaled=part, measured=measured, scales=scaling.Scales(whole, exponents))
