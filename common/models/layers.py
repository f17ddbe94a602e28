"""The layers of a model that can be merged in closed form: linear layers, and slices of fused experts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from common.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import pytorch_utils
else:
    torch = lazy_module("torch")
    pytorch_utils = lazy_module("transformers.pytorch_utils")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The weight of a linear layer y = W x, and where it is stored.

    `stored_input_first`: Conv1D (GPT-2) stores its weight as (inputs, outputs), Linear as (outputs, inputs).
    `expert`: experts are often fused into one parameter (experts, ., .). Then each slice is a layer of its own, named
    `parameter[expert]`.
    `features`: if the layer is merged in blocks of its inputs, the first input of this block and the first one after
    it. Then `d_in` is the block's size, and the block is named `weight[0:1024]`.
    `bias`: the bias that is solved with the weight, as the weight of a constant input. None if it is averaged.
    """

    weight: str
    d_in: int
    d_out: int
    stored_input_first: bool
    expert: int | None = None
    features: tuple[int, int] | None = None
    bias: str | None = None

    @property
    def whole(self) -> str:
        """The name of the layer that this is a block of, or its own name."""
        return self.weight if self.features is None else self.weight.rpartition("[")[0]

    @property
    def index(self) -> tuple[int | slice, ...]:
        """The position of the weight in its parameter."""
        expert = () if self.expert is None else (self.expert,)
        if self.features is None:
            return expert
        inputs = slice(*self.features)
        return (*expert, inputs) if self.stored_input_first else (*expert, slice(None), inputs)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The parameter that holds the weight, then the bias if it is solved with the weight."""
        return (parameter_of(self.weight), *([] if self.bias is None else [self.bias]))

    def take(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """This layer's part of `tensors` (whole parameters by name): (gram_size, d_out), the bias last."""
        weight = self.to_input_first(tensors[parameter_of(self.weight)][self.index])
        return weight if self.bias is None else torch.cat([weight, tensors[self.bias][None]])

    def give(self, merged: Tensor) -> dict[str, Tensor]:
        """The layer's merged delta (gram_size, d_out) -> its weight, and its bias if there is one, as stored."""
        parts = {self.weight: self.from_input_first(merged[: self.d_in]).contiguous()}
        return parts if self.bias is None else parts | {self.bias: merged[self.d_in]}

    def to_input_first(self, tensor: Tensor) -> Tensor:
        """As stored -> (d_in, d_out), the orientation of `delta^T` in the papers."""
        return tensor if self.stored_input_first else tensor.T

    def from_input_first(self, tensor: Tensor) -> Tensor:
        """(d_in, d_out) -> as stored."""
        return tensor if self.stored_input_first else tensor.T


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer that does not share its weight, by module name. A tied head shares its embedding's weight."""
    uses = _uses(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, pytorch_utils.Conv1D)) and uses[id(module.weight)] == 1
    }


def stores_input_first(module: nn.Module) -> bool:
    """Whether a linear layer's weight is stored as (inputs, outputs)."""
    return isinstance(module, pytorch_utils.Conv1D)


def layer_biases(model: nn.Module) -> dict[str, str]:
    """The biases that belong to one linear layer alone, by the name of its weight."""
    uses = _uses(model)
    return {
        f"{name}.weight": f"{name}.bias"
        for name, module in linear_layers(model).items()
        if module.bias is not None and uses[id(module.bias)] == 1
    }


def _uses(model: nn.Module) -> Counter[int]:
    """The number of modules that hold each parameter, by the parameter's identity."""
    return Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that keep all experts' weights in two parameters of three dimensions, by module name.

    Only modules that describe their layout count. `transformers.integrations.use_experts_implementation` notes
    orientation, bias and gate on the module, and its own batched kernels rely on these notes. Other layouts are
    averaged.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if all(hasattr(module, note) for note in ("is_transposed", "has_bias", "has_gate", "_apply_gate"))
    }


def expert_parameters(experts: nn.Module) -> tuple[str, str]:
    """The names of the parameters that hold the experts' first and second layers."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def merge_layers(model: nn.Module) -> dict[str, Layer]:
    """Every layer that could be merged in closed form, by name: linear layers, and the slices of fused experts."""
    layers = {
        f"{name}.weight": _layer(f"{name}.weight", module.weight, input_first=stores_input_first(module))
        for name, module in linear_layers(model).items()
    }
    for name, experts in fused_experts(model).items():
        for parameter in expert_parameters(experts):
            for expert, weight in enumerate(getattr(experts, parameter)):
                slice_name = f"{name}.{parameter}[{expert}]"
                layer = _layer(slice_name, weight, input_first=bool(experts.is_transposed))
                layers[slice_name] = replace(layer, expert=expert)
    return layers


def _layer(name: str, weight: Any, *, input_first: bool) -> Layer:
    rows, columns = weight.shape
    d_in, d_out = (rows, columns) if input_first else (columns, rows)
    return Layer(weight=name, d_in=d_in, d_out=d_out, stored_input_first=input_first)


def parameter_of(weight: str) -> str:
    """The parameter that holds a layer's weight, or the whole parameter if the weight is a slice."""
    return weight.partition("[")[0]


def join_slices(
    tensors: Mapping[str, Tensor], layers: Iterable[Layer], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Tensors by layer name -> tensors by parameter name. Joins experts, and blocks of a layer's inputs."""
    return dict(joined(tensors.items(), layers, shapes))


def joined(
    tensors: Iterable[tuple[str, Tensor]], layers: Iterable[Layer], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    """The same, where each parameter is given as soon as all of its slices are there."""
    index_of = {layer.weight: layer.index for layer in layers}
    missing = Counter(map(parameter_of, index_of))
    incomplete: dict[str, Tensor] = {}
    for name, tensor in tensors:
        parameter = parameter_of(name)
        if name == parameter:
            yield name, tensor
            continue
        if parameter not in incomplete:
            incomplete[parameter] = tensor.new_zeros(shapes[parameter])
        incomplete[parameter][index_of[name]] = tensor
        missing[parameter] -= 1
        if not missing[parameter]:
            yield parameter, incomplete.pop(parameter)
    yield from incomplete.items()  # slices that nobody solved are zero


def block_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the transformer blocks: the children of the largest module list whose children are of one class."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len({type(child) for child in module}) == 1
    ]
    if not lists:
        return ()
    largest, blocks = max(lists, key=lambda each: sum(parameter.numel() for parameter in each[1].parameters()))
    return tuple(f"{largest}.{index}" for index in range(len(blocks)))
