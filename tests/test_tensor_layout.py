"""Named tensors and the flat vector: exact there and back, refused when anything differs."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import LocalProtocolError
from common.summation import fixed_point
from common.tensor_layout import TensorEntry, TensorLayout, union


@st.composite
def layouts(draw: st.DrawFn) -> TensorLayout:
    entries = []
    for index in range(draw(st.integers(1, 6))):
        if draw(st.booleans()):
            side = draw(st.integers(1, 7))
            entries.append(TensorEntry(name=f"t{index}", shape=(side, side), bound=9.0, packing="symmetric"))
        else:
            shape = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))
            entries.append(TensorEntry(name=f"t{index}", shape=shape, bound=9.0))
    return TensorLayout(tuple(entries), draw(st.sampled_from((64, 32))))


def random_tensors(layout: TensorLayout, seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    tensors = {}
    for entry in layout.entries:
        tensor = random.standard_normal(entry.shape)
        tensors[entry.name] = tensor + tensor.T if entry.packing == "symmetric" else tensor
    return tensors


def flatten(layout: TensorLayout, tensors: dict[str, np.ndarray]) -> np.ndarray:
    vector = np.empty(layout.size)
    layout.flatten(tensors.items(), vector)
    return vector


@given(layouts(), st.integers(0, 2**32 - 1))
def test_round_trip_is_exact(layout: TensorLayout, seed: int) -> None:
    tensors = random_tensors(layout, seed)
    for name, tensor in layout.unflatten(flatten(layout, tensors)):
        np.testing.assert_array_equal(tensor, tensors[name])


@given(layouts(), st.integers(0, 2**32 - 1))
def test_adding_vectors_adds_tensors(layout: TensorLayout, seed: int) -> None:
    one, other = random_tensors(layout, seed), random_tensors(layout, seed + 1)
    total = flatten(layout, one) + flatten(layout, other)
    for name, tensor in layout.unflatten(total):
        np.testing.assert_array_equal(tensor, one[name] + other[name])


@given(layouts(), st.integers(0, 2**32 - 1))
def test_tensors_are_encoded_one_by_one_as_a_whole_vector_is(layout: TensorLayout, seed: int) -> None:
    tensors = random_tensors(layout, seed)
    vector = np.empty(layout.size)
    encoded = fixed_point.flatten_encoded(layout, iter(tensors.items()), vector, 3)
    np.testing.assert_array_equal(encoded, fixed_point.encode(layout, flatten(layout, tensors), 3))
    with pytest.raises(LocalProtocolError, match="unexpected tensor"):
        fixed_point.flatten_encoded(layout, [*tensors.items(), ("more", np.zeros(1))], vector, 3)


@given(layouts())
def test_a_layout_survives_being_written_down(layout: TensorLayout) -> None:
    again = TensorLayout.from_json(json.loads(json.dumps(layout.to_json())))
    assert again == layout
    assert again.digest() == layout.digest()


@given(layouts(), st.integers(1, 200))
def test_parts_cover_the_vector_once_and_keep_the_limit(layout: TensorLayout, part_bytes: int) -> None:
    slices = layout.part_slices(bytes_per_number=8, part_bytes=part_bytes)
    covered = [index for position in slices for index in range(position.start, position.stop)]
    assert covered == list(range(layout.size))
    assert all((position.stop - position.start) * 8 <= max(part_bytes, 8) for position in slices)


def test_symmetric_matrices_travel_as_their_upper_triangle_row_by_row() -> None:
    layout = TensorLayout((TensorEntry(name="g", shape=(3, 3), bound=9.0, packing="symmetric"),))
    matrix = np.array([[1.0, 2, 3], [2, 4, 5], [3, 5, 6]])
    np.testing.assert_array_equal(flatten(layout, {"g": matrix}), [1, 2, 3, 4, 5, 6])


A, B = TensorEntry(name="a", shape=(2,), bound=9.0), TensorEntry(name="b", shape=(2, 2), bound=9.0)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"a": np.zeros(2)}, "expected b of shape .2, 2., got nothing"),
        ({"b": np.zeros((2, 2)), "a": np.zeros(2)}, "expected a of shape .2,., got b"),
        ({"a": np.zeros(3), "b": np.zeros((2, 2))}, "got a of shape .3,."),
        ({"a": np.zeros(2), "b": np.zeros((2, 2)), "c": np.zeros(1)}, "unexpected tensor c"),
    ],
)
def test_missing_misplaced_misshapen_and_additional_tensors_are_refused(
    tensors: dict[str, np.ndarray], says: str
) -> None:
    with pytest.raises(LocalProtocolError, match=says):
        flatten(TensorLayout((A, B)), tensors)


def test_a_vector_of_another_length_is_refused() -> None:
    with pytest.raises(LocalProtocolError, match=r"the layout needs \(6,\)"):
        TensorLayout((A, B)).read(np.zeros(7), "a")


def test_any_difference_changes_the_digest() -> None:
    symmetric = TensorEntry(name="b", shape=(2, 2), bound=9.0, packing="symmetric")
    others = [
        (B, A),
        (A,),
        (A, symmetric),
        (A, TensorEntry(name="c", shape=(2, 2), bound=9.0)),
        (A, TensorEntry(name="b", shape=(4,), bound=9.0)),
        (A, TensorEntry(name="b", shape=(2, 2), bound=8.0)),
    ]
    digests = {TensorLayout(entries).digest() for entries in [(A, B), *others]}
    digests.add(TensorLayout((A, B), ring_bits=32).digest())
    assert len(digests) == 2 + len(others)


def test_a_union_has_every_name_once_and_refuses_a_contradiction() -> None:
    assert union([TensorLayout((A,)), TensorLayout((B, A))]).entries == (A, B)
    with pytest.raises(LocalProtocolError, match="two different shapes"):
        union([TensorLayout((A,)), TensorLayout((TensorEntry(name="a", shape=(3,), bound=9.0),))])


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "", "shape": (1,), "bound": 1.0},
        {"name": "x", "shape": (0,), "bound": 1.0},
        {"name": "x", "shape": (1,), "bound": 0.0},
        {"name": "x", "shape": (1,), "bound": float("nan")},
        {"name": "x", "shape": (2, 3), "bound": 1.0, "packing": "symmetric"},
    ],
)
def test_an_impossible_entry_cannot_be_built(entry: dict) -> None:
    with pytest.raises(LocalProtocolError):
        TensorEntry(**entry)


@pytest.mark.parametrize("side", [1, 2, 63, 64, 65, 200])
def test_a_symmetric_matrix_of_any_size_is_the_same_after_it_travelled(side: int) -> None:
    layout = TensorLayout((TensorEntry(name="g", shape=(side, side), bound=9.0, packing="symmetric"),))
    matrix = np.random.default_rng(side).uniform(-1, 1, (side, side))
    vector = np.empty(layout.size)
    layout.flatten([("g", matrix + matrix.T)], vector)
    np.testing.assert_array_equal(layout.read(vector, "g"), matrix + matrix.T)
