"""Rows of NNCodec, the reference software of ISO/IEC 15938-17, which sees no data.

pip install "torch==2.13.0+cpu" "numpy<2" nncodec

Each file is a bit stream of `nncodec.nn.encode`. One step for all tensors is its way; steps in
proportion to the standard deviation of each tensor are what its `qp_per_tensor` allows. Both are
brought near to the bytes that are asked for.
"""

import importlib.metadata
import os
import sys
import time
from unittest import mock

import numpy as np
import shared

# NNCodec imports torchvision for its data sets alone, and its wheels want a torch built for CUDA.
sys.modules |= dict.fromkeys(("torchvision", "torchvision.datasets"), mock.MagicMock())
from nncodec.nn import decode, encode  # noqa: E402

RATES = (2.45, 3.3, 4.4)
WHOLE_BYTES = 6_500_000
STEPS_AN_OCTAVE = 4  # of its parameter qp


def quantization_parameters(tensors, log_step, by_deviation):
    """Steps 2^(qp / 4), nearly: between two powers of two they are equally spaced."""
    found = {}
    for name, w in tensors.items():
        if w.ndim >= 2:
            log = log_step + np.log2(w.std()) if by_deviation else log_step
            octave = np.floor(log)
            found[name] = int(STEPS_AN_OCTAVE * octave + round(4 * (2 ** (log - octave) - 1)))
    return found


def coded(tensors, qps, use_dq):
    """The bit stream."""
    options = {"qp": -20, "qp_per_tensor": qps, "use_dq": use_dq, "verbose": False}
    options |= {"row_skipping": False, "bitdepth": None}
    return encode(tensors, options)


def near(tensors, num_bytes, by_deviation, use_dq):
    """The bit stream of about `num_bytes`, from at most four of them, and CPU seconds of one."""
    matrices = [w for w in tensors.values() if w.ndim >= 2]
    num_weights = sum(w.size for w in matrices)
    log_step = (1.4 if use_dq else 2.0) - 8 * num_bytes / num_weights
    if not by_deviation:
        log_step += np.log2(np.concatenate([w.ravel() for w in matrices]).std())
    found = []
    for _ in range(4):
        start = time.process_time()
        stream = coded(tensors, quantization_parameters(tensors, log_step, by_deviation), use_dq)
        excess = 8 * (len(stream) - num_bytes) / num_weights
        found.append((abs(excess), time.process_time() - start, stream))
        print(f"log2 step {log_step:.3f}: {len(stream):,} bytes", flush=True)
        if abs(excess) < 0.02:
            break
        log_step += excess
    _, seconds, stream = min(found, key=lambda f: f[0])
    return stream, seconds


def rows(inputs, writer):
    os.chdir(inputs.folder)  # NNCodec writes its bit streams into the current folder.
    targets = [("encoder", int(r * 10_616_832 / 8)) for r in RATES] + [("whole", WHOLE_BYTES)]
    for part, num_bytes in targets:
        tensors = inputs.parts[part]
        for use_dq in (True, False) if part == "encoder" else (True,):
            for by_deviation in (False, True):
                stream, seconds = near(tensors, num_bytes, by_deviation, use_dq)
                path = inputs.folder / "file.nnc"
                path.write_bytes(stream)
                kind = "dependent" if use_dq else "uniform"
                steps = "steps by deviation" if by_deviation else "one step"
                setting = f"{kind}, {steps}"
                writer.row(part, setting, path, decode(bytearray(path.read_bytes())), seconds)


if __name__ == "__main__":
    shared.run(f"NNCodec {importlib.metadata.version('nncodec')}", rows)
