"""Invalid and warned vectors of LF-2xx: the metadata value."""

from __future__ import annotations

import json

import numpy as np
from broken import DATA, KEY, LORA, MISSING, PLACED, TEXT, broken, entries, laid, meta, pair, parts, value
from safetensors.numpy import save


def present() -> None:
    """LF-201 and LF-202."""
    broken("LF-201-no-metadata", "a plain safetensors file", save(pair()))
    broken("LF-201-null-metadata", "__metadata__ is null, as if absent", laid(entries(meta=None), DATA))
    broken("LF-201-other-metadata", "metadata of another tool", save(pair(), metadata={"format": "pt"}))
    for name, says, text, schema in (
        ("not-json", "the text is cut", TEXT[:-1], False),
        ("empty", "the text is empty", "", False),
        ("list", "a list", "[]", True),
        ("duplicate-key", "alpha is stated twice", TEXT.replace('"alpha":4', '"alpha":4,"alpha":8'), False),
        ("nan", "NaN is no JSON", TEXT.replace('"alpha":4', '"alpha":NaN'), False),
        ("infinite", "1e400 is beyond float64", TEXT.replace('"alpha":4', '"alpha":1e400'), False),
        ("integer-2-53", "an integer that double precision rounds", TEXT.replace(":4", f":{2**53 + 1}"), False),
        ("integer-400", "an integer of 400 digits", TEXT.replace('"alpha":4', f'"alpha":1{"0" * 399}'), False),
        ("equals-sign", "an equals sign for a colon", TEXT.replace('"alpha":4', '"alpha"=4'), False),
        ("semicolon", "a semicolon for a comma", TEXT.replace('"alpha":4,', '"alpha":4;'), False),
        ("single-quotes", "single quotes", TEXT.replace('"alpha"', "'alpha'"), False),
        ("raw-newline", "a line break within a string", TEXT.replace('"torch"', '"torch\n"'), False),
        ("two-values", "a second value behind the first", TEXT + "{}", False),
        ("trailing-comma", "a comma too many", TEXT.replace('"alpha":4', '"alpha":4,'), False),
        ("leading-zero", "04 is no JSON number", TEXT.replace('"alpha":4', '"alpha":04'), False),
        ("target-twice", "a target twice", TEXT.replace('"targets":{', f'"targets":{{"{KEY}":{{"parts":[]}},'), False),
        (
            "33-levels",
            "33 levels of lists and objects",
            TEXT.replace('"alpha":4', f'"alpha":{"[" * 28}{"]" * 28}'),
            False,
        ),
        ("surrogate", "half of a surrogate pair", TEXT.replace('"kind"', '"\\ud800":1,"kind"'), False),
        ("deep", "2,000 lists in each other", TEXT.replace('"alpha":4', f'"alpha":{"[" * 2000}{"]" * 2000}'), False),
    ):
        meta(f"LF-202-{name}", says, text, pair(), where="loraformat", schema=schema)


def typed() -> None:
    """LF-203: a field is missing, or of another type."""
    for name in ("version", "names", "targets"):
        told = value(**{name: MISSING})
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


def null() -> None:
    """LF-203: null is not absent."""
    for name in ("version", "requires", "components", "base_model", "provenance", "extensions"):
        told = value(**{name: None})
        meta(f"LF-203-{name}-null", f"{name} is null: null is not absent", told, pair(), where=name, schema=True)
    for name in ("shape", "axes", "op", "assumed", "base_sha256"):
        told = (PLACED if name in PLACED else {}) | {name: None}
        parts(f"LF-203-{name}-null", f"{name} is null: null is not absent", LORA, target=told, schema=True)
    for name in ("out", "in", "batch"):
        told = {"shape": [3, 5], "axes": PLACED["axes"] | {name: None}}
        parts(f"LF-203-axes-{name}-null", f"{name} is null: null is not absent", LORA, target=told, schema=True)
    for name, kind, more in (
        ("scale_rule", LORA, {}),
        ("magnitude_axes", {"kind": "magnitude"}, {"magnitude": (3,)}),
        ("eps", {"kind": "magnitude"}, {"magnitude": (3,)}),
        ("allows", {"kind": "replace"}, {"a": None, "b": None, "replace": (3, 5)}),
        ("axis", {"kind": "rows"}, {"a": None, "b": None, "values": (2, 5), "indices": np.array([0, 2])}),
    ):
        listed = [kind | {name: None}] if "a" in more or kind is LORA else [LORA, kind | {name: None}]
        says = f"{name} is null: null is not absent"
        parts(f"LF-203-{name}-null", says, *listed, tensors=pair(**more), target=PLACED, schema=True)


def inner() -> None:
    """LF-203: the fields of targets and parts."""
    wide = {"schema": True, "tensors": pair(None, None, delta=(3, 5))}
    meta("LF-203-target-null", "a target is null", value(targets={KEY: None}), {}, where=KEY, schema=True)
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


def newer() -> None:
    """LF-204 to LF-206."""
    warned = {"warned": True}
    meta("LF-204-top", "a misspelt field", value(base_modle={}), pair(), where="loraformat", **warned)
    parts("LF-204-target", "an unknown field of a target", LORA, target={"dropout": 0.1}, **warned)
    parts("LF-204-part", "an unknown field of a part", LORA | {"use_rslora": True}, **warned)
    axes = {"shape": [3, 5], "axes": {"out": [0], "in": [1], "heads": []}}
    parts("LF-204-axes", "an unknown group of axes", LORA, target=axes, **warned)
    newer = value(version="1.7", licence="MIT")
    meta("LF-204-newer-minor", "a field that a later minor version added", newer, pair(), where="loraformat", **warned)
    strange = value(version="2.0", targets=[], requires=None)
    meta("LF-205-2-0-strange", "nothing else in a version 2.0 is read", strange, {}, where="version", schema=True)
    for name, version in (("2-0", "2.0"), ("0-9", "0.9"), ("no-minor", "1"), ("word", "1.banana"), ("empty", "")):
        told = value(version=version)
        meta(f"LF-205-{name}", f"version {version!r}", told, pair(), where="loraformat.version", schema=True)
    told = value(requires=["org.example.conditional-tokens"])
    meta(
        "LF-206-unknown-feature", "a feature that nobody knows", told, pair(), where="loraformat.requires", schema=True
    )
    newer = value({"parts": [{"kind": "oft"}]}, version="1.7", requires=["oft"])
    says = "a kind that a later minor version added, named: no other report"
    meta("LF-206-newer-kind", says, newer, pair(None, None, oft_R=(3, 5)), where="requires", schema=True)


def spelled() -> None:
    """LF-207 to LF-209."""
    more = {"where": "loraformat", "warned": True}
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


SECTIONS = (present, typed, null, inner, newer, spelled)
"""In the order of the rules."""
