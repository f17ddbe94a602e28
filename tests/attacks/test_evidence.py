"""Attacks 114 and 115: evidence that is made up against an honest owner, and evidence that is lost."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from client.state import ReceivedRecord, ResultRecord
from client.verification import Evidence as OwnersEvidence
from common import saved_state
from common.agreement import Agreement
from common.certificates import Delivered, delivery_body, result_body
from common.domain_separation import Domain
from common.errors import AmalgramError, RemoteProtocolError
from common.publication import Publication
from common.summation import secret_sharing
from common.summation.masked.book import SELF
from common.summation.masked.evidence import Evidence, ProvenLie, accused
from common.summation.protocol import SumAbandoned, SumTerms
from common.summation.records import RevealedShare, SealedShare
from deploy.commands.explain import in_words
from deploy.commands.verify import explain_lie
from server import evidence as kept
from tests.support.lying_owners import (
    OTHER,
    at,
    colluder_seals,
    disputes,
    opens_another_share,
    other,
    play,
)
from tests.support.malicious import MaliciousCoordinator, flip
from tests.support.parties import IDENTITIES
from tests.support.scripted_owners import WrongDealer, coordinator_of, honest, run_all
from tests.support.sums import repeating_bytes

Proof = tuple[SumTerms, Evidence]
RUN = "ab" * 32


def proof_of(lie: str) -> Proof:
    """What a coordinator keeps of an owner that lied in this way."""
    return {"revealed": revealed, "opened": opened, "disputed": disputed, "dealt": dealt, "another": another}[lie]()


@cache
def revealed() -> Proof:
    evil, proofs = MaliciousCoordinator(), list[Evidence]()
    play(evil, {}, reveal={"o2": other}, proofs=proofs)
    return evil.terms, proofs[0]


@cache
def opened() -> Proof:
    evil, proofs = colluder_seals(OTHER), list[Evidence]()
    with pytest.raises(SumAbandoned):
        play(evil, {}, answer={"o1": opens_another_share(evil.identities["o1"], "mask_share")}, proofs=proofs)
    return evil.terms, proofs[0]


@cache
def disputed() -> Proof:
    evil, proofs = MaliciousCoordinator(), list[Evidence]()
    with pytest.raises(SumAbandoned):
        play(evil, {}, answer={"o2": disputes(evil, "o2", 1), "o3": disputes(evil, "o3", 1)}, proofs=proofs)
    return evil.terms, proofs[0]


@cache
def dealt() -> Proof:
    evil, proofs = MaliciousCoordinator(15, needed=12, colluders=1), list[Evidence]()
    play(evil, {}, deal={"o3": at(1)}, proofs=proofs)
    return evil.terms, proofs[0]


@cache
def another() -> Proof:
    """Shares of another secret than the one that is committed to."""
    shares = secret_sharing.split(b"another".ljust(32), 4, range(1, 6), repeating_bytes())
    evil = MaliciousCoordinator()
    with pytest.raises(ProvenLie) as lie:
        play(evil, {}, deal={"o3": lambda _: shares})
    return evil.terms, lie.value.evidence


LIARS: Mapping[str, str] = {"revealed": "o2", "opened": "o1", "disputed": "o1", "dealt": "o3", "another": "o3"}


@pytest.mark.parametrize(("lie", "liar"), LIARS.items())
def test_whoever_lied_about_a_share_is_shown_to_anybody(lie: str, liar: str) -> None:
    terms, evidence = proof_of(lie)
    read = saved_state.from_json(Evidence, json.loads(json.dumps(saved_state.to_json(Evidence, evidence))))
    assert accused(terms, read) == liar


@pytest.mark.parametrize("lie", LIARS)
def test_114_evidence_against_another_owner(lie: str) -> None:
    terms, evidence = proof_of(lie)
    with pytest.raises(RemoteProtocolError, match="another owner lied"):
        accused(terms, replace(evidence, owner=0))


@pytest.mark.parametrize("lie", LIARS)
def test_114_evidence_of_another_session(lie: str) -> None:
    terms, evidence = proof_of(lie)
    with pytest.raises(RemoteProtocolError, match=r"signature of o. is not valid"):
        accused(replace(terms, request=replace(terms.request, nonce="0d" * 32)), evidence)


@pytest.mark.parametrize("lie", LIARS)
def test_114_shares_that_the_dealer_did_not_sign(lie: str) -> None:
    """Otherwise the coordinator could make up commitments that no share fits."""
    terms, evidence = proof_of(lie)
    sealed = [
        replace(each, self_commitment=flip(each.self_commitment)) for each in SealedShare.unpack_all(evidence.sealed)
    ]
    with pytest.raises(RemoteProtocolError, match=r"signature of o. is not valid"):
        accused(terms, replace(evidence, sealed=SealedShare.pack_all(sealed)))


def test_114_words_that_the_accused_did_not_sign() -> None:
    for lie in ("revealed", "opened"):
        terms, evidence = proof_of(lie)
        ((owner, signature),) = evidence.spoken.items()
        with pytest.raises(RemoteProtocolError, match=f"signature of o{owner} is not valid"):
            accused(terms, replace(evidence, spoken={owner: flip(signature)}))
    terms, evidence = disputed()
    assert len(evidence.spoken) == 2
    (first, signature), (second, _) = evidence.spoken.items()
    with pytest.raises(RemoteProtocolError, match=r"signature of o. is not valid"):
        accused(terms, replace(evidence, spoken={first: signature, second: signature}))


def honest_shares() -> Proof:
    """What o2 and the dealer o0 sign in an honest sum, as if it were a lie."""
    evil, proofs = MaliciousCoordinator(), list[Evidence]()
    play(evil, {}, reveal={"o4": other}, proofs=proofs)
    reply = next(each for each in evil.received["o2"] if type(each).__name__ == "SharesRevealed")
    sealed = evil.side._sealed[0]
    honest = replace(
        proofs[0],
        owner=2,
        dealer=0,
        commitment=sealed.commitment,
        sealed=SealedShare.pack_all(sealed.shares.values()),
        signature=sealed.signature,
        words={2: vars(reply)["shares"]},
        spoken={2: vars(reply)["signature"]},
    )
    return evil.terms, honest


def test_114_honest_owners_are_not_shown_to_lie() -> None:
    terms, evidence = honest_shares()
    with pytest.raises(RemoteProtocolError, match="does not show that anybody lied"):
        accused(terms, evidence)
    records = RevealedShare.unpack_all(evidence.words[2])
    own = {2: RevealedShare.pack_all([each for each in records if each.owner == 0])}
    with pytest.raises(RemoteProtocolError, match="does not show that anybody lied"):
        accused(terms, replace(evidence, lie="dealt", owner=0, words=own))
    terms, evidence = disputed()
    (first, signature), _ = evidence.spoken.items()
    with pytest.raises(RemoteProtocolError, match="does not show that anybody lied"):  # one of them may be the liar
        accused(terms, replace(evidence, spoken={first: signature}))


def test_114_shares_that_the_dealer_never_dealt() -> None:
    """Made-up shares fit no commitment, so they say nothing about the dealer."""
    terms, evidence = another()
    made_up = {owner: RevealedShare.pack_all([RevealedShare(3, SELF, bytes(33))]) for owner in (0, 1, 2, 4)}
    with pytest.raises(RemoteProtocolError, match="does not show that anybody lied"):
        accused(terms, replace(evidence, words=made_up))


# --- 247: what an owner keeps of a lie of the coordinator's ---


def signed_delivery(agreement: Agreement, digest: str) -> ReceivedRecord:
    body = delivery_body(agreement.digest(), Delivered(position=1, model="average", digest=digest))
    signature = IDENTITIES["coordinator"].sign(Domain.SIGN_DELIVERY, bytes.fromhex(RUN), body)
    return ReceivedRecord(position=1, model="average", digest=digest, signature=signature.hex())


def signed_result(agreement: Agreement) -> ResultRecord:
    publication = Publication(
        files={"config.json": "ab" * 32},
        configuration={},
        owners=("ada",),
        examples=None,
        test={},
        validation={},
        mixtures={},
    ).canonical_bytes()
    body = result_body(agreement, "average", "ab" * 32, "cd" * 32, publication)
    return ResultRecord(
        model="average",
        model_digest="ab" * 32,
        deliveries_digest="cd" * 32,
        publication=publication.decode(),
        signature=IDENTITIES["coordinator"].sign(Domain.SIGN_RESULT, bytes.fromhex(RUN), body).hex(),
    )


def explained(agreement: Agreement, **fields: object) -> str:
    values = {"agreement_digest": agreement.digest(), "run": RUN, "wrong": ("wrong",), "delivered": (), **fields}
    return "\n".join(in_words("ada", agreement, OwnersEvidence(**values)))  # type: ignore[arg-type]


def test_247_a_delivery_that_the_coordinator_did_not_sign_is_not_shown_as_signed(agreement: Agreement) -> None:
    true = signed_delivery(agreement, "ab" * 32)
    assert "NOT" not in explained(agreement, delivered=(true,), false=(1,))
    for changes in ({"digest": "cd" * 32}, {"position": 2}, {"model": "regmean"}, {"signature": "ab" * 64}):
        said = explained(agreement, delivered=(true.model_copy(update=changes),), false=(1,))
        assert "NOT all of its signatures are valid" in said
        assert said.count("NOT SIGNED") == 1
    other = agreement.model_copy(update={"title": "Another"})
    assert "NOT SIGNED" in explained(other, delivered=(true,), false=(1,))


def test_247_a_result_that_the_coordinator_did_not_sign_is_not_shown_as_signed(agreement: Agreement) -> None:
    true = signed_result(agreement)
    assert "The coordinator's signature under it is valid." in explained(agreement, result=true)
    false = true.model_copy(update={"model_digest": "cd" * 32})
    assert "The coordinator's signature under it is NOT valid." in explained(agreement, result=false)


def test_a_reason_is_shown_whole_in_plain_characters_and_within_bounds(agreement: Agreement) -> None:
    sentence = "the coordinator sent a model whose " + "layer." * 40 + "weight is not that of the regmean candidate"
    assert f"\n  {sentence}\n" in explained(agreement, wrong=(sentence,))
    said = explained(agreement, wrong=("\x1b[2J\u202e" + "x" * 10_000,))
    assert "\\x1b[2J\\u202exxx" in said
    assert max(map(len, said.splitlines())) < 410


# --- 115: what a coordinator keeps ---


@pytest.fixture
def kept_file(agreement: Agreement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RemoteProtocolError, match="owner bea lied: it opened other shares for ada"):
        run_all(WrongDealer(opens_another_share(IDENTITIES["bea"], "self_share")).started(agreement, needed=3))
    (path,) = (tmp_path / "evidence").iterdir()
    return path


def test_115_what_proves_a_lie_outlives_the_run_and_a_new_one(
    kept_file: Path, agreement: Agreement, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kept_file.name.startswith("bea-")
    coordinator_of(agreement, honest, needed=3).checkpoint.remove()
    found, liar, lie = kept.read(kept_file)
    assert (found.digest(), liar, lie) == (agreement.model_copy(update={"min_owners": 3}).digest(), "bea", "opened")
    assert explain_lie(kept_file) == 0
    assert "bea lied: it opened a share that is not the one that it committed to" in capsys.readouterr().out


def test_115_evidence_of_a_sum_under_another_agreement(kept_file: Path) -> None:
    content = json.loads(kept_file.read_text())
    content["agreement"]["title"] = "Another"
    kept_file.write_text(json.dumps(content))
    with pytest.raises(RemoteProtocolError, match="of another agreement"):
        kept.read(kept_file)


@pytest.mark.parametrize(
    "change",
    [{"evidence": {}}, {"layout": [64]}, {"request": {}}, {"agreement": {}}, {"more": 1}],
    ids=["evidence", "layout", "request", "agreement", "more"],
)
def test_115_a_malformed_file(change: dict[str, object], kept_file: Path) -> None:
    kept_file.write_text(json.dumps(json.loads(kept_file.read_text()) | change))
    with pytest.raises(AmalgramError):
        kept.read(kept_file)
