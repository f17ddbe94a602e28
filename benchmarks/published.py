"""Where a benchmark's results go. A run that measures less than the published one never replaces it."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

Size = Callable[[Mapping[str, Any]], Mapping[str, float]]  # how much the results of a run cover, by what is counted


def published(name: str) -> dict[str, Any]:
    """The published results of that name; empty if there are none."""
    path = RESULTS / f"{name}.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return results


def publish(name: str, results: Mapping[str, Any], page: str, size: Size) -> bool:
    """Write results/NAME.{json,md}, unless the published run covers more of anything. Says which on standard error."""
    before, now = published(name), size(results)
    covered = size(before) if before else {}
    smaller = [
        f"{now.get(each, 0):g} of {count:g} {each}" for each, count in covered.items() if now.get(each, 0) < count
    ]
    if smaller:
        print(f"results/{name}.md is kept: this run measured {', '.join(smaller)}", file=sys.stderr)
        return False
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n")
    (RESULTS / f"{name}.md").write_text(page)
    print(f"results/{name}.md is written", file=sys.stderr)
    return True


def everything(_: Mapping[str, Any]) -> Mapping[str, float]:
    """The size of a benchmark that always measures all that it can, or adds to what is published."""
    return {}


def say(text: str) -> None:
    """Print a result as soon as it is measured."""
    print(text, file=sys.stderr, flush=True)
