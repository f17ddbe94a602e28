"""What an owner consents to, in plain words, for whoever says yes or no: what leaves, who sees it, what it reveals."""

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import typer
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from client.owner import Owner
from client.repeats import Repeat, check_repeats, terms_of, what_the_difference_shows
from client.state import Consent
from common.agreement import Agreement
from common.errors import ConsentError, SettingsError
from common.identity import fingerprint
from common.merge_methods import METHODS
from common.metrics import metrics_layout
from common.models.delta import delta_layout
from common.schedule import Content, Round
from deploy.launch.flower import bundle_digest
from deploy.terminal import answer, shows_json


def consent_text(owner: Owner, repeats: Sequence[Repeat] = ()) -> str:
    """Everything to know before saying yes. `repeats`: the agreements under which the same was contributed before."""
    agreement, plan = owner.agreement, owner.workbench.plan
    rounds = [each for each in owner.schedule.rounds if each.kind != "metrics"]
    candidates = [model for name in agreement.methods for model in agreement.agreed(METHODS[name])]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("consent.txt.jinja").render(
        agreement=agreement,
        owner=owner.name,
        base=owner.settings.base or agreement.base,
        base_origin=owner.workbench.base_origin,
        same_bundle=bundle_digest() == agreement.bundle_digest,
        metric=agreement.task.metric.replace("_", " "),
        fingerprint=fingerprint(bytes.fromhex(agreement.digest())),
        rounds=[{"title": each.title, "numbers": each.layout.size} for each in rounds],
        numbers=sum(each.layout.size for each in rounds),
        vector_bytes=_bytes(sum(each.layout.num_bytes for each in rounds)),
        multi_round=[method.title for method in agreement.multi_round_methods],
        contents=_contents(rounds),
        candidates=len(candidates),
        metrics_bytes=_bytes(metrics_layout(agreement, "test", ["base", "own_at_home", *candidates]).num_bytes),
        model_bytes=_bytes(delta_layout(plan).size * 4),
        disclosures=_disclosures(agreement),
        repeats=[
            {"what": each.what, "terms": each.terms, "digest": each.agreement_digest, "shows": _shows(each, agreement)}
            for each in repeats
        ],
    )


def _shows(repeat: Repeat, agreement: Agreement) -> list[str]:
    return list(what_the_difference_shows(repeat.terms, terms_of(agreement), repeat))


def _contents(rounds: list[Round]) -> list[Content]:
    """What is in all rounds together, by kind of tensor."""
    found: dict[str, Content] = {}
    for content in (content for each in rounds for content in each.contents("your")):
        before = found.get(content.kind)
        numbers = content.numbers + (before.numbers if before else 0)
        tensors = (*(before.tensors if before else ()), *content.tensors)
        found[content.kind] = Content(kind=content.kind, meaning=content.meaning, numbers=numbers, tensors=tensors)
    return [found[kind] for kind in sorted(found)]


def _disclosures(agreement: Agreement) -> list[str]:
    """What the agreed methods' totals show, in the words of each method, each sentence once."""
    texts = (text for name in agreement.methods for text in METHODS[name].disclosures(agreement.tables))
    return list(dict.fromkeys(text.format(their="your") for text in texts))


def give_consent(owner: Owner, repeats: Sequence[Repeat] = ()) -> None:
    """Write down that this owner agreed to its agreement's digest, and to repeat what `repeats` name."""
    owner.ledger.create()
    when = datetime.now(UTC).isoformat(timespec="seconds")
    consent = Consent(when=when, again=tuple(each.agreement_digest for each in repeats))
    owner.state.write_consent(owner.agreement.digest(), consent)


def _bytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 100_000 else f"{count:,} bytes"


def ask_for_consent(owner_file: Path, yes: bool, again: bool) -> None:
    """Show the consent text, ask unless `yes`, and write the consent down. Raises ConsentError for any other answer,
    and, unless `again`, if most of the same was contributed before.
    """
    owner = Owner(owner_file)
    owner.check()
    repeats = owner.ledger.repeats(owner.contributed(may_train=False))
    text = consent_text(owner, repeats)
    print(text, file=sys.stderr if shows_json() else sys.stdout, flush=True)  # people read it before they answer
    allowed = {each.agreement_digest for each in repeats} if again else frozenset[str]()
    check_repeats(terms_of(owner.agreement), repeats, allowed)
    if not yes:
        if not sys.stdin.isatty():
            raise SettingsError(
                "consent is asked for at a terminal, and this is not one",
                hint="in a script, --yes gives consent",
            )
        if not typer.confirm(f"Does {owner.name} consent?", err=shows_json()):
            raise ConsentError("no consent was given, so nothing will leave this machine")
    give_consent(owner, repeats)
    stored = owner.state.folder / "consent.json"
    found = {"owner": owner.name, "digest": owner.agreement.digest(), "read": text, "stored": str(stored)}
    answer(found, hint=f"consent stored in {stored}")
