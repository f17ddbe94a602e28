"""What people write in an agreement, table by table. A method's own table is in its file (common/merge_methods/)."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, create_model

from common.errors import RuleError
from common.identity import check_public_key
from common.merge_methods import METHODS, ORDERED, Hyperparameters
from common.merge_methods.method import Method, MultiRoundMethod
from common.merge_methods.search import SEARCH
from common.merge_methods.terms import ProblemType, Weighting
from common.settings_file import HEX_64, Line, Name, Paragraph, Positive, Probability, Settings, did_you_mean, matching
from common.summation.records import MAX_OWNERS
from common.tensor_layout import RingBits
from common.thresholds import MAX_COMPLETE, quorum

Dtype = Literal["float32", "bfloat16"]
TaskKind = Literal[
    "text-classification", "token-classification", "causal-lm", "sequence-to-sequence", "image-classification"
]
Metric = Literal["accuracy", "macro_f1", "entity_f1", "log_likelihood", "pearson_r", "mean_squared_error"]
WORST_GROUP: Literal["worst_group"] = "worst_group"  # the least accuracy among the agreed groups of rows
Measure = Literal[Metric, "worst_group"]
METRICS: dict[TaskKind, Metric] = {
    "text-classification": "macro_f1",
    "image-classification": "macro_f1",
    "token-classification": "entity_f1",
    "causal-lm": "log_likelihood",
    "sequence-to-sequence": "log_likelihood",
}
CLASSIFYING = ("text-classification", "image-classification")
LANGUAGE_MODELLING = ("causal-lm", "sequence-to-sequence")


def _strong_key(public_key: str) -> str:
    check_public_key(bytes.fromhex(public_key))
    return public_key


PublicKey = Annotated[str, HEX_64, AfterValidator(_strong_key)]
Commit = Annotated[str, matching("[0-9a-f]{40}", "a commit of the hub, 40 hexadecimal digits")]
NodeKey = Annotated[
    str, matching("ecdsa-sha2-nistp384 [A-Za-z0-9+/]{182}==", "an OpenSSH key of type ecdsa-sha2-nistp384")
]
Count = Annotated[int, Field(ge=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def _known_method(name: str) -> str:
    if name not in METHODS:
        raise RuleError(
            f"unknown method; known: {', '.join(method.name for method in ORDERED)}", hint=did_you_mean(name, METHODS)
        )
    return name


MethodName = Annotated[str, AfterValidator(_known_method)]


class Declared(Settings):
    """What an owner says of the training of the model that it brings. Nobody checks it."""

    epsilon: Annotated[float, Field(gt=0, le=100)]
    delta: Annotated[float, Field(gt=0, le=1e-3)] = 1e-5


class OwnerEntry(Settings):
    """One owner of the roster; `metrics` says whether its own test metrics may be shown by name.

    `node_key`: the key by which the coordinator's server knows the owner's machine. A simulation needs none. `gives`:
    an owner whose model shares no weights with the base gives "predictions" alone. `labels`: those that its model
    knows, if it does not know all.
    `declared`: with which privacy it trained the model that it brings, by its own word.
    """

    name: Name
    public_key: PublicKey | None = None
    node_key: NodeKey | None = None
    metrics: Literal["shown", "summed"] = "shown"
    declared: Declared | None = None
    gives: Literal["weights", "predictions"] = "weights"
    labels: tuple[Line, ...] = ()


class CoordinatorEntry(Settings):
    """Who signs the published model."""

    public_key: PublicKey


class Task(Settings):
    """What the model does. Labels left empty are the base's or else the owners' models'; a language model has none.

    `problem_type`, of classified texts and images: one label a row, several, or numbers. For numbers, `labels` names
    the targets, and `target_range` is the lowest and the highest value that a target may have.
    """

    kind: TaskKind = "text-classification"
    problem_type: ProblemType = "single_label_classification"
    labels: tuple[Line, ...] = ()
    target_range: Annotated[tuple[Finite, ...], Field(min_length=2, max_length=2)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=100_000)] = 128
    # "own": an owner's rows are judged among the labels that occur in its files; "all": among all labels.
    label_set: Literal["own", "all"] = "own"
    # "private": every owner keeps its own head, over labels of its own; the body is merged and published without one.
    head: Literal["shared", "private"] = "shared"

    @property
    def has_labels(self) -> bool:
        """Whether the model has a head over labels, or targets; a language model's is over its vocabulary."""
        return self.kind not in LANGUAGE_MODELLING

    @property
    def has_several_labels(self) -> bool:
        """Whether a row may have several labels, or none."""
        return self.problem_type == "multi_label_classification"

    @property
    def is_regression(self) -> bool:
        """Whether numbers are predicted."""
        return self.problem_type == "regression"

    @property
    def metrics(self) -> tuple[Metric, Metric]:
        """What is measured (metrics.py): the metric that models are compared by, and one more."""
        return ("pearson_r", "mean_squared_error") if self.is_regression else ("accuracy", METRICS[self.kind])

    @property
    def decided_by(self) -> Metric:
        """The metric that decides unless another is agreed on. Where entities are tagged, most words are in none."""
        if self.is_regression:
            return "mean_squared_error"
        tags_entities = self.kind == "token-classification" and any(label.startswith("B-") for label in self.labels)
        return "entity_f1" if tags_entities else "accuracy"

    @property
    def sums_per_output(self) -> int:
        """How many sums over test rows there are for each label or target (metrics.py).

        Owners whose heads are private have none in common.
        """
        if self.is_regression:
            return 5
        return 3 if self.has_several_labels and self.head == "shared" else 0

    @property
    def lowest_and_span(self) -> tuple[float, float]:
        """Of a regression's targets: the lowest value, and how far above it the highest is."""
        assert self.target_range is not None  # a rule of the agreement
        low, high = self.target_range
        return low, high - low

    @property
    def is_text(self) -> bool:
        return self.kind != "image-classification"

    @property
    def judges_tokens(self) -> bool:
        """Whether an example has many predictions, one for each of its words or tokens."""
        return self.kind in ("token-classification", *LANGUAGE_MODELLING)

    @property
    def predictions_per_example(self) -> int:
        """The most predictions that are judged on one example."""
        return self.max_tokens if self.judges_tokens else 1


class Summation(Settings):
    """How the owners' vectors are added up. `masked`: the coordinator learns the total; `plain`: it sees every vector.

    `colluders`: how many owners may collude with the coordinator. `quorum`: how many must sign a survivor list before
    anything is unmasked. Left out, both follow from the number of owners and min_owners. `ring_bits`: 32 halves what is
    sent, at the cost of one small round more over the same owners (scaling.py).
    """

    kind: Literal["masked", "plain"] = "masked"
    colluders: Annotated[int, Field(ge=0)] | None = None
    quorum: Annotated[int, Field(ge=1)] | None = None
    ring_bits: RingBits = 64
    reply_timeout_seconds: Positive = 3600.0

    @property
    def has_scales(self) -> bool:
        """Whether contributions are summed on scales, which a small round before theirs gives (scaling.py)."""
        return self.ring_bits == 32


class Bounds(Settings):
    """The largest absolute values that one owner may add to a sum; the fixed-point encoding rests on them.

    `grams`, one for each Gram, and `fisher`, one for each changed tensor, are for one example. They are measured on the
    base model with made-up inputs, times `headroom`, when a draft is completed.

    `change`: the largest 2-norm of an owner's change of a tensor, relative to the base's tensor. With it, every owner's
    program scales larger changes down, and nothing is published if the total shows that one did not (server/bounds.py).
    `changes`, one for each changed tensor, are these norms; completing a draft computes them.

    `gram_norms`, one for each Gram: with noise, an example that would move it by more, in Frobenius norm, weighs less.
    Left out, they are measured on the base model with made-up inputs, without headroom.

    `features`: with noise, a row whose classifier input has a larger 2-norm weighs less in a refit. Left out, it is
    measured on the base model with made-up inputs, without headroom.
    """

    examples: Count = 1_000_000
    delta: Positive = 4.0
    headroom: Positive = 1024.0
    grams: tuple[Positive, ...] = ()
    fisher: tuple[Positive, ...] = ()
    change: Positive | None = None
    changes: tuple[Positive, ...] = ()
    features: Positive | None = None
    gram_norms: tuple[Positive, ...] = ()


class Legs(Settings):
    """Which share of the budget is spent on each kind of sum that holds statistics of rows; training has the rest.

    Shares add up as squares of sensitivity over noise do (common/privacy/gaussian.py). `refit` and `grams` count if the
    agreement makes these sums.
    """

    metrics: Annotated[float, Field(gt=0, lt=1)] = 0.1
    refit: Annotated[float, Field(gt=0, lt=1)] = 0.4
    grams: Annotated[float, Field(gt=0, lt=1)] = 0.3


class Privacy(Settings):
    """What is held back because even its sum would expose too much (SECURITY.md).

    `min_rows_per_dimension`: an owner with fewer rows than this times the dimension of some Gram does not take part.
    Below 1, a Gram tells members from non-members outright; above, less and less, also in a sum. `merge_token_inputs`:
    merge layers in closed form even if their input depends only on the token and its position; their Gram is a table of
    token counts. `merge_routed_inputs`: merge the experts of a mixture in closed form; an expert's Gram covers only the
    few tokens that were routed to it, and the minimum of rows does not apply to it.

    `epsilon`, `delta`: with them, every owner's model is trained with noise, and sums that hold statistics of rows have
    noise too, so that all that leaves together reveals little of any one unit (client/measurement/private_training.py,
    common/privacy/legs.py). `unit`: a row, or with "column" all rows with the same value in a column, which each
    owner's settings name. `legs`: how the budget is shared out.
    """

    min_rows_per_dimension: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    merge_token_inputs: bool = False
    merge_routed_inputs: bool = False
    epsilon: Annotated[float, Field(gt=0, le=100)] | None = None
    delta: Annotated[float, Field(gt=0, le=1e-3)] = 1e-5
    unit: Literal["row", "column"] = "row"
    legs: Legs = Legs()


class Reading(Settings):
    """The largest shares of a file's rows that reading may lose: an owner that loses more does not take part.

    `max_empty`: rows left without tokens, or with far too few for their words. `max_equal`: rows with the same tokens
    as another row with another text. `max_unknown`: rows of mostly unknown tokens, or of one token over and over.
    """

    max_empty: Probability = 0.05
    max_equal: Probability = 0.1
    max_unknown: Probability = 0.05


class Evaluation(Settings):
    """The metric by which a sweep is decided, on validation examples.

    Left out, it is accuracy; of tagged entities, their F1; of a regression, the mean squared error, since a correlation
    misses a constant offset. "worst_group" is the accuracy in that group where it is lowest.

    `groups`: values of the column that each owner's settings name (data.group), such as its sites. Rows of each are
    judged apart, over all owners. An owner reports no group of which it has fewer than `least_group_rows`.

    `sign_above`: with it, an owner signs no model whose metric on its own test examples is lower, or lower than that of
    the base. One refusal stops the publication, unless owners may drop out.
    """

    choose_by: Measure | None = None
    groups: Annotated[tuple[Line, ...], Field(max_length=100)] = ()
    least_group_rows: Annotated[int, Field(ge=2, le=1_000_000)] = 10
    sign_above: Finite | None = None


class Verification(Settings):
    """Whether owners verify every merged model before they measure anything on it (common/verification.py).

    Left out, it is required, except with a plain sum, which cannot be verified.
    """

    required: bool | None = None


class Merging(Settings):
    """Which parameters are merged; the others stay as in the base, and are neither measured nor sent.

    `layers`: names, their beginnings up to a dot, or patterns such as *.q_proj. Left out, all. "adapter" stands for
    those that the owners' LoRA adapters change, until a draft is completed. An owner whose model changed any other
    parameter cannot take part.
    """

    layers: Annotated[tuple[Line, ...], Field(max_length=10_000)] = ()


class Publish(Settings):
    """The form of the published model: whole, or with `adapter_rank` a LoRA adapter of the base with that rank."""

    adapter_rank: Annotated[int, Field(ge=1, le=100_000)] | None = None


if TYPE_CHECKING:

    class MethodTables(Settings):
        """Every method's own table, under the method's name."""
else:
    MethodTables = create_model(
        "MethodTables",
        __base__=Settings,
        **{method.name: (method.table, method.table()) for method in ORDERED},
    )


class DraftTables(MethodTables):
    """All that people write. `base` names the base model: a Hugging Face folder (relative to the file) or hub name.

    `base_revision`: the commit of a model on the hub. Left out, it is the newest one when the draft is completed.
    """

    title: Line
    base: Paragraph
    base_revision: Commit | None = None
    owners: Annotated[tuple[OwnerEntry, ...], Field(min_length=2, max_length=MAX_OWNERS)]
    coordinator: CoordinatorEntry | None = None
    min_owners: Annotated[int, Field(ge=2)] | None = None
    method: MethodName = "regmean"
    compare_with: tuple[MethodName, ...] = ()
    # "rows": an owner counts by its examples; "owners": every owner counts alike.
    weighting: Weighting = "rows"
    # The numbers in which owners run models on their rows, and train: "bfloat16" is faster on a GPU, and coarser.
    dtype: Dtype = "float32"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    task: Task = Task()
    summation: Summation = Summation()
    bounds: Bounds = Bounds()
    privacy: Privacy = Privacy()
    reading: Reading = Reading()
    evaluation: Evaluation = Evaluation()
    verification: Verification = Verification()
    merge: Merging = Merging()
    publish: Publish = Publish()

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy finds out anew what is only found out once: pydantic would copy what this one found."""
        copied = super().model_copy(update=update, deep=deep)
        for name in vars(copied).keys() - type(self).model_fields.keys():
            del vars(copied)[name]
        return copied

    @cached_property  # like the roster, it is asked for again and again, and takes as long as there are owners
    def owner_names(self) -> tuple[str, ...]:
        return tuple(owner.name for owner in self.owners)

    @property
    def shown_owners(self) -> tuple[str, ...]:
        """The owners whose own test metrics may be shown by name: none if the metrics of all have noise together."""
        if self.privacy.epsilon is not None:
            return ()
        return tuple(owner.name for owner in self.owners if owner.metrics == "shown")

    @property
    def without_weights(self) -> frozenset[str]:
        """The owners that give predictions alone."""
        return frozenset(owner.name for owner in self.owners if owner.gives == "predictions")

    @property
    def unknown_labels(self) -> dict[str, frozenset[int]]:
        """The numbers of the labels that an owner's model does not know, by owner, where there are any."""
        return {
            owner.name: frozenset(number for number, label in enumerate(self.task.labels) if label not in owner.labels)
            for owner in self.owners
            if owner.labels
        }

    @property
    def sums_weights(self) -> bool:
        """Whether any method needs the owners' weight changes."""
        return any(METHODS[name].gives_weights(self.tables) for name in self.methods)

    @property
    def methods(self) -> tuple[str, ...]:
        """The method whose model is published, then those it is compared with."""
        return (self.method, *self.compare_with)

    @property
    def searches(self) -> bool:
        """Whether one of the methods is a search among mixtures of the others."""
        return SEARCH.name in self.methods

    @property
    def multi_round_methods(self) -> tuple[MultiRoundMethod[Hyperparameters], ...]:
        """Those of the methods that need more than one round."""
        found = (METHODS[name] for name in self.methods)
        return tuple(method for method in found if isinstance(method, MultiRoundMethod))

    @property
    def tables(self) -> Mapping[str, Hyperparameters]:
        """Every method's hyperparameters, by the method's name."""
        return {name: getattr(self, name) for name in METHODS}

    def agreed(self, method: Method) -> dict[str, float | None]:
        """The method's candidates by name, with the hyperparameter of each."""
        return method.candidates(self.tables)

    @property
    def choose_by(self) -> Measure:
        """The metric by which a sweep is decided."""
        return self.evaluation.choose_by or self.task.decided_by

    @property
    def judge_by(self) -> Metric:
        """The metric by which an owner judges a model on its own rows alone: groups are judged over all owners."""
        return "accuracy" if self.choose_by == WORST_GROUP else self.choose_by

    @property
    def needed_owners(self) -> int:
        """The fewest owners whose sum may be unmasked: all of them unless the agreement says otherwise."""
        return len(self.owners) if self.min_owners is None else self.min_owners

    @property
    def colluders(self) -> int:
        """How many owners may collude with the coordinator: as many as min_owners allows, or as the draft says."""
        if self.summation.colluders is not None:
            return self.summation.colluders
        count, needed = len(self.owners), self.needed_owners
        return max((c for c in range(count) if max(quorum(count, c), c + 3) <= needed), default=0)

    @property
    def noise_shares(self) -> int:
        """How many owners' noise must be enough: all that are summed but those who may collude, or see the total alone.

        An owner knows its own noise, and everybody sees the totals. In a plain sum, each owner's noise must be enough.
        """
        if self.summation.kind == "plain":
            return 1
        return self.needed_owners - max(self.colluders, 1)  # check: known-noise-hides-nothing

    @property
    def budget_shares(self) -> dict[str, float]:
        """Leg -> its share of the privacy budget."""
        legs = self.privacy.legs
        sums = {"metrics": legs.metrics}
        noised = frozenset[str]().union(*(METHODS[name].noised_sums(self.tables) for name in self.methods))
        if "refit" in noised:
            sums["refit"] = legs.refit
        if "grams" in noised:
            sums["grams"] = legs.grams
        return {"training": 1 - sum(sums.values()), **sums}

    @property
    def has_noised_grams(self) -> bool:
        """Whether Gram matrices of layers' inputs are summed with noise."""
        return self.privacy.epsilon is not None and "grams" in self.budget_shares

    def disclosures(self) -> Iterator[str]:
        """What must be understood of the methods' totals before consent (Method.disclosures)."""
        for name in self.methods:
            method = METHODS[name]
            has_noise = self.privacy.epsilon is not None and method.noised_sums(self.tables)
            yield from method.noised_disclosures(self.tables) if has_noise else method.disclosures(self.tables)

    @property
    def is_verified(self) -> bool:
        """Whether owners verify every merged model. In a sparse graph, an owner does not know all owners' masks."""
        is_complete = len(self.owners) <= MAX_COMPLETE  # check: verified-sums-are-complete
        return self.summation.kind == "masked" and is_complete and self.verification.required is not False

    @property
    def quorum(self) -> int:
        """How many owners must sign a survivor list before anything is unmasked."""
        return quorum(len(self.owners), self.colluders)

    @cached_property
    def roster(self) -> Mapping[str, bytes]:
        """Every owner's public key, in the agreed order."""
        return {owner.name: bytes.fromhex(owner.public_key or "") for owner in self.owners}
