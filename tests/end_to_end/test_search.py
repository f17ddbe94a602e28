"""A whole search among three owners: what is chosen, published, signed and reported."""

import json
import shutil
from pathlib import Path

import pytest

from client.owner import Owner
from common.merge_methods.search import SEARCH, groups_of, next_mixtures
from common.messages import Message, MixturePart
from deploy.commands.agree import consent_text
from deploy.commands.verify import check_folder
from server.merge import run_merge
from server.output_folder import claim_output
from server.report.page import render_report
from server.report.report import read_report
from tests.support.parties import OwnersChannel, parties_of, searching


class StoppedChannel(OwnersChannel):
    """The coordinator is stopped once its owners have half of the second generation."""

    def answer(self, node: int, request: Message) -> Message | None:
        if isinstance(request, MixturePart) and request.model == "search@8":
            raise KeyboardInterrupt
        return super().answer(node, request)


def test_the_best_mixture_is_published_and_every_one_is_in_the_receipts(trained_folder: Path, tmp_path: Path) -> None:
    basis = ("data_free", "average")
    folder = searching(trained_folder, tmp_path / "consortium", basis, candidates=8, groups=1)
    claim_output(tmp_path / "output")
    with parties_of(folder, tmp_path / "output", verified=True) as parties:
        consent = consent_text(Owner(parties.files["hotel"]))
        with pytest.raises(KeyboardInterrupt):
            run_merge(parties.coordinator, StoppedChannel(parties.files))
        run_merge(parties.coordinator, OwnersChannel(parties.files))  # the same command resumes it
    assert "8 of these models are a search: mixtures of data_free, average" in " ".join(consent.split())
    assert "Nobody chooses the questions" in consent
    report = read_report(tmp_path / "output")
    trials = report.evaluation.sweep["search"]
    assert [each.candidate for each in trials] == [f"search@{number}" for number in range(1, 9)]
    scored = [(each.scales or (), each.main) for each in trials]
    table, seed = SEARCH.of(parties.agreement.tables), parties.agreement.seed
    num_groups = len(groups_of(parties.plan, table))
    assert tuple(mixture for mixture, _ in scored[:6]) == next_mixtures([], num_groups, table, seed)
    assert tuple(mixture for mixture, _ in scored[6:]) == next_mixtures(scored[:6], num_groups, table, seed)
    assert report.chosen["search"].candidate == max(trials, key=lambda each: each.main).candidate
    assert report.method == "search"
    assert {"search", "data_free", "average"} < report.evaluation.mean.keys()
    receipts = json.loads((tmp_path / "output" / "model" / "receipts.json").read_text())
    assert receipts["publication"]["mixtures"] == {each.candidate: list(each.scales or ()) for each in trials}
    assert check_folder(tmp_path / "output").is_signed
    render_report(tmp_path / "output")
    assert '<th scope="col">Scales</th>' in (tmp_path / "output" / "report.html").read_text()
    # a report with other scales than were signed
    shutil.copytree(tmp_path / "output", tmp_path / "forged")
    path = tmp_path / "forged" / "report.json"
    forged = json.loads(path.read_text())
    forged["evaluation"]["sweep"]["search"][3]["scales"][0] += 0.25
    path.write_text(json.dumps(forged))
    assert not check_folder(tmp_path / "forged").is_signed
