"""Invalid and warned vectors of LF-311 to LF-314: values and dtypes."""

from __future__ import annotations

import numpy as np
from broken import DATA, KEY, LORA, broken, entries, laid, meta, pair, parts, value
from vector import numbers


def finite() -> None:
    """LF-311 and LF-312."""
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


def trained() -> None:
    """LF-313 and LF-314."""
    fresh, more = np.zeros((3, 2), np.float32), {"where": KEY, "warned": True}
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


SECTIONS = (finite, trained)
"""In the order of the rules."""
