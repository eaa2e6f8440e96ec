"""Batches that are drawn from arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclip.sweeps.tasks import random_batches


def test_batches_are_drawn_from_all_examples_and_bad_data_is_named():
    draws = random_batches({"x": jnp.arange(8.0)}, 400)(jax.random.key(0))["x"]
    assert set(np.asarray(draws)) == set(range(8))
    with pytest.raises(ValueError, match="one length, not 0, got"):
        random_batches((jnp.zeros(3), jnp.zeros(4)), 2)
    with pytest.raises(ValueError, match="one length, not 0"):
        random_batches(jnp.zeros((0, 3)), 2)
    with pytest.raises(ValueError, match="batch_size"):
        random_batches(jnp.zeros(3), 0)
