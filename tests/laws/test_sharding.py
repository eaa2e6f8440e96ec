"""The whole train step on eight devices: as on one, wherever parameters and batch lie."""

import contextlib
import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxclip
from jaxclip import TrainState, make_train_step
from jaxclip.training.info import StepInfo
from jaxclip.training.telemetry import Statistics
from jaxclip.weights.clipping import weight_clip_rate
from oracles.given_gradients import given_loss

SHAPES = {
    "first": {"kernel": (16, 32), "bias": (32,)},
    "second": {"kernel": (32, 8), "bias": (8,)},
}
STEP_SIZE, BOX = 2.0**-6, 0.25
BAD_STEP, NUM_STEPS = 2, 4

# Sums over a batch or a leaf are added up in another order: an error of a few float32 ulps of
# the largest entry (6 measured).
ULPS = 16


# --- Where things lie -------------------------------------------------------------------


class Layout(NamedTuple):
    """A mesh, and where kernels lie at rest and in use, their products, and the first bias."""

    mesh_shape: dict[str, int]
    kernels: tuple[P, P]
    used: tuple[P, P] = (P(), P())
    products: tuple[P, P] = (P("data"), P("data"))
    bias: P = P()

    def mesh(self, kind: AxisType) -> Mesh:
        devices = np.array(jax.devices()[:8]).reshape(*self.mesh_shape.values())
        return Mesh(devices, tuple(self.mesh_shape), axis_types=(kind,) * devices.ndim)

    def specs(self) -> Any:
        pairs = zip(SHAPES, self.kernels, (self.bias, P()), strict=True)
        return {layer: {"kernel": kernel, "bias": b} for layer, kernel, b in pairs}


LAYOUTS = {
    "data": Layout({"data": 8}, (P(), P())),
    "sharded": Layout({"data": 8}, (P("data"), P("data")), bias=P("data")),
    "mixed": Layout(
        {"data": 4, "model": 2},
        kernels=(P("data", "model"), P(("model", "data"))),
        used=(P(None, "model"), P("model")),
        products=(P("data", "model"), P("data")),  # on an Auto mesh XLA would split the bias
    ),
}


def place(tree: Any, specs: Any, mesh: Mesh | None) -> Any:
    if mesh is None:
        return tree
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


def draw(seed: int, scale: float = 1.0, dtype: Any = jnp.float32) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(scale * rng.standard_normal(shape), dtype),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


# --- What is trained --------------------------------------------------------------------


def network_loss(layout: Layout | None) -> Callable:
    """Of two layers, which on an Explicit mesh say where kernels and products lie."""

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        x, target = batch
        for i, leaves in enumerate(params.values()):
            kernel, bias, where = leaves["kernel"], leaves["bias"], {}
            if layout is not None:
                kernel = jax.sharding.reshard(kernel, layout.used[i])
                bias = jax.sharding.reshard(bias, P())
                where = {"out_sharding": layout.products[i]}
            x = jnp.tanh(jnp.dot(x, kernel, **where) + bias[None])
        return jnp.mean((x - target) ** 2)

    return loss_fn


def draw_batch(step: int) -> Any:
    rng = np.random.default_rng(100 + step)
    x, target = rng.standard_normal((64, 16)), rng.standard_normal((64, 8))
    x[-1, 3] = np.nan if step == BAD_STEP else x[-1, 3]  # in the last of the shards
    return jnp.asarray(x, jnp.float32), jnp.asarray(target, jnp.float32)


def draw_grads(step: int, dtype: Any) -> Any:
    grads = draw(200 + step, 2.0**-step, dtype)
    if step == BAD_STEP:
        grads["first"]["kernel"] = grads["first"]["kernel"].at[-1, 0].set(jnp.inf)
    return grads


def adamw_update(*args: Any) -> Any:
    with jax.numpy_dtype_promotion("standard"):  # Adam multiplies integers by floats
        return optax.adamw(STEP_SIZE, eps=1e-4).update(*args)


ADAMW = optax.GradientTransformation(optax.adamw(STEP_SIZE, eps=1e-4).init, adamw_update)
chain, lion = optax.chain, jaxclip.lion(STEP_SIZE)
OPTIMIZERS = {
    "clip, lion": chain(jaxclip.clip_by_global_norm(0.05), lion),
    "clip, adamw": chain(jaxclip.clip_by_global_norm(0.05), ADAMW),
    "clip, lion, bfloat16": chain(jaxclip.clip_by_global_norm(1.0), lion),
    "skip(autoclip, lion)": jaxclip.skip_nonfinite(chain(jaxclip.gradients.autoclip(), lion)),
    "skip_or_clip(lion)": jaxclip.gradients.skip_or_clip(lion, drop_norm=20.0, max_norm=8.0),
    "agc, lion": chain(jaxclip.adaptive_grad_clip(0.1), lion),
    "agc by rows, lion": chain(jaxclip.adaptive_grad_clip(0.1, axis=-1), lion),
    "rms, lion": chain(jaxclip.clip_by_block_rms(0.5), lion),
    "leaf norm, lion": chain(jaxclip.clip_by_leaf_norm(1.0), lion),
    "value, signum": chain(jaxclip.clip_by_value(0.5), jaxclip.signum(STEP_SIZE)),
    "cautious lion": chain(jaxclip.clip_by_global_norm(1.0), jaxclip.sign.cautious(lion)),
    "sign_sgd": jaxclip.sign_sgd(STEP_SIZE),
}


class Setup(NamedTuple):
    optimizer: str
    layout: str
    kind: str
    loss: str

    def __str__(self) -> str:
        return "-".join(self)


NETWORKS = [
    Setup(optimizer, layout, kind, "network")
    for optimizer, kind in (
        ("clip, lion", "Auto"),
        ("clip, lion", "Explicit"),
        ("clip, adamw", "Auto"),
    )
    for layout in LAYOUTS
]
GIVEN = [
    Setup(optimizer, "sharded", "Explicit" if i % 2 else "Auto", "given")
    for i, optimizer in enumerate(OPTIMIZERS)
]
# A setup is a program or two to compile; these have every layout, and statistics of every kind.
QUICK = [
    "clip, lion-data-Auto-network",
    "clip, lion-sharded-Auto-network",
    "clip, lion-mixed-Explicit-network",
    "clip, lion, bfloat16-sharded-Auto-given",
    "agc by rows, lion-sharded-Auto-given",
]


def each_of(setups: list[Setup]) -> pytest.MarkDecorator:
    """Runs a test on every setup, in the quick run on a few."""
    marks = ([] if str(setup) in QUICK else [pytest.mark.thorough] for setup in setups)
    params = [pytest.param(*pair, marks=m) for pair, m in zip(zip(setups), marks, strict=True)]
    return pytest.mark.parametrize("setup", params, ids=str)


every_setup, every_given = each_of([*NETWORKS, *GIVEN]), each_of(GIVEN)


# --- Runs -------------------------------------------------------------------------------


class Snapshot(NamedTuple):
    """An array as it was after a step, for the step gives its memory away."""

    value: np.ndarray
    sharding: Any
    shards: list[tuple[Any, np.ndarray]]


def numbers_of(info: StepInfo) -> dict[str, jax.Array]:
    names = ("loss", "grad_norm", "weight_clip_rate", "num_skipped", "nonfinite_leaf")
    return {name: getattr(info, name) for name in names} | info.stats


def snapshot(x: jax.Array) -> Snapshot:
    x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    shards = [(s.index, np.asarray(s.data)) for s in x.addressable_shards]
    return Snapshot(np.asarray(x), x.sharding, shards)


class Run(NamedTuple):
    states: list[Any]
    infos: list[Any]
    program: str


@functools.cache
def run(setup: Setup) -> Run:
    """Four steps of one compiled program, the third a bad step."""
    layout, is_half = LAYOUTS.get(setup.layout), "bfloat16" in setup.optimizer
    is_explicit = layout is not None and setup.kind == "Explicit"
    mesh = layout.mesh(getattr(AxisType, setup.kind)) if layout else None
    specs = layout.specs() if layout else None
    tx, dtype = OPTIMIZERS[setup.optimizer], jnp.bfloat16 if is_half else jnp.float32
    if setup.loss == "given":
        loss_fn = given_loss
        batches = [place(draw_grads(i, dtype), specs, mesh) for i in range(NUM_STEPS)]
    else:
        loss_fn = network_loss(layout if is_explicit else None)
        batches = [place(draw_batch(i), (P("data"), P("data")), mesh) for i in range(NUM_STEPS)]
    step = make_train_step(
        loss_fn, tx, weight_threshold=BOX, stochastic_rounding=is_half, telemetry_every=1
    )
    with jax.set_mesh(mesh) if is_explicit else contextlib.nullcontext():
        params = place(draw(0, 0.2, dtype), specs, mesh)
        state = TrainState.create(params, tx, key=jax.random.key(7) if is_half else None)
        program = step.lower(state, batches[0]).compile()
        states, infos = [jax.tree.map(snapshot, state)], []
        for batch in batches:
            state, info = program(state, batch)
            states.append(jax.tree.map(snapshot, state))
            infos.append(jax.tree.map(snapshot, numbers_of(info)))
    return Run(states, infos, program.as_text())


def run_on_one(setup: Setup) -> Run:
    return run(setup._replace(layout="one", kind="Auto"))


def snapshots(tree: Any) -> list[tuple[str, Snapshot]]:
    is_leaf = lambda x: isinstance(x, Snapshot)  # noqa: E731
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in found]


def assert_near(actual: Any, expected: Any) -> None:
    for (name, a), (_, e) in zip(snapshots(actual), snapshots(expected), strict=True):
        if not np.issubdtype(e.value.dtype, np.floating):
            np.testing.assert_array_equal(a.value, e.value, err_msg=name)
            continue
        a, e = a.value.astype(np.float64), e.value.astype(np.float64)
        error = np.abs(a - e).max(initial=0) / max(np.abs(e).max(initial=0), 1e-30)
        assert error <= ULPS * 2.0**-23, f"{name}: {error * 2**23:.0f} ulps"


# --- Claims -----------------------------------------------------------------------------


@pytest.mark.thorough
@every_setup
def test_eight_devices_equal_one(setup: Setup):
    many, one = run(setup), run_on_one(setup)
    for i in range(NUM_STEPS):
        assert_near(many.states[i + 1], one.states[i + 1])
        if i != BAD_STEP:
            assert_near(many.infos[i], one.infos[i])


@pytest.mark.thorough
@every_setup
def test_shardings_never_change(setup: Setup):
    many = run(setup)
    for state in many.states[1:]:
        pairs = zip(snapshots(state), snapshots(many.states[0]), strict=True)
        for (name, new), (_, old) in pairs:
            assert new.sharding.is_equivalent_to(old.sharding, old.value.ndim), name
    params = jax.tree.leaves(many.states[0].params, is_leaf=lambda x: isinstance(x, Snapshot))
    shards = {p.value.shape: p.shards[0][1].shape for p in params}
    for name, moment in snapshots(many.states[-1].opt_state):
        if moment.value.shape in shards:  # lies as its parameter does
            assert moment.shards[0][1].shape == shards[moment.value.shape], name


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_one_compilation_serves_all_steps(kind: str):
    traces, layout = [], LAYOUTS["sharded"]
    mesh, tx = layout.mesh(getattr(AxisType, kind)), OPTIMIZERS["clip, lion"]

    def loss_fn(params: Any, grads: Any) -> jax.Array:
        traces.append(None)
        return given_loss(params, grads)

    step = make_train_step(loss_fn, tx, weight_threshold=BOX)
    with jax.set_mesh(mesh) if kind == "Explicit" else contextlib.nullcontext():
        state = TrainState.create(place(draw(0), layout.specs(), mesh), tx)
        for i in range(3):
            state, _ = step(state, place(draw(i), layout.specs(), mesh))
    assert len(traces) == 1


@every_setup
def test_every_device_holds_the_same_copies_and_statistics(setup: Setup):
    many = run(setup)
    for name, x in snapshots((many.states, many.infos)):
        for index, shard in x.shards:
            np.testing.assert_array_equal(shard, x.value[index], err_msg=name)
    for name, x in snapshots(many.infos):
        assert len(x.shards) == 8, name


@every_setup
def test_weights_of_every_shard_are_in_the_box_and_counted(setup: Setup):
    many = run(setup)
    for state, info in zip(many.states[1:], many.infos, strict=True):
        weights = snapshots(state.params)
        for name, w in weights:
            for _, shard in w.shards:
                assert (np.abs(shard.astype(np.float32)) <= BOX).all(), name
        on_bound = sum((np.abs(w.value.astype(np.float32)) == BOX).sum() for _, w in weights)
        share = on_bound / sum(w.value.size for _, w in weights)
        assert 0 < share < 1
        np.testing.assert_allclose(info["weight_clip_rate"].value, share, rtol=1e-6)


@every_setup
def test_a_bad_shard_skips_the_step_on_all_devices_and_changes_no_bit(setup: Setup):
    many = run(setup)
    before, after = many.states[BAD_STEP], many.states[BAD_STEP + 1]
    assert int(after.num_skipped.value) == int(before.num_skipped.value) + 1 == 1
    kept = ((before.params, before.opt_state), (after.params, after.opt_state))
    for (name, old), (_, new) in zip(*map(snapshots, kept), strict=True):
        assert old.value.tobytes() == new.value.tobytes(), name
    later = many.states[-1]
    moved = zip(snapshots(before.params), snapshots(later.params), strict=True)
    assert all((old.value != new.value).any() for (_, old), (_, new) in moved)


@pytest.mark.thorough
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_clip_norm_is_that_of_the_whole_gradient(layout: str):
    many = run(Setup("clip, lion", layout, "Auto", "network"))
    params = {
        layer: {name: jnp.asarray(x.value) for name, x in leaves.items()}
        for layer, leaves in many.states[0].params.items()
    }
    grads = jax.grad(network_loss(None))(params, draw_batch(0))
    squares = [np.sum(np.asarray(g, np.float64) ** 2) for g in jax.tree.leaves(grads)]
    stats = Statistics(many.infos[0])
    np.testing.assert_allclose(stats["pre_norm"].value, np.sqrt(sum(squares)), rtol=1e-5)
    np.testing.assert_allclose(stats["post_norm"].value, 0.05, rtol=1e-5)


# --- The compiled program ---------------------------------------------------------------

_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+)(?:-start)?\("
)


def collectives(program: str) -> list[tuple[str, list[int]]]:
    """Kind and sizes of the arrays of every collective of a compiled program."""
    found = []
    for shapes, kind in _COLLECTIVE.findall(program):
        sizes = re.findall(r"\w+\[([\d,]*)\]", shapes)
        found.append((kind, [math.prod(map(int, filter(None, s.split(",")))) for s in sizes]))
    return found


# One for all norms, one for the weights on the bound and other counts; what else is needed.
_HAS_FLOAT64 = hasattr(jax, "enable_x64")  # otherwise the largest entries come first
NUM_ALL_REDUCES = {
    "clip, lion": 2,
    "clip, adamw": 2,
    "clip, lion, bfloat16": 2,
    "skip(autoclip, lion)": 2,
    "skip_or_clip(lion)": 2,
    "agc, lion": 2 if _HAS_FLOAT64 else 4,
    "rms, lion": 2 if _HAS_FLOAT64 else 4,
    "leaf norm, lion": 2 if _HAS_FLOAT64 else 4,
    "value, signum": 2,
    "cautious lion": 3,  # coordinates that agree
    "sign_sgd": 2,
}


@every_given
def test_the_optimizer_part_moves_statistics_only(setup: Setup):
    largest = max(56, len(jax.tree.leaves(draw(0))))  # one number for each unit
    found = collectives(run(setup).program)
    assert found
    assert max(size for _, sizes in found for size in sizes) <= largest
    if setup.optimizer == "agc by rows, lion":  # whose units are split as the rows are
        assert {kind for kind, _ in found} == {"all-reduce", "all-gather"}
        return
    assert {kind for kind, _ in found} == {"all-reduce"}
    assert len(found) == NUM_ALL_REDUCES[setup.optimizer]


@pytest.mark.thorough
def test_a_gathered_parameter_would_be_noticed():
    mesh = LAYOUTS["sharded"].mesh(AxisType.Auto)
    x = jax.device_put(jnp.ones((16, 32)), NamedSharding(mesh, P("data")))
    gather = jax.jit(lambda x: 2 * x, out_shardings=NamedSharding(mesh, P()))
    assert collectives(gather.lower(x).compile().as_text()) == [("all-gather", [16 * 32])]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_leaves_of_one_shape_that_are_split_in_different_ways_stay_apart(kind: AxisType):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("a", "b"), axis_types=(kind,) * 2)
    specs = [P("a"), P(None, "a"), P("b", "a"), P()]
    w = [jax.device_put(jnp.ones((16, 32)), NamedSharding(mesh, spec)) for spec in specs]
    compiled = jax.jit(lambda w: weight_clip_rate(w, 0.5)).lower(w).compile()
    found = collectives(compiled.as_text())
    assert {kind for kind, _ in found} == {"all-reduce"}
    assert max(size for _, sizes in found for size in sizes) <= len(specs)
    assert compiled(w) == 1


# --- Uneven shards ----------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("optimizer", ["clip, lion", "rms, lion"])
def test_shards_of_unequal_size_count_no_entry_twice(optimizer: str):
    # JAX refuses them for what goes into a program, but not within one.
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",), axis_types=(AxisType.Auto,))
    rng, tx = np.random.default_rng(0), OPTIMIZERS[optimizer]
    shapes = {"matrix": (13, 7), "few rows": (3, 9), "vector": (10,)}
    params = {n: jnp.asarray(0.2 * rng.standard_normal(s), jnp.float32) for n, s in shapes.items()}
    rows = NamedSharding(mesh, P("data"))

    def split(x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, rows) if x.ndim else x

    step = make_train_step(given_loss, tx, weight_threshold=BOX)
    everywhere = NamedSharding(mesh, P())
    split_step = jax.jit(lambda *both: step(*jax.tree.map(split, both)), out_shardings=everywhere)
    one = TrainState.create(params, tx)
    many = TrainState.create(jax.device_put(params, everywhere), tx)
    program = split_step.lower(many, many.params).compile().as_text()
    assert "f32[2,7]" in program  # 13 rows on 8 devices
    for scale in (3.0, 1.0, 5.0):
        grads = jax.tree.map(lambda w, s=scale: s * jnp.cos(40 * w), params)
        many, info = split_step(many, jax.device_put(grads, everywhere))
        one, expected = step(one, grads)
        for pair in zip(
            jax.tree.leaves((many, numbers_of(info))),
            jax.tree.leaves((one, numbers_of(expected))),
            strict=True,
        ):
            np.testing.assert_allclose(*pair, rtol=ULPS * 2.0**-23, atol=1e-30)
