"""A real network at low bits: sentence embeddings of all-MiniLM-L6-v2, in plain JAX.

    pip install -e ".[examples]" tokenizers
    python examples/minilm.py MODEL_FOLDER [--words wordsim353.tsv]

MODEL_FOLDER holds `model.safetensors`, `config.json` and `tokenizer.json` of a BERT encoder, as the
Hugging Face hub has them. The file is compressed by the command line at several settings; each
result is loaded again, and 300 sentences of Python's manual are embedded with it. Printed are the
bytes of the file, the squared error of the weights, the mean cosine to the embeddings of the
original, and with --words (two words and a score a line) Spearman's correlation of the words'
cosines with the scores of people.
"""

import argparse
import contextlib
import functools
import io
import json
import pathlib
import re
import tempfile
from pydoc_data.topics import topics as TOPICS

import jax
import jax.numpy as jnp
import numpy as np

from jaxclip import checkpoints, cli, decompress
from jaxclip.lowbit.arrays import QuantizedArray

SETTINGS = {
    "8 bits": "--bits 8",
    "4 bits, groups of 64": "--bits 4 --group-size 64 --scale-dtype float16",
    "3 bits, groups of 64": "--bits 3 --group-size 64 --scale-dtype float16",
    "2 bits, groups of 32": "--bits 2 --group-size 32 --scale-dtype log8",
    "ternary, groups of 64": "--bits ternary --group-size 64 --scale-dtype float16",
    "coded, 4 bits": "--rate 4 --scale-dtype float16",
    "coded, 3 bits": "--rate 3 --scale-dtype float16",
    "coded, 2.5 bits": "--rate 2.5 --scale-dtype float16",
    "coded, 2 bits": "--rate 2 --scale-dtype float16",
}
LENGTH, BATCH = 64, 64


# --- The network ------------------------------------------------------------------------------


def linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def layer_norm(p, name, x):
    centred = x - x.mean(-1, keepdims=True)
    unit = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-12)
    return unit * p[f"{name}.weight"] + p[f"{name}.bias"]


def attention(p, name, x, mask, num_heads):
    def heads(part):
        return linear(p, f"{name}.self.{part}", x).reshape(*x.shape[:2], num_heads, -1)

    q, k, v = heads("query"), heads("key"), heads("value")
    mixed = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :])
    out = linear(p, f"{name}.output.dense", mixed.reshape(x.shape))
    return layer_norm(p, f"{name}.output.LayerNorm", x + out)


@functools.partial(jax.jit, static_argnums=(3, 4))
def embed(p, tokens, mask, num_layers, num_heads):
    """Unit vectors, the means of the last layer over the tokens of each text."""
    x = p["embeddings.word_embeddings.weight"][tokens]
    x += p["embeddings.position_embeddings.weight"][: tokens.shape[1]]
    x += p["embeddings.token_type_embeddings.weight"][0]
    x = layer_norm(p, "embeddings.LayerNorm", x)
    for i in range(num_layers):
        name = f"encoder.layer.{i}"
        x = attention(p, f"{name}.attention", x, mask, num_heads)
        hidden = jax.nn.gelu(linear(p, f"{name}.intermediate.dense", x), approximate=False)
        x = layer_norm(p, f"{name}.output.LayerNorm", x + linear(p, f"{name}.output.dense", hidden))
    mean = (x * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


# --- Texts ------------------------------------------------------------------------------------


def sentences(count, held_out=()):
    """Returns sentences of Python's manual, which comes with Python, without those held out."""
    found = _sentences_in(" ".join(topic for _, topic in sorted(TOPICS.items())))
    found = sorted(found - set(held_out))
    return found[:: max(len(found) // count, 1)][:count]


def library_sentences(held_out):
    """Returns sentences in the sources of Python's library, without those held out."""
    folder, found = pathlib.Path(json.__file__).parents[1], set()
    for path in [*folder.glob("*.py"), *folder.glob("*/*.py")]:
        # The manual is in pydoc_data.
        if not {"site-packages", "test", "pydoc_data"} & set(path.parts):
            found |= _sentences_in(path.read_text(errors="ignore").replace("#", " "))
    return sorted(found - set(held_out))


def _sentences_in(text):
    return set(re.findall(r"[A-Z][a-z][^.*\"`|=_]{40,200}\.", re.sub(r"\s+", " ", text)))


def token_batches(encoder, texts):
    """Yields batches of token sequences of one length each, cut to a multiple of 4: no padding."""
    by_length = {}
    for coded in encoder.tokenizer.encode_batch(texts):
        tokens = np.array(coded.ids, np.int32)[np.array(coded.attention_mask) > 0]
        length = min(len(tokens), 48) // 4 * 4
        if length >= 12:
            by_length.setdefault(length, []).append(tokens[:length])
    for _, rows in sorted(by_length.items()):
        for i in range(0, len(rows), BATCH):
            yield np.stack(rows[i : i + BATCH])


class Encoder:
    def __init__(self, folder):
        import tokenizers

        config = json.loads((folder / "config.json").read_text())
        self.sizes = config["num_hidden_layers"], config["num_attention_heads"]
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(LENGTH)
        self.tokenizer.enable_padding(length=LENGTH)

    def __call__(self, params, texts):
        coded = self.tokenizer.encode_batch(texts + [""] * (-len(texts) % BATCH))
        tokens = np.array([c.ids for c in coded], np.int32)
        mask = np.array([c.attention_mask for c in coded]) > 0
        parts = [
            np.asarray(embed(params, tokens[i : i + BATCH], mask[i : i + BATCH], *self.sizes))
            for i in range(0, len(coded), BATCH)
        ]
        return np.concatenate(parts)[: len(texts)]


def energy(array):
    return np.sum(np.square(array, dtype=np.float64))


def spearman(a, b):
    """The correlation of ranks; ties share their mean rank."""

    def ranks(values):
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(count) - (count - 1) / 2)[place]

    return np.corrcoef(ranks(a), ranks(b))[0, 1]


def read_pairs(path):
    rows = [line.split("\t") for line in path.read_text().splitlines() if line[:1] not in "#"]
    rows = [row for row in rows if len(row) >= 3 and re.fullmatch(r"[\d.]+", row[2])]
    return [row[:2] for row in rows], np.array([float(row[2]) for row in rows])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--words", type=pathlib.Path)
    arguments = parser.parse_args()
    source = arguments.folder / "model.safetensors"
    original = checkpoints.load(source)
    encoder, texts = Encoder(arguments.folder), sentences(300)
    reference = encoder(original, texts)
    pairs, scores = read_pairs(arguments.words) if arguments.words else ([], None)

    def correlation(params):
        if scores is None:
            return "-"
        first, second = (encoder(params, [pair[i] for pair in pairs]) for i in (0, 1))
        return f"{spearman((first * second).sum(1), scores):.3f}"

    print(f"{'setting':<24} {'bytes':>12} {'smaller':>8} {'error':>9} {'cosine':>7} {'words':>6}")
    size = source.stat().st_size
    print(f"{'float32':<24} {size:>12,} {1:>7.1f}x {0:>9} {1:>7.4f} {correlation(original):>6}")
    with tempfile.TemporaryDirectory() as folder:
        for name, options in SETTINGS.items():
            target = pathlib.Path(folder, "small.safetensors")
            with contextlib.redirect_stdout(io.StringIO()):
                status = cli.main(
                    ["compress", str(source), str(target), *options.split(), "--force"]
                )
            assert status == 0
            small = checkpoints.load(target)
            params = decompress(small)
            low_bit = [n for n, leaf in small.items() if isinstance(leaf, QuantizedArray)]
            lost = sum(energy(params[n] - original[n]) for n in low_bit)
            total = sum(energy(original[n]) for n in low_bit)
            cosine = (encoder(params, texts) * reference).sum(1).mean()
            num_bytes = target.stat().st_size
            print(
                f"{name:<24} {num_bytes:>12,} {size / num_bytes:>7.1f}x {lost / total:>9.5f} "
                f"{cosine:>7.4f} {correlation(params):>6}",
                flush=True,
            )


if __name__ == "__main__":
    main()
