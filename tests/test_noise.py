"""Noise on sums: what it is, what it promises, and how it is accounted for, against independent computations."""

from math import exp, log, pi, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import kstest, norm

from client.data.rows import IGNORED, Rows
from client.measurement.evaluation import bounded_sums
from client.measurement.private_training import noise_multiplier
from common.agreement import Agreement, Task
from common.agreement.tables import Legs, Privacy
from common.errors import SettingsError
from common.merge_methods.refit import RefitTable
from common.merge_methods.terms import RefitNoise
from common.metrics import MAX_NATS, Score, contribution, metrics_layout, noised_score, noised_size, read_total
from common.privacy.gaussian import delta_of, epsilon_of, mu_of
from common.privacy.legs import (
    example_norm,
    judged_models,
    legs_of,
    own_noise,
    spent_beside_training,
    target_norm,
)
from common.privacy.noise import Noise, bound_with_noise, whole_gaussian
from common.tensor_layout import TensorEntry, TensorLayout

KEY = bytes(32)
UNITS = 2.0**24


def layout_of(noise: float = 3.0, size: int = 50_000, name: str = "m/noised") -> TensorLayout:
    bound = bound_with_noise(1e6, noise)
    return TensorLayout((TensorEntry(name=name, shape=(size,), bound=bound, noise=noise),))


def noise_of(layout: TensorLayout, key: bytes = KEY, position: int = 3) -> Noise:
    return Noise(key=key, position=position, layout=layout, num_owners=3)


# --- the sampler ---


@pytest.mark.parametrize("size", [100_000, 99_999])
def test_171_noise_is_a_gaussian_of_its_size(size: int) -> None:
    drawn = whole_gaussian(size, UNITS, b"k" * 16) / UNITS
    assert len(drawn) == size
    assert kstest(drawn, norm.cdf).pvalue > 1e-3
    assert drawn.std() == pytest.approx(1, abs=0.01)
    assert abs(np.corrcoef(drawn[: size // 2], drawn[-(size // 2) :])[0, 1]) < 0.02  # radius and angle, of one pair


def test_171_an_owner_adds_its_whole_share_and_nothing_else() -> None:
    layout = layout_of()
    exact = np.arange(50_000.0)
    added = noise_of(layout).added("m/noised", exact) - exact
    assert kstest(added / 3.0, norm.cdf).pvalue > 1e-3


def test_171_off_the_diagonal_of_a_gram_it_is_less_by_the_root_of_two() -> None:
    bound = bound_with_noise(1e6, 3.0)
    entry = TensorEntry(name="g", shape=(200, 200), bound=bound, packing="symmetric", noise=3.0)
    added = noise_of(TensorLayout((entry,))).added("g", np.zeros((200, 200)))
    assert np.array_equal(added, added.T)
    assert added[np.triu_indices(200, 1)].std() == pytest.approx(3 / sqrt(2), rel=0.03)
    assert added.diagonal().std() == pytest.approx(3, rel=0.2)


def test_rounded_shares_add_up_to_what_hides_as_much_as_a_gaussian() -> None:
    """The chance of each whole number, by convolution; then delta, and a moment of the likelihood ratio."""
    sigma, shift, epsilon = 12.0, 6.0, 1.0
    numbers = np.arange(-150, 151)
    share = np.diff(norm.cdf(np.arange(-150.5, 151.5), scale=sigma / sqrt(2)))
    chances = np.convolve(share, share, mode="same")
    beside = np.interp(numbers - shift, numbers, chances)
    delta = np.maximum(chances - exp(epsilon) * beside, 0).sum()
    assert delta == pytest.approx(delta_of(epsilon, shift / sigma), rel=0.02)
    kept = chances > 1e-200
    moment = (beside[kept] ** 4 * chances[kept] ** -3.0).sum()
    assert log(moment) <= 4 * 3 * (shift / sigma) ** 2 / 2 + 1e-9


# --- exact accounting ---


@pytest.mark.parametrize(("epsilon", "sigma"), [(1.0, 3.73), (2.0, 1.99), (4.0, 1.08), (8.0, 0.60)])
def test_the_least_noise_is_that_of_the_literature(epsilon: float, sigma: float) -> None:
    assert 1 / mu_of(epsilon, 1e-5) == pytest.approx(sigma, abs=0.005)


@settings(max_examples=25)
@given(st.floats(0.05, 6), st.floats(0.05, 8))
def test_delta_is_what_integrating_the_densities_gives(mu: float, epsilon: float) -> None:
    """The definition: how much of one density is above e^epsilon times the other."""
    start = epsilon / mu + mu / 2

    def above(x: float) -> float:
        return exp(-((x - mu) ** 2) / 2) - exp(epsilon - x * x / 2)

    expected = quad(above, start, start + 40, epsabs=1e-13)[0] / sqrt(2 * pi)
    assert delta_of(epsilon, mu) == pytest.approx(expected, abs=1e-9)


@given(st.floats(0.1, 50), st.sampled_from([1e-9, 1e-5, 1e-3]))
def test_budgets_are_not_exceeded_and_nearly_used(epsilon: float, delta: float) -> None:
    mu = mu_of(epsilon, delta)
    assert delta_of(epsilon, mu) <= delta < delta_of(epsilon, 1.001 * mu)
    assert epsilon_of(delta, mu) == pytest.approx(epsilon, rel=1e-6)


@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_172_training_leaves_room_for_the_sums(epsilon: float) -> None:
    """Renyi divergences of order a add up: a mu^2 / 2 of the sums, a steps / (2 sigma^2) of training on all units."""
    mu, steps = sqrt(0.3) * mu_of(epsilon, 1e-5), 10
    sigma = noise_multiplier(epsilon, 1e-5, 1.0, steps, mu)

    def epsilon_at(order: float) -> float:
        divergence = order * (mu**2 + steps / sigma**2) / 2
        return divergence + log((order - 1) / order) - (log(1e-5) + log(order)) / (order - 1)

    least = min(epsilon_at(order) for order in np.concatenate([np.arange(1.01, 11, 0.01), np.arange(11, 100)]))
    assert least == pytest.approx(epsilon, rel=0.01)
    assert sigma > 1.1 * noise_multiplier(epsilon, 1e-5, 1.0, steps)


def test_172_a_budget_that_the_sums_use_up_is_refused() -> None:
    with pytest.raises(SettingsError, match="cannot be kept over 10 steps"):
        noise_multiplier(1.0, 1e-5, 1.0, 10, 1.01 * mu_of(1.0, 1e-5))


# --- legs ---


@pytest.fixture
def bounded(agreement: Agreement) -> Agreement:
    return agreement.model_copy(update={"privacy": Privacy(epsilon=4.0), "method": "average", "compare_with": ()})


def test_172_shares_of_all_legs_add_up_to_the_budget(bounded: Agreement) -> None:
    legs = {leg.name: leg for leg in legs_of(bounded)}
    assert sum(leg.share for leg in legs.values()) == pytest.approx(1)
    assert legs["metrics"].sensitivity is not None
    assert legs["metrics"].sigma is not None
    assert legs["metrics"].sensitivity == pytest.approx(2 * sqrt(3))  # three models judge a row, each right
    mu = legs["metrics"].sensitivity / legs["metrics"].sigma
    assert mu**2 / mu_of(4.0, 1e-5) ** 2 == pytest.approx(0.1)
    assert spent_beside_training(bounded) ** 2 == pytest.approx(mu**2)


def test_173_enough_noise_is_left_without_those_who_know_theirs(bounded: Agreement) -> None:
    """Of ten owners, two may drop out and two collude; of three, one who sees the total knows its own noise."""
    sigma = legs_of(bounded)[1].sigma
    assert sigma is not None
    assert own_noise(bounded, "metrics") ** 2 * (len(bounded.owners) - 1) == pytest.approx(sigma**2)
    ten = tuple(bounded.owners[0].model_copy(update={"name": f"owner-{n}"}) for n in range(10))
    summed = bounded.summation.model_copy(update={"colluders": 2, "quorum": 6})
    many = bounded.model_copy(update={"owners": ten, "min_owners": 8, "summation": summed})
    assert own_noise(many, "metrics") ** 2 * (8 - 2) == pytest.approx(sigma**2)
    plain = many.model_copy(update={"summation": summed.model_copy(update={"kind": "plain"})})
    assert own_noise(plain, "metrics") == pytest.approx(sigma)


def test_every_judged_model_counts(bounded: Agreement) -> None:
    assert judged_models(bounded) == 3  # base, own at home, average
    swept = bounded.model_copy(update={"compare_with": ("task_arithmetic",)})
    scales = len(swept.task_arithmetic.scales)  # type: ignore[attr-defined]
    assert scales > 1
    assert judged_models(swept) == 4 + scales


# --- sensitivities: the most that one example adds is what is said, and is reached ---


LABELS = ("a", "b", "c")


def metrics_of(task: Task, logits: np.ndarray, targets: object, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    monkeypatch.setattr("client.measurement.evaluation.predict_logits", lambda *_: logits.astype(np.float32))
    rows = Rows(features=np.zeros((len(targets), 1)), targets=targets)  # type: ignore[arg-type]
    found = bounded_sums(torch.nn.Identity(), rows, 8, task)  # its logits are given
    assert found.shape == (noised_size(task),)
    return found


@pytest.mark.parametrize("right", [True, False])
def test_174_one_example_moves_classification_by_at_most_its_norm(right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task(labels=LABELS)
    sums = metrics_of(task, np.eye(3)[[0]], np.array([0 if right else 1]), monkeypatch)
    assert np.linalg.norm(sums) == pytest.approx(example_norm(task) if right else sqrt(2))


def test_174_with_several_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task(labels=LABELS, problem_type="multi_label_classification")
    sums = metrics_of(task, np.ones((1, 3)), np.ones((1, 3), np.float32), monkeypatch)
    assert np.linalg.norm(sums) == pytest.approx(example_norm(task))


@given(st.floats(-3, 8), st.floats(0, 5))
def test_174_with_numbers(predicted: float, target: float) -> None:
    task = Task(labels=("stars",), problem_type="regression", target_range=(0.0, 5.0))
    with pytest.MonkeyPatch.context() as patch:
        sums = metrics_of(task, np.array([[predicted]]), np.array([[target]], np.float32), patch)
        most = metrics_of(task, np.array([[5.0]]), np.array([[5.0]], np.float32), patch)
    assert np.linalg.norm(sums) <= example_norm(task) + 1e-12
    assert np.linalg.norm(most) == pytest.approx(example_norm(task))


def test_174_with_tags_a_long_text_counts_like_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task(kind="token-classification", labels=("O", "B-X", "I-X"))
    tags = np.tile([0, 1], 20)
    target = [np.array([IGNORED, *tags])]
    sums = metrics_of(task, np.eye(3)[tags], target, monkeypatch)
    assert np.linalg.norm(sums) == pytest.approx(example_norm(task))
    wrong = metrics_of(task, np.eye(3)[np.ones(40, int)], target, monkeypatch)
    assert np.linalg.norm(wrong) < example_norm(task)


@settings(max_examples=30)
@given(st.floats(0.1, 50), st.floats(0.1, 3), st.integers(1, 6), st.integers(0, 10**6))
def test_175_one_row_moves_a_refit_by_at_most_its_sensitivity(
    length: float, agreed: float, dimension: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    feature = torch.randn(dimension, generator=generator, dtype=torch.float64)
    feature *= length / feature.norm()
    target = torch.tensor([2 / 3, -1 / 3, -1 / 3], dtype=torch.float64)
    bounds = RefitNoise(features=agreed, target=target_norm(Task(labels=LABELS)), own=1.0)
    weight = bounds.weights(feature[None])[0]
    gram, products = weight * torch.outer(feature, feature), weight * torch.outer(feature, target)
    moved = float(torch.cat([gram.reshape(-1), products.reshape(-1)]).norm())
    assert moved <= bounds.sensitivity * (1 + 1e-12)
    assert moved == pytest.approx(bounds.sensitivity) or length < agreed
    assert weight == pytest.approx(1) or length > agreed
    off = torch.triu_indices(dimension, dimension, 1)
    travels = torch.cat([gram.diagonal(), sqrt(2) * gram[off[0], off[1]]])  # in standard deviations of its noise
    assert float(travels.norm()) == pytest.approx(float(gram.norm()))


def test_the_ridge_outweighs_the_noise() -> None:
    dimension, owners = 40, 3
    bounds = RefitNoise(features=1.0, target=1.0, own=2.0)
    entry = TensorEntry(
        name="g", shape=(dimension, dimension), bound=bound_with_noise(1e6, 2.0), packing="symmetric", noise=2.0
    )
    layout = TensorLayout((entry,))
    for draw in range(30):
        shares = [
            noise_of(layout, bytes([each]) * 32, draw).added("g", np.zeros(entry.shape)) for each in range(owners)
        ]
        least = np.linalg.eigvalsh(sum(shares))[0]
        assert -bounds.ridge(owners, dimension) < least < -0.3 * bounds.ridge(owners, dimension)


# --- metrics of noised sums ---


@given(st.lists(st.floats(-1e4, 1e4), min_size=10, max_size=10), st.integers(0, 100), st.floats(0.1, 1e3))
def test_metrics_of_any_noise_are_metrics(sums: list[float], rows: int, noise: float) -> None:
    score = noised_score(Task(labels=LABELS), np.array(sums), rows, noise)
    assert score.accuracy is not None
    assert 0 <= score.accuracy <= 1
    assert 0 <= score.metric <= 1
    numbers = Task(labels=("x", "y"), problem_type="regression", target_range=(0.0, 5.0))
    found = noised_score(numbers, np.array(sums), rows, noise)
    assert found.pearson_r is not None
    assert -1 <= found.pearson_r <= 1
    assert 0 <= found.metric <= 25
    tokens = noised_score(Task(kind="causal-lm"), np.array(sums[:2]), rows, noise)
    assert -MAX_NATS <= tokens.metric <= 0


def test_metrics_come_through_the_noise(bounded: Agreement) -> None:
    exact = np.array([900.0, 500, 500, 550, 400, 500, 450])
    agreement = bounded.model_copy(update={"task": bounded.task.model_copy(update={"labels": ("no", "yes")})})
    layout = metrics_layout(agreement, "test", ["m"])
    total = np.zeros(layout.size)
    for number, owner in enumerate(agreement.owner_names):
        score = Score(correct=300, rows=333, metric=0.9, sums=(tuple(exact / len(agreement.owners)),))
        vector = np.empty(layout.size)
        noise = noise_of(layout, bytes([number + 1]) * 32)
        layout.flatten(contribution(agreement, owner, "test", {"m": score}, noise), vector)
        noise.check_complete()
        total += vector
    found = read_total(agreement, "test", ["m"], total)["m"]
    expected = noised_score(agreement.task, exact, 999, 0.0)
    assert found.accuracy != expected.accuracy
    assert found.accuracy == pytest.approx(expected.accuracy, abs=0.1)
    assert found.metric == pytest.approx(expected.metric, abs=0.15)
    assert found.by_owner == {}


def test_legs_that_leave_nothing_for_training_are_refused(bounded: Agreement) -> None:
    fields = dict(bounded) | {"method": "refit", "refit": RefitTable(balances=(0.0,))}
    fields["privacy"] = Privacy(epsilon=4.0, legs=Legs(metrics=0.5, refit=0.45))
    fields["bounds"] = bounded.bounds.model_copy(update={"features": 2.0})
    fields["task"] = bounded.task.model_copy(update={"label_set": "all"})
    with pytest.raises(ValueError, match=r"metrics 0\.5, refit 0\.45: they add up to 0\.95 of the budget"):
        Agreement(**fields)
