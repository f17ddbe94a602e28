"""Training at an owner: each setting against the slow obvious version, or what must hold of the weights."""

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from client.data.rows import IGNORED, Rows
from client.measurement.fine_tuning import fine_tune
from client.settings import Training
from common.errors import SettingsError
from common.merge_methods.lorm import directions
from tests.support.models import tiny_bert
from tests.support.rows import rows_of

pytestmark = pytest.mark.usefixtures("trained_anew")


ROWS = rows_of([0, 1, 2] * 4)
TRAINING = Training(epochs=2, learning_rate=1e-3, batch_size=4)


def quiet_bert() -> PreTrainedModel:
    """Without dropout, so that how rows are split over passes changes nothing."""
    model = tiny_bert()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def trained(
    training: Training, validation: Rows | None = None, model: PreTrainedModel | None = None
) -> dict[str, Tensor]:
    model = model or quiet_bert()
    fine_tune(model, ROWS, training, seed=3, description="", validation=validation)
    assert all(parameter.requires_grad for parameter in model.parameters())
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def rates(training: Training, steps: int) -> Iterator[float]:
    warm = round(training.warmup * steps)
    for step in range(steps):
        falls = (steps - step) / (steps - warm) if training.schedule == "linear" else 1.0
        yield training.learning_rate * (step / warm if step < warm else falls)


def by_hand(training: Training) -> dict[str, Tensor]:
    model = quiet_bert().train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=training.weight_decay)
    random = np.random.default_rng(3)
    orders = [random.permutation(len(ROWS)) for _ in range(training.epochs)]
    batches = [order[start : start + 4] for order in orders for start in range(0, len(ROWS), 4)]
    for indices, rate in zip(batches, rates(training, len(batches)), strict=True):
        batch, targets = ROWS.batch(indices)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(**batch).logits, targets).backward()
        norm = torch.stack([each.grad.norm() for each in model.parameters() if each.grad is not None]).norm()
        if training.max_gradient_norm is not None and norm > training.max_gradient_norm:
            for each in model.parameters():
                if each.grad is not None:
                    each.grad *= training.max_gradient_norm / norm
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"schedule": "linear"},
        {"warmup": 0.5},
        {"schedule": "linear", "warmup": 0.34},
        {"max_gradient_norm": 0.01},
        {"accumulation": 3},
    ],
    ids=str,
)
def test_training_is_what_the_obvious_loop_does(changes: dict[str, object]) -> None:
    training = TRAINING.model_copy(update=changes)
    expected = by_hand(training)
    for name, parameter in trained(training).items():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=2e-5, msg=name)


def test_the_settings_change_the_weights() -> None:
    plain = trained(TRAINING)
    for changes in ({"schedule": "linear"}, {"warmup": 0.5}, {"max_gradient_norm": 0.01}):
        other = trained(TRAINING.model_copy(update=changes))
        assert any((plain[name] - other[name]).abs().max() > 1e-4 for name in plain), changes


def test_lora_changes_each_layer_by_a_matrix_of_its_rank_and_trains_the_head() -> None:
    start, after = dict(tiny_bert().named_parameters()), trained(TRAINING.model_copy(update={"lora_rank": 2}))
    changed = {name for name in after if not torch.equal(after[name], start[name])}
    assert {name for name in changed if not name.startswith("bert.")} == {"classifier.weight", "classifier.bias"}
    body = {name for name in changed if name.startswith("bert.")}
    assert body == {
        name for name in after if name.startswith("bert.") and after[name].ndim == 2 and "embed" not in name
    }
    for name in body:
        assert torch.linalg.matrix_rank(after[name] - start[name], rtol=1e-3) <= 2


def test_lora_may_name_layers_and_leaves_alone_what_the_agreement_does() -> None:
    training = TRAINING.model_copy(update={"lora_rank": 2, "lora_layers": ("query", "value")})
    model = quiet_bert()
    fixed = "bert.encoder.layer.0.attention.self.query.weight"
    model.get_parameter(fixed).requires_grad_(False)
    start = copy.deepcopy(model.state_dict())
    fine_tune(model, ROWS, training, seed=3, description="")
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    assert {name.rsplit(".", 2)[-2] for name in changed} == {"query", "value", "classifier"}
    assert fixed not in changed
    assert not model.get_parameter(fixed).requires_grad
    with pytest.raises(SettingsError, match="no linear layer that the agreement merges is named q_proj"):
        trained(TRAINING.model_copy(update={"lora_rank": 2, "lora_layers": ("q_proj",)}))


def test_owners_that_train_the_second_factors_alone_share_the_first() -> None:
    training = TRAINING.model_copy(update={"lora_rank": 2, "lora_layers": ("query",), "lora_shared": True})
    one, other = quiet_bert(), quiet_bert()
    fine_tune(one, ROWS, training, seed=3, description="")
    fine_tune(other, ROWS.take(np.arange(len(ROWS) - 4)), training, seed=3, description="")
    name = "bert.encoder.layer.1.attention.self.query.weight"
    changes = [(each.get_parameter(name) - quiet_bert().get_parameter(name)).detach().double() for each in (one, other)]
    assert not torch.allclose(*changes, rtol=0.1, atol=0)
    read = [directions(change.T, 2, name) for change in changes]
    torch.testing.assert_close(*read, rtol=0, atol=1e-3)


def test_the_same_seed_gives_the_same_weights_bit_for_bit() -> None:
    training = TRAINING.model_copy(update={"lora_rank": 2, "schedule": "linear", "accumulation": 2})
    one, other = trained(training, model=tiny_bert()), trained(training, model=tiny_bert())
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_training_ends_when_validation_gains_nothing_and_takes_the_best_epoch() -> None:
    """Rows whose labels are never trained on: from the first epoch on, it only gets worse."""
    wrong = rows_of([(label + 1) % 3 for label in [0, 1, 2] * 4])
    stopped = trained(Training(epochs=40, learning_rate=1e-3, batch_size=4, patience=2), validation=wrong)
    once = trained(Training(epochs=1, learning_rate=1e-3, batch_size=4))
    assert all(torch.equal(stopped[name], once[name]) for name in once)


@pytest.mark.parametrize(
    "changes", [{"accumulation": 64}, {"lora_layers": ("query",)}, {"lora_shared": True}, {"warmup": 1.5}]
)
def test_training_settings_fit_together(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Training(**changes)  # type: ignore[arg-type]


def test_a_row_that_is_not_judged_anywhere_is_no_division_by_zero() -> None:
    model = quiet_bert()
    nothing = Rows(
        features=ROWS.features[:4], targets=np.array([0, IGNORED, IGNORED, IGNORED]), tokenizer=ROWS.tokenizer
    )
    fine_tune(model, nothing, TRAINING.model_copy(update={"accumulation": 4}), seed=0, description="")
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
