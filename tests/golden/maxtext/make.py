"""Write the goldens of MaxText by its own functions, run out of its source (AI-Hypercomputer/maxtext e591f30).

    python make.py SOURCE      (SOURCE: its src/maxtext; numpy, jax 0.10.2, flax 0.12.8, orbax-checkpoint 0.12.8)

MaxText is no package that installs: the modules run beside stand-ins for what they import and these functions do not use.

``native``     arrays of the shapes that utils/lora_utils.get_lora_abstract_state gives for a scanned model, in the folder
               that MaxText loads; ``expected.npz`` has W, and W as apply_lora_on_base_params changes it layer by layer.
               That function fails on ``out``, whose lora_a has three axes: its truth is the formula of the shapes.
``MODEL-AXIS`` the PEFT adapter ``../gguf/MODEL/peft`` for two layers as checkpoint_conversion/to_maxtext.py's own
               functions convert it, stacked in axis 0 or 1; ``expected.npz`` has what its own hooks make of the weights
               without and with PEFT's ΔW.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import sys
import types
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent
LAYERS, EMBED, HEADS, KV, HEAD = 3, 10, 6, 2, 4
RANK, ALPHA = 5, 8


def lora_utils(source):
    """utils/lora_utils.py, whose imports of MaxText stand for nothing here."""
    for name in ("maxtext", "maxtext.common", "maxtext.configs", "maxtext.utils", "maxtext.utils.globals"):
        sys.modules[name] = mock.MagicMock()
    module = types.ModuleType("lora_utils")
    exec(compile((source / "utils/lora_utils.py").read_text(), "lora_utils.py", "exec"), vars(module))
    return module


def functions(file, *names, **known):
    """Some functions of a file, beside what they use."""
    tree = ast.parse(file.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    space = {"np": np, "Any": object, **known}
    exec(compile(tree, str(file), "exec"), space)
    return [space[name] for name in names]


def native(source):
    utils, draw = lora_utils(source), np.random.default_rng(11)
    shapes = {
        "query": (EMBED, LAYERS, HEADS, HEAD), "key": (EMBED, LAYERS, KV, HEAD), "value": (EMBED, LAYERS, KV, HEAD),
        "out": (HEADS, LAYERS, HEAD, EMBED),
    }  # fmt: skip
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("x",))
    attention = {}
    for name, shape in shapes.items():
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*[None] * len(shape)))
        attention[name] = {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)}
    base = {"params": {"decoder": {"layers": {"self_attention": attention}}}}
    config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    state, _ = utils.get_lora_abstract_state(base, config)
    arrays = jax.tree.map(lambda leaf: jnp.asarray(draw.standard_normal(leaf.shape), jnp.float32), state.params)
    weights = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    folder = HERE / "native"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "0").mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    whole = state.replace(params=_without_none(arrays))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        writer.save(folder / "0/items", args=ocp.args.PyTreeSave(whole))
    found = arrays["params"]["decoder"]["layers"]["self_attention"]
    expected, fails = {}, []
    for name, weight in weights.items():
        merged = np.empty_like(weight)
        for layer in range(LAYERS):
            one = {"self_attention": {name: {"kernel": jnp.asarray(weight[:, layer])}}}
            factors = {role: jnp.take(found[name][role], layer, axis=1) for role in ("lora_a.kernel", "lora_b.kernel")}
            try:
                utils.apply_lora_on_base_params(one, {"self_attention": {name: dict(factors)}}, ALPHA / RANK)
                merged[:, layer] = one["self_attention"][name]["kernel"]
            except (ValueError, TypeError) as error:
                fails.append(f"{name}: {error}")
                merged[:, layer] = weight[:, layer] + ALPHA / RANK * np.einsum(
                    "nhr,re->nhe", *map(np.asarray, factors.values())
                )
        key = f"decoder/layers/self_attention/{name}/kernel"
        expected |= {f"{key}|W": weight, f"{key}|merged": merged}
    np.savez(folder / "expected.npz", **expected)
    return sorted(set(fails))


def _without_none(tree):
    if not isinstance(tree, dict):
        return tree
    return {key: _without_none(value) for key, value in tree.items() if value is not None}


def peft(model):
    """Two layers' factors and ΔW, of the one that the golden has and one with other numbers."""
    folder = HERE.parent / "gguf" / model
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 2}
    factors, draw = {}, np.random.default_rng(12)
    for name, tensor in load_file(folder / "peft/adapter_model.safetensors").items():
        if ".layers.0." in name:
            factors[name] = tensor
            factors[name.replace(".layers.0.", ".layers.1.")] = draw.standard_normal(tensor.shape).astype(np.float32)
    return config, factors


def converted(source, model, axis):
    hf, factors = peft(model)
    if model == "llama":  # 3.1: MaxText's order of rows
        hf["rope_parameters"] = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0}
    space = {}
    exec(
        compile((source / "checkpoint_conversion/utils/param_mapping.py").read_text(), "param_mapping.py", "exec"),
        space,
    )
    stem = {"llama": "LLAMA31", "qwen3": "QWEN"}[model]
    mapping, hooks = space[f"{stem}_MAXTEXT_TO_HF_PARAM_MAPPING"], space[f"{stem}_MAXTEXT_TO_HF_PARAM_HOOK_FN"]
    own = types.SimpleNamespace(
        model_name={"llama": "llama3.1-8b", "qwen3": "qwen3-8b"}[model], rope_type={"llama": "llama3.1"}.get(model, "default"),
        head_dim=hf["head_dim"], num_query_heads=hf["num_attention_heads"], num_kv_heads=hf["num_key_value_heads"],
        scan_layers=True, param_scan_axis=axis,
    )  # fmt: skip
    known = {
        "HF_MODEL_CONFIGS": {own.model_name: types.SimpleNamespace(to_dict=lambda: hf)}, "PARAM_MAPPING": {own.model_name: mapping},
        "ml_dtypes": None, "max_logging": types.SimpleNamespace(log=print), "torch": types.SimpleNamespace(bfloat16=None),
    }  # fmt: skip
    names = ("convert_hf_lora_key_to_maxtext", "_process_and_stack_weights", "convert_lora_to_maxtext_adapter")
    convert = functions(source / "checkpoint_conversion/to_maxtext.py", *names, **known)[-1]
    convert.__globals__["ml_dtypes"] = types.SimpleNamespace(bfloat16=np.float32)
    tree = convert(own, factors, "float32")
    folder = HERE / f"{model}-{axis}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    flat = _flat(tree)
    np.savez(folder / "lora.npz", **flat)
    np.savez(folder / "peft.npz", **factors)
    (folder / "config.json").write_text(json.dumps(hf, indent=1) + "\n")
    scale = json.loads((HERE.parent / "gguf" / model / "peft/adapter_config.json").read_text())
    np.savez(
        folder / "expected.npz",
        **_truth(
            hf, factors, mapping(hf, own, True), hooks(hf, own, True, False), axis, scale["lora_alpha"] / scale["r"]
        ),
    )


def _flat(tree, path=()):
    found = {}
    for key, value in tree.items():
        found |= _flat(value, (*path, key)) if isinstance(value, dict) else {"/".join((*path, key)): value}
    return found


def _truth(hf, factors, mapping, hooks, axis, scale):
    """MaxText's weights of a random checkpoint, without and with PEFT's ΔW, as its own hooks convert them."""
    draw, found = np.random.default_rng(13), {}
    heads, kv, head, width = (
        hf[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")
    )
    shapes = {
        "query": (width, heads, head),
        "key": (width, kv, head),
        "value": (width, kv, head),
        "out": (heads, head, width),
    }
    for own, torch in mapping.items():
        stem = [f"base_model.model.{name.removesuffix('.weight')}" for name in torch] if isinstance(torch, list) else []
        if not stem or f"{stem[0]}.lora_A.weight" not in factors:
            continue
        before, after = [], []
        for name in stem:
            a, b = factors[f"{name}.lora_A.weight"], factors[f"{name}.lora_B.weight"]
            weight = draw.standard_normal((b.shape[0], a.shape[1])).astype(np.float32)
            part = re.search(r"attention-(\w+)-kernel", own)
            shape = shapes[part[1]] if part else weight.T.shape
            for kept, value in ((before, weight), (after, weight + np.float32(scale) * b @ a)):
                for hook in hooks[own] if isinstance(hooks[own], list) else [hooks[own]]:
                    value = np.asarray(hook(value, shape))
                kept.append(value)
        key = own.removeprefix("params-").replace("-", "/")
        found |= {f"{key}|W": np.stack(before, axis), f"{key}|merged": np.stack(after, axis)}
    return found


if __name__ == "__main__":
    source = Path(sys.argv[1])
    facts = {"made_by": "make.py", "maxtext": "e591f30", "jax": jax.__version__, "orbax": ocp.__version__}
    facts["apply_lora_on_base_params fails on"] = native(source)
    for model in ("llama", "qwen3"):
        for axis in (0, 1):
            converted(source, model, axis)
    (HERE / "golden.json").write_text(json.dumps(facts, indent=1) + "\n")
