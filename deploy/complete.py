"""Complete a draft of an agreement against its base model: labels, digest, and the role of every tensor."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from client.gram import find_shared_inputs
from common.agreement import Agreement, AgreementDraft, Task, TensorRoles
from common.errors import ModelError
from common.models import base_labels, digest_of, load_base, load_tokenizer, parameter_shapes

PROBE_TEXT = "a short text"


def complete_agreement(draft: AgreementDraft, base_folder: Path) -> Agreement:
    """The agreement that all parties then hold. Raises ModelError if the base model cannot be used."""
    task = draft.task.model_copy(update={"labels": draft.task.labels or base_labels(base_folder)})
    base = load_base(base_folder, task, draft.seed)
    _check_no_running_statistics(base, base_folder)
    roles = _tensor_roles(base, task, base_folder)
    return Agreement(**{**dict(draft), "task": task}, base_digest=digest_of(base), tensors=roles)


def _check_no_running_statistics(base: PreTrainedModel, folder: Path) -> None:
    parameters = parameter_shapes(base)
    for name, tensor in base.state_dict(keep_vars=True).items():
        if name not in parameters and not isinstance(tensor, torch.nn.Parameter) and tensor.is_floating_point():
            raise ModelError(
                f"model {folder}: {name} is a running statistic (as of batch normalisation), which cannot be merged yet"
            )


def _tensor_roles(base: PreTrainedModel, task: Task, folder: Path) -> TensorRoles:
    try:
        merged = find_shared_inputs(base, _probe(base, task, folder))
    except (ValueError, RuntimeError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"model {folder}: a trial forward pass failed: {str(error).splitlines()[0]}") from None
    in_a_group = {weight for group in merged for weight in group}
    averaged = tuple(name for name in parameter_shapes(base) if name not in in_a_group)
    return TensorRoles(merged=merged, averaged=averaged, left_alone=())


def _probe(base: PreTrainedModel, task: Task, folder: Path) -> dict[str, torch.Tensor]:
    """Inputs that reach the layers; what they say does not matter."""
    if task.kind == "image-classification":
        size = base.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.zeros(2, base.config.num_channels, height, width)}
    return dict(load_tokenizer(folder)([PROBE_TEXT] * 2, return_tensors="pt"))
