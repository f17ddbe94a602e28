"""The consortium of the quality benchmark: owners of five emotion data sets, each with a model fine-tuned on its own.

python -m benchmarks.emotion FOLDER --data DATA --models MODELS     writes it for `amalgram simulate FOLDER`

DATA has one folder per domain with {train,dev,test}.jsonl (`text`, `label`). MODELS has a Hugging Face folder for each
of the five fine-tuned models and for their `base`.
"""

import argparse
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

IN_DOMAIN = ("isear", "crowdflower", "dailydialog", "emoevent", "goemotions")
OUT_OF_DOMAIN = ("affectivetext", "meld", "xed", "empathetic", "stockemotions")
# The first rows of each file, so that owners measure what their models were trained on. `max_train_rows` and the like
# draw rows from the whole file; 600 other test rows move macro F1 by 0.02.
ROWS = {"train": 4000, "dev": 400, "test": 600}

AGREEMENT = """\
title = "Five emotion domains"
base = "{base}"
method = "{method}"
compare_with = {compare_with}
seed = {seed}

[task]
kind = "text-classification"
max_tokens = 64

[regmean]
alphas = {alphas}
measured_examples = 500
bias_feature = {bias_feature}
{largest_gram}

[data_free]
alphas = [0.5, 0.9, 1.0]

[refit]
body = "{body}"

[evaluation]
choose_by = "macro_f1"

[summation]
kind = "{kind}"
ring_bits = {ring_bits}
"""
OWNER = """\
name = "{name}"
fine_tuned = "{model}"

[data]
train = "data/{name}/train.jsonl"
validation = "data/{name}/dev.jsonl"
test = "data/{name}/test.jsonl"
"""


def write_first_rows(folder: Path, data: Path, domains: Iterable[str], rows: Mapping[str, int] = ROWS) -> None:
    """Write the first rows of each domain's files to FOLDER/domain."""
    for domain in domains:
        (folder / domain).mkdir(parents=True)
        for split, count in rows.items():
            with (data / domain / f"{split}.jsonl").open() as lines:
                (folder / domain / f"{split}.jsonl").write_text("".join(islice(lines, count)))


def write_consortium(
    folder: Path,
    data: Path,
    models: Path,
    *,
    methods: tuple[str, ...] = ("regmean", "average", "task_arithmetic", "fisher"),
    alphas: Iterable[float] = (0.1, 0.5, 0.9, 0.95),
    bias_feature: bool = False,
    largest_gram: int | None = None,
    body: str = "data_free",
    seed: int = 0,
    owners: tuple[str, ...] = IN_DOMAIN,
    ring_bits: int = 64,
) -> None:
    """Write agreement.toml, one settings file and the first rows of the data per owner. The first of `methods`
    makes the published model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = AGREEMENT.format(
        base=(models / "base").resolve(),
        method=methods[0],
        compare_with=list(methods[1:]),
        seed=seed,
        alphas=list(alphas),
        bias_feature=str(bias_feature).lower(),
        largest_gram="" if largest_gram is None else f"largest_gram = {largest_gram}",
        body=body,
        # With two owners, each knows the other's part of any total, so a masked sum needs three.
        kind="masked" if len(owners) > 2 else "plain",
        ring_bits=ring_bits,
    )
    (folder / "agreement.toml").write_text(
        text.replace("'", '"') + "".join(f'\n[[owners]]\nname = "{name}"\n' for name in owners)
    )
    write_first_rows(folder / "data", data, owners)
    for name in owners:
        (folder / f"{name}.toml").write_text(OWNER.format(name=name, model=(models / name).resolve()))


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The command line of a benchmark on these models, to which it adds what is its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    return parser


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    write_consortium(arguments.folder, arguments.data, arguments.models)
    print(f"wrote {arguments.folder}; run it: amalgram simulate {arguments.folder}")


if __name__ == "__main__":
    main()
