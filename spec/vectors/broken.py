"""Invalid vectors: a sound file of one target, broken in one way each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import rfc8785
from safetensors.numpy import save
from vector import Array, numbers

BROKEN: list[Broken] = []
"""Every invalid vector, in the order of the rules."""

KEY = "layer.weight"
LORA = {"kind": "lora", "r": 2, "alpha": 4, "scale_rule": "alpha/r"}
PLACED = {"shape": [3, 5], "axes": {"out": [0], "in": [1]}}
_MISSING = object()


@dataclass(frozen=True)
class Broken:
    """One invalid vector.

    Attributes:
        file: its name, which begins with the rule.
        says: what is wrong, in a sentence.
        where: text that the place named by a report contains.
        schema: whether the JSON Schema of the metadata refuses it too.
    """

    file: str
    says: str
    data: bytes
    where: str = ""
    severity: str = "error"
    schema: bool = False

    def as_json(self) -> dict[str, Any]:
        """The entry in the index."""
        return {
            "file": self.file,
            "rule": self.file[:6],
            "severity": self.severity,
            "where": self.where,
            "says": self.says,
            "schema": self.schema,
        }


def broken(name: str, says: str, data: bytes, **more: Any) -> None:
    """Add a file of these bytes."""
    BROKEN.append(Broken(f"{name}.safetensors", says, data, **more))


def value(target: Any = None, /, **changes: Any) -> dict[str, Any]:
    """The metadata value of the sound file, its target or fields changed; ``_MISSING`` leaves a field out."""
    whole = {"version": "1.0", "names": "torch", "targets": {KEY: {"parts": [LORA]} if target is None else target}}
    return {name: member for name, member in (whole | changes).items() if member is not _MISSING}


def pair(a: Any = (2, 5), b: Any = (3, 2), key: str = KEY, **others: Any) -> dict[str, Array]:
    """The tensors of the sound file, of other shapes or with others beside; None leaves one out."""
    roles = {"lora_A": a, "lora_B": b, **others}
    return {f"{key}.{role}": _tensor(role, tensor) for role, tensor in roles.items() if tensor is not None}


def _tensor(seed: str, tensor: Any) -> Array:
    return tensor if isinstance(tensor, np.ndarray) else numbers(seed, *tensor)


def meta(name: str, says: str, told: Mapping[str, Any] | str, tensors: Mapping[str, Array], **more: Any) -> None:
    """Add a file of this metadata value or text, laid out by the reference serializer."""
    text = told if isinstance(told, str) else rfc8785.dumps(dict(told)).decode()
    broken(name, says, save(dict(tensors), metadata={"loraformat": text}), **more)


def parts(name: str, says: str, *entries: Any, tensors: Mapping[str, Array] | None = None, **more: Any) -> None:
    """Add a file whose target has these parts, and the fields in ``target``."""
    target = {"parts": list(entries), **more.pop("target", {})}
    meta(name, says, value(target), pair() if tensors is None else tensors, where=more.pop("where", KEY), **more)


def laid(header: Mapping[str, Any] | str | bytes, data: bytes = b"") -> bytes:
    """A container with this header, whatever it says."""
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + data


def entries(**changed: Any) -> dict[str, Any]:
    """The header of the sound file; ``A`` and ``B`` change the entries of its two tensors, ``meta`` the metadata."""
    A = {"dtype": "F32", "shape": [2, 5], "data_offsets": [0, 40]} | changed.get("A", {})
    B = {"dtype": "F32", "shape": [3, 2], "data_offsets": [40, 64]} | changed.get("B", {})
    told = changed.get("meta", {"loraformat": rfc8785.dumps(value()).decode()})
    header = {"__metadata__": told, f"{KEY}.lora_A": A, f"{KEY}.lora_B": B}
    return {
        n: {k: v for k, v in e.items() if v is not _MISSING} if isinstance(e, dict) else e for n, e in header.items()
    }


DATA = b"".join(tensor.tobytes() for tensor in pair().values())
SOUND = laid(entries(), DATA)
TEXT = rfc8785.dumps(value()).decode()


def container() -> None:
    """LF-101 to LF-109."""
    broken("LF-101-empty-file", "no bytes at all", b"")
    broken("LF-101-seven-bytes", "the header length is cut", b"\x00" * 7)
    broken("LF-102-length-2-63", "a header of 2^63 bytes", (2**63).to_bytes(8, "little") + SOUND[8:])
    broken("LF-102-length-beyond-cap", "a header of 100,000,001 bytes", (100_000_001).to_bytes(8, "little"))
    broken("LF-102-truncated-header", "the file ends within the header", SOUND[:100])
    broken("LF-103-not-json", "the header is no JSON", laid("{'single': 'quotes'}"))
    broken("LF-103-not-utf8", "the header is Latin-1", laid('{"\xe9":1}'.encode("latin-1")))
    broken("LF-103-list", "the header is a list", laid("[]"))
    broken("LF-103-nan", "NaN is no JSON", laid(json.dumps(entries()).replace("[0, 40]", "[0, NaN]"), DATA))
    text = json.dumps(entries())
    again = f', "{KEY}.lora_B": {{"dtype": "F32", "shape": [3, 2], "data_offsets": [40, 64]}}}}'
    broken("LF-104-tensor-twice", "a tensor is listed twice", laid(text[:-1] + again, DATA))
    broken("LF-104-metadata-twice", "a second __metadata__", laid(text[:-1] + ', "__metadata__": {}}', DATA))
    twice = text.replace('"dtype": "F32"', '"dtype": "F16", "dtype": "F32"')
    broken("LF-104-dtype-twice", "an entry has two dtypes", laid(twice, DATA))
    for name, says, change in (
        ("no-shape", "an entry without shape", {"shape": _MISSING}),
        ("extra-field", "an entry with a field of its own", {"scale": 2}),
        ("negative-shape", "a negative size", {"shape": [-2, -5]}),
        ("float-shape", "a size that is no integer", {"shape": [2.0, 5]}),
        ("three-offsets", "three offsets", {"data_offsets": [0, 40, 64]}),
        ("shape-2-64", "a size beyond 63 bits", {"shape": [2**64, 0]}),
        ("many-axes", "a tensor of 40 axes", {"shape": [2, 5] + [1] * 38}),
    ):
        broken(f"LF-105-{name}", says, laid(entries(A=change), DATA), where=f"{KEY}.lora_A")
    broken("LF-106-unknown-dtype", "F31 is no dtype", laid(entries(A={"dtype": "F31"}), DATA), where=f"{KEY}.lora_A")
    packed = {"dtype": "F4", "shape": [16, 5]}
    broken("LF-106-packed-dtype", "F4 has no whole byte", laid(entries(A=packed), DATA), where=f"{KEY}.lora_A")
    overlap = entries(B={"data_offsets": [36, 60]})
    broken("LF-107-overlap", "two tensors share bytes", laid(overlap, DATA[:60]), where=f"{KEY}.lora_B")
    hole = entries(B={"data_offsets": [44, 68]})
    broken("LF-107-hole", "four bytes belong to no tensor", laid(hole, DATA + bytes(4)), where=f"{KEY}.lora_B")
    broken("LF-107-truncated", "the last four bytes are missing", SOUND[:-4])
    broken("LF-107-polyglot-tail", "an empty zip archive follows", SOUND + b"PK\x05\x06" + bytes(18))
    short = entries(A={"shape": [2, 6]})
    broken("LF-108-short", "40 bytes for 12 float32 values", laid(short, DATA), where=f"{KEY}.lora_A")
    back = entries(A={"data_offsets": [40, 0]})
    broken("LF-108-backwards", "offsets that run backwards", laid(back, DATA), where=f"{KEY}.lora_A")
    broken("LF-109-object", "the value is an object, not text", laid(entries(meta={"loraformat": value()}), DATA))
    broken("LF-109-list", "__metadata__ is a list", laid(entries(meta=[]), DATA))


def top() -> None:
    """LF-201 to LF-209."""
    broken("LF-201-no-metadata", "a plain safetensors file", save(pair()))
    broken("LF-201-other-metadata", "metadata of another tool", save(pair(), metadata={"format": "pt"}))
    for name, says, text, schema in (
        ("not-json", "the text is cut", TEXT[:-1], False),
        ("empty", "the text is empty", "", False),
        ("list", "a list", "[]", True),
        ("duplicate-key", "alpha is stated twice", TEXT.replace('"alpha":4', '"alpha":4,"alpha":8'), False),
        ("nan", "NaN is no JSON", TEXT.replace('"alpha":4', '"alpha":NaN'), False),
        ("infinite", "1e400 is beyond float64", TEXT.replace('"alpha":4', '"alpha":1e400'), False),
        ("integer-2-53", "an integer that float64 cannot tell from the next", TEXT.replace(":4", f":{2**53}"), False),
        ("surrogate", "half of a surrogate pair", TEXT.replace('"kind"', '"\\ud800":1,"kind"'), False),
        ("deep", "2,000 lists in each other", TEXT.replace('"alpha":4', f'"alpha":{"[" * 2000}{"]" * 2000}'), False),
    ):
        meta(f"LF-202-{name}", says, text, pair(), where="loraformat", schema=schema)
    for name in ("version", "names", "targets"):
        told = value(**{name: _MISSING})
        tensors = pair() if name != "targets" else {}
        meta(f"LF-203-no-{name}", f"no {name}", told, tensors, where="loraformat", schema=True)
    for name, says, wrong in (
        ("version", "number", 1.0), ("names", "null", None), ("targets", "list", []), ("requires", "text", "x"),
        ("requires", "object-within", [{}]), ("components", "number-within", [1]), ("base_model", "text", "x"),
        ("about", "null", None), ("provenance", "list", []), ("extensions", "object-within", {"peft": {"r": 8}}),
    ):  # fmt: skip
        told = value(**{name: wrong})
        tensors = pair() if name != "targets" else {}
        meta(f"LF-203-{name}-{says}", f"{name} is {json.dumps(wrong)}", told, tensors, where=name, schema=True)
    wide = {"schema": True, "tensors": pair(None, None, delta=(3, 5))}
    meta("LF-203-target-list", "a target is a list", value([]), {}, where=KEY, schema=True)
    meta("LF-203-no-parts", "a target without parts", value(PLACED), {}, where=KEY, schema=True)
    parts("LF-203-no-alpha", "alpha has no default", {"kind": "delta", "scale_rule": "factor"}, **wide)
    parts("LF-203-no-scale-rule", "scale_rule has no default", {"kind": "delta", "alpha": 1}, **wide)
    parts("LF-203-r-bool", "r is true", {"kind": "delta", "alpha": 1, "scale_rule": "factor", "r": True}, **wide)
    parts("LF-203-r-text", "r is a text", LORA | {"r": "2"}, schema=True)
    parts("LF-203-r-null", "null is not absent", LORA | {"r": None}, schema=True)
    parts("LF-203-assumed-number", "assumed holds a number", LORA, target={"assumed": [1]}, schema=True)
    parts("LF-203-op-list", "op is a list", LORA, target={"op": []}, schema=True)
    axes = {"shape": [3, 5], "axes": {"out": [0]}}
    parts("LF-203-no-in", "axes without in", LORA, target=axes, schema=True)
    axes = {"shape": [3, -5], "axes": {"out": [0], "in": [1]}}
    parts("LF-203-negative-shape", "a size below zero", LORA, target=axes, schema=True)
    axes = {"shape": [3, 5], "axes": {"out": ["0"], "in": [1]}}
    parts("LF-203-axis-text", "an axis is a text", LORA, target=axes, schema=True)
    new = pair(None, None, replace=(3, 5))
    parts(
        "LF-203-allows-word",
        "allows holds another word",
        {"kind": "replace", "allows": ["shrink"]},
        tensors=new,
        schema=True,
    )
    parts(
        "LF-203-allows-object", "allows holds an object", {"kind": "replace", "allows": [{}]}, tensors=new, schema=True
    )
    sizes = {"kind": "magnitude", "magnitude_axes": [0.5]}
    parts("LF-203-axis-half", "an axis is 0.5", LORA, sizes, tensors=pair(magnitude=(3,)), target=PLACED, schema=True)
    sizes = {"kind": "magnitude", "magnitude_axes": [[0]]}
    parts(
        "LF-203-axis-list", "an axis is a list", LORA, sizes, tensors=pair(magnitude=(3,)), target=PLACED, schema=True
    )
    warned = {"severity": "warning"}
    meta("LF-204-top", "a misspelt field", value(base_modle={}), pair(), where="loraformat", **warned)
    parts("LF-204-target", "an unknown field of a target", LORA, target={"dropout": 0.1}, **warned)
    parts("LF-204-part", "an unknown field of a part", LORA | {"use_rslora": True}, **warned)
    axes = {"shape": [3, 5], "axes": {"out": [0], "in": [1], "heads": []}}
    parts("LF-204-axes", "an unknown group of axes", LORA, target=axes, **warned)
    for name, version in (("2-0", "2.0"), ("0-9", "0.9"), ("no-minor", "1"), ("word", "1.banana"), ("empty", "")):
        told = value(version=version)
        meta(f"LF-205-{name}", f"version {version!r}", told, pair(), where="loraformat.version", schema=True)
    told = value(requires=["org.example.conditional-tokens"])
    meta(
        "LF-206-unknown-feature", "a feature that nobody knows", told, pair(), where="loraformat.requires", schema=True
    )
    more = {"where": "loraformat", **warned}
    meta("LF-207-spaces", "spaces after colons", json.dumps(json.loads(TEXT)), pair(), **more)
    meta("LF-207-key-order", "keys out of order", json.dumps(value(), separators=(",", ":")), pair(), **more)
    meta("LF-207-number", "4.0 for 4", TEXT.replace('"alpha":4', '"alpha":4.0'), pair(), **more)
    meta("LF-207-escape", "an escaped letter", TEXT.replace("torch", "\\u0074orch"), pair(), **more)
    for name, space in (("capital", "Torch"), ("one-word", "pytorch"), ("path", "org/example"), ("empty", "")):
        where = "loraformat.names"
        meta(f"LF-208-{name}", f"names is {space!r}", value(names=space), pair(), where=where, schema=True)
    unet = value(components=["unet"])
    meta("LF-209-no-component", "the key names no component", unet, pair(), where=KEY)
    for name, says, key in (("no-colon", "no colon after it", "unet"), ("no-name", "no name after it", "unet:")):
        told = value(components=["unet"], targets={key: {"parts": [LORA]}})
        meta(f"LF-209-{name}", says, told, pair(key=key), where=key)
    told = value(components=["a-b"], targets={"a-b:w": {"parts": [LORA]}})
    meta("LF-209-no-identifier", "a component with a hyphen", told, pair(key="a-b:w"), where="components", schema=True)
    told = value(components=["unet", "unet"], targets={"unet:w": {"parts": [LORA]}})
    meta("LF-209-twice", "a component twice", told, pair(key="unet:w"), where="components", schema=True)


def targets() -> None:
    """LF-301 to LF-314."""
    for name, says, key in (
        ("empty-key", "a key without text", ""),
        ("newline", "a key that could forge a line of a log", "a\nb"),
        ("c1-control", "U+0085 ends a line too", "a\x85b"),
        ("delete", "U+007F is a control character", "a\x7fb"),
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
    parts("LF-305-no-kind", "a part without kind", {"alpha": 4, "scale_rule": "factor"}, schema=True)
    parts("LF-305-twice", "two lora parts", LORA, LORA)
    disorder = [{"kind": "magnitude"}, LORA]
    parts("LF-305-order", "a magnitude before what it scales", *disorder, tensors=pair(magnitude=(3,)))
    for name, alpha in (("text", "4"), ("null", None), ("true", True), ("list", [4])):
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
    meta("LF-309-axes", "lora_A has a batch axis, lora_B has none", value(), pair(a=(4, 2, 5)), **more)
    meta("LF-309-batch", "batches of 4 and 6", value(), pair(a=(4, 2, 5), b=(6, 3, 2)), **more)
    meta("LF-309-mid", "a core of another rank", value(), pair(mid=(4, 4, 3, 3)), **more)
    dense = {"kind": "delta", "alpha": 1, "scale_rule": "factor"}
    parts("LF-309-two-matrices", "a pair [3, 5] and a delta [5, 3]", LORA, dense, tensors=pair(delta=(5, 3)))
    batches = pair(a=(2, 2, 5), b=(2, 3, 2), delta=(4, 3, 5))
    parts("LF-309-two-batches", "a batch of 2 and a delta of 4", LORA, dense, tensors=batches)
    parts("LF-309-scalar", "a delta without axes", dense, tensors=pair(None, None, delta=()))
    wrong = pair(None, None, **(hada | {"hada_w2_a": (4, 2)}))
    parts("LF-309-loha", "the two products differ in shape", loha, tensors=wrong)
    parts("LF-309-one-core", "t1 without t2", loha, tensors=pair(None, None, **hada, t1=(2, 2, 3, 3)))
    factor = whole | {"scale_rule": "factor"}
    sides = {"lokr_w1": (2, 3), "lokr_w2": (5, 7)}
    both = pair(None, None, **sides, lokr_w2_a=(5, 2), lokr_w2_b=(2, 7))
    parts("LF-309-lokr-both", "w2 whole and as a product", factor, tensors=both)
    parts("LF-309-lokr-half", "w2_a without w2_b", factor, tensors=pair(None, None, lokr_w1=(2, 3), lokr_w2_a=(5, 2)))
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
    ):
        A = numbers("lora_A", 2, 5, dtype=dtype)
        A[1, 3] = bad
        meta(f"LF-312-{name}", "the training diverged", value(), pair(a=A), where=f"{KEY}.lora_A")
    A = numbers("lora_A", 2, 5, dtype="float8_e4m3fn")
    A.view(np.uint8)[1, 3] = 0x7F
    meta("LF-312-nan-f8", "the one NaN of F8_E4M3", value(), pair(a=A), where=f"{KEY}.lora_A")
    sketch = numbers("sketch", 64)
    sketch[63] = np.nan
    meta("LF-312-sketch", "a sketch with NaN recognises nothing", value(), pair(sketch=sketch), where=f"{KEY}.sketch")
    fresh, more["severity"] = np.zeros((3, 2), np.float32), "warning"
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


for section in (container, top, targets, placement):
    section()
