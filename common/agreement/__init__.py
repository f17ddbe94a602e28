"""The agreement: the one file that all parties hold identically (agreement.py), its tables, and its rules."""

from common.agreement.agreement import Agreement, AgreementDraft, load_agreement
from common.agreement.tables import (
    COORDINATOR,
    Bounds,
    CoordinatorEntry,
    Evaluation,
    OwnerEntry,
    Privacy,
    Publish,
    Reading,
    Summation,
    Task,
    TaskKind,
)

__all__ = [
    "COORDINATOR",
    "Agreement",
    "AgreementDraft",
    "Bounds",
    "CoordinatorEntry",
    "Evaluation",
    "OwnerEntry",
    "Privacy",
    "Publish",
    "Reading",
    "Summation",
    "Task",
    "TaskKind",
    "load_agreement",
]
