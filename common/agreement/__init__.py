"""The agreement: the one file that all parties hold identically (agreement.py), its tables, and its rules."""

from common.agreement.agreement import Agreement, AgreementDraft, load_agreement
from common.agreement.tables import (
    WORST_GROUP,
    Bounds,
    CoordinatorEntry,
    Evaluation,
    Measure,
    OwnerEntry,
    Privacy,
    Publish,
    Reading,
    Summation,
    Task,
    TaskKind,
)
from common.names import COORDINATOR

__all__ = [
    "COORDINATOR",
    "WORST_GROUP",
    "Agreement",
    "AgreementDraft",
    "Bounds",
    "CoordinatorEntry",
    "Evaluation",
    "Measure",
    "OwnerEntry",
    "Privacy",
    "Publish",
    "Reading",
    "Summation",
    "Task",
    "TaskKind",
    "load_agreement",
]
