"""OUT/model/README.md: a Hugging Face model card, made from the report and from the base model's own card."""

import html
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.agreement.tables import TaskKind
from common.models.loading import AUTO_CLASSES
from common.models.published_folder import HUB_NAME, IMAGE_PROCESSORS
from common.page.words import capitalised, listed, percent, safe
from common.publication import CARD
from common.text import MAX_LINE, flaw, is_web_address, shown
from server.report.outputs import by_output
from server.report.report import Report
from server.report.words import (
    METRICS,
    is_regression,
    judges_of,
    main_metric,
    models_in,
    noise_in_words,
    task_in_words,
    title_of,
)

PIPELINES = {
    "text-classification": "text-classification",
    "token-classification": "token-classification",
    "causal-lm": "text-generation",
    "sequence-to-sequence": "text2text-generation",
    "image-classification": "image-classification",
}
HUB_METRICS = {
    "macro_f1": ["accuracy", "f1"],
    "entity_f1": ["accuracy", "f1"],
    "log_likelihood": ["accuracy"],
    "mean_squared_error": ["pearsonr", "mse"],
}
LICENCE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,99}")
REFERENCES = ("own", "ensemble", "close_ensemble", "multi_task")  # not on the card: only a simulation has them


def write_model_card(report: Report, base_folder: Path, folder: Path) -> None:
    """Write the card of the model in `folder`. `base_folder` holds the base's files; its card names the licence."""
    task = report.agreement.task
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=safe,
    )
    environment.filters |= {
        "markdown": _markdown,
        "code": _code,
        "percent": percent,
        "listed": listed,
        "capitalised": capitalised,
        "three": "{:.3f}".format,
    }
    body = environment.get_template("model_card.jinja.md").render(
        report=report,
        task=task,
        base=_hub_name(report, base_folder),
        is_body_only=task.head == "private",
        adapter=report.low_rank,
        # Not from report.dropped_out: the owners sign the card, so it must be the same after an interruption.
        dropped_out=[owner.name for owner in report.agreement.owners if owner.name not in report.owners],
        declaring=[owner.name for owner in report.agreement.owners if owner.declared is not None],
        auto_class=AUTO_CLASSES[task.kind],
        pipeline=PIPELINES[task.kind],
        has_pipeline=_has_pipeline(task.kind, folder),
        models=[model for model in models_in(report) if model not in REFERENCES],
        metadata=metadata(report, base_folder),
        num_judges=len(judges_of(report)),
        title_of=title_of,
        task_in_words=task_in_words(report),
        main_metric=main_metric(report),
        is_regression=is_regression(report),
        noise=noise_in_words(report),
        by_output=by_output(report),
        metric_names=METRICS,
    )
    (folder / CARD).write_text(f"---\n{metadata(report, base_folder).to_yaml()}\n---\n\n{body}")


def metadata(report: Report, base_folder: Path) -> ModelCardData:
    """What the hub reads. Unknown fields are left out."""
    task = report.agreement.task
    features = "image-feature-extraction" if task.kind == "image-classification" else "feature-extraction"
    return ModelCardData(
        base_model=_hub_name(report, base_folder),
        library_name="peft" if report.low_rank else "transformers",
        pipeline_tag=features if task.head == "private" else PIPELINES[task.kind],
        tags=["merge", "amalgram", report.method.replace("_", "-"), *(["lora"] if report.low_rank else [])],
        metrics=HUB_METRICS[report.evaluation.metric],
        **_licence(base_folder),
    )


def _has_pipeline(kind: TaskKind, folder: Path) -> bool:
    """Whether transformers has a pipeline for the task, and the folder what it prepares rows with."""
    if kind == "image-classification":
        return any((folder / name).is_file() for name in IMAGE_PROCESSORS)
    return kind != "sequence-to-sequence"


def _licence(base_folder: Path) -> dict[str, Any]:
    """The licence that the base's own card names; empty if it has no card or the card names none."""
    if not (base_folder / CARD).is_file():
        return {}
    try:
        data = ModelCard.load(base_folder / CARD, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # somebody else's YAML can make the library raise anything
        return {}
    checks = {
        "license": lambda text: LICENCE_ID.fullmatch(text) is not None,
        "license_name": lambda text: not flaw(text, MAX_LINE),
        "license_link": is_web_address,  # check: licence-link-is-a-web-address
    }
    found = {field: data.get(field) for field in checks}
    return {field: text for field, text in found.items() if isinstance(text, str) and checks[field](text)}


def _hub_name(report: Report, base_folder: Path) -> str | None:
    """The base's name on the hub if its files came from there; None if it is a folder of the owners' own."""
    name = report.agreement.base
    is_fetched = f"models--{name.replace('/', '--')}" in base_folder.parts
    return name if is_fetched and HUB_NAME.fullmatch(name) else None  # check: hub-name-is-one


def _markdown(text: str) -> str:
    """Escape somebody's words, so that they are neither markup nor a line of their own."""
    one_line = shown(" ".join(text.split()))
    return re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", html.escape(one_line, quote=False))  # check: markdown-is-escaped


def _code(text: str) -> str:
    """Somebody's words as code in a line."""
    return "`" + shown(text).replace("`", "'") + "`"
