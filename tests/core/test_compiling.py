"""Programs that are compiled with options: at the top level and inside others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclip._core.compiling import WIDE_VECTORS, WideJit, cpu_options

X = np.arange(6, dtype=np.float32).reshape(2, 3)


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """Returns x times a static factor."""
    return x * factor


@pytest.mark.parametrize(
    "use",
    [
        lambda f: f(X, 3),
        lambda f: jax.jit(f, static_argnums=1)(X, 3),
        lambda f: jax.jit(lambda: f(X, 3))(),  # of a constant
        lambda f: jax.vmap(lambda x: f(x, 3))(X),
        lambda f: jax.lax.map(lambda x: f(x, 3), jnp.asarray(X)),
        lambda f: jax.grad(lambda x: f(x, 3).sum())(X) * X,
    ],
    ids=["eager", "jit", "constant", "vmap", "loop", "gradient"],
)
def test_a_wide_program_runs_alone_and_inside_others(use):
    f = WideJit(scaled, static_argnums=1)
    assert f.__doc__ == scaled.__doc__
    np.testing.assert_array_equal(use(f), 3 * X)


def test_options_that_xla_does_not_know_are_left_out():
    assert cpu_options(("xla_cpu_of_another_age", 1)) == {}
    expected = dict([WIDE_VECTORS]) if jax.default_backend() == "cpu" else {}
    assert cpu_options(WIDE_VECTORS) in (expected, {})
