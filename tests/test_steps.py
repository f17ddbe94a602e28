"""Multi-round methods: blocks run one after the other equal the whole model; every step against a slow oracle."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from client.data.rows import Rows
from client.measurement import blocks as block_stream
from client.measurement.block_steps import load_merged_so_far, measure_inputs, modules_from
from client.measurement.blocks import BlockStream, check_blocks
from client.measurement.classifier_inputs import measure_classifier
from client.measurement.disk_model import DiskModel
from client.measurement.gram import GramCollector, find_shared_inputs, layer_inputs
from common.agreement import Agreement, AgreementDraft, OwnerEntry
from common.errors import DataError, ModelError
from common.identity import Identity
from common.merge_methods.refit import REFIT, RefitTable, class_weights, classifier
from common.merge_methods.regmean_plus_plus import REGMEAN_PLUS_PLUS
from common.merge_methods.terms import MergeSettings, OwnerTerms
from common.models.layers import block_names
from common.models.plan import MergePlan
from deploy.example.reviews import make_tokenizer
from tests.support.errors import refused
from tests.support.models import tiny_bert
from tests.support.sums import run, terms_of

TEXT = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}


def deberta() -> PreTrainedModel:
    config = DebertaV2Config(
        **TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=4, share_att_key=True
    )
    return DebertaV2ForSequenceClassification(config)


def vit() -> PreTrainedModel:
    sizes = {name: value for name, value in TEXT.items() if name != "vocab_size"}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": tiny_bert,
    "gpt2": lambda: GPT2ForSequenceClassification(
        GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=16, pad_token_id=0)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TEXT, num_key_value_heads=1)),
    "deberta": deberta,
    "vit": vit,
}


def made(name: str, seed: int = 0) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name]().eval()


def batches_for(model: PreTrainedModel) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(1)
    if "pixel_values" in model.main_input_name:
        return [{"pixel_values": torch.randn(count, 1, 8, 8, generator=random)} for count in (3, 2)]
    batches = []
    for lengths in ([3, 5, 2], [7, 4]):
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        tokens = torch.randint(1, 50, mask.shape, generator=random)
        batches.append({"input_ids": tokens * mask, "attention_mask": mask.long()})
    return batches


@pytest.mark.parametrize("name", MODELS)
def test_a_model_run_block_by_block_feeds_its_blocks_what_it_feeds_them_in_one_go(name: str, tmp_path: Path) -> None:
    model = made(name)
    blocks = block_names(model)
    batches = batches_for(model)
    check_blocks(model, blocks, batches[0])
    expected: dict[str, list[Tensor]] = {block: [] for block in blocks}
    handles = [
        model.get_submodule(block).register_forward_pre_hook(
            lambda _, args, block=block: expected[block].append(args[0].clone())
        )
        for block in blocks
    ]
    with torch.inference_mode():
        logits = [model(**batch).logits for batch in batches]
    for handle in handles:
        handle.remove()
    stream = BlockStream(tmp_path / "stream", blocks)
    for block in range(len(blocks)):
        with stream.advancing(model, batches, block, keep=block) as run_batch:
            for number in range(len(batches)):
                run_batch(number)
        assert stream.reached == block
        for number in range(len(batches)):
            kept = torch.from_numpy(np.load(tmp_path / "stream" / str(block) / f"{number}.npy"))
            torch.testing.assert_close(kept, expected[blocks[block]][number])
    seen: list[Tensor] = []
    last = model.register_forward_hook(lambda _, __, output: seen.append(output.logits))
    with stream.advancing(model, batches, None, keep=None) as run_batch:
        for number in range(len(batches)):
            run_batch(number)
    last.remove()
    for found, wanted in zip(seen[-len(batches) :], logits, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_was_run_block_by_block_leaves_the_disk_with_its_last_user(name: str, tmp_path: Path) -> None:
    """Not only when the garbage collector finds it: in a simulation, other owners need that room meanwhile."""
    model = DiskModel(made(name), tmp_path)
    batches = batches_for(model.model)
    stream = BlockStream(tmp_path / "stream", block_names(model.model))
    gc.collect()
    gc.disable()
    try:
        for block in range(len(stream.blocks)):
            with stream.advancing(model.model, batches, block, keep=block) as run_batch:
                run_batch(0)
        mapped = [weakref.ref(parameter) for parameter in model.model.parameters()]
        del model, run_batch
        assert [each for each in mapped if each() is not None] == []
    finally:
        gc.enable()


def test_models_that_are_not_a_single_chain_of_blocks_are_refused() -> None:
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2))
    albert = AlbertForSequenceClassification(AlbertConfig(**TEXT, embedding_size=8))
    for model in (t5, albert):
        with pytest.raises(ModelError, match=r"is not one chain|do not run once each"):
            check_blocks(model, block_names(model), batches_for(made("bert"))[0])


def test_an_owner_without_room_for_activations_says_so_before_anything_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_stream.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    model = made("bert")
    stream = BlockStream(tmp_path / "stream", block_names(model))
    with (
        pytest.raises(DataError, match=r"MB are free, the activations between two steps need .* nothing has left"),
        stream.advancing(model, batches_for(model), 0, keep=0) as run_batch,
    ):
        run_batch(0)


@pytest.fixture
def merge_settings(agreement: Agreement, plan: MergePlan) -> MergeSettings:
    return agreement.merge_settings(plan)


def test_each_step_s_grams_are_of_merged_blocks_before_it_and_own_layers_in_it(
    merge_settings: MergeSettings, tmp_path: Path
) -> None:
    plan, steps = merge_settings.plan, REGMEAN_PLUS_PLUS.steps(merge_settings)
    own, merged = made("bert", seed=2), made("bert", seed=3)
    batches = batches_for(own)
    done: list[str] = []
    for step in steps:
        done += REGMEAN_PLUS_PLUS.merged_names(merge_settings, step.number - 1)
        stream, oracle = made("bert", seed=2), made("bert", seed=2)
        load_merged_so_far(stream, dict(merged.named_parameters()), done, modules_from(plan, steps, step))
        folder = tmp_path / "activations"
        grams = measure_inputs(stream, plan, step.inputs, step.block, batches, folder, keep=step.block)
        assert set(grams) == {shared.name for shared in step.inputs}
        # The oracle: whole forward passes of a model whose earlier modules are simply the merged ones.
        from_merged = dict(merged.named_parameters())
        blocks_ahead = [] if step.block is None else plan.blocks[step.block :]
        layers_ahead = [shared.name for later in steps[step.number - 1 :] for shared in later.inputs]
        ahead = tuple(f"{module}." for module in (*blocks_ahead, *layers_ahead))
        with torch.no_grad():
            for name, parameter in oracle.named_parameters():
                if name in done and not name.startswith(ahead):
                    parameter.copy_(from_merged[name])
        part = replace(plan, inputs=step.inputs)
        collector = GramCollector(part)
        with layer_inputs(oracle, collector.observe, {layer.weight for layer in part.layers()}), torch.no_grad():
            for batch in batches:
                collector.start_batch(batch)
                oracle(**batch)
        for name, gram in collector.grams().items():
            assert gram.rows == grams[name].rows
            torch.testing.assert_close(grams[name].matrix, gram.matrix, rtol=1e-5, atol=1e-5)


def test_the_steps_of_a_model_name_every_merged_input_once(merge_settings: MergeSettings) -> None:
    of_blocks = REGMEAN_PLUS_PLUS.steps(merge_settings)
    assert [step.block for step in of_blocks] == [0, 1, None, None]
    inputs = [shared.name for shared in merge_settings.plan.inputs]
    assert [shared.name for step in of_blocks for shared in step.inputs] == inputs
    assert [step.inputs[0].name for step in REFIT.steps(merge_settings)] == ["classifier"]


def labelled(count: int, seed: int) -> Rows:
    random = np.random.default_rng(seed)
    features = tuple({"input_ids": random.integers(1, 50, 6).tolist(), "attention_mask": [1] * 6} for _ in range(count))
    return Rows(features=features, targets=random.integers(0, 3, count), tokenizer=make_tokenizer())


@pytest.mark.parametrize("targets", ["labels", "scores"])
def test_the_refitted_classifier_is_the_pooled_weighted_ridge_regression(
    agreement: Agreement, plan: MergePlan, targets: str, tmp_path: Path
) -> None:
    balance = 0.5 if targets == "labels" else None
    table = RefitTable(targets=targets, balances=(0.5,))  # type: ignore[arg-type]
    settings = agreement.model_copy(update={"refit": table}).merge_settings(plan)
    (step,) = REFIT.steps(settings)
    layout = REFIT.step_layout(settings, step)
    base, merged = made("bert"), made("bert", seed=9)
    before = {name: parameter.detach() for name, parameter in base.named_parameters()}
    terms, vectors = {}, {}
    for index, (name, count) in enumerate((("ada", 30), ("bea", 25), ("cyd", 40))):
        own = DiskModel(made("bert", seed=index + 1), tmp_path)
        rows_of_owner = labelled(count, index)
        measured = measure_classifier(before, own, DiskModel(merged, tmp_path), classifier(plan), rows_of_owner, 8)
        terms[name] = OwnerTerms(examples=count, delta={}, classifier=measured)
        vectors[name] = np.zeros(layout.size)
        layout.flatten(REFIT.step_contribution(settings, step, terms[name]), vectors[name])
    identities = {name: Identity(name=name, seed=name.encode().ljust(32)) for name in terms}
    total = run("plain", identities, terms_of(identities, layout), vectors)
    result = REFIT.solve_step(settings, step, total, balance)

    rows, wanted, ridge, sizes = [], [], torch.zeros(()).double(), torch.zeros(()).double()
    start = torch.cat([base.classifier.weight.T, base.classifier.bias[None]]).detach().double()
    for owner in terms.values():
        own_terms = owner.classifier
        assert own_terms is not None
        weights = torch.ones(len(own_terms.targets)).double()
        if targets == "labels":
            shares = torch.bincount(own_terms.targets).double() / len(own_terms.targets)
            weights = shares[own_terms.targets] ** -0.5
            weights *= len(weights) / weights.sum()
        root = weights.sqrt()[:, None]
        onehot = torch.eye(3).double()[own_terms.targets] - 1 / 3
        rows.append(root * own_terms.features)
        wanted.append(root * (onehot if targets == "labels" else own_terms.scores))
        ridge = ridge + 1e-2 * (rows[-1] ** 2).sum() / own_terms.features.shape[1]
        least = 2.0**-10 * len(weights) * 2 / 3  # of the targets' squared size, as scores of untrained models are small
        sizes = sizes + (weights * own_terms.scores.var(dim=1, correction=0) * 3).sum().clamp(min=least)
    x, y = torch.cat(rows), torch.cat(wanted)
    anchor = torch.zeros_like(start) if targets == "labels" else start
    penalty = ridge.sqrt() * torch.eye(x.shape[1]).double()
    expected = torch.linalg.lstsq(torch.cat([x, penalty]), torch.cat([y, penalty @ anchor])).solution
    if targets == "labels":
        fitted = (expected * (x.T @ y)).sum()
        expected = expected * (sizes / (fitted + 2.0**-10 * 95 * 2 / 3)).sqrt()
    found = start + torch.cat([result.delta["classifier.weight"].T, result.delta["classifier.bias"][None]]).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert result.layers[0].rows == 95


def test_rare_classes_do_not_get_unbounded_weight() -> None:
    weights = class_weights(torch.tensor([0] * 99 + [1]), balance=1.0)
    assert float(weights.sum()) == pytest.approx(100)
    assert float(weights[-1] / weights[0]) == pytest.approx(33)  # as if its class had three rows


def test_multi_round_methods_need_all_owners() -> None:
    owners = tuple(OwnerEntry(name=name) for name in ("ada", "bea", "cyd", "dan", "eva"))
    with refused("rounds over different owners would expose the difference", hint="all 5 owners must take part"):
        AgreementDraft(title="t", base="b", owners=owners, min_owners=4, method="regmean_plus_plus")


def test_find_shared_inputs_sees_the_same_groups_when_blocks_were_run_before(tmp_path: Path) -> None:
    model = made("bert")
    batch = batches_for(model)[0]
    before = find_shared_inputs(model, batch)
    with BlockStream(tmp_path / "s", block_names(model)).advancing(model, [batch], 0, keep=0) as run_batch:
        run_batch(0)
    assert find_shared_inputs(model, batch) == before
