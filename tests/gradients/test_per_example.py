"""Per-example clipping: one example at a time in float64, sensitivity, masks, parts, devices."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxclip.gradients import per_example
from oracles.exact_clips import exact_norm

PARAMS = {"w": np.float32([[0.5, -1.0], [0.25, 2.0], [1.0, 0.0]]), "b": np.float32([0.1, -0.2])}


def loss_fn(params, batch):
    """Mean squared error, whose gradient of one example is `[x r, r]` for `r = x w + b - y`."""
    residuals = batch["x"] @ params["w"] + params["b"][None] - batch["y"]
    return 0.5 * jnp.mean(jnp.sum(residuals**2, axis=1))


def batch_of(seed, size, spread=2.0):
    rng = np.random.default_rng(seed)
    sizes = np.exp(spread * rng.normal(size=(size, 1)))
    x, y = sizes * rng.normal(size=(size, 3)), rng.normal(size=(size, 2))
    return {"x": x.astype(np.float32), "y": y.astype(np.float32)}


def expected(batch, max_norm, mask=None, params=PARAMS):
    """Clipped gradients of each example, norms, and losses, in float64."""
    wide, params = (jax.tree.map(lambda a: a.astype(np.float64), t) for t in (batch, params))
    residuals = wide["x"] @ params["w"] + params["b"] - wide["y"]
    grads = {"w": wide["x"][:, :, None] * residuals[:, None], "b": residuals}
    norms = np.sqrt((grads["w"] ** 2).sum((1, 2)) + (grads["b"] ** 2).sum(1))
    kept = np.ones(len(norms)) if mask is None else np.asarray(mask, float)
    factors = np.minimum(1, max_norm / norms) * kept
    clipped = {"w": grads["w"] * factors[:, None, None], "b": grads["b"] * factors[:, None]}
    return clipped, norms * kept, 0.5 * (residuals**2).sum(1) * kept


def assert_close(actual, wanted, rtol=2e-6):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=rtol * np.abs(e).max())


@functools.cache
def compiled(microbatch_size=None, divide_by=None):
    def run(params, batch, max_norm, mask):
        clipped_grad = per_example(
            loss_fn, max_norm, microbatch_size=microbatch_size, divide_by=divide_by
        )
        return clipped_grad(params, batch, mask)

    return jax.jit(run)


@pytest.mark.parametrize("microbatch_size", [None, 1, 4, 5, 12, 50])
def test_it_is_the_mean_of_the_gradients_clipped_one_by_one(microbatch_size):
    batch, max_norm = batch_of(0, 12), 3.0
    clipped, norms, losses = expected(batch, max_norm)
    assert 0 < (norms > max_norm).sum() < 12
    got = compiled(microbatch_size)(PARAMS, batch, max_norm, np.ones(12, bool))
    assert_close(got.grads, jax.tree.map(lambda g: g.mean(0), clipped))
    np.testing.assert_allclose(got.norms, norms, rtol=1e-6)
    np.testing.assert_allclose(got.loss, losses.mean(), rtol=1e-6)
    assert int(got.num_clipped) == (norms > max_norm).sum()
    assert got.num_nonfinite == 0
    assert got.aux is None


@given(seed=st.integers(0, 2**32 - 1), power=st.integers(-8, 8))
def test_one_example_has_at_most_the_norm_that_is_given_in_exact_arithmetic(seed, power):
    batch, max_norm = batch_of(seed, 1, spread=6.0), np.float32(1.37 * 2.0**power)
    got = compiled(divide_by=1.0)(PARAMS, batch, max_norm, np.ones(1, bool))
    assert exact_norm(got.grads) <= max_norm


@given(seed=st.integers(0, 2**32 - 1))
def test_one_example_more_changes_the_sum_by_at_most_max_norm_and_another_by_twice(seed):
    batch, other = batch_of(seed, 6), batch_of(seed + 1, 6)
    swapped = jax.tree.map(lambda x, y: np.concatenate([y[:1], x[1:]]), batch, other)
    kept = np.ones(6, bool)
    run = functools.partial(compiled(divide_by=1.0), PARAMS)
    full = run(batch, 1.5, kept).grads
    without = run(batch, 1.5, kept & (np.arange(6) > 0)).grads
    change = jax.tree.map(lambda a, b: np.asarray(a, float) - np.asarray(b, float), full, without)
    assert exact_norm(change) <= 1.5 + 6e-6  # the sums are rounded
    removed = compiled(divide_by=1.0)(
        PARAMS, jax.tree.map(lambda x: x[1:], batch), 1.5, np.ones(5, bool)
    )
    assert_close(removed.grads, without, rtol=1e-6)
    changed = run(swapped, 1.5, kept).grads
    change = jax.tree.map(lambda a, b: np.asarray(a, float) - np.asarray(b, float), full, changed)
    assert exact_norm(change) <= 3 + 6e-6


@pytest.mark.parametrize("microbatch_size", [None, 3])
def test_masked_examples_count_for_nothing_whatever_they_hold(microbatch_size):
    batch, mask = batch_of(2, 7), np.asarray([1, 1, 0, 1, 0, 1, 1], bool)
    batch["x"][2], batch["y"][4] = np.nan, np.inf
    got = compiled(microbatch_size)(PARAMS, batch, 2.0, mask)
    kept = jax.tree.map(lambda x: x[mask], batch)
    clipped, norms, losses = expected(kept, 2.0)
    assert_close(got.grads, jax.tree.map(lambda g: g.mean(0), clipped))
    np.testing.assert_allclose(got.norms[mask], norms, rtol=1e-6)
    assert not np.asarray(got.norms)[~mask].any()
    np.testing.assert_allclose(got.loss, losses.mean(), rtol=1e-6)
    assert got.num_nonfinite == 0
    assert int(got.num_clipped) == (norms > 2).sum()
    nothing = compiled(microbatch_size)(PARAMS, batch, 2.0, np.zeros(7, bool))
    assert all(not np.asarray(x).any() for x in jax.tree.leaves(nothing))


def test_an_example_that_is_not_finite_counts_as_zeros_and_is_counted():
    batch = batch_of(3, 4)
    batch["x"][1] = np.nan
    got = compiled(divide_by=1.0)(PARAMS, batch, 2.0, np.ones(4, bool))
    good = np.asarray([True, False, True, True])
    clipped, _, _ = expected(jax.tree.map(lambda x: x[good], batch), 2.0)
    assert_close(got.grads, jax.tree.map(lambda g: g.sum(0), clipped))
    assert got.num_nonfinite == 1
    assert np.isnan(got.loss)
    assert np.isnan(got.norms[1])


def test_bounds_of_infinity_zero_and_nan_are_treated_as_by_every_clip():
    batch, kept = batch_of(4, 3), np.ones(3, bool)
    run = functools.partial(compiled(), PARAMS, batch)
    plain = jax.grad(loss_fn)(PARAMS, batch)
    assert_close(run(np.float32(np.inf), kept).grads, plain)
    for bound in (0.0, -1.0, np.nan):
        assert all(not g.any() for g in jax.tree.leaves(run(np.float32(bound), kept).grads))


def test_squares_that_overflow_or_underflow_are_clipped_in_the_right_direction():
    def linear(w, batch):
        return jnp.sum(batch @ w)

    batch = np.asarray([[3e30, 4e30], [3e-30, 4e-30]], np.float32)
    got = jax.jit(per_example(linear, 1e-35, divide_by=1))(np.zeros(2, np.float32), batch)
    np.testing.assert_allclose(got.grads, [1.2e-35, 1.6e-35], rtol=1e-5)
    np.testing.assert_allclose(got.norms, [5e30, 5e-30], rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_gradients_of_half_precision_are_summed_in_float32(dtype):
    def linear(w, batch):
        return jnp.sum(batch @ w)

    batch = np.full((3000, 1), 1.0, dtype)  # a running sum would stall at 2,048, or at 256
    run = jax.jit(per_example(linear, 10.0, microbatch_size=1000, divide_by=1))
    got = run(np.zeros(1, dtype), batch)
    assert got.grads.dtype == jnp.float32
    assert got.grads[0] == 3000


def test_aux_comes_back_stacked_in_the_order_of_the_batch():
    def with_aux(params, batch):
        return loss_fn(params, batch), {"x": batch["x"][0, 0], "n": batch["y"].shape[0]}

    batch = batch_of(5, 7)
    got = jax.jit(per_example(with_aux, 1.0, microbatch_size=3, has_aux=True))(PARAMS, batch)
    np.testing.assert_array_equal(got.aux["x"], batch["x"][:, 0])
    np.testing.assert_array_equal(got.aux["n"], np.ones(7))


def test_keys_in_the_batch_give_each_example_its_own_randomness():
    draw = jax.vmap(functools.partial(jax.random.normal, dtype=jnp.float32))

    def noisy(w, batch):
        return jnp.sum(draw(batch["key"]) * w)

    keys = jax.random.split(jax.random.key(0), 5)
    got = per_example(noisy, jnp.inf, microbatch_size=2)(jnp.float32(1.0), {"key": keys})
    draws = draw(keys)
    np.testing.assert_allclose(got.grads, draws.mean(), rtol=1e-6)
    np.testing.assert_allclose(got.norms, np.abs(draws), rtol=1e-6)


def test_it_agrees_with_the_sum_of_optax_over_gradients_of_each_example():
    batch = batch_of(6, 9)
    grads = jax.vmap(lambda x, y: jax.grad(loss_fn)(PARAMS, {"x": x[None], "y": y[None]}))(
        batch["x"], batch["y"]
    )
    total, num_clipped = optax.per_example_global_norm_clip(grads, 2.0)
    got = compiled(divide_by=1.0)(PARAMS, batch, 2.0, np.ones(9, bool))
    assert_close(got.grads, total, rtol=1e-5)
    assert int(got.num_clipped) == int(num_clipped)


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_devices_of_shard_map_clip_their_own_examples_and_share_the_mean(
    check_vma, microbatch_size
):
    batch, mask = batch_of(7, 24), np.arange(24) % 5 > 0
    mesh, split, whole = Mesh(jax.devices()[:8], ("i",)), PartitionSpec("i"), PartitionSpec()
    clipped_grad = per_example(loss_fn, 2.0, microbatch_size=microbatch_size, axis_name="i")

    def run(params, batch, mask):
        result = clipped_grad(params, batch, mask)
        return result._replace(norms=None), result.norms

    mapped = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(whole, split, split),
        out_specs=(whole, split),
        check_vma=check_vma,
    )
    got, norms = jax.jit(mapped)(PARAMS, batch, mask)
    alone = compiled()(PARAMS, batch, 2.0, mask)
    assert_close(got.grads, alone.grads)
    np.testing.assert_allclose(norms, alone.norms, rtol=1e-6)
    np.testing.assert_allclose(got.loss, alone.loss, rtol=1e-6)
    assert int(got.num_clipped) == int(alone.num_clipped)


def test_a_batch_that_is_split_over_devices_gives_the_same_in_parts_too():
    batch = batch_of(8, 16)
    mesh = Mesh(jax.devices()[:8], ("i",))
    placed = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("i")))
    alone = compiled()(PARAMS, batch, 2.0, np.ones(16, bool))
    for size in (None, 8):
        got = compiled(size)(PARAMS, placed, 2.0, np.ones(16, bool))
        assert_close(got.grads, alone.grads)
        np.testing.assert_allclose(got.norms, alone.norms, rtol=1e-6)


def test_batches_that_are_empty_or_uneven_and_masks_that_do_not_fit_are_refused():
    clipped_grad = per_example(loss_fn, 1.0)
    for empty in ({}, {"x": np.ones((0, 3)), "y": np.ones((0, 2))}):
        with pytest.raises(ValueError, match="batch must have at least one example"):
            clipped_grad(PARAMS, empty)
    with pytest.raises(ValueError, match="first axis, 4 by the first leaf; 'y' has shape"):
        clipped_grad(PARAMS, {"x": np.ones((4, 3)), "y": np.ones((3, 2))})
    with pytest.raises(ValueError, match="'y' has shape"):
        clipped_grad(PARAMS, {"x": np.ones((4, 3)), "y": np.float32(1)})
    for mask in (np.ones(3, bool), np.ones(4), np.ones((4, 1), bool)):
        with pytest.raises(ValueError, match="mask must be a vector of 4 bools"):
            clipped_grad(PARAMS, batch_of(0, 4), mask)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"max_norm": -1.0}, "max_norm"),
        ({"max_norm": np.nan}, "max_norm"),
        ({"max_norm": "1"}, "max_norm"),
        ({"microbatch_size": 0}, "microbatch_size"),
        ({"microbatch_size": 1.5}, "microbatch_size"),
        ({"divide_by": 0.0}, "divide_by"),
        ({"divide_by": np.inf}, "divide_by"),
        ({"has_aux": 1}, "has_aux"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused_by_name(arguments, name):
    with pytest.raises((TypeError, ValueError), match=name):
        per_example(loss_fn, **({"max_norm": 1.0} | arguments))
