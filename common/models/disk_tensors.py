"""Tensors on the disk, so that a party that needs several models holds none of them whole in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from common.lazy import lazy_module
from common.mapped import release
from common.room import needing_room

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

ALIGNMENT_BYTES = 64  # where a tensor starts, for the processor's vector units
LARGE_BYTES = 32_000_000
MAKE_ROOM = "make room on this disk, or move this folder to another one"


class DiskTensors(Mapping[str, "Tensor"]):
    """Tensors in a nameless file in `folder`, which disappears with this object.

    As a mapping, this gives a copy of each tensor by name, read when it is asked for. Raises DataError if the disk has
    no room.
    """

    def __init__(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        self._bytes = _written(tensors, folder)
        self.mapped: dict[str, Tensor] = {}
        start = 0
        for name, tensor in tensors.items():
            size = tensor.nbytes
            kept = torch.from_numpy(self._bytes[start : start + size]).view(tensor.dtype)
            self.mapped[name] = kept.reshape(tensor.shape)
            start += size + -size % ALIGNMENT_BYTES

    def release(self) -> None:
        """Free the memory of the tensors that were used."""
        release(self._bytes)

    def __getitem__(self, name: str) -> Tensor:
        copy = self.mapped[name].clone()
        self.release()
        return copy

    def __iter__(self) -> Iterator[str]:
        return iter(self.mapped)

    def __len__(self) -> int:
        return len(self.mapped)


def on_disk_if_large(tensor: Tensor, folder: Path | None) -> Tensor:
    """The tensor, mapped from a nameless file in `folder` if it is large. Raises DataError if the disk has no room."""
    if folder is None or tensor.nbytes < LARGE_BYTES:
        return tensor
    return DiskTensors({"": tensor}, folder).mapped[""]


def _written(tensors: Mapping[str, Tensor], folder: Path) -> NDArray[np.uint8]:
    """All bytes of the tensors, mapped from the file."""
    if not tensors:
        return np.empty(0, np.uint8)
    with needing_room("a model's weights", folder, MAKE_ROOM), TemporaryFile(dir=folder) as file:
        for tensor in tensors.values():
            content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            file.write(content.numpy().data)
            file.write(bytes(-len(content) % ALIGNMENT_BYTES))
        return np.memmap(file, np.uint8, "r+")
