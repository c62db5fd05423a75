"""The net over the goldens of kohya and LyCORIS has no hole: code made wrong turns a check red."""

from dataclasses import replace

import numpy as np
from kohya_goldens import check_deltas, check_rewrite, check_scales
from mutants import net

from loraformat import parts
from loraformat_converters.kohya import factors, form, magnitudes, names, read, scales, write
from loraformat_converters.kohya.draft import torch_placement


def deltas(case):
    return lambda tmp_path: check_deltas(case)


def rewrite(case):
    return lambda tmp_path: check_rewrite(case, tmp_path)


CHECKS = {
    **{f"delta of {case}": deltas(case) for case in ("locon", "locon_tucker", "dora", "dora_in", "loha", "loha_tucker", "lokr")},
    **{f"delta of {case}": deltas(case) for case in ("lokr_whole", "lokr_tucker", "full", "norm", "sd15", "encoders", "old")},
    **{f"rewrite of {case}": rewrite(case) for case in ("locon", "dora_in", "lokr_whole", "loha_dora", "norm", "sd15")},
    "scales of locon_rslora": lambda tmp_path: check_scales("locon_rslora"),
}  # fmt: skip


def alpha_is_the_scale(patch):
    patch.setattr(parts, "scale_of", lambda alpha, rule, r: float(alpha))


def alpha_lost(patch):
    patch.setattr(scales, "value_of", lambda module, roles, draft: None)
    patch.setattr(scales, "read", lambda module, roles, r, draft: scales.Scale(float(r), "alpha/r"))


def missing_alpha_is_one(patch):
    whole = scales.read
    patch.setattr(
        scales, "read", lambda m, roles, r, d: whole(m, roles, r, d)._replace(alpha=float(roles.get("alpha", 1.0)))
    )


def rslora_undone(patch):
    patch.setattr(parts, "scale_of", lambda alpha, rule, r: alpha / np.sqrt(r) if r else float(alpha))


def up_and_down_swapped(patch):
    turned = {"lora_down.weight": "up", "lora_up.weight": "down"}
    patch.setattr(names, "ROLES", {**names.ROLES, **turned})


def core_lost(patch):
    whole = factors.lora
    method = factors.METHODS["LoCon"]
    lost = method._replace(read=lambda m, roles, d: whole(m, {k: v for k, v in roles.items() if k != "mid"}, d))
    patch.setattr(read, "METHODS", {**factors.METHODS, "LoCon": lost})


def kernel_before_channels(patch):
    def wrong(shape):
        place = torch_placement(shape)
        return replace(place, in_=(*place.in_[1:], *place.in_[:1]))

    patch.setattr(factors, "torch_placement", wrong)


def scale_rule_of_lokr_lost(patch):
    whole = factors.lokr

    def wrong(module, roles, draft):
        found = whole(module, roles, draft)
        if found.part.r is None:
            r = roles["lokr_w2"].shape[0]
            found = found._replace(part=replace(found.part, alpha=float(roles["alpha"]), scale_rule="alpha/r", r=r))
        return found

    patch.setattr(read, "METHODS", {**factors.METHODS, "LoKr": factors.METHODS["LoKr"]._replace(read=wrong)})


def rank_of_lokr_from_the_wrong_side(patch):
    whole = factors.lokr

    def wrong(module, roles, draft):
        found = whole(module, roles, draft)
        return found._replace(part=replace(found.part, r=roles["lokr_w2_a"].shape[1]))

    patch.setattr(read, "METHODS", {**factors.METHODS, "LoKr": factors.METHODS["LoKr"]._replace(read=wrong)})


def norm_axis_swapped(patch):
    whole = magnitudes.read

    def wrong(*words):
        part, place = whole(*words)
        return replace(part, magnitude_axes=(1,) if part.magnitude_axes is None else None), place

    patch.setattr(magnitudes, "read", wrong)


def norm_axis_lost_on_writing(patch):
    patch.setattr(form, "_norm_shape", lambda part, axes: (-1, *(1,) * (axes - 1)))


def number_of_axes_lost_on_writing(patch):
    patch.setattr(form, "_norm_shape", lambda part, axes: (-1, 1))


def magnitude_skipped(patch):
    whole = read._add
    patch.setattr(
        read, "_add", lambda m, f, roles, d: whole(m, f, {k: v for k, v in roles.items() if k != "dora_scale"}, d)
    )


def second_product_ignored(patch):
    whole = factors.loha

    def wrong(module, roles, draft):
        found = whole(module, roles, draft)
        return found._replace(part=replace(found.part, hada_w2_a=found.part.hada_w1_a, hada_w2_b=found.part.hada_w1_b))

    patch.setattr(read, "METHODS", {**factors.METHODS, "LoHa": factors.METHODS["LoHa"]._replace(read=wrong)})


def biases_skipped(patch):
    whole = read._module
    patch.setattr(
        read, "_module", lambda m, roles, d: whole(m, {k: v for k, v in roles.items() if k not in read._BIASES}, d)
    )


def a_module_skipped(patch):
    whole = read._modules
    patch.setattr(read, "_modules", lambda tensors, draft: dict(list(whole(tensors, draft).items())[1:]))


def alpha_always_float32(patch):
    patch.setattr(write, "_alpha", lambda value, kept: np.float32(1.0 if value is None else value).reshape(()))


def core_without_its_kernel_on_writing(patch):
    patch.setattr(form, "_pair", lambda part, shape: iter([("down", part.lora_A), ("up", part.lora_B)]))


def header_lost(patch):
    patch.setattr(write, "_metadata", lambda adapter, kept, tensors: {})


MUTANTS = [
    (alpha_is_the_scale, "delta of locon"),
    (alpha_is_the_scale, "delta of sd15"),
    (alpha_lost, "delta of locon"),
    (alpha_lost, "delta of encoders"),
    (missing_alpha_is_one, "delta of old"),
    (rslora_undone, "scales of locon_rslora"),
    (up_and_down_swapped, "delta of locon"),
    (up_and_down_swapped, "delta of sd15"),
    (core_lost, "delta of locon_tucker"),
    (kernel_before_channels, "delta of locon"),
    (kernel_before_channels, "delta of full"),
    (kernel_before_channels, "delta of loha_tucker"),
    (scale_rule_of_lokr_lost, "delta of lokr_whole"),
    (rank_of_lokr_from_the_wrong_side, "delta of lokr_tucker"),
    (norm_axis_swapped, "delta of dora"),
    (norm_axis_swapped, "delta of dora_in"),
    (norm_axis_lost_on_writing, "rewrite of dora_in"),
    (number_of_axes_lost_on_writing, "rewrite of loha_dora"),
    (magnitude_skipped, "delta of dora"),
    (second_product_ignored, "delta of loha"),
    (biases_skipped, "delta of norm"),
    (biases_skipped, "delta of full"),
    (a_module_skipped, "delta of lokr"),
    (alpha_always_float32, "rewrite of sd15"),
    (alpha_always_float32, "rewrite of lokr_whole"),
    (core_without_its_kernel_on_writing, "rewrite of locon"),
    (header_lost, "rewrite of sd15"),
]

test_a_check_is_green_on_the_code_as_it_is, test_a_mutant_turns_its_check_red = net(CHECKS, MUTANTS)
