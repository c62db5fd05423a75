"""The names that transformers gives a model in memory, and those of the file that it writes of it."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loraformat as lf
from loraformat import Adapter, Lora, Update
from loraformat.axes import Placement

VISION = {
    "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
TEXT = {
    "vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 24,
}  # fmt: skip


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**VISION))


def dinov2():
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(Dinov2Config(**VISION))


def llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(vision_config=CLIPVisionConfig(**VISION).to_dict(), text_config=LlamaConfig(**TEXT).to_dict())
    return LlavaForConditionalGeneration(config)


@pytest.mark.peer
@pytest.mark.parametrize("make", [vit, dinov2, llava])
def test_every_weight_in_memory_is_found_in_the_file_that_transformers_writes(make, tmp_path):
    import torch

    torch.manual_seed(0)
    model = make()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    memory = {n: p.detach().numpy() for n, p in model.named_parameters() if p.ndim == 2 and n.endswith(".weight")}
    targets = {
        name: Update((Lora(np.ones((1, w.shape[1]), "f4"), np.ones((w.shape[0], 1), "f4"), 1.0, "factor"),))
        for name, w in memory.items()
    }
    found = lf.retarget(Adapter(targets), base=lf.open_base(tmp_path))
    assert sum(name not in stored for name in memory) > 4
    for name, (new,) in found.matched.items():
        np.testing.assert_array_equal(memory[name], stored[new], err_msg=name)
    there = lf.retarget(found.adapter, "torch").adapter
    assert there.keys() <= stored.keys()


def test_a_rule_is_used_once_where_it_first_fits():
    from loraformat_converters.spaces.renames import _renamed, _rules

    rules = _rules({"model_type": "vit", "architectures": ["ViTForImageClassification"]})["ViTModel"]
    old = "vit.encoder.layer.1.attention.attention.query.weight"
    assert _renamed(old, rules).startswith("vit.layers.1.attention.")


def test_a_model_without_a_configuration_has_no_rules():
    from loraformat_converters.spaces.renames import _rules

    assert _rules({}) == {}


# What transformers divides, joins and stacks while it loads: the model in memory against the file that it writes.


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**TEXT, num_local_experts=3, num_experts_per_tok=2))


def qwen3_moe():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    more = {
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 18,
        "head_dim": 8,
        "decoder_sparse_step": 1,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**TEXT, **more))


def dinov2_swiglu():
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(Dinov2Config(**VISION, use_swiglu_ffn=True))


def pair_of(shape):
    """A pair for a Linear [out, in], or for a stack of them [experts, out, in]."""
    draw = np.random.default_rng(sum(shape))
    a, b = (draw.standard_normal((*shape[:-2], *s)).astype("f4") for s in ((2, shape[-1]), (shape[-2], 2)))
    axes = ((0,), (1,)) if len(shape) == 2 else ((1,), (2,), (0,))
    return Update((Lora(a, b, 3.0, "alpha/r"),), Placement(shape, *axes))


@pytest.mark.peer
@pytest.mark.parametrize("make", [mixtral, qwen3_moe, dinov2_swiglu])
def test_a_merge_into_the_file_is_the_merge_in_memory(make, tmp_path):
    """The adapter has the names that the model has in memory; the file has tensors that these are made of."""
    import torch

    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "base")
    stored = load_file(tmp_path / "base/model.safetensors")
    memory = {n: p for n, p in model.named_parameters() if p.ndim > 1 and p.ndim < 4 and "embed" not in n}
    adapter = Adapter({name: pair_of(tuple(p.shape)) for name, p in memory.items()})
    assert sum(name not in stored for name in adapter) > 2
    base = lf.open_base(tmp_path / "base")
    found = lf.retarget(adapter, base=base)
    lf.merge(found.adapter, base, tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged")
    for name, parameter in again.named_parameters():
        wanted = dict(model.named_parameters())[name].detach().numpy()
        if name in adapter:
            wanted = adapter[name].apply(wanted)
        np.testing.assert_allclose(parameter.detach().numpy(), wanted, rtol=1e-5, atol=1e-5, err_msg=name)


# timm, without timm: the same rows under both names.


def vit_in_timm(stored):
    """The tensors of a ViT of transformers' older names as timm has them (convert_vit_timm_to_pytorch.py, backwards)."""
    made = {}
    for i in range(VISION["num_hidden_layers"]):
        block, layer = f"blocks.{i}.", f"vit.encoder.layer.{i}."
        for leaf in ("weight", "bias"):
            parts = [stored[f"{layer}attention.attention.{name}.{leaf}"] for name in ("query", "key", "value")]
            made[f"{block}attn.qkv.{leaf}"] = np.concatenate(parts)
            made[f"{block}attn.proj.{leaf}"] = stored[f"{layer}attention.output.dense.{leaf}"]
            made[f"{block}mlp.fc1.{leaf}"] = stored[f"{layer}intermediate.dense.{leaf}"]
            made[f"{block}mlp.fc2.{leaf}"] = stored[f"{layer}output.dense.{leaf}"]
    made["head.weight"] = stored["classifier.weight"]
    return made


@pytest.mark.peer
def test_a_vit_of_transformers_and_one_of_timm_take_each_others_adapters(tmp_path):
    model = vit()
    model.save_pretrained(tmp_path / "hf")
    timm = vit_in_timm(load_file(tmp_path / "hf/model.safetensors"))
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in timm.items()}, tmp_path / "timm.safetensors")
    memory = {n: p.detach().numpy() for n, p in model.named_parameters() if p.ndim == 2}
    adapter = Adapter({name: pair_of(w.shape) for name, w in memory.items()})
    there = lf.retarget(adapter, base=lf.open_base(tmp_path / "timm.safetensors")).adapter
    assert there.keys() == {name for name in timm if name.endswith("weight")}
    queries = next(adapter[name].matrix() for name in adapter if "layer.1." in name.replace("layers", "layer") and ("query" in name or "q_proj" in name))  # fmt: skip
    np.testing.assert_allclose(there["blocks.1.attn.qkv.weight"].matrix()[:12], queries, rtol=1e-5)
    back = lf.retarget(there, base=lf.open_base(tmp_path / "hf")).adapter
    stored = load_file(tmp_path / "hf/model.safetensors")
    assert back.keys() <= stored.keys()
    again = lf.retarget(adapter, base=lf.open_base(tmp_path / "hf")).adapter
    assert back.keys() == again.keys()
    for key, update in again.items():
        np.testing.assert_allclose(back[key].matrix(), update.matrix(), rtol=1e-5, atol=1e-6, err_msg=key)
