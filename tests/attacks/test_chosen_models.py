"""What a malicious coordinator learns by choosing the models that owners measure and test on: documented breaks.

It may send any model as a merged candidate, and any layers between two rounds. Here it sends a detector of one word,
of which it knows that only one owner uses it. Honest owners accept every message, and every total is over all of them.
But all the other owners' parts of it are zero, or known. SECURITY.md, b4 and g, says so.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from client.owner import Owner
from common.merge_methods import METHODS, Hyperparameters
from common.merge_methods.method import MultiRoundMethod
from common.metrics import read_total
from common.models.folders import load_tokenizer
from common.schedule import Schedule, schedule_of
from common.tensor_layout import TensorLayout
from server.checkpoint import Checkpoint
from server.coordinator import Coordinator
from tests.support.models import delta_of
from tests.support.parties import OwnersChannel, Parties, parties_with_method

VICTIM, WORD = "hotel", "breakfast"
SIZE = 4.0  # of the detector's code for the word, in every place
Start = Callable[[str], tuple[Parties, Coordinator]]


@pytest.fixture
def start(reviews_folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Start:
    """Parties that agreed on one method, and a coordinator of whom the owners have heard."""

    def start_run(method: str) -> tuple[Parties, Coordinator]:
        context = parties_with_method(reviews_folder, tmp_path, method)
        parties = context.__enter__()
        request.addfinalizer(lambda: context.__exit__(None, None, None))
        coordinator = Coordinator(
            channel=OwnersChannel(parties.files),
            agreement=parties.agreement,
            identity=parties.identities["coordinator"],
            checkpoint=Checkpoint.open(tmp_path / "checkpoint", parties.agreement.digest()),
            schedule=schedule_for(parties),
        )
        coordinator.roll_call()
        coordinator.sum(schedule_for(parties).find("contribution"))
        return parties, coordinator

    return start_run


def schedule_for(parties: Parties) -> Schedule:
    return schedule_of(parties.agreement, parties.plan)


@torch.no_grad()
def word_detector(parties: Parties) -> PreTrainedModel:
    """The base model, turned into one whose output is zero unless the word is in the text.

    Then its first two outputs say so, and the label is 1 instead of 0.
    """
    model = Owner(parties.files[VICTIM]).workbench.load_base()
    for parameter in model.parameters():
        parameter.zero_()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm) or name.endswith("attention.self.value"):
            module.weight.copy_(torch.ones(len(module.weight)) if module.weight.ndim == 1 else torch.eye(64))
        if name.endswith(("attention.output.dense", "pooler.dense")):
            module.weight.copy_(torch.eye(64))
    code = torch.cat([torch.tensor([SIZE]), torch.full((63,), -SIZE / 63)])
    word = load_tokenizer(parties.base).convert_tokens_to_ids(WORD)
    model.bert.embeddings.word_embeddings.weight[word] = code
    model.classifier.weight[1, 0] = 10.0
    model.classifier.bias.copy_(torch.tensor([1.0, 0.0]))
    return model


def vector_of(parties: Parties, layout: TensorLayout, model: PreTrainedModel) -> np.ndarray:
    """The model as the coordinator would send it: its difference from the base."""
    delta = delta_of(model, Owner(parties.files[VICTIM]).workbench.load_base())
    vector = np.empty(layout.size, dtype=np.float32)
    layout.flatten(((entry.name, delta[entry.name].numpy()) for entry in layout.entries), vector)
    return vector


def send_layers(parties: Parties, coordinator: Coordinator, method: str, number: int) -> None:
    delivery = schedule_for(parties).deliveries("merged_step", method=method)[number]
    coordinator.deliver(delivery, vector_of(parties, delivery.layout, word_detector(parties)))


def multi_round(name: str) -> MultiRoundMethod[Hyperparameters]:
    method = METHODS[name]
    assert isinstance(method, MultiRoundMethod)
    return method


def texts(parties: Parties, owner: str, split: str) -> list[tuple[bool, int]]:
    """Of each row: whether the word is in it, and its label."""
    data = Owner(parties.files[owner]).workbench.data
    word = load_tokenizer(parties.base).convert_tokens_to_ids(WORD)
    rows = {"train": data.train, "validation": data.validation}[split]()
    return [
        (word in feature["input_ids"], int(label)) for feature, label in zip(rows.features, rows.targets, strict=True)
    ]


def test_42_layers_chosen_between_rounds_give_one_owner_s_weight_changes_to_the_last_digit(start: Start) -> None:
    """The coordinator's own solve of the step's total is then the victim's model, not the mean."""
    method = multi_round("regmean_plus_plus")
    parties, coordinator = start(method.name)
    settings = parties.agreement.merge_settings(parties.plan)
    first, second = schedule_for(parties).steps(method.name)[:2]
    send_layers(parties, coordinator, method.name, 0)
    coordinator.sum(first)
    send_layers(parties, coordinator, method.name, 1)
    total = coordinator.sum(second)
    assert total.num_owners == 3
    assert second.step is not None
    solved = method.solve_step(settings, second.step, total, None).delta
    for part in ("query", "key", "value"):
        name = f"bert.encoder.layer.1.attention.self.{part}.weight"
        victim = Owner(parties.files[VICTIM])
        true = delta_of(victim.workbench.own_model(), victim.workbench.load_base())[name]
        assert true.abs().max() > 1e-3
        torch.testing.assert_close(solved[name], true, atol=1e-6, rtol=1e-3)


def test_42_layers_chosen_between_rounds_count_labels_of_one_owner_s_rows_with_a_word(start: Start) -> None:
    parties, coordinator = start("refit")
    send_layers(parties, coordinator, "refit", 0)
    total = coordinator.sum(schedule_for(parties).steps("refit")[0])
    rows = texts(parties, VICTIM, "train")
    labels = [label for has_word, label in rows if has_word]
    targets = total["head_targets@0.0"][0]  # the first input, which the pooler makes 1, times onehot - 1/2
    assert targets[1] * 2 == pytest.approx(sum(labels) - (len(labels) - sum(labels)), abs=0.01)
    assert 0 < len(labels) < len(rows)


def test_43_a_chosen_candidate_turns_summed_metrics_into_a_count_of_one_owner_s_rows(start: Start) -> None:
    """In any method with a sweep: accuracy on validation rows says how many rows have a word, and under which label."""
    parties, coordinator = start("regmean")
    detector = word_detector(parties)
    slots = schedule_for(parties).deliveries("candidate", method="regmean", split="validation")
    for number, slot in enumerate(slots):
        coordinator.deliver(slot, vector_of(parties, slot.layout, detector), slot.names[0])
        if number == 0:
            with torch.no_grad():
                detector.classifier.weight.zero_()  # from the second on, it always says 0
    validation = schedule_for(parties).find("metrics", split="validation")
    total = coordinator.sum(validation)
    metrics = read_total(parties.agreement, "validation", validation.models, total.vector)
    first, second = (metrics[slot.names[0]] for slot in slots[:2])
    learned = round((first.pooled_accuracy - second.pooled_accuracy) * first.rows)
    labels = [label for has_word, label in texts(parties, VICTIM, "validation") if has_word]
    assert labels
    assert learned == sum(labels) - (len(labels) - sum(labels))
    assert not any(has for other in ("cinema", "phones") for has, _ in texts(parties, other, "validation"))
