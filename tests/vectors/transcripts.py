"""Transcripts of whole masked sums as JSON: `python -m tests.vectors.transcripts` writes them, a test replays them.

`steps` lists every request to an owner with its exact reply. `bad_...` are requests that an owner must refuse after the
honest steps up to that point, with the words of the refusal. Other implementations can be checked against these files.
Owner oN has the Ed25519 seed SHA-256("oN"). Calls for random bytes are counted from 1, over all owners in the order of
the steps; call k for n bytes gives the first n bytes of SHA-256("0/k/0") | SHA-256("0/k/1") | ...
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.domain_separation import Domain
from common.messages import (
    Acknowledgements,
    Envelope,
    KeyBook,
    KeyShares,
    Message,
    OpenShares,
    PartRequest,
    SurvivorList,
    decode,
    encode,
)
from common.summation.masked.book import survivors_body
from common.summation.records import KeyEntry, ShareDelivery, Signed, Survivor
from tests.support.malicious import MaliciousCoordinator, flip

FOLDER = Path(__file__).parent
CASES: dict[str, dict[str, Any]] = {
    "three_owners": {"count": 3, "needed": 3, "colluders": 0, "size": 4, "lost": []},
    "three_owners_32_bits": {"count": 3, "needed": 3, "colluders": 0, "size": 5, "ring_bits": 32, "lost": []},
    "five_owners_one_lost": {"count": 5, "needed": 4, "colluders": 1, "size": 3, "lost": ["o4"]},
}


def to_json(message: Message) -> dict[str, Any]:
    """A message with its bytes in hexadecimal and its numbers in decimal."""
    envelope = encode(message)
    fields = {
        name: {"hex": value.hex()} if isinstance(value, bytes) else value for name, value in envelope.fields.items()
    }
    payload = None if envelope.payload is None else [str(number) for number in envelope.payload]
    return {"kind": envelope.kind, "fields": fields, "payload": payload}


def from_json(data: Mapping[str, Any]) -> Message:
    """A request; requests have no payload."""
    fields = {
        name: bytes.fromhex(value["hex"]) if isinstance(value, dict) else value
        for name, value in data["fields"].items()
    }
    return decode(Envelope(kind=data["kind"], fields=fields, payload=None))


def set_up(case: Mapping[str, Any]) -> MaliciousCoordinator:
    ring_bits = case.get("ring_bits", 64)
    return MaliciousCoordinator(
        case["count"], needed=case["needed"], colluders=case["colluders"], size=case["size"], ring_bits=ring_bits
    )


def record(case: Mapping[str, Any]) -> dict[str, Any]:
    """Play one sum; owners in `lost` drop out after ShareKeys."""
    coordinator, steps, bad = set_up(case), [], []
    side, lost = coordinator.side, set(case["lost"])
    while requests := side.requests():
        kind = type(next(iter(requests.values())))
        bad += [
            {"name": name, "after_step": len(steps), "owner": "o0", "request": to_json(message), "refusal": refusal}
            for name, message, refusal in bad_requests(coordinator, requests["o0"])
        ]
        for owner, request in requests.items():
            if owner in lost and kind is KeyShares:
                side.drop(owner)
                continue
            reply = coordinator.send(owner, request)
            steps.append({"owner": owner, "request": to_json(request), "reply": to_json(reply)})
            side.receive(owner, reply)
        side.end_step()
    total = side.total()
    return {
        "about": "a masked sum: see transcripts.py",
        **case,
        "bound": coordinator.layout.entries[0].bound,
        "vectors": {name: [str(number) for number in encoded] for name, encoded in coordinator.encoded.items()},
        "steps": steps,
        "survivors": list(total.owners),
        "total": [float(value).hex() for value in total.vector],
        **{f"bad_{each['name']}": each for each in bad},
    }


def bad_requests(coordinator: MaliciousCoordinator, honest: Message) -> Iterator[tuple[str, Message, str]]:
    """(name, what the coordinator sends o0 instead, the words of the refusal)."""
    if isinstance(honest, KeyBook):
        entries = KeyEntry.unpack_all(honest.entries)
        yield "key_book_altered_key", replace(honest, entries=flip(honest.entries, 140)), "the signature of o1"
        yield "key_book_without_me", replace(honest, entries=KeyEntry.pack_all(entries[1:])), "my own entry is missing"
        yield (
            "key_book_truncated",
            replace(honest, entries=honest.entries[:-1]),
            "not a whole number of 130-byte records",
        )
        twice = honest.entries + honest.entries[-130:]
        yield "key_book_owner_twice", replace(honest, entries=twice), "ascending order"
        yield "key_book_too_few", replace(honest, entries=KeyEntry.pack_all(entries[:2])), "the agreement needs"
        yield "key_book_other_session", replace(honest, session="00" * 32), "another session"
    if isinstance(honest, KeyShares):
        deliveries = ShareDelivery.unpack_all(honest.deliveries)
        forged = replace(deliveries[0], sealed=flip(deliveries[0].sealed))
        packed = ShareDelivery.pack_all([forged, *deliveries[1:]])
        yield "shares_forged", replace(honest, deliveries=packed), "not the one that was sent"
        committed = ShareDelivery.pack_all([replace(deliveries[0], commitment=bytes(32)), *deliveries[1:]])
        yield "shares_other_commitment", replace(honest, deliveries=committed), "the signature of o1"
        yield "shares_from_nobody", replace(honest, deliveries=b"", manifests=b""), "the agreement needs"
        yield (
            "shares_more_manifests",
            replace(honest, manifests=honest.manifests + bytes(32)),
            "more manifests than senders",
        )
        yield "part_out_of_turn", PartRequest(session=honest.session, part=0), "in phase ShareKeys"
    if isinstance(honest, SurvivorList):
        listed = Survivor.unpack_all(honest.survivors)
        altered = Survivor.pack_all([replace(listed[0], upload=bytes(32)), *listed[1:]])
        yield "survivors_other_upload", replace(honest, survivors=altered), "my upload is missing or altered"
        yield "survivors_without_me", replace(honest, survivors=Survivor.pack_all(listed[1:])), "my upload is missing"
        for name, dispute in (("forged", Signed(1, bytes(64))), ("by_myself", Signed(0, bytes(64)))):
            refusal = "the signature of o1" if name == "forged" else "I dealt no shares"
            disputes = Signed.pack_all([dispute])
            yield f"open_shares_{name}", OpenShares(session=honest.session, disputes=disputes), refusal
        yield "survivors_me_alone", replace(honest, survivors=Survivor.pack_all(listed[:1])), "the agreement needs"
        yield "part_that_is_none", PartRequest(session=honest.session, part=1), "part 1 is not the next one"
    if isinstance(honest, Acknowledgements):
        signed = Signed.unpack_all(honest.signatures)
        fewer = Signed.pack_all(signed[: coordinator.terms.quorum - 1])
        yield "acknowledgements_too_few", replace(honest, signatures=fewer), "the quorum is"
        forged_signature = Signed.pack_all([*signed[:-1], replace(signed[-1], signature=flip(signed[-1].signature))])
        yield "acknowledgements_forged", replace(honest, signatures=forged_signature), "is not valid"
        other = survivors_body(coordinator.side._book, b"")
        name = coordinator.terms.names[signed[-1].owner]
        signature = coordinator.identities[name].sign(Domain.SIGN_SURVIVORS, coordinator.terms.session, other)
        elsewhere = Signed.pack_all([*signed[:-1], replace(signed[-1], signature=signature)])
        yield "acknowledgements_of_another_list", replace(honest, signatures=elsewhere), "is not valid"
        yield "survivors_twice", SurvivorList(session=honest.session, survivors=b""), "in phase ConsistencyCheck"


if __name__ == "__main__":
    for name, case in CASES.items():
        (FOLDER / f"{name}.json").write_text(json.dumps(record(case), indent=1) + "\n")
