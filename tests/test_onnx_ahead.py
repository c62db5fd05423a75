"""A module that is called on a constant: each of its calls is changed, or what the exporter computed ahead is told."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import lora, model, run, save, session
from onnx import numpy_helper

import loraformat as lf
from loraformat.registry import open_base
from loraformat.testing import relative_error
from loraformat.verbs.merge import attach, merge

VERBS = {"merge": merge, "attach": attach}
OUT, IN, ROWS = 12, 5, 4


def drawn():
    draw = np.random.default_rng(2)
    return tuple(draw.standard_normal(s).astype(np.float32) for s in ((OUT, IN), (OUT,), (ROWS, IN), (ROWS, IN)))


def graph(body, held):
    made = model(f"g (float[{ROWS},{IN}] x) => (float[{ROWS},{OUT}] y) {{ {body} }}")
    for node in made.graph.node:
        node.input[:] = [name.replace("m_", "m.") for name in node.input]
    made.graph.initializer.extend(numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in held.items())
    return made


def folded(c):
    """Of two calls of one Gemm the first, of a constant, as torch's exporter leaves it: a value by the product's name."""
    weight, bias, x, _ = drawn()
    body = '["node_linear_1"] h = Gemm <transB = 1> (x, m_weight, m_bias) t = Tanh(h) y = Add(t, linear)'
    return graph(body, {"m.weight": weight, "m.bias": bias, "linear": c @ weight.T + bias}), x


PAIR = {"m.weight": lora(OUT, IN)}
BIAS = {"m.bias": lf.Update((lf.Replace(np.ones(OUT, np.float32)),))}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("state", "targets"), [("zeros", BIAS), ("learned", BIAS), ("learned", PAIR)])
def test_what_a_stored_product_was_made_of_is_not_changed(state, targets, verb, tmp_path):
    *_, c = drawn()
    made, _ = folded(c if state == "learned" else np.zeros_like(c))
    base = open_base(save(made, tmp_path / "base.onnx"))
    with pytest.raises(lf.LoraFormatError, match=r"LF-608  a product of it and a constant .* is stored as linear"):
        VERBS[verb](lf.Adapter(targets), base, tmp_path / "out.onnx")


@pytest.mark.parametrize("verb", VERBS)
def test_of_zeros_the_weight_does_not_matter(verb, tmp_path):
    weight, bias, x, c = drawn()
    made, _ = folded(np.zeros_like(c))
    VERBS[verb](lf.Adapter(PAIR), open_base(save(made, tmp_path / "base.onnx")), tmp_path / "out.onnx")
    wanted = np.tanh(x @ (weight + PAIR["m.weight"].matrix()).T + bias) + bias
    assert relative_error(session(tmp_path / "out.onnx").run(None, {"x": x})[0], wanted) <= 1e-6


def test_another_modules_product_keeps_nobody_from_anything(tmp_path):
    made, _ = folded(drawn()[-1])
    for tensor in made.graph.initializer:
        if tensor.name == "linear":
            other = np.random.default_rng(9).standard_normal((ROWS, OUT)).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(other, "linear"))
    merge(lf.Adapter({**PAIR, **BIAS}), open_base(save(made, tmp_path / "base.onnx")), tmp_path / "out.onnx")


@pytest.mark.parametrize("verb", VERBS)
def test_a_call_that_is_of_constants_in_the_graph_is_changed_as_the_others(verb, tmp_path):
    weight, bias, x, c = drawn()
    body = """["/m/Gemm"] f = Gemm <transB = 1> (c, m_weight, m_bias) ["/m_1/Gemm"] h = Gemm <transB = 1> (x, m_weight, m_bias)
              t = Tanh(h) y = Add(t, f)"""
    path = save(graph(body, {"m.weight": weight, "m.bias": bias, "c": c}), tmp_path / "base.onnx")
    VERBS[verb](lf.Adapter({**PAIR, **BIAS}), open_base(path), tmp_path / "out.onnx")
    new = weight + PAIR["m.weight"].matrix()
    wanted = np.tanh(x @ new.T + 1) + c @ new.T + 1
    found = session(tmp_path / "out.onnx").run(None, {"x": x})[0]
    assert relative_error(found, wanted) <= 1e-6
    assert relative_error(found, run(path)["y"]) > 0.05
