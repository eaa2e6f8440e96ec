"""Moments of models are those of inputs captured by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxclip.calibration import Calibration, InputMoments, measure

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def measured(apply_fn: Any, params: Any, *batches: Any, **options: Any) -> Calibration:
    return measure(apply_fn, params, batches, progress=False, **options)


def check(moments: InputMoments, captured: Any, share: float = 1.0, **view: Any) -> None:
    """Compares moments with captured inputs (stack, samples, inputs), in float64."""
    x = np.asarray(captured, np.float64)
    x = x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])
    second = np.einsum("sni,snj->sij", x, x) * share
    if moments.is_diagonal:
        second = np.einsum("sii->si", second)
    scale = np.abs(second).max()
    np.testing.assert_allclose(moments.second, second, rtol=1e-5, atol=1e-5 * scale)
    np.testing.assert_allclose(moments.first, x.sum(1) * share, rtol=1e-5, atol=1e-5 * scale)
    np.testing.assert_allclose(moments.count, np.full(len(x), x.shape[1] * share), rtol=1e-6)
    for name, axes in view.items():
        assert getattr(moments.view, name) == axes, name


def test_a_dense_layer():
    params = {"kernel": draw(5, 3), "bias": draw(3)}
    x = draw(2, 7, 5)
    c = measured(lambda p, x: x @ p["kernel"] + p["bias"][None], params, x[0], x[1])
    assert list(c.moments) == ["kernel"]
    assert c.missing == ()
    check(c.moments["kernel"], x.reshape(14, 5), shape=(5, 3), stack=(), inputs=(0,), outputs=(1,))


def test_layers_after_each_other_see_what_the_first_gives():
    params = {"b": draw(4, 4), "a": draw(4, 4)}
    x = draw(6, 4)
    c = measured(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, x)
    check(c.moments["b"], np.tanh(x @ params["a"]))


def contract_repeated(w: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.einsum("bi,bio->bo", x, jnp.tile(w[None], (7, 1, 1)))


def contract_broadcast(w: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.einsum("bi,bio->bo", x, jnp.broadcast_to(w, (7, 5, 3)))


@jax.custom_vjp
def product(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


product.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: saved)


@jax.custom_jvp
def other_product(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


other_product.defjvp(lambda primals, tangents: (other_product(*primals), tangents[0]))

# By name: the shape of a weight of 5 inputs, a use of it, and its axis of inputs.
USES = {
    "transposed": ((3, 5), lambda w, x: x @ w.T, 1),
    "on the left": ((3, 5), lambda w, x: jnp.einsum("oi,bi->bo", w, x), 1),
    "cast": ((5, 3), lambda w, x: x @ w.astype(jnp.bfloat16).astype(jnp.float32), 0),
    "stopped": ((5, 3), lambda w, x: x @ lax.stop_gradient(w), 0),
    "behind a barrier": ((5, 3), lambda w, x: x @ lax.optimization_barrier((w, w))[0], 0),
    "a column": ((5, 1), lambda w, x: x @ w[:, 0], 0),
    "jitted": ((5, 3), lambda w, x: jax.jit(jnp.dot)(x, w), 0),
    "rematerialized": ((5, 3), lambda w, x: jax.checkpoint(jnp.dot)(x, w), 0),
    "custom vjp": ((5, 3), lambda w, x: product(x, w), 0),
    "custom jvp": ((5, 3), lambda w, x: other_product(x, w), 0),
    "vmapped over samples": ((5, 3), lambda w, x: jax.vmap(jnp.dot, (0, None))(x, w), 0),
    "repeated": ((5, 3), contract_repeated, 0),
    "broadcast": ((5, 3), contract_broadcast, 0),
    "heads": ((5, 2, 3), lambda w, x: jnp.einsum("bi,ihd->bhd", x, w), 0),
    "flattened heads": ((5, 2, 3), lambda w, x: x @ w.reshape(5, 6), 0),
    "heads apart": ((5, 6), lambda w, x: jnp.einsum("bi,ihd->hbd", x, w.reshape(5, 2, 3)), 0),
}


@pytest.mark.parametrize("use", USES)
def test_a_weight_is_followed_to_its_product(use: str):
    shape, function, axis = USES[use]
    x = draw(7, 5)
    c = measured(lambda p, x: function(p["w"], x), {"w": draw(*shape)}, x)
    outputs = tuple(i for i in range(len(shape)) if i != axis)
    check(c.moments["w"], x, shape=shape, stack=(), inputs=(axis,), outputs=outputs)


def test_an_axis_that_is_split_into_inputs_and_outputs():
    x = draw(7, 5)
    c = measured(lambda w, x: jnp.einsum("bi,oi->bo", x, w.reshape(3, 5)), draw(15, 1), x)
    check(c.moments[""], x, shape=(3, 5, 1), inputs=(1,), outputs=(0, 2))


def test_inputs_over_several_axes_are_in_the_order_of_the_weight():
    x, w = draw(7, 3, 2), draw(2, 3, 4)
    expected = x.transpose(0, 2, 1).reshape(7, 6)
    for function in (
        lambda w, x: jnp.einsum("bdh,hdo->bo", x, w),
        lambda w, x: x.transpose(0, 2, 1).reshape(7, 6) @ w.reshape(6, 4),
        lambda w, x: x.reshape(7, 6) @ w.transpose(1, 0, 2).reshape(6, 4),
    ):
        c = measured(function, w, x)
        check(c.moments[""], expected)
        assert c.moments[""].view.inputs in ((0, 1), (0,))


def test_a_scaled_weight_sees_scaled_inputs():
    x = draw(7, 5)
    for function in (lambda w: -3.0 * w, lambda w: w / (jnp.ones(()) * 2) * -6):
        c = measured(lambda w, x, f=function: x @ f(w), draw(5, 3), x)
        check(c.moments[""], -3 * x)


def test_parts_of_the_outputs_count_by_their_size():
    w, x, y = draw(5, 8), draw(7, 5), draw(9, 5)
    fused = measured(lambda w, x: [x @ part for part in jnp.split(w, (2, 6), axis=1)], w, x)
    check(fused.moments[""], x, shape=(5, 8), inputs=(0,))
    c = measured(lambda w, b: (b[0] @ w[:, :2], b[1] @ w[:, 2:]), w, (x, y))
    second = 0.25 * x.T @ x + 0.75 * y.T @ y
    np.testing.assert_allclose(c.moments[""].second[0], second, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(c.moments[""].count, [0.25 * 7 + 0.75 * 9])


def test_weights_that_are_joined_along_the_outputs_see_the_same_inputs():
    params = {name: draw(5, n) for n, name in ((3, "q"), (2, "k"), (3, "v"))}
    x = draw(7, 5)

    def apply(p, x):
        return jnp.split(x @ jnp.concatenate([p["q"], p["k"], p["v"]], axis=1), (3, 5), axis=1)

    c = measured(apply, params, x)
    assert c.missing == ()
    for name, w in params.items():
        check(c.moments[name], x, shape=w.shape, inputs=(0,), outputs=(1,))


def test_weights_that_are_joined_along_the_inputs_see_their_own():
    params = {"w": draw(5, 3), "u": draw(4, 3)}
    x, h = draw(7, 5), draw(7, 4)

    def apply(p, batch):
        joined = jnp.concatenate([p["u"], p["w"], jnp.ones((1, 3))])
        return jnp.concatenate([*batch, jnp.ones((7, 1))], axis=1) @ joined

    c = measured(apply, params, (h, x))
    check(c.moments["u"], h)
    check(c.moments["w"], x)


def test_layers_that_are_stacked_by_the_model_see_their_own_inputs():
    w, x = [draw(4, 4), draw(1, 4, 4)[0], -draw(4, 4)], draw(6, 4)

    def apply(layers, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, jnp.stack(layers))[0]

    c = measured(apply, w, x)
    captured = [x, np.tanh(x @ w[0]), np.tanh(np.tanh(x @ w[0]) @ w[1])]
    for i, inputs in enumerate(captured):
        check(c.moments[str(i)], inputs, stack=(), inputs=(0,), outputs=(1,))


def test_a_weight_with_an_adapter_sees_its_inputs():
    params = {"w": draw(5, 4), "a": draw(5, 1), "b": draw(1, 4)}
    c = measured(lambda p, x: x @ (p["w"] - 2.0 * (p["a"] @ p["b"])), params, draw(7, 5))
    check(c.moments["w"], draw(7, 5), inputs=(0,))
    assert c.missing == ("a", "b")


def test_axes_may_be_back_to_front():
    w, x = draw(2, 3, 4), draw(7, 6)
    c = measured(lambda w, x: x @ w[::-1].reshape(6, 4)[:, ::-1], w, x)
    check(c.moments[""], x.reshape(7, 2, 3)[:, ::-1].reshape(7, 6), inputs=(0, 1), outputs=(2,))
    stacked = measured(lambda w, x: jnp.einsum("sni,sio->sno", x, w[::-1]), w, draw(2, 7, 3))
    check(stacked.moments[""], draw(2, 7, 3)[::-1], stack=(0,))


def test_layers_of_a_scan_have_a_matrix_each():
    w, x = draw(3, 4, 4), draw(6, 4)

    def apply(params, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0]

    captured = [x]
    for layer in w[:-1]:
        captured.append(np.tanh(captured[-1] @ layer))
    for function in (apply, jax.checkpoint(apply), jax.jit(apply)):
        c = measured(function, {"layers": w}, x)
        check(c.moments["layers"], captured, stack=(0,), inputs=(1,), outputs=(2,))


def unrolled(w: jax.Array, x: jax.Array) -> jax.Array:
    for i in range(len(w)):
        x = jnp.tanh(x @ w[i])
    return x


def fori(w: jax.Array, x: jax.Array) -> jax.Array:
    return lax.fori_loop(0, len(w), lambda i, x: jnp.tanh(x @ w[i]), x)


def fori_of_traced_length(w: jax.Array, x: jax.Array) -> jax.Array:
    n = jnp.int32(3) + jnp.int32(0) * x[0, 0].astype(jnp.int32)
    return lax.fori_loop(0, n, lambda i, x: jnp.tanh(x @ w[i]), x)


def carried(w: jax.Array, x: jax.Array) -> jax.Array:
    def body(state):
        i, w, x = state
        return i + 1, w, jnp.tanh(x @ lax.dynamic_index_in_dim(w, i, keepdims=False))

    return lax.while_loop(lambda state: state[0] < 3, body, (0, w, x))[2]


def nested(w: jax.Array, x: jax.Array) -> jax.Array:
    def one(x, w):
        return jnp.tanh(x @ w), None

    return lax.scan(lambda x, ws: (lax.scan(one, x, ws)[0], None), x, w.reshape(3, 1, 4, 4))[0]


def in_two_parts(w: jax.Array, x: jax.Array) -> jax.Array:
    for part in jnp.split(w, (1,)):
        x = unrolled(part, x)
    return x


@pytest.mark.parametrize(
    "function", [unrolled, fori, fori_of_traced_length, carried, nested], ids=lambda f: f.__name__
)
def test_layers_of_a_stack_have_a_matrix_each(function: Any):
    w, x = draw(3, 4, 4), draw(6, 4)
    captured = [x]
    for layer in w[:-1]:
        captured.append(np.tanh(captured[-1] @ layer))
    c = measured(function, w, x)
    check(c.moments[""], captured, stack=(0,), inputs=(1,), outputs=(2,))


def test_a_recurrent_weight_sees_all_steps():
    w, u, x = draw(4, 4), draw(5, 4), draw(7, 6, 5)

    def apply(params, x):
        def step(h, x):
            h = jnp.tanh(h @ params["w"] + x @ params["u"])
            return h, h

        return lax.scan(step, jnp.zeros((6, 4)), x)[1]

    states = [np.zeros((6, 4))]
    for inputs in x:
        states.append(np.tanh(states[-1] @ w + inputs @ u))
    c = measured(apply, {"w": w, "u": u}, x)
    check(c.moments["w"], np.concatenate(states[:-1]))
    check(c.moments["u"], x.reshape(42, 5))


def test_a_branch_counts_if_it_is_taken():
    w, x = {"a": draw(4, 4), "b": draw(4, 4)}, draw(6, 4)

    def apply(params, batch):
        is_first, x = batch
        return lax.cond(is_first, lambda x: x @ params["a"], lambda x: x @ params["b"] * 2.0, x)

    c = measured(apply, w, (True, x), (True, x), (False, x))
    check(c.moments["a"], np.concatenate([x, x]))
    check(c.moments["b"], x)


def test_experts_have_a_matrix_each():
    w, x = draw(3, 5, 2), draw(3, 7, 5)
    for function in (
        lambda w, x: jax.vmap(jnp.dot)(x, w),
        lambda w, x: jnp.einsum("nei,eio->neo", x.swapaxes(0, 1), w),
    ):
        check(measured(function, w, x).moments[""], x, stack=(0,), inputs=(1,), outputs=(2,))
    both = measured(lambda w, x: jnp.einsum("sni,eio->esno", x, w), w, x)
    check(both.moments[""], x.reshape(21, 5), stack=(), inputs=(1,), outputs=(0, 2))


def test_experts_with_rows_of_their_own():
    w, x, sizes = draw(3, 5, 2), draw(9, 5), np.array([2, 0, 6], np.int32)

    def apply(w, batch):
        return lax.ragged_dot(batch[0], w, batch[1])

    groups = (x[:2], x[:0], x[2:8])  # the last row is of none
    for max_dim in (8192, 4):
        m = measured(apply, w, (x, sizes), max_dim=max_dim).moments[""]
        assert (m.view.stack, m.view.inputs, m.view.outputs) == ((0,), (1,), (2,))
        np.testing.assert_array_equal(m.count, sizes)
        for i, rows in enumerate(groups):
            second = np.sum(rows**2, 0) if max_dim == 4 else rows.T @ rows
            np.testing.assert_allclose(m.second[i], second, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(m.first[i], rows.sum(0), rtol=1e-5, atol=1e-5)


LOOKUPS = {
    "indexed": lambda w, t: w[t],
    "taken": lambda w, t: jnp.take(w, t, axis=0),
    "cast": lambda w, t: w.astype(jnp.bfloat16)[t],
    "vmapped": lambda w, t: jax.vmap(lambda t: w[t])(t),
    "vmapped over scalars": lambda w, t: jax.vmap(jax.vmap(lambda t: w[t]))(t),
    "of the other axis": lambda w, t: jnp.take(w.T, t, axis=1),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_looked_up_rows_are_counted(name: str):
    tokens = np.array([[0, 2, 2], [5, -1, 2]])
    c = measured(LOOKUPS[name], draw(6, 3), tokens)
    m = c.moments[""]
    assert m.is_diagonal
    assert (m.view.stack, m.view.inputs, m.view.outputs) == ((), (0,), (1,))
    counts = [1, 0, 3, 0, 0, 2]
    np.testing.assert_array_equal(m.second, [counts])
    np.testing.assert_array_equal(m.first, [counts])
    np.testing.assert_array_equal(m.count, [6])


def test_indices_out_of_bounds_count_as_they_read():
    tokens = np.array([7, 0])
    c = measured(lambda w, t: jnp.take(w, t, axis=0, mode="clip"), draw(6, 3), tokens)
    np.testing.assert_array_equal(c.moments[""].second, [[1, 0, 0, 0, 0, 1]])
    c = measured(lambda w, t: jnp.take(w, t, axis=0, mode="fill"), draw(6, 3), tokens)
    np.testing.assert_array_equal(c.moments[""].second, [[1, 0, 0, 0, 0, 0]])


def test_rows_at_fixed_positions_are_counted_where_they_are_added():
    params = {"tokens": draw(6, 3), "positions": draw(9, 3)}

    def apply(p, t):
        return p["tokens"][t] + p["positions"][jnp.arange(t.shape[1])][None]

    c = measured(apply, params, np.zeros((2, 4), int))
    np.testing.assert_array_equal(c.moments["positions"].second, [[1, 1, 1, 1, 0, 0, 0, 0, 0]])
    permuted = measured(lambda w, x: x @ w[jnp.arange(5)], draw(9, 3), draw(7, 5))
    assert permuted.missing == ("",)


def test_a_tied_embedding_has_the_moments_of_its_product():
    w, tokens = draw(6, 3), np.array([[0, 2, 2]])
    c = measured(lambda w, t: jnp.tanh(w[t]) @ w.T, w, tokens)
    check(c.moments[""], np.tanh(w[tokens[0]]), inputs=(1,), outputs=(0,))
    assert "also looked up by index" in str(c)


def test_a_weight_used_twice_has_the_sum():
    w, x = draw(4, 4), draw(6, 4)
    c = measured(lambda w, x: jnp.tanh(x @ w) @ w, w, x)
    check(c.moments[""], np.concatenate([x, np.tanh(x @ w)]))


NOT_FOLLOWED = {
    "tanh": lambda w, x: x @ jnp.tanh(w),
    "mul": lambda w, x: x @ (w / jnp.sqrt(jnp.sum(w**2, 0, keepdims=True))),
    "div": lambda w, x: x @ (w / jnp.max(jnp.abs(w))),
    "dot_general": lambda w, x: x @ (w @ jnp.ones((4, 4))),
    "slice": lambda w, x: x[:, :2] @ w[:2] + x[:, 2:] @ w[2:],
    "concatenate": lambda w, x: x @ jnp.concatenate([w, w]).reshape(2, 4, 4).sum(0),
    "symmetric": lambda w, x: x @ (w + w.T),
    "centred": lambda w, x: x @ (w - jnp.mean(w, 0, keepdims=True)),
    "straight through": lambda w, x: x @ (w + lax.stop_gradient(jnp.round(w) - w)),
    "a row": lambda w, x: x[:, :1] @ w[:1],
    "add": lambda w, x: x + w[:1],
    "scan": lambda w, x: lax.scan(lambda c, _: ((c[0] @ c[1], c[1] * 2.0), None), (x, w), None, 2),
}


@pytest.mark.parametrize("name", NOT_FOLLOWED)
def test_a_weight_that_is_not_followed_is_missing_and_the_report_says_why(name: str):
    c = measured(lambda p, x: NOT_FOLLOWED[name](p["w"], x), {"w": draw(4, 4)}, draw(6, 4))
    assert c.missing == ("w",), c.moments
    assert "w" not in c.moments
    assert "not followed: " in str(c)


def test_a_weight_that_is_also_used_otherwise_is_noted():
    c = measured(lambda w, x: x @ w + jnp.sum(x * w), draw(4, 4), draw(4, 4))
    check(c.moments[""], draw(4, 4))
    assert dict(c.notes) == {"": "not followed: mul"}


def test_an_unused_weight_is_missing():
    c = measured(lambda p, x: x @ p["a"], {"a": draw(4, 4), "b": draw(4, 4)}, draw(6, 4))
    assert c.missing == ("b",)
    assert dict(c.notes) == {"b": "not used"}


def test_moments_above_max_dim_are_diagonal():
    x = draw(7, 5)
    c = measured(lambda w, x: x @ w, draw(5, 3), x, max_dim=4)
    assert c.moments[""].is_diagonal
    check(c.moments[""], x)


def test_half_precision_is_summed_in_float32():
    x = jnp.full((4096, 2), 1.0078125, jnp.bfloat16)
    c = measured(lambda w, x: x @ w, jnp.ones((2, 3), jnp.bfloat16), x)
    assert c.moments[""].second.dtype == jnp.float32
    np.testing.assert_allclose(c.moments[""].second, 4096 * 1.0078125**2, rtol=1e-4)


def test_the_error_does_not_grow_with_the_number_of_batches():
    x = np.full((1, 1), 0.1, np.float32)
    c = measure(lambda w, x: x @ w, np.ones((1, 1), np.float32), [x] * 3000, progress=False)
    exact = 3000 * np.float64(x[0, 0]) ** 2
    np.testing.assert_allclose(c.moments[""].second[0, 0], exact, rtol=1.2e-7)
    plain = np.float32(0)
    for _ in range(3000):
        plain += x[0, 0] ** 2
    assert abs(plain / exact - 1) > 1e-6  # what is gained


def test_calibrations_of_parts_of_the_data_add_up():
    w, x = draw(5, 3), draw(9, 5)
    apply = jnp.dot
    parts = [measured(lambda w, x: apply(x, w), w, part) for part in (x[:4], x[4:])]
    check((parts[0] + parts[1]).moments[""], x)


def test_a_policy_leaves_weights_out():
    params = {"a": draw(4, 4), "b": draw(4, 4)}
    c = measured(lambda p, x: x @ p["a"] @ p["b"], params, draw(6, 4), policy=[("a", None)])
    assert list(c.moments) == ["b"]
    assert c.missing == ()
    with pytest.raises(ValueError, match=r"policy has patterns that match no leaf: \['c'\]"):
        measured(lambda p, x: x @ p["a"], params, draw(6, 4), policy=[("c", None)])


BAD_BATCHES = {
    "none": ([], ValueError, "batches must hold at least one batch, got none"),
    "an array": (draw(6, 4), TypeError, "must be an iterable of batches, such as a list, got a nd"),
    "a dict": ({"x": 1}, TypeError, "must be an iterable of batches, such as a list, got a dict"),
    "structures": ([draw(6, 4), (draw(6, 4),)], ValueError, "one structure: batch 1 has"),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_batches_that_are_none_are_refused(case: str):
    batches, error, message = BAD_BATCHES[case]
    with pytest.raises(error, match=message):
        measure(lambda w, x: x @ w, draw(4, 4), batches, progress=False)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_inputs_that_are_not_finite_are_refused_by_path_and_batch(value: float):
    params = {"b": draw(4, 4), "a": draw(4, 4), "first": draw(4, 4)}
    bad = draw(6, 4)
    bad[2, 1] = value

    def apply(p, x):
        return jnp.tanh(x[0] @ p["first"] + x[1] @ p["a"]) @ p["b"]

    good = (draw(6, 4), draw(6, 4))
    message = r"inputs of params at 'a' must be finite.* batch 1 \(from 0\)"
    for batches in ([good, (good[0], bad)], [good, (good[0], bad), good, good]):
        with pytest.raises(ValueError, match=message):
            measured(apply, params, *batches)


def test_parameters_without_weights_are_refused():
    with pytest.raises(ValueError, match="params must have a floating leaf of at least two axes"):
        measured(lambda p, x: x * p["a"], {"a": 1.0, "b": np.arange(4)}, draw(4))


def test_another_use_of_weights_in_a_later_batch_is_refused():
    def apply(p, x):
        return x @ p["a"] if len(x) == 4 else x @ p["b"]

    params = {"a": draw(5, 5), "b": draw(5, 5)}
    with pytest.raises(ValueError, match=r"same weights in every batch, but not \['a'"):
        measured(apply, params, draw(4, 5), draw(6, 5))


def test_batches_of_other_shapes_and_an_iterator_are_taken():
    x, w = draw(9, 5), draw(5, 3)
    c = measure(lambda w, x: x @ w, w, iter([x[:4], x[4:7], x[7:]]), progress=False)
    check(c.moments[""], x)


def test_a_model_is_traced_once_for_each_shape():
    traced = []

    def apply(w, x):
        traced.append(x.shape)
        return x @ w

    measured(apply, draw(5, 3), *[draw(4, 5)] * 4, draw(2, 5), draw(2, 5))
    assert traced == [(4, 5), (2, 5)]


def test_sums_are_in_float64_for_inputs_in_float64():
    x = np.full((1000, 1), 0.1)
    with enable_x64(True):
        c = measured(lambda w, x: x @ w, np.ones((1, 2)), x)
        assert c.moments[""].second.dtype == jnp.float64
        np.testing.assert_allclose(c.moments[""].second, 10.0, rtol=1e-13)
