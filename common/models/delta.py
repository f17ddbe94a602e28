"""Deltas: what fine-tuning changed, as differences of models and as the vectors that travel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import inf
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from common.errors import RemoteProtocolError
from common.lazy import lazy_module
from common.mapped import copy_of, pieces
from common.models.low_rank import SUBNORMAL, AdapterDelta, AdapterPlan, Factors, check_cut
from common.models.plan import MergePlan
from common.tensor_layout import TensorEntry, TensorLayout

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    torch = lazy_module("torch")

APPLIED = "applied/"  # before the name of a parameter that a method's function made
FOLLOWING = (APPLIED, "adapter_up/", "adapter_down/")  # what follows from tensors that equations are about

Function = Callable[[Mapping[str, "Tensor"]], Iterable[tuple[str, "Tensor"]]]  # Method.apply


class Delta(Mapping[str, "Tensor"]):
    """W_i - W_0 by parameter name, float32. Each tensor is computed when it is asked for."""

    def __init__(self, fine_tuned: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
        self._fine_tuned, self._base = fine_tuned, base
        self._experts: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name in self._experts:
            return self._experts[name]
        change = (self._fine_tuned[name] - self._base[name]).detach()
        if change.ndim > 2:  # fused experts: callers alternate between slices of two parameters, so keep the last two
            self._experts = dict(list(self._experts.items())[-1:]) | {name: change}
        return change

    def __iter__(self) -> Iterator[str]:
        return iter(self._fine_tuned)

    def __len__(self) -> int:
        return len(self._fine_tuned)


class ClippedDelta(Mapping[str, "Tensor"]):
    """A delta whose tensors have at most the 2-norms `largest`, by parameter name: longer ones are scaled down."""

    def __init__(self, delta: Mapping[str, Tensor], largest: Mapping[str, float]) -> None:
        self._delta, self._largest = delta, largest

    def __getitem__(self, name: str) -> Tensor:
        change, largest = self._delta[name], self._largest.get(name, inf)
        if largest < inf:
            norm = float(torch.linalg.vector_norm(change, dtype=torch.float64))
            if norm > largest:  # check: changes-are-clipped
                return change * (largest / norm)
        return change

    def __iter__(self) -> Iterator[str]:
        return iter(self._delta)

    def __len__(self) -> int:
        return len(self._delta)


def add_delta(base: nn.Module, delta: Mapping[str, Tensor]) -> None:
    """Turn `base` into W_0 + delta, in place."""
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if isinstance(delta, VectorDelta) and parameter.is_contiguous():
                delta.add_to(parameter.view(-1), name)
            else:
                parameter.add_(delta[name].to(parameter.dtype))


def delta_layout(plan: MergePlan, names: Iterable[str] | None = None) -> TensorLayout:
    """How a merged delta, or only its tensors `names`, travels to the owners: as float32."""
    wanted = plan.changed if names is None else names
    return TensorLayout(tuple(TensorEntry(name=name, shape=plan.shapes[name], bound=inf) for name in wanted))


def candidate_layout(plan: MergePlan, beside: Iterable[TensorEntry] = (), applied: Iterable[str] = ()) -> TensorLayout:
    """How a candidate travels: the whole merged delta, then what its method solves `beside` it, what a fixed function
    makes of the parameters `applied`, and the factors to which it is cut, if an adapter is published.

    Owners verify the first two by their equations, and then by themselves that the others follow from them.
    """
    made = (TensorEntry(name=APPLIED + name, shape=plan.shapes[name], bound=inf) for name in applied)
    factors = () if plan.adapter is None else plan.adapter.factor_entries(plan.shapes)
    return TensorLayout((*delta_layout(plan).entries, *beside, *made, *factors))


def solved_layout(layout: TensorLayout) -> TensorLayout:
    """The part of a layout that equations are about; the rest follows from it."""
    return TensorLayout(tuple(entry for entry in layout.entries if not entry.name.startswith(FOLLOWING)))


def published_delta(plan: MergePlan, layout: TensorLayout, vector: NDArray[np.float32]) -> Mapping[str, Tensor]:
    """The delta of the model that a candidate stands for, cut if an adapter is published."""
    delta = AppliedDelta(plan, (layout, vector))
    return delta if plan.adapter is None else AdapterDelta(delta, plan.adapter, _factors(plan.adapter, layout, vector))


def check_candidate(plan: MergePlan, layout: TensorLayout, vector: NDArray[np.float32], function: Function) -> None:
    """Raise RemoteProtocolError unless all that follows from a candidate's solved tensors is what follows from them:
    what its method's function makes of them, and the factors of the cut (low_rank.check_cut).
    """
    delta = AppliedDelta(plan, (layout, vector))
    for name, expected in function(VectorDelta(plan, (layout, vector))):
        if not is_rounded(delta[name], expected):  # check: functions-are-applied
            raise RemoteProtocolError(f"the coordinator sent another {name} than the method makes of the owners' merge")
    if plan.adapter is not None:
        check_cut(delta, plan.adapter, _factors(plan.adapter, layout, vector))


def is_rounded(sent: Tensor, expected: Tensor) -> bool:
    """Whether `sent`, float32, is `expected`, float64, except for what rounding and two machines' arithmetic leave:
    2^-22 of each number and of the tensor's root mean square.
    """
    size = expected.abs() + expected.square().mean().sqrt()
    return bool(((sent.double() - expected).abs() <= 2.0**-22 * size + SUBNORMAL).all())


def _factors(plan: AdapterPlan, layout: TensorLayout, vector: NDArray[np.float32]) -> dict[str, Factors]:
    def read(name: str) -> Tensor:
        return torch.from_numpy(copy_of(layout.read(vector, name)))

    return {name: Factors(up=read(f"adapter_up/{name}"), down=read(f"adapter_down/{name}")) for name in plan.layers}


class VectorDelta(Mapping[str, "Tensor"]):
    """A merged delta in the flat float32 vectors that travel. Each tensor is read when it is asked for.

    A tensor comes from the last vector that holds it. A tensor that no vector holds is zeros, which take no memory.
    """

    def __init__(self, plan: MergePlan, *parts: tuple[TensorLayout, NDArray[np.float32]]) -> None:
        self._shapes = plan.shapes
        self._parts = {entry.name: (layout, vector) for layout, vector in parts for entry in layout.entries}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._parts:
            return torch.zeros(()).expand(self._shapes[name])
        layout, vector = self._parts[name]
        return torch.from_numpy(copy_of(layout.read(vector, name)))

    def add_to(self, flat: Tensor, name: str) -> None:
        """Add a tensor to a parameter, (numbers,), without a copy of the whole: the largest holds a vocabulary."""
        if name not in self._parts:
            flat.add_(0.0)  # which makes -0.0 to 0.0, as any other sum would: models have digests
            return
        layout, vector = self._parts[name]
        start = 0
        for piece in pieces(layout.read(vector, name).reshape(-1)):
            flat[start : start + len(piece)].add_(torch.from_numpy(piece.copy()).to(flat.dtype))
            start += len(piece)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


class MixedDelta(Mapping[str, "Tensor"]):
    """The sum of some deltas, each times a scale that depends on the parameter; what has no scale is as in the first.

    `scales`: by parameter name, one for each of `parts`. Every product and sum is rounded by itself in float64, and the
    result to float32, so all parties have the same numbers.
    """

    def __init__(self, parts: Sequence[Mapping[str, Tensor]], scales: Mapping[str, Sequence[float]]) -> None:
        self._parts, self._scales = parts, scales

    @classmethod
    def of(
        cls, parts: Sequence[Mapping[str, Tensor]], groups: Sequence[Sequence[str]], scales: Sequence[float]
    ) -> MixedDelta:
        """The delta of a mixture (merge_methods/search.py): the scale of each group for the first part, then for the
        second ...
        """
        by_part = [scales[start : start + len(groups)] for start in range(0, len(scales), len(groups))]
        columns = zip(groups, zip(*by_part, strict=True), strict=True)
        return cls(parts, {name: of_group for names, of_group in columns for name in names})

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._scales:
            return self._parts[0][name]
        mixed = torch.zeros((), dtype=torch.float64)
        for part, scale in zip(self._parts, self._scales[name], strict=True):
            if scale:  # a part that is left out need not be read
                mixed = mixed + part[name].double() * scale  # two operations, which nothing fuses
        return mixed.float().expand(self._parts[0][name].shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts[0])

    def __len__(self) -> int:
        return len(self._parts[0])


class AppliedDelta(VectorDelta):
    """The same, with what a method's function made of some parameters in their place."""

    def __getitem__(self, name: str) -> Tensor:
        return super().__getitem__(self._applied(name))

    def add_to(self, flat: Tensor, name: str) -> None:
        super().add_to(flat, self._applied(name))

    def _applied(self, name: str) -> str:
        return APPLIED + name if APPLIED + name in self._parts else name
