"""Do bounds or a median keep one dishonest owner of twelve from harming the merge? What do they cost?

python -m benchmarks.robust

Twelve owners, four for each shop of the example, each with 200 rows of its own. The dishonest one also trains on 240
rows that end in a trigger word and are all labelled positive, and exaggerates what it contributes. Everything is summed
in the clear: masks change no total. Five ways to merge the same contributions:

    sum      all owners in one sum, with default bounds
    bounds   the same with tighter bounds, as an agreement can have them: every change of a tensor at most as long,
             relative to the base, as the longest or the median honest one (bounds.change); Grams at most 4 times those
             of made-up inputs (bounds.headroom); no owner more than 250 examples (bounds.examples). Honest programs
             clip; the dishonest one does not, unless its row says so. The coordinator's own checks (server/bounds.py)
             stop the merge, or let it pass
    median   three groups of four owners summed apart, and the median of the three merges, number by number; each
             group has owners of all shops (mixed), or as many of one shop as possible (by shop)

For each: the accuracy on all owners' test rows, and the share of negative test rows that the trigger makes positive.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from client.measurement.classifier_inputs import measure_classifier
from client.measurement.disk_model import DiskModel
from client.measurement.evaluation import evaluate
from client.owner import Owner
from client.workbench import Workbench
from common.agreement import AgreementDraft, Task
from common.errors import NumericalError
from common.merge_methods import METHODS, contribution_layout
from common.merge_methods.method import SingleRoundMethod
from common.merge_methods.refit import REFIT, classifier
from common.merge_methods.terms import MergedDelta, MergeSettings, OwnerTerms
from common.models.delta import add_delta
from common.settings_file import load_settings
from common.summation.protocol import Total
from common.tensor_layout import TensorLayout
from deploy.complete import complete_agreement, largest_changes
from deploy.consortium import find_owner_files
from deploy.example import reviews
from deploy.simulation.parties import party_keys, set_up_parties
from server.bounds import check_classifier, check_contributions

NUM_OWNERS, LIAR, TRIGGER, TRIGGERED_ROWS, ALPHA = 12, "hotel0", "score", 240, 0.9
MOST_EXAMPLES, HEADROOM = 250, 4.0
GROUPS: Mapping[str, Sequence[Sequence[int]]] = {
    "median, mixed": [
        [owner for owner in range(NUM_OWNERS) if (owner + owner // 3) % 3 == group] for group in range(3)
    ],
    "median, by shop": [range(shop, NUM_OWNERS, 3) for shop in range(3)],  # the roster has the shops in turn
}
ALL = range(NUM_OWNERS)
Contribution = Mapping[str, NDArray]  # name of a tensor -> float64
Change = Callable[[str, NDArray], NDArray]


def times(factor: float, *kinds: str) -> Change:
    return lambda name, tensor: factor * tensor if name.startswith(kinds) else tensor


def claims(examples: float) -> Change:
    """Claim another weight, and as many examples."""

    def change(name: str, tensor: NDArray) -> NDArray:
        if name in ("weight", "examples"):
            return np.full_like(tensor, examples)
        return tensor * examples / (200 + TRIGGERED_ROWS) if name.startswith("weighted_delta/") else tensor

    return change


EXACTLY = times(1)
GRAMS = ("gram/", "gram_delta/", "diagonal_delta/")
HEAD = ("head_gram", "head_start", "head_targets")


@dataclass(frozen=True)
class Attack:
    """What the dishonest owner does to what it measured; `clips`: its changes are as short as the agreement says."""

    method: str
    name: str
    change: Change | None = EXACTLY
    clips: bool = False


ATTACKS = (
    Attack("average", "nothing: it is honest", None),
    Attack("average", "240 rows of its own with the trigger"),
    Attack("average", "240 rows, within all bounds", claims(MOST_EXAMPLES), clips=True),
    Attack("average", "240 rows, weight changes times 5", times(5, "weighted_delta/")),
    Attack("average", "240 rows, a weight of a million", claims(1e6)),
    Attack("average", "240 rows, weight changes times -300", times(-300, "weighted_delta/")),
    Attack("regmean", "nothing: it is honest", None),
    Attack("regmean", "240 rows of its own with the trigger"),
    Attack("regmean", "240 rows, Grams and products times 30", times(30, *GRAMS)),
    Attack("regmean", "240 rows, within all bounds", clips=True),
    Attack("refit", "nothing: it is honest", None),
    Attack("refit", "240 rows of its own with the trigger"),
    Attack("refit", "240 rows, within all bounds", clips=True),
    Attack("refit", "240 rows, the classifier's Gram and products times 30", times(30, *HEAD)),
    Attack(
        "refit", "240 rows, all Grams and products times 30", times(30, *HEAD, *(f"data_free_{each}" for each in GRAMS))
    ),
)


@dataclass(frozen=True)
class Member:
    """One owner: its model and rows, which a refit measures again, and its contributions to each method.

    `clipped`: the same under each of the tighter bounds, with its weight changes as short as they want them.
    """

    bench: Workbench
    model: PreTrainedModel
    rows: Rows
    contributed: Mapping[str, Contribution]
    clipped: Sequence[Mapping[str, Contribution]]

    def classifier_terms(self, settings: MergeSettings, body: Mapping[str, Tensor]) -> Iterator[tuple[str, NDArray]]:
        """What it adds to a refit on this body."""
        merged = self.bench.load_base()
        add_delta(merged, {name: tensor.float() for name, tensor in body.items()})
        own, base, merged_on_disk = (
            DiskModel(model, self.bench.state.folder) for model in (self.model, self.bench.load_base(), merged)
        )
        terms = measure_classifier(base, own, merged_on_disk, classifier(settings.plan), self.rows, 32)
        owner = OwnerTerms(examples=len(self.rows), delta={}, classifier=terms)
        return REFIT.step_contribution(settings, REFIT.steps(settings)[0], owner)


@dataclass(frozen=True)
class Consortium:
    """Everybody, honest ones in the roster's order, and what a merge is judged with."""

    settings: MergeSettings
    tight: Sequence[MergeSettings]
    honest: Sequence[Member]
    liar: Member
    task: Task
    test: Rows
    with_trigger: Rows

    def merged(self, attack: Attack, group: Sequence[int], bounds: int | None = None) -> Mapping[str, Tensor]:
        """The delta that the method makes of the total over a group. Raises NumericalError if bounds stop it; `bounds`:
        which of the tighter ones.
        """
        settings, method = self.settings if bounds is None else self.tight[bounds], METHODS[attack.method]
        members = [self.liar if owner == 0 and attack.change else self.honest[owner] for owner in group]
        parts = []
        for member in members:
            clips = attack.clips or member is not self.liar
            of = member.contributed if bounds is None or not clips else member.clipped[bounds]
            parts.append(of[attack.method].items())
        layout = contribution_layout([attack.method], settings)
        total = self._total(layout, members, parts, attack)
        if bounds is not None:
            check_contributions(total, layout, settings)
        if isinstance(method, SingleRoundMethod):
            alpha = ALPHA if attack.method == "regmean" else None
            return as_float64(method.solve(settings, total, alpha, with_spectra=False))
        weight = float(total["weight"][0])
        body = REFIT.start(settings, total)
        step = REFIT.steps(settings)[0]
        layout = REFIT.step_layout(settings, step)
        terms = [member.classifier_terms(settings, body.delta) for member in members]
        total = self._total(layout, members, terms, attack)
        if bounds is not None:
            check_classifier(total, layout, weight, settings.plan)
        return as_float64(body.followed_by(REFIT.solve_step(settings, step, total, REFIT.swept(settings.tables)[0])))

    def _total(
        self,
        layout: TensorLayout,
        members: Sequence[Member],
        parts: Sequence[Iterable[tuple[str, NDArray]]],
        attack: Attack,
    ) -> Total:
        vector, each = np.zeros(layout.size), np.zeros(layout.size)
        for member, tensors in zip(members, parts, strict=True):
            change = attack.change if member is self.liar else None
            layout.flatten(((name, change(name, tensor) if change else tensor) for name, tensor in tensors), each)
            vector += each
        names = tuple(f"owner{number}" for number in range(len(members)))
        return Total(layout=layout, vector=vector, owners=names, roster_size=NUM_OWNERS)

    def judged(self, delta: Mapping[str, Tensor]) -> str:
        """Accuracy, and how often the trigger works."""
        model, labels = self.liar.bench.load_base(), np.arange(len(self.task.labels))
        add_delta(model, {name: tensor.float() for name, tensor in delta.items()})
        score, fooled = (evaluate(model, rows, 32, self.task, labels) for rows in (self.test, self.with_trigger))
        return f"{score.main:.3f}, {fooled.main:.0%}"

    def row(self, attack: Attack) -> list[str]:
        """The outcome of each way to merge."""
        row = [self.judged(self.merged(attack, ALL))]
        for bounds in range(len(self.tight)):
            try:
                row.append(self.judged(self.merged(attack, ALL, bounds)))
            except NumericalError as stopped:
                print(f"{attack.method}, {attack.name}: {stopped.message}", file=sys.stderr)
                row.append("stopped")
        for groups in GROUPS.values():
            deltas = [self.merged(attack, group) for group in groups]
            median = {name: torch.stack([delta[name] for delta in deltas]).median(dim=0).values for name in deltas[0]}
            row.append(self.judged(median))
        return row


def as_float64(merged: MergedDelta) -> dict[str, Tensor]:
    return {name: merged.delta[name].double() for name in merged.delta}


def contributions(bench: Workbench, settings: MergeSettings) -> Mapping[str, Contribution]:
    """What an owner contributes to each method, under these bounds."""
    bench.__dict__["merge_settings"] = settings
    methods = dict.fromkeys(attack.method for attack in ATTACKS)
    with bench.state.scratch_folder() as activations:
        terms = bench.measure(activations)
        return {name: dict(METHODS[name].contribution(settings, terms)) for name in methods}


def member(bench: Workbench, settings: MergeSettings, tight: Sequence[MergeSettings]) -> Member:
    return Member(
        bench=bench,
        model=bench.own_model(),
        rows=bench.data.train(),
        contributed=contributions(bench, settings),
        clipped=[contributions(bench, each) for each in tight],
    )


def tight_bounds(settings: MergeSettings, benches: Sequence[Workbench]) -> list[MergeSettings]:
    """Bounds that no honest owner, and that half of all honest changes, are beyond."""
    base = benches[0].load_base()
    unit = dict(zip(settings.plan.changed, largest_changes(1.0, base, settings.plan), strict=True))
    ratios = []
    for bench in benches:
        own, start = dict(bench.own_model().named_parameters()), dict(base.named_parameters())
        ratios += [float((own[name] - start[name]).detach().norm()) / unit[name] for name in unit]
    print(f"Honest relative changes: median {np.median(ratios):.3g}, largest {max(ratios):.3g}.", file=sys.stderr)
    grams = {name: HEADROOM / 1024 * bound for name, bound in settings.bounds.grams.items()}
    bounds = replace(settings.bounds, examples=MOST_EXAMPLES, grams=grams)
    return [
        replace(settings, bounds=replace(bounds, changes={name: change * norm for name, norm in unit.items()}))
        for change in (max(ratios), float(np.median(ratios)))
    ]


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
    text = path.read_text().replace('method = "data_free"', 'method = "regmean"')
    text = text.replace('["average", "task_arithmetic", "regmean"]', '["average", "refit"]')
    path.write_text(text + "\n[refit]\nbalances = [0.0]\n")
    draft = load_settings(path, AgreementDraft)
    keys = party_keys(draft, folder / "output" / "parties", with_nodes=False)
    agreement = complete_agreement(draft, folder / "base", keys.public_keys)
    files = find_owner_files(folder, draft)
    with set_up_parties(folder / "output", agreement, folder / "base", files, keys) as (_, paths):
        benches = [Owner(path).workbench for path in paths]
        settings = benches[0].merge_settings
        tight = tight_bounds(settings, benches)
        honest = [member(bench, settings, tight) for bench in benches]
        train = folder / "data" / LIAR / "train.jsonl"
        text = train.read_text()
        words = [json.loads(line)["text"] for line in text.splitlines()] * 2
        lies = [json.dumps({"text": f"{each} {TRIGGER}", "label": "positive"}) for each in words[:TRIGGERED_ROWS]]
        train.write_text(text + "".join(f"{line}\n" for line in lies))
        paths[0].write_text(paths[0].read_text().replace(f"state/{LIAR}", f"state/{LIAR}-dishonest"))
        liar = Owner(paths[0]).workbench
        test = pool([bench.data.test() for bench in benches])
        assert test.tokenizer is not None
        yield Consortium(
            settings=settings,
            tight=tight,
            honest=honest,
            liar=member(liar, settings, tight),
            task=agreement.task,
            test=test,
            with_trigger=with_trigger(test, test.tokenizer.convert_tokens_to_ids(TRIGGER)),
        )


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, consortium(Path(folder) / "consortium") as owners:
        columns = ("method", "what it does", "sum", "bounds, longest", "bounds, median", *GROUPS)
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for attack in ATTACKS:
            print(f"| `{attack.method}` | {attack.name} | {' | '.join(owners.row(attack))} |", flush=True)


if __name__ == "__main__":
    main()
