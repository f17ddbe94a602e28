"""Things that many tests need: agreements and tiny models, made here, so that nothing is fetched."""

import logging
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that tests start, too: see torch.set_num_threads below

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import settings
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from common.agreement import Agreement, AgreementDraft, OwnerEntry, Task
from common.models import Delta, MergePlan, load_base, merge_plan
from common.settings_file import load_settings
from deploy.complete import complete_agreement
from deploy.example import reviews
from deploy.simulate import find_owner_files, make_identities, set_up_parties
from tests.parties import IDENTITIES, Parties

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # models this small gain nothing from a second thread, and a busy machine makes it dear
settings.register_profile("amalgram", deadline=None, max_examples=60)
settings.load_profile("amalgram")


@pytest.fixture
def own_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that run commands in this process: what these do to the log is undone afterwards."""
    log = logging.getLogger("amalgram")
    for name in ("handlers", "propagate", "level"):
        monkeypatch.setattr(log, name, getattr(log, name))


@pytest.fixture(scope="session")
def reviews_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The consortium that `amalgram simulate --init` writes; tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("reviews") / "consortium"
    reviews.write_consortium(folder)
    return folder


@pytest.fixture
def parties(reviews_folder: Path, tmp_path: Path) -> Iterator[Parties]:
    """The example's parties, each with its settings file and the one agreement; nothing has run yet."""
    with parties_of(reviews_folder, tmp_path) as made:
        yield made


@contextmanager
def parties_of(consortium: Path, output: Path) -> Iterator[Parties]:
    """The parties of a consortium, as a simulation sets them up."""
    draft = load_settings(consortium / "agreement.toml", AgreementDraft)
    base = consortium / "base"
    identities = make_identities(draft, output)
    agreement = complete_agreement(draft, base, {name: each.public_key for name, each in identities.items()})
    files = find_owner_files(consortium, draft)
    with set_up_parties(output, agreement, base, files, identities) as (coordinator, party_files):
        yield Parties(
            folder=coordinator.parent,
            output=output,
            base=base,
            coordinator=coordinator,
            files=dict(zip(files, party_files, strict=True)),
            agreement=agreement,
            identities=identities,
            plan=merge_plan(load_base(base, agreement.task, agreement.seed), agreement.tensors),
        )


def delta_of(fine_tuned: nn.Module, base: nn.Module) -> dict[str, Tensor]:
    """What fine-tuning changed, all of it at once."""
    return dict(Delta(dict(fine_tuned.named_parameters()), dict(base.named_parameters())))


def tiny_bert() -> BertForSequenceClassification:
    """A BERT of two blocks with random weights."""
    config = BertConfig(
        vocab_size=80,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=3,
        id2label={0: "a", 1: "b", 2: "c"},
        label2id={"a": 0, "b": 1, "c": 2},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertForSequenceClassification(config).eval()


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-bert")
    tiny_bert().save_pretrained(folder)
    reviews.make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def agreement(bert_folder: Path) -> Agreement:
    """Three owners, every method, over the tiny BERT; their identities are `tests.parties.IDENTITIES`."""
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
