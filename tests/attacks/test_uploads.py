"""Attacks 23 to 25 and 76: owners that upload twice, or something else, or NaN; values at the bound and beyond it."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client import verification
from client.context import OwnerContext
from client.owner import Owner
from common.domain_separation import Domain
from common.errors import FalseTotal, LocalProtocolError, NumericalError, RemoteProtocolError, SettingsError
from common.messages import (
    Acknowledgements,
    CheckKeys,
    Finish,
    KeyShares,
    MaskedPart,
    Message,
    OpenSum,
    PartRequest,
    RollCall,
    SumOpened,
    SurvivorList,
    UploadsOpened,
    VectorPart,
    decode,
    encode,
)
from common.schedule import Round
from common.summation import fixed_point, wide
from common.summation.masked.book import part_body
from common.summation.pairwise import PairwiseSum
from common.summation.plain import PlainCoordinator
from common.summation.protocol import Total
from common.tensor_layout import RingBits, TensorLayout
from server.merge import run_merge
from tests.support.malicious import MaliciousCoordinator
from tests.support.parties import OwnersChannel, parties_with_method
from tests.support.sums import identities_of, layout_of, terms_of


def first_part(evil: MaliciousCoordinator) -> MaskedPart:
    reply = evil.send("o0", evil.honest_until(KeyShares)["o0"])
    assert isinstance(reply, MaskedPart)
    return reply


def signed(evil: MaliciousCoordinator, part: MaskedPart) -> MaskedPart:
    """The malicious owner signs whatever it sends."""
    digest = hashlib.sha256(np.ascontiguousarray(part.payload).data).digest()
    body = part_body(part.part, digest)
    return replace(part, signature=evil.identities["o0"].sign(Domain.SIGN_PART, evil.terms.session, body))


def test_23_a_second_upload() -> None:
    evil = MaliciousCoordinator()
    part = first_part(evil)
    evil.side.receive("o0", part)
    for again in (part, signed(evil, replace(part, payload=part.payload + np.uint64(1)))):
        with pytest.raises(RemoteProtocolError, match="answered twice"):
            evil.side.receive("o0", again)


def test_23_another_upload_when_the_first_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = TensorLayout.part_slices
    monkeypatch.setattr(TensorLayout, "part_slices", lambda self, bytes_per_number: cut(self, bytes_per_number, 24))
    evil = MaliciousCoordinator()
    requests = evil.honest_until(PartRequest)  # part 1; then o4 drops out, and part 0 is requested again
    for owner in ("o0", "o1", "o2", "o3"):
        evil.side.receive(owner, evil.send(owner, requests[owner]))
    evil.side.drop("o4")
    evil.side.end_step()
    again = evil.send("o0", evil.side.requests()["o0"])
    assert isinstance(again, MaskedPart)
    assert again.part == 0
    with pytest.raises(RemoteProtocolError, match="differs from the one that was sent before"):
        evil.side.receive("o0", signed(evil, replace(again, payload=again.payload + np.uint64(1))))
    evil.side.receive("o0", again)


def test_24_an_upload_of_another_shape_type_or_part() -> None:
    evil = MaliciousCoordinator()
    part = first_part(evil)
    wrong = [
        replace(part, payload=part.payload[:-1]),
        replace(part, payload=np.zeros(7, "<u8")),
        replace(part, payload=np.zeros(6, "<f4")),
        replace(part, payload=np.zeros(12, "<f4")),  # as many bytes, another type
        replace(part, part=1),
    ]
    for each in wrong:
        with pytest.raises(RemoteProtocolError, match="as part"):
            evil.side.receive("o0", signed(evil, each))
    for payload in (part.payload.astype(">u8"), part.payload.reshape(2, 3)):
        with pytest.raises(RemoteProtocolError, match="payload is malformed"):  # as it arrives
            decode(replace(encode(part), payload=payload))
        with pytest.raises(LocalProtocolError, match="payload is malformed"):  # as we would build it
            replace(part, payload=payload)
    evil.side.receive("o0", part)


def test_24_an_upload_in_another_ring() -> None:
    """As many numbers, or as many bytes."""
    for ring_bits, other in ((64, "<u4"), (32, "<u8")):
        evil = MaliciousCoordinator(ring_bits=ring_bits)  # type: ignore[arg-type]
        part = first_part(evil)
        for payload in (part.payload.astype(other), np.frombuffer(part.payload.tobytes(), other)):
            with pytest.raises(RemoteProtocolError, match=f"has 6 uint{ring_bits} numbers"):
                evil.side.receive("o0", signed(evil, replace(part, payload=payload)))
        evil.side.receive("o0", part)


def test_24_an_upload_altered_on_the_way() -> None:
    evil = MaliciousCoordinator()
    part = first_part(evil)
    with pytest.raises(RemoteProtocolError, match="the signature of o0 is not valid"):
        evil.side.receive("o0", replace(part, payload=part.payload + np.uint64(1)))


@pytest.mark.parametrize("part", [1, 2, 999_999])
def test_24_a_part_that_does_not_exist_is_not_given(part: int) -> None:
    evil = MaliciousCoordinator()
    first_part(evil)
    with pytest.raises(RemoteProtocolError):
        evil.send("o0", PartRequest(session=evil.terms.request.session, part=part))


def test_24_after_the_survivor_list_no_part_is_given_again() -> None:
    evil = MaliciousCoordinator()
    requests = evil.honest_until(SurvivorList)
    evil.send("o0", requests["o0"])
    with pytest.raises(RemoteProtocolError, match="in phase ConsistencyCheck"):
        evil.send("o0", PartRequest(session=evil.terms.request.session, part=0))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 8.000001, -8.000001, 1e300, 2.0**63])
@pytest.mark.parametrize("position", [0, 3, 5])
def test_25_a_value_that_is_not_finite_or_beyond_the_bound_never_leaves(value: float, position: int) -> None:
    layout = layout_of(2, 4)
    vector = np.zeros(6)
    vector[position] = value
    with pytest.raises(NumericalError, match=f"t{0 if position < 2 else 1}: .*nothing has left"):
        fixed_point.encode(layout, vector, 5)


@given(bound=st.floats(1e-12, 2.0**58), count=st.integers(1, 2000), ring_bits=st.sampled_from((64, 32)))
def test_25_at_the_bound_no_sum_wraps_around_and_one_more_bit_would(
    bound: float, count: int, ring_bits: RingBits
) -> None:
    half = 2 ** (ring_bits - 1)
    try:
        bits = fixed_point.fraction_bits(bound, count, ring_bits)
    except SettingsError:
        assert count * (Fraction(bound) + 1) > half
        return
    assert count * (Fraction(bound) * 2**bits + 1) <= half
    if bits < fixed_point.MAX_FRACTION_BITS:
        assert count * (Fraction(bound) * 2 ** (bits + 1) + 1) > half
    layout = layout_of(2, bound=bound, ring_bits=ring_bits)
    encoded = fixed_point.encode(layout, np.array([bound, -bound]), count)
    words = np.zeros(2, "<u8")
    with np.errstate(over="ignore"):
        fixed_point.numbers(layout, words)[:] = encoded * encoded.dtype.type(count)
    decoded = fixed_point.decode(layout, words, count, count)
    np.testing.assert_allclose(decoded, [bound * count, -bound * count], rtol=1e-12, atol=count * 2.0**-bits)


@given(st.lists(st.floats(-8, 8), min_size=1, max_size=20), st.sampled_from((64, 32)))
def test_an_encoded_number_is_the_nearest(values: list[float], ring_bits: RingBits) -> None:
    layout = layout_of(len(values), ring_bits=ring_bits)
    encoded = fixed_point.encode(layout, np.array(values), 3)
    bits = fixed_point.fraction_bits(8.0, 3, ring_bits)
    signed = encoded.view(f"<i{ring_bits // 8}")
    assert [int(each) for each in signed] == [round(Fraction(value) * 2**bits) for value in values]


@pytest.mark.parametrize("size", [1, 7, 10, 33])
def test_integers_of_32_bits_are_written_and_read_in_the_place_of_longer_numbers(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunk by chunk, over one another: none is read after it was overwritten."""
    monkeypatch.setattr(fixed_point, "CHUNK_NUMBERS", 3)
    layout = layout_of(size, size + 1, ring_bits=32)
    vector = np.random.default_rng(size).uniform(-8, 8, layout.size)
    words = vector.copy()
    encoded = fixed_point.encode(layout, words, 3)
    assert np.shares_memory(encoded, words)
    decoded = fixed_point.decode(layout, words.view("<u8"), 3, 1)
    assert np.shares_memory(decoded, words)
    np.testing.assert_allclose(decoded, vector, atol=2.0**-27)


KNOWN_IN_32_BITS = {0.0: 0, 1.0: 2**26, -1.0: 2**32 - 2**26, 8.0: 2**29, -8.0: 2**32 - 2**29, 2.0**-26: 1, 2.0**-28: 0}


def test_known_numbers_of_32_bits() -> None:
    """With bound 8 and three owners 26 bits are behind the point: 3 (8 * 2^26 + 1) <= 2^31 < 3 (8 * 2^27 + 1)."""
    layout = layout_of(len(KNOWN_IN_32_BITS), ring_bits=32)
    encoded = fixed_point.encode(layout, np.array(list(KNOWN_IN_32_BITS)), 3)
    assert encoded.dtype == np.dtype("<u4")
    assert encoded.tolist() == list(KNOWN_IN_32_BITS.values())


@pytest.mark.parametrize("value", [8.0000001, -9.0, np.nan, np.inf, 2.0**33])
def test_25_a_value_beyond_the_bound_never_leaves_in_32_bits_either(value: float) -> None:
    with pytest.raises(NumericalError, match=r"t0: .*nothing has left"):
        fixed_point.encode(layout_of(2, ring_bits=32), np.array([1.0, value]), 3)


@pytest.mark.parametrize("sum_of_two", [2**30 + 3, -(2**30) - 3])
def test_25_a_total_of_32_bits_beyond_its_owners_bounds_is_refused(sum_of_two: int) -> None:
    layout, words = layout_of(1, ring_bits=32), np.zeros(1, "<u8")
    fixed_point.numbers(layout, words)[0] = sum_of_two % 2**32
    with pytest.raises(NumericalError, match="t0 exceeds 2 owners times the bound 8"):
        fixed_point.decode(layout, words, 3, 2)


class RandomVector(OwnersChannel):
    """The first owner follows the protocol with a random vector, which is a lie that no message shows."""

    def answer(self, node: int, request: Message) -> Message | None:
        if node == 0 and isinstance(request, KeyShares):
            state = Owner(self.files[node]).state
            layout = state.read_layout("vector")
            vector = state.open_array("vector", layout.size, "<u8", writable=True)
            vector[:] = np.random.default_rng(1).integers(0, 2**63, layout.size, "<u8")
        return super().answer(node, request)


def test_76_a_random_vector_in_a_masked_sum_names_nobody_and_costs_no_checkpoint(
    trained_folder: Path, tmp_path: Path
) -> None:
    """The error used to remove what was summed, although another start can help if this machine computed wrongly."""
    with parties_with_method(trained_folder, tmp_path, "average") as parties:
        (parties.output / ".amalgram").touch()
        channel, again = RandomVector(parties.files), OwnersChannel(parties.files)
        with pytest.raises(FalseTotal, match="an owner sent a false vector, and the sum hides who it was"):
            run_merge(parties.coordinator, channel)
        with pytest.raises(FalseTotal):
            run_merge(parties.coordinator, again)
    assert (Finish,) not in channel.kinds
    assert again.kinds == [(RollCall,), (Acknowledgements,)]


class ZeroShares(OwnersChannel):
    """The first owner follows the protocol, but its shares of a check are all zero."""

    def answer(self, node: int, request: Message) -> Message | None:
        with pytest.MonkeyPatch.context() as patch:
            if node == 0 and isinstance(request, CheckKeys):
                patch.setattr(verification, "shares", zero_shares)
            return super().answer(node, request)


def zero_shares(owner: OwnerContext, round_: Round, keys_digest: bytes) -> Iterator[tuple[str, np.ndarray]]:
    yield from ((each.name, np.zeros(each.shape)) for each in round_.layout.entries)


def test_76_a_false_share_of_a_check_names_nobody_and_costs_no_checkpoint(trained_folder: Path, tmp_path: Path) -> None:
    """No owner is sent it: each would take an honest coordinator's model for a false one."""
    with parties_with_method(trained_folder, tmp_path, "average", verified=True) as parties:
        (parties.output / ".amalgram").touch()
        channel, again = ZeroShares(parties.files), ZeroShares(parties.files)
        with pytest.raises(FalseTotal, match="do not add up to zero: an owner sent a false share") as error:
            run_merge(parties.coordinator, channel)
        assert error.value.exit_code == 5
        with pytest.raises(FalseTotal):
            run_merge(parties.coordinator, again)
        assert not any(Owner(path).state.evidence(parties.agreement.digest()) for path in parties.files.values())
    assert "if this machine may be at fault, run the same command again" in error.value.hint
    assert not {Finish, UploadsOpened} & {kind for packet in channel.kinds for kind in packet}
    assert again.kinds == [(RollCall,), (CheckKeys, OpenSum)]


def test_76_a_check_that_this_machine_computed_wrongly_is_computed_again(
    trained_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_bit_wrong(self: PairwiseSum, payload: np.ndarray, signatures: bytes) -> Total:
        total = add_up(self, payload, signatures)
        total.vector.view("<u8")[wide.WORDS - 2] ^= 1 << 63  # of the first share
        return total

    add_up = PairwiseSum.total
    with parties_with_method(trained_folder, tmp_path, "average", verified=True) as parties:
        (parties.output / ".amalgram").touch()
        with monkeypatch.context() as patch:
            patch.setattr(PairwiseSum, "total", one_bit_wrong)
            with pytest.raises(FalseTotal, match="do not add up to zero"):
                run_merge(parties.coordinator, OwnersChannel(parties.files))
        run_merge(parties.coordinator, OwnersChannel(parties.files))
        assert (parties.output / "model").is_dir()


def test_76_a_false_vector_in_a_plain_sum_names_its_owner() -> None:
    identities, layout = identities_of(3), layout_of(2, 4)
    terms = terms_of(identities, layout, needed=2)
    side, session = PlainCoordinator(terms, terms.names), terms.request.session
    for name in side.requests():
        side.receive(name, SumOpened(session=session, owner=name))
    side.end_step()
    bits = fixed_point.fraction_bits(8.0, 3)
    for value, is_false in ((8 * 2**bits + 2, True), (-8 * 2**bits - 2, True), (8 * 2**bits, False)):
        side.requests()
        for place in range(6):
            payload = np.zeros(6, "<u8")
            payload[place] = value % 2**64
            part = VectorPart(session=session, owner="o1", part=0, payload=payload)
            if is_false:
                with pytest.raises(RemoteProtocolError, match=f"o1 sent a value of t{int(place > 1)} beyond"):
                    side.receive("o1", part)
    side.receive("o1", part)


def test_a_bound_without_room_or_without_an_end_is_refused() -> None:
    for bound in (2.0**63, float("inf")):
        with pytest.raises(SettingsError):
            fixed_point.fraction_bits(bound, 3)
