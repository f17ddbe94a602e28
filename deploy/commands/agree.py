"""What an owner consents to, in plain words, for whoever says yes or no: what leaves, who sees it, what it reveals."""

import logging
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from math import ceil
from pathlib import Path

import typer
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from client.owner import Owner
from client.repeats import LEAST_SHARE, Repeat, check_repeats, terms_of, what_the_difference_shows
from client.state import Consent
from common.agreement import WORST_GROUP, Agreement
from common.errors import ConsentError, SettingsError
from common.identity import fingerprint
from common.merge_methods import METHODS
from common.merge_methods.distill import DISTILL
from common.merge_methods.search import SEARCH
from common.metrics import metrics_layout
from common.privacy.budget import most_right_guesses, together
from common.privacy.legs import SENSITIVE, Leg, legs_of
from common.schedule import Content, Round, method_layout
from common.text import MAX_NAMES, shown, some_of
from deploy.launch.flower import bundle_digest
from deploy.terminal import answer, byte_count, shows_json
from server.report.words import METRICS

MAX_COLUMNS, MIN_COLUMNS = 100, 40  # of a terminal, for words that are not ours
SHOWN_CHARACTERS = 1000  # of a row of the pool
QUOTE = "  | "
DIGITS_TO_TYPE = 5
log = logging.getLogger("amalgram.agree")


def consent_text(owner: Owner, repeats: Sequence[Repeat] = ()) -> str:
    """Everything to know before saying yes. `repeats`: the agreements under which the same was contributed before."""
    agreement = owner.agreement
    rounds = [each for each in owner.schedule.rounds if each.kind not in ("check", "metrics")]
    checks = [each.layout for each in owner.schedule.rounds if each.kind == "check"]
    candidates = [model for name in agreement.methods for model in agreement.agreed(METHODS[name])]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["some_of"] = some_of
    same_bundle = bundle_digest() == agreement.bundle_digest
    return environment.get_template("consent.txt.jinja").render(
        agreement=agreement,
        owner=owner.name,
        many=MAX_NAMES,
        agreement_file=owner.home / owner.settings.agreement,
        title=quoted(agreement.title),
        base=quoted(owner.settings.base or agreement.base),
        is_agreed_revision=agreement.base_revision and owner.settings.base in (None, agreement.base),
        base_origin=owner.workbench.base_origin,
        same_bundle=same_bundle,
        metrics=[METRICS[metric] for metric in agreement.task.metrics],
        choose_by=METRICS[agreement.choose_by],
        fingerprint=_fingerprint(agreement),
        warnings=list(_warnings(owner, same_bundle, repeats)),
        rounds=[{"title": each.title, "numbers": each.layout.size} for each in rounds],
        numbers=sum(each.layout.size for each in rounds),
        vector_bytes=byte_count(sum(each.layout.num_bytes for each in rounds)),
        check_numbers=sum(layout.size for layout in checks),
        check_bytes=byte_count(sum(layout.num_bytes for layout in checks)),
        multi_round=[method.title for method in agreement.multi_round_methods],
        contents=_contents(rounds),
        candidates=len(candidates),
        search=SEARCH.of(agreement.tables) if agreement.searches else None,
        metrics_bytes=byte_count(metrics_layout(agreement, "test", ["base", "own_at_home", *candidates]).num_bytes),
        model_bytes=byte_count(
            4 * max(method_layout(METHODS[name], owner.workbench.merge_settings).size for name in agreement.methods)
        ),
        disclosures=_disclosures(agreement),
        measures_grams=owner.schedule.has_grams,
        needs_rows=owner.schedule.has_grams or any(METHODS[name].fits_classifier for name in agreement.methods),
        without_grams=agreement.tensors.data_free_in_short if owner.schedule.has_grams else "",
        pool=_pool(owner),
        groups=_groups(owner),
        bounded=_bounded(owner, repeats),
        repeats=[
            {
                "what": each.what,
                "title": quoted(each.terms.title),
                "fingerprint": each.fingerprint_start,
                "shows": list(what_the_difference_shows(each.terms, terms_of(agreement), each)),
            }
            for each in repeats
        ],
    )


def _pool(owner: Owner) -> dict[str, object] | None:
    """What the consent text says of the pool, and of who gives what; None if nothing is predicted."""
    agreement, table = owner.agreement, DISTILL.of(owner.agreement.tables)
    if DISTILL.name not in agreement.methods:
        return None
    look, labels, task = owner.workbench.pool_look, agreement.task.labels, agreement.task
    unknown, sheet = agreement.unknown_labels, owner.workbench.write_pool_sheet()
    outputs, kind_of_output = table.outputs(len(labels)), "target" if task.is_regression else "label"
    of_images = task.kind == "image-classification"
    return {
        "look": look,
        "file": table.pool,
        "sha256": table.pool_sha256,
        "asked": _asked(agreement),
        "outputs": f"{outputs:,} tokens of the vocabulary"
        if table.vocabulary
        else f"{outputs} {kind_of_output}{'s' if outputs > 1 else ''}",
        "numbers": table.numbers(len(labels)),
        "nearest_by": "by their shades of grey" if of_images else "by the share of words in common",
        "nothing_near": "None of them resembles an image of yours."
        if of_images
        else "None of them has a word in common with a row of yours.",
        "differ_in": "look the same" if of_images else "differ from one another in one word at most",
        "of_yours": "LOOK LIKE IMAGES OF YOURS" if of_images else "SAY WHAT ROWS OF YOURS SAY",
        "varied": quoted(_in_short(look.varied)),
        "of_images": of_images,
        "sheet": sheet,
        "start": table.start,
        "sums_weights": agreement.sums_weights,
        "with_weights": [name for name in agreement.owner_names if name not in agreement.without_weights],
        "without_weights": [name for name in agreement.owner_names if name in agreement.without_weights],
        "knowing": {
            label: len(agreement.owners) - sum(number in each for each in unknown.values())
            for number, label in enumerate(labels)
        }
        if unknown
        else {},
        "drawn": [quoted(_in_short(text)) for text in look.drawn],
        "nearest": [(overlap, quoted(_in_short(text))) for text, overlap in look.nearest if overlap > 0],
    }


def _in_short(text: str) -> str:
    """The beginning of a long row of the pool: twenty whole ones could push everything else off the screen."""
    more = len(text) - SHOWN_CHARACTERS
    if more > 0:  # check: long-rows-push-nothing-away
        text = f"{text[:SHOWN_CHARACTERS]} ... ({more:,} more characters)"
    return text


def _asked(agreement: Agreement) -> str:
    """What a model predicts of the pool, in words."""
    table, task = DISTILL.of(agreement.tables), agreement.task
    rows = f"{table.rows:,} public {'images' if task.kind == 'image-classification' else 'rows'}"
    if task.kind == "token-classification":
        return f"the {table.asked:,} words of {rows}"
    return rows if task.has_labels else f"{table.asked:,} next tokens in {rows}"


def _groups(owner: Owner) -> dict[str, object] | None:
    """What the consent text says of groups of rows; None if none are agreed on."""
    evaluation, column = owner.agreement.evaluation, owner.settings.data.group
    if not evaluation.groups:
        return None
    counts = owner.workbench.reported_rows()
    return {
        "names": [quoted(group) for group in evaluation.groups],
        "column": column and shown(column),
        "least": evaluation.least_group_rows,
        "rows": [(quoted(group), *rows) for group, rows in counts.items() if any(rows)],
        "kept": [quoted(group) for group, rows in counts.items() if not all(rows)],
        "judge": owner.agreement.choose_by == WORST_GROUP,
    }


def _bounded(owner: Owner, repeats: Sequence[Repeat]) -> dict[str, object] | None:
    """What the consent text says of differential privacy; None if it was not agreed on."""
    agreement, privacy = owner.agreement, owner.agreement.privacy
    if privacy.epsilon is None:
        return None
    before = [each.terms for each in repeats if each.rows >= LEAST_SHARE]
    # What bounds a row says nothing of all rows of a person.
    bounded = [
        (each.epsilon, each.delta) for each in before if each.epsilon is not None and privacy.unit in ("row", each.unit)
    ]
    epsilon, delta = together([(privacy.epsilon, privacy.delta), *bounded])
    is_row = privacy.unit == "row"
    return {
        "unit": "row" if is_row else "person",
        "unit_of_rows": "a row of yours"
        if is_row
        else "a person, with all rows that have one value in your column data.unit,",
        "is_declared": owner.settings.fine_tuned is not None,
        "guesses": f"{ceil(1e4 * most_right_guesses(privacy.epsilon, privacy.delta)) / 100:g} %",
        "epsilon": f"{privacy.epsilon:>10g}",
        "delta": f"{privacy.delta:>10g}",
        "before": bool(bounded),
        "spent_epsilon": f"{epsilon:>10g}",
        "spent_delta": f"{delta:>10g}",
        "has_unbounded_before": len(bounded) < len(before),
        "legs": [_leg_in_words(leg) for leg in legs_of(agreement)],
        "has_refit": "refit" in agreement.budget_shares,
        "has_grams": "grams" in agreement.budget_shares,
        "is_plain": agreement.summation.kind == "plain",
        "noise_shares": agreement.noise_shares,
    }


def _leg_in_words(leg: Leg) -> str:
    """A line of the table of what the budget is spent on."""
    start = f"{leg.name:<10} {leg.share:>5.0%}"
    if leg.epsilon is None:
        return f"{start}  {'the rest':>13}  {'by your own steps':>19}  {SENSITIVE[leg.name]}"
    return f"{start}  {leg.epsilon:>13.2f}  {leg.sensitivity:>8.3g}  {leg.sigma:>9.3g}  {SENSITIVE[leg.name]}"


def quoted(text: str) -> str:
    """Another party's words behind a mark on every line, so that none of them looks like a line of ours.

    A terminal must not break these lines itself: what it moved to the next line would begin there without a mark. So
    they are half as long as it is wide, because a character takes up to two columns.
    """
    columns = min(max(shutil.get_terminal_size((MAX_COLUMNS, 24)).columns, MIN_COLUMNS), MAX_COLUMNS)
    lines = textwrap.wrap(shown(text), (columns - len(QUOTE)) // 2, break_on_hyphens=False)
    return "\n".join(f"{QUOTE}{line}" for line in lines)  # check: other-words-are-quoted


def _warnings(owner: Owner, same_bundle: bool, repeats: Sequence[Repeat]) -> Iterator[str]:
    """One line for each warning of the text above the fingerprint, where nothing that is long can push it away."""
    agreement = owner.agreement
    if agreement.summation.kind == "plain":
        yield "THE SUM IS PLAIN: THE COORDINATOR SEES YOUR VECTOR, NUMBER BY NUMBER."
    if not same_bundle:
        yield "THE CODE THAT WOULD RUN IS NOT THE CODE THAT IS INSTALLED HERE."
    if owner.workbench.base_origin == "folder of the drafter":
        yield "YOUR COPY OF THE BASE MODEL IS THE FOLDER THAT THE AGREEMENT NAMES: ITS DRAFTER CHOSE THE FILES."
    if agreement.summation.kind == "masked" and not agreement.is_verified:
        yield "VERIFICATION IS OFF: THE COORDINATOR CAN SEND ANY MODEL, AND YOUR PROGRAM MEASURES YOUR ROWS ON IT."
    for name in agreement.methods:
        if METHODS[name].trust == "coordinator":
            yield f"NO OWNER CAN VERIFY WHAT {METHODS[name].title.upper()} MERGES: IT RESTS ON THE COORDINATOR."
    if agreement.multi_round_methods and not agreement.is_verified:
        yield "BETWEEN TWO ROUNDS, A MALICIOUS COORDINATOR CAN MAKE THE NEXT TOTAL YOURS ALONE."
    if DISTILL.name in agreement.methods:
        look, of_images = owner.workbench.pool_look, agreement.task.kind == "image-classification"
        if look.own_rows:
            are = "IMAGES OF THE POOL LOOK LIKE YOURS" if of_images else "ROWS OF THE POOL ARE YOURS"
            yield f"{look.own_rows:,} {are}: WHAT YOUR MODEL SAYS OF ROWS THAT IT KNOWS IS SUMMED."
        if look.near_own_rows > look.own_rows:
            yield (
                f"{look.near_own_rows:,} ROWS OF THE POOL DIFFER FROM ROWS OF YOURS IN ONE WORD AT MOST: SUCH ROWS "
                "ASK WHETHER YOUR MODEL KNOWS YOURS."
            )
    if any(map(any, owner.workbench.reported_rows().values())):
        yield "IN A GROUP THAT NO OTHER OWNER HAS, EVERYBODY SEES HOW MODELS DO ON YOUR ROWS, AND HOW MANY YOU HAVE."
    if agreement.privacy.merge_routed_inputs:
        yield "GRAM MATRICES OF EXPERTS LEAVE, HOWEVER FEW ROWS REACHED THEM."
    if agreement.privacy.merge_token_inputs:
        yield "THE TOTALS SHOW HOW OFTEN EACH TOKEN OCCURS."
    if agreement.summation.has_scales:
        yield "ALL OWNERS SEE THE SCALES OF A 32-BIT SUM."
    for repeat in repeats:
        yield f"YOU HAVE CONTRIBUTED {repeat.what.upper()} BEFORE. SUBTRACTING THE TOTALS CAN SHOW THEM."


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
    return list(dict.fromkeys(text.format(their="your") for text in agreement.disclosures()))


def give_consent(owner: Owner, repeats: Sequence[Repeat] = ()) -> None:
    """Write down that this owner agreed to its agreement's digest, and to repeat what `repeats` name."""
    when = datetime.now(UTC).isoformat(timespec="seconds")
    consent = Consent(when=when, again=tuple(each.agreement_digest for each in repeats))
    # A client of the same identity may be writing its first page.
    with owner.ledger_locked():  # check: consent-waits-for-the-ledger
        owner.ledger.create()
        owner.state.write_consent(owner.agreement.digest(), consent)


def _fingerprint(agreement: Agreement) -> str:
    return fingerprint(bytes.fromhex(agreement.digest()))


def ask_for_consent(owner_file: Path, yes: str | None, again: bool) -> None:
    """Show the consent text, ask for the fingerprint's first digits, and write the consent down.

    `yes`: the whole fingerprint, from whoever read the agreement before; then nothing is asked. Raises ConsentError for
    other digits and, unless `again`, if the same was contributed before.
    """
    owner = Owner(owner_file)
    log.info("looking at the model and the rows, and at what would leave; this takes a while")
    owner.check()
    for oddity in owner.workbench.oddities():
        log.warning("%s", oddity)
    repeats = owner.ledger.repeats(owner.contributed(may_train=False))
    text = consent_text(owner, repeats)
    print(text, file=sys.stderr if shows_json() else sys.stdout, flush=True)  # people read it before they answer
    allowed = {each.agreement_digest for each in repeats} if again else frozenset[str]()
    check_repeats(terms_of(owner.agreement), repeats, allowed)
    _check_answer(owner, yes)
    give_consent(owner, repeats)
    stored = owner.state.folder / "consent.json"
    found = {"owner": owner.name, "digest": owner.agreement.digest(), "read": text, "stored": str(stored)}
    answer(found, hint=f"consent stored in {stored}")


def _check_answer(owner: Owner, yes: str | None) -> None:
    """Raise ConsentError unless whoever answers has this agreement's fingerprint in hand."""
    digits = _fingerprint(owner.agreement).replace(" ", "")
    if yes is not None:
        if "".join(yes.split()) != digits:  # check: consent-names-the-fingerprint
            raise ConsentError(
                "--yes names another fingerprint than this agreement's, so nothing will leave this machine",
                hint='read the agreement (amalgram agree OWNER.toml), then give all 40 digits: --yes "12345 67890 ..."',
            )
        return
    if not sys.stdin.isatty():
        raise SettingsError(
            "consent is asked for at a terminal, and this is not one",
            hint="in a script, --yes FINGERPRINT gives consent to the agreement with this fingerprint",
        )
    question = f"If {owner.name} consents, type the first {DIGITS_TO_TYPE} digits of the fingerprint; otherwise, Enter"
    typed = typer.prompt(question, default="", show_default=False, err=shows_json())
    if typed.strip() != digits[:DIGITS_TO_TYPE]:  # check: consent-names-the-digits
        raise ConsentError(
            "no consent was given, so nothing will leave this machine",
            hint=f"to consent, type the first {DIGITS_TO_TYPE} digits of the fingerprint that the other owners have",
        )
