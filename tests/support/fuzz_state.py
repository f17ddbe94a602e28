"""Coverage-guided fuzzing of whole documents: `python -m tests.support.fuzz_state -max_total_time=60`.

What other parties send as files (agreements, receipts, reports, keys, certificates), and what a party finds in its own
folders (ledger, consents, run, checkpoint). A valid document with some values changed gives a value, or one of our
errors, whose message is one line.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(
    include=["client.ledger", "client.repeats", "client.sketch", "client.state", "common", "server.checkpoint"]
):
    from client.ledger import Ledger
    from client.repeats import Contributed, terms_of
    from client.sketch import sketch_of
    from client.state import Consent, OwnerState
    from common import saved_state
    from common.agreement import Agreement, AgreementDraft, OwnerEntry, Task
    from common.agreement.agreement import load_agreement
    from common.publication import Publication, read_publication
    from common.settings_file import parse_settings
    from server.checkpoint import Checkpoint

from client.owner import Owner  # noqa: F401 - imported first, so that no reading imports it
from common.errors import AmalgramError
from common.summation.masked.owner import SavedMaskedOwner
from common.summation.records import Nonce, Signed
from deploy.commands.explain import explained
from deploy.commands.verify import check_folder, read_receipts
from deploy.complete import complete_agreement
from deploy.example import reviews
from deploy.network_keys import NodeKey, read_certificate, read_node_key
from server.output_folder import last_step
from server.report.report import read_report
from server.settings import CoordinatorSettings
from tests.support.models import tiny_bert
from tests.support.parties import IDENTITIES
from tests.support.reports import _REPORT as REPORT
from tests.support.sums import identities_of, layout_of
from tests.support.sums import terms_of as terms_of_a_sum

FOLDER = Path(tempfile.mkdtemp(prefix="amalgram-fuzz-"))
DIGEST, KEY, SIGNATURE = "ab" * 32, IDENTITIES["ada"].public_key, "cd" * 64
HOSTILE: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**63, 10**400, 1e308, 0.5),
    *("", "x", "\x1b[2J", "a\nb", "\ud800", "a" * 3000, DIGEST, "ab", "1e9", "../x"),
    *([], [[]], [1, 2], {}, {"a": 1}, {"version": 2}, [[1], "x"]),
)


def agreed() -> Agreement:
    """Three owners, every method, over the tiny BERT."""
    base = FOLDER / "base"
    tiny_bert().save_pretrained(base)
    reviews.make_tokenizer().save_pretrained(base)
    draft = AgreementDraft(
        title="Test",
        base=str(base),
        owners=tuple(OwnerEntry(name=name) for name in ("ada", "bea", "cyd")),
        method="regmean",
        compare_with=("average", "task_arithmetic", "fisher"),
        task=Task(labels=("a", "b", "c")),
    )
    return complete_agreement(draft, base, {name: each.public_key for name, each in IDENTITIES.items()})


AGREEMENT = agreed()
AGREEMENT_DIGEST = AGREEMENT.digest()
PUBLICATION: dict[str, Any] = {
    "files": {"config.json": DIGEST, "model.safetensors": DIGEST},
    "configuration": {"model_type": "bert", "hidden_size": 16},
    "owners": ["ada", "bea", "cyd"],
    "examples": 150,
    "test": {
        "regmean": {
            "accuracy": 0.5,
            "metric": 0.5,
            "pooled_accuracy": 0.5,
            "predictions": 100,
            "by_owner": {"ada": {"correct": 5, "predictions": 10, "metric": 0.5}},
        }
    },
    "validation": {},
    "mixtures": {},
}
RECEIPTS: dict[str, Any] = {
    "agreement": AGREEMENT.model_dump(mode="json"),
    "run": DIGEST,
    "model": "regmean",
    "model_digest": DIGEST,
    "deliveries_digest": DIGEST,
    "publication": PUBLICATION,
    "coordinator": SIGNATURE,
    "owners": {"ada": SIGNATURE},
}
COORDINATOR: dict[str, Any] = {"agreement": "a", "output": "b", "network": {"listen": "[::]:1"}}
CONTRIBUTED = Contributed(rows=sketch_of(b"k", [b"a", b"b"]), weight_changes=sketch_of(b"k", [b"c"]))
PAGE: dict[str, Any] = {
    "round": 3,
    "offers": [{"position": 1, "session": DIGEST, "deliveries_digest": DIGEST}],
    "revealed": [DIGEST],
    "burned": ["cd" * 32],
    "result": DIGEST,
    "contributed": [CONTRIBUTED.model_dump(mode="json")],
    "terms": terms_of(AGREEMENT).model_dump(mode="json"),
}
LEDGER: dict[str, Any] = {"version": 2, "identity": KEY.hex(), "pages": {DIGEST: PAGE, AGREEMENT_DIGEST: PAGE}}
CONSENTS: dict[str, Any] = {"agreements": {DIGEST: Consent(when="now", again=(DIGEST,)).model_dump(mode="json")}}
SIDE: dict[str, Any] = saved_state.to_json(SavedMaskedOwner, SavedMaskedOwner(masks=((b"k" * 16, 1),)))
OWNER_RUN: dict[str, Any] = {
    "run": DIGEST,
    "agreement_digest": DIGEST,
    "received": [{"position": 1, "model": "m", "digest": DIGEST, "signature": SIGNATURE}],
    "result": {
        "model": "m",
        "model_digest": DIGEST,
        "deliveries_digest": DIGEST,
        "publication": "p",
        "signature": SIGNATURE,
    },
    "drawn": {"position": 1, "delivered": DIGEST, "nonce": DIGEST, "blind": DIGEST},
}
EVIDENCE: dict[str, Any] = {
    "agreement_digest": AGREEMENT_DIGEST,
    "run": DIGEST,
    "wrong": ["w"],
    "delivered": OWNER_RUN["received"],
    "false": [1],
    "expected": DIGEST,
    "result": OWNER_RUN["result"]
    | {"publication": Publication.model_validate_json(json.dumps(PUBLICATION)).canonical_bytes().decode()},
    "totals": [{"split": "test", "model": "regmean", "metrics": json.dumps(PUBLICATION["test"]["regmean"])}],
    "position": 2,
    "keys": Nonce.pack_all([Nonce(owner, bytes(32), bytes(64)) for owner in range(3)]).hex(),
    "uploads": bytes(3 * 8 * 32).hex(),
    "signatures": Signed.pack_all([Signed(owner, bytes(64)) for owner in range(3)]).hex(),
}
OPENED: dict[str, Any] = {
    "kind": "contribution",
    "request": asdict(terms_of_a_sum(identities_of(3), layout_of(3)).request),
    "side": SIDE,
}
LAYOUT: list[Any] = layout_of(3, 4).to_json()


def checkpointed() -> dict[str, Any]:
    """A checkpoint with something of everything."""
    Checkpoint.open(FOLDER / "made", AGREEMENT_DIGEST)
    saved: dict[str, Any] = json.loads((FOLDER / "made" / "run.json").read_text())
    saved["deliveries"] = [{"position": 0, "model": "m", "digest": DIGEST, "bytes": 8, "owners": ["ada"]}]
    saved["sums"] = [{"position": 1, "session": DIGEST, "layout": DIGEST, "owners": ["ada"], "roster_size": 3}]
    saved["steps"] = [{"name": "roll call", "phase": "roll call", "by_owner": {"ada": {"messages": 1}}}]
    saved["nonces"] = {"3": DIGEST}
    return saved


CHECKPOINT = checkpointed()


# --- readers ---


def written(name: str, content: bytes) -> Path:
    path = FOLDER / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(content)
    path.chmod(0o600)
    return path


def as_json(document: Any) -> bytes:
    """In the canonical form, which a publication must have."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode(
        errors="surrogatepass"
    )


def read_ledger(document: Any) -> None:
    path = written("a.ledger", as_json(document))
    ledger = Ledger(path, KEY, AGREEMENT, must_exist=True)
    ledger.repeats(CONTRIBUTED)
    _ = ledger.pending, ledger.next_round, ledger.offered_deliveries


def state() -> OwnerState:
    return OwnerState(FOLDER / "state", KEY)


def read_run(document: Any) -> None:
    written("state/run/run.json", as_json(document))
    run = state().run
    _ = run.delivered, run.signed_result()


def read_round(document: Any) -> None:
    written("state/run/round.json", as_json(document))
    opened = state().open_round
    if opened is not None:
        _ = opened.open_sum
        saved_state.from_json(SavedMaskedOwner, opened.side)


def read_layout(document: Any) -> None:
    written("state/run/own.layout.json", as_json(document))
    state().read_layout("own")


def read_consents(document: Any) -> None:
    written("state/consent.json", as_json(document))
    state().may_repeat(DIGEST)


def read_evidence(document: Any) -> None:
    path = written(f"{AGREEMENT_DIGEST}.json", as_json(document))
    explained("ada", path, {AGREEMENT_DIGEST: AGREEMENT})


def read_checkpoint(document: Any) -> None:
    written("checkpoint/run.json", as_json(document))
    checkpoint = Checkpoint.open(FOLDER / "checkpoint", AGREEMENT_DIGEST)
    checkpoint.saved_opening()
    checkpoint.saved_nonces(3)


DOCUMENTS: tuple[tuple[Any, Callable[[Any], object]], ...] = (
    (AGREEMENT.model_dump(mode="json", exclude_none=True), lambda tables: parse_settings(tables, Agreement, "a.toml")),
    (COORDINATOR, lambda tables: parse_settings(tables, CoordinatorSettings, "a.toml")),
    (PUBLICATION, lambda each: read_publication(as_json(each))),
    (RECEIPTS, lambda each: check_folder(FOLDER / "published", written("receipts.json", as_json(each)))),
    (EVIDENCE, read_evidence),
    (REPORT, lambda each: read_report(written("out/report.json", as_json(each)).parent)),
    (LEDGER, read_ledger),
    (CONSENTS, read_consents),
    (OWNER_RUN, read_run),
    (OPENED, read_round),
    (LAYOUT, read_layout),
    (CHECKPOINT, read_checkpoint),
)
FILES: tuple[Callable[[bytes], object], ...] = (
    lambda data: load_agreement(written("agreement.toml", data)),
    lambda data: read_publication(data),
    lambda data: read_receipts(written("receipts.json", data)),
    lambda data: read_report(written("out/report.json", data).parent),
    lambda data: last_step(written("out/progress.jsonl", data).parent),
    lambda data: read_node_key(written("a.node", data)),
    lambda data: read_certificate(written("a.pem", data)),
)


def changed(document: Any, provider: Any) -> Any:
    """The document with one to three of its values replaced, left out, or given twice."""
    document = deepcopy(document)
    for _ in range(provider.ConsumeIntInRange(1, 3)):
        place = document
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = keys[provider.ConsumeIntInRange(0, len(keys) - 1)]
            inner = place[key]
            if isinstance(inner, (dict, list)) and inner and provider.ConsumeIntInRange(0, 7):
                place = inner
                continue
            change = provider.ConsumeIntInRange(0, 9)
            if change == 0:
                del place[key]
            elif change == 1:
                place[key] = provider.ConsumeUnicode(30)
            elif change == 2:
                place[key] = provider.ConsumeIntInRange(-(2**63), 2**63 - 1)
            elif change == 3 and isinstance(place, dict):
                place[provider.ConsumeUnicode(10)] = inner
            elif change == 3:
                place.append(inner)
            else:
                place[key] = deepcopy(HOSTILE[provider.ConsumeIntInRange(0, len(HOSTILE) - 1)])
            break
    return document


def read_anything(data: bytes) -> None:
    provider = atheris.FuzzedDataProvider(data)
    number = provider.ConsumeIntInRange(0, len(DOCUMENTS) + len(FILES) - 1)
    try:
        if number < len(DOCUMENTS):
            document, read = DOCUMENTS[number]
            read(changed(document, provider))
        else:
            FILES[number - len(DOCUMENTS)](provider.ConsumeBytes(4000))
    except AmalgramError as error:
        if len(error.message.splitlines()) != 1:
            raise AssertionError(error.message) from error


if __name__ == "__main__":
    state()  # so that it is of this version
    written("published/config.json", b"{}")
    for document, read in DOCUMENTS:  # unchanged, each can be read: otherwise only its first fault would be looked at
        read(document)
    read_node_key(written("a.node", NodeKey.new().content))
    atheris.Setup(sys.argv, read_anything)
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)
