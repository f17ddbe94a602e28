"""Many owners' signatures under the same words, relayed by the coordinator in one list."""

from collections.abc import Mapping

from common.errors import RemoteProtocolError
from common.identity import verify
from common.labels import Label
from common.summation.records import Signed


def check_signed(
    roster: Mapping[str, bytes], label: Label, session: bytes, body: bytes, signatures: bytes
) -> list[str]:
    """The owners that signed `body`, each once. Raises RemoteProtocolError if one of the signatures does not hold."""
    names = tuple(roster)
    signers = []
    for signed in Signed.unpack_all(signatures):
        if signed.owner >= len(names):
            raise RemoteProtocolError(f"there is no owner {signed.owner} on a roster of {len(names)}")
        name = names[signed.owner]
        verify(roster[name], label, session, name, body, signed.signature)
        signers.append(name)
    return signers
