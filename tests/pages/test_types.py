"""A type checker finds the mistakes in a user's script, and nothing else."""

import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = """
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxclip
from jaxclip import checkpoints, interop, sign, sweeps
from jaxclip.training import reached

params = {"kernel": jnp.ones((4, 3))}
tx = optax.chain(jaxclip.clip_by_global_norm(1.0), jaxclip.lion(1e-3))
state = jaxclip.TrainState.create(params, tx, key=jax.random.key(0))
step = jaxclip.make_train_step(lambda p, x: jnp.mean(x @ p["kernel"]), tx)
state, info = step(state, jnp.ones((2, 4)))
kernel = state.params["kernel"]
q = jaxclip.quantize(kernel, 4)
x = jnp.ones((2, 4))
outputs = x @ q + jnp.dot(x, q) * 2 - (q.T @ x.T).T
numbers: int = q.size + q.nbytes
half = q.astype(jnp.bfloat16)
small = jaxclip.compress(state.params, "ternary", layout="in_out")
small = jaxclip.compress(state.params, jaxclip.Grid(4, levels="narrow", group_size=2))
dtypes = jnp.float16, np.float16, np.dtype("float16"), kernel.dtype
grids = [jaxclip.Grid(4, scale_dtype=dtype).scale_dtype.upper() for dtype in dtypes]
restored = [jaxclip.decompress(small, dtype) for dtype in dtypes]
print(jaxclip.size_report(small, "huffman").total_bytes, small["kernel"].bits)
checkpoints.save("x.safetensors", small, coding="smallest")
interop.export_checkpoint("x.safetensors", "x.gguf", "Q4_0")
interop.to_gguf("x.gguf", small, "llama", kind=None)
functions = lambda p, b: 0.0, lambda k: params, lambda s: optax.sgd(s), lambda k: x
ends = {"stop": jaxclip.max_steps(1), "evaluate": lambda p: {"error": 0.0}}
task = sweeps.Task(*functions, **ends, metric="error", mode="min")
jaxclip.sweep(task, step_sizes=[0.1], loop="host")
stop = reached("loss", 0.1, mode="min")

jaxclip.compress(params, "ternry")  # wrong
jaxclip.compress(params, bits=7)  # wrong
jaxclip.quantize(kernel, 16)  # wrong
jaxclip.Grid(9)  # wrong
jaxclip.Grid(4, levels="ful")  # wrong
jaxclip.compress(params, 4, layout="torch")  # wrong
jaxclip.fan_in(1.0, layout="flax")  # wrong
reached("loss", 0.1, mode="minn")  # wrong
checkpoints.save("x.safetensors", small, coding="zip")  # wrong
jaxclip.Grid(4, scale_dtype="float12")  # wrong
interop.export_checkpoint("x.safetensors", "y.gguf", "Q4_O")  # wrong
interop.to_gguf("y.gguf", small, "llama", kind="Q5_0")  # wrong
sign.scaled_sign("mean")  # wrong
jaxclip.sweep(task, step_sizes=[0.1], loop="python")  # wrong
sweeps.Task(*functions, **ends, metric="error", mode="maximum")  # wrong
q.shap  # wrong
"""


@pytest.mark.thorough
def test_pyright_finds_the_mistakes_in_a_script_and_no_others(tmp_path: pathlib.Path):
    pytest.importorskip("pyright")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson"]
    result = subprocess.run([*command, script], cwd=tmp_path, capture_output=True, text=True)
    found = json.loads(result.stdout)["generalDiagnostics"]
    lines = {1 + error["range"]["start"]["line"] for error in found if error["severity"] == "error"}
    wrong = {i for i, line in enumerate(SCRIPT.splitlines(), 1) if line.endswith("# wrong")}
    assert lines == wrong, [(e["range"]["start"]["line"] + 1, e["message"]) for e in found]
