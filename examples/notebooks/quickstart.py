# %% [markdown]
# # Quickstart: a net in a box, and a file of 2 bits
#
# Handwritten digits, trained by sign steps with every weight in a box, then compressed. At the end the recipe that
# makes the smallest files: AdamW, coded by what the layers see.

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
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxclip

x, y = load_digits(return_X_y=True)
x, x_test, y, y_test = train_test_split(np.float32(x / 16), y, random_state=0)


def init_fn(key, width=128):
    first, second = jax.random.split(key)
    return {
        "hidden": jax.random.normal(first, (64, width)) / 8,
        "out": jax.random.normal(second, (width, 10)) / width**0.5,
    }


def apply_fn(params, x):
    return jax.nn.relu(x @ params["hidden"]) @ params["out"]


def loss_fn(params, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels(apply_fn(params, batch[0]), batch[1])
    return losses.mean()


def accuracy(params):
    return float((apply_fn(params, x_test).argmax(-1) == y_test).mean())


# %% [markdown]
# ## Train
#
# A box is a bound on every weight, `|w| <= t`. `fan_in(1.0)` gives each matrix `t = sqrt(2 / fan_in)`. `fit` repeats
# the step until a stop rule is met; the log shows how many of the weights are on their bound.


# %%
def log(step, numbers):
    if step % 100 == 0:
        rate = numbers["weight_clip_rate"]
        print(f"step {step}: loss {numbers['loss']:.4f}, {rate:.0%} of the weights on their bound")


steps = 500
tx = optax.chain(
    jaxclip.clip_by_global_norm(1.0), jaxclip.lion(optax.cosine_decay_schedule(4e-3, steps))
)
step = jaxclip.make_train_step(loss_fn, tx, weight_threshold=jaxclip.fan_in(1.0))
result = jaxclip.fit(
    step,
    jaxclip.TrainState.create(init_fn(jax.random.key(0)), tx),
    [(x, y)] * steps,
    stop=jaxclip.max_steps(steps),
    on_log=log,
    progress=False,
)
result

# %% [markdown]
# ## Compress
#
# Ternary: each weight is -s, 0 or s, with one scale s for each output.

# %%
boxed = result.state.params
small = jaxclip.compress(boxed, "ternary")
small["hidden"]

# %%
print(f"float32 {accuracy(boxed):.1%}, ternary {accuracy(jaxclip.decompress(small)):.1%}")
assert accuracy(jaxclip.decompress(small)) > accuracy(boxed) - 0.02
jaxclip.size_report(small, original=boxed)

# %% [markdown]
# ## The same without a box
#
# AdamW's net is better in float32, and loses more by rounding. So a box keeps what it has; which net is better at
# equal bytes is another question, and the last section answers it.

# %%
tx = optax.adamw(optax.cosine_decay_schedule(3e-3, steps), weight_decay=0.5)
step = jaxclip.make_train_step(loss_fn, tx)
state = jaxclip.TrainState.create(init_fn(jax.random.key(0)), tx)
for _ in range(steps):
    state, info = step(state, (x, y))
free = state.params
ternary = jaxclip.decompress(jaxclip.compress(free, "ternary"))
print(f"AdamW: float32 {accuracy(free):.1%}, ternary {accuracy(ternary):.1%}")

levels = small["hidden"]
jaxclip.plots.weight_histograms(
    {"AdamW": free["hidden"], "Lion in a box": boxed["hidden"]},
    thresholds={"Lion in a box": (2 / 64) ** 0.5},
    levels={"Lion in a box": [-float(levels.threshold.mean()), 0, float(levels.threshold.mean())]},
)

# %% [markdown]
# ## The smallest file
#
# A calibration tells `compress` what each layer sees. It needs no labels and no training, and the file is as large as
# you say. No box is needed for it.

# %%
measured = jaxclip.calibration.measure(apply_fn, free, [x], progress=False)
coded = jaxclip.compress(free, target_bytes=3_500, calibration=measured)
jaxclip.checkpoints.save("digits.safetensors", coded, coding="lanes", overwrite=True)
loaded = jaxclip.decompress(jaxclip.checkpoints.load("digits.safetensors"))
print(f"float32 {accuracy(free):.1%} in 37,888 bytes, coded {accuracy(loaded):.1%} in 3,500")
assert accuracy(loaded) > accuracy(free) - 0.01
