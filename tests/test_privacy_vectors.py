"""Budgets against the numbers of two other accountants, which tests/vectors/privacy.json keeps; and claims that must
fail.
"""

import json
from math import hypot
from pathlib import Path
from typing import Any

import pytest

from client.measurement.private_training import epsilon_of_training
from common.privacy.gaussian import delta_of, epsilon_of

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "vectors" / "privacy.json").read_text())
SUMS = [each for each in VECTORS["compositions"] if "sigma" not in each]
TRAININGS = [each for each in VECTORS["compositions"] if "sigma" in each]


def spent(vector: dict[str, Any]) -> float:
    """What the product says of it."""
    mu = hypot(*vector["mus"])
    if "sigma" not in vector:
        return epsilon_of(vector["delta"], mu)
    return epsilon_of_training(vector["sigma"], vector["delta"], vector["sample_rate"], vector["steps"], mu)


@pytest.mark.parametrize("vector", SUMS)
def test_gaussian_sums_add_up_as_privacy_losses_do(vector: dict[str, Any]) -> None:
    assert spent(vector) == pytest.approx(vector["epsilon"]["privacy loss"], rel=1e-5)
    assert delta_of(spent(vector), hypot(*vector["mus"])) <= vector["delta"]


@pytest.mark.parametrize("vector", TRAININGS)
def test_training_beside_sums_costs_what_two_accountants_say_and_no_less_than_the_truth(vector: dict[str, Any]) -> None:
    epsilon = vector["epsilon"]
    assert spent(vector) == pytest.approx(epsilon["opacus"], rel=1e-5)
    assert spent(vector) == pytest.approx(epsilon["renyi"], rel=0.02)
    assert spent(vector) >= epsilon["privacy loss"]


@pytest.mark.parametrize("vector", VECTORS["bad_too_little_noise"], ids=lambda each: each["what"])
def test_claims_of_too_little_noise_are_found_out(vector: dict[str, Any]) -> None:
    assert spent(vector) > 1.1 * vector["claimed"]
