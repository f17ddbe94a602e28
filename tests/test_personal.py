"""Personal models: known answers, the slow obvious version of each recipe, and what decides between them."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from client.holdings import Holdings
from client.personal import Ingredients, Recipe, personalise
from client.settings import OwnerSettings
from common.models.depth import by_depth
from common.settings_file import load_settings
from tests.support.models import tiny_bert
from tests.support.parties import Parties

NAMES = ("embed.weight", "body.0.weight", "body.0.bias", "body.1.weight", "body.10.weight", "head.weight")
BLOCKS = ("body.0", "body.1", "body.10")


def ingredients(**tensors: list[float]) -> Ingredients:
    """Three models of one parameter; the model that they would be poured into is not asked."""
    models = {name: {"weight": torch.tensor(values)} for name, values in tensors.items()}
    return Ingredients(groups=(("weight",),), into=tiny_bert(), **models)


def made(of: Ingredients, recipe: Recipe) -> Tensor:
    ((_, tensor),) = of.made(recipe)
    return tensor


def test_blocks_are_told_by_whole_names_and_what_is_around_them_is_apart() -> None:
    assert by_depth(NAMES, BLOCKS) == (NAMES[:1], NAMES[1:3], NAMES[3:4], NAMES[4:5], NAMES[5:])
    assert by_depth(NAMES, BLOCKS, 2) == (NAMES[:4], NAMES[4:5], NAMES[5:])
    assert by_depth(NAMES, BLOCKS, 1) == (NAMES[:5], NAMES[5:])
    assert by_depth(NAMES, BLOCKS, 9) == (NAMES[:3], NAMES[3:4], NAMES[4:5], NAMES[5:])
    assert by_depth(NAMES[:5], BLOCKS, 1) == (NAMES[:5],)  # a head that is left alone
    assert by_depth(NAMES, ()) == (NAMES,)
    assert by_depth(NAMES, (), 3) == (NAMES,)


def test_a_masked_change_has_the_own_signs_and_the_own_size() -> None:
    of = ingredients(base=[1.0, 1.0, 1.0, 1.0], merged=[3.0, 0.0, 1.0, 2.0], own=[2.0, 2.0, 5.0, 4.0])
    # tau = 2, -1, 0, 1 and tau_i = 1, 1, 4, 3: the first and the last agree; lambda = 9 / 3
    assert made(of, Recipe(kind="masked")).tolist() == [7.0, 1.0, 1.0, 4.0]


def test_where_no_change_agrees_the_mask_leaves_the_base() -> None:
    of = ingredients(base=[1.0, 1.0], merged=[2.0, 1.0], own=[0.0, 3.0])
    assert made(of, Recipe(kind="masked")).tolist() == [1.0, 1.0]


def test_a_mixture_lies_between_the_two_and_its_ends_are_exactly_them() -> None:
    of = ingredients(base=[0.0, 0.0], merged=[0.1, 0.3], own=[0.7, 0.9])
    assert made(of, Recipe(kind="mixed", shares=(0.25,))).tolist() == pytest.approx([0.25, 0.45])
    for share, kind in ((0.0, "merged"), (1.0, "own")):
        assert torch.equal(made(of, Recipe(kind="mixed", shares=(share,))), getattr(of, kind)["weight"])


@pytest.fixture
def holdings(parties: Parties) -> Holdings:
    return Holdings(load_settings(parties.files["hotel"], OwnerSettings), parties.folder, parties.agreement)


def test_validation_rows_decide_and_what_is_simpler_wins_a_draw(holdings: Holdings, trained_folder: Path) -> None:
    published = holdings.model_of_base(trained_folder / "models" / "cinema")
    found = personalise(holdings, published)
    measure = holdings.agreement.choose_by
    best = max(score.chosen_by(measure) for score in found.tried.values())
    first = next(recipe for recipe, score in found.tried.items() if score.chosen_by(measure) == best)
    assert found.recipe == first
    assert next(iter(found.tried)) == Recipe(kind="merged")
    assert {recipe.kind for recipe in found.tried} == {"merged", "own", "masked", "mixed"}
    assert len(found.tried) > 3 + 3 + len(found.groups) - 1  # block by block, too
    assert found.validation["personal"].chosen_by(measure) == best
    assert holdings.score(found.model, "test") == found.test["personal"]  # the personal model is what is left in it


def test_if_the_published_model_is_the_own_one_it_is_taken_as_it_is(holdings: Holdings) -> None:
    published = holdings.own_model()
    before = {name: each.detach().clone() for name, each in published.named_parameters()}
    found = personalise(holdings, published)
    assert found.recipe == Recipe(kind="merged")
    assert all(torch.equal(each, before[name]) for name, each in found.model.named_parameters())
    assert math.isfinite(found.test["own"].metric)
