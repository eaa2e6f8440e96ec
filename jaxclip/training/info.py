"""The report of a step: named numbers, kept as one vector for each dtype.

XLA then writes a few outputs instead of dozens, in fewer kernels, and the host reads all of the
numbers in one transfer.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxclip._core.checks import is_concrete
from jaxclip._core.html import can_be_read, html_report, html_table, number_text
from jaxclip._core.trees import PyTree, is_clippable, path_name
from jaxclip.training.telemetry import Statistics


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["loss", "aux", "vectors"],
    meta_fields=["layout"],
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class StepInfo:
    """Report of one step; all values are on the device, and `read` fetches them together.

    A pytree of the loss, the auxiliary output and the vectors; `scan`, `vmap` and maps over it
    stack the numbers along leading axes.

    Attributes:
      loss: Scalar, the loss before the step.
      aux: The auxiliary output of the loss with `has_aux`, or None.
      vectors: All other numbers, those of one dtype joined along the last axis.
      layout: For each of these its name, its vector and its position there.
      stats: `clip_stats` of the optimizer, each once. Those of the first clip of the chain are
        found by their bare names too, such as `stats["pre_norm"]`.
      weight_clip_rate: Scalar float32, fraction of the boxed weights that are on the bound;
        0 without a box. Counted at the first step and every `telemetry_every` steps; at the
        others it is the last one counted.
      num_skipped: Scalar int32, steps skipped so far.
      grad_norm: Scalar, norm of all gradients; non-finite entries of frozen leaves count as 0.
      learning_rate: Scalar, the first learning rate that the optimizer's state has: that of
        jaxclip's optimizers, or of `optax.inject_hyperparams`. None if it has none.
      nonfinite_leaf: Scalar int32, position of the first leaf whose gradient is not finite among
        the floating leaves of the parameters, or -1; leaves that train come before frozen ones.
    """

    loss: jax.Array
    aux: PyTree
    vectors: tuple[jax.Array, ...]
    layout: tuple[tuple[str, int, int], ...]

    @classmethod
    def create(
        cls,
        loss: jax.Array,
        aux: PyTree,
        stats: Mapping[str, jax.Array],
        **numbers: jax.Array | None,
    ) -> "StepInfo":
        """Returns the report with these statistics, and with other numbers by attribute."""
        named = numbers | {_STATS + name: x for name, x in stats.items()}
        groups: dict[tuple, list[jax.Array]] = {}
        places = []
        for name, x in named.items():
            if x is not None:
                group = groups.setdefault((x.dtype, x.shape), [])
                places.append((name, (x.dtype, x.shape), len(group)))
                group.append(x)
        indices = {key: i for i, key in enumerate(groups)}
        layout = tuple((name, indices[key], position) for name, key, position in places)
        vectors = tuple(jnp.stack(group, axis=-1) for group in groups.values())
        return cls(loss, aux, vectors, layout)

    @functools.cached_property
    def _numbers(self) -> dict[str, Any]:
        parts = _split(self.vectors)
        return {name: parts[i][position] for name, i, position in self.layout}

    @functools.cached_property
    def stats(self) -> Statistics:
        named = self._numbers.items()
        return Statistics((k.removeprefix(_STATS), x) for k, x in named if k.startswith(_STATS))

    @property
    def weight_clip_rate(self) -> jax.Array:
        return self._numbers["weight_clip_rate"]

    @property
    def num_skipped(self) -> jax.Array:
        return self._numbers["num_skipped"]

    @property
    def grad_norm(self) -> jax.Array:
        return self._numbers["grad_norm"]

    @property
    def learning_rate(self) -> jax.Array | None:
        return self._numbers.get("learning_rate")

    @property
    def nonfinite_leaf(self) -> jax.Array:
        return self._numbers["nonfinite_leaf"]

    def read(self) -> "StepInfo":
        """Returns the report with NumPy numbers in place of arrays on the device.

        All are fetched together, which is much faster than one by one.
        """
        return jax.device_get(self)

    def nonfinite_path(self, params: optax.Params) -> str | None:
        """Returns the path of the first leaf whose gradient is not finite; None if all are.

        Args:
          params: The parameters, or any tree of their structure; only paths are read.
        """
        index = int(self.nonfinite_leaf)
        if index < 0:
            return None
        named = jax.tree_util.tree_leaves_with_path(params)
        paths = [path_name(path) for path, leaf in named if is_clippable(leaf)]
        return paths[index]

    def _repr_html_(self) -> str:
        info = self.read() if all(map(can_be_read, self.vectors)) else self
        numbers = {"loss": info.loss} | dict(sorted(info._numbers.items()))
        rows = [(name.removeprefix(_STATS), number_text(x)) for name, x in numbers.items()]
        return html_report("StepInfo", html_table(rows, has_head=False))

    def __repr__(self) -> str:
        others = {k: x for k, x in self._numbers.items() if not k.startswith(_STATS)}
        shown = {"loss": self.loss, "aux": self.aux, "stats": self.stats} | others
        return f"StepInfo({', '.join(f'{name}={x!r}' for name, x in shown.items())})"


_STATS = "stats/"


def _split(vectors: tuple[Any, ...]) -> list[list[Any]]:
    """Returns the entries of vectors along their last axis."""
    is_traced = not all(map(is_concrete, vectors))
    if is_traced or all(isinstance(v, jax.Array) and v.is_fully_addressable for v in vectors):
        return _split_on_device(vectors)
    # On the host: a process that reads alone must not start a program that all have to run.
    return [[v[..., i] for i in range(v.shape[-1])] for v in map(np.asarray, vectors)]


@functools.partial(jax.jit, inline=True)
def _split_on_device(vectors: tuple[jax.Array, ...]) -> list[list[jax.Array]]:
    return [[v[..., i] for i in range(v.shape[-1])] for v in vectors]
