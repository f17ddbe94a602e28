"""Trains the student of a distillation on the sum of the owners' predictions, and keeps it epoch by epoch.

FedDF (arXiv 2006.07242, algorithm 1, lines 11 to 14): Adam under a cosine from the learning rate to zero, on the
divergence of the student from its teacher (lessons.py). It runs at the coordinator, on its device, after the
contributions are summed. One training gives a model after each number of epochs that is agreed; validation rows choose
among them.

The same totals, seed, machine and number of threads give the same weights. Every epoch is on the disk before the next
one begins, so a coordinator that was killed resumes with the last one. The files are in the checkpoint, and go with it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import cos, pi
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from common.agreement import Agreement
from common.errors import LocalProtocolError, NumericalError, SettingsError
from common.merge_methods.distill import DISTILL, DistillTable
from common.merge_methods.terms import MergedDelta, MergeSettings
from common.models.delta import add_delta
from common.models.loading import load_base
from common.pool import read_pool
from common.pool_rows import PoolReader, PoolRows, check_counts
from common.private_file import make_private_folder, written_whole
from common.room import needing_room
from common.summation.totals import SummedTensors
from server.lessons import Lessons, OfOneLabel, lessons_of

STUDENT = "student"  # the folder of its files, in the checkpoint
LATEST = "latest.pt"
NEEDS_ROOM = "make room on this disk, and run the same command again"
log = logging.getLogger("amalgram.coordinator")


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
        lessons = self._lessons(student, rows, settings, total, device)
        changed = set(settings.plan.changed)
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(name in changed)
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=table.learning_rate)
        steps_per_epoch = -(-len(rows) // table.batch_size)
        steps = table.epochs[-1] * steps_per_epoch
        make_private_folder(self.folder)
        for epoch in range(self._resumed(student, optimizer), table.epochs[-1]):
            divergence = 0.0
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(_seed(self.agreement.seed, epoch))  # dropout
                student.train()
                for step, indices in enumerate(self._order(epoch, rows.lengths), epoch * steps_per_epoch):
                    for group in optimizer.param_groups:
                        group["lr"] = table.learning_rate * (1 + cos(pi * step / steps)) / 2
                    numbers = rows.predictions_of(indices)
                    said = _said(student, rows, indices, device)
                    loss = lessons.divergence(said, torch.from_numpy(numbers).to(device))
                    if not torch.isfinite(loss):
                        raise NumericalError(
                            f"distillation: the loss became {loss.item()}",
                            hint="agree on a lower distill.learning_rate",
                        )
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    divergence += float(loss.detach()) * len(numbers) / self._table.asked
            log.info("  distillation: epoch %d of %d, divergence %.4f", epoch + 1, table.epochs[-1], divergence)
            if epoch + 1 in table.epochs:
                delta = {name: parameter.detach().cpu() - start[name] for name, parameter in student.named_parameters()}
                self._write(self._kept(epoch + 1), delta)
            state = {"epoch": epoch + 1, "student": student.state_dict(), "optimizer": optimizer.state_dict()}
            self._write(self.folder / LATEST, state)

    @torch.inference_mode()
    def _lessons(
        self,
        student: PreTrainedModel,
        rows: PoolRows,
        settings: MergeSettings,
        total: SummedTensors,
        device: torch.device,
    ) -> Lessons:
        """What the student is taught: what its teacher says, or what it says itself where it is surer."""
        lessons = lessons_of(self.agreement.task, settings, total, device)
        if self._table.keep == "nothing" or not isinstance(lessons, OfOneLabel):
            return lessons
        student.eval()
        every = np.arange(len(rows))
        parts = np.array_split(every, -(-len(every) // self._table.batch_size))
        own = torch.cat([_said(student, rows, part, device) for part in parts]).softmax(-1)
        is_surer = own.amax(-1) > lessons.probabilities.amax(-1)  # (predictions,)
        return replace(lessons, probabilities=torch.where(is_surer[:, None], own, lessons.probabilities))

    def _rows(self, base: PreTrainedModel) -> PoolRows:
        assert self.pool is not None  # read before the run began
        pool = read_pool(self.pool, self._table, self.agreement.task.kind)
        rows = PoolReader.of_folder(self.base_folder, base, self.agreement.task, self._table).read(pool)
        check_counts(rows, self._table)
        return rows

    def _order(self, epoch: int, lengths: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """The rows of each batch: every row once, beside others of about its length, in the epoch's own order."""
        random = np.random.default_rng(_seed(self.agreement.seed, epoch))
        order = np.argsort(lengths + 2 * random.random(len(lengths)))
        batches = np.split(order, range(self._table.batch_size, len(order), self._table.batch_size))
        yield from (batches[number] for number in random.permutation(len(batches)))

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

    def _write(self, path: Path, content: object) -> None:
        """Replace a file whole or not at all. Raises DataError if the disk is full."""
        with needing_room("the student", self.folder, NEEDS_ROOM), written_whole(path) as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:  # that the archive has no end hides why it has none
                raise error.__context__ or error from None

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


def _said(student: PreTrainedModel, rows: PoolRows, indices: NDArray[np.int64], device: torch.device) -> Tensor:
    """What the student says of some rows, in their order: (predictions, outputs)."""
    inputs, places = rows.batch(indices)
    logits: Tensor = student(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits.float()
    return logits if places is None else logits[places.to(device)]


def _seed(seed: int, epoch: int) -> int:
    """Of one epoch, so that one that is trained after a restart draws what it would have drawn."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
