"""What the weights alone give away: which token embeddings moved, and how much of the model is the base's anyway."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from client.audit.result import Embeddings, Lineage
from client.audit.rows import tokens_of
from client.data.rows import Rows

MOVED = 1e-5  # of a row's norm: some eighty roundings of float32
PARALLEL = 1 - 1e-4  # cosine of two changes, above which one owner alone made the change
MANTISSA_BITS = 23


def moved_tokens(
    model: PreTrainedModel, base: PreTrainedModel, own: PreTrainedModel | None, train: Rows
) -> Embeddings | None:
    """Which tokens the embedding of `model` shows; `own`: the owner's model, unless that is `model`.

    None without an embedding of tokens alone: an output layer that shares it moves every row.
    """
    if train.tokenizer is None or _is_tied(base):
        return None
    start, after = (each.get_input_embeddings().weight.detach() for each in (base, model))
    changes = _without_decay(after - start, start)
    moved = _is_moved(changes, start)
    yours = np.zeros(len(start), bool)
    yours[tokens_of(train)] = True
    alone = None
    if own is not None:
        own_changes = _without_decay(own.get_input_embeddings().weight.detach() - start, start)
        cosines = torch.nn.functional.cosine_similarity(changes, own_changes, dim=1).numpy()
        alone = int((moved & _is_moved(own_changes, start) & (cosines > PARALLEL)).sum())
    return Embeddings(
        vocabulary=len(start),
        moved=int(moved.sum()),
        yours=int(yours.sum()),
        moved_of_yours=int((moved & yours).sum()),
        yours_alone=alone,
    )


def _is_tied(model: PreTrainedModel) -> bool:
    output = model.get_output_embeddings()
    return output is not None and output.weight is model.get_input_embeddings().weight


def _without_decay(changes: Tensor, start: Tensor) -> Tensor:
    """(tokens, d): what is left of each row's change without its multiple of the row, which weight decay makes even of
    rows that no text reached.
    """
    squares = start.square().sum(dim=1, keepdim=True)
    multiples = (changes * start).sum(dim=1, keepdim=True) / squares.clamp(min=torch.finfo(torch.float32).tiny)
    return changes - multiples * start


def _is_moved(changes: Tensor, start: Tensor) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = (changes.norm(dim=1) > MOVED * start.norm(dim=1)).numpy()
    return found


# --- lineage ---


@torch.inference_mode()
def lineage(model: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Lineage:
    """Compare float32 parameters by name.

    The code for a weight, given the base's: the length of the difference of the two float32 numbers as integers,
    entropy coded over all weights, then the difference itself.
    """
    total = unchanged = same = 0
    lengths = torch.zeros(34, dtype=torch.int64)  # how many differences have 0, 1, ... bits
    for name, start in base.items():
        one, other = (each.detach().contiguous().reshape(-1).view(torch.int32) for each in (model[name], start))
        total += one.numel()
        unchanged += int((one == other).sum())
        same += int((one >> MANTISSA_BITS == other >> MANTISSA_BITS).sum())
        apart = (_in_order(one) - _in_order(other)).abs().double()
        lengths += torch.bincount(torch.frexp(apart).exponent.clamp(min=0), minlength=len(lengths))
    shares = lengths.double() / total
    entropy = float(-(shares[shares > 0] * shares[shares > 0].log2()).sum())
    # A difference of n bits: its sign and the n - 1 bits below the first.
    written = float((shares * torch.arange(len(lengths))).sum())
    return Lineage(
        weights=total,
        unchanged=unchanged / total,
        same_exponent=same / total,
        bits_per_weight=entropy + written,
    )


def _in_order(bits: Tensor) -> Tensor:
    """The bits of float32 numbers as integers that ascend with the numbers."""
    wide = bits.long()
    return torch.where(wide < 0, -(wide & 0x7FFFFFFF), wide)
