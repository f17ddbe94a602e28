"""A report written by hand, with everything that a page has to cope with: hostile words, a lost owner, a plain sum."""

from copy import deepcopy
from typing import Any

HOSTILE = 'Ward <b>7</b> & <script>alert("x")</script>'


def _scores(accuracy: float, rows: int, **figures: float) -> dict[str, Any]:
    return {"accuracy": accuracy, "macro_f1": accuracy - 0.25, "rows": rows, **figures}


ACCURACIES = {"base": 0.25, "own_at_home": 0.875, "regmean": 0.75, "average": 0.625, "fisher": 0.8125}
_REPORT: dict[str, Any] = {
    "report_version": 2,
    "title": HOSTILE,
    "method": "regmean",
    "summation": "plain",
    "simulated": False,
    "seconds": 12.5,
    "owners": ["ada", "bea"],
    "lost": {"cyd": "sum of contribution"},
    "receipts": ["ada", "bea"],
    "agreement": {
        "title": HOSTILE,
        "fingerprint": "01234 56789 01234 56789 01234 56789 01234 56789",
        "base": "somebody/model",
        "owners": [
            {"name": "ada", "public_key": "1" * 64, "figures": "shown"},
            {"name": "bea", "public_key": "2" * 64, "figures": "summed"},
            {"name": "cyd", "public_key": "3" * 64, "figures": "shown"},
        ],
        "min_owners": 2,
        "compare_with": ["average", "fisher"],
        "weighting": "rows",
        "seed": 7,
        "task": {
            "kind": "text-classification",
            "labels": ["<i>good</i>", "bad"],
            "head": "shared",
        },
        "summation": {"kind": "plain", "colluders": 0, "quorum": 2},
        "privacy": {"min_rows_per_dimension": 1.0, "merge_token_inputs": False, "merge_routed_inputs": False},
        "refit": {"targets": "labels"},
    },
    "base_parameters": 1234,
    "chosen": {
        "regmean": {"candidate": "regmean@0.9", "knob": 0.9},
        "average": {"candidate": "average", "knob": None},
        "fisher": {"candidate": "fisher", "knob": None},
    },
    "evaluation": {
        "choose_by": "macro_f1",
        "figure": "macro_f1",
        "label_set": "own",
        "mean": {
            model: _scores(accuracy, 800, pooled_accuracy=accuracy - 0.01) for model, accuracy in ACCURACIES.items()
        },
        "by_owner": {"ada": {model: _scores(accuracy + 0.0625, 400) for model, accuracy in ACCURACIES.items()}},
        "sweep": {
            "regmean": [
                {"candidate": "regmean@0.5", "knob": 0.5, "accuracy": 0.6, "macro_f1": 0.5},
                {"candidate": "regmean@0.9", "knob": 0.9, "accuracy": 0.7, "macro_f1": 0.6},
            ]
        },
    },
    "layers": [
        {
            "name": "l0",
            "status": "empty",
            "d_in": 8,
            "gram_size": 9,
            "rows": 0,
            "condition": None,
            "effective_rank": None,
            "unseen_directions": 8,
        },
        {
            "name": "l1",
            "status": "solved",
            "d_in": 8,
            "gram_size": 9,
            "rows": 100,
            "condition": 12345.0,
            "effective_rank": 3.25,
            "unseen_directions": 0,
        },
    ],
    "changes": [
        {"name": "l0", "change": 0.0, "from_average": 1.0},
        {"name": "l1", "change": 0.125, "from_average": 0.5},
    ],
    "low_rank": {
        "rank": 8,
        "relative_error": 0.25,
        "dropped": 0.5,
        "layers": [{"name": "l0.weight", "relative_error": 0.125}],
    },
    "tensors": {
        "merged": [["l0.weight"], ["l1.weight"]],
        "data_free": [],
        "averaged": ["bias"],
        "left_alone": [],
    },
    "notes": ["l0: empty"],
    "advice": ["fisher did better"],
    "sums": [
        {
            "statistic": "contribution",
            "owners": ["ada", "bea"],
            "numbers": 99,
            "contents": [
                {"kind": "gram", "meaning": "Gram matrices", "numbers": 90, "tensors": ["gram/l0", "gram/l1"]},
                {"kind": "weight", "meaning": "the owner's weight in the mean", "numbers": 9, "tensors": ["weight"]},
            ],
            "destroyed": True,
        },
        {
            "statistic": "test",
            "owners": ["ada", "bea"],
            "numbers": 10,
            "contents": [{"kind": "mean", "meaning": "a model's figures", "numbers": 10, "tensors": ["base/mean"]}],
            "destroyed": False,
        },
    ],
    "sent": [{"model": "regmean@0.9", "split": "test", "digest": "d" * 64, "bytes": 4936, "owners": ["ada", "bea"]}],
    "steps": [
        {
            "name": "sum of contribution",
            "seconds": 4.0,
            "bytes_sent": 2000,
            "bytes_received": 2 * 10**7,
            "by_owner": {
                owner: {"waited_seconds": 1.5, "bytes_sent": 1000, "bytes_received": 10**7} for owner in ("ada", "bea")
            },
        }
    ],
    "examples": 100,
    "digests": {"agreement": "a" * 64, "base": "b" * 64, "model": "c" * 64},
    "versions": {"python": "3.11", "amalgram": "0.1.0"},
}


def hand_written() -> dict[str, Any]:
    """A copy that a test may change."""
    return deepcopy(_REPORT)
