"""Keyed sketches of sets, which tell how much two sets have in common, and nothing else to whoever lacks the key.

A sketch keeps the smallest keyed digests of the elements (bottom-k: Cohen and Kaplan, "Summarizing data using bottom-k
sketches", PODC 2007). Sets of up to KEPT elements are compared exactly. Of larger ones, the digests that both sketches
would have kept are a uniform sample. With d digests in it, the standard error of a share s is sqrt(s (1 - s) / d): at
most 0.008 for sets of one size. A set under 1 / KEPT of the other's size leaves no sample, and counts as disjoint.
"""

import base64
import hmac
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from pydantic import field_validator

from client.records import Record

KEPT = 4096
DIGEST_BYTES = 8  # two of a million elements share a digest with probability 3e-8


class Sketch(Record):
    """`size`: how many distinct elements the set has. `digests`: the smallest ones, ascending, in Base64."""

    size: int = 0
    digests: str = ""

    @field_validator("digests")
    @classmethod
    def _holds_whole_digests(cls, digests: str) -> str:
        if len(base64.b64decode(digests, validate=True)) % DIGEST_BYTES:  # check: sketches-hold-whole-digests
            raise ValueError("not a whole number of digests")
        return digests


def sketch_of(key: bytes, elements: Iterable[bytes | memoryview]) -> Sketch:
    """The sketch of a set; an element that occurs twice counts once."""
    found = {hmac.digest(key, element, "sha256")[:DIGEST_BYTES] for element in elements}
    return Sketch(size=len(found), digests=base64.b64encode(b"".join(sorted(found)[:KEPT])).decode())


def share_in_common(one: Sketch, other: Sketch) -> float:
    """How much of the smaller set the other one holds too, from 0 to 1; an estimate if a set has over KEPT elements."""
    digests = [np.frombuffer(base64.b64decode(each.digests), ">u8") for each in (one, other)]
    # Beyond its largest digest, a sketch of a larger set does not know what the set holds.
    known = min((kept[-1] for each, kept in zip((one, other), digests, strict=True) if each.size > KEPT), default=None)
    first, second = digests if known is None else [_up_to(kept, known) for kept in digests]
    smaller = min(len(first), len(second))
    return len(np.intersect1d(first, second, assume_unique=True)) / smaller if smaller else 0.0


def _up_to(digests: NDArray[np.uint64], largest: np.uint64) -> NDArray[np.uint64]:
    return digests[: int(np.searchsorted(digests, largest, side="right"))]
