"""Invalid vectors of LF-4xx: placement and special parts."""

from __future__ import annotations

import numpy as np
from broken import LORA, PLACED, meta, pair, parts, value
from vector import numbers


def axes() -> None:
    """LF-401 to LF-403."""
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


def magnitudes() -> None:
    """LF-404."""
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


def absolutes() -> None:
    """LF-405 to LF-408."""
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


SECTIONS = (axes, magnitudes, absolutes)
"""In the order of the rules."""
