"""An owner's part in a search: it builds mixtures of the merged deltas that it has, and answers no other question.

A mixture is a question about this owner's validation rows. The schedule says how many there are. Where merges are
verified, the owner makes every mixture by itself, from the agreement and the totals that it added up, and takes no
other; elsewhere it takes any that is within the agreed bounds and new.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from client import verification
from client.context import OwnerContext
from client.state import RunState, delivered_array
from common.errors import ConsentError
from common.mapped import sha256_of
from common.merge_methods.search import (
    SEARCH,
    Mixture,
    SearchTable,
    groups_of,
    is_mixture,
    next_mixtures,
)
from common.models.delta import MixedDelta, published_delta
from common.schedule import Delivery


def check_mixture(owner: OwnerContext, taken: RunState, delivery: Delivery, array: NDArray[np.float32]) -> None:
    """Raise ConsentError unless a mixture is one that this owner agreed to judge, or to publish; and WrongModel if what
    it is made of is not what was merged, or if it does not follow from what the owners verified.

    `taken`: the run as it is once the mixture, its last delivery, is taken.
    """
    mixture, table, name = _mixture(array), _table(owner), taken.received[-1].model
    if not is_mixture(mixture, table):  # check: mixtures-are-within-bounds
        raise ConsentError(
            f"the coordinator sent scales ({name}) that are not multiples of 1/64 up to {table.largest:g}"
        )
    before = received(owner)
    if not before:
        _check_basis(owner, taken)
    if delivery.split == "test":
        _check_best(owner, taken, mixture, before)
        return
    if owner.agreement.is_verified:
        expected = _expected(owner, name, before)
        if mixture != expected:  # check: mixtures-follow-the-totals
            says = f"another mixture ({name}) than the one that follows from the agreement and the totals"
            _condemn(owner, taken, says, sha256_of(np.array(expected, dtype="<f4")))
    if mixture in before.values():  # check: mixtures-are-not-repeated
        raise ConsentError(f"the coordinator asked for the same mixture again ({name})")


def _check_best(owner: OwnerContext, taken: RunState, mixture: Mixture, before: dict[str, Mixture]) -> None:
    """What is tested and published is the mixture that was best on validation rows, the first of equals."""
    name = taken.received[-1].model
    if before.get(name) != mixture:  # check: tested-mixture-was-scored
        says = f"another mixture as {name} than the one that was scored"
        if owner.agreement.is_verified:
            _condemn(owner, taken, says, verification.digest_before(taken, name))
        raise ConsentError(f"the coordinator sent {says}")
    if owner.agreement.is_verified:
        verification.check_is_best(owner, taken, before)


def _condemn(owner: OwnerContext, taken: RunState, says: str, expected: str) -> None:
    false = (taken.received[-1].position,)
    verification.condemn(owner, taken, [f"the coordinator sent {says}"], false=false, expected=expected)


def _expected(owner: OwnerContext, name: str, before: dict[str, Mixture]) -> Mixture:
    """The mixture of this name, as the agreement's search makes it from what was scored before its generation."""
    number, metrics = list(owner.agreement.agreed(SEARCH)).index(name), verification.validation_metrics(owner)
    scored = [(mixture, metrics[each]) for each, mixture in before.items() if each in metrics]
    num_groups = len(groups_of(owner.workbench.plan, _table(owner)))
    generation = next_mixtures(scored, num_groups, _table(owner), owner.agreement.seed)
    if number - len(scored) >= len(generation):
        raise ConsentError(f"{owner.name} has not added up the metrics from which a mixture ({name}) follows")
    return generation[number - len(scored)]


def received(owner: OwnerContext) -> dict[str, Mixture]:
    """The mixtures that were sent to be judged on validation rows so far, by name, in order."""
    arrived = {each.position for each in owner.state.run.received}
    return {
        delivery.names[0]: _mixture(
            owner.state.open_array(delivered_array(delivery.position), delivery.layout.size, "<f4")
        )
        for delivery in owner.schedule.deliveries("mixture", method=SEARCH.name, split="validation")
        if delivery.position in arrived
    }


def is_in_basis(owner: OwnerContext, delivery: Delivery) -> bool:
    """Whether a delivery is what mixtures are made of, or one of them: it is kept until the run ends."""
    in_basis = delivery.split == "test" and delivery.method in _table(owner).basis
    return owner.agreement.searches and (delivery.kind == "mixture" or in_basis)


def delta_of(owner: OwnerContext, array: NDArray[np.float32]) -> MixedDelta:
    """The delta that a mixture stands for."""
    plan = owner.workbench.plan
    parts = [published_delta(plan, delivery.layout, vector) for delivery, vector in _basis(owner)]
    return MixedDelta.of(parts, groups_of(plan, _table(owner)), _mixture(array))


def _check_basis(owner: OwnerContext, taken: RunState) -> None:
    """Raise WrongModel unless what is mixed follows from what was verified. Nothing was measured on it before."""
    names = {each.position: each.model for each in taken.received}
    for delivery, vector in _basis(owner):
        name = names[delivery.position]
        verification.check_what_follows(owner, taken, delivery, name, vector)  # check: bases-are-merges


def _basis(owner: OwnerContext) -> Iterator[tuple[Delivery, NDArray[np.float32]]]:
    """The merged deltas that mixtures are made of, as they were sent."""
    for method in _table(owner).basis:
        delivery = owner.schedule.delivery_of(method, "test")
        yield delivery, owner.state.open_array(delivered_array(delivery.position), delivery.layout.size, "<f4")


def _table(owner: OwnerContext) -> SearchTable:
    return SEARCH.of(owner.agreement.tables)


def _mixture(array: NDArray[np.float32]) -> Mixture:
    return tuple(float(scale) for scale in array)
