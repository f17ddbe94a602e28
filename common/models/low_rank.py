"""Cut a merged delta to what a LoRA adapter can hold: low rank in linear layers, the head whole, nothing else.

    delta  ~  B A,    B (d_out, rank), A (rank, d_in)

is the truncated singular value decomposition, the closest matrix of that rank (Eckart and Young, 1936). The columns of
its left factor are the first eigenvectors of delta delta^T. So only one symmetric matrix, as large as the smaller side,
is decomposed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

from common.lazy import lazy_module
from common.models.layers import linear_layers, stores_input_first
from common.models.parameters import body_parameters, parameter_shapes

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel
else:
    torch = lazy_module("torch")


@dataclass(frozen=True, kw_only=True)
class AdapterPlan:
    """What an adapter of one base model can hold, by parameter name.

    `layers`: the weights of linear layers, which are cut to `rank`. True if the weight is stored as (d_in, d_out).
    `whole`: parameters that travel with the adapter uncut, because not everybody gets them by loading the base.
    """

    rank: int
    layers: Mapping[str, bool]
    whole: tuple[str, ...]

    @property
    def whole_modules(self) -> tuple[str, ...]:
        """The modules of the parameters that stay whole, each once."""
        return tuple(dict.fromkeys(_module_of(name) for name in self.whole))


@dataclass(frozen=True, kw_only=True)
class Factors:
    """`up` (d_out, rank) with orthonormal columns and `down` (rank, d_in), float32: the B and A of LoRA at scale 1."""

    up: Tensor
    down: Tensor


@dataclass(frozen=True, kw_only=True)
class LayerCut:
    """`relative_error` = |delta - B A| / |delta| in Frobenius norms, 0 for a layer that did not change."""

    name: str
    relative_error: float


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """A delta as an adapter of `plan` holds it, and how much of it the cut lost.

    `delta` has every parameter; those that the adapter does not hold are zeros. `relative_error` covers all cut layers
    together. `dropped` is the norm of what the adapter does not hold, relative to the norm of the whole delta.
    """

    plan: AdapterPlan
    delta: Mapping[str, Tensor]
    factors: Mapping[str, Factors]
    layers: tuple[LayerCut, ...]
    relative_error: float
    dropped: float


def adapter_plan(base: PreTrainedModel, made_here: Collection[str], rank: int) -> AdapterPlan:
    """What an adapter of `base` at this rank can hold.

    `made_here`: parameters that the base's files lack. They travel whole, and so does the head if the model separates
    it from the body.
    """
    body = body_parameters(base)
    names = parameter_shapes(base)
    modules = {_module_of(name) for name in names if name not in body or name in made_here} - {""}
    # peft matches the modules to save by the end of their names, so other modules may match too.
    whole = tuple(name for name in names if _module_of(name).endswith(tuple(modules)))
    layers = {
        f"{name}.weight": stores_input_first(module)
        for name, module in linear_layers(base).items()
        if f"{name}.weight" not in whole
    }
    return AdapterPlan(rank=rank, layers=layers, whole=whole)


def cut(delta: Mapping[str, Tensor], plan: AdapterPlan) -> LowRank:
    """The closest delta (float32) that an adapter of this plan can hold."""
    kept: dict[str, Tensor] = {}
    factors: dict[str, Factors] = {}
    layers: list[LayerCut] = []
    lost = of_layers = dropped = everything = 0.0  # squared norms
    for name, tensor in delta.items():
        square = float(tensor.double().square().sum())
        everything += square
        if name in plan.layers:
            input_first = plan.layers[name]
            factors[name] = factorise(tensor.T if input_first else tensor, plan.rank)
            product = multiply(factors[name])
            kept[name] = product.T.contiguous() if input_first else product
            error = float((tensor.double() - kept[name].double()).square().sum())
            layers.append(LayerCut(name=name, relative_error=_root_of_ratio(error, square)))
            lost, of_layers = lost + error, of_layers + square
        elif name in plan.whole:
            kept[name] = tensor
        else:
            kept[name] = torch.zeros_like(tensor)
            dropped += square
    return LowRank(
        plan=plan,
        delta=kept,
        factors=factors,
        layers=tuple(layers),
        relative_error=_root_of_ratio(lost, of_layers),
        dropped=_root_of_ratio(dropped, everything),
    )


def factorise(delta: Tensor, rank: int) -> Factors:
    """(d_out, d_in) -> the factors of the truncated singular value decomposition, padded with zeros up to `rank`."""
    matrix = delta.double()
    wide = matrix.shape[0] <= matrix.shape[1]
    short = matrix if wide else matrix.T  # (d, D), d <= D
    count = min(rank, len(short))
    directions = torch.linalg.eigh(short @ short.T).eigenvectors[:, -count:].flip(1)  # (d, count), largest first
    other = directions.T @ short  # (count, D)
    up, down = (directions, other) if wide else (other.T, directions.T)
    padding = rank - count
    return Factors(
        up=torch.nn.functional.pad(up, (0, padding)).float().contiguous(),
        down=torch.nn.functional.pad(down, (0, 0, 0, padding)).float().contiguous(),
    )


def multiply(factors: Factors) -> Tensor:
    """(d_out, d_in) float32: the product of the float32 factors, rounded once."""
    return (factors.up.double() @ factors.down.double()).float()


def _module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _root_of_ratio(part: float, whole: float) -> float:
    return sqrt(part / whole) if whole > 0 else 0.0
