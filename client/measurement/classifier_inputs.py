"""What an owner measures to refit the classifier (common/merge_methods/refit.py) or adjust it (logit_adjusted.py)."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from client.data.rows import IGNORED, Rows
from client.measurement.disk_model import DiskModel
from client.measurement.evaluation import predict_logits
from client.measurement.gram import layer_inputs, with_constant
from common.merge_methods.terms import ClassifierTerms
from common.models.layers import Layer


@torch.inference_mode()
def measure_classifier(
    base: Mapping[str, Tensor], own: DiskModel, merged: DiskModel, layer: Layer, rows: Rows, batch_size: int
) -> ClassifierTerms:
    """The inputs of the classifier `layer` on the merged model, the labels, and the own model's scores.

    All three have one row per prediction. The models run one after the other, so only one is in memory.
    """
    features: list[Tensor] = []
    labels: list[Tensor] = []
    scores: list[Tensor] = []
    with layer_inputs(merged.model, lambda _, fed: features.append(fed.rows), {layer.weight}):
        for _, batch, targets in rows.batches(batch_size):
            judged = targets != IGNORED
            merged.model(**batch)
            features[-1] = features[-1][judged]
            labels.append(targets[judged])
    merged.release()
    for _, batch, targets in rows.batches(batch_size):
        scores.append(own.model(**batch).logits[targets != IGNORED])
    fed = torch.cat(features).double()
    return ClassifierTerms(
        features=fed if layer.bias is None else with_constant(fed),
        targets=torch.cat(labels),
        scores=torch.cat(scores).double(),
        start=layer.take(base).double(),
    )


def measure_class_shares(model: PreTrainedModel, rows: Rows, batch_size: int) -> Tensor:
    """The mean probability that a model gives each label, (classes,) float64, over all predictions. Reads no label."""
    logits = torch.from_numpy(predict_logits(model, rows, batch_size)).double()  # (predictions, classes)
    return logits.softmax(dim=1).mean(dim=0)
