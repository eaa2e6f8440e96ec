"""GGUF files read into trees: the gguf package's numbers, and codes that stay codes."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxclip
from jaxclip import Grid, interop
from jaxclip.checkpoints import CheckpointError
from oracles.exported_trees import random_weights

gguf = pytest.importorskip("gguf", reason="the gguf package is in the extra gguf")


def written(path, tensors):
    """Writes (data, type name) by name with the gguf package alone."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def blocks(kind, shape, seed=0):
    """Blocks of random bytes with finite scales, which not every encoder would make."""
    size, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    try:
        return gguf.quants.quantize(x, gguf.GGMLQuantizationType[kind])
    except NotImplementedError:  # a type that the package only reads
        return np.zeros((*shape[:-1], shape[-1] // size * num_bytes), np.uint8)


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0", "TQ1_0", "TQ2_0"])
@pytest.mark.parametrize("shape", [(3, 512), (2, 3, 256), (256,)])
def test_blocks_on_a_grid_keep_their_codes(tmp_path, kind, shape):
    path = tmp_path / "net.gguf"
    data = blocks(kind, shape)
    written(path, {"blk.0.w": (data, kind)})
    leaf = interop.from_gguf(path)["blk.0.w"]
    leaf.validate("blk.0.w")
    assert leaf.shape == shape
    theirs = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(jaxclip.dequantize(leaf), theirs.reshape(shape))


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_1", "Q4_K", "Q6_K", "IQ4_NL"])
def test_other_blocks_become_what_the_gguf_package_reads(tmp_path, kind):
    path = tmp_path / "net.gguf"
    data = blocks(kind, (3, 512))
    written(path, {"w": (data, kind)})
    leaf = interop.from_gguf(path)["w"]
    assert leaf.dtype == np.float32
    assert np.array_equal(leaf, gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]))


def test_plain_tensors_keep_their_dtypes(tmp_path):
    path = tmp_path / "net.gguf"
    w = random_weights(4, 8)
    brain = w.astype(ml_dtypes.bfloat16)
    plain = {"f4": w, "f2": w.astype(np.float16), "f8": w.astype(float)}
    plain |= {f"i{n}": np.arange(5, dtype=f"int{n}") for n in (8, 16, 32, 64)}
    tensors = {k: (x, f"{x.dtype.kind.upper()}{8 * x.dtype.itemsize}") for k, x in plain.items()}
    written(path, tensors | {"brain": (brain.view(np.uint8), "BF16")})
    found = interop.from_gguf(path)
    assert set(found) == {*plain, "brain"}
    for name, expected in [*plain.items(), ("brain", brain)]:
        assert found[name].dtype == expected.dtype
        assert np.array_equal(found[name], expected)


@pytest.mark.parametrize(
    ("grid", "kind"),
    [
        (Grid(4, axis=0, group_size=32), "Q4_0"),
        (Grid(8, axis=0, group_size=32), "Q8_0"),
        (Grid("ternary", axis=0), "TQ2_0"),
        (Grid(1, axis=0, group_size=256), "TQ1_0"),
        (Grid("ternary", axis=0, group_size=128), "Q4_0"),
    ],
    ids=str,
)
def test_codes_survive_the_way_there_and_back(tmp_path, grid, kind):
    tree = {
        "w": jaxclip.quantize(jnp.asarray(random_weights(6, 512)), grid, threshold=jaxclip.max_abs)
    }
    path = tmp_path / "net.gguf"
    given = "TQ1_0" if kind == "TQ1_0" else None
    assert interop.to_gguf(path, tree, "llama", kind=given) == {kind: 1}
    read = interop.from_gguf(path)
    assert np.array_equal(read["w"].qvalue, tree["w"].qvalue)
    assert interop.to_gguf(tmp_path / "again.gguf", read, "llama", kind=given) == {kind: 1}
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()


def test_blocks_with_a_scale_of_zero_are_zeros(tmp_path):
    data = blocks("Q4_0", (2, 64))
    data[0, :2] = 0
    written(tmp_path / "net.gguf", {"w": (data, "Q4_0")})
    leaf = interop.from_gguf(tmp_path / "net.gguf")["w"]
    leaf.validate()
    assert np.array_equal(
        jaxclip.dequantize(leaf), gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q4_0)
    )


def test_a_scale_that_is_not_finite_is_refused_by_name_and_type(tmp_path):
    data = blocks("Q8_0", (2, 64))
    data[1, :2] = np.float16(np.inf).reshape(1).view(np.uint8)
    written(tmp_path / "net.gguf", {"blk.w": (data, "Q8_0")})
    with pytest.raises(CheckpointError, match=r"'blk.w' of type Q8_0 has a scale"):
        interop.from_gguf(tmp_path / "net.gguf")


def test_codes_that_ternary_blocks_lack_are_refused_by_name(tmp_path):
    data = blocks("TQ2_0", (2, 256))
    data[1, 5] = 0xFF
    written(tmp_path / "net.gguf", {"blk.w": (data, "TQ2_0")})
    with pytest.raises(CheckpointError, match=r"'blk.w' of type TQ2_0 has codes outside of -1..1"):
        interop.from_gguf(tmp_path / "net.gguf")


def test_a_type_that_the_package_cannot_decode_is_refused_by_name_and_type(tmp_path):
    written(tmp_path / "net.gguf", {"blk.w": (np.zeros((2, 292), np.uint8), "Q8_K")})
    with pytest.raises(CheckpointError, match=r"'blk.w' of type Q8_K cannot be decoded"):
        interop.from_gguf(tmp_path / "net.gguf")


@pytest.mark.parametrize("cut", [3, 40, -30])
def test_damaged_files_are_refused(tmp_path, cut):
    path = tmp_path / "net.gguf"
    written(path, {"w": (blocks("Q4_0", (2, 64)), "Q4_0")})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="cannot be read as GGUF"):
        interop.from_gguf(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.gguf"):
        interop.from_gguf(tmp_path / "nothing.gguf")
