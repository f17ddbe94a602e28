"""Sums over owners. A kind of sum is one file with an owner's side and a coordinator's side; this is their registry."""

from common.summation import masked, plain
from common.summation.protocol import SumKind

SUMMATIONS: dict[str, SumKind] = {
    "masked": SumKind(owner=masked.MaskedOwner, coordinator=masked.MaskedCoordinator),
    "plain": SumKind(owner=plain.PlainOwner, coordinator=plain.PlainCoordinator),
}
