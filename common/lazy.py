"""A module that is imported when something of it is first used.

For torch and transformers, which take seconds to import and which most processes never need. The stand-in is not placed
in `sys.modules`, so no other library ever meets a half-imported module.

    if TYPE_CHECKING:
        import torch
    else:
        torch = lazy_module("torch")
"""

from functools import cached_property
from importlib import import_module
from types import ModuleType
from typing import Any


class _LazyModule:
    def __init__(self, name: str) -> None:
        self._name = name

    @cached_property
    def _module(self) -> ModuleType:
        return import_module(self._name)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._module, attribute)


def lazy_module(name: str) -> Any:
    """A stand-in for the module `name`."""
    return _LazyModule(name)
