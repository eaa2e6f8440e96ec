"""Every test runs with strict promotion, no implicit rank promotion, and warnings as errors."""

import gc
import importlib.metadata
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of a run is compiling: workers share what they compiled, and the next run has it all.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(os.path.dirname(__file__), ".pytest_cache/compiled")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# XLA's cheapest code compiles fastest. `XLA_FLAGS= pytest` takes its defaults, as CI does. A flag
# that XLA does not know ends the process, so versions that were not tried get none.
os.environ.setdefault(
    "XLA_FLAGS",
    " ".join(
        flag
        for flag, end in [
            ("--xla_backend_optimization_level=0", [0, 13]),
            ("--xla_cpu_use_fusion_emitters=false", [0, 11]),
        ]
        if [int(n) for n in importlib.metadata.version("jax").split(".")[:2]] < end
    ),
)
# The sharding tests need eight devices; one process then serves all tests.
os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

for profile, max_examples in (("fast", 5), ("thorough", 40)):
    hypothesis.settings.register_profile(
        profile, deadline=None, max_examples=max_examples, derandomize=True, print_blob=True
    )
hypothesis.settings.load_profile("fast")


# Scripts that import torch, which the tests do without; collecting doctests imports all.
collect_ignore = [
    "tests/peers/recorded/record_torch.py",
    "tests/peers/recorded/record_compressed_tensors.py",
    "tests/peers/recorded/record_sparse_24.py",
]


# Far below Linux's limit of 65,530, because programs and what they hold take memory too.
_MOST_MAPS = 5000


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Drops compiled programs between two files, once the process has many.

    Each takes several memory maps; thousands of programs later the next one would crash the
    worker.
    """
    if nextitem is None or nextitem.path == item.path:
        return
    if has_many_memory_maps():
        jax.clear_caches()
        gc.collect()


def has_many_memory_maps() -> bool:
    """Returns True if this process has many memory maps, or the system does not say."""
    try:
        with open("/proc/self/maps", "rb") as maps:
            return sum(1 for _ in maps) > _MOST_MAPS
    except OSError:
        return True


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)
