"""Low-bit arrays of every kind: the nearest level is taken, and the parts fit together."""

import copy
import dataclasses
import functools
import itertools
import operator
import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxclip
from jaxclip import max_abs
from jaxclip._core.grids import Grid, code_range
from jaxclip.checkpoints.format.layout import plan_file
from jaxclip.lowbit.arrays import QuantizedArray, dequantize
from jaxclip.lowbit.quantizer import quantize
from oracles.quick import quick_first

encode = functools.partial(quantize, threshold=max_abs)  # which compiles fast
TINY = 2.0**-126
DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16]
FORMATS = ["float32", "float16", "bfloat16", "log8"]
# bits, levels, zero_point
GRIDS = [
    (1, "full", False),
    ("ternary", "full", False),
    (2, "full", False),
    (4, "narrow", False),
    (8, "full", False),
    ("ternary", "full", True),
    (2, "narrow", True),
    (4, "full", True),
    (8, "full", True),
]
# Every grid meets every format and every dtype, every format every dtype; in the quick run
# every grid meets one.
CASES = [
    (*grid, FORMATS[(i + k) % 4], DTYPES[(2 * i + k) % 3])
    for k in range(len(FORMATS))
    for i, grid in enumerate(GRIDS)
]
every_case = pytest.mark.parametrize(
    ("bits", "levels", "zero_point", "scale_dtype", "dtype"), quick_first(CASES, len(GRIDS))
)
few_grids = pytest.mark.parametrize(
    ("bits", "levels", "zero_point"), quick_first([GRIDS[7], GRIDS[1], GRIDS[3]])
)
HARD_ROWS = np.array(
    [
        np.zeros(8),
        np.full(8, 0.3),
        np.full(8, -7.0),
        [0.7, 0, 0, 0, 0, 0, 0, 0],
        [1e3, 1, -1, 0.5, -0.25, 0.1, 0, 1],
        [-1e6, 1, -1, 0.5, -0.25, 0.1, 0, 1],
        [1e-44, -1e-42, 0, 9e-39, 0, 0, 0, 0],
        [1e-38, -1e-38, 1e-39, 0, 0, 0, 0, 0],
        [3e38, -3e38, 1e38, -2e38, 0, 1, 3e37, -3e38],
        [-3e38, -1e38, -2e38, -3e38, 0, 0, -1, 0],
    ]
)


def nearest_distance(q: QuantizedArray, x: np.ndarray) -> np.ndarray:
    """How far each entry of `x` is from the nearest level of its row; float64."""
    low, high = code_range(q.bits, q.grid.levels)
    codes = np.array([-1, 1]) if q.bits == 1 else np.arange(low, high + 1)
    zero = np.zeros(q.scale.shape) if q.zero is None else np.asarray(q.zero, np.float64)
    scale = np.asarray(q.scale, np.float64)
    levels = scale[..., None] * (codes - zero[..., None])
    return np.min(np.abs(np.asarray(x, np.float64)[..., None] - levels), axis=-1)


def exact(q: QuantizedArray) -> np.ndarray:
    zero = 0 if q.zero is None else np.asarray(q.zero, np.float64)
    return np.asarray(q.scale, np.float64) * (np.asarray(q.qvalue, np.float64) - zero)


def assert_takes_nearest_levels(q: QuantizedArray, x: np.ndarray) -> None:
    error = np.abs(np.asarray(x, np.float64) - exact(q))
    size = np.maximum(np.abs(np.asarray(x, np.float64)), np.abs(exact(q)))
    # The quotient is rounded, so near a tie the other level may be taken; subnormals count as 0.
    assert np.all(error <= nearest_distance(q, x) + 1e-6 * size + 2 * TINY)


def finite_weights(dtype):
    """Finite numbers by their bits, from subnormals to the largest."""
    unsigned, largest = (
        np.dtype(f"uint{8 * np.dtype(dtype).itemsize}"),
        float(ml_dtypes.finfo(dtype).max),
    )

    def finite(bits):
        with np.errstate(invalid="ignore"):
            x = bits.view(dtype).astype(np.float64)
        largest_number = float(largest)
        return np.nan_to_num(x, nan=1.0, posinf=largest_number, neginf=-largest_number).astype(
            dtype
        )

    return hnp.arrays(unsigned, HARD_ROWS.shape).map(finite)


# --- Levels ----------------------------------------------------------------------------


@every_case
@given(data=st.data())
def test_every_entry_takes_the_nearest_level_of_the_scale_as_stored(
    bits, levels, zero_point, scale_dtype, dtype, data
):
    # Inside of the outermost levels that is half a step, outside what lies beyond them.
    with np.errstate(over="ignore"):
        hard = HARD_ROWS.astype(dtype)
    x = data.draw(st.just(hard) | finite_weights(dtype))
    x = np.where(np.isfinite(x.astype(np.float64)), x, np.ones_like(x))
    grid = Grid(bits, levels=levels, axis=0, zero_point=zero_point, scale_dtype=scale_dtype)
    q = quantize(jnp.asarray(x), grid, threshold=jaxclip.max_abs)
    q.validate()
    assert (q.zero is None) != zero_point
    assert q.scale.dtype == (jnp.float32 if scale_dtype == "log8" else jnp.dtype(scale_dtype))
    assert_takes_nearest_levels(q, x)
    decoded = np.asarray(dequantize(q), np.float64)
    assert np.all(np.isfinite(decoded))
    if bits != 1:
        assert np.all(decoded[x.astype(np.float64) == 0] == 0)  # 0 is on the grid


@pytest.mark.parametrize("scale_dtype", FORMATS)
def test_weights_beyond_a_threshold_take_the_nearest_level_too(scale_dtype):
    x = np.random.default_rng(4).normal(0.7, 1, size=(8, 33)).astype(np.float32)
    grid = Grid(4, axis=0, zero_point=True, scale_dtype=scale_dtype)
    q = quantize(jnp.asarray(x), grid, threshold=0.9)
    assert np.mean(np.abs(x) > 0.9) > 0.3
    assert_takes_nearest_levels(q, x)
    # The documented formula, with the scale as stored.
    codes = np.rint(x / np.asarray(q.scale, np.float32)) + np.asarray(q.zero)
    assert np.array_equal(q.qvalue, np.clip(codes, *code_range(4)))


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("scale_dtype", FORMATS)
def test_hard_rows_alone_lose_at_most_half_a_step(scale_dtype, zero_point):
    # A row to an array, so that log8 has nothing larger beside it.
    grid = Grid(4, levels="narrow", axis=None, zero_point=zero_point, scale_dtype=scale_dtype)
    encode = jax.vmap(lambda row: quantize(row, grid, threshold=jaxclip.max_abs))
    x = HARD_ROWS.astype(np.float32)
    q = encode(x)
    scale = np.asarray(q.scale, np.float64)
    assert np.all(np.isfinite(scale))
    assert np.all(scale > 0)
    assert_takes_nearest_levels(q, x)
    error = np.abs(x.astype(np.float64) - exact(q))
    # float16 scales end at 65504; in the others no row is clipped by more than rounding.
    clipped = {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8, "log8": 2 ** (1 / 16) - 1}
    held = np.abs(x).max(1) < (65504 if scale_dtype == "float16" else np.inf)
    slack = clipped[scale_dtype] * np.abs(x).max(1, keepdims=True) + TINY
    assert np.all((error <= scale / 2 * (1 + 1e-6) + slack)[held])


def test_float16_scales_saturate_at_both_ends():
    x = jnp.array([[1e9, -1e9], [1e-12, -1e-12]], jnp.float32)
    q = quantize(x, Grid("ternary", axis=0, scale_dtype=jnp.float16), threshold=jaxclip.max_abs)
    assert np.asarray(q.scale, np.float64).ravel().tolist() == [65504.0, 2.0**-24]
    assert np.asarray(q.qvalue).tolist() == [[1, -1], [0, 0]]


@pytest.mark.thorough
@pytest.mark.parametrize("scale_dtype", FORMATS)
def test_formats_cost_little_error_under_mse_optimal(scale_dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 64)), jnp.float32)
    error_of = lambda q: float(np.sum((np.asarray(x, np.float64) - exact(q)) ** 2))  # noqa: E731
    full = error_of(quantize(x, Grid(4, axis=0)))
    assert error_of(quantize(x, Grid(4, axis=0, scale_dtype=scale_dtype))) <= 1.05 * full


# --- Zero points -----------------------------------------------------------------------


@pytest.mark.thorough
def test_a_zero_point_moves_the_grid_as_worked_by_hand():
    # 16 levels from -0.5 to 7: a step of 0.5, and 0 is the second level from below.
    x = jnp.array([-0.5, 0.0, 0.25, 0.75, 3.1, 7.0])
    q = quantize(x, Grid(4, axis=None, zero_point=True), threshold=jaxclip.max_abs)
    assert float(q.scale.item()) == 0.5
    assert int(q.zero.item()) == -7
    # Half a step is rounded to even before the zero is added: 0.25 to 0, 0.75 to 1.
    assert np.asarray(q.qvalue).tolist() == [-8, -7, -7, -5, -1, 7]
    assert np.asarray(dequantize(q)).tolist() == [-0.5, 0.0, 0.0, 1.0, 3.0, 7.0]


@pytest.mark.parametrize("sign", [1, -1])
def test_one_sided_weights_use_all_levels(sign):
    x = sign * np.arange(16) / 4
    q = quantize(
        jnp.asarray(x, jnp.float32), Grid(4, axis=None, zero_point=True), threshold=jaxclip.max_abs
    )
    assert np.array_equal(dequantize(q), x)
    assert sorted(np.asarray(q.qvalue).tolist()) == list(range(-8, 8))


@pytest.mark.thorough
def test_a_threshold_clips_the_range_of_a_zero_point_on_both_sides():
    x = jnp.array([-9.0, -1.0, 0.0, 2.0, 9.0])
    q = quantize(x, Grid(4, axis=None, zero_point=True), threshold=7.5)
    assert np.asarray(dequantize(q)).tolist() == [-8.0, -1.0, 0.0, 2.0, 7.0]
    one_sided = quantize(
        jnp.array([0.0, 1.0, 9.0]), Grid(2, axis=None, zero_point=True), threshold=3.0
    )
    assert np.asarray(dequantize(one_sided)).tolist() == [0.0, 1.0, 3.0]


@pytest.mark.thorough
def test_each_group_has_its_own_zero():
    x = np.concatenate([np.arange(16.0), -np.arange(16.0), np.arange(5.0) - 2])[None]
    grid = Grid(4, axis=0, group_size=16, zero_point=True)
    q = quantize(jnp.asarray(x, jnp.float32), grid, threshold=jaxclip.max_abs)
    assert q.zero.shape == q.scale.shape == (1, 3)
    assert np.asarray(q.zero).tolist()[0][:2] == [-8, 7]
    np.testing.assert_allclose(dequantize(q)[:, :32], x[:, :32])
    assert np.abs(np.asarray(dequantize(q)) - x).max() <= 2 / 15 + 1e-6


# --- As an array -----------------------------------------------------------------------


@pytest.mark.thorough
@few_grids
def test_jax_functions_take_it_for_the_array_it_stands_for(bits, levels, zero_point):
    w = np.random.default_rng(1).normal(size=(6, 5)).astype(np.float32)
    q = encode(
        jnp.asarray(w),
        Grid(bits, levels=levels, axis=1, zero_point=zero_point),
    )
    x, dense = jnp.ones((2, 6), jnp.float32), dequantize(q)
    for apply in (lambda x, w: x @ w, jnp.dot, lambda x, w: jnp.sin(jnp.asarray(w)) + x[0, 0]):
        np.testing.assert_array_equal(apply(x, q), apply(x, dense))
        np.testing.assert_array_equal(jax.jit(apply)(x, q), jax.jit(apply)(x, dense))
    np.testing.assert_array_equal(q[1, ::2], dense[1, ::2])
    assert (q.shape, q.ndim) == ((6, 5), 2)


@pytest.mark.thorough
def test_numpy_takes_it_for_the_array_it_stands_for():
    q = encode(jnp.asarray([[1.0, -2.0], [0.5, 3.0], [0.0, 2.5]]), Grid(8, axis=1))
    dense = np.asarray(dequantize(q))
    assert np.asarray(q).dtype == np.float32
    np.testing.assert_array_equal(np.asarray(q), dense)
    np.testing.assert_array_equal(np.asarray(q, np.float64), dense.astype(np.float64))
    own = np.array(q)
    own[0] = 7  # a copy that may be written to
    np.testing.assert_array_equal(np.asarray(q), dense)
    np.testing.assert_allclose(np.ones(3) @ q, dense.sum(0), rtol=1e-6)
    np.testing.assert_allclose(q @ np.ones(2), dense.sum(1), rtol=1e-6)
    np.testing.assert_array_equal(q @ jnp.ones(2), jnp.asarray(dense) @ jnp.ones(2))
    assert np.asarray(encode(jnp.ones(3, jnp.bfloat16), 4)).dtype == ml_dtypes.bfloat16
    with pytest.raises(ValueError, match="copy must not be False"):
        np.array(q, copy=False)
    with pytest.raises(jax.errors.TracerArrayConversionError):
        jax.jit(lambda q: np.asarray(q))(q)


def test_a_loop_over_it_ends_behind_the_last_row():
    q = encode(jnp.asarray([[1.0, -2.0], [0.5, 3.0], [0.0, 2.5]]), Grid(8, axis=1))
    rows = list(itertools.islice(q, 5))
    assert len(rows) == len(q) == 3
    np.testing.assert_array_equal(np.stack(rows), dequantize(q))
    a, _, c = q
    np.testing.assert_array_equal(a + c, q[0] + q[2])
    summed = jax.jit(lambda q: sum(row for row in q))(q)
    np.testing.assert_allclose(summed, np.asarray(q).sum(0), rtol=1e-6)
    alone = encode(jnp.asarray(0.5), 4)
    for use in (len, iter):
        with pytest.raises(TypeError):
            use(alone)


def test_it_is_true_or_false_only_where_the_array_is():
    assert bool(encode(jnp.asarray(0.5), 4))
    assert not encode(jnp.zeros(1), 4)
    with pytest.raises(ValueError, match="ambiguous"):
        bool(encode(jnp.ones(3), 4))


OPERATIONS = {
    "q * 2": lambda q: q * 2,
    "2 - q": lambda q: 2 - q,
    "q + q": lambda q: q + q,
    "q / array": lambda q: q / jnp.full((6, 6), 4.0),
    "array % q": lambda q: jnp.full((6, 6), 4.0) % q,
    "numpy * q": lambda q: np.full((6, 6), 4.0, np.float32) * q,
    "q ** 2": lambda q: q**2,
    "q // 2": lambda q: q // 2,
    "divmod": lambda q: divmod(q, 2)[0],
    "-q": lambda q: -q,
    "abs": abs,
    "round": lambda q: round(q, 1),
    "q > 0": lambda q: q > 0,
    "q == q": lambda q: q == q + 0,
    "q != 0": lambda q: q != 0,
    "q @ q.T": lambda q: q @ q.T,
    "q += 1": lambda q: operator.iadd(q, 1),
    "sum": lambda q: q.sum(axis=0),
    "reshape": lambda q: q.reshape(4, 9),
    "astype": lambda q: q.astype(jnp.bfloat16),
    "at": lambda q: q.at[0].set(1),
    "jnp.where": lambda q: jnp.where(q > 0, q, 0),
    "jnp.dot": lambda q: jnp.dot(jnp.ones((2, 6)), q),
    "jnp.einsum": lambda q: jnp.einsum("ij,jk->ik", jnp.ones((2, 6)), q),
    "jnp.concatenate": lambda q: jnp.concatenate([q, q]),
    "np.sum": np.sum,
    "jax.nn.relu": jax.nn.relu,
}


@pytest.mark.thorough
def test_operators_and_methods_are_those_of_the_array_it_stands_for():
    w = np.random.default_rng(1).normal(size=(6, 6)).astype(np.float32)
    q = quantize(w, Grid(4, group_size=2, zero_point=True))
    dense = dequantize(q)
    for name, apply in OPERATIONS.items():
        got, wanted = apply(q), apply(dense)
        assert got.dtype == wanted.dtype, name
        np.testing.assert_array_equal(got, wanted, err_msg=name)
    traced = jax.jit(lambda q: [q * 2, q.T, q == 0, q.size])(q)
    for got, wanted in zip(traced, [dense * 2, dense.T, dense == 0, 36], strict=True):
        np.testing.assert_array_equal(got, wanted)
    one = quantize(jnp.asarray(-1.5), 8)
    assert float(one) == one.item() == float(dequantize(one).item())
    assert int(one) == int(dequantize(one).item())


@pytest.mark.thorough
def test_sizes_need_no_values():
    q = quantize(jnp.ones((6, 4)), Grid(4, group_size=2, zero_point=True))
    shapes = jax.eval_shape(lambda: q)
    # 24 codes of a byte, 12 scales of four and 12 zeros of one; packed codes take 12 bytes.
    for each in (q, shapes, jax.tree.map(np.asarray, q)):
        assert (each.size, each.nbytes, each.num_bytes) == (24, 24 + 12 * 5, 12 + 12 * 5)


def test_it_becomes_a_list_or_bytes_as_an_array_does():
    q = quantize(jnp.array([[1.0, -0.5]]), 8)
    assert q.tolist() == np.asarray(q).tolist()
    assert q.tobytes() == np.asarray(q).tobytes()


def test_what_it_lacks_is_said_with_what_to_call():
    q = quantize(jnp.ones(3), 4)
    for name in (
        "sharding",
        "is_fully_addressable",
        "devices",
        "block_until_ready",
    ):  # each part has its own
        with pytest.raises(AttributeError, match=f"QuantizedArray has no .*'{name}'.*dequantize"):
            getattr(q, name)
    with pytest.raises(AttributeError, match="no attribute 'sums'"):
        _ = q.sums
    with pytest.raises(TypeError, match="unhashable"):
        hash(q)
    with pytest.raises((ValueError, DeprecationWarning), match=r"jax\.numpy\.array"):
        jax.lax.mul(q, jnp.ones(3))
    assert not hasattr(q, "__array_interface__")
    for same in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        np.testing.assert_array_equal(same, dequantize(q))


@pytest.mark.thorough
def test_equinox_splits_and_joins_modules_with_low_bit_leaves():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(4, 3, 8, 1, key=jax.random.key(0))
    small, x = jaxclip.compress(model, Grid(4, axis=0)), jnp.ones(4)
    expected = jaxclip.decompress(small)(x)
    np.testing.assert_array_equal(small(x), expected)
    np.testing.assert_allclose(eqx.filter_jit(lambda m, x: m(x))(small, x), expected, rtol=1e-6)
    parts = eqx.partition(small, eqx.is_array)
    np.testing.assert_array_equal(eqx.combine(*parts)(x), expected)
    arrays, static = eqx.partition(model, eqx.is_array)
    low_bit = jaxclip.compress(arrays, Grid(4, axis=0))
    # A low-bit leaf is a node of the tree, so the tree with None in its place comes first.
    np.testing.assert_array_equal(eqx.combine(static, low_bit)(x), expected)


@pytest.mark.thorough
def test_it_goes_straight_into_a_flax_module():
    linen = pytest.importorskip("flax.linen")
    module, x = linen.Dense(3), jnp.ones((2, 4), jnp.float32)
    params = module.init(jax.random.key(0), x)
    small = jaxclip.compress(params, 4, rule=max_abs)
    expected = module.apply(jaxclip.decompress(small), x)
    np.testing.assert_array_equal(module.apply(small, x), expected)


@pytest.mark.thorough
@pytest.mark.parametrize("code_dtype", [jnp.int8, jnp.int4])
def test_codes_stay_narrow_in_the_arguments_of_a_compiled_program(code_dtype):
    w = jnp.asarray(np.random.default_rng(2).normal(size=(64, 48)), jnp.float32)
    q = encode(w, Grid(4, axis=1, group_size=16, zero_point=True)).with_code_dtype(code_dtype)
    x = jnp.ones((2, 64), jnp.float32)
    compiled = jax.jit(lambda x, q: x @ q).lower(x, q).compile()
    entry = compiled.as_text().split("ENTRY")[1]
    parameters = [line for line in entry.splitlines() if " parameter(" in line]
    name = "s8" if code_dtype == jnp.int8 else "s4"
    assert sum(f" {name}[64,48]" in line for line in parameters) == 1
    assert not any(" f32[64,48]" in line for line in parameters)
    # Scales of four bytes and zeros of one for each of 4 x 48 groups; int4 may take a byte.
    bound = x.nbytes + 64 * 48 + (4 + 1) * 4 * 48
    assert compiled.memory_analysis().argument_size_in_bytes <= bound + 64
    np.testing.assert_allclose(compiled(x, q), x @ dequantize(q), rtol=1e-5, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("axis", "group_size"), [(1, 8), (1, 100), (0, 2), ((0, 1), 4), (1, None), (None, 3)]
)
def test_batches_decode_as_their_parts(axis, group_size):
    shape = (3, 8, 6) if isinstance(axis, tuple) else (8, 6)
    w = np.random.default_rng(4).normal(size=(2, *shape))
    w = jnp.asarray(np.stack([w[0], 5 * w[1]]), jnp.float32)
    grid = Grid(8, axis=axis, group_size=group_size)
    parts = [quantize(x, grid, threshold=jaxclip.max_abs) for x in w]
    expected = np.stack([dequantize(q) for q in parts])
    assert np.abs(expected - np.asarray(w)).max() < np.abs(w).max() / 100
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *parts)
    batched = jax.vmap(lambda x: quantize(x, grid, threshold=jaxclip.max_abs))(w)
    assert jax.tree.structure(stacked) == jax.tree.structure(batched)
    for q in (stacked, batched):
        np.testing.assert_allclose(dequantize(q), expected, rtol=1e-6)
        np.testing.assert_allclose(jax.vmap(dequantize)(q), expected, rtol=1e-6)


@pytest.mark.thorough
def test_a_stack_whose_axes_are_counted_from_the_front_is_decoded_as_its_parts():
    parts = [quantize(x * jnp.ones((8, 6)), Grid(8, axis=1, group_size=4)) for x in (1, 2)]
    parts = [dataclasses.replace(q, grid=Grid(8, axis=1, group_size=4)) for q in parts]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *parts)
    expected = np.stack([np.ones((8, 6)), 2 * np.ones((8, 6))])
    np.testing.assert_array_equal(dequantize(stacked), expected)
    np.testing.assert_array_equal(jax.vmap(dequantize)(stacked), expected)


@pytest.mark.parametrize("decode", [dequantize, jax.jit(dequantize), jnp.sin])
def test_parts_of_which_one_was_sliced_are_refused_not_decoded_wrong(decode):
    q = quantize(jnp.ones((8, 6)), Grid(8, axis=1, group_size=4))
    short = dataclasses.replace(q, qvalue=q.qvalue[:4])
    with pytest.raises(ValueError, match=r"shape \(4, 6\) .* of shape \(1, 6\), got \(2, 6\)"):
        decode(short)


# --- Dtypes of codes -------------------------------------------------------------------


@pytest.mark.parametrize("bits", quick_first([1, 4, "ternary", 2, 3], 2))
def test_four_bit_integers_hold_the_codes_of_up_to_four_bits(bits):
    q = encode(jnp.asarray([0.5, -1.0, 0.1, 1.0]), bits)
    narrow = q.with_code_dtype(jnp.int4)
    narrow.validate()
    assert narrow.qvalue.dtype == jnp.int4
    assert np.array_equal(jax.jit(dequantize)(narrow), dequantize(q))
    assert narrow.with_code_dtype(jnp.int8).qvalue.dtype == jnp.int8


def test_codes_that_do_not_fit_are_refused():
    q = encode(jnp.ones(3), 5)
    with pytest.raises(ValueError, match="int4 does not hold the codes of bits=5"):
        q.with_code_dtype(jnp.int4)
    with pytest.raises(TypeError, match="dtype must be one of"):
        q.with_code_dtype(jnp.int16)


def test_two_bit_integers_need_a_jax_that_computes_with_them(monkeypatch):
    q = encode(jnp.asarray([0.5, -1.0, 0.1, 1.0]), 2)
    monkeypatch.setattr(jax, "__version_info__", (0, 7, 2))
    with pytest.raises(ValueError, match=r"int2 needs jax 0\.10"):
        q.with_code_dtype("int2")
    monkeypatch.undo()
    if jax.__version_info__ >= (0, 10):
        narrow = q.with_code_dtype(jnp.int2)
        assert np.array_equal(jax.jit(dequantize)(narrow), dequantize(q))


# --- Validation ------------------------------------------------------------------------


def good() -> QuantizedArray:
    w = jnp.asarray(np.linspace(-1, 2, 12).reshape(3, 4), jnp.float32)
    return encode(w, Grid(4, axis=0, zero_point=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qvalue": jnp.zeros((3, 4), jnp.int32)}, "codes of a dtype"),
        ({"qvalue": jnp.full((3, 4), 8, jnp.int8)}, "codes are not in the range"),
        ({"scale": jnp.ones((3, 1), jnp.float16)}, "scale of dtype float32"),
        ({"scale": jnp.ones((1, 4), jnp.float32)}, r"scale .*\(3, 1\), got .*\(1, 4\)"),
        ({"scale": jnp.zeros((3, 1), jnp.float32)}, "finite and not 0"),
        ({"scale": jnp.full((3, 1), jnp.nan, jnp.float32)}, "finite and not 0"),
        ({"scale": -jnp.ones((3, 1), jnp.float32)}, "scales must be positive"),
        ({"zero": jnp.zeros((3, 1), jnp.float32)}, "zero of dtype int8"),
        ({"zero": jnp.zeros((3, 4), jnp.int8)}, r"zero .*\(3, 1\)"),
        ({"zero": jnp.full((3, 1), 8, jnp.int8)}, r"zeros in \[-8, 7\]"),
        ({"grid": Grid(1, axis=0)}, "a zero if and only if it has a zero point"),
        ({"grid": Grid(None, axis=0, zero_point=True)}, "a grid with bits"),
        (
            {"grid": Grid(4, axis=0, zero_point=True, scale_dtype="bfloat16")},
            "scale of dtype bfloat16",
        ),
        ({"zero": None}, "a zero if and only if"),
        ({"grid": Grid(4, axis=5, zero_point=True)}, "axis must be in"),
    ],
)
def test_each_part_that_does_not_fit_is_named(change, message):
    good().validate("w")
    with pytest.raises(ValueError, match=f"'w'.*{message}"):
        dataclasses.replace(good(), **change).validate("w")


def test_what_stands_for_no_float_is_refused():
    with pytest.raises(TypeError, match="'w' must stand for a float"):
        dataclasses.replace(good(), dtype=jnp.int32).validate("w")


@pytest.mark.parametrize("bits", [1, "ternary", 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16", "log8"])
@pytest.mark.parametrize("zero_point", [False, True])
def test_num_bytes_is_what_a_file_holds_of_the_array(bits, scale_dtype, zero_point):
    if bits == 1 and zero_point:
        return
    grid = Grid(bits, axis=0, group_size=7, scale_dtype=scale_dtype, zero_point=zero_point)
    shapes = jax.eval_shape(lambda: quantize(jnp.ones((6, 35)), grid, threshold=max_abs))
    q = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
    assert q.num_bytes == plan_file(q).data_bytes


@pytest.mark.thorough
@pytest.mark.parametrize("bad", ["x", jnp.int32], ids=["name", "integer"])
def test_only_a_floating_dtype_is_decoded_to(bad):
    with pytest.raises(ValueError):  # noqa: PT011, jax's own words
        dequantize(encode(jnp.ones(3), 4), bad)
