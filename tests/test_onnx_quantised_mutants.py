"""The net over quantised and packed weights has no hole (see ``mutants``)."""

from dataclasses import replace
from functools import partial

import numpy as np
import test_onnx_packed as packed
import test_onnx_quantised as quantised
from mutants import net

from loraformat_converters.onnx.changing import spots
from loraformat_converters.onnx.graph import index as onnx_index
from loraformat_converters.onnx.graph import quantised as onnx_quantised
from loraformat_converters.onnx.graph import trace, unpack, values
from loraformat_converters.onnx.graph.nodes import Nodes

READ = ("MatMulInteger", "ConvInteger", "a square QGemm", "GatherBlockQuantized 4")
READ += ("MatMulNBits 4", "MatMulNBits 4, zero points")

CHECKS = {
    **{f"read {form}": partial(quantised.test_the_weight_is_read_as_the_operator_reads_it, form) for form in READ},
    **{
        f"add {form}": partial(quantised.test_the_change_is_added_to_what_the_quantised_model_computes, form, False)
        for form in ("QDQ", "MatMulInteger", "MatMulNBits 4", "Gather, DequantizeLinear", "Cast, Mul, Reshape")
    },
    "rows of a branch": partial(packed.check, "attach", "MatMul"),
    "rows of a merge": partial(packed.check, "merge", "Gemm"),
    "codes without a scale": quantised.test_codes_that_are_scaled_behind_the_operator_are_refused,
}


# The mutants.


def the_zero_point_is_lost(patch):
    whole = onnx_quantised.product
    patch.setattr(onnx_index, "product", lambda *args: replace(p, zero="") if (p := whole(*args)) is not None else None)


def the_packed_zero_points_are_lost(patch):
    patch.setattr(unpack, "_zeros", lambda node, read, bits, n, count: np.float32(2 ** (bits - 1)))


def the_scale_of_each_out_is_laid_along_in(patch):
    whole = unpack._along_out

    def turned(site, values):
        found = whole(site, values)
        return found if found is None or found.ndim < 2 else found.T

    patch.setattr(unpack, "_along_out", turned)


def the_high_bits_come_first(patch):
    whole = unpack._fields

    def backwards(values, bits):
        found = whole(values, bits)
        return found.reshape(*found.shape[:-1], -1, 8 // bits)[..., ::-1].reshape(found.shape)

    patch.setattr(unpack, "_fields", backwards)


def the_blocks_are_read_in_another_order(patch):
    whole = unpack._fields

    def mixed(values, bits):
        found = whole(values, bits)
        return found[:, ::-1] if found.ndim == 3 else found

    patch.setattr(unpack, "_fields", mixed)


def x_is_taken_after_it_was_rounded(patch):
    whole = onnx_quantised._between
    patch.setattr(
        onnx_quantised,
        "_between",
        lambda node, position, *rest: replace(whole(node, position, *rest), x=node.input[1 - position]),
    )


def the_change_is_added_before_y_is_rounded(patch):
    whole = onnx_quantised._between
    patch.setattr(onnx_quantised, "_between", lambda node, *rest: replace(whole(node, *rest), end=node))


def the_change_is_added_to_the_sums(patch):
    whole = onnx_quantised._scaled

    def early(node, scope, reader):
        _, scale = whole(node, scope, reader)
        return next(n for n in scope.nodes if n.op_type == "Cast"), scale

    patch.setattr(onnx_quantised, "_scaled", early)


def out_and_in_of_packed_bytes_are_exchanged(patch):
    whole = onnx_index.meaning

    def turned(node, *rest):
        found = whole(node, *rest)
        return replace(found, out=(1,), in_=(0,)) if found.shape and node.op_type == "MatMulNBits" else found

    patch.setattr(onnx_index, "meaning", turned)


def any_code_is_a_weight(patch):
    patch.setattr(trace, "_unscaled", lambda traced: None)


def a_reshape_moves_nothing(patch):
    for module in (trace, values):
        patch.setattr(module, "reshaped", lambda shape, node, scope: (shape[-1], shape[0] * shape[1]))


def every_change_is_of_the_first_rows(patch):
    whole = Nodes.spread

    def first(self, value, shape, rows, out, role="rows"):
        return whole(self, value, shape, rows and (0, rows[1] - rows[0]), out, role)

    patch.setattr(Nodes, "spread", first)


def every_merge_is_of_the_first_rows(patch):
    whole = spots.spread
    patch.setattr(spots, "spread", lambda update, rows, out: whole(update, (0, rows[1] - rows[0]), out))


MUTANTS = [
    (the_zero_point_is_lost, "read MatMulInteger"),
    (the_zero_point_is_lost, "read ConvInteger"),
    (the_packed_zero_points_are_lost, "read MatMulNBits 4, zero points"),
    (the_scale_of_each_out_is_laid_along_in, "read a square QGemm"),
    (the_high_bits_come_first, "read MatMulNBits 4"),
    (the_high_bits_come_first, "read GatherBlockQuantized 4"),
    (the_blocks_are_read_in_another_order, "read MatMulNBits 4"),
    (x_is_taken_after_it_was_rounded, "add QDQ"),
    (the_change_is_added_before_y_is_rounded, "add QDQ"),
    (the_change_is_added_to_the_sums, "add MatMulInteger"),
    (out_and_in_of_packed_bytes_are_exchanged, "add MatMulNBits 4"),
    (any_code_is_a_weight, "codes without a scale"),
    (a_reshape_moves_nothing, "add Cast, Mul, Reshape"),
    (every_change_is_of_the_first_rows, "rows of a branch"),
    (every_merge_is_of_the_first_rows, "rows of a merge"),
]

test_the_check_is_green_on_the_code_as_it_is, test_the_check_is_red_on_a_mutant = net(CHECKS, MUTANTS)
