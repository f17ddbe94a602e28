"""LoRM: least squares among the changes that one shared LoRA factor can make."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.errors import ModelError, NumericalError
from common.merge_methods.lorm import LORM, LoRMTable, directions
from common.merge_methods.regmean import RegMeanTable
from common.merge_methods.terms import MergeSettings, OwnerTerms, Weighting
from tests.support.merging import merge_settings, merged_in_float64, owner_for, plan_for, total_of

D_IN, D_OUT, RANK = 12, 5, 3


def agreed(weighting: Weighting = "rows", **layers: bool) -> MergeSettings:
    plan = plan_for(D_IN, [D_OUT, D_OUT + 2], **layers)
    tables = {"lorm": LoRMTable(rank=RANK), "regmean": RegMeanTable(alphas=(1.0,), ridge=0.0)}
    return replace(merge_settings(plan, weighting, **tables), num_owners=3)


def factor(seed: int) -> Tensor:
    return torch.randn(RANK, D_IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def owners_with(settings_: MergeSettings, factors: list[Tensor]) -> tuple[dict[str, OwnerTerms], list[Tensor]]:
    """Owners whose change of each layer reads what their factor (r, d_in) reads, and their rows."""
    owners, every = {}, []
    for number, down in enumerate(factors):
        random = torch.Generator().manual_seed(100 + number)
        rows = torch.randn(20 + 10 * number, D_IN, generator=random, dtype=torch.float64)
        owner = owner_for(settings_.plan, rows, number)
        changes = dict(owner.delta)
        for layer in settings_.plan.linear_layers:
            up = torch.randn(layer.d_out, RANK, generator=random, dtype=torch.float64)
            changes[layer.weight] = layer.from_input_first((up @ down).T)
        owners[f"o{number}"] = replace(owner, delta=changes)
        every.append(rows)
    return owners, every


def merge(settings_: MergeSettings, owners: dict[str, OwnerTerms]) -> dict[str, Tensor]:
    return merged_in_float64("lorm", settings_, total_of(["lorm"], settings_, owners)).published


@pytest.mark.parametrize("weighting", ["rows", "owners"])
@pytest.mark.parametrize("input_first", [False, True])
def test_the_merge_is_the_least_squares_of_all_rows_over_the_second_factor(
    weighting: Weighting, input_first: bool
) -> None:
    settings_ = agreed(weighting, stored_input_first=input_first)
    down = factor(0)
    owners, every = owners_with(settings_, [down, 2 * down, torch.diag(torch.arange(1.0, RANK + 1)).double() @ down])
    merged = merge(settings_, owners)
    for layer in settings_.plan.linear_layers:
        scales = [1.0 if weighting == "rows" else len(rows) ** -0.5 for rows in every]
        read = torch.cat([scale * rows @ down.T for scale, rows in zip(scales, every, strict=True)])  # (rows, r)
        wanted = torch.cat(
            [
                scale * rows @ layer.take(owner.delta)
                for scale, rows, owner in zip(scales, every, owners.values(), strict=True)
            ]
        )
        up = torch.linalg.lstsq(read, wanted).solution  # (r, d_out)
        torch.testing.assert_close(layer.take(merged), down.T @ up, rtol=1e-6, atol=1e-7)


def test_an_owner_sends_as_much_as_an_adapter_holds() -> None:
    settings_ = agreed()
    sizes = {entry.name: entry.size for entry in LORM.layout(settings_).entries}
    assert sizes["lorm_down/l0.weight"] == RANK * D_IN
    assert sizes["lorm_gram_delta/l0.weight"] == RANK * D_OUT
    assert sizes["lorm_gram/l0"] == RANK * (RANK + 1) // 2


@given(seed=st.integers(0, 1000))
@settings(max_examples=20)
def test_with_the_rank_of_the_whole_space_it_is_regmean(seed: int) -> None:
    settings_ = agreed()
    settings_ = replace(settings_, tables={**settings_.tables, "lorm": LoRMTable(rank=D_IN)})
    random = torch.Generator().manual_seed(seed)
    rows = [torch.randn(30, D_IN, generator=random, dtype=torch.float64) for _ in range(3)]
    owners = {f"o{number}": owner_for(settings_.plan, each, seed + number) for number, each in enumerate(rows)}
    regmean = merged_in_float64("regmean", settings_, total_of(["regmean"], settings_, owners), 1.0).published
    for name, tensor in merge(settings_, owners).items():
        torch.testing.assert_close(tensor, regmean[name], rtol=1e-5, atol=1e-6)


def test_where_no_gram_is_measured_it_is_the_mean() -> None:
    settings_ = agreed("owners")
    settings_ = replace(settings_, plan=replace(settings_.plan, inputs=()))
    owners, _ = owners_with(settings_, [factor(0)] * 3)
    for name, tensor in merge(settings_, owners).items():
        mean = sum(owner.delta[name] for owner in owners.values()) / 3
        torch.testing.assert_close(tensor, mean, rtol=1e-6, atol=1e-7)


def test_what_is_outside_the_blocks_is_merged_as_regmean_merges_it() -> None:
    settings_ = agreed()
    settings_ = replace(settings_, plan=replace(settings_.plan, blocks=("l1",)))
    owners, _ = owners_with(settings_, [factor(0)] * 3)
    full = {name: torch.randn(D_OUT, D_IN, dtype=torch.float64) for name in owners}  # of another rank
    owners = {name: replace(owner, delta={**owner.delta, "l0.weight": full[name]}) for name, owner in owners.items()}
    regmean = merged_in_float64("regmean", settings_, total_of(["regmean"], settings_, owners), 1.0).published
    merged = merge(settings_, owners)
    torch.testing.assert_close(merged["l0.weight"], regmean["l0.weight"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(merged["bias"], regmean["bias"])
    assert torch.linalg.matrix_rank(merged["l1.weight"], rtol=1e-6) == RANK
    assert set(LORM.applied(settings_)) == {"l1.weight"}


def test_owners_that_share_no_factor_are_not_merged() -> None:
    settings_ = agreed()
    owners, _ = owners_with(settings_, [factor(0), factor(0), factor(1)])
    with pytest.raises(NumericalError, match=r"l0\.weight: the owners' adapters do not share their first factor"):
        merge(settings_, owners)


@pytest.mark.parametrize(("rank", "read"), [(2, 3), (4, 3), (4, 0)])
def test_an_owner_whose_change_is_of_another_rank_takes_no_part(rank: int, read: int) -> None:
    change = (torch.randn(D_OUT, RANK).double() @ factor(0)).T if read else torch.zeros(D_IN, D_OUT).double()
    with pytest.raises(ModelError, match=rf"reads {read} directions .* lorm\.rank = {rank}"):
        directions(change, rank, "l0.weight")


def test_directions_depend_on_what_is_read_alone_and_survive_float32() -> None:
    """Two owners' changes, each as the difference of float32 weights a hundred times as large."""
    random, down = torch.Generator().manual_seed(0), factor(0)
    base = 100 * torch.randn(D_OUT, D_IN, generator=random)
    found = []
    for _ in range(2):
        up = torch.randn(D_OUT, RANK, generator=random, dtype=torch.float64)
        found.append(directions(((base + (up @ down).float()) - base).double().T, RANK, "l0.weight"))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-4)
    torch.testing.assert_close(found[0] @ found[0].T, torch.eye(RANK, dtype=torch.float64))
