"""A run that is killed, at the coordinator or at an owner, at any message: the same command resumes it."""

import os
import random
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import common.schedule
import server.checkpoint
from client.owner import Owner
from common.errors import AmalgramError, SettingsError, TooFewOwners
from common.messages import (
    Acknowledgements,
    BurnSession,
    CandidatePart,
    CheckKeys,
    CorrectionPart,
    Draw,
    KeyBook,
    KeyShares,
    MergedStepPart,
    Message,
    OpenSum,
    Packet,
    Receipts,
    Refusal,
    Result,
    RollCall,
    ScalesPart,
    SurvivorList,
    UploadsOpened,
)
from common.schedule import Round, schedule_of
from server.checkpoint import Checkpoint
from server.merge import run_merge
from server.output_folder import CHECKPOINT
from server.report.report import read_report, save_report
from tests.support import parties
from tests.support.parties import OwnersChannel, Parties, consortium_in_32_bits, parties_of


class Killed(BaseException):
    """Stands for kill -9: nothing of the killed process runs after it."""


class Faulty(OwnersChannel):
    """After some exchanges, in the middle of one, the coordinator is killed before or after some owner answers.

    Or that owner is killed after its work, so that its answer is lost.
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
def consortium(two_blocks_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, merged by a single-round method with a sweep, and by a multi-round one."""
    folder = tmp_path_factory.mktemp("resume") / "consortium"
    shutil.copytree(two_blocks_folder, folder, ignore=shutil.ignore_patterns("output"))
    path = folder / "agreement.toml"
    text = path.read_text().replace('method = "regmean"', 'method = "regmean_plus_plus"')
    text = text.replace('["average", "task_arithmetic", "fisher"]', '["regmean"]')
    text = text.replace("alphas = [0.1, 0.5, 0.9, 0.95, 0.99]", "alphas = [0.5, 0.9]")
    path.write_text(text)
    return folder


@pytest.fixture
def one_may_drop_out(trained_folder: Path, tmp_path: Path) -> Iterator[Parties]:
    output = tmp_path / "output"
    output.mkdir()
    (output / ".amalgram").touch()
    with parties_of(parties.one_may_drop_out(trained_folder, tmp_path / "consortium"), output, verified=True) as made:
        yield made


@pytest.fixture
def several_rounds(consortium: Path, tmp_path: Path) -> Iterator[Parties]:
    (tmp_path / ".amalgram").touch()
    with parties_of(consortium, tmp_path, verified=True) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(consortium: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parties]:
    """The same parties after a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("undisturbed")
    (output / ".amalgram").touch()
    with parties_of(consortium, output, verified=True) as made:
        run_merge(made.coordinator, OwnersChannel(made.files))
        yield made


def published(parties: Parties) -> dict[str, Any]:
    report = read_report(parties.output)
    return {"model": report.digests.model, "evaluation": report.evaluation, "layers": report.layers}


def start_until_done(parties: Parties, channels: Iterator[OwnersChannel]) -> int:
    """Run the same command until it succeeds; how many times that took."""
    for starts, channel in enumerate(channels, 1):
        try:
            run_merge(parties.coordinator, channel)
        except (Killed, TooFewOwners):
            continue
        return starts
    raise AssertionError


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))])
def test_a_run_that_is_killed_again_and_again_publishes_what_an_undisturbed_one_does(
    several_rounds: Parties, undisturbed: Parties, seed: int
) -> None:
    chance = random.Random(seed)
    starts = start_until_done(several_rounds, (Faulty(several_rounds.files, chance) for _ in range(200)))
    assert starts > 5
    assert published(several_rounds) == published(undisturbed)
    assert not (several_rounds.output / CHECKPOINT).exists()


def test_a_coordinator_that_is_killed_when_some_owners_have_their_message_resumes(
    several_rounds: Parties, undisturbed: Parties, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masked parts are in; a session is half open; a merged step or a candidate has reached some; a result is signed by
    one; by all. Its sums lie on the disk, those of the undisturbed run in memory.
    """
    monkeypatch.setattr(server.checkpoint, "MAX_BYTES_IN_MEMORY", 1000)
    kinds = (
        KeyShares,
        Acknowledgements,
        MergedStepPart,
        Draw,
        CorrectionPart,
        CheckKeys,
        UploadsOpened,
        CandidatePart,
        Result,
        Receipts,
    )
    for kind in kinds:
        with pytest.raises(Killed):
            run_merge(several_rounds.coordinator, KilledAt(several_rounds.files, kind, 1))
    again = OwnersChannel(several_rounds.files)
    run_merge(several_rounds.coordinator, again)
    assert again.kinds == [(RollCall,), (Result,), (Receipts,)]
    assert published(several_rounds) == published(undisturbed)


@pytest.fixture
def in_32_bits(trained_folder: Path, tmp_path: Path) -> Iterator[Parties]:
    consortium = consortium_in_32_bits(trained_folder, tmp_path / "consortium", alphas="[0.9]")
    output = tmp_path / "output"
    output.mkdir()
    (output / ".amalgram").touch()
    with parties_of(consortium, output, verified=True) as made:
        yield made


class KilledInRound(KilledAt):
    """Like KilledAt, while the round that was opened last since the coordinator started is at one position."""

    def __init__(self, files: Mapping[str, Path], kind: type[Message], reached: int, round_: Round) -> None:
        super().__init__(files, kind, reached)
        self.position = round_.position

    def answer(self, node: int, request: Message) -> Message | None:
        opened = [message.position for packet in self.asked for message in packet if isinstance(message, OpenSum)]
        if opened[-1:] != [self.position]:
            return OwnersChannel.answer(self, node, request)
        return super().answer(node, request)


@pytest.mark.slow
def test_a_run_in_32_bits_resumes_within_and_between_its_two_rounds(in_32_bits: Parties) -> None:
    """Owners measure once, for both rounds.

    If some have signed for the survivors of the second, its session is certified as over, and what they measured is
    still there for the next one.
    """
    schedule = schedule_of(in_32_bits.agreement, in_32_bits.plan)
    scales, contributions = schedule.find("scales"), schedule.find("contribution")
    for kind, reached, round_ in (
        (Acknowledgements, 1, scales),
        (ScalesPart, 1, contributions),  # they travel ahead of the round that is summed on them
        (SurvivorList, 2, contributions),
        (Acknowledgements, 1, contributions),
    ):
        with pytest.raises(Killed):
            run_merge(in_32_bits.coordinator, KilledInRound(in_32_bits.files, kind, reached, round_))
    run_merge(in_32_bits.coordinator, OwnersChannel(in_32_bits.files))
    report = read_report(in_32_bits.output)
    assert [(each.kind, each.split) for each in report.rounds] == [
        ("scales", None),
        ("contribution", None),
        ("check", None),
        ("metrics", "test"),
    ]
    assert [each.destroyed for each in report.rounds] == [True, True, False, False]
    assert report.rounds[0].owners == report.rounds[1].owners
    assert not any((in_32_bits.folder / "state" / name / "run").exists() for name in ("hotel", "cinema", "phones"))


class DropsOutAt(KilledAt):
    """Like KilledAt; and one owner drops out of this start at another kind of message."""

    def __init__(self, files: Mapping[str, Path], kind: type[Message], drops_out_at: type[Message]) -> None:
        super().__init__(files, kind, 0)
        self.drops_out_at = drops_out_at

    def answer(self, node: int, request: Message) -> Message | None:
        if isinstance(request, self.drops_out_at) and node == 1:
            return None
        return super().answer(node, request)


class Leaves(OwnersChannel):
    """One owner drops out of this start at a kind of message, the first time that a check is made."""

    def __init__(self, files: Mapping[str, Path], kind: type[Message]) -> None:
        super().__init__(files)
        self.kind = kind

    def answer(self, node: int, request: Message) -> Message | None:
        if node == 1 and isinstance(request, self.kind):
            return None
        return super().answer(node, request)


def test_a_check_that_an_owner_leaves_is_made_once_it_is_back(one_may_drop_out: Parties) -> None:
    """Though the sums may do without one owner: shares add up to zero only over all who contributed."""
    for kind in (Draw, CheckKeys, UploadsOpened):
        with pytest.raises(TooFewOwners, match="did not verify the merge"):
            run_merge(one_may_drop_out.coordinator, Leaves(one_may_drop_out.files, kind))
    run_merge(one_may_drop_out.coordinator, OwnersChannel(one_may_drop_out.files))
    report = read_report(one_may_drop_out.output)
    assert report.verified
    assert all(len(each.owners) == 4 for each in report.rounds)


def test_an_owner_that_a_sum_was_opened_without_is_back_when_the_run_resumes(one_may_drop_out: Parties) -> None:
    """To that owner the session is still pending. The coordinator has its total and asks nobody to burn it."""
    with pytest.raises(Killed):
        run_merge(one_may_drop_out.coordinator, DropsOutAt(one_may_drop_out.files, CandidatePart, Acknowledgements))
    again = OwnersChannel(one_may_drop_out.files)
    run_merge(one_may_drop_out.coordinator, again)
    assert (BurnSession,) not in again.kinds
    assert read_report(one_may_drop_out.output).owners


class Silent(OwnersChannel):
    """From the packet with a kind of message on, one owner answers nothing in this start, and is not even reached; or
    that packet still reaches it.
    """

    def __init__(self, files: Mapping[str, Path], kind: type[Message], *, is_reached: bool = False) -> None:
        super().__init__(files)
        self.kind, self.is_reached, self.is_silent = kind, is_reached, False

    def _answers(self, node: int, packet: Packet) -> Packet | None:
        begins = node == 1 and not self.is_silent and any(isinstance(message, self.kind) for message in packet)
        self.is_silent |= begins
        is_lost = node == 1 and self.is_silent
        if not is_lost or (begins and self.is_reached):
            answers = super()._answers(node, packet)
        return None if is_lost else answers


def test_an_owner_that_is_lost_once_it_has_contributed_is_sent_what_it_missed_when_it_is_back(
    one_may_drop_out: Parties,
) -> None:
    """The others have gone on meanwhile: the contributions are summed, models and corrections sent, metrics summed."""

    class ThenKilled(Silent):
        sums = 0

        def answer(self, node: int, request: Message) -> Message | None:
            self.sums += isinstance(request, KeyBook) and node == 0
            if self.sums == 2:
                raise Killed
            return super().answer(node, request)

    for kind in (Acknowledgements, CandidatePart, Draw, CorrectionPart):
        with pytest.raises(TooFewOwners, match=r"cinema did not verify the merge.*\nhint: bring them back"):
            run_merge(one_may_drop_out.coordinator, Silent(one_may_drop_out.files, kind))
    with pytest.raises(Killed):  # in the last sum, after one that this owner helped to open and was not shown
        run_merge(one_may_drop_out.coordinator, ThenKilled(one_may_drop_out.files, Acknowledgements, is_reached=True))
    run_merge(one_may_drop_out.coordinator, OwnersChannel(one_may_drop_out.files))
    report = read_report(one_may_drop_out.output)
    assert report.verified
    assert all(len(each.owners) == 4 for each in report.rounds)
    assert len(report.receipts) == 4
    assert not list((one_may_drop_out.folder / "state").glob("*/run"))


def test_the_run_goes_on_without_an_owner_that_is_lost_before_it_knows_who_is_in_the_sum(
    one_may_drop_out: Parties,
) -> None:
    """It could verify nothing, so the others sum without it. It comes back, with that sum pending, when metrics are
    summed and the others are yet to be shown them, which they do not forget.
    """

    class LostThenKilled(Silent):
        sessions = 0

        def answer(self, node: int, request: Message) -> Message | None:
            self.sessions += isinstance(request, OpenSum) and node == 0
            if isinstance(request, Acknowledgements) and node == 2:
                raise Killed
            return super().answer(node, request)

    class KilledBeforeTheyAreShown(Silent):
        shown = 0

        def answer(self, node: int, request: Message) -> Message | None:
            self.shown += isinstance(request, UploadsOpened) and node == 0
            if self.shown == 2:  # the check, then validation metrics
                raise Killed
            return super().answer(node, request)

    channel = LostThenKilled(one_may_drop_out.files, SurvivorList)
    with pytest.raises(Killed):
        run_merge(one_may_drop_out.coordinator, channel)
    assert channel.sessions == 2
    with pytest.raises(Killed):
        run_merge(one_may_drop_out.coordinator, KilledBeforeTheyAreShown(one_may_drop_out.files, RollCall))
    run_merge(one_may_drop_out.coordinator, OwnersChannel(one_may_drop_out.files))
    report = read_report(one_may_drop_out.output)
    assert report.verified
    assert all(each.owners == ("hotel", "phones", "inn") for each in report.rounds)


class Loses(OwnersChannel):
    """One owner answers nothing to some kinds of messages in this start. The coordinator is killed before it sends
    the first owner the survivors of a sum, counted from the start.
    """

    def __init__(self, files: Mapping[str, Path], lost: int, kinds: tuple[type[Message], ...], killed_in: int) -> None:
        super().__init__(files)
        self.lost, self.unanswered, self.sums_before = lost, kinds, killed_in

    def answer(self, node: int, request: Message) -> Message | None:
        self.sums_before -= isinstance(request, SurvivorList) and node == 0
        if self.sums_before == 0:
            raise Killed
        return None if node == self.lost and isinstance(request, self.unanswered) else super().answer(node, request)


def test_owners_that_miss_different_sums_of_metrics_are_waited_for(one_may_drop_out: Parties) -> None:
    """Otherwise all sums are made, but only two of four owners have added up all of them, and the agreement needs the
    signatures of three: nothing could be published any more.
    """
    files = one_may_drop_out.files
    for lost, kinds, killed_in in (
        (1, (), 2),  # nobody; all have verified the models, and validation metrics are about to be opened
        (1, (RollCall,), 2),  # these are opened without this owner
    ):
        with pytest.raises(Killed):
            run_merge(one_may_drop_out.coordinator, Loses(files, lost, kinds, killed_in))
    with pytest.raises(TooFewOwners, match="2 owners are left at step ShareKeys, the agreement needs 3"):
        run_merge(one_may_drop_out.coordinator, Loses(files, 2, (KeyBook,), -1))  # test metrics
    run_merge(one_may_drop_out.coordinator, OwnersChannel(files))
    report = read_report(one_may_drop_out.output)
    assert report.receipts == ("hotel", "phones", "inn")
    assert [len(each.owners) for each in report.rounds] == [4, 4, 3, 3]


class Refusing(Loses):
    """An owner's error is a refusal, as over the network."""

    def answer(self, node: int, request: Message) -> Message | None:
        try:
            return super().answer(node, request)
        except AmalgramError as error:
            return Refusal(code=error.code)


class KilledBeforeRelay(Refusing):
    """The coordinator is killed when a sum is open, before any owner can add it up."""

    def answer(self, node: int, request: Message) -> Message | None:
        if isinstance(request, UploadsOpened):
            raise Killed
        return super().answer(node, request)


def test_an_owner_that_missed_a_sum_before_another_check_takes_part_in_that_check(
    one_may_drop_out: Parties, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot sign the result. But without it no check could be made any more, whoever came back."""
    path, files, owners = one_may_drop_out.coordinator, one_may_drop_out.files, len(one_may_drop_out.files)
    workbench = Owner(files["hotel"]).workbench
    events = schedule_of(workbench.agreement, workbench.plan).events
    (check,) = (each.layout.num_bytes for each in events if isinstance(each, Round) and each.kind == "check")
    monkeypatch.setattr(common.schedule, "PART_BYTES", check * owners - 1)  # one check of all models is too large
    with pytest.raises(Killed):
        run_merge(path, Refusing(files, 1, (), 2))  # validation metrics are about to be opened
    with pytest.raises(Killed):
        run_merge(path, KilledBeforeRelay(files, 1, (RollCall,), -1))  # they are opened without this owner
    run_merge(path, Refusing(files, 1, (), -1))
    report = read_report(one_may_drop_out.output)
    assert report.verified
    assert report.receipts == ("hotel", "phones", "inn")


def test_what_is_published_is_neither_made_nor_removed_again(undisturbed: Parties) -> None:
    before = published(undisturbed)
    channel = OwnersChannel(undisturbed.files)
    with pytest.raises(SettingsError, match="already holds the result of this agreement"):
        run_merge(undisturbed.coordinator, channel)
    assert channel.asked == []
    assert published(undisturbed) == before


def test_an_earlier_result_stays_until_a_new_one_replaces_it(several_rounds: Parties, undisturbed: Parties) -> None:
    output, report = several_rounds.output, read_report(undisturbed.output)
    digests = report.digests.model_copy(update={"agreement": "ab" * 32})
    earlier = report.model_copy(update={"digests": digests})
    shutil.copytree(undisturbed.output / "model", output / "model")
    save_report(earlier, output)
    (output / "model" / "of-the-earlier-model.txt").touch()
    (output / "report.html").touch()
    with pytest.raises(Killed):
        run_merge(several_rounds.coordinator, KilledAt(several_rounds.files, MergedStepPart, 0))
    assert read_report(output) == earlier
    assert (output / "model" / "of-the-earlier-model.txt").exists()
    run_merge(several_rounds.coordinator, OwnersChannel(several_rounds.files))
    assert read_report(output).digests.agreement == several_rounds.agreement.digest()
    assert not (output / "model" / "of-the-earlier-model.txt").exists()
    assert not (output / "report.html").exists()


def test_totals_are_readable_by_the_coordinator_alone_and_gone_with_another_agreement(several_rounds: Parties) -> None:
    folder = several_rounds.output / CHECKPOINT
    with pytest.raises(Killed):
        run_merge(several_rounds.coordinator, KilledAt(several_rounds.files, MergedStepPart, 0))
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, *sorted(folder.iterdir()))] == [0o700, 0o600, 0o600]
    kept = Checkpoint.open(folder, several_rounds.agreement.digest())
    assert Checkpoint.open(folder, "ab" * 32).run != kept.run
    assert sorted(path.name for path in folder.iterdir()) == ["run.json"]


def test_a_damaged_checkpoint_is_named(several_rounds: Parties) -> None:
    with pytest.raises(Killed):
        run_merge(several_rounds.coordinator, KilledAt(several_rounds.files, MergedStepPart, 0))
    folder = several_rounds.output / CHECKPOINT
    os.truncate(folder / "sum-0.bin", 800)
    with pytest.raises(SettingsError, match=r"sum-0\.bin: holds 100 of \d+ numbers\nhint: remove"):
        run_merge(several_rounds.coordinator, OwnersChannel(several_rounds.files))
    (folder / "run.json").write_text("{")
    with pytest.raises(SettingsError, match=r"run\.json: is damaged\nhint: remove"):
        run_merge(several_rounds.coordinator, OwnersChannel(several_rounds.files))
