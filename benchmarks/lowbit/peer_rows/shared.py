"""The part that scripts of peers share: weights and moments are read, and rows are written.

`calibrated_peers.py` makes a folder with the weights of each part and the moments of the encoder's
inputs. A script of a peer runs in a Python of its own, writes the file of each setting and what is
decoded from it into that folder, and prints a line of JSON for each.
"""

import json
import os
import pathlib
import sys
import time

import numpy as np
from safetensors.numpy import load_file, save_file

# Rows go to the standard output, and whatever a peer prints, from any language, to the errors.
ROWS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


class Inputs:
    """Weights by part and name, and moments of the encoder's inputs by the weight's name."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.parts = {part: load_file(self.folder / f"{part}.safetensors") for part in PARTS}
        self.moments = load_file(self.folder / "moments.safetensors")


PARTS = ("encoder", "whole")


class Writer:
    """Prints the rows of one peer."""

    def __init__(self, inputs, peer):
        self.inputs, self.peer = inputs, peer

    def row(self, part, setting, path, decoded, seconds):
        """Reports a setting: its file at `path`, and the arrays that are read from that file."""
        target = self.inputs.folder / "decoded.safetensors"
        save_file({n: np.ascontiguousarray(w, np.float32) for n, w in decoded.items()}, target)
        row = {
            "part": part,
            "peer": self.peer,
            "setting": setting,
            "bytes": path.stat().st_size,
            "seconds": seconds,
        }
        print(json.dumps(row), file=ROWS, flush=True)
        sys.stdin.readline()  # until the row has been measured

    def parts_row(self, setting, round_matrix):
        """A row for the encoder: `round_matrix(name, weight)` gives what a file holds, and W."""
        start, stored, decoded = time.process_time(), {}, {}
        for name, weight in self.inputs.parts["encoder"].items():
            parts, decoded[name] = round_matrix(name, weight)
            stored |= {f"{name}.{k}": v for k, v in parts.items()}
        seconds = time.process_time() - start
        path = self.inputs.folder / "file.safetensors"
        save_file(stored, path)
        self.row("encoder", setting, path, decoded, seconds)


def run(peer, make_rows):
    """Calls `make_rows(inputs, writer)`."""
    inputs = Inputs(sys.argv[1])
    make_rows(inputs, Writer(inputs, peer))


def dense(codes, bits):
    """Codes of 1 to 8 bits, one after the other, as bytes."""
    return np.packbits(np.unpackbits(codes.reshape(-1, 1), axis=1)[:, 8 - bits :])


def affine_parts(codes, scales, zeros, bits):
    """The least that a file holds of codes in [0, 2**bits): zeros are of the codes' width."""
    parts = {"codes": dense(codes.astype(np.uint8), bits), "scales": scales.astype(np.float16)}
    if zeros is not None:
        parts["zeros"] = dense(zeros.astype(np.uint8), bits)
    return parts
