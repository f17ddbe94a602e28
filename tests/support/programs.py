"""Programs that some tests need. Where one is missing, a test is skipped, except under CI, where it fails."""

import os
import shutil

import pytest

NEEDS = "needs "  # begins the reason of such a skip; the summary of a run repeats it (conftest.py)


def required_program(*names: str, package: str) -> str:
    """The path of the first of these programs that is installed. `package`: what to install otherwise."""
    for name in names:
        found = shutil.which(name)
        if found is not None:
            return found
    reason = f"{NEEDS}{names[0]}, which is not installed: apt-get install {package}"
    if os.environ.get("CI"):
        raise pytest.fail.Exception(f"{reason} (under CI nothing is skipped for a missing program)")
    raise pytest.skip.Exception(reason)
