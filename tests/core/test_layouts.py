"""Output axes by layout, name and shape."""

import pytest

from jaxclip._core.layouts import layouts_of, output_axes


@pytest.mark.parametrize(
    ("names", "default", "layouts"),
    [
        (["dense/kernel", "dense/bias", "w"], "out_in", ["in_out"] * 3),
        (["fc.weight", "fc.bias", "experts.gate_up_proj"], "in_out", ["out_in"] * 3),
        (["lstm.weight_ih_l0", "attn.in_proj_weight"], "in_out", ["out_in"] * 2),
        (["layers/0/kernel/value", "x", "dense/kernel:0"], "out_in", ["in_out"] * 3),
        (["a/kernel", "b/kernel", "c.weight"], "out_in", ["in_out", "in_out", "out_in"]),
        (["a/kernel", "b/kernel", "c.weight", "d"][::3], "out_in", ["in_out"] * 2),
        (["a/kernel", "c.weight", "d"], "out_in", ["in_out", "out_in", "out_in"]),
        (["w", "b"], "in_out", ["in_out"] * 2),
        (["w", "b"], "out_in", ["out_in"] * 2),
        ([], "in_out", []),
    ],
    ids=str,
)
def test_a_layout_is_said_by_names_and_by_most_of_them_for_the_others(names, default, layouts):
    assert layouts_of(names, default=default) == layouts
    assert layouts_of(names, "in_out", default) == ["in_out"] * len(names)


@pytest.mark.parametrize("layout", ["torch", "flax", 0, True], ids=repr)
def test_another_layout_is_refused_with_the_list(layout):
    with pytest.raises(ValueError, match=r"layout must be one of \[None, 'in_out', 'out_in'\]"):
        layouts_of(["w"], layout)


@pytest.mark.parametrize(
    ("name", "shape", "layout", "axes"),
    [
        ("dense/kernel", (64, 10), "in_out", -1),
        ("conv/kernel", (3, 3, 64, 16), "in_out", -1),
        ("conv/kernel", (3, 64, 16), "in_out", -1),
        ("attention/query/kernel", (64, 4, 16), "in_out", (1, 2)),
        ("attention/query/kernel", (64, 64), "in_out", -1),
        ("attention/out/kernel", (4, 16, 64), "in_out", -1),
        ("block/experts/w", (8, 64, 32), "in_out", (0, -1)),
        ("moe/up", (8, 64, 32), "in_out", (0, -1)),
        ("layers/experts/up", (12, 8, 64, 32), "in_out", (0, 1, -1)),
        ("layers.experts.up", (12, 8, 32, 64), "out_in", (0, 1, 2)),
        ("experts_0/conv/kernel", (3, 3, 64, 16), "in_out", -1),
        ("experts.0.conv.weight", (16, 64, 3, 3), "out_in", 0),
        ("experts/gate/kernel", (64, 8), "in_out", -1),
        ("smoetan/up", (8, 64, 32), "in_out", -1),
        ("fc.weight", (10, 64), "out_in", 0),
        ("conv.weight", (16, 64, 3, 3), "out_in", 0),
        ("conv.weight", (16, 64, 3), "out_in", 0),
        ("mlp.experts.gate_up_proj", (8, 64, 16), "out_in", (0, 1)),
        ("mlp.stacked", (8, 64, 128), "out_in", (0, 1)),
    ],
)
def test_the_output_axes_are_those_of_the_layout(name, shape, layout, axes):
    assert output_axes(name, shape, layout) == axes
