"""The audit: known answers, the slow obvious version beside each measure, and the traps of its statistics."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor
from transformers import BertForSequenceClassification, BertForTokenClassification, PreTrainedModel

from client.audit.audit import audit
from client.audit.page import page_of
from client.audit.result import Attack, Audit, Interval, schema_text
from client.audit.rows import ComparedRows, View, differences, keys_of
from client.audit.rows import compared_rows as compared_as
from client.audit.scores import classifier_gradients, gradient_scores, losses_by_label, predict
from client.audit.selection import how_many, judge, select_greedily
from client.audit.statistics import (
    area_under_the_curve,
    attack,
    exposures,
    mean_exposure_by_chance,
    true_positive_rate,
)
from client.audit.subjects import own_subject, subject_in
from client.audit.verdict import cautions, details, headline
from client.audit.weights import lineage, moved_tokens
from client.data.canaries import canaries_of, random_rows
from client.data.rows import Rows, pool
from client.holdings import Holdings
from client.measurement.fine_tuning import fine_tune
from client.settings import OwnerSettings, Training
from common.agreement import Task
from common.errors import DataError, SettingsError
from common.settings_file import load_settings
from deploy.example.reviews import make_tokenizer
from tests.support.models import delta_of, tiny_bert
from tests.support.parties import Parties

ROOT = Path(__file__).resolve().parent.parent
TASK = Task(labels=tuple("abcdefghijklmnopqrst"), max_tokens=24)  # of 20 labels, few are right by chance
SCORES = st.lists(st.integers(-3, 3).map(float), min_size=2, max_size=12).map(np.array)


def some_rows(count: int, seed: int, task: Task = TASK) -> Rows:
    like = Rows(features=({"input_ids": [0]},), targets=np.array([0]), tokenizer=make_tokenizer())
    return random_rows(np.random.default_rng(seed), count, like, task)


def fresh_bert() -> PreTrainedModel:
    """The model before it is trained, wide awake from the start, so that it learns in seconds."""
    config = tiny_bert().config
    config.update({"id2label": dict(enumerate(TASK.labels)), "initializer_range": 0.2, "hidden_dropout_prob": 0.0})
    config.attention_probs_dropout_prob = 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertForSequenceClassification(config).eval()


@pytest.fixture(scope="module")
def memorised() -> tuple[Rows, Rows, PreTrainedModel]:
    """Members, strangers, and a model that was trained on the members, whose labels are random, until it knew them."""
    members, strangers = some_rows(60, seed=1), some_rows(120, seed=2)
    model = fresh_bert()
    fine_tune(model, members, Training(epochs=120, learning_rate=1e-2, batch_size=20), seed=0, description="")
    return members, strangers, model


# --- statistics ---


@given(members=SCORES, strangers=SCORES)
def test_the_area_is_scikit_learn_s_with_any_ties(members: np.ndarray, strangers: np.ndarray) -> None:
    is_member = np.repeat([1, 0], [len(members), len(strangers)])
    expected = roc_auc_score(is_member, np.concatenate([members, strangers]))
    assert area_under_the_curve(members, strangers) == pytest.approx(expected)


@given(members=SCORES, seed=st.integers(0, 99))
def test_true_positives_are_the_best_point_of_the_curve_within_one_percent(members: np.ndarray, seed: int) -> None:
    strangers = np.random.default_rng(seed).integers(-3, 4, 150).astype(float)
    is_member = np.repeat([1, 0], [len(members), len(strangers)])
    false, found, _ = roc_curve(is_member, np.concatenate([members, strangers]), drop_intermediate=False)
    assert true_positive_rate(members, strangers) == pytest.approx(found[false <= 0.01].max())


def test_an_interval_covers_the_truth_and_guessing_is_not_beaten_by_chance() -> None:
    random = np.random.default_rng(0)
    found = [attack("loss", random.normal(size=150), random.normal(size=150), seed=0) for _ in range(10)]
    assert sum(each.area.low <= 0.5 <= each.area.high for each in found) >= 8
    assert sum(each.beats_guessing for each in found) <= 1
    apart = attack("loss", random.normal(size=150) + 1, random.normal(size=150), seed=0)
    assert apart.area.low <= 0.76 <= apart.area.high  # Phi(1 / sqrt(2))
    assert apart.beats_guessing
    assert apart.curve[0] <= apart.curve[50] <= apart.curve[100] == 1


def test_with_fewer_than_100_strangers_one_percent_has_no_meaning() -> None:
    scores = np.random.default_rng(0).normal(size=100)
    assert attack("loss", scores, scores[:99], seed=0).true_positives is None
    assert attack("loss", scores, scores, seed=0).true_positives is not None


def test_scores_that_are_no_numbers_say_nothing() -> None:
    """A crafted base can make them, and the audit of its models goes on."""
    members, strangers = np.arange(40.0), np.arange(40.0)
    members[::2], strangers[::2] = np.nan, np.nan
    members[1], strangers[1] = np.inf, np.inf
    found = attack("gradient", members, strangers, seed=0)
    assert (found.area.value, found.beats_guessing) == (0.5, False)


def test_scores_that_are_all_equal_are_guessing() -> None:
    found = attack("gradient", np.zeros(50), np.zeros(100), seed=0)
    assert (found.area.value, found.area.low, found.area.high) == (0.5, 0.5, 0.5)
    assert not found.beats_guessing
    assert found.true_positives == Interval(value=0, low=0, high=0)


@given(losses=SCORES, seed=st.integers(0, 99))
def test_exposure_is_the_rank_in_bits(losses: np.ndarray, seed: int) -> None:
    references = np.random.default_rng(seed).integers(-3, 4, (len(losses), 63)).astype(float)
    for found, loss, others in zip(exposures(losses, references), losses, references, strict=True):
        before, ties = sum(others < loss), sum(others == loss)
        assert found == pytest.approx(6 - np.log2(1 + before + ties / 2))


def test_a_canary_that_was_never_planted_has_1_44_bits_in_the_mean() -> None:
    assert mean_exposure_by_chance(1023) == pytest.approx(1 / np.log(2), abs=0.01)
    losses, references = np.random.default_rng(0).random(4000), np.random.default_rng(1).random((4000, 63))
    assert exposures(losses, references).mean() == pytest.approx(mean_exposure_by_chance(63), abs=0.1)


# --- scores ---


def gradient_of(model: PreTrainedModel, rows: Rows, index: int) -> dict[str, Tensor]:
    """The slow way: one row, one backward pass."""
    batch, targets = rows.batch(np.array([index]))
    loss = torch.nn.functional.cross_entropy(model(**batch).logits, targets)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def product(gradient: Mapping[str, Tensor], delta: Mapping[str, Tensor]) -> float:
    return -sum(float((gradient[name] * delta[name]).sum()) for name in delta)


def test_gradient_scores_are_what_a_backward_pass_for_each_row_gives(
    memorised: tuple[Rows, Rows, PreTrainedModel],
) -> None:
    members, _, model = memorised
    base, start = fresh_bert(), fresh_bert().state_dict()
    rows = members.take(np.arange(12))
    delta = {name: change / 200 for name, change in delta_of(model, base).items()}  # a step that is short of the end
    gradients = [gradient_of(base, rows, index) for index in range(len(rows))]
    said = predict(base, rows, 5, "")
    found = gradient_scores(base, delta, rows, 5, "")
    np.testing.assert_array_equal(gradient_scores(base, delta, rows, 5, "", said.losses), found)
    np.testing.assert_allclose(found, [product(each, delta) for each in gradients], rtol=0.02, atol=1e-3)
    assert all(torch.equal(start[name], tensor) for name, tensor in base.state_dict().items())
    assert isinstance(rows.targets, np.ndarray)
    of_classifier = classifier_gradients(base, rows, rows.targets, TASK, 5, "")
    assert of_classifier is not None
    np.testing.assert_array_equal([of_classifier.said.losses, of_classifier.said.hits], [said.losses, said.hits])
    head = {name: delta[name] for name in ("classifier.weight", "classifier.bias")}
    np.testing.assert_allclose(of_classifier.scores(delta), [product(each, head) for each in gradients], rtol=1e-3)
    weight = torch.einsum("nc,nd->ncd", of_classifier.errors, of_classifier.inputs)
    torch.testing.assert_close(
        weight[3],
        torch.cat([gradients[3]["classifier.weight"], gradients[3]["classifier.bias"][:, None]], dim=1),
        rtol=1e-3,
        atol=1e-6,
    )


def test_a_loss_is_the_mean_over_a_row_s_predictions() -> None:
    rows = some_rows(7, 0, Task(kind="token-classification", labels=("a", "b", "c"), max_tokens=24))
    model = BertForTokenClassification(tiny_bert().config).eval()
    losses = []
    for index in range(7):
        batch, targets = rows.batch(np.array([index]))
        losses.append(float(torch.nn.functional.cross_entropy(model(**batch).logits[0], targets[0]).detach()))
    np.testing.assert_allclose(predict(model, rows, 3, "").losses, losses, rtol=1e-5)


def test_greedy_selection_is_the_slow_obvious_one(memorised: tuple[Rows, Rows, PreTrainedModel]) -> None:
    members, _, model = memorised
    base, delta = fresh_bert(), delta_of(model, fresh_bert())
    rows = members.take(np.arange(15))
    assert isinstance(rows.targets, np.ndarray)
    gradients = classifier_gradients(base, rows, rows.targets, TASK, 32, "")
    assert gradients is not None
    target = -torch.cat([delta["classifier.weight"], delta["classifier.bias"][:, None]], dim=1).double().flatten()
    each = torch.einsum("nc,nd->ncd", gradients.errors, gradients.inputs).double().flatten(1)
    chosen: list[int] = []
    for _ in range(6):
        left = [index for index in range(15) if index not in chosen]
        sums = {index: each[[*chosen, index]].sum(dim=0) for index in left}
        chosen.append(max(left, key=lambda index: float(torch.cosine_similarity(sums[index], target, dim=0))))
    assert select_greedily(gradients, delta, 6).tolist() == chosen


def test_a_selection_is_counted_against_a_blind_one() -> None:
    keys = [bytes([number]) for number in range(20)]
    found = judge(np.arange(5), keys, members=set(keys[:4]), strangers=set(keys[3:6]), by="greedy")
    assert (found.members, found.members_among_candidates, found.chance) == (4, 4, 1.0)
    assert (found.strangers, found.strangers_among_candidates) == (1, 2)
    assert found.p_value == pytest.approx(5 / 4845)  # 16 of the 15,504 choices of 5 have all four
    assert judge(np.arange(10, 15), keys, set(keys[:4]), set(), "greedy").p_value == 1
    assert (how_many(3), how_many(100), how_many(10**6)) == (1, 10, 500)


# --- a model that memorised ---


def test_a_model_that_memorised_its_rows_shows_them_and_the_base_does_not(
    memorised: tuple[Rows, Rows, PreTrainedModel],
) -> None:
    members, strangers, model = memorised
    both = pool([members, strangers])
    for attacked, is_shown in ((model, True), (fresh_bert(), False)):
        scores = -predict(attacked, both, 32, "").losses
        found = attack("loss", scores[:60], scores[60:], seed=0)
        assert (found.area.value > 0.95) == is_shown
        assert found.beats_guessing == is_shown
        assert is_shown or found.area.low <= 0.5 <= found.area.high
        assert found.true_positives is not None


def test_planted_canaries_are_exposed_in_a_model_that_memorised_them_and_not_in_the_base(
    memorised: tuple[Rows, Rows, PreTrainedModel],
) -> None:
    planted, _, model = memorised
    references = some_rows(255, seed=3)
    assert isinstance(planted.targets, np.ndarray)
    found = {}
    for name, attacked in (("trained", model), ("base", fresh_bert())):
        by_label = losses_by_label(attacked, references, 64, "")
        losses = predict(attacked, planted, 64, "").losses
        np.testing.assert_allclose(losses_by_label(attacked, planted, 64, "")[np.arange(60), planted.targets], losses)
        found[name] = exposures(losses, by_label[:, planted.targets].T).mean()
    assert found["trained"] > 6  # of 8
    assert found["base"] == pytest.approx(mean_exposure_by_chance(255), abs=0.6)


# --- weights ---


def test_a_token_moved_if_more_than_weight_decay_moved_it() -> None:
    base, own, merged = tiny_bert(), tiny_bert(), tiny_bert()
    tokens = [10, 11, 12, 13]
    random = torch.Generator().manual_seed(0)
    changes = torch.zeros(80, 16).index_copy(0, torch.tensor(tokens), torch.randn(4, 16, generator=random) / 100)
    others = torch.zeros(80, 16).index_copy(0, torch.tensor([13, 20]), torch.randn(2, 16, generator=random) / 100)
    with torch.no_grad():
        own.get_input_embeddings().weight.mul_(0.999).add_(changes)  # as AdamW does, whatever the rows
        merged.get_input_embeddings().weight.mul_(0.9995).add_(changes / 2 + others / 2)
    rows = Rows(features=({"input_ids": [*tokens, 30]},), targets=np.array([0]), tokenizer=make_tokenizer())
    of_own, of_merged = moved_tokens(own, base, None, rows), moved_tokens(merged, base, own, rows)
    assert of_own is not None
    assert of_merged is not None
    assert (of_own.vocabulary, of_own.moved, of_own.yours, of_own.moved_of_yours) == (80, 4, 5, 4)
    assert of_own.yours_alone is None
    assert (of_merged.moved, of_merged.moved_of_yours, of_merged.yours_alone) == (5, 4, 3)  # 13 is another's, too


def test_lineage_counts_what_is_the_base_s() -> None:
    base = {"weight": torch.randn(64, 32, generator=torch.Generator().manual_seed(0))}
    same = lineage(base, base)
    assert (same.unchanged, same.same_exponent, same.bits_per_weight) == (1, 1, 0)
    bits = base["weight"].view(torch.int32).clone()
    bits[:32] ^= 1  # a difference of one unit in the last place, up or down
    near = lineage({"weight": bits.view(torch.float32)}, base)
    assert (near.unchanged, near.same_exponent) == (0.5, 1)
    assert near.bits_per_weight == pytest.approx(1.5)  # whether it changed, and in which direction
    assert lineage({"weight": -base["weight"]}, base).same_exponent == 0
    assert lineage({"weight": torch.randn(64, 32)}, base).bits_per_weight > 20


# --- rows ---


def holdings_of(parties: Parties, owner: str, **changes: object) -> Holdings:
    settings = load_settings(parties.files[owner], OwnerSettings)
    data = settings.data.model_copy(update={"max_validation_rows": None, "max_test_rows": None})
    settings = settings.model_copy(update={"data": data})
    return Holdings(settings.model_copy(update=changes), parties.folder, parties.agreement)


def compared_rows(holdings: Holdings, most: int) -> ComparedRows:
    (rows,) = compared_as(holdings, [View(data=holdings.data)], most)
    return rows


def without_validation(holdings: Holdings) -> dict[str, object]:
    return {"data": holdings.settings.data.model_copy(update={"validation": None})}


def test_rows_that_are_set_aside_are_strangers_to_a_model_made_here_and_unknown_to_another(parties: Parties) -> None:
    data = without_validation(holdings_of(parties, "hotel"))
    brings = holdings_of(parties, "hotel", **data)
    makes = holdings_of(parties, "hotel", **data, fine_tuned=None, training=Training())
    aside = set(keys_of(makes.data.validation()))
    for holdings, unknown in ((brings, 20), (makes, 0)):
        rows = compared_rows(holdings, most=1000)
        assert rows.unknown == unknown
        assert rows.has_validation == (unknown == 0)
        assert len(rows.all_members) == 180
        assert not set(keys_of(rows.members)) & set(keys_of(rows.strangers))
    assert not aside & set(keys_of(compared_rows(makes, most=1000).members))
    assert compared_rows(makes, most=1000).all_strangers.targets.shape == (140,)


def test_rows_of_both_groups_are_in_neither_and_counted(parties: Parties) -> None:
    holdings = holdings_of(parties, "hotel")
    rows = compared_rows(holdings, most=1000)
    one, other = keys_of(rows.all_members), keys_of(rows.all_strangers)
    shared = set(one) & set(other)
    assert shared  # the example's texts are of few words
    assert rows.in_both == sum(key in shared for key in one)
    assert len(rows.members) == len(one) - rows.in_both
    assert not shared & {*keys_of(rows.members), *keys_of(rows.strangers)}
    few = compared_rows(holdings, most=12)
    assert (len(few.members), len(few.strangers), few.in_both) == (12, 12, rows.in_both)


def test_test_rows_that_are_the_training_rows_are_no_strangers(parties: Parties) -> None:
    data = holdings_of(parties, "hotel").settings.data
    same = data.model_copy(update={"test": data.train, "validation": data.train})
    with pytest.raises(DataError, match="0 training rows are left that the other files do not hold"):
        compared_rows(holdings_of(parties, "hotel", data=same), most=100)


def compared(members: Rows, strangers: Rows) -> ComparedRows:
    return ComparedRows(
        members=members,
        strangers=strangers,
        all_members=members,
        all_strangers=strangers,
        in_both=0,
        unknown=0,
        not_judged=0,
        has_validation=False,
    )


def test_strangers_that_differ_in_length_or_labels_are_said_to() -> None:
    rows, others = some_rows(200, seed=0), some_rows(200, seed=1)
    assert list(differences(compared(rows, others))) == []
    short = tuple({name: values[:8] for name, values in row.items()} for row in others.features)  # type: ignore[union-attr]
    cut = Rows(features=short, targets=others.targets, tokenizer=others.tokenizer)
    (about,) = differences(compared(rows, cut))
    assert "and the strangers 8.0" in about
    skewed = Rows(features=others.features, targets=np.zeros(200, np.int64), tokenizer=others.tokenizer)
    (about,) = differences(compared(rows, skewed))
    assert "labels of your training rows and of the strangers are distributed differently" in about


# --- canaries ---


def test_canaries_are_planted_only_where_a_line_says_so(parties: Parties) -> None:
    plain = holdings_of(parties, "hotel", fine_tuned=None, training=Training())
    planting = holdings_of(parties, "hotel", fine_tuned=None, training=Training(canaries=5))
    assert plain.canaries() is None
    assert holdings_of(parties, "hotel").canaries() is None
    train = keys_of(plain.data.train())
    assert keys_of(plain._trained_on()) == train
    canaries = planting.canaries()
    assert canaries is not None
    assert keys_of(planting._trained_on()) == train + keys_of(canaries)
    assert keys_of(planting.data.train()) == train  # which is what Grams are measured on


def test_canaries_are_known_again_by_owner_and_seed() -> None:
    like = some_rows(1, seed=0)
    found = [
        keys_of(canaries_of(owner, seed, 20, like, TASK)) for owner, seed in (("a", 0), ("a", 0), ("b", 0), ("a", 1))
    ]
    assert found[0] == found[1]
    assert all(not set(found[0]) & set(others) for others in found[2:])
    assert len(set(found[0])) == 20


@pytest.mark.parametrize("kind", ["token-classification", "causal-lm"])
def test_canaries_have_a_target_for_each_token_that_is_judged(kind: str) -> None:
    rows = some_rows(6, 0, Task(kind=kind, labels=("a", "b") if "token" in kind else ()))  # type: ignore[arg-type]
    for row, target in zip(rows.features, rows.targets, strict=True):
        assert len(row["input_ids"]) == len(target)
        assert (target != -100).sum() >= 8


def test_canaries_of_images_are_noise_and_texts_to_texts_have_none() -> None:
    images = Rows(features=np.zeros((2, 1, 8, 8), np.float32), targets=np.array([0, 1]))
    rows = canaries_of("hotel", 0, 5, images, Task(kind="image-classification", labels=("a", "b")))
    assert isinstance(rows.features, np.ndarray)
    assert rows.features.shape == (5, 1, 8, 8)
    assert len(set(keys_of(rows))) == 5
    with pytest.raises(SettingsError, match=r"training\.canaries: not for sequence-to-sequence yet"):
        some_rows(5, 0, Task(kind="sequence-to-sequence"))


# --- the whole ---


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Audit:
    """The hotel's audit of the cinema's model, as if that were the merge, with candidates."""
    from tests.support.parties import parties_of

    folder = request.getfixturevalue("trained_folder")
    with parties_of(folder, tmp_path_factory.mktemp("audited")) as parties:
        holdings, texts = holdings_of(parties, "hotel"), parties.folder / "texts.jsonl"
        texts.write_text(
            "".join((folder / "data" / "hotel" / f"{each}.jsonl").read_text() for each in ("train", "test"))
        )
        own = own_subject(holdings)
        model = subject_in(holdings, own.origin, folder / "models" / "cinema", base=None)
        return audit(holdings, own, model, texts, most_rows=1000)


def test_an_audit_attacks_the_base_the_own_model_and_the_named_one(found: Audit, trained_folder: Path) -> None:
    home = trained_folder / "data" / "hotel"
    files = {
        split: [json.loads(line)["text"] for line in (home / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "test")
    }
    candidates = [*files["train"], *files["test"]]
    base, own, model = found.models
    assert [each.name for each in found.models] == ["base", "own", "model"]
    assert [each.name for each in base.attacks] == ["loss"]
    assert base.embeddings is base.lineage is base.selection is None
    for each in (own, model):
        assert [one.name for one in each.attacks] == ["loss", "calibrated_loss", "classifier_gradient", "gradient"]
        assert each.selection is not None
        assert each.selection.candidates == len(candidates)
        assert each.selection.members_among_candidates == sum(text in files["train"] for text in candidates)
        assert each.selection.by == "greedy"
        assert each.canaries is None
    assert own.embeddings is not None
    assert own.embeddings.moved_of_yours == own.embeddings.moved == own.embeddings.yours  # a text moves its own tokens


def test_an_audit_and_its_page_hold_no_word_of_a_row(found: Audit, trained_folder: Path) -> None:
    words = {
        word
        for path in (trained_folder / "data").rglob("*.jsonl")
        for line in path.read_text().splitlines()
        for word in json.loads(line)["text"].split()
    } - {"a", "the", "our", "was", "found", "this", "in"}
    written = page_of(found).split("<body>")[1] + found.model_dump_json()
    assert words & set(re.findall("[a-z]+", re.sub("<[^>]*>", " ", written).lower())) == set()


def test_what_is_written_reads_back_and_the_schema_describes_every_field(found: Audit) -> None:
    assert Audit.model_validate_json(found.model_dump_json()) == found
    text = (ROOT / "docs" / "audit.schema.json").read_text()
    assert text == schema_text(), "run: python -m client.audit.result > docs/audit.schema.json"
    tables = json.loads(text)
    for name, table in {"Audit": tables, **tables["$defs"]}.items():
        for field, rules in table.get("properties", {}).items():
            part = tables["$defs"].get(rules.get("$ref", "").rpartition("/")[2], {})
            assert rules.get("description") or part.get("description"), f"{name}.{field}"


def test_the_verdict_says_what_an_attacker_gets_right(found: Audit) -> None:
    def with_area(low: float, beats: bool) -> Attack:
        area = Interval(value=low + 0.02, low=low, high=low + 0.05)
        return found.models[1].attacks[0].model_copy(update={"area": area, "beats_guessing": beats})

    models = (
        found.models[0].model_copy(update={"attacks": (with_area(0.55, True),)}),
        found.models[1].model_copy(update={"attacks": (with_area(0.49, False), with_area(0.69, True))}),
        found.models[2].model_copy(update={"attacks": (with_area(0.49, False),)}),
    )
    changed = found.model_copy(update={"models": models})
    said = headline(changed).replace("\u00a0", " ")
    assert (
        "has the audited model picks yours right 51 % (49 to 54) of the time: not clearly better than guessing" in said
    )
    assert "has your own model picks yours right 71 % (69 to 74) of the time." in said
    assert any(line.startswith("Even the base, which never saw your rows") for line in cautions(changed))
    alone = changed.model_copy(update={"models": models[:2]})
    assert "audited" not in headline(alone)
    few = changed.model_copy(update={"rows": found.rows.model_copy(update={"strangers": 99, "unknown": 7})})
    said = " ".join(cautions(few))
    assert "There are 99 strangers" in said
    assert "7 rows are set aside" in said
    assert "candidate texts hold" in " ".join(details(found))
