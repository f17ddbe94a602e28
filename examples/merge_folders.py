"""Merge fine-tuned Hugging Face folders that one person holds: each plays an owner, all on this machine.

python examples/merge_folders.py --base base --owner hotel models/hotel hotel-train.jsonl hotel-test.jsonl \\
    --owner cinema models/cinema cinema-train.csv cinema-test.csv --out merged

It writes a folder of settings files to OUT/consortium and runs it, as `amalgram simulate OUT/consortium` would.
"""

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import tomli_w
from rich.console import Console

import amalgram
from common.agreement import TaskKind
from common.errors import AmalgramError, SettingsError
from common.merge_methods import METHODS
from common.models.adapter import is_adapter
from common.models.folders import fine_tuned_folder, kind_of, model_folder
from deploy.commands.table import print_report
from deploy.terminal import progress_below_log, set_up_output
from server.output_folder import claim_output
from server.report.report import Report

Owner = tuple[str, str, str, str]  # name, fine-tuned folder, training rows, test rows
PLAIN_SUM = """\
TWO OWNERS: THE SUM IS PLAIN, NOT MASKED. Of two, each could subtract its own part from any total, so masks would hide
nothing, and the coordinator is sent each owner's numbers as they are. That is fine while you hold both models yourself.
Between organisations it is not: there it takes three owners or more.
"""


def merge_folders(
    base: str,
    owners: Sequence[Owner],
    output: Path,
    *,
    task: TaskKind | None = None,
    method: str = "regmean",
    labels: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
    columns_of: Mapping[str, Mapping[str, str]] | None = None,
) -> Report:
    """Merge the models of `owners`. Returns the report.

    `task` left out is what the base was made for, or else the models. `labels`, in the order of the models' outputs,
    are needed only if no model names them. `columns` says what "text", "label", "image" ... are called in the files,
    where that is something else; `columns_of`, the same for single owners.
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
        "task": {"kind": task or task_of(base, *(model for _, model, *_ in owners)), "labels": list(labels)},
        "owners": [{"name": name} for name, *_ in owners],
        "summation": {"kind": "masked" if len(owners) > 2 else "plain"},
    }
    (consortium / "agreement.toml").write_text(tomli_w.dumps(draft))
    for name, fine_tuned, train, test in owners:
        files = {"train": str(Path(train).resolve()), "test": str(Path(test).resolve())}
        named = dict(columns or {}) | dict((columns_of or {}).get(name, {}))
        settings = {"name": name, "fine_tuned": _model(fine_tuned), "data": files | named}
        (consortium / f"{name}.toml").write_text(tomli_w.dumps(settings))
    return amalgram.simulate(consortium, output).report


def task_of(base: str, *models: str) -> TaskKind:
    """What the base, or else the first model that says it, was made for, by the class that its configuration names."""
    folder = model_folder(base, Path.cwd())
    for each in (folder, *(fine_tuned_folder(model, Path.cwd()) for model in models)):
        kind = None if is_adapter(each) else kind_of(each)
        if kind is not None:
            return kind
    raise SettingsError(f"{base}: its config.json tells no task; name one: --task")


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
        "--labels", nargs="+", default=[], metavar="LABEL", help="in the order of the outputs, if no model names them"
    )
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="[OWNER:]KEY=NAME",
        help="what the files, or one owner's, call a column: text=message, label=queue, hotel:text=review, ...",
    )
    asked = parser.parse_args()
    columns: dict[str, str] = {}
    columns_of: dict[str, dict[str, str]] = {name: {} for name, *_ in asked.owner}
    for column in asked.column:
        where, _, name = column.partition("=")
        owner, _, key = where.rpartition(":")
        if not key or not name or (owner and owner not in columns_of):
            parser.error(f"--column {column}: [OWNER:]KEY=NAME is needed, with an OWNER that --owner names")
        (columns_of[owner] if owner else columns)[key] = name
    set_up_output(as_json=False)
    try:
        with progress_below_log():
            report = merge_folders(
                asked.base,
                [tuple(owner) for owner in asked.owner],
                asked.out,
                task=asked.task,
                method=asked.method,
                labels=asked.labels,
                columns=columns,
                columns_of=columns_of,
            )
    except AmalgramError as error:
        sys.exit(f"error: {error}")
    print_report(Console(), report, asked.out)


if __name__ == "__main__":
    main()
