"""A check of one merged model among owners in this process: what they contributed, the merge, everybody's shares."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from common import scaling
from common.merge_methods.equations import Equation, stacked
from common.merge_methods.terms import MergedDelta, MergeSettings
from common.scaling import RescaledTotal, Scales
from common.summation import fixed_point, wide
from common.summation.own_part import OwnPart
from common.summation.protocol import Total
from common.summation.totals import SummedTensors
from common.tensor_layout import TensorLayout
from common.verification import Challenge, Claim, Sent, check_layout, correction_layout, corrections, wrong_claims

Vectors = Mapping[str, NDArray[np.float64]]


def verified(settings: MergeSettings, num_owners: int, *, in_32_bits: bool = False) -> MergeSettings:
    """The same settings with floors, so that the merge has exactly one value."""
    return replace(settings, has_floors=True, num_owners=num_owners, ring_bits=32 if in_32_bits else 64)


@dataclass(frozen=True, kw_only=True)
class Contributions:
    """What every owner contributed, as it would decode its own vector, and the total."""

    own: Mapping[str, SummedTensors]
    total: SummedTensors

    @classmethod
    def of(cls, layout: TensorLayout, vectors: Vectors) -> "Contributions":
        names = tuple(vectors)
        encoded = {name: fixed_point.encode(layout, vector.copy(), len(names)) for name, vector in vectors.items()}
        own = {
            name: OwnPart(layout=layout, encoded=words, owners=names, roster_size=len(names))
            for name, words in encoded.items()
        }
        words = np.zeros(layout.size, dtype="<u8")
        summed = fixed_point.numbers(layout, words)
        for each in encoded.values():
            summed += each
        total = fixed_point.decode(layout, words, len(names), len(names))
        return cls(own=own, total=Total(layout=layout, vector=total, owners=names, roster_size=len(names)))

    @classmethod
    def in_32_bits(cls, layout: TensorLayout, vectors: Vectors) -> "Contributions":
        def flat(wanted: TensorLayout, tensors: object) -> NDArray[np.float64]:
            vector = np.zeros(wanted.size)
            wanted.flatten(tensors, vector)  # type: ignore[arg-type]
            return vector

        first, second = scaling.measures_layout(layout), scaling.scaled_layout(layout)
        measured = cls.of(first, {name: flat(first, scaling.measures(layout, each)) for name, each in vectors.items()})
        assert isinstance(measured.total, Total)
        scales = Scales(layout, scaling.choose(layout, measured.total))
        for vector in vectors.values():
            scales.check(vector, len(vectors))
        on_scale = {name: flat(second, scaling.scaled(scales, each)) for name, each in vectors.items()}
        scaled = cls.of(second, on_scale)
        own = {
            name: RescaledTotal(scaled=scaled.own[name], measured=measured.own[name], scales=scales) for name in vectors
        }
        total = RescaledTotal(scaled=scaled.total, measured=measured.total, scales=scales)
        return cls(own=own, total=total)


def check_total(claim: Claim, vectors: Mapping[str, NDArray[np.uint64]]) -> Total:
    """What owners find when they have added up these shares."""
    words = reduce(wide.add, (vector.reshape(-1, wide.WORDS) for vector in vectors.values()))
    vector = words.reshape(-1).view("<f8")
    return Total(layout=check_layout([claim]), vector=vector, owners=tuple(vectors), roster_size=len(vectors))


@dataclass(kw_only=True)
class Check:
    """One check of one model. A test may change what is sent before it asks whether anything is `wrong`."""

    equations: Sequence[Equation]
    contributions: Contributions
    merged: MergedDelta
    seed: int = 0
    blind: bytes = bytes(32)
    delta: dict[str, Tensor] = field(init=False)
    sent: NDArray[np.float32] = field(init=False)

    def __post_init__(self) -> None:
        solved = {**self.merged.delta, **self.merged.beside}
        self.delta = {name: tensor.clone() for name, tensor in solved.items()}
        layout = correction_layout([self.claim])
        self.sent = np.zeros(layout.size, dtype=np.float32)
        sent = Sent(delta=self.delta, rest=self.merged.rest, factor=self.merged.factor)
        layout.flatten(corrections(self.claim, self.rho_seed, sent), self.sent)

    @property
    def claim(self) -> Claim:
        return Claim(delivery=0, source=0, equations=stacked(self.equations))

    @property
    def rho_seed(self) -> bytes:
        return hashlib.sha256(f"rho {self.seed}".encode()).digest()

    def shares(self, owner: str) -> NDArray[np.uint64]:
        challenge = Challenge(
            claims=(self.claim,),
            rho_seed=self.rho_seed,
            combination_seed=hashlib.sha256(f"s {self.seed}".encode()).digest(),
            sent=self.sent,
            blind=self.blind,
        )
        layout = check_layout([self.claim])
        vector = np.zeros(layout.size, dtype="<u8")
        layout.flatten(challenge.shares(self.claim, self.delta, self.contributions.own[owner]), vector)
        return vector

    def wrong(self) -> list[str]:
        """The equations that do not hold, as every owner finds them."""
        vectors = {owner: self.shares(owner) for owner in self.contributions.own}
        return wrong_claims([self.claim], check_total(self.claim, vectors))
