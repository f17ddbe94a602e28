"""Deltas: what fine-tuning changed, as differences of models and as the vectors that travel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import inf
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from common.lazy import lazy_module
from common.mapped import copy_of
from common.models.low_rank import AdapterDelta, AdapterPlan, Factors, check_cut
from common.models.plan import MergePlan
from common.tensor_layout import TensorEntry, TensorLayout

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    torch = lazy_module("torch")


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
        change = self._delta[name]
        norm = float(torch.linalg.vector_norm(change, dtype=torch.float64))
        if name in self._largest and norm > self._largest[name]:  # check: changes-are-clipped
            return change * (self._largest[name] / norm)
        return change

    def __iter__(self) -> Iterator[str]:
        return iter(self._delta)

    def __len__(self) -> int:
        return len(self._delta)


def add_delta(base: nn.Module, delta: Mapping[str, Tensor]) -> None:
    """Turn `base` into W_0 + delta, in place."""
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            parameter.add_(delta[name].to(parameter.dtype))


def delta_layout(plan: MergePlan, names: Iterable[str] | None = None) -> TensorLayout:
    """How a merged delta, or only its tensors `names`, travels to the owners: as float32."""
    wanted = plan.changed if names is None else names
    return TensorLayout(tuple(TensorEntry(name=name, shape=plan.shapes[name], bound=inf) for name in wanted))


def candidate_layout(plan: MergePlan) -> TensorLayout:
    """How a candidate travels: the whole merged delta, then the factors to which it is cut, if an adapter is published.

    Owners verify the whole one, and then that the factors are its cut.
    """
    factors = () if plan.adapter is None else plan.adapter.factor_entries(plan.shapes)
    return TensorLayout((*delta_layout(plan).entries, *factors))


def published_delta(plan: MergePlan, layout: TensorLayout, vector: NDArray[np.float32]) -> Mapping[str, Tensor]:
    """The delta of the model that a candidate stands for, cut if an adapter is published."""
    delta = VectorDelta(plan, (layout, vector))
    return delta if plan.adapter is None else AdapterDelta(delta, plan.adapter, _factors(plan.adapter, layout, vector))


def check_candidate(plan: MergePlan, layout: TensorLayout, vector: NDArray[np.float32]) -> None:
    """Raise RemoteProtocolError unless the factors of a candidate are the cut of its delta (low_rank.check_cut)."""
    if plan.adapter is not None:
        check_cut(VectorDelta(plan, (layout, vector)), plan.adapter, _factors(plan.adapter, layout, vector))


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

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
