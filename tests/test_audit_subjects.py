"""Audits of folders that nobody here made: other architectures, tokenizers and labels, and folders that lie."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPTJConfig,
    GPTJForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from client.audit.audit import audit
from client.audit.page import page_of
from client.audit.result import Audit
from client.audit.rows import View, compared_rows
from client.audit.scores import predict
from client.audit.subjects import Subject, matched, own_subject, subject_in
from client.audit.verdict import cautions
from client.data.rows import IGNORED
from client.holdings import Holdings
from client.settings import OwnerSettings
from common.agreement import Reading
from common.errors import DataError, ModelError
from common.models.folders import load_image_processor
from common.settings_file import load_settings
from common.text import shown
from deploy.example.reviews import LABELS, make_tokenizer
from tests.support.parties import Parties

MIRRORED = tuple(label.upper() for label in reversed(LABELS))  # the agreed labels in another order and spelling
HOSTILE = "<script>\x1b[31m\u202e"
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "pad_token_id": 0,
}
GPT2: dict[str, Any] = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}


def another_tokenizer(*, pads: bool = True) -> PreTrainedTokenizerFast:
    """One that minds capital letters, and knows the words of the example by other numbers."""
    words = [word for word in make_tokenizer().get_vocab() if word[0] != "["]
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", "<s>", *sorted(words, reverse=True)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("<s>", 2), ("<s>", 2))
    padding = {"pad_token": "<pad>"} if pads else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<s>", **padding)


WORDS = len(another_tokenizer())


def labelled(labels: Sequence[str] = MIRRORED) -> dict[str, Any]:
    return {"id2label": dict(enumerate(labels)), "label2id": {label: number for number, label in enumerate(labels)}}


def bert(labels: Sequence[str] = MIRRORED) -> PreTrainedModel:
    return BertForSequenceClassification(BertConfig(vocab_size=WORDS, **SIZES, **labelled(labels)))


def saved(model: PreTrainedModel, folder: Path, *, pads: bool = True, **options: Any) -> Path:
    """The folder of a model whose weights are random, and large enough that its outputs differ."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape) / 2)
    model.save_pretrained(folder, **options)
    another_tokenizer(pads=pads).save_pretrained(folder)
    return folder


def reconfigured(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.fixture(scope="module")
def hotel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Holdings:
    from tests.support.parties import parties_of

    folder = request.getfixturevalue("trained_folder")
    with parties_of(folder, tmp_path_factory.mktemp("parties")) as parties:
        return holdings_of(parties)


def holdings_of(parties: Parties) -> Holdings:
    settings = load_settings(parties.files["hotel"], OwnerSettings)
    whole = settings.data.model_copy(update={"max_validation_rows": None, "max_test_rows": None})
    return Holdings(settings.model_copy(update={"data": whole}), parties.folder, parties.agreement)


@pytest.fixture(scope="module")
def own(hotel: Holdings) -> Subject:
    return own_subject(hotel)


def texts_of(hotel: Holdings) -> list[dict[str, str]]:
    return [json.loads(line) for line in (hotel._home / hotel.settings.data.test).read_text().splitlines()]


# --- what is read as it says itself ---


CLASSIFIERS: dict[str, Any] = {
    "bert": bert,
    "roberta": lambda: RobertaForSequenceClassification(
        RobertaConfig(vocab_size=WORDS, max_position_embeddings=66, **SIZES, **labelled())
    ),
    "distilbert": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=WORDS, dim=16, n_layers=1, n_heads=2, hidden_dim=24, **labelled())
    ),
    "gpt2": lambda: GPT2ForSequenceClassification(GPT2Config(vocab_size=WORDS, **GPT2, **labelled())),
    "llama": lambda: LlamaForSequenceClassification(LlamaConfig(vocab_size=WORDS, **SIZES, **labelled())),
}


def albert() -> PreTrainedModel:
    return AlbertForSequenceClassification(AlbertConfig(vocab_size=WORDS, embedding_size=8, **SIZES, **labelled()))


def gptj() -> PreTrainedModel:
    return GPTJForSequenceClassification(
        GPTJConfig(vocab_size=WORDS, rotary_dim=4, pad_token_id=0, **GPT2, **labelled())
    )


@pytest.mark.parametrize("architecture", CLASSIFIERS)
def test_a_classifier_of_any_architecture_is_asked_with_its_own_tokenizer_and_labels(
    architecture: str, hotel: Holdings, own: Subject, tmp_path: Path
) -> None:
    """The slow way beside it: one text at a time, and the label's number by its name."""
    folder = saved(CLASSIFIERS[architecture](), tmp_path / "model", max_shard_size="3KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    subject = subject_in(hotel, own.origin, folder, base=None)
    assert subject.origin.base is None
    rows = subject.origin.view.test()
    found = predict(subject.model, rows, 32, "").losses
    model, tokenizer = type(subject.model).from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for row, loss in list(zip(texts_of(hotel), found, strict=False))[:5]:
        with torch.no_grad():
            logits = model(**tokenizer(row["text"], return_tensors="pt", return_token_type_ids=False)).logits[0]
        number = MIRRORED.index(row["label"].upper())
        assert loss == pytest.approx(-float(logits.log_softmax(-1)[number]), abs=1e-4)


def test_a_language_model_is_attacked_by_its_loss_on_the_texts(hotel: Holdings, own: Subject, tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **SIZES)).to(torch.bfloat16)
    folder = saved(model, tmp_path / "model", pads=False)
    subject = subject_in(hotel, own.origin, folder, base=None)
    assert subject.origin.task.kind == "causal-lm"
    assert "by its loss on the texts" in subject.warnings[1]
    found = predict(subject.model, subject.origin.view.test(), 32, "").losses
    tokens = AutoTokenizer.from_pretrained(folder)(texts_of(hotel)[0]["text"], return_tensors="pt").input_ids
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens, labels=tokens).loss
    assert found[0] == pytest.approx(float(expected), abs=1e-4)


@given(order=st.permutations(("joy", "Anger", "sadness", "fear")), known=st.integers(1, 4), upper=st.booleans())
def test_labels_are_found_by_name_in_any_order_and_spelling(order: list[str], known: int, upper: bool) -> None:
    agreed = ("joy", "Anger", "sadness", "fear")
    own = tuple(label.upper() if upper else label for label in ["love", *order[:known]])
    numbers = matched(own, agreed)
    for label, number in zip(agreed, numbers, strict=True):
        assert (number == IGNORED) == (label not in order[:known])
        assert number == IGNORED or own[number].casefold() == label.casefold()


def test_a_label_that_could_be_two_of_the_model_s_is_none() -> None:
    assert matched(("JOY", "Joy", "fear"), ("joy", "fear")).tolist() == [IGNORED, 2]
    assert matched(("joy", "JOY", "fear"), ("JOY", "joy")).tolist() == [1, 0]
    assert matched(("joy", "fear"), ("JOY", "joy")).tolist() == [IGNORED, 0]
    assert matched(("joy", "joy"), ("joy", "fear")).tolist() == [IGNORED, IGNORED]


def test_rows_whose_label_the_model_lacks_are_left_out_and_counted(
    hotel: Holdings, own: Subject, tmp_path: Path
) -> None:
    folder = saved(bert(("neutral", MIRRORED[0])), tmp_path / "model")
    subject = subject_in(hotel, own.origin, folder, base=None)
    assert any("1 of the 2 agreed labels" in line for line in subject.warnings)
    rows, others = compared_rows(hotel, [own.origin.view, subject.origin.view], most=1000)
    assert set(others.members.targets.tolist()) == {1}
    assert len(set(np.asarray(rows.members.targets).tolist())) == 1
    everything = sum(map(len, (hotel.data.train(), hotel.data.test(), hotel.data.validation())))
    assert rows.not_judged == everything - len(rows.all_members) - len(rows.all_strangers) > 0


def test_all_models_are_attacked_on_the_same_rows_and_none_reads_a_member_like_a_stranger(
    hotel: Holdings, own: Subject, tmp_path: Path
) -> None:
    subject = subject_in(hotel, own.origin, saved(bert(), tmp_path / "model"), base=None)
    sees, also = own.origin.view, subject.origin.view
    (alone,) = compared_rows(hotel, [sees], most=30)
    one, other = compared_rows(hotel, [sees, also], most=30)
    known, theirs = make_tokenizer(), another_tokenizer()
    for rows, read in ((one.members, other.members), (one.strangers, other.strangers), (alone.members, other.members)):
        texts = [known.decode(row["input_ids"], skip_special_tokens=True) for row in rows.features]
        assert texts == [theirs.decode(row["input_ids"][1:-1]) for row in read.features]


def test_a_row_that_any_model_reads_like_one_of_the_other_group_is_in_neither(hotel: Holdings, own: Subject) -> None:
    """One that knows fewer words takes more rows for the same."""
    coarse = make_tokenizer()
    words = dict.fromkeys(coarse.get_vocab(), 1) | {"[PAD]": 0, "[CLS]": 2, "[SEP]": 3}
    coarse.backend_tokenizer.model = models.WordLevel(words | {"was": 4, "dirty": 5, "clean": 6}, unk_token="[UNK]")
    lenient = Reading(max_empty=1, max_equal=1, max_unknown=1)
    sees = own.origin.view
    dim = View(data=replace(sees.data, tokenizer=coarse, reading=lenient))
    (before,) = compared_rows(hotel, [sees], most=1000)
    with pytest.raises(DataError, match="rows are left that the other files do not hold"):
        compared_rows(hotel, [sees, dim], most=1000)
    assert len(before.members) > 50


# --- what is refused ---


def refusal(hotel: Holdings, own: Subject, folder: Path, base: Path | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        subject_in(hotel, own.origin, folder, base)
    assert len(str(caught.value)) < 800
    return str(caught.value)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda: BertModel(BertConfig(vocab_size=WORDS, **SIZES)), "has no head for text-classification"),
        (lambda: BertForMaskedLM(BertConfig(vocab_size=WORDS, **SIZES)), "names BertForMaskedLM"),
        (lambda: bert(("love", HOSTILE * 99)), "none of its labels is one of the agreed labels: it has love"),
        (lambda: bert(("LABEL_0", "LABEL_1", "LABEL_2")), "has 3 labels, the agreement 2"),
    ],
    ids=["no head", "another head", "other labels", "too many numbers"],
)
def test_a_model_that_says_nothing_of_the_agreed_labels_is_refused(
    model: Any, says: str, hotel: Holdings, own: Subject, tmp_path: Path
) -> None:
    assert says in refusal(hotel, own, saved(model(), tmp_path / "model"))


def test_code_in_a_folder_never_runs(hotel: Holdings, own: Subject, tmp_path: Path) -> None:
    code = {"auto_map": {"AutoConfig": "evil.C", "AutoModelForSequenceClassification": "evil.M"}}
    folder = reconfigured(saved(bert(), tmp_path / "model"), **code)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\n")
    assert type(subject_in(hotel, own.origin, folder, base=None).model) is BertForSequenceClassification
    says = refusal(hotel, own, reconfigured(folder, model_type=HOSTILE * 1000))
    assert "none of transformers' own" in says
    assert "\x1b" not in shown(says)
    assert not (tmp_path / "ran").exists()


def test_a_configuration_that_describes_more_than_the_files_hold_is_refused_before_anything_is_allocated(
    hotel: Holdings, own: Subject, tmp_path: Path
) -> None:
    folder = saved(bert(), tmp_path / "model")
    wide = Path(shutil.copytree(folder, tmp_path / "wide"))
    assert "numbers, and its files hold" in refusal(hotel, own, reconfigured(wide, intermediate_size=1 << 20))
    assert "describes far more than its files" in refusal(hotel, own, reconfigured(wide, hidden_size=1 << 14))
    says = refusal(hotel, own, reconfigured(folder, num_hidden_layers=3000))
    assert "num_hidden_layers = 3000, and its files hold 25 tensors" in says


def test_a_configuration_that_counts_beyond_all_measure_is_refused_before_anything_is_made(
    hotel: Holdings, own: Subject, tmp_path: Path
) -> None:
    """By keys of one architecture alone: groups of layers, the depths of stages, labels, and tables of positions."""
    folder = saved(albert(), tmp_path / "albert")
    assert "describes far more than its files" in refusal(hotel, own, reconfigured(folder, inner_group_num=4000))
    says = refusal(hotel, own, reconfigured(saved(bert(), tmp_path / "bert"), depths=[[{"global": 0}, 1 << 40]]))
    assert "counts 1099511627776 by 'depths'" in says
    says = refusal(hotel, own, reconfigured(saved(bert(), tmp_path / "more"), num_labels=1 << 40))
    assert "counts 1099511627776 by 'num_labels'" in says
    positions = {"n_positions": 1 << 40}
    says = refusal(hotel, own, reconfigured(saved(gptj(), tmp_path / "gptj"), **positions))
    assert "describes masks and tables of" in says


@pytest.mark.parametrize(
    ("configuration", "says"),
    [
        ({"size": {"height": 1 << 20, "width": 1 << 20}}, "at most 8192 pixels a side"),
        ({"size": 224, "crop_size": [224, 1 << 20]}, "at most 8192 pixels a side"),
        ({"size": {"shortest_edge": 224}, "crop_pct": 1e-9}, "at least 0.1 makes sense"),
    ],
)
def test_an_image_processor_that_enlarges_images_beyond_all_measure_is_refused(
    configuration: dict[str, Any], says: str, tmp_path: Path
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(configuration))
    with pytest.raises(ModelError, match=says):
        load_image_processor(tmp_path)


def test_a_folder_without_a_tokenizer_says_what_to_do(hotel: Holdings, own: Subject, tmp_path: Path) -> None:
    folder = saved(bert(), tmp_path / "model")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert "has no tokenizer of its own" in refusal(hotel, own, folder)


def test_weights_that_are_unrelated_to_the_base_s_are_not_compared_with_it(
    hotel: Holdings, own: Subject, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(hotel.base_folder, folder)
    assert subject_in(hotel, own.origin, folder, base=None).origin is own.origin
    model = BertForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape) * 0.05)
    model.save_pretrained(folder)
    assert subject_in(hotel, own.origin, folder, base=None).origin.base is None


# --- with a base that the owner names ---


def test_an_adapter_of_another_base_is_audited_with_that_base(hotel: Holdings, own: Subject, tmp_path: Path) -> None:
    body = BertModel(BertConfig(vocab_size=WORDS, **SIZES))
    base = saved(body, tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora" in name:
                parameter += 0.1
    adapted.save_pretrained(tmp_path / "adapter")
    assert "name the base that the adapter was trained on: --base FOLDER" in refusal(hotel, own, tmp_path / "adapter")
    subject = subject_in(hotel, own.origin, tmp_path / "adapter", base)
    assert subject.origin.base is not None
    query = "bert.encoder.layer.0.attention.self.query.weight"
    merged = adapted.merge_and_unload().get_parameter(query)
    torch.testing.assert_close(subject.model.get_parameter(query), merged)
    assert "does not name its labels" in subject.warnings[0]


def test_an_adapter_of_a_rank_that_its_file_does_not_hold_is_refused_before_anything_is_made(
    hotel: Holdings, own: Subject, tmp_path: Path
) -> None:
    model = BertForSequenceClassification.from_pretrained(hotel.base_folder)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    adapted.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 1 << 20}))
    assert "its adapter_config.json describes far more than its files hold" in refusal(hotel, own, tmp_path)


def test_a_model_that_was_not_made_from_the_named_base_is_refused(
    hotel: Holdings, own: Subject, tmp_path: Path
) -> None:
    folder = saved(bert(), tmp_path / "model")
    other = saved(BertModel(BertConfig(vocab_size=WORDS, **SIZES | {"hidden_size": 8})), tmp_path / "other")
    assert "it was not fine-tuned from this base" in refusal(hotel, own, folder, other)


@pytest.fixture(scope="module")
def foreign(hotel: Holdings, own: Subject, tmp_path_factory: pytest.TempPathFactory) -> tuple[Audit, Audit]:
    """Audits of one model without and with its base: a classifier that has one label more, which is hostile."""
    room = tmp_path_factory.mktemp("foreign")
    labels = (HOSTILE, *MIRRORED)
    base = saved(bert(labels), room / "base")
    model = BertForSequenceClassification.from_pretrained(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape)
    model.save_pretrained(room / "model")
    another_tokenizer().save_pretrained(room / "model")
    alone, beside = (subject_in(hotel, own.origin, room / "model", each) for each in (None, base))
    return audit(hotel, own, alone, None, 60), audit(hotel, own, beside, None, 60)


def test_a_model_without_a_base_is_attacked_by_its_loss_and_the_audit_says_what_is_left_out(
    foreign: tuple[Audit, Audit],
) -> None:
    alone, _ = foreign
    assert [each.name for each in alone.models] == ["base", "own", "model"]
    model = alone.model("model")
    assert model is not None
    assert [each.name for each in model.attacks] == ["loss"]
    assert model.lineage is model.embeddings is model.selection is model.canaries is None
    assert any("What compares a model with its base is left out" in line for line in cautions(alone))


def test_a_model_with_a_base_of_its_own_is_compared_with_that(foreign: tuple[Audit, Audit]) -> None:
    alone, beside = foreign
    assert [each.name for each in beside.models] == ["base", "own", "model_base", "model"]
    model, before = beside.model("model"), alone.model("model")
    assert model is not None
    assert before is not None
    assert [each.name for each in model.attacks] == ["loss", "calibrated_loss", "classifier_gradient", "gradient"]
    assert (model.digest, model.fit, model.attacks[0]) == (before.digest, before.fit, before.attacks[0])
    assert model.lineage is not None
    assert model.lineage.same_exponent > 0.8
    assert model.embeddings is not None
    assert model.embeddings.yours_alone is None  # the owner's own model has other tokens
    assert beside.model("own") == alone.model("own")


def test_no_text_of_a_folder_reaches_the_audit_or_its_page(foreign: tuple[Audit, Audit]) -> None:
    for each in foreign:
        for written in (each.model_dump_json(), page_of(each)):
            assert "\x1b" not in written
            assert "script" not in written
            assert MIRRORED[0] not in written
