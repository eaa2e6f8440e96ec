"""Trees of every float dtype and magnitude, exact arithmetic on them, and compiled transforms.

The invariants are tested on one tree for each width: all its floating dtypes at once, odd
leaves between them, so that a transform is compiled once and an example is only a call.
A drawn tree has one dtype that is not zero, or all.
"""

import dataclasses
import functools
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from test_transform_laws import TRANSFORMS, Row, floating_pairs

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
ROWS = {row.factory.__name__: row for row in TRANSFORMS}
every_row = pytest.mark.parametrize("row", TRANSFORMS, ids=lambda r: r.factory.__name__)
NARROW = ("float16", "bfloat16", "float32", "complex64")
WIDE = ("float32", "float64", "complex128")
SIZE = 3
# Of the many tests here, each on every row and two widths, fewer than of the others.
some_examples = settings(max_examples=max(5, settings.default.max_examples * 5 // 8))


def shape_of(row: Row) -> tuple[int, ...]:
    """The shape of a leaf: a transform of matrices needs one."""
    return (SIZE, 1) if row.factory.__name__ == "clip_by_spectral_norm" else (SIZE,)


@dataclasses.dataclass(frozen=True)
class Width:
    """The dtypes of a tree, and whether jax has 64 bits while it is looked at."""

    dtypes: tuple[str, ...]
    has_x64: bool

    def leaves_of(self, row: Row) -> tuple[str, ...]:
        is_real = row.factory.__name__ == "majority_vote"  # refuses complex leaves
        return tuple(d for d in self.dtypes if not (is_real and d.startswith("complex")))


both_widths = pytest.mark.parametrize(
    "width", [Width(NARROW, False), Width(WIDE, True)], ids=["x32", "x64"]
)


# --- Drawing --------------------------------------------------------------------------


def real_part_of(dtype: Any) -> np.dtype:
    """The dtype of the real part."""
    name = jnp.dtype(dtype).name
    return jnp.dtype({"complex64": "float32", "complex128": "float64"}.get(name, name))


def edges_of(dtype: Any) -> list[float]:
    """Where numbers of a real dtype are apt to go wrong."""
    info = ml_dtypes.finfo(dtype)
    positive = [float(x) for x in (0, info.smallest_subnormal, info.tiny, 1, info.max)]
    return positive + [-x for x in positive]


def numbers_of(data: bytes, dtype: Any, power: int | None) -> np.ndarray:
    """Finite numbers of a real dtype: of every size, by their bits, or of about 2**power."""
    dtype, largest = jnp.dtype(dtype), float(ml_dtypes.finfo(dtype).max)
    with np.errstate(all="ignore"):
        if power is None:
            x = np.frombuffer(data, dtype).astype(np.float64)
        else:
            x = np.frombuffer(data, np.int8)[:: dtype.itemsize] / 128
            x = np.ldexp(x, power)
        x = np.nan_to_num(x, nan=1.0, posinf=largest, neginf=-largest)
        return np.clip(x, -largest, largest).astype(dtype)


@st.composite
def leaves(draw: Any, dtype: str) -> np.ndarray:
    """`SIZE` finite entries from the smallest subnormal to the largest number."""
    real = real_part_of(dtype)
    num_parts = SIZE * (2 if dtype.startswith("complex") else 1)
    info = ml_dtypes.finfo(real)
    lowest = int(np.log2(float(info.smallest_subnormal))) if real.itemsize < 8 else -1074
    power = draw(st.none() | st.integers(lowest, int(info.maxexp)))
    length = num_parts * real.itemsize
    x = numbers_of(draw(st.binary(min_size=length, max_size=length)), real, power).copy()
    place = st.tuples(st.integers(0, num_parts - 1), st.sampled_from(edges_of(real)))
    for index, edge in draw(st.lists(place, max_size=2)):
        x[index] = edge
    return x.view(jnp.dtype(dtype))


@st.composite
def trees(draw: Any, row: Row, width: Width) -> dict[str, np.ndarray]:
    """The floating leaves of a tree: those of one dtype, or of all; the others are zero."""
    names = width.leaves_of(row)
    active = draw(st.sampled_from([*names, "all"]))
    return {
        name: (
            draw(leaves(name)) if active in (name, "all") else np.zeros(SIZE, jnp.dtype(name))
        ).reshape(shape_of(row))
        for name in names
    }


def accepts(row: Row, value: float) -> bool:
    """Whether the factory takes the number, so that laws for good numbers apply to it."""
    try:
        row.make(value)
    except ValueError:
        return False
    return True


@st.composite
def settings_of(draw: Any, row: Row, width: Width, tree: Any = None) -> np.generic:
    """A hyper-parameter that the factory accepts: 0 to inf, or near the norm of `tree`."""
    dtype = np.float64 if width.has_x64 else np.float32
    size = float(norm_of(tree)) if tree else 1.0
    near = st.floats(0.125, 4).map(lambda ratio: ratio * size)
    ordinary = st.sampled_from([row.value, 0.0, 1.0, 0.5, np.inf, *edges_of(dtype)])
    log_uniform = st.integers(-126, 127).map(lambda power: 2.0**power)

    def as_given(value: float) -> np.generic:
        with np.errstate(over="ignore", under="ignore"):
            return dtype(value)

    kinds = st.one_of(near, ordinary, log_uniform).map(as_given)
    return draw(kinds.filter(lambda value: row.parameter is None or accepts(row, float(value))))


# --- Exact arithmetic -----------------------------------------------------------------


def parts_of(x: Any) -> np.ndarray:
    """Real and imaginary parts as float64, exactly."""
    x = np.asarray(x)
    if x.dtype.kind == "c":
        x = x.view(real_part_of(x.dtype))
    return x.astype(np.float64).ravel()


def moduli_squared(x: Any) -> list[Fraction]:
    """|x|**2 of every entry, without rounding."""
    squares = [Fraction(float(p)) ** 2 for p in parts_of(x)]
    if np.asarray(x).dtype.kind == "c":
        return [a + b for a, b in zip(squares[::2], squares[1::2], strict=True)]
    return squares


def norm_squared(tree: Any) -> Fraction:
    """The square of the global norm, without rounding."""
    return sum((sum(moduli_squared(x), Fraction(0)) for x in jax.tree.leaves(tree)), Fraction(0))


def norm_of(tree: Any) -> np.longdouble:
    """The global norm to 19 digits; no square over- or underflows."""
    parts = [parts_of(x).astype(np.longdouble) for x in jax.tree.leaves(tree)]
    return np.sqrt(np.sum(np.concatenate(parts) ** 2)) if parts else np.longdouble(0)


def tiny_of(dtype: Any) -> float:
    """What XLA on CPU takes for zero is smaller than this."""
    return float(np.finfo(np.float64 if real_part_of(dtype).itemsize == 8 else np.float32).tiny)


def flushed(x: Any) -> np.ndarray:
    """The parts of an array as XLA on CPU computes with them: subnormals count as zero."""
    parts = parts_of(x)
    return np.where(np.abs(parts) < tiny_of(np.asarray(x).dtype), 0, parts)


def bits_of(tree: Any) -> list[bytes]:
    """The bytes of every leaf."""
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def is_finite(tree: Any) -> bool:
    """Whether every number of a tree is finite."""
    return all(np.isfinite(parts_of(x)).all() for x in jax.tree.leaves(tree))


def assert_alike(actual: Any, expected: Any, ulps: int = 16) -> None:
    """Equal trees, to some units in the last place of the largest entry of each leaf.

    The largest difference is that of a norm on the threshold: clipped, with the margin of a
    clip, by one program and passed by the other.
    """
    for a, e in floating_pairs(actual, expected):
        info, (a, e) = ml_dtypes.finfo(real_part_of(a.dtype)), (parts_of(a), parts_of(e))
        largest = np.abs(e).max(initial=0, where=np.isfinite(e))
        atol = ulps * float(info.eps) * largest + 2 * float(info.tiny)
        np.testing.assert_allclose(a, e, rtol=0, atol=atol)


# --- Running --------------------------------------------------------------------------


def with_odd_leaves(tree: dict[str, Any], weak: Any = 0.0) -> dict[str, Any]:
    """The tree with everything between its floating leaves that is not to be touched."""
    first = jax.tree.leaves(tree)[0]
    return tree | {
        "empty": jnp.zeros((0, 2), first.dtype),
        "flag": jnp.array(True),
        "float0": np.zeros((2,), jax.dtypes.float0),
        "key": jax.random.key(3),
        "masked": optax.MaskedNode(),
        "none": None,
        "step": jnp.arange(3),
        "weak": jnp.asarray(weak),
    }


def update_of(
    row: Row, value: Any, grads: Any, state: Any, params: Any, weak: Any = 0.0
) -> tuple[Any, Any]:
    """Updates of the floating leaves, and the new state."""
    trees = (with_odd_leaves(tree, weak) for tree in (grads, params))
    updates, state = row.make(value).update(next(trees), state, next(trees))
    return {name: updates[name] for name in grads}, state


@functools.cache
def compiled(row: Row, width: Width) -> Any:
    """`update_of` as one program for all examples."""
    return jax.jit(functools.partial(update_of, row))


@functools.cache
def first_state(row: Row, width: Width) -> Any:
    """The state before the first step."""
    with enable_x64(width.has_x64):
        shape, names = shape_of(row), width.leaves_of(row)
        params = {name: np.zeros(shape, jnp.dtype(name)) for name in names}
        return jax.device_get(row.make().init(with_odd_leaves(params)))


def run(
    row: Row, width: Width, value: Any, grads: list[Any], params: Any, state: Any = None
) -> list[tuple[Any, Any]]:
    """Updates and state after each of some steps, as NumPy arrays."""
    state, steps = first_state(row, width) if state is None else state, []
    values = value if isinstance(value, list) else [value] * len(grads)
    with enable_x64(width.has_x64):
        for v, g in zip(values, grads, strict=True):
            updates, state = jax.device_get(compiled(row, width)(v, g, state, params, 0.0))
            steps.append((updates, state))
    return steps


def fields_of(state: Any, name: str) -> list[Any]:
    """All fields of one name in a state that are not None, outermost first."""
    found = []

    def look(node: Any) -> None:
        if getattr(node, name, None) is not None:
            found.append(getattr(node, name))
        if isinstance(node, dict):
            node = tuple(node.values())
        if isinstance(node, (tuple, list)):
            for part in node:
                look(part)

    look(state)
    return found
