"""The symmetric product against explicit float64 rows, for any number of rows, batches and dimensions."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.measurement.symmetric_product import COLUMNS, add_upper, mirror_upper

# Small dimensions, and dimensions around the edges of bands.
DIMENSIONS = st.sampled_from([1, 2, 7, COLUMNS - 1, COLUMNS, COLUMNS + 1, 2 * COLUMNS + 3])


def random_rows(count: int, dimension: int, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimension, generator=random) + torch.randn(dimension, generator=random)


def summed(batches: list[torch.Tensor]) -> torch.Tensor:
    dimension = batches[0].shape[1]
    matrix = torch.zeros(dimension, dimension, dtype=torch.float64)
    for rows in batches:
        add_upper(matrix, rows)
    mirror_upper(matrix)
    return matrix


@settings(deadline=None, max_examples=40)
@given(DIMENSIONS, st.lists(st.integers(0, 300), min_size=1, max_size=4), st.integers(0, 2**32))
def test_sums_over_batches_are_symmetric_and_equal_explicit_rows(dimension: int, counts: list[int], seed: int) -> None:
    batches = [random_rows(count, dimension, seed + number) for number, count in enumerate(counts)]
    rows = torch.cat(batches).double()
    matrix, oracle = summed(batches), rows.T @ rows
    assert torch.equal(matrix, matrix.T)
    assert (matrix - oracle).norm() <= 1e-5 * oracle.norm()
    assert ((matrix - oracle).abs() <= 1e-5 * torch.outer(oracle.diagonal(), oracle.diagonal()).sqrt()).all()


def test_rows_may_be_a_view_of_anything() -> None:
    rows = random_rows(50, 12, seed=0)
    for view in (rows[::3], rows[:, 2:9], random_rows(12, 50, seed=1).T, rows[:, ::2]):
        torch.testing.assert_close(summed([view]), view.double().T @ view.double(), rtol=1e-5, atol=1e-4)


def test_rows_that_count_several_times_equal_repeated_rows() -> None:
    rows, matrix = random_rows(9, 5, seed=0), torch.zeros(5, 5, dtype=torch.float64)
    add_upper(matrix, rows, times=3)
    torch.testing.assert_close(matrix.triu(), summed([rows] * 3).triu(), rtol=1e-5, atol=1e-5)
