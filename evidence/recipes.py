"""The recipes that are compared: an optimizer, one knob of its own, and a kind of file.

Every one has the same steps and the same cosine schedule to zero. Its step size and its knob are
chosen on validation data, at the middle budget. A box is kappa * sqrt(2 / fan_in), `fan_in(kappa)`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxclip
from jaxclip import Grid, sparsity, training

DECAYS = (0.01, 0.1, 0.5)
AVERAGES = (0.99, 0.999, 0.9)  # decay rates of averages of the weights
BOXES = (1.0, 0.5, 2.0)
GRIDS = (Grid("ternary"), Grid(2, levels="balanced"), Grid(3))
SIGN_STEP = 0.2  # of Adam's step size, where the search begins


class Recipe(NamedTuple):
    """One way from a loss to a file of a given size.

    Attributes:
      optimizer: Of a step size, a knob, the number of steps and AdamW's weight decay.
      knobs: Values of the knob; the first is where the search begins.
      file: "coded", rounded by a calibration to the bytes of the budget; "grid", the grid of the
        knob on which it was trained, entropy-coded; "rounded", to the grid of the knob or to 4
        bits without data, entropy-coded.
      adapts: What is adapted until the file fits the budget: "width", "density" or None.
      width: Width of the network, if it is not adapted.
      step: The first step size to try, as a multiple of the task's.
      penalty: Of parameters and the knob, added to the loss.
      kept: Of the optimizer's state and the last parameters, the parameters to keep.
    """

    optimizer: Callable[..., optax.GradientTransformation]
    knobs: tuple
    file: str = "coded"
    adapts: str | None = None
    width: float = 1.0
    step: float = 1.0
    penalty: Callable[[Any, Any], jax.Array] = lambda params, knob: jnp.zeros(())
    kept: Callable[[Any, Any], Any] = lambda state, params: params


def falling(step_size, num_steps):
    return optax.cosine_decay_schedule(step_size, num_steps)


def adamw(step_size, decay, num_steps, _=None):
    return optax.adamw(falling(step_size, num_steps), weight_decay=decay)


def adamw_of_the_chosen_decay(step_size, _, num_steps, decay):
    return adamw(step_size, decay, num_steps)


def pruned(step_size, density, num_steps, decay):
    """Fewer and fewer weights over the first three quarters (Zhu and Gupta 2017)."""
    schedule = optax.polynomial_schedule(1.0, density, 3, 3 * num_steps // 4)
    inner = adamw(step_size, decay, num_steps)
    return sparsity.keep_sparse(inner, schedule, every=10)


def boxed(inner, kappa):
    return optax.chain(inner, jaxclip.project_weights(jaxclip.box(jaxclip.fan_in(kappa))))


def adam_in_a_box(step_size, kappa, num_steps, _=None):
    return boxed(optax.adam(falling(step_size, num_steps)), kappa)


def lion(step_size, decay, num_steps, _=None):
    return jaxclip.lion(falling(step_size, num_steps), weight_decay=decay)


def lion_in_a_box(step_size, kappa, num_steps, _=None):
    return boxed(jaxclip.lion(falling(step_size, num_steps), weight_decay=0.0), kappa)


def lion_in_a_soft_box(step_size, kappa, num_steps, _=None):
    """Weight decay 1/t, whose balance with steps by sign is at t (Chen et al. 2023)."""

    def decay(updates, params):
        return jax.tree.map(
            lambda u, w: u + w / (kappa * (2 / w.shape[-2]) ** 0.5) if w.ndim > 1 else u,
            updates,
            params,
        )

    return optax.chain(
        jaxclip.scale_by_lion(),
        optax.stateless(decay),
        optax.scale_by_learning_rate(falling(step_size, num_steps)),
    )


def averaged_adamw(step_size, rate, num_steps, decay):
    return optax.chain(adamw(step_size, decay, num_steps), training.average_weights(rate))


def averaged_lion(step_size, rate, num_steps, _=None):
    """Without weight decay, as Lion in a box."""
    return optax.chain(lion(step_size, 0.0, num_steps), training.average_weights(rate))


def on_the_grid(inner):
    """The last half of the steps on the grid, with scales learned (LSQ, Esser et al. 2020)."""

    def optimizer(step_size, grid, num_steps, decay):
        return jaxclip.keep_on_grid(
            inner(step_size, num_steps, decay),
            grid,
            start_step=num_steps // 2,
            learn_scales=optax.adam(falling(step_size, num_steps)),
        )

    return optimizer


def matrices(params):
    return [w for w in jax.tree.leaves(params) if w.ndim > 1]


def kurtosis(params, factor):
    """Pulls weights to a uniform distribution (KURE, Shkolnik et al. 2020)."""

    def off(w):
        standard = (w - w.mean()) / w.std()
        return (jnp.mean(standard**4) - 1.8) ** 2

    return factor * jnp.mean(jnp.stack([off(w) for w in matrices(params)]))


def ranges(params, factor):
    """Penalises the largest weight of every leaf (R2 loss, Kundu et al. 2023)."""
    return factor * jnp.sum(jnp.stack([jnp.max(jnp.abs(w)) for w in matrices(params)]))


RECIPES = {
    "AdamW": Recipe(adamw, DECAYS),
    "AdamW, narrower": Recipe(adamw_of_the_chosen_decay, (0.5, 0.35), width=0.5),
    "AdamW, pruned": Recipe(pruned, (1 / 8, 1 / 4, 1 / 16)),
    "Adam in a box": Recipe(adam_in_a_box, BOXES),
    "Lion": Recipe(lion, (0.05, 0.5, 3.0), step=SIGN_STEP),
    "Lion, decay 1/t": Recipe(lion_in_a_soft_box, BOXES, step=SIGN_STEP),
    "Lion in a box": Recipe(lion_in_a_box, BOXES, step=SIGN_STEP),
    "AdamW on a grid": Recipe(
        on_the_grid(lambda a, n, decay: adamw(a, decay, n)), GRIDS, file="grid", adapts="width"
    ),
    "Adam in a box, on a grid": Recipe(
        on_the_grid(lambda a, n, _: adam_in_a_box(a, 1.0, n)), GRIDS, file="grid", adapts="width"
    ),
    "Lion in a box, on a grid": Recipe(
        on_the_grid(lambda a, n, _: lion_in_a_box(a, 1.0, n)),
        GRIDS,
        file="grid",
        adapts="width",
        step=SIGN_STEP,
    ),
    "Lion in a box, rounded": Recipe(
        lambda a, _, n, decay: lion_in_a_box(a, 1.0, n),
        GRIDS,
        file="rounded",
        adapts="width",
        step=SIGN_STEP,
    ),
    "AdamW, narrower, 4 bits": Recipe(
        adamw_of_the_chosen_decay, (Grid(4),), file="rounded", adapts="width"
    ),
    "AdamW, pruned, 4 bits": Recipe(pruned, (1 / 8,), file="rounded", adapts="density"),
    "AdamW, kurtosis": Recipe(adamw_of_the_chosen_decay, (1.0, 0.1, 0.01), penalty=kurtosis),
    "AdamW, ranges": Recipe(adamw_of_the_chosen_decay, (0.01, 0.001, 0.1), penalty=ranges),
    "AdamW, averaged": Recipe(averaged_adamw, AVERAGES, kept=training.averaged_weights),
    "Lion, averaged": Recipe(
        averaged_lion, AVERAGES, step=SIGN_STEP, kept=training.averaged_weights
    ),
}
