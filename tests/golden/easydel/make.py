"""Write the golden of EasyDeL by its own functions, run out of its source (erfanzar/EasyDeL 090a03b).

    python make.py SOURCE      (SOURCE: its easydel; jax 0.10.2, flax 0.12.8)

EasyDeL wants another flax than the tests do: its eLoRA, split_lora_params and unwrap_lora_to_layers run alone. ``lora.msgpack``
has what it splits off, ``expected.npz`` each kernel without and with the factors, as it merges them.
"""

from __future__ import annotations

import ast
import contextlib
import json
import sys
import types
import typing
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, serialization
from flax.traverse_util import flatten_dict, unflatten_dict

HERE = Path(__file__).resolve().parent


def functions(file: Path, *names: str, **known: object) -> dict[str, object]:
    """Some functions of a file, beside what they use; their annotations stay text."""
    tree = ast.parse(file.read_text())
    own = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    space: dict[str, object] = {"nn": nnx, "jax": jax, "tp": typing, **known}
    body = ast.Module([ast.ImportFrom("__future__", [ast.alias("annotations")], 0), *own], [])
    exec(compile(ast.fix_missing_locations(body), str(file), "exec"), space)
    return space


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.q_proj = nnx.Linear(7, 5, use_bias=False, rngs=rngs)
        self.up_proj = nnx.Linear(5, 11, use_bias=False, rngs=rngs)


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([Layer(rngs), Layer(rngs)])
        self.lm_head = nnx.Linear(6, 9, use_bias=False, rngs=rngs)


def wrapped(model: Model, lora: type) -> Model:
    for n, layer in enumerate([*model.layers, model]):
        for name in ("q_proj", "up_proj", "lm_head"):
            if (base := getattr(layer, name, None)) is not None:
                made = lora(base.in_features, 2 + n, base.out_features, base_module=base, rngs=nnx.Rngs(n))
                setattr(layer, name, made)
    return model


if __name__ == "__main__":
    source = Path(sys.argv[1])
    space = vars(types.ModuleType("lora"))
    exec(compile((source / "layers/linears/_lora.py").read_text(), "_lora.py", "exec"), space)
    model = wrapped(Model(nnx.Rngs(0)), space["eLoRA"])
    draw = np.random.default_rng(17)
    for _, leaf in nnx.to_flat_state(nnx.state(model)):
        leaf[...] = jnp.asarray(draw.standard_normal(leaf.shape), jnp.float32)
    walks = ("iter_module_search", "get_module_from_path", "set_module_from_path")
    traversals = types.ModuleType("easydel.utils.traversals")
    vars(traversals).update(functions(source / "utils/traversals.py", *walks))
    sys.modules |= {"easydel": types.ModuleType("easydel"), "easydel.utils": types.ModuleType("easydel.utils")}
    sys.modules["easydel.utils.traversals"] = traversals
    silent = contextlib.contextmanager(lambda **_: iter([types.SimpleNamespace(update=lambda n: None)]))
    own = functions(
        source / "infra/utils.py",
        "split_lora_params",
        "unwrap_lora_to_layers",
        tqdm=silent,
        unflatten_dict=unflatten_dict,
    )
    split = flatten_dict(own["split_lora_params"](model))
    leaves = {path: np.asarray(leaf[...]) for path, leaf in split.items()}
    tree = unflatten_dict({tuple(map(str, path)): leaf for path, leaf in leaves.items()})
    (HERE / "lora.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    kernels = {path[:-1]: None for path in leaves}
    before = {
        path: np.asarray(traversals.get_module_from_path(model, path).base_module.kernel[...]) for path in kernels
    }
    own["unwrap_lora_to_layers"](model, verbose=False)
    found = {}
    for path, weight in before.items():
        key = f"{'/'.join(map(str, path))}/kernel"
        found |= {
            f"{key}|W": weight,
            f"{key}|merged": np.asarray(traversals.get_module_from_path(model, path).kernel[...]),
        }
    np.savez(HERE / "expected.npz", **found)
    facts = {"made_by": "make.py", "easydel": "090a03b", "jax": jax.__version__, "flax": flax.__version__}
    (HERE / "golden.json").write_text(json.dumps(facts, indent=1) + "\n")
