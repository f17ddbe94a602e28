"""A malicious coordinator: it faces honest owners and sends them whatever it likes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import pytest

from common.domain_separation import Domain
from common.messages import Message, OpenSum
from common.summation import fixed_point, mask_stream, secret_sharing
from common.summation.masked.book import MASK, SELF, survivors_body
from common.summation.masked.coordinator import MaskedCoordinator
from common.summation.masked.owner import MaskedOwner
from common.summation.protocol import SessionOver, SumTerms
from common.summation.records import RevealedShare, Signed, Survivor
from common.tensor_layout import RingBits
from common.wire import from_record, to_record
from deploy.simulation.in_process_grid import through_serialisation
from tests.support.sums import identities_of, layout_of, repeating_bytes, terms_of, vectors_of


def delivered(message: Message) -> Message:
    """The message as it arrives after Flower's own serialisation."""
    (arrived,) = from_record(through_serialisation(to_record((message,))))
    return arrived


class MaliciousCoordinator:
    """Follows the protocol with `count` honest owners until an attack begins."""

    def __init__(
        self,
        count: int = 5,
        *,
        needed: int = 4,
        colluders: int = 1,
        size: int = 6,
        ring_bits: RingBits = 64,
        change: Callable[[OpenSum], OpenSum] = lambda request: request,
        seed: int = 0,
    ) -> None:
        self.identities = identities_of(count)
        self.layout = layout_of(size, ring_bits=ring_bits)
        self.terms: SumTerms = terms_of(self.identities, self.layout, needed=needed, colluders=colluders, change=change)
        self.vectors = vectors_of(self.identities, self.layout)
        self.encoded = {
            name: fixed_point.encode(self.layout, vector.copy(), count) for name, vector in self.vectors.items()
        }
        self.owners: dict[str, MaskedOwner] = {}
        self.received: dict[str, list[Message]] = {name: [] for name in self.identities}
        self.side = MaskedCoordinator(self.terms, self.terms.names)
        self._random_bytes = repeating_bytes(seed)

    def send(self, owner: str, message: Message) -> Message:
        """Send one message to one honest owner and keep its answer. A session that is over is forgotten."""
        message = delivered(message)
        if isinstance(message, OpenSum):
            self.owners[owner], reply = MaskedOwner.open(self.terms, self.identities[owner], self._random_bytes)
        else:
            try:
                state, reply = self.owners[owner].answer(message, self.encoded[owner], self._random_bytes)
            except SessionOver:
                del self.owners[owner]
                raise
            self.owners[owner] = state
        self.received[owner].append(delivered(reply))
        return self.received[owner][-1]

    def honest_until(self, kind: type[Message], dropped: Sequence[str] = ()) -> Mapping[str, Message]:
        """Follow the protocol up to the step whose requests are `kind`; these are returned, not sent."""
        while not isinstance(next(iter((requests := self.side.requests()).values())), kind):
            for owner, request in requests.items():
                if owner in dropped:
                    self.side.drop(owner)
                else:
                    self.side.receive(owner, self.send(owner, request))
            self.side.end_step()
        return requests

    @contextmanager
    def refused(self, owner: str, why: str) -> Iterator[None]:
        """Expect that the owner refuses for this reason, gives nothing, and ends the session."""
        before = len(self.received[owner])
        with pytest.raises(SessionOver, match=why):
            yield
        assert len(self.received[owner]) == before
        assert owner not in self.owners

    # --- what the attacker can compute ---

    def survivor_list(self, names: Sequence[str]) -> bytes:
        """A survivor list of these owners, with the digests of their true uploads."""
        records = {record.owner: record for record in self.side._survivor_records()}
        return Survivor.pack_all(records[self.terms.indices[name]] for name in names)

    def sign_as(self, name: str, survivors: bytes) -> Signed:
        """A colluder's signature under any list."""
        body = survivors_body(self.side._book, survivors)
        signature = self.identities[name].sign(Domain.SIGN_SURVIVORS, self.terms.session, body)
        return Signed(self.terms.indices[name], signature)

    def open_victim(self, victim: str, shares: Sequence[tuple[str, RevealedShare]]) -> np.ndarray | None:
        """The victim's vector from its upload, if there are enough shares of both its secrets; else None."""
        index, threshold = self.terms.indices[victim], self.terms.neighbourhood.threshold
        seeds = {}
        for kind in (SELF, MASK):
            known = {
                self.terms.indices[holder] + 1: record.share
                for holder, record in shares
                if (record.owner, record.kind) == (index, kind)
            }
            if len(known) < threshold:
                return None
            points = sorted(known)[:threshold]
            seeds[kind] = secret_sharing.reconstruct(known, secret_sharing.coefficients_at_zero(points))
        book = self.side._book
        others = [other for other in book.neighbours[index] if other in self.side._sealed]
        masks = [*book.pair_masks(seeds[MASK], index, others), (book.self_mask(seeds[SELF]), 1)]
        return self.unmasked(victim, masks)

    def unmasked(self, victim: str, masks: Sequence[mask_stream.Mask]) -> np.ndarray:
        """The victim's upload without these masks, decoded."""
        upload = next(m.payload for m in self.received[victim] if hasattr(m, "part")).copy()
        taken_off = [(key, -sign) for key, sign in masks]
        mask_stream.add_masks(upload, taken_off, 0)  # type: ignore[arg-type]
        bits = fixed_point.fraction_bits(self.layout.entries[0].bound, len(self.identities), self.layout.ring_bits)
        return np.ldexp(upload.view(f"<i{upload.itemsize}").astype(np.float64), -bits)

    def is_open(self, victim: str, guess: np.ndarray | None) -> bool:
        return guess is not None and bool(np.allclose(guess, self.vectors[victim], atol=1e-9))


def held_by(owner: MaskedOwner, name: str) -> list[tuple[str, RevealedShare]]:
    """Everything that a colluder can add: both shares of each owner whose shares it holds."""
    length = secret_sharing.SHARE_BYTES
    return [
        (name, RevealedShare(index, kind, both[:length] if kind == SELF else both[length:]))
        for index, both in owner.held.items()
        for kind in (SELF, MASK)
    ]


def flip(data: bytes, position: int = 0) -> bytes:
    """The bytes with one bit changed."""
    changed = bytearray(data)
    changed[position] ^= 1
    return bytes(changed)
