"""Made-up plans, owners and merge settings for tests of merge methods. Sums use the real layout and plain sum."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from common.identity import Identity
from common.merge_methods import METHODS, Hyperparameters, contribution, contribution_layout
from common.merge_methods.method import SingleRoundMethod
from common.merge_methods.regmean import RegMeanTable
from common.merge_methods.terms import Gram, MergeBounds, MergedDelta, MergeSettings, OwnerTerms, Weighting
from common.models.layers import Layer
from common.models.plan import MergePlan, SharedInput
from common.summation.protocol import Total
from common.summation.totals import SummedTensors
from tests.support.sums import run, terms_of


def plan_for(
    d_in: int,
    d_outs: Sequence[int],
    *,
    stored_input_first: bool = False,
    has_constant: bool = False,
    has_bias: bool = False,
) -> MergePlan:
    """Layers that share one input, with or without their biases, and one bias that is averaged.

    `has_bias`: the first layer's bias is averaged, too.
    """
    layers = tuple(
        Layer(
            weight=f"l{index}.weight",
            d_in=d_in,
            d_out=d_out,
            stored_input_first=stored_input_first,
            bias=f"l{index}.bias" if has_constant else None,
        )
        for index, d_out in enumerate(d_outs)
    )
    shapes = {
        layer.weight: (layer.d_in, layer.d_out) if stored_input_first else (layer.d_out, layer.d_in) for layer in layers
    }
    return MergePlan(
        inputs=(SharedInput(name="l0", d_in=d_in, layers=layers),),
        data_free=(),
        linear_layers=tuple(replace(layer, bias=None) for layer in layers),
        averaged=("bias", "l0.bias") if has_bias else ("bias",),
        left_alone=(),
        shapes={
            **shapes,
            **{layer.bias: (layer.d_out,) for layer in layers if layer.bias},
            **({"l0.bias": (d_outs[0],)} if has_bias else {}),
            "bias": (3,),
        },
    )


def owner_for(plan: MergePlan, rows: Tensor, seed: int) -> OwnerTerms:
    """An owner that saw `rows` (n, gram_size), with a random delta."""
    random = torch.Generator().manual_seed(seed)
    delta = {name: torch.randn(shape, generator=random, dtype=torch.float64) for name, shape in plan.shapes.items()}
    fisher = {name: torch.rand(shape, generator=random, dtype=torch.float64) for name, shape in plan.shapes.items()}
    return OwnerTerms(
        examples=max(len(rows), 1),
        delta=delta,
        grams={"l0": Gram(matrix=rows.T @ rows, rows=len(rows))},
        gram_examples=max(len(rows), 1),
        fisher=fisher,
        fisher_examples=1,
        class_shares=torch.rand(plan.linear_layers[0].d_out, generator=random, dtype=torch.float64).softmax(0),
    )


def merge_settings(
    plan: MergePlan, weighting: Weighting = "rows", *, bound: float = 4096.0, **tables: Hyperparameters
) -> MergeSettings:
    """What an agreement over `plan` says to a method: default hyperparameters, except those of `tables`."""
    bounds = MergeBounds(
        examples=10_000,
        delta=64.0,
        grams={shared.name: bound for shared in plan.inputs},
        fisher=dict.fromkeys(plan.changed, 64.0),
    )
    every = {name: method.table() for name, method in METHODS.items()} | tables
    return MergeSettings(plan=plan, weighting=weighting, bounds=bounds, tables=every)


def exact(plan: MergePlan, weighting: Weighting = "rows", **hyperparameters: object) -> MergeSettings:
    """RegMean without ridge, so that its equations hold exactly."""
    regmean = RegMeanTable(ridge=0.0, **hyperparameters)  # type: ignore[arg-type]
    return merge_settings(plan, weighting, regmean=regmean)


def total_of(methods: Sequence[str], settings: MergeSettings, owners: Mapping[str, OwnerTerms]) -> Total:
    """The total of the first round of all methods."""
    layout = contribution_layout(methods, settings)
    vectors = {name: np.zeros(layout.size) for name in owners}
    for name, owner in owners.items():
        layout.flatten(contribution(methods, settings, owner), vectors[name])
    identities = {name: Identity(name=name, seed=name.encode().ljust(32)) for name in owners}
    return run("plain", identities, terms_of(identities, layout), vectors)


def single_round(name: str) -> SingleRoundMethod[Hyperparameters]:
    """The method, which merges from one sum."""
    method = METHODS[name]
    assert isinstance(method, SingleRoundMethod)
    return method


def merged_in_float64(
    method: str,
    settings: MergeSettings,
    total: SummedTensors,
    hyperparameter: float | None = None,
    *,
    with_spectra: bool = True,
) -> MergedDelta:
    """The method's merged delta without its last rounding, so that oracles can be compared to 1e-9."""
    with without_rounding():
        return single_round(method).solve(settings, total, hyperparameter, with_spectra=with_spectra)


@contextmanager
def without_rounding() -> Iterator[None]:
    """Let tensors stay float64 where the product rounds them to float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", lambda self: self)
        yield
