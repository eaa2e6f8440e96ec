"""An Optuna study is told what a sweep of the same settings says, and keeps it."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxclip
from jaxclip.sweeps.optuna import search_with_optuna

optuna = pytest.importorskip("optuna")
optuna.logging.set_verbosity(optuna.logging.ERROR)

GOAL = np.linspace(-0.3, 0.5, 512, dtype=np.float32).reshape(64, 8)


def optimizer(step_size):
    return jaxclip.sign_sgd(step_size)


COMMON = {
    "seeds": 2,
    "stop": jaxclip.max_steps(20),
    "evaluate": lambda w: {"error": jnp.mean((w - GOAL) ** 2)},
    "metric": "error",
    "mode": "min",
    "bits": (None, 4, "ternary"),
    "devices": jax.devices()[:1],
}
TASK = (
    lambda w, noise: jnp.mean((w - GOAL + noise) ** 2),
    lambda key: jnp.zeros((64, 8)),
    optimizer,
    lambda key: 0.1 * jax.random.normal(key, (64, 8)),
)


def search(study, **changes):
    ranges = {"step_sizes": (1e-3, 1e-1), "thresholds": (0.1, 1.0), "trials_at_once": 4}
    search_with_optuna(study, *TASK, **(COMMON | ranges | {"num_trials": 6} | changes))


def new_study(directions=("minimize", "minimize"), **arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = optuna.samplers.RandomSampler(seed=0)
        return optuna.create_study(directions=list(directions), sampler=sampler, **arguments)


def test_trials_have_the_values_of_a_sweep_and_are_in_the_storage(tmp_path):
    storage = f"sqlite:///{tmp_path}/study.db"
    search(new_study(storage=storage, study_name="boxes"))
    kept = optuna.load_study(storage=storage, study_name="boxes")
    assert len(kept.trials) == 6
    assert kept.best_trials
    names = ["as trained", "4", "ternary"]
    for trial in kept.trials[:1] + kept.trials[-1:]:  # of the first chunk, and of the last
        swept = jaxclip.sweep(
            *TASK,
            step_sizes=[trial.params["step_size"]],
            thresholds=[trial.params["threshold"]],
            progress=False,
            **COMMON,
        )
        row = swept.rows()[names.index(trial.params["bits"])]
        np.testing.assert_allclose(trial.values, [row.metric, row.file_bytes], rtol=1e-5)
        assert trial.user_attrs["standard_error"] == pytest.approx(row.standard_error, rel=1e-3)


def test_a_diverged_trial_fails():
    study = new_study()
    search(study, step_sizes=(1e3, 1e4), thresholds=(1e5, 1e6), num_trials=2, bits=(None,))
    assert {trial.state for trial in study.trials} == {optuna.trial.TrialState.FAIL}


BAD = [
    ({"step_sizes": (0.1, 0.01)}, r"step_sizes must be \(least, largest\)"),
    ({"step_sizes": (0.0, 0.01)}, r"step_sizes\[0\]"),
    ({"thresholds": (0.1, np.inf)}, r"thresholds\[1\]"),
    ({"num_trials": 0}, "num_trials"),
    ({"mode": "max"}, r"directions \['MAXIMIZE', 'MINIMIZE'\], got \['MINIMIZE', 'MINIMIZE'\]"),
    ({"metric": "accuracy"}, "no 'accuracy'"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        search(new_study(), **change)
