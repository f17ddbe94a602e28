"""Quorums, and the sparse graph above 150 owners: as small as it can be, and as strong as it claims."""

from itertools import combinations
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import thresholds as module
from common.summation.masked.neighbours import NeighbourGraph
from common.thresholds import MAX_COMPLETE, neighbourhood, quorum


@pytest.mark.parametrize(("owners", "colluders", "t"), [(3, 0, 2), (5, 1, 4), (10, 3, 7), (150, 20, 86)])
def test_known_quorums(owners: int, colluders: int, t: int) -> None:
    assert quorum(owners, colluders) == t
    assert neighbourhood(owners, colluders, 0).threshold == t
    assert neighbourhood(owners, colluders, 0).degree == owners - 1


@given(st.integers(3, 200), st.data())
def test_two_quorums_always_share_an_honest_owner_and_one_smaller_would_not(owners: int, data: st.DataObject) -> None:
    colluders = data.draw(st.integers(0, owners - 3))
    t = quorum(owners, colluders)
    assert 2 * t - owners > colluders
    assert 2 * (t - 1) - owners <= colluders


@pytest.mark.parametrize(
    ("owners", "colluders", "dropouts", "degree", "threshold"),
    [(1000, 100, 100, 170, 126), (1000, 50, 50, 90, 69), (500, 50, 50, 118, 86), (151, 15, 15, 46, 32)],
)
def test_known_sparse_graphs(owners: int, colluders: int, dropouts: int, degree: int, threshold: int) -> None:
    found = neighbourhood(owners, colluders, dropouts)
    assert (found.degree, found.threshold) == (degree, threshold)


@pytest.mark.parametrize(("colluders", "dropouts"), [(148, 0), (120, 20), (60, 60)])
def test_where_no_sparse_graph_is_safe_the_graph_is_complete(colluders: int, dropouts: int) -> None:
    found = neighbourhood(151, colluders, dropouts)
    assert (found.degree, found.threshold) == (150, quorum(151, colluders))


@given(st.integers(151, 400), st.data())
def test_a_sparse_graph_keeps_its_promises(owners: int, data: st.DataObject) -> None:
    """Against the slow way: the chance that any two gaps of the ring can be cut, summed term by term."""
    colluders = data.draw(st.integers(0, owners // 5))
    dropouts = data.draw(st.integers(0, owners // 10))
    found = neighbourhood(owners, colluders, dropouts)
    if found.degree == owners - 1:
        return
    assert found.degree % 2 == 0
    fewest = owners - dropouts  # the coordinator leaves as many honest owners out of the book as it may
    # In both gaps, of degree / 2 positions each, so many colluders that the shares at their edges still suffice.
    in_a_gap = found.threshold - (found.degree + 1 - found.degree // 2)
    ways = sum(
        comb(colluders, inside) * comb(fewest - 1 - colluders, found.degree - inside)
        for inside in range(max(2 * in_a_gap, 0), min(colluders, found.degree) + 1)
    )
    assert ways * comb(fewest, 2) * 2**module.SECURITY_BITS <= comb(fewest - 1, found.degree)


@given(st.sets(st.integers(0, 999), min_size=30, max_size=60), st.integers(1, 12), st.binary(min_size=32, max_size=32))
def test_neighbours_are_mutual_and_as_many_as_the_degree(owners: set[int], half: int, seed: bytes) -> None:
    degree = 2 * half
    graph = NeighbourGraph(seed, list(owners), degree)
    assert set(graph) == owners
    for owner, others in graph.items():
        assert len(set(others)) == degree
        assert list(others) == sorted(others)
        assert owner not in others
        assert all(owner in graph[other] for other in others)


def test_another_key_book_gives_another_ring() -> None:
    owners = list(range(40))
    rings = [dict(NeighbourGraph(bytes([seed]) * 32, owners, 4)) for seed in range(5)]
    assert all(one != other for one, other in combinations(rings, 2))
    assert NeighbourGraph(b"x" * 32, owners, 4) == NeighbourGraph(b"x" * 32, owners[::-1], 4)


def test_the_complete_graph_reaches_to_the_stated_size() -> None:
    assert neighbourhood(MAX_COMPLETE, 10, 10).degree == MAX_COMPLETE - 1
    assert neighbourhood(MAX_COMPLETE + 1, 10, 10).degree < MAX_COMPLETE
