"""`report.json`: what one run did, found and revealed. The page, the model card and the table need nothing else.

`Report` is the whole. Its JSON schema, with every description below, is docs/report.schema.json:

    python -m server.report.report > docs/report.schema.json

A *model* in a report is `base`, `own_at_home` (each owner's own model on its own rows) or a method's name. A simulation
adds references that no real run can have: `own` (each owner's own model on every owner's rows), `ensemble` (the mean of
the own models' probabilities), `multi_task` (the base fine-tuned on the pooled rows) and, if models are distilled,
`close_ensemble` (that mean, weighted by how close a row is to each owner's own).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, JsonValue, ValidationError, model_validator

from common.agreement.tables import Dtype, Measure, Metric, TaskKind
from common.errors import SettingsError
from common.merge_methods.terms import ProblemType, Weighting
from common.metrics import Split, compared_by
from common.page.table import Share, Size, Table, as_json, schema_of
from common.settings_file import Count, Digest, Line, Paragraph, reason_in_words
from common.text import MAX_LINE, flaw
from server.output_folder import CHECKPOINT, last_step

REPORT_VERSION: Literal[5] = 5
MAX_REPORT_BYTES = 64_000_000
MAX_QUOTED_CHARACTERS = 120  # of what an error message quotes from a file
REFERENCES = ("own", "ensemble", "close_ensemble", "multi_task")
FIXED_MODELS = ("base", "own_at_home", *REFERENCES)

Correlation = Annotated[float, Field(ge=-1, le=1)]
Sums = tuple[tuple[float, ...], ...]


def _check_strings(value: JsonValue) -> JsonValue:
    """Every string in a table whose keys are not known here is one line."""
    if isinstance(value, str) and (found := flaw(value, MAX_LINE)):  # check: hyperparameters-are-one-line
        raise ValueError(found)
    for each in value if isinstance(value, list) else [*value, *value.values()] if isinstance(value, dict) else ():
        _check_strings(each)
    return value


Values = Annotated[JsonValue, AfterValidator(_check_strings)]


class MethodDescription(Table):
    """A merge method, explained to people."""

    title: Line = Field(description="Its name as it reads in mid-sentence.")
    phrase: Paragraph = Field(description="What a sentence compares with: `the plain average`.")
    summary: Paragraph = Field(description="How it merges, in one sentence without a full stop.")
    paper: Paragraph | None = Field(default=None, description="Where it comes from: authors, year and arXiv number.")
    hyperparameter: Line | None = Field(default=None, description="What its sweep varies, or null if it has no sweep.")
    hyperparameter_summary: Paragraph | None = Field(default=None, description="What its values do, in one sentence.")


class AgreedOwner(Table):
    """One owner on the roster."""

    name: Line = Field(description="The owner's name.")
    public_key: Digest = Field(description="The key that verifies its signatures, in hexadecimal.")
    metrics: Literal["shown", "summed"] = Field(description="Whether its own test metrics may be shown by name.")
    declared: tuple[Size, Size] | None = Field(
        default=None,
        description="Epsilon and delta with which it trained the model that it brought, by its own word: unchecked.",
    )


class AgreedTask(Table):
    """What the model does."""

    kind: TaskKind = Field(description="The kind of task.")
    problem_type: ProblemType = Field(description="Whether a row has one label, several, or numbers.")
    labels: tuple[Line, ...] = Field(
        description="The labels in order, or the names of a regression's targets; empty for a language model."
    )
    target_range: Annotated[tuple[float, ...], Field(min_length=2, max_length=2)] | None = Field(
        description="The lowest and the highest value of a regression's targets, else null."
    )
    head: Literal["shared", "private"] = Field(description="Whether the head is merged or each owner keeps its own.")


class AgreedLeg(Table):
    """One part of the privacy budget, and the noise that it pays for."""

    name: Literal["training", "metrics", "refit", "grams"] = Field(
        description="Training, or a kind of sum with noise; Grams are in units of their agreed norms."
    )
    share: Share = Field(description="Its share of the budget, in squares of sensitivity / sigma.")
    epsilon: Size | None = Field(description="Of this part alone, at the agreed delta; null for training.")
    sensitivity: Size | None = Field(
        description="By how much, in 2-norm, one unit moves what is summed; null for training."
    )
    sigma: Size | None = Field(description="Standard deviation of the noise that hides it; null for training.")
    added: Size | None = Field(
        description="Standard deviation of the noise of all owners, which is more: those of some are enough."
    )


class AgreedPrivacy(Table):
    """What the owners agreed to hold back."""

    min_rows_per_dimension: Size = Field(description="Fewest token rows per dimension of a Gram matrix.")
    merge_token_inputs: bool = Field(description="Whether Gram matrices that count tokens were summed.")
    merge_routed_inputs: bool = Field(description="Whether Gram matrices of a mixture's experts were summed.")
    epsilon: Size | None = Field(
        default=None,
        description="What bounds, with delta, how much the model reveals of one unit; null without a bound.",
    )
    delta: Size = Field(default=0.0, description="The probability with which epsilon may not hold.")
    unit: Literal["row", "column"] = Field(
        default="row", description="Whether a row is protected, or all rows with one value of a column."
    )
    legs: tuple[AgreedLeg, ...] = Field(default=(), description="What the budget is spent on; none without a bound.")


class Agreed(Table):
    """The agreement that every owner consented to, without its bounds."""

    fingerprint: Line = Field(description="Forty decimal digits to compare by phone.")
    base: Paragraph = Field(description="The base model's name on the hub, or its folder.")
    owners: tuple[AgreedOwner, ...] = Field(min_length=1, description="The roster.")
    min_owners: Count = Field(description="The fewest owners whose sum may be opened.")
    colluders: Count = Field(description="How many owners may collude with the coordinator.")
    quorum: Count = Field(description="How many owners must sign who is in a sum before it is opened.")
    ring_bits: Literal[32, 64] = Field(description="How many bits each masked number has.")
    compare_with: tuple[Line, ...] = Field(description="Methods that were merged only to be compared.")
    weighting: Weighting = Field(description="Whether an owner counts by its rows or like every other.")
    dtype: Dtype = Field(default="float32", description="The numbers in which owners ran models on their rows.")
    seed: Count = Field(description="The seed of everything that is drawn at random, except keys and masks.")
    task: AgreedTask = Field(description="What the model does.")
    privacy: AgreedPrivacy = Field(description="What was held back.")
    hyperparameters: dict[Line, dict[Line, Values]] = Field(description="By method, its table of the agreement.")


class Choice(Table):
    """The candidate of one method that was evaluated on test rows."""

    candidate: Line = Field(description="The candidate's name: `regmean@0.9`, or `average`.")
    hyperparameter: float | None = Field(description="The value of its hyperparameter, or null if it has none.")


class GroupMetrics(Table):
    """How one model did on the test rows of one group, over the owners that report it."""

    accuracy: Share = Field(description="The share of rows that it got right.")
    rows: int = Field(ge=1, description="How many rows were judged.")
    owners: int = Field(ge=1, description="How many owners report the group. If it is one, these are its own metrics.")


def group_metrics(groups: Sequence[str], sums: Sequence[Sequence[float]]) -> dict[str, GroupMetrics]:
    """Of the agreed groups that some owner reports; `sums`: as metrics.MeanScore has them."""
    return {
        group: GroupMetrics(accuracy=correct / rows, rows=round(rows), owners=round(owners))
        for group, (correct, rows, owners) in zip(groups, sums, strict=bool(sums))
        if rows > 0
    }


class MeanMetrics(Table):
    """How one model did over all owners' test rows."""

    accuracy: Share | None = Field(
        description="Mean accuracy over owners; every owner counts alike. With privacy.epsilon, over all rows, with "
        "noise. Null for a regression, which has pearson_r."
    )
    metric: float = Field(
        description="Mean of `evaluation.metric` over owners; every owner counts alike. Of a regression, and with "
        "privacy.epsilon, over all rows."
    )
    pooled_accuracy: Share | None = Field(
        description="Accuracy over all predictions; every prediction counts alike. Null for a regression."
    )
    predictions: int = Field(ge=1, description="How many predictions were judged.")
    pearson_r: Correlation | None = Field(
        description="Pearson's r over all rows, of several targets its mean; null unless a regression."
    )
    sums: Sums = Field(
        description="With several labels a row, by label: rows that have it and are given it, that have it, and that "
        "are given it. Of a regression, by target, on a scale from 0 to 1 over target_range: sums of predictions, "
        "targets, predictions^2, targets^2 and squared differences.",
    )
    groups: dict[Line, GroupMetrics] = Field(
        default={}, description="By agreed group that some owner reports (evaluation.groups), in the agreed order."
    )

    @property
    def worst_group(self) -> str | None:
        """The group in which the model is right least often; None without groups."""
        return min(self.groups, key=lambda group: self.groups[group].accuracy, default=None)

    @property
    def main(self) -> float:
        """The number that models are compared by."""
        return compared_by(self.accuracy, self.pearson_r)


class OwnerMetrics(Table):
    """How one model did on one owner's test rows."""

    accuracy: Share | None = Field(description="The share of correct predictions; null for a regression.")
    metric: float = Field(description="The value of `evaluation.metric`.")
    predictions: int = Field(ge=1, description="How many predictions were judged.")
    pearson_r: Correlation | None = Field(description="Pearson's r; null unless a regression.")

    @property
    def main(self) -> float:
        """The number that models are compared by."""
        return compared_by(self.accuracy, self.pearson_r)


class Trial(Table):
    """One candidate of a sweep, on validation rows."""

    candidate: Line = Field(description="The candidate's name.")
    hyperparameter: float = Field(description="The value that was tried.")
    accuracy: Share | None = Field(description="Mean accuracy over owners; null for a regression.")
    metric: float = Field(description="Mean of `evaluation.metric` over owners; of a regression, over all rows.")
    pearson_r: Correlation | None = Field(description="Pearson's r; null unless a regression.")
    worst_group: Share | None = Field(
        default=None, description="Accuracy in the agreed group where it is lowest; null without groups."
    )
    scales: tuple[Size, ...] | None = Field(
        default=None,
        description="Of a search, how much of each merged delta each group of blocks takes: first that of the first "
        "method of search.basis in every group; null for any other candidate.",
    )

    @property
    def main(self) -> float:
        """The number that models are compared by."""
        return compared_by(self.accuracy, self.pearson_r)


class Evaluation(Table):
    """What the owners measured."""

    choose_by: Measure = Field(description="The metric that decides a sweep.")
    metric: Metric = Field(description="The metric beside accuracy, or beside Pearson's r.")
    label_set: Literal["own", "all"] = Field(description="Whether predictions are judged among the owner's labels.")
    mean: dict[Line, MeanMetrics] = Field(description="By model, on test rows.")
    by_owner: dict[Line, dict[Line, OwnerMetrics]] = Field(description="By owner that agreed to it, by model.")
    cut: tuple[Count, Count] | None = Field(
        description="How many of all owners' test texts were cut to max_tokens, and of how many that were looked at; "
        "null for images."
    )
    sweep: dict[Line, Annotated[tuple[Trial, ...], Field(min_length=1)]] = Field(description="By method with a sweep.")


class Layer(Table):
    """How one Gram matrix of the published model was solved."""

    name: Line = Field(description="The layer whose input it is of.")
    status: Line = Field(description="solved, singular, indefinite or empty.")
    d_in: Count = Field(description="The width of the input.")
    gram_size: Count = Field(description="The size of the Gram matrix: one more than d_in if biases are solved too.")
    token_rows: Count | None = Field(description="How many token rows were summed; null if it was made without data.")
    condition: Size | None = Field(description="The largest eigenvalue divided by the smallest.")
    effective_rank: Size | None = Field(description="How many directions the inputs really use.")
    unseen_directions: Count = Field(description="How many directions no input had.")


class Change(Table):
    """How far the published model moved, in Frobenius norms over the layers that share one input."""

    name: Line = Field(description="The name of the Gram matrix, or of the layer where there is none.")
    change: Size | None = Field(description="|merged - base| / |base|; null if the base is zero.")
    from_average: Size | None = Field(
        description="|merged - average| / |average - base|; null unless the average was computed and moved."
    )


class AdapterLayer(Table):
    """What one weight lost when it was cut to the adapter's rank."""

    name: Line = Field(description="The weight's name.")
    relative_error: Size = Field(description="|cut off| / |change|, in Frobenius norms.")


class LowRank(Table):
    """What a model that is published as a LoRA adapter lost."""

    rank: int = Field(ge=1, description="The adapter's rank.")
    relative_error: Size = Field(description="|cut off| / |change| over all layers together, in Frobenius norms.")
    dropped: Size = Field(description="The share of the whole change's norm that no adapter can hold.")
    layers: tuple[AdapterLayer, ...] = Field(description="By weight.")


class Tensors(Table):
    """What happened to each tensor of the model, by parameter name."""

    merged: tuple[tuple[Line, ...], ...] = Field(description="Merged in closed form, in groups that share an input.")
    data_free: tuple[Line, ...] = Field(description="Merged by their weight changes alone.")
    averaged: tuple[Line, ...] = Field(description="Averaged.")
    left_alone: tuple[Line, ...] = Field(description="Left as in the base.")


class Content(Table):
    """One kind of number in a round."""

    kind: Line = Field(description="The kind's short name.")
    meaning: Paragraph = Field(description="What these numbers are, in plain words.")
    numbers: Count = Field(description="How many of them each owner sent.")
    tensors: tuple[Line, ...] = Field(description="The names of the tensors that hold them.")


class Round(Table):
    """One secure sum: what the coordinator learned."""

    kind: Literal["scales", "contribution", "step", "check", "metrics"] = Field(description="What the sum was for.")
    method: Line | None = Field(description="The multi-round method that a step belongs to, else null.")
    step: int | None = Field(description="The step's number, from 1, else null.")
    split: Split | None = Field(description="The rows that metrics were measured on, else null.")
    title: Line = Field(description="The round's name for people.")
    owners: tuple[Line, ...] = Field(description="The owners whose numbers are in the total.")
    numbers: Count = Field(description="How many numbers each owner sent.")
    contents: tuple[Content, ...] = Field(description="What these numbers are.")
    destroyed: bool = Field(
        description="Whether the coordinator's program overwrote what its memory held of the total. What its disk held "
        "is deleted with the run."
    )


class Delivery(Table):
    """Something that the coordinator sent to every owner, in whole."""

    title: Line = Field(description="Its name for people.")
    digest: Digest = Field(description="SHA-256 of its bytes, in hexadecimal.")
    bytes: Count = Field(description="How large it was.")
    owners: tuple[Line, ...] = Field(description="The owners that received all of it.")


class SentCandidate(Delivery):
    """A merged candidate, which the owners evaluated."""

    kind: Literal["candidate"] = Field(default="candidate", description="What was sent.")
    method: Line = Field(description="The method that merged it.")
    candidate: Line = Field(description="The candidate's name.")
    split: Split = Field(description="The rows that it was evaluated on.")


class SentMergedStep(Delivery):
    """What a step of a multi-round method merged, on which the owners measured the next step."""

    kind: Literal["merged_step"] = Field(default="merged_step", description="What was sent.")
    method: Line = Field(description="The multi-round method.")
    step: Count = Field(description="The step that merged it; 0 before the first.")


class SentScales(Delivery):
    """The scales by which the owners divided their numbers before a round in 32 bits."""

    kind: Literal["scales"] = Field(default="scales", description="What was sent.")


class SentCorrection(Delivery):
    """What rounding took from the models that the owners verified next."""

    kind: Literal["correction"] = Field(default="correction", description="What was sent.")


Sent = Annotated[SentCandidate | SentMergedStep | SentScales | SentCorrection, Field(discriminator="kind")]


class OwnerCost(Table):
    """One owner's part in what a step cost. Not its time, which would tell how many rows it has."""

    messages: Count = Field(description="How many messages the owner was sent.")
    bytes_sent: Count = Field(description="Payload sent to the owner.")
    bytes_received: Count = Field(description="Payload received from the owner.")


class Step(Table):
    """What one step of the run cost."""

    title: Line = Field(description="The step's name for people.")
    phase: Line = Field(description="What it is grouped under in the plots of time and bytes.")
    seconds: Size = Field(description="From the first message to the last answer.")
    waited_seconds: Size = Field(description="How long the coordinator waited for owners.")
    bytes_sent: Count = Field(description="Payload sent to all owners.")
    bytes_received: Count = Field(description="Payload received from all owners.")
    by_owner: dict[Line, OwnerCost] = Field(description="By owner.")


class Digests(Table):
    """SHA-256 digests, in hexadecimal."""

    agreement: Digest = Field(description="The agreement.")
    base: Digest = Field(description="The base model's weights.")
    bundle: Digest = Field(description="The code that ran at the owners.")
    model: Digest = Field(description="The published model's weights.")


class Report(Table):
    """Everything that is known of one run."""

    report_version: Literal[5] = Field(default=REPORT_VERSION, description="The version of this form.")
    title: Line = Field(description="The agreement's title.")
    method: Line = Field(description="The method whose model is published.")
    methods: dict[Line, MethodDescription] = Field(description="By agreed method, simpler ones first, its description.")
    summation: Literal["masked", "plain"] = Field(description="Whether owners' vectors were masked before the sum.")
    verified: bool = Field(
        description="Whether all owners in the model verified, up to a tolerance, that it is the merge of what they "
        "contributed, and added up the metrics of all owners by themselves."
    )
    simulated: bool = Field(description="Whether all parties ran on one machine, in one pair of hands.")
    seconds: Size = Field(description="How long the run took.")
    owners: tuple[Line, ...] = Field(min_length=1, description="The owners whose numbers are in the merged model.")
    dropped_out: dict[Line, Line] = Field(description="By owner that dropped out, the step at which it did.")
    receipts: tuple[Line, ...] = Field(description="The owners that signed the published model's digest.")
    agreement: Agreed = Field(description="What was agreed.")
    base_parameters: Count = Field(description="How many numbers the base model has.")
    chosen: dict[Line, Choice] = Field(description="By method, the candidate that was evaluated on test rows.")
    evaluation: Evaluation = Field(description="How good the models are.")
    layers: tuple[Layer, ...] = Field(description="By Gram matrix of the published model.")
    changes: tuple[Change, ...] = Field(description="By Gram matrix, or by linear layer where there is none.")
    low_rank: LowRank | None = Field(description="What publishing an adapter lost; null if the model is whole.")
    tensors: Tensors = Field(description="What happened to each tensor.")
    notes: tuple[Paragraph, ...] = Field(description="What a reader should know about the solves.")
    advice: tuple[Paragraph, ...] = Field(description="What a reader might do differently next time.")
    disclosures: tuple[Paragraph, ...] = Field(description="What this run reveals in spite of its protection.")
    rounds: tuple[Round, ...] = Field(description="What the coordinator learned, in order.")
    sent: tuple[Sent, ...] = Field(description="What the owners received, in order.")
    steps: tuple[Step, ...] = Field(description="What each step cost, in order.")
    examples: Count | None = Field(description="Training rows of all owners together, if they were summed.")
    digests: Digests = Field(description="Digests of what went in and came out.")
    versions: dict[Line, Line] = Field(description="By library, the version that computed this.")

    @model_validator(mode="after")
    def _names_agree(self) -> "Report":
        """Readers look methods up by name, so every name that is used must be there."""
        known = set(self.methods)
        for where, names in (
            ("method", {self.method}),
            ("agreement.compare_with", set(self.agreement.compare_with)),
            ("chosen", set(self.chosen)),
            ("evaluation.sweep", set(self.evaluation.sweep)),
            ("evaluation.mean", set(self.evaluation.mean) - set(FIXED_MODELS)),
            ("sent", {each.method for each in self.sent if isinstance(each, (SentCandidate, SentMergedStep))}),
        ):
            if not names <= known:
                raise ValueError(f"{where} names a method that `methods` lacks")
        if not self.methods.keys().isdisjoint(FIXED_MODELS):
            raise ValueError("methods: a method has the name of a reference")
        if not {self.method, *self.evaluation.sweep} <= set(self.chosen):
            raise ValueError("chosen lacks a method that was published or swept")
        for method, trials in self.evaluation.sweep.items():
            if self.chosen[method].candidate not in {trial.candidate for trial in trials}:
                raise ValueError("chosen names a candidate that its sweep lacks")
        is_regression = self.agreement.task.problem_type == "regression"
        if is_regression and self.agreement.task.target_range is None:
            raise ValueError("agreement.task: a regression without target_range")
        self._check_sums()
        judged: list[Mapping[str, MeanMetrics | OwnerMetrics]]
        judged = [self.evaluation.mean, *self.evaluation.by_owner.values()]
        metrics = [each for models in judged for each in models.values()]
        tried = [trial for trials in self.evaluation.sweep.values() for trial in trials]
        if any((each.accuracy is None) != is_regression for each in (*metrics, *tried)) or any(
            (each.pearson_r is None) == is_regression for each in (*metrics, *tried)
        ):
            raise ValueError("evaluation: a regression has pearson_r, and every other task has accuracy")
        needed = {self.method, "own_at_home"}
        if not all(needed <= set(models) for models in judged):
            raise ValueError("evaluation lacks the published method or own_at_home")
        return self

    def _check_sums(self) -> None:
        """Readers take them apart by label or target, and compare models group by group."""
        published = self.evaluation.mean[self.method].groups
        for model, each in self.evaluation.mean.items():
            if model not in REFERENCES and each.groups.keys() != published.keys():
                raise ValueError("evaluation.mean: models are judged on other groups than the published one")
        task = self.agreement.task
        width = {"regression": 5, "multi_label_classification": 3}.get(task.problem_type, 0)
        for each in self.evaluation.mean.values():
            fits = width and len(each.sums) == len(task.labels) and all(len(row) == width for row in each.sums)
            if each.sums and not fits:
                raise ValueError("evaluation.mean: sums that are not those of the agreed labels or targets")
        cut, texts = self.evaluation.cut or (0, 0)
        if cut > texts:
            raise ValueError("evaluation.cut: more texts are cut than there are")


def save_report(report: Report, output: Path) -> None:
    """Write OUT/report.json whole or not at all. It is written last: where it stands, the run is complete."""
    partial = output / "report.json.partial"
    partial.write_text(as_json(report) + "\n")
    partial.replace(output / "report.json")


def read_report(output: Path) -> Report:
    """OUT/report.json. Raises SettingsError if it is missing, too large, malformed or of another version."""
    path = output / "report.json"
    if not path.is_file():
        step = last_step(output)
        raise SettingsError(
            f"{path}: no such file{f'; the last run here ended in the step {step!r}' if step else ''}",
            hint="run the merge again" if step else "name the output folder of a run that succeeded",
        )
    with path.open("rb") as file:
        content = file.read(MAX_REPORT_BYTES + 1)
    if len(content) > MAX_REPORT_BYTES:
        raise SettingsError(
            f"{path}: more than {MAX_REPORT_BYTES} bytes, the most that a report may have",
            hint="ask for the file again; no run writes one this large",
        )
    try:
        return Report.model_validate_json(content)
    except ValidationError as error:
        raise _as_settings_error(error, path) from None


def _as_settings_error(error: ValidationError, path: Path) -> SettingsError:
    """One line of plain characters: the file's words may be anybody's."""
    problems = error.errors(include_url=False)
    version = next((problem["input"] for problem in problems if problem["loc"] == ("report_version",)), None)
    if isinstance(version, int):
        return SettingsError(
            f"{path}: report_version is {version}, this release reads {REPORT_VERSION}",
            hint="read it with the release that wrote it, or run the merge again",
        )
    first = problems[0]
    place = ".".join(map(str, first["loc"]))[:MAX_QUOTED_CHARACTERS]
    reason = first["msg"] if first["type"] == "json_invalid" else reason_in_words(first)
    return SettingsError(
        f"{path}: " + ascii(f"{place}: {reason}" if place else reason)[1:-1][: 2 * MAX_QUOTED_CHARACTERS],
        hint="the file was changed after the run wrote it; get it again, or run the merge again",
    )


def holds_result_of(output: Path, agreement_digest: str) -> bool:
    """Whether everything that an agreement publishes is in `output`."""
    try:
        made_by = read_report(output).digests.agreement
    except SettingsError:
        return False
    return made_by == agreement_digest and not (output / CHECKPOINT).exists()


def schema_text() -> str:
    """The content of docs/report.schema.json."""
    return schema_of(Report, f"Amalgram's report.json, version {REPORT_VERSION}")


if __name__ == "__main__":
    print(schema_text(), end="")
