"""Thresholds as given, directed rounding, and `fan_in`."""

import inspect
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxclip
from jaxclip._core.floats import round_toward_zero
from jaxclip._core.trees import path_name
from jaxclip.thresholds.by_error import mse_optimal
from jaxclip.thresholds.by_fan_in import fan_in, fan_ins
from jaxclip.thresholds.by_magnitude import max_abs, std_multiple
from jaxclip.thresholds.values import check_threshold_tree, resolve_threshold

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
jitted_round = jax.jit(round_toward_zero, static_argnums=1)


# --- Directed rounding -----------------------------------------------------------------


def truncated(value, dtype) -> np.ndarray:
    """Exact rounding towards zero in NumPy; beyond the dtype, its largest number."""
    value = np.asarray(value).astype(np.float64)
    largest = float(ml_dtypes.finfo(dtype).max)
    near = np.clip(value, -largest, largest).astype(dtype)
    grew = np.abs(near.astype(np.float64)) > np.abs(value)
    near = np.where(grew, np.nextafter(near, np.zeros((), dtype)), near)
    return np.where(np.isinf(value), value, near.astype(np.float64))


def float32_of_all_sizes(size=16):
    finite = hnp.arrays(np.uint32, size).map(lambda b: b.view(np.float32))
    return finite.map(lambda x: np.where(np.isnan(x), np.float32(0.1), x).astype(np.float32))


def assert_equal_up_to_flushed_subnormals(got, expected, dtype):
    got = np.asarray(got).astype(np.float64)
    flushed = (got == 0) & (np.abs(expected) < 2.0**-126)
    assert np.array_equal(np.where(flushed, 0, got), np.where(flushed, 0, expected))


@every_dtype
@given(x=float32_of_all_sizes())
def test_traced_rounding_towards_zero_equals_numpy_and_eager_equals_jit(dtype, x):
    expected = truncated(x, dtype)
    for rounding in (round_toward_zero, jitted_round):
        got = rounding(jnp.asarray(x), np.dtype(dtype))
        assert got.dtype == dtype
        assert_equal_up_to_flushed_subnormals(got, expected, dtype)


@every_dtype
@given(x=st.floats(allow_nan=False))
def test_a_python_number_is_rounded_towards_zero_and_beyond_the_dtype_is_inf(dtype, x):
    got = round_toward_zero(x, dtype)
    assert isinstance(got, np.ndarray)
    assert got.dtype == dtype
    if abs(x) > float(ml_dtypes.finfo(dtype).max):
        assert float(got) == np.copysign(np.inf, x)
    else:
        assert float(got) == truncated(x, dtype)


@every_dtype
def test_jit_does_not_keep_excess_precision_when_rounding(dtype):
    # 0.1, 0.3 and their like lie between two numbers of the dtype; a rounding by cast and
    # comparison is simplified away when both ends up in one fusion.
    x = (np.random.default_rng(0).uniform(-3, 3, 4096)).astype(np.float32)

    @jax.jit
    def fused(x):
        return round_toward_zero(x * 1.0, dtype).astype(jnp.float32) * 2.0

    assert np.array_equal(np.asarray(fused(jnp.asarray(x)), np.float64), 2 * truncated(x, dtype))


def test_float16_subnormal_results_are_rounded_towards_zero():
    unit = 2.0**-24
    x = np.asarray([0.999, 1.0, 1.5, 1.999, 2.0, 1023.5, -0.5, -1.9, -3.01]) * unit
    expected = np.asarray([0, 1, 1, 1, 2, 1023, 0, -1, -3]) * unit
    for got in (
        round_toward_zero(jnp.asarray(x, jnp.float32), jnp.float16),
        jitted_round(jnp.asarray(x, jnp.float32), np.dtype(np.float16)),
        round_toward_zero(x, jnp.float16),
    ):
        assert np.array_equal(np.asarray(got, np.float64), expected)


@every_dtype
def test_infinities_and_nan_stay(dtype):
    x = np.asarray([np.inf, -np.inf, np.nan], np.float32)
    for got in (round_toward_zero(x, dtype), jitted_round(jnp.asarray(x), np.dtype(dtype))):
        assert np.array_equal(np.asarray(got, np.float64), x, equal_nan=True)


def test_beyond_the_dtype_numpy_numbers_become_inf_and_jax_entries_the_largest_number():
    got = np.asarray(round_toward_zero(np.asarray([1e6, -7e4]), jnp.float16), np.float64)
    assert np.array_equal(got, [np.inf, -np.inf])
    for rounding in (round_toward_zero, jitted_round):
        got = np.asarray(rounding(jnp.asarray([1e6, -7e4]), np.dtype(np.float16)), np.float64)
        assert np.array_equal(got, [65504, -65504])


@pytest.mark.parametrize(
    ("source", "target"), [(np.float16, ml_dtypes.bfloat16), (ml_dtypes.bfloat16, np.float16)]
)
@given(bits=hnp.arrays(np.uint16, 16))
def test_rounding_between_the_two_16_bit_dtypes_never_grows(source, target, bits):
    with np.errstate(invalid="ignore"):  # signalling NaN
        x = np.nan_to_num(bits.view(source).astype(np.float64), posinf=1, neginf=-1).astype(source)
    got = np.asarray(jitted_round(jnp.asarray(x), np.dtype(target)), np.float64)
    assert np.all(np.abs(got) <= np.abs(x.astype(np.float64)))


@every_dtype
@given(x=hnp.arrays(np.float64, 8, elements=st.floats(-1e30, 1e30)))
@example(x=np.full(8, 0.5 - 2.0**-40))  # float32 rounds it up to 0.5, before any other dtype
def test_a_float64_jax_array_is_rounded_towards_zero(dtype, x):
    with enable_x64(True):
        got = np.asarray(jitted_round(jnp.asarray(x), np.dtype(dtype)), np.float64)
    assert np.all(np.abs(got) <= np.abs(x))


def test_the_derivative_of_the_rounding_is_that_of_a_cast():
    grad = jax.grad(lambda t: round_toward_zero(t, jnp.bfloat16).astype(jnp.float32))(0.1)
    assert float(grad) == 1.0


# --- What may be given -----------------------------------------------------------------

NO_THRESHOLD = [
    "0.5",
    b"0.5",
    None,
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


@pytest.mark.parametrize("bad", NO_THRESHOLD, ids=name_of)
def test_what_is_no_threshold_is_refused_by_name(bad):
    for check in (
        lambda: check_threshold_tree("threshold", bad),
        lambda: check_threshold_tree("threshold", {"a": bad, "n": 1.0}),
        lambda: resolve_threshold(bad, PARAMS),
    ):
        with pytest.raises((TypeError, ValueError), match="threshold"):
            check()


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


# --- fan_in ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "shape", "inputs"),
    [
        ("dense/kernel", (64, 10), 64),
        ("conv/kernel", (3, 3, 16, 32), 3 * 3 * 16),
        ("conv1d/kernel", (5, 16, 32), 5 * 16),
        ("general/kernel", (4, 8, 10), 32),
        ("attention/query/kernel", (32, 4, 8), 32),
        ("attention/key/kernel", (32, 4, 8), 32),
        ("attention/value/kernel", (32, 4, 8), 32),
        ("attention/out/kernel", (4, 8, 32), 32),
        ("embed/embedding", (1000, 16), 16),
        ("dense/bias", (10,), None),
        ("conv3d/kernel", (3, 3, 3, 2, 5), 54),
        ("attention/query/bias", (4, 8), None),
        ("norm/scale", (64,), None),
        ("norm/scale", (4, 16), None),
        ("temperature", (), None),
    ],
)
def test_fan_in_is_read_by_the_layer_conventions_of_flax(path, shape, inputs):
    tree = jnp.zeros(shape)
    for name in reversed(path.split("/")):
        tree = {name: tree}
    (got,) = jax.tree.leaves(resolve_threshold(fan_in(0.5), tree))
    expected = np.inf if inputs is None else 0.5 * np.sqrt(2 / inputs)
    np.testing.assert_allclose(float(got), expected, rtol=1e-6)


def test_stacked_axes_are_not_inputs():
    params = {"kernel": jnp.zeros((12, 64, 10)), "bias": jnp.zeros((12, 10))}
    got = resolve_threshold(fan_in(1.0, stacked_axes=1), params)
    np.testing.assert_allclose(float(got["kernel"]), np.sqrt(2 / 64), rtol=1e-6)
    assert float(got["bias"]) == np.inf


def test_kappa_may_be_traced_or_a_schedule():
    params = {"w": jnp.zeros((8, 3)), "b": jnp.zeros(3)}
    traced = jax.jit(lambda k: resolve_threshold(fan_in(k), params))(2.0)
    assert (float(traced["w"]), float(traced["b"])) == (1.0, np.inf)
    scheduled = fan_in(lambda step: 1.0 + step)
    assert float(resolve_threshold(scheduled, params, jnp.float32(3))["w"]) == 2.0


@pytest.mark.parametrize("bad", ["1", None, True, 1j, -1.0, np.nan, np.ones(2)], ids=repr)
def test_a_kappa_that_is_no_number_is_refused_by_name(bad):
    with pytest.raises((TypeError, ValueError), match="kappa"):
        fan_in(bad)


@pytest.mark.parametrize(
    ("shape", "out_axes", "stacked", "inputs"),
    [
        ((32, 4, 8), (-2, -1), 0, 32),
        ((4, 8, 32), (-1,), 0, 32),
        ((10, 64), 0, 0, 64),
        ((12, 10, 64), 0, 1, 64),
        ((16, 8, 3, 3), 0, 0, 72),
        ((5, 6), (0, 1), 0, 1),
    ],
)
def test_out_axes_say_which_axes_are_outputs(shape, out_axes, stacked, inputs):
    rule = fan_in(1.0, out_axes=out_axes, stacked_axes=stacked)
    params = {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[stacked:][-1])}
    got = resolve_threshold(rule, params)
    np.testing.assert_allclose(float(got["kernel"]), np.sqrt(2 / inputs), rtol=1e-6)
    assert float(got["bias"]) == np.inf
    assert fan_ins(rule, params) == {"kernel": inputs, "bias": np.inf}


@pytest.mark.parametrize("bad", [True, 1.5, "1", (), (0, None)], ids=repr)
def test_out_axes_must_be_axes(bad):
    with pytest.raises((TypeError, ValueError), match="out_axes"):
        fan_in(1.0, out_axes=bad)
    with pytest.raises(ValueError, match=r"out_axes .*'dense/kernel'"):
        resolve_threshold(fan_in(1.0, out_axes=2), {"dense": {"kernel": jnp.ones((2, 2))}})


class Layers(nn.Module):
    """One of each of flax's layers, over an input of shape (2, 6, 6, 8)."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(12, (3, 3), feature_group_count=4, name="conv")(x)
        x = nn.LayerNorm(name="norm")(x)
        x = nn.ConvTranspose(6, (2, 2), name="transposed")(x)
        x = nn.Dense(5, name="dense")(x.reshape(2, 36, 6))
        x = nn.DenseGeneral((3, 4), name="two_outputs")(x)
        x = nn.DenseGeneral(10, axis=(-2, -1), name="two_inputs")(x)
        x = nn.MultiHeadDotProductAttention(2, qkv_features=8, name="attention")(x)
        x = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=7,
        )(nn.Dense(10, name="stack"), x, None)[0]
        return x, nn.Embed(30, 4, name="embed")(jnp.zeros(1, jnp.int32))


def test_fan_in_of_the_real_layers_of_flax():
    shapes = jax.eval_shape(Layers().init, jax.random.key(0), jnp.zeros((2, 6, 6, 8)))["params"]
    rules = {name: fan_in() for name in shapes} | {
        "two_outputs": fan_in(out_axes=(-2, -1)),
        "stack": fan_in(stacked_axes=1),
    }
    got = fan_ins(rules, shapes)
    kernels = {
        name: got[name]["kernel"]
        for name in ("conv", "transposed", "dense", "two_outputs", "two_inputs", "stack")
    }
    assert kernels == {
        "conv": 3 * 3 * 8 // 4,  # of the inputs of its group
        "transposed": 2 * 2 * 12,
        "dense": 6,
        "two_outputs": 5,
        "two_inputs": 3 * 4,
        "stack": 10,
    }
    attention = {name: layer["kernel"] for name, layer in got["attention"].items()}
    assert attention == {"query": 10, "key": 10, "value": 10, "out": 8}
    assert got["embed"] == {"embedding": 4}
    free = [*(got[n]["bias"] for n in (*kernels, "norm")), got["norm"]["scale"]]
    free += [layer["bias"] for layer in got["attention"].values()]
    assert set(free) == {np.inf}


def test_fan_in_of_the_attention_of_nnx():
    layer = nnx.MultiHeadAttention(2, 10, 8, decode=False, rngs=nnx.Rngs(0))
    got = fan_ins(fan_in(), nnx.state(layer, nnx.Param))
    got = {path_name(p): n for p, n in jax.tree_util.tree_leaves_with_path(got)}
    assert {k: n for k, n in got.items() if n < np.inf} == {
        "query/kernel": 10,
        "key/kernel": 10,
        "value/kernel": 10,
        "out/kernel": 8,
    }


@pytest.mark.parametrize("bad", [-1, 1.5, True, "1", None], ids=repr)
def test_stacked_axes_must_be_a_count(bad):
    with pytest.raises((TypeError, ValueError), match="stacked_axes"):
        fan_in(1.0, stacked_axes=bad)
