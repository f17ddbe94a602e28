"""What every plot of a page shares: its style, its colours, and how it becomes inline SVG.

Text stays text, ink takes the page's colour, and the same numbers give the same bytes. Colours are Okabe and Ito's
(2008), which colour-blind readers can tell apart; a marker, a hatch or a label always says the same as a colour.
"""

import io
import re
from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")
HATCHES = ("", "///", "\\\\\\", "---", "|||", "xxx", "+++")  # only lines: dots would make a page ten times as large
ACCENT, OTHERS = "#d55e00", "#999999"
MAX_NAME = 28  # characters
INK = "#010203"  # replaced by the page's own text colour
WIDTH_INCHES = 4.9  # the most that a phone shows without shrinking the text
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "amalgram",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "hatch.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
}


def plain_style() -> AbstractContextManager[None]:
    """The style of our plots, while it is open."""
    return mpl.rc_context(STYLE)


def short(name: str) -> str:
    """A name that leaves room for the plot; the tables beside plots have it in full."""
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"


def new_axes(height_inches: float) -> tuple[Figure, Axes]:
    """Within `plain_style`."""
    figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
    return figure, figure.add_subplot()


def as_svg(figure: Figure, name: str) -> str:
    """The <svg> element, with ids that no other plot of the page has; the page's tables are its text alternative."""
    canvas, layout = FigureCanvasSVG(figure), figure.get_layout_engine()
    if layout is not None:
        layout.execute(figure)
        figure.set_layout_engine("none")
    file = io.StringIO()
    # savefig would draw everything once more before this, to lay it out
    canvas.print_svg(file, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'( id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", svg).replace(INK, "currentColor")
    return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
