"""Weights kept at zero while training: which, how many, and beside which other constraints."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxclip
from jaxclip.sparsity import keep_sparse
from oracles.quick import quick_first
from oracles.small_params import params_and_goal
from oracles.walks import walk

STILL = optax.set_to_zero()


def mask_of(params, density, inner=STILL, grads=None, **options):
    """The mask after one step, that of a still optimizer if none is given."""
    tx = keep_sparse(inner, density, **options)
    grads = jax.tree.map(jnp.zeros_like, params) if grads is None else grads
    return jax.jit(tx.update)(grads, tx.init(params), params)[1].mask


def first_largest(scores, count):
    """The mask of the largest entries, the first of equals: a stable sort in NumPy."""
    scores = np.asarray(scores, np.float64)
    mask = np.zeros(scores.size, bool)
    mask[np.argsort(-scores.ravel(), kind="stable")[:count]] = True
    return mask.reshape(scores.shape)


def in_groups(scores, size, count, axis):
    moved = np.moveaxis(np.asarray(scores), axis, -1)
    groups = moved.reshape(-1, size)
    mask = np.stack([first_largest(group, count) for group in groups])
    return np.moveaxis(mask.reshape(moved.shape), -1, axis)


@pytest.fixture
def ties():
    """Weights of few magnitudes, zeros among them."""
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.choice([-1.0, 0.5, 1.0, 1e-30, 0.0, 3e38], (12, 10)), jnp.float32)


# --- Which weights --------------------------------------------------------------------


def test_the_largest_are_kept_exact_to_one_entry_with_ties_and_a_traced_density(ties):
    densities = jnp.arange(1, 121, 7) / 120

    def mask_at(density):
        tx = keep_sparse(STILL, density)
        return tx.update(ties, tx.init(ties), ties)[1].mask

    masks = jax.jit(jax.vmap(mask_at))(densities)
    for density, mask in zip(densities, masks, strict=True):
        expected = first_largest(np.abs(ties), round(float(density) * 120))
        np.testing.assert_array_equal(mask, expected)


def test_a_group_keeps_its_largest_inputs_and_a_row_is_kept_whole(ties):
    params = {
        "dense": {"kernel": ties},
        "conv": {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 4, 5))},
        "torch.weight": jnp.round(2 * jax.random.normal(jax.random.key(1), (6, 8))),
    }
    axes = {"dense": 0, "conv": 2, "torch.weight": 1}
    mask = mask_of(params, 0.5, pattern=4)
    rows = mask_of(params, 0.4, pattern="rows")
    for name, axis in axes.items():
        (w,), (m,), (r,) = (jax.tree.leaves(tree[name]) for tree in (params, mask, rows))
        np.testing.assert_array_equal(m, in_groups(np.abs(w), 4, 2, axis))
        outputs = 0 if name == "torch.weight" else w.ndim - 1
        inputs = tuple(a for a in range(w.ndim) if a != outputs)
        sizes = np.abs(np.asarray(w, np.float64)).mean(inputs)
        kept = first_largest(sizes, round(0.4 * w.shape[outputs]))
        np.testing.assert_array_equal(r, np.broadcast_to(np.expand_dims(kept, inputs), w.shape))


def test_over_a_tree_the_largest_of_all_leaves_are_kept():
    params = {"a": jnp.array([[1.0, 5.0]]), "b": jnp.array([[3.0], [1.0], [4.0], [0.5]])}
    mask = mask_of(params, 0.5, scope="tree")
    np.testing.assert_array_equal(mask["a"], [[False, True]])
    np.testing.assert_array_equal(mask["b"][:, 0], [True, False, True, False])
    tied = mask_of(params, 4 / 6, scope="tree")  # two have magnitude 1: the first of them stays
    np.testing.assert_array_equal(tied["a"], [[True, True]])
    np.testing.assert_array_equal(tied["b"][:, 0], [True, False, True, False])


def test_vectors_are_left_alone_unless_the_mask_names_them():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(4), "count": jnp.zeros((), jnp.int32)}
    assert mask_of(params, 0.5)["bias"].shape == ()
    named = mask_of(params, 0.5, mask={"kernel": False, "bias": True, "count": False})
    np.testing.assert_array_equal(named["bias"], [True, True, False, False])
    assert named["kernel"].shape == named["count"].shape == ()


# --- How many, step by step -----------------------------------------------------------


@pytest.mark.parametrize("every", quick_first([3, 1]))
def test_the_cubic_schedule_prunes_to_its_density_at_every_choice(every):
    params, loss_fn = params_and_goal()
    schedule = optax.polynomial_schedule(1.0, 1 / 8, 3, 9)
    density = 1.0
    tx = keep_sparse(optax.sgd(0.1, momentum=0.9), schedule, every=every)
    for i, (now, state) in enumerate(walk(tx, params, loss_fn, 12)):
        if i % every == 0:
            density = 1 / 8 + 7 / 8 * (1 - min(i / 9, 1)) ** 3
        assert int(state.mask["kernel"].sum()) == round(24 * density)
        np.testing.assert_array_equal(now["kernel"] != 0, state.mask["kernel"])


@pytest.mark.parametrize("number", [np.nan, np.float32(np.nan), jnp.float32(np.nan)])
def test_a_schedule_that_is_nan_changes_no_mask(number):
    w = jnp.array([[4.0, 3.0, 2.0, 1.0]])
    tx = keep_sparse(optax.sgd(0.1), lambda step: number)
    state = tx.init(w)
    updates, new = tx.update(jnp.zeros_like(w), state, w)
    assert np.array_equal(new.mask, state.mask)
    assert not np.any(updates)


@pytest.mark.thorough
def test_a_mask_that_only_shrinks_never_brings_a_weight_back():
    params, loss_fn = params_and_goal()
    densities = jnp.array([0.5, 0.25, 0.9, 0.125])
    tx = keep_sparse(optax.sgd(0.1, momentum=0.9), lambda step: densities[jnp.minimum(step, 3)])
    counts = [int(s.mask["kernel"].sum()) for _, s in walk(tx, params, loss_fn, 5)]
    assert counts == [12, 6, 6, 3, 3]


def test_growth_exchanges_the_least_weights_for_the_largest_gradients():
    params = jnp.array([[4.0, 3.0, 2.0, 1.0], [0.9, 0.8, 0.7, 0.6]])
    grads = jnp.array([[0.0, 0.0, 0.0, 0.0], [1.0, 5.0, -7.0, 3.0]])
    tx = keep_sparse(optax.sgd(0.01), 0.5, grow=lambda step: jnp.where(step == 1, 0.5, 0.0))
    state = tx.init(params)
    for expected in ([1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 1, 1, 0]):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(state.mask.ravel(), np.array(expected, bool))
    np.testing.assert_array_equal(params, [[4, 3, 0, 0], [0, 0, 0, 0]])  # they start at 0
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params, [[4, 3, 0, 0], [0, -0.05, 0.07, 0]], rtol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("pattern", [4, "rows"])
def test_growth_keeps_the_density_of_groups_and_rows(pattern):
    params, loss_fn = {"kernel": jax.random.normal(jax.random.key(0), (8, 6))}, None
    loss_fn = lambda p: jnp.sum(jnp.cos(3 * p["kernel"] + jnp.arange(6.0)[None]))  # noqa: E731
    tx = keep_sparse(optax.sgd(0.1, momentum=0.9), 0.5, pattern=pattern, grow=0.5)
    masks = [np.asarray(s.mask["kernel"]) for _, s in walk(tx, params, loss_fn, 4)]
    assert all(m.sum() == 24 for m in masks)
    assert (masks[1] != masks[0]).any()
    if pattern == 4:
        assert all((m.reshape(2, 4, 6).sum(1) == 2).all() for m in masks)
    else:
        assert all(set(m.sum(0)) == {0, 8} for m in masks)


def test_pruned_weights_have_no_part_in_the_optimizer_inside():
    params = {"kernel": jnp.array([[3.0, 1.0], [2.0, 0.5]])}
    grads = {"kernel": jnp.array([[3.0, 100.0], [4.0, 100.0]])}
    tx = keep_sparse(optax.chain(jaxclip.clip_by_global_norm(1.0), optax.sgd(1.0)), 0.5)
    _, state = tx.update(jax.tree.map(jnp.zeros_like, grads), tx.init(params), params)
    updates, _ = tx.update(
        grads, state, {"kernel": jnp.where(state.mask["kernel"], params["kernel"], 0)}
    )
    np.testing.assert_allclose(updates["kernel"], [[-0.6, 0], [-0.8, 0]], rtol=1e-5)


# --- Bad steps, dtypes, devices -------------------------------------------------------


@pytest.mark.parametrize("at", [(0, 0), (3, 2)])  # of a kept weight and of a pruned one
def test_a_bad_step_is_handed_on_and_leaves_the_mask_as_it_was(at):
    params = {"kernel": jnp.zeros((4, 3)).at[0].set(jnp.array([3.0, 2.0, 1.0]))}
    tx = keep_sparse(optax.sgd(0.1), lambda step: jnp.where(step > 0, 0.125, 0.25), grow=0.5)
    good = {"kernel": jnp.ones((4, 3))}
    _, state = tx.update(good, tx.init(params), params)
    bad = {"kernel": good["kernel"].at[at].set(jnp.nan)}
    updates, after = jax.jit(tx.update)(bad, state, params)
    np.testing.assert_array_equal(after.mask["kernel"], state.mask["kernel"])
    assert bool(jnp.isnan(updates["kernel"][at])) == bool(state.mask["kernel"][at])
    assert jnp.sum(jnp.isnan(updates["kernel"])) <= 1


@pytest.mark.parametrize("dtype", quick_first([jnp.bfloat16, jnp.float16, jnp.float32]))
def test_pruned_weights_are_exact_zeros_in_every_dtype(dtype):
    params, loss_fn = params_and_goal(dtype)
    for now, state in walk(keep_sparse(jaxclip.lion(0.1), 0.3), params, loss_fn, 3):
        assert now["kernel"].dtype == dtype
        assert not np.any(np.asarray(now["kernel"])[~np.asarray(state.mask["kernel"])])
        assert int(state.mask["kernel"].sum()) == round(0.3 * 24)


@pytest.mark.thorough
def test_updates_of_a_coarser_dtype_reach_zero_after_a_few_steps():
    params = {"kernel": jax.random.normal(jax.random.key(0), (8, 8))}
    grads = {"kernel": jnp.zeros((8, 8), jnp.bfloat16)}
    tx = keep_sparse(optax.identity(), 0.5)
    state = tx.init(params)
    for _ in range(4):
        updates, state = tx.update(grads, state, params)
        assert updates["kernel"].dtype == jnp.bfloat16
        with jax.numpy_dtype_promotion("standard"):
            params = optax.apply_updates(params, updates)
    assert int((params["kernel"] != 0).sum()) == 32


@pytest.mark.parametrize("pattern", quick_first(["free", "rows", 4]))
@pytest.mark.parametrize("axis_type", quick_first([AxisType.Explicit, AxisType.Auto]))
def test_on_a_mesh_masks_and_shardings_are_those_of_one_device(axis_type, pattern):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    split = PartitionSpec("data") if pattern != 4 else PartitionSpec(None, "data")
    where = NamedSharding(mesh, split)
    params = {"kernel": jnp.round(2 * jax.random.normal(jax.random.key(0), (16, 8)))}
    tx = keep_sparse(optax.sgd(0.1), 0.3, pattern=pattern, grow=0.25)
    placed = jax.device_put(params, where)
    with jax.set_mesh(mesh):
        updates, state = jax.jit(lambda g: tx.update(g, tx.init(g), g))(placed)
    expected, alone = tx.update(params, tx.init(params), params)
    np.testing.assert_array_equal(state.mask["kernel"], alone.mask["kernel"])
    np.testing.assert_array_equal(updates["kernel"], expected["kernel"])
    assert updates["kernel"].sharding.is_equivalent_to(where, 2)


# --- With boxes and grids -------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("is_inside", [True, False])
def test_a_box_fits_inside_and_after(is_inside):
    params, loss_fn = params_and_goal()
    box = jaxclip.project_weights(jaxclip.box(0.5))
    adam = optax.sgd(0.3, momentum=0.9)
    inside = keep_sparse(optax.chain(adam, box), 0.25)
    tx = inside if is_inside else optax.chain(keep_sparse(adam, 0.25), box)
    for now, _ in walk(tx, params, loss_fn, 4):
        assert int((now["kernel"] != 0).sum()) == 6
        assert float(jnp.abs(now["kernel"]).max()) <= 0.5


def test_inside_keep_on_grid_weights_are_sparse_and_on_the_grid_of_their_sum():
    params, loss_fn = params_and_goal()
    tx = jaxclip.keep_on_grid(keep_sparse(optax.sgd(0.05, momentum=0.9), 0.25), "ternary")
    for now, state in walk(tx, params, loss_fn, 5):
        unrounded = now["kernel"] + state.residual["kernel"]
        mask = state.inner_state.mask["kernel"]
        assert int(mask.sum()) == 6
        assert not np.any(np.asarray(unrounded)[~np.asarray(mask)])
        small = jaxclip.compress(
            {"kernel": unrounded}, "ternary", rule=jaxclip.thresholds.least_squares
        )
        expected = jaxclip.decompress(small)["kernel"]
        np.testing.assert_allclose(now["kernel"], expected, rtol=0, atol=1e-6)
        assert not np.any(np.asarray(now["kernel"])[~np.asarray(mask)])


@pytest.mark.thorough
def test_around_keep_on_grid_pruned_weights_stay_in_its_sums():
    # The other order, which the docs advise against.
    params, loss_fn = params_and_goal()
    tx = keep_sparse(jaxclip.keep_on_grid(optax.sgd(0.05, momentum=0.9), "ternary"), 0.25)
    *_, (now, state) = walk(tx, params, loss_fn, 5)
    unrounded = np.asarray(now["kernel"] + state.inner_state.residual["kernel"])
    assert np.any(unrounded[~np.asarray(state.mask["kernel"])])


# --- Arguments ------------------------------------------------------------------------


def test_keep_sparse_names_what_is_wrong():
    sgd = optax.sgd(0.1)
    with pytest.raises(TypeError, match="inner"):
        keep_sparse(0.1, 0.5)
    for wrong in (0, -0.5, 1.5, float("nan"), jnp.ones(2)):
        with pytest.raises(ValueError, match=r"^density must be"):
            keep_sparse(sgd, wrong)
    for wrong in (True, "half", None):
        with pytest.raises(TypeError, match=r"^density must be"):
            keep_sparse(sgd, wrong)
    for wrong in (-0.1, 2.0):
        with pytest.raises(ValueError, match=r"^grow must be"):
            keep_sparse(sgd, 0.5, grow=wrong)
    for wrong in (1, True, "columns", (2, 4), None):
        with pytest.raises(ValueError, match=r"^pattern must be"):
            keep_sparse(sgd, 0.5, pattern=wrong)
    with pytest.raises(ValueError, match=r"^scope must be"):
        keep_sparse(sgd, 0.5, scope="layer")
    with pytest.raises(ValueError, match=r"^every must be"):
        keep_sparse(sgd, 0.5, every=0)
    with pytest.raises(ValueError, match=r"pattern must divide .* 4 for 'a' of shape \(6, 2\)"):
        keep_sparse(sgd, 0.5, pattern=4).init({"a": jnp.ones((6, 2))})
    with pytest.raises(ValueError, match=r"'rows' needs leaves .*'b'"):
        keep_sparse(sgd, 0.5, pattern="rows", mask={"b": True}).init({"b": jnp.ones(6)})
    tx, params = keep_sparse(sgd, 0.5), {"a": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="keep_sparse needs the parameters"):
        tx.update(params, tx.init(params))
