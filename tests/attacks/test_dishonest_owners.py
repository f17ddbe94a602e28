"""Attacks 85 and 86: an owner whose program contributes what it did not measure. Most of it nobody can see (c)."""

import numpy as np
import pytest

from client.owner import Owner
from client.receipts import _check_is_good_enough
from client.state import TestedRecord
from common.agreement import Agreement
from common.errors import ConsentError, NumericalError
from common.merge_methods import contribution_layout
from common.models.plan import MergePlan
from common.summation.protocol import Total
from deploy.commands.agree import consent_text
from server.merge import _check_weights
from tests.support.owner_process import Process
from tests.support.parties import IDENTITIES, Parties
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
        _check_weights(total_with(each, plan), each.owner_names, each)
    with pytest.raises(NumericalError, match="weights add up to 1000100 and their examples to 150"):
        _check_weights(total_with(agreement, plan, weight=1e6), agreement.owner_names, agreement)
    with pytest.raises(NumericalError, match="weights add up to 2 and their examples to 150; the weights should be 3"):
        _check_weights(total_with(by_owner, plan, weight=0.4), by_owner.owner_names, by_owner)


def test_86_more_examples_than_all_owners_may_have(agreement: Agreement, plan: MergePlan) -> None:
    bounds = agreement.bounds.model_copy(update={"examples": 100})
    few = agreement.model_copy(update={"bounds": bounds})
    total = total_with(agreement, plan, weight=1e6, examples=1e6)
    _check_weights(total, agreement.owner_names, agreement)  # as many as the bound allows: nobody can see that
    with pytest.raises(NumericalError, match="examples at most 300"):
        _check_weights(total, few.owner_names, few)
