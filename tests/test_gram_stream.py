"""Grams measured block by block are bit-identical to those of one pass, one block's at a time, and leave nothing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from client.measurement import gram_stream, stored_tensors
from client.measurement.blocks import BlockStream
from client.measurement.disk_model import DiskModel
from client.measurement.gram import GramCollector, measure_grams
from client.measurement.gram_stream import GramStream
from client.measurement.stored_tensors import StoredTensors
from client.owner import Owner
from common.errors import DataError
from common.merge_methods.terms import Gram
from common.models.delta import Delta
from common.models.files import weight_files
from common.models.plan import MergePlan
from tests.support.architectures import ARCHITECTURES, made, shake
from tests.support.models import delta_of, tiny_bert
from tests.support.owner_process import fast_forward, opening_of, roll_call
from tests.support.parties import Parties

NO_SINGLE_CHAIN = {"albert", "t5 tied", "t5 untied", "t5 classifier"}


def accept(grams: Mapping[str, Gram]) -> None:
    """The check of an agreement that asks for no number of rows."""


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_grams_of_block_after_block_are_bit_identical_to_those_of_one_pass(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, plan, batches = made(name)
    expected = measure_grams(model, plan, batches)
    stream = GramStream(DiskModel(model, tmp_path), plan, batches, tmp_path / "activations", accept)
    assert list(stream) == list(expected)
    for shared in plan.inputs:
        gram = stream[shared.name]
        assert gram.rows == expected[shared.name].rows
        assert torch.equal(gram.matrix, expected[shared.name].matrix)
    assert (tmp_path / "activations").exists() == (name not in NO_SINGLE_CHAIN)
    assert ("measured in one piece" in caplog.text) == (name in NO_SINGLE_CHAIN)


def test_grams_that_are_asked_for_again_or_in_any_order_are_the_same(tmp_path: Path) -> None:
    model, plan, batches = made("bert")
    expected = measure_grams(model, plan, batches)
    stream = GramStream(DiskModel(model, tmp_path), plan, batches, tmp_path / "activations", accept)
    for name in [*reversed(list(expected)), *expected]:
        assert torch.equal(stream[name].matrix, expected[name].matrix)


def test_there_are_never_grams_of_more_than_one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: WeakSet[Tensor] = WeakSet()
    most = 0

    def collect(collector: GramCollector, *given: Any) -> None:
        nonlocal most
        begin(collector, *given)
        alive.update(collector.matrices.values())
        most = max(most, len(alive))

    begin = GramCollector.__init__
    monkeypatch.setattr(GramCollector, "__init__", collect)
    model, plan, batches = made("llama")
    stream = GramStream(DiskModel(model, tmp_path), plan, batches, tmp_path / "activations", accept)
    of_blocks = [sum(shared.name.startswith(f"{block}.") for shared in plan.inputs) for block in plan.blocks]
    for shared in plan.inputs:
        assert stream[shared.name].rows > 0
    assert sum(of_blocks) == len(plan.inputs) - 1  # and the classifier, which follows the last block
    assert most == max(*of_blocks[:-1], of_blocks[-1] + 1)
    assert not alive


def test_each_block_is_run_once_over_the_batches(tmp_path: Path) -> None:
    model, plan, batches = made("llama")
    stream = GramStream(DiskModel(model, tmp_path), plan, batches, tmp_path / "activations", accept)
    runs = dict.fromkeys(plan.blocks, 0)

    def count(block: str) -> None:
        runs[block] += 1

    for block in plan.blocks:
        attention = model.get_submodule(block).self_attn  # a block that is passed over is called too
        attention.register_forward_pre_hook(lambda *_, block=block: count(block))  # type: ignore[union-attr, operator]
    assert len(dict(stream)) == len(plan.inputs)
    first, *later = plan.blocks
    # Before each block, one example runs through the first block to show the shape of its output.
    assert runs == {first: len(batches) + len(plan.blocks)} | dict.fromkeys(later, len(batches))


def test_a_model_whose_blocks_pass_on_more_than_they_return_is_measured_whole_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Here the first block leaves a note that the second one reads. Run alone, the second block is another model."""
    model, plan, batches = made("llama")
    first, second = (model.get_submodule(block) for block in plan.blocks)
    first.register_forward_hook(lambda _, args, output: setattr(second, "note", output.mean()))
    second.input_layernorm.register_forward_hook(lambda _, args, output: output + second.note)  # type: ignore[union-attr, operator]
    expected = measure_grams(model, plan, batches)
    stream = GramStream(DiskModel(model, tmp_path), plan, batches, tmp_path / "activations", accept)
    for name, gram in stream.items():
        assert torch.equal(gram.matrix, expected[name].matrix)
    assert not (tmp_path / "activations").exists()
    megabytes = sum(gram.matrix.nbytes for gram in expected.values()) / 1e6
    (warning,) = caplog.messages
    assert f"measured in one piece and needs more memory, {megabytes:.0f} MB for its Gram matrices alone" in warning
    assert "is fed other numbers if blocks run alone" in warning


def test_a_model_in_one_piece_never_has_grams_larger_than_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plan, batches = made("t5 untied")
    monkeypatch.setattr(gram_stream, "ROOM", 0.1)
    room = sum(parameter.nbytes for parameter in model.parameters()) / 10 / 8  # numbers
    passes: list[int] = []
    collect = GramCollector.__init__

    def counted(self: GramCollector, measured: MergePlan, *given: Any) -> None:
        passes.append(sum(shared.gram_size**2 for shared in measured.inputs))
        collect(self, measured, *given)

    monkeypatch.setattr(GramCollector, "__init__", counted)
    stream = GramStream(DiskModel(model, tmp_path), plan, batches, tmp_path / "activations", accept)
    for name in stream:
        _ = stream[name]
    assert len(passes) > 1
    assert max(passes) <= room


def test_a_delta_computed_tensor_by_tensor_from_the_disk_is_the_whole_one(tmp_path: Path) -> None:
    for name in ("bert", "gpt2", "t5 tied", "mixtral"):
        base, own = made(name)[0], made(name)[0]
        shake(own, 0.05, seed=3)
        expected = delta_of(own, base)
        found = Delta(DiskModel(own, tmp_path), DiskModel(base, tmp_path))
        assert list(found) == list(expected)
        for parameter, tensor in expected.items():
            assert torch.equal(found[parameter], tensor)


def test_a_model_on_the_disk_runs_and_is_changed_as_one_in_memory(tmp_path: Path) -> None:
    batch = {"input_ids": torch.tensor([[1, 2, 3]])}
    model, twin = tiny_bert(), tiny_bert()
    disk = DiskModel(model, tmp_path)
    assert list(tmp_path.iterdir()) == []  # the file has no name
    for each in (model, twin):
        with torch.no_grad():
            each.classifier.bias.add_(1)
    disk.release()
    assert torch.equal(model(**batch).logits, twin(**batch).logits)
    assert torch.equal(disk["classifier.bias"], twin.classifier.bias)


@pytest.mark.parametrize("is_small", [False, True])
def test_a_base_is_read_again_from_its_own_files_except_what_they_lack_unless_it_is_small(
    is_small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_small:
        monkeypatch.setattr(stored_tensors, "SMALL_BYTES", 0)
    state, folder = tmp_path / "state", tmp_path / "base"
    state.mkdir()
    model = tiny_bert().bfloat16()
    model.base_model.save_pretrained(folder)  # without the model's prefix, and without a head
    model = model.float()
    stored = StoredTensors(model, weight_files(folder), state)
    parameters = dict(model.named_parameters())
    assert list(stored) == list(parameters)
    assert all(torch.equal(stored[name], parameters[name]) for name in parameters)
    assert set(stored._others) == (set() if is_small else {"classifier.weight", "classifier.bias"})
    stored["bert.pooler.dense.bias"].add_(1)  # a copy
    assert torch.equal(stored["bert.pooler.dense.bias"], parameters["bert.pooler.dense.bias"])


def test_weights_that_do_not_fit_on_the_disk_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing: a model's weights cannot be written here \(No such file"):
        DiskModel(tiny_bert(), tmp_path / "missing")


def test_activations_are_readable_by_the_owner_alone_and_removed_even_after_a_failure(
    parties_that_train: Parties, monkeypatch: pytest.MonkeyPatch
) -> None:
    party = parties_that_train.files["hotel"]
    Owner(party).answer(roll_call(parties_that_train))
    owner = Owner(party)
    blocks, run_folder = owner.workbench.plan.blocks, owner.state.folder / "run"
    (run_folder / "scratch" / "left by a crash").mkdir(parents=True)
    seen: list[int] = []
    kept: set[tuple[bool, int]] = set()

    def look(model: PreTrainedModel, *arguments: object, **others: object) -> dict[str, Gram]:
        folder = run_folder / "scratch"
        seen.append(folder.stat().st_mode & 0o777)
        grams = measure_inputs(model, *arguments, **others)
        assert BlockStream(folder, blocks).reached is not None
        kept.update((path.is_dir(), path.stat().st_mode & 0o777) for path in folder.rglob("*"))
        if len(seen) == 2:
            raise DataError("the disk broke")
        return grams

    measure_inputs = gram_stream.measure_inputs
    monkeypatch.setattr(gram_stream, "measure_inputs", look)
    round_ = owner.workbench.schedule.find("contribution")
    fast_forward(owner, round_.position)
    with pytest.raises(DataError, match="the disk broke"):
        owner.answer(opening_of(parties_that_train, round_))
    assert seen == [0o700, 0o700]
    assert kept == {(True, 0o700), (False, 0o600)}
    assert [path.name for path in run_folder.iterdir()] == ["run.json"]  # nor is half of a vector there
