"""What calibration buys, in files of MiniLM: error of the embeddings against bits a weight.

    pip install -e ".[examples]" tokenizers
    python benchmarks/lowbit/calibrated.py MODEL_FOLDER [--parts whole coded fixed choices]

MODEL_FOLDER is that of `examples/minilm.py`, whose network is measured: the whole model in 6.5 MB,
then the 36 matrices of its encoder. "error" is 1 - the mean cosine of 300 sentences of Python's
manual to the embeddings of the original. Moments are from 512 other sentences of the manual, in
batches without padding, and sensitivities from four of these batches. Every row is a file that is
written and loaded again; bits are its bytes over its weights, with header, scales and tables.
Seconds are CPU time of `compress`, its search for the size included. "choices" compares the two
constants of the rounding: its errors are geometric means at three sizes around the first rate, each
brought to that rate by 6 dB a bit.
"""

import argparse
import dataclasses
import functools
import pathlib
import sys
import tempfile
import time

import jax.numpy as jnp
import numpy as np

from jaxclip import Grid, calibration, checkpoints, compress, decompress
from jaxclip.lowbit import dependent_codes
from jaxclip.lowbit.rounding import feedback
from jaxclip.thresholds import rate_optimal

sys.path.append(str(pathlib.Path(__file__).parents[2] / "examples"))
import minilm

NUM_SENTENCES = 512
WHOLE_BYTES = 6_500_000


# --- The model and its data --------------------------------------------------


class Model:
    def __init__(self, folder):
        loaded = checkpoints.load(folder / "model.safetensors")
        self.params = {name: np.asarray(leaf) for name, leaf in loaded.items()}
        self.encoder, self.texts = minilm.Encoder(folder), minilm.sentences(300)
        self.reference = self.encoder(self.params, self.texts)

    def apply(self, params, tokens):
        return minilm.embed(params, tokens, jnp.ones(tokens.shape, bool), *self.encoder.sizes)

    def error(self, changed):
        found = self.encoder({**self.params, **changed}, self.texts)
        return 1 - (found * self.reference).sum(1).mean()

    def measure(self):
        """Returns the calibration; prints CPU seconds."""
        texts = minilm.sentences(NUM_SENTENCES, self.texts)
        batches = list(minilm.token_batches(self.encoder, texts))
        print(f"{sum(b.size for b in batches):,} tokens in {len(batches)} batches")
        times = [time.process_time()]
        found = calibration.measure(self.apply, self.params, batches, progress=False)
        times.append(time.process_time())
        found = calibration.sensitivities(
            self.apply, self.params, batches[1:8:2], found, progress=False
        )
        times.append(time.process_time())
        seconds = np.diff(times)
        print(f"moments {seconds[0]:.0f} CPU s, sensitivities {seconds[1]:.0f} CPU s", flush=True)
        return found


# --- Files -----------------------------------------------------------------------------


def uniform(params, bits):
    return compress(params, Grid(8, axis=None), rule=rate_optimal(bits))


def written(make, coding="lanes"):
    """Writes what `make()` returns: the file's bytes, its arrays, CPU seconds of making it."""
    start = time.process_time()
    small = make()
    seconds = time.process_time() - start
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "small.safetensors")
        checkpoints.save(path, small, coding=coding)
        return path.stat().st_size, decompress_floats(checkpoints.load(path)), seconds


def decompress_floats(small):
    return {name: np.asarray(leaf) for name, leaf in decompress(small).items()}


class Table:
    """Prints a row for each file of some parameters."""

    def __init__(self, title, model, params):
        self.model = model
        weights = [w for w in params.values() if w.ndim >= 2 and w.dtype.kind == "f"]
        self.size = sum(w.size for w in weights)
        self.kept_bytes = sum(w.nbytes for w in params.values()) - sum(w.nbytes for w in weights)
        title = f"{title}, {self.size:,} weights"
        print(f"\n{title:44}{'bytes':>12}{'bits':>7}{'error':>9}{'CPU s':>7}")

    def row(self, title, make, coding="lanes"):
        num_bytes, loaded, seconds = written(make, coding)
        bits, error = 8 * num_bytes / self.size, self.model.error(loaded)
        print(f"{title:44}{num_bytes:12,}{bits:7.3f}{error:9.5f}{seconds:7.0f}", flush=True)


def print_targets(table, params, measured, num_bytes):
    """Rows of files of one size."""
    equal = dataclasses.replace(measured, sensitivities={})
    methods = {
        "target_bytes, rates by sensitivity": measured,
        "target_bytes, equal rates": equal,
        "target_bytes, without data": None,
    }
    for title, given in methods.items():
        table.row(title, lambda c=given: compress(params, target_bytes=num_bytes, calibration=c))
    # Headers, scales and tables take about .01 bit.
    bits = 8 * (num_bytes - table.kept_bytes) / table.size - 0.01
    table.row("a uniform step a leaf, without data", lambda: uniform(params, bits))
    table.row(
        "dependent_codes, without data", lambda: dependent_codes(uniform(params, bits), params)
    )


def print_fixed(table, params, measured):
    for bits in (4, 3, 2):
        grid = Grid(bits, group_size=64, scale_dtype="float16")
        for title, given in (("without data", None), ("calibrated", measured)):
            make = functools.partial(compress, params, grid, calibration=given)
            table.row(f"{bits} bits, groups of 64, {title}", make, coding=None)


def print_choices(model, params, measured, rate):
    """Errors at one rate for some prices of a bit and dampings of the moments."""
    size = sum(w.size for w in params.values())
    rates = rate - 0.05, rate, rate + 0.05

    def error(**arguments):
        logs = []
        for wanted in rates:
            target = int(wanted * size / 8)
            make = functools.partial(compress, params, target_bytes=target, calibration=measured)
            num_bytes, loaded, _ = written(lambda make=make: make(**arguments))
            logs.append(np.log(model.error(loaded)) + np.log(4) * (8 * num_bytes / size - rate))
        return np.exp(np.mean(logs))

    for price in (0.2, 0.3, 0.4, 0.5, 0.6):
        print(f"bit_price {price:<6}{error(bit_price=price):9.5f}", flush=True)
    own = feedback._DAMPING
    for damping in (0.001, 0.003, 0.01, 0.03):
        feedback._DAMPING = damping
        print(f"damping {damping:<8}{error():9.5f}", flush=True)
    feedback._DAMPING = own


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parts = ("whole", "coded", "fixed", "choices")
    parser.add_argument("--parts", nargs="*", choices=parts, default=parts[:3])
    parser.add_argument("--rates", type=float, nargs="*", default=(2.45, 3.3, 4.4))
    parser.add_argument("--save", type=pathlib.Path, help="keeps the calibration, or takes it")
    args = parser.parse_args()
    model = Model(args.folder)
    if args.save and args.save.exists():
        measured = calibration.Calibration.from_tree(checkpoints.load(args.save))
    else:
        measured = model.measure()
        if args.save:
            checkpoints.save(args.save, measured.to_tree())
    if "whole" in args.parts:
        table = Table("whole model", model, model.params)
        print_targets(table, model.params, measured, WHOLE_BYTES)
    names = [n for n, w in model.params.items() if n.startswith("encoder") and w.ndim == 2]
    params = {name: model.params[name] for name in names}
    measured = dataclasses.replace(measured, moments={n: measured.moments[n] for n in names})
    if "coded" in args.parts:
        table = Table(f"{len(names)} matrices", model, params)
        for rate in args.rates:
            print_targets(table, params, measured, int(rate * table.size / 8))
    if "fixed" in args.parts:
        print_fixed(Table(f"{len(names)} matrices", model, params), params, measured)
    if "choices" in args.parts:
        print_choices(model, params, measured, args.rates[0])


if __name__ == "__main__":
    main()
