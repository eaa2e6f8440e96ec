"""Values of quantization with derivatives worked by hand."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxclip
from jaxclip import Grid, dequantize, fake_quantize, quantize

CASES = {
    "one bit": ({"bits": 1, "threshold": 1.0}, [-3, -1, -0.2, 0, 1, 1.1], [0, 1, 1, 1, 1, 0]),
    "ternary": (
        {"bits": "ternary", "threshold": 1.0},
        [-1.2, -1, -0.4, 0, 0.6, 1, 1.4],
        [0, 1, 1, 1, 1, 1, 0],
    ),
    "narrow": (
        {"bits": Grid(2, levels="narrow", axis=None), "threshold": 2.0},
        [-2.5, -2, 0, 1, 2, 2.01],
        [0, 1, 1, 1, 1, 0],
    ),
    # Levels -2, -1, 0, 1, and the other way round where that is nearer.
    "full": ({"bits": 2, "threshold": 1.0}, [-2.1, -2, -1, 0, 1, 1.01], [0, 1, 1, 1, 1, 0]),
    "full, turned": ({"bits": 2, "threshold": 1.0}, [2.1, 2, 1, 0, -1, -1.01], [0, 1, 1, 1, 1, 0]),
    "zero point": (
        {"bits": Grid(2, axis=None, zero_point=True), "threshold": 3.0},
        [-0.0, 0.4, 1, 2.6, 3, 3.1],
        [1, 1, 1, 1, 1, 0],
    ),
}  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_1_on_the_range_of_the_grid_and_0_outside(name):
    options, x, expected = CASES[name]
    x = jnp.asarray(x, jnp.float32)
    weights = jnp.arange(1, 1 + x.size, dtype=jnp.float32)
    loss = lambda x: jnp.vdot(weights, fake_quantize(x, **options))  # noqa: E731
    for grad in (jax.grad(loss), jax.jit(jax.grad(loss))):
        assert np.asarray(grad(x) / weights).tolist() == expected


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("bits", [1, 4])
def test_values_are_those_of_quantizing_and_dequantizing(dtype, bits):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8)).astype(dtype))
    grid, rule = Grid(bits, axis=0, group_size=4), jaxclip.max_abs
    expected = dequantize(quantize(x, grid, threshold=rule))
    assert expected.dtype == dtype
    got = fake_quantize(x, grid, threshold=rule)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, expected)
    gradient = jax.jit(jax.grad(lambda x: fake_quantize(x, grid, threshold=rule).sum()))(x)
    assert gradient.dtype == dtype
    assert np.array_equal(gradient, np.ones_like(gradient))  # max_abs clips nothing


@pytest.mark.thorough
@pytest.mark.parametrize("zero_point", [False, True])
def test_each_block_has_its_own_range(zero_point):
    x = jnp.asarray([[0.5, -0.5, 2.0, 0.1], [50.0, -50.0, 2.0, 0.1]], jnp.float32)
    threshold = np.float32([[1.0], [100.0]])
    grid = Grid(4, axis=0, levels="narrow", zero_point=zero_point)
    gradient = jax.grad(lambda x: fake_quantize(x, grid, threshold=threshold).sum())(x)
    assert np.asarray(gradient).tolist() == [[1, 1, 0, 1], [1, 1, 1, 1]]


def test_a_traced_threshold_has_no_derivative():
    x = jnp.asarray([0.3, 0.9, -2.0])
    loss = lambda x, t: fake_quantize(x, "ternary", threshold=t).sum()  # noqa: E731
    by_x, by_t = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, jnp.float32(1.0))
    assert np.asarray(by_x).tolist() == [1, 1, 0]
    assert float(by_t) == 0


LEARNED = {
    "one bit": (Grid(1), (4, 3)),
    "ternary": (Grid("ternary"), (4, 3)),
    "balanced": (Grid(2, levels="balanced"), (4, 3)),
    "full": (Grid(3), (4, 3)),
    "groups, the last one shorter": (Grid(4, levels="narrow", axis=0, group_size=3), (2, 4)),
    "one scale": (Grid(2, axis=None), (6,)),
}


@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_threshold_has_the_derivative_of_lsq(name):
    grid, shape = LEARNED[name]
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    upstream = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    t = np.random.default_rng(3).uniform(0.5, 1.5, grid.scale_shape(shape)).astype(np.float32)

    def loss(t, x):
        return jnp.vdot(upstream, fake_quantize(x, grid, threshold=t, learn_threshold=True))

    value, (by_t, by_x) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(t, x)
    q = quantize(x, grid, threshold=t)
    w = np.asarray(dequantize(q), np.float64)
    assert float(value) == pytest.approx(float(np.vdot(upstream, w)), rel=1e-5)
    plain = jax.grad(lambda x: jnp.vdot(upstream, fake_quantize(x, grid, threshold=t)))(x)
    np.testing.assert_array_equal(by_x, plain)
    # By hand, entry by entry: which block it is in, and what the block's threshold does to it.
    expected, counts = np.zeros(t.shape), np.zeros(t.shape)
    inside = np.asarray(plain / upstream) == 1
    for at in np.ndindex(shape):
        block = tuple(i if n > 1 else 0 for i, n in zip(at, t.shape, strict=True))
        if grid.group_size:
            block = (at[0], at[1] // grid.group_size)
        slope = w[at] - x[at] if inside[at] and grid.bits != 1 else w[at]
        expected[block] += upstream[at] * slope / t[block]
        counts[block] += 1
    expected /= np.sqrt(counts * grid.code_range[1])
    np.testing.assert_allclose(by_t, expected, rtol=1e-5, atol=1e-6)


def test_a_learned_threshold_finds_about_the_range_of_the_weights():
    x = jnp.asarray(np.random.default_rng(0).normal(size=64).astype(np.float32))

    def loss(log_t):
        rounded = fake_quantize(x, 2, threshold=jnp.exp(log_t), learn_threshold=True)
        return jnp.mean((rounded - x) ** 2)

    log_t, grad = jnp.float32(3.0), jax.jit(jax.grad(loss))
    for _ in range(300):
        log_t = log_t - 0.5 * grad(log_t)
    best = min(float(loss(jnp.float32(log))) for log in np.linspace(-2, 2, 400))
    assert float(loss(log_t)) <= 1.25 * best < 0.2 * float(loss(jnp.float32(3.0)))


def test_a_rule_and_zero_points_are_not_learned():
    x = jnp.ones((2, 2))
    with pytest.raises(TypeError, match="threshold must be a number or an array to be learned"):
        fake_quantize(x, 4, learn_threshold=True)
    with pytest.raises(ValueError, match="learn_threshold needs a grid without zero points"):
        fake_quantize(x, Grid(4, zero_point=True), threshold=1.0, learn_threshold=True)


@pytest.mark.thorough
def test_it_works_under_vmap_and_forward_mode():
    x = jnp.asarray([[0.3, 0.9, -2.0], [1.0, 0.2, 0.1]])
    f = lambda row: fake_quantize(row, "ternary", threshold=1.0)  # noqa: E731
    values, tangents = jax.jvp(jax.vmap(f), (x,), (jnp.full_like(x, 3.0),))
    assert np.asarray(values).tolist() == [[0, 1, -1], [1, 0, 0]]
    assert np.asarray(tangents).tolist() == [[3, 3, 0], [3, 3, 3]]


@pytest.mark.thorough
def test_weights_learn_through_the_grid():
    """Descent on the rounded weights finds levels that rounding the solution misses."""
    target = jnp.asarray([0.9, -0.9, 0.1, 0.4])
    loss = lambda w: jnp.sum((fake_quantize(w, "ternary", threshold=1.0) - target) ** 2)  # noqa: E731
    w = jnp.zeros(4)
    for _ in range(20):
        w = w - 0.05 * jax.grad(loss)(w)
    assert np.asarray(fake_quantize(w, "ternary", threshold=1.0)).tolist()[:3] == [1, -1, 0]


@pytest.mark.thorough
def test_bad_arguments_are_refused_as_by_quantize():
    with pytest.raises(ValueError, match="bits must be one of"):
        fake_quantize(jnp.ones(3), 7)
    with pytest.raises(TypeError, match="threshold"):
        fake_quantize(jnp.ones(3), 4, threshold="max")
    with pytest.raises(TypeError, match="real floating"):
        fake_quantize(jnp.ones(3, jnp.int32), 4)
