"""What an owner consents to, in plain words, for whoever says yes or no: what leaves, who sees it, what it reveals."""

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from client.owner import Owner
from common.agreement import SEQUENTIAL
from common.identity import fingerprint
from common.merge_methods import candidates, contribution_layout, step_layout, step_statistic, steps
from common.metrics import metrics_layout
from common.models import delta_layout, merge_plan
from common.summation.accumulator import BYTES_PER_NUMBER

MEANINGS = {
    "gram": "Gram matrices: sums over your rows of products of a layer's inputs",
    "gram_delta": "Gram matrices times your weight changes",
    "diagonal_delta": "diagonals of Gram matrices times your weight changes",
    "data_free_gram": "products of your weight changes with themselves, per layer; no row is in them",
    "data_free_gram_delta": "those products times your weight changes",
    "data_free_diagonal_delta": "diagonals of those products times your weight changes",
    "weighted_delta": "your weight changes times your weight in the mean",
    "fisher": "squared gradients, summed over your rows (Fisher information)",
    "fisher_delta": "squared gradients times your weight changes",
    "head_gram": "products of the classifier's inputs with themselves, on the merged model, summed over your rows",
    "head_start": "those products times the base's classifier",
    "head_targets": "the classifier's inputs times what it is fitted to, summed over your rows",
    "head_scores": "the size of your own model's scores",
    "head_rows": "the number of rows that the classifier is fitted to",
    "rows": "the number of rows behind each Gram matrix",
    "weight": "your weight in the mean",
    "examples": "your number of training rows",
}


def consent_text(owner: Owner) -> str:
    """All that there is to know before saying yes. Raises the AmalgramError that a run would meet as things are."""
    owner.check()
    agreement = owner.agreement
    plan = merge_plan(owner.load_base(), agreement.tensors)
    later = {
        step_statistic(method, step): step_layout(agreement, plan, method, step)
        for method in agreement.methods
        if method in SEQUENTIAL
        for step in steps(plan, method)
    }
    layouts = [contribution_layout(agreement, plan), *later.values()]
    numbers: Counter[str] = Counter()
    tensors: Counter[str] = Counter()
    for layout in layouts:
        for entry in layout.entries:
            kind = entry.name.split("/")[0].split("@")[0]
            numbers[kind] += entry.size
            tensors[kind] += 1
    names = [model for method in agreement.methods for model in candidates(agreement, method)]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("consent.txt.jinja").render(
        agreement=agreement,
        owner=owner.name,
        figure=agreement.task.figure.replace("_", " "),
        fingerprint=fingerprint(bytes.fromhex(agreement.digest())),
        numbers=sum(layout.size for layout in layouts),
        vector_bytes=_bytes(sum(layout.size for layout in layouts) * BYTES_PER_NUMBER),
        later_sums=len(later),
        kinds=[
            {"numbers": numbers[kind], "tensors": tensors[kind], "meaning": MEANINGS[kind]} for kind in sorted(numbers)
        ],
        candidates=len(names),
        figures_bytes=_bytes(
            metrics_layout(agreement, "test", ["base", "own_at_home", *names]).size * BYTES_PER_NUMBER
        ),
        model_bytes=_bytes(delta_layout(plan).size * 4),
        earlier=owner.state.ledger(agreement.digest()).earlier_contributions,
    )


def give_consent(owner: Owner) -> None:
    """Write down that this owner agreed to its agreement's digest."""
    owner.state.write_consent(owner.agreement.digest(), datetime.now(UTC).isoformat(timespec="seconds"))


def _bytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 100_000 else f"{count:,} bytes"
