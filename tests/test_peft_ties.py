"""A head that PEFT adapts because it is tied to the embedding: read without a false word, and written as PEFT loads it."""

import json
from dataclasses import replace

import pytest
from safetensors.numpy import load_file, save_file

import loraformat as lf
from loraformat import registry
from loraformat.verbs.convert import save

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.peer

IDS = [[1, 4, 2, 7]]

CASES = {
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=[4, 1], target_modules=["embed_tokens"]),
    "factors": lambda: peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
}


def tied_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 20}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config).eval()


def logits(model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits


@pytest.fixture(params=CASES)
def trained(request, tmp_path):
    """(folder, outputs) of an adapter that PEFT saved."""
    model = peft.get_peft_model(tied_model(), CASES[request.param]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "trained")
    return tmp_path / "trained", logits(model)


def written(adapter, folder):
    save(adapter, folder, registry.layout("peft"))
    return logits(peft.PeftModel.from_pretrained(tied_model(), folder).eval())


def test_the_head_is_no_module_that_peft_leaves_out(trained):
    reading, _, _ = registry.read(trained[0])
    assert "lm_head.weight" in reading.adapter
    assert not reading.warnings


def test_peft_loads_again_what_it_saved(trained, tmp_path):
    found = written(lf.load(trained[0]), tmp_path / "out")
    assert torch.allclose(found, trained[1], atol=1e-6)
    assert (tmp_path / "out" / "adapter_config.json").read_text() == (trained[0] / "adapter_config.json").read_text()


def test_a_configuration_that_is_written_anew_leaves_the_head_to_peft(trained, tmp_path):
    adapter = lf.load(trained[0])
    config = json.loads(adapter.extensions["peft"]) | {"modules_to_save": ["absent"], "trainable_token_indices": None}
    found = written(replace(adapter, extensions={"peft": json.dumps(config)}), tmp_path / "out")
    assert torch.allclose(found, trained[1], atol=1e-6)


def test_a_head_with_factors_of_its_own_is_still_told_of(tmp_path):
    model = peft.get_peft_model(tied_model(), CASES["factors"]()).eval()
    model.save_pretrained(tmp_path / "trained")
    file = tmp_path / "trained" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.lora_A.weight"] = tensors["base_model.model.lm_head.lora_A.weight"] + 1
    save_file(tensors, file)
    (warning,) = registry.read(tmp_path / "trained")[0].warnings
    assert (warning.rule, warning.where) == ("LF-507", "lm_head")
