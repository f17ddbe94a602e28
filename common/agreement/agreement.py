"""The agreement: the one file that all parties hold identically.

People write a draft (`agreement.toml`). Against the base model it is completed to an `Agreement`, whose digest is what
an owner consents to. Everything that the published model or its privacy rests on is in here and nowhere else; none of
it is ever taken from a message.
"""

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from common.agreement.rules import RULES
from common.agreement.tables import CoordinatorEntry, DraftTables
from common.errors import RuleError, SettingsError
from common.merge_methods.distill import DISTILL
from common.merge_methods.terms import GramNoise, MergeBounds, MergeSettings
from common.models.manifest import Manifest
from common.models.plan import MergePlan, PlannedTensors
from common.privacy.legs import own_noise, refit_noise
from common.settings_file import Digest, parse_settings, parse_toml, read_bytes

CANONICAL_LABEL = b"amalgram agreement v4\n"


class AgreementDraft(DraftTables):
    """What people write, checked against every rule."""

    @model_validator(mode="after")
    def _follows_the_rules(self) -> "AgreementDraft":
        for rule in RULES:
            rule(self)
        return self


class Agreement(AgreementDraft):
    """A draft completed against its base model: nothing is left open."""

    base_digest: Digest  # of its weights, as loaded
    base_files: Annotated[Manifest, Field(max_length=100)]  # what decides how rows are read
    bundle_digest: Digest  # of the code that runs at the owners, as Flower bundles it
    tensors: PlannedTensors
    coordinator: CoordinatorEntry

    @model_validator(mode="after")
    def _is_complete(self) -> "Agreement":
        for owner in self.owners:
            if owner.public_key is None:
                raise RuleError(
                    f"owners: {owner.name} has no public_key",
                    hint="`amalgram draft` adds it from the owner's .pub file",
                )
        if None in (self.min_owners, self.summation.colluders, self.summation.quorum):
            raise RuleError("an agreement must state min_owners, summation.colluders and summation.quorum")
        if self.task.has_labels and len(self.task.labels) < 2 and not self.task.is_regression:
            raise RuleError(f"task.labels = {list(self.task.labels)}: at least two labels are needed")
        if self.task.is_regression and not self.task.labels:
            raise RuleError("task.labels = []: the targets need names")
        if self.privacy.epsilon is not None and "refit" in self.budget_shares and self.bounds.features is None:
            raise RuleError(  # check: noised-refits-know-their-length
                "bounds.features is missing: by how much one row moves a refit depends on it",
                hint="complete the draft again: amalgram draft",
            )
        if self.has_noised_grams and len(self.bounds.gram_norms) != len(self.bounds.grams):
            raise RuleError(  # check: noised-grams-know-their-norms
                f"bounds.gram_norms has {len(self.bounds.gram_norms)} values, and bounds.grams has "
                f"{len(self.bounds.grams)}: by how much one example moves a Gram depends on it",
                hint="complete the draft again: amalgram draft",
            )
        if DISTILL.name in self.methods and None in (DISTILL.of(self.tables).pool_sha256, DISTILL.of(self.tables).rows):
            raise RuleError(
                "distill.pool_sha256 and distill.rows: an agreement must state them", hint="`amalgram draft` adds them"
            )
        if DISTILL.name in self.methods and not self.task.has_labels and DISTILL.of(self.tables).vocabulary is None:
            raise RuleError("distill.vocabulary: an agreement must state it", hint="`amalgram draft` adds it")
        names = list(self.tensors_by_name())
        if len(set(names)) != len(names):
            raise RuleError("tensors: duplicate parameter name")
        return self

    def tensors_by_name(self) -> Iterator[str]:
        for group in self.tensors.merged:
            yield from group
        yield from self.tensors.data_free
        yield from self.tensors.averaged
        yield from self.tensors.left_alone

    def merge_settings(self, plan: MergePlan) -> MergeSettings:
        """What this agreement says to a merge method. Raises SettingsError if the bounds belong to another plan."""
        if len(self.bounds.grams) != len(plan.inputs):
            raise SettingsError(
                f"agreement: bounds.grams has {len(self.bounds.grams)} values, but the base model's tensors make "
                f"{len(plan.inputs)} Grams",
                hint="complete the draft again: amalgram draft",
            )
        grams = {shared.name: bound for shared, bound in zip(plan.inputs, self.bounds.grams, strict=True)}
        fisher = dict(zip(plan.changed, self.bounds.fisher, strict=False))
        changes = self.bounds.changes
        if len(changes) != (len(plan.changed) if self.bounds.change is not None else 0):  # check: changes-have-bounds
            raise SettingsError(
                f"agreement: bounds.changes has {len(changes)} values, one is needed for each of the "
                f"{len(plan.changed)} changed tensors if bounds.change is set",
                hint="complete the draft again: amalgram draft",
            )
        bounds = MergeBounds(
            examples=self.bounds.examples,
            delta=self.bounds.delta,
            grams=grams,
            fisher=fisher,
            changes=dict(zip(plan.changed, changes, strict=False)),
        )
        return MergeSettings(
            plan=plan,
            weighting=self.weighting,
            bounds=bounds,
            tables=self.tables,
            has_floors=self.verification.required is not False,
            num_owners=len(self.owners) - len(self.without_weights),
            ring_bits=self.summation.ring_bits,
            problem_type=self.task.problem_type,
            largest_target=max(map(abs, self.task.target_range or (1.0, 1.0))),
            refit_noise=refit_noise(self),
            gram_noise=self._gram_noise(plan),
            num_labels=max(1, len(self.task.labels)),
            unknown_labels=self.unknown_labels,
            without_weights=self.without_weights,
        )

    def _gram_noise(self, plan: MergePlan) -> GramNoise | None:
        if not self.has_noised_grams:
            return None
        norms = {shared.name: norm for shared, norm in zip(plan.inputs, self.bounds.gram_norms, strict=True)}
        return GramNoise(norms=norms, multiplier=own_noise(self, "grams"), owners=self.needed_owners)

    def canonical_bytes(self) -> bytes:
        """The same bytes at every party: labelled, sorted keys, shortest floats, UTF-8."""
        fields = self.model_dump(mode="json")
        return (
            CANONICAL_LABEL
            + json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
        )

    def digest(self) -> str:
        """SHA-256 of the canonical bytes, in hexadecimal."""
        return self.digest_once

    @cached_property  # an owner asks for it several times a message, and it takes as long as there are owners
    def digest_once(self) -> str:
        return hashlib.sha256(self.canonical_bytes()).hexdigest()


def load_agreement(path: Path) -> Agreement:
    """Read an agreement from its file. Raises SettingsError, also for a draft."""
    return _parsed(read_bytes(path), str(path))


@lru_cache(maxsize=16)  # an owner reads it for every message, and a simulation plays all owners in one process
def _parsed(content: bytes, where: str) -> Agreement:
    tables = parse_toml(content, where)
    if "base_digest" not in tables and "owners" in tables:
        raise SettingsError(
            f"{where}: base_digest is missing: this is a draft",
            hint="complete it: amalgram draft, then name the file that it wrote; after a simulation, use the owner's "
            "settings in OUTPUT/parties",
        )
    return parse_settings(tables, Agreement, where)
