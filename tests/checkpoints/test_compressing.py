"""`compress` with the size of the file as its target."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from jaxclip import Grid, calibration, checkpoints, cli, compress, decompress, max_abs, size_report
from oracles.quick import quick_first


def apply(params, x):
    hidden = jax.nn.relu(x @ params["one"]["kernel"] + params["one"]["bias"][None])
    return hidden @ params["two"]["kernel"]


@pytest.fixture(scope="module")
def network():
    rng = np.random.default_rng(0)
    params = {
        "one": {"kernel": rng.normal(size=(96, 128)) / 10, "bias": rng.normal(size=128)},
        "two": {"kernel": rng.normal(size=(128, 100)) / 11},
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    mix = rng.normal(size=(96, 96)) * rng.lognormal(size=96)
    x = (rng.normal(size=(1000, 96)) @ mix / 10).astype(np.float32)
    c = calibration.measure(apply, params, [x[:400], x[400:800]], progress=False)
    return params, c, x


def output_error(params, small, x):
    """Relative squared error of the outputs on inputs that the calibration did not see."""
    wanted, found = (np.asarray(apply(p, x[800:])) for p in (params, decompress(small)))
    return np.square(wanted - found).sum() / np.square(wanted).sum()


@pytest.mark.parametrize("target", quick_first([9000, 5000, 16_000]))
def test_the_file_has_the_target_size_and_the_tree_comes_back(network, target, tmp_path):
    params, c, _ = network
    small = compress(params, target_bytes=target, calibration=c)
    file = tmp_path / "net.safetensors"
    checkpoints.save(file, small, coding="lanes")
    assert 0.96 * target < file.stat().st_size <= target
    loaded = checkpoints.load(file)
    jax.tree.map(np.testing.assert_array_equal, decompress(loaded), decompress(small))


def test_a_calibration_lowers_the_error_at_equal_bytes_and_sensitivities_lower_it_more(network):
    params, c, x = network
    measured = calibration.sensitivities(apply, params, [x[:200]], c, progress=False)
    errors = [
        output_error(params, compress(params, target_bytes=7000, calibration=data), x)
        for data in (None, c, measured)
    ]
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] < 1.05 * errors[1]


def test_leaves_of_fixed_width_count_and_keep_their_grid(network):
    params, c, _ = network
    policy = [("two", Grid(4))]
    small = compress(params, target_bytes=12_000, calibration=c, policy=policy)
    assert small["two"]["kernel"].bits == 4
    assert size_report(small, "lanes").total_bytes <= 12_000


@pytest.mark.parametrize("target", [1300, pytest.param(2000, marks=pytest.mark.thorough)])
def test_a_target_is_met_where_few_weights_take_all_the_bits(target):
    # A step twice as coarse saves far less than a bit a weight here.
    rng = np.random.default_rng(8)
    kernel = rng.normal(size=(256, 96)) * np.exp(2 * rng.normal(size=(256, 1)))
    small = compress({"kernel": kernel.astype(np.float32)}, target_bytes=target)
    assert 0.97 * target <= size_report(small, "lanes").total_bytes <= target


@pytest.mark.parametrize("target", [5000, 10**12, 10**400], ids=["5e3", "1e12", "1e400"])
def test_a_target_that_is_far_too_large_gives_the_finest_codes(target):
    kernel = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    small = compress({"kernel": kernel}, target_bytes=target)
    assert size_report(small, "lanes").total_bytes <= 5000
    assert np.abs(decompress(small)["kernel"] - kernel).max() <= np.abs(kernel).max() / 60


@pytest.mark.thorough
def test_equal_arguments_give_equal_trees(network):
    params, c, _ = network
    first, second = (compress(params, target_bytes=7000, calibration=c) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_targets_that_cannot_be_met_or_are_not_alone_are_refused(network):
    params, c, _ = network
    with pytest.raises(ValueError, match="target_bytes=500 is out of reach"):
        compress(params, target_bytes=500, calibration=c)
    with pytest.raises(TypeError, match="only one of bits and the targets"):
        compress(params, 4, target_bytes=5000)
    with pytest.raises(ValueError, match="target_bytes"):
        compress(params, target_bytes=0)
    with pytest.raises(TypeError, match="compress outside of jit"):
        jax.jit(lambda p: compress(p, target_bytes=5000))(params)
    bad = {"kernel": params["two"]["kernel"].at[3, 4].set(jnp.nan)}
    with pytest.raises(ValueError, match=r"params at 'kernel' must be finite .* at \(3, 4\)"):
        compress(bad, target_bytes=5000)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"bits": Grid(None, group_size=64)}, "group_size"),
        ({"bits": Grid(None, zero_point=True)}, "zero_point"),
        ({"rule": max_abs}, "rule"),
        ({"policy": [("two", {"scale_dtype": "float16"})]}, "scale_dtype"),
    ],
)
def test_fields_that_coded_steps_cannot_have_are_refused_by_name(network, given, name):
    params, c, _ = network
    with pytest.raises(ValueError, match=rf"kernel.*chooses steps.* so {name} must not be given"):
        compress(params, target_bytes=7000, calibration=c, **given)


def test_a_higher_price_takes_coarser_codes_for_finer_steps(network):
    params, c, _ = network
    steps = [
        np.median(
            compress(params, target_bytes=7000, calibration=c, bit_price=p)["two"]["kernel"].scale
        )
        for p in (0.0, 0.4, None)
    ]
    assert steps[1] < 0.98 * steps[0]
    assert steps[1] == steps[2]


def test_a_file_is_compressed_to_the_same_error_as_a_tree(network, tmp_path):
    params, c, x = network
    source, target = tmp_path / "net.safetensors", tmp_path / "small.safetensors"
    checkpoints.save(source, params)
    report = checkpoints.compress_checkpoint(
        source, target, target_bytes=7000, calibration=c, coding="lanes", progress=False
    )
    assert report.total_bytes == target.stat().st_size
    assert 0.96 * 7000 < report.total_bytes <= 7000
    small = checkpoints.load(target)
    found = output_error(params, small, x)
    of_tree = output_error(params, compress(params, target_bytes=7000, calibration=c), x)
    assert abs(found / of_tree - 1) < 0.1


@pytest.mark.thorough
def test_flat_files_with_names_to_be_escaped_are_compressed_to_a_size(network, tmp_path):
    params, c, _ = network
    flat = {"one/kernel": params["one"]["kernel"], "two/kernel": params["two"]["kernel"]}
    safetensors_numpy.save_file(
        {name: np.asarray(x) for name, x in flat.items()}, tmp_path / "net.safetensors"
    )
    report = checkpoints.compress_checkpoint(
        tmp_path / "net.safetensors",
        tmp_path / "small.safetensors",
        target_bytes=7000,
        calibration=c,
        coding="lanes",
        progress=False,
    )
    assert 0.96 * 7000 < report.total_bytes <= 7000


@pytest.mark.parametrize(
    "target", quick_first([{"bits": 3}, {"target_bits_per_weight": 3.0}]), ids=str
)
def test_files_of_fixed_widths_are_rounded_with_a_calibration(network, target, tmp_path):
    params, c, x = network
    source = tmp_path / "net.safetensors"
    checkpoints.save(source, params)
    errors = []
    for data in (None, c):
        checkpoints.compress_checkpoint(
            source,
            tmp_path / "small.safetensors",
            **target,
            calibration=data,
            rule=max_abs,
            overwrite=True,
            progress=False,
        )
        errors.append(output_error(params, checkpoints.load(tmp_path / "small.safetensors"), x))
    assert errors[1] < 0.6 * errors[0]


def test_the_command_line_reads_a_calibration(network, tmp_path, capsys):
    params, c, _ = network
    checkpoints.save(tmp_path / "net.safetensors", params)
    checkpoints.save(tmp_path / "c.safetensors", c.to_tree())
    words = ["compress", "net.safetensors", "small.safetensors", "--target-bytes", "7000"]
    words = [str(tmp_path / w) if w.endswith("tensors") else w for w in words]
    words += ["--coding", "lanes", "--calibration"]
    assert cli.main([*words, str(tmp_path / "c.safetensors"), "--no-cache"]) == 0
    assert (tmp_path / "small.safetensors").stat().st_size <= 7000
    capsys.readouterr()
    assert cli.main([*words, str(tmp_path / "net.safetensors"), "--force", "--no-cache"]) != 0
    assert "net.safetensors: tree must be what Calibration.to_tree" in capsys.readouterr().err
