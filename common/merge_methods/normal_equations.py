"""The linear systems that RegMean solves, for Gram matrices made of inputs or of weight changes.

    H_i = alpha G_i + (1 - alpha) diag(G_i)
    (sum H_i) delta^T = sum H_i delta_i^T

Summed over owners: G, and for each layer that shares it G delta^T. When several alphas are to be tried, diag(G) delta^T
is summed too, so the coordinator solves for every alpha without another round.

Ridge. Every owner adds ridge * mean(diag G_i) to its diagonal, in the Gram and in the products alike. Their sums then
pull the merged delta toward the owners' mean delta, each weighted by its mean diagonal, never toward zero weights. The
ridge costs no bytes, and with ridge = 0 the equations above hold exactly.

A solve ends in one of four ways, reported per system:
    solved       one Cholesky factorisation for all the layers that share the Gram
    singular     no owner's Gram reaches some directions: there the layer keeps the base's behaviour (least norm delta)
    indefinite   negative eigenvalues, which no honest sum of Grams has: those directions keep the base's behaviour
    empty        a Gram of zeros, for example of an expert that no token reaches: the layer keeps the base's weights
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from numpy.typing import NDArray

from common.lazy import lazy_module
from common.merge_methods.equations import Equation, product
from common.merge_methods.terms import LayerNote, MergeSettings, to_array
from common.models.layers import Layer
from common.summation.fixed_point import fraction_bits
from common.summation.totals import SummedTensors
from common.tensor_layout import TensorEntry

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

ALPHA_SUMMARY = (
    "Alpha is how much of a Gram matrix's off-diagonal is kept: 1 is plain least squares, 0 keeps the diagonal alone."
)
FLOOR = 2.0**10  # times the rounding of a sum: a layer that nobody's rows reach is then exact to a thousandth
FLOOR_ROOM = 0.25  # what floors may add to a Gram, relative to it, before somebody calls it too large
SURE_PIVOT = 1e-10  # squared pivot of a Cholesky factor, relative to the diagonal; rounding leaves far less of a zero


@dataclass(frozen=True, kw_only=True)
class System:
    """One Gram, and the layers that are solved with it."""

    name: str
    kind: str  # prefix of the tensors' names, for what the Gram is made of; empty for inputs
    gram_size: int
    layers: tuple[Layer, ...]
    alphas: tuple[float, ...]

    def entries(self, bound: float, product_bound: float, noise: float = 0.0) -> Iterator[TensorEntry]:
        """The tensors that are summed. The bounds hold for what one owner adds to an entry of Gram and products.

        `noise`: of the Gram. Products are made of the noised Gram, so they need none (terms.GramNoise).
        """
        square, gram = (self.gram_size, self.gram_size), f"{self.kind}gram/{self.name}"
        yield TensorEntry(name=gram, shape=square, bound=bound, packing="symmetric", noise=noise)
        for layer in self.layers:
            shape = (self.gram_size, layer.d_out)
            for term in ("gram_delta", "diagonal_delta") if len(self.alphas) > 1 else ("gram_delta",):
                name = f"{self.kind}{term}/{layer.weight}"
                yield TensorEntry(name=name, shape=shape, bound=product_bound, product_of=gram)

    def tensors(self, gram: Tensor, delta: Mapping[str, Tensor], pull: float = 0.0) -> Iterator[tuple[str, NDArray]]:
        """One owner's part. `gram` (gram_size, gram_size) float64 includes the ridge; `delta` is by parameter name.

        `pull`: what the products have on the diagonal more than the Gram, so that the ridge pulls further.
        """
        yield f"{self.kind}gram/{self.name}", to_array(gram)
        if pull:
            gram.diagonal().add_(pull)
        if len(self.alphas) == 1:
            gram = gram.clone()  # what was given is read by whoever takes the tensors
            _keep_of_off_diagonal(gram, *self.alphas)
        diagonal = gram.diagonal()[:, None]  # (gram_size, 1)
        for layer in self.layers:
            own = layer.take(delta).double()  # (gram_size, d_out)
            yield f"{self.kind}gram_delta/{layer.weight}", to_array(gram @ own)
            if len(self.alphas) > 1:
                yield f"{self.kind}diagonal_delta/{layer.weight}", to_array(diagonal * own)

    def solve(
        self, total: SummedTensors, alpha: float, rows: int | None, with_spectrum: bool = True, device: str = "cpu"
    ) -> tuple[dict[str, Tensor], LayerNote]:
        """The merged deltas by layer (see `layers.join_slices`), float64, and how the solve went. `rows`: those behind
        the Gram.

        Eigenvalues cost more than the solve itself, so a sweep does without.
        """
        error = torch.from_numpy(total.diagonal_error(f"{self.kind}gram/{self.name}"))  # (gram_size,)
        return self.solve_sides(*self.sides(total, alpha), error, rows, with_spectrum, device)

    def solve_sides(
        self,
        gram: Tensor,
        products: Tensor,
        error: Tensor,
        rows: int | None,
        with_spectrum: bool,
        device: str,
    ) -> tuple[dict[str, Tensor], LayerNote]:
        """The same for given sides; `error`: see `solve_symmetric`."""
        solved, status, unseen = solve_symmetric(gram, products, error, device)  # (gram_size, sum of d_out)
        condition, effective_rank = spectrum(gram, device) if with_spectrum else (None, None)
        note = LayerNote(
            name=self.name,
            status=status,
            d_in=self.layers[0].d_in,
            gram_size=self.gram_size,
            rows=rows,
            condition=condition,
            effective_rank=effective_rank,
            unseen_directions=unseen,
        )
        merged: dict[str, Tensor] = {}
        parts = solved.split([layer.d_out for layer in self.layers], dim=1)
        for layer, part in zip(self.layers, parts, strict=True):
            merged |= layer.give(part)
        return merged, note

    def sides(self, summed: SummedTensors, alpha: float) -> tuple[Tensor, Tensor]:
        """H, (gram_size, gram_size), and H delta^T, (gram_size, sum of d_out), float64: of a total or of one owner."""
        gram = torch.from_numpy(summed[f"{self.kind}gram/{self.name}"])
        _keep_of_off_diagonal(gram, alpha)
        return gram, torch.cat([self._product(summed, layer, alpha) for layer in self.layers], dim=1)

    def _product(self, total: SummedTensors, layer: Layer, alpha: float) -> Tensor:
        product = torch.from_numpy(total[f"{self.kind}gram_delta/{layer.weight}"])  # (gram_size, d_out)
        if len(self.alphas) == 1:
            return product
        return alpha * product + (1 - alpha) * torch.from_numpy(total[f"{self.kind}diagonal_delta/{layer.weight}"])


@dataclass(frozen=True, kw_only=True)
class SystemEquation(Equation):
    """H D = sum of H_i delta_i^T, of all the layers that share one Gram."""

    system: System
    alpha: float

    @classmethod
    def of(cls, system: System, alpha: float) -> SystemEquation:
        shape = (system.gram_size, sum(layer.d_out for layer in system.layers))
        return cls(name=f"{system.kind}gram/{system.name}", shape=shape, system=system, alpha=alpha)

    def part_of(self, delta: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([layer.take(delta) for layer in self.system.layers], dim=1)

    def sides(self, summed: SummedTensors, factor: float) -> tuple[Tensor, Tensor]:
        return self.system.sides(summed, self.alpha)


def _keep_of_off_diagonal(gram: Tensor, alpha: float) -> None:
    """alpha G + (1 - alpha) diag(G), in place."""
    diagonal = gram.diagonal().clone()
    gram.mul_(alpha)
    gram.diagonal().copy_(diagonal)


def add_floor(gram: Tensor, settings: MergeSettings, bound: float, product_bound: float) -> Tensor:
    """Make the owners' sum positive definite whatever they contribute, so that the merge has exactly one value.

    In place, unless the agreement turns verification off. Every owner adds FLOOR * d times the rounding of one number
    of Gram or products to the diagonal; d of these roundings are the most by which an eigenvalue of the sum can be off.
    Where no owner's rows reach, the layer then takes the owners' mean change. With 32 bits the rounding is relative to
    the diagonal, up to 4 times as much because scales are powers of two.
    """
    if not settings.has_floors:
        return gram
    owners, dimension = settings.num_owners, len(gram)
    if settings.ring_bits == 32:
        rounding = owners * 0.5 ** fraction_bits(1.0, owners, 32)
        gram.diagonal().mul_(1 + 8 * dimension * rounding)
    bits = min(fraction_bits(bound, owners), fraction_bits(product_bound, owners))
    gram.diagonal().add_(FLOOR * dimension * 0.5**bits)
    return gram


def add_ridge(gram: Tensor, ridge: float) -> Tensor:
    """G + ridge * mean(diag G) * I, in place."""
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    return gram


def gram_room(settings: MergeSettings) -> float:
    """By which factor ridge and floors may exceed what a Gram is of, before somebody calls it too large."""
    return 1 + FLOOR_ROOM + max(float(getattr(table, "ridge", 0.0)) for table in settings.tables.values())


def notes_on(layers: Iterable[LayerNote]) -> tuple[str, ...]:
    """What a reader should know about every solve that did not simply work."""
    return tuple(
        f"{note.name}: {note.status}; {note.unseen_directions} of {note.gram_size} directions keep the base's behaviour"
        for note in layers
        if note.status != "solved"
    )


def solve_symmetric(
    matrix: Tensor, right: Tensor, error: Tensor | None = None, device: str = "cpu"
) -> tuple[Tensor, str, int]:
    """Solve matrix @ x = right, float64, on `device`. Returns (x, status, number of directions left out).

    A matrix that is numerically positive definite takes one Cholesky factorisation. Any other gets the minimum norm
    solution over the directions whose eigenvalue is clearly positive. That is exact for a singular sum of Grams, whose
    products lie in those directions, and harmless otherwise. `error` (d,): how far each number on the diagonal may be
    off; number [j, k] is off by at most the geometric mean of errors j and k.
    """
    error = torch.zeros(len(matrix)) if error is None else error
    solved, status, unseen = _solve(matrix.to(device), right.to(device), error.to(device))
    return solved.cpu(), status, unseen


def _solve(matrix: Tensor, right: Tensor, error: Tensor) -> tuple[Tensor, str, int]:
    dimension = len(matrix)
    tolerance = dimension * torch.finfo(matrix.dtype).eps
    diagonal = matrix.diagonal()
    if not matrix.any():
        return torch.zeros_like(right), "empty", dimension
    factor, failed = torch.linalg.cholesky_ex(matrix)
    # L_jj^2 is the part of direction j that the directions before it leave unexplained. Rounding adds to it, all the
    # more where those are nearly singular. Where that leaves doubt, eigenvalues decide, which cost more.
    # With the matrix scaled so that all errors are equal, they add up to `dimension` times the error, and L_jj^2 scales
    # along.
    if not failed and (factor.diagonal() ** 2 > SURE_PIVOT * diagonal + dimension * error).all():
        return _refined(matrix, right, lambda each: torch.cholesky_solve(each, factor)), "solved", 0
    values, vectors = torch.linalg.eigh(matrix)
    noise = 10 * tolerance * values.abs().max() + error.sum()
    kept = values > noise
    indefinite = bool((values < -noise).any())
    basis = vectors[:, kept]

    def solve_kept(each: Tensor) -> Tensor:
        solved: Tensor = basis @ ((basis.T @ each) / values[kept, None])
        return solved

    if kept.all():
        return _refined(matrix, right, solve_kept), "solved", 0
    return solve_kept(right), "indefinite" if indefinite else "singular", int((~kept).sum())


def _refined(matrix: Tensor, right: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
    """The solution after one step of refinement, so that every row fits to rounding (Higham 2002, theorem 12.4)."""
    solved = solve(right)
    solved += solve(right - product(matrix, solved))
    return solved


def spectrum(matrix: Tensor, device: str = "cpu") -> tuple[float | None, float | None]:
    """Condition number, and effective rank (Roy and Vetterli, 2007: the exponential of the spectrum's entropy)."""
    values = torch.linalg.eigvalsh(matrix.to(device)).cpu()
    condition = float(values[-1] / values[0]) if values[0] > 0 else None
    shares = values.clamp(min=0) / values.clamp(min=0).sum()
    shares = shares[shares > 0]
    effective_rank = float(torch.exp(-(shares * shares.log()).sum())) if len(shares) else None
    return condition, effective_rank
