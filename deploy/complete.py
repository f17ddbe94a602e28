"""Complete a draft of an agreement against its base model: labels, digest, tensor roles, thresholds, bounds.

What is measured here is measured on the public base model with made-up inputs; no owner's row is needed or seen.
"""

from collections.abc import Mapping
from math import ceil, log2
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from client.fisher import measure_fisher
from client.gram import find_shared_inputs, layer_inputs
from client.row_readers import features, vision_config
from client.rows import Rows
from common.agreement import COORDINATOR, Agreement, AgreementDraft, CoordinatorEntry, Task, TensorRoles
from common.errors import ModelError, SettingsError
from common.merge_methods import contribution_layout, measurements
from common.metrics import metrics_layout
from common.models import (
    base_labels,
    digest_of,
    linear_layers,
    load_base,
    load_tokenizer,
    merge_plan,
    parameter_shapes,
    private_head,
)
from common.summation.fixed_point import check_layout

PROBE_EXAMPLES = 8
PROBE_TOKENS = 32  # of a text; longer ones are accounted for by the rule of three


def complete_agreement(draft: AgreementDraft, base_folder: Path, public_keys: Mapping[str, bytes]) -> Agreement:
    """The agreement that all parties then hold; `public_keys` by party name, the coordinator's among them.

    Raises ModelError if the base model cannot be used, SettingsError if a key is missing.
    """
    labels = draft.task.labels or (base_labels(base_folder) if draft.task.has_labels else ())
    task = draft.task.model_copy(update={"labels": labels})
    base = load_base(base_folder, task, draft.seed)
    _check_no_running_statistics(base, base_folder)
    probe = _probe(base, task, base_folder, draft.seed)
    roles = _tensor_roles(
        base, probe, base_folder, private_head(base, task), merge_token_inputs=draft.privacy.merge_token_inputs
    )
    with_keys = _with_keys(draft, public_keys)
    agreement = Agreement(
        **{
            **dict(with_keys),
            "task": task,
            "min_owners": draft.needed_owners,
            "summation": draft.summation.model_copy(update={"colluders": draft.colluders, "quorum": draft.quorum}),
            "bounds": draft.bounds.model_copy(update=_measured_bounds(draft, task, base, probe, roles)),
        },
        base_digest=digest_of(base, task),
        tensors=roles,
    )
    for layout in (
        contribution_layout(agreement, merge_plan(base, roles)),
        metrics_layout(agreement, "test", ["base"]),
    ):
        check_layout(layout, len(agreement.owners))
    return agreement


def _with_keys(draft: AgreementDraft, public_keys: Mapping[str, bytes]) -> AgreementDraft:
    for name in (*draft.owner_names, COORDINATOR):
        if name not in public_keys:
            raise SettingsError(f"no public key of {name}; ask for its .pub file (`amalgram keys new {name}` makes it)")
    for name in public_keys:
        if name not in (*draft.owner_names, COORDINATOR):
            raise SettingsError(f"a public key of {name}, who is not on the roster: {', '.join(draft.owner_names)}")
    owners = tuple(owner.model_copy(update={"public_key": public_keys[owner.name].hex()}) for owner in draft.owners)
    coordinator = CoordinatorEntry(public_key=public_keys[COORDINATOR].hex())
    return draft.model_copy(update={"owners": owners, "coordinator": coordinator})


def _check_no_running_statistics(base: PreTrainedModel, folder: Path) -> None:
    parameters = parameter_shapes(base)
    for name, tensor in base.state_dict(keep_vars=True).items():
        if name not in parameters and not isinstance(tensor, torch.nn.Parameter) and tensor.is_floating_point():
            raise ModelError(
                f"model {folder}: {name} is a running statistic (as of batch normalisation), which cannot be merged yet"
            )


def _tensor_roles(
    base: PreTrainedModel, probe: Rows, folder: Path, left_alone: tuple[str, ...], *, merge_token_inputs: bool
) -> TensorRoles:
    try:
        ((_, batch, _),) = probe.take(np.arange(2)).batches(batch_size=2)
        merged = find_shared_inputs(base, batch)
        told_apart = frozenset() if merge_token_inputs else _token_inputs(base, batch)
    except (ValueError, RuntimeError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"model {folder}: a trial forward pass failed: {str(error).splitlines()[0]}") from None
    kept = tuple(group for group in merged if not (told_apart | set(left_alone)) & set(group))
    elsewhere = {weight for group in kept for weight in group} | set(left_alone)
    averaged = tuple(name for name in parameter_shapes(base) if name not in elsewhere)
    return TensorRoles(merged=kept, averaged=averaged, left_alone=left_alone)


def _token_inputs(base: PreTrainedModel, batch: Mapping[str, Tensor]) -> frozenset[str]:
    """Weights whose input rows depend on the token and its place alone, not on its neighbours.

    The Gram of such rows is a linear system in how often each token stands at each place: everybody's counts come out
    of the sum. So for the first block's attention. Seen by changing every other token: the rest must not notice.
    """
    if "input_ids" not in batch:
        return frozenset()
    tokens = {
        name: batch[name][:1, : int(batch[mask][0].sum())]  # (1, length), no padding
        for name, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask"))
        if name in batch
    }
    changed = {name: _every_other_changed(ids, base) for name, ids in tokens.items()}
    before, after = (_layer_inputs(base, inputs) for inputs in (tokens, changed))
    shapes = {ids.shape for ids in tokens.values()}
    return frozenset(
        f"{name}.weight"
        for name, rows in before.items()
        if rows.shape[:2] in shapes and torch.allclose(rows[:, ::2], after[name][:, ::2], atol=1e-6, rtol=1e-5)
    )


def _every_other_changed(tokens: Tensor, base: PreTrainedModel) -> Tensor:
    vocabulary, padding = base.get_input_embeddings().num_embeddings, base.config.pad_token_id
    other = (tokens + 1) % vocabulary
    other = torch.where(other == (-1 if padding is None else padding), (tokens + 2) % vocabulary, other)
    changed = tokens.clone()
    changed[:, 1::2] = other[:, 1::2]
    return changed


def _layer_inputs(base: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first input of every linear layer."""
    seen: dict[str, Tensor] = {}
    modules = linear_layers(base)
    with layer_inputs(modules, lambda name, tensor: seen.setdefault(name, tensor)), torch.inference_mode():  # type: ignore[arg-type]
        base(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]))
    return seen


def _probe(base: PreTrainedModel, task: Task, folder: Path, seed: int) -> Rows:
    """Made-up examples that reach the layers: random tokens, or noise."""
    random = np.random.default_rng(seed)
    single = np.zeros(PROBE_EXAMPLES, dtype=np.int64)
    if not task.is_text:
        config = vision_config(base)
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (PROBE_EXAMPLES, config.num_channels, height, width)
        return Rows(features=random.standard_normal(shape).astype(np.float32), targets=single)
    tokenizer = load_tokenizer(folder)
    length = min(PROBE_TOKENS, task.max_tokens)
    tokens = random.integers(0, len(tokenizer), (PROBE_EXAMPLES, length)).tolist()
    encoded = tokenizer(tokenizer.batch_decode(tokens), truncation=True, max_length=length)
    rows = features(encoded)
    if task.kind == "sequence-to-sequence":
        start = base.config.decoder_start_token_id
        rows = tuple(row | {"decoder_input_ids": [start, *row["input_ids"][:-1]]} for row in rows)
    every = tuple(np.zeros(len(row["input_ids"]), dtype=np.int64) for row in rows)
    return Rows(features=rows, targets=every if task.judges_tokens else single, tokenizer=tokenizer)


def _measured_bounds(
    draft: AgreementDraft, task: Task, base: PreTrainedModel, probe: Rows, roles: TensorRoles
) -> dict[str, tuple[float, ...]]:
    headroom = draft.bounds.headroom
    if task.is_text:
        headroom *= max(1.0, task.max_tokens / PROBE_TOKENS)
    plan = merge_plan(base, roles)
    largest = dict.fromkeys((shared.name for shared in plan.inputs), 0.0)

    def observe(name: str, tensor: Tensor) -> None:
        rows = tensor.reshape(len(tensor), -1, tensor.shape[-1]).float()  # (examples, rows, d_in)
        largest[name] = max(largest[name], float(rows.shape[1] * rows.abs().max() ** 2))

    modules = {name: module for name, module in linear_layers(base).items() if name in largest}
    with layer_inputs(modules, observe), torch.inference_mode():
        for _, batch, _ in probe.batches(batch_size=PROBE_EXAMPLES):
            base(**batch)
    fisher: tuple[float, ...] = ()
    if "fisher" in measurements(draft):
        squares = measure_fisher(base, probe, draft.seed)
        highest = {name: float(squares[name].max()) for name in plan.changed}
        everywhere = max(highest.values())  # for a tensor that the probe did not reach
        fisher = tuple(_power_of_two(headroom * (highest[name] or everywhere)) for name in plan.changed)
    return {"grams": tuple(_power_of_two(headroom * value) for value in largest.values()), "fisher": fisher}


def _power_of_two(value: float) -> float:
    """The next power of two: easy to read, and the same on a machine that rounds otherwise."""
    return 2.0 ** ceil(log2(value)) if value > 0 else 1.0
