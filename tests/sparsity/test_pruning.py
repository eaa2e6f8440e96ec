"""Pruning after training, against exhaustive search, least squares and SparseGPT's own order."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxclip
from jaxclip import calibration
from jaxclip.lowbit.rounding.feedback import factor_moments, output_energy
from jaxclip.sparsity import prune


def apply_fn(params, x):
    return x @ params["kernel"]


def layer(num_inputs, num_outputs, num_samples=256, seed=0):
    """A linear layer and inputs that depend on each other."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(num_inputs, num_inputs)) * np.exp(rng.normal(size=(num_inputs, 1)))
    x = jnp.asarray(rng.normal(size=(num_samples, num_inputs)) @ mixing, jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(num_inputs, num_outputs)), jnp.float32)
    params = {"kernel": kernel, "bias": jnp.ones(num_outputs)}
    return params, calibration.measure(apply_fn, params, [x], progress=False)


def errors_of(params, measured, *pruned):
    """The relative errors of the outputs, with damped moments."""
    moments = factor_moments(measured.moments["kernel"], params["kernel"].shape, "kernel")
    w = np.asarray(params["kernel"])
    total = output_energy(w, moments)
    return [output_energy(w - np.asarray(p["kernel"]), moments) / total for p in pruned]


def damped_moments(measured):
    """H in float64, as rounding damps it."""
    second = np.asarray(measured.moments["kernel"].second[0], np.float64)
    return second + 0.01 * np.diagonal(second).mean() * np.eye(len(second))


def least_error(w, second, mask):
    """The error of one output whose kept weights are the best ones: least squares in float64."""
    w, gone = np.asarray(w, np.float64), ~mask
    z = np.where(mask, w, 0.0)
    if mask.any():
        z[mask] += np.linalg.solve(second[np.ix_(mask, mask)], second[np.ix_(mask, gone)] @ w[gone])
    return (w - z) @ second @ (w - z)


def sparse_gpt(w, second, density, block=16):
    """Column by column with feedback from Cholesky factors, masks by block."""
    w = np.array(w, np.float64)
    upper = np.linalg.cholesky(np.linalg.inv(second)).T
    for start in range(0, len(w), block):
        rows = range(start, min(start + block, len(w)))
        scores = np.square(w[rows] / np.diagonal(upper)[rows, None])
        count = round(density * scores.size)
        least = np.sort(scores.ravel())[-count] if count else np.inf
        for i in rows:
            pruned = np.where(scores[i - start] >= least, w[i], 0)
            error = (w[i] - pruned) / upper[i, i]
            w[i] = pruned
            w[i + 1 :] -= upper[i, i + 1 :, None] * error
    return w


def test_without_a_calibration_the_largest_are_kept_in_jit_too():
    params, _ = layer(8, 6)
    found = jax.jit(lambda p, d: prune(p, d))(params, jnp.float32(0.25))
    kept = np.sort(np.abs(params["kernel"]).ravel())[-12:]
    np.testing.assert_array_equal(np.sort(np.abs(found["kernel"]).ravel())[-12:], kept)
    assert int((found["kernel"] != 0).sum()) == 12
    np.testing.assert_array_equal(found["bias"], params["bias"])


def test_with_diagonal_moments_it_is_the_best_choice_of_weights():
    params, measured = layer(5, 1)
    x2 = np.diagonal(np.asarray(measured.moments["kernel"].second[0]))
    diagonal = calibration.measure(
        apply_fn, params, [jnp.sqrt(jnp.diag(jnp.asarray(x2)))], max_dim=1, progress=False
    )
    assert diagonal.moments["kernel"].is_diagonal
    (found,) = errors_of(params, diagonal, prune(params, 0.4, calibration=diagonal))
    every = [
        {"kernel": np.where(np.isin(np.arange(5), pair)[:, None], params["kernel"], 0)}
        for pair in itertools.combinations(range(5), 2)
    ]
    assert found == pytest.approx(min(errors_of(params, diagonal, *every)), rel=1e-5)


def test_with_whole_moments_kept_weights_are_the_least_squares_solution():
    params, measured = layer(12, 3)
    pruned = prune(params, 0.5, calibration=measured)
    second, w = damped_moments(measured), np.asarray(params["kernel"], np.float64)
    mask = np.asarray(pruned["kernel"]) != 0
    assert mask.sum() == 18
    best = sum(least_error(w[:, i], second, mask[:, i]) for i in range(3))
    (found,) = errors_of(params, measured, pruned)
    assert found * np.sum(w * (second @ w)) == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("density", [0.5, 0.25, 0.125])
def test_the_outputs_are_closer_than_those_of_sparse_gpt_and_of_magnitude(density):
    params, measured = layer(64, 32)
    theirs = {"kernel": sparse_gpt(params["kernel"], damped_moments(measured), density)}
    assert np.sum(theirs["kernel"] != 0) == round(density * 64 * 32)
    ours, plain = prune(params, density, calibration=measured), prune(params, density)
    assert np.sum(ours["kernel"] != 0) == np.sum(plain["kernel"] != 0) == round(density * 64 * 32)
    a, b, c = errors_of(params, measured, ours, theirs, plain)
    assert a < b < c


@pytest.mark.parametrize("pattern", ["rows", 4])
def test_patterns_hold_with_a_calibration_and_are_no_worse_than_by_magnitude(pattern):
    params, measured = layer(16, 6)
    ours = prune(params, 0.5, pattern=pattern, calibration=measured)
    plain = prune(params, 0.5, pattern=pattern)
    for found in (ours, plain):
        mask = np.asarray(found["kernel"]) != 0
        if pattern == 4:
            assert (mask.reshape(4, 4, 6).sum(1) == 2).all()
        else:
            assert sorted(mask.sum(0)) == [0, 0, 0, 16, 16, 16]
    a, b = errors_of(params, measured, ours, plain)
    assert a <= b


def test_rows_are_kept_by_the_energy_of_their_outputs():
    params, measured = layer(6, 5, seed=3)
    second, w = damped_moments(measured), np.asarray(params["kernel"], np.float64)
    energy = np.sum(w * (second @ w), axis=0)
    found = prune(params, 0.4, pattern="rows", calibration=measured)
    kept = np.flatnonzero(np.any(found["kernel"] != 0, axis=0))
    np.testing.assert_array_equal(kept, np.sort(np.argsort(energy)[-2:]))
    np.testing.assert_array_equal(found["kernel"][:, kept], params["kernel"][:, kept])


@pytest.mark.thorough
def test_stacks_of_layers_and_convolutions_are_pruned_matrix_by_matrix():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "layers": jax.random.normal(keys[0], (3, 8, 8)) / 3,
        "conv": jax.random.normal(keys[1], (3, 4, 8)),
    }

    def apply(params, x):
        numbers = ("NHC", "HIO", "NHC")
        x = jax.lax.conv_general_dilated(x, params["conv"], (1,), "SAME", dimension_numbers=numbers)
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0]

    x = jax.random.normal(keys[2], (16, 10, 4))
    measured = calibration.measure(apply, params, [x], progress=False)
    ours, plain = prune(params, 0.25, calibration=measured), prune(params, 0.25)
    for name, w in params.items():
        assert np.sum(ours[name] != 0) == np.sum(plain[name] != 0) == w.size // 4
        moments = factor_moments(measured.moments[name], w.shape, name)
        errors = [output_energy(np.asarray(w - p[name]), moments) for p in (ours, plain)]
        # The inputs of the convolution are independent: there is little to make up for.
        assert errors[0] < (0.3 if name == "layers" else 1.0) * errors[1]


def test_half_precision_keeps_its_dtype_and_its_zeros_in_files():
    params, measured = layer(16, 8)
    params = {"kernel": params["kernel"].astype(jnp.bfloat16)}
    found = prune(params, 0.25, calibration=measured)
    assert found["kernel"].dtype == jnp.bfloat16
    assert int((found["kernel"] != 0).sum()) == 32
    small = jaxclip.decompress(jaxclip.compress(found, 4))
    assert not np.any(np.asarray(small["kernel"])[np.asarray(found["kernel"]) == 0])


def test_prune_names_what_is_wrong():
    params, measured = layer(6, 4)
    for wrong in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"^density must be"):
            prune(params, wrong)
    with pytest.raises(ValueError, match=r"^pattern must be"):
        prune(params, 0.5, pattern="2:4")
    with pytest.raises(ValueError, match=r"^pattern must divide .*'kernel'"):
        prune(params, 0.5, pattern=4)
    with pytest.raises(ValueError, match=r"^scope must be 'leaf' with a calibration"):
        prune(params, 0.5, scope="tree", calibration=measured)
    with pytest.raises(TypeError, match=r"^calibration must be"):
        prune(params, 0.5, calibration=measured.moments)
    with pytest.raises(ValueError, match=r"^calibration must be of these .*'kernel'"):
        prune({"other": params["kernel"]}, 0.5, calibration=measured)
    with pytest.raises(TypeError, match=r"prune first, then compress"):
        prune(jaxclip.compress(params, 4), 0.5)
    with pytest.raises(TypeError, match=r"'kernel' must be concrete"):
        jax.jit(lambda p: prune(p, 0.5, calibration=measured))(params)
