"""Devices: which one a setting names, and that whatever runs on it runs there, to the same numbers.

No GPU is needed. tests/support/pretend_device.py stands in for one, and refuses what a GPU would refuse.
"""

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks import device as benchmark
from client.data.rows import IGNORED, Rows
from client.measurement import gram as gram_module
from client.measurement.classifier_inputs import measure_classifier
from client.measurement.disk_model import DiskModel
from client.measurement.evaluation import evaluate, predict_logits
from client.measurement.fine_tuning import fine_tune
from client.measurement.fisher import measure_fisher
from client.measurement.gram import GramCollector, measure_grams
from client.measurement.gram_stream import Batches, GramStream
from client.measurement.passes import ON_CPU, Halving, Passes
from client.settings import OwnerSettings, Training
from common import device as devices
from common.agreement import Agreement, Task
from common.device import find_device, find_solver
from common.errors import DataError, SettingsError
from common.identity import Identity
from common.merge_methods.normal_equations import solve_symmetric, spectrum
from common.merge_methods.terms import MergedDelta, MergeSettings, OwnerTerms
from common.models.layers import block_names
from common.models.low_rank import factorise
from common.models.plan import MergePlan, merge_plan
from common.schedule import schedule_of
from common.settings_file import parse_settings
from deploy.example.reviews import make_tokenizer
from server.checkpoint import Checkpoint
from server.coordinator import Coordinator
from server.merge import MergeRun
from tests.support.architectures import ARCHITECTURES, batch_of, made, planned_tensors_of, shake
from tests.support.documents import ROOT
from tests.support.errors import in_two_lines
from tests.support.merging import exact, single_round, total_of
from tests.support.models import delta_of, tiny_bert
from tests.support.pretend_device import Elsewhere, pretended

pytestmark = pytest.mark.usefixtures("trained_anew")
GPUS = tuple(torch.device("cuda", index) for index in range(2))
IN_BFLOAT16 = Passes(dtype=torch.bfloat16)


def close(found: Tensor, expected: Tensor) -> bool:
    error = float((found.double() - expected.double()).norm())
    return error <= 1e-5 * float(expected.double().norm()) + 1e-12


def rows_of(count: int, *, labels: int = 3, per_token: bool = False) -> Rows:
    """Texts of several lengths, with one target, or with one for each token after the first."""
    random = np.random.default_rng(0)
    texts = [random.integers(4, 40, 3 + index % 5).tolist() for index in range(count)]
    features = tuple({"input_ids": text, "attention_mask": [1] * len(text)} for text in texts)
    tokens = tuple(np.array([IGNORED, *text[1:]]) for text in texts)
    targets = tokens if per_token else random.integers(0, labels, count)
    return Rows(features=features, targets=targets, tokenizer=make_tokenizer())


# --- which device ---


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "accelerators", lambda: GPUS)


@pytest.fixture
def a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "accelerators", lambda: (torch.device("mps"),))


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("wanted", "found"), [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("cpu", "cpu")]
)
def test_a_setting_names_a_device_and_auto_takes_the_first(wanted: str, found: str) -> None:
    assert str(find_device(wanted, "hotel")) == str(find_solver(wanted, "coordinator.toml")) == found


def test_without_an_accelerator_auto_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "accelerators", tuple)
    assert find_device("auto", "hotel") == torch.device("cpu")


def test_the_cpu_is_taken_without_a_look_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "accelerators", lambda: pytest.fail("looked for an accelerator"))
    assert find_device("cpu", "hotel") == torch.device("cpu")


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("wanted", ["cuda:2", "mps"])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(wanted: str) -> None:
    with pytest.raises(SettingsError) as caught:
        find_device(wanted, "hotel")
    said = f'hotel: device = "{wanted}" is not there; there is: cpu, cuda:0, cuda:1\nhint: '
    assert in_two_lines(caught.value).startswith(said)


def test_a_torch_without_cuda_is_named_as_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "accelerators", tuple)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(SettingsError) as caught:
        find_device("cuda", "hotel")
    assert "there is: cpu\nhint: torch " in in_two_lines(caught.value)
    assert "is built without CUDA" in caught.value.hint


@pytest.mark.usefixtures("a_mac")
def test_a_coordinator_needs_float64() -> None:
    assert find_device("auto", "hotel") == find_device("mps", "hotel") == torch.device("mps")
    assert find_solver("auto", "coordinator.toml") == torch.device("cpu")
    with pytest.raises(SettingsError) as caught:
        find_solver("mps", "coordinator.toml")
    assert 'coordinator.toml: device = "mps" has no float64' in in_two_lines(caught.value)


@pytest.mark.parametrize("written", ["gpu", "cuda:", "cuda:x", "mps:0", "CPU", ""])
def test_a_device_that_no_machine_has_is_refused_when_settings_are_read(written: str) -> None:
    tables = {"name": "hotel", "fine_tuned": "own", "data": {"train": "a.csv", "test": "b.csv"}, "device": written}
    with pytest.raises(SettingsError, match=r"device = .*: must be auto, cpu, cuda, cuda:1 or mps"):
        parse_settings(tables, OwnerSettings, "hotel.toml")


# --- the stand-in refuses what a GPU would refuse ---


def test_a_tensor_that_was_left_on_the_cpu_is_found() -> None:
    with pretended() as device:
        there, here = torch.ones(3, device=device), torch.ones(3)
        assert there.device == (there + there).device == device
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            there + here
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            there[torch.tensor([0])]
        with pytest.raises(RuntimeError, match="numpy"):
            there.numpy()
        assert torch.equal((there + here.to(device)).cpu(), torch.full((3,), 2.0))


# --- measuring ---


def where_blocks_are(model: nn.Module) -> list[set[int]]:
    """Which blocks are on the device whenever a part of a block runs; filled as the model runs."""
    blocks = [model.get_submodule(name) for name in block_names(model)]
    seen: list[set[int]] = []

    def look(*_: object) -> None:
        seen.append({n for n, each in enumerate(blocks) if isinstance(next(each.parameters()), Elsewhere)})

    for block in blocks:
        for module in block.modules():
            if not list(module.children()):
                module.register_forward_hook(look)
    return seen


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_grams_measured_on_a_device_are_those_of_the_cpu(name: str, tmp_path: Path) -> None:
    """Of a model that does not fit there, in one pass and block by block."""
    model, plan, batches = made(name)
    before = dict(model.named_parameters())
    expected = measure_grams(model, plan, batches)  # type: ignore[arg-type]
    with pretended(free_bytes=1000) as device:
        seen = where_blocks_are(model)
        whole = measure_grams(model, plan, batches, Passes(device))  # type: ignore[arg-type]
        in_blocks = GramStream(DiskModel(model, tmp_path), plan, batches, tmp_path / "a", bool, Passes(device))  # type: ignore[arg-type]
        for name, gram in expected.items():
            for found in (whole[name], in_blocks[name]):
                assert type(found.matrix) is Tensor
                assert found.rows == gram.rows
                assert close(found.matrix, gram.matrix)
    assert max(map(len, seen), default=1) == 1  # one block at a time
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_a_model_that_fits_stays_on_the_device_and_blocks_passed_over_do_not_go_there(tmp_path: Path) -> None:
    model, plan, batches = made("llama")
    with pretended() as device:
        seen = where_blocks_are(model)
        measure_grams(model, plan, batches, Passes(device))  # type: ignore[arg-type]
        assert seen[-1] == {0, 1}
        stream = GramStream(DiskModel(model, tmp_path), plan, batches, tmp_path / "a", bool, Passes(device))  # type: ignore[arg-type]
        seen.clear()
        assert dict(stream).keys() == {shared.name for shared in plan.inputs}
    first = model.get_submodule(plan.blocks[0])
    runs = len(batches) * sum(not list(module.children()) for module in first.modules())
    assert seen[:runs] == runs * [{0}]  # while Grams of the first block are measured, the second is passed over
    assert {0, 1} in seen


def test_sums_are_on_the_device_unless_it_has_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan, batches = made("bert")
    expected = measure_grams(model, plan, batches)  # type: ignore[arg-type]
    with pretended() as device:
        assert all(isinstance(each, Elsewhere) for each in GramCollector(plan, device).matrices.values())
        monkeypatch.setattr(gram_module, "has_float64", lambda device: False)
        assert not any(isinstance(each, Elsewhere) for each in GramCollector(plan, device).matrices.values())
        found = measure_grams(model, plan, batches, Passes(device))  # type: ignore[arg-type]
    assert all(close(found[name].matrix, gram.matrix) for name, gram in expected.items())


def test_fisher_information_of_a_device_is_that_of_the_cpu() -> None:
    model, rows = tiny_bert(), rows_of(6)
    expected = measure_fisher(model, rows, seed=1)
    with pretended() as device:
        found = measure_fisher(model, rows, 1, Passes(device))
    for name, tensor in expected.items():
        assert type(found[name]) is Tensor
        assert close(found[name], tensor)


def test_metrics_of_a_device_are_those_of_the_cpu() -> None:
    model, rows, labels = tiny_bert(), rows_of(9), np.arange(3)
    speller = GPT2LMHeadModel(GPT2Config(vocab_size=80, n_embd=8, n_layer=2, n_head=2, n_positions=32)).eval()
    tokens, task = rows_of(7, per_token=True), Task(kind="causal-lm")
    expected = predict_logits(model, rows, 4)
    with pretended(free_bytes=1000) as device:
        passes = Passes(device)
        np.testing.assert_allclose(predict_logits(model, rows, 4, passes), expected, rtol=1e-5, atol=1e-6)
        assert evaluate(model, rows, 4, Task(), labels, passes) == evaluate(model, rows, 4, Task(), labels)
        assert evaluate(speller, tokens, 4, task, labels, passes) == evaluate(speller, tokens, 4, task, labels)


def test_a_classifier_s_inputs_of_a_device_are_those_of_the_cpu(tmp_path: Path) -> None:
    merged, own, rows = tiny_bert(), tiny_bert(), rows_of(9)
    shake(own, 0.1, seed=1)
    base = {name: parameter.detach() for name, parameter in merged.named_parameters()}
    plan = merge_plan(merged, planned_tensors_of(merged, rows.batch(np.arange(4))[0]))
    layer = plan.inputs[-1].layers[0]

    def measured(passes: Passes) -> Any:
        disk = DiskModel(own, tmp_path), DiskModel(merged, tmp_path)
        return measure_classifier(base, *disk, layer, rows, 4, passes)

    expected = measured(ON_CPU)
    with pretended() as device:
        found = measured(Passes(device))
    assert torch.equal(found.targets, expected.targets)
    assert close(found.features, expected.features)
    assert close(found.scores, expected.scores)


def trained(training: Training, passes: Passes, validation: Rows | None = None, limit: int | None = None) -> nn.Module:
    """Without dropout, so that how rows are split over passes changes nothing."""
    model = tiny_bert()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if limit is not None:
        limit_memory(model, limit)
    fine_tune(model, rows_of(10), training, 3, "", validation, passes)
    return model


@pytest.mark.parametrize(
    "settings", [{}, {"lora_rank": 2}, {"patience": 1, "max_gradient_norm": 0.5, "accumulation": 2}], ids=str
)
def test_what_is_trained_on_a_device_is_what_the_cpu_trains(settings: dict[str, Any]) -> None:
    training, validation = Training(epochs=2, learning_rate=1e-3, batch_size=4, **settings), rows_of(5)

    expected = trained(training, ON_CPU, validation)
    with pretended() as device:
        found = trained(training, Passes(device), validation)
    change = delta_of(expected, tiny_bert())
    for name, parameter in found.named_parameters():
        assert type(parameter.data) is Tensor
        error = (parameter - expected.get_parameter(name)).norm()
        assert error <= 1e-3 * change[name].norm() + 1e-7


# --- solving ---


@pytest.mark.parametrize("rank", [9, 5], ids=["solved", "singular"])
def test_a_solve_on_a_device_is_that_of_the_cpu(rank: int) -> None:
    random = torch.Generator().manual_seed(0)
    rows, right = (torch.randn(rank, count, generator=random, dtype=torch.float64) for count in (9, 4))
    gram, products = rows.T @ rows, rows.T @ right
    expected, status, unseen = solve_symmetric(gram, products)
    with pretended():
        found, *others = solve_symmetric(gram, products, device="cuda:0")
        assert spectrum(gram, "cuda:0") == pytest.approx(spectrum(gram))
        factors = factorise(products.float(), 2, "cuda:0")
    assert type(found) is Tensor
    assert others == [status, unseen]
    assert close(found, expected)
    assert torch.equal(factors.up, factorise(products.float(), 2).up)


# --- bfloat16 ---


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The difference of two merged deltas, relative to the norm of the expected one."""
    size = sum(float(each.double().square().sum()) for each in expected.values())
    return float(
        (sum(float((found[name] - each).double().square().sum()) for name, each in expected.items()) / size) ** 0.5
    )


def merged_in(passes: Passes) -> dict[str, Tensor]:
    """A merge of three models by RegMean, whose Grams are measured so."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        architecture, base = ARCHITECTURES["llama"], made("llama")[0]
    random, owners = torch.Generator().manual_seed(0), {}
    tensors = planned_tensors_of(base, batch_of([architecture.example(random) for _ in range(4)]))
    plan = merge_plan(base, tensors)
    for index in range(3):
        own = copy.deepcopy(base)
        shake(own, 0.05, seed=index + 1)
        batch = batch_of([architecture.example(random) for _ in range(32)])
        grams = measure_grams(own, plan, [batch], passes)  # type: ignore[list-item]
        owners[f"o{index}"] = OwnerTerms(examples=32, delta=delta_of(own, base), grams=grams, gram_examples=32)
    settings = exact(plan)
    merged = single_round("regmean").solve(settings, total_of(["regmean"], settings, owners), 0.9, with_spectra=False)
    return dict(merged.delta)


def test_a_merge_measured_on_a_device_is_within_a_ten_thousandth_of_the_cpu_s() -> None:
    """The stand-in runs other kernels than the CPU does, and rounds differently."""
    expected = merged_in(ON_CPU)
    with pretended() as device:
        found = merged_in(Passes(device))
    assert 0 < distance(found, expected) <= 1e-4


def test_a_merge_measured_in_bfloat16_is_within_a_hundredth_of_one_in_float32() -> None:
    """bfloat16 rounds to 2^-9 of a number."""
    assert 0 < distance(merged_in(IN_BFLOAT16), merged_in(ON_CPU)) <= 0.01


def test_gram_products_are_float32_in_a_bfloat16_pass() -> None:
    """The sum of many ones is exact in float32; bfloat16 knows no number between 256 and 258."""
    layer = nn.Sequential(nn.Linear(1, 2, bias=False))
    plan = merge_plan(layer, planned_tensors_of(layer, {"input": torch.ones(1, 1)}))
    (gram,) = measure_grams(layer, plan, [{"input": torch.ones(257, 1)}], IN_BFLOAT16).values()  # type: ignore[arg-type]
    assert float(gram.matrix) == 257


def test_every_pass_is_in_the_agreed_type(tmp_path: Path) -> None:
    """Whatever is measured in bfloat16 is near what float32 gives, and not the same."""
    model, rows = tiny_bert(), rows_of(9)
    plan = merge_plan(model, planned_tensors_of(model, rows.batch(np.arange(4))[0]))
    base = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def measured(passes: Passes) -> list[Tensor]:
        disk, layer = DiskModel(model, tmp_path), plan.inputs[-1].layers[0]
        batches = Batches(rows, Halving(4))
        classifier = measure_classifier(base, disk, disk, layer, rows, 4, passes)
        own = trained(Training(epochs=1, batch_size=4), passes)
        return [
            GramStream(disk, plan, batches, tmp_path / "a", bool, passes)[plan.inputs[-1].name].matrix,
            measure_fisher(model, rows, 1, passes)["classifier.weight"],
            classifier.features,
            classifier.scores,
            torch.from_numpy(predict_logits(model, rows, 4, passes)),
            own.classifier.weight.detach() - tiny_bert().classifier.weight.detach(),
        ]

    for fine, coarse in zip(measured(ON_CPU), measured(IN_BFLOAT16), strict=True):
        assert coarse.dtype == fine.dtype
        assert 0 < (coarse - fine).norm() <= 0.1 * fine.norm()


# --- out of memory ---


def limit_memory(module: nn.Module, positions: int) -> None:
    """Let `module` run out of memory, as a GPU does, when it is fed more positions than this."""

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        fed = args[0] if args else kwargs.get("input_ids", kwargs.get("hidden_states"))
        if fed.shape[0] * fed.shape[1] > positions:
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 2 GiB\nmore lines")

    module.register_forward_pre_hook(look, with_kwargs=True)


HALVED = [f"  the device is out of memory: batches are halved, to {size}" for size in (4, 2, 1)]


@pytest.mark.parametrize("module", ["", "bert.encoder.layer.1.attention"], ids=["at once", "in a later block"])
def test_grams_are_measured_in_halved_batches_when_the_device_is_out_of_memory(
    module: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, rows = tiny_bert(), rows_of(20)
    plan = merge_plan(model, planned_tensors_of(model, rows.batch(np.arange(4))[0]))
    expected = measure_grams(model, plan, Batches(rows, Halving(8)))
    limit_memory(model.get_submodule(module), 2 * 7)
    passes = Passes(halving=Halving(8))
    batches = Batches(rows, passes.halving)
    stream = GramStream(DiskModel(model, tmp_path), plan, batches, tmp_path / "a", bool, passes)
    for name, gram in stream.items():
        assert gram.rows == expected[name].rows
        assert close(gram.matrix, expected[name].matrix)
    assert caplog.messages == HALVED[:2]


def test_metrics_are_judged_in_halved_batches(caplog: pytest.LogCaptureFixture) -> None:
    model, rows, halving = tiny_bert(), rows_of(20), Halving(8)
    expected = predict_logits(model, rows, 8)
    limit_memory(model, 7)
    found: NDArray[np.float32] = halving.run(lambda: predict_logits(model, rows, halving.size))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert caplog.messages == HALVED


def test_a_step_of_training_takes_more_passes_and_stays_the_same(caplog: pytest.LogCaptureFixture) -> None:
    training = Training(epochs=2, learning_rate=1e-3, batch_size=8)
    expected, found = trained(training, ON_CPU), trained(training, ON_CPU, limit=2 * 7)
    change = delta_of(expected, tiny_bert())
    for name, parameter in found.named_parameters():
        assert (parameter - expected.get_parameter(name)).norm() <= 1e-3 * change[name].norm() + 1e-7
    assert caplog.messages == HALVED[:2]


def test_a_device_without_memory_for_one_example_is_an_error(tmp_path: Path) -> None:
    model, plan, batches = made("bert")
    limit_memory(model, 0)
    stream = GramStream(DiskModel(model, tmp_path), plan, batches, tmp_path / "a", bool)  # type: ignore[arg-type]
    with pytest.raises(DataError) as caught:
        dict(stream)
    assert "too little memory for this model, even one example at a time" in in_two_lines(caught.value)
    assert caught.value.hint == 'set device = "cpu" in the settings'


def test_another_error_halves_nothing() -> None:
    halving = Halving(8)
    with pytest.raises(RuntimeError, match="shapes"):
        halving.run(lambda: torch.zeros(2, 3) @ torch.zeros(2, 3))
    assert halving.size == 8


def test_a_coordinator_whose_device_is_out_of_memory_solves_on_the_cpu(
    agreement: Agreement, plan: MergePlan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = MergeRun(
        agreement=agreement,
        plan=plan,
        schedule=schedule_of(agreement, plan),
        coordinator=Coordinator(
            channel=None,  # type: ignore[arg-type]  # a solve sends nothing
            agreement=agreement,
            identity=Identity(name="coordinator", seed=bytes(32)),
            checkpoint=Checkpoint.open(tmp_path / "checkpoint", agreement.digest()),
            schedule=schedule_of(agreement, plan),
        ),
        base_folder=tmp_path,
        output=tmp_path,
        device="cuda:0",
    )
    asked: list[str] = []

    def solve(settings: MergeSettings) -> MergedDelta:
        asked.append(settings.device)
        if settings.device != "cpu":
            raise torch.OutOfMemoryError
        return MergedDelta(delta={})

    for _ in range(2):
        run._solved(solve)
    assert asked == ["cuda:0", "cpu", "cpu"]
    assert caplog.messages == ["cuda:0 is out of memory: what remains is solved on the CPU"]


# --- the benchmark ---


def test_the_benchmark_runs_small_shapes_and_says_that_no_accelerator_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (devices, benchmark):
        monkeypatch.setattr(module, "accelerators", tuple)
    with pytest.raises(SystemExit, match="--quick"):
        benchmark.main([])
    benchmark.main(["--quick", "--json"])
    shown = capsys.readouterr()
    assert shown.err == 2 * "no accelerator is there\n"
    results = json.loads(shown.out)
    assert results["equality"]["float32"] == 0  # on one device, the numbers are the same
    assert 0 < results["equality"]["bfloat16"] < 0.02
    assert all(each["rows_per_second"] > 0 for each in results["grams"])
    assert all(each["relative_error"] < 1e-9 for each in results["solve"])


# --- what stays on the CPU ---


def test_masks_sums_and_verification_know_no_device() -> None:
    rooms = (ROOT / "common" / "verification.py", ROOT / "client" / "verification.py", ROOT / "common" / "scaling.py")
    for path in (*rooms, *(ROOT / "common" / "summation").rglob("*.py")):
        assert not re.search(r"\bdevice|\.to\(|cuda", path.read_text()), path
