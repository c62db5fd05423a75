"""A branch beside live JAX parameters against merged and plain ones: the layers of a Llama 8B in bfloat16, under jit.

``python -m bench.jax_branch [LAYERS]`` on whatever device JAX finds; variants interleaved, medians, ratios to plain.
"""

from __future__ import annotations

import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from loraformat.adapter import Adapter
from loraformat.axes import Placement
from loraformat.parts import Lora
from loraformat.updates import Update
from loraformat_converters import jax_live

HIDDEN, INNER, HEADS, KEY_HEADS, SIZE, RANK = 4096, 14336, 32, 8, 128, 16
SHAPES = {
    "q": (HIDDEN, HEADS, SIZE),
    "k": (HIDDEN, KEY_HEADS, SIZE),
    "v": (HIDDEN, KEY_HEADS, SIZE),
    "o": (HEADS, SIZE, HIDDEN),
    "gate": (HIDDEN, INNER),
    "up": (HIDDEN, INNER),
    "down": (INNER, HIDDEN),
}


def parameters(layers: int) -> dict[str, jax.Array]:
    key = jax.random.key(0)
    return {
        f"{i}/{name}": 0.02 * jax.random.normal(jax.random.fold_in(key, 16 * i + j), shape, jnp.bfloat16)
        for i in range(layers)
        for j, (name, shape) in enumerate(SHAPES.items())
    }


def adapter(layers: int) -> Adapter:
    draw, targets = np.random.default_rng(0), {}
    for i in range(layers):
        for name, shape in SHAPES.items():
            n = 2 if name == "o" else 1
            place = Placement(shape, tuple(range(n, len(shape))), tuple(range(n)))
            out, in_ = place.matrix_shape
            a, b = (0.02 * draw.standard_normal(s, np.float32) for s in ((RANK, in_), (out, RANK)))
            targets[f"{i}/{name}"] = Update((Lora(a, b, 2.0 * RANK, "alpha/r"),), place)
    return Adapter(targets, names="flax")


def forward(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Projections and products of the layers; attention itself, which no adapter changes, is left out."""
    for i in range(len(params) // len(SHAPES)):
        h = x * jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True) + 1e-5).astype(x.dtype)
        q, k, v = (jnp.einsum("td,dnh->tnh", h, params[f"{i}/{name}"]) for name in "qkv")
        x = x + jnp.einsum("tnh,nhd->td", q + jnp.repeat(k + v, HEADS // KEY_HEADS, 1), params[f"{i}/o"])
        gated = jax.nn.silu(x @ params[f"{i}/gate"]) * (x @ params[f"{i}/up"])
        x = x + gated @ params[f"{i}/down"]
    return x


def main(layers: int = 4, runs: int = 30) -> None:
    params, lora = parameters(layers), adapter(layers)
    merged, branched = jax_live.apply(params, lora), jax_live.branch(params, lora)
    plain = jax.jit(forward)
    beside = jax.jit(lambda branched, x: branched(forward, x))
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {layers} layers, rank {RANK}, bfloat16")
    for tokens in (1, 16, 128, 1024):
        x = jax.random.normal(jax.random.key(1), (tokens, HIDDEN), jnp.bfloat16)
        ways = {
            "plain": lambda x=x: plain(params, x),
            "merged": lambda x=x: plain(merged, x),
            "branch": lambda x=x: beside(branched, x),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        outputs = {name: np.asarray(way(), np.float32) for name, way in ways.items()}
        for _ in range(runs):
            for name, way in ways.items():
                begin = time.perf_counter()
                for _ in range(10):
                    result = way()
                result.block_until_ready()
                seconds[name].append((time.perf_counter() - begin) / 10)
        base = statistics.median(seconds["plain"])
        distance = np.linalg.norm(outputs["branch"] - outputs["merged"]) / np.linalg.norm(outputs["merged"])
        moved = np.linalg.norm(outputs["plain"] - outputs["merged"]) / np.linalg.norm(outputs["merged"])
        told = "  ".join(
            f"{n} {statistics.median(s) * 1e3:.3f} ms {statistics.median(s) / base:.3f} ×" for n, s in seconds.items()
        )
        print(f"{tokens:5} tokens  {told}  branch from merged {distance:.1e}, plain from merged {moved:.1e}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
