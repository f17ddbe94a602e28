"""A consortium's folder, looked at before anything heavy is loaded: its agreement, its owners, their models and files.

Importing torch takes seconds, and a misspelt key, path, column or label should not take that long to find.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from client.look import OwnerLook, look_at_owner, own_folder
from client.settings import OwnerSettings
from common.agreement import AgreementDraft
from common.errors import AmalgramError, ModelError, SettingsError
from common.models.adapter import is_adapter
from common.models.folders import check_same_architecture, model_folder
from common.settings_file import load_settings
from common.text import some_of
from deploy.drafting import ADAPTER, pool_of, with_labels, with_layers, with_pool

AGREEMENT = "agreement.toml"
NOT_OWNERS = (AGREEMENT, "coordinator.toml")


@dataclass(frozen=True)
class Consortium:
    """What is in a consortium's folder. The draft has its labels."""

    draft: AgreementDraft
    base_folder: Path
    pool: Path | None
    owner_files: Mapping[str, Path]
    settings: Mapping[str, OwnerSettings]
    adapters: Mapping[str, Path]  # of the base, by the owners that bring them

    @property
    def own_bases(self) -> list[Path]:
        """Those of the owners that have a base of their own."""
        return [
            model_folder(settings.own_base, self.owner_files[name].parent)
            for name, settings in self.settings.items()
            if settings.own_base is not None
        ]

    def look_at(self, owner: str) -> OwnerLook:
        """Look at an owner's model and files. Raises the AmalgramError that a run would meet."""
        home = self.owner_files[owner].parent
        look = look_at_owner(self.settings[owner], home, self.draft.task)
        if look.fine_tuned is not None:
            check_same_architecture(look.fine_tuned, look.own_base or self.base_folder)
        return look


def read_consortium(folder: Path) -> Consortium:
    """Read the settings in `folder` and look at everything that they name. Raises the AmalgramError that a run would
    meet.
    """
    consortium = read_settings(folder)
    for owner in consortium.owner_files:
        consortium.look_at(owner)
    return consortium


def read_settings(folder: Path) -> Consortium:
    """Read the settings in `folder`, whatever the owners' models and files hold. Raises an AmalgramError."""
    if folder.is_file():
        raise SettingsError(f"{folder}: is a file; name the folder that it is in: {folder.parent}")
    if not (folder / AGREEMENT).is_file():
        raise SettingsError(
            f"{folder}: has no {AGREEMENT}", hint=f"`amalgram simulate --init {folder.name}-new` writes an example"
        )
    draft = load_settings(folder / AGREEMENT, AgreementDraft)
    files = find_owner_files(folder, draft)
    settings = {name: load_settings(path, OwnerSettings) for name, path in files.items()}
    base_folder = model_folder(draft.base, folder, draft.base_revision)
    pool = pool_of(draft, folder)
    draft = with_pool(draft, pool, base_folder)
    found, missing = dict[str, Path](), list[ModelError]()
    for name, each in settings.items():
        try:
            brought = None if each.own_base is not None else own_folder(each, files[name].parent)
        except ModelError as error:  # a look at this owner raises it
            missing.append(error)
        else:
            found |= {} if brought is None else {name: brought}
    try:
        draft = with_labels(draft, base_folder, found)
        adapters = {name: each for name, each in found.items() if is_adapter(each)}
        if ADAPTER in draft.merge.layers:
            draft = with_layers(draft, list(adapters.values()))
    except AmalgramError as error:
        raise (missing[0] if missing else error) from None
    return Consortium(
        draft=draft, base_folder=base_folder, pool=pool, owner_files=files, settings=settings, adapters=adapters
    )


def find_owner_files(folder: Path, draft: AgreementDraft) -> dict[str, Path]:
    """The settings file of every owner on the roster, in its order. Raises SettingsError if they do not match it."""
    files: dict[str, Path] = {}
    for path in sorted([*folder.glob("*.toml"), *folder.glob("*/owner.toml")]):
        if path.name in NOT_OWNERS:
            continue
        name = load_settings(path, OwnerSettings).name
        if name not in draft.owner_names:
            raise SettingsError(
                f"{path}: owner {name!r} is not on the roster of {AGREEMENT}: {some_of(draft.owner_names)}",
                hint=f'give the owner a name of the roster, or add it there: [[owners]] name = "{name}"',
            )
        if name in files:
            raise SettingsError(
                f"{path}: owner {name!r} has a settings file already, {files[name]}", hint="keep one of them"
            )
        files[name] = path
    for name in draft.owner_names:
        if name not in files:
            raise SettingsError(
                f"{folder}: owner {name!r} of {AGREEMENT} has no settings file, {name}.toml",
                hint=f"write {name}.toml, or remove {name} from the roster",
            )
    return {name: files[name] for name in draft.owner_names}
