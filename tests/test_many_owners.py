"""What grows with the owners grows no faster than they do, and stays readable."""

import logging
from collections.abc import Iterator, Mapping

import pytest

from common.agreement import Agreement, OwnerEntry
from common.messages import Finish, Finished, Packet
from common.text import MAX_NAMES, some_of
from server.exchange import SHOWN_TIMES, Exchange

RUN = "00" * 32


class FinishingChannel:
    """All nodes answer Finish, in turn."""

    def wait_for_nodes(self, count: int, timeout_seconds: float) -> list[int]:
        return list(range(count))

    def exchange(self, requests: Mapping[int, Packet], timeout_seconds: float) -> Iterator[tuple[int, Packet | None]]:
        for node in requests:
            yield node, (Finished(run=RUN, owner=f"owner{node}"),)


def progress_of(agreement: Agreement, count: int, caplog: pytest.LogCaptureFixture) -> list[tuple[int, int]]:
    """(owners that have answered, owners that have not) of each line about the progress of one step."""
    owners = tuple(OwnerEntry(name=f"owner{number}") for number in range(count))
    many = agreement.model_copy(update={"owners": owners})
    exchange = Exchange(channel=FinishingChannel(), agreement=many, steps=[], num_steps=1)
    for number, owner in enumerate(many.owner_names):
        exchange.join(owner, number)
    exchange.begin_step("finish", "finish")
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger="amalgram.coordinator"):
        exchange.ask_all(Finish(run=RUN))
    told = [getattr(record, "about", {}) for record in caplog.records]
    return [(len(each["done"]), len(each["waiting_for"])) for each in told if "waiting_for" in each]


def test_of_few_owners_every_answer_is_shown(agreement: Agreement, caplog: pytest.LogCaptureFixture) -> None:
    assert progress_of(agreement, 20, caplog) == [(done, 20 - done) for done in range(21)]


def test_of_many_owners_the_progress_has_so_many_lines_and_the_last_ones_are_all_named(
    agreement: Agreement, caplog: pytest.LogCaptureFixture
) -> None:
    shown = progress_of(agreement, 1000, caplog)
    assert len(shown) <= SHOWN_TIMES + MAX_NAMES + 2
    assert shown[0] == (0, 1000)
    assert shown[-MAX_NAMES - 1 :] == [(1000 - left, left) for left in range(MAX_NAMES, -1, -1)]


def test_a_sentence_names_a_dozen_owners_and_counts_the_rest() -> None:
    names = [f"owner{number}" for number in range(1000)]
    assert some_of(names[:MAX_NAMES]) == ", ".join(names[:MAX_NAMES])
    assert some_of(names) == f"{', '.join(names[:MAX_NAMES])} and 988 more"
    assert some_of([]) == ""
