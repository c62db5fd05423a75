"""What combining keeps exactly: bytes, dtypes, ranks, kinds; and weights by pattern."""

import ml_dtypes
import numpy as np
import pytest
from combined import KEYS, ONE, TWO, adapter, dense, majority, one_target
from updates import made

import loraformat as lf
from loraformat import testing
from loraformat.axes import Placement
from loraformat.parts import Lora
from loraformat.testing import relative_error


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
