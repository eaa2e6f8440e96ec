"""Sensitivities are the outputs' relative error for one unit of a weight's own error."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclip import checkpoints
from jaxclip.calibration import Calibration, measure, sensitivities

RNG = np.random.default_rng(0)
PARAMS = {
    "a": RNG.standard_normal((5, 6)).astype(np.float32),
    "b": RNG.standard_normal((6, 3)).astype(np.float32),
    "rows": RNG.standard_normal((4, 5)).astype(np.float32),
    "free": RNG.standard_normal((3, 3)).astype(np.float32),
}
BATCHES = [RNG.integers(0, 4, 7) for _ in range(3)]


def apply(p: Any, tokens: Any) -> Any:
    xp = jnp if isinstance(tokens, jax.Array) else np
    x = xp.tanh(p["rows"][tokens] @ p["a"]) @ p["b"]
    return {"outputs": x + 0.1 * xp.tanh(p["free"])[:1], "tokens": tokens}


def to_tenths(leaf: Any, path: str = "") -> Any:
    return (jnp if isinstance(leaf, jax.Array) else np).round(leaf * 10) / 10


def test_sensitivities_are_those_of_their_formula():
    c = measure(apply, PARAMS, BATCHES, progress=False)
    assert c.missing == ("free",)
    c = sensitivities(apply, PARAMS, BATCHES, c, round_leaf=to_tenths, progress=False)
    assert c.sensitivities.keys() == PARAMS.keys()
    params = jax.tree.map(lambda x: x.astype(np.float64), PARAMS)
    tokens = np.concatenate(BATCHES)
    reference = apply(params, tokens)["outputs"]
    hidden = np.tanh(params["rows"][tokens] @ params["a"])

    def damped(second):
        return second + 0.01 * np.diagonal(second).mean() * np.eye(len(second))

    moments = {
        "a": damped(params["rows"][tokens].T @ params["rows"][tokens]),
        "b": damped(hidden.T @ hidden),
        "rows": np.diag(np.bincount(tokens, minlength=4) + 1.0),
        "free": np.eye(3),
    }
    # The row of `free` is added to each batch alike, so it can be looked at all at once.
    for path, leaf in params.items():
        outputs = apply(params | {path: to_tenths(leaf)}, tokens)["outputs"]
        error = to_tenths(leaf) - leaf
        weight = np.trace(error.T @ moments[path] @ error)
        expected = ((outputs - reference) ** 2).sum() / (reference**2).sum() / weight
        np.testing.assert_allclose(c.sensitivities[path], expected, rtol=1e-3, err_msg=path)


def test_scanned_layers_and_half_precision_have_one_scalar_a_leaf(tmp_path: Any):
    w = RNG.standard_normal((3, 4, 4)).astype(np.float32)
    params = {"layers": jnp.asarray(w, jnp.bfloat16), "unused": jnp.ones((2, 2))}
    x = jnp.asarray(RNG.standard_normal((6, 4)), jnp.bfloat16)

    def scanned(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])[0]

    c = measure(scanned, params, [x], progress=False)
    c = sensitivities(scanned, params, [x, x], c, progress=False)
    assert c.sensitivities["layers"] > 0
    assert c.sensitivities["unused"] == 0
    checkpoints.save(tmp_path / "c.safetensors", c.to_tree())
    loaded = Calibration.from_tree(checkpoints.load(tmp_path / "c.safetensors"))
    assert loaded.sensitivities == c.sensitivities


def test_the_model_is_compiled_once_for_all_weights():
    traced = []

    def counted(p, x):
        traced.append(1)
        return apply(p, x)

    c = measure(counted, PARAMS, BATCHES, progress=False)
    traced.clear()
    sensitivities(counted, PARAMS, BATCHES, c, progress=False)
    assert len(traced) <= 2  # to apply it, and to compare


def test_what_does_not_fit_is_refused():
    c = measure(apply, PARAMS, BATCHES, progress=False)
    with pytest.raises(ValueError, match="for params, which have no weight 'a'"):
        sensitivities(apply, {"b": PARAMS["b"]}, BATCHES, c, progress=False)
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        sensitivities(apply, PARAMS, [], c, progress=False)
    with pytest.raises(ValueError, match=r"round_leaf must keep the shape .* at 'a' it made"):
        sensitivities(apply, PARAMS, BATCHES, c, round_leaf=lambda x, _: x[:1], progress=False)
    with pytest.raises(ValueError, match="must be floating and not all 0"):
        sensitivities(lambda p, x: x, PARAMS, BATCHES, c, progress=False)
    with pytest.raises(ValueError, match="must be finite; batch 0"):
        sensitivities(lambda p, x: p["a"] * np.inf, PARAMS, BATCHES, c, progress=False)
