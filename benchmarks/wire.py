"""What a step moves between devices and keeps on each, counted from compiled programs.

    python benchmarks/wire.py

A network of four square matrices, float32, on 1 to 8 devices made of the CPU; nothing is run.
Counted are the bytes of the results of all collectives on one device, by kind, for each parameter.
What a device sends in a ring follows from that: of n bytes of result an all-reduce sends
2(d-1)/d n on d devices, an all-gather or all-to-all (d-1)/d n, a reduce-scatter, of whose input
the result is a d-th, (d-1) n.
"""

import os
import re

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from step_cases import given_gradients

import jaxclip

WIDTH, NUM_LAYERS, ROWS, BOX = 256, 4, 8, 0.1
NUM_PARAMETERS = NUM_LAYERS * WIDTH**2
KINDS = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute")
BITS = {"f64": 64, "pred": 8, "u8": 8, "s8": 8, "bf16": 16, "s32": 32, "u32": 32, "f32": 32}
CLIP = jaxclip.clip_by_global_norm(1.0)


def loss_of(kernels, x):
    for kernel in kernels:
        x = jnp.tanh(x @ kernel)
    return jnp.mean(x**2)


def gathering_loss(mesh):
    """The same of rows of kernels: gathers them; its gradient scatters what it adds up."""

    def local(kernels, x):
        for kernel in kernels:
            x = jnp.tanh(x @ lax.all_gather(kernel, "d", tiled=True))
        return lax.pmean(jnp.mean(x**2), "d")

    return jax.shard_map(local, mesh=mesh, in_specs=(P("d"), P("d")), out_specs=P())


# --- Programs -------------------------------------------------------------------------
def shapes(mesh, spec, dtype=jnp.float32):
    place = NamedSharding(mesh, spec)
    return [jax.ShapeDtypeStruct((WIDTH, WIDTH), dtype, sharding=place)] * NUM_LAYERS


def batch(mesh):
    place = NamedSharding(mesh, P("d"))
    return jax.ShapeDtypeStruct((ROWS * mesh.size, WIDTH), jnp.float32, sharding=place)


def compiled_step(loss_fn, mesh, spec, second, optimizer, dtype=jnp.float32):
    """The train step, from shapes alone: momentum lies as its parameter does."""
    params = shapes(mesh, spec, dtype)
    step = jaxclip.make_train_step(loss_fn, optimizer, weight_threshold=BOX)
    state = jax.eval_shape(lambda p: jaxclip.TrainState.create(p, optimizer), params)
    whole = NamedSharding(mesh, P())

    def place(x):
        sharding = params[0].sharding if x.shape == params[0].shape else whole
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return step.lower(jax.tree.map(place, state), second).compile()


def averaged(mesh):
    return compiled_step(loss_of, mesh, P(), batch(mesh), lion(jnp.float32))


def fully_sharded(mesh):
    return compiled_step(gathering_loss(mesh), mesh, P("d"), batch(mesh), lion(jnp.float32))


def voted(mesh, zeros="alternate"):
    optimizer = optax.chain(
        jaxclip.scale_by_lion(), jaxclip.sign.majority_vote("d", zeros=zeros), optax.scale(-1e-3)
    )

    def local(params, state, x):
        grads = jax.grad(loss_of)(params, x)
        state = jax.tree.map(lambda leaf: leaf[0], state)
        updates, state = optimizer.update(grads, state, params)
        params = jaxclip.clip_weights(optax.apply_updates(params, updates), BOX)
        return params, jax.tree.map(lambda leaf: leaf[None], state)

    specs = P(), P("d"), P("d")
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=specs, out_specs=(P(), P("d")), check_vma=False
    )
    params = shapes(mesh, P())
    each = NamedSharding(mesh, P("d"))
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((mesh.size, *x.shape), x.dtype, sharding=each),
        jax.eval_shape(optimizer.init, params),
    )
    return jax.jit(mapped, donate_argnums=(0, 1)).lower(params, state, batch(mesh)).compile()


# --- Counting -------------------------------------------------------------------------
def result_bits(program):
    """Bits of results of each kind of collective on one device."""
    total = dict.fromkeys(KINDS, 0)
    pattern = rf"= (.*?) ({'|'.join(KINDS)})(?:-done)?\("
    for results, kind in re.findall(pattern, program.as_text()):
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", results):
            total[kind] += BITS[dtype] * int(np.prod([int(d) for d in dims.split(",") if d]))
    return total


def sent_bits(bits, num_devices):
    """What one device sends for these results in a ring."""
    share = (num_devices - 1) / num_devices
    passes = {"all-reduce": 2 * share, "reduce-scatter": num_devices - 1}
    return sum(passes.get(kind, share) * n for kind, n in bits.items())


def print_wire():
    cases = {
        "averaged": averaged,
        "fully sharded": fully_sharded,
        "voted": voted,
        "voted, abstain": lambda mesh: voted(mesh, "abstain"),
    }
    print(f"bits for each of {NUM_PARAMETERS:,} parameters: results by kind, and sent in a ring")
    head = "all-reduce  reduce-scatter  all-gather  all-to-all      sent"
    print(f"{'case':<16} {'devices':>7}  {head}")
    for name, make in cases.items():
        for num_devices in (2, 3, 4, 7, 8):
            if name == "fully sharded" and WIDTH % num_devices:
                continue
            mesh = Mesh(np.array(jax.devices()[:num_devices]), ("d",), axis_types=(AxisType.Auto,))
            bits = result_bits(make(mesh))
            each = {kind: n / NUM_PARAMETERS for kind, n in bits.items()}
            assert each["collective-permute"] == 0
            print(
                f"{name:<16} {num_devices:>7}  {each['all-reduce']:10.3f}"
                f" {each['reduce-scatter']:15.3f} {each['all-gather']:11.3f}"
                f" {each['all-to-all']:11.3f} {sent_bits(each, num_devices):9.3f}"
            )


def lion(dtype):
    return optax.chain(CLIP, jaxclip.lion(1e-3, mu_dtype=dtype))


def print_memory():
    mesh = Mesh(np.array(jax.devices()), ("d",), axis_types=(AxisType.Auto,))
    f32, bf16 = jnp.float32, jnp.bfloat16
    adamw = optax.chain(CLIP, optax.adamw(1e-3))
    cases = {
        "Lion": (f32, lion(f32)),
        "Lion, bfloat16 weights": (bf16, lion(f32)),
        "Lion, all bfloat16": (bf16, lion(bf16)),
        "AdamW": (f32, adamw),
    }
    print("\nbytes a parameter on 8 devices, gradients given: on each device times its share of")
    print("the parameters (whole: all; split: an eighth)")
    print(f"{'case':<24} {'':<6} {'state':>7} {'gradient':>9} {'temporary':>10}")
    for name, (dtype, optimizer) in cases.items():
        for where, spec, parts in (("whole", P(), 1), ("split", P("d"), 8)):
            grads = shapes(mesh, spec, dtype)
            program = compiled_step(given_gradients, mesh, spec, grads, optimizer, dtype)
            memory, share = program.memory_analysis(), NUM_PARAMETERS / parts
            given = jnp.dtype(dtype).itemsize
            state = memory.argument_size_in_bytes / share - given
            print(
                f"{name:<24} {where:<6} {state:7.3f} {given:9.3f}"
                f" {memory.temp_size_in_bytes / share:10.3f}"
            )


if __name__ == "__main__":
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    print_wire()
    print_memory()
