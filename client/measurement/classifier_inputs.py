"""What an owner measures to refit the classifier (common/merge_methods/refit.py)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from client.data.rows import Rows, judged
from client.measurement.disk_model import DiskModel
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
            kept = judged(targets)
            merged.model(**batch)
            features[-1] = features[-1][kept]
            labels.append(targets[kept])
    merged.release()
    for _, batch, targets in rows.batches(batch_size):
        scores.append(own.model(**batch).logits[judged(targets)])
    fed = torch.cat(features).double()
    return ClassifierTerms(
        features=fed if layer.bias is None else with_constant(fed),
        targets=torch.cat(labels),
        scores=torch.cat(scores).double(),
        start=layer.take(base).double(),
    )
