"""The net over ONNX graphs has no hole: code that rewrites them wrongly turns a named check red (see ``mutants``)."""

from dataclasses import replace

import graphs
import numpy as np
import onnx
import onnxruntime
import test_onnx_attached as attached
import test_onnx_operators as operators
from mutants import net
from onnx import numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument
from test_mutants import alpha_is_the_scale

import loraformat as lf
from loraformat import axes, testing, updates
from loraformat_converters.onnx.attaching import beside, branches
from loraformat_converters.onnx.attaching.ends import Ends
from loraformat_converters.onnx.graph import einsum
from loraformat_converters.onnx.graph import index as onnx_index
from loraformat_converters.onnx.graph.nodes import Nodes

# Everything is square, the rank too: a mistake cannot hide behind a shape that does not fit.
GRAPH = """<ir_version: 10, opset_import: ["": 20]>
tiny (float[n, 6] x) => (float[n, 6] y) {
   h = Gemm <transB = 1> (x, wa, bias)
   y = MatMul (h, wb)
}"""


# The real checks.


def onnx_output(path, x):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"]).run(None, {"x": x})[0]


def onnx_tiny(verb):
    """The changed graph gives (x·(Wa + ΔWa)ᵀ + bias)·(Wb + ΔWb)ᵀ, computed beside it."""

    def check(tmp_path):
        draw = np.random.default_rng(1)
        wa, wb, x = (draw.standard_normal((6, 6)).astype(np.float32) for _ in range(3))
        bias = draw.standard_normal(6).astype(np.float32)
        pairs = [[draw.standard_normal(s).astype(np.float32) for s in ((6, 6), (6, 6))] for _ in range(2)]
        model = onnx.parser.parse_model(GRAPH)
        stored = {"wa": wa, "bias": bias, "wb": np.ascontiguousarray(wb.T)}
        model.graph.initializer.extend(numpy_helper.from_array(t, name) for name, t in stored.items())
        onnx.save(model, tmp_path / "base.onnx")
        updates = [lf.Update((lf.Lora(*ab, 9.0, "alpha/r"),)) for ab in pairs]
        adapter = lf.Adapter(dict(zip(("wa", "wb"), updates, strict=True)))
        verb(adapter, lf.open_base(tmp_path / "base.onnx"), tmp_path / "out.onnx")
        delta_a, delta_b = (1.5 * b @ a for a, b in pairs)
        wanted = (x @ (wa + delta_a).T + bias) @ (wb + delta_b).T
        assert testing.relative_error(onnx_output(tmp_path / "out.onnx", x), wanted) <= 1e-5

    return check


def onnx_operator(name, kind, verb="attach"):
    """One operator of ``test_onnx_operators`` computes with W'."""

    def check(tmp_path):
        base, adapter, truth = operators.given(name, kind, tmp_path)
        try:
            out = operators.put(verb, base, adapter, tmp_path / "out.onnx")
            assert operators.distance(graphs.run(out), truth) <= 4e-6
        except (onnx.shape_inference.InferenceError, InvalidArgument) as error:
            raise AssertionError("the graph is not even sound") from error
        operators.check_taken_out(out, base, adapter, tmp_path) if verb == "attach" else None

    return check


OPERATORS = [
    ("Gemm", "lora"), ("Gemm", "dora"), ("MatMul and bias", "dora"), ("MatMul of experts", "replace"), ("Conv", "lora"),
    ("Conv", "dora"), ("ConvTranspose", "lora"), ("Gather", "lora"), ("Einsum of experts", "lora"), ("MatMul", "rows"),
    ("Einsum of heads", "lora"), ("MatMul of experts", "everything"),
]  # fmt: skip

CHECKS = {
    **{f"onnx {kind} at {name}": onnx_operator(name, kind) for name, kind in OPERATORS},
    "onnx bias beside a magnitude": lambda tmp_path: (
        attached.test_a_magnitude_leaves_the_bias_alone_that_changes_beside_it("Gemm", False, "w", tmp_path)
    ),
    "onnx merge of experts": onnx_operator(
        "MatMul of experts on the left, whose axes lie otherwise", "replace", "merge"
    ),
    "onnx merge": onnx_tiny(lf.merge),
    "onnx attach": onnx_tiny(lf.attach),
}


# The mutants.


def trans_b_is_ignored(patch):
    whole = onnx_index.meaning

    def deaf(node, *rest):
        means = whole(node, *rest)
        return replace(means, out=means.in_, in_=means.out) if node.op_type == "Gemm" else means

    patch.setattr(onnx_index, "meaning", deaf)


def the_scale_is_dropped_in_attach(patch):
    whole = beside.factors

    def unscaled(make, change, *rest):
        kept = [replace(p, alpha=1.0, scale_rule="factor") if p.kind == "lora" else p for p in change.update.parts]
        return whole(make, replace(change, update=replace(change.update, parts=tuple(kept))), *rest)

    patch.setattr(beside, "factors", unscaled)


def the_factors_are_not_transposed_in_attach(patch):
    patch.setattr(Nodes, "turn", lambda self, value, *rest: value)


def the_factor_of_gemm_is_lost(patch):
    patch.setattr(onnx_index.Site, "factor", property(lambda self: 1.0, lambda self, value: None), raising=False)


def the_bias_is_rescaled_too(patch):
    whole = Ends._end
    patch.setattr(Ends, "_end", lambda self, site: replace(whole(self, site), bias=""))


def the_bias_is_read_as_it_was(patch):
    whole = Ends._end

    def stale(self, site):
        end = whole(self, site)
        return replace(end, bias=self.values.get(end.bias, end.bias))

    patch.setattr(Ends, "_end", stale)


def the_norm_is_of_the_base_alone(patch):
    whole = updates.Update.norms
    patch.setattr(
        updates.Update,
        "norms",
        lambda self, base: whole(replace(self, parts=tuple(p for p in self.parts if p.kind != "lora")), base),
    )


def the_base_is_not_rescaled(patch):
    whole = Nodes.node

    def lame(self, op, inputs, role, **rest):
        return inputs[0] if role == "rescaled" else whole(self, op, inputs, role, **rest)

    patch.setattr(Nodes, "node", lame)


def strides_are_forgotten(patch):
    whole = branches._attributes
    patch.setattr(branches, "_attributes", lambda node: whole(node) | {"dilations": [1, 1]})


def in_and_out_of_a_transposed_kernel_are_not_exchanged(patch):
    whole = branches._Conv.constants

    def straight(self, make, site, pair):
        a = pair.a_shape
        turned = make.reshape(make.turn(pair.a, 2), [a[1], a[0]], a)
        return whole(self, make, site, replace(pair, a=turned))

    patch.setattr(branches._Conv, "constants", straight)


def the_letter_of_the_batch_is_lost(patch):
    patch.setattr(einsum.Letters, "steps", lambda self, shared=(): ("bni,ri->bnr", "bnr,or->bno"))


def out_axes_are_counted_in_another_order(patch):
    whole = einsum.read
    patch.setattr(einsum, "read", lambda *a: replace(whole(*a), out=whole(*a).out[::-1]))


def a_replacement_is_not_turned(patch):
    whole = Nodes.relaid
    patch.setattr(Nodes, "relaid", lambda self, value, have, want, role: whole(self, value, have, have, role))


def a_replacement_is_not_turned_by_merge(patch):
    patch.setattr(axes.Placement, "to_matrix", lambda self, tensor: tensor.reshape(self.matrix_shape))


def the_sum_comes_after_the_magnitude(patch):
    from loraformat_converters.onnx.attaching import weight

    patch.setattr(weight._Step, "order", property(lambda self: -1, lambda self, value: None), raising=False)


def the_base_keeps_our_names(patch):
    from loraformat_converters.onnx.changing.record import Record

    whole = Record.of
    patch.setattr(Record, "of", classmethod(lambda cls, *a: replace(r := whole(*a), base={**r.base, "values": {}})))


MUTANTS = [
    (alpha_is_the_scale, "onnx attach"),
    (trans_b_is_ignored, "onnx merge"),
    (the_scale_is_dropped_in_attach, "onnx attach"),
    (the_factors_are_not_transposed_in_attach, "onnx attach"),
    (the_scale_is_dropped_in_attach, "onnx lora at Conv"),
    (the_factor_of_gemm_is_lost, "onnx lora at Gemm"),
    (the_bias_is_rescaled_too, "onnx dora at Gemm"),
    (the_bias_is_rescaled_too, "onnx dora at MatMul and bias"),
    (the_bias_is_rescaled_too, "onnx dora at Conv"),
    (the_bias_is_read_as_it_was, "onnx bias beside a magnitude"),
    (the_norm_is_of_the_base_alone, "onnx dora at Conv"),
    (the_norm_is_of_the_base_alone, "onnx everything at MatMul of experts"),
    (the_base_is_not_rescaled, "onnx dora at Gemm"),
    (strides_are_forgotten, "onnx lora at Conv"),
    (in_and_out_of_a_transposed_kernel_are_not_exchanged, "onnx lora at ConvTranspose"),
    (the_factors_are_not_transposed_in_attach, "onnx lora at Gather"),
    (the_letter_of_the_batch_is_lost, "onnx lora at Einsum of experts"),
    (out_axes_are_counted_in_another_order, "onnx lora at Einsum of heads"),
    (a_replacement_is_not_turned, "onnx replace at MatMul of experts"),
    (a_replacement_is_not_turned, "onnx rows at MatMul"),
    (a_replacement_is_not_turned_by_merge, "onnx merge of experts"),
    (the_sum_comes_after_the_magnitude, "onnx everything at MatMul of experts"),
    (the_base_keeps_our_names, "onnx dora at Gemm"),
]


test_the_check_is_green_on_the_code_as_it_is, test_the_check_is_red_on_a_mutant = net(CHECKS, MUTANTS)
