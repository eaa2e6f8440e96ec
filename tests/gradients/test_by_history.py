"""Learned norms against float64 oracles, over a stream with spikes, NaN and infinities."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxclip.gradients.by_history import adagc, autoclip, zclip
from oracles.quick import quick_first
from oracles.streams import (
    arrays_of_stream,
    assert_every_step_is_the_oracle,
    assert_telemetry_says_what_happened,
    f32,
    global_norm,
    make_stream,
    scale,
    scan,
)

# --- Oracles: generators that take a finite gradient and give (clipped, statistics) -----


def oracle_tracker(quantile: float, learning_rate: float, initial: float | None = None):
    t, out = initial, None
    while True:
        g = yield out
        n = global_norm(g)
        t = n if t is None else t * np.exp(f32(learning_rate) * (f32(quantile) - (n <= t)))
        out = scale(g, min(1.0, t / n)), {"threshold": t}


def oracle_window(quantile: float, window: int):
    history, out = [], None
    while True:
        g = yield out
        n = global_norm(g)
        history = [*history, n][-window:]
        t = np.quantile(history, f32(quantile))
        out = scale(g, min(1.0, t / n)), {"threshold": t}


def oracle_zclip(z: float, alpha: float, warmup: int, max_norm: float = np.inf):
    early, mean, var, a, out = [], 0.0, 0.0, f32(alpha), None
    while True:
        g = yield out
        n = passed = global_norm(g)
        is_warm = len(early) < max(warmup, 1)
        if is_warm or var == 0:
            passed = min(n, max_norm)
        elif (score := (n - mean) / np.sqrt(var)) > z:
            passed = mean + z * np.sqrt(var) * (z / score)
        if is_warm:
            early.append(passed)
            mean, var = np.mean(early), np.var(early)
        else:
            mean += (1 - a) * (passed - mean)
            var = a * var + (1 - a) * (passed - mean) ** 2
        std = np.sqrt(var)
        out = scale(g, passed / n), {"mean": mean, "std": std, "threshold": mean + z * std}


def oracle_adagc(relative: float, beta: float, warmup: int, max_norm: float):
    reference, b, out, step = None, f32(beta), None, 0
    while True:
        g = yield out
        whole = global_norm(g)
        norms = np.array([global_norm({0: v}) for v in g.values()])
        if step < warmup:
            passed = norms * min(1.0, max_norm / whole)
            reference = passed if reference is None else np.minimum(reference, passed)
        else:
            reference = norms if reference is None else reference
            passed = np.minimum(norms, f32(relative) * reference) if step else norms
            reference = b * reference + (1 - b) * passed
        step += 1
        factors = dict(zip(g, passed / norms, strict=True))
        out = {k: v * factors[k] for k, v in g.items()}, {"learned": reference}


CASES = {
    "tracker": (autoclip, {"quantile": 0.1, "learning_rate": 0.05}, oracle_tracker),
    "tracker from 1": (
        autoclip,
        {"quantile": 0.5, "learning_rate": 0.2, "initial": 1.0},
        oracle_tracker,
    ),
    "window": (autoclip, {"quantile": 0.1, "window": 16}, oracle_window),
    "window of one": (autoclip, {"quantile": 0.7, "window": 1}, oracle_window),
    "long window": (autoclip, {"quantile": 0.5, "window": 300}, oracle_window),
    "zclip": (zclip, {"z": 2.5, "alpha": 0.97, "warmup": 25}, oracle_zclip),
    "zclip, warmup 1": (zclip, {"z": 2.0, "alpha": 0.9, "warmup": 1}, oracle_zclip),
    "zclip, warmup 0": (zclip, {"z": 2.0, "alpha": 0.9, "warmup": 0}, oracle_zclip),
    "zclip, max_norm": (
        zclip,
        {"z": 2.5, "alpha": 0.97, "warmup": 25, "max_norm": 8.0},
        oracle_zclip,
    ),
    "zclip, low max_norm": (
        zclip,
        {"z": 2.5, "alpha": 0.97, "warmup": 10, "max_norm": 2.0},
        oracle_zclip,
    ),
    "adagc": (adagc, {"relative": 1.05, "beta": 0.98, "warmup": 50, "max_norm": 1.0}, oracle_adagc),
    "adagc, warmup 1": (
        adagc,
        {"relative": 1.5, "beta": 0.9, "warmup": 1, "max_norm": 3.0},
        oracle_adagc,
    ),
    "adagc, warmup 0": (
        adagc,
        {"relative": 1.5, "beta": 0.9, "warmup": 0, "max_norm": 3.0},
        oracle_adagc,
    ),
}
QUICK = ["tracker", "window", "long window", "zclip, warmup 1", "zclip, low max_norm", "adagc"]
with_case = pytest.mark.parametrize(
    "case", quick_first(sorted(CASES, key=lambda case: case not in QUICK), len(QUICK))
)


@functools.cache
def run_of_case(case: str) -> tuple[Any, Any]:
    factory, settings, _ = CASES[case]
    return scan(factory(**settings), arrays_of_stream())


@pytest.mark.thorough
@with_case
def test_every_step_is_the_float64_oracle(case: str):
    _, settings, make_oracle = CASES[case]
    assert_every_step_is_the_oracle(run_of_case(case), make_oracle(**settings))


@with_case
def test_telemetry_says_what_happened(case: str):
    assert_telemetry_says_what_happened(run_of_case(case))


@pytest.mark.thorough
def test_adagc_first_steps_are_a_global_clip():
    g = make_stream({}, {})[1]
    tx = adagc(warmup=5, max_norm=0.25)
    updates, state = jax.jit(tx.update)(g, tx.init(g))
    expected, _ = jax.jit(optax.clip_by_global_norm(0.25).update)(g, optax.EmptyState())
    for k in g:
        np.testing.assert_allclose(updates[k], expected[k], rtol=1e-5)
    assert global_norm(jax.device_get(updates)) <= 0.25
    assert state.threshold == 0.25


@pytest.mark.parametrize(
    ("factory", "arguments"),
    [
        (autoclip, {"quantile": 1.5}),
        (autoclip, {"quantile": "half"}),
        (autoclip, {"window": 0}),
        (autoclip, {"window": 2.5}),
        (autoclip, {"initial": 0.0}),
        (autoclip, {"initial": 1.0, "window": 4}),
        (autoclip, {"learning_rate": -0.1}),
        (zclip, {"z": -1.0}),
        (zclip, {"z": np.nan}),
        (zclip, {"alpha": 1.1}),
        (zclip, {"warmup": -1}),
        (zclip, {"warmup": 2.0}),
        (zclip, {"warmup": True}),
        (zclip, {"max_norm": -1.0}),
        (zclip, {"max_norm": "1"}),
        (adagc, {"relative": None}),
        (adagc, {"relative": -2}),
        (adagc, {"beta": -0.1}),
        (adagc, {"warmup": None}),
        (adagc, {"max_norm": np.nan}),
    ],
)
def test_bad_arguments_raise_naming_them(factory: Any, arguments: dict):
    with pytest.raises((TypeError, ValueError), match=next(iter(arguments))):
        factory(**arguments)


@pytest.mark.parametrize(
    ("factory", "name"),
    [
        (autoclip, "quantile"),
        (autoclip, "learning_rate"),
        (zclip, "z"),
        (zclip, "alpha"),
        (zclip, "max_norm"),
        (adagc, "relative"),
        (adagc, "beta"),
        (adagc, "max_norm"),
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


@pytest.mark.parametrize("factory", [adagc, zclip])
def test_a_schedule_for_max_norm_is_read_at_each_step(factory: Any):
    g = {"w": jnp.array([3.0, 4.0])}
    tx = factory(max_norm=lambda step: 1.0 + step.astype(jnp.float32))
    state = tx.init(g)
    for expected in (1.0, 2.0, 3.0):
        updates, state = tx.update(g, state)
        np.testing.assert_allclose(np.linalg.norm(updates["w"]), expected, rtol=1e-5)


def test_the_tracker_settles_at_the_quantile():
    rng = np.random.default_rng(3)
    norms = np.exp(0.5 * rng.normal(size=4000)).astype(np.float32)
    _, states = scan(autoclip(0.3), {"w": norms[:, None]})
    settled = states.threshold[1000:]
    assert abs(np.mean(norms[1000:] <= settled) - 0.3) < 0.02
    assert abs(np.median(settled) / np.quantile(norms, 0.3) - 1) < 0.05


def test_zclip_follows_the_norm_down_and_is_not_stuck_at_a_zero_variance():
    tx = zclip(warmup=1)
    state = tx.init(jnp.zeros(1))
    for norm in (1.0, 1.0, 1.0, 2.0, 2.0):
        _, state = tx.update(jnp.array([norm]), state)
    assert state.learned["std"] > 0
    assert state.learned["mean"] > 1


@pytest.mark.thorough
def test_a_spike_in_warmup_passes_zclip_as_published_and_not_with_a_max_norm():
    def norms_passed(**settings: Any) -> np.ndarray:
        norms = np.float32([1.0, 1.1, 0.9, 500.0] + [1.0, 1.1, 0.9] * 5 + [500.0])
        updates, _ = scan(zclip(warmup=10, **settings), {"w": norms[:, None]})
        return updates["w"][[3, -1], 0]

    assert (norms_passed() > 100).all()  # the second is hidden by the first
    assert (norms_passed(max_norm=2.0) <= 2.0).all()


@pytest.mark.thorough
def test_in_warm_up_a_leaf_far_below_the_others_is_not_lost():
    g = {"a": jnp.full(1, 1e-7), "b": jnp.full(1, 3e38)}
    tx = adagc(max_norm=1e30)
    updates, _ = tx.update(g, tx.init(g))
    np.testing.assert_allclose(updates["a"], 1e-7 * (1e30 / 3e38), rtol=1e-5)
    np.testing.assert_allclose(updates["b"], 1e30, rtol=1e-5)


@pytest.mark.thorough
def test_the_program_of_adagc_grows_in_proportion_to_its_leaves():
    """The text of the compiled program; a global norm in the kernel of every leaf gives 1.25."""

    def size(num_leaves: int) -> int:
        params = {f"{i:02}": jnp.ones((4, 3)) for i in range(num_leaves)}
        tx = adagc()
        lowered = jax.jit(tx.update).lower(params, tx.init(params))
        return len(lowered.compile().as_text())

    first, second = np.diff([size(n) for n in (8, 16, 24)])
    assert second < 1.1 * first
