"""Attacks 1 to 7, 12, 13, 27 and 74: a key book in which somebody's keys are not that owner's keys of this session."""

from dataclasses import replace
from pathlib import Path

import pytest

from common.agreement.tables import CoordinatorEntry, OwnerEntry
from common.domain_separation import Domain
from common.errors import RemoteProtocolError, SettingsError
from common.identity import Identity, read_public_identity, verify
from common.messages import KeyBook, OpenSum
from common.summation import key_agreement
from common.summation.masked.book import check_entry
from common.summation.masked.owner import MaskedOwner
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
]
NOT_CANONICAL = ["ed" + "ff" * 30 + "7f", "ee" + "ff" * 30 + "7f", "00" * 31 + "80"]  # p, p + 1, and 0 with a sign bit


@pytest.mark.parametrize("point", [*LOW_ORDER, *NOT_CANONICAL])
@pytest.mark.parametrize("which", ["channel", "mask"])
def test_27_a_weak_key_signed_by_a_colluder(which: str, point: str) -> None:
    """With it, the secret of the pair would be zero, known to everybody. The coordinator does not take it either."""
    evil = MaliciousCoordinator()
    entries = entries_of(evil.honest_until(KeyBook)["o0"])  # type: ignore[arg-type]
    keys = {"channel_key": entries[1].channel_key, "mask_key": entries[1].mask_key}
    keys[f"{which}_key"] = bytes.fromhex(point)
    signature = evil.identities["o1"].sign(Domain.SIGN_KEYS, evil.terms.session, keys["channel_key"] + keys["mask_key"])
    why = "not in its canonical encoding" if point in NOT_CANONICAL else "point of low order"
    with pytest.raises(RemoteProtocolError, match=why):
        check_entry(evil.terms, KeyEntry(1, **keys, signature=signature))
    send_book(evil, {1: KeyEntry(1, **keys, signature=signature)}, why)


@pytest.mark.parametrize("point", LOW_ORDER)
def test_27_a_low_order_point_gives_no_secret(point: str) -> None:
    """Even if one came through, in whatever way."""
    with pytest.raises(RemoteProtocolError, match="point of low order"):
        key_agreement.agree(key_agreement.private_key(b"a" * 32, Domain.MASK_KEY, bytes(32)), bytes.fromhex(point))


def test_74_another_owner_s_key_in_a_second_encoding() -> None:
    """X25519 ignores the highest bit, so this is o1's key, in other bytes."""
    evil = MaliciousCoordinator()
    entries = entries_of(evil.honest_until(KeyBook)["o0"])  # type: ignore[arg-type]
    stolen = bytearray(entries[1].mask_key)
    stolen[-1] ^= 0x80
    keys = {"channel_key": entries[2].channel_key, "mask_key": bytes(stolen)}
    signature = evil.identities["o2"].sign(Domain.SIGN_KEYS, evil.terms.session, keys["channel_key"] + keys["mask_key"])
    send_book(evil, {2: KeyEntry(2, **keys, signature=signature)}, "not in its canonical encoding")


IDENTITY_POINT = bytes([1]) + bytes(31)
WEAK_IDENTITIES = [  # on Ed25519: of order 1, 2, 4, 8, 8; then 1 with a sign, p + 1, and no field element
    IDENTITY_POINT,
    (2**255 - 20).to_bytes(32, "little"),
    bytes(32),
    bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"),
    bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa"),
    bytes([1]) + bytes(30) + b"\x80",
    (2**255 - 18).to_bytes(32, "little"),
    b"\xff" * 32,
]


def test_74_under_the_weakest_identity_anybody_signs_anything() -> None:
    """Why such a key must not come onto the roster: this signature, of zero, was made without any secret."""
    signature = IDENTITY_POINT + bytes(32)
    for body in (b"one list", b"another list"):
        verify(IDENTITY_POINT, Domain.SIGN_SURVIVORS, bytes(32), "o1", body, signature)


@pytest.mark.parametrize("key", WEAK_IDENTITIES)
def test_74_a_weak_identity_comes_onto_no_roster(key: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ada.pub"
    path.write_text(f"amalgram public identity v1\nname ada\npublic {key.hex()}\n")
    with pytest.raises(SettingsError, match=r"ada\.pub: a weak key, under which others could sign"):
        read_public_identity(path)
    for entry in (lambda: OwnerEntry(name="ada", public_key=key.hex()), lambda: CoordinatorEntry(public_key=key.hex())):
        with pytest.raises(ValueError, match="a weak key"):
            entry()
