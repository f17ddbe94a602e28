"""What a student is taught about the pool, and how far it is from that: one kind of lesson for each kind of output.

A divergence is a mean over predictions, from the teacher to the student, times the square of the temperature T, so that
gradients do not shrink with T (Hinton et al., arXiv 1503.02531).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, kl_div, log_softmax

from common.agreement import Task
from common.merge_methods.distill import COVERAGE, DISTILL, PREDICTIONS
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
    """KL(softmax(teacher / T) || softmax(student / T)). `logits`: (predictions, labels)."""

    logits: Tensor
    temperature: float

    def divergence(self, said: Tensor, numbers: Tensor) -> Tensor:
        wanted = log_softmax(self.logits[numbers] / self.temperature, -1)
        found = log_softmax(said / self.temperature, -1)
        return kl_div(found, wanted, reduction="batchmean", log_target=True) * self.temperature**2


@dataclass(frozen=True)
class OfSeveralLabels(Lessons):
    """The same of sigmoids, added up over the labels, each of which applies or does not."""

    logits: Tensor  # (predictions, labels)
    temperature: float

    def divergence(self, said: Tensor, numbers: Tensor) -> Tensor:
        given = self.logits[numbers] / self.temperature
        wanted = given.sigmoid()
        cross = binary_cross_entropy_with_logits(said / self.temperature, wanted, reduction="none")
        entropy = binary_cross_entropy_with_logits(given, wanted, reduction="none")
        return (cross - entropy).sum(-1).mean() * self.temperature**2


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

    `tokens`: (predictions, kept) int64; `log_shares`: (predictions, kept + 1), the logarithms of their probabilities
    and of that of the others, of which there is at least one. The student's outputs beyond the vocabulary are
    ignored.
    """

    tokens: Tensor
    log_shares: Tensor
    temperature: float
    vocabulary: int

    def divergence(self, said: Tensor, numbers: Tensor) -> Tensor:
        found = log_softmax(said[:, : self.vocabulary] / self.temperature, -1)  # (some, vocabulary)
        kept = self.tokens[numbers]
        rest = found.scatter(1, kept, -torch.inf).logsumexp(-1, keepdim=True)  # of the others together
        found = torch.cat([found.gather(1, kept), rest], dim=1)
        wanted = self.log_shares[numbers]
        return kl_div(found, wanted, reduction="batchmean", log_target=True) * self.temperature**2


def lessons_of(task: Task, settings: MergeSettings, total: SummedTensors, device: torch.device) -> Lessons:
    """What the owners' models say together."""
    table = DISTILL.hyperparameters(settings)
    if not task.has_labels:
        return _of_next_tokens(settings, total, device)
    teacher = torch.from_numpy(DISTILL.teacher(settings, total)).float().to(device)  # (predictions, outputs)
    if task.is_regression:
        lowest, span = task.lowest_and_span
        return OfNumbers(lowest + span * (teacher / table.largest_logit + 1) / 2, span)
    if task.has_several_labels:
        return OfSeveralLabels(teacher, table.temperature)
    return OfOneLabel(teacher, table.temperature)


def _of_next_tokens(settings: MergeSettings, total: SummedTensors, device: torch.device) -> OfNextTokens:
    """The most likely tokens of each prediction, some predictions at a time: the total is as large as a vocabulary."""
    table, outputs = DISTILL.hyperparameters(settings), DISTILL.outputs(settings)
    kept = min(table.most_likely, outputs - 1)
    owners = torch.from_numpy(total[COVERAGE])  # (vocabulary,)
    tokens, log_shares = list[Tensor](), list[Tensor]()
    rows = max(1, BLOCK // outputs)
    for first in range(0, table.asked, rows):
        last = min(first + rows, table.asked)
        part: NDArray[np.float64] = total.some_of(PREDICTIONS, slice(first * outputs, last * outputs))
        logits = torch.from_numpy(part.reshape(last - first, outputs)) / owners
        log_all = log_softmax(logits / table.temperature, -1)
        shares, most = log_all.topk(kept, dim=-1)
        rest = log_all.scatter(1, most, -torch.inf).logsumexp(-1, keepdim=True)
        tokens.append(most)
        log_shares.append(torch.cat([shares, rest], dim=1).float())
    return OfNextTokens(
        torch.cat(tokens).to(device), torch.cat(log_shares).to(device), table.temperature, vocabulary=outputs
    )
