"""What models, tasks and metrics are called, and numbers as people read them.

A method's words come from its descriptor, by way of the report (`title_of`, `phrase_of`, `summary_of`).
"""

from common.page.words import percent
from server.report.report import Report

MODELS = {  # everything else that a report compares: title, phrase, summary
    "base": ("base", "the base model", "the base model, before anybody fine-tuned it"),
    "own_at_home": (
        "own at home",
        "each owner's own model at home",
        "each owner's own model on its own rows: what an owner has at home without a merge",
    ),
    "own": (
        "own",
        "an owner's own model on everybody's rows",
        "the owners' own models on everybody's rows: what an owner has elsewhere without a merge",
    ),
    "ensemble": (
        "ensemble",
        "the ensemble of all own models",
        "a reference: the mean of all own models' probabilities, which needs every model in one place",
    ),
    "close_ensemble": (
        "SMC",
        "Synthetic Model Combination",
        "a reference: the same mean, in which a model counts by how close a row is to its owner's own",
    ),
    "multi_task": (
        "multi-task",
        "training on everybody's data",
        "a reference: the base fine-tuned on all rows, which needs all data in one place",
    ),
}
TASKS = {
    "text-classification": "text classification",
    "token-classification": "token classification",
    "causal-lm": "language modelling",
    "sequence-to-sequence": "text to text",
    "image-classification": "image classification",
}
SCORED = {  # what a model does with its test rows, and how another one is compared with it
    "text-classification": ("is right on {} of the test rows", "on {}"),
    "image-classification": ("is right on {} of the test rows", "on {}"),
    "token-classification": ("tags {} of the test words correctly", "{}"),
    "causal-lm": ("predicts {} of the test tokens correctly", "{}"),
    "sequence-to-sequence": ("predicts {} of the test tokens correctly", "{}"),
}
ACCURACY = {  # the same as a heading
    "text-classification": "accuracy on test rows",
    "image-classification": "accuracy on test rows",
    "token-classification": "accuracy per word of test rows",
    "causal-lm": "accuracy per token of test rows",
    "sequence-to-sequence": "accuracy per token of test rows",
}
SEVERAL_LABELS = ("names exactly the right labels of {} of the test rows", "of {}")
NUMBERS = ("correlates with the targets at {} (Pearson's r)", "at {}")
LABELLED = ("text-classification", "token-classification", "image-classification")  # the others have a vocabulary
TOKEN_TASKS = ("token-classification", "causal-lm", "sequence-to-sequence")  # many predictions on one text
METRICS = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "entity_f1": "entity F1",
    "log_likelihood": "log likelihood",
    "pearson_r": "Pearson's r",
    "mean_squared_error": "mean squared error",
    "worst_group": "accuracy in the worst group",
}


def is_regression(report: Report) -> bool:
    """Whether the model predicts numbers: it is judged over all rows together, and compared by a correlation."""
    return report.agreement.task.problem_type == "regression"


def is_over_all_rows(report: Report) -> bool:
    """Whether metrics are over all owners' rows together, and not means in which every owner counts alike."""
    return is_regression(report) or report.agreement.privacy.epsilon is not None


def noise_on_metrics(report: Report) -> float:
    """The standard deviation of what owners added to the sums behind each metric; 0 without privacy.epsilon."""
    return next((leg.added or 0.0 for leg in report.agreement.privacy.legs if leg.name == "metrics"), 0.0)


def noise_in_words(report: Report) -> str:
    """How far noise moves a metric, in a sentence; empty without privacy.epsilon."""
    noise, rows = noise_on_metrics(report), report.evaluation.mean[report.method].predictions
    if not noise:
        return ""
    return (
        f"These metrics have noise: the owners added some, with a standard deviation of {noise:.3g}, to each sum over "
        f"{rows} examples, which moves an accuracy by {noise / rows:.2g} in the mean. Rarer labels are left out of a "
        "macro F1."
    )


def has_several_labels(report: Report) -> bool:
    return report.agreement.task.problem_type == "multi_label_classification"


def task_in_words(report: Report) -> str:
    """What the model is for."""
    task = report.agreement.task
    what = "texts" if task.kind == "text-classification" else "images"
    if is_regression(report):
        return f"predicting numbers from {what}"
    return f"{what} with several labels each" if has_several_labels(report) else TASKS[task.kind]


def scored_in_words(report: Report) -> tuple[str, str]:
    """What a model does with its test rows, and how another one is compared with it."""
    if is_regression(report):
        return NUMBERS
    return SEVERAL_LABELS if has_several_labels(report) else SCORED[report.agreement.task.kind]


def main_metric(report: Report) -> str:
    """What models are compared by, in a word or two."""
    return METRICS["pearson_r" if is_regression(report) else "accuracy"]


def main_heading(report: Report) -> str:
    """The same as a heading."""
    if is_regression(report):
        return "Pearson's r on test rows"
    if has_several_labels(report):
        return "share of test rows with exactly the right labels"
    return ACCURACY[report.agreement.task.kind]


def cut_in_words(report: Report) -> str:
    """How many test texts were cut, over all owners; empty if none was, or if they are images."""
    cut, texts = report.evaluation.cut or (0, 0)
    if not cut:
        return ""
    return f"{percent(cut / texts)} of the owners' test texts are longer than task.max_tokens, and were cut."


def groups_in_words(report: Report) -> str:
    """How the published model does in the group where it does worst, in a sentence; empty without groups."""
    groups, group = report.evaluation.mean[report.method].groups, report.evaluation.mean[report.method].worst_group
    if group is None:
        return ""
    worst, others = groups[group], len(groups) - 1
    whose = "one owner" if worst.owners == 1 else f"{worst.owners} owners"
    beside = f", the lowest of {len(groups)} groups" if others else ""
    return f"It is right on {percent(worst.accuracy)} of the {worst.rows} test rows of {group} at {whose}{beside}."


def as_main(report: Report, value: float) -> str:
    """A number that models are compared by, in a sentence."""
    return f"{value:.3f}" if is_regression(report) else percent(value)


def title_of(report: Report, model: str) -> str:
    """A model's name in a table, as it reads in mid-sentence."""
    return MODELS[model][0] if model in MODELS else report.methods[model].title


def phrase_of(report: Report, model: str) -> str:
    """What a sentence compares the merged model with."""
    return MODELS[model][1] if model in MODELS else report.methods[model].phrase


def summary_of(report: Report, model: str) -> str:
    return MODELS[model][2] if model in MODELS else report.methods[model].summary


def models_in(report: Report) -> list[str]:
    """The report's models in the order in which people compare them, the merged one first."""
    order = [report.method, "base", "own_at_home", "own", *report.methods, "ensemble", "close_ensemble", "multi_task"]
    return [model for model in dict.fromkeys(order) if model in report.evaluation.mean]


def judges_of(report: Report) -> tuple[str, ...]:
    """The owners whose test metrics are in the means: those in the merged model, unless they dropped out later."""
    return next((each.owners for each in report.rounds if each.split == "test"), report.owners)
