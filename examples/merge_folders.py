"""Merge fine-tuned Hugging Face folders that one person holds: each plays an owner, all on this machine.

python examples/merge_folders.py --base base --owner hotel models/hotel hotel-train.jsonl hotel-test.jsonl \\
    --owner cinema models/cinema cinema-train.csv cinema-test.csv --out merged

It writes a folder of settings files to OUT/consortium and runs it, as `amalgram simulate OUT/consortium` would.
"""

import argparse
import sys
from pathlib import Path

import tomli_w
import transformers
from rich.console import Console

from common.agreement import TaskKind
from common.errors import AmalgramError
from deploy.simulate import simulate
from deploy.table import print_report
from deploy.terminal import progress_below_log, show_log
from server.merge import claim_output

PLAIN_SUM = """\
TWO OWNERS: THE SUM IS PLAIN, NOT MASKED. Of two, each could subtract its own part from any total, so masks would hide
nothing, and the coordinator is sent each owner's numbers as they are. That is fine while you hold both models yourself.
Between organisations it is not: there it takes three owners or more.
"""


def merge_folders(
    base: str,
    owners: list[tuple[str, str, str, str]],
    output: Path,
    *,
    task: TaskKind = "text-classification",
    method: str = "regmean",
    text: str = "text",
    label: str = "label",
) -> dict[str, object]:
    """Merge the models of `owners`, each (name, fine-tuned folder, training rows, test rows). Returns the report."""
    if len(owners) == 2:
        print(PLAIN_SUM, file=sys.stderr)
    claim_output(output)
    consortium = output / "consortium"
    consortium.mkdir(exist_ok=True)
    draft = {
        "title": f"{len(owners)} models, merged",
        "base": _model(base),
        "method": method,
        "task": {"kind": task},
        "owners": [{"name": name} for name, *_ in owners],
        "summation": {"kind": "masked" if len(owners) > 2 else "plain"},
    }
    (consortium / "agreement.toml").write_text(tomli_w.dumps(draft))
    for name, fine_tuned, train, test in owners:
        files = {"train": str(Path(train).resolve()), "test": str(Path(test).resolve())}
        settings = {"name": name, "fine_tuned": _model(fine_tuned), "data": files | {"text": text, "label": label}}
        (consortium / f"{name}.toml").write_text(tomli_w.dumps(settings))
    return simulate(consortium, output)


def _model(name: str) -> str:
    """A folder as it reads from anywhere; a hub name stays as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="the model that all were fine-tuned from: a folder or hub name")
    parser.add_argument("--owner", required=True, action="append", nargs=4, metavar=("NAME", "MODEL", "TRAIN", "TEST"))
    parser.add_argument("--out", type=Path, default=Path("merged"), help="where model and report go")
    parser.add_argument("--task", default="text-classification", help="also image-classification, causal-lm, ...")
    parser.add_argument("--method", default="regmean", help="also average, data_free, refit, ...")
    parser.add_argument("--text", default="text", help="the column of the texts")
    parser.add_argument("--label", default="label", help="the column of the labels")
    asked = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    owners = [tuple(owner) for owner in asked.owner]
    columns = {"text": asked.text, "label": asked.label}
    show_log(as_json=False)
    try:
        with progress_below_log():
            report = merge_folders(asked.base, owners, asked.out, task=asked.task, method=asked.method, **columns)
    except AmalgramError as error:
        sys.exit(f"error: {error}")
    print_report(Console(), report, asked.out)


if __name__ == "__main__":
    main()
