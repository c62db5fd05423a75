"""The sizes of what ONNX Runtime's own operators compute, which onnx does not infer: those that ONNX Runtime gives."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import model, save, session

from loraformat_converters.onnx.graph import sizes, stand_ins

HEAD = "g (float[N,4,32] x, int32[N,4] i) => (float[P,Q,R] y)"
# name → what computes y, and the initializers
OPERATORS = {
    "FastGelu": "<float[32] b> { y = com.microsoft.FastGelu(x, b) }",
    "BiasGelu": "<float[32] b> { y = com.microsoft.BiasGelu(x, b) }",
    "QuickGelu": "{ y = com.microsoft.QuickGelu(x) }",
    "SkipLayerNormalization": "<float[32] g1, float[32] b> { y = com.microsoft.SkipLayerNormalization(x, x, g1, b) }",
    "its sum": "<float[32] g1> { u, , , y = com.microsoft.SkipSimplifiedLayerNormalization(x, x, g1) }",
    "FusedMatMul": "<float[20,32] w> { y = com.microsoft.FusedMatMul <transB = 1> (x, w) }",
    "MatMulNBits": "<uint8[20,1,16] q, float[20] s> { y = com.microsoft.MatMulNBits <K = 32, N = 20, bits = 4, block_size = 32> (x, q, s) }",
    "DynamicQuantizeMatMul": "<uint8[32,20] q, float[20] s> { y = com.microsoft.DynamicQuantizeMatMul(x, q, s) }",
    "Attention": "<float[32,72] w, float[72] b> { y = com.microsoft.Attention <num_heads = 4, qkv_hidden_sizes = [16, 16, 40]> (x, w, b) }",
    "MultiHeadAttention": """<float[32,40] w> { v = MatMul(x, w)
      y = com.microsoft.MultiHeadAttention <num_heads = 4> (x, x, v) }""",
    "GatherBlockQuantized": """<uint8[50,32] t, float[50,2] s> {       y = com.microsoft.GatherBlockQuantized <bits = 8, block_size = 16, gather_axis = 0, quantize_axis = 1> (t, i, s) }""",
    "EmbedLayerNormalization": """<float[50,24] t, float[9,24] p, float[24] g1, float[24] b> {       y, m = com.microsoft.EmbedLayerNormalization(i, , t, p, , g1, b) }""",
}  # fmt: skip


def told(name, tmp_path):
    """(sizes as they are inferred, those of what ONNX Runtime computes) of y, with 3 rows."""
    made = model(f"{HEAD} {OPERATORS[name]}")
    read = "i" if "i" in made.graph.node[0].input else "x"
    made.graph.input.remove(next(value for value in made.graph.input if value.name != read))
    path, draw = save(made, tmp_path / "m.onnx"), np.random.default_rng(3)
    x, i = draw.standard_normal((3, 4, 32)).astype(np.float32), draw.integers(0, 9, (3, 4)).astype(np.int32)
    given = {read: {"x": x, "i": i}[read]}
    found, _ = sizes.sizes(made, {read: 0}, (3, 5, 7))
    return found.get("y"), session(path).run(["y"], given)[0].shape


@pytest.mark.parametrize("name", OPERATORS)
def test_the_sizes_are_those_of_onnx_runtime(name, tmp_path):
    inferred, real = told(name, tmp_path)
    assert inferred == real


@pytest.mark.parametrize("name", OPERATORS)
def test_without_stand_ins_or_with_a_lost_one_it_is_red(name, monkeypatch, tmp_path):
    monkeypatch.setattr(sizes, "stand_in", lambda graph: None)
    inferred, real = told(name, tmp_path)
    assert inferred != real


def test_two_sizes_exchanged_are_red(monkeypatch, tmp_path):
    whole = stand_ins._product
    monkeypatch.setattr(stand_ins, "_product", lambda node, x, rows, columns: whole(node, x, columns, rows))
    for name in ("FusedMatMul", "MatMulNBits", "Attention"):
        inferred, real = told(name, tmp_path)
        assert inferred != real
