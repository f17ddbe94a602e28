"""The models that an audit attacks: what each was made from, if that is known, and how it reads the owner's rows.

A model of the agreed base is compared with that base. Any other Hugging Face folder reads the rows with its own
tokenizer or image processor, and with its own numbers for the labels, which are found by name. It is compared with the
base that the owner names for it; without one, it is attacked by its loss alone. Somebody else wrote the folder, so none
of its text goes into an audit, and none of its code runs.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from client.audit.rows import View
from client.data.rows import IGNORED
from client.holdings import Holdings
from common.agreement import Task
from common.errors import ModelError, SettingsError
from common.models.adapter import is_adapter
from common.models.folders import (
    check_has_head,
    check_tokenizer,
    fine_tuned_folder,
    has_tokenizer,
    kind_of,
    model_folder,
    named_labels,
)
from common.models.loading import is_unrelated, load_any, load_base, load_fine_tuned
from common.text import alike, as_line, some_of

LONGEST_LABEL = 40  # characters that an error shows
log = logging.getLogger("amalgram.owner")


@dataclass(frozen=True, eq=False)
class Origin:
    """What a model was made from, and how both read the owner's rows. `base`: None if that is not known.

    `task`: what the model does, with its own labels in its own order.
    """

    view: View
    task: Task
    base: PreTrainedModel | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A model to attack. `warnings`: what its owner must know to read the numbers, with no text of its folder."""

    model: PreTrainedModel
    origin: Origin
    warnings: tuple[str, ...] = ()


def own_subject(holdings: Holdings) -> Subject:
    """The owner's own model. Raises SettingsError for a task whose models cannot be audited."""
    if holdings.task.problem_type != "single_label_classification":
        raise SettingsError(
            "amalgram audit: models of several labels a row, and regressions, cannot be audited yet",
            hint="it takes models of one label a row, of words with tags, and language models",
        )
    view = View(data=holdings.data, numbers=_numbers(holdings.own_task, holdings.task))
    origin = Origin(view, holdings.own_task, holdings.load_own_base())
    return Subject(model=holdings.own_model(), origin=origin)


def subject_in(holdings: Holdings, own: Origin, folder: Path, base: Path | None) -> Subject:
    """The model in a folder: of the agreed base, or of any other one. Raises ModelError.

    `own`: what the owner's own model was made from. `base`: a folder with what this model was made from, if that is not
    the agreed base.
    """
    if base is not None:
        return _of_named_base(holdings, folder, base)
    try:
        return _of_agreed_base(holdings, own, folder)
    except ModelError as error:
        if is_adapter(folder):
            raise ModelError(
                error.message, hint="name the base that the adapter was trained on: --base FOLDER"
            ) from None
        reason = error.message
    subject = _of_no_base(holdings, folder)
    log.info("the audited model is not compared with the agreed base: %.300s", reason)
    return subject


def _of_agreed_base(holdings: Holdings, own: Origin, folder: Path) -> Subject:
    model = holdings.model_of_base(folder)
    check_tokenizer(folder, holdings.base_folder)
    origin = own
    if holdings.settings.own_base is not None:
        origin = Origin(View(data=holdings.merged_data), holdings.task, holdings.load_base())
    assert origin.base is not None
    if is_unrelated(model, origin.base):  # check: unrelated-models-have-no-base
        raise ModelError(f"model {folder}: its weights are not near the base's")
    return Subject(model=model, origin=origin)


def _of_named_base(holdings: Holdings, folder: Path, base_folder: Path) -> Subject:
    found, made_from = (
        fine_tuned_folder(str(folder.absolute()), folder),
        model_folder(str(base_folder.absolute()), folder),
    )
    labelled = made_from if is_adapter(found) else found
    if labelled is found:
        check_has_head(found, holdings.task)
    task, warnings = _task_of(holdings, labelled)
    base = load_base(made_from, task, holdings.agreement.seed)
    model = load_fine_tuned(found, task, base)
    reads = found if has_tokenizer(found) else made_from
    view = _view(holdings, model, reads, task)
    return Subject(model=model, origin=Origin(view, task, base), warnings=tuple(warnings))


def _of_no_base(holdings: Holdings, folder: Path) -> Subject:
    found = model_folder(str(folder.absolute()), folder)
    check_has_head(found, holdings.task)
    task, warnings = _task_of(holdings, found)
    if task.is_text and not has_tokenizer(found):
        raise ModelError(
            f"model {folder}: cannot be compared with the agreed base, and has no tokenizer of its own",
            hint="copy its tokenizer into the folder, or name the model that it was made from: --base FOLDER",
        )
    model = load_any(found, task)
    unknown = (
        "The audited model cannot be compared with the agreed base, and no other base was named for it. So it was "
        "attacked by its loss alone. What compares a model with its base is left out: the loss less the base's, "
        "gradients, token embeddings, candidates, and how much of the weights is public. Name its base to have them "
        "(--base)."
    )
    origin = Origin(_view(holdings, model, found, task), task, base=None)
    return Subject(model=model, origin=origin, warnings=(unknown, *warnings))


def _view(holdings: Holdings, model: PreTrainedModel, reads: Path, task: Task) -> View:
    read_as = holdings.task if task.has_labels else task  # rows name the agreed labels
    return View(data=holdings.read_for(model, reads, read_as), numbers=_numbers(task, holdings.task))


def _task_of(holdings: Holdings, folder: Path) -> tuple[Task, list[str]]:
    """What a model does with the owner's rows, with the labels that `folder` names; and what of it is odd."""
    agreed = holdings.task
    if (
        agreed.kind == "text-classification"
        and kind_of(folder) == "causal-lm"
        and holdings.settings.data.text_pair is None
    ):
        return Task(kind="causal-lm", max_tokens=agreed.max_tokens), [
            "The audited model is a language model, and your rows have labels. It was attacked by its loss on the "
            "texts, and the labels were not read."
        ]
    labels = named_labels(folder) if agreed.has_labels else ()
    if not labels:
        numbered = "The audited model does not name its labels, so its outputs were taken in the agreed order."
        return agreed.model_copy(update={"head": "shared"}), [numbered] if agreed.has_labels else []
    task = agreed.model_copy(update={"head": "shared", "labels": labels})
    numbers = _numbers(task, agreed)
    if numbers is None:
        return task, []
    missing = int((numbers == IGNORED).sum())
    if missing == len(agreed.labels):  # check: labels-are-matched-by-name
        raise ModelError(
            f"model {folder}: none of its labels is one of the agreed labels: it has {_some_labels(labels)}, the "
            f"agreement has {_some_labels(agreed.labels)}",
            hint="name in its config.json (id2label) what its outputs stand for, as the agreement spells it",
        )
    if missing:
        return task, [
            f"{missing} of the {len(agreed.labels)} agreed labels are none of the audited model's. Rows with these "
            "were left out, for all models."
        ]
    return task, []


def _numbers(task: Task, agreed: Task) -> NDArray[np.int64] | None:
    """A model's own number for each agreed label, IGNORED for one that it lacks; None if they are the agreed ones.

    A label is found by its name as it is, or else without regard to case; a name that two labels have is not.
    """
    return None if task.labels == agreed.labels or not task.has_labels else matched(task.labels, agreed.labels)


def matched(labels: Sequence[str], agreed: Sequence[str]) -> NDArray[np.int64]:
    """(agreed labels,): the index of each among a model's `labels`, IGNORED for one that is not there."""
    numbers = np.full(len(agreed), IGNORED, np.int64)
    for spelt in (_folded, as_line):  # what is found exactly comes last, and stays
        own, wanted = (_once([spelt(label) for label in each]) for each in (labels, agreed))
        for name, index in wanted.items():
            numbers[index] = own.get(name, numbers[index])
    return numbers


def _folded(label: str) -> str:
    return alike(as_line(label))


def _once(names: Sequence[str]) -> dict[str, int]:
    """By name, its index, for the names that occur once."""
    count = Counter(names)
    return {name: index for index, name in enumerate(names) if count[name] == 1}


def _some_labels(labels: Sequence[str]) -> str:
    return some_of([label[:LONGEST_LABEL] for label in labels])
