"""One owner: checks what the coordinator asks for against its own agreement, measures, and answers.

Everything an answer rests on comes from the owner's own files. The coordinator's messages choose only which agreed step
comes next; a step that was not agreed is refused before anything is computed.
"""

import logging
import secrets
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from client.ledger import Ledger
from client.settings import OwnerSettings
from client.state import OwnerState
from common import scaling
from common.agreement import SEQUENTIAL, Agreement
from common.certificates import (
    Candidate,
    body_of,
    candidates_digest,
    check_burned,
    check_receipts,
    check_result,
    sign_burned,
)
from common.domain_separation import Domain
from common.errors import ConsentError, RemoteProtocolError
from common.identity import Identity, read_identity
from common.mapped import is_finite, releasing, sha256_of
from common.messages import (
    PROTOCOL_VERSION,
    BurnCertificate,
    BurnSession,
    CandidatePart,
    CandidateReceived,
    CertificateKept,
    Finish,
    Finished,
    Message,
    OpenSum,
    Present,
    Receipts,
    ReceiptsKept,
    Result,
    ResultReceived,
    RollCall,
    SessionBurned,
)
from common.metrics import Score, metrics_layout
from common.metrics import contribution as metric_contribution
from common.scaling import SCALES, Scales
from common.settings_file import load_settings
from common.summation import SUMMATIONS, fixed_point
from common.summation.protocol import OwnerSide, SessionOver, SumTerms
from common.tensor_layout import TensorLayout

if TYPE_CHECKING:
    from client.workbench import Workbench

log = logging.getLogger("amalgram.owner")
BASE, OWN = "base", "own_at_home"  # the models every evaluation has, beside the merged candidates


class Owner:
    """One owner, built anew for each packet from its settings file and its state folder."""

    def __init__(self, settings_path: Path) -> None:
        self._home = settings_path.resolve().parent
        self.settings = load_settings(settings_path, OwnerSettings)
        self.name = self.settings.name
        self.state = OwnerState(self._home / self.settings.state)

    def answer(self, message: Message) -> Message:
        """One step. Raises an AmalgramError; then nothing has left."""
        with self.state.locked():
            return self._answer(message)

    def _answer(self, message: Message) -> Message:
        if isinstance(message, RollCall):
            return self._answer_roll_call(message)
        if isinstance(message, BurnSession):
            return self._burn_session(message)
        if isinstance(message, BurnCertificate):
            return self._keep_certificate(message)
        if isinstance(message, OpenSum):
            return self._open_sum(message)
        if isinstance(message, CandidatePart):
            return self._take_candidate(message)
        if isinstance(message, Result):
            return self._take_result(message)
        if isinstance(message, Receipts):
            return self._keep_receipts(message)
        if isinstance(message, Finish):
            self._check_run(message.run)
            self.state.end_run()
            return Finished(run=message.run, owner=self.name)
        return self._continue_sum(message)

    def check(self) -> None:
        """Look at everything this owner brings. Raises the error that a run would meet; nothing is computed."""
        if self.name not in self.agreement.owner_names:
            raise ConsentError(f"owner {self.name} is not on the agreement's roster: {self.agreement.owner_names}")
        self._check_identity()
        fixed_point.check_layout(metrics_layout(self.agreement, "test", [BASE]), len(self.agreement.owners))
        self.workbench.check()

    # --- steps ---

    def _answer_roll_call(self, message: RollCall) -> Message:
        if message.version != PROTOCOL_VERSION:
            raise RemoteProtocolError(f"the coordinator speaks version {message.version}, we speak {PROTOCOL_VERSION}")
        self._check_agreement(message.agreement_digest)
        self.check()
        self.state.start_run(message.run, message.agreement_digest)
        pending = self._ledger.pending
        body = bytes.fromhex(message.agreement_digest) + pending.encode()
        signature = self._identity.sign(Domain.SIGN_PRESENT, bytes.fromhex(message.run), body)
        return Present(run=message.run, owner=self.name, pending=pending, signature=signature)

    def _burn_session(self, message: BurnSession) -> Message:
        self._check_run(message.run)
        self._ledger.burn(message.session)
        self.state.forget_sum()
        signature = sign_burned(self._identity, self.agreement.digest(), message.session)
        return SessionBurned(session=message.session, owner=self.name, signature=signature)

    def _keep_certificate(self, message: BurnCertificate) -> Message:
        self._check_run(message.run)
        check_burned(self.agreement, message.session, message.signatures)
        ledger = self._ledger
        ledger.burn(message.session)
        self.state.forget_sum()
        ledger.release(message.session)
        return CertificateKept(session=message.session, owner=self.name)

    def _open_sum(self, message: OpenSum) -> Message:
        self._check_step(message.run, message.agreement_digest)
        terms = self._terms(message, self._layout(message))
        self._ledger.begin(message.round, message.session, message.statistic)
        self.state.forget_sum()
        vector = self.state.create_array("vector", terms.layout.size, "<f8")
        try:
            terms.layout.flatten(releasing(self._tensors(message), vector), vector)
            fixed_point.encode(terms.layout, vector, len(terms.roster))
        except BaseException:  # what was measured so far must not lie around
            self.state.delete_array("vector")
            if message.statistic == SCALES:
                self.state.delete_array("contribution")
            raise
        side, reply = self._sum_kind.open(terms, self._identity, secrets.token_bytes)
        self.state.write_json("layout", terms.layout.to_json())  # spares the next messages the workbench
        self.state.write_json("sum", {"request": asdict(message), "side": side.to_json()})
        return reply

    def _continue_sum(self, message: Message) -> Message:
        kept = self.state.read_json("sum")
        if kept is None:
            raise RemoteProtocolError(f"the coordinator sent {type(message).__name__} before a sum was opened")
        request = OpenSum(**kept["request"])
        self._check_step(request.run, request.agreement_digest)
        terms = self._terms(request, TensorLayout.from_json(self.state.read_json("layout")))
        side = self._sum_kind.from_json(kept["side"], terms, self._identity)
        # Once the survivors are signed for, no part is given any more, and the vector is deleted.
        words = np.empty(0, "<u8") if side.is_done else self.state.open_array("vector", terms.layout.size, "<u8")
        try:
            side, reply = side.answer(message, fixed_point.numbers(terms.layout, words), secrets.token_bytes)
        except SessionOver:
            self.state.forget_sum()
            raise
        # All of this is on the disk before the reply leaves: whoever starts this process again finds the same latch.
        if side.offers:
            self._ledger.offer(request.statistic, request.session, request.candidates_digest)
        if side.reveals:
            self._ledger.reveal(request.session)
        self.state.write_json("sum", {**kept, "side": side.to_json()})
        if side.is_done:
            self.state.delete_array("vector")
        if side.reveals and request.statistic == "contribution":  # before, the session can still be declared over
            self.state.delete_array("contribution")
        return reply

    def _take_result(self, message: Result) -> Message:
        self._check_run(message.run)
        check_result(self.agreement, message)
        if not self.state.has_receipt(message.run):  # of a run that has ended, the ledger knows the result
            self._check_was_tested(message)
        body = body_of(self.agreement, message)
        self._ledger.sign_result(body.hex())
        self.state.write_json("result", {**asdict(message), "signature": message.signature.hex()})
        signature = self._identity.sign(Domain.SIGN_RECEIPT, bytes.fromhex(message.run), body)
        return ResultReceived(run=message.run, owner=self.name, signature=signature)

    def _check_was_tested(self, message: Result) -> None:
        """The result is of the agreed method, and the very model that this owner was sent to test."""
        received = self._received
        if message.candidates_digest != candidates_digest(received):
            raise RemoteProtocolError("the result was reached with other candidates than those sent to this owner")
        if not self._ledger.models <= {candidates_digest(received[:count]) for count in range(len(received) + 1)}:
            raise RemoteProtocolError(
                "the result does not tell of all models that this owner was sent: sums were made of others, before the "
                "coordinator had this run forgotten"
            )
        tested = self.state.read_json("tested") or {}
        if message.model not in self.workbench.candidates(self.agreement.method):
            raise ConsentError(f"the coordinator published {message.model!r}, which is not of the agreed method")
        if tested.get(message.model) != message.model_digest:
            raise RemoteProtocolError("the coordinator published another model than the one that this owner tested")

    def _keep_receipts(self, message: Receipts) -> Message:
        self._check_run(message.run)
        kept = self.state.read_json("result")
        if kept is None:
            raise RemoteProtocolError("the coordinator sent receipts before a result")
        result = Result(**{**kept, "signature": bytes.fromhex(kept["signature"])})
        owners = check_receipts(self.agreement, result, message.signatures)
        self.state.write_receipt(
            message.run,
            {
                "agreement_digest": self.agreement.digest(),
                **kept,
                "owners": owners,
                "receipts": message.signatures.hex(),
            },
        )
        self.state.end_run()
        return ReceiptsKept(run=message.run, owner=self.name)

    def _take_candidate(self, message: CandidatePart) -> Message:
        self._check_step(message.run, message.agreement_digest)
        kept = self.state.read_json("candidate") or {}
        # Part 0 begins anew at any time: a coordinator that was started again sends its last candidate again.
        going_on = message.part > 0 and (kept.get("model"), kept.get("split")) == (message.model, message.split)
        layout = TensorLayout.from_json(kept["layout"]) if going_on else self._candidate_layout(message)
        slices = layout.part_slices(bytes_per_number=4)
        expected = kept["next_part"] if going_on else 0
        position = slices[expected]
        if (
            (message.part, message.parts) != (expected, len(slices))
            or message.payload.shape != (position.stop - position.start,)
            or message.payload.dtype != np.dtype("<f4")
        ):
            raise RemoteProtocolError(
                f"the coordinator sent part {message.part} of {message.model} out of turn or shape"
            )
        if expected == 0:
            array = self.state.create_array("candidate", layout.size, "<f4")
        else:
            array = self.state.open_array("candidate", layout.size, "<f4", writable=True)
        array[position] = message.payload
        following = {
            "model": message.model,
            "split": message.split,
            "layout": layout.to_json(),
            "next_part": expected + 1,
        }
        if expected + 1 == len(slices):
            if not is_finite(array):
                raise RemoteProtocolError(f"the coordinator sent a model {message.model} that is not finite")
            self._take_whole_candidate(message, layout, array)
            following = {}
        self.state.write_json("candidate", following)
        return CandidateReceived(run=message.run, owner=self.name, model=message.model, part=message.part)

    def _take_whole_candidate(self, message: CandidatePart, layout: TensorLayout, array: np.ndarray) -> None:
        candidate = (message.model, message.split, sha256_of(array))
        same_name = [each for each in self._received if each[:2] == candidate[:2]]
        if same_name not in ([], [candidate]):
            raise ConsentError(f"the coordinator sent a second model as {message.model}")
        if same_name:
            self.state.delete_array("candidate")
            return
        if self._ledger.has_signed:
            raise ConsentError(f"the coordinator sent the model {message.model} after the result")
        if message.split in ("prefix", SCALES):
            self.state.keep_array("candidate", under=message.model.replace(" ", "-"))
        else:
            self._score_candidate(message, layout, array)
            self.state.delete_array("candidate")
        self.state.write_json("candidates", [*self._received, candidate])

    def _candidate_layout(self, message: CandidatePart) -> TensorLayout:
        if message.split == SCALES:
            if message.model != SCALES or not self.agreement.summation.has_scales:
                raise ConsentError("the coordinator sent scales, which nobody agreed on")
            return scaling.exponents_layout(self._measured_layout())
        if message.split != "prefix":
            if message.model not in self.workbench.agreed_candidates:
                raise ConsentError(f"the coordinator sent a model {message.model!r} that was not agreed")
            return self.workbench.candidate_layout()
        method, _, number = message.model.partition(" ")
        if method not in SEQUENTIAL.intersection(self.agreement.methods):
            raise ConsentError(f"the coordinator sent a step of {method!r}, which was not agreed")
        due = self._merged_steps(method)
        last_again = due > 0 and number == str(due - 1)
        if not last_again and (number != str(due) or due >= self.workbench.count_steps(method)):
            raise RemoteProtocolError(f"the coordinator sent step {number[:10]!r} of {method}, step {due} is due")
        return self.workbench.merged_layout(method, int(number))

    def _measured_layout(self) -> TensorLayout:
        """The contribution's, once this owner has helped to open what the scales are made of: that it does once, so it
        takes no second scales. Whether it refuses them tells something of its numbers.
        """
        kept = self.state.read_json("contribution")
        opened = self.agreement.summation.kind == "plain" or self._ledger.has_revealed(SCALES)
        if kept is None or not opened:
            raise RemoteProtocolError("the coordinator goes on with scales before the sum that they are made of")
        return TensorLayout.from_json(kept)

    def _merged_steps(self, method: str) -> int:
        """How many steps of a method this owner has been sent the outcome of; the first is number 0, the averages."""
        return sum(split == "prefix" and model.startswith(f"{method} ") for model, split, _ in self._received)

    def _score_candidate(self, message: CandidatePart, layout: TensorLayout, array: np.ndarray) -> None:
        scores = self.state.read_json("scores") or {}
        digest, score = self.workbench.score_candidate(message.split, layout, array)
        if message.split == "test":
            tested = self.state.read_json("tested") or {}
            self.state.write_json("tested", tested | {message.model: digest})
        scores.setdefault(message.split, {})[message.model] = asdict(score)
        self.state.write_json("scores", scores)

    # --- checks ---

    def _check_agreement(self, digest: str) -> None:
        """The coordinator's agreement is ours, and the owner has consented to it."""
        if digest != self.agreement.digest():
            raise ConsentError(
                f"the coordinator's agreement is {digest[:16]}..., ours is {self.agreement.digest()[:16]}...: "
                "compare the two files"
            )
        if digest not in self.state.consents():
            raise ConsentError(
                f"nobody has consented to agreement {digest[:16]}... for {self.name}; "
                "read it and consent: amalgram agree OWNER.toml"
            )

    def _check_run(self, run: str) -> None:
        """The run in progress, under the agreement that it began with."""
        self.state.check_run(run, self.agreement.digest())

    def _check_step(self, run: str, digest: str) -> None:
        self._check_agreement(digest)
        self._check_run(run)

    def _check_identity(self) -> None:
        if self._identity.name != self.name or self._identity.public_key != self.agreement.roster[self.name]:
            raise ConsentError(
                f"{self._identity_path}: is not the identity that the agreement names for {self.name}; "
                "name the right file as identity, or make a new agreement with this one's .pub file"
            )

    def _terms(self, request: OpenSum, layout: TensorLayout) -> SumTerms:
        """What the sum is about, from the owner's own agreement; `request` is checked, not believed."""
        if layout.digest() != request.layout_digest:
            raise ConsentError(f"the coordinator's layout for {request.statistic} is not the one that was agreed")
        return SumTerms(
            request=request,
            layout=layout,
            roster=self.agreement.roster,
            needed_owners=self.agreement.needed_owners,
            colluders=self.agreement.colluders,
        )

    def _layout(self, request: OpenSum) -> TensorLayout:
        first = SCALES if self.agreement.summation.has_scales else "contribution"
        if request.statistic == first:
            if request.models or request.candidates_digest != candidates_digest([]):
                raise ConsentError("the coordinator asked for a contribution about models, which nobody agreed on")
            layout = self.workbench.contribution_layout()
            return scaling.measures_layout(layout) if self.agreement.summation.has_scales else layout
        if request.candidates_digest != candidates_digest(self._received):
            raise RemoteProtocolError(
                "the coordinator asked for a sum about other models than those sent to this owner"
            )
        if request.statistic == "contribution":
            if request.models or [model for model, _, _ in self._received] != [SCALES]:
                raise RemoteProtocolError("the coordinator asked for a contribution before it sent the scales, or late")
            return scaling.scaled_layout(self._measured_layout())
        named = self.workbench.step_named(request.statistic)
        if named is not None:
            method, step = named
            if request.models or self._merged_steps(method) != step.number:
                raise RemoteProtocolError(
                    f"the coordinator asked for {request.statistic} before it sent what comes first"
                )
            return self.workbench.step_layout(method, step)
        if request.statistic not in ("validation", "test"):
            raise ConsentError(f"the coordinator asked for {request.statistic}, which nobody agreed on")
        names = request.models.split(",")
        unknown = [name for name in names if name not in (BASE, OWN, *self.workbench.agreed_candidates)]
        if unknown or len(set(names)) != len(names):
            raise ConsentError("the coordinator asked for the figures of a model that was not agreed")
        return metrics_layout(self.agreement, request.statistic, names)

    # --- what an answer rests on ---

    def _tensors(self, request: OpenSum) -> Iterator[tuple[str, NDArray]]:
        """What this owner adds to a sum, in the order of its layout."""
        if request.statistic == "contribution":
            return self._scaled() if self.agreement.summation.has_scales else self.workbench.contribution()
        if request.statistic == SCALES:
            return self._measures()
        named = self.workbench.step_named(request.statistic)
        if named is not None:
            return self.workbench.step_contribution(*named)
        scores = self._scores(request.statistic, request.models.split(","))
        return metric_contribution(self.agreement, self.name, request.statistic, scores)

    def _measures(self) -> Iterator[tuple[str, NDArray]]:
        """What the scales are made of. The contribution is measured now, once, and kept for the sum after this one."""
        layout = self.workbench.contribution_layout()
        contribution = self.state.create_array("contribution", layout.size, "<f8")
        layout.flatten(releasing(self.workbench.contribution(), contribution), contribution)
        self.state.write_json("contribution", layout.to_json())
        return releasing(scaling.measures(layout, contribution), contribution)

    def _scaled(self) -> Iterator[tuple[str, NDArray]]:
        """The contribution on the scales that all owners were sent."""
        layout = self._measured_layout()
        contribution = self.state.open_array("contribution", layout.size, "<f8")
        exponents = self.state.open_array(SCALES, scaling.exponents_layout(layout).size, "<f4")
        scales = Scales(layout, np.array(exponents))
        scales.check(contribution, len(self.agreement.owners))
        return releasing(scaling.scaled(scales, contribution), contribution)

    def _scores(self, split: str, models: list[str]) -> dict[str, Score]:
        kept = (self.state.read_json("scores") or {}).get(split, {})
        received = {(model, tested_on) for model, tested_on, _ in self._received}
        scores = {}
        for name in models:
            if name == BASE:
                scores[name] = self.workbench.score_base(split)
            elif name == OWN:
                scores[name] = self.workbench.score(self.workbench.own_model(), split)
            elif name in kept and (name, split) in received:
                scores[name] = Score(**kept[name])
            else:
                raise RemoteProtocolError(f"the coordinator asked for the figures of {name} before it sent the model")
        return scores

    @cached_property
    def agreement(self) -> Agreement:
        return load_settings(self._home / self.settings.agreement, Agreement)

    @cached_property
    def workbench(self) -> "Workbench":
        """The models and the rows."""
        from client.workbench import Workbench  # torch: several seconds, which most messages need not wait

        return Workbench(self.settings, self._home, self.agreement, self.state)

    @property
    def _identity_path(self) -> Path:
        return self._home / (self.settings.identity or f"{self.name}.key")

    @cached_property
    def _identity(self) -> Identity:
        return read_identity(self._identity_path)

    @property
    def _received(self) -> list[Candidate]:
        """Every candidate that this owner was sent in this run."""
        return [(model, split, digest) for model, split, digest in self.state.read_json("candidates") or []]

    @property
    def _ledger(self) -> Ledger:
        return self.state.ledger(self.agreement.digest())

    @property
    def _sum_kind(self) -> type[OwnerSide]:
        return SUMMATIONS[self.agreement.summation.kind].owner
