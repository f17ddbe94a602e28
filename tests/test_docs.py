"""Documents are true: commands parse and print what is shown, code runs, links and named files exist."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from client.settings import OwnerSettings
from common.agreement import AgreementDraft
from common.merge_methods import METHODS
from common.settings_file import load_settings
from common.summation import masked
from common.summation.masked.owner import OWNER_TRANSITIONS
from common.summation.masked.phases import Phase
from tests.support.command_line import parse, parsers
from tests.support.commands import amalgram
from tests.support.documents import ROOT, _matches, blocks, run_document

DOCUMENTS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "deploy" / "README.md", *DOCUMENTS]
ROOMS = ("common", "client", "server", "deploy", "docs", "examples", "benchmarks", "tests")
FILES = [path for room in ROOMS for path in (ROOT / room).rglob("*")]
MADE_BY_THE_READER = r"deploy/(parties|data)/|common/merge_methods/model_stock.py"
RUN = [each for each in DOCUMENTS if {language for language, _ in blocks(each)} & {"console", "python"}]


@pytest.mark.parametrize("document", RUN, ids=lambda path: path.stem)
def test_what_a_document_shows_is_what_happens(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with patch.dict(METHODS):  # a document may add one
        run_document(document)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_commands_that_a_page_names_are_commands(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    named = re.findall(r"`(amalgram [^`]+)`", text.replace("\n", " "))
    shown = [line for language, block in blocks(page) if language in ("console", "sh") for line in block.splitlines()]
    named += [line.removeprefix("$ ") for line in shown if re.match(r"(\$ )?amalgram ", line)]
    commands = {words for words, _ in parsers()}
    for command in named:
        if command not in commands:  # said without arguments, a command is only named
            parse(shlex.split(command, comments=True)[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            name, _, heading = target.partition("#")
            found = (page.parent / name).resolve() if name else page
            assert found.exists(), target
            assert not heading or heading in headings(found), target


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_files_that_a_page_names_exist(page: Path) -> None:
    ours = rf"(?:{'|'.join(ROOMS)})/[\w./-]+"
    named = re.findall(rf"`({ours}|[\w./-]+\.(?:py|jinja|md))`", page.read_text())
    for name in (each.rstrip("/") for each in named if not re.match(MADE_BY_THE_READER, each)):
        assert any(path.as_posix().endswith(f"/{name}") for path in FILES) or (ROOT / name).exists(), name


def test_the_layout_s_files_exist() -> None:
    (tree,) = re.findall(
        r"^```\n(common/.*?)^```$", (ROOT / "docs" / "layout.md").read_text(), re.MULTILINE | re.DOTALL
    )
    folders: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        path, *others = re.findall(r"[\w-]+/|[a-z_]+\.(?:py|md|yaml)", line)
        folders[depth:] = [path]
        beside, inside = ROOT.joinpath(*folders[:depth]), ROOT.joinpath(*folders)
        assert inside.exists(), line
        assert [name for name in others if not (inside / name).exists() and not (beside / name).exists()] == [], line


def test_the_settings_that_are_shown_are_settings(tmp_path: Path) -> None:
    document = (ROOT / "docs" / "merge-in-ten-minutes.md").read_text()
    shown = re.findall(r"^```toml\n# \S+/(\S+)\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)
    assert len(shown) >= 8
    for name, text in shown:
        path = tmp_path / "settings.toml"
        path.write_text(text)
        load_settings(path, AgreementDraft if name == "agreement.toml" else OwnerSettings)


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_a_document_that_is_not_true_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    document = tmp_path / "page.md"
    for block, is_true in (
        ("console\n$ echo one\none\n", True),
        ("console\n$ echo one\ntwo\n", False),
        ("console\n$ echo accuracy 0.912\naccuracy 0.9\n", False),
        ("python\nassert 1 == 2\n", False),
    ):
        document.write_text(f"```{block}```\n")
        if is_true:
            run_document(document)
        else:
            with pytest.raises(AssertionError):
                run_document(document)
    assert _matches(["a", "...", "accuracy 0.900"], ["a", "b", "c", "accuracy 0.940"])
    assert not _matches(["a", "...", "accuracy 0.900"], ["a", "b", "c", "accuracy 0.960"])
    assert not _matches(["a"], ["a", "b"])


def test_the_sequence_diagram_is_the_masked_sum_s() -> None:
    (diagram,) = [text for language, text in blocks(ROOT / "docs" / "how-it-works.md") if "sequenceDiagram" in text]
    assert ";" not in diagram  # it would end a statement in the middle of a text
    shown = re.findall(r"(?:C-+>>H|H-+>>C): (\w+)", diagram)
    rows = re.findall(r"^ {4}(\w*) {2,}(\w+) {2,}(\w+)(?: \w+)? {2,}\S", masked.__doc__ or "", re.MULTILINE)
    assert rows[0] == ("step", "coordinator", "owner")
    assert [step for step, *_ in rows[1:] if step] == [
        phase for phase in Phase if phase.isalpha()
    ]  # the others are within MaskedInput
    assert {request for _, request, _ in rows[2:]} == {kind.__name__ for _, kind in OWNER_TRANSITIONS}
    assert shown == [message for _, *request_and_answer in rows[1:] for message in request_and_answer]


# --- the method that add-a-merge-method.md adds ---


@pytest.fixture(scope="module")
def three_models(little_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The example's base, changed three times, partly alike."""
    folder = tmp_path_factory.mktemp("models")
    alike = torch.Generator().manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(little_folder / "base")
    common_change = {
        name: torch.randn(each.shape, generator=alike)
        for name, each in base.state_dict().items()
        if each.is_floating_point()
    }
    made = {}
    for seed, name in enumerate(("hotel", "cinema", "phones"), 1):
        model = AutoModelForSequenceClassification.from_pretrained(little_folder / "base")
        own = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                parameter += 0.01 * (common_change[parameter_name] + torch.randn(parameter.shape, generator=own))
        made[name] = folder / name
        model.save_pretrained(made[name])
        AutoTokenizer.from_pretrained(little_folder / "base").save_pretrained(made[name])
    return made


@dataclass(frozen=True)
class Added:
    """What a program with the page's file wrote, with Model Stock as the method and with it in comparison."""

    model_stock_of: Callable[[list[torch.Tensor]], torch.Tensor]  # the page's oracle
    printed: str
    as_method: Path
    as_comparison: Path


@pytest.fixture(scope="module")
def added(little_folder: Path, three_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Added:
    """Two masked and verified merges by a copy of the program, which has the page's file."""
    folder = tmp_path_factory.mktemp("added")
    module, oracle = [
        text for language, text in blocks(ROOT / "docs" / "add-a-merge-method.md") if language == "python"
    ]
    program = folder / "program"
    for name in ("common", "client", "server", "deploy"):
        shutil.copytree(ROOT / name, program / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, program)
    assert module == (program / "common" / "merge_methods" / "model_stock.py").read_text()
    for consortium, methods in (
        ("as_method", 'method = "model_stock"'),
        ("as_comparison", 'method = "average"\ncompare_with = ["model_stock"]'),
    ):
        write_consortium(folder / consortium, methods, little_folder, three_models)
    printed = ""
    for consortium in ("as_method", "as_comparison"):
        done = amalgram("simulate", consortium, "--no-references", cwd=folder, program=program)
        assert done.returncode == 0, done.stderr
        printed += done.stdout
    names: dict[str, Any] = {}
    exec(oracle, names)
    return Added(
        model_stock_of=names["model_stock_of"],
        printed=printed,
        as_method=folder / "as_method" / "output",
        as_comparison=folder / "as_comparison" / "output",
    )


def write_consortium(folder: Path, methods: str, little_folder: Path, models: dict[str, Path]) -> None:
    folder.mkdir()
    owners = "".join(f'[[owners]]\nname = "{name}"\n' for name in models)
    draft = f'title = "Three"\nbase = "{little_folder / "base"}"\n{methods}\nweighting = "owners"\n{owners}'
    (folder / "agreement.toml").write_text(draft)
    rows = little_folder / "data" / "hotel"
    for name, model in models.items():
        data = f'[data]\ntrain = "{rows / "train.jsonl"}"\ntest = "{rows / "test.jsonl"}"\n'
        (folder / f"{name}.toml").write_text(f'name = "{name}"\nfine_tuned = "{model}"\n{data}')


def test_the_added_method_merges_masked_what_its_oracle_says(
    added: Added, little_folder: Path, three_models: dict[str, Path]
) -> None:
    weights = [weights_of(path) for path in three_models.values()]
    base, merged = weights_of(little_folder / "base"), weights_of(added.as_method / "model")
    for name, before in base.items():
        expected = added.model_stock_of([each[name] - before for each in weights])
        torch.testing.assert_close(merged[name] - before, expected, atol=1e-6, rtol=1e-4)
        assert expected.norm() < (sum(each[name] - before for each in weights) / 3).norm()  # it is not the average


def test_the_added_method_is_in_table_report_page_and_card_as_method_and_in_comparison(added: Added) -> None:
    assert added.printed.count(" Model Stock ") >= 2
    assert added.printed.count("masked sum") == 2
    for output, methods in (
        (added.as_method, ["model_stock"]),
        (added.as_comparison, ["average", "model_stock"]),
    ):
        report = json.loads((output / "report.json").read_text())
        assert report["method"] == methods[0]
        assert set(report["methods"]) == set(methods)
        assert report["methods"]["model_stock"]["title"] == "Model Stock"
        assert report["evaluation"]["mean"]["model_stock"]["accuracy"] > 0
        assert "the squared length of the owner&#39;s weight change" in (output / "report.html").read_text()
        assert "Model Stock" in (output / "report.html").read_text()
        assert "Model Stock" in (output / "model" / "README.md").read_text()


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    return {name: parameter.detach().double() for name, parameter in model.named_parameters()}
