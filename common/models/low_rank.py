"""Cut a merged delta to what a LoRA adapter can hold: low rank in linear layers, the head whole, nothing else.

    delta  ~  B A,    B (d_out, rank), A (rank, d_in)

is the truncated singular value decomposition, the closest matrix of that rank (Eckart and Young, 1936). Its left factor
are the first eigenvectors of delta delta^T, so one symmetric matrix of the smaller side is all that is decomposed.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from common.models.layers import linear_layers
from common.models.parameters import body_parameters, parameter_shapes


@dataclass(frozen=True, kw_only=True)
class AdapterPlan:
    """What an adapter of one base model can hold, by parameter name.

    `layers`: weights of linear layers, which are cut to `rank`; True for one stored as (d_in, d_out), as in Conv1D.
    `whole`: parameters that go with the adapter as they are, since loading the base would not give them to everybody.
    """

    rank: int
    layers: Mapping[str, bool]
    whole: tuple[str, ...]

    @property
    def whole_modules(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(_module_of(name) for name in self.whole))


@dataclass(frozen=True, kw_only=True)
class Factors:
    """`up` (d_out, rank) with orthonormal columns and `down` (rank, d_in), float32: the B and A of LoRA at scale 1."""

    up: Tensor
    down: Tensor


@dataclass(frozen=True, kw_only=True)
class LayerCut:
    """`relative_error` = |delta - B A| / |delta| in Frobenius norms; 0 of a layer that did not change."""

    name: str
    relative_error: float


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """A delta as an adapter of `plan` holds it, and what that lost.

    `delta` has every parameter of what was cut, those that no adapter holds as zeros; `relative_error` is of all cut
    layers together; `dropped` is the norm of what no adapter holds, relative to that of everything.
    """

    plan: AdapterPlan
    delta: Mapping[str, Tensor]
    factors: Mapping[str, Factors]
    layers: tuple[LayerCut, ...]
    relative_error: float
    dropped: float


def adapter_plan(base: PreTrainedModel, made_here: Collection[str], rank: int) -> AdapterPlan:
    """`made_here`: parameters that the base's files lack; with the head, where the model tells it, they go whole."""
    body = body_parameters(base)
    names = parameter_shapes(base)
    modules = {_module_of(name) for name in names if name not in body or name in made_here} - {""}
    # peft finds the modules to save by the end of their names, so others may come along.
    whole = tuple(name for name in names if _module_of(name).endswith(tuple(modules)))
    layers = {
        f"{name}.weight": isinstance(module, Conv1D)
        for name, module in linear_layers(base).items()
        if f"{name}.weight" not in whole
    }
    return AdapterPlan(rank=rank, layers=layers, whole=whole)


def cut(delta: Mapping[str, Tensor], plan: AdapterPlan) -> LowRank:
    """The closest delta (float32) that an adapter of this plan holds."""
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
    """(d_out, d_in) -> the factors of its truncated singular value decomposition, padded with zeros up to `rank`."""
    matrix = delta.double()
    wide = matrix.shape[0] <= matrix.shape[1]
    short = matrix if wide else matrix.T  # (d, D), d <= D
    count = min(rank, len(short))
    directions = torch.linalg.eigh(short @ short.T).eigenvectors[:, -count:].flip(1)  # (d, count), largest first
    other = directions.T @ short  # (count, D)
    up, down = (directions, other) if wide else (other.T, directions.T)
    padding = rank - count
    return Factors(
        up=nn.functional.pad(up, (0, padding)).float().contiguous(),
        down=nn.functional.pad(down, (0, 0, 0, padding)).float().contiguous(),
    )


def multiply(factors: Factors) -> Tensor:
    """(d_out, d_in) float32: the product of the float32 factors, rounded once."""
    return (factors.up.double() @ factors.down.double()).float()


def _module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _root_of_ratio(part: float, whole: float) -> float:
    return sqrt(part / whole) if whole > 0 else 0.0
