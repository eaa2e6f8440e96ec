"""Chains that do nothing or break a promise are found; sensible ones give no finding."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxclip
from jaxclip.training import Finding, lint
from oracles.quick import quick_first

PARAMS = {
    "w": jnp.asarray(0.02 * np.random.default_rng(0).standard_normal((6, 5)), jnp.float32),
    "v": jnp.asarray(0.02 * np.random.default_rng(1).standard_normal((2, 7)), jnp.float32),
    "b": jnp.zeros(4),
}
ABSTRACT = jax.eval_shape(lambda: PARAMS)
LABELS = {"w": "w", "v": "w", "b": "b"}
KERNELS, BIASES = {"w": True, "v": True, "b": False}, {"w": False, "v": False, "b": True}
CLIP = optax.clip_by_global_norm(1.0)
WARMUP = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 100, 1000)
ADAM, DESCENT = optax.scale_by_adam(), optax.scale(-0.1)
BOX = jaxclip.project_weights(jaxclip.box(1.0))
gradients, sign, weights = jaxclip.gradients, jaxclip.sign, jaxclip.weights


def rules_of(links: Any, params: Any = ABSTRACT) -> list[str]:
    return [finding.rule for finding in lint(links, params)]


# --- Found ----------------------------------------------------------------------------

WITHOUT_EFFECT = {
    "ours": [jaxclip.clip_by_global_norm(1.0), jaxclip.sign_sgd(1e-3)],
    "optax": [CLIP, optax.sign_sgd(1e-3)],
    "by entry": [optax.clip(1.0), optax.scale_by_sign(), optax.scale(-1e-3)],
    "learned": [gradients.autoclip(), optax.inject_hyperparams(jaxclip.sign_sgd)(1e-3)],
    "by leaf": [optax.clip_by_block_rms(1.0), jaxclip.sign_sgd(1e-3)],
    "smoothly": [gradients.smooth_clip(1.0), jaxclip.sign_sgd(1e-3)],
    "relative": [gradients.clip_update_relative(), jaxclip.sign_sgd(1e-3)],
    "around": [CLIP, jaxclip.skip_nonfinite(jaxclip.sign_sgd(1e-3))],
    "scaled in between": [CLIP, optax.scale(0.5), jaxclip.sign_sgd(1e-3)],
    "trust ratio": [CLIP, optax.scale_by_trust_ratio(), optax.scale(-1e-3)],
    "soft sign of a norm": [CLIP, jaxclip.scale_by_sign(sign.soft_sign())],
}
NOT_KEPT = {
    "scaled": [jaxclip.scale_by_sign(), BOX, optax.scale_by_learning_rate(0.1)],
    "warmed up": [
        jaxclip.project_weights(jaxclip.box(jaxclip.fan_in())),
        optax.scale_by_learning_rate(WARMUP),
    ],
    "masked": [optax.masked(BOX, KERNELS), DESCENT],
    "norms": [jaxclip.project_weights(weights.max_norm(1.0)), DESCENT],
    "adam": [BOX, optax.adam(1e-3)],
    "decayed": [BOX, optax.add_decayed_weights(1e-4)],
    "accumulated": [BOX, optax.trace(0.9)],
    "averaged": [jaxclip.lion(1e-3), jaxclip.project_weights(jaxclip.box(0.5)), optax.ema(0.9)],
}
FOUND = {
    "clip_without_effect": WITHOUT_EFFECT,
    "clip_never_acts": {
        "looser": [CLIP, jaxclip.clip_by_global_norm(2.0), optax.adam(1e-3)],
        "the same": [CLIP, optax.clip_by_global_norm(1.0), optax.adam(1e-3)],
        "scheduled": [
            jaxclip.clip_by_global_norm(lambda n: 1.0),
            jaxclip.clip_by_global_norm(2.0),
            optax.sgd(0.1),
        ],
        "learned twice": [gradients.autoclip(), gradients.zclip(), optax.adam(1e-3)],
        "skip behind a learned clip": [
            gradients.zclip(),
            gradients.skip_or_clip(optax.sgd(0.1), num_deviations=6),
        ],
        "skip out of reach": [CLIP, gradients.skip_or_clip(optax.sgd(0.1), drop_norm=10.0)],
    },
    "clip_of_a_group": {
        "masked": [optax.masked(jaxclip.clip_by_global_norm(1.0), KERNELS), optax.adam(1e-3)],
        "learned": [
            optax.partition({"w": gradients.autoclip(), "b": optax.identity()}, LABELS),
            optax.sgd(0.1),
        ],
    },
    "clip_counts_frozen": {
        "masked": [CLIP, optax.adam(1e-3), optax.masked(optax.set_to_zero(), BIASES)],
        "partition": [
            jaxclip.clip_by_global_norm(1.0),
            optax.partition({"w": optax.sgd(0.1), "b": optax.set_to_zero()}, LABELS),
        ],
    },
    "box_not_kept": NOT_KEPT,
    "decay_grows_weights": {
        "adam": [optax.adam(1e-3), optax.add_decayed_weights(1e-4)],
        "masked": [optax.sgd(0.1), optax.add_decayed_weights(1e-4, KERNELS)],
    },
    "skip_undone": {
        "moved": [jaxclip.skip_nonfinite(optax.identity()), optax.adam(1e-3)],
        "optax": [optax.apply_if_finite(optax.identity(), 5), optax.sgd(0.1, momentum=0.9)],
        "decayed": [
            jaxclip.skip_nonfinite(optax.sgd(0.1)),
            optax.add_decayed_weights(-0.1),
        ],
        "poisoned": [ADAM, jaxclip.skip_nonfinite(DESCENT)],
    },
    "feedback_without_units": {
        "sign": [gradients.error_feedback(jaxclip.scale_by_sign()), DESCENT],
        "optax": [gradients.error_feedback(optax.scale_by_sign()), DESCENT],
    },
}


@pytest.mark.parametrize(
    ("rule", "links"),
    [
        pytest.param(rule, links, id=f"{rule}-{name}", marks=[pytest.mark.thorough] * (i > 0))
        for rule, cases in FOUND.items()
        for i, (name, links) in enumerate(cases.items())
    ],
)
def test_a_useless_or_broken_chain_gives_exactly_its_finding(rule: str, links: Any):
    assert rules_of(links) == [rule]


# --- Not found ------------------------------------------------------------------------

SENSIBLE = {
    "adamw": [optax.adamw(1e-3)],
    "clip, adamw": [CLIP, optax.adamw(WARMUP)],
    "clip, lion": [jaxclip.clip_by_global_norm(1.0), jaxclip.lion(1e-3)],
    "clip, optax lion": [CLIP, optax.lion(1e-3)],
    "clip, signum": [CLIP, jaxclip.signum(1e-3)],
    "clip, scaled sign": [CLIP, jaxclip.scale_by_sign(sign.scaled_sign()), optax.sgd(0.1)],
    "clip by value, soft sign": [
        jaxclip.clip_by_value(1.0),
        jaxclip.sign_sgd(0.1, sign=sign.soft_sign()),
    ],
    "sign alone": [jaxclip.sign_sgd(1e-3)],
    "clip, sign of some leaves": [CLIP, optax.masked(optax.scale_by_sign(), KERNELS)],
    "momentum, clip": [optax.trace(0.9), CLIP, DESCENT],
    "clip, adam, clip": [CLIP, ADAM, CLIP, DESCENT],
    "two norms": [jaxclip.clip_by_global_norm(1.0, ord=1), CLIP, optax.adam(1e-3)],
    "two norms, the other way": [CLIP, jaxclip.clip_by_global_norm(1.0, ord=1), optax.adam(1e-3)],
    "entries, norm": [optax.clip(1.0), optax.clip_by_global_norm(100.0), optax.adam(1e-3)],
    "largest entry, norm": [
        jaxclip.clip_by_global_norm(1.0, ord=np.inf),
        optax.clip_by_global_norm(100.0),
        optax.adam(1e-3),
    ],
    "norms of leaves, norm": [
        jaxclip.clip_by_leaf_norm(1.0),
        optax.clip_by_global_norm(5.0),
        optax.adam(1e-3),
    ],
    "tighter": [optax.clip_by_global_norm(2.0), CLIP, optax.adam(1e-3)],
    "scheduled bounds": [
        jaxclip.clip_by_global_norm(optax.linear_schedule(1.0, 10.0, 1000)),
        jaxclip.clip_by_global_norm(2.0),
        optax.sgd(0.1),
    ],
    "guard around all": [jaxclip.skip_nonfinite(optax.chain(CLIP, jaxclip.lion(1e-3)))],
    "optax guard": [optax.apply_if_finite(optax.adam(1e-3), 5)],
    "guard, box": [jaxclip.skip_nonfinite(optax.adam(1e-3)), BOX],
    "clip, guard": [CLIP, jaxclip.skip_nonfinite(optax.adam(1e-3))],
    "skip or clip": [gradients.skip_or_clip(optax.adamw(1e-3), 10.0, 1.0, num_deviations=6.0)],
    "high clip, skip": [
        optax.clip_by_global_norm(100.0),
        gradients.skip_or_clip(optax.sgd(0.1), drop_norm=10.0),
    ],
    "fixed clip, zclip": [
        jaxclip.clip_by_global_norm(10.0),
        gradients.zclip(),
        optax.adam(1e-3),
    ],
    "box": [jaxclip.lion(1e-3), BOX],
    "clip, lion, box": [jaxclip.clip_by_global_norm(1.0), jaxclip.lion(1e-3), BOX],
    "norms": [jaxclip.lion(1e-3), jaxclip.project_weights(weights.max_norm(1.0))],
    "unit norms": [jaxclip.lion(1e-3), jaxclip.project_weights(weights.unit_norm())],
    "box, half a step": [jaxclip.lion(1e-3), BOX, optax.scale(0.5)],
    "two boxes": [
        jaxclip.lion(1e-3),
        jaxclip.project_weights(jaxclip.box(1.0), mask=weights.kernels_only),
        jaxclip.project_weights(jaxclip.box(2.0)),
    ],
    "box of some leaves": [jaxclip.lion(1e-3), optax.masked(BOX, KERNELS)],
    "accumulated box": [optax.MultiSteps(optax.chain(jaxclip.lion(1e-3), BOX), 4)],
    "guarded box": [optax.apply_if_finite(optax.chain(jaxclip.lion(1e-3), BOX), 4)],
    "injected": [optax.inject_hyperparams(optax.adamw)(WARMUP)],
    "accumulated": [optax.MultiSteps(optax.chain(CLIP, optax.adamw(1e-3)), 4)],
    "clip, partition": [
        CLIP,
        optax.partition({"w": optax.adam(1e-3), "b": optax.sgd(0.1)}, LABELS),
    ],
    "norms of leaves": [jaxclip.clip_by_leaf_norm(1.0), optax.adam(1e-3)],
    "norms of some leaves": [
        optax.masked(jaxclip.clip_by_leaf_norm(1.0), KERNELS),
        optax.adam(1e-3),
    ],
    "frozen group": [
        optax.partition(
            {"w": optax.chain(CLIP, optax.adam(1e-3)), "b": optax.set_to_zero()}, LABELS
        )
    ],
    "frozen by masks": [
        optax.masked(optax.chain(CLIP, optax.adam(1e-3)), KERNELS),
        optax.masked(optax.set_to_zero(), BIASES),
    ],
    "frozen in front": [optax.masked(optax.set_to_zero(), BIASES), CLIP, optax.adam(1e-3)],
    "mask of all": [
        optax.masked(optax.chain(CLIP, optax.adam(1e-3)), {"w": True, "v": True, "b": True})
    ],
    "feedback of a clip": [
        gradients.error_feedback(jaxclip.clip_by_value(1.0)),
        optax.sgd(0.1, momentum=0.9),
    ],
    "feedback of scaled signs": [
        gradients.error_feedback(jaxclip.scale_by_sign(sign.scaled_sign())),
        optax.sgd(0.1),
    ],
    "coupled decay": [CLIP, optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9)],
    "decay that knows the sign": [optax.adam(1e-3), optax.add_decayed_weights(-1e-6)],
    "ascent": [optax.scale(-1.0), optax.add_decayed_weights(1e-4), DESCENT],
    "vote": [jaxclip.scale_by_lion(), sign.majority_vote("x"), optax.scale(-1e-3)],
    "needs the value": [optax.polyak_sgd()],
    "cautious": [sign.cautious(optax.adamw(1e-3))],
    "lamb": [optax.lamb(1e-3)],
    "adafactor": [CLIP, optax.adafactor(1e-3)],
    "schedule free": [optax.contrib.schedule_free_adamw(1e-3)],
    "one's own": [CLIP, optax.stateless(lambda u, p: jax.tree.map(lambda x: -x, u))],
    "nothing": [optax.identity()],
    "no link": [],
    "frozen": [CLIP, optax.set_to_zero()],
}


# One for each rule that might say too much.
QUICK = [
    "clip, scaled sign",
    "momentum, clip",
    "entries, norm",
    "skip or clip",
    "two boxes",
    "accumulated box",
    "clip, partition",
    "frozen by masks",
    "feedback of a clip",
    "coupled decay",
    "vote",
    "no link",
]


@pytest.mark.parametrize(
    "links",
    [
        pytest.param(links, id=name, marks=[] if name in QUICK else [pytest.mark.thorough])
        for name, links in SENSIBLE.items()
    ],
)
def test_a_sensible_chain_gives_no_finding(links: Any):
    assert rules_of(links, PARAMS) == []


def test_links_that_cannot_be_run_are_passed_over():
    def fail(*args: Any) -> Any:
        raise RuntimeError("not here")

    broken = optax.GradientTransformation(fail, fail)
    no_update = optax.GradientTransformation(optax.init_empty_state, fail)
    assert rules_of([CLIP, broken], PARAMS) == []
    assert rules_of([CLIP, no_update, jaxclip.sign_sgd(1e-3)], PARAMS) == []
    assert rules_of([CLIP, jaxclip.sign_sgd(1e-3), broken], PARAMS) == ["clip_without_effect"]


# --- Steps that are lost --------------------------------------------------------------


def half(sigma: float = 0.02, dtype: Any = jnp.bfloat16) -> Any:
    w = np.random.default_rng(0).standard_normal((300, 100)) * sigma
    return {"w": jnp.asarray(w, dtype), "b": jnp.zeros(3, dtype)}


def share_said(findings: list[Finding]) -> float:
    (finding,) = findings
    assert finding.rule == "lost_steps"
    assert finding.where == ("leaf 'w'",)
    found = re.search(r"leaves (\d+)% of the weights", finding.message)
    assert found
    return int(found[1]) / 100


@pytest.mark.parametrize("step", quick_first([3e-5, 1e-4, 1e-5]))
@pytest.mark.parametrize("make", [jaxclip.lion, optax.adamw, jaxclip.sign_sgd])
def test_the_share_of_lost_steps_is_that_of_weights_with_wider_gaps(step: float, make: Any):
    params = half()
    w = np.abs(np.asarray(params["w"], np.float64))
    # Bfloat16 has 7 bits behind the first: numbers from 2**n on are 2**(n - 7) apart.
    gap = 2.0 ** (np.floor(np.log2(w)) - 7)
    said = share_said(lint([make(step)], params))
    assert abs(said - np.mean(gap / 2 > step)) < 0.03


@pytest.mark.thorough
def test_steps_that_move_the_weights_are_not_lost():
    assert rules_of([jaxclip.lion(1e-3)], half()) == []
    assert rules_of([jaxclip.lion(1e-5)], half(dtype=jnp.float32)) == []
    assert "float32" in lint([jaxclip.lion(1e-10)], half(dtype=jnp.float32))[0].message


def test_a_step_as_large_as_the_gradient_is_not_judged_by_a_small_gradient():
    assert rules_of([optax.sgd(1e-5)], half()) == []


@pytest.mark.thorough
@pytest.mark.parametrize(
    "make", [optax.adamw, optax.inject_hyperparams(jaxclip.lion), jaxclip.lion]
)
def test_a_schedule_counts_at_its_largest_and_a_step_of_zero_not_at_all(make: Any):
    def schedule(peak: float) -> Any:
        return optax.warmup_cosine_decay_schedule(0.0, peak, 100, 1000)

    assert rules_of([make(schedule(1e-3))], half()) == []
    assert share_said(lint([make(schedule(1e-5))], half())) > 0.8
    assert rules_of([make(0.0)], half()) == []


@pytest.mark.thorough
def test_a_small_leaf_that_never_moves_is_named():
    params = half() | {"scale": jnp.ones(8, jnp.bfloat16)}
    (finding,) = lint([jaxclip.lion(1e-3)], params)
    assert finding.where == ("leaf 'scale'",)
    assert "100% of 'scale' (bfloat16)" in finding.message
    assert "stochastic_rounding=True" in finding.message


def test_a_leaf_that_never_moves_is_found_beside_one_of_the_same_joined_name():
    params = half() | {"a": {"b": jnp.ones(8, jnp.bfloat16)}, "a/b": jnp.ones(8)}
    (finding,) = lint([jaxclip.lion(1e-3)], params)
    assert finding.where == ("""leaf "['a']['b']\"""",)
    assert "(bfloat16)" in finding.message


@pytest.mark.thorough
def test_updates_that_come_every_fourth_step_are_waited_for():
    assert share_said(lint([optax.MultiSteps(jaxclip.lion(1e-5), 4)], half())) > 0.8


@pytest.mark.thorough
def test_shapes_alone_tell_the_structure_but_not_the_lost_steps():
    abstract = jax.eval_shape(half)
    links = [CLIP, jaxclip.sign_sgd(1e-5)]
    assert rules_of(links, half()) == ["clip_without_effect", "lost_steps"]
    assert rules_of(links, abstract) == ["clip_without_effect"]


# --- The list -------------------------------------------------------------------------


def test_a_finding_reads_as_rule_place_and_sentence():
    (finding,) = lint([CLIP, jaxclip.sign_sgd(1e-3)], ABSTRACT)
    assert finding.where == ("link 0", "link 1")
    assert str(finding) == "clip_without_effect: link 0, link 1: " + finding.message


@pytest.mark.thorough
def test_parameters_of_every_kind_of_tree_and_leaf_are_taken():
    from flax import nnx

    state = nnx.state(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Param)
    mixed = {"w": jnp.ones(3), "n": jnp.arange(3), "none": None, "f": 1.0, "np": np.ones(2)}
    key = {"w": jnp.ones(3), "key": jax.random.key(0)}
    z = {"w": jnp.ones(3), "z": jnp.ones(2, jnp.complex64)}
    links = [jaxclip.clip_by_global_norm(1.0), jaxclip.sign_sgd(1e-3)]
    for params in (state, mixed, key, z, Finding(jnp.ones(2), jnp.ones(()), jnp.zeros((2, 0)))):
        assert rules_of(links, params) == ["clip_without_effect"]
    assert rules_of(links, {}) == []


def test_nothing_given_is_changed():
    links, params = [CLIP, jaxclip.sign_sgd(1e-5)], half()
    before = jax.tree.map(lambda x: np.array(x, np.float32), params)
    assert lint(links, params) == lint(links, params)
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(params), strict=True):
        assert np.array_equal(x, np.asarray(y, np.float32))


@pytest.mark.thorough
def test_what_is_no_transformation_raises():
    with pytest.raises(TypeError, match=r"transforms\[1\] must be"):
        lint([CLIP, 1e-3], PARAMS)  # type: ignore[list-item]
