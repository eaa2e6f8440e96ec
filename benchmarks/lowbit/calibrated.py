"""What calibration buys, in files of MiniLM: error of the embeddings against bits a weight.

    pip install -e ".[examples]" tokenizers
    python benchmarks/lowbit/calibrated.py MODEL_FOLDER [--rates 4.4 3.3 2.45] [--prices]

MODEL_FOLDER is that of `examples/minilm.py`, whose network is measured: the whole model, then the
36 matrices of its encoder. "error" is 1 - the mean cosine of 300 sentences of Python's manual to
the embeddings of the original. Moments are from 512 other sentences of the manual, in batches
without padding. Every row is a file that is written and loaded again; bits are its bytes over its
weights, with header, scales and tables. The rate of a coded row is searched for. Seconds are CPU
time of rounding and writing the file once.
"""

import argparse
import dataclasses
import functools
import pathlib
import pydoc_data.topics
import re
import sys
import tempfile
import time

import jax.numpy as jnp
import numpy as np

from jaxclip import Grid, calibration, checkpoints, compress, decompress
from jaxclip.lowbit import dependent_codes
from jaxclip.lowbit.feedback import factor_moments
from jaxclip.lowbit.input_steps import equal_rate_step, quantize_by_inputs
from jaxclip.thresholds import rate_optimal

sys.path.append(str(pathlib.Path(__file__).parents[2] / "examples"))
import minilm

PRICES = (0.1, 0.2, 0.3, 0.4, 0.5)  # squared steps that a bit is worth
NUM_SENTENCES = 512
UNIFORM = "coded, a step a leaf, without data"
DEPENDENT = "  dependent_codes, without data"
BY_INPUTS = "  steps by input, rates by sensitivity"


# --- Rounding --------------------------------------------------------------------------


class Rounder:
    """The weights of a model with two or more axes, and what a calibration says of them."""

    def __init__(self, params, measured):
        names = [n for n, leaf in params.items() if leaf.ndim >= 2 and leaf.dtype.kind == "f"]
        self.weights = {name: np.asarray(params[name]) for name in names}
        self.rest = {name: leaf for name, leaf in params.items() if name not in names}
        moments = {name: m for name, m in measured.moments.items() if name in names}
        self.measured = dataclasses.replace(measured, moments=moments)
        self.factors = {
            name: factor_moments(moments[name], w.shape, name) if name in moments else None
            for name, w in self.weights.items()
        }
        # The step of each leaf that takes about 0 bits, if all leaves take the same.
        self.equal = {n: equal_rate_step(w, self.factors[n]) for n, w in self.weights.items()}

    def with_sensitivities(self, sensitivities):
        """Steps in proportion to the roots of sensitivities; the mean rate is that of `equal`."""
        found = {n: np.sqrt(max(float(sensitivities[n]), 1e-30)) for n in self.weights}
        sizes = np.array([w.size for w in self.weights.values()])
        logs = [np.log(self.equal[n] * found[n]) for n in self.weights]
        common = np.exp(np.average(logs, weights=sizes))
        return {n: common / found[n] for n in self.weights}

    def fixed(self, bits, is_calibrated):
        grid = Grid(bits, group_size=64, scale_dtype="float16")
        return compress(self.weights, grid, calibration=self.measured if is_calibrated else None)

    def uniform(self, rate):
        return compress(self.weights, Grid(8, axis=None), rule=rate_optimal(rate))

    def dependent(self, rate):
        return dependent_codes(self.uniform(rate), self.weights)

    def by_inputs(self, rate, steps, price=None):
        """Steps by input on the trellis, with feedback; `steps` of the leaves at a rate of 0."""
        options = {} if price is None else {"price": price}
        return {
            n: quantize_by_inputs(w, self.factors[n], steps[n] * 2.0**-rate, **options)
            for n, w in self.weights.items()
        }


def written(make, rest=None, coding="lanes"):
    """Writes what `make()` returns: the file's bytes, its arrays, CPU seconds."""
    start = time.process_time()
    small = make() | (rest or {})
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "small.safetensors")
        checkpoints.save(path, small, coding=coding)
        seconds = time.process_time() - start
        return path.stat().st_size, decompress(checkpoints.load(path)), seconds


def at_bytes(make, num_bytes, num_weights, rest=None, rounds=5):
    """The file of `make(rate)` whose bytes come within half a per cent of a number."""
    rate, found = 8 * num_bytes / num_weights, None
    for _ in range(rounds):
        found = written(lambda rate=rate: make(rate), rest)
        if abs(found[0] / num_bytes - 1) < 0.005:
            break
        rate += 8 * (num_bytes - found[0]) / num_weights
    return found


# --- MiniLM ----------------------------------------------------------------------------


def other_sentences(held_out):
    """Sentences of the manual that are not held out; the pattern is that of `minilm.sentences`."""
    text = " ".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    found = re.findall(r"[A-Z][a-z][^.*\"`|=_]{40,200}\.", re.sub(r"\s+", " ", text))
    rest = sorted(set(found) - set(held_out))
    return rest[:: max(len(rest) // NUM_SENTENCES, 1)][:NUM_SENTENCES]


def token_batches(encoder, texts):
    """Batches of token sequences of one length each, cut to a multiple of 4: no padding."""
    by_length = {}
    for coded in encoder.tokenizer.encode_batch(texts):
        tokens = np.array(coded.ids, np.int32)[np.array(coded.attention_mask) > 0]
        length = min(len(tokens), 48) // 4 * 4
        if length >= 12:
            by_length.setdefault(length, []).append(tokens[:length])
    for _, rows in sorted(by_length.items()):
        for i in range(0, len(rows), 64):
            yield np.stack(rows[i : i + 64])


class MiniLM:
    def __init__(self, folder):
        loaded = checkpoints.load(folder / "model.safetensors")
        self.params = {name: np.asarray(leaf) for name, leaf in loaded.items()}
        self.encoder, self.texts = minilm.Encoder(folder), minilm.sentences(300)
        self.reference = self.encoder(self.params, self.texts)
        self.batches = list(token_batches(self.encoder, other_sentences(self.texts)))

    def apply(self, params, tokens):
        return minilm.embed(params, tokens, jnp.ones(tokens.shape, bool), *self.encoder.sizes)

    def error(self, changed):
        found = self.encoder({**self.params, **changed}, self.texts)
        return 1 - (found * self.reference).sum(1).mean()


def timed(title, function):
    start = time.process_time()
    result = function()
    print(f"{title}: {time.process_time() - start:.0f} CPU s", flush=True)
    return result


def measured_by(apply, params, batches, some):
    """Moments on all batches; sensitivities on some, with every leaf rounded with its data."""
    found = timed("moments", lambda: calibration.measure(apply, params, batches, progress=False))
    rounder = Rounder(params, found)
    rounded = decompress(rounder.by_inputs(3, rounder.equal))

    def round_leaf(leaf, path):
        return jnp.asarray(rounded[path])

    return timed(
        "sensitivities",
        lambda: calibration.sensitivities(
            apply, params, some, found, round_leaf=round_leaf, progress=False
        ),
    )


def print_row(title, model, size, found):
    num_bytes, params, seconds = found
    bits, error = 8 * num_bytes / size, model.error(params)
    print(f"{title:44}{bits:7.3f}{error:9.5f}{seconds:7.1f}", flush=True)


def print_encoder(model, measured, rates, prices):
    params = {n: w for n, w in model.params.items() if n.startswith("encoder")}
    encoder = Rounder(params, measured)
    size = sum(w.size for w in encoder.weights.values())
    print(f"\n{f'{len(encoder.weights)} matrices, {size:,} weights':44}   bits    error  CPU s")
    for bits in (4, 3, 2):
        for title, has_data in (("without data", False), ("calibrated", True)):
            make = functools.partial(encoder.fixed, bits, has_data)
            found = written(make, coding=None)
            print_row(f"{bits} bits, groups of 64, {title}", model, size, found)
    weighted = encoder.with_sensitivities(measured.sensitivities)
    methods = {
        UNIFORM: encoder.uniform,
        DEPENDENT: encoder.dependent,
        "  steps by input, equal rates": lambda r: encoder.by_inputs(r, encoder.equal),
        BY_INPUTS: lambda r: encoder.by_inputs(r, weighted),
    }
    for rate in rates:
        for title, make in methods.items():
            print_row(title, model, size, at_bytes(make, rate * size / 8, size))
    for price in prices:
        make = functools.partial(encoder.by_inputs, steps=weighted, price=price)
        found = at_bytes(make, rates[-1] * size / 8, size)
        print_row(f"  rates by sensitivity, price {price}", model, size, found)


def print_whole(model, measured):
    whole = Rounder(model.params, measured)
    size = sum(w.size for w in whole.weights.values())
    weighted = whole.with_sensitivities(measured.sensitivities)
    print(f"\n{f'whole model in 6.5 MB, {size:,} weights':44}   bits    error  CPU s")
    methods = {
        UNIFORM: whole.uniform,
        DEPENDENT: whole.dependent,
        BY_INPUTS: lambda r: whole.by_inputs(r, weighted),
    }
    for title, make in methods.items():
        print_row(title, model, size, at_bytes(make, 6_480_000, size, whole.rest))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--rates", type=float, nargs="*", default=(4.4, 3.3, 2.45))
    parser.add_argument("--prices", action="store_true", help="several, at the last rate")
    args = parser.parse_args()
    model = MiniLM(args.folder)
    tokens = sum(batch.size for batch in model.batches)
    print(f"{tokens:,} tokens in {len(model.batches)} batches")
    measured = measured_by(model.apply, model.params, model.batches, model.batches[1:8:2])
    print_whole(model, measured)
    print_encoder(model, measured, args.rates, PRICES if args.prices else ())


if __name__ == "__main__":
    main()
