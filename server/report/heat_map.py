"""The heat map of the layers: a row per Gram matrix, a column per number, tinted between its column's extremes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log10

from server.report.report import Change, Layer, Report

NO_NUMBER = "\u2013"
STEPS = 6  # tints of one colour in page.css, .heat-1 to .heat-6; .heat-0 has none


@dataclass(frozen=True, kw_only=True)
class Column:
    """`is_logarithmic`: whether the tint goes by the order of magnitude."""

    heading: str
    meaning: str
    form: str
    of_layer: Callable[[Layer], float | None] | None = None
    of_change: Callable[[Change], float | None] | None = None
    is_logarithmic: bool = False

    def value(self, layer: Layer | None, change: Change) -> float | None:
        if self.of_change:
            return self.of_change(change)
        return self.of_layer(layer) if self.of_layer and layer else None


COLUMNS = (
    Column(
        heading="Token rows",
        meaning="Rows of all owners that the Gram matrix sums, one per token or patch",
        form="{:,.0f}",
        of_layer=lambda layer: layer.token_rows,
    ),
    Column(
        heading="Condition",
        meaning="Largest eigenvalue by smallest. Above about 1e10, some directions depend on the ridge alone",
        form="{:.2g}",
        of_layer=lambda layer: layer.condition,
        is_logarithmic=True,
    ),
    Column(
        heading="Effective rank",
        meaning="How many directions the inputs really use",
        form="{:.1f}",
        of_layer=lambda layer: layer.effective_rank,
    ),
    Column(
        heading="Unseen directions",
        meaning="How many directions no input had",
        form="{:.0f}",
        of_layer=lambda layer: layer.unseen_directions,
    ),
    Column(
        heading="Change from base",
        meaning="|merged \u2212 base| / |base|, in Frobenius norms",
        form="{:.1%}",
        of_change=lambda change: change.change,
        is_logarithmic=True,
    ),
    Column(
        heading="Distance from average",
        meaning="|merged \u2212 average| / |average \u2212 base|, in Frobenius norms",
        form="{:.1%}",
        of_change=lambda change: change.from_average,
        is_logarithmic=True,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """`text` on tint `step`, from 0 for none to STEPS."""

    text: str
    step: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One Gram matrix; `status` says how its solve went."""

    name: str
    status: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Only columns that have a number somewhere."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    @property
    def is_coloured(self) -> bool:
        return any(cell.step for row in self.rows for cell in row.cells)

    @property
    def logarithmic(self) -> list[str]:
        """The columns that are tinted by order of magnitude, in mid-sentence."""
        return [column.heading.lower() for column in self.columns if column.is_logarithmic]


def heat_map(report: Report) -> HeatMap:
    layers = {layer.name: layer for layer in report.layers}
    both = [(layers.get(change.name), change) for change in report.changes]
    numbers = {column: [column.value(layer, change) for layer, change in both] for column in COLUMNS}
    shown = [column for column in COLUMNS if any(value is not None for value in numbers[column])]
    cells = [_cells(column, numbers[column]) for column in shown]  # by column, then by row
    return HeatMap(
        columns=tuple(shown),
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
    return [
        Cell(text=NO_NUMBER if value is None else column.form.format(value), step=step)
        for value, step in zip(values, tints(values, column.is_logarithmic), strict=True)
    ]


def tints(values: Sequence[float | None], is_logarithmic: bool) -> list[int]:
    """The tint of each number of a column: 0 for the smallest, STEPS for the largest; 0 for all if they are the same.

    By the order of magnitude, zero has no tint either.
    """
    scaled = [_scaled(value, is_logarithmic) for value in values]
    known = [value for value in scaled if value is not None]
    if not known or min(known) == max(known):
        return [0] * len(values)
    low, high = min(known), max(known)
    return [0 if value is None else round(STEPS * (value - low) / (high - low)) for value in scaled]


def _scaled(value: float | None, is_logarithmic: bool) -> float | None:
    if value is None or not is_logarithmic:
        return value
    return log10(value) if value > 0 else None
