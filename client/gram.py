"""Gram matrices of the inputs of linear layers, measured in forward passes. The only forward hooks of the project.

G = sum over rows of x x^T, where a row is one token of one example; padding is no row. Layers that are fed the same
tensor share one Gram, and which those are is seen at run time by the tensor's identity, never guessed from names.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.errors import ModelError
from common.merge_methods.terms import Gram
from common.models import MergePlan, linear_layers

Batch = dict[str, Tensor]


@contextmanager
def layer_inputs(modules: dict[str, nn.Module], observe: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While open, call `observe(name, input)` before each forward of each module."""
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: observe(name, args[0]))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def find_shared_inputs(model: PreTrainedModel, batch: Batch) -> tuple[tuple[str, ...], ...]:
    """Groups of linear layers, by weight name, that were fed the very same tensors; in order of first use.

    A layer that the batch never reaches is in no group.
    """
    modules = linear_layers(model)
    seen: dict[str, list[Tensor]] = {}  # holds the tensors, so that no identity is given twice
    with layer_inputs(modules, lambda name, tensor: seen.setdefault(name, []).append(tensor)), torch.inference_mode():
        model(**batch)
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, tensors in seen.items():
        groups.setdefault(tuple(id(tensor) for tensor in tensors), []).append(f"{name}.weight")
    return tuple(tuple(group) for group in groups.values())


@torch.inference_mode()
def measure_grams(model: PreTrainedModel, plan: MergePlan, batches: Iterable[Batch]) -> dict[str, Gram]:
    """The Gram and row count of every distinct input of the plan, summed over `batches`.

    Each batch's product is float32, the sums are float64. Raises ModelError if layers that the plan says share an
    input are fed different tensors.
    """
    collector = _Collector(plan)
    modules = linear_layers(model)
    wanted = {layer.weight.removesuffix(".weight") for layer in plan.layers()}
    with layer_inputs({name: modules[name] for name in modules if name in wanted}, collector.observe):
        for batch in batches:
            collector.start_batch(batch.get("attention_mask"))
            model(**batch)
    return {name: Gram(matrix=collector.matrices[name], rows=collector.rows[name]) for name in collector.matrices}


class _Collector:
    """Adds up Grams as the layers are called."""

    def __init__(self, plan: MergePlan) -> None:
        self.matrices = {
            shared.name: torch.zeros(shared.d_in, shared.d_in, dtype=torch.float64) for shared in plan.inputs
        }
        self.rows = dict.fromkeys(self.matrices, 0)
        self._leader = {
            layer.weight.removesuffix(".weight"): shared.name for shared in plan.inputs for layer in shared.layers
        }
        self._mask: Tensor | None = None
        self._calls: dict[str, int] = {}
        self._led: dict[str, list[ReferenceType[Any]]] = {}

    def start_batch(self, mask: Tensor | None) -> None:
        self._mask = None if mask is None else mask.bool()
        self._calls = dict.fromkeys(self._leader, 0)
        self._led = {name: [] for name in self.matrices}

    def observe(self, name: str, tensor: Tensor) -> None:
        leader = self._leader[name]
        call = self._calls[name]
        self._calls[name] += 1
        if name == leader:
            self._led[leader].append(ref(tensor))
            self._add(leader, tensor)
        elif call >= len(self._led[leader]) or self._led[leader][call]() is not tensor:
            raise ModelError(
                f"layer {name} was fed another input than {leader}, but the agreement has them share a Gram"
            )

    def _add(self, leader: str, tensor: Tensor) -> None:
        if self._mask is not None and tensor.ndim == 3 and tensor.shape[:2] == self._mask.shape:
            rows = tensor[self._mask]  # (tokens, d_in), padding left out
        else:
            rows = tensor.reshape(-1, tensor.shape[-1])  # (rows, d_in)
        rows = rows.float()
        self.matrices[leader] += rows.T @ rows
        self.rows[leader] += len(rows)
