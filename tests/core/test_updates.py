"""Updates whose rounded sum with the weights is within bounds."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxclip._core.updates import (
    clip_modulus,
    clip_sum,
    is_unbounded,
    update_between,
    update_within,
)


def test_only_a_number_that_is_infinite_is_known_to_bound_nothing():
    assert is_unbounded(float("inf"))
    assert not any(is_unbounded(b) for b in (2.0, 0.0, jnp.asarray(np.inf)))


def test_an_update_to_a_bound_is_corrected_where_the_sum_would_end_beyond_it():
    w = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, 4096), jnp.bfloat16)
    bound = jnp.asarray(0.1, jnp.bfloat16)
    target = clip_modulus(w, bound)
    v = update_between(w, w, target, -bound, bound)
    assert np.all(np.abs(np.asarray(w + v, np.float32)) <= np.float32(bound))


def test_an_update_that_stays_within_the_bound_keeps_its_bits():
    w, u = jnp.asarray([0.25, 0.25]), jnp.asarray([1.0, 0.125])
    assert update_within(u, w, 0.5).tolist() == [0.25, 0.125]
    assert update_within(u, w, float("inf")) is u


@pytest.mark.parametrize(
    "bound", [0.3, 1e-30, 0.0, 2.0**-128, float("inf"), jnp.asarray(0.3)], ids=str
)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.complex64])
def test_a_sum_is_clipped_like_any_weight(dtype, bound):
    rng = np.random.default_rng(0)
    w, u = (jnp.asarray(rng.normal(size=512).astype(dtype)) for _ in range(2))
    special = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 0.3, -0.3])
    w = w.at[: special.size].set(special.astype(dtype))
    u = u.at[: special.size].set(np.zeros((), dtype))
    clipped = jax.jit(lambda w, u: (clip_sum(w + u, bound), clip_modulus(w + u, bound)))(w, u)
    assert np.asarray(clipped[0]).tobytes() == np.asarray(clipped[1]).tobytes()
