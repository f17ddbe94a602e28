"""A coordinator that lies, and three owners: servers, clients and merges as processes of their own, over TLS."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import server.coordinator
from client.app import app as client_app
from client.owner import Owner
from client.verification import check_no_evidence
from common.errors import OwnerRefused, WrongModel
from deploy.cli import cli
from deploy.launch.flower import check_not_over, raise_failure
from deploy.simulation.in_process_grid import run_in_process
from server import app as server_app
from tests.support.network import OWNERS, running, set_up_example, short_agreement
from tests.support.parties import parties_with_method

# Owners run only the agreed bundle, but nobody sees which program the coordinator runs. This one is told to itself by
# Python at its start (PYTHONPATH): it changes the coordinator's half of that bundle once it is imported.
LIAR = """
import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec


def send_another_model(coordinator):
    honest = coordinator.Coordinator.deliver

    def deliver(self, delivery, vector, *rest, **named):
        if delivery.kind == "candidate":
            vector = vector.copy()
            delivery.layout.read(vector, "classifier.bias")[0] += 0.01
        honest(self, delivery, vector, *rest, **named)

    coordinator.Coordinator.deliver = deliver
    coordinator.wrong_claims = lambda claims, total: []  # it would stop the run before an owner sees it


class Liar(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "server.coordinator":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            send_another_model(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Liar())
"""
SAYS = "the model that the coordinator sent is not the merge of what was contributed"


@pytest.fixture
def liar(tmp_path: Path) -> str:
    """PYTHONPATH of a coordinator that sends a model with another bias than the merge has."""
    folder = tmp_path / "liar"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(LIAR)
    return str(folder)


def check_nothing_was_published(output: Path) -> None:
    assert not any((output / name).exists() for name in ("model", "report.json", "report.html"))


def check_owner_kept_what_was_signed(owner_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has forgotten the run, and `amalgram verify OWNER.toml` says what happened."""
    state = Owner(owner_file).state
    assert not (state.folder / "run").exists()
    assert not (state.folder / "receipts").exists()
    capsys.readouterr()
    assert cli(["verify", str(owner_file)], standalone_mode=False) == WrongModel.exit_code
    said = capsys.readouterr().out
    assert "the coordinator sent a model that is not the merge of what was contributed." in said
    assert [line for line in said.splitlines() if line.endswith("  average  WRONG, says hotel")] != []
    assert "The coordinator signed each of these, which it sent; its signatures are valid:" in said
    assert "Those who checked it: hotel, cinema, phones." in said


def test_a_coordinator_that_lies_ends_with_what_the_owners_found(
    trained_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The coordinator's program and the owners', with Flower's messages, in this process. The first owner adds up the
    check before the others are asked to.
    """
    told: dict[str, Any] = {}
    exec(LIAR.partition("class Liar")[0], told)
    monkeypatch.setattr(server.coordinator.Coordinator, "deliver", server.coordinator.Coordinator.deliver)
    monkeypatch.setattr(server.coordinator, "wrong_claims", server.coordinator.wrong_claims)
    told["send_another_model"](server.coordinator)
    with parties_with_method(trained_folder, tmp_path, "average", verified=True) as parties:
        (parties.output / ".amalgram").touch()
        nodes = [{"settings": str(path)} for path in parties.files.values()]
        for _ in range(2):  # the second run ends at the roll call
            with pytest.raises(OwnerRefused, match=r"refused \(wrong-model\)"):
                run_in_process(server_app.app, client_app, nodes, {"coordinator": str(parties.coordinator)})
        with pytest.raises(OwnerRefused) as refused:
            raise_failure(parties.output, "finished:failed")  # what `amalgram merge` ends with
        assert refused.value.exit_code == WrongModel.exit_code
        with pytest.raises(WrongModel, match="this agreement is over: owner"):
            check_not_over(parties.output, parties.agreement.digest())
        check_not_over(parties.output, "ab" * 32)  # another agreement may have the same folder
        check_nothing_was_published(parties.output)
        check_owner_kept_what_was_signed(parties.files["hotel"], capsys)
        with pytest.raises(WrongModel, match=SAYS):
            check_no_evidence(Owner(parties.files["hotel"]))  # nor does `amalgram client` begin again


@pytest.mark.slow
def test_processes_of_a_coordinator_that_lies_and_of_its_owners_end_and_do_not_begin_again(
    trained_folder: Path, tmp_path: Path, liar: str, capsys: pytest.CaptureFixture[str]
) -> None:
    network = set_up_example(trained_folder, tmp_path / "parties", short_agreement(240))
    with ExitStack() as stack:
        server = stack.enter_context(running("server", network.coordinator, PYTHONPATH=liar))
        server.wait_for("listening on")
        clients = {name: stack.enter_context(running("client", network.owner(name))) for name in OWNERS}
        merge = stack.enter_context(running("merge", network.coordinator))
        assert merge.exit_code(600) == WrongModel.exit_code, merge.said
        assert "refused (wrong-model)" in merge.said
        for client in clients.values():  # each ends by itself
            assert client.exit_code(120) == WrongModel.exit_code
            assert SAYS in client.said
        again = stack.enter_context(running("client", network.owner("hotel")))
        assert again.exit_code(120) == WrongModel.exit_code
        assert "connected to the coordinator" not in again.said
        merge = stack.enter_context(running("merge", network.coordinator))
        assert merge.exit_code(120) == WrongModel.exit_code
        assert "this agreement is over: owner" in merge.said
    check_nothing_was_published(network.folder / "output")
    for name in OWNERS:
        check_owner_kept_what_was_signed(network.owner(name), capsys)
