"""Finds links of a chain that do nothing, or break a promise of another link.

    lint([jaxclip.clip_by_global_norm(1.0), jaxclip.sign_sgd(1e-3)], params)

The links are run on small parameters of the same structure, and judged only by their updates
for constructed gradients. Links that cannot be run are skipped: an empty list proves nothing.
"""

import contextlib
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxclip._core import checks
from jaxclip._core.trees import PyTree
from jaxclip.training.lost_steps import measure_lost_updates
from jaxclip.training.trials import Link, Trial, at_count, make_trial, step

# The positions of the links at fault, and the message.
_Fault: TypeAlias = tuple[Sequence[int], str]
# Skips of spikes learn over 100 steps by default.
_NUM_LEARNING = 130
# Fractions of all weights, and of one leaf, that a step may leave as they were.
_MAX_LOST, _MAX_LOST_OF_LEAF = 0.1, 0.5


class Finding(NamedTuple):
    """A part of a chain that has no effect, or another effect than expected.

    Attributes:
      rule: Short name of the rule.
      where: The links, such as "link 0", or the leaf that it is about.
      message: The fault, and what to do instead.
    """

    rule: str
    where: tuple[str, ...]
    message: str

    def __str__(self) -> str:
        return f"{self.rule}: {', '.join(self.where)}: {self.message}"


def lint(transforms: Sequence[optax.GradientTransformation], params: optax.Params) -> list[Finding]:
    """Runs the links of a chain, and returns those that have no effect or break a promise.

    The rules:

    * `clip_without_effect`: a clip before a step that ignores the gradient's size;
    * `clip_never_acts`: a clip, or a skip of spikes, after a clip that is as tight;
    * `clip_of_a_group`: a clip by the norm of some leaves, while others are trained, too;
    * `clip_counts_frozen`: gradients of frozen leaves that change the steps of the others;
    * `box_not_kept`: a box, or another set of weights, that a later link leaves;
    * `decay_grows_weights`: weight decay that is added after the learning rate;
    * `skip_undone`: skipped steps that move the weights nevertheless, or never end;
    * `feedback_without_units`: `error_feedback` around a bare sign;
    * `lost_steps`: steps below half the distance to a weight's next number.

    All but `lost_steps`, which is measured on the parameters themselves, run the links on
    small float32 parameters of the same structure. Call it outside of `jit`.

    Args:
      transforms: The links in the order of `optax.chain`. A chain or a wrapper among them counts
        as one link: pass its own links to see inside.
      params: The parameters. With `jax.ShapeDtypeStruct` leaves `lost_steps` is left out.

    Returns:
      The findings, rule by rule; an empty list if there are none. Links that cannot be run
      without more arguments or a mapped axis are skipped.

    Raises:
      TypeError: If an entry of `transforms` is not an optax transformation.

    Example:
      >>> import jaxclip
      >>> links = [jaxclip.clip_by_global_norm(1.0), jaxclip.sign_sgd(1e-3)]
      >>> for finding in lint(links, jnp.zeros(2)):
      ...     print(finding.rule, finding.where)
      clip_without_effect ('link 0', 'link 1')
    """
    given = [checks.check_transformation(f"transforms[{i}]", t) for i, t in enumerate(transforms)]
    findings = []
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
        warnings.simplefilter("ignore")
        trial = make_trial(given, params)
        for (rule, find), i in itertools.product(_RULES.items(), range(len(given))):
            # A link may need arguments, axes or shapes that the trial lacks.
            with contextlib.suppress(Exception):
                if fault := find(trial, i):
                    places, message = fault
                    where = tuple(f"link {place}" for place in places)
                    findings.append(Finding(rule, where, message))
    return findings + _find_lost_steps(given, params)


# --- Clips ----------------------------------------------------------------------------


def _clipped_part(trial: Trial, link: Link) -> str | None:
    """Returns the part that a clip scales by one coefficient; None if the link is not a clip."""
    plain, scaled = trial.gradients(), trial.gradients() * trial.powers("tree")
    linear, coefs = (trial.run([link], rows) / rows for rows in (plain, scaled))
    both = np.concatenate([linear, coefs])
    is_fraction = (both.real >= 0) & (both.real <= 1 + 1e-5) & (abs(both.imag) <= 1e-5)
    if not np.all(is_fraction) or np.allclose(linear, coefs, rtol=1e-4) or _keeps_set(trial, link):
        return None

    def is_common(columns: np.ndarray) -> bool:
        return bool(np.all(abs(columns - columns[:, :1]) <= 1e-5 * abs(columns[:, :1])))

    if is_common(coefs):
        return "tree"
    by_leaf = [coefs[:, trial.leaf == k] for k in set(trial.leaf.tolist())]
    return "leaf" if all(map(is_common, by_leaf)) else "entry"


def _find_clip_without_effect(trial: Trial, i: int) -> _Fault | None:
    """Scales gradients by powers of two, as the clip may: do the links after it notice?"""
    part = _clipped_part(trial, trial.links[i])
    for j in range(i + 1, len(trial.links)) if part else ():
        plain, scaled = trial.gradients(), trial.gradients() * trial.powers(part or "tree")
        rows = [trial.run(trial.links[i + 1 : j + 1], rows) for rows in (plain, scaled)]
        if np.any(rows[0]) and np.array_equal(rows[0], rows[1]):
            return (i, j), (
                f"Link {j} gives the same updates whatever the size of the gradient, so link {i} "
                "only costs time. Leave this clip out: skip_nonfinite around the optimizer skips "
                "bad steps, and a momentum (lion, signum) weakens single large gradients."
            )
    return None


def _find_clip_never_acts(trial: Trial, i: int) -> _Fault | None:
    """Sends spikes of all sizes: does a clip act on them alone, but not after earlier clips?"""
    first = i
    while first and _clipped_part(trial, trial.links[first - 1]) == "tree":
        first -= 1
    front, alone = trial.links[first:i], [trial.links[i]]
    # Without an earlier bound on the 2-norm, the answer depends on the number of weights.
    if not front or not (_bounds_norm(trial, front) and _acts_on_spikes(trial, alone)):
        return None
    if _acts_on_spikes(trial, front + alone):
        return None
    return (i - 1, i), (
        f"Link {i} clips or skips large gradients, but none reaches it through link {i - 1}. "
        "Leave one of the two out; to skip spikes, put the skip first and give it a max_norm."
    )


def _bounds_norm(trial: Trial, links: list[Link]) -> bool:
    """Returns True if a dense and a sparse spike come out of the links with the same 2-norm."""
    *_, (_, states) = trial.walk(links, trial.gradients(_NUM_LEARNING))
    num_weights, norms = trial.weights.size, []
    for direction in (np.ones(num_weights) / math.sqrt(num_weights), np.eye(1, num_weights)[0]):
        spike = (direction * 2.0**30).astype(trial.weights.dtype)
        updates, _ = step(links, spike, states, trial.weights)
        norms.append(np.linalg.norm(updates[-1]))
    return bool(np.isclose(*norms, rtol=1e-3))


def _acts_on_spikes(trial: Trial, links: list[Link]) -> bool:
    """Returns True if the last link shrinks, or skips, a spike at any size of the gradients."""
    is_clip = _clipped_part(trial, links[-1]) is not None
    for size in (2.0**-20, 1.0, 2.0**20):
        gradients = trial.gradients(_NUM_LEARNING, size)
        *_, (_, states) = trial.walk(links, gradients)
        for late in (states, at_count(states, 1000), at_count(states, 100_000)):
            before, late = step(links, gradients[0], late, trial.weights)
            spike, _ = step(links, gradients[1] * 2.0**7, late, trial.weights)
            is_shrunk = np.linalg.norm(spike[-1]) < 0.99 * np.linalg.norm(spike[-2])
            is_dropped = np.any(before[-1]) and not np.any(spike[-1])
            if is_shrunk if is_clip else is_dropped:
                return True
    return False


def _find_clip_of_a_group(trial: Trial, i: int) -> _Fault | None:
    """Looks for trained leaves that share one coefficient, and others that do not."""
    if _clipped_part(trial, trial.links[i]) != "leaf":
        return None
    gradients = trial.gradients() * trial.powers("tree")
    coefs = abs(trial.run([trial.links[i]], gradients) / gradients)
    trained = trial.is_trained()
    for k in np.unique(trial.leaf[np.min(coefs, axis=0) < 0.999]):
        own = coefs[:, trial.leaf == k][:, :1]
        is_shared = np.all(abs(coefs - own) <= 1e-5 * own, axis=0)
        others = trial.leaf[trained & ~is_shared]
        num_shared = len(set(trial.leaf[is_shared].tolist()))
        if num_shared > 1 and others.size:
            return (i,), (
                f"It clips {trial.paths[k]!r} by the norm of {num_shared} leaves, but "
                f"{trial.paths[others[0]]!r} is trained, too, and does not count. Clip outside "
                "of masked or partition to bound the global norm."
            )
    return None


def _find_clip_counts_frozen(trial: Trial, i: int) -> _Fault | None:
    """Scales only the gradients of leaves that never move: do the steps of the others change?"""
    trained, plain = trial.is_trained(), trial.gradients()
    scaled = np.where(trained, plain, plain * trial.powers("tree"))

    def needs_frozen(links: list[Link]) -> bool:
        rows = [trial.run(links, rows)[:, trained] for rows in (plain, scaled)]
        return not np.array_equal(rows[0], rows[1])

    if needs_frozen(trial.links[:i]) or not needs_frozen(trial.links[: i + 1]):
        return None
    frozen = trial.paths[trial.leaf[~trained][0]]
    return (i,), (
        f"The gradient of {frozen!r}, which never moves, changes the steps of other leaves, as by "
        "the global norm. Set it to zero first, or put the whole optimizer inside masked."
    )


# --- Weights and skipped steps --------------------------------------------------------


def _keeps_set(trial: Trial, link: Link) -> bool:
    """Returns True if the weights after huge updates depend on neither their size nor the start."""
    w, normal = trial.weights, trial.gradients(1)[0]
    far = (normal + np.sign(normal)) * np.float32(2.0**20)
    ends = [
        start + trial._replace(weights=start).run([link], push[None])[0]
        for start, push in ((w, far), (-w / 2, far), (w, 2 * far))
    ]
    is_bound = np.isclose(ends[0], ends[2], rtol=1e-4, atol=0)
    return bool(np.allclose(ends[0], ends[1], rtol=1e-4, atol=0) and np.any(is_bound))


def _find_box_not_kept(trial: Trial, i: int) -> _Fault | None:
    """Pushes weights out and back: would the box change the updates of the links after it?"""
    links, box = trial.links[i:], trial.links[i]
    if len(links) == 1 or not _keeps_set(trial, box):
        return None
    far = np.sign(trial.gradients(1)[0]) * np.float32(2.0**20)
    weights = trial.weights + trial.run([box], far[None])[0]
    states = [link.init(weights) for link in links]
    for push in (-far, -far, 0 * far, far, far, 0 * far) * 2:
        box_state = states[0]
        (*_, update), states = step(links, push, states, weights)
        kept, _ = box.update(update, box_state, weights)
        if np.any(abs(update - kept) > 4e-6 * (abs(weights) + abs(kept))):  # above the rounding
            return range(i, len(trial.links)), (
                f"The links after link {i} lead weights out of the set that it keeps. Make it "
                "the last link, or, if it is a box, give make_train_step a weight_threshold."
            )
        weights = weights + update
    return None


def _find_decay_grows_weights(trial: Trial, i: int) -> _Fault | None:
    """Looks for a link that adds a multiple of the weights to updates that go down already."""
    g = trial.gradients()
    added, total = (trial.run([trial.links[i]], rows) for rows in (0 * g, g))
    multiples = (added / trial.weights).real
    is_decay = np.allclose(total - g, added, atol=1e-5) and np.all(multiples >= 0)
    before, after = trial.run(trial.links[:i], g)[2], trial.run(trial.links[i + 1 :], g)[0]
    goes_down, stays_down = np.vdot(before, g[2]).real < 0, np.vdot(after, g[0]).real > 0
    if not (is_decay and np.any(added) and goes_down and stays_down):
        return None
    return (i - 1, i), (
        f"Before link {i} the updates already point down the gradient, so its decay makes "
        "weights grow, and ignores the learning rate. Put it before the learning rate."
    )


def _find_skip_undone(trial: Trial, i: int) -> _Fault | None:
    """Sends a gradient with one NaN: does a skipped step move weights, or poison later ones?"""
    if not _skips(trial, trial.links[i]):
        return None
    g = trial.gradients()
    later = [j for j in range(i + 1, len(trial.links)) if not _keeps_set(trial, trial.links[j])]
    zeros = np.concatenate([g, 0 * g[:1]])
    if np.any(trial.run([trial.links[j] for j in later], zeros)[-1]):
        return (i, *later), (
            f"When link {i} skips a step, the links after it get zeros, and move the weights "
            "nevertheless. Put the skip around the whole optimizer."
        )
    g[1, 0] = math.nan
    before = trial.run(trial.links[:i], g)
    if np.all(np.isfinite(before[0])) and not np.all(np.isfinite(before[-1])):
        return range(i + 1), (
            f"A NaN stays in the state of the links before link {i}, so every later step is bad, "
            "too. Put the skip around the whole optimizer."
        )
    return None


def _skips(trial: Trial, link: Link) -> bool:
    """Returns True if one NaN gives an update of zeros, and the link is not just a clip."""
    g = trial.gradients()
    plain, scaled = trial.run([link], g), trial.run([link], g * trial.powers("tree"))
    # A clip or a feedback, which also turns a bad gradient into zeros, is neither of these.
    is_linear = np.allclose(scaled, plain * trial.powers("tree"), rtol=1e-5, atol=0)
    is_optimizer = np.vdot(plain[0], g[0]).real < 0
    g[1, 0] = math.nan
    is_skipped = not np.any(trial.run([link], g)[1])
    is_seen = np.any(plain[0]) and g.shape[1] > 1  # of one entry, a sign of 0 looks skipped
    return bool(is_skipped and is_seen and (is_linear or is_optimizer))


def _find_feedback_without_units(trial: Trial, i: int) -> _Fault | None:
    """Sends three times the first update: do updates of one size follow until it is spent?"""
    link, g = trial.links[i], np.sign(trial.gradients(1))
    small, first, large = (trial.run([link], factor * g)[0] for factor in (0.5, 1, 64))
    row = trial.run([link], np.asarray([3, 0, 0, 0, 0])[:, None] * first)
    is_spent = np.allclose(row.sum(axis=0), 3 * first, rtol=1e-5, atol=0)
    if not (np.any(first) and np.array_equal(small, large) and is_spent):
        return None
    return (i,), (
        "The updates inside error_feedback ignore the size of the gradient: where it is larger, "
        "the residual grows without bound. Use scale_by_sign(scaled_sign()) or a clip inside."
    )


def _find_lost_steps(links: list, params: PyTree) -> list[Finding]:
    """Measures the updates that rounding loses, on the parameters themselves."""
    lost = measure_lost_updates(links, params, enough=(_MAX_LOST, _MAX_LOST_OF_LEAF))
    worst = max(lost.leaves, key=lambda name: lost.leaves[name], default=None)
    if worst is None or (lost.total <= _MAX_LOST and lost.leaves[worst] <= _MAX_LOST_OF_LEAF):
        return []
    dtype, cure = lost.dtypes[worst], "Use a larger step, or wider parameters."
    if jnp.finfo(dtype).bits <= 16:
        cure = "Use make_train_step(stochastic_rounding=True), or keep the parameters in float32."
    message = (
        f"A step leaves {lost.total:.0%} of the weights exactly as they were, and "
        f"{lost.leaves[worst]:.0%} of {worst!r} ({dtype}): it is below half the distance to "
        f"their next number. {cure} Measured with random gradients, at a schedule's largest step."
    )
    return [Finding("lost_steps", (f"leaf {worst!r}",), message)]


_RULES: dict[str, Callable[[Trial, int], _Fault | None]] = {
    "clip_without_effect": _find_clip_without_effect,
    "clip_never_acts": _find_clip_never_acts,
    "clip_of_a_group": _find_clip_of_a_group,
    "clip_counts_frozen": _find_clip_counts_frozen,
    "box_not_kept": _find_box_not_kept,
    "decay_grows_weights": _find_decay_grows_weights,
    "skip_undone": _find_skip_undone,
    "feedback_without_units": _find_feedback_without_units,
}
