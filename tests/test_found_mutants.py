"""Gates, experts, codes and others' branches made wrong in ways that people do get wrong: each turns a real test red."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import numpy as np
import test_onnx_branched as theirs
import test_onnx_experts as experts
import test_onnx_exporters as exporters
import test_onnx_names as names
import test_onnx_recurrent as recurrent
import test_onnx_requantised as codes
from mutants import net

from loraformat_converters.onnx.changing import branched, computed, doras, requantised, rewriting, spots, walking
from loraformat_converters.onnx.changing.record import Record
from loraformat_converters.onnx.finding import paths
from loraformat_converters.onnx.graph import index as onnx_index
from loraformat_converters.onnx.graph import operators, trace
from loraformat_converters.onnx.graph.nodes import Nodes
from loraformat_converters.onnx.graph.site import Site
from loraformat_converters.onnx.graph.values import Values


def found(form):
    return partial(theirs.test_a_pair_beside_a_weight_is_found_in_every_form, form)


CHECKS = {
    "an LSTM, merged": partial(recurrent.check, "merge", "LSTM", 1, False),
    "an LSTM, attached": partial(recurrent.check, "attach", "LSTM", 1, False),
    "a GRU of two directions": partial(recurrent.check, "merge", "GRU", 2, True),
    "experts": partial(experts.test_every_expert_takes_its_own_change, "merge", False),
    "codes of 8 bits": partial(codes.check, "DequantizeLinear, zero points"),
    "codes of 4 bits": partial(codes.check, "MatMulNBits 4, zero points"),
    "a turned weight": partial(codes.check, "Cast, Sub, Mul, Transpose"),
    "half of the range": codes.test_int8_of_half_the_range_stays_in_it,
    "a change that is rounded away": partial(
        codes.test_a_change_that_would_be_rounded_away_is_refused_before_a_byte_is_written, "MatMulNBits 4"
    ),
    "an Einsum taken apart": partial(
        exporters.test_a_graph_computes_what_its_framework_does_with_the_change, "tf2onnx", "attach", "sketch"
    ),
    "a kernel of an image": partial(
        exporters.test_a_graph_computes_what_its_framework_does_with_the_change, "keras-torch", "merge", "base"
    ),
    "a Linear over a sequence": found("PEFT, a Linear over a sequence"),
    "a scale in B": found("the scale in B, a base that is multiplied"),
    "a convolution": found("a convolution"),
    "a DoRA": partial(theirs.test_a_dora_is_found_with_its_magnitude, True),
    "a bias that is rescaled": partial(theirs.test_what_is_rescaled_otherwise_is_no_dora, {"kept": "h"}),
    "another factor less": partial(theirs.test_what_is_rescaled_otherwise_is_no_dora, {"less": "other"}),
    "a DoRA of our own": partial(theirs.test_what_attach_made_is_found_without_its_record, "a Linear", True, True),
    "a magnitude in a weight": partial(
        theirs.test_what_is_folded_under_its_record_is_what_the_record_says, "a convolution", True
    ),
    "a record of another kind": theirs.test_a_record_of_another_kind_is_no_evidence,
    "a model of PEFT's": partial(
        theirs.test_what_peft_puts_around_a_model_is_no_part_of_a_name, "/model/m/q/base_layer", True
    ),
    "a bias that tells": names.test_a_module_in_one_that_is_not_called_is_known_by_its_bias,
    "a bias of two modules": partial(names.test_a_bias_of_two_modules_or_of_another_name_tells_nothing, "a.q.bias"),
    "a bias of another module": partial(names.test_a_bias_of_two_modules_or_of_another_name_tells_nothing, "a.k.bias"),
    "another x": partial(theirs.test_what_is_no_pair_beside_a_weight_is_none, "another x"),
    "a factor that is left over": partial(
        theirs.test_half_of_an_adapter_is_an_error, "a tensor by the name of a factor"
    ),
    "two adapters": partial(theirs.test_half_of_an_adapter_is_an_error, "two adapters"),
}


# The mutants.


def gates_stay_in_torchs_order(patch):
    patch.setattr(spots, "permuted", lambda update, blocks: update)


def gates_stay_in_torchs_order_in_the_graph(patch):
    patch.setattr(Nodes, "permuted", lambda self, value, shape, blocks, role="gates": value)


def the_order_is_turned_round(patch):
    turned = {kind: tuple(int(i) for i in np.argsort(order)) for kind, order in operators._GATES.items()}
    patch.setattr(operators, "_GATES", turned)


def sketches_are_of_the_operators_order(patch):
    patch.setattr(Values, "_as_named", Values.read)


def experts_are_turned(patch):
    whole = onnx_index.meaning

    def turned(node, *rest):
        means = whole(node, *rest)
        return replace(means, out=means.in_, in_=means.out) if node.op_type == "MoE" else means

    patch.setattr(onnx_index, "meaning", turned)


def codes_are_cut_off(patch):
    patch.setattr(requantised.np, "rint", np.trunc)


def the_zero_point_is_forgotten(patch):
    whole = requantised.Kept._nearest
    patch.setattr(
        requantised.Kept,
        "_nearest",
        lambda self, wanted: whole(replace(self, codes=replace(self.codes, zero=np.float32(0))), wanted),
    )


def high_bits_are_written_first(patch):
    whole = requantised.Kept._stored

    def turned(self, values):
        return whole(self, values.reshape(-1, 2)[:, ::-1].reshape(values.shape) if self.codes.bits == 4 else values)

    patch.setattr(requantised.Kept, "_stored", turned)


def codes_are_stored_as_the_operator_reads_them(patch):
    patch.setattr(Site, "as_stored", lambda self, values: values)


def every_code_is_in_use(patch):
    patch.setattr(requantised, "_in_use", lambda values, low, high: (low, high))


def nothing_is_too_little(patch):
    patch.setattr(rewriting, "too_little", lambda *args: None)


def shapes_are_not_counted(patch):
    patch.setattr(trace, "counted", lambda *args: None)


def kernels_are_read_with_their_channels_first(patch):
    whole = exporters.lf.Placement.to_matrix

    def other(self, tensor):
        return whole(replace(self, in_=tuple(sorted(self.in_))), tensor)

    patch.setattr("loraformat.axes.Placement.to_matrix", other)


def the_scale_is_lost(patch):
    whole = walking.Constants.unscaled
    patch.setattr(walking.Constants, "unscaled", lambda self, value, scope: (whole(self, value, scope)[0], 1.0))


def the_bases_own_factor_is_forgotten(patch):
    whole = computed.Branches.update

    def plain(self, site, branch):
        return whole(self, replace(site, factor=1.0), branch)

    patch.setattr(computed.Branches, "update", plain)


def any_x_will_do(patch):
    whole = computed._beside
    patch.setattr(
        computed,
        "_beside",
        lambda site, branch, scope: whole(site, replace(branch, x=computed.plain(site.x, scope)), scope),
    )


def a_dora_has_no_scale(patch):
    whole = doras.Doras._dora

    def plain(self, *given):
        found = whole(self, *given)
        return found and (found[0], replace(found[1], scale=1.0))

    patch.setattr(doras.Doras, "_dora", plain)


def a_dora_keeps_its_ratio_in_b(patch):
    whole = doras.Doras._dora

    def outside(self, *given):
        found = whole(self, *given)
        return found and (found[0], replace(found[1], inside=False))

    patch.setattr(doras.Doras, "_dora", outside)


def a_bias_may_be_rescaled_too(patch):
    patch.setattr(doras.Doras, "_keeps_bias", lambda *given: True)


def any_factor_is_as_good(patch):
    patch.setattr(doras, "_close", lambda site, one, other: True)


def a_folded_magnitude_is_not_seen(patch):
    patch.setattr(computed, "_RESCALED", re.compile("(?!)"))


def a_record_tells_nothing(patch):
    whole = Record.folded
    patch.setattr(Record, "folded", lambda self, model: whole(self, model) and {theirs.KEY: [("lora", 2)]})


def an_equal_tensor_of_another_module_is_evidence(patch):
    patch.setattr(paths, "_alone", lambda *given: True)


def nothing_is_around_a_model(patch):
    patch.setattr(branched, "wrapper", lambda names: None)


def a_bias_tells_nothing(patch):
    patch.setattr("loraformat_converters.onnx.finding.witness.stored_paths", lambda index: {})


def any_name_will_do(patch):
    patch.setattr(paths, "_within", lambda called, module: True)


def what_is_left_over_is_left_out(patch):
    patch.setattr(branched, "_lost", lambda index, used: ())


def the_last_of_two_wins(patch):
    patch.setattr(branched, "_twice", lambda found: iter(()))


MUTANTS = [
    (gates_stay_in_torchs_order, "an LSTM, merged"),
    (gates_stay_in_torchs_order_in_the_graph, "an LSTM, attached"),
    (the_order_is_turned_round, "an LSTM, merged"),
    (sketches_are_of_the_operators_order, "a GRU of two directions"),
    (experts_are_turned, "experts"),
    (codes_are_cut_off, "codes of 8 bits"),
    (the_zero_point_is_forgotten, "codes of 8 bits"),
    (the_zero_point_is_forgotten, "codes of 4 bits"),
    (high_bits_are_written_first, "codes of 4 bits"),
    (codes_are_stored_as_the_operator_reads_them, "a turned weight"),
    (every_code_is_in_use, "half of the range"),
    (nothing_is_too_little, "a change that is rounded away"),
    (shapes_are_not_counted, "an Einsum taken apart"),
    (kernels_are_read_with_their_channels_first, "a kernel of an image"),
    (the_scale_is_lost, "a Linear over a sequence"),
    (the_bases_own_factor_is_forgotten, "a scale in B"),
    (any_x_will_do, "another x"),
    (a_dora_has_no_scale, "a DoRA"),
    (a_dora_keeps_its_ratio_in_b, "a DoRA of our own"),
    (a_bias_may_be_rescaled_too, "a bias that is rescaled"),
    (any_factor_is_as_good, "another factor less"),
    (a_folded_magnitude_is_not_seen, "a magnitude in a weight"),
    (a_record_tells_nothing, "a record of another kind"),
    (an_equal_tensor_of_another_module_is_evidence, "a bias of two modules"),
    (any_name_will_do, "a bias of another module"),
    (nothing_is_around_a_model, "a model of PEFT's"),
    (a_bias_tells_nothing, "a bias that tells"),
    (what_is_left_over_is_left_out, "a factor that is left over"),
    (the_last_of_two_wins, "two adapters"),
]

test_the_check_is_green_on_the_code_as_it_is, test_the_check_is_red_on_a_mutant = net(CHECKS, MUTANTS)
