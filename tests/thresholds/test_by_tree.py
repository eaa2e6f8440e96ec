"""One threshold for a whole tree, beside float64 NumPy on all its entries at once."""

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxclip
from jaxclip import fan_in, max_abs, mse_optimal
from jaxclip._core.grids import code_range
from jaxclip.thresholds import per_tree, percentile_abs, rate_optimal
from jaxclip.thresholds.by_magnitude import std_multiple
from oracles.exact_scales import optimal_scale

RNG = np.random.default_rng(0)
# Leaves of many sizes and dtypes; the largest magnitude and the most entries are not in one leaf.
TREE = {
    "kernel": jnp.asarray(RNG.standard_normal((24, 40)), jnp.float32),
    "stack": jnp.asarray(RNG.standard_normal((3, 8, 16)) * 2, jnp.bfloat16),
    "half": jnp.asarray(RNG.standard_t(3, (7, 11)), jnp.float16),
    "bias": jnp.asarray([0.0, 9.5, -0.25]),
    "scalar": jnp.asarray(-1.5),
    "none": None,
    "count": jnp.arange(5) * 100,
    "empty": jnp.zeros((0, 4)),
}


def entries_of(tree) -> np.ndarray:
    """All floating entries in float64, one after another."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return np.concatenate([np.asarray(x).astype(np.float64).ravel() for x in leaves])


def lists_of(tree):
    return jax.tree.map(lambda x: x.tolist(), tree)


def threshold_of(name: str, w: np.ndarray) -> float:
    """What a rule gives for all entries, by NumPy."""
    size = np.abs(w)
    return {
        "max_abs": np.max(size),
        "percentile": np.sort(size)[int(np.ceil(len(size) * 0.9)) - 1],
        "std": 2.5 * np.sqrt(np.mean(size**2)),
        "one bit": np.mean(size),
    }[name]


RULES = {
    "max_abs": max_abs(),
    "percentile": percentile_abs(90),
    "std": std_multiple(2.5),
    "one bit": mse_optimal(1),
}
every_rule = pytest.mark.parametrize("name", RULES)


@pytest.mark.thorough
@every_rule
def test_the_threshold_is_that_of_all_entries_together(name):
    got = per_tree(RULES[name])(TREE)
    assert (got.shape, got.dtype) == ((), jnp.float32)
    expected = threshold_of(name, entries_of(TREE))
    exact = name in ("max_abs", "percentile")
    np.testing.assert_allclose(got, expected, rtol=0 if exact else 1e-6)


def error_of(w: np.ndarray, t: float, low: int, high: int) -> float:
    """Squared error of rounding to the grid, the better of the two signs of its scale."""
    scales = (t / high, -t / high)
    return min(np.sum((w - s * np.clip(np.round(w / s), low, high)) ** 2) for s in scales)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("bits", "levels"), [("ternary", "full"), (2, "full"), (4, "full"), (4, "narrow"), (8, "full")]
)
def test_the_error_over_all_leaves_is_near_the_exact_optimum(bits, levels):
    w, (low, high) = entries_of(TREE), code_range(bits, levels)
    t = float(per_tree(mse_optimal(bits, levels=levels))(TREE))
    best = abs(optimal_scale(w[None], (1,), low, high)).item() * high
    at_most = 1.06 if bits == 8 else 1.005  # as the docstring of `mse_optimal` says
    assert error_of(w, t, low, high) <= at_most * error_of(w, best, low, high)
    assert error_of(w, t, low, high) <= error_of(w, np.abs(w).max(), low, high) * (1 + 1e-5)


@pytest.mark.parametrize("power", [-110, 115])
@pytest.mark.parametrize("rule", [std_multiple(2.0), mse_optimal(4)], ids=["std", "mse"])
def test_squares_of_small_and_large_weights_stay_in_range(rule, power):
    tree = {name: TREE[name] for name in ("kernel", "bias")}
    scaled = jax.tree.map(lambda x: jnp.ldexp(x, jnp.full(x.shape, power)), tree)
    got = np.asarray(per_tree(rule)(scaled), np.float64)
    np.testing.assert_allclose(got, np.ldexp(float(per_tree(rule)(tree)), power), rtol=1e-6)


@pytest.mark.thorough
def test_a_tree_of_one_leaf_has_the_threshold_of_the_leaf():
    for rule in (*RULES.values(), mse_optimal("ternary")):
        together, alone = per_tree(rule)([TREE["kernel"]]), rule(TREE["kernel"])
        np.testing.assert_allclose(together, alone.item(), rtol=1e-6)


@pytest.mark.thorough
def test_a_tree_without_entries_has_the_threshold_0():
    trees = ({}, {"a": None, "n": jnp.arange(3)}, {"e": jnp.zeros((0, 2))}, jnp.zeros((2, 2)))
    for rule in (*RULES.values(), mse_optimal(4)):
        for tree in trees:
            assert float(per_tree(rule)(tree)) == 0


# --- Where it is used -----------------------------------------------------------------


@pytest.mark.thorough
@every_rule
def test_weights_are_clipped_at_one_threshold_also_under_jit(name):
    clip = functools.partial(jaxclip.clip_weights, threshold=per_tree(RULES[name]))
    t = threshold_of(name, entries_of(TREE))
    for clipped in (clip(TREE), jax.jit(clip)(TREE)):
        assert np.max(np.abs(entries_of(clipped))) <= t * (1 + 1e-6)
        for key in ("kernel", "stack", "half", "bias", "scalar", "empty"):
            w, got = TREE[key], clipped[key]
            bound = np.float64(float(jaxclip._core.floats.round_toward_zero(t, w.dtype)))
            expected = np.clip(np.asarray(w).astype(np.float64), -bound, bound)
            assert got.dtype == w.dtype
            # The bound is that of float32 sums, perhaps a step of the dtype away.
            rtol = float(ml_dtypes.finfo(w.dtype).eps) + 1e-6
            np.testing.assert_allclose(np.asarray(got).astype(np.float64), expected, rtol=rtol)
        assert np.array_equal(clipped["count"], TREE["count"])


@pytest.mark.thorough
def test_leaves_outside_the_mask_are_not_measured():
    params = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, 50.0)}
    share = jaxclip.weights.clipping.weight_clip_rate
    for mask in (jaxclip.weights.kernels_only, {"kernel": True, "bias": False}):
        clipped = jaxclip.clip_weights(params, per_tree(std_multiple(0.5)), mask)
        np.testing.assert_allclose(clipped["kernel"], 1.5 * np.ones((2, 2)), rtol=1e-6)
        assert np.array_equal(clipped["bias"], params["bias"])
        assert float(share(params, per_tree(max_abs()), mask)) == 1
    masked = optax.masked(jaxclip.project_weights(jaxclip.box(per_tree(std_multiple(0.5)))), mask)
    updates = masked.update(jax.tree.map(jnp.zeros_like, params), masked.init(params), params)[0]
    np.testing.assert_allclose(updates["kernel"], -1.5 * np.ones((2, 2)), rtol=1e-5)
    assert np.array_equal(updates["bias"], np.zeros(2))


def test_in_a_prefix_tree_it_measures_the_part_that_it_stands_for():
    params = {
        "trunk": {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[8.0]])},
        "head": {"a": jnp.array([32.0])},
        "tail": jnp.array([5.0]),
    }
    rule = per_tree(max_abs())
    found = jaxclip.thresholds.resolve_threshold({"trunk": rule, "head": rule, "tail": 3.0}, params)
    assert jax.tree.map(float, found) == {
        "trunk": {"a": 8.0, "b": 8.0},
        "head": {"a": 32.0},
        "tail": 3.0,
    }


@pytest.mark.thorough
def test_a_chain_and_a_train_step_keep_all_weights_within_one_threshold():
    params = {"a": jnp.array([0.5, -2.0]), "b": jnp.array([[1.0, 4.0]])}
    rule = per_tree(percentile_abs(75))  # 2, of 0.5, 1, 2 and 4
    tx = optax.chain(optax.sgd(0.0), jaxclip.project_weights(jaxclip.box(rule)))
    zeros = jax.tree.map(jnp.zeros_like, params)
    after = optax.apply_updates(params, jax.jit(tx.update)(zeros, tx.init(params), params)[0])
    assert lists_of(after) == {"a": [0.5, -2.0], "b": [[1.0, 2.0]]}

    step = jaxclip.make_train_step(
        lambda params, batch: sum(map(jnp.sum, jax.tree.leaves(params))) * batch,
        optax.sgd(0.5),
        weight_threshold=rule,
    )
    state, info = step(jaxclip.TrainState.create(params, optax.sgd(0.5)), 1.0)
    # 0, -2.5, 0.5 and 3.5; of 0, 2.5, 0.5 and 2.5 then all above the half are on the bound.
    assert lists_of(state.params) == {"a": [0.0, -2.5], "b": [[0.5, 2.5]]}
    assert float(info.weight_clip_rate) == 0.5


def test_gradients_are_clipped_at_a_value_of_the_whole_tree():
    grads = {"a": jnp.array([0.5, -2.0]), "b": jnp.array([[1.0, 4.0]])}
    tx = jaxclip.clip_by_value(per_tree(percentile_abs(75)))
    clipped = tx.update(grads, tx.init(grads))[0]
    assert lists_of(clipped) == {"a": [0.5, -2.0], "b": [[1.0, 2.0]]}


# --- compress -------------------------------------------------------------------------

KERNELS = {name: TREE[name] for name in ("kernel", "stack", "half", "bias")}


@pytest.mark.thorough
@pytest.mark.parametrize("bits", ["ternary", 4])
def test_compressed_leaves_share_one_scale_which_is_the_best_for_all(bits):
    small = jaxclip.compress(KERNELS, jaxclip.Grid(bits, axis=None), rule=per_tree(mse_optimal()))
    assert small["bias"] is KERNELS["bias"]  # and was not measured
    low_bit = {name: q for name, q in small.items() if name != "bias"}
    weights = {name: KERNELS[name] for name in low_bit}
    scales = {abs(float(q.scale.item())) for q in low_bit.values()}
    t = float(per_tree(mse_optimal(bits))(weights))
    _, high = code_range(bits)
    assert len(scales) == 1
    np.testing.assert_allclose(scales.pop() * high, t, rtol=1e-6)


@pytest.mark.thorough
def test_leaves_of_another_rule_are_not_measured_and_widths_have_their_own_thresholds():
    policy = [("stack", {"rule": max_abs()}), ("half", 8)]
    rule = per_tree(mse_optimal())
    small = jaxclip.compress(KERNELS, jaxclip.Grid(3, axis=None), rule=rule, policy=policy)
    measured = [KERNELS["kernel"], KERNELS["half"]]
    for name, bits in (("kernel", 3), ("half", 8)):
        t = float(per_tree(mse_optimal(bits))(measured))
        np.testing.assert_allclose(small[name].threshold, [[t]], rtol=1e-6)
    np.testing.assert_allclose(
        small["stack"].threshold.item(), np.max(np.abs(KERNELS["stack"])), rtol=1e-6
    )


@pytest.mark.thorough
def test_channels_and_targets_take_a_threshold_of_the_tree():
    weights = {"a": TREE["kernel"], "b": 3 * TREE["kernel"]}
    rule = per_tree(max_abs())
    largest = float(jnp.max(jnp.abs(weights["b"])))
    small = jax.jit(lambda w: jaxclip.compress(w, 4, rule=rule))(weights)
    assert small["a"].scale.shape == (1, 40)
    np.testing.assert_allclose(small["a"].threshold, np.full((1, 40), largest), rtol=1e-6)
    chosen = jaxclip.compress(
        weights, jaxclip.Grid(None, axis=None), target_bits_per_weight=5.0, rule=rule
    )
    for q in chosen.values():
        np.testing.assert_allclose(q.threshold, [[largest]], rtol=1e-6)


# --- Sharded --------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("rule", [max_abs(), percentile_abs(90), std_multiple(2.0), mse_optimal(4)])
def test_sharded_leaves_are_measured_where_they_are(rule, kind):
    rng = np.random.default_rng(1)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    shapes = {"a": (16, 8), "b": (8,), "c": (4, 6)}
    specs = {"a": PartitionSpec("x", "y"), "b": PartitionSpec("y"), "c": PartitionSpec()}
    one = {
        name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()
    }
    clip = functools.partial(jaxclip.clip_weights, threshold=per_tree(rule))
    with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else jax.sharding.use_mesh(mesh):
        many = {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in one.items()}
        program = jax.jit(clip).lower(many).compile()
        clipped = program(many)
    moved = set(re.findall(r"all-\w+|collective-\w+|reduce-scatter", program.as_text()))
    assert moved == {"all-reduce"}
    for name, expected in clip(one).items():
        assert clipped[name].sharding.is_equivalent_to(many[name].sharding, len(shapes[name]))
        np.testing.assert_allclose(clipped[name], expected, rtol=1e-6)


@pytest.mark.thorough
def test_compressing_a_sharded_tree_gives_the_codes_of_one_device():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    one = {"a": TREE["kernel"], "b": TREE["kernel"] * 2}
    small = functools.partial(
        jaxclip.compress, bits=jaxclip.Grid(4, axis=0), rule=per_tree(mse_optimal())
    )
    expected = small(one)
    with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else jax.sharding.use_mesh(mesh):
        split = NamedSharding(mesh, PartitionSpec("x"))
        got = jax.jit(small)(jax.tree.map(lambda x: jax.device_put(x, split), one))
    for name, q in expected.items():
        np.testing.assert_allclose(got[name].scale, q.scale, rtol=1e-6)
        assert np.mean(np.asarray(got[name].qvalue) != np.asarray(q.qvalue)) < 0.01


# --- What is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (fan_in(1.0), TypeError, "rule must be max_abs, percentile_abs"),
        (rate_optimal(3.0), TypeError, "rule must be max_abs, percentile_abs"),
        (per_tree(max_abs()), TypeError, "rule must be max_abs, percentile_abs"),
        (0.5, TypeError, "rule must be max_abs, percentile_abs"),
        (max_abs, TypeError, "rule is the factory max_abs"),
        (max_abs(axis=0), ValueError, "no axis and no group_size"),
        (mse_optimal(4, group_size=8), ValueError, "no axis and no group_size"),
        (mse_optimal(4, importance=[1.0]), ValueError, "must have no importance"),
    ],
)
def test_rules_without_one_threshold_for_many_arrays_are_refused(rule, error, message):
    with pytest.raises(error, match=message):
        per_tree(rule)


@pytest.mark.parametrize(
    "use",
    [
        lambda rule: jaxclip.weights.max_norm(rule),
        lambda rule: jaxclip.weights.spectral_cap(rule),
        lambda rule: jaxclip.quantize(jnp.ones((2, 2)), 4, threshold=rule),
        lambda rule: jaxclip.checkpoints.clip_checkpoint("a.npz", "b.npz", rule),
    ],
    ids=["max_norm", "spectral_cap", "quantize", "clip_checkpoint"],
)
def test_functions_that_see_one_leaf_at_a_time_refuse_it(use):
    with pytest.raises(TypeError, match="per_tree measures all leaves"):
        use(per_tree(max_abs()))


def test_rewriting_a_file_refuses_it(tmp_path):
    source = tmp_path / "net.npz"
    np.savez(source, kernel=np.ones((4, 4), np.float32))
    with pytest.raises(TypeError, match="per_tree measures all leaves"):
        jaxclip.checkpoints.compress_checkpoint(
            source, tmp_path / "small.safetensors", 4, rule=per_tree(max_abs())
        )


def test_more_entries_than_are_counted_and_complex_ones_on_a_grid_are_refused():
    many = [jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)]
    with pytest.raises(ValueError, match=r"counts up to 2\*\*31 - 1 entries, but the tree has"):
        jax.eval_shape(per_tree(percentile_abs(50)), many)
    with pytest.raises(TypeError, match="no grid for complex numbers"):
        per_tree(mse_optimal(4))([jnp.ones(2), jnp.ones(2, jnp.complex64)])


@pytest.mark.thorough
def test_a_rule_without_bits_asks_for_them():
    with pytest.raises(ValueError, match="mse_optimal needs bits"):
        jaxclip.clip_weights({"w": jnp.ones(2)}, per_tree(mse_optimal()))
