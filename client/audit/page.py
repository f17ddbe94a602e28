"""`audit.html`, made from an audit alone: one file that runs no script and fetches nothing."""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from client.audit import plots
from client.audit.result import AttackName, Audit, AuditedModel
from client.audit.verdict import (
    ATTACKS,
    EXPLAINED,
    HEADINGS,
    TITLES,
    cautions,
    details,
    headline,
    of_lineage,
    range_of,
    revealed,
    rows_in_words,
    whole_percent,
)
from common.page.templates import page_environment

FOLDER = Path(__file__).parent


def page_of(audit: Audit) -> str:
    """The whole page."""
    attacks = attacks_in(audit)
    shown: dict[str, Any] = {
        "audit": audit,
        "headline": headline(audit),
        "details": details(audit),
        "cautions": cautions(audit),
        "rows": rows_in_words(audit),
        "revealed": revealed(),
        "attacks": attacks,
        "areas": Markup(_areas(audit, attacks)),
        "curves": Markup(_curves(audit)),
        "lineages": {TITLES[model.name]: of_lineage(model) for model in audit.models if model.lineage},
    }
    return _environment().get_template("audit.html.jinja").render(shown)


def attacks_in(audit: Audit) -> list[AttackName]:
    """The attacks that were made on any model, in the order in which they are explained."""
    return [name for name in ATTACKS if any(model.attack(name) for model in audit.models)]


@cache
def _environment() -> Environment:
    environment = page_environment(FOLDER)
    environment.filters |= {"whole_percent": whole_percent, "range": range_of}
    environment.globals |= {"titles": TITLES, "headings": HEADINGS, "attack_names": ATTACKS, "explained": EXPLAINED}
    return environment


def _areas(audit: Audit, attacks: list[AttackName]) -> str:
    models = {model.name: (TITLES[model.name], [_area(model, name) for name in attacks]) for model in audit.models}
    return plots.intervals_plot([ATTACKS[name].replace(", ", ",\n") for name in attacks], models)


def _area(model: AuditedModel, name: AttackName) -> tuple[float, float, float] | None:
    attack = model.attack(name)
    return None if attack is None else (attack.area.value, attack.area.low, attack.area.high)


def _curves(audit: Audit) -> str:
    return plots.curves_plot(
        {
            model.name: (f"{TITLES[model.name]}, by the {ATTACKS[model.strongest.name]}", model.strongest.curve)
            for model in audit.models
        }
    )
