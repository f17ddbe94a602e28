"""Gram matrices with noise: how far an example moves them, what the trap gives away, what is merged; numbers as in
SECURITY.md.
"""

import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from math import inf, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from client.measurement import gram
from client.measurement.gram import bounded_rows, measure_grams
from client.owner import Owner
from common.agreement import Agreement, AgreementDraft, Privacy
from common.agreement.tables import Legs
from common.certificates import sign_burned
from common.errors import ConsentError, LocalProtocolError, NumericalError, SettingsError
from common.merge_methods import contribution, contribution_layout
from common.merge_methods.anchored import ANCHORED, AnchoredTable
from common.merge_methods.regmean import REGMEAN, RegMeanTable
from common.merge_methods.regmean_plus_plus import REGMEAN_PLUS_PLUS
from common.merge_methods.terms import ROUNDING, Gram, GramNoise, MergeSettings, OwnerTerms
from common.messages import BurnCertificate, BurnSession, SurvivorList
from common.models.plan import MergePlan
from common.privacy.gaussian import mu_of
from common.privacy.legs import legs_of, own_noise, times_measured
from common.privacy.noise import Noise
from common.settings_file import parse_settings, parse_toml
from common.summation.fixed_point import fraction_bits
from common.summation.records import Signed
from common.tensor_layout import TensorLayout
from deploy.commands.agree import consent_text
from deploy.simulation.simulate import simulate
from server.bounds import check_contributions
from tests.support.errors import in_two_lines
from tests.support.merging import merge_settings, owner_for, plan_for
from tests.support.models import tiny_bert
from tests.support.owner_process import RUN, Process
from tests.support.parties import parties_of
from tests.support.rows import batch_of
from tests.support.verifying import Check, Contributions, verified

NORM, MULTIPLIER = 3.0, 2.0
NOISE = GramNoise(norms={"l0": NORM}, multiplier=MULTIPLIER, owners=3)
ROWS = 4000


# --- how far an example moves a Gram ---


@settings(max_examples=30)
@given(st.integers(1, 12), st.integers(1, 9), st.floats(1e-3, 1e3), st.floats(0.1, 10), st.integers(0, 10**6))
def test_231_an_example_moves_a_gram_by_at_most_the_agreed_norm(
    tokens: int, dimension: int, length: float, norm: float, seed: int
) -> None:
    rows = length * torch.randn(tokens, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    bounded = bounded_rows(rows, norm)
    exact, moved = (float((each.T @ each).norm()) for each in (rows, bounded))
    assert moved == pytest.approx(min(exact, norm))
    torch.testing.assert_close(bounded * exact**0.5, rows * moved**0.5)  # its tokens keep their proportions


@pytest.mark.parametrize("value", [inf, float("nan")])
def test_231_an_example_with_numbers_that_are_none_adds_nothing(value: float) -> None:
    rows = torch.ones(3, 2, dtype=torch.float64)
    rows[1, 1] = value
    assert not bounded_rows(rows, 1.0).any()


class Twice(nn.Module):
    """One layer that is called on two halves of what an example says."""

    def __init__(self) -> None:
        super().__init__()
        self.l0 = nn.Linear(4, 2)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.l0(input[:, :5]).sum() + self.l0(input[:, 5:]).sum()  # type: ignore[no-any-return]


def test_231_all_calls_of_a_layer_together_count_as_one_example() -> None:
    rows = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0))
    batches = [{"input": each[None]} for each in rows]
    found = measure_grams(Twice(), plan_for(4, [2]), batches, norms={"l0": 0.1})["l0"]  # type: ignore[arg-type]
    exact = [each.double().T @ each.double() for each in rows]
    torch.testing.assert_close(found.matrix, sum(0.1 * each / each.norm() for each in exact))
    loose = measure_grams(Twice(), plan_for(4, [2]), batches, norms={"l0": 1e9})["l0"]  # type: ignore[arg-type]
    torch.testing.assert_close(loose.matrix, sum(exact), rtol=1e-5, atol=1e-5)


def test_231_examples_that_share_a_batch_are_not_bounded_one_by_one(plan: MergePlan) -> None:
    norms = dict.fromkeys((shared.name for shared in plan.inputs), 1.0)
    with pytest.raises(LocalProtocolError, match="2 examples in a batch"):
        measure_grams(tiny_bert(), plan, [batch_of([3, 4], 4)], norms=norms)
    alone = measure_grams(tiny_bert(), plan, [batch_of([5], 5)], norms=norms)
    assert all(float(gram.matrix.norm()) <= 1 + 1e-9 for gram in alone.values())


# --- the budget ---


@pytest.fixture
def bounded(agreement: Agreement) -> Agreement:
    norms = tuple(float(number) for number in range(1, 1 + len(agreement.bounds.grams)))
    return agreement.model_copy(
        update={
            "privacy": Privacy(epsilon=4.0),
            "method": "regmean",
            "compare_with": (),
            "bounds": agreement.bounds.model_copy(update={"gram_norms": norms}),
        }
    )


def test_232_every_gram_counts_and_each_owner_adds_all_of_the_noise(bounded: Agreement) -> None:
    leg = next(each for each in legs_of(bounded) if each.name == "grams")
    count = len(bounded.bounds.grams)
    assert leg.sensitivity is not None
    assert leg.sigma is not None
    assert leg.sensitivity == pytest.approx(sqrt(count), rel=1e-3)
    assert leg.sensitivity > sqrt(count)
    assert (leg.sensitivity / leg.sigma) ** 2 == pytest.approx(0.3 * mu_of(4.0, 1e-5) ** 2)
    assert bounded.noise_shares > 1
    assert own_noise(bounded, "grams") == leg.sigma  # and no share of it
    assert own_noise(bounded, "metrics") < next(each.sigma or 0 for each in legs_of(bounded) if each.name == "metrics")


def test_232_a_gram_that_is_summed_twice_counts_twice(bounded: Agreement) -> None:
    assert times_measured(bounded) == 1
    both = bounded.model_copy(update={"compare_with": ("regmean_plus_plus", "anchored", "average")})
    assert times_measured(both) == 2  # anchored sums what regmean sums
    assert own_noise(both, "grams") == pytest.approx(sqrt(2) * own_noise(bounded, "grams"))
    assert times_measured(bounded.model_copy(update={"method": "regmean_plus_plus"})) == 1
    assert sum(bounded.budget_shares.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("tables", "why"),
    [
        ({"weighting": "owners"}, "would depend on how many the owner has"),
        ({"method": "anchored", "weighting": "owners"}, "would depend on how many the owner has"),
        ({"method": "regmean_plus_plus", "weighting": "owners"}, "would depend on how many the owner has"),
        ({"summation": {"kind": "masked", "ring_bits": 32}}, "Gram matrices have scales"),
        ({"method": "lorm"}, "to which no noise is added"),
        ({"privacy": {"epsilon": 8.0, "legs": {"grams": 0.75}}}, r"add up to 0\.85 of the budget"),
    ],
)
def test_233_grams_that_one_example_could_move_further_are_refused(
    tables: dict[str, Any], why: str, little_folder: Path
) -> None:
    agreed = parse_toml((little_folder / "agreement.toml").read_bytes(), "agreement.toml")
    agreed |= {"method": "regmean", "compare_with": [], "privacy": {"epsilon": 8.0}}
    agreed["task"]["label_set"] = "all"
    assert parse_settings(agreed, AgreementDraft, "agreement.toml").has_noised_grams
    with pytest.raises(SettingsError, match=why):
        parse_settings(agreed | tables, AgreementDraft, "agreement.toml")


def test_233_grams_whose_norms_are_not_agreed_are_no_agreement(bounded: Agreement) -> None:
    task = bounded.task.model_copy(update={"label_set": "all"})
    fields = dict(bounded) | {"task": task}
    assert Agreement(**fields).has_noised_grams
    with pytest.raises(ValueError, match=r"bounds\.gram_norms has 0 values"):
        Agreement(**fields | {"bounds": bounded.bounds.model_copy(update={"gram_norms": ()})})


# --- sums ---


def consortium(
    d_in: int, d_out: int, noise: GramNoise | None = NOISE, **tables: Any
) -> tuple[MergeSettings, dict[str, OwnerTerms]]:
    plan = plan_for(d_in, [d_out])
    tables = {"regmean": RegMeanTable(alphas=(0.5,), measured_examples=10_000)} | tables
    agreed = replace(verified(merge_settings(plan, **tables), 3), gram_noise=noise)
    generator = torch.Generator().manual_seed(0)

    def owner(number: int) -> OwnerTerms:
        rows = torch.randn(ROWS, d_in, generator=generator, dtype=torch.float64) / d_in**0.5
        return owner_for(plan, rows, seed=number)

    return agreed, {name: owner(number) for number, name in enumerate("abc")}


def vectors_of(
    methods: list[str], agreed: MergeSettings, owners: Mapping[str, OwnerTerms]
) -> tuple[TensorLayout, dict[str, NDArray[np.float64]]]:
    layout = contribution_layout(methods, agreed)
    vectors = {name: np.zeros(layout.size) for name in owners}
    for number, (name, owner) in enumerate(owners.items()):
        noise = Noise(key=bytes([number + 1]) * 32, position=0, layout=layout, num_owners=3)
        layout.flatten(contribution(methods, agreed, replace(owner, noise=noise)), vectors[name])
        noise.check_complete()
    return layout, vectors


def test_234_whoever_knows_all_weight_changes_gets_single_grams_and_each_has_its_owner_s_noise() -> None:
    """The trap. With as many outputs as the others have inputs, the products are equations about every single Gram."""
    d_in, d_out = 20, 45
    agreed, owners = consortium(d_in, d_out, regmean=RegMeanTable(alphas=(1.0,), ridge=0.0, measured_examples=10_000))
    layout, vectors = vectors_of(["regmean"], agreed, owners)
    total = Contributions.of(layout, vectors).total
    summed, products = total["gram/l0"], total["gram_delta/l0.weight"]
    known = [agreed.plan.inputs[0].layers[0].take(owner.delta).double().numpy() for owner in owners.values()]
    beside = np.concatenate([known[1] - known[0], known[2] - known[0]])  # (2 d_in, d_out)
    of_others = np.linalg.lstsq(beside.T, (products - summed @ known[0]).T, rcond=None)[0].T  # [H_b, H_c]
    single = summed - of_others[:, :d_in] - of_others[:, d_in:]
    np.testing.assert_allclose(single, layout.read(vectors["a"], "gram/l0"), atol=1e-4)  # the trap works
    ridge = (NOISE.ridge("l0", d_in)) * np.eye(d_in)
    drawn = single - owners["a"].grams["l0"].matrix.numpy() - ridge
    of_pairs = drawn[np.triu_indices(d_in, 1)]  # 190 numbers
    assert of_pairs.std() == pytest.approx(MULTIPLIER * NORM / sqrt(2), rel=0.15)  # and gives no less than all noise
    assert drawn.diagonal().std() == pytest.approx(MULTIPLIER * NORM, rel=0.5)


@pytest.mark.parametrize("alphas", [(0.5,), (0.3, 0.9)])
def test_234_nothing_leaves_that_was_made_of_an_exact_gram(alphas: tuple[float, ...]) -> None:
    """Another Gram with the same noised one: all tensors are the same, bit for bit."""
    table = RegMeanTable(alphas=alphas, measured_examples=10_000)
    agreed, owners = consortium(6, 4, regmean=table)
    layout, _ = vectors_of(["regmean"], agreed, owners)

    class Fixed(Noise):
        def added(self, name: str, tensor: NDArray[np.float64]) -> NDArray[np.float64]:
            super().added(name, tensor)
            return np.eye(6) * 7.0

    sent = []
    for factor in (1.0, 1.5):
        gram = owners["a"].grams["l0"]
        terms = replace(owners["a"], grams={"l0": Gram(matrix=factor * gram.matrix, rows=round(factor * gram.rows))})
        noise = Fixed(key=bytes(32), position=0, layout=layout, num_owners=3)
        sent.append(dict(contribution(["regmean"], agreed, replace(terms, noise=noise))))
    for name, tensor in sent[0].items():
        assert np.array_equal(tensor, sent[1][name]), name


def test_234_every_gram_of_inputs_has_noise_in_its_layout() -> None:
    agreed, owners = consortium(6, 4)
    layout, vectors = vectors_of(["regmean"], agreed, owners)
    assert layout.entry("gram/l0").noise == MULTIPLIER * NORM
    exact = owners["a"].grams["l0"].matrix.numpy()
    assert np.abs(layout.read(vectors["a"], "gram/l0") - exact)[np.triu_indices(6, 1)].mean() > 1
    (step,) = REGMEAN_PLUS_PLUS.steps(agreed)
    assert REGMEAN_PLUS_PLUS.step_layout(agreed, step).entry("gram/l0").noise == MULTIPLIER * NORM
    with pytest.raises(AssertionError):
        dict(contribution(["regmean"], agreed, owners["a"]))  # without noise, nothing is made


def test_232_rounding_moves_a_gram_by_no_more_than_is_accounted_for() -> None:
    """Numbers that an example, however small, lifts from one whole unit to the next: by so many that it shows."""
    dimension, examples = 1536, 10**13
    plan = plan_for(dimension, [2])
    agreed = replace(merge_settings(plan), gram_noise=replace(NOISE, multiplier=33.0), num_owners=3)
    entry = REGMEAN.layout(agreed).entry("gram/l0")
    bits = fraction_bits(entry.bound, 3)
    units = NOISE.norms["l0"] * 33.0 * 2.0**bits
    before = np.full((dimension, dimension), 0.49)
    moved = np.rint(before + 0.02) - np.rint(before)  # in units, by next to nothing
    shown = np.linalg.norm(moved) / units  # in standard deviations of the noise
    assert shown == pytest.approx(replace(NOISE, multiplier=33.0).rounding(dimension, units) / 33.0)
    assert shown < ROUNDING / 33.0
    coarse = replace(
        agreed,
        bounds=replace(agreed.bounds, examples=examples),
        tables={**agreed.tables, "regmean": RegMeanTable(measured_examples=examples)},
    )
    with pytest.raises(SettingsError, match="rounding to fixed point would let one example"):
        REGMEAN.layout(coarse)


def test_235_who_drops_out_takes_no_ridge_with_them_that_the_others_noise_needs() -> None:
    """Three of five are enough: whoever is left, their ridges outweigh their noise."""
    dimension = 40
    noise = GramNoise(norms={"l0": NORM}, multiplier=MULTIPLIER, owners=3)
    plan = plan_for(dimension, [2])
    agreed = replace(verified(merge_settings(plan), 5), gram_noise=noise)
    layout = REGMEAN.layout(agreed)
    nothing = owner_for(plan, torch.zeros(0, dimension, dtype=torch.float64), seed=0)
    for draw in range(10):
        sent = []
        for key in range(5):
            drawn = Noise(key=bytes([key + 1]) * 32, position=draw, layout=layout, num_owners=5)
            tensors = dict(contribution(["regmean"], agreed, replace(nothing, noise=drawn)))
            sent.append(tensors["gram/l0"])
        for left in (3, 4, 5):
            assert np.linalg.eigvalsh(sum(sent[:left]))[0] > 0
            largest = noise.own("l0") * ((2 * dimension) ** 0.5 + 7)  # eigenvalue of one owner's noise
            assert left * noise.ridge("l0", dimension) >= (1 - 1e-12) * left**0.5 * largest
        assert np.linalg.eigvalsh(sent[0])[0] < 0.5 * noise.ridge("l0", dimension)  # and no more than that


def test_236_grams_of_more_examples_than_the_owners_have() -> None:
    agreed, owners = consortium(6, 4)
    layout, vectors = vectors_of(["regmean"], agreed, owners)
    check_contributions(Contributions.of(layout, vectors).total, layout, agreed)
    start = layout.read(vectors["b"], "gram/l0")
    start[np.arange(6), np.arange(6)] += NORM * (3 * ROWS + 1)
    rest = {entry.name: layout.read(vectors["b"], entry.name) for entry in layout.entries}
    layout.flatten((rest | {"gram/l0": start}).items(), vectors["b"])
    with pytest.raises(NumericalError, match="honest owners of the same weight"):
        check_contributions(Contributions.of(layout, vectors).total, layout, agreed)


@pytest.mark.parametrize("method", ["regmean", "anchored"])
def test_a_merge_of_noised_grams_is_verified_and_is_near_the_exact_one(method: str) -> None:
    table = {"anchored": AnchoredTable(anchors=(0.1,))}
    sent = {}
    for noise in (GramNoise(norms={"l0": NORM}, multiplier=0.3, owners=3), None):
        agreed, owners = consortium(6, 4, noise, **table)
        layout, vectors = vectors_of([method], agreed, owners)
        contributions = Contributions.of(layout, vectors)
        descriptor, value = (REGMEAN, 0.5) if method == "regmean" else (ANCHORED, 0.1)
        merged = descriptor.solve(agreed, contributions.total, value, with_spectra=True)
        check = Check(equations=descriptor.equations(agreed, value), contributions=contributions, merged=merged)
        assert check.wrong() == []
        sent[noise is None] = merged.delta["l0.weight"]
        check.delta["l0.weight"][0, 0] += 0.1
        assert check.wrong() != []
    off = float((sent[True] - sent[False]).norm() / sent[True].norm())
    assert 1e-5 < off < 0.1


@given(st.integers(1, 500), st.floats(0.001, 1), st.integers(2, 20))
def test_twice_the_noise_takes_twice_the_examples(dimension: int, kept: float, owners: int) -> None:
    needed, twice = (replace(NOISE, multiplier=each).examples_needed(owners, dimension, kept) for each in (1.0, 2.0))
    assert twice == pytest.approx(2 * needed)
    assert NOISE.examples_needed(owners, dimension, 0.0) == inf


def test_what_is_kept_of_a_gram_is_its_smallest_eigenvalue_for_any_rows() -> None:
    tables = dict(merge_settings(plan_for(6, [2]), regmean=RegMeanTable(alphas=(0.4, 0.9))).tables)
    row = torch.randn(1, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flat = row.sign()  # the trace is spread evenly
    gram = flat.T @ flat
    left = 0.4 * gram + 0.6 * torch.diag(gram.diagonal())
    assert float(torch.linalg.eigvalsh(left)[0] / gram.trace()) == pytest.approx(REGMEAN.least_kept(tables, 6))


# --- at an owner ---


@pytest.fixture
def folder(little_folder: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(little_folder, tmp_path / "noised", ignore=shutil.ignore_patterns("output")))
    draft = (folder / "agreement.toml").read_text()
    for old, new in (
        ('["average", "task_arithmetic", "fisher"]', '["average"]'),
        ("# epsilon = 8.0", "epsilon = 100.0"),
        ("# label_set = ", "label_set = "),
    ):
        assert old in draft
        draft = draft.replace(old, new)
    (folder / "agreement.toml").write_text(draft)
    return folder


def test_an_owner_with_too_few_examples_says_how_many_it_takes(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with parties_of(folder, tmp_path / "out") as parties:
        assert all(norm > 0 for norm in parties.agreement.bounds.gram_norms)
        owner = Owner(parties.files["hotel"])
        with pytest.raises(Exception, match="to the Gram matrices") as caught:
            owner.check()
        said = in_two_lines(caught.value)  # type: ignore[arg-type]
        consent = consent_text(owner)
        few = {shared.name: Gram(matrix=torch.zeros(1, 1), rows=1) for shared in owner.workbench.plan.inputs}
        assert owner.workbench._checked(few) is few  # noise hides rows however few; a refusal would count tokens
    assert "brings 200 examples" in said
    assert "of all owners" in said
    assert "Your own program adds all of the noise on your Gram matrices." in consent
    assert "Gram matrices have noise before anything is made of them" in consent
    assert "rows per dimension of a Gram matrix, you do not take part" not in consent


def test_a_draft_names_a_norm_for_each_gram_or_none(folder: Path, tmp_path: Path) -> None:
    draft = folder / "agreement.toml"
    assert "# [bounds]" in draft.read_text()
    draft.write_text(draft.read_text().replace("# [bounds]", "[bounds]\ngram_norms = [1.0]"))
    (tmp_path / "out").mkdir()
    wrong = pytest.raises(SettingsError, match=r"bounds\.gram_norms: 1 of them, and \d Gram matrices")
    with wrong, parties_of(folder, tmp_path / "out"):
        pass


def anchor(folder: Path) -> None:
    """Merge by a method that few examples are enough for."""
    draft = folder / "agreement.toml"
    text = draft.read_text().replace('method = "regmean"', 'method = "anchored"')
    draft.write_text(text.replace("[regmean]", "[anchored]\nanchors = [1.0]\n\n[regmean]"))


def burn(process: Process) -> None:
    session = process.terms.request.session
    process.roll_call()
    process.send_all(BurnSession(run=RUN, session=session))
    digest, names = process.parties.agreement.digest(), process.parties.agreement.owner_names
    identities = process.parties.identities
    signed = [Signed(place, sign_burned(identities[name], digest, session)) for place, name in enumerate(names)]
    process.send_all(BurnCertificate(run=RUN, session=session, signatures=Signed.pack_all(signed)))


def bring_models(folder: Path) -> None:
    """Every owner brings a model, the base, so that none is trained."""
    draft = (folder / "agreement.toml").read_text()
    for path in folder.glob("[hcp]*.toml"):
        declared = "declared = { epsilon = 1.0, delta = 1e-6 }"
        draft = draft.replace(f'name = "{path.stem}"', f'name = "{path.stem}"\n{declared}')
        shutil.copytree(folder / "base", folder / "models" / path.stem)
        settings = path.read_text().replace("# fine_tuned", "fine_tuned")
        path.write_text(re.sub(r"\[training\]\n(.+\n)+", "", settings))
    (folder / "agreement.toml").write_text(draft)


def test_237_a_sum_that_was_aborted_gets_no_second_noise(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever colludes with all other owners opens sums that were burned. New noise for each of them, as where a device
    rounds otherwise or another model was sent, would average away.
    """
    anchor(folder)
    bring_models(folder)
    draft = folder / "agreement.toml"
    draft.write_text(re.sub(r"(?m)^(# )?measured_examples = .*$", "", draft.read_text()))
    draft.write_text(draft.read_text().replace("\n[regmean]", "\n[regmean]\nmeasured_examples = 10", 1))
    (tmp_path / "out").mkdir()
    with parties_of(folder, tmp_path / "out") as parties:
        process = Process(parties)
        for number, rounded in ((1, 1.0), (2, 1.0), (3, 1 + 1e-6)):
            monkeypatch.setattr(gram, "bounded_rows", lambda rows, norm, by=rounded: by * bounded_rows(rows, norm))
            process.begin(process.open_sum(number))
            if rounded != 1:
                with pytest.raises(ConsentError, match="it is another one now"):
                    process.until(SurvivorList)
                return
            process.until(SurvivorList)
            burn(process)


@pytest.mark.slow
def test_a_whole_merge_of_noised_grams(folder: Path) -> None:
    anchor(folder)
    for path in folder.glob("[hcp]*.toml"):
        path.write_text(path.read_text().replace("epochs = 6", "epochs = 1").replace("size = 32", "size = 200"))
    report = simulate(folder, with_references=False)
    assert report.verified
    spent = {leg.name: leg for leg in report.agreement.privacy.legs}
    assert spent["grams"].added == pytest.approx(sqrt(3) * (spent["grams"].sigma or 0))
    card = (folder / "output" / "model" / "README.md").read_text()
    assert "and the Gram matrices that were summed. Spent: training 60%, metrics 10%, grams 30%." in card


def test_legs_have_room_for_all_sums() -> None:
    legs = Legs()
    assert legs.metrics + legs.refit + legs.grams <= 0.8 + 1e-12
