"""Identities: key files are never overwritten and not readable by others; a signature is valid for one purpose."""

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.domain_separation import Domain
from common.errors import RemoteProtocolError, SettingsError
from common.identity import (
    Identity,
    PublicIdentity,
    _signed_bytes,
    fingerprint,
    read_identity,
    read_public_identity,
    verify,
    write_identity,
)

ADA = Identity(name="ada", seed=bytes(range(32)))


def test_an_identity_is_read_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "ada.key"
    write_identity(path, ADA)
    assert read_identity(path) == ADA
    assert read_public_identity(tmp_path / "ada.pub") == PublicIdentity(name="ada", public_key=ADA.public_key)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert ADA.seed.hex() not in (tmp_path / "ada.pub").read_text()


@pytest.mark.parametrize("existing", ["ada.key", "ada.pub"])
def test_a_key_file_is_never_overwritten(tmp_path: Path, existing: str) -> None:
    (tmp_path / existing).write_text("something")
    with pytest.raises(SettingsError, match="already exists, and a key is never overwritten"):
        write_identity(tmp_path / "ada.key", ADA)
    assert (tmp_path / existing).read_text() == "something"


def test_a_link_where_a_key_file_should_be_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "ada.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SettingsError, match="already exists"):
        write_identity(tmp_path / "ada.key", ADA)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_secret_that_other_users_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    write_identity(tmp_path / "ada.key", ADA)
    (tmp_path / "ada.key").chmod(mode)
    with pytest.raises(SettingsError, match="other users may read this secret\nhint: chmod 600"):
        read_identity(tmp_path / "ada.key")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "amalgram identity v2\nname ada\nsecret " + "00" * 32 + "\n",
        "amalgram identity v1\nname ada\nsecret " + "00" * 31 + "\n",
        "amalgram identity v1\nname ada\nsecret " + "0A" * 32 + "\n",
        "amalgram identity v1\nname ada\nsecret " + "00" * 32 + "\n\n",
        "amalgram identity v1\r\nname ada\r\nsecret " + "00" * 32 + "\r\n",
        "amalgram identity v1\nname Ada\nsecret " + "00" * 32 + "\n",
        "amalgram public identity v1\nname ada\npublic " + "00" * 32 + "\n",
    ],
)
def test_a_file_that_is_not_exactly_an_identity_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "ada.key"
    path.write_text(content, newline="")
    path.chmod(0o600)
    with pytest.raises(SettingsError, match="not an amalgram identity"):
        read_identity(path)


def test_a_secret_does_not_show() -> None:
    assert ADA.seed.hex() not in repr(ADA)
    assert repr(ADA.seed) not in repr(ADA)


def test_a_signature_is_valid_for_one_domain_session_owner_and_body_only() -> None:
    session, body = b"s" * 32, b"body"
    signature = ADA.sign(Domain.SIGN_KEYS, session, body)
    verify(ADA.public_key, Domain.SIGN_KEYS, session, "ada", body, signature)
    eve = Identity(name="ada", seed=b"e" * 32)
    for wrong in (
        (ADA.public_key, Domain.SIGN_SHARES, session, "ada", body, signature),
        (ADA.public_key, Domain.SIGN_KEYS, b"t" * 32, "ada", body, signature),
        (ADA.public_key, Domain.SIGN_KEYS, session, "bea", body, signature),
        (ADA.public_key, Domain.SIGN_KEYS, session, "ada", b"other", signature),
        (ADA.public_key, Domain.SIGN_KEYS, session, "ada", body, signature[:-1]),
        (eve.public_key, Domain.SIGN_KEYS, session, "ada", body, signature),
        (b"short", Domain.SIGN_KEYS, session, "ada", body, signature),
    ):
        with pytest.raises(RemoteProtocolError, match="is not valid"):
            verify(*wrong)


@given(*[st.tuples(st.binary(max_size=32), st.text("abc", max_size=9), st.binary(max_size=20))] * 2)
def test_no_two_things_to_be_signed_are_the_same_bytes(one: tuple, other: tuple) -> None:
    if one != other:
        assert _signed_bytes(Domain.SIGN_KEYS, *one) != _signed_bytes(Domain.SIGN_KEYS, *other)


def test_every_domain_separation_label_has_its_own_number() -> None:
    numbers = [domain.value.split()[2] for domain in Domain]
    assert len(set(numbers)) == len(numbers) == len(Domain)
    assert all(domain.value.endswith(b"\n") for domain in Domain)


def test_a_fingerprint_is_forty_digits_that_depend_on_every_bit() -> None:
    assert fingerprint(bytes(32)) == "42136 37651 15127 67235 53419 57707 73284 49412"
    assert len(fingerprint(b"x").split()) == 8
    assert fingerprint(bytes(32)) != fingerprint(bytes(31) + b"\1")
