"""Valid vectors of replace, magnitude and rows, and of every part together."""

from __future__ import annotations

import numpy as np
from vector import Vector, einsum, lora, magnitude, place, replaced, rows_of, valid


@valid()
def replace(v: Vector) -> None:
    """Trained biases and norms: the parameter becomes what is stored; no placement is needed."""
    for key, shape in (("layer.bias", (5,)), ("norm.weight", (7,)), ("head.weight", (4, 3))):
        new = v.numbers(*shape, dtype="float16")
        v.target(key, replaced(new))
        v.becomes(key, v.numbers(*shape), new.astype(np.float64))


@valid("LF-311", "LF-314")
def replace_scalar(v: Vector) -> None:
    """A parameter without axes, and a counter that is no float, can be replaced too."""
    for key, dtype in (("logit_scale", "float32"), ("norm.num_batches_tracked", "int64")):
        new = np.asarray(8 * v.numbers(dtype="float64") + 16, dtype)
        v.target(key, replaced(new))
        v.becomes(key, v.numbers(), new.astype(np.float64))


@valid()
def replace_and_lora(v: Vector) -> None:
    """A factor pair on top of a replaced weight, and of a replaced bias (a matrix of one column)."""
    new, A, B = v.numbers(5, 7), v.numbers(3, 7), v.numbers(5, 3)
    v.target("layer.weight", replaced(new), lora(A, B, 6), **place([5, 7], out=[0], in_=[1]))
    matrix = 2 * einsum("or,ri->oi", B, A)
    v.becomes("layer.weight", v.numbers(5, 7), new + matrix, matrix=matrix)
    new, A, B = v.numbers(5), v.numbers(3, 1), v.numbers(5, 3)
    v.target("layer.bias", replaced(new), lora(A, B, 6), **place([5], out=[0], in_=[]))
    matrix = 2 * einsum("or,ri->oi", B, A)
    v.becomes("layer.bias", v.numbers(5), new + matrix[:, 0], matrix=matrix)


@valid("LF-105")
def replace_axes(v: Vector) -> None:
    """A tensor of 32 axes: as many as there may be."""
    shape = [1] * 30 + [2, 3]
    new = v.numbers(*shape)
    v.target("w", replaced(new))
    v.becomes("w", v.numbers(*shape), new.astype(np.float64))


@valid("LF-402")
def placed_scalar(v: Vector) -> None:
    """A parameter without axes, placed: its matrix is [1, 1], and no axis is out."""
    A, B = v.numbers(3, 1), v.numbers(1, 3)
    v.target("logit_scale", lora(A, B, 6), **place([], out=[], in_=[]))
    matrix = 2 * einsum("or,ri->oi", B, A)
    v.adds("logit_scale", matrix, matrix[0, 0])


@valid("LF-314")
def replace_dtypes(v: Vector) -> None:
    """A replaced tensor of every dtype that is no float: counters, masks, token tables."""
    for dtype in ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"):
        new = np.asarray(np.abs(8 * v.numbers(2, 3, dtype="float64")), dtype)
        if dtype == "bool":
            new.view(np.uint8)[:] = [[0, 1, 2], [0, 255, 0]]
        v.target(dtype, replaced(new))
        v.becomes(dtype, v.numbers(2, 3), new.astype(np.float64))


@valid("LF-312", "LF-313", "LF-306")
def extreme_values(v: Vector) -> None:
    """The largest finite value of every dtype; a delta of one subnormal; the largest alpha that there is."""
    largest = {
        "float64": float(np.finfo(np.float32).max),
        "float32": float(np.finfo(np.float32).max),
        "float16": 65504.0,
        "bfloat16": (2 - 2**-7) * 2.0**127,
        "float8_e4m3fn": 448.0,
        "float8_e5m2": 57344.0,
    }
    for dtype, value in largest.items():
        new = np.array([value, -value], dtype)
        v.target(dtype, replaced(new))
        v.expect(dtype, base=np.zeros(2), result=new.astype(np.float64))
    new = np.zeros((3, 5), np.float16)
    new[1, 4] = 2.0**-24
    v.target("subnormal", {"kind": "delta", "alpha": 2.0**24, "scale_rule": "factor", "delta": new})
    v.expect("subnormal", matrix=2.0**24 * new.astype(np.float64))
    new = np.array([2.0**-120, -(2.0**-119)], np.float32)
    alpha = float(np.finfo(np.float32).max)
    v.target("alpha", {"kind": "delta", "alpha": alpha, "scale_rule": "factor", "delta": new})
    v.expect("alpha", matrix=alpha * new.astype(np.float64)[:, None])


@valid("LF-406")
def resized_vocabulary(v: Vector) -> None:
    """The replaced embedding has more rows than the base, and a factor pair of the new size."""
    new, A, B = v.numbers(13, 6), v.numbers(3, 13), v.numbers(6, 3)
    axes = place([13, 6], out=[1], in_=[0])
    v.target("embed_tokens.weight", replaced(new, "resize"), lora(A, B, 6), **axes, op="embedding")
    matrix = 2 * einsum("or,ri->oi", B, A)
    v.expect("embed_tokens.weight", matrix=matrix, base=v.numbers(11, 6), result=new + matrix.T)


@valid()
def classifier_head(v: Vector) -> None:
    """Tensors that the base lacks."""
    for key, shape in (("score.weight", (3, 7)), ("score.bias", (3,))):
        new = v.numbers(*shape)
        v.target(key, replaced(new, "add"))
        v.expect(key, result=new)


@valid()
def dora(v: Vector) -> None:
    """DoRA on a Linear: one magnitude a row, the norm over the inputs."""
    A, B, m, W = v.numbers(3, 7), v.numbers(5, 3), v.sizes(5), v.numbers(5, 7)
    v.target("w", lora(A, B, 6), magnitude(m), **place([5, 7], out=[0], in_=[1]))
    matrix = 2 * einsum("or,ri->oi", B, A)
    V = W + matrix
    v.becomes("w", W, einsum("o,oi->oi", m / np.sqrt(einsum("oi,oi->o", V, V)), V), matrix=matrix)


@valid()
def dora_unplaced(v: Vector) -> None:
    """DoRA whose source does not say how the weight lies."""
    A, B, m = v.numbers(3, 7), v.numbers(5, 3), v.sizes(5)
    v.target("w", lora(A, B, 6), magnitude(m))
    v.expect("w", matrix=2 * einsum("or,ri->oi", B, A))


@valid()
def dora_conv1d(v: Vector) -> None:
    """DoRA on a Conv1D [in, out]: the magnitudes still belong to the outputs, so the norm runs over axis 0."""
    A, B, m, W = v.numbers(3, 7), v.numbers(5, 3), v.sizes(5), v.numbers(7, 5)
    v.target("w", lora(A, B, 6), magnitude(m), **place([7, 5], out=[1], in_=[0]))
    matrix = 2 * einsum("or,ri->oi", B, A)
    V = W + matrix.T
    v.becomes("w", W, einsum("o,io->io", m / np.sqrt(einsum("io,io->o", V, V)), V), matrix=matrix)


@valid()
def dora_eps(v: Vector) -> None:
    """eps is added to the norm, not under the root."""
    A, B, m, W = v.numbers(3, 7), v.numbers(5, 3), v.sizes(5), v.numbers(5, 7)
    v.target("w", lora(A, B, 6), magnitude(m, eps=0.125), **place([5, 7], out=[0], in_=[1]))
    matrix = 2 * einsum("or,ri->oi", B, A)
    V = W + matrix
    v.becomes("w", W, einsum("o,oi->oi", m / (np.sqrt(einsum("oi,oi->o", V, V)) + 0.125), V), matrix=matrix)


@valid("LF-404")
def dora_conv(v: Vector) -> None:
    """DoRA on a convolution: by default one magnitude an output channel; or an input channel; or both; or one."""
    axes = place([7, 2, 3, 5], out=[0], in_=[1, 2, 3])
    for key, fields, letters in (
        ("default", {}, "o"),
        ("inputs", {"magnitude_axes": [1]}, "i"),
        ("both", {"magnitude_axes": [1, 0]}, "io"),
        ("taps", {"magnitude_axes": [2, 3]}, "yx"),
        ("one", {"magnitude_axes": []}, ""),
    ):
        A, B, W = v.numbers(4, 30), v.numbers(7, 4), v.numbers(7, 2, 3, 5)
        m = v.sizes(*({"o": 7, "i": 2, "y": 3, "x": 5}[letter] for letter in letters))
        v.target(key, lora(A, B, 6), magnitude(m, **fields), **axes)
        delta = 1.5 * einsum("or,riyx->oiyx", B, A.reshape(4, 2, 3, 5))
        V = W + delta
        norm = np.sqrt(einsum(f"oiyx,oiyx->{letters}", V, V))
        v.becomes(key, W, einsum(f"{letters},oiyx->oiyx", m / norm, V), matrix=delta.reshape(7, 30))


@valid()
def dora_experts(v: Vector) -> None:
    """DoRA on experts: one magnitude an expert and output, as [batch, out]; the experts are not the first axis."""
    A, B, m, W = v.numbers(3, 2, 7), v.numbers(3, 5, 2), v.sizes(3, 5), v.numbers(7, 5, 3)
    v.target("w", lora(A, B, 6), magnitude(m), **place([7, 5, 3], out=[1], in_=[0], batch=[2]))
    matrix = 3 * einsum("eor,eri->eoi", B, A)
    V = W + einsum("eoi->ioe", matrix)
    v.becomes("w", W, einsum("eo,ioe->ioe", m / np.sqrt(einsum("ioe,ioe->eo", V, V)), V), matrix=matrix)


@valid()
def dora_bias(v: Vector) -> None:
    """DoRA with several out axes [out_b, in, out_a]: the magnitude is flat, in the order of axes.out."""
    A, B, m, W = v.numbers(4, 7), v.numbers(6, 4), v.sizes(6), v.numbers(3, 7, 2)
    v.target("w", lora(A, B, 6), magnitude(m), **place([3, 7, 2], out=[2, 0], in_=[1]))
    V = W + 1.5 * einsum("abr,ri->bia", B.reshape(2, 3, 4), A)
    result = einsum("ab,bia->bia", m.reshape(2, 3) / np.sqrt(einsum("bia,bia->ab", V, V)), V)
    v.becomes("w", W, result, matrix=1.5 * einsum("or,ri->oi", B, A))


@valid("LF-404")
def magnitude_alone(v: Vector) -> None:
    """A magnitude without anything added: the weight keeps its direction."""
    m, W = v.sizes(5), v.numbers(5, 7)
    v.target("w", magnitude(m), **place([5, 7], out=[0], in_=[1]))
    wide = W.astype(np.float64)
    v.becomes("w", W, einsum("o,oi->oi", m / np.sqrt(einsum("oi,oi->o", wide, wide)), wide))


@valid("LF-405")
def rows(v: Vector) -> None:
    """Trained tokens: slices of the first or of another axis become what is stored."""
    for key, axis, indices in (("first", 0, [0, 4, 5, 10]), ("second", 1, [2, 5])):
        W = v.numbers(11, 6)
        values = v.numbers(*(len(indices) if a == axis else n for a, n in enumerate(W.shape)))
        v.target(key, rows_of(values, indices, **({"axis": axis} if axis else {})), **place([11, 6], out=[1], in_=[0]))
        result = W.astype(np.float64)
        for n, index in enumerate(indices):
            if axis == 0:
                result[index, :] = values[n, :]
            else:
                result[:, index] = values[:, n]
        v.becomes(key, W, result)


@valid()
def rows_unplaced(v: Vector) -> None:
    """Rows name an axis of the base tensor themselves: they need no placement."""
    values, W = v.numbers(2, 6), v.numbers(11, 6)
    v.target("wte.weight", rows_of(values, [3, 8]), op="embedding")
    result = W.astype(np.float64)
    result[3], result[8] = values[0], values[1]
    v.becomes("wte.weight", W, result)


@valid("LF-305")
def every_part(v: Vector) -> None:
    """One target with every kind: replace, then the sum of four, then magnitude, then rows."""
    new, W = v.numbers(6, 4), v.numbers(6, 4)
    A, B, D, w1, w2 = v.numbers(3, 4), v.numbers(6, 3), v.numbers(6, 4), v.numbers(2, 2), v.numbers(3, 2)
    a1, b1, a2, b2 = v.numbers(6, 5), v.numbers(5, 4), v.numbers(6, 5), v.numbers(5, 4)
    m, values = v.sizes(6), v.numbers(2, 4)
    v.target(
        "w",
        replaced(new),
        lora(A, B, 6),
        {"kind": "loha", "r": 5, "alpha": 5, "scale_rule": "alpha/r"}
        | {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2},
        {"kind": "lokr", "alpha": 0.5, "scale_rule": "factor", "lokr_w1": w1, "lokr_w2": w2},
        {"kind": "delta", "alpha": -0.25, "scale_rule": "factor", "delta": D},
        magnitude(m),
        rows_of(values, [1, 4]),
        **place([6, 4], out=[0], in_=[1]),
    )
    matrix = 2 * einsum("or,ri->oi", B, A) + einsum("or,ri,os,si->oi", a1, b1, a2, b2)
    matrix += 0.5 * einsum("ab,cd->acbd", w1, w2).reshape(6, 4) - 0.25 * D
    V = new + matrix
    result = einsum("o,oi->oi", m / np.sqrt(einsum("oi,oi->o", V, V)), V)
    result[1], result[4] = values[0], values[1]
    v.becomes("w", W, result, matrix=matrix)
