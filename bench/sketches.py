"""How far casts and quantisations move the norm of a sketch, and what of a folded factor that leaves unseen.

    python bench/sketches.py model.safetensors model.onnx …

Over every matrix of two axes or more whose sketch is proof, those that are still recognised: the least and the greatest ratio of
the norms, how many are refused, and how many would not be if 1/√2 or √2 had been folded into the weight as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import numpy_helper
from safetensors.numpy import load_file

from loraformat import Placement
from loraformat.likeness import SCALE, compare
from loraformat.sketch import sketch, telling

Array = np.ndarray[Any, Any]

NF4 = (
    -1.0,
    -0.6962,
    -0.5251,
    -0.3949,
    -0.2844,
    -0.1848,
    -0.0911,
    0,
    0.0796,
    0.1609,
    0.2461,
    0.3379,
    0.4407,
    0.5626,
    0.723,
    1.0,
)


def matrices(path: Path) -> Iterator[Array]:
    """[out, in] of every stored weight; a convolution's with its kernel in front of in."""
    if path.suffix == ".safetensors":
        tensors = list(load_file(path).values())
    else:
        graph = onnx.load(path).graph
        held = [
            *graph.initializer,
            *(a.t for n in graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"),
        ]
        tensors = [numpy_helper.to_array(t) for t in held if t.data_type == onnx.TensorProto.FLOAT]
    for w in tensors:
        if w.ndim >= 2 and w.dtype == np.float32 and w.std() > 0:
            matrix = w.reshape(len(w), -1) if w.ndim > 2 or path.suffix == ".safetensors" else w.T
            if min(matrix.shape) >= 2 and telling(place(matrix)):
                yield matrix


def place(matrix: Array) -> Placement:
    return Placement(matrix.shape, (0,), (1,))


def blocks(w: Array, size: int) -> Array:
    """[out, blocks, size]; a row is one block where it cannot be divided; 0: the tensor is."""
    if not size:
        return w.reshape(1, 1, -1)
    return w.reshape(len(w), -1, size if w.shape[1] % size == 0 else w.shape[1])


def cast(dtype: str, w: Array) -> Array:
    return w.astype(getattr(ml_dtypes, dtype, dtype)).astype(np.float32)


def nearest(bits: int, size: int, w: Array) -> Array:
    """Symmetric, the step by the greatest value."""
    x, top = blocks(w, size), 2 ** (bits - 1) - 1
    step = np.abs(x).max(-1, keepdims=True) / top
    return (np.clip(np.round(x / np.where(step, step, 1)), -top - 1, top) * step).reshape(w.shape)


def shifted(bits: int, size: int, w: Array) -> Array:
    """With a zero point."""
    x, top = blocks(w, size), 2**bits - 1
    low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    step = np.where(high > low, (high - low) / top, 1)
    zero = np.round(-low / step)
    return ((np.clip(np.round(x / step) + zero, 0, top) - zero) * step).reshape(w.shape)


def searched(bits: int, size: int, w: Array) -> Array:
    """Symmetric, the step that leaves the least error: such a quantiser makes W shorter."""
    x, top = blocks(w, size), 2 ** (bits - 1)
    steps = [share * np.abs(x).max(-1, keepdims=True) / max(top - 1, 1) for share in np.linspace(0.4, 1.1, 15)]
    tried = [np.clip(np.round(x / np.where(s, s, 1)), -top, top - 1) * s for s in steps]
    errors = np.array([((y - x) ** 2).sum(-1, keepdims=True) for y in tried])
    return np.take_along_axis(np.array(tried), errors.argmin(0)[None], 0)[0].reshape(w.shape)


def nf4(w: Array) -> Array:
    x = blocks(w, 64)
    most = np.abs(x).max(-1, keepdims=True)
    codes = np.abs((x / np.where(most, most, 1))[..., None] - np.array(NF4)).argmin(-1)
    return (np.array(NF4)[codes] * most).reshape(w.shape)


FORMS: dict[str, Callable[[Array], Array]] = {
    **{dtype: partial(cast, dtype) for dtype in ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")},
    "int8, tensor": partial(nearest, 8, 0), "uint8, tensor": partial(shifted, 8, 0), "int8, row": partial(nearest, 8, 1 << 30),
    "int8, 32": partial(nearest, 8, 32), "int4, tensor": partial(nearest, 4, 0), "int4, row": partial(nearest, 4, 1 << 30),
    **{f"int4, {size}": partial(nearest, 4, size) for size in (32, 64, 128)},
    "uint4, 32": partial(shifted, 4, 32), "uint4, row": partial(shifted, 4, 1 << 30), "nf4": nf4,
    "int4, 128, searched": partial(searched, 4, 128),
    "int3, 32": partial(nearest, 3, 32), "int3, row": partial(nearest, 3, 1 << 30), "uint3, 32": partial(shifted, 3, 32),
    "int3, 64, searched": partial(searched, 3, 64), "uint2, 32": partial(shifted, 2, 32), "int2, 32": partial(nearest, 2, 32),
    "int2, 16, searched": partial(searched, 2, 16), "int2, 64, searched": partial(searched, 2, 64),
}  # fmt: skip


def main(paths: list[Path]) -> None:
    held = [matrix for path in paths for matrix in matrices(path)]
    drawn = [sketch(w, place(w)) for w in held]
    print(
        f"{len(held)} matrices\n{'':20} {'like':>5} {'least':>7} {'most':>7} {'refused':>8} {'1/√2 passes':>12} {'√2 passes':>10}"
    )
    for name, form in FORMS.items():
        likes = [compare(own, sketch(form(w), place(w))) for own, w in zip(drawn, held, strict=True)]
        scales = np.array([like.scale for like in likes if like.same_weight and like.scale is not None])
        passed = [int(((f * scales >= 1 / SCALE) & (f * scales <= SCALE)).sum()) for f in (1, 0.5**0.5, 2**0.5)]
        print(
            f"{name:20} {len(scales):5} {scales.min():7.3f} {scales.max():7.3f} {len(scales) - passed[0]:8} {passed[1]:12} {passed[2]:10}"
        )


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
