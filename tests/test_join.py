"""From an invitation to an owner's files: what is written, what is never overwritten, and what is refused."""

import io
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from client.owner import Owner
from client.settings import OwnerSettings, Training
from common.agreement import load_agreement
from common.errors import AmalgramError, SettingsError
from common.identity import fingerprint
from common.settings_file import load_settings
from deploy.cli import cli
from deploy.commands.draft import is_loopback
from deploy.commands.join import COLUMNS, join, owner_settings
from deploy.commands.server import find_place
from deploy.invitation import read_invitation
from deploy.network_keys import write_certificate
from tests.support.errors import in_two_lines

OWNERS = ("hotel", "cinema", "phones")
INVITATION = Path("invitation.toml")


def run(*arguments: str) -> None:
    cli(list(arguments), standalone_mode=False)


@pytest.fixture(scope="module")
def drafted(reviews_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The coordinator's folder after `amalgram draft --address`, with everybody's keys in it."""
    folder = tmp_path_factory.mktemp("drafted")
    shutil.copytree(reviews_folder / "base", folder / "base")
    shutil.copy(reviews_folder / "agreement.toml", folder / "short.toml")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in (*OWNERS, "coordinator"):
            run("keys", "new", name)
        run("keys", "certificate", "merge.example.org")
        public = [f"{name}.pub" for name in (*OWNERS, "coordinator")]
        run("draft", "short.toml", *public, "--address", "merge.example.org:9443")
    return folder


@pytest.fixture
def home(drafted: Path, reviews_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An owner's folder with its keys, its rows, a copy of the base and the invitation."""
    for name in ("hotel.key", "hotel.node", "invitation.toml"):
        shutil.copy(drafted / name, tmp_path)
    shutil.copytree(drafted / "base", tmp_path / "base")
    shutil.copytree(reviews_folder / "data" / "hotel", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(owner: str | None = None, *, writes: bool = False) -> str:
    before = {path: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    with pytest.raises(AmalgramError) as caught:
        join(INVITATION, owner, None, None, None)
    if not writes:
        assert {path: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before
    return in_two_lines(caught.value)


def test_a_draft_with_an_address_makes_the_invitation_and_the_coordinator_s_settings(drafted: Path) -> None:
    invitation = read_invitation(drafted / INVITATION)
    assert invitation.address == "merge.example.org:9443"
    assert invitation.agreement == load_agreement(drafted / "agreement.toml")
    assert invitation.root_certificate == (drafted / "ca.pem").read_text()
    text = (drafted / INVITATION).read_text()
    assert f"by phone: {fingerprint(bytes.fromhex(invitation.agreement.digest()))}\n" in text
    assert not any(path.read_text().split()[-1] in text for path in drafted.glob("*.key"))  # no secret is in it
    place = find_place(drafted / "coordinator.toml")
    assert place.host_and_port == ("0.0.0.0", 9443)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_server_whose_address_is_this_machine_s_listens_on_this_machine_alone(
    host: str, drafted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(drafted, tmp_path / "drafted"))
    for name in ("agreement.toml", "invitation.toml", "coordinator.toml"):
        (folder / name).unlink()
    monkeypatch.chdir(folder)
    run("draft", "short.toml", *(f"{name}.pub" for name in (*OWNERS, "coordinator")), "--address", f"{host}:9443")
    assert find_place(folder / "coordinator.toml").host_and_port == ("127.0.0.1", 9443)
    assert read_invitation(folder / INVITATION).address == f"{host}:9443"


@pytest.mark.parametrize("host", ["127.example.org", "10.0.0.1", "[::1]", "localhost.example.org", "127.0.0.1.org"])
def test_another_address_is_not_taken_for_this_machine_s(host: str) -> None:
    assert not is_loopback(host)


def test_an_invitation_needs_a_certificate_and_an_address(drafted: Path, tmp_path: Path) -> None:
    public = [str(path) for path in drafted.glob("*.pub")]
    with pytest.raises(SettingsError, match=r"ca\.pem: cannot be read") as missing:
        run("draft", str(drafted / "short.toml"), *public, "--address", "x:1", "--out", str(tmp_path / "a.toml"))
    assert missing.value.hint == "make it first: amalgram keys certificate x"
    write_certificate(tmp_path, ["x"])
    with pytest.raises(SettingsError, match=r"server\.pem: is for x, localhost, 127\.0\.0\.1, not for y, so owners"):
        run("draft", str(drafted / "short.toml"), *public, "--address", "y:1", "--out", str(tmp_path / "a.toml"))
    with pytest.raises(SettingsError, match="address = 'https://x': must be HOST:PORT"):
        run("draft", str(drafted / "short.toml"), *public, "--address", "https://x", "--out", str(tmp_path / "a.toml"))


def test_whoever_joins_has_settings_to_fill_in(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    join(INVITATION, None, None, None, None)
    shown = capsys.readouterr()
    digits = fingerprint(bytes.fromhex(load_agreement(home / "agreement.toml").digest()))
    assert digits in shown.out
    assert "amalgram agree hotel.toml" in shown.err
    settings = load_settings(home / "hotel.toml", OwnerSettings)
    assert (settings.fine_tuned, settings.base, settings.training) == ("model", "base", None)
    assert settings.network is not None
    assert settings.network.address == "merge.example.org:9443"
    assert Owner(home / "hotel.toml").name == "hotel"
    assert Owner(home / "hotel.toml").state.consents() == {}


def test_whoever_names_its_rows_is_ready_for_consent(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = fingerprint(bytes.fromhex(read_invitation(INVITATION).agreement.digest()))

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(f"{digits[:5]}\n"))
    join(INVITATION, None, None, Path("data/train.jsonl"), Path("data/test.jsonl"))
    owner = Owner(home / "hotel.toml")
    assert owner.settings.training == Training(epochs=3, learning_rate=1e-4)
    assert list(owner.state.consents()) == [owner.agreement.digest()]
    assert "WHAT LEAVES THIS MACHINE" in capsys.readouterr().out


def test_nothing_that_is_there_is_overwritten(home: Path, tmp_path: Path) -> None:
    join(INVITATION, None, None, None, None)
    assert "hotel.toml: exists already, and is not overwritten\nhint: " in refusal()
    (home / "hotel.toml").unlink()
    join(INVITATION, None, None, None, None)  # the other files are the same
    (home / "hotel.toml").unlink()
    (home / "agreement.toml").write_text("nothing")
    join(INVITATION, None, None, None, None)
    assert (home / "agreement.toml").read_text() == "nothing"
    assert load_settings(home / "hotel.toml", OwnerSettings).agreement == Path("agreement-2.toml")
    assert Owner(home / "hotel.toml").agreement == read_invitation(INVITATION).agreement
    (home / "hotel.toml").unlink()
    other = tmp_path / "other"
    other.mkdir()
    write_certificate(other, ["x"])
    shutil.copy(other / "ca.pem", home)
    assert "ca.pem: another certificate is here already" in refusal()


def test_a_later_agreement_leaves_the_settings_as_they_are_and_says_what_to_change(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    join(INVITATION, None, "mine", None, None)
    before = (home / "hotel.toml").read_text()
    first = (home / "agreement.toml").read_text()
    path = home / INVITATION
    path.write_text(path.read_text().replace("Reviews of three shops", "Again"))
    (home / "ca.pem").unlink()  # a new one comes with the invitation
    join(INVITATION, None, None, None, None)
    assert (home / "ca.pem").is_file()
    assert (home / "hotel.toml").read_text() == before
    assert (home / "agreement.toml").read_text() == first
    assert 'hotel.toml stays as it is: change it to agreement = "agreement-2.toml"\n' in capsys.readouterr().err
    (home / "hotel.toml").write_text(f'agreement = "agreement-2.toml"\n{before}')
    assert Owner(home / "hotel.toml").agreement.title == "Again"
    assert "hotel.toml: exists already, and is not overwritten\nhint: " in refusal()
    path.write_text(path.read_text().replace("merge.example.org:9443", "merge.example.org:443"))
    join(INVITATION, None, None, None, None)
    assert 'change it to address = "merge.example.org:443" in [network]\n' in capsys.readouterr().err


def test_an_owner_joins_with_its_own_keys_alone(home: Path, drafted: Path) -> None:
    assert "'bank' is not an owner of this agreement\nhint: its owners: hotel, cinema, phones" in refusal("bank")
    assert "cinema.key: cannot be read" in refusal("cinema")
    shutil.copy(drafted / "phones.key", home)
    assert "has the keys of 2 owners: hotel, phones\nhint: say which: --owner hotel" in refusal()
    (home / "phones.key").replace(home / "cinema.key")
    assert "cinema.key: is not the identity that the agreement names for cinema" in refusal("cinema")
    shutil.copy(drafted / "phones.node", home / "hotel.node")
    assert "hotel.node: is not the node key that the agreement names for hotel" in refusal("hotel")
    for name in OWNERS:
        (home / f"{name}.key").unlink(missing_ok=True)
    assert "has no key of an owner of this agreement: hotel, cinema, phones\nhint: run this where" in refusal()


def test_a_missing_invitation_is_asked_of_the_drafter(home: Path) -> None:
    (home / INVITATION).unlink()
    assert refusal() == (
        "invitation.toml: there is no such file\nhint: ask the drafter for the invitation, which `amalgram draft "
        "--address HOST:PORT` writes"
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace("merge.example.org:9443", 'x\\"\\nname = \\"y:1'), "address"),
        (lambda text: text.replace("merge.example.org:9443", "\\u001b[2J:1"), "address"),
        (lambda text: text.replace("-----BEGIN", "-----BEGUN"), "root_certificate"),
        (lambda text: text.replace("-----BEGIN", "x" * 20_001 + "-----BEGIN", 1), "the maximum is 20000"),
        (lambda text: text.replace('title = "', 'title = "\\u001b]0;'), "title"),
        (lambda text: text[: text.index("[agreement]")], "agreement is missing"),
        (lambda text: re.sub(r'\nbase_digest = "\w+"', "", text), "base_digest is missing"),
        (lambda text: f"yes = true\n{text}", "unknown key yes"),
        (
            lambda text: text[text.index("[agreement]") :].replace("agreement.", ""),
            "is an agreement, not an invitation",
        ),
        (lambda text: text.replace("\n", "\x00", 1), "not valid TOML"),
    ],
)
def test_a_hostile_invitation_is_refused_before_anything_is_written(
    home: Path, damage: Callable[[str], str], message: str
) -> None:
    path = home / INVITATION
    path.write_text(damage(path.read_text()))
    said = refusal()
    assert message in said
    assert "\x1b" not in said


def test_what_stands_beside_the_certificates_is_not_taken_over(home: Path) -> None:
    path = home / INVITATION
    junk = "Trust me.\\n\\u0007-----BEGIN"
    path.write_text(path.read_text().replace("-----BEGIN", junk, 1))
    join(INVITATION, None, None, None, None)
    assert (home / "ca.pem").read_text().startswith("-----BEGIN CERTIFICATE-----")


@pytest.mark.parametrize("kind", COLUMNS)
def test_the_settings_of_every_kind_of_task_can_be_read(kind: str, drafted: Path, tmp_path: Path) -> None:
    invitation = read_invitation(drafted / INVITATION)
    task = invitation.agreement.task.model_copy(update={"kind": kind})
    changed = invitation.model_copy(update={"agreement": invitation.agreement.model_copy(update={"task": task})})
    path = tmp_path / "hotel.toml"
    path.write_text(
        owner_settings("hotel", changed, 'odd"\\\x7f\u200b model', Path("a b"), None, Path("agreement.toml"))
    )
    settings = load_settings(path, OwnerSettings)
    assert settings.fine_tuned == 'odd"\\\x7f\u200b model'
    assert settings.data.train == Path("a b")
    assert settings.data.test == Path("data/test" if kind == "image-classification" else "data/test.jsonl")
    assert (".conll" in path.read_text()) == (kind == "token-classification")


def test_the_settings_for_images_name_folders_of_one_subfolder_a_label(drafted: Path) -> None:
    invitation = read_invitation(drafted / INVITATION)
    task = invitation.agreement.task.model_copy(update={"kind": "image-classification"})
    changed = invitation.model_copy(update={"agreement": invitation.agreement.model_copy(update={"task": task})})
    text = owner_settings("hotel", changed, None, None, None, Path("agreement.toml"))
    assert (
        'train = "data/train"  # measured (and trained on): a folder with one subfolder per label, or a table of '
        'paths (.jsonl, .csv, .parquet)\ntest = "data/test"  # gives the metrics\n# validation = "data/validation"  '
    ) in text
