"""Three owners' language models, each of its own kind of text: merged, judged text by text, and taken apart.

For generative.py and tiny_language.py. DATA has the folders of KINDS with {train,dev,test}.jsonl (`text`). The merges
are the product's own, by a plain sum, so nothing is verified.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.formulas import inputs_of
from benchmarks.quality import candidates_kept
from client.data.private_data import PrivateData
from client.data.rows import IGNORED, Rows
from client.settings import Data
from common.agreement import Reading, Task
from common.models.delta import APPLIED
from deploy.simulation.simulate import simulate

KINDS = {"news": "topics/ag_news", "dialogue": "emotion/dailydialog", "life": "emotion/isear"}
NOBODY = {"tweets": "emotion/emoevent"}
TASK = Task(kind="causal-lm", max_tokens=40)
SCALES = (0.5, 1.0, 1.5, 2.0, 3.0)

Texts = NDArray[np.float64]  # (texts, 2): each text's log-likelihood in nats, and how many tokens were predicted
Scores = dict[str, Texts]  # by kind of text
Delta = dict[str, Tensor]  # by parameter
Sure = list[float]  # a difference in nats per token, and its standard error over texts


def rows_of(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PrivateData:
    return PrivateData(
        data=Data(train=Path("train.jsonl"), validation=Path("dev.jsonl"), test=Path("test.jsonl")),
        task=TASK,
        model=model,
        tokenizer=tokenizer,
        folder=folder,
        seed=0,
        reading=Reading(),
    )


def first(rows: Rows, count: int) -> Rows:
    return rows.take(np.arange(min(count, len(rows))))


class Clock:
    """Processor seconds of this process, by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        began = time.process_time()
        yield
        self.seconds[what] += round(time.process_time() - began)


class Mould:
    """The base model, which becomes any model that was made from it."""

    def __init__(self, base: PreTrainedModel) -> None:
        self._model = base
        self._start = {name: each.detach().clone() for name, each in base.named_parameters()}

    @torch.no_grad()
    def at(self, delta: Mapping[str, Tensor], scale: float = 1.0) -> PreTrainedModel:
        for name, start in self._start.items():
            moved = start + scale * delta[name].to(start.dtype) if name in delta else start
            self._model.get_parameter(name).copy_(moved)
        return self._model

    @torch.no_grad()
    def delta_of(self, model: PreTrainedModel) -> Delta:
        """What differs from the base."""
        found = {name: (each - self._start[name]).detach() for name, each in model.named_parameters()}
        return {name: each for name, each in found.items() if each.any()}


def merged_by_the_product(
    folder: Path,
    base: Path,
    models: Mapping[str, Path],
    data: Path,
    methods: Sequence[str],
    tables: Mapping[str, Mapping[str, Any]],
) -> dict[str, Delta]:
    """Every candidate of one run of all methods, by name. `data` has a folder for each owner's kind of text."""
    folder.mkdir()
    agreement = {
        "title": "Three kinds of text",
        "base": str(base.resolve()),
        "method": methods[0],
        "compare_with": list(methods[1:]),
        "weighting": "owners",
        "owners": [{"name": name} for name in models],
        "task": {"kind": TASK.kind, "max_tokens": TASK.max_tokens},
        "summation": {"kind": "plain"},
        **tables,
    }
    (folder / "agreement.toml").write_text(tomli_w.dumps(agreement))
    for name, model in models.items():
        files = {"train": "train", "validation": "dev", "test": "test"}
        settings = {
            "name": name,
            "fine_tuned": str(model.resolve()),
            "data": {split: str((data / KINDS[name] / f"{file}.jsonl").resolve()) for split, file in files.items()},
        }
        (folder / f"{name}.toml").write_text(tomli_w.dumps(settings))
    with candidates_kept() as kept:
        simulate(folder, with_references=False)
    found = {}
    for name, (layout, vector) in kept.items():
        sent = {each: torch.from_numpy(np.array(tensor)) for each, tensor in layout.unflatten(vector)}
        found[name] = sent | {each.removeprefix(APPLIED): sent[each] for each in sent if each.startswith(APPLIED)}
    return found


@torch.inference_mode()
def scores_of(models: Sequence[PreTrainedModel], tests: Mapping[str, Rows]) -> list[Scores]:
    """Of each model, and last of their mean prediction (of one model, the same again)."""
    found = [{kind: np.zeros((len(rows), 2)) for kind, rows in tests.items()} for _ in range(len(models) + 1)]
    for kind, rows in tests.items():
        for indices, batch, targets in rows.batches(8):
            kept = targets != IGNORED
            wanted, text = targets[kept], torch.from_numpy(indices)[:, None].expand_as(kept)[kept].numpy()
            each = [model(**batch).logits[kept].log_softmax(-1).gather(1, wanted[:, None])[:, 0] for model in models]
            mean = torch.stack(each).logsumexp(0) - np.log(len(models))
            for scores, nats in zip(found, [*each, mean], strict=True):
                np.add.at(scores[kind], text, np.stack([nats.double().numpy(), np.ones(len(nats))], axis=1))
    return found


def per_token(texts: Texts) -> float:
    nats, tokens = texts.sum(0)
    return float(nats / tokens)


def mean_per_token(scores: Scores, kinds: Iterable[str]) -> float:
    return float(np.mean([per_token(scores[kind]) for kind in kinds]))


def ahead(ours: Scores, theirs: Scores, kinds: Iterable[str]) -> Sure:
    """By how much in the mean over kinds, on the same texts; the error is that of ratios of sums over texts."""
    means, variances = [], []
    for kind in kinds:
        lead, tokens = ours[kind][:, 0] - theirs[kind][:, 0], ours[kind][:, 1]
        means.append(lead.sum() / tokens.sum())
        left = lead - means[-1] * tokens
        variances.append(len(left) / (len(left) - 1) * np.square(left).sum() / tokens.sum() ** 2)
    return [float(np.mean(means)), sqrt(sum(variances)) / len(means)]


@dataclass(frozen=True)
class Owned:
    """The owners' own models, judged."""

    scores: Mapping[str, Scores]  # by owner

    def elsewhere(self, kind: str) -> Texts:
        """Of texts of a kind, the mean over the models of owners whose kind it is not."""
        mean: Texts = np.mean([each[kind] for name, each in self.scores.items() if name != kind], axis=0)
        return mean

    @property
    def home(self) -> Scores:
        return {kind: self.scores[kind][kind] for kind in KINDS}

    @property
    def away(self) -> Scores:
        return {kind: self.elsewhere(kind) for kind in (*KINDS, *NOBODY)}

    def compared(self, scores: Scores, average: Scores) -> dict[str, Any]:
        """One model of all owners: beside their own models, and beside the average of their weights."""
        return {
            "log_likelihood": {kind: per_token(each) for kind, each in scores.items()},
            "over_own": {
                "at_home": ahead(scores, self.home, KINDS),
                "elsewhere": ahead(scores, self.away, KINDS),
                "nobody": ahead(scores, self.away, NOBODY),
            },
            "over_average": {"owners": ahead(scores, average, KINDS), "nobody": ahead(scores, average, NOBODY)},
        }

    def alone(self) -> dict[str, float]:
        return {
            "at_home": mean_per_token(self.home, KINDS),
            "elsewhere": mean_per_token(self.away, KINDS),
            "nobody": mean_per_token(self.away, NOBODY),
        }


def scaled(mould: Mould, merges: Mapping[str, Delta], tests: Mapping[str, Rows]) -> dict[str, Any]:
    """Log-likelihood per token of owners' and nobody's texts by merge, at each of SCALES of its change."""
    found: dict[str, Any] = {}
    for name, delta in merges.items():
        each = [scores_of([mould.at(delta, scale)], tests)[0] for scale in SCALES]
        found[name] = [[mean_per_token(scores, KINDS), mean_per_token(scores, NOBODY)] for scores in each]
    return found


def swapped(
    mould: Mould,
    own: Mapping[str, Delta],
    merges: Mapping[str, Delta],
    parts: Mapping[str, frozenset[str]],
    tests: Mapping[str, Rows],
) -> dict[str, dict[str, Sure]]:
    """By part and merge: what an owner's own model gains at home if it takes this part's parameters from the merge."""
    before = {name: scores_of([mould.at(own[name])], {name: tests[name]})[0][name] for name in KINDS}
    found: dict[str, dict[str, Sure]] = {}
    for part, names in parts.items():
        found[part] = {}
        for merge, delta in merges.items():
            after: Scores = {}
            for name in KINDS:
                taken = {each: tensor for each, tensor in delta.items() if each in names}
                after |= scores_of([mould.at(own[name] | taken)], {name: tests[name]})[0]
            found[part][merge] = ahead(after, before, KINDS)
    return found


def thirds_of(names: Iterable[str], count: int) -> dict[str, frozenset[str]]:
    """Parameters of a Llama's `count` blocks by third. None of its other names has a number."""
    numbers = {name: int(number) for name in names for number in name.split(".") if number.isdigit()}
    thirds = ("first third of the blocks", "middle third", "last third")
    return {
        third: frozenset(name for name, number in numbers.items() if number * 3 // count == index)
        for index, third in enumerate(thirds)
    }


@torch.inference_mode()
def interference(mould: Mould, own: Mapping[str, Delta], tests: Mapping[str, Rows]) -> dict[str, float]:
    """How far the owners' changes of linear layers mix, in the mean over owners (or pairs of them) and layers.

    `cosine` is that of two owners' changes. `loudness` is how large an owner's change makes the output for another
    owner's inputs, as a multiple of that other's own change: `data_free` takes it for small.
    """
    cosines, loudness = [], []
    for name in KINDS:
        model = mould.at(own[name])
        layers = {
            each: module
            for each, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and f"{each}.weight" in own[name]
        }
        squares: defaultdict[tuple[str, str], float] = defaultdict(float)

        def see(layer: str, inputs: Tensor, squares: defaultdict[tuple[str, str], float] = squares) -> None:
            for owner, delta in own.items():
                squares[owner, layer] += float((inputs @ delta[f"{layer}.weight"].T).square().sum())

        with inputs_of(layers, see):
            for text in range(len(tests[name])):  # alone, so that there is no padding
                model(**tests[name].batch(np.array([text]))[0])
        for other in own.keys() - {name}:
            loudness += [sqrt(squares[other, layer] / squares[name, layer]) for layer in layers]
            cosines += [_cosine(own[name][f"{layer}.weight"], own[other][f"{layer}.weight"]) for layer in layers]
    return {"cosine": float(np.mean(cosines)), "loudness": float(np.mean(loudness))}


def _cosine(left: Tensor, right: Tensor) -> float:
    return float((left * right).sum() / (left.norm() * right.norm()))


def kept(delta: Mapping[str, Tensor], own: Mapping[str, Delta]) -> float:
    """How much of an owner's change of matrices a merge has, 1 if all: its part along it, in the mean over both."""
    shares = [
        float((delta[name] * each).sum() / each.square().sum())
        for changes in own.values()
        for name, each in changes.items()
        if each.ndim == 2
    ]
    return float(np.mean(shares))


def comparison_table(found: Mapping[str, Any]) -> list[str]:
    """What `Owned.compared` and `Owned.alone` say of a base, own models, their ensemble and merges."""
    lines = [
        "| model | owners' texts | nobody's | over own at home | over own on the others' texts | over own on nobody's "
        "| over the average, owners' texts | nobody's |",
        "|" + "---|" * 8,
    ]
    for name, each in found["models"].items():
        owners = np.mean([each["log_likelihood"][kind] for kind in KINDS])
        nobody = np.mean([each["log_likelihood"][kind] for kind in NOBODY])
        differences = [*each["over_own"].values(), *each["over_average"].values()]
        cells = [told(*difference) for difference in differences]
        lines.append(f"| {name} | {owners:.3f} | {nobody:.3f} | {' | '.join(cells)} |")
    own = found["own"]
    lines += [
        "",
        f"Own models alone: {own['at_home']:.3f} at home, {own['elsewhere']:.3f} on the other owners' texts, "
        f"{own['nobody']:.3f} on nobody's.",
    ]
    return lines


def told(difference: float, error: float) -> str:
    return "0" if difference == error == 0 else f"{difference:+.3f} ± {error:.3f}"


def mixing(found: Mapping[str, Any]) -> list[str]:
    """What `interference` and `kept` say."""
    shares = ", ".join(f"{name} {share:.2f}" for name, share in found["kept"].items())
    return [
        f"Two owners' changes of a layer have a cosine of {found['cosine']:.2f}. On an owner's inputs, what another "
        f"owner's change adds to the output is {found['loudness']:.2f} times as large as what its own change adds.",
        "",
        f"How much of an owner's change a merge has along it: {shares}.",
    ]


def scale_table(found: Mapping[str, Any]) -> list[str]:
    lines = [f"| merge | {' | '.join(f'{scale:g}' for scale in SCALES)} |", "|" + "---|" * (len(SCALES) + 1)]
    for name, each in found.items():
        lines.append(f"| {name} | {' | '.join(f'{owners:.3f} / {nobody:.3f}' for owners, nobody in each)} |")
    return lines


def part_table(found: Mapping[str, Mapping[str, Sure]]) -> list[str]:
    merges = list(next(iter(found.values())))
    lines = [f"| part | {' | '.join(merges)} |", "|" + "---|" * (len(merges) + 1)]
    return lines + [
        f"| {part} | {' | '.join(told(*each[merge]) for merge in merges)} |" for part, each in found.items()
    ]
