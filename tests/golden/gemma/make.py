"""Write the goldens of DeepMind's gemma: LoRA trees of tiny models, and what each einsum computes with its factors.

    python make.py                 (gemma 3.3.0 with flax, jax, orbax-checkpoint; see ``golden.json`` for the versions)
    python make.py --check FILE…   loads trees that loraformat wrote of a case (``CASE.msgpack``): outputs must be equal

Cases: ``gqa`` (fewer keys than queries, the gating einsum transposed, as Gemma 3), ``mha`` (q, k and v in one einsum, as
Gemma 1's 7B) and ``dense`` (flax's own Dense, DenseGeneral and Einsum, which gm.nn.LoRA wraps as well). Every dimension
differs, every value is random. ``expected.npz`` has the weight, the equation, the input and the output of each module.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import linen as nn
from flax import serialization
from flax.traverse_util import flatten_dict, unflatten_dict
from gemma import gm, peft
from gemma.gm.nn import _config, _layers, _modules, _transformer

HERE = Path(__file__).resolve().parent
TOKENS = jnp.asarray([[3, 1, 12, 7, 5]])
RANK = 5


def config(kv: int, transposed: bool) -> _config.TransformerConfig:
    return _config.TransformerConfig(
        num_embed=13, embed_dim=10, hidden_dim=14, num_heads=6, head_dim=4, num_kv_heads=kv, final_logit_softcap=None,
        use_post_attn_norm=True, use_post_ffw_norm=True, attention_types=(_modules.AttentionType.GLOBAL,),
        transpose_gating_einsum=transposed, use_qk_norm=True,
    )  # fmt: skip


class Dense(nn.Module):
    """flax's own layers, each with an axis more than the one before."""

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(11, use_bias=False, name="dense")(x)
        y = nn.DenseGeneral((4, 3), use_bias=False, name="heads")(y)
        y = nn.DenseGeneral(9, axis=(-2, -1), use_bias=False, name="out")(y)
        y = y.reshape(y.shape[0], 3, 3)
        y = nn.DenseGeneral(7, axis=-1, batch_dims=(0,), use_bias=False, name="batched")(y)
        return nn.Einsum((3, 7, 2), "bnh,nhd->bd", use_bias=False, name="einsum")(y)


def cases():
    for name, kv, transposed in (("gqa", 3, True), ("mha", 6, False)):
        yield name, _transformer.Transformer(config=config(kv, transposed), tokens="x", dtype=jnp.float32), TOKENS
    yield "dense", Dense(), jnp.asarray(np.random.default_rng(1).standard_normal((5, 8)), jnp.float32)


def lora(model):
    return gm.nn.LoRA(rank=RANK, model=model, dtype=jnp.float32)


def randomised(params, seed=0):
    draw = np.random.default_rng(seed)
    flat = {key: 0.5 * draw.standard_normal(value.shape) for key, value in sorted(flatten_dict(params).items())}
    return unflatten_dict({key: jnp.asarray(value, jnp.float32) for key, value in flat.items()})


def outputs(model, params, inputs):
    found = model.apply({"params": params}, inputs)
    return np.asarray(getattr(found, "logits", found))


def seen(model, params, inputs):
    """Path → (equation, input, output with the factors) of each module that has some: the outermost call of each."""
    found = {}

    def watch(call, args, kwargs, context):
        result = call(*args, **kwargs)
        module = context.module
        if (
            context.method_name == "__call__"
            and "lora" not in module.path
            and not type(module).__name__.startswith("_LoRA")
        ):
            name = "/".join(module.path) + (f"#{module.weight_name}" if isinstance(module, _layers.Einsum) else "")
            found.setdefault(name, (args, result))
            found[name] = (args, result)  # the outermost call ends last
        return result

    with nn.intercept_methods(watch), jax.disable_jit():
        model.apply({"params": params}, inputs)
    return found


EQUATIONS = {"dense": "bi,io->bo", "heads": "bi,inh->bnh", "out": "bnh,nhd->bd", "batched": "bni,bio->bno", "einsum": "bnh,nhd->bd"}  # fmt: skip


def expected(model, params, inputs):
    weights = {"/".join(path): value for path, value in flatten_dict(peft.split_params(params).original).items()}
    arrays = {}
    for name, (args, result) in seen(model, params, inputs).items():
        path, _, weight = name.partition("#")
        if weight:
            key, equation, x = f"{path}/{weight}", *args
        elif path in EQUATIONS:
            key, equation, x = f"{path}/kernel", EQUATIONS[path], args[0]
        else:
            continue
        arrays |= {f"{key}|W": weights[key], f"{key}|x": x, f"{key}|y": result, f"{key}|equation": np.array(equation)}
    return {key: np.asarray(value) for key, value in arrays.items()}


def write(name, model, inputs):
    wrapped = lora(model)
    params = randomised(wrapped.init(jax.random.key(0), inputs)["params"])
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    original, factors = peft.split_params(params)
    (folder / "lora.msgpack").write_bytes(serialization.to_bytes(factors))
    if name == "gqa":
        with ocp.StandardCheckpointer() as writer:
            writer.save(folder / "orbax", factors)
    arrays = expected(wrapped, params, inputs)
    arrays |= {"|y": outputs(wrapped, params, inputs), "|base": outputs(model, original, inputs)}
    np.savez(folder / "expected.npz", **arrays)
    np.savez(folder / "base.npz", **{"/".join(path): np.asarray(v) for path, v in flatten_dict(original).items()})


def check(path):
    """A tree that loraformat wrote, in the model: the outputs that the golden's own factors give."""
    name, model, inputs = next(case for case in cases() if case[0] == path.stem)
    with np.load(HERE / name / "base.npz") as arrays:
        original = unflatten_dict({tuple(key.split("/")): jnp.asarray(arrays[key]) for key in arrays.files})
    factors = serialization.msgpack_restore(path.read_bytes())
    found = outputs(lora(model), peft.merge_params(original, factors), inputs)
    with np.load(HERE / name / "expected.npz") as arrays:
        wanted, base = arrays["|y"], arrays["|base"]
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    print(f"{path}: {error:.1e} (without the factors {np.linalg.norm(base - wanted) / np.linalg.norm(wanted):.1e})")
    return error < 1e-6


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(not all(check(Path(name)) for name in sys.argv[2:]))
    for case in cases():
        write(*case)
    import gemma

    facts = {"gemma": gemma.__version__, "flax": flax.__version__, "jax": jax.__version__, "orbax": ocp.__version__}
    (HERE / "golden.json").write_text(json.dumps({"made_by": "make.py", **facts}, indent=1) + "\n")
