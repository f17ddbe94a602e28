"""A run that is killed, at the coordinator or at an owner, at any message: the same command goes on as ever."""

import os
import random
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import server.checkpoint
from common.errors import SettingsError, TooFewOwners
from common.messages import (
    Acknowledgements,
    BurnSession,
    CandidatePart,
    KeyShares,
    Message,
    OpenSum,
    Receipts,
    Result,
    RollCall,
    SurvivorList,
)
from server.checkpoint import Checkpoint
from server.merge import CHECKPOINT, run_merge
from server.report.report import read_report
from tests.support.parties import OwnersChannel, Parties, consortium_in_32_bits, parties_of


class Killed(BaseException):
    """Stands for kill -9: nothing of the killed process runs after it."""


class Faulty(OwnersChannel):
    """After some exchanges, in the middle of one: the coordinator is killed before or after some owner answers, or that
    owner is killed after its work, so that its answer is lost.
    """

    def __init__(self, files: Mapping[str, Path], chance: random.Random) -> None:
        super().__init__(files)
        self.last = chance.randint(1, 12)
        self.victim = chance.randrange(len(self.files))
        self.fault = chance.choice(("before", "after", "owner"))

    def answer(self, node: int, request: Message) -> Message | None:
        strikes = len(self.asked) == self.last and node == self.victim
        if strikes and self.fault == "before":
            raise Killed
        answer = super().answer(node, request)
        if strikes and self.fault == "after":
            raise Killed
        return None if strikes else answer


class KilledAt(OwnersChannel):
    """The coordinator is killed when it has sent one kind of message to the first owners."""

    def __init__(self, files: Mapping[str, Path], kind: type[Message], reached: int) -> None:
        super().__init__(files)
        self.kind, self.reached = kind, reached

    def answer(self, node: int, request: Message) -> Message | None:
        if isinstance(request, self.kind) and node == self.reached:
            raise Killed
        return super().answer(node, request)


@pytest.fixture(scope="module")
def consortium(reviews_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, merged by methods of one sum, of several, and with sweeps."""
    folder = tmp_path_factory.mktemp("resume") / "consortium"
    shutil.copytree(reviews_folder, folder, ignore=shutil.ignore_patterns("output"))
    path = folder / "agreement.toml"
    text = path.read_text().replace('method = "regmean"', 'method = "regmean_plus_plus"')
    text = text.replace('["average", "task_arithmetic", "fisher"]', '["regmean", "refit"]')
    path.write_text(text)
    return folder


@pytest.fixture
def one_may_drop_out(reviews_folder: Path, tmp_path: Path) -> Iterator[Parties]:
    """Four owners of whom three are enough, and a method of one sum."""
    consortium = tmp_path / "consortium"
    shutil.copytree(reviews_folder, consortium, ignore=shutil.ignore_patterns("output"))
    shutil.copytree(consortium / "data" / "hotel", consortium / "data" / "inn")
    (consortium / "inn.toml").write_text((consortium / "hotel.toml").read_text().replace("hotel", "inn"))
    path = consortium / "agreement.toml"
    text = path.read_text().replace("# min_owners = 3", "min_owners = 3").replace("alphas = [0.1, 0.5, ", "alphas = [")
    path.write_text(text.replace('["average", "task_arithmetic", "fisher"]', "[]") + '\n[[owners]]\nname = "inn"\n')
    output = tmp_path / "output"
    output.mkdir()
    (output / ".amalgram").touch()
    with parties_of(consortium, output) as made:
        yield made


@pytest.fixture
def several_sums(consortium: Path, tmp_path: Path) -> Iterator[Parties]:
    (tmp_path / ".amalgram").touch()
    with parties_of(consortium, tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(consortium: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run publishes that nothing happened to."""
    output = tmp_path_factory.mktemp("undisturbed")
    (output / ".amalgram").touch()
    with parties_of(consortium, output) as made:
        run_merge(made.coordinator, OwnersChannel(made.files))
        return published(made)


def published(parties: Parties) -> dict[str, Any]:
    report = read_report(parties.output)
    return {"model": report.digests.model, "evaluation": report.evaluation, "layers": report.layers}


def start_until_done(parties: Parties, channels: Iterator[OwnersChannel]) -> int:
    """The same command again and again; how many times it was needed."""
    for starts, channel in enumerate(channels, 1):
        try:
            run_merge(parties.coordinator, channel)
        except (Killed, TooFewOwners):
            continue
        return starts
    raise AssertionError


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))])
def test_a_run_that_is_killed_again_and_again_publishes_what_an_undisturbed_one_does(
    several_sums: Parties, undisturbed: dict[str, Any], seed: int
) -> None:
    chance = random.Random(seed)
    starts = start_until_done(several_sums, (Faulty(several_sums.files, chance) for _ in range(200)))
    assert starts > 5
    assert published(several_sums) == undisturbed
    assert not (several_sums.output / CHECKPOINT).exists()


def test_a_coordinator_killed_when_some_owners_have_their_message_goes_on(
    several_sums: Parties, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masked parts are in; a session is half open; a candidate is half out; a result is signed by one; by all.
    With its sums on the disk, where the undisturbed one had them in memory."""
    monkeypatch.setattr(server.checkpoint, "MOST_BYTES_IN_MEMORY", 1000)
    for kind in (KeyShares, Acknowledgements, CandidatePart, Result, Receipts):
        with pytest.raises(Killed):
            run_merge(several_sums.coordinator, KilledAt(several_sums.files, kind, 1))
    again = OwnersChannel(several_sums.files)
    run_merge(several_sums.coordinator, again)
    assert again.kinds == [(RollCall,), (Result,), (Receipts,)]
    assert published(several_sums) == undisturbed


@pytest.fixture
def in_32_bits(reviews_folder: Path, tmp_path: Path) -> Iterator[Parties]:
    consortium = consortium_in_32_bits(reviews_folder, tmp_path / "consortium", alphas="[0.9]")
    output = tmp_path / "output"
    output.mkdir()
    (output / ".amalgram").touch()
    with parties_of(consortium, output) as made:
        yield made


class KilledInSum(KilledAt):
    """As KilledAt, where the last sum that was begun since the coordinator started is of one statistic."""

    def __init__(self, files: Mapping[str, Path], kind: type[Message], reached: int, statistic: str) -> None:
        super().__init__(files, kind, reached)
        self.statistic = statistic

    def answer(self, node: int, request: Message) -> Message | None:
        opened = (message for packet in self.asked for message in packet if isinstance(message, OpenSum))
        begun = ["", *(message.statistic for message in opened)]
        if begun[-1] != self.statistic:
            return OwnersChannel.answer(self, node, request)
        return super().answer(node, request)


def test_a_run_in_32_bits_goes_on_within_and_between_its_two_sums(in_32_bits: Parties) -> None:
    """Owners measure once, for both sums. A second one whose survivors some have signed for is declared over, and what
    they measured is there for the next.
    """
    for kind, reached, statistic in (
        (Acknowledgements, 1, "scales"),
        (CandidatePart, 1, "contribution"),  # the scales, ahead of the sum that is made on them
        (SurvivorList, 2, "contribution"),
        (Acknowledgements, 1, "contribution"),
    ):
        with pytest.raises(Killed):
            run_merge(in_32_bits.coordinator, KilledInSum(in_32_bits.files, kind, reached, statistic))
    run_merge(in_32_bits.coordinator, OwnersChannel(in_32_bits.files))
    report = read_report(in_32_bits.output)
    assert [(each.kind, each.split) for each in report.rounds] == [
        ("scales", None),
        ("contribution", None),
        ("metrics", "test"),
    ]
    assert [each.destroyed for each in report.rounds] == [True, True, False]
    assert report.rounds[0].owners == report.rounds[1].owners
    assert not any((in_32_bits.folder / "state" / name / "run").exists() for name in ("hotel", "cinema", "phones"))


class LostAt(KilledAt):
    """As KilledAt; and one owner is lost for this start when it has another kind of message before it."""

    def __init__(self, files: Mapping[str, Path], kind: type[Message], lost_at: type[Message]) -> None:
        super().__init__(files, kind, 0)
        self.lost_at = lost_at

    def answer(self, node: int, request: Message) -> Message | None:
        if isinstance(request, self.lost_at) and node == 1:
            return None
        return super().answer(node, request)


def test_an_owner_that_a_sum_was_opened_without_is_back_when_the_run_goes_on(one_may_drop_out: Parties) -> None:
    """To that owner the session is still pending; the coordinator has its total and asks nobody to declare it over."""
    with pytest.raises(Killed):
        run_merge(one_may_drop_out.coordinator, LostAt(one_may_drop_out.files, CandidatePart, Acknowledgements))
    again = OwnersChannel(one_may_drop_out.files)
    run_merge(one_may_drop_out.coordinator, again)
    assert (BurnSession,) not in again.kinds
    assert read_report(one_may_drop_out.output).owners


def test_what_is_published_is_neither_made_nor_removed_again(several_sums: Parties) -> None:
    run_merge(several_sums.coordinator, OwnersChannel(several_sums.files))
    before = published(several_sums)
    channel = OwnersChannel(several_sums.files)
    with pytest.raises(SettingsError, match="holds the result of this agreement already"):
        run_merge(several_sums.coordinator, channel)
    assert channel.asked == []
    assert published(several_sums) == before


def test_totals_are_readable_by_the_coordinator_alone_and_gone_with_another_agreement(several_sums: Parties) -> None:
    folder = several_sums.output / CHECKPOINT
    with pytest.raises(Killed):
        run_merge(several_sums.coordinator, KilledAt(several_sums.files, CandidatePart, 0))
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, *sorted(folder.iterdir()))] == [0o700, 0o600, 0o600]
    kept = Checkpoint.open(folder, several_sums.agreement.digest())
    assert Checkpoint.open(folder, "ab" * 32).run != kept.run
    assert sorted(path.name for path in folder.iterdir()) == ["run.json"]


def test_a_large_sum_lies_on_the_disk_in_a_file_that_goes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.checkpoint, "MOST_BYTES_IN_MEMORY", 1000)
    checkpoint = Checkpoint(folder=tmp_path, agreement_digest="ab" * 32)
    assert not isinstance(checkpoint.zeros(125), np.memmap)
    one, other = checkpoint.zeros(3_000_000), checkpoint.zeros(126)
    assert isinstance(one, np.memmap)
    one[:] = 2**64 - 1
    assert not other.any()
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_named(several_sums: Parties) -> None:
    with pytest.raises(Killed):
        run_merge(several_sums.coordinator, KilledAt(several_sums.files, CandidatePart, 0))
    folder = several_sums.output / CHECKPOINT
    os.truncate(folder / "sum-0.bin", 800)
    with pytest.raises(SettingsError, match=r"sum-0\.bin: holds 100 of \d+ numbers; remove"):
        run_merge(several_sums.coordinator, OwnersChannel(several_sums.files))
    (folder / "run.json").write_text("{")
    with pytest.raises(SettingsError, match=r"run\.json: is damaged; remove"):
        run_merge(several_sums.coordinator, OwnersChannel(several_sums.files))
