"""One fit for every law that is linear in some coefficients: variable projection over a grid that shrinks.

Source: Golub and Pereyra, "The differentiation of pseudo-inverses and nonlinear least squares problems whose variables
separate", SIAM J. Numer. Anal. 1973. What is left is searched by grids rather than their Gauss-Newton, because broken
laws have several minima; all resamples of a bootstrap are searched at once.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparsecod_megatron.studies.forms import Array, Form

SHRINKS, SHRINK = (2, 2, 8), 0.35
"""How often, and to which share, the grid around the best point is made smaller: first along the coefficients, then
twice along directions in which they err independently, or narrow valleys would take thousands of moves."""
RESAMPLE_SHRINKS = 5
"""How often that of a resample is, which starts at twice a standard error and ends at a hundredth of it."""
MOVES = 200
"""Largest number of grids in all: one whose best point lies at its edge is moved first."""
DIFFERENCE = 1e-5
"""Distance between the points of a numerical derivative, as a share of the search's width."""
RESAMPLES_AT_ONCE = 100
RIDGE = 1e-14
"""Share of a column's squared length that keeps columns which have become equal from being singular."""


@dataclass(frozen=True)
class Fitted:
    """Coefficients of every resample.

    Attributes:
        theta: [resamples, θ] searched ones, of variables divided by their geometric means.
        linear: [resamples, k] the others.
        squares: [resamples] weighted sums of squared residuals.
    """

    theta: Array
    linear: Array
    squares: Array


@dataclass(frozen=True)
class Problem:
    """Points, and where to search.

    Attributes:
        form: of the law.
        log_x: [variables, points] logarithms, with mean 0 over the points that set the scale.
        y: [points] what is fitted.
        weights: [points] of the squared residuals.
        low: [θ] lower ends of the search, logarithms where the form says so.
        high: [θ] upper ends.
    """

    form: Form
    log_x: Array
    y: Array
    weights: Array
    low: Array
    high: Array

    @classmethod
    def of(cls, form: Form, log_x: Array, y: Array, weights: Array) -> Problem:
        """The search that the form and the places of the points give."""
        distinct = np.unique(log_x[0])
        inner = distinct[[min(2, len(distinct) - 1), max(-3, -len(distinct))]]
        ends = [
            inner if item.is_place else np.log([item.low, item.high]) if item.is_log else (item.low, item.high)
            for item in form.nonlinear
        ]
        low, high = np.array(ends, dtype=np.float64).reshape(-1, 2).T
        return cls(form, log_x, y, weights, low, high)

    @property
    def _is_log(self) -> npt.NDArray[np.bool_]:
        return np.array([item.is_log for item in self.form.nonlinear], dtype=bool)

    def theta(self, place: Array) -> Array:
        """Coefficients at places of the search."""
        return np.where(self._is_log, np.exp(np.where(self._is_log, place, 0.0)), place)

    def place(self, theta: Array) -> Array:
        """Places of the search where the coefficients have these values."""
        return np.where(self._is_log, np.log(np.where(self._is_log, theta, 1.0)), theta)

    def columns(self, place: Array) -> Array:
        """The φ_k at [..., θ], times the roots of the points' weights: [..., points, k]."""
        found = np.stack(self.form.columns(self.log_x, self.theta(place)), axis=-1)
        return found * np.sqrt(self.weights)[:, None]

    def solve(self, place: Array, y: Array) -> tuple[Array, Array]:
        """Linear coefficients and sums of squares.

        Args:
            place: [resamples or 1, grid, θ] of the search.
            y: [resamples, points] values.

        Returns:
            [resamples, grid, k] and [resamples, grid].
        """
        return bounded_least_squares(
            self.columns(place), (y * np.sqrt(self.weights))[:, None, :], self.form.nonnegative
        )


def fit_separable(problem: Problem) -> Fitted:
    """The best coefficients of the points: the grid's best point, then grids around it.

    Returns:
        One resample, the points themselves.
    """
    counts = [item.count for item in problem.form.nonlinear]
    axes = [np.linspace(low, high, count) for low, high, count in zip(problem.low, problem.high, counts, strict=True)]
    grid = np.array(list(itertools.product(*axes)), dtype=np.float64).reshape(math.prod(counts), len(counts))
    _, squares = problem.solve(grid[None], problem.y[None])
    place = grid[np.argmin(squares)]
    steps = np.diag((problem.high - problem.low) / np.maximum(np.array(counts) - 1, 1))
    for shrinks in SHRINKS:
        fitted = _search(problem, place, steps, problem.y[None], shrinks)
        place, steps = problem.place(fitted.theta[0]), _standard_errors(problem, fitted)
    return fitted


def refit(problem: Problem, fitted: Fitted, y: Array) -> Fitted:
    """The best coefficients of resamples, from those of the points, by steps of their standard errors.

    Args:
        problem: points and search.
        fitted: of the points themselves.
        y: [resamples, points] values.
    """
    start = problem.place(fitted.theta[0])
    steps = _standard_errors(problem, fitted)
    parts = [
        _search(problem, start, steps, y[first : first + RESAMPLES_AT_ONCE], RESAMPLE_SHRINKS)
        for first in range(0, len(y), RESAMPLES_AT_ONCE)
    ]
    return Fitted(
        np.concatenate([part.theta for part in parts]),
        np.concatenate([part.linear for part in parts]),
        np.concatenate([part.squares for part in parts]),
    )


def leverage(problem: Problem, fitted: Fitted) -> Array:
    """How much each point determines what is said of itself, from 0 to 1: [points]."""
    columns = problem.columns(problem.place(fitted.theta[0]))
    length = np.sqrt(np.sum(columns**2, axis=0))
    jacobian = np.concatenate([columns / np.where(length > 0, length, 1.0), _slopes(problem, fitted).T], axis=1)
    left, sizes, _ = np.linalg.svd(jacobian, full_matrices=False)
    return np.sum(left[:, sizes > sizes[0] * np.sqrt(RIDGE)] ** 2, axis=1)


def _search(problem: Problem, start: Array, steps: Array, y: Array, shrinks: int) -> Fitted:
    """Grids around each resample's best point, moved while that is at an edge and shrunk where it is inside.

    Args:
        problem: points and search.
        start: [θ] place.
        steps: [θ, θ] a row for every direction of the grid.
        y: [resamples, points].
        shrinks: how often it is made smaller.
    """
    best, scale = np.tile(start, (len(y), 1)), np.ones(len(y))
    offsets = np.array(list(itertools.product(*[(-1, 0, 1)] * len(start))), dtype=np.float64)
    times = np.full(len(y), 0 if len(start) else shrinks)
    for _ in range(MOVES):
        active = np.flatnonzero(times < shrinks)
        if not len(active):
            break
        moves = (offsets @ steps) * scale[active, None, None]
        places = np.clip(best[active, None] + moves, problem.low, problem.high)
        _, squares = problem.solve(places, y[active])
        chosen = np.argmin(squares, axis=1)
        found = places[np.arange(len(active)), chosen]
        stays = (np.abs(offsets[chosen]).max(axis=1) < 1) | (found == best[active]).all(axis=1)
        best[active] = found
        scale[active[stays]] *= SHRINK
        times[active[stays]] += 1
    linear, squares = problem.solve(best[:, None], y)
    return Fitted(problem.theta(best), linear[:, 0], squares[:, 0])


def _slopes(problem: Problem, fitted: Fitted) -> Array:
    """[θ, points] change of what the law says, where the linear coefficients follow, per width of the search."""
    if not problem.form.nonlinear:
        return np.zeros((0, len(problem.y)))
    width = np.diag(problem.high - problem.low) * DIFFERENCE
    place = problem.place(fitted.theta[0])
    near = np.clip(place + np.concatenate([width, -width]), problem.low, problem.high)
    linear, _ = problem.solve(near[None], problem.y[None])
    above, below = np.split(np.einsum("gnk,gk->gn", problem.columns(near), linear[0]), 2)
    slopes: Array = (above - below) / (2 * DIFFERENCE)
    return slopes


def _standard_errors(problem: Problem, fitted: Fitted) -> Array:
    """[θ, θ] directions in which the coefficients err independently, each as long as twice its standard error."""
    slopes = _slopes(problem, fitted)
    curvature, axes = np.linalg.eigh(slopes @ slopes.T)
    noise = fitted.squares[0] / max(len(problem.y) - problem.form.num_coefficients, 1)
    # One that changes less than the noise is as long as the search is wide.
    length = 2 * np.sqrt(noise / np.maximum(curvature, max(noise, np.finfo(float).tiny)))
    return (axes * np.maximum(length, 1e-9)).T * (problem.high - problem.low)


def bounded_least_squares(columns: Array, y: Array, nonnegative: tuple[bool, ...]) -> tuple[Array, Array]:
    """Least squares for a batch of few columns, some of whose coefficients are at least zero.

    With few columns every set of those at zero can be tried, which is exact.

    Args:
        columns: [..., points, k].
        y: [..., points]; the batches broadcast.
        nonnegative: for each column whether its coefficient is at least zero.

    Returns:
        Coefficients [..., k] and sums of squared residuals [...].
    """
    length = np.sqrt(np.mean(columns**2, axis=-2, keepdims=True))
    length = np.where(length > 0, length, 1.0)
    columns = columns / length
    turned = np.swapaxes(columns, -1, -2)
    right = (turned @ y[..., None])[..., 0]
    gram = np.broadcast_to(turned @ columns, (*right.shape, right.shape[-1]))
    gram, flat = gram.reshape(-1, *gram.shape[-2:]), right.reshape(-1, right.shape[-1])
    found = _solved(gram, flat)
    bounded = np.flatnonzero(nonnegative)
    outside = np.flatnonzero((found[:, bounded] < 0).any(axis=1))
    if len(outside):
        found[outside] = _on_the_bounds(gram[outside], flat[outside], bounded)
    found = found.reshape(right.shape)
    residuals = y - (columns @ found[..., None])[..., 0]
    return found / length[..., 0, :], np.sum(residuals**2, axis=-1)


def _solved(gram: Array, right: Array) -> Array:
    ridge = RIDGE * np.maximum(np.einsum("bkk->bk", gram).max(axis=1), np.finfo(float).tiny)
    damped = gram + ridge[:, None, None] * np.eye(gram.shape[-1])
    solution: Array = np.linalg.solve(damped, right[..., None])[..., 0]
    return solution


def _on_the_bounds(gram: Array, right: Array, bounded: npt.NDArray[np.intp]) -> Array:
    """The best of the solutions with some bounded coefficients at zero and none below."""
    best, gain = np.zeros_like(right), np.full(len(right), -np.inf)
    for number in range(1, len(bounded) + 1):
        for zeros in itertools.combinations(bounded, number):
            kept = np.setdiff1d(np.arange(right.shape[-1]), zeros)
            found = np.zeros_like(right)
            if len(kept):
                found[:, kept] = _solved(gram[:, kept[:, None], kept], right[:, kept])
            reduction = np.einsum("bk,bk->b", right, found)
            is_better = (found[:, bounded] >= 0).all(axis=1) & (reduction > gain)
            best[is_better], gain[is_better] = found[is_better], reduction[is_better]
    return best
