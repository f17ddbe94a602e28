"""What an audit found, in sentences. The screen and the page both show them."""

from collections.abc import Iterator

from client.audit.result import FEWEST_STRANGERS, AttackName, Audit, AuditedModel, Interval, ModelName
from common.page.words import listed, percent

TITLES: dict[ModelName, str] = {
    "base": "base",
    "own": "your own model",
    "model_base": "the audited model's base",
    "model": "the audited model",
}
HEADINGS: dict[ModelName, str] = {"base": "Base", "own": "Own", "model_base": "Its base", "model": "Audited"}
ATTACKS: dict[AttackName, str] = {
    "loss": "loss",
    "calibrated_loss": "loss, less the base's",
    "classifier_gradient": "classifier's gradient",
    "gradient": "gradient, all layers",
}
EXPLAINED: dict[AttackName, str] = {
    "loss": "a row that the model was trained on has a lower loss (Yeom et al., arXiv 1709.01604)",
    "calibrated_loss": "the same, less the base's loss on the row, so that easy rows are not taken for members (Watson "
    "et al., arXiv 2111.08440)",
    "classifier_gradient": "the row's gradient at the base points to where the classifier went (SELECT, arXiv "
    "2506.15553)",
    "gradient": "the same over all layers: the slope of the row's loss at the base, on the way to the model",
}
SURE = 0.01  # a selection that a blind choice makes more seldom is called better than blind


def headline(audit: Audit) -> str:
    """How often an attacker is right about which of two rows is the owner's."""
    own, model = (audit.model(name) for name in ("own", "model"))
    assert own is not None  # every audit has it
    shown = "Shown one of your training rows and a stranger, an attacker who has"
    if model is None:
        return f"{shown} your own model {_picks(own)}."
    return f"{shown} the audited model {_picks(model)}. One who has your own model {_picks(own)}."


def _picks(model: AuditedModel) -> str:
    best = model.strongest
    beyond = "" if best.beats_guessing else ": not clearly better than guessing"
    return f"picks yours right {interval(best.area)} of the time{beyond}"


def interval(found: Interval) -> str:
    """`53 % (51 to 55)`."""
    return f"{whole_percent(found.value)} ({range_of(found)})"


def whole_percent(share: float) -> str:
    return f"{100 * share:.0f}\u00a0%"


def range_of(found: Interval) -> str:
    """`51 to 55`, in percent."""
    return f"{100 * found.low:.0f} to {100 * found.high:.0f}"


def details(audit: Audit) -> list[str]:
    """What else was found, one sentence each."""
    found = []
    for name in ("own", "model"):
        model = audit.model(name)
        if model is not None:
            found += [*_of_canaries(model), *_of_tokens(model), *_of_selection(model)]
    return found


def most_found(model: AuditedModel) -> Interval | None:
    """The share of members that the best attack finds at 1 % false positives; None with too few strangers."""
    rates = [attack.true_positives for attack in model.attacks if attack.true_positives is not None]
    return max(rates, key=lambda rate: rate.value, default=None)


def _of_canaries(model: AuditedModel) -> Iterator[str]:
    canaries = model.canaries
    if canaries is not None:
        yield (
            f"The {canaries.planted} planted canaries have an exposure of {canaries.mean_exposure:.1f} bits in "
            f"{TITLES[model.name]}: rows that were never planted have {canaries.by_chance:.1f}, and at most "
            f"{canaries.highest:.0f} can be measured; {canaries.fully_exposed} are fully exposed."
        )


def _of_tokens(model: AuditedModel) -> Iterator[str]:
    tokens = model.embeddings
    if tokens is None:
        return
    if not tokens.moved:
        yield f"The token embeddings of {TITLES[model.name]} are the base's: they show no word."
        return
    alone = "" if tokens.yours_alone is None else f"; {tokens.yours_alone:,} moved as in your own model alone"
    yield (
        f"{tokens.moved:,} of {tokens.vocabulary:,} token embeddings moved in {TITLES[model.name]}. Your rows hold "
        f"{tokens.yours:,} different tokens, of which {tokens.moved_of_yours:,} moved{alone}."
    )


def _of_selection(model: AuditedModel) -> Iterator[str]:
    chosen = model.selection
    if chosen is not None:
        better = "more than" if chosen.p_value < SURE else "not clearly more than"
        yield (
            f"{chosen.candidates:,} candidate texts hold {chosen.members_among_candidates:,} of your training rows. An "
            f"attacker with {TITLES[model.name]} picks {chosen.selected:,}, of which {chosen.members:,} are your "
            f"training rows: {better} the {chosen.chance:.1f} of a blind choice. It also picks {chosen.strangers:,} of "
            f"{chosen.strangers_among_candidates:,} rows of yours that were not trained on."
        )


def of_lineage(model: AuditedModel) -> str:
    """How much of a model is the base's; empty for the base."""
    near = model.lineage
    if near is None:
        return ""
    return (
        f"{percent(near.unchanged)} of its {near.weights:,} weights are bit-identical to the base's, "
        f"{percent(near.same_exponent)} have the same sign and exponent; whoever has the base needs "
        f"{near.bits_per_weight:.1f} bits for a weight instead of 32."
    )


def cautions(audit: Audit) -> list[str]:
    """What may make a number say less, or something else, than it seems to."""
    rows, found = audit.rows, list(audit.warnings)
    for base in (model for model in audit.models if model.name in ("base", "model_base")):
        area = base.attacks[0].area
        if area.low <= 0.5 <= area.high:
            continue
        named = "the base" if base.name == "base" else TITLES[base.name]
        found.append(
            f"Even {named}, which never saw your rows, tells them from the strangers ({interval(area)}): the groups "
            "differ otherwise, and the loss shows that difference, too. The loss less the base's does so less."
        )
    if rows.strangers < FEWEST_STRANGERS:
        found.append(
            f"There are {rows.strangers} strangers, and 1 % of fewer than {FEWEST_STRANGERS} is nobody: how many of "
            "your rows are found at 1 % false alarms has no meaning, and is left out."
        )
    if rows.unknown:
        found.append(
            f"{rows.unknown:,} rows are set aside from your training file for validation. A model that was trained "
            "elsewhere may have been trained on them, so they are neither members nor strangers."
        )
    if not rows.made_here:
        found.append(
            "Your model was trained elsewhere. If it was trained on other rows than your training file holds, the "
            "numbers are too low."
        )
    if rows.not_judged:
        found.append(f"{rows.not_judged:,} rows were left out, because some audited model predicts nothing on them.")
    if rows.in_both:
        found.append(f"{rows.in_both:,} training rows read like a stranger, and are left out with it.")
    return found


def revealed() -> list[str]:
    """What audit.json and audit.html give away to whoever reads them."""
    return [
        "They hold no text, no token, no label and no number of a single row.",
        "They do hold your name as an owner, how many rows were compared and left out, how many different tokens your "
        "training rows have, mean losses and accuracies on your rows, and the digest of your own model. Whoever has a "
        "copy of a model recognises it by its digest, and nobody else learns anything from it.",
        "They show how well each attack works on your rows. Whoever has the model can run the attacks; this tells them "
        "which to use.",
    ]


def rows_in_words(audit: Audit) -> str:
    """Which rows were compared."""
    rows = audit.rows
    sources = listed(["test", *(["validation"] if rows.has_validation else [])])
    return f"{rows.members:,} of your training rows, against {rows.strangers:,} strangers: {sources} rows of yours"
