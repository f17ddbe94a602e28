"""What a run tells: `report.json`, and `report.html` made from it alone.

report.json, `report_version` 1:
    title, method, summation, seconds          what was run, how it was summed, how long the run took
    owners, lost                               names of those in the merged model; of those lost, with the step
    chosen.<method>                            candidate and knob that the sweep chose
    evaluation.figure                          what FIGURE is below: macro_f1, entity_f1 or log_likelihood
    evaluation.mean.<model>                    accuracy, FIGURE: means over owners, every owner counts alike;
                                               pooled_accuracy, rows: every prediction counts alike; on test rows
    evaluation.by_owner.<owner>.<model>        accuracy, FIGURE, rows; owners with figures = "summed" are not here
    evaluation.sweep.<method>                  candidate, accuracy, FIGURE on validation rows
    layers[]                                   per Gram of the published model: name, status, d_in, gram_size (1 more if
                                               biases are solved too), rows (null: a data-free Gram), condition,
                                               effective_rank, unseen_directions
    tensors                                    merged (groups that share an input), data_free, averaged, left_alone,
                                               by name
    low_rank                                   of a model published as an adapter: rank; layers[], per weight its name
                                               and relative_error, |cut off| / |delta| in Frobenius norms; the same of
                                               all of them together; dropped, the share of the whole delta's norm
                                               that no adapter holds (embeddings, norms, biases). Else null
    notes[]                                    what a reader should know about the solves
    advice[]                                   what a reader might do differently next time
    steps[]                                    name, seconds, bytes_sent, bytes_received (payloads, all owners)
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
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from transformers import PreTrainedModel

from common.errors import SettingsError
from common.low_rank import LowRank
from common.metrics import MeanScore, Score
from common.models import digest_of

if TYPE_CHECKING:
    from server.merge import Outcome

REPORT_VERSION = 1
LIBRARIES = ("amalgram", "flwr", "torch", "transformers", "numpy")


def write_report(outcome: Outcome, merged: PreTrainedModel, seconds: float, output: Path) -> None:
    """Write OUT/report.json, last of all: where it stands, the run is done."""
    save_report(_report(outcome, merged, seconds), output)


def save_report(report: dict[str, Any], output: Path) -> None:
    """Write OUT/report.json whole or not at all."""
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
        raise SettingsError(f"{path}: report_version is {report.get('report_version')}, this reads {REPORT_VERSION}")
    return report


def agreement_of_report(output: Path) -> str | None:
    """The digest of the agreement that OUT/report.json is of; None where there is none, or of another version."""
    try:
        return str(read_report(output)["digests"]["agreement"])
    except SettingsError:
        return None


def render_report(output: Path) -> Path:
    """Make OUT/report.html from OUT/report.json: one file, no script, nothing fetched."""
    report = read_report(output)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = output / "report.html"
    page.write_text(environment.get_template("report.html.jinja").render(report=report))
    return page


def mean_figures(score: MeanScore, figure: str) -> dict[str, Any]:
    return {
        "accuracy": score.accuracy,
        figure: score.figure,
        "pooled_accuracy": score.pooled_accuracy,
        "rows": score.rows,
    }


def own_figures(score: Score, figure: str) -> dict[str, Any]:
    return {"accuracy": score.correct / score.rows, figure: score.figure, "rows": score.rows}


def _report(outcome: Outcome, merged: PreTrainedModel, seconds: float) -> dict[str, Any]:
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
        "owners": list(outcome.owners),
        "lost": outcome.coordinator.lost,
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
                    {"candidate": name, "accuracy": score.accuracy, figure: score.figure}
                    for name, score in choice.sweep.items()
                ]
                for method, choice in outcome.choices.items()
                if choice.sweep
            },
        },
        "layers": [vars(layer) for layer in published.layers],
        "low_rank": _low_rank(published.low_rank),
        "tensors": agreement.tensors.model_dump(mode="json"),
        "notes": notes,
        "advice": _advice(outcome, mean),
        "steps": [{**vars(step), "seconds": round(step.seconds, 3)} for step in outcome.coordinator.steps],
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
