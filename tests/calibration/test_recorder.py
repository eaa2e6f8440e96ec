"""A program that is followed gives what it gives when it runs by itself."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxclip.calibration.measuring import RULES, values_of, weight_paths
from jaxclip.calibration.recorder import Recorder

RNG = np.random.default_rng(0)
W = RNG.standard_normal((3, 4, 4)).astype(np.float32)
X = RNG.standard_normal((6, 4)).astype(np.float32)


def reverse_scan(w: jax.Array, x: jax.Array) -> Any:
    def step(carry, w):
        x, n = carry
        x = jnp.tanh(x @ w)
        return (x, n + 1), (x, n)

    return lax.scan(step, (x, 0), w, reverse=True, unroll=2)


def scan_that_gives_the_weights_back(w: jax.Array, x: jax.Array) -> Any:
    return lax.scan(lambda x, w: (x @ w, jnp.exp(w)), x, w)


def scan_over_nothing(w: jax.Array, x: jax.Array) -> Any:
    return lax.scan(lambda x, _: (x @ w[0], None), x, None, length=0)


def scan_in_scan(w: jax.Array, x: jax.Array) -> Any:
    def outer(x, w):
        return lax.scan(lambda x, t: (jnp.tanh(x @ w * t), x[0]), x, jnp.arange(2.0))

    return lax.scan(outer, x, w)


def loop_with_a_weight_in_its_condition(w: jax.Array, x: jax.Array) -> Any:
    def goes_on(state):
        i, x = state
        return (i < 5) & (jnp.sum(w[0]) + jnp.sum(x) < 1e9)

    return lax.while_loop(goes_on, lambda s: (s[0] + 1, jnp.tanh(s[1] @ w[s[0] % 3])), (0, x))


def loop_that_changes_the_weight(w: jax.Array, x: jax.Array) -> Any:
    return lax.fori_loop(0, 3, lambda i, s: (s[0] * 0.5, s[1] @ s[0][i]), (w, x))


def branches(w: jax.Array, x: jax.Array) -> Any:
    cases = [lambda x: x @ w[0], lambda x: (x @ w[1]) @ w[1], lambda x: x]
    return [lax.switch(i + jnp.int32(0) * x[0, 0].astype(jnp.int32), cases, x) for i in range(3)]


def derivatives(w: jax.Array, x: jax.Array) -> Any:
    def loss(x):
        return jnp.sum(jax.checkpoint(lambda x: jax.nn.gelu(x @ w[0]))(x) ** 2)

    return jax.value_and_grad(loss)(x), jax.jvp(loss, (x,), (x,))


def numbers(w: jax.Array, x: jax.Array) -> Any:
    noise = jax.random.normal(jax.random.key(3), x.shape)
    order = jnp.argsort(x, axis=-1)
    return jnp.take_along_axis(x + noise, order, -1) @ w[0], order, jnp.sort(w.ravel())


PROGRAMS = [
    reverse_scan,
    scan_that_gives_the_weights_back,
    scan_over_nothing,
    scan_in_scan,
    loop_with_a_weight_in_its_condition,
    loop_that_changes_the_weight,
    branches,
    derivatives,
    numbers,
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_the_outputs_are_those_of_the_program(program: Any):
    def followed(w, x):
        traced = jax.make_jaxpr(program)(w, x)
        values = values_of(w, weight_paths(w, ()), x)
        return [value.array for value in Recorder(RULES, 8192).run(traced, values)]

    expected = jax.tree.leaves(jax.jit(program)(W, X))
    for run in (followed, jax.jit(followed)):
        for found, wanted in zip(run(W, X), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_what_a_loop_does_with_a_weight_is_noted():
    def notes(program):
        recorder = Recorder(RULES, 8192)
        recorder.run(jax.make_jaxpr(program)(W, X), values_of(W, [""], X))
        return recorder.notes

    assert notes(scan_that_gives_the_weights_back) == {"": "exp"}
    assert notes(loop_that_changes_the_weight) == {"": "scan"}
    assert notes(scan_in_scan) == {}
