"""Models, weight decays, densities, grids and budgets: each row is what it would be alone."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxclip
from jaxclip import calibration, checkpoints
from oracles.small_sweeps import INPUTS, apply, evaluate, init_fn, run

FEW = {"stop": jaxclip.max_steps(8), "thresholds": [np.inf], "bits": (None,), "seeds": 1}
BATCH = jnp.asarray(INPUTS)


def narrow(key):
    params = init_fn(key)
    hidden, out = params["hidden"], params["out"]
    return {
        "hidden": {"kernel": hidden["kernel"][:, :4], "bias": hidden["bias"][:4]},
        "out": {"kernel": out["kernel"][:4], "bias": out["bias"]},
    }


def decayed(step_size, weight_decay=0.0):
    return optax.chain(
        optax.sgd(step_size, momentum=0.9), optax.add_decayed_weights(-step_size * weight_decay)
    )


def calibrate(params):
    measured = calibration.measure(apply, params, [BATCH], progress=False)
    return calibration.sensitivities(apply, params, [BATCH], measured, progress=False)


def close(a, b):
    """Asserts equality up to the rounding of another program."""
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(near, a, b)


MODELS = {"wide": init_fn, "narrow": narrow}
DECAYS, DENSITIES = [0.0, 0.5], [1.0, 0.25]


@pytest.fixture(scope="module")
def compared():
    return run(**FEW, init_fn=MODELS, optimizer=decayed, weight_decays=DECAYS, densities=DENSITIES)


def test_each_row_names_its_model_weight_decay_and_density(compared):
    rows = compared.rows()
    axes = itertools.product(MODELS, DECAYS, DENSITIES, [0.3, 0.03])
    named = [(row.model, row.weight_decay, row.density, row.step_size) for row in rows]
    assert named == list(axes)
    assert compared.file_bytes.shape == (2, 2, 2, 2, 1, 1, 1)
    titles = str(compared).splitlines()[0].split()
    assert titles[:5] == ["model", "decay", "density", "step", "size"]
    best = compared.recommend(0.0)
    assert best.metric == min(row.metric for row in rows)


@pytest.mark.parametrize(("m", "d"), [(0, 1), (1, 0)])
def test_a_model_and_a_weight_decay_train_as_they_do_alone(compared, m, d):
    alone = run(
        **FEW,
        init_fn=list(MODELS.values())[m],
        optimizer=functools.partial(decayed, weight_decay=DECAYS[d]),
    )
    name = list(MODELS)[m]
    close(jax.tree.map(lambda leaf: leaf[d, 0], compared.params[name]), alone.params)
    for one in ("loss", "file_bytes", "steps"):
        close(getattr(compared, one)[m, d, 0], getattr(alone, one))
    close(compared.metrics["test"][m, d, 0], alone.metrics["test"])
    row = next(x for x in compared.rows() if (x.model, x.weight_decay) == (name, DECAYS[d]))
    close(compared.params_of(row), jax.tree.map(lambda leaf: leaf[0, 0], alone.params))


@pytest.mark.parametrize("num_steps", [1, 2, 7, 250])
def test_a_density_is_reached_exactly_and_stays(num_steps):
    changes = FEW | {"stop": jaxclip.max_steps(num_steps), "step_sizes": [0.1]}
    swept = run(**changes, optimizer=optax.sgd, densities=[0.25, 0.5, 1.0])
    for i, density in enumerate(swept.densities):
        for layer in ("hidden", "out"):
            kernel = swept.params[layer]["kernel"][i, 0, 0, 0]
            assert np.count_nonzero(kernel) == round(density * kernel.size)
            assert np.count_nonzero(swept.params[layer]["bias"][i, 0, 0, 0])


def test_a_density_prunes_along_the_cubic_schedule_over_three_quarters_of_the_steps():
    counts = []

    def standing(step_size):  # and counting the weights that it gets
        def update(grads, state, params):
            number = jnp.count_nonzero(params["hidden"]["kernel"])
            jax.debug.callback(lambda n: counts.append(int(n)), number)
            return jax.tree.map(jnp.zeros_like, grads), state

        return optax.GradientTransformation(lambda params: (), update)

    changes = FEW | {"stop": jaxclip.max_steps(16), "step_sizes": [0.1]}
    run(**changes, optimizer=standing, densities=[0.25])
    jax.effects_barrier()
    progress = np.minimum(np.arange(16) / 12, 1)
    expected = 48 * (0.25 + 0.75 * (1 - progress) ** 3)
    assert counts.pop(0) == 0  # once for the loss of weights of 0
    assert np.abs(np.asarray(counts) - expected).max() <= 0.5


# --- Files ----------------------------------------------------------------------------


def by_max(params, grid):
    return jaxclip.compress(params, grid, rule=jaxclip.max_abs)


def test_grids_are_values_of_bits():
    grids = (jaxclip.Grid(2, levels="balanced"), jaxclip.Grid(4, group_size=2, axis=(0,)), 4)
    swept = run(**(FEW | {"bits": grids, "step_sizes": [0.1], "compress": by_max}))
    params = jax.tree.map(lambda leaf: leaf[0, 0, 0], swept.params)
    for b, grid in enumerate(grids):
        small = by_max(params, grid)
        metrics = evaluate(jaxclip.decompress(small))
        close(swept.metrics["test"][0, 0, 0, b], np.asarray(metrics["test"]))
        assert swept.file_bytes[0, 0, 0, b] == checkpoints.size_report(small).total_bytes
    assert [row.bits for row in swept.rows()] == list(grids)
    assert jaxclip.sweeps.SweepResult.from_json(swept.to_json()).bits == grids
    assert "2 bits, balanced" in str(swept)


BUDGETS = [5000, 1550, 300]


@pytest.fixture(scope="module")
def shipped():
    changes = FEW | {"bits": ("ternary",), "compress": by_max, "step_sizes": [0.3], "seeds": 2}
    return run(**changes, budgets=BUDGETS, calibration=calibrate)


def test_a_budget_is_the_file_that_compress_makes(shipped, tmp_path):
    params = jax.tree.map(lambda leaf: leaf[0, 0, 1], shipped.params)
    measured = calibrate(params)
    for b, budget in enumerate(BUDGETS[:2]):
        small = jaxclip.compress(params, target_bytes=budget, calibration=measured)
        file = tmp_path / f"{budget}.safetensors"
        checkpoints.save(file, small, coding="lanes")
        loaded = jaxclip.decompress(checkpoints.load(file))
        assert shipped.file_bytes[0, 0, 1, 1 + b] == file.stat().st_size <= budget
        for name, value in evaluate(loaded).items():
            close(shipped.metrics[name][0, 0, 1, 1 + b], np.asarray(value))


def test_a_budget_out_of_reach_is_a_row_that_says_so_with_the_least(shipped):
    (row,) = (row for row in shipped.rows() if row.budget == 300)
    assert row.is_out_of_reach
    assert np.isnan(row.metric)
    assert 300 < row.file_bytes < 1550
    (line,) = (line for line in str(shipped).splitlines() if "300 B" in line)
    assert "out of reach" in line
    assert not any(row.is_out_of_reach for row in (*shipped.pareto(), shipped.recommend()))
    least = int(shipped.file_bytes[0, 0, 1, -1])
    one = jax.tree.map(lambda leaf: leaf[0, 0, 1], shipped.params)
    with pytest.raises(ValueError, match=f"target_bytes=300 is out of reach: {least} was"):
        jaxclip.compress(one, target_bytes=300, calibration=calibrate(one))


def test_without_a_reachable_budget_the_error_has_the_least():
    swept = run(**(FEW | {"bits": (), "step_sizes": [0.1]}), budgets=[200, 300])
    least = int(swept.file_bytes.max())
    with pytest.raises(ValueError, match=f"budget is out of reach, .* is {least:,} bytes"):
        swept.recommend()


def test_a_diverged_row_has_no_file_and_stops_no_other():
    changes = FEW | {"bits": (), "optimizer": optax.sgd, "step_sizes": [0.1, 1e25]}
    swept = run(**changes, budgets=[5000], calibration=calibrate)
    assert swept.is_diverged.ravel().tolist() == [False, True]
    assert np.isnan(swept.metrics["test"][..., 0]).ravel().tolist() == [False, True]
    assert swept.recommend(max_bytes=5000).step_size == 0.1


@pytest.mark.thorough
def test_halving_is_by_the_trained_weights_where_there_are_budgets_alone():
    changes = FEW | {"bits": (), "step_sizes": [1e-4, 0.1, 0.4], "record_every": 1}
    calls = []

    def counted(params):
        calls.append(params)
        return calibrate(params)

    halved = run(**changes, budgets=[5000], calibration=counted, schedule="halving")
    assert len(calls) == 3  # at the end, once for each row
    whole = run(**changes, budgets=[5000], calibration=calibrate)
    on = [not row.is_outranked for row in halved.rows()]
    assert on.count(True) == 1
    np.testing.assert_array_equal(halved.metrics["test"][on], whole.metrics["test"][on])


@pytest.mark.thorough
def test_an_interrupted_comparison_of_models_goes_on(tmp_path):
    changes = FEW | {"init_fn": MODELS, "step_sizes": [0.1], "bits": (), "directory": tmp_path}
    changes |= {"budgets": [5000], "calibration": calibrate}
    first = run(**changes)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["model-0", "model-1"]
    again = run(**changes)
    np.testing.assert_array_equal(again.seconds_per_step, first.seconds_per_step)
    for change, name in (
        ({"calibration": lambda params: calibration.measure(apply, params, [BATCH])}, "evaluation"),
        ({"budgets": [6000]}, "budgets"),
        ({"densities": [0.5]}, "density"),
        ({"init_fn": {"wide": init_fn, "other": narrow}}, "model"),
    ):
        with pytest.raises(ValueError, match=f"another sweep: .*{name}"):
            run(**(changes | change))


BAD = [
    ({"densities": [0.5, 0.0]}, ValueError, r"densities\[1\] must be positive"),
    ({"densities": [1.5]}, ValueError, r"densities\[0\] must be in \[0, 1\]"),
    ({"densities": [float("nan")]}, ValueError, r"densities\[0\] must be positive"),
    ({"densities": [True]}, TypeError, r"densities\[0\] must be"),
    ({"densities": []}, ValueError, "densities must have at least one number"),
    ({"weight_decays": [-0.1]}, ValueError, r"weight_decays\[0\] must be"),
    ({"weight_decays": [0.1, 0.1]}, ValueError, "weight_decays .* none twice"),
    ({"budgets": [100, 0]}, ValueError, r"budgets\[1\] must be an integer of at least 1"),
    ({"budgets": [True]}, ValueError, r"budgets\[0\] must be an integer"),
    ({"budgets": [1e4]}, ValueError, r"budgets\[0\] must be an integer"),
    ({"budgets": [9, 9]}, ValueError, "budgets must have no number twice"),
    ({"budgets": 9000}, TypeError, "budgets must be sizes of files"),
    ({"calibration": calibrate}, ValueError, "calibration is for files within budgets"),
    ({"budgets": [9000], "calibration": [BATCH]}, TypeError, "calibration must be a function"),
    ({"bits": (jaxclip.Grid(None),)}, ValueError, "bits must be one of"),
    ({"bits": jaxclip.Grid(2)}, TypeError, "bits must be widths"),
    ({"init_fn": {}}, ValueError, "init_fn must have at least one model"),
    ({"init_fn": {128: init_fn}}, TypeError, "names of models, got 128"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_axes_are_named(change, error, message):
    with pytest.raises(error, match=message):
        run(**change)


@pytest.mark.parametrize("max_bytes", [0, True, 1.5, float("nan")])
def test_a_limit_that_is_no_size_is_named(shipped, max_bytes):
    with pytest.raises(ValueError, match="max_bytes must be an integer of at least 1"):
        shipped.recommend(max_bytes=max_bytes)
