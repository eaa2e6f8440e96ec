"""Records what PyTorch, timm and lion-pytorch do, for `test_against_torch.py`.

    python tests/peers/recorded/record_torch.py

writes `torch.json` beside this file. It installs nothing: it runs where torch, timm and
lion-pytorch are. The test runs the functions below again where it finds torch. Numbers are
float32, written so that they read back to the same bits.
"""

import importlib.util
import json
import pathlib
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

FILE = pathlib.Path(__file__).with_name("torch.json")
SHAPES = [(3, 4), (4,), (2, 1, 2)]
NUM_STEPS = 5


def gradients(seed: int, shapes: list = SHAPES) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=s).astype(np.float32) for s in shapes]


def parameters(values: list, grads: list) -> list[torch.nn.Parameter]:
    made = []
    for value, grad in zip(values, grads, strict=True):
        parameter = torch.nn.Parameter(torch.tensor(value))
        parameter.grad = torch.tensor(grad)
        made.append(parameter)
    return made


def lists(arrays: list) -> list:
    """Nested lists of floats that are exactly float32."""
    return [np.asarray(x.detach() if torch.is_tensor(x) else x).tolist() for x in arrays]


# --- Clips --------------------------------------------------------------------------------


def clip_grad_norm(max_norm: float, norm_type: str) -> dict[str, Any]:
    grads = gradients(0)
    made = parameters(grads, grads)
    norm = torch.nn.utils.clip_grad_norm_(made, max_norm, float(norm_type))
    return {
        "name": "clip_grad_norm",
        "arguments": {"max_norm": max_norm, "norm_type": norm_type},
        "grads": lists(grads),
        "norm": float(norm),
        "expected": lists([p.grad for p in made]),
    }


def clip_grad_value(clip_value: float) -> dict[str, Any]:
    grads = gradients(1)
    made = parameters(grads, grads)
    torch.nn.utils.clip_grad_value_(made, clip_value)
    return {
        "name": "clip_grad_value",
        "arguments": {"clip_value": clip_value},
        "grads": lists(grads),
        "expected": lists([p.grad for p in made]),
    }


def adaptive_clip_grad(clip_factor: float) -> dict[str, Any]:
    """Of timm, whose units are the rows: the axes after the first are one unit."""
    # By its path: timm as a whole needs torchvision.
    folder = importlib.util.find_spec("timm").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("agc", f"{folder}/utils/agc.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shapes = [(3, 4), (4,), (3, 2, 2, 2), (3, 2, 4)]  # linear, bias, conv of two and one axes
    values, grads = gradients(8, shapes), gradients(9, shapes)
    values[0][1] = 0  # as large as eps
    grads[0][2] = 0
    grads[2] *= 1e-3
    made = parameters(values, grads)
    module.adaptive_clip_grad(made, clip_factor)
    return {
        "name": "adaptive_clip_grad",
        "arguments": {"clip_factor": clip_factor},
        "params": lists(values),
        "grads": lists(grads),
        "expected": lists([p.grad for p in made]),
    }


# --- Sign steps ---------------------------------------------------------------------------


def optimizer_steps(name: str, make: Any, arguments: dict) -> dict[str, Any]:
    values, steps = gradients(2), [gradients(3 + i) for i in range(NUM_STEPS)]
    made = parameters(values, steps[0])
    optimizer, expected = make(made, **arguments), []
    for step in steps:
        for parameter, grad in zip(made, step, strict=True):
            parameter.grad = torch.tensor(grad)
        optimizer.step()
        expected.append(lists(made))
    return {
        "name": name,
        "arguments": arguments,
        "params": lists(values),
        "grads": [lists(step) for step in steps],
        "expected": expected,
    }


def adam_without_memory(lr: float) -> dict[str, Any]:
    """Adam that averages nothing divides each entry by its own modulus: a sign step."""
    return optimizer_steps(
        "adam_without_memory", torch.optim.Adam, {"lr": lr, "betas": (0.0, 0.0), "eps": 0.0}
    )


def lion(lr: float, weight_decay: float) -> dict[str, Any]:
    from lion_pytorch import Lion

    return optimizer_steps(
        "lion", Lion, {"lr": lr, "betas": (0.9, 0.99), "weight_decay": weight_decay}
    )


# --- Everything ---------------------------------------------------------------------------


def has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def versions() -> dict[str, str]:
    names = {"torch": "torch", "timm": "timm", "lion_pytorch": "lion-pytorch"}
    return {
        distribution: version(distribution)
        for module, distribution in names.items()
        if has_module(module)
    }


def record() -> dict[str, Any]:
    cases = [
        clip_grad_norm(max_norm, norm_type)
        for norm_type in ("1", "2", "inf")  # JSON has no infinity
        for max_norm in (0.5, 2.0, 100.0)  # the last clips nothing
    ]
    cases += [clip_grad_value(0.5), clip_grad_value(1.0)]
    cases += [adam_without_memory(0.01)]
    if has_module("timm"):
        cases += [adaptive_clip_grad(0.01), adaptive_clip_grad(0.5)]
    if has_module("lion_pytorch"):
        cases += [lion(0.01, 0.0), lion(0.01, 0.1)]
    return {"versions": versions(), "cases": cases}


if __name__ == "__main__":
    FILE.write_text(json.dumps(record()) + "\n")
    print(f"{FILE}: {FILE.stat().st_size} bytes")
