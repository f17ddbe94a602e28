"""Masked against plain, and against a plain sum of real numbers, on real models and the example's rows."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from common.agreement import Agreement
from common.merge_methods import METHODS
from common.merge_methods.method import SingleRoundMethod
from common.models.loading import load_base
from common.models.plan import merge_plan
from common.schedule import Round
from common.settings_file import load_settings
from common.summation import fixed_point
from common.summation.protocol import Total
from common.tensor_layout import TensorLayout
from deploy.simulation.simulate import simulate
from server.coordinator import Coordinator

Tensor = tuple[str, np.ndarray]


@pytest.fixture(scope="module")
def runs(trained_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run of each kind. Of the masked one also the owners' own vectors, and the total, before it was destroyed."""
    folder = tmp_path_factory.mktemp("kinds")
    for kind in ("masked", "plain"):
        consortium = Path(
            shutil.copytree(trained_folder, folder / f"{kind}-consortium", ignore=shutil.ignore_patterns("output"))
        )
        path = consortium / "agreement.toml"
        text = path.read_text().replace("[0.1, 0.5, 0.9, 0.95, 0.99]", "[0.5, 0.9]")
        path.write_text(text.replace('kind = "masked"', f'kind = "{kind}"'))
    seen: dict[str, Any] = {"vectors": [], "folder": folder}
    flatten_encoded, coordinator_sum = fixed_point.flatten_encoded, Coordinator.sum

    def keep_vector(layout: TensorLayout, tensors: Iterable[Tensor], vector: np.ndarray, n: int) -> np.ndarray:
        real = np.zeros(layout.size)
        layout.flatten(tensors, real)
        seen["vectors"].append((layout, real))
        return flatten_encoded(layout, layout.unflatten(real), vector, n)

    def keep_total(self: Coordinator, round: Round) -> Total:
        total = coordinator_sum(self, round)
        if round.kind == "contribution":
            copy = total.vector.copy()
            seen["total"] = Total(layout=total.layout, vector=copy, owners=total.owners, roster_size=total.roster_size)
        return total

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fixed_point, "flatten_encoded", keep_vector)
        patch.setattr(Coordinator, "sum", keep_total)
        seen["masked"] = simulate(folder / "masked-consortium", folder / "masked", with_references=False)
    seen["plain"] = simulate(folder / "plain-consortium", folder / "plain", with_references=False)
    return seen


def test_masked_and_plain_publish_the_same_model_bit_for_bit_and_the_same_figures(runs: dict[str, Any]) -> None:
    masked, plain = runs["masked"], runs["plain"]
    assert (masked.summation, plain.summation) == ("masked", "plain")
    assert masked.digests.model == plain.digests.model
    assert masked.evaluation == plain.evaluation


def test_every_method_s_model_differs_from_that_of_real_sums_by_little_more_than_rounding(runs: dict[str, Any]) -> None:
    agreement = load_settings(runs["folder"] / "masked" / "parties" / "agreement.toml", Agreement)
    total: Total = runs["total"]
    vectors = [vector for layout, vector in runs["vectors"] if layout.digest() == total.layout.digest()]
    assert len(vectors) == 3
    real = Total(
        layout=total.layout, vector=np.sum(vectors, axis=0), owners=total.owners, roster_size=total.roster_size
    )
    base = load_base(runs["folder"] / "plain-consortium" / "base", agreement.task, agreement.seed)
    plan = merge_plan(base, agreement.tensors)
    weights = {name: parameter.detach() for name, parameter in base.named_parameters()}
    settings = agreement.merge_settings(plan)
    for name in agreement.methods:
        method = METHODS[name]
        assert isinstance(method, SingleRoundMethod)
        for value in agreement.agreed(method).values():
            masked_delta = method.solve(settings, total, value, with_spectra=False).delta
            real_delta = method.solve(settings, real, value, with_spectra=False).delta
            distance = sum(float((masked_delta[each] - real_delta[each]).norm() ** 2) for each in weights) ** 0.5
            size = sum(float((weights[each] + real_delta[each]).norm() ** 2) for each in weights) ** 0.5
            # Where nobody's loss depends on a parameter, its mean is as exact as Fisher's floor makes it.
            assert distance < (1e-4 if name == "fisher" else 1e-6) * size, (name, value)


def test_a_plain_run_says_so(runs: dict[str, Any]) -> None:
    page = (runs["folder"] / "plain" / "report.html").read_text()
    assert "the coordinator saw each owner's vector" in " ".join(page.split())


def test_in_32_bits_the_model_is_the_same_to_a_ten_thousandth_for_half_the_bytes(runs: dict[str, Any]) -> None:
    published = {}
    for kind, ring_bits in (("masked", 64), ("masked", 32), ("plain", 32)):
        folder = runs["folder"] / f"{kind}-{ring_bits}"
        shutil.copytree(runs["folder"] / "plain-consortium", folder, ignore=shutil.ignore_patterns("output"))
        path = folder / "agreement.toml"
        text = path.read_text().replace('kind = "plain"', f'kind = "{kind}"\nring_bits = {ring_bits}')
        text = text.replace("alphas = [0.5, 0.9]", "alphas = [0.9]")
        path.write_text(text.replace('["average", "task_arithmetic", "fisher"]', '["average", "data_free"]'))
        report = simulate(folder, folder / "out", with_references=False)
        received = {step.title: step.bytes_received for step in report.steps}
        sums = received.get("sum of scales", 0) + received["sum of contributions"]
        published[kind, ring_bits] = load_file(folder / "out" / "model" / "model.safetensors"), report, sums
    (in_64, report_64, bytes_64), (in_32, report_32, bytes_32) = published["masked", 64], published["masked", 32]
    assert report_32.digests.model == published["plain", 32][1].digests.model
    assert report_32.evaluation.mean == report_64.evaluation.mean
    assert bytes_32 < 0.52 * bytes_64
    base = load_file(runs["folder"] / "plain-consortium" / "base" / "model.safetensors")
    for name, weight in in_64.items():
        assert float((in_32[name] - weight).norm()) <= 1e-4 * float((weight - base[name]).norm()) + 1e-7
    assert "Scaling the numbers of a 32-bit round" in (runs["folder"] / "masked-32" / "out" / "report.html").read_text()
