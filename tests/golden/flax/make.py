"""Write the goldens of the JAX world: files by flax, orbax and qwix, with what the model computes with and without them.

    python make.py      (jax 0.10.2, flax 0.12.8, orbax-checkpoint 0.12.8, qwix 0.1.8)

Every dimension of a case differs from the others, every value is random. ``expected.npz`` holds, for each target, its
base weight, an input, and the output of the module that has the adapter in it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import qwix
from flax import nnx, serialization
from flax.traverse_util import flatten_dict

HERE = Path(__file__).resolve().parent
DRAW = np.random.default_rng(7)


def normal(*shape):
    return jnp.asarray(DRAW.standard_normal(shape).astype(np.float32) * 0.5)


def randomise(module):
    """Random values in every parameter, and none in the biases."""
    for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        leaf[...] = jnp.zeros(leaf.shape) if path[-1] == "bias" else normal(*leaf.shape)


class Lora(nnx.Module):
    """One module of each way in which NNX keeps factors."""

    def __init__(self, rngs):
        self.blocks = nnx.List(
            [
                nnx.LoRALinear(7, 5, lora_rank=2, rngs=rngs),
                nnx.LoRA(6, 3, 9, base_module=nnx.Linear(6, 9, rngs=rngs), rngs=rngs),
                nnx.LoRALinear(8, 8, lora_rank=3, rngs=rngs),
            ]
        )


def nnx_cases():
    module = Lora(nnx.Rngs(0))
    randomise(module)
    state = nnx.state(module, nnx.LoRAParam)
    folder = fresh("nnx")
    plain = nnx.to_pure_dict(state)
    with ocp.StandardCheckpointer() as writer:
        writer.save(folder / "orbax_value", state)
        writer.save(folder / "orbax_plain", plain)
    (folder / "state.msgpack").write_bytes(serialization.to_bytes(plain))
    np.savez(folder / "state.npz", **{"/".join(map(str, k)): np.asarray(v) for k, v in flatten_dict(plain).items()})
    expected = {}
    for i, block in enumerate(module.blocks):
        base = getattr(block, "base_module", block)
        x = normal(4, base.kernel.shape[0])
        expected |= {f"blocks/{i}/kernel|{word}": v for word, v in (("W", base.kernel[...]), ("x", x), ("y", block(x)))}
    np.savez(folder / "expected.npz", **{key: np.asarray(value) for key, value in expected.items()})


EINSUMS = {
    "e": ("BTD,CKDH->CBTKH", (2, 3, 7, 4), (2, 5, 7)),
    "f": ("CBTKH,CKHD->BTD", (2, 3, 4, 9), (2, 2, 5, 3, 4)),
    "x": ("EBD,EDF->EBF", (3, 9, 6), (3, 4, 9)),
    "t": ("BTD,VD->BTV", (11, 7), (2, 5, 7)),
}


class Bank(nnx.Module):
    """One module of each way in which qwix shapes factors; called with an input for each."""

    def __init__(self, rngs):
        self.q = nnx.Linear(7, 5, rngs=rngs)
        self.h = nnx.LinearGeneral(5, (2, 3), rngs=rngs)
        self.o = nnx.LinearGeneral((2, 3), 7, axis=(-2, -1), rngs=rngs)
        self.c = nnx.Conv(6, 8, (3,), rngs=rngs)
        self.k = nnx.Conv(5, 7, (3, 2), rngs=rngs)
        for name, (equation, shape, _) in EINSUMS.items():
            setattr(self, name, nnx.Einsum(equation, shape, rngs=rngs))

    def __call__(self, inputs):
        return {name: getattr(self, name)(x) for name, x in inputs.items()}


INPUTS = {"q": (4, 7), "h": (4, 5), "o": (4, 2, 3), "c": (2, 9, 6), "k": (2, 6, 9, 5)}


def qwix_cases():
    module = Bank(nnx.Rngs(0))
    inputs = {name: normal(*shape) for name, shape in INPUTS.items()}
    inputs |= {name: normal(*shape) for name, (_, _, shape) in EINSUMS.items()}
    provider = qwix.LoraProvider(module_path=".*", rank=2, alpha=3.0)
    adapted = qwix.apply_lora_to_model(module, provider, inputs, rngs=nnx.Rngs(1))
    randomise(adapted)
    state = nnx.state(adapted, nnx.LoRAParam)
    folder = fresh("qwix")
    with ocp.StandardCheckpointer() as writer:
        writer.save(folder / "orbax_plain", nnx.to_pure_dict(state))
    (folder / "state.msgpack").write_bytes(serialization.to_bytes(nnx.to_pure_dict(state)))
    outputs = adapted(inputs)
    expected = {}
    for name in inputs:
        weight = getattr(adapted, name).kernel[...]
        expected |= {f"{name}/kernel|W": weight, f"{name}/kernel|x": inputs[name], f"{name}/kernel|y": outputs[name]}
    np.savez(folder / "expected.npz", **{key: np.asarray(value) for key, value in expected.items()})


def fresh(name):
    shutil.rmtree(HERE / name, ignore_errors=True)
    (HERE / name).mkdir()
    return HERE / name


if __name__ == "__main__":
    nnx_cases()
    qwix_cases()
