"""What an owner consents to, in plain words, for whoever says yes or no: what leaves, who sees it, what it reveals."""

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from client.owner import Owner
from common import scaling
from common.agreement import SEQUENTIAL, Agreement
from common.contents import CONTRIBUTIONS, contribution_kind
from common.identity import fingerprint
from common.merge_methods import candidates, contribution_layout, step_layout, step_statistic, steps
from common.metrics import metrics_layout
from common.models.delta import delta_layout
from common.models.plan import merge_plan
from common.tensor_layout import TensorLayout
from deploy.launch.flower import bundle_digest


def consent_text(owner: Owner) -> str:
    """All that there is to know before saying yes. Raises the AmalgramError that a run would meet as things are."""
    owner.check()
    agreement = owner.agreement
    plan = merge_plan(owner.workbench.load_base(), agreement.tensors)
    later = {
        step_statistic(method, step): step_layout(agreement, plan, method, step)
        for method in agreement.methods
        if method in SEQUENTIAL
        for step in steps(plan, method)
    }
    layouts = [*_first_sums(agreement, contribution_layout(agreement, plan)), *later.values()]
    numbers: Counter[str] = Counter()
    tensors: Counter[str] = Counter()
    for layout in layouts:
        for entry in layout.entries:
            kind = contribution_kind(entry.name)
            numbers[kind] += entry.size
            tensors[kind] += 1
    names = [model for method in agreement.methods for model in candidates(agreement, method)]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("consent.txt.jinja").render(
        agreement=agreement,
        owner=owner.name,
        same_bundle=bundle_digest() == agreement.bundle_digest,
        figure=agreement.task.figure.replace("_", " "),
        fingerprint=fingerprint(bytes.fromhex(agreement.digest())),
        numbers=sum(layout.size for layout in layouts),
        vector_bytes=_bytes(sum(layout.num_bytes for layout in layouts)),
        num_sums=len(layouts),
        later_sums=len(later),
        kinds=[
            {
                "numbers": numbers[kind],
                "tensors": tensors[kind],
                "meaning": CONTRIBUTIONS[kind].format(their="your"),
            }
            for kind in sorted(numbers)
        ],
        candidates=len(names),
        figures_bytes=_bytes(metrics_layout(agreement, "test", ["base", "own_at_home", *names]).num_bytes),
        model_bytes=_bytes(delta_layout(plan).size * 4),
        earlier=owner.state.ledger(agreement.digest()).earlier_contributions,
    )


def _first_sums(agreement: Agreement, layout: TensorLayout) -> list[TensorLayout]:
    """What the contribution is summed as: by itself, or after what its scales are made of."""
    if not agreement.summation.has_scales:
        return [layout]
    return [scaling.measures_layout(layout), scaling.scaled_layout(layout)]


def give_consent(owner: Owner) -> None:
    """Write down that this owner agreed to its agreement's digest."""
    owner.state.write_consent(owner.agreement.digest(), datetime.now(UTC).isoformat(timespec="seconds"))


def _bytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 100_000 else f"{count:,} bytes"
