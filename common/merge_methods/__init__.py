"""Merge methods, one a file; importing this folder registers them in METHODS (see method.py).

An owner turns its delta and its measurements into named tensors, and the coordinator sees only their total over the
owners. A method does not know how the sum is made. Where several methods are compared, tensors of one name are sent
once.
"""

import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module

from numpy.typing import NDArray

from common.merge_methods.method import METHODS, Measurement
from common.merge_methods.terms import Hyperparameters, MergeSettings, OwnerTerms
from common.tensor_layout import TensorLayout, union

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

ORDERED = tuple(sorted(METHODS.values(), key=lambda method: (method.order, method.name)))  # as tables list them


def tensor_kinds() -> dict[str, str]:
    """Kind of tensor (see `kind_of`) -> what it holds, for all methods."""
    return {kind: meaning for method in ORDERED for kind, meaning in method.tensor_kinds.items()}


def kind_of(name: str) -> str:
    """The kind of a tensor, from its name in a layout: `gram` for `gram/encoder.layer.0.output.dense`."""
    return name.split("/")[0].split("@")[0]


def measurements(methods: Iterable[str], tables: Mapping[str, Hyperparameters]) -> Mapping[Measurement, int]:
    """What an owner must measure for the first round of all methods, each on at most so many examples."""
    return {kind: count for name in methods for kind, count in METHODS[name].measurements(tables).items()}


def contribution_layout(methods: Iterable[str], settings: MergeSettings) -> TensorLayout:
    """The tensors of the first round of all methods, each name once."""
    return union(METHODS[name].layout(settings) for name in methods)


def contribution(methods: Iterable[str], settings: MergeSettings, owner: OwnerTerms) -> Iterator[tuple[str, NDArray]]:
    """One owner's tensors, in the order of `contribution_layout`."""
    produced: set[str] = set()
    for method in (METHODS[name] for name in methods):
        names = {entry.name for entry in method.layout(settings).entries}
        if names <= produced:
            continue  # nothing is measured again
        for name, tensor in method.contribution(settings, owner):
            if name not in produced:
                produced.add(name)
                yield name, tensor


__all__ = [
    "METHODS",
    "ORDERED",
    "Hyperparameters",
    "contribution",
    "contribution_layout",
    "kind_of",
    "measurements",
    "tensor_kinds",
]
