"""The example's three owners and the coordinator, set up as a simulation sets them up."""

import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from client.owner import Owner
from common.agreement import COORDINATOR, Agreement, AgreementDraft
from common.agreement.tables import Verification
from common.identity import Identity
from common.messages import Message, Packet
from common.models.loading import agreed_plan, load_base
from common.models.plan import MergePlan
from common.settings_file import load_settings
from deploy.complete import complete_agreement
from deploy.consortium import find_owner_files
from deploy.drafting import pool_of, with_pool
from deploy.simulation.parties import PartyKeys, set_up_parties


def identities_of(names: Sequence[str]) -> dict[str, Identity]:
    """Identities that are the same in every run, so that what depends on the agreement's digest is, too."""
    return {name: Identity(name=name, seed=bytes([number]) * 32) for number, name in enumerate(names, 1)}


IDENTITIES = identities_of(("ada", "bea", "cyd", COORDINATOR))  # the parties of the `agreement` fixture
_completed: dict[tuple[AgreementDraft, str], tuple[Agreement, MergePlan]] = {}


@dataclass(frozen=True)
class Parties:
    """`files`: each owner's settings file; all in `folder`, whose `state/` they use. Results go to `output`."""

    folder: Path
    output: Path
    base: Path
    coordinator: Path
    files: Mapping[str, Path]
    agreement: Agreement
    identities: Mapping[str, Identity]
    plan: MergePlan


def bring_models(consortium: Path, folder: Path) -> None:
    """Write the consortium to `folder` as it is once its owners have made their models, with fewer rows to judge on."""
    shutil.copytree(consortium, folder, ignore=shutil.ignore_patterns("output"))
    with TemporaryDirectory() as room, parties_of(folder, Path(room)) as made:
        for name, path in made.files.items():
            Owner(path).workbench.own_model().save_pretrained(folder / "models" / name)
    for path in made.files.values():
        settings = folder / path.name
        brought = re.sub(r"\[training\]\n(.+\n)+", "", settings.read_text().replace("# fine_tuned =", "fine_tuned ="))
        settings.write_text(brought + "max_validation_rows = 20\nmax_test_rows = 40\n")


def consortium_in_32_bits(reviews_folder: Path, folder: Path, alphas: str) -> Path:
    """The example, in `folder`, in two sums: one for the scales, and RegMean's on them."""
    shutil.copytree(reviews_folder, folder, ignore=shutil.ignore_patterns("output"))
    path = folder / "agreement.toml"
    text = path.read_text().replace("[summation]\n", "[summation]\nring_bits = 32\n")
    text = text.replace("alphas = [0.1, 0.5, 0.9, 0.95, 0.99]", f"alphas = {alphas}")
    path.write_text(text.replace('["average", "task_arithmetic", "fisher"]', "[]"))
    return folder


def one_may_drop_out(trained_folder: Path, folder: Path) -> Path:
    """The example, in `folder`, with four owners, three of whom are enough, and two single-round methods, one of them
    with a sweep.
    """
    shutil.copytree(trained_folder, folder, ignore=shutil.ignore_patterns("output"))
    for kind in ("data", "models"):
        shutil.copytree(folder / kind / "hotel", folder / kind / "inn")
    (folder / "inn.toml").write_text((folder / "hotel.toml").read_text().replace("hotel", "inn"))
    path = folder / "agreement.toml"
    text = path.read_text().replace("# min_owners = 3", "min_owners = 3")
    text = text.replace("alphas = [0.1, 0.5, 0.9, 0.95, 0.99]", "alphas = [0.9, 0.99]")
    text = text.replace('["average", "task_arithmetic", "fisher"]', '["average"]')
    path.write_text(text + '\n[[owners]]\nname = "inn"\n')
    return folder


def completed(draft: AgreementDraft, base: Path) -> tuple[Agreement, MergePlan]:
    """The agreement of a draft among `identities_of` its parties, and its merge plan; made once in this process."""
    key = draft, _digest_of_files(base)
    if key not in _completed:
        keys = {name: each.public_key for name, each in identities_of((*draft.owner_names, COORDINATOR)).items()}
        agreement = complete_agreement(draft, base, keys)
        plan = agreed_plan(load_base(base, agreement.task, agreement.seed), base, agreement)
        _completed[key] = agreement, plan
    return _completed[key]


def _digest_of_files(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        found.update(f"{path.name} {path.stat().st_size} ".encode() + path.read_bytes())
    return found.hexdigest()


@contextmanager
def parties_of(consortium: Path, output: Path, *, verified: bool = False) -> Iterator[Parties]:
    """The parties of a consortium, as a simulation sets them up.

    Unless merges are `verified`, tests can send owners models that are no merges, to see what else they check.
    """
    draft = load_settings(consortium / "agreement.toml", AgreementDraft)
    if not verified:
        draft = draft.model_copy(update={"verification": Verification(required=False)})
    base, pool = consortium / "base", pool_of(draft, consortium)
    draft = with_pool(draft, pool, base)
    identities = identities_of((*draft.owner_names, COORDINATOR))
    agreement, plan = completed(draft, base)
    files = find_owner_files(consortium, draft)
    with set_up_parties(output, agreement, base, files, PartyKeys(identities, nodes={}), pool) as (
        coordinator,
        party_files,
    ):
        yield Parties(
            folder=coordinator.parent,
            output=output,
            base=base,
            coordinator=coordinator,
            files=dict(zip(files, party_files, strict=True)),
            agreement=agreement,
            identities=identities,
            plan=plan,
        )


@contextmanager
def parties_with_method(
    reviews_folder: Path, folder: Path, method: str, *, verified: bool = False, adapter_rank: int | None = None
) -> Iterator[Parties]:
    """The example's parties, who agreed on this one method, and to publish an adapter of that rank if there is one."""
    consortium = folder / "consortium"
    shutil.copytree(reviews_folder, consortium, ignore=shutil.ignore_patterns("output"))
    path = consortium / "agreement.toml"
    text = path.read_text().replace('method = "regmean"', f'method = "{method}"')
    text = text.replace('["average", "task_arithmetic", "fisher"]', "[]")
    if adapter_rank is not None:
        text = text.replace("# [publish]\n# adapter_rank = 8 ", f"[publish]\nadapter_rank = {adapter_rank} ")
    path.write_text(text.replace("[task_arithmetic]", "[refit]\nbalances = [0.0]\n\n[task_arithmetic]"))
    with parties_of(consortium, folder / "output", verified=verified) as parties:
        yield parties


def searching(consortium: Path, folder: Path, basis: Sequence[str], **settings: int) -> Path:
    """A copy of a consortium that publishes the best of some mixtures of these methods' merges."""
    shutil.copytree(consortium, folder, ignore=shutil.ignore_patterns("output"))
    path, named = folder / "agreement.toml", str(list(basis)).replace("'", '"')
    text = path.read_text().replace('method = "regmean"', 'method = "search"')
    text = text.replace('["average", "task_arithmetic", "fisher"]', named)
    lines = "".join(f"{name} = {value}\n" for name, value in settings.items())
    path.write_text(f"{text}\n[isotropic]\nscales = [1.0]\n\n[search]\nbasis = {named}\n{lines}")
    return folder


class OwnersChannel:
    """Owners as the network has them, each built anew for every message."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = list(files.values())
        self.asked: list[Packet] = []

    def wait_for_nodes(self, count: int, timeout_seconds: float) -> list[int]:
        return list(range(len(self.files)))

    def exchange(self, requests: Mapping[int, Packet], timeout_seconds: float) -> Iterator[tuple[int, Packet | None]]:
        self.asked.append(next(iter(requests.values())))
        for node, packet in requests.items():
            yield node, self._answers(node, packet)

    @property
    def kinds(self) -> list[tuple[type[Message], ...]]:
        """What each packet held that the owners were asked."""
        return [tuple(type(message) for message in packet) for packet in self.asked]

    def _answers(self, node: int, packet: Packet) -> Packet | None:
        answers = []
        for request in packet:
            answer = self.answer(node, request)
            if answer is None:
                return None
            answers.append(answer)
        return tuple(answers)

    def answer(self, node: int, request: Message) -> Message | None:
        return Owner(self.files[node]).answer(request)
