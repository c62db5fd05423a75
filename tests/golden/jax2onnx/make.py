"""Write the golden of a model that is trained in JAX and goes to ONNX by itself: its graph, its factors, its outputs.

    python make.py      (jax2onnx 0.17.1, jax 0.10.2, flax 0.12.8; ``golden.json`` has what ran)

jax2onnx wants another orbax than the tests do, so that it runs here alone. The LoRA of three of NNX's Linears is trained
for some steps; the graph is that of the base.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import jax2onnx
import numpy as np
from flax import nnx, serialization

HERE = Path(__file__).resolve().parent
WIDTH, INNER, OUT = 24, 40, 10


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(WIDTH, INNER, rngs=rngs)
        self.down = nnx.Linear(INNER, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, OUT, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = x + self.down(nnx.gelu(self.up(x)))
        return self.head(jnp.tanh(h))


def with_lora(model: Net) -> Net:
    for name, rank in (("up", 4), ("down", 3), ("head", 2)):
        base = getattr(model, name)
        lora = nnx.LoRA(base.in_features, rank, base.out_features, base_module=base, rngs=nnx.Rngs(5))
        setattr(model, name, lora)
    return model


def trained(model: Net, x: jax.Array, y: jax.Array) -> Net:
    graph, factors, rest = nnx.split(model, nnx.LoRAParam, ...)

    @jax.jit
    def step(factors):
        slope = jax.grad(lambda f: ((nnx.merge(graph, f, rest)(x) - y) ** 2).mean())(factors)
        return jax.tree.map(lambda f, g: f - 0.5 * g, factors, slope)

    for _ in range(40):
        factors = step(factors)
    return nnx.merge(graph, factors, rest)


if __name__ == "__main__":
    draw = np.random.default_rng(3)
    x = jnp.asarray(draw.standard_normal((6, WIDTH)), jnp.float32)
    y = jnp.asarray(draw.standard_normal((6, OUT)), jnp.float32)
    base = Net(nnx.Rngs(0))
    model = trained(with_lora(Net(nnx.Rngs(0))), x, y)
    jax2onnx.to_onnx(base, [("B", WIDTH)], return_mode="file", output_path=str(HERE / "model.onnx"))
    state = nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))
    (HERE / "lora.msgpack").write_bytes(serialization.to_bytes(state))
    weights = {
        "/".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(base, nnx.Param))
    }
    np.savez(HERE / "base.npz", **weights)
    np.savez(HERE / "expected.npz", x=x, y=np.asarray(model(x)), base=np.asarray(base(x)))
    versions = {name: importlib.metadata.version(name) for name in ("jax2onnx", "jax", "flax")}
    (HERE / "golden.json").write_text(json.dumps({"made_by": "make.py", **versions}, indent=1) + "\n")
