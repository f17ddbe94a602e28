"""Signed results, honest and otherwise."""

from common.certificates import result_body
from common.domain_separation import Domain
from common.messages import Result
from common.metrics import BASE, OWN_AT_HOME
from common.publication import CARD, Publication, PublishedFolder, SignedMean
from tests.support.owner_process import RUN, Process

MEAN = SignedMean(accuracy=0.5, metric=0.5, pooled_accuracy=0.5, predictions=30, by_owner={})


def publication_of(process: Process, published: PublishedFolder, **changes: object) -> Publication:
    """What an honest coordinator would let the owners sign, with fields replaced."""
    agreement = process.parties.agreement
    fields = {
        "files": {**published.files, CARD: "ab" * 32},
        "configuration": published.configuration,
        "owners": agreement.owner_names,
        "examples": 600,
        "test": dict.fromkeys((BASE, OWN_AT_HOME, *agreement.methods), MEAN),
        "validation": {},
        "mixtures": {},
    }
    return Publication(**{**fields, **changes})  # type: ignore[arg-type]


def sign_result(
    process: Process, model: str, model_digest: str, digest: str, publication: bytes, run: str = RUN
) -> Result:
    """A result with the coordinator's signature."""
    body = result_body(process.parties.agreement, model, model_digest, digest, publication)
    signature = process.parties.identities["coordinator"].sign(Domain.SIGN_RESULT, bytes.fromhex(run), body)
    return Result(
        run=run,
        model=model,
        model_digest=model_digest,
        deliveries_digest=digest,
        publication=publication,
        signature=signature,
    )


def signed_anew(process: Process, result: Result, **changes: object) -> Result:
    """The result with fields replaced, and the coordinator's signature under all of it."""
    fields = {
        "model": result.model,
        "model_digest": result.model_digest,
        "digest": result.deliveries_digest,
        "publication": result.publication,
        "run": result.run,
    }
    return sign_result(process, **{**fields, **changes})  # type: ignore[arg-type]
