"""One train step, three ways to lay it out over devices: digits, in well under a minute.

    pip install -e ".[examples]" && python examples/many_devices.py

On a machine without accelerators eight devices are made of its CPU; elsewhere the real ones are
used. Nothing of jaxclip is told about them: where the parameters lie is said once, with
`device_put`, and the jitted step follows. Every run must agree with that on one device.
"""

import os

import digits
import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxclip

if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", 8)  # before the first array; of no effect on GPUs

DEVICES, NUM_STEPS = jax.devices(), 500
BATCH_SIZE = -(-128 // len(DEVICES)) * len(DEVICES)

picks = digits.draw(NUM_STEPS, BATCH_SIZE)
optimizer = optax.chain(
    jaxclip.clip_by_global_norm(1.0),
    jaxclip.lion(optax.cosine_decay_schedule(4e-3, NUM_STEPS)),
)


# --- Layouts --------------------------------------------------------------------------
def make_mesh(num_data, num_model):
    devices = DEVICES[: num_data * num_model]
    return jax.make_mesh(
        (num_data, num_model), ("data", "model"), (AxisType.Auto,) * 2, devices=devices
    )


def place(x, mesh, spec):
    """The array on the mesh; axes that do not divide evenly stay whole."""
    names = [
        name if length % mesh.shape[name] == 0 else None
        for name, length in zip(spec, x.shape, strict=False)
    ]
    return jax.device_put(x, NamedSharding(mesh, P(*names)))


num_devices = len(DEVICES)
num_model = 2 if num_devices % 2 == 0 else 1
kernels = P("data", "model")  # rows over one axis of the mesh, columns over the other
layouts = {
    "one device": (make_mesh(1, 1), P()),
    "data parallel": (make_mesh(num_devices, 1), P()),
    "fully sharded": (make_mesh(num_devices, 1), kernels),
    "mixed": (make_mesh(num_devices // num_model, num_model), kernels),
}


# --- Training -------------------------------------------------------------------------
def fit(mesh, spec):
    """Losses, final state and info, and the compiled step."""
    params = digits.model.init(jax.random.key(0), digits.images[:1])
    params = jax.tree.map(lambda x: place(x, mesh, spec if x.ndim == 2 else P()), params)
    state = jaxclip.TrainState.create(params, optimizer)  # momentum lies where its weights do
    step = jaxclip.make_train_step(digits.loss_fn, optimizer, weight_threshold=jaxclip.fan_in(1.0))
    batches = (tuple(x[i] for x in digits.train) for i in picks)
    losses, program = [], None
    for batch in batches:
        batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
        program = program or step.lower(state, batch).compile()
        # Waiting for each step: devices made of one CPU share its threads, and two steps under way
        # at once can leave each other none.
        state, info = jax.block_until_ready(program(state, batch))
        losses.append(float(info.loss))
    return np.array(losses), state, info, program


def bytes_on_one_device(state):
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))


print(f"{num_devices} devices: {DEVICES[0].device_kind}")
print("layout           loss  accuracy  on bound  state on a device  collectives a step")
runs = {}
for name, layout in layouts.items():
    losses, state, info, program = fit(*layout)
    score = digits.accuracy(jax.device_get(state.params))
    runs[name] = losses, score, float(info.weight_clip_rate)
    print(
        f"{name:<14} {losses[-10:].mean():6.4f} {score:9.4f} {info.weight_clip_rate:9.1%}"
        f" {bytes_on_one_device(state):12,} bytes {digits.collective_bytes(program):13,} bytes"
    )

# --- The claims -----------------------------------------------------------------------
# Sums in another order differ in their last bits, and now and then that turns a sign: the first
# losses agree to rounding, later ones about.
losses, score, on_bound = runs.pop("one device")
for name, (its_losses, its_score, its_on_bound) in runs.items():
    first = abs(its_losses[:10] / losses[:10] - 1).max() * 2**23
    assert first <= 64, f"FAILS: {name} differs by {first:.0f} ulps within ten steps"
    assert abs(its_score - score) <= 0.015, f"FAILS: {name} has accuracy {its_score}"
    assert abs(its_on_bound - on_bound) <= 0.02, f"FAILS: {name} has {its_on_bound} on the bound"
print("holds: the losses of ten steps agree with one device to 64 ulps, the ends to 1.5 points")
