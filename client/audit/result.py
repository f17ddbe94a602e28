"""`audit.json`: what an audit measured. The page and the screen need nothing else.

Its JSON schema, with every description below, is docs/audit.schema.json:

    python -m client.audit.result > docs/audit.schema.json

It holds counts, shares and means over many rows: no text, no token, no label, and no number of a single row.
"""

from typing import Annotated, Literal

from pydantic import Field

from common.agreement.tables import TaskKind
from common.page.table import Share, Size, Table, schema_of
from common.settings_file import Count, Digest, Line, Paragraph

AUDIT_VERSION: Literal[1] = 1
FEWEST_STRANGERS = 100  # 1 % of fewer is none of them

AttackName = Literal["loss", "calibrated_loss", "classifier_gradient", "gradient"]
ModelName = Literal["base", "own", "model_base", "model"]
Exposure = Annotated[float, Field(ge=-1)]


class Interval(Table):
    """A number with its 95 % bootstrap interval."""

    value: Share = Field(description="The number, from all rows of the audit.")
    low: Share = Field(description="The lower end of the interval.")
    high: Share = Field(description="The upper end of the interval.")


class Attack(Table):
    """One way to tell members from strangers."""

    name: AttackName = Field(description="What each row is scored by.")
    area: Interval = Field(
        description="Area under the curve: how often a member's score is above a stranger's. A tie counts half."
    )
    true_positives: Interval | None = Field(
        description="The share of members that are found while at most 1 % of the strangers are taken for members; "
        "null with fewer than 100 strangers, 1 % of whom is nobody."
    )
    beats_guessing: bool = Field(description="Whether the area's 99 % bootstrap interval is above 1/2.")
    curve: tuple[Share, ...] = Field(
        description="The share of members found at false-positive rates of at most 0, 0.01, 0.02, ... 1."
    )


class Fit(Table):
    """How well a model does on members and strangers: a gap is what loss-based attacks live on."""

    loss_members: Size = Field(description="Mean cross entropy of a training row, in nats.")
    loss_strangers: Size = Field(description="Mean cross entropy of a stranger, in nats.")
    accuracy_members: Share = Field(description="Mean share of right predictions on a training row.")
    accuracy_strangers: Share = Field(description="Mean share of right predictions on a stranger.")


class Canaries(Table):
    """How exposed the planted rows are (Carlini et al., arXiv 1802.08232)."""

    planted: Count = Field(description="How many random rows `[training] canaries` planted.")
    references: Count = Field(description="How many random rows that were never planted each is ranked among.")
    mean_exposure: Exposure = Field(description="Mean exposure, in bits.")
    by_chance: Exposure = Field(description="What rows that were never planted have in the mean, in bits.")
    highest: Exposure = Field(description="The highest that can be measured, in bits.")
    fully_exposed: Count = Field(description="How many canaries have a lower loss than all of their references.")


class Embeddings(Table):
    """Which rows of the token embedding moved away from the base's, beyond weight decay."""

    vocabulary: Count = Field(description="How many tokens there are.")
    moved: Count = Field(description="How many tokens' embeddings moved.")
    yours: Count = Field(description="How many different tokens the owner's training rows hold.")
    moved_of_yours: Count = Field(description="How many of these moved.")
    yours_alone: Count | None = Field(
        description="How many moved exactly in the direction of the owner's own model, so that no other owner can have "
        "moved them; null for the owner's own model, and for one of another base."
    )


class Lineage(Table):
    """How much of the weights is the base's (compare arXiv 2207.09539)."""

    weights: Count = Field(description="How many weights there are.")
    unchanged: Share = Field(description="The share that is bit-identical to the base's.")
    same_exponent: Share = Field(description="The share with the base's sign and exponent.")
    bits_per_weight: Size = Field(description="Bits to code a weight if the base is known; 32 if it is not.")


class Selection(Table):
    """What an attacker picks from a file of candidate texts, as SELECT does (arXiv 2506.15553)."""

    candidates: Count = Field(description="How many candidate texts there are.")
    selected: Count = Field(description="How many the attacker picks.")
    members_among_candidates: Count = Field(description="How many candidates are training rows of the owner.")
    strangers_among_candidates: Count = Field(description="How many are test or validation rows of the owner.")
    members: Count = Field(description="How many picked ones are training rows of the owner.")
    strangers: Count = Field(description="How many picked ones are test or validation rows of the owner.")
    chance: Size = Field(description="How many training rows a blind choice has in the mean.")
    p_value: Share = Field(description="How often a blind choice has at least this many training rows.")
    by: Literal["greedy", "highest"] = Field(
        description="greedy: by the classifier's gradients, one after the other; highest: by the gradient score."
    )


class AuditedModel(Table):
    """One model that an attacker could have."""

    name: ModelName = Field(
        description="base: the lower bound; own: the upper bound; model: the one that was named; model_base: what that "
        "one was made from, if it has another base."
    )
    digest: Digest = Field(description="SHA-256 of its weights, as an agreement or a report gives it.")
    fit: Fit = Field(description="How well it fits members and strangers.")
    attacks: tuple[Attack, ...] = Field(min_length=1, description="By score.")
    canaries: Canaries | None = Field(
        description="Null unless the owner's training plants canaries, and for a model that was not made from its base."
    )
    embeddings: Embeddings | None = Field(
        description="Null for a base, without a known base, and without an embedding of tokens alone."
    )
    lineage: Lineage | None = Field(description="Null for a base, and without a known base.")
    selection: Selection | None = Field(
        description="Null without a file of candidates, for a base, and without a known base."
    )

    def attack(self, name: AttackName) -> Attack | None:
        """The attack of this name, if it was made."""
        return next((attack for attack in self.attacks if attack.name == name), None)

    @property
    def strongest(self) -> Attack:
        """The attack with the largest area."""
        return max(self.attacks, key=lambda attack: attack.area.value)


class AuditedRows(Table):
    """The rows that were compared."""

    members: Count = Field(description="Training rows.")
    strangers: Count = Field(description="Rows of the same source that no training saw.")
    in_both: Count = Field(description="Training rows left out because a stranger reads the same.")
    unknown: Count = Field(
        description="Rows left out because they are set aside for validation here, and a model that was trained "
        "elsewhere may have been trained on them."
    )
    not_judged: Count = Field(
        description="Rows left out because nothing is predicted on them, or because a model lacks their label."
    )
    has_validation: bool = Field(description="Whether validation rows are among the strangers, beside test rows.")
    made_here: bool = Field(
        description="Whether the owner's model is made from these training rows by its settings. If not, the audit "
        "takes the owner's word that they are what it was trained on."
    )


class Audit(Table):
    """Everything that one audit found."""

    audit_version: Literal[1] = Field(default=AUDIT_VERSION, description="The version of this form.")
    owner: Line = Field(description="The owner whose rows these are.")
    agreement: Line = Field(description="The fingerprint of the agreement whose base and task were used.")
    task: TaskKind = Field(description="What the models do.")
    rows: AuditedRows = Field(description="The rows that were compared.")
    models: tuple[AuditedModel, ...] = Field(
        min_length=2, description="base, own, and the model that was named, after its own base."
    )
    warnings: tuple[Paragraph, ...] = Field(description="What may make a number say something else than membership.")
    versions: dict[Line, Line] = Field(description="By library, the version that computed this.")

    def model(self, name: ModelName) -> AuditedModel | None:
        """The audited model of this name; None if none was named."""
        return next((model for model in self.models if model.name == name), None)


def schema_text() -> str:
    """The content of docs/audit.schema.json."""
    return schema_of(Audit, f"Amalgram's audit.json, version {AUDIT_VERSION}")


if __name__ == "__main__":
    print(schema_text(), end="")
