"""What a malicious coordinator could learn by choosing the models that owners measure and test on.

Instead of a merge, it sends a detector of one word, of which it knows that only one owner uses it. By default owners
verify what they are sent, and find it. Where an agreement turns that off, or another owner colludes, these are
documented breaks: honest owners accept every message, and every total is over all of them, but all the other owners'
parts of it are zero, or known. SECURITY.md, b4 and g, says so.
"""

import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import server.coordinator
from client import verification
from client.owner import Owner
from client.verification import Evidence, check_no_evidence
from common.certificates import check_delivery
from common.errors import OwnerRefused, WrongModel
from common.mapped import sha256_of
from common.merge_methods import METHODS, Hyperparameters
from common.merge_methods.logit_adjusted import SHARES
from common.merge_methods.method import MultiRoundMethod
from common.messages import CheckKeys, CheckShares, KeyShares, Message, OpenSum, Packet, Refusal
from common.metrics import read_total
from common.models.folders import load_tokenizer
from common.schedule import Delivery, Round, RoundKind, Schedule, schedule_of
from common.summation import wide
from common.summation.protocol import Total
from common.tensor_layout import TensorLayout
from common.verification import Claim, Sent, corrections
from deploy.cli import cli
from deploy.commands import client
from deploy.launch.processes import FollowedFile, NewFiles
from server import merge
from server.checkpoint import Checkpoint
from server.coordinator import Coordinator
from server.merge import prepare
from tests.support.models import delta_of
from tests.support.owner_process import roll_call
from tests.support.parties import OwnersChannel, Parties, parties_with_method

VICTIM, WORD = "hotel", "breakfast"
SIZE = 4.0  # of the detector's code for the word, in every place
Start = Callable[[str], tuple[Parties, Coordinator]]


@pytest.fixture
def start(two_blocks_folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Start:
    """Parties that agreed on one method, and a coordinator of whom the owners have heard."""

    def start_run(method: str) -> tuple[Parties, Coordinator]:
        context = parties_with_method(two_blocks_folder, tmp_path, method)
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


# --- where merges are verified, which is the default ---


class RefusingChannel(OwnersChannel):
    """Owners that answer a wrong model with its code, as client/app.py does."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        super().__init__(files)
        self.answered: list[Message] = []  # by the first owner

    def answer(self, node: int, request: Message) -> Message | None:
        try:
            answer = super().answer(node, request)
        except WrongModel as error:
            return Refusal(code=error.code)
        if node == 0:
            self.answered.append(request)
        return answer

    def _answers(self, node: int, packet: Packet) -> Packet | None:
        answers: list[Message] = []
        for request in packet:  # up to the first that is refused
            answers += [answer] if (answer := self.answer(node, request)) is not None else []
            if isinstance(answers[-1], Refusal):
                break
        return tuple(answers)


@dataclass
class Cheat:
    """A run whose coordinator plays by the book, except where `change` replaces what it sends."""

    parties: Parties
    channel: RefusingChannel
    change: Callable[[Delivery, np.ndarray], np.ndarray]
    sent: dict[int, str] = field(default_factory=dict)  # by position, the digest of what was sent

    def run(self) -> OwnerRefused:
        """What ends the run."""
        honest = Coordinator.deliver

        def deliver(self_: Coordinator, delivery: Delivery, vector: np.ndarray, *rest: Any, **named: Any) -> None:
            changed = self.change(delivery, vector)
            self.sent[delivery.position] = sha256_of(changed)
            honest(self_, delivery, changed, *rest, **named)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Coordinator, "deliver", deliver)
            patch.setattr(server.coordinator, "wrong_claims", lambda claims, total: [])
            with pytest.raises(OwnerRefused) as refused:
                prepare(self.parties.coordinator, self.channel).run()
        return refused.value

    def said(self, capsys: pytest.CaptureFixture[str]) -> str:
        """What `amalgram verify OWNER.toml` prints at the first owner."""
        capsys.readouterr()
        assert cli(["verify", str(self.parties.files[self.first])], standalone_mode=False) == WrongModel.exit_code
        return capsys.readouterr().out

    @property
    def first(self) -> str:
        """The first owner."""
        return next(iter(self.parties.files))

    @property
    def given(self) -> list[str]:
        """The kinds of rounds that the first owner measured and gave its numbers for, in order."""
        schedule, sessions, kinds = schedule_for(self.parties), dict[str, int](), list[str]()
        for message in self.channel.answered:
            if isinstance(message, OpenSum):
                sessions[message.session] = message.position
            if isinstance(message, KeyShares):
                kinds.append(schedule.round_at(sessions[message.session]).kind)
            if isinstance(message, CheckKeys):
                kinds.append("check")
        return kinds


@pytest.fixture
def cheat(two_blocks_folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., Cheat]:
    def make(
        method: str, change: Callable[[Parties, Delivery, np.ndarray], np.ndarray], adapter_rank: int | None = None
    ) -> Cheat:
        context = parties_with_method(two_blocks_folder, tmp_path, method, verified=True, adapter_rank=adapter_rank)
        parties = context.__enter__()
        request.addfinalizer(lambda: context.__exit__(None, None, None))
        (parties.output / ".amalgram").touch()
        channel = RefusingChannel(parties.files)
        return Cheat(parties, channel, lambda delivery, vector: change(parties, delivery, vector))

    return make


def evidence_of(parties: Parties, owner: str) -> Evidence:
    path = Owner(parties.files[owner]).state.evidence(parties.agreement.digest())
    assert path is not None
    return Evidence.model_validate_json(path.read_bytes())


def marked_wrong(run: Cheat, said: str) -> Delivery:
    """The one delivery that is called wrong. Its digest and the coordinator's signature under it are in the record."""
    evidence = evidence_of(run.parties, run.first)
    (position,) = evidence.false
    (lie,) = (each for each in evidence.delivered if each.position == position)
    assert "The coordinator signed each of these, which it sent; its signatures are valid:" in said
    assert [line for line in said.splitlines() if "  WRONG" in line] == [
        f"  event {position}: SHA-256 {lie.digest}  {lie.model}  WRONG, says {run.first}"
    ]
    assert run.sent[position] == lie.digest
    check_delivery(run.parties.agreement, evidence.run, lie.delivered, bytes.fromhex(lie.signature))
    delivery = schedule_for(run.parties).events[position]
    assert isinstance(delivery, Delivery)
    return delivery


@pytest.mark.parametrize("method", ["refit", "regmean_plus_plus"])
def test_42_layers_that_are_not_the_merge_are_found_before_anything_is_measured(
    cheat: Callable[..., Cheat], method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def detector(parties: Parties, delivery: Delivery, vector: np.ndarray) -> np.ndarray:
        is_first = (delivery.kind, delivery.step) == ("merged_step", 0)
        if delivery.kind == "correction":
            return np.zeros_like(vector)  # within every bound
        return vector_of(parties, delivery.layout, word_detector(parties)) if is_first else vector

    run = cheat(method, detector)
    refused = run.run()
    assert (refused.code, refused.exit_code) == ("wrong-model", 6)
    assert run.given == ["contribution", "check"]  # no step
    assert marked_wrong(run, run.said(capsys)).kind == "merged_step"
    owner = Owner(run.parties.files[run.first])
    assert not (owner.state.folder / "run").exists()
    with pytest.raises(WrongModel, match="not the merge"):  # nothing more is answered, to whatever run
        owner.answer(roll_call(run.parties))


def test_43_a_candidate_that_is_not_the_merge_is_never_judged(cheat: Callable[..., Cheat]) -> None:
    """The last of five candidates is crafted, except for what it shares with the first; on none of them anything is
    measured.
    """

    def detector(parties: Parties, delivery: Delivery, vector: np.ndarray) -> np.ndarray:
        if delivery.kind == "correction":
            return np.zeros_like(vector)
        if delivery.names != ("regmean@0.99",):
            return vector
        claims = [claim for each in schedule_for(parties).rounds for claim in each.claims]
        (claim,) = (each for each in claims if each.delivery == delivery.position)
        crafted = vector_of(parties, delivery.layout, word_detector(parties))
        for name, _ in claim.known:
            delivery.layout.read(crafted, name)[...] = delivery.layout.read(vector, name)
        return crafted

    run = cheat("regmean", detector)
    assert run.run().code == "wrong-model"
    assert run.given == ["contribution", "check"]


def test_122_a_published_model_with_a_backdoor_in_one_entry(
    cheat: Callable[..., Cheat], capsys: pytest.CaptureFixture[str]
) -> None:
    def backdoor(parties: Parties, delivery: Delivery, vector: np.ndarray) -> np.ndarray:
        changed = vector.copy()
        if delivery.kind == "candidate":
            head = delivery.layout.read(changed, "classifier.weight")
            head[0, 0] += 1e-4 * float(np.linalg.norm(head))
        return changed

    run = cheat("average", backdoor)
    assert run.run().code == "wrong-model"
    assert run.given == ["contribution", "check"]
    wrong = "1/means/bert.embeddings.word_embeddings.weight and others"  # the classifier's rows are as long
    assert evidence_of(run.parties, run.first).wrong == (wrong,)
    printed = run.said(capsys)
    assert f"\n  {wrong}\n" in printed
    assert marked_wrong(run, printed).kind == "candidate"
    assert "Those who checked it: hotel, cinema, phones." in printed
    assert "these signatures are valid, and this program added the shares up.\nThe sum is NOT zero" in printed
    with pytest.raises(WrongModel, match="not the merge"):
        check_no_evidence(Owner(run.parties.files[run.first]))  # `amalgram client` does not begin again
    assert run.run().exit_code == WrongModel.exit_code  # nor does another run of this agreement
    assert not (run.parties.output / "model").exists()
    assert not (run.parties.output / "report.json").exists()


def test_122_a_running_client_ends_once_a_model_was_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "LAST_ANSWER_SECONDS", 0.0)
    ended = subprocess.Popen(["true"])
    ended.wait()
    evidence = tmp_path / "evidence.json"
    said, told, answered = (FollowedFile(tmp_path / name) for name in ("supernode.log", "told", "superexec.log"))

    def watch() -> str:
        return client._watch(evidence, {"supernode": ended}, said, told, answered, NewFiles(tmp_path / "receipts"))

    assert watch() == "supernode ended: it logged nothing"
    evidence.write_text("{}")
    with pytest.raises(WrongModel, match="not the merge") as error:
        watch()
    assert error.value.exit_code == 6


def test_123_a_candidate_that_was_validated_is_replaced_for_the_test(
    cheat: Callable[..., Cheat], capsys: pytest.CaptureFixture[str]
) -> None:
    def other(parties: Parties, delivery: Delivery, vector: np.ndarray) -> np.ndarray:
        return vector * np.float32(1.001) if delivery.split == "test" else vector

    run = cheat("regmean", other)
    assert run.run().code == "wrong-model"
    assert run.given == ["contribution", "check", "metrics"]
    said = run.said(capsys)
    lie = marked_wrong(run, said)
    assert (lie.kind, lie.split) == ("candidate", "test")
    evidence = evidence_of(run.parties, run.first)
    (before,) = (each for each in evidence.delivered[:-1] if each.model == evidence.delivered[-1].model)
    assert f"{run.first} says that event {lie.position} should have been SHA-256 {run.sent[before.position]}:" in said
    assert f"  the coordinator signed that it sent that as event {before.position}." in said


def test_123_a_candidate_that_is_not_the_best_on_validation_rows_is_chosen(
    cheat: Callable[..., Cheat], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each of them is a merge. By choosing the worst, a coordinator would publish what nobody agreed to."""
    honest = merge.MergeRun._validation_metric
    monkeypatch.setattr(merge.MergeRun, "_validation_metric", lambda *about: -honest(*about))
    run = cheat("regmean", lambda parties, delivery, vector: vector)
    assert run.run().code == "wrong-model"
    assert run.given == ["contribution", "check", "metrics"]  # of the test, none
    said = run.said(capsys)
    lie, (says,) = marked_wrong(run, said), evidence_of(run.parties, run.first).wrong
    best = says.removesuffix(" was better on validation rows").split("; ")[1]
    (before,) = (each for each in evidence_of(run.parties, run.first).delivered if each.model == best)
    assert f"\n  {says}\n" in said
    assert f"{run.first} says that event {lie.position} should have been SHA-256 {before.digest}:" in said


def test_123_a_candidate_whose_body_is_not_what_was_merged_before(
    cheat: Callable[..., Cheat], capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the classifier is new in refit's candidate; the body was verified, and must stay as it is."""

    def other_body(parties: Parties, delivery: Delivery, vector: np.ndarray) -> np.ndarray:
        changed = vector.copy()
        if delivery.kind == "candidate":
            delivery.layout.read(changed, "bert.pooler.dense.bias")[0] += 1e-6
        return changed

    run = cheat("refit", other_body)
    assert run.run().code == "wrong-model"
    assert run.given == ["contribution", "check", "step"]  # no part of the second check
    said = run.said(capsys)
    assert marked_wrong(run, said).kind == "candidate"
    assert f"That it is wrong is {run.first}'s own word" in said


def test_123_a_candidate_of_a_sweep_with_another_mean_than_the_first(
    cheat: Callable[..., Cheat], capsys: pytest.CaptureFixture[str]
) -> None:
    """What all candidates share is proved of the first, so the others must be bit-identical there."""
    name = "bert.embeddings.LayerNorm.bias"

    def other_mean(parties: Parties, delivery: Delivery, vector: np.ndarray) -> np.ndarray:
        changed = vector.copy()
        if delivery.names == ("regmean@0.95",):
            bias = delivery.layout.read(changed, name)
            bias[0] = np.nextafter(bias[0], np.float32(1))
        return changed

    run = cheat("regmean", other_mean)
    assert run.run().code == "wrong-model"
    assert run.given == ["contribution"]  # no part of the check
    said = run.said(capsys)
    says = f"the coordinator sent a model whose {name} is not that of the regmean candidate for validation"
    assert f"\n  {says}\n" in said  # the whole sentence
    assert marked_wrong(run, said).names == ("regmean@0.95",)


def test_124_corrections_beyond_the_rounding_of_float32(
    cheat: Callable[..., Cheat], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong model whose correction says by how much. It fails twice: a float32 is also too coarse to hide the error
    from the sum of shares, up to twice what the bound allows.
    """
    errors: dict[str, torch.Tensor] = {}

    def wrong(parties: Parties, delivery: Delivery, vector: np.ndarray) -> np.ndarray:
        changed = vector.copy()
        if delivery.kind == "candidate":
            changed += np.float32(1e-3)
            for name, tensor in delivery.layout.unflatten(changed):
                errors[name] = torch.from_numpy(tensor).double() - torch.from_numpy(delivery.layout.read(vector, name))
        return changed

    def bent(claim: Claim, seed: bytes, sent: Sent) -> Iterator[tuple[str, np.ndarray]]:
        rest = {name: sent.rest[name] - errors[name] for name in sent.rest}
        return corrections(claim, seed, replace(sent, rest=rest))

    monkeypatch.setattr(merge, "corrections", bent)
    run = cheat("average", wrong)
    assert run.run().code == "wrong-model"
    assert run.given == ["contribution"]
    assert marked_wrong(run, run.said(capsys)).kind == "correction"


def test_130_an_adapter_that_is_not_the_cut_of_the_merge_is_never_judged(
    cheat: Callable[..., Cheat], capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole model is the merge and the factors fit each other, but they are another matrix's."""
    layer = "bert.encoder.layer.0.attention.self.query.weight"

    def other_factors(parties: Parties, delivery: Delivery, vector: np.ndarray) -> np.ndarray:
        changed = vector.copy()
        if delivery.kind == "candidate":
            delta = torch.from_numpy(delivery.layout.read(changed, layer)).double()
            directions = torch.linalg.svd(delta).U[:, 1:3].float()  # the second and the third
            delivery.layout.read(changed, f"adapter_up/{layer}")[:] = directions.numpy()
            delivery.layout.read(changed, f"adapter_down/{layer}")[:] = (directions.double().T @ delta).float().numpy()
        return changed

    run = cheat("average", other_factors, adapter_rank=2)
    assert run.run().code == "wrong-model"
    assert run.given == ["contribution", "check"]
    said = run.said(capsys)
    assert f"\n  the coordinator sent factors of {layer} that are not the closest of their rank\n" in said
    assert marked_wrong(run, said).kind == "candidate"


@pytest.mark.parametrize(
    ("method", "made"),
    [("isotropic", "bert.encoder.layer.0.output.dense.weight"), ("logit_adjusted", "classifier.bias")],
)
def test_147_what_the_method_s_function_did_not_make_is_never_judged(
    cheat: Callable[..., Cheat], method: str, made: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was solved is the merge, but one number of what follows from it is not."""

    def wrong_function(parties: Parties, delivery: Delivery, vector: np.ndarray) -> np.ndarray:
        changed = vector.copy()
        if delivery.kind == "candidate":
            delivery.layout.read(changed, f"applied/{made}").reshape(-1)[1] += 1e-3
        return changed

    run = cheat(method, wrong_function)
    assert run.run().code == "wrong-model"
    assert run.given == ["contribution", "check"]
    said = run.said(capsys)
    assert f"\n  the coordinator sent another {made} than the method makes of the owners' merge\n" in said
    assert marked_wrong(run, said).kind == "candidate"


def test_147_what_a_function_is_applied_to_is_verified_too(cheat: Callable[..., Cheat]) -> None:
    """The classifier's bias follows from the shares of labels that were sent, but these are not the owners'."""

    def wrong_shares(parties: Parties, delivery: Delivery, vector: np.ndarray) -> np.ndarray:
        changed = vector.copy()
        if delivery.kind == "candidate":
            layout, workbench = delivery.layout, Owner(parties.files["hotel"]).workbench
            layout.read(changed, SHARES)[:] = layout.read(changed, SHARES)[::-1].copy()
            solved = {each.name: torch.from_numpy(layout.read(changed, each.name)) for each in layout.entries}
            ((name, bias),) = workbench.function("logit_adjusted", "logit_adjusted")(solved)
            layout.read(changed, f"applied/{name}")[:] = bias.float().numpy()
        return changed

    run = cheat("logit_adjusted", wrong_shares)
    assert run.run().code == "wrong-model"
    assert run.given == ["contribution", "check"]


def test_130_an_adapter_of_a_model_that_is_not_the_merge_is_never_judged(cheat: Callable[..., Cheat]) -> None:
    """The factors are the cut of what was sent, and that is wrong in one number."""

    def wrong_whole(parties: Parties, delivery: Delivery, vector: np.ndarray) -> np.ndarray:
        changed = vector.copy()
        if delivery.kind == "candidate":
            delivery.layout.read(changed, "classifier.bias")[0] += 1e-2  # it travels with the adapter as it is
        return changed

    run = cheat("average", wrong_whole, adapter_rank=2)
    assert run.run().code == "wrong-model"
    assert run.given == ["contribution", "check"]


# --- where merges are verified, and an owner colludes ---


class ColludingChannel(RefusingChannel):
    """The last owner sends its shares of a check after the others, when the coordinator has told it theirs."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        super().__init__(files)
        self.given_by_others: dict[int, np.ndarray] = {}

    def exchange(self, requests: Mapping[int, Packet], timeout_seconds: float) -> Iterator[tuple[int, Packet | None]]:
        yield from super().exchange(dict(sorted(requests.items())), timeout_seconds)

    def answer(self, node: int, request: Message) -> Message | None:
        is_last = node == len(self.files) - 1
        if not isinstance(request, CheckKeys) or not is_last:
            reply = super().answer(node, request)
            if isinstance(reply, CheckShares):
                self.given_by_others[node] = reply.payload
            return reply
        assert len(self.given_by_others) == node
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(verification, "shares", partial(self._what_hides_the_rest, request.nonces))
            return super().answer(node, request)

    def _what_hides_the_rest(
        self, keys: bytes, owner: Owner, round_: Round, keys_digest: bytes
    ) -> Iterator[tuple[str, np.ndarray]]:
        """The others' shares add up to what they sent, less the masks that they share with the last owner."""
        check = owner.state.run.check
        assert check is not None
        joint = verification._sum_of(owner, round_, check, keys)
        masks = joint.masked(bytes.fromhex(check.seed), owner.name, np.zeros(round_.layout.size, dtype="<u8"))
        sent = (vector.reshape(-1, wide.WORDS) for vector in (masks, *self.given_by_others.values()))
        known = reduce(wide.add, sent)
        hiding = wide.subtract(np.zeros_like(known), known).reshape(-1)
        for entry in round_.layout.entries:
            array = round_.layout.read(hiding, entry.name)
            array[..., -1, :] = 0  # of each sum the scale, to which it adds nothing
            yield entry.name, array


class Opened(Exception):  # noqa: N818 - the attacker has what it wanted
    """The total that a colluding owner helped to open."""


def first_total(cheat: Cheat, kind: RoundKind) -> Total:
    """Of the first round of this kind, which an unchanged coordinator opens. Only what it delivers is changed."""
    honest, deliver, totals = Coordinator.sum, Coordinator.deliver, list[Total]()

    def keep(self_: Coordinator, round_: Round) -> Total:
        total = honest(self_, round_)
        if round_.kind == kind:
            totals.append(total)
            raise Opened
        return total

    def changed(self_: Coordinator, delivery: Delivery, vector: np.ndarray, *rest: Any, **named: Any) -> None:
        deliver(self_, delivery, cheat.change(delivery, vector), *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Coordinator, "sum", keep)
        patch.setattr(Coordinator, "deliver", changed)
        with pytest.raises(Opened):
            prepare(cheat.parties.coordinator, cheat.channel).run()
    (total,) = totals
    return total


def test_125_one_colluding_owner_hides_layers_that_read_another_one(cheat: Callable[..., Cheat]) -> None:
    """A documented break: the victim verifies the detector with all others, and gives its sums on it."""

    def detector(parties: Parties, delivery: Delivery, vector: np.ndarray) -> np.ndarray:
        if delivery.kind == "correction":
            return np.zeros_like(vector)
        return vector_of(parties, delivery.layout, word_detector(parties))

    run = cheat("refit", detector)
    run.channel = ColludingChannel(run.parties.files)
    total = first_total(run, "step")
    assert total.num_owners == 3
    assert run.given == ["contribution", "check", "step"]
    assert Owner(run.parties.files[VICTIM]).state.run.verified
    labels = [label for has_word, label in texts(run.parties, VICTIM, "train") if has_word]
    targets = total["head_targets@0.0"][0]  # as in attack 42
    assert targets[1] * 2 == pytest.approx(sum(labels) - (len(labels) - sum(labels)), abs=0.01)


def test_125_one_colluding_owner_hides_candidates_that_count_another_one_s_rows(cheat: Callable[..., Cheat]) -> None:
    """A documented break: the victim judges what it verified with all others."""

    def detectors(parties: Parties, delivery: Delivery, vector: np.ndarray) -> np.ndarray:
        if delivery.kind == "correction":
            return np.zeros_like(vector)
        model = word_detector(parties)
        if delivery.names != first:
            with torch.no_grad():
                model.classifier.weight.zero_()  # from the second on, it always says 0
        return vector_of(parties, delivery.layout, model)

    run = cheat("task_arithmetic", detectors)
    first = schedule_for(run.parties).find("metrics", split="validation").models[:1]
    run.channel = ColludingChannel(run.parties.files)
    total = first_total(run, "metrics")
    assert run.given == ["contribution", "check", "metrics"]
    models = schedule_for(run.parties).find("metrics", split="validation").models
    metrics = read_total(run.parties.agreement, "validation", models, total.vector)
    one, other, *_ = (metrics[each] for each in models)
    labels = [label for has_word, label in texts(run.parties, VICTIM, "validation") if has_word]
    assert labels
    assert round((one.pooled_accuracy - other.pooled_accuracy) * one.rows) == 2 * sum(labels) - len(labels)
