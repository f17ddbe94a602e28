"""All parties of a consortium on one machine: the real apps and messages, every owner with its own settings and state.

Scripts and notebooks call `amalgram.simulate` (amalgram.py), which looks at the folder before it imports this.
"""

import logging
from pathlib import Path

from flwr.app import Context, Message

from client.app import app as client_app
from client.owner import FilesState, Owner, remember_checked
from common.errors import AmalgramError, OwnerRefused
from common.models.files import weight_bytes
from common.models.loading import weights_made_here
from common.private_file import unsynced
from deploy.complete import check_adapters, complete_agreement
from deploy.consortium import Consortium, read_consortium
from deploy.launch.simulation import run_with_ray
from deploy.simulation import references
from deploy.simulation.crew import Crew, sharing_cores
from deploy.simulation.engine import Engine, check_engine
from deploy.simulation.in_process_grid import run_in_process
from deploy.simulation.network import run_over_network
from deploy.simulation.parties import PARTIES, party_keys, set_up_parties
from server.app import app as server_app
from server.output_folder import claim_output
from server.report.outcome import add_references
from server.report.page import render_report
from server.report.report import Report, read_report, save_report

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
    output           where the results go: a new folder, or an earlier output, whose result stays until there is a new
                     one; left out, `folder/output`
    engine           who carries the messages: "in-process"; "network", a server and a client for each owner over TLS,
                     as in a real merge; or "ray", Flower's simulation engine. The merged model is the same
    with_references  add to the report what only somebody who holds all models and rows can know (references.py)

    Returns the report, whose fields `server/report/report.py` describes. Raises an AmalgramError; then no report was
    written. An interrupted run, rather than a failed one, resumes when this is called again on the same folders, unless
    the machine lost power.
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
    size = weight_bytes(consortium.base_folder, *consortium.own_bases)
    with sharing_cores(len(consortium.owner_files), size, has_helpers=engine == "in-process") as crew:
        return merge_consortium(consortium, output, crew, engine=engine, with_references=with_references)


def merge_consortium(
    consortium: Consortium, output: Path, crew: Crew, *, engine: Engine, with_references: bool
) -> Report:
    """Like `run_consortium`, but the processes are those of `crew`, which ends with the run."""
    draft, base_folder = consortium.draft, consortium.base_folder
    claim_output(output)
    log.info("completing the agreement against %s", draft.base)
    check_adapters(draft, base_folder, list(consortium.adapters.items()))
    keys = party_keys(draft, output / PARTIES, with_nodes=engine == "network")
    agreement = complete_agreement(draft, base_folder, keys.public_keys, keys.node_keys)
    made = ", ".join(weights_made_here(base_folder, agreement.task))
    if made:
        log.warning("the base model has no %s: made from the seed, the same for every owner to start from", made)
    parties = set_up_parties(output, agreement, base_folder, consortium.owner_files, keys, consortium.pool)
    with parties as (coordinator_file, party_files), crew:  # which ends before the parties' folder goes
        _check(party_files, crew)
        _run(engine, coordinator_file, party_files, crew)
        report = read_report(output).model_copy(update={"simulated": True})
        if with_references:
            log.info("computing references")
            taking_part = tuple(path for path in party_files if path.stem in report.owners)
            scores = references.reference_scores(taking_part, crew)
            report = add_references(report, scores)
        save_report(report, output)
    render_report(output)
    return report


def _check(party_files: list[Path], crew: Crew) -> None:
    """Look at what every owner brings. Raises the first error."""
    checked = {}
    for path, (files, oddities) in zip(
        party_files, crew.in_order(_look, [(path,) for path in party_files]), strict=True
    ):
        checked[path.resolve()] = files
        for oddity in oddities:
            log.warning("%s", oddity)
    crew.tell(remember_checked, checked)


def _look(path: Path) -> tuple[FilesState, list[str]]:
    """The files of an owner that were checked, and what is odd about them."""
    owner = Owner(path)
    owner.check()
    return owner.checked, [f"{owner.name}: {oddity}" for oddity in owner.workbench.oddities()]


def _answer(message: Message, context: Context) -> Message:
    return client_app(message, context)


def _run(engine: Engine, coordinator_file: Path, party_files: list[Path], crew: Crew) -> None:
    try:
        if engine == "network":
            run_over_network(coordinator_file, party_files)
        elif engine == "ray":
            run_with_ray(coordinator_file, party_files)
        else:
            node_configs = [{"settings": str(path)} for path in party_files]
            with unsynced():
                run_in_process(server_app, _answer, node_configs, {"coordinator": str(coordinator_file)}, crew)
    except OwnerRefused as refusal:
        # Everybody is on this machine, so the reason, which otherwise stays with the owner, can be shown.
        reason = coordinator_file.parent / "state" / refusal.owner / "error.txt"
        if not reason.is_file():
            raise
        *_, message, hint = ["", *reason.read_text().strip().splitlines()]
        if not hint.startswith("hint: "):
            message, hint = hint, ""
        message = message.removeprefix(f"{refusal.owner}: ")
        error = AmalgramError(f"owner {refusal.owner}: {message}", hint=hint.removeprefix("hint: "))
        error.code, error.exit_code = refusal.code, refusal.exit_code
        raise error from None
