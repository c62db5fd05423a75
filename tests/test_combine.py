"""Adapters combined on ΔW: every method against its formula on dense float64, laws, and what is refused."""

import json
import math
import tracemalloc
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from updates import made

import loraformat as lf
from loraformat import testing
from loraformat.axes import Placement
from loraformat.combining.methods import DENSE, DRAWS, LINEAR, METHODS, PEFT
from loraformat.normal import uniform
from loraformat.parts import Lora, Magnitude, Replace, Rows
from loraformat.testing import relative_error

KEYS = {"a.weight": (13, 11), "b.weight": (7, 19), "c.weight": (17, 5)}
DENSITY = 0.4


def adapter(seed, rank=3, alpha=2.0, rule="alpha/r", keys=KEYS, dtype=np.float32):
    draw = np.random.default_rng(seed)
    targets = {}
    for key, (out, in_) in keys.items():
        a, b = draw.standard_normal((rank, in_)), draw.standard_normal((out, rank))
        targets[key] = lf.Update((Lora(a.astype(dtype), b.astype(dtype), alpha, rule),))
    return lf.Adapter(targets)


def one_target(*parts, key="a.weight", **more):
    return lf.Adapter({key: lf.Update(parts, **more)})


def dense(adapter, key):
    """ΔW in float64, from the factors as they are stored."""
    part = adapter[key]["lora"]
    return part.scale * np.asarray(part.lora_B, np.float64) @ np.asarray(part.lora_A, np.float64)


ONE, TWO, THREE = (
    adapter(1),
    adapter(2, rank=5, alpha=-3.5, rule="alpha/sqrt(r)"),
    adapter(3, rank=2, keys={"a.weight": (13, 11)}),
)
GIVEN = [(ONE, 0.7), (TWO, -1.3), (THREE, 0.4)]


# What the papers say, on dense float64, written entry by entry.


def top(values, count):
    """The positions of the largest, as a mask."""
    mask = np.zeros(values.size, bool)
    mask[np.argsort(-np.abs(values), axis=None)[:count]] = True
    return mask.reshape(values.shape)


def majority(deltas):
    out = np.zeros(deltas[0].shape)
    for place in np.ndindex(out.shape):
        entries = [delta[place] for delta in deltas]
        sign = 1 if sum(entries) >= 0 else -1
        agreeing = [entry for entry in entries if entry * sign > 0]
        out[place] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return out


def trimmed(delta, density):
    return np.where(top(delta, int(density * delta.size)), delta, 0)


def dropped(delta, density, key, name, seed):
    keep = np.stack([uniform(seed, f"{key}\n{name}\n{row}", delta.shape[1]) for row in range(len(delta))]) < density
    return np.where(keep, delta / density, 0)


def ranked(delta, density, epsilon, key, name, seed):
    out = np.zeros(delta.shape)
    for i, row in enumerate(delta):
        drawn = uniform(seed, f"{key}\n{name}\n{i}", len(row))
        for rank, j in enumerate(np.argsort(np.abs(row))):
            kept = density - epsilon / 2 + epsilon * rank / (len(row) - 1)
            out[i, j] = row[j] / kept if drawn[j] < kept else 0
    return out


def without_outliers(delta, density, gamma):
    order = np.argsort(-np.abs(delta), axis=None)
    most = int(gamma * delta.size)
    mask = np.zeros(delta.size, bool)
    mask[order[most : most + int(density * delta.size)]] = True
    return np.where(mask.reshape(delta.shape), delta, 0)


def selected(deltas, density):
    if len(deltas) == 1:
        return deltas[0]
    mean = sum(deltas) / len(deltas)
    variance = sum((delta - mean) ** 2 for delta in deltas) / len(deltas)
    mask = top(variance, int(density * np.count_nonzero(variance)))
    deltas = [np.where(mask, delta, 0) for delta in deltas]
    squares = [np.sum(delta**2) for delta in deltas]
    out = np.zeros(mask.shape)
    for place in np.ndindex(out.shape):
        sign = 1 if sum(delta[place] for delta in deltas) >= 0 else -1
        agreeing = [(s, delta[place]) for s, delta in zip(squares, deltas, strict=True) if delta[place] * sign > 0]
        out[place] = sum(s * d for s, d in agreeing) / sum(s for s, _ in agreeing) if agreeing else 0.0
    return out


def published(method, key, given, seed):
    terms = [(a, w) for a, w in given if key in a and w]
    deltas = [w * dense(a, key) for a, w in terms]
    names = [lf.digest(a) for a, _ in terms]
    match method:
        case "ties":
            return majority([trimmed(d, DENSITY) for d in deltas])
        case "dare_linear":
            return sum(dropped(d, DENSITY, key, n, seed) for d, n in zip(deltas, names, strict=True))
        case "dare_ties":
            return majority([dropped(d, DENSITY, key, n, seed) for d, n in zip(deltas, names, strict=True)])
        case "magnitude_prune":
            return sum(trimmed(d, DENSITY) for d in deltas)
        case "della":
            return majority([ranked(d, DENSITY, 0.3, key, n, seed) for d, n in zip(deltas, names, strict=True)])
        case "breadcrumbs":
            return sum(without_outliers(d, DENSITY, 0.1) for d in deltas)
        case "sce":
            return selected(deltas, DENSITY)
    return sum(deltas)


def settings_of(method):
    more = {"density": DENSITY, "seed": 3, "gamma": 0.1, "epsilon": 0.3} if method in DENSE else {}
    return more | ({"rank": "full"} if method in DENSE else {"rank": 2} if method == "svd" else {})


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


# Exactly.


def test_one_adapter_keeps_its_bytes_and_only_alpha_is_multiplied():
    source = adapter(5, dtype=ml_dtypes.bfloat16)
    made = lf.combine([(source, 0.5)]).adapter
    for key in KEYS:
        part, old = made[key]["lora"], source[key]["lora"]
        assert part.lora_A is old.lora_A
        assert (part.alpha, part.scale_rule) == (1.0, "alpha/r")


def test_ratios_that_are_powers_of_two_lose_no_digit_in_16_bits():
    one, two = adapter(5, dtype=ml_dtypes.bfloat16), adapter(6, dtype=ml_dtypes.bfloat16)
    made = lf.combine([(one, 1.0), (two, -0.5)])
    part = made.adapter["a.weight"]["lora"]
    assert part.lora_B.dtype == ml_dtypes.bfloat16
    assert made.residuals["a.weight"] < 1e-15
    uneven = lf.combine([(one, 1.0), (two, 0.3)])
    assert uneven.adapter["a.weight"]["lora"].lora_B.dtype == np.float32
    assert uneven.residuals["a.weight"] < 1e-7


def test_linear_has_the_rank_that_the_sum_truly_has():
    made = lf.combine([(ONE, 1.0), (ONE, 0.5)], "linear").adapter
    assert {u.rank for u in made.values()} == {3}
    assert relative_error(made["a.weight"].matrix(), 1.5 * dense(ONE, "a.weight")) < 1e-6


MATRIX_KINDS = ("lora", "conv", "embedding", "experts", "loha", "lokr", "delta")


@pytest.mark.parametrize("method", ["cat", "linear", "svd", "ties"])
def test_every_kind_of_change_is_combined_with_another_of_its_kind(method):
    one, two = testing.random_adapter(1, MATRIX_KINDS), testing.random_adapter(2, MATRIX_KINDS)
    how = {"rank": 40} if method in ("svd", "ties") else {}
    how |= {"density": 1.0} if method == "ties" else {}
    made = lf.combine([(one, 0.5), (two, -2.0)], method, **how).adapter
    for key in one:
        deltas = [0.5 * one[key].matrix().astype(float), -2 * two[key].matrix().astype(float)]
        wanted = majority(deltas) if method == "ties" else sum(deltas)
        assert relative_error(made[key].matrix(), wanted) < 1e-5, key
        assert made[key].placement == one[key].placement


@pytest.mark.parametrize(
    "pair", [("tucker", "lora"), ("tucker", "tucker"), ("tucker loha", "tucker loha"), ("lora", "delta")]
)
def test_cores_and_mixed_kinds_are_put_side_by_side(pair):
    place = Placement((8, 3, 2, 4), (0,), (1, 2, 3))
    one, two = (one_target(*made(kind, place).parts, placement=place) for kind in pair)
    both = lf.combine([(one, 2.0), (two, 0.5)]).adapter["a.weight"]
    assert relative_error(both.matrix(), 2 * one["a.weight"].matrix() + 0.5 * two["a.weight"].matrix()) < 1e-6


def test_experts_that_share_a_factor_keep_sharing_it():
    draw = np.random.default_rng(1)
    shared = [
        one_target(Lora(draw.standard_normal((1, 2, 7)), draw.standard_normal((3, 5, 2)), 1.0, "factor")) for _ in "ab"
    ]
    cat, cut = (
        lf.combine([(a, 1.0) for a in shared], m, rank=r).adapter["a.weight"]["lora"]
        for m, r in (("cat", None), ("svd", 2))
    )
    assert cat.lora_A.shape == (1, 4, 7)
    assert (cut.lora_A.shape, cut.lora_B.shape) == ((1, 2, 7), (3, 5, 2))


def test_weights_by_pattern_multiply_where_they_mean_a_target():
    made = lf.combine([(ONE, {"*": 0.5, "a": -3.0}), (TWO, {"b": 2.0})]).adapter
    for key, (v, w) in {"a.weight": (-1.5, 1.0), "b.weight": (0.5, 2.0), "c.weight": (0.5, 1.0)}.items():
        assert relative_error(made[key].matrix(), v * dense(ONE, key) + w * dense(TWO, key)) < 1e-6


def test_a_target_that_every_weight_turns_off_is_gone_and_named():
    done = lf.combine([(ONE, {"a": 0.0}), (TWO, {"a": 0.0})])
    assert list(done.dropped) == ["a.weight"]
    assert done.adapter.keys() == {"b.weight", "c.weight"}


# What is no sum.

HEAD = Replace(np.random.default_rng(8).standard_normal((13, 11)).astype(np.float32), ("add",))
ROWS = Rows(np.random.default_rng(9).standard_normal((2, 11)).astype(np.float32), np.array([1, 4]))
MAGNITUDE = Magnitude(np.random.default_rng(10).random(13).astype(np.float32) + 1)
PAIR = ONE["a.weight"]["lora"]


def absolute(kind, *others):
    return lf.combine([(one_target(*parts), weight) for parts, weight in others], kind)


def test_what_one_adapter_replaces_gets_the_sums_of_the_others():
    update = absolute("cat", ((HEAD,), 1.0), ((PAIR,), -2.0)).adapter["a.weight"]
    assert update.kind == "replace+lora"
    assert (
        relative_error(
            update["lora"].scale * update["lora"].lora_B @ update["lora"].lora_A, -2 * dense(ONE, "a.weight")
        )
        < 1e-6
    )


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.25, 0.75)])
@pytest.mark.parametrize("part", [HEAD, ROWS])
def test_equal_absolute_values_stay(part, weights):
    update = absolute("cat", *(((part,), w) for w in weights)).adapter["a.weight"]
    assert update.parts == (part,)


@pytest.mark.parametrize(
    ("method", "others"),
    [
        ("cat", (((HEAD,), 0.5),)),
        ("cat", (((HEAD,), 1.0), ((replace(HEAD, replace=HEAD.replace + 1),), 1.0))),
        ("cat", (((ROWS,), 1.0), ((PAIR,), 1.0))),
        ("cat", (((ROWS,), 2.0),)),
        ("cat", (((PAIR, MAGNITUDE), 1.0), ((PAIR,), 1.0))),
        ("svd", (((PAIR, MAGNITUDE), 1.0), ((PAIR, MAGNITUDE), 1.0))),
        ("ties", (((PAIR, MAGNITUDE), 1.0),)),
        ("peft_svd", (((PAIR, MAGNITUDE), 1.0), ((PAIR,), 1.0))),
        ("peft_linear", (((PAIR,), 1.0), ((TWO["a.weight"]["lora"],), 1.0))),
    ],
)
def test_what_has_no_exact_combination_is_refused_by_name(method, others):
    how = {"density": 0.5, "rank": 2} if method == "ties" else {"rank": 2} if "svd" in method else {}
    with pytest.raises(lf.LoraFormatError, match=r"LF-612.*a\.weight"):
        lf.combine([(one_target(*parts), w) for parts, w in others], method, **how)


def test_a_dora_that_is_alone_at_its_target_keeps_its_magnitude():
    done = lf.combine(
        [(one_target(PAIR, MAGNITUDE), 0.5), (adapter(2, keys={"b.weight": (7, 19)}), 1.0)], "svd", rank=2
    )
    update = done.adapter["a.weight"]
    assert update["magnitude"] is MAGNITUDE
    assert update["lora"].r == 2
    with pytest.raises(lf.LoraFormatError, match="LF-612"):
        lf.combine([(adapter(1, rule="alpha/sqrt(r)"), 1.0), (ONE, 1.0)], "peft_svd")


# What is of another model, or makes no sense.


def placed(shape, spec):
    return replace(
        ONE, targets={k: replace(u, placement=Placement.of(shape, spec)) for k, u in ONE.items() if k == "a.weight"}
    )


@pytest.mark.parametrize(
    ("other", "rule"),
    [
        (lambda: replace(ONE, names="mlx"), "LF-507"),
        (lambda: replace(ONE, targets={f"unet:{k}": u for k, u in ONE.items()}, components=("unet",)), "LF-507"),
        (lambda: replace(ONE, base_model={"name": "other"}), "LF-607"),
        (lambda: replace(ONE, targets={k: replace(u, base_sha256="1" * 64) for k, u in ONE.items()}), "LF-607"),
        (lambda: adapter(1, keys={"a.weight": (11, 13)}), "LF-606"),
        (lambda: placed((11, 13), "in,out"), "LF-605"),
    ],
)
def test_adapters_of_different_models_are_refused(other, rule):
    first = replace(placed((13, 11), "out,in"), base_model={"name": "this"})
    first = replace(first, targets={k: replace(u, base_sha256="0" * 64) for k, u in first.items()})
    with pytest.raises(lf.LoraFormatError, match=rule):
        lf.combine([(first, 1.0), (other(), 1.0)])
    if rule == "LF-607":
        assert lf.combine([(first, 1.0), (other(), 1.0)], any_base=True).adapter


def test_what_is_said_of_the_result_is_what_all_say():
    one = replace(
        ONE,
        base_model={"name": "m", "revision": "1"},
        about={"license": "mit", "title": "x", "trigger_words": ["a", "b"]},
        extensions={"peft": '{"task_type": "CAUSAL_LM", "r": 3, "inner": {"x": 1, "y": 2}}', "mlx": "{}"},
    )
    two = replace(
        TWO,
        base_model={"name": "m", "size": 2},
        about={"license": "mit", "title": "y", "trigger_words": ["b", "c"]},
        extensions={"peft": '{"task_type": "CAUSAL_LM", "r": 5, "inner": {"x": 1, "y": 3}}'},
    )
    made = lf.combine([(one, 1.0), (two, 1.0)]).adapter
    assert made.base_model == {"name": "m", "revision": "1", "size": 2}
    assert made.about == {"license": "mit", "trigger_words": ["a", "b", "c"]}
    assert made.extensions.keys() == {"peft"}
    assert json.loads(made.extensions["peft"]) == {"task_type": "CAUSAL_LM", "inner": {"x": 1}}
    components = [
        replace(a, base_model={"unet": {"name": "m"} | more}) for a, more in ((one, {}), (two, {"revision": "2"}))
    ]
    assert lf.combine([(a, 1.0) for a in components]).adapter.base_model == {"unet": {"name": "m", "revision": "2"}}
    with pytest.raises(lf.LoraFormatError, match=r"LF-607.*base_model\.unet\.name"):
        lf.combine([(components[0], 1.0), (replace(two, base_model={"unet": {"name": "n"}}), 1.0)])


def test_a_placement_that_one_adapter_knows_is_the_result_s():
    assert lf.combine([(ONE, 1.0), (placed((13, 11), "out,in"), 1.0)]).adapter["a.weight"].placement.spec == "out,in"


@pytest.mark.parametrize(
    ("method", "how"),
    [
        ("tie", {}),
        ("ties", {"rank": 2}),
        ("ties", {"density": 0.5}),
        ("ties", {"density": 0.0, "rank": 2}),
        ("ties", {"density": 1.5, "rank": 2}),
        ("cat", {"density": 0.5}),
        ("cat", {"rank": 4}),
        ("svd", {}),
        ("svd", {"rank": 0}),
        ("svd", {"rank": "full"}),
        ("slerp", {}),
        ("della", {"density": 0.1, "epsilon": 0.3, "rank": 2}),
        ("breadcrumbs", {"density": 0.5, "gamma": 1.0, "rank": 2}),
        ("peft_cat", {"rank": 3}),
    ],
)
def test_settings_that_a_method_does_not_have_are_refused(method, how):
    with pytest.raises(lf.LoraFormatError, match="LF-705"):
        lf.combine(GIVEN, method, **how)


@pytest.mark.parametrize("weight", [math.nan, math.inf, {"nowhere": 1.0}])
def test_weights_that_mean_nothing_are_refused(weight):
    with pytest.raises(lf.LoraFormatError, match="LF-705"):
        lf.combine([(ONE, weight)])


def test_nothing_is_left_where_every_weight_is_zero():
    with pytest.raises(lf.LoraFormatError, match="LF-705"):
        lf.combine([(ONE, 0.0)])


def test_the_file_says_what_it_was_made_of():
    made = lf.combine(GIVEN, "ties", density=0.5, rank=2).adapter
    said = made.provenance["combined"]
    assert {name: said[name] for name in ("method", "density", "rank")} == {"method": "ties", "density": 0.5, "rank": 2}
    assert [item["digest"] for item in said["inputs"]] == [lf.digest(a) for a, _ in GIVEN]
    assert said["residuals"].keys() == KEYS.keys()


def test_there_is_a_test_for_every_method():
    assert {*DENSE, *LINEAR, *PEFT} == set(METHODS)
    assert all(function.__doc__ for function in (*DENSE.values(), *LINEAR.values()))
