"""Chains: trained in JAX and run by ONNX Runtime; Tunix's factors to PEFT, to GGUF, to llama.cpp."""

import json

import numpy as np
import pytest
from gguf_goldens import HERE as GGUF
from gguf_goldens import truth_of
from installed import needs
from jax_goldens import GOLDEN
from safetensors.numpy import load_file

import loraformat as lf
from loraformat import registry
from loraformat.layout import ReadOptions, WriteOptions
from loraformat.testing import relative_error
from loraformat.verbs.bind import bind
from loraformat.verbs.convert import save
from loraformat.verbs.retarget import retarget

# Tunix's own loader (models/llama3, qwen2/params.py): W.T, by heads in attention.
TUNIX = {
    "self_attn.q_proj": ("attn/q_proj/w", "num_attention_heads", "out"),
    "self_attn.k_proj": ("attn/k_proj/w", "num_key_value_heads", "out"),
    "self_attn.v_proj": ("attn/v_proj/w", "num_key_value_heads", "out"),
    "self_attn.o_proj": ("attn/o_proj/w", "num_attention_heads", "in"),
    **{f"mlp.{name}_proj": (f"mlp/{name}_proj/kernel", "", "") for name in ("gate", "up", "down")},
}


def tunix(case):
    """(leaves as Qwix keeps them, the shapes of Tunix's weights, alpha) of the PEFT golden: einsums have heads."""
    config = json.loads((GGUF / case / "config.json").read_text())
    told = json.loads((GGUF / case / "peft/adapter_config.json").read_text())
    tensors, leaves, shapes = load_file(GGUF / case / "peft/adapter_model.safetensors"), {}, {}
    for module, (own, count, side) in TUNIX.items():
        stem = f"base_model.model.model.layers.0.{module}"
        a, b = tensors[f"{stem}.lora_A.weight"].T, tensors[f"{stem}.lora_B.weight"].T
        heads = (config[count], -1) if count else ()
        if side == "out":
            b = b.reshape(b.shape[0], *heads)
        elif side == "in":
            a = a.reshape(*heads, a.shape[-1])
        leaves |= {f"layers/0/{own}_lora_a": a, f"layers/0/{own}_lora_b": b}
        shapes[f"layers/0/{own}"] = (*a.shape[:-1], *b.shape[1:])
    return leaves, shapes, config, told["lora_alpha"]


@pytest.mark.parametrize("case", ["llama", "qwen2"])
def test_tunix_to_peft_to_gguf_is_the_same_change_at_every_step(case, tmp_path):
    leaves, shapes, config, alpha = tunix(case)
    np.savez(tmp_path / "tunix.npz", **leaves)
    np.savez(tmp_path / "base.npz", **{name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    options = ReadOptions(alpha=float(alpha), base=lf.open_base(tmp_path / "base.npz"))
    first = registry.read(tmp_path / "tunix.npz", None, options)[0].adapter
    assert {key: update.placement.shape for key, update in first.items()} == shapes
    second = retarget(first, "torch", config=config).adapter
    save(second, tmp_path / "peft", registry.layout("peft"))
    theirs, ours = lf.load(GGUF / case / "peft"), lf.load(tmp_path / "peft")
    assert len(ours) == len(TUNIX)
    for key, update in ours.items():
        assert relative_error(update.matrix(), theirs[key].matrix()) < 1e-6, key
    lf.convert(tmp_path / "peft", tmp_path / "a.gguf", base=GGUF / case / "config.json")
    last, truth = lf.load(tmp_path / "a.gguf"), truth_of(case)
    assert len(last) == len(TUNIX)
    for key, update in last.items():
        assert relative_error(update.delta(), truth[key]) < 1e-6, key


@pytest.mark.peer
def test_llama_cpp_runs_what_tunix_trained(tmp_path):
    pytest.importorskip("xllamacpp", reason="needs the peer xllamacpp")
    from test_gguf_loads import difference

    test_tunix_to_peft_to_gguf_is_the_same_change_at_every_step("qwen2", tmp_path)
    assert difference("qwen2", tmp_path / "a.gguf") <= 1e-5
    assert difference("qwen2") <= 1e-5


JAX2ONNX = GOLDEN / "jax2onnx"


def by_the_checkpoint(adapter, flax, graph):
    """The graph's own names, by the values of both."""
    return retarget(adapter, base=graph, origin=flax).adapter


def by_sketches(adapter, flax, graph):
    """Bound to the checkpoint, under torch's names: the graph is resolved without it."""
    return retarget(bind(adapter, flax), "torch").adapter


@pytest.mark.parametrize("found", [by_the_checkpoint, by_sketches])
@pytest.mark.parametrize("verb", [lf.merge, lf.attach], ids=["merge", "attach"])
def test_trained_in_nnx_and_put_into_what_jax2onnx_wrote(verb, found, tmp_path):
    """No name is left in such a graph (const_0, …): its weights are found by the values of the JAX checkpoint."""
    needs("opset 23")
    graph = lf.open_base(JAX2ONNX / "model.onnx")
    adapter = found(lf.load(JAX2ONNX / "lora.msgpack"), lf.open_base(JAX2ONNX / "base.npz"), graph)
    with np.load(JAX2ONNX / "expected.npz") as arrays:
        x, wanted, base = arrays["x"], arrays["y"], arrays["base"]
    assert np.abs(outputs(JAX2ONNX / "model.onnx", x) - base).max() <= 1e-5
    verb(adapter, graph, tmp_path / "out.onnx")
    assert np.abs(outputs(tmp_path / "out.onnx", x) - wanted).max() <= 1e-5
    assert np.abs(base - wanted).max() > 0.1


def outputs(path, x):
    import onnxruntime as ort

    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


@pytest.mark.peer
@pytest.mark.parametrize("way", ["nnx", "qwix"])
def test_trained_in_jax_and_run_by_onnx_runtime(way, tmp_path):
    """The model goes to ONNX by a twin in torch with the same weights; the adapter by its names, merged and attached."""
    pytest.importorskip("qwix", reason="needs qwix: the peers extra")
    torch = pytest.importorskip("torch", reason="needs torch: the peers extra")
    import test_jax_trained as jax_side
    from flax import nnx

    base = jax_side.Plain(nnx.Rngs(0))
    if way == "nnx":
        module, options = jax_side.with_lora(jax_side.Plain(nnx.Rngs(0))), ReadOptions()
    else:
        provider = jax_side.qwix.LoraProvider(module_path=".*", rank=3, alpha=7.0)
        module = jax_side.qwix.apply_lora_to_model(jax_side.Plain(nnx.Rngs(0)), provider, jax_side.X, rngs=nnx.Rngs(1))
        options = ReadOptions(alpha=7.0, rank=3, base=jax_side.Shapes(base))
    module = jax_side.trained(module, nnx.LoRAParam)
    wanted = np.asarray(module(jax_side.X))
    adapter = jax_side.jax_live.from_pytree(nnx.state(module, nnx.LoRAParam), options=options)
    save(adapter, tmp_path / f"{way}.msgpack", registry.layout(way), WriteOptions())
    read = registry.read(tmp_path / f"{way}.msgpack", None, options)[0].adapter
    torch.onnx.export(jax_side.Twin(base), (torch.tensor(jax_side.X),), tmp_path / "base.onnx", dynamo=False)
    check_onnx(retarget(read, "torch").adapter, tmp_path, wanted)


def check_onnx(adapter, folder, wanted):
    """The base graph gives something else; merged into it and attached to it, the adapter gives JAX's own outputs."""
    from test_jax_trained import X

    assert relative_error(outputs(folder / "base.onnx", X), wanted) > 0.05
    lf.merge(adapter, lf.open_base(folder / "base.onnx"), folder / "merged.onnx")
    lf.attach(adapter, lf.open_base(folder / "base.onnx"), folder / "attached.onnx")
    for name in ("merged", "attached"):
        assert np.abs(outputs(folder / f"{name}.onnx", X) - wanted).max() <= 1e-5, name
