"""What the coordinator noted of a run, in the report's words: rounds, deliveries, and what each step cost."""

from common.schedule import Delivery, Schedule
from server import checkpoint
from server.coordinator import Coordinator
from server.report.outcome import OpenedRound
from server.report.report import OwnerCost, Sent, SentCandidate, SentCorrection, SentMergedStep, SentScales, Step


def opened_rounds(coordinator: Coordinator) -> tuple[OpenedRound, ...]:
    """Everything that was learned from the owners, in order."""
    return tuple(
        OpenedRound(round=each.round, owners=each.owners, destroyed=each.destroyed) for each in coordinator.sums
    )


def sent_deliveries(schedule: Schedule, deliveries: list[checkpoint.SavedDelivery]) -> tuple[Sent, ...]:
    """Everything that was sent to the owners, in order."""
    return tuple(_sent(schedule.events[each.position], each) for each in deliveries)


def _sent(delivery: object, saved: checkpoint.SavedDelivery) -> Sent:
    assert isinstance(delivery, Delivery)  # the coordinator sends nothing else
    digest, num_bytes, owners, method = saved.digest, saved.bytes, saved.owners, delivery.method
    if delivery.kind == "correction":
        return SentCorrection(title=delivery.name, digest=digest, bytes=num_bytes, owners=owners)
    if method is None:
        return SentScales(title=delivery.name, digest=digest, bytes=num_bytes, owners=owners)
    if delivery.split is None:
        step = delivery.step or 0
        return SentMergedStep(
            title=delivery.name, method=method, step=step, digest=digest, bytes=num_bytes, owners=owners
        )
    return SentCandidate(
        title=saved.model,
        method=method,
        candidate=saved.model,
        split=delivery.split,
        digest=digest,
        bytes=num_bytes,
        owners=owners,
    )


def step_costs(steps: list[checkpoint.Step]) -> tuple[Step, ...]:
    """What each step cost, in order."""
    return tuple(
        Step(
            title=step.name,
            phase=step.phase,
            seconds=round(step.seconds, 3),
            # Over all owners: how long one owner took tells how many rows it has.
            waited_seconds=round(sum(cost.waited_seconds for cost in step.by_owner.values()), 3),
            bytes_sent=step.bytes_sent,
            bytes_received=step.bytes_received,
            by_owner={
                owner: OwnerCost(messages=cost.messages, bytes_sent=cost.bytes_sent, bytes_received=cost.bytes_received)
                for owner, cost in step.by_owner.items()
            },
        )
        for step in steps
    )
