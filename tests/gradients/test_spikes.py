"""Clips of single entries against float64 oracles, over a stream with spikes and NaN."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclip.gradients.spikes import clip_leaf_spikes, clip_spikes
from oracles.streams import (
    arrays_of_stream,
    assert_every_step_is_the_oracle,
    assert_telemetry_says_what_happened,
    f32,
    scan,
)

# --- Oracles: generators that take a finite gradient and give (clipped, statistics) -----


def oracle_spam(theta: float, decay: float):
    total, weight, d, out = {}, 0.0, f32(decay), None
    while True:
        g = yield out
        clipped = {}
        for k, v in g.items():
            bound = np.sqrt(theta * total[k] / weight) if weight else np.inf
            clipped[k] = np.sign(v) * np.minimum(np.abs(v), bound)
            total[k] = d * total.get(k, 0.0) + (1 - d) * clipped[k] ** 2
        weight = d * weight + (1 - d)
        out = clipped, {"learned": {k: np.sqrt(v / weight) for k, v in total.items()}}


def oracle_adaclip(decay: float):
    total, weight, d, out = {}, 0.0, f32(decay), None
    while True:
        g = yield out
        weight, clipped = d * weight + (1 - d), {}
        for k, v in g.items():
            largest = np.abs(v).max()
            total[k] = d * total.get(k, 0.0) + (1 - d) * largest
            m = total[k] / weight
            clipped[k] = np.where(np.abs(v) > m * (1 + 1e-6), v / largest * m, v)
        out = clipped, {"learned": np.array([v / weight for v in total.values()])}


CASES = {
    "spam": (clip_spikes, {"theta": 5000.0, "decay": 0.999}, oracle_spam),
    "spam, tight": (clip_spikes, {"theta": 4.0, "decay": 0.9}, oracle_spam),
    "adaclip": (clip_leaf_spikes, {"decay": 0.999}, oracle_adaclip),
    "adaclip, fast": (clip_leaf_spikes, {"decay": 0.5}, oracle_adaclip),
}
with_case = pytest.mark.parametrize("case", CASES)


@functools.cache
def run_of_case(case: str) -> tuple[Any, Any]:
    factory, settings, _ = CASES[case]
    return scan(factory(**settings), arrays_of_stream())


@with_case
def test_every_step_is_the_float64_oracle(case: str):
    _, settings, make_oracle = CASES[case]
    assert_every_step_is_the_oracle(run_of_case(case), make_oracle(**settings))


@with_case
def test_telemetry_says_what_happened(case: str):
    assert_telemetry_says_what_happened(run_of_case(case))


@pytest.mark.parametrize(
    ("factory", "arguments"),
    [
        (clip_spikes, {"theta": -1.0}),
        (clip_spikes, {"theta": True}),
        (clip_spikes, {"decay": 2}),
        (clip_leaf_spikes, {"decay": np.inf}),
    ],
)
def test_bad_arguments_raise_naming_them(factory: Any, arguments: dict):
    with pytest.raises((TypeError, ValueError), match=next(iter(arguments))):
        factory(**arguments)


@pytest.mark.parametrize(
    ("factory", "name"),
    [
        (clip_spikes, "theta"),
        (clip_spikes, "decay"),
        (clip_leaf_spikes, "decay"),
    ],
)
def test_a_traced_nan_is_a_bad_step(factory: Any, name: str):
    g = {"w": jnp.array([3.0, 4.0])}
    good, bad = factory(**{name: jnp.float32(0.5)}), factory(**{name: jnp.float32(np.nan)})
    _, state = good.update(g, good.init(g))
    updates, after = bad.update(g, state)
    np.testing.assert_array_equal(updates["w"], 0)
    assert after.stats.num_nonfinite == 1
    jax.tree.map(np.testing.assert_array_equal, after.learned, state.learned)
    assert after.threshold == state.threshold


@pytest.mark.thorough
def test_subnormals_within_the_bound_of_a_spike_are_untouched():
    g = jnp.array([1e-40, -0.0, 1.0])
    tx = clip_spikes()
    updates, _ = tx.update(g, tx.init(g))
    assert np.asarray(updates).tobytes() == np.asarray(g).tobytes()
