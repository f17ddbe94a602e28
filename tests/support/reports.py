"""A report written by hand that is hard on a page: hostile words, an owner that dropped out, a plain sum."""

import json
from copy import deepcopy
from typing import Any

from server.report.report import Report

HOSTILE = 'Ward <b>7</b> & <script>alert("x")</script>'


def _scores(accuracy: float, predictions: int, **more: Any) -> dict[str, Any]:
    return {"accuracy": accuracy, "metric": accuracy - 0.25, "predictions": predictions, "pearson_r": None, **more}


def _method(title: str, phrase: str, hyperparameter: str | None = None) -> dict[str, Any]:
    return {
        "title": title,
        "phrase": phrase,
        "summary": f"how {title} merges",
        "paper": None,
        "hyperparameter": hyperparameter,
        "hyperparameter_summary": hyperparameter and f"What {hyperparameter} does.",
    }


ACCURACIES = {"base": 0.25, "own_at_home": 0.875, "regmean": 0.75, "average": 0.625, "fisher": 0.8125}
_REPORT: dict[str, Any] = {
    "report_version": 5,
    "title": HOSTILE,
    "method": "regmean",
    "methods": {
        "regmean": _method("RegMean", "RegMean", "alpha"),
        "average": _method("average", "the plain average"),
        "fisher": _method("Fisher", "Fisher averaging"),
    },
    "summation": "plain",
    "verified": False,
    "simulated": False,
    "seconds": 12.5,
    "owners": ["ada", "bea"],
    "dropped_out": {"cyd": "contributions"},
    "receipts": ["ada", "bea"],
    "agreement": {
        "fingerprint": "01234 56789 01234 56789 01234 56789 01234 56789",
        "base": "somebody/model",
        "owners": [
            {"name": "ada", "public_key": "1" * 64, "metrics": "shown", "declared": None},
            {"name": "bea", "public_key": "2" * 64, "metrics": "summed", "declared": None},
            {"name": "cyd", "public_key": "3" * 64, "metrics": "shown", "declared": None},
        ],
        "min_owners": 2,
        "colluders": 0,
        "quorum": 2,
        "ring_bits": 64,
        "compare_with": ["average", "fisher"],
        "weighting": "rows",
        "dtype": "float32",
        "seed": 7,
        "task": {
            "kind": "text-classification",
            "problem_type": "single_label_classification",
            "labels": ["<i>good</i>", "bad"],
            "target_range": None,
            "head": "shared",
        },
        "privacy": {
            "min_rows_per_dimension": 1.0,
            "merge_token_inputs": False,
            "merge_routed_inputs": False,
            "epsilon": None,
            "delta": 0.0,
            "unit": "row",
            "legs": [],
        },
        "hyperparameters": {"regmean": {"alphas": [0.5, 0.9]}},
    },
    "base_parameters": 1234,
    "chosen": {
        "regmean": {"candidate": "regmean@0.9", "hyperparameter": 0.9},
        "average": {"candidate": "average", "hyperparameter": None},
        "fisher": {"candidate": "fisher", "hyperparameter": None},
    },
    "evaluation": {
        "choose_by": "macro_f1",
        "metric": "macro_f1",
        "label_set": "own",
        "cut": None,
        "mean": {
            model: _scores(accuracy, 800, pooled_accuracy=accuracy - 0.01, sums=[], groups={})
            for model, accuracy in ACCURACIES.items()
        },
        "by_owner": {"ada": {model: _scores(accuracy + 0.0625, 400) for model, accuracy in ACCURACIES.items()}},
        "sweep": {
            "regmean": [
                {
                    "candidate": "regmean@0.5",
                    "hyperparameter": 0.5,
                    "accuracy": 0.6,
                    "metric": 0.5,
                    "pearson_r": None,
                    "worst_group": None,
                    "scales": None,
                },
                {
                    "candidate": "regmean@0.9",
                    "hyperparameter": 0.9,
                    "accuracy": 0.7,
                    "metric": 0.6,
                    "pearson_r": None,
                    "worst_group": None,
                    "scales": None,
                },
            ]
        },
    },
    "layers": [
        {
            "name": "l0",
            "status": "empty",
            "d_in": 8,
            "gram_size": 9,
            "token_rows": 0,
            "condition": None,
            "effective_rank": None,
            "unseen_directions": 8,
        },
        {
            "name": "l1",
            "status": "solved",
            "d_in": 8,
            "gram_size": 9,
            "token_rows": 100,
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
    "disclosures": ["Token embeddings show which tokens occur."],
    "rounds": [
        {
            "kind": "contribution",
            "method": None,
            "step": None,
            "split": None,
            "title": "contributions",
            "owners": ["ada", "bea"],
            "numbers": 99,
            "contents": [
                {"kind": "gram", "meaning": "Gram matrices", "numbers": 90, "tensors": ["gram/l0", "gram/l1"]},
                {"kind": "weight", "meaning": "the owner's weight in the mean", "numbers": 9, "tensors": ["weight"]},
            ],
            "destroyed": True,
        },
        {
            "kind": "metrics",
            "method": None,
            "step": None,
            "split": "test",
            "title": "test metrics",
            "owners": ["ada", "bea"],
            "numbers": 10,
            "contents": [{"kind": "mean", "meaning": "a model's metrics", "numbers": 10, "tensors": ["base/mean"]}],
            "destroyed": False,
        },
    ],
    "sent": [
        {
            "kind": "candidate",
            "method": "regmean",
            "candidate": "regmean@0.9",
            "split": "test",
            "title": "regmean@0.9",
            "digest": "d" * 64,
            "bytes": 4936,
            "owners": ["ada", "bea"],
        }
    ],
    "steps": [
        {
            "title": "round: contributions",
            "phase": "contributions",
            "seconds": 4.0,
            "waited_seconds": 3.0,
            "bytes_sent": 2000,
            "bytes_received": 2 * 10**7,
            "by_owner": {
                owner: {"messages": 4, "bytes_sent": 1000, "bytes_received": 10**7} for owner in ("ada", "bea")
            },
        }
    ],
    "examples": 100,
    "digests": {"agreement": "a" * 64, "base": "b" * 64, "bundle": "e" * 64, "model": "c" * 64},
    "versions": {"python": "3.11", "amalgram": "0.1.0"},
}


def hand_written() -> dict[str, Any]:
    """What its file holds, as a copy that a test may change."""
    return deepcopy(_REPORT)


def as_report(content: dict[str, Any]) -> Report:
    """The report that reading this content gives."""
    return Report.model_validate_json(json.dumps(content))


def of_many(owners: list[str]) -> dict[str, Any]:
    """The same with these owners, who all show their metrics, each a little better than the one before."""
    report = hand_written()
    names, scores = list(owners), report["evaluation"]["by_owner"]["ada"]
    cost = report["steps"][0]["by_owner"]["ada"]
    report["owners"] = report["receipts"] = names
    report["dropped_out"] = {}
    report["agreement"]["owners"] = [report["agreement"]["owners"][0] | {"name": name} for name in names]
    report["steps"][0]["by_owner"] = dict.fromkeys(reversed(names), cost)  # as answers arrived
    for each in (*report["rounds"], *report["sent"]):
        each["owners"] = list(reversed(names))
    report["evaluation"]["by_owner"] = {
        name: scores | {"regmean": scores["regmean"] | {"accuracy": (number + 1) / len(names)}}
        for number, name in enumerate(names)
    }
    return report
