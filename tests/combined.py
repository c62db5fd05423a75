"""Adapters to combine, and what the papers say of them: on dense float64, written entry by entry."""

import numpy as np

import loraformat as lf
from loraformat.combining.methods import DENSE
from loraformat.normal import uniform
from loraformat.parts import Lora

KEYS = {"a.weight": (13, 11), "b.weight": (7, 19), "c.weight": (17, 5)}
DENSITY = 0.4


def adapter(seed, rank=3, alpha=2.0, rule="alpha/r", keys=KEYS, dtype=np.float32):
    draw = np.random.default_rng(seed)
    targets = {}
    for key, (out, in_) in keys.items():
        a, b = draw.standard_normal((rank, in_)), draw.standard_normal((out, rank))
        targets[key] = lf.Update((Lora(a.astype(dtype), b.astype(dtype), alpha, rule),))
    return lf.Adapter(targets)


def one_target(*parts, key="a.weight", **more):
    return lf.Adapter({key: lf.Update(parts, **more)})


def dense(adapter, key):
    """ΔW in float64, from the factors as they are stored."""
    part = adapter[key]["lora"]
    return part.scale * np.asarray(part.lora_B, np.float64) @ np.asarray(part.lora_A, np.float64)


ONE, TWO, THREE = (
    adapter(1),
    adapter(2, rank=5, alpha=-3.5, rule="alpha/sqrt(r)"),
    adapter(3, rank=2, keys={"a.weight": (13, 11)}),
)
GIVEN = [(ONE, 0.7), (TWO, -1.3), (THREE, 0.4)]


# The formulas.


def top(values, count):
    """The positions of the largest, as a mask."""
    mask = np.zeros(values.size, bool)
    mask[np.argsort(-np.abs(values), axis=None)[:count]] = True
    return mask.reshape(values.shape)


def majority(deltas):
    out = np.zeros(deltas[0].shape)
    for place in np.ndindex(out.shape):
        entries = [delta[place] for delta in deltas]
        sign = 1 if sum(entries) >= 0 else -1
        agreeing = [entry for entry in entries if entry * sign > 0]
        out[place] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return out


def trimmed(delta, density):
    return np.where(top(delta, int(density * delta.size)), delta, 0)


def dropped(delta, density, key, name, seed):
    keep = np.stack([uniform(seed, f"{key}\n{name}\n{row}", delta.shape[1]) for row in range(len(delta))]) < density
    return np.where(keep, delta / density, 0)


def ranked(delta, density, epsilon, key, name, seed):
    out = np.zeros(delta.shape)
    for i, row in enumerate(delta):
        drawn = uniform(seed, f"{key}\n{name}\n{i}", len(row))
        for rank, j in enumerate(np.argsort(np.abs(row))):
            kept = density - epsilon / 2 + epsilon * rank / (len(row) - 1)
            out[i, j] = row[j] / kept if drawn[j] < kept else 0
    return out


def without_outliers(delta, density, gamma):
    order = np.argsort(-np.abs(delta), axis=None)
    most = int(gamma * delta.size)
    mask = np.zeros(delta.size, bool)
    mask[order[most : most + int(density * delta.size)]] = True
    return np.where(mask.reshape(delta.shape), delta, 0)


def selected(deltas, density):
    if len(deltas) == 1:
        return deltas[0]
    mean = sum(deltas) / len(deltas)
    variance = sum((delta - mean) ** 2 for delta in deltas) / len(deltas)
    mask = top(variance, int(density * np.count_nonzero(variance)))
    deltas = [np.where(mask, delta, 0) for delta in deltas]
    squares = [np.sum(delta**2) for delta in deltas]
    out = np.zeros(mask.shape)
    for place in np.ndindex(out.shape):
        sign = 1 if sum(delta[place] for delta in deltas) >= 0 else -1
        agreeing = [(s, delta[place]) for s, delta in zip(squares, deltas, strict=True) if delta[place] * sign > 0]
        out[place] = sum(s * d for s, d in agreeing) / sum(s for s, _ in agreeing) if agreeing else 0.0
    return out


def published(method, key, given, seed):
    terms = [(a, w) for a, w in given if key in a and w]
    deltas = [w * dense(a, key) for a, w in terms]
    names = [lf.digest(a) for a, _ in terms]
    match method:
        case "ties":
            return majority([trimmed(d, DENSITY) for d in deltas])
        case "dare_linear":
            return sum(dropped(d, DENSITY, key, n, seed) for d, n in zip(deltas, names, strict=True))
        case "dare_ties":
            return majority([dropped(d, DENSITY, key, n, seed) for d, n in zip(deltas, names, strict=True)])
        case "magnitude_prune":
            return sum(trimmed(d, DENSITY) for d in deltas)
        case "della":
            return majority([ranked(d, DENSITY, 0.3, key, n, seed) for d, n in zip(deltas, names, strict=True)])
        case "breadcrumbs":
            return sum(without_outliers(d, DENSITY, 0.1) for d in deltas)
        case "sce":
            return selected(deltas, DENSITY)
    return sum(deltas)


def settings_of(method):
    more = {"density": DENSITY, "seed": 3, "gamma": 0.1, "epsilon": 0.3} if method in DENSE else {}
    return more | ({"rank": "full"} if method in DENSE else {"rank": 2} if method == "svd" else {})
