"""Complete a draft of an agreement against its base model: labels, digest, merge plan, thresholds, bounds.

Everything is measured on the public base model with made-up inputs. No owner's data is needed or seen.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from math import ceil, hypot, inf, log2, sqrt
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from client.data.readers import features
from client.data.rows import Batch, Rows
from client.measurement.blocks import check_blocks
from client.measurement.fisher import measure_fisher
from client.measurement.gram import BatchTokens, LayerInput, find_shared_inputs, layer_inputs, measure_grams
from common.agreement import Agreement, AgreementDraft, Task
from common.errors import ModelError, SettingsError, first_line
from common.merge_methods import METHODS, contribution_layout, measurements
from common.merge_methods.method import Measurement, Method
from common.merge_methods.refit import classifier
from common.merge_methods.regmean import REGMEAN
from common.merge_methods.terms import Hyperparameters
from common.metrics import metrics_layout
from common.models.adapter import ANOTHER_BASE, changed_parameters
from common.models.folders import hub_revision, image_shape, load_tokenizer
from common.models.layers import Layer, block_names, layer_biases, merge_layers, parameter_of
from common.models.loading import agreed_plan, digest_of, load_base, load_outline, private_head
from common.models.manifest import manifest_of
from common.models.parameters import parameter_shapes
from common.models.plan import MergePlan, PlannedTensors, merge_plan
from common.schedule import schedule_of
from common.summation.fixed_point import check_layout
from deploy.drafting import with_keys, with_labels
from deploy.launch.flower import bundle_digest

PROBE_EXAMPLES = 8
TOKENS = ("input_ids", "decoder_input_ids")
log = logging.getLogger("amalgram.draft")
FULL_MEASURE = 4  # examples that are to be measured for each that the smallest owner may have
PROBE_TOKENS = 32  # the length of made-up texts; bounds are scaled up in proportion for longer texts


def complete_agreement(
    draft: AgreementDraft,
    base_folder: Path,
    public_keys: Mapping[str, bytes],
    node_keys: Mapping[str, str] | None = None,
) -> Agreement:
    """The agreement that all parties will hold.

    `public_keys`: by party name, including the coordinator. `node_keys`: those of the owners' machines, which a
    simulation does not have. Raises ModelError if the base model cannot be used, SettingsError if a key is missing.
    """
    if draft.base_revision is not None and hub_revision(base_folder) is None:
        raise SettingsError(
            f"base_revision: names a commit on the hub, but the base is the folder {base_folder}",
            hint="leave base_revision out; or move that folder, so that the base is fetched from the hub",
        )
    draft = with_labels(draft, base_folder, models={})
    task = draft.task
    base = load_base(base_folder, task, draft.seed)
    _check_no_running_statistics(base, base_folder)
    probe = _probe(base, task, base_folder, draft.seed)
    if any(METHODS[name].needs_blocks for name in draft.methods):
        check_blocks(base, block_names(base), next(probe.batches(batch_size=2))[1])
    left_alone = (*private_head(base, task), *_not_named(draft.merge.layers, base))
    tensors = _planned_tensors(base, probe, base_folder, tuple(dict.fromkeys(left_alone)), draft)
    for name in draft.methods:
        if METHODS[name].needs_classifier:
            _check_classifier(base, draft, probe, tensors, METHODS[name])
    draft = with_keys(draft, public_keys, node_keys or {})
    agreement = Agreement(
        **{
            **dict(draft),
            "task": task,
            "base_revision": draft.base_revision or hub_revision(base_folder),
            "min_owners": draft.needed_owners,
            "summation": draft.summation.model_copy(update={"colluders": draft.colluders, "quorum": draft.quorum}),
            "evaluation": draft.evaluation.model_copy(update={"choose_by": draft.choose_by}),
            "bounds": draft.bounds.model_copy(update=_measured_bounds(draft, task, base, probe, tensors)),
        },
        base_digest=digest_of(base, task),
        base_files=manifest_of(base_folder),
        bundle_digest=bundle_digest(),
        tensors=tensors,
    )
    plan = agreed_plan(base, base_folder, agreement)
    _check_rank(plan)
    schedule = schedule_of(agreement, plan)  # raises for one that cannot be run
    if schedule.has_grams and tensors.data_free:
        log.info("no Gram matrix, merged from weight changes alone: %s", tensors.data_free_in_short)
    for layout in (
        contribution_layout(agreement.methods, agreement.merge_settings(plan)),
        metrics_layout(agreement, "test", ["base"]),
    ):
        check_layout(layout, len(agreement.owners))
    return agreement


def check_adapters(draft: AgreementDraft, base_folder: Path, adapters: Sequence[tuple[str, Path]]) -> None:
    """Raise ModelError for an adapter that changes a parameter which the base lacks. `adapters`: who brings which.

    Otherwise merge.layers = ["adapter"] would name parameters that nobody wrote.
    """
    known = load_outline(base_folder, draft.task).state_dict() if adapters else {}  # shared weights by all names
    for who, folder in adapters:
        others = [name for name in changed_parameters(folder) if name not in known]
        if others:
            raise ModelError(
                f"{who}: adapter {folder} changes {others[0]} ({len(others)} such in all), which the base "
                f"{base_folder} does not have",
                hint=ANOTHER_BASE,
            )


def _check_rank(plan: MergePlan) -> None:
    """Raise SettingsError for a published adapter of a higher rank than any layer can have."""
    if plan.adapter is None:
        return
    most = max((min(plan.shapes[name]) for name in plan.adapter.layers), default=plan.adapter.rank)
    if plan.adapter.rank > most:
        raise SettingsError(
            f"publish.adapter_rank = {plan.adapter.rank}: no layer of this base has a rank above {most}, so the "
            "adapter would be larger than the model",
            hint="agree on a rank far below that, such as 8; or leave adapter_rank out, to publish a whole model",
        )


def _check_classifier(
    base: PreTrainedModel, draft: AgreementDraft, probe: Rows, tensors: PlannedTensors, method: Method[Hyperparameters]
) -> None:
    """Raise ModelError unless the last merged layer is a classifier that is fed one row per prediction."""
    plan = merge_plan(base, tensors)
    last = classifier(plan) if plan.inputs or plan.data_free else None
    if last is None or not _is_classifier(last, base, draft, probe, plan, must_be_measured=method.fits_classifier):
        raise ModelError(
            f"{type(base).__name__}: has no shared classifier that is fed one row per prediction and is merged as a "
            f"whole (regmean.largest_gram), which {method.title} needs",
            hint='use method = "regmean"',
        )


def _is_classifier(
    last: Layer, base: PreTrainedModel, draft: AgreementDraft, probe: Rows, plan: MergePlan, *, must_be_measured: bool
) -> bool:
    measured = [layer.weight for layer in plan.inputs[-1].layers] if plan.inputs else []
    has_its_input = [last.weight] == measured or (last.weight not in measured and not must_be_measured)
    fed: list[Tensor] = []
    ((_, batch, targets),) = probe.batches(batch_size=PROBE_EXAMPLES)
    with layer_inputs(base, lambda _, each: fed.append(each.rows), {last.whole}), torch.inference_mode():
        labels = base(**batch).logits.shape[-1]
    per_prediction = last.d_out == labels and [rows.shape[:-1] for rows in fed] == [targets.shape]
    is_shared = draft.task.has_labels and draft.task.head == "shared"
    return is_shared and per_prediction and has_its_input and last.features is None


def _check_no_running_statistics(base: PreTrainedModel, folder: Path) -> None:
    parameters = parameter_shapes(base)
    for name, tensor in base.state_dict(keep_vars=True).items():
        if name not in parameters and not isinstance(tensor, torch.nn.Parameter) and tensor.is_floating_point():
            raise ModelError(
                f"model {folder}: {name} is a running statistic (such as batch normalisation keeps), which cannot be "
                "merged yet",
                hint="agree on a base model without running statistics",
            )


def _planned_tensors(
    base: PreTrainedModel, probe: Rows, folder: Path, left_alone: tuple[str, ...], draft: AgreementDraft
) -> PlannedTensors:
    try:
        ((_, batch, _),) = probe.batches(batch_size=PROBE_EXAMPLES)
        groups = find_shared_inputs(base, batch)
        pooled = {name for name, rows in _row_counts(base, batch).items() if rows == len(probe)}
        held_back = _uncountable_inputs(base, batch)
        if not draft.privacy.merge_token_inputs:
            held_back |= _token_inputs(base, batch)  # check: token-inputs-are-averaged
    except (ValueError, RuntimeError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(
            f"model {folder}: a trial forward pass failed: {first_line(error)}",
            hint="check that task.kind fits the model, and that the folder is complete",
        ) from None
    layers, table = merge_layers(base), REGMEAN.of(draft.tables)
    fixed = set(left_alone)
    named = _data_free_layers(table.data_free_layers, layers)
    for_few = _layers_for_few_rows(pooled, groups, layers, draft)
    data_free = tuple(weight for weight in layers if weight in named + for_few and parameter_of(weight) not in fixed)
    if not draft.privacy.merge_routed_inputs:  # check: routed-inputs-are-averaged
        held_back |= {parameter_of(weight) for weight, layer in layers.items() if layer.expert is not None}
    unmeasured = {*data_free, *(weight for weight in layers if parameter_of(weight) in fixed)}
    measured = (tuple(weight for weight in group if weight not in unmeasured) for group in groups)
    merged = tuple(group for group in measured if group and not held_back & set(map(parameter_of, group)))
    if table.bias_feature:
        biases = {weight: bias for weight, bias in layer_biases(base).items() if bias not in fixed}
        merged = tuple(
            (*group, *(biases[weight] for weight in group))
            if set(group) <= set(biases) and layers[group[0]].d_in <= (table.largest_gram or inf)
            else group
            for group in merged
        )
    solved = {parameter_of(name) for name in (*data_free, *(name for group in merged for name in group))}
    averaged = tuple(name for name in parameter_shapes(base) if name not in solved | fixed)
    return PlannedTensors(
        merged=merged,
        largest_gram=table.largest_gram,
        data_free=data_free,
        averaged=averaged,
        left_alone=left_alone,
    )


def _data_free_layers(patterns: tuple[str, ...], layers: Collection[str]) -> tuple[str, ...]:
    """The weights that some pattern names, in the model's order. Raises SettingsError if a pattern names none."""
    for pattern in patterns:
        if not any(_names(pattern, parameter_of(weight)) for weight in layers):
            raise SettingsError(
                f"regmean.data_free_layers: {pattern!r} names no linear layer's weight of the base model",
                hint="use a layer's name, its beginning up to a dot, or a pattern such as *.attention.*",
            )
    return tuple(weight for weight in layers if any(_names(pattern, parameter_of(weight)) for pattern in patterns))


def _layers_for_few_rows(
    pooled: Collection[str], groups: Sequence[tuple[str, ...]], layers: Mapping[str, Layer], draft: AgreementDraft
) -> tuple[str, ...]:
    """The weights of layers that see one row an example, such as a pooler, and whose Gram could have too few rows.

    Nobody knows yet how many examples an owner has, only how many it may measure, and one that lacks rows for a single
    Gram could not take part. So such a layer is measured only if `measured_examples` is FULL_MEASURE times what its
    Gram needs. A classifier that a method fits stays.
    """
    least = draft.privacy.min_rows_per_dimension
    measured = REGMEAN.of(draft.tables).measured_examples
    kept = groups[-1] if any(METHODS[name].fits_classifier for name in draft.methods) else ()
    return tuple(
        weight
        for weight, layer in layers.items()
        if weight in pooled and weight not in kept and measured < FULL_MEASURE * least * layer.d_in
    )


def _not_named(patterns: tuple[str, ...], base: PreTrainedModel) -> tuple[str, ...]:
    """The parameters that no pattern names, if there are patterns. Raises SettingsError if one names nothing."""
    parameters = parameter_shapes(base)
    for pattern in patterns:
        if not any(_names(pattern, parameter) for parameter in parameters):
            raise SettingsError(
                f"merge.layers: {pattern!r} names no parameter of the base model",
                hint="use a parameter's name, its beginning up to a dot, or a pattern such as *.q_proj.*",
            )
    if not patterns:
        return ()
    return tuple(name for name in parameters if not any(_names(pattern, name) for pattern in patterns))


def _names(pattern: str, parameter: str) -> bool:
    """Whether a pattern names a parameter, or the module that it belongs to."""
    return any(fnmatchcase(parameter, each) for each in (pattern, f"{pattern}.*"))


def _token_inputs(base: PreTrainedModel, batch: Batch) -> set[str]:
    """Weights with an input whose rows depend only on a token and its position, not on the neighbouring tokens.

    The Gram of such rows is a linear system in the number of times that each token is at each position, so the sum
    would reveal everybody's counts. The first block's attention is such a layer. Found by changing every other token of
    one unpadded example: if no more rows change than tokens did, no row saw a neighbour. (Rows are counted, whatever
    their position, because a decoder shifts its tokens.)
    """
    if not set(TOKENS) & set(batch):
        return set()
    example = _first_example(batch)
    changed = _with_other_tokens(base, example, step=1)
    changed_tokens = {
        example[name].shape[1]: int((example[name] != changed[name]).sum()) for name in TOKENS if name in example
    }
    after = _inputs_by_parameter(base, changed)
    return {
        parameter
        for parameter, calls in _inputs_by_parameter(base, example).items()
        for one, other in zip(calls, after.get(parameter, []), strict=False)
        if len(one) == len(other) in changed_tokens and 0 < _changed_rows(one, other) <= changed_tokens[len(one)]
    }


def _changed_rows(one: Tensor, other: Tensor) -> int:
    return int((~torch.isclose(one, other, atol=1e-6, rtol=1e-5)).any(dim=-1).sum())


def _uncountable_inputs(base: PreTrainedModel, batch: Batch) -> set[str]:
    """Weights whose number of rows changes with the tokens although shapes stay: experts that are modules of their own.

    Nothing shows which of their rows are padding. (For fused experts see client/measurement/gram.py.)
    """
    if not set(TOKENS) & set(batch):
        return set()
    counts = _row_counts(base, batch)
    uncountable = {name for name, count in counts.items() if count == 0}
    for step in range(1, 4):  # one other text could send as many rows to an expert by chance
        others = _row_counts(base, _with_other_tokens(base, batch, step))
        uncountable |= {name for name in set(counts) | set(others) if counts.get(name) != others.get(name)}
    return uncountable


def _row_counts(base: PreTrainedModel, batch: Batch) -> dict[str, int]:
    return {name: sum(map(len, calls)) for name, calls in _inputs_by_parameter(base, batch).items()}


def _inputs_by_parameter(base: PreTrainedModel, batch: Batch) -> dict[str, list[Tensor]]:
    """Every input (rows, d_in) of every layer, in order. Fused experts' inputs are added up, row by token."""
    seen: dict[str, list[Tensor]] = {}

    def observe(weight: str, fed: LayerInput) -> None:
        calls = seen.setdefault(parameter_of(weight), [])
        if fed.routed is None:
            calls.append(fed.rows.reshape(-1, fed.rows.shape[-1]))
        else:
            in_place = torch.zeros(len(fed.routed), fed.rows.shape[-1])
            in_place[fed.routed] = fed.rows
            calls[:] = [sum(calls, in_place)]

    with layer_inputs(base, observe, merge_layers(base)), torch.inference_mode():
        base(**batch)
    return seen


def _first_example(batch: Batch) -> Batch:
    """One example without padding."""
    masks = {tensor.shape[1]: tensor[0].bool() for name, tensor in batch.items() if name.endswith("attention_mask")}
    return {
        name: tensor[:1, masks[tensor.shape[1]]] if tensor.shape[1] in masks else tensor[:1]
        for name, tensor in batch.items()
    }


def _with_other_tokens(base: PreTrainedModel, batch: Batch, step: int) -> Batch:
    """Another token at every second position. Special tokens stay, and none is added, because models look for them."""
    keys = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id")
    values = [getattr(base.config, key, None) for key in keys]
    special = torch.tensor([i for value in values if value is not None for i in np.atleast_1d(value)], dtype=torch.long)
    vocabulary = base.get_input_embeddings().num_embeddings
    changed = dict(batch)
    for name in TOKENS:
        if name in batch:
            other = (batch[name] + step) % vocabulary
            while torch.isin(other, special).any():
                other = torch.where(torch.isin(other, special), (other + 1) % vocabulary, other)
            other = torch.where(torch.isin(batch[name], special), batch[name], other)
            other[:, ::2] = batch[name][:, ::2]
            changed[name] = other
    return changed


def _probe(base: PreTrainedModel, task: Task, folder: Path, seed: int) -> Rows:
    """Made-up examples that reach the layers: random tokens, or noise."""
    random = np.random.default_rng(seed)
    single = np.zeros(PROBE_EXAMPLES, dtype=np.int64)
    if not task.is_text:
        shape = (PROBE_EXAMPLES, *image_shape(base.config))
        return Rows(features=random.standard_normal(shape).astype(np.float32), targets=single)
    tokenizer = load_tokenizer(folder)
    length = min(PROBE_TOKENS, task.max_tokens)
    drawn = random.integers(0, len(tokenizer), (PROBE_EXAMPLES, length)).tolist()
    # No end-of-text token in the middle, because T5's classifier expects exactly one.
    tokens = [[token for token in row if token != tokenizer.eos_token_id] for row in drawn]
    encoded = tokenizer(tokenizer.batch_decode(tokens), truncation=True, max_length=length)
    rows = features(encoded)
    if task.kind == "sequence-to-sequence":
        start = base.config.decoder_start_token_id
        rows = tuple(row | {"decoder_input_ids": [start, *row["input_ids"][:-1]]} for row in rows)
    every = tuple(np.zeros(len(row["input_ids"]), dtype=np.int64) for row in rows)
    return Rows(features=rows, targets=every if task.judges_tokens else single, tokenizer=tokenizer)


def _measured_bounds(
    draft: AgreementDraft, task: Task, base: PreTrainedModel, probe: Rows, tensors: PlannedTensors
) -> dict[str, object]:
    headroom = draft.bounds.headroom
    if task.is_text:
        headroom *= max(1.0, task.max_tokens / PROBE_TOKENS)
    plan = merge_plan(base, tensors)
    grams = [_power_of_two(headroom * value) for value in _largest_gram_entries(base, probe, plan)]
    fisher: tuple[float, ...] = ()
    if Measurement.FISHER in measurements(draft.methods, draft.tables):
        squares = measure_fisher(base, probe, draft.seed, names=plan.changed)
        highest = {name: float(squares[name].max()) for name in plan.changed}
        everywhere = max(highest.values())  # stands in for tensors that the probe did not reach
        fisher = tuple(_power_of_two(headroom * (highest[name] or everywhere)) for name in plan.changed)
    changes = largest_changes(draft.bounds.change, base, plan)
    return {
        "grams": tuple(grams),
        "fisher": fisher,
        "changes": changes,
        "features": _feature_norm(draft, base, probe, plan),
        "gram_norms": _gram_norms(draft, base, probe, plan),
    }


def _feature_norm(draft: AgreementDraft, base: PreTrainedModel, probe: Rows, plan: MergePlan) -> float | None:
    """The largest 2-norm of the classifier's input, its constant included; None if no refit has noise."""
    if draft.bounds.features is not None or draft.privacy.epsilon is None or "refit" not in draft.budget_shares:
        return draft.bounds.features
    layer = classifier(plan)
    norms: list[Tensor] = []
    ((_, batch, _),) = probe.batches(batch_size=PROBE_EXAMPLES)
    with (
        layer_inputs(base, lambda _, fed: norms.append(fed.rows.float().norm(dim=-1)), {layer.weight}),
        torch.inference_mode(),
    ):
        base(**batch)
    largest = max(float(each.max()) for each in norms)
    return float(f"{hypot(largest, float(layer.bias is not None)):.2g}")


def _gram_norms(draft: AgreementDraft, base: PreTrainedModel, probe: Rows, plan: MergePlan) -> tuple[float, ...]:
    """The Frobenius norm of what one example adds to each Gram, in the mean; none if no Gram has noise.

    Raises SettingsError for a draft that names others than one for each Gram.
    """
    named = draft.bounds.gram_norms
    if named and draft.has_noised_grams and len(named) != len(plan.inputs):
        raise SettingsError(
            f"bounds.gram_norms: {len(named)} of them, and {len(plan.inputs)} Gram matrices are merged",
            hint="leave gram_norms out: they are then measured on the base model",
        )
    if named or not draft.has_noised_grams:
        return named
    norms = {shared.name: 0.0 for shared in plan.inputs}
    for _, batch, _ in replace(probe, are_apart=True).batches(batch_size=1):
        for name, gram in measure_grams(base, plan, [batch]).items():
            norms[name] += float(gram.matrix.norm()) / len(probe)
    everywhere = max(norms.values(), default=1.0)  # stands in for an expert that no example reached
    return tuple(float(f"{norms[shared.name] or everywhere:.2g}") for shared in plan.inputs)


def largest_changes(relative: float | None, base: PreTrainedModel, plan: MergePlan) -> tuple[float, ...]:
    """By how much an owner may change each tensor. A vector of small numbers, such as a new bias, may change as if its
    numbers were as large as those of the model's matrices in the mean.
    """
    if relative is None:
        return ()
    parameters = {name: parameter.detach() for name, parameter in base.named_parameters() if name in plan.shapes}
    squares = {name: float(parameter.double().square().sum()) for name, parameter in parameters.items()}
    matrices = [name for name, parameter in parameters.items() if parameter.ndim > 1]
    mean = sum(squares[name] for name in matrices) / sum(parameters[name].numel() for name in matrices)
    norms = [
        sqrt(max(squares[name], mean * parameters[name].numel()) if name not in matrices else squares[name] or mean)
        for name in plan.changed
    ]
    return tuple(float(f"{relative * norm:.3g}") for norm in norms)


def _largest_gram_entries(base: PreTrainedModel, probe: Rows, plan: MergePlan) -> list[float]:
    """The most that one example adds to an entry of each Gram. For an expert, as if every token went to it."""
    ((_, batch, _),) = probe.batches(batch_size=PROBE_EXAMPLES)
    tokens = BatchTokens(batch)
    largest = {layer.whole: 0.0 for layer in plan.layers()}
    constants = {layer.whole: float(layer.bias is not None) for layer in plan.layers()}

    def observe(weight: str, fed: LayerInput) -> None:
        if weight in largest and fed.rows.numel() > 0:
            rows = fed.rows.shape[:-1].numel() if fed.routed is None else len(fed.routed)
            per_example = tokens.times(fed) * rows / tokens.examples
            largest[weight] += per_example * max(float(fed.rows.float().abs().max() ** 2), constants[weight])

    with layer_inputs(base, observe, largest), torch.inference_mode():
        base(**batch)
    highest: dict[str, float] = {}
    for weight, value in largest.items():
        highest[parameter_of(weight)] = max(value, highest.get(parameter_of(weight), 0.0))
    return [highest[parameter_of(shared.layers[0].weight)] for shared in plan.inputs]


def _power_of_two(value: float) -> float:
    """The next power of two, which is easy to read, and the same on machines that round differently."""
    return 2.0 ** ceil(log2(value)) if value > 0 else 1.0
