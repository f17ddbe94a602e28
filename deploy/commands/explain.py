"""`amalgram verify OWNER.toml`: what an owner has kept of models and results that are not what the owners verified.

The record, the settings and the agreements beside them may come from anybody: it is read within bounds, nothing is
written, and no key is needed. A record is its owner's word, except for what others signed. So every sentence says whose
word it is, and none says that something was signed, or adds up, unless this program has just verified it.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from client.settings import OwnerSettings
from client.state import EVIDENCE, ReceivedRecord, ResultRecord
from client.verification import MAX_EVIDENCE_BYTES, Evidence
from common.agreement import Agreement, load_agreement
from common.certificates import check_delivery, check_result, deliveries_digest
from common.errors import AmalgramError, RemoteProtocolError, SettingsError, WrongModel, unreadable
from common.identity import fingerprint
from common.kept_check import KeptCheck, times_tolerance
from common.publication import SignedMean, read_publication
from common.settings_file import load_settings
from common.text import shown
from deploy.terminal import answer, quoted

MAX_LINES = 100  # of each list


def explain_evidence(owner_file: Path) -> int:
    """Say in words what an owner has kept under each agreement. The exit code: 0 if it has kept nothing.

    Raises SettingsError if the settings, or the folder of the records, cannot be read.
    """
    settings = load_settings(owner_file, OwnerSettings)
    home = owner_file.resolve().parent
    folder = home / settings.state / EVIDENCE
    paths, agreements = _records_in(folder), _agreements(home, settings)
    names = [shown(str(path)) for path in paths]  # check: record-names-are-one-line
    said = [explained(settings.name, path, agreements) for path in paths]
    text = "\n\n".join("\n".join([name, *lines]) for name, lines in zip(names, said, strict=True))
    has_state = folder.parent.is_dir()
    holds = f"holds nothing that {settings.name} found wrong" if has_state else "is in a state folder that is not there"
    nothing = f"no record: {shown(str(folder))} {holds}; nothing else was looked at"
    records = [{"path": name, "says": lines} for name, lines in zip(names, said, strict=True)]
    answer({"owner": settings.name, "records": records}, text, hint="" if paths else nothing)
    return WrongModel.exit_code if paths else 0


def _records_in(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == ".json")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise unreadable(folder, error) from None


def _agreements(home: Path, settings: OwnerSettings) -> dict[str, Agreement]:
    """The agreements in an owner's folder, by digest: a record may be of an earlier one than the settings name."""
    found = {}
    for path in (home / settings.agreement, *home.glob("*.toml")):  # check: records-of-all-agreements
        with suppress(AmalgramError):
            if path.is_file():
                agreement = load_agreement(path)
                found[agreement.digest()] = agreement
    return found


def explained(owner: str, path: Path, agreements: dict[str, Agreement]) -> list[str]:
    """The lines about one record, whether or not it can be read."""
    try:
        evidence = read_evidence(path)
        agreement = agreements.get(evidence.agreement_digest)
        if agreement is None:
            return [
                f"{owner} says that something was wrong under an agreement that is not in the folder of its settings.",
                "Put that agreement's file there, under any name that ends in .toml, and run the same command again.",
                f"Its digest is {evidence.agreement_digest}.",
            ]
        return [*in_words(owner, agreement, evidence)]
    except (ValueError, AmalgramError):
        return ["DAMAGED: it was changed after it was written, or another release wrote it."]


def read_evidence(path: Path) -> Evidence:
    """Raises SettingsError if the file cannot be read, is too large, is malformed, or has the name of another one.

    Only the beginning of one that is too large is read, which is malformed.
    """
    damaged = SettingsError(f"{path}: damaged")
    if not path.is_file():
        raise damaged
    try:
        with path.open("rb") as file:
            content = file.read(MAX_EVIDENCE_BYTES)  # check: kept-evidence-is-bounded
        evidence = Evidence.model_validate_json(content)
    except (OSError, ValidationError):
        raise damaged from None
    if path.stem != evidence.agreement_digest:
        raise damaged
    return evidence


# --- one record ---


def in_words(owner: str, agreement: Agreement, evidence: Evidence) -> Iterator[str]:
    """Who says what, and who signed it. Raises AmalgramError or ValueError for a record that cannot be meant so."""
    if evidence.result is None:
        yield f"{owner} says that the coordinator sent a model that is not the merge of what was contributed."
    else:
        yield f"{owner} says that the coordinator signed a result that is not what the owners verified."
    yield f"All below is {owner}'s own word, except where it says that others' signatures are valid. They were verified"
    yield "under the keys of this agreement; compare the fingerprint with another owner:"
    yield f"  {quoted(agreement.title)}"
    yield f"  {fingerprint(bytes.fromhex(agreement.digest()))}"
    yield f"{owner} says that this is wrong, in run {evidence.run[:16]}...:"
    yield from _some_of([f"  {quoted(each)}" for each in evidence.wrong])
    yield from _what_was_sent(owner, agreement, evidence)
    yield from _what_it_should_be(owner, agreement, evidence)
    if evidence.result is not None:
        yield from _about_the_result(owner, agreement, evidence, evidence.result)
    if evidence.signatures or evidence.keys or evidence.uploads:
        yield from _about_the_check(owner, agreement, evidence)
    else:
        yield "No other owner signed anything in this record."


def _some_of(lines: Sequence[str]) -> Iterator[str]:
    yield from lines[:MAX_LINES]
    if len(lines) > MAX_LINES:
        yield f"  and {len(lines) - MAX_LINES} more"


def _what_was_sent(owner: str, agreement: Agreement, evidence: Evidence) -> Iterator[str]:
    """What the coordinator sent until then, as far as it signed that."""
    unsigned = [each for each in evidence.delivered if not _is_signed(agreement, evidence.run, each)]
    if not evidence.delivered:  # check: nothing-is-not-signed
        yield "The coordinator did NOT sign that it sent anything: the record names nothing that it sent."
    elif unsigned:
        yield f"{owner} says that the coordinator sent these; NOT all of its signatures are valid:"
    else:
        yield "The coordinator signed each of these, which it sent; its signatures are valid:"
    yield from _some_of([_in_a_line(owner, evidence, each, each in unsigned) for each in evidence.delivered])
    missing = sorted({*evidence.false} - {each.position for each in evidence.delivered})
    if missing:
        yield f"Of what {owner} calls wrong, the record does NOT hold event {missing[0]}."


def _in_a_line(owner: str, evidence: Evidence, sent: ReceivedRecord, is_unsigned: bool) -> str:
    unsigned = "  NOT SIGNED" if is_unsigned else ""
    wrong = f"  WRONG, says {owner}" if sent.position in evidence.false else ""
    return f"  event {sent.position}: SHA-256 {sent.digest}  {quoted(sent.model)}{wrong}{unsigned}"


def _is_signed(agreement: Agreement, run: str, sent: ReceivedRecord) -> bool:
    """Whether the coordinator signed that it sent this."""
    try:
        check_delivery(agreement, run, sent.delivered, bytes.fromhex(sent.signature))  # check: evidence-is-signed
    except RemoteProtocolError:
        return False
    return True


def _what_it_should_be(owner: str, agreement: Agreement, evidence: Evidence) -> Iterator[str]:
    """What a delivery that is wrong should have been, and who else knows it."""
    if not evidence.false or evidence.signatures:
        return
    if not evidence.expected:
        yield f"That it is wrong is {owner}'s own word: the record does not hold what was sent. Compare all records."
        return
    last = evidence.false[-1]
    yield f"{owner} says that event {last} should have been SHA-256 {evidence.expected}:"
    before = [
        each.position
        for each in evidence.delivered
        if (each.digest == evidence.expected and each.position < last)
        and _is_signed(agreement, evidence.run, each)  # check: what-was-expected-was-signed
    ]
    if before:
        yield f"  the coordinator signed that it sent that as event {before[0]}."
        yield f"  That it should have sent it again is {owner}'s own word. Compare all records."
    else:
        yield f"  {owner} says that it computed that from the agreement and the totals. Nobody else signed it."


def _about_the_result(owner: str, agreement: Agreement, evidence: Evidence, result: ResultRecord) -> Iterator[str]:
    """What the coordinator signed in the end, beside what this owner added up."""
    yield f"The result names {quoted(result.model)}, SHA-256 {result.model_digest}."
    signed = result.in_run(evidence.run)
    try:
        check_result(agreement, signed)  # check: evidence-of-a-result-is-signed
        yield "The coordinator's signature under it is valid."
    except RemoteProtocolError:
        yield "The coordinator's signature under it is NOT valid."
    publication = read_publication(signed.publication)
    lines = []
    for total in evidence.totals:
        published = (publication.validation if total.split == "validation" else publication.test).get(total.model)
        own = SignedMean.model_validate_json(total.metrics)
        if published != own:
            shown = "nothing" if published is None else _metrics(published)
            added = f"{owner} says that it added up {_metrics(own)}"
            lines.append(f"  {total.split}, {quoted(total.model)}: it says {shown}; {added}")
    yield from _some_of(lines)
    yield f"What {owner} tested and added up is its own word: the record does not hold it. Compare all records."


def _metrics(mean: SignedMean) -> str:
    accuracy = "" if mean.accuracy is None else f"accuracy {mean.accuracy:.4f}, "
    return f"{accuracy}metric {mean.metric:.6g}, {mean.predictions} predictions"


def _about_the_check(owner: str, agreement: Agreement, evidence: Evidence) -> Iterator[str]:
    """Who signed shares, and what they add up to."""
    try:
        owners, numbers = _kept_check(agreement, evidence).added_up()  # check: evidence-of-a-check-is-signed
    except RemoteProtocolError as error:
        yield f"{owner} says that the owners' shares of a check did not add up to zero. What the record holds of these"
        yield f"shares is NOT what owners signed: {quoted(error.message)}."
        return
    yield f"Those who checked it: {', '.join(owners)}. Each signed its masked share, together with all keys and with"
    yield "all that was sent before; these signatures are valid, and this program added the shares up."
    times = times_tolerance(numbers)
    if not times > 1:  # check: evidence-of-a-check-adds-up
        yield f"The sum does NOT show that anything is wrong: no share need be more than {times:.3g} of the most that"
        yield f"rounding can be in any model. That it is more than it can be in this one is {owner}'s own word."
        return
    yield f"The sum is NOT zero: some share is at least {times:.3g} times as large as any rounding can be."
    yield "An owner that signs a false share has the same effect. It could be any of those who checked it, and"
    yield f"{owner} could have done so afterwards. The sum hides who did. Compare the records of all owners."
    yield f"Which of the models and equations the check was about is {owner}'s own word."


def _kept_check(agreement: Agreement, evidence: Evidence) -> KeptCheck:
    if evidence.position is None:
        raise RemoteProtocolError("the record does not say which check this was")
    return KeptCheck(
        run=evidence.run,
        position=evidence.position,
        delivered=deliveries_digest([each.delivered for each in evidence.delivered], evidence.position),
        roster=agreement.roster,
        needed_owners=agreement.needed_owners,
        keys=bytes.fromhex(evidence.keys),
        uploads=bytes.fromhex(evidence.uploads),
        signatures=bytes.fromhex(evidence.signatures),
    )
