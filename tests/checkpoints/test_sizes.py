"""Reports of trees, leaf by leaf: against hand-worked numbers and float64 NumPy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxclip
from jaxclip import QuantizedArray, compress, decompress, size_report


def make_params():
    rng = np.random.default_rng(0)
    return {
        "dense": {
            "kernel": jnp.asarray(rng.normal(size=(6, 5)).astype(np.float32)),
            "bias": jnp.asarray(rng.normal(size=5).astype(np.float32)),
        },
        "half": jnp.asarray(rng.normal(size=(4, 5)), jnp.bfloat16),
        "steps": np.arange(3, dtype=np.int32),
    }


def make_small():
    return compress(make_params(), 4, rule=0.8)


def report_by_path(*args, **options):
    report = size_report(*args, **options)
    return report, {leaf.path: leaf for leaf in report.leaves}


@pytest.mark.thorough
def test_leaves_have_the_dtype_of_the_array_and_their_largest_threshold():
    small = make_small()
    report, leaves = report_by_path(small)
    assert {p: leaf.dtype for p, leaf in leaves.items()} == {
        "dense/bias": "float32",
        "dense/kernel": "float32",
        "half": "bfloat16",
        "steps": "int32",
    }
    wide = dataclasses.replace(small["dense"]["kernel"], scale=jnp.float32([[1, -3, 2, 1, 1]]))
    assert leaves["half"].threshold == pytest.approx(0.8, rel=1e-6)
    assert leaves["dense/bias"].threshold is None
    assert size_report([wide]).leaves[0].threshold == 21.0  # 3 * 7
    assert report.relative_error is None
    assert {leaf.relative_error for leaf in leaves.values()} == {None}
    assert {leaf.clip_rate for leaf in leaves.values()} == {None}


def test_error_and_clip_rate_are_those_of_float64():
    params, small = make_params(), make_small()
    report, leaves = report_by_path(small, original=params)
    lost = energy = clipped = 0
    for path, w, q in (
        ("dense/kernel", params["dense"]["kernel"], small["dense"]["kernel"]),
        ("half", params["half"], small["half"]),
    ):
        w, back = (np.asarray(x).astype(np.float64) for x in (w, jaxclip.dequantize(q)))
        scale = np.asarray(q.scale, np.float64)
        ends = np.sort([-8 * scale, 7 * scale], axis=0)
        outside = int(np.sum((w < ends[0]) | (w > ends[1])))
        assert leaves[path].relative_error == pytest.approx(np.sum((w - back) ** 2) / np.sum(w**2))
        assert leaves[path].clip_rate == outside / w.size
        lost, energy = lost + np.sum((w - back) ** 2), energy + np.sum(w**2)
        clipped += outside
    bias = np.asarray(params["dense"]["bias"], np.float64)
    assert clipped > 0
    assert report.clip_rate == pytest.approx(clipped / 50)
    assert report.relative_error == pytest.approx(lost / (energy + np.sum(bias**2)))
    assert leaves["dense/bias"].relative_error == 0.0
    assert leaves["dense/bias"].clip_rate is None
    assert leaves["steps"].relative_error is None


def test_an_original_changes_no_size():
    plain, compared = size_report(make_small()), size_report(make_small(), original=make_params())
    assert compared.total_bytes == plain.total_bytes
    unmeasured = [
        dataclasses.replace(x, relative_error=None, clip_rate=None) for x in compared.leaves
    ]
    assert unmeasured == list(plain.leaves)


def test_decompressed_weights_have_the_same_error_and_nothing_is_clipped_that_has_no_grid():
    small = make_small()
    report = size_report(decompress(small), original=make_params())
    assert report.relative_error == size_report(small, original=make_params()).relative_error
    assert report.clip_rate is None


def test_untouched_leaves_lost_nothing_even_if_they_are_not_finite():
    params = {"w": jnp.array([np.nan, np.inf]), "z": np.zeros(3, np.float32)}
    _, leaves = report_by_path(params, original=params)
    assert [leaf.relative_error for leaf in leaves.values()] == [0.0, 0.0]
    made = {**params, "z": np.ones(3, np.float32)}
    assert report_by_path(made, original=params)[1]["z"].relative_error == math.inf


def test_low_bit_leaves_can_be_the_original():
    small = make_small()
    assert size_report(small, original=small).relative_error == 0.0


def test_shapes_for_arrays_give_sizes_alone():
    abstract = jax.eval_shape(lambda p: compress(p, 4, rule=0.8), make_params())
    report, leaves = report_by_path(abstract)
    assert report.total_bytes == size_report(make_small()).total_bytes
    assert {leaf.threshold for leaf in leaves.values()} == {None}
    assert leaves["dense/kernel"].bits == 4
    with pytest.raises(TypeError, match="has no values"):
        size_report(abstract, original=make_params())


def test_a_report_is_made_under_jit_without_thresholds():
    sizes = []

    def f(params):
        report = size_report(compress(params, 4, rule=0.8))
        sizes.append((report.total_bytes, report.leaves[1].threshold))
        return params

    jax.jit(f)(make_params())
    assert sizes == [(size_report(make_small()).total_bytes, None)]
    small = make_small()
    jax.eval_shape(lambda: sizes.append(size_report(small)))  # concrete arrays keep theirs
    assert sizes[1] == size_report(small)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": jnp.ones(2)}, r"same leaves.*extra"),
        ({"half": jnp.ones((5, 4), jnp.bfloat16)}, r"'half' must have shape \(4, 5\)"),
    ],
)
def test_an_original_of_another_structure_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        size_report(make_small(), original={**make_params(), **change})


def test_rows_are_plain_dicts_of_all_that_is_known():
    report = size_report(make_small(), original=make_params())
    rows = report.rows()
    assert [type(row) for row in rows] == [dict] * 4
    assert rows[1] == {
        "path": "dense/kernel",
        "shape": (6, 5),
        "dtype": "float32",
        "bits": 4,
        "raw_bytes": 120,
        "stored_bytes": 15 + 4 * 5,
        "threshold": report.leaves[1].threshold,
        "relative_error": report.leaves[1].relative_error,
        "clip_rate": report.leaves[1].clip_rate,
        "axes": (1,),
        "coded_bits": None,
        "density": np.mean(np.asarray(make_small()["dense"]["kernel"].qvalue) != 0),
    }


def test_bits_per_weight_counts_codes_and_scales_of_low_bit_leaves():
    report = size_report(make_small())
    assert report.bits_per_weight == 8 * (15 + 20 + 10 + 20) / 50
    assert size_report(make_params()).bits_per_weight is None


def test_the_printed_table_shows_what_is_known_and_lines_up():
    small = make_small()
    assert isinstance(small["half"], QuantizedArray)
    texts = [str(size_report(x)) for x in (make_params(), small)]
    texts.append(str(size_report(small, original=make_params())))
    titles = [text.splitlines()[0].split() for text in texts]
    sizes = ["leaf", "shape", "dtype", "bits", "raw", "stored"]
    assert titles[0] == sizes
    sizes.insert(4, "axis")
    sizes.append("density")
    assert titles[1:] == [[*sizes, "threshold"], [*sizes, "threshold", "error", "clipped"]]
    lines = texts[2].splitlines()
    assert len(lines) == 1 + 4 + 2
    assert lines[2].split()[:7] == ["dense/kernel", "6x5", "float32", "4", "1", "120", "35"]
    end = lines[0].index("stored") + len("stored")
    assert all(line[end - 1].isdigit() for line in lines[1:])
    assert lines[2].endswith("%")
    assert lines[-1].endswith("x larger)")


def test_entropy_coded_leaves_show_their_bits_on_disk(tmp_path):
    codes = np.zeros((64, 64), np.int8)
    codes[0] = 1
    q = QuantizedArray(codes, np.ones((64, 1), np.float32), jaxclip.Grid(8, axis=0), jnp.float32)
    path = tmp_path / "x.safetensors"
    jaxclip.checkpoints.save(path, {"w": q}, coding="huffman")
    for report in (size_report({"w": q}, "huffman"), jaxclip.checkpoints.inspect(path)):
        (leaf,) = report.leaves
        assert leaf.coded_bits == 8 * leaf.stored_bytes / 64**2 < 3
        assert f"8, coded {leaf.coded_bits:.2f}" in str(report)
    (leaf,) = size_report({"w": q}).leaves
    assert (leaf.bits, leaf.coded_bits) == (8, None)


def test_the_density_is_that_of_the_weights_with_any_grid():
    rng = np.random.default_rng(0)
    w = np.where(rng.random((40, 30)) < 0.25, rng.normal(size=(40, 30)), 0).astype(np.float32)
    for grid in ("ternary", 1, 4, jaxclip.Grid(4, zero_point=True), jaxclip.Grid(2, group_size=8)):
        q = jaxclip.quantize(jnp.asarray(w), grid)
        for leaf in (q, q.packed(), decompress(q)):
            found = size_report({"w": leaf}).leaves[0].density
            assert found == np.mean(np.asarray(decompress(leaf)) != 0)
    report = size_report({"w": w, "b": np.ones(3), "n": np.arange(3), "e": np.zeros((0, 2))})
    densities = {leaf.path: leaf.density for leaf in report.leaves}
    assert densities == {"w": np.mean(w != 0), "b": 1.0, "n": None, "e": None}
    assert [line.count("%") for line in str(report).splitlines()] == [0, 0, 0, 0, 1, 0, 0]


def test_a_file_that_is_larger_than_its_arrays_is_said_to_be_larger():
    report = size_report({"w": np.zeros(3, np.float32)})
    assert report.total_bytes > report.raw_bytes
    assert f"({report.total_bytes / 12:.3g}x larger)" in str(report)
    assert "bytes larger)" in str(size_report({}))
    assert "(4.0x smaller)" in str(jaxclip.checkpoints.SizeReport((), 0, 100, 400))
