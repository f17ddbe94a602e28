"""The report's plots. The heat map is a table (heat_map.py); what all plots share is in common/page/plots.py."""

from collections.abc import Mapping, Sequence
from typing import Any

from common.page.plots import ACCENT, HATCHES, INK, OTHERS, PALETTE, as_svg, new_axes, plain_style, short

LEGEND_COLUMNS = 3
MANY_CIRCLES = 12  # in one row; more are drawn faintly, because they overlap


def models_plot(
    names: Sequence[str], means: Sequence[float], owners: Sequence[Sequence[float]], merged: int, label: str
) -> str:
    """One row per model: a diamond for the mean, a small circle per owner; row `merged` stands out."""
    with plain_style():
        figure, axes = new_axes(height_inches=0.6 + 0.3 * len(names))
        places = range(len(names))[::-1]
        for row, place in enumerate(places):
            colour = ACCENT if row == merged else PALETTE[0]
            if owners[row]:
                axes.plot([min(owners[row]), max(owners[row])], [place, place], color=INK, alpha=0.35, linewidth=1)
                alpha = 1.0 if len(owners[row]) <= MANY_CIRCLES else 0.3
                axes.plot(
                    owners[row], [place] * len(owners[row]), "o", color=INK, fillstyle="none", markersize=4, alpha=alpha
                )
            axes.plot(means[row], place, "D", color=colour, markersize=9 if row == merged else 7)
        axes.set_yticks(list(places), [*map(short, names)])
        axes.set_ylim(-0.6, len(names) - 0.4)  # room for the diamonds of the first and the last row
        axes.get_yticklabels()[merged].set_fontweight("bold")
        axes.set_xlabel(label)
        axes.grid(axis="x", color=INK, alpha=0.15)
        return as_svg(figure, "models")


def sweep_plot(name: str, values: Sequence[float], curves: Mapping[str, Sequence[float]], chosen: int) -> str:
    """One curve per metric over the hyperparameter's values, evenly spaced; the chosen value is ringed."""
    with plain_style():
        figure, axes = new_axes(height_inches=2.4)
        places = list(range(len(values)))
        axes.axvline(chosen, color=INK, alpha=0.35, linewidth=1)
        for (label, heights), colour, marker, line in zip(
            curves.items(), PALETTE, "osv", ("-", "--", ":"), strict=False
        ):
            axes.plot(places, heights, marker=marker, linestyle=line, color=colour, label=label)
            axes.plot(chosen, heights[chosen], "o", color=ACCENT, fillstyle="none", markersize=13, markeredgewidth=2)
        axes.set_xticks(places, [f"{value:g}" for value in values])
        axes.margins(x=0.1, y=0.2)
        axes.grid(axis="y", color=INK, alpha=0.15)
        axes.legend(loc="best")
        return as_svg(figure, f"sweep-{name}")


def stacked_plot(
    name: str, rows: Sequence[str], parts: Mapping[str, Sequence[float]], label: str, other: str | None = None
) -> str:
    """One bar per row, cut into parts that differ by colour and hatch; part `other` is grey."""
    with plain_style():
        figure, axes = new_axes(height_inches=1.0 + 0.3 * len(rows) + 0.2 * (len(parts) // 3))
        places = list(range(len(rows)))[::-1]
        starts = [0.0] * len(rows)
        for index, (part, values) in enumerate(parts.items()):
            style: dict[str, Any] = {"color": OTHERS}
            if part != other:
                style = {"color": PALETTE[index % len(PALETTE)], "hatch": HATCHES[index % len(HATCHES)]}
            axes.barh(places, values, left=starts, label=part, edgecolor=INK, linewidth=0.5, height=0.65, **style)
            starts = [start + value for start, value in zip(starts, values, strict=True)]
        axes.set_yticks(places, [*map(short, rows)])
        axes.set_xlabel(label)
        handles, labels = axes.get_legend_handles_labels()
        order = _read_by_row(len(labels), LEGEND_COLUMNS)
        figure.legend(
            [handles[index] for index in order],
            [short(labels[index]) for index in order],
            loc="outside upper left",
            ncols=LEGEND_COLUMNS,
            handlelength=1.4,
            columnspacing=1,
            fontsize=9,
        )
        return as_svg(figure, name)


def _read_by_row(entries: int, columns: int) -> list[int]:
    """The order in which a legend, which fills column by column, must get its entries to be read row by row."""
    return [index for column in range(columns) for index in range(column, entries, columns)]
