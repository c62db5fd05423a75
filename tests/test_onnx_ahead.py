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


HEADS = """g (float[N,T,6] x) => (float[A,B,C,D] y) <float[6,6] w> {
    ["FIRST"] LINEAR = MatMul(x, w) h = Reshape(LINEAR, s) k = Transpose <perm = [0, 2, 3, 1]> (h)
    z = MatMul(STORED, k) y = Identity(z) }"""
"""q of a constant, in two heads of three, beside a call of q on x: only values and names tell whose it is."""


def attention(first, linear, stored, written=None, seed=6):
    """(the model, its base); ``written``: what an exporter says that the stored heads were computed of."""
    text = HEADS.replace("FIRST", first).replace("LINEAR", linear).replace("STORED", stored)
    made, draw = model(text), np.random.default_rng(seed)
    made.graph.initializer[0].name = made.graph.node[0].input[1] = "q.weight"
    for name, values in {
        "s": np.array([0, 0, 2, 3]),
        stored: draw.standard_normal((1, 2, 5, 3)).astype(np.float32),
    }.items():
        made.graph.initializer.append(numpy_helper.from_array(values, name))
    for name, sources in (written or {}).items():
        value = made.graph.value_info.add(name=name)
        value.metadata_props.add(key="pkg.onnxscript.optimizer.folded_from", value=repr(sources))
    return made


WRITTEN = {
    "of this weight": ({"transpose": ["lat", "q.weight", "val_1"]}, True),
    "of another": ({"transpose": ["lat", "k.weight", "val_1"]}, False),
    "of nothing, which is not written": ({"val_9": ["k.weight"]}, False),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_what_the_exporter_wrote_settles_it(case, tmp_path):
    written, told = WRITTEN[case]
    base = open_base(save(attention("node_MatMul_3", "linear_1", "transpose", written), tmp_path / "base.onnx"))
    given = lf.Adapter({"q.weight": lora(6, 6)})
    if told:
        with pytest.raises(
            lf.LoraFormatError, match=r"LF-608  a product of it and a constant was .* stored as transpose"
        ):
            merge(given, base, tmp_path / "out.onnx")
    else:
        merge(given, base, tmp_path / "out.onnx")


NUMBERED = {
    "the first of dynamo is missing": ("node_MatMul_3", "linear_1", "transpose", True),
    "none is missing, and nothing runs behind": ("node_MatMul_3", "linear", "transpose", True),
    "a tool, whose scope tells nothing": ("/q/MatMul", "/q/MatMul_output_0", "/Transpose_output_0", True),
    "rows of a table, by a module that does nothing else": (
        "/q/MatMul",
        "/q/MatMul_output_0",
        "/m/wpe/Gather_output_0",
        False,
    ),
    "a row of what a module computed": ("/m/q/MatMul", "/m/q/MatMul_output_0", "/m/Gather_output_0", True),
    "of what calls the module": ("/m/a/q/MatMul", "/m/a/q/MatMul_output_0", "/m/a/core/Transpose_output_0", True),
    "of another part of the model": ("/m/a/q/MatMul", "/m/a/q/MatMul_output_0", "/m/b/Transpose_output_0", False),
    "a mask in a scope of its own": ("/q/MatMul", "/q/MatMul_output_0", "/Constant_output_0", False),
}


@pytest.mark.parametrize("case", NUMBERED)
def test_a_call_that_no_number_accounts_for_is_told(case, tmp_path):
    first, linear, stored, told = NUMBERED[case]
    text = attention(first, linear.replace("/", "_"), stored.replace("/", "_"))
    for node in text.graph.node:
        for names in (node.input, node.output):
            names[:] = [{linear.replace("/", "_"): linear, stored.replace("/", "_"): stored}.get(n, n) for n in names]
    for tensor in text.graph.initializer:
        tensor.name = stored if tensor.name == stored.replace("/", "_") else tensor.name
    base, given = open_base(save(text, tmp_path / "base.onnx")), lf.Adapter({"q.weight": lora(6, 6)})
    if not told:
        merge(given, base, tmp_path / "out.onnx")
        return
    with pytest.raises(
        lf.LoraFormatError, match=rf"LF-608  a product of it and a constant may be .* as {stored}: nothing"
    ):
        merge(given, base, tmp_path / "out.onnx")


def test_what_was_stored_before_the_first_call_is_none(tmp_path):
    """Positions that are added to x: what reads them runs before every call, by either exporter's numbers."""
    for name, linear, stored in (("n", "linear", "expand"), ("/m/q/MatMul", "h", "/m/Expand_output_0")):
        made = model(
            f'g (float[N,5,6] x) => (float[N,5,6] y) {{ e = Add(x, "{stored}") ["{name}"] {linear} = MatMul(e, "m.q.weight") y = Tanh({linear}) }}'
        )
        for values, key in (
            (np.random.default_rng(1).standard_normal((6, 6)), "m.q.weight"),
            (np.random.default_rng(2).standard_normal((1, 5, 6)), stored),
        ):
            made.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), key))
        given = lf.Adapter({"m.q.weight": lora(6, 6)})
        merge(given, open_base(save(made, tmp_path / "base.onnx")), tmp_path / "out.onnx", force=True)
        last = made.graph.node[1]
        last.name, last.output[0] = ("n", "linear_1") if name == "n" else ("/m/q_1/MatMul", "h")
        made.graph.node[2].input[0] = last.output[0]
        with pytest.raises(lf.LoraFormatError, match="LF-608"):
            merge(given, open_base(save(made, tmp_path / "base.onnx")), tmp_path / "out.onnx", force=True)


@pytest.mark.parametrize("axes", [(0, 2, 1, 3), (0, 2, 3, 1), (2, 0, 1, 3)])
def test_heads_of_a_tall_weight_are_told_by_values(axes, tmp_path):
    """c·Wᵀ + b in four heads of three, wherever the axes went; other values of that size are not."""
    weight, bias, _, c = drawn()
    heads = (c @ weight.T + bias).reshape(1, ROWS, 4, 3).transpose(axes)
    made = graph('["/m/Gemm"] y = Gemm <transB = 1> (x, m_weight, m_bias)', {"m.weight": weight, "m.bias": bias})
    made.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(heads), "/Transpose_output_0"))
    base = open_base(save(made, tmp_path / "base.onnx"))
    with pytest.raises(
        lf.LoraFormatError, match=r"LF-608  a product of it and a constant was .* as /Transpose_output_0"
    ):
        merge(lf.Adapter(PAIR), base, tmp_path / "out.onnx")
