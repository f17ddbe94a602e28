"""A coordinator that plays with the scales on which contributions of 32 bits are summed.

A number that is small beside its scale rounds to zero. With a scale of its own for every owner, a coordinator would
read one owner: its numbers at their true scale, everybody else's at one so large that nothing of them is left.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from client.measurement import gram_stream
from client.owner import Owner
from common import scaling
from common.errors import AmalgramError, ConsentError, DataError, NumericalError, RemoteProtocolError
from common.merge_methods import contribution_layout
from common.merge_methods.terms import Gram
from common.messages import (
    Acknowledgements,
    DeliveryPart,
    KeyBook,
    KeysAdvertised,
    KeyShares,
    Message,
    OpenSum,
    ScalesPart,
)
from common.scaling import Scales
from common.schedule import RoundKind
from common.summation import fixed_point
from common.summation.protocol import SessionOver
from common.summation.records import KeyEntry
from deploy.commands.agree import consent_text
from tests.support.owner_process import RUN, Process, delivered_by, part_of
from tests.support.parties import Parties, consortium_in_32_bits, parties_of


class Coordinator(Process):
    """Plays by the book until an attack begins; the owners are new processes for every message."""

    def __init__(self, parties: Parties) -> None:
        super().__init__(parties)
        self.layout = contribution_layout(parties.agreement.methods, parties.agreement.merge_settings(parties.plan))
        self.number = 0

    def request(self, kind: RoundKind, sent: NDArray[np.float32] | None = None) -> OpenSum:
        self.number += 1
        delivered = [] if sent is None else [delivered_by(self.scales_part(sent))]
        return self.open_sum(self.number, self.schedule.find(kind), delivered)

    def ask_scales(self) -> OpenSum:
        return self.request("scales")

    def ask_contribution(self, sent: NDArray[np.float32]) -> OpenSum:
        return self.request("contribution", sent)

    def sum_scales(self) -> NDArray[np.float32]:
        """The first round, to its end: the true scales."""
        return scaling.choose(self.layout, self.sum(self.ask_scales()))

    def scales_part(self, exponents: NDArray[np.float32]) -> DeliveryPart:
        return part_of(self.parties, self.schedule.deliveries("scales")[0], exponents)

    def send_scales(self, owner: str, exponents: NDArray[np.float32]) -> Message:
        return self.send(owner, self.scales_part(exponents))


@pytest.fixture
def evil(two_blocks_folder: Path, tmp_path: Path) -> Iterator[Coordinator]:
    """Three owners that agreed on 32 bits, and their coordinator."""
    consortium = consortium_in_32_bits(two_blocks_folder, tmp_path / "consortium", alphas="[0.95, 0.99]")
    with parties_of(consortium, tmp_path / "output") as parties:
        yield Coordinator(parties)


def test_why_scales_of_its_own_for_every_owner_would_give_one_owner_away(evil: Coordinator) -> None:
    """Not through the owners, who refuse: it is what their refusals are for."""
    layout = evil.layout
    vectors = {}
    for owner in evil.parties.files:
        vectors[owner] = np.zeros(layout.size)
        layout.flatten(Owner(evil.parties.files[owner]).workbench.contribution(), vectors[owner])
    true = np.full(scaling.exponents_layout(layout).size, 12, np.float32)  # any that hotel's numbers fit into
    total = np.zeros(scaling.scaled_layout(layout).size)
    for owner, vector in vectors.items():
        scales = Scales(layout, true if owner == "hotel" else true + 60)
        scaled = np.zeros_like(total)
        scaling.scaled_layout(layout).flatten(scaling.scaled(scales, vector), scaled)
        encoded = fixed_point.encode(scaling.scaled_layout(layout), scaled, 3)
        assert encoded.any() == (owner == "hotel")


def test_50_scales_of_its_own_for_every_owner(evil: Coordinator) -> None:
    """Told the truth, owners are asked about scales that others got; told each its own, they are in other sessions."""
    true = evil.sum_scales()
    of_owner = {"hotel": true, "cinema": true + 1, "phones": true + 1}
    for owner, exponents in of_owner.items():
        evil.send_scales(owner, exponents)
    with pytest.raises(RemoteProtocolError, match="after sending other models than those sent to this owner"):
        evil.send("cinema", evil.ask_contribution(true))
    entries = []
    for owner, exponents in of_owner.items():
        evil.number = 9
        reply = evil.send(owner, evil.ask_contribution(exponents))
        assert isinstance(reply, KeysAdvertised)
        place = list(evil.parties.agreement.roster).index(owner)
        entries.append(KeyEntry(place, reply.channel_key, reply.mask_key, reply.signature))
    evil.number = 9
    book = KeyBook(session=evil.ask_contribution(true).session, entries=KeyEntry.pack_all(entries))
    with pytest.raises(SessionOver, match="the signature of cinema is not valid"):
        evil.send("hotel", book)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (-3, RemoteProtocolError, "a scale for .* below this owner's own numbers"),
        (30, NumericalError, "most of this owner's values would keep fewer than 10 bits; nothing more has left"),
        (0.5, RemoteProtocolError, "scales that are not powers of two"),
        (1e4, RemoteProtocolError, "scales that are not powers of two"),
    ],
)
def test_51_scales_of_its_own_making_and_then_others(
    evil: Coordinator, change: float, error: type[AmalgramError], says: str
) -> None:
    """Too small, too large, or none. Whether an owner refuses tells something of its numbers; it is not asked twice."""
    true = evil.sum_scales()
    false = (true + change).astype(np.float32)
    evil.send_scales("hotel", false)
    with pytest.raises(error, match=says):
        evil.send("hotel", evil.ask_contribution(false))
    for again in (true, true + 1):
        with pytest.raises(ConsentError, match="sent a second version of scales"):
            evil.send_scales("hotel", again)
    assert not Owner(evil.parties.files["hotel"]).ledger.pending


def test_51_one_scale_among_many_is_looked_at_too(evil: Coordinator) -> None:
    true = evil.sum_scales()
    false = true.copy()
    false[0] = true[0] - 12
    evil.send_scales("hotel", false)
    with pytest.raises(RemoteProtocolError, match="below this owner's own numbers"):
        evil.send("hotel", evil.ask_contribution(false))


def test_51_scales_before_the_round_that_they_derive_from_is_over(evil: Coordinator) -> None:
    """Else that round could be burned and asked for again, each time with other scales to try."""
    exponents = np.zeros(scaling.exponents_layout(evil.layout).size, np.float32)
    with pytest.raises(RemoteProtocolError, match="but sum of scales is due"):
        evil.send_scales("hotel", exponents)
    evil.begin(evil.ask_scales())
    for kind in (KeyShares, Acknowledgements):
        evil.until(kind)
        with pytest.raises(RemoteProtocolError, match="but sum of scales is due"):
            evil.send_scales("hotel", exponents)
    evil.until(None)
    evil.send_scales("hotel", exponents)


def test_51_a_contribution_before_the_scales_were_sent(evil: Coordinator) -> None:
    evil.sum_scales()
    request = evil.request("contribution")
    with pytest.raises(RemoteProtocolError, match="but scales is due"):
        evil.send("hotel", request)


def test_51_contributions_in_another_ring_or_not_scaled_at_all(evil: Coordinator) -> None:
    true = evil.sum_scales()
    evil.send_scales("hotel", true)
    in_64 = replace(scaling.scaled_layout(evil.layout), ring_bits=64)
    for layout in (in_64, evil.layout, replace(evil.layout, ring_bits=32)):
        with pytest.raises(ConsentError, match="layout for this round is not the one that was agreed"):
            evil.send("hotel", replace(evil.ask_contribution(true), layout_digest=layout.digest()))
    evil.fast_forward(0)
    with pytest.raises(ConsentError, match="scales: already contributed under this agreement"):
        evil.send("hotel", evil.request("scales", true))


def test_51_scales_that_nobody_agreed_on(parties: Parties, evil: Coordinator) -> None:
    in_64 = Process(parties)
    opening = in_64.open_sum(1)
    with pytest.raises(ConsentError, match="layout for this round is not the one that was agreed"):
        in_64.send("hotel", replace(opening, layout_digest=evil.schedule.find("scales").layout.digest()))
    scales = ScalesPart(
        run=RUN,
        agreement_digest=parties.agreement.digest(),
        position=1,
        part=0,
        parts=1,
        payload=np.zeros(3, np.float32),
        signature=bytes(64),
    )
    with pytest.raises(RemoteProtocolError, match="sent a scales at position 1, which is for"):
        in_64.send("hotel", scales)


def test_54_what_was_measured_does_not_stay_where_the_sum_for_the_scales_was_not_begun(
    evil: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The contribution is kept, in the clear, for the sum after this one: of which there will be none."""
    measured = []

    def measure(*arguments: object, **others: object) -> dict[str, Gram]:
        measured.append(step(*arguments, **others))
        if len(measured) == 2:
            raise DataError("the disk broke")
        return measured[-1]

    step = gram_stream.measure_inputs
    monkeypatch.setattr(gram_stream, "measure_inputs", measure)
    with pytest.raises(DataError, match="the disk broke"):
        evil.send("hotel", evil.ask_scales())
    run = evil.parties.folder / "state" / "hotel" / "run"
    assert [path.name for path in run.iterdir()] == ["run.json"]


def test_an_honest_coordinator_gets_the_total(evil: Coordinator) -> None:
    """With the book's scales nobody refuses, and what the owner kept for the second sum is gone after it."""
    exponents = evil.sum_scales()
    for owner in evil.parties.files:
        evil.send_scales(owner, exponents)
    kept = evil.parties.folder / "state" / "hotel" / "run" / "contribution.bin"
    assert kept.stat().st_mode & 0o777 == 0o600
    total = evil.sum(evil.ask_contribution(exponents))
    assert total.num_owners == 3
    assert not kept.exists()


def test_the_consent_text_names_the_round_for_the_scales_and_who_sees_them(evil: Coordinator) -> None:
    text = consent_text(Owner(evil.parties.files["hotel"]))
    assert "Each leaves once, in one of 2 rounds:" in text
    assert "ALL OWNERS SEE THE SCALES" in text
    assert "BETWEEN TWO ROUNDS" not in text
