"""Rows of NNCodec, the reference software of ISO/IEC 15938-17, for the nets of run.py.

    python3 -m venv peer; peer/bin/pip install "torch==2.13.0+cpu" "numpy<2" nncodec safetensors
    python evidence/with_nncodec.py fashion --python peer/bin/python

The nets of "AdamW" and "AdamW, narrower" are trained again, with the step size and knob that were
chosen for our files. NNCodec sees no data; it has dependent quantization. Steps are one for all
tensors, or in proportion to the deviation of each, as validation data say at each budget. The
finest step whose bit stream is within the budget is taken, then finer ones for single tensors.
"""

import argparse
import itertools
import json
import pathlib
import subprocess
import sys
import tempfile

RESULTS = pathlib.Path(__file__).parent / "results"
STEPS_AN_OCTAVE = 4  # of its parameter qp
WAYS = ("deviation", "one step")
OF_RECIPE = {"AdamW": "AdamW, NNCodec", "AdamW, narrower": "AdamW, narrower, NNCodec"}


def encode_all(folder, budgets):
    """In the peer's Python: for each net and budget the decoded net and the bytes."""
    import os
    from unittest import mock

    import numpy as np
    from safetensors.numpy import load_file, save_file

    # It imports torchvision for its data sets alone, and its wheels want a torch built for CUDA.
    sys.modules |= dict.fromkeys(("torchvision", "torchvision.datasets"), mock.MagicMock())
    from nncodec.nn import decode, encode

    os.chdir(folder)  # where it writes its bit streams

    def qps_of(tensors, log_step, way):
        qps = {}
        for name, w in tensors.items():
            if w.ndim > 1:
                log = log_step + (np.log2(w.std()) if way == "deviation" else 0.0)
                octave = np.floor(log)
                # Between two powers of two its steps are equally spaced.
                place = round(STEPS_AN_OCTAVE * (2 ** (log - octave) - 1))
                qps[name] = int(STEPS_AN_OCTAVE * octave + place)
        return qps

    def coded(tensors, qps):
        options = {"qp": -20, "qp_per_tensor": qps, "use_dq": True, "verbose": False}
        return encode(tensors, options | {"row_skipping": False, "bitdepth": None})

    def finest(tensors, budget, way):
        fine, coarse, best = -12.0, 6.0, None
        for _ in range(9):
            qps = qps_of(tensors, (fine + coarse) / 2, way)
            stream = coded(tensors, qps)
            if len(stream) <= budget:
                coarse, best = (fine + coarse) / 2, (qps, stream)
            else:
                fine = (fine + coarse) / 2
        if best is None:
            raise ValueError(f"{budget} bytes are out of reach.")
        qps, stream = best
        for name in sorted(qps, key=lambda name: -tensors[name].size):
            finer = qps | {name: qps[name] - 1}
            longer = coded(tensors, finer)
            if len(longer) <= budget:
                qps, stream = finer, longer
        return stream

    sizes = {}
    for path in sorted(pathlib.Path(folder).glob("net_*.safetensors")):
        tensors = load_file(path)
        for budget, way in itertools.product(budgets, WAYS):
            name, stream = f"{path.stem}_{budget}_{way}", finest(tensors, budget, way)
            decoded = decode(bytearray(stream))
            decoded = {k: np.ascontiguousarray(v, np.float32) for k, v in decoded.items()}
            save_file(decoded, f"decoded_{name}.safetensors")
            sizes[name] = len(stream)
            print(name, len(stream), file=sys.stderr, flush=True)
    pathlib.Path(folder, "sizes.json").write_text(json.dumps(sizes))


def rows_of(name, python):
    """Yields the rows of one task."""
    import jax
    from recipes import RECIPES
    from report import read
    from run import Bench
    from tasks import TASKS

    from jaxclip import checkpoints

    task, known = TASKS[name](), read(name)
    decay = next(row["knob"] for row in known if row["recipe"] == "AdamW")
    for recipe, new_name in OF_RECIPE.items():
        chosen = next((row for row in known if row["recipe"] == recipe), None)
        if chosen is None or any(row["recipe"] == new_name for row in known):
            continue
        bench, nets, whole = Bench(task, RECIPES[recipe], decay), [], []
        with tempfile.TemporaryDirectory() as folder:
            for seed in range(len(chosen["test"])):
                setting = bench.setting(chosen["step_size"], chosen["knob"], task.budgets[0])
                params = bench.train(seed, chosen["step_size"], *setting)[0]
                nets.append(params)
                whole.append(bench.scores(seed, params))
                checkpoints.save(f"{folder}/net_{seed}.safetensors", params)
            budgets = [str(budget) for budget in task.budgets]
            command = [python, __file__, name, "--encode", folder, *budgets]
            subprocess.run(command, check=True)
            sizes = json.loads(pathlib.Path(folder, "sizes.json").read_text())
            for budget in task.budgets:
                by_way = {}
                for way in WAYS:
                    paths = [f"net_{seed}_{budget}_{way}" for seed in range(len(nets))]
                    by_way[way] = [
                        (
                            *bench.scores(seed, loaded(f"{folder}/decoded_{path}", nets[seed])),
                            sizes[path],
                        )
                        for seed, path in enumerate(paths)
                    ]
                sign = 1 if task.is_better_high else -1
                way = max(WAYS, key=lambda way: sign * sum(found[0] for found in by_way[way]))
                row = {key: chosen[key] for key in ("step_size", "steps", "width", "seconds")}
                row |= {"recipe": new_name, "budget": budget, "knob": way, "tried": len(WAYS)}
                for i, field in enumerate(("valid", "test", "bytes")):
                    row[field] = [round(found[i], 4) for found in by_way[way]]
                for i, field in enumerate(("whole_valid", "whole_test")):
                    row[field] = [round(pair[i], 4) for pair in whole]
                yield row | {"jax": jax.__version__}


def loaded(path, params):
    """Decoded parameters in the structure of others."""
    from jaxclip import checkpoints

    return checkpoints.load(f"{path}.safetensors", like=params)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task")
    parser.add_argument("--python", help="the Python that has nncodec")
    parser.add_argument("--encode", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.encode:
        encode_all(options.encode[0], [int(budget) for budget in options.encode[1:]])
        return
    with (RESULTS / f"{options.task}.jsonl").open("a") as out:
        for row in rows_of(options.task, options.python):
            out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
