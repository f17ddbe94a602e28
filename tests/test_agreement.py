"""Settings files: what is refused, and with which words; the digest that consent rests on."""

import json
from pathlib import Path

import pytest

from common.agreement import Agreement, AgreementDraft, OwnerEntry, Reading, Summation
from common.errors import SettingsError
from common.merge_methods import METHODS, ORDERED
from common.merge_methods.method import MultiRoundMethod
from common.settings_file import load_settings, write_settings
from tests.support.errors import in_two_lines, refused

GOOD = """
title = "Test"
base = "base"
method = "regmean"
compare_with = ["average"]
[[owners]]
name = "ada"
[[owners]]
name = "bea"
[[owners]]
name = "cyd"
"""


def load(tmp_path: Path, text: str) -> AgreementDraft:
    path = tmp_path / "agreement.toml"
    path.write_text(text)
    return load_settings(path, AgreementDraft)


def test_a_good_draft_is_read_with_its_defaults(tmp_path: Path) -> None:
    draft = load(tmp_path, GOOD)
    assert draft.owner_names == ("ada", "bea", "cyd")
    assert draft.methods == ("regmean", "average")
    assert draft.needed_owners == 3
    assert draft.summation.kind == "masked"
    assert (draft.colluders, draft.quorum) == (0, 2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            ("title =", "titel ="),
            "unknown key titel (and 1 more)\nhint: did you mean title?",
        ),
        (('"regmean"', '"regmeen"'), "method = 'regmeen': unknown method; known: average, task_arithmetic, fisher,"),
        (('"regmean"', '"regmeen"'), "\nhint: did you mean regmean?"),
        (('["average"]', '["average", "tise"]'), "compare_with[1] = 'tise'"),
        (('["average"]', '["regmean"]'), "compare_with = ['regmean']: names a method twice, or 'regmean' again"),
        (('title = "Test"', "title = 3"), "title = 3: must be text in quotes"),
        (('base = "base"\n', ""), "base is missing"),
        (("[[owners]]", "[regmean_plus_plus]\nalphas = [0.9]\n[[owners]]"), "hint: did you mean alpha?"),
        (('name = "bea"', 'name = "ada"'), "duplicate owner name 'ada'"),
        (
            ('name = "bea"', 'name = "Bea Ltd"'),
            "owners[1].name = 'Bea Ltd': must be 1 to 32 lower-case letters, digits, - and _",
        ),
        (('base = "base"', 'base = "base"\nmin_owners = 4'), "min_owners = 4: there are 3 owners"),
        (
            ('base = "base"', 'base = "base"\nmin_owners = 1'),
            "min_owners = 1: must be at least 2",
        ),
        (("[[owners]]", "[regmean]\nalphas = [1.5]\n[[owners]]"), "regmean.alphas[0] = 1.5: must be at most 1"),
        (
            ("[[owners]]", "[regmean]\nalphas = []\n[[owners]]"),
            "regmean.alphas = []: has too few entries, the minimum is 1",
        ),
        (("[[owners]]", "[regmean]\nalphas = [0.5, 0.5]\n[[owners]]"), "regmean.alphas = [0.5, 0.5]: duplicate value"),
        (("[[owners]]", "[regmean]\nridge = nan\n[[owners]]"), "regmean.ridge"),
        (("[[owners]]", "[regmean]\nbeta = 1\n[[owners]]"), "unknown key regmean.beta\nhint: allowed here: alphas,"),
        (
            ("[[owners]]", "[summation]\nkind = 'secret'\n[[owners]]"),
            "summation.kind = 'secret': must be 'masked' or 'plain'",
        ),
        (('name = "bea"', 'name = "coordinator"'), "'coordinator' is the coordinator's name"),
        (('[[owners]]\nname = "cyd"\n', ""), "a masked sum needs at least 3 of them, min_owners would be 2"),
        (
            ('base = "base"', 'base = "base"\nmin_owners = 2'),
            "min_owners is 2; with two, each knows the other's part of any total\nhint: leave",
        ),
        (
            ("[[owners]]", "[summation]\ncolluders = 1\n[[owners]]"),
            "min_owners = 3: with 3 owners, of whom 1 may collude, at least 4 must take part",
        ),
        (
            ("[[owners]]", "[summation]\nquorum = 1\n[[owners]]"),
            "summation.quorum = 1: with 3 owners, of whom 0 may collude, it is 2",
        ),
        (
            ('name = "bea"', f'name = "bea"\npublic_key = "{"a" * 64}"\n[coordinator]\npublic_key = "{"a" * 64}"'),
            "coordinator.public_key: it is an owner's, too",
        ),
        (
            (
                'name = "bea"',
                f'name = "dan"\npublic_key = "{"a" * 64}"\n[[owners]]\nname = "bea"\npublic_key = "{"a" * 64}"',
            ),
            "duplicate public key",
        ),
        (
            ('name = "bea"', 'name = "bea"\npublic_key = "123"'),
            "owners[1].public_key = '123': must be 64 hexadecimal digits",
        ),
        (("[[owners]]", "[bounds]\ndelta = 0\n[[owners]]"), "bounds.delta = 0: must be greater than 0"),
        (
            ('name = "bea"', 'name = "bea"\nmetrics = "summed"'),
            '1 have metrics = "summed", 0 may drop out and 0 may collude',
        ),
        (("title", "= title"), "not valid TOML"),
        (
            ('method = "regmean"', 'method = "refit"\nrefit = {alpha = 0.9}'),
            "refit.alpha = 0.9: must be one of data_free.alphas = [1.0]",
        ),
    ],
)
def test_a_wrong_draft_is_refused_in_one_line_with_file_key_and_value(
    tmp_path: Path, change: tuple[str, str], says: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, GOOD.replace(*change, 1))
    message = caught.value.message
    assert message.startswith(str(tmp_path / "agreement.toml"))
    assert says in str(caught.value)
    assert "\n" not in message
    assert "\n" not in caught.value.hint


REGRESSION = 'problem_type = "regression"\nlabels = ["stars"]\n'
SEVERAL = 'problem_type = "multi_label_classification"\n'


@pytest.mark.parametrize(
    ("task", "more", "says"),
    [
        (REGRESSION, "", "task.target_range is missing: sums of targets and predictions need a bound\nhint: write"),
        (REGRESSION + "target_range = [5, 1]", "", "task.target_range = [5, 1]: must ascend, within 1e+06 of 0"),
        (REGRESSION + "target_range = [0, 1e9]", "", "within 1e+06 of 0\nhint: predict targets in other units"),
        (REGRESSION + "target_range = [0, inf]", "", "must be finite"),
        (REGRESSION + "target_range = [0]", "", "target_range = [0]: has too few entries, the minimum is 2"),
        (REGRESSION + 'target_range = [0, 1]\nhead = "private"', "", 'task.head = "private": the targets'),
        (SEVERAL + "target_range = [0, 1]", "", 'only task.problem_type = "regression" has targets'),
        (SEVERAL + 'kind = "causal-lm"', "", "a model of kind causal-lm has no such head"),
        (SEVERAL + 'kind = "token-classification"', "", "a model of kind token-classification has no such head"),
        (SEVERAL + 'labels = ["a"]', "", "at least two labels are needed"),
        (SEVERAL, 'method = "refit"', "refit.balances: they weigh rows by the share of their one label"),
        (SEVERAL, '[evaluation]\nchoose_by = "pearson_r"', "must be accuracy or macro_f1 for text-classification"),
        (SEVERAL, '[evaluation]\nchoose_by = "worst"', "evaluation.choose_by = 'worst': must be 'accuracy'"),
        (
            REGRESSION + "target_range = [0, 1]",
            '[evaluation]\nchoose_by = "accuracy"',
            "evaluation.choose_by = 'accuracy': must be pearson_r or mean_squared_error for regression",
        ),
        (
            REGRESSION + "target_range = [0, 1]",
            "[evaluation]\nsign_above = 0.5",
            "a mean squared error is better if it",
        ),
        ('head = "private"', 'method = "refit"', "refit changes the classifier that owners share, but task.head is"),
        ('kind = "question-answering"', "", "must be 'text-classification', 'token-classification', 'causal-lm'"),
    ],
)
def test_what_several_labels_and_numbers_cannot_be_is_refused(task: str, more: str, says: str, tmp_path: Path) -> None:
    text = GOOD.replace('method = "regmean"', more) if more.startswith("method") else f"{GOOD}\n{more}"
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, f"{text}\n[task]\n{task}\n")
    assert says in in_two_lines(caught.value)


def test_several_labels_and_numbers_have_defaults(tmp_path: Path) -> None:
    several = load(tmp_path, f"{GOOD}\n[task]\n{SEVERAL}")
    assert (several.choose_by, several.task.metrics) == ("accuracy", ("accuracy", "macro_f1"))
    numbers = load(tmp_path, f"{GOOD}\n[task]\n{REGRESSION}target_range = [0, 5]")
    assert (numbers.choose_by, numbers.task.lowest_and_span) == ("mean_squared_error", (0.0, 5.0))


@pytest.mark.parametrize(
    ("labels", "expected"), [('["O", "B-PER", "I-PER"]', "entity_f1"), ('["NOUN", "VERB"]', "accuracy")]
)
def test_tagged_entities_are_judged_by_their_f1_unless_another_metric_is_agreed(
    labels: str, expected: str, tmp_path: Path
) -> None:
    task = f'{GOOD}\n[task]\nkind = "token-classification"\nlabels = {labels}\n'
    agreement = load(tmp_path, task)
    assert (agreement.choose_by, agreement.judge_by) == (expected, expected)
    assert load(tmp_path, f'{task}[evaluation]\nchoose_by = "accuracy"\n').choose_by == "accuracy"


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nothing\.toml: cannot be read"):
        load_settings(tmp_path / "nothing.toml", AgreementDraft)


# What an agreement on a method must say beside its name: table -> (key, value).
NEEDED = {"distill": {"distill": ("pool", "pool.jsonl"), "verification": ("required", False)}}


@pytest.mark.parametrize("method", [name for name in METHODS if name != "search"])  # it needs others beside it
def test_an_agreement_may_name_every_method_and_has_its_table(tmp_path: Path, method: str) -> None:
    needed = NEEDED.get(method, {})
    text = "".join(f"[{table}]\n{key} = {json.dumps(value)}\n" for table, (key, value) in needed.items())
    draft = load(tmp_path, GOOD.replace('"regmean"', f'"{method}"', 1).replace('["average"]', "[]") + text)
    assert draft.methods == (method,)
    assert draft.tables.keys() == METHODS.keys()
    assert draft.tables[method] == METHODS[method].table(**dict([needed[method]] if method in needed else []))
    changed = f"{GOOD}[{method}]\nno_such_hyperparameter = 1\n"
    with pytest.raises(SettingsError, match=rf"{method}\.no_such_hyperparameter"):
        load(tmp_path, changed)


def test_a_method_that_does_not_exist_is_refused_with_those_that_do(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=", ".join(method.name for method in ORDERED)):
        load(tmp_path, GOOD.replace('"regmean"', '"sequence"', 1))


def test_a_written_agreement_reads_back_with_the_same_digest(agreement: Agreement, tmp_path: Path) -> None:
    write_settings(tmp_path / "agreement.toml", agreement)
    assert load_settings(tmp_path / "agreement.toml", Agreement).digest() == agreement.digest()


def test_a_draft_is_not_an_agreement(tmp_path: Path) -> None:
    (tmp_path / "agreement.toml").write_text(GOOD)
    with pytest.raises(SettingsError, match=r"coordinator is missing \(and 4 more\)"):
        load_settings(tmp_path / "agreement.toml", Agreement)


@pytest.mark.parametrize(
    "update",
    [
        {"title": "Other"},
        {"seed": 1},
        {"weighting": "owners"},
        {"min_owners": 2},
        {"method": "average", "compare_with": ("regmean", "task_arithmetic", "fisher")},
        {"base_digest": "0" * 64},
        {"base_files": ()},
        {"reading": Reading(max_equal=0.5)},
    ],
    ids=lambda update: next(iter(update)),
)
def test_any_change_changes_the_digest(agreement: Agreement, update: dict[str, object]) -> None:
    assert agreement.model_copy(update=update).digest() != agreement.digest()


def test_a_copy_with_other_owners_has_their_names_and_keys(agreement: Agreement) -> None:
    before = (agreement.owner_names, dict(agreement.roster), agreement.digest())
    fewer = agreement.model_copy(update={"owners": agreement.owners[1:]})
    assert fewer.owner_names == before[0][1:]
    assert list(fewer.roster) == list(fewer.owner_names)
    assert fewer.digest() != before[2]
    assert (agreement.owner_names, dict(agreement.roster), agreement.digest()) == before


def test_hidden_metrics_stay_hidden_after_every_dropout_the_agreement_allows() -> None:
    def draft(hidden: int, shown: int, needed: int) -> AgreementDraft:
        kinds = ["summed"] * hidden + ["shown"] * shown
        owners = tuple(OwnerEntry(name=f"o{index}", metrics=kind) for index, kind in enumerate(kinds))  # type: ignore[arg-type]
        summation = Summation(kind="plain", colluders=0)
        return AgreementDraft(title="t", base="b", owners=owners, min_owners=needed, summation=summation)

    draft(hidden=3, shown=0, needed=3)
    draft(hidden=4, shown=1, needed=4)
    with refused('3 have metrics = "summed", 1 may drop out', hint="for no owner, or for at least 4"):
        draft(hidden=3, shown=2, needed=4)


def test_hidden_metrics_stay_hidden_from_colluders_too() -> None:
    owners = tuple(OwnerEntry(name=f"o{i}", metrics="summed" if i < 4 else "shown") for i in range(6))
    AgreementDraft(title="t", base="b", owners=owners, summation=Summation(colluders=1))
    with pytest.raises(ValueError, match=r"4 have metrics = .*, 0 may drop out and 2 may collude"):
        AgreementDraft(title="t", base="b", owners=owners, summation=Summation(colluders=2))


@pytest.mark.parametrize("method", [method.name for method in ORDERED if isinstance(method, MultiRoundMethod)])
def test_a_multi_round_method_needs_every_owner_in_every_round(method: str) -> None:
    """The same rows, measured in two steps and summed over two groups, would expose the difference: one owner's."""
    owners = tuple(OwnerEntry(name=f"o{index}") for index in range(4))
    AgreementDraft(title="t", base="b", owners=owners, method=method, min_owners=4)
    for methods in ((method, "average"), ("average", method)):
        with refused("rounds over different owners would expose the difference", hint="all 4 owners must take part"):
            AgreementDraft(
                title="t", base="b", owners=owners, method=methods[0], compare_with=(methods[1],), min_owners=3
            )
