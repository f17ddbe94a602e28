"""What owners sign at the end of a run: every file of the published model, its configuration, and the metrics.

The files carry their SHA-256, as `sha256sum` prints it. `receipts.json`, which is published beside them, holds all of
it with the agreement and everybody's signatures, so anybody can check a folder against it (deploy/commands/verify.py).
"""

import json
from functools import lru_cache
from typing import Annotated

from pydantic import Field, JsonValue, ValidationError

from common.agreement import Agreement
from common.certificates import check_receipts, check_result
from common.errors import RemoteProtocolError
from common.messages import Result
from common.metrics import MeanScore, compared_by, decisive
from common.settings_file import Count, Digest, FileName, Name, Probability, Settings, matching
from common.summation.records import Signed

CARD, RECEIPTS = "README.md", "receipts.json"
MAX_RECEIPTS_BYTES = 64_000_000

Signature = Annotated[str, matching("[0-9a-f]{128}", "a signature, 128 hexadecimal digits")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Correlation = Annotated[float, Field(ge=-1, le=1)]


class PublishedFolder(Settings):
    """What one folder publishes: the SHA-256 of each file, and the content of its configuration."""

    files: Annotated[dict[FileName, Digest], Field(min_length=1, max_length=10_000)]
    configuration: dict[str, JsonValue]


class SignedScore(Settings):
    """How a model did on one owner's rows."""

    correct: Count | None
    predictions: Count
    metric: Finite
    pearson_r: Correlation | None = None


class SignedMean(Settings):
    """How a model did over all owners, and by owner where an owner agreed to it (metrics.MeanScore)."""

    accuracy: Probability | None
    metric: Finite
    pooled_accuracy: Probability | None
    predictions: Count
    pearson_r: Correlation | None = None
    sums: tuple[tuple[Finite, ...], ...] = ()
    cut: tuple[Count, Count] | None = None
    groups: tuple[tuple[Count, Count, Count], ...] = ()
    by_owner: dict[Name, SignedScore]

    def chosen_by(self, measure: str) -> float:
        """The number that decides a sweep; more is better."""
        return decisive(compared_by(self.accuracy, self.pearson_r), self.metric, measure, self.groups)

    @classmethod
    def of(cls, score: MeanScore) -> "SignedMean":
        """The metrics of a total, as they are signed. A sum of rounded shares may exceed 1 by rounding."""
        return cls(
            accuracy=None if score.accuracy is None else min(score.accuracy, 1.0),
            metric=score.metric,
            pooled_accuracy=None if score.pooled_accuracy is None else min(score.pooled_accuracy, 1.0),
            predictions=score.rows,
            pearson_r=score.pearson_r,
            sums=score.sums,
            cut=score.cut,
            groups=tuple((round(correct), round(rows), round(owners)) for correct, rows, owners in score.groups),
            by_owner={
                owner: SignedScore(
                    correct=each.correct, predictions=each.rows, metric=each.metric, pearson_r=each.pearson_r
                )
                for owner, each in score.by_owner.items()
            },
        )


class Publication(PublishedFolder):
    """The published folder, with its card, and what the report says that it is: who is in it and how good it is.

    `examples`: training examples of all owners, None if they were not summed. `test`: by model; `validation`: by
    candidate of a sweep. `mixtures`: every one that a search tried, by name.
    """

    owners: Annotated[tuple[Name, ...], Field(min_length=1)]
    examples: Count | None
    test: dict[str, SignedMean]
    validation: dict[str, SignedMean]
    mixtures: dict[str, tuple[Finite, ...]]

    def canonical_bytes(self) -> bytes:
        """The same bytes at every party: sorted keys, shortest floats, UTF-8."""
        fields = self.model_dump(mode="json")
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


@lru_cache(maxsize=4)  # it names all owners, and in a simulation all of them read the same
def read_publication(content: bytes) -> Publication:
    """The publication that the coordinator sent. Raises RemoteProtocolError unless these are its canonical bytes."""
    try:
        publication = Publication.model_validate_json(content)
        is_exact = publication.canonical_bytes() == content
    except (ValidationError, ValueError):
        is_exact = False
    if not is_exact:  # check: publication-is-canonical
        raise RemoteProtocolError("the coordinator's result does not say in the agreed form what is published")
    return publication


# --- receipts ---


class PublishedReceipts(Settings):
    """`receipts.json`: the result that the coordinator signed, and the owners' signatures under it, by name."""

    agreement: dict[str, JsonValue]
    run: Digest
    model: Annotated[str, Field(min_length=1, max_length=200)]
    model_digest: Digest
    deliveries_digest: Digest
    publication: Publication
    coordinator: Signature
    owners: dict[Name, Signature]

    @classmethod
    def of(cls, agreement: Agreement, result: Result, signatures: bytes) -> "PublishedReceipts":
        """`signatures`: `records.Signed` over the result."""
        return cls(
            agreement=agreement.model_dump(mode="json"),
            run=result.run,
            model=result.model,
            model_digest=result.model_digest,
            deliveries_digest=result.deliveries_digest,
            publication=read_publication(result.publication),
            coordinator=result.signature.hex(),
            owners={agreement.owner_names[each.owner]: each.signature.hex() for each in Signed.unpack_all(signatures)},
        )

    def check(self, agreement: Agreement) -> list[str]:
        """The owners that signed. Raises RemoteProtocolError unless all signatures are valid, and enough."""
        result = Result(
            run=self.run,
            model=self.model,
            model_digest=self.model_digest,
            deliveries_digest=self.deliveries_digest,
            publication=self.publication.canonical_bytes(),
            signature=bytes.fromhex(self.coordinator),
        )
        check_result(agreement, result)  # check: published-receipts-are-the-coordinator-s
        names = agreement.owner_names
        strangers = sorted(self.owners.keys() - set(names))
        if strangers:
            raise RemoteProtocolError(f"receipts: {strangers[0]} is not on the agreement's roster")
        signed = [Signed(names.index(owner), bytes.fromhex(signature)) for owner, signature in self.owners.items()]
        return check_receipts(agreement, result, Signed.pack_all(sorted(signed, key=lambda each: each.owner)))

    def content(self) -> bytes:
        """What a file of them holds."""
        return self.model_dump_json(indent=1).encode() + b"\n"
