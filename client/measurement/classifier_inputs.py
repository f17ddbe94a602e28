"""What an owner measures to refit the classifier (common/merge_methods/refit.py) or adjust it (logit_adjusted.py)."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from client.data.rows import Rows, judged
from client.measurement.disk_model import DiskModel
from client.measurement.evaluation import predict_logits
from client.measurement.gram import layer_inputs, with_constant
from client.measurement.passes import ON_CPU, Passes
from common.merge_methods.terms import ClassifierTerms
from common.models.layers import Layer


@torch.inference_mode()
def measure_classifier(
    base: Mapping[str, Tensor],
    own: DiskModel,
    merged: DiskModel,
    layer: Layer,
    rows: Rows,
    batch_size: int,
    passes: Passes = ON_CPU,
) -> ClassifierTerms:
    """The inputs of the classifier `layer` on the merged model, the labels, and the own model's scores.

    All three have one row per prediction. The models run one after the other, so only one is in memory.
    """
    features: list[Tensor] = []
    labels: list[Tensor] = []
    scores: list[Tensor] = []
    with (
        passes.running(merged.model),
        layer_inputs(merged.model, lambda _, fed: features.append(fed.rows.cpu()), {layer.weight}),
    ):
        for _, batch, targets in rows.batches(batch_size):
            kept = judged(targets)
            merged.model(**passes.inputs(batch))
            features[-1] = features[-1][kept]
            labels.append(targets[kept])
    merged.release()
    with passes.running(own.model):
        for _, batch, targets in rows.batches(batch_size):
            scores.append(own.model(**passes.inputs(batch)).logits.cpu()[judged(targets)])
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
