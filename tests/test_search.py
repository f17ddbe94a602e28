"""The search: known answers, what every search keeps to, and the slow obvious mixture."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.agreement import Agreement, AgreementDraft, OwnerEntry
from common.agreement.tables import Publish
from common.merge_methods.search import (
    GRAIN,
    TOGETHER,
    Mixture,
    SearchTable,
    generations,
    is_mixture,
    next_mixtures,
)
from common.models.delta import MixedDelta
from common.models.plan import MergePlan
from common.schedule import Delivery, Round, schedule_of

STARTS = ((1.0, 1.5, 1.0), (2.0, 1.0, 1.5), (1.25, 1.5, 1.0), (0.75, 1.0, 1.0), (1.5, 1.5, 2.0), (1.0, 1.0, 1.0))
Scored = list[tuple[Mixture, float]]


def searched(table: SearchTable, num_groups: int, metric: Callable[[Mixture], float], seed: int = 0) -> Scored:
    """A whole search."""
    scored: Scored = []
    while len(scored) < table.candidates:
        scored += [(each, metric(each)) for each in next_mixtures(scored, num_groups, table, seed)]
    return scored


def test_the_first_generation_is_fixed_and_begins_with_the_first_merge_as_it_is() -> None:
    two = SearchTable(basis=("data_free", "average"), groups=2)
    assert next_mixtures([], 2, two, seed=0) == (
        (1.0, 1.0, 0.0, 0.0),
        (0.0, 0.0, 1.0, 1.0),
        (0.5, 0.5, 0.5, 0.5),
        (1.25, 1.25, 0.0, 0.0),
        (0.75, 0.75, 0.0, 0.0),
        (1.5, 1.5, 0.0, 0.0),
    )
    one = SearchTable(largest=1.0)
    assert next_mixtures([], 1, one, seed=0) == ((1.0,), (0.75,), (0.5,), (0.25,), (1 / 64,), (2 / 64,))


@given(
    bases=st.integers(1, 3),
    num_groups=st.integers(1, 8),
    candidates=st.integers(2, 40),
    largest=st.floats(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=20)
def test_every_mixture_is_new_within_bounds_and_follows_from_what_was_scored(
    bases: int, num_groups: int, candidates: int, largest: float, seed: int
) -> None:
    table = SearchTable(basis=("a", "b", "c")[:bases], candidates=candidates, largest=largest)

    def metric(mixture: Mixture) -> float:
        return -sum((scale - 0.7) ** 2 for scale in mixture)

    scored = searched(table, num_groups, metric, seed)
    assert scored == searched(table, num_groups, metric, seed)
    mixtures = [mixture for mixture, _ in scored]
    assert len(set(mixtures)) == len(mixtures) == candidates
    assert all(len(mixture) == bases * num_groups and is_mixture(mixture, table) for mixture in mixtures)
    assert [len(each) for each in generations(table)][:-1] == [TOGETHER] * (len(generations(table)) - 1)


def test_later_generations_come_closer_to_what_is_best() -> None:
    wanted = (1.2, 0.4, 0.9, 0.1, 0.3, 0.6)

    def metric(mixture: Mixture) -> float:
        return -float(np.square(np.subtract(mixture, wanted)).sum())

    gains = []
    for seed in range(20):
        metrics = [each for _, each in searched(SearchTable(basis=("a", "b")), 3, metric, seed)]
        gains.append(max(metrics) - max(metrics[:TOGETHER]))
    assert min(gains) >= 0
    assert np.mean(gains) > 0.1


def test_steps_begin_at_the_weighted_mean_of_the_best_and_come_in_opposite_pairs() -> None:
    table = SearchTable(candidates=12, largest=4)
    scored = [(each, metric) for each, metric in zip(STARTS, (0.1, 0.9, 0.8, 0.2, 0.9, 0.0), strict=True)]
    found = next_mixtures(scored, 3, table, seed=3)
    centre = (3 * np.array(STARTS[1]) + 2 * np.array(STARTS[4]) + np.array(STARTS[2])) / 6
    for one, other in zip(found[::2], found[1::2], strict=True):
        assert np.add(one, other) / 2 == pytest.approx(centre, abs=1 / GRAIN)
        assert np.abs(one - centre).max() <= 0.5 + 1 / GRAIN


@given(scales=st.lists(st.integers(0, 128), min_size=4, max_size=4), seed=st.integers(0, 100))
def test_a_mixture_is_the_scaled_sum_of_its_parts_group_by_group(scales: list[int], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    parts = [{name: torch.randn(2, 3, generator=random) for name in ("low", "top", "fixed")} for _ in range(2)]
    mixture = [each / GRAIN for each in scales]
    found = MixedDelta.of(parts, (("low",), ("top",)), mixture)
    for name, (first, second) in {"low": (0, 2), "top": (1, 3)}.items():
        exact = parts[0][name].double() * mixture[first] + parts[1][name].double() * mixture[second]
        assert torch.equal(found[name], exact.float())
    assert torch.equal(found["fixed"], parts[0]["fixed"])
    assert list(found) == list(parts[0])


def test_the_basis_is_sent_once_and_a_generation_is_one_sum(agreement: Agreement, plan: MergePlan) -> None:
    changes = {
        "method": "search",
        "compare_with": ("average", "regmean"),
        "search": SearchTable(basis=("regmean",), candidates=8, groups=2),
    }
    events = schedule_of(agreement.model_copy(update=changes), plan).events
    kinds = [(each.kind, each.split, getattr(each, "models", ())) for each in events]
    start = next(index for index, each in enumerate(events) if each.kind == "mixture")
    names = [f"search@{number}" for number in range(1, 9)]
    assert [kind for kind, *_ in kinds[start:]] == (
        ["mixture"] * 6 + ["metrics"] + ["mixture"] * 2 + ["metrics"] + ["mixture", "metrics"]
    )
    assert [models for kind, split, models in kinds[start:] if kind == "metrics"] == [
        tuple(names[:6]),
        tuple(names[6:]),
        ("base", "own_at_home", "search", "average", "regmean"),
    ]
    # all of the basis is checked before anything is measured on it, and then sent once more
    checks = [each for each in events if isinstance(each, Round) and each.kind == "check"]
    sent = [each for each in events if isinstance(each, Delivery) and each.method == "regmean"]
    assert {each.position for each in sent[:-1]} <= {claim.delivery for each in checks for claim in each.claims}
    assert sent[-1].split == "test"
    assert checks[-1].position < sent[-1].position < start
    assert events[start].layout.size == 3  # two groups of blocks, and the classifier


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"compare_with": ()}, "data_free is not among the other methods, none"),
        ({"compare_with": ("average",)}, "data_free is not among the other methods, average"),
        ({"search": SearchTable(basis=("data_free", "data_free"))}, "duplicate value"),
        ({"search": SearchTable(basis=("search",))}, "search is not among the other methods"),
        ({"min_owners": 3}, "rounds over different owners would expose the difference"),
        ({"publish": Publish(adapter_rank=2)}, "has a higher rank than each of them"),
    ],
)
def test_what_a_search_cannot_be_agreed_on_with(changes: dict[str, object], says: str) -> None:
    owners = tuple(OwnerEntry(name=f"o{number}") for number in range(4))
    fields = {"title": "t", "base": "b", "owners": owners, "method": "search", "compare_with": ("data_free",)}
    AgreementDraft(**fields)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=says):
        AgreementDraft(**fields | changes)  # type: ignore[arg-type]
