"""`amalgram verify`: whether a published folder is what the owners signed. Anybody can run it; it needs no secret.

It shows that the files and metrics are those that the parties of one agreement signed. Unless that agreement says
otherwise, they verified that the model is the merge, up to a tolerance (SECURITY.md). It does not show whose agreement
it is: somebody who makes up all parties can sign anything. Hence the fingerprint.

With a file of `OUT/evidence`, it says who lied in a sum. With an owner's settings file, it explains what that owner
kept of a model that is not the merge (explain.py).
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from pydantic import JsonValue, ValidationError
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.agreement import Agreement
from common.errors import AmalgramError, RemoteProtocolError, SettingsError
from common.identity import fingerprint
from common.metrics import OWN_AT_HOME, worst_accuracy
from common.models.adapter import ADAPTER_CONFIG
from common.models.files import digest_of_file
from common.models.published_folder import CONFIG, read_finite
from common.publication import (
    MAX_RECEIPTS_BYTES,
    RECEIPTS,
    Publication,
    PublishedReceipts,
    SignedMean,
)
from common.settings_file import parse_settings
from deploy.terminal import answer, quoted, shows_json
from server import evidence
from server.output_folder import LEFT_BY_RUNS
from server.report.report import Report, group_metrics, read_report

NOT_READ = {".git", ".gitattributes", ".cache"}  # the hub's own, which nothing loads
CODE = {".py", ".pyc", ".so", ".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".h5", ".keras", ".ipynb", ".sh"}
REFERENCES = {"own", "ensemble", "close_ensemble", "multi_task"}  # a simulation computes them, and no owner signs them
SIGNED = ("accuracy", "metric", "pooled_accuracy", "predictions", "pearson_r", "sums")  # of a model's metrics
MAX_ENTRIES = 10_000


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row of the table. `is_signed`: whether it is as the owners signed it."""

    what: str
    found: str
    is_signed: bool


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What a folder holds, compared with its receipts. `folder`: the one whose files were compared."""

    folder: str
    title: str
    fingerprint: str
    verified_by: list[str]  # the owners that verified that the model is the merge, if they signed
    signed_by: list[str]
    not_signed_by: list[str]
    findings: list[Finding]

    @property
    def is_signed(self) -> bool:
        return all(finding.is_signed for finding in self.findings)


def verify_folder(out: Path, receipts_file: Path | None) -> int:
    """Show what `out` holds, compared with its receipts. The exit code: 0 if all of it is as signed, 1 if not."""
    verification = check_folder(out, receipts_file)
    if shows_json():
        answer({**asdict(verification), "is_signed": verification.is_signed})
    else:
        _print(Console(), verification, out)
    return 0 if verification.is_signed else 1


def check_folder(out: Path, receipts_file: Path | None = None) -> Verification:
    """Compare a run's output folder, or its `model` alone, with its receipts, or with those of `receipts_file`.

    Of a run's output, `model` is compared, the report, and nothing else may lie beside them: a library that is given
    the output folder itself loads what lies there.

    Raises SettingsError if there are no receipts that can be read.
    """
    folder = out / "model" if (out / "model").is_dir() else out
    receipts = read_receipts(receipts_file or folder / RECEIPTS)
    agreement = parse_settings(receipts.agreement, Agreement, f"{receipts_file or folder / RECEIPTS}: agreement")
    publication = receipts.publication
    try:
        signed_by = receipts.check(agreement)  # check: verify-checks-signatures
        findings = [Finding(what="signatures", found=f"valid, of {len(signed_by)} owners", is_signed=True)]
    except RemoteProtocolError as error:
        signed_by = []
        findings = [Finding(what="signatures", found=error.message, is_signed=False)]
    if receipts_file is not None:
        findings += _compare_agreements(folder, receipts)
    findings += _check_files(folder, publication)
    findings += _check_configuration(folder, publication)
    if folder != out:
        findings += _check_report(out, agreement, receipts)
        findings += _check_what_is_beside(out)
    return Verification(
        folder=str(folder),
        title=agreement.title,
        fingerprint=fingerprint(bytes.fromhex(agreement.digest())),
        verified_by=[name for name in publication.owners if name in signed_by] if agreement.is_verified else [],
        signed_by=signed_by,
        not_signed_by=[name for name in agreement.owner_names if name not in signed_by],
        findings=findings,
    )


def read_receipts(path: Path) -> PublishedReceipts:
    """Raises SettingsError if the file is missing, too large or malformed."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_RECEIPTS_BYTES + 1)
    except OSError as error:
        raise SettingsError(
            f"{path}: cannot be read ({error.strerror})",
            hint="name the folder of a published model, or with --receipts an owner's file in state/receipts",
        ) from None
    try:
        if len(content) > MAX_RECEIPTS_BYTES:
            raise ValueError
        return PublishedReceipts.model_validate_json(content)
    except (ValidationError, ValueError):
        raise SettingsError(
            f"{path}: this release cannot read these receipts",
            hint="get the file again, or name an owner's with --receipts",
        ) from None


def _compare_agreements(folder: Path, receipts: PublishedReceipts) -> Iterator[Finding]:
    """Say if an owner's receipts are of another merge than the folder, where everything else differs."""
    with suppress(SettingsError):
        if read_receipts(folder / RECEIPTS).agreement != receipts.agreement:
            found = "the owner's receipts are of another agreement than the folder's own: its result is elsewhere"
            yield Finding(what="agreement", found=found, is_signed=False)


# --- files ---


def _check_files(folder: Path, publication: Publication) -> Iterator[Finding]:
    entries = dict(_entries(folder))
    for name in sorted(publication.files.keys() | entries.keys()):
        path, digest = entries.get(name), publication.files.get(name)
        if path is None:
            yield Finding(what=name, found="missing", is_signed=False)
        elif digest is None:  # check: verify-finds-additional-files
            yield _not_signed(name)
        elif not path.is_file() or digest_of_file(path) != digest:  # check: verify-compares-files
            yield Finding(what=name, found="changed since it was signed", is_signed=False)
        else:
            yield Finding(what=name, found="as signed", is_signed=True)


def _entries(folder: Path) -> Iterator[tuple[str, Path]]:
    """Everything in the folder and its subfolders by name, except the receipts, which nobody can sign."""
    count = 0
    for parent, folders, files in os.walk(folder):
        here = Path(parent)
        if here == folder:
            folders[:] = [name for name in folders if name not in NOT_READ]
            files = [name for name in files if name not in {*NOT_READ, RECEIPTS}]
        links = [name for name in folders if (here / name).is_symlink()]
        for name in (*files, *links):
            count += 1
            if count > MAX_ENTRIES:
                raise SettingsError(
                    f"{folder}: holds more than {MAX_ENTRIES} files", hint="name the folder of a published model"
                )
            yield (here / name).relative_to(folder).as_posix(), here / name


def _check_what_is_beside(out: Path) -> Iterator[Finding]:
    """What no run leaves beside its model, such as another model."""
    for name in sorted(each.name for each in islice(out.iterdir(), MAX_ENTRIES)):
        if name not in LEFT_BY_RUNS | NOT_READ:  # check: verify-looks-beside-the-model
            yield _not_signed(name)


def _not_signed(name: str) -> Finding:
    what = "code, never load it" if Path(name).suffix.lower() in CODE else "an additional file"
    return Finding(what=quoted(name), found=f"not signed: {what}", is_signed=False)


def _check_configuration(folder: Path, publication: Publication) -> Iterator[Finding]:
    """Which keys of the configuration were changed: its digest says only that some were."""
    name = ADAPTER_CONFIG if ADAPTER_CONFIG in publication.files else CONFIG
    if not (folder / name).is_file():
        return
    try:
        found = read_finite(folder / name)
    except AmalgramError as error:
        yield Finding(what=name, found=quoted(error.message), is_signed=False)
        return
    signed = publication.configuration
    for key in sorted(found.keys() | signed.keys()):
        if found.get(key) != signed.get(key):
            changed = f"{_value(found.get(key))}; signed was {_value(signed.get(key))}"
            yield Finding(what=f"{name}: {quoted(key)}", found=changed, is_signed=False)


# --- the report ---


def _check_report(out: Path, agreement: Agreement, receipts: PublishedReceipts) -> Iterator[Finding]:
    if not (out / "report.json").exists():
        return
    try:
        report = read_report(out)
    except SettingsError as error:
        yield Finding(what="report.json", found=quoted(error.message), is_signed=False)
        return
    differing = sorted(_differences(report, agreement, receipts))
    for what in differing:
        yield Finding(what=f"report.json: {quoted(what)}", found="not as signed", is_signed=False)
    if not differing:
        yield Finding(what="report.json", found="metrics, owners and digests as signed", is_signed=True)


def _differences(report: Report, agreement: Agreement, receipts: PublishedReceipts) -> Iterator[str]:
    """What the report says otherwise than was signed."""
    publication, evaluation = receipts.publication, report.evaluation
    for what, is_equal in {
        "owners": report.owners == publication.owners,
        "examples": report.examples == publication.examples,
        "method": report.method == agreement.method,
        "digests.agreement": report.digests.agreement == agreement.digest(),
        "digests.model": report.digests.model == receipts.model_digest,
    }.items():
        if not is_equal:
            yield what
    if not publication.test.keys() <= evaluation.mean.keys() <= publication.test.keys() | REFERENCES:
        yield "evaluation.mean"
    own = publication.test.get(OWN_AT_HOME)
    if evaluation.cut != (own and own.cut):
        yield "evaluation.cut"
    for model, signed in publication.test.items():
        mean = evaluation.mean.get(model)
        if mean is None or any(
            getattr(mean, each) != getattr(signed, each) for each in SIGNED
        ):  # check: verify-compares-metrics
            yield f"evaluation.mean.{model}"
        elif mean.groups != group_metrics(agreement.evaluation.groups, signed.groups):  # check: verify-compares-groups
            yield f"evaluation.mean.{model}.groups"
        shown = {owner: each[model] for owner, each in evaluation.by_owner.items() if model in each}
        if {
            owner: (each.accuracy, each.pearson_r, each.metric, each.predictions) for owner, each in shown.items()
        } != _by_owner(signed):
            yield f"evaluation.by_owner.{model}"
    tried = {trial.candidate: trial for trials in evaluation.sweep.values() for trial in trials}
    if {name: (each.accuracy, each.pearson_r, each.metric) for name, each in tried.items()} != {
        name: (each.accuracy, each.pearson_r, each.metric) for name, each in publication.validation.items()
    }:
        yield "evaluation.sweep"
    worst = {name: worst_accuracy(each.groups) for name, each in publication.validation.items() if each.groups}
    if {name: each.worst_group for name, each in tried.items() if each.worst_group is not None} != worst:
        yield "evaluation.sweep: worst_group"
    mixtures = {name: each.scales for name, each in tried.items() if each.scales is not None}
    if mixtures != publication.mixtures:  # check: verify-compares-mixtures
        yield "evaluation.sweep: scales"


def _by_owner(signed: SignedMean) -> dict[str, tuple[float | None, float | None, float, int]]:
    return {
        owner: (
            None if each.correct is None else each.correct / each.predictions,
            each.pearson_r,
            each.metric,
            each.predictions,
        )
        for owner, each in signed.by_owner.items()
        if each.predictions
    }


# --- an owner that lied in a sum ---

LIES = {
    "revealed": "it revealed a share that is not the one that it was dealt, and signed that",
    "opened": "it opened a share that is not the one that it committed to, and signed both",
    "disputed": "more owners than may lie signed that they cannot use the shares that it dealt them",
    "dealt": "the shares that it dealt and committed to are not of the secret that it committed to",
}


def explain_lie(path: Path) -> int:
    """Say who lied in a sum, from the file that a coordinator keeps of it. The exit code: 0 if the file proves it.

    Raises SettingsError or RemoteProtocolError if it does not.
    """
    agreement, owner, lie = evidence.read(path)
    if shows_json():
        answer({"owner": owner, "lie": lie, "fingerprint": fingerprint(bytes.fromhex(agreement.digest()))})
        return 0
    print(f"{owner} lied: {LIES[lie]}.")
    print("All signatures are valid under the keys of this agreement; compare the fingerprint with an owner:")
    print(f"  {quoted(agreement.title)}\n  {fingerprint(bytes.fromhex(agreement.digest()))}")
    if lie == "revealed":
        print("A dealer that colludes with the coordinator could make this up, because it can sign shares twice.")
    return 0


# --- showing ---


def _print(console: Console, verification: Verification, out: Path) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("what", overflow="fold")
    table.add_column("found", overflow="fold")
    for finding in verification.findings:
        table.add_row(escape(finding.what), escape(finding.found), style="" if finding.is_signed else "bold red")
    console.print(table)
    lines = [f"agreement    {quoted(verification.title)}", f"fingerprint  {verification.fingerprint}"]
    if verification.signed_by:
        lines.append(f"signed by    {', '.join(verification.signed_by)}")
    if verification.not_signed_by:
        lines.append(f"not signed   {', '.join(verification.not_signed_by)}")
    if verification.verified_by:
        lines.append(f"the merge    as verified by {', '.join(verification.verified_by)}")
    lines.append(f"compared     {verification.folder}")
    if verification.is_signed:
        lines.append(f"{verification.folder} is what they signed.")
    else:
        lines.append(f"{out} IS NOT WHAT WAS SIGNED.")
    if verification.folder != str(out) and (out / "report.html").exists():
        lines.append(f"{out / 'report.html'} is not signed: nobody compared what it shows.")
    lines += [
        "Compare the fingerprint with an owner: a folder cannot show by itself whose agreement it is.",
    ]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _value(value: JsonValue) -> str:
    return "missing" if value is None else quoted(str(value))
