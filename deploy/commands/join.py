"""`amalgram join`: makes an owner's files from an invitation, beside the keys that the owner made before.

It writes agreement.toml, ca.pem and NAME.toml, and overwrites nothing. A later agreement becomes agreement-2.toml, and
the settings stay. That an owner joins means nothing yet: whether anything leaves is decided by `amalgram agree`.
"""

import sys
from itertools import count
from pathlib import Path

import tomli_w

from client.settings import OwnerSettings
from common.agreement import Agreement, load_agreement
from common.agreement.tables import CLASSIFYING
from common.errors import AmalgramError, SettingsError
from common.identity import fingerprint, read_identity
from common.settings_file import load_settings, write_settings
from common.text import some_of
from deploy.invitation import Invitation, read_invitation
from deploy.network_keys import check_node_key
from deploy.terminal import answer, as_lines

ROOT_CERTIFICATE = Path("ca.pem")
COLUMNS = {  # of each task: key of [data], what it holds
    "text-classification": {"text": "a text"},
    "image-classification": {"image": "paths of images, relative to the table; a folder of images has no columns"},
    "token-classification": {"tokens": "lists of words", "tags": "a tag for each word"},
    "causal-lm": {"text": "a text; for conversations: messages, or prompt and completion"},
    "sequence-to-sequence": {"text": "the input", "target": "the text to write for it"},
}
LABELS = {  # what the label's column of texts and images holds
    "single_label_classification": "a label's name, or its number",
    "multi_label_classification": "lists of labels, or texts such as a|b; or name a column of 0 and 1 for each label",
    "regression": "a number; of several targets, lists, or name a column for each",
}
TABLES = ".jsonl, .csv, .parquet"
FILES = {  # of other tasks than texts: where rows are, and what else they may be in
    "image-classification": ("", f"a folder with one subfolder per label, or a table of paths ({TABLES})"),
    "token-classification": (".jsonl", f"{TABLES}, .conll"),
}
MODEL = """\
# Your fine-tuned model: a folder or a hub name; a LoRA adapter of the base will do.
fine_tuned = {model}
# If you have none, drop the line above and make a model here, from the base and your training rows:
# [training]
# epochs = 3
# learning_rate = 1e-4
"""
TRAINING = """\
# The model is made here, from the base and the training rows. If you have one, name it instead: fine_tuned = "model"
[training]
epochs = 3
learning_rate = 1e-4
"""
BASE = """\
# Your own copy of the base model, from its publisher. `amalgram agree` checks every file of it.
base = "base"
"""
SETTINGS = """\
# {name}'s settings for: {title}
# Nothing in this file leaves this machine. Paths are relative to this file.
name = "{name}"
{agreement}{base}{model}
[data]
train = {train}  # measured (and trained on): {files}
test = {test}  # gives the metrics
# validation = "data/validation{ending}"  # decides between values of a hyperparameter; or a tenth of the training rows
{columns}
[network]
address = {address}
"""


def join(invitation_file: Path, owner: str | None, model: str | None, train: Path | None, test: Path | None) -> None:
    """Write an owner's files into the current folder; if its rows are named, go on to ask for consent.

    Raises SettingsError rather than overwrite a file, and if this folder has no keys of an owner of the agreement.
    """
    invitation = read_invitation(invitation_file)
    agreement = invitation.agreement
    name = owner or _who_am_i(agreement)
    _check_keys(name, agreement)
    _check_certificate(invitation)
    settings, path = Path(f"{name}.toml"), _place_of(agreement)
    is_new, is_filled_in = not settings.exists(), train is not None and test is not None
    written = [str(path), str(ROOT_CERTIFICATE)]
    if is_new:
        written.append(str(settings))
        to_do = f"see that the columns in {settings} are right; " if is_filled_in else f"fill in {settings}; "
    elif changes := _changes(settings, path, invitation):
        to_do = f"{settings} stays as it is: change it to {changes}\n"
    else:
        raise SettingsError(
            f"{settings}: exists already, and is not overwritten",
            hint=f"to join anew, move it away; to go on with it: amalgram check {settings}",
        )
    write_settings(path, agreement)
    ROOT_CERTIFICATE.write_text(invitation.root_certificate)
    if is_new:
        settings.write_text(owner_settings(name, invitation, model, train, test, path))
    digits = fingerprint(bytes.fromhex(agreement.digest()))
    found = {"owner": name, "agreement": str(path), "fingerprint": digits}
    hint = f"wrote {', '.join(written)}\n{to_do}then look whether all is there: amalgram check {settings}\n"
    hint += f"compare the fingerprint with every other owner by phone, then consent: amalgram agree {settings}"
    answer(found | {"written": written}, as_lines(found), hint)
    if is_new and is_filled_in and sys.stdin.isatty():
        from deploy.commands.agree import ask_for_consent  # torch

        ask_for_consent(settings, yes=None, again=False)


def _who_am_i(agreement: Agreement) -> str:
    """The owner whose secret identity is in this folder. Raises SettingsError unless there is exactly one."""
    mine = [name for name in agreement.owner_names if Path(f"{name}.key").is_file()]
    if len(mine) == 1:
        return mine[0]
    if mine:
        raise SettingsError(
            f"this folder has the keys of {len(mine)} owners: {', '.join(mine)}", hint=f"say which: --owner {mine[0]}"
        )
    raise SettingsError(
        f"this folder has no key of an owner of this agreement: {some_of(agreement.owner_names)}",
        hint="run this where `amalgram keys new NAME` wrote NAME.key",
    )


def _check_keys(name: str, agreement: Agreement) -> None:
    entry = next((owner for owner in agreement.owners if owner.name == name), None)
    if entry is None:
        raise SettingsError(
            f"{name!r} is not an owner of this agreement", hint=f"its owners: {some_of(agreement.owner_names)}"
        )
    key = Path(f"{name}.key")
    if read_identity(key).public_key.hex() != entry.public_key:
        raise SettingsError(
            f"{key}: is not the identity that the agreement names for {name}",
            hint="use the folder with the keys whose .pub file you sent to the drafter, or send this one's",
        )
    check_node_key(Path(f"{name}.node"), name, agreement)


def _check_certificate(invitation: Invitation) -> None:
    if ROOT_CERTIFICATE.exists() and ROOT_CERTIFICATE.read_text() != invitation.root_certificate:
        raise SettingsError(
            f"{ROOT_CERTIFICATE}: another certificate is here already",
            hint="compare `amalgram keys show ca.pem` with the coordinator by phone, and move the wrong one away",
        )


def _place_of(agreement: Agreement) -> Path:
    """Where it is, or goes: agreement.toml, or agreement-2.toml beside another one."""
    names = (Path(f"agreement{'' if number == 1 else f'-{number}'}.toml") for number in count(1))
    return next(path for path in names if not path.exists() or _is_same(path, agreement))


def _changes(settings_file: Path, agreement: Path, invitation: Invitation) -> str:
    """What to change in settings that are there already, so that they belong to an invitation; empty if nothing."""
    settings = load_settings(settings_file, OwnerSettings)
    changes = [] if settings.agreement == agreement else [f'agreement = "{agreement}"']
    if settings.network is None or settings.network.address != invitation.address:
        changes.append(f"address = {_quoted(invitation.address)} in [network]")
    return " and ".join(changes)


def _is_same(path: Path, agreement: Agreement) -> bool:
    try:
        return load_agreement(path) == agreement
    except AmalgramError:
        return False


def owner_settings(
    name: str, invitation: Invitation, model: str | None, train: Path | None, test: Path | None, path: Path
) -> str:
    """An owner's settings as text, with comments; what it does not say yet is filled in as an example. `path`: where
    the agreement is.
    """
    agreement = invitation.agreement
    task = agreement.task
    columns = (COLUMNS[task.kind] | ({"label": LABELS[task.problem_type]} if task.kind in CLASSIFYING else {})).items()
    ending, files = FILES.get(task.kind, (".jsonl", TABLES))
    return SETTINGS.format(
        name=name,
        title=agreement.title,
        agreement="" if path == OwnerSettings.model_fields["agreement"].default else f'agreement = "{path}"\n',
        base="" if agreement.base_revision else BASE,
        model=TRAINING if train and not model else MODEL.format(model=_quoted(model or "model")),
        train=_quoted(str(train or f"data/train{ending}")),
        test=_quoted(str(test or f"data/test{ending}")),
        ending=ending,
        files=files,
        columns="".join(f'{key} = "{key}"  # the column with {what}\n' for key, what in columns),
        address=_quoted(invitation.address),
    )


def _quoted(text: str) -> str:
    """A string as TOML writes it."""
    return tomli_w.dumps({"text": text}).removeprefix("text = ").rstrip("\n")
