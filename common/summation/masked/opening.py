"""A masked sum that every owner opens by itself, so that no coordinator can report another total.

After Unmasking the coordinator relays all masked vectors and the rebuilt seeds: all that it has itself. An owner checks
each vector against the survivor list that it signed, and each seed against what its owner published, and adds up. Pair
masks still hide every single vector.
"""

import hashlib

import numpy as np

from common.domain_separation import Domain
from common.messages import UploadsOpened
from common.summation import fixed_point, key_agreement, mask_stream
from common.summation.masked.book import MASK, SELF, Book, require, upload_digest
from common.summation.masked.owner import MaskedOwner
from common.summation.masked.phases import Phase
from common.summation.protocol import Total
from common.summation.records import OpenedSeed, Survivor

STEP = "opening"


def opened_total(side: MaskedOwner, message: UploadsOpened) -> Total:
    """The total, as this owner adds it up. Raises RemoteProtocolError unless it is that of the signed survivor list,
    and FalseTotal for one that honest owners cannot reach.
    """
    # A quorum has then signed for all uploads of the survivor list; the list alone is the coordinator's word for them.
    require(
        side.phase == Phase.UNMASKING, f"{STEP}: this owner has not helped to open the sum"
    )  # check: opened-after-a-quorum-signed
    terms, book, survivors = side.terms, side.book, Survivor.unpack_all(side.survivors)
    layout, seeds = terms.layout, OpenedSeed.unpack_all(message.proofs)
    is_whole = message.payload.dtype == layout.dtype and message.payload.shape == (len(survivors) * layout.size,)
    require(is_whole, f"{STEP}: not one vector for each survivor")  # check: opened-uploads-are-whole
    uploads = message.payload.reshape(len(survivors), layout.size)
    for survivor, upload in zip(survivors, uploads, strict=True):
        digests = [hashlib.sha256(np.ascontiguousarray(upload[part]).data).digest() for part in terms.part_slices]
        is_signed = upload_digest(terms, digests) == survivor.upload  # check: opened-uploads-are-those-signed
        require(is_signed, f"{STEP}: the vector of {terms.name_of(survivor.owner)} is not the one that was signed for")
    listed = {survivor.owner for survivor in survivors}
    require(
        listed <= {each.owner for each in seeds} <= set(book.entries), f"{STEP}: seeds of other owners than took part"
    )  # check: opened-seeds-are-of-its-owners
    for each in seeds:
        _check_seed(side, book, each, survived=each.owner in listed)
    words = np.zeros(layout.size, dtype="<u8")
    vector = fixed_point.numbers(layout, words)
    for upload in uploads:
        vector += upload
    mask_stream.add_masks(vector, book.remaining_masks(seeds, listed), 0)
    names = tuple(terms.name_of(survivor.owner) for survivor in survivors)
    decoded = fixed_point.decode(layout, words, len(terms.roster), len(names))
    return Total(layout=layout, vector=decoded, owners=names, roster_size=len(terms.roster))


def _check_seed(side: MaskedOwner, book: Book, opened: OpenedSeed, *, survived: bool) -> None:
    """Raise RemoteProtocolError for a seed that its owner did not commit to.

    In a sparse graph, an owner knows only its neighbours' commitments. A false seed makes a total of random numbers.
    """
    if survived:
        known = side.commitments.get(opened.owner)
        fits = opened.kind == SELF and known in (None, book.commitment(opened.owner, opened.seed))
    else:
        public = key_agreement.public_key(opened.seed, Domain.MASK_KEY, side.terms.session)
        fits = opened.kind == MASK and public == book.entries[opened.owner].mask_key
    name = side.terms.name_of(opened.owner)
    require(fits, f"{STEP}: the seed of {name} is not the one that it committed to")  # check: opened-seeds-fit
