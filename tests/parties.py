"""The example's three owners and the coordinator, set up as a simulation sets them up."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.agreement import Agreement
from common.models import MergePlan


@dataclass(frozen=True)
class Parties:
    """`files`: each owner's settings file; all in `folder`, whose `state/` they use. Results go to `output`."""

    folder: Path
    output: Path
    base: Path
    coordinator: Path
    files: Mapping[str, Path]
    agreement: Agreement
    plan: MergePlan
