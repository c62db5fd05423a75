"""The net over PEFT's goldens has no hole: code made wrong in a way that people do get wrong turns a check red."""

import re
from dataclasses import replace

import numpy as np
from mutants import net
from peft_goldens import check_deltas, check_merge, check_numbers, check_patterns, check_round_trip

import loraformat as lf
from loraformat import axes, huggingface, parts, products, registry, testing, updates
from loraformat_converters.peft import (
    adalora,
    attention,
    blocks,
    config,
    experts,
    lora,
    names,
    numbers,
    to_lora,
    trained,
    vera,
    write,
)
from loraformat_converters.peft.draft import Draft

# The real checks, by the name of the test that runs them.


def peft_delta(case):
    return lambda tmp_path: check_deltas(case)


def peft_numbers(case):
    return lambda tmp_path: check_numbers(case)


def peft_merge(case):
    return lambda tmp_path: check_merge(case, tmp_path)


def peft_round_trip(case):
    return lambda tmp_path: check_round_trip(case, tmp_path)


def written_to_peft(tmp_path):
    """What is written from the model alone is read back with the same matrices."""
    draw = np.random.default_rng(0)
    ranks = {"layers.1.q+": 3, "layers.11.q+": 4, "a.proj": 3, "proj": 2}
    pairs = {p: [draw.standard_normal(s).astype(np.float32) for s in ((r, 7), (5, r))] for p, r in ranks.items()}
    ours = lf.Adapter(
        {f"{p}.weight": lf.Update((lf.Lora(*ab, 2.0 + i, "factor"),)) for i, (p, ab) in enumerate(pairs.items())}
    )
    testing.check_round_trip(PeftFolder(), ours, tmp_path)


class PeftFolder:
    """The PEFT layout, for ``check_round_trip``, whose path ends like a file's."""

    name, carries = "peft", frozenset({"lora"})

    def read(self, source, options):
        return registry.layout("peft").read(source, options)

    def write(self, adapter, options):
        return write.write(adapter)


CHECKS = {
    "delta of linear": peft_delta("linear"),
    "delta of gpt2": peft_delta("gpt2"),
    "delta of rslora": peft_delta("rslora"),
    "delta of patterns": peft_delta("patterns"),
    "delta of mixed_conv1d_linear": peft_delta("mixed_conv1d_linear"),
    "delta of embedding": peft_delta("embedding"),
    "delta of conv": peft_delta("conv"),
    "delta of linear_square": peft_delta("linear_square"),
    "meaning of patterns": lambda tmp_path: check_patterns(config._meant),
    "numbers of patterns": peft_numbers("patterns"),
    "numbers of rslora_patterns": peft_numbers("rslora_patterns"),
    "merge of llama": peft_merge("llama"),
    "merge of bf16_upcast": peft_merge("bf16_upcast"),
    "merge of dora": peft_merge("dora"),
    "merge of dora_embedding_resized": peft_merge("dora_embedding_resized"),
    "merge of bias_all": peft_merge("bias_all"),
    "merge of lora_bias": peft_merge("lora_bias"),
    "merge of trainable_tokens": peft_merge("trainable_tokens"),
    "merge of target_parameters": peft_merge("target_parameters"),
    "merge of multihead_attention": peft_merge("multihead_attention"),
    "merge of bdlora": peft_merge("bdlora"),
    "merge of legacy_fused": peft_merge("legacy_fused"),
    "delta of adalora": peft_delta("adalora"),
    "delta of adalora_pruned": peft_delta("adalora_pruned"),
    "delta of lokr_whole": peft_delta("lokr_whole"),
    "delta of loha_kernels": peft_delta("loha_kernels"),
    "delta of vera": peft_delta("vera"),
    "round trip of trainable_tokens": peft_round_trip("trainable_tokens"),
    "round trip of dora": peft_round_trip("dora"),
    "round trip of dotted": peft_round_trip("dotted"),
    "written to PEFT": written_to_peft,
}


# The mutants: what is wrong, and how the code is changed.


def lost_transpose(patch):
    whole = axes.Placement.from_matrix
    patch.setattr(axes.Placement, "from_matrix", lambda self, m: whole(self, m) if m.shape != self.shape else m)


def conv1d_forgotten(patch):
    patch.setattr(huggingface, "_CONV1D", {})


def alpha_is_the_scale(patch):
    patch.setattr(parts, "scale_of", lambda alpha, rule, r: float(alpha))


def scale_is_dropped(patch):
    patch.setattr(parts, "scale_of", lambda alpha, rule, r: 1.0)


def factors_are_swapped(patch):
    whole = lora._module

    def swapped(module, roles, *rest):
        a, b = roles["lora_A.weight"], roles["lora_B.weight"]
        whole(module, roles | {"lora_A.weight": b.T, "lora_B.weight": a.T}, *rest)

    patch.setattr(lora, "_module", swapped)


def a_key_is_skipped(patch):
    whole = lora.read
    patch.setattr(lora, "read", lambda found, draft: whole(dict(list(found.items())[1:]), draft))


def rslora_is_ignored(patch):
    patch.setattr(config.Config, "rule", "alpha/r")


def last_pattern_wins(patch):
    whole = config.Config._matches
    patch.setattr(config.Config, "_matches", lambda self, *a: reversed(list(whole(self, *a))))


def patterns_match_anywhere(patch):
    patch.setattr(config, "_meant", lambda pattern, module: re.search(pattern, module) is not None)


def patterns_match_any_end(patch):
    patch.setattr(config, "_meant", lambda pattern, module: re.search(f"({pattern})$", module) is not None)


def alpha_patterns_are_ignored(patch):
    patch.setattr(config.Config, "alpha", lambda self, module: self.value["lora_alpha"])


def fan_in_fan_out_is_trusted(patch):
    whole = Draft.add

    def trusting(self, key, part, place=None, **rest):
        if place is None:
            out, in_ = part.matrix_shape()
            turned = self.setting("fan_in_fan_out")
            place = lf.Placement.of((in_, out) if turned else (out, in_), "in,out" if turned else "out,in")
        whole(self, key, part, place, **rest)

    patch.setattr(Draft, "add", trusting)


def embedding_is_not_transposed(patch):
    whole = Draft.add

    def straight(self, key, part, place=None, *, op=None, **rest):
        place = lf.Placement(part.matrix_shape(), (0,), (1,)) if op else place
        whole(self, key, part, place, op=op, **rest)

    patch.setattr(Draft, "add", straight)


def kernel_axes_are_reversed(patch):
    whole = lora._add

    def reversed_kernel(module, part, *rest):
        a = part.lora_A
        turned = np.ascontiguousarray(a.transpose(0, 1, *reversed(range(2, a.ndim)))).reshape(a.shape)
        whole(module, replace(part, lora_A=turned) if a.ndim > 2 else part, *rest)

    patch.setattr(lora, "_add", reversed_kernel)


def dora_norms_run_over_the_outputs(patch):
    patch.setattr(updates, "kept_axes", lambda part, place: place.in_)
    patch.setattr(
        updates, "rescale", lambda part, value, place, rows: value / np.linalg.norm(value, axis=0) * value.shape[0]
    )


def dora_norms_are_those_of_the_base(patch):
    whole = updates.Update._sum
    patch.setattr(updates.Update, "_sum", lambda self, tile: whole(self, tile) * np.float32("magnitude" not in self))


def experts_are_ranked_first(patch):
    """B's columns taken expert by expert, as A's rows are."""
    whole = experts._add

    def expert_major(key, a, b, draft):
        count = len(a) // draft.config.rank(key)
        whole(key, a, b.reshape(len(b), count, -1).transpose(0, 2, 1).reshape(b.shape), draft)

    patch.setattr(experts, "_add", expert_major)


def the_outermost_pair_is_taken_for_the_first_parameter(patch):
    patch.setattr(experts, "_assigned", lambda module, names, pairs, *rest: zip(names, pairs[::-1], strict=True))


def rows_are_not_sorted(patch):
    patch.setattr(trained.np, "argsort", lambda values: np.arange(len(values)))


def rows_are_sorted_without_their_values(patch):
    patch.setattr(trained, "Rows", lambda values, indices: parts.Rows(np.roll(values, 1, axis=0), indices))


def rows_are_written_ascending(patch):
    patch.setattr(to_lora, "indices_of", lambda module, config: None)


def a_replacement_is_taken_for_a_difference(patch):
    patch.setattr(trained, "Replace", lambda value, allows: parts.Delta(value))


def a_trained_bias_is_not_scaled(patch):
    whole = lora._add_bias
    patch.setattr(lora, "_add_bias", lambda module, bias, scale, draft: whole(module, bias, 1.0, draft))


def out_proj_is_added_once(patch):
    patch.setattr(attention, "OUT_PROJ_TWICE", 1.0)


def singular_values_are_dropped(patch):
    patch.setattr(adalora, "single", lambda t: np.ones_like(t) if t.shape[1] == 1 else t)


def the_rank_that_is_left_scales(patch):
    """AdaLoRA's scale by the rank after the budget, as LoRA's would be."""
    whole = adalora._add
    patch.setattr(
        adalora, "_add", lambda m, roles, factor, rank, draft: whole(m, roles, factor * 5 / rank, rank, draft)
    )


def kronecker_factors_are_swapped(patch):
    whole = products._kron
    patch.setattr(products, "_kron", lambda one, other, tile: whole(other, one, tile))


def lokr_of_whole_factors_is_not_scaled(patch):
    patch.setattr(parts.Lokr, "scale", property(lambda self: 1.0 if self.lokr_w2 is not None else 5 / self.r))


def cores_are_transposed(patch):
    whole = products._around
    patch.setattr(
        products, "_around", lambda a, b, core, *t: whole(a, b, core.swapaxes(0, 1) if core is not None else None, *t)
    )


def vera_takes_the_last_columns(patch):
    whole = vera._add

    def last(module, lambda_b, lambda_d, a, b, *rest):
        whole(module, lambda_b, lambda_d, np.ascontiguousarray(a[:, ::-1]), b, *rest)

    patch.setattr(vera, "_add", last)


def blocks_are_interleaved(patch):
    whole = blocks._diagonal

    def interleaved(factor, n):
        return whole(factor.reshape(-1, n, factor.shape[1]).swapaxes(0, 1).reshape(factor.shape), n)

    patch.setattr(blocks, "_diagonal", interleaved)


def the_parts_of_a_projection_stand_in_a_row(patch):
    whole = blocks._fused
    patch.setattr(blocks, "_fused", lambda m, a, b, enabled, d: whole(m, a, b, sorted(enabled, reverse=True), d))


def a_magnitude_is_written_flat(patch):
    patch.setattr(to_lora, "_magnitudes", flat_magnitudes)


def flat_magnitudes(adapter, loras, form):
    form.settings["use_dora"] = True
    for key, update in adapter.items():
        form.tensors[f"{key.removesuffix('.weight')}.lora_magnitude_vector"] = update["magnitude"].magnitude


def the_sum_is_rounded_twice(patch):
    whole = updates.Update._sum
    patch.setattr(updates.Update, "_sum", lambda self, tile: whole(self, tile).astype(np.float16).astype(np.float32))


def the_last_tile_is_not_changed(patch):
    def forgetful(updates, base, norms):
        last = base.shape[0] - 1
        yield (updates[0].apply(base[0:last], (0, last))).astype(base.dtype)
        yield base[last : last + 1]

    patch.setattr("loraformat.checkpoint.change.changed", forgetful)


def an_untouched_tensor_is_copied_from_the_wrong_place(patch):
    from loraformat import patch as patching

    whole = patching.copy_range
    patch.setattr(patching, "copy_range", lambda source, start, *rest: whole(source, max(0, start - 8), *rest))


def every_prefix_is_taken_away(patch):
    class Greedy(str):
        def removeprefix(self, prefix):
            return self.replace(prefix, "")

    whole = names.parse
    patch.setattr(names, "parse", lambda name, prefix: whole(Greedy(name), prefix))


def written_patterns_are_not_escaped(patch):
    patch.setattr(numbers.re, "escape", lambda text: text)


def written_patterns_are_not_anchored(patch):
    whole = numbers._usual

    def loose(values):
        usual, rest = whole(values)
        return usual, {pattern.removeprefix("^"): value for pattern, value in rest.items()}

    patch.setattr(numbers, "_usual", loose)


def a_factor_is_written_as_alpha(patch):
    patch.setattr(numbers, "alpha_under", lambda rule, part: part.alpha)


MUTANTS = [
    (lost_transpose, "delta of gpt2"),
    (conv1d_forgotten, "delta of gpt2"),
    (alpha_is_the_scale, "delta of linear"),
    (alpha_is_the_scale, "numbers of patterns"),
    (alpha_is_the_scale, "merge of llama"),
    (scale_is_dropped, "delta of linear"),
    (factors_are_swapped, "delta of linear_square"),
    (a_key_is_skipped, "delta of linear"),
    (rslora_is_ignored, "delta of rslora"),
    (rslora_is_ignored, "numbers of rslora_patterns"),
    (last_pattern_wins, "delta of patterns"),
    (patterns_match_any_end, "meaning of patterns"),
    (patterns_match_anywhere, "meaning of patterns"),
    (alpha_patterns_are_ignored, "delta of patterns"),
    (fan_in_fan_out_is_trusted, "delta of mixed_conv1d_linear"),
    (embedding_is_not_transposed, "delta of embedding"),
    (kernel_axes_are_reversed, "delta of conv"),
    (dora_norms_run_over_the_outputs, "merge of dora"),
    (dora_norms_are_those_of_the_base, "merge of dora"),
    (dora_norms_are_those_of_the_base, "merge of dora_embedding_resized"),
    (experts_are_ranked_first, "merge of target_parameters"),
    (the_outermost_pair_is_taken_for_the_first_parameter, "merge of target_parameters"),
    (rows_are_not_sorted, "merge of trainable_tokens"),
    (rows_are_sorted_without_their_values, "merge of trainable_tokens"),
    (rows_are_written_ascending, "round trip of trainable_tokens"),
    (a_replacement_is_taken_for_a_difference, "merge of bias_all"),
    (a_trained_bias_is_not_scaled, "merge of lora_bias"),
    (out_proj_is_added_once, "merge of multihead_attention"),
    (singular_values_are_dropped, "delta of adalora"),
    (the_rank_that_is_left_scales, "delta of adalora_pruned"),
    (kronecker_factors_are_swapped, "delta of lokr_whole"),
    (lokr_of_whole_factors_is_not_scaled, "delta of lokr_whole"),
    (cores_are_transposed, "delta of loha_kernels"),
    (vera_takes_the_last_columns, "delta of vera"),
    (blocks_are_interleaved, "merge of bdlora"),
    (the_parts_of_a_projection_stand_in_a_row, "merge of legacy_fused"),
    (a_magnitude_is_written_flat, "round trip of dora"),
    (the_sum_is_rounded_twice, "delta of linear"),
    (the_last_tile_is_not_changed, "merge of llama"),
    (an_untouched_tensor_is_copied_from_the_wrong_place, "merge of llama"),
    (every_prefix_is_taken_away, "round trip of dotted"),
    (written_patterns_are_not_escaped, "written to PEFT"),
    (written_patterns_are_not_anchored, "written to PEFT"),
    (a_factor_is_written_as_alpha, "written to PEFT"),
]


test_the_check_is_green_on_the_code_as_it_is, test_the_check_is_red_on_a_mutant = net(CHECKS, MUTANTS)
