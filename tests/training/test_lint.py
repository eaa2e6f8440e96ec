"""Compositions that do nothing or break a promise are found; sensible ones are let be."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxclip
from jaxclip.lint.chain import Finding, lint_chain
from jaxclip.lint.links import links_of

PARAMS = {
    "w": jnp.asarray(0.02 * np.random.default_rng(0).standard_normal((6, 5)), jnp.float32),
    "b": jnp.zeros(4),
}
ABSTRACT = jax.eval_shape(lambda: PARAMS)
LABELS = {"w": "w", "b": "b"}
ONLY_W, ONLY_B = {"w": True, "b": False}, {"w": False, "b": True}
CLIP = optax.clip_by_global_norm(1.0)
WARMUP = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 100, 1000)
chain = optax.chain


def rules_of(tx: Any, params: Any = ABSTRACT) -> list[str]:
    return [finding.rule for finding in lint_chain(tx, params)]


# --- What is found --------------------------------------------------------------------

WITHOUT_EFFECT = {
    "ours": chain(jaxclip.clip_by_global_norm(1.0), jaxclip.sign_sgd(1e-3)),
    "optax": chain(CLIP, optax.sign_sgd(1e-3)),
    "by entry": chain(optax.clip(1.0), optax.scale_by_sign(), optax.scale(-1e-3)),
    "learned": chain(
        jaxclip.gradients.autoclip(), optax.inject_hyperparams(jaxclip.sign_sgd)(1e-3)
    ),
    "by leaf": chain(optax.clip_by_block_rms(1.0), jaxclip.sign_sgd(1e-3)),
    "smoothly": chain(jaxclip.gradients.smooth_clip(1.0), jaxclip.sign_sgd(1e-3)),
    "relative": chain(jaxclip.gradients.clip_update_relative(), jaxclip.sign_sgd(1e-3)),
    "around": chain(CLIP, jaxclip.skip_nonfinite(jaxclip.sign_sgd(1e-3))),
    "inside": jaxclip.skip_nonfinite(chain(CLIP, jaxclip.sign_sgd(1e-3))),
    "named": optax.named_chain(("clip", CLIP), ("step", optax.sign_sgd(1e-3))),
    "trust ratio": chain(CLIP, optax.scale_by_trust_ratio(), optax.scale(-1e-3)),
    "soft sign of a norm": chain(CLIP, jaxclip.scale_by_sign(jaxclip.sign.soft_sign())),
    "accumulated": optax.MultiSteps(chain(CLIP, jaxclip.sign_sgd(1e-3)), 2),
}
NOT_KEPT = {
    "scaled": chain(
        jaxclip.scale_by_sign(),
        jaxclip.project_weights(jaxclip.box(1.0)),
        optax.scale_by_learning_rate(0.1),
    ),
    "warmed up": chain(
        jaxclip.project_weights(jaxclip.box(jaxclip.fan_in())), optax.scale_by_learning_rate(WARMUP)
    ),
    "masked": chain(
        optax.masked(jaxclip.project_weights(jaxclip.box(1.0)), ONLY_W), optax.scale(-0.1)
    ),
    "norms": chain(jaxclip.project_weights(jaxclip.weights.max_norm(1.0)), optax.scale(-0.1)),
    "injected": chain(
        optax.inject_hyperparams(lambda threshold: jaxclip.project_weights(jaxclip.box(threshold)))(
            1.0
        ),
        optax.adam(1e-3),
    ),
    "guarded": jaxclip.skip_nonfinite(
        chain(jaxclip.project_weights(jaxclip.box(1.0)), optax.adam(1e-3))
    ),
    "decayed": chain(jaxclip.project_weights(jaxclip.box(1.0)), optax.add_decayed_weights(1e-4)),
    "averaged": chain(jaxclip.project_weights(jaxclip.box(1.0)), optax.trace(0.9)),
}
OF_A_GROUP = {
    "partition": optax.partition({"w": chain(CLIP, optax.adam(1e-3)), "b": optax.sgd(0.1)}, LABELS),
    "masked": chain(optax.masked(jaxclip.clip_by_global_norm(1.0), ONLY_W), optax.adam(1e-3)),
    "learned": optax.partition({"w": jaxclip.gradients.autoclip(), "b": optax.identity()}, LABELS),
}
FOUND = {
    "clip_without_effect": WITHOUT_EFFECT,
    "box_not_kept": NOT_KEPT,
    "norm_of_a_group": OF_A_GROUP,
    "detector_without_spikes": {
        "learned twice": chain(
            jaxclip.gradients.autoclip(), jaxclip.gradients.zclip(), optax.adam(1e-3)
        ),
        "history": chain(
            jaxclip.gradients.zclip(),
            jaxclip.gradients.skip_or_clip(optax.sgd(0.1), num_deviations=6),
        ),
        "bounded": chain(CLIP, jaxclip.gradients.skip_or_clip(optax.sgd(0.1), drop_norm=10.0)),
    },
    "decay_grows_weights": {
        "adam": chain(optax.adam(1e-3), optax.add_decayed_weights(1e-4)),
        "masked": chain(optax.sgd(0.1), optax.add_decayed_weights(1e-4, ONLY_W)),
    },
    "skip_undone": {
        "moved": chain(jaxclip.skip_nonfinite(CLIP), optax.adam(1e-3)),
        "optax": chain(optax.apply_if_finite(optax.identity(), 5), optax.sgd(0.1, momentum=0.9)),
        "decayed": chain(jaxclip.skip_nonfinite(optax.sgd(0.1)), optax.add_decayed_weights(-0.1)),
        "poisoned": chain(optax.scale_by_adam(), jaxclip.skip_nonfinite(optax.scale(-0.1))),
    },
    "feedback_without_units": {
        "sign": chain(jaxclip.gradients.error_feedback(jaxclip.scale_by_sign()), optax.scale(-0.1)),
        "optax": chain(jaxclip.gradients.error_feedback(optax.scale_by_sign()), optax.scale(-0.1)),
    },
    "clip_twice": {
        "looser": chain(CLIP, jaxclip.clip_by_global_norm(2.0), optax.adam(1e-3)),
        "the same": chain(CLIP, chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))),
    },
}


@pytest.mark.parametrize(
    ("rule", "tx"),
    [(rule, tx) for rule, cases in FOUND.items() for tx in cases.values()],
    ids=[f"{rule}-{name}" for rule, cases in FOUND.items() for name in cases],
)
def test_a_useless_or_broken_composition_is_the_only_finding(rule: str, tx: Any):
    assert rules_of(tx) == [rule]


# --- What is let be -------------------------------------------------------------------

SENSIBLE = {
    "adamw": optax.adamw(1e-3),
    "clip, adamw": chain(CLIP, optax.adamw(WARMUP)),
    "clip, lion": chain(jaxclip.clip_by_global_norm(1.0), jaxclip.lion(1e-3)),
    "clip, optax lion": chain(CLIP, optax.lion(1e-3)),
    "clip, signum": chain(CLIP, jaxclip.signum(1e-3)),
    "clip, scaled sign": chain(
        CLIP, jaxclip.scale_by_sign(jaxclip.sign.scaled_sign()), optax.sgd(0.1)
    ),
    "clip by value, soft sign": chain(
        jaxclip.clip_by_value(1.0), jaxclip.sign_sgd(0.1, sign=jaxclip.sign.soft_sign())
    ),
    "sign alone": jaxclip.sign_sgd(1e-3),
    "clip, sign of some leaves": chain(CLIP, optax.masked(optax.scale_by_sign(), ONLY_W)),
    "momentum, clip": chain(optax.trace(0.9), CLIP, optax.scale(-0.1)),
    "clip, adam, clip": chain(CLIP, optax.scale_by_adam(), CLIP, optax.scale(-0.1)),
    "two norms": chain(jaxclip.clip_by_global_norm(1.0, ord=1), CLIP, optax.adam(1e-3)),
    "tighter": chain(optax.clip_by_global_norm(2.0), CLIP, optax.adam(1e-3)),
    "scheduled bounds": chain(
        jaxclip.clip_by_global_norm(lambda n: 1.0), jaxclip.clip_by_global_norm(2.0), optax.sgd(0.1)
    ),
    "guard around all": jaxclip.skip_nonfinite(chain(CLIP, jaxclip.lion(1e-3))),
    "optax guard": optax.apply_if_finite(optax.adam(1e-3), 5),
    "guard, box": chain(
        jaxclip.skip_nonfinite(optax.adam(1e-3)), jaxclip.project_weights(jaxclip.box(1.0))
    ),
    "clip, guard": chain(CLIP, jaxclip.skip_nonfinite(optax.adam(1e-3))),
    "skip or clip": jaxclip.gradients.skip_or_clip(
        optax.adamw(1e-3), 10.0, 1.0, num_deviations=6.0
    ),
    "high clip, skip": chain(
        optax.clip_by_global_norm(100.0),
        jaxclip.gradients.skip_or_clip(optax.sgd(0.1), drop_norm=10.0),
    ),
    "fixed clip, zclip": chain(
        jaxclip.clip_by_global_norm(10.0), jaxclip.gradients.zclip(), optax.adam(1e-3)
    ),
    "box": chain(jaxclip.lion(1e-3), jaxclip.project_weights(jaxclip.box(1.0))),
    "norms": chain(jaxclip.lion(1e-3), jaxclip.project_weights(jaxclip.weights.max_norm(1.0))),
    "box, half a step": chain(
        jaxclip.lion(1e-3), jaxclip.project_weights(jaxclip.box(1.0)), optax.scale(0.5)
    ),
    "two boxes": chain(
        jaxclip.lion(1e-3),
        jaxclip.project_weights(jaxclip.box(1.0), mask=jaxclip.weights.kernels_only),
        jaxclip.project_weights(jaxclip.box(2.0)),
    ),
    "box of some leaves": chain(
        jaxclip.lion(1e-3), optax.masked(jaxclip.project_weights(jaxclip.box(1.0)), ONLY_W)
    ),
    "accumulated box": optax.MultiSteps(
        chain(jaxclip.lion(1e-3), jaxclip.project_weights(jaxclip.box(1.0))), 4
    ),
    "guarded box": optax.apply_if_finite(
        chain(jaxclip.lion(1e-3), jaxclip.project_weights(jaxclip.box(1.0))), 4
    ),
    "injected": optax.inject_hyperparams(optax.adamw)(WARMUP),
    "accumulated": optax.MultiSteps(chain(CLIP, optax.adamw(1e-3)), 4),
    "clip, partition": chain(
        CLIP, optax.partition({"w": optax.adam(1e-3), "b": optax.sgd(0.1)}, LABELS)
    ),
    "frozen group": optax.partition(
        {"w": chain(CLIP, optax.adam(1e-3)), "b": optax.set_to_zero()}, LABELS
    ),
    "frozen by masks": chain(
        optax.masked(chain(CLIP, optax.adam(1e-3)), ONLY_W),
        optax.masked(optax.set_to_zero(), ONLY_B),
    ),
    "mask of all": optax.masked(chain(CLIP, optax.adam(1e-3)), {"w": True, "b": True}),
    "feedback of a clip": chain(
        jaxclip.gradients.error_feedback(jaxclip.clip_by_value(1.0)), optax.sgd(0.1, momentum=0.9)
    ),
    "feedback of scaled signs": chain(
        jaxclip.gradients.error_feedback(jaxclip.scale_by_sign(jaxclip.sign.scaled_sign())),
        optax.sgd(0.1),
    ),
    "coupled decay": chain(CLIP, optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9)),
    "decay that knows the sign": chain(optax.adam(1e-3), optax.add_decayed_weights(-1e-6)),
    "ascent": chain(optax.scale(-1.0), optax.add_decayed_weights(1e-4), optax.scale(-0.1)),
    "vote": chain(jaxclip.scale_by_lion(), jaxclip.sign.majority_vote("x"), optax.scale(-1e-3)),
    "needs the value": optax.polyak_sgd(),
    "cautious": jaxclip.sign.cautious(optax.adamw(1e-3)),
    "lamb": optax.lamb(1e-3),
    "adafactor": chain(CLIP, optax.adafactor(1e-3)),
    "schedule free": optax.contrib.schedule_free_adamw(1e-3),
    "one's own": chain(CLIP, optax.stateless(lambda u, p: jax.tree.map(lambda x: -x, u))),
    "nothing": optax.identity(),
    "frozen": chain(CLIP, optax.set_to_zero()),
}


@pytest.mark.parametrize("tx", SENSIBLE.values(), ids=SENSIBLE)
def test_a_sensible_chain_gives_no_finding(tx: Any):
    assert rules_of(tx, PARAMS) == []


def test_what_fails_when_it_is_run_or_read_is_passed_over():
    def fail(*args: Any) -> Any:
        raise RuntimeError("not here")

    broken = optax.GradientTransformation(fail, fail)
    no_update = optax.GradientTransformation(optax.init_empty_state, fail)
    assert rules_of(chain(CLIP, broken), PARAMS) == []
    assert rules_of(chain(CLIP, no_update, jaxclip.sign_sgd(1e-3)), PARAMS) == []


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


@pytest.mark.parametrize("step", [1e-4, 3e-5, 1e-5])
@pytest.mark.parametrize("make", [jaxclip.lion, optax.adamw, jaxclip.sign_sgd])
def test_the_share_of_lost_steps_is_that_of_weights_with_wider_gaps(step: float, make: Any):
    params = half()
    w = np.abs(np.asarray(params["w"], np.float64))
    # Bfloat16 has 7 bits behind the first: numbers from 2**n on are 2**(n - 7) apart.
    gap = 2.0 ** (np.floor(np.log2(w)) - 7)
    said = share_said(lint_chain(make(step), params))
    assert abs(said - np.mean(gap / 2 > step)) < 0.03


def test_steps_that_move_the_weights_are_not_lost():
    assert rules_of(jaxclip.lion(1e-3), half()) == []
    assert rules_of(jaxclip.lion(1e-5), half(dtype=jnp.float32)) == []
    assert "float32" in lint_chain(jaxclip.lion(1e-10), half(dtype=jnp.float32))[0].message


def test_a_step_as_large_as_the_gradient_is_not_judged_by_a_small_gradient():
    assert rules_of(optax.sgd(1e-5), half()) == []


@pytest.mark.parametrize(
    "make", [optax.adamw, optax.inject_hyperparams(jaxclip.lion), jaxclip.lion]
)
def test_a_schedule_counts_at_its_largest_and_a_step_of_zero_not_at_all(make: Any):
    def schedule(peak: float) -> Any:
        return optax.warmup_cosine_decay_schedule(0.0, peak, 100, 1000)

    assert rules_of(make(schedule(1e-3)), half()) == []
    assert share_said(lint_chain(make(schedule(1e-5)), half())) > 0.8
    assert rules_of(make(0.0), half()) == []


def test_a_small_leaf_that_never_moves_is_named():
    params = half() | {"scale": jnp.ones(8, jnp.bfloat16)}
    (finding,) = lint_chain(jaxclip.lion(1e-3), params)
    assert finding.where == ("leaf 'scale'",)
    assert "100% of 'scale' (bfloat16)" in finding.message
    assert "stochastic_rounding=True" in finding.message


def test_updates_that_come_every_fourth_step_are_waited_for():
    assert share_said(lint_chain(optax.MultiSteps(jaxclip.lion(1e-5), 4), half())) > 0.8


def test_shapes_alone_tell_the_structure_but_not_the_lost_steps():
    abstract = jax.eval_shape(half)
    tx = chain(CLIP, jaxclip.sign_sgd(1e-5))
    assert rules_of(tx, half()) == ["clip_without_effect", "lost_steps"]
    assert rules_of(tx, abstract) == ["clip_without_effect"]


# --- The list -------------------------------------------------------------------------


def test_a_finding_reads_as_rule_place_and_sentence():
    (finding,) = lint_chain(chain(CLIP, jaxclip.sign_sgd(1e-3)), ABSTRACT)
    assert finding.where == ("clip_by_global_norm (link 0)", "scale_by_sign (link 1.0)")
    start = "clip_without_effect: clip_by_global_norm (link 0), scale_by_sign (link 1.0): "
    assert str(finding) == start + finding.message


def test_links_are_named_through_chains_wrappers_and_groups():
    tx = chain(
        jaxclip.skip_nonfinite(chain(CLIP, optax.trace(0.9))),
        optax.partition({"w": jaxclip.lion(1e-3), "b": optax.sgd(0.1)}, LABELS),
    )
    guard, groups = links_of(tx, PARAMS)
    assert (str(guard), str(groups)) == ("skip_nonfinite (link 0)", "partition (link 1)")
    assert [str(x) for x in guard.inner[0]] == [
        "clip_by_global_norm (link 0.0)",
        "trace (link 0.1)",
    ]
    assert str(groups.inner[0][0]) == "scale_by_lion (link 1['w'].0)"


def test_parameters_of_every_kind_of_tree_and_leaf_are_taken():
    from flax import nnx

    state = nnx.state(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Param)
    mixed = {"w": jnp.ones(3), "n": jnp.arange(3), "none": None, "f": 1.0, "np": np.ones(2)}
    key = {"w": jnp.ones(3), "key": jax.random.key(0)}
    tx = chain(jaxclip.clip_by_global_norm(1.0), jaxclip.sign_sgd(1e-3))
    for params in (state, mixed, key, Finding(jnp.ones(2), jnp.ones(()), jnp.zeros((2, 0)))):
        assert rules_of(tx, params) == ["clip_without_effect"]
    assert rules_of(tx, {}) == []


def test_nothing_given_is_changed():
    tx, params = chain(CLIP, jaxclip.sign_sgd(1e-5)), half()
    before = jax.tree.map(lambda x: np.array(x, np.float32), params)
    variables = dict(vars(tx.update)), tx.update.__closure__
    assert lint_chain(tx, params) == lint_chain(tx, params)
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(params), strict=True):
        assert np.array_equal(x, np.asarray(y, np.float32))
    assert variables == (dict(vars(tx.update)), tx.update.__closure__)


def test_what_is_no_transformation_raises():
    with pytest.raises(TypeError, match="tx must be"):
        lint_chain(1e-3, PARAMS)  # type: ignore[arg-type]
