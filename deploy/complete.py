"""Complete a draft of an agreement against its base model: labels, digest, and the role of every tensor."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from client.gram import find_shared_inputs
from common.agreement import Agreement, AgreementDraft, Task, TensorRoles
from common.models import base_labels, digest_of, load_base, parameter_shapes

PROBE_ROWS, PROBE_TOKENS = 2, 8


def complete_agreement(draft: AgreementDraft, base_folder: Path) -> Agreement:
    """The agreement that all parties then hold. Raises ModelError if the base model cannot be used."""
    task = draft.task.model_copy(update={"labels": draft.task.labels or base_labels(base_folder)})
    base = load_base(base_folder, task, draft.seed)
    return Agreement(**{**dict(draft), "task": task}, base_digest=digest_of(base), tensors=_tensor_roles(base, task))


def _tensor_roles(base: PreTrainedModel, task: Task) -> TensorRoles:
    merged = find_shared_inputs(base, _probe(base, task))
    in_a_group = {weight for group in merged for weight in group}
    averaged = tuple(name for name in parameter_shapes(base) if name not in in_a_group)
    return TensorRoles(merged=merged, averaged=averaged, left_alone=())


def _probe(base: PreTrainedModel, task: Task) -> dict[str, torch.Tensor]:
    """Inputs that reach the layers; what they say does not matter."""
    if task.kind == "image-classification":
        size = base.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.zeros(PROBE_ROWS, base.config.num_channels, height, width)}
    tokens = torch.arange(PROBE_ROWS * PROBE_TOKENS).reshape(PROBE_ROWS, PROBE_TOKENS)
    tokens %= base.get_input_embeddings().num_embeddings
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
