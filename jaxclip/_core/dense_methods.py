"""Operators and methods of arrays, for an object that stands for one.

q * 2, q.T, q.sum(), q[0]    are those of    q.__jax_array__()
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    # The functions of jax.numpy take any object with `__jax_array__`, but are annotated for this
    # class alone.
    _Base = jax.Array
else:
    _Base = object

_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow", "matmul")
_OPERATORS = (
    *("lt", "le", "gt", "ge", "eq", "ne", "neg", "pos", "abs", "round"),
    *_BINARY,
    *(f"r{name}" for name in _BINARY),
    *("bool", "int", "float", "complex"),
)
# What jax and NumPy arrays have in common, without places: a low-bit array has one for each part.
_METHODS = {"at", "tobytes", "tolist", *(set(dir(jax.Array)) & set(dir(np.ndarray)))}
_METHODS -= {"device", "to_device"}
# Those of jax's arrays that the class `jax.Array` does not list.
_OF_PLACES = {"block_until_ready", "delete", "devices", "is_deleted", "is_ready", "weak_type"}


class DenseMethods(_Base):
    """An object with the operators and methods of the array that `__jax_array__` returns.

    Results are plain arrays. jax.numpy and NumPy take the object for the array too; functions of
    `jax.lax` need `jnp.asarray(q)`.
    """

    def __array__(  # type: ignore[override]  # that of jax also has a context
        self, dtype: npt.DTypeLike | None = None, copy: bool | None = None
    ) -> np.ndarray:
        if copy is False:
            name = type(self).__name__
            raise ValueError(f"copy must not be False: a {name} is computed from its codes.")
        return np.array(jnp.asarray(self), dtype, copy=copy)

    def __getitem__(self, index: Any) -> jax.Array:
        return jnp.asarray(self)[index]

    def __iter__(self) -> Iterator[jax.Array]:
        return iter(jnp.asarray(self))

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError(f"len() of a {type(self).__name__} without dimensions.")
        return self.shape[0]

    if not TYPE_CHECKING:  # a type checker knows the names from `jax.Array`

        def __getattr__(self, name: str) -> Any:  # only for names that the class lacks
            if name not in _METHODS:
                is_known = hasattr(jax.Array, name) or name in _OF_PLACES
                hint = " Use `dequantize`, or its parts." if is_known else ""
                raise AttributeError(f"a {type(self).__name__} has no attribute {name!r}.{hint}")
            return getattr(jnp.asarray(self), name)

    __hash__ = None  # type: ignore[assignment]  # because == compares entries


def _of_dense(name: str) -> Callable[..., Any]:
    """Returns the method of that name of the array that an object stands for."""

    def method(self: DenseMethods, *others: Any) -> Any:
        # Another such object would return NotImplemented to an array's own operator.
        dense = (jnp.asarray(x) if isinstance(x, DenseMethods) else x for x in others)
        return getattr(jnp.asarray(self), name)(*dense)

    method.__name__ = name
    return method


for _name in _OPERATORS:
    setattr(DenseMethods, f"__{_name}__", _of_dense(f"__{_name}__"))
