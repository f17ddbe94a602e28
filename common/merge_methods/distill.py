"""Ensemble distillation (FedDF, Lin et al., NeurIPS 2020, arXiv 2006.07242): owners teach a student by predictions.

Owners whose models have nothing in common but labels cannot merge weights. Each scores the rows of a public pool with
its own model instead: a text or an image once, tagged words one by one, and in a language model some tokens of each
text. What it gives are probabilities p_i(x, c), a softmax over the labels that it knows. The coordinator learns, per
prediction x and label c,

    teacher(x, c) = sum_i w_i(x) k_i(c) p_i(x, c) / sum_i w_i(x) k_i(c)

where k_i(c) is 1 if owner i's model has label c, and w_i is 1 ("alike") or how close the row is to the owner's own rows
("density": Synthetic Model Combination, Chan and van der Schaar, NeurIPS 2022, arXiv 2210.05320). The student, the
agreed base, is trained on the teacher by the coordinator (server/student.py). It starts at what the owners that share
the base have merged, or at the base. Where a row has several labels, each has a sigmoid of its own. A regression's
numbers are shares of the agreed range. The c of a language model are all tokens of its vocabulary: the sum carries each
of them, because the most likely ones of one owner are not those of another.

FedDF takes the mean of logits. Models of different architectures are not equally sure, and among logits one that is
sure and wrong outvotes several that are right (docs/distillation.md has what either teacher is worth).

No equation defines a trained model, so no owner can verify it: it rests on the coordinator.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from common.errors import RuleError
from common.merge_methods.average import AVERAGE
from common.merge_methods.data_free import DATA_FREE
from common.merge_methods.method import Measurement, Method, SingleRoundMethod, register
from common.merge_methods.terms import (
    WEIGHT_KINDS,
    Hyperparameters,
    MergedDelta,
    MergeSettings,
    OwnerTerms,
    Predictions,
    unchanged,
)
from common.settings_file import Digest, FileName, Line, Positive
from common.summation.totals import SummedTensors
from common.tensor_layout import TensorEntry, TensorLayout, union

PREDICTIONS, COVERAGE, CLOSENESS = "predictions", "coverage", "closeness"
KINDS = {
    PREDICTIONS: "what {their} own model says of the public pool: for each prediction and label, a number from 0 to 1",
    COVERAGE: "which labels {their} own model knows",
    CLOSENESS: "how close each row of the public pool is to {their} own rows, for each label of {their} model",
}
MAX_NUMBERS = 100_000_000  # that predict: 800 MB of an owner's vector, and in memory about twice that
LEAST_CLOSENESS = 1e-3  # so that every owner has a part in every number
STARTS: dict[str, SingleRoundMethod] = {"average": AVERAGE, "data_free": DATA_FREE}


class DistillTable(Hyperparameters):
    """`pool`: a file beside the agreement, of any type that an owner's rows may have. Of its columns, texts are read
    from `text` (and `text_pair`), words from `tokens`, images from `image`.

    Completing a draft adds what the pool decides, if it is left out: `pool_sha256`; `rows`; `predictions`, if they are
    not one a row; and of a language model `vocabulary`, how many tokens it has. It is asked about up to `positions`
    tokens of each text. The student is taught the `most_likely` tokens of each teacher by name, and all others as one.

    `epochs`: how often the student sees the pool, in ascending order. Several are a sweep: it is trained once, for the
    last of them, and judged on validation rows after each; the best is published. `keep`: with "more confident", the
    student keeps what it said at the start where it was surer than the teacher (arXiv 2310.17653).
    """

    pool: FileName | None = None
    pool_sha256: Digest | None = None
    rows: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    predictions: Annotated[int, Field(ge=1, le=MAX_NUMBERS)] | None = None
    vocabulary: Annotated[int, Field(ge=2, le=10_000_000)] | None = None
    text: Line = "text"
    text_pair: Line | None = None
    tokens: Line = "tokens"
    image: Line = "image"
    positions: Annotated[int, Field(ge=1, le=10_000)] = 8
    most_likely: Annotated[int, Field(ge=1, le=10_000)] = 64
    start: Literal["base", "average", "data_free"] = "data_free"
    weights: Literal["alike", "density"] = "alike"
    keep: Literal["nothing", "more confident"] = "nothing"
    epochs: Annotated[tuple[Annotated[int, Field(ge=1, le=1000)], ...], Field(min_length=1, max_length=20)] = (3,)
    learning_rate: Positive = 1e-4
    batch_size: Annotated[int, Field(ge=1, le=10_000)] = 32

    @property
    def asked(self) -> int:
        """How many predictions an owner makes."""
        return self.predictions or self.rows or 1

    def outputs(self, labels: int) -> int:
        """How many numbers a prediction has: one for each of a task's labels, or for each token of a vocabulary."""
        return self.vocabulary or max(1, labels)

    def numbers(self, labels: int) -> int:
        """How many numbers an owner sends: its predictions and, if agreed, how close the rows are for each of them."""
        return self.asked * self.outputs(labels) * (2 if self.weights == "density" else 1)


class Distill(Method[DistillTable]):
    """A student that is trained on the sum of all owners' predictions."""

    name = "distill"
    title = "distillation"
    phrase = "distillation"
    summary = "a student, trained by the coordinator on the sum of what all owners' models say of public rows"
    paper = "FedDF, arXiv 2006.07242"
    swept_name = "epochs"
    swept_summary = "The epochs are how often the student has seen the public rows: more follows its teachers further."
    order = 12
    table = DistillTable
    tensor_kinds = WEIGHT_KINDS | KINDS

    def swept(self, tables: Mapping[str, Hyperparameters]) -> tuple[float, ...]:
        return self.of(tables).epochs

    def check(self, tables: Mapping[str, Hyperparameters]) -> None:
        table = self.of(tables)
        if table.pool is None:
            raise RuleError(
                "distill.pool is missing: owners predict on public rows",
                hint='name a file beside the agreement: [distill] pool = "pool.jsonl"',
            )
        if list(table.epochs) != sorted(table.epochs):
            raise RuleError(f"distill.epochs = {list(table.epochs)}: must ascend, since the student is trained once")

    def reads_rows(self, tables: Mapping[str, Hyperparameters]) -> bool:
        return self.of(tables).weights == "density"

    def disclosures(self, tables: Mapping[str, Hyperparameters]) -> tuple[str, ...]:
        table = self.of(tables)
        start = () if table.start == "base" else STARTS[table.start].disclosures(tables)
        close = (
            "The totals also show how close each row of the pool is to the rows of all owners together. For a row that "
            "is like one owner's rows alone, the total shows what that owner's model alone says, except for a "
            "thousandth of the others': nobody is told whose it is, but anyone who knows what the owners' rows are "
            "about can guess.",
        )
        continued = (
            "The totals show how the owners' models together would continue each text of the pool, token by token. A "
            "text that begins like an owner's text can bring out how that text continues, if its model learned it by "
            "heart.",
        )
        return (
            "The total shows what the owners' models together say about each row of the pool. A model that was trained "
            "on a row, or on rows like it, is surer of it. So even if only one owner has a row, its total can show "
            "that somebody has it. Look at the pool.",
            *(continued if table.vocabulary else ()),
            *(close if table.weights == "density" else ()),
            *start,
        )

    def measurements(self, tables: Mapping[str, Hyperparameters]) -> Mapping[Measurement, int]:
        start = self._start(tables)
        return {**(start.measurements(tables) if start else {}), Measurement.PREDICTIONS: self.of(tables).asked}

    def layout(self, settings: MergeSettings) -> TensorLayout:
        table, start = self.hyperparameters(settings), self._start(settings.tables)
        shape = (table.asked, self.outputs(settings))
        entries = [
            TensorEntry(name=PREDICTIONS, shape=shape, bound=1.0),
            TensorEntry(name=COVERAGE, shape=shape[1:], bound=1.0),
        ]
        if table.weights == "density":
            entries.append(TensorEntry(name=CLOSENESS, shape=shape, bound=1.0))
        own = TensorLayout(tuple(entries))
        return own if start is None else union([start.layout(settings), own])

    def contribution(self, settings: MergeSettings, owner: OwnerTerms) -> Iterator[tuple[str, NDArray]]:
        start = self._start(settings.tables)
        if start is not None:
            yield from start.contribution(settings, owner)
        assert owner.predictions is not None  # measured, as this method asked for
        yield from self.predicted(settings, owner.predictions)

    def outputs(self, settings: MergeSettings) -> int:
        """How many numbers a prediction has."""
        return self.hyperparameters(settings).outputs(settings.num_labels)

    def predicted(self, settings: MergeSettings, said: Predictions) -> Iterator[tuple[str, NDArray]]:
        """What an owner adds that has no weights to give: its predictions alone."""
        known = said.known.astype(np.float64)  # (labels,)
        if self.hyperparameters(settings).weights == "alike":
            yield PREDICTIONS, said.numbers
            yield COVERAGE, known
            return
        assert said.closeness is not None
        closeness = np.clip(said.closeness, LEAST_CLOSENESS, 1.0)[:, None]  # (predictions, 1)
        yield PREDICTIONS, closeness * said.numbers
        yield COVERAGE, known
        yield CLOSENESS, closeness * known

    def teacher(self, settings: MergeSettings, total: SummedTensors) -> NDArray[np.float64]:
        """The mean of all owners' numbers, (predictions, labels). Nobody's labels are never among the agreed ones."""
        alike = self.hyperparameters(settings).weights == "alike"
        mean = total[PREDICTIONS] / (total[COVERAGE] if alike else total[CLOSENESS])
        return np.clip(mean, 0.0, 1.0)  # of what fixed point rounds

    def start(self, settings: MergeSettings, total: SummedTensors) -> MergedDelta:
        """What the student has learned before it sees the pool."""
        start = self._start(settings.tables)
        if start is None:
            return MergedDelta(delta=unchanged(settings.plan, settings.plan.shapes))
        values = [each for each in start.swept(settings.tables) if each is not None]
        merged = start.solve(settings, total, max(values, default=None), with_spectra=False)
        return replace(merged, rest={})

    def gives_weights(self, tables: Mapping[str, Hyperparameters]) -> bool:
        """Whether weight changes are summed, too."""
        return self._start(tables) is not None

    def _start(self, tables: Mapping[str, Hyperparameters]) -> SingleRoundMethod | None:
        return STARTS.get(self.of(tables).start)


def predictions_alone(
    layout: TensorLayout, settings: MergeSettings, said: Predictions
) -> Iterator[tuple[str, NDArray]]:
    """The tensors of an owner whose model shares no weights with the base: zeros for all that is not predicted."""
    own = dict(DISTILL.predicted(settings, said))
    for entry in layout.entries:
        yield entry.name, own[entry.name] if entry.name in own else np.zeros(entry.shape)


DISTILL = register(Distill())
