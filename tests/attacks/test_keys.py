"""Attacks 1 to 7, 12, 13 and 27: a key book in which somebody's keys are not that owner's keys of this session."""

from dataclasses import replace

import pytest

from common.domain_separation import Domain
from common.identity import Identity
from common.messages import KeyBook, KeyShares, OpenSum
from common.summation import key_agreement
from common.summation.masked.owner import MaskedOwner
from common.summation.masked.phases import Phase
from common.summation.records import KeyEntry
from tests.support.malicious import MaliciousCoordinator
from tests.support.sums import repeating_bytes

ATTACKER = Identity(name="o1", seed=b"attacker".ljust(32))


def entries_of(book: KeyBook) -> dict[int, KeyEntry]:
    return {entry.owner: entry for entry in KeyEntry.unpack_all(book.entries)}


def attackers_keys() -> tuple[bytes, bytes]:
    """Keys whose private halves the attacker knows."""
    return (
        key_agreement.public_key(b"a" * 32, Domain.CHANNEL_KEY, bytes(32)),
        key_agreement.public_key(b"b" * 32, Domain.MASK_KEY, bytes(32)),
    )


def send_book(evil: MaliciousCoordinator, change: dict[int, KeyEntry | None], why: str) -> None:
    """Send o0 the honest key book with some entries changed or left out; it must refuse."""
    book = evil.honest_until(KeyBook)["o0"]
    assert isinstance(book, KeyBook)
    changed = {**entries_of(book), **change}
    entries = KeyEntry.pack_all(entry for entry in changed.values() if entry is not None)
    with evil.refused("o0", why):
        evil.send("o0", replace(book, entries=entries))


def test_1_keys_replaced_in_transit() -> None:
    evil = MaliciousCoordinator()
    honest = entries_of(evil.honest_until(KeyBook)["o0"])[1]  # type: ignore[arg-type]
    channel_key, mask_key = attackers_keys()
    for entry in (replace(honest, channel_key=channel_key), replace(honest, mask_key=mask_key)):
        send_book(MaliciousCoordinator(), {1: entry}, "the signature of o1 is not valid")


def test_2_keys_signed_by_a_key_that_is_not_on_the_roster() -> None:
    evil = MaliciousCoordinator()
    channel_key, mask_key = attackers_keys()
    signature = ATTACKER.sign(Domain.SIGN_KEYS, evil.terms.session, channel_key + mask_key)
    send_book(evil, {1: KeyEntry(1, channel_key, mask_key, signature)}, "the signature of o1 is not valid")


def test_3_an_owner_s_entry_replayed_as_another_s() -> None:
    evil = MaliciousCoordinator()
    entries = entries_of(evil.honest_until(KeyBook)["o0"])  # type: ignore[arg-type]
    send_book(evil, {1: None, 2: replace(entries[1], owner=2)}, "the signature of o2 is not valid")


def test_4_an_owner_twice() -> None:
    evil = MaliciousCoordinator()
    book = evil.honest_until(KeyBook)["o0"]
    assert isinstance(book, KeyBook)
    size = KeyEntry.FORMAT.size
    with evil.refused("o0", "not in strictly ascending order"):
        evil.send("o0", replace(book, entries=book.entries + book.entries[-size:]))


def test_4_a_colluder_that_advertises_another_owner_s_keys_as_its_own() -> None:
    evil = MaliciousCoordinator()
    entries = entries_of(evil.honest_until(KeyBook)["o0"])  # type: ignore[arg-type]
    stolen = entries[1]
    signature = evil.identities["o2"].sign(Domain.SIGN_KEYS, evil.terms.session, stolen.channel_key + stolen.mask_key)
    send_book(evil, {2: replace(stolen, owner=2, signature=signature)}, "duplicate key in the key book")


def test_5_my_own_entry_is_one_i_signed_but_not_the_one_i_hold_keys_for() -> None:
    """The coordinator got the owner to advertise twice in one session, and uses the first answer."""
    evil = MaliciousCoordinator()
    book = evil.honest_until(KeyBook)["o0"]
    evil.owners["o0"], _ = MaskedOwner.open(evil.terms, evil.identities["o0"], repeating_bytes(99))
    with evil.refused("o0", "my own entry is missing or altered"):
        evil.send("o0", book)


def test_6_i_am_missing() -> None:
    send_book(MaliciousCoordinator(), {0: None}, "my own entry is missing or altered")


def test_7_an_advertisement_of_an_earlier_round() -> None:
    earlier = MaliciousCoordinator()
    stale = entries_of(earlier.honest_until(KeyBook)["o0"])[1]  # type: ignore[arg-type]

    def next_round(request: OpenSum) -> OpenSum:
        return replace(request, round=2)

    send_book(MaliciousCoordinator(change=next_round, seed=1), {1: stale}, "the signature of o1 is not valid")


def test_12_a_roster_inflated_with_made_up_owners() -> None:
    evil = MaliciousCoordinator()
    channel_key, mask_key = attackers_keys()
    made_up = Identity(name="o5", seed=b"o5".ljust(32))
    signature = made_up.sign(Domain.SIGN_KEYS, evil.terms.session, channel_key + mask_key)
    send_book(evil, {5: KeyEntry(5, channel_key, mask_key, signature)}, "there is no owner 5 on a roster of 5")


@pytest.mark.parametrize("missing", [(3, 4), (1, 3, 4), (1, 2, 3, 4)])
def test_13_too_few_owners_in_the_key_book(missing: tuple[int, ...]) -> None:
    send_book(MaliciousCoordinator(), dict.fromkeys(missing), "the agreement needs 4")


@pytest.mark.parametrize("needed", [3, 4])
def test_13_the_quorum_counts_where_it_is_more_than_min_owners(needed: int) -> None:
    """Even an agreement that was built with too low a min_owners does not let a smaller group than a quorum begin."""
    evil = MaliciousCoordinator(needed=needed, colluders=1)
    send_book(evil, {3: None, 4: None}, "3 owners, the agreement needs 4")


# Points of order 1, 2, 4 and 8 on Curve25519 and its twist (Cremers and Jackson, CSF 2019, table I).
LOW_ORDER = [
    "00" * 32,
    "01" + "00" * 31,
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ec" + "ff" * 30 + "7f",
    "ed" + "ff" * 30 + "7f",
    "ee" + "ff" * 30 + "7f",
]


@pytest.mark.parametrize("point", LOW_ORDER)
@pytest.mark.parametrize("which", ["channel", "mask"])
def test_27_a_low_order_point_signed_by_a_colluder(which: str, point: str) -> None:
    """With it, the secret of the pair would be zero, known to everybody."""
    evil = MaliciousCoordinator()
    entries = entries_of(evil.honest_until(KeyBook)["o0"])  # type: ignore[arg-type]
    keys = {"channel_key": entries[1].channel_key, "mask_key": entries[1].mask_key}
    keys[f"{which}_key"] = bytes.fromhex(point)
    signature = evil.identities["o1"].sign(Domain.SIGN_KEYS, evil.terms.session, keys["channel_key"] + keys["mask_key"])
    entry = KeyEntry(1, keys["channel_key"], keys["mask_key"], signature)
    if which == "channel":
        send_book(evil, {1: entry}, "point of low order")
        return
    # A mask key is used one step later. The colluder plays on with its own view of the book.
    book = evil.side.requests()["o0"]
    changed = replace(book, entries=KeyEntry.pack_all({**entries, 1: entry}.values()))  # type: ignore[type-var]
    evil.side._book = type(evil.side._book)(evil.terms, changed.entries)
    evil.owners["o1"] = replace(evil.owners["o1"], book_data=changed.entries)
    for owner in ("o0", "o2", "o3", "o4"):
        evil.side.receive(owner, evil.send(owner, changed))
    evil.side.drop("o1")
    requests = evil.side.end_step() or evil.side.requests()
    del requests
    sealed = _sealed_by_colluder(evil, changed)
    with evil.refused("o0", "point of low order"):
        evil.send("o0", sealed)


def _sealed_by_colluder(evil: MaliciousCoordinator, book: KeyBook) -> KeyShares:
    """What o0 would receive if the colluder o1 took part with its weak mask key."""
    weak = evil.owners["o1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaskedOwner, "_own_entry", lambda self: entries_of(book)[1])
        patch.setattr("common.summation.masked.book.Book.check", lambda self: None)
        _, reply = replace(weak, phase=Phase.ADVERTISE_KEYS).answer(book, evil.encoded["o1"], repeating_bytes(5))
    evil.side._take_shares(1, reply)  # type: ignore[arg-type]
    return evil.side._key_shares(0)
