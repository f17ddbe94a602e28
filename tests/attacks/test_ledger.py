"""Attacks 60 to 66: the same rows and weight changes under two agreements, and everything that could hide the first.

After one honest agreement a second one is put before the owner. Each of its totals is over enough owners. The
difference of the two totals would not be.
"""

import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from client.owner import Owner
from client.repeats import LEAST_SHARE, Repeat, Terms, check_repeats, terms_of, what_the_difference_shows
from common.agreement import Agreement, OwnerEntry
from common.errors import ConsentError, RemoteProtocolError, SettingsError
from common.identity import fingerprint
from common.messages import KeyShares, Message
from common.settings_file import write_settings
from deploy.commands.agree import ask_for_consent, give_consent
from tests.support.owner_process import Process, roll_call
from tests.support.parties import Parties, identities_of, parties_with_method

SAME = "the same rows and the same weight changes were contributed under another agreement"


@dataclass(frozen=True)
class Moments:
    """The example's owners at two moments of their first agreement. Tests work on copies."""

    before: Parties  # nothing has left yet
    upload: KeyShares  # what hotel is asked next, and answers with its vector
    after: Parties


@pytest.fixture(scope="module")
def moments(reviews_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Moments:
    kept = tmp_path_factory.mktemp("kept")
    with parties_with_method(reviews_folder, kept, "regmean") as parties:
        process = Process(parties)
        process.begin(process.open_sum(1))
        upload = process.until(KeyShares)["hotel"]
        assert isinstance(upload, KeyShares)
        before = copy_of(parties, kept / "before")
        process.until(None)
        return Moments(before, upload, copy_of(parties, kept / "after"))


@pytest.fixture
def before(moments: Moments, tmp_path: Path) -> Parties:
    return copy_of(moments.before, tmp_path / "parties")


@pytest.fixture
def after(moments: Moments, tmp_path: Path) -> Parties:
    return copy_of(moments.after, tmp_path / "parties")


def copy_of(parties: Parties, folder: Path) -> Parties:
    """The same owners with their keys, ledgers and state, in another folder."""
    shutil.copytree(parties.folder, folder)
    return replace(parties, folder=folder, files={name: folder / path.name for name, path in parties.files.items()})


def under(parties: Parties, agreement: Agreement, *, again: bool = False) -> Parties:
    """Put another agreement in place, and let `hotel` consent, perhaps to repeat what it contributed."""
    write_settings(parties.folder / "agreement.toml", agreement)
    owner = Owner(parties.files["hotel"])
    give_consent(owner, owner.ledger.repeats(owner.contributed()) if again else ())
    return replace(parties, agreement=agreement)


def open_at_hotel(parties: Parties) -> Message:
    """Roll call and opening of the round of contributions."""
    process = Process(replace(parties, files={"hotel": parties.files["hotel"]}))
    return process.send("hotel", process.open_sum(1))


def changed(agreement: Agreement, **values: object) -> Agreement:
    return agreement.model_copy(update=values)


def measuring(agreement: Agreement, count: int) -> Agreement:
    return changed(agreement, regmean=agreement.regmean.model_copy(update={"measured_examples": count}))  # type: ignore[attr-defined]


def four_of_five(agreement: Agreement) -> Agreement:
    """Two owners more, one of whom the coordinator may call dropped out."""
    more = [
        OwnerEntry(name=name, public_key=identity.public_key.hex())
        for name, identity in list(identities_of(("", "", "", "", "inn", "spa")).items())[-2:]
    ]
    summation = agreement.summation.model_copy(update={"colluders": 1, "quorum": 4})
    return changed(agreement, owners=(*agreement.owners, *more), min_owners=4, summation=summation)


SECOND: dict[str, Callable[[Agreement], Agreement]] = {
    "weighted by owners": lambda agreement: changed(agreement, weighting="owners"),
    "100 measured": lambda agreement: measuring(agreement, 100),
    "all but one measured": lambda agreement: measuring(agreement, 199),
    "4 of 5 owners": four_of_five,
    "another title": lambda agreement: changed(agreement, title="Another"),
    "another method": lambda agreement: changed(agreement, method="average"),
}


@pytest.mark.parametrize("second", SECOND)
def test_60_the_same_rows_under_another_agreement(after: Parties, second: str) -> None:
    with pytest.raises(ConsentError, match=SAME):
        open_at_hotel(under(after, SECOND[second](after.agreement)))


def test_60_the_same_rows_with_a_fresh_state_folder(after: Parties) -> None:
    """The ledger belongs to the identity, not to the folder."""
    shutil.rmtree(after.folder / "state" / "hotel")
    with pytest.raises(ConsentError, match=SAME):
        open_at_hotel(under(after, SECOND["weighted by owners"](after.agreement)))


def test_60_one_row_of_200_is_another(after: Parties) -> None:
    """The difference of the two totals is that of two single rows. A model made from these rows is another one too."""
    path = Owner(after.files["hotel"]).settings.data.train
    _, *others = path.read_text().splitlines()
    own = after.folder / "train.jsonl"
    own.write_text("\n".join(['{"text": "quite another text", "label": 0}', *others]))
    assert len(others) == 199
    settings = after.files["hotel"]
    settings.write_text(settings.read_text().replace(str(path), str(own)))
    with pytest.raises(ConsentError, match="about 99 % of the same rows were contributed under another agreement"):
        open_at_hotel(under(after, SECOND["another title"](after.agreement)))


def test_60_other_labels_and_other_white_space_are_the_same_rows(after: Parties) -> None:
    """No Gram has the labels, and whoever drafts an agreement chooses their names."""
    owner = Owner(after.files["hotel"])
    path = owner.settings.data.train
    before = owner.contributed(may_train=False).rows
    own = after.folder / "train.jsonl"
    own.write_text(path.read_text().replace('"label": 1', '"label": 0').replace(" ", "  "))
    after.files["hotel"].write_text(after.files["hotel"].read_text().replace(str(path), str(own)))
    assert Owner(after.files["hotel"]).contributed(may_train=False).rows == before


def test_60_a_repetition_needs_consent_to_this_one(after: Parties, capsys: pytest.CaptureFixture[str]) -> None:
    """`agree` says what the difference would show and refuses; with `--again` it may be contributed, this once."""
    second = changed(after.agreement, weighting="owners", method="average")
    write_settings(after.folder / "agreement.toml", second)
    with pytest.raises(ConsentError, match=r"the same rows were contributed(?s:.*)amalgram agree --again"):
        ask_for_consent(after.files["hotel"], yes=None, again=False)
    text = " ".join(capsys.readouterr().out.split())
    assert "YOU HAVE CONTRIBUTED THE SAME ROWS BEFORE, UNDER ANOTHER AGREEMENT" in text
    assert "one of them can solve the two averages for your weight changes" in text
    assert "OWNERS ARE OTHERS" not in text
    assert second.digest() not in Owner(after.files["hotel"]).state.consents()
    open_at_hotel(under(after, second, again=True))
    with pytest.raises(ConsentError, match=SAME):
        open_at_hotel(under(after, SECOND["100 measured"](after.agreement)))


def test_60_an_agreement_is_resumed_and_other_rows_are_contributed_as_ever(after: Parties) -> None:
    owner = Owner(after.files["hotel"])
    assert owner.ledger.repeats(owner.contributed()) == ()
    cinema = Owner(after.files["cinema"])
    theirs, mine = (each.contributed(may_train=False) for each in (cinema, owner))
    assert theirs.shares_with(mine, is_bounded=False)[0] < LEAST_SHARE


def test_61_two_agreements_at_once(before: Parties, moments: Moments, tmp_path: Path) -> None:
    """Both are opened before either is given: at that time, nothing is repeated."""
    other = copy_of(before, tmp_path / "other")
    shutil.rmtree(other.folder / "state")
    hotel = other.files["hotel"]
    hotel.write_text(f'ledger = "{before.folder}/hotel.ledger"\n{hotel.read_text()}')
    other = replace(other, agreement=SECOND["another method"](before.agreement))
    write_settings(other.folder / "agreement.toml", other.agreement)
    for path in other.files.values():
        give_consent(Owner(path))
    process = Process(other)
    process.begin(process.open_sum(1))
    request = process.until(KeyShares)["hotel"]
    Owner(before.files["hotel"]).answer(moments.upload)
    with pytest.raises(ConsentError, match=SAME):
        process.send("hotel", request)


def test_62_rows_to_measure_are_drawn_anew_under_each_agreement(after: Parties) -> None:
    """If 101 rows were the 100 of another agreement and one more, the difference would be that row's Gram."""
    drawn = []
    for count in (100, 100, 101):
        parties = under(after, measuring(after.agreement, count))
        workbench = Owner(parties.files["hotel"]).workbench
        rows = workbench.drawn(workbench.data.train(), count)
        drawn.append({tuple(row["input_ids"]) for row in rows.features})  # type: ignore[call-overload]
    assert drawn[0] == drawn[1]
    assert len(drawn[0] - drawn[2]) > 20


def test_63_balances_split_over_two_agreements(reviews_folder: Path, tmp_path: Path) -> None:
    """With three owners one balance is allowed. One more under a second agreement is one too many, consent or not."""
    with parties_with_method(reviews_folder, tmp_path, "refit") as parties:
        process = Process(parties)
        process.sum(process.open_sum(1))
        second = changed(parties.agreement, refit=parties.agreement.refit.model_copy(update={"balances": (0.5,)}))  # type: ignore[attr-defined]
        parties = under(parties, second, again=True)
        with pytest.raises(ConsentError, match=r"summed with 2 kinds of weights .* at most 1 are safe with 3 honest"):
            open_at_hotel(parties)


@pytest.mark.parametrize("loss", ["deleted", "dangling link", "{}", "another identity's"])
def test_64_a_ledger_that_is_gone_or_another_s_is_not_an_empty_one(after: Parties, loss: str) -> None:
    path = after.folder / "hotel.ledger"
    if loss == "another identity's":
        shutil.copy(after.folder / "cinema.ledger", path)
    elif loss == "{}":
        path.write_text(loss)
    else:
        path.unlink()
    if loss == "dangling link":
        path.symlink_to(after.folder / "nowhere")
        shutil.rmtree(after.folder / "state" / "hotel")
    with pytest.raises(SettingsError, match=r"what was given before is unknown|the ledger of another identity"):
        give_consent(Owner(after.files["hotel"]))


def test_64_consent_does_not_write_an_empty_ledger_over_one_that_a_client_begins(after: Parties) -> None:
    owner = Owner(after.files["hotel"])
    stored = owner.state.folder / "consent.json"
    stored.unlink()
    consenting = threading.Thread(target=give_consent, args=(owner,))
    with owner.ledger_locked():
        consenting.start()
        consenting.join(1)
        assert not stored.exists()
    consenting.join(10)
    assert stored.exists()


def test_64_a_link_to_a_ledger_is_followed(after: Parties) -> None:
    path, elsewhere = after.folder / "hotel.ledger", after.folder / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    second = SECOND["another method"](after.agreement)
    open_at_hotel(under(after, second, again=True))
    assert path.is_symlink()
    assert second.digest() in elsewhere.read_text()


def test_65_another_owner_s_state_folder(after: Parties) -> None:
    """Two owners on one machine: cinema would answer, because hotel consented."""
    parties, cinema = under(after, SECOND["another title"](after.agreement)), after.files["cinema"]
    with pytest.raises(ConsentError, match="nobody has consented"):
        Owner(cinema).answer(roll_call(parties))
    cinema.write_text(cinema.read_text().replace("state/cinema", "state/hotel"))
    with pytest.raises(SettingsError, match="state of another identity"):
        Owner(cinema).answer(roll_call(parties))


def test_66_a_session_whose_rules_were_broken_does_not_come_back_with_its_files(
    before: Parties, moments: Moments
) -> None:
    run, hotel = before.folder / "state" / "hotel" / "run", before.files["hotel"]
    kept = {name: (run / name).read_bytes() for name in ("round.json", "vector.bin")}
    with pytest.raises(RemoteProtocolError, match="its secrets are wiped"):
        Owner(hotel).answer(replace(moments.upload, manifests=b""))
    for name, content in kept.items():
        (run / name).write_bytes(content)
    with pytest.raises(ConsentError, match="has burned"):
        Owner(hotel).answer(moments.upload)


def shown(before: Terms, now: Terms, rows: float = 1.0) -> list[str]:
    """How the sentences begin."""
    repeat = Repeat(agreement_digest="0" * 64, terms=before, rows=rows, weight_changes=1.0)
    return [" ".join(text.split()[:3]) for text in what_the_difference_shows(before, now, repeat)]


def test_what_a_difference_shows_is_said_for_what_differs(agreement: Agreement) -> None:
    """Nobody is reassured because the owners are the same."""
    first = terms_of(agreement)
    five = first.model_copy(update={"owners": {**first.owners, "4": "dan", "5": "eve"}, "needed_owners": 4})
    metrics, drop_out = "Metrics of the", "An owner may"
    assert shown(first, first) == [metrics]
    assert shown(first, five) == ["The owners differ", drop_out, metrics]
    assert shown(five, five) == [drop_out, metrics]
    assert shown(first, terms_of(changed(agreement, weighting="owners"))) == ["Owners are weighted", metrics]
    measured = [terms_of(measuring(agreement, count)) for count in (100, 101)]
    assert shown(*measured) == ["Other numbers of", metrics]
    assert shown(first, first, rows=0.995) == ["The rows are", metrics]
    assert shown(first, first, rows=0.0) == [metrics]  # only the weight changes are the same


def test_what_a_difference_shows_names_only_what_both_agreements_sum(agreement: Agreement) -> None:
    """No difference can be made of Gram matrices that only one of them sums."""
    first, average = terms_of(agreement), terms_of(changed(agreement, method="average", compare_with=()))
    assert "grams" in first.measured
    assert not average.measured
    assert shown(first, average) == shown(average, first) == ["Other methods or", "Metrics of the"]
    fewer = {"owners": dict(list(first.owners.items())[:2])}

    def said(now: Terms) -> str:
        repeat = Repeat(agreement_digest="0" * 64, terms=first, rows=1.0, weight_changes=1.0)
        return "\n".join(what_the_difference_shows(first, now, repeat))

    assert "if that is one owner, its weight changes, exactly." in said(average.model_copy(update=fewer))
    assert "its weight changes and Gram matrices, exactly." in said(first.model_copy(update=fewer))
    block_by_block = average.model_copy(update={"methods": ("regmean_plus_plus",), **fewer})
    assert "its weight changes and Gram matrices, exactly." in said(block_by_block)
    fisher = first.model_copy(update={"measured": {"grams": 100, "fisher": first.measured["fisher"]}})
    assert "measured: for Gram matrices, 1,000 before and 100 now. The difference is" in said(fisher)


def test_another_agreement_is_named_as_people_know_it(agreement: Agreement) -> None:
    digest = agreement.digest()
    repeat = Repeat(agreement_digest=digest, terms=terms_of(agreement), rows=1.0, weight_changes=1.0)
    first, second, *_ = fingerprint(bytes.fromhex(digest)).split()
    assert repeat.named == f"'Test' (fingerprint {first} {second} ...)"
    with pytest.raises(ConsentError, match=re.escape(repeat.named)) as caught:
        check_repeats(terms_of(agreement), [repeat], again=set())
    assert digest[:16] not in str(caught.value)
