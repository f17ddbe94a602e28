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
from client.state import delivered_array
from common.errors import ConsentError
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


def check_mixture(owner: OwnerContext, delivery: Delivery, name: str, array: NDArray[np.float32]) -> None:
    """Raise ConsentError unless a mixture is one that this owner agreed to judge, or to publish; and WrongModel if what
    it is made of is not what was merged.
    """
    mixture, table = _mixture(array), _table(owner)
    if not is_mixture(mixture, table):  # check: mixtures-are-within-bounds
        raise ConsentError(
            f"the coordinator sent scales ({name}) that are not multiples of 1/64 up to {table.largest:g}"
        )
    before = received(owner)
    if not before:
        _check_basis(owner)
    if delivery.split == "test":
        _check_best(owner, name, mixture, before)
        return
    if mixture in before.values():  # check: mixtures-are-not-repeated
        raise ConsentError(f"the coordinator asked for the same mixture again ({name})")
    if owner.agreement.is_verified and mixture != _expected(owner, name, before):  # check: mixtures-follow-the-totals
        raise ConsentError(
            f"the coordinator sent another mixture ({name}) than the one that follows from the agreement and the totals"
        )


def _check_best(owner: OwnerContext, name: str, mixture: Mixture, before: dict[str, Mixture]) -> None:
    """What is tested and published is the mixture that was best on validation rows, the first of equals."""
    if before.get(name) != mixture:  # check: tested-mixture-was-scored
        raise ConsentError(f"the coordinator sent another mixture as {name} than the one that was scored")
    if owner.agreement.is_verified:
        verification.check_is_best(owner, name, before)


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


def _check_basis(owner: OwnerContext) -> None:
    """Raise WrongModel unless what is mixed follows from what was verified. Nothing was measured on it before."""
    names = {each.position: each.model for each in owner.state.run.received}
    for delivery, vector in _basis(owner):
        verification.check_what_follows(owner, delivery, names[delivery.position], vector)  # check: bases-are-merges


def _basis(owner: OwnerContext) -> Iterator[tuple[Delivery, NDArray[np.float32]]]:
    """The merged deltas that mixtures are made of, as they were sent."""
    for method in _table(owner).basis:
        delivery = owner.schedule.delivery_of(method, "test")
        yield delivery, owner.state.open_array(delivered_array(delivery.position), delivery.layout.size, "<f4")


def _table(owner: OwnerContext) -> SearchTable:
    return SEARCH.of(owner.agreement.tables)


def _mixture(array: NDArray[np.float32]) -> Mixture:
    return tuple(float(scale) for scale in array)
