"""Compositions of transforms that do nothing, or break a promise.

`lint_chain` speaks only of what it has tried. The names of the links say where to look; the
links themselves, run on a small stand-in for the parameters, say whether it is so. What it
cannot read or run, it is silent about: an empty list is no proof.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxclip._core import checks, trees
from jaxclip.lint.links import Link, links_of
from jaxclip.lint.probes import (
    Grain,
    dot,
    floating_paths,
    ignores_size,
    is_finite,
    leaves_box,
    magnitude,
    moving_paths,
    random_like,
    run_transform,
    stand_in,
)
from jaxclip.training.lost_steps import lost_shares

# What a clip multiplies by positive numbers: the whole tree by one, each leaf by one of its
# own, or each entry. In this order, the later ones include the earlier.
_GRAINS: tuple[Grain, ...] = ("tree", "leaf", "entry")
_CLIPS: dict[str, Grain] = {
    "clip_by_global_norm": "tree",
    "autoclip": "tree",
    "zclip": "tree",
    "smooth_clip": "tree",
    "clip_by_block_rms": "leaf",
    "clip_by_leaf_norm": "leaf",
    "adagc": "leaf",
    "clip_update_relative": "leaf",
    "adaptive_grad_clip": "entry",
    "clip": "entry",
    "clip_by_value": "entry",
    "clip_spikes": "entry",
    "clip_leaf_spikes": "entry",
}
_NORM_CLIPS = ("clip_by_global_norm", "autoclip", "zclip", "skip_or_clip")
_SKIPPERS = ("skip_nonfinite", "apply_if_finite", "skip_or_clip")
# On a good step these are the transform inside them.
_TRANSPARENT = ("skip_nonfinite", "apply_if_finite")
_DECAYS = ("add_decayed_weights", "_decay_weights")
_BOX = ("project_weights",)
# Of the weights that a step leaves as they were: in all, and in one leaf.
_LOST_SHARE, _LOST_LEAF_SHARE = 0.1, 0.5


class Finding(NamedTuple):
    """Something in an optimizer that does nothing, or not what its name says.

    Attributes:
      rule: Short name of the rule.
      where: The links, or the leaf, that it is about.
      message: What happens, and what to do instead.
    """

    rule: str
    where: tuple[str, ...]
    message: str

    def __str__(self) -> str:
        return f"{self.rule}: {', '.join(self.where)}: {self.message}"


def lint_chain(tx: optax.GradientTransformation, params: optax.Params) -> list[Finding]:
    """Returns what in an optimizer does nothing or breaks a promise; an empty list if nothing.

    The rules:

    * `clip_without_effect`: a clip in front of a step that does not see the gradient's size;
    * `clip_twice`: a clip by global norm behind one that is at least as tight;
    * `box_not_kept`: `project_weights` in front of links that leave
      the set;
    * `norm_of_a_group`: a clip by global norm that sees only a part of what is trained;
    * `detector_without_spikes`: a detector of spikes that cannot see one;
    * `decay_grows_weights`: weight decay added with the sign of growth;
    * `skip_undone`: skipped steps that move the weights, or never end;
    * `feedback_without_units`: `error_feedback` around something like a bare sign;
    * `lost_steps`: steps below half the distance to a weight's next number.

    Each is tried on a small stand-in for the parameters before it is reported, but for
    `clip_twice` and thresholds that are read; `lost_steps` is measured on the parameters
    themselves, over a few steps with random gradients, for which the optimizer is compiled.
    Nothing given is changed. Call it outside of `jit`.

    Args:
      tx: Any optax transformation, of optax, jaxclip or others.
      params: The parameters. With `jax.ShapeDtypeStruct` leaves `lost_steps` is left out.

    Returns:
      A list of `Finding`, to be printed or filtered by `rule`. What cannot be read or run
      is left out.

    Raises:
      TypeError: If `tx` is not an optax transformation.

    Example:
      >>> import jaxclip
      >>> tx = optax.chain(jaxclip.clip_by_global_norm(1.0), jaxclip.sign_sgd(1e-3))
      >>> for finding in lint_chain(tx, jnp.zeros(2)):
      ...     print(finding.rule, finding.where)
      clip_without_effect ('clip_by_global_norm (link 0)', 'scale_by_sign (link 1.0)')
    """
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(f"tx must be an optax transformation, got {tx!r}.")
    small = stand_in(params)
    links = links_of(tx, small)
    found: list[Finding] = []
    for flat in _sequences(links, without_guards=True):
        found += _clips_without_effect(flat)
        found += _clips_twice(flat)
        found += _boxes_not_kept(flat)
        found += _detectors_without_spikes(flat)
        found += _decays_that_grow(flat)
    for sequence in _sequences(links):
        found += _skips_undone(sequence)
        found += _feedback_without_units(sequence)
    found += _norms_of_groups(tx, small, links)
    found += _lost_steps(tx, params)
    return found


# --- Clips ----------------------------------------------------------------------------


def _clips_without_effect(links: Sequence[Link]) -> Iterator[Finding]:
    for i, clip in enumerate(links):
        if clip.kind not in _CLIPS:
            continue
        # Clips behind it only multiply by positive numbers, too.
        end = next((j for j in range(i, len(links)) if not _is_scaling(links[j])), len(links))
        if end == len(links):
            continue
        kinds = {_CLIPS.get(link.kind) for link in links[i:end]}
        grain: Grain = next(grain for grain in reversed(_GRAINS) if grain in kinds)
        if ignores_size(links[end].tx, links[end].params, grain):
            yield Finding(
                "clip_without_effect",
                (str(clip), str(links[end])),
                f"{links[end]} gives the same updates whatever the size of the gradient, so the "
                "clip in front of it changes nothing while gradients are finite, and costs a pass "
                "over them (if sharded, also a reduction between devices). Leave it out; put "
                "skip_nonfinite around the optimizer for bad steps, or use a momentum (lion, "
                "signum) if one large gradient should count for less.",
            )


def _clips_twice(links: Sequence[Link]) -> Iterator[Finding]:
    last: Link | None = None
    for link in links:
        if last and last.settings.get("axis_name") != link.settings.get("axis_name"):
            last = None
        if link.kind == "clip_by_global_norm":
            first, second = last and _fixed_norm(last), _fixed_norm(link)
            if last and first is not None and second is not None and first <= second:
                yield Finding(
                    "clip_twice",
                    (str(last), str(link)),
                    f"The norm is at most {first:g} already, so the clip to {second:g} never "
                    "changes anything. Leave one of the two out.",
                )
                continue
            last = link
        elif not _is_scaling(link):
            last = None


def _norms_of_groups(tx: Any, params: Any, links: Sequence[Link]) -> Iterator[Finding]:
    groups = [
        (link, part)
        for sequence in _sequences(links)
        for link in sequence
        if link.kind in ("masked", "partition")
        for part in link.inner
        if part
    ]
    clips = [
        (wrapper, part[0].params, link)
        for wrapper, part in groups
        for inner in _sequences(part)
        for link in inner
        if link.kind in _NORM_CLIPS
    ]
    moving = moving_paths(tx, params) if clips else set()
    for wrapper, group, clip in clips:
        outside = moving - floating_paths(group)
        if outside:
            yield Finding(
                "norm_of_a_group",
                (str(clip), str(wrapper)),
                f"Inside {wrapper} its norm is that of one group of leaves, not the global norm: "
                f"'{min(outside)}' is trained, too, and does not count. Put the clip in front "
                f"of {wrapper} to bound the norm of all.",
            )


def _detectors_without_spikes(links: Sequence[Link]) -> Iterator[Finding]:
    for i, link in enumerate(links):
        if link.kind not in ("zclip", "skip_or_clip"):
            continue
        before = list(itertools.takewhile(_is_scaling, reversed(links[:i])))
        axis = link.settings.get("axis_name")
        learned = [x for x in before if x.kind in ("autoclip", "zclip", "adagc")]
        has_history = link.kind == "zclip" or _number(link, "num_deviations") != math.inf
        if learned and has_history:
            yield Finding(
                "detector_without_spikes",
                (str(learned[-1]), str(link)),
                f"{learned[-1]} has removed the spikes before {link} sees the norm, so the "
                "latter's mean and deviation are those of clipped norms. Keep one of the two.",
            )
        bounds = [_fixed_norm(x) for x in before if x.settings.get("axis_name") == axis]
        bounds = [bound for bound in bounds if bound is not None]
        drop_norm = _number(link, "drop_norm")
        if has_history or not bounds or drop_norm is None:
            continue
        if min(bounds) <= drop_norm < math.inf:
            yield Finding(
                "detector_without_spikes",
                (str(before[-1]), str(link)),
                f"The norm is clipped to {min(bounds):g} before it is compared with "
                f"drop_norm={drop_norm:g}, so no step is ever skipped. Leave out the clip in "
                "front, and give skip_or_clip a max_norm.",
            )


def _fixed_norm(link: Link) -> float | None:
    """The bound of a clip by the global 2-norm, if it is a plain number."""
    if link.kind != "clip_by_global_norm":
        return None
    is_plain = link.settings.get("ord") in (None, 2)
    return _number(link, "max_norm") if is_plain else None


def _number(link: Link, name: str) -> float | None:
    """A setting that is a concrete number; None for schedules and all else."""
    value: Any = link.settings.get(name)
    is_array = isinstance(value, jax.Array) and checks.is_concrete(value) and value.ndim == 0
    is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    return float(value) if is_array or is_number else None


def _is_scaling(link: Link) -> bool:
    return link.kind in _CLIPS or link.kind == "identity"


# --- The box, decay, guards -----------------------------------------------------------


def _boxes_not_kept(links: Sequence[Link]) -> Iterator[Finding]:
    for i, box in enumerate(links):
        behind = [link for link in links[i + 1 :] if not _is_one_of(link, _BOX)]
        if _is_one_of(box, _BOX) and behind and leaves_box(box.tx, _chain(behind), box.params):
            yield Finding(
                "box_not_kept",
                (str(box), *map(str, behind)),
                "What comes after it changes the updates again, and weights leave the set. Make it "
                "the last link, or, if it is a box, give make_train_step a weight_threshold.",
            )


def _decays_that_grow(links: Sequence[Link]) -> Iterator[Finding]:
    for i, decay in enumerate(links):
        if not (_is_one_of(decay, _DECAYS) and i):
            continue
        params, g = decay.params, random_like(decay.params, 1)
        zeros = trees.map_clippable(jnp.zeros_like, params)
        before = run_transform(_chain(links[:i]), [g] * 3, params)
        added = run_transform(decay.tx, [zeros], params)
        behind = [g] if i + 1 == len(links) else None
        behind = behind or run_transform(_chain(links[i + 1 :]), [g], params)
        if before is None or added is None or behind is None:
            continue
        if dot(before[-1], g) < 0 < min(dot(added[0], params), dot(behind[0], g)):
            yield Finding(
                "decay_grows_weights",
                (str(links[i - 1]), str(decay)),
                f"In front of {decay} the updates point down the gradient already, so the decay "
                "is added with the sign of growth, and not multiplied by the learning rate: "
                "weights grow at each step. Put it in front of the learning rate.",
            )


def _skips_undone(links: Sequence[Link]) -> Iterator[Finding]:
    for i, guard in enumerate(links):
        if guard.kind not in _SKIPPERS:
            continue
        good = [random_like(guard.params, seed) for seed in (1, 2, 3)]
        bad, zeros = (trees.map_clippable(lambda g, x=x: g * x, good[0]) for x in (math.nan, 0.0))
        # The box does not move weights that are in it.
        behind = [x for x in links[i + 1 :] if not _is_one_of(x, _BOX)]
        after = behind and run_transform(_chain(behind), [*good, zeros], guard.params)
        if after and magnitude(after[-1]) > 0:
            yield Finding(
                "skip_undone",
                (str(guard), *map(str, behind)),
                f"A step that {guard} skips reaches the links behind it as a gradient of zeros, "
                "and they move the weights all the same. Put it around the whole optimizer.",
            )
        before = i and run_transform(_chain(links[:i]), [good[0], bad, *good[1:]], guard.params)
        if before and is_finite(before[0]) and not is_finite(before[-1]):
            yield Finding(
                "skip_undone",
                (*map(str, links[:i]), str(guard)),
                f"One gradient with a NaN stays in the state of what is in front of {guard}, so "
                "that every later step is bad, too. Put it around the whole optimizer.",
            )


def _feedback_without_units(links: Sequence[Link]) -> Iterator[Finding]:
    for link in links:
        if link.kind != "error_feedback":
            continue
        if ignores_size(link.settings["inner"], link.params, "tree"):
            yield Finding(
                "feedback_without_units",
                (str(link), *(str(x) for x in link.inner[0])),
                "What is inside error_feedback gives updates that do not depend on the size of "
                "the gradient, so what they leave over is no error, and grows without end where "
                "gradients are larger. Use scale_by_sign(scaled_sign()) or a clip inside, and "
                "the learning rate behind.",
            )


# --- Lost steps -----------------------------------------------------------------------


def _lost_steps(tx: Any, params: Any) -> Iterator[Finding]:
    shares = lost_shares(tx, params, enough=(_LOST_SHARE, _LOST_LEAF_SHARE))
    if not shares.leaves:
        return
    worst = max(shares.leaves, key=lambda name: shares.leaves[name])
    if shares.total <= _LOST_SHARE and shares.leaves[worst] <= _LOST_LEAF_SHARE:
        return
    dtype = shares.dtypes[worst]
    cure = (
        "Use make_train_step(stochastic_rounding=True) or apply_updates_stochastically, or keep "
        "the parameters in float32."
        if jnp.finfo(dtype).bits <= 16
        else "Use a larger step, or wider parameters."
    )
    yield Finding(
        "lost_steps",
        (f"leaf '{worst}'",),
        f"A step leaves {shares.total:.0%} of the weights exactly as they were, and "
        f"{shares.leaves[worst]:.0%} of '{worst}' ({dtype}): it is below half the distance to "
        f"their next number. {cure} Measured with random gradients, of a schedule at its largest.",
    )


# --- Parts ----------------------------------------------------------------------------


def _chain(links: Sequence[Link]) -> Any:
    return optax.chain(*(link.tx for link in links))


def _sequences(links: Sequence[Link], *, without_guards: bool = False) -> Iterator[Sequence[Link]]:
    """The links themselves, and those inside of each."""
    links = _flatten(links) if without_guards else links
    yield links
    for link in links:
        for inner in link.inner:
            yield from _sequences(inner, without_guards=without_guards)


def _flatten(links: Sequence[Link]) -> tuple[Link, ...]:
    """With what is inside a guard in the place of the guard."""
    flat: list[Link] = []
    for link in links:
        is_guard = link.kind in _TRANSPARENT and link.inner
        flat += _flatten(link.inner[0]) if is_guard else [link]
    return tuple(flat)


def _is_one_of(link: Link, kinds: tuple[str, ...]) -> bool:
    """Whether the link is of one of these kinds, perhaps masked or with injected numbers."""
    if link.kind in ("masked", "inject_hyperparams") and len(link.inner) == 1:
        return len(link.inner[0]) == 1 and _is_one_of(link.inner[0][0], kinds)
    return link.kind in kinds
