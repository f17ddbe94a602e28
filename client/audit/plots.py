"""The plots of an audit's page."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import PercentFormatter

from client.audit.result import ModelName
from common.page.plots import ACCENT, INK, OTHERS, PALETTE, as_svg, new_axes, plain_style

STYLES: dict[ModelName, dict[str, Any]] = {
    "base": {"color": OTHERS, "marker": "s", "linestyle": ":"},
    "own": {"color": PALETTE[0], "marker": "o", "linestyle": "--"},
    "model_base": {"color": OTHERS, "marker": "^", "linestyle": "-."},
    "model": {"color": ACCENT, "marker": "D", "linestyle": "-"},
}


def intervals_plot(
    rows: Sequence[str], models: Mapping[ModelName, tuple[str, Sequence[tuple[float, float, float] | None]]]
) -> str:
    """One row per attack; in it one marker per model, with its interval. `models`: by name, its title and
    (value, low, high) for each row.
    """
    with plain_style():
        figure, axes = new_axes(height_inches=1.1 + 0.22 * len(rows) * (len(models) + 1))
        axes.axvline(0.5, color=INK, alpha=0.5, linewidth=1)
        for order, (name, (title, values)) in enumerate(models.items()):
            shown = [(row, value) for row, value in enumerate(values) if value is not None]
            places = [-row + 0.24 * ((len(models) - 1) / 2 - order) for row, _ in shown]
            style = STYLES[name]
            for place, (_, (_, low, high)) in zip(places, shown, strict=True):
                axes.plot([low, high], [place, place], color=style["color"], linewidth=2)
            axes.plot(
                [value for _, (value, _, _) in shown],
                places,
                linestyle="none",
                marker=style["marker"],
                color=style["color"],
                label=title,
            )
        axes.set_yticks([-row for row in range(len(rows))], list(rows))
        axes.set_ylim(-len(rows) + 0.4, 0.6)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlabel("right about which row is yours (guessing: 50%)")
        axes.grid(axis="x", color=INK, alpha=0.15)
        figure.legend(loc="outside upper left", ncols=3, handlelength=1.2, columnspacing=1, fontsize=9)
        return as_svg(figure, "areas")


def curves_plot(curves: Mapping[ModelName, tuple[str, Sequence[float]]]) -> str:
    """Receiver operating characteristics: by model, its title and the members found at rates of 0, 0.01, ... 1."""
    with plain_style():
        figure, axes = new_axes(height_inches=4.2)
        axes.plot([0, 1], [0, 1], color=INK, alpha=0.5, linewidth=1)
        for name, (title, found) in curves.items():
            style = STYLES[name]
            rates = [index / (len(found) - 1) for index in range(len(found))]
            axes.plot(
                rates,
                found,
                color=style["color"],
                linestyle=style["linestyle"],
                marker=style["marker"],
                markevery=20,
                markersize=5,
                label=title,
            )
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlabel("strangers taken for yours")
        axes.set_ylabel("your rows found")
        axes.grid(color=INK, alpha=0.15)
        figure.legend(loc="outside upper left", fontsize=9)
        return as_svg(figure, "curves")
