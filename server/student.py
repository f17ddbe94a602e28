"""Trains the student of a distillation on the sum of the owners' predictions, and keeps it epoch by epoch.

FedDF (arXiv 2006.07242, algorithm 1, lines 11 to 14): Adam under a cosine from the learning rate to zero, on
KL(softmax(teacher / T) || softmax(student / T)). It runs at the coordinator, on its device, after the contributions
are summed. One training gives a model after each number of epochs that is agreed; validation rows choose among them.

The same totals, seed, machine and number of threads give the same weights. Every epoch is on the disk before the next
one begins, so a coordinator that was killed resumes with the last one. The files are in the checkpoint, and go with it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from math import cos, pi
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.agreement import Agreement
from common.errors import LocalProtocolError, NumericalError, SettingsError
from common.merge_methods.distill import DISTILL, DistillTable
from common.merge_methods.terms import MergedDelta, MergeSettings
from common.models.delta import add_delta
from common.models.folders import load_tokenizer
from common.models.loading import load_base
from common.models.parameters import longest_text
from common.pool import read_pool
from common.private_file import create, make_private_folder
from common.summation.totals import SummedTensors

STUDENT = "student"  # the folder of its files, in the checkpoint
LATEST = "latest.pt"
log = logging.getLogger("amalgram.coordinator")
Batch = dict[str, Tensor]


@dataclass(kw_only=True)
class Student:
    """What a student is trained from, and where its epochs are kept: in `folder`, which only the coordinator reads."""

    agreement: Agreement
    base_folder: Path
    pool: Path | None
    folder: Path

    def after(self, epochs: float | None, settings: MergeSettings, total: SummedTensors) -> MergedDelta:
        """The student's change of the base after so many epochs. Trains what is yet to be trained."""
        if epochs not in self._table.epochs:
            raise LocalProtocolError(f"student: {epochs} epochs are not among {list(self._table.epochs)}")
        if not self._kept(int(epochs)).is_file():
            self._train(settings, total)
        delta = self._read(self._kept(int(epochs)))
        how = f"trained on {self._table.rows:,} public rows, {int(epochs)} times"
        return MergedDelta(delta=delta, notes=(how, *self._who_gave_what(total.owners)))

    def _who_gave_what(self, owners: tuple[str, ...]) -> Iterator[str]:
        without = self.agreement.without_weights if self.agreement.sums_weights else frozenset(owners)
        for what, names in (
            ("weights and predictions", [name for name in owners if name not in without]),
            ("predictions alone", [name for name in owners if name in without]),
        ):
            if names:
                yield f"{', '.join(names)} gave {what}"

    @property
    def _table(self) -> DistillTable:
        return DISTILL.of(self.agreement.tables)

    def _train(self, settings: MergeSettings, total: SummedTensors) -> None:
        table, device = self._table, torch.device(settings.device)
        base = load_base(self.base_folder, self.agreement.task, self.agreement.seed)
        start = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
        student, rows = base, self._rows(base)
        add_delta(student, DISTILL.start(settings, total).delta)
        student.to(device)
        targets = self._targets(student, rows, DISTILL.teacher(settings, total), device)  # (rows, labels)
        changed = set(settings.plan.changed)
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(name in changed)
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=table.learning_rate)
        steps_per_epoch = -(-len(rows.features) // table.batch_size)
        steps = table.epochs[-1] * steps_per_epoch
        make_private_folder(self.folder)
        for epoch in range(self._resumed(student, optimizer), table.epochs[-1]):
            divergence = 0.0
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(_seed(self.agreement.seed, epoch))  # dropout
                student.train()
                for step, indices in enumerate(self._order(epoch, len(rows.features)), epoch * steps_per_epoch):
                    for group in optimizer.param_groups:
                        group["lr"] = table.learning_rate * (1 + cos(pi * step / steps)) / 2
                    loss = self._loss(student, rows, indices, targets, device)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    divergence += float(loss.detach()) * len(indices) / len(rows.features)
            log.info("  distillation: epoch %d of %d, divergence %.4f", epoch + 1, table.epochs[-1], divergence)
            if epoch + 1 in table.epochs:
                delta = {name: parameter.detach().cpu() - start[name] for name, parameter in student.named_parameters()}
                _write(self._kept(epoch + 1), delta)
            state = {"epoch": epoch + 1, "student": student.state_dict(), "optimizer": optimizer.state_dict()}
            _write(self.folder / LATEST, state)

    def _loss(
        self,
        student: PreTrainedModel,
        rows: PoolRows,
        indices: NDArray[np.int64],
        targets: Tensor,
        device: torch.device,
    ) -> Tensor:
        """Mean over the rows of KL(teacher || student) T^2: so gradients do not shrink with the temperature T."""
        temperature = self._table.temperature
        said = student(**rows.batch(indices, device)).logits.float()  # (rows, labels)
        wanted = targets[torch.from_numpy(indices).to(device)] / temperature
        loss = kl_div(
            log_softmax(said / temperature, -1), log_softmax(wanted, -1), reduction="batchmean", log_target=True
        )
        if not torch.isfinite(loss):
            raise NumericalError(
                f"distillation: the loss became {loss.item()}", hint="agree on a lower distill.learning_rate"
            )
        return loss * temperature**2

    @torch.inference_mode()
    def _targets(
        self, student: PreTrainedModel, rows: PoolRows, teacher: NDArray[np.float64], device: torch.device
    ) -> Tensor:
        """The logits that the student is taught, (rows, labels): the teacher's, or its own where it is surer."""
        wanted = torch.from_numpy(teacher).float().to(device)
        if self._table.keep == "nothing":
            return wanted
        student.eval()
        every = np.arange(len(rows.features))
        parts = np.array_split(every, -(-len(every) // self._table.batch_size))
        own = torch.cat([student(**rows.batch(part, device)).logits.float() for part in parts])
        is_surer = own.softmax(-1).amax(-1) > wanted.softmax(-1).amax(-1)  # (rows,)
        return torch.where(is_surer[:, None], own, wanted)

    def _rows(self, base: PreTrainedModel) -> PoolRows:
        assert self.pool is not None  # read before the run began
        tokenizer = load_tokenizer(self.base_folder)
        longest = longest_text(base, self.agreement.task.max_tokens)
        return PoolRows(features=read_pool(self.pool, self._table).tokens(tokenizer, longest), tokenizer=tokenizer)

    def _order(self, epoch: int, count: int) -> Iterator[NDArray[np.int64]]:
        """The rows of each batch: every row once, in the epoch's own order."""
        order = np.random.default_rng(_seed(self.agreement.seed, epoch)).permutation(count)
        for start in range(0, count, self._table.batch_size):
            yield order[start : start + self._table.batch_size]

    # --- what is kept ---

    def _resumed(self, student: PreTrainedModel, optimizer: torch.optim.Optimizer) -> int:
        """How many epochs an earlier start of this run has trained. Student and optimizer are as after these."""
        if not (self.folder / LATEST).is_file():
            return 0
        state = self._read(self.folder / LATEST)
        try:
            student.load_state_dict(state["student"])
            optimizer.load_state_dict(state["optimizer"])
            epoch = int(state["epoch"])
        except Exception as error:  # it may hold anything
            raise self._damaged(self.folder / LATEST, error) from None
        log.info("  distillation: resuming after epoch %d", epoch)
        return epoch

    def _kept(self, epochs: int) -> Path:
        return self.folder / f"after-{epochs}.pt"

    def _read(self, path: Path) -> Any:
        try:
            return torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # what a broken file makes torch raise is not written down
            raise self._damaged(path, error) from None

    def _damaged(self, path: Path, error: Exception) -> SettingsError:
        return SettingsError(
            f"{path}: is damaged ({type(error).__name__})",
            hint=f"remove the folder {self.folder}: the same command trains the student again",
        )


@dataclass(frozen=True)
class PoolRows:
    """The pool, as the student reads it."""

    features: tuple[dict[str, Any], ...]
    tokenizer: PreTrainedTokenizerBase

    def batch(self, indices: NDArray[np.int64], device: torch.device) -> Batch:
        padded = self.tokenizer.pad([self.features[index] for index in indices], return_tensors="pt")
        return {name: tensor.to(device) for name, tensor in padded.items()}


def _seed(seed: int, epoch: int) -> int:
    """Of one epoch, so that one that is trained after a restart draws what it would have drawn."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


def _write(path: Path, content: object) -> None:
    """Replace a file whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with create(partial) as file:
        torch.save(content, file)
    partial.replace(path)
