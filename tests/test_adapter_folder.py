"""A published adapter, loaded as anybody would load it."""

import json
from collections.abc import Collection
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from safetensors.torch import load_file
from transformers import pipeline

from common.agreement import COORDINATOR, Agreement, AgreementDraft, Publish
from common.errors import SettingsError
from common.models.adapter import PARAMETER_PREFIX
from common.models.delta import add_delta
from common.models.folders import hub_revision
from common.models.low_rank import AdapterDelta, AdapterPlan, Factors, adapter_plan, cut
from common.models.parameters import parameter_shapes
from common.models.published_folder import changed_layers, write_adapter
from common.settings_file import load_settings
from deploy.complete import complete_agreement
from tests.support.models import tiny_bert, tiny_gpt2
from tests.support.parties import IDENTITIES, identities_of


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


@pytest.fixture
def write(agreement: Agreement, bert_folder: Path, tmp_path: Path):
    """Writes an adapter of rank 3 that changes these parameters, and returns its configuration's text."""

    def written(changed: Collection[str], name: str = "model", **agreed: object) -> str:
        model, random = tiny_bert(), torch.Generator().manual_seed(0)
        shapes = parameter_shapes(model).items()
        delta = {
            name: torch.randn(shape, generator=random) if name in changed else torch.zeros(shape)
            for name, shape in shapes
        }
        plan = adapter_plan(model, made_here=(), rank=3)
        held = AdapterDelta(delta, plan, cut(delta, plan).factors)
        write_adapter(model, held, bert_folder, agreement.model_copy(update=agreed), tmp_path / name)
        return (tmp_path / name / "adapter_config.json").read_text()

    return written


LAYERS = ["bert.encoder.layer.1.attention.self.query.weight", "bert.encoder.layer.0.output.dense.weight"]


def test_the_configuration_lists_the_changed_layers_and_is_the_same_every_time(write, tmp_path: Path) -> None:
    config = write(LAYERS, "one")
    assert config == write(LAYERS, "other")
    assert json.loads(config)["target_modules"] == sorted(name.removesuffix(".weight") for name in LAYERS)
    stored = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert {name.partition(".lora_")[0] for name in stored if "lora" in name} == {
        f"{PARAMETER_PREFIX}{name.removesuffix('.weight')}" for name in LAYERS
    }
    PeftModel.from_pretrained(tiny_bert(), tmp_path / "one")


def test_an_adapter_without_a_changed_layer_lists_all_of_them(write, tmp_path: Path) -> None:
    assert len(json.loads(write([]))["target_modules"]) == 13
    PeftModel.from_pretrained(tiny_bert(), tmp_path / "model")


def test_layers_that_peft_would_match_too_are_listed() -> None:
    one, nothing = (
        Factors(up=torch.ones(2, 1), down=torch.ones(1, 2)),
        Factors(up=torch.ones(2, 1), down=torch.zeros(1, 2)),
    )
    factors = {"a.b.weight": one, "x.a.b.weight": nothing, "xa.b.weight": nothing, "b.weight": nothing}
    plan = AdapterPlan(rank=1, layers=dict.fromkeys(factors, False), whole=())
    assert changed_layers(AdapterDelta({}, plan, factors)) == ("a.b.weight", "x.a.b.weight")


def test_a_base_of_the_hub_is_named_and_a_folder_by_its_digest_which_no_repository_can_be(
    write, agreement: Agreement, tmp_path: Path
) -> None:
    named = {}
    for name, agreed in {
        "folder": {"base": "base"},
        "cached": {"base": "/root/models--us--model/snapshots/" + 40 * "0", "base_revision": 40 * "0"},
        "hub": {"base": "us/model", "base_revision": 40 * "0"},
    }.items():
        named[name] = json.loads(write(LAYERS, name, **agreed))["base_model_name_or_path"]
    by_digest = f"base model with digest {agreement.base_digest}"
    assert named == {"folder": by_digest, "cached": by_digest, "hub": "us/model"}
    with pytest.raises(HFValidationError):
        validate_repo_id(by_digest)
    with pytest.raises(OSError, match="base model with digest"):
        pipeline("text-classification", str(tmp_path / "folder"))


def test_a_rank_above_the_width_of_every_layer_is_refused(agreement: Agreement, bert_folder: Path) -> None:
    shared = set(AgreementDraft.model_fields) - {"coordinator", "bounds"}
    tables = {name: getattr(agreement, name) for name in shared}
    keys = {name: each.public_key for name, each in IDENTITIES.items()}

    def complete(rank: int) -> Agreement:
        draft = AgreementDraft(**tables | {"publish": Publish(adapter_rank=rank)})
        return complete_agreement(draft, bert_folder, keys)

    assert complete(16).publish.adapter_rank == 16
    with pytest.raises(SettingsError, match=r"publish\.adapter_rank = 17: no layer of this base has a rank above 16"):
        complete(17)


def test_only_a_model_in_the_hub_s_cache_has_a_commit() -> None:
    commit = 40 * "0"
    assert hub_revision(Path("/cache/models--us--model/snapshots") / commit) == commit
    for other in (Path("snapshots") / commit, Path("/us/snapshots") / commit, Path(commit), Path("us/model")):
        assert hub_revision(other) is None


def test_a_commit_of_a_base_that_is_a_folder_is_refused(trained_folder: Path) -> None:
    """Otherwise a published adapter would name a stranger's model."""
    draft = load_settings(trained_folder / "agreement.toml", AgreementDraft)
    keys = {name: each.public_key for name, each in identities_of((*draft.owner_names, COORDINATOR)).items()}
    with pytest.raises(SettingsError, match="base_revision: names a commit on the hub, but the base is the folder"):
        complete_agreement(draft.model_copy(update={"base_revision": 40 * "0"}), trained_folder / "base", keys)
