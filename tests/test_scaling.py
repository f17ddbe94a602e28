"""Contributions in 32 bits: every number fits its scale at every owner, and the total is the one of 64 bits."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import assume, given, reject
from hypothesis import strategies as st
from numpy.typing import NDArray

from common import scaling
from common.agreement import AgreementDraft, OwnerEntry, Summation
from common.errors import NumericalError
from common.merge_methods import METHODS, ORDERED, contribution, contribution_layout
from common.merge_methods.regmean import RegMeanTable
from common.merge_methods.terms import MergeSettings, OwnerTerms
from common.models.plan import MergePlan
from common.scaling import RescaledTotal, Scales
from common.summation import fixed_point
from common.summation.protocol import Total
from common.tensor_layout import TensorEntry, TensorLayout
from tests.support.errors import refused
from tests.support.merging import merge_settings, owner_for, plan_for, single_round
from tests.support.sums import identities_of, run, terms_of

TOGETHER = ("regmean", "average", "data_free")  # in one sum
Vectors = dict[str, NDArray[np.float64]]


def sum_in_32_bits(kind: str, layout: TensorLayout, vectors: Mapping[str, NDArray[np.float64]]) -> RescaledTotal:
    """Both rounds, one after the other, as the coordinator opens them."""
    identities = identities_of(len(vectors))
    measures = {name: np.zeros(scaling.measures_layout(layout).size) for name in vectors}
    for name, vector in vectors.items():
        scaling.measures_layout(layout).flatten(scaling.measures(layout, vector), measures[name])
    measured = run(kind, identities, terms_of(identities, scaling.measures_layout(layout)), measures)
    scales = Scales(layout, scaling.choose(layout, measured))
    scaled = {name: np.zeros(scaling.scaled_layout(layout).size) for name in vectors}
    for name, vector in vectors.items():
        scales.check(vector, len(vectors))
        scaling.scaled_layout(layout).flatten(scaling.scaled(scales, vector), scaled[name])
        assert np.abs(scaled[name]).max() <= 1 + 1e-12  # well within scaling.BOUND
    total = run(kind, identities, terms_of(identities, scaling.scaled_layout(layout)), scaled)
    return RescaledTotal(scaled=total, measured=measured, scales=scales)


def sum_unless_too_unlike(layout: TensorLayout, vectors: Mapping[str, NDArray[np.float64]]) -> RescaledTotal:
    """Skip the few random owners that have almost nothing in the one column of a product, and refuse."""
    try:
        return sum_in_32_bits("plain", layout, vectors)
    except NumericalError:
        reject()


def vectors_for(settings: MergeSettings, owners: list[OwnerTerms]) -> tuple[TensorLayout, Vectors]:
    layout = contribution_layout(TOGETHER, settings)
    vectors = {name: np.zeros(layout.size) for name in identities_of(len(owners))}
    for vector, owner in zip(vectors.values(), owners, strict=True):
        layout.flatten(contribution(TOGETHER, settings, owner), vector)
    return layout, vectors


def swept(plan: MergePlan, alphas: tuple[float, ...], ridge: float) -> MergeSettings:
    return merge_settings(plan, regmean=RegMeanTable(alphas=alphas, ridge=ridge))


def rows_for(seed: int, number: int, num_rows: int, d_in: int) -> torch.Tensor:
    """One owner's rows. Features differ in size by orders of magnitude, owners by one; two are alike, one is dead."""
    random = torch.Generator().manual_seed(seed)
    sizes = 10 ** (4 * torch.rand(d_in, generator=random, dtype=torch.float64) - 3)
    random.manual_seed(seed + number)
    rows = sizes * torch.randn(num_rows, d_in, generator=random, dtype=torch.float64)
    rows *= 10 ** float(torch.rand(1, generator=random) - 0.5)
    rows[:, 0] = 0
    rows[:, -1] = rows[:, min(1, d_in - 1)]
    return rows


@given(
    d_in=st.integers(1, 7),
    d_outs=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    num_owners=st.integers(3, 5),
    num_rows=st.integers(0, 12),
    alphas=st.sampled_from([(1.0,), (0.3,), (0.1, 0.5, 1.0)]),
    ridge=st.sampled_from([0.0, 1e-6]),
    unchanged=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_number_fits_its_scale_and_the_total_is_as_near_as_it_says(
    d_in: int,
    d_outs: list[int],
    num_owners: int,
    num_rows: int,
    alphas: tuple[float, ...],
    ridge: float,
    unchanged: bool,
    seed: int,
) -> None:
    plan = plan_for(d_in, d_outs)
    owners = [owner_for(plan, rows_for(seed, number, num_rows, d_in), seed + number) for number in range(num_owners)]
    if unchanged:
        for tensor in owners[0].delta.values():
            tensor.zero_()
    layout, vectors = vectors_for(swept(plan, alphas, ridge), owners)
    total = sum_unless_too_unlike(layout, vectors)
    exact = sum(vectors.values())
    for entry in layout.entries:
        assert entry.name in total
        true = layout.read(exact, entry.name)  # type: ignore[arg-type]
        error = np.abs(total[entry.name] - true)
        if entry.packing == "symmetric":
            diagonal = total.diagonal_error(entry.name)
            assert (error <= np.sqrt(np.outer(diagonal, diagonal)) * (1 + 1e-9) + 1e-12).all()
        elif entry.name in total.scaled:
            assert (error <= total.rounding_error(entry.name) * (1 + 1e-9) + 1e-12).all()
        else:
            assert (error <= 1e-6).all()


@given(
    d_in=st.integers(2, 8),
    d_outs=st.lists(st.integers(1, 5), min_size=1, max_size=2),
    num_owners=st.integers(3, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_merge_in_32_bits_is_that_of_the_exact_sum(d_in: int, d_outs: list[int], num_owners: int, seed: int) -> None:
    plan = plan_for(d_in, d_outs)
    owners = [owner_for(plan, rows_for(seed, number, 6 * d_in, d_in), seed + number) for number in range(num_owners)]
    settings = swept(plan, (0.1, 0.5, 0.9, 0.99), 1e-6)
    layout, vectors = vectors_for(settings, owners)
    total = np.sum(list(vectors.values()), axis=0)
    exact = Total(layout=layout, vector=total, owners=tuple(vectors), roster_size=num_owners)
    at_32 = sum_unless_too_unlike(layout, vectors)
    for method in map(single_round, TOGETHER):
        for value in method.swept(settings.tables):
            expected, found = (method.solve(settings, total, value, with_spectra=True) for total in (exact, at_32))
            # If a Gram is almost singular, the rounding of the two sums may decide.
            assume([note.status for note in found.layers] == [note.status for note in expected.layers])
            for name, true in expected.delta.items():
                assert float((found.delta[name] - true).norm()) <= 1e-4 * float(true.norm())


def test_masked_and_plain_sums_of_32_bits_are_bit_identical() -> None:
    plan = plan_for(5, [3, 2])
    owners = [owner_for(plan, rows_for(0, number, 20, 5), number) for number in range(4)]
    layout, vectors = vectors_for(swept(plan, (0.5, 0.9), 1e-6), owners)
    masked, plain = (sum_in_32_bits(kind, layout, vectors) for kind in ("masked", "plain"))
    assert masked.scaled.vector.tobytes() == plain.scaled.vector.tobytes()
    assert masked.scales.exponents.tobytes() == plain.scales.exponents.tobytes()
    numbers = sum(entry.size for entry in layout.entries if entry.name in masked.scaled)
    assert masked.scaled.layout.num_bytes * 2 == numbers * 8


GRAM = TensorEntry(name="gram/a", shape=(3, 3), bound=1000.0, packing="symmetric")
LAYOUT = TensorLayout(
    (
        TensorEntry(name="weight", shape=(1,), bound=100.0),
        GRAM,
        TensorEntry(name="gram_delta/a", shape=(3, 2), bound=1000.0, product_of="gram/a"),
        TensorEntry(name="weighted_delta/b", shape=(2, 2), bound=1000.0),
    )
)


def vector_of(weight: float, diagonal: list[float], products: list[list[float]], changes: list[list[float]]) -> NDArray:
    vector = np.zeros(LAYOUT.size)
    tensors = {
        "weight": np.array([weight]),
        "gram/a": np.diag(diagonal),
        "gram_delta/a": np.array(products),
        "weighted_delta/b": np.array(changes),
    }
    LAYOUT.flatten(tensors.items(), vector)
    return vector


def test_what_is_measured_and_the_scales_that_it_gives_are_known() -> None:
    """Sums of three alike: 2^2 > sqrt(15), 2 > sqrt(3.75); 2^3 > sqrt(3 * 100 / 5), 2 > sqrt(3 / 1.25); 2^5 > 21."""
    own = vector_of(5.0, [5.0, 0.0, 1.25], [[10, 0], [0, 0], [0, -1.0]], [[1, -7], [2, 3]])
    measures = dict(scaling.measures(LAYOUT, own))
    assert list(measures) == ["weight", "diagonal/gram/a", "columns/gram_delta/a", "largest/weighted_delta/b"]
    np.testing.assert_allclose(measures["diagonal/gram/a"], [5, 0, 1.25])
    np.testing.assert_allclose(measures["columns/gram_delta/a"], [20, 0.8])
    np.testing.assert_allclose(measures["largest/weighted_delta/b"], [7])
    total = sum_in_32_bits("plain", LAYOUT, {f"o{number}": own for number in range(3)})
    dead = total.scales.exponents[1]  # as large as what rounding alone could have hidden
    assert total.scales.exponents.tolist() == [2, dead, 1, 3, 1, 5]
    assert dead < -20
    np.testing.assert_allclose(total["gram/a"], np.diag([15, 0, 3.75]))
    assert total["weight"] == pytest.approx([15])


def test_a_number_at_the_very_edge_of_a_power_of_two_fits_its_scale() -> None:
    for size in (1.0, 4.0, np.nextafter(4.0, 5), np.nextafter(4.0, 0), 1e-12, 3e-9):
        alone = vector_of(1.0, [size, size, size], [[size, 0], [0, 0], [0, size]], [[size, 0], [0, 0]])
        nothing = np.zeros_like(alone)
        total = sum_in_32_bits("plain", LAYOUT, {"o0": alone, "o1": nothing, "o2": nothing})
        np.testing.assert_allclose(total["gram/a"], np.diag([size] * 3), rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("exponents", [[16, 10, 10], [27, 1, 1]])
def test_scales_that_leave_an_owner_little_are_refused(exponents: list[int]) -> None:
    """With three owners 19 bits are spare. Two of three numbers keep too few; then the size of the diagonal does."""
    own = vector_of(1.0, [2.0**30, 1.0, 1.0], [[1.0, 0], [0, 0], [0, 1.0]], [[1, 0], [0, 0]])
    honest = np.array([16, 1, 1, 1, 1, 1], np.float32)
    Scales(LAYOUT, honest).check(own, 3)
    honest[:3] = exponents
    with pytest.raises(NumericalError, match=r"gram/a: .* most of this owner's values would keep fewer than 10 bits"):
        Scales(LAYOUT, honest).check(own, 3)


def test_a_sum_over_the_most_owners_leaves_room_for_unlike_ones() -> None:
    """Scales are at most twice as large as needed, squared four times. One owner may be ten times smaller than that."""
    bits = fixed_point.fraction_bits(scaling.BOUND, 150, ring_bits=32)
    assert 2 ** (bits - scaling.LEAST_BITS) >= 10 * 4 * 150


def draft(**changes: object) -> AgreementDraft:
    owners = tuple(OwnerEntry(name=f"o{number}") for number in range(4))
    return AgreementDraft(
        **{"title": "t", "base": "b", "owners": owners, "summation": Summation(ring_bits=32), **changes}  # type: ignore[arg-type]
    )


def test_32_bits_are_for_methods_that_were_built_for_them_and_for_all_owners() -> None:
    fitting = [method.name for method in ORDERED if method.fits_32_bits]
    others = ("average", "task_arithmetic", "isotropic", "data_free", "anchored", "logit_adjusted", "search")
    assert set(draft(compare_with=others).methods) == set(fitting)
    for method in sorted(set(METHODS) - set(fitting)):
        with refused(f"ring_bits = 32: {method} needs 64", hint=f"32 bits are enough for {', '.join(fitting)}"):
            draft(compare_with=(method,))
    with refused("would expose the difference", hint="all 4 owners must take part: leave min_owners out"):
        draft(min_owners=3)
    many = tuple(OwnerEntry(name=f"o{number}") for number in range(151))
    with pytest.raises(ValueError, match="at most 150 owners, there are 151"):
        draft(owners=many)
    with pytest.raises(ValueError, match="ring_bits"):
        Summation(ring_bits=16)  # type: ignore[arg-type]
