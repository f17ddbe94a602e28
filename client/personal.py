"""A model for one owner alone, made of the published model and its own: nothing is sent, and nothing but it is written.

With the base W_0, the published model W* and the owner's W_i, tau = W* - W_0 and tau_i = W_i - W_0. What is tried:

    merged    W*, as it is
    own       W_i, as it is
    masked    W_0 + lambda m o tau, where m is 1 where tau and tau_i have the same sign, else 0, and lambda is
              |tau_i|_1 / |m o tau|_1 (EMR-Merging, Huang et al., NeurIPS 2024, arXiv 2405.17461, section 3, with the
              published merge in place of their elected maximum)
    mixed     (1 - a) W* + a W_i: first one a for the whole model, then another one for each block, one after the other

The owner's validation rows decide. What is tried first wins unless a later one is better, so that nothing is mixed
without a gain. If heads are private, the owner's own head stands on every body.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from client.holdings import Holdings, give_head
from client.progress import with_bar
from common.metrics import Score
from common.models.depth import by_depth
from common.models.layers import block_names
from common.models.loading import private_head

SHARES = (0.25, 0.5, 0.75)  # of the owner's own weights
STEP = 0.25  # by which the share of one block is changed

Kind = Literal["merged", "own", "masked", "mixed"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a personal model is made. `shares`: of the owner's own weights, for each group of `Ingredients.groups`."""

    kind: Kind
    shares: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Personal:
    """A personal model, and how it, the owner's own and the published model do at home.

    `groups`: where in the model each of the recipe's shares counts. `tried`: every recipe, with its score on validation
    rows. `validation`, `test`: by `own`, `merged` and `personal`.
    """

    model: PreTrainedModel
    recipe: Recipe
    groups: tuple[str, ...]
    tried: Mapping[Recipe, Score]
    validation: Mapping[str, Score]
    test: Mapping[str, Score]


def personalise(holdings: Holdings, published: PreTrainedModel) -> Personal:
    """Make the model that is best on this owner's validation rows, and judge it on its test rows.

    `published`: a model of the agreed base; it becomes the personal one. Raises an AmalgramError.
    """
    holdings.check_shares_base("amalgram personal")
    ingredients = Ingredients.of(holdings, published)
    search = _Search(holdings, ingredients)
    recipe = search.best()
    compared = {"own": Recipe(kind="own"), "merged": Recipe(kind="merged"), "personal": recipe}
    test = {}
    for name, each in compared.items():  # the personal one last, which stays in the model
        ingredients.pour(each)
        test[name] = holdings.score(published, "test")
    return Personal(
        model=published,
        recipe=recipe,
        groups=tuple(map(_title, ingredients.groups)),
        tried=search.scores,
        validation={name: search.scores[each] for name, each in compared.items()},
        test=test,
    )


def _title(names: tuple[str, ...]) -> str:
    """The module that all parameters of a group are in, or that of the first."""
    first, last = (each.split(".")[:-1] for each in (min(names), max(names)))
    shared = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))]
    return ".".join(shared or names[0].split(".")[:-1])


@dataclass(frozen=True, kw_only=True)
class Ingredients:
    """The parameters of three models by name, without a private head; and the model that they are poured into."""

    base: Mapping[str, Tensor]
    merged: Mapping[str, Tensor]
    own: Mapping[str, Tensor]
    groups: tuple[tuple[str, ...], ...]
    into: PreTrainedModel

    @classmethod
    def of(cls, holdings: Holdings, published: PreTrainedModel) -> Ingredients:
        """`published` is given the owner's head if heads are private."""
        own, task = holdings.own_model(), holdings.task
        give_head(own, published, task)
        kept = set(private_head(published, task))
        names = [name for name, _ in published.named_parameters() if name not in kept]

        def parameters(model: PreTrainedModel) -> dict[str, Tensor]:
            found = dict(model.named_parameters())
            return {name: found[name].detach() for name in names}

        return cls(
            base=parameters(holdings.load_base()),
            merged={name: each.clone() for name, each in parameters(published).items()},
            own=parameters(own),
            groups=by_depth(names, block_names(published)),
            into=published,
        )

    def made(self, recipe: Recipe) -> Iterator[tuple[str, Tensor]]:
        """The parameters of a recipe's model by name, one computed after the other."""
        shares = recipe.shares or (float(recipe.kind == "own"),) * len(self.groups)
        for names, share in zip(self.groups, shares, strict=True):
            for name in names:
                if recipe.kind == "masked":
                    yield name, self.base[name] + self._rescaler * self._agreeing(name)
                elif share in (0.0, 1.0):  # exactly that model, without rounding
                    yield name, (self.own if share else self.merged)[name]
                else:
                    yield name, torch.lerp(self.merged[name], self.own[name], share)

    def pour(self, recipe: Recipe) -> None:
        """Turn the model into the one that the recipe makes."""
        to = dict(self.into.named_parameters())
        with torch.no_grad():
            for name, parameter in self.made(recipe):
                to[name].copy_(parameter)

    def _agreeing(self, name: str) -> Tensor:
        """m o tau."""
        change, own = self.merged[name] - self.base[name], self.own[name] - self.base[name]
        return torch.where(change * own > 0, change, 0.0)

    @cached_property
    def _rescaler(self) -> float:
        """lambda; 0 if no change agrees in sign, where there is nothing to rescale."""
        own = sum(float((self.own[name] - self.base[name]).abs().sum(dtype=torch.float64)) for name in self.base)
        kept = sum(float(self._agreeing(name).abs().sum(dtype=torch.float64)) for name in self.base)
        return own / kept if kept else 0.0


class _Search:
    """Judges one recipe after the other on validation rows. The first of equals is the best."""

    def __init__(self, holdings: Holdings, ingredients: Ingredients) -> None:
        self._holdings, self._ingredients = holdings, ingredients
        self._measure = holdings.agreement.judge_by
        self.scores: dict[Recipe, Score] = {}

    def best(self) -> Recipe:
        for _ in with_bar(self._steps(), f"{self._holdings.name}: models on validation rows", self._most):
            pass
        return self._best_of(self.scores)

    @property
    def _most(self) -> int:
        return 3 + len(SHARES) + 2 * len(self._ingredients.groups)

    def _steps(self) -> Iterator[None]:
        count = len(self._ingredients.groups)
        alike = {share: Recipe(kind="mixed", shares=(share,) * count) for share in SHARES}
        alike = {0.0: Recipe(kind="merged"), 1.0: Recipe(kind="own")} | alike
        for recipe in (*alike.values(), Recipe(kind="masked")):
            self._judge(recipe)
            yield
        mixed = self._best_of(alike.values())
        shares = next((share,) * count for share, recipe in alike.items() if recipe == mixed)
        for group in reversed(range(count)):  # what is closest to the output first, since it differs most
            trials = [mixed]
            for share in (shares[group] - STEP, shares[group] + STEP):
                if 0 <= share <= 1:
                    trial = Recipe(kind="mixed", shares=(*shares[:group], share, *shares[group + 1 :]))
                    self._judge(trial)
                    yield
                    trials.append(trial)
            mixed = self._best_of(trials)
            shares = mixed.shares or shares

    def _judge(self, recipe: Recipe) -> None:
        self._ingredients.pour(recipe)
        self.scores[recipe] = self._holdings.score(self._ingredients.into, "validation")

    def _best_of(self, recipes: Iterable[Recipe]) -> Recipe:
        return max(recipes, key=lambda recipe: self.scores[recipe].chosen_by(self._measure))
