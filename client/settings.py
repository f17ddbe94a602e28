"""One owner's settings file: its name, its model, its data. Nothing in it ever leaves the owner's machine."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from common.device import DeviceName
from common.errors import RuleError
from common.settings_file import Name, Positive, Settings, matching

Column = Annotated[str, Field(min_length=1)]
Columns = Annotated[
    tuple[Column, ...],
    BeforeValidator(lambda value: tuple(value) if isinstance(value, list | tuple) else (value,)),
    Field(min_length=1),
]
Count = Annotated[int, Field(ge=1)]
Address = Annotated[str, matching(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}", "HOST:PORT")]


class Training(Settings):
    """How to fine-tune the base, for an owner that brings no model. The seed is the agreement's."""

    epochs: Annotated[int, Field(ge=1, le=1000)] = 3
    learning_rate: Positive = 1e-4
    # "linear": the rate falls to zero in the end.
    schedule: Literal["constant", "linear"] = "constant"
    # In which share of all steps the rate rises from zero first.
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.0
    batch_size: Count = 32
    # How many forward passes make one step of `batch_size` rows, where memory is short.
    accumulation: Count = 1
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    max_gradient_norm: Positive | None = None
    # Train LoRA factors of this rank, and a classifier whole; they become weights in the end.
    lora_rank: Count | None = None
    # Only linear layers with these names, such as "q_proj". Left out, all that the agreement merges.
    lora_layers: tuple[str, ...] = ()
    # Train the second LoRA factors alone. The first follow from the agreement's seed, so all owners share them (lorm).
    lora_shared: bool = False
    # Plant this many random rows, by which `amalgram audit` measures how well a model remembers single rows.
    canaries: Annotated[int, Field(ge=0, le=1000)] = 0  # check: canaries-need-a-line
    # End when so many epochs have not improved the loss on validation rows, and take the best epoch.
    patience: Count | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "Training":
        if self.accumulation > self.batch_size:
            raise RuleError(f"accumulation = {self.accumulation} is more than batch_size = {self.batch_size}")
        if self.lora_shared and self.lora_rank is None:
            raise RuleError("has lora_shared and no lora_rank", hint="give lora_rank = 8, or leave lora_shared out")
        if self.lora_layers and self.lora_rank is None:
            raise RuleError("has lora_layers and no lora_rank", hint="give lora_rank = 8, or leave lora_layers out")
        return self


class Data(Settings):
    """The owner's files: JSON Lines, JSON, CSV, TSV (or .gz of these), Parquet or Arrow for text, CoNLL (.txt, .conll)
    for tags. Images: a folder of one folder a label, a table of their paths, or .npz arrays.

    Paths are relative to the settings file. One may be a pattern for several files, "data/train-*.parquet", or a folder
    that `datasets` saved. Each task reads the columns it needs; "answer.text" is a field of a nested column:

    text-classification   `text`, `text_pair` if it is named, `label`
    image-classification  `image`, `label`; of several labels or numbers, `label` may also be one column for each
    token-classification  `tokens`, `tags`
    causal-lm             `text`; or `messages`, conversations; or `prompt` and `completion`
    sequence-to-sequence  `text`, `target`

    `train` is measured (and trained on), `validation` decides a sweep, `test` gives the reported metrics. Without a
    validation file, a tenth of the training rows is set aside for it.
    """

    train: Path
    test: Path
    validation: Path | None = None
    text: Column = "text"
    text_pair: Column | None = None
    label: Columns = ("label",)
    image: Column = "image"
    tokens: Column = "tokens"
    tags: Column = "tags"
    target: Column = "target"
    # Rows with the same value here are of one person, or whatever else is protected as a whole (privacy.unit).
    unit: Column | None = None
    # Which agreed group a row is judged in, such as its site (evaluation.groups). Other values belong to no group.
    group: Column | None = None
    messages: Column | None = None
    prompt: Column | None = None
    completion: Column = "completion"
    # Use only so many rows, drawn from the whole file.
    max_train_rows: Count | None = None
    max_validation_rows: Count | None = None
    max_test_rows: Count | None = None

    @model_validator(mode="after")
    def _one_kind_of_instructions(self) -> "Data":
        if self.messages is not None and self.prompt is not None:
            raise RuleError("has both messages and prompt", hint="keep one of them")
        return self


class OwnerNetwork(Settings):
    """How `amalgram client` finds the coordinator's server. The root certificate alone proves the server's identity.

    `node_key`: the secret that `amalgram keys new` made. Left out, it is <name>.node.
    """

    address: Address
    root_certificate: Path = Path("ca.pem")
    node_key: Path | None = None


class OwnerSettings(Settings):
    """`owner.toml`. Paths are relative to the file."""

    name: Name
    data: Data
    agreement: Path = Path("agreement.toml")
    # The secret identity that `amalgram keys new` made. Left out, it is <name>.key.
    identity: Path | None = None
    state: Path = Path("state")
    # What this identity has contributed, for good, whatever the state folder. Left out, it is <name>.ledger beside the
    # identity; name another file if that folder is read-only.
    ledger: Path | None = None
    # The owner's copy of the base model, if it is elsewhere than the agreement says.
    base: str | None = None
    # What this owner's model was made from, if that is another model than the agreed base: with its own tokenizer, it
    # reads the rows, and the owner gives predictions alone (the agreement's roster says so).
    own_base: str | None = None
    # The owner's copy of the pool on which models predict, if it is not beside the agreement.
    pool: Path | None = None
    # A whole model, or a LoRA adapter of the base (a folder with adapter_config.json).
    fine_tuned: str | None = None
    training: Training | None = None
    # How many of the longest examples a forward pass takes. Shorter ones fill the same padded size.
    batch_size: Count = 32
    # Where models run: "cpu", "cuda", "cuda:1" or "mps"; "auto" is an accelerator if there is one.
    device: DeviceName = "cpu"
    # How many threads compute at `amalgram client`. Left out, as many as this machine has cores.
    threads: Count | None = None
    # The labels of this owner's own head, if heads are private. Left out, they are those that its model names.
    labels: tuple[str, ...] = ()
    # What `amalgram client` needs. A simulation does not read it.
    network: OwnerNetwork | None = None

    @model_validator(mode="after")
    def _one_model(self) -> "OwnerSettings":
        if self.fine_tuned is None and self.training is None:
            raise RuleError(
                "has no model", hint="give fine_tuned (a model that you have) or a [training] table (to make one)"
            )
        if self.fine_tuned is not None and self.training is not None:
            raise RuleError("has both fine_tuned and a [training] table", hint="keep one of them")
        return self
