"""Files of other packages beside entropy-coded ones of the same error: which is smaller, and by how much?

    GGML_LIBRARY=libggml-base.so python benchmarks/sizes.py FOLDER --results sizes.json \
        [--model MODEL_FOLDER --words wordsim353.tsv]
    python benchmarks/sizes.py FOLDER --results sizes.json --picture docs/sizes.png

FOLDER holds what `real_weights.py` writes. For each of its files and each setting of each package
in `peers.py` (and ours of a fixed width) all matrices are made low-bit and written to one
safetensors file: its bytes, header, scales and zero points included, are "bits" a weight. "error"
is |W - Q|^2 / |W|^2 over all weights. Beside it stand our files of that very error, as
`checkpoints.save` writes them:

    Huffman, ans    `rate_optimal(error=...)`, a float16 step a channel
    cheaper         "ans", log8 steps, and weights near the middle between two codes go to the one
                    that is rarer by fewer bits: squared error in steps + 0.15 * bits is least

"saved" is that of "ans" and of "cheaper". With --model the embeddings of all-MiniLM-L6-v2 are
computed with the weights of each file: their mean cosine to the original's, and Spearman's
correlation with WordSim-353. --picture draws what --results holds and measures nothing.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from peers import is_installed, peers, versions
from rates import file_bits, relative_error
from safetensors.numpy import load_file, save_file

import jaxclip

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))

PRICE = 0.15
"""Squared steps that a bit is worth; 2 ln 2 / 12 = 0.116 where steps are small."""
FIXED = [(bits, group_size) for bits in ("ternary", 2, 3, 4, 5, 6, 8) for group_size in (None, 64)]
ERRORS = np.geomspace(0.2, 2e-5, 25)


# --- Ours -------------------------------------------------------------------------------------


@jax.jit
def cheaper_codes(leaf, codes, scale):
    """Codes one nearer to 0 where the bits that it saves are worth the error."""
    ratio = leaf / scale
    nearest = codes.astype(jnp.int32)
    smaller = nearest - jnp.sign(nearest)

    def again(_, chosen):
        counts = jnp.zeros(256).at[chosen + 128].add(1)
        bits = jnp.log2(chosen.size / jnp.maximum(counts, 0.5))
        saved = bits[nearest + 128] - bits[smaller + 128]
        lost = jnp.square(ratio - smaller) - jnp.square(ratio - nearest)
        return jnp.where(lost < PRICE * saved, smaller, nearest)

    return jax.lax.fori_loop(0, 3, again, nearest).astype(jnp.int8)


def quantized(leaf, error, scale_dtype, is_cheaper):
    rule = jaxclip.rate_optimal(error=error)
    q = jaxclip.quantize(leaf, 8, threshold=rule, axis=0, scale_dtype=scale_dtype)
    if not is_cheaper:
        return q
    scale = jnp.asarray(q.scale, jnp.float32)
    return dataclasses.replace(q, qvalue=cheaper_codes(leaf, q.qvalue, scale))


def of_error(leaves, error, scale_dtype="float16", is_cheaper=False):
    """Low-bit arrays whose error is the one given, within a thousandth if it can be reached."""
    goal = error
    for _ in range(6):
        tree = [quantized(x, goal, scale_dtype, is_cheaper) for x in leaves]
        reached = relative_error(leaves, tree)
        if abs(reached / error - 1) < 1e-3:
            break
        goal = min(goal * error / reached, 0.99)
    return tree, reached


def our_files(leaves, error):
    """Bits a weight by Huffman, ans and the cheaper codes, and what they were reached with."""
    tree, reached = of_error(leaves, error)
    bits = [file_bits(tree, coding) for coding in ("huffman", "ans")]
    cheaper, reached_cheaper = of_error(leaves, error, "log8", True)
    return [*bits, file_bits(cheaper, "ans")], (reached, reached_cheaper), (tree, cheaper)


# --- Theirs -----------------------------------------------------------------------------------


def their_file(setting, leaves):
    """Bits a weight and the weights that are read back."""
    made = [setting(x) for x in leaves]
    parts = {f"{i}.{k}": v for i, (p, _) in enumerate(made) for k, v in p.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "small.safetensors")
        save_file({k: np.ascontiguousarray(v) for k, v in parts.items()}, path)
        num_bytes = path.stat().st_size
    return 8 * num_bytes / sum(x.size for x in leaves), [d for _, d in made]


def our_fixed_file(setting, leaves):
    bits, group_size = setting
    grid = {"axis": 0, "group_size": group_size, "scale_dtype": "float16"}
    tree = [jaxclip.quantize(jnp.asarray(x), bits, **grid) for x in leaves]
    return file_bits(tree), [np.asarray(jaxclip.dequantize(q)) for q in tree]


def error_of(leaves, decoded):
    lost = sum(np.sum(np.square(x.astype(np.float64) - d)) for x, d in zip(leaves, decoded, strict=True))
    return lost / sum(np.sum(np.square(x, dtype=np.float64)) for x in leaves)


def all_settings():
    for setting in peers():
        yield setting.name, setting.package, setting.fits, functools.partial(their_file, setting)
    for bits, group_size in FIXED:
        width = f"{bits} bits" if bits != "ternary" else bits
        name = f"jaxclip, {width}, {f'group {group_size}' if group_size else 'channel'}"
        yield name, "jaxclip", lambda x: True, functools.partial(our_fixed_file, (bits, group_size))


# --- What a network makes of it ---------------------------------------------------------------


def judge(folder, words, names):
    """A function: weights of the encoder -> mean cosine, Spearman's correlation."""
    import minilm

    original = {k: jnp.asarray(v) for k, v in load_file(folder / "model.safetensors").items()}
    encoder, texts = minilm.Encoder(folder), minilm.sentences(300)
    reference = encoder(original, texts)
    pairs, scores = minilm.read_pairs(words)

    def judged(decoded):
        params = {**original, **dict(zip(names, map(jnp.asarray, decoded), strict=True))}
        cosine = (encoder(params, texts) * reference).sum(1).mean()
        first, second = (encoder(params, [pair[i] for pair in pairs]) for i in (0, 1))
        return float(cosine), float(minilm.spearman((first * second).sum(1), scores))

    return judged


def measure(name, path, judged):
    leaves = list(load_file(path).values())
    arrays = [jnp.asarray(x) for x in leaves]
    print(f"\n{name}: {len(leaves)} matrices, {sum(x.size for x in leaves) / 1e6:.1f} M weights")
    titles = "".join(f"{t:>8}" for t in ("Huffman", "ans", "cheaper", "saved", "saved"))
    print(f"{'':<40} {'error':>9}{'bits':>8}{titles}{'cosine':>8}{'words':>7}")
    rows = []
    for setting, package, fits, make in all_settings():
        if not all(map(fits, leaves)):
            print(f"{setting:<40} does not fit the shapes")
            continue
        bits, decoded = make(leaves)
        row = {"weights": name, "setting": setting, "package": package, "bits": bits}
        row["error"] = error_of(leaves, decoded)
        if row["error"] > 0.5:
            print(f"{setting:<40} {row['error']:>9.5f}{bits:>8.3f}  nothing is left of the weights")
            continue
        row["ours"], row["reached"], _ = our_files(arrays, row["error"])
        saved = "".join(f"{1 - ours / bits:>8.1%}" for ours in row["ours"][1:])
        numbers = "".join(f"{ours:>8.3f}" for ours in row["ours"])
        line = f"{setting:<40} {row['error']:>9.5f}{bits:>8.3f}{numbers}{saved}"
        if max(row["reached"]) > 1.01 * row["error"]:
            line += "  error not reached: " + ", ".join(f"{e:.5f}" for e in row["reached"])
        if judged:
            row["cosine"], row["words"] = judged(decoded)
            line += f"{row['cosine']:>8.4f}{row['words']:>7.3f}"
        print(line, flush=True)
        rows.append(row)
    return rows


def measure_ours(name, path, judged):
    """Ours over the whole range, for the picture and the cosine at the bits of others."""
    leaves = [jnp.asarray(x) for x in load_file(path).values()]
    rows = []
    print(f"\n{name}, ours: error, bits of ans and of cheaper codes, and cosine, words of each")
    for error in ERRORS:
        bits, reached, trees = our_files(leaves, float(error))
        for kind, size, e, tree in zip(("ans", "cheaper"), bits[1:], reached, trees, strict=True):
            row = {"weights": name, "setting": kind, "package": "jaxclip coded"}
            row |= {"bits": size, "error": e}
            if judged and size < 5:
                row["cosine"], row["words"] = judged([jaxclip.dequantize(q) for q in tree])
            rows.append(row)
        last = rows[-2:]
        shown = "".join(f"{r['cosine']:>8.4f}{r['words']:>7.3f}" for r in last if "cosine" in r)
        print(f"{error:>9.5f}{bits[1]:>8.3f}{bits[2]:>8.3f}{shown}", flush=True)
    return rows


def print_best(rows):
    """The package that comes nearest to ours, for each width of codes."""
    print("\nweights   about     nearest of llama.cpp's types         saved           nearest of all others                saved")
    for name in dict.fromkeys(r["weights"] for r in rows):
        for low, high in ((1.5, 2.3), (2.3, 3), (3, 3.6), (4, 4.6), (5, 5.6), (6, 6.6), (8, 8.6)):
            line = f"{name:<9} {low}-{high:<5}"
            for is_gguf in (True, False):
                near = [
                    r
                    for r in rows
                    if r["weights"] == name
                    and "ours" in r
                    and low <= r["bits"] < high
                    and r["package"] != "jaxclip"
                    and (r["package"] == "gguf") == is_gguf
                ]
                if near:
                    r = min(near, key=lambda r: 1 - r["ours"][2] / r["bits"])
                    saved = " ".join(f"{1 - x / r['bits']:>6.1%}" for x in r["ours"][1:])
                    line += f" {r['setting']:<38} {saved}"
                else:
                    line += f" {'-':<38} {'':>6} {'':>6}"
            print(line)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--results", type=pathlib.Path, required=True)
    parser.add_argument("--model", type=pathlib.Path)
    parser.add_argument("--words", type=pathlib.Path)
    parser.add_argument("--picture", type=pathlib.Path)
    arguments = parser.parse_args()
    if arguments.picture:
        import sizes_picture

        sizes_picture.draw(json.loads(arguments.results.read_text()), arguments.picture)
        return
    found, missing = versions()
    print(f"jax {jax.__version__}, {', '.join(found)}")
    if missing:
        print(f"not installed, hence without rows: {', '.join(missing)}")
    rows = []
    for path in sorted(arguments.folder.glob("*.safetensors")):
        judged = None
        if arguments.model and path.stem == "minilm":
            judged = judge(arguments.model, arguments.words, list(load_file(path)))
        rows += measure(path.stem, path, judged) + measure_ours(path.stem, path, judged)
        arguments.results.write_text(json.dumps(rows, indent=1))
    print_best(rows)


if __name__ == "__main__":
    main()
