"""What an owner measures to refit the classifier (common/merge_methods/refit.py)."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from client.gram import layer_inputs, with_constant
from client.rows import IGNORED, Rows
from common.merge_methods.refit import classifier
from common.merge_methods.terms import HeadTerms
from common.models import MergePlan


@torch.inference_mode()
def measure_head(
    base: PreTrainedModel, own: PreTrainedModel, merged: PreTrainedModel, plan: MergePlan, rows: Rows, batch_size: int
) -> HeadTerms:
    """The classifier's inputs on the merged model, the labels, and the own model's scores, prediction by prediction."""
    layer = classifier(plan)
    features: list[Tensor] = []
    labels: list[Tensor] = []
    scores: list[Tensor] = []
    with layer_inputs(merged, lambda _, fed: features.append(fed.rows), {layer.weight}):
        for _, batch, targets in rows.batches(batch_size):
            judged = targets != IGNORED
            merged(**batch)
            features[-1] = features[-1][judged]
            labels.append(targets[judged])
            scores.append(own(**batch).logits[judged])
    fed = torch.cat(features).double()
    return HeadTerms(
        features=fed if layer.bias is None else with_constant(fed),
        targets=torch.cat(labels),
        scores=torch.cat(scores).double(),
        start=layer.take(dict(base.named_parameters())).detach().double(),
    )
