"""Merges of encoders from explicit rows and the papers' formulas, for benchmarks that try many of them.

They use nothing of the product's methods, sums or messages. Every owner counts by its examples. Only BERT's modules are
known. As in the product, the attention of the first block, whose inputs show which tokens an owner has, the pooler and
the classifier, which see one row an example, are merged without rows.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Linear, Module
from transformers import PreTrainedModel

from client.data.rows import Batch, Rows

Models = Mapping[str, PreTrainedModel]  # by owner
Shares = Mapping[str, float]  # of all examples, by owner
Products = dict[str, Tensor]  # by linear layer: (inputs, inputs) float64, sums over token rows for each example

BATCH = 32
RIDGE = 1e-4  # RegMean's, of the mean of a Gram matrix's diagonal


def blocks_of(model: PreTrainedModel) -> list[Module]:
    return list(model.base_model.encoder.layer)


def measured_layers(model: PreTrainedModel, *, with_one_row: bool = False) -> dict[str, Linear]:
    """The linear layers that are merged with measured rows, by name; if `with_one_row`, also those that see one row an
    example.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Linear) and (".layer." in name or with_one_row) and "layer.0.attention.self" not in name
    }


def deltas_of(models: Models, base: PreTrainedModel, name: str) -> dict[str, Tensor]:
    """Every owner's change of one parameter, float64."""
    start = base.get_parameter(name)
    return {owner: (model.get_parameter(name) - start).detach().double() for owner, model in models.items()}


def mean_delta(models: Models, shares: Shares, base: PreTrainedModel, name: str) -> Tensor:
    each = deltas_of(models, base, name)
    return torch.stack([shares[owner] * delta for owner, delta in each.items()]).sum(0)


@contextmanager
def inputs_of(layers: Mapping[str, Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `see` with what each layer is given, (examples, positions, inputs), inside the `with` block."""
    hooks = [
        layer.register_forward_pre_hook(lambda _, arguments, name=name: see(name, arguments[0]))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def grams(model: PreTrainedModel, rows: Rows, *, with_one_row: bool = False) -> Products:
    """X^T X of every measured layer for each example: padding left out, products in float32, their sums in float64."""
    found: Products = {}
    last: list[Tensor] = []  # the last input and its products: layers with the same input come one after the other
    mask = torch.empty(0)

    def see(name: str, inputs: Tensor) -> None:
        if not last or last[0] is not inputs:
            kept = inputs[mask] if inputs.ndim == 3 else inputs
            last[:] = [inputs, (kept.T @ kept).double()]
        found[name] = found[name] + last[1] if name in found else last[1].clone()

    with inputs_of(measured_layers(model, with_one_row=with_one_row), see):
        for _, batch, _ in rows.batches(BATCH):
            mask = batch["attention_mask"].bool()
            model(**batch)
    return {name: gram / len(rows) for name, gram in found.items()}


def shrunk(gram: Tensor, alpha: float) -> Tensor:
    return alpha * gram + (1 - alpha) * torch.diag(gram.diagonal())


def at_deltas(base: PreTrainedModel, deltas: Mapping[str, Tensor]) -> PreTrainedModel:
    """`base` itself, moved by the changes of its parameters."""
    with torch.no_grad():
        for name, delta in deltas.items():
            base.get_parameter(name).add_(delta)
    return base


def mean_deltas(models: Models, shares: Shares, base: PreTrainedModel) -> dict[str, Tensor]:
    return {name: mean_delta(models, shares, base, name) for name, _ in base.named_parameters()}


def data_free_deltas(
    models: Models, shares: Shares, base: PreTrainedModel, ridge: float = 0.1, pull: float | None = None
) -> dict[str, Tensor]:
    """common/merge_methods/data_free.py."""
    found = mean_deltas(models, shares, base)
    linear = {f"{name}.weight" for name, module in base.named_modules() if isinstance(module, Linear)}
    for name in linear & found.keys():
        deltas = deltas_of(models, base, name)
        if any(delta.any() for delta in deltas.values()):
            size, times = base.get_parameter(name).shape[1], 1.0 if pull is None else pull * len(models)
            left = ridge / size * torch.eye(size, dtype=torch.float64)
            right = ridge / size * times * found[name].T
            for owner, delta in deltas.items():
                gram = shares[owner] * delta.T @ delta / delta.square().sum()
                left, right = left + gram, right + gram @ delta.T
            found[name] = torch.linalg.solve(left, right).T
    return found


def ace_deltas(
    models: Models, shares: Shares, base: PreTrainedModel, *, is_fair: bool, is_centred: bool, ridge: float = 0.1
) -> dict[str, Tensor]:
    """data_free with what ACE (arXiv 2603.02945) changes of it.

    `is_fair`: each owner's Gram has a ridge of its own, larger where the owner changed little. `is_centred`: Grams are
    of changes without their mean row.
    """
    found = mean_deltas(models, shares, base)
    linear = {f"{name}.weight" for name, module in base.named_modules() if isinstance(module, Linear)}
    for name in linear & found.keys():
        deltas = deltas_of(models, base, name)
        if not any(delta.any() for delta in deltas.values()):
            continue
        rows = {owner: delta - delta.mean(dim=0) if is_centred else delta for owner, delta in deltas.items()}
        traces = {owner: each.square().sum() for owner, each in rows.items()}
        mean = torch.stack(list(traces.values())).mean()
        size = base.get_parameter(name).shape[1]
        left, right = torch.zeros(size, size, dtype=torch.float64), torch.zeros(())
        for owner, delta in deltas.items():
            gram = rows[owner].T @ rows[owner] / traces[owner]
            gram.diagonal().add_(ridge / size * (mean / traces[owner] if is_fair else 1.0))
            left, right = left + shares[owner] * gram, right + shares[owner] * gram @ delta.T
        found[name] = torch.linalg.solve(left, right).T
    return found


def data_free(
    merged: PreTrainedModel, models: Models, examples: Mapping[str, int], ridge: float, pull: float | None
) -> PreTrainedModel:
    """The data-free merge of models with so many examples each; `merged` is the base, and becomes it."""
    shares = {owner: count / sum(examples.values()) for owner, count in examples.items()}
    return at_deltas(merged, data_free_deltas(models, shares, merged, ridge, pull))


def regmean_deltas(
    models: Models,
    shares: Shares,
    base: PreTrainedModel,
    measured: Mapping[str, Products],
    alpha: float,
    start: Mapping[str, Tensor],
    anchor: float = 0.0,
) -> dict[str, Tensor]:
    """common/merge_methods/regmean.py; with an `anchor`, anchored.py. Held to `start`, which has all other changes."""
    found = dict(start)
    for layer in next(iter(measured.values())):
        name = f"{layer}.weight"
        size = base.get_parameter(name).shape[1]
        left, right = torch.zeros(size, size, dtype=torch.float64), torch.zeros(())
        for owner, delta in deltas_of(models, base, name).items():
            gram = shares[owner] * shrunk(measured[owner][layer], alpha)
            left, right = left + gram, right + gram @ delta.T
        pull = (anchor or RIDGE / size) * left.trace()
        left.diagonal().add_(pull)
        found[name] = torch.linalg.solve(left, right + pull * start[name].T).T
    return found


@torch.no_grad()
def isotropic_deltas(models: Models, base: PreTrainedModel, scale: float) -> dict[str, Tensor]:
    """common/merge_methods/isotropic.py, with the paper's own spectrum."""
    found = mean_deltas(models, dict.fromkeys(models, 1 / len(models)), base)
    for layer, module in base.named_modules():
        if isinstance(module, Linear) and found[f"{layer}.weight"].any():
            left, values, right = torch.linalg.svd(scale * len(models) * found[f"{layer}.weight"], full_matrices=False)
            found[f"{layer}.weight"] = values.mean() * left @ right
    return found


def model_stock_deltas(models: Models, base: PreTrainedModel) -> dict[str, Tensor]:
    """common/merge_methods/model_stock.py."""
    found = mean_deltas(models, dict.fromkeys(models, 1 / len(models)), base)
    for name, mean in found.items():
        squares = torch.stack([delta.square().sum() for delta in deltas_of(models, base, name).values()])
        size, count = mean.square().sum(), len(models)
        if size > 0:
            factor = (count * size - squares.mean()) / ((count - 1) * size)
            found[name] = factor.clamp(min=0) * mean
    return found


@dataclass(frozen=True, kw_only=True)
class Stepwise:
    """How a merge of block after block is fitted. As it is here, it is RegMean++ (arXiv 2508.03121).

    FeatCal (arXiv 2605.13030) fits the merged layer on the merged model's inputs x_s to what the owner's layer makes of
    x_t, `own` of the owner's own inputs and the rest of x_s, every owner's products divided by the norm of its Gram
    matrix (`is_normalised`), and holds each weight to `reach` times a merge of all changes, `anchor` firmly.
    """

    alpha: float = 0.9
    own: float = 0.0
    is_normalised: bool = False
    anchor: float = 0.0
    reach: float = 1.0


FEATCAL = Stepwise(alpha=1.0, own=0.25, is_normalised=True, anchor=0.05, reach=2.0)


@torch.no_grad()
def stepwise_deltas(
    models: Models,
    shares: Shares,
    base: PreTrainedModel,
    merged: PreTrainedModel,
    rows: Mapping[str, Rows],
    held_to: Mapping[str, Tensor],
    how: Stepwise,
) -> dict[str, Tensor]:
    """Changes of the measured layers, block after block; `merged` holds all other changes already and gets these too.

    Within a block, the inputs of later layers are those that the owner's own layers make of what enters the block.
    """
    found: dict[str, Tensor] = {}
    streams = {owner: _Streams.entering(models[owner], merged, rows[owner], how.own > 0) for owner in models}
    layers = measured_layers(base)
    for number in range(len(blocks_of(base))):
        prefix = next(name for name, module in base.named_modules() if module is blocks_of(base)[number])
        inside = {name: layer for name, layer in layers.items() if name.startswith(f"{prefix}.")}
        products = {
            owner: streams[owner].products(blocks_of(models[owner])[number], inside, prefix, how) for owner in models
        }
        for layer in inside:
            name = f"{layer}.weight"
            start = base.get_parameter(name).detach().double()
            left, right = torch.zeros(()), torch.zeros(())
            for owner, delta in deltas_of(models, base, name).items():
                gram, cross = products[owner][layer]  # sums of x_s x_s^T, and of x_s x_t^T
                weight = shares[owner] / gram.norm() if how.is_normalised else shares[owner]
                gram, cross = weight * shrunk(gram, how.alpha), weight * shrunk(cross, how.alpha)
                left, right = left + gram, right + cross @ delta.T + (cross - gram) @ start.T
            pull = how.anchor if how.is_normalised else how.anchor * float(left.trace())
            reach = how.reach if pull else 1.0
            pull = pull or RIDGE * float(left.diagonal().mean())
            left.diagonal().add_(pull)
            found[name] = torch.linalg.solve(left, right + pull * reach * held_to[name].T).T
            merged.get_parameter(name).copy_(start + found[name])
        for each in streams.values():
            each.advance(blocks_of(merged)[number])
    return found


class _Streams:
    """What one owner's rows are before a block, batch by batch: in the merged model, and in its own."""

    def __init__(self, batches: list[Batch], merged: list[Tensor], own: list[Tensor] | None) -> None:
        self._batches, self._merged, self._own = batches, merged, own
        self._masks = [batch["attention_mask"].bool() for batch in batches]
        self._count = sum(len(mask) for mask in self._masks)

    @classmethod
    def entering(cls, own: PreTrainedModel, merged: PreTrainedModel, rows: Rows, with_own: bool) -> "_Streams":
        batches = [batch for _, batch, _ in rows.batches(BATCH)]
        first = [_embedded(merged, batch) for batch in batches]
        return cls(batches, first, [_embedded(own, batch) for batch in batches] if with_own else None)

    def products(
        self, block: Module, layers: Mapping[str, Linear], prefix: str, how: Stepwise
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Sums of x_s x_s^T and x_s x_t^T for each example, by layer. Moves the owner's own stream past the block."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        inside = {name: block.get_submodule(name.removeprefix(f"{prefix}.")) for name in layers}
        for index, mask in enumerate(self._masks):
            ours = _seen(block, inside, self._merged[index], mask)[0]
            theirs = ours
            if self._own is not None:
                theirs, self._own[index] = _seen(block, inside, self._own[index], mask)
            done: dict[int, tuple[Tensor, Tensor]] = {}
            for name, rows in ours.items():
                if id(rows) not in done:
                    target = how.own * theirs[name] + (1 - how.own) * rows
                    gram = (rows.T @ rows).double() / self._count
                    done[id(rows)] = gram, gram if theirs is ours else (rows.T @ target).double() / self._count
                gram, cross = done[id(rows)]
                found[name] = (found[name][0] + gram, found[name][1] + cross) if name in found else (gram, cross)
        return found

    def advance(self, block: Module) -> None:
        for index, mask in enumerate(self._masks):
            self._merged[index] = _through(block, self._merged[index], mask)


def _embedded(model: PreTrainedModel, batch: Batch) -> Tensor:
    wanted = {name: batch[name] for name in ("input_ids", "token_type_ids") if name in batch}
    found: Tensor = model.base_model.embeddings(**wanted)
    return found


def _through(block: Module, hidden: Tensor, mask: Tensor) -> Tensor:
    hides = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[:, None, None, :]
    found = block(hidden, attention_mask=hides)
    after: Tensor = found[0] if isinstance(found, tuple) else found
    return after


def _seen(
    block: Module, layers: Mapping[str, Module], hidden: Tensor, mask: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """What each layer of a block is given on unmasked positions, (rows, inputs), and what leaves the block."""
    found: dict[str, Tensor] = {}
    kept: dict[int, Tensor] = {}  # the same tensor for layers with the same input

    def see(name: str, inputs: Tensor) -> None:
        found[name] = kept.setdefault(id(inputs), inputs[mask])
        alive.append(inputs)  # so that no other tensor gets its id

    alive: list[Tensor] = []
    with inputs_of(layers, see):
        after = _through(block, hidden, mask)
    return found, after
