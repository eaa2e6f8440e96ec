"""Policies: which spec a leaf gets, and what the errors name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxclip
from jaxclip import Grid, QuantizedArray, compress
from jaxclip.lowbit.budgets import ALL_WIDTHS
from jaxclip.lowbit.policies import LeafSpec
from oracles.small_params import make_params, uneven_params


@pytest.mark.thorough
def test_the_first_pattern_that_matches_decides_the_width():
    small = compress(
        make_params(),
        "ternary",
        rule=jaxclip.max_abs,
        policy=[("^embed/", 8), ("half", None), ("kernel", 3), ("bias", 6)],
    )
    assert small["embed"]["embedding"].bits == 8
    assert not isinstance(small["half"]["kernel"], QuantizedArray)
    assert small["dense"]["kernel"].bits == 3
    assert small["dense"]["bias"].bits == 6
    assert small["dense"]["bias"].scale.shape == (1,)
    assert not isinstance(small["temperature"], QuantizedArray)


def test_a_pattern_that_matches_no_leaf_is_refused_by_name():
    with pytest.raises(ValueError, match="attention"):
        compress(make_params(), 4, policy=[("kernel", 4), ("attention", 8)])


def test_a_pattern_that_is_no_regular_expression_is_refused_by_name():
    with pytest.raises((TypeError, ValueError), match="policy"):
        compress(make_params(), 4, policy=[("(", 4)])
    with pytest.raises((TypeError, ValueError), match="policy"):
        compress(make_params(), 4, policy=["kernel"])


@pytest.mark.thorough
def test_a_spec_replaces_the_arguments_that_it_names():
    spec = {
        "bits": 2,
        "rule": jaxclip.max_abs,
        "axis": 0,
        "group_size": 3,
        "scale_dtype": "float16",
    }
    policy = [("embed", spec), ("half", {"levels": "narrow", "zero_point": True}), ("bias", {})]
    params = make_params()
    small = compress(params, 5, rule=0.5, policy=policy)
    grid = Grid(**{k: v for k, v in spec.items() if k != "rule"})
    alone = jaxclip.quantize(params["embed"]["embedding"], grid, threshold=jaxclip.max_abs)
    assert jax.tree.structure(small["embed"]["embedding"]) == jax.tree.structure(alone)
    assert np.array_equal(small["embed"]["embedding"].qvalue, alone.qvalue)
    assert np.array_equal(small["embed"]["embedding"].scale, alone.scale)
    half = small["half"]["kernel"]
    assert (half.bits, half.grid.levels, half.zero is not None) == (5, "narrow", True)
    assert small["dense"]["kernel"].threshold.max() == 0.5
    assert small["dense"]["bias"] is params["dense"]["bias"]  # no width is given


@pytest.mark.thorough
def test_a_grid_as_a_spec_replaces_the_whole_grid():
    params = make_params()
    policy = [("embed", Grid(2, axis=0)), ("half", Grid(None, group_size=4)), ("bias", Grid(8))]
    small = compress(params, Grid(5, zero_point=True), rule=jaxclip.max_abs, policy=policy)
    assert small["embed"]["embedding"].grid == Grid(2, axis=-2)
    assert small["half"]["kernel"].grid == Grid(5, axis=-1, group_size=4)  # the width is left open
    assert small["dense"]["kernel"].grid == Grid(5, axis=-1, zero_point=True)
    assert small["dense"]["bias"].grid == Grid(8, axis=None)


def test_a_wrong_grid_of_a_spec_is_refused_by_its_regex():
    policy = [("dense/k", Grid(4, axis=5))]
    with pytest.raises(ValueError, match=r"policy 'dense/k'.*axis must be in \[-2, 2\)"):
        compress(make_params(), policy=policy)
    with pytest.raises(ValueError, match="policy 'dense/k': bit_price needs a code"):
        compress(make_params(), bit_price=0.1, policy=[("dense/k", Grid(1))])


@pytest.mark.thorough
def test_an_open_width_is_4_bits_without_a_target():
    small = compress(make_params(), Grid(None, group_size=4), rule=jaxclip.max_abs)
    assert small["dense"]["kernel"].grid == Grid(4, axis=-1, group_size=4)


@pytest.mark.thorough
def test_a_spec_without_a_width_leaves_it_to_the_target():
    policy = [("large", {"scale_dtype": "float16"}), ("easy", {"bits": 3})]
    small = compress(
        uneven_params(), target_bits_per_weight=5.5, rule=jaxclip.max_abs, policy=policy
    )
    assert small["large"].grid.scale_dtype == "float16"
    assert small["large"].bits in ALL_WIDTHS
    assert small["easy"].bits == 3
    assert jaxclip.size_report(small).bits_per_weight <= 5.5


@pytest.mark.thorough
def test_a_price_of_bits_gives_cheaper_codes_to_the_leaves_it_is_for():
    params = uneven_params()
    plain = compress(params, 4, rule=jaxclip.max_abs)
    price = jnp.asarray(0.5)
    priced = compress(
        params, 4, rule=jaxclip.max_abs, bit_price=0.5, policy=[("small", {"bit_price": 0.0})]
    )
    traced = jax.jit(lambda p, price: compress(p, 4, rule=jaxclip.max_abs, bit_price=price))(
        params, price
    )
    chosen = jaxclip.lowbit.cheaper_codes(plain["large"], params["large"], price=0.5)
    for found in (priced, traced):
        assert np.array_equal(found["large"].qvalue, chosen.qvalue)
    assert not np.array_equal(chosen.qvalue, plain["large"].qvalue)
    assert np.array_equal(priced["small"].qvalue, plain["small"].qvalue)
    assert not np.array_equal(traced["small"].qvalue, plain["small"].qvalue)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"width": 4}, "'width' is none of"),
        ({"bits": 7}, "bits must be one of"),
        ({"bits": None}, "bits must be a width, got None"),
        ({"group_size": 0}, "group_size must be"),
        ({"axis": "last"}, "axis must be an integer"),
        ({"axis": 5}, r"kernel.*axis must be in \[-2, 2\)"),
        ({"scale_dtype": "int8"}, "scale_dtype must be one of"),
        ({"rule": "mse"}, "rule must be"),
        ({"zero_point": 1}, "zero_point must be True or False"),
        ({"bits": 1, "zero_point": True}, "zero_point needs a code for 0"),
        ({"bits": 4, "rule": jaxclip.thresholds.rate_optimal(2.0)}, "rate_optimal needs bits=8"),
        ({"bit_price": -0.1}, "bit_price must be finite and not negative"),
        ({"bit_price": "low"}, "bit_price must be a non-negative number"),
        ({"bits": 1, "bit_price": 0.1}, "bit_price needs a code for the value 0"),
        ({"zero_point": True, "bit_price": 0.1}, "bit_price needs a code for the value 0"),
    ],
    ids=str,
)
def test_a_wrong_spec_is_refused_by_its_rule_and_field(spec, message):
    with pytest.raises((TypeError, ValueError), match=rf"policy 'dense/k'.*{message}"):
        compress(make_params(), 4, rule=jaxclip.max_abs, policy=[("dense/k", spec)])


@pytest.mark.thorough
def test_a_leaf_that_low_bits_would_make_no_smaller_stays_as_it_is():
    ones = lambda *shape: jnp.ones(shape, jnp.float16)  # noqa: E731
    params = {
        "column": ones(16, 1),  # codes and a scale for each entry
        "row": ones(1, 16),
        "pair": ones(16, 2),  # 16 bytes of codes and 64 of scales, 64 as it is
        "matrix": ones(16, 8),
        "empty": ones(0, 4),
        "bias": ones(1),
    }
    small = compress(params, Grid(4, axis=0), rule=jaxclip.max_abs, policy=[("bias", 8)])
    low_bit = {name for name, leaf in small.items() if isinstance(leaf, QuantizedArray)}
    assert low_bit == {"row", "matrix"}
    assert all(small[name] is params[name] for name in params.keys() - low_bit)


@pytest.mark.thorough
def test_a_leaf_whose_codes_are_coded_is_judged_by_its_scales_alone():
    params = {"w": jnp.ones((16, 16), jnp.float8_e4m3fn), "column": jnp.ones((16, 1))}
    rule = jaxclip.thresholds.rate_optimal(2.0)
    assert not isinstance(compress(params, 8, rule=jaxclip.max_abs)["w"], QuantizedArray)
    small = compress(params, Grid(8, axis=0), rule=rule)
    assert isinstance(small["w"], QuantizedArray)
    assert not isinstance(small["column"], QuantizedArray)


@pytest.mark.thorough
def test_a_target_never_chooses_a_width_that_makes_a_leaf_no_smaller():
    params = {"w": 3 * jnp.eye(4, 24, dtype=jnp.float8_e4m3fn), "v": jnp.eye(4, 24)}
    policy = [("w", {"axis": None}), ("v", {"axis": 0})]
    small = compress(params, target_bits_per_weight=20.0, rule=jaxclip.max_abs, policy=policy)
    assert isinstance(small["w"], QuantizedArray)
    assert small["w"].num_bytes < params["w"].nbytes


@pytest.mark.thorough
def test_python_and_files_have_one_default_axis_by_the_layout(tmp_path):
    rng = np.random.default_rng(0)
    # Outputs of sizes far apart: a scale for the wrong axis would lose the small ones.
    size = 10.0 ** np.arange(-2, 2)
    dense, conv = rng.normal(size=(24, 4)) * size, rng.normal(size=(3, 3, 8, 4)) * size
    stack = rng.normal(size=(2, 24, 4)) * size * np.array([1, 100]).reshape(2, 1, 1)
    flax = {"dense": {"kernel": dense}, "conv": {"kernel": conv}, "experts": {"up": stack}}
    flax = jax.tree.map(lambda x: x.astype(np.float32), flax)
    torch = {
        "dense.weight": flax["dense"]["kernel"].T,
        "conv.weight": flax["conv"]["kernel"].transpose(3, 2, 0, 1),
        "experts.up": flax["experts"]["up"].transpose(0, 2, 1),
    }
    torch = {name: np.ascontiguousarray(array) for name, array in torch.items()}
    axes = {"flax": [(3,), (1,), (0, 2)], "torch": [(0,), (0,), (0, 1)]}
    for kind, tree in {"flax": flax, "torch": torch}.items():
        path, out = tmp_path / f"{kind}.safetensors", tmp_path / f"{kind}_small.safetensors"
        jaxclip.checkpoints.save(path, tree)
        small = compress(tree, 4, rule=jaxclip.max_abs)
        report = jaxclip.checkpoints.compress_checkpoint(path, out, 4, rule=jaxclip.max_abs)
        assert jax.tree.structure(jaxclip.checkpoints.load(out, like=small))
        assert report.relative_error < 0.02
        assert [leaf.axes for leaf in report.leaves] == axes[kind]
        assert [leaf.axes for leaf in jaxclip.size_report(small).leaves] == axes[kind]
        assert str(report).endswith("layout: " + {"flax": "in_out", "torch": "out_in"}[kind])
        said = jaxclip.checkpoints.compress_checkpoint(
            path, out, Grid(4, axis=0), rule=jaxclip.max_abs, dry_run=True
        )
        assert said.layouts == ()


@pytest.mark.thorough
def test_a_layout_that_is_said_holds_for_all_leaves_without_an_axis_of_their_own():
    params = {"dense": {"kernel": jnp.ones((6, 4))}, "head": {"kernel": jnp.ones((6, 4))}}
    policy = [("head", {"axis": 1})]
    small = compress(params, 4, layout="out_in", policy=policy, rule=jaxclip.max_abs)
    assert small["dense"]["kernel"].scale.shape == (6, 1)
    assert small["head"]["kernel"].scale.shape == (1, 4)
    with pytest.raises(ValueError, match="layout must be one of"):
        compress(params, 4, layout="pytorch")


@pytest.mark.parametrize(
    "grid",
    [
        Grid(4),
        Grid(2, group_size=5, scale_dtype="float16"),
        Grid("ternary", axis=None, scale_dtype="log8"),
        Grid(8, axis=(0, -1), zero_point=True),
    ],
    ids=repr,
)
@pytest.mark.parametrize("shape", [(), (7,), (6, 4), (3, 6, 4)], ids=repr)
def test_the_outline_of_a_leaf_is_that_of_its_low_bit_array(grid, shape):
    if grid.axis == (0, -1) and len(shape) < 2:
        grid = Grid(8, axis=None, zero_point=True)
    spec = LeafSpec(grid, jaxclip.max_abs).in_layout("kernel", np.zeros(shape), "in_out")
    leaf = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    expected = jax.eval_shape(lambda w: spec.quantize(w, "kernel"), leaf)
    assert jax.tree.leaves(spec.outline(leaf, "kernel")) == jax.tree.leaves(expected)
    assert spec.outline(leaf, "kernel").grid == expected.grid
