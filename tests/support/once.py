"""Makes what many tests start from once in a run of the tests, for all its workers."""

import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from client.data.rows import Rows
from client.measurement.passes import ON_CPU, Passes
from client.settings import Training

TRAINED = "AMALGRAM_TESTS_TRAINED"  # the environment's name for the folder of `trained_once`
FineTune = Callable[..., None]  # fine_tuning.fine_tune


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """A folder of this run of the tests that all its workers see."""
    own = factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


def made_once(path: Path, make: Callable[[Path], object]) -> Path:
    """`path`, which the first worker that asks for it makes. Nobody changes it afterwards; a test works on a copy."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.with_suffix(".made").exists():
            make(path)
            path.with_suffix(".made").touch()
    return path


def trained_once(fine_tune: FineTune, folder: Path) -> FineTune:
    """`fine_tune`, which takes weights that it gave before from `folder`: the same model, rows, recipe and seed give
    the same weights. test_simulate.py shows that, without this.
    """

    def fine_tune_once(
        model: PreTrainedModel,
        rows: Rows,
        training: Training,
        seed: int,
        description: str,
        validation: Rows | None = None,
        passes: Passes = ON_CPU,
    ) -> None:
        if validation is not None or passes != ON_CPU:  # which the digest does not cover
            fine_tune(model, rows, training, seed, description, validation, passes)
            return

        def make(path: Path) -> None:
            fine_tune(model, rows, training, seed, description)
            torch.save(model.state_dict(), path)

        weights = made_once(folder / f"{_digest(model, rows, training, seed)}.pt", make)
        model.load_state_dict(torch.load(weights, weights_only=True))
        model.eval()

    return fine_tune_once


def _digest(model: PreTrainedModel, rows: Rows, training: Training, seed: int) -> str:
    """Of all that fine-tuned weights depend on."""
    found = hashlib.sha256(f"{type(model)} {model.config} {training} {seed}".encode())
    trained = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    found.update(repr(trained).encode())
    tensors = dict(model.state_dict())
    for number, (_, inputs, targets) in enumerate(rows.batches(batch_size=64)):
        tensors |= {f"{number} {name}": each for name, each in inputs.items()} | {f"{number} targets": targets}
    for indices in rows.batch_indices(batch_size=64):
        found.update(indices.tobytes())  # which row is where
    for name, each in tensors.items():
        found.update(f"{name} {each.dtype} {tuple(each.shape)}".encode())
        found.update(each.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
