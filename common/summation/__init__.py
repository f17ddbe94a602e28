"""Sums over owners. Each kind of sum has an owner's side and a coordinator's side; this is their registry."""

from common.summation.masked.coordinator import MaskedCoordinator
from common.summation.masked.owner import MaskedOwner
from common.summation.plain import PlainCoordinator, PlainOwner
from common.summation.protocol import SumKind

SUMMATIONS: dict[str, SumKind] = {
    "masked": SumKind(owner=MaskedOwner, coordinator=MaskedCoordinator),
    "plain": SumKind(owner=PlainOwner, coordinator=PlainCoordinator),
}
