"""GGUF files, read by the gguf package."""

import errno
import os
import pathlib
import resource
import signal
import sys
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxclip
from jaxclip import interop
from oracles.exported_trees import (
    drawn,
    quantized,
    random_weights,
)


@pytest.fixture
def gguf() -> Any:
    return pytest.importorskip("gguf", reason="the gguf package is in the extra gguf")


def read_gguf(gguf: Any, path: pathlib.Path) -> dict[str, tuple[str, np.ndarray]]:
    """GGUF's type and the values of each tensor, by the gguf package alone."""
    tensors = {}
    for tensor in gguf.GGUFReader(path).tensors:
        is_plain = tensor.tensor_type.name[0] in "FI"
        values = tensor.data if is_plain else gguf.dequantize(tensor.data, tensor.tensor_type)
        shape = tuple(int(n) for n in reversed(tensor.shape))
        tensors[tensor.name] = (tensor.tensor_type.name, np.array(values).reshape(shape))
    return tensors


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_the_gguf_package_reads_every_leaf(tmp_path, gguf, kind):
    path = tmp_path / "net.gguf"
    w = random_weights(6, 64)
    tree = {
        "blk": [{"w": jnp.asarray(w), "stack": w.reshape(2, 3, 64), "b": w[0]}],
        "odd": w[:, :33],
        "half": w[:, :5].astype(np.float16),
        "brain": w[:, :64].astype(ml_dtypes.bfloat16),
        "ids": np.arange(5, dtype=np.int32),
        "scalar": np.float32(2.5),
    }
    interop.to_gguf(path, tree, "llama", kind=kind)
    read = read_gguf(gguf, path)
    types = {name: type_name for name, (type_name, _) in read.items()}
    assert types == {
        "blk.0.w": kind,
        "blk.0.stack": kind,
        "blk.0.b": "F32",
        "odd": "F32",
        "half": "F16",
        "brain": kind,
        "ids": "I32",
        "scalar": "F32",
    }
    for name, exact in [("blk.0.b", w[0]), ("odd", w[:, :33]), ("ids", tree["ids"])]:
        assert np.array_equal(read[name][1], exact)
    assert np.array_equal(read["half"][1], tree["half"])
    assert read["scalar"][1].tolist() == [2.5]
    step = np.abs(w).max() / (127 if kind == "Q8_0" else 7)
    assert np.abs(read["blk.0.w"][1] - w).max() <= step
    assert np.array_equal(read["blk.0.stack"][1].reshape(6, 64), read["blk.0.w"][1])


@pytest.mark.parametrize(
    ("bits", "group_size", "axis", "type_name"),
    [
        (4, 32, 0, "Q4_0"),
        (4, None, 0, "Q4_0"),
        (4, None, None, "Q4_0"),
        (4, 64, 0, "Q4_0"),
        ("ternary", None, 0, "Q4_0"),
        (1, 32, 0, "Q4_0"),
        (5, 32, 0, "Q8_0"),
        (8, 32, None, "Q8_0"),
    ],
)
def test_low_bit_leaves_keep_their_codes(tmp_path, gguf, bits, group_size, axis, type_name):
    path = tmp_path / "net.gguf"
    q = drawn(bits, (3, 128), group_size, axis)
    interop.to_gguf(path, {"w": q}, "llama", kind=None)
    read_type, values = read_gguf(gguf, path)["w"]
    assert read_type == type_name
    halved = np.asarray(q.scale).astype(np.float16).astype(np.float64)
    blocks = np.broadcast_to(np.repeat(halved, 128 // halved.shape[1], 1), (3, 128))
    assert np.array_equal(values, blocks * np.asarray(q.qvalue))


@pytest.mark.thorough
@pytest.mark.parametrize("bits", [2, 4])
def test_low_bit_leaves_with_zero_points_keep_their_codes_as_q4_1(tmp_path, gguf, bits):
    path = tmp_path / "net.gguf"
    w = random_weights(3, 64) + 0.5
    q = jaxclip.quantize(w, jaxclip.Grid(bits, axis=0, group_size=32, zero_point=True))
    interop.to_gguf(path, {"w": q}, "llama")
    read_type, values = read_gguf(gguf, path)["w"]
    assert read_type == "Q4_1"
    expected = np.asarray(jaxclip.dequantize(q)).astype(np.float64)
    # The scale and the offset, up to 15 scales, are rounded to float16.
    step = np.repeat(np.asarray(q.scale), 32, 1)
    assert np.all(np.abs(values - expected) <= 2.0**-11 * (np.abs(expected) + 32 * step))
    assert np.abs(values - expected).max() > 0


def test_without_a_kind_floating_leaves_stay_as_they_are(tmp_path, gguf):
    path = tmp_path / "net.gguf"
    w = random_weights(4, 32)
    interop.to_gguf(path, {"w": w, "h": w.astype(np.float16), "d": w.astype(float)}, "x", kind=None)
    read = read_gguf(gguf, path)
    assert {name: t for name, (t, _) in read.items()} == {"w": "F32", "h": "F16", "d": "F64"}
    assert np.array_equal(read["w"][1], w)


@pytest.mark.thorough
def test_metadata_is_read_back(tmp_path, gguf):
    path = tmp_path / "net.gguf"
    metadata = {
        "llama.block_count": 12,
        "x.negative": -5,
        "x.eps": 0.25,
        "x.flag": True,
        "general.name": "a name",
        "tokenizer.ggml.tokens": ["a", "bc"],
        "x.sizes": (1, 2, 3),
    }
    interop.to_gguf(path, {"w": random_weights(2, 32)}, "llama", metadata=metadata)
    fields = gguf.GGUFReader(path).fields

    def value(key: str) -> Any:
        field = fields[key]
        parts = [field.parts[i] for i in field.data]
        if field.types[-1] == gguf.GGUFValueType.STRING:
            texts = [bytes(part).decode() for part in parts]
            return texts if len(field.types) > 1 else texts[0]
        numbers = [part.tolist()[0] for part in parts]
        return numbers if len(field.types) > 1 else numbers[0]

    assert value("general.architecture") == "llama"
    assert value("general.quantization_version") == 2
    assert {key: value(key) for key in metadata} == {**metadata, "x.sizes": [1, 2, 3]}
    assert fields["llama.block_count"].types == [gguf.GGUFValueType.UINT32]
    assert fields["x.flag"].types == [gguf.GGUFValueType.BOOL]


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        ({"w": np.full((1, 32), np.nan)}, ValueError, "'w': a weight is NaN or infinite"),
        ({"w": np.full((1, 32), 1e9)}, ValueError, "'w': a scale of .* too large for float16"),
        ({"w" * 64: np.zeros(1)}, ValueError, "a name of 64 bytes, but GGUF allows 63.*`rename`"),
        ({"w": np.zeros(3, np.uint64)}, TypeError, "'w' has dtype uint64, which GGUF lacks"),
        ({"w": np.zeros(3, complex)}, TypeError, "'w' has dtype complex128, which GGUF lacks"),
        ({"w": quantized(np.full((1, 32), 9), [[1]], 4)}, ValueError, "codes are not in the range"),
        ({"w": drawn(4, (1, 32)), "x": {"y": 0.5}}, TypeError, "'x.y' is the Python number"),
    ],
)
def test_what_gguf_lacks_is_refused_by_name(tmp_path, gguf, tree, error, message):
    with pytest.raises(error, match=message):
        interop.to_gguf(tmp_path / "net.gguf", tree, "llama")
    assert list(tmp_path.iterdir()) == []


def lacking_tree() -> dict[str, Any]:
    """A matrix with codes that GGUF has, and low-bit leaves that it lacks."""
    return {
        "fc": drawn(4, (3, 64), 32),
        "conv": quantized(np.ones((4, 2, 3, 3)), np.ones((4, 1, 1, 1)), 4),
        "scalar": quantized(np.ones(()), np.ones(()), 8, axis=None),
        "flax": drawn(4, (2, 64), axis=1),
        "narrow": drawn(4, (2, 64), 16),
        "zeros": quantized(np.ones((1, 32)), [[1]], 8, zero=[[1]]),
        "left_alone": random_weights(4, 64),
    }


@pytest.mark.thorough
def test_low_bit_leaves_that_gguf_lacks_are_written_as_floats_and_counted(tmp_path, gguf):
    tree = lacking_tree()
    with pytest.warns(UserWarning, match="5 low-bit leaves are written as floats") as warned:
        counts = interop.to_gguf(tmp_path / "net.gguf", tree, "llama")
    assert counts == {"F32": 6, "Q4_0": 1}
    read = read_gguf(gguf, tmp_path / "net.gguf")
    assert {name: t for name, (t, _) in read.items()} == {
        name: "Q4_0" if name == "fc" else "F32" for name in tree
    }
    for name, leaf in tree.items():
        if name != "fc":
            assert np.array_equal(read[name][1], np.reshape(leaf, read[name][1].shape)), name
    reasons = {
        "conv": "'conv' must have rows of a multiple of 32, got 3",
        "flax": "'flax' must have the same scale for each 32 entries",
        "zeros": "'zeros' has zero points, which GGUF has only up to 4 bits",
    }
    assert all(reason in str(warned[0].message) for reason in reasons.values())


def test_moments_of_an_optimizer_are_not_quantized_by_an_export(tmp_path, gguf):
    tree = {"fc": random_weights(4, 64), "exp_avg": {"fc": random_weights(4, 64)}}
    counts = interop.to_gguf(tmp_path / "net.gguf", tree, "llama", kind="Q8_0")
    assert counts == {"F32": 1, "Q8_0": 1}


def test_what_a_policy_left_alone_is_not_quantized_by_an_export(tmp_path, gguf):
    tree = {"fc": drawn(4, (3, 64), 32), "embed": random_weights(4, 64)}
    jaxclip.checkpoints.save(tmp_path / "net.safetensors", tree)
    for to in ("Q4_0", "Q8_0", "gguf"):
        path = tmp_path / f"{to}.gguf"
        counts = interop.export_checkpoint(tmp_path / "net.safetensors", path, to)
        assert counts == {"F32": 1, "Q4_0": 1}
        assert np.array_equal(read_gguf(gguf, path)["embed"][1], tree["embed"])


@pytest.mark.thorough
def test_groups_over_all_inputs_of_a_convolution_keep_their_codes_where_rows_have_blocks(
    tmp_path, gguf
):
    w = random_weights(4, 3, 2, 32)
    grid = jaxclip.Grid(4, axis=0, group_size=64, scale_dtype="float16")
    q = jaxclip.quantize(w, grid, threshold=jaxclip.max_abs)
    assert q.scale.shape == (4, 1, 1, 3)
    interop.to_gguf(tmp_path / "net.gguf", {"w": q}, "llama")
    type_name, values = read_gguf(gguf, tmp_path / "net.gguf")["w"]
    assert type_name == "Q4_0"
    assert np.array_equal(values, jaxclip.dequantize(q))


def test_integers_and_dimensions_that_gguf_lacks_are_written_wider_and_as_one(tmp_path, gguf):
    tree = {
        "mask": np.array([True, False]),
        "bytes": np.array([255], np.uint8),
        "volume": np.arange(64.0).reshape(2, 2, 4, 2, 2),
    }
    counts = interop.to_gguf(tmp_path / "net.gguf", tree, "llama")
    assert counts == {"F64": 1, "I16": 1, "I8": 1}
    read = read_gguf(gguf, tmp_path / "net.gguf")
    assert read["mask"][1].tolist() == [1, 0]
    assert read["bytes"][1].tolist() == [255]
    assert np.array_equal(read["volume"][1], tree["volume"].reshape(4, 4, 2, 2))


def test_a_block_of_zeros_has_any_scale(tmp_path, gguf):
    w = np.concatenate([np.zeros((1, 32)), random_weights(1, 32)]).astype(np.float32)
    q = jaxclip.quantize(w, jaxclip.Grid(4, axis=0), threshold=jaxclip.max_abs)
    assert abs(q.scale[0, 0]) < 1e-30  # 0 in float16
    interop.to_gguf(tmp_path / "net.gguf", {"w": q}, "llama")
    assert np.array_equal(read_gguf(gguf, tmp_path / "net.gguf")["w"][1][0], np.zeros(32))


def test_a_block_of_zeros_has_a_finite_scale(tmp_path, gguf):
    codes = np.repeat([[0], [1]], 32, axis=1)
    q = quantized(codes, [[1e9], [2.0]], 4)
    assert interop.to_gguf(tmp_path / "net.gguf", {"w": q}, "llama") == {"Q4_0": 1}
    assert np.array_equal(read_gguf(gguf, tmp_path / "net.gguf")["w"][1], 2.0 * codes)


@pytest.mark.parametrize(
    ("scale", "zero", "reason"),
    [
        (1e-9, None, "'lost' has a scale of 1e-09, which is 0 in float16"),
        (1e9, None, r"'lost' has a scale of 1e\+09, which is too large in float16"),
        (1e-9, [[1], [2]], "'lost' has a scale of 1e-09, which is 0 in float16"),
        (60_000.0, [[1], [2]], r"'lost' has an offset of -6e\+05, which is too large in float16"),
    ],
)
def test_leaves_whose_scales_float16_lacks_are_written_as_floats_and_counted(
    tmp_path, gguf, scale, zero, reason
):
    lost = quantized(drawn(4, (2, 64)).qvalue, [[1.0], [scale]], 4, zero=zero)
    tree = {"fits": drawn(4, (2, 64)), "lost": lost}
    path, small = tmp_path / "net.gguf", tmp_path / "small.safetensors"
    jaxclip.checkpoints.save(small, tree)
    with pytest.warns(UserWarning, match=f"1 low-bit leaf is written as floats, .*{reason}"):
        counts = interop.export_checkpoint(small, path, "gguf")
    assert counts == {"F32": 1, "Q4_0": 1}
    assert np.array_equal(read_gguf(gguf, path)["lost"][1], jaxclip.dequantize(lost))


@pytest.mark.parametrize("kind", ["Q5_0", "q4_0", 4, True])
def test_other_kinds_are_refused(tmp_path, gguf, kind):
    with pytest.raises(ValueError, match="kind must be one of"):
        interop.to_gguf(tmp_path / "net.gguf", {}, "llama", kind=kind)


def test_metadata_of_another_type_is_refused(tmp_path, gguf):
    with pytest.raises(TypeError, match=r"metadata has \{\} under 'a\.b'"):
        interop.to_gguf(tmp_path / "net.gguf", {}, "llama", metadata={"a.b": {}})
    assert list(tmp_path.iterdir()) == []


def test_a_missing_gguf_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"jaxclip\[gguf\]"):
        interop.to_gguf(tmp_path / "net.gguf", {}, "llama")


@pytest.mark.thorough
def test_a_full_disk_is_reported_as_such(tmp_path, gguf):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(OSError, match="large") as caught:
            interop.to_gguf(tmp_path / "x.gguf", {"w": np.zeros((512, 1024), np.float32)}, "llama")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG  # the limit stands for the end of a disk
    assert os.listdir(tmp_path) == []
