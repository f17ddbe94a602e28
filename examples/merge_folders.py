"""Merge fine-tuned Hugging Face folders that one person holds: each plays an owner, all on this machine.

python examples/merge_folders.py --base base --owner hotel models/hotel hotel-train.jsonl hotel-test.jsonl \\
    --owner cinema models/cinema cinema-train.csv cinema-test.csv --out merged

It writes a folder of settings files to OUT/consortium and runs it, as `amalgram simulate OUT/consortium` would.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import tomli_w
import transformers
from rich.console import Console

from common.agreement import TaskKind
from common.errors import AmalgramError, SettingsError
from common.merge_methods import METHODS
from common.models.folders import model_folder
from deploy.commands.table import print_report
from deploy.simulation.simulate import simulate
from deploy.terminal import progress_below_log, set_up_output
from server.output_folder import claim_output
from server.report.report import Report

TASKS: dict[str, TaskKind] = {  # by the end of the name of a Hugging Face model class
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForConditionalGeneration": "sequence-to-sequence",
}
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
    task: TaskKind | None = None,
    method: str = "regmean",
    columns: Mapping[str, str] | None = None,
) -> Report:
    """Merge the models of `owners`, each (name, fine-tuned folder, training rows, test rows). Returns the report.

    `task` left out is what the base's configuration names; `columns` says what "text", "label", "image" ... are called
    in the files, where that is something else.
    """
    if len(owners) == 2:
        print(PLAIN_SUM, file=sys.stderr)
    claim_output(output)
    consortium = output / "consortium"
    shutil.rmtree(consortium, ignore_errors=True)  # an earlier run may have had other owners
    consortium.mkdir()
    draft = {
        "title": f"{len(owners)} models, merged",
        "base": _model(base),
        "method": method,
        "task": {"kind": task or task_of(base)},
        "owners": [{"name": name} for name, *_ in owners],
        "summation": {"kind": "masked" if len(owners) > 2 else "plain"},
    }
    (consortium / "agreement.toml").write_text(tomli_w.dumps(draft))
    for name, fine_tuned, train, test in owners:
        files = {"train": str(Path(train).resolve()), "test": str(Path(test).resolve())}
        settings = {"name": name, "fine_tuned": _model(fine_tuned), "data": files | dict(columns or {})}
        (consortium / f"{name}.toml").write_text(tomli_w.dumps(settings))
    return simulate(consortium, output)


def task_of(base: str) -> TaskKind:
    """What the base was made for, by the class that its configuration names."""
    config = json.loads((model_folder(base, Path.cwd()) / "config.json").read_text())
    architecture = (config.get("architectures") or ["no class"])[0]
    for ending, kind in TASKS.items():
        if architecture.endswith(ending):
            return kind
    raise SettingsError(f"{base}: its config.json names {architecture}, which tells no task; name one: --task")


def _model(name: str) -> str:
    """A folder as it reads from anywhere; a hub name stays as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="the model that all were fine-tuned from: a folder or hub name")
    parser.add_argument(
        "--owner",
        required=True,
        action="append",
        nargs=4,
        metavar=("NAME", "MODEL", "TRAIN", "TEST"),
        help="for each model: a name, its folder, a file of rows to measure, one to test on",
    )
    parser.add_argument("--out", type=Path, default=Path("merged"), help="where model and report go (%(default)s)")
    parser.add_argument("--task", choices=get_args(TaskKind), help="left out, what the base was made for")
    parser.add_argument("--method", choices=METHODS, default="regmean", help="(%(default)s)")
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="KEY=NAME",
        help="what your files call a column: text=message, label=queue, image=pixels, ...",
    )
    asked = parser.parse_args()
    if not all("=" in column for column in asked.column):
        parser.error(f"--column {' '.join(asked.column)}: KEY=NAME is needed")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    owners = [tuple(owner) for owner in asked.owner]
    columns = dict(column.split("=", 1) for column in asked.column)
    set_up_output(as_json=False)
    try:
        with progress_below_log():
            report = merge_folders(asked.base, owners, asked.out, task=asked.task, method=asked.method, columns=columns)
    except AmalgramError as error:
        sys.exit(f"error: {error}")
    print_report(Console(), report, asked.out)


if __name__ == "__main__":
    main()
