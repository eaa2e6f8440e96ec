"""Thresholds as users give them, and as each leaf gets them."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxclip
from jaxclip.thresholds.by_error import mse_optimal
from jaxclip.thresholds.by_fan_in import fan_in
from jaxclip.thresholds.by_magnitude import max_abs, std_multiple
from jaxclip.thresholds.values import check_threshold_tree, resolve_threshold

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64


# --- What may be given -----------------------------------------------------------------

NO_THRESHOLD = [
    "0.5",
    b"0.5",
    True,
    np.True_,
    0.5j,
    np.asarray(1j),
    np.asarray("x"),
    np.asarray(True),
    -1.0,
    -1,
    np.float32(-1),
    np.nan,
    -np.inf,
    np.full(2, -1.0),
    np.full(2, np.nan),
    np.full(2, 1j),
    np.full(2, "x"),
    np.full(2, True),
    fan_in,
    max_abs,
    mse_optimal,
]
PARAMS = {"a": {"w": np.ones((4, 2), np.float32), "b": np.ones(2, np.float32)}, "n": np.arange(3)}


def name_of(bad) -> str:
    return getattr(bad, "__name__", repr(bad))


@pytest.mark.parametrize("bad", [None, *NO_THRESHOLD], ids=name_of)
def test_values_that_are_not_thresholds_are_refused_by_name(bad):
    for check in (
        lambda: check_threshold_tree("threshold", bad),
        lambda: resolve_threshold(bad, PARAMS),
    ):
        with pytest.raises((TypeError, ValueError), match="threshold"):
            check()


@pytest.mark.parametrize("bad", NO_THRESHOLD, ids=name_of)
def test_values_that_are_not_thresholds_are_refused_in_a_tree(bad):
    with pytest.raises((TypeError, ValueError), match="threshold at 'a'"):
        check_threshold_tree("threshold", {"a": bad, "n": 1.0})


def test_none_in_a_tree_bounds_nothing():
    free = float("inf")
    assert resolve_threshold({"a": None, "n": 1.0}, PARAMS) == {
        "a": {"w": free, "b": free},
        "n": free,
    }
    assert resolve_threshold({"a": {"w": 0.5, "b": None}, "n": None}, PARAMS) == {
        "a": {"w": 0.5, "b": free},
        "n": free,
    }


@pytest.mark.parametrize("shape", [(3,), (5, 1), (4, 1), (1, 4, 2), (0,)])
def test_an_array_that_does_not_broadcast_to_a_leaf_is_refused_with_path_and_shapes(shape):
    for t in (np.ones(shape), jnp.ones(shape)):
        with pytest.raises(ValueError, match=r"threshold.*'a/(w|b)'.*broadcast"):
            resolve_threshold(t, PARAMS)


def test_an_array_gives_every_channel_a_threshold_of_its_own():
    t = np.asarray([0.5, 2.0], np.float32)
    got = resolve_threshold({"a": {"w": t, "b": jnp.asarray([-1.0, 3.0])}, "n": 1.0}, PARAMS)["a"]
    assert np.array_equal(np.broadcast_to(got["w"], (4, 2)), np.broadcast_to(t, (4, 2)))
    assert np.array_equal(got["b"], [0.0, 3.0])  # a jax array's negative entries count as 0


def test_a_bad_entry_of_a_threshold_tree_is_named_by_its_path():
    with pytest.raises(ValueError, match="threshold at 'a/w'"):
        check_threshold_tree("threshold", {"a": {"w": -1.0, "b": 1.0}})
    with pytest.raises(TypeError, match="threshold at 'a/w'"):
        resolve_threshold({"a": {"w": "no", "b": 1.0}, "n": 1.0}, PARAMS)


@pytest.mark.parametrize("bad", [{"q": 1.0}, {}, [1.0, 2.0], {"a": {"w": 1.0}, "n": 1.0}], ids=repr)
def test_a_tree_that_is_no_prefix_of_the_parameters_is_refused(bad):
    with pytest.raises(ValueError, match="prefix"):
        resolve_threshold(bad, PARAMS)


def test_a_number_a_prefix_and_a_full_tree_reach_every_leaf():
    assert resolve_threshold(2, PARAMS) == {"a": {"w": 2.0, "b": 2.0}, "n": np.inf}
    assert resolve_threshold({"a": 0.5, "n": 1.0}, PARAMS)["a"] == {"w": 0.5, "b": 0.5}
    full = {"a": {"w": 0.25, "b": np.inf}, "n": 1.0}
    assert resolve_threshold(full, PARAMS)["a"] == {"w": 0.25, "b": np.inf}


def test_a_schedule_is_taken_at_the_step_and_at_zero_without_one():
    halving = lambda step: 2.0 ** (-step.astype(jnp.float32))  # noqa: E731
    assert float(resolve_threshold(halving, PARAMS)["a"]["w"]) == 1.0
    assert float(resolve_threshold(halving, PARAMS, jnp.int32(3))["a"]["w"]) == 0.125
    traced = jax.jit(lambda step: resolve_threshold({"a": halving, "n": 1.0}, PARAMS, step)["a"])
    assert float(traced(jnp.int32(2))["b"]) == 0.25


def test_a_traced_negative_threshold_counts_as_zero_and_nothing_recompiles():
    traces = []

    @jax.jit
    def resolved(t):
        traces.append(1)
        return resolve_threshold(t, PARAMS)["a"]["w"]

    assert [float(resolved(t)) for t in (-3.0, 0.0, 0.5, np.inf)] == [0, 0, 0.5, np.inf]
    assert len(traces) == 1
    assert resolved(0.5).dtype == jnp.result_type(float)


def test_the_empty_tree_has_no_thresholds():
    assert resolve_threshold(0.5, {}) == {}
    assert resolve_threshold(0.5, None) is None
    assert resolve_threshold(fan_in(1.0), ()) == ()


# --- Numbers and schedules -------------------------------------------------------------

sgd = optax.sgd(0.1)
# Whatever takes a number or a schedule and no threshold of other kinds.
NUMBER_OR_SCHEDULE = {
    ("adagc", "max_norm"): lambda x: jaxclip.gradients.adagc(max_norm=x),
    ("adaptive_grad_clip", "clipping"): jaxclip.adaptive_grad_clip,
    ("box", "high"): lambda x: jaxclip.box(-1.0, x),
    ("box", "low"): lambda x: jaxclip.box(x, 1.0),
    ("clip_by_global_norm", "max_norm"): jaxclip.clip_by_global_norm,
    ("fan_in", "kappa"): fan_in,
    ("lion", "learning_rate"): jaxclip.lion,
    ("lion", "weight_decay"): lambda x: jaxclip.lion(0.1, weight_decay=x),
    ("sign_sgd", "learning_rate"): jaxclip.sign_sgd,
    ("signum", "learning_rate"): jaxclip.signum,
    ("signum", "weight_decay"): lambda x: jaxclip.signum(0.1, weight_decay=x),
    ("skip_or_clip", "drop_norm"): lambda x: jaxclip.gradients.skip_or_clip(sgd, drop_norm=x),
    ("skip_or_clip", "max_norm"): lambda x: jaxclip.gradients.skip_or_clip(sgd, max_norm=x),
    ("skip_or_clip", "num_deviations"): lambda x: jaxclip.gradients.skip_or_clip(
        sgd, num_deviations=x
    ),
    ("smooth_clip", "scale"): jaxclip.gradients.smooth_clip,
    ("soft_sign", "temperature"): jaxclip.sign.soft_sign,
    ("zclip", "max_norm"): lambda x: jaxclip.gradients.zclip(max_norm=x),
}
# Whatever says "schedule" beside "rule", or is handed on; `step` is what schedules are given.
OTHER_ARGUMENTS = {
    ("make_train_step", "weight_threshold"),
    ("project_weights", "projection"),
    ("sweep", "densities"),
    ("sweep", "optimizer"),
    ("sweep", "weight_threshold"),
}


def arguments_with_schedules() -> set[tuple[str, str]]:
    """Of the public functions, by their docstrings: those without a word of rules."""
    found = set()
    for name in jaxclip.__all__:
        doc = inspect.getdoc(getattr(jaxclip, name)) or ""
        entries = doc.partition("Args:\n")[2].partition("\n\n")[0]
        for argument, text in re.findall(
            r"^  (\w+): (.*?)(?=^  \w+: |\Z)", entries, re.MULTILINE | re.DOTALL
        ):
            if "schedule" in text and "rule" not in text and "As in" not in text:
                found.add((name, argument))
    return {(name, argument) for name, argument in found if argument != "step"}


def test_all_public_arguments_that_take_a_number_or_a_schedule_are_known_here():
    found = arguments_with_schedules()
    assert {("adaptive_grad_clip", "clipping"), ("fan_in", "kappa")} <= found
    assert found <= {*NUMBER_OR_SCHEDULE, *OTHER_ARGUMENTS}


@pytest.mark.parametrize(("name", "argument"), NUMBER_OR_SCHEDULE)
def test_where_a_number_or_a_schedule_is_asked_for_a_rule_is_refused_by_name(name, argument):
    make = NUMBER_OR_SCHEDULE[name, argument]
    for rule in (
        max_abs(),
        std_multiple(3.0),
        jaxclip.thresholds.per_tree(max_abs()),
        fan_in(1.0),
        max_abs,
    ):
        with pytest.raises(TypeError, match=f"^{argument} .*rule"):
            make(rule)
    make(0.5)
    make(lambda step: 0.5)
