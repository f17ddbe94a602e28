"""What people wrote is looked at before torch is imported: settings, model folders, labels, columns and files."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.agreement import AgreementDraft, OwnerEntry, Task
from common.errors import AmalgramError, ModelError, SettingsError
from common.models.folders import check_made_for, kind_of
from deploy.consortium import read_consortium
from deploy.drafting import with_labels
from tests.support.documents import ROOT
from tests.support.errors import in_two_lines

Damage = Callable[[Path], object]
OWNERS = ("hotel", "cinema", "phones")


def folder_of(path: Path, labels: tuple[str, ...] = (), made_for: str = "BertForSequenceClassification") -> Path:
    """A model folder that names these labels. Its weights are not looked at."""
    path.mkdir(parents=True)
    config: dict[str, Any] = {"architectures": [made_for], "model_type": "bert"}
    if labels:
        config["id2label"] = {str(index): label for index, label in enumerate(labels)}
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").touch()
    return path


def draft(**task: Any) -> AgreementDraft:
    owners = tuple(OwnerEntry(name=name) for name in OWNERS)
    return AgreementDraft(title="Test", base="base", owners=owners, task=Task(**task))


def models_with(tmp_path: Path, *labels: tuple[str, ...]) -> dict[str, Path]:
    return {name: folder_of(tmp_path / name, each) for name, each in zip(OWNERS, labels, strict=True)}


# --- labels ---


@pytest.mark.parametrize(
    ("in_base", "made_for"),
    [
        ((), "BertForMaskedLM"),
        (("LABEL_0", "LABEL_1"), "BertForSequenceClassification"),
        (("left", "behind"), "BertModel"),
    ],
    ids=["no labels", "numbered labels", "a body without its head"],
)
def test_a_base_that_names_no_labels_takes_those_of_the_owners_models(
    in_base: tuple[str, ...], made_for: str, tmp_path: Path
) -> None:
    base = folder_of(tmp_path / "base", in_base, made_for)
    models = models_with(tmp_path, ("no", "yes"), ("LABEL_0", "LABEL_1"), ("no", "yes"))
    assert with_labels(draft(), base, models).task.labels == ("no", "yes")


def test_a_draft_s_own_labels_come_first_and_the_base_s_second(tmp_path: Path) -> None:
    base = folder_of(tmp_path / "base", ("low", "high"))
    models = models_with(tmp_path, *[("no", "yes")] * 3)
    nameless = folder_of(tmp_path / "nameless")
    assert with_labels(draft(labels=("a", "b")), nameless, models).task.labels == ("a", "b")
    assert with_labels(draft(), base, models).task.labels == ("low", "high")
    assert with_labels(draft(labels=("a", "b"), head="private"), base, models).task.labels == ("a", "b")
    with pytest.raises(ModelError, match=r"are \['a', 'b'\]\nhint: for a new head"):
        with_labels(draft(labels=("a", "b")), base, models)
    assert with_labels(draft(kind="causal-lm"), base, models).task.labels == ()


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (
            [(), (), ()],
            "task.labels is missing: the base model BASE has no head, or only numbers its labels, and no owner's model "
            'names any\nhint: write them under [task], in the order of the models\' outputs: labels = ["...", "..."]',
        ),
        (
            [("no", "yes"), ("yes", "no"), ("no", "yes")],
            "the owners' models name different labels: hotel has ['no', 'yes'], cinema has ['yes', 'no']\nhint: these "
            "are the same labels in another order",
        ),
        (
            [("no", "yes"), ("no", "yes"), ("No", "Yes")],
            "phones has ['No', 'Yes']\nhint: these are the same labels, spelt differently",
        ),
        (
            [("joy", "anger"), ("no", "yes"), ("no", "yes")],
            "cinema has ['no', 'yes'], hotel has ['joy', 'anger']\nhint: name models of one task; or, if every owner",
        ),
        ([("no", "yes\u202e")] * 3, "the owners' models: task.labels[1] = 'yes\\u202e': must not hold U+202E"),
    ],
    ids=["none", "order", "spelling", "another task", "hidden characters"],
)
def test_labels_that_nobody_names_or_on_which_owners_differ_are_refused(
    labels: list[tuple[str, ...]], says: str, tmp_path: Path
) -> None:
    base = folder_of(tmp_path / "base")
    with pytest.raises(SettingsError) as caught:
        with_labels(draft(), base, models_with(tmp_path, *labels))
    assert says.replace("BASE", str(base)) in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "made_for", "says"),
    [
        (("yes", "no"), "BertForSequenceClassification", "are ['no', 'yes']\nhint: these are the same labels in anoth"),
        (("NO", "YES"), "BertForSequenceClassification", "are ['no', 'yes']\nhint: these are the same labels, spelt"),
        (
            ("joy", "fear"),
            "BertForSequenceClassification",
            "are ['no', 'yes']\nhint: it was fine-tuned for another task",
        ),
        (
            ("no", "yes"),
            "BertForTokenClassification",
            "names BertForTokenClassification, a model for token-classification; the task is text-classification\n"
            "hint: name a model that was fine-tuned for text-classification",
        ),
    ],
)
def test_swapped_labels_and_another_task_each_have_a_hint_of_their_own(
    labels: tuple[str, ...], made_for: str, says: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError) as caught:
        check_made_for(folder_of(tmp_path / "model", labels, made_for), Task(labels=("no", "yes")))
    assert says in str(caught.value)


def test_a_model_that_numbers_its_labels_needs_as_many_as_are_agreed(tmp_path: Path) -> None:
    three = folder_of(tmp_path / "three", ("LABEL_0", "LABEL_1", "LABEL_2"))
    check_made_for(three, Task(labels=("a", "b", "c")))
    with pytest.raises(
        ModelError, match=r"has 3 labels, the agreement 2: \['no', 'yes'\]\nhint: it was fine-tuned for"
    ):
        check_made_for(three, Task(labels=("no", "yes")))
    with pytest.raises(ModelError, match=r"has 3 labels, the agreement 2: .*\nhint: for a new head, save the model"):
        with_labels(draft(labels=("no", "yes")), three, {})
    with_labels(draft(labels=("no", "yes")), folder_of(tmp_path / "masked", made_for="BertForMaskedLM"), {})


def test_a_model_s_task_is_told_by_its_class(tmp_path: Path) -> None:
    assert kind_of(folder_of(tmp_path / "one", made_for="GPT2LMHeadModel")) == "causal-lm"
    assert kind_of(folder_of(tmp_path / "other", made_for="BertModel")) is None
    check_made_for(tmp_path / "other", Task(labels=("no", "yes")))


@pytest.mark.parametrize("named", [["a", "b"], {"one": "a"}, {"0": "a", "1": "b", "x": "c"}, 3])
def test_labels_that_are_no_table_are_refused(named: object, tmp_path: Path) -> None:
    base = folder_of(tmp_path / "base")
    (base / "config.json").write_text(json.dumps({"id2label": named}))
    with pytest.raises(ModelError, match="id2label is not a table of numbered labels"):
        with_labels(draft(), base, {})


# --- a consortium's folder ---


def replace(file: str, old: str, new: str) -> Damage:
    def change(home: Path) -> None:
        text = (home / file).read_text()
        assert old in text
        (home / file).write_text(text.replace(old, new, 1))

    return change


def bring(name: str, **changed: object) -> Damage:
    """Let an owner bring the base as its own model, with a configuration that says something else."""

    def change(home: Path) -> None:
        shutil.copytree(home / "base", home / "models" / name)
        config = home / "models" / name / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | changed))
        own = home / f"{name}.toml"
        text = own.read_text()
        table = text[text.index("\n[training]") : text.index("\n[data]")]
        own.write_text(text.replace(table, f'\nfine_tuned = "models/{name}"\n'))

    return change


def damage_weights(home: Path) -> None:
    bring("hotel")(home)
    weights = home / "models" / "hotel" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def name_owners_only(home: Path) -> None:
    agreement = home / "agreement.toml"
    text = agreement.read_text()
    agreement.write_text(f"owners = {list(OWNERS)}\n" + text[: text.index("[[owners]]")])


MISTAKES = {
    "a capital": (
        replace("agreement.toml", '"hotel"', '"Hotel"'),
        "agreement.toml: owners[0].name = 'Hotel': must be 1 to 32 lower-case letters, digits, - and _, the first of "
        'them a letter or digit\nhint: for example "hotel"',
    ),
    "one value": (
        replace("agreement.toml", "[0.1, 0.5, 0.9, 0.95, 0.99]", "0.5"),
        "agreement.toml: regmean.alphas = 0.5: must be a list\nhint: write alphas = [0.5]",
    ),
    "one name": (
        replace("agreement.toml", '["average", "task_arithmetic", "fisher"]', '"average"'),
        "compare_with = 'average': must be a list\nhint: write compare_with = [\"average\"]",
    ),
    "a misspelt key": (
        replace("agreement.toml", "\nmethod =", "\nmetod ="),
        "agreement.toml: unknown key metod\nhint: did you mean method?",
    ),
    "a misspelt method": (
        replace("agreement.toml", 'method = "regmean"', 'method = "regmeen"'),
        "lorm, search\nhint: did you mean regmean?",
    ),
    "a key in another table": (
        lambda home: (home / "agreement.toml").write_text((home / "agreement.toml").read_text() + "\nseed = 3\n"),
        ".seed\nhint: seed belongs at the top of the file, before the first [table]",
    ),
    "quotes": (
        replace("agreement.toml", "max_tokens = 32", 'max_tokens = "32"'),
        "task.max_tokens = '32': must be a whole number\nhint: write max_tokens = 32, without quotes",
    ),
    "no quotes": (
        replace("agreement.toml", 'base = "base"', "base = base"),
        "agreement.toml: not valid TOML: Invalid value (at line 5, column 8)\nhint: text stands in quotes",
    ),
    "names for tables": (
        name_owners_only,
        "owners[0] = 'hotel': must be a table (and 3 more)\nhint: write one [[owners]] table for each, with its keys",
    ),
    "another kind": (
        replace("agreement.toml", '"text-classification"', '"text-clasification"'),
        "'sequence-to-sequence' or 'image-classification'\nhint: did you mean text-classification?",
    ),
    "two owners": (
        replace("agreement.toml", '[[owners]]\nname = "phones"', ""),
        "with two, each knows the other's part of any total\nhint: find a third owner; or, if both accept that,",
    ),
    "a misspelt table": (
        replace("hotel.toml", "\n[data]", "\n[dta]"),
        "hotel.toml: unknown key dta (and 1 more)\nhint: did you mean data?",
    ),
    "a file": (replace("hotel.toml", "train.jsonl", "trian.jsonl"), "data/hotel/trian.jsonl: no such file"),
    "a column": (replace("hotel.toml", '"text"', '"review"'), "has no column 'review'; its columns are text, label"),
    "a label": (replace("data/hotel/train.jsonl", '"negative"', '"bad"'), "its label is none of negative, positive"),
    "the base": (replace("agreement.toml", '"base"', '"bse"'), "model bse: there is no folder"),
    "an owner's name": (
        replace("hotel.toml", 'name = "hotel"', 'name = "hostel"'),
        "owner 'hostel' is not on the roster of agreement.toml: hotel, cinema, phones\nhint: give the owner a name of",
    ),
    "an owner without a file": (
        lambda home: (home / "phones.toml").unlink(),
        "owner 'phones' of agreement.toml has no settings file, phones.toml\nhint: write phones.toml, or remove",
    ),
    "another architecture": (bring("hotel", model_type="roberta"), "its model_type is 'roberta', that of the base"),
    "another size": (bring("hotel", hidden_size=128), "its hidden_size is 128, that of the base"),
    "damaged weights": (damage_weights, "model.safetensors: cannot be read"),
    "swapped labels": (
        bring("hotel", id2label={"0": "positive", "1": "negative"}),
        "its labels are ['positive', 'negative'], the agreement's are ['negative', 'positive']\nhint: these are the sa",
    ),
}


@pytest.mark.parametrize(("damage", "says"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_in_a_folder_is_found_by_looking(
    damage: Damage, says: str, reviews_folder: Path, tmp_path: Path
) -> None:
    home = Path(shutil.copytree(reviews_folder, tmp_path / "home", ignore=shutil.ignore_patterns("output")))
    damage(home)
    with pytest.raises(AmalgramError) as caught:
        read_consortium(home)
    assert says in str(caught.value)
    in_two_lines(caught.value)


def test_what_is_looked_at_first_takes_no_heavy_library(reviews_folder: Path, tmp_path: Path) -> None:
    """Importing torch takes seconds, on a busy machine half a minute."""
    home = Path(shutil.copytree(reviews_folder, tmp_path / "home", ignore=shutil.ignore_patterns("output")))
    (home / "hotel.toml").write_text((home / "hotel.toml").read_text().replace("train.jsonl", "no.jsonl"))
    program = (
        "import contextlib, sys\n"
        "from deploy.cli import cli\n"
        "from common.errors import AmalgramError\n"
        "for arguments in (['simulate', '.'], ['draft', 'hotel.toml', 'hotel.pub'], ['agree', 'hotel.toml'],\n"
        "                  ['client', 'hotel.toml'], ['merge', 'hotel.toml']):\n"
        "    try:\n"
        "        cli(arguments, standalone_mode=False)\n"
        "    except AmalgramError as error:\n"
        "        print(arguments[0], 'refused', [n for n in ('torch', 'transformers') if n in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=home, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    commands = ("simulate", "draft", "agree", "client", "merge")
    assert done.stdout.splitlines() == [f"{name} refused []" for name in commands], done.stderr
