"""Updates whose rounded sum with the weights is within bounds."""

import jax.numpy as jnp
import numpy as np

from jaxclip._core.updates import clip_modulus, is_unbounded, update_between, update_within


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
