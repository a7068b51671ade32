"""Forms of scaling laws: what is linear in each, what is not, and how a coefficient changes with a variable's unit.

Every form is Σ c_k φ_k(x; θ). Given θ, the c_k follow from least squares, so that a fit searches θ alone
(`separable.py`). Inside a fit every variable is divided by its geometric mean; `restore` says what the coefficients are
in the table's units, so a fit in tokens and one in billions of tokens are the same fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from sparsecod_megatron.errors import ConfigError

Array = npt.NDArray[np.float64]
BILLION = 1e9


@dataclass(frozen=True)
class Variable:
    """Something that a law is a function of.

    Attributes:
        name: in formulas.
        unit: what a value of the table is divided by.
        distinct: different values without which its coefficients are undetermined.
    """

    name: str
    unit: float = 1.0
    distinct: int = 3

    @property
    def shown(self) -> str:
        """The name with its unit, where that is not the table's own."""
        return self.name if self.unit == 1 else f"{self.name} (in {self.unit:.0e})"


@dataclass(frozen=True)
class Nonlinear:
    """A coefficient that is searched.

    Attributes:
        name: in formulas.
        low: lower end of the search, for variables divided by their geometric means.
        high: its upper end.
        is_log: whether equal factors, not equal differences, are equally far apart.
        is_place: whether it is a value of the first variable: from its third smallest to its third largest, so that
            three points lie on either side. `low` and `high` are not used then.
        count: points of the first grid.
    """

    name: str
    low: float = 0.0
    high: float = 0.0
    is_log: bool = True
    is_place: bool = False
    count: int = 21


Columns = Callable[[Array, Array], list[Array]]
"""From logarithms of the variables [variables, points] and θ [..., θ] to the φ_k, each [..., points]."""
Restore = Callable[[Array, Array, Array], list[Array]]
"""From θ [..., θ], c [..., k] and logarithms of the geometric means [variables] to `names`, each [...]."""


@dataclass(frozen=True)
class Form:
    """One law.

    Attributes:
        name: what `--law` calls it.
        formula: for people.
        variables: what it is a function of.
        nonlinear: coefficients that are searched.
        nonnegative: for each φ_k whether c_k is at least zero.
        names: coefficients in the table's units, in the order of `restore`.
        columns: the φ_k.
        restore: coefficients in the table's units.
        is_log: whether logarithms of the measured values are fitted.
        simpler: law that is taken instead where the data do not ask for this one.
        extra: what `simpler` lacks, for messages.
    """

    name: str
    formula: str
    variables: tuple[Variable, ...]
    nonlinear: tuple[Nonlinear, ...]
    nonnegative: tuple[bool, ...]
    names: tuple[str, ...]
    columns: Columns
    restore: Restore
    is_log: bool = False
    simpler: str | None = None
    extra: str = ""

    @property
    def num_coefficients(self) -> int:
        """Linear and searched ones."""
        return len(self.nonnegative) + len(self.nonlinear)

    def check_variables(self, where: str, given: Sequence[str]) -> None:
        """Refuse another number of columns than the law has variables.

        Raises:
            ConfigError: names `where` and the law's variables.
        """
        if len(given) != len(self.variables):
            wanted = ",".join(variable.name for variable in self.variables)
            raise ConfigError(
                f"{where} {','.join(given)}: law {self.name} is a function of {wanted}; name a column for each"
            )


def _power(log_x: Array, exponent: Array) -> Array:
    """x^−exponent: [points] and [...] → [..., points]."""
    return np.exp(-exponent[..., None] * log_x)


def _ones(log_x: Array, theta: Array) -> Array:
    return np.ones((*theta.shape[:-1], log_x.shape[-1]))


def _power_columns(log_x: Array, theta: Array) -> list[Array]:
    """A constant and a power of each variable."""
    powers = [_power(log_x[place], theta[..., place]) for place in range(len(log_x))]
    return [_ones(log_x, theta), *powers]


def _power_restored(theta: Array, linear: Array, log_scale: Array) -> list[Array]:
    """c (x / s)^−α = c s^α · x^−α."""
    factors = [linear[..., 1 + place] * np.exp(theta[..., place] * scale) for place, scale in enumerate(log_scale)]
    return [linear[..., 0], *factors, *(theta[..., place] for place in range(len(log_scale)))]


def _rising_columns(log_x: Array, theta: Array) -> list[Array]:
    return [_ones(log_x, theta), -_power(log_x[0], theta[..., 0])]


def _log_space_columns(log_x: Array, theta: Array) -> list[Array]:
    return [_ones(log_x, theta), np.exp(-theta[..., 0, None] * _power(log_x[0], -theta[..., 1]))]


def _log_space_restored(theta: Array, linear: Array, log_scale: Array) -> list[Array]:
    with np.errstate(divide="ignore"):  # b is −∞ where nothing falls
        return [
            linear[..., 0],
            np.log(linear[..., 1]),
            theta[..., 0] * np.exp(-theta[..., 1] * log_scale[0]),
            theta[..., 1],
        ]


def _broken_columns(log_x: Array, theta: Array) -> list[Array]:
    before, after, place, width = (theta[..., index, None] for index in range(4))
    # log(1 + (x/d)^(1/f)) would overflow at a small f.
    bend = np.logaddexp(0.0, (log_x[0] - np.log(place)) / width)
    return [_ones(log_x, theta), np.exp(-before * log_x[0] - after * width * bend)]


def _broken_restored(theta: Array, linear: Array, log_scale: Array) -> list[Array]:
    before, after, place, width = (theta[..., index] for index in range(4))
    factor = linear[..., 1] * np.exp(before * log_scale[0])
    return [linear[..., 0], factor, before, after, place * np.exp(log_scale[0]), width]


def _line_columns(log_x: Array, theta: Array) -> list[Array]:
    return [_ones(log_x, theta), np.broadcast_to(np.exp(log_x[0]), (*theta.shape[:-1], log_x.shape[-1]))]


def _line_restored(theta: Array, linear: Array, log_scale: Array) -> list[Array]:
    return [linear[..., 0], linear[..., 1] * np.exp(-log_scale[0])]


def _bottleneck_columns(log_x: Array, theta: Array) -> list[Array]:
    return [_ones(log_x, theta), np.minimum(np.exp(log_x[0]), theta[..., 0, None])]


def _bottleneck_restored(theta: Array, linear: Array, log_scale: Array) -> list[Array]:
    return [*_line_restored(theta, linear, log_scale), theta[..., 0] * np.exp(log_scale[0])]


def _log_linear_columns(log_x: Array, theta: Array) -> list[Array]:
    shape = (*theta.shape[:-1], log_x.shape[-1])
    return [_ones(log_x, theta), *(np.broadcast_to(row, shape) for row in log_x)]


def _log_linear_restored(theta: Array, linear: Array, log_scale: Array) -> list[Array]:
    exponents = [linear[..., 1 + place] for place in range(len(log_scale))]
    moved = sum(exponent * scale for exponent, scale in zip(exponents, log_scale, strict=True))
    return [np.exp(linear[..., 0] - moved), *exponents]


def _exponent(name: str, count: int = 21) -> Nonlinear:
    return Nonlinear(name, 0.02, 4.0, count=count)


TOKENS = Variable("D", unit=BILLION)
_CHINCHILLA = Form(
    name="chinchilla",
    formula="E + A·N^−alpha + B·D^−beta",
    variables=(Variable("N"), Variable("D")),
    nonlinear=(_exponent("alpha"), _exponent("beta")),
    nonnegative=(True, True, True),
    names=("E", "A", "B", "alpha", "beta"),
    columns=_power_columns,
    restore=_power_restored,
)
_POWER = Form(
    name="power",
    formula="a + b·x^−c",
    variables=(Variable("x"),),
    nonlinear=(Nonlinear("c", -2.0, 4.0, is_log=False, count=61),),
    nonnegative=(True, True),
    names=("a", "b", "c"),
    columns=_power_columns,
    restore=_power_restored,
)
_LINE = Form(
    name="line",
    formula="a + s·x",
    variables=(Variable("x", distinct=2),),
    nonlinear=(),
    nonnegative=(False, False),
    names=("a", "s"),
    columns=_line_columns,
    restore=_line_restored,
)
LAWS: dict[str, Form] = {
    form.name: form
    for form in (
        _CHINCHILLA,
        replace(
            _CHINCHILLA,
            name="journey",
            formula="E + A·N̄^−alpha + B·D^−beta",
            variables=(Variable("N̄"), Variable("D")),
        ),
        Form(
            name="sparsing_silu",
            formula="A0 − c·D^−alpha",
            variables=(TOKENS,),
            nonlinear=(Nonlinear("alpha", 0.02, 6.0, count=61),),
            nonnegative=(True, True),
            names=("A0", "c", "alpha"),
            columns=_rising_columns,
            restore=_power_restored,
        ),
        Form(
            name="sparsing_relu",
            formula="A0 + exp(b − c·D^alpha)",
            variables=(TOKENS,),
            nonlinear=(Nonlinear("c", 1e-3, 50.0), Nonlinear("alpha", 0.02, 6.0)),
            nonnegative=(True, True),
            names=("A0", "b", "c", "alpha"),
            columns=_log_space_columns,
            restore=_log_space_restored,
        ),
        Form(
            name="bnsl",
            formula="a + b·x^−c0·(1 + (x/d1)^(1/f1))^(−c1·f1)",
            variables=(Variable("x"),),
            nonlinear=(
                Nonlinear("c0", -2.0, 4.0, is_log=False, count=13),
                Nonlinear("c1", -8.0, 8.0, is_log=False, count=17),
                Nonlinear("d1", is_place=True, count=9),
                Nonlinear("f1", 0.01, 1.0, count=5),
            ),
            nonnegative=(True, True),
            names=("a", "b", "c0", "c1", "d1", "f1"),
            columns=_broken_columns,
            restore=_broken_restored,
            simpler="power",
            extra="a break",
        ),
        Form(
            name="width_depth",
            formula="a + s·min(x, bottleneck)",
            variables=(Variable("x"),),
            nonlinear=(Nonlinear("bottleneck", is_place=True, count=61),),
            nonnegative=(False, False),
            names=("a", "s", "bottleneck"),
            columns=_bottleneck_columns,
            restore=_bottleneck_restored,
            simpler="line",
            extra="a bottleneck",
        ),
        Form(
            name="inverse_depth",
            formula="L0 + c_m·m^−alpha_m + c_l·l^−alpha_l + c_D·D^−alpha_D",
            variables=(Variable("m"), Variable("l"), Variable("D")),
            nonlinear=(_exponent("alpha_m", 11), _exponent("alpha_l", 11), _exponent("alpha_D", 11)),
            nonnegative=(True, True, True, True),
            names=("L0", "c_m", "c_l", "c_D", "alpha_m", "alpha_l", "alpha_D"),
            columns=_power_columns,
            restore=_power_restored,
        ),
        Form(
            name="step_law_lr",
            formula="K·N^p·D^q",
            variables=(Variable("N", distinct=2), Variable("D", distinct=2)),
            nonlinear=(),
            nonnegative=(False, False, False),
            names=("K", "p", "q"),
            columns=_log_linear_columns,
            restore=_log_linear_restored,
            is_log=True,
        ),
        Form(
            name="step_law_batch",
            formula="K·D^r",
            variables=(Variable("D", distinct=2),),
            nonlinear=(),
            nonnegative=(False, False),
            names=("K", "r"),
            columns=_log_linear_columns,
            restore=_log_linear_restored,
            is_log=True,
        ),
        _POWER,
        _LINE,
    )
}
"""Every law that `--law` names.

Sources: Chinchilla, arXiv 2203.15556 (3.3). Journey, arXiv 2501.12486: N̄ is the mean over training of the parameters
that are left; whether embeddings count among them was not to be found, and here they do not. Sparsing Law, arXiv
2411.02335: forms and D in billions of tokens as in `calc.py` of the authors' Raincleared-Song/SparsingLawData;
`width_depth` is that paper's finding in words, linear in width over depth below a bottleneck, written as a function.
BNSL, arXiv 2210.14891, as in ethancaballero/broken_neural_scaling_laws, which fits log(y + 1) where this fits y.
Inverse depth, arXiv 2602.05970: an exponent per term and L0, as in `Scaling/bootstrap.py` of liuyz0/DepthScaling. Step
Law, arXiv 2503.04715.
"""


def find_law(name: str) -> Form:
    """A law by its name.

    Raises:
        ConfigError: there is no such law.
    """
    if name not in LAWS:
        raise ConfigError(f"law {name!r}: not known; choose one of {', '.join(LAWS)}")
    return LAWS[name]
