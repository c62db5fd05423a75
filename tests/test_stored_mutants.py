"""Mutants of how a weight lies where it is stored: experts in few bits, and tensors that a Reshape makes matrices of."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from unittest.mock import patch as patched

import numpy as np
import test_onnx_experts as experts
import test_onnx_quantised_experts as few_bits
import test_onnx_reshaped as reshaped
from mutants import net

from loraformat_converters.onnx.changing import spots
from loraformat_converters.onnx.graph import quantised, trace, unpack


def rounded(form):
    def check(tmp_path):
        with patched.dict(os.environ, ORT_QMOE_CPU_QNBIT_GEMM="0"):
            few_bits.test_every_expert_is_rounded_to_its_own_codes(form, False, tmp_path)

    return check


def changed(form):
    return partial(reshaped.test_the_tensor_is_changed_in_its_own_shape, form, "merge", "lora")


CHECKS = {
    "blocks": rounded("4 bits, blocks, zero points"),
    "columns": rounded("4 bits, columns, zero points"),
    "square": lambda tmp_path: few_bits.test_square_experts_of_which_nothing_tells_how_they_lie_are_refused(
        False, False, tmp_path
    ),
    "gate and up": partial(experts.test_values_tell_in_which_order_a_module_has_gate_and_up, "merge", True, "sketch"),
    "out of two axes": changed("out of two axes"),
    "turned, then joined": changed("turned, then joined"),
    "experts of two axes": partial(
        reshaped.test_what_divides_or_mixes_axes_takes_a_branch_and_no_merge, "experts of two axes"
    ),
}


# The mutants.


def zero_points_of_columns_are_padded_row_by_row(patch):
    whole = unpack._expert_zeros
    patch.setattr(
        unpack, "_expert_zeros", lambda packed, bits, sizes: whole(np.repeat(packed, 2)[: packed.size], bits, sizes)
    )


def the_down_projection_takes_the_zero_points_of_up(patch):
    patch.setattr(quantised, "_EXPERTS", {at: replace(words, zero=11) for at, words in quantised._EXPERTS.items()})


def what_lies_for_cuda_is_taken_for_raw(patch):
    patch.setattr(unpack, "_unturned", lambda *args: True)


def joined_axes_are_turned_round(patch):
    whole = trace._regrouped

    def turned(before, shape):
        found = whole(before, shape)
        return replace(found, axes=tuple(axes[::-1] for axes in found.axes))

    patch.setattr(trace, "_regrouped", turned)


def axes_of_experts_are_none_of_theirs(patch):
    patch.setattr(trace.Trace, "divided", lambda self: self)


def gate_and_up_are_laid_one_behind_the_other(patch):
    patch.setattr(spots, "permuted", lambda update, blocks: update)


MUTANTS = [
    (gate_and_up_are_laid_one_behind_the_other, "gate and up"),
    (zero_points_of_columns_are_padded_row_by_row, "columns"),
    (the_down_projection_takes_the_zero_points_of_up, "blocks"),
    (what_lies_for_cuda_is_taken_for_raw, "square"),
    (joined_axes_are_turned_round, "out of two axes"),
    (joined_axes_are_turned_round, "turned, then joined"),
    (axes_of_experts_are_none_of_theirs, "experts of two axes"),
]

test_the_check_is_green_on_the_code_as_it_is, test_the_check_is_red_on_a_mutant = net(CHECKS, MUTANTS)
