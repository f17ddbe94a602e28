"""Words that the page and the model card share: what models, methods and figures are called, and numbers as people
read them.
"""

from typing import Any

METHODS = {
    "average": "Average",
    "task_arithmetic": "Task arithmetic",
    "fisher": "Fisher",
    "data_free": "Data-free",
    "regmean": "RegMean",
    "refit": "refit",
    "regmean_plus_plus": "RegMean++",
}
MODELS = {
    "base": "Base",
    "own_at_home": "Own at home",
    "own": "Own",
    **METHODS,
    "ensemble": "Ensemble",
    "multi_task": "Multi-task",
}
EXPLAINED = {
    "base": "the base model as it was, before anybody fine-tuned it",
    "own_at_home": "each owner's own model on its own rows: what an owner has without a merge, at home",
    "own": "the owners' own models on everybody's rows, averaged: what an owner has without a merge, elsewhere",
    "average": "the plain mean of the owners' weights",
    "task_arithmetic": "the base plus a multiple of the owners' mean change",
    "fisher": "the mean of the weights, each weighted by its Fisher information",
    "data_free": "least squares with Gram matrices made of weight changes alone",
    "regmean": "least squares with the summed Gram matrices of the layers' inputs",
    "refit": "A body merged in one sum, then the classifier fitted anew on it",
    "regmean_plus_plus": "RegMean, layer after layer on the inputs that the merged model makes",
    "ensemble": "a reference: the mean of all own models' probabilities, which needs every model in one place",
    "multi_task": "a reference: the base fine-tuned on all rows, which needs everybody's data in one place",
}
TASKS = {
    "text-classification": "text classification",
    "token-classification": "token classification",
    "causal-lm": "language modelling",
    "sequence-to-sequence": "text to text",
    "image-classification": "image classification",
}
FIGURES = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "entity_f1": "entity F1",
    "log_likelihood": "log likelihood",
}


def percent(share: float) -> str:
    return f"{100 * share:.1f}\u00a0%"


def size(count: float) -> str:
    """Bytes, as people read them."""
    for unit, bytes_per_unit in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= bytes_per_unit:
            return f"{count / bytes_per_unit:.1f}\u00a0{unit}"
    return f"{count:.0f}\u00a0bytes"


def listed(names: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def models_in(report: dict[str, Any]) -> list[str]:
    """The report's models in the order in which people compare them, the merged one first."""
    return [report["method"], *(model for model in MODELS if model in _others(report))]


def _others(report: dict[str, Any]) -> set[str]:
    return set(report["evaluation"]["mean"]) - {report["method"]}
