"""Which rows of an owner count in which agreed group (evaluation.groups), and which groups it does not report.

A total over the owners hides nobody in a group that only one of them has. So an owner reports no group of which it has
few rows, nor one without which the rest of its rows would be few: the rest is its total less its groups.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

NO_GROUP = -1


def reported_groups(values: Sequence[str], agreed: Sequence[str], least: int) -> NDArray[np.int64]:
    """For each row the number of the agreed group that it counts in, or NO_GROUP; (rows,). `values`: what the column
    says of each row. In each group that is reported, and in the rest, there are at least `least` rows, or none.
    """
    numbers = {group: number for number, group in enumerate(agreed)}
    found = np.array([numbers.get(value, NO_GROUP) for value in values], np.int64)
    counts = np.bincount(found[found >= 0], minlength=len(agreed))
    found[np.isin(found, np.flatnonzero(counts < least))] = NO_GROUP  # check: small-groups-stay-here
    for group in np.argsort(counts, kind="stable"):
        if 0 < (found == NO_GROUP).sum() < least:  # check: the-rest-is-not-small
            found[found == group] = NO_GROUP
    return found


def group_sums(right: NDArray[np.bool_], groups: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """By agreed group: right rows, rows, and 1 if there are any; (count, 3). `right`, `groups`: (rows,)."""
    rows = np.bincount(groups[groups >= 0], minlength=count)
    right_rows = np.bincount(groups[(groups >= 0) & right], minlength=count)
    return np.stack([right_rows, rows, rows > 0], axis=1).astype(np.float64)
