"""The consortium of the quality benchmark: owners of five emotion data sets, each with a model fine-tuned on its own.

python -m benchmarks.emotion FOLDER --data DATA --models MODELS     writes it for `amalgram simulate FOLDER`

DATA has one folder per domain with {train,dev,test}.jsonl (`text`, `label`). MODELS has a Hugging Face folder for each
of the five fine-tuned models and for their `base`.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

IN_DOMAIN = ("isear", "crowdflower", "dailydialog", "emoevent", "goemotions")
OUT_OF_DOMAIN = ("affectivetext", "meld", "xed", "empathetic", "stockemotions")
TEST_ROWS = 600

AGREEMENT = """\
title = "Five emotion domains"
base = "{base}"
method = "{method}"
weighting = "{weighting}"
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
{data_free}

[anchored]
anchors = [0.1, 0.5]

[logit_adjusted]
body = "{body}"
strengths = {strengths}

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
train = "{data}/train.jsonl"
validation = "{data}/dev.jsonl"
test = "{data}/test.jsonl"
max_train_rows = 4000
max_validation_rows = 400
max_test_rows = {test_rows}
"""


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
    data_free: str = "alphas = [0.5, 0.9, 1.0]",
    strengths: Iterable[float] = (0.5,),
    seed: int = 0,
    owners: tuple[str, ...] = IN_DOMAIN,
    ring_bits: int = 64,
    weighting: str = "rows",
) -> None:
    """Write agreement.toml and one settings file per owner. The first of `methods` makes the published model."""
    folder.mkdir(parents=True, exist_ok=True)
    text = AGREEMENT.format(
        base=(models / "base").resolve(),
        method=methods[0],
        compare_with=list(methods[1:]),
        seed=seed,
        alphas=list(alphas),
        bias_feature=str(bias_feature).lower(),
        largest_gram="" if largest_gram is None else f"largest_gram = {largest_gram}",
        weighting=weighting,
        body=body,
        data_free=data_free,
        strengths=list(strengths),
        # With two owners, each knows the other's part of any total, so a masked sum needs three.
        kind="masked" if len(owners) > 2 else "plain",
        ring_bits=ring_bits,
    )
    (folder / "agreement.toml").write_text(
        text.replace("'", '"') + "".join(f'\n[[owners]]\nname = "{name}"\n' for name in owners)
    )
    for name in owners:
        text = OWNER.format(
            name=name, model=(models / name).resolve(), data=(data / name).resolve(), test_rows=TEST_ROWS
        )
        (folder / f"{name}.toml").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    arguments = parser.parse_args()
    write_consortium(arguments.folder, arguments.data, arguments.models)
    print(f"wrote {arguments.folder}; run it: amalgram simulate {arguments.folder}")


if __name__ == "__main__":
    main()
