"""What the documents say is so: their commands parse and print what they show, their code runs, their links lead on."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from common.summation import masked
from common.summation.masked.owner import OWNER_TRANSITIONS
from common.summation.masked.phases import Phase
from tests.support.command_line import parse, parsers
from tests.support.documents import ROOT, _matches, blocks, run_document

DOCUMENTS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "deploy" / "README.md", *DOCUMENTS]
RUN = [each for each in DOCUMENTS if {language for language, _ in blocks(each)} & {"console", "python"}]


@pytest.mark.parametrize("document", RUN, ids=lambda path: path.stem)
@pytest.mark.usefixtures("own_log")
def test_what_a_document_shows_is_what_happens(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
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
    assert [step for step, *_ in rows[1:] if step] == [phase for phase in Phase if phase != Phase.WHOLE_INPUT]
    assert {request for _, request, _ in rows[2:]} == {kind.__name__ for _, kind in OWNER_TRANSITIONS}
    assert shown == [message for _, *request_and_answer in rows[1:] for message in request_and_answer]


# --- the method that add-a-merge-method.md adds ---


@pytest.fixture(scope="module")
def three_models(reviews_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The example's base, changed three times, partly alike."""
    folder = tmp_path_factory.mktemp("models")
    alike = torch.Generator().manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(reviews_folder / "base")
    common_change = {
        name: torch.randn(each.shape, generator=alike)
        for name, each in base.state_dict().items()
        if each.is_floating_point()
    }
    made = {}
    for seed, name in enumerate(("hotel", "cinema", "phones"), 1):
        model = AutoModelForSequenceClassification.from_pretrained(reviews_folder / "base")
        own = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                parameter += 0.01 * (common_change[parameter_name] + torch.randn(parameter.shape, generator=own))
        made[name] = folder / name
        model.save_pretrained(made[name])
        AutoTokenizer.from_pretrained(reviews_folder / "base").save_pretrained(made[name])
    return made


def test_the_added_method_merges_masked_what_its_oracle_says(
    reviews_folder: Path, three_models: dict[str, Path], tmp_path: Path
) -> None:
    document = ROOT / "docs" / "add-a-merge-method.md"
    module, oracle = [text for language, text in blocks(document) if language == "python"]
    (changes,) = [text for language, text in blocks(document) if language == "diff"]
    program = tmp_path / "program"
    for name in ("common", "client", "server", "deploy"):
        shutil.copytree(ROOT / name, program / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, program)
    (program / "common" / "merge_methods" / "model_stock.py").write_text(module)
    apply(changes, program)
    consortium = tmp_path / "consortium"
    consortium.mkdir()
    owners = "".join(f'[[owners]]\nname = "{name}"\n' for name in three_models)
    draft = (
        f'title = "Three"\nbase = "{reviews_folder / "base"}"\nmethod = "model_stock"\nweighting = "owners"\n{owners}'
    )
    (consortium / "agreement.toml").write_text(draft)
    rows = reviews_folder / "data" / "hotel"
    for name, model in three_models.items():
        data = f'[data]\ntrain = "{rows / "train.jsonl"}"\ntest = "{rows / "test.jsonl"}"\n'
        (consortium / f"{name}.toml").write_text(f'name = "{name}"\nfine_tuned = "{model}"\n{data}')
    command = [sys.executable, "-c", "from deploy.cli import main; main()", "simulate", "consortium", "--no-references"]
    environment = os.environ | {"PYTHONPATH": str(program)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert " Model Stock " in done.stdout
    assert "masked sum" in done.stdout
    names: dict[str, Any] = {}
    exec(oracle, names)
    weights = [weights_of(path) for path in three_models.values()]
    base, merged = weights_of(reviews_folder / "base"), weights_of(consortium / "output" / "model")
    for name, before in base.items():
        expected = names["model_stock_of"]([each[name] - before for each in weights])
        torch.testing.assert_close(merged[name] - before, expected, atol=1e-6, rtol=1e-4)
        assert expected.norm() < (sum(each[name] - before for each in weights) / 3).norm()  # it is not the average


def apply(changes: str, program: Path) -> None:
    """Apply the document's diff: what is taken away must stand in the file exactly once."""
    for change in changes.split("--- ")[1:]:
        path, *lines = change.splitlines()
        before, after = ("\n".join(line[1:] for line in lines if line[0] == sign) for sign in "-+")
        text = (program / path).read_text()
        assert text.count(before) == 1, f"{path}: {before}"
        (program / path).write_text(text.replace(before, after))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    return {name: parameter.detach().double() for name, parameter in model.named_parameters()}
