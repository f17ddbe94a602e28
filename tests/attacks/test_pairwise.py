"""Attack 214: the masks of a check, of which nobody may be missing (common/summation/pairwise.py)."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.certificates import nonce_body
from common.domain_separation import Domain
from common.errors import RemoteProtocolError
from common.identity import Identity
from common.summation import wide
from common.summation.pairwise import PairwiseSum, public_key
from common.summation.records import Nonce, Signed
from common.tensor_layout import TensorEntry, TensorLayout
from tests.support.sums import identities_of

RUN, DELIVERED, POSITION = "ab" * 32, "cd" * 32, 4
LAYOUT = TensorLayout((TensorEntry(name="check/l", shape=(10, wide.WORDS), bound=np.inf),))


def seed_of(index: int) -> bytes:
    return bytes([index + 1]) * 32


def joint_of(identities: Mapping[str, Identity], delivered: str = DELIVERED) -> PairwiseSum:
    """A sum over all these owners."""
    keys = []
    for index, identity in enumerate(identities.values()):
        key = public_key(seed_of(index), RUN)
        body = nonce_body(POSITION, delivered, key)
        keys.append(Nonce(index, key, identity.sign(Domain.SIGN_NONCE, bytes.fromhex(RUN), body)))
    return PairwiseSum(
        run=RUN,
        position=POSITION,
        delivered=delivered,
        layout=LAYOUT,
        roster={name: each.public_key for name, each in identities.items()},
        keys=Nonce.pack_all(keys),
    )


def masked(joint: PairwiseSum, index: int, vector: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return joint.masked(seed_of(index), f"o{index}", vector.copy())


def signatures_of(joint: PairwiseSum, identities: Mapping[str, Identity], uploads: list[NDArray]) -> bytes:
    each = zip(identities.values(), uploads, strict=True)
    return Signed.pack_all(Signed(index, joint.sign(*pair)) for index, pair in enumerate(each))


def test_the_masks_are_the_same_on_every_machine() -> None:
    joint = joint_of(identities_of(3))
    assert joint.session == "a66dcf874a1d0e81390952a168702775dac351cf58b0d0e18189f3c173c2fe5c"
    numbers = np.arange(LAYOUT.size, dtype="<u8")
    assert masked(joint, 0, numbers)[:3].tolist() == [7454307648532341595, 1523726616512842406, 2767557753187217776]


@given(count=st.integers(2, 9), seed=st.integers(0, 2**20))
def test_the_masks_cancel_over_all_owners(count: int, seed: int) -> None:
    identities = identities_of(count)
    joint, random = joint_of(identities), np.random.default_rng(seed)
    joint.check(tuple(identities))
    vectors = [random.integers(0, 2**64, LAYOUT.size, dtype="<u8") for _ in identities]
    uploads = [masked(joint, index, vector) for index, vector in enumerate(vectors)]
    total = joint.total(np.concatenate(uploads), signatures_of(joint, identities, uploads))
    assert total.owners == tuple(identities)
    for row, summed in enumerate(total["check/l"].view("<u8")):
        whole = sum(wide.from_words(vector.reshape(-1, wide.WORDS)[row]) for vector in vectors)
        assert (wide.from_words(summed) - whole) % 2**wide.BITS == 0


def test_214_without_one_owner_what_the_others_sent_is_noise() -> None:
    """The masks that they share with it are left over."""
    identities = identities_of(5)
    joint, zeros = joint_of(identities), np.zeros(LAYOUT.size, dtype="<u8")
    uploads = [masked(joint, index, zeros) for index in range(5)]
    for missing in range(5):
        rest = np.sum([upload for index, upload in enumerate(uploads) if index != missing], axis=0, dtype="<u8")
        assert len(np.unique(rest)) == LAYOUT.size
        assert abs(float((rest >> np.uint64(63)).mean()) - 0.5) < 0.25
        assert rest.max() > 2**62
        assert rest.min() < 2**62


@pytest.mark.parametrize("other", [{"delivered": "ef" * 32}, {"position": POSITION + 2}, {"run": "ef" * 32}])
def test_214_one_vector_under_two_checks_never_has_the_same_masks(other: dict[str, str | int]) -> None:
    """So their difference shows nothing, even with the same keys, if an owner had not checked what they are for."""
    joint, numbers = joint_of(identities_of(3)), np.arange(LAYOUT.size, dtype="<u8")
    changed = replace(joint, **other)  # type: ignore[arg-type]
    assert joint.digest != changed.digest
    difference = masked(joint, 0, numbers) - masked(changed, 0, numbers)
    assert len(np.unique(difference)) == LAYOUT.size
    assert difference.max() > 2**60


def test_214_owners_that_were_told_different_things_add_up_to_noise() -> None:
    """A coordinator that sends one of them another correction has each of them sign and mask for itself."""
    identities = identities_of(3)
    joint, lied_to = joint_of(identities), joint_of(identities, delivered="ef" * 32)
    zeros = np.zeros(LAYOUT.size, dtype="<u8")
    uploads = [masked(joint, 0, zeros), masked(joint, 1, zeros), masked(lied_to, 2, zeros)]
    assert np.sum(uploads, axis=0, dtype="<u8").max() > 2**60
    with pytest.raises(RemoteProtocolError, match="the signature of o0 is not valid"):
        lied_to.check_upload("o0", uploads[0], joint.sign(identities["o0"], uploads[0]))


def test_214_the_keys_are_those_of_all_contributors_and_no_others() -> None:
    identities = identities_of(4)
    names = tuple(identities)
    joint_of(identities).check(names)
    fewer = dict(list(identities.items())[:3])
    for owners, made_for in ((names, fewer), (names[:3], identities)):
        with pytest.raises(RemoteProtocolError, match="without all owners whose contributions are merged"):
            joint_of(made_for).check(owners)


def test_212_a_vector_of_another_shape_that_its_owner_signed() -> None:
    """If the coordinator relayed it, the others could not add it up, and the coordinator would have spoilt it all."""
    identities = identities_of(3)
    joint = joint_of(identities)
    whole = masked(joint, 0, np.zeros(LAYOUT.size, dtype="<u8"))
    joint.check_upload("o0", whole, joint.sign(identities["o0"], whole))
    for payload in (whole[:-1], np.append(whole, whole[:1]), whole.view("<f8"), whole.reshape(1, -1), whole[:0]):
        with pytest.raises(RemoteProtocolError, match="the vector of o0 has another shape than was agreed"):
            joint.check_upload("o0", payload, joint.sign(identities["o0"], payload))


def test_212_more_or_fewer_vectors_than_owners() -> None:
    identities = identities_of(3)
    joint = joint_of(identities)
    uploads = [masked(joint, index, np.zeros(LAYOUT.size, dtype="<u8")) for index in range(3)]
    payload, signatures = np.concatenate(uploads), signatures_of(joint, identities, uploads)
    first, *others = Signed.unpack_all(signatures)
    for vectors, signed in (
        (np.append(payload, uploads[0]), signatures),  # one is left over
        (payload[: -LAYOUT.size], signatures),
        (payload, Signed.pack_all(others)),
        (payload, Signed.pack_all([first, *(replace(each, owner=each.owner + 1) for each in others)])),
    ):
        with pytest.raises(RemoteProtocolError, match="not one signed vector of every owner"):
            joint.total(vectors, signed)


def test_a_vector_leaves_masked_and_decodes_only_with_the_others() -> None:
    identities = identities_of(3)
    vector = np.full(LAYOUT.size, 7, dtype="<u8")
    assert not np.any(masked(joint_of(identities), 0, vector) == vector)
