"""LoRA adapters: their deltas, computed by hand from the file; what is not followed; what is refused and why."""

import json
from pathlib import Path

import pytest
import torch
from peft import PrefixTuningConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from common.agreement import Task
from common.errors import ModelError
from common.models.adapter import PARAMETER_PREFIX as PREFIX
from common.models.adapter import changed_parameters, names_another_base
from common.models.folders import fine_tuned_folder, model_folder
from common.models.layers import linear_layers
from common.models.loading import load_fine_tuned
from tests.support.adapters import write_adapter
from tests.support.errors import in_two_lines
from tests.support.models import delta_of, tiny_bert, tiny_gpt2

TASK = Task(labels=("a", "b", "c"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    modules = ["query", "value"]
    return write_adapter(tiny_bert(), tmp_path / "adapter", target_modules=modules, modules_to_save=["classifier"])


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    weights.pop(PREFIX + name, None)
    save_file(weights | ({} if tensor is None else {PREFIX + name: tensor}), folder / "adapter_model.safetensors")


def assert_delta_is_by_hand(base: PreTrainedModel, folder: Path, scale: float, saved: tuple[str, ...] = ()) -> None:
    """Every parameter's delta is scale B A, or what the file saved of it, or nothing."""
    file = load_file(folder / "adapter_model.safetensors")
    delta = delta_of(load_fine_tuned(folder, TASK, base), base)
    modules = linear_layers(base)
    changed = 0
    for name, parameter in base.named_parameters():
        module = name.removesuffix(".weight")
        expected = torch.zeros_like(parameter)
        if f"{PREFIX}{module}.lora_A.weight" in file:
            expected = scale * file[f"{PREFIX}{module}.lora_B.weight"] @ file[f"{PREFIX}{module}.lora_A.weight"]
            expected = expected if isinstance(modules[module], nn.Linear) else expected.T
        elif name.startswith(saved):
            expected = file[PREFIX + name] - parameter.detach()
        changed += bool(expected.abs().max() > 0)
        torch.testing.assert_close(delta[name], expected, rtol=0, atol=1e-6)
    assert changed == len([name for name in file if "lora_B" in name or "lora" not in name])


@pytest.mark.filterwarnings("ignore:.*have invalid shape")  # of a bias, which is as it should be
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["query"], "lora_bias": True},
        {"target_modules": ["query"], "use_dora": True},
        {"target_modules": ["dense"], "bias": "lora_only"},
        {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"]},
        {"target_modules": ["dense", "word_embeddings"], "layers_to_transform": [1], "layers_pattern": "layer"},
    ],
)
def test_the_parameters_that_an_adapter_changes_are_known_from_its_names(
    settings: dict[str, object], tmp_path: Path
) -> None:
    folder, base = write_adapter(tiny_bert(), tmp_path, **settings), tiny_bert()
    delta = delta_of(load_fine_tuned(folder, TASK, base), base)
    assert set(changed_parameters(folder)) == {name for name, tensor in delta.items() if tensor.any()}


def test_the_delta_is_the_product_of_the_file_s_factors(folder: Path) -> None:
    assert_delta_is_by_hand(tiny_bert(), folder, scale=6 / 4, saved=("classifier.",))


def test_rank_stabilised_lora_has_its_own_scale(tmp_path: Path) -> None:
    write_adapter(tiny_bert(), tmp_path, target_modules=["dense"], use_rslora=True)
    assert_delta_is_by_hand(tiny_bert(), tmp_path, scale=6 / 4**0.5)


def test_conv1d_stores_its_weight_the_other_way(tmp_path: Path) -> None:
    modules = ["c_attn", "c_proj"]
    write_adapter(tiny_gpt2(), tmp_path, target_modules=modules, modules_to_save=["score"], fan_in_fan_out=True)
    assert_delta_is_by_hand(tiny_gpt2(), tmp_path, scale=6 / 4, saved=("score.",))


def test_bfloat16_factors_are_used_as_they_are(folder: Path) -> None:
    file = load_file(folder / "adapter_model.safetensors")
    rounded = {name: tensor.bfloat16() for name, tensor in file.items()}
    save_file(rounded, folder / "adapter_model.safetensors")
    once = delta_of(load_fine_tuned(folder, TASK, tiny_bert()), tiny_bert())
    save_file({name: tensor.float() for name, tensor in rounded.items()}, folder / "adapter_model.safetensors")
    again = delta_of(load_fine_tuned(folder, TASK, tiny_bert()), tiny_bert())
    assert all(torch.equal(tensor, again[name]) for name, tensor in once.items())


def test_a_head_is_taken_from_the_file_whether_or_not_the_configuration_names_it(folder: Path) -> None:
    change_config(folder, modules_to_save=None)
    assert_delta_is_by_hand(tiny_bert(), folder, scale=6 / 4, saved=("classifier.",))


def test_the_base_stays_and_the_model_has_gradients(folder: Path) -> None:
    base = tiny_bert()
    model = load_fine_tuned(folder, TASK, base)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in tiny_bert().named_parameters()]
    for one, other in zip(base.parameters(), tiny_bert().parameters(), strict=True):
        assert torch.equal(one, other)


def test_nothing_that_the_configuration_names_is_fetched_or_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = delta_of(load_fine_tuned(folder, TASK, tiny_bert()), tiny_bert())
    (tmp_path / "poison.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    change_config(
        folder,
        base_model_name_or_path="somebody/else",
        revision="main",
        auto_mapping={"base_model_class": "Poison", "parent_library": "poison"},
        megatron_core="poison",
        task_type="SEQ_CLS",
        runtime_config={"ephemeral_gpu_offload": True},
    )
    delta = delta_of(load_fine_tuned(fine_tuned_folder(str(folder), Path()), TASK, tiny_bert()), tiny_bert())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in delta.items())
    assert not (tmp_path / "ran").exists()


def test_an_adapter_is_refused_as_a_base(folder: Path) -> None:
    assert fine_tuned_folder(str(folder), Path()) == folder
    with pytest.raises(ModelError, match=r"holds an adapter \(adapter_config\.json\); a base is a whole model"):
        model_folder(str(folder), Path())


@pytest.mark.parametrize("named", ["base", "/their/Base/", "C:\\models\\base", "us/agreed", "", None, ["other"]])
def test_an_adapter_that_names_its_base_by_another_path_is_not_odd(named: object, folder: Path, tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "base")
    change_config(folder, base_model_name_or_path=named)
    assert names_another_base(folder, tmp_path / "base", ["somewhere/agreed"]) == ""


def test_an_adapter_that_names_another_base_is_told_in_one_line_that_shows(folder: Path, tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "base")
    change_config(folder, base_model_name_or_path="other\n\x1b[2Jb\u202ease" + "e" * 99)
    told = names_another_base(folder, tmp_path / "base", ["somewhere/agreed"])
    assert told == (
        f"its adapter_config.json says that it was trained on 'other\\n\\x1b[2Jb\\u202e{'ase' + 'e' * 85}', and the "
        f"base here is 'somewhere/agreed' ({tmp_path}/base); an adapter of another model spoils the merge. If one was "
        "only renamed, `sha256sum model.safetensors` prints the same in both folders"
    )


QUERY = "bert.encoder.layer.0.attention.self.query.lora_A.weight"


def make_prefix_tuning(folder: Path) -> None:
    change_config(folder, **PrefixTuningConfig(num_virtual_tokens=2).to_dict())


def make_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (make_prefix_tuning, "its adapter is of type PREFIX_TUNING; only LORA can be merged"),
        (make_pickle, "holds pickled weights only, and loading a pickle runs its code"),
        (truncate, "adapter_model.safetensors: cannot be read"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "its adapter_config.json cannot be used"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "its adapter_config.json cannot be used"),
        (lambda folder: change_config(folder, target_modules=["q_proj"]), "its adapter does not fit the base: No mod"),
        (lambda folder: change_config(folder, r="four"), "its adapter does not fit the base"),
        (lambda folder: change_config(folder, r=5), "query.lora_A.weight has shape (4, 16), on this base it must have"),
        (lambda folder: change_config(folder, init_lora_weights="pissa"), "was initialised by pissa, which changes"),
        (lambda folder: change_config(folder, layer_replication=[[0, 2], [1, 2]]), "sets layer_replication, which"),
        (lambda folder: change_config(folder, megatron_config={"a": 1}), "sets megatron_config, which"),
        (lambda folder: change_weights(folder, QUERY, None), f"its adapter lacks {PREFIX}{QUERY}"),
        (lambda folder: change_weights(folder, QUERY, torch.zeros(4, 8)), "has shape (4, 8), on this base"),
        (lambda folder: change_weights(folder, QUERY, torch.full((4, 16), torch.nan)), "that is not finite"),
        (lambda folder: change_config(folder, lora_alpha=1e300), "query.weight holds a number that is not finite"),
        (lambda folder: change_weights(folder, QUERY, torch.ones(4, 16, dtype=torch.int8)), "has type torch.int8"),
        (lambda folder: change_weights(folder, "made.up", torch.ones(1)), "holds base_model.model.made.up (1 such"),
        (lambda folder: tiny_bert().save_pretrained(folder), "holds a whole model and an adapter"),
    ],
)
def test_a_wrong_adapter_is_refused_in_one_line(damage, says: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(ModelError) as caught:
        load_fine_tuned(fine_tuned_folder(str(folder), Path()), TASK, tiny_bert())
    says_so = in_two_lines(caught.value)
    assert says in says_so
    assert str(folder) in says_so
