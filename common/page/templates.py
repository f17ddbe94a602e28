"""The templates of a page: one file that runs no script and fetches nothing. Its frame and style are the same for all.

Every string is escaped, and so are characters that hide or move what is around them.
"""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from common.page.words import capitalised, listed, percent, safe, size

SHARED = Path(__file__).parent  # frame.html.jinja, which pages extend, and page.css


def page_environment(folder: Path) -> Environment:
    """Templates in `folder`, with the filters that pages use."""
    environment = Environment(
        loader=FileSystemLoader([folder, SHARED]),
        autoescape=True,  # check: page-is-escaped
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=safe,  # check: page-hides-nothing
    )
    environment.filters |= {
        "percent": percent,
        "size": size,
        "listed": listed,
        "capitalised": capitalised,
        "three": "{:.3f}".format,
        "grouped": "{:,}".format,
    }
    environment.globals["css"] = Markup((SHARED / "page.css").read_text())
    return environment
