"""A coordinator that plays with the steps of a method that has several: each move is refused before anything leaves."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from client.owner import Owner
from common.agreement import AgreementDraft
from common.certificates import candidates_digest
from common.errors import ConsentError, RemoteProtocolError
from common.merge_methods import merged_layout, step_layout, steps
from common.messages import PROTOCOL_VERSION, CandidatePart, Message, OpenSum, RollCall
from common.models.loading import load_base
from common.models.plan import merge_plan
from common.settings_file import load_settings
from deploy.commands.agree import consent_text
from deploy.complete import complete_agreement
from deploy.simulation.simulate import find_owner_files, make_identities, set_up_parties

RUN = "ab" * 32
METHOD = "refit"


@pytest.fixture
def hotel(reviews_folder: Path, tmp_path: Path) -> Iterator[Owner]:
    draft = load_settings(reviews_folder / "agreement.toml", AgreementDraft).model_copy(
        update={"method": METHOD, "compare_with": ()}
    )
    identities = make_identities(draft, tmp_path)
    keys = {name: each.public_key for name, each in identities.items()}
    agreement = complete_agreement(draft, reviews_folder / "base", keys)
    files = find_owner_files(reviews_folder, draft)
    with set_up_parties(tmp_path, agreement, reviews_folder / "base", files, identities) as (_, party_files):
        owner = Owner(party_files[list(files).index("hotel")])
        request = RollCall(version=PROTOCOL_VERSION, run=RUN, agreement_digest=agreement.digest())
        owner.answer(request)
        yield owner


def request_for(owner: Owner, statistic: str) -> OpenSum:
    agreement = owner.agreement
    plan = merge_plan(load_base(owner.workbench._base_folder, agreement.task, agreement.seed), agreement.tensors)
    layout = step_layout(agreement, plan, METHOD, steps(plan, METHOD)[0])
    return OpenSum(
        run=RUN,
        agreement_digest=agreement.digest(),
        round=1,
        nonce="cd" * 32,
        statistic=statistic,
        models="",
        candidates_digest=candidates_digest([]),
        layout_digest=layout.digest(),
    )


def prefix_for(owner: Owner, number: int) -> CandidatePart:
    layout = merged_layout(merge_plan(owner.workbench.load_base(), owner.agreement.tensors), METHOD, 0)
    return CandidatePart(
        run=RUN,
        agreement_digest=owner.agreement.digest(),
        model=f"{METHOD} {number}",
        split="prefix",
        part=0,
        parts=1,
        payload=np.zeros(layout.size, np.float32),
    )


def refused(owner: Owner, message: Message, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        owner.answer(message)
    assert not owner.state.ledger(owner.agreement.digest()).pending


def test_a_step_before_what_it_is_measured_on(hotel: Owner) -> None:
    refused(hotel, request_for(hotel, f"{METHOD} 1"), RemoteProtocolError, "before it sent what comes first")


@pytest.mark.parametrize("statistic", ["regmean_plus_plus 1", f"{METHOD} 2", "regmean 1"])
def test_a_step_that_was_not_agreed(hotel: Owner, statistic: str) -> None:
    refused(hotel, request_for(hotel, statistic), ConsentError, "which nobody agreed on")


def test_a_step_about_other_layers_than_those_sent_to_this_owner(hotel: Owner) -> None:
    hotel.answer(prefix_for(hotel, 0))
    refused(hotel, request_for(hotel, f"{METHOD} 1"), RemoteProtocolError, "other models than those sent")


def test_merged_layers_out_of_turn_twice_or_of_another_method(hotel: Owner) -> None:
    refused(hotel, prefix_for(hotel, 1), RemoteProtocolError, "step 0 is due")
    hotel.answer(prefix_for(hotel, 0))
    received = hotel.state.read_json("candidates")
    hotel.answer(prefix_for(hotel, 0))  # a coordinator that was started again: the same once more changes nothing
    assert hotel.state.read_json("candidates") == received
    other = prefix_for(hotel, 0)
    refused(hotel, replace(other, payload=other.payload + 1), ConsentError, "sent a second model as")
    other = replace(prefix_for(hotel, 0), model="regmean_plus_plus 0")
    refused(hotel, other, ConsentError, "which was not agreed")


def test_the_consent_text_tells_of_every_sum_and_of_the_labels(hotel: Owner) -> None:
    text = consent_text(hotel)
    assert "in 2 sums one after the other" in text
    assert "how many rows of each label there are" in text
    assert "BETWEEN TWO SUMS THE COORDINATOR SENDS MERGED LAYERS" in text
    assert "SAY YES ONLY IF YOU TRUST IT TO SEND WHAT IT SOLVED" in text
