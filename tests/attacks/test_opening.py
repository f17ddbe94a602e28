"""Attacks 120 and 121: a sum that every owner opens by itself, and a coordinator that would report another total."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from common.errors import FalseTotal, RemoteProtocolError
from common.messages import MaskedPart, SurvivorList, UploadsOpened
from common.summation.masked.book import upload_digest
from common.summation.masked.coordinator import MaskedCoordinator
from common.summation.masked.opening import opened_total
from common.summation.records import OpenedSeed, Survivor
from tests.support.malicious import MaliciousCoordinator, delivered, flip


def opened() -> tuple[MaliciousCoordinator, UploadsOpened]:
    """A sum of five owners up to its end, and what the coordinator then relays."""
    coordinator = opening()
    finish(coordinator)
    return coordinator, relayed_by(coordinator)


def opening() -> MaliciousCoordinator:
    """Before a sum of five owners that is open to all of them."""
    coordinator = MaliciousCoordinator()
    coordinator.terms = replace(coordinator.terms, is_open=True)
    coordinator.side = MaskedCoordinator(coordinator.terms, coordinator.terms.names)
    return coordinator


def finish(coordinator: MaliciousCoordinator) -> None:
    """Follow the protocol to its end."""
    while requests := coordinator.side.requests():
        for owner, request in requests.items():
            coordinator.side.receive(owner, coordinator.send(owner, request))
        coordinator.side.end_step()


def relayed_by(coordinator: MaliciousCoordinator) -> UploadsOpened:
    relayed = coordinator.side.uploads_opened()
    assert relayed is not None
    message = delivered(relayed)
    assert isinstance(message, UploadsOpened)
    return message


def sums(coordinator: MaliciousCoordinator, message: UploadsOpened) -> Mapping[str, np.ndarray]:
    return {name: opened_total(side, message).vector for name, side in coordinator.owners.items()}


def test_every_owner_adds_up_the_very_total_of_the_coordinator() -> None:
    coordinator, message = opened()
    total = coordinator.side.total().vector
    for vector in sums(coordinator, message).values():
        np.testing.assert_array_equal(vector, total)
    np.testing.assert_allclose(total, sum(coordinator.vectors.values()), atol=1e-9)


def test_every_owner_adds_up_the_total_of_those_that_did_not_drop_out() -> None:
    coordinator, step = opening(), 0
    while requests := coordinator.side.requests():
        for owner, request in requests.items():
            if step == 2 and owner == "o3":  # it has shared its keys, and never uploads
                coordinator.side.drop(owner)
            else:
                coordinator.side.receive(owner, coordinator.send(owner, request))
        coordinator.side.end_step()
        step += 1
    message = relayed_by(coordinator)
    del coordinator.owners["o3"]
    total = coordinator.side.total().vector
    for vector in sums(coordinator, message).values():
        np.testing.assert_array_equal(vector, total)


def test_120_a_vector_that_is_not_the_one_its_owner_signed() -> None:
    """The coordinator takes what is too much from one upload, so that any sum is zero."""
    coordinator, message = opened()
    payload = message.payload.copy()
    payload[0] += 1
    with pytest.raises(RemoteProtocolError, match="vector of o0 is not the one that was signed for"):
        opened_total(coordinator.owners["o1"], replace(message, payload=payload))


def test_120_vectors_for_which_no_quorum_has_signed() -> None:
    """One owner is sent another survivor list than the others, with the digest of a vector that the coordinator made.
    The owner signs it, because its own vector is in it. If it opened the sum now, it would add up what it was told.
    """
    coordinator = opening()
    requests = coordinator.honest_until(SurvivorList)
    (upload,) = (each.payload for each in coordinator.received["o0"] if isinstance(each, MaskedPart))
    made_up = upload + np.uint64(2**30)
    parts = [hashlib.sha256(made_up[part].data).digest() for part in coordinator.terms.part_slices]
    survivors = Survivor.unpack_all(coordinator.survivor_list(coordinator.terms.names))
    false = [replace(survivors[0], upload=upload_digest(coordinator.terms, parts)), *survivors[1:]]
    coordinator.send("o1", SurvivorList(session=requests["o1"].session, survivors=Survivor.pack_all(false)))
    for owner, request in requests.items():
        if owner == "o1":
            coordinator.side.drop(owner)
        else:
            coordinator.side.receive(owner, coordinator.send(owner, request))
    coordinator.side.end_step()
    finish(coordinator)
    message = relayed_by(coordinator)
    np.testing.assert_array_equal(
        opened_total(coordinator.owners["o2"], message).vector, coordinator.side.total().vector
    )
    payload = message.payload.copy()
    payload[: coordinator.layout.size] = made_up
    with pytest.raises(RemoteProtocolError, match="has not helped to open the sum"):
        opened_total(coordinator.owners["o1"], replace(message, payload=payload))


def test_120_vectors_in_another_order_or_number() -> None:
    coordinator, message = opened()
    size = coordinator.layout.size
    swapped = np.concatenate([message.payload[size : 2 * size], message.payload[:size], message.payload[2 * size :]])
    with pytest.raises(RemoteProtocolError, match="not the one that was signed for"):
        opened_total(coordinator.owners["o1"], replace(message, payload=swapped))
    for payload in (message.payload[:-size], message.payload[:-1], message.payload.view("<u4")):
        with pytest.raises(RemoteProtocolError, match="not one vector for each survivor"):
            opened_total(coordinator.owners["o1"], replace(message, payload=payload))


def test_121_a_seed_that_its_owner_did_not_commit_to() -> None:
    coordinator, message = opened()
    seeds = OpenedSeed.unpack_all(message.proofs)
    changed = [replace(seeds[0], seed=flip(seeds[0].seed)), *seeds[1:]]
    with pytest.raises((RemoteProtocolError, FalseTotal), match="seed of o0 is not the one that it committed to"):
        opened_total(coordinator.owners["o1"], replace(message, proofs=OpenedSeed.pack_all(changed)))


def test_121_seeds_of_another_kind_or_other_owners() -> None:
    coordinator, message = opened()
    seeds = OpenedSeed.unpack_all(message.proofs)
    for changed, says in (
        ([replace(seeds[0], kind=b"m"), *seeds[1:]], "not the one that it committed to"),
        (seeds[1:], "seeds of other owners"),
        ([*seeds, OpenedSeed(9, b"m", bytes(32))], "seeds of other owners"),
    ):
        with pytest.raises(RemoteProtocolError, match=says):
            opened_total(coordinator.owners["o1"], replace(message, proofs=OpenedSeed.pack_all(changed)))


def test_a_sum_is_not_opened_before_its_survivors_are_signed_for() -> None:
    _, message = opened()
    fresh = MaliciousCoordinator()
    fresh.honest_until(SurvivorList)
    with pytest.raises(RemoteProtocolError, match="has not helped to open the sum"):
        opened_total(fresh.owners["o1"], message)
