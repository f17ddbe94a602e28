"""What would undo the noise on sums, numbered as in SECURITY.md."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import BertForSequenceClassification, BigBirdConfig, BigBirdForSequenceClassification

from client.data.rows import Rows
from client.ledger import Ledger
from client.measurement.evaluation import bounded_sums, predict_logits
from client.measurement.gram import measure_grams
from client.measurement.private_training import _classifier_alone, gradients_by_row, row_gradients
from client.owner import Owner
from client.repeats import Contributed, what_the_difference_shows
from client.repeats import terms_of as kept_of
from client.settings import OwnerSettings
from client.sketch import Sketch, sketch_of
from common.agreement import Agreement, AgreementDraft, Privacy, Task
from common.errors import AmalgramError, ConsentError, LocalProtocolError, NumericalError, SettingsError
from common.merge_methods.refit import REFIT, RefitTable
from common.merge_methods.terms import ClassifierTerms, MergeSettings, OwnerTerms, RefitNoise
from common.metrics import Score, contribution, metrics_layout
from common.privacy.legs import example_norm
from common.privacy.noise import Noise, bound_with_noise, fresh_secret
from common.settings_file import load_settings, parse_settings, parse_toml
from common.summation import fixed_point
from common.tensor_layout import TensorEntry, TensorLayout
from deploy.commands.agree import consent_text
from deploy.example.reviews import make_tokenizer
from server.bounds import check_classifier
from tests.support.errors import in_two_lines
from tests.support.merging import merge_settings, plan_for
from tests.support.models import plan_for as gram_plan
from tests.support.models import tiny_bert
from tests.support.owner_process import NONCE, OTHER, Process, delivered_by, opening_of, part_of
from tests.support.parties import parties_of
from tests.support.sums import identities_of, run, terms_of
from tests.support.verifying import Check, Contributions, verified

SIZE, OWN = 20_000, 3.0
LAYOUT = TensorLayout((TensorEntry(name="counts", shape=(SIZE,), bound=bound_with_noise(1e4, OWN), noise=OWN),))
EXACT = np.arange(float(SIZE)) % 100
DECLARED = "declared = { epsilon = 5.0, delta = 5e-6 }"


def noise_of(key: bytes, position: int = 0, layout: TensorLayout = LAYOUT) -> Noise:
    return Noise(key=key, position=position, layout=layout, num_owners=5)


def noised(key: bytes, exact: NDArray[np.float64] = EXACT, position: int = 0) -> NDArray[np.float64]:
    return noise_of(key, position).added("counts", exact)


# --- a share left out, repeated, or foreseen ---


def test_176_no_vector_leaves_without_the_noise_that_was_agreed_on() -> None:
    noise = noise_of(bytes(32))
    with pytest.raises(LocalProtocolError, match="counts has none yet; nothing has left"):
        noise.check_complete()
    noise.added("counts", EXACT)
    noise.check_complete()


def test_177_whoever_asks_again_gets_the_same_noise_and_cannot_average_it_away() -> None:
    assert np.array_equal(noised(bytes(32)), noised(bytes(32)))


def test_177_other_numbers_and_other_rounds_have_other_noise() -> None:
    """With the same noise on both, their difference would be exact: one row, added and taken away."""
    other = EXACT.copy()
    other[0] += 1
    for difference in (
        noised(bytes(32)) - noised(bytes(32), other),
        noised(bytes(32)) - noised(bytes(32), position=1),
        noised(bytes(32)) - noised(fresh_secret()),
    ):
        assert difference.std() == pytest.approx(2**0.5 * OWN, rel=0.05)


def test_178_nobody_foresees_the_secret_of_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 0.0)
    np.random.seed(0)
    secrets = {fresh_secret()}
    np.random.seed(0)
    secrets.add(fresh_secret())
    assert len(secrets) == 2
    assert not any(secret.hex() in repr(noise_of(secret)) for secret in secrets)


def test_noise_that_fixed_point_is_too_coarse_for_is_refused() -> None:
    entry = TensorEntry(name="counts", shape=(1,), bound=1e15, noise=1e-3)
    with pytest.raises(SettingsError, match="units in fixed point, at least"):
        noise_of(bytes(32), layout=TensorLayout((entry,))).added("counts", np.zeros(1))


# --- owners that drop out once their noise is in, and know their own ---


def test_179_what_is_left_of_the_noise_is_enough() -> None:
    """Of five owners, four are enough. One drops out after it shared its noise, and one takes its own out again."""
    identities = identities_of(5)
    added = {name: noised(identity.seed) for name, identity in identities.items()}
    total = run("masked", identities, terms_of(identities, LAYOUT, needed=4), added, drops_at={"o1": 2})
    assert "o1" not in total.owners
    left = total["counts"] - len(total.owners) * EXACT - (added["o0"] - EXACT)
    sigma = OWN * (4 - 1) ** 0.5  # DraftTables.noise_shares
    assert left.std() >= 0.98 * sigma


# --- one factor noised, and reused ---


def refit_of(noise: RefitNoise) -> tuple[MergeSettings, dict[str, OwnerTerms], TensorLayout]:
    table = RefitTable(balances=(0.0,))
    settings = replace(verified(merge_settings(plan_for(6, [3]), refit=table), 3), refit_noise=noise)
    (step,) = REFIT.steps(settings)
    layout = REFIT.step_layout(settings, step)
    generator = torch.Generator().manual_seed(0)

    def owner(number: int) -> OwnerTerms:
        features = torch.randn(200, 6, generator=generator, dtype=torch.float64)
        terms = ClassifierTerms(
            features=features,
            targets=(features[:, :3] + number / 10).argmax(dim=1),
            scores=torch.randn(200, 3, generator=generator, dtype=torch.float64),
            start=torch.linspace(0, 1, 18, dtype=torch.float64).reshape(6, 3),
        )
        key = bytes([number + 1]) * 32
        drawn = Noise(key=key, position=2, layout=layout, num_owners=3)
        return OwnerTerms(examples=200, delta={}, classifier=terms, noise=drawn)

    return settings, {name: owner(number) for number, name in enumerate("abc")}, layout


def test_180_no_exact_gram_can_be_solved_for() -> None:
    """W_0 is known. If G W_0 were of the exact G, it would give a row of G for each column of W_0."""
    noise = RefitNoise(features=2.0, target=1.0, own=5.0)
    settings, owners, _ = refit_of(noise)
    (step,) = REFIT.steps(settings)
    terms = owners["a"].classifier
    assert terms is not None
    sent = dict(REFIT.step_contribution(settings, step, owners["a"]))
    weighted = noise.weights(terms.features)[:, None] * terms.features
    ridge = noise.ridge(3, 6) / 3 * np.eye(6)
    exact = (weighted.T @ terms.features).numpy() + ridge
    np.testing.assert_allclose(sent["head_start@0.0"], sent["head_gram@0.0"] @ terms.start.numpy())
    assert np.abs(sent["head_start@0.0"] - exact @ terms.start.numpy()).mean() > 1
    assert np.abs(sent["head_gram@0.0"] - exact).mean() > 1
    one_hot = np.eye(3)[terms.targets] - 1 / 3
    assert np.abs(sent["head_targets@0.0"] - weighted.numpy().T @ one_hot).mean() > 1
    np.testing.assert_allclose(sent["head_base@0.0"], (sent["head_targets@0.0"] * terms.start.numpy()).sum())
    assert sent["head_rows"] == [200]


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_185_a_row_that_overflows_adds_nothing_and_stops_nobody(value: float) -> None:
    """A crafted body can have rows with some word overflow. A refusal would say that there are such rows."""
    settings, owners, layout = refit_of(RefitNoise(features=2.0, target=1.0, own=5.0))
    (step,) = REFIT.steps(settings)
    sent = []
    for each in (value, 0.0):
        terms = owners["a"].classifier
        assert terms is not None
        terms.features[3, 1:] = each
        terms.features[3, 0] = 0.0
        vector = np.zeros(layout.size)
        layout.flatten(REFIT.step_contribution(settings, step, owners["a"]), vector)
        sent.append(fixed_point.encode(layout, vector, 3))
    assert np.array_equal(*sent)


def test_a_refit_with_noise_is_verified_like_any_other() -> None:
    settings, owners, layout = refit_of(RefitNoise(features=2.0, target=1.0, own=0.5))
    (step,) = REFIT.steps(settings)
    vectors = {name: np.zeros(layout.size) for name in owners}
    for name, owner in owners.items():
        layout.flatten(REFIT.step_contribution(settings, step, owner), vectors[name])
        assert owner.noise is not None
        owner.noise.check_complete()
    contributions = Contributions.of(layout, vectors)
    merged = REFIT.solve_step(settings, step, contributions.total, 0.0)
    check = Check(equations=REFIT.step_equations(settings, step, 0.0), contributions=contributions, merged=merged)
    assert check.wrong() == []
    check.delta["l0.weight"][0, 0] *= 1.01
    assert check.wrong() != []


# --- in an owner's process ---


@pytest.fixture
def folder(little_folder: Path, tmp_path: Path) -> Path:
    """A consortium with noise; on validation rows, a sweep is judged, which needs no owner's own model."""
    folder = Path(shutil.copytree(little_folder, tmp_path / "noised", ignore=shutil.ignore_patterns("output")))
    draft = (folder / "agreement.toml").read_text()
    for old, new in (
        ('method = "regmean"', 'method = "average"'),
        ('["average", "task_arithmetic", "fisher"]', '["task_arithmetic"]'),
        ("# epsilon = 8.0", "epsilon = 8.0"),
        ("# label_set = ", "label_set = "),
    ):
        assert old in draft
        draft = draft.replace(old, new)
    (folder / "agreement.toml").write_text(draft)
    return folder


def in_a_plain_sum(folder: Path) -> None:
    """The consortium with a plain sum, to which hotel brings a model."""
    draft = folder / "agreement.toml"
    text = draft.read_text().replace('kind = "masked"', 'kind = "plain"')
    draft.write_text(text.replace('name = "hotel"', f'name = "hotel"\n{DECLARED}'))
    bring_model(folder)


def bring_model(folder: Path) -> None:
    (folder / "models").mkdir()
    shutil.copytree(folder / "base", folder / "models" / "hotel")
    settings = (folder / "hotel.toml").read_text().replace("# fine_tuned", "fine_tuned")
    (folder / "hotel.toml").write_text(re.sub(r"\[training\]\n(.+\n)+", "", settings))


def vector_of(process: Process, owner: str) -> NDArray[np.int64]:
    layout = process.schedule.find("metrics", split="validation").layout
    kept = Owner(process.parties.files[owner]).state.open_array("vector", layout.size, "<u8")
    return np.array(fixed_point.numbers(layout, kept)).view("<i8")


def test_177_an_owner_that_resumes_sends_the_same_noised_vector(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with parties_of(folder, tmp_path / "out") as parties:
        process = Process(parties)
        delivered = process.deliver_candidates("validation")
        metrics = process.schedule.find("metrics", split="validation")
        process.send("hotel", process.open_sum(1, metrics, delivered))
        first = vector_of(process, "hotel")
        process.send("hotel", process.open_sum(2, metrics, delivered))
        process.send("cinema", process.open_sum(2, metrics, delivered))
        assert np.array_equal(first, vector_of(process, "hotel"))
        model = metrics.models[0]
        layout = metrics.layout
        counts = layout.read(first.astype(np.float64), f"{model}/noised")
        units = 2.0 ** fixed_point.fraction_bits(layout.bound(f"{model}/noised"), 3)
        assert np.abs(counts / units - np.rint(counts / units)).max() > 1e-3  # no whole numbers any more
        assert layout.entry(f"{model}/noised").noise > 0
        ledger = Owner(parties.files["hotel"]).ledger
        secret = ledger.noise_secret()
        assert secret.hex() not in repr(ledger._page)
        ledger.sign_result("{}")
        after = Owner(parties.files["hotel"]).ledger
        assert after._page.noise is None  # it was forgotten with the result
        with pytest.raises(ConsentError, match="sums with noise after the result"):
            after.noise_secret()


def test_177_after_the_result_nobody_gets_the_same_sums_with_other_noise(folder: Path, tmp_path: Path) -> None:
    """A plain sum can be asked for again, and its secret is gone: the mean of many answers would have no noise."""
    in_a_plain_sum(folder)
    (tmp_path / "out").mkdir()
    with parties_of(folder, tmp_path / "out") as parties:
        process = Process(replace(parties, files={"hotel": parties.files["hotel"]}))
        delivered = process.deliver_candidates("validation")
        metrics = process.schedule.find("metrics", split="validation")
        process.send("hotel", process.open_sum(1, metrics, delivered))
        first = vector_of(process, "hotel")
        process.send("hotel", process.open_sum(2, metrics, delivered))
        assert np.array_equal(first, vector_of(process, "hotel"))
        Owner(parties.files["hotel"]).ledger.sign_result("{}")
        with pytest.raises(ConsentError, match="sums with noise after the result"):
            process.send("hotel", process.open_sum(3, metrics, delivered))


def test_189_a_plain_sum_with_noise_is_no_second_question(folder: Path, tmp_path: Path) -> None:
    """Runs can begin again. With other models, or files, each of them would be one more answer about the same rows."""
    in_a_plain_sum(folder)
    (tmp_path / "out").mkdir()
    with parties_of(folder, tmp_path / "out") as parties:
        alone = replace(parties, files={"hotel": parties.files["hotel"]})
        process = Process(alone)
        delivered = process.deliver_candidates("validation")
        metrics = process.schedule.find("metrics", split="validation")
        process.send("hotel", process.open_sum(1, metrics, delivered))

        def asked_again(number: int, run: str, change: float) -> None:
            process.roll_call(run)
            slots = process.schedule.deliveries("candidate", method="task_arithmetic", split="validation")
            process.fast_forward(slots[0].position)
            vector = np.full(slots[0].layout.size, change, np.float32)
            parts = [part_of(alone, slot, vector, run=run) for slot in slots]
            for part in parts:
                process.send("hotel", part)
            process.send("hotel", opening_of(alone, metrics, number, [delivered_by(part) for part in parts], run=run))

        asked_again(2, OTHER, 0.0)
        with pytest.raises(ConsentError, match="it is another one now"):
            asked_again(3, NONCE, 1.0)


def test_176_a_program_that_forgets_the_noise_sends_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(agreement: Any, owner: str, split: Any, scores: Any, noise: Noise) -> Any:
        yield from contribution(agreement, owner, split, scores, noise_of(bytes(32), layout=noise.layout))

    monkeypatch.setattr("client.rounds.metric_contribution", forgetful)
    (tmp_path / "out").mkdir()
    with parties_of(folder, tmp_path / "out") as parties:
        process = Process(parties)
        delivered = process.deliver_candidates("validation")
        request = process.open_sum(1, process.schedule.find("metrics", split="validation"), delivered)
        with pytest.raises(LocalProtocolError, match="nothing has left"):
            process.send("hotel", request)
        assert not Owner(parties.files["hotel"]).state.has_array("vector")


def refused(folder: Path, tmp_path: Path) -> str:
    (tmp_path / "out").mkdir(exist_ok=True)
    with parties_of(folder, tmp_path / "out") as parties, pytest.raises(AmalgramError) as caught:
        Owner(parties.files["hotel"]).check()
    return in_two_lines(caught.value)


def by_guest(folder: Path, name: str, guests: int) -> Path:
    """Name the guest of each row of one of hotel's files."""
    path = folder / "data" / "hotel" / name
    rows = [
        json.loads(line) | {"guest": f"g{index % guests}"} for index, line in enumerate(path.read_text().splitlines())
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_181_a_person_counts_once_however_many_rows_they_have(folder: Path, tmp_path: Path) -> None:
    hotel, draft = folder / "hotel.toml", folder / "agreement.toml"
    hotel.write_text(hotel.read_text().replace("[data]", '[data]\nunit = "guest"'))
    draft.write_text(draft.read_text().replace("epsilon = 8.0", 'epsilon = 8.0\nunit = "column"'))
    by_guest(folder, "train.jsonl", 50)
    assert "validation" in refused(folder, tmp_path)  # its rows do not say whose they are
    by_guest(folder, "validation.jsonl", 10**6)
    test = by_guest(folder, "test.jsonl", 7)
    with parties_of(folder, tmp_path / "out") as parties:
        bench = Owner(parties.files["hotel"]).workbench
        every = bench.data.validation()
        assert len(bench.one_of_each_unit(every, "validation")) == len(every)  # everybody is unique
        assert bench.score_base("test").rows == 7
        assert len(bench.one_of_each_unit(bench.data.train(), "train")) == 50
    rows = test.read_text().splitlines()
    rows[2] = json.dumps(json.loads(rows[2]) | {"guest": None})
    test.write_text("\n".join(rows) + "\n")
    assert "row 3: column 'guest' does not say whose the row is" in refused(folder, tmp_path)


def test_182_epsilon_in_the_settings_of_one_owner_is_no_agreement(folder: Path) -> None:
    hotel = folder / "hotel.toml"
    hotel.write_text(hotel.read_text() + "\n[privacy]\nepsilon = 1.0\n")
    with pytest.raises(SettingsError, match="privacy"):
        load_settings(hotel, OwnerSettings)


def test_183_rows_that_were_judged_under_another_agreement_are_recognised(folder: Path, tmp_path: Path) -> None:
    """Their metrics have noise twice, and the mean of the two has less."""
    (tmp_path / "out").mkdir()
    key = bytes(32)
    with parties_of(folder, tmp_path / "out") as parties:
        before = Owner(parties.files["hotel"]).workbench.contributed(key, may_train=False)
        train = folder / "data" / "hotel" / "train.jsonl"
        train.write_text(re.sub(r'("text": ")', r"\1other ", train.read_text()))
        again = Owner(parties.files["hotel"]).workbench.contributed(key, may_train=False)
    assert again.shares_with(before, is_bounded=True)[0] == 1
    assert again.model_copy(update={"judged": Sketch()}).shares_with(before, is_bounded=True)[0] < 0.1


@pytest.mark.parametrize(
    ("first", "second", "are_found"), [(4.0, 4.0, True), (None, 4.0, True), (4.0, None, True), (None, None, False)]
)
@pytest.mark.parametrize("exchanged", [False, True])
@pytest.mark.parametrize("is_plain", [False, True])
def test_183_rows_that_were_trained_on_and_are_judged_now_spend_both_budgets(
    first: float | None,
    second: float | None,
    are_found: bool,
    exchanged: bool,
    is_plain: bool,
    agreement: Agreement,
    tmp_path: Path,
) -> None:
    """Without noise in one of the two agreements, the other's promise about them is over."""
    some, others, more = (sketch_of(bytes(32), [b"%d" % row for row in range(n, n + 50)]) for n in (0, 50, 100))
    before = Contributed(rows=some, weight_changes=Sketch(), judged=others)
    now = Contributed(rows=others, weight_changes=Sketch(), judged=more)
    if exchanged:
        before, now = now, before
    terms, later = (
        agreement.model_copy(update={"title": title, "privacy": Privacy(epsilon=epsilon)})
        for title, epsilon in (("First", first), ("Second", second))
    )
    ledger = Ledger(tmp_path / "a.ledger", bytes(32), terms, must_exist=False)
    ledger.begin(0, 64 * "a", 0, "contributions", before, set())
    if is_plain:
        ledger.give(0, "")
    else:
        ledger.offer(0, 64 * "a", 64 * "b", set())
    found = Ledger(tmp_path / "a.ledger", bytes(32), later, must_exist=True).repeats(now)
    assert [each.rows for each in found] == ([1.0] if are_found else [])
    ended = [text for each in found for text in what_the_difference_shows(each.terms, kept_of(later), each)]
    assert any("nothing of that promise is left" in text for text in ended) == (are_found and second is None)


def test_no_metric_is_shown_by_name_or_counted_exactly(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with parties_of(folder, tmp_path / "out") as parties:
        layout = metrics_layout(parties.agreement, "test", ["base", "own_at_home"])
    exact = {entry.name.rpartition("/")[2] for entry in layout.entries if not entry.noise}
    assert exact == {"rows"}


def overflowing_at_padding() -> BertForSequenceClassification:
    """A crafted base: it says "b" of a text, and "a" if anything in the batch is longer, since its attention to padding
    is infinite there.
    """
    model = tiny_bert()
    embeddings, attention = model.bert.embeddings, model.bert.encoder.layer[0].attention.self
    with torch.no_grad():
        embeddings.position_embeddings.weight.zero_()
        embeddings.token_type_embeddings.weight.zero_()
        embeddings.word_embeddings.weight[:] = torch.linspace(-1, 1, 16)
        embeddings.word_embeddings.weight[0] = torch.linspace(-1, 1, 16) ** 2
        text, padding = embeddings.LayerNorm(embeddings.word_embeddings.weight[[1, 0]])
        attention.query.weight.zero_()
        attention.query.bias.fill_(1e20)
        attention.key.weight[:] = 1e20 * (padding - padding @ text / (text @ text) * text)
        attention.key.bias.zero_()
        model.classifier.bias[:] = torch.tensor([0.0, 10.0, 0.0])
    return model


def test_188_no_row_decides_what_a_crafted_model_says_of_the_rows_in_its_batch() -> None:
    model, task = overflowing_at_padding(), Task(labels=("a", "b", "c"))

    def moved(are_apart: bool) -> float:
        sums = []
        for length in (5, 9):  # of the last row
            features = tuple({"input_ids": [7] * n, "attention_mask": [1] * n} for n in (*[5] * 10, length))
            rows = Rows(features=features, targets=np.ones(11, np.int64), tokenizer=make_tokenizer())
            sums.append(bounded_sums(model, replace(rows, are_apart=are_apart), 32, task))
        return float(np.linalg.norm(sums[1] - sums[0]))

    assert moved(are_apart=False) > 5 * example_norm(task)
    assert moved(are_apart=True) <= example_norm(task)


def dense_after_a_short_text() -> BigBirdForSequenceClassification:
    """An honest architecture: once it has read a text of at most 14 tokens, it drops its sparse attention for good."""
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 128}
    config = BigBirdConfig(
        **sizes, num_hidden_layers=1, num_attention_heads=2, block_size=2, num_random_blocks=1, sep_token_id=3,
        num_labels=2, initializer_range=0.6, attention_type="block_sparse",
    )  # fmt: skip
    torch.manual_seed(0)
    return BigBirdForSequenceClassification(config).eval()


def texts_of(lengths: list[int]) -> Rows:
    random = np.random.default_rng(0)
    texts = [random.integers(4, 50, 40)[:length].tolist() for length in lengths]
    features = tuple({"input_ids": text, "attention_mask": [1] * len(text)} for text in texts)
    targets = np.zeros(len(texts), np.int64)
    return Rows(features=features, targets=targets, tokenizer=make_tokenizer(), are_apart=True)


def predictions(model: BigBirdForSequenceClassification, rows: Rows) -> Tensor:
    return torch.from_numpy(predict_logits(model, rows, 1))


def gram(model: BigBirdForSequenceClassification, rows: Rows) -> Tensor:
    batches = [batch for _, batch, _ in rows.batches(1)]
    plan = gram_plan(dense_after_a_short_text(), batches[-1], "pooler")
    (found,) = measure_grams(model, plan, batches, norms={plan.inputs[0].name: 100.0}).values()
    return found.matrix


def inputs_to_train_on(model: BigBirdForSequenceClassification, rows: Rows) -> Tensor:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("classifier.out_proj"))
    alone = _classifier_alone(model, rows, "")
    assert alone is not None
    return torch.from_numpy(alone[1].features)


def gradients(model: BigBirdForSequenceClassification, rows: Rows) -> Tensor:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("classifier.dense"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with gradients_by_row(model, rows.take(np.array([0]))):
        by_row = [row_gradients(model, rows, np.array([row]), trained) for row in range(len(rows))]
    return torch.stack([weight[0] for weight, _ in by_row])


@pytest.mark.parametrize("measured", [predictions, gram, inputs_to_train_on, gradients])
def test_188_no_row_decides_what_is_said_of_the_rows_after_it(measured: Callable[..., Tensor]) -> None:
    model, rows = dense_after_a_short_text(), texts_of([5, *[40] * 9])
    found = measured(model, rows)
    one_by_one = [measured(dense_after_a_short_text(), rows.take(np.array([row]))) for row in range(10)]
    expected = sum(one_by_one) if measured is gram else torch.cat(one_by_one)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert model.bert.attention_type == "block_sparse"  # as it was found: the next pass has the same model


def test_188_with_epsilon_rows_are_judged_and_fitted_to_one_by_one(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with parties_of(folder, tmp_path / "out") as parties:
        bench = Owner(parties.files["hotel"]).workbench
        for rows, split in ((bench.data.test(), "test"), (bench.data.train(), "train")):
            kept = bench.one_of_each_unit(rows, split).take(np.arange(5))  # type: ignore[arg-type]
            assert [len(indices) for indices in kept.batch_indices(32)] == [1] * 5


def test_187_whoever_knows_all_other_rows_sees_in_their_number_whether_one_more_is_there(
    folder: Path, tmp_path: Path
) -> None:
    """A documented limit. What the promise compares is a row that is used and one that is left blank."""
    (tmp_path / "out").mkdir()
    with parties_of(folder, tmp_path / "out") as parties:
        agreement, consent = parties.agreement, consent_text(Owner(parties.files["hotel"]))
    layout = metrics_layout(agreement, "test", ["base"])
    counted = []
    for rows in (40, 41):
        score = Score(correct=0, rows=rows, metric=0.0, sums=((0.0,) * layout.entry("base/noised").size,))
        noise = Noise(key=bytes(32), position=0, layout=layout, num_owners=3)
        counted.append(dict(contribution(agreement, "hotel", "test", {"base": score}, noise))["base/rows"].item())
    assert counted == [40, 41]
    assert "whoever knows all your other rows can tell from the number whether there is one more" in " ".join(
        consent.split()
    )


REFIT_TABLES: dict[str, Any] = {"method": "refit", "compare_with": [], "refit": {"balances": [0.0]}}


@pytest.mark.parametrize(
    ("tables", "why"),
    [
        ({"refit": {"balances": [0.5]}}, "unless all rows weigh the same"),
        ({"refit": {"balances": [0.0], "targets": "scores"}}, "what it is fitted to has no bound"),
        ({"weighting": "owners"}, "would depend on how many the owner has"),
        ({"task": {"kind": "token-classification", "label_set": "all"}}, "an example has many rows"),
        ({"privacy": {"epsilon": 8.0, "legs": {"refit": 0.85}}}, r"add up to 0\.95 of the budget"),
    ],
)
def test_185_a_refit_that_one_row_could_move_further_is_refused(tables: dict[str, Any], why: str, folder: Path) -> None:
    agreed = parse_toml((folder / "agreement.toml").read_bytes(), "agreement.toml") | REFIT_TABLES
    assert parse_settings(agreed, AgreementDraft, "agreement.toml").method == "refit"
    with_grams = parse_settings(agreed | {"refit": {"balances": [0.0], "body": "regmean"}}, AgreementDraft, "agreement")
    assert set(with_grams.budget_shares) == {"training", "metrics", "refit", "grams"}
    with pytest.raises(SettingsError, match=why):
        parse_settings(agreed | tables, AgreementDraft, "agreement.toml")


def test_a_refit_of_too_few_rows_for_its_noise_says_how_many_it_takes(folder: Path, tmp_path: Path) -> None:
    draft = folder / "agreement.toml"
    tables = '["task_arithmetic", "refit"]'
    text = draft.read_text().replace('["task_arithmetic"]', tables).replace("epsilon = 8.0", "epsilon = 0.5")
    draft.write_text(text + "\n[refit]\nbalances = [0.0]\n")
    said = refused(folder, tmp_path)
    assert re.search(
        r"brings 200 rows to the refit, and with its noise .* it takes \d+ of all owners, \d+ of each", said
    )
    assert "bring more rows" in said


def test_185_a_refit_whose_rows_have_no_agreed_length_is_no_agreement(agreement: Agreement) -> None:
    refit = {"method": "refit", "compare_with": (), "refit": RefitTable(balances=(0.0,))}
    task = agreement.task.model_copy(update={"label_set": "all"})
    fields = dict(agreement.model_copy()) | refit | {"task": task, "privacy": Privacy(epsilon=4.0)}
    with pytest.raises(ValueError, match=r"bounds\.features is missing"):
        Agreement(**fields)
    assert Agreement(**fields | {"bounds": agreement.bounds.model_copy(update={"features": 2.0})})


def test_186_rows_of_a_refit_that_no_owner_has() -> None:
    noise = RefitNoise(features=2.0, target=1.0, own=5.0)
    settings, owners, layout = refit_of(noise)
    (step,) = REFIT.steps(settings)
    vectors = {name: np.zeros(layout.size) for name in owners}
    for name, owner in owners.items():
        layout.flatten(REFIT.step_contribution(settings, step, owner), vectors[name])
    total = Contributions.of(layout, vectors).total
    check_classifier(total, layout, 600.0, settings.plan)
    check_classifier(total, layout, 6000.0, settings.plan)  # only some of them were measured
    with pytest.raises(NumericalError, match="covers 600 rows, but the owners have 500"):
        check_classifier(total, layout, 500.0, settings.plan)


def test_what_is_declared_of_a_brought_model_counts_and_is_called_unchecked(folder: Path, tmp_path: Path) -> None:
    agreed = parse_toml((folder / "agreement.toml").read_bytes(), "agreement.toml")
    hotel, *others = agreed["owners"]

    def declared(epsilon: float, privacy: dict[str, Any]) -> dict[str, Any]:
        owners = [hotel | {"declared": {"epsilon": epsilon, "delta": 5e-6}}, *others]
        return agreed | {"owners": owners, "privacy": privacy}

    assert parse_settings(declared(5.0, {"epsilon": 8.0}), AgreementDraft, "agreement.toml")
    for epsilon, privacy, why in (
        (7.0, {"epsilon": 8.0}, "which with the sums' part is more than"),
        (5.0, {"epsilon": 8.0, "delta": 5e-6}, "which with the sums' part is more than"),
        (5.0, {}, "the agreement bounds nothing"),
    ):
        with pytest.raises(SettingsError, match=why):
            parse_settings(declared(epsilon, privacy), AgreementDraft, "agreement.toml")
    draft = folder / "agreement.toml"
    text = draft.read_text()
    draft.write_text(text.replace('name = "hotel"', f'name = "hotel"\n{DECLARED}'))
    bring_model(folder)
    (tmp_path / "out").mkdir()
    with parties_of(folder, tmp_path / "out", verified=True) as parties:
        owner = Owner(parties.files["hotel"])
        owner.check()
        said = consent_text(owner)
    assert "hotel declares that it trained its model with epsilon = 5, delta = 5e-06. Nobody checks this." in said
    assert re.search(r"metrics +10% +\d\.\d\d +\d", said)
    assert "Your model is trained here" not in said
    assert "OF THESE BOUNDS HOLDS FOR YOU" in said
    draft.write_text(text)
    assert "asks for one that is trained with noise" in refused(folder, tmp_path)


def test_184_an_owner_whose_signature_tells_how_the_model_does_is_refused(folder: Path) -> None:
    tables = parse_toml((folder / "agreement.toml").read_bytes(), "agreement.toml")
    with pytest.raises(SettingsError, match="how the model does on its own rows"):
        parse_settings(tables | {"evaluation": {"sign_above": 0.5}}, AgreementDraft, "agreement.toml")
    private = tables | {"task": tables["task"] | {"head": "private"}}
    with pytest.raises(SettingsError, match="no labels in common"):
        parse_settings(private, AgreementDraft, "agreement.toml")
