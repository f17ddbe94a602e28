"""One owner's settings file: who it is, its model, its rows. Nothing in it ever leaves the owner's machine."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from common.settings_file import Name, Positive, Settings

Column = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]


class Training(Settings):
    """How to fine-tune from the base, for an owner that brings no model. The seed is the agreement's."""

    epochs: Annotated[int, Field(ge=1, le=1000)] = 3
    learning_rate: Positive = 1e-4
    batch_size: Count = 32
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01


class Data(Settings):
    """The owner's rows: JSON Lines, CSV or Parquet for text, .npz arrays for images, CoNLL's .txt or .conll for tagged
    words. Paths relative to the file. Of the columns, a task reads those it needs:

    text-classification `text`, `text_pair` where named, `label`; image-classification `image`, `label`;
    token-classification `tokens`, `tags`; causal-lm `text`; sequence-to-sequence `text`, `target`.

    `train` is measured (and trained on), `validation` decides a sweep, `test` gives the figures. Without a validation
    file a tenth of the training rows is set aside for it.
    """

    train: Path
    test: Path
    validation: Path | None = None
    text: Column = "text"
    text_pair: Column | None = None
    label: Column = "label"
    image: Column = "image"
    tokens: Column = "tokens"
    tags: Column = "tags"
    target: Column = "target"
    # Use only the first rows of a file.
    max_train_rows: Count | None = None
    max_validation_rows: Count | None = None
    max_test_rows: Count | None = None


class OwnerNetwork(Settings):
    """How `amalgram client` finds the coordinator's server and knows it: by the root certificate, and by that alone.

    `node_key`: the secret that `amalgram keys new` made; left out, <name>.node.
    """

    address: Annotated[str, Field(pattern=r"^[^\s/]+:[0-9]{1,5}$")]
    root_certificate: Path = Path("ca.pem")
    node_key: Path | None = None


class OwnerSettings(Settings):
    """`owner.toml`. Paths are relative to the file."""

    name: Name
    data: Data
    agreement: Path = Path("agreement.toml")
    # The secret identity that `amalgram keys new` made; left out, <name>.key.
    identity: Path | None = None
    state: Path = Path("state")
    # The owner's copy of the base model, where it is not what the agreement names.
    base: str | None = None
    # A whole model, or a LoRA adapter of the base (a folder with adapter_config.json).
    fine_tuned: str | None = None
    training: Training | None = None
    # How many of the longest rows a forward pass takes; of shorter ones as many more as take no more room.
    batch_size: Count = 32
    # The labels of this owner's own head, where heads are private; left out, those that its model names.
    labels: tuple[str, ...] = ()
    # What `amalgram client` needs; a simulation does without.
    network: OwnerNetwork | None = None

    @model_validator(mode="after")
    def _one_model(self) -> "OwnerSettings":
        if self.fine_tuned is None and self.training is None:
            raise ValueError("has no model: give fine_tuned (a model you have) or a [training] table (to make one)")
        if self.fine_tuned is not None and self.training is not None:
            raise ValueError("has both fine_tuned and a [training] table; keep one")
        return self
