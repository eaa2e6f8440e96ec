"""The spectral clip of trees against exact singular value decompositions in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxclip
from jaxclip.gradients.by_singular_value import clip_by_spectral_norm
from oracles.matrices import exact_cap, make_matrix, spectral_norm, wide

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
eager_and_jit = pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])


def clip_once(tx, grads):
    return tx.update(grads, tx.init(grads))


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_state_stays_float32_where_float64_is_enabled(dtype):
    with enable_x64():
        grads = {"w": jnp.ones((3, 2), dtype), "b": jnp.ones(2, dtype)}
        tx = clip_by_spectral_norm(1.0)
        before = tx.init(grads)
        clipped, after = tx.update(grads, before)
        assert clipped["w"].dtype == dtype
        dtypes = [[x.dtype for x in jax.tree.leaves(state)] for state in (before, after)]
        assert dtypes[0] == dtypes[1]


@pytest.mark.thorough
@eager_and_jit
def test_matrices_are_capped_and_vectors_pass(wrap):
    grads = {
        "kernel": jnp.asarray(make_matrix((12, 8), size=4.0)),
        "conv": jnp.asarray(make_matrix((18, 5), size=4.0)).reshape(3, 3, 2, 5),
        "bias": jnp.full(3, 100.0),
    }
    clipped, state = wrap(lambda g: clip_once(clip_by_spectral_norm(1.0), g))(grads)
    np.testing.assert_array_equal(clipped["bias"], grads["bias"])
    for name in ("kernel", "conv"):
        before, after = (np.reshape(t[name], (-1, t[name].shape[-1])) for t in (grads, clipped))
        assert spectral_norm(wide(after) - exact_cap(before, 1.0)) <= 1e-4
    assert float(state.stats.clip_rate) == 1
    np.testing.assert_allclose(state.stats.pre_norm, 4.0, rtol=0.05)
    assert float(state.stats.pre_norm) <= 4.0 * (1 + 1e-6)


@pytest.mark.thorough
def test_stacked_axes_number_separate_matrices():
    layers = np.stack([make_matrix((6, 4), size=s, seed=i) for i, s in enumerate((3.0, 0.2))])
    grads = {"layers": jnp.asarray(layers), "biases": jnp.full((2, 4), 9.0)}
    clipped, state = clip_once(clip_by_spectral_norm(1.0, stacked_axes=1), grads)
    assert spectral_norm(wide(clipped["layers"][0]) - exact_cap(layers[0], 1.0)) <= 1e-4
    np.testing.assert_array_equal(clipped["layers"][1], layers[1])
    np.testing.assert_array_equal(clipped["biases"], grads["biases"])
    assert float(state.stats.clip_rate) == 0.5


@pytest.mark.thorough
def test_a_prefix_tree_caps_each_part_by_its_own_number():
    grads = {"a": jnp.diag(jnp.array([5.0, 1.0])), "b": jnp.diag(jnp.array([5.0, 1.0]))}
    clipped, state = clip_once(clip_by_spectral_norm({"a": 2.0, "b": np.inf}), grads)
    np.testing.assert_allclose(clipped["a"], np.diag([2.0, 1.0]), atol=2e-4)
    np.testing.assert_array_equal(clipped["b"], grads["b"])
    assert float(state.stats.clip_rate) == 0.5


@pytest.mark.parametrize("where", ["kernel", "bias"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_step_gives_zeros_and_is_counted(where, bad):
    grads = {"kernel": jnp.full((3, 2), 5.0), "bias": jnp.ones(2)}
    tx = clip_by_spectral_norm(1.0)
    _, before = tx.update(grads, tx.init(grads))
    clipped, state = tx.update(grads | {where: grads[where].at[0].set(bad)}, before)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(clipped))
    assert int(state.stats.num_nonfinite) == 1
    assert float(state.stats.pre_norm) == float(before.stats.pre_norm) > 0
    assert float(state.stats.clip_rate) == 0


def test_a_traced_nan_as_cap_is_a_bad_step():
    grads = jnp.full((3, 2), 5.0)
    clipped, state = jax.jit(lambda c: clip_once(clip_by_spectral_norm(c), grads))(jnp.nan)
    assert not np.asarray(clipped).any()
    assert int(state.stats.num_nonfinite) == 1


@pytest.mark.thorough
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("spec", [("x",), (None, "x"), (None, None, "x")], ids=str)
def test_leaves_of_three_dimensions_are_capped_however_they_are_sharded(kind, spec):
    matrix = make_matrix((16, 8), size=3.0).reshape(8, 2, 8)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,), devices=jax.devices()[:2])
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    tx = clip_by_spectral_norm(1.0)
    with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else jax.sharding.use_mesh(mesh):
        grads = jax.device_put(matrix, sharding)
        clipped, _ = jax.jit(tx.update)(grads, tx.init(grads))
    assert clipped.sharding.is_equivalent_to(sharding, 3)
    exact = exact_cap(matrix.reshape(16, 8), 1.0)
    assert spectral_norm(wide(clipped).reshape(16, 8) - exact) <= 1e-4


@pytest.mark.parametrize("bad", [-1.0, np.nan, "1", None, True, 1j])
def test_a_wrong_cap_is_refused(bad):
    with pytest.raises((TypeError, ValueError), match="max_norm"):
        clip_by_spectral_norm(bad)


@pytest.mark.parametrize("name", ["steps", "stacked_axes"])
@pytest.mark.parametrize("bad", [-1, 2.0, True])
def test_wrong_counts_are_refused(name, bad):
    with pytest.raises(ValueError, match=name):
        clip_by_spectral_norm(1.0, **{name: bad})


def test_several_caps_for_one_leaf_are_refused_with_its_path():
    grads = {"dense": {"kernel": jnp.ones((2, 3))}}
    tx = clip_by_spectral_norm(jnp.ones((1, 3)))
    with pytest.raises(ValueError, match="dense/kernel"):
        tx.update(grads, tx.init(grads))


def test_statistics_are_found_by_name():
    tx = jaxclip.gradients.clip_by_spectral_norm(1.0)
    stats = jaxclip.clip_stats(tx.init(jnp.ones((2, 2))))
    assert set(stats) == {
        f"clip_by_spectral_norm/{f}" for f in ("pre_norm", "clip_rate", "num_nonfinite")
    }
