"""The layers of a model that can be merged in closed form: linear layers, and slices of fused experts."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The weight of a linear layer y = W x. Conv1D (GPT-2) stores it as (inputs, outputs), Linear the other way.

    Experts are often fused into one parameter (experts, ., .); then each slice is a layer, named `parameter[expert]`.
    `features`, of a layer that is merged in blocks of its inputs: the first one of this block, and the first one after
    it; d_in is the block's, the name is `weight[0:1024]`.
    `bias`: the bias that is solved with the weight, as the weight of a constant input; otherwise it is averaged.
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
        """The name of the layer that this is a block of; its own where it is none."""
        return self.weight if self.features is None else self.weight.rpartition("[")[0]

    @property
    def index(self) -> tuple[int | slice, ...]:
        """Where in its parameter the weight stands."""
        expert = () if self.expert is None else (self.expert,)
        if self.features is None:
            return expert
        inputs = slice(*self.features)
        return (*expert, inputs) if self.stored_input_first else (*expert, slice(None), inputs)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The parameter that holds the weight, and the bias if it is solved with it."""
        return (parameter_of(self.weight), *([] if self.bias is None else [self.bias]))

    def take(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """This layer's part of `tensors`, which has whole parameters by name: (gram_size, d_out), a bias last."""
        weight = self.to_input_first(tensors[parameter_of(self.weight)][self.index])
        return weight if self.bias is None else torch.cat([weight, tensors[self.bias][None]])

    def give(self, solution: Tensor) -> dict[str, Tensor]:
        """(gram_size, d_out) -> the weight and the bias, if there is one, as they are stored."""
        parts = {self.weight: self.from_input_first(solution[: self.d_in]).contiguous()}
        return parts if self.bias is None else parts | {self.bias: solution[self.d_in]}

    def to_input_first(self, tensor: Tensor) -> Tensor:
        """(stored) -> (d_in, d_out): the orientation of `delta^T` in the papers."""
        return tensor if self.stored_input_first else tensor.T

    def from_input_first(self, tensor: Tensor) -> Tensor:
        """(d_in, d_out) -> (stored)."""
        return tensor if self.stored_input_first else tensor.T


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer of the model whose weight is its own, by module name; a tied head's is an embedding's."""
    uses = _uses(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and uses[id(module.weight)] == 1
    }


def layer_biases(model: nn.Module) -> dict[str, str]:
    """The biases of linear layers that are the layer's own, by the name of its weight."""
    uses = _uses(model)
    return {
        f"{name}.weight": f"{name}.bias"
        for name, module in linear_layers(model).items()
        if module.bias is not None and uses[id(module.bias)] == 1
    }


def _uses(model: nn.Module) -> Counter[int]:
    """In how many modules each parameter stands, by its identity."""
    return Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that keep all experts' weights in two parameters of three dimensions, by module name.

    Only those that say how: `transformers.integrations.use_experts_implementation` notes orientation, bias and gate on
    the module, and its own batched kernels rest on these notes. Other layouts are averaged.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if all(hasattr(module, note) for note in ("is_transposed", "has_bias", "has_gate", "_apply_gate"))
    }


def expert_parameters(experts: nn.Module) -> tuple[str, str]:
    """The names of the parameters of the experts' first and second layer."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def merge_layers(model: nn.Module) -> dict[str, Layer]:
    """All that could be merged in closed form, by name: linear layers, and the slices of fused experts."""
    layers = {
        f"{name}.weight": _layer(f"{name}.weight", module.weight, input_first=isinstance(module, Conv1D))
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
    """The parameter that holds a layer's weight: of a slice, the whole one."""
    return weight.partition("[")[0]


def join_slices(
    tensors: Mapping[str, Tensor], layers: Iterable[Layer], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Tensors by the name of their layer -> by the name of their parameter: experts and blocks are put together."""
    index_of = {layer.weight: layer.index for layer in layers}
    joined: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parameter = parameter_of(name)
        if name == parameter:
            joined[name] = tensor
        else:
            joined.setdefault(parameter, tensor.new_zeros(shapes[parameter]))[index_of[name]] = tensor
    return joined


def block_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the model's transformer blocks: the children, all of one class, of its largest list of modules."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1
    ]
    if not lists:
        return ()
    largest, blocks = max(lists, key=lambda each: sum(parameter.numel() for parameter in each[1].parameters()))
    return tuple(f"{largest}.{index}" for index in range(len(blocks)))
