"""Sums over owners. A kind of sum is one file with an owner's side and a coordinator's side; this is their registry."""

from common.summation import plain
from common.summation.protocol import SumKind

SUMMATIONS: dict[str, SumKind] = {"plain": SumKind(owner=plain.PlainOwner, coordinator=plain.PlainCoordinator)}
