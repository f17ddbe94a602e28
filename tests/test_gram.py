"""Grams against explicit token rows; shared inputs seen by identity; padding is not counted."""

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertForSequenceClassification,
    DynamicCache,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from client.measurement.gram import find_shared_inputs, measure_grams
from common.agreement import Agreement
from common.errors import ModelError
from common.models.layers import Layer, linear_layers
from common.models.parameters import parameter_shapes
from common.models.plan import MergePlan, PlannedTensors, SharedInput, merge_plan
from tests.support.architectures import made
from tests.support.models import plan_for, tiny_bert
from tests.support.rows import batch_of


def explicit_rows(model: nn.Module, batch: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The slow way: one unpadded example at a time, with every input row of one layer kept."""
    rows: list[torch.Tensor] = []
    hook = linear_layers(model)[name].register_forward_pre_hook(
        lambda _, args: rows.append(args[0].reshape(-1, args[0].shape[-1]).double())
    )
    with torch.no_grad():
        for tokens, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
            model(input_ids=tokens[mask][None], attention_mask=torch.ones_like(tokens[mask])[None])
    hook.remove()
    return torch.cat(rows)


def test_grams_equal_explicit_rows_without_padding(plan: MergePlan) -> None:
    model = tiny_bert()
    batches = [batch_of([3, 7, 5], 7), batch_of([2, 9], 9, seed=1)]
    grams = measure_grams(model, plan, batches)
    for shared in plan.inputs:
        rows = torch.cat([explicit_rows(model, batch, shared.name) for batch in batches])
        assert grams[shared.name].rows == len(rows)
        torch.testing.assert_close(grams[shared.name].matrix, rows.T @ rows, rtol=1e-5, atol=1e-5)


def test_float64_across_blocks_keeps_what_bfloat16_loses() -> None:
    """A Gram kept in bfloat16 drifts from explicit float64 rows, because a block is soon less than its last digit."""
    layer = nn.Sequential(nn.Linear(8, 3))
    weight = Layer(weight="0.weight", d_in=8, d_out=3, stored_input_first=False)
    shared = SharedInput(name="0", d_in=8, layers=(weight,))
    plan = MergePlan(
        inputs=(shared,),
        data_free=(),
        linear_layers=(weight,),
        averaged=("0.bias",),
        left_alone=(),
        shapes=parameter_shapes(layer),
    )
    rows = torch.randn(8192, 8, generator=torch.Generator().manual_seed(0))
    oracle = rows.double().T @ rows.double()

    gram = measure_grams(layer, plan, [{"input": block} for block in rows.split(16)])["0"]  # type: ignore[arg-type]
    naive = torch.zeros(8, 8, dtype=torch.bfloat16)
    for block in rows.bfloat16().split(16):
        naive += block.T @ block
    assert gram.rows == 8192
    assert (gram.matrix - oracle).norm() < 1e-6 * oracle.norm()
    assert (naive.double() - oracle).norm() > 1e-2 * oracle.norm()


def test_padding_changes_neither_grams_nor_counts(plan: MergePlan) -> None:
    narrow, wide = batch_of([3, 5], 5), batch_of([3, 5], 12)
    wide["input_ids"][:, :5] = narrow["input_ids"]
    one, other = (measure_grams(tiny_bert(), plan, [batch]) for batch in (narrow, wide))
    for name, gram in one.items():
        assert gram.rows == other[name].rows
        torch.testing.assert_close(gram.matrix, other[name].matrix, rtol=1e-4, atol=1e-5)


def test_query_key_and_value_share_one_gram(agreement: Agreement) -> None:
    groups = agreement.tensors.merged
    prefix = "bert.encoder.layer.1.attention.self"
    assert (f"{prefix}.query.weight", f"{prefix}.key.weight", f"{prefix}.value.weight") in groups
    # per block: attention input, attention output, feed-forward input and output; then pooler and classifier;
    # the first block's attention input depends only on a token and its position, and is averaged
    assert len(groups) == 4 * 2 + 2 - 1
    assert sum(map(len, groups)) == 6 * 2 + 2 - 3


def test_the_plan_names_every_parameter_once(agreement: Agreement) -> None:
    assert sorted(agreement.tensors_by_name()) == sorted(parameter_shapes(tiny_bert()))


def test_a_vision_transformer_shares_inputs_too() -> None:
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    groups = find_shared_inputs(ViTForImageClassification(config), {"pixel_values": torch.zeros(2, 3, 8, 8)})
    assert [len(group) for group in groups] == [3, 1, 1, 1, 1]


def test_a_conv1d_layer_is_stored_input_first() -> None:
    config = GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2, n_positions=16, num_labels=3, pad_token_id=0)
    model = GPT2ForSequenceClassification(config).eval()
    plan = plan_for(model, batch_of([4, 6], 6))
    layers = {layer.weight: layer for layer in plan.layers()}
    fused = layers["transformer.h.0.attn.c_attn.weight"]
    assert (fused.d_in, fused.d_out, fused.stored_input_first) == (8, 24, True)
    assert not layers["score.weight"].stored_input_first


def test_layers_that_do_not_share_an_input_are_refused_a_common_gram(agreement: Agreement) -> None:
    model = tiny_bert()
    prefix = "bert.encoder.layer"
    wrong = (f"{prefix}.0.attention.self.query.weight", f"{prefix}.1.attention.self.query.weight")
    rest = tuple(name for name in parameter_shapes(model) if name not in wrong)
    plan = merge_plan(model, PlannedTensors(merged=(wrong,), averaged=rest, left_alone=()))
    with pytest.raises(ModelError, match=r"layer\.1\.attention\.self\.query was fed another input"):
        measure_grams(model, plan, [batch_of([4], 4)])


def test_sums_over_many_batches_are_float64() -> None:
    # float32 cannot hold 2^24 + 1, so a sum kept in float32 would stop growing there.
    class Ones(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    model = Ones()
    plan = merge_plan(model, PlannedTensors(merged=(("layer.weight",),), averaged=(), left_alone=()))
    batches = [{"x": torch.full((1, 1), 4096.0)}, {"x": torch.ones(1, 1)}]
    grams = measure_grams(model, plan, batches)  # type: ignore[arg-type]
    assert grams["layer"].matrix.item() == 2**24 + 1


def test_measuring_leaves_no_hook_behind(plan: MergePlan) -> None:
    model = tiny_bert()
    measure_grams(model, plan, [batch_of([4], 4)])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_forward_pass_ends_before_a_head_that_is_not_measured() -> None:
    """A tied head over the vocabulary has no Gram, and is the most expensive layer of a small language model."""
    config = GPT2Config(vocab_size=50, n_embd=8, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    batches = [batch_of([4, 6], 6), batch_of([5, 3], 5, seed=1), batch_of([7], 7, seed=2)]
    plan = plan_for(model, batches[0])
    heads: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda *_: heads.append(1))
    together = measure_grams(model, plan, batches)
    assert not heads
    hook.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())
    for shared in plan.inputs:
        rows = torch.cat([explicit_rows(model, batch, shared.name) for batch in batches])
        assert together[shared.name].rows == len(rows) == 25
        torch.testing.assert_close(together[shared.name].matrix, rows.T @ rows, rtol=1e-5, atol=1e-5)


class EagerHead(GPT2LMHeadModel):
    """Calls its head on the embeddings first, as models with early exits do, and at the end token by token."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        first = self.lm_head(self.transformer.wte(input_ids))
        hidden = self.transformer(input_ids, attention_mask=attention_mask).last_hidden_state
        return first + torch.cat([self.lm_head(token) for token in hidden.split(1, dim=1)], dim=1)


@pytest.mark.parametrize("tied", [True, False], ids=["not measured", "measured"])
def test_a_pass_with_a_head_that_is_called_several_times_loses_no_rows(tied: bool) -> None:
    config = GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    config.tie_word_embeddings = tied
    model = EagerHead(config).eval()
    batches = [batch_of([4, 4], 4), batch_of([3], 3, seed=1)]
    grams = measure_grams(model, plan_for(model, batches[0]), batches)
    assert {gram.rows for name, gram in grams.items() if name != "lm_head"} == {11}
    assert tied or grams["lm_head"].rows == 2 * 11


def test_a_layer_that_is_called_repeatedly_has_all_its_rows() -> None:
    config = AlbertConfig(
        vocab_size=50,
        embedding_size=4,
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
    )
    model = AlbertForSequenceClassification(config).eval()
    batches = [batch_of([4, 6], 6), batch_of([5, 3], 5, seed=1)]
    grams = measure_grams(model, plan_for(model, batches[0]), batches)
    assert max(gram.rows for gram in grams.values()) == 3 * 18


def test_a_layer_that_is_fed_long_batches_in_pieces_has_all_its_rows() -> None:
    """A feed-forward in chunks of 4 tokens is the last merged layer; pooler and classifier are not merged."""
    config = tiny_bert().config
    config.chunk_size_feed_forward = 4
    model = BertForSequenceClassification(config).eval()
    batches = [batch_of([4, 4], 4), batch_of([8, 8], 8, seed=1), batch_of([8], 8, seed=2)]
    plan = plan_for(model, batches[0], within="encoder")
    together = measure_grams(model, plan, batches)
    alone = [measure_grams(model, plan, [batch]) for batch in batches]
    for name, gram in together.items():
        assert gram.rows == 32, name
        torch.testing.assert_close(gram.matrix, sum(each[name].matrix for each in alone), rtol=0, atol=0)


def test_grams_are_exactly_symmetric(plan: MergePlan) -> None:
    for gram in measure_grams(tiny_bert(), plan, [batch_of([3, 7, 5], 7), batch_of([2, 9], 9, seed=1)]).values():
        assert torch.equal(gram.matrix, gram.matrix.T)


def test_a_pass_keeps_no_keys_and_values_for_texts_that_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan, (batch, _) = made("llama")
    assert model.config.use_cache
    with torch.inference_mode():
        assert model(**batch).past_key_values is not None  # the model on its own keeps them
    updates: list[object] = []
    monkeypatch.setattr(DynamicCache, "update", lambda *arguments: updates.append(arguments))
    measure_grams(model, plan, [batch])
    assert updates == []
    assert model.config.use_cache  # as the model's folder says
