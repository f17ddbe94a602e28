"""Owners that bring LoRA adapters, and a result that is one."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from common.agreement import Task
from common.errors import ModelError
from common.models.loading import digest_of, load_base, load_fine_tuned
from deploy.simulation.simulate import simulate
from server.report.report import Report, read_report
from tests.support.adapters import write_adapter
from tests.support.models import delta_of

OWNERS = ("hotel", "cinema", "phones")
TASK = Task(labels=("negative", "positive"))
SETTINGS = {"target_modules": ["query", "value", "dense"], "modules_to_save": ["classifier"]}


@pytest.fixture(scope="module")
def consortium(reviews_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's owners, each with an adapter of its own: random, for what is merged, not how well, is looked at."""
    folder = Path(shutil.copytree(reviews_folder, tmp_path_factory.mktemp("adapters") / "consortium"))
    for name in OWNERS:
        model = AutoModelForSequenceClassification.from_pretrained(folder / "base")
        write_adapter(model, folder / "models" / name, seed=OWNERS.index(name), **SETTINGS)
        path = folder / f"{name}.toml"
        recipe = "[training]\nepochs = 6\nlearning_rate = 1e-3\nbatch_size = 32\n"
        path.write_text(path.read_text().replace(recipe, f'fine_tuned = "models/{name}"\n'))
    return folder


def test_adapters_are_averaged_as_the_weights_that_they_make(consortium: Path, tmp_path: Path) -> None:
    path = tmp_path / "consortium"
    shutil.copytree(consortium, path)
    text = (path / "agreement.toml").read_text()
    methods = 'method = "regmean"\ncompare_with = ["average", "task_arithmetic", "fisher"]'
    assert methods in text
    (path / "agreement.toml").write_text(text.replace(methods, 'method = "average"\ncompare_with = ["fisher"]'))
    report = simulate(path, tmp_path / "output", with_references=False)

    base = load_base(path / "base", TASK, seed=0)
    deltas = [delta_of(load_fine_tuned(path / "models" / name, TASK, base), base) for name in OWNERS]
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "output" / "model")
    assert digest_of(merged, TASK) == report.digests.model
    for name, tensor in delta_of(merged, base).items():
        mean = torch.stack([delta[name] for delta in deltas]).mean(0)  # every owner has 200 rows
        torch.testing.assert_close(tensor, mean, rtol=0, atol=1e-6)
    assert report.model_dump(mode="json") == json.loads((tmp_path / "output" / "report.json").read_text())


@pytest.fixture
def only_adapted(consortium: Path, tmp_path: Path) -> Path:
    """The owners with adapters of the queries and values, who agreed to merge nothing else."""
    folder = Path(shutil.copytree(consortium, tmp_path / "consortium"))
    text = (
        (folder / "agreement.toml")
        .read_text()
        .replace('# [merge]\n# layers = ["*.query", "*.value"] ', '[merge]\nlayers = ["adapter"] ')
    )
    (folder / "agreement.toml").write_text(
        text.replace('["average", "task_arithmetic", "fisher"]', "[]").replace(
            "alphas = [0.1, 0.5, 0.9, 0.95, 0.99]", "alphas = [0.9]"
        )
    )
    for name in OWNERS:
        model = AutoModelForSequenceClassification.from_pretrained(folder / "base")
        shutil.rmtree(folder / "models" / name)
        adapter = {"target_modules": ["query", "value"], "layers_to_transform": [1], "layers_pattern": "layer"}
        write_adapter(model, folder / "models" / name, seed=OWNERS.index(name), **adapter)
    return folder


def test_owners_of_adapters_send_only_what_these_change(only_adapted: Path, example_run: Path, tmp_path: Path) -> None:
    report = simulate(only_adapted, tmp_path / "output", with_references=False)
    attention = "bert.encoder.layer.1.attention.self"
    assert report.tensors.merged == ((f"{attention}.query.weight", f"{attention}.value.weight"),)
    base = load_base(only_adapted / "base", TASK, seed=0)
    assert report.tensors.averaged == ()
    assert len(report.tensors.left_alone) == len(list(base.named_parameters())) - 2
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "output" / "model")
    assert {name for name, tensor in delta_of(merged, base).items() if tensor.any()} == set(report.tensors.merged[0])
    numbers = [
        next(one.numbers for one in each.rounds if one.kind == "contribution")
        for each in (report, read_report(example_run))
    ]
    assert 20 * numbers[0] < numbers[1]


def test_an_owner_whose_model_changed_more_than_is_merged_is_refused_by_its_first_tensor(only_adapted: Path) -> None:
    shutil.rmtree(only_adapted / "models" / "cinema")
    model = AutoModelForSequenceClassification.from_pretrained(only_adapted / "base")
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.bias += 0.1
        model.classifier.weight += 0.1
    model.save_pretrained(only_adapted / "models" / "cinema")
    with pytest.raises(ModelError, match=r"cinema: its model has another bert\.encoder\.layer\.0\.output\.dense\.bias"):
        simulate(only_adapted, only_adapted / "output", with_references=False)


def test_an_owner_that_makes_its_model_here_trains_only_what_is_merged(only_adapted: Path) -> None:
    path = only_adapted / "phones.toml"
    path.write_text(path.read_text().replace('\nfine_tuned = "models/phones"\n', "\n[training]\nepochs = 1\n"))
    report = simulate(only_adapted, only_adapted / "output", with_references=False)
    assert report.owners == OWNERS


@pytest.fixture(scope="module")
def published(trained_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path, Path]:
    """The example, published as an adapter of a base without head or pooler: the report, the output and the base."""
    folder = Path(shutil.copytree(trained_folder, tmp_path_factory.mktemp("published") / "consortium"))
    weights = load_file(folder / "base" / "model.safetensors")
    made_here = [name for name in weights if name.startswith(("classifier", "bert.pooler"))]
    save_file(
        {name: tensor for name, tensor in weights.items() if name not in made_here},
        folder / "base" / "model.safetensors",
        metadata={"format": "pt"},
    )
    agreement = folder / "agreement.toml"
    text = agreement.read_text().replace("# [publish]\n# adapter_rank = 8 ", "[publish]\nadapter_rank = 4")
    agreement.write_text(text.replace('["average", "task_arithmetic", "fisher"]', "[]"))
    return simulate(folder, folder / "output", with_references=False), folder / "output", folder / "base"


def test_the_published_adapter_gives_the_signed_model_s_logits(published: tuple[Report, Path, Path]) -> None:
    report, output, base_folder = published
    assert {path.name for path in (output / "model").iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"
    }  # fmt: skip
    adapted = PeftModel.from_pretrained(load_base(base_folder, TASK, seed=99), output / "model").eval()
    signed = signed_model(report, output, base_folder)
    tokens = torch.arange(2, 26).reshape(2, 12)
    with torch.no_grad():
        one, other = (model(input_ids=tokens, attention_mask=torch.ones_like(tokens)) for model in (adapted, signed))
    torch.testing.assert_close(one.logits, other.logits, rtol=0, atol=1e-5)


@torch.no_grad()
def signed_model(report: Report, output: Path, base_folder: Path) -> PreTrainedModel:
    """By hand from the file: the factors' product in float64, rounded once, on the base; what goes whole as it is."""
    file = load_file(output / "model" / "adapter_model.safetensors")
    model = load_base(base_folder, TASK, seed=0)
    for name, parameter in model.named_parameters():
        stored = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stored}.lora_A.weight" in file:
            product = file.pop(f"{stored}.lora_B.weight").double() @ file.pop(f"{stored}.lora_A.weight").double()
            parameter += product.float()
        elif f"base_model.model.{name}" in file:
            parameter.copy_(file.pop(f"base_model.model.{name}"))
    assert not file
    assert digest_of(model, TASK) == report.digests.model
    return model


def test_the_model_card_s_code_gives_the_signed_model_s_logits(published: tuple[Report, Path, Path]) -> None:
    report, output, base_folder = published
    card = ModelCard.load(output / "model" / "README.md")
    assert card.data.library_name == "peft"
    assert "lora" in card.data.tags
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    names: dict = {}
    exec(code.replace("this-folder", str(output / "model")).replace("the-base-model", str(base_folder)), names)
    tokens = torch.arange(2, 26).reshape(2, 12)
    with torch.no_grad():
        one = names["model"].eval()(input_ids=tokens).logits
        other = signed_model(report, output, base_folder)(input_ids=tokens).logits
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_the_report_says_what_the_cut_lost(published: tuple[Report, Path, Path]) -> None:
    low_rank = published[0].low_rank
    assert low_rank.rank == 4
    assert 0 < low_rank.relative_error < 1
    assert 0 < low_rank.dropped < 1
    assert "LoRA adapter of rank 4" in (published[1] / "report.html").read_text()


def test_a_published_adapter_may_be_an_owner_s_model(published: tuple[Report, Path, Path]) -> None:
    report, output, base_folder = published
    again = load_fine_tuned(output / "model", TASK, load_base(base_folder, TASK, seed=0))
    signed = signed_model(report, output, base_folder)
    for one, other in zip(again.parameters(), signed.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
