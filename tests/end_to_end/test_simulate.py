"""All parties on one machine: real models, real Flower messages, real files."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from sklearn.datasets import load_digits
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    pipeline,
)

from client.settings import Training
from common.agreement import AgreementDraft, Task
from common.errors import AmalgramError, EngineError, ModelError, SettingsError
from common.models.loading import digest_of
from common.settings_file import load_settings
from deploy.commands.client import find_node
from deploy.commands.server import find_place
from deploy.commands.verify import check_folder
from deploy.complete import complete_agreement
from deploy.consortium import find_owner_files
from deploy.demo import digits
from deploy.demo.run import run_demo
from deploy.example.reviews import make_tokenizer
from deploy.simulation.engine import Engine
from deploy.simulation.network import run_over_network
from deploy.simulation.parties import party_keys, set_up_parties
from deploy.simulation.simulate import simulate
from server.report.report import Report, SentCandidate, read_report


@pytest.fixture(scope="module")
def result(example_run: Path) -> tuple[Report, Path]:
    return read_report(example_run), example_run


@pytest.fixture
def consortium(little_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(little_folder, tmp_path / "consortium"))


def merge_little(consortium: Path, method: str = "average", compared: str = "") -> None:
    """One method with one value of its hyperparameter, where a test is not about the methods."""
    agreement = consortium / "agreement.toml"
    change(agreement, 'method = "regmean"', f'method = "{method}"')
    change(agreement, 'compare_with = ["average", "task_arithmetic", "fisher"]', f"compare_with = [{compared}]")
    change(agreement, "alphas = [0.1, 0.5, 0.9, 0.95, 0.99]", "alphas = [0.9]")


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_the_merged_model_is_better_for_everybody_than_what_sharing_nothing_gives(result: tuple[Report, Path]) -> None:
    mean = result[0].evaluation.mean
    assert mean["regmean"].accuracy > mean["own"].accuracy + 0.1
    assert mean["regmean"].accuracy > mean["base"].accuracy + 0.1


def test_the_report_has_what_its_schema_names(result: tuple[Report, Path]) -> None:
    report, output = result
    assert report == read_report(output)
    assert report.model_dump(mode="json") == json.loads((output / "report.json").read_text())
    assert report.summation == "masked"
    assert report.owners == ("hotel", "cinema", "phones")
    assert report.seconds > 0
    assert report.examples == 600
    assert set(report.evaluation.mean) == {
        "base", "own", "own_at_home", "average", "task_arithmetic", "fisher", "regmean", "ensemble", "multi_task",
    }  # fmt: skip
    assert {layer.status for layer in report.layers} == {"solved"}
    assert (output / "report.html").is_file()


def test_the_report_says_when_another_method_did_better(result: tuple[Report, Path]) -> None:
    mean, advice = result[0].evaluation.mean, " ".join(result[0].advice)
    best = max(("regmean", "average", "task_arithmetic", "fisher"), key=lambda method: mean[method].accuracy)
    better = mean[best].accuracy > mean["regmean"].accuracy
    assert (f"{best} did better than regmean" in advice or f"{best} is ahead of regmean" in advice) == better


def test_the_model_folder_loads_and_classifies(result: tuple[Report, Path]) -> None:
    report, output = result
    model = AutoModelForSequenceClassification.from_pretrained(output / "model")
    assert digest_of(model, Task()) == report.digests.model
    classify = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(output / "model"))
    assert classify("the staff was rude")[0]["label"] == "negative"
    assert classify("the film was gripping")[0]["label"] == "positive"


def test_the_output_is_what_the_owners_signed_and_a_report_that_was_improved_is_not(
    result: tuple[Report, Path], tmp_path: Path
) -> None:
    """Attack 83: the report's metrics."""
    assert check_folder(result[1]).is_signed
    assert check_folder(result[1] / "model").signed_by == ["hotel", "cinema", "phones"]
    output = Path(shutil.copytree(result[1], tmp_path / "output"))
    report = json.loads((output / "report.json").read_text())
    report["evaluation"]["mean"]["regmean"]["accuracy"] = 0.999
    (output / "report.json").write_text(json.dumps(report))
    assert [each.what for each in check_folder(output).findings if not each.is_signed] == [
        "report.json: evaluation.mean.regmean"
    ]
    assert report["evaluation"]["cut"] == [0, 360]
    report["evaluation"]["cut"] = [10, 360]
    (output / "report.json").write_text(json.dumps(report))
    wrong = [each.what for each in check_folder(output).findings if not each.is_signed]
    assert "report.json: evaluation.cut" in " ".join(wrong)


def test_the_report_tells_every_sum_and_everything_that_was_sent(result: tuple[Report, Path]) -> None:
    report = result[0]
    assert report.simulated
    assert [(each.kind, each.split) for each in report.rounds] == [
        ("contribution", None),
        ("check", None),
        ("metrics", "validation"),
        ("metrics", "test"),
    ]
    assert report.verified
    assert [each.destroyed for each in report.rounds] == [True, False, False, False]
    for each in report.rounds:
        assert each.owners == ("hotel", "cinema", "phones")
        assert each.numbers == sum(content.numbers for content in each.contents)
    grams = {content.kind: content.tensors for content in report.rounds[0].contents}["gram"]
    assert len(grams) == len(report.layers) == len(report.tensors.merged)
    sent = [(each.candidate, each.split) for each in report.sent if isinstance(each, SentCandidate)]
    assert len(sent) + 1 == len(report.sent)  # and a correction for the check
    tried = [trial.candidate for sweep in report.evaluation.sweep.values() for trial in sweep]
    chosen = [choice.candidate for choice in report.chosen.values()]
    assert sorted(sent) == sorted([(name, "validation") for name in tried] + [(name, "test") for name in chosen])
    assert all(each.owners == ("hotel", "cinema", "phones") for each in report.sent)
    assert report.receipts == report.owners


def test_the_report_s_distances_are_those_of_the_weights(result: tuple[Report, Path], reviews_folder: Path) -> None:
    report, output = result
    merged = AutoModelForSequenceClassification.from_pretrained(output / "model").state_dict()
    base = AutoModelForSequenceClassification.from_pretrained(reviews_folder / "base").state_dict()
    assert [change.name for change in report.changes] == [layer.name for layer in report.layers]
    for change, group in zip(report.changes, report.tensors.merged, strict=True):
        before = torch.cat([base[name].flatten() for name in group])
        after = torch.cat([merged[name].flatten() for name in group])
        assert change.change == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)
        assert change.from_average is not None
        assert change.from_average > 0


def test_the_model_card_s_code_runs(result: tuple[Report, Path]) -> None:
    folder = result[1] / "model"
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.library_name == "transformers"
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    names: dict = {}
    exec(code.replace("this-folder", str(folder)), names)
    assert names["model"]("the staff was rude")[0]["label"] == "negative"


def test_no_owner_s_state_is_left_behind(result: tuple[Report, Path]) -> None:
    assert not (result[1] / "parties" / "state").exists()


def test_the_report_s_figures_are_those_of_the_published_model(
    result: tuple[Report, Path], reviews_folder: Path
) -> None:
    report, output = result
    model = AutoModelForSequenceClassification.from_pretrained(output / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    rows = [json.loads(line) for line in (reviews_folder / "data" / "hotel" / "test.jsonl").read_text().splitlines()]
    with torch.no_grad():
        logits = model(**tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True)).logits
    correct = np.mean(
        [model.config.id2label[int(i)] == row["label"] for i, row in zip(logits.argmax(-1), rows, strict=True)]
    )
    assert report.evaluation.by_owner["hotel"]["regmean"].accuracy == pytest.approx(correct)


@pytest.mark.usefixtures("trained_anew")
def test_the_same_seed_gives_the_same_model(result: tuple[Report, Path], reviews_folder: Path, tmp_path: Path) -> None:
    again = simulate(reviews_folder, tmp_path, with_references=False)
    assert again.digests.model == result[0].digests.model  # keys are fresh, so the agreement is another
    assert "own" not in again.evaluation.mean


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ray", "network"])
def test_every_engine_gives_the_same_model_bit_for_bit(
    engine: Engine, result: tuple[Report, Path], reviews_folder: Path, tmp_path: Path
) -> None:
    report = simulate(reviews_folder, tmp_path, engine=engine, with_references=False)
    assert report.digests.model == result[0].digests.model
    assert report.simulated


def test_the_parties_of_a_rehearsal_pass_the_checks_of_a_network_s_commands(
    reviews_folder: Path, tmp_path: Path
) -> None:
    draft = load_settings(reviews_folder / "agreement.toml", AgreementDraft)
    keys = party_keys(draft, tmp_path / "parties", with_nodes=True)
    agreement = complete_agreement(draft, reviews_folder / "base", keys.public_keys, keys.node_keys)
    files = find_owner_files(reviews_folder, draft)
    with set_up_parties(tmp_path, agreement, reviews_folder / "base", files, keys) as (coordinator, owners):
        assert find_place(coordinator).agreement == agreement
        ports = {find_node(path).address for path in owners}
        assert ports == {f"127.0.0.1:{find_place(coordinator).host_and_port[1]}"}
        assert party_keys(draft, tmp_path / "parties", with_nodes=True) == keys  # an interrupted one goes on with them
    assert not [path for path in (tmp_path / "parties").iterdir() if path.suffix in (".key", ".node", ".ledger")]


def test_a_party_that_does_not_start_ends_a_rehearsal_with_its_reason(reviews_folder: Path, tmp_path: Path) -> None:
    settings = tmp_path / "coordinator.toml"
    settings.write_text('agreement = "agreement.toml"\noutput = "output"\n')
    with pytest.raises(EngineError, match=r"coordinator: .*coordinator.toml: has no \[network\] table") as caught:
        run_over_network(settings, [])
    assert "coordinator.server.log has all that it said" in caught.value.hint


def test_owners_that_bring_models_need_no_training(
    consortium: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    merge_little(consortium, "regmean", compared='"average"')
    for name in ("hotel", "cinema", "phones"):
        settings = consortium / f"{name}.toml"
        change(settings, "[training]\nepochs = 6\nlearning_rate = 1e-3\nbatch_size = 32\n", 'fine_tuned = "base"\n')
    report = simulate(consortium, tmp_path / "output")
    mean = report.evaluation.mean
    assert mean["regmean"] == mean["average"] == mean["base"] == mean["own_at_home"]  # nobody changed anything
    assert "multi_task" not in mean
    assert len(synced) < 20  # keys and the report, but none of the hundreds of files that the parties write


def test_a_model_with_its_labels_in_another_order_is_refused_before_anything_leaves(
    reviews_folder: Path, example_run: Path, tmp_path: Path
) -> None:
    consortium = Path(shutil.copytree(reviews_folder, tmp_path / "consortium"))
    model = AutoModelForSequenceClassification.from_pretrained(example_run / "model")
    with torch.no_grad():
        for parameter in (model.classifier.weight, model.classifier.bias):
            parameter.copy_(parameter.flip(0))
    model.config.id2label, model.config.label2id = {0: "LABEL_0", 1: "LABEL_1"}, {"LABEL_0": 0, "LABEL_1": 1}
    model.save_pretrained(consortium / "reversed")
    recipe = "[training]\nepochs = 6\nlearning_rate = 1e-3\nbatch_size = 32\n"
    change(consortium / "hotel.toml", recipe, 'fine_tuned = "reversed"\n')
    with pytest.raises(
        ModelError, match=r"hotel: on 60 of its own rows, its model is right on \d\.\d%, and on 9\d"
    ) as caught:
        simulate(consortium, tmp_path / "output")
    assert "if its labels are in the order ['positive', 'negative']" in caught.value.message
    assert not (tmp_path / "output" / "progress.jsonl").exists()


def test_owners_that_refuse_are_not_shown_singly(consortium: Path, tmp_path: Path) -> None:
    merge_little(consortium, "regmean")
    for name in ("hotel", "cinema", "phones"):
        change(consortium / "agreement.toml", f'name = "{name}"', f'name = "{name}"\nmetrics = "summed"')
    report = simulate(consortium, tmp_path / "output", with_references=False)
    assert report.evaluation.by_owner == {}
    assert report.evaluation.mean["regmean"].predictions == 360


def test_owner_files_may_stand_in_folders_of_their_own_with_a_copy_of_the_base(
    consortium: Path, tmp_path: Path
) -> None:
    merge_little(consortium)
    (consortium / "hotel").mkdir()
    (consortium / "hotel.toml").rename(consortium / "hotel" / "owner.toml")
    shutil.copytree(consortium / "base", consortium / "hotel" / "copy")
    change(consortium / "hotel" / "owner.toml", '"data/', '"../data/')
    change(consortium / "hotel" / "owner.toml", 'name = "hotel"', 'name = "hotel"\nbase = "copy"')
    report = simulate(consortium, tmp_path / "output", with_references=False)
    assert len(report.owners) == 3
    assert report.owners[0] == "hotel"


@pytest.mark.parametrize(
    ("file", "old", "new", "says", "exit_code"),
    [
        ("hotel.toml", 'name = "hotel"', 'name = "motel"', "owner 'motel' is not on the roster", 2),
        ("hotel.toml", 'name = "hotel"', 'name = "cinema"', "owner 'cinema' has a settings file already", 2),
        ("hotel.toml", "\n[training]", "\n[trainin]", "unknown key trainin", 2),
        (
            "hotel.toml",
            "epochs = 6",
            "epochs = 0",
            "training.epochs = 0: must be at least 1",
            2,
        ),
        (
            "hotel.toml",
            "\n[training]",
            '\nfine_tuned = "base"\n[training]',
            "has both fine_tuned and a [training]",
            2,
        ),
        ("hotel.toml", 'label = "label"', 'label = "stars"', "has no column 'stars'; its columns are text, label", 2),
        ("hotel.toml", "train.jsonl", "tram.jsonl", "tram.jsonl: no such file", 2),
        ("agreement.toml", 'base = "base"', 'base = "nowhere"', "no model of this name could be fetched", 2),
        ("agreement.toml", '"text-classification"', '"text-generation"', "task.kind = 'text-generation'", 2),
        ("agreement.toml", "# labels =", "labels = ['one']  #", "at least two labels are needed", 2),
        (
            "agreement.toml",
            "# labels =",
            "labels = ['a', 'b', 'c']  #",
            "its labels are ['negative', 'positive']",
            2,
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_published(
    file: str, old: str, new: str, says: str, exit_code: int, consortium: Path, tmp_path: Path
) -> None:
    change(consortium / file, old, new)
    with pytest.raises(AmalgramError) as caught:
        simulate(consortium, tmp_path / "output")
    assert says in str(caught.value)
    assert caught.value.exit_code == exit_code
    assert not (tmp_path / "output" / "report.json").exists()
    assert not (tmp_path / "output" / "model").exists()


LITTLE = """
[fisher]
measured_examples = 10

[task_arithmetic]
scales = [1.0]
"""


def test_the_demo_runs_on_images_and_reports_every_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The demo itself, with three owners, fewer rows, less training and shorter sweeps; `make demo` runs it in full.
    monkeypatch.setattr(digits, "TRAIN", 120)
    monkeypatch.setattr(digits, "VALIDATION", 50)
    scanners = {name: digits.SCANNERS[name] for name in ("top-left", "bottom-right", "centre")}
    images, labels = load_digits(return_X_y=True)
    rows = digits.PUBLIC + len(scanners) * digits.TRAIN + digits.VALIDATION + 100
    monkeypatch.setattr(digits, "SCANNERS", scanners)
    monkeypatch.setattr(digits, "load_digits", lambda *, return_X_y: (images[:rows], labels[:rows]))
    agreement = digits.AGREEMENT.replace("[0.1, 0.5, 0.9, 0.95, 0.99]", "[0.5, 0.9]")
    monkeypatch.setattr(digits, "AGREEMENT", agreement + LITTLE)
    for training in ("BASE_TRAINING", "OWNER_TRAINING"):
        monkeypatch.setattr(digits, training, Training(epochs=2, learning_rate=1e-3))
    report = run_demo(tmp_path / "demo")
    assert report.owners == tuple(digits.SCANNERS)
    assert set(report.evaluation.mean) == {
        "base", "own", "own_at_home", "average", "task_arithmetic", "fisher", "data_free", "regmean", "refit",
        "ensemble", "multi_task",
    }  # fmt: skip
    assert {scores["regmean"].predictions for scores in report.evaluation.by_owner.values()} == {100}
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "demo" / "model")
    assert digest_of(model, Task()) == report.digests.model


@pytest.mark.slow
def test_a_model_without_padding_token_works(consortium: Path, tmp_path: Path) -> None:
    merge_little(consortium, "regmean")
    config = GPT2Config(
        vocab_size=80, n_embd=16, n_layer=1, n_head=2, n_positions=32, id2label={0: "negative", 1: "positive"},
        label2id={"negative": 0, "positive": 1}, bos_token_id=3, eos_token_id=3
    )  # fmt: skip
    tokenizer = make_tokenizer()
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    change(consortium / "agreement.toml", 'base = "base"', f'base = "{tmp_path / "gpt2"}"')
    report = simulate(consortium, tmp_path / "output", with_references=False)
    merged = {name for group in report.tensors.merged for name in group}
    assert {"transformer.h.0.attn.c_proj.weight", "transformer.h.0.mlp.c_proj.weight", "score.weight"} <= merged
    assert "transformer.h.0.attn.c_attn.weight" in report.tensors.averaged


def test_a_folder_that_holds_something_else_is_not_touched(consortium: Path) -> None:
    with pytest.raises(SettingsError, match="already exists and is not an output folder of amalgram"):
        simulate(consortium, consortium)
    assert (consortium / "base" / "model.safetensors").is_file()


def test_a_missing_owner_is_named(consortium: Path, tmp_path: Path) -> None:
    (consortium / "phones.toml").unlink()
    with pytest.raises(SettingsError, match=r"owner 'phones' of agreement\.toml has no settings file, phones\.toml"):
        simulate(consortium, tmp_path / "output")


def test_a_refusal_in_the_middle_tells_the_owner_s_reason(
    consortium: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from client.measurement import fine_tuning as finetune
    from common.errors import NumericalError

    def diverge(*_: object) -> None:
        raise NumericalError("fine-tuning: the loss became nan; lower learning_rate")

    monkeypatch.setattr(finetune, "fine_tune", diverge)
    with pytest.raises(AmalgramError, match="owner hotel: fine-tuning: the loss became nan") as caught:
        simulate(consortium, tmp_path / "output")
    assert caught.value.exit_code == 5


def test_an_earlier_result_survives_a_run_that_cannot_start(
    consortium: Path, example_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(example_run, tmp_path / "output")
    change(consortium / "hotel.toml", "train.jsonl", "tram.jsonl")
    with pytest.raises(AmalgramError):
        simulate(consortium, tmp_path / "output")
    assert (tmp_path / "output" / "report.json").exists()


@pytest.mark.slow
def test_flower_s_own_engine_passes_on_why_a_run_failed(consortium: Path, tmp_path: Path) -> None:
    change(consortium / "hotel.toml", "learning_rate = 1e-3", "learning_rate = 1e30")
    with pytest.raises(AmalgramError, match="owner hotel: fine-tuning: the loss became nan\nhint: lower") as caught:
        simulate(consortium, tmp_path / "output", engine="ray")
    assert caught.value.exit_code == 5
    assert not (tmp_path / "output" / "report.json").exists()
