"""`amalgram check`: looks at what a merge needs, and says what it would do and take.

Every rule is the one that a run applies. A line is shown as soon as it is known, the quick ones first: the rounds
follow from the base's modules, which takes torch, whose import takes seconds.
"""

import secrets
import shutil
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from math import ceil, inf
from pathlib import Path
from time import process_time
from typing import TYPE_CHECKING, Any

import numpy as np

from client.data.lengths import cut_in_words, token_lengths
from client.data.private_data import PrivateData, prepared_by
from client.ledger import Ledger
from client.look import OwnerLook, oddities, own_task
from client.owner import Owner
from client.repeats import LEAST_SHARE, Contributed, Repeat, check_weightings, terms_of
from client.settings import OwnerSettings, Training
from client.sketch import Sketch
from common.agreement import COORDINATOR, Agreement, AgreementDraft, Task, load_agreement
from common.device import accelerators, find_device, find_solver, memory_of, title_of
from common.errors import AmalgramError, DataError, SettingsError, first_line
from common.identity import Identity, fingerprint
from common.merge_methods.distill import DISTILL
from common.models.adapter import changed_parameters, check_adapter, is_adapter, names_another_base
from common.models.files import check_readable, weight_bytes
from common.models.folders import (
    base_model_folder,
    check_same_architecture,
    check_tokenizer,
    load_tokenizer,
    model_folder,
)
from common.pool import pool_path, read_pool
from common.schedule import Delivery, Schedule, schedule_of
from common.settings_file import load_settings, read_toml
from common.text import shown
from deploy.commands.client import owner_network
from deploy.commands.server import find_place
from deploy.consortium import Consortium, read_settings
from deploy.drafting import with_labels
from deploy.launch.processes import listens
from deploy.network_keys import check_server_files
from deploy.reach import check_reachable
from deploy.terminal import about_bytes, answer, byte_count, show_error, shows_json
from server.output_folder import CHECKPOINT
from server.settings import read_coordinator_identity

if TYPE_CHECKING:
    import torch

    from deploy.estimate import OwnerRows, Work

FIRST_ROWS, FIRST_IMAGES = 2000, 200  # of each file, that are read as a run reads them
LARGE_BASE_BYTES = 2_000_000_000  # a draft on a larger base is not completed for a check
BLOCK_BYTES = 512  # what st_blocks counts, on every file system
NOT_READY = 1


@dataclass
class Item:
    """One thing that was looked at: what was found, or what is wrong with it."""

    what: str
    found: str = ""
    error: AmalgramError | None = None


@dataclass(frozen=True)
class Seen:
    """An owner whose files were looked at; its paths are relative to `home`."""

    settings: OwnerSettings
    look: OwnerLook
    home: Path


@dataclass
class Checklist:
    """What was looked at so far. A block of `item` names what it found; an AmalgramError in it is what is wrong."""

    items: list[Item] = field(default_factory=list)

    @contextmanager
    def item(self, what: str) -> Iterator[Item]:
        item = Item(what)
        try:
            yield item
        except AmalgramError as error:
            if any(each.error and each.error.message == error.message for each in self.items):
                return  # one fault, come upon twice
            item.error = error
        self.add(item)

    def add(self, item: Item) -> None:
        """Note what was looked at, and show it."""
        self.items.append(item)
        if shows_json():
            return
        if item.error is None:
            print(f"{shown(item.what):<14} {shown(item.found)}", flush=True)
        else:
            show_error(item.error.message, item.error.hint)

    @property
    def is_ready(self) -> bool:
        return all(item.error is None for item in self.items)

    def as_json(self) -> list[dict[str, Any]]:
        return [
            {"what": item.what, "found": item.found}
            if item.error is None
            else {"what": item.what, "error": item.error.message, "hint": item.error.hint}
            for item in self.items
        ]


def check_and_show(path: Path) -> int:
    """Check a consortium's folder, an agreement, a draft, or a party's settings; returns the exit code."""
    checks = Checklist()
    if path.is_dir():
        following = _check_folder(checks, path)
    else:
        tables = read_toml(path)
        if "owners" in tables:
            following = _check_agreement(checks, path, is_draft="base_digest" not in tables)
        elif "output" in tables:
            following = _check_coordinator(checks, path)
        else:
            following = _check_owner(checks, path)
    wrong = sum(item.error is not None for item in checks.items)
    hint = f"ready; next: {following}" if checks.is_ready else f"not ready: {wrong} to correct"
    answer({"ready": checks.is_ready, "looked_at": checks.as_json()}, hint=hint)
    return 0 if checks.is_ready else NOT_READY


# --- what each kind of path has ---


def _check_folder(checks: Checklist, folder: Path) -> str:
    following = f"amalgram simulate {folder}"
    with checks.item("agreement") as item:
        consortium = read_settings(folder.resolve())
        item.found = _in_words(consortium.draft)
    if not checks.is_ready:
        return following
    with checks.item("base") as item:
        item.found = _task_in_words(consortium.draft, consortium.base_folder)
    if consortium.pool is not None:
        _check_pool(checks, consortium.draft, consortium.pool)
    seen = list[Seen]()
    for owner, path in consortium.owner_files.items():
        with checks.item(owner) as item:
            seen.append(Seen(consortium.settings[owner], consortium.look_at(owner), path.parent))
            item.found = _owner_in_words(seen[-1], consortium.draft.task)
    if checks.is_ready:
        _check_adapters(checks, consortium.draft, consortium.base_folder, seen)
    if checks.is_ready:
        with checks.item("rounds") as item:
            agreement = _simulated_agreement(consortium)
            schedule = _schedule(agreement, consortium.base_folder) if agreement else None
            item.found = _rounds_in_words(schedule) if schedule else "of a base this large: see `amalgram draft`"
        with checks.item("device") as item:
            named = {name: each.device for name, each in consortium.settings.items()}
            found = {name: _device_in_words(find_device(wanted, name)) for name, wanted in named.items()}
            same = len(set(found.values())) == 1
            item.found = next(iter(found.values())) if same else "; ".join(f"{name}: {found[name]}" for name in found)
    if checks.is_ready:
        _check_rows(checks, consortium.draft, consortium.base_folder, seen)
    if checks.is_ready and agreement and schedule:
        from deploy.simulation.parties import PARTIES  # imports torch

        output = folder / "output"
        folders = output / PARTIES, output / CHECKPOINT
        _check_room(checks, agreement, consortium.base_folder, schedule, *folders, owners=seen, coordinates=True)
        _estimate(checks, agreement, consortium.base_folder, schedule, seen, consortium.pool, coordinates=True)
    _say_what_is_left(checks, "amalgram simulate", consortium.draft.task, seen)
    return following


def _check_agreement(checks: Checklist, path: Path, *, is_draft: bool) -> str:
    home = path.resolve().parent
    if is_draft:
        with checks.item("draft") as item:
            draft = load_settings(path, AgreementDraft)
            item.found = _in_words(draft)
        if checks.is_ready:
            with checks.item("base") as item:
                base_folder = model_folder(draft.base, home, draft.base_revision)
                item.found = _task_in_words(with_labels(draft, base_folder, models={}), base_folder)
        return f"amalgram draft {path} *.pub"
    with checks.item("agreement") as item:
        agreement = load_agreement(path)
        item.found = f"{_in_words(agreement)}; fingerprint {fingerprint(bytes.fromhex(agreement.digest()))}"
    if checks.is_ready:
        with checks.item("base") as item:
            base_folder = base_model_folder(None, home, agreement, path)
            item.found = _task_in_words(agreement, base_folder)
    if checks.is_ready:
        with checks.item("rounds") as item:
            item.found = _rounds_in_words(_schedule(agreement, base_folder))
    return "amalgram agree OWNER.toml"


def _check_owner(checks: Checklist, path: Path) -> str:
    following = f"amalgram agree {path}"
    with checks.item("settings") as item:
        owner = Owner(path)
        item.found = f"owner {owner.name}"
    if not checks.is_ready:
        return following
    home, settings = owner.home, owner.settings
    with checks.item("agreement") as item:
        agreement = owner.agreement
        item.found = f"{_in_words(agreement)}; fingerprint {fingerprint(bytes.fromhex(agreement.digest()))}"
    if not checks.is_ready:
        return following
    with checks.item("base") as item:
        base_folder = base_model_folder(settings.base, home, agreement, home / settings.agreement)
        item.found = _task_in_words(agreement, base_folder)
    with checks.item("model, files") as item:
        look = owner.look()
        if look.fine_tuned is not None:
            check_same_architecture(look.fine_tuned, look.own_base or base_folder)
        seen = Seen(settings, look, home)
        item.found = _owner_in_words(seen, agreement.task)
    agreed_at, table = home / settings.agreement, DISTILL.of(agreement.tables)
    pool = pool_path(settings.pool, home, table, agreed_at)
    _check_pool(checks, agreement, pool)
    if settings.network is not None:
        with checks.item("network") as item:
            network, key, root = owner_network(owner, path)
            check_reachable(network.address, root)
            item.found = f"{network.address} answers, with {key.name} and {root.name}"
    if checks.is_ready:
        _check_adapters(checks, agreement, base_folder, [seen])
    if checks.is_ready:
        with checks.item("rounds") as item:
            schedule = _schedule(agreement, base_folder)
            item.found = _rounds_in_words(schedule)
        with checks.item("device") as item:
            item.found = _device_in_words(find_device(settings.device, str(path)))
    if checks.is_ready:
        for data in _check_rows(checks, agreement, base_folder, [seen]):
            _check_ledger(checks, owner, data)
    if checks.is_ready:
        _check_room(checks, agreement, base_folder, schedule, home / settings.state, owners=[seen])
        _estimate(checks, agreement, base_folder, schedule, [seen], pool, coordinates=False)
        _say_what_is_left(checks, "amalgram agree", agreement.task, [seen])
        if (home / settings.state).is_dir() and agreement.digest() in owner.state.consents():
            return f"amalgram client {path}"
    return following


def _check_coordinator(checks: Checklist, path: Path) -> str:
    with checks.item("settings") as item:
        place = find_place(path)
        item.found = _in_words(place.agreement)
    if not checks.is_ready:
        return f"amalgram server {path}"
    with checks.item("identity") as item:
        read_coordinator_identity(place.home / place.settings.identity, place.agreement)
        item.found = f"{place.settings.identity}, as agreed"
    with checks.item("certificates") as item:
        files = (place.network.certificate, place.network.key, place.network.root_certificate)
        check_server_files(*(place.home / each for each in files))
        item.found = ", ".join(map(str, files))
    with checks.item("base") as item:
        base_folder = base_model_folder(
            place.settings.base, place.home, place.agreement, place.home / place.settings.agreement
        )
        item.found = _task_in_words(place.agreement, base_folder)
    agreed_at, table = place.home / place.settings.agreement, DISTILL.of(place.agreement.tables)
    pool = pool_path(place.settings.pool, place.home, table, agreed_at)
    _check_pool(checks, place.agreement, pool)
    port = place.host_and_port[1]
    with checks.item("port") as item:
        is_running = listens(port)
        item.found = f"{port} is taken, as it should be if `amalgram server` runs" if is_running else f"{port} is free"
    if checks.is_ready:
        with checks.item("rounds") as item:
            schedule = _schedule(place.agreement, base_folder)
            item.found = _rounds_in_words(schedule)
        with checks.item("device") as item:
            item.found = _device_in_words(find_solver(place.settings.device, str(path)))
    if checks.is_ready:
        _check_room(checks, place.agreement, base_folder, schedule, place.output / CHECKPOINT, coordinates=True)
        _estimate(checks, place.agreement, base_folder, schedule, [], pool, coordinates=True)
    return f"amalgram {'merge' if is_running else 'server'} {path}"


# --- parts that several have ---


def _check_adapters(checks: Checklist, draft: AgreementDraft, base_folder: Path, owners: Sequence[Seen]) -> None:
    """Whether every adapter has the layers and shapes of what it was made from. No weights of a base are loaded."""
    for owner in owners:
        folder, made_from = owner.look.fine_tuned, owner.look.own_base or base_folder
        if folder is not None and is_adapter(folder):
            with checks.item("adapter") as item:
                from common.models.loading import load_outline
                from common.models.published_folder import base_names

                check_adapter(load_outline(made_from, own_task(owner.settings, owner.home, draft.task)), folder)
                changed = len(changed_parameters(folder))
                fits = f"{folder.resolve()} fits its base, of which it changes {changed} tensors"
                odd = names_another_base(folder, made_from, base_names(draft, owner.settings.own_base))
                item.found = "; ".join(filter(None, (fits, odd)))


def _check_rows(
    checks: Checklist, draft: AgreementDraft, base_folder: Path, owners: Sequence[Seen]
) -> Sequence[PrivateData]:
    """Whether every owner's rows can be read as a run reads them, and are the model's that it brings. Returns them,
    none if one's cannot.
    """
    models = [(each.look.fine_tuned, each.look.own_base or base_folder) for each in owners if each.look.fine_tuned]
    if draft.task.is_text and models:
        with checks.item("tokenizers") as item:
            for folder, own_base in models:
                check_tokenizer(folder, own_base)
            item.found = "the same vocabulary as the base's"
    read: list[PrivateData] = []
    with checks.item("reading") as item:
        most = FIRST_ROWS if draft.task.is_text else FIRST_IMAGES
        prepared = [_private_data(draft, base_folder, each) for each in owners]
        rows = sum(data.try_reading(most) for data in prepared)
        found = f"{rows:,} rows read as in a run; no more is lost than [reading] allows"
        brought = [(each.look.fine_tuned, data) for each, data in zip(owners, prepared, strict=True)]
        item.found = "; ".join((found, *filter(None, (data.read_otherwise(own) for own, data in brought if own))))
        read = prepared
    if draft.task.is_text:
        _check_lengths(checks, draft.task, base_folder, owners)
    return read


def _check_ledger(checks: Checklist, owner: Owner, data: PrivateData) -> None:
    """Say whether the same rows were contributed under another agreement. The ledger is read, and stays as it is."""
    path, agreement = owner.ledger_path, owner.agreement
    has_state = (owner.home / owner.settings.state).is_dir()  # which a look at the state would make
    if not has_state and not path.exists():
        return
    with checks.item("ledger") as item:
        key = owner.identity.public_key
        ledger = owner.ledger if has_state else Ledger(path, key, agreement, must_exist=False)
        consent = owner.state.consents().get(agreement.digest()) if has_state else None
        repeats = ledger.repeats(Contributed.of(owner.ledger_key, data, Sketch()))
        check_weightings(terms_of(agreement), repeats)
        item.found = _repeats_in_words(repeats, consent.again if consent else ())


def _repeats_in_words(repeats: Sequence[Repeat], allowed: Collection[str]) -> str:
    """`allowed`: the agreements that this owner consented to repeat."""
    if not repeats:
        return f"fewer than {LEAST_SHARE:.0%} of these rows were contributed under another agreement"
    told = "; ".join(f"{each.what} were contributed under {each.named}" for each in repeats)
    if all(each.agreement_digest in allowed for each in repeats):
        return f"{told}, and there is consent to contribute them again"
    return f"{told}; `amalgram agree` says what the totals show together, and takes --again as consent to that"


def _private_data(draft: AgreementDraft, base_folder: Path, owner: Seen) -> PrivateData:
    """An owner's rows, as its own model reads them."""
    from common.models.loading import load_outline

    folder, task = owner.look.own_base or base_folder, own_task(owner.settings, owner.home, draft.task)
    return PrivateData(
        data=owner.settings.data,
        task=task,
        model=load_outline(folder, task),
        **prepared_by(folder, task),
        folder=owner.home,
        seed=draft.seed,
        reading=draft.reading,
    )


def _check_pool(checks: Checklist, draft: AgreementDraft, pool: Path) -> None:
    if DISTILL.name in draft.methods:
        with checks.item("pool") as item:
            table = DISTILL.of(draft.tables)
            rows = len(read_pool(pool, table, draft.task.kind))
            labels = len(draft.task.labels)
            item.found = (
                f"{rows:,} rows, as agreed: {table.asked:,} predictions of {table.outputs(labels):,} numbers, "
                f"{byte_count(8 * table.numbers(labels))} of what every owner sends"
            )


def _pool_lengths(agreement: Agreement, base_folder: Path, pool: Path | None) -> list[int]:
    """How many tokens each part of the pool has, as the base reads it; 1 for an image."""
    if DISTILL.name not in agreement.methods or pool is None:
        return []
    from common.models.loading import load_outline
    from common.pool_rows import PoolReader

    task, table = agreement.task, DISTILL.of(agreement.tables)
    if not task.is_text:
        return [1] * (table.rows or 0)
    reader = PoolReader.of_folder(base_folder, load_outline(base_folder, task), task, table)
    return [len(row["input_ids"]) for row in reader.read(read_pool(pool, table, task.kind)).features]


def _check_lengths(checks: Checklist, task: Task, base_folder: Path, owners: Sequence[Seen]) -> None:
    """Say how many texts would be cut, as each owner's own tokenizer counts."""
    with checks.item("lengths") as item:
        cut = []
        for each in owners:
            tokenizer = load_tokenizer(each.look.own_base or base_folder)
            paths = dict.fromkeys(file.path for file in each.look.files.values())
            lengths = [token_lengths(each.settings.data, task, path, tokenizer) for path in paths]
            if words := cut_in_words(np.concatenate(lengths), task.max_tokens):
                cut.append(f"{each.settings.name}: {words}")
        item.found = ". ".join(cut) or f"all texts looked at fit into max_tokens = {task.max_tokens}"


def _check_room(
    checks: Checklist,
    agreement: Agreement,
    base_folder: Path,
    schedule: Schedule,
    *folders: Path,
    owners: Sequence[Seen] = (),
    coordinates: bool = False,
) -> None:
    """Check that the disk has room for what a run of these parties keeps in `folders`, which need not exist yet.

    What an earlier start left there counts as room: a run resumes from it, or replaces it.
    """
    from common.models.loading import load_outline
    from deploy.estimate import disk_bytes

    with checks.item("disk") as item:
        existing = next(each for each in (folders[0].resolve(), *folders[0].resolve().parents) if each.exists())
        free = shutil.disk_usage(existing).free + sum(map(_taken_bytes, folders))
        model = 4 * sum(each.numel() for each in load_outline(base_folder, agreement.task).parameters())
        on_base = [each for each in owners if each.settings.own_base is None]  # another base may be smaller
        needed = disk_bytes(
            max(8 * each.layout.size for each in schedule.rounds),
            _kept_together(schedule),
            model if on_base else 0,
            model if agreement.publish.adapter_rank is None else 0,
            owners=len(owners),
            at_once=_shares(base_folder, owners)[0] if coordinates else 1,
            trained=sum(each.settings.fine_tuned is None for each in on_base),
            coordinates=coordinates,
            is_verified=agreement.is_verified,
        )
        item.found = f"{byte_count(free)} free in {existing}, a run keeps at least {byte_count(needed)}"
        if free < needed:
            raise SettingsError(
                f"{existing}: {byte_count(free)} free, a run keeps at least {byte_count(needed)}",
                hint="make room on this disk, or name another folder",
            )


def _taken_bytes(folder: Path) -> int:
    """What the files of a folder take. A party may be at work, so any of them may be gone by now."""
    taken = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            taken += path.lstat().st_blocks * BLOCK_BYTES
    return taken


def _kept_together(schedule: Schedule) -> list[int]:
    """Bytes of each merged model that is kept for the largest check; of the largest one if none is verified."""
    sizes = {each.position: 4 * each.layout.size for each in schedule.events if isinstance(each, Delivery)}
    checks = [[sizes[claim.delivery] for claim in each.claims] for each in schedule.of_kind("correction")]
    candidates = [[sizes[each.position]] for each in schedule.of_kind("candidate")]
    return max([*checks, *candidates], key=sum, default=[])


def _estimate(
    checks: Checklist,
    agreement: Agreement,
    base_folder: Path,
    schedule: Schedule,
    owners: Sequence[Seen],
    pool: Path | None,
    *,
    coordinates: bool,
) -> None:
    """Say what these parties, all of whom run on this machine, take together: time, network and memory. Say whether
    each owner has rows enough.
    """
    from client.measurement.gram_stream import TRIAL_ERRORS
    from deploy import estimate
    from deploy.simulation.crew import torch_threads

    with checks.item("time") as item:
        try:
            rows = [_owner_rows(agreement.task, base_folder, owner) for owner in owners]
            processes, threads = _shares(base_folder, owners if coordinates else ())
            with torch_threads(threads):
                work, parts = estimated_seconds(
                    agreement, base_folder, schedule, rows, pool, coordinates=coordinates, processes=processes
                )
        except TRIAL_ERRORS as error:
            item.found = f"unknown: the base cannot be timed without its weights ({first_line(error)})"
            return
        traffic = (work.sent_bytes + work.received_bytes) * (1 if owners else work.owners)
        is_simulated = bool(owners) and coordinates
        network = "" if is_simulated else f". The network takes {estimate.transfer_in_words(traffic)}"
        item.found = f"{estimate.in_words(parts)}, on an idle machine{network}"
    if item.error is not None:
        return
    with checks.item("memory") as item:
        most = max(estimate.owner_bytes(work) if owners else 0, estimate.coordinator_bytes(work) if coordinates else 0)
        most += (processes - 1) * estimate.owner_bytes(work)
        item.found = f"about {about_bytes(most)} at the most"
    if owners:
        _check_gram_rows(checks, agreement, base_folder, schedule, owners, rows)


def _check_gram_rows(
    checks: Checklist,
    agreement: Agreement,
    base_folder: Path,
    schedule: Schedule,
    owners: Sequence[Seen],
    rows: "Sequence[OwnerRows]",
) -> None:
    """Whether each owner's examples make rows enough for every Gram that it measures."""
    from client.measurement.gram_rows import check_gram_rows
    from common.models.loading import agreed_plan, load_outline
    from deploy.estimate import expected_rows

    outline = load_outline(base_folder, agreement.task)
    plan = agreed_plan(outline, base_folder, agreement)
    measured = {
        owner.settings.name: brought
        for owner, brought in zip(owners, rows, strict=True)
        if owner.look.own_base is None  # or it gives predictions alone
    }
    errors, fewest = list[DataError](), inf
    found = expected_rows(agreement, outline, plan, schedule, list(measured.values()))
    for name, grams in zip(measured, found, strict=True):
        try:
            for gram, (expected, needed) in grams.items():
                check_gram_rows(agreement, plan, name, gram, expected, needed, expected=True)
                fewest = min(fewest, expected / needed)
        except DataError as error:
            errors.append(error)
    for each in errors:
        checks.add(Item("Gram rows", error=each))
    if not errors and fewest < inf:
        checks.add(Item("Gram rows", found=f"at least {fewest:.2g} per dimension"))


def estimated_seconds(
    agreement: Agreement,
    base_folder: Path,
    schedule: Schedule,
    rows: "Sequence[OwnerRows]",
    pool: Path | None,
    *,
    coordinates: bool,
    processes: int = 1,
) -> "tuple[Work, dict[str, float]]":
    """What a merge asks of one owner, and the seconds that it takes of all these parties together, by part.

    `processes`: how many compute for the owners of a simulation. Whatever the model's own code raises if it cannot run
    without its weights passes through.
    """
    from common.models.loading import agreed_plan, digest_of, load_base, load_outline
    from deploy import estimate

    task = agreement.task
    outline = load_outline(base_folder, task)
    plan = agreed_plan(outline, base_folder, agreement)
    asked = _pool_lengths(agreement, base_folder, pool)
    work = estimate.work_of(agreement, plan, schedule, sum(asked))
    lengths = [each.tokens for each in rows] or asked or [1]
    tokens = round(sum(lengths) / len(lengths))
    rates = estimate.measure_rates(
        outline, plan, tokens, work, load=lambda: digest_of(load_base(base_folder, task, agreement.seed), task)
    )
    found = [estimate.owner_seconds(work, each, rates) for each in rows]
    if rows:
        share = ceil(len(rows) / processes) / len(rows)  # of the owners, for the process that computes for most
        found = [{name: share * seconds for name, seconds in each.items()} for each in found]
    if coordinates:
        found.append(estimate.coordinator_seconds(work, rates))
    if coordinates and rows:
        # Without a shared head, no model can be judged on another owner's rows: there are no references.
        judged = [] if task.head == "private" else rows
        found.append(estimate.references_seconds(judged, rates, processes) | estimate.page_seconds(rates))
    return work, {name: sum(each.get(name, 0.0) for each in found) for name in chain.from_iterable(found)}


def _shares(base_folder: Path, simulated: Sequence[Seen]) -> tuple[int, int]:
    """How many processes compute for the owners of a simulation, if it is one, and the threads of each."""
    import torch

    from deploy.simulation.crew import shares

    if not simulated:
        return 1, torch.get_num_threads()
    own = [each.look.own_base for each in simulated if each.look.own_base is not None]
    return shares(len(simulated), weight_bytes(base_folder, *own))


def _owner_rows(task: Task, base_folder: Path, owner: Seen) -> "OwnerRows":
    """The examples that an owner brings, and their lengths."""
    from common.models.loading import load_outline
    from deploy.estimate import OwnerRows, cost_beside

    settings, look, data = owner.settings, owner.look, owner.settings.data
    counts = {split: each.rows for split, each in look.files.items()}
    limits = {"train": data.max_train_rows, "validation": data.max_validation_rows, "test": data.max_test_rows}
    rows = {split: min(counts.get(split, 0), limit or sys.maxsize) for split, limit in limits.items()}
    if data.validation is None:
        rows["validation"] = rows["train"] // 10
        rows["train"] -= rows["validation"]
    tokens, reading = 1.0, 0.0
    if task.is_text:
        tokenizer, started = load_tokenizer(look.own_base or base_folder), process_time()
        lengths = token_lengths(data, task, look.files["train"].path, tokenizer)
        reading = (process_time() - started) / len(lengths)
        tokens = float(lengths.clip(1, task.max_tokens).mean())
    epochs = (settings.training or Training()).epochs if look.fine_tuned is None else 0
    cost = 1.0
    if look.own_base is not None:
        cost = cost_beside(load_outline(look.own_base, task), load_outline(base_folder, task))
    return OwnerRows(**rows, epochs=epochs, tokens=tokens, reading_seconds=reading, own_cost=cost)


def _say_what_is_left(checks: Checklist, command: str, task: Task, owners: Sequence[Seen]) -> None:
    """Say what no check finds, because it loads no weights, and which command does."""
    if checks.is_ready and any(each.look.fine_tuned for each in owners):
        order = ", or with outputs in another order than the labels" if task.has_labels else ""
        found = f"weights; `{command}` loads them, and finds a whole model of another base{order}"
        checks.add(Item("not looked at", found))


def _schedule(agreement: Agreement, base_folder: Path) -> Schedule:
    """The rounds of an agreement, from the base's modules and their shapes: no weights are loaded."""
    from common.models.loading import agreed_plan, load_outline

    return schedule_of(agreement, agreed_plan(load_outline(base_folder, agreement.task), base_folder, agreement))


def _simulated_agreement(consortium: Consortium) -> Agreement | None:
    """What a simulation would agree on; None if its base is too large to complete the draft for a check."""
    if weight_bytes(consortium.base_folder) > LARGE_BASE_BYTES:
        return None
    from deploy.complete import complete_agreement

    draft = consortium.draft
    keys = {
        name: Identity(name=name, seed=secrets.token_bytes(32)).public_key for name in (*draft.owner_names, COORDINATOR)
    }
    return complete_agreement(draft, consortium.base_folder, keys)


# --- in words ---


def _in_words(draft: AgreementDraft) -> str:
    compared = f", compared with {', '.join(draft.compare_with)}" if draft.compare_with else ""
    count, needed = len(draft.owners), draft.needed_owners
    stay = "all needed" if needed == count else f"at least {needed} needed"
    dtype = "" if draft.dtype == "float32" else f"; models run in {draft.dtype}"
    return f"{draft.title}: {draft.method}{compared}; {draft.summation.kind} sum of {count} owners, {stay}{dtype}"


def _task_in_words(draft: AgreementDraft, base_folder: Path) -> str:
    check_readable(base_folder)
    size = byte_count(weight_bytes(base_folder))
    task = draft.task
    problem = ", several labels a row" if task.has_several_labels else ", numbers" if task.is_regression else ""
    labels = f", {'targets' if task.is_regression else 'labels'} {', '.join(task.labels)}" if task.labels else ""
    if task.head == "private":
        labels = ", every owner keeps its own head"
    return f"{base_folder.resolve()}, {size}; {task.kind}{problem}{labels}"


def _owner_in_words(owner: Seen, task: Task) -> str:
    look, settings, home = owner.look, owner.settings, owner.home
    made_from = "the base" if look.own_base is None else look.own_base.resolve()
    model = f"trains its model from {made_from}" if look.fine_tuned is None else f"brings {look.fine_tuned.resolve()}"
    rows = f"rows: {', '.join(f'{each.rows} {split}' for split, each in look.files.items())}"
    labels = [f"labels {', '.join(own_task(settings, home, task).labels)}"] if task.head == "private" else []
    return "; ".join((model, rows, *labels, *oddities(settings, home, task)))


def _device_in_words(device: "torch.device") -> str:
    memory, others = memory_of(device), accelerators()
    if memory is not None:
        free, total = memory
        return f"{title_of(device)}, {byte_count(free)} of {byte_count(total)} free"
    return f'{device}; {title_of(others[0])} is there too: device = "auto"' if others else str(device)


def _rounds_in_words(schedule: Schedule) -> str:
    sent = ", ".join(f"{each.title} {byte_count(each.layout.num_bytes)}" for each in schedule.rounds)
    total = byte_count(sum(each.layout.num_bytes for each in schedule.rounds))
    received = [each.layout.size * 4 for each in schedule.events if isinstance(each, Delivery)]
    return (
        f"{len(schedule.rounds)} secure sums. Each owner sends {total}: {sent}. It receives "
        f"{byte_count(sum(received))} in {len(received)} deliveries"
    )
