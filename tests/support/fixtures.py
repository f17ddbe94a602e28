"""Things that many tests need: agreements and tiny models, made here, so that nothing is fetched."""

import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import settings

from client.measurement import fine_tuning
from common.agreement import Agreement, AgreementDraft, OwnerEntry, Task
from common.models.folders import _tokenizer
from common.models.plan import MergePlan, merge_plan
from deploy.complete import complete_agreement
from deploy.example import reviews
from deploy.simulation.simulate import simulate
from tests.support.models import tiny_bert
from tests.support.once import TRAINED, made_once, shared_folder, trained_once
from tests.support.parties import IDENTITIES, Parties, bring_models, parties_of
from tests.support.teaching import write_teaching

TRAIN = fine_tuning.fine_tune
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # models this small gain nothing from a second thread, and a busy machine makes it dear
settings.register_profile("amalgram", deadline=None, max_examples=60)
settings.load_profile("amalgram")


@pytest.fixture(autouse=True)
def _log_as_at_the_start() -> None:
    """What commands that run in this process do to the log, as --json does, changes no other test."""
    log = logging.getLogger("amalgram")
    log.handlers, log.propagate = [], True
    log.setLevel(logging.NOTSET)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this process puts temporary files, whatever the tests before have left in memory or on the disk."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # of modules that no process has imported before
    _tokenizer.cache_clear()  # or whether its files are copied would hang on the tests before
    return folder


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers share."""
    return shared_folder(tmp_path_factory)


@pytest.fixture(scope="session", autouse=True)
def _models_are_trained_once(shared: Path) -> Iterator[None]:
    (shared / "trained").mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fine_tuning, "fine_tune", trained_once(TRAIN, shared / "trained"))
        patch.setenv(TRAINED, str(shared / "trained"))  # for commands in processes of their own
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_power_is_cut() -> Iterator[None]:
    """Whoever reads a file that a killed process wrote finds it whole; only a crash of the machine needs a disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def trained_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the training itself: no weights are taken from an earlier test."""
    monkeypatch.setattr(fine_tuning, "fine_tune", TRAIN)


@pytest.fixture(scope="session")
def reviews_folder(shared: Path) -> Path:
    """The consortium that `amalgram simulate --init` writes, merged by RegMean, which has more to measure.

    Fisher information is of few examples, because it is dear. Tests copy the folder before they change it.
    """

    def write(folder: Path) -> None:
        reviews.write_consortium(folder)
        agreement = folder / "agreement.toml"
        text = agreement.read_text().replace('method = "data_free"', 'method = "regmean"')
        text = text.replace('["average", "task_arithmetic", "regmean"]', '["average", "task_arithmetic", "fisher"]')
        agreement.write_text(text + "\n[fisher]\nmeasured_examples = 16\n")

    return made_once(shared / "reviews", write)


@pytest.fixture(scope="session")
def little_folder(reviews_folder: Path, shared: Path) -> Path:
    """The same consortium on a base of one block, for tests that ask what a merge does and not how good its model is.

    Nearly everything in a merge of so small models takes as long as there are tensors.
    """

    def write(folder: Path) -> None:
        shutil.copytree(reviews_folder, folder, ignore=shutil.ignore_patterns("output"))
        base = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "base")
        del base.bert.encoder.layer[1:]
        base.config.num_hidden_layers = 1
        base.save_pretrained(folder / "base")

    return made_once(shared / "little", write)


@pytest.fixture(scope="session")
def trained_folder(little_folder: Path, shared: Path) -> Path:
    """The little consortium once its owners have made their models, with fewer rows to judge models on.

    Nearly everything that a message costs its owner is then what the message asks for.
    """

    return made_once(shared / "trained-consortium", partial(bring_models, little_folder))


@pytest.fixture(scope="session")
def teaching_folder(trained_folder: Path, shared: Path) -> Path:
    """The same, with a fourth owner whose model is another, and an agreement to distil all of them into one."""
    return made_once(shared / "teaching-consortium", partial(write_teaching, trained_folder))


@pytest.fixture(scope="session")
def taught(teaching_folder: Path, shared: Path) -> Path:
    """The output folder of a simulation of it; nobody changes it."""
    return made_once(shared / "taught", partial(simulate, teaching_folder))


@pytest.fixture(scope="session")
def two_blocks_folder(reviews_folder: Path, shared: Path) -> Path:
    """The same on the example's base, whose two blocks make a step each."""
    return made_once(shared / "two-blocks-consortium", partial(bring_models, reviews_folder))


@pytest.fixture(scope="session")
def example_run(reviews_folder: Path, shared: Path) -> Path:
    """The output folder of a simulation of the example, references included; nobody changes it."""
    return made_once(shared / "example-run", partial(simulate, reviews_folder))


@pytest.fixture
def parties(trained_folder: Path, tmp_path: Path) -> Iterator[Parties]:
    """The example's parties, each with its settings file and the one agreement; nothing has run yet."""
    with parties_of(trained_folder, tmp_path) as made:
        yield made


@pytest.fixture
def parties_that_train(reviews_folder: Path, tmp_path: Path) -> Iterator[Parties]:
    """The same, but owners make their models, on a base of two blocks."""
    with parties_of(reviews_folder, tmp_path) as made:
        yield made


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-bert")
    tiny_bert().save_pretrained(folder)
    reviews.make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def agreement(bert_folder: Path) -> Agreement:
    """Three owners, every method, over the tiny BERT; their identities are `tests.support.parties.IDENTITIES`."""
    draft = AgreementDraft(
        title="Test",
        base=str(bert_folder),
        owners=tuple(OwnerEntry(name=name) for name in ("ada", "bea", "cyd")),
        method="regmean",
        compare_with=("average", "task_arithmetic", "fisher"),
        task=Task(labels=("a", "b", "c")),
    )
    return complete_agreement(draft, bert_folder, {name: each.public_key for name, each in IDENTITIES.items()})


@pytest.fixture(scope="session")
def plan(agreement: Agreement) -> MergePlan:
    return merge_plan(tiny_bert(), agreement.tensors)
