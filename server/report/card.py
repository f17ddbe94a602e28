"""OUT/model/README.md: a Hugging Face model card, made from the report and from what the base's own card says."""

import html
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.models.loading import AUTO_CLASSES
from server.report.words import FIGURES, METHODS, MODELS, TASKS, listed, models_in, percent

CARD = "README.md"
PIPELINES = {
    "text-classification": "text-classification",
    "token-classification": "token-classification",
    "causal-lm": "text-generation",
    "sequence-to-sequence": "text2text-generation",
    "image-classification": "image-classification",
}
METRICS = {"macro_f1": ["accuracy", "f1"], "entity_f1": ["accuracy", "f1"], "log_likelihood": ["accuracy"]}


def write_model_card(report: dict[str, Any], base_folder: Path, folder: Path) -> None:
    """Write the card of the model in `folder`. `base_folder`: the base's files, whose card names its licence."""
    task = report["agreement"]["task"]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"markdown": _markdown, "percent": percent, "listed": listed}
    body = environment.get_template("model_card.jinja.md").render(
        report=report,
        task=task,
        base=_hub_name(report, base_folder),
        body_only=task["head"] == "private",
        adapter=report["low_rank"],
        auto_class=AUTO_CLASSES[task["kind"]].__name__,
        pipeline=PIPELINES[task["kind"]],
        models=[model for model in models_in(report) if model not in ("own", "ensemble", "multi_task")],
        metadata=metadata(report, base_folder),
        names=MODELS,
        methods=METHODS,
        tasks=TASKS,
        figures=FIGURES,
    )
    (folder / CARD).write_text(f"---\n{metadata(report, base_folder).to_yaml()}\n---\n\n{body}")


def metadata(report: dict[str, Any], base_folder: Path) -> ModelCardData:
    """What the hub reads; what is not known is left out."""
    task = report["agreement"]["task"]
    body_only = task["head"] == "private"
    features = "image-feature-extraction" if task["kind"] == "image-classification" else "feature-extraction"
    return ModelCardData(
        base_model=_hub_name(report, base_folder),
        library_name="peft" if report["low_rank"] else "transformers",
        pipeline_tag=features if body_only else PIPELINES[task["kind"]],
        tags=["merge", "amalgram", report["method"].replace("_", "-"), *(["lora"] if report["low_rank"] else [])],
        metrics=METRICS[report["evaluation"]["figure"]],
        **_licence(base_folder),
    )


def _licence(base_folder: Path) -> dict[str, Any]:
    """The licence that the base's own card names; nothing where it has no card, or one that does not tell."""
    if not (base_folder / CARD).is_file():
        return {}
    data = ModelCard.load(base_folder / CARD, ignore_metadata_errors=True).data
    fields = ("license", "license_name", "license_link")
    return {field: str(getattr(data, field)) for field in fields if getattr(data, field, None)}


def _hub_name(report: dict[str, Any], base_folder: Path) -> str | None:
    """The base's name on the hub, where its files came from there; None of a folder of the owners' own."""
    name: str = report["agreement"]["base"]
    return name if f"models--{name.replace('/', '--')}" in base_folder.parts else None


def _markdown(text: str) -> str:
    """Somebody's words as words: neither markup nor a line of its own."""
    return re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
