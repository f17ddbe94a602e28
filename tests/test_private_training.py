"""Training with noise: what it bounds, against the slow obvious version; and what undoes the bound, numbered as in
SECURITY.md.
"""

import json
import re
import shutil
from dataclasses import replace
from math import comb, exp, inf, log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BertForSequenceClassification

from client import holdings
from client.data.rows import Rows
from client.measurement import private_training
from client.measurement.private_training import (
    clipped_sum,
    drawn_units,
    fine_tune_privately,
    gradients_by_row,
    noise_multiplier,
    noised_sum,
)
from client.owner import Owner
from client.repeats import Repeat, terms_of
from client.settings import Training
from common.agreement import AgreementDraft
from common.errors import AmalgramError, DataError, ModelError, SettingsError
from common.merge_methods import METHODS
from common.merge_methods.method import MultiRoundMethod
from common.messages import PartRequest
from common.privacy.budget import most_right_guesses, together
from common.settings_file import parse_settings, parse_toml
from deploy.commands.agree import consent_text
from deploy.simulation.simulate import simulate
from tests.support.errors import in_two_lines
from tests.support.fixtures import TRAIN
from tests.support.models import tiny_bert
from tests.support.owner_process import OTHER, Process, opening_of
from tests.support.parties import parties_of
from tests.support.rows import rows_of

TRAINING = Training(epochs=1, learning_rate=1e-2, batch_size=12)  # all rows at once: the accountant is quick then
ROWS = rows_of([0, 1, 2] * 4)


def bert() -> BertForSequenceClassification:
    """A tiny BERT of which only what may be trained with noise is."""
    model = tiny_bert()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embeddings" not in name or "LayerNorm" in name)
    return model


def trained_of(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def quiet(model: BertForSequenceClassification) -> BertForSequenceClassification:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([each.double().reshape(-1) for each in tensors])


def by_hand(model: BertForSequenceClassification, units: list[list[int]], bound: float) -> Tensor:
    """Row by row."""
    total = torch.zeros(sum(each.numel() for each in trained_of(model)), dtype=torch.float64)
    for unit in units:
        gradient = torch.zeros_like(total)
        for row in unit:
            model.zero_grad()
            batch, targets = ROWS.batch(np.array([row]))
            nn.functional.cross_entropy(model(**batch).logits, targets).backward()
            gradient += flat([torch.zeros_like(each) if each.grad is None else each.grad for each in trained_of(model)])
        total += gradient * min(1.0, bound / float(gradient.norm()))
    return total


@pytest.mark.parametrize("bound", [0.05, 100.0])
@pytest.mark.parametrize("units", [[[0], [1], [2], [3], [7]], [[0, 1, 2], [3], [4, 5]]])
def test_the_sum_is_that_of_each_unit_cut_by_hand(bound: float, units: list[list[int]]) -> None:
    model = quiet(bert())
    with gradients_by_row(model, ROWS):
        found = clipped_sum(model, ROWS, [np.array(unit) for unit in units], trained_of(model), bound)
    torch.testing.assert_close(flat(found), by_hand(model.train(), units, bound), rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def loud() -> BertForSequenceClassification:
    """Its gradients are a thousand times as large."""
    model = quiet(bert())
    with torch.no_grad():
        model.classifier.weight *= 1e3
    return model


@settings(max_examples=20)
@given(st.sets(st.integers(0, 11), min_size=1), st.integers(0, 11), st.sampled_from([0.01, 1.0]))
def test_140_no_unit_moves_the_sum_by_more_than_the_bound(
    loud: BertForSequenceClassification, rows: set[int], unit: int, bound: float
) -> None:
    others = [np.array([row]) for row in sorted(rows - {unit})]
    with gradients_by_row(loud, ROWS):
        sums = [
            flat(clipped_sum(loud, ROWS, units, trained_of(loud), bound)) if units else torch.zeros(1).double()
            for units in ([*others, np.array([unit])], others)
        ]
    # Not exactly: one row more rounds the others' gradients otherwise (SECURITY.md, "Gradients").
    assert float((sums[0] - sums[1]).norm()) <= bound * (1 + 1e-3)


def test_140_a_unit_whose_gradient_is_not_finite_adds_nothing(loud: BertForSequenceClassification) -> None:
    broken = quiet(bert())
    with torch.no_grad():
        broken.bert.embeddings.word_embeddings.weight[ROWS.features[3]["input_ids"][0]] = inf
    rows = [index for index in range(12) if ROWS.features[3]["input_ids"][0] not in ROWS.features[index]["input_ids"]]
    with gradients_by_row(broken, ROWS.take(np.array(rows))):
        trained = trained_of(broken)
        alone = clipped_sum(broken, ROWS, [np.array([rows[0]])], trained, 1.0)
        both = clipped_sum(broken, ROWS, [np.array([rows[0]]), np.array([3])], trained, 1.0)
    torch.testing.assert_close(flat(alone), flat(both), rtol=1e-4, atol=1e-6)


def test_149_no_row_decides_what_later_rows_meet() -> None:
    """Dropout's draws follow from the agreement's seed, and a row more moves on by some of them."""
    rows, model = rows_of([0, 1, 2] * 12), bert()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    units, sums = [np.array([row]) for row in range(36)], []
    with gradients_by_row(model, rows):
        for some in (units, units[1:]):
            torch.manual_seed(0)
            sums.append(flat(noised_sum(model, rows, some, trained_of(model), bound=0.01, sigma=0.0, at_once=6)))
    assert float((sums[0] - sums[1]).norm()) <= 0.01 * (1 + 1e-6)


class Padded(BertForSequenceClassification):
    """What it says of a row depends on how long the longest one beside it is."""

    def forward(self, **inputs: Any) -> Any:
        found = super().forward(**inputs)
        found.logits = found.logits * inputs["input_ids"].shape[1]
        return found


def test_143_a_row_is_compared_beside_a_much_longer_one() -> None:
    with pytest.raises(ModelError, match="its layers mix the rows of a batch"):
        fine_tune_privately(
            Padded(tiny_bert().config), ROWS, np.arange(12), TRAINING, 8.0, 1e-5, seed=0, description=""
        )


def test_141_the_noise_is_as_large_as_it_is_said_to_be() -> None:
    model = bert()
    found = flat(noised_sum(model, ROWS, [], trained_of(model), bound=0.5, sigma=3.0, at_once=4)) / 1.5
    spread = 5 / len(found) ** 0.5
    assert abs(float(found.mean())) < spread
    assert abs(float(found.pow(2).mean()) - 1) < 2**0.5 * spread
    assert abs(float(found.pow(4).mean()) - 3) < 96**0.5 * spread  # it is Gaussian
    assert abs(float((found[1:] * found[:-1]).mean())) < spread


def test_141_every_unit_is_drawn_as_often_as_it_is_said_to_be() -> None:
    units = [np.array([row]) for row in range(100_000)]
    drawn = len(drawn_units(units, 0.3))
    assert abs(drawn - 30_000) < 5 * (100_000 * 0.3 * 0.7) ** 0.5
    assert [int(row) for (row,) in drawn_units(units[:100], 1.0)] == list(range(100))


def test_142_nobody_foresees_noise_or_draws() -> None:
    """Whoever knows the agreement's seed, or the clock, could take the noise away again."""
    models = bert(), bert()
    for model in models:
        fine_tune_privately(model, ROWS, np.arange(12), TRAINING, 8.0, 1e-5, seed=0, description="")
    same = [torch.equal(a, b) for a, b in zip(*map(trained_of, models), strict=True)]
    assert not any(same)
    units = [np.array([row]) for row in range(100)]
    one, other = ([int(row) for (row,) in drawn_units(units, 0.5)] for _ in range(2))
    assert one != other


class Mixing(BertForSequenceClassification):
    """What it says of a row depends on the other rows of the batch."""

    def forward(self, **inputs: Any) -> Any:
        found = super().forward(**inputs)
        found.logits = found.logits + 10 * found.logits.mean(dim=0)
        return found


def test_143_rows_that_a_model_mixes_are_not_bounded_one_by_one() -> None:
    model = Mixing(tiny_bert().config)
    with pytest.raises(ModelError, match="its layers mix the rows of a batch"):
        fine_tune_privately(model, ROWS, np.arange(12), TRAINING, 8.0, 1e-5, seed=0, description="")
    model = bert()
    model.dropout = nn.BatchNorm1d(model.config.hidden_size)  # type: ignore[assignment]
    with pytest.raises(ModelError, match="the gradients of single rows cannot be computed"):
        fine_tune_privately(model, ROWS, np.arange(12), TRAINING, 8.0, 1e-5, seed=0, description="")


# --- what is trained ---


def test_linear_layers_and_normalisations_are_trained_and_embeddings_are_not() -> None:
    model = tiny_bert()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    fine_tune_privately(model, ROWS, np.arange(12), TRAINING, 8.0, 1e-5, seed=0, description="")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("embeddings.weight" in name), name


def test_with_lora_only_its_layers_and_the_head_are_trained() -> None:
    model = tiny_bert()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    lora = TRAINING.model_copy(update={"lora_rank": 2, "lora_layers": ("query",)})
    fine_tune_privately(model, ROWS, np.arange(12), lora, 8.0, 1e-5, seed=0, description="")
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if name.endswith("query.weight") or name.startswith("classifier")}


def test_without_noise_or_bound_it_is_training_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_training.noise, "gaussian", lambda size, scale: np.zeros(size))
    monkeypatch.setattr(private_training.noise, "uniform", np.zeros)
    training = Training(epochs=3, learning_rate=1e-3, batch_size=12, accumulation=3, max_gradient_norm=1e6)
    plain, private = quiet(bert()), quiet(bert())
    fine_tune_privately(private, ROWS, np.arange(12), training, 8.0, 1e-5, seed=0, description="")
    TRAIN(plain, ROWS, training, 0, "")
    for one, other in zip(plain.parameters(), private.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def classifier_only() -> BertForSequenceClassification:
    model = quiet(tiny_bert())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("classifier"))
    return model


def test_a_classifier_alone_is_trained_on_inputs_that_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends where training the whole model with a frozen body ends, with the same draws and noise."""
    bodies, training = [], TRAINING.model_copy(update={"epochs": 9, "batch_size": 6})
    for is_alone in (True, False):
        if not is_alone:
            monkeypatch.setattr(private_training, "_classifier_alone", lambda *_: None)
        drawn = np.random.default_rng(0)
        monkeypatch.setattr(private_training.noise, "uniform", drawn.random)
        monkeypatch.setattr(private_training.noise, "gaussian", lambda size, scale: drawn.normal(0, scale, size))  # noqa: B023
        model, calls = classifier_only(), []
        model.bert.register_forward_hook(lambda *_, calls=calls: calls.append(0))
        fine_tune_privately(model, ROWS, np.arange(12), training, 8.0, 1e-5, seed=0, description="")
        assert (len(calls) == len(ROWS)) == is_alone
        bodies.append(model)
    for one, other in zip(bodies[0].parameters(), bodies[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@settings(max_examples=15)
@given(st.floats(0.01, 10), st.booleans(), st.integers(0, 1000))
def test_140_a_classifier_s_rows_are_cut_as_opacus_gradients_are(bound: float, has_bias: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(5, 3, bias=has_bias)
    nn.init.normal_(layer.weight, generator=generator)
    alone = private_training.Classifier(layer, tiny_bert())
    features = 3 * torch.randn(8, 5, generator=generator).numpy()
    features[3, 2] = inf  # adds nothing
    rows, units = Rows(features=features, targets=np.arange(8) % 3), [np.array([row]) for row in range(8)]
    trained = trained_of(alone)
    found = clipped_sum(alone, rows, units, trained, bound)
    with gradients_by_row(alone, rows.take(np.arange(3))):
        by_row = private_training.row_gradients(alone, rows, np.array([0, 1, 2, 4, 5, 6, 7]), trained)
    total = [torch.zeros_like(each) for each in found]
    for row in range(7):
        gradient = [each[row].double() for each in by_row]
        norm = float(flat(gradient).norm())
        for whole, each in zip(total, gradient, strict=True):
            whole += each * min(1.0, bound / norm)
    for one, other in zip(found, total, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_143_no_row_rounds_what_a_classifier_says_of_another() -> None:
    """Inputs that nearly cancel, of length 1e10: the product of one row rounds otherwise than that of two rows."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(64, 3, bias=False)
    nn.init.normal_(layer.weight, generator=generator)
    weight = layer.weight.detach().double()
    long = 1e9 * torch.randn(20, 64, generator=generator).double()
    long -= long @ weight.T @ torch.linalg.pinv(weight).T
    features = torch.cat([long, torch.zeros(1, 64)]).float().numpy()  # the last adds nothing of its own
    alone, rows = private_training.Classifier(layer, tiny_bert()), Rows(features=features, targets=np.zeros(21, int))

    def moved(row: int) -> float:
        sums = [clipped_sum(alone, rows, [np.array([each]) for each in units], [], 1.0) for units in ([row], [row, 20])]
        return float((sums[1][0] - sums[0][0]).norm())

    assert max(map(moved, range(20))) < 1e-9


def test_143_no_row_without_numbers_decides_how_the_others_are_trained_on() -> None:
    model = classifier_only()
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[ROWS.features[3]["input_ids"][1]] = 1e38  # of a crafted base
    alone = private_training._classifier_alone(model, ROWS, "")
    assert alone is not None
    assert not np.isfinite(alone[1].features).all()


@pytest.mark.parametrize(("parameters", "is_warned"), [(100, False), (1_000_000, True)])
def test_noise_that_drowns_everything_is_warned_of(
    parameters: int, is_warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    private_training._warn_of_much_noise(parameters, sigma=1.0, drawn=200.0)
    assert ("such as the classifier alone" in caplog.text) == is_warned
    assert "200" not in caplog.text  # nor any other number of rows


def test_more_than_a_classifier_passes_through_the_model_at_every_step() -> None:
    assert private_training._classifier_alone(bert(), ROWS, "") is None
    pooler = quiet(tiny_bert())
    for name, parameter in pooler.named_parameters():
        parameter.requires_grad_("pooler.dense" in name)
    assert private_training._classifier_alone(pooler, ROWS, "") is None  # its output is not the model's


# --- the accountant, against an independent one ---


def epsilon_of(sigma: float, rate: float, steps: int, delta: float) -> float:
    """Mironov, Talwar and Zhang 2019, section 3.3, for whole orders; Balle et al. 2020, arXiv 1905.09982, 21."""
    found = []
    for order in range(2, 200):
        terms = [
            log(comb(order, k)) + k * log(rate) + (order - k) * log(1 - rate) + k * (k - 1) / (2 * sigma**2)
            for k in range(order + 1)
        ]
        most = max(terms)
        divergence = steps * (most + log(sum(exp(term - most) for term in terms))) / (order - 1)
        found.append(divergence + log((order - 1) / order) - (log(delta) + log(order)) / (order - 1))
    return min(found)


@pytest.mark.parametrize(("epsilon", "rate", "steps"), [(1.0, 0.01, 500), (2.0, 0.05, 100), (8.0, 0.02, 300)])
def test_what_the_accountant_says_is_what_an_independent_one_says(epsilon: float, rate: float, steps: int) -> None:
    sigma = noise_multiplier(epsilon, 1e-5, rate, steps)
    assert epsilon_of(sigma, rate, steps, 1e-5) == pytest.approx(epsilon, rel=0.03)
    assert epsilon_of(sigma / 2, rate, steps, 1e-5) > 1.9 * epsilon


@pytest.mark.parametrize(("epsilon", "exact"), [(1.0, 3.73), (2.0, 1.99), (4.0, 1.08), (8.0, 0.60)])
def test_one_step_over_all_units_needs_no_less_than_the_gaussian_mechanism(epsilon: float, exact: float) -> None:
    """Balle and Wang, ICML 2018, arXiv 1805.06530: the least noise that there can be."""
    assert exact <= noise_multiplier(epsilon, 1e-5, 1.0, 1) <= 1.2 * exact


def test_a_budget_that_no_noise_keeps_is_refused() -> None:
    with pytest.raises(SettingsError, match="cannot be kept over 1000000000 steps"):
        noise_multiplier(1e-4, 1e-9, 1.0, 1_000_000_000)


def test_what_a_budget_means() -> None:
    assert most_right_guesses(1e-12, 0) == pytest.approx(0.5)
    assert most_right_guesses(1.0, 1e-5) == pytest.approx(exp(1) / (1 + exp(1)), abs=1e-5)
    assert together([(1.0, 1e-5), (2.0, 2e-5)]) == pytest.approx((3.0, 3e-5))


# --- what is agreed, and what an owner refuses ---


@pytest.fixture
def bounded(little_folder: Path, tmp_path: Path) -> Path:
    """The little consortium, merged by averages of models that are trained with noise."""
    folder = Path(shutil.copytree(little_folder, tmp_path / "bounded", ignore=shutil.ignore_patterns("output")))
    change(
        folder / "agreement.toml",
        ('method = "regmean"', 'method = "average"'),
        ('["average", "task_arithmetic", "fisher"]', '["task_arithmetic"]'),
        ("# epsilon = 8.0", "epsilon = 8.0"),
        ("# label_set = ", "label_set = "),
    )
    return folder


def consent_of(folder: Path, tmp_path: Path) -> str:
    (tmp_path / "out").mkdir()
    with parties_of(folder, tmp_path / "out", verified=True) as parties:
        return consent_text(Owner(parties.files["hotel"]))


def refused(folder: Path, tmp_path: Path) -> str:
    (tmp_path / "out").mkdir(exist_ok=True)
    with parties_of(folder, tmp_path / "out") as parties, pytest.raises(AmalgramError) as caught:
        Owner(parties.files["hotel"]).check()
    return in_two_lines(caught.value)


def change(path: Path, *changes: tuple[str, str]) -> None:
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)


def test_144_a_method_that_reads_rows_is_not_bounded_by_training(bounded: Path) -> None:
    tables = parse_toml((bounded / "agreement.toml").read_bytes(), "agreement.toml")
    agreed = parse_settings(tables, AgreementDraft, "agreement.toml").tables
    read_none = []
    for method in METHODS.values():
        draft = tables | {"method": method.name, "compare_with": ["data_free"] if method.name == "search" else []}
        if method.name == "distill":  # predictions alone reveal no more of a row than the model that makes them
            draft |= {"distill": {"pool": "pool.jsonl", "weights": "density"}, "verification": {"required": False}}
        reads = isinstance(method, MultiRoundMethod) or bool(method.measurements(agreed))
        if reads and not (method.noised_sums(agreed) and method.name != "refit"):  # whose balances are not 0
            with pytest.raises(SettingsError, match="sums statistics of rows, to which no noise is added"):
                parse_settings(draft, AgreementDraft, "agreement.toml")
        else:
            read_none.append(parse_settings(draft, AgreementDraft, "agreement.toml").method)
    assert {"average", "task_arithmetic", "data_free"} <= set(read_none)
    assert not {"fisher", "lorm", "logit_adjusted", "refit"} & set(read_none)


def test_144_labels_that_occur_in_training_rows_have_no_part_in_metrics(bounded: Path) -> None:
    tables = parse_toml((bounded / "agreement.toml").read_bytes(), "agreement.toml")
    with pytest.raises(SettingsError, match="metrics depend on which labels an owner's training rows have"):
        parse_settings(tables | {"task": tables["task"] | {"label_set": "own"}}, AgreementDraft, "agreement.toml")


def test_145_an_owner_brings_no_model_that_was_trained_without_noise(bounded: Path, tmp_path: Path) -> None:
    (bounded / "models").mkdir()
    shutil.copytree(bounded / "base", bounded / "models" / "hotel")
    settings = (bounded / "hotel.toml").read_text().replace("# fine_tuned", "fine_tuned")
    (bounded / "hotel.toml").write_text(re.sub(r"\[training\]\n(.+\n)+", "", settings))
    says = refused(bounded, tmp_path)
    assert "models/hotel, and the agreement asks for one that is trained with noise" in says


def test_145_a_model_with_a_base_of_its_own_is_not_trained_with_noise(bounded: Path, tmp_path: Path) -> None:
    settings = (bounded / "hotel.toml").read_text()
    (bounded / "hotel.toml").write_text(settings.replace('name = "hotel"', 'name = "hotel"\nown_base = "base"'))
    assert "has a base of its own (own_base), which is not trained with noise" in refused(bounded, tmp_path)


def test_145_its_own_program_adds_the_noise_whatever_its_settings_say(
    bounded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def train(*given: Any, **_: Any) -> None:
        asked.append(given[4])

    monkeypatch.setattr(holdings, "fine_tune_privately", train)
    (tmp_path / "out").mkdir()
    with parties_of(bounded, tmp_path / "out") as parties:
        Owner(parties.files["hotel"]).workbench.own_model()
    assert asked == [8.0]


def test_what_does_not_go_with_noise_is_refused(bounded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hotel, draft = bounded / "hotel.toml", bounded / "agreement.toml"
    change(hotel, ("epochs = 6", "epochs = 6\npatience = 1"))
    assert "training.patience = 1: with privacy.epsilon" in refused(bounded, tmp_path)
    change(hotel, ("\npatience = 1", ""))
    change(draft, ("epsilon = 8.0", "epsilon = 8.0\ndelta = 0.001"))
    rows = hotel.parent / "data" / "hotel" / "train.jsonl"
    rows.write_text(rows.read_text() * 6)
    assert "is no less than 1 in 1200, the number of its units" in refused(bounded, tmp_path)
    monkeypatch.setattr(holdings, "find_spec", lambda name: None)
    assert "hint: pip install 'amalgram[dp]'" in refused(bounded, tmp_path)


@pytest.mark.parametrize("value", [None, "", "  ", True, 1.5, ["a"]])
def test_146_a_row_that_does_not_say_whose_it_is(value: Any, bounded: Path, tmp_path: Path) -> None:
    path = bounded / "data" / "hotel" / "train.jsonl"
    rows = [json.loads(line) | {"guest": index // 4} for index, line in enumerate(path.read_text().splitlines())]
    rows[6]["guest"] = value
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    change(bounded / "hotel.toml", ("[data]", '[data]\nunit = "guest"'))
    change(bounded / "agreement.toml", ("epsilon = 8.0", 'epsilon = 8.0\nunit = "column"'))
    assert "row 7: column 'guest' does not say whose the row is" in refused(bounded, tmp_path)


def test_146_rows_of_one_person_are_one_unit_and_a_missing_column_is_named(bounded: Path, tmp_path: Path) -> None:
    path = bounded / "data" / "hotel" / "train.jsonl"
    rows = [
        json.loads(line) | {"guest": f" guest {index % 50}"} for index, line in enumerate(path.read_text().splitlines())
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    change(bounded / "agreement.toml", ("epsilon = 8.0", 'epsilon = 8.0\nunit = "column"'))
    assert "hint: name the column that tells whose a row is" in refused(bounded, tmp_path)
    change(bounded / "hotel.toml", ("[data]", '[data]\nunit = "guest"'))
    with parties_of(bounded, tmp_path / "out") as parties:
        units = Owner(parties.files["hotel"]).workbench.data.units()
    assert len(units) == 200
    assert np.unique(units, return_counts=True)[1].tolist() == [4] * 50
    change(bounded / "hotel.toml", ('unit = "guest"', 'unit = "guests"'))
    assert "guests" in refused(bounded, tmp_path)


def test_150_no_second_model_is_trained_under_one_agreement(bounded: Path, tmp_path: Path) -> None:
    for path in bounded.glob("[hcp]*.toml"):
        change(path, ("epochs = 6", "epochs = 1"), ("batch_size = 32", "batch_size = 200"))
    (tmp_path / "out").mkdir()
    with parties_of(bounded, tmp_path / "out") as parties:
        process = Process(parties)
        process.sum(process.open_sum(0))
        delivered = process.deliver_candidates("validation")
        metrics = process.schedule.find("metrics", split="validation")
        train = bounded / "data" / "hotel" / "train.jsonl"
        kept = train.read_text()
        train.write_text(kept.replace("a", "e"))
        process.send("cinema", process.open_sum(1, metrics, delivered))
        with pytest.raises(DataError, match="no second one is trained under the same agreement"):
            process.send("hotel", process.open_sum(1, metrics, delivered))
        train.write_text(kept)
        process.send("hotel", process.open_sum(2, metrics, delivered))


def test_150_no_second_model_is_trained_for_a_plain_sum(bounded: Path, tmp_path: Path) -> None:
    """Its coordinator would have both, each with a noise of its own."""
    change(bounded / "agreement.toml", ('kind = "masked"', 'kind = "plain"'))
    change(bounded / "hotel.toml", ("epochs = 6", "epochs = 1"), ("batch_size = 32", "batch_size = 200"))
    (tmp_path / "out").mkdir()
    with parties_of(bounded, tmp_path / "out") as parties:
        alone = replace(parties, files={"hotel": parties.files["hotel"]})
        process = Process(alone)
        request = process.open_sum(0)
        process.send("hotel", request)
        process.send("hotel", PartRequest(session=request.session, part=0))
        assert Owner(parties.files["hotel"]).ledger.pending == ""
        shutil.rmtree(Owner(parties.files["hotel"]).workbench._kept_folder)
        process.roll_call(OTHER)
        with pytest.raises(DataError, match="no second one is trained under the same agreement"):
            process.send("hotel", opening_of(alone, process.schedule.find("contribution"), 1, run=OTHER))


def test_146_single_rows_of_a_person_are_not_set_aside(bounded: Path, tmp_path: Path) -> None:
    change(bounded / "hotel.toml", ("[data]", '[data]\nunit = "text"'), ("validation = ", "# validation = "))
    change(bounded / "agreement.toml", ("epsilon = 8.0", 'epsilon = 8.0\nunit = "column"'))
    assert "name a validation file with the rows of other people" in refused(bounded, tmp_path)


def test_what_bounded_a_row_before_bounds_no_person_now(bounded: Path, tmp_path: Path) -> None:
    change(bounded / "hotel.toml", ("[data]", '[data]\nunit = "text"'))
    change(bounded / "agreement.toml", ("epsilon = 8.0", 'epsilon = 2.0\nunit = "column"'))
    (tmp_path / "out").mkdir()
    with parties_of(bounded, tmp_path / "out", verified=True) as parties:
        owner = Owner(parties.files["hotel"])
        terms = terms_of(owner.agreement)
        repeats = [
            Repeat(
                agreement_digest=32 * "ab", terms=terms.model_copy(update={"unit": unit}), rows=1.0, weight_changes=0.0
            )
            for unit in ("row", "column")
        ]
        text = consent_text(owner, repeats)
        assert "         4      2e-05" in text  # with the one that bounded persons
        assert "EARLIER AGREEMENTS ON THESE ROWS HAD NO SUCH BOUND" in text
        assert "EARLIER AGREEMENTS" not in consent_text(owner, repeats[1:])


def test_consent_says_what_is_bounded_and_what_is_not(bounded: Path, tmp_path: Path) -> None:
    text = consent_of(bounded, tmp_path)
    assert "WHAT ONE ROW CAN CHANGE" in text
    assert "The guess is right at most 99.97 % of the time" in " ".join(text.split())
    assert "NOT BOUNDED" not in text
    assert re.search(r"training +90% +the rest +by your own steps +the gradients of your training rows", text)
    assert re.search(r"metrics +10% +\d\.\d\d +5\.29 +\d+\.?\d* +how models do on your validation and test rows", text)
    assert "2 honest ones add enough" in text


def test_a_merge_of_models_that_were_trained_with_noise(bounded: Path) -> None:
    for path in bounded.glob("[hcp]*.toml"):
        change(path, ("epochs = 6", "epochs = 1"), ("batch_size = 32", "batch_size = 200"))
    change(
        bounded / "agreement.toml",
        ('["task_arithmetic"]', '["task_arithmetic", "refit"]'),
        ("epsilon = 8.0", "epsilon = 8.0\nlegs = { refit = 0.7 }\n[refit]\nbalances = [0.0]"),
    )
    report = simulate(bounded, with_references=False)
    assert (report.agreement.privacy.epsilon, report.agreement.privacy.delta) == (8.0, 1e-5)
    assert "epsilon = 8, delta = 1e-05" in (bounded / "output" / "report.html").read_text()
    card = (bounded / "output" / "model" / "README.md").read_text()
    assert "each owner trained with DP-SGD, epsilon = 8, delta = 1e-05 for a training row" in card
    assert "Spent: training 20%, metrics 10%, refit 70%." in card
    assert report.verified
    assert report.evaluation.by_owner == {}
    assert "These metrics have noise" in (bounded / "output" / "report.html").read_text()
