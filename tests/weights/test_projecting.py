"""`project_weights`: after `apply_updates` weights are in their set, also when optax wraps it."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import optax.contrib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxclip
from jaxclip import box, project_weights
from jaxclip._core.updates import rounded_sum
from jaxclip.weights import max_norm, nonnegative, spectral_cap, unit_norm
from oracles.exact_sets import DTYPES, drawn, norms, wide
from oracles.quick import quick_first

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
eager_and_jit = pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
seeds = st.integers(0, 2**32 - 1)


def after_a_step(projection, w, u):
    tx = project_weights(projection)
    updates, _ = tx.update(u, tx.init(w), w)
    with jax.numpy_dtype_promotion("standard"):
        return updates, optax.apply_updates(w, updates)


norm_step = jax.jit(lambda w, u, bound: after_a_step(max_norm(bound, 0), w, u))
box_step = jax.jit(lambda w, u, low, high: after_a_step(box(low, high), w, u))
positive_step = jax.jit(lambda w, u: after_a_step(nonnegative(), w, u))
unit_step = jax.jit(lambda w, u: after_a_step(unit_norm(0), w, u))


def assert_eager_equals_jit(step, *arguments):
    for a, e in zip(step(*arguments), step.__wrapped__(*arguments), strict=True):
        eps = float(jnp.finfo(a.dtype).eps)
        largest = float(np.max(np.abs(wide(arguments[0])))) + float(np.max(np.abs(wide(e))))
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(e, np.float64), rtol=0, atol=4 * eps * largest
        )


# --- Where the weights are after a step -----------------------------------------------


@every_dtype
@settings(max_examples=20)
@given(seed=seeds, size=st.sampled_from([0.1, 1.0, 30.0]), far=st.sampled_from([1e-3, 1.0, 1e3]))
def test_norms_are_never_above_the_bound_from_inside_and_from_outside(dtype, seed, size, far):
    bound = np.float32(0.9)
    w, u = drawn(seed, (32, 4), dtype, size), drawn(seed + 1, (32, 4), dtype, far)
    updates, after = norm_step(w, u, bound)
    assert updates.dtype == after.dtype == dtype
    is_passed = np.all(np.asarray(updates) == u, axis=0)
    room = np.where(is_passed, 1 + 1e-6, 1)  # a norm that comes out as the bound
    assert np.all(norms(after, 0)[0] <= bound * room)
    # And the way there is the projection, to the rounding of the weights and of the sum.
    moved, eps = wide(w) + wide(u), float(ml_dtypes.finfo(dtype).eps)
    expected = moved * np.minimum(1, bound / norms(moved, 0))
    atol = 4 * eps * (np.abs(wide(w)) + np.abs(expected) + 2.0**-20) + 2e-6 * np.abs(expected)
    assert np.all(np.abs(wide(after) - expected) <= atol)


@pytest.mark.parametrize(("dtype", "coarser"), [(np.float32, ml_dtypes.bfloat16)])
def test_updates_coarser_than_the_weights_leave_a_norm_ball_by_their_rounding(dtype, coarser):
    w, u = drawn(0, (64, 8), dtype, 1.0), drawn(1, (64, 8), coarser, 1.0)
    updates, after = norm_step(w, u, np.float32(0.9))
    assert (updates.dtype, after.dtype) == (coarser, dtype)
    room = float(ml_dtypes.finfo(coarser).eps) * norms(w, 0)
    assert np.all(norms(after, 0) <= 0.9 + room)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", quick_first([ml_dtypes.bfloat16, np.float16, np.float32]))
def test_a_step_that_stays_inside_is_the_one_that_was_asked_for(dtype):
    w, u = jnp.asarray(drawn(3, (16, 4), dtype, 0.1)), jnp.asarray(drawn(4, (16, 4), dtype, 0.01))
    inside = abs(w) + jnp.asarray(0.5, dtype)
    for updates in (
        norm_step(w, u, np.float32(99.0))[0],
        box_step(w, u, np.float32(-3.0), np.float32(2.0))[0],
        positive_step(inside, u)[0],
        after_a_step(spectral_cap(99.0), w, u)[0],
    ):
        assert np.array_equal(updates, u)


@pytest.mark.thorough
@every_dtype
@settings(max_examples=20)
@given(seed=seeds, far=st.sampled_from([1e-3, 1.0, 20.0]))
def test_no_entry_is_ever_outside_its_interval(dtype, seed, far):
    w, u = drawn(seed, (64,), dtype, 1.0), drawn(seed + 1, (64,), dtype, far)
    low, high = np.float32(-0.1), np.float32(0.7)
    after = np.asarray(box_step(w, u, low, high)[1], np.float64)
    assert np.all((after >= low) & (after <= high))
    assert np.all(np.asarray(positive_step(w, u)[1], np.float64) >= 0)
    # Entries driven to a bound end within an ulp or two of it.
    inside = np.asarray(box(low, high)(jnp.asarray(w)))
    up = np.asarray(box_step(inside, np.full(64, 9, dtype), low, high)[1], np.float64)
    assert np.all(up >= high * (1 - 3 * float(ml_dtypes.finfo(dtype).eps)))


@every_dtype
@pytest.mark.parametrize("update_dtype", DTYPES)
def test_no_entry_leaves_its_interval_by_a_subnormal_or_a_power_of_two(dtype, update_dtype):
    sizes = np.asarray([0, *2.0 ** np.arange(-26, 11), 1e-5, 5e-5, 1e-3, 0.3, 700])
    signed = np.concatenate([sizes, -sizes])
    w, u = (x.reshape(-1) for x in np.meshgrid(signed.astype(dtype), signed.astype(update_dtype)))
    after = np.asarray(positive_step(w, u)[1], np.float64)
    assert np.all(after >= 0)
    # Bounds that are themselves subnormal in float16; coarse updates may stay away from them.
    low, high = np.float32(-(2.0**-24)), np.float32(2.0**-20)
    near = np.abs(w.astype(np.float64)) <= 2.0**-19
    after = np.asarray(box_step(w[near], u[near], low, high)[1], np.float64)
    assert np.all((after >= low) & (after <= high))


@eager_and_jit
@pytest.mark.parametrize(
    ("w", "dtype", "update_dtype", "low", "high", "expected"),
    [
        (30000, "bfloat16", "bfloat16", 0.05, 0.1, 0),  # the spacing is 128
        (-30000, "bfloat16", "bfloat16", -0.1, -0.05, 0),
        (4.03, "float32", "bfloat16", 0.0, 0.001, 4.03 - 4.03125),
        (-1e6, "float32", "float16", 0.0, np.inf, 65504 - 1e6),  # not to infinity
        (-65504, "float16", "float16", 0.0, np.inf, 0),
        (-65504, "float16", "float16", 65000, 65504, 0),
    ],
)
def test_far_from_a_narrow_box_the_update_that_leads_nearer_is_taken(
    wrap, w, dtype, update_dtype, low, high, expected
):
    w, u = jnp.full(1, w, dtype), jnp.zeros(1, update_dtype)
    after = wrap(lambda w, u: after_a_step(box(low, high), w, u)[1])(w, u)
    np.testing.assert_allclose(after.astype(jnp.float32), expected, atol=1e-6)


@every_dtype
@pytest.mark.parametrize("update_dtype", DTYPES)
def test_the_rounded_sum_is_that_of_apply_updates_and_of_exact_arithmetic(dtype, update_dtype):
    rng = np.random.default_rng(0)
    near, far = (np.exp2(rng.uniform(low, 10, 4096)) for low in (-26, -30))
    w = (near * rng.choice([-1, 0, 1], 4096)).astype(dtype)
    u = (far * rng.choice([-1, 1], 4096)).astype(update_dtype)
    u[::8] = (-w[::8].astype(np.float64)).astype(update_dtype)  # cancels, but for rounding
    # Half precision is summed in float32, whose rounding comes first.
    exact = (w.astype(np.float32) + u.astype(np.float32)).astype(dtype)
    got = rounded_sum(jnp.asarray(w), jnp.asarray(u))
    with jax.numpy_dtype_promotion("standard"):
        applied = optax.apply_updates(jnp.asarray(w), jnp.asarray(u))
    for other in (applied, jax.jit(rounded_sum)(w, u), exact):
        assert np.array_equal(wide(got), wide(other))


def test_the_rounded_sum_keeps_the_subnormals_of_float16_in_float64():
    with enable_x64(True):
        w, u = jnp.zeros(3, jnp.float16), jnp.asarray([-1e-5, 5e-5, 2.0**-25 * 1.01])
        for f in (rounded_sum, jax.jit(rounded_sum)):
            assert np.array_equal(f(w, u), np.asarray(u).astype(np.float16))


@every_dtype
def test_unit_norms_are_kept_to_the_rounding_of_the_sum(dtype):
    w, u = drawn(5, (64, 8), dtype, 0.1), drawn(6, (64, 8), dtype, 1.0)
    _, after = unit_step(w, u)
    assert np.all(np.abs(norms(after, 0) - 1) <= 2 * float(ml_dtypes.finfo(dtype).eps))


def test_singular_values_are_kept_to_the_rounding_of_the_sum():
    w, u = drawn(7, (12, 8), np.float32), drawn(8, (12, 8), np.float32)
    after = after_a_step(spectral_cap(1.5), jnp.asarray(w), jnp.asarray(u))[1]
    s = np.linalg.svd(np.asarray(after, np.float64), compute_uv=False)
    assert s[0] <= 1.5 * (1 + 1e-6) + 2.0**-23 * np.linalg.norm(w)
    assert s[0] >= 1.5 * (1 - 1e-4)


def test_complex_weights_stay_within_the_norm():
    w = (drawn(9, (32, 4), np.float32) + 1j * drawn(10, (32, 4), np.float32)).astype(np.complex64)
    _, after = norm_step(w, 3 * w[::-1], np.float32(1.0))
    assert np.all(norms(after, 0) <= 1)
    np.testing.assert_allclose(norms(after, 0).astype(float), 1, atol=2e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", quick_first([ml_dtypes.bfloat16, np.float16, np.float32]))
def test_eager_equals_jit(dtype):
    w, u = jnp.asarray(drawn(11, (8, 3), dtype)), jnp.asarray(drawn(12, (8, 3), dtype, 9.0))
    assert_eager_equals_jit(norm_step, w, u, np.float32(0.7))
    assert_eager_equals_jit(box_step, w, u, np.float32(-0.3), np.float32(0.7))


@pytest.mark.thorough
def test_a_weight_that_is_nan_stays_nan_and_harms_no_other():
    w = jnp.asarray([[np.nan, 3.0], [1.0, 4.0]])
    for projection in (box(-1.0, 0.5), max_norm(1.0, 0), unit_norm(0)):
        _, after = after_a_step(projection, w, jnp.zeros_like(w))
        assert np.isnan(after[0, 0])
        assert np.all(np.isfinite(after[:, 1]))


@pytest.mark.thorough
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    "projection",
    [box(0.1), box(-0.1, 0.3), max_norm(0.5), max_norm(0.5, ...), unit_norm(), spectral_cap(0.5)],
    ids=["box", "interval", "norm", "leaf norm", "unit", "spectral"],
)
def test_eight_devices_equal_one_and_the_sharding_is_kept(projection, kind):
    mesh = Mesh(np.array(jax.devices()[:8]), ("x",), axis_types=(kind,))
    split = NamedSharding(mesh, PartitionSpec("x"))
    w, u = (jnp.asarray(drawn(seed, (16, 4), np.float32)) for seed in (13, 14))
    tx = project_weights(projection)

    @jax.jit
    def update(u, w):
        return tx.update(u, tx.init(w), w)[0]

    one = update(u, w)
    with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else jax.sharding.use_mesh(mesh):
        many = update(*(jax.device_put(x, split) for x in (u, w)))
    assert many.sharding.is_equivalent_to(split, 2)
    np.testing.assert_allclose(many, one, atol=5e-6)


# --- Parts, masks, schedules, errors --------------------------------------------------

PARAMS = {
    "dense": {"kernel": jnp.full((4, 3), 2.0), "bias": jnp.full(3, 2.0)},
    "head": {"kernel": jnp.full((4, 3), -2.0)},
    "count": jnp.arange(3),
}
ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)


@pytest.mark.thorough
def test_parts_have_projections_of_their_own():
    sets = {
        "dense": {"kernel": max_norm(1.0, 0), "bias": None},
        "head": box(-1.0, 0.0),
        "count": None,
    }
    _, after = after_a_step(sets, PARAMS, ZEROS)
    np.testing.assert_allclose(after["dense"]["kernel"], np.full((4, 3), 0.5), rtol=1e-5)
    assert np.array_equal(after["dense"]["bias"], PARAMS["dense"]["bias"])
    assert np.array_equal(after["head"]["kernel"], -np.ones((4, 3)))
    assert np.array_equal(after["count"], PARAMS["count"])


SETS = {
    "box": (box(0.5), lambda x: np.clip(x, -0.5, 0.5)),
    "interval": (box(-0.25, 1.0), lambda x: np.clip(x, -0.25, 1.0)),
    "max_norm": (max_norm(0.75, ...), lambda x: x * np.minimum(1, 0.75 / np.linalg.norm(x))),
    "unit_norm": (unit_norm(...), lambda x: x / np.linalg.norm(x)),
    "nonnegative": (nonnegative(), lambda x: np.maximum(x, 0)),
    "free": (None, lambda x: x),
}
LEAVES = {
    "vector": ("float32", (3,)),
    "matrix": ("float32", (2, 3)),
    "half": ("bfloat16", (2, 3)),
    "count": ("int32", (2,)),
}
trees_of_kinds = st.recursive(
    st.sampled_from(list(LEAVES)),
    lambda parts: (
        st.dictionaries(st.sampled_from("abc"), parts, min_size=1)
        | st.lists(parts, min_size=1, max_size=3)
    ),
    max_leaves=7,
)


@st.composite
def sets_for(draw, kinds, is_root=True):
    """A prefix tree of projections, and the name of each leaf's own."""
    if isinstance(kinds, str) or draw(st.booleans()):
        name = draw(st.sampled_from([name for name in SETS if name != "free" or not is_root]))
        return SETS[name][0], jax.tree.map(lambda _: name, kinds)
    keys = kinds if isinstance(kinds, dict) else range(len(kinds))
    parts = {key: draw(sets_for(kinds[key], False)) for key in keys}
    both = [{key: part[i] for key, part in parts.items()} for i in range(2)]
    return both if isinstance(kinds, dict) else [list(tree.values()) for tree in both]


@pytest.mark.thorough
@settings(max_examples=30)
@given(data=st.data(), seed=seeds)
def test_in_any_tree_each_leaf_ends_in_the_set_that_any_prefix_tree_has_for_it(data, seed):
    kinds = data.draw(trees_of_kinds)
    projection, names = data.draw(sets_for(kinds))
    draws = iter(range(10**6))

    def drawn_tree(size):
        def leaf(kind):
            dtype, shape = LEAVES[kind]
            if dtype == "int32":
                return jnp.zeros(shape, dtype)
            return jnp.asarray(drawn((seed + next(draws)) % 2**32, shape, jnp.dtype(dtype), size))

        return jax.tree.map(leaf, kinds)

    w, u = drawn_tree(1.0), drawn_tree(0.5)
    updates, after = after_a_step(projection, w, u)
    trees = (jax.tree.leaves(tree) for tree in (names, w, u, updates, after))
    for name, w_leaf, u_leaf, update, got in zip(*trees, strict=True):
        assert (update.dtype, got.dtype, got.shape) == (u_leaf.dtype, w_leaf.dtype, w_leaf.shape)
        if jnp.issubdtype(got.dtype, jnp.integer):
            assert np.array_equal(got, w_leaf)
            continue
        moved = wide(w_leaf) + wide(u_leaf)
        atol = 4 * float(jnp.finfo(got.dtype).eps) * (1 + np.max(np.abs(wide(w_leaf))))
        np.testing.assert_allclose(wide(got), SETS[name][1](moved), rtol=1e-5, atol=atol)


@pytest.mark.parametrize(
    "mask",
    [
        jaxclip.weights.kernels_only,
        {"dense": {"kernel": True, "bias": False}, "head": True, "count": False},
    ],
)
def test_a_mask_leaves_the_others_free(mask):
    tx = project_weights(box(1.0), mask)
    updates, _ = tx.update(ZEROS, tx.init(PARAMS), PARAMS)
    after = optax.apply_updates(PARAMS, updates)
    assert np.max(after["dense"]["kernel"]) == 1
    assert np.array_equal(after["dense"]["bias"], PARAMS["dense"]["bias"])
    assert np.min(after["head"]["kernel"]) == -1


THRESHOLDS = {
    "number": 1.0,
    "array": np.full(3, 1.0),
    "schedule": lambda step: 1.0 / (1 + step.astype(jnp.float32)),
    "fan_in": jaxclip.fan_in(1.0),
    "max_abs": jaxclip.max_abs(axis=-1),
    "prefix": {"dense": {"kernel": 0.5, "bias": jaxclip.max_abs()}, "head": 1.5, "count": np.inf},
    "per_tree": jaxclip.thresholds.per_tree(jaxclip.thresholds.std_multiple(0.5)),
}


@eager_and_jit
@pytest.mark.parametrize(
    "mask", quick_first([jaxclip.weights.kernels_only, None]), ids=["masked", "all"]
)
@pytest.mark.parametrize("threshold", THRESHOLDS.values(), ids=THRESHOLDS)
def test_a_box_takes_every_threshold_of_clip_weights(threshold, mask, wrap):
    tx = project_weights(box(threshold), mask)
    updates, _ = wrap(tx.update)(ZEROS, tx.init(PARAMS), PARAMS)
    after = optax.apply_updates(PARAMS, updates)
    expected = wrap(lambda p: jaxclip.clip_weights(p, threshold, mask))(PARAMS)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=2e-7), after, expected)
    changed = jax.tree.map(lambda a, w: not np.array_equal(a, w), after, PARAMS)
    assert any(jax.tree.leaves(changed)) == (threshold is not THRESHOLDS["max_abs"])


@pytest.mark.thorough
def test_boxes_in_a_prefix_tree_read_the_whole_path():
    params = {"query": {"kernel": jnp.full((4, 2, 3), 9.0)}, "mlp": jnp.full((4, 2, 3), 9.0)}
    sets = {"query": box(jaxclip.fan_in(1.0)), "mlp": box(1.0)}
    _, after = after_a_step(sets, params, jax.tree.map(jnp.zeros_like, params))
    np.testing.assert_allclose(after["query"]["kernel"], np.sqrt(2 / 4), rtol=1e-6)
    np.testing.assert_array_equal(after["mlp"], 1.0)


def test_schedules_are_called_once_a_step_for_all_leaves():
    calls = []

    def schedule(step):
        calls.append(step)
        return 1.0 - 0.1 * step.astype(jnp.float32)

    for projection in (box(schedule), box(-9.0, schedule), max_norm(schedule)):
        calls.clear()
        after_a_step(projection, PARAMS, ZEROS)
        assert len(calls) == 1


def test_a_box_whose_threshold_does_not_fit_is_refused():
    for threshold, message in [({"v": 1.0}, "prefix"), (np.ones(7), r"dense/bias")]:
        tx = project_weights(box(threshold))
        with pytest.raises(ValueError, match=message):
            tx.update(ZEROS, tx.init(PARAMS), PARAMS)


def test_schedules_count_the_steps_of_the_transform():
    bound = lambda step: 1.0 / (1 + step.astype(jnp.float32))  # noqa: E731
    for projection in (box(bound), box(-9.0, bound), max_norm(bound)):
        tx, w = project_weights(projection), jnp.asarray([5.0])
        state = tx.init(w)
        for expected in (1.0, 0.5, 1 / 3):
            updates, state = jax.jit(tx.update)(jnp.zeros(1), state, w)
            w = optax.apply_updates(w, updates)
            np.testing.assert_allclose(w, [expected], rtol=1e-5)


@pytest.mark.parametrize(
    "bad",
    [None, 1.0, "box", jnp.clip, {"w": 1.0}, max_norm],
    ids=["none", "number", "string", "function", "tree", "factory"],
)
def test_what_is_no_projection_is_refused_with_the_path(bad):
    with pytest.raises(TypeError, match="projection"):
        project_weights(bad)


def test_a_tree_that_does_not_fit_and_missing_params_are_refused():
    tx = project_weights({"v": box(1.0)})
    with pytest.raises(ValueError, match="prefix"):
        tx.update({"w": jnp.ones(2)}, tx.init({"w": jnp.ones(2)}), {"w": jnp.ones(2)})
    tx = project_weights(box(1.0))
    with pytest.raises(ValueError, match="project_weights needs the parameters"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


@pytest.mark.parametrize(
    ("updates", "path"),
    [
        ({"layer": {"v": jnp.ones(2)}}, "layer/v"),
        ({"layer": {"w": jnp.ones(3)}}, "layer/w"),
        ({"layer": {"w": jnp.ones(2)}, "tail": jnp.ones(1)}, "tail"),
        ({"layer": {}}, "layer/w"),
    ],
)
def test_updates_that_do_not_fit_the_parameters_are_refused_with_the_path(updates, path):
    params = {"layer": {"w": jnp.ones(2)}}
    tx = project_weights(box(0.5))
    with pytest.raises(ValueError, match=path):
        tx.update(updates, tx.init(params), params)


@pytest.mark.thorough
def test_updates_keep_dtype_and_weak_type_and_other_leaves_pass_through():
    params = {"w": jnp.ones(2), "weak": jnp.asarray(2.0), "n": jnp.arange(3), "none": None}
    updates = {
        "w": jnp.ones(2, jnp.bfloat16),
        "weak": jnp.asarray(1.0),
        "n": np.zeros(3, jax.dtypes.float0),
        "none": None,
    }
    tx = project_weights(box(0.5))
    got, _ = tx.update(updates, tx.init(params), params)
    assert got["w"].dtype == jnp.bfloat16
    assert got["weak"].weak_type
    assert got["n"] is updates["n"]
    assert got["none"] is None


# --- Wrapped by optax -----------------------------------------------------------------
# docs/transforms.md has this as a table: "Sets for weights".

START = {"a": jnp.full((4, 3), 0.05), "b": jnp.full((3,), 0.05)}
BOUND = 0.1


def boxed(inner, threshold=BOUND):
    return optax.chain(inner, project_weights(box(threshold)))


def largest(tree) -> float:
    return max(float(np.max(np.abs(wide(x)))) for x in jax.tree.leaves(tree))


def walk(tx, params, num_steps=6):
    """The parameters after each step of gradients that push out of the box."""
    state, update = tx.init(params), jax.jit(tx.update)
    for i in range(num_steps):
        grads = jax.tree.map(lambda p, i=i: jnp.full_like(p, 1.0 - 3.0 * (i % 3)), params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
        yield params, state


def test_inside_partition_and_masked_the_boxed_group_is_boxed_and_the_other_free():
    labels = {"a": "boxed", "b": "free"}
    inside, free = boxed(optax.sgd(1.0)), optax.sgd(1.0)
    masked = optax.chain(
        optax.masked(inside, {"a": True, "b": False}), optax.masked(free, {"a": False, "b": True})
    )
    for tx in (optax.partition({"boxed": inside, "free": free}, labels), masked):
        for params, _ in walk(tx, START):
            assert largest(params["a"]) <= BOUND
        assert largest(params["b"]) > BOUND


@pytest.mark.thorough
def test_inside_multi_steps_the_box_holds_after_every_step():
    for params, _ in walk(optax.MultiSteps(boxed(optax.sgd(1.0)), 2), START):
        assert largest(params) <= BOUND
    assert largest(params) > BOUND / 2


def test_inside_apply_if_finite_the_box_holds_also_where_a_step_is_skipped():
    tx = optax.apply_if_finite(boxed(optax.sgd(1.0)), 2)
    state, params = tx.init(START), START
    for value in (1.0, np.nan, -1.0, np.inf, 1.0):
        grads = jax.tree.map(lambda p, v=value: jnp.full_like(p, v), params)
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
        assert largest(params) <= BOUND


def test_inside_lookahead_fast_weights_are_in_the_box_and_slow_ones_between_two_points_of_it():
    # A convex set: what lies between two of its points is in it, up to the rounding.
    tx = optax.lookahead(boxed(optax.sgd(1.0)), sync_period=2, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(START)
    state, update = tx.init(params), jax.jit(tx.update)
    for i in range(6):
        grads = jax.tree.map(lambda p, i=i: jnp.full_like(p, 1.0 - 3.0 * (i % 3)), params.fast)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        assert largest(params.slow) <= BOUND * (1 + 2.0**-22)
        assert largest(params.fast) <= BOUND * (1 + 2.0**-22)


def test_inside_schedule_free_no_box_holds_and_around_it_that_of_the_trained_weights():
    # Inside, the update from y into the box is added to z, another point.
    def largest_of_run(tx, state_of):
        w, trained, averaged = jnp.asarray([0.05]), [], []
        state, update = tx.init(w), jax.jit(tx.update)
        for i in range(30):
            updates, state = update(jnp.asarray([1.0 if i < 6 else -1.0]), state, w)
            w = optax.apply_updates(w, updates)
            trained.append(w)
            averaged.append(optax.contrib.schedule_free_eval_params(state_of(state), w))
        return largest(trained), largest(averaged)

    schedule_free = optax.contrib.schedule_free
    trained, _ = largest_of_run(schedule_free(boxed(optax.sgd(1.0)), 1.0), lambda s: s)
    assert trained > 1.2 * BOUND
    around = boxed(schedule_free(optax.sgd(1.0), 1.0))
    trained, averaged = largest_of_run(around, lambda s: s[0])
    assert trained <= BOUND
    assert averaged > 1.2 * BOUND


@pytest.mark.thorough
def test_inside_inject_hyperparams_and_named_chain_the_box_holds():
    injected = optax.inject_hyperparams(lambda learning_rate: boxed(optax.sgd(learning_rate)))(0.7)
    for tx in (injected, optax.named_chain(("only", boxed(optax.sgd(1.0))))):
        for params, _ in walk(tx, START):
            assert largest(params) <= BOUND


@pytest.mark.thorough
def test_behind_an_optimizer_that_promotes_dtypes_the_box_holds():
    for params, _ in walk(boxed(optax.adamw(0.5)), START):
        assert largest(params) <= BOUND


def test_inside_partition_each_group_has_its_own_box():
    groups = {"a": boxed(optax.sgd(1.0)), "b": boxed(optax.sgd(1.0), 2 * BOUND)}
    for params, _ in walk(optax.partition(groups, {"a": "a", "b": "b"}), START):
        assert largest(params["a"]) <= BOUND < largest(params["b"]) <= 2 * BOUND


@eager_and_jit
def test_with_inject_hyperparams_the_threshold_can_be_read_and_changed(wrap):
    tx = optax.inject_hyperparams(lambda threshold: project_weights(box(threshold)))(BOUND)
    state = tx.init(START)
    assert float(state.hyperparams["threshold"]) == pytest.approx(BOUND)
    state.hyperparams["threshold"] = jnp.float32(0.02)
    updates, _ = wrap(tx.update)(jax.tree.map(jnp.ones_like, START), state, START)
    assert largest(optax.apply_updates(START, updates)) <= float(np.float32(0.02))


@pytest.mark.thorough
def test_vmap_over_the_threshold_equals_a_loop():
    thresholds = jnp.asarray([0.0, 0.02, 0.1, np.inf], jnp.float32)

    def run(t):
        return list(walk(boxed(optax.sgd(1.0), t), START, 3))[-1][0]

    mapped = jax.jit(jax.vmap(run))(thresholds)
    for i, t in enumerate(thresholds):
        alone = run(t)
        assert largest(alone) <= float(t)
        for key in START:
            np.testing.assert_allclose(mapped[key][i], alone[key], rtol=1e-6)
