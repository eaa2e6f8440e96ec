"""How fast, and in how much memory, a large checkpoint is compressed and decompressed.

    python benchmarks/checkpoints/streaming.py [--gigabytes 3.2] [--folder /tmp]

Makes a sharded folder of float32 weights (drawn once for each shape, matrices as in a language
model with 4096 channels), compresses it in a process of its own to 4 bits in groups of 64 with
MSE-optimal scales, decompresses it in another, and prints seconds, megabytes of float32 a second
and a CPU second, compiling included, and the peak of resident memory over that of a process that
has only imported jaxclip.
Linux only, because the peak is read from /proc.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import textwrap

import numpy as np
import safetensors.numpy

SHAPES = {"attention": (4096, 4096), "up": (11008, 4096), "down": (4096, 11008)}
CASES = {
    "4 bits, group 64": {"group_size": 64},
    "the same, decompressed": {"decompress": True},
    "4 bits, channel": {},
    "4 bits, group 64, max_abs": {"group_size": 64, "rule": "max_abs"},
    "4 bits, group 64, Huffman": {"group_size": 64, "coding": "huffman"},
}
SCRIPT = textwrap.dedent(
    """
    import json, os, re, sys, time
    import jaxclip
    from jaxclip import checkpoints

    def peak():
        # Not `ru_maxrss`, which starts at the peak of the process that started this one.
        return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

    source, target, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    options["rule"] = getattr(jaxclip, options.get("rule", "mse_optimal"))
    jaxclip.quantize(jaxclip.dequantize(jaxclip.quantize([[0.5, 1.0]])))
    before, start, cpu_start = peak(), time.perf_counter(), time.process_time()
    grid = jaxclip.Grid(4, axis=0, group_size=options.pop("group_size", None))
    if options.pop("decompress", False):
        report = checkpoints.decompress_checkpoint(target, target + ".back.safetensors")
        raw, small = report.total_bytes, os.path.getsize(target)
    else:
        report = checkpoints.compress_checkpoint(source, target, grid, overwrite=True, **options)
        raw, small = report.raw_bytes, report.total_bytes
    seconds, after = time.perf_counter() - start, peak()
    cpu = time.process_time() - cpu_start
    print(json.dumps([seconds, cpu, before, after, raw, small]))
    """
)


def make_folder(folder, num_bytes):
    """Shards of at most about 1 GB, and their index; returns the size of all tensors."""
    rng = np.random.default_rng(0)
    drawn = {
        name: (0.02 * rng.standard_t(5, shape)).astype(np.float32) for name, shape in SHAPES.items()
    }
    tensors, total = [], 0
    while total < num_bytes:
        name = list(SHAPES)[len(tensors) % len(SHAPES)]
        tensors.append((f"layers.{len(tensors)}.{name}.weight", drawn[name]))
        total += drawn[name].nbytes
    shards = [tensors[i : i + 6] for i in range(0, len(tensors), 6)]
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        safetensors.numpy.save_file(dict(shard), folder / file)
        weight_map |= {name: file for name, _ in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return max(array.nbytes for array in drawn.values()), total


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=3.2)
    parser.add_argument("--folder", default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = pathlib.Path(name)
        largest, total = make_folder(folder, arguments.gigabytes * 1e9)
        print(f"{total / 1e9:.2f} GB of float32, the largest leaf {largest / 2**20:.0f} MiB")
        titles = ("seconds", "MB/s", "MB/CPU s", "peak MiB", "over import", "x largest", "smaller")
        print(f"{'what':<28}" + "".join(f"{title:>13}" for title in titles))
        for case, options in CASES.items():
            words = [str(folder), str(folder / "small.out.safetensors"), json.dumps(options)]
            command = [sys.executable, "-c", SCRIPT, *words]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds, cpu, before, after, raw, small = json.loads(result.stdout)
            over = after - before
            numbers = [f"{seconds:.1f}", f"{raw / seconds / 1e6:.0f}"]
            numbers += [f"{raw / cpu / 1e6:.0f}", f"{after:.0f}"]
            numbers += [f"{over:.0f}", f"{over * 2**20 / largest:.2f}", f"{raw / small:.2f}x"]
            print(f"{case:<28}" + "".join(f"{n:>13}" for n in numbers), flush=True)


if __name__ == "__main__":
    main()
