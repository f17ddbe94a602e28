"""The weights of a model that was loaded, read again from its own files: nothing is copied, and no model is held."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.errors import DataError
from common.models.disk_tensors import DiskTensors
from common.models.files import file_state, read_tensor, tensor_names
from common.models.loading import SMALL_BYTES


class StoredTensors(Mapping[str, Tensor]):
    """The parameters of `model`, float32, by name. Each is read from one of `files` when it is asked for.

    What the files do not hold under its name, bit for bit, such as a head that was made here, is kept in a nameless
    file in `folder` instead. Raises DataError if the disk has no room for that, and once a file has changed: its
    numbers may not be those of the model that was checked. A small model stays in memory, since opening its file for
    each tensor would take longer than all that is done with them.
    """

    def __init__(self, model: PreTrainedModel, files: list[Path], folder: Path) -> None:
        self._states = {path: file_state(path) for path in files}
        parameters = dict(model.named_parameters())
        self._names = tuple(parameters)
        is_small = sum(each.nbytes for each in parameters.values()) <= SMALL_BYTES
        self._kept: dict[str, Tensor] = {name: each.detach() for name, each in parameters.items()} if is_small else {}
        self._stored = {} if is_small else dict(_found(parameters, files, f"{model.base_model_prefix}."))
        elsewhere = self._stored.keys() | self._kept.keys()
        self._others = DiskTensors({name: each for name, each in parameters.items() if name not in elsewhere}, folder)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._kept:
            return self._kept[name].clone()
        if name not in self._stored:
            return self._others[name]
        path, stored_as = self._stored[name]
        tensor = read_tensor(path, stored_as, torch.float32)
        if file_state(path) != self._states[path]:  # check: stored-tensors-are-those-checked
            raise DataError(
                f"model {path}: was changed while it was in use; nothing that follows from it has left",
                hint="restore the agreed base, and leave it as it is until the merge is over",
            )
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _found(parameters: Mapping[str, Tensor], files: list[Path], prefix: str) -> Iterator[tuple[str, tuple[Path, str]]]:
    """By parameter, where the same numbers are stored. A base without a head names them without the model's prefix."""
    for path in files:
        for stored_as in tensor_names(path):
            for name in {stored_as, prefix + stored_as} & parameters.keys():
                if torch.equal(parameters[name], read_tensor(path, stored_as, torch.float32)):
                    yield name, (path, stored_as)
