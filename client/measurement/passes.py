"""How an owner's passes run: on which device, in which type of number, and with how many examples at once.

On the CPU in float32, which is the default, nothing in here changes anything.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from client.data.rows import Batch
from client.measurement.forgetting import FoundModel
from client.measurement.placement import placed
from common.errors import DataError, first_line

T = TypeVar("T")
CPU = torch.device("cpu")
log = logging.getLogger("amalgram.owner")


class Halving:
    """How many examples a batch has. They are halved, for good, whenever the device has no memory for them.

    `size`: how many the settings ask for. `parts`: into how many parts such a batch is cut.
    """

    def __init__(self, size: int, *, parts: int = 1) -> None:
        self._size, self.parts = size, parts

    @property
    def size(self) -> int:
        return max(1, self._size // self.parts)

    def folder_in(self, folder: Path) -> Path:
        """Where what belongs to batches of this size is kept: halved ones need a folder of their own."""
        return folder if self.parts == 1 else folder / f"in_{self.parts}"

    def run(self, attempt: Callable[[], T]) -> T:
        """What `attempt` returns, which reads `size` or `parts`. Raises DataError if not even one example fits."""
        while True:
            try:
                return attempt()
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                reason = first_line(error)
            # Only here, where the error and what its frames hold are gone, is there memory again.
            if self.size == 1:
                raise DataError(
                    f"the device has too little memory for this model, even one example at a time ({reason}); "
                    "nothing has left",
                    hint='set device = "cpu" in the settings',
                )
            self.parts *= 2
            log.warning("  the device is out of memory: batches are halved, to %d", self.size)


@dataclass(frozen=True)
class Passes:
    """`device` is the owner's own choice. `dtype` is the agreement's: float32, or bfloat16 for matrix products."""

    device: torch.device = CPU
    dtype: torch.dtype = torch.float32
    halving: Halving = field(default_factory=lambda: Halving(1), compare=False)

    def inputs(self, batch: Batch) -> Batch:
        """A batch on the device."""
        return {name: self.moved(tensor) for name, tensor in batch.items()}

    def moved(self, tensor: Tensor) -> Tensor:
        """A tensor on the device, by way of page-locked memory if it has such: then the CPU need not wait."""
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=self.device.type == "cuda")

    @contextmanager
    def computing(self) -> Iterator[None]:
        """While open, passes compute in `dtype`, by torch's autocast: parameters stay float32, and so do sums such as
        those of a softmax. TF32, which rounds float32 to 10 bits, is off.
        """
        with ExitStack() as stack:
            if self.device.type == "cuda":
                stack.enter_context(_without_tf32())
            if self.dtype != torch.float32:
                stack.enter_context(torch.autocast(self.device.type, dtype=self.dtype))
            yield

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[None]:
        """While open, `model` runs on the device, in `dtype`, for passes without gradients. None changes the next."""
        found = FoundModel(model)
        with (
            placed(model, self.device) as where,
            self.computing(),
            _without_cache(model),
            found.at_every_pass(where),  # check: passes-leave-nothing-behind
        ):
            yield


ON_CPU = Passes()


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "MPS backend out of memory" in str(error)


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """While open, passes do not keep each block's keys and values, which only texts that grow need."""
    configs: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    caching = [config for config in configs if getattr(config, "use_cache", False)]
    try:
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for config in caching:
            config.use_cache = True


@contextmanager
def _without_tf32() -> Iterator[None]:
    products, others = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, others.allow_tf32
    try:
        products.allow_tf32 = others.allow_tf32 = False
        yield
    finally:
        products.allow_tf32, others.allow_tf32 = before
