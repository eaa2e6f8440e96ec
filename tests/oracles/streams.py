"""Streams of gradients with spikes, NaN and infinities, and how they are run and judged."""

import functools
from typing import Any

import jax
import numpy as np

NUM_STEPS = 200
SPIKES = {5: 10.0, 40: 1e2, 77: 1e3, 78: 1e3, 120: 1e4, 150: 1e4, 199: 50.0}
BAD = {0: np.nan, 31: np.inf, 79: -np.inf, 121: np.nan, 122: np.nan}


def make_stream(spikes: dict = SPIKES, bad: dict = BAD) -> list[dict[str, np.ndarray]]:
    """Gradients of two leaves whose size drifts down; some steps are spikes, some bad."""
    rng = np.random.default_rng(7)
    stream = []
    for i in range(NUM_STEPS):
        size = 2.0 * np.exp(-i / 150 + 0.3 * rng.normal()) * spikes.get(i, 1.0)
        g = {"b": 0.1 * size * rng.normal(size=3), "w": size * rng.normal(size=(4, 2))}
        g = {k: v.astype(np.float32) for k, v in g.items()}
        if i in bad:
            g["w"][1, 1] = bad[i]
        stream.append(g)
    return stream


@functools.cache
def arrays_of_stream() -> dict[str, np.ndarray]:
    stream = make_stream()
    return {k: np.stack([g[k] for g in stream]) for k in stream[0]}


def scan(tx: Any, grads: Any, in_axes: int | None = None) -> tuple[Any, Any]:
    """Updates and states of every step, with a leading axis of steps."""

    def body(state: Any, g: Any) -> tuple[Any, Any]:
        updates, state = tx.update(g, state)
        return state, (updates, state)

    def run(grads: Any) -> Any:
        return jax.lax.scan(body, tx.init(jax.tree.map(lambda g: g[0], grads)), grads)[1]

    run = run if in_axes is None else jax.vmap(run, in_axes=in_axes, out_axes=in_axes)
    return jax.device_get(jax.jit(run)(grads))


def global_norm(tree: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in tree.values())))


def f32(x: float) -> float:
    """The value a hyper-parameter has in float32, as float64."""
    return float(np.float32(x))


def scale(g: dict, factor: float) -> dict:
    return {k: v * factor for k, v in g.items()}


def assert_every_step_is_the_oracle(run: tuple[Any, Any], oracle: Any) -> None:
    updates, states = run
    num_bad = 0
    next(oracle)
    clipped = statistics = None
    for i, g in enumerate(make_stream()):
        if i in BAD:
            num_bad += 1
            clipped = {k: np.zeros_like(v) for k, v in g.items()}
        else:
            clipped, statistics = oracle.send({k: np.float64(v) for k, v in g.items()})
        size = max(np.abs(v).max() for v in clipped.values())
        for k in g:
            np.testing.assert_allclose(
                updates[k][i], clipped[k], rtol=3e-4, atol=3e-5 * size, err_msg=f"{k}, step {i}"
            )
        assert states.stats.num_nonfinite[i] == num_bad
        if statistics is not None:
            check_statistics(states, i, statistics)


def check_statistics(states: Any, i: int, expected: dict) -> None:
    learned = jax.tree.map(lambda x: x[i], states.learned)
    found = {"threshold": states.threshold[i], "learned": learned}
    if isinstance(learned, dict):
        found |= learned
    for name, value in expected.items():
        close = functools.partial(np.testing.assert_allclose, rtol=3e-4, atol=1e-6)
        jax.tree.map(close, found[name], value)


def assert_telemetry_says_what_happened(run: tuple[Any, Any]) -> None:
    updates, states = run
    for i, g in enumerate(make_stream()):
        clipped = {k: v[i] for k, v in updates.items()}
        assert states.step[i] == i + 1
        np.testing.assert_allclose(states.stats.post_norm[i], global_norm(clipped), rtol=1e-5)
        if i in BAD:
            assert states.stats.clip_coef[i] == 0
            assert states.stats.pre_norm[i] == (states.stats.pre_norm[i - 1] if i else 0)
            continue
        np.testing.assert_allclose(states.stats.pre_norm[i], global_norm(g), rtol=1e-5)
        np.testing.assert_allclose(
            states.stats.clip_coef[i],
            states.stats.post_norm[i] / states.stats.pre_norm[i],
            rtol=1e-6,
        )
        if states.stats.clip_coef[i] == 1:
            assert all(np.array_equal(clipped[k], g[k]) for k in g), i
    assert ((states.stats.clip_rate >= 0) & (states.stats.clip_rate <= 1)).all()
    assert states.num_learned[-1] == NUM_STEPS - len(BAD)
