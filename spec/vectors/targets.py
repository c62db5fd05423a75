"""Invalid and warned vectors of LF-3xx and LF-4xx: targets, parts, placement."""

from __future__ import annotations

import json

import numpy as np
from broken import DATA, KEY, LORA, PLACED, broken, entries, laid, meta, pair, parts, value
from vector import numbers


def targets() -> None:
    """LF-301 to LF-314."""
    for name, says, key in (
        ("empty-key", "a key without text", ""),
        ("newline", "a key that could forge a line of a log", "a\nb"),
        ("c1-control", "U+0085 ends a line too", "a\x85b"),
        ("delete", "U+007F is a control character", "a\x7fb"),
        ("line-separator", "U+2028 ends a line in many programs", "a\u2028b"),
        ("bidi-override", "U+202E makes a name look like another", "a\u202eb"),
        ("bidi-isolate", "U+2066 does too", "a\u2066b"),
        ("not-nfc", "é as two code points", "cafe\u0301"),
        ("compatibility", "the Ångström sign is another spelling of Å", "\u212b"),
    ):
        told = value(targets={key: {"parts": [LORA]}})
        schema = name not in ("not-nfc", "compatibility")  # a regular expression cannot tell
        meta(f"LF-301-{name}", says, told, pair(key=key), schema=schema)
    more = {"where": KEY}
    meta("LF-302-no-role", "a tensor of another layout", value(), pair(alpha=np.array(4.0)), **more)
    meta("LF-302-no-dot", "a tensor without key", value(), pair() | {"lora_A": numbers("x", 2, 5)}, where="lora_A")
    other = pair() | pair(key="other.weight")
    meta("LF-302-unlisted", "tensors of a target that is not listed", value(), other, where="other.weight.lora_A")
    meta("LF-302-unused-role", "a magnitude without its part", value(), pair(magnitude=(3,)), where="magnitude")
    sketch = pair() | {"other.weight.sketch": numbers("sketch", 64)}
    meta("LF-302-sketch", "a sketch of nothing", value(), sketch, where="other.weight.sketch")
    meta("LF-303-no-A", "no lora_A", value(), pair(a=None), **more)
    meta("LF-303-no-B", "no lora_B", value(), pair(b=None), **more)
    parts("LF-303-no-indices", "rows without indices", {"kind": "rows"}, tensors=pair(None, None, values=(2, 5)))
    parts("LF-303-no-tensors", "a magnitude that is stated only", LORA, {"kind": "magnitude"})
    meta("LF-304-no-targets", "a file that would change nothing", value(targets={}), {}, where="targets", schema=True)
    parts("LF-305-empty", "a target without any part", tensors={}, schema=True)
    parts("LF-305-unknown-kind", "a kind of another library", {"kind": "oft"}, tensors={}, schema=True)
    newer = value({"parts": [{"kind": "oft"}]}, version="1.7")
    meta("LF-305-newer-kind", "a kind of a later version that no feature names", newer, {}, where=KEY, schema=True)
    parts("LF-305-no-kind", "a part without kind", {"alpha": 4, "scale_rule": "factor"}, schema=True)
    parts("LF-305-twice", "two lora parts", LORA, LORA)
    disorder = [{"kind": "magnitude"}, LORA]
    parts("LF-305-order", "a magnitude before what it scales", *disorder, tensors=pair(magnitude=(3,)))
    for name, alpha in (("text", "4"), ("null", None), ("true", True), ("list", [4]), ("huge", 1e39)):
        parts(f"LF-306-{name}", f"alpha is {json.dumps(alpha)}", LORA | {"alpha": alpha}, schema=True)
    parts("LF-307-unknown-rule", "a rule that nobody knows", LORA | {"scale_rule": "alpha/r^2"}, schema=True)
    parts("LF-307-r-zero", "a rank of zero", LORA | {"r": 0}, schema=True)
    whole = {"kind": "lokr", "alpha": 4, "scale_rule": "alpha/r"}
    kron = pair(None, None, lokr_w1=(2, 3), lokr_w2=(5, 7))
    parts("LF-307-no-r", "a rule that divides by a rank that nobody states", whole, tensors=kron)
    parts("LF-308-r", "r is 3, lora_A has 2 rows", LORA | {"r": 3})
    hada = {"hada_w1_a": (3, 2), "hada_w1_b": (2, 5), "hada_w2_a": (3, 2), "hada_w2_b": (2, 5)}
    loha = LORA | {"kind": "loha"}
    parts("LF-308-loha", "r is 3, hada_w1_b has 2 rows", loha | {"r": 3}, tensors=pair(None, None, **hada))
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
    wrong = pair(None, None, **(hada | {"hada_w2_a": (4, 2)}))
    parts("LF-309-loha", "the two products differ in shape", loha, tensors=wrong)
    parts("LF-309-one-core", "t1 without t2", loha, tensors=pair(None, None, **hada, t1=(2, 2, 3, 3)))
    wrong = pair(None, None, **(hada | {"hada_w2_b": (4, 5)}))
    parts("LF-309-loha-rank", "the second product has two ranks", loha, tensors=wrong)
    cored = {"hada_w1_a": (2, 3), "hada_w1_b": (2, 1), "t1": (2, 2, 5), "hada_w2_a": (3, 2), "hada_w2_b": (2, 5)}
    parts("LF-309-half-cored", "t1 without t2, of one matrix", loha, tensors=pair(None, None, **cored))
    factor = whole | {"scale_rule": "factor"}
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
    parts("LF-311-empty", "lora_A [2, 0]", LORA, tensors=pair(a=(2, 0)), where=f"{KEY}.lora_A")
    none = {"shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}
    huge = laid(entries(A=none, B={"data_offsets": [0, 24]}), DATA[:24])
    broken("LF-311-empty-huge", "no values, in a shape beyond all memory", huge, where=f"{KEY}.lora_A")
    for name, bad, dtype in (
        ("nan-bf16", np.nan, "bfloat16"),
        ("inf-f32", -np.inf, "float32"),
        ("nan-f16", np.nan, "float16"),
        ("inf-f16", np.inf, "float16"),
        ("inf-bf16", np.inf, "bfloat16"),
        ("inf-f8", np.inf, "float8_e5m2"),
        ("nan-f8-e5m2", np.nan, "float8_e5m2"),
    ):
        A = numbers("lora_A", 2, 5, dtype=dtype)
        A[1, 3] = bad
        meta(f"LF-312-{name}", "the training diverged", value(), pair(a=A), where=f"{KEY}.lora_A")
    A = numbers("lora_A", 2, 5, dtype="float8_e4m3fn")
    A.view(np.uint8)[1, 3] = 0x7F
    meta("LF-312-nan-f8", "the one NaN of F8_E4M3", value(), pair(a=A), where=f"{KEY}.lora_A")
    A = numbers("lora_A", 2, 5, dtype="float64")
    A[1, 3] = 1e39
    meta("LF-312-huge-f64", "an infinity in single precision", value(), pair(a=A), where=f"{KEY}.lora_A")
    sketch = numbers("sketch", 64)
    sketch[63] = np.nan
    meta("LF-312-sketch", "a sketch with NaN recognises nothing", value(), pair(sketch=sketch), where=f"{KEY}.sketch")
    fresh, more["warned"] = np.zeros((3, 2), np.float32), True
    meta("LF-313-zero-B", "a pair that was never trained", value(), pair(b=fresh), **more)
    meta("LF-313-negative-zero", "-0 is zero", value(), pair(b=-fresh), **more)
    for name, says, A in (
        ("int8", "quantised factors", np.ones((2, 5), np.int8)),
        ("complex", "complex factors", np.ones((2, 5), np.complex64)),
    ):
        meta(f"LF-314-{name}", says, value(), pair(a=A), where=f"{KEY}.lora_A")
    tokens = pair(None, None, values=(2, 5), indices=np.array([0, 3], np.int32))
    parts("LF-314-indices", "indices are I32", {"kind": "rows"}, tensors=tokens, where=f"{KEY}.indices")
    scores = pair(None, None, replace=np.ones(3, np.complex64))
    parts("LF-314-replace", "a complex parameter", {"kind": "replace"}, tensors=scores, where=f"{KEY}.replace")


def placement() -> None:
    """LF-401 to LF-408."""
    for name, says, target in (
        ("no-axes", "shape without axes", {"shape": [3, 5]}),
        ("no-shape", "axes without shape", {"axes": {"out": [0], "in": [1]}}),
    ):
        parts(f"LF-401-{name}", says, LORA, target=target, schema=True)
    for name, says, shape, axes, schema in (
        ("twice", "axis 0 on both sides of a square", [3, 3], {"out": [0], "in": [0]}, False),
        ("missing", "axis 2 nowhere", [3, 5, 1], {"out": [0], "in": [1]}, False),
        ("beyond", "axis 2 of two", [3, 5], {"out": [0], "in": [2]}, False),
        ("no-out", "nothing out", [3, 5], {"out": [], "in": [0, 1]}, True),
        ("empty-axis", "an axis of size 0", [3, 5, 0], {"out": [0], "in": [1, 2]}, True),
    ):
        parts(f"LF-402-{name}", says, LORA, target={"shape": shape, "axes": axes}, schema=schema)
    for name, says, target in (
        ("transposed", "factors [3, 5], placed as [5, 3]", {"shape": [3, 5], "axes": {"out": [1], "in": [0]}}),
        ("all-out", "15 numbers, all of them out", {"shape": [3, 5], "axes": {"out": [0, 1], "in": []}}),
        (
            "no-batch",
            "a batch axis that the factors lack",
            {"shape": [4, 3, 5], "axes": {"batch": [0], "out": [1], "in": [2]}},
        ),
    ):
        parts(f"LF-403-{name}", says, LORA, target=target)
    square = {"shape": [6, 6], "axes": {"out": [0, 1], "in": []}}
    parts("LF-403-square", "a square whose axes are both out", LORA, tensors=pair((2, 6), (6, 2)), target=square)
    batch = {"shape": [4, 3, 5], "axes": {"batch": [0], "out": [1], "in": [2]}}
    parts("LF-403-batch", "two pairs for four experts", LORA, tensors=pair((2, 2, 5), (2, 3, 2)), target=batch)
    for name, says, shape, fields, target, schema in (
        ("size", "five magnitudes for three outputs", (5,), {}, PLACED, False),
        ("rank", "magnitudes as a column", (3, 1), {}, PLACED, False),
        ("unplaced-size", "five magnitudes for three outputs, unplaced", (5,), {}, {}, False),
        ("unplaced-axes", "axes of an unplaced tensor", (3,), {"magnitude_axes": [0]}, {}, False),
        ("axis-twice", "an axis twice", (3, 3), {"magnitude_axes": [0, 0]}, PLACED, True),
        ("axis-beyond", "axis 2 of two", (3,), {"magnitude_axes": [2]}, PLACED, False),
        ("negative-eps", "eps below zero", (3,), {"eps": -1e-6}, PLACED, True),
    ):
        told = {"kind": "magnitude", **fields}
        parts(f"LF-404-{name}", says, LORA, told, tensors=pair(magnitude=shape), target=target, schema=schema)
    alone = pair(None, None, magnitude=(3,))
    parts("LF-404-alone-unplaced", "a magnitude of nobody knows which axis", {"kind": "magnitude"}, tensors=alone)
    for name, says, indices, shape, fields, target, schema in (
        ("unsorted", "indices out of order", [2, 0], (2, 5), {}, PLACED, False),
        ("twice", "an index twice", [1, 1], (2, 5), {}, PLACED, False),
        ("negative", "an index from the end", [-1, 2], (2, 5), {}, PLACED, False),
        ("beyond", "row 3 of three", [0, 3], (2, 5), {}, PLACED, False),
        ("count", "two indices, one row", [0, 2], (1, 5), {}, PLACED, False),
        ("count-unplaced", "two indices, one row, unplaced", [0, 2], (1, 5), {}, {}, False),
        ("width", "rows of another width", [0, 2], (2, 4), {}, PLACED, False),
        ("matrix", "indices with two axes", [[0], [2]], (2, 5), {}, PLACED, False),
        ("axis", "axis 2 of two", [0, 2], (2, 5), {"axis": 2}, PLACED, False),
        ("negative-axis", "an axis from the end", [0, 2], (2, 5), {"axis": -1}, {}, True),
    ):
        tensors = pair(None, None, values=shape, indices=np.array(indices, np.int64))
        parts(f"LF-405-{name}", says, {"kind": "rows", **fields}, tensors=tensors, target=target, schema=schema)
    tensors = pair(None, None, replace=(3, 5), values=(2, 5), indices=np.array([0, 3]))
    both = {"kind": "replace"}, {"kind": "rows"}
    parts("LF-405-beyond-replace", "row 3 of a replaced tensor of three", *both, tensors=tensors)
    new = pair(None, None, replace=(5, 3))
    parts("LF-406-shape", "replace [5, 3], placed as [3, 5]", {"kind": "replace"}, tensors=new, target=PLACED)
    for name, says, sha256 in (("upper-case", "capital digits", "A" * 64), ("short", "63 digits", "a" * 63)):
        parts(f"LF-407-{name}", says, LORA, target={"base_sha256": sha256}, schema=True)
    for name, says, sketch in (
        ("short", "32 values", numbers("sketch", 32)),
        ("column", "64 values as a column", numbers("sketch", 64, 1)),
        ("f16", "64 values of F16", numbers("sketch", 64, dtype="float16")),
    ):
        meta(f"LF-408-{name}", says, value(), pair(sketch=sketch), where="sketch")
