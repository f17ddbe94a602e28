"""A model whose weights are on the disk, so an owner that needs several models holds none of them whole in memory."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.errors import DataError
from common.mapped import release

ALIGNMENT_BYTES = 64  # where a parameter starts, for the processor's vector units


class DiskModel(Mapping[str, Tensor]):
    """`model`, with its parameters moved to a nameless file in `folder`, which disappears with this object.

    The model runs as before. The parameters that it uses are read into memory, and `release` frees them. As a mapping,
    this gives a copy of each parameter by name, read when it is asked for. Raises DataError if the disk has no room.
    """

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        self.model = model
        self._parameters = dict(model.named_parameters())
        self._bytes = self._write(folder)
        start = 0
        for parameter in self._parameters.values():
            size = parameter.nbytes
            kept = torch.from_numpy(self._bytes[start : start + size]).view(parameter.dtype)
            parameter.data = kept.reshape(parameter.shape)
            start += size + -size % ALIGNMENT_BYTES

    def _write(self, folder: Path) -> np.memmap:
        try:
            with TemporaryFile(dir=folder) as file:
                for parameter in self._parameters.values():
                    content = parameter.detach().contiguous().reshape(-1).view(torch.uint8)
                    file.write(content.numpy().data)
                    file.write(bytes(-len(content) % ALIGNMENT_BYTES))
                return np.memmap(file, np.uint8, "r+")
        except OSError as error:
            raise DataError(
                f"{folder}: a model's weights cannot be written here ({error.strerror})",
                hint="make room on this disk, or move the state folder",
            ) from None

    def release(self) -> None:
        """Free the memory of the parameters that were used."""
        release(self._bytes)

    def __getitem__(self, name: str) -> Tensor:
        copy: Tensor = self._parameters[name].detach().clone()
        self.release()
        return copy

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)
