"""Which leaves of a tree become low-bit, and what the errors name."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxclip
from jaxclip import Grid, QuantizedArray, checkpoints, compress, decompress, interop
from oracles.small_params import make_params, uneven_params

squeeze = functools.partial(compress, rule=jaxclip.max_abs)  # which compiles fast


@pytest.mark.thorough
@pytest.mark.parametrize("bits", [1, 4])
def test_real_floating_leaves_of_two_dimensions_become_low_bit_and_the_others_stay(bits):
    params = make_params()
    small = squeeze(params, bits)
    for name in ("embed/embedding", "dense/kernel", "half/kernel"):
        group, leaf = name.split("/")
        q = small[group][leaf]
        assert isinstance(q, QuantizedArray)
        assert q.bits == bits
        assert q.scale.shape == (1, params[group][leaf].shape[1])  # an output channel each
    assert small["dense"]["bias"] is params["dense"]["bias"]
    for name in ("step", "rotation", "none", "temperature"):
        assert small[name] is params[name]


@pytest.mark.parametrize("bits", [1, "ternary", 4])
def test_decompressing_restores_structure_shapes_and_dtypes_within_half_a_step(bits):
    params = make_params()
    small = compress(params, bits, rule=jaxclip.max_abs)
    back = decompress(small)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    kernel, q = np.asarray(params["dense"]["kernel"], np.float64), small["dense"]["kernel"]
    error = np.abs(kernel - np.asarray(back["dense"]["kernel"], np.float64))
    step = np.abs(np.asarray(q.scale, np.float64))
    assert np.all(error <= step * (1.0 if bits == 1 else 0.5) * (1 + 1e-5))


def test_decompressing_into_another_dtype_casts_only_what_was_compressed():
    back = decompress(squeeze(make_params(), 4), jnp.bfloat16)
    assert back["dense"]["kernel"].dtype == jnp.bfloat16
    assert back["dense"]["bias"].dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float8_e4m3fn])
def test_a_weight_beyond_the_dtype_is_refused_by_its_path_wherever_it_is_cast(dtype, tmp_path):
    plain = {"a": {"b": jnp.array([[1.0, 7e4], [2.0, -3.0]])}}
    small, large = compress(plain, 8), float(jnp.finfo(dtype).max)
    path, out = tmp_path / "x.safetensors", tmp_path / "out.safetensors"
    checkpoints.save(path, small)
    for cast in (
        lambda: decompress(small, dtype),
        lambda: checkpoints.decompress_checkpoint(path, out, dtype),
        lambda: interop.to_safetensors(out, small, dtype=dtype),
    ):
        with pytest.raises(
            ValueError, match=r"'a/b'|'a\.b' has an entry that is not finite in float"
        ):
            cast()
        assert not out.exists()
    with pytest.raises(ValueError, match="int8"):
        checkpoints.decompress_checkpoint(path, out, np.int8)
    # In jit values are not known.
    assert (
        float(jnp.max(jax.jit(functools.partial(decompress, dtype=dtype))(small)["a"]["b"]))
        == large
    )


@pytest.mark.thorough
def test_each_leaf_equals_quantizing_it_alone():
    params = make_params()
    params = {"dense": {"kernel": params["dense"]["kernel"]}}
    for options in (
        {},
        {"axis": 0},
        {"axis": None},
        {"group_size": 4},
        {"levels": "narrow"},
        {"zero_point": True, "scale_dtype": "log8"},
    ):
        q = squeeze(params, Grid(3, **options))["dense"]["kernel"]
        grid = Grid(3, **options)
        alone = jaxclip.quantize(params["dense"]["kernel"], grid, threshold=jaxclip.max_abs)
        assert np.array_equal(q.qvalue, alone.qvalue)
        assert np.array_equal(q.scale, alone.scale)
        assert q.grid == alone.grid
        assert (q.zero is None) == (alone.zero is None)
        assert q.zero is None or np.array_equal(q.zero, alone.zero)


def test_compressing_twice_gives_the_same_codes():
    for a, b in zip(
        jax.tree.leaves(squeeze(make_params(), 4)),
        jax.tree.leaves(squeeze(make_params(), 4)),
        strict=True,
    ):
        assert np.array_equal(np.asarray(a), np.asarray(b))


def test_low_bit_leaves_are_never_compressed_again():
    small = squeeze(make_params(), 4)
    try:
        again = squeeze(small, 4)
    except (TypeError, ValueError) as error:
        assert "dense/kernel" in str(error) or "embed/embedding" in str(error)  # noqa: PT017
    else:
        assert np.array_equal(
            decompress(again)["dense"]["kernel"], decompress(small)["dense"]["kernel"]
        )


@pytest.mark.thorough
def test_compress_and_decompress_run_under_jit():
    params = {"dense": make_params()["dense"]}
    back = jax.jit(lambda p: decompress(compress(p, "ternary")))(params)
    eager = decompress(compress(params, "ternary"))
    np.testing.assert_allclose(back["dense"]["kernel"], eager["dense"]["kernel"], rtol=1e-5)


@pytest.mark.parametrize("params", [{}, None, (), {"b": jnp.ones(3)}, [None]], ids=repr)
def test_trees_without_kernels_come_back_as_they_are(params):
    assert jax.tree.structure(compress(params)) == jax.tree.structure(params)
    assert jax.tree.structure(decompress(compress(params))) == jax.tree.structure(params)


# --- Targets ---------------------------------------------------------------------------

WIDTHS = ["ternary", 2, 3, 4, 5, 6, 8]


def widths(small):
    return {k: v.bits for k, v in small.items() if isinstance(v, QuantizedArray)}


def error_of(small):
    params = uneven_params()
    return sum(
        np.sum((np.asarray(params[k], np.float64) - np.asarray(v, np.float64)) ** 2)
        for k, v in decompress(small).items()
    )


def squeeze_file(folder, params=None, bits=None, **options):
    """The same by way of a file, which alone has a size in bytes."""
    source, target = folder / "net.safetensors", folder / "small.safetensors"
    jaxclip.checkpoints.save(source, params or uneven_params(), overwrite=True)
    jaxclip.checkpoints.compress_checkpoint(
        source,
        target,
        bits or Grid(None),
        rule=jaxclip.max_abs,
        overwrite=True,
        progress=False,
        **options,
    )
    return jaxclip.checkpoints.load(target)


@functools.cache
def at_every_width():
    """(bits an entry, bytes of the file, error) of each width for all leaves."""
    trees = [squeeze(uneven_params(), width) for width in WIDTHS]
    reports = [jaxclip.size_report(small) for small in trees]
    return [
        (r.bits_per_weight, r.total_bytes, error_of(small))
        for r, small in zip(reports, trees, strict=True)
    ]


@pytest.mark.parametrize("target", [3.0, 4.5, 5.3333333, 7.0, 20.0])
def test_a_target_of_bits_holds_and_beats_every_one_width_that_fits(target):
    small = squeeze(uneven_params(), target_bits_per_weight=target)
    low_bit = [v for v in small.values() if isinstance(v, QuantizedArray)]
    assert len(low_bit) == 3
    assert small["bias"] is uneven_params()["bias"]
    packed = [jaxclip.lowbit.pack_codes(np.asarray(q.qvalue), q.bits).size for q in low_bit]
    spent = sum(packed) + sum(4 * q.scale.size for q in low_bit)
    assert 8 * spent / sum(q.qvalue.size for q in low_bit) <= target
    uniform = [error for bits, _, error in at_every_width() if bits <= target]
    assert error_of(small) <= min(uniform) * (1 + 1e-9)


def test_bits_go_to_large_weights_and_not_to_those_that_are_exact_already():
    small = squeeze(uneven_params(), target_bits_per_weight=4.5)
    assert widths(small)["large"] > 4
    assert widths(small)["small"] == "ternary"
    assert widths(small)["easy"] == "ternary"
    assert error_of(small) < 0.5 * min(e for bits, _, e in at_every_width() if bits <= 4.5)


@pytest.mark.thorough
def test_a_target_of_bytes_holds_for_the_file_and_beats_every_one_width_that_fits(tmp_path):
    for _, target, error in at_every_width():
        for slack in (0, 7, 100):
            small = squeeze_file(tmp_path, target_bytes=target + slack)
            assert (tmp_path / "small.safetensors").stat().st_size <= target + slack
            assert error_of(small) <= error * (1 + 1e-9)


@pytest.mark.thorough
def test_leaves_of_a_target_equal_quantizing_them_at_the_chosen_width():
    grid = Grid(None, group_size=8, scale_dtype="float16", axis=0)
    small = squeeze(uneven_params(), grid, target_bits_per_weight=6.0)
    for name, width in widths(small).items():
        chosen = dataclasses.replace(grid, bits=width)
        alone = jaxclip.quantize(uneven_params()[name], chosen, threshold=jaxclip.max_abs)
        assert np.array_equal(small[name].qvalue, alone.qvalue)
        assert np.array_equal(small[name].scale, alone.scale)


def test_a_policy_fixes_widths_and_their_bytes_count():
    policy = [("large", 2), ("easy", None)]
    small = squeeze(uneven_params(), target_bits_per_weight=5.5, policy=policy)
    assert small["large"].bits == 2
    assert small["easy"] is uneven_params()["easy"]
    assert small["small"].bits in (6, 8)
    assert jaxclip.size_report(small).bits_per_weight <= 5.5
    again = squeeze({**small, "easy": uneven_params()["easy"]}, target_bits_per_weight=5.5)
    assert again["large"] is small["large"]  # low-bit leaves stay, and count
    assert again["easy"].bits in WIDTHS
    assert jaxclip.size_report(again).bits_per_weight <= 5.5


def test_without_bits_and_target_the_width_is_4():
    assert set(widths(compress(uneven_params(), rule=jaxclip.max_abs)).values()) == {4}
    assert set(widths(squeeze(uneven_params(), None)).values()) == {4}


def test_trees_without_kernels_meet_a_target_as_they_are(tmp_path):
    params = {"bias": jnp.ones(3), "none": None}
    assert compress(params, target_bits_per_weight=2.0)["bias"] is params["bias"]
    total = jaxclip.size_report(params).total_bytes
    small = squeeze_file(tmp_path, params, target_bytes=total)
    np.testing.assert_array_equal(small["bias"], params["bias"])
    with pytest.raises(ValueError, match=rf"the least is {total}"):
        squeeze_file(tmp_path, params, target_bytes=total - 1)


def test_a_target_out_of_reach_says_the_least_which_is_in_reach(tmp_path):
    with pytest.raises(ValueError, match=r"target_bits_per_weight=1\.5.*the least is") as caught:
        squeeze(uneven_params(), target_bits_per_weight=1.5)
    least = float(str(caught.value).rstrip(".").rpartition(" ")[2])
    small = squeeze(uneven_params(), target_bits_per_weight=least)
    assert set(widths(small).values()) == {"ternary"}
    with pytest.raises(ValueError, match=r"target_bytes=100 .*the least is") as caught:
        squeeze_file(tmp_path, target_bytes=100)
    least = int(str(caught.value).rstrip(".").rpartition(" ")[2].replace(",", ""))
    small = squeeze_file(tmp_path, target_bytes=least)
    assert jaxclip.size_report(small).total_bytes == least
    with pytest.raises(ValueError, match=f"target_bytes={least - 1:,} "):
        squeeze_file(tmp_path, target_bytes=least - 1)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4, "target_bytes": 9999},
        {"bits": "ternary", "target_bits_per_weight": 3.0},
        {"target_bytes": 9999, "target_bits_per_weight": 3.0},
    ],
)
def test_more_than_one_goal_is_refused(tmp_path, options):
    with pytest.raises(TypeError, match="only one of bits and the targets"):
        squeeze_file(tmp_path, **options)


def test_a_rule_of_one_width_is_refused_with_a_target():
    with pytest.raises(ValueError, match="needs bits=8"):
        compress(
            uneven_params(), target_bits_per_weight=3, rule=jaxclip.thresholds.rate_optimal(2.5)
        )


@pytest.mark.parametrize("value", [0, -1.0, np.nan, np.inf, True, "3"], ids=repr)
def test_targets_that_are_no_sizes_are_refused_by_name(tmp_path, value):
    for name in ("target_bits_per_weight", "target_bytes"):
        with pytest.raises((TypeError, ValueError), match=name):
            squeeze_file(tmp_path, **{name: value})
    with pytest.raises((TypeError, ValueError), match="target_bits_per_weight"):
        compress({}, target_bits_per_weight=value)


def test_a_target_under_jit_is_refused():
    with pytest.raises(TypeError, match="target_bits_per_weight needs the weights' values"):
        jax.eval_shape(lambda p: squeeze(p, target_bits_per_weight=3), uneven_params())


def test_a_target_with_known_weights_is_met_inside_of_jit():
    params = uneven_params()
    inside = jax.jit(lambda: squeeze(params, target_bits_per_weight=3))()
    jax.tree.map(np.testing.assert_array_equal, inside, squeeze(params, target_bits_per_weight=3))


# --- Bad input -------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 9, 2.5, True, "2"], ids=repr)
def test_unknown_bits_are_refused_even_if_no_leaf_would_use_them(bits):
    with pytest.raises(ValueError, match="bits must be one of"):
        compress({}, bits)
    with pytest.raises(ValueError, match="bits must be one of"):
        compress(make_params(), 4, policy=[("kernel", bits)])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named_with_leaf_and_index(bad):
    params = make_params()
    params["dense"]["kernel"] = params["dense"]["kernel"].at[4, 1].set(bad)
    with pytest.raises(ValueError, match=rf"dense/kernel.*{bad}.*\(4, 1\)"):
        compress(params, 4)
    small = squeeze(params, 4, policy=[("dense/kernel", None)])
    assert not np.isfinite(small["dense"]["kernel"][4, 1])


@pytest.mark.parametrize("rule", ["mse", None, True, 1j, -1.0, np.nan, np.ones((7, 7))], ids=repr)
def test_a_rule_that_is_no_threshold_is_refused(rule):
    with pytest.raises((TypeError, ValueError), match=r"threshold|rule"):
        compress(make_params(), 4, rule=rule)


@pytest.mark.thorough
def test_rows_that_are_hard_stay_finite_in_a_whole_tree():
    rows = np.zeros((4, 8), np.float32)
    rows[1], rows[2, 3], rows[3] = 0.7, 1e6, 1e-42
    for bits in (1, "ternary", 8):
        for rule in (jaxclip.mse_optimal, jaxclip.max_abs):
            small = compress({"w": jnp.asarray(rows)}, Grid(bits, axis=0), rule=rule)
            assert np.all(np.isfinite(np.asarray(small["w"].scale)))
            assert np.all(np.asarray(small["w"].scale) != 0)
            back = np.asarray(decompress(small)["w"])
            np.testing.assert_allclose(back[1], rows[1], rtol=1e-6)
            assert np.all(np.isfinite(back))


# --- fan_in, by the paths of leaves -----------------------------------------------------


def flax_like_params():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {
        "embed/embedding": (40, 6),
        "attention/query/kernel": (12, 4, 8),
        "attention/query/bias": (4, 8),
        "dense/kernel": (12, 5),
    }
    tree: dict[str, Any] = {}
    for key, (path, shape) in zip(keys, shapes.items(), strict=True):
        *folders, name = path.split("/")
        branch = tree
        for folder in folders:
            branch = branch.setdefault(folder, {})
        branch[name] = 0.3 * jax.random.normal(key, shape)
    return tree


@pytest.mark.thorough
def test_fan_in_has_the_thresholds_that_clip_weights_takes(tmp_path):
    params, rule = flax_like_params(), jaxclip.fan_in(1.0)
    bounds = jaxclip.thresholds.resolve_threshold(rule, params)
    small = jaxclip.compress(params, 8, rule=rule)
    checkpoints.save(tmp_path / "net.safetensors", params)
    checkpoints.compress_checkpoint(
        tmp_path / "net.safetensors", tmp_path / "small.safetensors", Grid(8), rule=rule
    )
    from_file = checkpoints.load(tmp_path / "small.safetensors", like=small)
    for found in (small, from_file):
        for path in (("embed", "embedding"), ("attention", "query", "kernel"), ("dense", "kernel")):
            leaf, bound = found, bounds
            for key in path:
                leaf, bound = leaf[key], bound[key]
            np.testing.assert_allclose(leaf.threshold, float(bound), rtol=1e-6)
        # What stays free is not clipped.
        bias = params["attention"]["query"]["bias"]
        np.testing.assert_allclose(
            found["attention"]["query"]["bias"].threshold,
            jnp.max(jnp.abs(bias), axis=0, keepdims=True),
            rtol=1e-6,
        )


@pytest.mark.thorough
def test_wrong_thresholds_are_called_rules_and_leaves_are_named():
    params = {"a": {"w": jnp.ones((3, 4))}}
    with pytest.raises(ValueError, match=r"^rule must be positive and finite, got 0.0"):
        jaxclip.compress(params, 4, rule=0.0)
    with pytest.raises(ValueError, match=r"^params at 'a/w': rule must broadcast .* got \(3,\)"):
        jaxclip.compress(params, 4, rule=np.ones(3))
    with pytest.raises(ValueError, match=r"^policy 'a/w': rule must be positive"):
        jaxclip.compress(params, 4, policy=[("a/w", {"rule": 0})])
    with pytest.raises(ValueError, match=r"^policy 'a', params at 'a/w': rule must broadcast"):
        jaxclip.compress(params, 4, policy=[("a", {"rule": np.ones(3)})])
