"""What a restarted run owes to an earlier one: a sum that was being opened, and sessions that never will be.

The owners open one session only for what they contributed. If the coordinator was killed while they did, it must open
the very same one (`reopen_sum`). If a session was given up before that, the owners certify that nobody will ever open
it (certificates.py), and may then contribute again (`certify_as_over`).
"""

from collections.abc import Callable
from contextlib import suppress

from common.agreement import Agreement
from common.certificates import check_burned_by
from common.errors import ConsentError, RemoteProtocolError
from common.messages import BurnCertificate, BurnSession, OpenSum, SessionBurned
from common.summation.protocol import CoordinatorSide, SumKind, SumTerms
from common.summation.records import Signed
from common.thresholds import burn_quorum
from server.checkpoint import Checkpoint
from server.exchange import Exchange


def sessions_to_certify(pending: set[str], checkpoint: Checkpoint) -> list[str]:
    """The sessions that an owner still has as pending, except those that this run opened or is about to open.

    To an owner that dropped out before it could help to open a session, that session stays pending for good.
    """
    reopening = {checkpoint.opening_session}
    return sorted(pending - checkpoint.opened_sessions - reopening)  # check: opened-sessions-are-over


def certify_as_over(exchange: Exchange, agreement: Agreement, run: str, session: str) -> None:
    """Have the owners sign that `session`, which an earlier run left, will never be opened, and give all the proof.

    Owners that contributed to it may then contribute again. Owners that helped to open it rightly refuse. Raises
    ConsentError if too few sign, or TooFewOwners.
    """
    exchange.begin_step("certify that an interrupted session is over", "recovery")
    signed = []
    for owner, reply in exchange.poll(BurnSession(run=run, session=session), exchange.reply_timeout_seconds):
        if not (isinstance(reply, SessionBurned) and reply.session == session):
            continue
        each = Signed(agreement.owner_names.index(owner), reply.signature)
        with suppress(RemoteProtocolError):  # one bad signature must not spoil the others' certificate
            check_burned_by(agreement, session, [each])
            signed.append(each)
    needed = burn_quorum(len(agreement.owners), agreement.colluders)
    if len(signed) < needed:
        raise ConsentError(
            f"an earlier run was interrupted while a sum was being opened: {len(signed)} owners certify that it was "
            f"not opened, {needed} must, so what was contributed cannot be contributed again",
            hint="start a new run, with a new agreement",
        )
    exchange.ask_all(BurnCertificate(run=run, session=session, signatures=Signed.pack_all(signed)))
    exchange.check_enough()


def reopen_sum(
    checkpoint: Checkpoint, kind: SumKind, terms_of: Callable[[OpenSum], SumTerms], owners: tuple[str, ...]
) -> tuple[OpenSum, CoordinatorSide] | None:
    """The sum that was being opened when an earlier start of this run ended; None if there was none.

    Its owners open no other. Those that are not among `owners`, who take part now, have dropped out of it.
    """
    saved = checkpoint.saved_opening()
    if saved is None:
        return None
    request, opening = saved
    side = kind.coordinator.reopen(terms_of(request), opening)
    for owner in set(opening.state.remaining) - set(owners):
        side.drop(owner)
    return request, side
