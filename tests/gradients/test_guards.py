"""Bad steps change nothing, and spikes are skipped or clipped."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.tree_utils import tree_get

import jaxclip
from jaxclip.gradients.feedback import error_feedback
from jaxclip.gradients.guards import skip_nonfinite, skip_or_clip
from oracles.quick import quick_first


def adam_update(*args: Any) -> tuple[Any, Any]:
    with jax.numpy_dtype_promotion("standard"):  # Adam raises floats to integers
        return optax.adam(0.1).update(*args)


ADAM = optax.GradientTransformation(optax.adam(0.1).init, adam_update)
SKIPPERS = {
    "skip_nonfinite": lambda inner: skip_nonfinite(inner),
    "skip_or_clip": lambda inner: skip_or_clip(inner, 1e3, 1.0, num_deviations=4.0, num_warmup=2),
}
every_skipper = pytest.mark.parametrize("wrap", SKIPPERS.values(), ids=SKIPPERS)
GUARDS = SKIPPERS | {"error_feedback": lambda inner: error_feedback(inner)}
every_guard = pytest.mark.parametrize("wrap", GUARDS.values(), ids=GUARDS)


def make_tree(seed: int, dtype: Any = jnp.float32) -> Any:
    rng = np.random.default_rng(seed)
    tree = {"w": rng.standard_normal((4, 3)), "b": [rng.standard_normal(5)]}
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def poison(tree: Any, bad: float, seed: int) -> Any:
    """`bad` at one random place of one random leaf."""
    rng = np.random.default_rng(seed)
    leaves, treedef = jax.tree.flatten(tree)
    i = rng.integers(len(leaves))
    place = rng.integers(leaves[i].size)
    leaves[i] = leaves[i].reshape(-1).at[place].set(bad).reshape(leaves[i].shape)
    return jax.tree.unflatten(treedef, leaves)


def train(tx: Any, params: Any, gradients: list) -> tuple[Any, Any]:
    @jax.jit
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for grads in gradients:
        params, state = step(params, state, grads)
    return params, state


def assert_identical(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, np.asarray(a).tobytes()) == (e.dtype, np.asarray(e).tobytes())


def num_nonfinite(state: Any) -> int:
    return int(tree_get(state, "num_nonfinite"))


def assert_minus_zero(x: jax.Array) -> None:
    assert (np.signbit(x) & (np.asarray(x) == 0)).all()


# --- Bad steps ------------------------------------------------------------------------


@every_guard
@pytest.mark.parametrize("dtype", quick_first([jnp.bfloat16, jnp.float32, jnp.float16]))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_step_changes_nothing(wrap: Callable, dtype: Any, bad: float):
    tx, params = wrap(ADAM), make_tree(0, dtype)
    params["w"] = params["w"].at[0, 0].set(-0.0)
    update = jax.jit(tx.update)
    _, state = update(make_tree(1, dtype), tx.init(params), params)
    for seed in range(4):
        grads = poison(make_tree(2, dtype), bad, seed)
        updates, new_state = update(grads, state, params)
        assert_identical(jax.jit(optax.apply_updates)(params, updates), params)
        assert_identical(optax.apply_updates(params, updates), params)
        assert_identical(new_state.inner_state, state.inner_state)
        assert num_nonfinite(new_state) == int(new_state.num_skipped) == 1
        assert int(new_state.step) == 2


@pytest.mark.thorough
@every_guard
def test_training_goes_on_as_if_the_bad_steps_had_not_been(wrap: Callable):
    good = [make_tree(seed) for seed in range(1, 6)]
    mixed = [*good[:2], poison(good[0], np.nan, 0), poison(good[3], np.inf, 1), *good[2:]]
    params, state = train(wrap(ADAM), make_tree(0), mixed)
    expected, expected_state = train(wrap(ADAM), make_tree(0), good)
    assert_identical((params, state.inner_state), (expected, expected_state.inner_state))
    assert int(state.num_skipped) == 2


@pytest.mark.thorough
def test_steps_skipped_in_a_row_are_counted_and_nothing_is_let_in():
    tx, params, good = skip_nonfinite(ADAM), make_tree(0), make_tree(1)
    bad = poison(good, np.nan, 0)
    counts, state = [], tx.init(params)
    start = state.inner_state
    for grads in (bad, bad, bad, bad):
        _, state = tx.update(grads, state, params)
        counts.append(int(state.num_consecutive))
    assert counts == [1, 2, 3, 4]
    assert_identical(state.inner_state, start)
    _, state = tx.update(good, state, params)
    assert int(state.num_consecutive) == 0
    assert not bool(state.is_skipped)
    assert (int(state.num_skipped), int(state.step)) == (4, 5)


def test_a_nonfinite_update_or_state_of_the_inner_transform_is_skipped_and_counted():
    params = jnp.ones(3, jnp.float32)
    overflows = jnp.asarray([1e30, 1, 1], jnp.float32)  # its square is infinite in Adam's state
    _, state = skip_nonfinite(ADAM).update(overflows, skip_nonfinite(ADAM).init(params))
    assert (int(state.num_skipped), num_nonfinite(state)) == (1, 0)
    assert_identical(state.inner_state, ADAM.init(params))
    _, state = (tx := skip_nonfinite(ADAM, check_inner=False)).update(overflows, tx.init(params))
    assert not np.isfinite(state.inner_state[0].nu).all()

    nan_rate = skip_nonfinite(optax.scale(jnp.float32(np.nan)))
    updates, state = jax.jit(nan_rate.update)(params, nan_rate.init(params))
    assert_minus_zero(updates)
    assert (int(state.num_skipped), num_nonfinite(state)) == (1, 0)


def test_an_infinite_scalar_in_the_inner_state_is_legitimate():
    tx = skip_nonfinite(
        optax.inject_hyperparams(jaxclip.clip_by_global_norm)(
            lambda step: jnp.where(step == 0, 1.0, jnp.inf)
        )
    )
    _, state = train(tx, make_tree(0), [make_tree(1)] * 3)
    assert int(state.num_skipped) == 0


@pytest.mark.thorough
def test_under_vmap_only_the_bad_member_is_skipped():
    tx, params = skip_nonfinite(ADAM), jnp.ones((3, 4))
    grads = jnp.ones((3, 4)).at[1, 2].set(jnp.nan)
    updates, state = jax.jit(jax.vmap(tx.update))(grads, jax.vmap(tx.init)(params))
    np.testing.assert_array_equal(state.num_skipped, [0, 1, 0])
    assert_minus_zero(updates[1])
    assert (updates[0] != 0).all()


@every_guard
def test_extra_arguments_and_parameters_reach_the_inner_transform(wrap: Callable):
    seen = []

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        seen.append((params, extra_args))
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    wrap(inner).update(jnp.ones(2), wrap(inner).init(jnp.ones(2)), "params", value=3)
    assert all(s == ("params", {"value": 3}) for s in seen)


@pytest.mark.parametrize(
    ("clip", "is_checked"),
    [
        (jaxclip.clip_by_global_norm(1.0), False),
        (jaxclip.gradients.autoclip(), False),
        (optax.scale(2.0), True),
    ],
    ids=["global norm", "autoclip", "scale"],
)
def test_an_inner_transform_is_computed_twice_only_if_it_may_overflow(clip: Any, is_checked: bool):
    num_updates = 0

    def counted(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        nonlocal num_updates
        num_updates += 1
        return tx.update(updates, state, params, **extra_args)

    lion = jaxclip.lion(1e-3, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params))
    tx = optax.with_extra_args_support(optax.chain(clip, lion))
    guarded = skip_nonfinite(optax.GradientTransformationExtraArgs(tx.init, counted))
    w = jnp.ones(3)
    guarded.update(w, guarded.init(w), w)
    assert num_updates == 1 + is_checked


KEEP_FINITE = {
    "sign_sgd": jaxclip.sign_sgd(1e38),
    "lion": jaxclip.lion(1e38, weight_decay=1e38),
    "signum": jaxclip.signum(2.0, weight_decay=0.5, sign=jaxclip.sign.scaled_sign("rms")),
    "clip, lion": optax.chain(jaxclip.clip_by_global_norm(1e-30), jaxclip.lion(1.0)),
}


@pytest.mark.parametrize("inner", KEEP_FINITE.values(), ids=KEEP_FINITE)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_sign_optimizers_make_finite_updates_of_finite_gradients_and_weights(inner, dtype):
    largest = jnp.finfo(dtype).max
    w, grads = jnp.array([largest, -largest, 0.0], dtype), jnp.array([largest, largest, 0.0], dtype)
    tx = skip_nonfinite(inner)
    state = tx.init(w)
    for _ in range(2):
        updates, state = tx.update(grads, state, w)
        assert all(np.isfinite(np.asarray(x, np.float64)).all() for x in jax.tree.leaves(updates))
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state.inner_state))
    assert int(state.num_skipped) == 0


# --- Spikes ---------------------------------------------------------------------------


def oracle(
    norms: list, drop: float, k: float, decay: float, num_warmup: int, max_consecutive: int
) -> list[tuple[bool, float, float]]:
    """Whether each step is skipped, and mean and deviation after it, in float64."""
    mean, variance, n, in_row, rows = 0.0, 0.0, 0, 0, []
    for x in norms:
        limit = min(drop, mean + k * variance**0.5) if n >= num_warmup else drop
        skipped = not np.isfinite(x) or (x > limit and in_row < max_consecutive)
        if skipped:
            in_row += int(np.isfinite(x))
        else:
            n, in_row = n + 1, 0
            a, d = max(1 - decay, 1 / n), x - mean
            mean, variance = mean + a * d, (1 - a) * (variance + a * d * d)
        rows.append((skipped, mean, variance**0.5))
    return rows


@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e15])
@pytest.mark.parametrize("spike", [1e1, 1e2, 1e3, 1e4])
def test_the_history_is_that_of_the_accepted_norms_alone(spike: float, scale: float):
    rng = np.random.default_rng(3)
    norms = rng.lognormal(0.0, 0.2, 60)
    norms[[20, 33, 34, 50]] *= spike
    norms[[7, 21]] = np.nan, np.inf
    norms = np.float32(norms * scale)
    expected = oracle(list(map(float, norms)), np.inf, 4.0, 0.9, 10, 5)
    tx = skip_or_clip(
        optax.identity(), max_norm=scale, num_deviations=4.0, decay=0.9, num_warmup=10
    )
    update, state = jax.jit(tx.update), tx.init(jnp.zeros(1))
    before = 0
    for x, (is_skipped, mean, deviation) in zip(norms, expected, strict=True):
        updates, state = update(jnp.asarray([x]), state)
        assert (int(state.num_skipped) > before) == is_skipped
        before = int(state.num_skipped)
        assert abs(float(updates[0])) <= np.float32(scale)
        np.testing.assert_allclose(state.norm_mean, mean, rtol=1e-5)
        np.testing.assert_allclose(state.norm_deviation, deviation, rtol=1e-4, atol=1e-6 * mean)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))
    assert all(expected[i][0] for i in (7, 20, 21, 33, 34, 50))
    assert int(state.stats.num_nonfinite) == 2


def test_a_spike_is_skipped_whole_and_a_lesser_norm_clipped():
    tx = skip_or_clip(optax.trace(0.9), drop_norm=100.0, max_norm=1.0)
    state = tx.init(jnp.zeros(2))
    rows = []
    for size in (0.1, 10.0, 1000.0, 100.0, np.nan):
        old = state
        updates, state = tx.update(jnp.array([0.6, 0.8]) * size, state)
        rows.append(
            [state.stats.pre_norm, state.stats.clip_coef, state.stats.clip_rate, state.num_skipped]
        )
        if size in (1000.0, np.nan):
            assert_minus_zero(updates)
            assert_identical(state.inner_state, old.inner_state)
    expected = [[0.1, 1, 0, 0], [10, 0.1, 1 / 2, 0], [1000, 0, 1 / 3, 1]]
    expected += [[100, 0.01, 2 / 4, 1], [100, 0, 2 / 5, 2]]
    np.testing.assert_allclose(np.asarray(rows), expected, rtol=1e-5)
    assert float(state.threshold) == 100.0


def test_a_new_level_is_accepted_after_a_row_of_finite_spikes_and_nans_never():
    def skipped(max_consecutive: int | None, sizes: list) -> list[bool]:
        tx = skip_or_clip(optax.identity(), 10.0, 1.0, max_consecutive=max_consecutive)
        state, seen = tx.init(jnp.zeros(1)), []
        for size in sizes:
            updates, new = tx.update(jnp.asarray([size]), state)
            assert abs(float(updates[0])) <= 1
            seen.append(int(new.num_skipped) > int(state.num_skipped))
            state = new
        return seen

    yes, no = True, False
    assert skipped(2, [99.0] * 7) == [yes, yes, no, yes, yes, no, yes]
    assert skipped(2, [99.0, np.nan, 99.0, np.nan, 99.0]) == [yes, yes, yes, yes, no]
    assert skipped(2, [99.0, 1.0, 99.0, 99.0, 99.0]) == [yes, no, yes, yes, no]
    assert skipped(2, [np.inf] * 6) == [yes] * 6
    assert skipped(None, [99.0] * 6) == [yes] * 6


def test_infinite_thresholds_leave_the_optimizer_as_it_is():
    # Not jitted: XLA fuses the two programs differently.
    tx, params = skip_or_clip(ADAM, num_warmup=1), make_tree(0)
    state, inner_state = tx.init(params), ADAM.init(params)
    for seed in range(1, 4):
        updates, state = tx.update(make_tree(seed), state, params)
        expected, inner_state = ADAM.update(make_tree(seed), inner_state, params)
        assert_identical((updates, state.inner_state), (expected, inner_state))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_largest_gradients_leave_finite_norms_behind(dtype: Any):
    tx = skip_or_clip(optax.identity(), max_norm=1.0, num_deviations=3.0, num_warmup=1)
    state = tx.init(jnp.zeros(9, dtype))
    for size in (1.0, -1.0, 0.5, 1.0):
        grads = jnp.full(9, size * float(jnp.finfo(dtype).max), dtype)
        updates, state = tx.update(grads, state)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))
        assert np.isfinite(np.asarray(updates, np.float64)).all()
    assert int(state.stats.num_nonfinite) == 0


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["drop_norm", "max_norm", "num_deviations"])
def test_a_traced_threshold_that_goes_wrong_poisons_nothing(name: str):
    @jax.jit
    def last(value: jax.Array) -> Any:
        tx = skip_or_clip(ADAM, **{"num_warmup": 1, name: value})
        return train(tx, jnp.ones(3), [jnp.full(3, x) for x in (1.0, 2.0, 3.0)])

    for value in (np.nan, -1.0, 0.0, np.inf):
        params, state = last(jnp.float32(value))
        assert np.isfinite(np.concatenate([np.ravel(x) for x in jax.tree.leaves(state)])).all()
        assert (int(state.stats.num_nonfinite) > 0) == np.isnan(value)
        assert np.isfinite(params).all()


@pytest.mark.parametrize("num_warmup", [1, 2, 3])
def test_the_history_counts_from_the_first_step_after_the_warm_up(num_warmup):
    tx = skip_or_clip(optax.identity(), num_deviations=3.0, num_warmup=num_warmup)
    for num_accepted in (num_warmup - 1, num_warmup, num_warmup + 1):
        state = tx.init(jnp.zeros(1))
        for _ in range(num_accepted):
            _, state = tx.update(jnp.array([1.0]), state)
        assert int(state.num_skipped) == 0
        _, state = tx.update(jnp.array([100.0]), state)
        assert int(state.num_skipped) == (num_accepted >= num_warmup)


@pytest.mark.thorough
def test_hyper_parameters_are_injected_without_naming_those_that_are_counts():
    tx = optax.inject_hyperparams(skip_or_clip)(ADAM, drop_norm=5.0, max_norm=lambda step: 1.0)
    _, state = train(tx, jnp.ones(3), [jnp.ones(3), jnp.full(3, 9.0)])
    assert int(state.inner_state.num_skipped) == 1
    stats = jaxclip.clip_stats(state)
    assert {"skip_or_clip/pre_norm", "skip_or_clip/num_skipped"} <= set(stats)


# --- Devices --------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_inside_shard_map_one_bad_shard_makes_all_skip(kind: AxisType):
    mesh = Mesh(np.array(jax.devices()[:8]), ("x",), axis_types=(kind,))
    inner = optax.trace(0.9)
    for tx in (
        skip_nonfinite(inner, axis_name="x"),
        skip_or_clip(inner, 50.0, 1.0, axis_name="x"),
        error_feedback(inner, axis_name="x"),
    ):

        @jax.jit
        def run(gradients: jax.Array, tx: Any = tx) -> Any:
            def local(gradients: jax.Array) -> Any:
                state, out = tx.init(gradients[0]), []
                for g in gradients:
                    updates, state = tx.update(g, state)
                    out.append(updates)
                return jnp.stack(out), state.num_skipped, tree_get(state, "num_nonfinite")

            specs = (P(None, "x"), P(), P())
            return jax.shard_map(local, mesh=mesh, in_specs=P(None, "x"), out_specs=specs)(
                gradients
            )

        gradients = np.full((3, 16), 0.1, np.float32)
        gradients[1, 5] = np.nan
        gradients[2] = 0.2
        updates, num_skipped, num_bad = run(
            jax.device_put(gradients, NamedSharding(mesh, P(None, "x")))
        )
        assert_minus_zero(updates[1])
        assert (np.asarray(updates)[[0, 2]] != 0).all()
        assert (int(num_skipped), int(num_bad)) == (1, 1)


def test_inside_shard_map_a_spike_is_one_of_the_whole_norm():
    mesh = Mesh(np.array(jax.devices()[:8]), ("x",))
    tx = skip_or_clip(optax.identity(), 2.0, 1.0, axis_name="x")

    def local(g: jax.Array) -> Any:
        updates, state = tx.update(g, tx.init(g))
        return updates, state.stats.pre_norm, state.num_skipped

    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("x"), out_specs=(P("x"), P(), P())))
    updates, norm, num_skipped = run(jnp.full(8, 1.0))
    np.testing.assert_allclose(norm, np.sqrt(8), rtol=1e-6)
    assert int(num_skipped) == 1
    assert_minus_zero(updates)


# --- Arguments ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: skip_nonfinite(0.1), TypeError),
        (lambda: skip_or_clip(ADAM, -1.0), ValueError),
        (lambda: skip_or_clip(ADAM, max_norm=np.nan), ValueError),
        (lambda: skip_or_clip(ADAM, max_norm="1"), TypeError),
        (lambda: skip_or_clip(ADAM, max_norm=jaxclip.fan_in()), TypeError),
        (lambda: skip_or_clip(ADAM, num_deviations=-1), ValueError),
        (lambda: skip_or_clip(ADAM, decay=1.5), ValueError),
        (lambda: skip_or_clip(ADAM, num_warmup=0), ValueError),
        (lambda: skip_or_clip(ADAM, max_consecutive=True), ValueError),
    ],
)
def test_wrong_arguments_raise_in_the_factory(make: Callable, error: type):
    with pytest.raises(error):
        make()
