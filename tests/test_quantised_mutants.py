"""The net over weights in few bits has no hole: reading and rounding made wrong in one place, and a check turns red."""

import numpy as np
import test_gguf_merge
import test_quantised_four_bits as four
import test_quantised_gptq as packed
from mutants import net

from loraformat import bound, tiles
from loraformat.checkpoint import four_bits, gptq, merging, places
from loraformat_converters.gguf import blocks

CHECKS = {
    **{f"means {case}": lambda folder, case=case: four.test_stored_numbers_mean_what_bitsandbytes_says(case, folder) for case in four.CASES},
    **{f"nearest {case}": lambda folder, case=case: four.test_a_merge_stores_the_nearest_numbers_and_nothing_else_changes(case, folder) for case in four.CASES},
    **{f"same {case}": lambda folder, case=case: four.test_where_nothing_changes_no_byte_does(case, folder) for case in ("fp4",)},
    "runs": lambda folder: four.test_a_run_of_rows_is_that_of_the_whole("nf4_nested", folder),
    "Conv1D": four.test_of_a_conv1d_the_numbers_lie_as_those_of_a_linear,
    "square Conv1D": four.test_a_square_conv1d_in_int8_is_not_turned_either,
    "replaced": four.test_what_replaces_a_scaled_weight_is_refused,
    "bound": four.test_a_bound_adapter_finds_its_base_in_four_bits,
    **{f"means {case}": lambda folder, case=case: packed.test_packed_numbers_mean_what_gptqmodel_says(case, folder) for case in packed.CASES},
    "nearest gptq": lambda folder: packed.test_a_merge_stores_the_nearest_numbers_and_nothing_else_changes("gptq_4", folder),
    "second form": packed.test_the_second_form_stores_zeros_as_they_are,
    "blocks": lambda folder: test_gguf_merge.test_blocks_are_those_that_gguf_makes_of_the_sum("Q4_1", folder),
}  # fmt: skip


def patched(where, name, value):
    def mutant(monkeypatch):
        monkeypatch.setattr(where, name, value)

    return mutant


def mutated(where, name, change):
    return patched(where, name, change(getattr(where, name)))


def turned(f):
    """Every byte with its halves the other way round."""
    return lambda self, stored: f(self, (stored >> 4) | (stored << 4))


halves_swapped = mutated(four_bits._Run, "_numbers", turned)
offset_lost = mutated(
    four_bits._Nested, "values", lambda f: lambda self, numbers, first: f(self, numbers, first) - self.offset
)
outer_absmax_of_the_first = mutated(
    four_bits._Nested, "values", lambda f: lambda self, numbers, first: f(self, numbers, 0)
)
next_below = mutated(four_bits.np, "searchsorted", lambda f: lambda a, v, **k: np.maximum(f(a, v, **k) - 1, 0))
table_as_it_lies = patched(four_bits.np, "argsort", lambda table, **_: np.arange(len(table)))
one_zero = mutated(
    four_bits._Run, "nearest", lambda f: lambda self, wanted: np.where((v := f(self, wanted)) >> 4 == 8, v & 15, v)
)
axes_of_the_parameter = patched(places, "laid", lambda *_: None)
replaced_unscaled = patched(merging, "form_of", lambda *_: None)
sketch_of_the_numbers = patched(bound, "values_of", tiles.Lazy)
zeros_as_they_are = patched(gptq, "_OFFSETS", {"gptq": 0, "gptq_v2": 0})
always_one_more = patched(gptq, "_OFFSETS", {"gptq": 1, "gptq_v2": 1})
groups_in_order = mutated(
    gptq.Gptq, "run", lambda f: lambda self, start, stop: f(gptq.Gptq(self.tensor, self.bits, np.sort(self.groups), self.scales, self.zeros, self.offset), start, stop)
)  # fmt: skip
highest_first = mutated(
    gptq, "_unpacked", lambda f: lambda packed, bits, axis: np.flip(f(np.flip(packed, axis), bits, axis), axis)
)
truncated = patched(gptq.np, "rint", np.floor)
old_blocks = mutated(blocks._Run, "nearest", lambda f: lambda self, wanted: self.stored)

MUTANTS = [
    *((halves_swapped, f"means {case}") for case in four.CASES),
    (offset_lost, "means nf4_nested"),
    (outer_absmax_of_the_first, "runs"),
    (next_below, "nearest nf4"),
    (table_as_it_lies, "nearest fp4"),
    (one_zero, "same fp4"),
    (axes_of_the_parameter, "Conv1D"),
    (axes_of_the_parameter, "square Conv1D"),
    (replaced_unscaled, "replaced"),
    (sketch_of_the_numbers, "bound"),
    (zeros_as_they_are, "means gptq_4"),
    (always_one_more, "second form"),
    (groups_in_order, "means gptq_2_act_order"),
    (highest_first, "means gptq_8"),
    (truncated, "nearest gptq"),
    (old_blocks, "blocks"),
]
test_the_code_as_it_is_is_green, test_the_mutant_is_red = net(CHECKS, MUTANTS)
