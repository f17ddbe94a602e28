"""Known answers: primitives from their standards, and whole transcripts with requests that must be refused."""

import hashlib
import hmac
import json
from contextlib import suppress
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from common.domain_separation import Domain
from common.errors import LocalProtocolError, RemoteProtocolError
from common.identity import Identity
from common.summation import key_agreement, mask_stream, secret_sharing
from common.summation.error_correction import correct, evaluate, radius
from common.summation.masked.book import Book
from common.thresholds import neighbourhood
from tests.support.sums import repeating_bytes
from tests.vectors import transcripts
from tests.vectors.transcripts import CASES, FOLDER, from_json, set_up, to_json

# --- transcripts ---


def load(name: str) -> dict[str, Any]:
    transcript: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return transcript


BAD = [(name, key) for name in CASES for key in load(name) if key.startswith("bad_")]


@pytest.mark.parametrize("name", CASES)
def test_owners_answer_a_recorded_coordinator_to_the_bit(name: str) -> None:
    transcript = load(name)
    owners = set_up(transcript)
    for owner, encoded in owners.encoded.items():
        assert [str(number) for number in encoded] == transcript["vectors"][owner]
    for step in transcript["steps"]:
        assert to_json(owners.send(step["owner"], from_json(step["request"]))) == step["reply"]


@pytest.mark.parametrize("name", CASES)
def test_the_coordinator_reaches_the_recorded_total(name: str) -> None:
    assert transcripts.record(CASES[name]) == load(name)


@pytest.mark.parametrize(("name", "key"), BAD)
def test_bad_requests_are_refused(name: str, key: str) -> None:
    transcript = load(name)
    bad = transcript[key]
    owners = set_up(transcript)
    for step in transcript["steps"][: bad["after_step"]]:
        owners.send(step["owner"], from_json(step["request"]))
    answers = len(owners.received[bad["owner"]])
    with pytest.raises(RemoteProtocolError, match=bad["refusal"]):
        owners.send(bad["owner"], from_json(bad["request"]))
    assert len(owners.received[bad["owner"]]) == answers


def test_there_are_at_least_a_dozen_bad_requests_of_every_step() -> None:
    assert len({key for _, key in BAD}) >= 12


# --- primitives ---


@pytest.mark.parametrize(
    ("key", "blocks"),
    [
        # AESAVS, KeySbox, 128 bits: the encryption of an all-zero block, which is counter 0
        ("10a58869d74be5a374cf867cfb473859", ["6d251e6944b051e04eaa6fb4dbf78465"]),
        ("caea65cdbb75e9169ecd22ebe6e54675", ["6e29201190152df4ee058139def610bb"]),
        # the key of zeros: counter 0 (FIPS 197 by AESAVS), 1 and 2 (test cases 1 and 2 of the GCM specification)
        (
            "00" * 16,
            [
                "66e94bd4ef8a2c3b884cfa59ca342b2e",
                "58e2fccefa7e3061367f1d57a4e7455a",
                "0388dace60b6a392f328c2b971b2fe78",
            ],
        ),
    ],
)
@pytest.mark.parametrize("dtype", ["<u8", "<u4"])
def test_a_mask_is_the_aes_ctr_keystream_from_counter_zero(key: str, blocks: list[str], dtype: str) -> None:
    values = np.zeros(16 * len(blocks) // np.dtype(dtype).itemsize, dtype)
    mask_stream.add_masks(values, [(bytes.fromhex(key), 1)], 0)
    assert values.tobytes().hex() == "".join(blocks)


@given(st.integers(0, 200), st.integers(1, 200), st.sampled_from(["<u8", "<u4"]), st.integers(0, 255))
def test_a_mask_is_the_slow_obvious_keystream_at_its_place(offset: int, size: int, dtype: str, key: int) -> None:
    """Block k of the stream is AES of k; number n of a vector takes the bytes from n times its width."""
    width = np.dtype(dtype).itemsize
    aes = Cipher(algorithms.AES(bytes([key]) * 16), modes.ECB()).encryptor()
    stream = b"".join(aes.update(block.to_bytes(16)) for block in range((offset + size) * width // 16 + 1))
    values = np.full(size, 7, dtype)
    mask_stream.add_masks(values, [(bytes([key]) * 16, -1)], offset)
    for number, value in enumerate(values, offset):
        mask = int.from_bytes(stream[number * width : (number + 1) * width], "little")
        assert int(value) == (7 - mask) % 2 ** (8 * width)


@given(
    st.integers(1, 5000),
    st.lists(st.integers(0, 5000), max_size=4),
    st.integers(1, 3),
    st.integers(0, 999),
    st.sampled_from(["<u8", "<u4"]),
)
def test_a_stream_is_the_same_however_it_is_cut_and_on_however_many_cores(
    size: int, cuts: list[int], threads: int, seed: int, dtype: str
) -> None:
    masks: list[mask_stream.Mask] = [(bytes([seed % 256, index] * 8), 1 if index % 2 else -1) for index in range(3)]
    start = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, size, dtype, endpoint=True)
    whole, pieces = start.copy(), start.copy()
    mask_stream.add_masks(whole, masks, seed, threads=1)
    edges = [0, *sorted(cut % (size + 1) for cut in cuts), size]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_stream, "CHUNK_BYTES", 512)
        for first, last in pairwise(edges):
            mask_stream.add_masks(pieces[first:last], masks, seed + first, threads)
    np.testing.assert_array_equal(whole, pieces)
    mask_stream.add_masks(whole, [(key, -sign) for key, sign in masks], seed)  # type: ignore[misc]
    np.testing.assert_array_equal(whole, start)


def test_x25519_as_in_rfc_7748() -> None:
    bob = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    shared = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    alice_public = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    assert key_agreement.agree(X25519PrivateKey.from_private_bytes(bob), alice_public).hex() == shared


def test_hkdf_as_in_rfc_5869() -> None:
    """`derive` against the RFC's construction written out, and that against the RFC's first test case."""

    def hkdf(secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
        extracted = hmac.digest(salt, secret, "sha256")
        blocks, block = b"", b""
        for counter in range(1, -(-length // 32) + 1):
            block = hmac.digest(extracted, block + info + bytes([counter]), "sha256")
            blocks += block
        return blocks[:length]

    answer = "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    assert hkdf(b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA)), 42).hex() == answer
    for length in (16, 32):
        derived = key_agreement.derive(b"secret", Domain.PAIR_MASK, b"salt", b"info", length)
        assert derived == hkdf(b"secret", b"salt", Domain.PAIR_MASK.value + b"info", length)


def test_ed25519_as_in_rfc_8032() -> None:
    seed = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    public = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert Identity(name="a", seed=seed).public_key.hex() == public


def test_shamir_s_scheme_on_a_textbook_polynomial() -> None:
    """1234 + 166 x + 94 x^2 modulo 1613, its values at 1 to 6, and the secret again from any three."""
    values = {1: 1494, 2: 329, 3: 965, 4: 176, 5: 1188, 6: 775}
    assert {point: evaluate([1234, 166, 94], point, 1613) for point in values} == values
    for points in ((1, 2, 3), (2, 4, 5), (1, 3, 6)):
        coefficients = secret_sharing.coefficients_at_zero(points, 1613)
        assert sum(coefficients[point] * values[point] for point in points) % 1613 == 1234


@given(st.binary(min_size=32, max_size=32), st.data())
def test_any_threshold_of_shares_gives_the_secret_and_one_fewer_another(secret: bytes, data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 12))
    threshold = data.draw(st.integers(2, count))
    points = data.draw(st.lists(st.integers(1, 1000), min_size=count, max_size=count, unique=True))
    shares = secret_sharing.split(secret, threshold, points, repeating_bytes())
    some = data.draw(st.permutations(points))[:threshold]
    assert secret_sharing.reconstruct(shares, secret_sharing.coefficients_at_zero(some)) == secret
    fewer = secret_sharing.coefficients_at_zero(some[:-1])
    with suppress(RemoteProtocolError):  # no 32-byte seed at all
        assert secret_sharing.reconstruct(shares, fewer) != secret


def test_a_wrong_value_of_a_textbook_polynomial_is_found() -> None:
    """3 + 2 x + x^2 modulo 929 at 0 to 6 (PDF417's field), with two of seven values wrong: the most that can be."""
    values = {0: 3, 1: 6, 2: 123, 3: 18, 4: 456, 5: 38, 6: 51}
    found = correct(values, 3, 929)
    assert found.coefficients == [3, 2, 1]
    assert found.wrong == {2, 4}
    with pytest.raises(RemoteProtocolError, match="more than 2 of them are wrong"):
        correct({**values, 0: 7}, 3, 929)


def agreeing_polynomials(values: dict[int, int], size: int, prime: int) -> list[tuple[list[int], set[int]]]:
    """The oracle: every polynomial of this size that agrees with all but `radius` values, found by trying them all."""
    tried = ([*coefficients] for coefficients in product(range(prime), repeat=size))
    wrong = ((each, {p for p, value in values.items() if evaluate(each, p, prime) != value}) for each in tried)
    return [(each, points) for each, points in wrong if len(points) <= radius(len(values), size)]


@given(st.data())
def test_correction_finds_what_trying_all_polynomials_finds_and_nothing_else(data: st.DataObject) -> None:
    """Over a small field, where any values may lie near a polynomial or near none."""
    prime = 11
    count = data.draw(st.integers(1, 10))
    size = data.draw(st.integers(1, min(count, 3)))
    points = data.draw(st.lists(st.integers(0, prime - 1), min_size=count, max_size=count, unique=True))
    coefficients = data.draw(st.lists(st.integers(0, prime - 1), min_size=size, max_size=size))
    wrong = data.draw(st.dictionaries(st.sampled_from(points), st.integers(0, prime - 1)))
    values = {point: wrong.get(point, evaluate(coefficients, point, prime)) for point in points}
    expected = agreeing_polynomials(values, size, prime)
    try:
        found = correct(values, size, prime)
    except RemoteProtocolError:
        assert expected == []
    else:
        padded = found.coefficients + [0] * (size - len(found.coefficients))
        assert expected == [(padded, found.wrong)]


@pytest.mark.parametrize("num_owners", [15, 150, 1000])
@pytest.mark.parametrize("share_of_radius", [0, 1])
def test_a_secret_is_rebuilt_from_shares_of_which_as_many_as_can_be_are_wrong(
    num_owners: int, share_of_radius: int
) -> None:
    """With the thresholds of an agreement in which a tenth of the owners collude, and a tenth may drop out."""
    graph = neighbourhood(num_owners, num_owners // 10, num_owners // 10)
    points, random_bytes = range(1, graph.degree + 2), repeating_bytes()
    shares = secret_sharing.split(b"secret".ljust(32), graph.threshold, points, random_bytes)
    wrong = radius(len(shares), graph.threshold) * share_of_radius
    shares |= secret_sharing.split(b"another".ljust(32), graph.threshold, points, random_bytes) if wrong else {}
    honest = secret_sharing.split(b"secret".ljust(32), graph.threshold, points, repeating_bytes())
    shares |= {point: honest[point] for point in points[wrong:]}
    assert secret_sharing.reconstruct_corrected(shares, graph.threshold) == b"secret".ljust(32)
    if wrong:
        shares[points[-1]] = bytes(33)
        with pytest.raises(RemoteProtocolError, match=f"more than {wrong} of them are wrong"):
            secret_sharing.reconstruct_corrected(shares, graph.threshold)


def test_fewer_shares_than_the_threshold_fit_every_secret() -> None:
    """For any other secret there is a polynomial through the same shares: they say nothing about it."""
    points, prime = [1, 2], secret_sharing.PRIME
    shares = secret_sharing.split(b"s" * 32, 3, [1, 2, 3], repeating_bytes())
    for other in (b"a" * 32, bytes(32)):
        known = {0: int.from_bytes(other)} | {point: int.from_bytes(shares[point]) for point in points}
        # through (0, other), (1, .), (2, .) there is exactly one parabola: Lagrange gives it at 3, a valid share
        third = sum(
            value * np.prod([(3 - o) * pow(p - o, -1, prime) for o in known if o != p], dtype=object)
            for p, value in known.items()
        )
        rebuilt = {**shares, 3: (int(third) % prime).to_bytes(33)}
        assert secret_sharing.reconstruct(rebuilt, secret_sharing.coefficients_at_zero([1, 2, 3])) == other


@pytest.mark.parametrize(
    ("secret", "threshold", "points"), [(31, 2, [1, 2]), (32, 3, [1, 2]), (32, 0, [1]), (32, 2, [1, 1]), (32, 1, [0])]
)
def test_what_cannot_be_shared_is_refused(secret: int, threshold: int, points: list[int]) -> None:
    with pytest.raises(LocalProtocolError):
        secret_sharing.split(bytes(secret), threshold, points, repeating_bytes())


def test_the_field_is_that_of_a_prime() -> None:
    """Fermat's test to many bases; 2^256 + 297 is the smallest prime above 2^256."""
    for base in range(2, 40):
        assert pow(base, secret_sharing.PRIME - 1, secret_sharing.PRIME) == 1
    for smaller in range(1, 297, 2):
        assert pow(3, 2**256 + smaller - 1, 2**256 + smaller) != 1


def test_sealing_binds_key_and_associated_data() -> None:
    sealed = key_agreement.seal(b"k" * 32, b"plain", b"data")
    assert key_agreement.open_sealed(b"k" * 32, sealed, b"data") == b"plain"
    for key, associated in ((b"l" * 32, b"data"), (b"k" * 32, b"date")):
        with pytest.raises(RemoteProtocolError):
            key_agreement.open_sealed(key, sealed, associated)


def test_a_commitment_is_to_one_seed_and_owner() -> None:
    terms = set_up(CASES["three_owners"]).terms
    book = Book(terms, b"")
    digests = {book.commitment(owner, seed) for owner in (0, 1) for seed in (b"a" * 32, b"b" * 32)}
    assert len(digests) == 4
    assert all(len(digest) == hashlib.sha256().digest_size for digest in digests)
