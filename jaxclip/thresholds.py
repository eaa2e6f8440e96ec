"""What may be given as a threshold, and what becomes of it for every leaf.

A threshold is, wherever one is asked for:

* a number in [0, inf], or a 0-d array, possibly traced (inf: never clip);
* a schedule, `step -> number`;
* a rule, `array -> threshold`: `fan_in`, or one of `jaxclip.threshold_rules`; or one for a
  whole tree, `jaxclip.tree_rules.per_tree`;
* a prefix tree of these, one for each part of the parameters.

A bound holds for the number as given: it is rounded towards zero into the dtype of what
it bounds, so 0.1 never becomes bfloat16's 0.10009766.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxclip import _checks
from jaxclip.grids import Bits, Granularity

__all__ = [
    "ThresholdRule",
    "check_number_or_schedule",
    "check_one_threshold",
    "check_threshold_tree",
    "fan_in",
    "fan_ins",
    "resolve_threshold",
    "round_toward_zero",
]

# --- Thresholds as given --------------------------------------------------------------


def round_toward_zero(value: ArrayLike, dtype: Any) -> Any:
    """Returns `value` in `dtype`, never larger in magnitude than it was given.

    Args:
      value: Real number or floating array. May be traced.
      dtype: A real floating dtype.

    Returns:
      An array of `dtype`: NumPy's if `value` is a Python or NumPy number, else jax's.
      Infinities stay. A Python or NumPy number beyond the dtype becomes inf (it bounds
      nothing there), an entry of a jax array its largest finite value. Derivatives are
      those of a cast.

    Example:
      >>> round_toward_zero(0.1, jnp.bfloat16)
      array(0.0996094, dtype=bfloat16)
    """
    dtype = jnp.dtype(dtype)
    if isinstance(value, (int, float, np.ndarray, np.generic)):
        return _round_concrete(np.asarray(value, np.float64), dtype)
    value = jnp.asarray(value)
    if value.dtype == jnp.float64 and dtype != jnp.float64:
        value = _to_float32(value)
    return _truncate(value, dtype) if dtype.itemsize < 4 else value.astype(dtype)


def _round_concrete(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    largest = float(jnp.finfo(dtype).max)
    bounded = np.where(np.abs(value) > largest, np.copysign(np.inf, value), value)
    rounded = np.asarray(bounded.astype(dtype))
    grew = np.abs(rounded.astype(np.float64)) > np.abs(bounded)
    return np.asarray(np.where(grew, np.nextafter(rounded, np.zeros((), dtype)), rounded))


@jax.custom_jvp
def _to_float32(value: jax.Array) -> jax.Array:
    """Float64 rounded towards zero."""
    largest = float(jnp.finfo(jnp.float32).max)
    bounded = jnp.where(jnp.isinf(value), value, jnp.clip(value, -largest, largest))
    rounded = bounded.astype(jnp.float32)
    grew = jnp.abs(rounded.astype(value.dtype)) > jnp.abs(value)
    return jnp.where(grew, jnp.nextafter(rounded, jnp.zeros_like(rounded)), rounded)


@_to_float32.defjvp
def _to_float32_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return _to_float32(*primals), tangents[0].astype(jnp.float32)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _truncate(value: jax.Array, dtype: np.dtype) -> jax.Array:
    # By bits: XLA may keep a bfloat16 in float32 inside a fusion, so rounding first and
    # comparing afterwards can see a difference of zero.
    value = value.astype(jnp.float32)
    info = jnp.finfo(dtype)
    mask = np.uint32(0xFFFFFFFF & ~((1 << (23 - info.nmant)) - 1))
    bits = lax.bitcast_convert_type(value, jnp.uint32)
    cut = lax.bitcast_convert_type(bits & mask, jnp.float32)
    if info.nexp < 8:
        ulp = np.float32(info.smallest_subnormal)
        inverse = np.float32(1 / float(info.smallest_subnormal))
        small = jnp.abs(value) < np.float32(info.tiny)
        cut = jnp.where(small, jnp.trunc(value * inverse) * ulp, cut)
        largest = np.float32(info.max)
        cut = jnp.where(jnp.isinf(value), value, jnp.clip(cut, -largest, largest))
    return jnp.where(jnp.isnan(value), value, cut).astype(dtype)


@_truncate.defjvp
def _truncate_jvp(
    dtype: np.dtype, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return _truncate(*primals, dtype), tangents[0].astype(dtype)


def check_threshold_tree(name: str, threshold: Any) -> None:
    """Raises unless every entry of a threshold tree is a number, schedule or rule.

    Args:
      name: The argument's name, for the message.
      threshold: What was given. Traced numbers are not looked at.

    Raises:
      TypeError: If an entry is a string, None, bool, complex, or a rule's factory.
      ValueError: If a concrete number is negative or NaN.

    Example:
      >>> check_threshold_tree("max_abs", {"w": -1.0})
      Traceback (most recent call last):
      ValueError: max_abs at 'w' must be in [0, inf], got -1.0 of type float.
    """
    entries = jax.tree_util.tree_leaves_with_path(threshold, is_leaf=_is_threshold_leaf)
    for path, given in entries:
        where = f"{name} at '{_checks.path_name(path)}'" if path else name
        if _is_factory(given):
            raise TypeError(f"{where} is the factory {given.__name__}: call it to make a rule.")
        if not callable(given):
            _checks.check_threshold_array(where, given)


def _is_factory(given: Any) -> bool:
    return getattr(given, "__annotations__", {}).get("return") is ThresholdRule


def check_one_threshold(name: str, threshold: Any) -> None:
    """Raises unless `threshold` is a number, schedule, or rule for what sees a leaf at a time.

    Args:
      name: The argument's name, for the message.
      threshold: What was given. Traced numbers are not looked at.

    Raises:
      TypeError: If it is a tree of thresholds or a rule for a whole tree, and as
        `check_threshold_tree`.
      ValueError: If a concrete number is negative or NaN.

    Example:
      >>> check_one_threshold("max_norm", [1.0, 2.0])
      Traceback (most recent call last):
      TypeError: max_norm must be one threshold and no tree of them, got [1.0, 2.0].
    """
    if isinstance(threshold, (dict, list, tuple)):
        raise TypeError(f"{name} must be one threshold and no tree of them, got {threshold!r}.")
    check_threshold_tree(name, threshold)
    if not getattr(threshold, "is_leafwise", True):
        raise TypeError(
            f"{name} must be a threshold for each leaf alone, but per_tree looks at all leaves."
        )


def check_number_or_schedule(
    name: str, given: Any, check_number: Callable[[str, Any], None] = _checks.check_threshold
) -> None:
    """Raises unless `given` is a number or a schedule; rules, though callable, are neither.

    Args:
      name: The argument's name, for the message.
      given: What was given. Traced numbers are not looked at.
      check_number: What raises, given the name and a number, if it is out of range.

    Raises:
      TypeError: If it is a rule, a rule's factory, or no number.
      ValueError: If a concrete number is out of range.

    Example:
      >>> check_number_or_schedule("decay", fan_in(1.0))
      Traceback (most recent call last):
      TypeError: decay must be a number or a schedule: a rule measures arrays, not steps.
    """
    if isinstance(given, ThresholdRule) or _is_factory(given):
        raise TypeError(
            f"{name} must be a number or a schedule: a rule measures arrays, not steps."
        )
    if not callable(given):
        check_number(name, given)


def _is_threshold_leaf(x: Any) -> bool:
    return x is None or callable(x)


def resolve_threshold(threshold: Any, params: Any, step: Any = None) -> Any:
    """Returns a threshold for every leaf of `params`, from whatever was given.

    Args:
      threshold: A number, schedule, rule, an array that broadcasts against the leaves, or
        a prefix tree of these.
      params: Pytree whose leaves are bounded. Rules look at shapes or values.
      step: Scalar integer for schedules; without it they are taken at step 0.

    Returns:
      A tree with the structure of `params`. Each leaf is a Python float if it was given
      as a number, else a float32 array that broadcasts against the leaf (float64 if it was
      given so). A jax array's entries below 0 count as 0; leaves that have no threshold
      (integers, or biases under `fan_in`) get `inf`.

    Raises:
      TypeError: If a threshold is a string, None, bool, complex, or a rule's factory.
      ValueError: If a concrete number is negative or NaN, an array does not broadcast, or
        the prefix does not fit; the message names the path.

    Example:
      >>> resolve_threshold({"w": 0.5, "b": float("inf")}, {"w": jnp.ones(2), "b": jnp.ones(2)})
      {'b': inf, 'w': 0.5}
    """
    check_threshold_tree("threshold", threshold)
    step = jnp.zeros((), jnp.int32) if step is None else step

    def resolve_subtree(prefix_path: tuple, given: Any, subtree: Any) -> Any:
        if callable(given) and not isinstance(given, ThresholdRule):
            given = jnp.asarray(given(step))
        flat, structure = jax.tree_util.tree_flatten_with_path(subtree)
        bounded = [
            (_checks.path_name(prefix_path + path), leaf)
            for path, leaf in flat
            if _checks.is_clippable(leaf)
        ]
        if isinstance(given, ThresholdRule):
            found = given.for_leaves(bounded, step)
        elif isinstance(given, jax.Array) and given.ndim == 0:
            found = [_as_threshold(given)] * len(bounded)  # the same array for all leaves
        else:
            found = [_as_threshold(given, name, np.shape(leaf)) for name, leaf in bounded]
        rest = iter(found)
        return structure.unflatten(
            [next(rest) if _checks.is_clippable(leaf) else float("inf") for _, leaf in flat]
        )

    try:
        entries, treedef = jax.tree_util.tree_flatten_with_path(
            threshold, is_leaf=_is_threshold_leaf
        )
        subtrees = treedef.flatten_up_to(params)
    except ValueError as error:
        raise ValueError(
            "threshold must be one value or a prefix tree of the parameters; "
            f"this one is not: {error}"
        ) from error
    resolved = [
        resolve_subtree(*entry, tree) for entry, tree in zip(entries, subtrees, strict=True)
    ]
    return jax.tree.unflatten(treedef, resolved)


def _as_threshold(given: Any, name: str = "", shape: tuple[int, ...] = ()) -> Any:
    """A Python float, or a jax array of the rank of the leaf that it bounds."""
    if np.ndim(given) == 0 and not isinstance(given, jax.Array):
        return float(given)
    t = jnp.asarray(given)
    if t.ndim:
        padded = (1,) * (len(shape) - t.ndim) + t.shape
        if len(padded) != len(shape) or any(
            n not in (1, m) for n, m in zip(padded, shape, strict=True)
        ):
            raise ValueError(
                f"threshold for '{name}' must broadcast to its shape {shape}, got {t.shape}."
            )
        t = t.reshape(padded)
    return jnp.maximum(t if t.dtype == jnp.float64 else t.astype(jnp.float32), 0)


# --- Rules ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ThresholdRule:
    """A callable `array -> threshold`, made by a factory.

    Attributes:
      granularity: Which entries share a threshold.
      is_blockwise: Whether each block's threshold follows from its entries alone, so that an
        array may be measured in parts.
      is_leafwise: Whether each leaf's threshold follows from that leaf alone.
      grid_name: The factory's name if it measures errors on a grid, which complex numbers have
        not; None if it goes by magnitudes.
    """

    granularity: Granularity = dataclasses.field(default_factory=Granularity)
    is_blockwise: ClassVar[bool] = True
    is_leafwise: ClassVar[bool] = True
    grid_name: ClassVar[str | None] = None

    def __call__(self, array: ArrayLike) -> jax.Array:
        """Returns thresholds that broadcast against `array`, in float32."""
        array = jnp.asarray(array)
        return self.granularity.expand(self.compact(array), array.shape)

    def compact(self, array: jax.Array) -> jax.Array:
        """Returns one threshold a block; 0 for blocks of zeros."""
        array = jnp.asarray(array)
        self.check_leaf("", array)
        blocks, axes = self.granularity.split(array)
        counts = self.granularity.block_counts(array.shape)
        return self.granularity.compact(self.measure(blocks, axes, counts), array.ndim)

    def measure(self, blocks: jax.Array, axes: tuple[int, ...], counts: np.ndarray) -> jax.Array:
        """Returns the threshold of each block, reduced over `axes` with dims kept.

        `counts` is the number of entries of each block without the zeros that pad the
        last group; it broadcasts against the result.
        """
        raise TypeError(f"{type(self).__name__} must define `measure`.")

    def pool(self, arrays: Sequence[jax.Array]) -> jax.Array:
        """Returns one threshold for the entries of all arrays; what `per_tree` calls."""
        raise TypeError(f"{type(self).__name__} has no threshold for many arrays.")

    def for_leaves(self, leaves: Sequence[tuple[str, Any]], step: ArrayLike) -> list[Any]:
        """Returns the thresholds of some leaves and their paths; `resolve_threshold` calls it."""
        return [self.for_leaf(path, leaf, step) for path, leaf in leaves]

    def for_leaf(self, path: str, leaf: Any, step: ArrayLike) -> Any:
        """Returns the threshold of the leaf at `path`."""
        del step
        self.check_leaf(path, leaf)
        return self(leaf)

    def check_leaf(self, path: str, leaf: Any) -> None:
        """Raises TypeError if the leaf at `path` is complex and the rule is for a grid."""
        if self.grid_name is not None and jnp.iscomplexobj(leaf):
            where = f"'{path}'" if path else "the array"
            raise TypeError(
                f"{self.grid_name} has no grid for complex numbers, which {where} has: bound it "
                "by a rule for magnitudes, such as std_multiple."
            )

    def at_path(self, path: str) -> "ThresholdRule":
        """Returns this rule for the leaf at `path`; what `compress` calls before it is bound."""
        del path
        return self

    def bind(self, bits: Bits, full_signed: bool, granularity: Granularity) -> "ThresholdRule":
        """Returns this rule for one grid and granularity; what `quantize` calls."""
        del bits, full_signed
        return dataclasses.replace(self, granularity=granularity)


@dataclasses.dataclass(frozen=True)
class _FanIn(ThresholdRule):
    kappa: Any = 1.0
    stacked_axes: int = 0
    out_axes: tuple[int, ...] | None = None
    path: str = ""
    is_blockwise: ClassVar[bool] = False  # the shape of the whole array counts

    def __call__(self, array: ArrayLike) -> Any:
        return self.for_leaf(self.path, array, jnp.zeros((), jnp.int32))

    def for_leaf(self, path: str, leaf: Any, step: ArrayLike) -> Any:
        num_inputs = self.num_inputs(path, np.shape(leaf))
        if num_inputs is None:
            return float("inf")
        kappa = jnp.asarray(self.kappa(step)) if callable(self.kappa) else self.kappa
        return _as_threshold(kappa) * float(np.sqrt(2 / max(num_inputs, 1)))

    def num_inputs(self, path: str, shape: tuple[int, ...]) -> int | None:
        """The number of inputs each output sums; None for leaves that stay free."""
        names = path.split("/")
        shape = shape[self.stacked_axes :]
        if len(shape) < 2 or names[-1] in ("bias", "scale"):
            return None
        if self.out_axes is not None:
            outputs = _axes_within(self.out_axes, path, shape)
            return int(np.prod([n for axis, n in enumerate(shape) if axis not in outputs]))
        if names[-1] == "embedding":
            return shape[-1]
        if len(names) > 1 and names[-2] in ("query", "key", "value") and len(shape) == 3:
            return shape[0]  # (features, heads, head_dim)
        return int(np.prod(shape[:-1]))

    def at_path(self, path: str) -> ThresholdRule:
        return dataclasses.replace(self, path=path)

    def compact(self, array: jax.Array) -> jax.Array:
        if self.num_inputs(self.path, np.shape(array)) is None:
            if not self.path:
                raise ValueError(f"fan_in needs two dimensions or more, got shape {array.shape}.")
            # A free leaf is not clipped.
            blocks, axes = self.granularity.split(array)
            largest = jnp.max(
                jnp.abs(blocks).astype(jnp.float32), axis=axes, keepdims=True, initial=0
            )
            return self.granularity.compact(largest, array.ndim)
        return jnp.full(self.granularity.scale_shape(array.shape), self(array), jnp.float32)


def _axes_within(axes: tuple[int, ...], path: str, shape: tuple[int, ...]) -> set[int]:
    rank = len(shape)
    if any(not -rank <= a < rank for a in axes):
        raise ValueError(
            f"out_axes must be in [{-rank}, {rank}) for '{path}' of shape {shape}, got {axes}."
        )
    return {a % rank for a in axes}


def fan_in(
    kappa: Any = 1.0, *, stacked_axes: int = 0, out_axes: int | Sequence[int] | None = None
) -> ThresholdRule:
    """Makes the rule `t = kappa * sqrt(2 / fan_in)`, kappa times the He standard deviation.

    Fan-in is read from the shape as flax lays layers out: all axes but the last (Dense,
    Conv HWIO and DHWIO with their groups, DenseGeneral with one output axis, the output
    kernel of attention); the first for the query, key and value kernels of attention; the last
    for an `embedding`. Leaves with fewer than two dimensions, and what is called `bias` or
    `scale`, get `inf`: they stay free.

    Args:
      kappa: Number in [0, inf], a traced scalar, or a schedule `step -> number`.
      stacked_axes: Leading axes that stack layers (scan over layers), not counted.
      out_axes: Axis or axes of the outputs, counted without the stacked ones; the inputs are
        the others. For what the shape does not say: `(-2, -1)` for a DenseGeneral with two
        output axes, 0 for kernels as PyTorch lays them out. None goes by the above.

    Returns:
      A rule; on one array it gives a scalar threshold. For layers of different layout, a
      prefix tree of rules. `compress` takes the largest weight of a leaf that stays free.

    Raises:
      TypeError: If `kappa` is not a number or a schedule.
      ValueError: If `kappa` is negative or NaN, `stacked_axes` not a count, or `out_axes` not
        of axes; when it is used, if an axis is out of range, with the path.

    Example:
      >>> float(fan_in(1.0)(jnp.zeros((8, 3)))), float(fan_in(1.0, out_axes=0)(jnp.zeros((8, 2))))
      (0.5, 1.0)

    References:
      He et al., Delving Deep into Rectifiers, 2015, https://arxiv.org/abs/1502.01852
      Elsayed et al., Weight Clipping for Deep Continual and Reinforcement Learning, 2024,
      https://arxiv.org/abs/2407.01704
    """
    if out_axes is not None:
        axes: Any = tuple(out_axes) if isinstance(out_axes, (tuple, list)) else (out_axes,)
        are_integers = [isinstance(a, (int, np.integer)) and not isinstance(a, bool) for a in axes]
        if not (axes and all(are_integers)):
            raise ValueError(f"out_axes must be one or more integers, got {out_axes!r}.")
        out_axes = tuple(int(a) for a in axes)
    check_number_or_schedule("kappa", kappa)
    if stacked_axes != 0:
        _checks.check_count("stacked_axes", stacked_axes)
    return _FanIn(Granularity(), kappa, stacked_axes, out_axes)


def fan_ins(threshold: Any, params: Any) -> Any:
    """Returns the number of inputs that `fan_in` counts for each leaf.

    Args:
      threshold: As in `resolve_threshold`.
      params: Pytree whose leaves are bounded.

    Returns:
      A tree with the structure of `params`: the fan-in as a float, and inf for leaves that
      stay free or have a threshold of another kind.

    Raises:
      ValueError: As `resolve_threshold`.

    Example:
      >>> fan_ins(fan_in(2.0), {"kernel": jnp.zeros((8, 3)), "bias": jnp.zeros(3)})
      {'bias': inf, 'kernel': 8.0}
    """
    counts = jax.tree.map(
        lambda given: _NumInputs(given.granularity, given) if isinstance(given, _FanIn) else np.inf,
        threshold,
        is_leaf=_is_threshold_leaf,
    )
    return resolve_threshold(counts, params)


@dataclasses.dataclass(frozen=True)
class _NumInputs(ThresholdRule):
    rule: _FanIn = dataclasses.field(default_factory=_FanIn)

    def for_leaf(self, path: str, leaf: Any, step: ArrayLike) -> Any:
        del step
        num_inputs = self.rule.num_inputs(path, np.shape(leaf))
        return float("inf") if num_inputs is None else float(num_inputs)
