"""One update of each kind for a parameter of any shape and placement, with normal values."""

from __future__ import annotations

import math

import numpy as np

from loraformat import Delta, Loha, Lokr, Lora, Magnitude, Replace, Rows, Update


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def _pair(place, rank=2):
    *batch, out, in_ = place.matrix_shape
    return Lora(normal(*batch, rank, in_), normal(*batch, out, rank, seed=1), 3.0, "alpha/r")


def _lora(place):
    return (_pair(place),)


def _shared(place):
    """One A for all of a batch."""
    pair = _pair(place)
    return (Lora(pair.lora_A[:1] if place.batch else pair.lora_A, pair.lora_B, 3.0, "alpha/r"),)


def _dora(place):
    return (_pair(place), Magnitude(abs(normal(*place.matrix_shape[:-1], seed=2)) + 1, eps=0.25))


def _columns(place):
    """A magnitude for each in axis: a norm over the others."""
    axes = tuple(reversed(place.in_))
    return (_pair(place), Magnitude(abs(normal(*(place.shape[a] for a in axes), seed=2)) + 1, axes))


def _delta(place):
    return (Delta(normal(*place.matrix_shape), -0.75),)


def _loha(place):
    out, in_ = place.matrix_shape
    return (Loha(normal(out, 3), normal(3, in_), normal(out, 3, seed=1), normal(3, in_, seed=1), 2.5, "alpha/r"),)


def _lokr(place):
    out, in_ = place.matrix_shape
    o, i = (max(d for d in range(1, n + 1) if n % d == 0 and d * d <= n) for n in (out, in_))
    return (Lokr(0.5, "factor", normal(o, i), lokr_w2_a=normal(out // o, 2), lokr_w2_b=normal(2, in_ // i)),)


def _tucker(place):
    kernel = tuple(place.shape[a] for a in place.in_[1:])
    channels = place.shape[place.in_[0]]
    return (Lora(normal(3, channels), normal(place.matrix_shape[0], 3, seed=1), 3.0, "alpha/r", normal(3, 3, *kernel)),)


def _tucker_loha(place):
    kernel, out = tuple(place.shape[a] for a in place.in_[1:]), place.matrix_shape[0]
    channels = place.shape[place.in_[0]]
    factors = [normal(2, out), normal(2, channels), normal(2, out, seed=1), normal(2, channels, seed=1)]
    cores = {"t1": normal(2, 2, *kernel), "t2": normal(2, 2, *kernel, seed=1)}
    return (Loha(*factors, 2.5, "alpha/r", **cores),)


def _tucker_lokr(place):
    kernel, out = tuple(place.shape[a] for a in place.in_[1:]), place.matrix_shape[0]
    channels = place.shape[place.in_[0]]
    return (
        Lokr(
            0.5,
            "factor",
            normal(1, 1),
            lokr_w2_a=normal(2, out),
            lokr_w2_b=normal(2, channels),
            t2=normal(2, 2, *kernel),
        ),
    )


def _replace(place):
    return (Replace(normal(*place.shape, seed=5)),)


def _rows(place, axis=0):
    n = place.shape[axis]
    indices = np.array([0, n - 1])  # and what lies between stays
    values = normal(*place.shape[:axis], len(indices), *place.shape[axis + 1 :], seed=6)
    return (Rows(values, indices, axis),)


def _last_rows(place):
    return _rows(place, len(place.shape) - 1)


def _everything(place):
    """Replaced, summed, rescaled, and some rows set: each step on what the one before left."""
    return (*_replace(place), *_dora(place)[:1], *_delta(place), *_dora(place)[1:], *_rows(place))


MATRIX = {
    "lora": _lora, "shared lora": _shared, "dora": _dora, "dora of columns": _columns, "delta": _delta, "loha": _loha,
    "lokr": _lokr, "replace": _replace, "rows": _rows, "rows of the last axis": _last_rows, "everything": _everything,
}  # fmt: skip
KERNEL = {"tucker": _tucker, "tucker loha": _tucker_loha, "tucker lokr": _tucker_lokr}
VECTOR = {
    "delta": lambda place: (Delta(normal(math.prod(place.shape)), 0.5),),
    "replace": _replace,
    "rows": _rows,
}


def made(kind, place):
    """The update of a kind for a parameter laid like ``place``, placed."""
    table = MATRIX | KERNEL if len(place.shape) > 1 else VECTOR
    return Update(tuple(table[kind](place)), place)
