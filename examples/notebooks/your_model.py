# %% [markdown]
# # Your model: flax nnx, linen, equinox, haiku
#
# Five lines each, from a model to a 2-bit file and back.

# %%
# In Colab this installs what is missing, and leaves jax as it is.
import importlib.metadata
import importlib.util
import subprocess
import sys

needed = {"jaxclip": "jaxclip", "equinox": "equinox", "haiku": "dm-haiku"}
missing = [name for module, name in needed.items() if importlib.util.find_spec(module) is None]
if missing:
    jax_version = f"jax=={importlib.metadata.version('jax')}"
    command = [sys.executable, "-m", "pip", "install", "--quiet", *missing, jax_version]
    subprocess.run(command, check=True)

# %%
import tempfile

import jax
import jax.numpy as jnp

import jaxclip

folder = tempfile.mkdtemp()
grid = jaxclip.Grid(2, levels="balanced")
x = jnp.ones((1, 64))

# %% [markdown]
# ## flax nnx

# %%
from flax import nnx

model = nnx.Sequential(
    nnx.Linear(64, 128, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(128, 10, rngs=nnx.Rngs(1))
)
graph, params = nnx.split(model, nnx.Param)
small = jaxclip.compress(params, grid)
jaxclip.checkpoints.save(f"{folder}/nnx.safetensors", small)
loaded = jaxclip.checkpoints.load(f"{folder}/nnx.safetensors", like=small)
print(nnx.merge(graph, jaxclip.decompress(loaded))(x).shape)
jaxclip.size_report(small)

# %% [markdown]
# ## flax linen

# %%
import flax.linen as nn

module = nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(10)])
variables = module.init(jax.random.key(0), x)
small = jaxclip.compress(variables, grid)
jaxclip.checkpoints.save(f"{folder}/linen.safetensors", small)
loaded = jaxclip.checkpoints.load(f"{folder}/linen.safetensors")
print(module.apply(jaxclip.decompress(loaded), x).shape)

# %% [markdown]
# ## equinox

# %%
import equinox as eqx

net = eqx.nn.MLP(64, 10, 128, depth=1, key=jax.random.key(0))
small = jaxclip.compress(net, grid)
jaxclip.checkpoints.save(f"{folder}/equinox.safetensors", small)
loaded = jaxclip.checkpoints.load(f"{folder}/equinox.safetensors", like=small)
print(jaxclip.decompress(loaded)(x[0]).shape)

# %% [markdown]
# ## haiku

# %%
import haiku as hk

forward = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([128, 10])(x)))
params = forward.init(jax.random.key(0), x)
small = jaxclip.compress(params, grid, layout="in_out")  # `w` does not say its layout
jaxclip.checkpoints.save(f"{folder}/haiku.safetensors", small)
loaded = jaxclip.checkpoints.load(f"{folder}/haiku.safetensors")
print(forward.apply(jaxclip.decompress(loaded), x).shape)

# %% [markdown]
# ## Plain JAX, and a matrix that stays packed
#
# `packed=True` keeps 2 bits a weight in memory, and `lowbit.matmul` decodes a tile at a time.

# %%
params = {"kernel": jax.random.normal(jax.random.key(0), (64, 128))}
small = jaxclip.compress(params, grid)
jaxclip.checkpoints.save(f"{folder}/plain.safetensors", small)
loaded = jaxclip.checkpoints.load(f"{folder}/plain.safetensors", packed=True)
assert jnp.allclose(
    jaxclip.lowbit.matmul(x, loaded["kernel"]), x @ jaxclip.decompress(small)["kernel"], atol=1e-4
)
loaded["kernel"]
