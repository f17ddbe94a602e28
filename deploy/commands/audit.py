"""`amalgram audit`: what a model gives away about one owner's rows. It runs at the owner and sends nothing."""

import os
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from client.audit.result import Audit
from client.audit.verdict import ATTACKS, HEADINGS, cautions, details, headline, interval, most_found, rows_in_words
from client.settings import OwnerSettings
from common.agreement import load_agreement
from common.errors import SettingsError
from common.page.table import as_json
from common.private_file import write_whole
from common.settings_file import load_settings
from common.text import shown
from deploy.terminal import answer, shows_json


def audit_and_show(
    owner_file: Path, model: Path | None, base: Path | None, candidates: Path | None, out: Path, most_rows: int
) -> None:
    """Audit, write OUT/audit.json and OUT/audit.html, and show the verdict."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # check: audits-fetch-nothing
    if base is not None and model is None:
        raise SettingsError("--base: names a base for no model", hint="name the model that was made from it, too")
    home = owner_file.resolve().parent
    settings = load_settings(owner_file, OwnerSettings)
    agreement = load_agreement(home / settings.agreement)
    from client.audit.audit import audit  # torch: not before what people wrote is checked
    from client.audit.page import page_of
    from client.audit.subjects import own_subject, subject_in
    from client.holdings import Holdings

    holdings = Holdings(settings, home, agreement)
    own = own_subject(holdings)
    other = None if model is None else subject_in(holdings, own.origin, published_in(model), base)
    found = audit(holdings, own, other, None if candidates is None else candidates.absolute(), most_rows)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "audit.json", f"{as_json(found)}\n".encode())
    write_whole(out / "audit.html", page_of(found).encode())
    if shows_json():
        answer(found.model_dump(mode="json"))
    else:
        _print(Console(), found, out)


def published_in(folder: Path) -> Path:
    """The published model's folder, if this is the output folder of a run; else the folder itself."""
    is_output = (folder / "model").is_dir() and not (folder / "config.json").is_file()
    return folder / "model" if is_output else folder


def _print(console: Console, audit: Audit, out: Path) -> None:
    def say(text: str, style: str = "") -> None:
        console.print(shown(text), style=style, highlight=False, markup=False)

    say(headline(audit))
    console.print(_table(audit))
    for line in details(audit):
        say(line)
    for line in cautions(audit):
        say(line, "yellow")
    say(f"compared: {rows_in_words(audit)}; nothing was sent", "dim")
    say(f"audit  {out / 'audit.html'}, {out / 'audit.json'}")


def _table(audit: Audit) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("right about which of two is yours, by")
    for model in audit.models:
        table.add_column(HEADINGS[model.name].lower(), justify="right")
    for name, title in ATTACKS.items():
        attacks = [model.attack(name) for model in audit.models]
        if any(attacks):
            table.add_row(title, *("-" if attack is None else interval(attack.area) for attack in attacks))
    if any(found := [most_found(model) for model in audit.models]):
        table.add_section()
        table.add_row(
            "your rows found, at 1 % false alarms", *("-" if rate is None else interval(rate) for rate in found)
        )
    return table
