"""The comparison's own parts: recipes against NumPy, tables against the rows they are made of."""

import importlib
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxclip

FOLDER = pathlib.Path(jaxclip.__file__).parent.parent / "evidence"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="the folder evidence is not here")


@pytest.fixture(scope="module")
def parts():
    sys.path.insert(0, str(FOLDER))
    try:
        names = ("ideas", "methods", "tasks", "run", "report")
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(FOLDER))


@pytest.mark.thorough
def test_the_ternary_recipe_is_that_of_bitnet(parts):
    w = np.random.default_rng(0).normal(size=(32, 16)).astype(np.float32)
    found = jaxclip.decompress(parts["methods"].low_bit({"w": jnp.asarray(w)}, "ternary"))["w"]
    scale = np.abs(w).astype(np.float64).mean()
    expected = scale * np.clip(np.round(w / scale), -1, 1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.thorough
def test_the_derivative_goes_straight_through_the_grid(parts):
    w = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)}
    target = jnp.ones((4, 3))
    loss = parts["methods"].through_grid(lambda p, b: jnp.sum(p["w"] * b), "ternary")
    np.testing.assert_array_equal(jax.grad(loss)(w, target)["w"], target)


@pytest.mark.thorough
def test_one_shot_pruning_keeps_the_largest(parts):
    w = np.random.default_rng(0).permutation(np.linspace(-1, 2, 400)).astype(np.float32)
    kept = np.asarray(parts["methods"].prune({"w": jnp.asarray(w.reshape(20, 20))}, 0.1)["w"])
    largest = np.sort(np.abs(w))[-40:]
    np.testing.assert_array_equal(np.sort(np.abs(kept[kept != 0])), largest)


@pytest.mark.thorough
def test_gradual_pruning_ends_at_its_density_and_leaves_biases_alone(parts):
    tx = optax.chain(optax.sgd(0.1), parts["methods"].prune_gradually(0.25, 8))
    params = {
        "kernel": jax.random.normal(jax.random.key(0), (16, 16)),
        "bias": jnp.full(4, 1e-6),
    }
    state = tx.init(params)
    densities = []
    for i in range(8):
        grads = jax.tree.map(lambda p, i=i: jax.random.normal(jax.random.key(i), p.shape), params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        densities.append(float((params["kernel"] != 0).mean()))
    assert densities == sorted(densities, reverse=True)
    assert densities[-1] == pytest.approx(0.25, abs=1 / 256)
    assert (params["bias"] != 0).all()


def test_a_sparse_file_takes_a_bit_a_place_and_two_bytes_a_weight(parts, tmp_path):
    w = np.zeros((64, 64), np.float32)
    w[:4] = 1.5
    small = parts["run"].as_sparse_file({"w": jnp.asarray(w)})
    jaxclip.checkpoints.save(tmp_path / "a.safetensors", small)
    assert (tmp_path / "a.safetensors").stat().st_size == jaxclip.size_report(small).total_bytes
    assert small["w"]["is_kept"].nbytes == 512
    assert small["w"]["values"].nbytes == 512


@pytest.mark.thorough
def test_a_method_trains_and_is_rounded_as_it_was_trained(parts):
    task = parts["tasks"].digits(num_steps=3)
    method = parts["methods"].make_methods(3, 0.01)["AdamW, trained at ternary"]
    with jax.numpy_dtype_promotion("standard"):  # for optax's adamw
        result = parts["run"].trained(task, method, [1e-3], [0, 1], keep_params=True)
    params = jax.tree.map(lambda x: x[0], result.params_of(result.rows()[0]))
    expected = task.evaluate(jaxclip.decompress(parts["methods"].low_bit(params, "ternary")))
    np.testing.assert_allclose(result.metrics["test"][0, 0, 0, 0], expected["test"], atol=0.3)


@pytest.mark.thorough
def test_weights_that_are_pulled_to_three_levels_end_on_them(parts):
    params = {"kernel": jax.random.normal(jax.random.key(0), (16, 4)), "bias": jnp.ones(4)}
    tx = optax.chain(optax.sgd(0.0), parts["ideas"].pull_to_grid("ternary", 10, 400))
    state, update = tx.init(params), jax.jit(tx.update)
    grads, first = jax.tree.map(jnp.zeros_like, params), params
    for i in range(400):
        assert i > 10 or np.array_equal(params["kernel"], first["kernel"])
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    for column in np.abs(np.asarray(params["kernel"])).T:
        assert len(np.unique(column.round(3))) <= 2  # t, and 0
    assert np.array_equal(params["bias"], first["bias"])


def test_a_box_by_layer_is_that_of_fan_in_times_a_factor(parts):
    params = {name: {"kernel": jnp.zeros((8, 3))} for name in ("dense_0", "dense_1")}
    rule = parts["ideas"].ByLayer(0.5, parts["ideas"].FIRST, 4.0)
    found = jaxclip.thresholds.resolve_threshold(rule, params)
    assert (found["dense_0"]["kernel"], found["dense_1"]["kernel"]) == (1.0, 0.25)


@pytest.mark.thorough
def test_learned_scales_lower_the_loss_of_a_low_bit_network(parts):
    task = parts["tasks"].digits(num_steps=1500)
    params = task.init_fn(jax.random.key(0))
    rounded = jaxclip.decompress(jaxclip.compress(params, 1))
    with jax.numpy_dtype_promotion("standard"):  # for optax's adam
        learned = parts["run"].learn_scales(task, params, 1, jaxclip.mse_optimal)
    batch = task.batches(jax.random.key(7))
    assert task.loss_fn(learned, batch) < 0.7 * task.loss_fn(rounded, batch)
    kept = jax.tree.map(lambda a, b: np.array_equal(jnp.sign(a), jnp.sign(b)), learned, rounded)
    assert all(kept[layer]["kernel"] for layer in kept)


@pytest.mark.thorough
def test_a_convolution_by_slices_is_a_convolution(parts):
    task = parts["tasks"]
    params = task.convolutions_init(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (3, 784))
    x = images.reshape(3, 28, 28, 1)
    for i in range(2):
        layer = params[f"layer_{i}"]
        x = jax.lax.conv_general_dilated(
            x, layer["kernel"], (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + layer["bias"].reshape(1, 1, 1, -1))
    hidden = jax.nn.relu(x.reshape(3, -1) @ params["layer_2"]["kernel"])
    expected = hidden @ params["layer_3"]["kernel"]
    np.testing.assert_allclose(task.convolutions(params, images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "task", ["digits", "fashion", "fashion_long", "convolutions", "flights", "language"]
)
def test_the_tables_have_every_method_of_the_results(parts, task):
    rows = parts["report"].read(task)
    for row in rows:
        assert set(row) >= {"method", "rule", "bits", "test", "train", "bytes", "step_size"}
    lines = parts["report"].by_width(rows, 2)
    shown = {line[0] for line in lines}
    assert shown == {row["method"] for row in rows if row["bits"] != "float16"}
    for line in lines:
        mine = [r for r in rows if r["method"] == line[0] and r["rule"] in (line[1], "-")]
        means = {str(r["bits"]): f"{np.mean(r['test']):.2f}" for r in mine}
        cells = dict(zip(map(str, parts["report"].WIDTHS), line[2:], strict=True))
        assert {k: v.split(" ")[0] for k, v in cells.items() if v} == means


@pytest.mark.thorough
def test_the_results_are_whole_lines_of_json():
    for file in (FOLDER / "results").glob("*.jsonl"):
        for line in file.read_text().splitlines():
            assert json.loads(line)["task"] == file.stem
