"""Coverage-guided fuzzing of what is read from the wire: `python -m tests.support.fuzz -max_total_time=60`.

Whatever arrives: reading it gives a message or records that write back to the same bytes, or the one typed error.
"""

import sys

import atheris

with atheris.instrument_imports(include=["common"]):
    from common.errors import RemoteProtocolError
    from common.messages import KINDS
    from common.summation.records import KeyEntry, RevealedShare, SealedShare, ShareDelivery, Signed, Survivor
    from common.wire import from_record, to_record

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

LISTS = (KeyEntry, SealedShare, ShareDelivery, Survivor, Signed, RevealedShare)
KIND_NAMES = [*KINDS, "Sesame"]


def read_list(data: bytes) -> None:
    kind = LISTS[data[0] % len(LISTS)]
    try:
        records = kind.unpack_all(data[1:])
    except RemoteProtocolError:
        return
    assert kind.pack_all(records) == data[1:]


def read_message(data: bytes) -> None:
    """A header with the fields of some kind, each taken from the data, and sometimes a payload."""
    provider = atheris.FuzzedDataProvider(data)
    kind = provider.PickValueInList(KIND_NAMES)
    names = sorted(KINDS[kind].__dataclass_fields__) if kind in KINDS else ["run"]
    header: dict[str, object] = {"kind": kind}
    for name in names:
        choice = provider.ConsumeIntInRange(0, 4)
        if choice == 0:
            header[name] = "ab" * 32
        elif choice == 1:
            header[name] = provider.ConsumeIntInRange(-(2**63), 2**63 - 1)
        elif choice == 2:
            header[name] = provider.ConsumeBytes(provider.ConsumeIntInRange(0, 200))
        elif choice == 3:
            header[name] = provider.ConsumeUnicodeNoSurrogates(40)
    record = RecordDict({"header 0": ConfigRecord(header)})  # type: ignore[arg-type]
    if provider.ConsumeBool():
        raw = provider.ConsumeBytes(provider.ConsumeIntInRange(0, 300))
        array = Array("uint64", (9,), "numpy.ndarray", raw) if provider.ConsumeBool() else Array(np.zeros(3, "<u8"))
        record["payload 0"] = ArrayRecord({"payload": array})
    try:
        packet = from_record(record)
    except RemoteProtocolError:
        return
    assert dict(to_record(packet)["header 0"]) == header


def read_anything(data: bytes) -> None:
    if len(data) > 1:
        (read_list if data[0] % 2 else read_message)(data[1:])


if __name__ == "__main__":
    atheris.Setup(sys.argv, read_anything)
    atheris.Fuzz()
