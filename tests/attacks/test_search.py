"""Attacks 191 to 197: a coordinator that asks other questions about validation rows than a search may, or that
publishes another mixture than the best.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from client.mixtures import received
from client.owner import Owner
from client.receipts import _check_mixtures
from client.state import TotalRecord
from client.verification import Evidence
from common.errors import ConsentError, RemoteProtocolError, WrongModel
from common.merge_methods.search import SEARCH, Mixture, groups_of, next_mixtures
from common.messages import MixturePart
from common.publication import PublishedFolder
from common.schedule import Delivery
from deploy.cli import cli
from tests.support.owner_process import RUN, Process, digest_of, part_of
from tests.support.parties import parties_of, searching
from tests.support.results import MEAN, publication_of

VICTIM = "hotel"
Start = Callable[..., "Searched"]


class Searched:
    """Owners that have the basis of a search, and a coordinator that sends one of them what a test wants."""

    def __init__(self, process: Process) -> None:
        self.process, self.parties = process, process.parties
        self.owner = Owner(self.parties.files[VICTIM])
        self.table = SEARCH.of(self.parties.agreement.tables)
        self.num_groups = len(groups_of(self.parties.plan, self.table))

    def deliveries(self, split: str = "validation") -> tuple[Delivery, ...]:
        return self.process.schedule.deliveries("mixture", method=SEARCH.name, split=split)  # type: ignore[arg-type]

    def first(self) -> tuple[Mixture, ...]:
        return next_mixtures([], self.num_groups, self.table, self.parties.agreement.seed)

    def send(self, delivery: Delivery, mixture: Mixture, name: str | None = None) -> None:
        """As if everything before it were over."""
        run = self.owner.state.run
        if run.begun is None or run.begun < delivery.position:
            self.owner.state.update_run(begun=delivery.position - 1, is_complete=True)
        self.process.send(VICTIM, part_of(self.parties, delivery, np.array(mixture, dtype="<f4"), name))

    @contextmanager
    def condemned(self, says: str, capsys: pytest.CaptureFixture[str], expected: Mixture | str = "") -> Iterator[None]:
        """Expect that the owner takes what is sent for a lie, keeps it, and tells what it should have been; then go on
        as if it had not been sent.
        """
        run, folder = self.owner.state.run, self.owner.state.folder
        shutil.copytree(folder / "run", folder / "before")
        with pytest.raises(WrongModel, match=says):
            yield
        assert not (folder / "run").exists()
        capsys.readouterr()
        assert cli(["verify", str(self.parties.files[VICTIM])], standalone_mode=False) == WrongModel.exit_code
        said = capsys.readouterr().out
        evidence = self.owner.state.evidence(self.parties.agreement.digest())
        assert evidence is not None
        last = Evidence.model_validate_json(evidence.read_bytes()).delivered[-1]
        assert last.position not in [each.position for each in run.received]
        assert f"  event {last.position}: SHA-256 {last.digest}  {last.model}  WRONG, says {VICTIM}\n" in said
        assert "its signatures are valid" in said
        if expected:
            should = expected if isinstance(expected, str) else digest_of(np.array(expected, dtype="<f4"))
            assert f"{VICTIM} says that event {last.position} should have been SHA-256 {should}:" in said
        evidence.unlink()
        (folder / "before").rename(folder / "run")

    def sent_as(self, name: str) -> str:
        """The digest of the mixture that was sent under this name first."""
        return next(each.digest for each in self.owner.state.run.received if each.model == name)

    def score(self, accuracies: dict[str, float]) -> None:
        """As if the owner had added up these means of all owners."""
        totals = tuple(
            TotalRecord(
                split="validation", model=name, metrics=MEAN.model_copy(update={"accuracy": each}).model_dump_json()
            )
            for name, each in accuracies.items()
        )
        self.owner.state.update_run(totals=totals)


@pytest.fixture
def start(trained_folder: Path, tmp_path: Path) -> Iterator[Start]:
    """The owners once they have the basis, which is the base itself."""
    with ExitStack() as stack:

        def started(*basis: str, verified: bool, candidates: int = 8) -> Searched:
            folder = searching(trained_folder, tmp_path / "consortium", basis, candidates=candidates, groups=1)
            parties = stack.enter_context(parties_of(folder, tmp_path / "output", verified=verified))
            searched = Searched(Process(parties))
            for method in basis:
                delivery = searched.process.schedule.delivery_of(method, "test")
                searched.owner.state.update_run(begun=delivery.position - 1, is_complete=True)
                searched.process.send(VICTIM, part_of(parties, delivery))
            return searched

        yield started


def test_191_scales_beyond_their_bounds_are_refused(start: Start) -> None:
    """With large ones, a model is as good as broken for all rows but those with a given word."""
    search = start("average", verified=False)
    first, *_ = search.deliveries()
    for scale in (-1.0, 2.5, 1e6, 0.3):
        with pytest.raises(ConsentError, match="not multiples of 1/64 up to 2"):
            search.send(first, (scale, 1.0))
    with pytest.raises(RemoteProtocolError, match="not finite"):
        search.send(first, (np.nan, 1.0))
    assert received(search.owner) == {}


def test_192_a_mixture_is_judged_once(start: Start) -> None:
    """Rounding of sums hides less the more often it is asked for the same rows and model."""
    search = start("average", verified=False)
    first, second, *_ = search.deliveries()
    search.send(first, (1.0, 1.0))
    with pytest.raises(ConsentError, match=r"the same mixture again \(search@2\)"):
        search.send(second, (1.0, 1.0))
    search.send(second, (1.0, 0.5))
    assert received(search.owner) == {"search@1": (1.0, 1.0), "search@2": (1.0, 0.5)}


def test_193_a_verifying_owner_answers_only_what_follows_from_the_agreement_and_the_totals(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    search = start("average", verified=True)
    deliveries, first = search.deliveries(), search.first()
    for delivery, mixture in zip(deliveries, first, strict=False):
        with search.condemned("than the one that follows from the agreement and the totals", capsys, mixture):
            search.send(delivery, (0.125, 0.125))
        search.send(delivery, mixture)
    with pytest.raises(ConsentError, match="has not added up the metrics from which a mixture"):
        search.send(deliveries[6], (0.125, 0.125))  # as to one that was away meanwhile
    scores = {delivery.names[0]: number / 10 for number, delivery in enumerate(deliveries[:6])}
    search.score(scores)
    scored = list(zip(first, scores.values(), strict=True))
    honest = next_mixtures(scored, search.num_groups, search.table, search.parties.agreement.seed)
    liar = next_mixtures([(mixture, -score) for mixture, score in scored], search.num_groups, search.table, 0)
    assert honest[0] != liar[0]
    with search.condemned("follows from the agreement and the totals", capsys, honest[0]):
        search.send(deliveries[6], liar[0])
    search.send(deliveries[6], honest[0])
    search.send(deliveries[7], honest[1])


def test_194_no_more_mixtures_are_judged_than_were_agreed(start: Start) -> None:
    search = start("average", verified=False, candidates=2)
    (first, second), (last,) = search.deliveries(), search.deliveries("test")
    search.send(first, (1.0, 1.0))
    search.send(second, (1.0, 0.5))
    common = vars(part_of(search.parties, second, np.array((0.5, 0.5), "<f4")))
    with pytest.raises(RemoteProtocolError, match=f"a mixture at position {second.position + 1}, which is for sum"):
        search.process.send(VICTIM, MixturePart(**common | {"position": second.position + 1}))
    with pytest.raises(ConsentError, match="a model 'search@3' that was not agreed"):
        search.send(second, (0.5, 0.5), "search@3")
    with pytest.raises(ConsentError, match="another mixture as search@2 than the one that was scored"):
        search.send(last, (0.5, 0.5), "search@2")
    assert search.owner.state.run.run == RUN


def test_195_the_mixture_that_is_published_is_the_best_of_those_that_were_scored(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    search = start("average", verified=True, candidates=4)
    deliveries, first, (last,) = search.deliveries(), search.first(), search.deliveries("test")
    for delivery, mixture in zip(deliveries, first, strict=True):
        search.send(delivery, mixture)
    best = search.sent_as("search@2")
    search.score({"search@1": 0.5, "search@2": 0.7, "search@4": 0.6})
    with pytest.raises(ConsentError, match="better on validation rows, as far as hotel has added them up"):
        search.send(last, first[2], "search@3")  # it may be: this owner was away meanwhile
    search.score({"search@1": 0.5, "search@2": 0.7, "search@3": 0.7, "search@4": 0.6})
    for name, mixture in (("search@2", first[2]), ("search@2", (0.5, 0.5))):
        with search.condemned(f"another mixture as {name} than the one that was scored", capsys, best):
            search.send(last, mixture, name)
    for number in (0, 2, 3):
        with search.condemned(f"chose search@{number + 1}; search@2 was better", capsys, best):
            search.send(last, first[number], f"search@{number + 1}")
    search.send(last, first[1], "search@2")


def test_196_what_is_mixed_must_follow_from_what_was_verified(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a method that applies a function, the check proves what the function is applied to."""
    search = start("isotropic", verified=True)
    delivery, first = search.process.schedule.delivery_of("isotropic", "test"), search.deliveries()[0]
    array = search.owner.state.open_array(f"delivered-{delivery.position}", delivery.layout.size, "<f4", writable=True)
    array[-1] = 1.0  # of what the function made
    with pytest.raises(WrongModel, match="than the method makes of the owners' merge"):
        search.send(first, search.first()[0])
    cli(["verify", str(search.parties.files[VICTIM])], standalone_mode=False)
    (basis,) = (line for line in capsys.readouterr().out.splitlines() if "  WRONG" in line)
    assert basis.startswith(f"  event {delivery.position}: SHA-256 ")


def test_197_mixtures_that_nobody_was_asked_about_are_not_signed(start: Start) -> None:
    search = start("average", verified=False)
    first, second, *_ = search.deliveries()
    search.send(first, (1.0, 1.0))
    search.send(second, (1.0, 0.5))
    folder = PublishedFolder(files={"config.json": "ab" * 32}, configuration={})
    tried = {"search@1": (1.0, 1.0), "search@2": (1.0, 0.5)}
    _check_mixtures(search.owner, publication_of(search.process, folder, mixtures=tried))
    for mixtures in ({}, tried | {"search@2": (1.0, 0.25)}, tried | {"search@3": (1.0, 0.25)}):
        with pytest.raises(ConsentError, match="published other mixtures"):
            _check_mixtures(search.owner, publication_of(search.process, folder, mixtures=mixtures))
