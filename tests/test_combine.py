"""Adapters combined on ΔW: every method against its formula on dense float64, and laws."""

import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from combined import GIVEN, KEYS, ONE, THREE, TWO, adapter, dense, published, settings_of
from hypothesis import given, settings
from hypothesis import strategies as st

import loraformat as lf
from loraformat.combining.methods import DENSE, DRAWS, LINEAR, METHODS, PEFT
from loraformat.testing import relative_error


@pytest.mark.parametrize("method", [*DENSE, "cat", "linear"])
def test_a_method_is_its_published_formula(method):
    made = lf.combine(GIVEN, method, **settings_of(method)).adapter
    assert made.keys() == KEYS.keys()
    for key in KEYS:
        assert relative_error(made[key].matrix(), published(method, key, GIVEN, 3)) < 1e-6, key


@pytest.mark.parametrize("method", DENSE)
def test_a_dense_result_is_stored_as_its_nearest_of_the_rank_and_says_what_that_costs(method):
    made = lf.combine(GIVEN, method, **settings_of(method) | {"rank": 4})
    for key in KEYS:
        whole = published(method, key, GIVEN, 3)
        values = np.linalg.svd(whole, compute_uv=False)
        best = np.linalg.norm(values[4:]) / np.linalg.norm(values)
        assert made.adapter[key].rank == 4
        assert relative_error(made.adapter[key].matrix(), whole) == pytest.approx(best, abs=1e-6)
        assert made.residuals[key] == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 4, 50])
def test_svd_is_the_nearest_of_the_sum(rank):
    made = lf.combine(GIVEN, "svd", rank=rank)
    for key in KEYS:
        u, s, vt = np.linalg.svd(published("linear", key, GIVEN, 0), full_matrices=False)
        assert relative_error(made.adapter[key].matrix(), (u[:, :rank] * s[:rank]) @ vt[:rank]) < 1e-5
        assert made.residuals[key] == pytest.approx(np.linalg.norm(s[rank:]) / np.linalg.norm(s), abs=1e-6)
        assert made.adapter[key].rank <= rank


def test_the_point_on_the_arc():
    made = lf.combine([(ONE, 1.0), (TWO, 3.0)], "slerp").adapter
    for key in KEYS:
        one, two = dense(ONE, key), dense(TWO, key)
        angle = math.acos(np.sum(one * two) / np.linalg.norm(one) / np.linalg.norm(two))
        wanted = (math.sin(0.25 * angle) * one + math.sin(0.75 * angle) * two) / math.sin(angle)
        assert relative_error(made[key].matrix(), wanted) < 1e-6


def test_the_ends_of_the_arc_and_what_lies_between_equals():
    assert (
        relative_error(
            lf.combine([(ONE, 0.0), (TWO, 2.0)], "slerp").adapter["a.weight"].matrix(), dense(TWO, "a.weight")
        )
        < 1e-6
    )
    twice = lf.combine([(ONE, 1.0), (ONE, 3.0)], "slerp").adapter
    assert relative_error(twice["a.weight"].matrix(), dense(ONE, "a.weight")) < 1e-6
    lone = lf.combine([(ONE, 1.0), (THREE, 3.0)], "slerp").adapter
    assert relative_error(lone["b.weight"].matrix(), 0.25 * dense(ONE, "b.weight")) < 1e-6


def test_between_opposites_there_is_no_arc():
    opposite = replace(ONE, targets={k: lf.Update((replace(u["lora"], alpha=-2.0),)) for k, u in ONE.items()})
    with pytest.raises(lf.LoraFormatError, match=r"LF-612.*opposites.*a\.weight"):
        lf.combine([(ONE, 1.0), (opposite, 1.0)], "slerp")


# Laws.

weights = st.floats(-2, 2).filter(lambda w: abs(w) > 1e-3)
seeds = st.integers(0, 2**31)


@given(seeds, seeds, weights, weights)
@settings(max_examples=30)
def test_cat_does_not_mind_the_order(one, other, v, w):
    given = [(adapter(one, 2), v), (adapter(other, 4), w)]
    first, second = (lf.combine(g).adapter for g in (given, given[::-1]))
    for key in KEYS:
        assert np.abs(first[key].matrix() - second[key].matrix()).max() < 1e-4


@given(seeds, weights, weights, weights)
@settings(max_examples=30)
def test_cat_of_a_cat_is_the_cat_of_all(seed, u, v, w):
    a, b, c = (adapter(seed + i, i + 1) for i in range(3))
    inner = lf.combine([(a, u), (b, v)]).adapter
    nested, flat = lf.combine([(inner, 1.0), (c, w)]).adapter, lf.combine([(a, u), (b, v), (c, w)]).adapter
    for key in KEYS:
        assert nested[key].rank == flat[key].rank == 6
        assert np.abs(nested[key].matrix() - flat[key].matrix()).max() < 1e-4


@given(seeds, weights)
@settings(max_examples=20)
def test_svd_at_full_rank_is_cat(seed, w):
    given = [(adapter(seed, 2), 1.0), (adapter(seed + 1, 4), w)]
    cat, svd = lf.combine(given).adapter, lf.combine(given, "svd", rank=6).adapter
    for key in KEYS:
        assert np.abs(cat[key].matrix() - svd[key].matrix()).max() < 1e-4


@pytest.mark.parametrize("method", [m for m in METHODS if m not in PEFT and m != "slerp"])
def test_an_adapter_of_weight_zero_takes_no_part(method):
    how = settings_of(method)
    with_it = lf.combine([*GIVEN, (adapter(9), 0.0)], method, **how)
    without = lf.combine(GIVEN, method, **how)
    assert lf.digest(with_it.adapter) == lf.digest(without.adapter)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_words_give_the_same_bytes(method, tmp_path):
    given = [(ONE, 0.7), (adapter(4), 1.5)]
    how = settings_of(method) | (
        {"density": 0.5} if method in PEFT and any(w in method for w in ("ties", "dare", "prune")) else {}
    )
    for name in ("x", "y"):
        lf.save(lf.combine(given, method, **how).adapter, tmp_path / name)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


@pytest.mark.parametrize("method", sorted(DRAWS & DENSE.keys()))
def test_what_is_drawn_depends_on_the_seed_and_not_on_the_order(method):
    how = settings_of(method)
    first = lf.combine(GIVEN, method, **how).adapter
    turned = lf.combine(GIVEN[::-1], method, **how).adapter
    other = lf.combine(GIVEN, method, **how | {"seed": 4}).adapter
    assert relative_error(turned["a.weight"].matrix(), first["a.weight"].matrix()) < 1e-6
    assert relative_error(other["a.weight"].matrix(), first["a.weight"].matrix()) > 0.1


def test_all_entries_kept_is_the_sum():
    for method in ("dare_linear", "magnitude_prune"):
        made = lf.combine(GIVEN, method, density=1.0, rank="full").adapter
        for key in KEYS:
            assert relative_error(made[key].matrix(), published("linear", key, GIVEN, 0)) < 1e-6


def test_only_two_targets_are_dense_at_a_time():
    many = {f"{i}.weight": (400, 300) for i in range(12)}
    given, dense_bytes = [(adapter(i, 2, keys=many), 1.0) for i in (1, 2)], 400 * 300 * 4
    lf.combine(given, "ties", density=0.5, rank=2)
    tracemalloc.start()
    try:
        lf.combine(given, "ties", density=0.5, rank=2)
        assert tracemalloc.get_traced_memory()[1] < 14 * dense_bytes
    finally:
        tracemalloc.stop()


def test_the_file_says_what_it_was_made_of():
    made = lf.combine(GIVEN, "ties", density=0.5, rank=2).adapter
    said = made.provenance["combined"]
    assert {name: said[name] for name in ("method", "density", "rank")} == {"method": "ties", "density": 0.5, "rank": 2}
    assert [item["digest"] for item in said["inputs"]] == [lf.digest(a) for a, _ in GIVEN]
    assert said["residuals"].keys() == KEYS.keys()


def test_there_is_a_test_for_every_method():
    assert {*DENSE, *LINEAR, *PEFT} == set(METHODS)
    assert all(function.__doc__ for function in (*DENSE.values(), *LINEAR.values()))
