"""The net over diffusers' goldens and over retarget has no hole: code made wrong turns a check red."""

from dataclasses import replace

import numpy as np
from diffusers_goldens import FILE, GOLDEN, check_deltas
from mutants import net
from updates import normal

import loraformat as lf
from loraformat import Adapter, Lora, Placement, Update, parts, pieced
from loraformat.naming import cut, fuse, links, translate
from loraformat.verbs.convert import save
from loraformat_converters.diffusers import layout, metadata, read, spelling, write
from loraformat_converters.kohya import layout as kohya
from loraformat_converters.peft import lora


def deltas(case):
    return lambda tmp_path: check_deltas(lf.load(GOLDEN / case / FILE), case)


def again(case):
    """Read, written without what is kept of the source, read."""

    def check(tmp_path):
        adapter = replace(lf.load(GOLDEN / case / FILE), extensions={})
        save(adapter, tmp_path / FILE, layout)
        check_deltas(lf.load(tmp_path / FILE), case)

    return check


def pair(out, seed=0):
    return Update((Lora(normal(2, 5, seed=seed), normal(out, 2, seed=seed), 3.0, "alpha/r"),))


def flux_is_cut(tmp_path):
    whole = Adapter({"lora_unet_single_blocks_0_linear1.weight": pair(14)}, "kohya")
    there = lf.retarget(whole, "torch").adapter
    wanted = whole["lora_unet_single_blocks_0_linear1.weight"].matrix()
    stem = "transformer:single_transformer_blocks.0"
    for name, rows in (("attn.to_q", (0, 2)), ("attn.to_k", (2, 4)), ("attn.to_v", (4, 6)), ("proj_mlp", (6, 14))):
        np.testing.assert_array_equal(there[f"{stem}.{name}.weight"].matrix(), wanted[slice(*rows)])


def flux_is_fused(tmp_path):
    keys = [f"transformer:transformer_blocks.0.attn.to_{n}.weight" for n in "qv"]
    keys += ["transformer:single_transformer_blocks.0.proj_out.weight"]
    apart = Adapter({key: pair(6, seed=n) for n, key in enumerate(keys)}, components=("transformer",))
    fused = lf.retarget(apart, "kohya").adapter["lora_unet_double_blocks_0_img_attn_qkv.weight"].matrix()
    wanted = [apart[keys[0]].matrix(), np.zeros((6, 5)), apart[keys[1]].matrix()]
    np.testing.assert_allclose(fused, np.concatenate(wanted), rtol=1e-6)


def flux_is_fused_and_cut(tmp_path):
    """Each pair as it was: its A, its B, its scale."""
    stem = "transformer:single_transformer_blocks.0"
    sizes = {f"{stem}.attn.to_q": 3, f"{stem}.attn.to_k": 3, f"{stem}.attn.to_v": 3, f"{stem}.proj_mlp": 12}
    before = {f"{key}.weight": pair(size, seed=n) for n, (key, size) in enumerate(sizes.items())}
    fused = lf.retarget(Adapter(before, components=("transformer",)), "kohya").adapter
    save(fused, tmp_path / FILE, kohya)
    back = lf.retarget(lf.load(tmp_path / FILE), "torch").adapter
    for key, update in before.items():
        assert back[key].scale == update.scale
        np.testing.assert_array_equal(back[key]["lora"].lora_A, update["lora"].lora_A)
        np.testing.assert_array_equal(back[key]["lora"].lora_B, update["lora"].lora_B)


def permuted_and_back(tmp_path):
    place = Placement.of((6, 5), "out,in")
    update = Update((*pair(6).parts, lf.Magnitude(1 + abs(normal(6)))), place)
    order, base = np.array([3, 0, 4, 1, 5, 2]), normal(6, 5, seed=3)
    link = links.Link(links.Seat("a", order), links.Seat("b"), "test: said")
    there = translate.translate(Adapter({"a": update}), [link], "torch").adapter
    np.testing.assert_allclose(there["b"].apply(base[order]), update.apply(base)[order], rtol=1e-5)
    back = translate.translate(there, [link.reversed()], "torch").adapter["a"]
    np.testing.assert_allclose(back.apply(base), update.apply(base), rtol=1e-5)


CASES = ("sd", "sdxl", "flux-dora", "flux-bias", "alphas", "processors")
CHECKS = {
    **{f"delta of {case}": deltas(case) for case in CASES},
    **{f"again {case}": again(case) for case in ("sd", "sdxl", "flux-dora")},
    "flux is cut": flux_is_cut,
    "flux is fused": flux_is_fused,
    "flux is fused and cut": flux_is_fused_and_cut,
    "permuted and back": permuted_and_back,
}


def alpha_is_the_scale(patch):
    patch.setattr(parts, "scale_of", lambda alpha, rule, r: float(alpha))


def rslora_lost(patch):
    patch.setattr(parts, "scale_of", lambda alpha, rule, r: alpha / r if r else float(alpha))


def up_and_down_swapped(patch):
    patch.setattr(spelling, "_FACTOR", {"down": "lora_B.weight", "up": "lora_A.weight"})


def transposed(patch):
    whole = lora._add

    def wrong(module, part, embedding, draft):
        if part.lora_A.ndim == 2:
            part = replace(part, lora_A=part.lora_B.T, lora_B=part.lora_A.T)
        whole(module, part, embedding, draft)

    patch.setattr(lora, "_add", wrong)


def a_key_skipped(patch):
    whole = read._sorted
    patch.setattr(read, "_sorted", lambda tensors: whole(dict(list(tensors.items())[2:])))


def text_encoder_skipped(patch):
    whole = read._sorted

    def wrong(tensors):
        return {c: own for c, own in whole(tensors).items() if c != "text_encoder"}

    patch.setattr(read, "_sorted", wrong)


def first_component_for_all(patch):
    whole = metadata.parse

    def wrong(said, components):
        found, warnings = whole(said, components)
        return dict.fromkeys(found, next(iter(found.values()))), warnings

    patch.setattr(metadata, "parse", wrong)


def alphas_lost(patch):
    whole = metadata.of_tensors
    patch.setattr(metadata, "of_tensors", lambda ranks, alphas, **more: whole(ranks, {}, **more))


def out_is_no_list(patch):
    whole = spelling.parse

    def wrong(name, *, bare):
        found = whole(name, bare=bare)
        return replace(found, module=found.module.removesuffix(".0")) if found.spelling == "processor" else found

    patch.setattr(read, "parse", wrong)


def bias_unscaled(patch):
    whole = lora._add_bias
    patch.setattr(lora, "_add_bias", lambda module, bias, scale, draft: whole(module, bias, 1.0, draft))


def magnitude_lost(patch):
    patch.setattr(lora, "_add_magnitude", lambda *given: None)


def patterns_not_written(patch):
    whole = write._settings

    def wrong(form, component):
        return {**whole(form, component), "alpha_pattern": {}}

    patch.setattr(write, "_settings", wrong)


def magnitude_not_written(patch):
    whole = write._settings
    patch.setattr(write, "_settings", lambda form, component: {**whole(form, component), "use_dora": False})


def wrong_share(patch):
    patch.setattr(links.Share, "indices", lambda self, total: np.arange(total // self.of * (self.stop - self.start)))


def fused_out_of_place(patch):
    whole = fuse.fuse
    patch.setattr(translate, "fuse", lambda pieces, total, spec: whole([(r[::-1], u) for r, u in pieces], total, spec))


def rows_a_row_too_high(patch):
    whole = pieced._put
    patch.setattr(pieced, "_put", lambda out, start, *given: whole(out, start + 1, *given))


def ranks_of_another_block(patch):
    whole = cut._used_but
    patch.setattr(cut, "_own_ranks", lambda b, own, rows: np.flatnonzero(whole(b, rows))[: own.shape[1] // 4])


def scale_of_all_blocks(patch):
    whole = cut._pair
    patch.setattr(cut, "_pair", lambda part, rows: replace(whole(part, rows), alpha=part.alpha))


def order_not_undone(patch):
    patch.setattr(np, "argsort", np.asarray)


def magnitude_left_behind(patch):
    patch.setattr(cut, "_magnitude", lambda part, *given: part)


MUTANTS = [
    (alpha_is_the_scale, "delta of sd"),
    (rslora_lost, "delta of sdxl"),
    (up_and_down_swapped, "delta of processors"),
    (transposed, "delta of processors"),
    (a_key_skipped, "delta of sd"),
    (text_encoder_skipped, "delta of sd"),
    (first_component_for_all, "delta of sdxl"),
    (alphas_lost, "delta of alphas"),
    (out_is_no_list, "delta of processors"),
    (bias_unscaled, "delta of flux-bias"),
    (magnitude_lost, "delta of flux-dora"),
    (patterns_not_written, "again sd"),
    (magnitude_not_written, "again flux-dora"),
    (text_encoder_skipped, "again sdxl"),
    (wrong_share, "flux is cut"),
    (fused_out_of_place, "flux is fused"),
    (rows_a_row_too_high, "flux is fused and cut"),
    (ranks_of_another_block, "flux is fused and cut"),
    (scale_of_all_blocks, "flux is fused and cut"),
    (order_not_undone, "permuted and back"),
    (magnitude_left_behind, "permuted and back"),
]

test_a_check_is_green, test_a_mutant_turns_its_check_red = net(CHECKS, MUTANTS)
