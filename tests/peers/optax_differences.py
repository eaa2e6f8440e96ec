"""The inputs on which jaxclip and optax must differ: what each does with them, and why.

    python tests/peers/optax_differences.py

prints the list as Markdown, checked against the optax at hand. `test_against_optax.py` holds
both columns of every row: optax's, so that the table stays true, and ours.
"""

import contextlib
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

# The row on `shard_map` needs two devices, here too where no conftest asks for them.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

import jaxclip

OPTAX_VERSION = "0.2.8"  # the one the table speaks of


class Difference(NamedTuple):
    """A row: the words of the table, and two checks that raise where they are not true."""

    name: str
    input: str
    optax: str
    jaxclip: str
    why: str
    check_optax: Callable[[], None]
    check_jaxclip: Callable[[], None]


# --- Steps and what must hold of them -----------------------------------------------------


@contextlib.contextmanager
def default_promotion():
    """Jax as a user has it; our tests are stricter, under which much of optax raises."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def step(tx: Any, grads: Any, params: Any = None) -> Any:
    params = grads if params is None else params
    return tx.update(grads, tx.init(params), params)[0]


def momentum_after(tx: Any, gradients: list, params: Any) -> tuple[Any, Any]:
    """Parameters and the first momentum of a sign optimizer after some steps."""
    state = tx.init(params)
    for g in gradients:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
    first = getattr(state, "inner_state", state)[0]
    return params, first.mu if hasattr(first, "mu") else first.ema


def float64(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def exact_norm(tree: Any) -> float:
    wide = [np.abs(float64(x)).astype(np.longdouble) for x in jax.tree.leaves(tree)]
    return np.sqrt(sum(np.sum(x**2) for x in wide))


def assert_equal(actual: Any, expected: Any) -> None:
    """Equal to the bit, but for the sign of zero; NaN equals NaN."""
    np.testing.assert_array_equal(float64(actual), float64(expected))


def assert_raises(error: type[Exception], call: Callable, *arguments: Any) -> None:
    try:
        call(*arguments)
    except error:
        return
    raise AssertionError(f"no {error.__name__}")


def assert_clipped(grads: list, bound: float, tx: Any = None) -> None:
    """Our global-norm clip is that of NumPy in extended precision, and within the bound."""
    clipped = step(jaxclip.clip_by_global_norm(bound) if tx is None else tx, grads)
    norm = exact_norm(grads)
    for g, c in zip(grads, clipped, strict=True):
        assert c.dtype == g.dtype
        # The margin of eight float32 ulps, and one rounding towards zero in the leaf's dtype.
        info = jnp.finfo(g.dtype)
        rtol, atol = 12 * 2.0**-23 + float(info.eps), float(info.smallest_subnormal)
        expected = float64(g) * float(bound / norm)
        np.testing.assert_allclose(float64(c), expected, rtol=rtol, atol=atol)
    assert exact_norm(clipped) <= bound


# --- Sizes --------------------------------------------------------------------------------

OVERFLOWING = [
    jnp.full(4, 300, jnp.float16),
    jnp.full(4, 1e20, jnp.float32),
    jnp.full(4, 1e20, jnp.bfloat16),
]
UNDERFLOWING = [  # with a bound below the norm
    (jnp.full(4, 1e-25, jnp.float32), 1e-25),
    (jnp.full(4, 1e-25, jnp.bfloat16), 1e-25),
    (jnp.full(10**6, 1e-4, jnp.float16), 0.01),
]
MANY_LEAVES = [jnp.ones(1, jnp.bfloat16)] * 1024  # of norm 32


def optax_zeroes_what_overflows():
    for g in OVERFLOWING:
        assert_equal(step(optax.clip_by_global_norm(1.0), g), jnp.zeros(4))


def jaxclip_clips_what_overflows():
    for g in OVERFLOWING:
        assert_clipped([g], 1.0)


def optax_passes_what_underflows():
    for g, bound in UNDERFLOWING:
        assert exact_norm(g) > 1.9 * bound
        assert_equal(step(optax.clip_by_global_norm(bound), g), g)


def jaxclip_clips_what_underflows():
    for g, bound in UNDERFLOWING:
        assert_clipped([g], bound)


def optax_stalls_on_many_leaves():
    clipped = step(optax.clip_by_global_norm(1.0), MANY_LEAVES)
    assert exact_norm(clipped) > 1.9


def jaxclip_counts_every_leaf():
    assert_clipped(MANY_LEAVES, 1.0)


# --- At and near the bound ----------------------------------------------------------------


def integer_vectors() -> list[tuple[np.ndarray, float]]:
    """Vectors of integers whose norm is an integer, exact in float32, and that norm."""
    rows = []
    for m, n, p, q in np.random.default_rng(0).integers(1, 21, (200, 4)):
        v = [m * m + n * n - p * p - q * q, 2 * (m * q + n * p), 2 * (n * q - m * p)]
        rows.append((np.float32(v), float(m * m + n * n + p * p + q * q)))
    return rows


def half_precision_gradients() -> list[jax.Array]:
    return [jax.random.normal(jax.random.key(i), (500,), jnp.bfloat16) for i in range(40)]


def optax_changes_gradients_of_exactly_the_bound():
    changed = 0
    for v, norm in integer_vectors():
        changed += not np.array_equal(step(optax.clip_by_global_norm(norm), v), v)
    assert changed > 40


def jaxclip_keeps_gradients_of_exactly_the_bound():
    clip = jax.jit(lambda norm, v: step(jaxclip.clip_by_global_norm(norm), v))
    for v, norm in integer_vectors():
        assert_equal(clip(norm, v), v)


def optax_ends_above_the_bound():
    norms = [
        exact_norm(step(optax.clip_by_global_norm(1.0), g)) for g in half_precision_gradients()
    ]
    assert 10 < sum(n > 1 for n in norms) < 30
    assert max(norms) > 1.002
    wide = [g.astype(jnp.float32) for g in half_precision_gradients()]
    norms = [exact_norm(step(optax.clip_by_global_norm(1.0), g)) for g in wide]
    assert 1 < max(norms) < 1 + 1e-6


def jaxclip_never_ends_above_the_bound():
    for g in half_precision_gradients():
        assert_clipped([g], 1.0)
        assert_clipped([g.astype(jnp.float32)], 1.0)


def optax_rounds_the_bound_of_entries_up():
    for dtype in (jnp.bfloat16, jnp.float32):
        assert float(step(optax.clip(0.1), jnp.ones(1, dtype))[0]) > 0.1


def jaxclip_rounds_the_bound_of_entries_down():
    for dtype in (jnp.bfloat16, jnp.float32):
        clipped = float(step(jaxclip.clip_by_value(0.1), jnp.ones(1, dtype))[0])
        assert 0.1 * (1 - float(jnp.finfo(dtype).eps)) < clipped <= 0.1


# --- Hyper-parameters ---------------------------------------------------------------------

HALF = jnp.asarray([3.0, 4.0], jnp.bfloat16)


def optax_cannot_mix_a_traced_norm_and_half_precision():
    for dtype in (jnp.bfloat16, jnp.float16):
        tx = optax.clip_by_global_norm(jnp.float32(1))
        assert_raises(TypeError, step, tx, HALF.astype(dtype))


def jaxclip_mixes_a_traced_norm_and_half_precision():
    for dtype in (jnp.bfloat16, jnp.float16):
        assert_clipped([HALF.astype(dtype)], 1.0, jaxclip.clip_by_global_norm(jnp.float32(1)))


def traced_factories(library: Any) -> list[Callable]:
    """Every transform whose hyper-parameter may come as a float32 array."""
    clip = library.clip if library is optax else library.clip_by_value
    decayed = lambda x: library.lion(0.1, weight_decay=x)  # noqa: E731
    return [clip, library.scale_by_lion, library.sign_sgd, library.signum, library.lion, decayed]


def optax_promotes_under_a_traced_number():
    for make in traced_factories(optax)[:1] + traced_factories(optax)[2:]:
        assert step(make(jnp.float32(0.5)), HALF).dtype == jnp.float32


def jaxclip_keeps_the_dtype_under_a_traced_number():
    for make in traced_factories(jaxclip):
        given, plain = step(make(jnp.float32(0.5)), HALF), step(make(0.5), HALF)
        assert given.dtype == jnp.bfloat16
        assert_equal(given, plain)


def optax_divides_zero_by_zero():
    assert_equal(step(optax.clip_by_global_norm(0.0), jnp.zeros(2)), jnp.full(2, jnp.nan))


def jaxclip_gives_zeros():
    for bound in (0.0, jnp.float32(0)):
        assert_equal(step(jaxclip.clip_by_global_norm(bound), jnp.zeros(2)), jnp.zeros(2))
        assert_equal(step(jaxclip.clip_by_global_norm(bound), jnp.ones(2)), jnp.zeros(2))


def optax_reverses_the_gradient():
    g = jnp.asarray([3.0, -4.0])
    np.testing.assert_allclose(step(optax.clip_by_global_norm(-1.0), g), [-0.6, 0.8], rtol=1e-6)
    assert_equal(step(optax.clip(-1.0), g), [-1, -1])


def jaxclip_refuses_a_bound_below_zero():
    for make in (jaxclip.clip_by_global_norm, jaxclip.clip_by_value):
        assert_raises(ValueError, make, -1.0)
        assert_equal(step(make(jnp.float32(-1)), jnp.asarray([3.0, -4.0])), [0, 0])


def steps_of_a_traced_rate(library: Any, rate: float) -> list:
    g = jnp.asarray([1.0, -2.0])
    return [
        step(make(jnp.float32(rate)), g)
        for make in (library.sign_sgd, library.signum, library.lion)
    ]


def optax_steps_to_nan_with_a_rate_of_nan():
    for u in steps_of_a_traced_rate(optax, np.nan):
        assert_equal(u, [np.nan, np.nan])


def jaxclip_takes_no_step_with_a_rate_of_nan():
    for bad in (np.nan, np.inf, -np.inf):
        for u in steps_of_a_traced_rate(jaxclip, bad):
            assert_equal(u, [0, 0])


# --- Gradients that are not finite --------------------------------------------------------

ONE_INF = {"a": jnp.asarray([np.inf, 1.0, -2.0]), "b": jnp.ones(2)}
ONE_NAN = {"a": jnp.asarray([np.nan, 1.0, -2.0]), "b": jnp.ones(2)}


def optax_mixes_nan_and_zeros():
    clipped = step(optax.clip_by_global_norm(1.0), ONE_INF)
    assert_equal(clipped["a"], [np.nan, 0, 0])
    assert_equal(clipped["b"], [0, 0])
    clipped = step(optax.clip_by_global_norm(1.0), ONE_NAN)
    assert all(np.isnan(x).all() for x in jax.tree.leaves(clipped))


def jaxclip_zeroes_and_counts_a_bad_step():
    for grads in (ONE_INF, ONE_NAN):
        tx = jaxclip.clip_by_global_norm(1.0)
        clipped, state = tx.update(grads, tx.init(grads))
        assert_equal(clipped["a"], [0, 0, 0])
        assert_equal(clipped["b"], [0, 0])
        assert int(state.stats.num_nonfinite) == 1


def optax_passes_nan_by_value():
    assert_equal(step(optax.clip(1.0), ONE_NAN)["a"], [np.nan, 1, -1])
    assert_equal(step(optax.scale_by_sign(), ONE_NAN)["a"], [np.nan, 1, -1])


def jaxclip_zeroes_and_counts_nan_by_value():
    for tx in (jaxclip.clip_by_value(1.0), jaxclip.scale_by_sign()):
        updates, state = tx.update(ONE_NAN, tx.init(ONE_NAN))
        assert_equal(updates["a"], [0, 1, -1])
        assert int(optax.tree_utils.tree_get(state, "num_nonfinite")) == 1


BAD_THEN_GOOD = [jnp.asarray([1.0, np.nan]), *[jnp.ones(2)] * 5]


def optax_never_forgets_a_nan():
    for tx in (optax.lion(0.1), optax.signum(0.1)):
        params, mu = momentum_after(tx, BAD_THEN_GOOD, jnp.zeros(2))
        assert np.isnan(mu[1])
        assert np.isnan(params[1])
    guarded = optax.apply_if_finite(optax.lion(0.1), max_consecutive_errors=2)
    _, mu = momentum_after(guarded, [*BAD_THEN_GOOD[:1] * 3, *BAD_THEN_GOOD[1:]], jnp.zeros(2))
    assert np.isnan(mu[1])


def jaxclip_keeps_momentum_finite():
    for tx, decay in ((jaxclip.lion(0.1, weight_decay=0.0), 0.99), (jaxclip.signum(0.1), 0.9)):
        params, mu = momentum_after(tx, BAD_THEN_GOOD, jnp.zeros(2))
        expected = [1 - decay**6, 1 - decay**5]  # the second entry misses its first step
        np.testing.assert_allclose(mu, expected, rtol=1e-5)
        np.testing.assert_allclose(params, [-0.6, -0.5], rtol=1e-6)


def slope_at_zero(tx: Any) -> Any:
    return jax.grad(lambda g: jnp.sum(step(tx, g)))(jnp.zeros(2))


def optax_has_no_slope_at_zero():
    assert_equal(slope_at_zero(optax.clip_by_global_norm(1.0)), [np.nan, np.nan])


def jaxclip_has_slope_one_at_zero():
    assert_equal(slope_at_zero(jaxclip.clip_by_global_norm(1.0)), [1, 1])


# --- Leaves that are not real floating arrays ----------------------------------------------


def other_leaves() -> dict[str, Any]:
    return {
        "int": jnp.arange(3),
        "uint8": jnp.arange(3, dtype=jnp.uint8),
        "bool": jnp.asarray([True, False]),
        "float0": np.zeros(2, jax.dtypes.float0),
        "key": jax.random.key(0),
    }


def optax_raises_on_other_leaves_in_a_norm():
    for leaf in other_leaves().values():
        grads = {"w": jnp.ones(2), "other": leaf}
        error = (TypeError, NotImplementedError)
        assert_raises(error, step, optax.clip_by_global_norm(1.0), grads)


def optax_turns_other_leaves_into_floats():
    leaves = other_leaves()
    for name in ("int", "uint8", "bool"):
        for tx in (optax.clip(1.0), optax.scale_by_lion()):
            dtype = step(tx, {"other": leaves[name]})["other"].dtype
            assert dtype == jnp.result_type(float)
    for name in ("float0", "key"):
        for tx in (optax.clip(1.0), optax.scale_by_sign(), optax.scale_by_lion()):
            assert_raises(TypeError, step, tx, {"other": leaves[name]})
    assert_equal(step(optax.scale_by_sign(), leaves["int"]), [0, 1, 1])
    assert_raises(TypeError, step, optax.scale_by_sign(), leaves["bool"])


def jaxclip_passes_other_leaves(*factories: Callable) -> None:
    for make in factories:
        tx = make()
        alone = step(tx, {"w": HALF})["w"]
        for leaf in other_leaves().values():
            updates = step(tx, {"w": HALF, "other": leaf})
            assert updates["other"] is leaf
            assert_equal(updates["w"], alone)


def optax_cannot_clip_complex_entries():
    assert_raises(ValueError, step, optax.clip(1.0), jnp.asarray([3 + 4j]))


def jaxclip_clips_complex_entries_by_modulus():
    clipped = step(jaxclip.clip_by_value(1.0), jnp.asarray([3 + 4j, 0.3j]))
    np.testing.assert_allclose(clipped, [0.6 + 0.8j, 0.3j], rtol=2e-6)
    assert np.abs(float64(clipped[0])) <= 1


# --- Devices ------------------------------------------------------------------------------


def clip_on_two_devices(tx: Any) -> np.ndarray:
    """Clips (1, 1), one entry a device, inside `shard_map`."""
    mesh, spec = Mesh(np.asarray(jax.devices()[:2]), ("data",)), PartitionSpec("data")
    clip = jax.shard_map(lambda g: step(tx, g), mesh=mesh, in_specs=spec, out_specs=spec)
    return np.asarray(jax.jit(clip)(jnp.ones(2)))


def optax_takes_the_norm_of_one_device():
    assert_equal(clip_on_two_devices(optax.clip_by_global_norm(1.0)), [1, 1])


def jaxclip_takes_the_norm_over_the_axis():
    clipped = clip_on_two_devices(jaxclip.clip_by_global_norm(1.0, axis_name="data"))
    np.testing.assert_allclose(clipped, np.full(2, 2**-0.5), rtol=2e-6)
    assert exact_norm(clipped) <= 1


# --- Blocks and units ---------------------------------------------------------------------


def unit_clips(library: Any, value: Any) -> list[Callable]:
    """Clips by the rms of a block, and by the norm of a unit of unit parameters."""

    def by_rms(g: Any) -> Any:
        return step(library.clip_by_block_rms(value), g)

    def by_unit(g: Any) -> Any:
        return step(library.adaptive_grad_clip(value), g, jnp.full_like(g, 0.5))  # norm 1 of four

    return [by_rms, by_unit]


def optax_misses_units_of_extreme_size():
    for g in OVERFLOWING:
        for clip in unit_clips(optax, 0.5):
            assert_equal(clip(g), jnp.zeros(4))
    small, bound = UNDERFLOWING[0]
    assert_equal(step(optax.clip_by_block_rms(bound / 4), small), small)


def jaxclip_clips_units_of_extreme_size():
    for g in OVERFLOWING:
        rtol = float(jnp.finfo(g.dtype).eps) + 12 * 2.0**-23
        for clip, expected in zip(unit_clips(jaxclip, 0.5), (0.5, 0.25), strict=True):
            clipped = float64(clip(g))
            np.testing.assert_allclose(clipped, np.full(4, expected), rtol=rtol)
            assert clipped.max() <= expected
    small, bound = UNDERFLOWING[0]
    clipped = step(jaxclip.clip_by_block_rms(bound / 4), small)
    np.testing.assert_allclose(clipped, float64(small) / 4, rtol=12 * 2.0**-23)


def rms_and_unit_norms(library: Any) -> list[np.ndarray]:
    """Share of the bound that the rms or the norm takes after the clip, of bfloat16 values."""
    shares = []
    for g in half_precision_gradients():
        params = jnp.full(500, 0.5, jnp.bfloat16)
        of_rms = exact_norm(step(library.clip_by_block_rms(0.5), g)) / (0.5 * 500**0.5)
        clipped = step(library.adaptive_grad_clip(0.5), g, params)
        shares.append([of_rms, exact_norm(clipped) / (0.5 * exact_norm(params))])
    return np.asarray(shares, np.float64).max(axis=0)


def optax_ends_above_the_bound_of_units():
    assert np.all(rms_and_unit_norms(optax) > 1.002)


def jaxclip_never_ends_above_the_bound_of_units():
    assert np.all(rms_and_unit_norms(jaxclip) <= 1)


def optax_promotes_units_under_a_traced_number():
    for clip in unit_clips(optax, jnp.float32(0.5)):
        assert clip(HALF).dtype == jnp.float32


def jaxclip_keeps_the_dtype_of_units_under_a_traced_number():
    pairs = zip(unit_clips(jaxclip, jnp.float32(0.5)), unit_clips(jaxclip, 0.5), strict=True)
    for traced, plain in pairs:
        assert traced(HALF).dtype == jnp.bfloat16
        assert_equal(traced(HALF), plain(HALF))


def optax_divides_zero_rms_by_zero():
    assert_equal(step(optax.clip_by_block_rms(0.0), jnp.zeros(2)), [np.nan, np.nan])


def jaxclip_gives_zeros_for_a_bound_of_zero():
    for clip in [*unit_clips(jaxclip, 0.0), *unit_clips(jaxclip, jnp.float32(0))]:
        assert_equal(clip(jnp.zeros(2)), [0, 0])
        assert_equal(clip(jnp.ones(2)), [0, 0])


def optax_takes_units_bounds_below_zero():
    g = jnp.asarray([3.0, -4.0])
    by_rms, by_unit = unit_clips(optax, -1.0)
    assert_equal(by_rms(g), g)
    assert np.all(np.sign(by_unit(g)) == [-1, 1])


def jaxclip_refuses_units_bounds_below_zero():
    for make in (jaxclip.clip_by_block_rms, jaxclip.adaptive_grad_clip):
        assert_raises(ValueError, make, -1.0)
    for clip in unit_clips(jaxclip, jnp.float32(-1)):
        assert_equal(clip(jnp.asarray([3.0, -4.0])), [0, 0])


def optax_mixes_nan_and_zeros_in_units():
    for clip in unit_clips(optax, 0.5):
        assert_equal(clip(ONE_INF["a"]), [np.nan, 0, 0])
        assert_equal(clip(ONE_NAN["a"]), [np.nan] * 3)


def jaxclip_zeroes_and_counts_bad_units():
    for tx in (jaxclip.clip_by_block_rms(0.5), jaxclip.adaptive_grad_clip(0.5)):
        for grads in (ONE_INF, ONE_NAN):
            updates, state = tx.update(grads, tx.init(grads), {"a": jnp.ones(3), "b": jnp.ones(2)})
            assert_equal(updates["a"], [0, 0, 0])
            assert np.isfinite(updates["b"]).all()
            assert int(state.stats.num_nonfinite) == 1


def slopes_of_units_at_zero(library: Any) -> list:
    return [
        jax.grad(lambda g, clip=clip: jnp.sum(clip(g)))(jnp.zeros(2))
        for clip in unit_clips(library, 0.5)
    ]


def optax_has_no_slope_of_units_at_zero():
    for slope in slopes_of_units_at_zero(optax):
        assert_equal(slope, [np.nan, np.nan])


def jaxclip_has_slope_one_of_units_at_zero():
    for slope in slopes_of_units_at_zero(jaxclip):
        assert_equal(slope, [1, 1])


def optax_scales_other_leaves_or_raises():
    leaves = other_leaves()
    for tx in (optax.clip_by_block_rms(1.0), optax.adaptive_grad_clip(0.01)):
        for name in ("int", "uint8", "bool"):
            assert step(tx, leaves[name]).dtype in (jnp.float32, jnp.result_type(float))
        for name in ("float0", "key"):
            assert_raises((TypeError, NotImplementedError), step, tx, leaves[name])


DIFFERENCES = [
    Difference(
        "overflow",
        "global norm of float16 values of 300, float32 or bfloat16 values of 1e20",
        "all zeros",
        "clipped, right direction",
        "the square overflows to infinity; ours is taken again over scaled values",
        optax_zeroes_what_overflows,
        jaxclip_clips_what_overflows,
    ),
    Difference(
        "underflow",
        "global norm of float32 values of 1e-25, or a million float16 values of 1e-4, "
        "with a bound below it",
        "not clipped",
        "clipped",
        "the square underflows to zero",
        optax_passes_what_underflows,
        jaxclip_clips_what_underflows,
    ),
    Difference(
        "many_leaves",
        "1,024 bfloat16 leaves of norm 1, bound 1",
        "norm 2 after the clip",
        "norm at most 1",
        "a running bfloat16 sum stalls at 256; ours is in float32",
        optax_stalls_on_many_leaves,
        jaxclip_counts_every_leaf,
    ),
    Difference(
        "at_the_bound",
        "global norm exactly equal to the bound",
        "values change in about half of the trials",
        "bit-identical",
        "`g / norm * max_norm` rounds twice; ours leaves alone what is not above the bound",
        optax_changes_gradients_of_exactly_the_bound,
        jaxclip_keeps_gradients_of_exactly_the_bound,
    ),
    Difference(
        "norm_above_the_bound",
        "500 bfloat16 or float32 values, global norm above the bound",
        "in half of the trials the norm after the clip is above the bound, "
        "by up to 0.4 % in bfloat16 and 1e-7 in float32",
        "never above",
        "rounding to nearest goes either way; ours rounds towards zero, with a margin of "
        "eight float32 ulps",
        optax_ends_above_the_bound,
        jaxclip_never_ends_above_the_bound,
    ),
    Difference(
        "entry_above_the_bound",
        "entries above a bound the dtype does not have: 0.1",
        "0.1001 in bfloat16, 0.100000001 in float32",
        "at most 0.1",
        "the bound is rounded to nearest; ours towards zero",
        optax_rounds_the_bound_of_entries_up,
        jaxclip_rounds_the_bound_of_entries_down,
    ),
    Difference(
        "traced_norm",
        "global-norm bound in a float32 array, bfloat16 or float16 gradients",
        "TypeError",
        "clipped, dtype kept",
        "a schedule, a sweep or `inject_hyperparams` gives arrays",
        optax_cannot_mix_a_traced_norm_and_half_precision,
        jaxclip_mixes_a_traced_norm_and_half_precision,
    ),
    Difference(
        "traced_number",
        "bound, learning rate or decay in a float32 array, bfloat16 gradients",
        "float32 updates",
        "bfloat16 updates",
        "an array promotes where a Python number does not",
        optax_promotes_under_a_traced_number,
        jaxclip_keeps_the_dtype_under_a_traced_number,
    ),
    Difference(
        "zero_norm",
        "zero gradients and global-norm bound 0",
        "NaN",
        "zeros",
        "0 / 0",
        optax_divides_zero_by_zero,
        jaxclip_gives_zeros,
    ),
    Difference(
        "negative_bound",
        "bound -1",
        "global norm: reversed gradients; by value: every entry -1",
        "ValueError; as a jax array it counts as 0",
        "a schedule that undershoots must not climb the loss",
        optax_reverses_the_gradient,
        jaxclip_refuses_a_bound_below_zero,
    ),
    Difference(
        "rate_of_nan",
        "learning rate NaN in a jax array",
        "NaN parameters",
        "no step",
        "one bad number of a schedule must not end the run",
        optax_steps_to_nan_with_a_rate_of_nan,
        jaxclip_takes_no_step_with_a_rate_of_nan,
    ),
    Difference(
        "bad_norm",
        "one infinity or NaN, clip by global norm",
        "infinity: that entry NaN and all others 0; NaN: all NaN",
        "zeros, counted",
        "a bad step is skipped as a whole",
        optax_mixes_nan_and_zeros,
        jaxclip_zeroes_and_counts_a_bad_step,
    ),
    Difference(
        "bad_entry",
        "one NaN, clip by value or sign",
        "NaN",
        "0, counted",
        "NaN has no sign and no side of the bound",
        optax_passes_nan_by_value,
        jaxclip_zeroes_and_counts_nan_by_value,
    ),
    Difference(
        "momentum",
        "one NaN gradient into Lion or Signum",
        "that entry of momentum and parameters NaN for ever; `apply_if_finite` lets it in "
        "after its limit",
        "that entry of the momentum stays as it was, counted",
        "a moving average never forgets NaN",
        optax_never_forgets_a_nan,
        jaxclip_keeps_momentum_finite,
    ),
    Difference(
        "slope_at_zero",
        "derivative through a global-norm clip at g = 0",
        "NaN",
        "identity",
        "the square root has no slope at 0; the clip has",
        optax_has_no_slope_at_zero,
        jaxclip_has_slope_one_at_zero,
    ),
    Difference(
        "other_leaves_in_a_norm",
        "integer, bool, float0 or key leaves, clip by global norm",
        "five different errors",
        "pass through, uncounted",
        "they hold no gradient",
        optax_raises_on_other_leaves_in_a_norm,
        lambda: jaxclip_passes_other_leaves(lambda: jaxclip.clip_by_global_norm(1.0)),
    ),
    Difference(
        "other_leaves",
        "integer, bool, float0 or key leaves, clip by value or sign",
        "integers and bools become float32 (signs for `scale_by_sign`), the others raise",
        "pass through, uncounted",
        "they hold no gradient",
        optax_turns_other_leaves_into_floats,
        lambda: jaxclip_passes_other_leaves(
            lambda: jaxclip.clip_by_value(1.0),
            jaxclip.scale_by_sign,
            jaxclip.scale_by_lion,
            lambda: jaxclip.sign_sgd(0.1),
            lambda: jaxclip.signum(0.1),
            lambda: jaxclip.lion(0.1),
        ),
    ),
    Difference(
        "complex_entries",
        "complex gradients, clip by value",
        "ValueError",
        "clipped by modulus",
        "a complex number has a modulus though no order",
        optax_cannot_clip_complex_entries,
        jaxclip_clips_complex_entries_by_modulus,
    ),
    Difference(
        "shard_map",
        "global norm inside `shard_map`, two devices of norm 1",
        "norm 1.414 after a clip to 1",
        "norm 1, with `axis_name=`",
        "the norm of one device is not the norm of the gradient",
        optax_takes_the_norm_of_one_device,
        jaxclip_takes_the_norm_over_the_axis,
    ),
    Difference(
        "units_of_extreme_size",
        "rms of a block or norm of a unit: float16 values of 300, float32 of 1e20 or 1e-25",
        "zeros where the square overflows, not clipped where it underflows",
        "clipped, right direction",
        "as for the global norm",
        optax_misses_units_of_extreme_size,
        jaxclip_clips_units_of_extreme_size,
    ),
    Difference(
        "units_above_the_bound",
        "500 bfloat16 values, rms or unit norm above the bound",
        "above the bound by up to 0.5 % after the clip",
        "never above",
        "rounding to nearest goes either way",
        optax_ends_above_the_bound_of_units,
        jaxclip_never_ends_above_the_bound_of_units,
    ),
    Difference(
        "traced_unit_bound",
        "bound of a block or unit in a float32 array, bfloat16 gradients",
        "float32 updates",
        "bfloat16 updates",
        "an array promotes where a Python number does not",
        optax_promotes_units_under_a_traced_number,
        jaxclip_keeps_the_dtype_of_units_under_a_traced_number,
    ),
    Difference(
        "zero_rms",
        "zero gradients and rms bound 0",
        "NaN",
        "zeros",
        "0 / 0 is not a number",
        optax_divides_zero_rms_by_zero,
        jaxclip_gives_zeros_for_a_bound_of_zero,
    ),
    Difference(
        "negative_unit_bound",
        "rms bound -1, or `clipping` -1",
        "rms: no clip; units: reversed gradients",
        "ValueError; as a jax array it counts as 0",
        "a schedule that undershoots must not climb the loss",
        optax_takes_units_bounds_below_zero,
        jaxclip_refuses_units_bounds_below_zero,
    ),
    Difference(
        "bad_unit",
        "one infinity or NaN in a block or unit",
        "infinity: that entry NaN and the others 0; NaN: all NaN",
        "zeros, counted",
        "a bad unit has no direction",
        optax_mixes_nan_and_zeros_in_units,
        jaxclip_zeroes_and_counts_bad_units,
    ),
    Difference(
        "slope_of_units_at_zero",
        "derivative through a clip of blocks or units at g = 0",
        "NaN",
        "identity",
        "the square root has no slope at 0; the clip has",
        optax_has_no_slope_of_units_at_zero,
        jaxclip_has_slope_one_of_units_at_zero,
    ),
    Difference(
        "other_leaves_in_units",
        "integer, bool, float0 or key leaves, clip of blocks or units",
        "integers and bools become float32, the others raise",
        "pass through, uncounted",
        "they hold no gradient",
        optax_scales_other_leaves_or_raises,
        lambda: jaxclip_passes_other_leaves(
            lambda: jaxclip.clip_by_block_rms(1.0), lambda: jaxclip.adaptive_grad_clip(0.01)
        ),
    ),
]


def no_longer_true(difference: Difference) -> str | None:
    """What the check of optax's column says where it fails; None where it holds."""
    try:
        with default_promotion(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of jax, to optax
            difference.check_optax()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def markdown_table() -> str:
    rows = [["input", f"optax {OPTAX_VERSION}", "jaxclip", "why"]]
    rows += [["---"] * 4]
    rows += [[d.input, d.optax, d.jaxclip, d.why] for d in DIFFERENCES]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    print(markdown_table())
    reasons = {d.name: no_longer_true(d) for d in DIFFERENCES}
    print(f"\nChecked with optax {optax.__version__}, jax {jax.__version__}.")
    for name, reason in reasons.items():
        if reason:
            print(f"No longer true: {name} ({reason})")


if __name__ == "__main__":
    main()
