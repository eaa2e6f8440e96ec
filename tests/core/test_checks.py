"""Eager checks: what is refused, what the message names, and what is left to the transform."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxclip._core import checks

NUMBERS = {
    "threshold": checks.check_threshold,
    "positive": checks.check_positive,
    "finite": checks.check_finite,
    "nonnegative": checks.check_nonnegative,
    "decay_rate": checks.check_decay_rate,
}
every_check = pytest.mark.parametrize("check", NUMBERS.values(), ids=NUMBERS)


@every_check
@pytest.mark.parametrize(
    "bad",
    ["0.5", b"0.5", None, True, np.True_, 0.5j, np.complex64(1), np.asarray([0.5]), [0.5], {}],
)
def test_values_that_are_not_numbers_are_refused_by_name(check, bad):
    with pytest.raises((TypeError, ValueError), match="beta"):
        check("beta", bad)


@every_check
def test_an_array_with_dimensions_is_refused_with_its_shape(check):
    with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
        check("beta", jnp.zeros((2, 3)))


@every_check
def test_nan_is_refused_from_python_and_numpy(check):
    for nan in (float("nan"), np.float32("nan"), np.asarray(np.nan), ml_dtypes.bfloat16("nan")):
        with pytest.raises(ValueError, match="beta"):
            check("beta", nan)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("threshold", [0, 0.0, -0.0, 5, np.inf, np.float16(2), np.int8(3)], [-1e-30, -np.inf, -1]),
        ("positive", [5e-324, 1, 1e308], [0, 0.0, -1, np.inf]),
        ("finite", [-1e308, 0, 1], [np.inf, -np.inf]),
        ("nonnegative", [0, 1e308], [-5e-324, np.inf]),
        ("decay_rate", [0, 1, 0.5], [-0.001, 1.001, np.inf]),
    ],
)
def test_the_ends_of_each_range_are_as_documented(kind, good, bad):
    for value in good:
        NUMBERS[kind]("beta", value)
    for value in bad:
        with pytest.raises(ValueError, match="beta"):
            NUMBERS[kind]("beta", value)


@every_check
def test_the_value_of_a_jax_array_is_never_looked_at(check):
    for value in (-1.0, np.nan, np.inf):
        check("beta", jnp.asarray(value))

    @jax.jit
    def traced(x):
        check("beta", x)
        return x

    traced(-1.0)


def test_an_integer_too_large_for_a_float_is_a_value_error_or_infinite():
    try:
        checks.check_threshold("beta", 10**400)
    except ValueError as error:
        assert "beta" in str(error)  # noqa: PT017


def test_a_choice_must_be_equal_in_type_too():
    checks.check_choice("bits", 2, (1, 2, "ternary"))
    for bad in (True, 2.0, "2", None, 3):
        with pytest.raises(ValueError, match="bits must be one of"):
            checks.check_choice("bits", bad, (1, 2, "ternary"))


def test_a_count_is_an_integer_of_at_least_one_or_the_given_least():
    checks.check_count("size", np.int32(1))
    checks.check_count("size", 0, at_least=0)
    for bad in (0, -1, 1.0, True, "1", None):
        with pytest.raises(ValueError, match="size"):
            checks.check_count("size", bad)
    with pytest.raises(ValueError, match="size must be an integer of at least 0"):
        checks.check_count("size", -1, at_least=0)


def test_mismatching_trees_are_named_at_the_first_path_that_differs():
    a = {"layer": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}}
    renamed = {"layer": {"weight": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}}
    reshaped = {"layer": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(3)}}
    longer = {**a, "tail": jnp.zeros(1)}
    checks.check_same_structure("updates", a, "params", a)
    with pytest.raises(ValueError, match=r"layer/kernel.*layer/weight"):
        checks.check_same_structure("updates", a, "params", renamed)
    with pytest.raises(ValueError, match=r"layer/kernel.*\(2, 3\).*\(3, 2\)"):
        checks.check_same_structure("updates", a, "params", reshaped)
    with pytest.raises(ValueError, match=r"'tail' is only in params"):
        checks.check_same_structure("updates", a, "params", longer)
    with pytest.raises(ValueError, match=r"'tail' is only in updates"):
        checks.check_same_structure("updates", longer, "params", a)
