"""What carries the messages of a simulation, by name: nothing here imports Flower, which takes a second."""

from importlib.util import find_spec
from typing import Literal

from common.errors import SettingsError

Engine = Literal["in-process", "network", "ray"]


def check_engine(engine: Engine) -> None:
    """Raise SettingsError if what carries the messages is not installed."""
    if engine == "ray" and find_spec("ray") is None:
        raise SettingsError("--engine ray: Ray is not installed", hint="pip install 'amalgram[ray]'")
