"""The names that transformers gives a model in memory, and those of the file that it writes of it."""

import numpy as np
import pytest
from safetensors.numpy import load_file

import loraformat as lf
from loraformat import Adapter, Lora, Update

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
