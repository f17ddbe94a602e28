"""The merge plan: what happens to each parameter of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from common.errors import ModelError
from common.models.layers import Layer, block_names, layer_biases, merge_layers, parameter_of
from common.models.parameters import parameter_shapes
from common.settings_file import Line, Settings

if TYPE_CHECKING:
    from torch import nn

    from common.models.low_rank import AdapterPlan

SHOWN = 4  # names in a line for people
ANOTHER_BASE = "the agreement was completed for another base model; complete the draft again: amalgram draft"


class PlannedTensors(Settings):
    """The merge plan by parameter name, as the agreement holds it. Together its lists name each parameter once."""

    # Weights of linear layers that are merged in closed form. Those in one group multiply the same input tensor.
    # If one parameter holds the weights of several experts, each slice has its own name: `name[0]`, `name[1]`, ...
    # A bias in a group is solved with its layer's weight. Then every layer of the group has a bias in the group.
    merged: tuple[tuple[Line, ...], ...]
    # Layers with more inputs than this are merged in blocks of their inputs, with one Gram per block.
    largest_gram: Annotated[int, Field(ge=1)] | None = None
    # Weights of linear layers that RegMean merges from their changes alone.
    data_free: tuple[Line, ...] = ()
    averaged: tuple[Line, ...]
    left_alone: tuple[Line, ...]

    @property
    def data_free_in_short(self) -> str:
        """The first of those layers by name, and how many more there are."""
        shown = ", ".join(name.removesuffix(".weight") for name in self.data_free[:SHOWN])
        return shown if len(self.data_free) <= SHOWN else f"{shown} and {len(self.data_free) - SHOWN} more"


@dataclass(frozen=True, kw_only=True)
class SharedInput:
    """One distinct input tensor, or a block of its features, and the layers it feeds. It has one Gram matrix.

    `name` is that of the first layer.
    """

    name: str
    d_in: int
    layers: tuple[Layer, ...]

    @property
    def has_constant(self) -> bool:
        """Whether a constant 1 follows the d_in features. Its weights are the layers' biases."""
        return self.layers[0].bias is not None

    @property
    def gram_size(self) -> int:
        """The Gram's number of rows and columns: the features, and the constant if there is one."""
        return self.d_in + self.has_constant

    @property
    def features(self) -> slice:
        """The part of the layers' inputs that the Gram covers."""
        features = self.layers[0].features
        return slice(None) if features is None else slice(*features)

    @property
    def is_routed(self) -> bool:
        """Whether only tokens that a router chose get here. Their number depends on the data and may be zero."""
        return any(layer.expert is not None for layer in self.layers)


@dataclass(frozen=True, kw_only=True, eq=False)  # so that what is derived from a plan can be kept
class MergePlan:
    """What happens to each parameter of the base model, with shapes.

    `data_free`: the layers that RegMean merges from their changes alone. `linear_layers`: all that a merge may change.
    `adapter`: what the published adapter can hold, None if the whole model is published.
    """

    inputs: tuple[SharedInput, ...]
    data_free: tuple[Layer, ...]
    linear_layers: tuple[Layer, ...]
    averaged: tuple[str, ...]
    left_alone: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    blocks: tuple[str, ...] = ()  # the names of the transformer blocks, in order
    adapter: AdapterPlan | None = None

    @property
    def changed(self) -> tuple[str, ...]:
        """Every parameter that a merge may change, in the model's own order."""
        fixed = set(self.left_alone)
        return tuple(name for name in self.shapes if name not in fixed)

    def layers(self) -> Iterator[Layer]:
        for shared_input in self.inputs:
            yield from shared_input.layers

    def dimensions(self) -> dict[str, int]:
        """The number of rows and columns of each Gram, by name.

        The blocks of one layer count together, because their Grams cover the same token rows.
        """
        of_layer: Counter[str] = Counter()
        for shared_input in self.inputs:
            of_layer[shared_input.layers[0].whole] += shared_input.gram_size  # check: blocks-count-together
        return {each.name: of_layer[each.layers[0].whole] for each in self.inputs}


def merge_plan(model: nn.Module, tensors: PlannedTensors) -> MergePlan:
    """The agreement's plan with this model's shapes.

    Raises ModelError unless the agreement names exactly the model's parameters.
    """
    shapes = parameter_shapes(model)
    layers = merge_layers(model)
    merged = [*(name for group in tensors.merged for name in group), *tensors.data_free]
    named = [*merged, *tensors.averaged, *tensors.left_alone]
    for name in sorted(set(named) ^ _names_as_in(named, shapes, layers)):
        missing_from = "the base model" if name in named else "the agreement's tensors"
        raise ModelError(f"parameter {name} is missing from {missing_from}", hint=ANOTHER_BASE)
    for name in tensors.data_free:
        if name not in layers:
            raise _not_a_weight(name)
    biases = layer_biases(model)
    return MergePlan(
        inputs=tuple(
            block
            for group in tensors.merged
            for block in _in_blocks(_shared_input(group, layers, biases), tensors.largest_gram)
        ),
        data_free=tuple(layers[name] for name in tensors.data_free),
        linear_layers=tuple(layer for name, layer in layers.items() if parameter_of(name) not in tensors.left_alone),
        averaged=tensors.averaged,
        left_alone=tensors.left_alone,
        shapes=shapes,
        blocks=block_names(model),
    )


def _not_a_weight(name: str) -> ModelError:
    return ModelError(f"parameter {name} is to be merged, but it is not a linear layer's weight", hint=ANOTHER_BASE)


def _names_as_in(named: list[str], shapes: Mapping[str, Any], layers: Mapping[str, Layer]) -> set[str]:
    """The model's parameters. A parameter is replaced by all of its slices if `named` has one of them."""
    sliced = {parameter_of(name) for name in named} - set(named)
    slices = {name for name in layers if parameter_of(name) in sliced}
    return (set(shapes) - sliced) | slices


def _shared_input(group: tuple[str, ...], layers: Mapping[str, Layer], biases: Mapping[str, str]) -> SharedInput:
    weights = [name for name in group if name in layers]
    others = [name for name in group if name not in layers]
    own_biases = [biases.get(weight) for weight in weights]
    for name in others:
        if name not in own_biases:
            raise _not_a_weight(name)
    if others not in ([], own_biases):
        raise ModelError(
            f"parameters {', '.join(group)} cannot share an input: either all layers have a bias or none",
            hint=ANOTHER_BASE,
        )
    fed = tuple(replace(layers[weight], bias=biases[weight] if others else None) for weight in weights)
    if len({layer.d_in for layer in fed}) != 1:
        raise ModelError(
            f"parameters {', '.join(group)} cannot share an input: their input sizes differ", hint=ANOTHER_BASE
        )
    return SharedInput(name=group[0].removesuffix(".weight"), d_in=fed[0].d_in, layers=fed)


def _in_blocks(shared: SharedInput, largest: int | None) -> Iterator[SharedInput]:
    """The input, or blocks of its features if it has more than `largest`. Block sizes differ by at most one."""
    if largest is None or shared.d_in <= largest:
        yield shared
        return
    if shared.has_constant:
        raise ModelError(
            f"{shared.name}: is merged in blocks of its inputs, so its bias cannot be merged with it",
            hint="take the bias out of the group in tensors.merged, or complete the draft again: amalgram draft",
        )
    count = -(-shared.d_in // largest)
    for start, stop in pairwise(number * shared.d_in // count for number in range(count + 1)):
        d_in, features, name = stop - start, (start, stop), f"[{start}:{stop}]"
        layers = tuple(
            replace(layer, weight=layer.weight + name, d_in=d_in, features=features) for layer in shared.layers
        )
        yield SharedInput(name=shared.name + name, d_in=d_in, layers=layers)
