"""Attacks 8 to 11, 16, 17, 28, 29 and 33: the owner's own process, with its files, ledger and agreement on disk."""

import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import pytest

from client.ledger import Ledger
from client.owner import Owner
from client.state import Consent, OwnerState
from common.agreement import load_agreement
from common.certificates import body_of, deliveries_digest, sign_burned
from common.domain_separation import Domain
from common.errors import AmalgramError, ConsentError, ModelError, RemoteProtocolError, SettingsError
from common.messages import (
    PROTOCOL_VERSION,
    Acknowledgements,
    BurnCertificate,
    BurnSession,
    CandidatePart,
    CertificateKept,
    Finish,
    KeysAdvertised,
    KeyShares,
    Message,
    OpenSum,
    Receipts,
    ReceiptsKept,
    Result,
    ResultReceived,
    RollCall,
    SessionBurned,
    SharesRevealed,
    SurvivorList,
    SurvivorsSigned,
)
from common.metrics import metrics_layout
from common.models.delta import delta_layout
from common.models.loading import digest_of
from common.publication import PublishedReceipts
from common.schedule import Delivery
from common.settings_file import write_settings
from common.summation import fixed_point
from common.summation.records import Signed
from common.thresholds import burn_quorum
from deploy.commands.agree import give_consent
from tests.support.owner_process import NONCE, OTHER, RUN, Process, delivered_by, part_of
from tests.support.parties import Parties
from tests.support.results import publication_of, sign_result, signed_anew


@pytest.fixture
def process(parties: Parties) -> Process:
    return Process(parties)


# --- rounds and agreements ---


@pytest.mark.parametrize("later", [5, 4, 0])
def test_8_9_a_reused_nonce_or_an_old_round(process: Process, later: int) -> None:
    process.send("hotel", process.open_sum(5))
    with pytest.raises(ConsentError, match=f"opened round {later}, but the last one here was 5"):
        process.send("hotel", process.open_sum(later))


def test_9_an_old_round_after_the_owner_s_run_was_reset(process: Process) -> None:
    process.send("hotel", process.open_sum(5))
    assert {owner: present.next_round for owner, present in process.roll_call(OTHER).items()} == {
        "cinema": 0,
        "hotel": 6,
        "phones": 0,
    }
    with pytest.raises(ConsentError, match="the last one here was 5"):
        process.send("hotel", replace(process.open_sum(5), run=OTHER))


CHANGES = {
    "title": "Another",
    "min_owners": 2,
    "weighting": "owners",
    "method": "average",
    "base_digest": "0" * 64,
    "seed": 9,
}


@pytest.mark.parametrize("field", CHANGES)
def test_10_any_field_of_the_agreement_differs(process: Process, field: str) -> None:
    """The coordinator's agreement is another: its digest is, and so nothing is answered."""
    other = process.parties.agreement.model_copy(update={field: CHANGES[field], "compare_with": ()})
    for message in (
        RollCall(version=PROTOCOL_VERSION, run=RUN, agreement_digest=other.digest()),
        replace(process.open_sum(1), agreement_digest=other.digest()),
    ):
        with pytest.raises(ConsentError, match="the coordinator's agreement is"):
            process.send("hotel", message)


def test_10_an_owner_s_file_that_was_changed_after_consent(process: Process) -> None:
    changed = process.parties.agreement.model_copy(update={"title": "Another"})
    write_settings(process.parties.folder / "agreement.toml", changed)
    with pytest.raises(ConsentError, match="nobody has consented"):
        process.send("hotel", RollCall(version=PROTOCOL_VERSION, run=RUN, agreement_digest=changed.digest()))


def test_10_another_base_model_at_one_owner(process: Process, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(process.parties.base, other)
    model = Owner(process.parties.files["hotel"]).workbench.load_base()
    next(model.parameters()).data[0] += 1
    model.save_pretrained(other)
    path = process.parties.files["hotel"]
    path.write_text(path.read_text().replace(str(process.parties.base), str(other)))
    with pytest.raises(ModelError, match="this is another base model"):
        process.roll_call()


@pytest.mark.parametrize("quorum", [1, 3])
def test_11_an_agreement_with_another_threshold_cannot_be_loaded(process: Process, quorum: int) -> None:
    path = process.parties.folder / "agreement.toml"
    path.write_text(path.read_text().replace("quorum = 2", f"quorum = {quorum}"))
    with pytest.raises(SettingsError, match=f"summation.quorum = {quorum}"):
        process.send("hotel", process.open_sum(1))


def test_10_two_owners_asked_for_two_rounds_under_one_nonce_are_in_two_sessions(process: Process) -> None:
    """The session is the hash of everything in the request, so nothing of one fits the other."""
    one = process.open_sum(1)
    sessions = {
        one.session,
        replace(one, position=1).session,
        replace(one, run=OTHER).session,
        replace(one, deliveries_digest=OTHER).session,
        replace(one, layout_digest=OTHER).session,
        replace(one, round=2).session,
        replace(one, nonce=RUN).session,
    }
    assert len(sessions) == 7


def test_37_another_agreement_is_put_in_place_in_the_middle_of_a_run(process: Process) -> None:
    """The owner lays a second agreement beside the first to read it; the coordinator goes on under that one."""
    plain = process.parties.agreement.summation.model_copy(update={"kind": "plain"})
    second = process.parties.agreement.model_copy(update={"summation": plain})
    write_settings(process.parties.folder / "agreement.toml", second)
    request = replace(process.open_sum(1), agreement_digest=second.digest())
    with pytest.raises(ConsentError, match="nobody has consented"):
        process.send("hotel", request)
    give_consent(Owner(process.parties.files["hotel"]))
    with pytest.raises(RemoteProtocolError, match="another run or agreement"):
        process.send("hotel", request)


def test_37_a_sum_that_began_under_one_agreement_does_not_go_on_under_another(process: Process) -> None:
    process.begin(process.open_sum(1))
    request = process.until(KeyShares)["hotel"]
    second = process.parties.agreement.model_copy(update={"title": "Another"})
    write_settings(process.parties.folder / "agreement.toml", second)
    give_consent(Owner(process.parties.files["hotel"]))
    with pytest.raises(ConsentError, match="the coordinator's agreement is"):
        process.send("hotel", request)


def test_38_a_candidate_of_its_own_for_every_owner_opens_no_round_of_metrics(process: Process) -> None:
    """With one model for the victim and another for the others, summed metrics would tell the victim's apart."""
    sent = process.deliver_candidates("test")
    *before, last = [each for each in process.schedule.events if isinstance(each, Delivery) and each.split == "test"]
    for path in process.parties.files.values():  # all have all but the last candidate; now each gets its own
        state = Owner(path).state
        state.update_run(received=state.run.received[: len(before)], scores=state.run.scores[: len(before)])
    process.fast_forward(last.position)
    delivered = {}
    for owner in process.parties.files:
        delta = np.full(last.layout.size, 0.5 if owner == "hotel" else 0.0, dtype=np.float32)
        part = part_of(process.parties, last, delta)
        process.send(owner, part)
        delivered[owner] = [*sent[:-1], delivered_by(part)]
    metrics = process.schedule.find("metrics", split="test")
    for owner in process.parties.files:
        request = process.open_sum(1, metrics, delivered["cinema"])
        if owner == "hotel":
            with pytest.raises(RemoteProtocolError, match="other models than those sent to this owner"):
                process.send(owner, request)
        else:
            process.send(owner, request)
    # Telling the victim what it wants to hear puts it into another session.
    told = process.open_sum(2, metrics, delivered["hotel"])
    assert told.session != process.open_sum(2, metrics, delivered["cinema"]).session


# --- the latch ---


def test_17_a_second_survivor_list_after_the_owner_s_process_restarts(process: Process) -> None:
    process.begin(process.open_sum(1))
    requests = process.until(SurvivorList)
    request = requests["hotel"]
    assert isinstance(request, SurvivorList)
    assert isinstance(process.send("hotel", request), SurvivorsSigned)
    with pytest.raises(RemoteProtocolError, match="sent SurvivorList in phase"):
        process.send("hotel", request)


def test_17_a_second_reveal_after_the_owner_s_process_restarts_is_the_first_one(process: Process) -> None:
    """A coordinator that was started again asks again. It gets the bytes that it had, whatever it asks with."""
    process.begin(process.open_sum(1))
    request = process.until(Acknowledgements)["hotel"]
    assert isinstance(request, Acknowledgements)
    first = process.send("hotel", request)
    fewer_signers = Signed.pack_all(list(Signed.unpack_all(request.signatures))[:1])
    assert process.send("hotel", request) == first
    with pytest.raises(RemoteProtocolError, match="the quorum is"):
        process.send("hotel", replace(request, signatures=fewer_signers))
    with pytest.raises(RemoteProtocolError, match="before it opened a sum"):
        process.send("hotel", request)


def test_17_a_second_survivor_list_after_the_reveal(process: Process) -> None:
    process.begin(process.open_sum(1))
    lists = process.until(SurvivorList)
    process.send("hotel", process.until(Acknowledgements)["hotel"])
    with pytest.raises(RemoteProtocolError, match="sent SurvivorList in phase"):
        process.send("hotel", lists["hotel"])


def test_17_the_latch_is_on_the_disk_before_the_signature_leaves(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine dies between writing and answering: the signature is lost, and no second one is ever given."""
    process.begin(process.open_sum(1))
    request = process.until(SurvivorList)["hotel"]
    write = OwnerState.write_open_round

    def write_and_die(self: OwnerState, *what: Any) -> None:
        write(self, *what)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(OwnerState, "write_open_round", write_and_die)
        with pytest.raises(KeyboardInterrupt):
            process.send("hotel", request)
    with pytest.raises(RemoteProtocolError, match="in phase"):
        process.send("hotel", request)


def test_39_two_processes_at_once_sign_one_list_only(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """Survivor lists that arrive in the same moment, each read by a process of its own before another has written."""
    write = OwnerState.write_open_round

    def slow_write(self: OwnerState, *what: Any) -> None:
        sleep(0.2)
        write(self, *what)

    process.begin(process.open_sum(1))
    request = process.until(SurvivorList)["hotel"]
    assert isinstance(request, SurvivorList)

    def ask(_: int) -> Message | AmalgramError:
        try:
            return process.send("hotel", request)
        except AmalgramError as refusal:
            return refusal

    monkeypatch.setattr(OwnerState, "write_open_round", slow_write)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(4)))
    assert sum(isinstance(answer, SurvivorsSigned) for answer in answers) == 1


def test_a_session_whose_rules_were_broken_is_over_for_good(process: Process) -> None:
    process.begin(process.open_sum(1))
    requests = process.until(KeyShares)
    request = requests["hotel"]
    assert isinstance(request, KeyShares)
    with pytest.raises(RemoteProtocolError, match="its secrets are wiped"):
        process.send("hotel", replace(request, manifests=b""))
    run = process.parties.folder / "state" / "hotel" / "run"
    assert not (run / "round.json").exists()
    assert not (run / "vector.bin").exists()
    with pytest.raises(RemoteProtocolError, match="before it opened a sum"):
        process.send("hotel", request)


# --- the ledger ---


def test_28_the_same_statistic_twice(process: Process) -> None:
    process.sum(process.open_sum(1))
    with pytest.raises(ConsentError, match="contributions: already contributed under this agreement"):
        process.send("hotel", process.open_sum(2))
    process.roll_call(OTHER)
    with pytest.raises(ConsentError, match="contributions: already contributed under this agreement"):
        process.send("hotel", replace(process.open_sum(3), run=OTHER))


def test_29_all_owners_and_then_all_but_one(process: Process) -> None:
    """The others could open a session in which an owner's upload arrived, even if it never signed or revealed."""
    process.begin(process.open_sum(1))
    process.until(SurvivorList)
    for owner in process.parties.files:
        with pytest.raises(ConsentError, match="already contributed"):
            process.send(owner, process.open_sum(2))


@pytest.mark.parametrize("models", [["base"], ["base", "own_at_home"], ["own_at_home"]])
def test_29_metrics_asked_for_in_two_groupings(process: Process, models: list[str]) -> None:
    """Of other models too: the row counts behind them are the same, and a model of zero change is the base again."""
    swept = process.deliver_candidates("validation")
    test, validation = (process.schedule.find("metrics", split=split) for split in ("test", "validation"))
    sent = [*swept, *process.deliver_candidates("test")]
    grouped = metrics_layout(process.parties.agreement, "test", models)
    with pytest.raises(ConsentError, match="layout for this round is not the one that was agreed"):
        process.send("hotel", replace(process.open_sum(1, test, sent), layout_digest=grouped.digest()))
    process.sum(process.open_sum(2, test, sent))
    with pytest.raises(ConsentError, match="test metrics: already contributed"):
        process.send("hotel", process.open_sum(3, test, sent))
    process.fast_forward(validation.position)
    process.send("hotel", process.open_sum(4, validation, sent))


def test_an_offer_is_in_the_ledger_before_the_first_part_leaves(process: Process) -> None:
    ledger = process.parties.folder / "hotel.ledger"
    process.begin(process.open_sum(1))
    process.until(KeyShares)
    digest = process.parties.agreement.digest()
    assert json.loads(ledger.read_text())["pages"][digest]["offers"] == []
    process.send("hotel", process.side.requests()["hotel"])
    (offer,) = json.loads(ledger.read_text())["pages"][digest]["offers"]
    assert (offer["position"], offer["session"]) == (0, process.terms.request.session)


def test_nothing_is_offered_where_nothing_left(process: Process) -> None:
    """A session that fails before any upload may be tried again: nobody is locked out by a dropout."""
    process.begin(process.open_sum(1))
    process.until(KeyShares)
    process.sum(process.open_sum(2))


def test_a_damaged_ledger_stops_the_owner(process: Process) -> None:
    for content in ("{", "{}", '{"version": 1, "pages": {}}'):
        (process.parties.folder / "hotel.ledger").write_text(content)
        with pytest.raises(SettingsError, match="damaged, so what was given before is unknown"):
            process.send("hotel", process.open_sum(1))


# --- after a crash ---


def interrupted(process: Process) -> str:
    """A run that ended after everybody's upload; the session that it leaves behind."""
    process.begin(process.open_sum(1))
    process.until(SurvivorList)
    return process.terms.request.session


def certificate(process: Process, session: str, owners: list[str]) -> BurnCertificate:
    digest = process.parties.agreement.digest()
    places = {name: place for place, name in enumerate(process.parties.agreement.owner_names)}
    signed = [Signed(places[name], sign_burned(process.parties.identities[name], digest, session)) for name in owners]
    return BurnCertificate(run=RUN, session=session, signatures=Signed.pack_all(signed))


def test_an_interrupted_sum_is_offered_again_once_a_quorum_has_burned_it(process: Process) -> None:
    session = interrupted(process)
    assert {present.pending for present in process.roll_call().values()} == {session}
    replies = {owner: process.send(owner, BurnSession(run=RUN, session=session)) for owner in process.parties.files}
    assert all(isinstance(reply, SessionBurned) for reply in replies.values())
    for owner in process.parties.files:
        kept = process.send(owner, certificate(process, session, list(process.parties.files)))
        assert isinstance(kept, CertificateKept)
    process.sum(process.open_sum(2))


def test_too_few_forged_or_foreign_burn_signatures_release_nothing(process: Process) -> None:
    session = interrupted(process)
    assert burn_quorum(3, 0) == 2
    good = certificate(process, session, ["hotel", "cinema"])
    other = process.parties.agreement.model_copy(update={"title": "Another"})
    places = {name: place for place, name in enumerate(other.owner_names)}
    elsewhere = [
        Signed(places[name], sign_burned(process.parties.identities[name], other.digest(), session))
        for name in ("hotel", "cinema")
    ]
    bad = {
        "(?s)the signature of hotel is not valid.*": replace(good, signatures=Signed.pack_all(elsewhere)),
        "1 owners burned the session, 2 are needed": certificate(process, session, ["hotel"]),
        "the signature of hotel is not valid": replace(
            certificate(process, OTHER, ["hotel", "cinema"]), session=session
        ),
        "ascending order": replace(good, signatures=good.signatures[:66] * 2),
    }
    for why, message in bad.items():
        with pytest.raises(RemoteProtocolError, match=why):
            process.send("hotel", message)
        with pytest.raises(ConsentError, match="already contributed"):
            process.send("hotel", process.open_sum(7))


def test_an_owner_that_has_revealed_neither_burns_nor_releases(process: Process) -> None:
    process.sum(process.open_sum(1))
    session = process.terms.request.session
    for message in (BurnSession(run=RUN, session=session), certificate(process, session, ["cinema", "phones"])):
        with pytest.raises(ConsentError, match="that this owner has helped to unmask"):
            process.send("hotel", message)
    with pytest.raises(ConsentError, match="already contributed"):
        process.send("hotel", process.open_sum(2))


def test_a_burned_session_is_never_opened_signed_or_revealed(process: Process) -> None:
    process.begin(process.open_sum(1))
    request = process.until(Acknowledgements)["hotel"]
    process.send("hotel", BurnSession(run=RUN, session=process.terms.request.session))
    with pytest.raises(RemoteProtocolError, match="before it opened a sum"):
        process.send("hotel", request)
    later = process.open_sum(9)
    process.send("hotel", BurnSession(run=RUN, session=later.session))
    with pytest.raises(ConsentError, match="has burned"):
        process.send("hotel", later)


def test_44_a_burned_session_s_file_that_comes_back_is_not_revealed_from(process: Process) -> None:
    """Deleted, but not yet on the disk when the power failed: with it the owner would open what it signed as over."""
    process.begin(process.open_sum(1))
    request = process.until(Acknowledgements)["hotel"]
    path = process.parties.folder / "state" / "hotel" / "run" / "round.json"
    before = path.read_bytes()
    process.send("hotel", BurnSession(run=RUN, session=process.terms.request.session))
    path.write_bytes(before)
    with pytest.raises(ConsentError, match="has burned"):
        process.send("hotel", request)


def test_44_a_burned_session_s_file_that_comes_back_gives_no_part(process: Process) -> None:
    process.begin(process.open_sum(1))
    request = process.until(KeyShares)["hotel"]
    path = process.parties.folder / "state" / "hotel" / "run" / "round.json"
    before, vector = path.read_bytes(), path.with_name("vector.bin").read_bytes()
    process.send("hotel", BurnSession(run=RUN, session=process.terms.request.session))
    path.write_bytes(before)
    path.with_name("vector.bin").write_bytes(vector)
    with pytest.raises(ConsentError, match="has burned"):
        process.send("hotel", request)


def test_a_certificate_alone_makes_the_owner_forget_the_session_too(process: Process) -> None:
    """Otherwise it could be released, offered again, and still be helped to open."""
    process.begin(process.open_sum(1))
    request = process.until(Acknowledgements)["hotel"]
    process.send("hotel", certificate(process, process.terms.request.session, ["cinema", "phones"]))
    with pytest.raises(RemoteProtocolError, match="before it opened a sum"):
        process.send("hotel", request)


def test_an_owner_goes_on_with_its_session_whatever_other_one_is_certified_as_over(process: Process) -> None:
    """Any owner names one at the roll call. Otherwise it could have the others forget a sum that they are to add up."""
    process.begin(process.open_sum(1))
    request = process.until(Acknowledgements)["hotel"]
    process.send("hotel", BurnSession(run=RUN, session=OTHER))
    process.send("hotel", certificate(process, OTHER, ["cinema", "phones"]))
    assert isinstance(process.send("hotel", request), SharesRevealed)


def test_a_session_that_was_opened_without_an_owner_does_not_hide_a_later_one_that_is_pending(
    process: Process, tmp_path: Path
) -> None:
    """Nobody asks to burn the first. The second is certified as over, if it is, only if the owner names it."""
    ledger = Ledger(tmp_path / "a.ledger", bytes(32), process.parties.agreement, must_exist=False)
    for position, session in ((0, OTHER), (3, RUN)):
        ledger.offer(position, session, deliveries_digest([]), frozenset())
    assert ledger.pending == RUN
    ledger.reveal(RUN)
    assert ledger.pending == OTHER


# --- killed between two writes ---


def candidate_for(process: Process, delta: np.ndarray, run: str = RUN, method: str = "average") -> CandidatePart:
    part = part_of(process.parties, process.candidate_slot(method), delta, run=run)
    assert isinstance(part, CandidatePart)
    return part


def zeros(process: Process) -> np.ndarray:
    return np.zeros(delta_layout(process.parties.plan).size, dtype=np.float32)


def test_45_a_run_that_was_half_forgotten_is_not_resumed(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while an old run is deleted, then asked for that run again: what it was sent is forgotten, and its metrics
    with it. Otherwise they could be summed as if of no model, beside other metrics of the others.
    """
    process.fast_forward(process.candidate_slot().position)
    process.send("hotel", candidate_for(process, zeros(process) + 0.5))
    state = Owner(process.parties.files["hotel"]).state
    assert state.run.scores
    run = process.parties.folder / "state" / "hotel" / "run"

    remove = shutil.rmtree

    def die_halfway(folder: Path, *arguments: Any, **options: Any) -> None:
        if Path(folder).parent == run.parent and Path(folder).exists():
            raise KeyboardInterrupt
        remove(folder, *arguments, **options)

    digest = process.parties.agreement.digest()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", die_halfway)
        with pytest.raises(KeyboardInterrupt):
            process.send("hotel", RollCall(version=PROTOCOL_VERSION, run=OTHER, agreement_digest=digest))
    process.send("hotel", RollCall(version=PROTOCOL_VERSION, run=RUN, agreement_digest=digest))
    assert state.run.scores == ()
    assert [path.name for path in run.iterdir()] == ["run.json"]


def test_46_metrics_of_a_candidate_that_was_never_taken_whole(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when the model is judged and not yet noted: it may be sent again, or another in its place."""
    slots = [each for each in process.schedule.events if isinstance(each, Delivery) and each.split == "test"]
    process.fast_forward(slots[0].position)
    sent = [part_of(process.parties, slot) for slot in slots]
    for part in sent[:-1]:
        process.send("hotel", part)
    update = OwnerState.update_run

    def die_before_it_is_noted(self: OwnerState, **changes: object) -> None:
        if "received" in changes:
            raise KeyboardInterrupt
        update(self, **changes)

    with monkeypatch.context() as patch:
        patch.setattr(OwnerState, "update_run", die_before_it_is_noted)
        with pytest.raises(KeyboardInterrupt):
            process.send("hotel", part_of(process.parties, slots[-1], sent[-1].payload + 0.5))
    metrics = process.schedule.find("metrics", split="test")
    with pytest.raises(RemoteProtocolError, match="fisher candidate for test is due"):
        process.send("hotel", process.open_sum(1, metrics, [delivered_by(part) for part in sent]))
    process.send("hotel", sent[-1])
    process.send("hotel", process.open_sum(2, metrics, [delivered_by(part) for part in sent]))


# --- results ---


def with_a_candidate(process: Process) -> tuple[Result, np.ndarray]:
    """Every owner gets the same candidate to test; the honest result about it, signed."""
    slot, delta = process.candidate_slot("regmean"), zeros(process)
    part = candidate_for(process, delta, method="regmean")
    process.fast_forward(slot.position)
    process.send_all(part)
    hotel = Owner(process.parties.files["hotel"])
    run = hotel.state.run
    assert run.published is not None
    model = digest_of(hotel.workbench.load_base(), hotel.workbench.task)
    publication = publication_of(process, run.published).canonical_bytes()
    return sign_result(process, part.model, model, deliveries_digest(run.delivered), publication), delta


def receipts(process: Process, result: Result, owners: list[str]) -> Receipts:
    signed = []
    for place, owner in enumerate(process.parties.agreement.owner_names):
        if owner in owners:
            reply = process.send(owner, result)
            assert isinstance(reply, ResultReceived)
            signed.append(Signed(place, reply.signature))
    return Receipts(run=RUN, signatures=Signed.pack_all(signed))


def kept_receipts(process: Process) -> Path:
    """Hotel's, under the agreement."""
    return process.parties.folder / "state" / "hotel" / "receipts" / f"{process.parties.agreement.digest()}.json"


def test_the_same_result_for_everybody_is_kept_with_everybody_s_signature(process: Process) -> None:
    result, _ = with_a_candidate(process)
    everybody = receipts(process, result, list(process.parties.files))
    assert isinstance(process.send("hotel", everybody), ReceiptsKept)
    receipt = json.loads(kept_receipts(process).read_text())
    assert list(receipt["owners"]) == ["hotel", "cinema", "phones"]
    assert receipt["model_digest"] == result.model_digest


def test_33_different_results_to_different_owners(process: Process) -> None:
    """The coordinator signs two results; each group's signatures are missing under the other's."""
    result, _ = with_a_candidate(process)
    with pytest.raises(RemoteProtocolError, match="another model than the one that this owner tested"):
        process.send("hotel", signed_anew(process, result, model_digest=OTHER))
    with pytest.raises(RemoteProtocolError, match="other models than those sent to this owner"):
        process.send("hotel", signed_anew(process, result, digest=OTHER))
    some = receipts(process, result, ["hotel", "cinema"])
    with pytest.raises(RemoteProtocolError, match="2 owners signed the result that this owner was given, 3 must"):
        process.send("hotel", some)


def test_33_an_owner_signs_one_result_under_one_agreement(process: Process) -> None:
    """Two runs with two results, each with everybody's signature: either group would hold complete receipts."""
    result, _ = with_a_candidate(process)
    process.send("hotel", result)
    process.send("hotel", result)
    state = Owner(process.parties.files["hotel"]).state
    state.update_run(scores=tuple(each.model_copy(update={"model_digest": OTHER}) for each in state.run.scores))
    with pytest.raises(ConsentError, match="another result under this agreement than the one signed here"):
        process.send("hotel", signed_anew(process, result, model_digest=OTHER))


def test_33_a_result_is_signed_again_for_a_coordinator_that_was_started_again_when_the_run_has_ended(
    process: Process,
) -> None:
    """The owner has forgotten the run and what it was sent; the very same result it signs again, and no other."""
    result, _ = with_a_candidate(process)
    signed = process.send("hotel", result)
    everybody = receipts(process, result, list(process.parties.files))
    process.send("hotel", everybody)
    with pytest.raises(RemoteProtocolError, match="another run or agreement"):
        process.send("hotel", everybody)
    process.roll_call()
    with pytest.raises(ConsentError, match="another result under this agreement than the one signed here"):
        process.send("hotel", signed_anew(process, result, model_digest=OTHER))
    assert process.send("hotel", result) == signed
    assert isinstance(process.send("hotel", everybody), ReceiptsKept)


def test_33_a_result_signed_in_one_run_is_not_signed_unseen_in_another(process: Process) -> None:
    result, _ = with_a_candidate(process)
    process.send("hotel", receipts(process, result, list(process.parties.files)))
    process.roll_call(OTHER)
    with pytest.raises(RemoteProtocolError, match="other models than those sent to this owner"):
        process.send("hotel", signed_anew(process, result, run=OTHER))


def test_260_a_result_under_the_next_agreement_that_names_the_run_of_the_last_one(process: Process) -> None:
    """Owners keep their folder for the next merge. A run that ended under one agreement is no run under another, where
    they would sign for a model that nobody merged or tested.
    """
    result, _ = with_a_candidate(process)
    process.send("hotel", receipts(process, result, list(process.parties.files)))
    kept, hotel = kept_receipts(process), Owner(process.parties.files["hotel"])
    before, agreed_at = kept.read_bytes(), hotel.home / hotel.settings.agreement
    first = process.parties.agreement
    agreed_at.write_text(agreed_at.read_text().replace(f'title = "{first.title}"', 'title = "The next one"'))
    process.parties = replace(process.parties, agreement=load_agreement(agreed_at))
    for file in process.parties.files.values():
        Owner(file).state.write_consent(process.parties.agreement.digest(), Consent(when="now"))
    process.roll_call(result.run)
    false = sign_result(process, result.model, OTHER, deliveries_digest([]), result.publication)
    with pytest.raises(RemoteProtocolError, match="another model than the one that this owner tested"):
        process.send("hotel", false)
    assert not Owner(process.parties.files["hotel"]).ledger.has_signed
    assert kept.read_bytes() == before


def test_260_receipts_that_are_sent_again_with_fewer_signatures(process: Process) -> None:
    result, _ = with_a_candidate(process)
    everybody = receipts(process, result, list(process.parties.files))
    digest, state = process.parties.agreement.digest(), Owner(process.parties.files["hotel"]).state
    whole = PublishedReceipts.of(process.parties.agreement, result, everybody.signatures)
    some = whole.model_copy(update={"owners": dict([*whole.owners.items()][:2])})
    for sent in (some, whole, some):
        state.write_receipts(digest, sent)
    assert PublishedReceipts.model_validate_json(kept_receipts(process).read_bytes()) == whole


def test_260_an_agreement_ends_with_one_run(process: Process) -> None:
    ledger = Owner(process.parties.files["hotel"]).ledger
    ledger.end(RUN)
    ledger.end(RUN)  # the coordinator was killed before it knew
    with pytest.raises(ConsentError, match="ended a second run under this agreement"):
        ledger.end(OTHER)


def test_261_an_owner_that_is_killed_while_it_measures_leaves_nothing_that_it_would_contribute(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked again in the same session, it would contribute zeros, and the total would be that of fewer owners."""
    hotel = Owner(process.parties.files["hotel"])
    with monkeypatch.context() as patch:
        patch.setattr(fixed_point, "flatten_encoded", lambda *about: os.kill(os.getpid(), signal.SIGKILL))
        if (child := os.fork()) == 0:
            try:
                hotel.answer(process.open_sum(1))
            finally:
                os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == signal.SIGKILL
    assert not hotel.state.has_array("vector")
    assert isinstance(process.send("hotel", process.open_sum(2)), KeysAdvertised)
    assert hotel.state.has_array("vector")


def test_33_receipts_of_another_run_do_not_end_this_one(process: Process) -> None:
    result, _ = with_a_candidate(process)
    good = receipts(process, result, list(process.parties.files))
    with pytest.raises(RemoteProtocolError, match="another run or agreement"):
        process.send("hotel", replace(good, run=OTHER))
    assert (process.parties.folder / "state" / "hotel" / "run").exists()
    assert not (process.parties.folder / "state" / "hotel" / "receipts").exists()


def test_48_a_candidate_that_the_signed_result_omits(process: Process) -> None:
    """The result travels ahead of the last round: that round could be about a model that no receipt names."""
    result, delta = with_a_candidate(process)
    process.send("hotel", result)
    process.send("hotel", candidate_for(process, delta, method="regmean"))  # the one that it names: once more
    with pytest.raises(ConsentError, match="sent average after the result"):
        process.send("hotel", candidate_for(process, delta))
    metrics = process.schedule.find("metrics", split="test")
    taken = Owner(process.parties.files["hotel"]).state.run.delivered
    assert deliveries_digest(taken) == result.deliveries_digest
    with pytest.raises(RemoteProtocolError, match="average candidate for test is due"):
        process.send("hotel", process.open_sum(1, metrics, taken))


@pytest.mark.parametrize("run", [RUN, OTHER])
def test_52_a_model_after_the_run_has_ended(process: Process, run: str) -> None:
    """Begun again, an ended run is one that was sent nothing yet; but its receipt is out."""
    result, delta = with_a_candidate(process)
    process.send("hotel", receipts(process, result, list(process.parties.files)))
    process.roll_call(run)
    process.fast_forward(process.candidate_slot().position)
    with pytest.raises(ConsentError, match="sent average after the result"):
        process.send("hotel", candidate_for(process, delta, run))


@pytest.mark.parametrize("opened", [True, False])
def test_52_a_model_whose_metrics_were_summed_before_the_owners_forgot_the_run(process: Process, opened: bool) -> None:
    """A model that looks for a word is judged, and its metrics are summed. Then the run is ended, and begun anew with
    the model that is published: everybody would sign that there was no other.
    """
    evil = process.deliver_candidates("test")
    process.begin(process.open_sum(1, process.schedule.find("metrics", split="test"), evil))
    process.until(None if opened else SurvivorList)  # from its first part on, others may unmask a sum
    for owner in process.parties.files:
        process.send(owner, Finish(run=RUN))
    process.roll_call()
    result, _ = with_a_candidate(process)
    with pytest.raises(RemoteProtocolError, match="the result omits models that were sent to this owner"):
        process.send("hotel", result)


def test_52_a_result_is_signed_that_names_all_models_that_rounds_were_about(process: Process) -> None:
    """More models may follow a round, as the chosen ones follow those of a sweep."""
    process.sum(process.open_sum(1))
    swept = process.deliver_candidates("validation")
    process.sum(process.open_sum(2, process.schedule.find("metrics", split="validation"), swept))
    result, _ = with_a_candidate(process)
    assert isinstance(process.send("hotel", result), ResultReceived)


def test_33_receipts_under_another_result_do_not_count(process: Process) -> None:
    result, _ = with_a_candidate(process)
    good = receipts(process, result, list(process.parties.files))
    body = body_of(process.parties.agreement, replace(result, model_digest=OTHER))
    other = process.parties.identities["phones"].sign(Domain.SIGN_RECEIPT, bytes.fromhex(RUN), body)
    *signed, last = Signed.unpack_all(good.signatures)
    with pytest.raises(RemoteProtocolError, match="the signature of phones is not valid"):
        process.send("hotel", replace(good, signatures=Signed.pack_all([*signed, replace(last, signature=other)])))


def test_33_a_result_that_the_agreement_s_coordinator_did_not_sign(process: Process) -> None:
    result, _ = with_a_candidate(process)
    with pytest.raises(RemoteProtocolError, match="the signature of coordinator is not valid"):
        process.send("hotel", replace(result, signature=bytes(64)))


def test_33_a_result_of_a_method_that_was_not_agreed_on(process: Process) -> None:
    result, _ = with_a_candidate(process)
    changed = signed_anew(process, result, model="average")
    with pytest.raises(ConsentError, match="'average', which does not belong to the agreed method"):
        process.send("hotel", changed)


@pytest.mark.parametrize("wipe", ["replaced", "forgotten with its round", "forgotten with the run"])
def test_secrets_of_a_round_that_was_wiped_are_not_kept_in_memory(tmp_path: Path, wipe: str) -> None:
    """What was read of a file is kept, to be parsed once. Secrets must go when the file does."""
    state = OwnerState(tmp_path / "state", bytes(32))
    digests = dict.fromkeys(("agreement_digest", "deliveries_digest", "layout_digest"), "1" * 64)
    request = OpenSum(run=RUN, round=1, nonce=NONCE, position=0, **digests)
    state.start_run(RUN, request.agreement_digest)
    state.write_open_round("contribution", request, {"mask_seed": "a secret"})
    assert state.open_round is not None
    assert "a secret" in repr(vars(state))
    if wipe == "replaced":
        state.write_open_round("contribution", request, {"mask_seed": ""})
    elif wipe == "forgotten with its round":
        state.forget_round()
    else:
        state.end_run()
    assert "a secret" not in repr(vars(state))
