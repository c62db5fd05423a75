"""Links: an update under other names does to the numbers there what it did to them here."""

from dataclasses import replace

import numpy as np
import pytest
from updates import KERNEL, MATRIX, made, normal

import loraformat as lf
from loraformat import Adapter, Lora, Placement, Update
from loraformat.naming.links import Link, Seat, Share
from loraformat.naming.translate import translate

EXACT_BY_ROWS = ("lora", "dora", "delta", "loha", "replace", "rows", "rows of the last axis", "everything")


def moved(update, *links):
    return translate(Adapter({"a.weight": update}), links, "org.example.x").adapter


def refused(rule, *links, **updates):
    with pytest.raises(lf.LoraFormatError) as caught:
        translate(Adapter({f"{name}.weight": update for name, update in updates.items()}), links, "org.example.x")
    assert {p.rule for p in caught.value.problems} == {rule}, caught.value
    return str(caught.value)


def link(here="a.weight", there="b.weight", rows=None, there_rows=None, **more):
    return Link(Seat(here, rows, **more), Seat(there, there_rows, **more), "test: as said")


@pytest.mark.parametrize("kind", [*MATRIX, *KERNEL])
def test_a_renamed_parameter_keeps_its_update(kind):
    place = Placement.of((12, 6, 3, 2), "out,in,in,in") if kind in KERNEL else Placement.of((12, 8), "out,in")
    update = made(kind, place)
    assert moved(update, link())["b.weight"] is update


@pytest.mark.parametrize("kind", [kind for kind in MATRIX if kind != "shared lora"])
def test_rows_in_another_order_are_changed_alike_and_the_way_back_is_the_same_update(kind):
    place = Placement.of((12, 8), "out,in")
    update, base = made(kind, place), normal(12, 8, seed=9)
    order = np.arange(12).reshape(2, 2, 3).swapaxes(0, 1).reshape(-1)  # blocks, as heads are: a Kronecker product holds
    if kind == "lokr":
        assert update["lokr"].sides()[1][0] != 3  # whose blocks are others, so it is refused
        assert "Kronecker" in refused("LF-612", link(rows=order), a=update)
        return
    permuted = moved(update, link(rows=order))["b.weight"]
    np.testing.assert_allclose(permuted.apply(base[order]), update.apply(base)[order], rtol=1e-5, atol=1e-6)
    back = translate(Adapter({"b.weight": permuted}), [link(rows=order).reversed()], "torch").adapter["a.weight"]
    np.testing.assert_array_equal(back.apply(base), update.apply(base))


@pytest.mark.parametrize("kind", EXACT_BY_ROWS)
def test_a_fused_tensor_is_cut_and_put_together_again(kind):
    place = Placement.of((14, 5), "out,in")
    update, base = made(kind, place), normal(14, 5, seed=9)
    if "rows" in update and update["rows"].axis == 0:  # one trained row in each piece
        trained = lf.Rows(normal(3, 5), np.array([1, 3, 9]))
        update = replace(update, parts=(*update.parts[:-1], trained))
    links = [link(there=f"{n}.weight", rows=Share(a, b, 7)) for n, a, b in (("q", 0, 1), ("k", 1, 2), ("m", 2, 7))]
    cut = moved(update, *links)
    wanted = update.apply(base)
    for item in links:
        rows = item.here.rows.indices(14)
        np.testing.assert_allclose(cut[item.there.name].apply(base[rows]), wanted[rows], rtol=1e-5, atol=1e-6)
    whole = translate(cut, [item.reversed() for item in links], "torch").adapter["a.weight"]
    assert whole.rank == update.rank
    np.testing.assert_array_equal(whole.apply(base), wanted)


def test_pairs_of_their_own_are_fused_at_the_sum_of_their_ranks():
    q, k = (Update((Lora(normal(r, 5, seed=r), normal(4, r), 3.0 * r, "alpha/r"),)) for r in (2, 3))
    links = [link(n, "qkv", there_rows=Share(i, i + 1, 3)) for i, n in enumerate(("q.weight", "k.weight"))]
    fused = translate(Adapter({"q.weight": q, "k.weight": k}), links, "torch").adapter["qkv"]
    assert fused.rank == 5
    np.testing.assert_allclose(fused.matrix(), np.concatenate([q.matrix(), k.matrix(), np.zeros((4, 5))]), rtol=1e-6)


THIRDS = [link(there=f"{n}.weight", rows=Share(i, i + 1, 3)) for i, n in enumerate("qkv")]


def cut_in_three(b):
    update = Update((Lora(normal(b.shape[1], 5), b, 3.0, "alpha/r"),))
    found = moved(update, *THIRDS)
    for i, n in enumerate("qkv"):
        np.testing.assert_allclose(found[f"{n}.weight"].matrix(), np.split(update.matrix(), 3)[i], rtol=1e-6)
    return [found[f"{n}.weight"].rank for n in "qkv"]


def blocks(*columns):
    """B of three rows a block, whose values lie in these columns."""
    b = np.zeros((9, 7), np.float32)
    for i, own in enumerate(columns):
        b[3 * i : 3 * i + 3, own] = normal(3, len(own), seed=i)
    return b


@pytest.mark.parametrize(
    ("columns", "ranks"),
    [
        (([0, 1], [2, 3, 4], [5, 6]), [2, 3, 2]),
        (([0], [3, 4], [6]), [3, 3, 1]),  # a column without a value belongs with the one before it
        (([5, 6], [0, 1], [2, 3, 4]), [2, 2, 3]),
        (([0, 2], [1, 3], [4, 5, 6]), [2, 2, 3]),
        (([0, 1], [1, 2], [3, 4, 5, 6]), [7, 7, 4]),  # q and k share one
        (([0, 1, 2], [], [3, 4, 5, 6]), [3, 7, 4]),  # of k nothing is known but that it does not change
        (([], [], []), [7, 7, 7]),
        (([0, 1], [], []), [7, 7, 7]),
    ],
    ids=str,
)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_rows_of_a_block_diagonal_b_have_the_ranks_of_their_block(columns, ranks, zero):
    b = blocks(*columns)
    assert cut_in_three(np.where(b == 0, np.float32(zero), b)) == ranks


def test_pairs_of_different_scale_are_not_fused():
    links = [link(f"{n}.weight", "qkv", there_rows=Share(i, i + 1, 2)) for i, n in enumerate("qk")]
    first, second = (Update((Lora(normal(2, 5, seed=s), normal(4, 2), float(s), "alpha/r"),)) for s in (2, 3))
    assert "--fold-scale" in refused("LF-612", *links, q=first, k=second)


def test_a_magnitude_of_some_of_the_fused_rows_is_refused():
    place = Placement.of((4, 5), "out,in")
    links = [link(f"{n}.weight", "qkv", there_rows=Share(i, i + 1, 3)) for i, n in enumerate("qk")]
    refused("LF-612", *links, q=made("dora", place), k=made("dora", place))


def test_halves_that_changed_places_keep_their_rank():
    update, base = made("dora", Placement.of((10, 4), "out,in")), normal(10, 4, seed=9)
    links = [link(rows=Share(0, 1, 2), there_rows=Share(1, 2, 2)), link(rows=Share(1, 2, 2), there_rows=Share(0, 1, 2))]
    swapped = moved(update, *links)["b.weight"]
    assert swapped.rank == update.rank
    np.testing.assert_allclose(swapped.apply(np.roll(base, 5, 0)), np.roll(update.apply(base), 5, 0), rtol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in MATRIX if kind != "shared lora"])
def test_a_transposed_tensor_is_changed_alike(kind):
    update, base = made(kind, Placement.of((12, 8), "out,in")), normal(12, 8, seed=9)
    turned = moved(update, Link(Seat("a.weight", axes="out,in"), Seat("b.kernel", axes="in,out"), "test: said"))[
        "b.kernel"
    ]
    assert turned.placement.spec == "in,out"
    np.testing.assert_allclose(turned.apply(base.T), update.apply(base).T, rtol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in MATRIX if kind not in ("shared lora", "lokr", "everything")])
def test_a_tensor_that_is_kept_transposed_has_in_for_out(kind):
    update, base = made(kind, Placement.of((12, 8), "out,in")), normal(12, 8, seed=9)
    there = Link(Seat("a.weight"), Seat("b.weight"), "test: said", transposed=True)
    turned = moved(update, there)["b.weight"]
    assert turned.placement == Placement.of((8, 12), "out,in")
    np.testing.assert_allclose(turned.apply(base.T), update.apply(base).T, rtol=1e-5, atol=1e-6)
    back = translate(Adapter({"b.weight": turned}), [there.reversed()], "torch").adapter["a.weight"]
    np.testing.assert_array_equal(back.apply(base), update.apply(base))


def test_what_has_no_transpose_of_its_kind_is_refused():
    there = Link(Seat("a.weight"), Seat("b.weight"), "test: said", transposed=True)
    assert "--to-lora" in refused("LF-612", there, a=made("lokr", Placement.of((12, 8), "out,in")))
    unplaced = Update((Lora(normal(2, 5), normal(4, 2), 1.0, "factor"), lf.Magnitude(1 + abs(normal(4)))))
    assert "bind" in refused("LF-604", there, a=unplaced)


def test_a_kernel_with_heads_is_placed_by_its_shape():
    update, base = made("dora", Placement.of((12, 8), "out,in")), normal(12, 8, seed=9)
    there = Seat("b.kernel", axes="in,out,out", shape=(8, 3, 4))
    turned = moved(update, Link(Seat("a.weight", axes="out,in"), there, "test: said"))["b.kernel"]
    wanted = update.apply(base).T.reshape(8, 3, 4)
    np.testing.assert_allclose(turned.apply(base.T.reshape(8, 3, 4)), wanted, rtol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "dora", "delta", "replace"])
def test_layers_are_stacked_and_taken_apart(kind):
    place = Placement.of((6, 5), "out,in")
    updates = {f"l.{i}.weight": made(kind, place) for i in range(3)}
    for i, update in enumerate(updates.values()):  # of different values
        for part in update.parts:
            for role in ("lora_A", "delta", "replace", "magnitude"):
                if hasattr(part, role):
                    object.__setattr__(part, role, getattr(part, role) * (i + 1))
    links = [
        Link(Seat(key, axes="out,in"), Seat("l", index=(i, 3), axes="in,batch,out"), "test: said")
        for i, key in enumerate(updates)
    ]
    stacked = translate(Adapter(updates), links, "flax").adapter
    base = normal(3, 6, 5, seed=4)
    wanted = np.stack([u.apply(w) for u, w in zip(updates.values(), base, strict=True)])
    np.testing.assert_allclose(stacked["l"].apply(base.transpose(2, 0, 1)), wanted.transpose(2, 0, 1), rtol=1e-5)
    apart = translate(stacked, [item.reversed() for item in links], "torch").adapter
    for key, w, result in zip(updates, base, wanted, strict=True):
        np.testing.assert_allclose(apart[key].apply(w), result, rtol=1e-5, err_msg=key)


def test_layers_without_a_target_are_zero_in_the_stack():
    update = made("lora", Placement.of((6, 5), "out,in"))
    stacked = moved(update, Link(Seat("a.weight", axes="out,in"), Seat("l", index=(2, 4), axes="batch,in,out"), "test"))
    matrices = stacked["l"].matrix()
    np.testing.assert_array_equal(matrices[2], update.matrix())
    assert matrices.shape == (4, 6, 5)
    assert not matrices[[0, 1, 3]].any()


# What is left open is refused.


def pair():
    return made("lora", Placement.of((6, 5), "out,in"))


def test_a_target_without_a_link_is_refused_with_the_nearest():
    assert "nearest: ab.weight" in refused("LF-602", link("ab.weight"), a=pair())


def test_two_readings_of_one_name_are_refused():
    said = refused("LF-603", link(there="b"), link(there="c"), a=pair())
    assert "b (test: as said), c (test: as said)" in said


def test_the_same_reading_twice_is_one():
    assert set(moved(pair(), link(), link())) == {"b.weight"}


def test_two_targets_for_one_place_are_refused():
    assert "a.weight, c.weight" in refused("LF-603", link("a.weight"), link("c.weight"), a=pair(), c=pair())


def test_rows_that_no_link_takes_are_refused():
    assert "3 of 6 rows" in refused("LF-602", link(rows=Share(0, 1, 2)), a=pair())


def test_rows_that_do_not_divide_are_refused():
    refused("LF-606", link(rows=Share(0, 1, 4), there="b"), link(rows=Share(1, 4, 4), there="c"), a=pair())


def test_a_key_that_no_file_could_hold_is_refused():
    refused("LF-301", link(there="b\n"), a=pair())


def test_every_fault_is_told_at_once():
    with pytest.raises(lf.LoraFormatError) as caught:
        translate(Adapter({"a": pair(), "b": pair()}), [link("c", "d")], "torch")
    assert [p.where for p in caught.value.problems] == ["a", "b"]


def test_components_are_those_that_all_new_names_have():
    links = [link("a.weight", "unet:x.weight"), link("c.weight", "text_encoder:y.weight")]
    assert translate(Adapter({"a.weight": pair(), "c.weight": pair()}), links, "torch").adapter.components == (
        "text_encoder",
        "unet",
    )


@pytest.mark.parametrize("kind", ["lora", "delta", "loha", "lokr"])
def test_a_weight_that_is_kept_scaled_there_is_changed_by_as_much(kind):
    update = made(kind, Placement.of((12, 8), "out,in"))
    way = Link(Seat("a.weight"), Seat("b.weight"), "test: as said", 0.25)
    there = moved(update, way)
    np.testing.assert_allclose(there["b.weight"].matrix(), update.matrix() / 4, rtol=1e-6)
    back = translate(Adapter({"b.weight": there["b.weight"]}), [way.reversed()], "torch").adapter["a.weight"]
    np.testing.assert_array_equal(back.matrix(), update.matrix())


@pytest.mark.parametrize("kind", ["dora", "replace", "rows"])
def test_what_is_no_multiple_of_a_change_is_refused_where_the_weight_is_kept_scaled(kind):
    update = made(kind, Placement.of((12, 8), "out,in"))
    said = refused("LF-612", Link(Seat("a.weight"), Seat("b.weight"), "test: as said", 0.25), a=update)
    assert "--drop" in said


def test_pieces_fill_the_rows_of_a_tensor_whose_out_side_is_several_axes():
    """As k and v fill [2, heads, in, size]; and each is there again on the way back."""
    place, pieces = Placement.of((12, 5), "out,in"), {}
    for seed, name in enumerate(("a.weight", "b.weight")):
        pieces[name] = Update((Lora(normal(2, 5, seed=seed), normal(12, 2, seed=9 - seed), 3.0, "alpha/r"),), place)
    there = {"axes": "out,out,in,out", "shape": (2, 3, 5, 4)}
    here = {"axes": "out,in", "shape": (12, 5)}
    ways = [
        Link(Seat(name, **here), Seat("c.weight", Share(i, i + 1, 2), **there), "test: as said")
        for i, name in enumerate(pieces)
    ]
    fused = translate(Adapter(pieces), ways, "org.example.x").adapter["c.weight"]
    wanted = np.stack([update.matrix().reshape(3, 4, 5).transpose(0, 2, 1) for update in pieces.values()])
    np.testing.assert_allclose(fused.delta(), wanted, rtol=1e-5, atol=1e-6)
    back = translate(Adapter({"c.weight": fused}), [way.reversed() for way in ways], "torch").adapter
    for name, update in pieces.items():
        assert back[name].placement == Placement.of((12, 5), "out,in")
        np.testing.assert_allclose(back[name].delta(), update.delta(), rtol=1e-5, atol=1e-6)


# What has no exact form as one tensor is refused.


def of(*parts):
    return Update(tuple(parts))


def lora(rank=2, in_=5, scale=3.0, core=None, seed=0):
    return Lora(normal(rank, in_, seed=seed), normal(4, rank), scale, "factor", core)


def loha(seed=0):
    return lf.Loha(normal(4, 2), normal(2, 5, seed=seed), normal(4, 2), normal(2, 5), 1.0, "factor")


CORE = normal(2, 2, 3, 3)
LOKR = lf.Lokr(1.0, "factor", normal(2, 5), lokr_w2=normal(2, 1))
DELTA = lf.Delta(normal(4, 5), 2.0)
TOKENS = lf.Rows(normal(2, 5), np.array([0, 2]), 0)

NEVER_FUSED = {
    "a core beside none": ("LF-612", "around a core", of(lora(core=CORE)), of(lora(seed=1))),
    "two cores": ("LF-612", "different cores", of(lora(core=CORE)), of(lora(core=CORE + 1, seed=1))),
    "inputs of two sizes": ("LF-606", "different sizes", of(lora()), of(lora(in_=6))),
    "two Hadamard products": ("LF-612", "Hadamard", of(loha()), of(loha(1))),
    "two scales of differences": ("LF-612", "different scales: 1.0, 2.0", of(DELTA), of(replace(DELTA, alpha=1.0))),
    "differences of two sizes": ("LF-606", "does not fit together", of(DELTA), of(lf.Delta(normal(4, 6), 2.0))),
    "Kronecker products": ("LF-612", "lokr parts", of(LOKR), of(LOKR)),
}


@pytest.mark.parametrize("case", NEVER_FUSED)
def test_what_is_not_one_when_fused_is_refused(case):
    rule, said, q, k = NEVER_FUSED[case]
    links = [link(f"{n}.weight", "qk", there_rows=Share(i, i + 1, 2)) for i, n in enumerate("qk")]
    assert said in refused(rule, *links, q=q, k=k)


def test_tokens_that_were_trained_in_some_columns_only_are_not_fused():
    links = [link(f"{n}.weight", "t", there_rows=Share(i, i + 1, 2), axes="in,out") for i, n in enumerate("qk")]
    others = lf.Rows(normal(2, 5), np.array([0, 3]), 0)
    assert "different rows were trained" in refused("LF-612", *links, q=of(TOKENS), k=of(others))


NEVER_STACKED = {
    "a core": ("LF-612", "around a core", of(lora(core=CORE)), of(lora(core=CORE))),
    "two ranks": ("LF-612", "--pad-rank", of(lora(2)), of(lora(3))),
    "two scales": ("LF-612", "--fold-scale", of(lora()), of(lora(scale=1.0))),
    "vectors": ("LF-612", "a stack of vectors", of(lf.Delta(normal(4), 1.0)), of(lf.Delta(normal(4), 1.0))),
    "two shapes": ("LF-606", "different shapes", of(lora()), of(lora(in_=6))),
    "Kronecker products": ("LF-612", "none of their stack", of(LOKR), of(LOKR)),
    "replaced and not": ("LF-612", "of 1 of 2 matrices", of(lf.Replace(normal(4, 5))), of(DELTA)),
    "axes that nothing tells": ("LF-604", "which axis", of(lf.Replace(normal(4, 5))), of(lf.Replace(normal(4, 5)))),
}


@pytest.mark.parametrize("case", NEVER_STACKED)
def test_what_is_no_stack_is_refused(case):
    rule, said, first, second = NEVER_STACKED[case]
    links = [Link(Seat(f"{n}.weight"), Seat("l", index=(i, 2)), "test: as said") for i, n in enumerate("ab")]
    assert said in refused(rule, *links, a=first, b=second)


@pytest.mark.parametrize(
    ("update", "rule", "said"),
    [(of(LOKR), "LF-612", "not taken out of a stack"), (of(lora()), "LF-606", "no stack of 2 matrices")],
)
def test_what_is_no_stack_is_not_taken_apart(update, rule, said):
    links = [Link(Seat("a.weight", index=(i, 2)), Seat(f"l.{i}"), "test: as said") for i in range(2)]
    assert said in refused(rule, *links, a=update)


@pytest.mark.parametrize("part", [lf.Replace(normal(6, 5)), lf.Rows(normal(6, 2), np.array([0, 3]), 1)])
def test_what_only_says_its_own_size_is_cut_by_it(part):
    links = [link(there=n, rows=Share(i, i + 1, 3), axes="out,in") for i, n in enumerate("qkv")]
    found = moved(of(part), *links)
    role = {"rows": "values"}.get(part.kind, part.kind)
    np.testing.assert_array_equal(
        np.concatenate([getattr(found[n][part.kind], role) for n in "qkv"]), getattr(part, role)
    )


def test_rows_of_a_tensor_of_unknown_axes_are_not_cut():
    links = [link(there=n, rows=Share(i, i + 1, 2)) for i, n in enumerate("qk")]
    assert "which axis" in refused("LF-604", *links, a=of(lf.Replace(normal(6, 5))))
