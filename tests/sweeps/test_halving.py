"""Successive halving: the best third goes on, with the numbers it would have had anyway."""

import jax
import numpy as np
import pytest

import jaxclip
from jaxclip.sweeps.chunks import halving_rungs
from oracles.small_sweeps import momentum, run

NUM_STEPS = 18
STEP_SIZES = [1e-4, 0.01, 0.03, 0.1, 0.2, 0.4, 0.8]
COMMON = {
    "stop": jaxclip.max_steps(NUM_STEPS),
    "step_sizes": STEP_SIZES,
    "thresholds": [0.5, np.inf],
    "bits": (None, "ternary"),
    "record_every": 1,
    "mode": "min",
}
OUTRANKED = jaxclip.training.StopReason.OUTRANKED


def judged(num_steps, common):
    """Metric at the last width of a sweep of the first steps, for each setting."""
    # The step size falls by the step, not by the number of steps, so the beginnings are equal.
    short = run(**(common | {"stop": jaxclip.max_steps(num_steps)}))
    return short.metrics["test"][..., -1].mean(axis=2).ravel()


@pytest.mark.thorough
@pytest.mark.parametrize("change", [{}, {"loop": "host"}, {"devices": jax.devices()[:2]}])
def test_the_best_third_at_the_last_width_goes_on_with_equal_numbers(change):
    common = COMMON | change
    whole, halved = run(**common), run(**common, schedule="halving")
    on = np.arange(14)
    for num_steps, num_on in ((2, 5), (6, 2)):
        costs = judged(num_steps, common)
        left = on[np.argsort(costs[on], kind="stable")[num_on:]]
        on = np.setdiff1d(on, left)
        assert (halved.steps.reshape(14, 2)[left] == num_steps).all()
        short = run(**(common | {"stop": jaxclip.max_steps(num_steps)}))
        for mine, one in zip(
            jax.tree.leaves(halved.params), jax.tree.leaves(short.params), strict=True
        ):
            flat = (14, *mine.shape[2:])
            np.testing.assert_array_equal(mine.reshape(flat)[left], one.reshape(flat)[left])
    is_out = np.asarray([row.is_outranked for row in halved.rows()]).reshape(14, 2)
    assert is_out.tolist() == [[i not in on] * 2 for i in range(14)]
    for mine, one in zip(
        jax.tree.leaves(halved.params), jax.tree.leaves(whole.params), strict=True
    ):
        flat = (14, *mine.shape[2:])
        np.testing.assert_array_equal(mine.reshape(flat)[on], one.reshape(flat)[on])
    for name in ("loss", "weight_clip_rate", "file_bytes", "steps", "reason_codes"):
        mine, one = (np.asarray(getattr(x, name)) for x in (halved, whole))
        flat = (14, *mine.shape[2:])
        np.testing.assert_array_equal(mine.reshape(flat)[on], one.reshape(flat)[on])
    np.testing.assert_array_equal(
        halved.metrics["test"].reshape(14, 2, 2)[on], whole.metrics["test"].reshape(14, 2, 2)[on]
    )


def test_settings_that_were_stopped_say_so_and_are_not_recommended(tmp_path):
    few = COMMON | {"step_sizes": [1e-4, 0.1, 0.4], "thresholds": [0.5], "seeds": 1}
    few |= {"bits": (None,), "directory": tmp_path}
    halved = run(**few, schedule="halving")
    rows = halved.rows()
    assert [row.is_outranked for row in rows].count(False) == 1
    for i, row in enumerate(rows):
        assert (halved.reason(i, 0) is OUTRANKED) == row.is_outranked
    assert [row.is_outranked for row in halved.pareto()] == [False]
    assert not halved.recommend(1e9).is_outranked
    assert str(halved).splitlines()[0].endswith("outranked")
    again = run(**few, schedule="halving")  # from the folder
    np.testing.assert_array_equal(again.seconds_per_step, halved.seconds_per_step)
    assert again.reason_codes.tolist() == halved.reason_codes.tolist()
    with pytest.raises(ValueError, match="another sweep: schedule"):
        run(**few)


def test_a_setting_whose_metric_is_nan_does_not_go_on():
    few = COMMON | {"step_sizes": [1e30, 0.1, 0.2], "thresholds": [np.inf], "bits": (None,)}
    halved = run(**few, schedule="halving", optimizer=lambda a: momentum(a**4))
    assert halved.steps[0].max() < NUM_STEPS
    assert [row.is_outranked for row in halved.rows()].count(True) == 2


@pytest.mark.parametrize(
    ("every", "num_steps", "rungs"), [(2, 100, [6, 17]), (1, 3, [1]), (1, 1, []), (5, 12, [1])]
)
def test_rungs_are_at_the_records_after_a_ninth_and_a_third(every, num_steps, rungs):
    assert halving_rungs([*range(every, num_steps, every), num_steps]) == rungs


def test_a_schedule_with_chunks_is_refused():
    with pytest.raises(ValueError, match=r"schedule compares all 2 settings, .* chunks of 1"):
        run(**(COMMON | {"step_sizes": [0.1]}), schedule="halving", chunk_size=1)
    with pytest.raises(ValueError, match="schedule"):
        run(**COMMON, schedule="third")
