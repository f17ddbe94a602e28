"""All parties of a consortium on one machine: the real apps and messages, every owner with its own settings and state.

Scripts and notebooks call `amalgram.simulate` (amalgram.py), which looks at the folder before it imports this.
"""

import logging
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import tomli_w

from client.app import app as client_app
from client.owner import Owner
from client.settings import OwnerSettings
from common.agreement import COORDINATOR, Agreement, AgreementDraft
from common.errors import AmalgramError, OwnerRefused
from common.identity import Identity, read_identity, write_identity
from common.models.folders import fine_tuned_folder, model_folder
from common.models.loading import weights_made_here
from common.settings_file import load_settings, write_settings
from deploy.commands.agree import give_consent
from deploy.complete import complete_agreement
from deploy.consortium import Consortium, read_consortium
from deploy.launch.simulation import run_with_ray
from deploy.simulation import references
from deploy.simulation.engine import Engine, check_engine
from deploy.simulation.in_process_grid import run_in_process
from server.app import app as server_app
from server.checkpoint import is_checkpoint_of
from server.output_folder import CHECKPOINT, claim_output
from server.report.outcome import add_references
from server.report.page import render_report
from server.report.report import Report, read_report, save_report

PARTIES = "parties"
log = logging.getLogger("amalgram.simulate")


def simulate(
    folder: Path | str,
    output: Path | str | None = None,
    *,
    engine: Engine = "in-process",
    with_references: bool = True,
) -> Report:
    """Merge the consortium in `folder`; write `model/`, `report.html` and `report.json`.

    folder           holds `agreement.toml` (a draft is enough) and one settings file per owner, `<name>.toml` or
                     `<name>/owner.toml`; `amalgram simulate --init` writes a pattern
    output           where the results go: a new folder, or an earlier output, which is replaced; left out,
                     `folder/output`
    engine           who carries the messages: "in-process", or "ray" for Flower's simulation engine; the merged model
                     is the same
    with_references  add to the report what only somebody who holds all models and rows can know (references.py)

    Returns the report, whose fields `server/report/report.py` describes. Raises an AmalgramError; then no report was
    written. An interrupted run, rather than a failed one, resumes when this is called again on the same folders.
    Progress goes to the logger "amalgram".
    """
    output = Path(folder) / "output" if output is None else output
    check_engine(engine)
    consortium = read_consortium(Path(folder).resolve())
    return run_consortium(consortium, Path(output).resolve(), engine=engine, with_references=with_references)


def run_consortium(
    consortium: Consortium, output: Path, *, engine: Engine = "in-process", with_references: bool = True
) -> Report:
    """Like `simulate`, for a consortium that has been read, so that whoever read it need not import torch before."""
    draft, base_folder = consortium.draft, consortium.base_folder
    claim_output(output)
    log.info("completing the agreement against %s", draft.base)
    identities = make_identities(draft, output / PARTIES)
    keys = {name: identity.public_key for name, identity in identities.items()}
    agreement = complete_agreement(draft, base_folder, keys)
    made = ", ".join(weights_made_here(base_folder, agreement.task))
    if made:
        log.warning("the base model has no %s: made from the seed, the same for every owner to start from", made)
    with set_up_parties(output, agreement, base_folder, consortium.owner_files, identities) as (
        coordinator_file,
        party_files,
    ):
        for path in party_files:
            Owner(path).check()
        _run(engine, coordinator_file, party_files)
        report = read_report(output).model_copy(update={"simulated": True})
        if with_references:
            log.info("computing references")
            owners = [Owner(path) for path in party_files]
            scores = references.reference_scores([owner for owner in owners if owner.name in report.owners])
            report = add_references(report, scores)
        save_report(report, output)
    render_report(output)
    return report


def make_identities(draft: AgreementDraft, parties: Path) -> dict[str, Identity]:
    """Identities for all parties of a simulation: those that an interrupted one left in `parties`, or fresh ones."""
    names = (*draft.owner_names, COORDINATOR)
    paths = {name: _key_file(parties, name) for name in names}
    if all(path.is_file() for path in paths.values()):
        return {name: read_identity(path) for name, path in paths.items()}
    return {name: Identity(name=name, seed=secrets.token_bytes(32)) for name in names}


def _key_file(parties: Path, name: str) -> Path:
    return parties / f"{name}.key"


@contextmanager
def set_up_parties(
    output: Path,
    agreement: Agreement,
    base_folder: Path,
    owner_files: Mapping[str, Path],
    identities: Mapping[str, Identity],
) -> Iterator[tuple[Path, list[Path]]]:
    """Give every party its settings, its identity and the one agreement, and consent to it for each owner: whoever
    runs a simulation has everything in hand. Take the owners' state and the identities away afterwards, unless the
    run was interrupted and can go on.
    """
    parties, checkpoint = output / PARTIES, output / CHECKPOINT
    if not is_checkpoint_of(checkpoint, agreement.digest()):
        shutil.rmtree(parties, ignore_errors=True)
    parties.mkdir(parents=True, exist_ok=True)
    write_settings(parties / "agreement.toml", agreement)
    coordinator_file = parties / "coordinator.toml"
    coordinator_file.write_text(
        tomli_w.dumps({"agreement": "agreement.toml", "output": str(output), "base": str(base_folder)})
    )
    party_files = []
    try:
        for name, identity in identities.items():
            if not _key_file(parties, name).exists():
                write_identity(_key_file(parties, name), identity)
        for name, path in owner_files.items():
            settings = load_settings(path, OwnerSettings)
            party_files.append(parties / f"{name}.toml")
            write_settings(party_files[-1], _placed(settings, path.parent, base_folder))
            give_consent(Owner(party_files[-1]))
        yield coordinator_file, party_files
    except Exception:
        shutil.rmtree(parties, ignore_errors=True)
        shutil.rmtree(checkpoint, ignore_errors=True)
        raise
    shutil.rmtree(parties / "state", ignore_errors=True)
    for path in (*map(partial(_key_file, parties), identities), *parties.glob("*.ledger*")):
        path.unlink(missing_ok=True)


def _placed(settings: OwnerSettings, home: Path, base_folder: Path) -> OwnerSettings:
    """An owner's settings as they read from the simulation's own folder: absolute paths, its own state."""
    data = settings.data
    placed_data = data.model_copy(
        update={
            split: home / path
            for split, path in (("train", data.train), ("validation", data.validation), ("test", data.test))
            if path is not None
        }
    )
    return settings.model_copy(
        update={
            "agreement": Path("agreement.toml"),
            "state": Path("state") / settings.name,
            "identity": Path(f"{settings.name}.key"),
            "base": str(base_folder if settings.base is None else model_folder(settings.base, home)),
            "fine_tuned": None if settings.fine_tuned is None else str(fine_tuned_folder(settings.fine_tuned, home)),
            "data": placed_data,
        }
    )


def _run(engine: Engine, coordinator_file: Path, party_files: list[Path]) -> None:
    try:
        if engine == "ray":
            run_with_ray(coordinator_file, party_files)
        else:
            node_configs = [{"settings": str(path)} for path in party_files]
            run_in_process(server_app, client_app, node_configs, {"coordinator": str(coordinator_file)})
    except OwnerRefused as refusal:
        # Everybody is on this machine, so the reason, which otherwise stays with the owner, can be shown.
        reason = coordinator_file.parent / "state" / refusal.owner / "error.txt"
        if not reason.is_file():
            raise
        *_, message, hint = ["", *reason.read_text().strip().splitlines()]
        if not hint.startswith("hint: "):
            message, hint = hint, ""
        error = AmalgramError(f"owner {refusal.owner}: {message}", hint=hint.removeprefix("hint: "))
        error.code, error.exit_code = refusal.code, refusal.exit_code
        raise error from None
