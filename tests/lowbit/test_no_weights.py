"""Names of leaves that are no weights: what other libraries write, and names that only look so."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxclip
from jaxclip.lowbit.no_weights import OPTIMIZER_STATE, QUANTIZED, reasons_to_keep

LAYERS = {
    "GPTQ, AWQ": {"qweight": np.int32, "qzeros": np.int32, "scales": None, "g_idx": np.int32},
    "compressed-tensors": {
        "weight_packed": np.int32,
        "weight_scale": None,
        "weight_shape": np.int64,
        "weight_zero_point": np.int32,
    },
    "fp8": {"weight": jnp.float8_e4m3fn, "weight_scale_inv": None},
    "fp8, by output": {"weight": jnp.float8_e4m3fn, "weight_scale": None},
    "bitsandbytes": {
        "weight": np.uint8,
        "weight.absmax": None,
        "weight.quant_map": None,
        "weight.nested_absmax": None,
        "weight.quant_state.bitsandbytes__nf4": np.uint8,
    },
}


@pytest.mark.parametrize("separator", [".", "/"])
@pytest.mark.parametrize("parts", LAYERS.values(), ids=LAYERS)
def test_all_parts_of_a_quantized_layer_are_kept_and_no_others(parts, separator):
    stem = separator.join(["model", "layers", "0", "proj", ""])
    others = [stem + "bias", separator.join(["model", "layers", "0", "norm", "weight"]), "weight"]
    reasons = reasons_to_keep([stem + part.replace(".", separator) for part in parts] + others)
    assert reasons == {stem + part.replace(".", separator): QUANTIZED for part in parts}


@pytest.mark.parametrize(
    "names",
    [
        ["scales", "zeros", "g_idx"],
        ["layer.scales", "layer.weight", "layer.bias"],
        ["layer.weight_g", "layer.weight_v"],
        ["weights", "weighted_scale", "absmax", "kernel_scale"],
        ["a.qweight_norm", "layer.scale"],
    ],
)
def test_names_that_only_look_so_are_weights(names):
    assert reasons_to_keep(names) == {}


def test_names_of_optimizer_states_have_that_reason():
    names = ["optimizer.qweight", "fc.weight.exp_avg", "fc.weight"]
    assert reasons_to_keep(names) == dict.fromkeys(names[:2], OPTIMIZER_STATE)


@pytest.mark.parametrize("parts", LAYERS.values(), ids=LAYERS)
def test_a_quantized_layer_is_never_rounded_again(parts):
    rng = np.random.default_rng(0)
    tree = {
        f"layer.{part}": rng.normal(size=(64, 64)).astype(dtype or np.float32)
        for part, dtype in parts.items()
    }
    tree["other.weight"] = rng.normal(size=(64, 64)).astype(np.float32)
    with pytest.warns(UserWarning, match=r"another library has quantized them, such as 'layer\."):
        small = jaxclip.compress(tree, 4, rule=jaxclip.max_abs)
    assert {k for k in tree if small[k] is not tree[k]} == {"other.weight"}
