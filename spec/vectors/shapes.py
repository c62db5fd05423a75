"""Invalid vectors of LF-306 to LF-309: scales and ranks, and tensors that do not fit each other."""

from __future__ import annotations

import json
from typing import Any

from broken import KEY, LORA, meta, pair, parts, value

HADA = {"hada_w1_a": (3, 2), "hada_w1_b": (2, 5), "hada_w2_a": (3, 2), "hada_w2_b": (2, 5)}
LOHA = LORA | {"kind": "loha"}
LOKR = {"kind": "lokr", "alpha": 4, "scale_rule": "alpha/r"}


def scales() -> None:
    """LF-306 to LF-308."""
    for name, alpha in (("text", "4"), ("null", None), ("true", True), ("list", [4]), ("huge", 1e39)):
        parts(f"LF-306-{name}", f"alpha is {json.dumps(alpha)}", LORA | {"alpha": alpha}, schema=True)
    parts("LF-307-unknown-rule", "a rule that nobody knows", LORA | {"scale_rule": "alpha/r^2"}, schema=True)
    parts("LF-307-r-zero", "a rank of zero", LORA | {"r": 0}, schema=True)
    kron = pair(None, None, lokr_w1=(2, 3), lokr_w2=(5, 7))
    parts("LF-307-no-r", "a rule that divides by a rank that nobody states", LOKR, tensors=kron)
    parts("LF-308-r", "r is 3, lora_A has 2 rows", LORA | {"r": 3})
    parts("LF-308-loha", "r is 3, hada_w1_b has 2 rows", LOHA | {"r": 3}, tensors=pair(None, None, **HADA))


def pairs() -> None:
    """LF-309: pairs and dense parts."""
    more: dict[str, Any] = {"where": KEY}
    meta("LF-309-rank", "lora_A of rank 2, lora_B of rank 4", value(), pair(b=(3, 4)), **more)
    meta("LF-309-one-axis", "lora_A has one axis", value(), pair(a=(2,)), **more)
    meta("LF-309-axes", "lora_A has a batch axis, lora_B has none", value(), pair(a=(3, 2, 5)), **more)
    meta("LF-309-batch", "batches of 4 and 6", value(), pair(a=(4, 2, 5), b=(6, 3, 2)), **more)
    meta("LF-309-mid", "a core of another rank", value(), pair(mid=(4, 4, 3, 3)), **more)
    meta("LF-309-mid-left", "a core that fits lora_A alone", value(), pair(mid=(4, 2, 3, 3)), **more)
    meta("LF-309-mid-right", "a core that fits lora_B alone", value(), pair(mid=(2, 4, 3, 3)), **more)
    meta("LF-309-mid-flat", "a core without kernel", value(), pair(mid=(2, 2)), **more)
    dense = {"kind": "delta", "alpha": 1, "scale_rule": "factor"}
    parts("LF-309-two-matrices", "a pair [3, 5] and a delta [5, 3]", LORA, dense, tensors=pair(delta=(5, 3)))
    batches = pair(a=(2, 2, 5), b=(2, 3, 2), delta=(4, 3, 5))
    parts("LF-309-two-batches", "a batch of 2 and a delta of 4", LORA, dense, tensors=batches)
    parts("LF-309-scalar", "a delta without axes", dense, tensors=pair(None, None, delta=()))


def products() -> None:
    """LF-309: products of products."""
    wrong = pair(None, None, **(HADA | {"hada_w2_a": (4, 2)}))
    parts("LF-309-loha", "the two products differ in shape", LOHA, tensors=wrong)
    parts("LF-309-one-core", "t1 without t2", LOHA, tensors=pair(None, None, **HADA, t1=(2, 2, 3, 3)))
    wrong = pair(None, None, **(HADA | {"hada_w2_b": (4, 5)}))
    parts("LF-309-loha-rank", "the second product has two ranks", LOHA, tensors=wrong)
    cored = {"hada_w1_a": (2, 3), "hada_w1_b": (2, 1), "t1": (2, 2, 5), "hada_w2_a": (3, 2), "hada_w2_b": (2, 5)}
    parts("LF-309-half-cored", "t1 without t2, of one matrix", LOHA, tensors=pair(None, None, **cored))
    factor = LOKR | {"scale_rule": "factor"}
    sides = {"lokr_w1": (2, 3), "lokr_w2": (5, 7)}
    both = pair(None, None, **sides, lokr_w2_a=(5, 2), lokr_w2_b=(2, 7))
    parts("LF-309-lokr-both", "w2 whole and as a product", factor, tensors=both)
    parts("LF-309-lokr-half", "w2_a without w2_b", factor, tensors=pair(None, None, lokr_w1=(2, 3), lokr_w2_a=(5, 2)))
    half = pair(None, None, lokr_w1=(2, 3), lokr_w2_b=(2, 7))
    parts("LF-309-lokr-other-half", "w2_b without w2_a", factor, tensors=half)
    whole_core = pair(None, None, **sides, t2=(4, 4, 3, 3))
    parts("LF-309-lokr-core-whole", "a core beside a whole w2", factor, tensors=whole_core)
    parts("LF-309-lokr-none", "no w1 at all", factor, tensors=pair(None, None, lokr_w2=(5, 7)))
    parts("LF-309-lokr-w2", "w2 has one axis", factor, tensors=pair(None, None, **(sides | {"lokr_w2": (5,)})))
    parts("LF-309-lokr-w1", "w1 has three axes", factor, tensors=pair(None, None, **(sides | {"lokr_w1": (2, 3, 4)})))
    around = {"lokr_w1": (2, 3), "lokr_w2_a": (4, 5), "lokr_w2_b": (4, 6)}
    for name, says, change in (
        ("core-rank", "a core of another rank", {"t2": (7, 7, 3, 3)}),
        ("core-scalar", "a core without axes", {"t2": ()}),
        ("core-flat", "a core without kernel", {"t2": (4, 4)}),
        ("core-b", "w2_b with three axes around a core", {"t2": (4, 4, 3, 3), "lokr_w2_b": (4, 6, 1)}),
    ):
        parts(f"LF-309-lokr-{name}", says, factor, tensors=pair(None, None, **(around | change)))


SECTIONS = (scales, pairs, products)
"""In the order of the rules."""
