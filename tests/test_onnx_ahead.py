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


# One call of a module on x, another on a constant, which was folded: (nodes, weight, bias, what is stored, its values).
def elsewhere():
    draw = np.random.default_rng(4)
    square, tall, kernel, table, b, c = (
        draw.standard_normal(s).astype(np.float32) for s in ((6, 6), (12, 6), (9, 6, 3), (20, 6), (12,), (1, 3, 6))
    )
    product = '["{}"] h = MatMul(x, "m.weight") {} y = Concat <axis = 1> (h, "{}")'
    biased = '["{}"] p = MatMul(x, "m.weight") ["{}"] h = Add(p, "m.bias") y = Concat <axis = 1> (h, "{}")'
    conv = '["/m/Conv"] h = Conv(x, "m.weight") y = Concat <axis = 0> (h, "{}")'
    look = '["/m/Gather"] h = Gather("m.weight", x) y = Concat <axis = 1> (h, "{}")'
    windows = np.stack([c[0].T[:, :1], c[0].T[:, 1:2], c[0].T[:, 2:]], 1)[..., 0].reshape(6, 3)
    return {
        "a bias that is added": (biased.format("n", "n_1", "linear"), tall.T, b, "linear", c @ tall.T + b),
        "no bias, and added itself": ('["n"] h = MatMul(x, "m.weight") y = Add(h, "linear_1")', tall.T, None, "linear_1", c[:, :1] @ tall.T),
        "a square weight": (product.format("n", "", "linear_2"), square.T, None, "linear_2", c @ square.T),
        "by a tool, of a second call": (
            biased.format("/m/MatMul", "/m/Add", "/m_1/Add_output_0"), tall.T, b, "/m_1/Add_output_0", c @ tall.T + b),
        "by a tool, cut afterwards": (product.format("/m/MatMul", "", "/m_1/Split_output_1"), tall.T, None, "/m_1/Split_output_1", (c @ tall.T)[..., 6:].repeat(2, -1)),
        "a convolution": (conv.format("conv1d_1"), kernel, None, "conv1d_1", np.einsum("oik,ik->o", kernel, windows).reshape(1, 9, 1)),
        "a look-up": (look.format("embedding"), table, None, "embedding", table[[[3, 3, 7]]]),
        "a look-up, by a tool": (look.format("/m_1/Gather_output_0"), table, None, "/m_1/Gather_output_0", table[[[3, 3, 7]]]),
    }  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", elsewhere())
def test_what_was_computed_of_a_constant_is_told_whatever_the_operator(name, verb, tmp_path):
    body, weight, bias, stored, values = elsewhere()[name]
    kind = {"conv1d_1": "float[N,6,3]"}.get(stored, "int64[N,T]" if "look-up" in name else "float[N,T,6]")
    made = model(f"g ({kind} x) => (float[A,B,C] y) {{ {body} }}")
    held = {"m.weight": weight, "m.bias": bias, stored: values}
    made.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in held.items() if v is not None)
    out, in_ = (weight.shape[1], weight.shape[0]) if "Conv" not in body else (9, 18)
    base = open_base(save(made, tmp_path / "base.onnx"))
    given = (
        lf.Adapter({"m.weight": lora(out, in_)}) if "look-up" not in name else lf.Adapter({"m.weight": table_pair()})
    )
    with pytest.raises(lf.LoraFormatError, match=rf"LF-608  a product of it and a constant .* is stored as {stored}"):
        VERBS[verb](given, base, tmp_path / "out.onnx")
    last = next(t for t in made.graph.initializer if t.name == stored)
    last.name = made.graph.node[-1].input[1] = "learned"
    VERBS[verb](given, open_base(save(made, tmp_path / "base.onnx")), tmp_path / "out.onnx")


@pytest.mark.parametrize("calls", [("m", "m_1"), ("m",), ("m_1",), ("m_1", "m_2")])
def test_a_module_whose_first_call_is_gone_is_not_changed(calls, tmp_path):
    """What a tool made of it has the name of another operator, such as the Tanh behind it."""
    lines = [f'["/{call}/Gemm"] v{n + 1} = Gemm(v{n}, "m.weight")' for n, call in enumerate(calls)]
    made = model(f'g (float[N,6] v0) => (float[N,6] v{len(calls)}) <float[6,6] "m.weight"> {{ {" ".join(lines)} }}')
    base, given = open_base(save(made, tmp_path / "base.onnx")), lf.Adapter({"m.weight": lora(6, 6)})
    if calls[0] == "m":
        merge(given, base, tmp_path / "out.onnx")
        return
    with pytest.raises(lf.LoraFormatError, match=r"LF-60[89]"):
        merge(given, base, tmp_path / "out.onnx")


def test_a_kernel_that_paddle_named_is_no_value(tmp_path):
    made = model("""g (float[N,6,3] x) => (float[N,9,3] y) <float[9,6,1] "conv3_weights", float[9,9,1] conv4_expand_weights>
        { h = Conv(x, "conv3_weights") y = Conv(h, conv4_expand_weights) }""")
    base, pair = open_base(save(made, tmp_path / "base.onnx")), lora(9, 6)
    merge(lf.Adapter({"conv3_weights": pair}), base, tmp_path / "out.onnx")
    wanted = base.read("conv3_weights")[..., 0] + pair.matrix()
    assert relative_error(open_base(tmp_path / "out.onnx").read("conv3_weights")[..., 0], wanted) <= 1e-6


def table_pair():
    pair = lora(6, 20)["lora"]
    return lf.Update((pair,), op="embedding")


def test_a_product_that_another_module_explains_is_that_modules(tmp_path):
    """Of a square weight any tensor could be a product; this is the bias of another, which was called on zeros."""
    draw = np.random.default_rng(5)
    w, v, c = (draw.standard_normal(s).astype(np.float32) for s in ((6, 6), (6, 6), (6,)))
    made = model("""g (float[N,6] x) => (float[N,6] y) { h = Gemm(x, "a.weight", "a.bias")
        t = Gemm(h, "b.weight") y = Add(t, linear) }""")
    held = {"a.weight": w, "b.weight": v, "a.bias": c, "linear": c[None]}
    made.graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in held.items())
    path, given = tmp_path / "base.onnx", lf.Adapter({"b.weight": lora(6, 6), "a.weight": lora(6, 6)})
    merge(given, open_base(save(made, path)), tmp_path / "out.onnx")
    made.graph.initializer[-1].CopyFrom(numpy_helper.from_array(c[None] + 1, "linear"))
    with pytest.raises(lf.LoraFormatError) as caught:
        merge(given, open_base(save(made, path)), tmp_path / "out.onnx", force=True)
    assert [(p.rule, p.where) for p in caught.value.problems] == [("LF-608", "b.weight"), ("LF-608", "a.weight")]


def test_another_modules_product_keeps_nobody_from_anything(tmp_path):
    made, _ = folded(drawn()[-1])
    for tensor in made.graph.initializer:
        if tensor.name == "linear":
            other = np.random.default_rng(9).standard_normal((ROWS, OUT)).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(other, "linear"))
    base = open_base(save(made, tmp_path / "base.onnx"))
    merge(lf.Adapter({**PAIR, **BIAS}), base, tmp_path / "out.onnx")
    found = open_base(tmp_path / "out.onnx").read("m.weight")
    assert relative_error(found, base.read("m.weight") + PAIR["m.weight"].matrix()) <= 1e-6


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
