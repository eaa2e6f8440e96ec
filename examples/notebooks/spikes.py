# %% [markdown]
# # Spikes and NaNs: clips side by side
#
# A regression whose gradients are now and then a thousand times too large, or not finite. Which clips keep it going?

# %%
# In Colab this installs what is missing, and leaves jax as it is.
import importlib.metadata
import importlib.util
import subprocess
import sys

needed = {"jaxclip": "jaxclip"}
missing = [name for module, name in needed.items() if importlib.util.find_spec(module) is None]
if missing:
    jax_version = f"jax=={importlib.metadata.version('jax')}"
    command = [sys.executable, "-m", "pip", "install", "--quiet", *missing, jax_version]
    subprocess.run(command, check=True)

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxclip

keys = jax.random.split(jax.random.key(0), 3)
x = jax.random.normal(keys[0], (512, 32))
y = jnp.tanh(x @ jax.random.normal(keys[1], (32, 8)))
params = {"kernel": jax.random.normal(keys[2], (32, 8)) / 6}
STEPS, RATE = 400, 0.3


def loss_fn(params, batch):
    x, y, scale = batch
    error = jnp.mean((jnp.tanh(x @ params["kernel"]) - y) ** 2)
    return scale * error  # the gradient of a batch with scale 1000 is a spike


# Every 40th batch is a spike, and two are NaN.
scales = np.ones(STEPS, np.float32)
scales[20::40] = 1000
scales[[150, 250]] = np.nan

# %% [markdown]
# ## Which clip
#
# The same optimizer, SGD with momentum, behind each clip. A clip turns a NaN into zeros; without one it stays for ever.

# %%
clips = {
    "no clip": optax.identity(),
    "clip_by_global_norm": jaxclip.clip_by_global_norm(0.05),
    "clip_by_value": jaxclip.clip_by_value(0.01),
    "autoclip": jaxclip.gradients.autoclip(0.5),
    "zclip": jaxclip.gradients.zclip(max_norm=0.5),
}


def train(clip):
    tx = optax.chain(clip, optax.sgd(RATE, momentum=0.9))

    @jax.jit
    def step(carry, scale):
        params, state = carry
        grads = jax.grad(loss_fn)(params, (x, y, scale))
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), loss_fn(params, (x, y, 1.0))

    (_, state), losses = jax.lax.scan(step, (params, tx.init(params)), jnp.asarray(scales))
    return np.asarray(losses), state


losses, states = {}, {}
for name, clip in clips.items():
    losses[name], states[name] = train(clip)
    print(f"{name:>20}: loss {losses[name][-1]:.4f}")
assert not np.isfinite(losses["no clip"][-1])
assert all(losses[name][-1] < losses[name][0] for name in clips if name != "no clip")

# %%
finite = {name: curve for name, curve in losses.items() if np.isfinite(curve).all()}
jaxclip.plots.training_curves(range(1, STEPS + 1), finite, ylabel="loss on clean data")

# %% [markdown]
# ## What the clip did
#
# Clips keep what they measured in their state. `clip_rate` is the fraction of the steps that were clipped.

# %%
{name: float(value) for name, value in jaxclip.clip_stats(states["zclip"]).items()}

# %% [markdown]
# ## Skip the whole step
#
# A clip scales a bad gradient; `make_train_step` skips the step: no weight and no momentum changes, and a counter goes
# up. `explain` names the leaf with the largest gradient.

# %%
tx = optax.chain(jaxclip.gradients.zclip(max_norm=0.5), optax.sgd(RATE, momentum=0.9))
step = jaxclip.make_train_step(loss_fn, tx)
state = jaxclip.TrainState.create(params, tx)
for scale in scales:
    state, info = step(state, (x, y, scale))
assert info.num_skipped == 2
print(*jaxclip.training.explain(state.opt_state, state.params))
info
