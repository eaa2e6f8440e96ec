"""Exact arithmetic on floats: rounding towards zero, rescaling by powers of two, bad values.

XLA may fuse, reassociate, flush subnormals and keep excess precision. Each function here
gives the documented number in spite of that.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxclip._core.compiling import groups_alike
from jaxclip._core.trees import PyTree, floating_leaves, is_clippable

FLOAT32_MAX = float(np.finfo(np.float32).max)
FLOAT32_TINY = float(np.finfo(np.float32).tiny)  # the least normal number


def is_sharded(x: jax.Array) -> bool:
    """Returns True if an axis is split over an explicit mesh, which forbids reshaping it."""
    return any(s is not None for s in getattr(jax.typeof(x).sharding, "spec", ()))


class Spread:
    """A scalar in the shapes of leaves, broadcast once for all leaves of one shape.

    XLA goes through all operations of a program dozens of times before it joins equal ones, and a
    scalar that meets a leaf is an operation of its own.
    """

    def __init__(self, scalar: ArrayLike):
        self._scalar = jnp.asarray(scalar)
        self._arrays: dict[tuple[int, ...], jax.Array] = {}

    def like(self, x: jax.Array) -> jax.Array:
        """Returns the scalar in the shape of a leaf; the scalar itself outside of a program."""
        # Also on a mesh, where leaves of one shape may be split in different ways.
        if not isinstance(x, jax.core.Tracer) or not jax.typeof(x).sharding.mesh.empty:
            return self._scalar
        if x.shape not in self._arrays:
            self._arrays[x.shape] = jnp.broadcast_to(self._scalar, x.shape)
        return self._arrays[x.shape]


def as_float(number: ArrayLike, dtype: DTypeLike | None = None) -> jax.Array:
    """Returns a number as an array; one that is beyond the dtype is infinite, without a warning."""
    with np.errstate(over="ignore"):
        return jnp.asarray(number, jnp.result_type(float) if dtype is None else dtype)


def clamp(value: ArrayLike, low: ArrayLike, high: ArrayLike) -> jax.Array:
    """Returns `value` in float32, clipped to [low, high]; NaN stays NaN."""
    return jnp.clip(as_float(value, jnp.float32), low, high)


def saturate(x: jax.Array, dtype: DTypeLike, fraction: float = 1.0) -> jax.Array:
    """Clips to a fraction of the finite range of `dtype`, real and imaginary parts apart."""
    if jnp.iscomplexobj(x):
        parts = (saturate(part, dtype, fraction) for part in (jnp.real(x), jnp.imag(x)))
        return lax.complex(*parts)
    # A Python number: the largest of a wider `dtype` would overflow in that of `x`.
    largest = fraction * min(float(jnp.finfo(dtype).max), float(jnp.finfo(x.dtype).max))
    return lax.clamp(np.asarray(-largest, x.dtype), x, np.asarray(largest, x.dtype))


def cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns an array in another dtype, or raises if a finite entry would become infinite."""
    if array.dtype == dtype:
        return array
    result = rounded(array, dtype)
    is_lost = np.isfinite(array) & ~np.isfinite(result)
    if np.any(is_lost):
        raise ValueError(
            f"{name!r} has an entry that is not finite in {dtype}: {array[is_lost][0]}."
        )
    return result


def rounded(array: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """Returns an array in another dtype, entries beyond it as infinity or 0."""
    with np.errstate(over="ignore", under="ignore"):
        return array.astype(dtype)


def select(condition: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns `jnp.where(condition, x, y)` for arrays of one dtype."""
    # `jnp.where` is a call in the program, and a few calls for each leaf are slow to compile.
    is_plain = x.shape == y.shape and condition.shape in ((), x.shape)
    if not is_plain:
        return jnp.where(condition, x, y)
    return (_select_bfloat16 if x.dtype == jnp.bfloat16 else _select)(condition, x, y)


def _select(condition: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    return lax.select_n(condition, y, x)


@jax.custom_jvp
def _select_bfloat16(condition: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    # Of bits: XLA on CPU selects among bfloat16 in float32, and casts the result.
    bits = (lax.bitcast_convert_type(a, jnp.uint16) for a in (x, y))
    return lax.bitcast_convert_type(_select(condition, *bits), jnp.bfloat16)


@_select_bfloat16.defjvp
def _select_bfloat16_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return _select_bfloat16(*primals), _select(primals[0], *tangents[1:])


def is_normal(bound: jax.Array | np.ndarray) -> bool:
    """Returns True if a bound is known (not traced) and has no zeros and subnormals."""
    return isinstance(bound, np.ndarray) and bool(np.all(bound >= jnp.finfo(bound.dtype).tiny))


def in_whole_bytes(x: jax.Array) -> jax.Array:
    """Returns floats of 4 or 6 bits in a format of 8 that has all their values; others as given."""
    return x.astype(jnp.float8_e4m3fn) if jnp.finfo(x.dtype).bits < 8 else x


def exceeds(x: jax.Array, bound: ArrayLike) -> jax.Array:
    """Returns True where `|x| > bound` or the bound is 0, for real `x`; False for NaN."""
    bound = jnp.asarray(bound)
    # Compares bits, which order like magnitudes, because XLA on CPU treats subnormals as zero.
    # A bound of 0 needs its own case: XLA turns a comparison of bits with 0 into one of numbers.
    x, bound = in_whole_bytes(x), in_whole_bytes(bound)
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    no_sign = jnp.asarray(jnp.iinfo(unsigned).max >> 1, unsigned)
    magnitude, limit = (lax.bitcast_convert_type(a, unsigned) & no_sign for a in (x, bound))
    return ((magnitude > limit) | (limit == 0)) & ~jnp.isnan(x)


def increment(count: jax.Array, condition: ArrayLike = True) -> jax.Array:
    """Returns `count + 1` where `condition` holds, but never beyond the largest integer."""
    return jnp.where(condition, jnp.asarray(optax.safe_increment(count)), count)


def first_true(conditions: jax.Array) -> jax.Array:
    """Returns the position of the first True in a vector, as int32; -1 if there is none."""
    # As one minimum: `argmax` reduces two arrays.
    size = conditions.shape[0]
    positions = jnp.where(conditions, np.arange(size, dtype=np.int32), np.int32(size))
    first = jnp.min(positions, initial=size)
    return jnp.where(first < size, first, np.int32(-1))


def has_nonfinite(tree: PyTree) -> jax.Array:
    """Returns True if a floating entry is not finite."""
    leaves = [jnp.asarray(x) for x in floating_leaves(tree)]
    if not leaves:
        return jnp.zeros((), bool)
    # Stacked, because a chain of 1,000 conditions is slow to compile.
    groups = [_zero_or_nan([leaves[i] for i in group]) for group in groups_alike(leaves)]
    return jnp.any(jnp.isnan(jnp.stack(groups)))


def zero_or_nan(x: jax.Array) -> jax.Array:
    """Returns 0 in float32, or NaN if an entry is not finite."""
    return _zero_or_nan([x])


@jax.jit  # leaves of one shape share one trace
def _zero_or_nan(leaves: list[jax.Array]) -> jax.Array:
    """Returns 0 in float32, or NaN if an entry of leaves of one shape is not finite."""
    # A sum, because XLA on CPU writes a conjunction's conditions to memory.
    if jnp.iscomplexobj(leaves[0]):
        leaves = [part for x in leaves for part in (jnp.real(x), jnp.imag(x))]
    zeros = functools.reduce(operator.add, (x - x for x in leaves))
    return jnp.sum(zeros.astype(jnp.float32))


def is_bad_step(updates: optax.Updates, bounds: PyTree) -> jax.Array:
    """Returns True if a floating entry is not finite, or the bound of a floating leaf is NaN."""
    pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(bounds), strict=True)
    return has_nonfinite(updates) | has_nan([b for g, b in pairs if is_clippable(g)])


def has_nan(bounds: Sequence[ArrayLike]) -> jax.Array:
    """Returns True if a bound is NaN."""
    # Python numbers are not NaN: they were checked when the transform was made.
    nan = [jnp.any(jnp.isnan(bound)) for bound in bounds if isinstance(bound, jax.Array)]
    return jnp.any(jnp.stack(nan)) if nan else jnp.zeros((), bool)


def compute_dtype(*dtypes: DTypeLike) -> type[np.generic]:
    """Returns the dtype that leaf functions compute in: float32, or wider or complex if one is."""
    is_wide = any(jnp.finfo(d).bits == 64 for d in dtypes)
    if any(jnp.issubdtype(d, jnp.complexfloating) for d in dtypes):
        return jnp.complex128 if is_wide else jnp.complex64
    return jnp.float64 if is_wide else jnp.float32


def keep_weak_type(x: jax.Array, like: jax.Array) -> jax.Array:
    """Returns `x`, weakly typed if `like` is; both must have the same shape and dtype."""
    if like.weak_type and not x.weak_type:
        return like.at[...].set(x)
    return x


def power_of_two(exponent: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Returns a small, a large or no power of two (1), by the sign of an exponent."""
    # Times this, the largest and smallest magnitudes have squares that neither overflow (for up
    # to 2**50 entries) nor sink below the normal range.
    power = 540 if dtype == jnp.float64 else 90
    rescale = jnp.where(exponent < 0, 2.0**-power, jnp.ones((), dtype))
    return jnp.where(exponent > 0, 2.0**power, rescale)


def inverse_size(largest: jax.Array | np.ndarray) -> Any:
    """Returns a power of two near `1 / largest`, which keeps squares in range."""
    if isinstance(largest, jax.Array) and largest.dtype == jnp.float32:
        # By bits, because a power takes XLA longer to compile than all around it.
        exponent = (lax.bitcast_convert_type(largest, jnp.int32) >> 23) & 255
        is_ordinary = (largest != 0) & jnp.isfinite(largest)
        opposite = jnp.where(is_ordinary, jnp.clip(253 - exponent, 1, 253), 127)
        return lax.bitcast_convert_type(opposite << 23, jnp.float32)
    xp = np if isinstance(largest, np.ndarray) else jnp
    _, exponent = xp.frexp(largest)
    return xp.ldexp(xp.ones_like(largest), -xp.clip(exponent, -126, 126))


def rescale_for(largest: jax.Array) -> jax.Array:
    """Returns the power of two that keeps squares in range, given the largest magnitude."""
    exponent = jnp.where(largest > 2.0**38, -1, jnp.where(largest < 2.0**-50, 1, 0))
    return power_of_two(exponent, largest.dtype)


def not_folded(leaves: PyTree) -> PyTree:
    """Returns the leaves unchanged, but hides from XLA that they are constant or shared."""
    # If a leaf is constant (the gradient of an unused parameter), XLA would square the rescale
    # by itself, and 0 * inf is NaN. If many arrays of one shape share a scalar, it would write
    # that scalar to memory in the arrays' shape.
    return lax.optimization_barrier(leaves)


def phase_and_modulus(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns `z / |z|` (0 where z is 0 or not finite) and `|z|` (inf beyond the real dtype)."""
    largest = jnp.maximum(jnp.abs(jnp.real(z)), jnp.abs(jnp.imag(z)))
    # A power of two: XLA would merge two divisions into one by a product that overflows.
    rescale = rescale_for(largest)
    real, imag = jnp.real(z) * rescale, jnp.imag(z) * rescale
    is_ordinary = (largest > 0) & jnp.isfinite(largest)
    length = jnp.sqrt(jnp.where(is_ordinary, real * real + imag * imag, jnp.ones_like(real)))
    phase = jnp.where(is_ordinary, lax.complex(real / length, imag / length), jnp.zeros_like(z))
    return phase, jnp.where(is_ordinary, length / rescale, largest)


def quotient(x: jax.Array, by: jax.Array) -> jax.Array:
    """Returns `x / by` for a real `by` that is broadcast; both have one real dtype."""
    # XLA multiplies by the reciprocal instead. That of a float32 above 2**126 is subnormal, and
    # flushed to 0: the quotient would be 0, or NaN where x is infinite.
    rescale = jnp.where(jnp.abs(by) > 2.0**100, jnp.asarray(0.25, by.dtype), jnp.ones_like(by))
    return (x * rescale) / (by * rescale)


@functools.cache
def widest_bound(dtype: DTypeLike) -> float:
    """Returns a bound that bounds nothing: infinity, or the largest number of a format without."""
    with np.errstate(invalid="ignore"):
        has_infinity = np.isinf(np.asarray(np.inf, np.float32).astype(dtype))
    return float("inf") if has_infinity else float(jnp.finfo(dtype).max)


def round_toward_zero(value: ArrayLike, dtype: DTypeLike) -> Any:
    """Returns `value` in a real `dtype`, never larger in magnitude; derivatives are a cast's."""
    dtype = jnp.dtype(dtype)
    # Numbers of Python and NumPy become NumPy arrays. Beyond the dtype they become inf (or what a
    # format has instead), because they bound nothing there; entries of a jax array become the
    # largest finite number.
    if isinstance(value, (int, float, np.ndarray, np.generic)):
        return _round_concrete(np.asarray(value, np.float64), dtype)
    value = jnp.asarray(value)
    if value.dtype == jnp.float64 and dtype != jnp.float64:
        value = _to_float32(value)
    return _truncate(value, dtype) if dtype.itemsize < 4 else value.astype(dtype)


def _round_concrete(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    largest = float(jnp.finfo(dtype).max)
    bounded = np.where(np.abs(value) > largest, np.copysign(widest_bound(dtype), value), value)
    rounded = np.asarray(bounded.astype(dtype))
    grew = np.abs(rounded.astype(np.float64)) > np.abs(bounded)
    return np.asarray(np.where(grew, np.nextafter(rounded, np.zeros((), dtype)), rounded))


@jax.custom_jvp
def _to_float32(value: jax.Array) -> jax.Array:
    """Rounds float64 towards zero."""
    finite = jnp.clip(value, -FLOAT32_MAX, FLOAT32_MAX)
    bounded = jnp.where(jnp.isinf(value), value, finite)
    rounded = bounded.astype(jnp.float32)
    grew = jnp.abs(rounded.astype(value.dtype)) > jnp.abs(value)
    return jnp.where(grew, jnp.nextafter(rounded, jnp.zeros_like(rounded)), rounded)


@_to_float32.defjvp
def _to_float32_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return _to_float32(*primals), tangents[0].astype(jnp.float32)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _truncate(value: jax.Array, dtype: np.dtype) -> jax.Array:
    # By bits: XLA may keep a bfloat16 in float32 inside a fusion, so rounding first and
    # comparing afterwards can see a difference of zero.
    value = value.astype(jnp.float32)
    info = jnp.finfo(dtype)
    bits = lax.bitcast_convert_type(value, jnp.uint32)
    if dtype == jnp.bfloat16:  # by its own bits: XLA on CPU computes no cast to it twice, but
        # writes its result to memory for a second kernel.
        bits = jnp.where(jnp.isnan(value), bits | np.uint32(0x00400000), bits)
        upper = (bits >> np.uint32(16)).astype(jnp.uint16)
        return lax.bitcast_convert_type(upper, jnp.bfloat16)
    mask = np.uint32(0xFFFFFFFF & ~((1 << (23 - info.nmant)) - 1))
    cut = lax.bitcast_convert_type(bits & mask, jnp.float32)
    if info.nexp < 8:
        ulp = np.float32(info.smallest_subnormal)
        inverse = np.float32(1 / float(info.smallest_subnormal))
        small = jnp.abs(value) < np.float32(info.tiny)
        cut = jnp.where(small, jnp.trunc(value * inverse) * ulp, cut)
        largest = np.float32(info.max)
        is_kept = jnp.isinf(value) & np.isinf(widest_bound(dtype))
        cut = jnp.where(is_kept, value, jnp.clip(cut, -largest, largest))
    return jnp.where(jnp.isnan(value), value, cut).astype(dtype)


@_truncate.defjvp
def _truncate_jvp(
    dtype: np.dtype, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return _truncate(*primals, dtype), tangents[0].astype(dtype)
