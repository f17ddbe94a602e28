"""What a student is taught about the pool, and how far it is from that: one kind of lesson for each kind of output.

A divergence is a mean over predictions, from the teacher to the student.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, kl_div, log_softmax
from torch.special import entr

from common.agreement import Task
from common.merge_methods.distill import DISTILL, PREDICTIONS
from common.merge_methods.terms import MergeSettings
from common.summation.totals import SummedTensors

BLOCK = 10_000_000  # numbers of a total that are looked at together


class Lessons(ABC):
    """What is taught of every prediction of the pool, on the device that trains."""

    @abstractmethod
    def divergence(self, said: Tensor, numbers: Tensor) -> Tensor:
        """How far the student's outputs, (some, outputs), are from what is taught of these predictions, (some,)."""


@dataclass(frozen=True)
class OfOneLabel(Lessons):
    """KL(teacher || softmax(student)). `probabilities`: (predictions, labels)."""

    probabilities: Tensor

    def divergence(self, said: Tensor, numbers: Tensor) -> Tensor:
        return kl_div(log_softmax(said, -1), self.probabilities[numbers], reduction="batchmean")


@dataclass(frozen=True)
class OfSeveralLabels(Lessons):
    """The same of sigmoids, added up over the labels, each of which applies or does not."""

    probabilities: Tensor  # (predictions, labels)

    def divergence(self, said: Tensor, numbers: Tensor) -> Tensor:
        wanted = self.probabilities[numbers]
        cross = binary_cross_entropy_with_logits(said, wanted, reduction="none")
        entropy: Tensor = entr(wanted) + entr(1 - wanted)
        return (cross - entropy).sum(-1).mean()


@dataclass(frozen=True)
class OfNumbers(Lessons):
    """The mean squared error, as a share of the agreed range. `targets`: (predictions, targets)."""

    targets: Tensor
    span: float

    def divergence(self, said: Tensor, numbers: Tensor) -> Tensor:
        return (((said - self.targets[numbers]) / self.span) ** 2).sum(-1).mean()


@dataclass(frozen=True)
class OfNextTokens(Lessons):
    """KL over the teacher's most likely tokens and all others as one, which is at most that over all.

    `tokens`: (predictions, kept) int64; `shares`: (predictions, kept + 1), their probabilities and that of the others,
    of which there is at least one. The student's outputs beyond the vocabulary are ignored.
    """

    tokens: Tensor
    shares: Tensor
    vocabulary: int

    def divergence(self, said: Tensor, numbers: Tensor) -> Tensor:
        found = log_softmax(said[:, : self.vocabulary], -1)  # (some, vocabulary)
        kept = self.tokens[numbers]
        rest = found.scatter(1, kept, -torch.inf).logsumexp(-1, keepdim=True)  # of the others together
        found = torch.cat([found.gather(1, kept), rest], dim=1)
        return kl_div(found, self.shares[numbers], reduction="batchmean")


def lessons_of(task: Task, settings: MergeSettings, total: SummedTensors, device: torch.device) -> Lessons:
    """What the owners' models say together."""
    if not task.has_labels:
        return _of_next_tokens(settings, total, device)
    teacher = torch.from_numpy(DISTILL.teacher(settings, total)).float().to(device)  # (predictions, outputs)
    if task.is_regression:
        lowest, span = task.lowest_and_span
        return OfNumbers(lowest + span * teacher, span)
    if task.has_several_labels:
        return OfSeveralLabels(teacher)
    # Where models know different labels, the means add up to more than 1.
    return OfOneLabel(teacher / teacher.sum(-1, keepdim=True))


def _of_next_tokens(settings: MergeSettings, total: SummedTensors, device: torch.device) -> OfNextTokens:
    """The most likely tokens of each prediction, some predictions at a time: the total is as large as a vocabulary."""
    table, outputs = DISTILL.hyperparameters(settings), DISTILL.outputs(settings)
    kept = min(table.most_likely, outputs - 1)
    tokens, shares = list[Tensor](), list[Tensor]()
    rows = max(1, BLOCK // outputs)
    for first in range(0, table.asked, rows):
        last = min(first + rows, table.asked)
        part: NDArray[np.float64] = total.some_of(PREDICTIONS, slice(first * outputs, last * outputs))
        summed = torch.from_numpy(part.reshape(last - first, outputs)).clamp(min=0)
        likely, most = (summed / summed.sum(-1, keepdim=True)).topk(kept, dim=-1)
        rest = (1 - likely.sum(-1, keepdim=True)).clamp(min=0)
        tokens.append(most)
        shares.append(torch.cat([likely, rest], dim=1).float())
    return OfNextTokens(torch.cat(tokens).to(device), torch.cat(shares).to(device), vocabulary=outputs)
