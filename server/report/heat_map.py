"""The heat map of the layers: a row per Gram matrix, a column per number, coloured between its column's extremes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log10

import matplotlib as mpl

from server.report.report import Change, Layer, Report

NO_NUMBER = "\u2013"


@dataclass(frozen=True, kw_only=True)
class Column:
    """`is_logarithmic`: whether the colour goes by the order of magnitude."""

    heading: str
    form: str
    of_layer: Callable[[Layer], float | None] | None = None
    of_change: Callable[[Change], float | None] | None = None
    is_logarithmic: bool = False

    def value(self, layer: Layer | None, change: Change) -> float | None:
        if self.of_change:
            return self.of_change(change)
        return self.of_layer(layer) if self.of_layer and layer else None


COLUMNS = (
    Column(heading="Token rows", form="{:,.0f}", of_layer=lambda layer: layer.token_rows),
    Column(heading="Condition", form="{:.2g}", of_layer=lambda layer: layer.condition, is_logarithmic=True),
    Column(heading="Effective rank", form="{:.1f}", of_layer=lambda layer: layer.effective_rank),
    Column(heading="Unseen directions", form="{:.0f}", of_layer=lambda layer: layer.unseen_directions),
    Column(heading="Change from base", form="{:.1%}", of_change=lambda change: change.change),
    Column(heading="Distance from average", form="{:.1%}", of_change=lambda change: change.from_average),
)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """`text` on a ground of `colour`, in `ink` that is readable on it."""

    text: str
    colour: str
    ink: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One Gram matrix; `status` says how its solve went."""

    name: str
    status: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Only columns that have a number somewhere."""

    headings: tuple[str, ...]
    rows: tuple[Row, ...]


def heat_map(report: Report) -> HeatMap:
    layers = {layer.name: layer for layer in report.layers}
    both = [(layers.get(change.name), change) for change in report.changes]
    numbers = {column: [column.value(layer, change) for layer, change in both] for column in COLUMNS}
    shown = [column for column in COLUMNS if any(value is not None for value in numbers[column])]
    cells = [_cells(column, numbers[column]) for column in shown]  # by column, then by row
    return HeatMap(
        headings=tuple(column.heading for column in shown),
        rows=tuple(
            Row(
                name=change.name,
                status=layer.status if layer else NO_NUMBER,
                cells=tuple(column_cells[index] for column_cells in cells),
            )
            for index, (layer, change) in enumerate(both)
        ),
    )


def _cells(column: Column, values: Sequence[float | None]) -> list[Cell]:
    cells = []
    for value, share in zip(values, _shares(values, column.is_logarithmic), strict=True):
        colour, ink = ("transparent", "inherit") if share is None else _heat(share)
        cells.append(Cell(text=NO_NUMBER if value is None else column.form.format(value), colour=colour, ink=ink))
    return cells


def _shares(values: Sequence[float | None], is_logarithmic: bool) -> list[float | None]:
    """Each number between the smallest (0) and the largest (1) of its column; None if all are the same."""
    scaled = [log10(value) if is_logarithmic and value else value for value in values]
    known = [value for value in scaled if value is not None]
    low, high = min(known), max(known)
    return [None if value is None or low == high else (value - low) / (high - low) for value in scaled]


def _heat(share: float) -> tuple[str, str]:
    """The cividis colour of a number from 0 to 1, and the ink that is readable on it."""
    red, green, blue, _ = mpl.colormaps["cividis"](share)
    ink = "#000000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.45 else "#ffffff"
    return mpl.colors.to_hex((red, green, blue)), ink
