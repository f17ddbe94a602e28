"""One owner: decides whether it answers what the coordinator sent, and hands the message to whoever answers it.

Everything an answer rests on comes from the owner's own files (context.py). The coordinator's messages only choose
which agreed step comes next; a step that was not agreed is refused before anything is computed.

    roll call, burned sessions, the end of a run     here
    secure sums                                      rounds.py
    what the coordinator sends between rounds        received_models.py
    whether that is what was contributed, merged     verification.py
    the result and everybody's receipts              receipts.py
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from client import receipts, received_models, rounds, verification
from client.context import OwnerContext
from client.look import OwnerLook, look_at_owner, own_base
from common.certificates import check_burned, presence_body, sign_burned
from common.domain_separation import Domain
from common.errors import ConsentError, RemoteProtocolError
from common.messages import (
    PROTOCOL_VERSION,
    BurnCertificate,
    BurnSession,
    CandidatePart,
    CertificateKept,
    CheckKeys,
    CorrectionPart,
    DeliveryPart,
    Draw,
    Finish,
    Finished,
    MergedStepPart,
    Message,
    MixturePart,
    OpenSum,
    Present,
    Receipts,
    Result,
    RollCall,
    ScalesPart,
    SessionBurned,
    UploadsOpened,
)
from common.metrics import BASE, metrics_layout
from common.models.files import file_state
from common.models.folders import base_model_folder
from common.summation.fixed_point import check_layout
from common.text import some_of

FilesState = frozenset[tuple[Path, tuple[int, ...]]]
_in_order: dict[Path, FilesState] = {}  # by settings file: what has been checked


def remember_checked(checked: Mapping[Path, FilesState]) -> None:
    """Let this process know what other processes on this machine have checked, by settings file."""
    _in_order.update(checked)


class Owner(OwnerContext):
    """One owner, built anew for each packet from its settings file and its state folder."""

    def answer(self, message: Message) -> Message:
        """One step. Raises an AmalgramError; then nothing has left."""
        with self.ledger_locked(), self.state.locked():
            self._check_may_answer(message)
            return ANSWERS.get(type(message), rounds.continue_round)(self, message)

    def check(self) -> None:
        """Look at everything this owner brings. Raises the error that a run would meet; nothing is computed.

        A simulation looks before its run: what has not changed since is not looked at again at the roll call.
        """
        found = self._files_as_they_are(self.look())
        if _in_order.get(self.settings_path) != found:
            self.workbench.check()
            _in_order[self.settings_path] = found

    @property
    def checked(self) -> FilesState:
        """The files that this process checked last, as they were."""
        return _in_order[self.settings_path]

    def _files_as_they_are(self, look: OwnerLook) -> FilesState:
        """The state of everything that a check reads, as far as it takes no reading."""
        settings, home, agreed_at = self.settings, self.home, self.home / self.settings.agreement
        base = base_model_folder(settings.base, home, self.agreement, agreed_at)
        models = {base, own_base(settings, home, base), *([] if look.fine_tuned is None else [look.fine_tuned])}
        rows = (home / each for each in (settings.data.train, settings.data.validation, settings.data.test) if each)
        paths = (self.settings_path, agreed_at, *rows, *(path for folder in models for path in folder.rglob("*")))
        return frozenset(map(_file_as_it_is, paths))

    def look(self) -> OwnerLook:
        """The part of `check` that takes no torch, whose import takes seconds."""
        if self.name not in self.agreement.owner_names:
            raise ConsentError(
                f"owner {self.name} is not on the agreement's roster: {some_of(self.agreement.owner_names)}"
            )
        if (
            self.identity.name != self.name or self.identity.public_key != self.agreement.roster[self.name]
        ):  # check: identity-is-agreed
            raise ConsentError(
                f"{self.identity_path}: is not the identity that the agreement names for {self.name}",
                hint="name the right file as identity, or make a new agreement with this one's .pub file",
            )
        check_layout(metrics_layout(self.agreement, "test", [BASE]), len(self.agreement.owners))
        return look_at_owner(self.settings, self.home, self.agreement.task)

    def _check_may_answer(self, message: Message) -> None:
        """The message belongs to an agreement that this owner consented to, and to the run in progress."""
        verification.check_no_evidence(self)
        if isinstance(message, RollCall):
            if message.version != PROTOCOL_VERSION:  # check: protocol-version-is-mine
                raise RemoteProtocolError(
                    f"the coordinator speaks protocol version {message.version}, this owner {PROTOCOL_VERSION}",
                    hint="run the same release of amalgram on both sides",
                )
            self._check_consented(message.agreement_digest)
            return
        if isinstance(message, (OpenSum, DeliveryPart, Draw, CheckKeys)):
            run, digest = message.run, message.agreement_digest
        elif isinstance(message, (BurnSession, BurnCertificate, Result, Receipts, Finish)):
            run, digest = message.run, self.agreement.digest()
        elif isinstance(message, UploadsOpened) and verification.knows_session(self, message.session):
            run, digest = self.state.run.run, self.state.run.agreement_digest
        else:
            opened = rounds.opened(self, message)
            run, digest = opened.run, opened.agreement_digest
        if not isinstance(message, (BurnSession, BurnCertificate, Result, Receipts, Finish)):
            self._check_consented(digest)
        self.state.check_run(run, self.agreement.digest())  # check: message-is-of-this-run

    def _check_consented(self, digest: str) -> None:
        """The coordinator's agreement is this owner's, and this owner has consented to it."""
        own = self.agreement.digest()
        if digest != own:  # check: agreement-is-mine
            raise ConsentError(
                f"the coordinator's agreement is {digest[:16]}..., this owner's is {own[:16]}...",
                hint="compare the two files",
            )
        if digest not in self.state.consents():  # check: agreement-has-consent
            raise ConsentError(
                f"nobody has consented to agreement {digest[:16]}... for {self.name}",
                hint="read it and consent: amalgram agree OWNER.toml",
            )


def _file_as_it_is(path: Path) -> tuple[Path, tuple[int, ...]]:
    return path, file_state(path) if path.exists() else ()  # a pattern for several files, which are read anew anyway


def _answer_roll_call(owner: Owner, message: RollCall) -> Message:
    owner.check()
    owner.state.start_run(message.run, message.agreement_digest)
    ledger = owner.ledger
    next_round, pending = ledger.next_round, ledger.pending
    body = presence_body(message.agreement_digest, next_round, pending)
    signature = owner.identity.sign(Domain.SIGN_PRESENT, bytes.fromhex(message.run), body)
    return Present(run=message.run, owner=owner.name, next_round=next_round, pending=pending, signature=signature)


def _burn_session(owner: Owner, message: BurnSession) -> Message:
    owner.ledger.burn(message.session)
    _forget_session(owner, message.session)
    signature = sign_burned(owner.identity, owner.agreement.digest(), message.session)
    return SessionBurned(session=message.session, owner=owner.name, signature=signature)


def _keep_certificate(owner: Owner, message: BurnCertificate) -> Message:
    check_burned(owner.agreement, message.session, message.signatures)  # check: certificate-is-checked
    ledger = owner.ledger
    ledger.burn(message.session)
    _forget_session(owner, message.session)  # check: certified-session-is-forgotten
    ledger.release(message.session)
    return CertificateKept(session=message.session, owner=owner.name)


def _forget_session(owner: Owner, session: str) -> None:
    """Wipe what is kept of a session. Another one may still be about to be added up, and goes on."""
    kept = owner.state.open_round
    if kept is not None and kept.open_sum.session == session:  # check: only-the-burned-session-is-forgotten
        owner.state.forget_round()


def _finish(owner: Owner, message: Finish) -> Message:
    owner.state.end_run()
    return Finished(run=message.run, owner=owner.name)


# Every other message continues the round that is open.
ANSWERS: Mapping[type[Message], Callable[[Any, Any], Message]] = {
    RollCall: _answer_roll_call,
    BurnSession: _burn_session,
    BurnCertificate: _keep_certificate,
    OpenSum: rounds.open_round,
    CandidatePart: received_models.take_part,
    MixturePart: received_models.take_part,
    MergedStepPart: received_models.take_part,
    ScalesPart: received_models.take_part,
    CorrectionPart: received_models.take_part,
    Draw: verification.draw,
    CheckKeys: verification.add_shares,
    Result: receipts.sign_result,
    Receipts: receipts.keep_receipts,
    Finish: _finish,
}
