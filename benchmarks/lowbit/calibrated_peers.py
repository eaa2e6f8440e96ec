"""Files of MiniLM by other packages, from the same weights and calibration: error against bytes.

    pip install -e ".[examples,plots]" tokenizers
    python benchmarks/lowbit/calibrated_peers.py MODEL_FOLDER --save measured.safetensors \
        --results calibrated_peers.jsonl [--peer nncodec=PYTHON ...] [--ours] [--picture FILE]

Each peer is a script in `peer_rows/`, whose first lines say what to install. It runs in the Python
that is given for it, best in a virtual environment of its own. All see the weights and, where they
take data, the second moments of `calibrated.py`; that script's held-out sentences give "error",
1 - the mean cosine. Bytes are those of a real file. NNCodec's file is its bit stream; others hold
dense codes, float16 scales and zero points of the codes' width, the least that their own formats
need. The encoder's 36 matrices are one part, the whole model is the other. Seconds are CPU time.
Without --peer and --ours the table and the picture are made from the results.
"""

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import calibrated
import matplotlib.figure
import numpy as np

from jaxclip import calibration, checkpoints, compress

SIZES = {
    "encoder": [int(rate * 10_616_832 / 8) for rate in (2.07, 2.45, 3.3, 4.5)],
    "whole": [calibrated.WHOLE_BYTES],
}
OURS = "jaxclip"


# --- Rows ------------------------------------------------------------------------------


class Parts:
    """The weights of each part, and the rows that are measured of them."""

    def __init__(self, folder, calibration_file):
        self.model = calibrated.Model(folder)
        names = [n for n, w in self.model.params.items() if n.startswith("encoder") and w.ndim == 2]
        floats = {n: w for n, w in self.model.params.items() if w.dtype.kind == "f"}
        self.weights = {"encoder": {n: floats[n] for n in names}, "whole": floats}
        loaded = checkpoints.load(calibration_file)
        measured = calibration.Calibration.from_tree(loaded)
        some = {name: measured.moments[name] for name in names}
        encoder = dataclasses.replace(measured, moments=some)
        self.calibrations = {"encoder": encoder, "whole": measured}

    def bits(self, part, num_bytes):
        size = sum(w.size for w in self.weights[part].values() if w.ndim >= 2)
        return 8 * num_bytes / size

    def complete(self, row, decoded):
        """The row with bits a weight and error of what was decoded."""
        error = float(self.model.error(decoded))
        row |= {"bits": self.bits(row["part"], row["bytes"]), "error": error}
        print_row(row)
        return row


def our_rows(parts):
    for part, sizes in SIZES.items():
        params, measured = parts.weights[part], parts.calibrations[part]
        for size in sizes:

            def make(params=params, size=size, measured=measured):
                return compress(params, target_bytes=size, calibration=measured)

            num_bytes, decoded, seconds = calibrated.written(make)
            row = {"part": part, "peer": OURS, "setting": "target_bytes", "bytes": num_bytes}
            yield parts.complete(row | {"seconds": seconds}, decoded)


def peer_rows(parts, peer, python):
    """Runs the script of a peer, which waits after each row until its arrays are measured."""
    script = pathlib.Path(__file__).parent / "peer_rows" / f"with_{peer}.py"
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_inputs(parts, folder)
        command = [python, str(script), name]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, **pipes) as process:
            for line in process.stdout:
                decoded = checkpoints.load(folder / "decoded.safetensors")
                decoded = {n: np.asarray(w) for n, w in decoded.items()}
                yield parts.complete(json.loads(line), decoded)
                print(file=process.stdin, flush=True)
        if process.returncode:
            print(f"{peer} ended with status {process.returncode}", file=sys.stderr)


def write_inputs(parts, folder):
    for part, weights in parts.weights.items():
        checkpoints.save(folder / f"{part}.safetensors", weights)
    moments = {
        name: np.asarray(m.second[0]) / np.asarray(m.count[0])
        for name, m in parts.calibrations["encoder"].moments.items()
    }
    checkpoints.save(folder / "moments.safetensors", moments)


# --- Table and picture -----------------------------------------------------------------


def print_row(row):
    name = f"{row['peer']}: {row['setting']}"
    numbers = f"{row['bytes']:12,}{row['bits']:7.3f}{row['error']:9.5f}{row['seconds']:7.0f}"
    print(f"{name:56}{numbers}", flush=True)


def our_error(rows, part, num_bytes):
    """Our error at that many bytes: log error is interpolated between our rows; or None.

    Sizes up to 4 % above our largest, or 1 % below our smallest, are taken as those.
    """
    ours = sorted((r["bytes"], r["error"]) for r in rows if r["peer"] == OURS and r["part"] == part)
    if not ours or not ours[0][0] * 0.99 <= num_bytes <= ours[-1][0] * 1.04:
        return None
    sizes, errors = zip(*ours, strict=True)
    return float(np.exp(np.interp(num_bytes, sizes, np.log(errors))))


def print_table(rows):
    """All rows by bytes, and our error at a peer's bytes over the peer's."""
    for part in SIZES:
        title = f"{part}"
        print(f"\n{title:56}{'bytes':>12}{'bits':>7}{'error':>9}{'CPU s':>7}{'ours / it':>11}")
        for r in sorted((r for r in rows if r["part"] == part), key=lambda r: r["bytes"]):
            ours = None if r["peer"] == OURS else our_error(rows, part, r["bytes"])
            name = f"{r['peer']}: {r['setting']}"
            numbers = f"{r['bytes']:12,}{r['bits']:7.3f}{r['error']:9.5f}{r['seconds']:7.0f}"
            ratio = f"{ours / r['error']:11.2f}" if ours else f"{'':>11}"
            print(f"{name:56}{numbers}{ratio}".rstrip())


STYLES = {
    "NNCodec": ("#009E73", "^"),
    "llm-compressor": ("#E69F00", "o"),
    "llama.cpp": ("#56B4E9", "v"),
    "HQQ": ("#CC79A7", "D"),
    "Qwix": ("#0072B2", "P"),
}


def draw(rows, file):
    """Bits a weight of the encoder's files against 1 - cosine; lower and to the left is better."""
    figure = matplotlib.figure.Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    rows = [r for r in rows if r["part"] == "encoder"]
    ours = sorted((r["bits"], r["error"]) for r in rows if r["peer"] == OURS)
    axes.plot(*zip(*ours, strict=True), color="#D55E00", marker="s", lw=2, label=OURS)
    for name, (color, marker) in STYLES.items():
        points = sorted((r["bits"], r["error"]) for r in rows if r["peer"].startswith(name))
        if points:
            axes.scatter(*zip(*points, strict=True), color=color, marker=marker, label=name)
    axes.set(yscale="log", xlabel="bits a weight in the file, all included")
    axes.set(ylabel="1 - mean cosine of held-out sentences", xlim=(1.9, 5.1))
    axes.set_title("MiniLM's encoder, rounded after training. Down and to the left is better")
    axes.grid(alpha=0.3, which="major")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=110)


# --- The command -----------------------------------------------------------------------


def read_results(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def keep(path, row):
    """Writes a row into the results, in place of an older one of the same setting and size."""

    def key(r):
        return r["part"], r["peer"], r["setting"], round(r["bits"], 1)

    rows = [r for r in read_results(path) if key(r) != key(row)] + [row]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--save", type=pathlib.Path, help="the calibration of calibrated.py")
    parser.add_argument("--results", type=pathlib.Path, required=True)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--ours", action="store_true")
    parser.add_argument("--picture", type=pathlib.Path)
    args = parser.parse_args()
    start = time.time()
    if args.peer or args.ours:
        parts = Parts(args.folder, args.save)
        for row in our_rows(parts) if args.ours else ():
            keep(args.results, row)
        for text in args.peer:
            name, python = text.split("=", 1)
            for row in peer_rows(parts, name, python):
                keep(args.results, row)
        print(f"{time.time() - start:.0f} s")
    rows = read_results(args.results)
    print_table(rows)
    if args.picture:
        draw(rows, args.picture)


if __name__ == "__main__":
    main()
