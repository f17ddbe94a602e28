"""How well does a sum of Gram matrices tell members from strangers?

python -m benchmarks.membership

Rows are Gaussian. The test is the best quadratic one: a member has less leverage x^T (sum G)^-1 x than a stranger, for
its length. Prints the area under the curve, from 2,000 members and 2,000 strangers, and writes
benchmarks/results/membership.{json,md}. Rows of real models are not Gaussian, and one text gives many token rows, so
this compares agreements, and bounds nothing.
"""

import numpy as np
from scipy.stats import wishart

from benchmarks.published import everything, publish
from client.audit.statistics import area_under_the_curve

DIMENSIONS, OWNERS, ROWS_PER_DIMENSION = (64, 384, 768), (3, 5, 10, 30), (1, 10, 100, 1000)
JUDGED = 2000


def membership(owners: int, rows_per_dimension: int, dimension: int) -> float:
    """The area under the curve, for a sum of `owners` Grams of `rows_per_dimension * dimension` token rows each."""
    random = np.random.default_rng([owners, rows_per_dimension, dimension])
    count = owners * rows_per_dimension * dimension
    members = random.standard_normal((min(JUDGED, count - dimension), dimension))
    strangers = random.standard_normal((JUDGED, dimension))
    others = wishart(df=count - len(members), scale=np.eye(dimension)).rvs(random_state=random)
    inverse = np.linalg.inv(members.T @ members + others)
    scores = (
        ((group**2).sum(axis=1) / count - ((group @ inverse) * group).sum(axis=1)) for group in (members, strangers)
    )
    return float(area_under_the_curve(*scores))


def main() -> None:
    lines = [
        "# Telling members from strangers by a sum of Gram matrices",
        "",
        "Area under the curve (0.5 is guessing, 1 is certainty) of the best quadratic test on Gaussian rows.",
        "Made by `python -m benchmarks.membership`.",
        "",
        "| dimensions | owners | "
        + " | ".join(f"{each:,} token rows per dimension and owner" for each in ROWS_PER_DIMENSION)
        + " |",
        "|---|---|" + "---|" * len(ROWS_PER_DIMENSION),
    ]
    found = []
    for dimension in DIMENSIONS:
        for owners in OWNERS:
            areas = [membership(owners, each, dimension) for each in ROWS_PER_DIMENSION]
            found.append({"dimensions": dimension, "owners": owners, "areas": areas})
            lines.append(f"| {dimension} | {owners} | " + " | ".join(f"{area:.2f}" for area in areas) + " |")
            print(lines[-1], flush=True)
    publish("membership", {"found": found}, "\n".join(lines) + "\n", everything)


if __name__ == "__main__":
    main()
