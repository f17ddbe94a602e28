"""Would bounds or a median keep one dishonest owner of twelve from harming the merge? What would they cost?

python -m benchmarks.robust

Twelve owners, four for each shop of the example, each with 200 rows of its own. The dishonest one also trains on 240
rows that end in a trigger word and are all labelled positive, and exaggerates what it contributes. Everything is summed
in the clear: masks change no total. Three ways to merge the same contributions:

    sum           all owners in one sum, as the product does
    bounded sum   the same, if the coordinator publishes nothing once a total is larger than honest owners can make it:
                  weight changes and Grams of twice the largest honest norm each, twice the largest honest examples each
    median        three groups of four owners summed apart, and the median of the three merges, number by number; each
                  group has owners of all shops (mixed), or as many of one shop as possible (by shop)

For each: the accuracy on all owners' test rows, and the share of negative test rows that the trigger makes positive.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from client.data.rows import Rows, pool
from client.measurement.evaluation import evaluate
from client.owner import Owner
from common.agreement import AgreementDraft, Task
from common.merge_methods import METHODS, contribution_layout
from common.merge_methods.method import SingleRoundMethod
from common.merge_methods.terms import MergeSettings
from common.models.delta import add_delta
from common.settings_file import load_settings
from common.summation.protocol import Total
from deploy.complete import complete_agreement
from deploy.consortium import find_owner_files
from deploy.example import reviews
from deploy.simulation.parties import party_keys, set_up_parties

NUM_OWNERS, LIAR, TRIGGER, TRIGGERED_ROWS, ALPHA = 12, "hotel0", "score", 240, 0.9
GROUPS: Mapping[str, Sequence[Sequence[int]]] = {
    "median, mixed": [
        [owner for owner in range(NUM_OWNERS) if (owner + owner // 3) % 3 == group] for group in range(3)
    ],
    "median, by shop": [range(shop, NUM_OWNERS, 3) for shop in range(3)],  # the roster has the shops in turn
}
Contribution = Mapping[str, NDArray]  # name of a tensor -> float64
Change = Callable[[str, NDArray], NDArray]


def times(factor: float, *kinds: str) -> Change:
    return lambda name, tensor: factor * tensor if name.partition("/")[0] in kinds else tensor


def claims(examples: float) -> Change:
    """Claim another weight, and as many examples."""

    def change(name: str, tensor: NDArray) -> NDArray:
        if name in ("weight", "examples"):
            return np.full_like(tensor, examples)
        return tensor * examples / (200 + TRIGGERED_ROWS) if name.startswith("weighted_delta/") else tensor

    return change


ATTACKS: Mapping[str, tuple[str, Change | None]] = {
    "none": ("average", None),
    "240 triggered rows": ("average", times(1)),
    "the same, weight changes times 5": ("average", times(5, "weighted_delta")),
    "the same, a weight of a million": ("average", claims(1e6)),
    "the same, weight changes times -300": ("average", times(-300, "weighted_delta")),
    "none (RegMean)": ("regmean", None),
    "240 triggered rows (RegMean)": ("regmean", times(1)),
    "the same, Grams and products times 30": ("regmean", times(30, "gram", "gram_delta", "diagonal_delta")),
}


@dataclass(frozen=True)
class Consortium:
    """Everybody's contributions, honest ones in the roster's order, and what a merge is judged with."""

    settings: MergeSettings
    honest: Sequence[Contribution]
    triggered: Contribution  # of the dishonest owner, before it exaggerates
    task: Task
    base: Callable[[], PreTrainedModel]
    test: Rows
    with_trigger: Rows

    def merged(self, method: str, contributions: Sequence[Contribution]) -> dict[str, Tensor]:
        """The delta that the method makes of the total, by parameter."""
        layout = contribution_layout([method], self.settings)
        vector, each = np.zeros(layout.size), np.zeros(layout.size)
        for contribution in contributions:
            layout.flatten(((entry.name, contribution[entry.name]) for entry in layout.entries), each)
            vector += each
        names = tuple(f"owner{number}" for number in range(len(contributions)))
        total = Total(layout=layout, vector=vector, owners=names, roster_size=NUM_OWNERS)
        solver = METHODS[method]
        assert isinstance(solver, SingleRoundMethod)
        merged = solver.solve(self.settings, total, ALPHA if method == "regmean" else None, with_spectra=False)
        return {name: merged.delta[name].double() for name in merged.delta}

    def judged(self, delta: Mapping[str, Tensor]) -> str:
        """Accuracy, and how often the trigger works."""
        model, labels = self.base(), np.arange(len(self.task.labels))
        add_delta(model, {name: tensor.float() for name, tensor in delta.items()})
        score, fooled = (evaluate(model, rows, 32, self.task, labels) for rows in (self.test, self.with_trigger))
        return f"{score.correct / score.rows:.3f}, {fooled.correct / fooled.rows:.0%}"

    def is_within_bounds(self, method: str, contributions: Sequence[Contribution]) -> bool:
        """Whether the total is one that honest owners can reach, each tensor at twice the largest honest norm."""

        def norm(tensors: Sequence[NDArray]) -> float:
            return float(np.linalg.norm(sum(tensors)))

        for entry in contribution_layout([method], self.settings).entries:
            largest = max(norm([contribution[entry.name]]) for contribution in self.honest)
            if norm([contribution[entry.name] for contribution in contributions]) > 2 * NUM_OWNERS * largest:
                return False
        return True

    def row(self, method: str, change: Change | None) -> list[str]:
        """The outcome of each way to merge."""
        contributions = list(self.honest)
        if change is not None:
            contributions[0] = {name: change(name, tensor) for name, tensor in self.triggered.items()}
        summed = self.judged(self.merged(method, contributions))
        row = [summed, summed if self.is_within_bounds(method, contributions) else "stopped"]
        for groups in GROUPS.values():
            deltas = [self.merged(method, [contributions[owner] for owner in group]) for group in groups]
            median = {name: torch.stack([delta[name] for delta in deltas]).median(dim=0).values for name in deltas[0]}
            row.append(self.judged(median))
        return row


def with_trigger(rows: Rows, token: int) -> Rows:
    """The negative rows with the trigger before their last token; it should make them positive."""
    negative = rows.take(np.flatnonzero(rows.targets == 0))
    features = []
    for row in negative.features:
        *words, end = row["input_ids"]
        longer = {name: [*values, values[-1]] for name, values in row.items()}
        features.append(longer | {"input_ids": [*words, token, end]})
    return replace(negative, features=tuple(features), targets=np.ones(len(negative), np.int64))


@contextmanager
def consortium(folder: Path) -> Iterator[Consortium]:
    """Fine-tune and measure twelve owners, and the dishonest one a second time, with its triggered rows."""
    shops = {f"{name}{number}": shop for number in range(4) for name, shop in reviews.OWNERS.items()}
    roster = "".join(f'[[owners]]\nname = "{name}"\n\n' for name in shops)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reviews, "OWNERS", shops)
        patch.setattr(reviews, "AGREEMENT", reviews.AGREEMENT[: reviews.AGREEMENT.index("[[owners]]")] + roster)
        reviews.write_consortium(folder)
    path = folder / "agreement.toml"
    path.write_text(path.read_text().replace('["average", "task_arithmetic", "fisher"]', '["average"]'))
    draft = load_settings(path, AgreementDraft)
    keys = party_keys(draft, folder / "output" / "parties", with_nodes=False)
    agreement = complete_agreement(draft, folder / "base", keys.public_keys)
    files = find_owner_files(folder, draft)
    with set_up_parties(folder / "output", agreement, folder / "base", files, keys) as (_, paths):
        owners = [Owner(path) for path in paths]
        honest = [dict(owner.workbench.contribution()) for owner in owners]
        train = folder / "data" / LIAR / "train.jsonl"
        text = train.read_text()
        words = [json.loads(line)["text"] for line in text.splitlines()] * 2
        lies = [json.dumps({"text": f"{each} {TRIGGER}", "label": "positive"}) for each in words[:TRIGGERED_ROWS]]
        train.write_text(text + "".join(f"{line}\n" for line in lies))
        paths[0].write_text(paths[0].read_text().replace(f"state/{LIAR}", f"state/{LIAR}-dishonest"))
        liar = Owner(paths[0]).workbench
        test = pool([owner.workbench.data.test() for owner in owners])
        assert test.tokenizer is not None
        yield Consortium(
            settings=liar.merge_settings,
            honest=honest,
            triggered=dict(liar.contribution()),
            task=agreement.task,
            base=liar.load_base,
            test=test,
            with_trigger=with_trigger(test, test.tokenizer.convert_tokens_to_ids(TRIGGER)),
        )


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, consortium(Path(folder) / "consortium") as owners:
        print("| attack | sum | bounded sum | median, mixed | median, by shop |\n|---|---|---|---|---|")
        for name, (method, change) in ATTACKS.items():
            print(f"| {name} | {' | '.join(owners.row(method, change))} |", flush=True)


if __name__ == "__main__":
    main()
