"""Model folders: what is loaded, and what is refused and why."""

import ctypes
import gc
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)

from benchmarks.memory import peak_megabytes
from client.measurement.gram import measure_grams
from common import mapped
from common.agreement import Agreement, AgreementDraft, OwnerEntry, Task
from common.errors import ModelError
from common.models import loading
from common.models.delta import VectorDelta, add_delta, delta_layout
from common.models.folders import base_labels, fine_tuned_folder, load_tokenizer, model_folder
from common.models.loading import check_base, digest_of, load_base, load_fine_tuned
from common.models.parameters import is_finite
from common.models.plan import MergePlan, merge_plan
from deploy.complete import complete_agreement
from deploy.example.reviews import make_tokenizer
from tests.support.errors import in_two_lines
from tests.support.models import delta_of, tiny_bert

TASK = Task(labels=("a", "b", "c"))


@pytest.fixture
def folder(bert_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bert_folder, tmp_path / "model"))


def change_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    weights = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        if tensor is None:
            del weights[name.replace("__", ".")]
        else:
            weights[name.replace("__", ".")] = tensor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_the_digest_covers_the_weights_and_not_the_files(folder: Path, tmp_path: Path) -> None:
    model = load_base(folder, TASK, seed=0)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert digest_of(load_base(tmp_path / "sharded", TASK, seed=0), TASK) == digest_of(model, TASK)


def test_a_model_is_what_its_files_hold_now_and_nobody_else_s_changes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_base(folder, TASK, seed=0)
    before = digest_of(first, TASK)
    with torch.no_grad():
        next(first.parameters()).zero_()
    assert digest_of(load_base(folder, TASK, seed=0), TASK) == before
    change_weights(folder, classifier__bias=torch.ones(3))
    after = digest_of(load_base(folder, TASK, seed=0), TASK)
    assert after != before
    monkeypatch.setattr(loading, "SMALL_BYTES", 0)
    assert digest_of(load_base(folder, TASK, seed=0), TASK) == after


def test_a_folder_without_its_tokenizer_is_refused_rather_than_read_as_unknown_words(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"its tokenizer has no vocabulary\nhint: save it"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_are_upcast_however_they_are_sharded(
    dtype: torch.dtype, folder: Path, tmp_path: Path
) -> None:
    half = tiny_bert().to(dtype)
    for name, size in (("whole", "1GB"), ("sharded", "8KB")):
        half.save_pretrained(tmp_path / name, max_shard_size=size)
        load_tokenizer(folder).save_pretrained(tmp_path / name)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    whole, sharded = (load_base(tmp_path / name, TASK, seed=0) for name in ("whole", "sharded"))
    assert digest_of(sharded, TASK) == digest_of(whole, TASK)
    for name, parameter in sharded.named_parameters():
        assert torch.equal(parameter, half.get_parameter(name).float())
    tuned = load_fine_tuned(tmp_path / "sharded", TASK, whole)
    assert all((tensor == 0).all() for tensor in delta_of(tuned, whole).values())


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone forgets a peak")
def test_half_precision_is_not_held_beside_float32_while_a_model_is_loaded(folder: Path, tmp_path: Path) -> None:
    """The kernel's own peak, of all threads and of what is mapped from files."""
    config = tiny_bert().config
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 768, 3072, 8
    with torch.device("meta"):
        model = BertForSequenceClassification(config)
    model = model.bfloat16().to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.25)
    model.save_pretrained(tmp_path / "large", max_shard_size="50MB")
    load_tokenizer(folder).save_pretrained(tmp_path / "large")
    size = 4 * sum(parameter.numel() for parameter in model.parameters()) / 1e6
    del model
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests freed would be used again, and no peak be seen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak_megabytes()
    loaded = load_base(tmp_path / "large", TASK, seed=0)
    assert (loaded.classifier.weight == 0.25).all()
    assert size < peak_megabytes() - before < 1.25 * size  # with all of the files, it would be 1.5


def test_a_model_of_half_precision_is_published_as_computed_in_float32(tmp_path: Path) -> None:
    tiny_bert().bfloat16().save_pretrained(tmp_path / "base")
    load_base(tmp_path / "base", TASK, seed=0).save_pretrained(tmp_path / "published")
    assert json.loads((tmp_path / "published" / "config.json").read_text())["dtype"] == "float32"
    assert {t.dtype for t in load_file(tmp_path / "published" / "model.safetensors").values()} == {torch.float32}


def test_one_changed_weight_makes_another_base(folder: Path, agreement: Agreement) -> None:
    check_base(load_base(folder, TASK, seed=0), agreement, folder)
    change_weights(folder, classifier__bias=torch.tensor([0.0, 0.0, 1e-7]))
    with pytest.raises(ModelError, match="this is another base model"):
        check_base(load_base(folder, TASK, seed=0), agreement, folder)


def test_every_party_makes_the_same_head_if_the_base_lacks_one(folder: Path) -> None:
    change_weights(folder, classifier__bias=None, classifier__weight=None)
    torch.manual_seed(1)
    one = load_base(folder, TASK, seed=5)
    torch.manual_seed(2)
    assert digest_of(load_base(folder, TASK, seed=5), TASK) == digest_of(one, TASK)
    assert digest_of(load_base(folder, TASK, seed=6), TASK) != digest_of(one, TASK)


def test_a_fine_tuned_model_that_lacks_a_weight_is_refused_not_filled_with_noise(folder: Path) -> None:
    change_weights(folder, classifier__weight=None)
    with pytest.raises(ModelError, match=r"its weights lack classifier\.weight"):
        load_fine_tuned(folder, TASK, tiny_bert())


def test_a_base_that_lacks_more_than_a_head_is_refused(folder: Path) -> None:
    change_weights(folder, bert__embeddings__LayerNorm__bias=None)
    with pytest.raises(ModelError, match=r"its weights lack bert\.embeddings\.LayerNorm\.bias"):
        load_base(folder, TASK, seed=0)


def test_a_base_with_its_labels_in_another_order_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"its labels are \['a', 'b', 'c'\]"):
        load_base(folder, Task(labels=("c", "b", "a")), seed=0)


def test_a_body_saved_without_its_head_takes_new_labels(folder: Path, tmp_path: Path) -> None:
    """AutoModel keeps the labels of the head that it left behind in the configuration."""
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "body")
    assert base_labels(tmp_path / "body") == ("a", "b", "c")
    model = load_base(tmp_path / "body", Task(labels=("x", "y")), seed=0)
    assert model.config.id2label == {0: "x", 1: "y"}


def test_an_owner_s_model_needs_no_tokenizer_of_its_own(tmp_path: Path) -> None:
    """Those of Llama name no padding token, for which the base's tokenizer is asked."""
    tokenizer = make_tokenizer()
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    for name in ("base", "own"):
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size)).save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / "base")
    task = Task(kind="causal-lm")
    base = load_base(tmp_path / "base", task, seed=0)
    assert load_fine_tuned(tmp_path / "own", task, base).config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("change", [{"gradient_checkpointing": True}, {"return_dict": False}])
def test_how_a_model_was_run_while_it_was_trained_does_not_matter(change: dict[str, bool], folder: Path) -> None:
    before = load_base(folder, TASK, seed=0)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    model, tokens = load_base(folder, TASK, seed=0), torch.arange(1, 9)[None]
    assert torch.equal(model(input_ids=tokens).logits, before(input_ids=tokens).logits)


def test_a_small_body_in_half_precision_gets_a_head_larger_than_itself(folder: Path, tmp_path: Path) -> None:
    AutoModel.from_pretrained(folder, dtype=torch.float16).save_pretrained(tmp_path / "body")
    task = Task(labels=tuple(f"label {number}" for number in range(5000)))
    assert load_base(tmp_path / "body", task, seed=0).config.num_labels == 5000


def test_a_model_with_running_statistics_is_refused(tmp_path: Path) -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=2)
    ResNetForImageClassification(config).save_pretrained(tmp_path)
    draft = AgreementDraft(
        title="t",
        base=str(tmp_path),
        owners=(OwnerEntry(name="ada"), OwnerEntry(name="bea"), OwnerEntry(name="cyd")),
        task=Task(kind="image-classification", labels=("a", "b")),
    )
    with pytest.raises(ModelError, match="is a running statistic"):
        complete_agreement(draft, tmp_path, {})


def test_base_and_delta_give_the_fine_tuned_model_again() -> None:
    base, tuned = tiny_bert(), tiny_bert()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.25
    delta = delta_of(tuned, base)
    add_delta(base, delta)
    for one, other in zip(base.parameters(), tuned.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_delta_that_travelled_is_added_in_pieces_to_the_bits_of_the_whole(
    plan: MergePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "PIECE_NUMBERS", 7)
    layout = delta_layout(plan, plan.changed[:-1])  # the last one did not change
    vector = np.random.default_rng(0).standard_normal(layout.size).astype(np.float32)
    delta, whole, in_pieces = VectorDelta(plan, (layout, vector)), tiny_bert(), tiny_bert()
    for model in (whole, in_pieces):
        next(reversed(list(model.parameters()))).data.fill_(-0.0)
    add_delta(whole, dict(delta))
    add_delta(in_pieces, delta)
    for one, other in zip(in_pieces.parameters(), whole.parameters(), strict=True):
        assert one.detach().numpy().tobytes() == other.detach().numpy().tobytes()


def test_labels_come_from_the_configuration_in_order(folder: Path) -> None:
    assert base_labels(folder) == ("a", "b", "c")


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def break_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")


def make_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def make_nan(folder: Path) -> None:
    change_weights(folder, classifier__bias=torch.tensor([0.0, float("nan"), 0.0]))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (break_config, "its config.json cannot be used"),
        (break_weights, "model.safetensors: cannot be read: Error while deserializing header: invalid JSON"),
        (make_pickle, "holds pickled weights only, and loading a pickle runs its code"),
        (remove_weights, "holds no weights"),
        (remove_config, "has no config.json"),
        (make_nan, "parameter classifier.bias holds a number that is not finite"),
    ],
)
def test_a_damaged_model_is_refused_in_one_line(damage, says: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(ModelError) as caught:
        load_base(model_folder(str(folder), Path()), TASK, seed=0)
    says_so = in_two_lines(caught.value)
    assert says in says_so
    assert str(folder) in says_so


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ModelError, match="no model of this name could be fetched"):
        model_folder("nobody/nothing", Path("/nowhere"))


def test_a_fine_tuned_model_of_another_shape_or_other_labels_is_refused(folder: Path) -> None:
    base = tiny_bert()
    load_fine_tuned(folder, TASK, base)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"], config["label2id"] = {0: "c", 1: "b", 2: "a"}, {"c": 0, "b": 1, "a": 2}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"its labels are \['c', 'b', 'a'\], the agreement's are"):
        load_fine_tuned(folder, TASK, base)
    config["num_hidden_layers"], config["id2label"] = 1, {0: "a", 1: "b", 2: "c"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="was not fine-tuned from this base"):
        load_fine_tuned(folder, TASK, base)


def test_a_plan_must_name_exactly_the_model_s_parameters(agreement: Agreement) -> None:
    tensors = agreement.tensors
    with pytest.raises(ModelError, match="is missing from the agreement's tensors"):
        merge_plan(tiny_bert(), tensors.model_copy(update={"averaged": tensors.averaged[1:]}))
    with pytest.raises(ModelError, match=r"parameter made\.up is missing from the base model"):
        merge_plan(tiny_bert(), tensors.model_copy(update={"averaged": (*tensors.averaged, "made.up")}))
    with pytest.raises(ModelError, match="it is not a linear layer's weight"):
        merge_plan(
            tiny_bert(),
            tensors.model_copy(
                update={"averaged": tensors.averaged[1:], "merged": (*tensors.merged, (tensors.averaged[0],))}
            ),
        )


def test_a_base_that_cuts_its_feed_forward_into_chunks_is_run_whole(folder: Path, plan: MergePlan) -> None:
    """The shape of a chunk does not reveal its padding, which would be counted as token rows."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"chunk_size_feed_forward": 4}))
    tokens = torch.arange(1, 17).reshape(2, 8)
    mask = torch.tensor([[1] * 8, [1] * 3 + [0] * 5])
    grams = measure_grams(load_base(folder, TASK, seed=0), plan, [{"input_ids": tokens, "attention_mask": mask}])
    rows = {name: gram.rows for name, gram in grams.items() if "intermediate" in name or "output" in name}
    assert set(rows.values()) == {11}


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_orig_mod.module."])
def test_a_wrapper_s_prefix_of_all_names_is_taken_off(prefix: str, tmp_path: Path) -> None:
    model = tiny_bert()
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    save_file({prefix + name: tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    loaded = load_fine_tuned(tmp_path / "model", TASK, tiny_bert())
    assert digest_of(loaded, TASK) == digest_of(model, TASK)


def test_a_folder_of_a_trainer_names_its_best_or_last_checkpoint(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        tiny_bert().save_pretrained(tmp_path / f"checkpoint-{step}")
    with pytest.raises(ModelError, match=r"has no config\.json") as caught:
        fine_tuned_folder(str(tmp_path), tmp_path)
    last = tmp_path / "checkpoint-100"
    assert caught.value.hint == f"a Trainer wrote this folder; name a checkpoint, for example the last: {last}"
    (last / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": "elsewhere/checkpoint-20"}))
    with pytest.raises(ModelError) as caught:
        fine_tuned_folder(str(tmp_path), tmp_path)
    assert caught.value.hint == f"a Trainer wrote this folder; name its best checkpoint: {tmp_path / 'checkpoint-20'}"


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_one_number_that_is_not_finite_is_found(number: float) -> None:
    tensor = torch.zeros(3, 5)
    assert is_finite(tensor)
    assert is_finite(torch.zeros(0, 5))
    tensor[1, 2] = number
    assert not is_finite(tensor)
    assert not is_finite(tensor.half())
