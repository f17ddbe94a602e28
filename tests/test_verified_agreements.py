"""What an agreement may say about verification, and how it is said to whoever consents."""

from pathlib import Path

import pytest

from client.owner import Owner
from common.agreement import AgreementDraft
from common.errors import SettingsError
from common.merge_methods import METHODS
from common.settings_file import load_settings
from deploy.commands.agree import consent_text
from tests.support.parties import parties_with_method

DRAFT = """
title = "Three"
base = "base"
method = "{method}"
{tables}
[[owners]]
name = "ada"
[[owners]]
name = "bea"
[[owners]]
name = "cyd"
"""
OFF = "[verification]\nrequired = false\n"


def draft(folder: Path, tables: str = "", method: str = "average") -> AgreementDraft:
    path = folder / "agreement.toml"
    path.write_text(DRAFT.format(method=method, tables=tables))
    return load_settings(path, AgreementDraft)


def test_a_masked_merge_is_verified_unless_one_line_says_otherwise(tmp_path: Path) -> None:
    assert draft(tmp_path).is_verified
    assert draft(tmp_path, "[verification]\nrequired = true\n").is_verified
    assert not draft(tmp_path, OFF).is_verified
    assert not draft(tmp_path, '[summation]\nkind = "plain"\n').is_verified


def test_in_a_sparse_graph_of_owners_nothing_is_verified(tmp_path: Path) -> None:
    """There an owner does not know all owners' commitments, so it could be shown a false sum."""
    more = "".join(f'[[owners]]\nname = "o{number}"\n' for number in range(148))
    assert not draft(tmp_path, more).is_verified
    with pytest.raises(SettingsError, match="at most 150 owners can verify a merge, there are 151"):
        draft(tmp_path, "[verification]\nrequired = true\n" + more)


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        ('[verification]\nrequired = true\n[summation]\nkind = "plain"\n', "a plain sum cannot be verified"),
        ("[regmean]\nridge = 0\n", "regmean.ridge = 0: must be at least 0.0001"),
        ("[data_free]\nridge = 1e-9\n", "data_free.ridge = 1e-09: must be at least 0.0001"),
    ],
)
def test_what_cannot_be_verified_is_refused(tmp_path: Path, tables: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        draft(tmp_path, tables)
    if "required = true" not in tables:
        assert not draft(tmp_path, tables + OFF).is_verified


def test_a_method_without_equations_needs_a_trusted_coordinator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {name for name, method in METHODS.items() if method.trust == "coordinator"} == {"distill"}
    monkeypatch.setattr(type(METHODS["average"]), "trust", "coordinator")
    with pytest.raises(SettingsError, match="average: no owner can verify what it merges"):
        draft(tmp_path)
    assert not draft(tmp_path, OFF).is_verified


def test_who_consents_reads_in_capitals_that_nothing_is_verified(reviews_folder: Path, tmp_path: Path) -> None:
    with parties_with_method(reviews_folder, tmp_path, "refit") as parties:
        text = consent_text(Owner(parties.files["hotel"]))
    warnings = text.partition("BEFORE YOU SAY YES")[2]
    assert "VERIFICATION IS OFF: THE COORDINATOR CAN SEND ANY MODEL" in warnings
    assert "BETWEEN TWO ROUNDS, A MALICIOUS COORDINATOR CAN MAKE THE NEXT TOTAL YOURS ALONE" in warnings
    assert "NO OWNER VERIFIES THAT THESE MODELS ARE THE MERGE" in text


def test_who_consents_reads_what_is_verified_and_against_whom(reviews_folder: Path, tmp_path: Path) -> None:
    with parties_with_method(reviews_folder, tmp_path, "refit", verified=True) as parties:
        text = " ".join(consent_text(Owner(parties.files["hotel"])).split())
    assert "VERIFI" not in text
    assert "all owners verify together that it is the merge of what they contributed" in text
    assert "Together with one other owner, it could make a wrong model pass" in text
    assert "MALICIOUS COORDINATOR CAN MAKE THE NEXT TOTAL" not in text


def test_who_consents_reads_of_gram_matrices_only_where_there_are_some(reviews_folder: Path, tmp_path: Path) -> None:
    texts = {}
    for method in ("average", "refit", "regmean"):
        with parties_with_method(reviews_folder, tmp_path / method, method) as parties:
            texts[method] = " ".join(consent_text(Owner(parties.files["hotel"])).split())
    assert "Gram" not in texts["average"]
    assert "They say more about your rows than the totals do" in texts["average"]
    assert "token rows per dimension of a Gram matrix" in texts["refit"]
    assert "can compute your Gram matrices" not in texts["refit"]
    assert "can compute your Gram matrices" in texts["regmean"]
    assert "Gram matrices of layers that see only single tokens stay here" in texts["regmean"]


def test_who_consents_reads_what_the_metrics_of_labels_and_of_numbers_are(reviews_folder: Path, tmp_path: Path) -> None:
    with parties_with_method(reviews_folder, tmp_path, "average") as parties:
        owner, agreement = Owner(parties.files["hotel"]), parties.agreement
        texts = []
        for changes in ({"problem_type": "multi_label_classification"}, {"problem_type": "regression"}):
            task = agreement.task.model_copy(update=changes | {"target_range": (0.0, 1.0)})
            owner.__dict__["agreement"] = agreement.model_copy(update={"task": task})
            texts.append(" ".join(consent_text(owner).split()))
    assert "accuracy and macro F1 of the base" in texts[0]
    assert "Of your test examples, counts for each label leave too" in texts[0]
    assert "Pearson's r and mean squared error of the base" in texts[1]
    assert "sums over your rows: of predictions, of your targets" in texts[1]
