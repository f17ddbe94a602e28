"""Owners that bring LoRA adapters, and a result that is one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from common.agreement import Task
from common.models import base_labels, delta_of, digest_of, load_base, load_fine_tuned
from deploy.simulate import simulate
from tests.test_adapter import write_adapter

OWNERS = ("hotel", "cinema", "phones")
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

    task = Task(labels=base_labels(path / "base"))
    base = load_base(path / "base", task, seed=0)
    deltas = [delta_of(load_fine_tuned(path / "models" / name, task, base), base) for name in OWNERS]
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "output" / "model")
    assert digest_of(merged) == report["digests"]["model"]
    for name, tensor in delta_of(merged, base).items():
        mean = torch.stack([delta[name] for delta in deltas]).mean(0)  # every owner has 200 rows
        torch.testing.assert_close(tensor, mean, rtol=0, atol=1e-6)
    assert report == json.loads((tmp_path / "output" / "report.json").read_text())
