"""Gram matrices of the inputs of linear layers, measured in forward passes. The only hooks on layers of the project.

G = sum over rows of x x^T, where a row is one token of one example; padding is no row. Where biases are solved too, x
ends with a constant 1: the last row and column are the sum of the rows, and their number. Layers that are fed the same
tensor share one Gram, and which those are is seen at run time by the tensor's identity, never guessed from names. A
layer that is called several times in a forward pass (ALBERT) has the rows of all its calls.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from client.measurement.symmetric_product import add_upper, mirror_upper
from common.errors import ModelError
from common.merge_methods.terms import Gram
from common.models.layers import expert_parameters, fused_experts, linear_layers, merge_layers, parameter_of
from common.models.plan import MergePlan, SharedInput

Batch = dict[str, Tensor]


class FarEnough(Exception):  # noqa: N818 - not an error: the way out of a forward pass
    """What was wanted of this forward pass is there."""


@dataclass(frozen=True, kw_only=True)
class LayerInput:
    """What one call of a linear layer was fed: (..., d_in). `routed`, of an expert: which tokens these are, (tokens,)
    bool over the tokens of the whole batch, padding among them."""

    rows: Tensor
    routed: Tensor | None = None


Observe = Callable[[str, LayerInput], None]


@contextmanager
def layer_inputs(model: nn.Module, observe: Observe, weights: Collection[str]) -> Iterator[None]:
    """While open, call `observe(weight, input)` at each forward of each layer, by the name of its weight."""
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, weight=f"{name}.weight": observe(weight, LayerInput(rows=args[0]))
        )
        for name, module in linear_layers(model).items()
        if f"{name}.weight" in weights
    ]
    parameters = {parameter_of(weight) for weight in weights}
    handles += [
        module.register_forward_pre_hook(
            lambda module, args, name=name: _observe_experts(name, module, args[0], args[1], observe)
        )
        for name, module in fused_experts(model).items()
        if any(f"{name}.{parameter}" in parameters for parameter in expert_parameters(module))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _observe_experts(name: str, experts: nn.Module, hidden: Tensor, chosen: Tensor, observe: Observe) -> None:
    """What each expert's two layers are fed. Computed here, since a fused forward pass shows none of it.

    `hidden` (tokens, d), `chosen` (tokens, k): the k experts of each token. All experts are observed, also idle ones.
    """
    first, second = expert_parameters(experts)
    hidden, chosen = hidden.reshape(-1, hidden.shape[-1]), chosen.reshape(-1, chosen.shape[-1])
    for expert, weight in enumerate(getattr(experts, first)):
        routed = (chosen == expert).any(dim=-1)
        rows = hidden[routed]
        observe(f"{name}.{first}[{expert}]", LayerInput(rows=rows, routed=routed))
        outputs = rows @ (weight if experts.is_transposed else weight.T)
        if experts.has_bias:
            outputs = outputs + getattr(experts, f"{first}_bias")[expert]
        rows = experts._apply_gate(outputs) if experts.has_gate else experts.act_fn(outputs)  # type: ignore[operator]
        observe(f"{name}.{second}[{expert}]", LayerInput(rows=rows, routed=routed))


def find_shared_inputs(model: PreTrainedModel, batch: Batch) -> tuple[tuple[str, ...], ...]:
    """Groups of layers, by weight name, that were fed the very same tensors; in order of first use.

    A layer that the batch never reaches is in no group.
    """
    seen: dict[str, list[Tensor]] = {}  # holds the tensors, so that no identity is given twice

    def observe(weight: str, fed: LayerInput) -> None:
        seen.setdefault(weight, []).append(fed.rows)

    with layer_inputs(model, observe, merge_layers(model)), torch.inference_mode():
        model(**batch)
    groups: dict[tuple[int, ...], list[str]] = {}
    for weight, tensors in seen.items():
        groups.setdefault(tuple(id(tensor) for tensor in tensors), []).append(weight)
    return tuple(tuple(group) for group in groups.values())


@torch.inference_mode()
def measure_grams(model: PreTrainedModel, plan: MergePlan, batches: Iterable[Batch]) -> dict[str, Gram]:
    """The Gram and row count of every distinct input of the plan, summed over `batches`.

    Each batch's product is float32, the sums are float64. No head over a whole vocabulary is computed in vain. Raises
    ModelError if layers that the plan says share an input are fed different tensors, or if a batch's padding cannot be
    told from its shapes (`BatchTokens`).
    """
    with collecting(model, plan) as collector:
        for batch in batches:
            collector.start_batch(batch)
            with suppress(FarEnough):
                model(**batch)
    return collector.grams()


@contextmanager
def collecting(model: nn.Module, plan: MergePlan) -> Iterator["GramCollector"]:
    """While open, forward passes add to the Grams of the plan's inputs. They end, by FarEnough, before a head that
    nothing is measured in.
    """
    collector = GramCollector(plan)
    weights = {layer.whole for layer in plan.layers()}
    with layer_inputs(model, collector.observe, weights), _ending_before_head(model, collector, weights):
        yield collector


@contextmanager
def _ending_before_head(model: nn.Module, collector: "GramCollector", weights: Collection[str]) -> Iterator[None]:
    """While open, a forward pass ends where a language model's head is called, unless that is measured itself.

    No earlier: a layer that is fed again and again (ALBERT), or in pieces where a batch is long, does not say which
    call is its last.
    """

    def leave(*_: object) -> None:
        if collector.has_fed_all:
            raise FarEnough

    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    measured = [module for name, module in linear_layers(model).items() if f"{name}.weight" in weights]
    if head is None or any(head is module for module in measured):
        yield
        return
    handle = head.register_forward_pre_hook(leave)
    try:
        yield
    finally:
        handle.remove()


class BatchTokens:
    """Which rows of a layer's input are tokens of the batch's examples, told by shape alone.

    Invariant: a sequence-to-sequence batch is padded so that encoder and decoder differ in length; with equal lengths
    it could not be told whose mask a layer's rows need. The constructor raises ModelError.
    """

    def __init__(self, batch: Mapping[str, Tensor]) -> None:
        self.examples = len(next(iter(batch.values())))
        names = [name for name in ("attention_mask", "decoder_attention_mask") if name in batch]
        self._masks = [batch[name].bool() for name in names]
        if len({mask.shape for mask in self._masks}) < len(self._masks):
            raise ModelError(
                f"a batch has inputs and targets of one padded length, {self._masks[0].shape[1]}, so that their "
                "padding cannot be told apart; pad the targets by one more"
            )

    def rows(self, fed: LayerInput) -> Tensor:
        """(rows, d_in), padding left out."""
        rows = fed.rows.reshape(-1, fed.rows.shape[-1])
        shape = fed.rows.shape[:-1] if fed.routed is None else fed.routed.shape
        for mask in self._masks:
            if shape in (mask.shape, (mask.numel(),)):
                kept = mask.reshape(-1)
                return rows[kept if fed.routed is None else kept[fed.routed]]
        return rows

    def times(self, fed: LayerInput) -> int:
        """How often rows count that stand once for all examples (DeBERTa's relative embeddings): once per example."""
        alone = fed.routed is None and fed.rows.ndim == 3 and len(fed.rows) == 1
        return self.examples if alone else 1


def with_constant(rows: Tensor) -> Tensor:
    """(rows, d) -> (rows, d + 1): a constant 1 after the features, whose weight is a bias."""
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)


class GramCollector:
    """Adds up Grams as the layers are called."""

    def __init__(self, plan: MergePlan) -> None:
        self.matrices = {
            shared.name: torch.zeros(shared.gram_size, shared.gram_size, dtype=torch.float64) for shared in plan.inputs
        }
        self.rows = dict.fromkeys(self.matrices, 0)
        self._fed_by: dict[str, list[SharedInput]] = {}  # a whole layer's blocks
        for shared in plan.inputs:
            for layer in shared.layers:
                self._fed_by.setdefault(layer.whole, []).append(shared)
        self._tokens: BatchTokens
        self._calls: dict[str, int] = {}
        self._led: dict[str, list[ReferenceType[Any]]] = {}

    def grams(self) -> dict[str, Gram]:
        for matrix in self.matrices.values():
            mirror_upper(matrix)
        return {name: Gram(matrix=matrix, rows=self.rows[name]) for name, matrix in self.matrices.items()}

    def start_batch(self, batch: Batch) -> None:
        self._tokens = BatchTokens(batch)
        self._calls = dict.fromkeys(self._fed_by, 0)
        self._led = {name: [] for name in self.matrices}

    @property
    def has_fed_all(self) -> bool:
        """Whether every layer has been fed something of this batch."""
        return all(self._calls.values())

    def observe(self, weight: str, fed: LayerInput) -> None:
        if weight not in self._fed_by:
            return  # an expert's other layer, which is not merged
        call = self._calls[weight]
        self._calls[weight] += 1
        for shared in self._fed_by[weight]:
            if weight == shared.layers[0].whole:
                self._led[shared.name].append(ref(fed.rows))
                self._add(shared, fed)
            elif call >= len(self._led[shared.name]) or self._led[shared.name][call]() is not fed.rows:
                raise ModelError(
                    f"layer {weight.removesuffix('.weight')} was fed another input than {shared.name}, but the "
                    "agreement has them share a Gram"
                )

    def _add(self, shared: SharedInput, fed: LayerInput) -> None:
        rows = self._tokens.rows(replace(fed, rows=fed.rows[..., shared.features])).float()
        if shared.has_constant:
            rows = with_constant(rows)  # (rows, gram_size)
        times = self._tokens.times(fed)
        add_upper(self.matrices[shared.name], rows, times)
        self.rows[shared.name] += times * len(rows)
