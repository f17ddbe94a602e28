"""Every kind of task through the whole product: files, a tiny model of the kind, a masked merge, a model folder."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForTokenClassification,
    BertModel,
    CLIPConfig,
    CLIPForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    pipeline,
)

from common.agreement import Task
from common.metrics import micro_f1
from common.models.loading import digest_of
from deploy.commands.personal import make_and_show
from deploy.example.reviews import make_tokenizer
from deploy.simulation.simulate import simulate
from server.report.report import MeanMetrics, Report
from tests.support.lessons import TAGS, THINGS, WORDS

ROWS = {"train": 60, "test": 24}
SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}

Row = dict[str, Any]


def text_of(random_source: random.Random, owner: str) -> tuple[str, str]:
    label = random_source.choice(sorted(WORDS))
    return f"the {random_source.choice(THINGS[owner])} was {random_source.choice(WORDS[label])}", label


def tagged(random_source: random.Random, owner: str) -> Row:
    words = text_of(random_source, owner)[0].split()
    tags = ["O", "B-THING", "O", "O"]
    if random_source.random() < 0.5:
        words, tags = [*words[:2], random_source.choice(THINGS[owner]), *words[2:]], ["O", *TAGS[1:], "O", "O"]
    return {"tokens": words, "tags": tags}


def plain_text(random_source: random.Random, owner: str) -> Row:
    return {"text": text_of(random_source, owner)[0]}


def shortened(random_source: random.Random, owner: str) -> Row:
    text = text_of(random_source, owner)[0]
    return {"text": text, "target": text.split()[-1]}


def classified(random_source: random.Random, owner: str) -> Row:
    text, label = text_of(random_source, owner)
    return {"text": text, "label": label if owner != "bea" else f"{label} film"}


def bert_for_tokens(words: int) -> PreTrainedModel:
    return BertForTokenClassification(BertConfig(vocab_size=words, max_position_embeddings=32, num_labels=3, **SIZES))


def headless_bert(words: int) -> PreTrainedModel:
    return BertModel(BertConfig(vocab_size=words, max_position_embeddings=32, **SIZES))


def llama(words: int) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(vocab_size=words, num_key_value_heads=1, max_position_embeddings=32, **SIZES))


def t5(words: int) -> PreTrainedModel:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=words, decoder_start_token_id=0, pad_token_id=0, eos_token_id=3, **sizes)  # type: ignore[arg-type]
    )


AGREEMENT = """\
title = "A test"
base = "base"
method = "regmean"
compare_with = ["average", "task_arithmetic", "fisher"]
[task]
max_tokens = 16
{task}
[regmean]
alphas = [0.5, 0.9]
[fisher]
measured_examples = 10
[task_arithmetic]
scales = [0.3]
[privacy]
min_rows_per_dimension = 0.1
[bounds]
headroom = 1e7
{owners}
"""
OWNER = """\
name = "{name}"
{more}
[training]
epochs = {epochs}
learning_rate = 3e-3
[data]
train = "{name}-train.{suffix}"
test = "{name}-test.{suffix}"
"""


def write_consortium(folder: Path, task: str, model: Callable[[int], PreTrainedModel], epochs: int = 3) -> None:
    """Everything but the rows."""
    folder.mkdir()
    tokenizer = make_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model(len(tokenizer)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    owners = "".join(f'[[owners]]\nname = "{name}"\n' for name in THINGS)
    (folder / "agreement.toml").write_text(AGREEMENT.format(task=task, owners=owners))
    for name in THINGS:
        text = OWNER.format(name=name, epochs=epochs, suffix="jsonl", more="")
        (folder / f"{name}.toml").write_text(text)


def write_rows(folder: Path, row_of: Callable[[random.Random, str], Row]) -> None:
    random_source = random.Random(1)
    for name in THINGS:
        for split, count in ROWS.items():
            rows = [row_of(random_source, name) for _ in range(count)]
            (folder / f"{name}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def check_report(report: Report, output: Path, metric: str, references: set[str]) -> dict[str, MeanMetrics]:
    mean = report.evaluation.mean
    methods = {"base", "own_at_home", "average", "task_arithmetic", "fisher", "regmean"}
    assert set(mean) == methods | references
    assert report.evaluation.metric == metric
    assert mean["own_at_home"].accuracy > mean["base"].accuracy
    assert mean["regmean"].accuracy > mean["base"].accuracy
    assert "regmean" in (output / "report.html").read_text()
    return mean


def run(folder: Path, tmp_path: Path) -> Report:
    return simulate(folder, tmp_path / "output")


def personal_of(owner: str, output: Path) -> Path:
    """The folder of the owner's personal model, made of what the run published."""
    make_and_show(output / "parties" / f"{owner}.toml", output, output.parent / "personal")
    return output.parent / "personal"


def test_words_are_tagged(tmp_path: Path) -> None:
    folder = tmp_path / "consortium"
    write_consortium(folder, f'kind = "token-classification"\nlabels = {json.dumps(TAGS)}', bert_for_tokens, epochs=8)
    write_rows(folder, tagged)
    # one owner keeps its rows the way CoNLL does
    (folder / "ada.toml").write_text((folder / "ada.toml").read_text().replace(".jsonl", ".conll"))
    for split in ROWS:
        rows = [json.loads(line) for line in (folder / f"ada-{split}.jsonl").read_text().splitlines()]
        sentences = (
            "".join(f"{word} {tag}\n" for word, tag in zip(row["tokens"], row["tags"], strict=True)) for row in rows
        )
        (folder / f"ada-{split}.conll").write_text("-DOCSTART- O\n\n" + "\n".join(sentences))
    report = run(folder, tmp_path)
    check_report(report, tmp_path / "output", "entity_f1", {"own", "ensemble", "multi_task"})
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "output" / "model")
    assert model.config.id2label[1] == "B-THING"
    personal = AutoModelForTokenClassification.from_pretrained(personal_of("ada", tmp_path / "output"))
    assert personal.config.id2label == model.config.id2label


def test_the_next_word_is_predicted(tmp_path: Path) -> None:
    folder = tmp_path / "consortium"
    write_consortium(folder, 'kind = "causal-lm"', llama, epochs=6)
    write_rows(folder, plain_text)
    report = run(folder, tmp_path)
    mean = check_report(report, tmp_path / "output", "log_likelihood", {"own", "multi_task"})
    assert mean["base"].metric < mean["regmean"].metric < 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "output" / "model")
    assert digest_of(model, Task(kind="causal-lm")) == report.digests.model
    personal = AutoModelForCausalLM.from_pretrained(personal_of("bea", tmp_path / "output"))
    assert personal.num_parameters() == model.num_parameters()
    assert "lm_head.weight" in {name for group in report.tensors.merged for name in group}


@pytest.mark.slow
def test_a_text_is_turned_into_another(tmp_path: Path) -> None:
    folder = tmp_path / "consortium"
    write_consortium(folder, 'kind = "sequence-to-sequence"', t5, epochs=8)
    write_rows(folder, shortened)
    report = run(folder, tmp_path)
    check_report(report, tmp_path / "output", "log_likelihood", {"own", "multi_task"})
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "output" / "model")
    assert digest_of(model, Task(kind="sequence-to-sequence")) == report.digests.model


def test_owners_with_labels_of_their_own_share_a_body_and_keep_their_heads(tmp_path: Path) -> None:
    folder = tmp_path / "consortium"
    write_consortium(folder, 'kind = "text-classification"\nhead = "private"', headless_bert, epochs=30)
    write_rows(folder, classified)
    labels = sorted(WORDS)
    for name in THINGS:
        own = labels if name != "bea" else ["positive film", "negative film", "no film"]
        path = folder / f"{name}.toml"
        path.write_text(path.read_text().replace("[training]", f"labels = {json.dumps(own)}\n[training]"))
    report = run(folder, tmp_path)
    check_report(report, tmp_path / "output", "macro_f1", set())
    assert report.tensors.left_alone == ("classifier.weight", "classifier.bias")
    body = AutoModel.from_pretrained(tmp_path / "output" / "model")
    assert type(body).__name__ == "BertModel"
    assert "classifier" not in (tmp_path / "output" / "model" / "model.safetensors").read_bytes()[:20_000].decode(
        "latin-1"
    )
    check_card_puts_the_body_under_a_head(tmp_path / "output" / "model", folder / "base")
    personal = AutoModelForSequenceClassification.from_pretrained(personal_of("bea", tmp_path / "output"))
    assert list(personal.config.id2label.values()) == ["positive film", "negative film", "no film"]


def check_card_puts_the_body_under_a_head(model_folder: Path, base: Path) -> None:
    card = ModelCard.load(model_folder / "README.md")
    assert card.data.pipeline_tag == "feature-extraction"
    own = model_folder.parent / "own"
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=3).save_pretrained(own)
    before = load_file(own / "model.safetensors")
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    names: dict = {}
    exec(code.replace("this-folder", str(model_folder)).replace("your-own-fine-tuned-model", str(own)), names)
    merged = {f"bert.{name}": tensor for name, tensor in load_file(model_folder / "model.safetensors").items()}
    for name, tensor in names["own"].state_dict().items():
        torch.testing.assert_close(tensor, merged.get(name, before[name]), rtol=0, atol=0)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in merged.items())


SEVERAL = """\
kind = "text-classification"
problem_type = "multi_label_classification"
labels = ["negative", "positive", "thing"]"""


def labelled_several_times(random_source: random.Random, owner: str) -> Row:
    """A text has one mood and perhaps names the owner's first thing, or says neither."""
    words, labels = ["the"], []
    if random_source.random() < 0.5:
        words.append(THINGS[owner][0])
        labels.append("thing")
    if random_source.random() < 0.8:
        label = random_source.choice(sorted(WORDS))
        words.append(random_source.choice(WORDS[label]))
        labels.append(label)
    return {"text": " ".join(words), "label": labels}


def with_refit(folder: Path) -> None:
    """Publish a refit of RegMean, of owners that train in small batches."""
    draft = folder / "agreement.toml"
    text = draft.read_text().replace('"regmean"', '"refit"').replace("[0.5, 0.9]", "[0.9]")
    text = text.replace('["average", "task_arithmetic", "fisher"]', "[]")
    draft.write_text(text + '\n[refit]\nbody = "regmean"\nbalances = [0.0]\n')
    for name in THINGS:
        path = folder / f"{name}.toml"
        path.write_text(path.read_text().replace("epochs", "batch_size = 8\nepochs"))


def test_texts_have_several_labels_or_none(tmp_path: Path) -> None:
    folder = tmp_path / "consortium"
    write_consortium(folder, SEVERAL, headless_bert, epochs=12)
    write_rows(folder, labelled_several_times)
    with_refit(folder)
    # one owner writes the labels of a row in one cell
    (folder / "ada.toml").write_text((folder / "ada.toml").read_text().replace(".jsonl", ".csv"))
    for split in ROWS:
        rows = [json.loads(line) for line in (folder / f"ada-{split}.jsonl").read_text().splitlines()]
        cells = "".join(f"{row['text']},{'|'.join(row['label'])}\n" for row in rows)
        (folder / f"ada-{split}.csv").write_text("text,label\n" + cells)
    report = simulate(folder, tmp_path / "output", with_references=False)
    mean, published = report.evaluation.mean, tmp_path / "output" / "model"
    assert min(mean["own_at_home"].main, mean["refit"].main) > mean["base"].main + 0.4
    tests = [json.loads(line) for name in THINGS for line in (folder / f"{name}-test.jsonl").read_text().splitlines()]
    classify = pipeline("text-classification", model=str(published), top_k=None)
    found = [{each["label"] for each in row if each["score"] > 0.5} for row in classify([row["text"] for row in tests])]
    for label, (right, wanted, given) in zip(report.agreement.task.labels, mean["refit"].sums, strict=True):
        assert wanted == sum(label in row["label"] for row in tests)
        assert given == sum(label in labels for labels in found)
        assert right == sum(label in row["label"] and label in labels for row, labels in zip(tests, found, strict=True))
    assert json.loads((published / "config.json").read_text())["problem_type"] == "multi_label_classification"
    page, card = (tmp_path / "output" / "report.html").read_text(), (published / "README.md").read_text()
    assert "exactly the right labels" in page
    assert f"refit {micro_f1(mean['refit'].sums):.3f}" in page
    assert "| thing |" in card


NUMBERS = """\
kind = "text-classification"
problem_type = "regression"
labels = ["mood", "thing"]
target_range = [-2, 2]"""


def measured(random_source: random.Random, owner: str) -> Row:
    """How good a text is, in thirds, and which of its owner's things it is about."""
    mood, thing = random_source.randrange(6), random_source.randrange(3)
    word = [*WORDS["negative"], *WORDS["positive"]][mood]
    return {"text": f"the {THINGS[owner][thing]} was {word}", "label": [(mood - 2.5) / 1.5, thing]}


def test_numbers_are_predicted(tmp_path: Path) -> None:
    folder = tmp_path / "consortium"
    write_consortium(folder, NUMBERS, headless_bert, epochs=15)
    write_rows(folder, measured)
    with_refit(folder)
    # one owner has a column for each target
    with (folder / "ada.toml").open("a") as file:
        file.write('label = ["score", "words"]\n')
    for split in ROWS:
        path = folder / f"ada-{split}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [{"text": row["text"], "score": row["label"][0], "words": row["label"][1]} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = simulate(folder, tmp_path / "output", with_references=False)
    evaluation, published = report.evaluation, tmp_path / "output" / "model"
    mean = evaluation.mean
    assert evaluation.choose_by == evaluation.metric == "mean_squared_error"
    assert min(mean["own_at_home"].main, mean["refit"].main) > mean["base"].main + 0.3
    assert mean["refit"].metric < 0.6 * mean["base"].metric
    assert "Compared with each owner" in (tmp_path / "output" / "report.html").read_text()

    rows = [json.loads(line) for line in (folder / "bea-test.jsonl").read_text().splitlines()]
    read = pipeline("text-classification", model=str(published), top_k=None)
    found = [{each["label"]: each["score"] for each in row} for row in read([row["text"] for row in rows])]
    predicted = np.array([[row["mood"], row["thing"]] for row in found])
    errors = np.square(np.clip(predicted, -2, 2) - [row["label"] for row in rows]).mean()
    # a sum is rounded to a 64th of the squared range
    assert evaluation.by_owner["bea"]["refit"].metric == pytest.approx(errors, abs=16 / 64 / len(rows))
    assert "Pearson's r" in (published / "README.md").read_text()
    personal = AutoModelForSequenceClassification.from_pretrained(personal_of("cyd", tmp_path / "output"))
    assert personal.config.problem_type == "regression"


def clip(_: int) -> PreTrainedModel:
    vision = SIZES | {"image_size": 8, "patch_size": 4, "num_channels": 1}
    text = SIZES | {"vocab_size": 10}
    config = CLIPConfig(text_config=text, vision_config=vision, num_labels=2)
    return CLIPForImageClassification(config)


@pytest.mark.slow
def test_images_are_classified_by_the_vision_half_of_clip(tmp_path: Path) -> None:
    folder = tmp_path / "consortium"
    write_consortium(folder, 'kind = "image-classification"\nlabels = ["dark", "light"]', clip, epochs=10)
    random_source = np.random.default_rng(0)
    for name in THINGS:
        path = folder / f"{name}.toml"
        path.write_text(path.read_text().replace(".jsonl", ".npz"))
        for split, count in ROWS.items():
            labels = random_source.integers(0, 2, count)
            images = random_source.normal(labels[:, None, None] - 0.5, 0.5, (count, 8, 8)).astype(np.float32)
            np.savez(folder / f"{name}-{split}.npz", image=images, label=labels)
    report = run(folder, tmp_path)
    check_report(report, tmp_path / "output", "macro_f1", {"own", "ensemble", "multi_task"})
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "output" / "model")
    assert digest_of(model, Task(kind="image-classification", labels=("dark", "light"))) == report.digests.model
    AutoModelForImageClassification.from_pretrained(personal_of("ada", tmp_path / "output"))


TEMPLATE = """\
{% for turn in messages %}{{ "[CLS] " if turn.role == "assistant" else "" }}{{ turn.content }} [SEP] {% endfor %}\
{{ "[CLS] " if add_generation_prompt else "" }}"""


def asked_and_said(random_source: random.Random, owner: str) -> Row:
    *asked, said = text_of(random_source, owner)[0].split()
    turns = [{"role": "user", "content": " ".join(asked)}, {"role": "assistant", "content": said}]
    return {"messages": turns}


def test_a_chat_model_is_merged_by_what_its_owners_assistants_say(tmp_path: Path) -> None:
    folder = tmp_path / "consortium"
    write_consortium(folder, 'kind = "causal-lm"', llama, epochs=6)
    (folder / "base" / "chat_template.jinja").write_text(TEMPLATE)
    write_rows(folder, asked_and_said)
    for name in THINGS:
        with (folder / f"{name}.toml").open("a") as file:
            file.write('messages = "messages"\n')
    draft = folder / "agreement.toml"
    draft.write_text(draft.read_text().replace('["average", "task_arithmetic", "fisher"]', "[]"))
    mean = simulate(folder, tmp_path / "output", with_references=False).evaluation.mean
    assert mean["regmean"].accuracy > mean["base"].accuracy + 0.2
    assert (mean["regmean"].metric or 0) > (mean["base"].metric or 0) + 0.5
    published = AutoTokenizer.from_pretrained(tmp_path / "output" / "model")
    asked = published.apply_chat_template([{"role": "user", "content": "the room was"}], tokenize=False)
    assert asked == "the room was [SEP] "


def vit(_: int) -> PreTrainedModel:
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_channels=3, num_labels=2, **SIZES))


PREPARES = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 8, "width": 8},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
}


@pytest.mark.parametrize(
    "problem_type", ["multi_label_classification", pytest.param("regression", marks=pytest.mark.slow)]
)
def test_images_have_several_labels_or_numbers(problem_type: str, tmp_path: Path) -> None:
    """Each half of an image is dark or light by itself."""
    folder, is_regression = tmp_path / "consortium", problem_type == "regression"
    task = f'kind = "image-classification"\nproblem_type = "{problem_type}"\nlabels = ["top", "bottom"]'
    write_consortium(folder, task + ("\ntarget_range = [0, 1]" if is_regression else ""), clip, epochs=10)
    draft = folder / "agreement.toml"
    text = draft.read_text().replace('"regmean"', '"average"')
    draft.write_text(text.replace('["average", "task_arithmetic", "fisher"]', "[]"))
    random_source = np.random.default_rng(0)
    for name in THINGS:
        path = folder / f"{name}.toml"
        path.write_text(path.read_text().replace(".jsonl", ".npz"))
        for split, count in ROWS.items():
            light = random_source.random((count, 2)) if is_regression else random_source.integers(0, 2, (count, 2))
            images = np.repeat(light.astype(np.float32), 4, axis=1)[:, :, None].repeat(8, axis=2)
            noise = 0.05 * random_source.standard_normal(images.shape)
            np.savez(folder / f"{name}-{split}.npz", image=(images + noise).astype(np.float32), label=light)
    report = simulate(folder, tmp_path / "output", with_references=False)
    merged, base = report.evaluation.mean["average"], report.evaluation.mean["base"]
    assert merged.metric < 0.6 * base.metric if is_regression else merged.main > base.main + 0.2
    config = json.loads((tmp_path / "output" / "model" / "config.json").read_text())
    assert config["problem_type"] == problem_type


def test_folders_of_images_are_prepared_as_the_base_says_and_whoever_uses_the_model_prepares_them_so(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "consortium"
    write_consortium(folder, 'kind = "image-classification"\nlabels = ["dark", "light"]', vit, epochs=10)
    (folder / "base" / "preprocessor_config.json").write_text(json.dumps(PREPARES))
    draft = folder / "agreement.toml"
    draft.write_text(draft.read_text().replace('["average", "task_arithmetic", "fisher"]', "[]"))
    random_source = np.random.default_rng(0)
    for name in THINGS:
        path = folder / f"{name}.toml"
        path.write_text(path.read_text().replace(".jsonl", ""))
        for split, count in ROWS.items():
            for number in range(count):
                label = "light" if number % 2 else "dark"
                brightness = random_source.normal(150 if label == "light" else 100, 40, (12, 12, 3))
                image = folder / f"{name}-{split}" / label / f"{number}.png"
                image.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(brightness.clip(0, 255).astype(np.uint8)).save(image)
    report = simulate(folder, tmp_path / "output", with_references=False)
    assert report.evaluation.mean["regmean"].accuracy > report.evaluation.mean["base"].accuracy

    published = tmp_path / "output" / "model"
    model = AutoModelForImageClassification.from_pretrained(published)
    processor = AutoImageProcessor.from_pretrained(published, backend="pil")
    right = 0
    images = sorted((folder / "ada-test").rglob("*.png"))
    for image in images:
        with torch.no_grad():
            logits = model(**processor(images=Image.open(image).convert("RGB"), return_tensors="pt")).logits
        right += model.config.id2label[int(logits.argmax())] == image.parent.name
    assert right / len(images) == pytest.approx(report.evaluation.by_owner["ada"]["regmean"].accuracy, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "row", "expected"),
    [
        ("token-classification", {"tokens": ["the", "room"], "tags": ["O"]}, "row 1 has 2 words and 1 tags"),
        ("token-classification", {"tokens": "the room", "tags": ["O"]}, "must be a list of words"),
        ("token-classification", {"tokens": ["room"], "tags": ["B-TOWN"]}, "row 1: its label is none of O, B-THING"),
        ("token-classification", {"words": ["room"], "tags": ["O"]}, "has no column 'tokens'"),
    ],
)
def test_rows_that_cannot_be_used_are_named(kind: str, row: Row, expected: str, tmp_path: Path) -> None:
    folder = tmp_path / "consortium"
    write_consortium(folder, f'kind = "{kind}"\nlabels = {json.dumps(TAGS)}', bert_for_tokens)
    write_rows(folder, lambda *_: row)
    with pytest.raises(Exception, match=expected) as raised:
        run(folder, tmp_path)
    assert "ada-train.jsonl" in str(raised.value)
    assert not (tmp_path / "output" / "model").exists()
