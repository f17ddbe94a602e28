"""The files that set parties up: they parse, name what exists, take rights away; the runbook's commands parse."""

import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from client.settings import OwnerSettings
from common.agreement import AgreementDraft
from common.errors import ConsentError, SettingsError, WrongModel
from common.settings_file import Settings, load_settings, parse_settings
from server.settings import CoordinatorSettings
from tests.support.command_line import parse

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
RUNBOOK = (DEPLOY / "README.md").read_text()
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
OWNERS = ("hotel", "cinema", "phones")
MANIFESTS = {path.name: list(yaml.safe_load_all(path.read_text())) for path in (DEPLOY / "kubernetes").iterdir()}
UNITS = sorted((DEPLOY / "systemd").iterdir())
IMAGE = "amalgram:0.1.0"


# --- the runbook ---


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", RUNBOOK, re.MULTILINE | re.DOTALL)


def commands() -> Iterator[list[str]]:
    """The arguments of `amalgram` wherever the runbook calls it, also by way of another program."""
    for line in "\n".join(blocks("sh")).splitlines():
        called = re.search(r"(?:^|-- |\.venv/bin/)amalgram (.*)", line)
        if called:
            yield shlex.split(called[1])


def test_the_runbook_s_commands_are_commands_of_amalgram() -> None:
    called = list(commands())
    assert {arguments[0] for arguments in called} >= {
        "keys",
        "draft",
        "join",
        "agree",
        "server",
        "client",
        "merge",
        "report",
    }
    for arguments in called:
        parse(arguments)
    with pytest.raises(click.UsageError):
        parse(["client", "hotel.toml", "--no-such-option"])


def test_the_runbook_s_draft_is_what_the_program_reads() -> None:
    (text,) = blocks("toml")  # `amalgram draft` and `amalgram join` write the rest
    assert text.startswith("# short.toml\n")
    parse_settings(tomllib.loads(text), AgreementDraft, "short")


def test_the_runbook_s_files_are_there() -> None:
    named = set(re.findall(r"\bdeploy/[\w./-]+\w", RUNBOOK)) | set(re.findall(r"\btests/[\w./-]+\w", RUNBOOK))
    made_by_the_reader = {name for name in named if re.match(r"deploy/(parties|data)\b", name)}
    assert {name for name in named - made_by_the_reader if not (ROOT / name).exists()} == set()
    for unit in re.findall(r"\bamalgram-(?:client|server|merge)\b(?=`| --follow)", RUNBOOK):
        assert (DEPLOY / "systemd" / f"{unit}.service").is_file()


def test_the_messages_that_the_runbook_explains_are_the_program_s() -> None:
    table = RUNBOOK.split("| it says | where |")[1].split("\n\n")[0]
    rooms = ("common", "client", "server", "deploy")
    paths = [path for room in rooms for path in (ROOT / room).rglob("*") if path.suffix in (".py", ".jinja")]
    sources = " ".join(path.read_text() for path in paths)
    # Quotes between two parts of one text in the source, names put in, and backquotes do not count.
    plain = re.sub(r"\{[^{}]*\}", "...", re.sub(r'"\s*\n\s*f?"', "", sources)).replace("`", "")
    flowers = {"Failed to activate SuperNode"}
    cells = re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE)
    assert len(cells) == 28
    for quoted in re.findall(r"`([^`]+)`", "\n".join(cells)):
        for part in re.split(r"\.\.\.|cinema|9443", quoted):
            words = part.strip(" ,:;()")
            assert len(words) < 8 or words in flowers or words in plain, words


def test_no_unit_starts_a_client_again_that_has_found_a_wrong_model() -> None:
    unit = (DEPLOY / "systemd" / "amalgram-client.service").read_text()
    (codes,) = re.findall(r"^RestartPreventExitStatus=(.*)$", unit, re.MULTILINE)
    assert {WrongModel.exit_code, SettingsError.exit_code, ConsentError.exit_code} == set(map(int, codes.split()))


# --- settings, image, compose ---


@pytest.mark.parametrize(("name", "kind"), [("coordinator", CoordinatorSettings), ("owner", OwnerSettings)])
def test_the_settings_for_machines_and_containers_load(name: str, kind: type[Settings]) -> None:
    path = DEPLOY / "settings" / f"{name}.toml"
    load_settings(path, kind)
    for value in re.findall(r'"(/[^"]*)"', path.read_text()):
        assert value.startswith(("/etc/amalgram/", "/data/", "/var/lib/amalgram/")), value


def test_the_image_copies_what_exists_and_ends_as_a_user_without_rights() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    build, final = text.split("FROM ${PYTHON}\n")
    for source in re.findall(r"^COPY (?!--from)(.*) \S+$", build, re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split()), source
    assert "--require-hashes" in build
    assert re.findall(r"^COPY (.*)$", final, re.MULTILINE) == ["--from=build /opt/amalgram /opt/amalgram"]
    assert re.findall(r"^USER (.*)$", final, re.MULTILINE) == ["10001:10001"]
    assert not re.search(r"apt-get|curl|gcc", final)


def test_the_lock_has_every_dependency_with_hashes_at_the_tested_version_and_names_no_place() -> None:
    lock = (DEPLOY / "requirements.lock").read_text()
    assert not re.search(r"^-|://|file:|^\s*/", lock, re.MULTILINE)
    entries = re.findall(
        r"^([A-Za-z0-9_.-]+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", lock, re.MULTILINE
    )
    locked = {normal(name): version for name, version, _ in entries}
    assert len(entries) == lock.count("==")
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    tested = {normal(name): version for name, version in tested.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"]:
        name = normal(re.match(r"[A-Za-z0-9_.-]+", requirement)[0])  # type: ignore[index]
        assert locked[name].removesuffix("+cpu") == tested[name], name
    for name in locked.keys() & tested.keys():
        assert locked[name].removesuffix("+cpu") == tested[name], name


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_has_no_rights_and_a_read_only_root(name: str) -> None:
    service = SERVICES[name]
    assert service["image"] == IMAGE
    assert service["user"] == "10001:10001"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "devices", "pid", "ipc", "ports", "environment"} & service.keys()
    assert all(volume["read_only"] for volume in service["volumes"] if volume["type"] == "bind")
    assert [volume["target"] for volume in service["volumes"] if volume["type"] == "volume"] == ["/var/lib/amalgram"]
    parse(service["command"])
    settings = service["command"][1]
    assert settings in {config["target"] for config in service["configs"]}
    for kind in ("secrets", "configs"):
        for mounted in service[kind]:
            assert mounted["source"] in COMPOSE[kind]
            assert mounted["target"].startswith("/etc/amalgram/")


def test_secrets_are_secrets_and_every_party_has_its_own_alone() -> None:
    for name in OWNERS:
        assert {secret["source"] for secret in SERVICES[name]["secrets"]} == {f"{name}-key", f"{name}-node"}
        assert {volume["source"] for volume in SERVICES[name]["volumes"]} == {f"./data/{name}", f"{name}-state"}
    files = [Path(config["file"]).suffix for config in COMPOSE["configs"].values()]
    assert set(files) == {".toml", ".pem"}


def test_an_owner_reaches_the_server_and_nothing_else() -> None:
    for name in OWNERS:
        assert SERVICES[name]["networks"] == [name]
        assert COMPOSE["networks"][name] == {"internal": True}
        assert [other for other in SERVICES if name in SERVICES[other].get("networks", ())] == ["server", name]
    assert SERVICES["merge"]["network_mode"] == "service:server"


# --- units ---


def unit(path: Path) -> Mapping[str, list[str]]:
    settings: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            settings.setdefault(name, []).append(value)
    return settings


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_unit_runs_a_command_of_ours_as_a_user_without_rights(path: Path) -> None:
    settings = unit(path)
    (start,) = settings["ExecStart"]
    program, *arguments = shlex.split(start)
    assert program == "/opt/amalgram/.venv/bin/amalgram"
    parse(arguments)
    assert (DEPLOY / "settings" / Path(arguments[1]).name).is_file()
    for name, value in {
        "User": "amalgram",
        "CapabilityBoundingSet": "",
        "NoNewPrivileges": "yes",
        "ProtectSystem": "strict",
        "ProtectHome": "yes",
        "PrivateTmp": "yes",
        "StateDirectory": "amalgram",
        "StateDirectoryMode": "0700",
        "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX",
        "SuccessExitStatus": "143",
    }.items():
        assert settings[name] == [value], name
    assert settings["SystemCallFilter"][0] == "@system-service"


# --- kubernetes ---


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    for documents in MANIFESTS.values():
        for document in documents:
            if document["kind"] == "Pod":
                yield document["metadata"]["name"], document["spec"]
            elif document["kind"] == "StatefulSet":
                yield document["metadata"]["name"], document["spec"]["template"]["spec"]


@pytest.mark.parametrize(("name", "pod"), [pytest.param(*each, id=each[0]) for each in pods()])
def test_a_pod_is_restricted_and_its_root_read_only(name: str, pod: dict[str, Any]) -> None:
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 10001
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert all(
        {"configMap", "secret", "emptyDir", "persistentVolumeClaim"} & volume.keys() for volume in pod["volumes"]
    )
    for container in (*pod["initContainers"], *pod["containers"]):
        assert container["image"] == IMAGE
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
    (main,) = pod["containers"]
    parse(main["args"])
    assert next(mount for mount in main["volumeMounts"] if mount["mountPath"] == "/data")["readOnly"] is True
    assert (DEPLOY / "settings" / Path(main["args"][1]).name).is_file()


def test_a_namespace_lets_nothing_through_but_node_to_server_and_names() -> None:
    policies = {
        (document["metadata"]["namespace"], document["metadata"]["name"]): document["spec"]
        for documents in MANIFESTS.values()
        for document in documents
        if document["kind"] == "NetworkPolicy"
    }
    assert len(policies) == 4
    for namespace in ("amalgram-coordinator", "amalgram-owner"):
        deny = policies[namespace, "nothing-else"]
        assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    ingress = policies["amalgram-coordinator", "owners-to-server"]
    assert [port["port"] for rule in ingress["ingress"] for port in rule["ports"]] == [9443]
    assert "egress" not in ingress
    egress = policies["amalgram-owner", "node-to-server"]
    assert all("to" in rule for rule in egress["egress"])
    assert [port["port"] for rule in egress["egress"] for port in rule["ports"]] == [9443, 53, 53]
    for documents in MANIFESTS.values():
        for document in documents:
            if document["kind"] == "Namespace":
                assert document["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_no_owner_s_node_starts_before_somebody_consented() -> None:
    (node,) = [document for document in MANIFESTS["owner.yaml"] if document["kind"] == "StatefulSet"]
    assert node["spec"]["replicas"] == 0
