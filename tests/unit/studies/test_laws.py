"""Laws against what was planted, against scipy, and against themselves in other units."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from scipy.optimize import least_squares, lsq_linear

from sparsecod_megatron.errors import ConfigError, DataError
from sparsecod_megatron.studies.forms import LAWS, Array, find_law
from sparsecod_megatron.studies.laws import LawFit, Points, fit_law
from sparsecod_megatron.studies.separable import Problem, bounded_least_squares, fit_separable, leverage

TOKENS = np.geomspace(0.5e9, 300e9, 14)
SIZES, BUDGETS = np.repeat(np.geomspace(5e7, 5e9, 6), 4), np.tile(np.geomspace(1e9, 1e11, 4), 6)
WIDTHS, DEPTHS, DATA = (
    axis.ravel() for axis in np.meshgrid(np.geomspace(128, 2048, 4), np.geomspace(4, 48, 4), np.geomspace(1e9, 1e11, 3))
)
LONG = np.geomspace(100, 1e5, 20)
RATIOS = np.linspace(20, 300, 16)


@dataclass(frozen=True)
class Plant:
    """A law's points without noise, by the formula as one would write it down."""

    variables: list[Array]
    formula: Callable[..., Array]
    coefficients: dict[str, float] = field(default_factory=dict)

    @property
    def values(self) -> Array:
        return self.formula(*self.variables, *self.coefficients.values())


def chinchilla(size: Array, tokens: Array, e: float, a: float, b: float, alpha: float, beta: float) -> Array:
    return e + a / size**alpha + b / tokens**beta


def broken(x: Array, a: float, b: float, c0: float, c1: float, d1: float, f1: float) -> Array:
    return a + b * x**-c0 * (1 + (x / d1) ** (1 / f1)) ** (-c1 * f1)


def by_terms(m: Array, l: Array, d: Array, e: float, *rest: float) -> Array:  # noqa: E741
    c_m, c_l, c_d, alpha_m, alpha_l, alpha_d = rest
    return e + c_m / m**alpha_m + c_l / l**alpha_l + c_d / d**alpha_d


_CHINCHILLA = Plant([SIZES, BUDGETS], chinchilla, {"E": 1.7, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28})
PLANTS = {
    "sparsing_silu": Plant(
        [TOKENS], lambda d, a, c, alpha: a - c * (d / 1e9) ** -alpha, {"A0": 0.404, "c": 0.2, "alpha": 0.5}
    ),
    "sparsing_relu": Plant(
        [TOKENS],
        lambda d, a, b, c, alpha: a + np.exp(b - c * (d / 1e9) ** alpha),
        {"A0": 0.0692, "b": -1.0, "c": 0.6, "alpha": 0.35},
    ),
    "chinchilla": _CHINCHILLA,
    "journey": _CHINCHILLA,
    "bnsl": Plant([LONG], broken, {"a": 0.3, "b": 5.0, "c0": 0.2, "c1": 0.6, "d1": 3000.0, "f1": 0.2}),
    "power": Plant([LONG], lambda x, a, b, c: a + b * x**-c, {"a": 0.3, "b": 5.0, "c": 0.4}),
    "line": Plant([RATIOS], lambda x, a, s: a + s * x, {"a": 0.2, "s": 0.001}),
    "width_depth": Plant(
        [RATIOS], lambda x, a, s, most: a + s * np.minimum(x, most), {"a": 0.2, "s": 0.001, "bottleneck": 114.0}
    ),
    "inverse_depth": Plant(
        [WIDTHS, DEPTHS, DATA],
        by_terms,
        {"L0": 1.7, "c_m": 40.0, "c_l": 2.0, "c_D": 300.0, "alpha_m": 0.9, "alpha_l": 1.1, "alpha_D": 0.3},
    ),
    "step_law_lr": Plant(
        [SIZES, BUDGETS], lambda n, d, k, p, q: k * n**p * d**q, {"K": 1.797, "p": -0.713, "q": 0.307}
    ),
    "step_law_batch": Plant([BUDGETS], lambda d, k, r: k * d**r, {"K": 0.581, "r": 0.571}),
}


def points(plant: Plant, values: Array | None = None, groups: Array | None = None) -> Points:
    values = plant.values if values is None else values
    groups = np.arange(len(values)) if groups is None else groups
    return Points(np.array(plant.variables), values, np.ones(len(values)), groups)


def fit(law: str, values: Array | None = None, *, resamples: int = 40, seed: int = 0) -> LawFit:
    return fit_law(law, points(PLANTS[law], values), num_resamples=resamples, seed=seed)


def found(fit: LawFit) -> dict[str, float | None]:
    return {name: interval.value for name, interval in fit.coefficients.items()}


def test_every_law_is_planted() -> None:
    assert PLANTS.keys() == LAWS.keys()


@pytest.mark.parametrize("law", LAWS)
def test_planted_coefficients_come_back(law: str) -> None:
    fitted = fit(law)
    assert fitted.form.name == law
    assert found(fitted) == pytest.approx(PLANTS[law].coefficients, rel=1e-3)
    assert fitted.residual < 1e-5
    if law != "bnsl":  # whose 14 smallest of 20 points may leave the break out
        assert fitted.held_out is not None and fitted.held_out.error < 1e-3


@pytest.mark.parametrize(("law", "noise", "resamples"), [("sparsing_silu", 5e-4, 80), ("chinchilla", 5e-3, 80)])
def test_intervals_cover(law: str, noise: float, resamples: int) -> None:
    """Of each coefficient at least 90 of 100, and not because they are wide: some are missed."""
    plant, covered = PLANTS[law], dict.fromkeys(PLANTS[law].coefficients, 0)
    for seed in range(100):
        noisy = plant.values + noise * np.random.default_rng(seed).standard_normal(len(plant.values))
        fitted = fit(law, noisy, resamples=resamples)
        for name, truth in plant.coefficients.items():
            covered[name] += fitted.coefficients[name].contains(truth)
    assert min(covered.values()) >= 90, covered
    assert min(covered.values()) < 100, covered


@pytest.mark.parametrize("law", ["chinchilla", "sparsing_relu", "bnsl", "inverse_depth"])
def test_noisy_fit_is_that_of_scipy(law: str) -> None:
    """Started at the truth, which the fit does not know."""
    plant = PLANTS[law]
    noisy = plant.values * np.exp(2e-3 * np.random.default_rng(7).standard_normal(len(plant.values)))
    truth = np.array(list(plant.coefficients.values()))
    scale = np.abs(truth)
    best = least_squares(
        lambda scaled: plant.formula(*plant.variables, *(scaled * scale)) - noisy, truth / scale, xtol=1e-14, ftol=1e-14
    )
    ours = found(fit(law, noisy))
    squares = np.sum((plant.formula(*plant.variables, *ours.values()) - noisy) ** 2)
    assert squares <= np.sum(best.fun**2) * (1 + 1e-6)
    assert list(ours.values()) == pytest.approx(list(best.x * scale), rel=1e-2)


@pytest.mark.parametrize(
    ("law", "moved"),
    [
        ("chinchilla", lambda c, s: c | {"B": c["B"] * s ** c["beta"]}),
        ("sparsing_silu", lambda c, s: c | {"c": c["c"] * s ** c["alpha"]}),
        ("sparsing_relu", lambda c, s: c | {"c": c["c"] * s ** -c["alpha"]}),
        ("bnsl", lambda c, s: c | {"b": c["b"] * s ** c["c0"], "d1": c["d1"] * s}),
        ("width_depth", lambda c, s: c | {"s": c["s"] / s, "bottleneck": c["bottleneck"] * s}),
        ("step_law_batch", lambda c, s: c | {"K": c["K"] * s ** -c["r"]}),
    ],
)
def test_units_change_factors_alone(law: str, moved: Callable[[dict[str, float], float], dict[str, float]]) -> None:
    """The last variable in other units, on data that no law fits exactly."""
    plant, factor = PLANTS[law], 1e-6
    noisy = plant.values * np.exp(2e-3 * np.random.default_rng(3).standard_normal(len(plant.values)))
    other = Plant([*plant.variables[:-1], plant.variables[-1] * factor], plant.formula)
    first = fit_law(law, points(plant, noisy), num_resamples=40)
    second = fit_law(law, points(other, noisy), num_resamples=40)
    assert found(second) == pytest.approx(moved(found(first), factor), rel=1e-6)  # type: ignore[arg-type]
    assert second.residual == pytest.approx(first.residual, rel=1e-6)
    assert second.held_out == pytest.approx(first.held_out) or second.held_out.error == pytest.approx(  # type: ignore[union-attr]
        first.held_out.error,
        rel=1e-4,  # type: ignore[union-attr]
    )


@pytest.mark.parametrize("noise", [0.0, 2e-3])
@pytest.mark.parametrize(
    ("law", "plain", "extra"), [("bnsl", "power", "a break"), ("width_depth", "line", "a bottleneck")]
)
def test_nothing_is_invented(law: str, plain: str, extra: str, noise: float) -> None:
    """Data of the simpler law get that law, and are told so; data with the feature keep it under the same noise."""
    for seed in range(4):
        random = np.random.default_rng(seed).standard_normal(len(PLANTS[plain].values))
        fitted = fit_law(law, points(PLANTS[plain], PLANTS[plain].values + noise * random), num_resamples=40)
        assert fitted.form.name == plain and fitted.asked == law
        assert f"no sign of {extra}" in fitted.notes[0]
        assert found(fitted) == pytest.approx(PLANTS[plain].coefficients, rel=1e-3 + 100 * noise)
        if law == "bnsl":
            assert fit(law, PLANTS[law].values + noise * random).form.name == law


def test_journey_of_dense_runs_is_chinchilla() -> None:
    noisy = _CHINCHILLA.values + 1e-3 * np.random.default_rng(0).standard_normal(len(SIZES))
    first, second = fit("chinchilla", noisy), fit("journey", noisy)
    assert first.coefficients == second.coefficients and first.held_out == second.held_out


def test_largest_left_out_is_the_error_of_a_fit_without_it() -> None:
    plant = PLANTS["power"]
    noisy = plant.values + 1e-2 * np.random.default_rng(1).standard_normal(len(LONG))
    rest = fit_law("power", points(Plant([LONG[:-1]], plant.formula), noisy[:-1]), num_resamples=40)
    said = plant.formula(LONG[-1], *found(rest).values())
    held_out = fit("power", noisy).held_out
    assert held_out is not None and held_out.count == 1
    assert held_out.predicted == pytest.approx(said) and held_out.measured == noisy[-1]
    assert held_out.error == pytest.approx(abs(said - noisy[-1]) / noisy[-1])


def test_a_largest_value_of_zero_has_a_json() -> None:
    values = np.array([4.0, 3.0, 2.5, 2.0, 1.0, 0.0])
    plant = Plant([np.arange(1.0, 7.0)], lambda *_: values)
    found = fit_law("line", points(plant), num_resamples=40).as_dict()
    assert found["largest_left_out"]["error"] is None and found["largest_left_out"]["count"] == 1
    json.dumps(found, allow_nan=False)


def test_coefficients_that_are_uncertain_together() -> None:
    noisy = _CHINCHILLA.values + 5e-3 * np.random.default_rng(0).standard_normal(len(SIZES))
    fitted = fit("chinchilla", noisy, resamples=300)
    names = list(fitted.coefficients)
    assert fitted.correlations[names.index("A"), names.index("alpha")] > 0.9
    assert any("A and alpha (+" in note for note in fitted.notes)
    said, low, high = fitted.curve.predict(np.array([SIZES, BUDGETS]))
    assert said == pytest.approx(chinchilla(SIZES, BUDGETS, *found(fitted).values()))  # type: ignore[arg-type]
    assert (low < said).all() and (said < high).all()


def test_runs_are_resampled_whole() -> None:
    """Points of one run that err together say less than as many that err alone."""
    plant = Plant([np.tile(RATIOS, 6)], PLANTS["line"].formula, PLANTS["line"].coefficients)
    runs = np.repeat(np.arange(6), len(RATIOS))
    noisy = plant.values + 0.05 * np.random.default_rng(0).standard_normal(6)[runs]
    alone = fit_law("line", points(plant, noisy), num_resamples=300).coefficients["a"]
    whole = fit_law("line", points(plant, noisy, runs), num_resamples=300).coefficients["a"]
    assert None not in (*alone, *whole)
    assert whole.high - whole.low > 2 * (alone.high - alone.low)  # type: ignore[operator]


def test_weights_count_as_repeated_points() -> None:
    plant = PLANTS["power"]
    noisy = plant.values + 1e-2 * np.random.default_rng(1).standard_normal(len(LONG))
    counts = np.random.default_rng(2).integers(1, 4, len(LONG))
    weighted = Points(LONG[None], noisy, counts / counts.mean(), np.arange(len(LONG)))
    repeated = points(Plant([np.repeat(LONG, counts)], plant.formula), np.repeat(noisy, counts))
    first, second = (fit_law("power", each, num_resamples=40) for each in (weighted, repeated))
    assert found(first) == pytest.approx(found(second), rel=1e-5)


def test_bounded_least_squares_is_that_of_scipy() -> None:
    random = np.random.default_rng(0)
    columns, values = random.standard_normal((40, 9, 4)), random.standard_normal((40, 9))
    ours, squares = bounded_least_squares(columns, values, (True, False, True, True))
    at_bound = 0
    for each, value, solution, square in zip(columns, values, ours, squares, strict=True):
        best = lsq_linear(each, value, ([0, -np.inf, 0, 0], np.inf), tol=1e-13)
        assert solution == pytest.approx(best.x, abs=1e-6)
        assert square == pytest.approx(2 * best.cost)
        at_bound += (solution == 0).any()
    assert 10 < at_bound < 40


def test_leverage_of_a_line_is_that_of_the_hat_matrix() -> None:
    log_x = np.log(RATIOS)[None]
    weights = np.linspace(0.5, 1.5, len(RATIOS))
    problem = Problem.of(LAWS["line"], log_x, RATIOS, weights)
    columns = np.stack([np.ones_like(RATIOS), RATIOS], axis=1) * np.sqrt(weights)[:, None]
    hat = columns @ np.linalg.inv(columns.T @ columns) @ columns.T
    assert leverage(problem, fit_separable(problem)) == pytest.approx(np.diag(hat))


def test_a_term_that_is_not_there_is_said() -> None:
    values = 1.7 + 1e-9 * SIZES**0.5 + 410.7 * BUDGETS**-0.28  # larger models are a little worse
    fitted = fit("chinchilla", values)
    assert fitted.coefficients["A"].value == 0
    assert "a term is zero, at the bound of its coefficient: these points give no sign of it" in fitted.notes


@pytest.mark.parametrize(
    ("law", "variables", "values", "message"),
    [
        ("power", [LONG[:4]], LONG[:4], "law power: 4 points for 3 coefficients; give 5 or more"),
        ("bnsl", [LONG[:7]], LONG[:7], "law bnsl: 7 points for 6 coefficients; give 8 or more"),
        ("power", [LONG - 100], LONG, "law power: x is 0 at a point; it has to be above 0"),
        ("chinchilla", [SIZES, SIZES * 0 + 5], SIZES, "law chinchilla: D takes 1 different values; give 3 or more"),
        ("step_law_batch", [LONG], -LONG, "law step_law_batch: the value is -100000 at a point; it has to be above 0"),
    ],
)
def test_refused(law: str, variables: list[Array], values: Array, message: str) -> None:
    with pytest.raises(DataError, match=f"^{message}$"):
        fit_law(law, points(Plant(variables, lambda *_: values), values))


def test_unknown_law() -> None:
    with pytest.raises(ConfigError, match="law 'kaplan': not known; choose one of chinchilla, journey"):
        find_law("kaplan")
    with pytest.raises(ConfigError, match="--x a: law journey is a function of N̄,D; name a column for each"):
        find_law("journey").check_variables("--x", ["a"])
