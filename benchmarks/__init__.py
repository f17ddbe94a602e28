"""Measurements of what the documents claim. README.md lists them."""

import amalgram  # noqa: F401 - sets what torch reads from the environment, as the command does, before torch is imported
