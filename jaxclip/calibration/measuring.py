"""Second moments of the inputs of every weight in a model, summed over batches of data."""

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxclip._core import checks
from jaxclip._core.extras import progress_bar
from jaxclip._core.trees import PyTree, is_clippable, unique_names
from jaxclip.calibration.consumers import CONSUMERS
from jaxclip.calibration.moves import MOVES
from jaxclip.calibration.programs import PROGRAMS
from jaxclip.calibration.recorder import Recorder, Value, constant
from jaxclip.calibration.sums import AllSums, moments_of
from jaxclip.calibration.views import View
from jaxclip.lowbit.arrays import is_quantized
from jaxclip.lowbit.policies import Policy
from jaxclip.lowbit.rounding.moments import Calibration as Calibration
from jaxclip.lowbit.rounding.moments import InputMoments as InputMoments
from jaxclip.lowbit.rounding.moments import MatrixView as MatrixView

Moments: TypeAlias = "OrderedDict[str, InputMoments]"  # by path, in the order of the program

_NUMBERS = (bool, int, float, complex)
RULES = {**MOVES, **CONSUMERS, **PROGRAMS}


def measure(
    apply_fn: Callable[[optax.Params, PyTree], PyTree],
    params: optax.Params,
    batches: Iterable[PyTree],
    *,
    policy: Policy = (),
    max_dim: int = 8192,
    progress: bool = True,
) -> Calibration:
    """Measures the second moments of the inputs that each weight is multiplied by.

        H = sum of x x^T over the inputs x of a weight W;  error of the outputs x W = E^T H E

    `apply_fn` is traced, and each floating leaf of `params` is followed to the product that
    consumes it: through casts, reshapes, transposes, slices and products with a scalar, into jit,
    scan, loops, branches, remat and custom derivatives. The model is any function: flax, equinox
    and haiku need no hooks. A leaf of scan-stacked layers, experts or groups of channels has a
    matrix for each. Rows that are looked up by index are counted. Weights that are used twice in
    the same way have the sum. Of two ways, a product counts and a lookup does not.

    Sums within a batch are in float32, or float64 for inputs in float64. Between batches they are
    added with the rounding error carried along, so it does not grow with the number of batches.
    For each weight of n inputs that takes n^2 numbers three times: the sum, what it lost to
    rounding, and a batch's own.

    Args:
      apply_fn: Function `apply_fn(params, batch)` that applies the model; only traced, and
        compiled once for each shape of a batch. What it returns is not used.
      params: Pytree of arrays. Low-bit leaves are part of the model and are not measured, and so
        are leaves that are not floating or have fewer than two axes.
      batches: Iterable of batches, each a pytree of arrays; a few hundred samples are enough.
      policy: Pairs `(regex, spec)` as in `compress`. Leaves for which the spec is None are not
        measured; other specs do not matter here.
      max_dim: Weights with more inputs have only the diagonals. At 8,192 a matrix takes 256 MiB.
      progress: True to show a bar in a terminal or a notebook, if rich is installed.

    Returns:
      A `Calibration` whose `missing` has the weights that meet the batch in no product or not as
      a matrix. `print` shows what was found.

    Raises:
      ValueError: If there are no batches, they differ in structure, the inputs of a weight are
        not finite or so large that their squares overflow, or an argument is out of range.
      TypeError: If `batches` is a single batch, or a leaf of `params` is not an array.

    Example:
      >>> import jax
      >>> import numpy as np
      >>> params = {"kernel": np.ones((3, 2), np.float32)}
      >>> batches = [np.ones((4, 3), np.float32)] * 2
      >>> measured = measure(lambda p, x: x @ p["kernel"], params, batches, progress=False)
      >>> measured.moments["kernel"].second
      Array([[[8., 8., 8.],
              [8., 8., 8.],
              [8., 8., 8.]]], dtype=float32)

    References:
      Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
      Transformers", 2023. https://arxiv.org/abs/2210.17323
    """
    checks.check_count("max_dim", max_dim)
    paths = weight_paths(params, policy)
    params, program = on_device(params), _Program(apply_fn, paths, max_dim)
    total: tuple[Moments, Moments] | None = None
    unread: tuple[int, jax.Array, list[str]] | None = None
    for number, batch in numbered(batches, progress):
        new, is_bad = program(params, batch)
        # Read one batch later: the device need not wait for the host.
        check_finite(unread)
        unread = (number, is_bad, list(new))
        total = (new, jax.tree.map(jnp.zeros_like, new)) if total is None else _sum(*total, new)
    check_finite(unread)
    assert total is not None  # there was a batch
    weights = [path for path in paths if path is not None]
    missing = tuple(path for path in weights if path not in total[0])
    moments = {path: total[0][path] for path in weights if path in total[0]}
    notes = {path: program.notes.get(path, "not used") for path in missing} | program.notes
    return Calibration(moments, missing=missing, notes=tuple(notes.items()))


class _Program:
    """The moments of one batch, compiled once for each shape of a batch.

    Attributes:
      notes: By path, what is to be said of how a weight is used; known once it was called.
    """

    def __init__(self, apply_fn: Callable, paths: Sequence[str | None], max_dim: int):
        self.notes: dict[str, str] = {}
        self._apply_fn = apply_fn
        self._paths = paths
        self._max_dim = max_dim
        self._compiled = jax.jit(self._moments)

    def __call__(self, params: optax.Params, batch: PyTree) -> tuple[Moments, jax.Array]:
        """Returns moments by path, and True for each that is not finite."""
        return self._compiled(params, batch)

    def _moments(self, params: optax.Params, batch: PyTree) -> tuple[Moments, jax.Array]:
        recorder = Recorder(RULES, self._max_dim)
        traced = jax.make_jaxpr(self._apply_fn)(params, batch)
        recorder.run(traced, values_of(params, self._paths, batch))
        moments, twofold = _by_path(recorder.sums)
        self.notes |= {path: f"not followed: {name}" for path, name in recorder.notes.items()}
        self.notes |= twofold
        are_bad = [_is_bad(m) for m in moments.values()]
        return moments, jnp.stack(are_bad) if are_bad else jnp.zeros(0, bool)


def weight_paths(params: optax.Params, policy: Policy) -> list[str | None]:
    """Returns the path of each array of the parameters; None for those that are not measured."""
    entries = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_quantized)
    names = unique_names([path for path, _ in entries])
    patterns = [(re.compile(pattern), spec) for pattern, spec in policy]
    unmatched = [p.pattern for p, _ in patterns if not any(map(p.search, names))]
    if unmatched:
        raise ValueError(f"policy has patterns that match no leaf: {unmatched}.")
    paths: list[str | None] = []
    for name, (_, leaf) in zip(names, entries, strict=True):
        if not is_quantized(leaf) and not (hasattr(leaf, "dtype") or isinstance(leaf, _NUMBERS)):
            raise TypeError(
                f"params at {name!r} must be an array, got {leaf!r}: partition a module that has "
                "functions, and let apply_fn combine it again."
            )
        specs = [spec for pattern, spec in patterns if pattern.search(name)]
        is_kept = specs[:1] == [None] or is_quantized(leaf) or not _is_weight(leaf)
        paths += [None if is_kept else name] * len(jax.tree.leaves(leaf))
    if not any(path is not None for path in paths):
        raise ValueError("params must have a floating leaf of at least two axes, got none.")
    return paths


def on_device(params: optax.Params) -> optax.Params:
    """Returns parameters with arrays of jax for those of NumPy, so that they move once."""
    return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, params)


def _is_weight(leaf: Any) -> bool:
    is_real = is_clippable(leaf) and not np.iscomplexobj(leaf)
    return is_real and np.ndim(leaf) >= 2 and np.size(leaf) > 0


def values_of(params: PyTree, paths: Sequence[str | None], batch: PyTree) -> list[Value]:
    """Returns the values of the arguments of a model."""
    leaves = jax.tree.leaves(params)
    values = [
        constant(x) if path is None else Value(x, views=(View.of_weight(path, jnp.shape(x)),))
        for path, x in zip(paths, leaves, strict=True)
    ]
    return [*values, *(Value(x, is_data=True) for x in jax.tree.leaves(batch))]


def numbered(batches: Iterable[PyTree], progress: bool) -> Iterable[tuple[int, PyTree]]:
    """Yields batches with their numbers, and shows a bar; raises if there are none."""
    if isinstance(batches, (dict, str)) or hasattr(batches, "dtype"):
        kind = type(batches).__name__
        raise TypeError(f"batches must be an iterable of batches, such as a list, got a {kind}.")
    total = len(batches) if hasattr(batches, "__len__") else None  # pyright: ignore
    first, number = None, -1
    with progress_bar(total, progress) as advance:
        for number, batch in enumerate(batches):
            structure = jax.tree.structure(batch)
            first = structure if first is None else first
            if structure != first:
                raise ValueError(
                    f"batches must have one structure: batch {number} has {structure}, and batch "
                    f"0 has {first}."
                )
            yield number, batch
            advance(1)
    if number < 0:
        raise ValueError("batches must hold at least one batch, got none.")


def check_finite(flags: tuple[int, jax.Array, list[str]] | None) -> None:
    """Raises ValueError if the inputs of a weight are not finite."""
    number, is_bad, names = flags or (0, np.zeros(0), [])
    for name, is_bad_here in zip(names, np.asarray(is_bad), strict=True):
        if is_bad_here:
            raise ValueError(
                f"the inputs of params at {name!r} must be finite, and so must their squares; in "
                f"batch {number} (from 0) they are not."
            )


def _is_bad(moments: InputMoments) -> jax.Array:
    second = moments.second
    squares = second if moments.is_diagonal else jnp.diagonal(second, axis1=-2, axis2=-1)
    return ~(jnp.all(jnp.isfinite(squares)) & jnp.all(jnp.isfinite(moments.first)))


def _by_path(sums: AllSums) -> tuple[Moments, dict[str, str]]:
    """Returns moments by path, and what is to be said of weights that are used in two ways."""
    moments: Moments = OrderedDict()
    notes: dict[str, str] = {}
    for key, found in sorted(sums.items(), key=lambda pair: pair[0].is_lookup):
        new, old = moments_of(key, found), moments.get(key.path)
        if old is None:
            moments[key.path] = new
        elif old.view == new.view and not key.is_lookup:
            moments[key.path] = old + new
        else:
            way = "looked up by index" if key.is_lookup else "multiplied along other axes"
            notes[key.path] = f"also {way}, which is not counted"
    return moments, notes


def _add_compensated(total: Moments, lost: Moments, new: Moments) -> tuple[Moments, Moments]:
    """Returns a sum and its rounding error, after Kahan."""
    added = jax.tree.map(jnp.subtract, new, lost)
    result = jax.tree.map(jnp.add, total, added)
    lost = jax.tree.map(lambda r, t, a: (r - t) - a, result, total, added)
    return result, lost


_add_in_place = jax.jit(_add_compensated, donate_argnums=(0, 1))


def _sum(total: Moments, lost: Moments, new: Moments) -> tuple[Moments, Moments]:
    if jax.tree.structure(total) != jax.tree.structure(new):
        changed = sorted(total.keys() ^ new.keys()) or "their axes"
        raise ValueError(f"apply_fn must use the same weights in every batch, but not {changed}.")
    return _add_in_place(total, lost, new)
