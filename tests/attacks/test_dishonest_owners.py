"""Attacks 85 to 89: an owner whose program contributes what it did not measure. Most of it nobody can see (c)."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client.owner import Owner
from client.receipts import _check_is_good_enough
from client.state import TestedRecord
from common.agreement import Agreement
from common.errors import ConsentError, NumericalError, SettingsError
from common.merge_methods import contribution_layout, regmean
from common.merge_methods.data_free import DataFreeTable
from common.merge_methods.logit_adjusted import SHARES
from common.merge_methods.refit import REFIT
from common.merge_methods.terms import ClassifierTerms, MergeSettings, OwnerTerms
from common.models.delta import ClippedDelta
from common.models.plan import MergePlan
from common.summation.protocol import Total
from deploy.commands.agree import consent_text
from server.bounds import check_classifier, check_contributions
from tests.support.merging import merge_settings, owner_for, plan_for, total_of
from tests.support.owner_process import Process
from tests.support.parties import IDENTITIES, Parties, parties_of
from tests.support.sums import run, terms_of

TestedRecord.__test__ = False  # type: ignore[attr-defined]


def owner_with(parties: Parties, sign_above: float | None, merged: int, base: int) -> Owner:
    """An owner under an agreement with this bound, that counted so many of 100 predictions as right."""
    Process(parties)
    owner = Owner(parties.files["hotel"])
    evaluation = owner.agreement.evaluation.model_copy(update={"sign_above": sign_above})
    owner.__dict__["agreement"] = owner.agreement.model_copy(update={"evaluation": evaluation})
    correct = {"base": base, "own_at_home": 90, owner.agreement.method: merged}
    owner.state.update_run(
        tested=tuple(TestedRecord(model=model, correct=each, rows=100, metric=0.5) for model, each in correct.items())
    )
    return owner


def test_85_a_merge_that_dishonest_contributions_spoiled(parties: Parties) -> None:
    with pytest.raises(ConsentError, match=r"is 0\.690; it signs 0\.700 or more .* no less than its base's 0\.500"):
        _check_is_good_enough(owner_with(parties, 0.7, merged=69, base=50))
    with pytest.raises(ConsentError, match=r"is 0\.800; it signs 0\.700 or more .* no less than its base's 0\.810"):
        _check_is_good_enough(owner_with(parties, 0.7, merged=80, base=81))
    _check_is_good_enough(owner_with(parties, 0.7, merged=70, base=70))
    _check_is_good_enough(owner_with(parties, None, merged=1, base=50))


def test_what_an_owner_signs_is_in_the_consent_text(parties: Parties) -> None:
    signs = "signs the result only if its accuracy on your own test rows is 0.7 or more, and no less than the base's."
    assert signs in consent_text(owner_with(parties, 0.7, merged=70, base=70))
    assert "signs the result only if" not in consent_text(owner_with(parties, None, merged=70, base=70))


def check(total: Total, settings: MergeSettings, methods: Sequence[str] = ("average",)) -> None:
    check_contributions(total, contribution_layout(methods, settings), settings)


def total_with(agreement: Agreement, plan: MergePlan, **claimed: float) -> Total:
    """The total of three owners of 50 examples, one of whom claims something else."""
    settings = agreement.merge_settings(plan)
    layout = contribution_layout(["average"], settings)
    identities = {name: IDENTITIES[name] for name in agreement.owner_names}
    vectors = {name: np.zeros(layout.size) for name in identities}
    for vector in vectors.values():
        layout.read(vector, "weight")[:] = 50.0 if settings.weighting == "rows" else 1.0
        layout.read(vector, "examples")[:] = 50.0
    for name, value in claimed.items():
        layout.read(vectors["bea"], name)[:] = value
    return run("plain", identities, terms_of(identities, layout), vectors)


def test_86_a_weight_that_the_examples_do_not_explain(agreement: Agreement, plan: MergePlan) -> None:
    by_owner = agreement.model_copy(update={"weighting": "owners"})
    for each in (agreement, by_owner):
        check(total_with(each, plan), each.merge_settings(plan))
    with pytest.raises(NumericalError, match="weights add up to 1000100 and their examples to 150"):
        check(total_with(agreement, plan, weight=1e6), agreement.merge_settings(plan))
    with pytest.raises(NumericalError, match="weights add up to 2 and their examples to 150; the weights should be 3"):
        check(total_with(by_owner, plan, weight=0.4), by_owner.merge_settings(plan))


def test_86_more_examples_than_all_owners_may_have(agreement: Agreement, plan: MergePlan) -> None:
    bounds = agreement.bounds.model_copy(update={"examples": 100})
    few = agreement.model_copy(update={"bounds": bounds})
    total = total_with(agreement, plan, weight=1e6, examples=1e6)
    check(total, agreement.merge_settings(plan))  # as many as the bound allows: nobody can see that
    with pytest.raises(NumericalError, match="examples at most 300"):
        check(total, few.merge_settings(plan))


# --- 87 to 89: contributions that are larger than honest ones ---

PLAN = plan_for(6, [3, 4])
OWNERS = {
    name: owner_for(PLAN, torch.randn(40, 6, generator=torch.Generator().manual_seed(n)).double(), n)
    for n, name in enumerate(("ada", "bea", "cyd"))
}


def bounded(largest: float, gram_bound: float = 4096.0) -> MergeSettings:
    settings = merge_settings(PLAN, bound=gram_bound)
    changes = dict.fromkeys(PLAN.changed, largest)
    return replace(settings, bounds=replace(settings.bounds, changes=changes))


def clipped(settings: MergeSettings) -> dict[str, OwnerTerms]:
    """The owners, as an honest program has them contribute."""
    return {
        name: replace(owner, delta=ClippedDelta(owner.delta, settings.bounds.changes)) for name, owner in OWNERS.items()
    }


def with_one(owners: Mapping[str, OwnerTerms], change: Callable[[OwnerTerms], OwnerTerms]) -> dict[str, OwnerTerms]:
    return {**owners, "bea": change(owners["bea"])}


def times(factor: float) -> Callable[[OwnerTerms], OwnerTerms]:
    """An owner that multiplies its weight changes."""
    return lambda owner: replace(owner, delta={name: factor * owner.delta[name] for name in owner.delta})


METHODS_WITH_CHANGES = ("average", "regmean", "data_free")


@given(largest=st.floats(1e-3, 1e3), method=st.sampled_from(METHODS_WITH_CHANGES))
def test_owners_that_clip_their_changes_are_within_the_bounds(largest: float, method: str) -> None:
    settings = bounded(largest)
    for owner in clipped(settings).values():
        for name in PLAN.changed:
            assert owner.delta[name].norm() <= largest * (1 + 1e-9)
    check(total_of([method], settings, clipped(settings)), settings, [method])


def test_owners_whose_ridge_pulls_far_are_within_the_bounds() -> None:
    """With more owners than a layer has inputs, the ridge's part can be larger than the Gram's trace."""
    far = replace(bounded(1.0), num_owners=30)
    settings = replace(far, tables={**far.tables, "data_free": DataFreeTable(ridge=1.0, pull=1.0)})
    ada = clipped(settings)["ada"]
    check(total_of(["data_free"], settings, dict.fromkeys(OWNERS, ada)), settings, ["data_free"])


def test_changes_that_are_small_enough_stay_as_they_are() -> None:
    delta = OWNERS["ada"].delta
    for name, change in ClippedDelta(delta, dict.fromkeys(delta, 1e3)).items():
        assert torch.equal(change, delta[name])


def test_an_owner_s_own_program_clips_its_changes_to_the_agreed_share_of_the_base(
    reviews_folder: Path, tmp_path: Path
) -> None:
    consortium = tmp_path / "consortium"
    shutil.copytree(reviews_folder, consortium, ignore=shutil.ignore_patterns("output"))
    draft = consortium / "agreement.toml"
    draft.write_text(draft.read_text() + "\n[bounds]\nchange = 0.01\n")
    with parties_of(consortium, tmp_path / "output") as parties:
        bench = Owner(parties.files["hotel"]).workbench
        base, largest = dict(bench.load_base().named_parameters()), bench.merge_settings.bounds.changes
        measured = bench.measure(tmp_path)
        norms = {name: float(measured.delta[name].norm()) for name in bench.plan.changed}
        text = consent_text(Owner(parties.files["hotel"]))
    assert all(norms[name] <= largest[name] * (1 + 1e-5) for name in norms)
    weights = [name for name in norms if base[name].ndim == 2]
    assert max(norms[name] / largest[name] for name in weights) > 0.99  # so some were longer
    typical = [largest[name] / float(base[name].detach().norm()) for name in weights]
    assert min(typical) == pytest.approx(0.01, rel=0.01)
    assert "change of a tensor that is more than 0.01 of the base's is scaled down" in " ".join(text.split())


def test_an_agreement_states_a_bound_for_each_change(agreement: Agreement, plan: MergePlan) -> None:
    for update in ({"change": 0.1}, {"changes": (1.0,)}, {"change": 0.1, "changes": (1.0,)}):
        wrong = agreement.model_copy(update={"bounds": agreement.bounds.model_copy(update=update)})
        with pytest.raises(SettingsError, match="one is needed for each"):
            wrong.merge_settings(plan)


@pytest.mark.parametrize(("method", "factor"), [("average", 5), ("average", -300), ("regmean", 60)])
def test_87_weight_changes_beyond_what_others_clip_to(method: str, factor: float) -> None:
    settings = bounded(1.0)
    total = total_of([method], settings, with_one(clipped(settings), times(factor)))
    with pytest.raises(NumericalError, match=r"owners that keep to bounds\.change reach at most"):
        check(total, settings, [method])


@pytest.mark.parametrize("lie", [[6.0, 0.0, 0.0], [-30.0, 0.0, 0.0]])
def test_148_shares_of_labels_that_are_not_shares(lie: list[float]) -> None:
    """They would decide by how much the others' classifier prefers each label."""
    plan = plan_for(6, [3], has_bias=True)
    settings = merge_settings(plan)
    owners = {name: owner_for(plan, torch.ones(40, 6).double(), n) for n, name in enumerate(OWNERS)}
    total = total_of(["logit_adjusted"], settings, owners)
    check(total, settings, ["logit_adjusted"])
    (position,) = (position for entry, position in total.layout.positions() if entry.name == SHARES)
    total.vector[position] += 40 * np.array(lie)  # of one owner, which weighs 40
    with pytest.raises(NumericalError, match="the shares of labels add up to"):
        check(total, settings, ["logit_adjusted"])


def test_88_grams_beyond_the_weights() -> None:
    settings = merge_settings(PLAN, bound=4.0)
    larger = replace(OWNERS["bea"].grams["l0"], matrix=30 * OWNERS["bea"].grams["l0"].matrix)
    owners = {**OWNERS, "bea": replace(OWNERS["bea"], grams={"l0": larger})}
    check(total_of(["regmean"], settings, OWNERS), settings, ["regmean"])
    with pytest.raises(NumericalError, match="outside the agreed bound 4; nothing has left"):
        total_of(["regmean"], settings, owners)  # by an honest program
    with pytest.MonkeyPatch.context() as dishonest:
        dishonest.setattr(regmean, "_check_size", lambda *_: None)
        total = total_of(["regmean"], settings, owners)
    with pytest.raises(NumericalError, match=r"gram/l0 adds up to .* honest owners of the same weight"):
        check(total, settings, ["regmean"])


def test_88_grams_of_weight_changes_beyond_the_weights() -> None:
    settings = merge_settings(PLAN)
    total = total_of(["data_free"], settings, OWNERS)
    check(total, settings, ["data_free"])
    total["data_free_gram/l0"]
    honest, bea = total.vector.copy(), total_of(["data_free"], settings, {"bea": OWNERS["bea"]}).vector
    for entry, position in total.layout.positions():
        if entry.name.startswith("data_free_"):
            total.vector[position] += 29 * bea[position]
    assert (honest != total.vector).any()
    with pytest.raises(NumericalError, match="data_free_gram/l0 adds up to"):
        check(total, settings, ["data_free"])


def test_88_grams_in_the_directions_of_adapters_beyond_the_weights() -> None:
    settings = merge_settings(PLAN, bound=4.0)
    total = total_of(["lorm"], settings, OWNERS)
    check(total, settings, ["lorm"])
    (position,) = (position for entry, position in total.layout.positions() if entry.name == "lorm_gram/l0")
    total.vector[position] *= 1000
    with pytest.raises(NumericalError, match="lorm_gram/l0 adds up to"):
        check(total, settings, ["lorm"])


@pytest.mark.parametrize("kind", ["head_gram", "head_rows", "head_"])
def test_89_a_classifier_fitted_to_more_rows_than_an_owner_has(kind: str) -> None:
    plan = plan_for(6, [3], has_constant=True)
    settings = merge_settings(plan)
    step, random = REFIT.steps(settings)[0], torch.Generator().manual_seed(0)
    layout = REFIT.step_layout(settings, step)
    vectors = {}
    for name in ("ada", "bea", "cyd"):
        features = torch.cat([torch.randn(40, 6, generator=random), torch.ones(40, 1)], dim=1).double()
        terms = ClassifierTerms(
            features=features,
            targets=torch.randint(3, (40,), generator=random),
            scores=torch.randn(40, 3, generator=random).double(),
            start=torch.randn(7, 3, generator=random).double(),
        )
        vectors[name] = np.zeros(layout.size)
        owner = OwnerTerms(examples=80, delta={}, classifier=terms)
        layout.flatten(REFIT.step_contribution(settings, step, owner), vectors[name])
    identities = {name: IDENTITIES[name] for name in vectors}
    check_classifier(run("plain", identities, terms_of(identities, layout), vectors), layout, 240.0, plan)
    for entry, position in layout.positions():
        if entry.name.startswith(kind):
            vectors["bea"][position] *= 30
    total = run("plain", identities, terms_of(identities, layout), vectors)
    with pytest.raises(NumericalError, match=r"rows, but the owners' weights add up to 240"):
        check_classifier(total, layout, 240.0, plan)
