"""Products with low-bit matrices: those of the decoded matrix, a tile at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxclip
from jaxclip import Grid, QuantizedArray, dequantize, max_abs, quantize
from jaxclip.lowbit import matmul, products
from oracles.quick import quick_first

GRIDS = [
    Grid(2, group_size=8),
    Grid("ternary", axis=0, scale_dtype="log8"),
    Grid(4, group_size=8, zero_point=True),
    Grid(1),
    Grid(3, axis=None),
    Grid(5, axis=(0, 1)),
    Grid(8, axis=0),  # a step an input
    Grid(2, group_size=32),  # longer than a tile
    Grid(4, axis=0, group_size=5),
    Grid(4, group_size=7, scale_dtype="bfloat16"),
    Grid(6, group_size=100, levels="narrow"),
    Grid(8, group_size=8, zero_point=True, scale_dtype="float16"),
]


@pytest.fixture(autouse=True)
def tiles_of_small_matrices(monkeypatch):
    monkeypatch.setattr(products, "_TILE_ENTRIES", 64)
    monkeypatch.setattr(products, "_FEWEST_ROWS", 8)


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def low_bit(shape: tuple[int, ...], grid: Grid, dtype=jnp.float32) -> QuantizedArray:
    return quantize(draw(*shape).astype(dtype), grid, threshold=max_abs)


def decoded(q: QuantizedArray) -> np.ndarray:
    """The matrix in float64, by the class's equation."""
    expand = lambda part: np.asarray(q.grid.expand(jnp.asarray(part), q.shape), np.float64)  # noqa: E731
    zero = 0 if q.zero is None else expand(q.zero)
    return expand(q.scale) * (np.asarray(q.unpacked().qvalue, np.float64) - zero)


def assert_close(found, expected, rtol=1e-5):
    largest = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(found, np.float64) / largest, expected / largest, 0, rtol)


# --- The product ------------------------------------------------------------------------


@pytest.mark.parametrize("grid", quick_first(GRIDS, 3), ids=str)
@pytest.mark.parametrize("shape", [(44, 12), pytest.param((9, 80), marks=pytest.mark.thorough)])
def test_products_are_those_of_the_decoded_matrix(grid, shape):
    q = low_bit(shape, grid)
    x, y = draw(3, shape[0], seed=1), draw(shape[1], 2, seed=2)
    for stored in (q, q.packed()):
        right, left = matmul(x, stored), stored @ y
        assert right.dtype == left.dtype == jnp.float32
        assert_close(right, np.asarray(x, np.float64) @ decoded(q))
        assert_close(left, decoded(q) @ np.asarray(y, np.float64))


@pytest.mark.parametrize(
    ("x_dtype", "q_dtype"),
    quick_first(
        [(jnp.bfloat16, jnp.bfloat16), (jnp.float16, jnp.float16), (jnp.int32, jnp.float32)]
    ),
)
def test_results_have_the_dtype_of_jnp_matmul(x_dtype, q_dtype):
    q = low_bit((44, 12), Grid(4), q_dtype).packed()
    x = (3 * draw(3, 44, seed=1)).astype(x_dtype)
    with jax.numpy_dtype_promotion("standard"):
        found, wanted = matmul(x, q), jnp.matmul(x, dequantize(q))
    assert found.dtype == wanted.dtype
    exact = np.asarray(x, np.float64) @ np.asarray(dequantize(q), np.float64)
    assert_close(found, exact, 2 * float(jnp.finfo(found.dtype).eps) + 1e-6)


@pytest.mark.thorough
def test_sums_are_float32_for_half_precision():
    # 4,096 ones: added up in bfloat16 they would end at 256.
    q = quantize(jnp.ones((4096, 2), jnp.bfloat16), 8, threshold=max_abs)
    x = jnp.ones((1, 4096), jnp.bfloat16)
    assert matmul(x, q).tolist() == [[4096, 4096]]


def test_a_vector_and_leading_axes_are_treated_as_by_jnp_matmul():
    q = low_bit((44, 12), Grid(2)).packed()
    assert_close(matmul(draw(44), q), np.asarray(draw(44)) @ decoded(q))
    assert_close(q @ draw(5, 12, 2), decoded(q) @ np.asarray(draw(5, 12, 2)))
    assert matmul(draw(2, 1, 3, 44), q).shape == (2, 1, 3, 12)
    assert matmul(draw(3, 44), dequantize(q)).shape == (3, 12)  # two arrays


@pytest.mark.parametrize(
    "grid", quick_first([Grid(2, axis=(0, -1)), Grid(4), Grid(4, group_size=8)], 1)
)
@pytest.mark.parametrize(
    ("shape", "is_left"),
    quick_first(
        [((3, 5, 44), False), ((5, 44), False), ((2, 1, 5, 44), False), ((3, 12, 2), True)]
    ),
)
def test_stacks_are_multiplied_matrix_by_matrix(grid, shape, is_left):
    # The groups of the last run through the stack: it is decoded whole.
    q = low_bit((3, 44, 12), grid).packed()
    if is_left:
        assert_close(matmul(q, draw(*shape)), decoded(q) @ np.asarray(draw(*shape), np.float64))
    else:
        assert_close(matmul(draw(*shape), q), np.asarray(draw(*shape), np.float64) @ decoded(q))


def test_shapes_that_do_not_fit_are_named():
    q = low_bit((44, 12), Grid(2))
    with pytest.raises(ValueError, match=r"got shapes \(3, 12\) and \(44, 12\)"):
        matmul(draw(3, 12), q)
    with pytest.raises(ValueError, match=r"got shapes \(44, 12\) and \(44,\)"):
        q @ draw(44)
    with pytest.raises(ValueError, match=r"got shapes \(\) and \(44, 12\)"):
        matmul(jnp.ones(()), q)
    with pytest.raises(
        ValueError, match=r"stacks of equal length, .* got 3 low-bit matrices and 2"
    ):
        matmul(draw(2, 5, 44), low_bit((3, 44, 12), Grid(2, axis=(0, -1))))


# --- jit, vmap, derivatives, shardings --------------------------------------------------


def test_a_batch_of_activations_or_of_matrices_is_multiplied_under_vmap():
    q, xs = low_bit((44, 12), Grid(2, group_size=8)).packed(), draw(2, 3, 44, seed=1)
    assert_close(jax.vmap(matmul, (0, None))(xs, q), np.asarray(xs) @ decoded(q))
    stacked = jax.tree.map(lambda part: jnp.stack([part, part]), q)
    assert_close(jax.vmap(matmul)(xs, stacked), np.asarray(xs) @ decoded(q))


@pytest.mark.parametrize("is_left", quick_first([False, True], 1))
@pytest.mark.parametrize("grid", quick_first([GRIDS[2], GRIDS[6], GRIDS[7]], 1), ids=str)
def test_derivatives_are_those_of_the_decoded_matrix(grid, is_left):
    q = low_bit((44, 12), grid).packed()
    x = draw(12, 3, seed=1) if is_left else draw(3, 44, seed=1)

    def loss_fn(x, scale, decode):
        w = dataclasses.replace(q, scale=scale)
        w = dequantize(w) if decode else w
        return jnp.sum(jnp.sin(matmul(w, x) if is_left else matmul(x, w)))

    found = jax.grad(loss_fn, (0, 1))(x, q.scale, False)
    wanted = jax.grad(loss_fn, (0, 1))(x, q.scale, True)
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, np.asarray(b, np.float64))


@pytest.mark.thorough
def test_forward_and_second_derivatives_exist():
    q = low_bit((44, 12), Grid(2)).packed()
    loss_fn = lambda x, w: jnp.sum(jnp.sin(matmul(x, w)))  # noqa: E731
    found = jax.hessian(loss_fn)(draw(44), q)
    assert_close(found, np.asarray(jax.hessian(loss_fn)(draw(44), dequantize(q)), np.float64))


@pytest.mark.thorough
@pytest.mark.parametrize("is_left", [False, True])
def test_temporary_memory_is_that_of_tiles_also_for_derivatives(monkeypatch, is_left):
    monkeypatch.setattr(products, "_TILE_ENTRIES", 2**14)
    q = low_bit((1024, 512), Grid(2)).packed()
    x = draw(512, 2) if is_left else draw(2, 1024)

    def loss_fn(x, q):
        return jnp.sum(jnp.square(q @ x if is_left else matmul(x, q)))

    for fn in (loss_fn, jax.grad(loss_fn)):
        program = jax.jit(fn).lower(x, q).compile()
        assert program.memory_analysis().temp_size_in_bytes < 0.1 * 4 * q.size


@pytest.mark.parametrize("kind", quick_first([AxisType.Auto, AxisType.Explicit]))
@pytest.mark.parametrize(
    ("of_x", "of_q"),
    quick_first([(P(), P(None, "d")), (P(), P("d")), (P("d"), P()), (P(None, "d"), P("d"))], 2),
)
def test_split_factors_give_the_same_product(kind, of_x, of_q):
    mesh = Mesh(np.array(jax.devices()[:2]), "d", axis_types=(kind,))
    q = low_bit((48, 16), Grid(4)).packed()
    x = draw(4, 48, seed=1)

    def place(array, spec):
        fits = [name if n % 2 == 0 else None for n, name in zip(array.shape, spec, strict=False)]
        return jax.device_put(array, NamedSharding(mesh, P(*fits)))

    split = jax.tree.map(lambda part: place(part, of_q), q)
    if kind == AxisType.Explicit and "d" in of_x and "d" in of_q:
        return  # jnp.matmul refuses an ambiguous sharding too
    found = jax.jit(matmul)(place(x, of_x), split)
    assert_close(found, np.asarray(x, np.float64) @ decoded(q))


# --- Packed codes -----------------------------------------------------------------------


@pytest.mark.parametrize("bits", quick_first([2, "ternary", 1, 3, 4, 5, 6, 8], 2))
@pytest.mark.parametrize(
    "shape", [(9, 4), pytest.param((7,), marks=pytest.mark.thorough), (3, 1, 5), (0, 4), ()]
)
def test_packed_codes_come_back_and_mean_the_same(bits, shape):
    q = low_bit(shape, Grid(bits, axis=None))
    packed = q.packed()
    packed.validate()
    on_host = jax.tree.map(np.asarray, q).packed()
    assert isinstance(on_host.qvalue, np.ndarray)
    np.testing.assert_array_equal(on_host.qvalue, packed.qvalue)
    for stored in (packed, on_host):
        assert (stored.shape, stored.size, stored.dtype) == (q.shape, q.size, q.dtype)
        np.testing.assert_array_equal(stored.unpacked().qvalue, q.qvalue)
        np.testing.assert_array_equal(dequantize(stored), dequantize(q))
    assert packed.packed() is packed
    assert packed.with_code_dtype(jnp.int8).packing is None


def test_packed_codes_are_little_endian_fields_of_a_byte():
    # Rows 0 to 3 of a column share a byte: -2, 1, 0, -1 are 0, 3, 2, 1 above the lowest.
    codes = jnp.asarray([[-2], [1], [0], [-1], [1]], jnp.int8)
    q = dataclasses.replace(low_bit((5, 1), Grid(2)), qvalue=codes).packed()
    assert q.qvalue.tolist() == [[0b01_10_11_00], [0b11]]


@pytest.mark.parametrize(
    ("bits", "width"), [(1, 1), ("ternary", 2), (2, 2), (3, 4), (4, 4), (8, 8)]
)
def test_bytes_in_memory_are_those_of_the_packed_codes(bits, width):
    q = low_bit((64, 16), Grid(bits)).packed()
    assert q.nbytes == 64 * 16 * width // 8 + 4 * 16
    assert q.nbytes == sum(part.nbytes for part in jax.tree.leaves(q))


def test_packed_arrays_pass_through_scan_and_stacks():
    parts = [low_bit((8, 6), Grid(2, group_size=4)).packed() for _ in range(3)]
    stacked = jax.tree.map(lambda *part: jnp.stack(part), *parts)
    assert stacked.shape == (3, 8, 6)
    _, sums = jax.lax.scan(lambda _, q: (None, dequantize(q).sum()), None, stacked)
    np.testing.assert_allclose(sums, [dequantize(q).sum() for q in parts], rtol=1e-5)


def test_files_of_packed_arrays_are_the_same_and_are_loaded_packed(tmp_path):
    tree = {"w": low_bit((10, 6), Grid(2)), "b": np.zeros(6, np.float32)}
    packed = {"w": tree["w"].packed(), "b": tree["b"]}
    jaxclip.checkpoints.save(tmp_path / "a.safetensors", tree, coding="huffman")
    jaxclip.checkpoints.save(tmp_path / "b.safetensors", packed, coding="huffman")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    first = jaxclip.checkpoints.load(tmp_path / "a.safetensors", packed=True)
    second = jaxclip.checkpoints.load(tmp_path / "a.safetensors", like=packed)
    for loaded in (first, second):
        assert jax.tree.structure(loaded) == jax.tree.structure(packed)
        assert loaded["w"].nbytes == packed["w"].nbytes
        np.testing.assert_array_equal(loaded["w"].qvalue, packed["w"].qvalue)
    np.testing.assert_array_equal(jaxclip.decompress(first)["w"], dequantize(tree["w"]))
    reports = [jaxclip.size_report(t, original=jaxclip.decompress(tree)) for t in (tree, first)]
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"qvalue": np.zeros((3, 6), np.int8)},
            "packed codes of dtype uint8 and 3 bytes along axis",
        ),
        ({"qvalue": np.zeros((2, 6), np.uint8)}, "3 bytes along axis -2, got uint8 and 2"),
        ({"qvalue": np.full((3, 6), 255, np.uint8)}, "codes are not in the range"),
    ],
)
def test_packed_codes_that_do_not_fit_are_refused(change, message):
    q = low_bit((10, 6), Grid("ternary")).packed()
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(q, **change).validate("w")
