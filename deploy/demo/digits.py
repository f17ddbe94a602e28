"""The demo's consortium: five owners with five scanners, each of which puts a handwritten digit somewhere else.

The 1,797 digits are real (Alpaydin and Kaynak, UCI 1998) and come with scikit-learn. They have 8x8 pixels and are put
into a frame of 16x16, in a corner or in the centre. So the owners differ in *domain*, as in the RegMean paper, and all
ten labels occur everywhere. Each owner trains on 240 digits that no other owner has. The base model knows 150 public
digits, in the centre.

Nobody trains on the other 447 digits. Every scanner frames all of them: 147 decide the sweeps, 300 give the metrics.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification

from client.data.rows import Rows
from client.measurement.fine_tuning import fine_tune
from client.settings import Training

FRAME = 16  # pixels
DIGIT = 8
PUBLIC, TRAIN, VALIDATION = 150, 240, 147  # examples: public; for each owner; for the sweeps. The rest is for testing
SCANNERS = {  # where each scanner puts the digit: (top, left)
    "top-left": (0, 0),
    "top-right": (0, 8),
    "bottom-left": (8, 0),
    "bottom-right": (8, 8),
    "centre": (4, 4),
}
BASE_TRAINING = Training(epochs=40, learning_rate=1e-3)
OWNER_TRAINING = Training(epochs=10, learning_rate=1e-3)

AGREEMENT = """\
# The demo: five owners, five scanners, one model. See deploy/demo/digits.py.
title = "Handwritten digits from five scanners"
base = "base"
method = "refit"
compare_with = ["average", "task_arithmetic", "fisher", "regmean", "data_free"]
seed = {seed}

[task]
kind = "image-classification"

[regmean]
alphas = [0.1, 0.5, 0.9, 0.95, 0.99]
"""
OWNER_ENTRY = """
[[owners]]
name = "{name}"
"""
OWNER = """\
name = "{name}"

[training]
epochs = {training.epochs}
learning_rate = {training.learning_rate}
batch_size = {training.batch_size}

[data]
train = "{name}/train.npz"
validation = "{name}/validation.npz"
test = "{name}/test.npz"
"""


def write_consortium(folder: Path, seed: int) -> None:
    """Write the folder that `amalgram simulate FOLDER` runs: agreement, owners' settings and data, the base model."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    digits = images[order].reshape(-1, DIGIT, DIGIT).astype(np.float32) / 16
    labels = labels[order]
    public, owners, held_out = np.split(np.arange(len(labels)), [PUBLIC, PUBLIC + TRAIN * len(SCANNERS)])
    folder.mkdir(parents=True, exist_ok=True)
    for (name, corner), train in zip(SCANNERS.items(), np.split(owners, len(SCANNERS)), strict=True):
        splits = {"train": train, "validation": held_out[:VALIDATION], "test": held_out[VALIDATION:]}
        (folder / name).mkdir(exist_ok=True)
        for split, indices in splits.items():
            np.savez(folder / name / f"{split}.npz", image=frame(digits[indices], corner), label=labels[indices])
        (folder / f"{name}.toml").write_text(OWNER.format(name=name, training=OWNER_TRAINING))
    roster = "".join(OWNER_ENTRY.format(name=name) for name in SCANNERS)
    (folder / "agreement.toml").write_text(AGREEMENT.format(seed=seed) + roster)
    base = train_base(frame(digits[public], SCANNERS["centre"]), labels[public], seed)
    base.save_pretrained(folder / "base")


def frame(digits: NDArray[np.float32], corner: tuple[int, int]) -> NDArray[np.float32]:
    """(n, 8, 8) digits at `corner` (top, left) of (n, 16, 16) frames."""
    top, left = corner
    frames = np.zeros((len(digits), FRAME, FRAME), dtype=np.float32)
    frames[:, top : top + DIGIT, left : left + DIGIT] = digits
    return frames


def train_base(images: NDArray[np.float32], labels: NDArray[np.int64], seed: int) -> ViTForImageClassification:
    """A tiny vision transformer, trained on the public digits."""
    config = ViTConfig(
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=384,
        image_size=FRAME,
        patch_size=4,
        num_channels=1,
        id2label={digit: f"digit {digit}" for digit in range(10)},
        label2id={f"digit {digit}": digit for digit in range(10)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ViTForImageClassification(config)
    rows = Rows(features=images[:, None], targets=labels.astype(np.int64))
    fine_tune(model, rows, BASE_TRAINING, seed, "public base model: training")
    return model
