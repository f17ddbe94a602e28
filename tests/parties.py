"""The example's three owners and the coordinator, set up as a simulation sets them up."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.agreement import Agreement
from common.identity import Identity
from common.models import MergePlan

NAMES = ("ada", "bea", "cyd", "coordinator")
# The parties of the `agreement` fixture, with keys that are the same in every run.
IDENTITIES = {name: Identity(name=name, seed=bytes([number]) * 32) for number, name in enumerate(NAMES, 1)}


@dataclass(frozen=True)
class Parties:
    """`files`: each owner's settings file; all in `folder`, whose `state/` they use. Results go to `output`."""

    folder: Path
    output: Path
    base: Path
    coordinator: Path
    files: Mapping[str, Path]
    agreement: Agreement
    identities: Mapping[str, Identity]
    plan: MergePlan
