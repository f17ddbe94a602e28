"""What the coordinator sends an owner between rounds: candidates to be judged, merged steps and scales to measure with,
and corrections to verify them with.

Each arrives in parts and is taken once. The same delivery may be repeated, bit for bit, because a coordinator that was
started again repeats what it sent last; another one in its place is refused.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from client import mixtures, verification
from client.context import OwnerContext
from client.state import ArrivingRecord, ReceivedRecord, RunState, delivered_array, merged_step_array, score_record
from common.certificates import Delivered, check_delivery, nonces_digest
from common.errors import ConsentError, RemoteProtocolError
from common.mapped import is_within, sha256_of
from common.messages import (
    CandidatePart,
    CorrectionPart,
    DeliveryPart,
    MergedStepPart,
    Message,
    MixturePart,
    PartReceived,
    ScalesPart,
)
from common.models.delta import published_delta
from common.packed import unpacked
from common.schedule import Delivery, DeliveryKind
from common.tensor_layout import TensorLayout
from common.verification import LARGEST_NUMBER

if TYPE_CHECKING:
    from torch import Tensor

KINDS: dict[type[DeliveryPart], DeliveryKind] = {
    CandidatePart: "candidate",
    CorrectionPart: "correction",
    MixturePart: "mixture",
    MergedStepPart: "merged_step",
    ScalesPart: "scales",
}
ARRIVING = "arriving"


def take_part(owner: OwnerContext, message: DeliveryPart) -> Message:
    """Take one part. With the last one, a candidate is judged, unless it must be verified first. Anything else is kept
    for the next round.
    """
    model = _name_of(message)
    arriving = owner.state.run.arriving
    continues = message.part > 0 and arriving is not None
    if (
        continues
        and arriving is not None
        and (arriving.position, arriving.model) == (message.position, model)  # check: part-continues-its-model
    ):
        layout, expected = owner.state.read_layout(ARRIVING), arriving.next_part
    else:
        layout, expected = _begin(owner, message, model), 0
    slices = layout.part_slices(bytes_per_number=4)
    position = slices[expected]
    is_packed = isinstance(message, CorrectionPart)
    numbers = unpacked(message.payload, position.stop - position.start) if is_packed else message.payload
    if (
        (message.part, message.parts) != (expected, len(slices))  # check: parts-come-in-order
        or numbers.shape != (position.stop - position.start,)  # check: part-has-its-shape
        or numbers.dtype != np.dtype("<f4")
    ):
        raise RemoteProtocolError(
            f"the coordinator sent part {message.part} of event {message.position} out of order or with another shape"
        )
    if expected == 0:
        array = _start_arrival(owner, message, layout)
    else:
        array = owner.state.open_array(ARRIVING, layout.size, "<f4", writable=True)
    array[position] = numbers
    if expected + 1 < len(slices):
        record = ArrivingRecord(position=message.position, model=model, next_part=expected + 1)
        owner.state.update_run(arriving=record)
    else:
        _take_whole(owner, message, model, layout, array)
    return PartReceived(run=message.run, owner=owner.name, position=message.position, part=message.part)


def _begin(owner: OwnerContext, message: DeliveryPart, model: str) -> TensorLayout:
    """The layout of a delivery that begins now. Raises unless it is the next one, or one that was taken before."""
    run, schedule = owner.state.run, owner.schedule
    delivery = schedule.delivery_at(message.position, KINDS[type(message)])
    if isinstance(message, CorrectionPart):
        verification.check_nonces(owner, message)
    elif model not in delivery.names:  # check: model-is-agreed
        raise ConsentError(f"the coordinator sent a model {model!r} that was not agreed")
    if not _was_taken(owner, message.position):
        verification.check_was_shown(owner)
        schedule.check_follows(
            message.position, run.begun, is_complete=run.is_complete
        )  # check: delivery-is-the-next-event
    return delivery.layout


def _start_arrival(owner: OwnerContext, message: DeliveryPart, layout: TensorLayout) -> NDArray:
    array = owner.state.create_array(ARRIVING, layout.size, "<f4")
    owner.state.write_layout(ARRIVING, layout)
    if not _was_taken(owner, message.position):
        owner.state.update_run(begun=message.position, is_complete=False)
    return array


def _take_whole(owner: OwnerContext, message: DeliveryPart, model: str, layout: TensorLayout, array: NDArray) -> None:
    what = model or KINDS[type(message)].replace("_", " ")
    # Larger ones would be refused by those owners alone whose terms in the check are too large, which tells them apart.
    if not is_within(array, LARGEST_NUMBER):  # check: models-are-finite
        raise RemoteProtocolError(f"the coordinator sent numbers that are not finite, or beyond 2^24 ({what})")
    run = owner.state.run
    delivered = Delivered(position=message.position, model=model, digest=sha256_of(array))
    if _was_taken(owner, message.position):
        if delivered not in run.delivered:  # check: delivered-once-or-the-same
            raise ConsentError(f"the coordinator sent a second version of {what}")
        owner.state.delete_array(ARRIVING)
        owner.state.update_run(arriving=None)
        return
    if owner.ledger.has_signed:  # check: nothing-after-the-result
        raise ConsentError(f"the coordinator sent {what} after the result")
    check_delivery(owner.agreement, run.run, delivered, message.signature)  # check: deliveries-are-signed
    received = ReceivedRecord(**asdict(delivered), signature=message.signature.hex())
    taken = run.model_copy(update={"received": (*run.received, received)})
    delivery = owner.schedule.delivery_at(message.position, KINDS[type(message)])
    judged: dict[str, object] = {}
    if isinstance(message, CorrectionPart):
        verification.take_correction(owner, message)
    elif delivery.kind == "mixture":
        mixtures.check_mixture(owner, taken, delivery, array)
    elif delivery.kind == "candidate" and owner.agreement.is_verified:
        verification.note_candidate(owner, delivery, taken)
    if delivery.kind in ("candidate", "mixture") and not owner.agreement.is_verified:
        judged = _judged(owner, taken, delivery, model, array)
    if judged and not mixtures.is_in_basis(owner, delivery):
        owner.state.delete_array(ARRIVING)
    else:
        owner.state.keep_array(ARRIVING, under=_kept_as(delivery))
    owner.state.update_run(arriving=None, received=taken.received, is_complete=True, **judged)


def judge(owner: OwnerContext, delivery: Delivery) -> None:
    """Score a candidate that was verified, once."""
    run, name = owner.state.run, _kept_as(delivery)
    received = next((each for each in run.received if each.position == delivery.position), None)
    if received is None or run.score_at(delivery.position) is not None:
        return
    array = owner.state.open_array(name, delivery.layout.size, "<f4")
    owner.state.update_run(**_judged(owner, run, delivery, received.model, array))
    if not mixtures.is_in_basis(owner, delivery):
        owner.state.delete_array(name)


def _judged(owner: OwnerContext, taken: RunState, delivery: Delivery, model: str, array: NDArray) -> dict[str, object]:
    """What the run keeps of a candidate: its score, and what would be published of it. `taken`: the run with it."""
    split = delivery.split
    assert split is not None
    if delivery.kind == "mixture":
        delta: Mapping[str, Tensor] = mixtures.delta_of(owner, array)
    else:
        verification.check_what_follows(owner, taken, delivery, model, array)  # check: candidates-are-cut
        delta = published_delta(owner.workbench.plan, delivery.layout, array)
    may_be_published = (split, delivery.method) == ("test", owner.agreement.method)
    digest, score, published = owner.workbench.judge_candidate(split, delta, may_be_published=may_be_published)
    judged: dict[str, object] = {"scores": (*taken.scores, score_record(delivery.position, model, digest, score))}
    return judged if published is None else judged | {"published": published}


def _name_of(message: DeliveryPart) -> str:
    """What tells a delivery from others at its position (certificates.Delivered.model)."""
    if isinstance(message, CorrectionPart):
        return nonces_digest(message.nonces)
    return message.model if isinstance(message, CandidatePart | MixturePart) else ""


def _was_taken(owner: OwnerContext, position: int) -> bool:
    return any(each.position == position for each in owner.state.run.received)


def _kept_as(delivery: Delivery) -> str:
    if delivery.kind in ("candidate", "mixture", "correction"):
        return delivered_array(delivery.position)
    if delivery.method is None or delivery.step is None:
        return "scales"
    return merged_step_array(delivery.method, delivery.step)
