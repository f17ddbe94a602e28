"""What sums still reveal: each leak is shown to be real, and the rule that closes it is shown to close it."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations_with_replacement, product
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Message
from transformers import LlamaConfig, LlamaForSequenceClassification

from client.app import app as client_app
from client.measurement.fisher import measure_fisher
from client.measurement.gram import measure_grams
from client.owner import Owner
from common.agreement import Agreement, AgreementDraft, OwnerEntry, Privacy, Summation, Task
from common.errors import DataError
from common.merge_methods import contribution_layout
from common.merge_methods.average import AVERAGE
from common.merge_methods.refit import REFIT, RefitTable, class_weights
from common.merge_methods.task_arithmetic import TASK_ARITHMETIC
from common.merge_methods.terms import ClassifierTerms, Gram, OwnerTerms
from common.models.folders import load_tokenizer
from common.models.layers import Layer
from common.models.loading import load_base
from common.models.plan import MergePlan, SharedInput, merge_plan
from common.schedule import schedule_of
from common.summation import fixed_point
from common.summation.protocol import Total
from deploy.commands.agree import consent_text
from deploy.complete import complete_agreement
from deploy.example import reviews
from deploy.simulation.in_process_grid import InProcessGrid, run_in_process
from server.app import app as server_app
from server.checkpoint import OwnerCost, Step
from server.coordinator import Coordinator
from server.run_record import step_costs
from tests.support.models import delta_of
from tests.support.parties import IDENTITIES, Parties

# --- deltas in the clear, and sums that are kept ---


def single_grams(total_gram: np.ndarray, total_product: np.ndarray, weights: list[np.ndarray]) -> list[np.ndarray]:
    """Solve sum G_i = S1, sum G_i W_i = S2 for the single G_i, symmetric: linear equations, more than unknowns."""
    d, n = len(total_gram), len(weights)
    pairs = list(combinations_with_replacement(range(d), 2))
    columns = []
    for weight in weights:
        for row, column in pairs:
            unit = np.zeros((d, d))
            unit[row, column] = unit[column, row] = 1
            columns.append(np.concatenate([unit.ravel(), (unit @ weight).ravel()]))
    right = np.concatenate([total_gram.ravel(), total_product.ravel()])
    solution = np.linalg.lstsq(np.array(columns).T, right, rcond=None)[0].reshape(n, len(pairs))
    grams = []
    for values in solution:
        gram = np.zeros((d, d))
        for (row, column), value in zip(pairs, values, strict=True):
            gram[row, column] = gram[column, row] = value
        grams.append(gram)
    return grams


def test_with_single_deltas_known_single_grams_are_solved_for() -> None:
    """Three owners, query, key and value share an input: the reason why no delta may leave, and sums are destroyed."""
    random = np.random.default_rng(0)
    rows = [random.standard_normal((50, 8)) for _ in range(3)]
    grams = [x.T @ x for x in rows]
    deltas = [random.standard_normal((8, 3 * 8)) for _ in range(3)]
    total_gram = sum(grams, np.zeros((8, 8)))
    total_product = sum((g @ d for g, d in zip(grams, deltas, strict=True)), np.zeros((8, 24)))
    for solved, gram in zip(single_grams(total_gram, total_product, deltas), grams, strict=True):
        np.testing.assert_allclose(solved, gram, atol=1e-8)
    # Without the single deltas: the attacker knows the merged one at best, and finds nothing.
    merged = np.linalg.solve(total_gram, total_product)
    for solved, gram in zip(single_grams(total_gram, total_product, [merged] * 3), grams, strict=True):
        assert np.abs(solved - gram).max() > 1


def test_no_delta_leaves_an_owner_and_no_total_stays(parties: Parties, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that a real run hands to the coordinator's node, searched for single deltas; its totals afterwards."""
    totals: list[Total] = []
    arrived: list[tuple[int, bytes]] = []
    coordinator_sum, pull = Coordinator.sum, InProcessGrid.pull_messages

    def keep_total(self: Coordinator, *arguments: object) -> Total:
        totals.append(coordinator_sum(self, *arguments))  # type: ignore[arg-type]
        return totals[-1]

    def keep_replies(self: InProcessGrid, message_ids: Iterable[str]) -> list[Message]:
        replies = pull(self, message_ids)
        arrived.extend(
            (reply.metadata.src_node_id, array.data)
            for reply in replies
            for record in reply.content.array_records.values()
            for array in record.values()
        )
        return replies

    monkeypatch.setattr(Coordinator, "sum", keep_total)
    monkeypatch.setattr(InProcessGrid, "pull_messages", keep_replies)
    (parties.output / ".amalgram").touch()
    node_configs = [{"settings": str(path)} for path in parties.files.values()]
    run_in_process(server_app, client_app, node_configs, {"coordinator": str(parties.coordinator)})

    layout = schedule_of(parties.agreement, parties.plan).find("contribution").layout
    uploads = {node: data for node, data in arrived if len(data) > layout.size * 8}
    assert set(uploads) == {2, 3, 4}
    for node, path in zip(uploads, parties.files.values(), strict=True):
        owner = Owner(path)
        delta = delta_of(owner.workbench.own_model(), owner.workbench.load_base())
        upload = np.frombuffer(uploads[node][-layout.size * 8 :], "<i8").astype(np.float64)
        for name in parties.plan.changed:
            seen = layout.read(upload, f"weighted_delta/{name}").ravel()
            true = delta[name].double().numpy().ravel()
            if len(true) > 100 and true.any():
                correlation = np.corrcoef(seen, true)[0, 1]
                assert abs(correlation) < 6 / np.sqrt(len(true))
    contribution_total = totals[0]
    assert contribution_total.layout.digest() == layout.digest()
    assert np.isnan(contribution_total.vector).all()


# --- the token histogram ---


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with rotary positions: its first attention sees a token's embedding, and nothing else."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = reviews.make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=2,
        id2label={0: "a", 1: "b"},
        label2id={"a": 0, "b": 1},
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def agreement_on(llama: Path, *, merge_token_inputs: bool) -> Agreement:
    owners = tuple(OwnerEntry(name=name) for name in ("ada", "bea", "cyd"))
    draft = AgreementDraft(
        title="t",
        base=str(llama),
        owners=owners,
        task=Task(labels=("a", "b"), max_tokens=32),
        privacy=Privacy(merge_token_inputs=merge_token_inputs),
    )
    return complete_agreement(draft, llama, {name: each.public_key for name, each in IDENTITIES.items()})


def token_counts(gram: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
    """Solve gram = sum over tokens of count * e e^T for the counts."""
    upper = np.triu_indices(len(gram))
    columns = np.array([np.outer(e, e)[upper] for e in embeddings]).T  # (d (d + 1) / 2, tokens)
    solution: np.ndarray = np.linalg.lstsq(columns, gram[upper], rcond=None)[0]
    return solution


def test_the_token_histogram_comes_out_of_a_first_gram_unless_the_rule_keeps_it(llama: Path) -> None:
    off, on = (agreement_on(llama, merge_token_inputs=merge) for merge in (True, False))
    base = load_base(llama, off.task, off.seed)
    tokens = torch.from_numpy(np.random.default_rng(1).zipf(1.5, (40, 12)).clip(1, base.config.vocab_size - 5) + 4)
    plan = merge_plan(base, off.tensors)
    grams = measure_grams(base, plan, [{"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}])
    first = next(group[0] for group in off.tensors.merged if "layers.0.self_attn.q_proj" in group[0])
    gram = grams[first.removesuffix(".weight")].matrix.numpy()
    block = base.model.layers[0]
    with torch.inference_mode():
        embeddings = block.input_layernorm(base.model.embed_tokens.weight).double().numpy()
    true = np.bincount(tokens.ravel().numpy(), minlength=len(embeddings))
    assert len(embeddings) < 16 * 17 / 2
    np.testing.assert_allclose(token_counts(gram, embeddings), true, atol=1e-3)

    kept = [group for group in on.tensors.merged if first in group]
    assert kept == []
    assert first in on.tensors.averaged
    names = {
        entry.name for entry in contribution_layout(on.methods, on.merge_settings(merge_plan(base, on.tensors))).entries
    }
    assert f"gram/{first.removesuffix('.weight')}" not in names
    # Of the same width, the next block's input has seen its neighbours: nothing comes out of it.
    second = next(name for name in grams if "layers.1.self_attn.q_proj" in name)
    assert f"gram/{second}" in names
    assert np.abs(token_counts(grams[second].matrix.numpy(), embeddings) - true).max() > 5


def test_with_absolute_positions_too_the_first_attention_is_averaged(agreement: Agreement) -> None:
    """There the counts are of tokens at places: more unknowns, but they are few and not negative, so they come out."""
    merged = {name for group in agreement.tensors.merged for name in group}
    query = "bert.encoder.layer.{}.attention.self.query.weight"
    assert query.format(0) in agreement.tensors.averaged
    assert query.format(1) in merged
    assert "bert.encoder.layer.0.attention.output.dense.weight" in merged


def test_squared_gradients_tell_which_tokens_occur_though_embeddings_were_frozen(parties: Parties) -> None:
    """Of the base model, whose embeddings have not changed at all: no rule here, the consent text says it."""
    owner = Owner(parties.files["hotel"])
    rows = owner.workbench.data.train().take(np.arange(20))
    fisher = measure_fisher(owner.workbench.load_base(), rows, seed=0)["bert.embeddings.word_embeddings.weight"]
    seen = set(fisher.any(dim=1).nonzero().ravel().tolist())
    true = {token for row in rows.features for token in row["input_ids"]}
    assert seen == true
    assert len(true) < len(fisher) / 2
    assert "squared gradients (Fisher) show which tokens occur" in " ".join(consent_text(owner).split())


# --- the same rows in several sums, each with other weights ---


def test_three_balances_tell_three_owners_apart(agreement: Agreement, plan: MergePlan) -> None:
    """Every balance is a sum of the same class sums with other weights, which follow from an owner's label counts.

    An honest coordinator's totals are enough: counts are whole numbers, so the sums of their roots give them away, and
    then, class by class, three equations give three owners' sums of the classifier's inputs.
    """
    balances, random = (0.0, 0.5, 1.0), np.random.default_rng(3)
    agreement = agreement.model_copy(update={"refit": RefitTable(balances=balances)})
    settings = agreement.merge_settings(plan)
    (step,) = REFIT.steps(settings)
    layout = REFIT.step_layout(settings, step)
    counts = sorted([(5, 9, 12), (3, 11, 4), (10, 6, 7)])  # rows of each label, owner by owner
    d, classes = next(entry.shape for entry in layout.entries if entry.name == "head_targets@0.0")
    total = np.zeros(layout.size, "<u8")
    true = []
    for owner_counts in counts:
        labels = torch.from_numpy(np.repeat(np.arange(classes), owner_counts))
        features = torch.from_numpy(random.standard_normal((len(labels), d)))
        features[:, -1] = 1
        true.append(torch.stack([features[labels == label].sum(dim=0) for label in range(classes)]).numpy())
        classifier = ClassifierTerms(
            features=features,
            targets=labels,
            scores=torch.zeros(len(labels), classes, dtype=torch.float64),
            start=torch.zeros(d, classes, dtype=torch.float64),
        )
        vector = np.empty(layout.size)
        terms = OwnerTerms(examples=len(labels), delta={}, classifier=classifier)
        layout.flatten(REFIT.step_contribution(settings, step, terms), vector)
        total += fixed_point.encode(layout, vector, 3)
    known = Total(
        layout=layout, vector=fixed_point.decode(layout, total, 3, 3), owners=("ada", "bea", "cyd"), roster_size=3
    )

    # (balances, d, classes): sum over owners of weight * sum of the class's inputs; the last input is the constant 1.
    sums = np.array([known[f"head_targets@{b!r}"] + known[f"head_gram@{b!r}"][:, -1:] / classes for b in balances])
    sums[:, -1] = [known[f"head_targets@{b!r}"][-1] + known["head_rows"][0] / classes for b in balances]
    found = single_counts(sums[0, -1].round(), sums[1, -1])
    assert found == [tuple(counts)]
    for label in range(classes):
        weights = [[weight_of_class(each, label, balance) for each in found[0]] for balance in balances]
        single = np.linalg.solve(np.array(weights), sums[:, :, label])  # (owners, d)
        np.testing.assert_allclose(single, [each[label] for each in true], atol=1e-4)


@pytest.mark.parametrize(
    ("owners", "colluders", "balances"), [(3, 0, 2), (5, 2, 2), (5, 0, 4), (7, 3, 3), (4, None, 2)]
)
def test_an_agreement_on_as_many_balances_as_tell_honest_owners_apart_is_refused(
    owners: int, colluders: int | None, balances: int
) -> None:
    def draft(count: int) -> AgreementDraft:
        return AgreementDraft(
            title="t",
            base="b",
            owners=tuple(OwnerEntry(name=f"o{index}") for index in range(owners)),
            method="refit",
            refit=RefitTable(balances=tuple(index / 10 for index in range(count))),
            summation=Summation(colluders=colluders),
        )

    draft(balances - 1)
    with pytest.raises(ValueError, match="honest owners apart"):
        draft(balances)


def weight_of_class(counts: tuple[int, ...], label: int, balance: float) -> float:
    labels = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
    return float(class_weights(labels, balance)[labels == label][0])


def single_counts(totals: np.ndarray, at_half: np.ndarray) -> list[tuple[tuple[int, ...], ...]]:
    """Every way to part `totals` rows of each label among three owners that fits the sums at balance 0.5."""
    profiles = np.array(list(product(range(3, 13), repeat=len(totals))))  # (profiles, labels)

    def half(counts: np.ndarray) -> np.ndarray:
        roots = np.sqrt(counts)
        share: np.ndarray = roots / roots.sum(axis=-1, keepdims=True) * counts.sum(axis=-1, keepdims=True)
        return share

    found = set()
    for one in profiles:
        last = totals - one - profiles
        fits = (last >= 3).all(axis=1)
        fits[fits] = (np.abs(half(one) + half(profiles[fits]) + half(last[fits]) - at_half) < 1e-5).all(axis=1)
        for other, third in zip(profiles[fits], last[fits], strict=True):
            found.add(tuple(sorted(tuple(int(n) for n in each) for each in (one, other, third))))
    return sorted(found)


def test_weight_changes_summed_with_two_kinds_of_weights_tell_two_owners_apart_so_they_are_summed_once(
    agreement: Agreement, plan: MergePlan
) -> None:
    """Weighted by rows and not: with its own known, an owner has two equations for the two others'. It needs no total:
    such sums, up to factors that all know, would be the candidates `average` and `task_arithmetic`.
    """
    random, rows = np.random.default_rng(4), np.array([200, 350, 90])
    deltas = random.standard_normal((3, 50))
    average, unweighted = rows @ deltas / rows.sum(), deltas.sum(axis=0)
    others = np.array([average * rows.sum() - rows[0] * deltas[0], unweighted - deltas[0]])
    np.testing.assert_allclose(np.linalg.solve([rows[1:], [1, 1]], others), deltas[1:], atol=1e-9)

    both = agreement.model_copy(update={"method": "average", "compare_with": ("task_arithmetic",)})
    settings = both.merge_settings(plan)
    layout = contribution_layout(both.methods, settings)
    assert {entry.name.split("/")[0] for entry in layout.entries} == {"weight", "examples", "weighted_delta"}
    total = Total(layout=layout, vector=random.random(layout.size), owners=("ada", "bea", "cyd"), roster_size=3)
    candidates = [
        AVERAGE.solve(settings, total, None, with_spectra=False).delta,
        TASK_ARITHMETIC.solve(settings, total, 0.5, with_spectra=False).delta,
    ]
    for name in plan.changed:
        torch.testing.assert_close(candidates[1][name], 0.5 * 3 * candidates[0][name])


# --- few rows ---


def test_a_gram_of_few_rows_tells_members_from_strangers_and_never_leaves(parties: Parties) -> None:
    random = np.random.default_rng(2)
    members, strangers = random.standard_normal((20, 32)), random.standard_normal((20, 32))
    gram = members.T @ members

    def looks_like_a_member(row: np.ndarray, gram: np.ndarray) -> bool:
        """Whether the row lies in the space that the Gram's rows span."""
        inside = gram @ np.linalg.pinv(gram) @ row
        return bool(np.linalg.norm(inside - row) < 1e-6 * np.linalg.norm(row))

    assert all(looks_like_a_member(row, gram) for row in members)
    assert not any(looks_like_a_member(row, gram) for row in strangers)
    owner = Owner(parties.files["hotel"])
    with pytest.raises(DataError, match="20 rows for 32 dimensions"):
        owner.workbench._checked({"layer": Gram(matrix=torch.from_numpy(gram), rows=20)})
    owner.workbench._checked({"layer": Gram(matrix=torch.eye(32, dtype=torch.float64), rows=32)})


def area_under_the_curve(members: np.ndarray, strangers: np.ndarray) -> float:
    """How often a member's score is above a stranger's."""
    return float(np.searchsorted(np.sort(strangers), members).mean() / len(strangers))


def membership(rows: int, dimensions: int, block: int) -> float:
    """Of a row among three owners' `rows` each, from the blocks of their summed Gram: by the sum of its leverages,
    which are less than a stranger's.
    """
    random = np.random.default_rng(rows)
    members, strangers = (random.standard_normal((3 * rows, dimensions)) for _ in range(2))
    scores = np.zeros((2, 3 * rows))
    for start in range(0, dimensions, block):
        part = slice(start, start + block)
        inverse = np.linalg.inv(members[:, part].T @ members[:, part])
        for score, group in zip(scores, (members, strangers), strict=True):
            score -= ((group[:, part] @ inverse - group[:, part] / len(group)) * group[:, part]).sum(axis=1)
    return area_under_the_curve(*scores)


def test_55_blocks_of_a_gram_tell_together_so_rows_are_counted_against_all_of_them(parties: Parties) -> None:
    owner = Owner(parties.files["hotel"])
    blocks = [(start, start + 64) for start in range(0, 256, 64)]
    layers = [
        Layer(weight=f"l.weight[{a}:{b}]", d_in=64, d_out=8, stored_input_first=False, features=(a, b))
        for a, b in blocks
    ]
    inputs = tuple(SharedInput(name=layer.weight, d_in=64, layers=(layer,)) for layer in layers)
    owner.workbench.__dict__["plan"] = replace(parties.plan, inputs=inputs)
    few, enough = (
        {each.name: Gram(matrix=torch.eye(64, dtype=torch.float64), rows=rows) for each in inputs}
        for rows in (255, 256)
    )
    with pytest.raises(DataError, match="255 rows for 256 dimensions"):
        owner.workbench._checked(few)
    owner.workbench._checked(enough)
    assert membership(64, 256, 64) > 0.999  # what a row for each of a block's dimensions would let through
    assert membership(2560, 256, 64) < membership(2560, 256, 256) - 0.1  # of as many rows, less than the whole


def test_of_experts_alone_no_number_of_rows_is_asked(parties: Parties) -> None:
    owner = Owner(parties.files["hotel"])
    grams = {"experts.up_proj[0]": Gram(matrix=torch.zeros(8, 8, dtype=torch.float64), rows=0)}
    with pytest.raises(DataError, match="0 rows for 8 dimensions"):
        owner.workbench._checked(grams)
    expert = Layer(weight="experts.up_proj[0]", d_in=8, d_out=8, stored_input_first=False, expert=0)
    routed = SharedInput(name="experts.up_proj[0]", d_in=8, layers=(expert,))
    owner.workbench.__dict__["plan"] = replace(parties.plan, inputs=(routed,))
    owner.workbench._checked(grams)


def test_a_tokenizer_of_the_tests_is_that_of_the_model(llama: Path) -> None:
    assert len(load_tokenizer(llama)) == load_base(llama, Task(labels=("a", "b")), 0).config.vocab_size


def test_97_the_report_does_not_say_how_long_an_owner_took() -> None:
    """Measuring takes as long as an owner has rows. So only the sum over owners is published."""

    def published(**seconds: float) -> tuple[object, ...]:
        costs = {owner: OwnerCost(waited_seconds=each, messages=1) for owner, each in seconds.items()}
        return step_costs([Step("round", "rounds", seconds=10.0, by_owner=costs)])

    assert published(ada=1.0, bea=7.0) == published(ada=6.0, bea=2.0)
    assert published(ada=1.0, bea=7.0) != published(ada=1.0, bea=6.0)
