"""What a run tells: `report.json`. The page (page.py) is made from it alone, the model card (model_card.py) too.

report.json, `report_version` 2:
    title, method, summation, seconds          what was run, how it was summed, how long the run took
    simulated                                  whether all parties were on one machine, in one pair of hands
    owners, lost                               names of those in the merged model; of those lost, with the step
    receipts                                   names of those that signed what was published
    agreement                                  the agreement, without bounds and tensors; its fingerprint
    base_parameters                            how many numbers the base model has
    chosen.<method>                            candidate and knob that the sweep chose
    evaluation.figure                          what FIGURE is below: macro_f1, entity_f1 or log_likelihood
    evaluation.mean.<model>                    accuracy, FIGURE: means over owners, every owner counts alike;
                                               pooled_accuracy, rows: every prediction counts alike; on test rows
    evaluation.by_owner.<owner>.<model>        accuracy, FIGURE, rows; owners with figures = "summed" are not here
    evaluation.sweep.<method>                  candidate, knob, accuracy, FIGURE on validation rows
    layers[]                                   per Gram of the published model: name, status, d_in, gram_size (1 more if
                                               biases are solved too), rows (null: a data-free Gram), condition,
                                               effective_rank, unseen_directions
    changes[]                                  per Gram (or linear layer, where there is none) of the published model:
                                               name; change, |merged - base| / |base|; from_average,
                                               |merged - average| / |average - base| where the average was computed,
                                               else null; Frobenius norms of the layers that share it
    tensors                                    merged (groups that share an input), data_free, averaged, left_alone,
                                               by name
    low_rank                                   of a model published as an adapter: rank; layers[], per weight its name
                                               and relative_error, |cut off| / |delta| in Frobenius norms; the same of
                                               all of them together; dropped, the share of the whole delta's norm
                                               that no adapter holds (embeddings, norms, biases). Else null
    notes[]                                    what a reader should know about the solves
    advice[]                                   what a reader might do differently next time
    sums[]                                     what the coordinator learned, per sum in order: statistic; owners whose
                                               numbers are in it; numbers, how many each sent; contents[], each its
                                               kind, meaning, numbers and tensors (names); destroyed, whether the
                                               coordinator's program overwrote the total
    sent[]                                     what owners received, in order: model, split, digest, bytes, owners
    steps[]                                    name, seconds, bytes_sent, bytes_received (payloads, all owners);
                                               by_owner.<owner>: waited_seconds, messages (to the owner),
                                               bytes_sent, bytes_received
    examples                                   training rows, summed over owners
    digests                                    agreement, base, model
    versions                                   of the libraries that computed this

Models: `base`; `own_at_home`, each owner's own model on its own rows; one per method, under the method's name. A
simulation, which has everything in one place, adds references that no real run can have: `own`, each owner's own model
on every owner's rows; `ensemble`, the mean of the own models' probabilities; `multi_task`, the base fine-tuned on the
pooled rows.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.contents import CONTRIBUTIONS, FIGURES, contribution_kind, figure_kind
from common.errors import SettingsError
from common.identity import fingerprint
from common.merge_methods import candidates
from common.metrics import MeanScore, Score
from common.models.layers import Layer
from common.models.loading import digest_of
from common.models.low_rank import LowRank
from common.models.plan import MergePlan

if TYPE_CHECKING:
    from server.coordinator import Coordinator, OpenedSum
    from server.merge import Outcome

REPORT_VERSION = 2
FIGURE_SUMS = ("validation", "test")
LIBRARIES = ("amalgram", "flwr", "torch", "transformers", "numpy")


def save_report(report: dict[str, Any], output: Path) -> None:
    """Write OUT/report.json whole or not at all; last of all, for where it stands, the run is done."""
    partial = output / "report.json.partial"
    partial.write_text(json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    partial.replace(output / "report.json")


def read_report(output: Path) -> dict[str, Any]:
    """OUT/report.json. Raises SettingsError when there is none, or one of another version."""
    path = output / "report.json"
    if not path.is_file():
        raise SettingsError(f"{path}: no such file; a run that ended well writes it")
    report: dict[str, Any] = json.loads(path.read_text())
    if report.get("report_version") != REPORT_VERSION:
        raise SettingsError(
            f"{path}: report_version is {report.get('report_version')}, this reads {REPORT_VERSION}; "
            "run the merge again, or read it with the release that wrote it"
        )
    return report


def agreement_of_report(output: Path) -> str | None:
    """The digest of the agreement that OUT/report.json is of; None where there is none, or of another version."""
    try:
        return str(read_report(output)["digests"]["agreement"])
    except SettingsError:
        return None


def mean_figures(score: MeanScore, figure: str) -> dict[str, Any]:
    return {
        "accuracy": score.accuracy,
        figure: score.figure,
        "pooled_accuracy": score.pooled_accuracy,
        "rows": score.rows,
    }


def own_figures(score: Score, figure: str) -> dict[str, Any]:
    return {"accuracy": score.correct / score.rows, figure: score.figure, "rows": score.rows}


def make_report(outcome: Outcome, merged: PreTrainedModel, seconds: float) -> dict[str, Any]:
    """The report of a run that published `merged`, base + delta."""
    agreement, figure = outcome.agreement, outcome.agreement.task.figure
    method_of = {choice.name: method for method, choice in outcome.choices.items()}
    test = {method_of.get(name, name): score for name, score in outcome.test.items()}
    published = outcome.solutions[agreement.method]
    notes = [f"{method}: {note}" for method, solution in outcome.solutions.items() for note in solution.notes]
    mean = {name: mean_figures(score, figure) for name, score in test.items()}
    return {
        "report_version": REPORT_VERSION,
        "title": agreement.title,
        "method": agreement.method,
        "summation": agreement.summation.kind,
        "seconds": round(seconds, 3),
        "simulated": False,
        "owners": list(outcome.owners),
        "lost": outcome.coordinator.lost,
        "receipts": list(outcome.coordinator.receipts),
        "agreement": agreement.model_dump(mode="json", exclude={"bounds", "tensors"})
        | {"fingerprint": fingerprint(bytes.fromhex(agreement.digest()))},
        "base_parameters": sum(parameter.numel() for parameter in merged.parameters()),
        "chosen": {
            method: {"candidate": choice.name, "knob": choice.knob} for method, choice in outcome.choices.items()
        },
        "evaluation": {
            "choose_by": agreement.evaluation.choose_by,
            "figure": figure,
            "label_set": agreement.task.label_set,
            "mean": mean,
            "by_owner": {
                owner: {name: own_figures(score.by_owner[owner], figure) for name, score in test.items()}
                for owner in agreement.shown_owners
                if all(owner in score.by_owner for score in test.values())
            },
            "sweep": {
                method: [
                    {
                        "candidate": name,
                        "knob": candidates(agreement, method)[name],
                        "accuracy": score.accuracy,
                        figure: score.figure,
                    }
                    for name, score in choice.sweep.items()
                ]
                for method, choice in outcome.choices.items()
                if choice.sweep
            },
        },
        "layers": [vars(layer) for layer in published.layers],
        "changes": list(_changes(outcome, merged)),
        "low_rank": _low_rank(published.low_rank),
        "tensors": agreement.tensors.model_dump(mode="json"),
        "notes": notes,
        "advice": _advice(outcome, mean),
        "sums": [_opened_sum(each) for each in outcome.coordinator.sums],
        "sent": [asdict(candidate) for candidate in outcome.coordinator.checkpoint.candidates],
        "steps": list(_steps(outcome.coordinator)),
        "examples": outcome.examples,
        "digests": {
            "agreement": agreement.digest(),
            "base": agreement.base_digest,
            "model": digest_of(merged, agreement.task),
        },
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
    }


def _low_rank(low_rank: LowRank | None) -> dict[str, Any] | None:
    if low_rank is None:
        return None
    return {
        "rank": low_rank.plan.rank,
        "relative_error": low_rank.relative_error,
        "dropped": low_rank.dropped,
        "layers": [vars(layer) for layer in low_rank.layers],
    }


def _changes(outcome: Outcome, merged: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """How far the published model is from both sides that are known here: the base, and the owners' average."""
    delta = outcome.solutions[outcome.agreement.method].delta
    average = outcome.solutions["average"].delta if "average" in outcome.solutions else None
    weights = dict(merged.named_parameters())
    for name, layers in _groups(outcome.plan, outcome.agreement.method).items():
        change = _stacked(layers, delta)
        base = _stacked(layers, weights) - change
        from_average = None
        if average is not None:
            mean = _stacked(layers, average)
            from_average = _ratio(change - mean, mean)
        yield {"name": name, "change": _ratio(change, base), "from_average": from_average}


def _groups(plan: MergePlan, method: str) -> dict[str, tuple[Layer, ...]]:
    """The layers behind each entry of `layers`; single linear layers where no Gram is shared."""
    shared = {each.name: each.layers for each in plan.inputs}
    single: dict[str, tuple[Layer, ...]] = {
        layer.weight.removesuffix(".weight"): (layer,) for layer in plan.linear_layers
    }
    if method == "data_free" or not shared:
        return single
    return shared | {layer.weight.removesuffix(".weight"): (layer,) for layer in plan.data_free}


def _stacked(layers: tuple[Layer, ...], tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([layer.take(tensors).detach().double().flatten() for layer in layers])


def _ratio(part: Tensor, whole: Tensor) -> float | None:
    norm = float(whole.norm())
    return float(part.norm()) / norm if norm > 0 else None


def _opened_sum(opened: OpenedSum) -> dict[str, Any]:
    figures = opened.statistic in FIGURE_SUMS
    meanings, kind_of = (FIGURES, figure_kind) if figures else (CONTRIBUTIONS, contribution_kind)
    contents: dict[str, dict[str, Any]] = {}
    for entry in opened.layout.entries:
        kind = kind_of(entry.name)
        meaning = meanings[kind].format(their="the owner's")
        content = contents.setdefault(kind, {"kind": kind, "meaning": meaning, "numbers": 0, "tensors": []})
        content["numbers"] += entry.size
        content["tensors"].append(entry.name)
    return {
        "statistic": opened.statistic,
        "owners": list(opened.owners),
        "numbers": opened.layout.size,
        "contents": list(contents.values()),
        "destroyed": opened.destroyed,
    }


def _steps(coordinator: Coordinator) -> Iterator[dict[str, Any]]:
    for step in coordinator.steps:
        yield {
            "name": step.name,
            "seconds": round(step.seconds, 3),
            "bytes_sent": step.bytes_sent,
            "bytes_received": step.bytes_received,
            "by_owner": {
                owner: asdict(cost) | {"waited_seconds": round(cost.waited_seconds, 3)}
                for owner, cost in step.by_owner.items()
            },
        }


def _advice(outcome: Outcome, mean: dict[str, dict[str, Any]]) -> list[str]:
    """What a reader would do differently next time."""
    agreement, figure = outcome.agreement, outcome.agreement.evaluation.choose_by
    published, advice = mean[agreement.method][figure], []
    best = max(agreement.methods, key=lambda method: mean[method][figure])
    if mean[best][figure] > published:
        advice.append(
            f"{best} did better than {agreement.method} on the test rows ({figure.replace('_', ' ')} "
            f'{mean[best][figure]:.3f} to {published:.3f}); method = "{best}" would publish it'
        )
    for choice in outcome.choices.values():
        tried = list(choice.sweep)
        if len(tried) > 2 and choice.name in (tried[0], tried[-1]) and choice.knob not in (0.0, 1.0):
            advice.append(f"{choice.name} is at the end of its sweep; values beyond it may do better")
    return advice
