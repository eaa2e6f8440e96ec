"""Clipping the singular values of matrices, without a singular value decomposition.

For `W = U diag(s) V^H` the capped matrix is `U diag(min(s, c)) V^H`. It is made of two
matrix signs, each a few rounds of products:

    O = U V^H, the polar factor of W
    M = sign(c I - O^H W), +1 on right singular vectors with s < c, -1 where s > c
    capped = W (I + M) / 2 + c O (I - M) / 2

A round maps the singular values by `x <- a x (3 - (a x)**2) / 2`. The number of rounds fixes
in advance how far a singular value close to c can end above it, and the cap is lowered by that.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from jax.typing import ArrayLike

from jaxclip._core import checks, trees
from jaxclip._core.floats import (
    FLOAT32_MAX,
    compute_dtype,
    keep_weak_type,
    round_toward_zero,
)
from jaxclip._core.trees import PyTree

_DEFAULT_STEPS = 12  # rounds of each matrix sign


def cap_singular_values(matrix: ArrayLike, cap: ArrayLike, steps: int | None = None) -> jax.Array:
    """Returns `U diag(min(s, cap)) V^H` for a matrix `U diag(s) V^H`, or a batch of them.

    The accuracy depends on r, the largest singular value over the cap. Measured over many
    shapes and spectra, no singular value ends above `cap` by more than 1e-6 of it. The result
    is within `3e-5 * r * cap` of the exact one in spectral norm (1e-3 at 8 steps, 2e-4 at 10,
    5e-6 at 14), apart from the rounding of half precision. That holds for r up to 500 (12 at
    8 steps, 80 at 10, 3000 at 14). For a lower cap the matrix is capped at that ratio and
    multiplied by the rest, which also shrinks singular values below the cap.

    Args:
      matrix: Shape (..., m, n), real or complex floating.
      cap: Scalar in [0, inf], in the units of the matrix. May be traced; below 0 counts as 0.
      steps: Rounds of each matrix sign, at least 1; None is 12.

    Returns:
      An array like `matrix`. A matrix whose Frobenius norm is at or below `cap` is
      bit-identical; NaN and infinities stay not finite.

    Raises:
      ValueError: If `matrix` has fewer than two dimensions or is not floating, `steps` is
        not an integer of at least 1, or `cap` is not a scalar in [0, inf].

    Example:
      >>> print(jnp.round(cap_singular_values(jnp.array([[3.0, 0.0], [0.0, 0.5]]), 1.0), 3))
      [[1.  0. ]
       [0.  0.5]]

    References:
      Franz Louis Cesista, Numerically Stable Spectral Clipping via Newton-Schulz Iteration,
      2025, https://leloykun.github.io/ponder/spectral-clipping (two signs, nested).
      Nicholas J. Higham, Functions of Matrices, 2008, chapters 5 and 8,
      https://doi.org/10.1137/1.9780898717778
      Amsel et al., The Polar Express, 2025, https://arxiv.org/abs/2505.16932 (each round the
      best for the interval that the one before leaves; here of degree 3, in closed form).
    """
    matrix = jnp.asarray(matrix)
    steps = _DEFAULT_STEPS if steps is None else steps
    checks.check_count("steps", steps)
    checks.check_threshold("cap", cap)
    if matrix.ndim < 2 or not trees.is_clippable(matrix):
        raise ValueError(
            "matrix must be a floating array of at least two dimensions, "
            f"got {matrix.dtype} of shape {matrix.shape}."
        )
    return _cap(matrix, cap, steps, matrix.ndim - 2).capped if matrix.size else matrix


class Capped(NamedTuple):
    """A leaf of capped matrices.

    Attributes:
      capped: The leaf.
      norm: Scalar float32, a lower estimate of the largest spectral norm before.
      num_clipped: Scalar float32, the number of matrices that were clipped.
    """

    capped: jax.Array
    norm: jax.Array
    num_clipped: jax.Array


def cap_leaf(
    name: str, path: str, g: PyTree, cap: ArrayLike, steps: int | None, num_stacked: int
) -> Capped:
    """Caps the singular values of a leaf's matrices; a leaf without matrices passes through."""
    if not count_matrices(g, num_stacked):
        return Capped(g, jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))
    if np.size(cap) != 1:
        raise ValueError(
            f"{name} must be one number for a leaf; at {path!r} it has shape {np.shape(cap)}."
        )
    g = jnp.asarray(g)
    if isinstance(cap, float):  # one beyond float32 bounds nothing there
        cap = cap if cap <= FLOAT32_MAX or g.dtype in (np.float64, np.complex128) else np.inf
    else:
        cap = jnp.reshape(cap, ())
    steps = _DEFAULT_STEPS if steps is None else steps
    cap_matrices = functools.partial(_cap, steps=steps, num_stacked=num_stacked)
    result = _with_auto_axes(cap_matrices, g)(g, cap)
    return result._replace(capped=keep_weak_type(result.capped, g))


def count_matrices(g: PyTree, num_stacked: int) -> int:
    """Returns the number of matrices in a leaf, 0 if it has too few axes or no entries."""
    if not trees.is_clippable(g) or np.ndim(g) - num_stacked < 2 or np.size(g) == 0:
        return 0
    return math.prod(np.shape(g)[:num_stacked])


def _with_auto_axes(fn: Callable[..., Capped], g: jax.Array) -> Callable:
    """Makes the Explicit mesh axes Auto inside `fn`."""
    # Products over a sharded axis and reshapes of one are ambiguous under Explicit sharding.
    sharding = jax.typeof(g).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return fn
    scalar = sharding.update(spec=PartitionSpec())
    return jax.sharding.auto_axes(fn, out_sharding=Capped(sharding, scalar, scalar))


# --- One matrix -----------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("steps", "num_stacked"), inline=True)
def _cap(g: jax.Array, cap: ArrayLike, steps: int, num_stacked: int) -> Capped:
    """Caps matrices whose columns are the last axis and whose rows all others after the stack."""
    dtype = compute_dtype(g.dtype)
    real = jnp.finfo(dtype).dtype
    cap = jnp.maximum(jnp.asarray(round_toward_zero(cap, real)), 0)
    stack, rows = g.shape[:num_stacked], math.prod(g.shape[num_stacked:-1])
    x = g.reshape(*stack, rows, g.shape[-1]).astype(dtype)
    is_wide = x.shape[-2] < x.shape[-1]
    x = jnp.swapaxes(x, -1, -2) if is_wide else x
    size = _measure(x)
    # The rounding of the bound must not clip a matrix that is exactly at the cap.
    tolerance = 1 - 8 * jnp.finfo(real).eps
    is_above = (size.bound * tolerance > cap * size.inverse) | (cap == 0)
    capped = lax.cond(
        jnp.any(is_above), lambda x: _cap_tall(x, cap, size, steps), jnp.zeros_like, x
    )
    capped = (jnp.swapaxes(capped, -1, -2) if is_wide else capped).reshape(g.shape)
    if g.dtype.itemsize < 4:
        capped = round_toward_zero(capped, g.dtype)
    norm = jnp.max(size.norm * size.unit).astype(jnp.float32)
    # Select in the shape of the leaf, from which the result takes its sharding.
    choice = is_above.reshape(*stack, *(1 for _ in g.shape[num_stacked:]))
    return Capped(
        capped=jnp.where(choice, capped.astype(g.dtype), g),
        norm=jnp.minimum(norm, FLOAT32_MAX),
        num_clipped=jnp.sum(is_above, dtype=jnp.float32),
    )


# The sign is that of `O^H W`, whose eigenvalues are the singular values, and not of `W^H W`,
# whose squares would cost half of the digits. `O` has to be right only where s > c. Where s is
# so small that the rounds do not reach a polar factor, `O^H W` is smaller still, so the first
# term passes that part of W unchanged. A round sends [l, 1] into [l', 1], never above 1, with
# the `a` that makes l' largest.
def _cap_tall(x: jax.Array, cap: jax.Array, size: "_Size", steps: int) -> jax.Array:
    """Caps matrices with at least as many rows as columns."""
    plan = _plan(steps)
    real = jnp.finfo(x.dtype).dtype
    x = x * size.inverse.astype(x.dtype) / size.bound.astype(x.dtype)  # norm at most 1
    cap_of_x = cap * size.inverse / size.bound
    # The rounds do not reach below this fraction of the norm; a factor meets such a cap.
    lowest = 4 * plan.resolution
    is_low = cap_of_x < lowest
    aim = jnp.clip(cap_of_x, lowest, 1)
    aim = aim - plan.excess * jnp.maximum(1 - aim, aim) - 4 * jnp.finfo(real).eps
    polar = _sign(x, plan.scales)
    modulus = _matmul(_adjoint(polar), x)
    modulus = (modulus + _adjoint(modulus)) / 2
    eye = _identity(x)
    gap = (aim.astype(x.dtype) * eye - modulus) / jnp.maximum(1 - aim, aim).astype(x.dtype)
    side = _sign(gap, plan.scales)
    polar = aim.astype(x.dtype) * polar
    capped = (x + polar + _matmul(x - polar, side)) / 2
    # In two factors: the norm itself may exceed the dtype.
    first = jnp.where(is_low, cap / lowest, size.bound)
    second = jnp.where(is_low, jnp.ones_like(size.unit), size.unit)
    return capped * first.astype(x.dtype) * second.astype(x.dtype)


class _Size(NamedTuple):
    """Spectral norms of matrices: at most `bound * unit`, about `norm * unit`."""

    unit: jax.Array  # a power of two
    inverse: jax.Array  # of the unit, because XLA turns `x / a / b` into `x / (a * b)`
    bound: jax.Array
    norm: jax.Array


def _measure(x: jax.Array) -> _Size:
    """Bounds the norms of tall matrices by the norms of powers of their Gram matrices."""
    # `norm(W)**2 = norm(G) <= frobenius(G**4)**(1/4)`. With r equal singular values this bound is
    # above the norm by a factor of `r**(1/16)`, but the Frobenius norm of W by `r**(1/2)`.
    x = lax.stop_gradient(x)
    unit, inverse = _power_of_two(x)
    x = x * inverse.astype(x.dtype)
    frobenius = _frobenius(x)
    x = x / _nonzero(frobenius).astype(x.dtype)
    gram = _matmul(_adjoint(x), x)
    bound = jnp.ones_like(frobenius)
    for root in (2, 4, 8):
        length = _frobenius(gram)
        bound *= length ** (1 / root)
        gram = gram / _nonzero(length).astype(x.dtype)
        gram = _matmul(gram, gram) if root < 8 else gram
    bound = jnp.minimum(bound, 1)
    return _Size(unit, inverse, _nonzero(frobenius * bound), frobenius * _power_norm(x, gram))


def _power_norm(x: jax.Array, gram_power: jax.Array) -> jax.Array:
    """Returns a lower estimate of the norm, by power steps from a Gram power's longest column."""
    diagonal = jnp.real(jnp.diagonal(gram_power, axis1=-2, axis2=-1))
    longest = jnp.argmax(diagonal, axis=-1)[..., None, None]
    v = jnp.take_along_axis(gram_power, longest, axis=-1)
    norm = jnp.zeros_like(diagonal[..., :1, None])
    for _ in range(8):
        v = v / _nonzero(_frobenius(v)).astype(v.dtype)
        image = _matmul(x, v)
        norm = _frobenius(image)
        v = _matmul(_adjoint(x), image)
    return norm


def _power_of_two(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns a power of two near each matrix's largest entry (1 if unusual), and its inverse."""
    magnitude = jnp.maximum(jnp.abs(jnp.real(x)), jnp.abs(jnp.imag(x)))
    largest = jnp.max(magnitude, axis=(-2, -1), keepdims=True)
    info = jnp.finfo(largest.dtype)
    is_usual = (largest >= info.tiny) & jnp.isfinite(largest)
    largest = jnp.where(is_usual, jnp.minimum(largest, 1 / info.tiny), jnp.ones_like(largest))
    # By bits: the exponent alone, and its mirror image about that of 1.
    unsigned = jnp.dtype(f"uint{info.bits}")
    exponent = lax.bitcast_convert_type(largest, unsigned) >> info.nmant << info.nmant
    mirrored = jnp.asarray(2 * (info.maxexp - 1) << info.nmant, unsigned) - exponent
    unit, inverse = (lax.bitcast_convert_type(b, largest.dtype) for b in (exponent, mirrored))
    return unit, inverse


def _nonzero(x: jax.Array) -> jax.Array:
    return jnp.where(x == 0, jnp.ones_like(x), x)


def _frobenius(x: jax.Array) -> jax.Array:
    """Returns Frobenius norms, dims kept, of matrices of ordinary magnitude."""
    squares = jnp.real(x * jnp.conj(x))
    return jnp.sqrt(jnp.sum(squares, axis=(-2, -1), keepdims=True))


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _identity(x: jax.Array) -> jax.Array:
    """Returns the identity in the shape of a tall matrix's Gram matrix."""
    eye = jnp.eye(x.shape[-1], dtype=x.dtype)
    return jnp.expand_dims(eye, tuple(range(x.ndim - 2)))


def _adjoint(x: jax.Array) -> jax.Array:
    return jnp.conj(jnp.swapaxes(x, -1, -2))


# --- The rounds -----------------------------------------------------------------------


def _sign(x: jax.Array, scales: tuple[float, ...]) -> jax.Array:
    """Returns the polar factor of a tall matrix of norm 1, the sign of a Hermitian one."""
    eye = _identity(x)

    def one_round(x: jax.Array, scale: jax.Array) -> tuple[jax.Array, None]:
        gram = _matmul(_adjoint(x), x)
        return _matmul(x, 1.5 * scale * eye - 0.5 * scale**3 * gram), None

    return lax.scan(one_round, x, jnp.asarray(scales, x.dtype))[0]


class _Plan(NamedTuple):
    """The rounds of a matrix sign."""

    scales: tuple[float, ...]
    resolution: float  # the smallest magnitude that they bring to 1
    excess: float  # by which a singular value at the cap can end above it, over the norm


@functools.cache
def _plan(steps: int) -> _Plan:
    """Returns the rounds that reach as far down as `steps` of them can."""
    low, high = -40.0, 0.0  # powers of two; from the higher one the rounds converge
    for _ in range(40):
        middle = (low + high) / 2
        # So close to 1 that the derivative is right too: the rounds oscillate below 1.
        is_reached = _rounds(2.0**middle, steps)[1] > 1 - 1e-12
        low, high = (low, middle) if is_reached else (middle, high)
    scales, _ = _rounds(2.0**high, steps)
    # A singular value s > c by x comes to c + x * (1 - sign(x)) / 2.
    x = np.geomspace(2.0**high / 1000, 1, 4000)
    sign = functools.reduce(_one_round, scales, x)
    return _Plan(scales, 2.0**high, 1.01 * float(np.max(x * (1 - sign) / 2)))


def _rounds(lowest: float, steps: int) -> tuple[tuple[float, ...], float]:
    """Returns the scales of rounds from [lowest, 1], and where the lower end goes."""
    scales = []
    for _ in range(steps):
        # With larger scales the largest values would fall below a tenth, and lose digits.
        scales.append(min(math.sqrt(3 / (1 + lowest + lowest**2)), 1.7))
        lowest = min(_one_round(lowest, scales[-1]), _one_round(1.0, scales[-1]))
    return tuple(scales), lowest


def _one_round(x: Any, scale: float) -> Any:  # a number or an array
    return scale * x * (3 - (scale * x) ** 2) / 2
