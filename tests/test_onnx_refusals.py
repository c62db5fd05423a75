"""What is not rewritten is refused, by the reason, before anything is written."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
from graphs import adapter, feeds, inputs, lora, model, run, save, session
from onnx import helper, numpy_helper

from loraformat import Adapter, Hints, LoraFormatError, Update
from loraformat.axes import Placement
from loraformat.parts import Lora, Replace, Rows
from loraformat.registry import open_base
from loraformat.testing import relative_error
from loraformat.verbs.merge import attach, merge

KEY = "m.q.weight"
VERBS = {"attach": attach, "merge": merge}
both_verbs = pytest.mark.parametrize("verb", VERBS)


def refused(made, tmp_path, *, verb="merge", update=None, **hints):
    """The error of a verb, which leaves nothing in the folder."""
    base = save(made, tmp_path / "base.onnx")
    with pytest.raises(LoraFormatError) as error:
        VERBS[verb](update or adapter({KEY: (7, 5)}), open_base(base), tmp_path / "out.onnx", Hints(**hints))
    assert [p.name for p in tmp_path.iterdir()] == ["base.onnx"]
    return str(error.value)


BODIES = {
    "a convolution of 5 groups": """
        g (float[N,5,3] x) => (float[N,5,3] y) <float[5,1,1] w> { ["/m/q/Conv"] y = Conv <group = 5> (x, w) }""",
    "a convolution of 2 groups": """
        g (float[N,6,3] x) => (float[N,4,3] y) <float[6,2,1] w>
        { ["/m/q/ConvTranspose"] y = ConvTranspose <group = 2> (x, w) }""",
    r"does not take rows of a table: axis 1 of \[5, 7\]": """
        g (int64[N] x) => (float[5,N] y) <float[5,7] w> { ["/m/q/Gather"] y = Gather <axis = 1> (w, x) }""",
    r"does not take rows of a table: axis 0 of \[5, 7, 2\]": """
        g (int64[N] x) => (float[N,7,2] y) <float[5,7,2] w> { ["/m/q/Gather"] y = Gather(w, x) }""",
    "is not of the form": """
        g (float[N,5] x) => (float[N,7] y) <float[5,7] w>
        { ["/m/q/Einsum"] y = Einsum <equation = "ab,bc"> (x, w) }""",
    "names the axes of its weight not one by one": """
        g (float[N,5] x) => (float[N] y) <float[5,5] w>
        { ["/m/q/Einsum"] y = Einsum <equation = "ab,bb->a"> (x, w) }""",
    "sums over c on one side only": """
        g (float[N,5] x) => (float[N] y) <float[5,7] w>
        { ["/m/q/Einsum"] y = Einsum <equation = "ab,bc->a"> (x, w) }""",
    "gives its weight no in axis": """
        g (float[N,5] x) => (float[N,5,7] y) <float[5,7] w>
        { ["/m/q/Einsum"] y = Einsum <equation = "ab,bc->abc"> (x, w) }""",
    "transBatchB moves the batch axes": """
        g (float[3,N,5] x) => (float[3,N,7] y) <float[5,3,7] w>
        { ["/m/q/FusedMatMul"] y = com.microsoft.FusedMatMul <transBatchB = 1> (x, w) }""",
    "its weight is INT32": """
        g (int32[N,5] x) => (int32[N,7] y) <int32[5,7] w> { ["/m/q/MatMul"] y = MatMul(x, w) }""",
    "the sums of MatMulInteger are not scaled as ONNX Runtime's quantiser does it": """
        g (float[N,5] x, float[1] s) => (float[N,7] y) <int8[5,7] w, int8 z>
        { a, xs, xz = DynamicQuantizeLinear(x)  ["/m/q/MatMul_quant"] i = MatMulInteger(a, w, xz, z)
          f = Cast <to = 1> (i)  y = Mul(f, s) }""",
    "the sums of MatMulInteger are not scaled": """
        g (float[N,5] x) => (float[N,7] y, int32[N,7] i) <int8[5,7] w, int8 z, float s>
        { a, xs, xz = DynamicQuantizeLinear(x)  ["/m/q/MatMul_quant"] i = MatMulInteger(a, w, xz, z)
          f = Cast <to = 1> (i)  t = Mul(xs, s)  y = Mul(f, t) }""",
    "MatMulInteger takes its x in 8 bits, and no float of it is at hand": """
        g (uint8[N,5] x) => (int32[N,7] y) <int8[5,7] w> { ["/m/q/MatMul_quant"] y = MatMulInteger(x, w) }""",
    "QLinearMatMul gives 8 bits, which QLinearAdd reads: a change would be rounded to them": """
        g (float[N,5] x) => (uint8[N,7] y) <int8[5,7] w, float s, int8 z, uint8 u, uint8[7] b>
        { a = QuantizeLinear(x, s, u)  ["/m/q/MatMul_quant"] c = QLinearMatMul(a, s, u, w, s, z, s, u)
          y = com.microsoft.QLinearAdd(c, s, u, b, s, u, s, u) }""",
    "QLinearMatMul gives 8 bits, which more than one node reads": """
        g (float[N,5] x) => (uint8[N,7] c) <int8[5,7] w, float s, int8 z, uint8 u>
        { a = QuantizeLinear(x, s, u)  ["/m/q/MatMul_quant"] c = QLinearMatMul(a, s, u, w, s, z, s, u) }""",
    r"it multiplies by the weight the other way": """
        g (float[N,7] x) => (float[N,32] y) <uint8[112] w, float[14] s>
        { ["/m/q/MatMul_Q4"] y = com.microsoft.MatMulBnb4
          <K = 32, N = 7, block_size = 16, quant_type = 1, transB = 0> (x, w, s) }""",
    "Cast lies between its weight and it, and no scale": """
        g (float[N,5] x) => (float[N,7] y) <int8[5,7] w, float[7] s>
        { v = Cast <to = 1> (w)  ["/m/q/MatMul"] h = MatMul(x, v)  y = Mul(h, s) }""",
    "Cast lies between its weight and it, which makes integers of it": """
        g (int32[N,5] x) => (int32[N,7] y) <float[5,7] w>
        { v = Cast <to = 6> (w)  ["/m/q/MatMul"] y = MatMul(x, v) }""",
    "Relu lies between its weight and it": """
        g (float[N,5] x) => (float[N,7] y) <int8[5,7] w, float[5,1] s>
        { v = Cast <to = 1> (w)  u = Mul(v, s)  t = Relu(u)  ["/m/q/MatMul"] y = MatMul(x, t) }""",
    "Dropout lies between its weight and it": """
        g (float[N,5] x) => (float[N,7] y) <float[5,7] w> { v = Dropout(w)  ["/m/q/MatMul"] y = MatMul(x, v) }""",
    "Mul lies between its weight and it": """
        g (float[N,5] x) => (float[N,7] y) <float[5,7] w, float s>
        { u = Mul(w, s)  v = Identity(u)  ["/m/q/MatMul"] y = MatMul(x, v) }""",
    "Reshape lies between its weight and it": """
        g (float[N,5] x, int64[2] s) => (float[N,7] y) <float[35] w, int64[2] u>
        { r = Add(u, u)  v = Reshape(w, r)  ["/m/q/MatMul"] y = MatMul(x, v) }""",
    "Mul lies between its weight and it, which comes after a scale": """
        g (float[N,5] x) => (float[N,7] y) <float[5,7] w, float[7] s>
        { u = Mul(s, w)  ["/m/q/MatMul"] y = MatMul(x, u) }""",
    r"has perm \[0, 2\] of 2 axes": """
        g (float[N,5] x) => (float[N,7] y) <float[5,7] w>
        { ["t"] v = Transpose <perm = [0, 2]> (w)  ["/m/q/MatMul"] y = MatMul(x, v) }""",
    "its uses read the weight in two orientations": """
        g (float[N,6] x) => (float[N,6] y) <float[6,6] w>
        { v = Transpose(w)  ["/m/q/MatMul"] h = MatMul(x, w)  ["/m/q/MatMul_1"] y = MatMul(h, v) }""",
    "its uses read the weight in two orientations, or scale it": """
        g (float[N,6] x) => (float[N,6] y) <float[6,6] w>
        { ["/m/q/Gemm"] h = Gemm <alpha = 2.0> (x, w)  ["/m/q_1/Gemm"] y = Gemm(h, w) }""",
}


@both_verbs
@pytest.mark.parametrize(("reason", "text"), BODIES.items(), ids=BODIES.keys())
def test_a_use_that_cannot_be_rewritten_is_refused_by_its_reason(verb, reason, text, tmp_path):
    said = refused(model(text), tmp_path, verb=verb, update=adapter({KEY: (6, 6)}))
    assert said.startswith("LF-608")
    assert re.search(reason.partition(", which")[0], said), said


OTHERS = {
    r"Add takes it as it is, \[3, 5\]": """
        g (float[N,3,5] x) => (float[N,3,5] y) <float[3,5] w> { ["/m/Add"] y = Add(x, w) }""",
    r"\[1, 8, 5\] is no weight of 4 gates of 4": """
        g (float[T,N,5] x) => (float[T,1,N,4] y) <float[8,5] w, float[1,16,4] r, int64[1] s = {0}>
        { v = Unsqueeze(w, s)
          ["/m/q/LSTM"] y = LSTM <hidden_size = 4> (x, v, r) }""",
}
"""Operators of no module's: the target names the tensor."""


@both_verbs
@pytest.mark.parametrize(("reason", "text"), OTHERS.items(), ids=OTHERS.keys())
def test_a_tensor_that_another_operator_takes_is_refused_by_its_reason(verb, reason, text, tmp_path):
    said = refused(model(text), tmp_path, verb=verb, names={KEY: "w"})
    assert said.startswith("LF-608")
    assert re.search(reason, said), said


def test_a_tensor_that_hides_another_of_its_name_is_a_fault_of_the_base(tmp_path):
    made = model("""g (float[N,1] x, bool c) => (float[N,2] y) <float[1,2] w>
      { ["choose"] y = If (c) <then_branch = a () => (float[N,2] p) <float[1,2] w = {0, 0}> { p = MatMul(x, w) },
                               else_branch = e () => (float[N,2] r) { r = MatMul(x, w) }> }""")
    with pytest.raises(LoraFormatError, match="LF-610  the value w hides one of the same name"):
        open_base(save(made, tmp_path / "base.onnx"))


@both_verbs
def test_an_operator_of_another_domain_is_another_operator(verb, tmp_path):
    made = model('g (float[N,5] x) => (float[N,7] y) <float[5,7] w> { ["/m/q/MatMul"] y = acme.MatMul(x, w) }')
    assert "LF-608  /m/q/MatMul: acme.MatMul is not rewritten yet" in refused(made, tmp_path, verb=verb)


@both_verbs
def test_a_transposition_of_another_domain_is_not_followed(verb, tmp_path):
    made = model("""g (float[N,5] x) => (float[N,7] y) <float[7,5] w>
      { v = acme.Transpose(w)  ["/m/q/MatMul"] y = MatMul(x, v) }""")
    assert "Transpose lies between its weight and it" in refused(made, tmp_path, verb=verb)


def test_tensors_of_one_name_in_two_branches_are_two_tensors(tmp_path):
    made = model("""g (float[N,1] x, bool c) => (float[N,2] y)
      { ["choose"] y = If (c) <then_branch = a () => (float[N,2] p) <float[1,2] w = {0, 0}> { p = MatMul(x, w) },
                               else_branch = e () => (float[N,2] r) <float[1,2] w = {1, 1}> { r = MatMul(x, w) }> }""")
    base = open_base(save(made, tmp_path / "base.onnx"))
    assert {name: base.read(name).max() for name in base.parameters()} == {
        "/choose.then_branch/w": 0,
        "/choose.else_branch/w": 1,
    }


@both_verbs
@pytest.mark.parametrize("how", ["a constant of the function", "an argument of the call"])
def test_a_weight_used_inside_a_function_is_refused(verb, how, tmp_path):
    weight = numpy_helper.from_array(np.ones((5, 7), np.float32), KEY)
    constant = [helper.make_node("Constant", [], ["w"], value=weight)] if how.startswith("a constant") else []
    inputs = ["x"] if constant else ["x", "w"]
    body = [*constant, helper.make_node("MatMul", ["x", "w"], ["y"], "/m/q/MatMul")]
    opsets = [helper.make_opsetid("", 18)]
    made = model(f'g (float[N,5] x) => (float[N,7] y) <float[5,7] "{KEY}"> {{ y = own.Linear(x, "{KEY}") }}')
    del made.graph.node[0].input[len(inputs) :]
    made.functions.append(helper.make_function("own", "Linear", inputs, ["y"], body, opsets))
    made.opset_import.append(helper.make_opsetid("own", 1))
    said = refused(made, tmp_path, verb=verb)
    assert said.startswith("LF-608")
    assert (
        "inside function Linear: give --inline"
        if constant
        else "own.Linear is a function of the model's own: give --inline"
    ) in said


@both_verbs
def test_a_weight_used_inside_a_graph_inside_a_function_is_refused(verb, tmp_path):
    weight = numpy_helper.from_array(np.ones((5, 7), np.float32), "w")
    bodies = [
        helper.make_graph([node], name, [], [helper.make_tensor_value_info(node.output[0], 1, None)])
        for name, node in (
            ("a", helper.make_node("MatMul", ["x", KEY], ["p"], "/m/q/MatMul")),
            ("e", helper.make_node("MatMul", ["x", KEY], ["r"], "/m/q/MatMul_1")),
        )
    ]
    body = [
        helper.make_node("Constant", [], [KEY], value=weight),
        helper.make_node("If", ["c"], ["y"], "if", then_branch=bodies[0], else_branch=bodies[1]),
    ]
    made = model("g (float[N,5] x, bool c) => (float[N,7] y) { y = own.Choose(x, c) }")
    opsets = [helper.make_opsetid("", 18)]
    made.functions.append(helper.make_function("own", "Choose", ["x", "c"], ["y"], body, opsets))
    made.opset_import.append(helper.make_opsetid("own", 1))
    said = refused(made, tmp_path, verb=verb)
    assert "inside function Choose/if.else_branch: give --inline" in said


@both_verbs
def test_a_sparse_weight_is_refused(verb, tmp_path):
    made = model('g (float[N,5] x) => (float[N,7] y) { ["/m/q/MatMul"] y = MatMul(x, w) }')
    values = helper.make_tensor("w", onnx.TensorProto.FLOAT, [2], [1.5, 2.5])
    indices = helper.make_tensor("i", onnx.TensorProto.INT64, [2], [3, 9])
    made.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [5, 7]))
    assert "its weight is stored sparse" in refused(made, tmp_path, verb=verb)


def test_a_cycle_of_identities_is_no_weight(tmp_path):
    made = model("""g (float[N,5] x) => (float[N,7] y)
      { u = Identity(v)  v = Identity(u)  ["/m/q/MatMul"] y = MatMul(x, v) }""")
    assert "LF-602" in refused(made, tmp_path)


UNSOUND = {
    "two initializers of one name": lambda g: g.initializer.append(g.initializer[0]),
    "an initializer that a node computes": lambda g: g.node.append(helper.make_node("Relu", ["x"], ["w"])),
    "two nodes that compute one value": lambda g: g.node.append(helper.make_node("Relu", ["x"], ["y"])),
}


@pytest.mark.parametrize("spoil", UNSOUND.values(), ids=UNSOUND.keys())
def test_a_name_defined_twice_is_a_fault_of_the_base(spoil, tmp_path):
    made = model('g (float[N,5] x) => (float[N,7] y) <float[5,7] w> { ["/m/q/MatMul"] y = MatMul(x, w) }')
    spoil(made.graph)
    assert "LF-610" in refused(made, tmp_path)


@pytest.mark.parametrize("opset", [1, 6])
def test_an_opset_before_7_is_refused(opset, tmp_path):
    made = model("g (float[N,5] x) => (float[N,7] y) <float[5,7] w> { y = MatMul(x, w) }", opset=opset)
    assert f"LF-610  {tmp_path / 'base.onnx'} uses opset {opset}" in refused(made, tmp_path)


FILES = {
    "nothing": lambda data: b"",
    "a truncated model": lambda data: data[:-9],
    "a model's first bytes": lambda data: data[:3],
    "text": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "zeros": lambda data: bytes(64),
    "another protocol buffer": lambda data: b"\x0a\x03abc",
}


@pytest.mark.parametrize("spoil", FILES.values(), ids=FILES.keys())
def test_a_file_that_is_no_model_is_a_fault_of_the_base(spoil, tmp_path):
    made = model("g (float[N,5] x) => (float[N,7] y) <float[5,7] w> { y = MatMul(x, w) }")
    path = tmp_path / "base.onnx"
    path.write_bytes(spoil(made.SerializeToString()))
    with pytest.raises(LoraFormatError, match="LF-610"):
        open_base(path)


def test_a_model_without_nodes_and_tensors_is_a_fault_of_the_base(tmp_path):
    with pytest.raises(LoraFormatError, match="LF-610"):
        open_base(save(model("g (float[N,5] x) => (float[N,5] x) {}"), tmp_path / "base.onnx"))


def test_a_tensor_with_too_few_values_is_a_fault_of_the_base(tmp_path):
    made = model('g (float[N,5] x) => (float[N,7] y) <float[5,7] w> { ["/m/q/MatMul"] y = MatMul(x, w) }')
    made.graph.initializer[0].raw_data = made.graph.initializer[0].raw_data[:-4]
    assert "LF-610" in refused(made, tmp_path)


def test_every_obstacle_is_told_at_once(tmp_path):
    text = """g (float[N,6,5] x) => (float[N,6,5] y) <float[5,5] w, float[6,3,1] k>
      { ["/m/q/MatMul"] h = MatMul(x, w)  ["/m/k/Conv"] y = Conv <group = 2> (h, k) }"""
    said = refused(model(text), tmp_path, update=adapter({KEY: (7, 5), "m.k.weight": (3, 7)}))
    assert ("LF-606" in said, "LF-608" in said) == (True, True)


def test_an_embedding_update_does_not_act_on_a_product(tmp_path):
    made = model('g (float[N,9] x) => (float[N,6] y) <float[9,6] "e.weight"> { y = MatMul(x, "e.weight") }')
    update = Adapter({"e.weight": Update(lora(6, 9).parts, op="embedding")})
    assert "an embedding's update cannot act on MatMul" in refused(made, tmp_path, update=update)


MATMUL = 'g (float[N,6] x) => (float[N,6] y) <float[6,6] w> { ["/m/q/MatMul"] y = MatMul(x, w) }'


@both_verbs
def test_a_square_tensor_that_replaces_a_weight_is_never_oriented_by_guess(verb, tmp_path):
    update = Adapter({KEY: Update((Replace(np.ones((6, 6), np.float32)),))})
    said = refused(model(MATMUL), tmp_path, verb=verb, update=update)
    assert said.startswith("LF-604  a tensor [6, 6] may be read as out,in or in,out")
    assert "--axes 'm.q.weight=out,in'" in said


@both_verbs
@pytest.mark.parametrize("shape", [(6, 7), (6,), (6, 6, 1)])
def test_a_tensor_that_is_no_such_matrix_is_refused(shape, verb, tmp_path):
    update = Adapter({KEY: Update((Replace(np.ones(shape, np.float32)),))})
    assert "LF-606" in refused(model(MATMUL), tmp_path, verb=verb, update=update)


@both_verbs
def test_rows_beyond_the_parameter_are_refused(verb, tmp_path):
    made = model('g (float[N,5] x) => (float[N,7] y) <float[5,7] w> { ["/m/q/MatMul"] y = MatMul(x, w) }')
    update = Adapter({KEY: Update((Rows(np.ones((1, 5), np.float32), np.array([7])),))})
    assert "LF-606" in refused(made, tmp_path, verb=verb, update=update)


def test_rows_are_merged_only_where_the_opset_cannot_set_them(tmp_path):
    made = model('g (float[N,5] x) => (float[N,7] y) <float[5,7] w> { ["/m/q/MatMul"] y = MatMul(x, w) }', opset=10)
    update = Adapter({KEY: Update((Rows(np.ones((1, 5), np.float32), np.array([6])),))})
    assert "LF-608  opset 10 has no operator" in refused(made, tmp_path, verb="attach", update=update)
    merge(update, open_base(tmp_path / "base.onnx"), tmp_path / "out.onnx")


@both_verbs
def test_axes_that_contradict_the_file_are_refused(verb, tmp_path):
    update = Adapter({KEY: lora(6, 6).placed(Placement((6, 6), (0,), (1,)))})
    assert "LF-605" in refused(model(MATMUL), tmp_path, verb=verb, update=update, axes={"q": "in,out"})


@both_verbs
def test_a_placement_of_another_tensor_is_refused(verb, tmp_path):
    update = Adapter({KEY: lora(6, 6).placed(Placement((6, 2, 3), (0,), (1, 2)))})
    made = model('g (float[N,6] x) => (float[N,7] y) <float[6,7] w> { ["/m/q/MatMul"] y = MatMul(x, w) }')
    assert "LF-606" in refused(made, tmp_path, verb=verb, update=update)


@both_verbs
def test_a_resized_vocabulary_does_not_fit_a_graph(verb, tmp_path):
    made = model('g (int64[N] i) => (float[N,6] y) <float[9,6] "e.weight"> { y = Gather("e.weight", i) }')
    update = Adapter({"e.weight": Update((Replace(np.ones((11, 6), np.float32), ("resize",)),))})
    said = refused(made, tmp_path, verb=verb, update=update)
    assert said.startswith("LF-606")
    assert "[9, 6] to [11, 6]" in said


def test_an_adapter_in_another_name_space_is_to_be_retargeted(tmp_path):
    made = model('g (float[N,5] x) => (float[N,7] y) <float[5,7] w> { ["/m/q/MatMul"] y = MatMul(x, w) }')
    update = Adapter(adapter({KEY: (7, 5)}).targets, names="mlx")
    assert "LF-602" in refused(made, tmp_path, update=update)


def test_what_a_caller_may_feed_stays_what_it_was(tmp_path):
    text = 'g (float[N,5] x) => (float[N,7] y) <float[5,7] w> { ["/m/q/MatMul"] y = MatMul(x, w) }'
    made = model(text)
    made.graph.input.append(helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [5, 7]))
    base = save(made, tmp_path / "base.onnx")
    update = adapter({KEY: (7, 5)})
    attach(update, open_base(base), tmp_path / "out.onnx")
    running = session(tmp_path / "out.onnx")
    assert [v.name for v in running.get_overridable_initializers()] == ["w"]
    other = np.random.default_rng(8).standard_normal((5, 7)).astype(np.float32)
    x = feeds(running)["x"]
    wanted = x @ (other + update[KEY].matrix().T)
    assert relative_error(running.run(["y"], {"x": x, "w": other})[0], wanted) <= 2e-6
    assert relative_error(run(tmp_path / "out.onnx")["y"], run(base)["y"]) > 0.1


@both_verbs
def test_a_stack_of_square_matrices_is_never_oriented_by_guess(verb, tmp_path):
    draw = np.random.default_rng(3)
    pair = (draw.standard_normal((3, *sizes)).astype(np.float32) for sizes in ((2, 6), (6, 2)))
    stack = Adapter({KEY: Update((Lora(*pair, 3.0, "alpha/r"),))})
    made = model('g (float[3,N,6] x) => (float[3,N,6] y) <float[3,6,6] w> { ["/m/q/MatMul"] y = MatMul(x, w) }')
    said = refused(made, tmp_path, verb=verb, update=stack)
    assert said.startswith("LF-604")
    (axes,) = re.findall(rf"--axes '{KEY}=(\S+)'", said)
    VERBS[verb](stack, open_base(tmp_path / "base.onnx"), tmp_path / "out.onnx", Hints(axes={KEY: axes}))


@both_verbs
def test_a_square_parameter_of_a_module_is_not_turned_by_what_peft_calls_its_out(verb, tmp_path):
    """PEFT takes a bare parameter's first axis for out; a module that computes x @ P gives the second."""
    draw = np.random.default_rng(4)
    pair = (draw.standard_normal(sizes).astype(np.float32) for sizes in ((2, 6), (6, 2)))
    placed = Update((Lora(*pair, 3.0, "alpha/r"),), Placement((6, 6), (0,), (1,)))
    made = model('g (float[N,6] x) => (float[N,6] y) <float[6,6] "m.gate"> { y = MatMul(x, "m.gate") }')
    said = refused(made, tmp_path, verb=verb, update=Adapter({"m.gate": placed}))
    assert said.startswith("LF-604")
    assert "merge into the checkpoint, then export" in said


TRANSPOSED, PLAIN = '{ t = Transpose("m.gate") y = MatMul(x, t) }', '{ y = MatMul(x, "m.gate") }'


@both_verbs
@pytest.mark.parametrize(("spec", "body"), [("out,in", TRANSPOSED), ("in,out", PLAIN), ("in,out", TRANSPOSED)])
def test_a_square_parameter_whose_out_is_the_operators_needs_no_word(spec, body, verb, tmp_path):
    """The first lies as its file says; no file of PEFT says the other ([in, out]) of a parameter that has no module."""
    draw = np.random.default_rng(4)
    a, b = (draw.standard_normal(sizes).astype(np.float32) for sizes in ((2, 6), (6, 2)))
    adapter = Adapter({"m.gate": Update((Lora(a, b, 3.0, "factor"),), Placement.of((6, 6), spec))})
    onnx.save(model(f'g (float[N,6] x) => (float[N,6] y) <float[6,6] "m.gate"> {body}'), tmp_path / "base.onnx")
    VERBS[verb](adapter, open_base(tmp_path / "base.onnx"), tmp_path / "out.onnx", Hints())
    old, new = (run(tmp_path / name)["y"] for name in ("base.onnx", "out.onnx"))
    assert relative_error(new, old + 3.0 * inputs(tmp_path / "base.onnx")["x"] @ (b @ a).T) < 1e-6


def test_a_compiled_part_is_told_where_a_target_is_not_found(tmp_path):
    made = model("""g (float[N,5] x) => (float[N,7] y)
      { y = com.microsoft.EPContext <embed_mode = 0, main_context = 1, ep_cache_context = "model.bin"> (x) }""")
    said = refused(made, tmp_path)
    assert said.startswith("LF-602")
    assert "1 parts of it are compiled (EPContext): attach before compiling" in said


def test_onnx_runtimes_own_format_is_refused_by_name(tmp_path):
    (tmp_path / "model.ort").write_bytes(b"\x20\0\0\0ORTM" + bytes(64))
    with pytest.raises(LoraFormatError, match=r"LF-601  model\.ort is in ONNX Runtime's own format"):
        open_base(tmp_path / "model.ort")


@both_verbs
def test_a_layout_of_one_processor_is_refused(verb, tmp_path):
    made = model("""g (float[N,16,8,8] x) => (float[N,32,8,8] y) <float[32,16,1,1] w>
      { ["/m/q/Conv"] y = Conv (x, w) }""")
    made.graph.node[0].domain = "com.microsoft.nchwc"
    said = refused(made, tmp_path, verb=verb, update=adapter({KEY: (32, 16)}))
    assert "com.microsoft.nchwc.Conv has its weight laid out for one processor: attach before optimising" in said
