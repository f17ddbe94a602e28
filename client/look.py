"""A look at what an owner brings, before anything heavy is loaded: its model folder and its files.

Importing torch takes seconds, and most mistakes are in a path, a column or a label.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from client.data.columns import FileLook, look_at_files, rows_trained_on, rows_without_labels
from client.settings import OwnerSettings
from common.agreement import Task
from common.models.adapter import is_adapter
from common.models.files import check_readable
from common.models.folders import check_made_for, fine_tuned_folder, model_folder, named_labels


@dataclass(frozen=True)
class OwnerLook:
    """What a look at an owner found."""

    fine_tuned: Path | None  # None if it trains a model from the base
    files: dict[str, FileLook]  # by split
    own_base: Path | None  # what its model was or will be made from, if that is not the agreed base


def look_at_owner(settings: OwnerSettings, home: Path, task: Task) -> OwnerLook:
    """Raise the error that a run would meet, as far as it shows without loading a model or a tokenizer.

    `home`: the folder that paths in the settings are relative to. `task`: the agreed one.
    """
    own, folder = own_task(settings, home, task), own_folder(settings, home)
    if folder is not None:
        check_made_for(folder, own.model_copy(update={"labels": own_labels(settings, home, own)}))
        if not is_adapter(folder):
            check_readable(folder)
    made_from = None if settings.own_base is None else model_folder(settings.own_base, home)
    return OwnerLook(fine_tuned=folder, files=look_at_files(settings.data, own, home), own_base=made_from)


def oddities(settings: OwnerSettings, home: Path, task: Task) -> Iterator[str]:
    """What may well be a mistake in an owner's model and files, although it is allowed, in words."""
    own, folder = own_task(settings, home, task), own_folder(settings, home)
    has_order = own.has_labels and len(own.labels) > 1
    if folder is not None and has_order and not is_adapter(folder) and not named_labels(folder):
        order = ", ".join(f"{index} as {label}" for index, label in enumerate(own.labels))
        yield f"its model does not name its labels, so its outputs are read in the agreed order: {order}"
    if own.has_several_labels:
        yield from rows_without_labels(look_at_files(settings.data, own, home).values())
    if trained_on := rows_trained_on(settings.data, own, home):
        yield trained_on


def own_folder(settings: OwnerSettings, home: Path) -> Path | None:
    """The model that an owner brings; None if it has none. Raises ModelError."""
    return None if settings.fine_tuned is None else fine_tuned_folder(settings.fine_tuned, home)


def own_base(settings: OwnerSettings, home: Path, agreed: Path) -> Path:
    """What an owner's model was made from: the `agreed` base's folder, or that of another one. Raises ModelError."""
    return agreed if settings.own_base is None else model_folder(settings.own_base, home)


def own_labels(settings: OwnerSettings, home: Path, task: Task) -> tuple[str, ...]:
    """What the outputs of an owner's model stand for, in order; `task`: what its rows are read for.

    A model of a base of its own may name fewer labels than are agreed, in another order.
    """
    folder = own_folder(settings, home)
    if settings.own_base is None or folder is None or is_adapter(folder):
        return task.labels
    return named_labels(folder) or task.labels


def own_task(settings: OwnerSettings, home: Path, task: Task) -> Task:
    """The agreed task; if heads are private, over this owner's own labels."""
    if task.head == "shared":
        return task
    folder = own_folder(settings, home)
    labels = settings.labels or (() if folder is None else named_labels(folder))
    return task.model_copy(update={"labels": labels or task.labels})
