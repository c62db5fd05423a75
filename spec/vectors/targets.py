"""Invalid and warned vectors of LF-301 to LF-305: keys and parts."""

from __future__ import annotations

from typing import Any

import numpy as np
from broken import KEY, LORA, meta, pair, parts, value
from vector import numbers


def keys() -> None:
    """LF-301 and LF-302."""
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
    more: dict[str, Any] = {"where": KEY}
    meta("LF-302-no-role", "a tensor of another layout", value(), pair(alpha=np.array(4.0)), **more)
    meta("LF-302-no-dot", "a tensor without key", value(), pair() | {"lora_A": numbers("x", 2, 5)}, where="lora_A")
    other = pair() | pair(key="other.weight")
    meta("LF-302-unlisted", "tensors of a target that is not listed", value(), other, where="other.weight.lora_A")
    meta("LF-302-unused-role", "a magnitude without its part", value(), pair(magnitude=(3,)), where="magnitude")
    sketch = pair() | {"other.weight.sketch": numbers("sketch", 64)}
    meta("LF-302-sketch", "a sketch of nothing", value(), sketch, where="other.weight.sketch")


def listed() -> None:
    """LF-303 to LF-305."""
    more: dict[str, Any] = {"where": KEY}
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


SECTIONS = (keys, listed)
"""In the order of the rules."""
