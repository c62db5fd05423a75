"""Valid vectors of whole files: metadata, components, names, binding to a base, spellings."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
from vector import Array, Vector, einsum, lora, magnitude, numbers, place, replaced, rows_of, valid


def _unplaced(v: Vector, key: str, **fields: object) -> None:
    A, B = v.numbers(2, 4), v.numbers(3, 2)
    v.target(key, lora(A, B, 6), **fields)
    v.expect(key, matrix=3 * einsum("or,ri->oi", B, A))


@valid("LF-209")
def components(v: Vector) -> None:
    """A model of several components: each key begins with one of them; the base is named for each."""
    v.top["components"] = ["text_encoder", "unet"]
    v.top["base_model"] = {"text_encoder": {"name": "example/clip"}, "unet": {"name": "example/unet"}}
    for key in ("unet:conv_in.weight", "unet:a:b.weight", "text_encoder:conv_in.weight"):
        _unplaced(v, key)


@valid("LF-104", "LF-208", "LF-301", "LF-302")
def hostile_names(v: Vector) -> None:
    """Keys are opaque: dots, colons, slashes, quotes, roles, other scripts; UTF-16 order is not code point order."""
    v.top["names"] = "org.example.names-2"
    for key in (
        "weight",
        "lora_A",
        "model.lora_A.weight.lora_B",
        "a.weight.weight",
        "trailing.",
        "..",
        "unet:not/a.component",
        'quote"back\\slash',
        " space ",
        "__metadata__",
        "données.é",
        "層.重み",
        "\U0001f600.weight",  # in UTF-16 before, in UTF-8 after the next
        "\ue000.weight",
        "zero\u200bwidth",
    ):
        _unplaced(v, key)


@valid("LF-203", "LF-407")
def all_metadata(v: Vector) -> None:
    """Every field of the metadata."""
    v.top["base_model"] = {"name": "example/base-7b", "revision": "0123abcd", "sha256": "0" * 64}
    v.top["about"] = {
        "title": "Ürbild №1",
        "license": "CC-BY-4.0",
        "trigger_words": ["ohwx", "in the style of 層"],
        "tags": [],
        "training": {"lr": 1e-4, "steps": 1000, "loss": 0.30000000000000004, "huge": 1e21, "tiny": 5e-324, "ok": True},
    }
    v.top["provenance"] = {"tool": "example", "version": "1.2.3", "sources": [{"layout": "peft", "note": None}]}
    v.top["extensions"] = {"peft": '{\n  "r": 2,\n  "note": "tab\\t, é, \\u0000, \\u2028"\n}\n', "org.example": ""}
    sketch = v.numbers(64)
    _unplaced(v, "bound.weight", op="embedding", assumed=["name", "bias"], base_sha256="0123456789abcdef" * 4)
    v.tensors["bound.weight.sketch"] = sketch


def _signs(side: str, size: int) -> Array:
    """[8, size]: ±1 by bit k of byte j of SHAKE-128."""
    drawn = np.frombuffer(hashlib.shake_128(f"loraformat/1\nsketch\n{side}".encode()).digest(size), np.uint8)
    return np.where(drawn[None, :] >> np.arange(8)[:, None] & 1, 1.0, -1.0)


def _sketch(matrix: Array) -> Array:
    """Of a base tensor as [batch, out, in]: 64 float32."""
    flat = matrix.astype(np.float64).reshape(-1, matrix.shape[-1])
    S = einsum("ko,oi,li->kl", _signs("out", flat.shape[0]), flat, _signs("in", flat.shape[1]))
    return S.astype(np.float32).reshape(64)


@valid("LF-407", "LF-408")
def bound(v: Vector) -> None:
    """Bound to a base: digests and sketches of a Linear, a Conv1D, kernels, experts, zeros; a bias has no sketch."""
    for key, spec, axes in (
        ("linear", "oi->oi", place([5, 7], out=[0], in_=[1])),
        ("conv1d", "io->oi", place([7, 5], out=[1], in_=[0])),
        ("kernel", "yxio->oiyx", place([3, 2, 4, 7], out=[3], in_=[2, 0, 1])),
        ("experts", "ieo->eoi", place([7, 3, 5], out=[2], in_=[0], batch=[1])),
        ("bias", "o->o", place([11], out=[0], in_=[])),
        ("zeros", "oi->oi", place([5, 7], out=[0], in_=[1])),
    ):
        shape, lists = axes["shape"], axes["axes"]
        sizes = {name: math.prod(shape[a] for a in lists[name]) for name in ("out", "in")}
        batch = [shape[a] for a in lists.get("batch", [])]
        W = v.numbers(*shape) if key != "zeros" else np.zeros(shape, np.float32)
        A, B = v.numbers(*batch, 2, sizes["in"]), v.numbers(*batch, sizes["out"], 2)
        wide = einsum(spec, W).reshape(*batch, sizes["out"], sizes["in"])
        v.target(key, lora(A, B, 6), **axes, base_sha256=hashlib.sha256(W.tobytes()).hexdigest())
        v.expect(key, matrix=3 * einsum("...or,...ri->...oi", B, A), base=W)
        if W.ndim > 1:
            v.tensors[f"{key}.sketch"] = _sketch(wide)
            v.expect(key, sketch=v.tensors[f"{key}.sketch"])


@valid("LF-408")
def recognised(v: Vector) -> None:
    """Sketches and no digest: of W as 4 bits hold it, a little larger, half as large where S was divided by its norm, any."""
    for key in ("rounded", "larger", "unit", "zeros"):
        W, A, B = (
            numbers(f"recognised/{key}/{name}", *shape) for name, shape in (("W", (9, 7)), ("A", (2, 7)), ("B", (9, 2)))
        )
        drawn = _sketch(W)
        held = {"rounded": np.round(W * 8) / 8, "larger": W * 1.125, "unit": W / 2, "zeros": W}[key].astype(np.float32)
        sketch = {"unit": (drawn / np.linalg.norm(drawn)).astype(np.float32), "zeros": 0 * drawn}.get(key, drawn)
        v.target(key, lora(A, B, 6), **place([9, 7], out=[0], in_=[1]))
        v.tensors[f"{key}.sketch"] = sketch
        matrix = 3 * einsum("or,ri->oi", B, A)
        v.becomes(key, held, held + matrix, matrix=matrix, sketch=_sketch(held))


@valid("LF-202")
def plain_numbers(v: Vector) -> None:
    """Numbers of every size in their one spelling, integers beyond 2^53 too, and 32 levels of nesting."""
    _unplaced(v, "w")
    nest: object = "deep"
    for _ in range(30):
        nest = [nest]
    v.top["about"] = {
        "training": {"integers": [-(2**53) + 1, 2.0**53, 1e16, 123456789012345670000.0, 1e20, 1e21, 1.5e300]},
        "nest": nest,
        "small": [1e-6, 1e-7, -0.001, 2.2250738585072014e-308, 5e-324],
    }


@valid("LF-205")
def newer_minor(v: Vector) -> None:
    """A version 1.7 that uses nothing new."""
    _unplaced(v, "w")
    v.top["version"], v.canonical = "1.7", False


@valid("LF-206")
def stated_defaults(v: Vector) -> None:
    """Defaults stated, r not: another spelling of the same content, so the same digest."""
    A, B, m, values = v.numbers(3, 4), v.numbers(6, 3), v.sizes(6), v.numbers(2, 4)
    parts = lora(A, B, 6), magnitude(m), rows_of(values, [1, 4])
    v.target("w", replaced(new := v.numbers(6, 4)), *parts, **place([6, 4], out=[0], in_=[1]))
    stated = v.top["targets"]["w"]["parts"]
    stated[0]["allows"], stated[2]["eps"], stated[3]["axis"] = [], 0, 0
    del stated[1]["r"]
    v.top |= {"requires": [], "components": [], "about": {}}
    v.canonical = False
    matrix = 2 * einsum("or,ri->oi", B, A)
    V = new + matrix
    result = einsum("o,oi->oi", m / np.sqrt(einsum("oi,oi->o", V, V)), V)
    result[1], result[4] = values[0], values[1]
    v.becomes("w", v.numbers(6, 4), result, matrix=matrix)


@valid("LF-103", "LF-105", "LF-107", "LF-109")
def other_order(v: Vector) -> None:
    """Tensors in another order than the reference serializer's, an unpadded header, and metadata of others."""
    _unplaced(v, "w")
    v.canonical = False
    A, B = v.tensors["w.lora_A"], v.tensors["w.lora_B"]
    header = {
        "w.lora_A": {"shape": list(A.shape), "data_offsets": [B.nbytes, B.nbytes + A.nbytes], "dtype": "F32"},
        "w.lora_B": {"dtype": "F32", "data_offsets": [0, B.nbytes], "shape": list(B.shape)},
        "__metadata__": {"format": "pt", "loraformat": v.text, "ss_network_dim": "2"},
    }
    text = json.dumps(header).encode()
    v.data = len(text).to_bytes(8, "little") + text + B.tobytes() + A.tobytes()
