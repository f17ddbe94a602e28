"""What the coordinator keeps, for good, of an owner that lied in a sum: `OUT/evidence/OWNER-SESSION.json`.

Anybody can read who it was with `amalgram verify FILE`. The agreement, the request and the layout of the sum are in it:
what was signed is about exactly these. Nothing in it is secret; shares of a secret are in it that the sum did not use.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import JsonValue, ValidationError

from common import saved_state
from common.agreement import Agreement
from common.errors import LocalProtocolError, ProtocolError, RemoteProtocolError, SettingsError
from common.messages import Envelope, OpenSum, decode, encode
from common.private_file import make_private_folder, write_whole
from common.settings_file import Settings, parse_settings
from common.summation.masked.evidence import Evidence, accused
from common.summation.protocol import SumTerms
from common.tensor_layout import TensorLayout

FOLDER = "evidence"
MAX_BYTES = 256_000_000


class KeptEvidence(Settings):
    """The content of one file."""

    agreement: dict[str, JsonValue]
    request: dict[str, str | int]
    layout: list[JsonValue]
    evidence: dict[str, JsonValue]


def keep(output: Path, agreement: Agreement, terms: SumTerms, evidence: Evidence) -> Path:
    """Write what shows that an owner lied; the same lie again changes nothing."""
    fields: dict[str, Any] = dict(encode(terms.request).fields)
    kept = KeptEvidence(
        agreement=agreement.model_dump(mode="json"),
        request=fields,
        layout=terms.layout.to_json(),
        evidence=saved_state.to_json(Evidence, evidence),
    )
    make_private_folder(output / FOLDER)
    path = output / FOLDER / f"{terms.name_of(evidence.owner)}-{terms.request.session[:16]}.json"
    write_whole(path, kept.model_dump_json(indent=1).encode() + b"\n")
    return path


def read(path: Path) -> tuple[Agreement, str, str]:
    """The agreement, the owner that lied in a sum under it, and how. Raises SettingsError if the file is malformed, and
    RemoteProtocolError if it proves nothing.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        kept = KeptEvidence.model_validate_json(content[:MAX_BYTES])
        evidence = saved_state.from_json(Evidence, kept.evidence)
        request = decode(Envelope(kind=OpenSum.__name__, fields=dict(kept.request), payload=None))
        layout = TensorLayout.from_json(json.loads(json.dumps(kept.layout)))
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValidationError, ValueError, TypeError, ProtocolError):
        raise SettingsError(
            f"{path}: is not evidence that a coordinator kept",
            hint="name a file of OUT/evidence; to compare a folder with receipts: amalgram verify OUT --receipts FILE",
        ) from None
    agreement = parse_settings(kept.agreement, Agreement, f"{path}: agreement")
    assert isinstance(request, OpenSum)
    if request.agreement_digest != agreement.digest():  # check: evidence-is-of-its-agreement
        raise RemoteProtocolError("evidence: the sum is of another agreement than the one in the file")
    try:
        terms = SumTerms(
            request=request,
            layout=layout,
            roster=agreement.roster,
            needed_owners=agreement.needed_owners,
            colluders=agreement.colluders,
        )
        return agreement, accused(terms, evidence), evidence.lie
    except (LocalProtocolError, ValueError, KeyError):
        raise RemoteProtocolError("evidence: what is in the file does not fit together") from None
