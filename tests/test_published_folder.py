"""The published folder is complete: `pipeline(task, folder)` reads rows as the base's folder does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertForTokenClassification,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from common.agreement import Agreement, AgreementDraft, OwnerEntry, Task
from common.models.loading import load_base
from common.models.published_folder import published_folder, write_model
from deploy.complete import complete_agreement
from deploy.example.reviews import make_tokenizer
from tests.support.models import tiny_bert
from tests.support.parties import IDENTITIES

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
TEMPLATE = "{% for message in messages %}{{ message.content }} was {% endfor %}"
COUNTED = {str(number): name for number, name in enumerate("abc")}
LABELS: dict[str, Any] = {"id2label": COUNTED, "label2id": {name: int(number) for number, name in COUNTED.items()}}


def tagger() -> PreTrainedModel:
    return BertForTokenClassification(BertConfig(vocab_size=80, max_position_embeddings=32, **LABELS, **SIZES))


def language_model() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(vocab_size=80, max_position_embeddings=32, **SIZES))


def vision_model() -> PreTrainedModel:
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **LABELS, **SIZES))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "text-classification": tiny_bert,
    "token-classification": tagger,
    "causal-lm": language_model,
    "image-classification": vision_model,
}


def base_of(kind: str, folder: Path) -> Path:
    """A base with everything that people keep beside weights, and with code that nobody may publish."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        MODELS[kind]().save_pretrained(folder)
    code = {"auto_map": {"AutoProcessor": "poison.Processor"}, "custom_generate": "poison"}
    if kind == "image-classification":
        ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
        add_to(folder / "preprocessor_config.json", code)
    else:
        make_tokenizer().save_pretrained(folder)
        add_to(folder / "tokenizer_config.json", code)
    if kind == "causal-lm":
        GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0).save_pretrained(folder)
        add_to(folder / "generation_config.json", code)
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "poison.py").write_text("raise SystemExit")
    (folder / "notes.txt").write_text("nobody reads this")
    return folder


def add_to(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def agreed(kind: Any, base: Path, **task: Any) -> Agreement:
    owners = tuple(OwnerEntry(name=name) for name in ("ada", "bea", "cyd"))
    draft = AgreementDraft(title="Test", base=str(base), owners=owners, method="average", task=Task(kind=kind, **task))
    return complete_agreement(draft, base, {name: each.public_key for name, each in IDENTITIES.items()})


@pytest.fixture(params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def base(kind: str, tmp_path: Path) -> Path:
    return base_of(kind, tmp_path / "base")


def published(kind: str, base: Path, folder: Path) -> Path:
    agreement = agreed(kind, base)
    write_model(load_base(base, agreement.task, agreement.seed), base, agreement, folder)
    return folder


def test_a_pipeline_needs_nothing_but_the_published_folder(kind: str, base: Path, tmp_path: Path) -> None:
    folder = str(published(kind, base, tmp_path / "model"))
    if kind == "image-classification":
        image = Image.fromarray(np.full((20, 30, 3), 200, dtype=np.uint8))
        assert {each["label"] for each in pipeline("image-classification", folder)(image)} == {"a", "b", "c"}
    elif kind == "text-classification":
        assert pipeline("text-classification", folder)("the staff was rude")[0]["label"] in ("a", "b", "c")
    elif kind == "token-classification":
        found = pipeline("token-classification", folder)("the staff was rude")
        assert [each["word"] for each in found] == ["the", "staff", "was", "rude"]
    else:
        answer = pipeline("text-generation", folder)([{"role": "user", "content": "the staff"}])[0]["generated_text"]
        assert [each["role"] for each in answer] == ["user", "assistant"]
        written = pipeline("text-generation", folder)("the staff", return_tensors=True)[0]
        assert len(written["generated_token_ids"]) == 7  # [CLS] the staff [SEP], and 3 as generation_config.json says


def test_the_published_folder_reads_rows_as_the_base_does(kind: str, base: Path, tmp_path: Path) -> None:
    folder = published(kind, base, tmp_path / "model")
    names = {path.name for path in base.iterdir()} - {"poison.py", "notes.txt"}
    assert {path.name for path in folder.iterdir()} == names
    for name in ("preprocessor_config.json", "chat_template.jinja", "generation_config.json", "tokenizer.json"):
        if name.endswith(".json") and name in names:
            expected = json.loads((base / name).read_text())
            found = json.loads((folder / name).read_text())
            assert found == {
                key: value for key, value in expected.items() if key not in ("auto_map", "custom_generate")
            }
        elif name in names:
            assert (folder / name).read_bytes() == (base / name).read_bytes()


def test_81_no_file_that_is_published_names_code(kind: str, base: Path, tmp_path: Path) -> None:
    folder = published(kind, base, tmp_path / "model")
    assert [path.name for path in base.glob("*.json") if "poison" in path.read_text()]
    assert not [path.name for path in folder.iterdir() if b"poison" in path.read_bytes()]


def test_every_owner_writes_the_same_bytes_from_a_copy_of_its_own(kind: str, base: Path, tmp_path: Path) -> None:
    first = published_folder(published(kind, base, tmp_path / "model"))
    copy = base_of(kind, tmp_path / "copy")
    (copy / "only-here.txt").write_text("a file that nobody agreed on")
    agreement = agreed(kind, base)
    write_model(load_base(copy, agreement.task, agreement.seed), copy, agreement, tmp_path / "own")
    assert published_folder(tmp_path / "own") == first


@pytest.mark.parametrize("kind", ["text-classification", "image-classification"])
def test_the_configuration_says_what_a_pipeline_makes_of_the_outputs(kind: str, tmp_path: Path) -> None:
    """Several labels are probabilities of their own, and numbers are themselves."""
    base = base_of(kind, tmp_path / "base")
    row: Any = "the room was clean"
    if kind == "image-classification":
        row = Image.fromarray(np.full((8, 8, 3), 200, dtype=np.uint8))
    scores = {}
    for problem_type in ("multi_label_classification", "regression"):
        more = {"target_range": (0.0, 5.0)} if problem_type == "regression" else {}
        agreement, folder = agreed(kind, base, problem_type=problem_type, **more), tmp_path / problem_type
        write_model(load_base(base, agreement.task, agreement.seed), base, agreement, folder)
        assert json.loads((folder / "config.json").read_text())["problem_type"] == problem_type
        (found,) = pipeline(kind, str(folder), top_k=3)([row])  # type: ignore[call-overload]
        scores[problem_type] = {each["label"]: each["score"] for each in found}
    for label, number in scores["regression"].items():
        assert scores["multi_label_classification"][label] == pytest.approx(1 / (1 + np.exp(-number)), abs=1e-5)
    assert sum(scores["multi_label_classification"].values()) != pytest.approx(1.0, abs=0.01)


def test_a_base_saved_without_its_head_is_free_of_what_the_head_was_for(tmp_path: Path) -> None:
    base = base_of("text-classification", tmp_path / "base")
    model = tiny_bert()
    model.config.problem_type = "regression"
    model.base_model.save_pretrained(base)
    assert json.loads((base / "config.json").read_text())["problem_type"] == "regression"
    folder = tmp_path / "model"
    agreement = agreed("text-classification", base, labels=("a", "b"))
    write_model(load_base(base, agreement.task, agreement.seed), base, agreement, folder)
    assert json.loads((folder / "config.json").read_text())["problem_type"] == "single_label_classification"
