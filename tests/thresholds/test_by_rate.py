"""The rule for entropy-coded files, against entropy and error in float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxclip
from jaxclip.thresholds.by_rate import code_entropy, rate_optimal
from oracles.quick import quick_first

SHAPE = (32, 512)


@functools.cache
def drawn() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    row_sizes = np.exp(rng.normal(0, 0.7, (SHAPE[0], 1)))
    draws = {
        "Gaussian": rng.normal(size=SHAPE),
        "Laplace": rng.laplace(size=SHAPE),
        "Student-t, 3": rng.standard_t(3, SHAPE),
        "half on a bound": np.clip(1.5 * rng.normal(size=SHAPE), -1, 1),
        "rows of many sizes": row_sizes * rng.normal(size=SHAPE),
    }
    return {name: 0.03 * x.astype(np.float32) for name, x in draws.items()}


def oracle_entropy(codes) -> float:
    _, counts = np.unique(np.asarray(codes), return_counts=True)
    share = counts / counts.sum()
    return float(-np.sum(share * np.log2(share)))


def coded(x, axis=None, group_size=None, **goal) -> tuple[float, float]:
    """Rate and relative error of quantized weights, in float64."""
    q = jaxclip.quantize(
        jnp.asarray(x),
        jaxclip.Grid(8, axis=axis, group_size=group_size),
        threshold=rate_optimal(**goal),
    )
    wide = np.asarray(x, np.float64)
    scale = np.asarray(q.grid.expand(q.scale, q.shape), np.float64)
    decoded = scale * np.asarray(q.qvalue, np.float64)
    error = np.sum((wide - decoded) ** 2) / max(np.sum(wide**2), 1e-300)
    return oracle_entropy(q.qvalue), float(error)


# --- The entropy of codes --------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "bits"),
    [([7, 7, 7], 0.0), ([-128, 127], 1.0), ([0, 0, 1, -1], 1.5), ([0, 0, 0, 1], 0.811278)],
)
def test_the_entropy_of_a_few_codes_is_that_worked_by_hand(codes, bits):
    assert float(code_entropy(jnp.asarray(codes, jnp.int8))) == pytest.approx(bits, abs=1e-6)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32])
def test_the_entropy_of_random_codes_is_that_of_numpy(dtype):
    codes = np.random.default_rng(1).binomial(100, 0.3, size=(20, 50)).astype(dtype)
    got = code_entropy(codes)
    assert got.dtype == jnp.float32
    assert float(got) == pytest.approx(oracle_entropy(codes), abs=1e-5)


def test_no_codes_cost_nothing_and_floats_are_no_codes():
    assert float(code_entropy(jnp.zeros((0, 3), jnp.int8))) == 0
    with pytest.raises(TypeError, match="codes must be integers, got float32"):
        code_entropy(jnp.ones(3))


# --- The goals -------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("bits", [0.5, 3.5])
@pytest.mark.parametrize("name", list(drawn()))
def test_codes_cost_the_bits_asked_for(name, bits, axis):
    rate, _ = coded(drawn()[name], axis, bits_per_weight=bits)
    # Weights piled on a bound change code all at once: then the next rate below is right.
    least = bits - (0.5 if name == "half on a bound" else 0.001)
    assert least <= rate <= bits + 0.001


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("error", [0.2, 0.01])
@pytest.mark.parametrize("name", list(drawn()))
def test_the_error_is_the_one_asked_for(name, error, axis):
    _, got = coded(drawn()[name], axis, error=error)
    least = 0.0 if name == "half on a bound" else error * 0.998
    assert least <= got <= error * 1.002


@pytest.mark.parametrize("lagrangian", [0.1, 0.003])
@pytest.mark.parametrize("name", ["Gaussian", "Student-t, 3", "half on a bound"])
def test_no_step_of_a_dense_search_has_a_lower_lagrangian(name, lagrangian):
    x = drawn()[name].astype(np.float64)
    rate, error = coded(drawn()[name], lagrangian=lagrangian)
    largest, energy = np.max(np.abs(x)), np.sum(x**2)
    costs = []
    for step in largest * np.geomspace(1 / 127, 2.1, 400):
        codes = np.round(x / step)
        distortion = np.sum((x - step * codes) ** 2) / energy
        costs.append(distortion + lagrangian * oracle_entropy(codes))
    assert error + lagrangian * rate <= min(costs) * 1.01


@pytest.mark.thorough
def test_gaussian_weights_are_a_quarter_bit_from_the_rate_distortion_bound():
    x = np.random.default_rng(5).normal(size=(256, 1024)).astype(np.float32)
    rate, error = coded(x, bits_per_weight=4.0)
    bound = 0.5 * np.log2(1 / error)
    assert rate - bound == pytest.approx(0.5 * np.log2(2 * np.pi * np.e / 12), abs=0.02)


@pytest.mark.thorough
def test_coded_codes_have_less_error_than_four_bits_and_cost_less():
    x = drawn()["Gaussian"]
    fixed = jaxclip.dequantize(jaxclip.quantize(jnp.asarray(x), jaxclip.Grid(4, axis=0)))
    error = np.sum((x.astype(np.float64) - np.asarray(fixed)) ** 2) / np.sum(x.astype(float) ** 2)
    rate, _ = coded(x, axis=0, error=float(error))
    assert rate < 3.7


def test_steps_of_channels_go_with_the_square_root_of_their_size():
    x = drawn()["rows of many sizes"]
    step = np.asarray(rate_optimal(3.0, axis=0)(jnp.asarray(x)), np.float64) / 127
    size = np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=1, keepdims=True))
    np.testing.assert_allclose(step / np.sqrt(size), step[0, 0] / np.sqrt(size[0, 0]), rtol=1e-4)


def test_at_equal_error_these_steps_cost_less_than_equal_and_than_proportional_ones():
    rng = np.random.default_rng(8)
    x = np.exp(rng.normal(0, 0.3, (SHAPE[0], 1))) * rng.normal(size=SHAPE)
    rate, error = coded(x.astype(np.float32), 0, error=0.02)
    size = np.sqrt(np.mean(x**2, axis=1, keepdims=True))
    for unit in (np.ones_like(size), size):
        low, high = 1e-3, 10 * np.max(size / unit)
        for _ in range(50):
            middle = np.sqrt(low * high)
            codes = np.round(x / (middle * unit))
            is_coarse = np.sum((x - middle * unit * codes) ** 2) > error * np.sum(x**2)
            low, high = (low, middle) if is_coarse else (middle, high)
        assert rate < oracle_entropy(codes)


@pytest.mark.thorough
def test_nothing_is_clipped_unless_that_has_less_error_than_a_step_that_reaches_all():
    x = np.tile(drawn()["Gaussian"], (8, 1))
    assert float(rate_optimal(4.5)(jnp.asarray(x)).item()) >= np.max(np.abs(x))
    x[0, 0] = 0.6  # 20 deviations
    threshold = rate_optimal(7.5)(jnp.asarray(x)).item()
    error = coded(x, bits_per_weight=7.5)[1]
    assert threshold < 0.5
    for step in 0.6 / 127 * np.geomspace(1 / 8, 1, 50):
        decoded = step * np.clip(np.round(x.astype(np.float64) / step), -127, 127)
        assert error <= 1.15 * np.sum((x - decoded) ** 2) / np.sum(x.astype(np.float64) ** 2)


# --- Degenerate weights ----------------------------------------------------------------


@pytest.mark.parametrize(
    "goal", quick_first([{"bits_per_weight": 2.5}, {"error": 0.01}, {"lagrangian": 0.01}])
)
@pytest.mark.parametrize(
    "x",
    [
        np.zeros((2, 8)),
        np.full((2, 8), 0.3),
        np.full((1, 1), -2.0),
        np.eye(8) * 1e-30,
        np.full((2, 8), 3e38),
        np.concatenate([np.full((1, 8), 1e-28), np.arange(8.0)[None]]),
    ],
    ids=["zeros", "constant", "one entry", "tiny", "huge", "a tiny row"],
)
def test_degenerate_weights_have_finite_thresholds_and_decode_to_no_more_than_their_size(x, goal):
    x = jnp.asarray(x, jnp.float32)
    threshold = np.asarray(rate_optimal(**goal, axis=0)(x))
    assert np.all(np.isfinite(threshold))
    q = jaxclip.quantize(x, jaxclip.Grid(8, axis=0), threshold=rate_optimal(**goal))
    wide, decoded = (np.asarray(a, np.float64) for a in (x, jaxclip.dequantize(q)))
    assert np.sum((wide - decoded) ** 2) <= np.sum(wide**2) * (0.01001 if "error" in goal else 1)


@pytest.mark.thorough
def test_constant_weights_are_stored_to_rounding():
    x = jnp.full((4, 8), 0.3)
    for goal in ({"bits_per_weight": 2.5}, {"error": 0.01}):
        q = jaxclip.quantize(x, 8, threshold=rate_optimal(**goal))
        np.testing.assert_allclose(jaxclip.dequantize(q), x, rtol=0.1)


@pytest.mark.thorough
def test_an_outlier_that_needs_a_large_step_gets_the_finest_that_does_not_clip_it():
    x = np.random.default_rng(6).normal(size=(64, 64)).astype(np.float32)
    x[3, 5] = 1e3
    assert float(rate_optimal(4.0)(jnp.asarray(x)).item()) == pytest.approx(1e3, rel=1e-5)
    by_row = np.asarray(rate_optimal(4.0, axis=0)(jnp.asarray(x)))
    assert by_row[3, 0] == pytest.approx(1e3, rel=1e-5)
    rate, _ = coded(x, axis=0, bits_per_weight=4.0)
    assert rate == pytest.approx(4.0, abs=0.002)  # the other rows make up for it


@pytest.mark.thorough
def test_padding_of_the_last_group_costs_no_bits():
    x = np.random.default_rng(7).normal(size=(16, 100)).astype(np.float32)
    rate, _ = coded(x, axis=0, group_size=64, bits_per_weight=2.0)
    assert rate == pytest.approx(2.0, abs=0.001)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_weights_cost_the_bits_asked_for(dtype):
    x = jnp.asarray(drawn()["Gaussian"], dtype)
    q = jaxclip.quantize(x, 8, threshold=rate_optimal(3.0))
    assert oracle_entropy(q.qvalue) == pytest.approx(3.0, abs=0.01)


# --- Where it runs ---------------------------------------------------------------------


@pytest.mark.thorough
def test_eager_jitted_and_vmapped_agree_and_a_traced_goal_is_the_same():
    x = jnp.asarray(drawn()["Laplace"])
    eager = rate_optimal(2.5, axis=0)(x)
    traced = jax.jit(lambda x, bits: rate_optimal(bits, axis=0)(x))(x, jnp.float32(2.5))
    np.testing.assert_allclose(traced, eager, rtol=1e-5)
    mapped = jax.vmap(rate_optimal(2.5, axis=0))(jnp.stack([x, 2 * x]))
    np.testing.assert_allclose(mapped, np.stack([eager, 2 * eager]), rtol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_thresholds_of_sharded_weights_are_those_of_whole_ones(kind):
    mesh = Mesh(
        np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"), axis_types=(AxisType[kind],) * 2
    )
    x = jnp.asarray(drawn()["Gaussian"])
    whole = rate_optimal(2.5, axis=0)(x)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("a", "b")))
        sharded = rate_optimal(2.5, axis=0)(placed)
        entropy = code_entropy(jnp.round(placed * 50).astype(jnp.int8))
    np.testing.assert_allclose(sharded, whole, rtol=1e-4)
    expected = oracle_entropy(np.round(drawn()["Gaussian"] * 50))
    assert float(entropy) == pytest.approx(expected, abs=1e-3)


@pytest.mark.thorough
def test_compress_gives_every_matrix_the_bits_and_leaves_vectors():
    params = {"kernel": jnp.asarray(drawn()["Gaussian"]), "bias": jnp.ones(3)}
    small = jaxclip.compress(params, 8, rule=rate_optimal(2.0))
    assert oracle_entropy(small["kernel"].qvalue) == pytest.approx(2.0, abs=0.001)
    assert small["kernel"].scale.shape == (1, 512)
    assert small["bias"] is params["bias"]


# --- Errors ----------------------------------------------------------------------------


def test_exactly_one_goal_is_asked_for():
    with pytest.raises(TypeError, match=r"exactly one of .* got none"):
        rate_optimal()
    with pytest.raises(TypeError, match=r"exactly one of .* got \['bits_per_weight', 'error'\]"):
        rate_optimal(2.0, error=0.1)


@pytest.mark.parametrize(
    ("goal", "value", "kind", "message"),
    [
        ("bits_per_weight", 0, ValueError, "bits_per_weight must be positive"),
        ("bits_per_weight", 8, ValueError, r"bits_per_weight must be in \(0, 8\), got 8"),
        ("error", 1.0, ValueError, r"error must be in \(0, 1\), got 1.0"),
        ("error", float("nan"), ValueError, "error must be positive"),
        ("lagrangian", -1.0, ValueError, "lagrangian must be positive"),
        ("error", "0.1", TypeError, "error must be a positive number"),
    ],
)
def test_goals_out_of_range_are_refused_when_the_rule_is_made(goal, value, kind, message):
    with pytest.raises(kind, match=message):
        rate_optimal(**{goal: value})


@pytest.mark.parametrize("bits", ["ternary", 4])
def test_codes_of_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match=f"rate_optimal needs bits=8, got {bits!r}"):
        jaxclip.quantize(jnp.ones(3), bits, threshold=rate_optimal(2.0))
