"""`amalgram personal`: a model for one owner alone, from the published one and its own. It sends nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from client.settings import OwnerSettings
from common.agreement import Agreement, load_agreement
from common.errors import AmalgramError, SettingsError
from common.metrics import compared_by
from common.publication import CARD, RECEIPTS, SignedScore
from common.settings_file import load_settings
from common.text import shown
from deploy.commands.audit import published_in
from deploy.commands.verify import read_receipts
from deploy.terminal import answer, shows_json
from server.report.words import METRICS

if TYPE_CHECKING:
    from client.personal import Personal

CARD_TEXT = """---
tags:
- amalgram
---

# A personal model of {owner}{warning}

It was made on this owner's machine from the model that "{title}" published and from the owner's own model. {contains}

- How it was made: {made}.
- Chosen by {measure} on {validation_rows} validation predictions, among {tried} models.
- On {test_rows} test predictions of this owner:

| model | {main} | {metric} |
|---|---:|---:|
{rows}

Elsewhere: {elsewhere}
"""

OWN_WEIGHTS = (
    "Its weights contain the owner's. **Do not publish it, and do not give it to another party**: together with the "
    "published model, it shows this owner's own weight changes, which no merge shows."
)
NOTHING_OWN = "Since no model was better on the validation rows, its weights are the published ones."


def make_and_show(owner_file: Path, model: Path, out: Path) -> None:
    """Make the personal model, write it to the new folder `out`, and show what it gains at home."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # check: personal-models-fetch-nothing
    home = owner_file.resolve().parent
    settings = load_settings(owner_file, OwnerSettings)
    agreement = load_agreement(home / settings.agreement)
    from client.holdings import Holdings  # torch: not before what people wrote is checked
    from client.personal import personalise
    from common.models.loading import digest_of

    with _new_folder(out) as folder:
        holdings = Holdings(settings, home, agreement)
        published = holdings.model_of_base(published_in(model))
        elsewhere = _elsewhere(published_in(model), agreement, digest_of(published, holdings.task), settings.name)
        made = personalise(holdings, published)
        holdings.write_whole(made.model, folder)
        (folder / CARD).write_text(_card(made, agreement, settings.name, elsewhere))
    if shows_json():
        answer(_as_json(made, agreement, settings.name, elsewhere, out))
    else:
        _print(Console(), made, agreement, elsewhere, out)


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that only this user can enter, and that gets its name once everything is in it.

    Raises SettingsError if there is something of that name.
    """
    if os.path.lexists(out):  # check: personal-models-replace-nothing
        raise SettingsError(f"{out}: already exists", hint="name a new folder for the personal model")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))  # check: personal-models-are-private
    try:
        yield partial
        for path in partial.rglob("*"):
            path.chmod(0o700 if path.is_dir() else 0o600)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _elsewhere(folder: Path, agreement: Agreement, model_digest: str, owner: str) -> dict[str, SignedScore]:
    """How the published model did at the other owners that show it by name, if signed receipts lie beside it."""
    try:
        receipts = read_receipts(folder / RECEIPTS)
        receipts.check(agreement)  # raises for another agreement, too: the signatures are under its digest
    except AmalgramError:
        return {}
    if receipts.model_digest != model_digest:
        return {}
    by_owner = receipts.publication.test[agreement.method].by_owner
    return {name: score for name, score in by_owner.items() if name != owner}


# --- words ---


MADE = {
    "merged": "the published model as it is, because nothing was better on the validation rows",
    "own": "the owner's own model as it is, because nothing was better on the validation rows",
    "masked": "the published change where it has the sign of the owner's own, rescaled (EMR-Merging)",
    "mixed": "a mixture of the two, of which the owner's own weights are {shares}",
}


def _has_own_weights(made: Personal) -> bool:
    return made.recipe.kind != "merged"


def _made(made: Personal) -> str:
    shares = dict(zip(made.groups, made.recipe.shares, strict=False))
    if len(set(shares.values())) == 1:
        return MADE[made.recipe.kind].format(shares=f"{made.recipe.shares[0]:.0%} everywhere")
    by_group = ", ".join(f"{share:.0%} in {group}" for group, share in shares.items())
    return MADE[made.recipe.kind].format(shares=by_group)


def _headings(agreement: Agreement) -> tuple[str, str]:
    main, metric = agreement.task.metrics
    return METRICS[main], METRICS[metric]


def _said_of_elsewhere(made: Personal, agreement: Agreement, elsewhere: dict[str, SignedScore]) -> str:
    if made.recipe.kind == "merged":
        return "the personal model is the published one, so it does as well there."
    if not elsewhere:
        return "not known. Nobody measured the personal model anywhere but here; expect it to be worse than the merge."
    main = _headings(agreement)[0]
    scores = ", ".join(f"{_main_of(score):.3f} at {name}" for name, score in elsewhere.items())
    return f"the published model has {main} {scores}. Nobody measured the personal one there; expect it to be worse."


def _main_of(score: SignedScore) -> float:
    accuracy = None if score.correct is None else score.correct / max(score.predictions, 1)
    return compared_by(accuracy, score.pearson_r)


def _card(made: Personal, agreement: Agreement, owner: str, elsewhere: dict[str, SignedScore]) -> str:
    main, metric = _headings(agreement)
    return CARD_TEXT.format(
        owner=owner,
        warning=". It must not leave the building" if _has_own_weights(made) else "",
        contains=OWN_WEIGHTS if _has_own_weights(made) else NOTHING_OWN,
        title=shown(agreement.title),
        made=_made(made),
        measure=METRICS[agreement.judge_by],
        validation_rows=made.validation["personal"].rows,
        tried=len(made.tried),
        test_rows=made.test["personal"].rows,
        main=main,
        metric=metric,
        rows="\n".join(f"| {name} | {score.main:.3f} | {score.metric:.3f} |" for name, score in made.test.items()),
        elsewhere=_said_of_elsewhere(made, agreement, elsewhere),
    )


def _print(
    console: Console, made: Personal, agreement: Agreement, elsewhere: dict[str, SignedScore], out: Path
) -> None:
    def say(text: str, style: str = "") -> None:
        console.print(shown(text), style=style, highlight=False, markup=False, soft_wrap=True)

    main, metric = _headings(agreement)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("at home, on test rows")
    for heading in (main, metric):
        table.add_column(heading, justify="right")
    for name, score in made.test.items():
        table.add_row(name, f"{score.main:.3f}", f"{score.metric:.3f}")
    console.print(table)
    say(f"made       {_made(made)}")
    say(f"chosen by  {METRICS[agreement.judge_by]} on validation rows, among {len(made.tried)} models")
    say(f"elsewhere  {_said_of_elsewhere(made, agreement, elsewhere)}")
    if _has_own_weights(made):
        say(f"model      {out}; it contains your own weights, so it must not leave the building", "yellow")
    else:
        say(f"model      {out}")


def _as_json(
    made: Personal, agreement: Agreement, owner: str, elsewhere: dict[str, SignedScore], out: Path
) -> dict[str, object]:
    return {
        "owner": owner,
        "kind": made.recipe.kind,
        "shares": dict(zip(made.groups, made.recipe.shares, strict=False)),
        "chosen_by": agreement.judge_by,
        "tried": len(made.tried),
        "validation": {name: {"main": score.main, "metric": score.metric} for name, score in made.validation.items()},
        "test": {name: {"main": score.main, "metric": score.metric} for name, score in made.test.items()},
        "merged_elsewhere": {name: score.model_dump(mode="json") for name, score in elsewhere.items()},
        "model": str(out),
    }
