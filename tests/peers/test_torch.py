"""The same numbers as PyTorch and its libraries: recorded, and live where torch is installed.

`recorded/record_torch.py` made `recorded/torch.json`; the versions are inside.
"""

import importlib.util
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxclip

FOLDER = pathlib.Path(__file__).parents[1] / "peers" / "recorded"
# Ours is the smaller: a clipped norm carries a margin of eight float32 ulps. Four more are for
# the roundings of both sides.
NORM_RTOL = (8 + 4) * 2.0**-23
UNIT_NORM_RTOL = (8 + 8) * 2.0**-23  # the bound of a unit is a norm too
# A few sums of rounded steps.
STEP_TOLERANCE = {"rtol": 2.0**-20, "atol": 2.0**-24}


def live_record() -> dict[str, Any]:
    """What torch does here and now; without torch, nothing."""
    if importlib.util.find_spec("torch") is None:
        return {"cases": []}
    spec = importlib.util.spec_from_file_location("record_torch", FOLDER / "record_torch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return json.loads(json.dumps(module.record()))


RECORD = json.loads((FOLDER / "torch.json").read_text())
CASES = [("recorded", c) for c in RECORD["cases"]] + [("live", c) for c in live_record()["cases"]]


def cases(name: str) -> Any:
    chosen = [
        pytest.param(case, id=f"{source}-{'-'.join(str(x) for x in case['arguments'].values())}")
        for source, case in CASES
        if case["name"] == name
    ]
    return pytest.mark.parametrize("case", chosen)


def arrays(lists: list) -> list[jax.Array]:
    return [jnp.asarray(np.asarray(x, np.float32)) for x in lists]


def update_once(tx: Any, grads: list, params: Any = None) -> list:
    return tx.update(grads, tx.init(grads if params is None else params), params)[0]


def assert_all_close(actual: list, expected: list, **tolerance: float) -> None:
    for a, e in zip(actual, arrays(expected), strict=True):
        np.testing.assert_allclose(a, e, **tolerance)


def parameters_after_each_step(tx: Any, case: dict) -> list:
    params = arrays(case["params"])
    state, update, after = tx.init(params), jax.jit(tx.update), []
    for grads in case["grads"]:
        updates, state = update(arrays(grads), state, params)
        params = optax.apply_updates(params, updates)
        after.append(params)
    return after


@cases("clip_grad_norm")
def test_a_global_norm_clip_with_its_eps_is_that_of_torch(case: dict):
    max_norm, norm_type = case["arguments"]["max_norm"], float(case["arguments"]["norm_type"])
    grads = arrays(case["grads"])
    tx = jaxclip.clip_by_global_norm(max_norm, ord=norm_type, eps=1e-6)
    clipped, state = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(state.stats.pre_norm, case["norm"], rtol=4 * 2.0**-23)
    if case["norm"] < max_norm:
        for c, g in zip(clipped, grads, strict=True):
            np.testing.assert_array_equal(c, g)
    assert_all_close(clipped, case["expected"], rtol=NORM_RTOL)


@cases("clip_grad_value")
def test_a_value_clip_is_that_of_torch(case: dict):
    tx = jaxclip.clip_by_value(case["arguments"]["clip_value"])
    clipped = update_once(tx, arrays(case["grads"]))
    assert_all_close(clipped, case["expected"], rtol=0)  # 0.5 and 1 are floats


def to_our_layout(x: jax.Array) -> jax.Array:
    """The units of a layer come first in PyTorch (OI, OIHW), last in JAX (IO, HWIO)."""
    return jnp.moveaxis(x, (0, 1), (-1, -2)) if x.ndim > 1 else x


@pytest.mark.thorough
@cases("adaptive_clip_grad")
def test_an_adaptive_clip_is_that_of_timm(case: dict):
    params, grads, expected = (
        [to_our_layout(x) for x in arrays(case[name])] for name in ("params", "grads", "expected")
    )
    factor = case["arguments"]["clip_factor"]
    # A unit is all but the last axis; of a bias, the whole. None says so for rank 1, 2 and 4.
    for axis, chosen in ((None, slice(0, 3)), ((0, 1), slice(3, 4))):
        tx = jaxclip.adaptive_grad_clip(factor, axis=axis)
        clipped = update_once(tx, grads[chosen], params[chosen])
        for c, e in zip(clipped, expected[chosen], strict=True):
            np.testing.assert_allclose(c, e, rtol=UNIT_NORM_RTOL)


@cases("adam_without_memory")
def test_sign_sgd_is_adam_without_memory(case: dict):
    tx = jaxclip.sign_sgd(case["arguments"]["lr"])
    for params, expected in zip(
        parameters_after_each_step(tx, case), case["expected"], strict=True
    ):
        assert_all_close(params, expected, **STEP_TOLERANCE)


@cases("lion")
def test_lion_is_that_of_lion_pytorch(case: dict):
    b1, b2 = case["arguments"]["betas"]
    lr, decay = case["arguments"]["lr"], case["arguments"]["weight_decay"]
    tx = jaxclip.lion(lr, b1, b2, weight_decay=decay)
    for params, expected in zip(
        parameters_after_each_step(tx, case), case["expected"], strict=True
    ):
        assert_all_close(params, expected, **STEP_TOLERANCE)


@pytest.mark.thorough
def test_the_record_is_small_and_says_what_made_it():
    assert (FOLDER / "torch.json").stat().st_size < 50_000
    assert set(RECORD["versions"]) == {"torch", "timm", "lion-pytorch"}
    assert {c["name"] for c in RECORD["cases"]} >= {
        "clip_grad_norm",
        "clip_grad_value",
        "adaptive_clip_grad",
        "adam_without_memory",
        "lion",
    }
