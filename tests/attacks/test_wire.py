"""Attacks 32, 34, 35 and 67: garbage on the wire, silence, and secrets in logs and core dumps."""

import json
import logging
import stat
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.app import app
from common.errors import RemoteProtocolError
from common.identity import Identity, write_identity
from common.messages import KINDS, Envelope, Field, Finish, Refusal, SurvivorList, decode
from common.summation.records import KeyEntry, RevealedShare, SealedShare, ShareDelivery, Signed, Survivor
from common.wire import from_record, to_record
from deploy.simulation.in_process_grid import InProcessGrid
from server.app import FlowerChannel
from tests.support.commands import FUZZERS, fuzz
from tests.support.malicious import MaliciousCoordinator
from tests.support.owner_process import Process
from tests.support.parties import Parties

RECORDS = (KeyEntry, SealedShare, ShareDelivery, Survivor, Signed, RevealedShare)


# --- 32: malformed, oversized, unknown ---


@given(st.sampled_from(RECORDS), st.binary(max_size=600))
def test_32_a_list_is_read_exactly_or_refused(kind: type, data: bytes) -> None:
    try:
        records = kind.unpack_all(data)
    except RemoteProtocolError:
        return
    assert kind.pack_all(records) == data


values = st.one_of(
    st.text(max_size=70),
    st.integers(-(2**63), 2**63 - 1),
    st.binary(max_size=200),
    st.booleans(),
    st.floats(),
    st.lists(st.integers(0, 9), max_size=3),
)
field_names = st.sampled_from(
    [*sorted({name for kind in KINDS.values() for name in kind.__dataclass_fields__}), "kind"]
)
payloads = st.sampled_from(
    [
        None,
        Array(np.zeros(3, "<u8")),
        Array(np.zeros((2, 2))),
        Array("float64", (9,), "numpy.ndarray", b"\x93NUMPY\x01\x00"),
        Array("float64", (9,), "numpy.ndarray", b""),
    ]
)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name not in ("error.txt",)
    }


def through_app(settings_file: Path, record: RecordDict) -> Any:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    node_config = {"settings": str(settings_file)}
    context = Context(run_id=1, node_id=2, node_config=node_config, state=RecordDict(), run_config={})
    (answer,) = from_record(app(FlowerMessage(record, dst_node_id=2, message_type="train.step"), context).content)
    return answer


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from([*KINDS, "Sesame", ""]),
    fields=st.dictionaries(field_names, values, max_size=8),
    array=payloads,
)
def test_32_garbage_is_refused_with_a_code_and_changes_nothing(
    waiting: Parties, kind: str, fields: dict[str, Any], array: Array | None
) -> None:
    """In the middle of a sum, through the owner's real app."""
    state = waiting.folder / "state" / "hotel"
    before = contents(state)
    record = RecordDict({"header 0": ConfigRecord({**fields, "kind": kind})})
    if array is not None:
        record["payload 0"] = ArrayRecord({"payload": array})
    assert through_app(waiting.files["hotel"], record) in (Refusal(code="protocol"), Refusal(code="consent"))
    assert contents(state) == before


@pytest.fixture
def waiting(parties: Parties) -> Parties:
    """Owners that have sent their masked vectors and wait for the survivor list."""
    process = Process(parties)
    process.begin(process.open_sum(1))
    process.until(SurvivorList)
    return parties


@pytest.mark.parametrize(
    "header", [b"(((", b"'''", b"   x\n y\n", b"(" * 9000, b"1" * 9000, b"{'shape': (-1,)}", b"\xff"]
)
def test_53_an_array_whose_header_breaks_numpy_is_refused(header: bytes) -> None:
    """NumPy passes on what its tokenizer raises, which is not a ValueError. It must not end the coordinator's run: an
    owner whose answer is malformed only drops out.
    """
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    part = ConfigRecord({"kind": "VectorPart", "session": "ab" * 32, "owner": "phones", "part": 0})
    record = RecordDict(
        {"header 0": part, "payload 0": ArrayRecord({"payload": Array("float32", (3,), "numpy.ndarray", data)})}
    )
    with pytest.raises(RemoteProtocolError, match="VectorPart: the payload cannot be read"):
        from_record(record)


def test_32_an_oversized_list_is_refused_before_it_is_read() -> None:
    fields: dict[str, Field] = {"session": "ab" * 32, "survivors": bytes(16_000_001)}
    with pytest.raises(RemoteProtocolError, match="survivors is malformed"):
        decode(Envelope(kind="SurvivorList", fields=fields, payload=None))


# --- 34: silence ---


class SilentGrid(InProcessGrid):
    """Node 3 never answers."""

    def pull_messages(self, message_ids: Iterable[str]) -> list[FlowerMessage]:
        return super().pull_messages([each for each in message_ids if self._pending.get(each, 3) != 3])


def test_34_a_silent_owner_drops_out_after_the_timeout_and_delays_nobody_longer(parties: Parties) -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    grid = SilentGrid(app, [{"settings": str(path)} for path in parties.files.values()])
    started = monotonic()
    packet = (Finish(run="ab" * 32),)
    answers = dict(FlowerChannel(grid).exchange(dict.fromkeys((2, 3, 4), packet), timeout_seconds=1.0))
    assert answers[3] is None
    assert answers[2] == answers[4] == (Refusal(code="protocol"),)
    assert monotonic() - started < 10


# --- 35: secrets ---


def test_35_no_secret_in_any_log_error_or_answer(parties: Parties, caplog: pytest.LogCaptureFixture) -> None:
    """At the most detailed log level, run a whole sum with an attack in it."""
    caplog.set_level(logging.DEBUG)
    process = Process(parties)
    process.begin(process.open_sum(1))
    process.until(SurvivorList)
    run = parties.folder / "state" / "hotel" / "run"
    side = json.loads((run / "round.json").read_text())["side"]
    secrets = [key for key, _ in side["masks"]] + list(side["held"].values())
    secrets += [identity.seed.hex() for identity in parties.identities.values()]
    assert len(secrets) > 5
    bad = SurvivorList(session=process.terms.request.session, survivors=b"")

    assert through_app(parties.files["hotel"], to_record((bad,))) == Refusal(code="protocol")
    written = caplog.text + (parties.folder / "state" / "hotel" / "error.txt").read_text()
    for secret in secrets:
        assert secret not in written
        assert repr(bytes.fromhex(secret)) not in written


def test_35_files_with_secrets_are_the_owner_s_alone(waiting: Parties) -> None:
    state = waiting.folder / "state" / "hotel"
    for path in [*state.rglob("*"), waiting.folder / "hotel.key"]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path


def test_35_what_arrives_at_the_coordinator_holds_no_secret_of_an_owner() -> None:
    """Search all bytes that o0 sends in a whole sum for every secret it ever had."""
    evil = MaliciousCoordinator()
    secrets: set[bytes] = set()
    send = evil.send

    def watch(owner: str, message: Any) -> Any:
        reply = send(owner, message)
        state = evil.owners["o0"]
        secrets.update([state.channel_seed, state.mask_seed, state.self_seed, *(key for key, _ in state.masks)])
        return reply

    evil.send = watch  # type: ignore[method-assign]
    with suppress(StopIteration):  # the sum is done
        evil.honest_until(Finish)
    sent = b"".join(
        value if isinstance(value, bytes) else value.tobytes() if isinstance(value, np.ndarray) else str(value).encode()
        for message in evil.received["o0"]
        for value in vars(message).values()
    )
    secrets.discard(b"")
    assert len(secrets) >= 3 + 5
    assert not any(secret in sent for secret in secrets)
    assert evil.encoded["o0"].tobytes() not in sent


@pytest.mark.slow
@pytest.mark.parametrize("module", FUZZERS)
def test_32_98_an_hour_of_coverage_guided_fuzzing_of_all_that_is_read_finds_nothing(
    module: str, tmp_path: Path
) -> None:
    """Needs atheris, which exists for Linux on x86-64 only; elsewhere the other tests of 32 and 98 have to suffice."""
    pytest.importorskip("atheris")
    done = fuzz(module, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Done" in done.stderr


DUMPABLE_AFTER = """
import ctypes, resource, sys
from pathlib import Path
from common.identity import Identity, read_identity, write_identity
resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)
{action}
print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), resource.getrlimit(resource.RLIMIT_CORE)[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the flag")
@pytest.mark.parametrize(
    "action",
    ['read_identity(Path("old.key"))', 'write_identity(Path("new.key"), Identity(name="ada", seed=bytes(32)))'],
)
def test_67_memory_of_a_process_that_holds_a_key_is_not_dumped(action: str, tmp_path: Path) -> None:
    write_identity(tmp_path / "old.key", Identity(name="hotel", seed=bytes(32)))
    code = DUMPABLE_AFTER.format(action=action)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "0"]
