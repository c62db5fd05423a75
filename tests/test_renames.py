"""The names that transformers gives a model in memory, and those of the file that it writes of it."""

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import transformers_models
from mutants import net
from safetensors.numpy import load_file, save_file

import loraformat as lf
from loraformat import Adapter, Lora, Update
from loraformat.axes import Placement
from loraformat.testing import relative_error

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
@pytest.mark.parametrize("make", [mixtral, qwen3_moe, dinov2_swiglu, *transformers_models.CONVERTED])
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


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("make", [mixtral, qwen3_moe])
def test_what_peft_trains_on_stacks_is_merged_into_the_experts_of_a_file(make, tmp_path):
    """PEFT's file says not which pair is whose; the experts, which the base stores one by one, do."""
    import peft
    import torch

    torch.manual_seed(0)
    model, ids = make().eval(), torch.arange(2, 30).reshape(2, 14)
    model.set_experts_implementation("eager")  # torch 2.13 groups products of rows of 16 bytes only
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "base")
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=parameters)
    trained = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in (p for p in trained.parameters() if p.requires_grad):
            torch.nn.init.normal_(parameter, std=0.3)
        wanted = trained(ids).logits.numpy()
    trained.save_pretrained(tmp_path / "adapter")
    base = lf.open_base(tmp_path / "base")
    found = lf.retarget(lf.load(tmp_path / "adapter", base=base), base=base)
    lf.merge(found.adapter, base, tmp_path / "merged")
    assert lf.verify(base, found.adapter, lf.open_base(tmp_path / "merged")).problems == []
    with torch.no_grad():
        again, plain = (
            type(model).from_pretrained(tmp_path / folder, experts_implementation="eager").eval()(ids).logits.numpy()
            for folder in ("merged", "base")
        )
    assert relative_error(again, wanted) <= 1e-5 < 0.1 < relative_error(plain, wanted)
    trained.merge_and_unload().save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("merged", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert relative_error(ours[name], tensor) <= 1e-6, name


@pytest.mark.peer
@pytest.mark.parametrize("make", transformers_models.PREFIXED)
def test_a_merge_into_a_file_whose_names_have_another_prefix(make, tmp_path):
    import torch

    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base/model.safetensors"
    older = {transformers_models.PREFIXED[make](name): tensor for name, tensor in load_file(file).items()}
    save_file(older, file, {"format": "pt"})
    memory = {n: p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n}
    adapter = Adapter({name: pair_of(tuple(p.shape)) for name, p in memory.items()})
    assert not adapter.keys() & older.keys() - {"lm_head.weight"}
    base = lf.open_base(tmp_path / "base")
    lf.merge(lf.retarget(adapter, base=base).adapter, base, tmp_path / "merged")
    again = dict(type(model).from_pretrained(tmp_path / "merged").named_parameters())
    for name, parameter in memory.items():
        wanted = adapter[name].apply(parameter.detach().numpy())
        np.testing.assert_allclose(again[name].detach().numpy(), wanted, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.peer
def test_a_merge_into_experts_that_lie_transposed_in_an_older_file(tmp_path):
    """transformers 5.23 transposes them where their shape is not the model's; pairs without a placement fit one way alone."""
    import torch

    torch.manual_seed(0)
    model = transformers_models.qwen3_vl_moe()
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base/model.safetensors"
    stored = load_file(file)
    experts = [name for name in stored if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    turned = {name: np.ascontiguousarray(stored[name].swapaxes(1, 2)) for name in experts}
    save_file(stored | turned, file, {"format": "pt"})
    pairs = {name: pair_of(stored[name].shape) for name in experts}
    adapter = Adapter({name: replace(update, placement=None) for name, update in pairs.items()})
    base = lf.open_base(tmp_path / "base")
    lf.merge(lf.retarget(adapter, base=base).adapter, base, tmp_path / "merged")
    again = dict(type(model).from_pretrained(tmp_path / "merged").named_parameters())
    assert len(experts) == 4
    for name, update in pairs.items():
        np.testing.assert_allclose(again[name].detach().numpy(), update.apply(stored[name]), rtol=1e-5, atol=1e-5)


# timm: its own model computed the goldens; transformers' model has the same weights under its names.


timm_names = importlib.import_module("loraformat_converters.spaces.timm")  # the package has an object of this name

TIMM = Path(__file__).parent / "golden/timm"
NAMES = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj.": "vit.embeddings.patch_embeddings.projection.",
    "norm.": "vit.layernorm.",
    "head.": "classifier.",
}
BLOCK = {
    "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
}  # fmt: skip


def from_timm(tensors):
    """A ViT of timm as a file of transformers (its convert_vit_timm_to_pytorch.py)."""
    made = {}
    for name, tensor in tensors.items():
        if not name.startswith("blocks."):
            start = next(start for start in NAMES if name.startswith(start))
            made[NAMES[start] + name.removeprefix(start)] = tensor
            continue
        _, number, module, leaf = re.fullmatch(r"(blocks)\.(\d+)\.(.+)\.(\w+)", name).groups()
        stem = f"vit.encoder.layer.{number}."
        if module != "attn.qkv":
            made[f"{stem}{BLOCK[module]}.{leaf}"] = tensor
            continue
        for part, third in zip(("query", "key", "value"), np.split(tensor, 3), strict=True):
            made[f"{stem}attention.attention.{part}.{leaf}"] = third
    return {name: np.ascontiguousarray(tensor) for name, tensor in made.items()}


def vit_file(folder):
    """The base of the golden in a folder of transformers, as an older version wrote it."""
    config = VISION | {"model_type": "vit", "architectures": ["ViTForImageClassification"], "layer_norm_eps": 1e-6}
    config |= {"hidden_act": "gelu", "num_labels": 5, "id2label": {str(i): str(i) for i in range(5)}, "qkv_bias": True}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(from_timm(load_file(TIMM / "base.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return folder


def check_timm(folder):
    """What was trained in timm, merged under transformers' names, row for row; and led back."""
    base = lf.open_base(vit_file(folder / "hf"))
    adapter = lf.load(TIMM / "adapter.safetensors")
    there = lf.retarget(adapter, base=base).adapter
    assert len(there) == len(adapter) + 2 * 2
    wanted = from_timm({name: update.matrix() for name, update in adapter.items()})
    assert there.keys() == wanted.keys()
    for name, update in there.items():
        np.testing.assert_allclose(update.matrix(), wanted[name], rtol=1e-5, atol=1e-6, err_msg=name)
    back = lf.retarget(there, base=lf.open_base(TIMM / "base.safetensors")).adapter
    assert back.keys() == adapter.keys()
    for name, update in adapter.items():
        np.testing.assert_allclose(back[name].matrix(), update.matrix(), rtol=1e-5, atol=1e-6, err_msg=name)


def key_before_query(patch):
    patch.setattr(timm_names, "_QKV", [timm_names._QKV[i] for i in (1, 0, 2)])


def halves_for_thirds(patch):
    real = timm_names.Share
    patch.setattr(timm_names, "Share", lambda start, stop, of: real(start % 2, start % 2 + 1, 2))


test_the_golden_of_timm, test_a_mutant_turns_it_red = net(
    {"timm": check_timm}, [(key_before_query, "timm"), (halves_for_thirds, "timm")]
)


@pytest.mark.peer
def test_an_adapter_of_timm_gives_transformers_model_timms_own_logits(tmp_path):
    import torch
    from transformers import ViTForImageClassification

    base = lf.open_base(vit_file(tmp_path / "hf"))
    truth = load_file(TIMM / "truth.safetensors")
    lf.merge(lf.retarget(lf.load(TIMM / "adapter.safetensors"), base=base).adapter, base, tmp_path / "merged")
    for folder, name in (("hf", "y"), ("merged", "merged")):
        model = ViTForImageClassification.from_pretrained(tmp_path / folder).eval()
        with torch.no_grad():
            found = model(torch.from_numpy(truth["x"])).logits.numpy()
        np.testing.assert_allclose(found, truth[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.peer
def test_names_of_transformers_5_lead_to_timm_too():
    model = vit()
    memory = {n: tuple(p.shape) for n, p in model.named_parameters() if p.ndim == 2 and "classifier" not in n}
    adapter = Adapter({name: pair_of(shape) for name, shape in memory.items()})
    there = lf.retarget(adapter, base=lf.open_base(TIMM / "base.safetensors")).adapter
    wanted = {
        name for name in load_file(TIMM / "base.safetensors") if name.startswith("blocks") and ".norm" not in name
    }
    assert there.keys() == {name for name in wanted if name.endswith("weight")}
