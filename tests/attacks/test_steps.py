"""A coordinator that plays with the steps of a multi-round method: each move is refused before anything leaves."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from client.owner import Owner
from common.certificates import deliveries_digest
from common.errors import ConsentError, RemoteProtocolError
from common.messages import Message, OpenSum
from common.schedule import Round
from deploy.commands.agree import consent_text
from tests.support.owner_process import OTHER, Process, part_of
from tests.support.parties import parties_with_method

METHOD = "refit"


@pytest.fixture
def process(two_blocks_folder: Path, tmp_path: Path) -> Iterator[Process]:
    with parties_with_method(two_blocks_folder, tmp_path, METHOD) as parties:
        process = Process(parties)
        process.sum(process.open_sum(1))
        yield process


@pytest.fixture
def hotel(process: Process) -> Owner:
    return Owner(process.parties.files["hotel"])


def step_round(process: Process) -> Round:
    (found,) = process.schedule.steps(METHOD)
    return found


def merged(process: Process) -> Message:
    return part_of(process.parties, process.schedule.deliveries("merged_step", method=METHOD)[0])


def refused(owner: Owner, message: Message, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        owner.answer(message)
    assert not owner.ledger.pending


def opening(process: Process, **changes: object) -> OpenSum:
    return replace(process.open_sum(2, step_round(process)), **changes)


def test_a_step_before_what_it_is_measured_on(process: Process, hotel: Owner) -> None:
    refused(hotel, opening(process), RemoteProtocolError, "but refit, merged before step 1 is due")


def test_a_step_that_was_not_agreed(process: Process, hotel: Owner) -> None:
    hotel.answer(merged(process))
    told = deliveries_digest(hotel.state.run.delivered)
    other_layout = opening(process, deliveries_digest=told, layout_digest=OTHER)
    refused(hotel, other_layout, ConsentError, "not the one that was agreed")
    refused(hotel, opening(process, position=len(process.schedule.events)), RemoteProtocolError, "of a schedule of")


def test_a_step_about_other_layers_than_those_sent_to_this_owner(process: Process, hotel: Owner) -> None:
    hotel.answer(merged(process))
    refused(hotel, opening(process), RemoteProtocolError, "other models than those sent")


def test_merged_layers_out_of_order_twice_or_of_another_kind(process: Process, hotel: Owner) -> None:
    candidate = part_of(process.parties, process.candidate_slot(METHOD))
    refused(hotel, candidate, RemoteProtocolError, "but refit, merged before step 1 is due")
    hotel.answer(merged(process))
    before = hotel.state.run
    hotel.answer(merged(process))  # a coordinator that was started again: the same once more changes nothing
    assert hotel.state.run == before
    part = part_of(process.parties, process.schedule.deliveries("merged_step", method=METHOD)[0])
    refused(hotel, replace(part, payload=part.payload + 1), ConsentError, "sent a second version of merged step")
    elsewhere = replace(part, position=candidate.position)
    refused(hotel, elsewhere, RemoteProtocolError, "sent a merged step at position .* which is for")


def test_the_consent_text_names_every_round_and_the_labels(hotel: Owner) -> None:
    text = consent_text(hotel)
    assert "Each leaves once, in one of 2 rounds:" in text
    assert "how many rows of each label there are" in " ".join(text.split())
    assert "BETWEEN TWO ROUNDS (REFIT) THE COORDINATOR SENDS MERGED LAYERS" in text
    assert "SAY YES ONLY IF YOU TRUST IT TO SEND WHAT IT SOLVED" in text
