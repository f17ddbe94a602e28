"""What a model gives away about one owner's rows, measured by that owner alone: nothing is sent, nothing is written.

Three models are attacked: the base, which cannot know the rows (the lower bound); the owner's own model, which nobody
else has (the upper bound); and the one that the owner asks about, such as the published merge. If the owner says that
this one has another base, that base is the fourth.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from math import log2
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from client.audit.result import (
    Attack,
    AttackName,
    Audit,
    AuditedModel,
    AuditedRows,
    Canaries,
    Fit,
    ModelName,
    Selection,
)
from client.audit.rows import ComparedRows, compared_rows, differences, keys_of
from client.audit.scores import (
    ClassifierGradients,
    Predictions,
    classifier_gradients,
    gradient_scores,
    losses_by_label,
    predict,
)
from client.audit.selection import how_many, judge, select_greedily
from client.audit.statistics import Scores, attack, exposures, mean_exposure_by_chance
from client.audit.subjects import Origin, Subject
from client.audit.verdict import TITLES
from client.audit.weights import lineage, moved_tokens
from client.data.canaries import random_rows
from client.data.rows import Rows
from client.holdings import Holdings, give_head
from client.measurement.evaluation import predict_logits
from common.identity import fingerprint
from common.models.loading import digest_of

REFERENCES = 1023  # random rows that each canary is ranked among: an exposure of 10 bits at most
LIBRARIES = ("amalgram", "torch", "transformers", "numpy", "scipy", "scikit-learn")


def audit(holdings: Holdings, own: Subject, model: Subject | None, candidates: Path | None, most_rows: int) -> Audit:
    """Audit the owner's `own` model, `model`, and what they were made from, on at most `most_rows` members and as many
    strangers.

    `candidates`: texts among which an attacker looks for the owner's rows. Raises DataError if there are too few rows.
    """
    subjects: dict[ModelName, Subject] = {"own": own}
    if model is not None:
        subjects["model"] = model
    origins = list(dict.fromkeys(each.origin for each in subjects.values()))
    read = compared_rows(holdings, [origin.view for origin in origins], most_rows)
    models: list[AuditedModel] = []
    for origin, rows in zip(origins, read, strict=True):
        is_own = origin is own.origin
        auditor = _Auditor(
            holdings=holdings, origin=origin, rows=rows, own=own.model if is_own else None, candidates=candidates
        )
        if origin.base is not None:
            models.append(auditor.audit_base("base" if is_own else "model_base"))
        models += [auditor.audit_model(name, each.model) for name, each in subjects.items() if each.origin is origin]
    rows, *_ = read
    return Audit(
        owner=holdings.name,
        agreement=fingerprint(bytes.fromhex(holdings.agreement.digest())),
        task=holdings.task.kind,
        rows=AuditedRows(
            members=len(rows.members),
            strangers=len(rows.strangers),
            in_both=rows.in_both,
            unknown=rows.unknown,
            not_judged=rows.not_judged,
            has_validation=rows.has_validation,
            made_here=holdings.settings.training is not None,
        ),
        models=tuple(models),
        warnings=(*differences(rows), *(() if model is None else model.warnings)),
        versions={"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Auditor:
    """Attacks the models of one origin, one after the other, on the same rows. What their base says is measured once.

    `own`: the owner's own model; None if it has another origin.
    """

    holdings: Holdings
    origin: Origin
    rows: ComparedRows
    own: PreTrainedModel | None
    candidates: Path | None

    def audit_base(self, name: ModelName) -> AuditedModel:
        found = self._of_base
        return self._audited(name, self._base, found, self._attack("loss", -found.losses))

    def audit_model(self, name: ModelName, model: PreTrainedModel) -> AuditedModel:
        if self.own is not None:
            give_head(self.own, model, self.origin.task)
        found = predict(model, self._both, self._batch_size, f"{TITLES[name]}: losses")
        audited = self._audited(name, model, found, self._attack("loss", -found.losses))
        if self.origin.base is None:
            return audited
        base = self._base
        weights, start = (dict(each.named_parameters()) for each in (model, base))
        delta = {each: (weights[each] - start[each]).detach() for each in start}  # whole, because the base is moved
        attacks = [*audited.attacks, self._attack("calibrated_loss", self._of_base.losses - found.losses)]
        if self._gradients is not None and self._gradients.layer.take(delta).any():
            attacks.append(self._attack("classifier_gradient", self._gradients.scores(delta)))
        told = f"{TITLES[name]}: gradients"
        along = gradient_scores(base, delta, self._both, self._batch_size, told, self._of_base.losses)
        attacks.append(self._attack("gradient", along))
        others = None if name == "own" else self.own
        return audited.model_copy(
            update={
                "attacks": tuple(attacks),
                "embeddings": moved_tokens(model, base, others, self.rows.all_members),
                "lineage": lineage(weights, start),
                "selection": self._selection(model, delta),
            }
        )

    def _audited(self, name: ModelName, model: PreTrainedModel, found: Predictions, by_loss: Attack) -> AuditedModel:
        """What shows without comparing a model with its base."""
        return AuditedModel(
            name=name,
            digest=digest_of(model, self.origin.task),
            fit=self._fit(found),
            attacks=(by_loss,),
            canaries=self._canaries(model),
            embeddings=None,
            lineage=None,
            selection=None,
        )

    # --- what is measured once ---

    @cached_property
    def _both(self) -> Rows:
        return self.rows.both

    @cached_property
    def _base(self) -> PreTrainedModel:
        base = self.origin.base
        assert base is not None  # a model without one is not compared
        if self.own is not None:
            give_head(self.own, base, self.origin.task)
        return base

    @cached_property
    def _of_base(self) -> Predictions:
        if self._gradients is not None:
            return self._gradients.said
        return predict(self._base, self._both, self._batch_size, "the base: losses")

    @cached_property
    def _gradients(self) -> ClassifierGradients | None:
        targets = self._both.targets
        if not isinstance(targets, np.ndarray):
            return None
        return self._classifier_gradients(
            self._both, np.asarray(targets, np.int64), "the base: losses, the classifier's gradients"
        )

    @cached_property
    def _planted(self) -> Rows | None:
        """The owner's canaries. What was not made from the base of the own model cannot have been trained on them."""
        return None if self.own is None else self.holdings.canaries()

    @cached_property
    def _references(self) -> Rows:
        """Rows like the canaries that no training saw."""
        random = np.random.default_rng([self.holdings.agreement.seed, REFERENCES])
        return random_rows(random, REFERENCES, self.rows.all_members, self.origin.task)

    # --- one model's part ---

    def _attack(self, name: AttackName, scores: Scores) -> Attack:
        count = len(self.rows.members)
        return attack(name, scores[:count], scores[count:], self.holdings.agreement.seed)

    def _fit(self, found: Predictions) -> Fit:
        count = len(self.rows.members)
        return Fit(
            loss_members=float(found.losses[:count].mean()),
            loss_strangers=float(found.losses[count:].mean()),
            accuracy_members=float(found.hits[:count].mean()),
            accuracy_strangers=float(found.hits[count:].mean()),
        )

    def _canaries(self, model: PreTrainedModel) -> Canaries | None:
        planted = self._planted
        if planted is None:
            return None
        losses = predict(model, planted, self._batch_size, "canaries").losses
        if isinstance(planted.targets, np.ndarray):
            # A model likes some labels better than others, so a canary is ranked among rows with its own label.
            by_label = losses_by_label(model, self._references, self._batch_size, "rows like the canaries")
            references = by_label[:, planted.targets].T  # (canaries, references)
        else:
            of_all = predict(model, self._references, self._batch_size, "rows like the canaries").losses
            references = np.broadcast_to(of_all, (len(planted), REFERENCES))
        exposed = exposures(losses, references)
        return Canaries(
            planted=len(planted),
            references=REFERENCES,
            mean_exposure=float(exposed.mean()),
            by_chance=mean_exposure_by_chance(REFERENCES),
            highest=log2(REFERENCES + 1),
            fully_exposed=int((losses < references.min(axis=1)).sum()),
        )

    def _selection(self, model: PreTrainedModel, delta: Mapping[str, Tensor]) -> Selection | None:
        """What an attacker that has the base and this model picks from the candidates, with labels as it predicts."""
        if self.candidates is None:
            return None
        candidates = self.origin.view.data.candidates(self.candidates)
        gradients, count = None, how_many(len(candidates))
        if isinstance(candidates.targets, np.ndarray):
            guessed = predict_logits(model, candidates, self._batch_size).argmax(axis=1)
            candidates = replace(candidates, targets=guessed)
            gradients = self._classifier_gradients(candidates, guessed, "candidates: the classifier's gradients")
        if gradients is not None and gradients.layer.take(delta).any():
            by: Literal["greedy", "highest"] = "greedy"
            selected = select_greedily(gradients, delta, count)
        else:
            by = "highest"
            scores = gradient_scores(self._base, delta, candidates, self._batch_size, "candidates: gradients")
            selected = np.argsort(-scores, kind="stable")[:count]
        members, strangers = (set(keys_of(each)) for each in (self.rows.all_members, self.rows.all_strangers))
        return judge(selected, keys_of(candidates), members, strangers, by)

    def _classifier_gradients(
        self, rows: Rows, targets: NDArray[np.int64], description: str
    ) -> ClassifierGradients | None:
        return classifier_gradients(self._base, rows, targets, self.origin.task, self._batch_size, description)

    @property
    def _batch_size(self) -> int:
        return self.holdings.settings.batch_size
