"""Grams and merged layers of tiny models of many architectures, against explicit rows, one example at a time."""

import re
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from client.measurement.gram import find_shared_inputs, measure_grams
from common.agreement import Agreement, AgreementDraft, OwnerEntry, Privacy, Task
from common.agreement.tables import Merging
from common.errors import ModelError, SettingsError
from common.merge_methods import contribution, contribution_layout
from common.merge_methods.refit import classifier
from common.merge_methods.regmean import RegMeanTable
from common.merge_methods.terms import Gram, MergedDelta, OwnerTerms
from common.models.layers import Layer, linear_layers, merge_layers, parameter_of
from common.models.parameters import parameter_shapes
from common.models.plan import MergePlan, PlannedTensors, merge_plan
from deploy.complete import complete_agreement
from deploy.example import reviews
from tests.support.architectures import (
    ARCHITECTURES,
    MIXTURES,
    TEXT,
    Architecture,
    Example,
    batch_of,
    image,
    planned_tensors_of,
    shake,
    text,
)
from tests.support.merging import exact, merge_settings, single_round, total_of
from tests.support.models import delta_of, tiny_bert
from tests.support.parties import IDENTITIES
from tests.support.verifying import Check, Contributions, verified


class ExpertRows(TorchFunctionMode):
    """Sees each product with a slice of a fused parameter, by where the slice lies in memory."""

    def __init__(self, model: nn.Module, rows: dict[str, list[Tensor]]) -> None:
        super().__init__()
        fused = {name: p for name, p in model.named_parameters() if p.ndim == 3 and ".experts." in name}
        self.names = {p[index].data_ptr(): f"{name}[{index}]" for name, p in fused.items() for index in range(len(p))}
        self.rows = rows

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is nn.functional.linear and args[1].data_ptr() in self.names:
            self.rows.setdefault(self.names[args[1].data_ptr()], []).append(args[0])
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def explicit_rows(model: nn.Module, examples: list[Example]) -> dict[str, Tensor]:
    """The slow way: each example by itself, unpadded; every input row of every linear layer, by weight name."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=f"{name}.weight": seen.setdefault(name, []).append(args[0])
        )
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]
    with ExpertRows(model, seen):
        for example in examples:
            model(**{name: tensor[None] for name, tensor in example.items()})
    for handle in handles:
        handle.remove()
    return {name: torch.cat([rows.reshape(-1, rows.shape[-1]) for rows in calls]) for name, calls in seen.items()}


@dataclass(frozen=True, kw_only=True)
class Merge:
    """What three owners measured, and the explicit rows of each."""

    architecture: Architecture
    base: nn.Module
    plan: MergePlan
    grams: list[dict[str, Gram]]
    rows: list[dict[str, Tensor]]
    deltas: list[dict[str, Tensor]]
    merged: MergedDelta  # float32


IN_BLOCKS = "bert in blocks", "gpt2 in blocks", "mixtral in blocks"
LARGEST_GRAM = 7  # of these; their layers have 8 or 12 inputs


@pytest.fixture(scope="module", params=[*ARCHITECTURES, *IN_BLOCKS])
def merge(request: pytest.FixtureRequest, agreement: Agreement) -> Merge:
    """Models and Grams are float64, so that only a wrong row makes a difference."""
    name = request.param.removesuffix(" in blocks")
    architecture = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = architecture.make().double().eval()
    if name in MIXTURES:
        base.set_experts_implementation("eager")  # type: ignore[operator]
    shake(base, 0.3, seed=0)
    random = torch.Generator().manual_seed(0)
    tensors = planned_tensors_of(base, batch_of([architecture.example(random) for _ in range(8)]))
    largest_gram = LARGEST_GRAM if request.param in IN_BLOCKS else None
    plan = merge_plan(base, tensors.model_copy(update={"largest_gram": largest_gram}))
    grams, rows, deltas, owners = [], [], [], {}
    for index in range(3):
        tuned = deepcopy(base)
        shake(tuned, 0.05, seed=index + 1)
        examples = [architecture.example(random) for _ in range(11)]
        batches = [batch_of(examples[:6]), batch_of(examples[6:10]), batch_of(examples[10:])]
        grams.append(measure_grams(tuned, plan, batches))  # type: ignore[arg-type]
        rows.append(explicit_rows(tuned, examples))
        deltas.append(delta_of(tuned, base))
        owners[f"o{index}"] = OwnerTerms(examples=11, delta=deltas[-1], grams=grams[-1], gram_examples=11)
    settings = exact(plan)
    total = total_of(["regmean"], settings, owners)
    return Merge(
        architecture=architecture,
        base=base,
        plan=plan,
        grams=grams,
        rows=rows,
        deltas=deltas,
        merged=single_round("regmean").solve(settings, total, 1.0, with_spectra=True),
    )


def rows_of(layer: Layer, rows: dict[str, Tensor]) -> Tensor:
    """(rows, d_in): what the layer was fed, of one that is a block its features."""
    if layer.whole not in rows:
        return torch.zeros(0, layer.d_in, dtype=torch.float64)
    return rows[layer.whole] if layer.features is None else rows[layer.whole][:, slice(*layer.features)]


def test_grams_are_those_of_explicit_rows(merge: Merge) -> None:
    for grams, rows in zip(merge.grams, merge.rows, strict=True):
        for shared in merge.plan.inputs:
            for layer in shared.layers:
                explicit = rows_of(layer, rows)
                assert grams[shared.name].rows == len(explicit), layer.weight
                # Some models compute norms in float32 whatever their type.
                torch.testing.assert_close(grams[shared.name].matrix, explicit.T @ explicit, rtol=1e-5, atol=1e-5)


def check_of(merge: Merge, *, in_32_bits: bool = False) -> Check:
    """An honest check of the merge that these owners' contributions give."""
    tables = {"regmean": RegMeanTable(alphas=(0.9,))}
    settings = verified(merge_settings(merge.plan, **tables), 3, in_32_bits=in_32_bits)
    layout, vectors = contribution_layout(["regmean"], settings), {}
    for index, (delta, grams) in enumerate(zip(merge.deltas, merge.grams, strict=True)):
        owner = OwnerTerms(examples=11, delta=delta, grams=grams, gram_examples=11)
        vectors[f"o{index}"] = np.zeros(layout.size)
        layout.flatten(contribution(["regmean"], settings, owner), vectors[f"o{index}"])
    contributions = (Contributions.in_32_bits if in_32_bits else Contributions.of)(layout, vectors)
    method = single_round("regmean")
    merged = method.solve(settings, contributions.total, 0.9, with_spectra=False)
    return Check(equations=method.equations(settings, 0.9), contributions=contributions, merged=merged)


def test_the_merge_of_every_architecture_is_verified_and_one_wrong_number_is_found(merge: Merge) -> None:
    check = check_of(merge)
    assert check.wrong() == []
    name = max(check.delta, key=lambda each: float(check.delta[each].norm()))
    tensor = check.delta[name].reshape(-1)
    tensor[len(tensor) // 2] += 1e-2 * float(tensor.norm())
    assert len(check.wrong()) == 1


@pytest.mark.parametrize("in_32_bits", [False, True])
@pytest.mark.parametrize("merge", ["qwen2 moe"], indirect=True)
def test_122_a_wrong_model_of_a_fused_expert_that_no_token_reached(merge: Merge, in_32_bits: bool) -> None:
    """One number of any of its layers, off by a millionth. If floors did not decide it, what the expert answers to a
    token that never came would be free for a detector.
    """
    check = check_of(merge, in_32_bits=in_32_bits)
    assert check.wrong() == []
    idle = [shared for shared in merge.plan.inputs if shared.name.endswith("_proj[3]")]
    assert len(idle) == 4
    for shared in idle:
        assert all(grams[shared.name].rows == 0 for grams in merge.grams)
        (layer,) = shared.layers
        (equation,) = (each for each in check.equations if each.name == f"gram/{shared.name}")
        alone = replace(check, equations=[equation])
        part = alone.delta[parameter_of(layer.weight)][3]  # a view
        mean = sum(delta[parameter_of(layer.weight)][3] for delta in merge.deltas) / 3
        torch.testing.assert_close(part.double(), mean, atol=1e-3 * float(mean.abs().max()), rtol=1e-3)
        for index in ((0, 0), (-1, -1), (2, 5)):
            right = float(part[index])
            for change in (2.0**-20, -(2.0**-20)):
                part[index] = right * (1 + change)
                assert alone.wrong() == [f"0/gram/{shared.name}"]
            part[index] = right


def test_merged_layers_are_pooled_least_squares(merge: Merge) -> None:
    """Compared by what they put out on all rows, which is unique also where the rows leave the weights open."""
    for layer in merge.plan.layers():
        rows = [rows_of(layer, rows) for rows in merge.rows]
        targets = torch.cat([own @ layer.take(delta) for own, delta in zip(rows, merge.deltas, strict=True)])
        stacked = torch.cat(rows)
        pooled = stacked @ torch.linalg.lstsq(stacked, targets, driver="gelsd").solution
        outputs = stacked @ layer.take(merge.merged.delta).double()
        assert (outputs - pooled).norm() <= 1e-5 * targets.norm(), layer.weight


def test_layers_fed_the_same_tensor_share_one_gram(merge: Merge) -> None:
    assert len(merge_layers(merge.base)) == merge.architecture.layers
    assert len({shared.layers[0].whole for shared in merge.plan.inputs}) == merge.architecture.inputs


def test_every_parameter_of_every_architecture_is_named_once(merge: Merge) -> None:
    names = [layer.weight for layer in merge.plan.layers()]
    assert len(set(names)) == len(names)
    assert len({layer.whole for layer in merge.plan.layers()}) == merge.architecture.layers
    whole = {parameter_of(name) for name in names}
    assert whole.isdisjoint(merge.plan.averaged)
    assert whole | set(merge.plan.averaged) == set(parameter_shapes(merge.base))
    assert set(merge.merged.delta) == set(parameter_shapes(merge.base))


@pytest.mark.parametrize("merge", IN_BLOCKS, indirect=True)
def test_no_gram_is_larger_than_agreed_and_blocks_are_even_and_cover_every_feature(merge: Merge) -> None:
    whole = merge_layers(merge.base)
    blocks: dict[str, list[Layer]] = {}
    for layer in merge.plan.layers():
        blocks.setdefault(layer.whole, []).append(layer)
    assert max(len(each) for each in blocks.values()) > 1
    for name, each in blocks.items():
        sizes = [layer.d_in for layer in each]
        assert max(sizes) <= LARGEST_GRAM
        assert max(sizes) - min(sizes) <= 1
        assert sum(sizes) == whole[name].d_in
        if len(each) > 1:
            taken = [layer.take(merge.deltas[0]) for layer in each]
            assert torch.cat(taken).equal(whole[name].take(merge.deltas[0]))


def test_twelve_blocks_of_bert_have_50_grams_for_74_layers() -> None:
    config = transformers.BertConfig(**{**TEXT, "num_hidden_layers": 12})
    model = transformers.BertForSequenceClassification(config).eval()
    assert len(linear_layers(model)) == 74
    assert len(find_shared_inputs(model, batch_of([text(torch.Generator())]))) == 50


@pytest.mark.parametrize("name", ["deberta", "t5 untied", "mixtral", "albert"])
def test_grams_do_not_depend_on_the_size_of_batches(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.make().eval()
    shake(model, 0.3, seed=0)
    random = torch.Generator().manual_seed(0)
    examples = [architecture.example(random) for _ in range(7)]
    plan = merge_plan(model, planned_tensors_of(model, batch_of(examples)))  # type: ignore[arg-type]
    whole, single = (
        measure_grams(model, plan, [batch_of(examples[start : start + size]) for start in range(0, 7, size)])  # type: ignore[arg-type]
        for size in (7, 1)
    )
    for input_name, gram in whole.items():
        assert gram.rows == single[input_name].rows, input_name
        torch.testing.assert_close(gram.matrix, single[input_name].matrix, rtol=1e-4, atol=1e-4)


def test_inputs_and_targets_of_one_padded_length_are_refused() -> None:
    model = ARCHITECTURES["t5 tied"].make().eval()
    tokens = torch.tensor([[5, 6, 1]])
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    plan = merge_plan(model, planned_tensors_of(model, {**batch, "decoder_input_ids": tokens}))
    batch |= {f"decoder_{name}": tensor for name, tensor in batch.items()}
    with pytest.raises(ModelError, match="one padded length, 3, so that their padding cannot be told apart"):
        measure_grams(model, plan, [batch])  # type: ignore[arg-type]


# --- biases -----------------------------------------------------------------------------------------------------------


def test_a_layer_in_blocks_has_its_bias_averaged_and_cannot_be_the_classifier_of_refit(tmp_path: Path) -> None:
    model = ARCHITECTURES["bert"].make()
    folder = save(model, tmp_path)
    wide = max(layer.d_in for layer in merge_layers(model).values())
    agreement = completed(folder, regmean=RegMeanTable(bias_feature=True, largest_gram=wide - 1))
    plan = merge_plan(model, agreement.tensors)
    split = [shared for shared in plan.inputs if shared.layers[0].features is not None]
    assert {shared.layers[0].whole for shared in split} == {
        name for name, layer in merge_layers(model).items() if layer.d_in == wide
    }
    assert not any(shared.has_constant for shared in split)
    assert any(shared.has_constant for shared in plan.inputs)
    assert len(agreement.bounds.grams) == len(plan.inputs)
    both = agreement.tensors.model_copy(update={"largest_gram": LARGEST_GRAM})
    with pytest.raises(ModelError, match="is merged in blocks of its inputs, so its bias cannot be merged with it"):
        merge_plan(model, both)
    with pytest.raises(ModelError, match=r"merged as a whole \(regmean.largest_gram\), which refit"):
        completed(folder, method="refit", regmean=RegMeanTable(largest_gram=LARGEST_GRAM))


def test_bounds_of_another_plan_are_refused(tmp_path: Path) -> None:
    model = ARCHITECTURES["bert"].make()
    agreement = completed(save(model, tmp_path))
    other = agreement.tensors.model_copy(update={"largest_gram": LARGEST_GRAM})
    with pytest.raises(SettingsError, match=r"bounds\.grams has 9 values, but the base model's tensors make 18 Grams"):
        agreement.merge_settings(merge_plan(model, other))


@pytest.mark.parametrize("name", ["bert", "gpt2", "qwen2"])
def test_biases_are_solved_as_weights_of_a_constant_input(name: str, tmp_path: Path) -> None:
    model = ARCHITECTURES[name].make()
    agreement = completed(save(model, tmp_path), regmean=RegMeanTable(bias_feature=True))
    plan = merge_plan(model, agreement.tensors)
    with_constant = [shared for shared in plan.inputs if shared.has_constant]
    assert len(with_constant) == {"bert": 9, "gpt2": 7, "qwen2": 1}[name]
    biases = {layer.bias for shared in with_constant for layer in shared.layers}
    assert biases.isdisjoint(agreement.tensors.averaged)
    assert biases <= set(agreement.tensors_by_name())
    assert sorted(agreement.tensors_by_name()) == sorted(parameter_shapes(model))

    random = torch.Generator().manual_seed(0)
    examples = [text(random) for _ in range(7)]
    grams = measure_grams(model.eval(), plan, [batch_of(examples)])  # type: ignore[arg-type]
    rows = explicit_rows(model, examples)
    for shared, bound in zip(plan.inputs, agreement.bounds.grams, strict=True):
        explicit = rows[shared.layers[0].weight]
        if shared.has_constant:
            explicit = torch.cat([explicit, torch.ones(len(explicit), 1)], dim=1)
        assert explicit.shape[1] == shared.gram_size
        torch.testing.assert_close(grams[shared.name].matrix.float(), explicit.T @ explicit, rtol=1e-4, atol=1e-4)
        assert grams[shared.name].matrix.abs().max() < 7 * bound


def test_a_bias_stays_averaged_if_a_layer_of_the_same_input_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_one_bias(*_: object) -> nn.Module:
        model = tiny_bert()
        model.bert.encoder.layer[1].attention.self.value = nn.Linear(16, 16, bias=False)
        return model

    folder = save(tiny_bert(), tmp_path)
    monkeypatch.setattr("deploy.complete.load_base", without_one_bias)
    tensors = completed(folder, regmean=RegMeanTable(bias_feature=True)).tensors
    prefix = "bert.encoder.layer.1.attention.self"
    group = tuple(f"{prefix}.{name}.weight" for name in ("query", "key", "value"))
    biases = tuple(f"{prefix}.{name}.bias" for name in ("query", "key"))
    assert group in tensors.merged
    assert set(biases) <= set(tensors.averaged)
    for wrong in (biases, biases[:1]):
        rest = tuple(name for name in parameter_shapes(without_one_bias()) if name not in group + wrong)
        with pytest.raises(ModelError, match="either all layers have a bias or none"):
            merge_plan(without_one_bias(), PlannedTensors(merged=((*group, *wrong),), averaged=rest, left_alone=()))


# --- layers merged by their changes alone -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("bert.encoder.layer.0.attention.self", 3),  # which is averaged otherwise
        ("*.attention.self.query.weight", 2),
        ("bert.encoder.layer.1.intermediate.dense.weight", 1),
        ("bert", 13),
    ],
)
def test_data_free_layers_are_named_by_name_beginning_or_pattern(pattern: str, count: int, tmp_path: Path) -> None:
    agreement = completed(
        save(tiny_bert(), tmp_path), regmean=RegMeanTable(data_free_layers=(pattern,), bias_feature=True)
    )
    tensors = agreement.tensors
    assert len(tensors.data_free) == count
    assert sorted(agreement.tensors_by_name()) == sorted(parameter_shapes(tiny_bert()))
    plan = merge_plan(tiny_bert(), tensors)
    assert [layer.weight for layer in plan.data_free] == list(tensors.data_free)
    assert len(plan.linear_layers) == 14


def test_fused_experts_are_data_free_together(tmp_path: Path) -> None:
    experts = "model.layers.1.mlp.experts"
    folder = save(ARCHITECTURES["mixtral"].make(), tmp_path)
    tensors = completed(folder, regmean=RegMeanTable(data_free_layers=(experts,))).tensors
    assert set(tensors.data_free) == {
        f"{experts}.{name}[{i}]" for name in ("gate_up_proj", "down_proj") for i in range(4)
    }
    assert f"{experts}.gate_up_proj" not in tensors.averaged


def test_a_pattern_that_names_no_layer_is_refused(tmp_path: Path) -> None:
    folder = save(tiny_bert(), tmp_path)
    for pattern in ("bert.encoder.lay", "*.LayerNorm.weight"):
        with pytest.raises(SettingsError, match=r"data_free_layers: .* names no linear layer's weight") as caught:
            completed(folder, regmean=RegMeanTable(data_free_layers=(pattern,)))
        assert pattern in str(caught.value)


@pytest.mark.parametrize("method", ["regmean", "refit", "logit_adjusted"])
def test_layers_that_see_one_row_an_example_are_data_free_if_owners_may_lack_examples(
    method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A pooler and a classifier of 16 inputs each. A classifier that a method fits stays."""
    folder = save(tiny_bert(), tmp_path)
    caplog.set_level("INFO", "amalgram.draft")
    pooled = ("bert.pooler.dense.weight", *(() if method == "refit" else ("classifier.weight",)))
    few = completed(folder, method=method, regmean=RegMeanTable(measured_examples=63))
    assert few.tensors.data_free == pooled
    assert ("bert.pooler.dense, classifier" in caplog.text) == (method == "regmean")  # others measure none
    assert classifier(merge_plan(tiny_bert(), few.tensors)).parameters == ("classifier.weight", "classifier.bias")
    enough = completed(folder, method=method, regmean=RegMeanTable(measured_examples=64))
    assert enough.tensors.data_free == ()
    strict = completed(folder, method=method, min_rows_per_dimension=100.0)  # 100 * 16 * 4 > 1000
    assert strict.tensors.data_free == pooled
    careless = completed(folder, method=method, regmean=RegMeanTable(measured_examples=1), min_rows_per_dimension=0.0)
    assert careless.tensors.data_free == ()


def test_a_refit_needs_a_measured_classifier_and_logit_adjustment_none(tmp_path: Path) -> None:
    folder, table = save(tiny_bert(), tmp_path), RegMeanTable(data_free_layers=("classifier",))
    with pytest.raises(ModelError, match="has no shared classifier that is fed one row per prediction"):
        completed(folder, method="refit", regmean=table)
    assert "classifier.weight" in completed(folder, method="logit_adjusted", regmean=table).tensors.data_free


def test_named_layers_and_those_of_few_rows_are_data_free_together(tmp_path: Path) -> None:
    table = RegMeanTable(data_free_layers=("bert.pooler", "*.layer.1.output.dense"), measured_examples=10)
    tensors = completed(save(tiny_bert(), tmp_path), regmean=table).tensors
    assert tensors.data_free == (
        "bert.encoder.layer.1.output.dense.weight",
        "bert.pooler.dense.weight",
        "classifier.weight",
    )


# --- layers that are left alone ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias_feature", [False, True])
def test_what_no_pattern_names_is_neither_measured_nor_averaged(bias_feature: bool, tmp_path: Path) -> None:
    patterns = ("*.query", "*.value.weight", "classifier")
    agreement = completed(
        save(tiny_bert(), tmp_path), merge=Merging(layers=patterns), regmean=RegMeanTable(bias_feature=bias_feature)
    )
    tensors = agreement.tensors
    attention = "bert.encoder.layer.1.attention.self"
    # A value's bias is left alone, so that group's biases cannot be solved; the key, which shares their input, is not
    # in it. The first block's input depends on the token alone, so it is averaged.
    biases = ("classifier.bias",) if bias_feature else ()
    assert tensors.merged == (
        (f"{attention}.query.weight", f"{attention}.value.weight"),
        ("classifier.weight", *biases),
    )
    averaged = {name for name in tensors.averaged if not name.startswith("bert.encoder.layer.1")}
    assert averaged == {
        f"bert.encoder.layer.0.attention.self.{name}" for name in ("query.weight", "query.bias", "value.weight")
    } | ({"classifier.bias"} - set(biases))
    assert f"{attention}.key.weight" in tensors.left_alone
    assert sorted(agreement.tensors_by_name()) == sorted(parameter_shapes(tiny_bert()))
    layout = contribution_layout(agreement.methods, agreement.merge_settings(merge_plan(tiny_bert(), tensors)))
    assert not [entry.name for entry in layout.entries if re.search("key|LayerNorm|embeddings", entry.name)]


def test_a_pattern_that_names_no_parameter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"merge\.layers: 'quer' names no parameter of the base model"):
        completed(save(tiny_bert(), tmp_path), merge=Merging(layers=("*.query", "quer")))


# --- tied heads -------------------------------------------------------------------------------------------------------


def test_a_tied_head_is_averaged_with_its_embedding_and_an_untied_one_is_merged() -> None:
    for name, in_a_group in (("t5 tied", False), ("t5 untied", True)):
        model = ARCHITECTURES[name].make()
        assert ("lm_head.weight" in merge_layers(model)) == in_a_group
        assert ("lm_head.weight" in parameter_shapes(model)) == in_a_group


def test_a_weight_that_two_layers_share_is_averaged_whatever_its_name() -> None:
    model = nn.ModuleDict({"a_head": nn.Linear(4, 5, bias=False), "embedding": nn.Embedding(5, 4)})
    model["a_head"].weight = model["embedding"].weight
    assert merge_layers(model) == {}
    assert list(parameter_shapes(model)) == ["a_head.weight"]


# --- mixtures of experts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", ["qwen2 moe"], indirect=True)
def test_an_expert_that_no_token_reached_keeps_the_base_and_is_reported_as_empty(merge: Merge) -> None:
    notes = {note.name: note for note in merge.merged.layers}
    idle = [shared for shared in merge.plan.inputs if shared.name.endswith("_proj[3]")]
    assert len(idle) == 4
    for shared in idle:
        assert (notes[shared.name].status, notes[shared.name].rows) == ("empty", 0)
        assert not shared.layers[0].take(merge.merged.delta).any()
        assert any(note.startswith(f"{shared.name}: empty") for note in merge.merged.notes)


class Transposed(nn.Module):
    """Experts that are stored input first and have biases, as in GPT-OSS."""

    def __init__(self) -> None:
        super().__init__()
        self.is_transposed, self.has_bias, self.has_gate = True, True, False
        self.up_proj, self.up_proj_bias = nn.Parameter(torch.randn(2, 3, 4)), nn.Parameter(torch.randn(2, 4))
        self.down_proj, self.down_proj_bias = nn.Parameter(torch.randn(2, 4, 3)), nn.Parameter(torch.randn(2, 3))
        self.act_fn = torch.tanh
        self._apply_gate = None

    def forward(self, hidden: Tensor, chosen: Tensor) -> None:
        pass


def test_experts_that_are_stored_input_first_with_biases_are_read_that_way() -> None:
    model = nn.ModuleDict({"experts": Transposed()})
    experts = model["experts"]
    model.forward = lambda x, chosen: experts(x, chosen)  # type: ignore[method-assign]
    merged = tuple((f"experts.{name}[{index}]",) for name in ("up_proj", "down_proj") for index in range(2))
    averaged = ("experts.up_proj_bias", "experts.down_proj_bias")
    plan = merge_plan(model, PlannedTensors(merged=merged, averaged=averaged, left_alone=()))
    assert [(layer.d_in, layer.d_out) for layer in plan.layers()] == [(3, 4), (3, 4), (4, 3), (4, 3)]
    x = torch.randn(5, 3)
    grams = measure_grams(model, plan, [{"x": x, "chosen": torch.tensor([[0], [1], [1], [0], [1]])}])  # type: ignore[arg-type]
    inner = torch.tanh(x[[1, 2, 4]] @ experts.up_proj[1] + experts.up_proj_bias[1]).detach()
    assert grams["experts.down_proj[1]"].rows == 3
    torch.testing.assert_close(grams["experts.down_proj[1]"].matrix.float(), inner.T @ inner)


# --- completing a draft -----------------------------------------------------------------------------------------------


def save(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer = reviews.make_tokenizer()
    tokenizer.eos_token = tokenizer.sep_token
    tokenizer.save_pretrained(folder)
    return folder


def completed(
    folder: Path,
    kind: str = "text-classification",
    regmean: RegMeanTable | None = None,
    method: str = "regmean",
    merge: Merging | None = None,
    **privacy: float,
) -> Agreement:
    draft = AgreementDraft(
        title="t",
        base=str(folder),
        owners=tuple(OwnerEntry(name=name) for name in ("ada", "bea", "cyd")),
        task=Task(kind=kind, labels=("a", "b", "c"), max_tokens=16),  # type: ignore[arg-type]
        privacy=Privacy(**privacy),
        method=method,
        merge=merge or Merging(),
        regmean=regmean or RegMeanTable(),  # type: ignore[call-arg]
    )
    return complete_agreement(draft, folder, {name: each.public_key for name, each in IDENTITIES.items()})


FIRST_ATTENTION = {
    "bert": ["bert.encoder.layer.0.attention.self.{}.weight", "query", "key", "value"],
    "distilbert": ["distilbert.transformer.layer.0.attention.{}.weight", "q_lin", "k_lin", "v_lin"],
    "deberta": ["deberta.encoder.layer.0.attention.self.{}.weight", "query_proj", "key_proj", "value_proj"],
    "gpt2": ["transformer.h.0.attn.{}.weight", "c_attn"],
    "qwen2": ["model.layers.0.self_attn.{}.weight", "q_proj", "k_proj", "v_proj"],
    "t5 classifier": [
        "transformer.{}.weight",
        *(f"{s}.block.0.layer.0.SelfAttention.q" for s in ("encoder", "decoder")),
    ],
    "mixtral": ["model.layers.0.self_attn.{}.weight", "q_proj", "k_proj", "v_proj"],
}


@pytest.mark.parametrize("name", [*FIRST_ATTENTION, "roberta", "albert", "vit", "clip", "qwen2 moe"])
def test_a_draft_is_completed_on_every_architecture(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.make()
    model.config.eos_token_id = reviews.make_tokenizer().sep_token_id  # type: ignore[union-attr]
    kind = "image-classification" if architecture.example is image else "text-classification"
    agreement = completed(save(model, tmp_path), kind)
    merged = {weight for group in agreement.tensors.merged for weight in group}
    assert len(merged) >= 2
    assert merged | set(agreement.tensors.averaged) == set(parameter_shapes(model))
    template, *layers = FIRST_ATTENTION.get(name, [""])
    assert {template.format(layer) for layer in layers} <= set(agreement.tensors.averaged)
    assert not {template.format(layer).replace(".0.", ".1.", 1) for layer in layers} & set(agreement.tensors.averaged)


def test_experts_are_merged_only_if_the_agreement_says_so(tmp_path: Path) -> None:
    folder = save(ARCHITECTURES["mixtral"].make(), tmp_path)
    off, on = (completed(folder, merge_routed_inputs=merge) for merge in (False, True))
    fused = {f"model.layers.{block}.mlp.experts.{name}" for block in (0, 1) for name in ("gate_up_proj", "down_proj")}
    assert fused <= set(off.tensors.averaged)
    slices = {f"{name}[{expert}]" for name in fused for expert in range(4)}
    assert slices <= {weight for group in on.tensors.merged for weight in group}
    assert all(bound > 0 for bound in on.bounds.grams)


class SwitchBlock(nn.Module):
    """A feed-forward block of experts that are modules of their own, fed only the tokens that are routed to them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, hidden: Tensor) -> Tensor:
        chosen = (hidden[..., 0] > hidden[..., 0].mean()).long()
        result = torch.zeros_like(hidden)
        for index, expert in enumerate(self.experts):
            result[chosen == index] = expert(hidden[chosen == index])
        return result


def test_experts_that_are_modules_of_their_own_are_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_experts(folder: Path, *_: object) -> nn.Module:
        model = tiny_bert()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model.bert.encoder.layer[1].intermediate = nn.Sequential(nn.Linear(16, 8), SwitchBlock(), nn.Linear(8, 24))
        return model.eval()

    folder = save(tiny_bert(), tmp_path)
    monkeypatch.setattr("deploy.complete.load_base", with_experts)
    tensors = completed(folder, merge_routed_inputs=True).tensors
    block = "bert.encoder.layer.1.intermediate"
    assert {f"{block}.1.experts.{index}.weight" for index in (0, 1)} <= set(tensors.averaged)
    assert {(f"{block}.0.weight",), (f"{block}.2.weight",)} <= set(tensors.merged)
