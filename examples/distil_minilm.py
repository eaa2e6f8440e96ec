"""A trained network in 6.5 MB: MiniLM is rounded by its inputs, then tuned to its own outputs.

    pip install -e ".[examples]" tokenizers
    python examples/distil_minilm.py MODEL_FOLDER [--words wordsim353.tsv] [--save FILE]

MODEL_FOLDER is that of `minilm.py`. No labels are needed, only texts: those of Python's manual and
of its library, which come with Python. First the moments of all inputs are measured, and the
weights are rounded to a file of the given bytes. Then the codes are fixed, and the scales, biases
and norms are trained for a few minutes to give the embeddings of the float32 model.

Printed is 1 - the mean cosine to the embeddings of float32: on 300 held-out sentences of the
manual, and with --texts on the lines of a file. With --words (two words and a score a line) it is
followed by Spearman's correlation of the words' cosines with the scores of people.
"""

import argparse
import dataclasses
import pathlib
import tempfile

import jax.numpy as jnp
import minilm
import numpy as np
import optax

import jaxclip
from jaxclip import calibration, checkpoints, lowbit

NUM_SENTENCES, LENGTH, BATCH = 512, 32, 32


def measure(encoder, params, texts):
    """Returns moments of the texts, and sensitivities from four of their batches."""

    def apply(params, tokens):
        return minilm.embed(params, tokens, jnp.ones(tokens.shape, bool), *encoder.sizes)

    batches = list(minilm.token_batches(encoder, texts))
    found = calibration.measure(apply, params, batches)
    return calibration.sensitivities(apply, params, batches[1:8:2], found)


def rounded(params, num_bytes, measured):
    """Returns the low-bit tree of a file of so many bytes, with scales that can be trained."""
    # Scales of log8 are too coarse to train. In float16 each takes one byte more.
    more = sum(w.shape[1] for n, w in params.items() if n.startswith("encoder") and w.ndim == 2)
    small = jaxclip.compress(params, target_bytes=num_bytes - more, calibration=measured)

    def with_fine_scales(name, leaf):
        if not name.startswith("encoder") or not isinstance(leaf, jaxclip.QuantizedArray):
            return leaf
        grid = dataclasses.replace(leaf.grid, scale_dtype="float16")
        return dataclasses.replace(leaf, grid=grid, scale=leaf.scale.astype(jnp.float16))

    return {name: with_fine_scales(name, leaf) for name, leaf in small.items()}


def batches_of(encoder, params, small, texts, num_steps):
    """Yields the low-bit tree, tokens, mask, and the embeddings of the float32 model."""
    encoder.tokenizer.enable_truncation(LENGTH)
    encoder.tokenizer.enable_padding(length=LENGTH)
    rng = np.random.default_rng(0)
    for _ in range(num_steps):
        chosen = [str(text) for text in rng.choice(texts, BATCH)]
        # Single words, too, which people search for.
        chosen[::4] = [str(rng.choice(text.split())) for text in chosen[::4]]
        coded = encoder.tokenizer.encode_batch(chosen)
        tokens = np.array([c.ids for c in coded], np.int32)
        mask = np.array([c.attention_mask for c in coded]) > 0
        wanted = minilm.embed(params, tokens, mask, *encoder.sizes)
        # The codes are in the batch: constants of that size would be slow to compile.
        yield small, tokens, mask, wanted


def tuned(encoder, params, small, texts, num_steps, step_size):
    """Returns the low-bit tree with trained scales, biases and norms, and the same codes."""
    parts, rebuild = lowbit.trainable_parts(small)

    def loss_fn(parts, batch):
        small, tokens, mask, wanted = batch
        _, rebuild = lowbit.trainable_parts(small)
        found = minilm.embed(jaxclip.decompress(rebuild(parts)), tokens, mask, *encoder.sizes)
        return 1 - (found * wanted).sum(-1).mean()

    tx = optax.adam(optax.cosine_decay_schedule(step_size, num_steps))
    result = jaxclip.fit(
        jaxclip.make_train_step(loss_fn, tx),
        jaxclip.TrainState.create(parts, tx),
        batches_of(encoder, params, small, texts, num_steps),
        stop=jaxclip.max_steps(num_steps),
    )
    return rebuild(result.state.params)


class Comparison:
    """Embeddings beside those of the original, and words beside the scores of people."""

    def __init__(self, folder, params, held_out, options):
        self.encoder, self.texts = minilm.Encoder(folder), {"held out": held_out}
        if options.texts:
            self.texts[options.texts.stem] = options.texts.read_text().splitlines()
        self.wanted = {name: self.encoder(params, texts) for name, texts in self.texts.items()}
        self.pairs, self.scores = minilm.read_pairs(options.words) if options.words else ([], None)
        titles = [*self.texts, "words"] if self.pairs else self.texts
        print(f"{'':<24}{'bytes':>12}" + "".join(f"{title:>12}" for title in titles))

    def print_row(self, title, num_bytes, params):
        """Prints the bytes of a file, its errors, and the correlation."""
        cells = [
            f"{1 - (self.encoder(params, texts) * self.wanted[name]).sum(1).mean():12.5f}"
            for name, texts in self.texts.items()
        ]
        if self.pairs:
            first, second = (self.encoder(params, [p[i] for p in self.pairs]) for i in (0, 1))
            cells.append(f"{minilm.spearman((first * second).sum(1), self.scores):12.4f}")
        print(f"{title:<24}{num_bytes:>12,}" + "".join(cells), flush=True)

    def print_file(self, title, small, path):
        """Writes a file and prints the row of what it gives back."""
        checkpoints.save(path, small, coding="lanes", overwrite=True)
        loaded = jaxclip.decompress(checkpoints.load(path))
        self.print_row(title, path.stat().st_size, loaded)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--bytes", type=int, default=6_500_000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--step-size", type=float, default=1e-3)
    parser.add_argument("--words", type=pathlib.Path)
    parser.add_argument("--texts", type=pathlib.Path, help="more held-out texts, one a line")
    parser.add_argument("--calibration", type=pathlib.Path, help="is kept there, or taken")
    parser.add_argument("--save", type=pathlib.Path, help="where to keep the tuned file")
    options = parser.parse_args()
    source = options.folder / "model.safetensors"
    params = {name: np.asarray(leaf) for name, leaf in checkpoints.load(source).items()}
    encoder, held_out = minilm.Encoder(options.folder), minilm.sentences(300)
    manual = minilm.sentences(NUM_SENTENCES, held_out)
    comparison = Comparison(options.folder, params, held_out, options)
    comparison.print_row("float32", source.stat().st_size, params)
    if options.calibration and options.calibration.exists():
        measured = calibration.Calibration.from_tree(checkpoints.load(options.calibration))
    else:
        measured = measure(encoder, params, manual)
        if options.calibration:
            checkpoints.save(options.calibration, measured.to_tree())
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "small.safetensors")
        small = rounded(params, options.bytes, measured)
        comparison.print_file("rounded by its inputs", small, path)
        # Six times the manual's, because the library has thirty times as many sentences.
        texts = minilm.library_sentences(held_out) + 6 * manual
        small = tuned(encoder, params, small, texts, options.steps, options.step_size)
        comparison.print_file("and tuned", small, options.save or path)


if __name__ == "__main__":
    main()
