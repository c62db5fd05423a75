"""What is no sum: values that replace others, trained rows, magnitudes."""

from dataclasses import replace

import numpy as np
import pytest
from combined import ONE, TWO, adapter, dense, one_target

import loraformat as lf
from loraformat.parts import Magnitude, Replace, Rows
from loraformat.testing import relative_error

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
