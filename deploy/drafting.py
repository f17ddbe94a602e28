"""What can be added to a draft before its base model is loaded: the labels, and everybody's keys."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.agreement import COORDINATOR, AgreementDraft, CoordinatorEntry
from common.agreement.tables import Merging, Task
from common.errors import SettingsError
from common.merge_methods.distill import DISTILL, DistillTable
from common.models.adapter import changed_parameters
from common.models.folders import base_labels, check_base_labels, how_to_match, named_labels
from common.pool import pin_pool, read_pool
from common.pool_rows import PoolReader, pinned_for, vocabulary_of
from common.settings_file import parse_settings
from common.text import some_of

ADAPTER = "adapter"  # in merge.layers: what the owners' adapters change
NAME_THE_TARGETS = 'name the targets under [task], in the order of the models\' outputs: labels = ["score"]'
WRITE_THEM = 'write them under [task], in the order of the models\' outputs: labels = ["...", "..."]'


def with_labels(draft: AgreementDraft, base_folder: Path, models: Mapping[str, Path]) -> AgreementDraft:
    """The draft with its labels: those that it names, or the base, or all the owners' models that name any.

    `models`: the owners' fine-tuned folders by owner, as far as they are here. Raises SettingsError if nobody names
    labels, if the owners name different ones, or if some cannot be agreed on.
    """
    if draft.task.labels or not draft.task.has_labels:
        check_base_labels(base_folder, draft.task)
        return draft
    labels, where = named_labels(base_folder), f"model {base_folder}"
    if not labels and draft.task.head == "private":
        labels = base_labels(base_folder)  # only the shape of a head that nobody uses
    if not labels:
        named = {owner: found for owner, folder in models.items() if (found := named_labels(folder))}
        labels = _common(named)
        where = "the owners' models"
    if not labels:
        raise SettingsError(
            f"task.labels is missing: the base model {base_folder} has no head, or only numbers its labels"
            + (", and no owner's model names any" if models else ""),
            hint=NAME_THE_TARGETS if draft.task.is_regression else WRITE_THEM,
        )
    tables = draft.model_dump(mode="json")
    tables["task"]["labels"] = labels
    completed = parse_settings(tables, AgreementDraft, where)  # check: base-labels-are-checked
    check_base_labels(base_folder, completed.task)
    return completed


def _common(named: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The labels that all models name; () if none does. Raises SettingsError for the first that differs from most."""
    if not named:
        return ()
    (labels, _), *_ = Counter(named.values()).most_common()
    usual = next(owner for owner, found in named.items() if found == labels)
    for owner, found in named.items():
        if found != labels:
            raise SettingsError(
                f"the owners' models name different labels: {usual} has {list(labels)}, {owner} has {list(found)}",
                hint=how_to_match(found, labels)
                or 'name models of one task; or, if every owner keeps its own labels, agree on task.head = "private"',
            )
    return labels


def with_pool(draft: AgreementDraft, pool: Path | None, base_folder: Path) -> AgreementDraft:
    """The draft with what its pool decides, where it has one: SHA-256, rows and predictions. Raises DataError."""
    if pool is None:
        return draft
    pinned = pin_pool(pool, DISTILL.of(draft.tables), draft.task.kind)
    if draft.task.kind == "causal-lm":
        pinned = _with_vocabulary(pinned, pool, draft.task, base_folder)
    return draft.model_copy(update={DISTILL.name: pinned})


def _with_vocabulary(table: DistillTable, pool: Path, task: Task, base_folder: Path) -> DistillTable:
    """The table of a language model, whose base decides how many tokens there are, and where a text has some."""
    from common.models.loading import load_outline  # torch: not before the pool is read

    outline = load_outline(base_folder, task)
    reader = PoolReader.of_folder(base_folder, outline, task, table)
    return pinned_for(table, read_pool(pool, table, task.kind), reader, vocabulary_of(base_folder, outline))


def pool_of(draft: AgreementDraft, folder: Path) -> Path | None:
    """The pool that a draft in `folder` names, if a method reads it."""
    name = DISTILL.of(draft.tables).pool
    return folder / name if DISTILL.name in draft.methods and name is not None else None


def with_layers(draft: AgreementDraft, adapters: Sequence[Path]) -> AgreementDraft:
    """The draft with the names of what these LoRA adapters change, where it says "adapter" or nothing.

    Raises SettingsError if it says "adapter" and there is none.
    """
    if ADAPTER in draft.merge.layers and not adapters:
        raise SettingsError(
            'merge.layers = ["adapter"]: no adapter was found to read the names from',
            hint="name the folder of an owner's adapter: amalgram draft SHORT.toml *.pub --adapter FOLDER",
        )
    if not adapters or (draft.merge.layers and ADAPTER not in draft.merge.layers):
        return draft
    others = [name for name in draft.merge.layers if name != ADAPTER]
    names = dict.fromkeys([*others, *(name for folder in adapters for name in changed_parameters(folder))])
    return draft.model_copy(update={"merge": Merging(layers=tuple(names))})


def with_keys(draft: AgreementDraft, public_keys: Mapping[str, bytes], node_keys: Mapping[str, str]) -> AgreementDraft:
    """The draft with everybody's keys. Raises SettingsError if one is missing, or nobody's."""
    for name in (*draft.owner_names, COORDINATOR):
        if name not in public_keys:
            raise SettingsError(
                f"no public key of {name}", hint=f"ask for its .pub file; `amalgram keys new {name}` makes it"
            )
    for name in public_keys:
        if name not in (*draft.owner_names, COORDINATOR):
            raise SettingsError(
                f"a public key of {name}, who is not on the roster: {some_of(draft.owner_names)}",
                hint="remove the key, or add the owner to the draft",
            )
    owners = tuple(
        owner.model_copy(update={"public_key": public_keys[owner.name].hex(), "node_key": node_keys.get(owner.name)})
        for owner in draft.owners
    )
    coordinator = CoordinatorEntry(public_key=public_keys[COORDINATOR].hex())
    return draft.model_copy(update={"owners": owners, "coordinator": coordinator})
