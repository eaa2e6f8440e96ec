"""Files of other packages beside entropy-coded ones of the same error: how much smaller are these?

    GGML_LIBRARY=libggml-base.so python benchmarks/lowbit/sizes.py FILE.safetensors ... \\
        --results sizes.json [--model MODEL_FOLDER --words wordsim353.tsv]
    python benchmarks/lowbit/sizes.py --results sizes.json --picture docs/sizes.png

The files are those of `real_weights.py`. For each of them and each setting of each package in
`peers.py` (and ours of a fixed width) all matrices are made low-bit and written to one safetensors
file: its bytes, header, scales and zero points included, are "bits" a weight. "error" is
|W - Q|^2 / |W|^2 over all weights. Beside it stand our files of that very error, as
`checkpoints.save` writes them:

    Huffman, ans    `rate_optimal(error=...)`, a float16 step a channel
    chosen          log8 steps, a step a channel or one a matrix, whichever is smaller; weights
                    near the middle between two codes go to the one nearer to 0 where the bits
                    saved are worth the error; the smaller of Huffman and ans

"saved" is that of the smaller of the first two, and of "chosen". With --model the embeddings of
all-MiniLM-L6-v2 are computed with the weights of each file: their mean cosine to the original's,
and Spearman's correlation with WordSim-353. --picture draws what --results holds.
What --results holds already is not measured again.
"""

import argparse
import functools
import json
import pathlib
import re
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import sizes_picture
from rates import file_bits, relative_error
from safetensors.numpy import load_file, save_file

import jaxclip
from jaxclip.thresholds.by_rate import code_entropy
from peers import PACKAGES as THEIRS
from peers import peers, versions

sys.path.append(str(pathlib.Path(__file__).parents[2] / "examples"))

FIXED = [(bits, group_size) for bits in ("ternary", 2, 3, 4) for group_size in (None, 64)]
ERRORS = np.geomspace(0.2, 0.003, 7)


# --- Ours -------------------------------------------------------------------------------------


def of_error(leaves, error):
    """Low-bit arrays by `rate_optimal`, and the error that is reached."""
    rule = jaxclip.thresholds.rate_optimal(error=error)
    grid = jaxclip.Grid(8, axis=0, scale_dtype="float16")
    tree = [jaxclip.quantize(x, grid, threshold=rule) for x in leaves]
    return tree, relative_error(leaves, tree)


@jax.jit
def chosen_leaf(leaf, error, goal):
    """The smaller of a step a channel and a step a matrix, and the goal that gave the error."""
    best = None
    for axis in (0, None):
        for _ in range(4):  # fewer bits, more error: the goal is moved until the error is met
            grid = jaxclip.Grid(8, axis=axis, scale_dtype="log8")
            rule = jaxclip.thresholds.rate_optimal(error=goal)
            q = jaxclip.quantize(leaf, grid, threshold=rule)
            q = jaxclip.lowbit.cheaper_codes(q, leaf)
            reached = relative_error([leaf], [q])
            if abs(reached / error - 1) < 1e-3:
                break
            goal = min(goal * error / reached, 0.99)
        bits = float(code_entropy(q.qvalue)) * leaf.size + 8 * q.scale.size
        found = (max(reached / error, 1.01), bits, axis is None)
        if best is None or found < best[0]:
            best = found, q
    return best[1], goal


def chosen(leaves, error):
    tree, goal = [], error
    for x in leaves:
        q, goal = chosen_leaf(x, error, goal)
        tree.append(q)
    return tree, relative_error(leaves, tree)


def our_files(leaves, error):
    """Bits a weight of the three files, the errors reached, and the trees of the last two."""
    tree, reached = of_error(leaves, error)
    smaller, reached_by_smaller = chosen(leaves, error)
    bits = [file_bits(t, coding) for t in (tree, smaller) for coding in ("huffman", "ans")]
    bits = [*bits[:2], min(bits[2:])]
    return bits, (reached, reached_by_smaller), (tree, smaller)


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
    grid = jaxclip.Grid(bits, axis=0, group_size=group_size, scale_dtype="float16")
    tree = [jaxclip.quantize(jnp.asarray(x), grid) for x in leaves]
    return file_bits(tree), [np.asarray(jaxclip.dequantize(q)) for q in tree]


def error_of(leaves, decoded):
    lost = sum(
        np.sum(np.square(x.astype(np.float64) - d)) for x, d in zip(leaves, decoded, strict=True)
    )
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
    short = minilm.Encoder(folder)  # words are short: less padding, the same embeddings
    short.tokenizer.enable_truncation(16)
    short.tokenizer.enable_padding(length=16)
    pairs, scores = minilm.read_pairs(words)

    def judged(decoded):
        params = {**original, **dict(zip(names, map(jnp.asarray, decoded), strict=True))}
        cosine = (encoder(params, texts) * reference).sum(1).mean()
        first, second = (short(params, [pair[i] for pair in pairs]) for i in (0, 1))
        return float(cosine), float(minilm.spearman((first * second).sum(1), scores))

    return judged


def savings(row):
    """Shares of the bytes that ours save, plain and chosen; None where the error is not reached."""
    sizes = min(row["ours"][:2]), row["ours"][2]
    is_reached = [e < 1.01 * row["error"] for e in row["reached"]]
    pairs = zip(sizes, is_reached, strict=True)
    return [1 - size / row["bits"] if is_met else None for size, is_met in pairs]


def measure(name, leaves, judged, is_wanted):
    """A row for each setting: its file, and ours of the same error."""
    arrays = [jnp.asarray(x) for x in leaves]
    for setting, package, fits, make in all_settings():
        if not is_wanted(setting):
            continue
        if not all(map(fits, leaves)):
            print(f"{setting} does not fit the shapes")
            continue
        bits, decoded = make(leaves)
        row = {"weights": name, "setting": setting, "package": package, "bits": bits}
        row["error"] = error_of(leaves, decoded)
        if row["error"] < 0.4:  # else too little is left
            row["ours"], row["reached"], _ = our_files(arrays, row["error"])
            if judged and bits < 4.7 and row["error"] < 0.15:
                row["cosine"], row["words"] = judged(decoded)
            yield row


def measure_ours(name, leaves, judged, is_wanted):
    """Two rows for each of some errors: plain and chosen."""
    arrays = [jnp.asarray(x) for x in leaves]
    for error in ERRORS if is_wanted("plain") else ():
        bits, reached, trees = our_files(arrays, float(error))
        sizes = min(bits[:2]), bits[2]
        for kind, size, e, tree in zip(("plain", "chosen"), sizes, reached, trees, strict=True):
            row = {"weights": name, "setting": kind, "package": "jaxclip coded"}
            row |= {"bits": size, "error": e}
            if judged:
                row["cosine"], row["words"] = judged([jaxclip.dequantize(q) for q in tree])
            yield row


TITLES = "".join(f"{t:>8}" for t in ("bits", "Huffman", "ans", "chosen", "saved", "saved"))


def line(row):
    judged = f"{row['cosine']:>8.4f}{row['words']:>7.3f}" if "cosine" in row else ""
    setting = f"ours, {row['setting']}" if "ours" not in row else row["setting"]
    start = f"{setting:<40}{row['error']:>9.6f}{row['bits']:>8.3f}"
    if "ours" not in row:
        return f"{start}{'':>40}{judged}"
    saved = "".join(f"{s:>8.1%}" if s else f"{'-':>8}" for s in savings(row))
    return start + "".join(f"{bits:>8.3f}" for bits in row["ours"]) + saved + judged


WIDTHS = ((1.5, 2.3), (2.3, 3), (3, 3.6), (4, 4.6), (5, 5.6), (6, 6.6), (8, 8.6))
"""Bits a weight of files that are compared with each other."""


def print_best(rows):
    """The setting that comes nearest to ours, for each range of widths."""
    titles = f"{'plain':>7} {'chosen':>7}"
    print(f"\n{'':<17}{'llama.cpp':<12}{titles}   {'all others':<40}{titles}")
    for name in dict.fromkeys(r["weights"] for r in rows):
        met = [r for r in rows if r["weights"] == name and "ours" in r and savings(r)[0]]
        for low, high in WIDTHS:
            text = f"{name:<7}{low:>3} to {high:>3}"
            for packages, width in (({"gguf"}, 12), (set(THEIRS) - {"gguf"}, 40)):
                near = [r for r in met if low <= r["bits"] < high and r["package"] in packages]
                best = min(near, key=lambda r: savings(r)[0], default=None)
                shown = best["setting"].removeprefix("ggml, ") if best else "-"
                saved = [f"{s:.1%}" if s else "-" for s in savings(best)] if best else ("", "")
                text += f"   {shown:<{width}}{saved[0]:>7} {saved[1]:>7}"
            print(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=pathlib.Path, nargs="*")
    parser.add_argument("--results", type=pathlib.Path, required=True)
    parser.add_argument("--every", type=int, default=1, help="take every so manieth row only")
    parser.add_argument("--only", default="", help="regular expression of settings to measure")
    parser.add_argument("--model", type=pathlib.Path, help="for the file minilm.safetensors")
    parser.add_argument("--words", type=pathlib.Path)
    parser.add_argument("--picture", type=pathlib.Path)
    arguments = parser.parse_args()
    if arguments.files:
        found, missing = versions()
        print(f"jax {jax.__version__}, {', '.join(found)}")
        if missing:
            print(f"not installed, hence without rows: {', '.join(missing)}")
    results = arguments.results
    rows = json.loads(results.read_text()) if results.exists() else []
    for name in dict.fromkeys(r["weights"] for r in rows):
        print(f"\n{name}, measured before\n{'':<40}{'error':>9}{TITLES}  cosine  words")
        print("\n".join(line(r) for r in rows if r["weights"] == name))
    for path in arguments.files:
        name, leaves = path.stem, load_file(path)
        judged = None
        if arguments.model and name == "minilm":
            judged = judge(arguments.model, arguments.words, list(leaves))
        leaves = [np.ascontiguousarray(x[:: arguments.every]) for x in leaves.values()]
        size = sum(x.size for x in leaves) / 1e6
        print(f"\n{name}: {len(leaves)} matrices, {size:.1f} M weights")
        print(f"{'':<40}{'error':>9}{TITLES}  cosine  words")
        done = {r["setting"] for r in rows if r["weights"] == name}

        def is_wanted(setting, done=done):
            return setting not in done and re.search(arguments.only, setting)

        for measured in (measure, measure_ours):
            for row in measured(name, leaves, judged, is_wanted):
                print(line(row), flush=True)
                rows.append(row)
                results.write_text(json.dumps(rows, indent=1))
    print_best(rows)
    if arguments.picture:
        sizes_picture.draw(rows, arguments.picture)


if __name__ == "__main__":
    main()
