"""A published adapter, loaded as anybody would load it."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from common.agreement import Agreement
from common.models.delta import add_delta
from common.models.low_rank import AdapterDelta, adapter_plan, cut
from common.models.parameters import parameter_shapes
from common.models.published_folder import write_adapter
from tests.support.models import tiny_bert, tiny_gpt2


@pytest.mark.parametrize("make", [tiny_bert, tiny_gpt2])
def test_the_adapter_on_the_base_gives_the_merged_model_s_logits(
    make, agreement: Agreement, bert_folder: Path, tmp_path: Path
) -> None:
    merged, random = make(), torch.Generator().manual_seed(0)
    shapes = parameter_shapes(merged)
    delta = {name: 0.1 * torch.randn(shape, generator=random) for name, shape in shapes.items()}
    plan = adapter_plan(merged, made_here=(), rank=3)
    held = AdapterDelta(delta, plan, cut(delta, plan).factors)
    add_delta(merged, held)
    write_adapter(merged, held, bert_folder, agreement, tmp_path / "model")
    adapted = PeftModel.from_pretrained(make(), tmp_path / "model").eval()
    batch = {"input_ids": torch.arange(1, 25).reshape(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    with torch.no_grad():
        logits = merged(**batch).logits
        assert (logits - make()(**batch).logits).abs().max() > 1e-2
        torch.testing.assert_close(adapted(**batch).logits, logits, rtol=0, atol=1e-5)


def test_the_configuration_names_the_agreed_base_and_is_the_same_every_time(
    agreement: Agreement, bert_folder: Path, tmp_path: Path
) -> None:
    model = tiny_bert()
    zero = {name: torch.zeros(shape) for name, shape in parameter_shapes(model).items()}
    plan = adapter_plan(model, made_here=(), rank=3)
    held = AdapterDelta(zero, plan, cut(zero, plan).factors)
    for name in ("one", "other"):
        write_adapter(model, held, bert_folder, agreement, tmp_path / name)
    config = (tmp_path / "one" / "adapter_config.json").read_text()
    assert config == (tmp_path / "other" / "adapter_config.json").read_text()
    assert json.loads(config)["base_model_name_or_path"] == agreement.base
    assert json.loads(config)["target_modules"] == sorted(json.loads(config)["target_modules"])
