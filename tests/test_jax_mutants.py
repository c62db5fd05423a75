"""The nets over the JAX and Keras goldens have no hole: reading made wrong, as people do, turns a check red."""

from dataclasses import replace

import numpy as np
import test_flax_names
import test_jax_names
import test_keras
import test_trees
from jax_goldens import GEMMA_CASES, MAXTEXT, check_gemma, check_lorax, check_merged, scanned
from mutants import net

from loraformat import registry
from loraformat.layout import ReadOptions
from loraformat.parts import Lora
from loraformat.resolve import Hints
from loraformat.testing import relative_error
from loraformat.verbs.bind import bind
from loraformat_converters.flax import (
    factors,
    families,
    gemma,
    linen,
    lorax,
    maxtext,
    maxtext_order,
    nnx,
    pairs,
    qwix,
    space,
)


def tree(layout):
    return lambda folder: test_trees.test_what_the_tool_wrote_changes_its_weights_as_the_tool_computed(
        layout, test_trees.GOLDEN / layout / "state.msgpack"
    )


def kerashub(folder):
    with np.load(test_keras.GOLDEN / "expected.npz") as arrays:
        keys = sorted({name.partition("|")[0] for name in arrays.files})
        want = {key: (arrays[f"{key}|W"], arrays[f"{key}|merged"]) for key in keys}
    np.savez(folder / "base.npz", **{key: weight for key, (weight, _) in want.items()})
    axes = {key: "in0,in1,out" for key, (weight, _) in want.items() if weight.ndim == 3}
    adapter = bind(registry.read(test_keras.FILE)[0].adapter, registry.open_base(folder / "base.npz"), Hints(axes=axes))
    test_keras.test_what_kerashub_wrote_changes_its_kernels_as_it_computed(adapter, want)


def read_back(layout):
    """What is written for an adapter that the layout did not read gives the same change."""

    def check(folder):
        from test_jax_layouts import attention, written

        adapter = attention()
        again = registry.read(written(adapter, layout, folder / "a.npz"), layout, ReadOptions(alpha=8.0))[0].adapter
        assert sorted(again) == sorted(adapter)
        for key, update in adapter.items():
            assert relative_error(again[key].delta(), update.delta()) < 1e-6, key
            assert again[key].placement == update.placement

    return check


def maxtext_case(case):
    return lambda folder: check_merged(scanned(case, folder), MAXTEXT / case)


def maxtext_names(case):
    return lambda folder: test_jax_names.test_maxtexts_scanned_kernels_are_the_layers_of_torch(case, folder)


def gemma_names(folder):
    test_jax_names.test_a_gemma_of_torch_is_deepminds_and_back(test_jax_names.K, True, True)
    test_jax_names.test_what_gemma_trained_goes_to_torch_and_back_into_its_own_shapes(folder)


def each_factor(monkeypatch, change):
    """Every reader's two factors are what ``change`` makes of them."""
    whole = pairs.Draft.pairs
    monkeypatch.setattr(
        pairs.Draft, "pairs", lambda self, *args: ((s, *change(a, b)) for s, a, b in whole(self, *args))
    )


def each_part(monkeypatch, change):
    whole = pairs.Draft.target
    monkeypatch.setattr(
        pairs.Draft, "target", lambda self, key, part, *more: whole(self, key, change(key, part), *more)
    )


def factors_are_swapped(monkeypatch):
    each_factor(monkeypatch, lambda a, b: (b, a))


def a_transpose_is_lost(monkeypatch):
    whole = factors.as_matrices

    def lost(a, b, batch=0):
        A, B = whole(a, b, batch)
        return a.reshape(A.shape), b.reshape(B.shape)

    for module in (gemma, lorax, maxtext, qwix):
        monkeypatch.setattr(module, "as_matrices", lost)
    monkeypatch.setattr(nnx.np, "ascontiguousarray", lambda t: np.array(t.T).reshape(t.shape))


def a_key_is_skipped(monkeypatch):
    whole = pairs.Draft.pairs
    monkeypatch.setattr(pairs.Draft, "pairs", lambda self, *args: list(whole(self, *args))[1:])


def there_is_a_scale(monkeypatch):
    each_part(monkeypatch, lambda key, part: replace(part, alpha=part.alpha / part.r))


def alpha_is_the_scale(monkeypatch):
    each_part(monkeypatch, lambda key, part: replace(part, scale_rule="factor"))


def the_scale_is_of_rslora(monkeypatch):
    each_part(monkeypatch, lambda key, part: replace(part, scale_rule="alpha/sqrt(r)"))


def heads_are_taken_in_another_order(monkeypatch):
    def turned(key, part):
        rows = part.lora_B.shape[-2]
        order = np.arange(rows).reshape(2, -1).T.reshape(-1) if rows % 2 == 0 else np.arange(rows)[::-1]
        return Lora(part.lora_A, part.lora_B.take(order, -2), part.alpha, part.scale_rule)

    each_part(monkeypatch, turned)


def an_equation_has_its_axes_elsewhere(monkeypatch):
    monkeypatch.setitem(gemma._EQUATIONS, "q_einsum/w", "in,out,out")


def layers_are_taken_for_heads(monkeypatch):
    for module in (qwix, maxtext):
        monkeypatch.setattr(module, "layers_first", lambda array: array)


def layers_are_numbered_backwards(monkeypatch):
    whole = factors.layers_first
    for module in (qwix, maxtext):
        monkeypatch.setattr(
            module, "layers_first", lambda array: whole(array)[::-1] if array.ndim == 3 else whole(array)
        )


def layers_are_written_first(monkeypatch):
    monkeypatch.setattr(maxtext, "layers_second", lambda array: array)


def keras_forgets_a_transpose(monkeypatch):
    import loraformat_converters.keras as module

    whole = module.Lora
    monkeypatch.setattr(module, "Lora", lambda a, b, *more: whole(a.T.reshape(a.shape), b, *more))


def keras_has_alpha_1(monkeypatch):
    import loraformat_converters.keras as module

    whole = module.Lora
    monkeypatch.setattr(module, "Lora", lambda a, b, alpha, rule: whole(a, b, 1.0, "alpha/r"))


def keras_counts_from_one(monkeypatch):
    import loraformat_converters.keras as module

    whole = module._updates
    monkeypatch.setattr(
        module, "_updates", lambda *args: ((f"{int(k.partition('/')[0]) + 1}/kernel", u) for k, u in whole(*args))
    )


def kernels_lie_as_torchs(monkeypatch):
    whole = linen.axes
    monkeypatch.setattr(linen, "axes", lambda own, u: ("out,in", "out,in") if own.endswith("kernel") else whole(own, u))


def a_convolution_lies_like_a_linear(monkeypatch):
    whole = linen.axes

    def wrong(own, update):
        here, there = whole(own, update)
        return here, ",".join(reversed(there.split(","))) if here.count("in") > 1 else there

    monkeypatch.setattr(linen, "axes", wrong)


def with_rows(monkeypatch, change):
    """Every table with its rows changed."""
    monkeypatch.setattr(
        space, "TABLES", tuple(replace(t, rows=tuple(change(row) for row in t.rows)) for t in families.TABLES)
    )


def heads_stand_last(monkeypatch):
    swap = {"in,out,out": ("out,out,in", "heads head hidden"), "out,in,out": ("out,out,in", "heads head hidden")}
    with_rows(
        monkeypatch,
        lambda row: replace(row, axes=swap[row.axes][0]) if row.axes in swap and not row.share else row,
    )


def shares_change_places(monkeypatch):
    def swapped(row):
        share = row.share
        if share is None or share.of != 2:
            return row
        return replace(row, share=replace(share, start=1 - share.start, stop=3 - share.stop))

    with_rows(monkeypatch, swapped)


def gate_and_up_are_exchanged(monkeypatch):
    swap = {"gate_proj": "up_proj", "up_proj": "gate_proj"}

    def exchanged(row):
        word = row.torch.split(".")[-2] if row.torch.count(".") > 1 else ""
        return replace(row, torch=row.torch.replace(word, swap[word])) if word in swap else row

    with_rows(monkeypatch, exchanged)


def the_query_is_not_scaled(monkeypatch):
    monkeypatch.setattr(maxtext_order, "_SCALED", dict.fromkeys(maxtext_order._SCALED, False))


def the_query_is_scaled_the_wrong_way(monkeypatch):
    whole = maxtext_order.of

    def wrong(*args):
        rows, scale, said = whole(*args)
        return rows, 1 / scale, said

    monkeypatch.setattr(maxtext_order, "of", wrong)


def rows_are_not_reordered(monkeypatch):
    monkeypatch.setattr(maxtext_order, "pairs_of_halves", lambda heads, size: np.arange(heads * size))


def rows_are_reordered_the_other_way(monkeypatch):
    whole = maxtext_order.pairs_of_halves
    monkeypatch.setattr(maxtext_order, "pairs_of_halves", lambda heads, size: np.argsort(whole(heads, size)))


CHECKS = {layout: tree(layout) for layout in ("nnx", "qwix")} | {"keras": kerashub}
CHECKS |= {case: lambda folder, case=case: check_gemma(case, folder) for case in GEMMA_CASES}
CHECKS |= {"gqa alone": lambda folder: check_gemma("gqa", folder, based=False), "lorax": check_lorax}
CHECKS |= {case: maxtext_case(case) for case in ("llama-0", "llama-1")} | {"maxtext": read_back("maxtext")}
CHECKS |= {f"names {case}": maxtext_names(case) for case in ("llama-0", "llama-1", "qwen3-1")}
CHECKS |= {
    "gemma names": gemma_names,
    "linen": lambda folder: test_flax_names.test_linens_rule_by_what_a_parameter_is(),
}
CHECKS |= {"tunix": lambda folder: test_flax_names.test_a_llama_goes_to_tunix_by_heads_and_back()}
TREES = ("nnx", "qwix", "gqa", "mha", "dense", "lorax")
MUTANTS = [
    *((mutant, name) for mutant in (factors_are_swapped, a_transpose_is_lost, a_key_is_skipped) for name in TREES),
    *((there_is_a_scale, name) for name in ("nnx", "gqa", "dense", "lorax")),
    *((alpha_is_the_scale, name) for name in ("qwix", "lorax", "llama-1")),
    *((the_scale_is_of_rslora, name) for name in ("qwix", "lorax", "llama-0")),
    *((heads_are_taken_in_another_order, name) for name in ("qwix", "gqa", "mha", "dense", "llama-1")),
    (an_equation_has_its_axes_elsewhere, "gqa alone"),
    (layers_are_taken_for_heads, "llama-1"),
    *((layers_are_numbered_backwards, name) for name in ("llama-1", "maxtext")),
    (layers_are_written_first, "maxtext"),
    *((mutant, "keras") for mutant in (keras_forgets_a_transpose, keras_has_alpha_1, keras_counts_from_one)),
    *((mutant, "linen") for mutant in (kernels_lie_as_torchs, a_convolution_lies_like_a_linear)),
    *((heads_stand_last, name) for name in ("tunix", "gemma names", "names qwen3-1")),
    (shares_change_places, "gemma names"),
    *((gate_and_up_are_exchanged, name) for name in ("gemma names", "names llama-0")),
    *((mutant, f"names llama-{axis}") for mutant in (the_query_is_not_scaled, the_query_is_scaled_the_wrong_way) for axis in (0, 1)),
    *((mutant, "names llama-1") for mutant in (rows_are_not_reordered, rows_are_reordered_the_other_way)),
]  # fmt: skip

test_jax_is_green, test_a_mutant_of_jax_turns_red = net(CHECKS, MUTANTS)
