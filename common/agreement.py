"""The agreement: the one file that all parties hold identically.

People write a draft (`agreement.toml`); against the base model it is completed to an `Agreement`, whose digest is what
an owner consents to. Everything that the result or its privacy rests on is in here and nowhere else: nothing of it is
ever taken from a message.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from common.settings_file import Name, Positive, Probability, Settings
from common.summation.records import MAX_OWNERS
from common.tensor_layout import RingBits
from common.thresholds import quorum

CANONICAL_LABEL = b"amalgram agreement v3\n"
COORDINATOR = "coordinator"  # the name of the party that no owner may have

TaskKind = Literal[
    "text-classification", "token-classification", "causal-lm", "sequence-to-sequence", "image-classification"
]
Figure = Literal["macro_f1", "entity_f1", "log_likelihood"]
FIGURES: dict[TaskKind, Figure] = {
    "text-classification": "macro_f1",
    "image-classification": "macro_f1",
    "token-classification": "entity_f1",
    "causal-lm": "log_likelihood",
    "sequence-to-sequence": "log_likelihood",
}
LANGUAGE_MODELLING = ("causal-lm", "sequence-to-sequence")
MethodName = Literal["average", "task_arithmetic", "fisher", "data_free", "regmean", "refit", "regmean_plus_plus"]
SEQUENTIAL: frozenset[MethodName] = frozenset({"refit", "regmean_plus_plus"})  # methods of several sums
# Methods whose numbers can be scaled so that 32 bits are enough (scaling.py), and for how many owners they are.
IN_32_BITS: tuple[MethodName, ...] = ("regmean", "average", "task_arithmetic", "data_free")
MAX_OWNERS_IN_32_BITS = 150
Weighting = Literal["rows", "owners"]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PublicKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
NodeKey = Annotated[str, Field(pattern=r"^ecdsa-sha2-nistp384 [A-Za-z0-9+/]{182}==$")]
Count = Annotated[int, Field(ge=1)]


class OwnerEntry(Settings):
    """One owner of the roster; `figures` says whether its own test figures may be shown singly.

    `node_key`: the key by which the coordinator's server knows the owner's machine. A simulation needs none.
    """

    name: Name
    public_key: PublicKey | None = None
    node_key: NodeKey | None = None
    figures: Literal["shown", "summed"] = "shown"


class CoordinatorEntry(Settings):
    """Who signs the result."""

    public_key: PublicKey


class Task(Settings):
    """What the model does. Labels left empty are the base model's own; a language model has none."""

    kind: TaskKind = "text-classification"
    labels: tuple[str, ...] = ()
    max_tokens: Annotated[int, Field(ge=1, le=100_000)] = 128
    # "own": an owner's rows are judged among the labels that occur in its files; "all": among all labels.
    label_set: Literal["own", "all"] = "own"
    # "private": every owner keeps its own head, over labels of its own; the body is merged and published without one.
    head: Literal["shared", "private"] = "shared"

    @property
    def has_labels(self) -> bool:
        """Whether the model has a head over labels; a language model's is over its vocabulary."""
        return self.kind not in LANGUAGE_MODELLING

    @property
    def figure(self) -> Figure:
        """What is measured beside accuracy (metrics.py)."""
        return FIGURES[self.kind]

    @property
    def is_text(self) -> bool:
        return self.kind != "image-classification"

    @property
    def judges_tokens(self) -> bool:
        """Whether a row has many predictions, one a word or token of it."""
        return self.kind in ("token-classification", *LANGUAGE_MODELLING)

    @property
    def predictions_per_row(self) -> int:
        """The most predictions that are judged on one row."""
        return self.max_tokens if self.judges_tokens else 1


class RegMean(Settings):
    """Knobs of `common/merge_methods/regmean.py`; several alphas are a sweep, chosen by the owners' summed metric.

    `bias_feature`: a bias is solved with its weight, as the weight of one more input that is always 1, where every
    layer that shares the input has a bias. Otherwise biases are averaged. `data_free_layers`: weights of linear layers
    that are merged with the Gram of `data_free.py`, as [data_free] says, instead of a measured one: names, the
    beginnings of names up to a dot, or patterns (`*.attention.*`). `largest_gram`: a layer of more inputs than this is
    merged in blocks of its inputs, as if those of different blocks were not correlated: fewer bytes, a coarser merge.
    """

    alphas: Annotated[tuple[Probability, ...], Field(min_length=1, max_length=20)] = (0.1, 0.5, 0.9, 0.95, 0.99)
    ridge: Annotated[float, Field(ge=0, le=1)] = 1e-6
    measured_examples: Count = 1000
    bias_feature: bool = False
    data_free_layers: tuple[str, ...] = ()
    largest_gram: Count | None = None


class DataFree(Settings):
    """Knobs of `common/merge_methods/data_free.py`; several alphas are a sweep.

    The ridge is larger than RegMean's: weight changes have few large directions, and the Gram's other eigenvalues, far
    below the mean, are noise. (The demo's validation accuracy at alpha 1: 0.70 at 1e-6, 0.78 at 1e-2, 0.80 at 0.1.)
    """

    alphas: Annotated[tuple[Probability, ...], Field(min_length=1, max_length=20)] = (1.0,)
    ridge: Annotated[float, Field(ge=0, le=1)] = 0.1


class RegMeanPlusPlus(Settings):
    """Knobs of `common/merge_methods/regmean_plus_plus.py`; ridge and measured_examples are those of [regmean]."""

    alpha: Probability = 0.9


class Refit(Settings):
    """Knobs of `common/merge_methods/refit.py`.

    `body` merges everything but the classifier; `alpha`, one of the body's alphas, is its knob: left out, the largest.
    `targets`: the classifier is fitted to the owners' labels, or, without looking at a label, to their models' scores.
    Several `balances` (0: a row is a row, 1: every class of an owner weighs the same) are a sweep; of a masked sum they
    need two more honest owners than there are balances.
    """

    body: Literal["average", "data_free", "regmean"] = "data_free"
    alpha: Probability | None = None
    targets: Literal["labels", "scores"] = "labels"
    balances: Annotated[tuple[Probability, ...], Field(min_length=1, max_length=20)] = (0.5,)
    measured_examples: Count = 2000


class TaskArithmetic(Settings):
    """Knobs of `common/merge_methods/task_arithmetic.py`; several scales are a sweep."""

    scales: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=20)] = (0.3, 0.5, 1.0)


class Fisher(Settings):
    """Knobs of `common/merge_methods/fisher.py`."""

    floor: Annotated[float, Field(ge=0, le=1)] = 1e-12
    measured_examples: Count = 256


class Summation(Settings):
    """How the owners' vectors are added up. `masked`: the coordinator learns the total; `plain`: it sees every vector.

    `colluders`: so many owners may conspire with the coordinator. `quorum`: so many must sign a survivor list before
    anything is opened. Left out, they follow from the number of owners and min_owners. `ring_bits`: 32 halves what is
    sent, for one small sum more over the same owners (scaling.py).
    """

    kind: Literal["masked", "plain"] = "masked"
    colluders: Annotated[int, Field(ge=0)] | None = None
    quorum: Annotated[int, Field(ge=1)] | None = None
    ring_bits: RingBits = 64
    reply_timeout_seconds: Positive = 3600.0

    @property
    def has_scales(self) -> bool:
        """Whether contributions are summed on scales, which a small sum before theirs gives (scaling.py)."""
        return self.ring_bits == 32


class Bounds(Settings):
    """The largest absolute values that one owner may add to a sum; the fixed-point encoding rests on them.

    `grams`, one for each Gram, and `fisher`, one for each tensor that changes, are for one example;
    they are measured on the base model with made-up inputs, times `headroom`, when a draft is completed.
    """

    examples: Count = 1_000_000
    delta: Positive = 4.0
    headroom: Positive = 1024.0
    grams: tuple[Positive, ...] = ()
    fisher: tuple[Positive, ...] = ()


class Privacy(Settings):
    """What is held back because even a sum of it would say too much (SECURITY.md).

    `min_rows_per_dimension`: an owner with fewer rows than this times the dimension of some Gram takes no part. Below
    1 a Gram tells members from non-members outright; above, less and less, also in a sum. `merge_token_inputs`:
    merge layers in closed form even if their input depends on the token and its place alone; their Gram is a table of
    token counts. `merge_routed_inputs`: merge the experts of a mixture in closed form; an expert's Gram is of the few
    tokens that were routed to it, and the minimum of rows is not asked of it.
    """

    min_rows_per_dimension: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    merge_token_inputs: bool = False
    merge_routed_inputs: bool = False


class Evaluation(Settings):
    """The metric by which a sweep is decided, on validation rows."""

    choose_by: Literal["accuracy"] | Figure = "accuracy"


class Publish(Settings):
    """The form of the published model: whole, or with `adapter_rank` a LoRA adapter of the base of that rank."""

    adapter_rank: Annotated[int, Field(ge=1)] | None = None


class TensorRoles(Settings):
    """What happens to every tensor of the model, by parameter name; together they name each exactly once."""

    # Weights of linear layers that are merged in closed form; those in one group multiply the same input tensor.
    # Where one parameter holds the weights of several experts, each slice stands by itself: `name[0]`, `name[1]`, ...
    # A bias in a group is solved with its layer's weight; then every layer of the group has one.
    merged: tuple[tuple[str, ...], ...]
    # Layers of more inputs than this are merged in blocks of their inputs, a Gram each.
    largest_gram: Count | None = None
    # Weights of linear layers that RegMean merges by their changes alone.
    data_free: tuple[str, ...] = ()
    averaged: tuple[str, ...]
    left_alone: tuple[str, ...]


class AgreementDraft(Settings):
    """What people write. `base` names the base model: a Hugging Face folder (relative to the file) or hub name."""

    title: Annotated[str, Field(min_length=1, max_length=200)]
    base: Annotated[str, Field(min_length=1)]
    owners: Annotated[tuple[OwnerEntry, ...], Field(min_length=2, max_length=MAX_OWNERS)]
    coordinator: CoordinatorEntry | None = None
    min_owners: Annotated[int, Field(ge=2)] | None = None
    method: MethodName = "regmean"
    compare_with: tuple[MethodName, ...] = ()
    # "rows": an owner counts by its rows; "owners": every owner counts alike.
    weighting: Weighting = "rows"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    task: Task = Task()
    task_arithmetic: TaskArithmetic = TaskArithmetic()
    fisher: Fisher = Fisher()
    regmean: RegMean = RegMean()
    regmean_plus_plus: RegMeanPlusPlus = RegMeanPlusPlus()
    refit: Refit = Refit()
    data_free: DataFree = DataFree()
    summation: Summation = Summation()
    bounds: Bounds = Bounds()
    privacy: Privacy = Privacy()
    evaluation: Evaluation = Evaluation()
    publish: Publish = Publish()

    @model_validator(mode="after")
    def _consistent(self) -> "AgreementDraft":
        names = self.owner_names
        for name, count in Counter(names).items():
            if count > 1:
                raise ValueError(f"owners: two owners are named {name!r}; each name stands once")
        if self.min_owners is not None and self.min_owners > len(names):
            raise ValueError(f"min_owners = {self.min_owners}: there are {len(names)} owners")
        if COORDINATOR in names:
            raise ValueError(f"owners: {COORDINATOR!r} is the coordinator's name; call the owner something else")
        self._check_keys()
        if self.summation.kind == "masked":
            self._check_masked()
        hidden = len(names) - len(self.shown_owners)
        may_drop = len(names) - self.needed_owners
        least = may_drop + self.colluders + 3
        if 0 < hidden < least:
            raise ValueError(
                f'owners: {hidden} have figures = "summed", {may_drop} may drop out and {self.colluders} collude; the '
                f"total minus the known figures would show too much: let none have it, or at least {least}"
            )
        sequential = [method for method in self.methods if method in SEQUENTIAL]
        if sequential and self.needed_owners < len(names):
            raise ValueError(
                f"min_owners = {self.needed_owners}: {sequential[0]} sums again and again, and sums over different "
                f"owners would show the difference; all {len(names)} must take part, so leave min_owners out"
            )
        if self.summation.has_scales:
            self._check_32_bits()
        if "refit" in self.methods and self.refit.alpha not in (None, *self._body_alphas):
            raise ValueError(
                f"refit.alpha = {self.refit.alpha}: must be one of {self.refit.body}.alphas = {list(self._body_alphas)}"
            )
        if len(set(self.methods)) != len(self.methods):
            raise ValueError(f"compare_with = {list(self.compare_with)}: names {self.method!r} or a method twice")
        if self.task.head == "private" and not self.task.has_labels:
            raise ValueError(f'task.head = "private": a model of kind {self.task.kind} has no head over labels')
        if self.task.head == "private" and self.publish.adapter_rank is not None:
            raise ValueError('publish.adapter_rank: an adapter holds a shared head; task.head is "private"')
        if not self.task.has_labels and self.task.labels:
            raise ValueError(f"task.labels = {list(self.task.labels)}: a model of kind {self.task.kind} has none")
        if len(self.task.labels) == 1:
            raise ValueError(f"task.labels = {list(self.task.labels)}: at least two are needed")
        if len(set(self.task.labels)) != len(self.task.labels):
            raise ValueError(f"task.labels = {list(self.task.labels)}: a label stands twice")
        if self.evaluation.choose_by not in ("accuracy", self.task.figure):
            raise ValueError(
                f"evaluation.choose_by = {self.evaluation.choose_by!r}: for {self.task.kind} it is accuracy or "
                f"{self.task.figure}"
            )
        for table, key, knobs in (
            ("regmean", "alphas", self.regmean.alphas),
            ("data_free", "alphas", self.data_free.alphas),
            ("task_arithmetic", "scales", self.task_arithmetic.scales),
            ("refit", "balances", self.refit.balances),
        ):
            if len(set(knobs)) != len(knobs):
                raise ValueError(f"{table}.{key} = {list(knobs)}: a value stands twice")
        if self.regmean.data_free_layers and len(self.data_free.alphas) > 1:
            raise ValueError(
                f"data_free.alphas = {list(self.data_free.alphas)}: one alpha is needed for regmean.data_free_layers; "
                "RegMean tries its own alphas only"
            )
        return self

    def _check_32_bits(self) -> None:
        count = len(self.owners)
        for method in self.methods:
            if method not in IN_32_BITS:
                raise ValueError(
                    f"summation.ring_bits = 32: {method} needs 64; 32 are enough for {', '.join(IN_32_BITS)}"
                )
        if self.needed_owners < count:
            raise ValueError(
                f"min_owners = {self.needed_owners}: with summation.ring_bits = 32 there are two sums, and sums over "
                f"different owners would show the difference; all {count} must take part, so leave min_owners out"
            )
        if count > MAX_OWNERS_IN_32_BITS:
            raise ValueError(
                f"summation.ring_bits = 32: is for at most {MAX_OWNERS_IN_32_BITS} owners, there are {count}; of more, "
                "one that is smaller than the others would be rounded away"
            )

    def _check_keys(self) -> None:
        keys = [owner.public_key for owner in self.owners if owner.public_key is not None]
        keys += [] if self.coordinator is None else [self.coordinator.public_key]
        if len(set(keys)) != len(keys):
            raise ValueError("owners: a public key stands twice; every party has its own")
        node_keys = [owner.node_key for owner in self.owners if owner.node_key is not None]
        if len(set(node_keys)) != len(node_keys):
            raise ValueError("owners: a node_key stands twice; every owner has its own")

    def _check_masked(self) -> None:
        """At least three honest inputs in any sum that is opened, and one survivor list at most that a quorum signs."""
        count, needed, colluders = len(self.owners), self.needed_owners, self.colluders
        if needed < 3:
            raise ValueError(
                f"owners: a masked sum needs at least 3 of them, min_owners would be {needed}; of two, each knows the "
                'other\'s part of any total. Where both agree to that: summation.kind = "plain"'
            )
        least = max(quorum(count, colluders), colluders + 3)
        if needed < least:
            raise ValueError(
                f"min_owners = {needed}: with {count} owners of whom {colluders} may collude, at least {least} must "
                f"take part (the quorum {quorum(count, colluders)}, and three honest ones)"
            )
        if self.summation.quorum not in (None, quorum(count, colluders)):
            raise ValueError(
                f"summation.quorum = {self.summation.quorum}: with {count} owners of whom {colluders} may collude it "
                f"is {quorum(count, colluders)}; leave it out"
            )
        self._check_balances()

    def _check_balances(self) -> None:
        """Each balance sums the same rows with other weights: as many balances as honest owners tell these apart.

        As of any other total, three owners and one sum, there must be two more owners unknown than equations.
        """
        balances, honest = self.refit.balances, self.needed_owners - self.colluders
        fitted_to_labels = "refit" in self.methods and self.refit.targets == "labels"
        if fitted_to_labels and len(balances) > max(1, honest - 2):
            raise ValueError(
                f"refit.balances = {list(balances)}: sums of the same rows with {len(balances)} kinds of "
                f"weights would tell {honest} honest owners apart ({self.needed_owners} take part, {self.colluders} "
                f"may collude); name at most {max(1, honest - 2)}, or fewer summation.colluders"
            )

    @property
    def colluders(self) -> int:
        """How many owners may conspire with the coordinator: as many as min_owners allows, or as the draft says."""
        if self.summation.colluders is not None:
            return self.summation.colluders
        count, needed = len(self.owners), self.needed_owners
        return max((c for c in range(count) if max(quorum(count, c), c + 3) <= needed), default=0)

    @property
    def refit_alpha(self) -> float | None:
        """The knob of the body that `refit` merges; None where the body has none."""
        return self.refit.alpha if self.refit.alpha is not None else max(self._body_alphas, default=None)

    @property
    def _body_alphas(self) -> tuple[float, ...]:
        alphas = {"average": (), "data_free": self.data_free.alphas, "regmean": self.regmean.alphas}
        return alphas[self.refit.body]

    @property
    def owner_names(self) -> tuple[str, ...]:
        return tuple(owner.name for owner in self.owners)

    @property
    def methods(self) -> tuple[MethodName, ...]:
        """The method whose model is published, then those it is compared with."""
        return (self.method, *self.compare_with)

    @property
    def needed_owners(self) -> int:
        """The fewest owners whose sum may be opened: all of them unless the agreement says otherwise."""
        return len(self.owners) if self.min_owners is None else self.min_owners

    @property
    def quorum(self) -> int:
        """How many owners must sign a survivor list before anything is opened."""
        return quorum(len(self.owners), self.colluders)

    @property
    def roster(self) -> dict[str, bytes]:
        """Every owner's public key, in the agreed order."""
        return {owner.name: bytes.fromhex(owner.public_key or "") for owner in self.owners}

    @property
    def shown_owners(self) -> tuple[str, ...]:
        return tuple(owner.name for owner in self.owners if owner.figures == "shown")


class Agreement(AgreementDraft):
    """A draft completed against its base model: nothing is left open."""

    base_digest: Digest
    bundle_digest: Digest  # of the code that runs at the owners, as Flower bundles it
    tensors: TensorRoles
    coordinator: CoordinatorEntry

    @model_validator(mode="after")
    def _complete(self) -> "Agreement":
        for owner in self.owners:
            if owner.public_key is None:
                raise ValueError(
                    f"owners: {owner.name} has no public_key; `amalgram draft` puts it in from its .pub file"
                )
        if None in (self.min_owners, self.summation.colluders, self.summation.quorum):
            raise ValueError("min_owners, summation.colluders and summation.quorum must stand in an agreement")
        if self.task.has_labels and len(self.task.labels) < 2:
            raise ValueError(f"task.labels = {list(self.task.labels)}: at least two are needed")
        names = list(self.tensors_by_name())
        if len(set(names)) != len(names):
            raise ValueError("tensors: a parameter is named twice")
        return self

    def tensors_by_name(self) -> Iterator[str]:
        for group in self.tensors.merged:
            yield from group
        yield from self.tensors.data_free
        yield from self.tensors.averaged
        yield from self.tensors.left_alone

    def canonical_bytes(self) -> bytes:
        """The same bytes at every party: labelled, sorted keys, shortest floats, UTF-8."""
        fields = self.model_dump(mode="json")
        return (
            CANONICAL_LABEL
            + json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
        )

    def digest(self) -> str:
        """SHA-256 of the canonical bytes, in hexadecimal."""
        return hashlib.sha256(self.canonical_bytes()).hexdigest()
