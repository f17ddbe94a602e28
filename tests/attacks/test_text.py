"""Attacks 100 to 103: text that another party wrote, against whoever reads it.

Whoever drafts an agreement chooses its title, its labels and its owners' names. A base model brings labels and a
licence, a server the text of its errors. None of it may forge a line of ours, hide one, or look like something else.
"""

import html
import io
import json
import logging
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.cells import cell_len, chop_cells
from rich.console import Console

from client.owner import Owner
from client.state import OwnerState
from common.agreement import Agreement, AgreementDraft, OwnerEntry, Task
from common.errors import AmalgramError, ConsentError, LocalProtocolError, SettingsError
from common.identity import fingerprint
from common.logs import JsonLines, TextLines
from common.messages import _CHECKS, CandidatePart
from common.settings_file import parse_settings, write_settings
from common.text import flaw, is_web_address, shown
from deploy.cli import cli
from deploy.commands.agree import QUOTE, _check_answer, ask_for_consent, consent_text, quoted
from deploy.commands.client import _watch
from deploy.commands.errors import run_command
from deploy.commands.keys import make_keys
from deploy.commands.table import print_report
from deploy.complete import complete_agreement
from deploy.launch.internals import TOLD, tell
from deploy.launch.processes import FollowedFile, NewFiles
from deploy.terminal import as_lines, set_up_output
from server.report.card import CARD, _markdown, write_model_card
from server.report.page import page_of
from server.report.report import Report
from tests.support.errors import refused
from tests.support.hostile import FORGED, HIDDEN, MARKUP, TAG, any_text, put, strings_in
from tests.support.parties import IDENTITIES, Parties
from tests.support.reports import as_report, hand_written

LITERALS = {"plain", "shown", "summed", "text-classification", "shared", "rows", "macro_f1", "own"}
LITERALS |= {"contribution", "metrics", "test", "candidate", "base", "own_at_home", "amalgram"}
LITERALS |= {"single_label_classification", "float32", "row"}


# --- 100: what arrives ---


@pytest.mark.parametrize("hidden", [*HIDDEN, "", "  padded", "two  spaces", 3000 * "x", "e\u0301", "\u0301"], ids=ascii)
def test_100_text_that_does_not_show_as_it_is_is_no_line(hidden: str) -> None:
    assert flaw(hidden, 200).startswith("must ")
    assert not hidden.strip() or flaw(f"a {hidden}", 200)


@pytest.mark.parametrize(
    "honest", ["Reviews of three shops", "Prüfung: Größe 3 €", "הבדיקה", "ก็ดีนะ", "审查", "Tiếng Việt"]
)
def test_100_people_write_in_their_own_scripts(honest: str) -> None:
    assert flaw(honest, 200) == ""
    assert shown(honest) == honest


def test_100_no_string_of_an_agreement_hides_anything(agreement: Agreement) -> None:
    content = agreement.model_dump(mode="json")
    assert parse_settings(content, Agreement, "agreement.toml") == agreement
    for number, (place, text) in enumerate(strings_in(content)):
        for hidden in HIDDEN if place == ("title",) else [HIDDEN[number % len(HIDDEN)]]:
            changed = deepcopy(content)
            put(changed, place, text + hidden)
            with pytest.raises(SettingsError) as caught:
                parse_settings(changed, Agreement, "agreement.toml")
            assert any(words in caught.value.message for words in ("must ", "unknown method", "surrogate")), place


def test_100_no_string_of_a_report_hides_anything() -> None:
    content = hand_written()
    content["agreement"]["hyperparameters"]["refit"] = {"body": "data_free", "table": [{"key": "value"}]}
    content["methods"]["regmean"]["paper"] = "Jin et al. (2023)"
    as_report(content)
    for number, (place, text) in enumerate(strings_in(content)):
        changed = deepcopy(content)
        put(changed, place, text + HIDDEN[number % len(HIDDEN)])
        with pytest.raises(ValueError, match=r"must|Input should be|[Ii]nvalid|Input tag|hex escape|lacks"):
            as_report(changed)
    for name in ("dropped_out", "versions", "chosen"):
        with pytest.raises(ValueError, match="must not hold"):
            as_report(content | {name: content[name] | {"a\u202eb": next(iter(content[name].values()))}})


def test_100_no_string_of_a_message_hides_anything() -> None:
    for name, check in _CHECKS.items():
        assert not [hidden for hidden in HIDDEN if check(f"regmean{hidden}") or check(hidden)], name
    fields: dict[str, Any] = {"run": "a" * 64, "agreement_digest": "b" * 64, "position": 0, "part": 0, "parts": 1}
    fields |= {"payload": np.zeros(1, np.float32), "signature": bytes(64)}
    with pytest.raises(LocalProtocolError, match="model is malformed"):
        CandidatePart(**fields, model="regmean\u202e")


# --- 101: the consent screen ---


def with_title(parties: Parties, title: str) -> Owner:
    """The owner hotel, with an agreement whose drafter chose this title."""
    write_settings(parties.folder / "agreement.toml", parties.agreement.model_copy(update={"title": title}))
    return Owner(parties.files["hotel"])


def test_101_a_title_with_a_line_break_and_an_escape_is_refused_before_anything_is_shown(parties: Parties) -> None:
    with pytest.raises(SettingsError, match=r"title = .*: must not hold U\+001B"):
        consent_text(with_title(parties, FORGED))


@given(any_text, st.integers(40, 140))
def test_101_another_party_s_words_never_begin_a_line_of_the_screen(text: str, columns: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        lines = quoted(text).split("\n")
    assert all(line.startswith(QUOTE) and shown(line) == line for line in lines if line)
    assert all(cell_len(line) <= columns for line in lines)


def test_101_the_true_fingerprint_is_last_and_a_false_one_never_begins_a_line(
    parties: Parties, monkeypatch: pytest.MonkeyPatch
) -> None:
    forged = "Fingerprint: 11111 22222 33333 44444 55555 66666 77777 88888 Nobody. BEFORE YOU SAY YES"
    plain = parties.agreement.summation.model_copy(update={"kind": "plain"})
    drafted = parties.agreement.model_copy(update={"title": f"A {forged} {forged}", "summation": plain})
    write_settings(parties.folder / "agreement.toml", drafted)
    monkeypatch.setenv("COLUMNS", "80")
    text = consent_text(Owner(parties.files["hotel"]))
    seen = [part for line in text.splitlines() for part in (chop_cells(line, 80) or [""])]  # as a terminal breaks lines
    begins = [line for line in seen if re.match(r"\s*(Fingerprint|\d{5} \d{5})", line)]
    assert begins == [f"Fingerprint:  {fingerprint(bytes.fromhex(drafted.digest()))}"] == [seen[-1]]
    (before,) = [index for index, line in enumerate(seen) if line == "BEFORE YOU SAY YES"]
    assert "! THE SUM IS PLAIN: THE COORDINATOR SEES YOUR VECTOR, NUMBER BY NUMBER." in seen[before:]
    assert len(seen) - before < 24  # what a small terminal shows at once


class Terminal(io.StringIO):
    """Somebody who types this."""

    def isatty(self) -> bool:
        return True


def test_101_consent_needs_the_true_fingerprint_s_digits(
    parties: Parties, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = fingerprint(bytes.fromhex(parties.agreement.digest()))
    file, consents = parties.files["hotel"], parties.folder / "state" / "hotel" / "consent.json"
    owner = Owner(file)
    consents.unlink()
    for typed in ("y", "yes", "", "11111", digits[6:11], digits[:4]):
        monkeypatch.setattr(sys, "stdin", Terminal(f"{typed}\n"))
        with pytest.raises(ConsentError, match="no consent was given"):
            _check_answer(owner, None)
    for given_digits in (digits[:5], "1" * 40, f"{digits} 1", ""):
        with pytest.raises(ConsentError, match="another fingerprint"):
            _check_answer(owner, given_digits)
    with pytest.raises(ConsentError, match="another fingerprint"):
        ask_for_consent(file, "1" * 40, again=False)
    assert not consents.exists()
    monkeypatch.setattr(sys, "stdin", Terminal(f"{digits[:5]}\n"))
    ask_for_consent(file, None, again=False)
    assert list(Owner(file).state.consents()) == [parties.agreement.digest()]
    consents.unlink()
    cli(["agree", str(file), "--yes", digits], standalone_mode=False)
    assert consents.exists()
    assert capsys.readouterr().out.count(f"Fingerprint:  {digits}\n") == 3


# --- 102: what is shown ---


@given(any_text)
def test_102_what_is_shown_is_one_line_that_moves_nothing(text: str) -> None:
    seen = shown(text)
    assert seen.replace("\u00a0", " ").isprintable()
    seen.encode()  # raises for half a surrogate pair
    assert shown(seen) == seen
    assert "\n" not in as_lines({"name": text})


@given(any_text)
def test_102_a_log_line_is_one_line(text: str) -> None:
    record = logging.LogRecord("amalgram.client", logging.WARNING, "", 0, "%s; trying again", (text,), None)
    assert TextLines("%(message)s").format(record) == shown(f"{text}; trying again")
    line = JsonLines().format(record)
    assert line.isascii()
    assert json.loads(line)["message"] == f"{text}; trying again"


def test_102_a_server_s_error_text_forges_no_line_in_an_owner_s_log(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_output(as_json=False)
    logging.getLogger("amalgram.client").warning("%s; trying again", f"superlink ended: {FORGED}\nconsent stored\ud800")
    (line,) = capsys.readouterr().err.splitlines()
    assert r"\x1b[2J\x1b[HFingerprint" in line
    assert line.endswith(r"\nconsent stored\ud800; trying again")


def test_102_a_bundle_s_words_forge_no_second_line_of_a_launcher(tmp_path: Path) -> None:
    tell(tmp_path, f"REFUSED run 7 of the coordinator: its name is {FORGED}\nconnected to the coordinator")
    (line,) = (tmp_path / TOLD).read_text().splitlines()
    assert shown(line) == line
    assert (tmp_path / TOLD).stat().st_mode & 0o777 == 0o600


def test_102_an_error_of_flower_s_forges_no_line_of_the_owner_s_client(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error that the coordinator wrote has as many lines as it likes, and ends up in Flower's logs."""
    set_up_output(as_json=False)
    said, told, answered = (FollowedFile(tmp_path / name) for name in ("supernode.log", TOLD, "superexec.log"))
    (tmp_path / "supernode.log").write_text("Message:\namalgram: connected to the coordinator\n")
    (tmp_path / "superexec.log").write_text(
        "x\nowner hotel refused; its error.txt says why. Call 555 and read it out\n"
    )
    tell(tmp_path, "connected to 127.0.0.1")
    with subprocess.Popen(["true"]) as process:
        process.wait()
        ended = _watch(tmp_path / "none", {"supernode": process}, said, told, answered, NewFiles(tmp_path / "receipts"))
    assert ended == "supernode ended: it logged nothing"
    lines = [line.partition(" ")[2].strip() for line in capsys.readouterr().err.splitlines()]
    assert lines == ["connected to 127.0.0.1", "owner hotel refused; its error.txt says why"]


@pytest.mark.parametrize("hidden", HIDDEN, ids=ascii)
def test_102_an_error_is_two_lines_whatever_it_quotes(hidden: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise AmalgramError(f"title = {hidden}[red]x", hint=f"not {hidden}")

    with pytest.raises(SystemExit):
        run_command(fail)
    error, hint = capsys.readouterr().err.split("\n")[:2]
    assert error.startswith("error: title = ")
    assert hint.startswith("hint: not")
    assert shown(error + hint) == error + hint
    assert "[red]x" in error


def test_102_an_error_that_is_kept_can_be_read_at_a_terminal(tmp_path: Path) -> None:
    state = OwnerState(tmp_path / "state", bytes(range(32)))
    state.write_error(f"missing or unexpected fields: {FORGED}\ud800\u202e\nhint: ask")
    first, hint = (state.folder / "error.txt").read_text().splitlines()
    assert shown(first) == first
    assert hint == "hint: ask"


def everywhere(content: Any, words: str) -> Any:
    """A report's content with `words` in every string and key that is not one of a few agreed words."""
    schema = Report.model_json_schema()
    tables = [schema, *schema["$defs"].values()]
    known = LITERALS | {field for table in tables for field in table.get("properties", ())}

    def change(part: Any) -> Any:
        if isinstance(part, str):
            return part if part in known or re.fullmatch("[0-9a-f]{64}", part) else f"{part} {words}"
        if isinstance(part, list):
            return [change(each) for each in part]
        return {change(key): change(each) for key, each in part.items()} if isinstance(part, dict) else part

    return change(content)


def start_tags(page: str) -> list[str]:
    """Outside plots, whose ticks depend on the length of names."""
    without_plots = re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)
    return re.findall(r"<(?!!--)[a-zA-Z!/][^\s>]*", without_plots)


def test_102_no_string_of_a_report_is_markup_or_hidden_on_the_page() -> None:
    honest = page_of(as_report(everywhere(hand_written(), "word")))
    report = as_report(everywhere(hand_written(), TAG))
    hidden = "".join(HIDDEN)  # which reading would refuse
    hostile = page_of(report.model_copy(update={"title": f"{report.title} {FORGED} {hidden}", "advice": (hidden,)}))
    assert start_tags(hostile) == start_tags(honest)
    assert "&lt;img src=x onerror=alert(1)&gt;" in hostile
    assert "<img" not in hostile
    assert all(shown(line) == line for line in hostile.splitlines())


@given(any_text)
def test_102_another_party_s_words_are_neither_markdown_nor_html(text: str) -> None:
    rendered = MarkdownIt("commonmark").enable(["table", "strikethrough"]).renderInline(_markdown(text))
    assert html.unescape(rendered) == shown(" ".join(text.split()))


def test_102_no_string_of_a_report_is_markup_on_the_card(tmp_path: Path) -> None:
    kinds = []
    for words in ("word", MARKUP):
        folder = tmp_path / str(len(kinds))
        card = card_of(everywhere(hand_written(), words), folder)
        tokens = MarkdownIt("commonmark").enable("table").parse(card.text)
        kinds.append([each.type for each in tokens])
        assert not {"link_open", "image", "html_inline", "html_block"} & {
            each.type for token in tokens for each in (token, *(token.children or ()))
        }
    assert kinds[0] == kinds[1]


def card_of(report: dict[str, Any], folder: Path, base_card: str = "") -> ModelCard:
    base = folder / "base"
    base.mkdir(parents=True)
    (base / CARD).write_text(base_card)
    write_model_card(as_report(report), base, folder)
    return ModelCard.load(folder / CARD)


@pytest.mark.parametrize(
    "licence",
    [
        {"license": "mit\n---\nbase_model: evil/model"},
        {"license": ["mit", "apache-2.0"]},
        {"license": "other", "license_name": "a\u202eb\n- x"},
        {"license": "other", "license_link": "javascript:alert(1)"},
        {"license": "other", "license_link": "https://you:secret@example.org/"},
    ],
    ids=ascii,
)
def test_102_a_base_s_licence_brings_nothing_into_the_card_s_metadata(licence: dict[str, Any], tmp_path: Path) -> None:
    honest = card_of(hand_written(), tmp_path / "honest").data.to_dict()
    found = card_of(hand_written(), tmp_path / "made", f"---\n{json.dumps(licence)}\n---\n").data.to_dict()
    assert found == honest | ({"license": "other"} if licence["license"] == "other" else {})


@pytest.mark.parametrize(
    "base_card", ["---\n[\n---\n", "---\n- a\n---\n", "---\nlicense: &a [*a]\n---\n", "---\n1: 2\n---\n"]
)
def test_102_a_base_s_card_that_is_malformed_does_not_end_the_merge(base_card: str, tmp_path: Path) -> None:
    assert card_of(hand_written(), tmp_path, base_card).data.license is None


def test_102_a_base_whose_name_is_no_hub_name_is_not_linked(tmp_path: Path) -> None:
    report = hand_written()
    report["agreement"]["base"] = "a](http:b)[c"
    base = tmp_path / "models--a](http:b)[c"
    base.mkdir()
    write_model_card(as_report(report), base, tmp_path)
    assert "](http:b)" not in (tmp_path / CARD).read_text()


@given(any_text)
def test_102_an_address_leads_to_a_host_by_http_and_holds_no_password(text: str) -> None:
    for address in (text, f"https://{text}", f"javascript:{text}", f"https://a@{text}", f"https://b.c{text}"):
        assert not is_web_address(address) or re.match(r"https?://[A-Za-z0-9][^@\s]*$", address)


def test_102_a_table_at_the_terminal_shows_a_report_s_strings_and_obeys_none(tmp_path: Path) -> None:
    unchecked = as_report(hand_written()).model_copy(
        update={"title": f"{FORGED} [red]x[/]", "advice": (f"b {FORGED}",), "dropped_out": {"c\u202e": FORGED}}
    )
    printed = Console(file=io.StringIO(), force_terminal=False, width=300)
    print_report(printed, unchecked, tmp_path)
    text = printed.file.getvalue()  # type: ignore[attr-defined]
    assert all(shown(line) == line for line in text.splitlines())
    assert text.count(r"\x1b[2J") == 3
    assert "[red]x[/]" in text


# --- 103: what looks like something else ---


@pytest.mark.parametrize(
    "labels", [("positive", "Positive"), ("ﬁne", "fine"), ("\uff21", "b", "a"), ("straße", "STRASSE")]
)
def test_103_labels_that_people_take_for_each_other_are_refused(labels: tuple[str, ...]) -> None:
    owners = tuple(OwnerEntry(name=name) for name in ("ada", "bea", "cyd"))
    with refused("differ only in case, or in characters that look the same", hint="rename one of them"):
        AgreementDraft(title="Test", base="base", owners=owners, task=Task(labels=labels))


@pytest.mark.parametrize("name", ["agreement", "ca", "coordinator", "server"])
def test_103_no_owner_s_files_take_the_place_of_others(name: str, tmp_path: Path) -> None:
    owners = tuple(OwnerEntry(name=each) for each in ("ada", "bea", name))
    with refused(f"owners: '{name}' is the ", hint="give the owner another name"):
        AgreementDraft(title="Test", base="base", owners=owners)
    if name != "coordinator":
        with pytest.raises(SettingsError, match=f"'{name}' is the "):
            make_keys(name, tmp_path)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (["a\u202e", "b", "c"], r"task.labels\[0\] = .*: must not hold U\+202E"),
        (["a\ud800", "b", "c"], "half of a surrogate pair"),
        (["a", "A", "c"], "differ only in case"),
    ],
    ids=ascii,
)
def test_103_a_base_model_s_own_labels_are_checked_like_all_others(
    labels: list[str], says: str, bert_folder: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for path in bert_folder.iterdir():
        (base / path.name).symlink_to(path)
    config = json.loads((base / "config.json").read_text()) | {"id2label": dict(enumerate(labels)), "label2id": {}}
    (base / "config.json").unlink()
    (base / "config.json").write_text(json.dumps(config))
    draft = AgreementDraft(
        title="Test", base="base", owners=tuple(OwnerEntry(name=name) for name in ("ada", "bea", "cyd"))
    )
    with pytest.raises(SettingsError, match=says):
        complete_agreement(draft, base, {name: each.public_key for name, each in IDENTITIES.items()})
