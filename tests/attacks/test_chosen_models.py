"""What a cheating coordinator learns by choosing the models that owners measure and test on: documented breaks.

It may send any model as a merged candidate, and any layers between two sums. Here it sends a detector of one word, of
which it knows that one owner alone uses it. Every message is one that honest owners accept, every total is over all of
them; but all the other owners' parts of it are nothing, or known. SECURITY.md b4 and g say so.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from client.owner import Owner
from common.merge_methods import merged_layout, solve_step, step_layout, step_statistic, steps
from common.metrics import metrics_layout, read_total
from common.models.delta import delta_layout
from common.models.folders import load_tokenizer
from common.tensor_layout import TensorLayout
from server.checkpoint import Checkpoint
from server.coordinator import Coordinator
from tests.support.models import delta_of
from tests.support.parties import OwnersChannel, Parties, parties_of

VICTIM, WORD = "hotel", "breakfast"
SIZE = 4.0  # of the detector's code for the word, in every place
Start = Callable[[str], tuple[Parties, Coordinator]]


@pytest.fixture
def start(reviews_folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Start:
    """Parties that agreed on one method, and a coordinator of whom the owners have heard."""

    def start_run(method: str) -> tuple[Parties, Coordinator]:
        consortium = tmp_path / "consortium"
        shutil.copytree(reviews_folder, consortium)
        path = consortium / "agreement.toml"
        text = path.read_text().replace('method = "regmean"', f'method = "{method}"')
        text = text.replace('["average", "task_arithmetic", "fisher"]', "[]")
        path.write_text(text.replace("[task_arithmetic]", "[refit]\nbalances = [0.0]\n\n[task_arithmetic]"))
        context = parties_of(consortium, tmp_path / "output")
        parties = context.__enter__()
        request.addfinalizer(lambda: context.__exit__(None, None, None))
        coordinator = Coordinator(
            channel=OwnersChannel(parties.files),
            agreement=parties.agreement,
            identity=parties.identities["coordinator"],
            checkpoint=Checkpoint.open(tmp_path / "checkpoint", parties.agreement.digest()),
            num_steps=1,
        )
        coordinator.roll_call()
        return parties, coordinator

    return start_run


@torch.no_grad()
def word_detector(parties: Parties) -> PreTrainedModel:
    """The base model, turned into one that puts out nothing at all unless the word is in the text. Then its first two
    places say so, and the label is 1 instead of 0.
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
    layout = merged_layout(parties.plan, method, number)
    vector = vector_of(parties, layout, word_detector(parties))
    coordinator.send_candidate(f"{method} {number}", "prefix", layout, vector)


def texts(parties: Parties, owner: str, split: str) -> list[tuple[bool, int]]:
    """Of each row: whether the word is in it, and its label."""
    data = Owner(parties.files[owner]).workbench.data
    word = load_tokenizer(parties.base).convert_tokens_to_ids(WORD)
    rows = {"train": data.train, "validation": data.validation}[split]()
    return [
        (word in feature["input_ids"], int(label)) for feature, label in zip(rows.features, rows.targets, strict=True)
    ]


def test_42_layers_chosen_between_sums_give_one_owner_s_weight_changes_to_the_last_digit(start: Start) -> None:
    """No sum but one is needed: the coordinator's own solve of the total is then the victim's model, not the mean."""
    method = "regmean_plus_plus"
    parties, coordinator = start(method)
    send_layers(parties, coordinator, method, 0)
    send_layers(parties, coordinator, method, 1)
    step = steps(parties.plan, method)[1]
    total = coordinator.sum(step_statistic(method, step), step_layout(parties.agreement, parties.plan, method, step))
    assert total.num_owners == 3
    solved = solve_step(parties.agreement, parties.plan, method, step, total, None).delta
    for part in ("query", "key", "value"):
        name = f"bert.encoder.layer.1.attention.self.{part}.weight"
        victim = Owner(parties.files[VICTIM])
        true = delta_of(victim.workbench.own_model(), victim.workbench.load_base())[name]
        assert true.abs().max() > 1e-3
        torch.testing.assert_close(solved[name], true, atol=1e-6, rtol=1e-3)


def test_42_layers_chosen_between_sums_count_labels_of_one_owner_s_rows_with_a_word(start: Start) -> None:
    method = "refit"
    parties, coordinator = start(method)
    send_layers(parties, coordinator, method, 0)
    (step,) = steps(parties.plan, method)
    total = coordinator.sum(step_statistic(method, step), step_layout(parties.agreement, parties.plan, method, step))
    rows = texts(parties, VICTIM, "train")
    labels = [label for has_word, label in rows if has_word]
    targets = total["head_targets@0.0"][0]  # the first place, which the pooler makes 1, times onehot - 1/2
    assert targets[1] * 2 == pytest.approx(sum(labels) - (len(labels) - sum(labels)), abs=0.01)
    assert 0 < len(labels) < len(rows)


def test_43_a_chosen_candidate_turns_summed_figures_into_a_count_of_one_owner_s_rows(start: Start) -> None:
    """In any method with a sweep: accuracy on validation rows says how many rows have a word, and under which label."""
    parties, coordinator = start("regmean")
    first, second = sorted(Owner(parties.files[VICTIM]).workbench.agreed_candidates)[:2]
    layout = delta_layout(parties.plan)
    detector = word_detector(parties)
    coordinator.send_candidate(first, "validation", layout, vector_of(parties, layout, detector))
    with torch.no_grad():
        detector.classifier.weight.zero_()  # always says 0
    coordinator.send_candidate(second, "validation", layout, vector_of(parties, layout, detector))
    metrics = metrics_layout(parties.agreement, "validation", (first, second))
    total = coordinator.sum("validation", metrics, (first, second))
    figures = read_total(parties.agreement, "validation", (first, second), total.vector)
    learned = round((figures[first].pooled_accuracy - figures[second].pooled_accuracy) * figures[first].rows)
    labels = [label for has_word, label in texts(parties, VICTIM, "validation") if has_word]
    assert labels
    assert learned == sum(labels) - (len(labels) - sum(labels))
    assert not any(has for other in ("cinema", "phones") for has, _ in texts(parties, other, "validation"))
