"""Values that arrive late: from a schedule, or through `optax.inject_hyperparams`.

A schedule gives a real floating scalar or is refused by the name of its argument, when the update
is traced. Functions that are no schedules (rules, masks, projections) work where they are named
as static, and are refused where `inject_hyperparams` calls them with the step.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxclip
from jaxclip import gradients, lowbit, sign, thresholds, weights
from jaxclip.thresholds.values import is_rule_factory
from jaxclip.weights.projections import Projection
from oracles.quick import quick_first

PARAMS = {"kernel": jnp.full((2, 3), 5.0), "scale": jnp.asarray(0.5)}
UPDATES = jax.tree.map(jnp.ones_like, PARAMS)
SGD = optax.sgd(1.0)
inject = optax.inject_hyperparams


def update_shapes(tx: Any) -> Any:
    """The updates and the state after a step, as shapes: nothing is compiled."""
    return jax.eval_shape(lambda p: tx.update(UPDATES, tx.init(p), p), PARAMS)


# --- Schedules ------------------------------------------------------------------------

# Argument -> transforms with a schedule for it; `test_values.py` finds these in the docstrings.
SCHEDULED = {
    "clipping": [jaxclip.adaptive_grad_clip],
    "drop_norm": [lambda x: gradients.skip_or_clip(SGD, drop_norm=x)],
    "high": [lambda x: jaxclip.project_weights(jaxclip.box(-1.0, x))],
    "kappa": [lambda x: jaxclip.clip_by_value(jaxclip.fan_in(x))],
    "learning_rate": [jaxclip.lion, jaxclip.sign_sgd, jaxclip.signum],
    "low": [lambda x: jaxclip.project_weights(jaxclip.box(x, 1.0))],
    "max_abs": [jaxclip.clip_by_value],
    "max_norm": [
        jaxclip.clip_by_global_norm,
        jaxclip.clip_by_leaf_norm,
        gradients.clip_by_spectral_norm,
        lambda x: gradients.adagc(max_norm=x),
        lambda x: gradients.zclip(max_norm=x),
        lambda x: gradients.skip_or_clip(SGD, max_norm=x),
    ],
    "max_residual": [
        lambda x: gradients.error_feedback(jaxclip.clip_by_value(1.0), max_residual=x)
    ],
    "num_deviations": [lambda x: gradients.skip_or_clip(SGD, num_deviations=x)],
    "relative_to": [lambda x: jaxclip.sign_sgd(0.1, relative_to=x)],
    "scale": [gradients.smooth_clip],
    "temperature": [lambda x: jaxclip.sign_sgd(0.1, sign=sign.soft_sign(x))],
    "threshold": [
        jaxclip.clip_by_block_rms,
        lambda x: jaxclip.project_weights(jaxclip.box(x)),
        lambda x: jaxclip.project_weights(weights.max_norm(x)),
        lambda x: jaxclip.project_weights(weights.spectral_cap(x)),
    ],
    "weight_decay": [
        sign.cautious_decay,
        lambda x: jaxclip.lion(0.1, weight_decay=x),
        lambda x: jaxclip.signum(0.1, weight_decay=x),
    ],
}
every_scheduled = pytest.mark.parametrize(
    ("name", "make"), [(name, make) for name, makes in SCHEDULED.items() for make in makes]
)
NO_SCALAR = [
    (lambda step: jnp.ones(1), r"shape \(1,\)"),
    (lambda step: np.ones(3, np.float32), r"shape \(3,\)"),
    (lambda step: [1.0], "got"),
    (lambda step: None, "None"),
    (lambda step: step > 3, "bool"),
    (lambda step: True, "True"),
    (lambda step: jnp.complex64(1), "complex"),
    (lambda step: "1.0", "'1.0'"),
    (lambda step: step, "int32"),
    (lambda step: np.int64(3), "got int"),
]


@every_scheduled
def test_a_schedule_whose_value_is_no_real_scalar_is_refused_by_name(name, make):
    for schedule, said in NO_SCALAR:
        with pytest.raises((TypeError, ValueError), match=f"schedule {name}.* {said}"):
            update_shapes(make(schedule))


@every_scheduled
def test_a_schedule_may_give_python_numbers_and_choices_among_them(name, make):
    expected = update_shapes(make(0.5))[0]
    for schedule in (
        lambda step: 1,
        lambda step: 0.5,
        lambda step: jnp.where(step < 3, 1, 2),
        lambda step: jnp.bfloat16(0.5),
    ):
        assert update_shapes(make(schedule))[0] == expected


def test_a_schedule_in_a_prefix_tree_is_refused_with_its_path():
    tx = jaxclip.clip_by_value({"kernel": 1.0, "scale": lambda step: jnp.ones(1)})
    with pytest.raises(ValueError, match=r"max_abs at 'scale' .*\(1,\)"):
        update_shapes(tx)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (gradients.zclip, "warmup"),
        (gradients.adagc, "warmup"),
        (functools.partial(gradients.skip_or_clip, SGD), "num_warmup"),
        (functools.partial(gradients.skip_or_clip, SGD), "max_consecutive"),
        (functools.partial(jaxclip.keep_on_grid, SGD, jaxclip.Grid(4)), "start_step"),
    ],
)
def test_a_traced_count_is_an_integer_scalar(make, name):
    for bad in (jnp.ones(1, jnp.int32), jnp.float32(3)):
        with pytest.raises(ValueError, match=f"^{name} must be an integer"):
            make(**{name: bad})
    update_shapes(make(**{name: jnp.int32(3)}))


# --- Functions that are no schedules, under inject_hyperparams ------------------------

RULE_FACTORIES = [name for name in dir(thresholds) if is_rule_factory(getattr(thresholds, name))]
PROJECTION_FACTORIES = [
    name
    for name, made in vars(weights).items()
    if getattr(made, "__annotations__", {}).get("return") is Projection
]
SIGN_FACTORIES = ("soft_sign", "stochastic_sign", "scaled_sign")
RULES = [
    thresholds.max_abs(),
    thresholds.percentile_abs(99),
    thresholds.std_multiple(1.0),
    thresholds.mse_optimal(4),
    thresholds.least_squares(4),
    thresholds.rate_optimal(4.0),
    thresholds.fan_in(1.0),
    thresholds.per_tree(thresholds.max_abs()),
]
TAKES_RULES = {
    "max_abs": jaxclip.clip_by_value,
    "max_norm": jaxclip.clip_by_leaf_norm,
    "threshold": jaxclip.clip_by_block_rms,
    "relative_to": functools.partial(jaxclip.lion, 0.1),
    "max_residual": functools.partial(gradients.error_feedback, jaxclip.clip_by_value(1.0)),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_a_rule_that_is_called_with_the_step_is_refused(rule):
    for name, make in TAKES_RULES.items():
        with pytest.raises(TypeError, match=r"the rule \w+ must be given .*static_args"):
            inject(make)(**{name: rule}).init(PARAMS)


@pytest.mark.parametrize("name", TAKES_RULES)
def test_a_rule_that_is_named_as_static_works_as_without_injection(name):
    make = TAKES_RULES[name]
    tx, rule = inject(make, static_args=name)(**{name: thresholds.fan_in(1.0)}), {}
    rule[name] = thresholds.fan_in(1.0)
    updates, _ = tx.update(UPDATES, tx.init(PARAMS), PARAMS)
    plain = make(**rule)
    expected, _ = plain.update(UPDATES, plain.init(PARAMS), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


@pytest.mark.parametrize(
    "projection",
    [
        jaxclip.box(1.0),
        jaxclip.box(thresholds.fan_in(1.0)),
        jaxclip.box(-1.0, 1.0),
        weights.max_norm(1.0),
        weights.unit_norm(),
        weights.spectral_cap(1.0),
    ],
    ids=lambda projection: type(projection).__name__,
)
def test_a_projection_that_is_called_with_the_step_is_refused(projection):
    message = "the projection must be given an array.*static_args"
    with pytest.raises(TypeError, match=message):
        inject(jaxclip.project_weights)(projection).init(PARAMS)
    with pytest.raises(TypeError, match=message):
        inject(jaxclip.clip_by_value)(projection).init(PARAMS)
    update_shapes(inject(jaxclip.project_weights, static_args="projection")(projection))


@pytest.mark.parametrize(
    "mask",
    [
        weights.kernels_only,
        lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        lambda params: jax.tree.map(lambda x: x.ndim < 2, params),
        lambda params: jax.tree.map(lambda x: jnp.asarray(x.ndim > 1), params),
    ],
    ids=["kernels_only", "kernels", "vectors", "arrays"],
)
@pytest.mark.parametrize(
    "make",
    [
        functools.partial(jaxclip.lion, 0.1),
        functools.partial(jaxclip.signum, 0.1),
        functools.partial(jaxclip.project_weights, jaxclip.box(1.0)),
    ],
    ids=["lion", "signum", "project_weights"],
)
def test_a_mask_that_is_called_with_the_step_is_refused(make, mask):
    with pytest.raises(TypeError, match=r"(mask|kernels_only) must .*static_args"):
        inject(make)(mask=mask).init(PARAMS)
    inject(make, static_args="mask")(mask=mask).init(PARAMS)


FACTORIES = [
    *((jaxclip.clip_by_value, "max_abs", getattr(thresholds, name)) for name in RULE_FACTORIES),
    *(
        (jaxclip.project_weights, "projection", getattr(weights, name))
        for name in PROJECTION_FACTORIES
    ),
    *((jaxclip.scale_by_sign, "sign", getattr(sign, name)) for name in SIGN_FACTORIES),
    (functools.partial(jaxclip.keep_on_grid, SGD, 4), "rule", thresholds.max_abs),
]


@pytest.mark.parametrize(("make", "argument", "factory"), FACTORIES)
def test_a_factory_that_is_called_with_the_step_is_refused_by_name(make, argument, factory):
    message = f"^{factory.__name__} must be given no step, got .*static_args"
    with pytest.raises(TypeError, match=message):
        inject(make)(**{argument: factory}).init(PARAMS)


def test_a_count_that_must_be_known_says_how_to_keep_it_from_being_traced():
    for make, name in (
        (functools.partial(jaxclip.adaptive_grad_clip, 0.1), "axis"),
        (functools.partial(jaxclip.clip_by_leaf_norm, 1.0), "stacked_axes"),
        (functools.partial(jaxclip.clip_by_global_norm, 1.0), "ord"),
        (gradients.autoclip, "window"),
        (functools.partial(jaxclip.keep_on_grid, SGD), "bits"),
        (functools.partial(lowbit.low_bit_momentum, SGD), "bits"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{name} must be .*static_args"):
            update_shapes(inject(make)(**{name: 1}))


@pytest.mark.parametrize("wrap", [lambda f: f, pytest.param(jax.jit, marks=pytest.mark.thorough)])
@pytest.mark.parametrize(
    "make",
    quick_first(
        [
            lambda t: gradients.clip_update_relative(t, t),
            gradients.adagc,
            gradients.zclip,
            gradients.clip_spikes,
            gradients.clip_by_spectral_norm,
            jaxclip.adaptive_grad_clip,
            jaxclip.clip_by_block_rms,
            lambda t: jaxclip.sign_sgd(0.1, relative_to=t),
        ]
    ),
)
def test_a_number_beyond_float32_is_infinity_without_a_warning(make, wrap):
    def update_by(number):
        tx, w = make(number), jnp.full((3, 4), 0.5)
        return wrap(lambda w: tx.update(w, tx.init(w), w)[0])(w)

    np.testing.assert_array_equal(update_by(1e300), update_by(np.inf))  # a warning is an error
