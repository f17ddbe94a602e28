"""Cut a merged delta to what a LoRA adapter can hold: low rank in linear layers, the head whole, nothing else.

    delta  ~  B A,    B (d_out, rank), A (rank, d_in)

is the truncated singular value decomposition, the closest matrix of that rank (Eckart and Young, 1936). The columns of
its left factor are the first eigenvectors of delta delta^T. So only one symmetric matrix, as large as the smaller side,
is decomposed.

Eigenvectors depend on the machine, and are free where eigenvalues are equal. So the coordinator cuts, and sends the
factors with the whole delta; every owner checks that no matrix of that rank is closer (`check_cut`). With S the delta,
or its transpose if that has fewer rows, of shape (d, D), and U (d, r) the factor on its side as it was sent, an owner
accepts only

    |U^T U - I| <= 2^-22                                                    U is orthonormal except for float32
    |V - U^T S| <= 2^-23 |U^T S| + d 2^-50 |U|^T |S| + 2^-149               V, the other factor, follows from U
    sum of the r largest eigenvalues of S S^T - tr(P S S^T) <= r (2^-47 + 4 (D + 2 d) u) tr(S S^T)

where P projects on U. The last one says that the squared error of the cut is the least there is. Rounding U to float32
turns it by at most 2^-24 sqrt(r), which costs the square of that. With u = 2^-53, each party's products and
eigenvalues are off by at most (D + 2 d) u times the trace. What passes in place of the cut is turned by about 10^-6
over the root of the relative gap between the eigenvalues that are kept and the others. Without a gap, both are closest.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import inf, sqrt
from typing import TYPE_CHECKING

from common.errors import RemoteProtocolError
from common.lazy import lazy_module
from common.models.layers import linear_layers, stores_input_first
from common.models.parameters import body_parameters, parameter_shapes
from common.tensor_layout import TensorEntry

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel
else:
    torch = lazy_module("torch")

UNIT = 2.0**-53  # the relative rounding of float64
SUBNORMAL = 2.0**-149  # the smallest positive float32
BLOCK = 64  # rows that are multiplied at once, so that they stay in the processor's cache


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

    def factor_entries(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[TensorEntry]:
        """How the factors travel. `shapes`: those of the parameters, as they are stored."""
        for name, input_first in self.layers.items():
            d_out, d_in = reversed(shapes[name]) if input_first else shapes[name]
            yield TensorEntry(name=f"adapter_up/{name}", shape=(d_out, self.rank), bound=inf)
            yield TensorEntry(name=f"adapter_down/{name}", shape=(self.rank, d_in), bound=inf)


@dataclass(frozen=True, kw_only=True)
class Factors:
    """`up` (d_out, rank) with orthonormal columns and `down` (rank, d_in), float32: the B and A of LoRA at scale 1."""

    up: Tensor
    down: Tensor


class AdapterDelta(Mapping[str, "Tensor"]):
    """A delta as an adapter holds it, float32 by parameter name. Each tensor is computed when it is asked for.

    `delta` is the whole one. What the adapter does not hold is zeros. The product of the factors is rounded once.
    """

    def __init__(self, delta: Mapping[str, Tensor], plan: AdapterPlan, factors: Mapping[str, Factors]) -> None:
        self.plan, self.factors = plan, factors
        self._delta = delta

    def __getitem__(self, name: str) -> Tensor:
        if name in self.plan.layers:
            product = multiply(self.factors[name])
            return product.T.contiguous() if self.plan.layers[name] else product
        return self._delta[name] if name in self.plan.whole else torch.zeros_like(self._delta[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._delta)

    def __len__(self) -> int:
        return len(self._delta)


@dataclass(frozen=True, kw_only=True)
class LayerCut:
    """`relative_error` = |delta - B A| / |delta| in Frobenius norms, 0 for a layer that did not change."""

    name: str
    relative_error: float


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """A delta as an adapter of `plan` holds it, and how much of it the cut lost.

    `relative_error` covers all cut layers together. `dropped` is the norm of what the adapter does not hold, relative
    to the norm of the whole delta.
    """

    plan: AdapterPlan
    factors: Mapping[str, Factors]
    layers: tuple[LayerCut, ...]
    relative_error: float
    dropped: float

    def tensors(self) -> dict[str, Tensor]:
        """The factors by the names of `AdapterPlan.factor_entries`."""
        ups = {f"adapter_up/{name}": each.up for name, each in self.factors.items()}
        return ups | {f"adapter_down/{name}": each.down for name, each in self.factors.items()}


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


def cut(delta: Mapping[str, Tensor], plan: AdapterPlan, device: str = "cpu") -> LowRank:
    """The closest delta that an adapter of this plan can hold, and what it lost. See AdapterDelta."""
    factors: dict[str, Factors] = {}
    layers: list[LayerCut] = []
    lost = of_layers = dropped = everything = 0.0  # squared norms
    for name, tensor in delta.items():
        square = float(tensor.double().square().sum())
        everything += square
        if name in plan.layers:
            matrix = _output_first(tensor, plan, name)
            factors[name] = factorise(matrix, plan.rank, device)
            error = float((matrix.double() - multiply(factors[name]).double()).square().sum())
            layers.append(LayerCut(name=name, relative_error=_root_of_ratio(error, square)))
            lost, of_layers = lost + error, of_layers + square
        elif name not in plan.whole:
            dropped += square
    return LowRank(
        plan=plan,
        factors=factors,
        layers=tuple(layers),
        relative_error=_root_of_ratio(lost, of_layers),
        dropped=_root_of_ratio(dropped, everything),
    )


def check_cut(delta: Mapping[str, Tensor], plan: AdapterPlan, factors: Mapping[str, Factors]) -> None:
    """Raise RemoteProtocolError unless every layer's factors are the closest to `delta` that there are."""
    for name in plan.layers:
        if not is_closest(_output_first(delta[name], plan, name), factors[name]):  # check: cuts-are-the-closest
            raise RemoteProtocolError(f"the coordinator sent factors of {name} that are not the closest of their rank")


def factorise(delta: Tensor, rank: int, device: str = "cpu") -> Factors:
    """(d_out, d_in) -> the factors of the truncated singular value decomposition, padded with zeros up to `rank`."""
    matrix = delta.double()
    wide = matrix.shape[0] <= matrix.shape[1]
    short = (matrix if wide else matrix.T).to(device)  # (d, D), d <= D
    count = min(rank, len(short))
    leading = torch.linalg.eigh(short @ short.T).eigenvectors[:, -count:].flip(1)  # (d, count), largest first
    other = (leading.float().double().T @ short).float().cpu()  # (count, D)
    directions = leading.float().cpu()
    up, down = (directions, other) if wide else (other.T, directions.T)
    padding = rank - count
    return Factors(
        up=torch.nn.functional.pad(up, (0, padding)).contiguous(),
        down=torch.nn.functional.pad(down, (0, 0, 0, padding)).contiguous(),
    )


def is_closest(delta: Tensor, factors: Factors) -> bool:
    """Whether factors are those of the closest matrix of their rank to (d_out, d_in) float32, except for rounding: the
    three conditions at the top of this file.
    """
    matrix, up, down = delta.double(), factors.up.double(), factors.down.double()
    wide = matrix.shape[0] <= matrix.shape[1]
    short = matrix if wide else matrix.T  # (d, D), d <= D
    directions, other = (up, down) if wide else (down.T, up.T)
    rows, columns = short.shape
    count = min(directions.shape[1], rows)
    if directions[:, count:].any() or other[count:].any():  # check: padding-of-factors-is-zero
        return False
    directions, other = directions[:, :count], other[:count]
    identity = torch.eye(count, dtype=torch.float64)
    if not ((directions.T @ directions - identity).abs() <= 2.0**-22).all():  # check: factors-are-orthonormal
        return False
    expected, size = directions.T @ short, directions.abs().T @ short.abs()  # (count, D)
    bound = 2.0**-23 * expected.abs() + rows * 2.0**-50 * size + SUBNORMAL
    if not ((other - expected).abs() <= bound).all():  # check: factors-fit-each-other
        return False
    gram = short @ short.T  # (d, d)
    most, (basis, _) = torch.linalg.eigvalsh(gram)[-count:].sum(), torch.linalg.qr(directions)
    lost = float(most - (basis * (gram @ basis)).sum())
    tolerance = count * (2.0**-47 + 4 * (columns + 2 * rows) * UNIT) * float(gram.trace())
    return lost <= tolerance  # check: no-cut-is-closer


def multiply(factors: Factors) -> Tensor:
    """(d_out, d_in) float32: the product of the float32 factors, rounded once, the same bits on every machine.

    The product of two float32 numbers is exact in float64, and these are added up in the order of the columns.
    """
    up, down = factors.up.double(), factors.down.double()
    rounded = torch.empty(len(up), down.shape[1])
    for start in range(0, len(up), BLOCK):
        rows = up[start : start + BLOCK]
        summed = torch.zeros(len(rows), down.shape[1], dtype=torch.float64)
        for column, row in zip(rows.T, down, strict=True):
            summed.addr_(column, row)
        rounded[start : start + BLOCK] = summed
    return rounded


def _output_first(tensor: Tensor, plan: AdapterPlan, name: str) -> Tensor:
    """A layer's weight as (d_out, d_in)."""
    return tensor.T if plan.layers[name] else tensor


def _module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _root_of_ratio(part: float, whole: float) -> float:
    return sqrt(part / whole) if whole > 0 else 0.0
