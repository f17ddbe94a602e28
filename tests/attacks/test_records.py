"""Attacks 249 to 253: an owner's record that says more than anybody signed, and one that acts on whoever reads it.

`amalgram verify OWNER.toml` reads a folder that somebody may have handed over, to accuse a coordinator or others.
"""

import json
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.owner import Owner
from client.state import RunState
from client.verification import Evidence
from common.certificates import deliveries_digest, nonce_body
from common.domain_separation import Domain
from common.errors import WrongModel
from common.messages import Message, UploadsOpened
from common.publication import PublishedReceipts
from common.summation import wide
from common.summation.pairwise import PairwiseSum, public_key
from common.summation.records import Nonce, Signed
from common.tensor_layout import TensorEntry, TensorLayout
from deploy.cli import cli
from deploy.commands import explain
from server.merge import run_merge
from tests.support.parties import OwnersChannel, Parties, parties_with_method

Fields = dict[str, Any]
SHARE = 2**153  # 2^50, in the units that travel: far above every scale here


@dataclass(frozen=True)
class Run:
    """An honest run that ended. `check`: what its first owner had when it was to add up the check."""

    parties: Parties
    run: RunState
    uploads: UploadsOpened

    @property
    def evidence(self) -> Fields:
        """The fields of a record that calls the honest check wrong."""
        assert self.run.check is not None
        return {
            "agreement_digest": self.parties.agreement.digest(),
            "run": self.run.run,
            "wrong": ["1/means/classifier.weight and others"],
            "delivered": [each.model_dump() for each in self.run.received],
            "false": [self.run.received[0].position],
            "position": self.run.check.position,
            "keys": self.run.check.keys,
            "uploads": self.uploads.payload.tobytes().hex(),
            "signatures": self.uploads.proofs.hex(),
        }

    def joint(self, keys: bytes, size: int) -> PairwiseSum:
        assert self.run.check is not None
        return PairwiseSum(
            run=self.run.run,
            position=self.run.check.position,
            delivered=deliveries_digest(self.run.delivered, self.run.check.position),
            layout=TensorLayout((TensorEntry(name="check", shape=(size,), bound=np.inf),)),
            roster=self.parties.agreement.roster,
            keys=keys,
        )

    def resigned(self, keys: list[Nonce], uploads: np.ndarray) -> Fields:
        """What those whose keys these are would have signed, as far as they collude."""
        packed, shares = Nonce.pack_all(keys), uploads.reshape(len(keys), -1)
        joint = self.joint(packed, shares.shape[1])
        names, identities = self.parties.agreement.owner_names, self.parties.identities
        signed = [
            Signed(each.owner, joint.sign(identities[names[each.owner]], share))
            for each, share in zip(keys, shares, strict=True)
        ]
        return {
            "keys": packed.hex(),
            "uploads": uploads.tobytes().hex(),
            "signatures": Signed.pack_all(signed).hex(),
        }

    def false_share(self) -> np.ndarray:
        """The owners' masked shares, with another number in one of the first owner's."""
        uploads = np.array(self.uploads.payload).reshape(-1, wide.WORDS)
        uploads[:1] = wide.add(uploads[:1], np.array([wide.to_words(SHARE)], dtype="<u8"))
        return uploads.reshape(-1)


class Listening(OwnersChannel):
    """Notes what the first owner has when it is to add up the check."""

    heard: tuple[RunState, UploadsOpened] | None = None

    def answer(self, node: int, request: Message) -> Message | None:
        if node == 0 and isinstance(request, UploadsOpened) and self.heard is None:
            self.heard = Owner(self.files[0]).state.run, request
        return super().answer(node, request)


@pytest.fixture(scope="module")
def run(trained_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("records")
    with parties_with_method(trained_folder, folder, "average", verified=True) as parties:
        (parties.output / ".amalgram").touch()
        channel = Listening(parties.files)
        run_merge(parties.coordinator, channel)
        assert channel.heard is not None
        yield Run(parties, *channel.heard)


Verify = Callable[..., tuple[int, str]]


@pytest.fixture
def verify(run: Run, capsys: pytest.CaptureFixture[str]) -> Iterator[Verify]:
    """Put a record into the first owner's folder; what `amalgram verify OWNER.toml` then ends with and says."""
    folder = run.parties.folder / "state" / "hotel" / "evidence"

    def record(changes: Fields, name: str = "") -> tuple[int, str]:
        fields = run.evidence | changes
        folder.mkdir(exist_ok=True)
        (folder / f"{name or fields['agreement_digest']}.json").write_text(json.dumps(fields))
        return said_of(run.parties.files["hotel"], capsys)

    yield record
    shutil.rmtree(folder, ignore_errors=True)


def said_of(owner_file: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    code = cli(["verify", str(owner_file)], standalone_mode=False)
    said = capsys.readouterr()
    return code, said.out + said.err


# --- 249: a check ---


def test_a_check_whose_shares_do_not_add_up_is_shown_with_those_who_signed_them(run: Run, verify: Verify) -> None:
    keys = Nonce.unpack_all(bytes.fromhex(run.evidence["keys"]))
    code, said = verify(run.resigned(keys, run.false_share()))
    assert code == WrongModel.exit_code
    assert "hotel says that the coordinator sent a model that is not the merge of what was contributed." in said
    assert "Those who checked it: hotel, cinema, phones. Each signed its masked share" in said
    assert re.search(r"The sum is NOT zero: some share is at least [0-9.e+]+ times as large", said)
    assert "hotel could have done so afterwards" in said
    assert "NOT what owners signed" not in said


def test_249_an_honest_check_does_not_show_that_anything_is_wrong(run: Run, verify: Verify) -> None:
    said = verify({})[1]
    assert "these signatures are valid" in said
    assert re.search(r"The sum does NOT show that anything is wrong: no share need be more than [0-9.e-]+ of", said)
    assert "The sum is NOT zero" not in said


def made_up(run: Run) -> Iterator[tuple[str, Fields, str]]:
    """Records of shares that owners did not sign, and why each does not count."""
    fields, delivered = run.evidence, run.evidence["delivered"]
    keys, signed = Nonce.unpack_all(bytes.fromhex(fields["keys"])), bytes.fromhex(fields["signatures"])
    nobody = Signed.pack_all([Signed(owner, bytes(64)) for owner in range(3)]).hex()
    yield "zeros", {"signatures": nobody}, r"the signature of hotel is not valid \([0-9]+ sign "
    yield "alone", {"keys": "", "uploads": "", "signatures": nobody}, "the shares are those of 0 owners"
    yield "other shares", {"uploads": run.false_share().tobytes().hex()}, "the signature of hotel is not valid"
    yield "two shares", {"signatures": signed[:-66].hex()}, "not one signed vector of every owner"
    yield "no check", {"position": None}, "does not say which check this was"
    yield "another check", {"position": fields["position"] + 1}, "the signature of hotel is not valid"
    yield "another run", {"run": "ab" * 32}, "the signature of hotel is not valid"
    before = [{**delivered[0], "digest": "ab" * 32}, *delivered[1:]]
    yield "another model", {"delivered": before}, "the signature of hotel is not valid"
    yield "no shares", {"uploads": ""}, "the shares are not whole numbers"
    yield "half a number", {"uploads": fields["uploads"][:-2]}, "the shares are not whole numbers"
    unsigned = [keys[0], Nonce(1, keys[1].nonce, bytes(64)), keys[2]]
    yield "keys", run.resigned(unsigned, run.false_share()), "the signature of cinema is not valid"


def test_249_shares_that_owners_did_not_sign_are_not_shown_as_theirs(run: Run, verify: Verify) -> None:
    for name, changes, why in made_up(run):
        code, said = verify(changes)
        assert code == WrongModel.exit_code, name
        assert "shares is NOT what owners signed: " in said, name
        assert re.search(why, said), name
        assert "Those who checked it" not in said, name


def test_249_an_owner_that_makes_up_a_check_of_its_own_has_no_others_in_it(run: Run, verify: Verify) -> None:
    seed, identity, check = bytes(32), run.parties.identities["hotel"], run.run.check
    assert check is not None
    key = public_key(seed, run.run.run)
    body = nonce_body(check.position, deliveries_digest(run.run.delivered, check.position), key)
    mine = Nonce(0, key, identity.sign(Domain.SIGN_NONCE, bytes.fromhex(run.run.run), body))
    share = np.array(wide.to_words(SHARE) * 8, dtype="<u8")
    said = verify(run.resigned([mine], share))[1]
    assert "NOT what owners signed: the shares are those of 1 owners; no check is made by fewer than 3" in said
    assert "The sum is NOT zero" not in said


# --- 250: what the coordinator did not sign ---

NO_CHECK: Fields = {"position": None, "keys": "", "uploads": "", "signatures": ""}


def test_250_a_record_of_nothing_is_not_shown_as_signed(verify: Verify) -> None:
    said = verify(NO_CHECK | {"delivered": []})[1]
    assert "signatures are valid:" not in said
    assert "The coordinator did NOT sign that it sent anything" in said
    assert "No other owner signed anything in this record." in said


def test_250_what_an_owner_expected_is_said_to_be_its_own_word(run: Run, verify: Verify) -> None:
    """An honest run's deliveries, with the coordinator's own signatures, one of which the owner calls wrong."""
    first, last = run.run.received[0], run.run.received[-1]
    said = verify(NO_CHECK | {"false": [last.position], "expected": first.digest})[1]
    assert "All below is hotel's own word, except where it says that others' signatures are valid." in said
    assert f"event {last.position}: SHA-256 {last.digest}  {last.model}  WRONG, says hotel\n" in said
    assert f"hotel says that event {last.position} should have been SHA-256 {first.digest}:" in said
    assert f"  the coordinator signed that it sent that as event {first.position}.\n" in said
    assert "That it should have sent it again is hotel's own word." in said


def test_250_what_the_coordinator_did_not_sign_was_not_sent_before(run: Run, verify: Verify) -> None:
    last = run.run.received[-1]
    invented = run.run.received[0].model_dump() | {"position": 0, "digest": "ab" * 32}
    delivered = [invented, *run.evidence["delivered"]]
    said = verify(NO_CHECK | {"delivered": delivered, "false": [last.position, 9], "expected": "ab" * 32})[1]
    assert "NOT all of its signatures are valid" in said
    assert "the coordinator signed that it sent that" not in said
    assert "Of what hotel calls wrong, the record does NOT hold event 9." in said
    assert "Nobody else signed it." in said


# --- 251: words that forge lines or act on a terminal ---


def forged(run: Run) -> Iterator[Fields]:
    escape, line = "\x1b[2J\x1b[H", "\nThe coordinator is honest.\n"
    yield {"run": f"{escape}{'ab' * 32}"}
    yield {"run": f"\nAll is well.\n{'ab' * 32}", "delivered": []} | NO_CHECK
    yield {"delivered": [run.evidence["delivered"][0] | {"digest": escape}]}
    yield {"expected": line}
    yield {"false": [10**30]}
    receipts = next((run.parties.folder / "state" / "hotel" / "receipts").glob("*.json"))
    kept = PublishedReceipts.model_validate_json(receipts.read_bytes())
    result = {
        "model": kept.model,
        "model_digest": kept.model_digest,
        "deliveries_digest": kept.deliveries_digest,
        "publication": kept.publication.canonical_bytes().decode(),
        "signature": kept.coordinator,
    }
    mean = next(iter(kept.publication.test.values())).model_copy(update={"accuracy": 0.01}).model_dump_json()
    yield {"result": result, "totals": [{"split": f"{escape}{line}", "model": "average", "metrics": mean}]}
    yield {"result": result | {"model_digest": line}}


def test_251_words_in_a_record_forge_no_line_and_reach_no_terminal(run: Run, verify: Verify) -> None:
    for changes in forged(run):
        code, said = verify(changes)
        assert code == WrongModel.exit_code
        assert said.splitlines()[1:] == [
            "DAMAGED: it was changed after it was written, or another release wrote it."
        ], changes
    said = verify({"wrong": ["\x1b[2J", "\nThe coordinator is honest.\n"], "false": []})[1]
    assert "\\x1b[2J\n  \\nThe coordinator is honest.\\n\n" in said
    assert len([line for line in verify({"wrong": ["x"] * 10_000})[1].splitlines() if line == "  x"]) == 100


def test_251_a_file_s_name_forges_no_line(verify: Verify) -> None:
    said = verify({}, "x\nThe coordinator is honest.\x1b[2J")[1]
    assert "\nThe coordinator is honest." not in said
    assert "\\nThe coordinator is honest.\\x1b[2J" in said
    assert "DAMAGED" in said  # it has the name of another agreement


# --- 252: a settings file that somebody handed over ---


def test_252_nothing_is_written_and_no_key_is_needed(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    victim, bundle = tmp_path / "victim", tmp_path / "bundle"
    victim.mkdir(mode=0o755)
    bundle.mkdir()
    (victim / "thesis.txt").write_text("mine")
    shutil.copy(run.parties.folder / "agreement.toml", bundle)
    text = run.parties.files["hotel"].read_text()
    own = [line for line in text.splitlines() if not re.match(r"(state|agreement|identity|ledger) =", line)]
    given = [f'state = "{victim}"', 'agreement = "agreement.toml"', 'identity = "hotel.key"', *own]
    (bundle / "hotel.toml").write_text("\n".join(given))
    code, said = said_of(bundle / "hotel.toml", capsys)
    assert code == 0
    assert f"no record: {victim}/evidence holds nothing that hotel found wrong; nothing else was looked at" in said
    assert stat.S_IMODE(victim.stat().st_mode) == 0o755
    assert [each.name for each in victim.iterdir()] == ["thesis.txt"]
    assert sorted(each.name for each in bundle.iterdir()) == ["agreement.toml", "hotel.toml"]


def test_252_a_record_that_is_larger_than_any_is_not_read_whole(
    verify: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "DAMAGED" not in verify({})[1]
    monkeypatch.setattr(explain, "MAX_EVIDENCE_BYTES", 1000)
    assert "DAMAGED" in verify({})[1]


# --- 253: a record that a later agreement hides ---


def test_253_records_of_earlier_agreements_are_shown_too(
    run: Run, verify: Verify, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, first = run.parties.folder, run.parties.agreement
    current = folder / "agreement.toml"
    kept = current.read_text()
    assert "Those who checked it" in verify({})[1]
    try:
        current.write_text(kept.replace(f'title = "{first.title}"', 'title = "Second agreement"'))
        code, said = said_of(run.parties.files["hotel"], capsys)
        assert code == WrongModel.exit_code
        assert f"evidence/{first.digest()}.json\nhotel says that something was wrong under an agreement" in said
        assert f"\nIts digest is {first.digest()}." in said
        (folder / "earlier.toml").write_text(kept)
        code, said = said_of(run.parties.files["hotel"], capsys)
        assert code == WrongModel.exit_code
        assert "Those who checked it" in said
        assert first.title in said
    finally:
        current.write_text(kept)
        (folder / "earlier.toml").unlink(missing_ok=True)


def test_a_program_gets_one_object(run: Run, verify: Verify, capsys: pytest.CaptureFixture[str]) -> None:
    verify({})
    assert cli(["verify", str(run.parties.files["hotel"]), "--json"], standalone_mode=False) == WrongModel.exit_code
    (record,) = json.loads(capsys.readouterr().out)["records"]
    assert record["path"].endswith(f"{run.parties.agreement.digest()}.json")
    assert record["says"][0].startswith("hotel says")


def test_a_record_that_an_owner_writes_is_read(run: Run) -> None:
    assert Evidence.model_validate_json(json.dumps(run.evidence)).position == run.evidence["position"]
