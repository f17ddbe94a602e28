"""The merge plan: what happens to each parameter of a model."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from common.errors import ModelError
from common.models.layers import Layer, block_names, layer_biases, merge_layers, parameter_of
from common.models.parameters import parameter_shapes
from common.settings_file import Settings


class PlannedTensors(Settings):
    """The merge plan by parameter name, as the agreement holds it; together the tables name each parameter once."""

    # Weights of linear layers that are merged in closed form; those in one group multiply the same input tensor.
    # Where one parameter holds the weights of several experts, each slice stands by itself: `name[0]`, `name[1]`, ...
    # A bias in a group is solved with its layer's weight; then every layer of the group has one.
    merged: tuple[tuple[str, ...], ...]
    # Layers with more inputs than this are merged in blocks of their inputs, a Gram each.
    largest_gram: Annotated[int, Field(ge=1)] | None = None
    # Weights of linear layers that RegMean merges by their changes alone.
    data_free: tuple[str, ...] = ()
    averaged: tuple[str, ...]
    left_alone: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SharedInput:
    """One distinct input tensor, or a block of its features, hence one Gram matrix, and the layers it feeds. Named
    after the first of them.
    """

    name: str
    d_in: int
    layers: tuple[Layer, ...]

    @property
    def has_constant(self) -> bool:
        """Whether a constant 1 stands after the d_in features, whose weights are the layers' biases."""
        return self.layers[0].bias is not None

    @property
    def gram_size(self) -> int:
        """Rows and columns of the Gram: the features, and the constant if there is one."""
        return self.d_in + self.has_constant

    @property
    def features(self) -> slice:
        """Those of the layers' inputs that the Gram is of."""
        features = self.layers[0].features
        return slice(None) if features is None else slice(*features)

    @property
    def is_routed(self) -> bool:
        """Whether only the tokens that a router chose get here: their number depends on the data and may be zero."""
        return any(layer.expert is not None for layer in self.layers)


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """What happens to each parameter, with shapes: the agreement's tensor roles on the base model.

    `data_free`: the layers that RegMean merges by their changes alone. `linear_layers`: all that a merge may change.
    """

    inputs: tuple[SharedInput, ...]
    data_free: tuple[Layer, ...]
    linear_layers: tuple[Layer, ...]
    averaged: tuple[str, ...]
    left_alone: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    blocks: tuple[str, ...] = ()  # the names of the transformer blocks, in order

    @property
    def changed(self) -> tuple[str, ...]:
        """Every parameter that a merge may change, in the model's own order."""
        fixed = set(self.left_alone)
        return tuple(name for name in self.shapes if name not in fixed)

    def layers(self) -> Iterator[Layer]:
        for shared_input in self.inputs:
            yield from shared_input.layers

    def dimensions(self) -> dict[str, int]:
        """Of each Gram by name, its rows and columns; of a block, those of all blocks of its layer, which are of the
        same rows of data.
        """
        of_layer: Counter[str] = Counter()
        for shared_input in self.inputs:
            of_layer[shared_input.layers[0].whole] += shared_input.gram_size
        return {each.name: of_layer[each.layers[0].whole] for each in self.inputs}


def merge_plan(model: nn.Module, tensors: PlannedTensors) -> MergePlan:
    """The agreement's plan with this model's shapes. Raises ModelError unless it names exactly its parameters."""
    shapes = parameter_shapes(model)
    layers = merge_layers(model)
    merged = [*(name for group in tensors.merged for name in group), *tensors.data_free]
    named = [*merged, *tensors.averaged, *tensors.left_alone]
    for name in sorted(set(named) ^ _names_as_in(named, shapes, layers)):
        missing_in = "the base model" if name in named else "the agreement's tensors"
        raise ModelError(f"parameter {name} is missing in {missing_in}")
    for name in tensors.data_free:
        if name not in layers:
            raise ModelError(f"parameter {name} is to be merged, but it is no linear layer's weight")
    return MergePlan(
        inputs=tuple(
            block
            for group in tensors.merged
            for block in _in_blocks(_shared_input(group, layers, layer_biases(model)), tensors.largest_gram)
        ),
        data_free=tuple(layers[name] for name in tensors.data_free),
        linear_layers=tuple(layer for name, layer in layers.items() if parameter_of(name) not in tensors.left_alone),
        averaged=tensors.averaged,
        left_alone=tensors.left_alone,
        shapes=shapes,
        blocks=block_names(model),
    )


def _names_as_in(named: list[str], shapes: Mapping[str, Any], layers: Mapping[str, Layer]) -> set[str]:
    """The model's parameters; one of which `named` has a slice, as all of its slices."""
    sliced = {parameter_of(name) for name in named} - set(named)
    slices = {name for name in layers if parameter_of(name) in sliced}
    return (set(shapes) - sliced) | slices


def _shared_input(group: tuple[str, ...], layers: Mapping[str, Layer], biases: Mapping[str, str]) -> SharedInput:
    weights = [name for name in group if name in layers]
    others = [name for name in group if name not in layers]
    own_biases = [biases.get(weight) for weight in weights]
    for name in others:
        if name not in own_biases:
            raise ModelError(f"parameter {name} is to be merged, but it is no linear layer's weight")
    if others not in ([], own_biases):
        raise ModelError(f"parameters {', '.join(group)} cannot share an input: either all layers have a bias or none")
    fed = tuple(replace(layers[weight], bias=biases[weight] if others else None) for weight in weights)
    if len({layer.d_in for layer in fed}) != 1:
        raise ModelError(f"parameters {', '.join(group)} cannot share an input: their input sizes differ")
    return SharedInput(name=group[0].removesuffix(".weight"), d_in=fed[0].d_in, layers=fed)


def _in_blocks(shared: SharedInput, largest: int | None) -> Iterator[SharedInput]:
    """The input, or where it has more than `largest` features, blocks of them that differ by one in size at most."""
    if largest is None or shared.d_in <= largest:
        yield shared
        return
    if shared.has_constant:
        raise ModelError(f"{shared.name}: is merged in blocks of its inputs, so its bias cannot be merged with it")
    count = -(-shared.d_in // largest)
    for start, stop in pairwise(number * shared.d_in // count for number in range(count + 1)):
        d_in, features, name = stop - start, (start, stop), f"[{start}:{stop}]"
        layers = tuple(
            replace(layer, weight=layer.weight + name, d_in=d_in, features=features) for layer in shared.layers
        )
        yield SharedInput(name=shared.name + name, d_in=d_in, layers=layers)
