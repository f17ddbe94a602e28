"""Gram matrices of the inputs of linear layers, measured in forward passes. Nothing else looks at layers' inputs.

G = sum over token rows of x x^T. A token row x is a layer's input at one token of one example; padding does not count.
If biases are solved too, x ends with a constant 1, so the last row and column of G hold the sum of the token rows and
their number. Layers that are fed the same tensor share one Gram. Which layers those are is seen at run time by the
tensor's identity, never guessed from names. A layer that is called several times in a forward pass (ALBERT) has the
token rows of all its calls.

Where Grams are to have noise, each example moves one by at most an agreed norm C. With X its token rows, from all calls
of a layer, what it adds is w X^T X with

    w = min(1, C / |X X^T|_F)                                            |X X^T|_F = |X^T X|_F

and nothing if X has a number that is not finite. An example is then a batch of its own, so no other decides what it
adds.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from client.data.rows import Batch
from client.measurement.passes import CPU, ON_CPU, Passes
from client.measurement.symmetric_product import add_upper, mirror_upper
from common.device import has_float64
from common.errors import LocalProtocolError, ModelError
from common.merge_methods.terms import Gram
from common.models.layers import expert_parameters, fused_experts, linear_layers, merge_layers, parameter_of
from common.models.plan import MergePlan, SharedInput

UNBOUNDED: Mapping[str, float] = MappingProxyType({})


class FarEnough(Exception):  # noqa: N818 - not an error: the way out of a forward pass
    """Ends a forward pass that has given everything it is needed for."""


@dataclass(frozen=True, kw_only=True)
class LayerInput:
    """What one call of a linear layer was fed: `rows` (..., d_in).

    `routed`, for an expert: which tokens these are, (tokens,) bool over all tokens of the batch, including padding.
    """

    rows: Tensor
    routed: Tensor | None = None


Observe = Callable[[str, LayerInput], None]


@contextmanager
def layer_inputs(model: nn.Module, observe: Observe, weights: Collection[str]) -> Iterator[None]:
    """While open, call `observe(weight, input)` whenever one of the layers runs. `weight` names the layer's weight."""
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
    """What each expert's two layers are fed. It is computed here, because a fused forward pass does not show it.

    `hidden` (tokens, d), `chosen` (tokens, k): the k experts of each token. Idle experts are observed too.
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
    """Groups of layers, by weight name, that were fed the very same tensors, in order of first use.

    A layer that the batch never reaches is in no group.
    """
    seen: dict[str, list[Tensor]] = {}  # keeps the tensors alive, so that no identity is used twice

    def observe(weight: str, fed: LayerInput) -> None:
        seen.setdefault(weight, []).append(fed.rows)

    with layer_inputs(model, observe, merge_layers(model)), torch.inference_mode():
        model(**batch)
    groups: dict[tuple[int, ...], list[str]] = {}
    for weight, tensors in seen.items():
        groups.setdefault(tuple(id(tensor) for tensor in tensors), []).append(weight)
    return tuple(tuple(group) for group in groups.values())


@torch.inference_mode()
def measure_grams(
    model: PreTrainedModel,
    plan: MergePlan,
    batches: Iterable[Batch],
    passes: Passes = ON_CPU,
    norms: Mapping[str, float] = UNBOUNDED,
) -> dict[str, Gram]:
    """The Gram and the number of token rows of every distinct input of the plan, summed over `batches`.

    Each batch's product is float32, whatever type the pass computes in; the sums are float64. A head over a whole
    vocabulary is not computed unless it is measured. `norms`: see GramCollector.
    Raises ModelError if layers that share an input in the plan are fed different tensors, or if the shapes of a batch
    do not reveal its padding (`BatchTokens`).
    """
    with passes.running(model), collecting(model, plan, passes.device, norms) as collector:
        for batch in map(passes.inputs, batches):
            collector.start_batch(batch)
            with suppress(FarEnough):
                model(**batch)
    return collector.grams()


@contextmanager
def collecting(
    model: nn.Module, plan: MergePlan, device: torch.device, norms: Mapping[str, float] = UNBOUNDED
) -> Iterator["GramCollector"]:
    """While open, forward passes on `device` add to the Grams of the plan's inputs.

    A pass ends with FarEnough before a language model's head, unless the head is measured.
    """
    collector = GramCollector(plan, device, norms)
    weights = {layer.whole for layer in plan.layers()}
    with layer_inputs(model, collector.observe, weights), _ending_before_head(model, collector, weights):
        yield collector


@contextmanager
def _ending_before_head(model: nn.Module, collector: "GramCollector", weights: Collection[str]) -> Iterator[None]:
    """While open, a forward pass ends when it calls a language model's head, unless the head itself is measured.

    It cannot end earlier. Some layers are called repeatedly (ALBERT), or in pieces if a batch is long, and nothing
    shows which call is the last.
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
    """Tells by shape alone which rows of a layer's input are tokens of the batch's examples, and which are padding.

    Invariant: in a sequence-to-sequence batch, encoder and decoder are padded to different lengths. With equal lengths,
    nothing would show whose mask a layer's rows need, and the constructor raises ModelError.
    """

    def __init__(self, batch: Mapping[str, Tensor]) -> None:
        self.examples = len(next(iter(batch.values())))
        names = [name for name in ("attention_mask", "decoder_attention_mask") if name in batch]
        self._masks = [batch[name].bool() for name in names]
        self._kept: dict[torch.Size, Tensor] = {}  # by a mask's shape: which of its positions are tokens
        if len({mask.shape for mask in self._masks}) < len(self._masks):
            raise ModelError(
                f"a batch has inputs and targets of one padded length, {self._masks[0].shape[1]}, so that their "
                "padding cannot be told apart",
                hint="pad the targets by one more token",
            )

    def rows(self, fed: LayerInput) -> Tensor:
        """(rows, d_in), without padding."""
        rows = fed.rows.reshape(-1, fed.rows.shape[-1])
        shape = fed.rows.shape[:-1] if fed.routed is None else fed.routed.shape
        for mask in self._masks:
            if shape in (mask.shape, (mask.numel(),)):
                if fed.routed is not None:
                    return rows[mask.reshape(-1)[fed.routed]]
                if mask.shape not in self._kept:  # once a batch, since an accelerator has to wait for their number
                    self._kept[mask.shape] = mask.reshape(-1).nonzero()[:, 0]
                return rows[self._kept[mask.shape]]
        return rows

    def times(self, fed: LayerInput) -> int:
        """How often the rows count: once per example if all examples share them (DeBERTa's relative embeddings)."""
        alone = fed.routed is None and fed.rows.ndim == 3 and len(fed.rows) == 1
        return self.examples if alone else 1


def with_constant(rows: Tensor) -> Tensor:
    """(rows, d) -> (rows, d + 1): a constant 1 after the features. Its weight is a bias."""
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)


class GramCollector:
    """Adds up Grams as the layers are called.

    `norms`: by the name of the shared input, the largest Frobenius norm of what one batch, an example, may add to each.
    """

    def __init__(self, plan: MergePlan, device: torch.device = CPU, norms: Mapping[str, float] = UNBOUNDED) -> None:
        sums = device if has_float64(device) else torch.device("cpu")
        self.matrices = {
            shared.name: torch.zeros(shared.gram_size, shared.gram_size, dtype=torch.float64, device=sums)
            for shared in plan.inputs
        }
        self.rows = dict.fromkeys(self.matrices, 0)
        self._fed_by: dict[str, list[SharedInput]] = {}  # the blocks of a whole layer
        for shared in plan.inputs:
            for layer in shared.layers:
                self._fed_by.setdefault(layer.whole, []).append(shared)
        self._tokens: BatchTokens
        self._calls: dict[str, int] = {}
        self._led: dict[str, list[ReferenceType[Any]]] = {}
        self._norms = norms
        self._of_example: dict[str, list[Tensor]] = {}  # with norms: its token rows, until all calls were seen

    def grams(self) -> dict[str, Gram]:
        """The finished sums, by the name of their shared input."""
        self._add_example()
        for matrix in self.matrices.values():
            mirror_upper(matrix)
        return {name: Gram(matrix=matrix.cpu(), rows=self.rows[name]) for name, matrix in self.matrices.items()}

    def start_batch(self, batch: Batch) -> None:
        self._add_example()
        self._tokens = BatchTokens(batch)
        if self._norms and self._tokens.examples != 1:  # check: bounded-examples-are-alone
            raise LocalProtocolError(f"gram: {self._tokens.examples} examples in a batch, and each is to be bounded")
        self._calls = dict.fromkeys(self._fed_by, 0)
        self._led = {name: [] for name in self.matrices}

    @property
    def has_fed_all(self) -> bool:
        """Whether this batch has reached every layer."""
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
                    f"layer {weight.removesuffix('.weight')} was fed another input than {shared.name}, but in the "
                    "agreement they share a Gram",
                    hint="complete the draft again: amalgram draft",
                )

    def _add(self, shared: SharedInput, fed: LayerInput) -> None:
        rows = self._tokens.rows(replace(fed, rows=fed.rows[..., shared.features]))
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))  # half precision would lose too much
        if shared.has_constant:
            rows = with_constant(rows)  # (rows, gram_size)
        if self._norms:
            self._of_example.setdefault(shared.name, []).append(rows.detach().cpu().double())
            return
        times = self._tokens.times(fed)
        with _full_precision(rows.device.type):
            add_upper(self.matrices[shared.name], rows, times)
        self.rows[shared.name] += times * len(rows)

    def _add_example(self) -> None:
        """Add the last example to every Gram, each by no more than its norm."""
        for name, parts in self._of_example.items():
            rows = torch.cat(parts)  # (rows, gram_size) float64
            add_upper(self.matrices[name], bounded_rows(rows, self._norms[name]).to(self.matrices[name].device))
            self.rows[name] += len(rows)
        self._of_example.clear()


def bounded_rows(rows: Tensor, norm: float) -> Tensor:
    """Rows (n, d) of which rows^T rows has at most this Frobenius norm: as they are, or all shorter by one factor."""
    if not rows.isfinite().all():  # check: examples-without-numbers-add-nothing
        return torch.zeros_like(rows)
    narrow = rows if rows.shape[0] > rows.shape[1] else rows.T
    largest = rows.abs().max() if rows.numel() else rows.new_zeros(())
    scaled = narrow / largest.clamp(min=torch.finfo(rows.dtype).tiny)  # squares of squares could overflow
    moved = float((scaled.T @ scaled).norm() * largest**2)  # |rows^T rows|_F
    return rows * min(1.0, norm / moved) ** 0.5 if moved > 0 else rows  # check: examples-move-a-gram-by-so-much


def _full_precision(device_type: str) -> AbstractContextManager[object]:
    """While open, a pass in bfloat16 multiplies what is float32 in float32."""
    is_coarse = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if is_coarse else nullcontext()
