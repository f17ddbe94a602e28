"""The rounds of an agreement: which secure sums are made, in which order, and what the coordinator sends between them.

Coordinator and owners each make the schedule from their own copy of the agreement, so it is never negotiated. The
coordinator works through it. An owner refuses everything that is not the next event of its own schedule. The consent
text, the progress display and the report print it.

    scales round, scales                    only if contributions are summed in 32 bits (scaling.py)
    contribution round                      what all methods need first
    merged step 0, step round, merged ...   for every multi-round method; the last round is not followed by a step
    candidates, metrics round               on validation examples, for the methods that sweep a hyperparameter
    candidates, metrics round               on test examples, the chosen candidate of every method. Where merges are
                                            verified, what has no sweep is sent with the candidates of the sweeps, so
                                            that one check is about all
    mixtures, metrics round, ...            of a search, on validation examples, between these candidates and that round

Unless the agreement turns it off, owners verify what they are sent before they measure anything on it: a correction and
a check round come before every step round and metrics round (common/verification.py). A check is made while the next
round is set up (summation/pairwise.py). Then all owners learn the totals of metrics, too.

An event is known by its `position`. Agreement, position and layout together say exactly what is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal

from common import scaling
from common.agreement import COORDINATOR, Agreement
from common.errors import LocalProtocolError, RemoteProtocolError, SettingsError
from common.merge_methods import METHODS, contribution_layout, kind_of, tensor_kinds
from common.merge_methods.method import Method, MultiRoundMethod, SingleRoundMethod, Step
from common.merge_methods.search import SEARCH, generations, mixture_layout
from common.merge_methods.terms import Hyperparameters, MergeSettings
from common.metrics import BASE, METRIC_KINDS, OWN_AT_HOME, Split, metric_kind, metrics_layout
from common.models.delta import candidate_layout, delta_layout, solved_layout
from common.models.plan import MergePlan
from common.scaling import SCALE_KINDS
from common.tensor_layout import PART_BYTES, TensorLayout
from common.verification import CHECK_KINDS, Claim, Shortener, check_layout, correction_layout

VERIFICATION = "verification"
RoundKind = Literal["scales", "contribution", "step", "check", "metrics"]
DeliveryKind = Literal["scales", "merged_step", "candidate", "mixture", "correction"]


@dataclass(frozen=True, kw_only=True)
class Content:
    """Some of the tensors of a round: their kind, what they hold in words, how many numbers they are."""

    kind: str
    meaning: str
    numbers: int
    tensors: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Round:
    """One secure sum, from opening to total. `models`: the models that a metrics round is about.

    `claims`: what a check proves. `is_open`: every owner adds up the total by itself.
    """

    position: int
    kind: RoundKind
    layout: TensorLayout
    method: str | None = None
    step: Step | None = None
    split: Split | None = None
    models: tuple[str, ...] = ()
    claims: tuple[Claim, ...] = ()
    is_open: bool = False

    @property
    def learned_by(self) -> tuple[str, ...]:
        """Who learns the total."""
        return (COORDINATOR, "owners") if self.is_open else (COORDINATOR,)

    @property
    def title(self) -> str:
        """What is summed, for people: `contributions`."""
        if self.kind == "step" and self.method is not None and self.step is not None:
            return f"{METHODS[self.method].title} step {self.step.number}"
        if self.kind == "metrics":
            return f"{self.split} metrics"
        return {"scales": "scales", "contribution": "contributions", "check": "check shares"}[self.kind]

    @property
    def name(self) -> str:
        """What progress, log lines and errors call the round."""
        return f"sum of {self.title}"

    @property
    def phase(self) -> str:
        """What the report counts the round's cost under: all steps of a method are one phase."""
        if self.kind == "check":
            return VERIFICATION
        return self.name if self.method is None else f"rounds of {METHODS[self.method].title}"

    def contents(self, their: str) -> tuple[Content, ...]:
        """What is in one owner's vector, by kind of tensor. `their`: `your`, or `the owner's`."""
        metrics = self.kind == "metrics"
        meanings = METRIC_KINDS if metrics else tensor_kinds() | SCALE_KINDS | CHECK_KINDS
        found: dict[str, list[tuple[str, int]]] = {}
        for entry in self.layout.entries:
            kind = metric_kind(entry.name) if metrics else kind_of(entry.name)
            found.setdefault(kind, []).append((entry.name, entry.size))
        return tuple(
            Content(
                kind=kind,
                meaning=meanings[kind].format(their=their),
                numbers=sum(size for _, size in tensors),
                tensors=tuple(name for name, _ in tensors),
            )
            for kind, tensors in found.items()
        )


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """What the coordinator sends every owner, as float32 in `layout`, for what follows to be measured with.

    scales       the scales on which contributions are summed
    merged_step  what step `step` of a multi-round method merged; number 0 is what it merged before its first round
    candidate    a merged model, to be judged on the examples of `split`; `names` has those that may be sent. What its
                 method's function made, and the factors to which an adapter is cut, follow the whole model
    mixture      how much of which merged delta each group of blocks takes, for the same (merge_methods/search.py)
    correction   what rounding took from the models that the check after it is about; `claims` are the check's
    """

    position: int
    kind: DeliveryKind
    layout: TensorLayout
    method: str | None = None
    step: int | None = None
    split: Split | None = None
    names: tuple[str, ...] = ("",)
    claims: tuple[Claim, ...] = ()

    @property
    def name(self) -> str:
        """What progress, log lines and errors call the delivery."""
        if self.kind == "merged_step" and self.method is not None:
            return f"{METHODS[self.method].title}, merged before step {(self.step or 0) + 1}"
        if self.kind in ("candidate", "mixture"):
            return f"{self.method} candidate for {self.split}"
        return self.kind if self.kind == "correction" else "scales"

    @property
    def phase(self) -> str:
        """What the report counts the delivery's cost under."""
        if self.kind == "mixture":
            return "mixtures"
        if self.kind == "candidate":
            return "candidates to validate" if self.split == "validation" else "candidates to test"
        if self.kind == "correction":
            return VERIFICATION
        return "scales" if self.kind == "scales" else "merged layers"


Event = Round | Delivery


@dataclass(frozen=True)
class Schedule:
    """The events of an agreement, each at its own position."""

    events: tuple[Event, ...]
    owners_may_drop_out: bool = False

    @cached_property
    def rounds(self) -> tuple[Round, ...]:
        return tuple(event for event in self.events if isinstance(event, Round))

    @property
    def has_grams(self) -> bool:
        """Whether Gram matrices of layers' inputs are summed."""
        return any(kind_of(entry.name) == "gram" for each in self.rounds for entry in each.layout.entries)

    def round_at(self, position: int) -> Round:
        """Raises RemoteProtocolError if the coordinator asked for something else than a round."""
        event = self._at(position)
        if not isinstance(event, Round):  # check: position-is-a-round
            raise RemoteProtocolError(
                f"the coordinator opened a sum at position {position}, where it sends {event.name}"
            )
        return event

    def delivery_at(self, position: int, kind: DeliveryKind) -> Delivery:
        """Raises RemoteProtocolError if the coordinator sent something else than was agreed there."""
        event = self._at(position)
        if not isinstance(event, Delivery) or event.kind != kind:  # check: position-is-that-delivery
            raise RemoteProtocolError(
                f"the coordinator sent a {kind.replace('_', ' ')} at position {position}, which is for {event.name}"
            )
        return event

    def check_at(self, position: int) -> Round | None:
        """The check at `position`; None for any other event. Raises RemoteProtocolError beyond the schedule."""
        event = self._at(position)
        return event if isinstance(event, Round) and event.kind == "check" else None

    def of_kind(self, *kinds: DeliveryKind) -> tuple[Delivery, ...]:
        """Every delivery of these kinds, in order."""
        return tuple(event for event in self.events if isinstance(event, Delivery) and event.kind in kinds)

    def is_checked(self, delivery: Delivery) -> bool:
        """Whether a check proves this delivery, and not an earlier one that is the same bit for bit."""
        return any(delivery.position == claim.delivery for each in self.rounds for claim in each.claims)

    def last_check_of(self, source: int) -> int | None:
        """The position of the last check that needs what was contributed to the round at `source`; None if none does.

        What the scales were made of is needed as long as the contribution.
        """
        checks = [
            each.position
            for each in self.rounds
            if any(source == claim.source or self.events[source].kind == "scales" for claim in each.claims)
        ]
        return max(checks, default=None)

    def find(self, kind: RoundKind, *, split: Split | None = None) -> Round:
        """The round of a kind that an agreement has once."""
        for each in self.rounds:
            if each.kind == kind and each.split == split:
                return each
        raise LocalProtocolError(f"schedule: this agreement has no round of kind {kind}")

    def steps(self, method: str) -> tuple[Round, ...]:
        """The step rounds of a multi-round method."""
        return tuple(each for each in self.rounds if each.kind == "step" and each.method == method)

    def deliveries(
        self, kind: DeliveryKind, *, method: str | None = None, split: Split | None = None
    ) -> tuple[Delivery, ...]:
        """The deliveries of a kind, in order."""
        return tuple(
            event
            for event in self.events
            if isinstance(event, Delivery) and (event.kind, event.method, event.split) == (kind, method, split)
        )

    def delivery_of(self, model: str, split: Split) -> Delivery:
        """The delivery of a model that a metrics round names: by candidate on validation, by method on test."""
        for event in self.events:
            if not isinstance(event, Delivery) or event.kind not in ("candidate", "mixture") or event.split != split:
                continue
            if model == (event.method if split == "test" else event.names[0]):
                return event
        raise LocalProtocolError(f"schedule: no candidate {model!r} is delivered for {split}")

    def check_follows(self, position: int, begun: int | None, *, is_complete: bool) -> None:
        """Raise RemoteProtocolError unless the event at `position` is the one that was begun last, or the next one.

        The next one must wait until the one begun last `is_complete`. `begun` is None before the first event. A check
        is never due itself: it is made while the round after it is set up. An owner that may drop out may also come
        back: the rounds that were summed without it are not due any more.
        """
        following = 0 if begun is None else begun + 1
        first = following if is_complete or begun is None else begun  # check: last-event-is-complete
        is_check = first < len(self.events) and self.check_at(first) is not None
        due = first + 1 if is_check else first
        if position in (begun, due) or (self.owners_may_drop_out and self._has_only_rounds(first, position)):
            return
        expected = self.events[due].name if due < len(self.events) else "nothing"
        raise RemoteProtocolError(f"the coordinator went on with {self._at(position).name}, but {expected} is due")

    def _has_only_rounds(self, start: int, stop: int) -> bool:
        only_rounds = all(_may_be_missed(event) for event in self.events[start:stop])  # check: no-delivery-is-missed
        return start < stop and only_rounds

    def _at(self, position: int) -> Event:
        if position >= len(self.events):  # check: position-is-in-the-schedule
            raise RemoteProtocolError(f"the coordinator named event {position} of a schedule of {len(self.events)}")
        return self.events[position]


def schedule_of(agreement: Agreement, plan: MergePlan) -> Schedule:
    """The schedule that an agreement makes of a base model's merge plan."""
    settings = agreement.merge_settings(plan)
    events: list[Event] = []
    shortener = Shortener()

    def add_round(kind: RoundKind, layout: TensorLayout, **what: object) -> None:
        events.append(Round(position=len(events), kind=kind, layout=layout, **what))  # type: ignore[arg-type]

    def add_open_round(kind: RoundKind, layout: TensorLayout, **what: object) -> None:
        if agreement.is_verified:
            _check_can_be_relayed(layout, len(agreement.owners))
        add_round(kind, layout, is_open=agreement.is_verified, **what)

    def add_delivery(kind: DeliveryKind, layout: TensorLayout, **what: object) -> None:
        events.append(Delivery(position=len(events), kind=kind, layout=layout, **what))  # type: ignore[arg-type]

    def add_metrics(split: Split, models: tuple[str, ...]) -> None:
        add_open_round("metrics", metrics_layout(agreement, split, models), split=split, models=models)

    def add_check(claims: list[Claim]) -> None:
        given = [claim for claim in claims if claim.equations]
        for claim in given:
            _check_covers(claim, events, plan)
        if agreement.is_verified and given:
            proved = shortener.shorten(given)
            for claim in given:
                if isinstance(sent := events[claim.delivery], Delivery) and sent.kind == "merged_step":
                    shortener.keep(claim)
            add_delivery("correction", correction_layout(proved), claims=proved)
            add_open_round("check", check_layout(proved), claims=proved)

    layout = contribution_layout(agreement.methods, settings)
    if agreement.summation.has_scales:
        add_round("scales", scaling.measures_layout(layout))
        add_delivery("scales", scaling.exponents_layout(layout))
    add_round("contribution", scaling.scaled_layout(layout) if agreement.summation.has_scales else layout)

    contributed = len(events) - 1
    last_steps: dict[str, int] = {}  # method -> the position of its last round
    for method in agreement.multi_round_methods:
        add_delivery("merged_step", _merged_layout(method, settings, 0), method=method.name, step=0)
        start = method.start_equations(settings)
        add_check([Claim(delivery=len(events) - 1, source=contributed, equations=start)])
        *before, last = method.steps(settings)
        for step in before:
            add_round("step", method.step_layout(settings, step), method=method.name, step=step)
            merged = _merged_layout(method, settings, step.number)
            add_delivery("merged_step", merged, method=method.name, step=step.number)
            equations = method.step_equations(settings, step, None)
            add_check([Claim(delivery=len(events) - 1, source=len(events) - 2, equations=equations)])
        last_steps[method.name] = len(events)
        add_round("step", method.step_layout(settings, last), method=method.name, step=last)

    def claim_of(method_name: str, hyperparameter: float | None) -> Claim:
        """What is to be proved of a candidate that was added last."""
        method, position = METHODS[method_name], len(events) - 1
        if not isinstance(method, MultiRoundMethod):
            # What is trained on predictions has none, and rests on the coordinator.
            equations = method.equations(settings, hyperparameter) if isinstance(method, SingleRoundMethod) else ()
            return Claim(delivery=position, source=contributed, equations=equations)
        *_, last = method.steps(settings)
        new = method.step_names(settings, last)
        steps = [each for each in events if isinstance(each, Delivery) and each.kind == "merged_step"]
        sent = {
            entry.name: each.position for each in steps if each.method == method_name for entry in each.layout.entries
        }
        return Claim(
            delivery=position,
            source=last_steps[method_name],
            equations=method.step_equations(settings, last, hyperparameter),
            known=tuple((name, sent[name]) for name in plan.changed if name not in new),
        )

    candidates = {name: tuple(agreement.agreed(METHODS[name])) for name in agreement.methods if name != SEARCH.name}
    swept = {method: names for method, names in candidates.items() if len(names) > 1}
    others = {method: names for method, names in candidates.items() if method not in swept}

    def add_candidates(of: Mapping[str, tuple[str, ...]]) -> list[Claim]:
        """Those that are tested as they are, and what is to be proved of them."""
        claims = []
        for method_name, names in of.items():
            layout = method_layout(METHODS[method_name], settings)
            add_delivery("candidate", layout, method=method_name, split="test", names=names)
            if method_name in others:  # of a sweep, what was validated is sent again, bit for bit
                claims.append(claim_of(method_name, agreement.agreed(METHODS[method_name])[names[0]]))
        return claims

    claims = []
    for method_name, names in swept.items():
        for name in names:
            layout = method_layout(METHODS[method_name], settings)
            add_delivery("candidate", layout, method=method_name, split="validation", names=(name,))
            claims.append(claim_of(method_name, agreement.agreed(METHODS[method_name])[name]))
    early: Mapping[str, tuple[str, ...]] = {}
    if swept and agreement.is_verified:  # a check costs each owner a message, so the same one is about the others
        position = len(events)
        both = [*claims, *add_candidates(others)]
        if _can_be_relayed(check_layout(shortener.shorten(both)), len(agreement.owners)):
            early, claims = others, both
        else:
            del events[position:]  # two checks, then
    if swept:
        add_check(claims)
        add_metrics("validation", tuple(name for names in swept.values() for name in names))
    claims = add_candidates({method: names for method, names in candidates.items() if method not in early})
    add_check(claims)
    if agreement.searches:
        search = METHODS[SEARCH.name]
        mixture, mixtures = method_layout(search, settings), tuple(agreement.agreed(search))
        for numbers in generations(SEARCH.hyperparameters(settings)):
            for number in numbers:
                add_delivery("mixture", mixture, method=SEARCH.name, split="validation", names=(mixtures[number],))
            add_metrics("validation", tuple(mixtures[number] for number in numbers))
        add_delivery("mixture", mixture, method=SEARCH.name, split="test", names=mixtures)
    add_metrics("test", (BASE, OWN_AT_HOME, *agreement.methods))
    return Schedule(
        tuple(events),
        owners_may_drop_out=agreement.needed_owners < len(agreement.owners),  # check: dropouts-are-agreed
    )


def method_layout(method: Method[Hyperparameters], settings: MergeSettings) -> TensorLayout:
    """How a method's candidates travel."""
    if isinstance(method, SingleRoundMethod):
        return candidate_layout(settings.plan, method.beside(settings), method.applied(settings))
    if method is SEARCH:
        return mixture_layout(settings.plan, SEARCH.hyperparameters(settings))
    return candidate_layout(settings.plan)


def _may_be_missed(event: Event) -> bool:
    """Whether an owner that dropped out may go on without it: what was not verified is not measured on."""
    return isinstance(event, Round) and event.kind != "check"  # check: no-check-is-missed


def _check_can_be_relayed(layout: TensorLayout, num_owners: int) -> None:
    """Raise SettingsError if one message cannot hold the vectors of all owners in a sum that each of them opens.

    Otherwise that would show only once every owner has contributed.
    """
    if not _can_be_relayed(layout, num_owners):  # check: opened-sums-fit-a-message
        num_bytes = layout.num_bytes * num_owners
        raise SettingsError(
            f"verification: to check all models at once, each of {num_owners} owners is sent {num_bytes / 1e6:.0f} MB; "
            f"one message holds at most {PART_BYTES / 1e6:.0f} MB",
            hint="try fewer hyperparameters, compare fewer methods, or agree on [verification] required = false",
        )


def _can_be_relayed(layout: TensorLayout, num_owners: int) -> bool:
    return layout.num_bytes * num_owners <= PART_BYTES


def _check_covers(claim: Claim, events: list[Event], plan: MergePlan) -> None:
    """Raise LocalProtocolError unless every number of a delivery is in an equation, or known: a method's mistake."""
    numbers = sum(rows * columns for rows, columns in (each.shape for each in claim.equations))
    numbers += sum(prod(plan.shapes[name]) for name, _ in claim.known)
    sent = solved_layout(events[claim.delivery].layout).size
    if numbers != sent:
        raise LocalProtocolError(
            f"schedule: the equations of {events[claim.delivery].name} are about {numbers} of its {sent} numbers"
        )


def _merged_layout(method: MultiRoundMethod[Hyperparameters], settings: MergeSettings, number: int) -> TensorLayout:
    return delta_layout(settings.plan, method.merged_names(settings, number))
