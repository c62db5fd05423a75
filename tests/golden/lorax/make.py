"""Write the golden of jax-lorax: the leaves of its trainable tree, and what its transformed functions compute.

    python make.py                (jax-lorax 0.3.1, jax 0.4.25: it knows no newer one)
    python make.py --check FILE   loads a tree that loraformat wrote (.npz): weights and outputs must be equal

jax-lorax stores nothing itself: a tree of parameters has a ``LoraWeight`` in the place of a weight. ``state.npz`` has the
leaves that are trained by their paths (those of ``lorax.split_lora_params``: all but ``w``), and ``state.msgpack`` the same as flax would store it. Every
dimension differs, every value is random, alpha is 3.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import lorax
import numpy as np
from lorax.transform import LoraWeight

HERE = Path(__file__).resolve().parent
ALPHA, RANK = 3.0, 2
SHAPES = {"query": ("kernel", (7, 5)), "conv": ("kernel", (3, 2, 5, 8)), "embed": ("embedding", (11, 6)), "wide": ("kernel", (9, 9))}  # fmt: skip
INPUTS = {"query": (4, 7), "conv": (2, 6, 10, 5), "embed": (4,), "wide": (3, 9)}


def model(params, inputs):
    found = {name: inputs[name] @ params[name]["kernel"] for name in ("query", "wide")}
    found["embed"] = params["embed"]["embedding"][inputs["embed"]]
    found["conv"] = jax.lax.conv_general_dilated(
        inputs["conv"], params["conv"]["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return found


def drawn():
    draw = np.random.default_rng(9)
    params = {
        name: {leaf: jnp.asarray(draw.standard_normal(shape), jnp.float32)} for name, (leaf, shape) in SHAPES.items()
    }
    inputs = {name: jnp.asarray(draw.standard_normal(shape), jnp.float32) for name, shape in INPUTS.items()}
    inputs["embed"] = jnp.asarray([2, 10, 0, 7])
    return params, inputs, draw


def with_factors(params, factor):
    """The tree that lorax makes of the parameters, its factors as ``factor(key, role, shape)`` gives them."""
    spec = lorax.simple_spec(params, decision_fn=lambda *_: RANK)
    tree = lorax.init_lora(params, spec, jax.random.PRNGKey(0), alpha=ALPHA)
    for name, (leaf, _) in SHAPES.items():
        held = tree[name][leaf]
        a, b = (factor(f"{name}/{leaf}", role, getattr(held, role).shape) for role in ("a", "b"))
        tree[name][leaf] = LoraWeight(w=held.w, a=jnp.asarray(a), b=jnp.asarray(b), alpha=ALPHA)
    return tree


def computed(tree, inputs):
    return {name: np.asarray(value) for name, value in lorax.lora(model)(tree, inputs).items()}


def nested(arrays):
    found = {}
    for path, value in arrays.items():
        *words, last = path.split("/")
        inner = found
        for word in words:
            inner = inner.setdefault(word, {})
        inner[last] = value
    return found


def write():
    params, inputs, draw = drawn()
    tree = with_factors(params, lambda key, role, shape: draw.standard_normal(shape).astype(np.float32))
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    leaves = {"/".join(str(getattr(k, "key", getattr(k, "name", k))).lstrip(".") for k in path): v for path, v in flat}
    leaves = {name: value for name, value in leaves.items() if not name.endswith("/w")}
    np.savez(HERE / "state.npz", **{name: np.asarray(value) for name, value in leaves.items()})
    try:
        from flax import serialization

        (HERE / "state.msgpack").write_bytes(
            serialization.msgpack_serialize(nested({k: np.asarray(v) for k, v in leaves.items()}))
        )
    except ImportError:
        print("no flax: no state.msgpack")
    outputs = computed(tree, inputs)
    arrays = {}
    for name, (leaf, _) in SHAPES.items():
        key, held = f"{name}/{leaf}", tree[name][leaf]
        arrays |= {f"{key}|W": held.w, f"{key}|x": inputs[name], f"{key}|y": outputs[name]}
        if held.w.ndim == 2:
            arrays[f"{key}|merged"] = held.materialize()
    np.savez(HERE / "expected.npz", **{key: np.asarray(value) for key, value in arrays.items()})
    facts = {
        "made_by": "make.py",
        "jax-lorax": "0.3.1",
        "jax": jax.__version__,
        "alpha": ALPHA,
        "leaves": sorted(leaves),
    }
    (HERE / "golden.json").write_text(json.dumps(facts, indent=1) + "\n")


def check(path):
    params, inputs, _ = drawn()
    with np.load(path) as arrays, np.load(HERE / "expected.npz") as expected:
        tree = with_factors(params, lambda key, role, shape: arrays[f"{key}/{role}"].reshape(shape))
        errors = [
            np.abs(value - expected[f"{name}/{SHAPES[name][0]}|y"]).max()
            for name, value in computed(tree, inputs).items()
        ]
    print(f"{path}: {max(errors):.1e}")
    return max(errors) < 1e-5


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(not check(Path(sys.argv[2])))
    write()
