"""Every operator and every kind of update: what merge and attach make of a graph is the graph with W' in W's place."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import updates
from graphs import model, outputs, run, save, session, stored
from onnx import numpy_helper

from loraformat import Adapter, Hints, LoraFormatError, Placement, Replace, Update, digest
from loraformat.base import Options
from loraformat.registry import open_base
from loraformat.testing import relative_error
from loraformat.verbs.merge import prepare

KEY = "m.q.weight"
LINEAR = "out,in"

# name → (graph, how the parameter lies, the parameter's shape, the stored tensor of a parameter)
OPERATORS = {
    "MatMul": (
        'g (float[N,5] x) => (float[N,7] y) <float[5,7] w> { ["/m/q/MatMul"] y = MatMul(x, w) }',
        (LINEAR, (7, 5), np.transpose),
    ),
    "MatMul and bias": (
        """g (float[T,N,5] x) => (float[T,N,7] y) <float[5,7] w, float[7] b>
           { ["/m/q/MatMul"] h = MatMul(x, w)  y = Add(b, h) }""",
        (LINEAR, (7, 5), np.transpose),
    ),
    "MatMul on the left": (
        'g (float[T,5,N] x) => (float[T,7,N] y) <float[7,5] w> { ["/m/q/MatMul"] y = MatMul(w, x) }',
        (LINEAR, (7, 5), np.asarray),
    ),
    "MatMul of experts": (
        'g (float[3,N,5] x) => (float[3,N,7] y) <float[3,5,7] w> { ["/m/q/MatMul"] y = MatMul(x, w) }',
        ("batch,out,in", (3, 7, 5), lambda p: p.transpose(0, 2, 1)),
    ),
    "MatMul of experts on the left, whose axes lie otherwise": (
        'g (float[3,5,N] x) => (float[3,7,N] y) <float[3,7,5] w> { ["/m/q/MatMul"] y = MatMul(w, x) }',
        ("batch,in,out", (3, 5, 7), lambda p: p.transpose(0, 2, 1)),
    ),
    "Gemm": (
        """g (float[N,5] x) => (float[N,7] y) <float[7,5] w, float[7] b>
           { ["/m/q/Gemm"] y = Gemm <transB = 1, alpha = 0.7, beta = -1.3> (x, w, b) }""",
        ("in,out", (5, 7), np.transpose),
    ),
    "Gemm on the left": (
        """g (float[N,5] x) => (float[7,N] y) <float[5,7] w, float[7,1] b>
           { ["/m/q/Gemm"] y = Gemm <transA = 1, transB = 1, alpha = 0.7> (w, x, b) }""",
        (LINEAR, (7, 5), np.transpose),
    ),
    "Gemm that turns x": (
        """g (float[5,N] x) => (float[N,7] y) <float[5,7] w, float[7] b>
           { ["/m/q/Gemm"] y = Gemm <transA = 1> (x, w, b) }""",
        (LINEAR, (7, 5), np.transpose),
    ),
    "FusedMatMul": (
        """g (float[T,5,N] x) => (float[T,N,7] y) <float[7,5] w>
           { ["/m/q/FusedMatMul"] y = com.microsoft.FusedMatMul <transA = 1, transB = 1, alpha = 0.6> (x, w) }""",
        (LINEAR, (7, 5), np.asarray),
    ),
    "FusedMatMul of a turned batch": (
        """g (float[N,T,5] x) => (float[T,N,7] y) <float[T,5,7] w>
           { ["/m/q/FusedMatMul"] y = com.microsoft.FusedMatMul <transBatchA = 1> (x, w) }""".replace("T", "4"),
        ("batch,out,in", (4, 7, 5), lambda p: p.transpose(0, 2, 1)),
    ),
    "Conv": (
        """g (float[N,5,11,9] x) => (float[N,7,A,B] y) <float[7,5,3,2] w, float[7] b>
           { ["/m/q/Conv"] y = Conv <strides = [2, 1], dilations = [1, 3], pads = [1, 0, 2, 1]> (x, w, b) }""",
        ("out,in,in,in", (7, 5, 3, 2), np.asarray),
    ),
    "Conv that pads by itself": (
        """g (float[N,5,11] x) => (float[N,7,A] y) <float[7,5,4] w>
           { ["/m/q/Conv"] y = Conv <auto_pad = "SAME_LOWER", strides = [3], kernel_shape = [4]> (x, w) }""",
        ("out,in,in", (7, 5, 4), np.asarray),
    ),
    "Conv of a kernel that lies otherwise": (
        'g (float[N,5,8,9] x) => (float[N,7,A,B] y) <float[7,5,3,2] w> { ["/m/q/Conv"] y = Conv(x, w) }',
        ("in1,in2,in0,out", (3, 2, 5, 7), lambda p: p.transpose(3, 2, 0, 1)),
    ),
    "ConvTranspose": (
        """g (float[N,5,4,6] x) => (float[N,7,A,B] y) <float[5,7,3,2] w, float[7] b>
           { ["/m/q/ConvTranspose"] y = ConvTranspose
             <strides = [2, 3], pads = [1, 0, 1, 1], output_padding = [1, 2], dilations = [1, 2]> (x, w, b) }""",
        ("in,out,in,in", (5, 7, 3, 2), np.asarray),
    ),
    "Gather": (
        'g (int64[N,3] x) => (float[N,3,7] y) <float[9,7] w> { ["/m/q/Gather"] y = Gather(w, x) }',
        ("in,out", (9, 7), np.asarray),
    ),
    "Gather with its axis counted from the end": (
        'g (int64[N,3] x) => (float[N,3,7] y) <float[9,7] w> { ["/m/q/Gather"] y = Gather <axis = -2> (w, x) }',
        ("in,out", (9, 7), np.asarray),
    ),
    "Einsum of heads": (
        """g (float[N,T,5] x) => (float[N,T,3,7] y) <float[5,3,7] w>
           { ["/m/q/Einsum"] y = Einsum <equation = "abc,cde->abde"> (x, w) }""",
        (LINEAR, (21, 5), lambda p: p.T.reshape(5, 3, 7)),
    ),
    "Einsum of experts": (
        """g (float[N,3,5] x) => (float[N,3,7] y) <float[5,3,7] w>
           { ["/m/q/Einsum"] y = Einsum <equation = "bni,ino->bno"> (x, w) }""",
        ("batch,out,in", (3, 7, 5), lambda p: p.transpose(2, 0, 1)),
    ),
    "Einsum with the weight first, and dots": (
        """g (float[N,T,5,2] x) => (float[N,T,7] y) <float[2,7,5] w>
           { ["/m/q/Einsum"] y = Einsum <equation = "joi,...ij->...o"> (w, x) }""",
        ("in,out,in", (2, 7, 5), np.asarray),
    ),
    "a weight in a Constant": (
        """g (float[N,5] x) => (float[N,7] y) <float[7,5] w>
           { c = Identity(w)  t = Transpose(c)  ["/m/q/MatMul"] y = MatMul(x, t) }""",
        (LINEAR, (7, 5), np.asarray),
    ),
    "both bodies of an If": (
        """g (float[N,5] x, bool c) => (float[N,7] y) <float[5,7] w, float[7] b>
           { y = If (c) <then_branch = a () => (float[N,7] p) { ["/m/q/MatMul"] h = MatMul(x, w)  p = Add(h, b) },
                         else_branch = e () => (float[N,7] q) { ["/m/q_1/MatMul"] q = MatMul(x, w) }> }""",
        (LINEAR, (7, 5), np.transpose),
    ),
    "the body of an If in the body of a Loop": (
        """g (float[N,7] x, bool c) => (float[N,7] y) <float[7,7] w>
           { n = Constant <value_int = 2> ()
             y = Loop (n, , x) <body = l (int64 i, bool k, float[N,7] s) => (bool o, float[N,7] u)
               { o = Identity(k)
                 u = If (c) <then_branch = a () => (float[N,7] p) { ["/m/q/MatMul"] h = MatMul(s, w)  p = Tanh(h) },
                             else_branch = e () => (float[N,7] q) { q = Neg(s) }> }> }""",
        (LINEAR, (7, 7), np.transpose),
    ),
    "the body of a Scan": (
        """g (float[4,5] x, float[7] z) => (float[7] e, float[4,7] y) <float[5,7] w>
           { e, y = Scan <num_scan_inputs = 1, body = s (float[7] a, float[5] r) => (float[7] b, float[7] o)
               { ["/m/q/MatMul"] h = MatMul(r, w)  b = Add(a, h)  o = Tanh(b) }> (z, x) }""",
        (LINEAR, (7, 5), np.transpose),
    ),
}
THOROUGH = ("MatMul", "MatMul of experts", "Conv of a kernel that lies otherwise", "ConvTranspose", "Gather")
"""Where every kind is tried; elsewhere those that meet the operator itself, and one that needs the parameter's axes."""


def kinds(name):
    spec = OPERATORS[name][1][0]
    if name not in THOROUGH:
        return ("lora", "dora", "replace", *(("shared lora",) if "batch" in spec else ()))
    without = {"loha", "lokr"} if "batch" in spec else {"shared lora"}
    return (*(updates.MATRIX.keys() - without), *(updates.KERNEL if spec.count("in") > 2 else ()))


CASES = [(name, kind) for name in OPERATORS for kind in sorted(kinds(name))]
every_case = pytest.mark.parametrize(("name", "kind"), CASES)


def given(name, kind, tmp_path):
    """(base, adapter, what the graph computes with W' in W's place)."""
    text, (spec, shape, lay) = OPERATORS[name]
    base = save(model(text), tmp_path / "base.onnx")
    place = Placement.of(shape, spec)
    update = updates.made(kind, place)
    weight = stored(base)["w"]
    parameter = np.empty(shape, np.float32)
    index = np.arange(parameter.size).reshape(shape)
    parameter.reshape(-1)[lay(index).reshape(-1)] = weight.reshape(-1)
    np.testing.assert_array_equal(lay(parameter), weight)
    wanted = lay(update.apply(parameter))
    truth = onnx.load(base)
    for tensor in truth.graph.initializer:
        if tensor.name == "w":
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(wanted), "w"))
    return base, Adapter({KEY: update}), run(save(truth, tmp_path / "truth.onnx"), optimise=False)


def put(verb, base, adapter, out, **options):
    opened = open_base(base)
    plan = prepare(verb, [("default", adapter)], opened, Options(out, **options))
    opened.apply(plan)
    onnx.checker.check_model(out, full_check=True)
    return out


def distance(found, wanted):
    return max(relative_error(found[name], wanted[name]) for name in wanted)


@every_case
def test_merge_and_attach_compute_with_the_changed_weight(name, kind, tmp_path):
    base, adapter, truth = given(name, kind, tmp_path)
    assert distance(run(base), truth) > 0.02
    merged = put("merge", base, adapter, tmp_path / "merged.onnx")
    assert distance(run(merged), truth) <= 4e-6
    attached = put("attach", base, adapter, tmp_path / "attached.onnx")
    assert distance(run(attached, optimise=False), truth) <= 4e-6
    running = session(attached, optimised=tmp_path / "optimised.onnx")
    assert distance(outputs(running), truth) <= 4e-6
    assert list(constant_nodes(onnx.load(tmp_path / "optimised.onnx").graph)) == []
    check_taken_out(attached, base, adapter, tmp_path)


def check_taken_out(attached, base, adapter, tmp_path):
    """The adapter comes out as it went in, placed as it was, and the model is what it was."""
    ((called, again),) = open_base(attached).extract()
    assert (called, digest(again)) == ("default", digest(adapter))
    assert {key: u.placement for key, u in again.items()} == {key: u.placement for key, u in adapter.items()}
    open_base(attached).detach(tmp_path / "detached.onnx")
    assert (tmp_path / "detached.onnx").read_bytes() == base.read_bytes()


PREFOLDED = ("Gemm", "MatMul on the left", "Conv", "ConvTranspose", "Gather", "Einsum of heads", "both bodies of an If")


@pytest.mark.parametrize("name", PREFOLDED)
@pytest.mark.parametrize("kind", ["lora", "dora", "replace"])
def test_a_prefolded_attachment_holds_its_constants_ready(name, kind, tmp_path):
    base, adapter, truth = given(name, kind, tmp_path)
    out = put("attach", base, adapter, tmp_path / "out.onnx", prefold=True)
    assert distance(run(out, optimise=False), truth) <= 4e-6
    nodes = [node for node in every_node(onnx.load(out).graph) if node.name.startswith("lora/")]
    assert not {node.op_type for node in nodes} & {"Div", "Sub", "Reshape", "Transpose"} - BIASES.get(name, set())
    open_base(out).detach(tmp_path / "detached.onnx")
    assert (tmp_path / "detached.onnx").read_bytes() == base.read_bytes()
    with pytest.raises(LoraFormatError, match="LF-613  the adapter was folded"):
        open_base(out).extract()


BIASES = {"Conv": {"Reshape"}, "ConvTranspose": {"Reshape"}}
"""What is left for a bias under a magnitude: it is the model's own, and is computed beside it."""


def every_node(graph):
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from every_node(attribute.g)


def constant_nodes(graph, outer=frozenset()):
    """Operators all of whose inputs are stored."""
    known = outer | {t.name for t in graph.initializer}
    for node in graph.node:
        inner = [a.g for a in node.attribute if a.HasField("g")]
        if node.op_type != "Constant" and not inner and all(name in known for name in node.input if name):
            yield node.op_type, node.name
        for body in inner:
            yield from constant_nodes(body, known)


# Vectors.

VECTORS = {
    "the bias of an Add": (
        """g (float[N,5] x) => (float[N,7] y) <float[5,7] w, float[7] "m.q.v">
           { h = MatMul(x, w)  y = Add("m.q.v", h) }""",
        np.asarray,
    ),
    "a bias for a Conv's channels": (
        """g (float[N,5,9] x) => (float[N,7,9] y) <float[7,5,1] w, float[7,1] "m.q.v">
           { h = Conv(x, w)  y = Add(h, "m.q.v") }""",
        lambda p: p.reshape(7, 1),
    ),
    "the bias of a Gemm": (
        """g (float[N,5] x) => (float[N,7] y) <float[5,7] w, float[7] "m.q.v">
           { y = Gemm <beta = 0.3> (x, w, "m.q.v") }""",
        np.asarray,
    ),
    "the bias of a Conv": (
        'g (float[N,5,9] x) => (float[N,7,9] y) <float[7,5,1] w, float[7] "m.q.v"> { y = Conv(x, w, "m.q.v") }',
        np.asarray,
    ),
    "the scale of a norm": (
        """g (float[N,7] x) => (float[N,7] y) <float[7] "m.q.v", float[7] b>
           { y = LayerNormalization(x, "m.q.v", b) }""",
        np.asarray,
    ),
    "the bias of a norm, which is its scale too": (
        """g (float[N,7] x) => (float[N,7] y) <float[7] s, float[7] "m.q.v">
           { h = LayerNormalization(x, s, "m.q.v")  y = Add(h, s) }""",
        np.asarray,
    ),
    "a factor": (
        'g (float[N,7] x) => (float[N,7] y) <float[7] "m.q.v"> { ["/m/q/Mul"] y = Mul("m.q.v", x) }',
        np.asarray,
    ),
    "behind Identity": (
        'g (float[N,7] x) => (float[N,7] y) <float[7] "m.q.v"> { v = Identity("m.q.v")  y = Mul(x, v) }',
        np.asarray,
    ),
}


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("kind", updates.VECTOR)
def test_a_vector_changes_like_a_weight(name, kind, tmp_path):
    text, lay = VECTORS[name]
    base = save(model(text), tmp_path / "base.onnx")
    update = updates.made(kind, Placement((7,), (0,), ()))
    truth = onnx.load(base)
    tensor = next(t for t in truth.graph.initializer if t.name == "m.q.v")
    wanted = lay(update.apply(numpy_helper.to_array(tensor).reshape(7)))
    tensor.CopyFrom(numpy_helper.from_array(wanted, "m.q.v"))
    truth = run(save(truth, tmp_path / "truth.onnx"), optimise=False)
    adapter = Adapter({"m.q.v": replace(update, placement=None)})
    for verb in ("merge", "attach"):
        out = put(verb, base, adapter, tmp_path / f"{verb}.onnx")
        running = session(out, optimised=tmp_path / "optimised.onnx")
        assert distance(outputs(running), truth) <= 2e-6
        assert list(constant_nodes(onnx.load(tmp_path / "optimised.onnx").graph)) == []
    check_taken_out(out, base, adapter, tmp_path)


def test_vectors_are_found_by_what_their_modules_are_called(tmp_path):
    text = """g (float[N,5] x) => (float[N,7] y) <float[5,7] a, float[7] b, float[7] c, float[7] d>
      { ["/m/q/MatMul"] h = MatMul(x, a)  ["/m/q/Add"] s = Add(b, h)
        ["/m/norm/LayerNormalization"] y = LayerNormalization(s, c, d) }"""
    keys = {"m.q.weight": "a", "m.q.bias": "b", "m.norm.weight": "c", "m.norm.bias": "d"}
    base = open_base(save(model(text), tmp_path / "base.onnx"))
    shapes = {key: (7, 5) if name == "a" else (7,) for key, name in keys.items()}
    given = Adapter({key: Update((Replace(updates.normal(*shape)),)) for key, shape in shapes.items()})
    found = base.resolve(given, Hints()).require().targets
    assert {key: places[0].weight for key, places in found.items()} == keys


def test_a_vector_that_is_scale_and_bias_of_one_norm_is_two_parameters(tmp_path):
    text = """g (float[N,7] x) => (float[N,7] y) <float[7] "m.q.v">
      { ["n"] y = LayerNormalization(x, "m.q.v", "m.q.v") }"""
    base = save(model(text), tmp_path / "base.onnx")
    places = [site.parameter for site in open_base(base).index.uses("m.q.v")]
    assert places == ["weight", "bias"]
