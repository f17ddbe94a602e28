"""A model whose weights are on the disk, so an owner that needs several models holds none of them whole in memory."""

from pathlib import Path

from transformers import PreTrainedModel

from common.models.disk_tensors import DiskTensors


class DiskModel(DiskTensors):
    """`model`, with its parameters moved to a nameless file in `folder`.

    It runs as before. The parameters that it uses are read into memory, and `release` frees them.
    """

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        self.model = model
        parameters = dict(model.named_parameters())
        super().__init__(parameters, folder)
        for name, parameter in parameters.items():
            parameter.data = self.mapped[name]
